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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..precision import full_precision

if TYPE_CHECKING:
    from .resident import Resident
    from .search import PreparedSearch, Search


NETWORK = ("hidden", "bias_hidden", "out", "skip", "bias_out")
"""The tensors that every `RouterWeights` has."""

COMPARED = ("lists", "list_scales")
"""Those of one that compares its outputs with the lists."""


@dataclass(frozen=True)
class RouterWeights:
    """The query router of every KV head, as plain arrays: y, a, c = split(skip x + out silu(hidden x + bias_h) + bias_o).

    hidden : float32 (h, u, d); bias_hidden : float32 (h, u); out : float32 (h, k + m + 1, u)
    skip : float32 (h, k + m + 1, d); bias_out : float32 (h, k + m + 1)
    lists : float32 (h, l, k), list_scales : float32 (h, k), or both None

    The first k outputs, y, give z, log attention mass per token of each list: z = y and k = l without ``lists``, with them
    z = lists (list_scales y). The next m outputs are a at the knots of the log2 distance, the last is c, whose sigmoid is the
    share of the attention that lies outside sinks and window. u = 0 gives a linear router, m = 0 one without distance; k outputs
    alone one without c too. Standardisation of the input is folded into the weights.

    A matrix of whole numbers up to 127 takes a byte per number, one of bfloat16's values two, any other four.
    """

    hidden: Tensor
    bias_hidden: Tensor
    out: Tensor
    skip: Tensor
    bias_out: Tensor
    nlist: int
    lists: Tensor | None = None
    list_scales: Tensor | None = None

    @property
    def leading(self) -> int:
        """k, the outputs before those of distance."""
        return self.nlist if self.lists is None else int(self.lists.shape[2])

    @property
    def num_knots(self) -> int:
        return max(0, int(self.bias_out.shape[1]) - self.leading - 1)

    def tensors(self) -> dict[str, Tensor]:
        """By name; those of `COMPARED` only if there are lists."""
        return {name: getattr(self, name) for name in (NETWORK if self.lists is None else NETWORK + COMPARED)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], nlist: int, prefix: str = "") -> RouterWeights:
        """From `tensors`, or from a file's that has them under ``prefix`` and their names. LookupError if some are missing."""
        names = NETWORK + COMPARED if any(prefix + name in tensors for name in COMPARED) else NETWORK
        return cls(**{name: tensors[prefix + name] for name in names}, nlist=nlist)

    def map(self, change: Callable[[Tensor], Tensor]) -> RouterWeights:
        """With every tensor changed."""
        return RouterWeights.of({name: change(x) for name, x in self.tensors().items()}, self.nlist)

    @full_precision
    def composed(self) -> RouterWeights:
        """The same router with an output for each list in place of ``lists``: for a backend of one product."""
        if self.lists is None or self.list_scales is None:
            return self
        k, lists = self.leading, self.lists * self.list_scales[:, None]
        out, skip = (torch.cat([lists @ x[:, :k], x[:, k:]], 1) for x in (self.out, self.skip))
        bias = torch.cat([(lists @ self.bias_out[:, :k, None])[..., 0], self.bias_out[:, k:]], 1)
        return RouterWeights(self.hidden, self.bias_hidden, out, skip, bias, self.nlist)

    @cached_property
    def nbytes(self) -> int:
        """Of what is read for a query, once per call whatever the batch."""
        both = torch.cat([self.out, self.skip], 2)  # side by side in what is packed
        return _nbytes(self.hidden) + _nbytes(both) + self.bias_hidden.nbytes + self.bias_out.nbytes + self.list_bytes

    @cached_property
    def list_bytes(self) -> int:
        """The part of `nbytes` that is of the lists alone: with lists of a prompt's own nobody else reads it."""
        return 0 if self.lists is None or self.list_scales is None else _nbytes(self.lists) + self.list_scales.nbytes


def _nbytes(weights: Tensor) -> int:
    if weights.ndim < 3:
        return weights.nbytes
    if bool(((weights == weights.round()) & (weights.abs() <= 127)).all()):
        return weights.numel()
    return weights.numel() * (2 if torch.equal(weights, weights.bfloat16().float()) else 4)


