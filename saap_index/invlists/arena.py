"""The memory of a batch, a `backends.Arena`: made, moved, copied and counted. Knows rows, not what lies in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import Arena, Backend, StorageCode
from .layout import Segment

ROW_ARRAYS = ("keys", "values", "ids", "pending")
PLAIN_ARRAYS = ("plain_keys", "plain_values")
MEAN_ARRAYS = ("mean_keys", "mean_values")

Parts = dict[str, tuple[int, Tensor]]
"""Of one sequence, by the array in the arena: where a part begins along the third axis, and the part, (h, n, ...)."""

Step = Callable[[Arena], None]
"""Takes something back in an arena."""


def empty(backend: Backend, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory to be written to at any time, also if torch's inference mode is on now and off by then."""
    with torch.inference_mode(False):
        return backend.empty(shape, dtype)


def without_rows(
    backend: Backend, batch: int, heads: int, d: int, d_v: int, nlist: int, dtype: torch.dtype, code: StorageCode | None = None
) -> Arena:
    """An arena without room. code : of sealed rows, or None where they are numbers."""
    shapes: dict[str, tuple[int, ...]] = {"keys": (0, d), "values": (0, d_v), "ids": (0,), "tables": (0, nlist + 1)}
    shapes |= {"mean_keys": (0, nlist, d), "mean_values": (0, nlist, d_v)}
    dtypes = {**dict.fromkeys(shapes, dtype), "ids": torch.int32, "tables": torch.int32}
    if code is not None:
        shapes |= {"plain_keys": (0, d), "plain_values": (0, d_v)}
        dtypes |= dict.fromkeys(PLAIN_ARRAYS, dtype)
        for name, size in zip(("keys", "values"), code.sizes(d, d_v), strict=True):
            shapes[name], dtypes[name] = (0, size), torch.uint8
    arrays: dict[str, Any] = {name: empty(backend, (batch, heads, *shape), dtypes[name]) for name, shape in shapes.items()}
    return Arena(**arrays, pending=None)


def resized(
    backend: Backend, arena: Arena, *, rows: int | None = None, used: int = 0, tables: int | None = None, means: int | None = None
) -> Arena:
    """The same with room for other numbers of rows, tables and segments with means; None: what there is, where it lies.

    Keeps the first ``used`` rows, and as many tables and means as fit.
    """
    sizes = {**dict.fromkeys(ROW_ARRAYS, rows), "tables": tables, **dict.fromkeys(MEAN_ARRAYS, means)}
    arrays = {}
    for name, size in sizes.items():
        old = getattr(arena, name)
        if size is not None and old is not None:
            new = empty(backend, (*old.shape[:2], size, *old.shape[3:]), old.dtype)
            if name in ("pending", "ids"):  # ids for no other reason than that a later token must not wait for its pages
                new.fill_(-1)
            keep = min(size, used if name in ROW_ARRAYS else old.shape[2])
            new[:, :, :keep] = old[:, :, :keep]
            arrays[name] = new
    return replace(arena, **arrays)


def with_pending(backend: Backend, arena: Arena) -> Arena:
    """The same with memory for list numbers that come with the tokens, -1 everywhere."""
    if arena.pending is not None:
        return arena
    return replace(arena, pending=empty(backend, arena.ids.shape, torch.int32).fill_(-1))


def on_device(arena: Arena, device: torch.device) -> Arena:
    """A copy on another device."""
    return Arena(*(None if x is None else x.to(device) for x in vars(arena).values()))  # type: ignore[arg-type]


def nbytes(arena: Arena) -> int:
    """Bytes of every array."""
    return sum(x.nbytes for x in vars(arena).values() if x is not None)


def part(arena: Arena, i: int, rows: Segment, tables: Segment, means: Segment) -> Parts:
    """Of sequence i, rows, tables and means of segments [start, stop) each: views, not copies."""
    spans = {**dict.fromkeys(ROW_ARRAYS, rows), "tables": tables, **dict.fromkeys(MEAN_ARRAYS, means)}
    arrays = {name: getattr(arena, name) for name in spans}
    return {name: (start, arrays[name][i, :, start:stop]) for name, (start, stop) in spans.items() if arrays[name] is not None}


def write(arena: Arena, i: int, parts: Parts) -> None:
    """Make these parts those of sequence i."""
    for name, (start, x) in parts.items():
        getattr(arena, name)[i, :, start : start + x.shape[1]] = x


def compact(arena: Arena, i: int, ranks: np.ndarray, length: int, note: Callable[[Step], None]) -> None:
    """Move up what lies behind these rows of sequence i, which has ``length``, into their place.

    note : is told what takes that back, before a row is moved.
    """
    first = int(ranks[0])
    stay = np.ones(length - first, bool)
    stay[ranks - first] = False
    kept, gone = (torch.from_numpy(first + np.flatnonzero(x)).to(arena.ids.device) for x in (stay, ~stay))
    names = ("keys", "values") if arena.pending is None else ("keys", "values", "pending")
    target = slice(first, first + len(kept))
    moved, lost = ([getattr(arena, name)[i].index_select(1, rows) for name in names] for rows in (kept, gone))
    ids = arena.ids[i, :, first:length].clone()

    def restore(arena: Arena) -> None:
        arena.ids[i, :, first:length] = ids
        for name, rows in zip(names, lost, strict=True):
            x = getattr(arena, name)[i]
            x[:, kept] = x[:, target].clone()
            x[:, gone] = rows

    note(restore)
    for name, rows in zip(names, moved, strict=True):
        getattr(arena, name)[i, :, target] = rows
