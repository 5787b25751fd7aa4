"""Launchers of the kernels that sort the arena: seal, of any segments of any sequences at once, and the means of runs.

As in append_assign.py, nothing is allocated here; functions say how large a workspace is. Axes as in backends/base.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..codes import DTYPE_CODES
from ..types import Frequencies
from .append_assign import (
    VECTOR,
    AssignJobs,
    PackedCentroids,
    Turns,
    address,
    assign_jobs,
    pack_params,
    vectors,
)
from .launch import Runtime
from .seal_plan import JOB, TILE_ROWS, Job, Plan, places

CONFIGURATIONS: tuple[tuple[str, str, dict[str, int]], ...] = (
    ("seal.cu", "saap_rank", {}),
    ("seal.cu", "saap_permute", {}),
    ("seal.cu", "saap_publish", {}),
    ("means.cu", "saap_means", {}),
)

_MEANS_SHARED_BYTES = 8 * 8 * 32 * 4

RANK_PARAMS = np.dtype(
    [(x, "u8") for x in ("jobs", "list_nos", "pending", "tables", "order", "new_tables")]
    + [(x, "i8") for x in ("list_head", "pending_sequence", "pending_head", "table_sequence", "table_head", "table_segment")]
    + [("order_head", "i8"), ("lists", "i4")],
    align=True,
)
PERMUTE_PARAMS = np.dtype(
    [(x, "u8") for x in ("jobs", "keys", "values", "ids", "positions", "order", "new_tables", "tables")]
    + [(x, "u8") for x in ("scratch_keys", "scratch_values", "scratch_ids")]
    + [(x, "i8") for x in ("key_sequence", "key_head", "value_sequence", "value_head", "id_sequence", "id_head")]
    + [(x, "i8") for x in ("table_sequence", "table_head", "table_segment", "order_head")]
    + [(x, "i4") for x in ("num_jobs", "first_head", "heads", "lists", "key_vectors", "value_vectors")],
    align=True,
)
PUBLISH_PARAMS = np.dtype([("pieces", "u8"), ("words", "u8")], align=True)
MEANS_PARAMS = np.dtype(
    [(x, "u8") for x in ("jobs", "keys", "values", "tables", "mean_keys", "mean_values")]
    + [(x, "i8") for x in ("key_sequence", "key_head", "value_sequence", "value_head")]
    + [(x, "i8") for x in ("table_sequence", "table_head", "table_segment")]
    + [(x, "i8") for x in ("mean_key_sequence", "mean_key_head", "mean_key_segment")]
    + [(x, "i8") for x in ("mean_value_sequence", "mean_value_head", "mean_value_segment")]
    + [(x, "i4") for x in ("capacity", "key_vectors", "value_vectors", "type")],
    align=True,
)


class Arena(NamedTuple):
    """keys : storage dtype (b, h, N, d), values : (b, h, N, e), rows contiguous and of multiples of 16 bytes; ids : int32
    (b, h, N); tables : int32 (b, h, S, l + 1), any strides but the last. d and e are multiples of 8."""

    keys: Tensor
    values: Tensor
    ids: Tensor
    tables: Tensor


@dataclass(frozen=True)
class Fresh:
    """What is known of rows in arrival order. list_nos : int32 (h, f), strided over h, or None; pending : int32 (b, h, N), a list
    for each row of the arena or a negative number for what list_nos says, or None; positions : int32 (f) or None."""

    list_nos: Tensor | None
    pending: Tensor | None = None
    positions: Tensor | None = None


# -- workspace -------------------------------------------------------------------------------------------------------------


def aligned(n: int) -> int:
    return -(-n // VECTOR) * VECTOR


def workspace_bytes(arena: Arena, jobs: Sequence[Job]) -> tuple[int, int]:
    """Bytes of workspace that sealing these segments needs, and beyond which more are of no use.

    With less than the second number rows are moved in several turns of two launches, of a few heads or of a few segments each.
    """
    h, rows = arena.keys.shape[1], _places(jobs)
    fixed = aligned(h * rows * 4) + aligned(len(jobs) * h * arena.tables.shape[3] * 4)
    unit = _unit(arena)
    return fixed + max((places(job.rows) for job in jobs), default=0) * unit, fixed + h * rows * unit


def _places(jobs: Sequence[Job]) -> int:
    return jobs[-1].at + places(jobs[-1].rows) if jobs else 0


def _unit(arena: Arena) -> int:
    """Bytes of a row in scratch."""
    return (arena.keys.shape[3] + arena.values.shape[3]) * arena.keys.element_size() + 4


def _turns(heads: int, jobs: Sequence[Job], most: int) -> Iterator[tuple[range, range]]:
    """Heads and jobs that are moved together, each turn of at most ``most`` rows over all its heads."""
    together = min(heads, most // max(1, _places(jobs)))
    if together:
        for head in range(0, heads, together):
            yield range(head, min(head + together, heads)), range(len(jobs))
        return
    for head in range(heads):
        start = 0
        for i, job in enumerate(jobs):
            if i + 1 == len(jobs) or jobs[i + 1].at + places(jobs[i + 1].rows) - jobs[start].at > most:
                yield range(head, head + 1), range(start, i + 1)
                start = i + 1
            assert places(job.rows) <= most


# -- seal ------------------------------------------------------------------------------------------------------------------


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


def seal(
    runtime: Runtime, arena: Arena, jobs: Sequence[Job], device_jobs: Tensor, fresh: Fresh, workspace: Tensor
) -> None:
    """Sort the rows of every job by list, stably and in place, and write the tables: three launches, whatever the jobs.

    jobs : in the order of their places, which follow one another from 0; device_jobs : int32 (jobs, JOB), the same on the device.
    Segments of the same sequence do not overlap. workspace : uint8, 16-byte aligned, of `workspace_bytes`.
    """
    for start in _prepare_seal(runtime, arena, jobs, device_jobs, fresh, workspace):
        start()


def _prepare_seal(
    runtime: Runtime, arena: Arena, jobs: Sequence[Job], device_jobs: Tensor, fresh: Fresh, workspace: Tensor
) -> list[Callable[[], None]]:
    """What `seal` starts, in this order. All are made before the first runs: if one cannot be, no row has moved."""
    keys, values, ids, tables = arena
    _, h, _, d = keys.shape
    if not h * len(jobs):
        return []
    nlist, rows, e, unit = tables.shape[3] - 1, _places(jobs), values.shape[3], _unit(arena)
    least, _ = workspace_bytes(arena, jobs)
    if workspace.numel() < least:
        raise ValueError(f"seal: expected a workspace of {least} bytes or more, got {workspace.numel()}")
    order = address(workspace)
    new_tables = order + aligned(h * rows * 4)
    scratch = new_tables + aligned(len(jobs) * h * (nlist + 1) * 4)
    most = (order + workspace.numel() - scratch) // unit

    warps = rank_warps(runtime, max(job.rows for job in jobs), nlist)
    pending = fresh.pending
    pending_sequence, pending_head = (0, 0) if pending is None else pending.stride()[:2]
    at_tables, at_jobs, strides = address(tables), address(device_jobs), tables.stride()
    table_strides = {"table_sequence": strides[0], "table_head": strides[1], "table_segment": strides[2]}
    params = pack_params(
        RANK_PARAMS,
        jobs=at_jobs,
        list_nos=address(fresh.list_nos),
        pending=address(pending),
        tables=at_tables,
        order=order,
        new_tables=new_tables,
        list_head=0 if fresh.list_nos is None else fresh.list_nos.stride(0),
        pending_sequence=pending_sequence,
        pending_head=pending_head,
        **table_strides,
        order_head=rows,
        lists=nlist,
    )
    shared = _rank_shared_bytes(warps, nlist)
    starts = [runtime.kernel("seal.cu", "saap_rank", {}).prepare((len(jobs), h, 1), 32 * warps, shared, params)]

    size, permute = keys.element_size(), runtime.kernel("seal.cu", "saap_permute", {})
    (key_sequence, key_head, *_), (value_sequence, value_head, *_) = keys.stride(), values.stride()
    id_sequence, id_head, _ = ids.stride()
    key_vectors, value_vectors = vectors(d, keys.dtype), vectors(e, keys.dtype)
    at_keys, at_values, at_ids, positions = address(keys), address(values), address(ids), address(fresh.positions)
    for heads, part in _turns(h, jobs, most):
        base, last = jobs[part.start].at, jobs[part.stop - 1]
        count = last.at + places(last.rows) - base
        scratch_values = scratch + len(heads) * count * d * size
        params = pack_params(
            PERMUTE_PARAMS,
            jobs=at_jobs + part.start * JOB * 4,
            keys=at_keys,
            values=at_values,
            ids=at_ids,
            positions=positions,
            order=order,
            new_tables=new_tables + part.start * h * (nlist + 1) * 4,
            tables=at_tables,
            scratch_keys=scratch,
            scratch_values=scratch_values,
            scratch_ids=scratch_values + len(heads) * count * e * size,
            key_sequence=key_sequence * size,
            key_head=key_head * size,
            value_sequence=value_sequence * size,
            value_head=value_head * size,
            id_sequence=id_sequence,
            id_head=id_head,
            **table_strides,
            order_head=rows,
            num_jobs=len(part),
            first_head=heads.start,
            heads=h,
            lists=nlist,
            key_vectors=key_vectors,
            value_vectors=value_vectors,
        )
        grid = count // TILE_ROWS, len(heads), 1
        back = params.copy()
        back["order"] = 0
        starts += [permute.prepare(grid, 256, 0, params), permute.prepare(grid, 256, 0, back)]
    return starts


# -- a batch ---------------------------------------------------------------------------------------------------------------


def begin_batch(
    runtime: Runtime,
    arena: Arena,
    plan: Plan,
    numbers: Tensor,
    centroids: PackedCentroids | None,
    angles: Frequencies | None,
    pending: Tensor | None,
    workspace: Tensor,
    outs: tuple[Tensor, Tensor] | None = None,
) -> list[Callable[[], None]]:
    """The half of `seal_batch` that writes nothing but ``workspace``, assign, rank and permute, and returns the other half: what
    remains to be started, in this order, on memory as it is now. Arguments as there."""
    positions = numbers[plan.positions_at :] if plan.positions_at >= 0 else None
    list_nos = None
    if centroids is not None:
        heads = arena.keys.shape[1]
        nbytes = heads * plan.fresh * 4
        list_nos = workspace[:nbytes].view(torch.int32).view(heads, plan.fresh)
        workspace = workspace[aligned(nbytes) :]
    starts = _prepare_seal(runtime, arena, plan.jobs, numbers, Fresh(list_nos, pending, positions), workspace)
    if outs is not None and plan.means:
        due = numbers[plan.means_at :], plan.means
        starts.append(_prepare_means(runtime, arena.keys, arena.values, arena.tables, *outs, *due))
    if centroids is not None and list_nos is not None and plan.stretches:
        turns = None if angles is None else Turns(angles.inv_freq, positions, 0, angles.interleaved, angles.scale)
        jobs = AssignJobs(numbers[plan.stretches_at :], plan.stretches, plan.longest)
        assign_jobs(runtime, centroids, arena.keys, jobs, list_nos, turns)
    for start in starts[:READING]:
        start()
    return starts[READING:]


READING = 2
"""Launches of `_prepare_seal`, the first ones, that move nothing: rank, and the first rows to scratch."""


def seal_batch(
    runtime: Runtime,
    arena: Arena,
    plan: Plan,
    numbers: Tensor,
    centroids: PackedCentroids | None,
    angles: Frequencies | None,
    pending: Tensor | None,
    workspace: Tensor,
    outs: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Assign, rank, permute and back: four launches for all sequences of ``plan``. numbers : those of the plan on the device.

    pending : as in `Fresh`; with it alone, without centroids, nothing is assigned. workspace : uint8, 16-byte aligned, of
    `workspace_bytes` and, with centroids, before that the lists : int32 (h, plan.fresh), up to a multiple of 16 bytes.
    outs : mean_keys and mean_values as in `means`, for a fifth launch that computes those of the plan; None: it is not made.
    Raises before it moves a row, or not at all.
    """
    for start in begin_batch(runtime, arena, plan, numbers, centroids, angles, pending, workspace, outs):
        start()


