"""The CUDA backend through the index: on the emulated device, and with `-m gpu` the same tests on a real one."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emulated
import numpy as np
import pytest
import test_backends
import test_tail
import torch
from emu.runtime import available
from helpers import assert_close, dense, random_router, small_index, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test
from test_stateful import Walk, same_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saap_index import (
    AsymmetricIndex,
    LengthError,
    NotFiniteError,
    Rope,
    SearchParametersIVF,
    StateError,
    TwoTower,
    read_index,
    write_index,
)
from saap_index.invlists import SegmentedInvertedLists

emulation = pytest.mark.skipif(not available(), reason="needs a C++ compiler")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
RUNTIME = emulated.register()


class Place:
    """Where a test runs."""

    def __init__(self, name: str) -> None:
        self.real = name == "cuda"
        self.device = torch.device("cuda" if self.real else "cpu")
        self.options = {"device": self.device} if self.real else {"backend": "cuda-emu"}

    def index(self, *args: Any, **options: Any) -> AsymmetricIndex:
        return small_index(*args, **{**self.options, **options})

    def tokens(self, *args: Any, **options: Any) -> Tensor:
        return tokens(*args, **options).to(self.device)

    def capture(self, step: Callable[[], Any]) -> Callable[[], None]:
        """``step`` as a graph, and its replay. It must have run before."""
        if not self.real:
            with RUNTIME.capture() as recorded:
                step()
            return recorded.replay
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


@pytest.fixture(params=[pytest.param("cuda-emu", marks=emulation), pytest.param("cuda", marks=gpu)])
def place(request: pytest.FixtureRequest) -> Place:
    return Place(request.param)


@pytest.fixture
def emu() -> Iterator[Place]:
    if not available():
        pytest.skip("needs a C++ compiler")
    RUNTIME.launched.clear()
    yield Place("cuda-emu")


# -- operations -----------------------------------------------------------------------------------------------------------

SEAM = {
    (test_backends, "append"): 30, (test_backends, "seal"): 20, (test_backends, "assign"): 15,
    (test_backends, "assign_breaks_ties_downwards"): 10, (test_tail, "means"): 20,
}  # fmt: skip


@emulation
@pytest.mark.parametrize("of", SEAM, ids=lambda x: x[1])
def test_operation(of: tuple[Any, str]) -> None:
    """The properties of any backend, for those operations that one build of a kernel serves whatever the dims."""
    settings(max_examples=SEAM[of])(getattr(of[0], f"test_{of[1]}"))(name="cuda-emu")


@emulation
@given(case=st.one_of(test_backends.probes(), test_tail.tails()), kind=st.sampled_from(["normal", "equal", "few"]))
@settings(max_examples=60)
def test_probe(case: dict[str, Any], kind: str) -> None:
    b, h, j, nlist, m = case["shape"]
    z, a = (torch.from_numpy(case["r"].normal(size=(b, h, j, x)).astype(np.float32)) for x in (nlist, m))
    if kind != "normal":  # ties: newer segments first, then lower lists
        case["knots"] = case["knots"].round()
        z, a = (x[:, :, :1].expand(-1, -1, j, -1).round() * (kind == "few") for x in (z, a))
        z, a = z.contiguous(), a.contiguous()
    test_backends.check_probe("cuda-emu", case, 2 * z, a)


# -- a step ---------------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Names of the torch operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


FREE = {"view", "_unsafe_view", "detach", "alias", "empty"}
"""What takes no launch: views, and memory for the output."""


def test_launches_of_a_step(emu: Place) -> None:
    index = emu.index(64, 64, 4, 4, 2, dtype=BF16)
    index.reserve_memory(70, batch=2)
    index.add(emu.tokens(2, 2, 60, 64, BF16), emu.tokens(2, 2, 60, 64, BF16))
    new, queries = emu.tokens(2, 2, 1, 64, BF16), emu.tokens(2, 4, 1, 64, BF16)
    full = SearchParametersIVF(selectivity=1.0)
    for _ in range(2):
        index.search_attend(queries)
        index.search_attend(queries, params=full)
    before = len(index.invlists.segments[0])
    steps: dict[str, tuple[Callable[[], Any], list[str]]] = {
        "add": (lambda: index.add(new, new), ["saap_append"]),
        "search": (lambda: index.search_attend(queries), ["saap_route", "saap_select", "saap_scan"]),
        "dense": (lambda: index.search_attend(queries, params=full), ["saap_scan"]),
    }
    for name, (step, launches) in steps.items():
        RUNTIME.launched.clear()
        with Operations() as seen:
            step()
        assert RUNTIME.launched == launches, name
        assert set(seen.names) <= FREE and seen.names.count("empty") == (0 if name == "add" else 2), (name, seen.names)
    assert len(index.invlists.segments[0]) == before, "nothing was sealed meanwhile"


@dataclass(frozen=True)
class Case:
    d: int
    e: int
    heads: int
    kv_heads: int
    dtype: torch.dtype
    query: torch.dtype
    q: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    params: SearchParametersIVF | None = None


CASES = {
    "bf16": Case(64, 64, 4, 2, BF16, BF16),
    "bf16, float32 queries, causal": Case(64, 64, 4, 2, BF16, F32, 4),
    "float32": Case(32, 40, 2, 1, F32, F32, 2),
    "fp16, d != e, rope": Case(40, 64, 3, 1, F16, F16, 1, (("rope", Rope(head_dim=40, theta=100.0, rotary_dim=16)),)),
    "interleaved rope": Case(64, 64, 4, 2, BF16, BF16, 2, (("rope", Rope(head_dim=64, theta=50.0, interleaved=True)),)),
    "tail": Case(64, 64, 4, 2, BF16, BF16, 1, (("mean_run_tokens", 2), ("tail", 0.4), ("selectivity", 0.3))),
    "target mass": Case(64, 64, 4, 2, BF16, BF16, 1, (("target_mass", 0.8),)),
    "nprobe": Case(64, 64, 4, 2, BF16, BF16, 1, (), SearchParametersIVF(nprobe=2)),
    "budget shares": Case(64, 64, 4, 2, BF16, BF16, 1, (("budget_shares", [0.5, 1.5]), ("selectivity", 0.2))),
    "wider window": Case(64, 64, 4, 2, BF16, BF16, 1, (), SearchParametersIVF(selectivity=0.1, window=25, sinks=6)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_search_attend(place: Place, case: Case) -> None:
    """Attention over exactly what the selection says, and the tail's entries; prompts of different lengths, then decoding."""
    options = dict(case.options)
    index = place.index(case.d, case.e, 4, case.heads, case.kv_heads, dtype=case.dtype, **options)
    b, h, q, g = 2, case.kv_heads, case.q, case.heads // case.kv_heads
    stored = [place.tokens(b, h, 90, x, case.dtype, seed=x) for x in (case.d, case.e + 1)]
    stored[1] = stored[1][..., : case.e]  # strided
    index.add(*(x[:, :, :70] for x in stored), lengths=[70, 41])
    assert index.lengths == [70, 41]
    for t in range(70, 76):
        index.add(*(x[:, :, t : t + 1] for x in stored))
        queries = place.tokens(b, case.heads, q, case.d, case.query, seed=t)
        out, lse = index.search_attend(queries, params=case.params, return_lse=True)
        check(index, queries, out, lse, index.select(queries, params=case.params), g)


