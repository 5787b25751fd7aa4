"""Starts kernels through the CUDA driver itself, for the launch attributes that CuPy has no word for: clusters of blocks, and
programmatic dependent launch, by which a kernel's blocks come before the kernel in front of it has ended. Knows no kernel.

The driver's library is the one that torch and CuPy have loaded. Launches are legal while a graph is captured.
"""

from __future__ import annotations

import ctypes
import functools

from ...errors import DeviceError

_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, and a value of 64 bytes at an offset of 8."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


_INVALID_CONTEXT = 201


@functools.cache
def library() -> ctypes.CDLL:
    """libcuda. Raises DeviceError where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceError(f"device: expected a CUDA driver, got none ({error})") from error


def available() -> bool:
    """Whether `library` can be opened and launches with attributes (CUDA 11.8 or newer)."""
    try:
        return hasattr(library(), "cuLaunchKernelEx")
    except DeviceError:
        return False


class DriverLaunch:
    """One function of the driver with a grid, a cluster and an address of parameters, to be started on any stream.

    function : CUfunction; params : address of the parameter struct, which must stay where it is and is read at each start;
    cluster : blocks in x of a cluster, 1 for none; dependent : whether blocks may start before the kernel in front of this one on
    the stream has ended; device : number of the device that the function was loaded on; kept : lives as long as this.
    One start at a time.
    """

    __slots__ = ("_args", "_attributes", "_config", "_device", "_function", "_kept", "_launch", "_reference", "_stream")

    def __init__(
        self, function: int, grid: tuple[int, int, int], block: int, shared_bytes: int, params: int, cluster: int = 1,
        dependent: bool = False, device: int = 0, kept: object = None,
    ) -> None:
        attributes = []
        if cluster > 1:
            attributes.append(_Attribute(_CLUSTER_DIMENSION, 0, (ctypes.c_uint * 16)(cluster, 1, 1)))
        if dependent:
            attributes.append(_Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_uint * 16)(1)))
        self._attributes = (_Attribute * max(1, len(attributes)))(*attributes)
        self._config = _Config(
            (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(block, 1, 1), shared_bytes, None, self._attributes, len(attributes)
        )
        self._reference = ctypes.byref(self._config)
        self._function = ctypes.c_void_p(function)
        self._args = (ctypes.c_void_p * 1)(params)
        self._launch = library().cuLaunchKernelEx
        self._device, self._kept = device, kept

        self._stream: int | None = None

    def __call__(self, stream: int) -> None:
        """Start it on a CUstream of the device, which is the thread's current one. Raises DeviceError."""
        if stream != self._stream:
            self._config.stream = self._stream = stream
        code = self._launch(self._reference, self._function, self._args, None)
        if code == _INVALID_CONTEXT:  # a thread that has not used CUDA yet
            _enter(self._device)
            code = self._launch(self._reference, self._function, self._args, None)
        if code:
            _check(code, "start a kernel")


@functools.cache
def _primary_context(device: int) -> ctypes.c_void_p:
    """The context that torch and CuPy use, kept until the process ends."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check(library().cuDeviceGet(ctypes.byref(handle), device), f"have device {device}")
    _check(library().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), f"open device {device}")
    return context


def _enter(device: int) -> None:
    _check(library().cuCtxSetCurrent(_primary_context(device)), f"use device {device}")


def _check(code: int, what: str) -> None:
    if code:
        raise DeviceError(f"device: expected the driver to {what}, got error {code}: {_text(code)}")


def _text(code: int) -> str:
    text = ctypes.c_char_p()
    library().cuGetErrorString(code, ctypes.byref(text))
    return (text.value or b"no such error").decode()
