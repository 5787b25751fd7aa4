"""Keeps what lies on the device in step with a batch, so that decoding launches kernels and nothing else. Knows no kernel.

The host decides segments, budgets and where memory lies, and publishes them when they change: when tokens are sealed, once in
some hundred steps. Lengths change with every token; the device counts them itself. In between, host and device agree unless a
CUDA graph was replayed, of which the host learns by `AsymmetricIndex.advance`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import Budget
from ..backends import types as device
from ..backends.base import Resident
from ..backends.types import Placement, Routing
from ..errors import NotFiniteError, StateError
from ..invlists.segmented import SegmentedInvertedLists
from ..routing.rope import Rope
from ..routing.rotations import query_rotation
from ..routing.router import QueryRouter
from .params import SearchParametersIVF
from .plan import everything_fits, spend
from .selection import Selection, everything

MOST_LIMITS = 16
"""Sets of search parameters whose budgets are kept on the device, beside those a graph uses."""


_HOST = torch.device("cpu")

NOT_BEFORE = "capture: expected a step that ran once before, got one with other"


class _Limits:
    """The budgets of one set of search parameters: what they are made from, and where they lie."""

    __slots__ = ("always_dense", "dense", "given", "kept", "on_device")

    def __init__(self, given: tuple[Any, ...]) -> None:
        self.given = given
        self.kept: Routing | None = None  # a graph reads them, and this
        self.on_device: Any = None
        self.dense = self.always_dense = False


class DecodeState:
    """The resident state of one batch and what the host knows of it."""

    def __init__(self, resident: Resident, lists: SegmentedInvertedLists) -> None:
        self.resident, self.lists = resident, lists
        self.captured = False  # a graph may hold addresses of this batch
        self._lengths: list[int] | None = None  # on the device, as far as the host knows
        self._published, self._moved = 0, 0  # versions of the lists, see there
        self._gaps: list[int] = []  # how far the next position is from the length, on the device
        self._watched: list[int] | None = None  # the host's lengths when the device was asked for its own last
        self._limits: dict[Any, _Limits] = {}
        self._sinks: list[int] = []
        self._sealed: list[int] = []
        self.routing: Routing | None = None  # kept for the next step
        self._recorded: Selection | None = None  # of the newest capture
        self._replayed = False  # since the last step outside a graph

    # -- in step -----------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Publish what changed on the host since the last time; raises what the device had noted when that last was so.

        Cheap if nothing changed, and never waits for the device. StateError inside a capture, for it would be part of the graph.
        """
        self.resident.enter()
        lists = self.lists
        if self._lengths == lists.lengths and self._published == lists.version:
            return
        self.refuse_capture("a change of the index since the last step outside a capture")
        problem = self._noted_last_time()
        self._sinks = [lists.sinks(i) for i in range(lists.batch)]
        self._sealed = [lists.sealed(i) for i in range(lists.batch)]
        if self._moved != lists.moved:  # sizes follow from the capacity, and graphs of before hold addresses of before
            self._limits.clear()
            self._moved, self.captured = lists.moved, False
        gaps = [gap.count for gap in lists.gaps]
        counted = self._lengths == lists.lengths and self._gaps == gaps
        budgets = [(limits.on_device, self._budget(limits)[0]) for limits in self._limits.values()]
        self.resident.publish(self._placement(), counted, budgets)
        self.resident.watch()
        self._watched, self._gaps = list(lists.lengths), gaps
        self._lengths, self._published = list(lists.lengths), lists.version
        if problem is not None:
            raise problem

    def _placement(self) -> Placement:
        lists = self.lists
        meta = np.zeros((lists.batch, device.FLAGS), np.int32)
        centres = np.zeros((lists.batch, lists.tables.shape[2]), np.float32)
        for i, segments in enumerate(lists.segments):
            meta[i, : device.SEGMENTS + 1] = lists.lengths[i], self._sinks[i], self._sealed[i], len(segments)
            meta[i, device.NEXT : device.MEANS + 1] = lists.next_position(i), lists.num_means(i)
            centres[i, : len(segments)] = lists.centres(i)
        memory = lists.keys, lists.values, lists.ids, lists.tables, lists.mean_keys, lists.mean_values
        return Placement(*memory, meta, centres)

    def refuse_capture(self, what: str) -> None:
        """StateError while a graph is captured."""
        if self.resident.capturing:
            raise StateError(f"capture: expected steps that only launch kernels, got {what}")

    def settle(self) -> None:
        """Before a change of the index: make sure that host and device agree, and raise what the device noted."""
        self.resident.enter()
        self.refuse_capture("an operation other than add and search_attend")
        problem = self._noted()
        if problem is not None:
            raise problem

    def forget(self) -> None:
        """The tokens are about to go, and what the device noted about them with them."""
        self.refuse_capture("reset")
        self.resident.enter()
        if self._lengths is not None:
            self.resident.read()
            self._lengths = self._watched = None

    def _noted_last_time(self) -> Exception | None:
        """What the device had noted when something was published last; nothing that came later, so as not to wait for it."""
        if self._watched is None or self._lengths is None:
            return None
        meta = self.resident.watched()
        if meta[:, device.LENGTH].tolist() == self._watched and not meta[:, device.FLAGS].any():
            return None
        problem = self._noted()
        self._watched = None
        return problem

    def _noted(self) -> Exception | None:
        """What the device noted since the last time. StateError if it holds other lengths than the host knows."""
        if self._lengths is None:
            return None
        meta = self.resident.read()
        found = meta[:, device.LENGTH].tolist()
        problem = _error(int(np.bitwise_or.reduce(meta[:, device.FLAGS])))
        if found != self._lengths:
            raise problem or StateError(
                f"lengths: expected {self._lengths} on the device, got {found}; call advance after replays of a captured step"
            )
        self._watched = None  # all is known
        return problem

    def refuse_growth(self) -> None:
        """StateError if memory is about to move whose addresses a graph holds."""
        if self.captured:
            raise StateError(
                "add: expected room, for a CUDA graph holds the addresses of this index; call reserve_memory and capture again"
            )

    # -- appending ---------------------------------------------------------------------------------------------------

    def takes(self, n: int) -> bool:
        """Whether so many tokens per sequence are appended in one launch."""
        return 0 < n <= device.MAX_STEP_TOKENS

    def append(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> bool:
        """Append by one launch what a step brings; False for what has to come in bulk."""
        n = keys.shape[2]
        if not self.takes(n):
            return False
        self.follow()
        self.resident.append(keys, values, None if all(c == n for c in counts) else counts)
        assert self._lengths is not None
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        return True

    def record_append(self, keys: Tensor, values: Tensor) -> None:
        """`append` inside a capture: nothing is appended now, and the host's lengths stay."""
        lists, n = self.lists, keys.shape[2]
        if not self.takes(n):
            raise StateError(f"capture: expected 1 to {device.MAX_STEP_TOKENS} tokens per sequence, got {n}")
        self.follow()
        tables = lists.layout.most_segments(lists.capacity)
        if max(lists.lengths) + n > lists.capacity or tables > lists.tables.shape[2]:
            raise StateError(
                f"capture: expected room to grow, got {lists.capacity} rows and {lists.tables.shape[2]} segments for "
                f"{max(lists.lengths)} tokens; call reserve_memory first"
            )
        self.resident.append(keys, values, None)
        self.captured = True

    def advance(self, counts: Sequence[int] | None) -> Exception | None:
        """Take note of tokens that replays appended, as many as the device says where None. Returns what it noted."""
        self.refuse_capture("advance")
        self.resident.enter()
        lists, problem = self.lists, None
        if self._lengths is None:
            self.follow()
        assert self._lengths is not None
        if counts is None:
            meta = self.resident.read()
            found = meta[:, device.LENGTH].tolist()
            problem, self._watched = _error(int(np.bitwise_or.reduce(meta[:, device.FLAGS]))), None
            counts = [now - before for now, before in zip(found, self._lengths, strict=True)]
        elif max(map(sum, zip(self._lengths, counts, strict=True))) > lists.capacity:
            room = [lists.capacity - length for length in self._lengths]
            raise StateError(f"advance: expected at most {room} tokens, for which there was room, got {list(counts)}")
        if min(counts) < 0:
            raise StateError(f"advance: expected at least {self._lengths} tokens on the device, got {list(counts)} more")
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        self._replayed = True
        lists.advance(counts)
        return problem

    def count(self, n: int) -> None:
        """`advance` by n tokens of every sequence, of which nothing is asked but that there was room."""
        lists = self.lists
        lengths = [length + n for length in lists.lengths]
        if self._lengths != lists.lengths or max(lengths) > lists.capacity:
            self.advance([n] * lists.batch)
            return
        self._lengths, self._replayed = lengths, True
        lists.advance([n] * lists.batch)

    def release(self) -> None:
        """No graph is replayed any more."""
        self.captured = False
        for limits in self._limits.values():
            limits.kept = None
        self.resident.release()

    def newest(self, last: Selection | None) -> Selection | None:
        """What the last search read: ``last``, or what the replays since then did."""
        recorded = self._recorded
        if not self._replayed or recorded is None:
            return last
        if recorded.rows is None:
            return everything(self.lists)
        lengths, version = list(self.lists.lengths), self.lists.version
        return replace(recorded, sinks=self._sinks, sealed=self._sealed, lengths=lengths, version=version)

    # -- searching ---------------------------------------------------------------------------------------------------

    def routing_of(self, router: QueryRouter, prepared: Any, rope: Rope | None, q: int) -> Routing:
        """How queries of the last q tokens are routed; ``prepared`` is the router as the backend keeps it."""
        known = self.routing
        if known is None or known.router is not prepared:
            known = Routing(prepared, router.first_knot, router.count_lists)
            if rope is not None and not rope.is_dynamic:
                turn = rope.inv_freq().to(self.lists.keys.device), rope.interleaved, 1.0 / rope.attention_scale
                known = Routing(prepared, router.first_knot, router.count_lists, *turn)
            self.routing = known
        if rope is None or not rope.is_dynamic:
            return known
        self.refuse_capture("a rope whose angles depend on the length")
        return Routing(known.router, known.first_knot, known.count_lists, rotation=query_rotation(rope, self.lists, q))

    def step(
        self, queries: Tensor, params: SearchParametersIVF, router: QueryRouter, routing: Routing, given: tuple[Any, Any],
        scale: float,
    ) -> tuple[Tensor, Tensor, Selection]:  # fmt: skip
        """`search_attend` of queries (b, h, g, q, d). given : shares and miss, as in `select.select`."""
        self.follow()
        limits = self._budgets(params, router, given)
        if self.resident.capturing:
            routing_of = None if limits.always_dense else routing
            if not self.resident.ready(queries, routing_of, limits.on_device):
                raise StateError(f"{NOT_BEFORE} queries")
            limits.kept, self.captured = routing, True
        else:
            routing_of = None if limits.dense else routing
            if limits.dense and not limits.always_dense and not self.resident.ready(queries, routing, limits.on_device):
                self.resident.prepare(queries, routing, limits.on_device)  # a graph of this step will not be dense for ever
        out, lse, found = self.resident.step(queries, routing_of, limits.on_device, scale)
        if found is None:
            selection = everything(self.lists)
        else:
            spans = self._sinks, self._sealed, list(self.lists.lengths)
            tail = found.tail, found.tail_counts
            selection = Selection(found.rows, found.counts, *spans, *tail, self.lists.version, found.in_runs)
        self._replayed = False
        if self.resident.capturing:
            self._recorded = selection
        return out, lse, selection

    def select(
        self, queries: Tensor, params: SearchParametersIVF, router: QueryRouter, routing: Routing, given: tuple[Any, Any]
    ) -> Selection:
        """`select.select` without what a larger window adds: the caller's own copy."""
        self.follow()
        self.refuse_capture("select")
        limits = self._budgets(params, router, given)
        if limits.dense:
            return everything(self.lists)
        found = self.resident.select(queries, routing, limits.on_device)
        rows, spans = _trimmed(found.rows, found.counts), (self._sinks, self._sealed, list(self.lists.lengths))
        if found.tail is None or found.tail_counts is None:
            return Selection(rows, found.counts, *spans, version=self.lists.version)
        tail = _trimmed(found.tail, found.tail_counts), found.tail_counts
        return Selection(rows, found.counts, *spans, *tail, self.lists.version)

    def _budgets(self, params: SearchParametersIVF, router: QueryRouter, given: tuple[Any, Any]) -> _Limits:
        shares, miss = given
        key = params, id(router), id(shares), id(miss)
        limits = self._limits.get(key)
        if limits is None:
            if self.resident.capturing:
                raise StateError(f"{NOT_BEFORE} search parameters")
            limits = _Limits((params, router, shares, miss))  # holds what the ids in the key stand for
            while len(self._limits) >= MOST_LIMITS and not all(x.kept is not None for x in self._limits.values()):
                self._limits.pop(next(k for k, x in self._limits.items() if x.kept is None))
            budget, *most = self._budget(limits)
            limits.on_device = self.resident.limits(budget, *most)
            self._limits[key] = limits
        return limits

    def _budget(self, limits: _Limits) -> tuple[Budget, int, int]:
        """What a search within ``limits`` may take of the present segments; the most rows and entries that ever becomes."""
        lists = self.lists
        params, router, shares, miss = limits.given
        sizes = [high - low for low, high in zip(self._sinks, self._sealed, strict=True)]
        budgets = params.budgets(sizes, lists.heads, shares)
        limits.dense = everything_fits(params, router, sizes, budgets, miss)
        budget = spend(lists, router, params, budgets, miss, _HOST)
        if limits.on_device is not None:
            return budget, 0, 0
        full = params.budgets([lists.capacity] * lists.batch, lists.heads, shares)
        limits.always_dense = everything_fits(params, router, [lists.capacity] * lists.batch, full, miss)
        most = int(full.max())
        entries = lists.mean_keys.shape[2] * lists.nlist if params.tail and not params.nprobe else 0
        return budget, most, min(most, entries)


def _trimmed(x: Tensor, counts: Tensor) -> Tensor:
    """The columns in use of lists padded with -1."""
    return x[:, :, : int(counts.max()) if counts.numel() else 0].contiguous()


def _error(flags: int) -> Exception | None:
    if flags & device.NOT_FINITE:
        return NotFiniteError("keys, values: expected finite numbers, got NaN or infinity in a step added since the last check")
    if flags & device.FULL:
        return StateError("advance: expected room for every replay of a captured step, got a full arena; tokens were dropped")
    return None
