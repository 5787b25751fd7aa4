"""What an eager step costs the host: microseconds of Python and of launches in `add` and `search_attend`, without a GPU.

    python bench/gpu_host.py                    # Llama-3.1-8B's layer, batch 1 and 8
    python bench/gpu_host.py --profile          # where it goes, by function

The index is one of backend "cuda" over memory of the CPU; its kernels are started through `DriverLaunch` as on a GPU, but in the
place of the driver's entry point stands a C function that does nothing, and nobody asks torch for its current device and stream:
what those take on a GPU is no part of the figures. CPU time of this thread, the least of many rounds of steps that only append:
what sealing costs the host is in gpu_build.py.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import pstats
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import gpu_harness as harness
from saap_index import AsymmetricIndex, KeyQuantizer, QueryRouter, Rope, register_backend
from saap_index.backends.cuda import driver
from saap_index.backends.cuda.backend import CudaBackend
from saap_index.backends.cuda.session import CudaSession
from saap_index.backends.weights import RouterWeights

TOKENS, STEPS, ROUNDS, WARM = 8192, 32, 100, 4


class Start:
    """As of the runtime of real devices: started by the driver's launch itself where the stream is known."""

    def __init__(self, on: driver.DriverLaunch) -> None:
        self.on = on

    def __call__(self) -> None:
        self.on(0)


class NoDriver:
    """A runtime whose kernels start nothing, by the calls that start them on a GPU."""

    name, capability, multiprocessors, max_shared_bytes, capturing = "no driver", (9, 0), 132, 227 * 1024, False

    def kernel(self, file: str, name: str, macros: Mapping[str, int]) -> NoDriver:
        return self

    def prepare(
        self, grid: tuple[int, int, int], block: int, shared_bytes: int, params: np.ndarray[Any, Any], cluster: int = 1,
        dependent: bool = False,
    ) -> Callable[[], None]:
        return Start(driver.DriverLaunch(0, grid, block, shared_bytes, params.ctypes.data, cluster, dependent, 0, params))

    def launch(self, *arguments: Any, **more: Any) -> None:
        self.prepare(*arguments, **more)()


class NoLibrary:
    """libcuda, as far as a launch asks for it: a function of the C library that takes anything and returns 0."""

    def __init__(self) -> None:
        of = ctypes.CDLL(None)
        self.cuLaunchKernelEx = of.pthread_mutexattr_destroy
        assert self.cuLaunchKernelEx(ctypes.byref(ctypes.create_string_buffer(64))) == 0


def decoded(batch: int) -> tuple[AsymmetricIndex, Callable[[], None], Callable[[], None]]:
    """An index of Llama-3.1-8B's layer with room for all steps, its `add` of a token and its `search_attend`."""
    heads, group, d, nlist = 8, 4, 128, 256
    index = AsymmetricIndex(
        d=d, nlist=nlist, num_heads=heads * group, num_kv_heads=heads, dtype=torch.bfloat16, device="cpu", selectivity=0.05,
        rope=Rope(head_dim=d, theta=500000.0), backend="cuda-no-driver",
    )
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    index.key_quantizer = KeyQuantizer(randn(heads, nlist, d))
    units, outputs = 64, nlist + 12
    hidden, out, skip = randn(heads, units, d), randn(heads, outputs, units), randn(heads, outputs, d)
    weights = RouterWeights(hidden, randn(heads, units), out, skip, randn(heads, outputs), nlist)
    index.query_router = QueryRouter(weights, first_knot=7)
    keys, values = (randn(batch, heads, TOKENS, d).to(torch.bfloat16) for _ in range(2))
    index.reserve_memory(TOKENS + 4 * ROUNDS * STEPS, batch)
    index.add(keys, values)
    key, value = (randn(batch, heads, 1, d).to(torch.bfloat16) for _ in range(2))
    queries = randn(batch, heads * group, 1, d).to(torch.bfloat16)

    def add() -> None:
        index.add(key, value)

    def search() -> None:
        index.search_attend(queries)

    return index, add, search


def least(add: Callable[[], None], search: Callable[[], None], due: Callable[[int], bool]) -> dict[str, float]:
    """Microseconds of each, as a model calls them: the least of ROUNDS rounds of STEPS steps that seal nothing."""
    together = alone = float("inf")
    for _ in range(ROUNDS):
        while due(STEPS):
            add()
            search()
            search()
        began = time.thread_time_ns()
        for _ in range(STEPS):
            add()
            search()
        between = time.thread_time_ns()
        for _ in range(STEPS):
            search()
        ended = time.thread_time_ns()
        together, alone = min(together, (between - began) / STEPS / 1e3), min(alone, (ended - between) / STEPS / 1e3)
    return {"add": together - alone, "search_attend": alone, "together": together}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--profile", action="store_true", help="functions by their time, of the first batch size")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures, table = {}, []
    nothing = NoLibrary()
    with (
        mock.patch.object(driver, "library", lambda: nothing),
        mock.patch.object(CudaSession, "synchronize", lambda session: None),  # nothing has counted on the device
    ):
        register_backend("cuda-no-driver", lambda device: CudaBackend(device, NoDriver()))
        for batch in map(int, options.batches.split(",")):
            index, add, search = decoded(batch)
            for _ in range(WARM):
                add()
                search()
            layout = index.layout

            def due(steps: int, index: AsymmetricIndex = index, layout: Any = layout) -> bool:
                n = index.lengths[0]
                return bool(layout.num_blocks(n + steps) != layout.num_blocks(n))

            if options.profile:
                profile = cProfile.Profile()
                profile.enable()
                for _ in range(100):
                    add()
                    search()
                profile.disable()
                pstats.Stats(profile).sort_stats("tottime").print_stats(40)
                return 0
            best = figures[f"batch {batch}"] = least(add, search, due)
            table.append([f"batch {batch}", *(f"{x:.1f}" for x in best.values())])
    harness.save(options.out, "gpu_host", figures, harness.rows(["host, us", "add", "search_attend", "together"], table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
