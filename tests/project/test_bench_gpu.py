"""The GPU session and its benchmarks run end to end on the emulated device, so that a real one meets no typing errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from emu.runtime import available

import gpu_baselines

ROOT = Path(__file__).parents[2]


def session(out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OUT": str(out), "DRY": "1", **variables}
    return subprocess.run([str(ROOT / "bench/gpu_session.sh")], env=env, capture_output=True, text=True, timeout=1600)


@pytest.mark.skipif(not available(), reason="needs a C++ compiler")
def test_a_session(tmp_path: Path) -> None:
    done = session(tmp_path, PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "every stage passed" in done.stdout and not (tmp_path / "failures.txt").exists()
    step = json.loads((tmp_path / "gpu_step.json").read_text())
    names = {x["name"] for x in step["figures"]}
    assert {"ours step 5%", "ours search 5%", "ours dense", "torch SDPA folded", "ours step 5%, sealing included"} <= names
    assert not step["skipped"] and not step["wrong"]
    assert all(x["graph_us"] > 0 and x["error_units"] <= 4 for x in step["figures"])
    build = json.loads((tmp_path / "gpu_build.json").read_text())
    assert len(build["figures"]) >= 9 and not build["failed"]
    with tarfile.open(tmp_path / "session.tgz") as archive:
        packed = {Path(name).name for name in archive.getnames()}
        bisect, model = (archive.extractfile(f"./{name}.log") for name in ("bisect", "model"))
        assert bisect is not None and bisect.read().decode() == "every launch is as recorded\n"
        assert model is not None and "128k x 1  step" in model.read().decode()
        codes = archive.extractfile("./gpu_codes.json")
        assert codes is not None
        assert {"ours step 5% SQ8", "ours step 5% SQ8/SQ4"} <= {x["name"] for x in json.loads(codes.read())["figures"]}
    assert {"environment.json", "environment.log", "gpu_host.json", "gpu_step.txt", "test_gpu_graphs.log"} <= packed
    assert len(list(tmp_path.iterdir())) <= 8, "all that a session leaves is a few files"


def test_a_failing_stage_does_not_stop_the_others(tmp_path: Path) -> None:
    sanitizer = tmp_path / "bin" / "compute-sanitizer"
    sanitizer.parent.mkdir()
    sanitizer.write_text('#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@"\nexit 1\n')
    sanitizer.chmod(0o755)
    done = session(tmp_path, PYTHON="false", PATH=f"{sanitizer.parent}:{os.environ['PATH']}")
    assert done.returncode == 1
    failed = {x.split()[1].rstrip(":"): x for x in (tmp_path / "failures.txt").read_text().splitlines()}
    stages = ["environment", "primitives", "record", "memcheck", "step", "codes", "model", "host", "build", "racecheck"]
    assert {*stages, "test_gpu_backend", "test_gpu_graphs"} <= failed.keys()
    assert all("exit status 1" in x or x.startswith("FAILED record: exit status not 0") for x in failed.values())
    options = "--kernel-name kns=saap_ --report-api-errors no --error-exitcode 9"
    with tarfile.open(tmp_path / "session.tgz") as archive:
        for tool in ("memcheck", "racecheck"):
            log = archive.extractfile(f"./{tool}.log")
            assert log is not None and log.read().decode() == f"1 {options} --tool {tool} false bench/gpu_small.py --dry\n"


def test_what_fails_first_runs_again_under_memcheck(tmp_path: Path) -> None:
    failing = "tests/cuda/test_gpu_graphs.py::test_x[1]"
    for name, text in (
        ("python", f'case "$*" in *test_gpu_graphs*) echo "FAILED {failing} - boom"; exit 1;; esac'),
        ("compute-sanitizer", 'echo "$CUDA_LAUNCH_BLOCKING $@"; exit 1'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}", "STAGES": "tests"}
    assert session(tmp_path / "out", **variables).returncode == 1
    failed = (tmp_path / "out" / "failures.txt").read_text()
    assert "test_gpu_graphs: exit status 1" in failed and "test_gpu_backend" not in failed
    with tarfile.open(tmp_path / "out" / "session.tgz") as archive:
        log = archive.extractfile("./again-test_gpu_graphs.log")
        assert log is not None
        said = log.read().decode()
    assert said.startswith("1 --kernel-name") and "--tool memcheck" in said
    assert said.strip().endswith(failing)


@pytest.mark.skipif(not available(), reason="needs a C++ compiler")
@pytest.mark.parametrize(("rows", "n"), [(64, 64), (64, 50), (50, 50)])
def test_pages_of_a_baseline(rows: int, n: int) -> None:
    cache = torch.randn((2, 3, rows, 8), generator=torch.Generator().manual_seed(0))
    pages = gpu_baselines.paged(cache, n)
    assert pages.shape == (2 * 4, 3, gpu_baselines.PAGE, 8)
    assert torch.equal(pages.view(2, 4, 3, -1, 8).transpose(1, 2).flatten(2, 3)[:, :, :n], cache[:, :, :n])


def test_generate(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "bench/gpu_generate.py", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu_generate.json").read_text())
    assert [x["name"] for x in found["figures"]][:3] == ["dense, DynamicCache", "ours 5 %, eager", "ours 5 %, graphs"]
    assert len(found["figures"]) + len(found["skipped"]) == 6 and not found["wrong"]
    assert all(x["same"] == x["of"] and x["error"] < 1e-4 for x in found["checks"]) and found["checks"]
