"""Budgets per KV head, and `target_mass`: as many tokens as the router thinks are needed, and a promise that holds elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_router, small_index, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backends import backend, check_probe, over_backends, probes, tables_of
from test_training import asymmetric, index_for
from torch import Tensor

from saap_index import (
    AsymmetricIndex,
    Calibration,
    CompatibilityError,
    LengthError,
    NotTrainedError,
    ParameterError,
    QueryRouter,
    SearchParametersIVF,
    ShapeError,
    TrainingConfig,
    reference,
)
from saap_index.backends import Budget
from saap_index.routing.calibration import TARGETS, WORD

INDEXES = pytest.mark.parametrize("name", ["cpu", "torch", "reference"])

# -- at the seam ----------------------------------------------------------------------------------------------------------


def left_unread(case: dict[str, Any], z: Tensor, a: Tensor) -> list[np.ndarray]:
    """Per KV head: the attention per query vector that is left before each run, in every sequence, best runs first."""
    b, h, j, _, _ = case["shape"]
    found: list[np.ndarray] = []
    for head in range(h):
        parts = [np.array([1.5, 1e-12])]
        for i in range(b):
            s = case["num_segments"][i]
            table = case["tables"][i, head, :s].numpy().astype(np.int64)
            arrays = (x.double().numpy() for x in (z[i, head], a[i, head], case["knots"][i, :s]))
            weights = reference.run_weights(*arrays, table, True)
            mass = (weights * np.diff(table, axis=1)).ravel()[np.argsort(-weights.ravel(), kind="stable")]
            parts.append(np.cumsum(mass[::-1]) / j)
        found.append(np.unique(np.concatenate(parts)))
    return found


def between(values: np.ndarray, place: float) -> float:
    """A number in a gap of sorted ``values`` that rounding cannot close, the one at that place among such gaps."""
    gaps = np.flatnonzero(values[1:] > values[:-1] * 1.001)
    low = gaps[min(int(place * len(gaps)), len(gaps) - 1)]
    return float(np.sqrt(values[low] * values[low + 1]))


@over_backends
@given(case=probes(), data=st.data(), ties=st.booleans(), tail=st.booleans())
@settings(max_examples=150)
def test_probe_until_enough(name: str, case: dict[str, Any], data: st.DataObject, ties: bool, tail: bool) -> None:
    b, h, j, nlist, m = case["shape"]
    m = max(1, m)
    z, a = (torch.from_numpy(case["r"].normal(size=(b, h, j, x)).astype(np.float32)) for x in (nlist, m))
    z, a = (torch.zeros_like(z), 0 * a + a[:, :, :1, :1]) if ties else (2 * z, a)
    if m <= 2:
        case["knots"] = torch.zeros_like(case["knots"])
    unread_mass = [between(x, data.draw(st.floats(0, 1))) for x in left_unread(case, z, a)]
    if data.draw(st.booleans()):
        unread_mass[0] = 0.0
    budget = replace(case["budget"], nprobe=0, unread_mass=torch.tensor(unread_mass, dtype=torch.float32))
    if data.draw(st.booleans()):
        budget = replace(budget, rows=torch.full((b, h), 10**6, dtype=torch.int32))
    if tail:
        budget = replace(budget, mean_entries=torch.full((b, h), 3, dtype=torch.int32), means=case["num_segments"])
    check_probe(name, {**case, "budget": budget, "size_weighted": True}, z, a)


@INDEXES
def test_runs_are_taken_until_little_is_left(name: str) -> None:
    """Two segments of two lists: runs of 2, 3, 1 and 4 rows, and a query that sends 0.9 of its attention outside."""
    tables = torch.from_numpy(tables_of(np.array([[[[2, 3], [1, 4]]]]), 1))
    z = torch.tensor([[[[0.0, np.log(3.0)]]]], dtype=torch.float32).expand(-1, -1, 2, -1).contiguous()  # 24 parts: 2 9 1 12
    a = torch.full((1, 1, 2, 1), float(np.log(9.0)))

    def rows(unread_mass: float, most: int = 99) -> list[int]:
        budget = Budget(torch.tensor([[most]], dtype=torch.int32), unread_mass=torch.tensor([unread_mass]))
        return backend(name).probe(z, a, torch.zeros((1, 2)), tables, [2], budget, True).rows[0, 0].tolist()

    assert rows(0.91) == []
    assert rows(0.89) == [7, 8, 9, 10] and rows(0.46) == [7, 8, 9, 10]
    assert rows(0.44) == [3, 4, 5, 7, 8, 9, 10] and rows(0.12) == [3, 4, 5, 7, 8, 9, 10]
    assert rows(0.11) == [3, 4, 5, 6, 7, 8, 9, 10] and rows(0.0) == list(range(1, 11))
    assert rows(0.0, 5) == [5, 7, 8, 9, 10], "the budget is a cap"


@over_backends
def test_a_head_that_looks_nowhere_else_reads_nothing(name: str) -> None:
    """Shares far below what single precision holds, or none at all: their attention is less than any that may stay unread."""
    tables = torch.from_numpy(tables_of(np.full((1, 3, 2, 4), 3), 0))
    a = torch.tensor([-200.0, -3e4, -torch.inf]).view(1, 3, 1, 1).contiguous()
    budget = Budget(torch.full((1, 3), 9, dtype=torch.int32), unread_mass=torch.tensor([1e-6, 1e-6, 1e-6]))
    found = backend(name).probe(torch.zeros((1, 3, 1, 4)), a, torch.zeros((1, 2)), tables, [2], budget, True)
    assert found.counts.tolist() == [[0, 0, 0]]


# -- budgets per KV head ---------------------------------------------------------------------------------------------------


@INDEXES
def test_budget_shares(name: str) -> None:
    index = small_index(32, 32, 4, 4, 2, backend=name, selectivity=0.2, budget_shares=[0.5, 3.0])
    index.add(tokens(2, 2, 300, 32, seed=1), tokens(2, 2, 300, 32, seed=2), lengths=[300, 120])
    queries = tokens(2, 4, 1, 32, seed=3)

    def counts(**params: float) -> list[list[int]]:
        found = index.select(queries, params=SearchParametersIVF(**params))
        return [[index.invlists.sealed(i) - 2] * 2 for i in range(2)] if found.counts is None else found.counts.tolist()

    sealed = [index.invlists.sealed(i) - 2 for i in range(2)]
    assert counts() == [[int(np.ceil(0.1 * n)), int(np.ceil(0.6 * n - 1e-6))] for n in sealed]
    assert counts(selectivity=0.5) == [[int(np.ceil(0.25 * n)), n] for n in sealed], "as many as are sealed at most"
    assert counts(max_codes=20) == [[min(20, int(np.ceil(0.1 * n))), 20] for n in sealed]
    assert counts(selectivity=1.0) == [[n, n] for n in sealed], "all is all"
    assert counts(nprobe=4) == [[n, n] for n in sealed], "nprobe knows no shares"
    assert index.budget_shares.dtype == np.float32 and index.budget_shares.tolist() == [0.5, 3.0]
    index.budget_shares = torch.tensor([0.0, 9.0])
    assert counts() == [[0, n] for n in sealed]
    index.budget_shares = None
    assert index.budget_shares is None and counts() == [[int(np.ceil(0.2 * n))] * 2 for n in sealed]
    assert index.fork().budget_shares is None


@pytest.mark.parametrize(
    "value, error, words",
    [
        ([1.0], ShapeError, "expected shape (2,), one factor per KV head, got (1,)"),
        (np.ones((1, 2)), ShapeError, "got (1, 2)"),
        ([1.0, -0.1], ParameterError, "expected finite numbers of 0 or more"),
        ([1.0, float("nan")], ParameterError, "expected finite numbers of 0 or more"),
        ("ab", ParameterError, "expected 2 numbers or None, got 'ab'"),
    ],
)
def test_bad_shares(value: Any, error: type[Exception], words: str) -> None:
    index = small_index(budget_shares=[1, 2])
    for call in (lambda: setattr(index, "budget_shares", value), lambda: small_index(budget_shares=value)):
        with pytest.raises(error) as caught:
            call()
        assert words in str(caught.value) and "budget_shares" in str(caught.value)
    assert index.budget_shares.tolist() == [1, 2]


# -- target_mass through the index -------------------------------------------------------------------------------------------


def predicted(index: AsymmetricIndex, queries: Tensor, rows: Tensor, head: int) -> float:
    """The attention per query that the router sees in sinks, window and whole runs that are read (of a cut one, in its part)."""
    lists, router = index.invlists, index.query_router
    x = queries[0, 2 * head : 2 * head + 2, 0].double().numpy()
    z, a = reference.route(x, *(w[head].double().numpy() for w in router.tensors().values()), router.nlist)
    tables = lists.tables[0, head, : len(lists.segments[0])].numpy().astype(np.int64)
    knots = router.knots(lists.next_position(0) - 1 - lists.centres(0)).astype(np.float64)
    weights = reference.run_weights(z, a, knots, tables, True)
    found = np.searchsorted(rows.numpy(), tables[:, 1:]) - np.searchsorted(rows.numpy(), tables[:, :-1])
    return float(1 - ((np.diff(tables, axis=1) - found) * weights).sum() / 2)


@INDEXES
def test_reads_until_the_router_expects_the_target(name: str) -> None:
    index = small_index(32, 32, 4, 4, 2, backend=name, seed=3)
    index.add(tokens(1, 2, 400, 32, seed=1), tokens(1, 2, 400, 32, seed=2))
    queries, sealed = 0.5 * tokens(1, 4, 1, 32, seed=5), index.invlists.sealed(0) - 2
    before = [0, 0]
    for target in (0.3, 0.6, 0.9, 0.99):
        selection = index.select(queries, params=SearchParametersIVF(target_mass=target, selectivity=1.0))
        for head in range(2):
            rows = selection.rows[0, head, : selection.counts[0, head]]
            assert predicted(index, queries, rows, head) >= target - 1e-6
            assert len(rows) >= before[head], "a higher target reads no less"
            before[head] = len(rows)
    assert max(before) > 0.3 * sealed and index.select(queries, params=SearchParametersIVF(target_mass=0.3)).rows.shape[2] < 200
    capped = index.select(queries, params=SearchParametersIVF(target_mass=0.999999))
    assert int(capped.counts.max()) == -(-sealed // 4), "a quarter of the sealed tokens, where nothing else is said"
    capped = index.select(queries, params=SearchParametersIVF(target_mass=0.999999, max_codes=7))
    assert int(capped.counts.max()) == 7
    index.attend_selected(queries, capped)


def test_parameters_of_an_index() -> None:
    index = small_index(target_mass=0.9)
    assert (index.target_mass, index.selectivity) == (0.9, 0.25)
    index.selectivity = 0.4
    assert (index.target_mass, index.selectivity) == (0.9, 0.4)
    index.target_mass = 0.8
    assert (index.target_mass, index.selectivity) == (0.8, 0.4)
    index.max_codes = 5
    assert (index.target_mass, index.selectivity, index.max_codes) == (0.8, 0.4, 5)
    index.target_mass = None
    assert (index.target_mass, index.selectivity) == (None, 0.4)
    index.nprobe = 3
    index.target_mass = None
    assert (index.target_mass, index.selectivity, index.nprobe) == (None, None, 3)
    index.target_mass = 0.5
    assert (index.target_mass, index.selectivity, index.nprobe) == (0.5, 0.25, None)
    assert small_index(target_mass=0.9, selectivity=0.1).selectivity == 0.1


def test_parameters_of_a_call() -> None:
    P = SearchParametersIVF
    fixed, adaptive = P(selectivity=0.05, max_codes=9), P(selectivity=0.4, target_mass=0.9)
    assert P(target_mass=0.8).over(fixed) == P(target_mass=0.8, selectivity=0.25, max_codes=9)
    assert P(target_mass=0.8).over(adaptive) == P(target_mass=0.8, selectivity=0.4)
    assert P(target_mass=0.8, selectivity=0.1).over(adaptive) == P(target_mass=0.8, selectivity=0.1)
    assert P(selectivity=0.1).over(adaptive) == P(selectivity=0.1)
    assert P(nprobe=2).over(adaptive) == P(nprobe=2)
    assert P(target_mass=0.8).over(P(nprobe=2)) == P(target_mass=0.8, selectivity=0.25)
    assert P(window=3).over(adaptive) == replace(adaptive, window=3)
    for bad in (0, 1, 0.0, 1.0, -0.5, True, "0.9", float("nan")):
        with pytest.raises(ParameterError, match="target_mass: expected 0 < target_mass < 1, got"):
            P(target_mass=bad)
    with pytest.raises(ParameterError, match=r"nprobe, target_mass: expected one of them, got nprobe=2, target_mass=0.5"):
        P(nprobe=2, target_mass=0.5)


@INDEXES
def test_routers_that_cannot_tell_refuse(name: str) -> None:
    index = small_index(32, 32, 4, 4, 2, backend=name)
    index.add(tokens(1, 2, 100, 32), tokens(1, 2, 100, 32))
    others = {
        "a symmetric one": QueryRouter.symmetric(index.key_quantizer.centroids),
        "the published classifier": random_router(2, 4, 32, knots=-1, size_weighted=False),
    }
    for kind, router in others.items():
        index.query_router = router
        with pytest.raises(CompatibilityError, match=f"target_mass: expected a query_router that predicts .*, got {kind}"):
            index.search_attend(tokens(1, 4, 1, 32), params=SearchParametersIVF(target_mass=0.9))
        with pytest.raises(CompatibilityError, match=f"calibrate: expected a query_router that predicts .*, got {kind}"):
            index.calibrate(tokens(1, 2, 99, 32), tokens(1, 4, 5, 32))


# -- calibration -----------------------------------------------------------------------------------------------------------


def test_tables() -> None:
    trusting = Calibration.trusting(2)
    for target in (0.5, 0.77, 0.9, 0.9995):
        assert torch.allclose(trusting.at(target), torch.full((2,), 1 - target), atol=1e-6)
    assert torch.allclose(trusting.at(0.2), torch.full((2,), 0.5)), "below the first entry, that one serves"
    unread_mass = torch.linspace(0.4, 0.01, len(TARGETS)).repeat(3, 1)
    table = Calibration(unread_mass)
    assert torch.allclose(table.at(TARGETS[3]), unread_mass[:, 3]) and float(table.at(1.0).max()) == 0
    for bad in (unread_mass.flip(1), unread_mass + 1, -unread_mass.flip(1), unread_mass * torch.nan):
        with pytest.raises(ParameterError, match="calibration: expected misses"):
            Calibration(bad)
    with pytest.raises(ShapeError, match="calibration: expected shape"):
        Calibration(unread_mass[:, 1:])


def test_a_calibration_belongs_to_a_router() -> None:
    index = small_index(32, 32, 4, 4, 2)
    index.calibration = Calibration.trusting(2)
    assert index.fork().calibration is index.calibration
    with pytest.raises(CompatibilityError, match="calibration: expected 2 KV heads, got 3"):
        index.calibration = Calibration.trusting(3)
    with pytest.raises(ParameterError, match="calibration: expected a Calibration or None, got float"):
        index.calibration = 0.9
    index.query_router = index.query_router
    assert index.calibration is None
    with pytest.raises(NotTrainedError, match="calibrate: expected a trained index"):
        AsymmetricIndex(32).calibrate(tokens(1, 1, 99, 32), tokens(1, 1, 5, 32))
    with pytest.raises(ParameterError, match="confidence: expected"):
        index.calibrate(tokens(1, 2, 99, 32), tokens(1, 4, 5, 32), confidence=1.0)
    with pytest.raises(LengthError, match="positions: expected queries past the window of a sealed sequence"):
        index.calibrate(tokens(1, 2, 99, 32), tokens(1, 4, 5, 32), positions=range(5))


def test_the_promise_holds_on_unseen_text() -> None:
    """A router trained on little, sure of itself: taken at its word it captures less than it says; calibrated it does not."""
    index = index_for(target_mass=0.8, selectivity=1.0)
    parts = [asymmetric(seed, 512, 64) for seed in (0, 1)]
    keys, queries = (torch.cat([p[k] for p in parts]) for k in (0, 1))
    positions = np.stack([np.asarray(p[2]).reshape(-1) for p in parts])
    index.train(keys, queries, positions=positions, config=TrainingConfig(epochs=60, lr=1e-2))

    def measured(seeds: range) -> tuple[float, float]:
        """Mean attention captured, and mean share of the sealed tokens that is read."""
        mass, share = [], []
        for seed in seeds:
            k, q, _ = asymmetric(seed, 512, 64)
            index.reset()
            index.add(k, k)
            last = index.invlists.lengths[0] - 1
            for i in range(0, 64, 4):
                query = q[:, :, i : i + 1]
                ids = index.read_ids(index.select(query))[0][0]
                true = torch.softmax(index.scale * k[0, 0, : last + 1] @ query[0, 0, 0], 0)
                mass.append(float(true[ids].sum()))
                share.append(len(ids) / (last + 1))
        index.reset()
        return float(np.mean(mass)), float(np.mean(share))

    trusted, _ = measured(range(20, 26))
    held = [asymmetric(seed, 512, 64) for seed in range(10, 14)]
    index.calibrate(
        torch.cat([p[0] for p in held]), torch.cat([p[1] for p in held]),
        positions=np.stack([np.asarray(p[2]).reshape(-1) for p in held]),
    )
    most = WORD * Calibration.trusting(1).unread_mass + 1e-6
    assert bool((index.calibration.unread_mass <= most).all()), "never as much as the router's own word"
    kept, share = measured(range(20, 26))
    assert trusted < 0.8 <= kept and share < 0.8, (trusted, kept, share)
