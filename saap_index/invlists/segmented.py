"""The inverted lists: one dense arena per batch of sequences, sorted by list inside segments. Knows rows, not routing.

Keys and values lie in arrival order, except that every segment is sorted by list number per KV head, with an offset table
beside it (backends/base.py has the picture in words). Log-structured: blocks leave the recent tokens, are sorted in place,
and merge with their neighbours as they age (layout.py). Axes as in backends/base.py.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..backends import Arena, Backend, Coded, SegmentChange, StorageCode
from ..backends.scalar_quantizer import decode, rows_at
from ..errors import StateError
from . import arena, coded
from .common import common_prefix, diverged, picked
from .gaps import Gaps
from .layout import MAX_QUERY_TOKENS, Layout, Segment
from .rotated import RotationLengths
from .runs import Assign, KnownLists, merged_lists, run_lists
from .undo import UndoLog


def _of_arena(name: str) -> Any:
    """A property: this array of the arena."""
    return property(operator.attrgetter(f"arena.{name}"))


_VERSIONS = itertools.count(1)  # one for all, so that no two batches share a number


class SegmentedInvertedLists:
    """Storage of one batch: keys, values, ids, offset tables, and the segments of every sequence.

    Attributes, to be read: arena : the memory, of which keys : storage dtype (b, h, N, d); values : (b, h, N, e); ids : int32
    (b, h, N), the position of the token in each sealed row; tables : int32 (b, h, S, l + 1); mean_keys : storage dtype (b, h, M,
    l, d), mean_values : (b, h, M, l, e), means of the runs of the first `num_means` segments; pending : int32 (b, h, N), list
    numbers given with the tokens, -1 where the quantizer decides, or None for -1 everywhere. capacity : N. lengths : tokens of
    each sequence; segments : [start, stop) of each sequence; gaps : positions of tokens taken out of each sequence; rotated : at
    which length each token was rotated, where that matters. code : what sealed rows are stored as, or None for numbers; with one,
    keys and values are bytes, and coded_spans says which rows of each sequence they are of (coded.py).

    version : changes with everything that a search depends on besides lengths: segments and what lies in them, positions, layout
    and memory. What was made from these lists holds as long as the number is the same. moved : the version since which keys,
    values, tables and means lie where they lie.
    """

    _STATE = ("_common", "arena", "capacity", "coded_spans", "gaps", "layout", "lengths", "rotated", "segments")

    keys: Tensor = _of_arena("keys")
    values: Tensor = _of_arena("values")
    ids: Tensor = _of_arena("ids")
    tables: Tensor = _of_arena("tables")
    mean_keys: Tensor = _of_arena("mean_keys")
    mean_values: Tensor = _of_arena("mean_values")
    pending: Tensor | None = _of_arena("pending")

    def __init__(
        self, backend: Backend, layout: Layout, batch: int, heads: int, d: int, d_v: int, nlist: int, dtype: torch.dtype,
        code: StorageCode | None = None,
    ) -> None:
        self.backend, self.layout, self.code = backend, layout, code
        self.batch, self.heads, self.d, self.d_v, self.nlist, self.dtype = batch, heads, d, d_v, nlist, dtype
        self.lengths = [0] * batch
        self.segments: list[tuple[Segment, ...]] = [()] * batch
        self.gaps = [Gaps.none()] * batch
        self.rotated = RotationLengths(batch)
        self.version = self.moved = next(_VERSIONS)
        self.arena, self.capacity = arena.without_rows(backend, batch, heads, d, d_v, nlist, dtype, code), 0
        self.coded_spans: list[Segment] = [coded.NONE] * batch
        self._undo = UndoLog(backend)
        self._common = np.zeros((batch, batch), np.int64)  # (i, j): leading tokens that i and j are known to have in common
        self._centres: list[tuple[int, np.ndarray] | None] = [None] * batch

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
        undo, before, moved = self._undo, {}, self.moved
        undo.depth += 1
        if undo.depth == 1:
            before = {name: getattr(self, name) for name in self._STATE}
            before |= {name: list(before[name]) for name in ("coded_spans", "lengths", "segments", "gaps")}
        try:
            yield
        except BaseException as error:
            try:
                for name, value in before.items():
                    setattr(self, name, value)
                if before:
                    self._changed(moved != self.moved)
                    for i in range(self.batch if undo.undo(self.arena) else 0):
                        self.update_means(i)
            except Exception as another:
                self.clear()
                raise StateError(f"expected memory to take back a failed change, got {another!r}: tokens are gone") from error
            raise
        finally:
            undo.depth -= 1
            if not undo.depth:
                undo.forget()

    # -- memory ------------------------------------------------------------------------------------------------------

    def _set_arena(self, memory: Arena) -> None:
        """Everything in use lies in this memory from now on."""
        self._changed(moved=True)
        self.arena, self.capacity = memory, int(memory.keys.shape[2])

    def _allocate(self, capacity: int) -> None:
        """Move everything in use to an arena of ``capacity`` rows."""
        used, means = max(self.lengths, default=0), self.layout.most_means(capacity, self.nlist)
        self._set_arena(arena.resized(self.backend, self.arena, rows=capacity, used=used, means=means))

    def has_room(self, counts: Sequence[int]) -> bool:
        """Whether counts[i] tokens more of each sequence find room where memory lies."""
        lengths = list(map(operator.add, self.lengths, counts))
        if self.code is not None and max(coded.plain_rows(lengths, self.coded_spans)) > self.arena.numbers[0].shape[2]:
            return False
        return max(lengths) <= self.capacity

    def make_room(self, counts: Sequence[int]) -> None:
        """Room for counts[i] tokens more of each sequence, and for more where memory has to move for it."""
        lengths = list(map(operator.add, self.lengths, counts))
        if max(lengths) > self.capacity:
            self._allocate(max(*lengths, self.capacity + self.capacity // 2))
        plain, have = max(coded.plain_rows(lengths, self.coded_spans)), self.arena.numbers[0].shape[2]
        if self.code is not None and plain > have:
            self._resize_plain(max(plain, have + have // 2))

    def _resize_plain(self, rows: int) -> None:
        used = coded.plain_rows(self.lengths, self.coded_spans)
        self._set_arena(coded.moved(self.backend, self.arena, coded.leading(used), used, rows))

    def reserve(self, tokens: int) -> None:
        """Room for ``tokens`` per sequence without further allocation."""
        if tokens > self.capacity:
            self._allocate(tokens)
        self.resize_tables(max(self.tables.shape[2], self.layout.most_segments(self.capacity)))

    def reclaim(self) -> int:
        """Give back unused rows; returns the bytes freed."""
        before = arena.nbytes(self.arena)
        self._allocate(max(self.lengths, default=0))
        if self.code is not None:
            self._resize_plain(max(coded.plain_rows(self.lengths, self.coded_spans), default=0))
        self.resize_tables(max(map(len, self.segments), default=0))
        return before - arena.nbytes(self.arena)

    def resize_tables(self, count: int) -> None:
        """Room for the offset tables of so many segments per sequence."""
        if count != self.tables.shape[2]:
            self._set_arena(arena.resized(self.backend, self.arena, tables=count))

    def _room_for_segments(self, count: int) -> None:
        if count > self.tables.shape[2]:
            self.resize_tables(count + 8)

    def adopt(
        self, lengths: Sequence[int], gaps: Sequence[Gaps], arrays: Mapping[str, Any], spans: Sequence[Segment] = ()
    ) -> None:
        """Hold what is in these arrays in place of what there is: keys, values, ids and tables, and pending if there is one, with
        the segments of these lengths; plain_keys and plain_values besides, where rows of these spans are codes. They are not
        copied, and later tokens are written to them."""
        memory = replace(self.arena, **{"pending": None, **arrays})
        means = self.layout.most_means(int(memory.keys.shape[2]), self.nlist)
        self._set_arena(arena.resized(self.backend, memory, means=means))
        self.lengths, self.gaps = list(lengths), list(gaps)
        self.coded_spans = list(spans) or [coded.NONE] * self.batch
        self.segments = [self.layout.segments(n) for n in lengths]
        for i in range(self.batch):
            self.update_means(i)

    def clear(self) -> None:
        """Forget every token; keep the memory."""
        self._changed()
        self.lengths, self.segments = [0] * self.batch, [()] * self.batch
        self.gaps, self.arena = [Gaps.none()] * self.batch, replace(self.arena, pending=None)
        self.coded_spans = [coded.NONE] * self.batch
        self.rotated = RotationLengths(self.batch)
        self._common = np.zeros((self.batch, self.batch), np.int64)

    def forget_lists(self) -> None:
        """Lists are others from now on, and no token is in one: drop what recent rows that are codes knew of the old ones."""
        if self.code is not None:
            self.arena = replace(self.arena, pending=None)

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
        kept = self._centres[i]
        if kept is None or kept[0] != self.version:
            ends = np.array(self.segments[i], np.int64).reshape(-1, 2)
            middle = (self.positions(i, ends[:, 0]) + self.positions(i, ends[:, 1] - 1)) / 2
            self._centres[i] = kept = (self.version, middle)
        return kept[1]

    def row_ids(self, i: int) -> Tensor:
        """Position of the token in every row of sequence i: int32 (h, lengths[i])."""
        n, low, high = self.lengths[i], self.sinks(i), self.sealed(i)
        ids = torch.from_numpy(self.positions(i, np.arange(n))).to(self.ids).expand(self.heads, n).clone()
        ids[:, low:high] = self.ids[i, :, low:high]
        return ids

    # -- as FAISS's InvertedLists --------------------------------------------------------------------------------------

    def list_sizes(self) -> Tensor:
        """Sealed tokens of every list: int64 (b, h, l). Sinks and recent tokens are in none."""
        sizes = torch.zeros((self.batch, self.heads, self.nlist), dtype=torch.int64, device=self.tables.device)
        for i, segments in enumerate(self.segments):
            sizes[i] = self.tables[i, :, : len(segments)].diff(dim=-1).sum(1)
        return sizes

    def list_size(self, list_no: int, sequence: int = 0, head: int = 0) -> int:
        """Sealed tokens of one list. ParameterError for numbers that are none."""
        return len(self.get_ids(list_no, sequence, head))

    def get_ids(self, list_no: int, sequence: int = 0, head: int = 0) -> Tensor:
        """Positions of the sealed tokens of one list, oldest segment first: int32 (n,). ParameterError as for `list_size`."""
        checks.integer(list_no, "list_no", 0, self.nlist - 1)
        checks.integer(sequence, "sequence", 0, self.batch - 1)
        checks.integer(head, "head", 0, self.heads - 1)
        bounds = self.tables[sequence, head, : len(self.segments[sequence]), list_no : list_no + 2].tolist()
        return torch.cat([self.ids.new_empty(0), *(self.ids[sequence, head, first:stop] for first, stop in bounds)])

    def imbalance_factor(self) -> float:
        """nlist * sum of squared list sizes / (their sum)^2, averaged over sequences and heads; 1 is balanced, 0 where nothing is
        sealed. FAISS's definition."""
        sizes = self.list_sizes().double()
        squares, sums = sizes.square().sum(-1), sizes.sum(-1)
        factors = (self.nlist * squares / sums.square())[sums > 0]
        return float(factors.mean()) if len(factors) else 0.0

    # -- numbers of rows ---------------------------------------------------------------------------------------------

    @property
    def coded(self) -> Coded | None:
        """Which rows are codes, for `Backend.scan`; None where none can be."""
        if self.code is None:
            return None
        first, last = zip(*self.coded_spans, strict=True)
        return Coded(self.code, self.keys, self.values, list(first), list(last))

    def key_rows(self, i: int, start: int, stop: int, head: int | None = None) -> Tensor:
        """Keys of rows [start, stop) of sequence i: storage dtype (h, n, d), a view, where none is a code, else float32, of codes
        what they stand for; (n, d) of one KV head."""
        return self._side_rows("key", i, start, stop, head)

    def value_rows(self, i: int, start: int, stop: int, head: int | None = None) -> Tensor:
        """Values of rows [start, stop), (h, n, e) or (n, e), otherwise as `key_rows`."""
        return self._side_rows("value", i, start, stop, head)

    def _side_rows(self, side: str, i: int, start: int, stop: int, head: int | None) -> Tensor:
        span, heads = self.coded_spans[i], slice(None) if head is None else slice(head, head + 1)
        if self.code is None or stop <= span[0] or start >= span[1]:
            low = coded.plain_row(span, start)
            rows = self.arena.numbers[side == "value"][i, heads, low : low + stop - start]
        else:
            index = torch.arange(start, stop, dtype=torch.int64, device=self.keys.device)
            rows = self._rows(i, index.expand(self.heads, -1)[heads], side, heads)
        return rows if head is None else rows[0]

    def all_rows(self, sequences: slice, n: int) -> tuple[Tensor, Tensor]:
        """Keys (b, h, n, d) and values (b, h, n, e) of the first n rows of these sequences: views where no row is a code."""
        chosen = range(self.batch)[sequences]
        if self.code is None or all(self.coded_spans[i] == coded.NONE for i in chosen):
            keys, values = (x[sequences, :, :n] for x in self.arena.numbers)
            return keys, values
        index = torch.arange(n, dtype=torch.int64, device=self.keys.device).expand(self.heads, n)
        sides = zip(*(self.rows(i, index.clamp(max=max(0, self.lengths[i] - 1))) for i in chosen), strict=True)
        keys, values = (torch.stack(x) for x in sides)
        return keys, values

    def rows(self, i: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (h, n, d) and values (h, n, e) of rows : int64 (h, n) of sequence i, in the storage dtype."""
        return self._rows(i, index, "key").to(self.dtype), self._rows(i, index, "value").to(self.dtype)

    def _rows(self, i: int, index: Tensor, side: str, heads: slice = slice(None)) -> Tensor:
        numbers, all_coded = self.arena.numbers[side == "value"][i, heads], self.coded
        if all_coded is None:
            return numbers.gather(1, index[:, :, None].expand(-1, -1, numbers.shape[2]))
        part = replace(all_coded, keys=all_coded.keys[:, heads], values=all_coded.values[:, heads])
        return rows_at(numbers, index, part, i, side)

    # -- growing -----------------------------------------------------------------------------------------------------

    def only_grows(self, counts: Sequence[int], seal: bool = True) -> bool:
        """Whether to add so many tokens, to be sealed or not, is to write them behind the others and nothing else."""
        if self.pending is not None:
            return False
        if not self.has_room(counts):
            return False
        for length, count, have in zip(self.lengths, counts, self.segments, strict=True):
            if seal and self.layout.segments(length + count) != have:
                return False
        return True

    def seal(self, assign: Assign, last: bool = False) -> None:
        """Bring every sequence to the layout of its length. last: nothing comes after it in this change, unless that is part of
        another, so it need not be taken back."""
        self._seal(range(self.batch), assign, last and self._undo.depth <= 1)

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
        if list_nos is not None:
            self.arena = arena.with_pending(self.backend, self.arena)
        if self.pending is not None:
            for i, (start, count) in enumerate(zip(self.lengths, counts, strict=True)):
                self.pending[i, :, start : start + count] = -1 if list_nos is None else list_nos[i, :, :count]
        if rotated is not None or any(self.rotated.runs):
            for i, (start, count) in enumerate(zip(self.lengths, counts, strict=True)):
                if count:
                    self.rotated.append(i, start, 0 if rotated is None else rotated[i])
        self.lengths = list(map(operator.add, self.lengths, counts))  # at once

    def _seal(self, sequences: Iterable[int], assign: Assign, final: bool = False) -> None:
        """`seal` of these sequences; the rows past the last segment are in arrival order. final: it will not be taken back."""
        due = [i for i in sequences if self.layout.segments(self.lengths[i]) != self.segments[i]]
        if due and self.code is not None:
            assign = self._code(due, self.code, assign)
        if due and not self._seal_together(due, assign, final):
            for i in due:
                self._seal_alone(i, assign)
        if due and self.code is not None and not any(map(self._lists_given, range(self.batch))):
            self.arena = replace(self.arena, pending=None)

    def _code(self, due: Sequence[int], code: StorageCode, assign: Assign) -> Assign:
        """Make codes of the rows of these sequences that are about to be sealed; returns their lists, from the numbers."""
        spans, lists = {}, {}
        for i in due:
            want = self.layout.segments(self.lengths[i])
            spans[i] = want[0][0], want[-1][1]
            start, stop = self.sealed(i) or want[0][0], want[-1][1]
            if start < stop and self._lists_missing(i, start, stop):
                lists[i] = start, assign(i, start, stop)
        spare = self.layout.block + MAX_QUERY_TOKENS
        memory, self.coded_spans = coded.sealed(self.backend, code, self.arena, self.lengths, self.coded_spans, spans, spare)
        self._set_arena(memory)
        return KnownLists(lists)

    def _seal_together(self, due: Sequence[int], assign: Assign, final: bool = False) -> bool:
        """`_seal_alone` of all these sequences in one go, where the backend can; False if nothing was done. final: it will not be
        taken back."""
        quantizer = assign.by_position() if self.backend.seals_batches and self.code is None else None
        if quantizer is None:
            return False
        changes = []
        for i in due:
            have, want = self.segments[i], self.layout.segments(self.lengths[i])
            first = common_prefix(have, want)
            positions = self.positions(i, np.arange(max(self.sealed(i), want[first][0]), want[-1][1]))
            changes.append(SegmentChange(i, first, have, want, positions, self.layout.num_means(want, self.nlist)))
        self._room_for_segments(max(len(c.want) for c in changes))
        steps = [] if final else self._undo.before_changes(self.arena, changes)
        self._changed()
        if not self.backend.seal_batch(self.arena, changes, *quantizer):
            return False
        self._undo.note(*steps)  # not before: it says that it moves nothing if it fails
        for c in changes:
            self.segments[c.sequence] = self.layout.segments(self.lengths[c.sequence])
        return True

    def _seal_alone(self, i: int, assign: Assign) -> None:
        """`_seal` where it is due, by the backend's single operations."""
        have, want = self.segments[i], self.layout.segments(self.lengths[i])
        first = common_prefix(have, want)
        self._room_for_segments(len(want))
        tables = self.tables.new_empty((self.heads, len(want) - first, self.nlist + 1))
        list_nos = merged_lists(self.tables[i], have, want[first:], partial(self._recent_lists, i, assign))
        self._undo.before_move(self.arena, i, slice(want[first][0], want[-1][1]), slice(first, len(have)))
        self._changed()
        self.backend.seal_many(self.keys[i], self.values[i], self.ids[i], want[first:], list_nos, tables)
        self.tables[i, :, first : len(want)] = tables
        self.segments[i] = want
        self.update_means(i, first)

    def update_means(self, i: int, first: int = 0) -> None:
        """Compute the means of the runs of sequence i from the rows of segments ``first`` on."""
        for s in range(first, self.num_means(i)):
            table, outs = self.tables[i, :, s], (self.mean_keys[i, :, s], self.mean_values[i, :, s])
            if self.code is None:
                self.backend.means(self.keys[i], self.values[i], table, *outs)
                continue
            start, stop = self.segments[i][s]
            bits, sizes = (self.code.key_bits, self.code.value_bits), (self.d, self.d_v)
            arrays = zip((self.keys, self.values), sizes, bits, strict=True)
            keys, values = (decode(x[i, :, start:stop], size, n) for x, size, n in arrays)
            mean_keys, mean_values = (torch.empty_like(x, dtype=torch.float32) for x in outs)
            self.backend.means(keys, values, table - start, mean_keys, mean_values)
            outs[0].copy_(mean_keys)
            outs[1].copy_(mean_values)

    def _recent_lists(self, i: int, assign: Assign, start: int, stop: int) -> Tensor:
        """List numbers of recent rows about to be sealed, whose ids are written: int32 (h, n)."""
        self.ids[i, :, start:stop] = torch.from_numpy(self.positions(i, np.arange(start, stop))).to(self.ids)
        if not self._lists_missing(i, start, stop):
            assert self.pending is not None
            return self.pending[i, :, start:stop]
        lists, given = assign(i, start, stop), None if self.pending is None else self.pending[i, :, start:stop]
        return lists if given is None else torch.where(given < 0, lists, given)

    def _lists_given(self, i: int) -> bool:
        """Whether the list of one of the recent rows is settled."""
        rows = None if self.pending is None else self.pending[i, :, self.sealed(i) : self.lengths[i]]
        return rows is not None and bool((rows >= 0).any())

    def _lists_missing(self, i: int, start: int, stop: int) -> bool:
        """Whether the quantizer decides the list of one of these recent rows."""
        return self.pending is None or bool((self.pending[i, :, start:stop] < 0).any())

    # -- shrinking ---------------------------------------------------------------------------------------------------

    def truncate(self, i: int, length: int, assign: Assign) -> None:
        """Keep the first ``length`` tokens of sequence i, in the state it had at that length."""
        if length == self.lengths[i]:
            return
        self._unseal(i, length, length)
        self._common = diverged(self._common, i, length)
        last = int(self.positions(i, np.array([length - 1]))[0]) if length else -1
        gaps = self.gaps[i].up_to(last)
        if gaps is not self.gaps[i]:
            self._changed()
            self.gaps[i] = gaps
        self.rotated = self.rotated.truncated(i, length)
        self.lengths[i] = length
        if self.code is not None:
            self._changed()
            self.coded_spans[i] = coded.truncated(self.coded_spans[i], length)
        self._seal([i], assign)

    def remove(self, i: int, ids: np.ndarray, assign: Assign, close_gaps: bool = False) -> int:
        """Take those of these ids that are stored out of sequence i, and return how many; positions of the others stay, or close
        up."""
        ranks = np.flatnonzero(np.isin(self.positions(i, np.arange(self.lengths[i])), ids))
        if not len(ranks):
            return 0
        length, gone = self.lengths[i], self.positions(i, ranks)
        first = int(ranks[0])
        gaps = self.gaps[i].closed_up(gone) if close_gaps else self.gaps[i].with_more(gone)
        self._unseal(i, first, length - len(ranks))
        arena.compact(self.arena, i, ranks, length, self._undo.note)
        if self.code is not None:
            self._set_arena(coded.removed(self.backend, self.arena, self.coded_spans, self.lengths, i, ranks))
            self.coded_spans[i] = coded.without(self.coded_spans[i], ranks)
        self._changed()
        self.rotated = self.rotated.without(i, ranks)
        self._common = diverged(self._common, i, first)
        self.gaps[i], self.lengths[i] = gaps, length - len(ranks)
        self._seal([i], assign)
        return len(ranks)

    def relayout(self, layout: Layout, assign: Assign) -> None:
        """Move every sequence to another layout (another window, say)."""
        for i, length in enumerate(self.lengths):
            self._unseal(i, 0, length)
        self.layout = layout
        means = layout.most_means(self.capacity, self.nlist)
        self._set_arena(arena.resized(self.backend, self.arena, means=means))
        self._seal(range(self.batch), assign)

    def _unseal(self, i: int, changed: int, length: int) -> None:
        """Put rows back in arrival order, from the first segment that holds a row >= changed or is not there at ``length``."""
        have = self.segments[i]
        first = min(common_prefix(have, self.layout.segments(length)), sum(stop <= changed for _, stop in have))
        if first == len(have):
            return
        start, stop = have[first][0], have[-1][1]
        ids = self.ids[i, :, start:stop]
        order = ids.argsort(dim=1)
        if self.code is not None:  # a code does not say to which list its key belongs
            self.arena = arena.with_pending(self.backend, self.arena)
        if self.pending is not None:
            lists = [run_lists(self.tables[i, :, s], have[s]) for s in range(first, len(have))]
            self.pending[i, :, start:stop] = torch.cat(lists, 1).gather(1, order)
        rank = order.argsort(dim=1)
        scratch = self.tables.new_empty((self.heads, stop - start + 1))
        self._undo.before_move(self.arena, i, slice(start, stop), slice(first, len(have)))
        self._changed()
        self.backend.seal(self.keys[i], self.values[i], self.ids[i], start, rank.int(), scratch)
        self.segments[i] = have[:first]

    # -- whole batches -----------------------------------------------------------------------------------------------

    def fork(self, sequences: Sequence[int]) -> SegmentedInvertedLists:
        """A copy that holds these sequences, in this order, each as often as named."""
        new = SegmentedInvertedLists(
            self.backend, self.layout, len(sequences), self.heads, self.d, self.d_v, self.nlist, self.dtype,
            self.code,
        )
        for name in ("coded_spans", "lengths", "segments", "gaps"):
            setattr(new, name, [getattr(self, name)[i] for i in sequences])
        new.rotated = self.rotated.pick(sequences)
        new._common = picked(self._common, self.lengths, sequences)
        rows, tables = max(new.lengths, default=0), max(map(len, new.segments), default=0)
        means = self.layout.most_means(rows, self.nlist)
        memory = new.arena if self.pending is None else arena.with_pending(self.backend, new.arena)
        new._set_arena(arena.resized(self.backend, memory, rows=rows, tables=tables, means=means))
        for to, i in enumerate(sequences):
            spans = (0, self.lengths[i]), (0, len(self.segments[i])), (0, self.num_means(i))
            arena.write(new.arena, to, arena.part(self.arena, i, *spans))
        if self.code is not None:
            counts = coded.plain_rows(new.lengths, new.coded_spans)
            new._set_arena(coded.copied(self.backend, new.arena, self.arena, counts, sequences))
        return new

    def reorder(self, sequences: Sequence[int]) -> None:
        """In place: sequence i becomes what sequences[i] was. Copies only what the two are not known to have in common.

        Hypotheses of a beam search stem from one another, so after the first step that is little more than recent tokens.
        """
        copies = []
        for i, source in enumerate(sequences):
            if i == source:
                continue
            common, length = int(self._common[i, source]), self.lengths[source]
            have, want = self.segments[i], self.segments[source]
            kept = sum(stop <= common for _, stop in want[: common_prefix(have, want)])  # segments in common are in one order
            first = min([common, length, *(s[kept][0] for s in (have, want) if len(s) > kept)])
            span = self.coded_spans[source]
            if span != self.coded_spans[i]:  # a token that both have may be a code in the one alone
                first = min(first, want[kept - 1][1] if kept and span[0] == self.coded_spans[i][0] else 0)
            parts = arena.part(self.arena, source, (first, length), (kept, len(want)), (kept, self.num_means(source)))
            if self.code is not None:
                low = coded.plain_row(span, first) if span == self.coded_spans[i] and first >= span[1] else 0
                high = coded.plain_row(span, length)
                names = ("plain_keys", "plain_values")
                parts |= {n: (low, x[source, :, low:high]) for n, x in zip(names, self.arena.numbers, strict=True)}
            copies.append((i, {name: (start, x.clone()) for name, (start, x) in parts.items()}))
        self._changed()
        for i, parts in copies:  # after all were read: a sequence may be overwritten and copied
            arena.write(self.arena, i, parts)
        self._common = picked(self._common, self.lengths, sequences)
        self.rotated = self.rotated.pick(sequences)
        for name in ("coded_spans", "lengths", "segments", "gaps"):
            setattr(self, name, [getattr(self, name)[source] for source in sequences])

    def to(self, backend: Backend, device: torch.device) -> SegmentedInvertedLists:
        """A copy on another device."""
        new = self.fork(range(self.batch))
        new.backend = new._undo.backend = backend
        new._set_arena(arena.on_device(new.arena, device))
        return new
