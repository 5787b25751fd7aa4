"""Stretches of positions that are gone, against sets of numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saap_index.invlists.gaps import Gaps

SETS = st.sets(st.integers(0, 60), max_size=40)


def gaps_of(positions: set[int]) -> Gaps:
    return Gaps.of(np.array(sorted(positions), np.int64))


def there(gone: set[int], n: int) -> list[int]:
    return [p for p in range(200) if p not in gone][:n]


def holds(gaps: Gaps, gone: set[int]) -> None:
    assert gaps.count == len(gone)
    assert gaps.positions(np.arange(100)).tolist() == there(gone, 100)
    assert (gaps.starts[1:] > gaps.stops[:-1]).all() and (gaps.stops > gaps.starts).all(), "no two touch"
    same = Gaps.of_array(gaps.array())
    assert np.array_equal(same.array(), gaps.array())


@given(gone=SETS, more=SETS, upto=st.integers(-1, 60))
def test_as_sets_of_positions(gone: set[int], more: set[int], upto: int) -> None:
    gaps, new = gaps_of(gone), more - gone
    holds(gaps, gone)
    ordered = np.array(sorted(new), np.int64)
    holds(gaps.with_more(ordered), gone | new)
    holds(gaps.closed_up(ordered), {p - sum(x < p for x in new) for p in gone})
    if upto not in gone:
        holds(gaps.up_to(upto), {p for p in gone if p < upto})
    assert gaps.up_to(100) is gaps


DAMAGED = [[[3, 2]], [[-1, 2]], [[1, 3], [3, 5]], [[4, 5], [1, 2]], [[1, 1]], [1, 2], [[1, 2, 3]]]


@pytest.mark.parametrize("array", DAMAGED, ids=str)
def test_what_is_no_gaps(array: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="gaps"):
        Gaps.of_array(np.array(array, np.int64))
