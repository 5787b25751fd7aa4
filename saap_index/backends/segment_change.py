"""What becomes of the segments of a sequence, as a backend that seals batches is told. Knows numbers of rows, no memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class SegmentChange:
    """What becomes of the segments of one sequence: ``have``, [start, stop) each, from number ``first`` on become ``want``.

    Every segment of the one lies within one of the other. positions : int64 (n,), of the rows that are sealed now for the first
    time, up to the last of ``want``. means : how many leading segments keep the means of their runs afterwards. merged, merging :
    (first, stop, heads), the segments of ``have`` and of ``want`` whose rows are sorted as those of one segment for the first
    ``heads`` KV heads, their tables cut at their bounds; or None.
    """

    sequence: int
    first: int
    have: Sequence[tuple[int, int]]
    want: Sequence[tuple[int, int]]
    positions: np.ndarray[Any, Any]
    means: int
    merged: tuple[int, int, int] | None = None
    merging: tuple[int, int, int] | None = None

    def rows_moved(self, heads: int) -> int:
        """Rows that change places, summed over ``heads`` KV heads; those that did not have to count as well."""
        stops, moved = [stop for _, stop in self.have], 0
        spans = [(start, stop, heads) for start, stop in self.want[self.first :] if (start, stop) not in self.have]
        if self.merging is not None:
            first, past, some = self.merging
            spans.append((self.want[first][0], self.want[past - 1][1], some))
        for start, stop, some in spans:
            old = bisect_right(stops, start), bisect_right(stops, stop)
            moved += (some - self.sorted_heads(*old)) * (stop - start)
        return moved

    def sorted_heads(self, first: int, stop: int) -> int:
        """For how many KV heads the rows of segments [first, stop) of ``have`` are sorted as those of one already."""
        return self.merged[2] if self.merged is not None and self.merged[:2] == (first, stop) else 0
