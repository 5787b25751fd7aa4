"""Launches cuda/scan.cu, cuda/scan_f32.cu and cuda/combine.cu. Knows the configurations of those kernels, their parameters and
how much memory they need; tensors come checked: of the dtype and shape said here, contiguous, on the device of the runtime.

Axes as in backends/base.py: b sequences, h KV heads, j = g * q query vectors of a KV head, N rows of the arena, t rows listed,
x runs read through their means, S segments, M of them with means, l lists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..codes import DTYPE_CODES
from ..types import Tail
from .launch import CLUSTERS, Launch, Runtime

_POINTERS = (
    "queries keys values rows runs run_counts counts tail tail_counts mean_keys mean_values tables meta "
    "partials masses tickets out lse"
)
_INTS = "sequences heads vectors num_queries capacity max_rows max_tail max_runs max_segments max_means lists causal dense"
PARAMS = np.dtype(
    [(name, np.uint64) for name in _POINTERS.split()]
    + [(name, np.float32) for name in ("scale_log2", "inverse_heads", "inverse_queries")]
    + [(name, np.int32) for name in _INTS.split()],
    align=True,
)
_FIELDS = [(name, PARAMS[name]) for name in PARAMS.names or ()]
CLOCK_PARAMS = np.dtype([*_FIELDS, ("clocks", np.uint64)], align=True)
CODED_PARAMS = np.dtype([*_FIELDS, ("spans", np.uint64)], align=True)
WEIGHTED_PARAMS = np.dtype([*_FIELDS, ("weights", np.uint64)], align=True)
CODED_WEIGHTED_PARAMS = np.dtype([*_FIELDS, ("weights", np.uint64), ("spans", np.uint64)], align=True)
PAGED_PARAMS = np.dtype([*_FIELDS, ("head_bytes", np.int64), ("row_bytes", np.int32)], align=True)
POINTS = "began", "waited", "planned", "copying", "arrived", "added", "merged", "ticketed", "ended"
"""Of a block, with SAAP_CLOCK: scan_params.cuh."""
COMBINE_PARAMS = np.dtype(
    [(name, np.uint64) for name in "out_a lse_a out_b lse_b out lse".split()] + [("n", np.int64), ("e", np.int32)], align=True
)
COMBINE_THREADS = 256

H200_SHARED_BYTES = 227 * 1024
MOST_WARPS, MOST_STAGES = 8, 4
PAGED = {"SAAP_PAGED": 1, "SAAP_RUNS": 32, "SAAP_CLOCK": 0}
"""What makes it a scan of pages, which has no runs."""

CODED_KERNEL = "scan_codes.cu", "saap_scan_codes"
WEIGHTED = {"SAAP_WEIGHTED": 1, "SAAP_CLOCK": 0}
"""What makes it a scan of runs with weights; one without compiles nothing of them."""

WEIGHT = np.dtype([("before", np.int32), ("probability", np.int32), ("offset", np.int32), ("bias", np.float32)], align=True)
"""Of a run of a weighted selection: scan_params.cuh."""

RUNS = 1024
"""Runs that a block has in shared memory: of more it has every second, third, ..., and looks up the others in device memory."""


def file_of(storage: torch.dtype) -> tuple[str, str]:
    """The source and the kernel for arenas of that dtype."""
    return ("scan_f32.cu", "saap_scan_f32") if storage is torch.float32 else ("scan.cu", "saap_scan")


def configuration(d: int, e: int, storage: torch.dtype, query: torch.dtype, j: int, max_shared_bytes: int) -> dict[str, int]:
    """The macros of the kernel for these shapes, in a block of at most ``max_shared_bytes``.

    What holds memory busy is bytes in flight, so a block takes as many warps, and then stages, as its shared memory holds.
    """
    wide = _padded(d, storage) + _padded(e, storage)
    # two groups where their fragments fit into the registers of a thread
    groups = 2 if j > 8 and storage is not torch.float32 and wide <= 256 else 1
    tile = 32 if wide <= 128 and storage is not torch.float32 else 16
    return _filled(_macros(d, e, storage, query, groups, tile), max_shared_bytes)


def coded_configuration(d: int, e: int, bits: int, query: torch.dtype, j: int, max_shared_bytes: int) -> dict[str, int]:
    """The same of a scan of codes, values of so many bits. Two groups of queries need more registers than a thread has where
    vectors are long."""
    groups = 2 if j > 8 and d + e <= 256 else 1
    return _filled(_macros(d, e, torch.float16, query, groups, 16) | {"SAAP_CODED": bits}, max_shared_bytes)


def _macros(d: int, e: int, storage: torch.dtype, query: torch.dtype, groups: int, tile: int) -> dict[str, int]:
    return {
        "SAAP_D": d,
        "SAAP_E": e,
        "SAAP_T": DTYPE_CODES[storage],
        "SAAP_TQ": DTYPE_CODES[query],
        "SAAP_GROUPS": groups,
        "SAAP_TILE": tile,
        "SAAP_BLOCKS": 1,
        "SAAP_RUNS": RUNS,
    }


def _filled(macros: dict[str, int], max_shared_bytes: int) -> dict[str, int]:
    """With as many warps and stages as fit."""
    for warps in range(MOST_WARPS, 0, -1):
        for stages in range(MOST_STAGES, 1, -1):
            macros |= {"SAAP_WARPS": warps, "SAAP_STAGES": stages}
            if shared_bytes(macros) <= max_shared_bytes:
                return macros
    return macros


def shared_bytes(macros: dict[str, int]) -> int:
    """Dynamic shared memory of a block: see scan_params.cuh."""
    d, e, warps, tile = (macros[f"SAAP_{name}"] for name in ("D", "E", "WARPS", "TILE"))
    storage = next(dtype for dtype, code in DTYPE_CODES.items() if code == macros["SAAP_T"])
    bits = macros.get("SAAP_CODED", 0)
    coded = sum((words + 3) // 8 * 32 + 16 for words in (d // 4 + 1, e * bits // 32 + 1))
    stage = tile * (coded if bits else (_padded(d, storage) + _padded(e, storage)) * storage.itemsize)
    core = 8 * d * 4 + warps * 8 * tile * 4 if storage is torch.float32 else 0
    exchange = warps * 8 * (-(-e // 16) * 16 + 4)
    return warps * macros["SAAP_STAGES"] * stage + 48 + 48 * 32 + 8 * macros["SAAP_RUNS"] + warps * 64 + core + exchange * 4


def _padded(dim: int, storage: torch.dtype) -> int:
    """Elements of a row in shared memory."""
    return dim if storage is torch.float32 else -(-dim // 16) * 16


@dataclass(frozen=True)
class ScanShape:
    """What a scan is compiled and sized for. dense: it reads rows [0, length) of each sequence, and no list; paged: a list, and
    nothing else, of a pool's rows, of which there are ``capacity``; coded: bits of the values of rows that are codes, read as
    float16, or 0; weighted: of `Runs` with weights."""

    sequences: int
    heads: int
    vectors: int
    num_queries: int
    d: int
    e: int
    storage: torch.dtype
    query: torch.dtype
    capacity: int
    causal: bool = False
    dense: bool = False
    paged: bool = False
    coded: int = 0
    weighted: bool = False


@dataclass(frozen=True)
class Listed:
    """Rows to read: rows : int32 (b, h, t), counts : int32 (b, h)."""

    rows: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Runs:
    """Rows to read, in runs: runs : int32 (b, h, R, 2), for each the row behind it, and the rows in it and in those before it;
    run_counts : int32 (b, h) of them; counts : int32 (b, h) rows in them, at most ``most_rows``.

    weights : int32 (b, h, R, 4), or None: of every run rows before it, probability, offset, and the bits of its bias, float32 in
    nats, as `WEIGHT` has them. Its rows may then be a sample with gaps (`Weight` in cuda/scan_params.cuh), and instead of the row
    behind it ``runs`` has the sum of its first row and the rows in it."""

    runs: Tensor
    run_counts: Tensor
    counts: Tensor
    most_rows: int
    weights: Tensor | None = None

    def rows(self) -> Tensor:
        """int32 (b, h, most_rows): the rows, run by run; anything behind the last."""
        return self._listed()[0]

    def biases(self) -> Tensor | None:
        """float32 (b, h, most_rows): what is added to the logits of `rows`, nats; None without weights."""
        return self._listed()[1]

    def _listed(self) -> tuple[Tensor, Tensor | None]:
        entries = torch.arange(self.most_rows, dtype=torch.int32, device=self.runs.device)
        if not self.runs.shape[2]:  # no segment has room: there are no rows
            rows = entries.expand(*self.runs.shape[:2], -1).contiguous()
            return rows, None if self.weights is None else rows.new_zeros(rows.shape, dtype=torch.float32)
        behind, ends = (x.contiguous() for x in self.runs.unbind(-1))
        number = torch.arange(ends.shape[2], dtype=torch.int32, device=ends.device)
        ends = ends.masked_fill(number >= self.run_counts[..., None], torch.iinfo(torch.int32).max)
        entries = entries.expand(*ends.shape[:2], -1).contiguous()
        at = torch.searchsorted(ends, entries, right=True).clamp_(max=max(0, ends.shape[2] - 1))
        rows = behind.gather(2, at) - (ends.gather(2, at) - entries)
        if self.weights is None:
            return rows, None
        before, probability, offset, bits = (x.contiguous().gather(2, at).long() for x in self.weights.unbind(-1))
        probability = probability.clamp(min=1)
        i = entries - before + 1
        rows = rows - i + torch.div((i << 20) - offset + probability - 1, probability, rounding_mode="floor")
        return rows.to(torch.int32), bits.to(torch.int32).view(torch.float32)


class Scan:
    """Attention over listed rows for one shape: the kernel, compiled, and its grid. Holds no memory of the device.

    num_floats, num_tickets : elements of the two workspaces of a call. A workspace serves one call at a time; the tickets are
    zeros before a call, and after each. num_clocks : elements of what a kernel with SAAP_CLOCK writes, else 0.
    """

    def __init__(self, runtime: Runtime, shape: ScanShape, knobs: dict[str, int] | None = None) -> None:
        """knobs : macros other than those of `configuration`, to try."""
        shared = runtime.max_shared_bytes
        about = shape.query, shape.vectors, shared
        macros = coded_configuration(shape.d, shape.e, shape.coded, *about) if shape.coded else configuration(
            shape.d, shape.e, shape.storage, *about
        )
        macros |= knobs or {}
        if shape.paged:
            macros |= PAGED
        if shape.weighted:
            macros |= WEIGHTED
        self.vectors = 8 * macros["SAAP_GROUPS"]
        passes = max(1, -(-shape.vectors // self.vectors))
        # All passes at once: they read the same rows, so all but one of them find them in the second cache.
        blocks = max(1, runtime.multiprocessors * macros["SAAP_BLOCKS"] // passes)
        self.macros = macros
        self.grid = blocks, passes, 1
        self.block = 32 * macros["SAAP_WARPS"]
        self.shared_bytes = shared_bytes(macros)
        pairs = shape.sequences * shape.heads
        self._states = passes * (blocks + pairs) * self.vectors
        self.num_floats = self._states * (shape.e + 2)
        self.num_tickets = passes * pairs
        self._mass_offset = 4 * self._states * shape.e
        self._kernel = runtime.kernel(*(CODED_KERNEL if shape.coded else file_of(shape.storage)), macros)
        self.num_clocks = blocks * passes * len(POINTS) if macros.get("SAAP_CLOCK") and not shape.paged else 0
        self._params = np.zeros((), _params_of(shape, self.num_clocks > 0))
        self._dependent = runtime.capability >= CLUSTERS
        for name in ("sequences", "heads", "vectors", "num_queries", "capacity", "causal", "dense"):
            self._params[name] = getattr(shape, name)
        self._params["inverse_heads"], self._params["inverse_queries"] = 1 / shape.heads, 1 / shape.num_queries

    def bind_paged(
        self, keys: Tensor, values: Tensor, row: int, listed: Listed, scale: float, floats: Tensor, tickets: Tensor
    ) -> Launch:
        """One softmax over the listed rows of a pool. keys : storage dtype (B, h, N, d), values : (B, h, N, e), of the same
        strides, rows aligned to 16 bytes, which the launch does not keep; row : elements that a row number counts, see `Pages`;
        the rest as in `bind`."""
        p = self._bound(keys, values, scale, floats, tickets)
        p["rows"], p["counts"], p["max_rows"] = listed.rows.data_ptr(), listed.counts.data_ptr(), listed.rows.shape[2]
        p["row_bytes"], p["head_bytes"] = row * keys.element_size(), keys.stride(1) * keys.element_size()
        kept = listed, floats, tickets
        return Launch(self._kernel, self.grid, self.block, self.shared_bytes, p, *kept, dependent=self._dependent)

    def _bound(self, keys: Tensor, values: Tensor, scale: float, floats: Tensor, tickets: Tensor) -> np.ndarray[Any, Any]:
        p = self._params.copy()
        p["keys"], p["values"], p["scale_log2"] = keys.data_ptr(), values.data_ptr(), scale * math.log2(math.e)
        p["partials"], p["masses"] = floats.data_ptr(), floats.data_ptr() + self._mass_offset
        p["tickets"] = tickets.data_ptr()
        return p

    def bind(
        self,
        keys: Tensor,
        values: Tensor,
        meta: Tensor,
        listed: Listed | Runs | None,
        means: Tail | None,
        scale: float,
        floats: Tensor,
        tickets: Tensor,
        clocks: Tensor | None = None,
        spans: Tensor | None = None,
    ) -> Launch:
        """One softmax over rows [0, sinks), the listed ones, [sealed, length) and the means: see cuda/scan.cu.

        keys : storage dtype (b, h, N, d), values : (b, h, N, e), rows aligned to 16 bytes; meta : int32 (b, 8). floats :
        float32 (num_floats,), tickets : int32 (num_tickets,); clocks : int64 (num_clocks,), cycles by block and point. Of codes,
        uint8 (b, h, N, c), spans : int32 (b, 4), as in cuda/scan_params.cuh, and out is float32.
        A start takes queries : query dtype (b, h, j, d), `aligned`, and writes out : query dtype (b, h, j, e), lse : float32
        (b, h, j).
        """
        p = self._bound(keys, values, scale, floats, tickets)
        p["meta"] = meta.data_ptr()
        if isinstance(listed, Runs):
            p["runs"], p["run_counts"], p["max_runs"] = listed.runs.data_ptr(), listed.run_counts.data_ptr(), listed.runs.shape[2]
            p["counts"], p["max_rows"] = listed.counts.data_ptr(), listed.most_rows
            if listed.weights is not None:
                p["weights"] = listed.weights.data_ptr()
        elif listed is not None and listed.rows.shape[2]:
            p["rows"], p["counts"], p["max_rows"] = listed.rows.data_ptr(), listed.counts.data_ptr(), listed.rows.shape[2]
        if means is not None and means.runs.shape[2]:
            p["tail"], p["tail_counts"], p["max_tail"] = means.runs.data_ptr(), means.counts.data_ptr(), means.runs.shape[2]
            p["mean_keys"], p["mean_values"] = means.keys.data_ptr(), means.values.data_ptr()
            p["tables"], p["max_segments"], p["max_means"] = means.tables.data_ptr(), means.tables.shape[2], means.keys.shape[2]
            p["lists"] = means.tables.shape[3] - 1
        if clocks is not None:
            p["clocks"] = clocks.data_ptr()
        if spans is not None:
            p["spans"] = spans.data_ptr()
        kept = keys, values, meta, listed, means, floats, tickets, clocks, spans
        return Launch(self._kernel, self.grid, self.block, self.shared_bytes, p, *kept, dependent=self._dependent)


def _params_of(shape: ScanShape, clocks: bool) -> np.dtype[Any]:
    """The struct of the kernel that is compiled for this."""
    if shape.paged:
        return PAGED_PARAMS
    if shape.weighted:
        return CODED_WEIGHTED_PARAMS if shape.coded else WEIGHTED_PARAMS
    return CODED_PARAMS if shape.coded else CLOCK_PARAMS if clocks else PARAMS


def rows_as_runs(rows: Tensor, counts: Tensor, biases: Tensor) -> Runs:
    """Listed rows, int32 (b, h, t), each a run of its own with its bias, float32 (b, h, t)."""
    t = rows.shape[2]
    entries = torch.arange(t, dtype=torch.int32, device=rows.device).expand_as(rows)
    runs = torch.stack([rows + 1, entries + 1], -1)
    whole, none = torch.full_like(rows, 1 << 20), torch.zeros_like(rows)
    weights = torch.stack([entries, whole, none, biases.contiguous().view(torch.int32)], -1)
    return Runs(runs, counts, counts, t, weights)


def aligned(queries: Tensor) -> Tensor:
    """Contiguous queries where the kernel can read them: 16-bit ones in pairs, from multiples of 4 bytes."""
    return queries.clone() if queries.data_ptr() % 4 else queries


def combine(runtime: Runtime, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge two states over disjoint tokens. out_a, out_b, out : (..., e) of one dtype, lse_a, lse_b, lse : float32 (...);
    out and lse are written and overlap no input."""
    n, e = lse_a.numel(), out_a.shape[-1]
    if n * e == 0:
        return
    params = np.zeros((), COMBINE_PARAMS)
    for name, x in {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b, "out": out, "lse": lse}.items():
        params[name] = x.data_ptr()
    params["n"], params["e"] = n, e
    blocks = min(-(-n * e // COMBINE_THREADS), 16 * runtime.multiprocessors)
    kernel = runtime.kernel("combine.cu", "saap_combine", {"SAAP_T": DTYPE_CODES[out_a.dtype]})
    kernel.launch((blocks, 1, 1), COMBINE_THREADS, 0, params)


def _shipped() -> Iterator[tuple[str, str, dict[str, int]]]:
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    same = [(64, 64, 8), (64, 64, 16), (96, 96, 16), (128, 128, 8), (128, 128, 16), (192, 128, 8), (192, 192, 8), (256, 256, 8)]
    shapes = [(*shape, bf16, bf16) for shape in same]
    shapes += [(64, 64, 16, bf16, f32), (128, 128, 8, bf16, f32), (128, 128, 16, bf16, f32), (256, 256, 8, bf16, f32)]
    shapes += [(128, 128, 16, f16, f16), (128, 128, 16, f16, bf16), (128, 128, 8, f32, f32), (256, 256, 8, f32, f32)]
    for d, e, j, storage, query in shapes:
        yield *file_of(storage), configuration(d, e, storage, query, j, H200_SHARED_BYTES)
    for d, e, j, storage, query in (shapes[0], shapes[3], shapes[4]):
        yield *file_of(storage), configuration(d, e, storage, query, j, H200_SHARED_BYTES) | WEIGHTED
    paged = [shapes[0], shapes[3], shapes[4], shapes[7], (128, 128, 16, f16, f16), (128, 128, 8, f32, f32)]
    for d, e, j, storage, query in paged:
        yield *file_of(storage), configuration(d, e, storage, query, j, H200_SHARED_BYTES) | PAGED
    for storage in DTYPE_CODES:
        yield "combine.cu", "saap_combine", {"SAAP_T": DTYPE_CODES[storage]}


CONFIGURATIONS = tuple(_shipped())
"""What is shipped, a sample of it: (file, kernel, macros). Other dims and dtypes need no more registers than these."""
