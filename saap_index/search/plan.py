"""How many tokens a search may read of each (sequence, KV head): kept from step to step until tokens are sealed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import Budget
from ..errors import CompatibilityError
from ..invlists.segmented import SegmentedInvertedLists
from ..routing.router import QueryRouter
from .params import SearchParametersIVF

MOST_PLANS = 16
"""Sets of search parameters for which a plan is kept."""


class _Plan:
    """What a selection needs of segments and parameters: the same from step to step, until tokens are sealed.

    Written to in one piece, so that threads may search one index.
    """

    __slots__ = ("budget", "key", "num_segments", "sealed", "search", "sinks", "version")

    def __init__(
        self, key: tuple[Any, ...], lists: SegmentedInvertedLists, router: QueryRouter, params: SearchParametersIVF,
        shares: np.ndarray | None, miss: Tensor | None,
    ) -> None:  # fmt: skip
        batch = range(lists.batch)
        self.version = lists.version
        self.key = key  # holds the objects, so that no other takes the place of one that is gone
        self.sinks, self.sealed = [lists.sinks(i) for i in batch], [lists.sealed(i) for i in batch]
        self.num_segments = [len(s) for s in lists.segments]
        sizes = [high - low for low, high in zip(self.sinks, self.sealed, strict=True)]
        budgets = params.budgets(sizes, lists.heads, shares)
        fits = everything_fits(params, router, sizes, budgets, miss)
        self.budget = None if fits else spend(lists, router, params, budgets, miss)
        self.search: tuple[Any, float, Any] | None = None  # router and scale, and what `Backend.prepare_search` made of them


def _plan(
    lists: SegmentedInvertedLists, router: QueryRouter, params: SearchParametersIVF, shares: np.ndarray | None,
    miss: Tensor | None,
) -> _Plan:  # fmt: skip
    """The plan of an earlier call with these parameters, kept with the lists, where it still holds."""
    key = params, router, shares, miss
    plan: _Plan | None = lists.plans.get(id(params))
    if plan is None or plan.version != lists.version or not all(map(operator.is_, plan.key, key)):
        if len(lists.plans) >= MOST_PLANS:
            lists.plans.clear()
        lists.plans[id(params)] = plan = _Plan(key, lists, router, params, shares, miss)
    return plan


def everything_fits(
    params: SearchParametersIVF, router: QueryRouter, sizes: Sequence[int], budgets: np.ndarray, miss: Tensor | None
) -> bool:
    """Whether budgets (b, h) allow every sealed token of every sequence, ``sizes`` of them, so that nothing need be chosen."""
    nprobe = params.nprobe or 0
    return miss is None and (not nprobe or nprobe >= router.nlist) and bool((budgets == np.array(sizes)[:, None]).all())


def spend(
    lists: SegmentedInvertedLists, router: QueryRouter, params: SearchParametersIVF, budgets: np.ndarray, miss: Tensor | None,
    device: torch.device | None = None,
) -> Budget:  # fmt: skip
    """Tokens to read, int32 (b, h), as rows and as entries of the tail: an entry costs the bytes of a row. On the device of the
    lists, or on ``device``."""
    device, nprobe = device or lists.keys.device, min(params.nprobe or 0, router.nlist)
    if not params.tail or nprobe:
        return Budget(torch.from_numpy(budgets).to(device), nprobe, miss)
    if not router.count_lists:
        raise CompatibilityError("tail: expected a query_router of mass per token, got the published classifier")
    means = [lists.num_means(i) for i in range(lists.batch)]
    most = np.array(means)[:, None] * lists.nlist
    entries = np.minimum(np.floor(budgets * params.tail + 1e-6), most).astype(np.int32)
    if not entries.any():
        return Budget(torch.from_numpy(budgets).to(device), nprobe, miss)
    rows = torch.from_numpy(budgets - entries).to(device)
    return Budget(rows, nprobe, miss, torch.from_numpy(entries).to(device), means)
