"""The CUDA backend through the index: on the emulated device, and with `-m gpu` the same tests on a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import test_backends
import test_tail
import test_whole
import torch
from gpu_places import BF16, F16, F32, PLACES, RUNTIME, Place, check, emulated_place, emulation, gpu
from helpers import assert_close, small_index, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stateful import same_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saap_index import AsymmetricIndex, QueryRouter, Rope, SearchParametersIVF, StateError
from saap_index.backends import RouterWeights
from saap_index.invlists import beside


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    return Place(request.param)


@pytest.fixture
def emu() -> Iterator[Place]:
    yield from emulated_place()


# -- operations -----------------------------------------------------------------------------------------------------------

SEAM = {
    (test_backends, "append"): 30, (test_backends, "seal"): 20, (test_backends, "assign"): 15,
    (test_backends, "assign_breaks_ties_downwards"): 10, (test_tail, "means"): 20,
}


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
    full, few = SearchParametersIVF(selectivity=1.0), SearchParametersIVF(nprobe=2)
    for _ in range(2):
        index.add(new, new)
        for params in (None, full, few):
            index.search_attend(queries, params=params)
    before = len(index.invlists.segments[0])
    steps: dict[str, tuple[Callable[[], Any], list[str]]] = {
        "add": (lambda: index.add(new, new), ["saap_append"]),
        "search": (lambda: index.search_attend(queries), ["saap_route_select", "saap_scan"]),
        "nprobe": (lambda: index.search_attend(queries, params=few), ["saap_route", "saap_select", "saap_scan"]),
        "dense": (lambda: index.search_attend(queries, params=full), ["saap_scan"]),
    }
    for name, (step, launches) in steps.items():
        RUNTIME.clear()
        with Operations() as seen:
            step()
        assert RUNTIME.launched == launches and not RUNTIME.looked_up, name
        assert set(seen.names) <= FREE and seen.names.count("empty") == (0 if name == "add" else 2), (name, seen.names)
    assert len(index.invlists.segments[0]) == before, "nothing was sealed meanwhile"


SEALING = {"lift_fresh": 14, "slice": 9, "copy_": 1}
"""How often at most a step that seals, and begins the next seal, does what a plain one does not; copy_ is of what `advance` and
its like look at later."""


@pytest.mark.parametrize("batch", [1, 3])
def test_launches_of_a_step_that_seals(emu: Place, batch: int) -> None:
    """As many whatever the batch, also where sequences seal other segments at other times; nothing is read back."""
    h, d, means = 2, 64, 2
    rope = Rope(head_dim=d, theta=100.0)
    index = emu.index(d, d, 4, 4, h, dtype=BF16, rope=rope, mean_run_tokens=means)
    plain = small_index(d, d, 4, 4, h, dtype=BF16, rope=rope, mean_run_tokens=means, backend="torch")
    index.reserve_memory(140, batch=batch)
    prompt = emu.tokens(batch, h, 70, d, BF16)
    lengths = [70, 41, 58][:batch]
    for x in (index, plain):
        x.add(prompt, prompt, lengths=lengths)
    index.search_attend(emu.tokens(batch, 4, 1, d, BF16))
    merged, partly, together, kinds = 0, 0, 0, set()
    for t in range(60):
        lists = index.invlists
        new, before = emu.tokens(batch, h, 1, d, BF16, seed=t), [lists.arrangement(i) for i in range(batch)]
        RUNTIME.clear()
        with Operations() as seen:
            index.add(new, new)
        launched = list(RUNTIME.launched)
        plain.add(new, new)
        after = [lists.arrangement(i) for i in range(batch)]
        changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        aside, launched = [x for x in launched if "beside" in x], [x for x in launched if "beside" not in x]
        if not changed:
            assert launched == ["saap_append"]
            continue
        sealed = any(after[i].segments[-1] != before[i].segments[-1] for i in changed)
        merged += any(len(after[i].segments) < len(before[i].segments) for i in changed)
        partly += any(after[i].merging is not None for i in changed)
        together += len(changed) > 1
        begun = launched[1] == "waited"
        kinds.add(begun)
        first = ["waited"] if begun else [*(["saap_assign"] if sealed else []), "saap_rank", "saap_permute"]
        assert [x for x in launched if x != "saap_means"] == ["saap_append", *first, "saap_permute", "saap_publish"]
        assert launched.count("saap_means") <= 1 and aside in ([], ["saap_rank beside", "saap_permute beside"])
        more = [x for x in seen.names if x not in FREE]
        assert all(more.count(x) <= SEALING.get(x, 0) for x in set(more)), more
        assert seen.names.count("empty") == 2 + bool(aside) - begun and len(seen.names) <= 30
    same_state(index, plain)
    assert merged and partly and (together or batch == 1) and kinds == {False, True}


TAKEN_BACK = (
    "a step that seals", "sealed later", "more than there is room for", "after list numbers", "truncate", "remove",
    "truncate, some wait", "remove, some wait", "window",
)
"""Of `test_whole.CHANGES`."""


@emulation
@pytest.mark.parametrize("name", TAKEN_BACK)
def test_without_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "SPREAD_TOKENS", 1)  # every index begins its seals at the same token
    test_whole.check_without_memory(name, "cuda-emu", 23)


@emulation
@pytest.mark.parametrize("name", TAKEN_BACK)
def test_taken_back_when_all_is_done(name: str) -> None:
    make, change = test_whole.CHANGES[name]
    index = make("cuda-emu")
    before = test_whole.state(index)
    change(index)
    after = test_whole.state(index)
    index = make("cuda-emu")
    with pytest.raises(RuntimeError, match="after it"):
        with index._whole():
            change(index)
            raise RuntimeError("after it")
    assert test_whole.same(test_whole.state(index), before)
    test_whole.usable(index, change, before, after)


@emulation
@pytest.mark.parametrize("name", TAKEN_BACK)
def test_without_a_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time that one is asked for once, it cannot be had: at the first, second, ... time."""
    monkeypatch.setattr(beside, "SPREAD_TOKENS", 1)
    make, change = test_whole.CHANGES[name]
    index = make("cuda-emu")
    before = test_whole.state(index)
    RUNTIME.clear()
    change(index)
    count = len(RUNTIME.looked_up)
    after = test_whole.state(index)
    assert {"saap_rank", "saap_permute", "saap_means"} & set(RUNTIME.looked_up)
    original, failed = RUNTIME.kernel, 0
    for at in range(count):
        index = make("cuda-emu")
        RUNTIME.clear()

        def kernel(file: str, name: str, macros: Any, at: int = at) -> Any:
            if len(RUNTIME.looked_up) == at:
                RUNTIME.looked_up.append(name)
                raise RuntimeError("none")
            return original(file, name, macros)

        with monkeypatch.context() as patch:
            patch.setattr(RUNTIME, "kernel", kernel)
            try:
                change(index)
            except RuntimeError as error:
                assert str(error) == "none"
                failed += 1
        test_whole.usable(index, change, before, after)
    assert failed, "and not where a seal is begun beside the steps: that is made up for when it is due"


