"""Steps of decoding and seals as launches: how often the lines of each run on the emulated device, what bytes it moves, and what
the model of gpu_walk.py makes of it. Knows which sizes are on record.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

import gpu_sass
from gpu_coverage import CountingRuntime, Lines
from gpu_sass import Block
from gpu_scene import Scene, Size, Start, Watched
from gpu_walk import MULTIPROCESSORS, Prediction, in_a_row, predict
from saap_index.backends import STORAGE_CODES, SegmentChange

SIZES = ((131072, 1), (131072, 8), (524288, 1), (524288, 8))
SMALL = (8192, 1)
"""On record too, for a test: counted in seconds."""

FEW_ROWS = 50_000
"""That many, of all heads, are counted in seconds."""

STORED = ((131072, 1, "SQ8"), (131072, 1, "SQ8/SQ4"))
"""On record, of rows that are codes."""

SEAL_COPIES = 3
"""Of a seal, to the device and back, each as long as a launch: its numbers, those that are published, and what is watched."""


def size_name(tokens: int, batch: int, storage: str = "") -> str:
    return f"{tokens // 1024}k x {batch}" + (f" {storage}" if storage else "")


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
    heads, listed, near = size.batch * size.kv_heads, scene.rows_listed(), scene.rows_near()
    router = scene.routing.router
    weights = sum(getattr(router, x).nbytes for x in ("hidden", "bias_hidden", "out", "bias_out"))
    tables = 4 * heads * len(size.layout.segments(size.tokens)) * (size.nlist + 1)
    moved = {
        "saap_append": 2 * heads * size.row_bytes,
        "saap_route": weights,
        "saap_select": tables + 4 * listed,
        "saap_route_select": weights + tables + 4 * listed,
        "saap_scan": (near if size.storage else near + listed) * size.row_bytes + 4 * listed,
    }
    if size.storage:
        row = sum(STORAGE_CODES[size.storage].sizes(size.d, size.d))
        moved |= {"saap_scan_codes": listed * row, "saap_join_codes": heads * size.group * size.d * 10}
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


def counted_change(size: Size, change: SegmentChange) -> list[tuple[Start, Lines, int]]:
    """The launches of a change of segments, of a batch of one, as `counted_step`."""
    runtime = counter()
    seen: list[tuple[Start, Lines]] = []

    def around(start: Start, go: Any) -> None:
        seen.append((start, runtime.lines(start.file, start.kernel, start.macros, go)))

    Scene(Watched(runtime, around), size, drawn=False).change(lambda i: change)
    rows, fresh = change.rows_moved(size.kv_heads), size.kv_heads * len(change.positions)
    centroids = size.kv_heads * size.nlist * size.d * 4
    moved = {"saap_assign": fresh * size.row_bytes // 2 + centroids, "saap_permute": 2 * rows * size.row_bytes}
    return [(start, lines, moved.get(start.kernel, 4 * rows)) for start, lines in seen]


def changes_ahead(size: Size) -> tuple[list[SegmentChange], int]:
    """What becomes of the segments of a sequence of that size over the next blocks, as many as the longest merge takes; and how
    many tokens that takes."""
    layout, heads, length = size.layout, size.kv_heads, size.tokens
    changes, now = [], layout.arrangement(length, heads)
    blocks = max(1, layout.max_segment // layout.block)
    end = length + blocks * layout.block
    while (length := layout.next_change(length, heads)) <= end:
        want = layout.arrangement(length, heads)
        sealed = now.segments[-1][1]
        first = next((i for i, (a, b) in enumerate(zip(now.segments, want.segments, strict=False)) if a != b), len(now.segments))
        merging = want.merging if want.segments == now.segments else None
        positions = np.arange(sealed, max(sealed, want.segments[-1][1]))
        first = first if merging is None else merging.first
        changes.append(SegmentChange(0, first, now.segments, want.segments, positions, 0, now.merging, merging))
        now = want
    return changes, blocks * layout.block


def sealing(size: Size, constants: dict[str, float]) -> dict[str, Any]:
    """What seals and merges take a token and layer, of a batch of one: a block and an average merge, each so often as they come.

    us : by device, all of it; in_step : of that what the stream of the steps waits for, rows on their way back and what is
    published; the rest runs beside it."""
    changes, tokens = changes_ahead(size)
    seals = [c for c in changes if len(c.positions)]
    merges = sorted((c for c in changes if not len(c.positions)), key=lambda c: c.rows_moved(size.kv_heads))
    total: dict[str, float] = {}
    behind: dict[str, float] = {}
    for kind in (seals, merges):
        if not kind:
            continue
        starts, predictions = [], []
        for start, lines, nbytes in counted_change(size, kind[len(kind) // 2]):
            blocks = machine_code(start.file, start.kernel, tuple(sorted(start.macros.items())), "sm_90")
            starts.append(start)
            predictions.append(predict(start, blocks, lines, nbytes, constants))
        again = max(i for i, start in enumerate(starts) if start.kernel == "saap_permute")
        for i, x in enumerate(in_a_row(starts, predictions, constants)):
            for name, us in x.us.items():
                total[name] = total.get(name, 0.0) + len(kind) * us
                behind[name] = behind.get(name, 0.0) + len(kind) * us * (i >= again)
        for name in total:
            total[name] += len(kind) * SEAL_COPIES * constants["launch_plain_us"]
            behind[name] += len(kind) * (SEAL_COPIES - 1) * constants["launch_plain_us"]
    of: dict[str, float] = {"seals": len(seals), "merges": len(merges), "tokens": tokens}
    of |= {f"{name}_us": round(us / tokens, 3) for name, us in total.items()}
    return of | {f"{name}_in_step_us": round(us / tokens, 3) for name, us in behind.items()}


def model(size: Size, constants: dict[str, float], arch: str = "sm_90") -> list[Prediction]:
    starts, predictions = [], []
    for start, lines, nbytes in step(size):
        blocks = machine_code(start.file, start.kernel, tuple(sorted(start.macros.items())), arch)
        starts.append(start)
        predictions.append(predict(start, blocks, lines, nbytes, constants))
    return in_a_row(starts, predictions, constants)
