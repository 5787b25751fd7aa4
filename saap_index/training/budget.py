"""How a model's budget is best spread over its layers and KV heads. Knows measured curves and layers, not models.

Heads differ: one finds nearly all of its attention in a percent of the tokens, another needs twenty. What a head loses by reading
a share of its tokens is measured; every further token then goes to the head that gains most by it. On curves that fall ever
slower this greedy rule is the optimum (the rates are those of the lower convex hull); where a curve is not convex, a token is
worth what the next stretch of the hull gives per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import NotFiniteError, ParameterError, ShapeError
from ..routing.trained import TrainedLayer
from .measure import GRID

LEAST, MOST = 0.6, 3.0
"""Of the average, what every head gets at least and at most: the curves are of some texts, and others will differ; and what a
head of an early layer loses is a smaller loss to the model than its relative error says. On SmolLM2-135M a plan without these
bounds gave a third of the budget to the first layer, and the whole model was worse than with the same budget everywhere."""

LOOSE = 0.2
"""`LEAST` of the plan that names layers better left dense; it has no upper bound."""

DENSE_SHARE = 0.5
"""A layer that is planned to read so much of its tokens is better left dense: reading them in order is cheaper than by list."""


@dataclass(frozen=True)
class BudgetPlan:
    """shares : float64 (L, h), >= 0, mean 1, what the model's selectivity is multiplied with in each layer and KV head.

    average : the selectivity it was planned for, where no share of it exceeds 1; dense : places of layers in [0, L) to leave
    dense; uniform, planned : the loss, summed over all heads, with every share 1 and with these.
    """

    shares: np.ndarray
    average: float
    dense: tuple[int, ...]
    uniform: float
    planned: float


def plan_budget(
    losses: np.ndarray, grid: np.ndarray, average: float, least: float = LEAST, most: float = MOST
) -> BudgetPlan:
    """Spend ``average`` of all tokens where it helps most.

    losses : float (L, h, s), what is lost when a head reads the share grid[s] of its tokens, in one unit for all heads; a curve
        that rises is noise, and counts as flat there. grid : float (s,), rising from 0 to 1. least, most : of the average, for
        each head; most may be infinite.

    The shares spend the average exactly, and none gets more than all of its tokens. Without an upper bound a head never gets less
    if the average grows. Raises ShapeError, NotFiniteError, ParameterError.
    """
    curves, at = np.asarray(losses, np.float64), np.asarray(grid, np.float64)
    if curves.ndim != 3 or at.shape != curves.shape[2:] or len(at) < 2 or not curves.size:
        raise ShapeError(f"losses: expected (L, h, s) with s >= 2 as in grid, got {curves.shape} and {at.shape}")
    if not np.isfinite(curves).all():
        raise NotFiniteError("losses: expected finite numbers, got NaN or infinity")
    if at[0] != 0 or at[-1] != 1 or (np.diff(at) <= 0).any():
        raise ParameterError(f"grid: expected shares rising from 0 to 1, got {at.tolist()}")
    if not 0 < average <= 1 or not 0 <= least <= 1 or not most >= 1:
        raise ParameterError(
            f"average, least, most: expected 0 < average <= 1, 0 <= least <= 1 <= most, got {average!r}, {least!r}, {most!r}"
        )
    heads = curves.reshape(-1, len(at))
    shares = _spend(heads, at, average, least * average, min(1.0, most * average))
    loose = _spend(heads, at, average, LOOSE * average, 1.0).reshape(curves.shape[:2])
    dense = tuple(np.flatnonzero(loose.mean(1) >= max(DENSE_SHARE, average)).tolist()) if average < 1 else ()
    uniform, planned = (_loss(heads, at, x) for x in (np.full_like(shares, average), shares))
    spread: np.ndarray = shares.reshape(curves.shape[:2])
    return BudgetPlan(spread / spread.mean(), average, dense, uniform, planned)


def spread_budget(layers: Mapping[int, TrainedLayer], average: float) -> tuple[dict[int, TrainedLayer], dict[str, Any] | None]:
    """The layers, by number, with the shares that follow from their ``losses`` at `measure.GRID`, and the plan as plain data.

    Layers without losses have none, and take no part; where no layer has any, the second is None. Raises as `plan_budget` does.
    """
    measured = {number: layer.losses for number, layer in layers.items() if layer.losses is not None}
    if not measured:
        return {number: replace(layer, budget_shares=None) for number, layer in layers.items()}, None
    plan = plan_budget(np.stack(list(measured.values())), np.array(GRID), average)
    shares = dict(zip(measured, plan.shares.astype(np.float32), strict=True))
    numbers = list(measured)
    facts = {
        "average": plan.average, "grid": list(GRID), "dense_layers": [numbers[i] for i in plan.dense],
        "loss_uniform": plan.uniform, "loss_planned": plan.planned,
    }
    return {number: replace(layer, budget_shares=shares.get(number)) for number, layer in layers.items()}, facts


def _spend(heads: np.ndarray, grid: np.ndarray, average: float, low: float, high: float) -> np.ndarray:
    """Share of its tokens for each head, between two bounds: stretches of the hulls in the order of what they gain."""
    pieces: list[tuple[float, int, int, float, float]] = []  # rate, head, order, from, to
    for number, curve in enumerate(heads):
        for order, (start, stop, rate) in enumerate(_hull(grid, np.minimum.accumulate(curve))):
            if min(stop, high) > max(start, low):
                pieces.append((rate, number, order, max(start, low), min(stop, high)))
    shares, left = np.full(len(heads), low), (average - low) * len(heads)
    for _, number, _, start, stop in sorted(pieces, key=lambda piece: (-piece[0], piece[2], piece[1])):
        moved = min(stop - start, left)
        shares[number] += moved
        left -= moved
        if left <= 0:
            break
    return shares


def _hull(grid: np.ndarray, curve: np.ndarray) -> list[tuple[float, float, float]]:
    """The lower convex hull of a falling curve: stretches [start, stop) and what a whole share would gain at their rate."""
    corners = [0]
    for i in range(1, len(grid)):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (curve[b] - curve[a]) * (grid[i] - grid[a]) < (curve[i] - curve[a]) * (grid[b] - grid[a]):
                break
            corners.pop()
        corners.append(i)
    return [
        (float(grid[a]), float(grid[b]), float((curve[a] - curve[b]) / (grid[b] - grid[a])))
        for a, b in pairwise(corners)
    ]


def _loss(heads: np.ndarray, grid: np.ndarray, shares: np.ndarray) -> float:
    return sum(float(np.interp(share, grid, curve)) for share, curve in zip(shares, heads, strict=True))
