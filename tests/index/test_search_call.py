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
from profiles import examples

from saap_index import AsymmetricIndex, LayoutError, LengthError, Rope, SearchParametersIVF, ShapeError, StateError
from saap_index.backends import Budget, Plan, Routing, Session
from saap_index.backends.codes import SEGMENTS, SINKS
from saap_index.backends.cpu import CpuBackend, CpuSession
from saap_index.search.plan import new_plan

PARAMETERS = [
    {"selectivity": 0.2}, {"selectivity": 1e-6}, {"nprobe": 2}, {"target_mass": 0.5}, {"selectivity": 0.3, "tail": 0.4},
    {"target_mass": 0.7, "tail": 0.5, "max_codes": 9},
]


class CountingSession(CpuSession):
    """Counts searches in one call, and what is packed for them, for its backend."""

    def run(self, queries: torch.Tensor, routing: Routing, plan: Plan, scale: float) -> Any:
        counts = self.backend.counts  # type: ignore[attr-defined]
        with pytest.MonkeyPatch.context() as patch:
            for name in ("route", "probe", "scan") if not plan.dense else ():  # none of these
                patch.setattr(self.backend, name, None)
            found = super().run(queries, routing, plan, scale)
        counts["calls"] += not plan.dense
        return found

    def _pack(self, *args: Any) -> Any:
        self.backend.counts["packed"] += 1  # type: ignore[attr-defined]
        return super()._pack(*args)


class Counting(CpuBackend):
    def __init__(self) -> None:
        super().__init__()
        self.counts = {"calls": 0, "packed": 0}

    def session(self, *shape: Any) -> Session:
        return CountingSession(self)


def filled(lengths: list[int], **options: Any) -> AsymmetricIndex:
    index = small_index(32, 40, 4, 6, 2, backend="cpu", mean_run_tokens=2, **options)
    index._backend = Counting()
    b, n = len(lengths), max(lengths)
    index.add(tokens(b, 2, n, 32, index.dtype, 1), tokens(b, 2, n, 40, index.dtype, 2), lengths=lengths)
    return index


def counts(index: AsymmetricIndex) -> dict[str, int]:
    assert isinstance(index._backend, Counting)
    return index._backend.counts


def assert_same(index: AsymmetricIndex, queries: torch.Tensor, params: SearchParametersIVF) -> None:
    before = counts(index)["calls"]
    out, lse = index.search_attend(queries, params=params, return_lse=True)
    last = index._last
    assert last is not None
    assert counts(index)["calls"] == before + (last.rows is not None)
    selection = index.select(queries, params=params)
    want, want_lse = index.attend_selected(queries, selection, return_lse=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    for name in ("rows", "counts", "tail", "tail_counts"):
        got, expected = getattr(last, name), getattr(selection, name)
        assert got is expected is None or torch.equal(got, expected), name


@settings(max_examples=examples(60))
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=3), chosen=st.sampled_from(PARAMETERS), q=st.integers(1, 8),
    knots=st.integers(0, 5), rope=st.booleans(), seed=st.integers(0, 99), gone=st.integers(0, 60),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
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
    index.query_router = random_router(2, 4, 32, 0, size_weighted=False)
    assert_same(index, tokens(2, 6, 2, 32), SearchParametersIVF(nprobe=2))


def test_it_follows_the_index() -> None:
    """Packed once while nothing but lengths changes; anew when tokens are sealed or memory moves, never with what was."""
    index, params = filled([102]), SearchParametersIVF(selectivity=0.2)
    queries, key, value = tokens(1, 6, 1, 32, seed=5), tokens(1, 2, 1, 32, seed=6), tokens(1, 2, 1, 40, seed=7)
    index.reserve_memory(400)
    assert_same(index, queries, params)
    assert_same(index, queries, params)
    assert counts(index)["packed"] == 1
    index.add(key, value)
    assert_same(index, queries, params)
    assert counts(index)["packed"] == 1
    for _ in range(60):
        index.add(key, value)
        assert_same(index, queries, params)
    assert 1 < counts(index)["packed"] < 40
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
}


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
        assert counts(index)["calls"] == 0
    index.search_attend(queries, coarse_queries=queries, params=SearchParametersIVF(selectivity=0.1))
    assert counts(index)["calls"] == 0


