"""The model of a step (bench/gpu_model.py): its record is of these sources, and what it reads out of machine code is right.

After a change of a kernel of the step, `python bench/gpu_model.py --record` writes tests/step_model.json again; its diff, in
instructions, bytes, barriers and microseconds, is part of the change.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from emu.runtime import available

from saap_index.backends.cuda import nvrtc as gpu_nvrtc

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import gpu_record  # noqa: E402
import gpu_sass  # noqa: E402
import gpu_steps  # noqa: E402
import gpu_walk  # noqa: E402
from gpu_scene import Size  # noqa: E402

AGAIN = "write the record again: python bench/gpu_model.py --record"


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gpu_record.RECORD.read_text())
    return found


def test_the_record_is_of_these_sources_and_launches(record: dict[str, Any]) -> None:
    wanted = gpu_record.configurations()
    assert set(record["code"]) == set(wanted), AGAIN
    assert record["nvrtc"] == list(gpu_nvrtc.version())
    assert record["sources"] == {start.file: gpu_record.text_hash(start.file) for start, _ in wanted.values()}, AGAIN
    assert record["constants"] == {name: value for name, (value, _) in gpu_walk.CONSTANTS.items()}, AGAIN
    sizes = (gpu_steps.SMALL, *gpu_steps.SIZES, *gpu_steps.STORED)
    assert set(record["steps"]) == {gpu_steps.size_name(*x) for x in sizes}


@pytest.mark.skipif(not available(), reason="needs a C++ compiler")
def test_the_record_is_what_the_model_says(record: dict[str, Any]) -> None:
    tokens, batch = gpu_steps.SMALL
    found = gpu_record.predicted(gpu_steps.model(Size(tokens, batch), record["constants"]))
    old = record["steps"][f"{tokens // 1024}k x {batch}"]
    assert list(found) == list(old), AGAIN
    for kernel, new in found.items():
        for name, value in new.items():  # a weight that rounds otherwise on another processor may move a run
            assert value == pytest.approx(old[kernel][name], rel=0.03, abs=2), f"{kernel}: {name}: {AGAIN}"
    for start in gpu_record.launches(Size(tokens, batch), "sm_90"):
        name = gpu_record.label(start, "sm_90")
        if name in record["code"]:
            assert gpu_record.code(start, "sm_90") == record["code"][name], f"{name}: {AGAIN}"


def test_no_prediction_is_below_what_the_bytes_take(record: dict[str, Any]) -> None:
    for kernels in record["steps"].values():
        for x in kernels.values():
            for device in gpu_walk.DEVICES:
                assert x[f"{device.name}_us"] >= 1e6 * x["nbytes"] / device.read


def test_what_sealing_takes(record: dict[str, Any]) -> None:
    """A token and layer, at batch 1: less than a microsecond, of which most runs beside the steps."""
    for of in record["sealing"].values():
        for device in gpu_walk.DEVICES:
            assert of[f"{device.name}_in_step_us"] < of[f"{device.name}_us"] < 1.0


def test_the_recorded_table_stands_beside_the_measurement() -> None:
    text = gpu_record.recorded_table(gpu_record.MEASURED)
    step = next(x for x in text.splitlines() if x.startswith("128k x 1  step"))
    assert "31.0" in step and step.endswith("%")


# -- reading machine code


def listing(*rows: tuple[str, int]) -> str:
    """Disassembly of (words, control bits); a word that ends in a colon is a label, one that begins with // a line."""
    text = []
    for words, control in rows:
        if words.endswith(":"):
            text.append(words)
        elif words.startswith("//"):
            text.append(f'\t//## File "a.cu", line {words[2:]}')
        else:
            text.append(f"        /*0000*/   {words} ;   /* 0x0000000000000000 */")
            text.append(f"                  /* 0x{control << 41:016x} */")
    return "\n".join(text)


def control(stall: int, writes: int = 7, waits: int = 0) -> int:
    return stall | writes << 5 | 7 << 8 | waits << 11


LOOP = listing(
    ("//1", 0), ("LDG.E R1, desc[UR4][R2.64]", control(2, writes=0)),
    (".L_x_1:", 0), ("//2", 0), ("IADD3 R1, R1, R3, RZ", control(4, waits=1)), ("@P0 BRA `(.L_x_1)", control(5)),
    ("//3", 0), ("@!P1 BRA `(.L_x_2)", control(5)), ("//4", 0), ("BAR.SYNC.DEFER_BLOCKING 0x0", control(6)),
    (".L_x_2:", 0), ("//5", 0), ("EXIT", control(5)),
    (".L_x_3:", 0), ("BRA `(.L_x_3)", control(0)),
)


def test_blocks_and_loops() -> None:
    found = gpu_sass.blocks(LOOP)
    assert [len(x.instructions) for x in found] == [1, 2, 1, 1, 1]
    assert [len(x.loops) for x in found] == [0, 1, 0, 0, 0] and found[1].loops == [frozenset({1})]
    load, add = found[0].instructions[0], found[1].instructions[0]
    assert (load.writes, load.stall, add.waits, add.lines) == (0, 2, (0,), (("a.cu", 2),))
    assert all(x.reached for x in found)


def test_what_runs_and_how_long() -> None:
    found = gpu_sass.blocks(LOOP)
    lines = {("a.cu", 1): 64, ("a.cu", 2): 640, ("a.cu", 3): 64, ("a.cu", 4): 0, ("a.cu", 5): 64}
    each, mean = gpu_walk.frequencies(found, lines, 64)
    assert each == mean == [1.0, 10.0, 1.0, 0.0, 1.0], "ten turns, and no barrier"
    walk = gpu_walk.Walk(gpu_record.constants_of(None))
    walk.run(found[0], 1)
    walk.run(found[1], 1)
    assert walk.now == 272 + 4 + 5, "the addition waits for the load"
    assert walk.trips == {"l2": 1}
    walk.run(found[3], 1)
    assert walk.barriers == {"block_barrier": 1}
