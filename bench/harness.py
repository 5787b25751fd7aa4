"""What every benchmark shares: interleaved timing, the machine's read bandwidth, and where a figure came from."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads cost whoever runs next a factor of ten

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

THREADS = int(os.environ.get("SAAP_NUM_THREADS", str(os.cpu_count() or 1)))
torch.set_num_threads(THREADS)


def race(candidates: Mapping[str, Callable[[], Any]], seconds: float = 3.0, least: int = 5) -> dict[str, float]:
    """Median seconds of each candidate, all taking turns so that what disturbs the machine disturbs all of them."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    spent = {name: 0.0 for name in candidates}
    while any(len(times[n]) < least or spent[n] < seconds for n in candidates):
        for name, call in candidates.items():
            if len(times[name]) >= least and spent[name] >= seconds:
                continue
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
            spent[name] += times[name][-1]
    return {name: statistics.median(values) for name, values in times.items()}


READ_CHUNK = 128 << 10


def bare_read(x: torch.Tensor) -> int:
    """Load whole chunks of ``x``, contiguous, by the kernels' own threads, and do nothing with them but add: the bytes read.

    Raced with what reads the same memory for a purpose, it says what the machine gives while it does. 0 without the C++ module.
    """
    from saap_index.backends import native

    module = native.load()
    if module is None:
        return 0
    nbytes = x.nbytes // READ_CHUNK * READ_CHUNK
    module.read_memory(x.data_ptr(), nbytes)
    return nbytes


def environment() -> dict[str, Any]:
    """CPU, threads, versions and commit."""
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), platform.machine()
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": cpu, "threads": THREADS, "torch": torch.__version__, "python": platform.python_version(), "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def line(name: str, seconds: float, nbytes: float = 0.0, base: float = 0.0) -> str:
    """One row: milliseconds, GB and GB/s read, and how many times faster than ``base`` seconds."""
    text = f"  {name:44} {seconds * 1e3:10.3f} ms"
    text += f" {nbytes / 1e6:9.2f} MB {nbytes / seconds / 1e9:7.2f} GB/s" if nbytes else " " * 26
    return text + (f" {base / seconds:7.2f}x" if base else "")


def save(path: Path | None, name: str, figures: Mapping[str, Any]) -> None:
    """Write ``figures`` with the environment as JSON."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"benchmark": name, "environment": environment(), **figures}, indent=1) + "\n")
