"""The emulator itself: it reports planted bugs, with their lines, and nothing else."""

from __future__ import annotations

import json
import mmap
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from emu import runtime, sanitize
from emu.guarded import guarded
from emu.runtime import EMULATOR, EmulatedRuntime, EmulationError, available
from torch import Tensor

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler")

PARAMS = np.dtype([("global", np.uint64), ("out", np.uint64), ("flags", np.uint64), ("plant", np.int32)], align=True)
SOURCE = (EMULATOR / "planted.cu").read_text().splitlines()
ORDERS = ("fifo", "lifo", "random")
CLUSTER = 4


def plant(
    number: int, blocks: int = 1, order: str | EmulatedRuntime = "fifo", guard: bool = True, cluster: int = 1,
    dependent: bool = False,
) -> tuple[Tensor, Tensor]:
    """out and flags after planted.cu; the tensors end where memory does."""
    emulated = EmulatedRuntime(order, cuda=EMULATOR) if isinstance(order, str) else order
    hide = guarded if guard else torch.clone
    source = hide(torch.arange(512).to(torch.float16))
    out, flags = hide(torch.full((256,), -1.0)), hide(torch.zeros(8, dtype=torch.int32))
    params = np.array((source.data_ptr(), out.data_ptr(), flags.data_ptr(), number), PARAMS)
    kernel = emulated.kernel("planted.cu", "planted", {})
    assert kernel.sizeof("planted") == PARAMS.itemsize
    shared = 64 * 16
    if guard:
        with emulated.allow(source, out, flags):
            kernel.launch((blocks, 1, 1), 64, shared, params, cluster, dependent)
    else:
        kernel.launch((blocks, 1, 1), 64, shared, params, cluster, dependent)
    return out, flags


def lines_of(number: int) -> set[int]:
    """Lines whose last comment names the plant."""
    return {i for i, text in enumerate(SOURCE, 1) if re.search(rf"// [\d ]*\b{number}\b[\d ]*$", text)}


def report_of(number: int, order: str = "fifo", cluster: int = 1) -> str:
    with pytest.raises(EmulationError) as error:
        plant(number, cluster, order, cluster=cluster)
    text = str(error.value)
    named = {int(x) for x in re.findall(r"planted\.cu:(\d+)", text)}
    assert named and named <= lines_of(number), f"lines {sorted(lines_of(number))} expected: {text}"
    return text


@pytest.mark.parametrize("order", ORDERS)
def test_correct_code_runs(order: str) -> None:
    expected = torch.arange(64) * 8.0
    assert torch.equal(plant(0, order=order)[0][:64], expected)
    assert plant(1, 3, order)[1].tolist() == [3, 192, 0, 0, 0, 0, 0, 0]
    lanes = torch.arange(64) % 32
    apart = torch.where(lanes < 8, lanes ^ 1, torch.where(lanes >= 24, lanes ^ 2, 0)).float()
    assert torch.equal(plant(2, order=order)[0][:64], apart)
    assert plant(3, order=order)[0][[0, 31, 32, 39, 40]].tolist() == [255, 255, 255, 255, -1]
    assert plant(4, 2, order)[0][1] == 7


def histograms(clusters: int, cluster: int) -> Tensor:
    words = (torch.arange(512).to(torch.float16).view(torch.int16) // 32 % 16)[: clusters * cluster * 64]
    return torch.stack([torch.bincount(x, minlength=16) for x in words.view(clusters, -1)]).float().flatten()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("clusters", "cluster"), [(1, 4), (2, 4), (3, 2), (1, 8), (2, 1)])
def test_clusters(clusters: int, cluster: int, order: str) -> None:
    """Whatever is in flight: blocks of a cluster start together."""
    for inflight in (1, 3):
        emulated = EmulatedRuntime(order, 1, inflight, cuda=EMULATOR)
        for number in (5, 6):
            out = plant(number, clusters * cluster, emulated, cluster=cluster)[0]
            assert torch.equal(out[: clusters * 16], histograms(clusters, cluster)), number


@pytest.mark.parametrize("order", ORDERS)
def test_a_block_may_leave_its_cluster(order: str) -> None:
    out = plant(7, 4, order, cluster=4)[0].view(4, 64)
    assert (out[:3] == 1).all() and (out[3] == -1).all()