def test_a_backend_without_it_is_asked_for_the_three() -> None:
    index = small_index(backend="torch", selectivity=0.2)
    index.add(tokens(1, 2, 150, 32, seed=1), tokens(1, 2, 150, 32, seed=2))
    assert type(index._session_of(index.invlists).backend_session) is Session
    queries = tokens(1, 4, 1, 32)
    assert torch.equal(index.search_attend(queries), index.attend_selected(queries, index.select(queries)))


def test_refusals() -> None:
    index = filled([150, 120])
    lists, router = index.invlists, index.query_router
    assert router is not None
    planned = new_plan(lists, SearchParametersIVF(selectivity=0.2, max_codes=0), router, None, None, None, for_good=False)
    routing = Routing(index._prepared_router, router.first_knot, router.size_weighted)
    queries = tokens(2, 6, 1, 32).view(2, 2, 3, 1, 32)
    index.search_attend(tokens(2, 6, 1, 32))
    placement = index._session_of(lists).backend_session._placement
    assert placement is not None

    def run(queries: torch.Tensor = queries, lengths: Any = (150, 120), budget: Budget | None = None, **changes: Any) -> Any:
        session = index._backend.session(2, 2, 32, 40, 4, index.dtype)
        arena = replace(placement.arena, tables=changes.pop("tables", lists.tables))
        session.publish(replace(placement, arena=arena, **changes), ())
        session.plan(planned[0], planned[1] if budget is None else budget)
        session.lengths = list(lengths)
        return session.run(queries, routing, planned[0], 1.0)

    def meta(column: int, value: int) -> np.ndarray:
        changed = placement.meta.copy()
        changed[1, column] = value
        return changed

    run()
    with pytest.raises(LengthError, match=r"lengths: expected \d+ to \d+, got 5"):
        run(lengths=[150, 5])
    with pytest.raises(LengthError, match="got 100000"):
        run(lengths=[100000, 120])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        run(lengths=[150])
    with pytest.raises(ShapeError, match="queries: expected shape"):
        run(queries[:1])
    with pytest.raises(LayoutError, match="queries: expected rows contiguous"):
        run(queries.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(LengthError, match="sinks <= sealed"):
        run(meta=meta(SINKS, 200))
    with pytest.raises(LengthError, match="num_segments: expected 0 to"):
        run(meta=meta(SEGMENTS, 99))
    with pytest.raises(ShapeError, match="centres: expected shape"):
        run(centres=placement.centres[:, :1].copy())
    broken = lists.tables.clone()
    broken[0, 0, 0, 2] = -7
    with pytest.raises(IndexError, match="not ascending"):
        run(tables=broken)
    broken = lists.tables.clone()
    session = index._backend.session(2, 2, 32, 40, 4, index.dtype)
    session.publish(replace(placement, arena=replace(placement.arena, tables=broken)), ())
    session.plan(planned[0], Budget(torch.full((2, 2), 10**6, dtype=torch.int32)))
    session.run(queries, routing, planned[0], 1.0)
    broken[1, 1, 1, -1] += 10**5
    with pytest.raises(IndexError, match="more rows than they did"):
        session.run(queries, routing, planned[0], 1.0)


def test_nan_stays_in_its_own_query() -> None:
    index = filled([150])
    index.selectivity = 0.2
    queries = tokens(1, 6, 1, 32)
    queries[0, 1, 0, 3] = np.nan
    out = index.search_attend(queries)
    assert out[0, 1].isnan().all() and out[0, [0, 2, 3, 4, 5]].isfinite().all()
