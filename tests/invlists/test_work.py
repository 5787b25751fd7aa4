"""What adding a token costs: rows that it moves and rows that it assigns, counted; bounded at any length, whatever is due."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import random_router, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saap_index import AsymmetricIndex, KeyQuantizer, Layout
from saap_index.invlists import layout as layouts
from saap_index.invlists.ahead import AHEAD_ROWS, AHEAD_TOKENS, due_rows, next_time

MERGE_ROWS = 4096


@pytest.fixture(autouse=True)
def _defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "MERGE_ROWS", MERGE_ROWS)


def index_of(heads: int, **options: object) -> AsymmetricIndex:
    index = AsymmetricIndex(8, 4, heads, heads, **options)  # type: ignore[arg-type]
    index.key_quantizer = KeyQuantizer(torch.randn((heads, 4, 8), generator=torch.Generator().manual_seed(0)))
    index.query_router = random_router(heads, 4, 8)
    return index


def work(index: AsymmetricIndex, keys: Tensor, values: Tensor) -> Iterator[tuple[int, int]]:
    """Rows moved and rows assigned by each token, added one at a time."""
    for t in range(keys.shape[2]):
        lists = index.invlists
        moved, assigned = lists.rows_moved, lists.rows_assigned
        index.add(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        yield lists.rows_moved - moved, lists.rows_assigned - assigned


@pytest.mark.parametrize("storage", [None, "SQ8"])
@pytest.mark.parametrize("start", [8192 + 3900, 32768 + 7900])
def test_a_token_moves_and_assigns_a_bounded_number_of_rows(start: int, storage: str | None) -> None:
    """With the default layout, over the whole of a block with which segments of all sizes are due."""
    heads = 8
    index = index_of(heads, storage=storage)
    layout = index.layout
    blocks = next(n for n in range(start // layout.block, 10**6) if n % 64 == 63)  # merges of 4, 16 and 64 blocks
    begin = layout.sinks + layout.recent + (blocks - 1) * layout.block + 3
    keys, values = tokens(1, heads, begin + 2 * layout.block, 8), tokens(1, heads, begin + 2 * layout.block, 8, seed=1)
    index.add(keys[:, :, :begin], values[:, :, :begin])
    each = list(work(index, keys[:, :, begin:], values[:, :, begin:]))
    moved, assigned = zip(*each, strict=True)
    assert max(moved) <= max(MERGE_ROWS, layout.max_segment, heads * layout.block)
    assert sum(moved) == heads * (2 * layout.block + 512 + 2048 + 8192), "the merges of all sizes, and two blocks"
    assert max(assigned) <= heads * AHEAD_ROWS and sum(assigned) == heads * 2 * layout.block
    assert not any(m and a for m, a in each if m > heads * layout.block), "a token that merges does not assign"
    again = index_of(heads, storage=storage)
    again.add(keys, values)
    one, other = index.invlists, again.invlists
    assert one.arrangement(0) == other.arrangement(0) and torch.equal(one.row_ids(0), other.row_ids(0))


def test_the_first_seal_assigns_nothing() -> None:
    """What is sealed at break_even was assigned by then, a few rows at a time."""
    index = index_of(2)
    n = index.break_even
    keys, values = tokens(1, 2, n + 1, 8), tokens(1, 2, n + 1, 8, seed=1)
    index.add(keys[:, :, :100], values[:, :, :100])
    assigned = [a for _, a in work(index, keys[:, :, 100:], values[:, :, 100:])]
    assert max(assigned) <= 2 * AHEAD_ROWS
    assert sum(assigned) == 2 * (index.layout.num_blocks(n) + 1) * index.layout.block, "and the block after it, 4 tokens later"
    assert index.invlists.segments[0] == index.layout.segments(n + 1) != ()


def test_the_longest_merge_is_of_one_head() -> None:
    """Over all lengths up to a million: so many rows, summed over heads, that a token moves."""
    layout, heads = Layout(), 8
    length, now, most, longest = 120_000, layout.arrangement(120_000, heads), 0, 0
    while length < 330_000:
        length = layout.next_change(length, heads)
        was, now = now, layout.arrangement(length, heads)
        moved = 0
        for start, stop in {*now.segments} - {*was.segments}:
            done = was.merging.heads if was.merging is not None and was.segments[was.merging.first][0] == start else 0
            moved += (heads - done) * (stop - start)
        if now.merging is not None:
            parts = now.segments[now.merging.first], now.segments[now.merging.stop - 1]
            done = was.merging.heads if was.merging is not None and was.merging[:2] == now.merging[:2] else 0
            moved += (now.merging.heads - done) * (parts[1][1] - parts[0][0])
        most, longest = max(most, moved), max(longest, *(stop - start for start, stop in now.segments))
    assert longest == layout.max_segment == 8192 and most == 8192


@given(sealed_at=st.integers(0, 5000), rows=st.integers(0, 3000), recent=st.integers(8, 600))
def test_rows_known_ahead_come_a_few_at_a_time(sealed_at: int, rows: int, recent: int) -> None:
    """Each time when `next_time` says, never more than AHEAD_ROWS, and all but the last before the seal where there is room."""
    stop = max(0, sealed_at - recent)
    known = first = max(0, stop - rows)
    at = next_time(sealed_at, known, stop)
    for length in range(first, sealed_at):
        until, _ = due_rows(length, sealed_at, known, stop)
        assert (until > known) == (length >= at > 0 or (length >= at and until > known)) and until <= max(known, length)
        if length > first:
            assert until - known <= AHEAD_ROWS
        if until > known:
            known = until
            at = next_time(sealed_at, known, stop)
            assert at > length
    if recent >= AHEAD_TOKENS and first < sealed_at:
        assert known == stop
