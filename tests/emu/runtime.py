"""A runtime (backends/cuda/launch.py) that compiles kernels with g++ and runs them on CPU tensors, every CUDA thread a fiber.

What is checked and what cannot be: README.md beside this file.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

EMULATOR = Path(__file__).resolve().parent
CUDA = EMULATOR.parent.parent / "cuda"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-shared", "-DSAAP_EMU", "-Wall", "-Wno-unknown-pragmas", "-march=native"]
# Without these the code of two lines may become one, and a fault be reported with the wrong one.
FLAGS += ["-fno-crossjumping", "-fno-tree-tail-merge", "-fno-tree-sink", "-fno-code-hoisting"]
SANITIZE = {
    # What the hardware traps, or leaves undefined, traps here too: misaligned vectors, indices of arrays, shifts.
    None: ["-fsanitize=alignment,bounds,shift,integer-divide-by-zero,unreachable", "-fsanitize-undefined-trap-on-error"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-O1"],
    "thread": ["-fsanitize=thread", "-O1"],
}
ORDERS = ("fifo", "lifo", "random")
MACHINE = ("machine.cpp", "copies.cpp", "matrix.cpp", "grid.cpp")
KEPT_DAYS = 7
MOST_CLUSTER = 8
CLUSTERS = (9, 0)


class EmulationError(RuntimeError):
    """A kernel did what it must not; the message names file and line."""


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_int * 3),
        ("block", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("cluster", ctypes.c_int),
        ("dependent", ctypes.c_int),
        ("order", ctypes.c_int),
        ("inflight", ctypes.c_int),
        ("extents", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("extent", ctypes.c_void_p),
    ]


class EmulatedRuntime:
    """Runs kernels under one schedule. ``cuda`` : the folder of the sources, for a test that changes them.

    order: which ready thread goes on, and in which order blocks start; inflight: blocks that run at once, though clusters always
    start as a whole. capability: below (9, 0) clusters and dependent launches are refused.
    sanitizer: None, "address" or "thread"; the last two need a process started by `sanitize.run`, which sets the default.
    """

    name = "emulated"
    multiprocessors = 4
    max_shared_bytes = 227 * 1024

    def __init__(
        self, order: str = "fifo", seed: int = 0, inflight: int = 2, sanitizer: str | None = None, cuda: Path = CUDA,
        capability: tuple[int, int] = (9, 0),
    ) -> None:
        self.order, self.seed, self.inflight, self.cuda = ORDERS.index(order), seed, inflight, cuda
        self.capability = capability
        self.sanitizer = sanitizer or os.environ.get("SAAP_EMU_SANITIZER") or None
        self.launches = 0
        self.extents: list[tuple[int, int]] = []
        self._kernels: dict[tuple[str, str, tuple[tuple[str, int], ...]], EmulatedKernel] = {}

    def kernel(self, file: str, name: str, macros: Mapping[str, int]) -> EmulatedKernel:
        key = (file, name, tuple(sorted(macros.items())))
        if key not in self._kernels:
            library = _load(build(self.cuda / file, name, macros, self.sanitizer), self.sanitizer)
            self._kernels[key] = EmulatedKernel(self, f"{file}: {name}", library)
        return self._kernels[key]

    @property
    def conflicts(self) -> dict[str, tuple[int, int]]:
        """Of all its kernels."""
        return {place: counts for kernel in self._kernels.values() for place, counts in kernel.conflicts.items()}

    @contextmanager
    def allow(self, *tensors: Tensor | None) -> Iterator[None]:
        """Inside, async copies, streaming loads and atomics of device memory must stay within these tensors."""
        before = self.extents
        storages = [t.untyped_storage() for t in tensors if t is not None]
        self.extents = before + [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        try:
            yield
        finally:
            self.extents = before


class EmulatedKernel:
    """counters : of all launches: switches, collectives, barriers, 16-byte async copies, 8 x 8 matrices read.
    conflicts : of ldmatrix, by file:line: phases, and further passes over shared memory that bank conflicts cost them.
    """

    def __init__(self, runtime: EmulatedRuntime, title: str, library: Library) -> None:
        self.runtime, self.title, self.library = runtime, title, library
        self.counters: Counter[str] = Counter()
        self.conflicts: dict[str, tuple[int, int]] = {}

    def prepare(
        self, grid: tuple[int, int, int], block: int, shared_bytes: int, params: np.ndarray[Any, Any], cluster: int = 1,
        dependent: bool = False,
    ) -> Callable[[], None]:
        return partial(self.launch, grid, block, shared_bytes, params, cluster, dependent)

    def launch(
        self, grid: tuple[int, int, int], block: int, shared_bytes: int, params: np.ndarray[Any, Any], cluster: int = 1,
        dependent: bool = False,
    ) -> None:
        """Runs to the end. Each launch of a random runtime has another schedule; the first repeats under the same seed."""
        runtime, native = self.runtime, self.library.native
        data = params.tobytes()
        if len(data) != native.emu_params_bytes():
            raise EmulationError(f"{self.title}: params have {len(data)} bytes, the struct {native.emu_params_bytes()}")
        if not (1 <= block <= 1024 and min(grid) >= 1 and max(grid[1:]) <= 65535):
            raise EmulationError(f"{self.title}: the device refuses grid {grid}, block {block}")
        if not 0 <= shared_bytes <= runtime.max_shared_bytes:
            raise EmulationError(f"{self.title}: {shared_bytes} bytes of shared memory, at most {runtime.max_shared_bytes}")
        if not 1 <= cluster <= MOST_CLUSTER or grid[0] % cluster:
            raise EmulationError(f"{self.title}: the device refuses clusters of {cluster} in grid {grid}")
        if (cluster > 1 or dependent) and runtime.capability < CLUSTERS:
            raise EmulationError(f"{self.title}: no clusters or dependent launches on a device of {runtime.capability}")
        seed = (runtime.seed << 32) + runtime.launches
        runtime.launches += 1
        extents = np.array(runtime.extents, np.uint64).reshape(-1, 2)
        args = (block, shared_bytes, cluster, dependent, runtime.order, runtime.inflight, len(extents), seed, extents.ctypes.data)
        with _one_at_a_time:
            error = native.emu_run(
                ctypes.byref(_Launch(grid, *args)), native.emu_invoke, ctypes.create_string_buffer(data, len(data))
            )
            report = self.library.new_report()
            self.library.add_counters(self.counters, self.conflicts)
            if error is not None:
                raise EmulationError(f"{self.title}: {error.decode()}{self.library.fault()}{report}")
        if report:
            raise EmulationError(f"{self.title}: {report}")

    def sizeof(self, name: str) -> int:
        """What the source exports as ``saap_sizeof_<name>``."""
        return int(getattr(self.library.native, f"saap_sizeof_{name}")())


class Library:
    """A loaded build, and how to read its faults and the sanitizer's reports."""

    def __init__(self, path: Path, sanitizer: str | None) -> None:
        self.native = ctypes.CDLL(str(path))
        self.native.emu_run.restype = ctypes.c_char_p
        self.native.emu_fault.restype = ctypes.c_void_p
        self.sanitizer = sanitizer
        if sanitizer == "thread":
            _reports()

    def add_counters(self, counters: Counter[str], conflicts: dict[str, tuple[int, int]]) -> None:
        """Those of the last launch."""
        out, place = (ctypes.c_uint64 * 5)(), ctypes.create_string_buffer(256)
        self.native.emu_counters(out)
        counters.update(dict(zip(("switches", "collectives", "barriers", "copies", "matrices"), out, strict=True)))
        i = 0
        while self.native.emu_conflict(i, out, place, len(place)):
            before = conflicts.get(place.value.decode(), (0, 0))
            conflicts[place.value.decode()] = (before[0] + out[0], before[1] + out[1])
            i += 1

    def fault(self) -> str:
        """Where the last fault's instruction stands, if there was one: innermost first, the emulator's own lines left out."""
        at = self.native.emu_fault()
        if at is None:
            return ""
        ranges = [
            (int(first, 16), int(last, 16), path)
            for first, last, path in re.findall(r"^(\w+)-(\w+) .* (/.*\.so)$", Path("/proc/self/maps").read_text(), re.M)
        ]
        path = next((path for first, last, path in ranges if first <= at < last), None)
        if path is None:
            return ""
        base = min(first for first, _, other in ranges if other == path)
        run = ["addr2line", "-i", "-s", "-e", path, hex(at - base)]
        said = subprocess.run(run, capture_output=True, text=True, env=_plain()).stdout
        lines = [x.split(" ")[0] for x in said.split("\n") if x]
        kept = [x for x in lines if x.split(":")[0].endswith((".cu", ".cuh"))]
        return f" at {' < '.join(kept or lines)}"

    def new_report(self) -> str:
        """What ThreadSanitizer wrote since the last launch, of any kernel."""
        if self.sanitizer != "thread" or not _reports().exists():
            return ""
        with open(_reports()) as file:
            file.seek(_read[0])
            text = file.read()
            _read[0] = file.tell()
        return f"race:\n{text[:6000]}" if "WARNING: ThreadSanitizer" in text else ""


