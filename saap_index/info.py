"""`saap info`: versions, instruction set, GPU, backend, cache folder and routers, as a report of a fault needs them."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from pathlib import Path

import torch

from .backends import get_backend, native
from .files import cache_folder
from .routers import CONFIG
from .shipped import shipped_routers
from .version import __version__

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "faiss-cpu", "cupy-cuda12x", "cupy-cuda13x")
"""Whose versions a report names, by distribution."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(args: argparse.Namespace) -> int:
    """The command."""
    print("\n".join(report()))
    return 0


def report() -> list[str]:
    """A line for each thing."""
    module = native.load()
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    folder = cache_folder()
    kept = sorted(path.parent.name for path in (folder / "routers").glob(f"*/{CONFIG}"))
    lines = [("saap_index", __version__), ("python", platform.python_version()), *((name, _version(name)) for name in PACKAGES)]
    lines += [
        ("processor", f"{platform.machine()}, {torch.get_num_threads()} threads"),
        ("instruction set", "none: the compiled kernels are not there" if module is None else module.isa()),
    ]
    lines += [("GPU", torch.cuda.get_device_name(device)) for device in devices[1:]] or [("GPU", "none")]
    lines += [(f"backend of {device}", type(get_backend(device, None)).__name__) for device in devices]
    lines += [("cache folder", f"{folder} ({_size(folder) / 2**20:.1f} MB)"), ("kept routers", ", ".join(kept) or "none")]
    lines += [("shipped routers", ", ".join(shipped_routers()) or "none")]
    width = max(len(name) for name, _ in lines)
    return [f"{name:{width}}  {value}" for name, value in lines]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
