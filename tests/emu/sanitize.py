"""Starts a Python process in which kernels are built with a sanitizer: `EmulatedRuntime` there has it as its default."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from emu.runtime import COMPILER

ROOT = Path(__file__).resolve().parent.parent.parent
RUNTIMES = {"address": ["libasan.so", "libstdc++.so"], "thread": ["libtsan.so"]}


def run(sanitizer: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """``python <arguments>`` in the repository, with tests/ on the path."""
    names = [[COMPILER, f"-print-file-name={name}"] for name in RUNTIMES[sanitizer]]
    preload = [subprocess.run(x, capture_output=True, text=True, check=True).stdout.strip() for x in names]
    env = {
        **os.environ,
        "SAAP_EMU_SANITIZER": sanitizer,
        "LD_PRELOAD": " ".join(preload),
        "PYTHONPATH": ":".join(map(str, (ROOT, ROOT / "tests", *sorted(x for x in (ROOT / "tests").iterdir() if x.is_dir())))),
        "ASAN_OPTIONS": "detect_leaks=0:use_sigaltstack=0",
        # A race is an EmulationError where it happens. Everything but the kernels is left alone: torch is not instrumented.
        # A fault ends the process as it would without the sanitizer, which would exit with 0.
        "TSAN_OPTIONS": "exitcode=0:history_size=4:ignore_noninstrumented_modules=1:handle_segv=0:handle_sigbus=0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    # ThreadSanitizer needs the usual places in the address space.
    fixed = ["setarch", "-R"] if sanitizer == "thread" else []
    command = [*fixed, sys.executable, "-X", "faulthandler", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
