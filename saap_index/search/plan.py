"""How many tokens a search may read of each (sequence, KV head): what parameters come to over the segments there are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..backends import Budget, Plan, Sample
from ..backends.types import MAX_SAMPLED
from ..errors import CompatibilityError, DeviceError
from ..invlists.segmented import SegmentedInvertedLists
from ..routing.router import QueryRouter
from ..routing.sampling import CAP, EXPONENT, Sampling
from ..routing.trained import TrainedLayer
from .params import SearchParametersIVF

Terms = tuple[SearchParametersIVF, QueryRouter, np.ndarray | None, Tensor | None, Sampling | None]
"""What a plan follows from: parameters, router, budget shares, unread mass and sampling, as in `new_plan`. Kept by identity."""

MOST_PLANS = 16
"""Sets of search parameters for which a plan is kept, beside those that a graph reads."""


def terms_of(layer: TrainedLayer, params: SearchParametersIVF, device: torch.device) -> Terms:
    """What a plan of this layer for these parameters follows from."""
    unread = None if params.target_mass is None else layer.unread_mass(params.target_mass, device)
    return params, layer.router, layer.budget_shares, unread, layer.sampling


def new_plan(
    lists: SegmentedInvertedLists, params: SearchParametersIVF, router: QueryRouter, shares: np.ndarray | None,
    unread_mass: Tensor | None, sampling: Sampling | None, for_good: bool,
) -> tuple[Plan, Budget]:
    """A plan and its first budget.

    shares : float32 (h,), factors of the budget, or None for 1 each; unread_mass : float32 (h,), see `Budget`, or None.
    sampling : what is sampled of a budget where ``params`` say nothing, or None. for_good : whether memory is made for any later
    budget as well.

    DeviceError for a sample that was asked for, of a backend that reads none; a RuntimeWarning for one that was calibrated.
    """
    plan = Plan((params, router, shares, unread_mass, sampling))
    _check_sample(lists, params, router, sampling)
    if for_good:
        capacity = [lists.capacity] * lists.batch
        most = params.budgets(capacity, lists.heads, shares)
        plan.always_dense, plan.max_rows = covers_all(params, router, capacity, most, unread_mass), int(most.max())
        runs = lists.mean_keys.shape[2] * lists.nlist if params.tail and not params.nprobe else 0
        plan.max_entries = min(plan.max_rows, runs)
        plan.samples = sample_of(lists, params, router, sampling, [2 * n for n in capacity], most) is not None
        if params.tail:
            _check_tail(params, router)
    return plan, budget_of(plan, lists)


def budget_of(plan: Plan, lists: SegmentedInvertedLists) -> Budget:
    """What a search by this plan may read of the present segments, on the host; sets whether that is everything."""
    params, router, shares, unread_mass, sampling = plan.key
    sizes = [lists.sealed(i) - lists.sinks(i) for i in range(lists.batch)]
    budgets = params.budgets(sizes, lists.heads, shares)
    plan.dense = covers_all(params, router, sizes, budgets, unread_mass)
    nprobe, rows = min(params.nprobe or 0, router.nlist), torch.from_numpy(budgets)
    if not params.tail or nprobe or plan.dense:
        sample = None if plan.dense else sample_of(lists, params, router, sampling, sizes, budgets)
        return Budget(rows, nprobe, unread_mass, sample=sample)
    _check_tail(params, router)
    means = [lists.num_means(i) for i in range(lists.batch)]
    runs = np.array(means)[:, None] * lists.nlist
    mean_entries = np.minimum(np.floor(budgets * params.tail + 1e-6), runs).astype(np.int32)
    if not mean_entries.any():
        return Budget(rows, nprobe, unread_mass)
    # an entry of the tail costs the bytes of a row
    return Budget(torch.from_numpy(budgets - mean_entries), nprobe, unread_mass, torch.from_numpy(mean_entries), means)


def sample_of(
    lists: SegmentedInvertedLists, params: SearchParametersIVF, router: QueryRouter, sampling: Sampling | None,
    sizes: Sequence[int], budgets: np.ndarray,
) -> Sample | None:
    """What of budgets, int32 (b, h), is sampled from sequences with ``sizes`` sealed tokens; None if nothing is."""
    if not params.samples or not router.size_weighted or not lists.backend.reads_samples:
        return None
    found = sampling_of(params, sampling, lists.heads)
    rows = None if found is None else sampled_rows(budgets, found.shares, sizes)
    if found is None or rows is None or not rows.any():
        return None
    return Sample(torch.from_numpy(rows), *of_sample(found))


def sampling_of(params: SearchParametersIVF, sampling: Sampling | None, heads: int) -> Sampling | None:
    """What these parameters make of what was calibrated, None for nothing; None where nothing is sampled."""
    if not params.samples or (sampling is None and params.sampled_share is None):
        return None
    if sampling is None:
        sampling = Sampling(*(np.full(heads, x, np.float32) for x in (0.0, EXPONENT, CAP)))
    said = (params.sampled_share, params.sample_exponent, params.sample_cap)
    calibrated = (sampling.shares, sampling.exponents, sampling.caps)
    return Sampling(*(y if x is None else np.full(heads, x, np.float32) for x, y in zip(said, calibrated, strict=True)))


def sampled_rows(budgets: np.ndarray, shares: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Of budgets, int32 (..., b, h), what is sampled from sequences with ``sizes`` sealed tokens; shares : float32 (..., h)."""
    rows = np.floor(budgets * shares[..., None, :].astype(np.float64) + 1e-6).astype(np.int32)
    rows[budgets >= np.array(sizes)[:, None]] = 0  # all is read for certain
    return np.minimum(rows, np.int32(MAX_SAMPLED))


def of_sample(sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Exponents and caps as `Sample` takes them."""
    return torch.from_numpy(np.round(4 * sampling.exponents).astype(np.int32)), torch.from_numpy(sampling.caps.copy())


def _check_sample(
    lists: SegmentedInvertedLists, params: SearchParametersIVF, router: QueryRouter, sampling: Sampling | None
) -> None:
    if params.sampled_share and not router.size_weighted:
        raise CompatibilityError("sampled_share: expected a query_router of mass per token, got the published classifier")
    backend = lists.backend
    if not params.samples or backend.reads_samples:
        return
    if params.sampled_share:
        raise DeviceError(
            f"sampled_share: expected a backend that reads samples, got {params.sampled_share} and backend {backend.name!r}"
        )
    if sampling is not None and sampling.shares.any():
        warnings.warn(
            f"sampled_share: these routers are calibrated to spend a part of the budget on a weighted sample, which backend "
            f"{backend.name!r} does not read: all of it goes to the best runs; sampled_share=0 says so without a warning",
            RuntimeWarning,
            stacklevel=2,
        )


def _check_tail(params: SearchParametersIVF, router: QueryRouter) -> None:
    if not params.nprobe and not router.size_weighted:
        raise CompatibilityError("tail: expected a query_router of mass per token, got the published classifier")


def covers_all(
    params: SearchParametersIVF, router: QueryRouter, sizes: Sequence[int], budgets: np.ndarray, unread_mass: Tensor | None
) -> bool:
    """Whether budgets (b, h) allow every sealed token of every sequence, ``sizes`` of them, so that nothing need be chosen."""
    nprobe = params.nprobe or 0
    return unread_mass is None and (not nprobe or nprobe >= router.nlist) and bool((budgets == np.array(sizes)[:, None]).all())
