"""The random walk of test_stateful.py on the CUDA backend, with steps in graphs among its rules."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_places import BF16, F32, Place, emulation, gpu
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test
from test_stateful import Walk
from torch import Tensor

from saap_index import AsymmetricIndex, CompatibilityError, SaapError, read_index, write_index
from saap_index.invlists.layout import Arrangement
from saap_index.invlists.segmented import SegmentedInvertedLists


class Ferry:
    """An index, or a part of one, on another device, as the walk knows it: what goes in and what comes out lies on the host."""

    def __init__(self, inner: Any) -> None:
        object.__setattr__(self, "inner", inner)

    def __getattr__(self, name: str) -> Any:
        return self._out(getattr(self.inner, name))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    def _out(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.cpu()
        if isinstance(x, Arrangement):
            return x
        if isinstance(x, list | tuple):
            return type(x)(self._out(y) for y in x)
        if isinstance(x, AsymmetricIndex | SegmentedInvertedLists):
            return Ferry(x)
        return (lambda *args, **options: self._call(x, args, options)) if inspect.ismethod(x) else x

    def _call(self, method: Callable[..., Any], args: Any, options: dict[str, Any]) -> Any:
        device = self.inner.device if isinstance(self.inner, AsymmetricIndex) else self.inner.keys.device
        args = [x.to(device) if isinstance(x, Tensor) else x for x in args]
        options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
        return self._out(method(*args, **options))


class DeviceWalk(Walk):
    """`Walk` in few configurations, for each is a build; and steps in a graph."""

    backend = "torch"
    stored: str | None = None  # the backend of an index that was read back
    place: Place

    @initialize(
        b=st.integers(1, 2), heads=st.sampled_from([(4, 2), (1, 1)]), dtype=st.sampled_from([BF16, F32]),
        rope=st.sampled_from([None, "plain", "dynamic"]), sinks=st.integers(0, 5), window=st.integers(0, 20),
        break_even=st.sampled_from([0, 30]), published=st.sampled_from([False, False, True]), means=st.sampled_from([0, 1, 3]),
        tail=st.sampled_from([0.0, 0.4]), shares=st.sampled_from([None, (0.2, 1.5, 9.0)]),
        target_mass=st.sampled_from([None, None, 0.8]), storage=st.sampled_from([None, "SQ8/SQ4"]),
    )
    def start(self, **options: Any) -> None:
        Walk.start(self, dims=(40, 64), **options)
        self.index = Ferry(self.index.to(self.place.device)) if self.place.real else self.index

    @rule()
    def save_and_load(self) -> None:
        if not self.place.real:
            Walk.save_and_load(self)
            return
        with tempfile.TemporaryDirectory() as folder:
            write_index(self.index.inner, Path(folder) / "index")
            self.index = Ferry(read_index(Path(folder) / "index", self.place.device, backend=self.stored))

    def a_search_reads_what_is_selected_now(self) -> None:
        """Not after every rule: each thread of two more launches would be executed. `decode` and `replay` search too."""

    def refusal(self, params: Any) -> type[SaapError] | None:
        """A device makes room for what a search may read at once: a tail that the router does not fit is refused then."""
        asked = params.over(self.index.options.params) if params else self.index.options.params
        router: Any = self.index.query_router
        early = asked.tail and not asked.nprobe and not router.size_weighted
        return Walk.refusal(self, params) or (CompatibilityError if early else None)

    @precondition(
        lambda self: self.index.lengths
        and self.refusal(None) is None
        and not (self.index.rope is not None and self.index.rope.is_dynamic)
    )
    @rule(steps=st.integers(1, 6), n=st.integers(1, 2), every=st.integers(1, 4))
    def replay(self, steps: int, n: int, every: int) -> None:
        """A step captured once; replayed, with `advance` now and then."""
        index = self.index.inner if self.place.real else self.index
        most = max(index.lengths) + steps * n
        index.reserve_memory(most)
        shapes = (self.b, self.h, n, self.d), (self.b, self.h, n, self.e)
        k, v = (torch.zeros(s, dtype=self.dtype, device=self.place.device) for s in shapes)
        x = torch.zeros((self.b, self.hq, n, self.d), device=self.place.device)
        index.search_attend(x)

        def step() -> None:
            index.add(k, v)
            index.search_attend(x)

        replay = self.place.capture(step)
        for t in range(steps):
            fresh = self.fresh(self.h, n, self.d), self.fresh(self.h, n, self.e)
            k.copy_(fresh[0]), v.copy_(fresh[1])
            replay()
            self.remember(*fresh, [n] * self.b)
            if t % every == every - 1:
                index.advance(n * every)
        index.advance()
        index.reserve_memory(2 * max(most, index.invlists.capacity) + 64)  # the graph is done with, and memory may move again


class EmulatedWalk(DeviceWalk):
    backend, place = "cuda-emu", Place("cuda-emu")


class FerriedWalk(EmulatedWalk):
    """What the walk on a real device has more, tried without one."""

    place, stored = Place("cuda-emu"), "cuda-emu"
    place.real = True

    def __init__(self) -> None:
        super().__init__()
        self.place.capture = Place("cuda-emu").capture  # type: ignore[method-assign]


class CudaWalk(DeviceWalk):
    place = Place("cuda")


@pytest.mark.parametrize("walk, examples", [
    pytest.param(EmulatedWalk, 10, marks=emulation), pytest.param(FerriedWalk, 5, marks=emulation),
    pytest.param(CudaWalk, 30, marks=gpu),
])
def test_walk(walk: type[DeviceWalk], examples: int) -> None:
    run_state_machine_as_test(walk, settings=settings(max_examples=examples, stateful_step_count=20))
