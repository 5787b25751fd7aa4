"""Host tensors as the compiled module takes them: checked, then raw addresses, sizes and codes. No operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..errors import DeviceError, DTypeError, LayoutError, LengthError, ParameterError, ShapeError
from .codes import BYTES_CODE, DTYPE_CODES
from .scalar_quantizer import Coded
from .types import MAX_EXPONENT, MAX_SAMPLED, Budget, Probed, Rotation, Tail

F32, I32 = torch.float32, torch.int32
_NO_ROTATION = (0, 0, 0, False, 1.0)
NO_TAIL = (0, 0, 0, 0, 0, 0, 0, 0, 1)
NO_CODES: tuple[Any, ...] = (0, 0, 0, 8, [], [])
NO_SAMPLE = (0, 0, 0)


def plain(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of a contiguous host tensor of that dtype and shape."""
    if x.dtype is not dtype or x.shape != shape or not x.is_contiguous() or not x.is_cpu:
        _refuse(name, x, dtype, shape, "contiguous")
    return x.data_ptr()


def rows_of(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of a host tensor of which only the last axis need be contiguous."""
    if x.dtype is not dtype or x.shape != shape or not x.is_cpu or (x.stride(-1) != 1 and shape[-1] > 1):
        _refuse(name, x, dtype, shape, "contiguous along the last axis")
    return x.data_ptr()


def lists_of(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, int, int]) -> tuple[int, int]:
    """The address of a host tensor (h, l, d) contiguous but over h, and its stride there."""
    if x.dtype is not dtype or x.shape != shape or not x.is_cpu or (shape[0] and not x[0].is_contiguous()):
        _refuse(name, x, dtype, shape, "contiguous within a head")
    return x.data_ptr(), x.stride(0)


def _refuse(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> NoReturn:
    if not x.is_cpu:
        raise DeviceError(f"{name}: expected a tensor on 'cpu', got one on {str(x.device)!r}")
    if x.dtype is not dtype:
        raise DTypeError(f"{name}: expected {dtype}, got {x.dtype}")
    if x.shape != shape:
        raise ShapeError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
    raise LayoutError(f"{name}: expected rows {layout}, got strides {x.stride()}")


def listed_rows(rows: Tensor | None, counts: Tensor | None, b: int, h: int) -> tuple[int, int, int]:
    """Addresses of rows : int32 (b, h, t) and counts : int32 (b, h), and t, as the module takes them; zeros without either."""
    if rows is None or counts is None:
        if rows is not counts:
            raise ShapeError("rows, counts: expected both or neither")
        return 0, 0, 0
    t = rows.shape[2]
    rows_at, counts_at = plain("rows", rows, I32, (b, h, t)), plain("counts", counts, I32, (b, h))
    return rows_at if t else 0, counts_at, t


def rows_to_merge(
    keys: Tensor, values: Tensor, ids: Tensor, segments: Sequence[tuple[int, int]], tables: Tensor, joined: Tensor | None
) -> tuple[Any, ...]:
    """Arguments of `Backend.merge` as the module takes them: as `rows_to_seal`, with the bounds of the segments."""
    h, capacity, lists, bounds = *keys.shape[:2], tables.shape[2] - 1, [segments[0][0], *(stop for _, stop in segments)]
    if not (0 <= bounds[0] and bounds == sorted(bounds) and bounds[-1] <= capacity):
        raise LengthError(f"segments: expected neighbours within {capacity} rows, got {list(segments)}")
    return (
        *sequence_of(keys, values, ids),
        bounds,
        lists,
        *lists_of("tables", tables, I32, (h, len(segments), lists + 1)),
        *((0, 0) if joined is None else (rows_of("joined", joined, I32, (h, lists + 1)), joined.stride(0))),
    )


def means_of(tail: Tail, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> tuple[int, ...]:
    """runs, counts, x, means of keys and values, M, tables, S, l as the module takes them."""
    b, h, d, e = shape
    x, (most, lists), segments = tail.runs.shape[-1], tail.keys.shape[2:4], tail.tables.shape[2]
    return (
        plain("tail.runs", tail.runs, I32, (b, h, x)) if x else 0,
        plain("tail.counts", tail.counts, I32, (b, h)),
        x,
        plain("tail.keys", tail.keys, dtype, (b, h, most, lists, d)),
        plain("tail.values", tail.values, dtype, (b, h, most, lists, e)),
        most,
        plain("tail.tables", tail.tables, I32, (b, h, segments, lists + 1)),
        segments,
        lists,
    )


def codes_of(coded: Coded, shape: tuple[int, int, int, int]) -> tuple[Any, ...]:
    """Keys, values, N, bits of values, first and last as the module takes them."""
    b, h, d, e = shape
    n, (key_bytes, value_bytes) = coded.keys.shape[2], coded.code.sizes(d, e)
    first, last = list(coded.first), list(coded.last)
    if not len(first) == len(last) == b:
        raise ShapeError(f"coded: expected {b} spans, got {len(first)} and {len(last)}")
    for low, high in zip(first, last, strict=True):
        if not 0 <= low <= high <= n:
            raise LengthError(f"coded: expected spans within {n} rows, got [{low}, {high})")
    return (
        plain("coded.keys", coded.keys, torch.uint8, (b, h, n, key_bytes)),
        plain("coded.values", coded.values, torch.uint8, (b, h, n, value_bytes)),
        n,
        coded.code.value_bits,
        first,
        last,
    )


def code_of(name: str, x: Tensor) -> int:
    code = DTYPE_CODES.get(x.dtype)
    if code is None:
        raise DTypeError(f"{name}: expected one of {dtype_names()}, got {x.dtype}")
    return code


def dtype_names() -> str:
    return ", ".join(str(t).removeprefix("torch.") for t in DTYPE_CODES)


def check_spans(
    sinks: Sequence[int], sealed: Sequence[int], lengths: Sequence[int], n: int, capacity: int, coded: Coded | None = None
) -> None:
    """Rows [0, sinks) and [sealed, lengths) of n sequences lie in an arena of that capacity, or among its codes."""
    if coded is not None:
        check_spans(coded.first, coded.last, lengths, n, max(lengths, default=0))
        for middle, low, high in zip(sealed, coded.first, coded.last, strict=True):
            if middle and not low <= middle <= high:
                raise LengthError(f"sealed: expected a row among the coded ones, [{low}, {high}), got {middle}")
        plain_rows = max(coded.plain_rows(lengths), default=0)
        if plain_rows > capacity:
            raise LengthError(f"lengths: expected at most {capacity} rows that are not coded, got {plain_rows}")
        capacity = max(lengths, default=0)
    if not len(sinks) == len(sealed) == len(lengths) == n:
        raise ShapeError(f"sinks, sealed, lengths: expected {n} each, got {len(sinks)}, {len(sealed)}, {len(lengths)}")
    for first, middle, last in zip(sinks, sealed, lengths, strict=True):
        if not 0 <= first <= middle <= last <= capacity:
            raise LengthError(f"expected 0 <= sinks <= sealed <= lengths <= {capacity}, got {first}, {middle}, {last}")


def angles_of(rotation: Rotation | None, n: int, d: int) -> tuple[int, int, int, bool, float]:
    """cos, sin, r, interleaved, scale as the module takes them."""
    if rotation is None:
        return _NO_ROTATION
    half = rotation.cos.shape[-1]
    if 2 * half > d:
        raise ShapeError(f"rotation: expected at most {d // 2} angles per token, got {half}")
    cos, sin = plain("rotation.cos", rotation.cos, F32, (n, half)), plain("rotation.sin", rotation.sin, F32, (n, half))
    return cos, sin, 2 * half, rotation.interleaved, rotation.scale


class Places(NamedTuple):
    """Addresses and sizes of what `probe` may take: see `places_of`."""

    tables_at: int
    used: list[int]
    budgets_at: int
    miss_at: int
    entries_at: int
    means: list[int]
    bound: int
    tail_bound: int
    sample_at: tuple[int, int, int] = NO_SAMPLE

    def room(self, b: int, h: int) -> ProbeRoom:
        """Room for what may be selected."""
        rows, counts = torch.empty((b, h, self.bound), dtype=I32, device="cpu"), torch.empty((b, h), dtype=I32, device="cpu")
        at = self.bound, rows.data_ptr(), counts.data_ptr()
        if self.sample_at is not NO_SAMPLE:
            biases = torch.empty((b, h, self.bound), dtype=F32, device="cpu")
            return ProbeRoom((*at, 0, 0, 0), rows, counts, biases=biases, biases_at=biases.data_ptr())
        if not self.entries_at:
            return ProbeRoom((*at, 0, 0, 0), rows, counts)
        runs, run_counts = torch.empty((b, h, self.tail_bound), dtype=I32, device="cpu"), torch.empty_like(counts)
        return ProbeRoom((*at, self.tail_bound, runs.data_ptr(), run_counts.data_ptr()), rows, counts, runs, run_counts)


class ProbeRoom(NamedTuple):
    """Numbers and counts of rows, and of runs where there may be entries, as the module writes them, and their addresses."""

    addresses: tuple[int, ...]
    rows: Tensor
    counts: Tensor
    runs: Tensor | None = None
    run_counts: Tensor | None = None
    biases: Tensor | None = None
    biases_at: int = 0

    def probed(self, t: int, x: int) -> Probed:
        """What was written, of widths t and x."""
        runs, biases = (None if y is None else _packed(y, n) for y, n in ((self.runs, x), (self.biases, t)))
        return Probed(_packed(self.rows, t), self.counts, runs, self.run_counts, biases=biases)


def _packed(x: Tensor, width: int) -> Tensor:
    """The leading b * h * width elements of x (b, h, n) as (b, h, width)."""
    b, h, n = x.shape
    return x if width == n else x.view(-1)[: b * h * width].view(b, h, width)


class Target(NamedTuple):
    """Where tokens are appended: b, h, d, e, rows of an arena, its dtype and code, and the addresses of keys and values."""

    shape: tuple[int, int, int, int]
    capacity: int
    dtype: torch.dtype
    code: int
    addresses: tuple[int, int]


def target_of(arena_keys: Tensor, arena_values: Tensor) -> Target:
    """Of an arena, checked."""
    (b, h, capacity, d), e, dtype = arena_keys.shape, arena_values.shape[-1], arena_keys.dtype
    at = plain("arena_keys", arena_keys, dtype, arena_keys.shape), plain("arena_values", arena_values, dtype, (b, h, capacity, e))
    return Target((b, h, d, e), capacity, dtype, code_of("arena_keys", arena_keys), at)


def tokens_of(target: Target, keys: Tensor, values: Tensor) -> tuple[int, ...]:
    """Address and strides over b, h and n of new keys (b, h, n, d), then of values (b, h, n, e), as the module takes them."""
    (b, h, d, e), n = target.shape, keys.shape[2]
    k_at, v_at = rows_of("keys", keys, target.dtype, (b, h, n, d)), rows_of("values", values, target.dtype, (b, h, n, e))
    return k_at, *keys.stride()[:3], v_at, *values.stride()[:3]


def rows_to_seal(keys: Tensor, values: Tensor, ids: Tensor, start: int, list_nos: Tensor, table: Tensor) -> tuple[int, ...]:
    """Arguments of `Backend.seal` as the module takes them."""
    h, capacity, n, lists = *keys.shape[:2], list_nos.shape[1], table.shape[1] - 1
    if not 0 <= start <= capacity - n:
        raise LengthError(f"start: expected {n} rows within {capacity}, got them from row {start}")
    nos_at, table_at = plain("list_nos", list_nos, I32, (h, n)), rows_of("table", table, I32, (h, lists + 1))
    return *sequence_of(keys, values, ids), start, n, nos_at, lists, table_at, table.stride(0)


def sequence_of(keys: Tensor, values: Tensor, ids: Tensor) -> tuple[int, ...]:
    """Code of the dtype, addresses of keys (h, N, d), values (h, N, e) and ids : int32 (h, N), and h, N, d, e."""
    (h, capacity, d), e = keys.shape, values.shape[-1]
    return (
        BYTES_CODE if keys.dtype is torch.uint8 else code_of("keys", keys),
        plain("keys", keys, keys.dtype, (h, capacity, d)),
        plain("values", values, keys.dtype, (h, capacity, e)),
        plain("ids", ids, I32, (h, capacity)),
        h,
        capacity,
        d,
        e,
    )


def places_of(module: Any, tables: Tensor, num_segments: Sequence[int], budget: Budget, shape: tuple[int, int, int]) -> Places:
    """Where `probe` finds what it may take, all of it checked. module : the compiled one; shape : b, h, l."""
    b, h, lists = shape
    segments = tables.shape[2]
    tables_at = plain("tables", tables, I32, (b, h, segments, lists + 1))
    if len(num_segments) != b:
        raise ShapeError(f"num_segments: expected {b} numbers, got {len(num_segments)}")
    for valid in num_segments:
        if not 0 <= valid <= segments:
            raise LengthError(f"num_segments: expected 0 to {segments}, got {valid}")
    if not 0 < lists < 65536 or segments > 65535 or budget.nprobe < 0:
        raise LengthError(
            f"expected 1 to 65535 lists, up to 65535 segments and nprobe >= 0, got {lists}, {segments}, {budget.nprobe}"
        )
    used, budgets_at = list(num_segments), plain("budget.rows", budget.rows, I32, (b, h))
    miss_at = 0 if budget.unread_mass is None else plain("budget.miss", budget.unread_mass, F32, (h,))
    bound = module.probe_bound(tables_at, b, h, lists, segments, used, budgets_at)
    entries_at, tail_bound, means = 0, 0, list(budget.means)
    if budget.mean_entries is not None:
        if len(means) != b or not all(0 <= x <= s for x, s in zip(means, used, strict=True)):
            raise LengthError(f"budget.means: expected {b} numbers up to those of the segments, {used}, got {means}")
        entries_at = plain("budget.entries", budget.mean_entries, I32, (b, h))
        tail_bound = max(0, min(max(means, default=0) * lists, int(budget.mean_entries.max())))
    sample_at = NO_SAMPLE if budget.sample is None else sample_of(budget, (b, h))
    return Places(tables_at, used, budgets_at, miss_at, entries_at, means, bound, tail_bound, sample_at)


def sample_of(budget: Budget, shape: tuple[int, int]) -> tuple[int, int, int]:
    """Rows, exponents and caps as the module takes them."""
    sample, (_, h) = budget.sample, shape
    assert sample is not None
    if budget.nprobe or budget.unread_mass is not None or budget.mean_entries is not None:
        raise ParameterError("budget.sample: expected a budget of rows alone, got one with nprobe, unread_mass or mean_entries")
    at = (
        plain("budget.sample.rows", sample.rows, I32, shape),
        plain("budget.sample.exponents", sample.exponents, I32, (h,)),
        plain("budget.sample.caps", sample.caps, F32, (h,)),
    )
    for name, x, least, most in (("rows", sample.rows, 0, MAX_SAMPLED), ("exponents", sample.exponents, 1, MAX_EXPONENT)):
        if x.numel() and not least <= int(x.min()) <= int(x.max()) <= most:
            raise LengthError(f"budget.sample.{name}: expected {least} to {most}, got {x.tolist()}")
    return at
