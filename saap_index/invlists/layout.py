"""Where tokens lie: the one place that decides the segments of a sequence. Knows lengths, not tensors.

The layout is a pure function of the number of tokens, so a prompt added at once, the same tokens added one at a time, and a
longer sequence truncated to the same length all end in the same state, bit for bit. Merges are part of it: what becomes due with
a block is carried out KV head by KV head over the tokens up to the next block, so that no token waits for more than some thousand
rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from ..errors import ParameterError

MAX_QUERY_TOKENS = 8
"""Queries per call of `search_attend`; as many tokens always stay in arrival order, so a causal tail never meets a segment."""

NEVER = 2**31 - 1
"""``break_even`` of an index that must not seal."""

FANOUT = 4
MIN_SEAL_TOKENS, MAX_SEAL_TOKENS = 64, 256

MERGE_ROWS = 4096
"""Rows, summed over KV heads, that a token merges at most, or one segment of one KV head where that is longer."""

Segment = tuple[int, int]


class Merging(NamedTuple):
    """A merge under way: segments [first, stop) are one for the first ``heads`` KV heads, 0 < heads < h.

    Until it is for all, the rows of such a head lie sorted across these segments, whose tables are cut at their bounds.
    """

    first: int
    stop: int
    heads: int


class Arrangement(NamedTuple):
    """How the sealed tokens of a sequence lie: segments [start, stop), oldest first, and which of them merge, or None."""

    segments: tuple[Segment, ...]
    merging: Merging | None = None

    @property
    def joined(self) -> tuple[Segment, ...]:
        """Its segments where those that merge are one."""
        if self.merging is None:
            return self.segments
        first, stop = self.merging.first, self.merging.stop
        return (*self.segments[:first], (self.segments[first][0], self.segments[stop - 1][1]), *self.segments[stop:])


NOTHING_SEALED = Arrangement(())


@dataclass(frozen=True)
class Layout:
    """Sinks, recent tokens and segments of one sequence, in tokens.

    sinks : the first tokens, always read. window : the last tokens, always read (at least this many).
    seal_tokens : tokens that leave the recent ones at a time, the smallest segment; 0 chooses the largest power of two that
    is at most the window, within 64 and 256, so that even the newest segment is as old as it is long.
    mean_run_tokens : a segment whose lists have that many tokens each, on average, keeps the mean key and value of each; they
    take at most 1 / mean_run_tokens of the memory of K and V (34: 3 %). 0: none does.
    max_segment : no segment is longer; the most rows that a token merges of one KV head. break_even : shorter sequences are not
    sealed; at 2048 tokens a small layer (3 KV heads, d = 64) was as fast dense as at 5 % on a CPU, a large one (8, d = 128) 1.5
    times slower.
    """

    sinks: int = 4
    window: int = 128
    seal_tokens: int = 0
    max_segment: int = 8192
    break_even: int = 2048
    mean_run_tokens: int = 0

    def __post_init__(self) -> None:
        names = ("sinks", "window", "seal_tokens", "max_segment", "break_even", "mean_run_tokens")
        for name in names:
            value, least = getattr(self, name), int(name == "max_segment")
            if isinstance(value, np.integer):
                value = int(value)
                object.__setattr__(self, name, value)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
                raise ParameterError(f"{name}: expected an integer of {least} or more (below 2**31), got {value!r}")

    @cached_property
    def recent(self) -> int:
        """Tokens that stay recent whenever a block is sealed."""
        return max(self.window, MAX_QUERY_TOKENS)

    @cached_property
    def block(self) -> int:
        if self.seal_tokens:
            return self.seal_tokens
        return min(MAX_SEAL_TOKENS, max(MIN_SEAL_TOKENS, 1 << max(0, self.window.bit_length() - 1)))

    def num_blocks(self, length: int) -> int:
        """Blocks that are sealed when a sequence has ``length`` tokens."""
        if length < self.break_even:
            return 0
        return max(0, (length - self.sinks - self.recent) // self.block)

    def segments(self, length: int) -> tuple[Segment, ...]:
        """The segments [start, stop) of a sequence of ``length`` tokens, oldest first.

        A segment is FANOUT**k aligned blocks, and never longer than it is old (blocks apart), age being the distance of its
        newest token from the end. As a sequence grows, segments only ever merge; the rule is that of log-structured merge
        trees (O'Neil et al., 1996) with age in place of fill. What is due when a block is sealed is one segment, for all KV
        heads, by the time of the next; see `arrangement`.
        """
        return self.arrangement(length, 1).segments

    def arrangement(self, length: int, heads: int) -> Arrangement:
        """`segments`, and which of them some of ``heads`` KV heads have merged already."""
        blocks = self.num_blocks(length)
        if not blocks:
            return NOTHING_SEALED
        steps = self._steps(blocks, heads)
        return steps[bisect_right(steps, self._offset(length, blocks), key=_offset_of) - 1][1]

    def next_change(self, length: int, heads: int) -> int:
        """The least number of tokens above ``length`` with another arrangement."""
        blocks = self.num_blocks(length)
        if blocks:
            steps, offset = self._steps(blocks, heads), self._offset(length, blocks)
            at = bisect_right(steps, offset, key=_offset_of)
            if at < len(steps):
                return length + steps[at][0] - offset
        return self.next_seal(length)[0]

    def next_seal(self, length: int) -> tuple[int, int]:
        """With how many tokens, more than ``length``, rows are sealed next, and the row past the last of them."""
        at = max(self.break_even, self._length_of(self.num_blocks(length) + 1))
        return at, self.sinks + self.num_blocks(at) * self.block

    def coming(self, length: int, heads: int) -> tuple[int, int, int]:
        """`next_change` and `next_seal`."""
        return self.next_change(length, heads), *self.next_seal(length)

    def merged_segments(self, length: int) -> tuple[Segment, ...]:
        """The segments of a sequence of ``length`` tokens as soon as no merge is under way."""
        return _segments(self.num_blocks(length), self.sinks, self.recent, self.block, self.max_segment)

    def _length_of(self, blocks: int) -> int:
        """With how many tokens so many blocks are sealed, where break_even does not matter."""
        return self.sinks + self.recent + blocks * self.block

    def _offset(self, length: int, blocks: int) -> int:
        return length - self._length_of(blocks)

    def _steps(self, blocks: int, heads: int) -> tuple[Step, ...]:
        return _steps(blocks, heads, self.sinks, self.recent, self.block, self.max_segment, MERGE_ROWS)

    def most_segments(self, length: int) -> int:
        """At least as many as a sequence of up to ``length`` tokens ever has segments.

        Of each size but the largest there are at most FANOUT that are too young to merge and FANOUT - 1 that lack a neighbour,
        when the newest block but one is done with its merges.
        """
        blocks = max(0, (length - self.sinks - self.recent) // self.block)
        largest, sizes = 1, 0
        while largest * FANOUT * self.block <= self.max_segment:
            largest, sizes = largest * FANOUT, sizes + 1
        return min(blocks, blocks // largest + sizes * (2 * FANOUT - 1) + 1)

    def num_means(self, segments: Sequence[Segment], nlist: int) -> int:
        """How many of these segments, the leading ones, keep the means of their runs: none is longer than the one before it."""
        if not self.mean_run_tokens:
            return 0
        return sum(stop - start >= self.mean_run_tokens * nlist for start, stop in segments)

    def most_means(self, length: int, nlist: int) -> int:
        """The most segments with means that a sequence of up to ``length`` tokens can have."""
        return length // (self.mean_run_tokens * nlist) if self.mean_run_tokens else 0


@lru_cache(maxsize=256)
def _segments(blocks: int, sinks: int, recent: int, block: int, max_segment: int) -> tuple[Segment, ...]:
    length = recent + blocks * block  # without sinks, when the newest block was sealed
    segments, i = [], 0
    while i < blocks:
        size = 1
        while True:
            bigger = size * FANOUT
            stop = i + bigger
            if i % bigger or stop > blocks or bigger * block > min(max_segment, length - stop * block):
                break
            size = bigger
        segments.append((sinks + i * block, sinks + (i + size) * block))
        i += size
    return tuple(segments)


Step = tuple[int, Arrangement]
"""From how many tokens after that which sealed the newest block on, and the arrangement from there on."""


def _offset_of(step: Step) -> int:
    return step[0]


@lru_cache(maxsize=256)
def _steps(
    blocks: int, heads: int, sinks: int, recent: int, block: int, max_segment: int, merge_rows: int
) -> tuple[Step, ...]:
    """What becomes of the segments until the next block is sealed: its merges one after the other, short ones first, each in as
    many tokens as its share of the rows allows, a few KV heads at a time."""
    before = _segments(blocks - 1, sinks, recent, block, max_segment)
    segments = (*before, (sinks + (blocks - 1) * block, sinks + blocks * block))
    new = set(_segments(blocks, sinks, recent, block, max_segment)) - set(segments)
    due = sorted(new, key=lambda x: (x[1] - x[0], x[0]))
    rows, merged = sum(stop - start for start, stop in due), 0
    steps: list[Step] = [(0, Arrangement(segments))]
    begin = 1
    for start, stop in due:
        merged += stop - start
        end = 1 + (block - 1) * merged // rows  # of its share of the offsets [1, block)
        pieces = [s for s, (low, high) in enumerate(segments) if start <= low and high <= stop]
        first, behind = pieces[0], pieces[-1] + 1
        together = max(1, merge_rows // (stop - start))
        parts = -(-heads // together)
        for offset in range(begin, end - 1):
            some = together * (parts * (offset - begin + 1) // (end - begin))
            if some and steps[-1][1].merging != (first, behind, some):
                steps.append((offset, Arrangement(segments, Merging(first, behind, some))))
        segments = (*segments[:first], (start, stop), *segments[behind:])
        steps.append((max(0, end - 1), Arrangement(segments)))
        begin = end
    last = {offset: arrangement for offset, arrangement in steps}  # of those at one token, the last
    return tuple(last.items())
