"""What a launcher needs from whoever compiles and starts kernels: the driver through CuPy, or the emulation of tests/emu.

A launcher knows the layout of its kernel's parameter struct and the size of its grid; it knows nothing of compilers, streams or
devices. A runtime knows nothing of what a kernel computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


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
