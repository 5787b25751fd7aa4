"""Steps of the CUDA backend in graphs: replays equal eager steps, and what cannot be captured says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gpu_places import BF16, F32, PLACES, RUNTIME, Place, captured_step, check, emulated_place
from helpers import assert_close, random_router, small_index
from test_stateful import same_state
from torch import Tensor

from saap_index import AsymmetricIndex, LengthError, NotFiniteError, Rope, SearchParametersIVF, StateError, TwoTower


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    return Place(request.param)


@pytest.fixture
def emu() -> Iterator[Place]:
    yield from emulated_place()


# -- graphs ---------------------------------------------------------------------------------------------------------------


def test_replays_equal_eager_steps(place: Place) -> None:
    """One capture, hundreds of replays, seals and merges in between: the state is the eager one bit for bit."""
    options = {"dtype": BF16, "rope": Rope(head_dim=32, theta=100.0), "selectivity": 0.2}
    eager, graph = (place.index(32, 32, 4, 4, 2, **options) for _ in range(2))
    total, first = 260, 12  # nothing is sealed at first
    keys, values = place.tokens(2, 2, total, 32, BF16, seed=1), place.tokens(2, 2, total, 32, BF16, seed=2)
    queries = place.tokens(total, 4, 2, 32, BF16, seed=3).transpose(1, 2).reshape(total, 2, 4, 1, 32)
    for index in (eager, graph):
        index.reserve_memory(total, batch=2)
        index.add(keys[:, :, :first], values[:, :, :first])
    replay, k, v, x, out = captured_step(place, graph)
    assert graph.lengths == [first] * 2, "nothing was appended by the capture"
    r = np.random.default_rng(0)
    waiting = 0
    for t in range(first, total):
        for held, new in ((k, keys[:, :, t : t + 1]), (v, values[:, :, t : t + 1]), (x, queries[t])):
            held.copy_(new)
        replay()
        waiting += 1
        eager.add(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        seen = [[x.invlists.arrangement(i) for i in range(2)] for x in (eager, graph)]
        late = seen[0] != seen[1]  # the replay read as recent what the eager step has sealed
        if not late and t % 3 == 0:
            assert_close(out.float().cpu(), eager.search_attend(queries[t]).double().cpu().numpy(), BF16, 2.0)
        if r.random() < 0.4 or t == total - 1:
            graph.advance(None if r.random() < 0.3 else waiting)
            waiting = 0
            assert graph.lengths == eager.lengths
            assert graph.invlists.segments == eager.invlists.segments
            if t % 5 == 0:
                same_state(graph, eager)
    same_state(graph, eager)
    assert len(graph.invlists.segments[0]) > 4
    fresh = queries[0].contiguous()
    out, lse = graph.search_attend(fresh, return_lse=True)
    assert torch.equal(out, eager.search_attend(fresh))
    check(graph, fresh, out, lse, graph.select(fresh), 2)


def test_replays_before_advance_read_all_that_is_not_sealed(place: Place) -> None:
    index = place.index(64, 64, 4, 4, 2, dtype=BF16, selectivity=0.2)
    index.reserve_memory(160, batch=1)
    index.add(place.tokens(1, 2, 60, 64, BF16), place.tokens(1, 2, 60, 64, BF16))
    replay, k, v, x, out = captured_step(place, index)
    for t in range(30):
        k.copy_(place.tokens(1, 2, 1, 64, BF16, seed=t)), v.copy_(place.tokens(1, 2, 1, 64, BF16, seed=t + 50))
        x.copy_(place.tokens(1, 4, 1, 64, BF16, seed=t + 99))
        replay()
    last = out.clone()
    index.advance()
    assert index.lengths == [90]
    # what the replay read: its segments were those of 60 tokens
    late = place.index(64, 64, 4, 4, 2, dtype=BF16, selectivity=0.2)
    late.add(place.tokens(1, 2, 60, 64, BF16), place.tokens(1, 2, 60, 64, BF16))
    for t in range(30):
        late.add(place.tokens(1, 2, 1, 64, BF16, seed=t), place.tokens(1, 2, 1, 64, BF16, seed=t + 50), seal=False)
    assert_close(last.float().cpu(), late.search_attend(x).double().cpu().numpy(), BF16, 2.0)


def test_truncation_between_replays(place: Place) -> None:
    """Speculative decoding: four tokens a step, some of which are taken back."""
    index, plain = (place.index(32, 32, 4, 4, 2, dtype=BF16, selectivity=0.3) for _ in range(2))
    index.reserve_memory(200, batch=1)
    for x in (index, plain):
        x.add(place.tokens(1, 2, 40, 32, BF16), place.tokens(1, 2, 40, 32, BF16))
    replay, k, v, queries, out = captured_step(place, index, n=4, q=4)
    for t in range(12):
        fresh = [place.tokens(1, heads, 4, 32, BF16, seed=10 * t + i) for i, heads in enumerate((2, 2, 4))]
        for held, new in zip((k, v, queries), fresh, strict=True):
            held.copy_(new)
        replay()
        plain.add(fresh[0], fresh[1], seal=False)
        assert_close(out.float().cpu(), plain.search_attend(fresh[2]).double().cpu().numpy(), BF16, 2.0)
        index.advance(4)
        plain.seal()
        keep = index.lengths[0] - t % 4
        for x in (index, plain):
            x.truncate(keep)
    same_state(index, plain)


def test_parameters_of_a_captured_step_follow_the_layout(place: Place) -> None:
    """Two graphs with budgets of their own on one index; both keep their share of what is sealed as the index grows."""
    index = place.index(32, 32, 4, 4, 2, dtype=BF16)
    index.reserve_memory(300, batch=1)
    index.add(place.tokens(1, 2, 20, 32, BF16), place.tokens(1, 2, 20, 32, BF16))
    x = place.tokens(1, 4, 1, 32, BF16)
    graphs = []
    for share in (0.1, 0.5):
        params = SearchParametersIVF(selectivity=share)
        index.search_attend(x, params=params)
        kept: list[Tensor] = []
        replay = place.capture(lambda p=params, kept=kept: kept.append(index.search_attend(x, params=p)))
        graphs.append((params, replay, kept))
    for _ in range(5):
        index.add(place.tokens(1, 2, 50, 32, BF16), place.tokens(1, 2, 50, 32, BF16))
        for params, replay, kept in graphs:
            replay()
            assert torch.equal(kept[0], index.search_attend(x, params=params))
    assert len(index.invlists.segments[0]) > 3


REFUSED: dict[str, Callable[[AsymmetricIndex, Place], Any]] = {
    "other queries": lambda index, p: index.search_attend(p.tokens(1, 4, 3, 32, BF16)),
    "other dtype": lambda index, p: index.search_attend(p.tokens(1, 4, 1, 32, F32)),
    "other parameters": lambda index, p: index.search_attend(p.tokens(1, 4, 1, 32, BF16), params=SearchParametersIVF(nprobe=3)),
    "larger window": lambda index, p: index.search_attend(
        p.tokens(1, 4, 1, 32, BF16), params=SearchParametersIVF(selectivity=0.1, window=30)
    ),
    "select": lambda index, p: index.select(p.tokens(1, 4, 1, 32, BF16)),
    "coarse queries": lambda index, p: index.search_attend(
        p.tokens(1, 4, 1, 32, BF16), coarse_queries=p.tokens(1, 4, 1, 32, BF16)
    ),
    "coarse keys": lambda index, p: index.add(
        *(p.tokens(1, 2, 1, 32, BF16) for _ in range(2)), coarse_keys=p.tokens(1, 2, 1, 32, BF16)
    ),
    "lengths": lambda index, p: index.add(*(p.tokens(1, 2, 2, 32, BF16) for _ in range(2)), lengths=[1]),
    "bulk": lambda index, p: index.add(*(p.tokens(1, 2, 9, 32, BF16) for _ in range(2))),
    "preassigned": lambda index, p: index.add_preassigned(
        *(p.tokens(1, 2, 1, 32, BF16) for _ in range(2)), torch.zeros((1, 2, 1), dtype=torch.int32, device=p.device)
    ),
    "preassigned search": lambda index, p: index.search_attend_preassigned(
        p.tokens(1, 4, 1, 32, BF16), torch.zeros((1, 2, 1), dtype=torch.int32, device=p.device)
    ),
    "truncate": lambda index, p: index.truncate(30),
    "remove": lambda index, p: index.remove_ids([3]),
    "reset": lambda index, p: index.reset(),
    "window": lambda index, p: setattr(index, "window", 5),
    "fork": lambda index, p: index.fork(),
    "reorder": lambda index, p: index.reorder([0]),
    "reserve": lambda index, p: index.reserve_memory(500),
    "reclaim": lambda index, p: index.reclaim_memory(),
    "stats": lambda index, p: index.stats(),
    "seal": lambda index, p: index.seal(),
    "advance": lambda index, p: index.advance(1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_inside_a_capture(emu: Place, name: str) -> None:
    """By name, before any launch; and the index is as it was."""
    index = emu.index(32, 32, 4, 4, 2, dtype=BF16)
    index.reserve_memory(80, batch=1)
    index.add(emu.tokens(1, 2, 40, 32, BF16), emu.tokens(1, 2, 40, 32, BF16))
    index.search_attend(emu.tokens(1, 4, 1, 32, BF16))
    copy = index.fork()
    with RUNTIME.capture() as graph, pytest.raises(StateError, match=r"capture: expected .+, got "):
        REFUSED[name](index, emu)
    assert graph.launches == []
    same_state(index, copy)
    index.add(emu.tokens(1, 2, 1, 32, BF16), emu.tokens(1, 2, 1, 32, BF16))
    assert index.search_attend(emu.tokens(1, 4, 1, 32, BF16)).isfinite().all()


def test_capture_needs_room_and_a_step_before(emu: Place) -> None:
    new = emu.tokens(1, 2, 1, 32, BF16)
    index = emu.index(32, 32, 4, 4, 2, dtype=BF16)
    index.add(emu.tokens(1, 2, 40, 32, BF16), emu.tokens(1, 2, 40, 32, BF16))
    with RUNTIME.capture() as graph:
        with pytest.raises(StateError, match="ran once before"):
            index.search_attend(emu.tokens(1, 4, 1, 32, BF16))
        with pytest.raises(StateError, match="reserve_memory"):
            index.add(new, new)
    assert graph.launches == []
    dynamic = Rope(head_dim=32, theta=100.0, scaling="dynamic", factor=2.0, original_max_position=32)
    index = emu.index(32, 32, 4, 4, 2, dtype=BF16, rope=dynamic)
    index.reserve_memory(90, batch=1)
    index.add(emu.tokens(1, 2, 40, 32, BF16), emu.tokens(1, 2, 40, 32, BF16))
    index.search_attend(emu.tokens(1, 4, 1, 32, BF16))
    with RUNTIME.capture() as graph:
        for call in (lambda: index.add(new, new), lambda: index.search_attend(emu.tokens(1, 4, 1, 32, BF16))):
            with pytest.raises(StateError, match="angles"):
                call()
    assert graph.launches == []


def test_a_two_tower_router_makes_its_lists_before_a_capture(emu: Place) -> None:
    index = emu.index(32, 32, 4, 4, 2, dtype=BF16, break_even=60)
    index.tower = TwoTower(random_router(2, 32, 32).weights)
    index.reserve_memory(300, batch=1)
    index.add(emu.tokens(1, 2, 40, 32, BF16), emu.tokens(1, 2, 40, 32, BF16))
    queries, new = emu.tokens(1, 4, 1, 32, BF16), emu.tokens(1, 2, 1, 32, BF16)
    index.search_attend(queries)
    with RUNTIME.capture() as graph:
        for call in (lambda: index.add(new, new), lambda: index.search_attend(queries)):
            with pytest.raises(StateError, match=r"capture: .* two-tower"):
                call()
    assert graph.launches == []
    index.add(emu.tokens(1, 2, 40, 32, BF16), emu.tokens(1, 2, 40, 32, BF16))
    replay, k, v, *_ = captured_step(emu, index)
    for t in range(9):
        k.copy_(emu.tokens(1, 2, 1, 32, BF16, seed=t)), v.copy_(emu.tokens(1, 2, 1, 32, BF16, seed=t))
        replay()
    index.advance()
    assert index.lengths == [89]
    index.truncate(30)
    with pytest.raises(StateError, match="tower: expected the lists that a CUDA graph routes to"):
        index.add(emu.tokens(1, 2, 40, 32, BF16), emu.tokens(1, 2, 40, 32, BF16))
    assert index.lengths == [30]


def test_growth_after_a_capture(emu: Place) -> None:
    """A graph holds addresses: memory moves only where the caller says so, and then graphs are made anew."""
    index = emu.index(32, 32, 4, 4, 2, dtype=BF16)
    index.reserve_memory(64, batch=1)
    index.add(emu.tokens(1, 2, 40, 32, BF16), emu.tokens(1, 2, 40, 32, BF16))
    captured_step(emu, index)
    with pytest.raises(StateError, match="reserve_memory and capture again"):
        index.add(emu.tokens(1, 2, 40, 32, BF16), emu.tokens(1, 2, 40, 32, BF16))
    assert index.lengths == [40]
    index.reserve_memory(200)
    index.add(emu.tokens(1, 2, 40, 32, BF16), emu.tokens(1, 2, 40, 32, BF16))
    replay, *_kept = captured_step(emu, index)  # kept alive: a graph holds their addresses
    replay()
    index.advance()
    assert index.lengths == [81]


# -- advance --------------------------------------------------------------------------------------------------------------


KINDS: dict[str, SearchParametersIVF] = {
    "one launch": SearchParametersIVF(selectivity=0.5),
    "two launches": SearchParametersIVF(nprobe=3),
    "dense": SearchParametersIVF(selectivity=1.0),
}


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("name", KINDS)
def test_wrong_tickets_last_until_the_next_token(place: Place, name: str, in_graph: bool) -> None:
    """What two scans at once leave behind: the search that meets it ends, and from the next step on all is right."""
    params = KINDS[name]
    index, healthy = (place.index(32, 32, 4, 4, 1, dtype=BF16) for _ in range(2))
    for x in (index, healthy):
        x.reserve_memory(760, batch=1)  # enough for two blocks, which share tickets
        x.add(place.tokens(1, 1, 720, 32, BF16), place.tokens(1, 1, 720, 32, BF16, seed=1))
    replay, k, v, queries, out = captured_step(place, index, params=params)
    state = index._session_of(index.invlists).backend_session._numbers
    assert state.tickets.numel(), "one for each KV head and pass"
    for t in range(6):
        new = [place.tokens(1, heads, 1, 32, BF16, seed=10 * t + i) for i, heads in enumerate((1, 1, 4))]
        for held, x in zip((k, v, queries), new, strict=True):
            held.copy_(x)
        healthy.add(k, v, seal=False)
        want = healthy.search_attend(queries, params=params)
        state.tickets.fill_((-1, 1, 2, 7)[t % 4])
        if in_graph:
            replay()
        else:
            index.add(k, v, seal=False)
        got = out if in_graph else index.search_attend(queries, params=params)
        assert torch.equal(got, want) and not state.tickets.any()
        if in_graph:
            index.advance(1)
        index.seal(), healthy.seal()
        state.tickets.fill_((1, -1, 3)[t % 3])
        index.search_attend(queries, params=params)
        assert state.tickets.any() == (name != "one launch"), "a wrong start would stay wrong; route_select writes zeros too"
        if t % 4 == 3:  # what the host publishes is as good
            state.tickets.fill_(1)
            index.truncate(index.lengths[0] - 1), healthy.truncate(healthy.lengths[0] - 1)
            assert torch.equal(*(x.search_attend(queries, params=params) for x in (index, healthy)))


def grown(place: Place, capacity: int = 120) -> AsymmetricIndex:
    index = place.index(32, 32, 4, 4, 2, dtype=BF16)
    index.reserve_memory(capacity, batch=2)
    index.add(place.tokens(2, 2, 40, 32, BF16), place.tokens(2, 2, 40, 32, BF16))
    return index


def test_what_was_not_finite_is_reported_later(place: Place) -> None:
    index = grown(place)
    new = place.tokens(2, 2, 1, 32, BF16)
    bad = new.clone()
    bad[1, 0, 0, 7] = torch.nan
    index.add(new, bad)
    assert index.lengths == [41, 41]
    with pytest.raises(NotFiniteError, match=r"values: expected finite"):
        index.stats()
    index.stats()  # said once
    index.truncate(40)
    index.add(new, new)
    index.advance()
    bulk = place.tokens(2, 2, 20, 32, BF16)
    bulk[0, 0, 3, 3] = torch.inf
    with pytest.raises(NotFiniteError):
        index.add(bulk, bulk)
    assert index.lengths == [41, 41], "what comes in bulk is looked at before"
    index.add(bad, new)  # seals, and does not wait for the device
    before = [index.invlists.arrangement(i) for i in range(2)]
    with pytest.raises(NotFiniteError):
        while True:  # the next that seals knows what was noted by then
            index.add(new, new)
            assert index.lengths[0] < 80
    assert [index.invlists.arrangement(i) for i in range(2)] != before
    assert index.lengths[0] > 42, "the tokens are there"
    index.add(bad, new)
    index.reset()  # forgets the tokens, and what there was to say of them
    index.add(new, new)


def test_advance_reports(place: Place) -> None:
    index = grown(place, 44)
    replay, k, v, _, _ = captured_step(place, index)
    k.copy_(place.tokens(2, 2, 1, 32, BF16)), v.copy_(place.tokens(2, 2, 1, 32, BF16, seed=1))
    for _ in range(3):
        replay()
    with pytest.raises(StateError, match=r"lengths: expected \[40, 40\] on the device, got \[43, 43\]; call advance"):
        index.truncate(10)
    with pytest.raises(LengthError, match=r"n: expected"):
        index.advance(-1)
    with pytest.raises(StateError, match=r"advance: expected at most"):
        index.advance(9)
    assert index.lengths == [40, 40]
    index.advance([3, 3])
    assert index.lengths == [43, 43]
    for _ in range(3):
        replay()
    with pytest.raises(StateError, match="full arena"):
        index.advance()
    assert index.lengths == [44, 44]
    assert torch.equal(index.invlists.row_ids(0).sort(1).values.cpu(), torch.arange(44, dtype=torch.int32).expand(2, -1))
    index.advance(0)
    k[0, 0, 0, 0] = torch.inf
    index.truncate(20)
    replay()
    with pytest.raises(NotFiniteError):
        index.advance()
    assert index.lengths == [21, 21]
    index.advance()


def test_advance_with_other_counts_than_the_device(place: Place) -> None:
    index = grown(place)
    replay, *_kept = captured_step(place, index)  # kept alive: a graph holds their addresses
    for _ in range(10):
        replay()
    index.advance(9)  # seals, and does not wait for the device
    with pytest.raises(StateError, match=r"expected \[49, 49\] on the device, got \[50, 50\]"):
        index.stats()
    index.advance()
    assert index.lengths == [50, 50]
    for _ in range(20):
        replay()
    index.advance(10)
    with pytest.raises(StateError, match="on the device, got"):
        for _ in range(20):
            index.advance(0)
            index.add(*(place.tokens(2, 2, 1, 32, BF16) for _ in range(2)))  # one that seals sees what was noted at the last
    index.advance()
    assert index.lengths[0] == index.lengths[1] > 70
    index.add(place.tokens(2, 2, 30, 32, BF16), place.tokens(2, 2, 30, 32, BF16))


def test_advance_is_for_devices() -> None:
    index = small_index()
    with pytest.raises(StateError, match=r"advance: expected an index whose state lies on its device, got backend 'cpu'"):
        index.advance()
