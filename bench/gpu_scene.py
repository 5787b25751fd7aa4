"""A step of a layer without the index around it: the session of a batch over memory that is laid out as the index would.

For whoever looks at launches: `gpu_model.py` counts what they execute, `gpu_replay.py` records and replays them. A scene goes
through the seam that an index decodes through (`Session`), so it launches what is shipped, whatever kernels that are.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saap_index import Rope
from saap_index.backends import STORAGE_CODES, Coded, SegmentChange
from saap_index.backends.cuda.backend import CudaBackend
from saap_index.backends.cuda.launch import Kernel, Runtime
from saap_index.backends.cuda.route import pack_router
from saap_index.backends.types import Arena, Budget, Frequencies, Placement, Plan, Routing
from saap_index.backends.weights import RouterWeights
from saap_index.invlists.layout import Layout

Grid = tuple[int, int, int]

MAP_NORESERVE = 0x4000
"""Of Linux; Python's mmap does not name it."""


@dataclass(frozen=True)
class Start:
    """One start of a kernel. params : a copy of its struct."""

    file: str
    kernel: str
    macros: dict[str, int]
    grid: Grid
    block: int
    shared_bytes: int
    params: np.ndarray[Any, Any]
    cluster: int
    dependent: bool


class Watched:
    """A runtime whose starts go through ``around(start, go)``, which calls ``go``, while it is ``watching``."""

    def __init__(self, inner: Runtime, around: Callable[[Start, Callable[[], None]], None]) -> None:
        self.inner, self.around = inner, around
        self.name, self.capability = inner.name, inner.capability
        self.multiprocessors, self.max_shared_bytes = inner.multiprocessors, inner.max_shared_bytes
        self.watching = True

    def kernel(self, file: str, name: str, macros: Mapping[str, int]) -> Kernel:
        return _WatchedKernel(self, file, name, dict(macros), self.inner.kernel(file, name, macros))


class _WatchedKernel:
    def __init__(self, runtime: Watched, file: str, name: str, macros: dict[str, int], inner: Kernel) -> None:
        self.runtime, self.file, self.name, self.macros, self.inner = runtime, file, name, macros, inner

    def prepare(
        self, grid: Grid, block: int, shared_bytes: int, params: np.ndarray[Any, Any], cluster: int = 1, dependent: bool = False
    ) -> Callable[[], None]:
        return partial(self.launch, grid, block, shared_bytes, params, cluster, dependent)

    def launch(
        self, grid: Grid, block: int, shared_bytes: int, params: np.ndarray[Any, Any], cluster: int = 1, dependent: bool = False
    ) -> None:
        start = Start(self.file, self.name, self.macros, grid, block, shared_bytes, params.copy(), cluster, dependent)
        go = partial(self.inner.launch, grid, block, shared_bytes, params, cluster, dependent)
        if self.runtime.watching:
            self.runtime.around(start, go)
        else:
            go()


SHIPPED = Layout()


@dataclass(frozen=True)
class Size:
    """What a step works on; Llama-3.1-8B's layer. share : of the sealed tokens that is read; storage : a code of these, or
    nothing for ``dtype``."""

    tokens: int
    batch: int
    share: float = 0.05
    kv_heads: int = 8
    group: int = 4
    d: int = 128
    nlist: int = 256
    units: int = 64
    knots: int = 11
    dtype: torch.dtype = torch.bfloat16
    layout: Layout = SHIPPED
    room: int = 1024
    storage: str = ""

    @property
    def row_bytes(self) -> int:
        """Of a key and a value."""
        return 2 * self.d * self.dtype.itemsize


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(1, count * dtype.itemsize), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


