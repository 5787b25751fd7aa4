"""What a cubin says of itself: instructions, their stall cycles and scoreboards, blocks and loops, by the disassembler of the
wheel nvidia-cuda-nvdisasm. Knows machine code, no kernel.

Control bits of an instruction (Volta to Blackwell): Jia, Maggioni, Staiger, Scarpazza, "Dissecting the NVIDIA Volta GPU
Architecture via Microbenchmarking", 2018, section 2.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from saap_index.backends.cuda import nvrtc as gpu_nvrtc
from saap_index.errors import MissingDependencyError

BYTES = 16
"""Of an instruction."""

_TEXT = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
_CONTROL = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L\w+):")
_LINE = re.compile(r'^\s*//## File "([^"]+)", line (\d+)')
_TARGET = re.compile(r"`\((\.L\w+)\)")


Line = tuple[str, int]


@dataclass(frozen=True)
class Instruction:
    """stall : cycles until the next of its warp; writes, reads : scoreboards set until its result, its operands are done;
    waits : those it waits for; lines : of the source, file and number, innermost first, then where each was inlined; target :
    label it may jump to."""

    opcode: str
    predicated: bool
    stall: int
    writes: int | None
    reads: int | None
    waits: tuple[int, ...]
    lines: tuple[Line, ...]
    target: str | None

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]


@dataclass
class Block:
    """Instructions that run one after the other. follows : where it goes on, by number.
    loops : those that it is in, outermost first, each the numbers of its blocks. reached : whether a way leads to it, but for the
    ways of a warp whose lanes have parted at a shuffle or a vote, and for calls."""

    instructions: list[Instruction] = field(default_factory=list)
    follows: list[int] = field(default_factory=list)
    loops: list[frozenset[int]] = field(default_factory=list)
    reached: bool = False


@cache
def disassembler() -> Path:
    """Raises MissingDependencyError."""
    for wheel in ("nvidia-cuda-nvdisasm", "nvidia-cuda-nvdisasm-cu13"):
        try:
            files = importlib.metadata.files(wheel) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == "nvdisasm":
                return Path(str(file.locate()))
    raise MissingDependencyError("reading machine code needs nvdisasm: pip install 'nvidia-cuda-nvdisasm>=13,<14'")


def kernel_blocks(file: str, name: str, macros: dict[str, int], arch: str) -> list[Block]:
    """The blocks of the kernel ``name`` of ``cuda/<file>``, in the order of their addresses."""
    cubin, _ = gpu_nvrtc.compile_kernel(file, macros, arch, (*gpu_nvrtc.FLAGS, "-lineinfo"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as at:
        at.write(cubin)
        at.flush()
        run = [str(disassembler()), "-c", "-hex", "-gi", at.name]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    section = re.search(rf"\n\.text\.{name}:\n(.*?)(?=\n//-----|\Z)", text, re.DOTALL)
    if section is None:
        raise ValueError(f"{file} for {arch}: expected a kernel {name}")
    return blocks(section.group(1))


def blocks(text: str) -> list[Block]:
    """The blocks of one disassembled function, without the padding behind it. Loops are found by jumps back."""
    blocks: list[Block] = [Block()]
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    at_lines: list[Line] = []
    fresh = True
    rows = text.splitlines()
    for i, row in enumerate(rows):
        if label := _LABEL.match(row):
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label.group(1)] = len(blocks) - 1
        elif line := _LINE.match(row):
            at_lines = [] if fresh else at_lines
            at_lines.append((Path(line.group(1)).name, int(line.group(2))))
            fresh = False
        elif words := _TEXT.match(row):
            control = _CONTROL.match(rows[i + 1])
            assert control is not None, row
            one = _instruction(words.group(2), int(control.group(1), 16) >> 41, tuple(at_lines))
            fresh = True
            blocks[-1].instructions.append(one)
            if one.base in ("BRA", "EXIT", "RET", "CALL", "BRX", "JMP"):
                if one.target is not None:
                    jumps.append((len(blocks) - 1, one.target))
                blocks.append(Block())
    while blocks and all(x.base in ("NOP", "BRA") for x in blocks[-1].instructions):
        blocks.pop()  # a jump to itself and what fills the line of the cache
    for at, block in enumerate(blocks):
        last = block.instructions[-1]
        ends = last.base in ("BRA", "EXIT", "RET", "BRX", "JMP") and not last.opcode.startswith("BRA.DIV")
        if at + 1 < len(blocks) and (last.predicated or not ends):
            block.follows.append(at + 1)
    for at, target in jumps:
        if at < len(blocks) and labels.get(target, len(blocks)) < len(blocks):
            blocks[at].follows.append(labels[target])
    todo = [0]
    while todo:
        at = todo.pop()
        if not blocks[at].reached:
            blocks[at].reached = True
            todo += blocks[at].follows
    for loop in sorted(_loops(blocks), key=len, reverse=True):
        for i in loop:
            blocks[i].loops.append(loop)
    return blocks


def _loops(blocks: list[Block]) -> list[frozenset[int]]:
    """Natural loops: of a jump back to a block that all ways to the jump pass. Those of one head are one."""
    before: list[list[int]] = [[] for _ in blocks]
    for i, block in enumerate(blocks):
        for k in block.follows:
            before[k].append(i)
    every = (1 << len(blocks)) - 1
    over = [1] + [every] * (len(blocks) - 1)  # bit k of over[i]: all ways to block i pass block k
    changed = True
    while changed:
        changed = False
        for i in range(1, len(blocks)):
            ways = every  # of what nothing leads to, code that is called: it takes no part
            for k in before[i]:
                ways &= over[k]
            ways |= 1 << i
            if ways != over[i]:
                over[i], changed = ways, True
    bodies: dict[int, set[int]] = {}
    for i, block in enumerate(blocks):
        for head in block.follows:
            if over[i] >> head & 1:
                body = bodies.setdefault(head, {head})
                todo = [i]
                while todo:
                    at = todo.pop()
                    if at not in body:
                        body.add(at)
                        todo += before[at]
    return [frozenset(x) for x in bodies.values()]


def _instruction(words: str, control: int, lines: tuple[Line, ...]) -> Instruction:
    parts = words.split()
    predicated = parts[0].startswith("@")
    conditional = predicated or (parts[0].startswith("BRA") and "," in words)  # of a uniform predicate
    target = _TARGET.search(words) if parts[predicated].startswith("BRA") and "DIV" not in parts[predicated] else None
    writes, reads = control >> 5 & 7, control >> 8 & 7
    return Instruction(
        parts[predicated].rstrip(","), conditional, max(1, control & 15), None if writes == 7 else writes,
        None if reads == 7 else reads, tuple(i for i in range(6) if control >> 11 >> i & 1), lines,
        target.group(1) if target else None,
    )


def unrolled(block: Block) -> int:
    """How many times the source of a loop of one block stands in it, as far as repeated operations tell: 1, 2 or 4."""
    groups = Counter((x.lines[:1], x.opcode) for x in block.instructions)
    for copies in (4, 2):
        alike = sum(n for n in groups.values() if n % copies == 0)
        if alike >= 0.6 * len(block.instructions):
            return copies
    return 1
