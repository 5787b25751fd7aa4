"""The host backend: checks what it is given and hands raw addresses to the compiled module.

The kernels trust sizes, so every size is checked here; contents that address memory (row and list numbers, offsets) the
kernels check themselves. Every decode step calls here, hence the plain style: no wrapper objects, no views.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DTypeError, LengthError, MissingDependencyError, NotFiniteError, ShapeError
from . import native
from .addresses import (
    F32,
    I32,
    NO_CODES,
    NO_TAIL,
    Places,
    ProbeRoom,
    Target,
    angles_of,
    check_spans,
    code_of,
    codes_of,
    dtype_names,
    listed_rows,
    lists_of,
    means_of,
    places_of,
    plain,
    rows_of,
    rows_to_merge,
    rows_to_seal,
    target_of,
    tokens_of,
)
from .base import Backend, Session
from .codes import DTYPE_CODES, SEALED, SEGMENTS, SINKS
from .scalar_quantizer import SCALE_BYTES, Coded, StorageCode
from .threads import available_cores
from .types import Budget, Frequencies, Placement, Plan, Probed, Rotation, Routing, Tail
from .weights import RouterWeights

ALIGN_BYTES = 64  # so that a row of 128 bytes or more starts on a cache line


def available() -> bool:
    """Whether the kernels were built; the first time they turn out not to be, a RuntimeWarning says so."""
    return native.load() is not None


class CpuBackend(Backend):
    """See `Backend` for the contract of every method."""

    name = "cpu"
    reads_codes = reads_samples = True

    def __init__(self) -> None:
        module = native.load()
        if module is None:
            raise MissingDependencyError("backend 'cpu' needs saap_index._cpu: install saap-index with a C++20 compiler at hand")
        self._cpu: Any = module

    _followed: ClassVar[int] = 0
    """Threads of torch that the pool, one for all, was last told of."""

    def _module(self) -> Any:
        """The compiled module, for an operation of many items: its pool follows torch.set_num_threads and OMP_NUM_THREADS, up to
        the cores that there are."""
        threads = torch.get_num_threads()
        if threads != CpuBackend._followed:
            self._cpu.suggest_num_threads(min(threads, available_cores()))
            CpuBackend._followed = threads
        return self._cpu

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = int(np.prod(shape, dtype=np.int64))
        if not count:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        raw = np.empty(count * dtype.itemsize + ALIGN_BYTES, np.uint8)  # NumPy asks for huge pages, torch does not
        skip = -raw.ctypes.data % ALIGN_BYTES
        return torch.from_numpy(raw[skip : skip + count * dtype.itemsize]).view(dtype).view(tuple(shape))

    def session(self, batch: int, heads: int, d: int, d_v: int, nlist: int, dtype: torch.dtype) -> Session:
        return CpuSession(self)

    def append(
        self, keys: Tensor, values: Tensor, arena_keys: Tensor, arena_values: Tensor, starts: Sequence[int], counts: Sequence[int]
    ) -> bool:
        return self.append_to(target_of(arena_keys, arena_values), keys, values, starts, counts)

    def append_to(self, target: Target, keys: Tensor, values: Tensor, starts: Sequence[int], counts: Sequence[int]) -> bool:
        """`append` to an arena that was checked before."""
        (b, h, d, e), n, capacity = target.shape, keys.shape[2], target.capacity
        rows = tokens_of(target, keys, values)
        if len(starts) != b or len(counts) != b:
            raise ShapeError(f"starts, counts: expected {b} numbers each, got {len(starts)} and {len(counts)}")
        for start, count in zip(starts, counts, strict=True):
            if not (0 <= count <= n and 0 <= start <= capacity - count):
                raise LengthError(
                    f"starts, counts: expected at most {n} tokens within {capacity} rows, got {count} tokens from row {start}"
                )
        return bool(self._module().append(target.code, *rows, *target.addresses, b, h, capacity, d, e, starts, counts))

    def prepare_quantizer(self, centroids: Tensor, bias: Tensor | None = None) -> Any:
        h, lists, d = centroids.shape
        bias_at = 0 if bias is None else plain("bias", bias, F32, (h, lists))
        return self._cpu.make_quantizer(plain("centroids", centroids, F32, (h, lists, d)), bias_at, h, lists, d)

    def assign(self, quantizer: Any, keys: Tensor, rotation: Rotation | None) -> Tensor:
        heads, _, d = quantizer.shape
        n = keys.shape[1]
        k_at = rows_of("keys", keys, keys.dtype, (heads, n, d))
        angles = angles_of(rotation, n, d)
        out = torch.empty((heads, n), dtype=I32, device="cpu")
        self._module().assign(quantizer, code_of("keys", keys), k_at, keys.stride(0), keys.stride(1), n, *angles, out.data_ptr())
        return out

    def seal(self, keys: Tensor, values: Tensor, ids: Tensor, start: int, list_nos: Tensor, table: Tensor) -> None:
        self._module().seal(*rows_to_seal(keys, values, ids, start, list_nos, table))

    def merge(
        self, keys: Tensor, values: Tensor, ids: Tensor, segments: Sequence[tuple[int, int]], tables: Tensor,
        joined: Tensor | None,
    ) -> bool:
        self._module().merge(*rows_to_merge(keys, values, ids, segments, tables, joined))
        return True

    def encode(self, code: StorageCode, keys: Tensor, values: Tensor, key_codes: Tensor, value_codes: Tensor) -> None:
        for name, x, bits, out in (
            ("keys", keys, code.key_bits, key_codes),
            ("values", values, code.value_bits, value_codes),
        ):
            h, n, dim = x.shape
            size = dim * bits // 8 + SCALE_BYTES
            x_at = rows_of(name, x, x.dtype, (h, n, dim))
            out_at, stride = lists_of(f"{name} codes", out, torch.uint8, (h, n, size))
            self._module().encode(bits, code_of(name, x), x_at, x.stride(0), x.stride(1), h, n, dim, out_at, stride)

    def means(self, keys: Tensor, values: Tensor, table: Tensor, mean_keys: Tensor, mean_values: Tensor) -> None:
        h, capacity, d = keys.shape
        e, lists = values.shape[-1], table.shape[1] - 1
        self._module().means(
            code_of("keys", keys),
            plain("keys", keys, keys.dtype, (h, capacity, d)),
            plain("values", values, keys.dtype, (h, capacity, e)),
            h,
            capacity,
            d,
            e,
            lists,
            rows_of("table", table, I32, (h, lists + 1)),
            table.stride(0),
            *lists_of("mean_keys", mean_keys, keys.dtype, (h, lists, d)),
            *lists_of("mean_values", mean_values, keys.dtype, (h, lists, e)),
        )

    def prepare_router(self, weights: RouterWeights) -> Any:
        h, u, d = weights.hidden.shape
        lists, k = weights.nlist, weights.leading
        m = weights.bias_out.shape[1] - k
        if lists < 1 or k < 1 or m < 0:
            raise ShapeError(f"nlist: expected 1 to {weights.bias_out.shape[1]}, got {k}")
        return self._cpu.make_router(
            plain("hidden", weights.hidden, F32, (h, u, d)),
            plain("bias_hidden", weights.bias_hidden, F32, (h, u)),
            plain("out", weights.out, F32, (h, k + m, u)),
            plain("skip", weights.skip, F32, (h, k + m, d)),
            plain("bias_out", weights.bias_out, F32, (h, k + m)),
            0 if weights.lists is None else plain("lists", weights.lists, F32, (h, lists, k)),
            0 if weights.list_scales is None else plain("list_scales", weights.list_scales, F32, (h, k)),
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
        q_at = plain("queries", queries, queries.dtype, (b, h, g, q, d))
        angles = angles_of(rotation, b * q, d)
        z, a = (torch.empty((b, h, g * q, n), dtype=F32, device="cpu") for n in (lists, m))
        self._module().route(router, code_of("queries", queries), q_at, b, g, q, *angles, z.data_ptr(), a.data_ptr())
        return z, a

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
        b, h, j, lists = z.shape
        m, segments = a.shape[3], tables.shape[2]
        z_at = plain("z", z, F32, (b, h, j, lists))
        a_at = plain("a", a, F32, (b, h, j, m))
        knots_at = plain("knots", knots, F32, (b, segments))
        places = places_of(self._cpu, tables, num_segments, budget, (b, h, lists))
        room = places.room(b, h)
        widths = self._module().probe(
            z_at,
            a_at,
            knots_at,
            places.tables_at,
            b,
            h,
            j,
            lists,
            m,
            segments,
            size_weighted,
            budget.nprobe,
            places.used,
            places.budgets_at,
            places.miss_at,
            places.entries_at,
            places.means,
            *room.addresses,
            *places.sample_at,
            room.biases_at,
        )
        return room.probed(*widths)

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
        b, h, g, q, d = queries.shape
        capacity, e = arena_values.shape[2:]
        dtype = arena_keys.dtype
        q_at = plain("queries", queries, queries.dtype, (b, h, g, q, d))
        k_at = plain("arena_keys", arena_keys, dtype, (b, h, capacity, d))
        v_at = plain("arena_values", arena_values, dtype, (b, h, capacity, e))
        listed = listed_rows(rows, counts, b, h)
        check_spans(sinks, sealed, lengths, b, capacity, coded)
        out = torch.empty((b, h, g, q, e), dtype=queries.dtype, device="cpu")
        lse = torch.empty((b, h, g, q), dtype=F32, device="cpu")
        self._module().scan(
            q_at,
            code_of("queries", queries),
            k_at,
            v_at,
            code_of("arena_keys", arena_keys),
            b,
            h,
            g,
            q,
            d,
            e,
            capacity,
            *listed,
            list(sinks),
            list(sealed),
            list(lengths),
            scale,
            causal,
            out.data_ptr(),
            lse.data_ptr(),
            *(NO_TAIL if tail is None else means_of(tail, dtype, (b, h, d, e))),
            *(NO_CODES if coded is None else codes_of(coded, (b, h, d, e))),
            0 if biases is None or not listed[0] else plain("biases", biases, F32, (b, h, listed[2])),
        )
        return out, lse

    def best(
        self, queries: Tensor, arena_keys: Tensor, rows: Tensor | None, counts: Tensor | None, sinks: Sequence[int],
        sealed: Sequence[int], lengths: Sequence[int], k: int,
    ) -> tuple[Tensor, Tensor]:
        b, h, g, q, d = queries.shape
        capacity, n = arena_keys.shape[2], b * q
        q_at = plain("queries", queries, queries.dtype, (b, h, g, q, d))
        k_at = plain("arena_keys", arena_keys, arena_keys.dtype, (b, h, capacity, d))
        listed = listed_rows(rows, counts, n, h)
        check_spans(sinks, sealed, lengths, n, capacity)
        scores = torch.empty((b, h, g, q, k), dtype=F32, device="cpu")
        rows_of_best = torch.empty((b, h, g, q, k), dtype=torch.int64, device="cpu")
        self._module().best(
            q_at,
            code_of("queries", queries),
            k_at,
            code_of("arena_keys", arena_keys),
            b,
            h,
            g,
            q,
            d,
            capacity,
            *listed,
            list(sinks),
            list(sealed),
            list(lengths),
            k,
            scores.data_ptr(),
            rows_of_best.data_ptr(),
        )
        return scores, rows_of_best

    def combine(self, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype = out_a.shape, out_a.dtype
        if dtype not in DTYPE_CODES or out_b.dtype != dtype:
            raise DTypeError(f"out_a, out_b: expected one of {dtype_names()} for both, got {dtype} and {out_b.dtype}")
        a_at, b_at = plain("out_a", out_a, dtype, shape), plain("out_b", out_b, dtype, shape)
        la_at, lb_at = plain("lse_a", lse_a, F32, shape[:-1]), plain("lse_b", lse_b, F32, shape[:-1])
        out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
        at = a_at, la_at, b_at, lb_at, lse.numel(), shape[-1], out.data_ptr(), lse.data_ptr()
        self._module().combine(DTYPE_CODES[dtype], *at)
        return out, lse


class _Search(NamedTuple):
    """A search of one plan, packed for one call of the module. Holds the tensors whose addresses the handle holds."""

    router: Any
    scale: float
    handle: Any
    places: Places
    d: int
    values: Tensor
    least: Sequence[int]
    most: Sequence[int]
    held: Any
    rooms: list[ProbeRoom]
    """Not in use: a search takes one out, so that two threads never write to the same."""


class CpuSession(Session):
    """See `Session`. `append` and `run` are one call of the compiled module each."""

    def __init__(self, backend: CpuBackend) -> None:
        super().__init__(backend)
        self._cpu, self._module, self._append_to = backend._cpu, backend._module, backend.append_to
        self._target: Target | None = None

    def publish(self, placement: Placement, budgets: Sequence[tuple[Plan, Budget]]) -> None:
        super().publish(placement, budgets)
        self._target = target_of(*placement.arena.numbers)

    def release(self) -> None:
        super().release()
        self._target = None

    def append(self, keys: Tensor, values: Tensor, counts: Sequence[int], check: bool = False) -> None:
        target, place, lengths = self._target, self._placement, self.lengths
        assert target is not None and place is not None and lengths is not None, "publish comes first"
        starts = lengths if place.coded is None else place.coded.plain_rows(lengths)
        if not self._append_to(target, keys, values, starts, counts):
            raise NotFiniteError("keys, values: expected finite numbers, got NaN or infinity")
        self.lengths = list(map(operator.add, lengths, counts))

    def run(self, queries: Tensor, routing: Routing, plan: Plan, scale: float) -> tuple[Tensor, Tensor, Probed | None]:
        if plan.dense:
            return super().run(queries, routing, plan, scale)
        search, lengths = plan.packed, self.lengths
        if search is None or search.router is not routing.router or search.scale != scale:
            plan.packed = search = self._pack(routing, plan, scale)
        assert lengths is not None, "publish comes first"
        b, h, _, e = search.values.shape
        _, _, g, q, d = queries.shape
        shape = (b, h, g, q, search.d)
        if queries.shape != shape or not queries.is_contiguous() or queries.dtype not in DTYPE_CODES:
            plain("queries", queries, queries.dtype, shape)
            code_of("queries", queries)
        for least, length, most in zip(search.least, lengths, search.most, strict=True):
            if not least <= length <= most:
                raise LengthError(f"lengths: expected {least} to {most}, got {length}")
        ends, rope = list(map(operator.add, lengths, self._gaps)), routing.rope
        if isinstance(rope, Frequencies):
            turn = rope.before(ends, q)
            angles = turn.cos.data_ptr(), turn.sin.data_ptr(), 2 * turn.cos.shape[1], turn.interleaved, turn.scale
        else:
            angles = angles_of(rope, b * q, d)
        out = torch.empty((b, h, g, q, e), dtype=queries.dtype, device="cpu")
        lse = torch.empty((b, h, g, q), dtype=F32, device="cpu")
        try:
            room = search.rooms.pop()
        except IndexError:
            room = search.places.room(b, h)
        call = queries.data_ptr(), DTYPE_CODES[queries.dtype], g, q, *angles, ends, lengths, out.data_ptr(), lse.data_ptr()
        widths = self._module().search(search.handle, *call, *room.addresses, room.biases_at)
        search.rooms.append(room)  # what it holds is valid until the next step
        return out, lse, room.probed(*widths)

    def _pack(self, routing: Routing, plan: Plan, scale: float) -> _Search:
        """What a search needs besides queries, all of it checked."""
        place, columns = self._published, self._columns
        arena, budget, used = place.arena, plan.budget, columns[SEGMENTS]
        assert budget is not None
        h, _, d, lists, _ = routing.router.shape
        b, _, segments, _ = arena.tables.shape
        (keys, values), coded = arena.numbers, place.coded
        capacity, e = values.shape[2:]
        dtype, most = keys.dtype, arena.mean_keys.shape[2]
        lengths = columns[SEALED], [capacity] * b
        if coded is not None:
            lengths = list(coded.last), [capacity + high - low for low, high in zip(coded.first, coded.last, strict=True)]
        places = places_of(self._cpu, arena.tables, used, budget, (b, h, lists))
        check_spans(columns[SINKS], columns[SEALED], lengths[1], b, capacity, coded)
        means_at = (0, 0)
        if places.entries_at:
            means_at = (
                plain("mean_keys", arena.mean_keys, dtype, (b, h, most, lists, d)),
                plain("mean_values", arena.mean_values, dtype, (b, h, most, lists, e)),
            )
        if isinstance(routing.rope, Frequencies):
            angles_of(routing.rope.before([0], 1), 1, d)
        centres = torch.from_numpy(place.centres)
        handle = self._cpu.make_search(
            routing.router, routing.first_knot, routing.size_weighted, plain("centres", centres, torch.float64, (b, segments)),
            b, h, segments, budget.nprobe, places.tables_at, places.used, places.budgets_at, places.miss_at, places.entries_at,
            places.means, plain("keys", keys, dtype, (b, h, capacity, d)), plain("values", values, dtype, (b, h, capacity, e)),
            code_of("keys", keys), capacity, e, columns[SINKS], columns[SEALED], scale, *means_at, most,
            *(NO_CODES if coded is None else codes_of(coded, (b, h, d, e))), *places.sample_at,
        )
        return _Search(routing.router, scale, handle, places, d, values, *lengths, (place, budget), [])
