"""The inverted lists: one dense arena per batch of sequences, sorted by list inside segments. Knows rows, not routing.

Keys and values lie in arrival order, except that every segment is sorted by list number per KV head, with an offset table
beside it (backends/base.py has the picture in words). Log-structured: blocks leave the recent tokens, are sorted in place,
and merge with their neighbours as they age (layout.py). Axes as in backends/base.py.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..backends import Arena, Backend, Frequencies, SegmentChange
from ..errors import StateError
from .gaps import Gaps
from .layout import Layout, Segment
from .rotated import RotationLengths


class Assign(Protocol):
    """What says which lists rows in arrival order belong to."""

    def __call__(self, i: int, start: int, stop: int) -> Tensor:
        """List numbers of rows [start, stop) of sequence i: int32 (h, n)."""

    def by_position(self) -> tuple[Any, Frequencies | None] | None:
        """What a backend needs to find them itself: its quantizer, or None without one, and RoPE, if there is one; None if the
        angles depend on more than the position."""


_VERSIONS = itertools.count(1)  # one for all, so that no two batches share a number


class SegmentedInvertedLists:
    """Storage of one batch: keys, values, ids, offset tables, and the segments of every sequence.

    Attributes (read them, do not write): keys : storage dtype (b, h, N, d); values : (b, h, N, e); ids : int32 (b, h, N), the
    position of the token in each sealed row; tables : int32 (b, h, S, l + 1); mean_keys : storage dtype (b, h, M, l, d),
    mean_values : (b, h, M, l, e), means of the runs of the first `num_means` segments; lengths : tokens of each sequence;
    segments : [start, stop) of each sequence; gaps : positions of tokens taken out of each sequence; rotated : at which length
    each token was rotated, where that matters.

    version : changes with everything that a search depends on besides lengths: segments and what lies in them, positions, layout
    and memory. What was made from these lists holds as long as the number is the same. moved : the version since which keys,
    values, tables and means lie where they lie.
    """

    _STATE = (
        "_same", "capacity", "gaps", "ids", "keys", "layout", "lengths", "mean_keys", "mean_values", "pending", "rotated",
        "segments", "tables", "values",
    )  # fmt: skip

    def __init__(
        self, backend: Backend, layout: Layout, batch: int, heads: int, d: int, d_v: int, nlist: int, dtype: torch.dtype
    ) -> None:
        self.backend, self.layout = backend, layout
        self.batch, self.heads, self.d, self.d_v, self.nlist, self.dtype = batch, heads, d, d_v, nlist, dtype
        self.lengths = [0] * batch
        self.segments: list[tuple[Segment, ...]] = [()] * batch
        self.gaps = [Gaps.none()] * batch
        self.rotated = RotationLengths(batch)
        self.version = self.moved = next(_VERSIONS)
        self._undo: list[Callable[[], None]] | None = None  # what takes back the steps of the change under way, newest last
        self._changes = 0  # under way, one within the other
        self.pending: Tensor | None = None  # int32 (b, h, N): list numbers given with the tokens, -1 where the quantizer decides
        self.capacity = 0
        self._same = np.zeros((batch, batch), np.int64)  # (i, j): leading tokens that i and j are known to have in common
        self._centres: list[tuple[int, np.ndarray] | None] = [None] * batch
        self._allocate(0)
        self.tables = self._empty((batch, heads, 0, nlist + 1), torch.int32)

    # -- changes -----------------------------------------------------------------------------------------------------

    def _changed(self, moved: bool = False) -> None:
        """Something that a search depends on is another from now on; ``moved``: memory lies elsewhere."""
        self.version = next(_VERSIONS)
        if moved:
            self.moved = self.version

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Around a change: if it raises, these lists are what they were, and hold what they held.

        Rows beyond ``lengths`` may be other ones, and no others than the lists have room for. StateError if there is no memory to
        put rows back where they were: every token is forgotten then.
        """
        if self._undo is not None:
            self._changes += 1
            try:
                yield
            finally:
                self._changes -= 1
            return
        before = {name: getattr(self, name) for name in self._STATE}
        before |= {name: list(before[name]) for name in ("lengths", "segments", "gaps")} | {"_same": self._same.copy()}
        moved, self._undo, self._changes = self.moved, [], 1
        try:
            yield
        except BaseException as error:
            try:
                for name, value in before.items():
                    setattr(self, name, value)
                self._changed(moved != self.moved)
                for take_back in reversed(self._undo):
                    take_back()
                for i in range(self.batch if self._undo else 0):
                    self.update_means(i)
            except Exception as another:
                self.clear()
                raise StateError(f"expected memory to take back a failed change, got {another!r}: tokens are gone") from error
            raise
        finally:
            self._undo, self._changes = None, 0

    def _about_to_move(self, i: int, first: int, start: int, stop: int) -> None:
        """Rows [start, stop) of sequence i, with those of its segments from ``first`` on, go elsewhere: note where they are."""
        if self._undo is not None:
            ids, tables = self.ids[i, :, start:stop].clone(), self.tables[i, :, first : len(self.segments[i])].clone()
            self._undo.append(partial(self._take_back, self.keys, i, first, start, ids, tables))

    def _about_to_change(self, changes: Sequence[SegmentChange]) -> list[Callable[[], None]]:
        """What takes these changes back once they are done; the ids of rows that were not sealed before are theirs to write.

        As many operations on the device whatever the number of changes.
        """
        if self._undo is None:
            return []
        starts = [c.want[c.first][0] for c in changes]
        ends = [c.want[-1][1] - len(c.positions) for c in changes]  # of the rows that were sealed
        low, first, keys = min(starts), min(c.first for c in changes), self.keys
        ids = self.ids[:, :, low : max(ends)].clone() if any(map(operator.lt, starts, ends)) else self.ids[:, :, :0]
        tables = self.tables[:, :, first : max(len(c.have) for c in changes)]
        tables = tables.clone() if any(c.first < len(c.have) for c in changes) else tables[:, :, :0]

        def take_back(c: SegmentChange, start: int, end: int) -> None:
            fresh = torch.from_numpy(c.positions).to(ids).expand(self.heads, -1)
            before = torch.cat([ids[c.sequence, :, start - low : end - low], fresh], 1)
            replaced = tables[c.sequence, :, c.first - first : len(c.have) - first]
            self._take_back(keys, c.sequence, c.first, start, before, replaced)

        return [partial(take_back, *what) for what in zip(changes, starts, ends, strict=True)]

    def _take_back(self, keys: Tensor, i: int, first: int, start: int, ids: Tensor, tables: Tensor) -> None:
        """Put the tokens of sequence i back into the rows from ``start`` on, and its tables from ``first`` on.

        keys : the memory where they changed places. ids : int32 (h, n), of the tokens as they were; the same are there now, in
        another order. tables : int32 (h, s, l + 1).
        """
        stop = start + ids.shape[1]
        now = self.ids[i, :, start:stop]
        if self.keys is keys and not torch.equal(now, ids):  # other memory was not there yet, and is gone
            places = ids.argsort(dim=1).gather(1, now.argsort(dim=1).argsort(dim=1))  # where the token of each row was
            scratch = self._empty((self.heads, stop - start + 1), torch.int32)
            self.backend.seal(self.keys[i], self.values[i], self.ids[i], start, places.int(), scratch)
        self.tables[i, :, first : first + tables.shape[1]] = tables

    # -- memory ------------------------------------------------------------------------------------------------------

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory to be written to at any time, also if torch's inference mode is on now and off by then."""
        with torch.inference_mode(False):
            return self.backend.empty(shape, dtype)

    def _allocate(self, capacity: int) -> None:
        """Move everything in use to an arena of ``capacity`` rows."""
        b, h, used = self.batch, self.heads, max(self.lengths, default=0)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]
        shapes = {"keys": ((b, h, capacity, self.d), self.dtype), "values": ((b, h, capacity, self.d_v), self.dtype)}
        shapes["ids"] = ((b, h, capacity), torch.int32)
        if self.pending is not None:
            shapes["pending"] = ((b, h, capacity), torch.int32)
        fresh = {name: self._empty(*spec) for name, spec in shapes.items()}
        fresh |= self._room_for_means(capacity)
        for name, new in fresh.items():
            if name == "pending":
                new.fill_(-1)
            if self.capacity:
                part = slice(used if name in shapes else new.shape[2])
                old = getattr(self, name)[:, :, part]
                new[:, :, : old.shape[2]] = old
        self._changed(moved=True)
        for name, new in fresh.items():
            setattr(self, name, new)
        self.capacity = capacity

    @property
    def arena(self) -> Arena:
        """The memory, as a backend takes it."""
        return Arena(self.keys, self.values, self.ids, self.tables, self.mean_keys, self.mean_values, self.pending)

    def _room_for_means(self, capacity: int) -> dict[str, Tensor]:
        """mean_keys and mean_values for every segment that ``capacity`` rows can hold."""
        count = self.layout.most_means(capacity, self.nlist)
        sizes = {"mean_keys": self.d, "mean_values": self.d_v}
        return {k: self._empty((self.batch, self.heads, count, self.nlist, n), self.dtype) for k, n in sizes.items()}

    keys: Tensor
    values: Tensor
    ids: Tensor
    mean_keys: Tensor
    mean_values: Tensor

    def make_room(self, tokens: int) -> None:
        """Room for ``tokens`` of a sequence that grows, and for more where memory has to move for it."""
        if tokens > self.capacity:
            self._allocate(max(tokens, self.capacity + self.capacity // 2))

    def reserve(self, tokens: int) -> None:
        """Room for ``tokens`` per sequence without further allocation."""
        if tokens > self.capacity:
            self._allocate(tokens)
        self._reserve_tables(self.layout.most_segments(self.capacity), exact=True, shrink=False)

    def reclaim(self) -> int:
        """Give back unused rows; returns the bytes freed."""
        before = self.allocated_bytes()
        self._allocate(max(self.lengths, default=0))
        self._reserve_tables(max(map(len, self.segments), default=0), exact=True)
        return before - self.allocated_bytes()

    def _reserve_tables(self, count: int, exact: bool = False, shrink: bool = True) -> None:
        have = self.tables.shape[2]
        if count > have or (exact and shrink and count < have):
            new = self._empty((self.batch, self.heads, count if exact else count + 8, self.nlist + 1), torch.int32)
            keep = min(have, new.shape[2])
            new[:, :, :keep] = self.tables[:, :, :keep]
            self._changed(moved=True)
            self.tables = new

    def allocated_bytes(self) -> int:
        """Bytes of every array of this batch."""
        arrays = [self.keys, self.values, self.ids, self.tables, self.mean_keys, self.mean_values]
        arrays += [] if self.pending is None else [self.pending]
        return sum(x.nbytes for x in arrays)

    def used_bytes(self) -> tuple[int, int]:
        """Bytes that the stored tokens need: of keys and values, and of everything else."""
        tokens, segments = sum(self.lengths) * self.heads, sum(map(len, self.segments)) * self.heads
        per_token = 4 if self.pending is None else 8
        kv_bytes = tokens * (self.d + self.d_v) * self.dtype.itemsize
        return kv_bytes, tokens * per_token + segments * (self.nlist + 1) * 4 + self.mean_bytes()

    def mean_bytes(self) -> int:
        """Bytes of the means of runs that the stored tokens have."""
        runs = sum(map(self.num_means, range(self.batch))) * self.heads * self.nlist
        return runs * (self.d + self.d_v) * self.dtype.itemsize

    def adopt(self, lengths: Sequence[int], gaps: Sequence[Gaps], arrays: Mapping[str, Tensor]) -> None:
        """Hold what is in these arrays in place of what there is: keys, values, ids and tables, and pending if there is one, with
        the segments of these lengths. They are not copied, and later tokens are written to them."""
        capacity = int(arrays["keys"].shape[2])
        fresh = {**arrays, **self._room_for_means(capacity)}
        self._changed(moved=True)
        self.lengths, self.gaps, self.capacity = list(lengths), list(gaps), capacity
        self.segments = [self.layout.segments(n) for n in lengths]
        for name, x in fresh.items():
            setattr(self, name, x)
        for i in range(self.batch):
            self.update_means(i)

    def clear(self) -> None:
        """Forget every token; keep the memory."""
        self._changed()
        self.lengths, self.segments = [0] * self.batch, [()] * self.batch
        self.gaps, self.pending = [Gaps.none()] * self.batch, None
        self.rotated = RotationLengths(self.batch)
        self._same = np.zeros((self.batch, self.batch), np.int64)

    # -- positions ---------------------------------------------------------------------------------------------------

    def sealed(self, i: int) -> int:
        """Row past the last segment of sequence i; 0 if it has none (every row is then in arrival order)."""
        return self.segments[i][-1][1] if self.segments[i] else 0

    def sinks(self, i: int) -> int:
        """Sink rows in front of the segments of sequence i; 0 if it has none."""
        return self.segments[i][0][0] if self.segments[i] else 0

    def num_means(self, i: int) -> int:
        """How many segments of sequence i, the first ones, keep the means of their runs."""
        return self.layout.num_means(self.segments[i], self.nlist)

    def positions(self, i: int, ranks: np.ndarray) -> np.ndarray:
        """Positions of the tokens with these ranks (0 = oldest still stored): int64 (n,)."""
        return self.gaps[i].positions(ranks)

    def next_position(self, i: int) -> int:
        """Position of the token that sequence i gets next."""
        return self.lengths[i] + self.gaps[i].count

    def centres(self, i: int) -> np.ndarray:
        """Position of the middle of every segment of sequence i: float64 (s,)."""
        known = self._centres[i]
        if known is None or known[0] != self.version:
            ends = np.array(self.segments[i], np.int64).reshape(-1, 2)
            middle = (self.positions(i, ends[:, 0]) + self.positions(i, ends[:, 1] - 1)) / 2
            self._centres[i] = known = (self.version, middle)
        return known[1]

    def row_ids(self, i: int) -> Tensor:
        """Position of the token in every row of sequence i: int32 (h, lengths[i])."""
        n, low, high = self.lengths[i], self.sinks(i), self.sealed(i)
        ids = torch.from_numpy(self.positions(i, np.arange(n))).to(self.ids).expand(self.heads, n).clone()
        ids[:, low:high] = self.ids[i, :, low:high]
        return ids

    def ids_of(self, i: int, head: int, rows: Tensor) -> Tensor:
        """Positions of the tokens in these rows of one sequence and KV head: int64, of the shape of ``rows``."""
        in_order = torch.from_numpy(np.asarray(self.positions(i, rows.cpu().numpy()))).to(rows.device)
        sealed = (rows >= self.sinks(i)) & (rows < self.sealed(i))
        return torch.where(sealed, self.ids[i, head][rows].long(), in_order)

    # -- growing -----------------------------------------------------------------------------------------------------

    def only_grows(self, counts: Sequence[int], seal: bool = True) -> bool:
        """Whether to add so many tokens, to be sealed or not, is to write them behind the others and nothing else."""
        if self.pending is not None:
            return False
        for length, count, have in zip(self.lengths, counts, self.segments, strict=True):
            if length + count > self.capacity or (seal and self.layout.segments(length + count) != have):
                return False
        return True

    def seal(self, assign: Assign, last: bool = False) -> None:
        """Bring every sequence to the layout of its length. last: nothing comes after it in this change, unless that is part of
        another, so it need not be taken back."""
        due = [i for i in range(self.batch) if self.layout.segments(self.lengths[i]) != self.segments[i]]
        if due and not self._seal_together(due, assign, last and self._changes <= 1):
            for i in due:
                self._seal_alone(i, assign)

    def seal_ahead(self, n: int, assign: Assign) -> None:
        """Bring every sequence to the layout that it has with n tokens more, which are among its recent ones, and yet to come.

        A step to wrap in `whole`.
        """
        lengths = self.lengths
        self.lengths = [length + n for length in lengths]
        try:
            self.seal(assign)
        finally:
            self.lengths = lengths

    def advance(self, counts: Sequence[int], list_nos: Tensor | None = None, rotated: Sequence[int] | None = None) -> None:
        """Take note of ``counts[i]`` tokens that were written behind those of sequence i; they are not sealed yet.

        list_nos : int32 (b, h, n) or None, where the quantizer decides when a token is sealed. rotated : the length at which
        those of each sequence were rotated, 0 or None where the angles do not depend on it. What may fail is for the caller to
        wrap in `whole`.
        """
        if list_nos is not None and self.pending is None:
            self.pending = self._empty((self.batch, self.heads, self.capacity), torch.int32).fill_(-1)
        if self.pending is not None:
            for i, (start, count) in enumerate(zip(self.lengths, counts, strict=True)):
                self.pending[i, :, start : start + count] = -1 if list_nos is None else list_nos[i, :, :count]
        if rotated is not None or any(self.rotated.runs):
            for i, (start, count) in enumerate(zip(self.lengths, counts, strict=True)):
                if count:
                    self.rotated.append(i, start, 0 if rotated is None else rotated[i])
        self.lengths = list(map(operator.add, self.lengths, counts))  # at once

    def _seal(self, i: int, assign: Assign) -> None:
        """Bring the segments of sequence i to the layout of its length; the rows past the last segment are in arrival order."""
        if self.layout.segments(self.lengths[i]) != self.segments[i] and not self._seal_together([i], assign):
            self._seal_alone(i, assign)

    def _seal_together(self, due: Sequence[int], assign: Assign, final: bool = False) -> bool:
        """`_seal_alone` of all these sequences in one go, where the backend can; False if nothing was done. final: it will not be
        taken back."""
        known = assign.by_position() if self.backend.seals_batches else None
        if known is None:
            return False
        changes = []
        for i in due:
            have, want = self.segments[i], self.layout.segments(self.lengths[i])
            first = _common(have, want)
            fresh = np.arange(max(self.sealed(i), want[first][0]), want[-1][1])
            positions = self.positions(i, fresh)
            changes.append(SegmentChange(i, first, have, want, positions, self.layout.num_means(want, self.nlist)))
        self._reserve_tables(max(len(c.want) for c in changes))
        undo = [] if final else self._about_to_change(changes)
        self._changed()
        if not self.backend.seal_batch(self.arena, changes, *known):
            return False
        if self._undo is not None:  # not before: it says that it moves nothing if it fails
            self._undo += undo
        for c in changes:
            self.segments[c.sequence] = self.layout.segments(self.lengths[c.sequence])
        return True

    def _seal_alone(self, i: int, assign: Assign) -> None:
        """`_seal` where it is due, by the backend's single operations."""
        target = self.layout.segments(self.lengths[i])
        have = self.segments[i]
        first = _common(have, target)
        self._reserve_tables(len(target))
        tables = self.tables.new_empty((self.heads, len(target) - first, self.nlist + 1))
        sealed = self.sealed(i)
        parts = []
        for start, stop in target[first:]:
            parts += [self._run_lists(i, s) for s, (a, b) in enumerate(have) if start <= a and b <= stop]
            if stop > sealed:
                parts.append(self._pending_lists(i, max(start, sealed), stop, assign))
        list_nos = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, 1)
        self._about_to_move(i, first, target[first][0], target[-1][1])
        self._changed()
        self.backend.seal_many(self.keys[i], self.values[i], self.ids[i], target[first:], list_nos, tables)
        self.tables[i, :, first : len(target)] = tables
        self.segments[i] = target
        self.update_means(i, first)

    def update_means(self, i: int, first: int = 0) -> None:
        """Compute the means of the runs of sequence i from the rows of segments ``first`` on."""
        for s in range(first, self.num_means(i)):
            table, outs = self.tables[i, :, s], (self.mean_keys[i, :, s], self.mean_values[i, :, s])
            self.backend.means(self.keys[i], self.values[i], table, *outs)

    def _run_lists(self, i: int, s: int) -> Tensor:
        """List numbers of the rows of segment s, as they lie: int32 (h, n)."""
        start, stop = self.segments[i][s]
        begins = (self.tables[i, :, s, 1:-1] - start).long()  # of every list but the first; past the end if the rest is empty
        marks = torch.zeros((self.heads, stop - start + 1), dtype=torch.int32, device=begins.device)
        marks.scatter_add_(1, begins, torch.ones_like(begins, dtype=torch.int32))
        return marks[:, :-1].cumsum(1, dtype=torch.int32)

    def _pending_lists(self, i: int, start: int, stop: int, assign: Assign) -> Tensor:
        """List numbers of recent rows about to be sealed, whose ids are written: int32 (h, n)."""
        self.ids[i, :, start:stop] = torch.from_numpy(self.positions(i, np.arange(start, stop))).to(self.ids)
        if self.pending is None:
            return assign(i, start, stop)
        given = self.pending[i, :, start:stop]
        return torch.where(given < 0, assign(i, start, stop), given) if bool((given < 0).any()) else given

    # -- shrinking ---------------------------------------------------------------------------------------------------

    def truncate(self, i: int, length: int, assign: Assign) -> None:
        """Keep the first ``length`` tokens of sequence i, in the state it had at that length."""
        if length == self.lengths[i]:
            return
        self._unseal(i, length, length)
        self._differs(i, length)
        last = int(self.positions(i, np.array([length - 1]))[0]) if length else -1
        gaps = self.gaps[i].up_to(last)
        if gaps is not self.gaps[i]:
            self._changed()
            self.gaps[i] = gaps
        self.rotated = self.rotated.truncated(i, length)
        self.lengths[i] = length
        self._seal(i, assign)

    def remove(self, i: int, ranks: np.ndarray, assign: Assign, close_gaps: bool = False) -> None:
        """Take the tokens with these ranks (sorted, unique) out of sequence i; positions of the others stay, or close up."""
        if not len(ranks):
            return
        length, gone = self.lengths[i], self.positions(i, ranks)
        first = int(ranks[0])
        gaps = self.gaps[i].closed_up(gone) if close_gaps else self.gaps[i].with_more(gone)
        self._unseal(i, first, length - len(ranks))
        self._compact(i, ranks)
        self._changed()
        self.rotated = self.rotated.without(i, ranks)
        self._differs(i, first)
        self.gaps[i], self.lengths[i] = gaps, length - len(ranks)
        self._seal(i, assign)

    def _compact(self, i: int, ranks: np.ndarray) -> None:
        """Move up what lies behind the rows with these numbers, into their place."""
        first, length = int(ranks[0]), self.lengths[i]
        stay = np.ones(length - first, bool)
        stay[ranks - first] = False
        kept, gone = (torch.from_numpy(first + np.flatnonzero(x)).to(self.ids.device) for x in (stay, ~stay))
        names = ("keys", "values") if self.pending is None else ("keys", "values", "pending")
        part = slice(first, first + len(kept))
        moved = [getattr(self, name)[i].index_select(1, kept) for name in names]
        lost = [getattr(self, name)[i].index_select(1, gone) for name in names]
        ids = self.ids[i, :, first:length].clone()

        def take_back() -> None:
            self.ids[i, :, first:length] = ids
            for name, rows in zip(names, lost, strict=True):
                x = getattr(self, name)[i]
                x[:, kept] = x[:, part].clone()
                x[:, gone] = rows

        if self._undo is not None:
            self._undo.append(take_back)
        for name, rows in zip(names, moved, strict=True):
            getattr(self, name)[i, :, part] = rows

    def relayout(self, layout: Layout, assign: Assign) -> None:
        """Move every sequence to another layout (another window, say)."""
        for i, length in enumerate(self.lengths):
            self._unseal(i, 0, length)
        self.layout = layout
        fresh = self._room_for_means(self.capacity)
        self._changed(moved=True)
        for name, new in fresh.items():
            setattr(self, name, new)
        for i in range(self.batch):
            self._seal(i, assign)

    def _unseal(self, i: int, changed: int, length: int) -> None:
        """Put rows back in arrival order, from the first segment that holds a row >= changed or is not there at ``length``."""
        have = self.segments[i]
        first = min(_common(have, self.layout.segments(length)), sum(stop <= changed for _, stop in have))
        if first == len(have):
            return
        start, stop = have[first][0], have[-1][1]
        ids = self.ids[i, :, start:stop]
        order = ids.argsort(dim=1)
        if self.pending is not None:
            lists = torch.cat([self._run_lists(i, s) for s in range(first, len(have))], 1)
            self.pending[i, :, start:stop] = lists.gather(1, order)
        rank = order.argsort(dim=1)
        scratch = self.tables.new_empty((self.heads, stop - start + 1))
        self._about_to_move(i, first, start, stop)
        self._changed()
        self.backend.seal(self.keys[i], self.values[i], self.ids[i], start, rank.int(), scratch)
        self.segments[i] = have[:first]

    def _differs(self, i: int, length: int) -> None:
        """From token ``length`` on, sequence i may differ from every other."""
        self._same[i] = np.minimum(self._same[i], length)
        self._same[:, i] = np.minimum(self._same[:, i], length)

    # -- whole batches -----------------------------------------------------------------------------------------------

    def fork(self, sequences: Sequence[int]) -> SegmentedInvertedLists:
        """A copy that holds these sequences, in this order, each as often as named."""
        new = SegmentedInvertedLists(
            self.backend, self.layout, len(sequences), self.heads, self.d, self.d_v, self.nlist, self.dtype
        )
        new.lengths = [self.lengths[i] for i in sequences]
        new.segments = [self.segments[i] for i in sequences]
        new.gaps = [self.gaps[i] for i in sequences]
        new.rotated = self.rotated.pick(sequences)
        new._same = self._common_tokens(sequences)
        used = max(new.lengths, default=0)
        if self.pending is not None:
            new.pending = self._empty((new.batch, self.heads, 0), torch.int32)
        lengths, new.lengths = new.lengths, [0] * new.batch  # nothing to move yet
        new._allocate(used)
        new.lengths = lengths
        new._reserve_tables(max(map(len, new.segments), default=0), exact=True)
        for to, i in enumerate(sequences):
            for name in ("keys", "values", "ids") + (() if self.pending is None else ("pending",)):
                getattr(new, name)[to, :, : lengths[to]] = getattr(self, name)[i, :, : lengths[to]]
            new.tables[to, :, : len(new.segments[to])] = self.tables[i, :, : len(new.segments[to])]
            count = new.num_means(to)
            new.mean_keys[to, :, :count] = self.mean_keys[i, :, :count]
            new.mean_values[to, :, :count] = self.mean_values[i, :, :count]
        return new

    def reorder(self, sequences: Sequence[int]) -> None:
        """In place: sequence i becomes what sequences[i] was. Copies only what the two are not known to have in common.

        Hypotheses of a beam search stem from one another, so after the first step that is little more than recent tokens.
        """
        moved = [(i, source) for i, source in enumerate(sequences) if i != source]
        names = ("keys", "values", "ids") + (() if self.pending is None else ("pending",))
        parts = []
        for i, source in moved:
            same, length = int(self._same[i, source]), self.lengths[source]
            have, want = self.segments[i], self.segments[source]
            kept = sum(stop <= same for _, stop in want[: _common(have, want)])  # segments of tokens in common are in one order
            first = min([same, length, *(s[kept][0] for s in (have, want) if len(s) > kept)])
            rows = [getattr(self, name)[source, :, first:length].clone() for name in names]
            ends = {"tables": len(want), "mean_keys": self.num_means(source), "mean_values": self.num_means(source)}
            runs = {name: getattr(self, name)[source, :, kept:end].clone() for name, end in ends.items()}
            parts.append((i, first, length, rows, kept, runs))
        together = self._common_tokens(sequences)
        self._changed()
        for i, first, length, rows, kept, runs in parts:  # after all were read: a sequence may be overwritten and copied
            for name, part in zip(names, rows, strict=True):
                getattr(self, name)[i, :, first:length] = part
            for name, part in runs.items():
                getattr(self, name)[i, :, kept : kept + part.shape[1]] = part
        self._same = together
        self.rotated = self.rotated.pick(sequences)
        for name in ("lengths", "segments", "gaps"):
            values = getattr(self, name)
            setattr(self, name, [values[source] for source in sequences])

    def _common_tokens(self, sequences: Sequence[int]) -> np.ndarray:
        """What `_same` becomes if sequence i is a copy of sequences[i]."""
        chosen = np.asarray(sequences)
        lengths = np.array([self.lengths[i] for i in sequences])
        same: np.ndarray = np.where(chosen[:, None] == chosen, lengths, self._same[np.ix_(chosen, chosen)])
        return same

    def to(self, backend: Backend, device: torch.device) -> SegmentedInvertedLists:
        """A copy on another device."""
        new = self.fork(range(self.batch))
        new.backend = backend
        for name in ("keys", "values", "ids", "tables", "pending", "mean_keys", "mean_values"):
            if getattr(new, name) is not None:
                setattr(new, name, getattr(new, name).to(device))
        new._changed(moved=True)
        return new

    def list_sizes(self) -> Tensor:
        """Sealed tokens of every list: int64 (b, h, l)."""
        sizes = torch.zeros((self.batch, self.heads, self.nlist), dtype=torch.int64, device=self.tables.device)
        for i, segments in enumerate(self.segments):
            sizes[i] = self.tables[i, :, : len(segments)].diff(dim=-1).sum(1)
        return sizes


def _common(a: Sequence[Segment], b: Sequence[Segment]) -> int:
    """Length of the common prefix."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n
