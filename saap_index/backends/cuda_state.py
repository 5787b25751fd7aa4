"""The resident state of a batch on a CUDA device: at most three launches a search, one an append, and no memory but the output.

Everything a launch needs lies ready: what the host publishes, a workspace for each shape of queries, budgets and row lists for
each set of search parameters. Knows kernels and their workspaces; positions and parameters come as numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bindings import gpu_build
from ..bindings.gpu_route import Route, Unturn
from ..bindings.gpu_scan import Listed, Means, Scan, ScanShape
from ..bindings.gpu_select import Select, SelectShape
from ..bindings.gpu_types import Runtime
from .base import Budget, Probed, Rotation
from .resident import FLAGS, MAX_STEP_TOKENS, Placement, Resident, Routing

Knobs = Mapping[str, dict[str, int]]

META = FLAGS + 1
_KEPT = 8
"""Shapes of queries, and routers, whose workspaces are kept."""


@dataclass(frozen=True)
class CudaLimits:
    """Budgets of one set of search parameters, and the lists that a selection within them is written to."""

    budgets: Tensor
    entries: Tensor | None
    miss: Tensor | None
    nprobe: int
    found: Probed


@dataclass(frozen=True)
class _Selecting:
    """Route and select for queries of one shape, dtype and router: launchers and what they write."""

    route: Route
    select: Select
    z: Tensor
    a: Tensor
    floats: Tensor


@dataclass(frozen=True)
class _Scanning:
    """Scan for queries of one shape and dtype."""

    scan: Scan
    floats: Tensor
    tickets: Tensor


class CudaResident(Resident):
    """See `Resident`. ``shape``: b, h, d, e, l."""

    def __init__(
        self, runtime: Runtime, device: torch.device, shape: tuple[int, int, int, int, int], dtype: torch.dtype, knobs: Knobs
    ) -> None:
        self._runtime, self._device, self._shape, self._dtype, self._knobs = runtime, device, shape, dtype, knobs
        b = shape[0]
        self._meta = torch.zeros((b, META), dtype=torch.int32, device=device)
        self._counts = torch.zeros((b,), dtype=torch.int32, device=device)
        self._tickets = torch.zeros((b,), dtype=torch.int32, device=device)
        self._centres = torch.zeros((b, 0), device=device)
        self._at: Placement | None = None
        self._selecting: dict[Any, _Selecting] = {}
        self._scanning: dict[Any, _Scanning] = {}
        self._held: list[Any] = []  # what graphs hold addresses of
        self._stream: Any = None
        self._lock = threading.Lock()  # parameter structs and workspaces serve one call at a time

    # -- what the host decides ---------------------------------------------------------------------------------------

    @property
    def capturing(self) -> bool:
        return bool(getattr(self._runtime, "capturing", False))

    def enter(self) -> None:
        if self._device.type != "cuda" or self.capturing:
            return
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def publish(self, placement: Placement) -> None:
        before, self._at = self._at, placement
        if before is None or any(
            getattr(before, name).shape != getattr(placement, name).shape for name in ("keys", "tables", "mean_keys")
        ):
            self._selecting.clear()
            self._scanning.clear()
        if self._centres.shape != placement.centres.shape:
            self._centres = torch.zeros(placement.centres.shape, device=self._device)
        self._centres.copy_(torch.from_numpy(placement.centres))
        self._meta[:, :FLAGS].copy_(torch.from_numpy(placement.meta))

    def limits(self, budget: Budget, most_rows: int, most_entries: int) -> CudaLimits:
        b, h = self._shape[:2]

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self._device)

        found = Probed(ints(b, h, most_rows), ints(b, h))
        if most_entries:
            found = Probed(found.rows, found.counts, ints(b, h, most_entries), ints(b, h))
        made = CudaLimits(ints(b, h), ints(b, h) if most_entries else None, budget.miss, budget.nprobe, found)
        self.fill(made, budget)
        return made

    def fill(self, limits: CudaLimits, budget: Budget) -> None:
        limits.budgets.copy_(budget.rows)
        if limits.entries is not None:
            limits.entries.zero_() if budget.entries is None else limits.entries.copy_(budget.entries)

    def read(self) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = self._meta.cpu().numpy().copy()
        if found[:, FLAGS].any():
            self._meta[:, FLAGS] = 0
        return found

    # -- what a step launches ----------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor, counts: Sequence[int] | None) -> None:
        at = self._placement()
        assert keys.shape[2] <= MAX_STEP_TOKENS
        with self._lock:
            if counts is not None:
                self._counts.copy_(torch.tensor(counts, dtype=torch.int32))
            given = None if counts is None else self._counts
            gpu_build.append_to_meta(self._runtime, keys, values, at.keys, at.values, self._meta, self._tickets, given)

    def ready(self, queries: Tensor, routing: Routing | None, limits: Any) -> bool:
        key = _key(queries)
        if (key, routing is None) not in self._scanning:
            return False
        return routing is None or (key, limits.nprobe, id(routing.router)) in self._selecting

    def prepare(self, queries: Tensor, routing: Routing | None, limits: Any) -> None:
        with self._lock:
            self._scanning_of(queries, routing is None)
            if routing is not None:
                self._selecting_of(queries, routing, limits.nprobe)

    def select(self, queries: Tensor, routing: Routing, limits: CudaLimits) -> Probed:
        with self._lock:
            self._select(queries, routing, limits)
            found = limits.found
            lists = (found.rows, found.counts, found.tail, found.tail_counts)
            rows, row_counts, tail, tail_counts = (None if x is None else x.clone() for x in lists)
        assert rows is not None and row_counts is not None
        return Probed(rows, row_counts, tail, tail_counts)

    def step(
        self, queries: Tensor, routing: Routing | None, limits: CudaLimits, scale: float
    ) -> tuple[Tensor, Tensor, Probed | None]:
        at, e = self._placement(), self._shape[3]
        out = torch.empty((*queries.shape[:-1], e), dtype=queries.dtype, device=self._device)
        lse = torch.empty(queries.shape[:-1], dtype=torch.float32, device=self._device)
        listed = means = None
        with self._lock:
            if routing is not None:
                self._select(queries, routing, limits)
                found = limits.found
                listed = Listed(found.rows, found.counts)
                if found.tail is not None and found.tail_counts is not None:
                    means = Means(found.tail, found.tail_counts, at.mean_keys, at.mean_values, at.tables)
            scanning = self._scanning_of(queries, routing is None)
            if self.capturing:
                self._held += [scanning, limits]
            scanning.scan(
                queries, at.keys, at.values, self._meta, listed, means, scale, out, lse, scanning.floats, scanning.tickets
            )
        return out, lse, None if routing is None else limits.found

    def _select(self, queries: Tensor, routing: Routing, limits: CudaLimits) -> None:
        at, s = self._placement(), self._selecting_of(queries, routing, limits.nprobe)
        if self.capturing:
            self._held.append(s)
        turn: Rotation | Unturn | None = routing.rotation
        if routing.frequencies is not None:
            turn = Unturn(routing.frequencies, routing.interleaved, routing.scale)
        s.route(queries, turn, self._meta, s.z, s.a)
        found = limits.found
        s.select(
            s.z, s.a, at.tables, self._centres, self._meta, limits.budgets, found.rows, found.counts, limits.miss, limits.entries,
            found.tail, found.tail_counts, s.floats,
        )  # fmt: skip

    # -- workspaces --------------------------------------------------------------------------------------------------

    def _placement(self) -> Placement:
        assert self._at is not None, "publish comes first"
        return self._at

    def _selecting_of(self, queries: Tensor, routing: Routing, nprobe: int) -> _Selecting:
        key = (_key(queries), nprobe, id(routing.router))
        made = self._selecting.get(key)
        if made is None:
            b, h, g, q, _ = queries.shape
            router = routing.router
            route = Route(self._runtime, router, b, g * q, q, queries.dtype, self._knobs.get("route"))
            knots, segments = router.outputs - router.nlist - 1, self._placement().tables.shape[2]
            settings = routing.first_knot, nprobe, routing.count_lists
            of = SelectShape(b, h, g * q, router.nlist, segments, knots, *settings)
            select = Select(self._runtime, of, self._knobs.get("select"))
            floats = torch.empty(select.num_floats, device=self._device)
            z, a = (torch.empty((b, h, g * q, n), device=self._device) for n in (router.nlist, knots + 1))
            made = self._selecting[key] = _Selecting(route, select, z, a, floats)
            _forget(self._selecting)
        return made

    def _scanning_of(self, queries: Tensor, dense: bool) -> _Scanning:
        key = (_key(queries), dense)
        made = self._scanning.get(key)
        if made is None:
            b, h, g, q, d = queries.shape
            at, e = self._placement(), self._shape[3]
            shape = ScanShape(b, h, g * q, q, d, e, self._dtype, queries.dtype, at.keys.shape[2], causal=True, dense=dense)
            scan = Scan(self._runtime, shape, self._knobs.get("scan"))
            floats = torch.empty(scan.num_floats, dtype=torch.float32, device=self._device)
            made = _Scanning(scan, floats, torch.zeros(scan.num_tickets, dtype=torch.int32, device=self._device))
            self._scanning[key] = made
            _forget(self._scanning)
        return made


def _key(queries: Tensor) -> tuple[Any, ...]:
    return (*queries.shape[2:4], queries.dtype)


def _forget(kept: dict[Any, Any]) -> None:
    while len(kept) > _KEPT:
        kept.pop(next(iter(kept)))
