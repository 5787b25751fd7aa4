"""Launches cuda/select.cu. Knows the kernel's configurations, its parameters and how much memory it needs; tensors come
checked: of the dtype and shape said here, contiguous, on the device of the runtime.

Axes as in backends/base.py: b sequences, h KV heads, j = g * q query vectors of a KV head, l lists, S segments at most, m
knots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .launch import Launch, Runtime

_POINTERS = "z a tables centres meta budgets entries unread_mass rows counts tail tail_counts workspace"
_INTS = "h j l segments knots first_knot t_cap x_cap nprobe size_weighted"
PARAMS = np.dtype([(name, np.uint64) for name in _POINTERS.split()] + [(name, np.int32) for name in _INTS.split()], align=True)

H200_SHARED_BYTES = 227 * 1024
MOST_KNOTS = 32
TAKEN = {"SAAP_TAKEN": 1}
"""The macro of a kernel that counts what is read of each run, see `Select.bind_taken`."""


@dataclass(frozen=True)
class SelectShape:
    """What a selection is compiled and sized for. knots: m, or -1 for a router without c."""

    sequences: int
    heads: int
    vectors: int
    nlist: int
    segments: int
    knots: int
    first_knot: int
    nprobe: int = 0
    size_weighted: bool = True


def configuration(shape: SelectShape, multiprocessors: int, max_shared_bytes: int) -> dict[str, int]:
    """The macros for ``shape``. A block is a whole (sequence, KV head): with few of them it is as large as can be."""
    few = shape.sequences * shape.heads <= multiprocessors
    macros = {
        # 8 columns do not fit into the registers of 1024 threads
        "SAAP_THREADS": 1024 if few and shape.vectors <= 4 and not shape.nprobe else 512,
        "SAAP_COLUMNS": 4 if shape.vectors <= 4 else 8,
        "SAAP_LISTS": int(shape.nprobe > 0),
        "SAAP_FAR": 0,
    }
    if shared_bytes(shape, macros) > max_shared_bytes:
        macros |= {"SAAP_FAR": 1, "SAAP_THREADS": 512}
    return macros


def fixed_bytes(macros: dict[str, int]) -> int:
    """sizeof(Fixed) of select_params.cuh, rounded up to 128."""
    warps = macros["SAAP_THREADS"] // 32
    search = max(2 * 4 * 2048, (2 * 256 + 8 + 2 * 4 * 32) * warps) + 8 * warps + 256 * 16 + 12 + 8 + 4 + 4
    weights = macros["SAAP_COLUMNS"] * (8 * warps + 3 * 4) + 8
    return -(-(search + weights) // 128) * 128


def room(shape: SelectShape, macros: dict[str, int]) -> int:
    """Words that grow with S or l: those of one (sequence, KV head) in shared memory, or in the workspace."""
    items = shape.nlist if macros["SAAP_LISTS"] else shape.segments * shape.nlist
    return -(-(shape.segments * (macros["SAAP_COLUMNS"] + 1) + items) // 4) * 4


def shared_bytes(shape: SelectShape, macros: dict[str, int]) -> int:
    """Dynamic shared memory of a block."""
    near = 0 if macros["SAAP_FAR"] else 4 * room(shape, macros)
    return fixed_bytes(macros) + -(-shape.vectors // 4) * 16 + near


class Select:
    """From scores to the rows to read, for one shape: the kernel, compiled, and its grid. Holds no memory of the device.

    num_floats : elements of the workspace of a call, aligned to 16 bytes; 0 where shared memory suffices.
    """

    def __init__(self, runtime: Runtime, shape: SelectShape, knobs: dict[str, int] | None = None) -> None:
        """knobs : macros other than those of `configuration`, to try."""
        if shape.knots > MOST_KNOTS:
            raise ValueError(f"knots: expected at most {MOST_KNOTS} knots of the distance term, got {shape.knots}")
        if shape.segments * (shape.nlist + 1) >= 2**31:
            raise ValueError(f"tables: expected fewer than 2**31 runs, got {shape.segments} segments of {shape.nlist} lists")
        self.shape = shape
        macros = self.macros = configuration(shape, runtime.multiprocessors, runtime.max_shared_bytes) | (knobs or {})
        self.grid, self.block = (shape.heads, shape.sequences, 1), macros["SAAP_THREADS"]
        self.shared_bytes = shared_bytes(shape, macros)
        self.num_floats = shape.sequences * shape.heads * room(shape, macros) if macros["SAAP_FAR"] else 0
        self._kernel = runtime.kernel("select.cu", "saap_select", macros)
        p = self._params = np.zeros((), PARAMS)
        p["h"], p["j"], p["l"], p["segments"] = shape.heads, shape.vectors, shape.nlist, shape.segments
        p["knots"], p["first_knot"] = max(0, shape.knots), shape.first_knot
        p["nprobe"], p["size_weighted"] = shape.nprobe, shape.size_weighted

    def bind_taken(
        self, z: Tensor, a: Tensor, tables: Tensor, centres: Tensor, meta: Tensor, budgets: Tensor, taken: Tensor,
        unread_mass: Tensor | None = None, floats: Tensor | None = None,
    ) -> Launch:
        """The same, made with the knobs `TAKEN`: taken : int32 (b, h, S, l) out, how many of each run are read, its newest ones;
        of segments that are not there it keeps what it holds. Without nprobe and means."""
        if self.shape.nprobe or not self.macros.get("SAAP_TAKEN"):
            raise ValueError("taken: expected a selection of runs, without nprobe, made to write it")
        whole = taken.view(*taken.shape[:2], -1)
        launch = self.bind(z, a, tables, centres, meta, budgets, whole, budgets, unread_mass, floats=floats)
        launch.params["counts"], launch.params["t_cap"] = 0, 2**31 - 1
        return launch

    def bind(
        self,
        z: Tensor,
        a: Tensor,
        tables: Tensor,
        centres: Tensor,
        meta: Tensor,
        budgets: Tensor,
        rows: Tensor,
        counts: Tensor,
        unread_mass: Tensor | None = None,
        mean_entries: Tensor | None = None,
        tail: Tensor | None = None,
        tail_counts: Tensor | None = None,
        floats: Tensor | None = None,
    ) -> Launch:
        """One selection per (sequence, KV head), see Backend.probe.

        z : float32 (b, h, j, l), a : float32 (b, h, j, m + 1) or (b, h, j, 0); tables : int32 (b, h, S, l + 1); centres :
        float32 (b, S), position of the middle of each segment; meta : int32 (b, 8): num_segments, next_position, means.
        budgets : int32 (b, h); unread_mass : float32 (h,) or None; mean_entries : int32 (b, h) or None.
        rows : int32 (b, h, t) out, ascending, t being a bound of every budget; counts : int32 (b, h) out, how many are written;
        tail : int32 (b, h, x), tail_counts : int32 (b, h), likewise, with ``mean_entries``. floats : float32 (num_floats,).
        """
        if (self.shape.nprobe or not self.shape.size_weighted) and (unread_mass is not None or mean_entries is not None):
            raise ValueError("miss, entries: neither goes with nprobe, nor with a router that does not count lists")
        if self.num_floats and floats is None:
            raise ValueError(f"floats: expected a workspace of {self.num_floats} floats, got None")
        p = self._params.copy()
        p["z"], p["a"], p["tables"] = z.data_ptr(), a.data_ptr() if self.shape.knots >= 0 else 0, tables.data_ptr()
        p["centres"], p["meta"], p["budgets"] = centres.data_ptr(), meta.data_ptr(), budgets.data_ptr()
        p["rows"], p["counts"], p["t_cap"] = rows.data_ptr(), counts.data_ptr(), rows.shape[2]
        if unread_mass is not None:
            p["unread_mass"] = unread_mass.data_ptr()
        if mean_entries is not None:
            if tail is None or tail_counts is None:
                raise ValueError("tail, tail_counts: expected tensors beside entries, got None")
            p["entries"], p["tail"], p["tail_counts"] = mean_entries.data_ptr(), tail.data_ptr(), tail_counts.data_ptr()
            p["x_cap"] = tail.shape[2]
        if floats is not None:
            p["workspace"] = floats.data_ptr()
        kept = z, a, tables, centres, meta, budgets, rows, counts, unread_mass, mean_entries, tail, tail_counts, floats
        return Launch(self._kernel, self.grid, self.block, self.shared_bytes, p, *kept)


CONFIGURATIONS = tuple(
    ("select.cu", "saap_select", {"SAAP_THREADS": threads, "SAAP_COLUMNS": columns, "SAAP_LISTS": lists, "SAAP_FAR": far})
    for threads, columns in ((1024, 4), (512, 4), (512, 8))
    for lists in (0, 1)
    for far in (0, 1)
    if threads == 512 or not lists + far
) + tuple(
    ("select.cu", "saap_select", {"SAAP_THREADS": threads, "SAAP_COLUMNS": columns, "SAAP_LISTS": 0, "SAAP_FAR": far, **TAKEN})
    for threads, columns, far in ((1024, 4, 0), (512, 4, 0), (512, 8, 0), (512, 4, 1), (512, 8, 1))
)
"""All that `configuration` gives: (file, kernel, macros)."""