STEPS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}), "rope": (1, {"rope": Rope(head_dim=64, theta=100.0)}), "three tokens": (3, {"seal_tokens": 16}),
    "dense": (1, {"selectivity": 1.0}), "tail": (1, {"mean_run_tokens": 2, "tail": 0.4, "selectivity": 0.3}),
    "target mass": (2, {"target_mass": 0.8}), "shares": (1, {"budget_shares": [0.5, 1.5], "selectivity": 0.2}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_makes_nothing_anew(emu: Place, name: str) -> None:
    """After the first of its kind: no kernel is looked up, and parameters are those of the first, with other addresses."""
    q, options = STEPS[name]
    index = emu.index(64, 64, 4, 4, 2, dtype=BF16, **options)
    index.reserve_memory(60 + 40 * q, batch=2)
    index.add(emu.tokens(2, 2, 60, 64, BF16), emu.tokens(2, 2, 60, 64, BF16))
    first: dict[tuple[str, ...], list[Any]] = {}
    sealed = []
    for t in range(40):
        new, queries = emu.tokens(2, 2, q, 64, BF16, seed=t), emu.tokens(2, 4, q, 64, BF16, seed=t + 99)
        for step in (lambda: index.add(new, new), lambda: index.search_attend(queries)):  # noqa: B023
            RUNTIME.clear()
            step()
            launched = tuple(RUNTIME.launched)
            if any("saap_permute" in x for x in launched):
                sealed.append(t)  # no plain step: the layout changes
            elif launched in first:
                assert not RUNTIME.looked_up, (t, launched)
                assert all(a is b for a, b in zip(RUNTIME.structs, first[launched], strict=True)), (t, launched)
            else:
                first[launched] = list(RUNTIME.structs)
    assert len(first) == 2 and sealed and sealed[0] < 30, "the same steps before a seal and after it"


OF_THE_CALLER = {
    "saap_append": {"keys", "values"}, "saap_route": {"queries"}, "saap_route_select": {"queries"},
    "saap_scan": {"queries", "out", "lse"},
}
"""Pointers to what a call brings, and takes."""


@pytest.mark.parametrize(
    ("options", "selecting"), [({"mean_run_tokens": 2, "tail": 0.4}, ["saap_route", "saap_select"]), ({}, ["saap_route_select"])]
)
def test_memory_waits_for_the_streams_that_use_it(
    emu: Place, options: dict[str, Any], selecting: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another stream: what was started comes first, and torch learns that this one uses all the memory of a step, too."""
    options = {"target_mass": 0.8, "rope": Rope(head_dim=64, theta=9.0), **options}
    index = emu.index(64, 64, 4, 4, 2, dtype=BF16, **options)
    index.add(emu.tokens(2, 2, 60, 64, BF16), emu.tokens(2, 2, 60, 64, BF16))
    for _ in range(2):
        RUNTIME.clear()
        index.add(emu.tokens(2, 2, 1, 64, BF16), emu.tokens(2, 2, 1, 64, BF16), seal=False)
        index.search_attend(emu.tokens(2, 4, 1, 64, BF16))
    session, waited, known = index._session_of(index.invlists).backend_session, [], []
    assert RUNTIME.launched == ["saap_append", *selecting, "saap_scan"]

    class Stream(str):
        def wait_stream(self, other: str) -> None:
            waited.append((str(self), str(other)))

    def record(x: Tensor, stream: str) -> None:
        if x.numel():
            known.append((stream, x.data_ptr(), x.untyped_storage().nbytes()))

    monkeypatch.setattr(session, "_device", torch.device("cuda", 0))
    monkeypatch.setattr(Tensor, "record_stream", record)
    for name in "aabb":
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, name=name: Stream(name))
        session.wait_stream()
        assert waited == [("b", "a")] * (name == "b") and bool(known) == (name == "b")
    assert {stream for stream, _, _ in known} == {"b"} and len(known) == len(set(known)), "once"
    for name, struct in zip(RUNTIME.launched, RUNTIME.structs, strict=True):
        for field in struct.dtype.names or ():
            pointer = int(struct[field]) if struct.dtype[field] == np.uint64 and field not in OF_THE_CALLER.get(name, ()) else 0
            assert not pointer or any(first <= pointer < first + size for _, first, size in known), (name, field)


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
}


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


@pytest.mark.parametrize("name", CASES)
def test_search_attend_is_that_of_the_cpu(emu: Place, name: str) -> None:
    """The same rows, entries and attention, with a router that halves hold exactly: numbers of few bits, no hidden units."""
    case = CASES[name]
    if any(isinstance(x, Rope) for _, x in case.options) or case.query != case.dtype:
        case = replace(case, query=case.dtype, options=())  # angles, and queries of 24 bits, halves do not hold
    g = torch.Generator().manual_seed(5)
    h, d = case.kv_heads, case.d
    sizes = (h, 0, d), (h, 0), (h, 8, 0), (h, 8, d), (h, 8)
    weights = RouterWeights(*(torch.randint(-32, 33, x, generator=g) / 64 for x in sizes), 4)
    ours, cpu = (
        small_index(case.d, case.e, 4, case.heads, case.kv_heads, dtype=case.dtype, backend=backend, **dict(case.options))
        for backend in ("cuda-emu", "cpu")
    )
    stored = [emu.tokens(2, case.kv_heads, 90, x, case.dtype, seed=x) for x in (case.d, case.e)]
    for index in (ours, cpu):
        index.query_router = QueryRouter(weights, first_knot=1)
        index.add(*(x[:, :, :85] for x in stored), lengths=[85, 41])
        index.add(*(x[:, :, 85:86] for x in stored))
    assert ours.invlists.segments == cpu.invlists.segments and min(map(len, cpu.invlists.segments)) > 0
    for t in range(4):
        queries = emu.tokens(2, case.heads, case.q, case.d, case.query, seed=t).bfloat16().to(case.query)
        queries = queries.clamp(-3, 3) * (queries.abs() > 2**-6)  # within a half's range
        found = [index.search_attend(queries, params=case.params, return_lse=True) for index in (ours, cpu)]
        ids = [index.read_ids(index._last) for index in (ours, cpu)]
        assert all(torch.equal(x, y) for a, b in zip(*ids, strict=True) for x, y in zip(a, b, strict=True))
        tails = [index._last.tail for index in (ours, cpu)]
        if tails[1] is not None:
            counts = [index._last.tail_counts for index in (ours, cpu)]
            assert torch.equal(*counts)
            for i, k in np.ndindex(*counts[0].shape):  # behind them lies anything
                assert torch.equal(*(x[i, k, : int(counts[0][i, k])] for x in tails))
        (out, lse), (want, want_lse) = found
        assert_close(out, want.double().numpy(), case.dtype, 4.0)
        assert_close(lse, want_lse.double().numpy(), torch.float32, 10.0)
    queries = emu.tokens(2, case.heads, case.q, case.d, case.query)
    queries[1, 0, 0, 3] = torch.nan
    (out, lse), (want, want_lse) = (index.search_attend(queries, params=case.params, return_lse=True) for index in (ours, cpu))
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(lse.isnan(), want_lse.isnan()) and lse.isnan().sum() == 1


@pytest.mark.parametrize("n", [20, 90])
def test_queries_at_an_odd_element(place: Place, n: int) -> None:
    """Pairs of 16-bit queries are read at once, wherever they begin; dense and over lists."""
    index = place.index(dtype=BF16, break_even=40)
    index.add(place.tokens(1, 2, n, 32, BF16), place.tokens(1, 2, n, 32, BF16, seed=1))
    even = place.tokens(1, 4, 1, 32, BF16, seed=2)
    odd = torch.empty(even.numel() + 1, dtype=BF16, device=place.device)[1:].view(even.shape)
    odd.copy_(even)
    assert odd.data_ptr() % 4 and even.data_ptr() % 4 == 0
    selection = index.select(odd)
    for got, want in (
        [index.search_attend(x, return_lse=True) for x in (odd, even)],
        [index.attend_selected(x, selection, return_lse=True) for x in (odd, even)],
    ):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


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
