"""What a `CudaSession` keeps from step to step: budgets of a plan, workspaces, and launches that are bound to memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..types import Probed, Routing
from .codes import CodedLaunch, CodedScan
from .launch import Launch
from .route import Route
from .route_select import RouteSelect
from .scan import Listed, Runs, Scan
from .select import Select


@dataclass(frozen=True, eq=False)
class Packed:
    """Budgets of a plan, and the lists that a selection within them is written to."""

    budgets: Tensor
    mean_entries: Tensor | None
    unread_mass: Tensor | None
    nprobe: int
    selected: Probed


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

    def memory(self) -> Iterator[Tensor]:
        router = self.launcher.router
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
    return Runs(by.runs, by.run_counts, packed.selected.counts, packed.selected.rows.shape[2])


def listed_of(by: TwoLaunches | OneLaunch, packed: Packed) -> Listed | Runs:
    """Where that puts what it selects within ``packed``."""
    return runs_of(by, packed) if isinstance(by, OneLaunch) else Listed(packed.selected.rows, packed.selected.counts)


def queries_key(queries: Tensor) -> tuple[Any, ...]:
    return (*queries.shape[2:4], queries.dtype)


def selecting_key(queries: Tensor, routing: Routing, packed: Packed) -> tuple[Any, ...]:
    return queries_key(queries), packed.nprobe, packed.mean_entries is None, id(routing.router)


def evict(kept: dict[Any, Any], most: int) -> None:
    while len(kept) > most:
        kept.pop(next(iter(kept)))
