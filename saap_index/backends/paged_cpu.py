"""Operations on pages of host memory: checks what it is given and hands raw addresses to the compiled module, as cpu.py does."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LengthError, ShapeError
from .addresses import F32, I32, NO_SAMPLE, angles_of, code_of, plain, rows_of, sample_of
from .cpu import CpuBackend
from .paged import MAX_LISTS, PagedBackend, PagedBatch, PagedRouting, Pages
from .types import Rotation


class _Pool(NamedTuple):
    """Addresses of keys, values and lists; the tensors they are of."""

    shape: Any
    k: int
    v: int
    lists: int
    pages: Pages


class _Batch(NamedTuple):
    handle: Any
    plan: PagedBatch


class PagedCpu(PagedBackend):
    """See `PagedBackend` for the contract of every method."""

    backend: CpuBackend

    def prepare_pages(self, pages: Pages) -> _Pool:
        blocks, h, size, d = pages.keys.shape
        e = pages.values.shape[3]
        for name, x in (("keys", pages.keys), ("values", pages.values)):
            rows_of(name, x, pages.keys.dtype, tuple(x.shape))
        rows_of("lists", pages.lists, torch.uint8, (blocks, h, size))
        kb, kh, kn, _ = pages.keys.stride()
        lb, lh, _ = pages.lists.stride()
        shape = self.backend._cpu.PageShape(code_of("keys", pages.keys), h, d, e, size, blocks, kb, kh, kn, lb, lh)
        return _Pool(shape, pages.keys.data_ptr(), pages.values.data_ptr(), pages.lists.data_ptr(), pages)

    def prepare_batch(self, batch: PagedBatch) -> _Batch:
        b, (_, most), segments = len(batch.lengths), batch.blocks.shape, batch.bounds.shape[1] - 1
        blocks, bounds = plain("blocks", batch.blocks, I32, (b, most)), plain("bounds", batch.bounds, I32, (b, segments + 1))
        lengths, used = list(batch.lengths), list(batch.num_segments)
        return _Batch(self.backend._cpu.Paged(b, segments, blocks, most, lengths, bounds, used), batch)

    def write(
        self, pages: _Pool, keys: Tensor, values: Tensor, slots: Tensor, quantizer: Any, rotation: Rotation | None
    ) -> None:
        _, h, _, d = pages.pages.keys.shape
        n, e, dtype = len(slots), pages.pages.values.shape[3], pages.pages.keys.dtype
        if quantizer is not None and (quantizer.shape[0], quantizer.shape[2]) != (h, d):
            raise ShapeError(f"quantizer: expected {h} heads and {d} dims, got {quantizer.shape}")
        if quantizer is not None and quantizer.shape[1] > MAX_LISTS:
            raise LengthError(f"quantizer: expected at most {MAX_LISTS} lists, got {quantizer.shape[1]}")
        k, v = rows_of("keys", keys, dtype, (n, h, d)), rows_of("values", values, dtype, (n, h, e))
        angles = angles_of(rotation if quantizer is not None else None, n, d)
        at = plain("slots", slots, torch.int64, (n,))
        kn, kh, _ = keys.stride()
        vn, vh, _ = values.stride()
        module = self.backend._module()
        module.write_pages(pages.shape, pages.k, pages.v, pages.lists, k, kn, kh, v, vn, vh, at, n, quantizer, *angles)

    def count(self, pages: _Pool, batch: _Batch, nlist: int) -> Tensor:
        if not 0 < nlist <= MAX_LISTS:
            raise LengthError(f"nlist: expected 1 to {MAX_LISTS}, got {nlist}")
        b, segments, h = len(batch.plan.lengths), batch.plan.bounds.shape[1] - 1, pages.pages.keys.shape[1]
        tables = torch.zeros((b, h, segments, nlist + 1), dtype=I32, device="cpu")
        self.backend._module().count_pages(pages.shape, pages.lists, batch.handle, nlist, tables.data_ptr())
        return tables

    def find_biased(
        self, pages: _Pool, batch: _Batch, tables: Tensor, numbers: Tensor | None, counts: Tensor | None, biases: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        plan, h = batch.plan, pages.pages.keys.shape[1]
        b, segments, nlist = len(plan.lengths), plan.bounds.shape[1] - 1, tables.shape[3] - 1
        tables_at = numbers_at = counts_at = biases_at = t = 0
        if numbers is not None and counts is not None:
            t = numbers.shape[2]
            tables_at = plain("tables", tables, I32, (b, h, segments, nlist + 1))
            numbers_at, counts_at = plain("numbers", numbers, I32, (b, h, t)), plain("counts", counts, I32, (b, h))
        elif numbers is not counts or biases is not None:
            raise ShapeError("numbers, counts: expected both or neither, and biases only with both")
        if biases is not None:
            biases_at = plain("biases", biases, F32, (b, h, t))
        most = max(plan.lengths, default=0)
        rows = torch.empty((b, h, most), dtype=I32, device="cpu")
        taken = torch.empty((b, h), dtype=I32, device="cpu")
        row_biases = None if biases is None else torch.zeros((b, h, most), dtype=F32, device="cpu")
        self.backend._module().find_pages(
            pages.shape, pages.lists, batch.handle, nlist, tables_at, numbers_at, counts_at, t, most, rows.data_ptr(),
            taken.data_ptr(), biases_at, 0 if row_biases is None else row_biases.data_ptr(),
        )
        return rows, taken, row_biases

    def scan(
        self, pages: _Pool, queries: Tensor, rows: Tensor, counts: Tensor, scale: float, causal: bool,
        biases: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        b, h, g, q, _ = queries.shape
        t = rows.shape[2]
        q_at = self._queries(pages, queries)
        rows_at, counts_at = plain("rows", rows, I32, (b, h, t)), plain("counts", counts, I32, (b, h))
        out, lse = self._results(pages, queries)
        biases_at = 0 if biases is None else plain("biases", biases, F32, (b, h, t))
        self.backend._module().scan_pages(
            pages.shape, pages.k, pages.v, b, rows_at, counts_at, t, q_at, code_of("queries", queries), g, q, scale, causal,
            out.data_ptr(), lse.data_ptr(), biases_at,
        )
        return out, lse

    def search(
        self, pages: _Pool, batch: _Batch, routing: PagedRouting, queries: Tensor, scale: float, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, int]:
        b, h, g, q, d = queries.shape
        q_at, (out, lse) = self._queries(pages, queries), self._results(pages, queries, out)
        budgets_at, unread_at, sample_at = 0, 0, NO_SAMPLE
        if any(batch.plan.num_segments):
            if routing.router is None or routing.budget.mean_entries is not None:
                raise ShapeError("routing: expected a router, and a budget without entries")
            heads, _, dim, lists, _ = routing.router.shape
            if (heads, dim, lists) != (h, d, routing.nlist) or lists > MAX_LISTS:
                raise ShapeError(f"router: expected {(h, d, routing.nlist)} heads, dims and lists, got {(heads, dim, lists)}")
            budgets_at = plain("budget.rows", routing.budget.rows, I32, (b, h))
            unread = routing.budget.unread_mass
            unread_at = 0 if unread is None else plain("budget.unread_mass", unread, F32, (h,))
            if routing.budget.sample is not None:
                sample_at = sample_of(routing.budget, (b, h))
        read = self.backend._module().search_pages(
            pages.shape, pages.k, pages.v, pages.lists, batch.handle, routing.router, routing.first_knot, routing.size_weighted,
            *angles_of(routing.rotation, b * q, d), routing.budget.nprobe, budgets_at, unread_at, *sample_at, q_at,
            code_of("queries", queries), g, q, scale, out.data_ptr(), lse.data_ptr(),
        )
        return out, lse, int(read)

    def _queries(self, pages: _Pool, queries: Tensor) -> int:
        _, h, _, d = pages.pages.keys.shape
        b, _, g, q, _ = queries.shape
        return plain("queries", queries, queries.dtype, (b, h, g, q, d))

    def _results(self, pages: _Pool, queries: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shape = queries.shape[:-1]
        of = (*shape, pages.pages.values.shape[3])
        if out is None:
            out = torch.empty(of, dtype=queries.dtype, device="cpu")
        else:
            plain("out", out, queries.dtype, of)
        return out, torch.empty(shape, dtype=F32, device="cpu")
