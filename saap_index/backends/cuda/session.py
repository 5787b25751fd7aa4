"""The resident state of a batch on a CUDA device: two or three launches a search, one an append, and no memory but the output.

Everything a launch needs lies ready: what the host publishes, a workspace for each shape of queries, budgets and row lists for
each set of search parameters, and the parameters of the kernels themselves, in which a step only changes the addresses of its
own tensors. Knows kernels and their workspaces; positions and parameters come as numbers.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DeviceError, NotFiniteError, StateError
from ..base import Backend, Session
from ..codes import FLAGS, FULL, LENGTH, META, NEXT, NOT_FINITE, SEALED, SINKS
from ..scalar_quantizer import Coded
from ..types import (
    MAX_STEP_TOKENS,
    Arena,
    Budget,
    Placement,
    Plan,
    Probed,
    Rotation,
    Routing,
    Tail,
    columns_in_use,
)
from . import append_assign as gpu_build
from . import codes as gpu_codes
from . import route_select as gpu_route_select
from . import seal as gpu_seal
from .launch import Launch, Runtime
from .route import Route
from .route_select import RouteSelect, RouteSelectShape
from .scan import Runs, Scan, ScanShape, aligned
from .select import Select, SelectShape
from .steady import SteadyAppend, SteadySearch
from .workspace import OneLaunch, Packed, Scanning, Selecting, TwoLaunches, evict, listed_of, queries_key, runs_of, selecting_key

Knobs = Mapping[str, dict[str, int]]

_MEMORY = "keys", "values", "ids", "tables", "mean_keys", "mean_values", "plain_keys", "plain_values"
"""What of an `Arena` launches read or write."""

_KEPT = 8
"""Shapes of queries, and routers, whose workspaces are kept."""

_BOUND = 32
"""Launches that are kept of each of these, and of new tokens."""


class CudaSession(Session):
    """See `Session`. ``shape``: b, h, d, e, l.

    `append` and `run` only launch kernels. A selection is written into memory of its plan. Where rows are codes, length, sinks
    and sealed of meta are those of the rows that are numbers, which tokens are appended to; `coded_spans` has the others.
    """

    def __init__(
        self, backend: Backend, device: torch.device, runtime: Runtime, knobs: Knobs, shape: tuple[int, int, int, int, int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(backend)
        self._runtime, self._device, self._shape, self._dtype, self._knobs = runtime, device, shape, dtype, knobs
        b = shape[0]
        self._meta = torch.zeros((b, META), dtype=torch.int32, device=device)
        self._spans = torch.zeros((2, b, 4), dtype=torch.int32, device=device)  # of codes: for searches, and where all is read
        self._counts = torch.zeros((b,), dtype=torch.int32, device=device)
        self._centres = torch.zeros((b, 0), dtype=torch.float32, device=device)
        self._selecting: dict[Any, Selecting] = {}
        self._scanning: dict[Any, Scanning] = {}
        # Of every scan: each appended token makes them zeros again, so that what a misuse left in them is gone a step later.
        # As many as a step of few query vectors has; more move to other memory, and launches are bound anew.
        self._tickets = torch.zeros((b * shape[1],), dtype=torch.int32, device=device)
        self._appending: dict[Any, Launch] = {}
        gpu_build.append_kernel(runtime, True)  # compiled now: inside the capture of a graph it would be too late
        self._held: list[Any] = []  # what graphs hold addresses of
        # Whether no selection has waited yet for tables, centres and budgets to be written; the next one then waits before it
        # reads. That an append lies in between does not help: it starts its successor before it waits itself.
        self._just_published = True
        self._plans: weakref.WeakSet[Plan] = weakref.WeakSet()
        self._stream: Any = None
        self._raw: int | None = None  # its address
        self.generation = 0
        """Changes when launches that are bound come to be of no use."""
        # meta on its way to the host as of the last publication, the event behind it, and the lengths that the host knew
        self._watched: tuple[Tensor, Any, list[int]] | None = None
        self.lock = threading.Lock()  # parameter structs and workspaces serve one call at a time

    # -- what the host decides ---------------------------------------------------------------------------------------

    @property
    def capturing(self) -> bool:  # type: ignore[override]
        return bool(getattr(self._runtime, "capturing", False))

    def wait_stream(self) -> None:
        if self._device.type != "cuda" or self.capturing:
            return
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
            for x in self._memory():  # freed, it must not go to others before this stream is done with it
                x.record_stream(stream)
        self._stream, self._raw = stream, self.raw_stream()

    def raw_stream(self) -> int | None:
        """The address of the current stream, 0 where there are none; None while another device is current."""
        stream = getattr(self._runtime, "stream", None)
        return 0 if stream is None else stream()

    def steady(self, generation: int, stream: int | None) -> bool:
        """Whether launches that were bound then may start on that stream as they are."""
        if generation != self.generation or self._just_published or stream is None or self.capturing:
            return False
        on_gpu = self._device.type == "cuda"
        return not on_gpu or stream == self._raw == self.raw_stream()

    def release(self) -> None:
        """Memory is held until other is published: another stream may still have to wait for it."""

    def release_graphs(self) -> None:
        self.captured = False
        for plan in self._plans:
            plan.captured = False
        self._held.clear()

    def _memory(self) -> Iterator[Tensor]:
        """All that launches read or write but for what a call brings."""
        memory: list[Tensor | None] = [self._meta, self._spans, self._counts, self._centres, self._tickets]
        if self._placement is not None:
            memory += [getattr(self._placement.arena, name) for name in _MEMORY]
            memory += [x for s in self._scanning.values() if isinstance(s.scan, gpu_codes.CodedScan) for x in s.scan.results]
        for s in self._selecting.values():
            memory += s.by.memory()
            memory += [getattr(routing.rope, "inv_freq", None) for _, (routing, _) in s.bound.values()]
        memory += [scanning.floats for scanning in self._scanning.values()]
        for plan in self._plans:
            p, selected = plan.packed, plan.packed.selected
            memory += [p.budgets, p.mean_entries, p.unread_mass]
            memory += [selected.rows, selected.counts, selected.tail, selected.tail_counts]
        yield from (x for x in memory if x is not None)

    def publish(self, placement: Placement, budgets: Sequence[tuple[Plan, Budget]]) -> None:
        self.wait_stream()
        lengths, gaps = placement.meta[:, LENGTH].tolist(), (placement.meta[:, NEXT] - placement.meta[:, LENGTH]).tolist()
        counted = lengths == self.lengths and gaps == self._gaps  # by the device itself
        before, coded, columns = self._placement, placement.coded, placement.meta
        if coded is not None:
            counted = counted and before is not None and before.coded is not None and _same_spans(before.coded, coded)
            sinks, sealed = (columns[:, x].tolist() for x in (SINKS, SEALED))
            columns = columns.copy()
            columns[:, [LENGTH, SINKS, SEALED]] = np.array(gpu_codes.numbers_meta(coded, lengths, sinks, sealed), np.int32).T
        self._use(placement.arena, None if self._placement is None else self._placement.arena)
        if self._centres.shape != placement.centres.shape:
            self._centres = torch.zeros(placement.centres.shape, dtype=torch.float32, device=self._device)
            self._unbind()
        centres = placement.centres.astype(np.float32)
        writes: list[tuple[int, np.ndarray[Any, Any]]] = []
        for to, x in ((self._centres, centres), (self._tickets, np.zeros(self._tickets.shape, np.int32))):
            writes += [(to.data_ptr(), x)] if x.size else []
        if coded is not None:
            spans = [gpu_codes.coded_spans(coded, sinks, sealed, dense) for dense in (False, True)]
            writes.append((self._spans.data_ptr(), np.stack(spans)))
        for i, row in enumerate(columns):
            at = self._meta.data_ptr() + i * META * 4
            parts = ((LENGTH + 1, NEXT), (NEXT + 1, FLAGS)) if counted else ((0, FLAGS),)
            writes += [(at + 4 * a, row[a:b]) for a, b in parts]
        for plan, budget in budgets:
            writes += _numbers(plan.packed, budget)
        numbers = sent(gpu_seal.pieces_of(writes), self._device)
        self._just_published = True
        gpu_seal.publish(self._runtime, len(writes), numbers)
        super().publish(placement, ())
        self._watch()

    def _use(self, arena: Arena, before: Arena | None) -> None:
        """Launches and workspaces that were made for other memory, or for memory of another size, go."""
        if before is None or _shapes(before) != _shapes(arena):
            self._selecting.clear()
            self._scanning.clear()
        if before is None or any(getattr(before, name) is not getattr(arena, name) for name in _MEMORY):
            self._unbind()
            self.captured = False  # graphs hold addresses of before

    def plan(self, plan: Plan, budget: Budget) -> None:
        refuse_sample(budget, self._device)
        self.wait_stream()
        b, h = self._shape[:2]

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self._device)

        selected = Probed(ints(b, h, plan.max_rows), ints(b, h))
        if plan.max_entries:
            selected = Probed(selected.rows, selected.counts, ints(b, h, plan.max_entries), ints(b, h))
        self._just_published = True
        mean_entries = None
        if plan.max_entries:
            mean_entries = ints(b, h) if budget.mean_entries is None else sent(budget.mean_entries.numpy().copy(), self._device)
        rows = sent(budget.rows.numpy().copy(), self._device)
        plan.packed = Packed(rows, mean_entries, budget.unread_mass, budget.nprobe, selected)
        self._plans.add(plan)

    # -- what the device counts and notes ----------------------------------------------------------------------------

    def _watch(self) -> None:
        """Have meta fetched as it is now. Does not wait for the device."""
        on_gpu = self._device.type == "cuda"
        host = torch.empty(self._meta.shape, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        host.copy_(self._meta, non_blocking=True)
        event = torch.cuda.current_stream(self._device).record_event() if on_gpu else None
        self._watched = host, event, self._lengths_published

    def published_error(self) -> Exception | None:
        if self._watched is None or self.lengths is None:
            return None
        host, event, lengths = self._watched
        if event is not None:
            event.synchronize()
        meta: np.ndarray[Any, Any] = host.numpy()
        if self._with_codes(meta[:, LENGTH].tolist()) == lengths and not meta[:, FLAGS].any():
            return None
        return self.synchronize()

    def synchronize(self) -> Exception | None:
        self.wait_stream()
        if self.lengths is None:
            return None
        lengths, problem = self.read_lengths()
        if lengths != self.lengths:
            raise problem or StateError(
                f"lengths: expected {self.lengths} on the device, got {lengths}; call advance after replays of a captured step"
            )
        return problem

    def read_lengths(self) -> tuple[list[int], Exception | None]:
        meta = self.read()
        lengths = self._with_codes(meta[:, LENGTH].tolist())
        problem = _error(int(np.bitwise_or.reduce(meta[:, FLAGS])))
        self._watched = None  # all is known
        return lengths, problem

    def _with_codes(self, lengths: list[int]) -> list[int]:
        """Lengths of sequences with so many rows that are numbers."""
        coded = None if self._placement is None else self._placement.coded
        if coded is None:
            return lengths
        return [n + last - first for n, first, last in zip(lengths, coded.first, coded.last, strict=True)]

    def invalidate(self) -> None:
        self.wait_stream()
        if self.lengths is not None:
            self.read()
            self.lengths = self._watched = None

    def read(self) -> np.ndarray[Any, Any]:
        """Wait for the device and return meta : int32 (b, 8); its flags are reset."""
        meta: np.ndarray[Any, Any] = self._meta.cpu().numpy().copy()
        if meta[:, FLAGS].any():
            self._meta[:, FLAGS] = 0
        return meta

    # -- what a step launches ----------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor, counts: Sequence[int], check: bool = False) -> None:
        """By one launch, which advances lengths and positions on the device. What is not finite is stored, and noted in flags;
        a sequence without room is left alone, and that is noted. With ``check``, or many tokens, in bulk: the device learns of
        them by `publish`. Inside a capture the lengths that the host knows stay."""
        n, place, lengths = keys.shape[2], self._placement, self.lengths
        assert place is not None and lengths is not None, "publish comes first"
        if check or not 0 < n <= MAX_STEP_TOKENS:
            super().append(keys, values, counts)
            self.lengths = lengths
            return
        self.wait_stream()
        by = None if all(count == n for count in counts) else self._counts
        with self.lock:
            if by is not None:
                some = torch.tensor(counts, dtype=torch.int32, pin_memory=self._device.type == "cuda", device="cpu")
                by.copy_(some, non_blocking=True)
            key = (by is None, *gpu_build.append_layout(keys, values))
            launch = self._appending.get(key)
            if launch is None:
                memory = *place.arena.numbers, self._meta, by, self._tickets
                launch = self._appending[key] = gpu_build.bind_append_to_meta(self._runtime, keys, values, *memory)
                evict(self._appending, _BOUND)
            if self.capturing:
                self._held.append(launch)
            launch(keys=keys, values=values)
        if self.capturing:
            self.captured = True
        else:
            self.lengths = list(map(operator.add, lengths, counts))

    def select(self, queries: Tensor, routing: Routing, plan: Plan) -> Probed:
        self.wait_stream()
        packed: Packed = plan.packed
        with self.lock:
            self._select(queries, routing, packed)
            selected = packed.selected
            counts = selected.counts.clone()
            by = self._selecting_of(queries, routing, packed).by
            listed = listed_of(by, packed)
            rows = listed.rows() if isinstance(listed, Runs) else listed.rows
            rows = columns_in_use(rows, counts, isinstance(by, TwoLaunches))
            if selected.tail is None or selected.tail_counts is None:
                return Probed(rows, counts)
            tail_counts = selected.tail_counts.clone()
            return Probed(rows, counts, columns_in_use(selected.tail, tail_counts), tail_counts)

    def run(self, queries: Tensor, routing: Routing, plan: Plan, scale: float) -> tuple[Tensor, Tensor, Probed | None]:
        self.wait_stream()
        packed: Packed = plan.packed
        queries, shape = aligned(queries), queries.shape[:-1]
        out = torch.empty((*shape, self._shape[3]), dtype=queries.dtype, device=self._device)
        lse = torch.empty(shape, dtype=torch.float32, device=self._device)
        dense = plan.always_dense
        coded = self._published.coded
        if coded is not None and not gpu_codes.covers(coded, self._lengths_published, queries.shape[3], True):
            if self.capturing:
                raise StateError("capture: expected as many tokens behind the sinks as queries, got fewer")
            return super().run(queries, routing, plan, scale)
        with self.lock:
            if self.capturing:
                if not self._ready(queries, routing, packed, dense):
                    raise StateError("capture: expected a step that ran once before, got one with other queries")
                plan.captured = self.captured = True
                self._held.append((routing, plan))
            elif plan.dense and not dense:
                dense = True
                if not self._ready(queries, routing, packed, False):  # a graph of this step will not be dense for ever
                    self._scanning_of(queries, False)
                    self._selecting_of(queries, routing, packed)
            by = None if dense else self._select(queries, routing, packed)
            scan, selected = self._scan_of(queries, by, packed, scale)
            scan(queries=queries, out=out, lse=lse)
        return out, lse, selected

    def steady_append(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> SteadyAppend | None:
        launch = self._appending.get((True, *gpu_build.append_layout(keys, values)))
        same = all(count == keys.shape[2] for count in counts)
        return SteadyAppend(self, launch, keys, values, counts) if same and launch is not None else None

    def steady_search(self, queries: Tensor, routing: Routing, plan: Plan, scale: float) -> SteadySearch | None:
        packed: Packed = plan.packed
        if plan.dense or isinstance(routing.rope, Rotation) or self.capturing:
            return None
        with self.lock:
            made = self._selecting.get(selecting_key(queries, routing, packed))
            select = None if made is None else made.bound.get((id(routing), id(packed)))
            if made is None or select is None:
                return None
            scan = self._scanning_of(queries, False).bound.get((id(made.by), id(packed), scale))
            if scan is None or not isinstance(scan[0], Launch):
                return None
            if isinstance(made.by, OneLaunch):
                select[0][0].params["early"] = True
            lse = torch.empty(queries.shape[:-1], dtype=torch.float32, device=self._device)
            return SteadySearch(self, select[0], scan[0], lse, *self._shape[2:4])

    def _ready(self, queries: Tensor, routing: Routing, packed: Packed, dense: bool) -> bool:
        """Whether a step with such queries finds its memory and kernels in place, as it does from the second time on."""
        return (queries_key(queries), dense) in self._scanning and (
            dense or selecting_key(queries, routing, packed) in self._selecting
        )

    def _select(self, queries: Tensor, routing: Routing, packed: Packed) -> TwoLaunches | OneLaunch:
        """Launch what routes and selects; it writes to ``packed.selected``, or runs to what is returned and counts of rows."""
        s = self._selecting_of(queries, routing, packed)
        key = id(routing), id(packed)
        bound = s.bound.get(key)
        if bound is None:
            bound = self._bind_selecting(s.by, queries, routing, packed), (routing, packed)
            if not isinstance(routing.rope, Rotation):  # else of this step alone
                s.bound[key] = bound
                evict(s.bound, _BOUND)
        if self.capturing:
            self._held.append(bound)
        first, *others = bound[0]
        if isinstance(s.by, OneLaunch):
            first.params["early"] = self.capturing or not self._just_published
        first(queries=queries)
        for launch in others:
            launch()
        self._just_published = False
        return s.by

    def _bind_selecting(
        self, by: TwoLaunches | OneLaunch, queries: Tensor, routing: Routing, packed: Packed
    ) -> tuple[Launch, ...]:
        turn = routing.rope
        selected, tables = packed.selected, self._published.arena.tables
        if isinstance(by, OneLaunch):
            self._scanning_of(queries, False)  # its tickets are there
            memory = self._meta, tables, self._centres, packed.budgets, runs_of(by, packed), packed.unread_mass, self._tickets
            return (by.launcher.bind(turn, *memory, dependent=True),)
        route = by.route.bind(turn, self._meta, by.z, by.a)
        select = by.select.bind(
            by.z, by.a, tables, self._centres, self._meta, packed.budgets, selected.rows, selected.counts, packed.unread_mass,
            packed.mean_entries, selected.tail, selected.tail_counts, by.floats,
        )
        return route, select

    def _scan_of(
        self, queries: Tensor, by: TwoLaunches | OneLaunch | None, packed: Packed, scale: float
    ) -> tuple[Launch | gpu_codes.CodedLaunch, Probed | None]:
        """The scan of what a selection within ``packed`` comes to, or, without one, of every row; and that."""
        s = self._scanning_of(queries, by is None)
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
            coded, memory = self._published.coded, (s.floats, self._tickets)
            launch: Launch | gpu_codes.CodedLaunch
            if isinstance(s.scan, gpu_codes.CodedScan):
                assert coded is not None, "of this arena"
                spans = self._spans[int(by is None)]
                launch = s.scan.bind(at.numbers, coded, self._meta, spans, listed, means, scale, *memory)
            else:
                launch = s.scan.bind(at.keys, at.values, self._meta, listed, means, scale, *memory)
            bound = s.bound[key] = launch, seen, (by, packed)
            evict(s.bound, _BOUND)
        if self.capturing:
            self._held.append(bound)
        return bound[:2]

    def _unbind(self) -> None:
        """Memory has moved: launches made for where it was are of no use."""
        self.generation += 1
        self._appending.clear()
        for selecting in self._selecting.values():
            selecting.bound.clear()
        for scanning in self._scanning.values():
            scanning.bound.clear()

    # -- workspaces --------------------------------------------------------------------------------------------------

    def _selecting_of(self, queries: Tensor, routing: Routing, packed: Packed) -> Selecting:
        key = selecting_key(queries, routing, packed)
        made = self._selecting.get(key)
        if made is None:
            made = self._selecting[key] = Selecting(self._launchers(queries, routing, packed))
            evict(self._selecting, _KEPT)
        return made

    def _launchers(self, queries: Tensor, routing: Routing, packed: Packed) -> TwoLaunches | OneLaunch:
        b, h, g, q, _ = queries.shape
        router, segments = routing.router, self._published.arena.tables.shape[2]
        shape = RouteSelectShape(b, h, g * q, q, segments, routing.first_knot, queries.dtype)
        usual = routing.size_weighted and not packed.nprobe and packed.mean_entries is None
        if usual and gpu_route_select.covers(self._runtime, router, shape):
            sizes = (b, h, segments * router.nlist, 2), (b, h)
            runs, run_counts = (torch.zeros(size, dtype=torch.int32, device=self._device) for size in sizes)
            return OneLaunch(RouteSelect(self._runtime, router, shape, self._knobs.get("route_select")), runs, run_counts)
        route = Route(self._runtime, router, b, g * q, q, queries.dtype, self._knobs.get("route"))
        knots = router.outputs - router.nlist - 1
        settings = routing.first_knot, packed.nprobe, routing.size_weighted
        of = SelectShape(b, h, g * q, router.nlist, segments, knots, *settings)
        select = Select(self._runtime, of, self._knobs.get("select"))
        floats = torch.empty(select.num_floats, dtype=torch.float32, device=self._device)
        z, a = (
            torch.empty((b, h, g * q, n), dtype=torch.float32, device=self._device) for n in (router.nlist, knots + 1)
        )
        return TwoLaunches(route, select, z, a, floats)

    def _scanning_of(self, queries: Tensor, dense: bool) -> Scanning:
        key = (queries_key(queries), dense)
        made = self._scanning.get(key)
        if made is None:
            b, h, g, q, d = queries.shape
            at, e = self._published.arena, self._shape[3]
            rows, coded, knobs = at.numbers[0].shape[2], self._published.coded, self._knobs.get("scan")
            shape = ScanShape(b, h, g * q, q, d, e, self._dtype, queries.dtype, rows, causal=True, dense=dense)
            if coded is None:
                scan: Scan | gpu_codes.CodedScan = Scan(self._runtime, shape, knobs)
            else:
                scan = gpu_codes.CodedScan(self._runtime, shape, coded.code.value_bits, at.keys.shape[2], self._device, knobs)
            floats = torch.empty(scan.num_floats, dtype=torch.float32, device=self._device)
            if scan.num_tickets > self._tickets.numel():
                self._tickets = torch.zeros(scan.num_tickets, dtype=torch.int32, device=self._device)
                self._unbind()
            made = self._scanning[key] = Scanning(scan, floats)
            evict(self._scanning, _KEPT)
        return made


def _shapes(arena: Arena) -> list[Any]:
    return [None if x is None else x.shape for x in (arena.keys, arena.tables, arena.mean_keys, arena.plain_keys)]


def _same_spans(a: Coded, b: Coded) -> bool:
    return list(a.first) == list(b.first) and list(a.last) == list(b.last)


def sent(numbers: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """int32 numbers on the device, from pinned memory: the host does not wait."""
    if device.type != "cuda":
        return torch.from_numpy(numbers)
    pinned = torch.empty(numbers.shape, dtype=torch.int32, device="cpu", pin_memory=True)
    pinned.numpy()[...] = numbers
    return pinned.to(device, non_blocking=True)


def refuse_sample(budget: Budget, device: torch.device) -> None:
    """DeviceError for a budget of which something is sampled: no kernel does that yet."""
    if budget.sample is not None:
        raise DeviceError(f"budget: expected one without a sample on {str(device)!r}, which reads no samples yet, got one")


def _numbers(packed: Packed, budget: Budget) -> list[tuple[int, np.ndarray[Any, Any]]]:
    """The budgets of ``packed``, by the addresses where they belong."""
    writes = [(packed.budgets.data_ptr(), budget.rows.numpy())]
    if packed.mean_entries is not None:
        none = np.zeros(packed.mean_entries.shape, np.int32)
        most = none if budget.mean_entries is None else budget.mean_entries.numpy()
        writes.append((packed.mean_entries.data_ptr(), most))
    return writes


def _error(flags: int) -> Exception | None:
    if flags & NOT_FINITE:
        return NotFiniteError("keys, values: expected finite numbers, got NaN or infinity in a step added since the last check")
    if flags & FULL:
        return StateError("advance: expected room for every replay of a captured step, got a full arena; tokens were dropped")
    return None