# -- numbers ---------------------------------------------------------------------------------------------------------------


def publish(runtime: Runtime, pieces: int, numbers: Tensor) -> None:
    """Write 4-byte words to where they belong. numbers : int32 on the device, `pieces_of` as many."""
    params = pack_params(PUBLISH_PARAMS, pieces=address(numbers), words=address(numbers))
    runtime.kernel("seal.cu", "saap_publish", {}).launch((pieces, 1, 1), 128, 0, params)


def pieces_of(writes: Sequence[tuple[int, np.ndarray[Any, Any]]]) -> np.ndarray[Any, Any]:
    """What `publish` takes: int32 (n), from addresses and int32 or float32 numbers to write from there on."""
    head: list[int] = []
    at = 4 * len(writes)
    for where, x in writes:
        head += (where, at, x.size)
        at += x.size
    packed = struct.pack("<" + "Qii" * len(writes), *head) + b"".join([x.tobytes() for _, x in writes])
    return np.frombuffer(bytearray(packed), np.int32)


# -- means -----------------------------------------------------------------------------------------------------------------


def means(
    runtime: Runtime,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    mean_keys: Tensor,
    mean_values: Tensor,
    jobs: Tensor | None = None,
    count: int = 0,
) -> None:
    """Mean key and mean value of every run of some segments; 0 for an empty run.

    keys : storage dtype (b, h, N, d), values : (b, h, N, e), strided over b and h. tables : int32 (b, h, s, l + 1), mean_keys :
    storage dtype (b, h, s, l, d), mean_values : (b, h, s, l, e) out, strided over the first three. jobs : int32 (count, 2) on the
    device, sequence and segment of each; None: every segment, of a batch of one.
    """
    if tables.shape[1] * (tables.shape[2] if jobs is None else count):
        _prepare_means(runtime, keys, values, tables, mean_keys, mean_values, jobs, count)()


