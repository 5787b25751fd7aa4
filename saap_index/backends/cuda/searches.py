"""What the searches of a batch launch: workspaces for each shape of queries, and launches bound to them and to its memory.

Everything is made at the first search of a kind and kept for the next; a step only changes the addresses of its own tensors.
Knows kernels and their workspaces, not when what is published holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..types import Placement, Probed, Rotation, Routing, Tail
from . import codes as gpu_codes
from . import route_select as gpu_route_select
from .launch import Launch, Runtime
from .route import Route
from .route_select import RouteSelect, RouteSelectShape
from .scan import Runs, Scan, ScanShape
from .select import Select, SelectShape
from .workspace import (
    DeviceNumbers,
    OneLaunch,
    Packed,
    Scanning,
    Selecting,
    TwoLaunches,
    evict,
    listed_of,
    queries_key,
    runs_of,
    selecting_key,
)

Knobs = Mapping[str, dict[str, int]]

_KEPT = 8
"""Shapes of queries, and routers, whose workspaces are kept."""

BOUND = 32
"""Launches that are kept of each of these, and of new tokens."""


class Searches:
    """Of one batch. shape : b, h, d, e, l; unbound : called when launches that are bound come to be of no use, for those that are
    not kept here; placement : the memory as published; generation : changes then; held : what graphs hold addresses of."""

    def __init__(
        self, runtime: Runtime, knobs: Knobs, device: torch.device, shape: tuple[int, int, int, int, int], dtype: torch.dtype,
        numbers: DeviceNumbers, unbound: Callable[[], None],
    ) -> None:
        self._runtime, self._knobs, self._device, self._shape, self._dtype = runtime, knobs, device, shape, dtype
        self._numbers, self._unbound = numbers, unbound
        self.placement: Placement | None = None
        self.selecting: dict[Any, Selecting] = {}
        self.scanning: dict[Any, Scanning] = {}
        self.held: list[Any] = []
        self.generation = 0

    @property
    def _published(self) -> Placement:
        assert self.placement is not None, "publish comes first"
        return self.placement

    def memory(self) -> Iterator[Tensor | None]:
        """All that launches read or write of what is kept here."""
        for s in self.selecting.values():
            yield from s.by.memory()
            yield from (getattr(routing.rope, "inv_freq", None) for _, (routing, _) in s.bound.values())
        for scanning in self.scanning.values():
            yield scanning.floats
            if isinstance(scanning.scan, gpu_codes.CodedScan):
                yield from scanning.scan.results

    def clear(self) -> None:
        """Sizes are others."""
        self.selecting.clear()
        self.scanning.clear()

    def unbind(self) -> None:
        """Memory has moved: launches made for where it was are of no use."""
        self.generation += 1
        self._unbound()
        for selecting in self.selecting.values():
            selecting.bound.clear()
        for scanning in self.scanning.values():
            scanning.bound.clear()

    def is_ready(self, queries: Tensor, routing: Routing, packed: Packed, dense: bool) -> bool:
        """Whether a step with such queries finds its memory and kernels in place, as it does from the second time on."""
        return (*queries_key(queries), dense, self._weighted(packed, dense)) in self.scanning and (
            dense or selecting_key(queries, routing, packed) in self.selecting
        )

    def make_ready(self, queries: Tensor, routing: Routing, packed: Packed) -> None:
        """So that a step that selects is."""
        self.scanning_of(queries, False, self._weighted(packed, False))
        self.selecting_of(queries, routing, packed)

    @staticmethod
    def _weighted(packed: Packed, dense: bool) -> bool:
        return packed.sample is not None and not dense

    # -- selecting ---------------------------------------------------------------------------------------------------

    def select(
        self, queries: Tensor, routing: Routing, packed: Packed, early: bool, capturing: bool
    ) -> TwoLaunches | OneLaunch:
        """Launch what routes and selects; it writes to ``packed.selected``, or runs to what is returned and counts of rows.

        early : whether all that the host publishes is there, whatever launches have not ended yet.
        """
        s = self.selecting_of(queries, routing, packed)
        key = id(routing), id(packed)
        bound = s.bound.get(key)
        if bound is None:
            bound = self._bind_selecting(s.by, queries, routing, packed), (routing, packed)
            if not isinstance(routing.rope, Rotation):  # else of this step alone
                s.bound[key] = bound
                evict(s.bound, BOUND)
        if capturing:
            self.held.append(bound)
        first, *others = bound[0]
        if isinstance(s.by, OneLaunch):
            first.params["early"] = early
        first(queries=queries)
        for launch in others:
            launch()
        return s.by

    def _bind_selecting(
        self, by: TwoLaunches | OneLaunch, queries: Tensor, routing: Routing, packed: Packed
    ) -> tuple[Launch, ...]:
        turn, n = routing.rope, self._numbers
        selected, tables = packed.selected, self._published.arena.tables
        if isinstance(by, OneLaunch):
            self.scanning_of(queries, False, self._weighted(packed, False))  # its tickets are there
            memory = n.meta, tables, n.centres, packed.budgets, runs_of(by, packed), packed.unread_mass, n.tickets
            return (by.launcher.bind(turn, *memory, dependent=True, sample=packed.sample),)
        route = by.route.bind(turn, n.meta, by.z, by.a)
        select = by.select.bind(
            by.z, by.a, tables, n.centres, n.meta, packed.budgets, selected.rows, selected.counts, packed.unread_mass,
            packed.mean_entries, selected.tail, selected.tail_counts, by.floats,
        )
        return route, select

    def selecting_of(self, queries: Tensor, routing: Routing, packed: Packed) -> Selecting:
        key = selecting_key(queries, routing, packed)
        made = self.selecting.get(key)
        if made is None:
            made = self.selecting[key] = Selecting(self._launchers(queries, routing, packed))
            evict(self.selecting, _KEPT)
        return made

    def in_one_launch(self, queries: Tensor, routing: Routing, packed: Packed) -> RouteSelectShape | None:
        """What the kernel that routes and selects is made for, of such a search; None where it does not cover it."""
        b, h, g, q, _ = queries.shape
        segments = self._published.arena.tables.shape[2]
        shape = RouteSelectShape(b, h, g * q, q, segments, routing.first_knot, queries.dtype, packed.sample is not None)
        usual = routing.size_weighted and not packed.nprobe and packed.mean_entries is None
        return shape if usual and gpu_route_select.covers(self._runtime, routing.router, shape) else None

    def _launchers(self, queries: Tensor, routing: Routing, packed: Packed) -> TwoLaunches | OneLaunch:
        b, h, g, q, _ = queries.shape
        router, shape = routing.router, self.in_one_launch(queries, routing, packed)

        def ints(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=self._device)

        def floats(*size: int) -> Tensor:
            return torch.empty(size, dtype=torch.float32, device=self._device)

        if shape is not None:
            most = shape.most_runs(router.nlist)
            one = RouteSelect(self._runtime, router, shape, self._knobs.get("route_select"))
            return OneLaunch(one, ints(b, h, most, 2), ints(b, h), ints(b, h, most, 4) if shape.sampled else None)
        route = Route(self._runtime, router, b, g * q, q, queries.dtype, self._knobs.get("route"))
        knots = router.outputs - router.nlist - 1
        settings = routing.first_knot, packed.nprobe, routing.size_weighted
        of = SelectShape(b, h, g * q, router.nlist, self._published.arena.tables.shape[2], knots, *settings)
        select = Select(self._runtime, of, self._knobs.get("select"))
        z, a = (floats(b, h, g * q, n) for n in (router.nlist, knots + 1))
        return TwoLaunches(route, select, z, a, floats(select.num_floats))

    # -- scanning ----------------------------------------------------------------------------------------------------

    def scan_of(
        self, queries: Tensor, by: TwoLaunches | OneLaunch | None, packed: Packed, scale: float, capturing: bool
    ) -> tuple[Launch | gpu_codes.CodedLaunch, Probed | None]:
        """The scan of what a selection within ``packed`` comes to, or, without one, of every row; and that."""
        s = self.scanning_of(queries, by is None, self._weighted(packed, by is None))
        key = id(by), id(packed), scale
        bound = s.bound.get(key)
        if bound is None:
            at, listed, means, seen = self._published.arena, None, None, None
            if by is not None:
                seen, listed = packed.selected, listed_of(by, packed)
                if seen.tail is not None and seen.tail_counts is not None:
                    means = Tail(seen.tail, seen.tail_counts, at.mean_keys, at.mean_values, at.tables)
                if isinstance(listed, Runs):
                    seen = Probed(seen.rows[..., :0], seen.counts, in_runs=listed)
            coded, n = self._published.coded, self._numbers
            memory = s.floats, n.tickets
            launch: Launch | gpu_codes.CodedLaunch
            if isinstance(s.scan, gpu_codes.CodedScan):
                assert coded is not None, "of this arena"
                spans = n.spans[int(by is None)]
                launch = s.scan.bind(at.numbers, coded, n.meta, spans, listed, means, scale, *memory)
            else:
                launch = s.scan.bind(at.keys, at.values, n.meta, listed, means, scale, *memory)
            bound = s.bound[key] = launch, seen, (by, packed)
            evict(s.bound, BOUND)
        if capturing:
            self.held.append(bound)
        return bound[:2]

    def bound_scan(self, queries: Tensor, by: TwoLaunches | OneLaunch, packed: Packed, scale: float) -> Launch | None:
        """That scan, if it is bound already and a launch by itself."""
        s = self.scanning_of(queries, False, self._weighted(packed, False))
        bound = s.bound.get((id(by), id(packed), scale))
        return bound[0] if bound is not None and isinstance(bound[0], Launch) else None

    def scanning_of(self, queries: Tensor, dense: bool, weighted: bool) -> Scanning:
        key = (*queries_key(queries), dense, weighted)
        made = self.scanning.get(key)
        if made is None:
            b, h, g, q, d = queries.shape
            at, e = self._published.arena, self._shape[3]
            rows, coded, knobs = at.numbers[0].shape[2], self._published.coded, self._knobs.get("scan")
            shape = ScanShape(
                b, h, g * q, q, d, e, self._dtype, queries.dtype, rows, causal=True, dense=dense, weighted=weighted
            )
            if coded is None:
                scan: Scan | gpu_codes.CodedScan = Scan(self._runtime, shape, knobs)
            else:
                scan = gpu_codes.CodedScan(self._runtime, shape, coded.code.value_bits, at.keys.shape[2], self._device, knobs)
            floats = torch.empty(scan.num_floats, dtype=torch.float32, device=self._device)
            if scan.num_tickets > self._numbers.tickets.numel():
                self._numbers.tickets = torch.zeros(scan.num_tickets, dtype=torch.int32, device=self._device)
                self.unbind()
            made = self.scanning[key] = Scanning(scan, floats)
            evict(self.scanning, _KEPT)
        return made
