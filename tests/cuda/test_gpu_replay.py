"""The recorded launches of a step: a replay agrees, names the kernel that was changed, and says where it differs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from emu.runtime import CUDA, EmulatedRuntime, available

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import gpu_replay  # noqa: E402

pytestmark = pytest.mark.skipif(not available(), reason="needs a C++ compiler")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "launches.npz"
    names = gpu_replay.record(path)
    step = {"saap_append", "saap_route_select", "saap_route", "saap_select", "saap_scan"}
    assert step | {"saap_assign", "saap_rank", "saap_permute", "saap_means"} <= set(names)
    assert path.stat().st_size < 32 << 20, "it travels with a session"
    return path


def test_a_replay_is_as_recorded(recording: Path) -> None:
    assert gpu_replay.replay(recording, EmulatedRuntime("random", seed=1), CPU) == []


@pytest.mark.parametrize(
    "file, text, other, kernel, field",
    [
        ("append.cu", "meta[kLength] = start + wanted", "meta[kLength] = start + wanted + 1", "saap_append", "meta[0, 0]"),
        ("scan_merge.cuh", "p.lse[row] = whole.lse();", "p.lse[row] = whole.lse() + 0.25f;", "saap_scan", "lse[0, 0, 0, 0]"),
    ],
)
def test_a_planted_fault_is_named(
    recording: Path, tmp_path: Path, file: str, text: str, other: str, kernel: str, field: str
) -> None:
    shutil.copytree(CUDA, tmp_path / "cuda")
    source = (CUDA / file).read_text()
    assert text in source
    (tmp_path / "cuda" / file).write_text(source.replace(text, other))
    found = gpu_replay.replay(recording, EmulatedRuntime(cuda=tmp_path / "cuda"), CPU)
    assert found and all(kernel in x for x in found), found
    assert field in found[0] and "expected" in found[0], found


def test_what_counts_as_different() -> None:
    want = torch.tensor([1.0, 2.0, float("nan")], dtype=torch.float32)
    assert gpu_replay.compare("out", want, want + 1e-4) is None
    assert "out[1] of [3]: expected 2.0, got 2.5; 1 differ" in str(
        gpu_replay.compare("out", want, torch.tensor([1.0, 2.5, float("nan")], dtype=torch.float32))
    )
    assert gpu_replay.compare("out", want, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float32)) is not None
    whole = torch.arange(8, dtype=torch.int32)
    assert gpu_replay.compare("order", whole, whole.flip(0)) is not None
    rows, lengths = torch.arange(100, dtype=torch.int32)[None], torch.tensor([100], dtype=torch.int32)
    assert gpu_replay.compare("rows", rows, rows.flip(1), [lengths, lengths]) is None, "an order of its own"
    near = rows.clone()
    near[0, 99] = 1000
    assert gpu_replay.compare("rows", rows, near, [lengths, lengths]) is None, "one near the cut"
    assert "got 90" in str(gpu_replay.compare("rows", rows, rows.flip(1), [lengths, lengths - 10]))
