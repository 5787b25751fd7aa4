"""Angles that undo RoPE for the queries of a batch and for its rows, and the lengths that they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .. import checks
from ..backends import Rotation
from ..errors import LengthError
from ..invlists.segmented import SegmentedInvertedLists
from .rope import Rope


def query_rotation(rope: Rope, lists: SegmentedInvertedLists, q: int) -> Rotation:
    """Angles of the last q positions of every sequence, (b * q, r / 2)."""
    ends, device = [lists.next_position(i) for i in range(lists.batch)], lists.keys.device
    if not rope.is_dynamic:
        return rope.frequencies(device).before(ends, q)
    parts = []
    for i, (end, n) in enumerate(zip(ends, lists.lengths, strict=True)):  # a query was rotated in the call that brought its token
        each = lists.rotated.at(i, max(0, n - q), n) if n else np.zeros(1, np.int64)
        length: Any = int(each[0]) if (each == each[0]).all() else np.pad(each, (q - len(each), 0), mode="edge")
        parts.append(rope.rotation(range(max(0, end - q), max(q, end)), length, device=device))
    if len(parts) == 1:
        return parts[0]
    cos, sin = torch.cat([p.cos for p in parts]), torch.cat([p.sin for p in parts])
    return Rotation(cos, sin, parts[0].interleaved, parts[0].scale)


def row_rotation(rope: Rope, lists: SegmentedInvertedLists, i: int, start: int, stop: int) -> Rotation:
    """Angles of recent rows of sequence i, (stop - start, r / 2)."""
    positions, device = lists.positions(i, np.arange(start, stop)), lists.keys.device
    if not rope.is_dynamic:
        return rope.frequencies(device).at(positions)
    return rope.rotation(positions, lists.rotated.at(i, start, stop), device=device)


def rotation_lengths(
    rope: Rope | None, lists: SegmentedInvertedLists | None, counts: Sequence[int], seq_len: int | Sequence[int] | None
) -> list[int] | None:
    """The length that the angles of counts[i] tokens, new behind those of ``lists``, belong to; None if they depend on none.

    seq_len : as in `AsymmetricIndex.add`.
    """
    if seq_len is not None:
        lengths = checks.counts(seq_len, len(counts), 2**31 - 1, "seq_len")
    if rope is None or not rope.is_dynamic:
        return None
    if seq_len is None:
        starts = [0] * len(counts)
        if lists is not None and any(lists.lengths):
            starts = [lists.next_position(i) for i in range(lists.batch)]
        lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    return [rope.effective_length(n) for n in lengths]


def note_rotation(rope: Rope | None, lists: SegmentedInvertedLists, n: int, seq_len: int) -> None:
    """Correct the length at which the n newest tokens of every sequence were rotated; LengthError if one of them is sealed."""
    for i, length in enumerate(lists.lengths):
        if not 0 <= n <= length - lists.sealed(i):
            raise LengthError(f"n: expected at most {length - lists.sealed(i)} tokens that are not sealed, got {n}")
    if n and rope is not None:
        for i, length in enumerate(lists.lengths):
            lists.rotated.append(i, length - n, rope.effective_length(seq_len))
