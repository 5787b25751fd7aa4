"""What an engine runs in every step: a plan for all layers, then five launches a layer, and no memory but what was made before.

Lengths and pages stay on the device, the host waits for nothing, and every launch may be captured: grids depend on numbers of
sequences alone. One step at a time; its launches are on one stream.

Axes as in backends/paged.py; most b sequences a step, most n tokens a sequence, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import LengthError, ParameterError
from ..codes import META
from ..paged import MAX_LISTS
from ..types import MAX_STEP_TOKENS, Frequencies
from .launch import Launch
from .paged import Cut, PagedCuda, Pool, bind_count, bind_find, bind_plan
from .route import PackedRouter, Route
from .scan import Listed, Scan, ScanShape
from .select import TAKEN, Select, SelectShape

TOTALS = "sparse_queries", "dense_queries", "rows_read", "rows_stored"
"""Of `PagedSession.totals`: queries with a selection and without one, of all layers; rows that the former read, and had."""


@dataclass(frozen=True)
class PagedSizes:
    """What a session is made for. sequences : most b; tokens : most n; segments : what octaves make of those; queries : most q;
    rows : most t that a KV head reads of a sequence; group : g."""

    sequences: int
    tokens: int
    segments: int
    queries: int
    rows: int
    heads: int
    group: int
    d: int
    e: int
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class PagedLayer:
    """place : of its shares; router : as from `Backend.prepare_router`; rope, unread_mass : on the device, or None."""

    place: int
    router: PackedRouter
    first_knot: int
    size_weighted: bool
    rope: Frequencies | None
    unread_mass: Tensor | None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What launches depend on but for addresses."""
        r, rope = self.router, self.rope
        turn = None if rope is None else (len(rope.inv_freq), rope.interleaved, rope.scale)
        return r.nlist, r.outputs, r.units, self.first_knot, self.size_weighted, turn, self.unread_mass is None


@dataclass(frozen=True, eq=False)
class PagedPlan:
    """A batch of sequences of q queries each, as `PagedSession.plan` left it on the device: until the next of as many queries."""

    q: int
    blocks: Tensor
    meta: Tensor
    bounds: Tensor
    centres: Tensor
    budgets: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class _Launches:
    count: Launch
    route: Launch
    select: Launch
    find: Launch
    scan: Launch


@dataclass(eq=False)
class _Planning:
    plan: PagedPlan
    launch: Launch
    layers: dict[Any, _Launches] = field(default_factory=dict)


