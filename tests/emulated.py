"""The CUDA backend on the emulated device, under the name "cuda-emu", and CUDA graphs of what it launches.

A graph here is what it is there: launches with their parameters, recorded instead of run, and run when replayed. Whatever else a
captured step did would be missing from the replays, as it would be illegal or lost in a real capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from emu.runtime import EmulatedRuntime
from torch.utils._python_dispatch import TorchDispatchMode

from saap_index import register_backend
from saap_index.backends.cuda.backend import CudaBackend
from saap_index.backends.cuda.launch import Kernel, Runtime

Grid = tuple[int, int, int]

MULTIPROCESSORS, SHARED_BYTES = 2, 64 << 10
SMALL = {"select": {"SAAP_THREADS": 64}}
"""A small device, and small blocks: every thread is executed. The shapes that ship have tests of their own, kernel by kernel."""


class Graph(TorchDispatchMode):
    """Launches in order. While it is recorded, what torch returns is kept: memory of a capture belongs to the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[str, Callable[[], None]]] = []
        self.memory: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.memory.append(function(*args, **(kwargs or {})))
        return self.memory[-1]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.launches]

    def replay(self) -> None:
        for _, launch in self.launches:
            launch()


class WholeGraph(Graph):
    """A graph of torch's operators too, as a real one holds their kernels: replayed, each writes to the memory of its first run.

    What asks the host for a number is refused, as a real capture refuses it.
    """

    _ASKING = "_local_scalar_dense", "is_nonzero", "equal", "nonzero"

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if name in self._ASKING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        found = function(*args, **kwargs)
        self.memory.append(found)
        returns = function._schema.returns
        outputs = found if isinstance(found, tuple | list) else (found,)
        fresh = [x for x, kind in zip(outputs, returns, strict=False) if isinstance(x, torch.Tensor) and kind.alias_info is None]
        changes = any(x.alias_info is not None and x.alias_info.is_write for x in function._schema.arguments)

        def again() -> None:
            new = function(*args, **kwargs)
            made = new if isinstance(new, tuple | list) else (new,)
            for x, y in zip(outputs, made, strict=True):
                if any(x is z for z in fresh):
                    x.copy_(y)

        if (fresh or changes) and not name.startswith("empty"):
            self.launches.append((name, again))
        return found


class RecordingKernel:
    def __init__(self, runtime: RecordingRuntime, name: str, kernel: Kernel) -> None:
        self.runtime, self.name, self.kernel = runtime, name, kernel

    def prepare(
        self, grid: Grid, block: int, shared_bytes: int, params: np.ndarray[Any, Any], cluster: int = 1, dependent: bool = False
    ) -> Callable[[], None]:
        return partial(self.launch, grid, block, shared_bytes, params, cluster, dependent)

    def launch(
        self, grid: Grid, block: int, shared_bytes: int, params: np.ndarray[Any, Any], cluster: int = 1, dependent: bool = False
    ) -> None:
        if self.runtime.aside is not None:
            self.runtime.launched.append(f"{self.name} beside")
            again = self.kernel.prepare(grid, block, shared_bytes, params.copy(), cluster, dependent)
            self.runtime.aside.append(again)
            return
        self.runtime.launched.append(self.name)
        self.runtime.structs.append(params)
        if self.runtime.graph is None:
            self.kernel.launch(grid, block, shared_bytes, params, cluster, dependent)
            return
        again = self.kernel.prepare(grid, block, shared_bytes, params.copy(), cluster, dependent)
        self.runtime.graph.launches.append((self.name, again))


class RecordingRuntime:
    """A runtime that can record.

    launched : names of the kernels launched since it was cleared, recorded ones among them, "waited" where a stream waits for
    those that run beside it; structs : their parameters, the arrays themselves; looked_up : names of the kernels that were asked
    for. What is launched beside the stream runs at once, or, ``late``, when it is waited for, if ever.
    """

    def __init__(self, inner: Runtime) -> None:
        self.inner = inner
        self.name, self.multiprocessors, self.max_shared_bytes = inner.name, MULTIPROCESSORS, SHARED_BYTES
        self.capability = inner.capability
        self.launched: list[str] = []
        self.structs: list[np.ndarray[Any, Any]] = []
        self.looked_up: list[str] = []
        self.graph: Graph | None = None
        self.aside: list[Callable[[], None]] | None = None
        self.late = True

    @contextmanager
    def beside(self, *memory: torch.Tensor) -> Iterator[Callable[[], None]]:
        assert self.graph is None and self.aside is None
        launches: list[Callable[[], None]] = []
        self.aside = launches

        def run() -> None:
            while launches:
                launches.pop(0)()

        def wait() -> None:
            self.launched.append("waited")
            run()

        try:
            yield wait
        finally:
            self.aside = None
        if not self.late:
            run()

    @property
    def capturing(self) -> bool:
        return self.graph is not None

    def kernel(self, file: str, name: str, macros: Mapping[str, int]) -> Kernel:
        self.looked_up.append(name)
        return RecordingKernel(self, name, self.inner.kernel(file, name, macros))

    def clear(self) -> None:
        for record in (self.launched, self.structs, self.looked_up):
            record.clear()

    @contextmanager
    def capture(self, whole: bool = False) -> Iterator[Graph]:
        """whole : with torch's operators."""
        self.graph = graph = WholeGraph() if whole else Graph()
        try:
            with graph:
                yield graph
        finally:
            self.graph = None


def register(name: str = "cuda-emu", **schedule: Any) -> RecordingRuntime:
    """Make ``backend=name`` mean the CUDA backend on a new emulated device, which is returned."""
    runtime = RecordingRuntime(EmulatedRuntime(**schedule))
    backend = CudaBackend(torch.device("cpu"), runtime, SMALL)
    register_backend(name, lambda device: backend)
    return runtime
