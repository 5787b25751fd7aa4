"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: the kernel tests and the random walk again."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1"


def test_no_memory_error_and_no_undefined_behaviour(tmp_path: Path) -> None:
    folders = ["--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "o")]
    build = [sys.executable, "setup.py", "--quiet", "build_ext", *folders]
    env = {**os.environ, "CFLAGS": FLAGS, "LDFLAGS": "-fsanitize=address,undefined"}
    subprocess.run(build, cwd=ROOT, env=env, check=True, capture_output=True, timeout=600)
    modules = list(tmp_path.glob("saap_index/_cpu*.so"))
    assert len(modules) == 1, "the extension was not built"
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    env = {
        **os.environ,
        "SANITIZED_MODULE": str(modules[0]),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter itself leaks by design
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    tests = ["tests/test_cpu_kernels.py", "tests/test_stateful.py", "-k", "not torch and not reference"]
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "sanitized", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout
