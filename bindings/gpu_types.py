"""What a launcher needs from whoever compiles and starts kernels: the driver through CuPy, or the emulation of tests/emu.

A launcher knows the layout of its kernel's parameter struct and the size of its grid; it knows nothing of compilers, streams or
devices. A runtime knows nothing of what a kernel computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor


class Kernel(Protocol):
    """One ``extern "C"`` function, compiled for one set of macros."""

    def launch(self, grid: tuple[int, int, int], block: int, shared_bytes: int, params: np.ndarray[Any, Any]) -> None:
        """Start ``grid`` blocks of ``block`` threads (x only), each with ``shared_bytes`` of dynamic shared memory.

        params : one element of a structured dtype made with ``align=True``, laid out as the kernel's parameter struct; pointers
        are uint64. Its bytes are read before the call returns; what they point to must live until the kernel has run.
        """


class Runtime(Protocol):
    """Compiles kernels and says what the device offers."""

    @property
    def name(self) -> str: ...

    @property
    def multiprocessors(self) -> int: ...

    @property
    def max_shared_bytes(self) -> int:
        """Most dynamic shared memory of one block."""

    def kernel(self, file: str, name: str, macros: Mapping[str, int]) -> Kernel:
        """The function ``name`` of ``cuda/<file>``, compiled with ``-D`` of every macro; compiled once, then cached."""


class Launch:
    """A kernel with its grid and its parameters in place, to be started as often as one likes.

    params : as for `Kernel.launch`; kept : what its pointers point to lives as long as this does. One start at a time.
    """

    __slots__ = ("_block", "_grid", "_kept", "_launch", "_shared_bytes", "params")

    def __init__(
        self, kernel: Kernel, grid: tuple[int, int, int], block: int, shared_bytes: int, params: np.ndarray[Any, Any], *kept: Any
    ) -> None:
        self._launch, self._grid, self._block, self._shared_bytes = kernel.launch, grid, block, shared_bytes
        self.params, self._kept = params, kept

    def __call__(self, **pointers: Tensor) -> None:
        """Start the kernel, with other addresses for the fields that are named, from now on."""
        for name, x in pointers.items():
            self.params[name] = x.data_ptr()
        self._launch(self._grid, self._block, self._shared_bytes, self.params)
