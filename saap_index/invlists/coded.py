"""Rows of a batch whose sealed tokens are codes: which rows are, how they become so, and where the others lie meanwhile.

keys and values of the arena then hold codes, under the number of the row, and plain_keys and plain_values the rows that are no
codes: those before the coded ones, and behind them at once those after. A span [first, last) of each sequence says which are
coded; it is [0, 0) while none is. A row is coded when it is sealed and stays so, also where `truncate` makes it recent again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..backends import Arena, Backend, StorageCode
from .arena import empty
from .layout import Segment

NONE = (0, 0)

Part = Callable[[Tensor], Tensor]
"""Of plain rows (h, R, ...) of one sequence, those that stay, in order."""


def plain_row(span: Segment, row: int) -> int:
    """Where a row that is no code lies among the plain ones."""
    first, last = span
    return row if row < first else row - (last - first)


def plain_rows(lengths: Sequence[int], spans: Sequence[Segment]) -> list[int]:
    """How many rows of each sequence are plain."""
    return [length - (last - first) for length, (first, last) in zip(lengths, spans, strict=True)]


def truncated(span: Segment, length: int) -> Segment:
    first, last = span[0], min(span[1], length)
    return (first, last) if first < last else NONE


def without(span: Segment, ranks: np.ndarray) -> Segment:
    """The span of rows that are left when those with these numbers, ascending, are taken out."""
    first, last = (row - int(np.searchsorted(ranks, row)) for row in span)
    return (first, last) if first < last else NONE


def moved(backend: Backend, memory: Arena, parts: Sequence[Part], counts: Sequence[int], room: int) -> Arena:
    """The same with new memory for ``room`` plain rows, of which each sequence has those of its part, counts[i] of them."""
    assert memory.plain_keys is not None and memory.plain_values is not None
    fresh = []
    for old in (memory.plain_keys, memory.plain_values):
        new = empty(backend, (*old.shape[:2], room, old.shape[3]), old.dtype)
        for i, (part, count) in enumerate(zip(parts, counts, strict=True)):
            new[i, :, :count] = part(old[i])
        fresh.append(new)
    return replace(memory, plain_keys=fresh[0], plain_values=fresh[1])


def copied(backend: Backend, memory: Arena, source: Arena, counts: Sequence[int], sequences: Sequence[int]) -> Arena:
    """The same with the plain rows of ``source``: counts[i] of its sequences[i] as those of sequence i."""
    here, there = memory.numbers, source.numbers
    fresh = [empty(backend, (*x.shape[:2], max(counts, default=0), x.shape[3]), x.dtype) for x in here]
    for new, old in zip(fresh, there, strict=True):
        for to, (i, count) in enumerate(zip(sequences, counts, strict=True)):
            new[to, :, :count] = old[i, :, :count]
    return replace(memory, plain_keys=fresh[0], plain_values=fresh[1])


def leading(counts: Sequence[int]) -> list[Part]:
    """The first counts[i] plain rows of each sequence."""

    def part(count: int) -> Part:
        return lambda x: x[:, :count]

    return [part(count) for count in counts]


def sealed(
    backend: Backend, code: StorageCode, memory: Arena, lengths: Sequence[int], spans: Sequence[Segment],
    due: Mapping[int, Segment], spare: int,
) -> tuple[Arena, list[Segment]]:
    """Code the rows [start, stop) of the sequences in ``due`` that are not; those that stay plain move to new memory.

    Writes codes behind those of the sequence only. spare : plain rows to have room for besides.
    """
    assert memory.plain_keys is not None and memory.plain_values is not None
    new, parts, counts = list(spans), [], []
    for i, (start, stop) in due.items():
        first, last = spans[i]
        fresh = [(start, stop)] if first == last else [(start, first), (last, stop)]
        for low, high in fresh:
            if low < high:
                at = slice(plain_row(spans[i], low), plain_row(spans[i], low) + high - low)
                rows = memory.plain_keys[i, :, at], memory.plain_values[i, :, at]
                backend.encode(code, *rows, memory.keys[i, :, low:high], memory.values[i, :, low:high])
        new[i] = (start, stop) if first == last else (min(start, first), max(stop, last))
    for old, (first, last), length in zip(spans, new, lengths, strict=True):
        parts.append(_around(slice(first), slice(plain_row(old, last), plain_row(old, length))))
        counts.append(length - (last - first))
    return moved(backend, memory, parts, counts, max(counts) + spare), new


def _around(before: slice, behind: slice) -> Part:
    return lambda x: torch.cat([x[:, before], x[:, behind]], 1)


def removed(
    backend: Backend, memory: Arena, spans: Sequence[Segment], lengths: Sequence[int], i: int, ranks: np.ndarray
) -> Arena:
    """Take the plain ones of these rows of sequence i out."""
    first, last = spans[i]
    rows = np.setdiff1d(np.concatenate([np.arange(first), np.arange(last, lengths[i])]), ranks)
    at = torch.from_numpy(np.where(rows < first, rows, rows - (last - first))).to(memory.keys.device)
    counts = plain_rows(lengths, spans)
    parts = leading(counts)
    parts[i], counts[i] = lambda x: x.index_select(1, at), len(at)
    assert memory.plain_keys is not None
    return moved(backend, memory, parts, counts, memory.plain_keys.shape[2])
