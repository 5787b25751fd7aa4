"""What the sequences of a batch are known to have in common, so that one becomes another without copying all of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .layout import Arrangement, Merging, Segment


def common_prefix(a: Sequence[Segment], b: Sequence[Segment]) -> int:
    """Leading segments that are the same."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def before_merge(n: int, merging: Merging | None) -> int:
    """The most of the ``n`` leading segments that end where no merge is under way: its rows lie across its segments."""
    return merging.first if merging is not None and merging.first < n < merging.stop else n


def common_segments(a: Arrangement, b: Arrangement) -> int:
    """Leading segments that are the same, and merged for the same KV heads."""
    n = common_prefix(a.segments, b.segments)
    if a.merging == b.merging:
        return before_merge(n, a.merging)
    return min([n, *(x.first for x in (a.merging, b.merging) if x is not None)])


def diverged(common: np.ndarray, i: int, length: int) -> np.ndarray:
    """Leading tokens in common, int64 (b, b), where sequence i may differ from every other from token ``length`` on."""
    common = common.copy()
    common[i] = common[:, i] = np.minimum(common[i], length)
    return common


def picked(common: np.ndarray, lengths: Sequence[int], sequences: Sequence[int]) -> np.ndarray:
    """Leading tokens in common, where sequence i is a copy of what was sequences[i], of these lengths."""
    chosen, own = np.asarray(sequences), np.array([lengths[i] for i in sequences])
    same: np.ndarray = np.where(chosen[:, None] == chosen, own, common[np.ix_(chosen, chosen)])
    return same