def check(index: AsymmetricIndex, queries: Tensor, out: Tensor, lse: Tensor, selection: Any, g: int) -> None:
    """Against float64 over the rows that ``selection`` names."""
    lists, q = index.invlists, queries.shape[2]
    for i in range(lists.batch):
        n, low, high = selection.lengths[i], selection.sinks[i], selection.sealed[i]
        for head in range(lists.heads):
            listed = [] if selection.rows is None else selection.rows[i, head].tolist()
            rows = torch.tensor([*range(low), *(r for r in listed if r >= 0), *range(high, n)], dtype=torch.long)
            at = rows.to(lists.keys.device)
            keys, values = (x[i, head].index_select(0, at).cpu() for x in (lists.keys, lists.values))
            hidden = (rows.numpy()[None] >= high) & (rows.numpy()[None] > (n - q + np.arange(q))[:, None])
            weights = np.zeros(len(rows))
            if selection.tail is not None:
                runs = [r for r in selection.tail[i, head].tolist() if r >= 0]
                table = lists.tables[i, head].cpu()
                for r in runs:
                    s, x = divmod(r, lists.nlist)
                    keys = torch.cat([keys, lists.mean_keys[i, head, s, x].cpu()[None]])
                    values = torch.cat([values, lists.mean_values[i, head, s, x].cpu()[None]])
                    weights = np.append(weights, np.log(float(table[s, x + 1] - table[s, x])))
                hidden = np.pad(hidden, ((0, 0), (0, len(runs))))
            part = slice(head * g, head * g + g)
            x = queries[i, part].cpu()
            if weights.any():  # an entry of n tokens is n entries: a further dim carries the logarithm
                keys = torch.cat([keys.double(), torch.from_numpy(weights / index.scale)[:, None]], 1)
                x = torch.cat([x.double(), torch.ones((*x.shape[:2], 1), dtype=torch.float64)], 2)
            want, want_lse = dense(x, keys, values, index.scale, hidden)
            precision = torch.float32 if queries.dtype == F32 else queries.dtype
            noise = 1.0 if index.dtype == F32 else 4.0  # probabilities meet values in the storage type
            assert_close(out[i, part].cpu(), want, precision if noise == 1.0 else index.dtype, float(values.abs().max()))
            assert_close(lse[i, part].cpu(), want_lse, torch.float32, 10.0)


