"""The resident state of a batch on a CUDA device: two or three launches a search, one an append, and no memory but the output.

Everything a launch needs lies ready: what the host publishes, a workspace for each shape of queries, budgets and row lists for
each set of search parameters, and the parameters of the kernels themselves, in which a step only changes the addresses of its
own tensors. Knows kernels and their workspaces; positions and parameters come as numbers.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base import Resident
from ..types import FLAGS, LENGTH, MAX_STEP_TOKENS, NEXT, Budget, Placement, Probed, Rotation, Routing
from . import append_assign as gpu_build
from . import route_select as gpu_route_select
from . import seal as gpu_seal
from .launch import Launch, Runtime
from .route import Route, Unturn
from .route_select import RouteSelect, RouteSelectShape
from .scan import Listed, Means, Runs, Scan, ScanShape, aligned
from .select import Select, SelectShape

Knobs = Mapping[str, dict[str, int]]

META = FLAGS + 1

_MEMORY = "keys", "values", "ids", "tables", "mean_keys", "mean_values"
"""What of a `Placement` lies on the device."""

_KEPT = 8
"""Shapes of queries, and routers, whose workspaces are kept."""

_BOUND = 32
"""Launches that are kept of each of these, and of new tokens."""


@dataclass(frozen=True, eq=False)
class CudaLimits:
    """Budgets of one set of search parameters, and the lists that a selection within them is written to."""

    budgets: Tensor
    entries: Tensor | None
    miss: Tensor | None
    nprobe: int
    found: Probed


@dataclass(frozen=True, eq=False)
class _TwoLaunches:
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
class _OneLaunch:
    """Both in one, where the device has clusters and the search is of the usual kind; and the runs that it finds."""

    launcher: RouteSelect
    runs: Tensor
    run_counts: Tensor

    def memory(self) -> Iterator[Tensor]:
        router = self.launcher.router
        yield from (self.runs, self.run_counts, router.hidden, router.bias_hidden, router.out, router.bias_out)


@dataclass(frozen=True, eq=False)
class _Selecting:
    """How queries of one shape, dtype and router are routed and selected: launchers; and launches, the first of which takes the
    queries, with what the ids in their keys stand for."""

    by: _TwoLaunches | _OneLaunch
    bound: dict[Any, tuple[tuple[Launch, ...], Any]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Scanning:
    """Scan for queries of one shape and dtype; launches as in `_Selecting`."""

    scan: Scan
    floats: Tensor
    bound: dict[Any, tuple[Launch, Probed | None, Any]] = field(default_factory=dict)


class CudaResident(Resident):
    """See `Resident`. ``shape``: b, h, d, e, l."""

    def __init__(
        self, runtime: Runtime, device: torch.device, shape: tuple[int, int, int, int, int], dtype: torch.dtype, knobs: Knobs
    ) -> None:
        self._runtime, self._device, self._shape, self._dtype, self._knobs = runtime, device, shape, dtype, knobs
        b = shape[0]
        self._meta = torch.zeros((b, META), dtype=torch.int32, device=device)
        self._counts = torch.zeros((b,), dtype=torch.int32, device=device)
        self._centres = torch.zeros((b, 0), dtype=torch.float32, device=device)
        self._at: Placement | None = None
        self._selecting: dict[Any, _Selecting] = {}
        self._scanning: dict[Any, _Scanning] = {}
        # Of every scan: each appended token makes them zeros again, so that what a misuse left in them is gone a step later.
        # As many as a step of few query vectors has; more move to other memory, and launches are bound anew.
        self._tickets = torch.zeros((b * shape[1],), dtype=torch.int32, device=device)
        self._appending: dict[Any, Launch] = {}
        gpu_build.append_kernel(runtime)  # compiled now: inside the capture of a graph it would be too late
        self._held: list[Any] = []  # what graphs hold addresses of
        # Whether no selection has waited yet for tables, centres and budgets to be written; the next one then waits before it
        # reads. That an append lies in between does not help: it starts its successor before it waits itself.
        self._just_published = True
        self._limits: weakref.WeakSet[CudaLimits] = weakref.WeakSet()
        self._stream: Any = None
        self._watching: tuple[Tensor, Any] | None = None
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
            for x in self._memory():  # freed, it must not go to others before this stream is done with it
                x.record_stream(stream)
        self._stream = stream

    def release(self) -> None:
        self._held.clear()

    def _memory(self) -> Iterator[Tensor]:
        """All that launches read or write but for what a call brings."""
        found: list[Tensor | None] = [self._meta, self._counts, self._centres, self._tickets]
        if self._at is not None:
            found += [getattr(self._at, name) for name in _MEMORY]
        for s in self._selecting.values():
            found += s.by.memory()
            found += [routing.frequencies for _, (routing, _) in s.bound.values()]
        found += [scanning.floats for scanning in self._scanning.values()]
        for x in self._limits:
            found += [x.budgets, x.entries, x.miss, x.found.rows, x.found.counts, x.found.tail, x.found.tail_counts]
        yield from (x for x in found if x is not None)

    def publish(self, placement: Placement, counted: bool, budgets: Sequence[tuple[CudaLimits, Budget]]) -> None:
        before, self._at = self._at, placement
        if before is None or any(
            getattr(before, name).shape != getattr(placement, name).shape for name in ("keys", "tables", "mean_keys")
        ):
            self._selecting.clear()
            self._scanning.clear()
        if before is None or any(getattr(before, name) is not getattr(placement, name) for name in _MEMORY):
            self._unbind()
        if self._centres.shape != placement.centres.shape:
            self._centres = torch.zeros(placement.centres.shape, dtype=torch.float32, device=self._device)
            self._unbind()
        writes: list[tuple[int, np.ndarray[Any, Any]]] = []
        for to, x in ((self._centres, placement.centres), (self._tickets, np.zeros(self._tickets.shape, np.int32))):
            writes += [(to.data_ptr(), x)] if x.size else []
        for i, row in enumerate(placement.meta):
            at = self._meta.data_ptr() + i * META * 4
            spans = ((LENGTH + 1, NEXT), (NEXT + 1, FLAGS)) if counted else ((0, FLAGS),)
            writes += [(at + 4 * a, row[a:b]) for a, b in spans]
        for limits, budget in budgets:
            writes += _numbers(limits, budget)
        numbers = sent(gpu_seal.pieces_of(writes), self._device)
        self._just_published = True
        gpu_seal.publish(self._runtime, len(writes), numbers)

    def limits(self, budget: Budget, most_rows: int, most_entries: int) -> CudaLimits:
        b, h = self._shape[:2]

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self._device)

        found = Probed(ints(b, h, most_rows), ints(b, h))
        if most_entries:
            found = Probed(found.rows, found.counts, ints(b, h, most_entries), ints(b, h))
        self._just_published = True
        entries = None
        if most_entries:
            entries = ints(b, h) if budget.entries is None else sent(budget.entries.numpy().copy(), self._device)
        made = CudaLimits(sent(budget.rows.numpy().copy(), self._device), entries, budget.miss, budget.nprobe, found)
        self._limits.add(made)
        return made

    def watch(self) -> None:
        on_gpu = self._device.type == "cuda"
        host = torch.empty(self._meta.shape, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        host.copy_(self._meta, non_blocking=True)
        self._watching = host, torch.cuda.current_stream(self._device).record_event() if on_gpu else None

    def watched(self) -> np.ndarray[Any, Any]:
        assert self._watching is not None, "watch comes first"
        host, event = self._watching
        if event is not None:
            event.synchronize()
        meta: np.ndarray[Any, Any] = host.numpy()
        return meta

    def read(self) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = self._meta.cpu().numpy().copy()
        if found[:, FLAGS].any():
            self._meta[:, FLAGS] = 0
        return found

    # -- what a step launches ----------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor, counts: Sequence[int] | None) -> None:
        assert keys.shape[2] <= MAX_STEP_TOKENS
        with self._lock:
            if counts is not None:
                given = torch.tensor(counts, dtype=torch.int32, pin_memory=self._device.type == "cuda", device="cpu")
                self._counts.copy_(given, non_blocking=True)
            key = (counts is None, *gpu_build.append_layout(keys, values))
            launch = self._appending.get(key)
            if launch is None:
                at, by = self._placement(), None if counts is None else self._counts
                memory = at.keys, at.values, self._meta, by, self._tickets
                launch = self._appending[key] = gpu_build.bind_append_to_meta(self._runtime, keys, values, *memory)
                _forget(self._appending, _BOUND)
            if self.capturing:
                self._held.append(launch)
            launch(keys=keys, values=values)

    def ready(self, queries: Tensor, routing: Routing | None, limits: Any) -> bool:
        key = _key(queries)
        if (key, routing is None) not in self._scanning:
            return False
        return routing is None or _selecting_key(queries, routing, limits) in self._selecting

    def prepare(self, queries: Tensor, routing: Routing | None, limits: Any) -> None:
        with self._lock:
            self._scanning_of(queries, routing is None)
            if routing is not None:
                self._selecting_of(queries, routing, limits)

    def select(self, queries: Tensor, routing: Routing, limits: CudaLimits) -> Probed:
        with self._lock:
            self._select(queries, routing, limits)
            found = limits.found
            counts = found.counts.clone()
            by = self._selecting_of(queries, routing, limits).by
            listed = _listed(by, limits)
            rows = padded(listed.rows() if isinstance(listed, Runs) else listed.rows, counts, isinstance(by, _TwoLaunches))
            if found.tail is None or found.tail_counts is None:
                return Probed(rows, counts)
            tail_counts = found.tail_counts.clone()
            return Probed(rows, counts, padded(found.tail, tail_counts), tail_counts)

    def step(
        self, queries: Tensor, routing: Routing | None, limits: CudaLimits, scale: float
    ) -> tuple[Tensor, Tensor, Probed | None]:
        queries, shape = aligned(queries), queries.shape[:-1]
        out = torch.empty((*shape, self._shape[3]), dtype=queries.dtype, device=self._device)
        lse = torch.empty(shape, dtype=torch.float32, device=self._device)
        with self._lock:
            by = None if routing is None else self._select(queries, routing, limits)
            scan, found = self._scan_of(queries, by, limits, scale)
            scan(queries=queries, out=out, lse=lse)
        return out, lse, found

    def _select(self, queries: Tensor, routing: Routing, limits: CudaLimits) -> _TwoLaunches | _OneLaunch:
        """Launch what routes and selects; it writes to ``limits.found``, or runs to what is returned and their rows' number."""
        s = self._selecting_of(queries, routing, limits)
        key = id(routing), id(limits)
        bound = s.bound.get(key)
        if bound is None:
            bound = self._bind_selecting(s.by, queries, routing, limits), (routing, limits)
            if routing.rotation is None:  # else it is of this step alone
                s.bound[key] = bound
                _forget(s.bound, _BOUND)
        if self.capturing:
            self._held.append(bound)
        first, *others = bound[0]
        if isinstance(s.by, _OneLaunch):
            first.params["early"] = self.capturing or not self._just_published
        first(queries=queries)
        for launch in others:
            launch()
        self._just_published = False
        return s.by

    def _bind_selecting(
        self, by: _TwoLaunches | _OneLaunch, queries: Tensor, routing: Routing, limits: CudaLimits
    ) -> tuple[Launch, ...]:
        turn: Rotation | Unturn | None = routing.rotation
        if routing.frequencies is not None:
            turn = Unturn(routing.frequencies, routing.interleaved, routing.scale)
        found, tables = limits.found, self._placement().tables
        if isinstance(by, _OneLaunch):
            self._scanning_of(queries, False)  # its tickets are there
            memory = self._meta, tables, self._centres, limits.budgets, _runs(by, limits), limits.miss, self._tickets
            return (by.launcher.bind(turn, *memory, dependent=True),)
        route = by.route.bind(turn, self._meta, by.z, by.a)
        select = by.select.bind(
            by.z, by.a, tables, self._centres, self._meta, limits.budgets, found.rows, found.counts, limits.miss, limits.entries,
            found.tail, found.tail_counts, by.floats,
        )  # fmt: skip
        return route, select

    def _scan_of(
        self, queries: Tensor, by: _TwoLaunches | _OneLaunch | None, limits: CudaLimits, scale: float
    ) -> tuple[Launch, Probed | None]:
        """The scan of what a selection within ``limits`` found, or, without one, of every row; and that."""
        s = self._scanning_of(queries, by is None)
        key = id(by), id(limits), scale
        bound = s.bound.get(key)
        if bound is None:
            at, listed, means, seen = self._placement(), None, None, None
            if by is not None:
                found, listed = limits.found, _listed(by, limits)
                seen = Probed(found.rows[..., :0], found.counts, in_runs=listed) if isinstance(listed, Runs) else found
                if found.tail is not None and found.tail_counts is not None:
                    means = Means(found.tail, found.tail_counts, at.mean_keys, at.mean_values, at.tables)
            launch = s.scan.bind(at.keys, at.values, self._meta, listed, means, scale, s.floats, self._tickets)
            bound = s.bound[key] = launch, seen, (by, limits)
            _forget(s.bound, _BOUND)
        if self.capturing:
            self._held.append(bound)
        return bound[:2]

    def _unbind(self) -> None:
        """Memory has moved: launches made for where it was are of no use."""
        self._appending.clear()
        for selecting in self._selecting.values():
            selecting.bound.clear()
        for scanning in self._scanning.values():
            scanning.bound.clear()

    # -- workspaces --------------------------------------------------------------------------------------------------

    def _placement(self) -> Placement:
        assert self._at is not None, "publish comes first"
        return self._at

    def _selecting_of(self, queries: Tensor, routing: Routing, limits: CudaLimits) -> _Selecting:
        key = _selecting_key(queries, routing, limits)
        made = self._selecting.get(key)
        if made is None:
            made = self._selecting[key] = _Selecting(self._launchers(queries, routing, limits))
            _forget(self._selecting, _KEPT)
        return made

    def _launchers(self, queries: Tensor, routing: Routing, limits: CudaLimits) -> _TwoLaunches | _OneLaunch:
        b, h, g, q, _ = queries.shape
        router, segments = routing.router, self._placement().tables.shape[2]
        shape = RouteSelectShape(b, h, g * q, q, segments, routing.first_knot, queries.dtype)
        usual = routing.count_lists and not limits.nprobe and limits.entries is None
        if usual and gpu_route_select.covers(self._runtime, router, shape):
            sizes = (b, h, segments * router.nlist, 2), (b, h)
            runs, run_counts = (torch.zeros(size, dtype=torch.int32, device=self._device) for size in sizes)
            return _OneLaunch(RouteSelect(self._runtime, router, shape, self._knobs.get("route_select")), runs, run_counts)
        route = Route(self._runtime, router, b, g * q, q, queries.dtype, self._knobs.get("route"))
        knots = router.outputs - router.nlist - 1
        settings = routing.first_knot, limits.nprobe, routing.count_lists
        of = SelectShape(b, h, g * q, router.nlist, segments, knots, *settings)
        select = Select(self._runtime, of, self._knobs.get("select"))
        floats = torch.empty(select.num_floats, dtype=torch.float32, device=self._device)
        z, a = (
            torch.empty((b, h, g * q, n), dtype=torch.float32, device=self._device) for n in (router.nlist, knots + 1)
        )
        return _TwoLaunches(route, select, z, a, floats)

    def _scanning_of(self, queries: Tensor, dense: bool) -> _Scanning:
        key = (_key(queries), dense)
        made = self._scanning.get(key)
        if made is None:
            b, h, g, q, d = queries.shape
            at, e = self._placement(), self._shape[3]
            shape = ScanShape(b, h, g * q, q, d, e, self._dtype, queries.dtype, at.keys.shape[2], causal=True, dense=dense)
            scan = Scan(self._runtime, shape, self._knobs.get("scan"))
            floats = torch.empty(scan.num_floats, dtype=torch.float32, device=self._device)
            if scan.num_tickets > self._tickets.numel():
                self._tickets = torch.zeros(scan.num_tickets, dtype=torch.int32, device=self._device)
                self._unbind()
            made = self._scanning[key] = _Scanning(scan, floats)
            _forget(self._scanning, _KEPT)
        return made