def _prepare_means(
    runtime: Runtime, keys: Tensor, values: Tensor, tables: Tensor, mean_keys: Tensor, mean_values: Tensor, jobs: Tensor | None,
    count: int,
) -> Callable[[], None]:
    """What `means` starts, if there is anything to do."""
    _, h, s, offsets = tables.shape
    count = s if jobs is None else count
    size = keys.element_size()
    axes = "sequence", "head", "segment"
    strides: dict[str, int] = {
        f"mean_{name}_{axis}": x.stride(i) * size
        for name, x in (("key", mean_keys), ("value", mean_values))
        for i, axis in enumerate(axes)
    }
    params = pack_params(
        MEANS_PARAMS,
        jobs=address(jobs),
        keys=address(keys),
        values=address(values),
        tables=address(tables),
        mean_keys=address(mean_keys),
        mean_values=address(mean_values),
        key_sequence=keys.stride(0) * size,
        key_head=keys.stride(1) * size,
        value_sequence=values.stride(0) * size,
        value_head=values.stride(1) * size,
        table_sequence=tables.stride(0),
        table_head=tables.stride(1),
        table_segment=tables.stride(2),
        **strides,
        capacity=keys.shape[2],
        key_vectors=vectors(keys.shape[3], keys.dtype),
        value_vectors=vectors(values.shape[3], values.dtype),
        type=DTYPE_CODES[keys.dtype],
    )
    return runtime.kernel("means.cu", "saap_means", {}).prepare((offsets - 1, h, count), 256, _MEANS_SHARED_BYTES, params)
