"""How many threads the CPU backend uses, and that it goes on with fewer."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import small_index, tokens

from saap_index import _cpu
from saap_index.backends.threads import available_cores

ROOT = Path(__file__).parents[2]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

STEP = """
import torch
from saap_index import AsymmetricIndex, KeyQuantizer, QueryRouter, _cpu
c = torch.randn(2, 16, 64)
index = AsymmetricIndex(64, 16, 2, 2, break_even=0)
index.key_quantizer, index.query_router = KeyQuantizer(c), QueryRouter.symmetric(c)
LIMIT
index.add(torch.randn(1, 2, 3000, 64), torch.randn(1, 2, 3000, 64))
assert index.search_attend(torch.randn(1, 2, 1, 64)).isfinite().all()
print(_cpu.get_num_threads())
"""


def threads_of(limit: str = "pass", preexec: Callable[[], None] | None = None, **env: str) -> int:
    """Threads of the pool after some operations in a process of its own; ``limit``: code that runs before the first."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("SAAP_NUM_THREADS", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", STEP.replace("LIMIT", limit)], capture_output=True, text=True, timeout=300, preexec_fn=preexec,
        env={**inherited, "PYTHONPATH": os.pathsep.join(sys.path), **env},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_follows_the_environment() -> None:
    assert threads_of(OMP_NUM_THREADS="1") == 1
    assert threads_of(OMP_NUM_THREADS="1", SAAP_NUM_THREADS="3") == 3
    assert threads_of(OMP_NUM_THREADS="64") == available_cores()


def test_follows_torch() -> None:
    before, index = torch.get_num_threads(), small_index()
    index.add(tokens(1, 2, 50, 32), tokens(1, 2, 50, 32))
    try:
        for count in (1, before, 1):
            torch.set_num_threads(count)
            index.search_attend(tokens(1, 4, 1, 32))
            expected = int(os.environ.get("SAAP_NUM_THREADS", "0")) or min(count, available_cores())
            assert _cpu.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space as Linux has them")
def test_goes_on_where_no_thread_can_be_started() -> None:
    """A stack of 8 GiB for each thread, and an address space in which two find no place."""

    def large_stacks() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (8 << 30, resource.getrlimit(resource.RLIMIT_STACK)[1]))

    limit = (
        "import resource\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (12 << 30),) * 2)"
    )
    found = threads_of(limit, large_stacks, SAAP_NUM_THREADS="16", OMP_NUM_THREADS="1")
    assert 1 <= found <= 2


def group(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


V1 = "5:memory:/a\n4:cpu,cpuacct:/docker/x\n1:name=systemd:/"
GROUPS: dict[str, tuple[dict[str, str], float]] = {
    "none": ({}, 1e9),
    "unlimited": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 1e9),
    "half a core": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
    "one and a half": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
    "of the parent": ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "100000 100000"}, 1),
    "of another": ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/c/cpu.max": "100000 100000"}, 1e9),
    "path of the host": ({"proc/self/cgroup": "0::/kube/pod", "sys/fs/cgroup/cpu.max": "100000 100000"}, 1),
    "version 1": (
        {
            "proc/self/cgroup": V1, "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000",
        },
        1,
    ),
    "version 1, unlimited": (
        {
            "proc/self/cgroup": V1, "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        1e9,
    ),
    "damaged": ({"proc/self/cgroup": "what\n::", "sys/fs/cgroup/cpu.max": "0 0"}, 1e9),
}


@pytest.mark.parametrize("name", GROUPS)
def test_control_groups(name: str, tmp_path: Path) -> None:
    files, most = GROUPS[name]
    assert available_cores(group(tmp_path, files)) == min(CORES, most)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_affinity(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert available_cores(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, before)


def test_the_pool_itself(tmp_path: Path) -> None:
    program = tmp_path / "check"
    sources = [str(ROOT / "tests" / "pool_check.cpp"), str(ROOT / "bindings" / "pool.cpp")]
    subprocess.run(["g++", "-std=c++20", "-O1", "-pthread", *sources, "-o", str(program)], check=True, timeout=300)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stdout
