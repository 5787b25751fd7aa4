"""A change happens whole or not at all: without memory at any of its allocations, and with Ctrl-C at any of its lines."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from default_dtype import LIBRARY, in_library
from helpers import random_router, small_index, tokens
from profiles import examples
from torch.overrides import TorchFunctionMode

from saap_index import AsymmetricIndex, KeyQuantizer, Rope, StateError, TrainingConfig, TwoTower
from saap_index.backends import Backend
from saap_index.whole import signals_wait

KEYS, VALUES = tokens(2, 2, 120, 32, seed=1), tokens(2, 2, 120, 32, seed=2)


@pytest.fixture(autouse=True)
def _interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the suite was started by a shell that ignores it for its jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def plain(backend: str) -> AsymmetricIndex:
    """Ragged, with segments, means, removed tokens and room for a few more."""
    index = small_index(backend=backend, mean_run_tokens=1, rope=Rope(32), selectivity=0.3)
    index.reserve_memory(112, batch=2)
    index.add(KEYS[:, :, :101], VALUES[:, :, :101], lengths=[101, 70])
    index.remove_ids([[7, 8, 50], [3]])
    return index


def preassigned(backend: str) -> AsymmetricIndex:
    index = plain(backend)
    index.add_preassigned(KEYS[:, :, :5], VALUES[:, :, :5], torch.ones((2, 2, 5), dtype=torch.int64))
    return index


def waiting(backend: str) -> AsymmetricIndex:
    """With tokens that are not sealed yet."""
    index = plain(backend)
    index.add(KEYS[:, :, :30], VALUES[:, :, :30], seal=False)
    return index


def with_tower(backend: str) -> AsymmetricIndex:
    index = small_index(backend=backend, rope=Rope(32))
    index.tower = TwoTower.symmetric(2, 32)
    return index


def add(n: int, **options: Any) -> Callable[[AsymmetricIndex], Any]:
    return lambda x: x.add(KEYS[:, :, :n], VALUES[:, :, :n], **options)


Change = Callable[[AsymmetricIndex], Any]
CHANGES: dict[str, tuple[Callable[[str], AsymmetricIndex], Change]] = {
    "a step that seals": (plain, add(1)),
    "some tokens": (plain, add(9, lengths=[9, 2])),
    "more than there is room for": (plain, add(60)),
    "without sealing": (plain, add(60, seal=False)),
    "sealed later": (waiting, lambda x: x.seal()),
    "list numbers given": (plain, lambda x: x.add_preassigned(KEYS[:, :, :9], VALUES[:, :, :9], torch.ones((2, 2, 9)).int())),
    "after list numbers": (preassigned, add(20)),
    "truncate": (plain, lambda x: x.truncate([50, 69])),
    "remove": (plain, lambda x: x.remove_ids([[0, 20, 21, 98], [60]])),
    "remove and close up": (preassigned, lambda x: x.remove_ids([[5, 20, 30], [1, 2]], close_gaps=True)),
    "truncate, some wait": (waiting, lambda x: x.truncate([118, 92])),
    "remove, some wait": (waiting, lambda x: x.remove_ids([[0, 20, 100], [60]])),
    "reorder": (plain, lambda x: x.reorder([1, 1])),
    "window": (plain, lambda x: setattr(x, "window", 30)),
    "sinks": (preassigned, lambda x: setattr(x, "sinks", 0)),
    "means": (plain, lambda x: setattr(x, "mean_run_tokens", 3)),
    "reset": (plain, lambda x: x.reset()),
    "reserve": (plain, lambda x: x.reserve_memory(300)),
    "reclaim": (plain, lambda x: x.reclaim_memory()),
    "router": (plain, lambda x: setattr(x, "query_router", random_router(2, 4, 32, seed=9))),
    "lists of the prompt": (with_tower, add(90)),
    "quantizer": (with_tower, lambda x: setattr(x, "key_quantizer", KeyQuantizer(KEYS[0, :, :4].contiguous()))),
}


def state(index: AsymmetricIndex) -> list[Any]:
    """All that a user can see of an index, in bits."""
    found: list[Any] = [index.lengths, index.layout, index.options.params, index.calibration]
    for part in (index.key_quantizer, index.query_router, index.tower):
        found += [] if part is None else ([part.centroids] if isinstance(part, KeyQuantizer) else list(part.tensors().values()))
    if index.lengths:
        lists = index.invlists
        assert lists.layout is index.layout
        found += [list(lists.segments), [x.array().tolist() for x in lists.gaps], lists.pending is None]
        for i, n in enumerate(lists.lengths):
            count, sinks, sealed = lists.num_means(i), lists.sinks(i), lists.sealed(i)
            found += [lists.keys[i, :, :n], lists.values[i, :, :n], lists.row_ids(i)]
            found += [lists.tables[i, :, : len(lists.segments[i])]]
            found += [lists.mean_keys[i, :, :count], lists.mean_values[i, :, :count]]
            found += [] if lists.pending is None else [lists.pending[i, :, :sinks], lists.pending[i, :, sealed:n]]
        found.append(lists._common)
        found += index.search_attend(tokens(len(index.lengths), 4, 1, 32, seed=5), return_lse=True)
    return [x.clone() if isinstance(x, torch.Tensor) else np.array(x) if isinstance(x, np.ndarray) else x for x in found]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y
        for x, y in zip(a, b, strict=True)
    )


def usable(index: AsymmetricIndex, change: Change, before: list[Any], after: list[Any]) -> None:
    """It is as before or after the change, and from there on goes as if nothing had been."""
    found = state(index)
    assert same(found, before) or same(found, after), "half a change"
    if same(found, before):
        change(index)
        assert same(state(index), after)


WRITES = {"__get__", "__set__", "__setitem__", "copy_", "fill_", "zero_"}


class OutOfMemory(TorchFunctionMode):
    """The call of torch number ``at`` that the library makes, of those that may need memory, finds none."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in WRITES and in_library():
            self.calls += 1
            if self.calls == self.at:
                raise MemoryError("none left")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("name", CHANGES)