_read = [0]
_one_at_a_time = threading.Lock()


@cache
def _reports() -> Path:
    """Where the sanitizer writes from now on."""
    stem = Path(tempfile.mkdtemp()) / "report"
    ctypes.CDLL(None)["__sanitizer_set_report_path"](str(stem).encode())
    return stem.with_name(f"report.{os.getpid()}")


@cache
def _load(path: Path, sanitizer: str | None) -> Library:
    return Library(path, sanitizer)


# ---- building


@cache
def _compiler() -> str:
    """Version and what -march=native means here: a build of another machine is not reused."""
    run = [COMPILER, "-march=native", "-E", "-v", "-x", "c++", "/dev/null"]
    return subprocess.run(run, capture_output=True, text=True, check=True, env=_plain()).stderr


def _plain() -> dict[str, str]:
    """The environment for a compiler, which a sanitizer loaded into it would make twice as slow."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def available() -> bool:
    return shutil.which(COMPILER) is not None


def cache_folder() -> Path:
    """Private to the user; files that were not used for a week are dropped."""
    folder = Path(os.environ.get("SAAP_EMU_CACHE") or Path(tempfile.gettempdir()) / f"saap-emu-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to somebody else; set SAAP_EMU_CACHE")
    return folder


@cache
def _prune(folder: Path) -> None:
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # other processes finish their builds meanwhile
            if time.time() - file.stat().st_mtime > KEPT_DAYS * 86400:
                file.unlink()


def sources(file: Path, folders: tuple[Path, ...]) -> dict[Path, str]:
    """``file`` and what it includes in quotes, at any depth."""
    found: dict[Path, str] = {}
    todo = [file]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found[path] = path.read_text()
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', found[path], re.M):
            todo += [x for x in (folder / name for folder in (path.parent, *folders)) if x.exists()][:1]
    return found


def build(file: Path, name: str, macros: Mapping[str, int], sanitizer: str | None = None) -> Path:
    """The library with the kernel ``name`` of ``file``."""
    checks = SANITIZE[sanitizer]
    machine = _compile("machine", [EMULATOR / x for x in MACHINE], checks if sanitizer else ["-O3"], [], "")
    defined = [f"-D{k}={v}" for k, v in sorted(macros.items())]
    return _compile(name, [file], [*checks, *defined], ["-x", "none", str(machine)], f"EMU_EXPORT({name})\n")


def _compile(name: str, files: list[Path], options: list[str], linked: list[str], tail: str) -> Path:
    """Compiles ``files`` as one unit, or takes the result from the cache if these very texts were compiled before."""
    includes = (files[0].parent, CUDA, EMULATOR)
    texts: dict[Path, str] = {}
    for path in (*files, CUDA / "prims.cuh", EMULATOR / "emulator.h"):
        texts |= sources(path, includes)
    flags = [*FLAGS, *options]
    key = [_compiler(), tail, *flags, *linked, *(f"{p.name}\n{text}" for p, text in sorted(texts.items()))]

    def make(to: Path) -> None:
        unit = "".join(f'#include "{x.name}"\n' for x in [CUDA / "prims.cuh", *files]) + tail
        run = [COMPILER, *flags, *(f"-I{x}" for x in includes), "-x", "c++", "-", *linked, "-o", str(to)]
        result = subprocess.run(run, input=unit, capture_output=True, text=True, env=_plain())
        if result.returncode:
            raise EmulationError(f"{files[0].name}: {name} does not compile\n{result.stderr[:8000]}")

    return cached(name, key, make)


def cached(name: str, key: Sequence[str], make: Callable[[Path], None]) -> Path:
    """What ``make`` writes to the path that it is given, from the cache if it was made for these very texts before."""
    folder = cache_folder()
    _prune(folder)
    target = folder / f"{name}-{hashlib.sha256(chr(0).join(key).encode()).hexdigest()[:24]}.so"
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            os.utime(target)
            return target
        unfinished = target.with_suffix(f".{os.getpid()}")
        make(unfinished)
        os.replace(unfinished, target)
    return target
