"""The machine: kernels and instruction set, GPU, cache folder, memory. Knows no model."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import warnings
from pathlib import Path

import torch

from saap_index import files
from saap_index.backends import get_backend, native
from saap_index.hf import crossover
from saap_index.index import AsymmetricIndex
from saap_index.precision import full_precision
from saap_index.routing.quantizer import KeyQuantizer
from saap_index.routing.router import QueryRouter

from .findings import FAIL, OK, SKIPPED, WARN, Finding

LEAST_FREE_BYTES = 2 << 30
GIB = 1 << 30


def check_kernels() -> Finding:
    """Which kernels serve the CPU, and whether a search that reads everything is attention in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = native.load()
    backend = get_backend(torch.device("cpu")).name
    isa = "none" if module is None else module.isa()
    error = search_error()
    figures = {"backend": backend, "instruction_set": isa, "error": error, "threads": torch.get_num_threads()}
    summary = f"backend {backend}, instruction set {isa}, {torch.get_num_threads()} threads, {crossover.processor()}"
    if not error < 1e-4:
        return Finding("kernels", FAIL, f"{summary}: a search is wrong by {error:.1e}", "report it, with this table", figures)
    if module is None:
        how = "install from source with a C++20 compiler (g++ 12 or clang 15) at hand: pip install . in a clone"
        return Finding("kernels", FAIL, f"{summary}: no native kernels, plain torch is several times slower", how, figures)
    return Finding("kernels", OK, summary, "", figures)


@full_precision
def search_error() -> float:
    """Largest relative error of a search that reads everything, against softmax in float64."""
    draw = torch.Generator().manual_seed(0)
    keys, values, query, centroids = (
        torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")
        for shape in ((1, 2, 700, 64), (1, 2, 700, 64), (1, 6, 1, 64), (2, 16, 64))
    )
    index = AsymmetricIndex(64, 16, 6, 2, break_even=0, selectivity=1.0)
    index.key_quantizer, index.query_router = KeyQuantizer(centroids), QueryRouter.symmetric(centroids)
    index.add(keys, values)
    grouped = query.double().view(1, 2, 3, 64)
    want = ((grouped @ keys.double().transpose(2, 3) / 8).softmax(-1) @ values.double()).view(1, 6, 1, 64)
    out: torch.Tensor = index.search_attend(query)
    return float((out.double() - want).norm() / want.norm())


def check_gpu() -> Finding:
    """Which GPU there is, and whether its kernels can be compiled."""
    if not torch.cuda.is_available():
        if Path("/dev/nvidia0").exists():
            return Finding("GPU", WARN, "there is one, but torch has no CUDA or cannot use the driver", "install torch with CUDA")
        return Finding("GPU", OK, "none that torch can use; the CPU serves", "", {"count": 0})
    free, total = torch.cuda.mem_get_info()
    name, capability = torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.get_device_capability()))
    memory = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    summary = f"{name}, compute capability {capability}, {memory}, CUDA {torch.version.cuda}"
    figures = {"name": name, "capability": capability, "free_bytes": free, "total_bytes": total}
    if importlib.util.find_spec("cupy") is None:
        major = str(torch.version.cuda).partition(".")[0]
        return Finding("GPU", WARN, f"{summary}; without CuPy plain torch serves it", f"pip install cupy-cuda{major}x", figures)
    backend = get_backend(torch.device("cuda", torch.cuda.current_device())).name
    return Finding("GPU", OK, f"{summary}, backend {backend}", "", figures)


def check_cache_folder() -> Finding:
    """Whether what is made once can be kept: measurements, converted models."""
    folder = crossover.cache_folder()
    try:
        files.make_folder(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"saap")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("cache folder", WARN, f"{folder} cannot be written to: {error}", "set SAAP_CACHE to a folder that can be")
    figures = {"path": str(folder), "free_bytes": free}
    if free < LEAST_FREE_BYTES:
        return Finding("cache folder", WARN, f"{folder}, {free / GIB:.1f} GiB free", "make room, or set SAAP_CACHE", figures)
    return Finding("cache folder", OK, f"{folder}, {free / GIB:.0f} GiB free", "", figures)


def available_bytes() -> int | None:
    """Memory that a process may still ask for; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None
    return None


def check_memory() -> Finding:
    free = available_bytes()
    if free is None:
        return Finding("memory", SKIPPED, "the system does not say how much is free")
    return Finding("memory", OK, f"{free / GIB:.1f} GiB available", "", {"available_bytes": free})
