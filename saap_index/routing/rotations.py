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
