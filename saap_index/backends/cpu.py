"""The host backend: checks what it is given and hands raw addresses to the compiled module.

The kernels trust sizes, so every size is checked here; contents that address memory (row and list numbers, offsets) the
kernels check themselves. A decode step makes three of these calls, hence the plain style: no wrapper objects, no views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ..bindings import native
from ..errors import DeviceError, DTypeError, LayoutError, LengthError, MissingDependencyError, ShapeError
from .base import Backend, Budget, Probed, Rotation, RouterWeights, Tail

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in bindings/dtypes.h
ALIGN_BYTES = 64  # so that a row of 128 bytes or more starts on a cache line

_F32, _I32 = torch.float32, torch.int32
_NO_ROTATION = (0, 0, 0, False, 1.0)
_NO_TAIL = (0, 0, 0, 0, 0, 0, 0, 0, 1)


def available() -> bool:
    """Whether the kernels were built; the first time they turn out not to be, a RuntimeWarning says so."""
    return native.load() is not None


class CpuBackend(Backend):
    """See `Backend` for the contract of every method."""

    name = "cpu"

    def __init__(self) -> None:
        module = native.load()
        if module is None:
            raise MissingDependencyError("backend 'cpu' needs saap_index._cpu: install saap-index with a C++20 compiler at hand")
        self._cpu: Any = module

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = int(np.prod(shape, dtype=np.int64))
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        raw = np.empty(count * dtype.itemsize + ALIGN_BYTES, np.uint8)  # NumPy asks for huge pages, torch does not
        skip = -raw.ctypes.data % ALIGN_BYTES
        return torch.from_numpy(raw[skip : skip + count * dtype.itemsize]).view(dtype).view(tuple(shape))

    def append(
        self, keys: Tensor, values: Tensor, arena_keys: Tensor, arena_values: Tensor, starts: Sequence[int], counts: Sequence[int]
    ) -> bool:
        b, h, n, d = keys.shape
        e = values.shape[-1]
        capacity, dtype = arena_keys.shape[2], arena_keys.dtype
        code = _code("arena_keys", arena_keys)
        k_at, v_at = _rows("keys", keys, dtype, (b, h, n, d)), _rows("values", values, dtype, (b, h, n, e))
        ak_at = _plain("arena_keys", arena_keys, dtype, (b, h, capacity, d))
        av_at = _plain("arena_values", arena_values, dtype, (b, h, capacity, e))
        if len(starts) != b or len(counts) != b:
            raise ShapeError(f"starts, counts: expected {b} numbers each, got {len(starts)} and {len(counts)}")
        for start, count in zip(starts, counts, strict=True):
            if not (0 <= count <= n and 0 <= start <= capacity - count):
                raise LengthError(
                    f"starts, counts: expected at most {n} tokens within {capacity} rows, got {count} tokens from row {start}"
                )
        kb, kh, kn, _ = keys.stride()
        vb, vh, vn, _ = values.stride()
        return bool(
            self._cpu.append(
                code, k_at, kb, kh, kn, v_at, vb, vh, vn, ak_at, av_at, b, h, capacity, d, e, list(starts), list(counts)
            )
        )

    def prepare_quantizer(self, centroids: Tensor) -> Any:
        h, lists, d = centroids.shape
        return self._cpu.make_quantizer(_plain("centroids", centroids, _F32, (h, lists, d)), h, lists, d)

    def assign(self, quantizer: Any, keys: Tensor, rotation: Rotation | None) -> Tensor:
        heads, _, d = quantizer.shape
        n = keys.shape[1]
        k_at = _rows("keys", keys, keys.dtype, (heads, n, d))
        angles = _angles(rotation, n, d)
        out = torch.empty((heads, n), dtype=_I32)
        self._cpu.assign(quantizer, _code("keys", keys), k_at, keys.stride(0), keys.stride(1), n, *angles, out.data_ptr())
        return out

    def seal(self, keys: Tensor, values: Tensor, ids: Tensor, start: int, list_nos: Tensor, table: Tensor) -> None:
        h, capacity, d = keys.shape
        e, n, lists = values.shape[-1], list_nos.shape[1], table.shape[1] - 1
        if not 0 <= start <= capacity - n:
            raise LengthError(f"start: expected {n} rows within {capacity}, got them from row {start}")
        self._cpu.seal(
            _code("keys", keys),
            _plain("keys", keys, keys.dtype, (h, capacity, d)),
            _plain("values", values, keys.dtype, (h, capacity, e)),
            _plain("ids", ids, _I32, (h, capacity)),
            h,
            capacity,
            d,
            e,
            start,
            n,
            _plain("list_nos", list_nos, _I32, (h, n)),
            lists,
            _rows("table", table, _I32, (h, lists + 1)),
            table.stride(0),
        )

    def means(self, keys: Tensor, values: Tensor, table: Tensor, mean_keys: Tensor, mean_values: Tensor) -> None:
        h, capacity, d = keys.shape
        e, lists = values.shape[-1], table.shape[1] - 1
        self._cpu.means(
            _code("keys", keys),
            _plain("keys", keys, keys.dtype, (h, capacity, d)),
            _plain("values", values, keys.dtype, (h, capacity, e)),
            h,
            capacity,
            d,
            e,
            lists,
            _rows("table", table, _I32, (h, lists + 1)),
            table.stride(0),
            *_lists("mean_keys", mean_keys, keys.dtype, (h, lists, d)),
            *_lists("mean_values", mean_values, keys.dtype, (h, lists, e)),
        )

    def prepare_router(self, weights: RouterWeights) -> Any:
        h, u, d = weights.hidden.shape
        lists, k = weights.nlist, weights.leading
        m = weights.bias_out.shape[1] - k
        if lists < 1 or k < 1 or m < 0:
            raise ShapeError(f"nlist: expected 1 to {weights.bias_out.shape[1]}, got {k}")
        return self._cpu.make_router(
            _plain("hidden", weights.hidden, _F32, (h, u, d)),
            _plain("bias_hidden", weights.bias_hidden, _F32, (h, u)),
            _plain("out", weights.out, _F32, (h, k + m, u)),
            _plain("skip", weights.skip, _F32, (h, k + m, d)),
            _plain("bias_out", weights.bias_out, _F32, (h, k + m)),
            0 if weights.lists is None else _plain("lists", weights.lists, _F32, (h, lists, k)),
            0 if weights.list_scales is None else _plain("list_scales", weights.list_scales, _F32, (h, k)),
            h,
            u,
            d,
            lists,
            m,
            k,
        )

    def route(self, router: Any, queries: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        h, _, d, lists, m = router.shape
        b, _, g, q, _ = queries.shape
        q_at = _plain("queries", queries, queries.dtype, (b, h, g, q, d))
        angles = _angles(rotation, b * q, d)
        z, a = torch.empty((b, h, g * q, lists)), torch.empty((b, h, g * q, m))
        self._cpu.route(router, _code("queries", queries), q_at, b, g, q, *angles, z.data_ptr(), a.data_ptr())
        return z, a

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
        b, h, j, lists = z.shape
        m, segments = a.shape[3], tables.shape[2]
        z_at = _plain("z", z, _F32, (b, h, j, lists))
        a_at = _plain("a", a, _F32, (b, h, j, m))
        knots_at = _plain("knots", knots, _F32, (b, segments))
        tables_at = _plain("tables", tables, _I32, (b, h, segments, lists + 1))
        if len(num_segments) != b:
            raise ShapeError(f"num_segments: expected {b} numbers, got {len(num_segments)}")
        for valid in num_segments:
            if not 0 <= valid <= segments:
                raise LengthError(f"num_segments: expected 0 to {segments}, got {valid}")
        if not 0 < lists < 65536 or segments > 65535 or budget.nprobe < 0:
            raise LengthError(
                f"expected 1 to 65535 lists, up to 65535 segments and nprobe >= 0, got {lists}, {segments}, {budget.nprobe}"
            )
        used, budgets_at = list(num_segments), _plain("budget.rows", budget.rows, _I32, (b, h))
        miss_at = 0 if budget.miss is None else _plain("budget.miss", budget.miss, _F32, (h,))
        bound = self._cpu.probe_bound(tables_at, b, h, lists, segments, used, budgets_at)
        rows, counts = torch.empty((b, h, bound), dtype=_I32), torch.empty((b, h), dtype=_I32)
        tail, entries_at, tail_bound, means = None, 0, 0, list(budget.means)
        if budget.entries is not None:
            if len(means) != b or not all(0 <= x <= s for x, s in zip(means, used, strict=True)):
                raise LengthError(f"budget.means: expected {b} numbers up to those of the segments, {used}, got {means}")
            entries_at = _plain("budget.entries", budget.entries, _I32, (b, h))
            tail_bound = max(0, min(max(means, default=0) * lists, int(budget.entries.max())))
            tail = torch.empty((b, h, tail_bound), dtype=_I32), torch.empty((b, h), dtype=_I32)
        t, x = self._cpu.probe(
            z_at,
            a_at,
            knots_at,
            tables_at,
            b,
            h,
            j,
            lists,
            m,
            segments,
            count_lists,
            budget.nprobe,
            used,
            budgets_at,
            miss_at,
            entries_at,
            means,
            bound,
            rows.data_ptr(),
            counts.data_ptr(),
            tail_bound,
            0 if tail is None else tail[0].data_ptr(),
            0 if tail is None else tail[1].data_ptr(),
        )
        rows = _packed(rows, b, h, t)
        return Probed(rows, counts) if tail is None else Probed(rows, counts, _packed(tail[0], b, h, x), tail[1])

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
        b, h, g, q, d = queries.shape
        capacity, e = arena_values.shape[2:]
        dtype = arena_keys.dtype
        q_at = _plain("queries", queries, queries.dtype, (b, h, g, q, d))
        k_at = _plain("arena_keys", arena_keys, dtype, (b, h, capacity, d))
        v_at = _plain("arena_values", arena_values, dtype, (b, h, capacity, e))
        rows_at = counts_at = t = 0
        if rows is not None and counts is not None:
            t = rows.shape[2]
            rows_at, counts_at = _plain("rows", rows, _I32, (b, h, t)), _plain("counts", counts, _I32, (b, h))
        elif rows is not counts:
            raise ShapeError("rows, counts: expected both or neither")
        if not len(sinks) == len(sealed) == len(lengths) == b:
            raise ShapeError(f"sinks, sealed, lengths: expected {b} each, got {len(sinks)}, {len(sealed)}, {len(lengths)}")
        for first, middle, last in zip(sinks, sealed, lengths, strict=True):
            if not 0 <= first <= middle <= last <= capacity:
                raise LengthError(f"expected 0 <= sinks <= sealed <= lengths <= {capacity}, got {first}, {middle}, {last}")
        out = torch.empty((b, h, g, q, e), dtype=queries.dtype)
        lse = torch.empty((b, h, g, q))
        self._cpu.scan(
            q_at,
            _code("queries", queries),
            k_at,
            v_at,
            _code("arena_keys", arena_keys),
            b,
            h,
            g,
            q,
            d,
            e,
            capacity,
            rows_at if t else 0,
            counts_at,
            t,
            list(sinks),
            list(sealed),
            list(lengths),
            scale,
            causal,
            out.data_ptr(),
            lse.data_ptr(),
            *(_NO_TAIL if tail is None else _tail(tail, dtype, (b, h, d, e))),
        )
        return out, lse

    def combine(self, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype = out_a.shape, out_a.dtype
        if dtype not in CODES or out_b.dtype != dtype:
            raise DTypeError(f"out_a, out_b: expected one of {_names()} for both, got {dtype} and {out_b.dtype}")
        a_at, b_at = _plain("out_a", out_a, dtype, shape), _plain("out_b", out_b, dtype, shape)
        la_at, lb_at = _plain("lse_a", lse_a, _F32, shape[:-1]), _plain("lse_b", lse_b, _F32, shape[:-1])
        out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
        self._cpu.combine(CODES[dtype], a_at, la_at, b_at, lb_at, lse.numel(), shape[-1], out.data_ptr(), lse.data_ptr())
        return out, lse


def _plain(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of a contiguous host tensor of that dtype and shape."""
    if x.dtype is not dtype or x.shape != shape or not x.is_contiguous() or not x.is_cpu:
        _refuse(name, x, dtype, shape, "contiguous")
    return x.data_ptr()


