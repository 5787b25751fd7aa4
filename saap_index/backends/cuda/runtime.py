"""The runtime of real devices: torch owns memory and streams, CuPy compiles, the driver launches. Knows no kernel.

CuPy is imported when the first index on a GPU is made, not before. Compiled kernels lie in CuPy's cache on disk
(``~/.cupy/kernel_cache``, or CUPY_CACHE_DIR) under a hash of their whole text, headers included.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ...errors import DeviceError, MissingDependencyError, ParameterError
from . import driver as gpu_driver
from . import source as gpu_source
from .launch import CLUSTERS, MOST_CLUSTER, Kernel

LEAST_CAPABILITY = (8, 0)
SHARED_BYTES_PER_BLOCK_OPTIN = 97  # cudaDevAttrMaxSharedMemoryPerBlockOptin


class _Stream:
    """What CuPy asks of a stream: its address."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class CupyKernel:
    """One kernel of one device: CuPy's function, started by the driver, or by CuPy where the driver cannot be reached."""

    def __init__(self, raw: Any, device: torch.device, most_shared_bytes: int, capability: tuple[int, int]) -> None:
        # Set once, here: inside the capture of a graph it would be too late.
        raw.max_dynamic_shared_size_bytes = most_shared_bytes
        self._function = raw.kernel
        self._device = device
        self._capability = capability

    def prepare(
        self, grid: tuple[int, int, int], block: int, shared_bytes: int, params: np.ndarray[Any, Any], cluster: int = 1,
        dependent: bool = False,
    ) -> Callable[[], None]:
        if (cluster > 1 or dependent) and self._capability < CLUSTERS:
            want, got = _dotted(CLUSTERS), _dotted(self._capability)
            raise DeviceError(f"launch: expected capability {want} for clusters and dependent launches, got {got}")
        if not 1 <= cluster <= MOST_CLUSTER or grid[0] % cluster:
            raise ParameterError(f"cluster: expected a divisor of grid[0] = {grid[0]} up to {MOST_CLUSTER}, got {cluster}")
        return _Start(self._starter(grid, block, shared_bytes, params, cluster, dependent), self._device)

    def launch(
        self, grid: tuple[int, int, int], block: int, shared_bytes: int, params: np.ndarray[Any, Any], cluster: int = 1,
        dependent: bool = False,
    ) -> None:
        self.prepare(grid, block, shared_bytes, params, cluster, dependent)()

    def _starter(
        self, grid: tuple[int, int, int], block: int, shared_bytes: int, params: np.ndarray[Any, Any], cluster: int,
        dependent: bool,
    ) -> Callable[[int], None]:
        """What starts it on a stream, on the current device."""
        if gpu_driver.available():
            function, address = int(self._function.ptr), params.ctypes.data
            return gpu_driver.DriverLaunch(
                function, grid, block, shared_bytes, address, cluster, dependent, self._device.index, params
            )
        # CuPy passes an array of one element by value, and finds its address by __array_interface__, which describes every
        # field of a struct: 40 us. Bytes have none.
        args = (params.view(np.dtype((np.void, params.nbytes))),)
        return lambda stream: self._function(grid, (block,), args, shared_mem=shared_bytes, stream=_Stream(stream))


def _raw_stream(index: int) -> int:
    """The address of the current stream of a device."""
    of = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return int(of(index) if of is not None else torch.cuda.current_stream(index).cuda_stream)


class _Start:
    """Starts a kernel on the current stream of its device; ``on``: on one by its address, the device being current."""

    __slots__ = ("_device", "_index", "on")

    def __init__(self, on: Callable[[int], None], device: torch.device) -> None:
        self.on, self._device, self._index = on, device, device.index

    def __call__(self) -> None:
        # The current stream changes, inside torch.cuda.graph above all, so it is never kept.
        if torch.cuda.current_device() == self._index:
            self.on(_raw_stream(self._index))
        else:
            with torch.cuda.device(self._device):
                self.on(_raw_stream(self._index))