def test_without_memory(name: str, backend: str) -> None:
    check_without_memory(name, backend, max(1, {"cpu": 37, "torch": 151, "reference": 199}[backend] * 100 // examples(100)))


def check_without_memory(name: str, backend: str, step: int) -> None:
    """The calls of torch fail one after the other, each ``step``-th of them."""
    make, change = CHANGES[name]
    index = make(backend)
    before = state(index)
    with OutOfMemory(0) as count:
        change(index)
    after = state(index)
    failed = 0
    for at in range(1 + (count.calls - 1) % step, count.calls + 1, step):
        index = make(backend)
        try:
            with OutOfMemory(at):
                change(index)
        except MemoryError:
            failed += 1
        usable(index, change, before, after)
    assert failed or name == "reset"


@pytest.mark.parametrize("what", ["assign", "seal", "means", "append", "empty"])
@pytest.mark.parametrize("name", CHANGES)
def test_an_operation_of_the_backend_fails(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time it is called once, at the first, second, ... call."""
    make, change = CHANGES[name]
    index = make("cpu")
    before = state(index)
    change(index)
    after = state(index)
    for at in range(1, 6):
        index, calls = make("cpu"), 0
        operation = getattr(type(index._backend), what)

        def failing(self: Backend, *args: Any, operation: Any = operation, at: int = at) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise RuntimeError("failed")
            return operation(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(type(index._backend), what, failing)
            if calls_fail := _fails(index, change):
                assert calls >= at
        usable(index, change, before, after)
        if not calls_fail:
            break


def _fails(index: AsymmetricIndex, change: Change) -> bool:
    try:
        change(index)
    except RuntimeError as error:
        assert str(error) == "failed"
        return True
    return False


class CtrlC:
    """A real signal at the library's line number ``at``."""

    def __init__(self, at: int) -> None:
        self.at, self.lines = at, 0

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(LIBRARY):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                signal.raise_signal(signal.SIGINT)
        return self

    def run(self, change: Change, index: AsymmetricIndex) -> bool:
        """Whether the change was interrupted."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            change(index)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", CHANGES)
def test_interrupted(name: str, backend: str) -> None:
    make, change = CHANGES[name]
    index = make(backend)
    before = state(index)
    count = CtrlC(0)
    assert not count.run(change, index)
    after = state(index)
    for at in np.unique(np.linspace(1, count.lines, 10 if backend == "cpu" else 4).astype(int)):
        index = make(backend)
        assert CtrlC(int(at)).run(change, index), "the user is told"
        usable(index, change, before, after)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_is_replaced_whole() -> None:
    def change(index: AsymmetricIndex) -> None:
        index.train(KEYS, tokens(2, 4, 40, 32, seed=4), config=TrainingConfig(epochs=1, hidden=8))

    index = small_index()
    before = state(index)
    with OutOfMemory(0) as count:
        change(index)
    after = state(index)
    for at in range(count.calls - 30, count.calls + 1, 5):
        index = small_index()
        try:
            with OutOfMemory(at):
                change(index)
        except MemoryError:
            pass
        found = state(index)
        assert same(found, before) or same(found, after)


def test_what_cannot_be_taken_back_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    index = plain("cpu")

    def failing(*args: Any) -> None:
        raise MemoryError("none left")

    def change(index: AsymmetricIndex) -> None:
        with index.invlists.whole():
            index.window = 30
            monkeypatch.setattr(type(index._backend), "seal", failing)
            raise MemoryError("none left")

    with pytest.raises(StateError, match="tokens are gone"):
        change(index)
    monkeypatch.undo()
    assert index.lengths == [0, 0]
    index.add(KEYS, VALUES)
    assert index.search_attend(tokens(2, 4, 1, 32)).isfinite().all()


def test_signals_wait_their_turn() -> None:
    came: list[int] = []
    kept = {n: signal.signal(n, lambda number, frame: came.append(number)) for n in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        with signals_wait():
            with signals_wait():
                signal.raise_signal(signal.SIGUSR1)
                signal.raise_signal(signal.SIGTERM)
            assert not came
        assert sorted(came) == sorted([signal.SIGUSR1, signal.SIGTERM])
        with pytest.raises(KeyboardInterrupt), signals_wait():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGUSR1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(ValueError, match="kept"), signals_wait():
            raise ValueError("kept")
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def test_in_another_thread_there_is_nothing_to_wait_for() -> None:
    index = plain("cpu")
    thread = threading.Thread(target=index.truncate, args=([50, 60],))
    thread.start()
    thread.join()
    assert index.lengths == [50, 60]


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_fewer_sinks_after_given_list_numbers(backend: str) -> None:
    """The lists of the old sinks come from the quantizer, not from memory that nobody wrote."""
    index = small_index(backend=backend, rope=Rope(32), sinks=4)
    index.add(KEYS[:, :, :60], VALUES[:, :, :60])
    index.add_preassigned(KEYS[:, :, 60:61], VALUES[:, :, 60:61], torch.zeros((2, 2, 1), dtype=torch.int64))
    assert bool((index.invlists.pending[:, :, :4] == -1).all())
    index.sinks = 0
    fresh = small_index(backend=backend, rope=Rope(32), sinks=0)
    fresh.add(KEYS[:, :, :60], VALUES[:, :, :60])
    fresh.add_preassigned(KEYS[:, :, 60:61], VALUES[:, :, 60:61], torch.zeros((2, 2, 1), dtype=torch.int64))
    assert same(state(index), state(fresh))
