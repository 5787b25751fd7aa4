"""Seals that are begun beside the steps before them, so that at their token rows only move back. Knows changes of segments, not
how they are made.

A backend may sort rows into memory of its own while others read them where they lie. What is begun is no part of the state of an
index: it is of use if the change that comes is the one that was begun, and dropped if it is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from ..backends import SegmentChange
from ..backends.types import MAX_STEP_TOKENS

SPREAD_TOKENS = 32
"""Batches that are made one after the other, as those of the layers of a model are, begin each at another of so many tokens
before a change."""

_NUMBERS = itertools.count()


class SealsBeside:
    """The change of a batch that is begun, or none."""

    __slots__ = ("_begun", "_by", "lead")

    def __init__(self) -> None:
        self.lead = 1 + next(_NUMBERS) % SPREAD_TOKENS
        """How many tokens before a change it is begun."""
        self.drop()

    def drop(self) -> None:
        """Rows of before are about to be others."""
        self._by: tuple[Any, ...] = ()
        self._begun: Any = None

    def is_begun(self, version: int) -> bool:
        """Whether the change that follows lists of that version is begun already."""
        return bool(self._by) and self._by[0] == version

    def note(self, version: int, changes: Sequence[SegmentChange], quantizer: tuple[Any, ...], begun: Any) -> None:
        """``begun``, of these changes of lists of that version, may come to be of use; quantizer : what assigns rows."""
        self._by, self._begun = (version, [_key(c) for c in changes], *quantizer), begun

    def of(self, version: int, changes: Sequence[SegmentChange], quantizer: tuple[Any, ...]) -> Any:
        """What was begun of these changes, which are made now, or None."""
        by, begun = self._by, self._begun
        self.drop()
        same = len(by) == 2 + len(quantizer) and by[0] == version and all(map(_same, by[2:], quantizer))
        return begun if same and by[1] == [_key(c) for c in changes] else None


def rows_missing(changes: Sequence[SegmentChange], lengths: Sequence[int]) -> int:
    """How many tokens are to come before all rows of these changes are there; of those counted in ``lengths`` the last few, as
    many as a step may bring, may be yet to come."""
    return max(c.want[-1][1] + MAX_STEP_TOKENS - lengths[c.sequence] for c in changes)


def _key(c: SegmentChange) -> tuple[Any, ...]:
    return c.sequence, c.first, c.have, c.want, c.means, c.merged, c.merging


def _same(x: Any, y: Any) -> bool:
    return x is y
