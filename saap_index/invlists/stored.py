"""The tokens of a batch as they are stored: one dense arena, what lies where in it, and what is read from it. Knows rows, not how
they come or go.

Keys and values lie in arrival order, except that every segment is sorted by list number per KV head, with an offset table
beside it (backends/base.py has the picture in words). Axes as in backends/base.py.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..backends import Arena, Backend, Coded, StorageCode
from ..backends.scalar_quantizer import decode, rows_at
from ..errors import StateError
from . import arena, coded
from .ahead import Ahead
from .beside import SealsBeside
from .gaps import Gaps
from .layout import Arrangement, Layout, Merging, Segment
from .rotated import RotationLengths
from .undo import UndoLog


def _of_arena(name: str) -> Any:
    """A property: this array of the arena."""
    return property(operator.attrgetter(f"arena.{name}"))


_VERSIONS = itertools.count(1)  # one for all, so that no two batches share a number


class StoredTokens:
    """Keys, values, ids, offset tables, and the segments of every sequence: the half of `SegmentedInvertedLists` that is read.

    Attributes, to be read: arena : the memory, of which keys : storage dtype (b, h, N, d); values : (b, h, N, e); ids : int32
    (b, h, N), the position of the token in each sealed row; tables : int32 (b, h, S, l + 1); mean_keys : storage dtype (b, h, M,
    l, d), mean_values : (b, h, M, l, e), means of the runs of the first `num_means` segments; pending : int32 (b, h, N), list
    numbers given with the tokens, -1 where the quantizer decides, or None for -1 everywhere. capacity : N. lengths : tokens of
    each sequence; segments : [start, stop) of each sequence; merging : which of them some KV heads have merged, or None; gaps :
    positions of tokens taken out of each sequence; rotated : at which length each token was rotated, where that matters. code :
    what sealed rows are stored as, or None for numbers; with one, keys and values are bytes, and coded_spans says which rows of
    each sequence they are of (coded.py). ahead : lists of recent rows that are known already, see ahead.py, or None.

    rows_moved, rows_assigned : since the lists were made, summed over KV heads, rows that were sorted into segments and rows of
    which the list was asked for: what adding costs besides writing tokens.

    version : changes with everything that a search depends on besides lengths: segments and what lies in them, positions, layout
    and memory. What was made from these lists holds as long as the number is the same. moved : the version since which keys,
    values, tables and means lie where they lie.
    """

    _OF_SEQUENCES = ("ahead", "coded_spans", "gaps", "lengths", "merging", "segments")
    """Lists with an entry for each sequence, which is replaced and not changed."""

    _STATE = ("_common", "arena", "capacity", "layout", "rotated", *_OF_SEQUENCES)

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
        self.version = self.moved = next(_VERSIONS)
        self.rows_moved = self.rows_assigned = 0
        self.arena, self.capacity = arena.without_rows(backend, batch, heads, d, d_v, nlist, dtype, code), 0
        self._undo, self._beside = UndoLog(backend), SealsBeside()
        self._centres: list[tuple[int, np.ndarray] | None] = [None] * batch
        self._forget()

    def _forget(self) -> None:
        """No sequence has a token."""
        self.lengths = [0] * self.batch
        self.segments: list[tuple[Segment, ...]] = [()] * self.batch
        self.merging: list[Merging | None] = [None] * self.batch
        self.gaps = [Gaps.none()] * self.batch
        self.coded_spans: list[Segment] = [coded.NONE] * self.batch
        self.ahead: list[Ahead | None] = [None] * self.batch
        self.rotated = RotationLengths(self.batch)
        self._common = np.zeros((self.batch, self.batch), np.int64)  # (i, j): leading tokens known to be in common
        self._due_at = [0] * self.batch  # with how many tokens something is due besides writing them; 0: look

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
            before |= {name: list(before[name]) for name in self._OF_SEQUENCES}
        try:
            yield
        except BaseException as error:
            try:
                for name, value in before.items():
                    setattr(self, name, value)
                self._due_at = [0] * self.batch
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
                undo.steps = []

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
        self._forget()
        self.hold(lengths, [self.layout.arrangement(n, self.heads) for n in lengths])
        self.gaps = list(gaps)
        self.coded_spans = list(spans) or [coded.NONE] * self.batch
        for i in range(self.batch):
            self.update_means(i)

    def hold(self, lengths: Sequence[int], arrangements: Sequence[Arrangement]) -> None:
        """Take note that the rows are those of sequences of these lengths, and lie so."""
        self.lengths = list(lengths)
        for i, arrangement in enumerate(arrangements):
            self._arrange(i, arrangement)

    def clear(self) -> None:
        """Forget every token; keep the memory."""
        self._changed()
        self.arena = replace(self.arena, pending=None)
        self._forget()

    def forget_lists(self) -> None:
        """Lists are others from now on, and no token is in one: drop what recent rows knew of the old ones."""
        self.ahead = [None] * self.batch
        if self.code is not None:
            self.arena = replace(self.arena, pending=None)

    # -- segments ----------------------------------------------------------------------------------------------------

    def arrangement(self, i: int) -> Arrangement:
        """How the sealed tokens of sequence i lie."""
        return Arrangement(self.segments[i], self.merging[i])

    def _arrange(self, i: int, arrangement: Arrangement) -> None:
        """Those of sequence i lie so from now on."""
        self._changed()
        self.segments[i], self.merging[i] = arrangement

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
        """Position of the middle of every segment of sequence i, of those that merge that of the whole: float64 (s,)."""
        kept, merging = self._centres[i], self.merging[i]
        if kept is None or kept[0] != self.version:
            ends = np.array(self.segments[i], np.int64).reshape(-1, 2)
            if merging is not None:
                ends[merging.first : merging.stop] = ends[merging.first, 0], ends[merging.stop - 1, 1]
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

    # -- means -------------------------------------------------------------------------------------------------------

    def update_means(self, i: int, first: int = 0) -> None:
        """Compute the means of the runs of sequence i from the rows of segments ``first`` on."""
        for s in range(first, self.num_means(i)):
            self._mean_runs(i, s)

    def _mean_runs(self, i: int, s: int, heads: slice = slice(None)) -> None:
        """Those of one segment, of these KV heads."""
        table, outs = self.tables[i, heads, s], (self.mean_keys[i, heads, s], self.mean_values[i, heads, s])
        if self.code is None:
            self.backend.means(self.keys[i, heads], self.values[i, heads], table, *outs)
            return
        start, stop = self.segments[i][s]
        bits, sizes = (self.code.key_bits, self.code.value_bits), (self.d, self.d_v)
        arrays = zip((self.keys, self.values), sizes, bits, strict=True)
        keys, values = (decode(x[i, heads, start:stop], size, n) for x, size, n in arrays)
        mean_keys, mean_values = (torch.empty_like(x, dtype=torch.float32) for x in outs)
        self.backend.means(keys, values, table - start, mean_keys, mean_values)
        outs[0].copy_(mean_keys)
        outs[1].copy_(mean_values)
