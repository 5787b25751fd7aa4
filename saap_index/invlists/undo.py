"""What takes back a change of inverted lists that failed. Knows rows and tables, not the change."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..backends import Arena, Backend, SegmentChange
from .arena import Step, empty


class UndoLog:
    """Steps that put the tokens of an arena back into their rows, kept while a change is under way.

    depth : changes under way, one within the other; with 0 nothing is noted. steps : of the outermost one, newest last.
    """

    __slots__ = ("backend", "depth", "steps")

    def __init__(self, backend: Backend) -> None:
        self.backend, self.depth = backend, 0
        self.steps: list[Step] = []

    def note(self, *steps: Step) -> None:
        if self.depth:
            self.steps += steps

    def undo(self, arena: Arena) -> bool:
        """Take everything back in ``arena``, which is the memory of before the change; returns whether there was something."""
        for step in reversed(self.steps):
            step(arena)
        return bool(self.steps)

    def before_move(self, arena: Arena, i: int, rows: slice, heads: slice = slice(None)) -> None:
        """These rows of sequence i are about to change places, of these KV heads: note what they are."""
        if self.depth:
            ids = arena.ids[i, heads, rows].clone()
            self.note(partial(_put_rows_back, self.backend, arena.keys, i, heads, rows.start, ids))

    def before_tables(self, arena: Arena, i: int, tables: slice) -> None:
        """These tables of sequence i are about to be others: note what they are."""
        if self.depth and tables.start < tables.stop:
            self.note(partial(_put_tables_back, i, tables.start, arena.tables[i, :, tables].clone()))

    def before_changes(self, arena: Arena, changes: Sequence[SegmentChange]) -> list[Step]:
        """What takes these changes back once they are done; the ids of rows that were not sealed before are theirs to write.

        As many operations on the device whatever the number of changes.
        """
        if not self.depth:
            return []
        starts = [c.want[c.first][0] for c in changes]
        ends = [c.want[-1][1] - len(c.positions) for c in changes]  # of the rows that were sealed
        low, first = min(starts), min(c.first for c in changes)
        ids = arena.ids[:, :, low : max(ends)].clone() if any(map(operator.lt, starts, ends)) else arena.ids[:, :, :0]
        tables = arena.tables[:, :, first : max(len(c.have) for c in changes)]
        tables = tables.clone() if any(c.first < len(c.have) for c in changes) else tables[:, :, :0]
        keys = arena.keys

        def restore(c: SegmentChange, start: int, end: int, arena: Arena) -> None:
            fresh = torch.from_numpy(c.positions).to(ids).expand(ids.shape[1], -1)
            before = torch.cat([ids[c.sequence, :, start - low : end - low], fresh], 1)
            _put_rows_back(self.backend, keys, c.sequence, slice(None), start, before, arena)
            _put_tables_back(c.sequence, c.first, tables[c.sequence, :, c.first - first : len(c.have) - first], arena)

        return [partial(restore, *what) for what in zip(changes, starts, ends, strict=True)]


def _put_rows_back(backend: Backend, keys: Tensor, i: int, heads: slice, start: int, ids: Tensor, arena: Arena) -> None:
    """Put the tokens of sequence i back into the rows from ``start`` on, of these KV heads.

    keys : the memory where they changed places. ids : int32 (h, n), of the tokens as they were; the same are there now, in
    another order.
    """
    count = ids.shape[1]
    now = arena.ids[i, heads, start : start + count]
    if arena.keys is keys and not torch.equal(now, ids):  # other memory was not there yet, and is gone
        places = ids.argsort(dim=1).gather(1, now.argsort(dim=1).argsort(dim=1))  # where the token of each row was
        scratch = empty(backend, (len(ids), count + 1), torch.int32)
        backend.seal(arena.keys[i, heads], arena.values[i, heads], arena.ids[i, heads], start, places.int(), scratch)


def _put_tables_back(i: int, first: int, tables: Tensor, arena: Arena) -> None:
    """Make these, int32 (h, s, l + 1), the tables of sequence i from ``first`` on."""
    arena.tables[i, :, first : first + tables.shape[1]] = tables