class CupyRuntime:
    """One CUDA device, as launchers see it (`gpu_types.Runtime`).

    Raises DeviceError without a usable GPU or with too old a driver, MissingDependencyError without CuPy; `kernel` raises the
    one where compiled kernels cannot be kept, the other where CuPy lacks a compiler.
    """

    def __init__(self, device: torch.device) -> None:
        self._cupy = _cupy(device)
        self.device = device
        properties = torch.cuda.get_device_properties(device)
        self.name = str(properties.name)
        self.multiprocessors = int(properties.multi_processor_count)
        # launches with attributes are the driver's alone
        capability = torch.cuda.get_device_capability(device)
        self.capability = capability if gpu_driver.available() else min(capability, LEAST_CAPABILITY)
        self.max_shared_bytes = int(self._cupy.cuda.runtime.deviceGetAttribute(SHARED_BYTES_PER_BLOCK_OPTIN, device.index))
        self._kernels: dict[tuple[str, str, tuple[str, ...]], CupyKernel] = {}
        self._side: torch.cuda.Stream | None = None

    @property
    def capturing(self) -> bool:
        """Whether launches on the current stream are recorded for a graph."""
        return bool(torch.cuda.is_current_stream_capturing())

    def stream(self) -> int | None:
        """The address of the current stream; None while another device is current."""
        return _raw_stream(self.device.index) if torch.cuda.current_device() == self.device.index else None

    @contextmanager
    def beside(self, *memory: torch.Tensor) -> Iterator[Callable[[], None]]:
        """See `Runtime.beside`."""
        current = torch.cuda.current_stream(self.device)
        if self._side is None:
            self._side = torch.cuda.Stream(self.device)
        side = self._side
        side.wait_stream(current)
        event = torch.cuda.Event()
        for x in memory:
            x.record_stream(side)
        with torch.cuda.stream(side):
            yield lambda: torch.cuda.current_stream(self.device).wait_event(event)
        event.record(side)

    def kernel(self, file: str, name: str, macros: Mapping[str, int]) -> Kernel:
        key = file, name, gpu_source.options(macros)
        kernel = self._kernels.get(key)
        if kernel is None:
            with torch.cuda.device(self.device), self._cupy.cuda.Device(self.device.index):
                module = self._cupy.RawModule(code=gpu_source.source(file), options=("-std=c++17", *key[2]), backend="nvrtc")
                raw = self._compiled(module, name)
                # what the kernel keeps static (nothing, by the rules of cuda/) is no longer there for dynamic use
                kernel = CupyKernel(raw, self.device, self.max_shared_bytes - int(raw.shared_size_bytes), self.capability)
            self._kernels[key] = kernel
        return kernel

    def _compiled(self, module: Any, name: str) -> Any:
        """A function of ``module``. MissingDependencyError where CuPy finds nothing to compile with, DeviceError where it has no
        folder to keep the result in."""
        cuda = self._cupy.cuda
        try:
            return module.get_function(name)
        except (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError):
            raise
        except (ImportError, OSError, RuntimeError) as error:  # a fault
            if isinstance(error, OSError) and error.errno is not None:  # of a library that is not there it has no number
                where = error.filename or os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache"
                raise DeviceError(
                    f"device 'cuda': expected a folder for compiled kernels that can be written, got {where} ({error}); set "
                    "CUPY_CACHE_DIR to one (and TMPDIR, where that is what cannot be written)"
                ) from error
            # a fault of the source would be CuPy's CompileException
            raise MissingDependencyError(
                f"device 'cuda' needs NVRTC and CUDA's headers for CuPy to compile with: pip install "
                f"'cupy-cuda{cuda.runtime.runtimeGetVersion() // 1000}x[ctk]', or set CUDA_PATH ({type(error).__name__}: {error})"
            ) from error


def runtime(device: torch.device) -> CupyRuntime:
    """The runtime of a CUDA device, one for the process. Raises as `CupyRuntime` does."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        _no_gpu(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    if not 0 <= index < torch.cuda.device_count():
        raise DeviceError(f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {str(device)!r}")
    return _runtime(index)


@functools.cache
def _runtime(index: int) -> CupyRuntime:
    return CupyRuntime(torch.device("cuda", index))


def _no_gpu(device: torch.device) -> None:
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA"
    else:
        why = f"torch {torch.__version__} finds no usable GPU for CUDA {torch.version.cuda} (no device, or too old a driver)"
    raise DeviceError(f"device: expected a CUDA device for {str(device)!r}, but {why}; device='cpu' needs none")


def _cupy(device: torch.device) -> Any:
    """The module cupy, if it and the driver under it can serve ``device``."""
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise DeviceError(
            f"device: expected compute capability {_dotted(LEAST_CAPABILITY)} or more (Ampere), got {_dotted(capability)}"
        )
    package = f"cupy-cuda{(torch.version.cuda or '13').split('.')[0]}x"
    try:
        import cupy
    except ImportError as error:
        raise MissingDependencyError(f"device 'cuda' needs CuPy: pip install {package} ({error})") from error
    try:
        driver, built = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(f"device: CuPy {cupy.__version__} cannot use the driver ({error}); {_advice()}") from error
    if driver // 1000 < built // 1000:
        raise DeviceError(
            f"device: expected a driver for CUDA {built // 1000}, which CuPy {cupy.__version__} is built for, got one for "
            f"{driver // 1000}.{driver % 1000 // 10}; {_advice()}"
        )
    return cupy


def _advice() -> str:
    return "update the driver, or install CuPy for the CUDA it supports: cupy-cuda12x or cupy-cuda13x"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
