"""Seals that begin on a stream beside the steps: order of launches and events, and a state that is the same with or without."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_places import BF16, RUNTIME, Place, captured_step, emulated_place
from helpers import small_index
from test_stateful import same_state

from saap_index import AsymmetricIndex, Rope
from saap_index.backends.cuda.runtime import CupyRuntime

LAYOUT = {"window": 20, "sinks": 2, "seal_tokens": 8, "max_segment": 128, "mean_run_tokens": 2, "break_even": 0}


@pytest.fixture(params=["late", "at once"])
def emu(request: pytest.FixtureRequest) -> Iterator[Place]:
    """late : what runs beside the stream runs when it is waited for, or never."""
    RUNTIME.late = request.param == "late"
    yield from emulated_place()
    RUNTIME.late = True


def pair(emu: Place, lead: int, n: int, batch: int = 2) -> tuple[AsymmetricIndex, AsymmetricIndex]:
    """An index whose seals begin ``lead`` tokens ahead, and one of the backend that seals at once."""
    options: dict[str, Any] = {"dtype": BF16, "rope": Rope(head_dim=32, theta=100.0), **LAYOUT}
    index, plain = emu.index(32, 32, 4, 4, 2, **options), small_index(32, 32, 4, 4, 2, **options, backend="torch")
    for x in (index, plain):
        x.reserve_memory(300, batch=batch)
    index.invlists._beside.lead = lead
    prompt = emu.tokens(batch, 2, n, 32, BF16, seed=99)
    for x in (index, plain):
        x.add(prompt, prompt, lengths=[n, n - 3][:batch])
    return index, plain


def beside(launched: list[str]) -> list[str]:
    return [x.removesuffix(" beside").removeprefix("saap_") for x in launched if x.endswith(" beside")]


@pytest.mark.parametrize("lead", [1, 5])
def test_a_seal_begins_some_tokens_before_it_is_due(emu: Place, lead: int) -> None:
    index, plain = pair(emu, lead, 40)
    lists, began, seen = index.invlists, None, set()
    for t in range(80):
        before, new = lists.version, emu.tokens(2, 2, 1, 32, BF16, seed=t)
        RUNTIME.clear()
        index.add(new, new)
        plain.add(new, new)
        launched = RUNTIME.launched
        if lists.version != before and began is not None:
            assert launched[:3] == ["saap_append", "waited", "saap_permute"], "rows move back, behind what ran beside"
            seen.add(t - began)
            began = None
        assert beside(launched) in ([], ["rank", "permute"], ["assign", "rank", "permute"])
        began = t if beside(launched) else began
    same_state(index, plain)
    assert max(seen) == lead, "no sooner than it was to begin, and some as soon"


def test_what_was_begun_is_dropped_where_rows_change(emu: Place) -> None:
    index, plain = pair(emu, 5, 60)
    begun = 0
    for t in range(60):
        new = emu.tokens(2, 2, 1, 32, BF16, seed=t)
        RUNTIME.clear()
        for x in (index, plain):
            x.add(new, new)
        if beside(RUNTIME.launched):
            begun += 1
            for x in (index, plain):
                if begun % 3 == 0:
                    x.truncate([n - 13 for n in x.lengths])  # recent tokens alone, or a segment too
                elif begun % 3 == 1:
                    x.remove_ids([x.lengths[0] - 16])
                else:
                    x.reorder([1, 0])
        same_state(index, plain)
    assert begun > 5


def test_beside_replays(emu: Place) -> None:
    """What is due begins between replays, outside of the graph, and the step's stream waits before it is sealed."""
    index, plain = pair(emu, 4, 60, batch=1)
    replay, k, v, _, _ = captured_step(emu, index)
    waited = 0
    for t in range(60):
        new = emu.tokens(1, 2, 1, 32, BF16, seed=t)
        RUNTIME.clear()
        if index.invlists.due_with(1):
            index.seal_ahead(1)
        elif index.invlists.due():
            index.seal()
        waited += "waited" in RUNTIME.launched
        assert "saap_assign" not in RUNTIME.launched or t < 5
        k.copy_(new)
        v.copy_(new)
        replay()
        index.advance(1, seal=False)
        plain.add(new, new)
    same_state(index, plain)
    assert waited > 5


def test_streams_and_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other stream waits for this one, memory is known to it, and whoever waits waits for the event behind its launches."""
    log: list[Any] = []

    class Stream(str):
        def wait_stream(self, other: str) -> None:
            log.append(f"{self} waits for {other}")

        def wait_event(self, event: Event) -> None:
            log.append(f"{self} waits for the event of {event.stream}")

    class Event:
        stream = ""

        def record(self, stream: str) -> None:
            self.stream = stream
            log.append(f"event on {stream}")

    @contextlib.contextmanager
    def entered(stream: str) -> Iterator[None]:
        log.append(f"enter {stream}")
        yield
        log.append(f"leave {stream}")

    current = [Stream("main")]
    for name, fake in {
        "current_stream": lambda device: current[0], "Stream": lambda device: Stream("side"), "Event": Event, "stream": entered
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: log.append(f"memory of {stream}"))
    runtime = CupyRuntime.__new__(CupyRuntime)
    runtime.device, runtime._side = torch.device("cuda", 0), None
    with runtime.beside(torch.zeros(3)) as wait:
        log.append("launch")
    current[0] = Stream("another")
    wait()
    assert log == [
        "side waits for main", "memory of side", "enter side", "launch", "leave side", "event on side",
        "another waits for the event of side",
    ]
