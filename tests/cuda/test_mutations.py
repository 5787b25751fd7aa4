"""Tests of the tests: single bugs planted in copies of the kernels' sources are noticed by small runs of their own tests.

A mutant that survives is a hole in what the emulated tests look at. One whose text is no longer found is to be written anew.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import test_gpu_build as build
import test_gpu_route as route
import test_gpu_scan as scan
import test_gpu_select as select
import torch
from emu import sanitize
from emu.runtime import CUDA, EmulatedRuntime, EmulationError, available

from saap_index.backends.cuda import append_assign as gpu_build

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler")

RANDOM = ("random", 2, 4)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

Check = Callable[[], None]

# ---- small runs of the kernels' tests


def check_scan() -> None:
    mixed = scan.Case(((3, 300, 340), (0, 0, 30), (0, 0, 0), (2, 60, 63)), share=0.5, entries=12, q=2, causal=True)
    for case in (mixed, replace(mixed, causal=False, entries=0), scan.CORNERS["junk"]):
        out, lse = scan.smallest(case, order="random", seed=1, inflight=3)
        assert torch.isfinite(out).all()
        scan.check(case, scan.make(case, 32, 32, BF16, BF16), out, lse)


def check_scan_banks() -> None:
    runtime, case = scan.EmulatedRuntime(), scan.Case(((3, 40, 50),), heads=1, share=1.0)
    scan.run(runtime, case, scan.make(case, 32, 32, BF16, BF16), {**scan.SMALL, "SAAP_GROUPS": 1, "SAAP_TILE": 16})
    assert not any(further for _, further in runtime.conflicts.values())


def check_append() -> None:
    """A sequence that is full to the last row, and one that would be past it."""
    b, h, n, d, capacity = 2, 2, 7, 64, 16
    run = build.runtime(RANDOM)
    keys, values = (build.random_rows((b, h, n, d), BF16, i) for i in (0, 1))
    values[0, 1, 3, 60] = torch.inf
    arena = [torch.zeros((b, h, capacity, d), dtype=BF16) for _ in range(2)]
    meta = build.ints([[9, 0, 0, 0, 100, 0, 0, 0], [10, 0, 0, 0, 100, 0, 0, 0]])
    tickets = build.ints([3] * 900)
    with run.allow(keys, values, *arena, meta, tickets):
        build.append_to_meta(run, keys, values, *arena, meta, None, tickets)
    assert not tickets.any()
    for x, to in zip((keys, values), arena, strict=True):
        assert build.same_bits(to[0, :, 9:], x[0]) and not to[0, :, :9].any() and not to[1].any()
    assert meta.tolist() == [[16, 0, 0, 0, 107, 0, 0, 1], [10, 0, 0, 0, 100, 0, 0, 2]]


def inner(test: Callable[..., None], *arguments: object) -> None:
    """A test of hypothesis' with one example."""
    test.hypothesis.inner_test(*arguments)  # type: ignore[attr-defined]


def check_seal() -> None:
    inner(build.test_seal, build.runtime(RANDOM), BF16, 40, 64, 2, 7, 203, "random", 1.0, 3)


def check_seal_with_few_warps() -> None:
    """So few that each has more rows than lanes: counters of many lists fill the shared memory."""
    run = build.EmulatedRuntime(*RANDOM)
    run.max_shared_bytes = 2048
    inner(build.test_seal, run, BF16, 32, 32, 1, 200, 150, "few lists", 1.0, 3)


def check_means() -> None:
    inner(build.test_means, F16, 40, 64, 2, 5, 2, "random", 3)


def check_assign() -> None:
    inner(build.test_assign, build.runtime(RANDOM), F32, 72, 140, 67, 1, "positions", False, 0.5, 1.0, "plain", 64, 5)
    centroids = build.random_rows((1, 150, 32), F32, 0)
    centroids[0, 75:] = centroids[0, :75]
    lists = torch.empty((1, 75), dtype=torch.int32)
    gpu_build.assign(build.runtime(RANDOM), gpu_build.pack_centroids(centroids), 1.5 * centroids[:, :75], lists, None, 64)
    assert bool((lists < 75).all())


