"""Launchers of the kernels that sort the arena: seal, the list numbers of sealed rows, and the means of runs.

As in gpu_build.py, nothing is allocated here; functions say how large a workspace is. Axes as in backends/base.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .gpu_build import DTYPES, VECTOR, address, pack_params, vectors
from .gpu_types import Runtime

Segment = tuple[int, int]

CONFIGURATIONS: tuple[tuple[str, str, dict[str, int]], ...] = (
    ("seal.cu", "saap_rank", {}),
    ("seal.cu", "saap_permute", {}),
    ("seal.cu", "saap_run_lists", {}),
    ("means.cu", "saap_means", {}),
)

_ROWS_PER_BLOCK = 32  # of saap_permute
_MEANS_SHARED_BYTES = 8 * 8 * 32 * 4

RANK_PARAMS = np.dtype(
    [(x, "u8") for x in ("list_nos", "segments", "order", "tables")]
    + [(x, "i8") for x in ("list_head", "order_head", "table_head", "table_segment")]
    + [(x, "i4") for x in ("base", "rows", "lists")],
    align=True,
)
PERMUTE_PARAMS = np.dtype(
    [(x, "u8") for x in ("keys", "values", "ids", "to_keys", "to_values", "to_ids", "order")]
    + [(x, "i8") for x in ("key_head", "value_head", "id_head", "key_row", "value_row")]
    + [(x, "i8") for x in ("to_key_head", "to_value_head", "to_id_head", "order_head")]
    + [(x, "i4") for x in ("base", "rows", "key_vectors", "value_vectors")],
    align=True,
)
RUN_LISTS_PARAMS = np.dtype(
    [(x, "u8") for x in ("segments", "tables", "list_nos")]
    + [(x, "i8") for x in ("table_head", "table_segment", "list_head")]
    + [(x, "i4") for x in ("base", "rows", "lists")],
    align=True,
)
MEANS_PARAMS = np.dtype(
    [(x, "u8") for x in ("keys", "values", "tables", "mean_keys", "mean_values")]
    + [(x, "i8") for x in ("key_head", "value_head", "table_head", "table_segment")]
    + [(x, "i8") for x in ("mean_key_head", "mean_key_segment", "mean_value_head", "mean_value_segment")]
    + [(x, "i4") for x in ("capacity", "key_vectors", "value_vectors", "type")],
    align=True,
)


def segment_array(segments: Sequence[Segment], device: torch.device) -> Tensor:
    """Segments [start, stop) as kernels read them: int32 (s, 2), first row and number of rows."""
    pairs = [(start, stop - start) for start, stop in segments]
    return torch.tensor(pairs, dtype=torch.int32, device="cpu").reshape(-1, 2).to(device)


# -- workspace -------------------------------------------------------------------------------------------------------------


def _aligned(n: int) -> int:
    return -(-n // VECTOR) * VECTOR


def _scratch_bytes(rows: int, heads: int, key_bytes: int, value_bytes: int) -> int:
    return heads * rows * (key_bytes + value_bytes) + _aligned(heads * rows * 4)


def workspace_bytes(heads: int, d: int, e: int, dtype: torch.dtype, segments: Sequence[Segment]) -> tuple[int, int]:
    """Bytes of workspace that sealing these segments needs, and beyond which more are of no use.

    With less than the second number rows are moved in several turns of two launches, of a few heads or of a few segments each.
    """
    rows, longest = _span(segments), max((stop - start for start, stop in segments), default=0)
    order, row = _aligned(heads * rows * 4), (d * dtype.itemsize, e * dtype.itemsize)
    return order + _scratch_bytes(longest, 1, *row), order + _scratch_bytes(rows, heads, *row)


def _span(segments: Sequence[Segment]) -> int:
    return segments[-1][1] - segments[0][0] if segments else 0


def _turns(
    heads: int, segments: Sequence[Segment], scratch: int, key_bytes: int, value_bytes: int
) -> Iterator[tuple[range, Segment]]:
    """Heads and rows [start, stop) that are moved together, each turn within ``scratch`` bytes."""
    rows = _span(segments)
    if not rows:
        return
    together = next((n for n in range(heads, 0, -1) if _scratch_bytes(rows, n, key_bytes, value_bytes) <= scratch), 0)
    if together:
        for head in range(0, heads, together):
            yield range(head, min(head + together, heads)), (segments[0][0], segments[-1][1])
        return
    for head in range(heads):
        start = segments[0][0]
        for i, (_, stop) in enumerate(segments):
            following = segments[i + 1][1] if i + 1 < len(segments) else None
            if following is None or _scratch_bytes(following - start, 1, key_bytes, value_bytes) > scratch:
                yield range(head, head + 1), (start, stop)
                start = stop


# -- seal ------------------------------------------------------------------------------------------------------------------


def seal(
    runtime: Runtime, keys: Tensor, values: Tensor, ids: Tensor, start: int, list_nos: Tensor, table: Tensor, workspace: Tensor
) -> None:
    """Backend.seal. workspace : uint8, 16-byte aligned, of `workspace_bytes` of the one segment.

    keys : storage dtype (h, N, d), values : (h, N, e), ids : int32 (h, N), strided over h; list_nos : int32 (h, n), strided
    over h; table : int32 (h, l + 1) out, strided over h. d and e are multiples of 8.
    """
    segments = ((start, start + list_nos.shape[1]),)
    _seal(runtime, keys, values, ids, segments, None, list_nos, table[:, None], workspace)


def seal_many(
    runtime: Runtime,
    keys: Tensor,
    values: Tensor,
    ids: Tensor,
    segments: Sequence[Segment],
    device_segments: Tensor,
    list_nos: Tensor,
    tables: Tensor,
    workspace: Tensor,
) -> None:
    """Seal segments [start, stop), each of which begins where the one before ends: those of a prompt.

    device_segments : `segment_array` of them. list_nos : int32 (h, n) of all their rows; tables : int32 (h, s, l + 1) out,
    strided over h and s. The rest as in `seal`.
    """
    if any(a[1] != b[0] for a, b in pairwise(segments)):
        raise ValueError(f"seal_many: expected segments without gaps, got {segments}")
    _seal(runtime, keys, values, ids, segments, device_segments, list_nos, tables, workspace)


def rank_warps(runtime: Runtime, longest: int, nlist: int) -> int:
    """Warps of a block that sorts up to ``longest`` rows into ``nlist`` lists; each needs a counter per list.

    Raises ValueError if not even one fits.
    """
    warps = 32
    while warps > 1 and (warps * 32 >= 2 * longest or _rank_shared_bytes(warps, nlist) > runtime.max_shared_bytes):
        warps //= 2
    if _rank_shared_bytes(warps, nlist) > runtime.max_shared_bytes:
        raise ValueError(f"seal: {nlist} lists do not fit the shared memory of a block ({runtime.max_shared_bytes} bytes)")
    return warps


def _rank_shared_bytes(warps: int, nlist: int) -> int:
    return (warps * nlist + 32) * 4


def _seal(
    runtime: Runtime,
    keys: Tensor,
    values: Tensor,
    ids: Tensor,
    segments: Sequence[Segment],
    device_segments: Tensor | None,
    list_nos: Tensor,
    tables: Tensor,
    workspace: Tensor,
) -> None:
    h, _, d = keys.shape
    if not h * len(segments):
        return
    nlist, base, rows = tables.shape[2] - 1, segments[0][0], _span(segments)
    e = values.shape[2]
    least, _ = workspace_bytes(h, d, e, keys.dtype, segments)
    if workspace.numel() < least:
        raise ValueError(f"seal: expected a workspace of {least} bytes or more, got {workspace.numel()}")
    order_bytes, row_bytes = _aligned(h * rows * 4), (d * keys.element_size(), e * keys.element_size())
    order = workspace[: h * rows * 4].view(torch.int32).reshape(h, rows)

    warps = rank_warps(runtime, max(stop - start for start, stop in segments), nlist)
    params = pack_params(
        RANK_PARAMS,
        list_nos=address(list_nos),
        segments=address(device_segments),
        order=address(order),
        tables=address(tables),
        list_head=list_nos.stride(0),
        order_head=rows,
        table_head=tables.stride(0),
        table_segment=tables.stride(1),
        base=base,
        rows=rows,
        lists=nlist,
    )
    shared = _rank_shared_bytes(warps, nlist)
    runtime.kernel("seal.cu", "saap_rank", {}).launch((len(segments), h, 1), 32 * warps, shared, params)

    for heads, (start, stop) in _turns(h, segments, workspace.numel() - order_bytes, *row_bytes):
        part = slice(heads.start, heads.stop)
        arena = keys[part, start:stop], values[part, start:stop], ids[part, start:stop]
        scratch, at = [], order_bytes
        for x in arena:
            scratch.append(workspace[at : at + x.numel() * x.element_size()].view(x.dtype).reshape(x.shape))
            at += x.numel() * x.element_size()
        _permute(runtime, arena, scratch, order[part, start - base : stop - base], start)
        _permute(runtime, scratch, arena, None, 0)


def _permute(runtime: Runtime, source: Sequence[Tensor], to: Sequence[Tensor], order: Tensor | None, base: int) -> None:
    """Row i of ``to`` becomes row order[i] - base of ``source``: keys, values and ids (h, n, ...)."""
    keys, values, ids = source
    h, n, d = keys.shape
    size = keys.element_size()
    params = pack_params(
        PERMUTE_PARAMS,
        keys=address(keys),
        values=address(values),
        ids=address(ids),
        to_keys=address(to[0]),
        to_values=address(to[1]),
        to_ids=address(to[2]),
        order=address(order),
        key_head=keys.stride(0) * size,
        value_head=values.stride(0) * size,
        id_head=ids.stride(0),
        key_row=keys.stride(1) * size,
        value_row=values.stride(1) * size,
        to_key_head=to[0].stride(0) * size,
        to_value_head=to[1].stride(0) * size,
        to_id_head=to[2].stride(0),
        order_head=0 if order is None else order.stride(0),
        base=base,
        rows=n,
        key_vectors=vectors(d, keys.dtype),
        value_vectors=vectors(values.shape[2], keys.dtype),
    )
    runtime.kernel("seal.cu", "saap_permute", {}).launch((-(-n // _ROWS_PER_BLOCK), h, 1), 256, 0, params)


def run_lists(runtime: Runtime, segments: Sequence[Segment], device_segments: Tensor, tables: Tensor, list_nos: Tensor) -> None:
    """List number of every row of sealed segments [start, stop), from their offsets.

    Each segment begins where the one before ends. device_segments : `segment_array` of them. tables : int32 (h, s, l + 1),
    strided over h and s; list_nos : int32 out (h, n), strided over h, n the rows of all segments.
    """
    h, n = list_nos.shape
    if not h * n:
        return
    longest = max(stop - start for start, stop in segments)
    params = pack_params(
        RUN_LISTS_PARAMS,
        segments=address(device_segments),
        tables=address(tables),
        list_nos=address(list_nos),
        table_head=tables.stride(0),
        table_segment=tables.stride(1),
        list_head=list_nos.stride(0),
        base=segments[0][0],
        rows=n,
        lists=tables.shape[2] - 1,
    )
    across = max(1, min(-(-longest // 256), -(-runtime.multiprocessors * 16 // h)))
    runtime.kernel("seal.cu", "saap_run_lists", {}).launch((across, h, len(segments)), 256, 0, params)


# -- means -----------------------------------------------------------------------------------------------------------------


def means(runtime: Runtime, keys: Tensor, values: Tensor, tables: Tensor, mean_keys: Tensor, mean_values: Tensor) -> None:
    """Mean key and mean value of every run of some segments; 0 for an empty run.

    keys : storage dtype (h, N, d), values : (h, N, e), strided over h. tables : int32 (h, s, l + 1), strided over h and s.
    mean_keys : storage dtype (h, s, l, d), mean_values : (h, s, l, e), out, strided over h and s.
    """
    h, s, offsets = tables.shape
    if not h * s:
        return
    size = keys.element_size()
    strides: dict[str, Any] = {
        f"mean_{name}_{axis}": x.stride(i) * size
        for name, x in (("key", mean_keys), ("value", mean_values))
        for i, axis in enumerate(("head", "segment"))
    }
    params = pack_params(
        MEANS_PARAMS,
        keys=address(keys),
        values=address(values),
        tables=address(tables),
        mean_keys=address(mean_keys),
        mean_values=address(mean_values),
        key_head=keys.stride(0) * size,
        value_head=values.stride(0) * size,
        table_head=tables.stride(0),
        table_segment=tables.stride(1),
        **strides,
        capacity=keys.shape[1],
        key_vectors=vectors(keys.shape[2], keys.dtype),
        value_vectors=vectors(values.shape[2], values.dtype),
        type=DTYPES[keys.dtype],
    )
    runtime.kernel("means.cu", "saap_means", {}).launch((offsets - 1, h, s), 256, _MEANS_SHARED_BYTES, params)