class PagedSession:
    """Raises ParameterError for sizes without sense, LengthError for lists that a byte does not number.

    totals : int64 (4) on the device, see `TOTALS`; grows with every layer of every step.
    """

    def __init__(
        self, paged: PagedCuda, sizes: PagedSizes, layers: list[PagedLayer], shares: np.ndarray, selectivity: float,
        spared: tuple[int, int, int],
    ) -> None:
        """shares : float32 (L, h) of the budget; spared : sinks, recent tokens and break-even, as in `bind_plan`."""
        if not 1 <= sizes.queries <= MAX_STEP_TOKENS or sizes.queries > spared[1]:
            raise ParameterError(f"queries: expected 1 to {min(MAX_STEP_TOKENS, spared[1])}, got {sizes.queries}")
        if shares.shape != (len(layers), sizes.heads):
            raise ParameterError(f"shares: expected {(len(layers), sizes.heads)}, got {shares.shape}")
        lists = max((x.router.nlist for x in layers), default=1)
        if lists > MAX_LISTS:
            raise LengthError(f"router: expected at most {MAX_LISTS} lists, got {lists}")
        self.backend, self.sizes, self.layers = paged.backend, sizes, layers
        self._parts_of, backend = paged.parts_of, paged.backend
        self._selectivity, self._spared = selectivity, spared
        self._steps: dict[tuple[int, ...], _Planning] = {}
        self._scans: dict[tuple[int, int, int], Scan] = {}
        self._selects: dict[tuple[Any, ...], Select] = {}
        s, device, pairs = sizes, backend.device, sizes.sequences * sizes.heads
        outputs = max((x.router.outputs for x in layers), default=1)
        parts = max(pairs, 2 * backend.runtime.multiprocessors)  # b * h * X is no larger, for any b
        j = sizes.group * sizes.queries

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.totals = torch.zeros(len(TOTALS), dtype=torch.int64, device=device)
        self._shares = torch.from_numpy(np.ascontiguousarray(shares, np.float32)).to(device)
        self._pieces, self._tables = ints((parts + pairs * s.segments) * lists), ints(pairs * s.segments * (lists + 1))
        self._taken, self._rows, self._counts = ints(pairs * s.segments * lists), ints(pairs * s.rows), ints(pairs)
        self._scores = torch.zeros(pairs * j * outputs, dtype=torch.float32, device=device)
        self._lse = torch.zeros(pairs * j, dtype=torch.float32, device=device)
        plans = s.queries * s.sequences
        self._meta, self._bounds = ints(plans, META), ints(plans, s.segments + 1)
        self._centres = torch.zeros((plans, s.segments), dtype=torch.float32, device=device)
        self._budgets = ints(plans * max(1, len(layers)) * s.heads)
        # What a scan and a selection need besides is largest for the largest batch, or for one sequence.
        scans = [self._scan(b, q, 1) for q in range(1, s.queries + 1) for b in {1, s.sequences}]
        self._floats = torch.zeros(max(x.num_floats for x in scans), dtype=torch.float32, device=device)
        few = min(s.sequences, max(1, backend.runtime.multiprocessors // s.heads))  # up to here blocks are larger
        every = [(b, q, x) for b in {1, few, s.sequences} for q in range(1, s.queries + 1) for x in layers]
        selects = [self._select(*x) for x in every]
        self._select_floats = torch.zeros(max((x.num_floats for x in selects), default=0), dtype=torch.float32, device=device)
        self._tickets = ints(pairs + max(x.num_tickets for x in scans))

    @property
    def num_bytes(self) -> int:
        """Of its memory on the device."""
        return sum(x.numel() * x.element_size() for x in vars(self).values() if isinstance(x, Tensor))

    # -- a step ----------------------------------------------------------------------------------------------------------

    def plan(self, q: int, lengths: Tensor, blocks: Tensor) -> PagedPlan:
        """Segments and budgets of b sequences of q queries each, for all layers, by one launch.

        lengths : int32 (b,), contiguous, the q new tokens included; blocks : int32 (b, M), of the same strides whenever b is the
        same. Both are read by the launches of the step.
        """
        b = len(lengths)
        if not (1 <= q <= self.sizes.queries and 1 <= b <= self.sizes.sequences):
            raise ParameterError(
                f"plan: expected up to {self.sizes.sequences} sequences of up to {self.sizes.queries} queries, got {b} of {q}"
            )
        key = q, b, blocks.stride(0)
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = self._planning(q, lengths, blocks)
        step.launch(lengths=lengths)
        return PagedPlan(q, blocks, *(getattr(step.plan, x) for x in ("meta", "bounds", "centres", "budgets")))

    def run(self, plan: PagedPlan, layer: PagedLayer, pool: Pool, queries: Tensor, scale: float, out: Tensor) -> None:
        """Attention of queries : (b, h, g, q, d), to out : (b, h, g, q, e) of one dtype, contiguous, of a layer's pool."""
        b = len(plan.meta)
        at = self._steps[plan.q, b, plan.blocks.stride(0)]
        pages = pool.pages
        geometry = pages.keys.shape, pages.keys.stride(), pages.lists.stride()
        key = layer.kind, queries.dtype, queries.data_ptr() % 4, scale, geometry
        made = at.layers.get(key)
        if made is None:
            made = at.layers[key] = self._bind(plan, layer, pool, queries, scale)
        made.count(lists=pages.lists, blocks=plan.blocks)
        r = layer.router
        turn = {} if layer.rope is None else {"inv_freq": layer.rope.inv_freq}
        made.route(queries=queries, hidden=r.hidden, bias_hidden=r.bias_hidden, out=r.out, bias_out=r.bias_out, **turn)
        miss = {} if layer.unread_mass is None else {"unread_mass": layer.unread_mass}
        made.select(budgets=plan.budgets[layer.place], **miss)
        made.find(lists=pages.lists, blocks=plan.blocks)
        made.scan(keys=pages.keys, values=pages.values, queries=queries, out=out)

    # -- what is bound ---------------------------------------------------------------------------------------------------

    def _planning(self, q: int, lengths: Tensor, blocks: Tensor) -> _Planning:
        s, b, layers = self.sizes, len(lengths), max(1, len(self.layers))
        first = (q - 1) * s.sequences
        rows = slice(first, first + b)
        budgets = self._budgets[first * layers * s.heads :][: layers * b * s.heads].view(layers, b, s.heads)
        plan = PagedPlan(
            q, blocks, self._meta[rows], self._bounds[rows], self._centres[rows], tuple(budgets.unbind(0)),
        )
        memory = plan.meta, plan.bounds, plan.centres, budgets, self._tickets
        launch = bind_plan(self.backend.runtime, lengths, self._shares, self._selectivity, self._spared, *memory)
        return _Planning(plan, launch)

    def _bind(self, plan: PagedPlan, layer: PagedLayer, pool: Pool, queries: Tensor, scale: float) -> _Launches:
        s, b, runtime = self.sizes, len(plan.meta), self.backend.runtime
        h, nlist, j = s.heads, layer.router.nlist, s.group * plan.q
        pages, pairs = pool.pages, b * s.heads
        where = (b, s.heads, s.group, plan.q, s.d), (s.heads, s.d, s.e)
        if (tuple(queries.shape), (pages.keys.shape[1], pages.keys.shape[3], pages.values.shape[3])) != where:
            got = f"{tuple(queries.shape)}, {tuple(pages.keys.shape)}"
            raise ParameterError(f"run: expected queries, and heads and dims of pages, {where}, got {got}")
        if queries.data_ptr() % 4 or queries.dtype != s.dtype:
            raise ParameterError(f"queries: expected {s.dtype} at a multiple of 4 bytes, got {queries.dtype}")
        cut = Cut(b, h, self._parts_of(runtime, b, h, s.tokens), s.segments, nlist)
        tables = self._tables[: pairs * s.segments * (nlist + 1)].view(b, h, s.segments, nlist + 1)
        taken = self._taken[: pairs * s.segments * nlist].view(b, h, s.segments, nlist)
        rows, counts = self._rows[: pairs * s.rows].view(b, h, s.rows), self._counts[:pairs].view(b, h)
        z = self._scores[: pairs * j * nlist].view(b, h, j, nlist)
        a = self._scores[pairs * j * nlist : pairs * j * layer.router.outputs].view(b, h, j, layer.router.outputs - nlist)
        lse = self._lse[: pairs * j].view(b, h, j)
        found = plan.blocks, plan.meta, plan.bounds, self._pieces, tables
        count = bind_count(runtime, cut, pages.lists, *found, self._tickets)
        route = Route(runtime, layer.router, b, j, plan.q, queries.dtype, self.backend.knobs.get("route"))
        select = self._select(b, plan.q, layer).bind_taken(
            z, a, tables, plan.centres, plan.meta, plan.budgets[layer.place], taken, layer.unread_mass, self._select_floats
        )
        find = bind_find(runtime, cut, pool, *found, taken, rows, counts, self.totals, plan.q)
        tickets = self._tickets[s.sequences * s.heads :]
        scan = self._scan(b, plan.q, pages.num_rows).bind_paged(
            pages.keys, pages.values, pages.row, Listed(rows, counts), scale, self._floats, tickets
        )
        scan.params["lse"] = lse.data_ptr()
        return _Launches(count, route.bind(layer.rope, plan.meta, z, a), select, find, scan)

    def _scan(self, b: int, q: int, num_rows: int) -> Scan:
        key = b, q, num_rows
        if key not in self._scans:
            s = self.sizes
            shape = ScanShape(b, s.heads, s.group * q, q, s.d, s.e, s.dtype, s.dtype, num_rows, causal=True, paged=True)
            self._scans[key] = Scan(self.backend.runtime, shape, self.backend.knobs.get("scan"))
        return self._scans[key]

    def _select(self, b: int, q: int, layer: PagedLayer) -> Select:
        key = b, q, layer.kind
        if key not in self._selects:
            s, r = self.sizes, layer.router
            of = b, s.heads, s.group * q, r.nlist, s.segments, r.outputs - r.nlist - 1, layer.first_knot, 0, layer.size_weighted
            knobs = {**self.backend.knobs.get("select", {}), **TAKEN}
            self._selects[key] = Select(self.backend.runtime, SelectShape(*of), knobs)
        return self._selects[key]


def rows_read(shares: np.ndarray, selectivity: float, tokens: int, spared: tuple[int, int, int]) -> int:
    """Most rows that a KV head reads of a sequence of up to so many tokens: for `PagedSizes.rows`."""
    sinks, recent, break_even = spared
    largest = float(shares.max()) if shares.size else 1.0
    chosen = min(tokens, math.ceil(selectivity * largest * tokens))
    return max(1, min(tokens, max(break_even, sinks + recent + chosen)))