def _rows(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of a host tensor of which only the last axis need be contiguous."""
    if x.dtype is not dtype or x.shape != shape or not x.is_cpu or (x.stride(-1) != 1 and shape[-1] > 1):
        _refuse(name, x, dtype, shape, "contiguous along the last axis")
    return x.data_ptr()


def _lists(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, int, int]) -> tuple[int, int]:
    """The address of a host tensor (h, l, d) contiguous but over h, and its stride there."""
    if x.dtype is not dtype or x.shape != shape or not x.is_cpu or (shape[0] and not x[0].is_contiguous()):
        _refuse(name, x, dtype, shape, "contiguous within a head")
    return x.data_ptr(), x.stride(0)


def _packed(x: Tensor, b: int, h: int, width: int) -> Tensor:
    """The leading b * h * width elements of x as (b, h, width)."""
    return x if width == x.shape[2] else x.view(-1)[: b * h * width].view(b, h, width)


def _refuse(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> NoReturn:
    if not x.is_cpu:
        raise DeviceError(f"{name}: expected a tensor on 'cpu', got one on {str(x.device)!r}")
    if x.dtype is not dtype:
        raise DTypeError(f"{name}: expected {dtype}, got {x.dtype}")
    if x.shape != shape:
        raise ShapeError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
    raise LayoutError(f"{name}: expected rows {layout}, got strides {x.stride()}")


def _tail(tail: Tail, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> tuple[int, ...]:
    """runs, counts, x, means of keys and values, M, tables, S, l as the module takes them."""
    b, h, d, e = shape
    x, (most, lists), segments = tail.runs.shape[-1], tail.keys.shape[2:4], tail.tables.shape[2]
    return (
        _plain("tail.runs", tail.runs, _I32, (b, h, x)) if x else 0,
        _plain("tail.counts", tail.counts, _I32, (b, h)),
        x,
        _plain("tail.keys", tail.keys, dtype, (b, h, most, lists, d)),
        _plain("tail.values", tail.values, dtype, (b, h, most, lists, e)),
        most,
        _plain("tail.tables", tail.tables, _I32, (b, h, segments, lists + 1)),
        segments,
        lists,
    )


def _code(name: str, x: Tensor) -> int:
    code = CODES.get(x.dtype)
    if code is None:
        raise DTypeError(f"{name}: expected one of {_names()}, got {x.dtype}")
    return code


def _names() -> str:
    return ", ".join(str(t).removeprefix("torch.") for t in CODES)


def _angles(rotation: Rotation | None, n: int, d: int) -> tuple[int, int, int, bool, float]:
    """cos, sin, r, interleaved, scale as the module takes them."""
    if rotation is None:
        return _NO_ROTATION
    half = rotation.cos.shape[-1]
    if 2 * half > d:
        raise ShapeError(f"rotation: expected at most {d // 2} angles per token, got {half}")
    cos, sin = _plain("rotation.cos", rotation.cos, _F32, (n, half)), _plain("rotation.sin", rotation.sin, _F32, (n, half))
    return cos, sin, 2 * half, rotation.interleaved, rotation.scale
