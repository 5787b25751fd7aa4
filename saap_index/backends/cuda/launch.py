"""What a launcher needs from whoever compiles and starts kernels: the driver through CuPy, or the emulation of tests/emu.

A launcher knows the layout of its kernel's parameter struct and the size of its grid; it knows nothing of compilers, streams or
devices. A runtime knows nothing of what a kernel computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor

MOST_CLUSTER = 8
"""Blocks of a cluster that every device with clusters can place."""

CLUSTERS = (9, 0)
"""Least capability with clusters and dependent launches."""


class Kernel(Protocol):
    """One ``extern "C"`` function, compiled for one set of macros."""

    def prepare(
        self, grid: tuple[int, int, int], block: int, shared_bytes: int, params: np.ndarray[Any, Any], cluster: int = 1,
        dependent: bool = False,
    ) -> Callable[[], None]:
        """What starts ``grid`` blocks of ``block`` threads (x only), each with ``shared_bytes`` of dynamic shared memory.

        params : one element of a structured dtype made with ``align=True``, laid out as the kernel's parameter struct; pointers
        are uint64. Its bytes are read at every start, before that returns; what they point to must live until the kernel has run.
        cluster : blocks of a cluster, neighbours in x, at most MOST_CLUSTER; divides grid[0].
        dependent : whether blocks may start before the kernel in front of this one has ended; a block then calls
        grid_dependency_wait (cuda/prims.cuh) before it touches what that one writes, and before it ends.
        Both need a runtime whose `capability` is CLUSTERS or more.

        The result may have ``on(stream)``, which starts it on a stream by its address, of the device that is current.
        """

    def launch(
        self, grid: tuple[int, int, int], block: int, shared_bytes: int, params: np.ndarray[Any, Any], cluster: int = 1,
        dependent: bool = False,
    ) -> None:
        """Start it now: ``prepare(...)()``."""


class Runtime(Protocol):
    """Compiles kernels and says what the device offers.

    May have ``beside(*memory)``, a context: launches inside it start on a stream of their own, behind what the current stream
    holds by then and beside what comes after. memory : what they read or write; it goes to others only when they are done with
    it. As what is entered comes a function that makes the then current stream wait for them, and nothing else does. Not inside a
    capture.
    """

    @property
    def name(self) -> str: ...

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability that launches may count on: clusters and dependent launches from CLUSTERS on."""

    @property
    def multiprocessors(self) -> int: ...

    @property
    def max_shared_bytes(self) -> int:
        """Most dynamic shared memory of one block."""

    def kernel(self, file: str, name: str, macros: Mapping[str, int]) -> Kernel:
        """The function ``name`` of ``cuda/<file>``, compiled with ``-D`` of every macro; compiled once, then cached."""


class Launch:
    """A kernel with its grid and its parameters in place, to be started as often as one likes.

    params, cluster, dependent : as for `Kernel.prepare`; kept : what its pointers point to lives as long as this does. One start
    at a time. The array ``params`` may be changed in place between starts.
    """

    __slots__ = ("_kept", "_pointers", "_start", "on_stream", "params")

    def __init__(
        self, kernel: Kernel, grid: tuple[int, int, int], block: int, shared_bytes: int, params: np.ndarray[Any, Any], *kept: Any,
        cluster: int = 1, dependent: bool = False,
    ) -> None:
        self.params, self._kept = params, (params, *kept)
        self._start = start = kernel.prepare(grid, block, shared_bytes, params, cluster, dependent)
        on: Callable[[int], None] = getattr(start, "on", None) or (lambda stream: start())
        self.on_stream = on
        """Starts the kernel on a stream by its address; the device is current."""
        self._pointers: dict[str, ctypes.c_uint64] = {}

    def __call__(self, **pointers: Tensor) -> None:
        """Start the kernel, with other addresses for the fields that are named, from now on."""
        for name, x in pointers.items():
            field = self._pointers.get(name)
            if field is None:
                field = self.field(name)
            field.value = x.data_ptr()
        self._start()

    def field(self, name: str) -> ctypes.c_uint64:
        """A pointer where it lies: written in 50 ns, through NumPy in 200."""
        dtype, offset = self.params.dtype.fields[name][:2]  # type: ignore[index]
        if dtype != np.uint64:
            raise TypeError(f"{name}: expected a pointer, uint64, got {dtype}")
        field = self._pointers[name] = ctypes.c_uint64.from_address(self.params.ctypes.data + offset)
        return field
