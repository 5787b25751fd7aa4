"""The CUDA backend: operations of the seam as launches of the kernels in cuda/, and the session that decoding uses.

What runs them is a runtime (launch.py): CuPy on a GPU, or the emulation in the tests, so this is the same code on
both. The general operations here take numbers from the host, allocate and may wait for the device; the hot path is
session.py. What a kernel does not cover (more lists than fit a block's shared memory) falls back to plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DTypeError
from ..codes import DTYPE_CODES, LENGTH, MEANS, META, NEXT, SEALED, SEGMENTS, SINKS
from ..plain_torch import TorchBackend
from ..scalar_quantizer import Coded, StorageCode
from ..segment_change import SegmentChange
from ..types import (
    Arena,
    Budget,
    Frequencies,
    Probed,
    Rotation,
    Tail,
    columns_in_use,
)
from ..weights import RouterWeights
from . import append_assign as gpu_build
from . import codes as gpu_codes
from . import route as gpu_route
from . import scan as gpu_scan
from . import seal as gpu_seal
from . import select as gpu_select
from .launch import Runtime
from .route_select import LEAST_CAPABILITY
from .seal_plan import Job, places, planned
from .searches import Knobs
from .session import CudaSession, sent

MOST_SORTED_LISTS = 32768
"""More do not fit the shared memory of a block of every device; torch sorts then."""

SEAL_BYTES = 256 << 20
"""Most scratch memory of a seal, where a segment needs it not at once."""


@dataclass(frozen=True)
class _Begun:
    """A seal of which the half that moves no row is started. remaining : what starts the other half; wait : makes the current
    stream wait for the first; memory : lives as long as this."""

    remaining: Sequence[Callable[[], None]]
    wait: Callable[[], None]
    memory: tuple[Any, ...]


class CudaBackend(TorchBackend):
    """See `Backend` for the contract of every method."""

    name = "cuda"
    reads_codes = True

    @property
    def reads_samples(self) -> bool:  # type: ignore[override]
        """Where the kernel that selects them is."""
        return self.runtime.capability >= LEAST_CAPABILITY

    def __init__(self, device: torch.device | str, runtime: Runtime, knobs: Knobs | None = None) -> None:
        """knobs : macros of the kernels "route", "select" and "scan" other than the launchers choose, to try."""
        super().__init__(device)
        self.runtime = runtime
        self.knobs = knobs or {}

    captures = True
    seals_batches = True

    def session(self, batch: int, heads: int, d: int, d_v: int, nlist: int, dtype: torch.dtype) -> CudaSession:
        return CudaSession(self, self.device, self.runtime, self.knobs, (batch, heads, d, d_v, nlist), dtype)

    def append(
        self, keys: Tensor, values: Tensor, arena_keys: Tensor, arena_values: Tensor, starts: Sequence[int], counts: Sequence[int]
    ) -> bool:
        largest = [_largest(x[i, :, :count]) for i, count in enumerate(counts) for x in (keys, values) if count]
        if not largest:
            return True
        if not bool(torch.isfinite(torch.stack(largest)).all()):
            return False
        numbers = self._ints([*starts, *counts, *(0 for _ in counts)]).view(3, -1)
        gpu_build.append(self.runtime, keys, values, arena_keys, arena_values, *numbers)
        return True

    def prepare_quantizer(self, centroids: Tensor, bias: Tensor | None = None) -> Any:
        return gpu_build.pack_centroids(centroids, bias)

    def assign(self, quantizer: Any, keys: Tensor, rotation: Rotation | None) -> Tensor:
        list_nos = torch.empty(keys.shape[:2], dtype=torch.int32, device=self.device)
        gpu_build.assign(self.runtime, quantizer, keys, list_nos, rotation)
        return list_nos

    def seal(self, keys: Tensor, values: Tensor, ids: Tensor, start: int, list_nos: Tensor, table: Tensor) -> None:
        if table.shape[1] > MOST_SORTED_LISTS or keys.dtype is torch.uint8:
            super().seal(keys, values, ids, start, list_nos, table)
        else:
            self.seal_many(keys, values, ids, ((start, start + list_nos.shape[1]),), list_nos, table[:, None])

    def seal_many(
        self, keys: Tensor, values: Tensor, ids: Tensor, segments: Sequence[tuple[int, int]], list_nos: Tensor, tables: Tensor
    ) -> None:
        if tables.shape[2] > MOST_SORTED_LISTS or keys.dtype is torch.uint8:  # codes are no whole vectors
            super().seal_many(keys, values, ids, segments, list_nos, tables)
            return
        arena = gpu_seal.Arena(keys[None], values[None], ids[None], tables[None])
        jobs, at = [], 0
        for slot, (start, stop) in enumerate(segments):
            jobs.append(Job(0, start, stop - start, at, slot, 0, 0, start, start - segments[0][0], -1))
            at += places(stop - start)
        numbers = sent(np.array(jobs, np.int32), self.device)
        least, most = gpu_seal.workspace_bytes(arena, jobs)
        workspace = torch.empty(max(least, min(most, SEAL_BYTES)), dtype=torch.uint8, device=self.device)
        gpu_seal.seal(self.runtime, arena, jobs, numbers, gpu_seal.Fresh(list_nos), workspace)

    @property
    def seals_beside(self) -> bool:  # type: ignore[override]
        return hasattr(self.runtime, "beside")

    def begin_seal(
        self, arena: Arena, changes: Sequence[SegmentChange], quantizer: Any, angles: Frequencies | None
    ) -> _Begun | None:
        plan = planned(changes)
        if arena.tables.shape[3] > MOST_SORTED_LISTS or not plan.jobs or getattr(self.runtime, "capturing", False):
            return None
        # What nothing but this writes is made before the streams part; the rest is as it is now, or it is dropped.
        numbers, workspace = self._to_seal(arena, plan, quantizer)
        memory = [arena.keys, arena.values, arena.ids, arena.tables, numbers, workspace]
        memory += [] if quantizer is None else [quantizer.panels, quantizer.scales]
        memory += [] if angles is None else [angles.inv_freq]
        with self.runtime.beside(*memory) as wait:  # type: ignore[attr-defined]
            remaining = self._begin(arena, plan, numbers, workspace, quantizer, angles)
        return _Begun(remaining, wait, (arena, numbers, workspace))

    def seal_batch(
        self, arena: Arena, changes: Sequence[SegmentChange], quantizer: Any, angles: Frequencies | None,
        begun: _Begun | None = None,
    ) -> bool:
        if begun is not None:
            begun.wait()
            for start in begun.remaining:
                start()
            return True
        if arena.tables.shape[3] > MOST_SORTED_LISTS:
            return False
        plan = planned(changes)
        if plan.jobs:
            for start in self._begin(arena, plan, *self._to_seal(arena, plan, quantizer), quantizer, angles):
                start()
        return True

    def _to_seal(self, arena: Arena, plan: gpu_seal.Plan, quantizer: Any) -> tuple[Tensor, Tensor]:
        """The numbers of a plan on the device, and a workspace for it."""
        least, most = gpu_seal.workspace_bytes(gpu_seal.Arena(arena.keys, arena.values, arena.ids, arena.tables), plan.jobs)
        lists = gpu_seal.aligned(arena.keys.shape[1] * plan.fresh * 4) if quantizer is not None else 0
        workspace = torch.empty(lists + max(least, min(most, SEAL_BYTES)), dtype=torch.uint8, device=self.device)
        return sent(plan.numbers, self.device), workspace

    def _begin(
        self, arena: Arena, plan: gpu_seal.Plan, numbers: Tensor, workspace: Tensor, quantizer: Any, angles: Frequencies | None
    ) -> list[Callable[[], None]]:
        rows, means = gpu_seal.Arena(arena.keys, arena.values, arena.ids, arena.tables), (arena.mean_keys, arena.mean_values)
        return gpu_seal.begin_batch(self.runtime, rows, plan, numbers, quantizer, angles, arena.pending, workspace, means)

    def encode(self, code: StorageCode, keys: Tensor, values: Tensor, key_codes: Tensor, value_codes: Tensor) -> None:
        gpu_codes.encode(self.runtime, keys, code.key_bits, key_codes)
        gpu_codes.encode(self.runtime, values, code.value_bits, value_codes)

    def means(self, keys: Tensor, values: Tensor, table: Tensor, mean_keys: Tensor, mean_values: Tensor) -> None:
        tables, outs = table[None, :, None], (mean_keys[None, :, None], mean_values[None, :, None])
        gpu_seal.means(self.runtime, keys[None], values[None], tables, *outs)

    def prepare_router(self, weights: RouterWeights) -> Any:
        return gpu_route.pack_router(weights)

    def router_bytes(self, weights: RouterWeights) -> int:
        return gpu_route.packed_bytes(weights)

    def route(self, router: Any, queries: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        b, h, g, q, _ = queries.shape
        sizes = router.nlist, router.outputs - router.nlist
        z, a = (torch.empty((b, h, g * q, n), dtype=torch.float32, device=self.device) for n in sizes)
        route = gpu_route.Route(self.runtime, router, b, g * q, q, queries.dtype, self.knobs.get("route"))
        route.bind(rotation, None, z, a)(queries=queries)
        return z, a

    def probe(
        self, z: Tensor, a: Tensor, knots: Tensor, tables: Tensor, num_segments: Sequence[int], budget: Budget,
        size_weighted: bool,
    ) -> Probed:
        if budget.sample is not None:  # as route_select.cu does of a step; scores alone are no hot path
            return super().probe(z, a, knots, tables, num_segments, budget, size_weighted)
        b, h, j, nlist = z.shape
        segments, m = tables.shape[2], a.shape[3] - 1
        shape = gpu_select.SelectShape(b, h, j, nlist, segments, m, 0, budget.nprobe, size_weighted)
        select = gpu_select.Select(self.runtime, shape, self.knobs.get("select"))
        # the kernel takes the logarithm of distances itself: segments are put where theirs are the knots, before position 1
        centres = -torch.exp2(knots)
        means = budget.means if budget.mean_entries is not None else [0] * b
        meta = self.meta({SEGMENTS: num_segments, MEANS: means, NEXT: [1] * b})
        rows, counts = self._lists(budget.rows)
        tail = tail_counts = None
        if budget.mean_entries is not None:
            tail, tail_counts = self._lists(budget.mean_entries)
        floats = torch.empty(select.num_floats, dtype=torch.float32, device=self.device)
        limits = budget.unread_mass, budget.mean_entries
        select.bind(z, a, tables, centres, meta, budget.rows, rows, counts, *limits, tail, tail_counts, floats)()
        rows = columns_in_use(rows, counts)
        if tail is None or tail_counts is None:
            return Probed(rows, counts)
        return Probed(rows, counts, columns_in_use(tail, tail_counts), tail_counts)

    def _lists(self, most: Tensor) -> tuple[Tensor, Tensor]:
        """Room for lists of up to ``most`` (b, h) numbers each, and for their lengths."""
        width = int(most.max()) if most.numel() else 0
        lists = torch.empty((*most.shape, max(0, width)), dtype=torch.int32, device=self.device)
        return lists, torch.empty(most.shape, dtype=torch.int32, device=self.device)

    def meta(self, columns: dict[int, Sequence[int]]) -> Tensor:
        """meta : int32 (b, 8) with these columns, on the device."""
        b = len(next(iter(columns.values())))
        meta = torch.zeros((b, META), dtype=torch.int32, device="cpu")
        for column, values in columns.items():
            meta[:, column] = torch.tensor(list(values), dtype=torch.int32, device="cpu")
        return meta.to(self.device)

    def scan(
        self, queries: Tensor, arena_keys: Tensor, arena_values: Tensor, rows: Tensor | None, counts: Tensor | None,
        sinks: Sequence[int], sealed: Sequence[int], lengths: Sequence[int], scale: float, causal: bool, tail: Tail | None = None,
        coded: Coded | None = None, biases: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        b, h, g, q, d = queries.shape
        if coded is not None and not gpu_codes.covers(coded, lengths, q, causal):
            memory = queries, arena_keys, arena_values
            return super().scan(*memory, rows, counts, sinks, sealed, lengths, scale, causal, tail, coded, biases)
        shape = gpu_scan.ScanShape(
            b, h, g * q, q, d, arena_values.shape[3], arena_keys.dtype, queries.dtype, arena_keys.shape[2], causal,
            weighted=biases is not None,
        )
        knobs = self.knobs.get("scan")
        if coded is None:
            scan: gpu_scan.Scan | gpu_codes.CodedScan = gpu_scan.Scan(self.runtime, shape, knobs)
        else:
            scan = gpu_codes.CodedScan(self.runtime, shape, coded.code.value_bits, coded.keys.shape[2], self.device, knobs)
        out = torch.empty((b, h, g, q, arena_values.shape[3]), dtype=queries.dtype, device=self.device)
        lse = torch.empty((b, h, g, q), dtype=torch.float32, device=self.device)
        floats = torch.empty(scan.num_floats, dtype=torch.float32, device=self.device)
        tickets = torch.zeros(scan.num_tickets, dtype=torch.int32, device=self.device)
        listed: gpu_scan.Listed | gpu_scan.Runs | None = None
        if rows is not None and counts is not None:
            listed = gpu_scan.Listed(rows, counts) if biases is None else gpu_scan.rows_as_runs(rows, counts, biases)
        if isinstance(scan, gpu_codes.CodedScan):
            assert coded is not None
            columns = gpu_codes.numbers_meta(coded, lengths, sinks, sealed)
            spans = torch.from_numpy(gpu_codes.coded_spans(coded, sinks, sealed, False)).to(self.device)
            meta = self.meta(dict(zip((LENGTH, SINKS, SEALED), columns, strict=True)))
            arena = arena_keys, arena_values
            launch: Any = scan.bind(arena, coded, meta, spans, listed, tail, scale, floats, tickets)
        else:
            meta = self.meta({LENGTH: lengths, SINKS: sinks, SEALED: sealed})
            launch = scan.bind(arena_keys, arena_values, meta, listed, tail, scale, floats, tickets)
        launch(queries=gpu_scan.aligned(queries), out=out, lse=lse)
        return out, lse

    def combine(self, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        if out_a.dtype not in DTYPE_CODES or out_b.dtype != out_a.dtype:
            names = list(DTYPE_CODES)
            raise DTypeError(f"out_a, out_b: expected one of {names} for both, got {out_a.dtype} and {out_b.dtype}")
        out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
        gpu_scan.combine(self.runtime, out_a, lse_a, out_b, lse_b, out, lse)
        return out, lse

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cpu").to(self.device)


def _largest(x: Tensor) -> Tensor:
    """Largest magnitude, NaN if there is one: one pass over x and no mask of it."""
    return torch.linalg.vector_norm(x, torch.inf)
