"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: kernel tests and random walk again, per vector width.

The build also compiles the 16-lane code for AVX2, so that its logic is executed on processors without AVX-512.
"""

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nanobind
import pytest

ROOT = Path(__file__).parents[2]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-Wno-psabi", "-fno-omit-frame-pointer", "-DSAAP_EMULATE_AVX512", *SANITIZE]
MACROS = ["-DPy_LIMITED_API=0x030A0000", "-DNB_BACKEND_MODULE=nanobind_backend", "-DNB_BACKEND_PYPI=nanobind-backend"]
TESTS = [
    "tests/backends/test_cpu_kernels.py", "tests/backends/test_cpu_tail.py", "tests/backends/test_backends.py",
    "tests/index/test_search_call.py", "tests/index/test_stateful.py", "tests/backends/test_scalar_quantizer.py",
]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built at -O1 and file by file on all cores: setup.py would take five minutes."""
    folder = tmp_path_factory.mktemp("sanitized")
    include = [f"-I{nanobind.include_dir()}", f"-I{sysconfig.get_paths()['include']}"]

    def build(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        subprocess.run(["g++", "-c", *FLAGS, *MACROS, *include, str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the largest file first
        objects = list(pool.map(build, sorted((ROOT / "bindings").glob("*.cpp"), key=lambda p: p.stem != "kernels")))
    found = folder / "_cpu.abi3.so"
    subprocess.run(["g++", "-shared", *SANITIZE, *objects, "-o", str(found)], check=True)
    return found


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_no_memory_error_and_no_undefined_behaviour(module: Path, isa: str) -> None:
    assert b"__asan_report_load" in module.read_bytes(), "the module was built without the sanitizers"
    # the C++ runtime too: the sanitizer looks for its exceptions when the process starts
    names = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    runtime = [subprocess.run(x, capture_output=True, text=True, check=True).stdout.strip() for x in names]
    env = {
        **os.environ,
        "SANITIZED_MODULE": str(module),
        "SANITIZED_ISA": isa,
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter itself leaks by design
    }
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "sanitized", "-p", "no:cacheprovider", *TESTS]
    result = subprocess.run(
        [*run, "-k", "not torch and not reference and not fork"], cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True, text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout
