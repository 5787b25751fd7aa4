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

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from .scalar_quantizer import Coded, StorageCode, encode
from .types import Budget, Placement, Probed, Rotation, Routing, Search, Tail
from .weights import RouterWeights


@dataclass(frozen=True)
class Frequencies:
    """RoPE whose angles follow from the position alone. inv_freq : float32 (r / 2), radians per position, on the backend's
    device; interleaved, scale : as in `Rotation`."""

    inv_freq: Tensor
    interleaved: bool
    scale: float


@dataclass(frozen=True)
class SegmentChange:
    """What becomes of the segments of one sequence: ``have``, [start, stop) each, from number ``first`` on become ``want``.

    Every segment of the one lies within one of the other. positions : int64 (n,), of the rows that are sealed now for the first
    time, up to the last of ``want``. means : how many leading segments keep the means of their runs afterwards.
    """

    sequence: int
    first: int
    have: Sequence[tuple[int, int]]
    want: Sequence[tuple[int, int]]
    positions: np.ndarray[Any, Any]
    means: int


@dataclass(frozen=True)
class Arena:
    """The memory of a batch. keys, values, ids, tables : as a backend's operations name them; mean_keys, mean_values : as in
    `Tail`; pending : int32 (b, h, N), lists of rows not sealed yet, -1 where the quantizer decides, or None for -1 everywhere.

    Where sealed rows are stored as codes, keys and values hold these, as in `Coded`, and plain_keys : storage dtype (b, h, R, d),
    plain_values : (b, h, R, e) the other rows.
    """

    keys: Tensor
    values: Tensor
    ids: Tensor
    tables: Tensor
    mean_keys: Tensor
    mean_values: Tensor
    pending: Tensor | None
    plain_keys: Tensor | None = None
    plain_values: Tensor | None = None

    @property
    def numbers(self) -> tuple[Tensor, Tensor]:
        """Where keys and values are written to as numbers."""
        if self.plain_keys is None or self.plain_values is None:
            return self.keys, self.values
        return self.plain_keys, self.plain_values


class Backend(ABC):
    """One way to execute the index. Tensors are C-contiguous and on the backend's device unless said otherwise."""

    name: str

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for an arena or a table, placed as this backend scans it best."""

    keeps_state: ClassVar[bool] = False
    """Whether `resident` returns something: asked several times a step, so not by a call."""

    def resident(self, batch: int, heads: int, d: int, d_v: int, nlist: int, dtype: torch.dtype) -> Resident | None:
        """State on the device for the decode step of a batch of this shape, see `Resident`; None for a backend without."""
        return None

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
    def prepare_quantizer(self, centroids: Tensor) -> Any:
        """Pack centroids : float32 (h, l, d) into whatever `assign` reads fastest; done once per index."""

    @abstractmethod
    def assign(self, quantizer: Any, keys: Tensor, rotation: Rotation | None) -> Tensor:
        """List number of each key: argmax over l of <k', c_l> - |c_l|^2 / 2, k' the key with ``rotation`` undone.

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

    reads_codes: ClassVar[bool] = False
    """Whether `scan` takes ``coded``."""

    seals_batches: ClassVar[bool] = False
    """Whether `seal_batch` may be of use."""

    def seal_batch(self, arena: Arena, changes: Sequence[SegmentChange], quantizer: Any, angles: Frequencies | None) -> bool:
        """Bring the segments of several sequences to what they shall be: assign, sort, write ids and tables, means.

        The tables have room for ``want``. What comes out is that of `assign`, `seal` and `means` one after the other. quantizer :
        as from `prepare_quantizer`, or None where ``arena.pending`` has every list. Does not wait for the device. Raises
        before it moves a row, or not at all. Returns False, having done nothing, if a backend does one after the other.
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
        count_lists: bool,
    ) -> Probed:
        """From scores to the rows to read: one selection per (sequence, KV head).

        z : float32 (b, h, j, l); a : float32 (b, h, j, m + 1) or (b, h, j, 0), as from `route`; m may be 0.
        knots : float32 (b, S): place of a segment on the knots, in [0, m - 1]; a_s interpolates a linearly there.
        tables : int32 (b, h, S, l + 1), the first num_segments[i] <= S of sequence i are valid. n_ls = run length.

        A run's weight is w_ls = sum_j sigmoid(c_j) exp(z_jl + a_js) / Z_j with Z_j = sum_ls n_ls exp(z_jl + a_js): the sum, over
        the group, of the predicted attention probability of one of its tokens. Without c the factor is 1. (count_lists False:
        w_ls = sum_j exp(z_jl) / sum_l exp(z_jl), the published classifier; a is not used.) Its mass is n_ls w_ls.

        nprobe 0: nonempty runs by falling weight (ties: newer segment, then lower list) until budget.rows are taken. With
        ``miss``: or, checked before each run, until the masses of the runs not taken sum to at most miss[h] * j.
        nprobe p: the p lists of largest w_l, which is w_ls with a_js = 0 (ties: lower list), every segment of each (newest
        first), until budget.rows are taken.
        Of the run that exceeds the budget the last rows (its newest tokens) are taken.

        ``entries``: of the nonempty runs in segments [0, means[i]) of which no row is taken, those of largest mass (ties: newer
        segment, then lower list).
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
    ) -> tuple[Tensor, Tensor]:
        """Softmax attention over rows [0, sinks[i]), ``rows`` and [sealed[i], lengths[i]) of each sequence, in one softmax,
        and over the entries of ``tail``. coded : which rows are codes; arena_keys and arena_values then hold the others, where it
        says.

        queries : (b, h, g, q, d) float32, bfloat16 or float16; rows : int32 (b, h, t) as from `probe`, or None for none.
        causal: query i of q sees a recent row r only if r < lengths - q + 1 + i; sinks, ``rows`` and entries are seen by every
        query (the caller guarantees that the last q rows are recent, or that all rows are: sealed == sinks == 0).

        Accumulates in float32. Returns out : dtype of queries (b, h, g, q, e) and lse : float32 (b, h, g, q), natural log.
        Nothing to attend: out = 0, lse = -inf. The result does not depend on the number of threads.
        """

    def prepare_search(self, search: Search) -> PreparedSearch | None:
        """`route`, `probe` and the causal `scan` over what that took as one call, for a step to cost little besides; None for a
        backend without."""
        return None

    def best(
        self, queries: Tensor, arena_keys: Tensor, rows: Tensor | None, counts: Tensor | None, sinks: Sequence[int],
        sealed: Sequence[int], lengths: Sequence[int], k: int,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
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


class PreparedSearch(Protocol):
    """A search as `Backend.prepare_search` packed it."""

    def __call__(
        self, queries: Tensor, rotation: Rotation | None, ends: Sequence[int], lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor, Probed]:
        """queries, rotation : as in `Backend.route`; lengths : as in `Backend.scan`; ends : position of the token that comes next
        in each sequence. A segment lies on the knots where log2 of the distance of its middle from the newest token, at least 1,
        less first_knot does. Returns out and lse as `Backend.scan`, and what was taken.
        """


class Resident(ABC):
    """The state of one batch on the device.

    `append` and `step` only launch kernels. `step` writes the selection into memory of the batch, where it is valid until the
    next one.
    """

    @property
    @abstractmethod
    def capturing(self) -> bool:
        """Whether launches are recorded now, for a graph, instead of run."""

    @abstractmethod
    def enter(self) -> None:
        """What follows, on the current stream, waits for what was started before on another; not inside a capture."""

    @abstractmethod
    def release(self) -> None:
        """No graph that was captured is replayed any more: what is kept for them may go."""

    @abstractmethod
    def ready(self, queries: Tensor, routing: Routing | None, limits: Any) -> bool:
        """Whether a `step` with such queries finds its memory and kernels in place, as it does from the second time on."""

    @abstractmethod
    def prepare(self, queries: Tensor, routing: Routing | None, limits: Any) -> None:
        """Put memory and kernels in place for a `step` with such queries."""

    @abstractmethod
    def publish(self, placement: Placement, counted: bool, budgets: Sequence[tuple[Any, Budget]]) -> None:
        """Use this memory and these numbers from now on, and write each budget to the memory of its limits.

        Flags stay as they are. counted : so do lengths and next positions, for the device has counted them itself. Does not wait
        for the device.
        """

    @abstractmethod
    def watch(self) -> None:
        """Have meta fetched as it is now, for `watched`. Does not wait for the device."""

    @abstractmethod
    def watched(self) -> np.ndarray[Any, Any]:
        """meta : int32 (b, 8) as it was when `watch` was called last; waits until then, and no longer."""

    @abstractmethod
    def limits(self, budget: Budget, most_rows: int, most_entries: int) -> Any:
        """What a search may take, on the device for as long as its parameters are in use. No later budget exceeds the sizes.

        budget : rows and entries on the host, here and in `publish`.
        """

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, counts: Sequence[int] | None) -> None:
        """Append ``counts[i]`` leading tokens of sequence i, or all n <= MAX_STEP_TOKENS, and advance lengths and positions.

        keys : storage dtype (b, h, n, d), values : (b, h, n, e), any strides but the last. What is not finite is stored, and
        noted in the flags; a sequence without room is left alone, and that is noted.
        """

    @abstractmethod
    def select(self, queries: Tensor, routing: Routing, limits: Any) -> Probed:
        """Route and probe queries (b, h, g, q, d) of the last q tokens, into new memory, as wide as ``limits`` allow."""

    @abstractmethod
    def step(
        self, queries: Tensor, routing: Routing | None, limits: Any, scale: float
    ) -> tuple[Tensor, Tensor, Probed | None]:
        """`select` and the causal `Backend.scan` over it, with nothing in between; without routing over every row.

        Returns out : dtype of queries (b, h, g, q, e), lse : float32 (b, h, g, q), newly allocated, and the selection: its
        counts, and rows or ``in_runs``.
        """

    @abstractmethod
    def read(self) -> np.ndarray[Any, Any]:
        """Wait for the device and return meta : int32 (b, 8); its flags are reset."""
