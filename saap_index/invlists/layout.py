"""Where tokens lie: the one place that decides the segments of a sequence. Knows lengths, not tensors.

The layout is a pure function of the number of tokens, so a prompt added at once, the same tokens added one at a time, and a
longer sequence truncated to the same length all end in the same state, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from ..errors import ParameterError

MAX_QUERY_TOKENS = 8
"""Queries per call of `search_attend`; as many tokens always stay in arrival order, so a causal tail never meets a segment."""

NEVER = 2**31 - 1
"""``break_even`` of an index that must not seal."""

FANOUT = 4
MIN_SEAL_TOKENS, MAX_SEAL_TOKENS = 64, 256

Segment = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Sinks, recent tokens and segments of one sequence, in tokens.

    sinks : the first tokens, always read. window : the last tokens, always read (at least this many).
    seal_tokens : tokens that leave the recent ones at a time, the smallest segment; 0 chooses the largest power of two that
    is at most the window, within 64 and 256, so that even the newest segment is as old as it is long.
    mean_run_tokens : a segment whose lists have that many tokens each, on average, keeps the mean key and value of each; they
    take at most 1 / mean_run_tokens of the memory of K and V (34: 3 %). 0: none does.
    max_segment : no segment is longer; bounds the pause of a merge. break_even : shorter sequences are not sealed; at 2048
    tokens a small layer (3 KV heads, d = 64) was as fast dense as at 5 % on a CPU, a large one (8, d = 128) 1.5 times slower.
    """

    sinks: int = 4
    window: int = 128
    seal_tokens: int = 0
    max_segment: int = 32768
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
        trees (O'Neil et al., 1996) with age in place of fill.
        """
        return _segments(self.num_blocks(length), self.sinks, self.recent, self.block, self.max_segment)

    def most_segments(self, length: int) -> int:
        """At least as many as a sequence of up to ``length`` tokens ever has segments.

        Of each size but the largest there are at most FANOUT that are too young to merge and FANOUT - 1 that lack a neighbour.
        """
        blocks = max(0, (length - self.sinks - self.recent) // self.block)
        largest, sizes = 1, 0
        while largest * FANOUT * self.block <= self.max_segment:
            largest, sizes = largest * FANOUT, sizes + 1
        return min(blocks, blocks // largest + sizes * (2 * FANOUT - 1))

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
