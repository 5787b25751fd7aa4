"""Lists of recent rows, assigned ahead of their seal, so that a seal only moves rows. Knows numbers of tokens and lists, no keys.

To assign a block takes longer than to move it. Its tokens are older than the window when it is sealed, so they are assigned a few
at a time before. What is assigned ahead is no part of the state of an index: it follows from the keys alone and may be dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

AHEAD_ROWS = 24
"""Rows of a sequence that are assigned together, at most: a multiple of what the kernels multiply at once (`kRows`)."""

AHEAD_TOKENS = 8
"""Tokens from one time to the next."""


class Ahead(NamedTuple):
    """lists : int32 (h, n), list numbers of the rows from ``first`` on. Not written to once it is made."""

    first: int
    lists: Tensor

    @property
    def stop(self) -> int:
        return self.first + self.lists.shape[1]

    def part(self, start: int, stop: int) -> list[Tensor]:
        """List numbers of the leading rows of [start, stop) that are known: int32 (h, n), or none."""
        return [self.lists[:, start - self.first : stop - self.first]] if self.first <= start < self.stop else []

    def up_to(self, length: int) -> Ahead | None:
        """The same of a sequence of which ``length`` rows are left."""
        return None if length <= self.first else Ahead(self.first, self.lists[:, : length - self.first])

    def behind(self, row: int) -> Ahead | None:
        """The same without those before ``row``, which are sealed."""
        return None if row >= self.stop else Ahead(row, self.lists[:, row - self.first :]) if row > self.first else self

    def followed_by(self, lists: Tensor) -> Ahead:
        return Ahead(self.first, torch.cat([self.lists, lists], 1))


def next_time(sealed_at: int, assigned: int, stop: int) -> int:
    """With how many tokens the next rows are due to be assigned, of those from ``assigned`` to ``stop``, which are sealed with
    ``sealed_at`` tokens; ``sealed_at`` if none are due before."""
    left = stop - assigned
    if left <= 0:
        return sealed_at
    at = sealed_at - AHEAD_TOKENS * -(-left // AHEAD_ROWS)
    return min(sealed_at, max(at, assigned + min(left, AHEAD_ROWS)))


def due_rows(length: int, sealed_at: int, assigned: int, stop: int) -> tuple[int, int]:
    """Past which row lists are to be assigned with ``length`` tokens, ``assigned`` or more, and the `next_time` after that; other
    arguments as above."""
    again = next_time(sealed_at, assigned, stop)
    if length < again:
        return assigned, again
    wait = AHEAD_ROWS * (-(-(sealed_at - length) // AHEAD_TOKENS) - 1)
    until = max(assigned, min(length, stop - max(0, wait)))
    return until, next_time(sealed_at, until, stop)
