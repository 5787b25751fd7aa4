"""Positions whose tokens were taken out of a sequence, as stretches: as many as there are, however long the stream was."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Gaps:
    """starts, stops : int64 (m,), positions [start, stop) of each gap, ascending, with a position that is there in between."""

    starts: Ints
    stops: Ints

    @classmethod
    def none(cls) -> Gaps:
        return cls(np.empty(0, np.int64), np.empty(0, np.int64))

    @classmethod
    def of(cls, positions: Ints) -> Gaps:
        """From the positions themselves, ascending, each once."""
        first = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
        last = np.append(first[1:], len(positions))[: len(first)] - 1
        return cls(positions[first], positions[last] + 1)

    @cached_property
    def count(self) -> int:
        """How many positions are missing."""
        return int((self.stops - self.starts).sum())

    @cached_property
    def _before(self) -> Ints:
        """(m + 1,) positions missing before each gap, and in all."""
        return np.concatenate([[0], np.cumsum(self.stops - self.starts)])

    @cached_property
    def _ranks(self) -> Ints:
        """(m,) tokens before each gap, ascending."""
        return self.starts - self._before[:-1]

    def positions(self, ranks: Ints) -> Ints:
        """Positions of the tokens with these ranks, 0 for the oldest that is there."""
        return ranks if not len(self.starts) else ranks + self._before[np.searchsorted(self._ranks, ranks, side="right")]

    def with_more(self, positions: Ints) -> Gaps:
        """With these missing too: ascending, each once, none of them missing yet."""
        more = Gaps.of(positions)
        return _joined(np.concatenate([self.starts, more.starts]), np.concatenate([self.stops, more.stops]))

    def closed_up(self, positions: Ints) -> Gaps:
        """As if tokens at these positions, ascending and none of them missing, had never been: what is behind moves up."""
        moved = np.searchsorted(positions, self.starts)
        return _joined(self.starts - moved, self.stops - moved)

    def up_to(self, position: int) -> Gaps:
        """The gaps before a position that is there (-1: none)."""
        count = int(np.searchsorted(self.starts, position))
        return self if count == len(self.starts) else Gaps(self.starts[:count], self.stops[:count])

    def array(self) -> Ints:
        """int64 (m, 2), to be saved."""
        return np.stack([self.starts, self.stops], 1)

    @classmethod
    def of_array(cls, array: Ints) -> Gaps:
        """From `array`. ValueError if these are no gaps."""
        flat = array.reshape(-1)
        if array.ndim != 2 or array.shape[1] != 2 or (len(flat) and (flat[0] < 0 or (np.diff(flat) <= 0).any())):
            raise ValueError("gaps: expected rising positions (m, 2), got others")
        return cls(array[:, 0].copy(), array[:, 1].copy())


def _joined(starts: Ints, stops: Ints) -> Gaps:
    """Gaps that touch become one."""
    if not len(starts):
        return Gaps.none()
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], stops[order]
    apart = starts[1:] > stops[:-1]
    return Gaps(starts[np.append(True, apart)], stops[np.append(apart, True)])
