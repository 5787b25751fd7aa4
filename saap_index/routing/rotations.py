"""Angles that undo RoPE for the queries of a batch and for its rows. Knows positions and lengths, not what is rotated."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..backends import Rotation
from ..invlists.segmented import SegmentedInvertedLists
from .rope import Rope


def query_rotation(rope: Rope, lists: SegmentedInvertedLists, q: int) -> Rotation:
    """Angles of the last q positions of every sequence, (b * q, r / 2)."""
    ends = [lists.next_position(i) for i in range(lists.batch)]
    lengths: list[Any] = [None] * lists.batch
    if rope.is_dynamic:  # a query was rotated in the call that brought its token
        for i, n in enumerate(lists.lengths):
            each = lists.rotated.at(i, max(0, n - q), n) if n else np.zeros(1, np.int64)
            lengths[i] = int(each[0]) if (each == each[0]).all() else np.pad(each, (q - len(each), 0), mode="edge")
    turns = [(range(max(0, end - q), max(q, end)), length) for end, length in zip(ends, lengths, strict=True)]
    device = lists.keys.device
    parts = [rope.rotation(*turn, device=device) for turn in turns]
    if len(parts) == 1:
        return parts[0]
    cos, sin = torch.cat([p.cos for p in parts]), torch.cat([p.sin for p in parts])
    return Rotation(cos, sin, parts[0].interleaved, parts[0].scale)


def row_rotation(rope: Rope, lists: SegmentedInvertedLists, i: int, start: int, stop: int) -> Rotation:
    """Angles of recent rows of sequence i, (stop - start, r / 2)."""
    lengths = lists.rotated.at(i, start, stop) if rope.is_dynamic else None
    return rope.rotation(lists.positions(i, np.arange(start, stop)), lengths, device=lists.keys.device)