def _runs(by: _OneLaunch, limits: CudaLimits) -> Runs:
    return Runs(by.runs, by.run_counts, limits.found.counts, limits.found.rows.shape[2])


def _listed(by: _TwoLaunches | _OneLaunch, limits: CudaLimits) -> Listed | Runs:
    """Where that puts what it selects within ``limits``."""
    return _runs(by, limits) if isinstance(by, _OneLaunch) else Listed(limits.found.rows, limits.found.counts)


def sent(numbers: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """int32 numbers on the device, from pinned memory: the host does not wait."""
    if device.type != "cuda":
        return torch.from_numpy(numbers)
    pinned = torch.empty(numbers.shape, dtype=torch.int32, device="cpu", pin_memory=True)
    pinned.numpy()[...] = numbers
    return pinned.to(device, non_blocking=True)


def _numbers(limits: CudaLimits, budget: Budget) -> list[tuple[int, np.ndarray[Any, Any]]]:
    """The budgets of ``limits``, by the addresses where they belong."""
    found = [(limits.budgets.data_ptr(), budget.rows.numpy())]
    if limits.entries is not None:
        entries = np.zeros(limits.entries.shape, np.int32) if budget.entries is None else budget.entries.numpy()
        found.append((limits.entries.data_ptr(), entries))
    return found


def _key(queries: Tensor) -> tuple[Any, ...]:
    return (*queries.shape[2:4], queries.dtype)


def padded(lists: Tensor, counts: Tensor, in_order: bool = True) -> Tensor:
    """A copy of lists : int32 (b, h, t), of which counts : int32 (b, h) numbers are written: ascending, then -1."""
    behind = torch.arange(lists.shape[2], dtype=torch.int32, device=lists.device) >= counts[..., None]
    if in_order:
        return lists.masked_fill(behind, -1)
    return lists.masked_fill(behind, torch.iinfo(torch.int32).max).sort(2).values.masked_fill(behind, -1)


def _selecting_key(queries: Tensor, routing: Routing, limits: CudaLimits) -> tuple[Any, ...]:
    return _key(queries), limits.nprobe, limits.entries is None, id(routing.router)


def _forget(kept: dict[Any, Any], most: int) -> None:
    while len(kept) > most:
        kept.pop(next(iter(kept)))