def check_select() -> None:
    on = select.runtime(RANDOM)
    alike = select.make_case(8, ties=True, nlist=100, j=2)
    alike.entries = np.full((2, 2), 20, np.int32)
    missing = select.make_case(3, nlist=40, j=5)
    missing.unread_mass = np.array([0.3, 0.02], np.float32)
    cut = select.make_case(5)
    cut.budgets[:] = [[3, 50], [7, 21]]  # where the last run does not fit
    for case in (alike, missing, cut):
        select.assert_as_specified(case, select.run(case, on))


def check_route() -> None:
    case = route.Case(route.BUILDS[2], 1, 2, 3, 4, 50, 6, 2, pairs=10)
    given = route.inputs(case)
    route.assert_as_exact_as_fp16(route.run(case, given, route.runtime(RANDOM), guard=True), case, given)


@dataclass(frozen=True)
class Mutant:
    """``old``, which stands in ``file``, becomes ``new`` in its first place."""

    name: str
    file: str
    check: Check
    old: str
    new: str


def mutants(table: dict[tuple[str, Check], dict[str, tuple[str, str]]]) -> list[Mutant]:
    return [Mutant(name, *where, *texts) for where, rows in table.items() for name, texts in rows.items()]


VALUES = mutants({
    ("scan_body.cuh", check_scan): {
        "a copy is used before it is there": ("wait<kStages - 1>", "wait<kStages>"),
        "nothing to read, nothing written": ("  finish_empty_pairs(p, pass);", ""),
    },
    ("scan.cu", check_scan): {
        "causal ignored": ("if (masked && index", "if (false && index"),
        "the sum is not rescaled": ("sum = sum_[g][c] * keep", "sum = sum_[g][c]"),
        "fragments swapped": ("lane % 8 + lane / 16 * 8, v * 2 + lane / 8 % 2", "lane % 16, v * 2 + lane / 16"),
        "weights not transposed": ("movmatrix_trans(weights[g][part][half])", "weights[g][part][half]"),
    },
    ("scan_walk.cuh", check_scan): {
        "entries of the tail are tokens": ("log2_fast(", "0.f * log2_fast("),
        "one row too many": ("else if (i < place.span.rows)", "else if (i <= place.span.rows)"),
        "rows outside the arena": ("static_cast<u32>(number) >= static_cast<u32>(limit)", "false"),
    },
    ("scan_merge.cuh", check_scan): {
        "slots shared by pairs": ("slot = slots + blockIdx.x + at.pair", "slot = slots + blockIdx.x"),
        "tickets not given back": ("inc_acq_rel(ticket, most)", "inc_acq_rel(ticket, most + 1)"),
    },
    ("scan_params.cuh", check_scan_banks): {"no swizzle": ("(chunk ^ (row / (8 / kGroup) & (kGroup - 1)))", "chunk")},
    ("append.cu", check_append): {
        "the last row is never filled": ("wanted <= p.capacity - start", "wanted < p.capacity - start"),
        "the lengths of a sequence without room": ("if (fits) meta[kLength]", "if (start >= 0) meta[kLength]"),
        "the last ticket stays": ("i < p.num_tickets;", "i < p.num_tickets - 1;"),
    },
    ("seal.cu", check_seal): {
        "order reversed in a list": ("__popc(peers & ((1u << lane) - 1))", "__popc(peers >> lane) - 1"),
        "no end of the last list": ("if (threadIdx.x == 0) table[p.lists] = end;", ""),
        "the last rows stay": ("min(kTileRows, job.rows - offset)", "min(kTileRows, (job.rows - offset) / 8 * 8)"),
    },
    ("means.cu", check_means): {"the last rows of a run": ("left > 0; left -=", "left >= kAhead; left -=")},
    ("assign.cu", check_assign): {
        "ties to the higher list": ("other_list < list", "other_list > list"),
        "low parts dropped": ("mma_16816<kF16>(sums[i][j + half], low[i],", "if (0) mma_16816<kF16>(sums[i][j + half], low[i],"),
        "a panel not waited for": ("cp_async_wait<0>();", ""),
    },
    ("select.cu", check_select): {
        "ties to the older segment": ("item + (of.segments - 1 - 2 * s) * of.runs.lists", "item"),
        "a run's oldest rows": ("of.runs.end(segment, list) - taken,", "of.runs.end(segment, list) - n,"),
        "the last run whole": ("taken = left < n ? left > 0 ? static_cast<int>(left) : 0 : n;", "taken = n;"),
    },
    ("select_block.cuh", check_select): {
        "rows of another stretch": ("writing.first[i] - static_cast<int>", "writing.first[0] - static_cast<int>"),
    },
    ("route.cu", check_route): {
        "rotated the other way": ("y[i] * cosine - x[i] * sine", "y[i] * cosine + x[i] * sine"),
        "hidden units not waited for": ("if (kU > 0) __syncthreads();", ""),
    },
})
RACES = mutants({
    ("scan_body.cuh", check_scan): {
        "lanes do not wait for each other's copies": ("wait<kStages - 1>();\n      __syncwarp();", "wait<kStages - 1>();"),
        "a stage is filled while it is read": ("__syncwarp();  // all lanes have read the stage before", "//"),
        "the work is read before it is there": ("__syncthreads();\n    if (!work.count)", "if (!work.count)"),
    },
    ("scan_merge.cuh", check_scan): {
        "states not fenced": ("atomic_inc_acq_rel(ticket", "atomicInc(ticket"),
        "the area is used again early": ("__syncthreads();  // the area is free again", "//"),
    },
    ("append.cu", check_append): {"the length grows early": ("__syncthreads();  // all have read the length", "//")},
    ("seal.cu", check_seal_with_few_warps): {
        "counters not handed on": ("mine[list] += __popc(peers);\n    __syncwarp(~0u);", "mine[list] += __popc(peers);"),
    },
    ("select.cu", check_select): {
        "tallied before it is clear": ("clear();\n    __syncthreads();\n    find_unread", "clear();\n    find_unread"),
    },
    ("route.cu", check_route): {"rows overwritten early": ("if (first > 0) __syncthreads();", "")},
})


