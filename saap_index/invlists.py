"""The inverted lists: one dense arena per batch of sequences, sorted by list inside segments. Knows rows, not routing.

Keys and values lie in arrival order, except that every segment is sorted by list number per KV head, with an offset table
beside it (backends/base.py has the picture in words). Log-structured: blocks leave the recent tokens, are sorted in place,
and merge with their neighbours as they age (layout.py). Axes as in backends/base.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .backends import Arena, Backend, Frequencies, SegmentChange
from .errors import NotFiniteError
from .layout import Layout, Segment


class Assign(Protocol):
    """What says which lists rows in arrival order belong to."""

    def __call__(self, i: int, start: int, stop: int) -> Tensor:
        """List numbers of rows [start, stop) of sequence i: int32 (h, n)."""

    def by_position(self) -> tuple[Any, Frequencies | None] | None:
        """What a backend needs to find them itself: its quantizer, or None without one, and RoPE, if there is one; None if the
        angles depend on more than the position."""


class SegmentedInvertedLists:
    """Storage of one batch: keys, values, ids, offset tables, and the segments of every sequence.

    Attributes (read them, do not write): keys : storage dtype (b, h, N, d); values : (b, h, N, e); ids : int32 (b, h, N), the
    position of the token in each sealed row; tables : int32 (b, h, S, l + 1); mean_keys : storage dtype (b, h, M, l, d),
    mean_values : (b, h, M, l, e), means of the runs of the first `num_means` segments; lengths : tokens of each sequence;
    segments : [start, stop) of each sequence; removed : sorted positions of tokens taken out of each sequence.
    """

    def __init__(
        self, backend: Backend, layout: Layout, batch: int, heads: int, d: int, d_v: int, nlist: int, dtype: torch.dtype
    ) -> None:
        self.backend, self.layout = backend, layout
        self.batch, self.heads, self.d, self.d_v, self.nlist, self.dtype = batch, heads, d, d_v, nlist, dtype
        self.lengths = [0] * batch
        self.segments: list[tuple[Segment, ...]] = [()] * batch
        self.removed = [np.empty(0, np.int64) for _ in range(batch)]
        self.pending: Tensor | None = None  # int32 (b, h, N): list numbers given with the tokens, -1 where the quantizer decides
        self.capacity = 0
        self.decode: Any = None  # the state on the device that follows this batch (decode.py), or None
        self.plans: dict[int, Any] = {}  # what selections worked out for these segments, by parameters (attend.py)
        self._same = np.zeros((batch, batch), np.int64)  # (i, j): leading tokens that i and j are known to have in common
        self._centres: list[tuple[tuple[Segment, ...], np.ndarray] | None] = [None] * batch
        self._allocate(0)
        self.tables = self._empty((batch, heads, 0, nlist + 1), torch.int32)

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
        for name, new in fresh.items():
            if self.capacity:
                new[:, :, :used] = getattr(self, name)[:, :, :used]
            setattr(self, name, new)
        self._allocate_means(capacity)
        self.capacity = capacity

    def _allocate_means(self, capacity: int) -> None:
        """Room for the means of every segment that ``capacity`` rows can hold; keep those there are."""
        self.plans.clear()  # they hold the memory of before
        count = self.layout.most_means(capacity, self.nlist)
        for name, dim in (("mean_keys", self.d), ("mean_values", self.d_v)):
            new = self._empty((self.batch, self.heads, count, self.nlist, dim), self.dtype)
            if self.capacity:
                old = getattr(self, name)[:, :, :count]
                new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    keys: Tensor
    values: Tensor
    ids: Tensor
    mean_keys: Tensor
    mean_values: Tensor

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
            self.plans.clear()
            new = self._empty((self.batch, self.heads, count if exact else count + 8, self.nlist + 1), torch.int32)
            keep = min(have, new.shape[2])
            new[:, :, :keep] = self.tables[:, :, :keep]
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

    def clear(self) -> None:
        """Forget every token; keep the memory."""
        self.lengths, self.segments = [0] * self.batch, [()] * self.batch
        self.removed = [np.empty(0, np.int64) for _ in range(self.batch)]
        self._centres, self.pending = [None] * self.batch, None
        self._same[:] = 0

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
        gone = self.removed[i]
        return ranks if not len(gone) else ranks + np.searchsorted(gone - np.arange(len(gone)), ranks, side="right")

    def next_position(self, i: int) -> int:
        """Position of the token that sequence i gets next."""
        return self.lengths[i] + len(self.removed[i])

    def centres(self, i: int) -> np.ndarray:
        """Position of the middle of every segment of sequence i: float64 (s,)."""
        known, segments = self._centres[i], self.segments[i]
        if known is None or known[0] is not segments:
            ends = np.array(segments, np.int64).reshape(-1, 2)
            middle = (self.positions(i, ends[:, 0]) + self.positions(i, ends[:, 1] - 1)) / 2
            self._centres[i] = known = (segments, middle)
        return known[1]

    def row_ids(self, i: int) -> Tensor:
        """Position of the token in every row of sequence i: int32 (h, lengths[i])."""
        n, low, high = self.lengths[i], self.sinks(i), self.sealed(i)
        ids = torch.from_numpy(self.positions(i, np.arange(n))).to(self.ids).expand(self.heads, n).clone()
        ids[:, low:high] = self.ids[i, :, low:high]
        return ids

    # -- growing -----------------------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor, counts: Sequence[int], list_nos: Tensor | None, assign: Assign | None) -> None:
        """Add counts[i] tokens to sequence i; seal and merge what the new length asks for, unless ``assign`` is None.

        list_nos : int32 (b, h, n) or None, where ``assign`` decides when a token is sealed. Raises NotFiniteError, having
        changed nothing, if a key or value is NaN or infinite.
        """
        need = max(map(sum, zip(self.lengths, counts, strict=True)), default=0)
        if need > self.capacity:
            if self.decode is not None:
                self.decode.refuse_growth()
            self._allocate(max(need, self.capacity + self.capacity // 2))
        in_one_launch = self.decode is not None and list_nos is None and self.decode.append(keys, values, counts)
        if not in_one_launch and not self.backend.append(keys, values, self.keys, self.values, self.lengths, counts):
            raise NotFiniteError("keys, values: expected finite numbers, got NaN or infinity")
        if list_nos is not None and self.pending is None:
            self.pending = self._empty((self.batch, self.heads, self.capacity), torch.int32)
            for i, length in enumerate(self.lengths):
                self.pending[i, :, self.sealed(i) : length] = -1
        for i, count in enumerate(counts):
            start = self.lengths[i]
            if self.pending is not None:
                self.pending[i, :, start : start + count] = -1 if list_nos is None else list_nos[i, :, :count]
            self.lengths[i] = start + count
        if assign is not None:
            self.seal(assign)

    def seal(self, assign: Assign) -> None:
        """Bring every sequence to the layout of its length."""
        due = [i for i in range(self.batch) if self.layout.segments(self.lengths[i]) != self.segments[i]]
        if due and not self._seal_together(due, assign):
            for i in due:
                self._seal_alone(i, assign)

    def advance(self, counts: Sequence[int]) -> None:
        """Take note of ``counts[i]`` tokens that were written behind those of sequence i without `append`."""
        for i, count in enumerate(counts):
            if self.pending is not None:
                self.pending[i, :, self.lengths[i] : self.lengths[i] + count] = -1
            self.lengths[i] += count

    def will_seal(self, counts: Sequence[int]) -> bool:
        """Whether `append` of so many tokens seals some (and so needs a quantizer)."""
        return any(self.layout.num_blocks(n + c) for n, c in zip(self.lengths, counts, strict=True) if c)

    def _seal(self, i: int, assign: Assign) -> None:
        """Bring the segments of sequence i to the layout of its length; the rows past the last segment are in arrival order."""
        if self.layout.segments(self.lengths[i]) != self.segments[i] and not self._seal_together([i], assign):
            self._seal_alone(i, assign)

    def _seal_together(self, due: Sequence[int], assign: Assign) -> bool:
        """`_seal_alone` of all these sequences in one go, where the backend can; False if nothing was done."""
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
        arena = Arena(self.keys, self.values, self.ids, self.tables, self.mean_keys, self.mean_values, self.pending)
        if not self.backend.seal_batch(arena, changes, *known):
            return False
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
        self.removed[i] = self.removed[i][self.removed[i] <= last]
        self.lengths[i] = length
        self._seal(i, assign)

    def remove(self, i: int, ranks: np.ndarray, assign: Assign, close_gaps: bool = False) -> None:
        """Take the tokens with these ranks (sorted, unique) out of sequence i; positions of the others stay, or close up."""
        if not len(ranks):
            return
        length = self.lengths[i]
        self._unseal(i, int(ranks[0]), length - len(ranks))
        first = int(ranks[0])
        kept = np.setdiff1d(np.arange(first, length), ranks)
        gone = self.positions(i, ranks)
        rows = torch.from_numpy(kept).to(self.ids.device)
        arrays = (self.keys, self.values) if self.pending is None else (self.keys, self.values, self.pending)
        for x in arrays:
            x[i, :, first : first + len(kept)] = x[i].index_select(1, rows)
        before = self.removed[i]
        self.removed[i] = before - np.searchsorted(gone, before) if close_gaps else np.union1d(before, gone)
        self._differs(i, first)
        self.lengths[i] = length - len(ranks)
        self._seal(i, assign)

    def relayout(self, layout: Layout, assign: Assign) -> None:
        """Move every sequence to another layout (another window, say)."""
        for i, length in enumerate(self.lengths):
            self._unseal(i, 0, length)
        self.layout = layout
        self._allocate_means(self.capacity)
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
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(stop - start, device=ids.device).expand_as(order))
        scratch = self.tables.new_empty((self.heads, stop - start + 1))
        self.backend.seal(self.keys[i], self.values[i], self.ids[i], start, rank.int(), scratch)
        self.segments[i] = have[:first]
        self._centres[i] = None

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
        new.removed = [self.removed[i] for i in sequences]
        new._centres = [self._centres[i] for i in sequences]
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
        for i, first, length, rows, kept, runs in parts:  # after all were read: a sequence may be overwritten and copied
            for name, part in zip(names, rows, strict=True):
                getattr(self, name)[i, :, first:length] = part
            for name, part in runs.items():
                getattr(self, name)[i, :, kept : kept + part.shape[1]] = part
        self._same = self._common_tokens(sequences)
        for name in ("lengths", "segments", "removed", "_centres"):
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
