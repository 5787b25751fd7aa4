"""What a `CudaSession` keeps from step to step: budgets of a plan, workspaces, and launches that are bound to memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..codes import META
from ..types import Budget, Probed, Routing, Sample
from .codes import CodedLaunch, CodedScan
from .launch import Launch
from .route import Route
from .route_select import RouteSelect
from .scan import Listed, Runs, Scan
from .select import Select


@dataclass(eq=False)
class DeviceNumbers:
    """What of a batch lies on the device beside its arena. meta : int32 (b, 8); spans : int32 (2, b, 4), of codes: for searches,
    and where all is read; counts : int32 (b,), of a step's tokens; centres : float32 (b, S).

    tickets : int32, of every scan: each appended token makes them zeros again, so that what a misuse left in them is gone a step
    later. As many as a step of few query vectors has; more move to other memory, and launches are bound anew.
    """

    meta: Tensor
    spans: Tensor
    counts: Tensor
    centres: Tensor
    tickets: Tensor

    @classmethod
    def zeros(cls, b: int, h: int, device: torch.device) -> DeviceNumbers:
        sizes = (b, META), (2, b, 4), (b,), (b, 0), (b * h,)
        dtypes = torch.int32, torch.int32, torch.int32, torch.float32, torch.int32
        return cls(*(torch.zeros(size, dtype=x, device=device) for size, x in zip(sizes, dtypes, strict=True)))

    def memory(self) -> Iterator[Tensor]:
        yield from (self.meta, self.spans, self.counts, self.centres, self.tickets)


@dataclass(frozen=True, eq=False)
class Packed:
    """Budgets of a plan, what of them is sampled, if anything ever is, and lists that a selection within them is written to."""

    budgets: Tensor
    mean_entries: Tensor | None
    unread_mass: Tensor | None
    nprobe: int
    selected: Probed
    sample: Sample | None = None

    def memory(self) -> Iterator[Tensor | None]:
        yield from (self.budgets, self.mean_entries, self.unread_mass)
        yield from (self.selected.rows, self.selected.counts, self.selected.tail, self.selected.tail_counts)
        if self.sample is not None:
            yield from (self.sample.rows, self.sample.exponents, self.sample.caps)

    def numbers(self, budget: Budget) -> list[tuple[int, np.ndarray[Any, Any]]]:
        """Those of ``budget``, by the addresses where they belong."""
        writes = [(self.budgets.data_ptr(), budget.rows.numpy())]
        if self.mean_entries is not None:
            none = np.zeros(self.mean_entries.shape, np.int32)
            most = none if budget.mean_entries is None else budget.mean_entries.numpy()
            writes.append((self.mean_entries.data_ptr(), most))
        if self.sample is not None:
            of = budget.sample if budget.sample is not None else no_sample(self.budgets.shape)
            for name in ("rows", "exponents", "caps"):
                writes.append((getattr(self.sample, name).data_ptr(), getattr(of, name).numpy()))
        return writes


@dataclass(frozen=True, eq=False)
class TwoLaunches:
    """Route, then select, and what one hands to the other."""

    route: Route
    select: Select
    z: Tensor
    a: Tensor
    floats: Tensor

    def memory(self) -> Iterator[Tensor]:
        router = self.route.router
        yield from (self.z, self.a, self.floats, router.hidden, router.bias_hidden, router.out, router.bias_out)


@dataclass(frozen=True, eq=False)
class OneLaunch:
    """Both in one, where the device has clusters and the search is of the usual kind; and the runs that it finds."""

    launcher: RouteSelect
    runs: Tensor
    run_counts: Tensor
    weights: Tensor | None = None

    def memory(self) -> Iterator[Tensor]:
        router = self.launcher.router
        if self.weights is not None:
            yield self.weights
        yield from (self.runs, self.run_counts, router.hidden, router.bias_hidden, router.out, router.bias_out)


@dataclass(frozen=True, eq=False)
class Selecting:
    """How queries of one shape, dtype and router are routed and selected: launchers; and launches, the first of which takes the
    queries, with what the ids in their keys stand for."""

    by: TwoLaunches | OneLaunch
    bound: dict[Any, tuple[tuple[Launch, ...], Any]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Scanning:
    """Scan for queries of one shape and dtype; launches as in `Selecting`."""

    scan: Scan | CodedScan
    floats: Tensor
    bound: dict[Any, tuple[Launch | CodedLaunch, Probed | None, Any]] = field(default_factory=dict)


def runs_of(by: OneLaunch, packed: Packed) -> Runs:
    return Runs(by.runs, by.run_counts, packed.selected.counts, packed.selected.rows.shape[2], by.weights)


def listed_of(by: TwoLaunches | OneLaunch, packed: Packed) -> Listed | Runs:
    """Where that puts what it selects within ``packed``."""
    return runs_of(by, packed) if isinstance(by, OneLaunch) else Listed(packed.selected.rows, packed.selected.counts)


def queries_key(queries: Tensor) -> tuple[Any, ...]:
    return (*queries.shape[2:4], queries.dtype)


def selecting_key(queries: Tensor, routing: Routing, packed: Packed) -> tuple[Any, ...]:
    return queries_key(queries), packed.nprobe, packed.mean_entries is None, packed.sample is None, id(routing.router)


def no_sample(shape: Sequence[int]) -> Sample:
    """Of no row of a budget (b, h), on the host."""
    rows, ones = (torch.full(size, x, dtype=torch.int32, device="cpu") for size, x in ((shape, 0), (shape[1:], 1)))
    return Sample(rows, ones, torch.zeros(shape[1:], dtype=torch.float32, device="cpu"))


def evict(kept: dict[Any, Any], most: int) -> None:
    while len(kept) > most:
        kept.pop(next(iter(kept)))