@pytest.mark.parametrize("order", ORDERS)
def test_dependent_launches(order: str) -> None:
    assert (plant(8, 2, order, dependent=True)[0][:128] == 0).all()
    assert (plant(8, 2, order)[0][:128] == 0).all()
    for number in (400, 401):
        plant(number, 2, order)
        with pytest.raises(EmulationError, match=r"block \([01], 0, 0\) returned without grid_dependency_wait"):
            plant(number, 2, order, dependent=True)


def test_older_devices_have_neither() -> None:
    emulated = EmulatedRuntime(cuda=EMULATOR, capability=(8, 6))
    assert torch.equal(plant(5, 1, emulated)[0][:16], histograms(1, 1))
    for options in ({"cluster": 2}, {"dependent": True}):
        with pytest.raises(EmulationError, match="no clusters or dependent launches"):
            plant(5, 2, emulated, **options)  # type: ignore[arg-type]


def test_unfinished_copies_and_unwritten_memory_are_nan() -> None:
    for number in (10, 11, 12):
        assert plant(number)[0][:64].isnan().all(), number


MEETINGS = {
    200: "divergence", 201: "divergence|deadlock", 202: "lane.*returned", 203: "divergence", 204: "not in its own mask",
    205: "reads lane 20", 206: "no progress", 207: "divergence", 208: "divergence", 209: "divergence|deadlock",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("number", MEETINGS)
def test_threads_that_never_meet(number: int, order: str) -> None:
    assert re.search(MEETINGS[number], report_of(number, order))


CLUSTER_MEETINGS = {210: "divergence", 211: "divergence|deadlock", 212: "divergence|deadlock"}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("number", CLUSTER_MEETINGS)
def test_blocks_of_a_cluster_that_never_meet(number: int, order: str) -> None:
    assert re.search(CLUSTER_MEETINGS[number], report_of(number, order, cluster=2))


ADDRESSES = {
    300: "out of bounds: byte 1024 of 1024", 301: "not aligned", 302: "global address .* not aligned", 303: "none of the tensors",
    304: "out of bounds", 305: "out of bounds: byte 1024 of 1024", 306: "undefined|out of bounds", 307: "undefined",
    308: "aligned", 309: "no access to address", 310: "none of the tensors", 311: "none of the tensors", 312: "undefined",
    313: "division", 314: "out of bounds",
}


@pytest.mark.parametrize("number", ADDRESSES)
def test_wrong_addresses_and_undefined_behaviour(number: int) -> None:
    assert re.search(ADDRESSES[number], report_of(number))


GONE = r"the shared memory of block \(1, 0, 0\), which has returned"
CLUSTER_ADDRESSES = {
    320: "rank 2 of a cluster of 2", 321: "of the block's own dynamic shared memory",
    322: r"out of bounds: byte 1024 of 1024 of the dynamic shared memory of block \(1, 0, 0\)",
    323: r"of_block: block \(1, 0, 0\) has returned", 324: GONE, 325: f"atomic: {GONE}",
    326: "which may not have started", 327: "atomic: byte 2 of the shared memory is not aligned to 4",
}


@pytest.mark.parametrize("number", CLUSTER_ADDRESSES)
def test_wrong_addresses_in_the_shared_memory_of_others(number: int) -> None:
    for order in ORDERS:
        assert re.search(CLUSTER_ADDRESSES[number], report_of(number, order, cluster=2))


def test_deadlock_lists_who_waits_where() -> None:
    text = report_of(201, "lifo")
    assert re.search(r"deadlock:.* \[block \(0, 0, 0\): 0-15,32-47 wait in __syncwarp at planted\.cu:\d+\]", text), text


def test_the_machine_is_usable_after_an_error() -> None:
    for _ in range(3):
        report_of(305)
        test_correct_code_runs("random")


def test_parameters_and_sizes_are_checked() -> None:
    kernel = EmulatedRuntime(cuda=EMULATOR).kernel("planted.cu", "planted", {})
    params = np.zeros((), PARAMS)
    for grid, block, shared, data, cluster in [
        ((1, 1, 1), 64, 64, np.zeros(3), 1), ((0, 1, 1), 64, 64, params, 1), ((1, 1, 1), 2048, 64, params, 1),
        ((1, 1, 1), 64, 1 << 20, params, 1), ((6, 1, 1), 64, 64, params, 4), ((16, 1, 1), 64, 64, params, 16),
    ]:
        with pytest.raises(EmulationError):
            kernel.launch(grid, block, shared, data, cluster)  # type: ignore[arg-type]


def test_guarded_tensors() -> None:
    x = torch.arange(90, dtype=torch.int16).reshape(9, 10)
    behind, before = guarded(x), guarded(x, before=True)
    assert torch.equal(behind, x) and torch.equal(before, x)
    assert (behind.data_ptr() + x.nbytes) % mmap.PAGESIZE == 0 and before.data_ptr() % mmap.PAGESIZE == 0
    assert guarded(x[:0]).shape == (0, 10)


def test_seeds_repeat_a_schedule() -> None:
    def switches(seed: int) -> int:
        emulated = EmulatedRuntime("random", seed, cuda=EMULATOR)
        plant(1, 3, emulated)
        return emulated.kernel("planted.cu", "planted", {}).counters["switches"]

    assert switches(5) == switches(5)
    assert len({switches(seed) for seed in range(6)}) > 1


def test_without_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch that other processors get."""
    monkeypatch.setattr(runtime, "FLAGS", [*runtime.FLAGS, "-DEMU_UCONTEXT"])
    test_correct_code_runs("random")
    report_of(201)


def test_does_not_compile(tmp_path: Path) -> None:
    (tmp_path / "broken.cu").write_text("int f() { return nothing; }\n")
    with pytest.raises(EmulationError, match=r"broken\.cu:1"):
        EmulatedRuntime(cuda=tmp_path).kernel("broken.cu", "f", {})


# ---- sanitizers, each in a process of its own

CORRECT = {0: 1, 1: 3, 2: 1, 3: 1, 4: 2, 5: 4, 6: 4, 7: 4}
RACES = {100: 1, 101: 1, 102: 1, 103: 1, 104: 3, 105: 3, 106: 3, 107: 1, 108: 4, 109: 4, 110: 4, 111: 4}
"""Blocks of each plant; four are a cluster."""


DEADLY = {304: 1, 305: 1, 322: 4, 324: 4}
"""Plants that AddressSanitizer ends the process for."""


def in_other_process(sanitizer: str, *cases: dict[int, int]) -> dict[int, str]:
    """Report of each plant, empty for none; of those that end their process apart."""
    result = sanitize.run(sanitizer, [__file__, *map(json.dumps, cases)])
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return {int(k): v for k, v in json.loads(result.stdout.splitlines()[-1]).items()}


def test_races_are_found_without_parallel_threads() -> None:
    reports = in_other_process("thread", CORRECT | RACES)
    for number, text in reports.items():
        assert bool(text) == (number in RACES), f"plant {number}: {text or 'no report'}"
        if text:
            named = {int(x) for x in re.findall(r"planted\.cu:(\d+)", text)}
            assert named & lines_of(number), f"lines {sorted(lines_of(number))} expected: {text}"


def test_address_sanitizer() -> None:
    reports = in_other_process("address", CORRECT, DEADLY)
    assert not any(reports.pop(number) for number in CORRECT), "correct code"
    assert set(reports) == set(DEADLY)
    for number, text in reports.items():
        named = {int(x) for x in re.findall(r"planted\.cu:(\d+)", text)}
        assert named & lines_of(number), text[-4000:]


def report(number: int, blocks: int) -> str:
    try:
        for order in ORDERS:
            plant(number, blocks, order, guard=False, cluster=blocks if blocks >= CLUSTER else 1)
    except EmulationError as error:
        return str(error)
    return ""


def last_words(number: int, blocks: int) -> str:
    """Of a child that the plant is to end, empty if it does not."""
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if not child:
            os.dup2(file.fileno(), sys.stderr.fileno())
            report(number, blocks)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        file.seek(0)
        return file.read() if status else ""


if __name__ == "__main__":
    found: dict[str, str] = {}
    for cases, words in zip(sys.argv[1:], (report, last_words), strict=False):
        found |= {number: words(int(number), blocks) for number, blocks in json.loads(cases).items()}
    print(json.dumps(found))
