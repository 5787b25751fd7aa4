"""How long a launch takes by its machine code and how often its lines run: one warp followed through the blocks that run. The
model of gpu_model.py, which says what is in it and what is not; knows no step and no record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gpu_sass
from gpu_coverage import Lines
from gpu_sass import Block
from gpu_scene import Start

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
