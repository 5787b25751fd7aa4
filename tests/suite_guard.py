"""What keeps a run of the suite from hanging or leaving processes behind. Knows pytest and its workers, not the library.

A worker that crashes, or that pytest-timeout ends, ends the run: xdist would start another in its place, and report at the end,
if it came to an end. Whatever processes its tests had started are ended when the run is over, in whatever way it ended.
"""

from __future__ import annotations

import os
import sys
import uuid

import pytest

RUN = "SAAP_TEST_RUN"
"""Environment variable that names a run to all processes below it."""

WATCH = """
import os, signal, sys, time
parent, token = int(sys.argv[1]), sys.argv[2].encode()
while os.getppid() == parent:
    time.sleep(0.2)
for _ in range(20):
    left = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if token in file.read():
                    os.kill(int(pid), signal.SIGKILL)
                    left.append(pid)
        except OSError:
            continue
    if not left:
        break
    time.sleep(0.2)
"""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    if getattr(config.option, "maxworkerrestart", "0") is None:
        config.option.maxworkerrestart = "0"
    if RUN not in os.environ and os.path.isdir("/proc/self"):
        token = f"{RUN}={uuid.uuid4().hex}"
        # a process of its own, as no code of ours runs once this one is killed; outside of what Ctrl-C reaches
        command = [sys.executable, "-S", "-c", WATCH, str(os.getpid()), token]
        nowhere = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
        os.posix_spawn(sys.executable, command, os.environ, file_actions=nowhere, setsid=True)
        os.environ[RUN] = token.partition("=")[2]