@contextmanager
def planted(mutant: Mutant | None) -> Iterator[None]:
    """Tests of the kernels run a copy of their sources with the bug, or without one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(CUDA, Path(name) / "cuda"))
        if mutant:
            text = (folder / mutant.file).read_text()
            assert mutant.old in text, f"{mutant.file}: no longer there: {mutant.old}"
            (folder / mutant.file).write_text(text.replace(mutant.old, mutant.new, 1))

        class Planted(EmulatedRuntime):
            def __init__(self, order: str = "fifo", seed: int = 0, inflight: int = 2) -> None:
                super().__init__(order, seed, inflight, cuda=folder)

        modules: list[ModuleType] = [build, route, scan, select]
        try:
            for module in modules:
                module.EmulatedRuntime = Planted  # type: ignore[attr-defined]
            yield
        finally:
            for module in modules:
                module.EmulatedRuntime = EmulatedRuntime  # type: ignore[attr-defined]
                if hasattr(module, "runtime"):
                    module.runtime.cache_clear()


CHECKS = {mutant.check.__name__: mutant.check for mutant in VALUES}


@pytest.mark.parametrize("name", CHECKS)
def test_no_false_alarm(name: str) -> None:
    with planted(None):
        CHECKS[name]()


@pytest.mark.parametrize("mutant", VALUES, ids=lambda m: m.name)
def test_values_tell(mutant: Mutant) -> None:
    with planted(mutant), pytest.raises((AssertionError, EmulationError)) as error:
        mutant.check()
    assert "does not compile" not in str(error.value) and "no longer there" not in str(error.value), error.value


def test_the_race_detector_tells() -> None:
    """What values need not show: another schedule would."""
    names = ["", *(mutant.name for mutant in RACES)]
    result = sanitize.run("thread", [__file__, *names])
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    reports: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
    assert not reports.pop("")
    assert set(reports) == set(names[1:])
    for name, text in reports.items():
        assert "race:" in text, f"{name}: {text or 'survived'}"


def report_of(mutant: Mutant | None) -> str:
    """Of the mutant's check, or of all of them without one."""
    with planted(mutant):
        try:
            for check in [mutant.check] if mutant else {m.check for m in RACES}:
                check()
        except (AssertionError, EmulationError) as error:
            return str(error)
    return ""


if __name__ == "__main__":
    named = {mutant.name: mutant for mutant in RACES}
    print(json.dumps({name: report_of(named.get(name)) for name in sys.argv[1:]}), flush=True)
    os._exit(0)  # what libraries do when a process ends is not asked here, and not all of them end well under ThreadSanitizer
