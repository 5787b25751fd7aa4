"""The seam over pages that somebody else owns: an engine's KV cache, read where it lies, of which nothing is moved or kept.

A pool has pages of some tokens each. A page holds, for every KV head, keys, values and the *list number* of each token, a byte:
a function of key, position and frozen centroids alone, so that pages may be shared, freed and used again without any
bookkeeping. What a search needs besides is derived in every step: runs are counted from these bytes (`count`), routed and
probed as in an arena (`Backend.route`, `Backend.probe`), the tokens of chosen runs are found by a second pass (`find`), and
rows of the pool are scanned (`scan`). Where part of a budget is a weighted sample, `find` takes biases along.

Axes: B pages of a pool, N tokens of a page, b sequences, h KV heads, g query heads per KV head, q queries, n tokens, d key dim, e
value dim, l lists (256 at most), S segments, t rows, M pages of a sequence.

Row numbers. Number r of a head is the row `Pages.row` * r elements behind the head's first: pages need not be a whole number
of rows apart, and any order of heads and tokens inside a page will do.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LayoutError, LengthError, ShapeError
from .base import Backend
from .types import Budget, Rotation

MAX_LISTS = 256
"""What a byte can number."""


@dataclass(frozen=True, eq=False)
class Pages:
    """A pool, as views of its memory.

    keys : storage dtype (B, h, N, d), values : (B, h, N, e), of the same strides, the last 1; lists : uint8 (B, h, N), contiguous
    over N.

    Raises ShapeError or LayoutError for anything else.
    """

    keys: Tensor
    values: Tensor
    lists: Tensor

    def __post_init__(self) -> None:
        k, v, x = self.keys, self.values, self.lists
        if k.ndim != 4 or v.shape[:3] != k.shape[:3] or x.shape != k.shape[:3] or 0 in k.shape[1:] or not v.shape[3:].numel():
            raise ShapeError(
                f"pages: expected keys (B, h, N, d), values (B, h, N, e) and lists (B, h, N), got {tuple(k.shape)}, "
                f"{tuple(v.shape)} and {tuple(x.shape)}"
            )
        if k.stride() != v.stride() or k.stride(3) != 1 or min(k.stride()) < 0 or (x.stride(2) != 1 and x.shape[2] > 1):
            raise LayoutError(
                f"pages: expected keys and values of the same strides, contiguous rows and lists, got strides {k.stride()}, "
                f"{v.stride()} and {x.stride()}"
            )
        if k.dtype != v.dtype or x.dtype != torch.uint8:
            got = f"{k.dtype}, {v.dtype}, {x.dtype}"
            raise LayoutError(f"pages: expected keys and values of one dtype and lists uint8, got {got}")
        if self.num_rows > 2**31 - 1:
            raise LengthError(f"pages: expected a pool whose rows 32 bits can number, got {self.num_rows} of {self.row} elements")

    @property
    def row(self) -> int:
        """Elements that a row number counts."""
        return math.gcd(self.keys.stride(0), self.keys.stride(2))

    @property
    def num_rows(self) -> int:
        """One more than the largest row number."""
        blocks, _, tokens, _ = self.keys.shape
        last = (blocks - 1) * self.keys.stride(0) + (tokens - 1) * self.keys.stride(2)
        return last // self.row + 1 if blocks else 0


@dataclass(frozen=True)
class PagedBatch:
    """Sequences of a step, the same for all layers.

    blocks : int32 (b, M), pages of each sequence in order; lengths : tokens of each, the new ones included. bounds : int32
    (b, S + 1), ascending positions: segment s is [bounds[s], bounds[s + 1]), of which the first num_segments[i] count. Tokens
    outside are always read; without segments all are.
    """

    blocks: Tensor
    lengths: Sequence[int]
    bounds: Tensor
    num_segments: Sequence[int]

    def __post_init__(self) -> None:
        b = len(self.lengths)
        if self.blocks.ndim != 2 or self.bounds.ndim != 2 or not self.bounds.shape[1]:
            raise ShapeError(
                f"blocks, bounds: expected (b, M) and (b, S + 1), got {tuple(self.blocks.shape)}, {tuple(self.bounds.shape)}"
            )
        if not len(self.blocks) == len(self.bounds) == len(self.num_segments) == b:
            raise ShapeError(f"blocks, bounds, num_segments: expected {b} each, got others")
        most = self.bounds.shape[1] - 1
        if not all(0 <= s <= most for s in self.num_segments):
            raise LengthError(f"num_segments: expected 0 to {most}, got {list(self.num_segments)}")


@dataclass(frozen=True)
class PagedRouting:
    """How a search chooses. router : as from `Backend.prepare_router`, or None where no sequence has segments; budget : without
    entries; first_knot, size_weighted, rotation : as in `Backend.route` and `Backend.probe`."""

    router: Any
    nlist: int
    first_knot: int
    size_weighted: bool
    rotation: Rotation | None
    budget: Budget


class PagedBackend(ABC):
    """One way to work on pages. backend : of the same device, for what is not about pages."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def prepare_pages(self, pages: Pages) -> Any:
        """Pack a pool into whatever the operations read fastest; done once per pool."""
        return pages

    def prepare_batch(self, batch: PagedBatch) -> Any:
        """Pack the sequences of a step; done once for all layers."""
        return batch

    @abstractmethod
    def write(self, pages: Any, keys: Tensor, values: Tensor, slots: Tensor, quantizer: Any, rotation: Rotation | None) -> None:
        """Write tokens and their list numbers.

        keys : storage dtype (n, h, d), values : (n, h, e), any strides but the last, which is 1; slots : int64 (n,), page * N +
        place, below 0 for a token that has none. quantizer : as from `Backend.prepare_quantizer`, or None for no list numbers;
        rotation : of the tokens' positions, to undo.
        """

    @abstractmethod
    def count(self, pages: Any, batch: Any, nlist: int) -> Tensor:
        """Offsets of runs, int32 (b, h, S, l + 1), as if tokens were sorted by segment, list and position: table[s, l + 1] -
        table[s, l] tokens of segment s lie in list l. Those of segments that do not count are anything.

        Raises IndexError if a list number is nlist or more.
        """

    def find(
        self, pages: Any, batch: Any, tables: Tensor, numbers: Tensor | None, counts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`find_biased` without biases: rows and how many."""
        return self.find_biased(pages, batch, tables, numbers, counts, None)[:2]

    @abstractmethod
    def find_biased(
        self, pages: Any, batch: Any, tables: Tensor, numbers: Tensor | None, counts: Tensor | None, biases: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Row numbers of what is read: tokens before the segments, those of ``numbers``, and tokens behind the segments.

        tables : as from `count`; numbers : int32 (b, h, t) in the order of ``tables``, counts : int32 (b, h), as `Backend.probe`
        takes them: ascending, of each run its last ones, but with ``biases`` any. None for every token. biases : float32
        (b, h, t), of the numbers, or None; only with numbers, and where the backend ``reads_samples``.

        Returns int32 (b, h, t'), anything behind the last, and how many, int32 (b, h). Tokens behind the segments come last and
        in order; the others in any. And biases of these rows, float32 (b, h, t'), 0 outside the segments; None without.
        """

    @abstractmethod
    def scan(
        self, pages: Any, queries: Tensor, rows: Tensor, counts: Tensor, scale: float, causal: bool, biases: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Softmax attention of queries (b, h, g, q, d) over rows : int32 (b, h, t), counts : int32 (b, h), of a pool.

        causal : query i of q does not see the last q - 1 - i rows. biases : float32 (b, h, t), nats, added to the logits of the
        rows, or None. The rest as in `Backend.scan`.
        """

    def search(
        self, pages: Any, batch: Any, routing: PagedRouting, queries: Tensor, scale: float, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, int]:
        """`count`, `Backend.route`, `Backend.probe`, `find` and the causal `scan`; also the rows that were read, of all heads.

        out : as `scan` returns it, contiguous, to write into; None for one of its own.

        A segment lies on the knots where log2 of the distance of its middle from the newest token, at least 1, less first_knot
        does.
        """
        numbers = counts = biases = None
        plan: PagedBatch = batch
        device = queries.device
        tables = torch.empty((len(plan.lengths), queries.shape[1], 0, routing.nlist + 1), dtype=torch.int32, device=device)
        if any(plan.num_segments):
            tables = self.count(pages, batch, routing.nlist)
            z, a = self.backend.route(routing.router, queries, routing.rotation)
            ends = plan.bounds.double()
            newest = torch.tensor(plan.lengths, dtype=torch.float64, device=ends.device)[:, None] - 1
            distances = (newest - (ends[:, 1:] + ends[:, :-1] - 1) / 2).clamp(min=1.0)
            last = max(0, a.shape[3] - 2)
            knots = (distances.log2() - routing.first_knot).clamp(0.0, last).float().to(device)
            probed = self.backend.probe(z, a, knots, tables, plan.num_segments, routing.budget, routing.size_weighted)
            numbers, counts, biases = probed.rows, probed.counts, probed.biases
        rows, read, row_biases = self.find_biased(pages, batch, tables, numbers, counts, biases)
        found, lse = self.scan(pages, queries, rows, read, scale, True, row_biases)
        return found if out is None else out.copy_(found), lse, int(read.sum())
