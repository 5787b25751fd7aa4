"""The resident state of a batch on a CUDA device: two or three launches a search, one an append, and no memory but the output.

Everything a launch needs lies ready: what the host publishes, a workspace for each shape of queries, budgets and row lists for
each set of search parameters, and the parameters of the kernels themselves, in which a step only changes the addresses of its
own tensors. Knows kernels and their workspaces; positions and parameters come as numbers.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import NotFiniteError, StateError
from ..base import Backend, Session
from ..codes import FLAGS, FULL, LENGTH, META, NEXT, NOT_FINITE, SEALED, SINKS
from ..scalar_quantizer import Coded
from ..types import MAX_STEP_TOKENS, Arena, Budget, Placement, Plan, Probed, Rotation, Routing, Sample, columns_in_use
from . import append_assign as gpu_build
from . import codes as gpu_codes
from . import seal as gpu_seal
from .launch import Launch, Runtime
from .scan import Runs, aligned
from .searches import BOUND, Knobs, Searches
from .steady import SteadyAppend, SteadySearch
from .workspace import DeviceNumbers, OneLaunch, Packed, TwoLaunches, evict, listed_of, no_sample, selecting_key

_MEMORY = "keys", "values", "ids", "tables", "mean_keys", "mean_values", "plain_keys", "plain_values"
"""What of an `Arena` launches read or write."""


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
        self._runtime, self._device, self._shape = runtime, device, shape
        self._numbers = DeviceNumbers.zeros(*shape[:2], device)
        self._appending: dict[Any, Launch] = {}
        self.searches = Searches(runtime, knobs, device, shape, dtype, self._numbers, self._appending.clear)
        gpu_build.append_kernel(runtime, True)  # compiled now: inside the capture of a graph it would be too late
        # Whether no selection has waited yet for tables, centres and budgets to be written; the next one then waits before it
        # reads. That an append lies in between does not help: it starts its successor before it waits itself.
        self._just_published = True
        self._plans: weakref.WeakSet[Plan] = weakref.WeakSet()
        self._stream: Any = None
        self._raw: int | None = None  # its address
        # meta on its way to the host as of the last publication, the event behind it, and the lengths that the host knew
        self._watched: tuple[Tensor, Any, list[int]] | None = None
        self.lock = threading.Lock()  # parameter structs and workspaces serve one call at a time

    # -- what the host decides ---------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """Changes when launches that are bound come to be of no use."""
        return self.searches.generation

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
        self.searches.held.clear()

    def _memory(self) -> Iterator[Tensor]:
        """All that launches read or write but for what a call brings."""
        memory: list[Tensor | None] = [*self._numbers.memory(), *self.searches.memory()]
        if self._placement is not None:
            memory += [getattr(self._placement.arena, name) for name in _MEMORY]
        for plan in self._plans:
            memory += plan.packed.memory()
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
        on = self._numbers
        if on.centres.shape != placement.centres.shape:
            on.centres = torch.zeros(placement.centres.shape, dtype=torch.float32, device=self._device)
            self.searches.unbind()
        centres = placement.centres.astype(np.float32)
        writes: list[tuple[int, np.ndarray[Any, Any]]] = []
        for to, x in ((on.centres, centres), (on.tickets, np.zeros(on.tickets.shape, np.int32))):
            writes += [(to.data_ptr(), x)] if x.size else []
        if coded is not None:
            spans = [gpu_codes.coded_spans(coded, sinks, sealed, dense) for dense in (False, True)]
            writes.append((on.spans.data_ptr(), np.stack(spans)))
        for i, row in enumerate(columns):
            at = on.meta.data_ptr() + i * META * 4
            parts = ((LENGTH + 1, NEXT), (NEXT + 1, FLAGS)) if counted else ((0, FLAGS),)
            writes += [(at + 4 * a, row[a:b]) for a, b in parts]
        for plan, budget in budgets:
            writes += plan.packed.numbers(budget)
            plan.budget = budget
        numbers = sent(gpu_seal.pieces_of(writes), self._device)
        self._just_published = True
        gpu_seal.publish(self._runtime, len(writes), numbers)
        super().publish(placement, ())
        self.searches.placement = placement
        self._watch()

    def _use(self, arena: Arena, before: Arena | None) -> None:
        """Launches and workspaces that were made for other memory, or for memory of another size, go."""
        if before is None or _shapes(before) != _shapes(arena):
            self.searches.clear()
        if before is None or any(getattr(before, name) is not getattr(arena, name) for name in _MEMORY):
            self.searches.unbind()
            self.captured = False  # graphs hold addresses of before

    def plan(self, plan: Plan, budget: Budget) -> None:
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
        rows, sample = sent(budget.rows.numpy().copy(), self._device), None
        if plan.samples:
            of = budget.sample or no_sample((b, h))
            caps = sent(of.caps.numpy().view(np.int32).copy(), self._device).view(torch.float32)
            sample = Sample(sent(of.rows.numpy().copy(), self._device), sent(of.exponents.numpy().copy(), self._device), caps)
        plan.packed = Packed(rows, mean_entries, budget.unread_mass, budget.nprobe, selected, sample)
        plan.budget = budget
        self._plans.add(plan)

    # -- what the device counts and notes ----------------------------------------------------------------------------

    def _watch(self) -> None:
        """Have meta fetched as it is now. Does not wait for the device."""
        on_gpu = self._device.type == "cuda"
        host = torch.empty(self._numbers.meta.shape, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        host.copy_(self._numbers.meta, non_blocking=True)
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
        meta: np.ndarray[Any, Any] = self._numbers.meta.cpu().numpy().copy()
        if meta[:, FLAGS].any():
            self._numbers.meta[:, FLAGS] = 0
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
        by = None if all(count == n for count in counts) else self._numbers.counts
        with self.lock:
            if by is not None:
                some = torch.tensor(counts, dtype=torch.int32, pin_memory=self._device.type == "cuda", device="cpu")
                by.copy_(some, non_blocking=True)
            key = (by is None, *gpu_build.append_layout(keys, values))
            launch = self._appending.get(key)
            if launch is None:
                memory = *place.arena.numbers, self._numbers.meta, by, self._numbers.tickets
                launch = self._appending[key] = gpu_build.bind_append_to_meta(self._runtime, keys, values, *memory)
                evict(self._appending, BOUND)
            if self.capturing:
                self.searches.held.append(launch)
            launch(keys=keys, values=values)
        if self.capturing:
            self.captured = True
        else:
            self.lengths = list(map(operator.add, lengths, counts))

    def select(self, queries: Tensor, routing: Routing, plan: Plan) -> Probed:
        self.wait_stream()
        packed: Packed = plan.packed
        if not self._covers(queries, routing, packed):
            self._have_budget(plan)
            return super().select(queries, routing, plan)
        with self.lock:
            by = self._select(queries, routing, packed)
            selected, listed = packed.selected, listed_of(by, packed)
            counts = selected.counts.clone()
            if isinstance(listed, Runs) and listed.weights is not None:
                return _in_order(listed, counts)
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
        if not dense and not self._covers(queries, routing, packed):
            if self.capturing:
                raise StateError(
                    "capture: expected a search of whole runs, got one with a sample that no kernel selects (more than 8 query "
                    "vectors of a KV head, or too many segments); sampled_share=0 makes it one"
                )
            self._have_budget(plan)
            return super().run(queries, routing, plan, scale)
        with self.lock:
            if self.capturing:
                if not self.searches.is_ready(queries, routing, packed, dense):
                    raise StateError("capture: expected a step that ran once before, got one with other queries")
                plan.captured = self.captured = True
                self.searches.held.append((routing, plan))
            elif plan.dense and not dense:
                dense = True
                if not self.searches.is_ready(queries, routing, packed, False):  # a graph of this step will not be dense for ever
                    self.searches.make_ready(queries, routing, packed)
            by = None if dense else self._select(queries, routing, packed)
            scan, selected = self.searches.scan_of(queries, by, packed, scale, self.capturing)
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
            made = self.searches.selecting.get(selecting_key(queries, routing, packed))
            select = None if made is None else made.bound.get((id(routing), id(packed)))
            if made is None or select is None:
                return None
            scan = self.searches.bound_scan(queries, made.by, packed, scale)
            if scan is None:
                return None
            if isinstance(made.by, OneLaunch):
                select[0][0].params["early"] = True
            lse = torch.empty(queries.shape[:-1], dtype=torch.float32, device=self._device)
            return SteadySearch(self, select[0], scan, lse, *self._shape[2:4])

    def _covers(self, queries: Tensor, routing: Routing, packed: Packed) -> bool:
        """Whether kernels select what the plan asks for: a sample is for the one that routes and selects."""
        return packed.sample is None or self.searches.in_one_launch(queries, routing, packed) is not None

    def _have_budget(self, plan: Plan) -> None:
        """On the device, where the backend's single operations select."""
        packed, budget = plan.packed, plan.budget
        assert budget is not None, "published with the plan"
        super().plan(plan, budget)
        plan.packed = packed

    def _select(self, queries: Tensor, routing: Routing, packed: Packed) -> TwoLaunches | OneLaunch:
        by = self.searches.select(queries, routing, packed, self.capturing or not self._just_published, self.capturing)
        self._just_published = False
        return by


def _in_order(listed: Runs, counts: Tensor) -> Probed:
    """A copy of weighted rows, ascending, and of their biases."""
    rows, biases = listed.rows(), listed.biases()
    assert biases is not None, "of runs with weights"
    width = int(counts.max()) if counts.numel() else 0
    behind = torch.arange(width, dtype=torch.int32, device=rows.device) >= counts[..., None]
    rows, order = rows[..., :width].masked_fill(behind, torch.iinfo(torch.int32).max).sort(2)
    return Probed(rows.masked_fill(behind, -1), counts, biases=biases.gather(2, order).masked_fill(behind, 0.0))


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


def _error(flags: int) -> Exception | None:
    if flags & NOT_FINITE:
        return NotFiniteError("keys, values: expected finite numbers, got NaN or infinity in a step added since the last check")
    if flags & FULL:
        return StateError("advance: expected room for every replay of a captured step, got a full arena; tokens were dropped")
    return None
