"""Launches cuda/route_select.cu: route and select as one cluster of blocks per (sequence, KV head). Knows which searches the
kernel covers, its configurations, its parameters and its shared memory; tensors come checked: of the dtype and shape said
here, contiguous, on the device of the runtime.

Axes as in backends/base.py: b sequences, h KV heads, j = g * q query vectors of a KV head, l lists, S segments at most, m knots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..codes import DTYPE_CODES
from ..types import Frequencies, Rotation, Sample
from .launch import Launch, Runtime
from .route import PackedRouter
from .scan import Runs
from .select import MOST_KNOTS

_POINTERS = (
    "queries hidden bias_hidden out bias_out inv_freq cosine sine meta tables centres budgets unread_mass runs run_counts "
    "counts tickets clocks"
)
_INTS = "b h j q d pairs interleaved l outputs out_tiles segments first_knot t_cap most_runs num_tickets early"
PARAMS = np.dtype(
    [(name, np.uint64) for name in _POINTERS.split()] + [("scale", np.float32)] + [(name, np.int32) for name in _INTS.split()],
    align=True,
)
SAMPLED_PARAMS = np.dtype(
    [(name, PARAMS[name]) for name in PARAMS.names or ()] + [(x, np.uint64) for x in ("sampled", "exponents", "caps", "weights")],
    align=True,
)

MOST_VECTORS = 8
LEAST_CAPABILITY = (9, 0)
"""The first with clusters."""

THREADS, BINS, CANDIDATES = 512, 2048, 256
CLUSTERS = 8, 4, 2


STAGES = (
    "waited", "rows", "routed", "bends", "sums", "weighed", "tallied", "bin", "candidates", "cut", "counted", "written",
)
"""What has been done when a stage is noted."""


@dataclass(frozen=True)
class RouteSelectShape:
    """What a launch is compiled and sized for. segments: most that a sequence may have; first_knot: log2 of a distance; sampled:
    whether a part of the budgets is a sample."""

    sequences: int
    heads: int
    vectors: int
    num_queries: int
    segments: int
    first_knot: int
    query: torch.dtype
    sampled: bool = False

    def most_runs(self, nlist: int) -> int:
        """Of a selection: of the run that the budget cuts a sample is one more."""
        return self.segments * nlist + self.sampled


def covers(runtime: Runtime, router: PackedRouter, shape: RouteSelectShape) -> bool:
    """Whether the kernel serves such searches of a router that counts lists, without nprobe and tail."""
    knots = router.outputs - router.nlist - 1
    if runtime.capability < LEAST_CAPABILITY or shape.vectors > MOST_VECTORS or not 0 <= knots <= MOST_KNOTS:
        return False
    macros = configuration(router, shape, runtime.multiprocessors)
    return shared_bytes(router, shape.segments, macros) <= runtime.max_shared_bytes


def configuration(router: PackedRouter, shape: RouteSelectShape, multiprocessors: int) -> dict[str, int]:
    """The macros. A cluster has as many blocks as leave all of them on the device at once, and each something to do."""
    macros = {
        "SAAP_DTYPE": DTYPE_CODES[shape.query],
        "SAAP_D32": -(-router.d // 32),
        "SAAP_U32": -(-router.units // 32),
        "SAAP_COLUMNS": 4 if shape.vectors <= 4 else 8,
        "SAAP_THREADS": THREADS,
        **({"SAAP_SAMPLED": 1} if shape.sampled else {}),
    }
    for cluster in CLUSTERS:
        macros["SAAP_CLUSTER"] = cluster
        # A multiprocessor has a block: clusters of two on one share its issue slots, and may not find room at the same time.
        if cluster * shape.sequences * shape.heads <= multiprocessors and (cluster - 1) * 16 < router.nlist:
            break
    return macros


def shared_bytes(router: PackedRouter, segments: int, macros: dict[str, int]) -> int:
    """Dynamic shared memory of a block: see struct Block of route_select.cu."""
    cluster, columns, d32, u32 = (macros[f"SAAP_{name}"] for name in ("CLUSTER", "COLUMNS", "D32", "U32"))
    tiles = -(-router.nlist // (16 * cluster))
    lists, hidden, all_tiles = 16 * tiles, 2 * u32, tiles + (router.outputs - 1) // 16 - router.nlist // 16 + 1
    weights = 1024 * (hidden * d32 + all_tiles * (d32 + u32))
    rows = 8 * 16 * (4 * (d32 + u32) + 1)
    products = 512 * (hidden + 2 * all_tiles) * (2 if d32 > 1 else 1)
    floats = lists * columns + (MOST_KNOTS + 1) * columns + segments * columns + segments * (lists + 1) + segments * lists
    floats += segments + 16 * d32 + 4 + 32 * u32 + 16 * all_tiles
    if macros.get("SAAP_SAMPLED"):
        floats += 2 * BINS + (2 * segments + 3) // 4 * 4
    return fixed_bytes(macros) + weights + rows + products + 4 * floats


def fixed_bytes(macros: dict[str, int]) -> int:
    """sizeof(Shared) of route_select.cu, rounded up to 128."""
    cluster, columns, warps = macros["SAAP_CLUSTER"], macros["SAAP_COLUMNS"], macros["SAAP_THREADS"] // 32
    size = 8 * (cluster + warps) * columns + 12 * columns + 8 * (cluster + 1 + warps) + 4 + 12 + 4 * 4
    return -(-(size + 2 * 16 * CANDIDATES + 8 * (BINS + BINS // 32)) // 128) * 128


class RouteSelect:
    """From queries to the runs to read, for one shape and router: the kernel, compiled, and its grid.

    clocks : int64 (blocks, 16) cycles at each stage with the macro SAAP_CLOCK, else None; STAGES are their names.
    """

    def __init__(
        self, runtime: Runtime, router: PackedRouter, shape: RouteSelectShape, knobs: dict[str, int] | None = None
    ) -> None:
        """knobs : macros other than those of `configuration`, to try."""
        self.router, self.shape = router, shape
        macros = configuration(router, shape, runtime.multiprocessors) | (knobs or {})
        self.macros, self.cluster, self.block = macros, macros["SAAP_CLUSTER"], macros["SAAP_THREADS"]
        self.grid = self.cluster * shape.heads, shape.sequences, 1
        self.shared_bytes = shared_bytes(router, shape.segments, macros)
        self._kernel = runtime.kernel("route_select.cu", "saap_route_select", macros)
        self.clocks: Tensor | None = None
        p = self._params = np.zeros((), SAMPLED_PARAMS if shape.sampled else PARAMS)
        if macros.get("SAAP_CLOCK"):
            blocks = self.grid[0] * self.grid[1]
            self.clocks = torch.zeros((blocks, 16), dtype=torch.int64, device=router.hidden.device)
            p["clocks"] = self.clocks.data_ptr()
        for name in ("hidden", "bias_hidden", "out", "bias_out"):
            p[name] = getattr(router, name).data_ptr()
        p["b"], p["h"], p["j"], p["q"], p["d"] = shape.sequences, shape.heads, shape.vectors, shape.num_queries, router.d
        p["l"], p["outputs"], p["out_tiles"] = router.nlist, router.outputs, router.out.shape[1]
        p["segments"], p["first_knot"] = shape.segments, shape.first_knot

    def bind(
        self, rotation: Rotation | Frequencies | None, meta: Tensor, tables: Tensor, centres: Tensor, budgets: Tensor,
        found: Runs, unread_mass: Tensor | None, tickets: Tensor | None, dependent: bool, sample: Sample | None = None,
    ) -> Launch:
        """One selection per (sequence, KV head), as `Route.bind` and `Select.bind` make it, but for the order of the rows.

        found : out, with room for `RouteSelectShape.most_runs`; most_rows bounds every budget. tickets : int32, out: zeros.
        sample : of a shape that is ``sampled``; ``found`` then has weights, and there is no ``unread_mass``.
        dependent : whether blocks may start before the launch in front of this one has ended; the field ``early`` of the
        parameters then says that weights, tables, centres, budgets and unread_mass are complete, whatever launches have not
        ended yet.
        A start takes queries : query dtype (b, h, j, d).
        """
        p = self._params.copy()
        p["scale"] = 1.0
        if rotation is not None:
            p["interleaved"], p["scale"] = rotation.interleaved, rotation.scale
        if isinstance(rotation, Rotation):
            p["cosine"], p["sine"], p["pairs"] = rotation.cos.data_ptr(), rotation.sin.data_ptr(), rotation.cos.shape[1]
        elif rotation is not None:
            p["inv_freq"], p["pairs"] = rotation.inv_freq.data_ptr(), rotation.inv_freq.shape[0]
        p["meta"], p["tables"], p["centres"] = meta.data_ptr(), tables.data_ptr(), centres.data_ptr()
        p["budgets"], p["counts"], p["t_cap"] = budgets.data_ptr(), found.counts.data_ptr(), found.most_rows
        p["runs"], p["run_counts"], p["most_runs"] = found.runs.data_ptr(), found.run_counts.data_ptr(), found.runs.shape[2]
        if unread_mass is not None:
            p["unread_mass"] = unread_mass.data_ptr()
        if tickets is not None:
            p["tickets"], p["num_tickets"] = tickets.data_ptr(), tickets.numel()
        if sample is not None and found.weights is not None:
            p["sampled"], p["exponents"], p["caps"] = (x.data_ptr() for x in (sample.rows, sample.exponents, sample.caps))
            p["weights"] = found.weights.data_ptr()
        kept = self.router, rotation, meta, tables, centres, budgets, found, unread_mass, tickets, sample
        return Launch(
            self._kernel, self.grid, self.block, self.shared_bytes, p, *kept, cluster=self.cluster, dependent=dependent
        )


CONFIGURATIONS = tuple(
    ("route_select.cu", "saap_route_select", {
        "SAAP_DTYPE": DTYPE_CODES[query], "SAAP_D32": d32, "SAAP_U32": u32, "SAAP_COLUMNS": columns, "SAAP_THREADS": THREADS,
        "SAAP_CLUSTER": cluster, **({"SAAP_SAMPLED": 1} if sampled else {}),
    })
    for d32, u32, query, columns, cluster, sampled in (
        (4, 2, torch.bfloat16, 4, 8, False), (4, 2, torch.bfloat16, 4, 4, False), (4, 2, torch.bfloat16, 8, 2, False),
        (4, 2, torch.float16, 4, 8, False), (4, 2, torch.float32, 4, 8, False), (2, 2, torch.bfloat16, 4, 8, False),
        (8, 2, torch.bfloat16, 8, 8, False), (4, 0, torch.bfloat16, 4, 8, False), (4, 8, torch.bfloat16, 4, 4, False),
        (4, 2, torch.bfloat16, 4, 8, True), (4, 2, torch.bfloat16, 8, 2, True), (2, 2, torch.float32, 4, 8, True),
    )
)
"""What is shipped, a sample of it: (file, kernel, macros)."""