def test_the_state_is_that_of_any_backend(place: Place) -> None:
    """Bit for bit, given the list numbers: prompts sealed at once, single tokens, merges, truncation."""
    ours = place.index(40, 64, 5, 2, 2, dtype=F16, mean_run_tokens=1)
    plain = small_index(40, 64, 5, 2, 2, dtype=F16, mean_run_tokens=1, backend="torch")
    g = torch.Generator().manual_seed(0)
    for n, counts in ((150, [150, 97]), (1, None), (3, None), (40, [0, 40]), (8, None)):
        parts = [tokens(2, 2, n, x, F16, seed=n + x) for x in (40, 64)]
        nos = torch.randint(0, 5, (2, 2, n), generator=g)
        plain.add_preassigned(*parts, nos, lengths=counts)
        ours.add_preassigned(*(x.to(place.device) for x in (*parts, nos)), lengths=counts)
        same_state(ours.to("cpu") if place.real else ours, plain)
    for index in (ours, plain):
        index.truncate([100, 60])
    same_state(ours.to("cpu") if place.real else ours, plain)


def test_selection_of_a_step_is_that_of_select(place: Place) -> None:
    index = place.index(64, 64, 4, 4, 2, dtype=BF16, selectivity=0.2)
    index.add(place.tokens(2, 2, 90, 64, BF16), place.tokens(2, 2, 90, 64, BF16))
    queries = place.tokens(2, 4, 1, 64, BF16)
    index.search_attend(queries)
    ids = index.read_ids(index._last)
    for a, b in zip(ids, index.read_ids(index.select(queries)), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    stats = index.stats().last_search
    assert stats.read_sealed == pytest.approx(0.2 * stats.sealed_tokens, abs=1)


# -- graphs ---------------------------------------------------------------------------------------------------------------


def captured_step(place: Place, index: AsymmetricIndex, n: int = 1, q: int = 1, **search: Any) -> tuple[Any, ...]:
    """A step of n tokens in a graph: its replay, the tensors to fill with keys, values and queries, the output."""
    b, h, hq = len(index.lengths), index.num_kv_heads, index.num_heads
    k, v, x = (torch.zeros(s, dtype=index.dtype, device=place.device) for s in
               ((b, h, n, index.d), (b, h, n, index.d_v), (b, hq, q, index.d)))  # fmt: skip
    index.search_attend(x, **search)  # once before: memory and kernels
    result: list[Any] = []

    def step() -> None:
        index.add(k, v)
        result[:] = [index.search_attend(x, **search)]

    replay = place.capture(step)
    return replay, k, v, x, result[0]


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
        late = eager.invlists.segments != graph.invlists.segments  # the replay read as recent what the eager step has sealed
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
    replay, *_ = captured_step(emu, index)
    replay()
    index.advance()
    assert index.lengths == [81]


# -- advance --------------------------------------------------------------------------------------------------------------


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
    with pytest.raises(NotFiniteError):
        index.add(bad, new)  # seals, and so waits for the device
    assert index.lengths == [42, 42]
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
    replay, *_ = captured_step(place, index)
    for _ in range(10):
        replay()
    with pytest.raises(StateError, match="on the device, got"):
        index.advance(9)  # seals, and so sees
    index.advance()
    assert index.lengths == [50, 50]
    index.add(place.tokens(2, 2, 30, 32, BF16), place.tokens(2, 2, 30, 32, BF16))


def test_advance_is_for_devices() -> None:
    index = small_index()
    with pytest.raises(StateError, match=r"advance: expected an index whose state lies on its device, got backend 'cpu'"):
        index.advance()


# -- beside one another -----------------------------------------------------------------------------------------------------


def test_two_indexes_interleaved(place: Place) -> None:
    a, b = (place.index(32, 32, 4, 4, 2, dtype=BF16, seed=i, selectivity=0.3) for i in range(2))
    alone = [place.index(32, 32, 4, 4, 2, dtype=BF16, seed=i, selectivity=0.3) for i in range(2)]
    for index, seed in ((a, 0), (b, 1), (alone[0], 0), (alone[1], 1)):
        index.add(place.tokens(1, 2, 50, 32, BF16, seed=seed), place.tokens(1, 2, 50, 32, BF16, seed=seed + 5))
    outputs: list[list[Tensor]] = [[], [], [], []]
    for t in range(8):
        fresh = [[place.tokens(1, h, 1, 32, BF16, seed=20 * t + i + 7 * h) for h in (2, 4)] for i in range(2)]
        for i, index in enumerate((a, b)):
            index.add(fresh[i][0], fresh[i][0])
        for i, index in enumerate((a, b)):
            outputs[i].append(index.search_attend(fresh[i][1]))
        for i, index in enumerate(alone):
            index.add(fresh[i][0], fresh[i][0])
            outputs[2 + i].append(index.search_attend(fresh[i][1]))
    for i in range(2):
        assert all(torch.equal(x, y) for x, y in zip(outputs[i], outputs[2 + i], strict=True))


@pytest.mark.parametrize("name", [pytest.param("cuda", marks=gpu)])
def test_two_streams(name: str) -> None:
    """Two indexes on a stream each, and one index from both: the same bits as on one stream."""
    place = Place(name)
    streams = [torch.cuda.Stream() for _ in range(2)]
    a, b, c, d = (place.index(64, 64, 4, 4, 2, dtype=BF16, seed=1, selectivity=0.3) for _ in range(4))
    for index in (a, b, c, d):
        index.add(place.tokens(1, 2, 200, 64, BF16, seed=1), place.tokens(1, 2, 200, 64, BF16, seed=2))
    torch.cuda.synchronize()
    fresh = [(place.tokens(1, 2, 1, 64, BF16, seed=t), place.tokens(1, 4, 1, 64, BF16, seed=t + 99)) for t in range(64)]
    torch.cuda.synchronize()
    outputs: list[list[Tensor]] = [[], [], [], []]
    for t, (new, queries) in enumerate(fresh):
        for i, index in enumerate((a, b)):
            with torch.cuda.stream(streams[i]):
                index.add(new, new)
                outputs[i].append(index.search_attend(queries))
        with torch.cuda.stream(streams[t % 2]):
            c.add(new, new)
        with torch.cuda.stream(streams[(t + 1) % 2]):
            outputs[2].append(c.search_attend(queries))
        d.add(new, new)
        outputs[3].append(d.search_attend(queries))
    torch.cuda.synchronize()
    for found in outputs[:3]:
        assert all(torch.equal(x, y) for x, y in zip(found, outputs[3], strict=True))


# -- torch.compile ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda-emu", marks=emulation), pytest.param("cuda", marks=gpu)])
def test_compiled(where: str, compiler: str) -> None:
    """A whole step of two interleaved indexes, in one graph without a break, equals the same calls in Python."""
    place = Place(where)
    if where == "cpu":
        place.options = {"backend": "cpu"}
    a, b, c, d = (place.index(32, 32, 4, 4, 2, dtype=BF16) for _ in range(4))
    for index in (a, b, c, d):
        index.add(place.tokens(1, 2, 30, 32, BF16), place.tokens(1, 2, 30, 32, BF16))
    params = SearchParametersIVF(selectivity=0.3)

    def step(x: AsymmetricIndex, y: AsymmetricIndex, k: Tensor, v: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        x.add(k, v)
        first = x.search_attend(q)
        y.add(v, k)
        second, lse = y.search_attend(first * 2, params=params, return_lse=True)
        x.add(second[:, :2], k)
        return first + second + x.search_attend(second), lse

    compiled = torch.compile(step, fullgraph=True, backend=compiler, dynamic=False)
    for t in range(6):
        k, v, q = (place.tokens(1, h, 1, 32, BF16, seed=t + s) for h, s in ((2, 0), (2, 100), (4, 200)))
        for got, want in zip(compiled(a, b, k, v, q), step(c, d, k, v, q), strict=True):
            assert torch.equal(got, want)
    assert a.lengths == c.lengths == [42] and b.lengths == d.lengths == [36]
    same_state(a, c)
    same_state(b, d)
    torch._dynamo.reset()


def test_operators_are_sound(emu: Place) -> None:
    """torch's own checks of schemas, fake implementations and functionalisation."""
    from saap_index import ops

    index = emu.index(32, 40, 4, 4, 2)
    index.add(emu.tokens(1, 2, 30, 32), emu.tokens(1, 2, 30, 40))
    tests = ("test_schema", "test_faketensor")
    search = index._token, emu.tokens(1, 4, 2, 32), index._number, 40, ops.pack(SearchParametersIVF(selectivity=0.5))
    torch.library.opcheck(ops.search_attend, search, test_utils=tests)
    new = emu.tokens(1, 2, 1, 32), emu.tokens(1, 2, 1, 40)
    torch.library.opcheck(ops.add, (index._token, *new, index._number, True), test_utils=("test_faketensor",))
    with pytest.raises(StateError, match="one that is gone"):
        ops.add(index._token, *new, 0, True)


# -- the whole interface ------------------------------------------------------------------------------------------------------


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
    place: Place

    @initialize(
        b=st.integers(1, 2), heads=st.sampled_from([(4, 2), (1, 1)]), dtype=st.sampled_from([BF16, F32]),
        rope=st.sampled_from([None, "plain", "dynamic"]), sinks=st.integers(0, 5), window=st.integers(0, 20),
        break_even=st.sampled_from([0, 30]), published=st.sampled_from([False, False, True]), means=st.sampled_from([0, 1, 3]),
        tail=st.sampled_from([0.0, 0.4]), shares=st.sampled_from([None, (0.2, 1.5, 9.0)]),
        target_mass=st.sampled_from([None, None, 0.8]),
    )  # fmt: skip
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
            self.index = Ferry(read_index(Path(folder) / "index", self.place.device))

    @precondition(lambda self: self.index.lengths and not (self.index.rope is not None and self.index.rope.is_dynamic))
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
        index.reserve_memory(2 * most + 64)  # the graph is done with, and memory may move again


class EmulatedWalk(DeviceWalk):
    backend, place = "cuda-emu", Place("cuda-emu")


class FerriedWalk(EmulatedWalk):
    """What the walk on a real device has more, tried without one."""

    place = Place("cuda-emu")
    place.real = True

    def __init__(self) -> None:
        super().__init__()
        self.place.capture = Place("cuda-emu").capture  # type: ignore[method-assign]


class CudaWalk(DeviceWalk):
    place = Place("cuda")


@pytest.mark.parametrize("walk, examples", [
    pytest.param(EmulatedWalk, 10, marks=emulation), pytest.param(FerriedWalk, 5, marks=emulation),
    pytest.param(CudaWalk, 30, marks=gpu),
])  # fmt: skip
def test_walk(walk: type[DeviceWalk], examples: int) -> None:
    run_state_machine_as_test(walk, settings=settings(max_examples=examples, stateful_step_count=20))
