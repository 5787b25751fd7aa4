"""The seam between the index and whatever executes it: a handful of operations, one signature for every device.

A backend computes; it holds no tokens. It knows tensors, row numbers and list numbers, and knows nothing of positions,
RoPE parameters, budgets in percent, files or devices other than its own. The index and its parts call only what stands here,
so a new device is a new subclass and a call of ``register_backend``.

Axes: b sequences, h KV heads, g query heads per KV head, q queries, j = g * q (query heads of one KV head times queries),
n tokens, N capacity in tokens, d key dim, e value dim, l lists, s segments, m knots of the distance term, t rows read,
M segments that may have run means, x runs read through their means.

Rows. The arena stores each (sequence, KV head) in N rows. Of ``length`` rows in use, rows [0, sinks) are the sinks, rows
[sinks, sealed) belong to segments, rows [sealed, length) are recent and in arrival order. Inside a segment the rows of a
KV head are sorted by list number, stably, and ``table[l]`` to ``table[l + 1]`` are the rows of list l (a *run*). Leading
segments may keep the mean key and the mean value of each run, by which a run that is not read can still be estimated.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import NotFiniteError
from .codes import LENGTH, NEXT, SEALED, SEGMENTS, SINKS
from .scalar_quantizer import Coded, StorageCode, encode
from .segment_change import SegmentChange
from .types import (
    Arena,
    Budget,
    Frequencies,
    Placement,
    Plan,
    Probed,
    Rotation,
    Routing,
    Sample,
    Tail,
)
from .weights import RouterWeights


class Backend(ABC):
    """One way to execute the index. Tensors are C-contiguous and on the backend's device unless said otherwise."""

    name: str

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for an arena or a table, placed as this backend scans it best."""

    captures: ClassVar[bool] = False
    """Whether steps of its sessions can be captured in a graph; the host may then know less of lengths than the device."""

    def session(self, batch: int, heads: int, d: int, d_v: int, nlist: int, dtype: torch.dtype) -> Session:
        """What this backend keeps of a batch of that shape from step to step."""
        return Session(self)

    @abstractmethod
    def append(
        self, keys: Tensor, values: Tensor, arena_keys: Tensor, arena_values: Tensor, starts: Sequence[int], counts: Sequence[int]
    ) -> bool:
        """Copy ``counts[i]`` leading tokens of sequence i to its rows from ``starts[i]``.

        keys : storage dtype (b, h, n, d), values : (b, h, n, e), any strides but the last, which is 1.
        arena_keys : storage dtype (b, h, N, d); arena_values : (b, h, N, e); starts[i] + counts[i] <= N.

        Returns False, having written nothing, if one of those tokens holds NaN or infinity.
        """

    @abstractmethod
    def prepare_quantizer(self, centroids: Tensor, bias: Tensor | None = None) -> Any:
        """Pack centroids : float32 (h, l, d) into whatever `assign` reads fastest; done once per index.

        bias : float32 (h, l), what a list's products are raised by; None for Euclidean distance, -|c_l|^2 / 2.
        """

    @abstractmethod
    def assign(self, quantizer: Any, keys: Tensor, rotation: Rotation | None) -> Tensor:
        """List number of each key: argmax over l of <k', c_l> + bias_l, k' the key with ``rotation`` undone.

        keys : storage dtype (h, n, d), strided freely over h and n. Returns int32 (h, n). Ties go to the lower list.
        """

    @abstractmethod
    def seal(self, keys: Tensor, values: Tensor, ids: Tensor, start: int, list_nos: Tensor, table: Tensor) -> None:
        """Sort rows [start, start + n) of every head by list number, stably and in place; write the offsets.

        keys : storage dtype (h, N, d), values : (h, N, e), ids : int32 (h, N): one sequence of the arena.
        list_nos : int32 (h, n), in [0, l): of the row as it lies there now.
        table : int32 (h, l + 1) out, strided over h: table[i] = first row of list i, table[l] = start + n.

        Raises before it moves a row, or not at all.
        """

    def seal_many(
        self, keys: Tensor, values: Tensor, ids: Tensor, segments: Sequence[tuple[int, int]], list_nos: Tensor, tables: Tensor
    ) -> None:
        """`seal` of several segments [start, stop), each of which begins where the one before ends: those of a prompt.

        list_nos : int32 (h, n) of all their rows; tables : int32 (h, s, l + 1) out, strided over h and s. The rest as in `seal`.
        """
        for (start, stop), table in zip(segments, tables.unbind(1), strict=True):
            part = slice(start - segments[0][0], stop - segments[0][0])
            self.seal(keys, values, ids, start, list_nos[:, part].contiguous(), table)

    def merge(
        self, keys: Tensor, values: Tensor, ids: Tensor, segments: Sequence[tuple[int, int]], tables: Tensor,
        joined: Tensor | None,
    ) -> bool:
        """`seal` of segments [start, stop), each of which begins where the one before ends and is sorted itself, as one.

        tables : int32 (h, s, l + 1), theirs, strided over h; joined : int32 (h, l + 1) out, strided over h, the offsets of all
        as one, or None, where ``tables`` become these, cut at the bounds of the segments. Returns False, having done nothing, if
        a backend knows of rows only by the lists that they are in.
        """
        return False

    reads_codes: ClassVar[bool] = False
    """Whether `scan` takes ``coded``."""

    reads_samples: ClassVar[bool] = False
    """Whether `probe` takes a budget with a ``sample``, and `scan` ``biases``."""

    seals_batches: ClassVar[bool] = False
    """Whether `seal_batch` may be of use."""

    seals_beside: ClassVar[bool] = False
    """Whether `begin_seal` may be of use."""

    def begin_seal(self, arena: Arena, changes: Sequence[SegmentChange], quantizer: Any, angles: Frequencies | None) -> Any:
        """Begin a `seal_batch` of rows that are all there, beside what comes before it: what is returned is given to it, if
        neither the rows nor their segments have changed until then, or dropped. Changes nothing, does not wait for the device.
        None where there is nothing to begin.
        """
        return None

    def seal_batch(
        self, arena: Arena, changes: Sequence[SegmentChange], quantizer: Any, angles: Frequencies | None, begun: Any = None
    ) -> bool:
        """Bring the segments of several sequences to what they shall be: assign, sort, write ids and tables, means.

        The tables have room for ``want``. What comes out is that of `assign`, `seal` and `means` one after the other. quantizer :
        as from `prepare_quantizer`, or None where ``arena.pending`` has every list. Does not wait for the device. Raises
        before it moves a row, or not at all. Returns False, having done nothing, if a backend does one after the other.
        begun : of these very changes, from `begin_seal`; given where there is something.
        """
        return False

    def encode(self, code: StorageCode, keys: Tensor, values: Tensor, key_codes: Tensor, value_codes: Tensor) -> None:
        """Codes of rows that are about to be sealed, see `reference.encode`: the same bytes from every backend.

        keys : float32, bfloat16 or float16 (h, n, d), values : (h, n, e), finite, strided freely over h and n. key_codes : uint8
        (h, n, c) out, value_codes : uint8 (h, n, c_v) out, strided over h.
        """
        key_codes.copy_(encode(keys, code.key_bits))
        value_codes.copy_(encode(values, code.value_bits))

    @abstractmethod
    def means(self, keys: Tensor, values: Tensor, table: Tensor, mean_keys: Tensor, mean_values: Tensor) -> None:
        """Mean key and mean value of every run of a segment: float32 sums in row order, rounded once; zero for an empty run.

        keys : storage dtype (h, N, d), values : (h, N, e): one sequence of the arena. table : int32 (h, l + 1), as from `seal`,
        strided over h. mean_keys : storage dtype (h, l, d) out, mean_values : (h, l, e) out, strided over h.
        """

    @abstractmethod
    def prepare_router(self, weights: RouterWeights) -> Any:
        """Pack router weights into whatever `route` reads fastest; done once per index."""

    def router_bytes(self, weights: RouterWeights) -> int:
        """Bytes of the packed weights that `route` reads once per call."""
        return weights.nbytes

    @abstractmethod
    def route(self, router: Any, queries: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """The router's outputs for each query head: z : float32 (b, h, j, l) and a : float32 (b, h, j, m + 1), the
        distance term at the knots and c; of a router without c, a : (b, h, j, 0).

        queries : float32, bfloat16 or float16 (b, h, g, q, d), j = g * q in that order. rotation: angles of the b * q query
        positions, (b * q, r / 2), sequence-major.
        """

    @abstractmethod
    def probe(
        self,
        z: Tensor,
        a: Tensor,
        knots: Tensor,
        tables: Tensor,
        num_segments: Sequence[int],
        budget: Budget,
        size_weighted: bool,
    ) -> Probed:
        """From scores to the rows to read: one selection per (sequence, KV head).

        z : float32 (b, h, j, l); a : float32 (b, h, j, m + 1) or (b, h, j, 0), as from `route`; m may be 0.
        knots : float32 (b, S): place of a segment on the knots, in [0, m - 1]; a_s interpolates a linearly there.
        tables : int32 (b, h, S, l + 1), the first num_segments[i] <= S of sequence i are valid. n_ls = run length.

        A run's weight is w_ls = sum_j sigmoid(c_j) exp(z_jl + a_js) / Z_j with Z_j = sum_ls n_ls exp(z_jl + a_js): the sum, over
        the group, of the predicted attention probability of one of its tokens. Without c the factor is 1. (size_weighted False:
        w_ls = sum_j exp(z_jl) / sum_l exp(z_jl), the published classifier; a is not used.) Its mass is n_ls w_ls.

        nprobe 0: nonempty runs by falling weight (ties: newer segment, then lower list) until budget.rows are taken. With
        ``unread_mass``: or, checked before each run, until the masses of the runs not taken sum to at most unread_mass[h] * j.
        nprobe p: the p lists of largest w_l, which is w_ls with a_js = 0 (ties: lower list), every segment of each (newest
        first), until budget.rows are taken.
        Of the run that exceeds the budget the last rows (its newest tokens) are taken.

        ``sample``: of ``budget.rows`` so many are a sample of the others, see `Sample`; rows come with ``biases``.

        ``mean_entries``: of the nonempty runs in segments [0, means[i]) of which no row is read, those of largest mass (ties:
        newer segment, then lower list).
        """

    @abstractmethod
    def scan(
        self,
        queries: Tensor,
        arena_keys: Tensor,
        arena_values: Tensor,
        rows: Tensor | None,
        counts: Tensor | None,
        sinks: Sequence[int],
        sealed: Sequence[int],
        lengths: Sequence[int],
        scale: float,
        causal: bool,
        tail: Tail | None = None,
        coded: Coded | None = None,
        biases: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Softmax attention over rows [0, sinks[i]), ``rows`` and [sealed[i], lengths[i]) of each sequence, in one softmax,
        and over the entries of ``tail``. coded : which rows are codes; arena_keys and arena_values then hold the others, where it
        says. biases : float32 (b, h, t) as from `probe`, finite, added to the logits of ``rows``, or None for 0 each.

        queries : (b, h, g, q, d) float32, bfloat16 or float16; rows : int32 (b, h, t) as from `probe`, or None for none.
        causal: query i of q sees a recent row r only if r < lengths - q + 1 + i; sinks, ``rows`` and entries are seen by every
        query (the caller guarantees that the last q rows are recent, or that all rows are: sealed == sinks == 0).

        Accumulates in float32. Returns out : dtype of queries (b, h, g, q, e) and lse : float32 (b, h, g, q), natural log.
        Nothing to attend: out = 0, lse = -inf. The result does not depend on the number of threads.
        """

    def best(
        self, queries: Tensor, arena_keys: Tensor, rows: Tensor | None, counts: Tensor | None, sinks: Sequence[int],
        sealed: Sequence[int], lengths: Sequence[int], k: int,
    ) -> tuple[Tensor, Tensor] | None:
        """The k largest inner products of every query with the keys of its own rows, in float32, and these rows; None for a
        backend without, in whose place `attend.best_of` multiplies with torch.

        queries : (b, h, g, q, d) float32, bfloat16 or float16; arena_keys : storage dtype (b, h, N, d). Query j of sequence i
        reads what entry i * q + j says: rows : int32 (b * q, h, t), counts : int32 (b * q, h), or None for none, and besides
        rows [0, sinks) and [sealed, lengths), b * q numbers each.

        Returns float32 (b, h, g, q, k), descending, and int64 of the same shape; -inf and -1 where there are fewer.
        """
        return None

    @abstractmethod
    def combine(self, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        """Merge two attention states over disjoint tokens. out : (..., e) any float dtype, lse : float32 (...).

        An associative, commutative monoid with identity (0, -inf); two empty states stay empty, never NaN.
        """


class Session:
    """The decode step of one batch: publish what changed, append, select, run.

    What is published holds until the next time; a plan holds budgets, and is brought up to date then. Lengths change with every
    token, and a session counts them itself. This one asks its backend for one operation after the other.
    """

    capturing: Any = False
    """Whether launches are recorded now, for a graph, instead of run."""

    captured = False
    """Whether a graph may hold addresses of this batch."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.lengths: list[int] | None = None
        """Rows in use of each sequence, as far as the host knows; None if nothing is published."""
        self._placement: Placement | None = None
        self._gaps: list[int] = []  # how far the next position is from the length
        self._columns: dict[int, list[int]] = {}  # of meta

    def publish(self, placement: Placement, budgets: Sequence[tuple[Plan, Budget]]) -> None:
        """Use this memory and these numbers from now on, and in each plan this budget. Does not wait for the device."""
        columns = dict(enumerate(placement.meta.T.tolist()))
        self._placement, self._columns, self.lengths = placement, columns, columns[LENGTH]
        self._gaps = (placement.meta[:, NEXT] - placement.meta[:, LENGTH]).tolist()
        for plan, budget in budgets:
            self.plan(plan, budget)

    def release(self) -> None:
        """Memory has moved, and need not be held any longer."""
        self._placement = self.lengths = None

    def plan(self, plan: Plan, budget: Budget) -> None:
        """Get ready for searches within this budget, here and in `publish` on the host, by a plan that is new, or up to date."""
        device = self._published.arena.keys.device
        if device.type != "cpu":
            mean_entries = None if budget.mean_entries is None else budget.mean_entries.to(device)
            sample = budget.sample
            if sample is not None:
                sample = Sample(sample.rows.to(device), sample.exponents.to(device), sample.caps.to(device))
            budget = replace(budget, rows=budget.rows.to(device), mean_entries=mean_entries, sample=sample)
        plan.budget, plan.packed = budget, None

    def append(self, keys: Tensor, values: Tensor, counts: Sequence[int], check: bool = False) -> None:
        """Append ``counts[i]`` leading tokens of sequence i.

        keys : storage dtype (b, h, n, d), values : (b, h, n, e), any strides but the last. Raises NotFiniteError, having written
        nothing; a device may note it instead, for later, unless ``check``.
        """
        place, lengths = self._placement, self.lengths
        assert place is not None and lengths is not None, "publish comes first"
        starts = lengths if place.coded is None else place.coded.plain_rows(lengths)
        if not self.backend.append(keys, values, *place.arena.numbers, starts, counts):
            raise NotFiniteError("keys, values: expected finite numbers, got NaN or infinity")
        self.lengths = list(map(operator.add, lengths, counts))

    def select(self, queries: Tensor, routing: Routing, plan: Plan) -> Probed:
        """Route and probe queries (b, h, g, q, d) of the last q tokens."""
        ends = self._ends()
        rotation = routing.rope.before(ends, queries.shape[3]) if isinstance(routing.rope, Frequencies) else routing.rope
        return self._route_and_probe(queries, rotation, routing, _budget(plan), ends, 1)

    def select_each(self, queries: Tensor, routing: Routing, plan: Plan) -> Probed:
        """`select` for every query on its own, as if it were the newest token's: as of b * q sequences, those of one beside
        each other. Nothing enters through means.
        """
        b, h, g, q, d = queries.shape
        ends, rotation, budget = self._ends(), routing.rope, _budget(plan)
        if isinstance(rotation, Frequencies):
            rotation = rotation.before(ends, 1)
        if rotation is not None:
            cos, sin = rotation.cos.repeat_interleave(q, 0), rotation.sin.repeat_interleave(q, 0)
            rotation = Rotation(cos, sin, rotation.interleaved, rotation.scale)
        queries = queries.permute(0, 3, 1, 2, 4).reshape(b * q, h, g, 1, d).contiguous()
        sample = budget.sample
        if sample is not None:
            sample = replace(sample, rows=sample.rows.repeat_interleave(q, 0))
        budget = Budget(budget.rows.repeat_interleave(q, 0), budget.nprobe, budget.unread_mass, sample=sample)
        return self._route_and_probe(queries, rotation, routing, budget, ends, q)

    def _route_and_probe(
        self, queries: Tensor, rotation: Rotation | None, routing: Routing, budget: Budget, ends: Sequence[int], times: int
    ) -> Probed:
        """times : how often each sequence stands in ``queries``."""
        place, used = self._published, self._columns[SEGMENTS]
        z, a = self.backend.route(routing.router, queries, rotation)
        distances = np.array(ends)[:, None] - 1 - place.centres
        knots = torch.from_numpy(knots_of(distances, routing.first_knot, a.shape[3] - 1))
        tables = place.arena.tables
        if times > 1:
            knots, tables = knots.repeat_interleave(times, 0), tables.repeat_interleave(times, 0)
            used = [number for number in used for _ in range(times)]
        knots = knots if z.is_cpu else knots.to(z.device)
        return self.backend.probe(z, a, knots, tables, used, budget, routing.size_weighted)

    def run(self, queries: Tensor, routing: Routing, plan: Plan, scale: float) -> tuple[Tensor, Tensor, Probed | None]:
        """`select` and the causal `Backend.scan` over it, with nothing in between; over every row where the plan is dense.

        Returns out : dtype of queries (b, h, g, q, e), lse : float32 (b, h, g, q), newly allocated, and the selection: its
        counts, and rows or ``in_runs``; None for every row. It may lie in memory of the session, valid until the next step.
        """
        place, lengths = self._published, self._lengths_published
        arena = place.arena
        memory = queries, *arena.numbers
        if plan.dense:
            none = [0] * len(lengths)
            return *self.backend.scan(*memory, None, None, none, none, lengths, scale, True, None, place.coded), None
        probed, tail = self.select(queries, routing, plan), None
        if probed.tail is not None and probed.tail_counts is not None:
            tail = Tail(probed.tail, probed.tail_counts, arena.mean_keys, arena.mean_values, arena.tables)
        spans = self._columns[SINKS], self._columns[SEALED], lengths
        # most backends of others know no biases
        biases = () if probed.biases is None else (probed.biases,)
        return *self.backend.scan(*memory, probed.rows, probed.counts, *spans, scale, True, tail, place.coded, *biases), probed

    def steady_append(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> Callable[[Tensor, Tensor], bool] | None:
        """What `append` of other tokens laid out like these comes to while nothing else changes, or None for `append` itself.
        False from it: something has changed, nothing was done."""
        return None

    def steady_search(
        self, queries: Tensor, routing: Routing, plan: Plan, scale: float
    ) -> Callable[[Tensor], Tensor | None] | None:
        """What `run` of other queries like these comes to while lengths alone change, or None for `run` itself: of queries
        (b, hq, q, d) out (b, hq, q, e), or None, if something has changed, and nothing was done."""
        return None

    def _ends(self) -> list[int]:
        """Position of the token that comes next in each sequence."""
        return list(map(operator.add, self._lengths_published, self._gaps))

    @property
    def _published(self) -> Placement:
        assert self._placement is not None, "publish comes first"
        return self._placement

    @property
    def _lengths_published(self) -> list[int]:
        assert self.lengths is not None, "publish comes first"
        return self.lengths

    # -- where the device counts, and graphs are replayed; nothing to do elsewhere ------------------------------------

    def wait_stream(self) -> None:
        """What follows, on the current stream, waits for what was started before on another; not inside a capture."""

    def synchronize(self) -> Exception | None:
        """Wait for the device: what it noted of the tokens appended since the last time.

        StateError if it holds other lengths than the host knows.
        """
        return None

    def published_error(self) -> Exception | None:
        """`synchronize` as of the last `publish`; nothing that came later, so as not to wait for it."""
        return None

    def read_lengths(self) -> tuple[list[int], Exception | None]:
        """Wait for the device: rows in use there, and what it noted."""
        return self._lengths_published, None

    def invalidate(self) -> None:
        """The tokens are about to go, and what the device noted about them with them."""
        self.lengths = None

    def release_graphs(self) -> None:
        """No graph that was captured is replayed any more: what is kept for them may go."""


def _budget(plan: Plan) -> Budget:
    assert plan.budget is not None, "plan comes first"
    return plan.budget


def knots_of(distances: np.ndarray[Any, Any], first_knot: int, num_knots: int) -> np.ndarray[Any, Any]:
    """Where distances in tokens lie on the knots, an octave apart: float32 in [0, m - 1], clamped at both ends."""
    place = np.maximum(distances, 1.0)
    np.log2(place, out=place)
    np.subtract(place, first_knot, out=place)
    np.maximum(place, 0.0, out=place)  # np.clip costs four times this
    np.minimum(place, max(0, num_knots - 1), out=place)
    return place.astype(np.float32)
