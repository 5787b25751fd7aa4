"""A search in one call of the backend: to the bit what its three operations give one by one, and it refuses what they refuse."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_router, small_index, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from saap_index import AsymmetricIndex, LengthError, Rope, SearchParametersIVF, ShapeError, StateError
from saap_index.backends import Budget, Search
from saap_index.backends.base import PreparedSearch
from saap_index.backends.cpu import CpuBackend
from saap_index.search.plan import _plan
from saap_index.search.select import _search

PARAMETERS = [
    {"selectivity": 0.2}, {"selectivity": 1e-6}, {"nprobe": 2}, {"target_mass": 0.5}, {"selectivity": 0.3, "tail": 0.4},
    {"target_mass": 0.7, "tail": 0.5, "max_codes": 9},
]  # fmt: skip


class Counting(CpuBackend):
    """Counts searches in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.prepared = 0

    def prepare_search(self, search: Search) -> PreparedSearch:
        self.prepared += 1
        prepared = super().prepare_search(search)

        def counted(*args: Any) -> Any:
            self.calls += 1
            return prepared(*args)

        return counted


def filled(lengths: list[int], **options: Any) -> AsymmetricIndex:
    index = small_index(32, 40, 4, 6, 2, backend="cpu", mean_run_tokens=2, **options)
    index._backend = Counting()
    b, n = len(lengths), max(lengths)
    index.add(tokens(b, 2, n, 32, index.dtype, 1), tokens(b, 2, n, 40, index.dtype, 2), lengths=lengths)
    return index


def counting(index: AsymmetricIndex) -> Counting:
    assert isinstance(index._backend, Counting)
    return index._backend


def assert_same(index: AsymmetricIndex, queries: torch.Tensor, params: SearchParametersIVF) -> None:
    before = counting(index).calls
    out, lse = index.search_attend(queries, params=params, return_lse=True)
    last = index._last
    assert last is not None
    assert counting(index).calls == before + (last.rows is not None)
    selection = index.select(queries, params=params)
    want, want_lse = index.attend_selected(queries, selection, return_lse=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    for name in ("rows", "counts", "tail", "tail_counts"):
        got, expected = getattr(last, name), getattr(selection, name)
        assert got is expected is None or torch.equal(got, expected), name


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=3), chosen=st.sampled_from(PARAMETERS), q=st.integers(1, 8),
    knots=st.integers(0, 5), rope=st.booleans(), seed=st.integers(0, 99), gone=st.integers(0, 60),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_one_call_gives_what_three_give(
    lengths: list[int], chosen: dict[str, float], q: int, knots: int, rope: bool, seed: int, gone: int, dtype: torch.dtype
) -> None:
    lengths = [max(lengths[0], 40), *lengths[1:]]
    index = filled(lengths, dtype=dtype, rope=Rope(32) if rope else None)
    index.query_router = random_router(2, 4, 32, knots, seed=seed)
    index.remove_ids(range(min(gone, min(lengths))))
    assert_same(index, tokens(len(lengths), 6, q, 32, torch.float32, seed), SearchParametersIVF(**chosen))  # type: ignore[arg-type]


def test_the_published_classifier() -> None:
    index = filled([150, 90])
    index.query_router = random_router(2, 4, 32, 0, count_lists=False)
    assert_same(index, tokens(2, 6, 2, 32), SearchParametersIVF(nprobe=2))


def test_it_follows_the_index() -> None:
    """Prepared once while nothing but lengths changes; anew when tokens are sealed or memory moves, never with what was."""
    index, params = filled([100]), SearchParametersIVF(selectivity=0.2)
    queries, key, value = tokens(1, 6, 1, 32, seed=5), tokens(1, 2, 1, 32, seed=6), tokens(1, 2, 1, 40, seed=7)
    index.reserve_memory(400)
    assert_same(index, queries, params)
    assert_same(index, queries, params)
    assert counting(index).prepared == 1
    index.add(key, value)
    assert_same(index, queries, params)
    assert counting(index).prepared == 1
    for _ in range(60):
        index.add(key, value)
        assert_same(index, queries, params)
    assert 1 < counting(index).prepared < 40
    index.reserve_memory(5000)
    assert_same(index, queries, params)
    index.truncate(70)
    assert_same(index, queries, params)
    index.window = 16
    assert_same(index, queries, params)
    fork = index.fork()
    fork.add(value[..., :32], value)
    assert_same(index, queries, params)
    assert_same(fork, queries, params)
    index.reset()
    index.add(tokens(1, 2, 90, 32), tokens(1, 2, 90, 40))
    assert_same(index, queries, params)


