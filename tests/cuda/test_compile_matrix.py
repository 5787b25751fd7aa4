"""Every kernel in every shipped configuration compiles for every architecture, spills nothing and uses the registers on record.

Needs neither GPU nor toolkit: NVRTC is a wheel. After a change of a kernel, `python tests/cuda/test_compile_matrix.py` writes the
record again (registers.json beside this file, by file, kernel, macros and architecture); its diff is part of the change.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from saap_index.backends.cuda import nvrtc as gpu_nvrtc
from saap_index.backends.cuda import source as gpu_source

ARCHS = ("sm_80", "sm_90", "sm_100")
LAUNCHERS = ("append_assign", "codes", "paged", "route", "route_select", "scan", "seal", "select", "selftest")
RECORD = Path(__file__).parents[1] / "registers.json"
SAMPLE = 1
"""The test compiles one in so many, and checks of all that the record is of their present text."""

Task = tuple[str, tuple[tuple[str, int], ...], str]
"""File, macros, architecture."""


def kernels() -> dict[tuple[str, tuple[tuple[str, int], ...]], set[str]]:
    """Names of the kernels that each file has to define under each set of macros."""
    found: dict[tuple[str, tuple[tuple[str, int], ...]], set[str]] = {}
    for name in LAUNCHERS:
        for file, kernel, macros in importlib.import_module(f"saap_index.backends.cuda.{name}").CONFIGURATIONS:
            found.setdefault((file, tuple(sorted(macros.items()))), set()).add(kernel)
    return found


def tasks() -> list[Task]:
    return [(file, macros, arch) for file, macros in sorted(kernels()) for arch in ARCHS]


def compile_task(task: Task) -> dict[str, list[int]]:
    """Registers, stack bytes and spilled bytes of each kernel."""
    file, macros, arch = task
    used = gpu_nvrtc.compile_kernel(file, dict(macros), arch)[1]
    return {name: [u.registers, u.stack_bytes, u.spill_bytes] for name, u in sorted(used.items())}


def compiled(chosen: list[Task]) -> Iterator[tuple[Task, dict[str, list[int]]]]:
    workers = max(1, min(len(chosen), len(os.sched_getaffinity(0))))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from zip(chosen, pool.map(compile_task, chosen), strict=True)


def label(task: Task) -> str:
    file, macros, arch = task
    return " ".join([file, *gpu_source.options(dict(macros)), arch])


def text_hash(file: str) -> str:
    return hashlib.sha256("\n".join([*gpu_nvrtc.FLAGS, gpu_source.source(file)]).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


AGAIN = "write the record again: python tests/cuda/test_compile_matrix.py"


def test_the_record_is_of_these_sources(record: dict[str, Any]) -> None:
    assert record["nvrtc"] == list(gpu_nvrtc.version())
    assert record["sources"] == {file: text_hash(file) for file, _ in sorted(kernels())}, AGAIN
    assert set(record["kernels"]) == {label(task) for task in tasks()}, AGAIN


def test_nothing_spills(record: dict[str, Any]) -> None:
    """Neither registers nor stack: arrays indexed at run time would lie there."""
    wanted = {label((file, macros, arch)): names for (file, macros), names in kernels().items() for arch in ARCHS}
    for name, used in record["kernels"].items():
        assert wanted[name] <= set(used), f"{name}: expected {sorted(wanted[name])}"
        for kernel, (registers, stack, spills) in used.items():
            assert stack == spills == 0 and registers <= 255, f"{kernel} of {name}: {stack} bytes of stack, {spills} spilled"


def test_the_record_is_what_the_compiler_says(record: dict[str, Any]) -> None:
    for task, used in compiled(tasks()[::SAMPLE]):
        assert record["kernels"][label(task)] == used, f"{label(task)}: {AGAIN}"


def test_a_change_of_a_header_is_a_change_of_the_text() -> None:
    """What CuPy's cache on disk sees is the text with our headers in place: no include of ours is left in it."""
    for file, _ in kernels():
        text = gpu_source.source(file)
        assert '#line 1 "prims.cuh"' in text and "#pragma once" not in text
        left = [line for line in text.splitlines() if line.lstrip().startswith("#include") and "emulator" not in line]
        assert all('"' not in line for line in left), left


def main() -> None:
    """Write the record: compiles what is not in it, or of another text."""
    known: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {"nvrtc": [], "sources": {}, "kernels": {}}
    same = known["nvrtc"] == list(gpu_nvrtc.version())
    found = {}
    for task in tasks():
        if same and known["sources"].get(task[0]) == text_hash(task[0]) and label(task) in known["kernels"]:
            found[label(task)] = known["kernels"][label(task)]
    for task, used in compiled([x for x in tasks() if label(x) not in found]):
        found[label(task)] = used
        print(label(task), used, file=sys.stderr)
    sources = {file: text_hash(file) for file, _ in sorted(kernels())}
    lines = [f"  {json.dumps(name)}: {json.dumps(used)}" for name, used in sorted(found.items())]
    head = f'"nvrtc": {json.dumps(list(gpu_nvrtc.version()))},\n"sources": {json.dumps(sources, indent=1)},\n'
    RECORD.write_text("{\n" + head + '"kernels": {\n' + ",\n".join(lines) + "\n}\n}\n")


if __name__ == "__main__":
    main()