@dataclass(frozen=True)
class Rotation:
    """Angles that undo RoPE for n consecutive tokens: cos, sin : float32 (n, r / 2), r rotated dims of d, r even.

    interleaved False (half-split, Llama): pairs are dims (i, i + r/2); True (GPT-J): pairs are dims (2i, 2i + 1).
    Undoing computes x' = (x cos + y sin) * scale, y' = (y cos - x sin) * scale for a pair (x, y); other dims pass through.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool
    scale: float


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
    `Tail`; given : int32 (b, h, N), lists of rows not sealed yet, -1 where the quantizer decides, or None for -1 everywhere."""

    keys: Tensor
    values: Tensor
    ids: Tensor
    tables: Tensor
    mean_keys: Tensor
    mean_values: Tensor
    given: Tensor | None


@dataclass(frozen=True)
class Budget:
    """What `Backend.probe` may take of each (sequence, KV head).

    rows : int32 (b, h), most rows.
    nprobe : 0, or lists to visit whole, as SAAP was published; then there is neither ``miss`` nor ``entries``.
    miss : float32 (h,) or None: attention per query vector, as predicted, that may stay unread outside sinks and window; no
        further run is taken once no more than that is left. Needs count_lists and a router with c.
    entries : int32 (b, h) or None, most unread runs to enter through their means. Needs count_lists.
    means : leading segments of each sequence that have run means, b numbers <= num_segments; read with ``entries`` only.
    """

    rows: Tensor
    nprobe: int = 0
    miss: Tensor | None = None
    entries: Tensor | None = None
    means: Sequence[int] = ()


@dataclass(frozen=True)
class Probed:
    """What `Backend.probe` took. rows : int32 (b, h, t), ascending, padded with -1, t = the largest count; counts : int32 (b, h).

    tail : int32 (b, h, x), numbers s * l + list of runs that enter through their means, ascending, padded with -1, x = the
    largest count; tail_counts : int32 (b, h). Both None where ``entries`` was.
    """

    rows: Tensor
    counts: Tensor
    tail: Tensor | None = None
    tail_counts: Tensor | None = None


@dataclass(frozen=True)
class Tail:
    """Runs that `Backend.scan` reads through their means, each an entry of logit scale * <q, mean key> + ln(its tokens).

    runs : int32 (b, h, x), counts : int32 (b, h), as in `Probed`; none of their rows is read. tables : int32 (b, h, S, l + 1);
    keys : storage dtype (b, h, M, l, d), values : (b, h, M, l, e), as from `Backend.means`.
    """

    runs: Tensor
    counts: Tensor
    keys: Tensor
    values: Tensor
    tables: Tensor


class Backend(ABC):
    """One way to execute the index. Tensors are C-contiguous and on the backend's device unless said otherwise."""

    name: str

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for an arena or a table, placed as this backend scans it best."""

    keeps_state: ClassVar[bool] = False
    """Whether `resident` returns something: asked several times a step, so not by a call."""

    def resident(self, batch: int, heads: int, d: int, d_v: int, nlist: int, dtype: torch.dtype) -> Resident | None:
        """State on the device for the decode step of a batch of this shape, see resident.py; None for a backend without."""
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

    seals_batches: ClassVar[bool] = False
    """Whether `seal_batch` may be of use."""

    def seal_batch(self, arena: Arena, changes: Sequence[SegmentChange], quantizer: Any, angles: Frequencies | None) -> bool:
        """Bring the segments of several sequences to what they shall be: assign, sort, write ids and tables, means.

        The tables have room for ``want``. What comes out is that of `assign`, `seal` and `means` one after the other. quantizer :
        as from `prepare_quantizer`, or None where ``arena.given`` has every list. Does not wait for the device. Raises before it
        moves a row, or not at all. Returns False, having done nothing, if one after the other is how this backend does it.
        """
        return False

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
    ) -> tuple[Tensor, Tensor]:
        """Softmax attention over rows [0, sinks[i]), ``rows`` and [sealed[i], lengths[i]) of each sequence, in one softmax,
        and over the entries of ``tail``.

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
