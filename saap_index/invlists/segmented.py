"""The inverted lists: one dense arena per batch of sequences, sorted by list inside segments. Knows rows, not routing.

Log-structured: blocks leave the recent tokens, are sorted in place, and merge with their neighbours as they age, a KV head after
the other (layout.py). Axes as in backends/base.py.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..backends import Backend, SegmentChange, StorageCode
from . import arena, coded
from .ahead import Ahead, due_rows
from .beside import rows_missing
from .common import before_merge, common_prefix, common_segments, diverged, picked
from .layout import MAX_QUERY_TOKENS, Arrangement, Layout, Merging, Segment
from .runs import Assign, KnownLists, cut_table, joined_table, merged_lists, run_lists
from .stored import StoredTokens


class SegmentedInvertedLists(StoredTokens):
    """Storage of one batch: see `StoredTokens` for what it holds; here is how tokens come and go."""

    # -- growing -----------------------------------------------------------------------------------------------------

    def only_grows(self, counts: Sequence[int], seal: bool = True) -> bool:
        """Whether to add so many tokens, to be sealed or not, is to write them behind the others and nothing else."""
        if self.pending is not None or (seal and any(map(operator.ge, map(operator.add, self.lengths, counts), self._due_at))):
            return False
        return self.has_room(counts)

    def due(self) -> bool:
        """Whether `seal` has anything to do."""
        return any(map(operator.ge, self.lengths, self._due_at))

    def due_with(self, count: int) -> bool:
        """Whether the arrangement of a sequence is another with ``count`` tokens more."""
        now = enumerate(self.lengths)
        return any(self.layout.arrangement(n + count, self.heads) != self.arrangement(i) for i, n in now)

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
        chosen = list(sequences)
        have = {i: Arrangement(self.segments[i], self.merging[i]) for i in chosen}
        wanted = {i: self.layout.arrangement(self.lengths[i], self.heads) for i in chosen}
        wanted = {i: want for i, want in wanted.items() if want != have[i]}
        if wanted:
            by_key = assign if self.code is None else self._code(wanted, self.code, assign)
            if self.backend.seals_batches and self.code is None:
                wanted = self._seal_together(wanted, by_key, final)
                have = {i: self.arrangement(i) for i in wanted}
            for i, want in wanted.items():
                self._seal_alone(i, have[i], want, by_key)
            if self.code is not None and not any(map(self._lists_given, range(self.batch))):
                self.arena = replace(self.arena, pending=None)
        for i in chosen:
            self._look_ahead(i, assign)
        if self.backend.seals_beside:
            try:
                self._begin_next(assign)
            except Exception:  # nothing may fail behind a change that is not taken back; what does, fails again when it is due
                self._beside.drop()

    def _begin_next(self, assign: Assign) -> None:
        """Have the backend begin the change that comes next, a few tokens before it, or note when."""
        quantizer, beside = assign.by_position(), self._beside
        if quantizer is None or quantizer[0] is None or self.pending is not None or self.code is not None:
            return
        if beside.is_begun(self.version):
            return
        at = [self.layout.next_change(length, self.heads) for length in self.lengths]
        tokens = min(map(operator.sub, at, self.lengths))
        wait = tokens - beside.lead
        if wait <= 0:
            wanted = {i: self.layout.arrangement(n + tokens, self.heads) for i, n in enumerate(self.lengths)}
            changes = [self._change(i, want) for i, want in wanted.items() if want != self.arrangement(i)]
            wait = rows_missing(changes, self.lengths)
            if wait <= 0 and max(len(c.want) for c in changes) <= self.tables.shape[2]:
                beside.note(self.version, changes, quantizer, self.backend.begin_seal(self.arena, changes, *quantizer))
        if 0 < wait < tokens:
            self._due_at = [min(due, n + wait) for due, n in zip(self._due_at, self.lengths, strict=True)]

    def _look_ahead(self, i: int, assign: Assign) -> None:
        """Assign what is due of the next block of sequence i, and note with how many tokens something is due again."""
        length, segments = self.lengths[i], self.segments[i]
        at, sealed_at, stop = self.layout.coming(length, self.heads)
        if assign.from_keys and not self.backend.seals_batches and self.pending is None:
            if not segments:  # a block more, which may be due a few tokens after the first ones
                stop += self.layout.block
            ahead, start = self.ahead[i], segments[-1][1] if segments else self.layout.sinks
            assigned = start if ahead is None else ahead.stop
            until, again = due_rows(length, sealed_at, assigned, stop)
            if until > assigned:
                lists = assign(i, assigned, until)
                self.rows_assigned += lists.numel()
                self.ahead[i] = Ahead(start, lists) if ahead is None else ahead.followed_by(lists)
            at = min(at, again)
        self._due_at[i] = at

    def _code(self, wanted: dict[int, Arrangement], code: StorageCode, assign: Assign) -> Assign:
        """Make codes of the rows of these sequences that are about to be sealed; returns their lists, from the numbers."""
        spans, lists = {}, {}
        for i, want in wanted.items():
            first, stop = want.segments[0][0], want.segments[-1][1]
            start = self.sealed(i) or first
            if start < stop:
                spans[i] = first, stop
                if self._lists_missing(i, start, stop):
                    lists[i] = start, self._assigned(i, assign, start, stop)
        if spans:
            spare = self.layout.block + MAX_QUERY_TOKENS
            memory, self.coded_spans = coded.sealed(
                self.backend, code, self.arena, self.lengths, self.coded_spans, spans, spare
            )
            self._set_arena(memory)
        return KnownLists(lists)

    def _seal_together(self, wanted: dict[int, Arrangement], assign: Assign, final: bool = False) -> dict[int, Arrangement]:
        """`_seal_alone` of these sequences in one go, where the backend can; returns those that are left. final: it will not be
        taken back."""
        quantizer = assign.by_position()
        while quantizer is not None and wanted:
            changes = [self._change(i, want) for i, want in wanted.items()]
            self._room_for_segments(max(len(c.want) for c in changes))
            steps = [] if final else self._undo.before_changes(self.arena, changes)
            begun = self._beside.of(self.version, changes, quantizer)
            self._changed()
            if not self.backend.seal_batch(self.arena, changes, *quantizer, *(() if begun is None else (begun,))):
                break
            self._undo.note(*steps)  # not before: it says that it moves nothing if it fails
            for c in changes:
                self.rows_moved += c.rows_moved(self.heads)
                self.rows_assigned += self.heads * len(c.positions)
                self._arrange(c.sequence, Arrangement(tuple(c.want), None if c.merging is None else Merging(*c.merging)))
            wanted = {i: want for i, want in wanted.items() if want != self.arrangement(i)}
        return wanted

    def _change(self, i: int, want: Arrangement) -> SegmentChange:
        """The next change on the way of sequence i to an arrangement: to its segments, then to what of them is merged."""
        have, segments = self.segments[i], want.segments
        merging = want.merging if segments == have else None
        first = common_prefix(have, segments) if merging is None else merging.first
        positions = self.positions(i, np.arange(max(self.sealed(i), segments[first][0]), segments[-1][1]))
        means = self.layout.num_means(segments, self.nlist)
        return SegmentChange(i, first, have, segments, positions, means, self.merging[i], merging)

    def _seal_alone(self, i: int, have: Arrangement, want: Arrangement, assign: Assign) -> None:
        """Bring sequence i from one arrangement to another that follows it, by the backend's single operations."""
        if len(want.segments) > self.tables.shape[2]:
            self._room_for_segments(len(want.segments))
        if have.segments != want.segments:
            self._merge(i, have, want.segments, assign)
        if want.merging is not None:
            self._merge_heads(i, have, want.segments, want.merging)
        self._arrange(i, want)
        ahead = self.ahead[i]
        self.ahead[i] = None if ahead is None else ahead.behind(want.segments[-1][1])

    def _merge(self, i: int, have: Arrangement, want: Sequence[Segment], assign: Assign) -> None:
        """Make the segments of sequence i those of ``want``. Rows of a segment that stays do not move, nor those of KV heads that
        have merged it."""
        first, sealed = common_prefix(have.segments, want), have.segments[-1][1] if have.segments else 0
        means = self.num_means(i) if self.layout.mean_run_tokens else 0
        tables = self.tables.new_empty((self.heads, len(want) - first, self.nlist + 1))
        stays: dict[int, int] = {}  # segments by number: which they were
        whole: list[tuple[int, Segment]] = []  # with recent rows
        partly: list[tuple[int, range]] = []  # of whole segments, and which these were
        stops = [stop for _, stop in have.segments]
        for s in range(first, len(want)):
            start, stop = want[s]
            old = range(bisect_right(stops, start), bisect_right(stops, stop))
            if stop > sealed or not old:
                whole.append((s, want[s]))
            elif len(old) == 1:
                stays[s] = old[0]
                tables[:, s - first] = self.tables[i, :, old[0]]
            else:
                partly.append((s, old))
        fresh = partial(self._recent_lists, i, assign)
        lists = [
            (s, fresh(*x).contiguous() if x[0] >= sealed else merged_lists(self.tables[i], have.segments, x, fresh))
            for s, x in whole
        ]
        if first < len(have.segments):
            self._undo.before_tables(self.arena, i, slice(first, len(have.segments)))
        for run in _neighbours([s for s, _ in whole]):
            part = slice(run[0] - first, run[-1] + 1 - first)
            list_nos = [x for s, x in lists if s in run]
            start, stop = want[run[0]][0], want[run[-1]][1]
            self._undo.before_move(self.arena, i, slice(start, stop))
            rows = self.keys[i], self.values[i], self.ids[i]
            if len(run) == 1:
                self.backend.seal(*rows, start, list_nos[0], tables[:, part.start])
            else:
                self.backend.seal_many(*rows, want[run[0] : run[-1] + 1], torch.cat(list_nos, 1), tables[:, part])
            self.rows_moved += sum(map(Tensor.numel, list_nos))
        for s, old in partly:
            now = have.merging
            done = now.heads if now is not None and (now.first, now.stop) == (old.start, old.stop) else 0
            if done:
                tables[:done, s - first] = joined_table(self.tables[i, :done, old.start : old.stop])
            self._sort(i, slice(done, None), have.segments[old.start : old.stop], old.start, tables[done:, s - first])
        self.tables[i, :, first : len(want)] = tables
        self.segments[i] = tuple(want)
        for s in range(first, self.num_means(i) if self.layout.mean_run_tokens else 0):
            old_s = stays.get(s, means)
            if old_s < means:
                for x in (self.mean_keys, self.mean_values):
                    x[i, :, s] = x[i, :, old_s]
            else:
                self._mean_runs(i, s)

    def _merge_heads(self, i: int, have: Arrangement, segments: Sequence[Segment], merging: Merging) -> None:
        """Merge ``segments`` of sequence i, whose tables are there, for the KV heads of ``merging`` that have not yet."""
        parts, old = segments[merging.first : merging.stop], have.merging
        done = old.heads if old is not None and have.segments[old.first : old.stop] == parts else 0
        heads = slice(done, merging.heads)
        self._undo.before_tables(self.arena, i, slice(merging.first, merging.stop))
        self._sort(i, heads, parts, merging.first, None)
        for s in range(merging.first, min(merging.stop, self.num_means(i))):
            self._mean_runs(i, s, heads)

    def _sort(self, i: int, heads: slice, parts: Sequence[Segment], first: int, table: Tensor | None) -> None:
        """Sort the rows of these neighbours, of which the first is segment number ``first``, as those of one segment.

        table : int32 (heads, l + 1) out; None: their tables become it, cut at their bounds.
        """
        start, stop = parts[0][0], parts[-1][1]
        tables = self.tables[i, heads, first : first + len(parts)]
        self._undo.before_move(self.arena, i, slice(start, stop), heads)
        rows = self.keys[i, heads], self.values[i, heads], self.ids[i, heads]
        if not self.backend.merge(*rows, parts, tables, table):
            lists = merged_lists(tables, parts, (start, stop))
            joined = tables.new_empty((len(tables), self.nlist + 1)) if table is None else table
            self.backend.seal(*rows, start, lists, joined)
            if table is None:
                tables.copy_(cut_table(joined, parts))
        self.rows_moved += len(tables) * (stop - start)

    def _assigned(self, i: int, assign: Assign, start: int, stop: int) -> Tensor:
        """List numbers of recent rows by the quantizer: int32 (h, n); of as many as were assigned ahead without asking it."""
        ahead = self.ahead[i]
        parts = [] if ahead is None else ahead.part(start, stop)
        start += sum(x.shape[1] for x in parts)
        if start < stop:
            parts.append(assign(i, start, stop))
            self.rows_assigned += parts[-1].numel()
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _recent_lists(self, i: int, assign: Assign, start: int, stop: int) -> Tensor:
        """List numbers of recent rows about to be sealed, whose ids are written: int32 (h, n)."""
        positions = self.gaps[i].positions(np.arange(start, stop))
        if self.ids.is_cpu:
            self.ids.numpy()[i, :, start:stop] = positions  # in a fraction of the time that torch takes
        else:
            self.ids[i, :, start:stop] = torch.from_numpy(positions).to(self.ids)
        if not self._lists_missing(i, start, stop):
            assert self.pending is not None
            return self.pending[i, :, start:stop]
        lists, named = self._assigned(i, assign, start, stop), None if self.pending is None else self.pending[i, :, start:stop]
        return lists if named is None else torch.where(named < 0, lists, named)

    def _lists_given(self, i: int) -> bool:
        """Whether the list of one of the recent rows was named by whoever added it."""
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
        self._beside.drop()
        self._common = diverged(self._common, i, length)
        last = int(self.positions(i, np.array([length - 1]))[0]) if length else -1
        gaps = self.gaps[i].up_to(last)
        if gaps is not self.gaps[i]:
            self._changed()
            self.gaps[i] = gaps
        self.rotated = self.rotated.truncated(i, length)
        self.lengths[i], ahead = length, self.ahead[i]
        self.ahead[i] = None if ahead is None else ahead.up_to(length)
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
        self.ahead[i] = None
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

    def rearrange(self, assign: Assign) -> None:
        """Bring every sequence to the layout of its length from any other arrangement, every token in the list that it is in."""
        pending = self.pending
        self.arena = arena.with_pending(self.backend, self.arena)
        for i, length in enumerate(self.lengths):
            self._unseal(i, length, length)
        self._seal(range(self.batch), assign)
        self.arena = replace(self.arena, pending=pending)

    def _unseal(self, i: int, changed: int, length: int) -> None:
        """Put rows back in arrival order, from the first segment that holds a row >= changed or is not there at ``length``."""
        now = self.arrangement(i)
        have = now.segments
        first = min(
            common_segments(now, self.layout.arrangement(length, self.heads)), sum(stop <= changed for _, stop in have)
        )
        first = before_merge(first, now.merging)
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
        self._undo.before_tables(self.arena, i, slice(first, len(have)))
        self._undo.before_move(self.arena, i, slice(start, stop))
        self._changed()
        self.backend.seal(self.keys[i], self.values[i], self.ids[i], start, rank.int(), scratch)
        kept = now.merging if now.merging is not None and now.merging.stop <= first else None
        self._arrange(i, Arrangement(have[:first], kept))
        self.ahead[i] = None

    # -- whole batches -----------------------------------------------------------------------------------------------

    def fork(self, sequences: Sequence[int]) -> SegmentedInvertedLists:
        """A copy that holds these sequences, in this order, each as often as named."""
        new = SegmentedInvertedLists(
            self.backend, self.layout, len(sequences), self.heads, self.d, self.d_v, self.nlist, self.dtype,
            self.code,
        )
        for name in self._OF_SEQUENCES:
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
            same = common_segments(self.arrangement(i), self.arrangement(source))
            kept = sum(stop <= common for _, stop in want[:same])  # segments in common are in one order
            kept = before_merge(kept, self.merging[source])
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
        for name in (*self._OF_SEQUENCES, "_due_at"):
            setattr(self, name, [getattr(self, name)[source] for source in sequences])

    def to(self, backend: Backend, device: torch.device) -> SegmentedInvertedLists:
        """A copy on another device."""
        new = self.fork(range(self.batch))
        new.backend = new._undo.backend = backend
        new.ahead = [None] * new.batch
        new._set_arena(arena.on_device(new.arena, device))
        return new


def _neighbours(numbers: Sequence[int]) -> list[range]:
    """Numbers, ascending, as ranges of those that follow one another."""
    found: list[range] = []
    for x in numbers:
        found[-1:] = [range(found[-1].start, x + 1)] if found and found[-1].stop == x else [*found[-1:], range(x, x + 1)]
    return found
