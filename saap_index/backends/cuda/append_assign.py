"""Launchers of the kernels that take tokens in: append, assign, and the packing of centroids for it.

A launcher knows the parameter struct, the configuration and the grid of its kernels. It allocates nothing and checks little:
shapes and dtypes are the backend's business. Axes as in backends/base.py; tensors are contiguous unless said otherwise.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..codes import DTYPE_CODES
from ..types import Rotation
from .launch import CLUSTERS, Kernel, Launch, Runtime

_EXPONENTS = {  # masks of the exponent of the elements in the upper and in the lower half of a word
    torch.float32: (0x7F800000, 0x7F800000),
    torch.bfloat16: (0x7F800000, 0x00007F80),
    torch.float16: (0x7C000000, 0x00007C00),
}

VECTOR = 16
"""Bytes of the loads and stores that rows are moved with."""

MAX_DIM = 256
MAX_APPEND_THREADS = 1024

KEYS_PER_BLOCK = (128, 64)
LISTS_PER_PANEL, DIMS_PER_PANEL = 128, 64
PANEL_BYTES = 2 * LISTS_PER_PANEL * DIMS_PER_PANEL * 2 + LISTS_PER_PANEL * 4

CONFIGURATIONS: tuple[tuple[str, str, dict[str, int]], ...] = (
    *(("append.cu", "saap_append", {"SAAP_STEP": step}) for step in (0, 1)),
    *(("assign.cu", "saap_assign", {"SAAP_ROWS": rows}) for rows in KEYS_PER_BLOCK),
)

APPEND_PARAMS = np.dtype(
    [(x, "u8") for x in ("keys", "values", "arena_keys", "arena_values", "meta", "starts", "counts", "flags", "tickets")]
    + [(x, "i8") for x in ("key_b", "key_h", "key_n", "value_b", "value_h", "value_n")]
    + [(x, "i4") for x in ("n", "capacity", "heads", "key_vectors", "value_vectors")]
    + [(x, "u4") for x in ("high_exponent", "low_exponent")]
    + [(x, "i4") for x in ("aligned", "num_tickets")]
    + [(x, "f4") for x in ("inverse_vectors", "inverse_n")],
    align=True,
)

ASSIGN_PARAMS = np.dtype(
    [(x, "u8") for x in ("keys", "panels", "panel_scales", "cos", "sin", "inv_freq", "positions", "list_nos", "jobs")]
    + [(x, "i8") for x in ("key_sequence", "key_head", "key_row", "list_head")]
    + [("scale", "f4")]
    + [(x, "i4") for x in ("type", "n", "d", "rotated", "interleaved", "first_position", "tiles", "chunks", "vectors")],
    align=True,
)


def pack_params(layout: np.dtype[Any], **fields: int | float) -> np.ndarray[Any, Any]:
    """One element of ``layout``, a struct of numbers; every field must be given."""
    packed = bytearray(_format(layout).pack(*[fields[name] for name in layout.names or ()]))  # NumPy's own way takes 10 us
    return np.frombuffer(packed, layout).reshape(())


@functools.cache
def _format(layout: np.dtype[Any]) -> struct.Struct:
    """How C lays out ``layout``: as NumPy does, made with ``align=True``."""
    codes = {"u8": "Q", "i8": "q", "u4": "I", "i4": "i", "f4": "f", "f8": "d"}
    made = struct.Struct("@" + "".join(codes[layout[name].str[1:]] for name in layout.names or ()) + "0q")
    assert made.size == layout.itemsize
    return made


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def vectors(dim: int, dtype: torch.dtype) -> int:
    """Length of a row in units of `VECTOR` bytes."""
    return dim * dtype.itemsize // VECTOR


def in_vectors(x: Tensor) -> bool:
    """Whether every row begins at a multiple of `VECTOR` bytes."""
    strides = (stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1)
    return x.data_ptr() % VECTOR == 0 and all(stride * x.element_size() % VECTOR == 0 for stride in strides)


# -- append ----------------------------------------------------------------------------------------------------------------


def append(
    runtime: Runtime,
    keys: Tensor,
    values: Tensor,
    arena_keys: Tensor,
    arena_values: Tensor,
    starts: Tensor,
    counts: Tensor | None,
    flags: Tensor,
) -> None:
    """Copy ``counts[i]`` leading tokens (None: all) of sequence i to its rows from ``starts[i]``.

    keys : storage dtype (b, h, n, d), values : (b, h, n, e), any strides but the last, which is 1. arena_keys (b, h, N, d),
    arena_values (b, h, N, e). starts, counts, flags : int32 (b). Sets bits of flags: NOT_FINITE, the rows are written all the
    same; FULL, where the tokens do not fit, and nothing is.
    """
    if keys.shape[:3].numel():
        where = {"starts": starts, "counts": counts, "flags": flags}
        _bind_append(runtime, keys, values, arena_keys, arena_values, where)(keys=keys, values=values)


def bind_append_to_meta(
    runtime: Runtime,
    keys: Tensor,
    values: Tensor,
    arena_keys: Tensor,
    arena_values: Tensor,
    meta: Tensor,
    counts: Tensor | None = None,
    tickets: Tensor | None = None,
) -> Launch:
    """The same behind the rows in use, as meta : int32 (b, 8) has them; lengths and next positions grow, errors go to word 7.

    A start takes keys and values of `append_layout` as given here, of at least one token. One block takes all of a sequence: made
    for the few tokens of a step. tickets : int32 (m,) of the scan that comes after it, which become zeros.
    """
    where = {"meta": meta, "counts": counts, "tickets": tickets}
    return _bind_append(runtime, keys, values, arena_keys, arena_values, where)


def append_kernel(runtime: Runtime, step: bool) -> Kernel:
    """step: for tokens of a step, which `bind_append_to_meta` takes."""
    return runtime.kernel("append.cu", "saap_append", {"SAAP_STEP": int(step)})


def append_layout(keys: Tensor, values: Tensor) -> tuple[Any, ...]:
    """What a launch of `bind_append_to_meta` takes for granted of new tokens, beside dtype, batch, heads and dims."""
    return keys.shape[2], keys.stride(), values.stride(), keys.data_ptr() % VECTOR, values.data_ptr() % VECTOR


def _bind_append(
    runtime: Runtime, keys: Tensor, values: Tensor, arena_keys: Tensor, arena_values: Tensor, where: dict[str, Tensor | None]
) -> Launch:
    b, h, n, d = keys.shape
    e, dtype = values.shape[3], keys.dtype
    if "meta" in where:
        total = h * n * (vectors(d, dtype) + vectors(e, dtype))
        across, y, block = 1, 1, min(MAX_APPEND_THREADS, -(-total // 32) * 32)
    else:
        # 4 vectors of a thread in one pass; as many blocks as can run, which then take several passes
        total = n * (vectors(d, dtype) + vectors(e, dtype))
        block = min(256, -(-total // 32) * 32)
        across, y = max(1, min(-(-total // (4 * block)), -(-runtime.multiprocessors * 16 // (b * h)))), h
    in_step = "meta" in where
    if total >= 2**22 if in_step else total + 4 * block * across >= 2**31:
        raise ValueError(f"append: {n} tokens are too many for one call")
    high, low = _EXPONENTS[dtype]
    size, tickets = dtype.itemsize, where.get("tickets")
    strides = {
        f"{name}_{axis}": x.stride(i) * size
        for name, x in (("key", keys), ("value", values))
        for i, axis in enumerate(("b", "h", "n"))
    }
    params = pack_params(
        APPEND_PARAMS,
        keys=0,
        values=0,
        arena_keys=address(arena_keys),
        arena_values=address(arena_values),
        **{name: address(where.get(name)) for name in ("meta", "starts", "counts", "flags", "tickets")},
        **strides,
        n=n,
        capacity=arena_keys.shape[2],
        heads=h,
        key_vectors=vectors(d, dtype),
        value_vectors=vectors(e, dtype),
        high_exponent=high,
        low_exponent=low,
        aligned=in_vectors(keys) and in_vectors(values),
        num_tickets=0 if tickets is None else tickets.numel(),
        inverse_vectors=1 / (vectors(d, dtype) + vectors(e, dtype)),
        inverse_n=1 / n,
    )
    kept = arena_keys, arena_values, *where.values()
    kernel, shared = append_kernel(runtime, in_step), 0 if in_step else 8
    return Launch(kernel, (across, y, b), block, shared, params, *kept, dependent=runtime.capability >= CLUSTERS)


# -- assign ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turns:
    """What undoes RoPE where angles are not at hand: the kernel takes them from positions, as transformers computes them.

    inv_freq : float32 (r / 2), radians per position. positions : int32 (n) of the keys, or None for first_position and those
    that follow. interleaved, scale : as in `Rotation`.
    """

    inv_freq: Tensor
    positions: Tensor | None
    first_position: int
    interleaved: bool
    scale: float


@dataclass(frozen=True)
class PackedCentroids:
    """Centroids as saap_assign reads them. panels : uint8 (h, tiles, chunks, PANEL_BYTES); scales : float32 (h)."""

    panels: Tensor
    scales: Tensor
    nlist: int
    d: int


def pack_centroids(centroids: Tensor, bias: Tensor | None = None) -> PackedCentroids:
    """float32 (h, l, d) -> panels of 128 lists by 64 dims: fp16 high parts, low parts, and the bias : float32 (h, l), by default
    -|c|^2 / 2; on the same device."""
    h, nlist, d = centroids.shape
    tiles, chunks = -(-nlist // LISTS_PER_PANEL), -(-d // DIMS_PER_PANEL)
    exact = centroids.double()
    exponent = torch.frexp(exact.abs().amax((1, 2)))[1].double()  # of a bound of the head's centroids
    scaled = exact.new_zeros((h, tiles * LISTS_PER_PANEL, chunks * DIMS_PER_PANEL))
    scaled[:, :nlist, :d] = exact * torch.exp2(14 - exponent)[:, None, None]
    high = scaled.to(torch.float16)
    low = (scaled - high.double()).to(torch.float16)
    biases = exact.new_full((h, tiles * LISTS_PER_PANEL), -torch.inf)
    biases[:, :nlist] = -0.5 * exact.square().sum(2) if bias is None else bias.double()

    lists = torch.arange(LISTS_PER_PANEL, dtype=torch.int64, device=centroids.device)
    eight = torch.arange(8, dtype=torch.int64, device=centroids.device)
    places = eight ^ (lists % 8)[:, None]  # (128, 8): 16-byte vector at each place of a row

    def half_panels(x: Tensor) -> Tensor:
        rows = x.reshape(h, tiles, LISTS_PER_PANEL, chunks, 8, 8).movedim(3, 2)
        return rows[:, :, :, lists[:, None], places].contiguous().view(torch.uint8).reshape(h, tiles, chunks, -1)

    of_panel = biases.float().reshape(h, tiles, 1, LISTS_PER_PANEL).expand(-1, -1, chunks, -1).contiguous().view(torch.uint8)
    panels = torch.cat([half_panels(high), half_panels(low), of_panel], 3)
    return PackedCentroids(panels, torch.exp2(exponent - 14).float(), nlist, d)


def assign_shared_bytes(keys_per_block: int, d: int) -> int:
    return 2 * PANEL_BYTES + (-(-d // DIMS_PER_PANEL) * 2 * DIMS_PER_PANEL * 2 + 4) * keys_per_block


def keys_per_block(runtime: Runtime, d: int, h: int, n: int) -> int:
    """Large blocks read the centroids half as often; small ones keep more multiprocessors busy when keys are few."""
    for rows in KEYS_PER_BLOCK[:-1]:
        if assign_shared_bytes(rows, d) <= runtime.max_shared_bytes and h * -(-n // rows) >= 2 * runtime.multiprocessors:
            return rows
    return KEYS_PER_BLOCK[-1]


ASSIGN_JOB = 8
"""Numbers of a job of `assign_jobs`: sequence, first row, rows, place of the first in list_nos and positions, its position."""


@dataclass(frozen=True)
class AssignJobs:
    """Stretches of rows of several sequences. numbers : int32 (z, ASSIGN_JOB) on the device; longest : rows of the longest."""

    numbers: Tensor
    count: int
    longest: int


def assign(
    runtime: Runtime,
    centroids: PackedCentroids,
    keys: Tensor,
    list_nos: Tensor,
    rotation: Rotation | Turns | None,
    rows: int | None = None,
) -> None:
    """List number of each key: argmax over l of <k', c_l> - |c_l|^2 / 2, k' the key with ``rotation`` undone.

    keys : storage dtype (h, n, d), strided freely over h and n; list_nos : int32 out (h, n), strided over h. d <= 256, a
    multiple of 8. rows : keys of a block, of KEYS_PER_BLOCK; None chooses. Ties go to the lower list.
    """
    if keys.shape[0] * keys.shape[1]:
        _assign(runtime, centroids, keys[None], list_nos, rotation, rows, None)


def assign_jobs(
    runtime: Runtime, centroids: PackedCentroids, keys: Tensor, jobs: AssignJobs, list_nos: Tensor, turns: Turns | None
) -> None:
    """`assign` of stretches of keys : storage dtype (b, h, N, d), in one launch; positions of ``turns``: as list_nos (h, f)."""
    _assign(runtime, centroids, keys, list_nos, turns, None, jobs)


def _assign(
    runtime: Runtime,
    centroids: PackedCentroids,
    keys: Tensor,
    list_nos: Tensor,
    rotation: Rotation | Turns | None,
    rows: int | None,
    jobs: AssignJobs | None,
) -> None:
    _, h, n, d = keys.shape
    n, count = (n, 1) if jobs is None else (jobs.longest, jobs.count)
    if d > MAX_DIM or d % 8:
        raise ValueError(f"assign: expected a multiple of 8 up to {MAX_DIM} dims, got {d}")
    rows = rows or keys_per_block(runtime, d, h * count, n)
    cos, sin, inv_freq, positions, first, rotated = None, None, None, None, 0, 0
    if isinstance(rotation, Rotation):
        cos, sin, rotated = rotation.cos, rotation.sin, 2 * rotation.cos.shape[1]
    elif rotation is not None:
        inv_freq, positions, first = rotation.inv_freq, rotation.positions, rotation.first_position
        rotated = 2 * inv_freq.shape[0]
    interleaved = rotation is not None and rotation.interleaved
    params = pack_params(
        ASSIGN_PARAMS,
        keys=address(keys),
        panels=address(centroids.panels),
        panel_scales=address(centroids.scales),
        cos=address(cos),
        sin=address(sin),
        inv_freq=address(inv_freq),
        positions=address(positions),
        list_nos=address(list_nos),
        jobs=0 if jobs is None else address(jobs.numbers),
        key_sequence=keys.stride(0) * keys.element_size(),
        key_head=keys.stride(1) * keys.element_size(),
        key_row=keys.stride(2) * keys.element_size(),
        list_head=list_nos.stride(0),
        scale=1.0 if rotation is None else rotation.scale,
        type=DTYPE_CODES[keys.dtype],
        n=n,
        d=d,
        rotated=rotated,
        interleaved=interleaved,
        first_position=first,
        tiles=centroids.panels.shape[1],
        chunks=centroids.panels.shape[2],
        vectors=in_vectors(keys) and d % 16 == 0 and (interleaved or rotated % 16 == 0),
    )
    kernel = runtime.kernel("assign.cu", "saap_assign", {"SAAP_ROWS": rows})
    kernel.launch((-(-n // rows), h, count), 2 * rows, assign_shared_bytes(rows, d), params)