CHANGES: dict[str, Callable[[AsymmetricIndex, torch.Tensor, torch.Tensor], object]] = {
    "others in their place": lambda x, k, v: (x.remove_ids(range(20, 60)), x.add(k[:, :, :40], v[:, :, :40])),
    "one sequence": lambda x, k, v: (x.remove_ids([range(20, 60), []]), x.add(k[:, :, :40], v[:, :, :40], lengths=[40, 0])),
    "padding": lambda x, k, v: (x.remove_ids(range(20, 60), close_gaps=True), x.add(k[:, :, :40], v[:, :, :40])),
    "swapped": lambda x, k, v: (x.remove_ids([range(20, 60), range(5)]), x.reorder([1, 0])),
    "anew": lambda x, k, v: (x.remove_ids(range(20, 60)), x.reset(), x.add(k[:, :, :110], v[:, :, :110])),
    "back and forth": lambda x, k, v: (x.remove_ids([145]), x.truncate(100), x.add(k[:, :, :49], v[:, :, :49])),
    "moved": lambda x, k, v: (x.remove_ids(range(30)), x.reserve_memory(900), x.reclaim_memory()),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_equal_lengths_are_no_sign_of_equal_tokens(change: Callable[..., object]) -> None:
    """Searched before and after, by a router of distance: positions that changed count, and a selection of before is refused."""
    index, params = filled([150, 150]), SearchParametersIVF(selectivity=0.2)
    index.query_router = random_router(2, 4, 32, 5, seed=3)
    queries = tokens(2, 6, 1, 32, seed=5)
    assert_same(index, queries, params)
    before = index.select(queries, params=params)
    change(index, tokens(2, 2, 150, 32, seed=8), tokens(2, 2, 150, 40, seed=9))
    assert_same(index, queries, params)
    with pytest.raises(StateError, match="selection"):
        index.attend_selected(queries, before)
    with pytest.raises(StateError, match="selection"):
        index.read_ids(before)
    fork = index.fork()
    assert torch.equal(index.search_attend(queries, params=params), fork.search_attend(queries, params=params))
    assert [index.invlists.centres(i).tolist() for i in range(2)] == [fork.invlists.centres(i).tolist() for i in range(2)]
    assert_same(fork, queries, params)


def test_memory_that_moved_is_given_back() -> None:
    index = filled([150])
    queries = tokens(1, 6, 1, 32)
    for chosen in PARAMETERS:
        index.search_attend(queries, params=SearchParametersIVF(**chosen))  # type: ignore[arg-type]
    held = [weakref.ref(x) for x in (index.invlists.keys, index.invlists.values, index.invlists.tables, index.invlists.mean_keys)]
    index.reserve_memory(5000)
    gc.collect()
    assert [x() for x in held] == [None] * 4


def test_where_it_is_not_for() -> None:
    index = filled([150])
    queries = tokens(1, 6, 1, 32)
    for params in (SearchParametersIVF(selectivity=0.1, window=60), SearchParametersIVF(selectivity=1.0)):
        index.search_attend(queries, params=params)
        assert counting(index).calls == 0
    index.search_attend(queries, coarse_queries=queries, params=SearchParametersIVF(selectivity=0.1))
    assert counting(index).calls == 0


def test_a_backend_without_it_is_asked_for_the_three() -> None:
    index = small_index(backend="torch", selectivity=0.2)
    assert index._backend.prepare_search(None) is None  # type: ignore[arg-type]
    index.add(tokens(1, 2, 150, 32, seed=1), tokens(1, 2, 150, 32, seed=2))
    queries = tokens(1, 4, 1, 32)
    assert torch.equal(index.search_attend(queries), index.attend_selected(queries, index.select(queries)))


def test_refusals() -> None:
    index = filled([150, 120])
    lists, router, cpu = index.invlists, index.query_router, counting(index)
    assert router is not None
    params = SearchParametersIVF(selectivity=0.2, max_codes=0)
    plan = _plan(lists, router, params, None, None)
    assert plan.budget is not None
    found = _search(lists, router, index._prepared_router, plan, plan.budget, 1.0)
    queries = tokens(2, 6, 1, 32).view(2, 2, 3, 1, 32)
    prepared = cpu.prepare_search(found)
    prepared(queries, None, [150, 120], [150, 120])
    with pytest.raises(LengthError, match=r"lengths: expected \d+ to \d+, got 5"):
        prepared(queries, None, [150, 120], [150, 5])
    with pytest.raises(LengthError, match="got 100000"):
        prepared(queries, None, [150, 120], [100000, 120])
    with pytest.raises(ShapeError, match="ends, lengths: expected 2 each, got 1, 2"):
        prepared(queries, None, [150], [150, 120])
    with pytest.raises(ShapeError, match="queries: expected shape"):
        prepared(queries[:1], None, [150, 120], [150, 120])
    with pytest.raises(LengthError, match="sinks <= sealed"):
        cpu.prepare_search(replace(found, sinks=[0, 200]))
    with pytest.raises(ShapeError, match="sinks, sealed: expected 2 each, got 1, 2"):
        cpu.prepare_search(replace(found, sinks=[0]))
    with pytest.raises(ShapeError, match="centres: expected shape"):
        cpu.prepare_search(replace(found, centres=found.centres[:, :1].contiguous()))
    broken = lists.tables.clone()
    broken[0, 0, 0, 2] = -7
    with pytest.raises(IndexError, match="not ascending"):
        cpu.prepare_search(replace(found, tables=broken))(queries, None, [150, 120], [150, 120])
    broken = lists.tables.clone()
    plenty = Budget(torch.full((2, 2), 10**6, dtype=torch.int32))
    prepared = cpu.prepare_search(replace(found, tables=broken, budget=plenty))
    broken[1, 1, 1, -1] += 10**5
    with pytest.raises(IndexError, match="more rows than they did"):
        prepared(queries, None, [150, 120], [150, 120])


def test_nan_stays_in_its_own_query() -> None:
    index = filled([150])
    index.selectivity = 0.2
    queries = tokens(1, 6, 1, 32)
    queries[0, 1, 0, 3] = np.nan
    out = index.search_attend(queries)
    assert out[0, 1].isnan().all() and out[0, [0, 2, 3, 4, 5]].isfinite().all()
