"""Operations on an engine's pages as launches of cuda/paged.cu and of the scan of pages.

The launchers know their kernels' parameters and grids: lengths lie on the device, grids depend on numbers of sequences alone, so
that each of them may be captured. `PagedCuda` is the seam over them: it takes plans from the host, allocates and may wait for the
device. What an engine runs in every step is paged_session.py.

Axes as in backends/paged.py, and X slices that a sequence is cut into.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DTypeError, LayoutError, LengthError, ShapeError
from ..codes import DTYPE_CODES, LENGTH, NEXT, SEALED, SEGMENTS, SINKS
from ..paged import MAX_LISTS, PagedBackend, PagedBatch, Pages
from ..types import Frequencies, Rotation
from . import append_assign as gpu_build
from . import scan as gpu_scan
from .backend import CudaBackend
from .launch import Launch, Runtime

FILE = "paged.cu"
MACROS = {"SAAP_THREADS": 256}
GROUP = 16
"""Tokens whose list numbers are read at once: 16 bytes."""

COUNT_SHARED_BYTES = (MACROS["SAAP_THREADS"] // 32 * MAX_LISTS + 1) * 4
FIND_SHARED_BYTES = (32 + 2 * MAX_LISTS + 4) * 4 + MAX_LISTS

_LISTS = np.dtype(
    [(x, "u8") for x in ("lists", "blocks", "meta", "bounds", "pieces")]
    + [(x, "i8") for x in ("page_bytes", "head_bytes")]
    + [(x, "i4") for x in ("width", "pages", "size", "segments", "nlist")],
    align=True,
)
PLAN_PARAMS = np.dtype(
    [(x, "u8") for x in ("lengths", "shares", "meta", "bounds", "centres", "budgets", "tickets")]
    + [("selectivity", "f8")]
    + [(x, "i4") for x in ("sinks", "recent", "break_even", "segments", "sequences", "layers", "heads", "num_tickets")],
    align=True,
)
_NAMES = [(name, _LISTS[name]) for name in _LISTS.names or ()]
"""Of the struct of lists, which every other one begins with: flat, so that a launch changes its pointers by name."""

_PAD = [("lists_end", "i4")]  # of that struct, whose size is a multiple of 8
COUNT_PARAMS = np.dtype([*_NAMES, *_PAD, *((x, "u8") for x in ("tables", "tickets", "flags"))], align=True)
FIND_PARAMS = np.dtype(
    [*_NAMES, *_PAD, *((x, "u8") for x in ("tables", "taken", "rows", "counts", "totals"))]
    + [(x, "i4") for x in ("most", "page_rows", "token_rows", "queries")],
    align=True,
)
WRITE_PARAMS = np.dtype(
    [(x, "u8") for x in ("keys", "values", "pool_keys", "pool_values", "lists", "slots", "list_nos")]
    + [(x, "i8") for x in ("key_n", "key_h", "value_n", "value_h", "page", "head", "token", "list_page", "list_head")]
    + [(x, "i4") for x in ("n", "heads", "size", "pages", "key_vectors", "value_vectors", "aligned")],
    align=True,
)

CONFIGURATIONS = tuple((FILE, f"saap_paged_{name}", MACROS) for name in ("plan", "count", "find", "write"))
"""All there are: (file, kernel, macros)."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Pages that the kernels can read: rows and list numbers at multiples of 16 bytes, pages of a multiple of 16 tokens.

    Raises LayoutError for others, DTypeError for a storage type that is none of ours.
    """

    pages: Pages

    def __post_init__(self) -> None:
        k, v, lists = self.pages.keys, self.pages.values, self.pages.lists
        if k.dtype not in DTYPE_CODES:
            raise DTypeError(f"pages: expected one of {list(DTYPE_CODES)}, got {k.dtype}")
        size, item = k.shape[2], k.element_size()
        starts = [k.data_ptr(), v.data_ptr(), lists.data_ptr(), *(x * item for x in k.stride()[:3]), *lists.stride()[:2]]
        if size % GROUP or any(x % GROUP for x in starts) or any(x.shape[3] % 8 for x in (k, v)):
            raise LayoutError(
                f"pages: expected a multiple of {GROUP} tokens, dims that are multiples of 8, rows and list numbers at multiples "
                f"of {GROUP} bytes, got {size} tokens, {k.shape[3]} and {v.shape[3]} dims, strides {k.stride()} of {item} bytes "
                f"and {lists.stride()}"
            )

    @property
    def steps(self) -> tuple[int, int]:
        """Row numbers from a page to the next, and from a token to the next."""
        return self.pages.keys.stride(0) // self.pages.row, self.pages.keys.stride(2) // self.pages.row


class CudaBatch(PagedBatch):
    """With what kernels read of it, on the device: pages : int32 (b, M), spans : int32 (b, S + 1), meta : int32 (b, 8)."""

    pages: Tensor
    spans: Tensor
    meta: Tensor


@dataclass(frozen=True)
class Cut:
    """How sequences are cut for `count` and `find`: parts : X; segments : S."""

    sequences: int
    heads: int
    parts: int
    segments: int
    nlist: int

    @property
    def num_pieces(self) -> int:
        """Elements of their workspace."""
        return self.sequences * self.heads * (self.parts + self.segments) * self.nlist

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.parts, self.heads, self.sequences


def parts_of(runtime: Runtime, sequences: int, heads: int, most_tokens: int) -> int:
    """As many as keep every multiprocessor at work twice, but none that has less than a turn of a block to do."""
    wanted = 2 * runtime.multiprocessors // max(1, sequences * heads)
    return max(1, min(wanted, -(-most_tokens // (GROUP * MACROS["SAAP_THREADS"]))))


def bind_plan(
    runtime: Runtime, lengths: Tensor, shares: Tensor, selectivity: float, spared: tuple[int, int, int], meta: Tensor,
    bounds: Tensor, centres: Tensor, budgets: Tensor, tickets: Tensor,
) -> Launch:
    """Segments and budgets of a step from its lengths : int32 (b).

    shares : float32 (layers, h); spared : sinks, recent tokens and break-even; out: meta : int32 (b, 8), bounds : int32
    (b, S + 1), centres : float32 (b, S), budgets : int32 (layers, b, h); tickets : int32, which become zeros.
    """
    sinks, recent, break_even = spared
    b = len(lengths)
    params = gpu_build.pack_params(
        PLAN_PARAMS, lengths=lengths.data_ptr(), shares=shares.data_ptr(), meta=meta.data_ptr(), bounds=bounds.data_ptr(),
        centres=centres.data_ptr(), budgets=budgets.data_ptr(), tickets=tickets.data_ptr(), selectivity=selectivity, sinks=sinks,
        recent=recent, break_even=break_even, segments=bounds.shape[1] - 1, sequences=b, layers=shares.shape[0],
        heads=shares.shape[1], num_tickets=tickets.numel(),
    )
    kept = lengths, shares, meta, bounds, centres, budgets, tickets
    return Launch(_kernel(runtime, "plan"), (b, 1, 1), MACROS["SAAP_THREADS"], 0, params, *kept)


def bind_count(
    runtime: Runtime, cut: Cut, lists: Tensor, blocks: Tensor, meta: Tensor, bounds: Tensor, pieces: Tensor, tables: Tensor,
    tickets: Tensor, flags: Tensor | None = None,
) -> Launch:
    """Offsets of runs. lists : uint8 (B, h, N) of a `Pool`; a start may take others of the same shape and strides.

    blocks : int32 (b, M); meta : int32 (b, 8); bounds : int32 (b, S + 1); pieces : int32 (num_pieces,), scratch that `bind_find`
    reads; tables : int32 (b, h, S, l + 1) out; tickets : int32 (b * h), zeros; flags : int32 (1), becomes 1 where a number is l
    or more.
    """
    p = np.zeros((), COUNT_PARAMS)
    _put_lists(p, cut, lists, blocks, meta, bounds, pieces)
    p["tables"], p["tickets"], p["flags"] = tables.data_ptr(), tickets.data_ptr(), gpu_build.address(flags)
    kept = blocks, meta, bounds, pieces, tables, tickets, flags
    return Launch(_kernel(runtime, "count"), cut.grid, MACROS["SAAP_THREADS"], COUNT_SHARED_BYTES, p, *kept)


def bind_find(
    runtime: Runtime, cut: Cut, pool: Pool, blocks: Tensor, meta: Tensor, bounds: Tensor, pieces: Tensor, tables: Tensor,
    taken: Tensor | None, rows: Tensor, counts: Tensor, totals: Tensor | None = None, queries: int = 1,
) -> Launch:
    """Rows of what is read, behind a `count` of the same. taken : int32 (b, h, S, l), None for every token; rows : int32
    (b, h, t) and counts : int32 (b, h) out; totals : int64 (4), added to, ``queries`` times what is read."""
    p = np.zeros((), FIND_PARAMS)
    _put_lists(p, cut, pool.pages.lists, blocks, meta, bounds, pieces)
    p["tables"], p["taken"], p["rows"] = tables.data_ptr(), gpu_build.address(taken), rows.data_ptr()
    p["counts"], p["totals"], p["most"] = counts.data_ptr(), gpu_build.address(totals), rows.shape[2]
    (p["page_rows"], p["token_rows"]), p["queries"] = pool.steps, queries
    kept = blocks, meta, bounds, pieces, tables, taken, rows, counts, totals
    return Launch(_kernel(runtime, "find"), cut.grid, MACROS["SAAP_THREADS"], FIND_SHARED_BYTES, p, *kept)


def write(runtime: Runtime, pool: Pool, keys: Tensor, values: Tensor, slots: Tensor, list_nos: Tensor | None) -> None:
    """Copy tokens to their slots. keys : storage dtype (n, h, d), values : (n, h, e), any strides but the last, which is 1;
    slots : int64 (n,); list_nos : int32 (h, n), or None to leave list numbers alone."""
    n, h, d = keys.shape
    if not n:
        return
    to, lists, item = pool.pages.keys, pool.pages.lists, keys.element_size()
    kv, vv = gpu_build.vectors(d, keys.dtype), gpu_build.vectors(values.shape[2], keys.dtype)
    threads, total = MACROS["SAAP_THREADS"], n * h * (kv + vv)
    blocks = min(-(-total // threads), 16 * runtime.multiprocessors)
    if total + blocks * threads >= 2**31:
        raise LengthError(f"write: expected fewer tokens in one call, got {n}")
    page, head, token = (x * item for x in to.stride()[:3])
    params = gpu_build.pack_params(
        WRITE_PARAMS, keys=keys.data_ptr(), values=values.data_ptr(), pool_keys=to.data_ptr(),
        pool_values=pool.pages.values.data_ptr(), lists=lists.data_ptr(), slots=slots.data_ptr(),
        list_nos=gpu_build.address(list_nos), key_n=keys.stride(0) * item, key_h=keys.stride(1) * item,
        value_n=values.stride(0) * item, value_h=values.stride(1) * item, page=page, head=head, token=token,
        list_page=lists.stride(0), list_head=lists.stride(1), n=n, heads=h, size=to.shape[2], pages=to.shape[0], key_vectors=kv,
        value_vectors=vv, aligned=gpu_build.in_vectors(keys) and gpu_build.in_vectors(values),
    )
    _kernel(runtime, "write").launch((blocks, 1, 1), threads, 0, params)


def _put_lists(
    p: np.ndarray[Any, Any], cut: Cut, lists: Tensor, blocks: Tensor, meta: Tensor, bounds: Tensor, pieces: Tensor
) -> None:
    p["lists"], p["blocks"], p["meta"], p["bounds"] = (x.data_ptr() for x in (lists, blocks, meta, bounds))
    p["pieces"], p["page_bytes"], p["head_bytes"] = pieces.data_ptr(), lists.stride(0), lists.stride(1)
    p["width"], p["pages"], p["size"] = blocks.stride(0), lists.shape[0], lists.shape[2]
    p["segments"], p["nlist"] = cut.segments, cut.nlist


def _kernel(runtime: Runtime, name: str) -> Any:
    return runtime.kernel(FILE, f"saap_paged_{name}", MACROS)


class PagedCuda(PagedBackend):
    """See `PagedBackend` for the contract of every method. Pages as in `Pool`."""

    backend: CudaBackend
    parts_of = staticmethod(parts_of)

    def prepare_pages(self, pages: Pages) -> Pool:
        return Pool(pages)

    def prepare_batch(self, batch: PagedBatch) -> CudaBatch:
        device = self.backend.device
        made = CudaBatch(batch.blocks, batch.lengths, batch.bounds, batch.num_segments)
        ends = [(int(row[0]), int(row[s])) if s else (0, 0) for row, s in zip(batch.bounds, batch.num_segments, strict=True)]
        columns = {LENGTH: batch.lengths, NEXT: batch.lengths, SEGMENTS: batch.num_segments}
        columns |= {SINKS: [low for low, _ in ends], SEALED: [high for _, high in ends]}
        tensors = {
            "pages": batch.blocks.to(device=device, dtype=torch.int32).contiguous(),
            "spans": batch.bounds.to(device=device, dtype=torch.int32).contiguous(),
            "meta": self.backend.meta(columns),
        }
        for name, x in tensors.items():
            object.__setattr__(made, name, x)
        return made

    def write(
        self, pages: Pool, keys: Tensor, values: Tensor, slots: Tensor, quantizer: Any, rotation: Rotation | Frequencies | None,
        positions: Tensor | None = None,
    ) -> None:
        """rotation : as there; or frequencies, and positions : int32 (n,)."""
        n, h, d = keys.shape
        list_nos = None
        if quantizer is not None:
            if (quantizer.panels.shape[0], quantizer.d) != (h, d):
                raise ShapeError(f"quantizer: expected {h} heads and {d} dims, got {quantizer.panels.shape[0]} and {quantizer.d}")
            if quantizer.nlist > MAX_LISTS:
                raise LengthError(f"quantizer: expected at most {MAX_LISTS} lists, got {quantizer.nlist}")
            turns: Rotation | gpu_build.Turns | None = None
            if isinstance(rotation, Frequencies):
                if positions is None or positions.dtype != torch.int32:
                    raise ShapeError("positions: expected int32 (n,) beside frequencies, got others")
                turns = gpu_build.Turns(rotation.inv_freq, positions, 0, rotation.interleaved, rotation.scale)
            elif rotation is not None:
                turns = rotation
            list_nos = torch.empty((h, n), dtype=torch.int32, device=keys.device)
            gpu_build.assign(self.backend.runtime, quantizer, keys.transpose(0, 1), list_nos, turns)
        write(self.backend.runtime, pages, keys, values, slots, list_nos)

    def count(self, pages: Pool, batch: CudaBatch, nlist: int) -> Tensor:
        flags = torch.zeros(1, dtype=torch.int32, device=self.backend.device)
        tables = self._count(pages, batch, nlist, flags)[2]
        if int(flags):
            raise IndexError(f"pages: lists: a list number lies outside [0, {nlist})")
        return tables

    def _count(self, pages: Pool, batch: CudaBatch, nlist: int, flags: Tensor | None) -> tuple[Cut, Tensor, Tensor]:
        """And how sequences were cut, and the pieces."""
        if not 0 < nlist <= MAX_LISTS:
            raise LengthError(f"nlist: expected 1 to {MAX_LISTS}, got {nlist}")
        runtime, device = self.backend.runtime, self.backend.device
        (b, width), h, size = batch.pages.shape, pages.pages.keys.shape[1], pages.pages.keys.shape[2]
        cut = Cut(b, h, self.parts_of(runtime, b, h, width * size), batch.spans.shape[1] - 1, nlist)
        pieces = torch.empty(cut.num_pieces, dtype=torch.int32, device=device)
        tables = torch.zeros((b, h, cut.segments, nlist + 1), dtype=torch.int32, device=device)
        tickets = torch.zeros(b * h, dtype=torch.int32, device=device)
        if b:
            bind_count(
                runtime, cut, pages.pages.lists, batch.pages, batch.meta, batch.spans, pieces, tables, tickets, flags
            )()
        return cut, pieces, tables

    def find_biased(
        self, pages: Pool, batch: CudaBatch, tables: Tensor, numbers: Tensor | None, counts: Tensor | None, biases: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Reads no samples."""
        if biases is not None:
            raise ShapeError("biases: expected none, for weighted samples are not read from pages here, got some")
        device, h = self.backend.device, pages.pages.keys.shape[1]
        b, most, nlist = len(batch.lengths), max(batch.lengths, default=0), tables.shape[3] - 1
        rows, found = (torch.empty(x, dtype=torch.int32, device=device) for x in ((b, h, most), (b, h)))
        if (numbers is None) != (counts is None):
            raise ShapeError("numbers, counts: expected both or neither")
        if not b:
            return rows, found, None
        taken = None if numbers is None or counts is None else _taken(tables, numbers, counts)
        cut, pieces, _ = self._count(pages, batch, nlist, None)
        where = batch.pages, batch.meta, batch.spans, pieces
        bind_find(self.backend.runtime, cut, pages, *where, tables, taken, rows, found)()
        return rows, found, None

    def scan(
        self, pages: Pool, queries: Tensor, rows: Tensor, counts: Tensor, scale: float, causal: bool,
        biases: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Reads no samples."""
        if biases is not None:
            raise ShapeError("biases: expected none, for weighted samples are not read from pages here, got some")
        backend, k, v = self.backend, pages.pages.keys, pages.pages.values
        b, h, g, q, d = queries.shape
        e, device = v.shape[3], backend.device
        of = b, h, g * q, q, d, e, k.dtype, queries.dtype, pages.pages.num_rows, causal
        scan = gpu_scan.Scan(backend.runtime, gpu_scan.ScanShape(*of, paged=True), backend.knobs.get("scan"))
        out = torch.empty((b, h, g, q, e), dtype=queries.dtype, device=device)
        lse = torch.empty((b, h, g, q), dtype=torch.float32, device=device)
        floats = torch.empty(scan.num_floats, dtype=torch.float32, device=device)
        tickets = torch.zeros(scan.num_tickets, dtype=torch.int32, device=device)
        launch = scan.bind_paged(k, v, pages.pages.row, gpu_scan.Listed(rows, counts), scale, floats, tickets)
        launch(queries=gpu_scan.aligned(queries), out=out, lse=lse)
        return out, lse


def _taken(tables: Tensor, numbers: Tensor, counts: Tensor) -> Tensor:
    """How many of ``numbers`` (b, h, t), ascending, of which the first counts (b, h) are, lie in each run: int32 (b, h, S, l)."""
    b, h = tables.shape[:2]
    place = torch.arange(numbers.shape[2], dtype=torch.int32, device=numbers.device)
    known = numbers.masked_fill(place >= counts[..., None], torch.iinfo(torch.int32).max).contiguous()
    before = torch.searchsorted(known, tables.view(b, h, -1).contiguous(), out_int32=True).view(tables.shape)
    return before.diff(dim=3).contiguous()
