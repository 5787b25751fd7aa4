"""The spread of a model's budget: spends all, never less for more, never negative, and no other spread loses less."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saap_index.errors import NotFiniteError, ParameterError, ShapeError
from saap_index.training.budget import plan_budget

GRID = np.array([0, 0.01, 0.03, 0.1, 0.3, 1.0])
SEEDS = st.integers(0, 2**31 - 1)


def curves(seed: int, layers: int, heads: int, convex: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if convex:
        return rng.lognormal(0, 1, (layers, heads, 1)) * np.exp(-GRID * rng.lognormal(2, 1, (layers, heads, 1)))
    return rng.random((layers, heads, len(GRID)))


@given(
    seed=SEEDS, layers=st.integers(1, 5), heads=st.integers(1, 4), convex=st.booleans(), average=st.floats(0.001, 1.0),
    least=st.floats(0, 1), most=st.sampled_from([1.0, 1.5, 3.0, np.inf]),
)
def test_spends_the_total_and_stays_within_bounds(
    seed: int, layers: int, heads: int, convex: bool, average: float, least: float, most: float
) -> None:
    plan = plan_budget(curves(seed, layers, heads, convex), GRID, average, least, most)
    assert plan.shares.shape == (layers, heads)
    assert plan.shares.mean() == pytest.approx(1)
    read = plan.shares * average
    assert (read >= least * average * (1 - 1e-9)).all() and (read <= 1 + 1e-9).all()
    assert (plan.shares <= most + 1e-9).all() and (not convex or plan.planned <= plan.uniform + 1e-9)


@given(seed=SEEDS, convex=st.booleans(), averages=st.lists(st.floats(0.001, 1.0), min_size=2, max_size=6))
def test_no_head_gets_less_when_the_budget_grows(seed: int, convex: bool, averages: list[float]) -> None:
    losses = curves(seed, 3, 2, convex)
    reads = [plan_budget(losses, GRID, x, most=np.inf).shares * x for x in sorted(averages)]
    assert all((more >= less - 1e-9).all() for less, more in itertools.pairwise(reads))


@given(seed=SEEDS, average=st.floats(0.01, 0.9))
def test_no_worse_than_uniform_or_any_shift_between_two_heads(seed: int, average: float) -> None:
    losses = curves(seed, 2, 2, True)
    plan = plan_budget(losses, GRID, average, least=0.0, most=np.inf)
    assert plan.planned <= plan.uniform + 1e-9
    read = (plan.shares * average).ravel()
    flat = losses.reshape(4, -1)

    def loss(shares: np.ndarray) -> float:
        return sum(float(np.interp(s, GRID, c)) for s, c in zip(shares, flat, strict=True))

    for giver, taker in itertools.permutations(range(4), 2):
        moved = read.copy()
        step = min(0.005, moved[giver], 1 - moved[taker])
        moved[giver] -= step
        moved[taker] += step
        assert loss(moved) >= loss(read) - 1e-9


def test_equal_heads_get_equal_shares_where_a_corner_allows_and_needy_ones_more() -> None:
    curve = np.exp(-GRID * 20)
    losses = np.stack([curve, curve, 10 * curve])[:, None]
    plan = plan_budget(losses, GRID, 0.1)
    assert plan.shares[2, 0] > plan.shares[0, 0] and plan.planned < plan.uniform


def test_a_layer_that_loses_everywhere_is_flagged_dense() -> None:
    falling, stubborn = np.exp(-GRID * 200), 50 * (1 - GRID)
    plan = plan_budget(np.stack([np.stack([falling] * 2)] * 9 + [np.stack([stubborn] * 2)]), GRID, 0.1)
    assert plan.dense == (9,)


def test_a_rising_curve_counts_as_flat() -> None:
    plan = plan_budget(np.array([[[1.0, 2, 3, 4, 5, 6], [6.0, 5, 4, 3, 2, 1]]]), GRID, 0.5, least=0.1)
    assert plan.shares[0, 1] > plan.shares[0, 0]


def test_refuses_wrong_arguments() -> None:
    losses = curves(0, 2, 2, True)
    with pytest.raises(ShapeError, match="losses"):
        plan_budget(losses[0], GRID, 0.1)
    with pytest.raises(ShapeError, match="losses"):
        plan_budget(losses, GRID[:-1], 0.1)
    with pytest.raises(NotFiniteError, match="losses"):
        plan_budget(losses * np.nan, GRID, 0.1)
    with pytest.raises(ParameterError, match="grid"):
        plan_budget(losses, GRID[::-1], 0.1)
    with pytest.raises(ParameterError, match="average"):
        plan_budget(losses, GRID, 0.0)
