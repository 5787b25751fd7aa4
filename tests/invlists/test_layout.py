"""Where tokens lie: properties of `Layout.segments` for any parameters and any length."""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import assume, given
from hypothesis import strategies as st

from saap_index import Layout
from saap_index.invlists.layout import FANOUT, MAX_QUERY_TOKENS, MAX_SEAL_TOKENS, MIN_SEAL_TOKENS

LAYOUTS = st.builds(
    Layout, sinks=st.integers(0, 50), window=st.integers(0, 600), seal_tokens=st.one_of(st.just(0), st.integers(1, 300)),
    max_segment=st.one_of(st.integers(1, 3000), st.integers(1, 30_000)), break_even=st.one_of(st.just(0), st.integers(0, 4000)),
)
LENGTHS = st.one_of(st.integers(0, 3000), st.integers(0, 100_000))


@given(LAYOUTS, LENGTHS)
def test_segments_tile_what_is_sealed(layout: Layout, length: int) -> None:
    segments = layout.segments(length)
    assert len(segments) == 0 or segments[0][0] == layout.sinks
    assert all(a[1] == b[0] for a, b in pairwise(segments)), "no gap, no overlap"
    for start, stop in segments:
        blocks = (stop - start) // layout.block
        assert (stop - start) % layout.block == 0 and blocks == FANOUT ** round(math.log(blocks, FANOUT))
        assert (start - layout.sinks) % (stop - start) == 0, "aligned"
        assert stop - start <= max(layout.block, layout.max_segment)
    assert sum(stop - start for start, stop in segments) == layout.num_blocks(length) * layout.block


@given(LAYOUTS, LENGTHS)
def test_a_segment_is_never_longer_than_it_is_old(layout: Layout, length: int) -> None:
    for start, stop in layout.segments(length):
        age = length - stop
        assert stop - start <= max(layout.block, age)
        if layout.window >= layout.block:
            assert stop - start <= age


@given(LAYOUTS, LENGTHS)
def test_recent_tokens_are_a_window_and_less_than_a_block_more(layout: Layout, length: int) -> None:
    segments = layout.segments(length)
    assume(segments)
    recent = length - segments[-1][1]
    assert layout.window <= layout.recent <= recent < layout.recent + layout.block
    assert recent < max(layout.window, MAX_QUERY_TOKENS) + 2 * layout.block
    assert recent >= MAX_QUERY_TOKENS, "a causal tail never meets a segment"


@given(LAYOUTS, LENGTHS, st.integers(0, 2000))
def test_growing_only_merges(layout: Layout, length: int, more: int) -> None:
    new = layout.segments(length + more)
    for start, stop in layout.segments(length):
        assert sum(a <= start and stop <= b for a, b in new) == 1, "an old segment lies whole in one new segment"


@given(LAYOUTS, st.integers(0, 1500))
def test_growing_one_by_one_merges_few_tokens_at_a_time(layout: Layout, length: int) -> None:
    """Between two lengths that differ by one, only the newest block is new; everything else that changed is a merge."""
    old, new = layout.segments(length), layout.segments(length + 1)
    assume(old or length >= layout.break_even)
    assert layout.num_blocks(length + 1) - layout.num_blocks(length) in (0, 1)
    assert max((stop for _, stop in new), default=layout.sinks) - max((stop for _, stop in old), default=layout.sinks) in (
        0, layout.block,
    )


@given(LAYOUTS, LENGTHS)
def test_segments_are_few(layout: Layout, length: int) -> None:
    """Per size FANOUT**k: up to FANOUT - 1 of an unfinished parent, and the children of parents that are not yet old enough."""
    biggest = 0
    while FANOUT ** (biggest + 1) * layout.block <= layout.max_segment:
        biggest += 1
    blocks = layout.num_blocks(length)
    levels = min(biggest, math.ceil(math.log(max(1, blocks), FANOUT)))
    assert len(layout.segments(length)) <= 3 * FANOUT * (levels + 1) + blocks // FANOUT**biggest


@given(LAYOUTS, LENGTHS)
def test_nothing_is_sealed_below_break_even(layout: Layout, length: int) -> None:
    if length < layout.break_even:
        assert layout.segments(length) == () and layout.num_blocks(length) == 0
    else:
        free = Layout(layout.sinks, layout.window, layout.seal_tokens, layout.max_segment, 0)
        assert layout.segments(length) == free.segments(length), "from there on, as if it had never been"


@given(st.integers(0, 5000), st.integers(0, 1000))
def test_block(window: int, seal_tokens: int) -> None:
    block = Layout(window=window, seal_tokens=seal_tokens).block
    if seal_tokens:
        assert block == seal_tokens
    else:
        assert MIN_SEAL_TOKENS <= block <= MAX_SEAL_TOKENS and block & (block - 1) == 0
        assert block <= max(window, MIN_SEAL_TOKENS)
        assert block == MAX_SEAL_TOKENS or 2 * block > window, "the largest power of two that fits"


def test_defaults_reach_a_million_tokens_with_few_segments() -> None:
    layout = Layout()
    assert [len(layout.segments(n)) for n in (1023, 1024, 1156)] == [0, len(layout.segments(1024)), len(layout.segments(1156))]
    assert layout.segments(1023) == () and len(layout.segments(131_072)) < 40 and len(layout.segments(2**20)) < 150
