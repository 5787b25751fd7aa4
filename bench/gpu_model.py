"""What a decode step costs by the machine code of its kernels, without a GPU: a prediction that a measurement can refute.

    python bench/gpu_model.py                      # Llama-3.1-8B's layer, 5 %: table, and what was measured beside it
    python bench/gpu_model.py --sizes 131072x1     # tokens x batch
    python bench/gpu_model.py --measured FOLDER    # of a session: its gpu_step.json, and constants from its environment.json
    python bench/gpu_model.py --recorded           # what is on record beside a measurement; needs no tools
    python bench/gpu_model.py --record             # writes tests/step_model.json again, which a test compares

For every launch: the cubin is disassembled (`gpu_sass.py`), the emulated device says how often each line runs at this size
(`gpu_coverage.py`), and one warp is followed through the blocks that run: stall cycles from the control codes, waits at
scoreboards for as long as `CONSTANTS` says of the class of instruction, barriers. A block's instructions come from the second
cache the first time (`cold_line`). Where all warps of a multiprocessor together need longer to be issued than one waits, that
counts. Loops that copy from memory last at least as long as the bytes take at the bandwidth of a bare read. Nothing here is
fitted to the time of a kernel; what each constant comes from stands beside it.

What it leaves out: blocks that wait for the slowest of them, bank conflicts, the TLB, and a memory that is not yet busy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import gpu_harness as harness
import gpu_sass
from gpu_coverage import CountingRuntime, Lines
from gpu_sass import Block
from gpu_scene import Scene, Size, Start, Watched
from saap_index.backends.cuda import nvrtc as gpu_nvrtc
from saap_index.backends.cuda import source as gpu_source

RECORD = harness.ROOT / "tests/step_model.json"
MEASURED = harness.ROOT / "bench/results/gpu-2026-11-27-h200"

SIZES = ((131072, 1), (131072, 8), (524288, 1), (524288, 8))
SMALL = (8192, 1)
"""On record too, for a test: counted in seconds."""

FEW_ROWS = 50_000
"""That many, of all heads, are counted in seconds."""

CAPABILITIES = {"sm_80": ((8, 0), 163 * 1024), "sm_90": ((9, 0), 227 * 1024), "sm_100": ((10, 0), 227 * 1024)}
"""And the shared memory of a block: what decides on launches and configurations."""

MULTIPROCESSORS, SCHEDULERS = 132, 4
"""Of an H100 SXM and of an H200, and of a multiprocessor."""


@dataclass(frozen=True)
class Device:
    """read : bytes per second of a bare read; mhz : of the multiprocessors under load."""

    name: str
    read: float
    mhz: float


DEVICES = (
    Device("H200", 4.645e12, 1980.0),  # measured: floor.cu, bench/results/gpu-2026-11-27-h200
    Device("H100", 3.35e12 * 4.645 / 4.8, 1980.0),  # the datasheet's, by what an H200 reaches of its own; not measured
)

CONSTANTS: dict[str, tuple[float, str]] = {
    "launch_us": (0.49, "floor.cu: an empty kernel behind another in a graph, dependent launch"),
    "launch_plain_us": (0.74, "floor.cu: the same without dependent launch"),
    "cluster_barrier": (375, "floor.cu"),
    "shared_of_another_block": (205, "floor.cu"),
    "l2": (272, "floor.cu"),
    "block_barrier": (34, "floor.cu"),
    "dram": (674, "floor.cu"),
    "cold_line": (27, "floor.cu: 128 bytes of code, fetched ahead from L2"),
    "cold_jump": (272, "assumed: code that no fetch ahead brings takes as long as data from L2"),
    "shared": (29, "Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, 2024"),
    "shuffle": (24, "audit of the SASS, as for Ampere"),
    "special": (30, "MUFU, conversions, S2R, counts of bits: as for Ampere"),
    "double": (48, "float64 in a row: as for Ampere"),
    "constant": (40, "LDC, the first time from L2 like code"),
    "fence": (500, "assumed: MEMBAR at the device's scope with stores on their way"),
    "atomic": (400, "assumed: an atomic in L2 whose result is used"),
    "matrix": (33, "HMMA.16816"),
    "operand": (20, "assumed: until the operands of a store are read"),
}
"""Cycles, or microseconds where the name says so, and where each is from."""

_CLASSES = {
    "LDG": "l2", "LDGSTS": "dram", "LDS": "shared", "LDSM": "shared", "ATOMS": "shared", "LD": "shared_of_another_block",
    "ATOMG": "atomic", "ATOM": "atomic", "SHFL": "shuffle", "REDUX": "shuffle", "MUFU": "special", "S2R": "special",
    "S2UR": "special", "I2F": "special", "F2I": "special", "I2I": "special", "F2F": "special", "FRND": "special",
    "POPC": "special", "FLO": "special", "BREV": "special", "MOVM": "shared", "R2UR": "special", "CS2R": "special",
    "DADD": "double", "DMUL": "double", "DFMA": "double", "DSETP": "double", "DMNMX": "double", "LDC": "constant",
    "ULDC": "constant", "MEMBAR": "fence", "HMMA": "matrix", "LDGDEPBAR": "dram", "QSPC": "special",
}
_BARRIERS = {"BAR": "block_barrier", "UCGABAR_WAIT": "cluster_barrier"}
FETCHED_AHEAD = 512
"""Bytes, assumed: a jump over no more than these finds its code on the way."""

_TRIPS = ("l2", "dram", "shared_of_another_block", "atomic", "fence", "shared")
GRID_WAIT, GRID_LAUNCH = "ACQBULK", "PREEXIT"
PRIMITIVES = "prims.cuh"
"""Has other text on the emulated device: its lines are counted where they are used."""


@dataclass(frozen=True)
class Prediction:
    """Of a launch. instructions, code_bytes : in the cubin; cold_bytes : of blocks that run at this size; jumps : to code that no
    fetch ahead brings; executed : warp instructions of a multiprocessor; barriers : by kind, passed by a warp; trips : waits at
    scoreboards, by what is waited for; before, after : cycles until, and from, where it waits for the launch in front; released :
    cycles until it lets the next one begin; copy : of `after`, in loops that copy; nbytes : from memory. us : by device,
    by which it ends later than the launch in front; roofline : by device, of the bytes alone."""

    kernel: str
    instructions: int
    code_bytes: int
    cold_bytes: int
    jumps: int
    executed: int
    barriers: dict[str, int]
    trips: dict[str, int]
    before: int
    after: int
    released: int
    copy: int
    nbytes: int
    us: dict[str, float]
    roofline: dict[str, float]


class Walk:
    """One warp through blocks: the cycle it is at, and when its scoreboards clear."""

    def __init__(self, constants: dict[str, float]) -> None:
        self.constants = constants
        self.now = 0.0
        self.clear = [0.0] * 6
        self.of = [""] * 6
        self.copied = 0.0
        self.trips: dict[str, float] = {}
        self.barriers: dict[str, float] = {}

    def run(self, block: Block, times: float) -> None:
        """The instructions once. times : what this pass stands for, where it counts."""
        for x in block.instructions:
            for i in x.waits:
                if self.clear[i] > self.now:
                    if self.of[i] in _TRIPS:
                        self.trips[self.of[i]] = self.trips.get(self.of[i], 0.0) + times
                    self.now = self.clear[i]
            kind = _CLASSES.get(x.base)
            if x.base == "DEPBAR":
                self.now = max(self.now, self.copied)
            if x.base in _BARRIERS:
                self.now += self.constants[_BARRIERS[x.base]]
                self.barriers[_BARRIERS[x.base]] = self.barriers.get(_BARRIERS[x.base], 0.0) + times
            if x.base == "LDGSTS":
                self.copied = self.now + self.constants["dram"]
            if x.writes is not None:
                self._set(x.writes, self.constants[kind] if kind else 2 * self.constants["operand"], kind or "")
            if x.reads is not None:
                self._set(x.reads, self.constants["operand"], "")
            self.now += x.stall

    def _set(self, i: int, cycles: float, kind: str) -> None:
        if self.now + cycles > self.clear[i]:
            self.clear[i], self.of[i] = self.now + cycles, kind


def frequencies(blocks: Sequence[Block], lines: Lines, threads: int) -> tuple[list[float], list[float]]:
    """How often each block runs, of a warp that runs it; and on average over all warps.

    The executions of a line are shared by the loops that it stands in, as often as each has it unrolled. Of the lines of a
    block the rarest count, and no block of a loop runs more often than its head: other lines belong to loops that are unrolled
    whole.
    """
    copies: dict[gpu_sass.Line, dict[Any, int]] = {}
    for i, block in enumerate(blocks):
        loop = block.loops[-1] if block.loops else None
        times = gpu_sass.unrolled(block) if loop == {i} else 1
        for x in block.instructions:
            line = counted(x, lines)
            if line is not None and loop is not None and lines[line]:
                of = copies.setdefault(line, {})
                of[loop] = max(of.get(loop, 0), times)
    heads = {loop: min(loop) for block in blocks for loop in block.loops}
    mean, before = [], 0.0
    for i, block in enumerate(blocks):
        executions = []
        for x in block.instructions:
            line = counted(x, lines)
            if line is not None:
                count = lines[line] / threads
                executions.append(count / max(1, sum(copies.get(line, {}).values())) if block.loops else min(count, 1.0))
        executions.sort()
        if not block.reached:
            often = 0.0
        elif not executions:  # of the library alone: as what stands in front of it
            often = before
        elif sum(x > 0 for x in executions) < 0.5 * len(executions):
            often = 0.0
        else:
            above = [x for x in executions if x > 0]
            often = above[0 if i in heads.values() else len(above) // 4]
        before = often
        mean.append(often)
    for loop, head in heads.items():
        # of a head whose lines are only those of the step of a `for`, never reached: the loop ran once each time
        if any(mean[k] for k in loop) and not mean[head]:
            mean[head] = next((mean[k] for k in range(head - 1, -1, -1) if mean[k]), 0.0)
    for i, block in enumerate(blocks):
        if block.loops:  # a turn runs a block once at most
            mean[i] = min(mean[i], mean[heads[block.loops[-1]]])
    return [max(1.0, x) if x else 0.0 for x in mean], mean


def counted(x: gpu_sass.Instruction, lines: Lines) -> gpu_sass.Line | None:
    """The innermost line of ``x`` that is counted; one of those that it is inlined at, where that never ran."""
    sources = [line for line in x.lines if line in lines and line[0] != PRIMITIVES]
    for line in sources:
        if not lines[line]:
            return line
    return sources[0] if sources else None


def streaming(blocks: Sequence[Block], each: list[float]) -> set[int]:
    """Blocks of the loops that copy from memory, as far as they run as often as the copies."""
    members: set[int] = set()
    for i, block in enumerate(blocks):
        if block.loops and each[i] > 1 and any(x.base == "LDGSTS" for x in block.instructions):
            members |= {k for k in block.loops[-1] if each[k] >= each[i] / 2}
    return members


def predict(start: Start, blocks: list[Block], lines: Lines, nbytes: int, constants: dict[str, float]) -> Prediction:
    grid = math.prod(start.grid)
    warps = start.block // 32 * -(-grid // MULTIPROCESSORS)
    each, mean = frequencies(blocks, lines, grid * start.block)
    copies = streaming(blocks, each)
    walk = Walk(constants)
    spent, copy, cold, executed, jumps, released = [0.0, 0.0], 0.0, 0, 0.0, 0, 0.0
    places = [0]
    for block in blocks:
        places.append(places[-1] + len(block.instructions) * gpu_sass.BYTES)
    fetched = 0
    # the last: one before it, where nothing may be read early, is jumped over in a step
    wait = max((i for i, block in enumerate(blocks) if any(x.base == GRID_WAIT for x in block.instructions)), default=0)
    cold_block = constants["cold_line"] / (128 / gpu_sass.BYTES)
    for i, block in enumerate(blocks):
        if each[i] == 0.0:
            continue
        count = len(block.instructions)
        cold += count * gpu_sass.BYTES
        issued = count * mean[i] * warps / SCHEDULERS
        executed += count * mean[i] * warps
        began = walk.now
        walk.run(block, 1.0)
        stalls = sum(x.stall for x in block.instructions)
        first = walk.now - began - stalls + max(stalls, count * cold_block)
        if places[i] > fetched + FETCHED_AHEAD:
            jumps += 1
            first += constants["cold_jump"]
        fetched = places[i + 1]
        more = 0.0
        if each[i] > 1:
            again = walk.now
            walk.run(block, each[i] - 1)
            more = (each[i] - 1) * (walk.now - again)
        cycles = max(first + more, issued)
        if i in copies:
            copy += more
            cycles -= more
        spent[i >= wait] += cycles
        if any(x.base == GRID_LAUNCH for x in block.instructions):
            released = sum(spent)
    us, roofline = {}, {}
    for device in DEVICES:
        roofline[device.name] = 1e6 * nbytes / device.read
        us[device.name] = spent[1] / device.mhz + max(copy / device.mhz, roofline[device.name] if copies else 0.0)
    code = sum(len(x.instructions) for x in blocks)
    whole = {name: round(x) for name, x in walk.trips.items()}
    return Prediction(
        start.kernel, code, code * gpu_sass.BYTES, cold, jumps, round(executed),
        {k: round(x) for k, x in walk.barriers.items()}, whole,
        round(spent[0]), round(spent[1] + copy), round(released), round(copy), nbytes, us, roofline,
    )


def in_a_row(starts: Sequence[Start], predictions: Sequence[Prediction], constants: dict[str, float]) -> list[Prediction]:
    """Predictions whose ``us`` are of the step: what each launch adds to the end of the one in front. Of the first one what
    comes before its wait is done by then, as in a stream of steps."""
    us: list[dict[str, float]] = [{} for _ in predictions]
    for device in DEVICES:
        end, released = 0.0, -math.inf
        for start, x, to in zip(starts, predictions, us, strict=True):
            launch = constants["launch_us" if start.dependent else "launch_plain_us"]
            ready = end + launch
            if start.dependent and released > -math.inf:
                ready = max(ready, released + launch + x.before / device.mhz)
            released = ready + (x.released - x.before) / device.mhz if x.released else ready + x.us[device.name]
            to[device.name] = ready + x.us[device.name] - end
            end = ready + x.us[device.name]
    return [replace(x, us=of) for x, of in zip(predictions, us, strict=True)]


@cache
def machine_code(file: str, kernel: str, macros: tuple[tuple[str, int], ...], arch: str) -> list[Block]:
    return gpu_sass.kernel_blocks(file, kernel, dict(macros), arch)


@cache
def counter() -> CountingRuntime:
    return CountingRuntime(MULTIPROCESSORS)


def counted_step(size: Size) -> list[tuple[Start, Lines, int]]:
    """The launches of a step, how often their lines run, and the bytes of memory that each moves."""
    runtime = counter()
    seen: list[tuple[Start, Lines]] = []

    def around(start: Start, go: Any) -> None:
        seen.append((start, runtime.lines(start.file, start.kernel, start.macros, go)))

    scene = Scene(Watched(runtime, around), size, drawn=False)
    scene.step()
    heads, listed = size.batch * size.kv_heads, int(scene.plan.packed.selected.counts.sum())
    router = scene.routing.router
    weights = sum(getattr(router, x).nbytes for x in ("hidden", "bias_hidden", "out", "bias_out"))
    tables = 4 * heads * len(size.layout.segments(size.tokens)) * (size.nlist + 1)
    moved = {
        "saap_append": 2 * heads * size.row_bytes,
        "saap_route": weights,
        "saap_select": tables + 4 * listed,
        "saap_route_select": weights + tables + 4 * listed,
        "saap_scan": scene.rows_read() * size.row_bytes + 4 * listed,
    }
    return [(start, lines, moved[start.kernel]) for start, lines in seen]


def step(size: Size) -> list[tuple[Start, Lines, int]]:
    """`counted_step`; of a size that would take minutes, by two with fewer rows: counts grow evenly with them."""
    rows = size.share * size.tokens * size.batch * size.kv_heads
    if rows <= 2 * FEW_ROWS:
        return counted_step(size)
    parts = FEW_ROWS / rows, 2 * FEW_ROWS / rows
    few, more = (counted_step(replace(size, share=size.share * x)) for x in parts)
    beyond = (1.0 - parts[1]) / (parts[1] - parts[0])

    def extended(a: int, b: int) -> int:
        return max(0, round(b + (b - a) * beyond))

    return [
        (start, {line: extended(a.get(line, 0), n) for line, n in b.items()}, extended(x, y))
        for (_, a, x), (start, b, y) in zip(few, more, strict=True)
    ]


def model(size: Size, constants: dict[str, float], arch: str = "sm_90") -> list[Prediction]:
    starts, predictions = [], []
    for start, lines, nbytes in step(size):
        blocks = machine_code(start.file, start.kernel, tuple(sorted(start.macros.items())), arch)
        starts.append(start)
        predictions.append(predict(start, blocks, lines, nbytes, constants))
    return in_a_row(starts, predictions, constants)


# -- on record


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
        for tokens, batch in SIZES:
            starts |= {label(x, arch): (x, arch) for x in launches(Size(tokens, batch), arch)}
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
    for tokens, batch in (SMALL, *SIZES):
        steps[f"{tokens // 1024}k x {batch}"] = predicted(model(Size(tokens, batch), constants))
        print(f"{tokens // 1024}k x {batch}: counted", file=sys.stderr, flush=True)
    return {"nvrtc": list(gpu_nvrtc.version()), "sources": files, "constants": constants, "code": codes, "steps": steps}


def dumps(tables: dict[str, Any]) -> str:
    """A line for each kernel, so that a diff names it."""
    parts = [f'"{name}": {json.dumps(tables[name])}' for name in ("nvrtc", "sources", "constants")]
    parts.append('"code": {\n' + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in tables["code"].items()) + "\n}")
    steps = []
    for size, kernels in tables["steps"].items():
        lines = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in kernels.items())
        steps.append(f"  {json.dumps(size)}: {{\n{lines}\n  }}")
    parts.append('"steps": {\n' + ",\n".join(steps) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def recorded_table(folder: Path | None) -> str:
    """The predictions on record beside a measurement, without a compiler or a disassembler."""
    of = json.loads(RECORD.read_text())["steps"]
    rows, on = [], 0
    if folder is not None and (folder / "environment.json").exists():
        gpu = json.loads((folder / "environment.json").read_text())["gpu"]
        on = next((i for i, x in enumerate(DEVICES) if x.name in gpu), 0)
    for tokens, batch in SIZES:
        name = f"{tokens // 1024}k x {batch}"
        whole, kernels = measured_step(folder, Size(tokens, batch))
        total = [0.0, 0.0]
        for kernel, x in of[name].items():
            us = [x[f"{d.name}_us"] for d in DEVICES]
            total = [a + b for a, b in zip(total, us, strict=True)]
            seen = f"({kernels[kernel]:.1f})" if kernel in kernels else "-"
            rows.append([f"{name}  {kernel}", *(f"{u:.1f}" for u in us), f"{1e6 * x['nbytes'] / DEVICES[on].read:.1f}", seen, ""])
        off = f"{total[on] / whole - 1:+.0%}" if whole else ""
        rows.append([f"{name}  step", *(f"{u:.1f}" for u in total), "", f"{whole:.1f}" if whole else "-", off])
    head = ["tokens x batch, launch", *(f"{d.name} us" for d in DEVICES), "bytes alone", "measured", f"off on {DEVICES[on].name}"]
    return harness.rows(head, rows)


# -- beside what was measured


def measured_step(folder: Path | None, size: Size) -> tuple[float | None, dict[str, float]]:
    """Microseconds of a step in a graph, and of each kernel by the profiler, where a session measured them. A kernel's time there
    starts when its blocks do, and under dependent launch they wait for the kernel in front."""
    if folder is None or not (folder / "gpu_step.json").exists():
        return None, {}
    of = json.loads((folder / "gpu_step.json").read_text())
    name = f"ours step {size.share:.0%}"
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


def table(results: dict[str, list[Prediction]], measured: dict[str, tuple[float | None, dict[str, float]]]) -> str:
    head = ["tokens x batch, launch", "code", "cold", "jumps", "warp instr.", "barriers", "trips", "wait", "cycles"]
    head += [f"{x.name} us" for x in DEVICES] + ["bytes alone", "measured", "off"]
    rows = []
    for name, predictions in results.items():
        whole, kernels = measured[name]
        for x in predictions:
            barriers = "+".join(str(x.barriers.get(k, 0)) for k in ("block_barrier", "cluster_barrier"))
            cells = [f"{name}  {x.kernel}", str(x.code_bytes), str(x.cold_bytes), str(x.jumps), str(x.executed), barriers]
            cells += [str(sum(x.trips.values())), str(x.before), str(x.after), *(f"{x.us[d.name]:.1f}" for d in DEVICES)]
            cells += [f"{x.roofline[DEVICES[0].name]:.1f}"]
            rows.append([*cells, f"({kernels[x.kernel]:.1f})" if x.kernel in kernels else "-", ""])
        total = [sum(x.us[d.name] for x in predictions) for d in DEVICES]
        sums = (str(sum(getattr(x, of) for x in predictions)) for of in ("code_bytes", "cold_bytes", "jumps", "executed"))
        cells = [f"{name}  step", *sums]
        cells += ["", "", "", str(sum(x.after for x in predictions)), *(f"{x:.1f}" for x in total)]
        cells += [f"{sum(x.roofline[DEVICES[0].name] for x in predictions):.1f}"]
        rows.append([*cells, f"{whole:.1f}" if whole else "-", f"{total[0] / whole - 1:+.0%}" if whole else ""])
    return harness.rows(head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help="tokens x batch, such as 131072x1,131072x8")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="folder of a session on an H200")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--record", action="store_true", help="write tests/step_model.json again")
    parser.add_argument("--recorded", action="store_true", help="predictions from there; needs no compiler and no disassembler")
    options = parser.parse_args()
    if options.record:
        RECORD.write_text(dumps(record(json.loads(RECORD.read_text()) if RECORD.exists() else {})))
        return 0
    if options.recorded:
        print(recorded_table(options.measured))
        return 0
    sizes = [tuple(map(int, x.split("x"))) for x in options.sizes.split(",")] if options.sizes else SIZES
    constants = constants_of(options.measured)
    results, measured = {}, {}
    for tokens, batch in sizes:
        size = Size(tokens, batch)
        name = f"{tokens // 1024}k x {batch}"
        results[name], measured[name] = model(size, constants), measured_step(options.measured, size)
        print(f"{name}: counted", file=sys.stderr, flush=True)
    tables = {"constants": constants, "steps": {name: [asdict(x) for x in of] for name, of in results.items()}}
    harness.save(options.out, "gpu_model", tables, table(results, measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
