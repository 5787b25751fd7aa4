"""cuda/route_select.cu on the emulator: what the router's kernel and the selection's give one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from emu.guarded import guarded
from emu.runtime import EmulatedRuntime, available
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gpu_select import FIRST_KNOT, SCHEDULES, SEEDS, UNTOUCHED, Array, make_tables, runtime
from torch import Tensor

from saap_index.backends.base import knots_of
from saap_index.backends.cuda import route as gpu_route
from saap_index.backends.cuda import route_select as gpu_route_select
from saap_index.backends.cuda import select as gpu_select
from saap_index.backends.cuda.route_select import RouteSelect, RouteSelectShape
from saap_index.backends.cuda.scan import Runs
from saap_index.backends.reference import ReferenceBackend
from saap_index.backends.types import Budget, Frequencies, Rotation, Sample
from saap_index.backends.weights import RouterWeights

pytestmark = pytest.mark.skipif(not available(), reason="needs g++")

SPEC = ReferenceBackend()
SMALL = {"SAAP_THREADS": 64, "SAAP_CLUSTER": 2}
T_CAP = 400


@dataclass
class Case:
    """``exact``: weights and queries whose sums have no rounding, so that both ways find the same scores to the bit."""

    seed: int
    b: int = 2
    h: int = 2
    g: int = 4
    q: int = 1
    d: int = 32
    units: int = 32
    nlist: int = 40
    knots: int = 3
    segments: int = 6
    dtype: torch.dtype = torch.bfloat16
    tables: str = "plain"
    exact: bool = False
    ties: bool = False
    kind: str = "plain"
    unread_mass: tuple[float, float] | None = None
    rotation: str = "none"
    knobs: dict[str, int] = field(default_factory=lambda: dict(SMALL))


@dataclass
class Inputs:
    weights: RouterWeights
    queries: Tensor
    tables: Array
    centres: Array
    meta: Array
    budgets: Array
    unread_mass: Array | None
    rotation: Rotation | Frequencies | None


def inputs(case: Case) -> Inputs:
    rng = np.random.default_rng(case.seed)
    b, h, j, s = case.b, case.h, case.g * case.q, case.segments
    outputs = case.nlist + case.knots + 1

    def numbers(*shape: int) -> Tensor:
        x = rng.normal(size=shape) * 0.3
        return torch.from_numpy((np.round(x * 4) / 4 if case.exact else x).astype(np.float32))

    u = case.units
    weights = [numbers(h, u, case.d), numbers(h, u), numbers(h, outputs, u), numbers(h, outputs, case.d), numbers(h, outputs)]
    if case.ties:  # two kinds of list, and no distance term: most weights are equal
        weights[2].zero_()
        weights[3][:, 1:].zero_()
        weights[4] = torch.round(weights[4])
        weights[4][:, case.nlist : -1] = 0.5
        weights[3][:, case.nlist : -1] = 0
    if case.kind == "far":
        weights[4] *= 200
    queries = numbers(b, h, j, case.d)
    if case.kind == "nan":
        queries[0, 0, 0, 0] = torch.nan
    meta = np.zeros((b, 8), np.int32)
    meta[:, 3], meta[:, 4] = rng.integers(0, s + 1, b), 6000
    centres = np.sort(5999 - np.round(np.minimum(2 ** rng.uniform(FIRST_KNOT - 2, FIRST_KNOT + case.knots + 1, (b, s)), 5000)))
    budgets = rng.choice([0, 1, 7, 40, 150, 399, 10_000], (b, h)).astype(np.int32)
    turn: Rotation | Frequencies | None = None
    pairs = case.d // 2
    if case.rotation == "angles":
        angles = torch.from_numpy(rng.normal(size=(b * case.q, pairs)).astype(np.float32))
        turn = Rotation(angles.cos(), angles.sin(), bool(case.seed % 2), 0.7)
    elif case.rotation == "frequencies":
        turn = Frequencies(torch.from_numpy((1e-4 ** rng.random(pairs)).astype(np.float32)), bool(case.seed % 2), 1.0)
    return Inputs(
        RouterWeights(*weights, case.nlist), queries.to(case.dtype), make_tables(rng, case.tables, (b, h, s, case.nlist)),
        centres.astype(np.float32), meta, budgets,
        None if case.unread_mass is None else np.array(case.unread_mass, np.float32), turn,
    )


def run(
    case: Case, of: Inputs, on: EmulatedRuntime, early: bool = False, sound: bool = True
) -> tuple[list[Array], list[Array]]:
    """Rows of every (sequence, KV head): by one launch, and by two. The first as written, the second ascending."""
    b, h, j = case.b, case.h, case.g * case.q
    router = gpu_route.pack_router(of.weights)

    def to(x: Array | None) -> Tensor | None:
        return None if x is None else guarded(torch.from_numpy(np.ascontiguousarray(x)))

    def out(*shape: int) -> Tensor:
        return guarded(torch.full(shape, UNTOUCHED, dtype=torch.int32))

    tables, centres, meta, budgets, unread_mass = (to(x) for x in (of.tables, of.centres, of.meta, of.budgets, of.unread_mass))
    assert tables is not None and centres is not None and meta is not None and budgets is not None
    shape = RouteSelectShape(b, h, j, case.q, case.segments, FIRST_KNOT, case.dtype)
    assert gpu_route_select.covers(on, router, shape)
    most = case.segments * case.nlist
    found, tickets = Runs(out(b, h, most, 2), out(b, h), out(b, h), T_CAP), out(5)
    one = RouteSelect(on, router, shape, case.knobs).bind(
        of.rotation, meta, tables, centres, budgets, found, unread_mass, tickets, dependent=True
    )
    one.params["early"] = early
    queries = guarded(of.queries)
    weights = router.hidden, router.out, router.bias_hidden, router.bias_out
    turns = [of.rotation.inv_freq] if isinstance(of.rotation, Frequencies) else []
    with on.allow(*weights, *turns, meta, tables, centres):
        one(queries=queries)
    assert (tickets == 0).all()
    rows, counts = found.rows(), found.counts
    for i in range(b):
        for k in range(h):
            n = int(found.run_counts[i, k])
            ends = found.runs[i, k, :n, 1]
            assert (found.runs[i, k, n:] == UNTOUCHED).all() and int(ends[-1] if n else 0) == counts[i, k]
            assert not sound or bool((ends.diff() > 0).all())  # no run is empty
    z, a = (torch.empty((b, h, j, n), dtype=torch.float32) for n in (case.nlist, case.knots + 1))
    with on.allow(*weights):
        gpu_route.Route(on, router, b, j, case.q, case.dtype).bind(of.rotation, meta, z, a)(queries=queries)
    of_select = gpu_select.SelectShape(b, h, j, case.nlist, case.segments, case.knots, FIRST_KNOT)
    select = gpu_select.Select(on, of_select, {"SAAP_THREADS": 128, "SAAP_COLUMNS": 4})
    want, want_counts = out(b, h, T_CAP), out(b, h)
    select.bind(z, a, tables, centres, meta, budgets, want, want_counts, unread_mass)()
    heads = [(i, k) for i in range(b) for k in range(h)]
    return (
        [np.asarray(rows[i, k, : counts[i, k]]) for i, k in heads],
        [np.asarray(want[i, k, : want_counts[i, k]]) for i, k in heads],
    )


def check(case: Case, on: EmulatedRuntime, early: bool = False) -> None:
    of = inputs(case)
    for got, want in zip(*run(case, of, on, early), strict=True):
        assert len(set(got.tolist())) == len(got)
        if case.unread_mass is not None:  # where it ends hangs on the rounding of a sum: a run more or less
            assert abs(len(got) - len(want)) <= 120
            few, many = sorted((got, want), key=len)
            assert len(np.intersect1d(few, many)) >= 0.9 * len(few) - 8
            continue
        assert len(got) == len(want)
        if case.exact or case.kind == "far":
            np.testing.assert_array_equal(np.sort(got), want)
        else:  # scores differ in their last bits, and where weights all but equal meet the cut the choice may
            assert len(np.intersect1d(got, want)) >= 0.9 * len(want) - 8


@st.composite
def cases(draw: st.DrawFn) -> Case:
    g, q = draw(st.sampled_from([(4, 1), (1, 1), (3, 1), (2, 2)]))
    d, units, dtype = draw(st.sampled_from([(32, 32, torch.bfloat16), (72, 0, torch.float32)]))
    exact = draw(st.booleans())
    ties = exact and draw(st.booleans())
    rotation = "none" if exact else draw(st.sampled_from(["none", "angles", "frequencies"]))
    return Case(
        draw(SEEDS), g=g, q=q, d=d, units=units, dtype=dtype, exact=exact, ties=ties, rotation=rotation,
        nlist=draw(st.sampled_from([1, 31, 40, 150])), knots=draw(st.sampled_from([3, 1, 0])),
        tables=draw(st.sampled_from(["plain", "sparse", "one list", "nothing"])),
        kind="plain" if exact else draw(st.sampled_from(["plain", "far", "nan"])),
        unread_mass=draw(st.sampled_from([None, None, (0.3, 0.02), (0.0, 5.0), (1e-4, -1.0)])),
    )


@given(case=cases(), schedule=st.sampled_from(SCHEDULES), early=st.booleans())
@settings(max_examples=60)
def test_as_two_launches(case: Case, schedule: tuple[str, int, int], early: bool) -> None:
    check(case, runtime(schedule), early)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_shape_that_ships(schedule: tuple[str, int, int]) -> None:
    """d = 128, 256 lists, the threads and the cluster of an H200; many segments."""
    case = Case(5, b=1, h=1, d=128, units=64, nlist=256, knots=11, segments=26, knobs={}, rotation="frequencies")
    if schedule[0] != "random":  # every thread is executed
        check(case, runtime(schedule), early=True)


@pytest.mark.parametrize("ties", [False, True])
def test_equal_weights_without_end(ties: bool) -> None:
    """More runs of one weight than are compared with each other: the histogram goes on with segments and lists."""
    case = Case(3, b=1, h=2, nlist=150, segments=9, units=0, d=72, dtype=torch.float32, exact=True, ties=ties)
    of = inputs(case)
    of.meta[:, 3], of.budgets[:] = 9, [[333, 5]]
    if ties:
        for x in (of.weights.skip, of.weights.bias_out):
            x.zero_()
    for got, want in zip(*run(case, of, runtime()), strict=True):
        np.testing.assert_array_equal(np.sort(got), want)


def test_lengths_that_a_table_gives_wrong_write_nothing_out_of_place() -> None:
    case = Case(9)
    of = inputs(case)
    rng = np.random.default_rng(9)
    of.meta[:, 3] = 99
    of.tables[:] = rng.integers(-(2**31), 2**31 - 1, of.tables.shape)
    of.budgets[:] = 2**31 - 1
    run_one = inputs(case)
    run_one.tables, run_one.meta, run_one.budgets = of.tables, of.meta, of.budgets
    got, _ = run(case, run_one, runtime(), sound=False)
    assert all(len(x) <= T_CAP for x in got)


def sampled(
    case: Case, on: EmulatedRuntime, shares: tuple[float, ...], exponents: list[int], caps: list[float], rows: int = 250
) -> None:
    """Budgets of ``rows`` at most, a part of each a sample: rows and biases are those of the specification for these scores."""
    of, b, h = inputs(case), case.b, case.h
    router = gpu_route.pack_router(of.weights)
    of.meta[:, 3] = [case.segments, case.segments - 2, 0][:b]
    budget = torch.tensor(of.budgets).clamp(max=rows)
    parts = torch.tensor([[shares[(i + k) % len(shares)] for k in range(h)] for i in range(b)])
    sample = Sample((budget * parts).int(), torch.tensor(exponents, dtype=torch.int32), torch.tensor(caps))
    tables, centres, meta = (guarded(torch.from_numpy(np.ascontiguousarray(x))) for x in (of.tables, of.centres, of.meta))
    shape = RouteSelectShape(b, h, case.g, 1, case.segments, FIRST_KNOT, case.dtype, sampled=True)
    assert gpu_route_select.covers(on, router, shape)
    most = shape.most_runs(case.nlist)
    runs, run_counts, counts, weights = (
        guarded(torch.full(size, UNTOUCHED, dtype=torch.int32)) for size in ((b, h, most, 2), (b, h), (b, h), (b, h, most, 4))
    )
    found = Runs(runs, run_counts, counts, T_CAP, weights)
    given_sample = Sample(*map(guarded, (sample.rows, sample.exponents, sample.caps)))
    one = RouteSelect(on, router, shape, case.knobs).bind(
        None, meta, tables, centres, guarded(budget), found, None, None, dependent=True, sample=given_sample
    )
    with on.allow(router.hidden, router.out, router.bias_hidden, router.bias_out, meta, tables, centres):
        one(queries=guarded(of.queries))
    z, a = (torch.empty((b, h, case.g, n), dtype=torch.float32) for n in (case.nlist, case.knots + 1))
    with on.allow(router.hidden, router.out, router.bias_hidden, router.bias_out):
        gpu_route.Route(on, router, b, case.g, 1, case.dtype).bind(None, meta, z, a)(queries=of.queries)
    knots = torch.from_numpy(knots_of(of.meta[:, 4:5].astype(np.float64) - 1 - of.centres, FIRST_KNOT, case.knots))
    want = SPEC.probe(
        z, a, knots, torch.from_numpy(of.tables), of.meta[:, 3].tolist(), Budget(budget, sample=sample), size_weighted=True
    )
    rows_found, biases = found.rows(), found.biases()
    assert biases is not None and want.biases is not None
    for i, k in np.ndindex(b, h):
        n, m = int(counts[i, k]), int(run_counts[i, k])
        assert n == want.counts[i, k] and int(runs[i, k, m - 1, 1] if m else 0) == n
        assert (runs[i, k, m:] == UNTOUCHED).all() and (weights[i, k, m:] == UNTOUCHED).all()
        listed, order = rows_found[i, k, :n].sort()
        assert torch.equal(listed, want.rows[i, k, :n]), (i, k)
        assert torch.equal(biases[i, k, :n][order], want.biases[i, k, :n].float()), "to the bit"


SAMPLED = {
    "half": (Case(21), (0.5, 0.3), [8, 6], [2.0, 0.7]),
    "all, some of them none": (Case(22), (1.0, 0.0), [1, 64], [9.0, 1.4]),
    "equal weights": (Case(23, exact=True, ties=True, units=0, nlist=150), (0.6, 1.0), [8, 16], [1.4, 30.0]),
    "empty lists": (Case(24, tables="sparse", knots=0), (0.4,), [4, 8], [2.0, 2.0]),
    "a list of everything": (Case(25, tables="one list", nlist=31), (0.5, 0.9), [8, 8], [2.0, 2.0]),
    "scores that are none": (Case(26, kind="nan"), (0.5,), [8, 8], [2.0, 2.0]),
    "four blocks": (Case(27, nlist=150, g=1, knobs={"SAAP_THREADS": 128, "SAAP_CLUSTER": 4}), (0.5,), [8, 8], [2.0, 2.0]),
    "more than there is": (Case(28), (0.5,), [8, 8], [2.0, 2.0]),
}


@pytest.mark.parametrize("schedule", [SCHEDULES[0], SCHEDULES[-1]])
@pytest.mark.parametrize("name", SAMPLED)
def test_samples(name: str, schedule: tuple[str, int, int]) -> None:
    case, *sample = SAMPLED[name]
    sampled(case, runtime(schedule), *sample, rows=T_CAP if name == "more than there is" else 250)


def test_sizes_are_those_of_the_kernel() -> None:
    case = Case(1)
    of = inputs(case)
    router = gpu_route.pack_router(of.weights)
    shape = RouteSelectShape(case.b, case.h, 4, 1, case.segments, FIRST_KNOT, case.dtype)
    for knobs in (SMALL, {}):
        one = RouteSelect(runtime(), router, shape, knobs)
        kernel = runtime().kernel("route_select.cu", "saap_route_select", one.macros)
        assert kernel.sizeof("route_select") == gpu_route_select.PARAMS.itemsize
        assert kernel.sizeof("route_select_shared") == gpu_route_select.fixed_bytes(one.macros)
        with_samples = RouteSelect(runtime(), router, replace(shape, sampled=True), knobs)
        kernel = runtime().kernel("route_select.cu", "saap_route_select", with_samples.macros)
        assert kernel.sizeof("route_select") == gpu_route_select.SAMPLED_PARAMS.itemsize


def test_what_is_not_covered() -> None:
    case = Case(1)
    router = gpu_route.pack_router(inputs(case).weights)
    shape = RouteSelectShape(1, 2, 4, 1, 6, FIRST_KNOT, case.dtype)
    old = EmulatedRuntime()
    old.capability = (8, 9)
    assert not gpu_route_select.covers(old, router, shape)
    assert not gpu_route_select.covers(runtime(), router, RouteSelectShape(1, 2, 9, 1, 6, FIRST_KNOT, case.dtype))
    assert not gpu_route_select.covers(runtime(), router, RouteSelectShape(1, 2, 4, 1, 4000, FIRST_KNOT, case.dtype))


def once() -> None:
    """For a sanitizer: a few cases that reach every line."""
    on = EmulatedRuntime("random", 3, 4)
    turned = Case(2, rotation="frequencies", unread_mass=(0.3, 0.02))
    for case in (Case(1), turned, Case(4, exact=True, ties=True, units=0, nlist=150)):
        run(case, inputs(case), on)
    for name in ("half", "equal weights"):
        case, *sample = SAMPLED[name]
        sampled(case, on, *sample)
