"""How many tokens a search may read of each (sequence, KV head): what parameters come to over the segments there are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..backends import Budget, Plan
from ..errors import CompatibilityError
from ..invlists.segmented import SegmentedInvertedLists
from ..routing.router import QueryRouter
from ..routing.trained import TrainedLayer
from .params import SearchParametersIVF

Terms = tuple[SearchParametersIVF, QueryRouter, np.ndarray | None, Tensor | None]
"""What a plan follows from: parameters, router, budget shares and unread mass, as in `new_plan`. Kept by identity."""

MOST_PLANS = 16
"""Sets of search parameters for which a plan is kept, beside those that a graph reads."""


def terms_of(layer: TrainedLayer, params: SearchParametersIVF, device: torch.device) -> Terms:
    """What a plan of this layer for these parameters follows from."""
    unread = None if params.target_mass is None else layer.unread_mass(params.target_mass, device)
    return params, layer.router, layer.budget_shares, unread


def new_plan(
    lists: SegmentedInvertedLists, params: SearchParametersIVF, router: QueryRouter, shares: np.ndarray | None,
    unread_mass: Tensor | None, for_good: bool,
) -> tuple[Plan, Budget]:
    """A plan and its first budget.

    shares : float32 (h,), factors of the budget, or None for 1 each; unread_mass : float32 (h,), see `Budget`, or None.
    for_good : whether memory is made for any later budget as well.
    """
    plan = Plan((params, router, shares, unread_mass))
    if for_good:
        capacity = [lists.capacity] * lists.batch
        most = params.budgets(capacity, lists.heads, shares)
        plan.always_dense, plan.max_rows = covers_all(params, router, capacity, most, unread_mass), int(most.max())
        runs = lists.mean_keys.shape[2] * lists.nlist if params.tail and not params.nprobe else 0
        plan.max_entries = min(plan.max_rows, runs)
        if params.tail:
            _check_tail(params, router)
    return plan, budget_of(plan, lists)


def budget_of(plan: Plan, lists: SegmentedInvertedLists) -> Budget:
    """What a search by this plan may read of the present segments, on the host; sets whether that is everything."""
    params, router, shares, unread_mass = plan.key
    sizes = [lists.sealed(i) - lists.sinks(i) for i in range(lists.batch)]
    budgets = params.budgets(sizes, lists.heads, shares)
    plan.dense = covers_all(params, router, sizes, budgets, unread_mass)
    nprobe, rows = min(params.nprobe or 0, router.nlist), torch.from_numpy(budgets)
    if not params.tail or nprobe or plan.dense:
        return Budget(rows, nprobe, unread_mass)
    _check_tail(params, router)
    means = [lists.num_means(i) for i in range(lists.batch)]
    runs = np.array(means)[:, None] * lists.nlist
    mean_entries = np.minimum(np.floor(budgets * params.tail + 1e-6), runs).astype(np.int32)
    if not mean_entries.any():
        return Budget(rows, nprobe, unread_mass)
    # an entry of the tail costs the bytes of a row
    return Budget(torch.from_numpy(budgets - mean_entries), nprobe, unread_mass, torch.from_numpy(mean_entries), means)


def _check_tail(params: SearchParametersIVF, router: QueryRouter) -> None:
    if not params.nprobe and not router.size_weighted:
        raise CompatibilityError("tail: expected a query_router of mass per token, got the published classifier")


def covers_all(
    params: SearchParametersIVF, router: QueryRouter, sizes: Sequence[int], budgets: np.ndarray, unread_mass: Tensor | None
) -> bool:
    """Whether budgets (b, h) allow every sealed token of every sequence, ``sizes`` of them, so that nothing need be chosen."""
    nprobe = params.nprobe or 0
    return unread_mass is None and (not nprobe or nprobe >= router.nlist) and bool((budgets == np.array(sizes)[:, None]).all())
