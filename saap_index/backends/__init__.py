"""Backends by name: `cpu` (C++), `cuda` (CuPy), `torch` (any device), `reference` (NumPy float64), and what others register."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import DeviceError
from .base import Backend, SegmentChange, Session
from .paged import PagedBackend
from .plain_torch import TorchBackend
from .reference import ReferenceBackend
from .scalar_quantizer import STORAGE_CODES, Coded, StorageCode
from .types import Arena, Budget, Frequencies, Placement, Plan, Rotation, Routing, Sample, Tail
from .weights import NETWORK, RouterWeights

__all__ = [
    "NETWORK", "STORAGE_CODES", "Arena", "Backend", "Budget", "Coded", "Frequencies", "Placement", "Plan", "Rotation",
    "RouterWeights", "Routing", "Sample", "SegmentChange", "Session", "StorageCode", "Tail", "get_backend", "get_paged",
    "register_backend",
]

Factory = Callable[[torch.device], Backend]


def _cpu(device: torch.device) -> Backend:
    from .cpu import CpuBackend, available

    return CpuBackend() if available() else TorchBackend(device)


def _cuda(device: torch.device) -> Backend:
    from .cuda.backend import CudaBackend
    from .cuda.runtime import runtime

    if device.type != "cuda":
        raise DeviceError(f"backend: 'cuda' expects device 'cuda', got {str(device)!r}")
    on_device = runtime(device)
    if on_device not in _CUDA:
        _CUDA[on_device] = CudaBackend(torch.device("cuda", on_device.device.index), on_device)
    return _CUDA[on_device]


_CUDA: dict[Any, Backend] = {}

_FACTORIES: dict[str, Factory] = {
    "cpu": _cpu,
    "cuda": _cuda,
    "torch": TorchBackend,
    "reference": lambda device: ReferenceBackend(),
}


def register_backend(name: str, factory: Factory) -> None:
    """Make ``factory(device)`` serve indexes created with ``backend=name``, or on devices of that type."""
    _FACTORIES[name] = factory


def get_backend(device: torch.device, name: str | None = None) -> Backend:
    """The backend called ``name``; without a name the one registered for the device's type, else plain torch.

    Raises DeviceError for an unknown name, or for a host backend asked to serve another device.
    """
    if name is not None and name not in _FACTORIES:
        raise DeviceError(f"backend: expected one of {sorted(_FACTORIES)}, got {name!r}")
    if name in ("cpu", "reference") and device.type != "cpu":
        raise DeviceError(f"backend: {name!r} expects device 'cpu', got {str(device)!r}")
    return _FACTORIES.get(name or device.type, TorchBackend)(device)


def get_paged(backend: Backend) -> PagedBackend:
    """The operations on pages beside those of a backend: its own, or on plain torch."""
    if backend.name == "cpu":
        from .cpu import CpuBackend
        from .paged_cpu import PagedCpu

        assert isinstance(backend, CpuBackend)
        return PagedCpu(backend)
    if backend.name == "reference":
        from .paged_reference import PagedReference

        return PagedReference(backend)
    if backend.name == "cuda":
        from .cuda.backend import CudaBackend
        from .cuda.paged import PagedCuda

        assert isinstance(backend, CudaBackend)
        return PagedCuda(backend)
    from .paged_torch import PagedTorch

    return PagedTorch(backend)