class Scene:
    """A batch at one size, ready for steps; the runtime sees these alone.

    drawn : whether keys and values are random, else zeros that take no memory.

    Lists have random lengths around the mean, the router random weights; the same for the same ``seed``. Its tensors are on the
    CPU, where the emulated device has them.
    """

    def __init__(self, runtime: Watched, size: Size, drawn: bool, seed: int = 0) -> None:
        self.runtime, runtime.watching = runtime, False
        self.size, self.device = size, torch.device("cpu")
        self._random = np.random.default_rng(seed)
        b, h, d = size.batch, size.kv_heads, size.d
        capacity = size.tokens + size.room
        segments = size.layout.segments(size.tokens)
        most = size.layout.most_segments(capacity)
        memory = (b, h, capacity, d)
        meta, centres = np.zeros((b, 7), np.int32), np.zeros((b, most), np.float64)
        sealed = segments[-1][1] if segments else 0
        meta[:] = (size.tokens, size.layout.sinks, sealed, len(segments), size.tokens, 0, 0)
        centres[:, : len(segments)] = [(start + stop - 1) / 2 for start, stop in segments]
        no_means = torch.zeros((b, h, 0, size.nlist, d), dtype=size.dtype, device=self.device)
        ids = torch.arange(capacity, dtype=torch.int32, device=self.device).expand(b, h, capacity).contiguous()
        tables, coded = self._tables(segments, most), None
        if size.storage:
            code, low = STORAGE_CODES[size.storage], size.layout.sinks
            keys, values = (untouched((b, h, capacity, x), torch.uint8) for x in code.sizes(d, d))
            coded = Coded(code, keys, values, [low] * b, [sealed] * b)
            plain = b, h, capacity - (sealed - low), d
            numbers = untouched(plain, size.dtype), untouched(plain, size.dtype)
            self.arena = Arena(keys, values, ids, tables, no_means, no_means, None, *numbers)
        else:
            keys, values = (self._normal(memory).to(size.dtype) if drawn else untouched(memory, size.dtype) for _ in range(2))
            self.arena = Arena(keys, values, ids, tables, no_means, no_means, None)
        self.backend = CudaBackend(self.device, runtime)
        self.session = self.backend.session(b, h, d, d, size.nlist, size.dtype)
        self.session.publish(Placement(self.arena, meta, centres, coded), ())
        rows = int(size.share * (sealed - size.layout.sinks))
        budgets = torch.full((b, h), rows, dtype=torch.int32, device=self.device)
        self.plan = Plan((), max_rows=rows)
        self.session.plan(self.plan, Budget(budgets))
        frequencies = Rope(head_dim=d, theta=500000.0).inv_freq().to(self.device, torch.float32)
        self.routing = Routing(pack_router(self._router()), 7, True, Frequencies(frequencies, False, 1.0))
        self.queries = self._normal((b, h, size.group, 1, d)).to(size.dtype)
        self.new = self._normal((b, h, 1, d)).to(size.dtype)

    def step(self) -> tuple[Tensor, Tensor]:
        """`add` of a token and `search_attend`: out, lse."""
        self.runtime.watching = True
        self.session.append(self.new, self.new, [1] * self.size.batch)
        out, lse, _ = self.session.run(self.queries, self.routing, self.plan, self.size.d**-0.5)
        return out, lse

    def change(self, change: Callable[[int], SegmentChange]) -> None:
        """A change of the segments of every sequence, change(i) of sequence i, and what the host publishes of it."""
        size = self.size
        centroids = self._normal((size.kv_heads, size.nlist, size.d))
        quantizer, angles = self.backend.prepare_quantizer(centroids), self.routing.rope
        assert angles is None or isinstance(angles, Frequencies)
        self.runtime.watching = True
        self.backend.seal_batch(self.arena, [change(i) for i in range(size.batch)], quantizer, angles)
        placement = self.session._published
        self.session.publish(placement, ())
        self.runtime.watching = False

    def rows_near(self) -> int:
        """Of all heads: sinks and recent ones."""
        meta = self.session.read()
        return int((meta[:, 1] + meta[:, 0] - meta[:, 2]).sum()) * self.size.kv_heads

    def rows_listed(self) -> int:
        """Of all heads, in the last step."""
        return int(self.plan.packed.selected.counts.sum())

    def _normal(self, shape: tuple[int, ...], deviation: float = 1.0) -> Tensor:
        return torch.from_numpy(self._random.standard_normal(shape, np.float32) * np.float32(deviation))

    def _tables(self, segments: Any, most: int) -> Tensor:
        """Where the lists of each segment begin: lengths as k-means gives them, within a factor of a few of the mean."""
        size = self.size
        tables = np.zeros((size.batch, size.kv_heads, most, size.nlist + 1), np.int32)
        for i in range(size.batch):
            for head in range(size.kv_heads):
                share = self._random.gamma(4.0, size=size.nlist)
                for s, (start, stop) in enumerate(segments):
                    tables[i, head, s, 0] = start
                    tables[i, head, s, 1:] = start + self._random.multinomial(stop - start, share / share.sum()).cumsum()
        return torch.from_numpy(tables)

    def _router(self) -> RouterWeights:
        size = self.size
        h, outputs = size.kv_heads, size.nlist + size.knots + 1
        shapes = ((h, size.units, size.d), (h, size.units), (h, outputs, size.units), (h, outputs, size.d), (h, outputs))
        hidden, bias_hidden, out, skip, bias_out = (self._normal(x, 0.2) for x in shapes)
        return RouterWeights(hidden, bias_hidden, out, skip, bias_out, size.nlist)
