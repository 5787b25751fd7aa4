"""A run of the suite comes to an end, red, when a worker crashes or hangs, and what its tests started does not outlive it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
START = "import os, subprocess, sys, time\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
SAY = "open({path!r}, 'w').write(str(child.pid))\n"

ENDS = {
    "crashes": "os.kill(os.getpid(), 11)",
    "hangs": "time.sleep(600)",
    "leaves a process": "pass",
    "is killed, all of it": "os.kill(os.getppid(), 9); time.sleep(600)",
}


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
@pytest.mark.parametrize("end", ENDS)
def test_a_run_ends(end: str, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"def test_first():\n    {(START + SAY.format(path=str(note)) + ENDS[end]).replace(chr(10), chr(10) + '    ')}\n"
    (tmp_path / "test_one.py").write_text(f"{code}\ndef test_next():\n    pass\n")
    (tmp_path / "conftest.py").write_text("from suite_guard import pytest_configure\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "SAAP_TEST_RUN"))}
    limit = ["--timeout", "5" if end == "hangs" else "1000", "--timeout-method", "thread"]
    command = [sys.executable, "-m", "pytest", "-n", "1", "--dist", "loadfile", *limit]
    run = subprocess.run(command, cwd=tmp_path, env={**env, "PYTHONPATH": str(TESTS)}, capture_output=True, text=True)
    assert (run.returncode == 0) == (end == "leaves a process"), run.stdout + run.stderr
    assert ("worker restarting disabled" in run.stdout) == (end in ("crashes", "hangs")), run.stdout
    pid = int(note.read_text())
    while is_alive(pid):  # the watcher looks five times a second; the suite's own time limit ends this if it does not
        time.sleep(0.05)
