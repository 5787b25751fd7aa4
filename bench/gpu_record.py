"""The model of a step on record, tests/step_model.json: what the machine code of its kernels says, and the predictions. Knows how
the record is made, written and shown beside a measurement.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import gpu_harness as harness
import gpu_sass
from gpu_scene import Scene, Size, Start, Watched
from gpu_steps import SIZES, SMALL, STORED, machine_code, model, sealing, size_name
from gpu_walk import CONSTANTS, DEVICES, MULTIPROCESSORS, Prediction
from saap_index.backends.cuda import nvrtc as gpu_nvrtc
from saap_index.backends.cuda import source as gpu_source

RECORD = harness.ROOT / "tests/step_model.json"
MEASURED = harness.ROOT / "bench/results/gpu-2026-11-27-h200"

CAPABILITIES = {"sm_80": ((8, 0), 163 * 1024), "sm_90": ((9, 0), 227 * 1024), "sm_100": ((10, 0), 227 * 1024)}
"""And the shared memory of a block: what decides on launches and configurations."""


class Idle:
    """A device that runs nothing."""

    name, multiprocessors = "idle", MULTIPROCESSORS

    def __init__(self, arch: str) -> None:
        self.capability, self.max_shared_bytes = CAPABILITIES[arch]

    def kernel(self, file: str, name: str, macros: Any) -> Any:
        return self

    def launch(self, *arguments: Any) -> None:
        pass


def launches(size: Size, arch: str) -> list[Start]:
    """What a step launches."""
    seen: list[Start] = []
    Scene(Watched(Idle(arch), lambda start, go: seen.append(start)), size, drawn=False).step()
    return seen


def label(start: Start, arch: str) -> str:
    return " ".join([start.file, *gpu_source.options(start.macros), arch])


def configurations() -> dict[str, tuple[Start, str]]:
    """The kernels of the steps of SIZES, by label."""
    starts: dict[str, tuple[Start, str]] = {}
    for arch in CAPABILITIES:
        for size in (*(Size(*of) for of in SIZES), *(Size(n, b, storage=x) for n, b, x in STORED)):
            starts |= {label(x, arch): (x, arch) for x in launches(size, arch)}
    return starts


def text_hash(file: str) -> str:
    return hashlib.sha256("\n".join([*gpu_nvrtc.FLAGS, gpu_source.source(file)]).encode()).hexdigest()[:16]


def code(start: Start, arch: str) -> dict[str, Any]:
    """What the machine code says, whatever it is run on: instructions, bytes, and those that wait for others, in number."""
    blocks = machine_code(start.file, start.kernel, tuple(sorted(start.macros.items())), arch)
    instructions = [x for block in blocks for x in block.instructions]
    kinds: dict[str, tuple[str, ...]] = {"barriers": ("BAR",), "cluster_barriers": ("UCGABAR_WAIT",)}
    kinds |= {"loads": ("LDG",), "copies": ("LDGSTS",)}
    kinds |= {"fences": ("MEMBAR",), "atomics": ("ATOM", "ATOMG", "RED", "REDG"), "shuffles": ("SHFL",), "matrix": ("HMMA",)}
    counts = {name: sum(x.base in of for x in instructions) for name, of in kinds.items()}
    size = len(instructions)
    return {"instructions": size, "bytes": size * gpu_sass.BYTES, **{k: v for k, v in counts.items() if v}}


def predicted(predictions: list[Prediction]) -> dict[str, Any]:
    """As it stands on record."""
    of = {}
    for x in predictions:
        fields = {"cold_bytes": x.cold_bytes, "jumps": x.jumps, "executed": x.executed, **x.barriers}
        fields |= {"trips": sum(x.trips.values()), "before": x.before, "after": x.after, "nbytes": x.nbytes}
        of[x.kernel] = fields | {f"{name}_us": round(us, 2) for name, us in x.us.items()}
    return of


def record(previous: dict[str, Any]) -> dict[str, Any]:
    """Everything anew, but machine code whose text is as it was."""
    wanted, files = configurations(), {}
    same = previous.get("nvrtc") == list(gpu_nvrtc.version())
    codes = {}
    for name, (start, arch) in sorted(wanted.items()):
        files[start.file] = text_hash(start.file)
        old = previous.get("code", {}).get(name) if same and previous["sources"].get(start.file) == files[start.file] else None
        codes[name] = old or code(start, arch)
    constants = constants_of(None)
    steps = {}
    for tokens, batch, storage in (*((*of, "") for of in (SMALL, *SIZES)), *STORED):
        name = size_name(tokens, batch, storage)
        steps[name] = predicted(model(Size(tokens, batch, storage=storage), constants))
        print(f"{name}: counted", file=sys.stderr, flush=True)
    seals = {size_name(tokens, 1): sealing(Size(tokens, 1), constants) for tokens, batch in SIZES if batch == 1}
    head = {"nvrtc": list(gpu_nvrtc.version()), "sources": files, "constants": constants, "sealing": seals}
    return head | {"code": codes, "steps": steps}


def dumps(tables: dict[str, Any]) -> str:
    """A line for each kernel, so that a diff names it."""
    parts = [f'"{name}": {json.dumps(tables[name])}' for name in ("nvrtc", "sources", "constants", "sealing")]
    parts.append('"code": {\n' + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in tables["code"].items()) + "\n}")
    steps = []
    for size, kernels in tables["steps"].items():
        lines = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in kernels.items())
        steps.append(f"  {json.dumps(size)}: {{\n{lines}\n  }}")
    parts.append('"steps": {\n' + ",\n".join(steps) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def recorded_table(folder: Path | None) -> str:
    """The predictions on record beside a measurement, without a compiler or a disassembler."""
    tables = json.loads(RECORD.read_text())
    of = tables["steps"]
    rows, on = [], 0
    if folder is not None and (folder / "environment.json").exists():
        gpu = json.loads((folder / "environment.json").read_text())["gpu"]
        on = next((i for i, x in enumerate(DEVICES) if x.name in gpu), 0)
    for tokens, batch, storage in (*((*x, "") for x in SIZES), *STORED):
        name = size_name(tokens, batch, storage)
        whole, kernels = measured_step(folder, Size(tokens, batch, storage=storage))
        total = [0.0, 0.0]
        for kernel, x in of[name].items():
            us = [x[f"{d.name}_us"] for d in DEVICES]
            total = [a + b for a, b in zip(total, us, strict=True)]
            seen = f"({kernels[kernel]:.1f})" if kernel in kernels else "-"
            rows.append([f"{name}  {kernel}", *(f"{u:.1f}" for u in us), f"{1e6 * x['nbytes'] / DEVICES[on].read:.1f}", seen, ""])
        off = f"{total[on] / whole - 1:+.0%}" if whole else ""
        rows.append([f"{name}  step", *(f"{u:.1f}" for u in total), "", f"{whole:.1f}" if whole else "-", off])
    for name, x in tables["sealing"].items():
        for what, suffix in (("sealing, a token and layer", "_us"), ("of that in the step's stream", "_in_step_us")):
            rows.append([f"{name}  {what}", *(f"{x[d.name + suffix]:.2f}" for d in DEVICES), "", "", ""])
    head = ["tokens x batch, launch", *(f"{d.name} us" for d in DEVICES), "bytes alone", "measured", f"off on {DEVICES[on].name}"]
    return harness.rows(head, rows)


# -- beside what was measured


def measured_step(folder: Path | None, size: Size) -> tuple[float | None, dict[str, float]]:
    """Microseconds of a step in a graph, and of each kernel by the profiler, where a session measured them. A kernel's time there
    starts when its blocks do, and under dependent launch they wait for the kernel in front."""
    file = "gpu_codes.json" if size.storage else "gpu_step.json"
    if folder is None or not (folder / file).exists():
        return None, {}
    of = json.loads((folder / file).read_text())
    name = f"ours step {size.share:.0%}" + (f" {size.storage}" if size.storage else "")
    lines = [x for x in of["figures"] if (x["tokens"], x["batch"], x["name"]) == (size.tokens, size.batch, name)]
    kernels = of["kernels_us"].get(f"{size.tokens // 1024}k x {size.batch} {name}", {})
    return (lines[0].get("graph_us") if lines else None), kernels


def constants_of(folder: Path | None) -> dict[str, float]:
    """Those on record, with what the session in ``folder`` measured in their place."""
    constants = {name: value for name, (value, _) in CONSTANTS.items()}
    if folder is not None and (folder / "environment.json").exists():
        of = json.loads((folder / "environment.json").read_text())
        constants |= {name: value for name, value in of.get("cycles", {}).items() if name in constants}
        launch = of.get("launch_us", {})
        constants |= {"launch_plain_us": launch["graph"], "launch_us": launch["graph, dependent"]} if launch else {}
    return constants
