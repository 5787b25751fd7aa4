"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: their own tests, which go over all vector widths, and
per width the tests of those that call them, with a random walk.

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
from emu.runtime import cached

ROOT = Path(__file__).parents[2]
# What AddressSanitizer sees besides is left to it: every check more makes the inner loops longer to compile, which takes minutes.
LEFT = "-fno-sanitize=null,object-size,pointer-overflow,vptr"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", LEFT]
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-Wno-psabi", "-fno-omit-frame-pointer", "-DSAAP_EMULATE_AVX512", *SANITIZE]
MACROS = ["-DPy_LIMITED_API=0x030A0000", "-DNB_BACKEND_MODULE=nanobind_backend", "-DNB_BACKEND_PYPI=nanobind-backend"]
KERNELS = ["tests/backends/test_cpu_kernels.py", "tests/backends/test_cpu_tail.py", "tests/backends/test_scalar_quantizer.py"]
CALLERS = ["tests/backends/test_backends.py", "tests/index/test_search_call.py", "tests/index/test_stateful.py"]
WIDTHS = "baseline", "avx2", "avx512"


def build(to: Path) -> None:
    """At -O1 and file by file on all cores: setup.py would take five minutes."""
    include = [f"-I{nanobind.include_dir()}", f"-I{sysconfig.get_paths()['include']}"]

    def compiled(source: Path) -> str:
        target = f"{to}.{source.stem}.o"
        subprocess.run(["g++", "-c", *FLAGS, *MACROS, *include, str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the largest file first
        objects = list(pool.map(compiled, sorted((ROOT / "bindings").glob("*.cpp"), key=lambda p: p.stem != "kernels")))
    subprocess.run(["g++", "-shared", *SANITIZE, *objects, "-o", str(to)], check=True)
    for path in objects:
        os.unlink(path)


@pytest.fixture(scope="module")
def module() -> Path:
    sources = [*sorted((ROOT / "bindings").iterdir()), ROOT / "cuda" / "softmax_state.cuh"]
    key = [*FLAGS, *MACROS, nanobind.__version__, sys.version, *(f"{x.name}\n{x.read_text()}" for x in sources)]
    found = cached("sanitized", key, build)
    assert b"__asan_report_load" in found.read_bytes(), "the module was built without the sanitizers"
    return found


@pytest.mark.parametrize(("tests", "isa"), [(KERNELS, WIDTHS[0]), *((CALLERS, isa) for isa in WIDTHS)])
def test_no_memory_error_and_no_undefined_behaviour(module: Path, tests: list[str], isa: str) -> None:
    # the C++ runtime too: the sanitizer looks for its exceptions when the process starts
    names = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    runtime = [subprocess.run(x, capture_output=True, text=True, check=True).stdout.strip() for x in names]
    env = {
        **os.environ,
        "SANITIZED_MODULE": str(module),
        "SANITIZED_ISA": isa,
        "HYPOTHESIS_PROFILE": "sanitized",
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=4",  # the interpreter itself leaks by design
        "PYTHONPATH": str(ROOT / "tests"),
    }
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "sanitized", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(
        [*run, "-k", "not torch and not reference and not fork and not of_ones_own"], cwd=ROOT, env=env, capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout
