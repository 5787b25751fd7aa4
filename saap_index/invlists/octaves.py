"""Segments of a sequence that is not sorted: octaves of distance from its end, anew in every step. Knows lengths, not tensors."""

from __future__ import annotations

import numpy as np

from .layout import MAX_QUERY_TOKENS


def octaves(length: int, sinks: int, window: int) -> list[int]:
    """Bounds of the segments of a sequence of ``length`` tokens, ascending; its first ``sinks`` tokens and its last ``window``, 8
    at least, are read anyway. Empty if there are no others.

    Going back from the window, each segment is as long as all that comes behind it, so that its distance is known to within a
    factor of two; the oldest is what is left, and joins its neighbour if it is less than half as long.
    """
    recent = max(window, MAX_QUERY_TOKENS)
    if length - recent <= sinks:
        return []
    found, behind = [length - recent], recent
    while length - 2 * behind > sinks:
        behind *= 2
        found.append(length - behind)
    if len(found) > 1 and 2 * (found[-1] - sinks) < found[-2] - found[-1]:
        found.pop()
    return [sinks, *reversed(found)]


def bounds_of(lengths: list[int], sinks: int, window: int) -> tuple[np.ndarray, list[int]]:
    """Bounds of several sequences, int32 (b, S + 1), and how many segments each has; a length of 0 has none."""
    each = [octaves(n, sinks, window) for n in lengths]
    found = np.zeros((len(lengths), max([len(x) for x in each], default=0) or 1), np.int32)
    for row, x in zip(found, each, strict=True):
        row[: len(x)] = x
        row[len(x) :] = x[-1] if x else 0
    return found, [max(0, len(x) - 1) for x in each]
