"""cuda/select.cu on the emulator: row for row what the specification takes, where weights are equal or clearly apart."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
import torch
from emu.guarded import guarded
from emu.runtime import EmulatedRuntime, available
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saap_index import reference
from saap_index.backends.cuda import select as gpu_select

pytestmark = pytest.mark.skipif(not available(), reason="needs g++")

SCHEDULES = (("fifo", 0, 2), ("lifo", 0, 3), ("random", 1, 1), ("random", 2, 4))
SEEDS = st.integers(0, 2**31 - 1)
SMALL = {"SAAP_THREADS": 128, "SAAP_COLUMNS": 4}
FIRST_KNOT = 7
UNTOUCHED = 12345
"""What lies in memory that a kernel has not written."""
Array = np.ndarray


@cache
def runtime(schedule: tuple[str, int, int] = SCHEDULES[0]) -> EmulatedRuntime:
    order, seed, inflight = schedule
    return EmulatedRuntime(order, seed, inflight)


@dataclass
class Case:
    """Axes as in `Select`. unread mass, entries: None for without."""

    z: Array
    a: Array
    tables: Array
    centres: Array
    meta: Array
    budgets: Array
    unread_mass: Array | None = None
    entries: Array | None = None
    nprobe: int = 0
    size_weighted: bool = True
    t_cap: int = 400
    x_cap: int = 24
    knobs: dict[str, int] = field(default_factory=lambda: dict(SMALL))

    @property
    def shape(self) -> gpu_select.SelectShape:
        b, h, j, nlist = self.z.shape
        return gpu_select.SelectShape(
            b, h, j, nlist, self.tables.shape[2], self.a.shape[3] - 1, FIRST_KNOT, self.nprobe, self.size_weighted
        )

    @property
    def heads(self) -> list[tuple[int, int]]:
        return [(i, k) for i in range(self.z.shape[0]) for k in range(self.z.shape[1])]


@dataclass
class Result:
    rows: Tensor
    counts: Tensor
    tail: Tensor
    tail_counts: Tensor

    def row(self, i: int, k: int) -> Array:
        return np.asarray(self.rows[i, k, : self.counts[i, k]])

    def entry(self, i: int, k: int) -> Array:
        return np.asarray(self.tail[i, k, : self.tail_counts[i, k]])


def run(case: Case, on: EmulatedRuntime) -> Result:
    b, h = case.z.shape[:2]

    def to(x: Array | None) -> Tensor | None:
        return None if x is None else guarded(torch.from_numpy(np.ascontiguousarray(x)))

    def out(*shape: int) -> Tensor:
        return guarded(torch.full(shape, UNTOUCHED, dtype=torch.int32))

    select = gpu_select.Select(on, case.shape, case.knobs)
    found = Result(out(b, h, case.t_cap), out(b, h), out(b, h, case.x_cap), out(b, h))
    floats = guarded(torch.full((select.num_floats,), torch.nan))
    given = [to(x) for x in (case.z, case.a, case.tables, case.centres, case.meta, case.budgets)]
    tail = (found.tail, found.tail_counts) if case.entries is not None else (None, None)
    select.bind(*given, found.rows, found.counts, to(case.unread_mass), to(case.entries), *tail, floats)()  # type: ignore[arg-type]
    return found


def head(case: Case, i: int, k: int) -> tuple[Array, Array, Array, Array]:
    """z, a, knots, tables of a (sequence, KV head) as the specification takes them."""
    used = int(np.clip(case.meta[i, 3], 0, case.tables.shape[2]))
    distance = np.maximum(case.meta[i, 4] - 1 - case.centres[i].astype(np.float64), 1.0)
    knots = np.clip(np.log2(distance) - FIRST_KNOT, 0, max(0, case.a.shape[3] - 2)).astype(np.float32)
    z, a = case.z[i, k].astype(np.float64), case.a[i, k].astype(np.float64)
    return z, a, knots[:used].astype(np.float64), case.tables[i, k, :used].astype(np.int64)


def wanted(case: Case, i: int, k: int, budget: int | None = None, unread_mass: float | None = None) -> Array:
    z, a, knots, tables = head(case, i, k)
    most = min(int(case.budgets[i, k]), case.t_cap) if budget is None else budget
    if not len(tables) or most <= 0:
        return np.zeros(0, np.int64)
    return reference.probe(z, a, knots, tables, most, case.nprobe, case.size_weighted, unread_mass)


def assert_as_specified(case: Case, found: Result) -> None:
    for i, k in case.heads:
        rows = found.row(i, k)
        assert (found.rows[i, k, len(rows) :] == UNTOUCHED).all()
        want = wanted(case, i, k)
        if case.unread_mass is not None:  # where it stops hangs on the rounding of a sum; what it has read by then does not
            least, most = (wanted(case, i, k, unread_mass=float(case.unread_mass[k]) + x) for x in (2e-5, -2e-5))
            assert len(least) <= len(rows) <= len(most)
            want = wanted(case, i, k, budget=len(rows))
        np.testing.assert_array_equal(rows, want)
        if case.entries is not None:
            means = int(np.clip(case.meta[i, 5], 0, len(head(case, i, k)[3])))
            entries = int(np.clip(case.entries[i, k], 0, case.x_cap))
            tail = reference.tail(*head(case, i, k), rows, entries, means) if means else []
            np.testing.assert_array_equal(found.entry(i, k), tail)
            assert (found.tail[i, k, len(tail) :] == UNTOUCHED).all()


def make_tables(rng: np.random.Generator, kind: str, shape: tuple[int, int, int, int], most: int = 5) -> Array:
    b, h, s, nlist = shape
    sizes = rng.integers(0, most, shape)
    if kind == "sparse":
        sizes *= rng.random(shape) < 0.2
    elif kind == "one list":
        sizes[:] = 0
        sizes[..., rng.integers(nlist)] = rng.integers(0, 120, (b, h, s))
    elif kind == "nothing":
        sizes[:] = 0
    ends = np.cumsum(sizes.reshape(b, h, -1), axis=-1).reshape(shape)
    starts = np.concatenate([np.zeros((b, h, 1), np.int64), ends[:, :, :-1, -1]], 2)[..., None]
    return (4 + np.concatenate([starts, ends], -1)).astype(np.int32)


def make_case(
    seed: int, kind: str = "plain", tables: str = "plain", ties: bool = False, nlist: int = 30, j: int = 4, m: int = 3
) -> Case:
    """kind: plain; nan, infinite (a vector of queries or two); far (scores a single precision exponential does not reach)."""
    rng = np.random.default_rng(seed)
    b, h, s = 2, 2, 6
    z = rng.normal(size=(b, h, j, nlist)).astype(np.float32) * 2
    a = rng.normal(size=(b, h, j, m + 1)).astype(np.float32)
    if rng.random() < 0.3:  # steep, so that a small error of a distance is a large one of a weight
        a[..., :m] *= 8
    if ties:  # equal sums of different terms would round differently: the distance term is the same everywhere
        z, a[..., :m] = np.round(z / 2), 0.5
        z[:] = z[:, :, :1]
    if kind == "nan":
        z[0, :, 0, rng.integers(nlist)] = np.nan
        knot = rng.random() < 0.5  # else c
        a[1, :, -1, 0 if knot else -1] = rng.choice([np.nan, np.inf]) if knot else np.nan
    elif kind == "infinite":
        z[:, 0] = np.where(rng.random(z[:, 0].shape) < 0.6, -np.inf, z[:, 0])
        z[0, 1] = -np.inf
    elif kind == "far":
        z *= 60
        a[..., :m] *= 40
    meta = np.zeros((b, 8), np.int32)
    meta[:, 3], meta[:, 4], meta[:, 5] = rng.integers(0, s + 1, b), 6000, rng.integers(0, s + 1, b)
    distances = 2 ** rng.uniform(FIRST_KNOT - 2, FIRST_KNOT + m + 1, (b, s))
    centres = np.sort(5999 - np.round(np.minimum(distances, 5000))).astype(np.float32)
    budgets = rng.choice([0, 1, 7, 40, 150, 399, 10_000], (b, h)).astype(np.int32)
    case = Case(z, a, make_tables(rng, tables, (b, h, s, nlist)), centres, meta, budgets)
    held = np.flatnonzero(np.diff(case.tables[1, 1, : meta[1, 3]], axis=1).sum(0))
    if kind == "infinite" and len(held):  # of a list that holds tokens: others are no part of the sum
        z[1, 1, 0, held[0]] = 2000
    return case


@st.composite
def cases(draw: st.DrawFn, kind: str = "plain") -> Case:
    j, m = draw(st.sampled_from([(1, 3), (4, 3), (5, 1), (3, 0), (9, 3)]))
    tables = draw(st.sampled_from(["plain", "plain", "sparse", "one list", "nothing"]))
    nlist = draw(st.sampled_from([1, 31, 40, 150]))
    case = make_case(draw(SEEDS), kind, tables, draw(st.booleans()), nlist, j, m)
    mode = draw(st.sampled_from(["rows", "tail", "miss", "both", "nprobe", "published", "published nprobe", "without c"]))
    if mode in ("tail", "both"):
        case.entries = np.array([[5, 0], [24, 1000]], np.int32)
    if mode in ("miss", "both"):
        case.unread_mass = np.array(draw(st.sampled_from([[0.3, 0.02], [0.0, 5.0], [1e-4, -1.0]])), np.float32)
    if "nprobe" in mode:
        case.nprobe = draw(st.sampled_from([1, 4, 1000]))
        case.knobs["SAAP_LISTS"] = 1
    case.size_weighted = "published" not in mode
    if mode == "without c":
        case.a = case.a[..., :0]
    return case


def test_parameters_are_laid_out_as_in_the_kernel() -> None:
    for knobs in (SMALL, {"SAAP_THREADS": 64, "SAAP_COLUMNS": 8}):
        macros = gpu_select.Select(runtime(), make_case(0).shape, knobs).macros
        kernel = runtime().kernel("select.cu", "saap_select", macros)
        assert kernel.sizeof("select_fixed") == gpu_select.fixed_bytes(macros)
        assert kernel.sizeof("select") == gpu_select.PARAMS.itemsize


@settings(max_examples=120)
@given(case=cases(), schedule=st.sampled_from(SCHEDULES))
def test_select(case: Case, schedule: tuple[str, int, int]) -> None:
    assert_as_specified(case, run(case, runtime(schedule)))


@settings(max_examples=40)
@given(case=cases("infinite"), schedule=st.sampled_from(SCHEDULES))
def test_scores_of_infinity(case: Case, schedule: tuple[str, int, int]) -> None:
    assert_as_specified(case, run(case, runtime(schedule)))


@settings(max_examples=20)
@given(seed=SEEDS, tables=st.sampled_from(["plain", "sparse", "one list"]), ties=st.booleans())
def test_vectors_without_numbers_do_not_count(seed: int, tables: str, ties: bool) -> None:
    case = make_case(seed, "nan", tables, ties)
    case.meta[1, 3], case.centres[1, -1] = 6, 5990  # a segment at the first knot
    want = replace(case, z=case.z.copy(), a=case.a.copy())
    for x, row in ((want.z, (0, slice(None), 0)), (want.z, (1, slice(None), -1))):
        x[row] = -np.inf
    want.a[1, :, -1] = 0
    assert_as_specified(want, run(case, runtime()))


@settings(max_examples=30)
@given(seed=SEEDS, tables=st.sampled_from(["plain", "sparse", "one list"]), j=st.sampled_from([1, 4, 6]))
def test_scores_far_apart(seed: int, tables: str, j: int) -> None:
    """Weights below what float32 holds are equal to nothing: the rows read weigh as much as the specification's."""
    case = make_case(seed, "far", tables, j=j)
    found = run(case, runtime())
    for i, k in case.heads:
        rows, want = found.row(i, k), wanted(case, i, k)
        assert len(rows) == len(want)
        if len(want):
            z, a, knots, of = head(case, i, k)
            weights = np.repeat(reference.run_weights(z, a, knots, of, True).ravel(), np.diff(of).ravel())
            weights = np.concatenate([np.zeros(4), weights])  # of rows; the first run starts at row 4
            assert weights[rows].sum() >= weights[want].sum() * (1 - 1e-5)


def test_the_best_list_lies_where_nothing_else_does() -> None:
    """exp(z) exp(a) would be 0 for every run: a list of large z has tokens only in the segment of least a."""
    z = np.zeros((1, 1, 1, 3), np.float32)
    z[0, 0, 0] = [200, 0, 1]
    a = np.array([0, -150, 3], np.float32).reshape(1, 1, 1, 3)
    tables = np.array([[4, 9, 9, 9], [9, 9, 12, 15]], np.int32).reshape(1, 1, 2, 4)
    meta = np.array([[0, 0, 0, 2, 1000, 2, 0, 0]], np.int32)
    case = Case(z, a, tables, np.array([[0, 990]], np.float32), meta, np.array([[7]], np.int32))
    assert run(case, runtime()).row(0, 0).tolist() == wanted(case, 0, 0).tolist()
    assert wanted(case, 0, 0).tolist() == [4, 5, 6, 7, 8, 13, 14]


@pytest.mark.parametrize("spread", [0.0, 1e-4, 0.05])
def test_many_weights_alike(spread: float) -> None:
    """More runs in the bin where the selection ends than are ranked at once: equal ones, and ones that differ in late bits."""
    rng = np.random.default_rng(1)
    case = make_case(3, nlist=600, j=1)
    case.z[:] = rng.permutation(600) / 600 * spread
    case.a[:] = 0
    case.meta[:, 3] = 6
    case.budgets[:] = [[1, 150], [390, 10_000]]
    case.entries = np.array([[20, 3], [24, 24]], np.int32)
    case.t_cap = 9000
    assert_as_specified(case, run(case, runtime()))


@settings(max_examples=12)
@given(case=cases())
def test_every_schedule_and_every_configuration_select_the_same(case: Case) -> None:
    first = run(case, runtime(SCHEDULES[0]))
    again = [run(case, runtime(schedule)) for schedule in SCHEDULES[1:]]
    if not case.nprobe:
        for knobs in (
            {"SAAP_THREADS": 64, "SAAP_COLUMNS": 8},
            SMALL | {"SAAP_FAR": 1},
            {"SAAP_THREADS": 1024, "SAAP_COLUMNS": 4},
        ):
            again.append(run(replace(case, knobs=knobs), runtime(SCHEDULES[0])))
    for other in again:
        assert torch.equal(first.rows, other.rows) and torch.equal(first.counts, other.counts)
        assert case.entries is None or torch.equal(first.tail, other.tail)


@pytest.mark.parametrize("number", [1e30, -3e38, 3e38, np.inf, np.nan])
def test_scores_that_swallow_the_distance_term(number: float) -> None:
    """Nothing is specified of which rows; as many as there are to be read."""
    case = make_case(14, j=3)
    case.z[:, :, :2, 5:9] = number
    case.meta[:, 3] = 6
    found = run(case, runtime())
    for i, k in case.heads:
        assert found.counts[i, k] == min(case.budgets[i, k], case.t_cap, case.tables[i, k, -1, -1] - 4)
        assert (np.diff(found.row(i, k)) > 0).all() and (found.row(i, k) >= 4).all()


def test_what_memory_holds_is_not_trusted() -> None:
    """More segments than there are, falling offsets, budgets beyond the room for rows: nothing is read or written outside."""
    case = make_case(5)
    case.meta[:, 3], case.meta[:, 5] = [100, -3], [77, 77]
    case.budgets[:] = [[2**31 - 1, -5], [50, 3]]
    case.entries = np.array([[2**31 - 1, -1], [1, 2]], np.int32)
    rng = np.random.default_rng(0)
    case.tables[0, 1] = rng.integers(-(2**31), 2**31, case.tables[0, 1].shape)
    case.budgets[0, 1] = 300
    case.centres[0, 0] = np.nan
    found = run(case, runtime())
    wrapped = make_case(5, nlist=1)  # lengths whose sum is 2**32
    wrapped.tables[:], wrapped.a[..., :3], wrapped.meta[:, 3] = 0, 0, 3
    wrapped.tables[:, :, :3, 1] = [2**31 - 1, 2**31 - 1, 2]
    wrapped.t_cap = 10
    run(wrapped, runtime())
    assert found.counts.tolist()[1] == [0, 0] and found.tail_counts.tolist()[1] == [0, 0]
    assert found.counts[0, 0] == min(case.t_cap, case.tables[0, 0, -1, -1] - 4) and found.counts[0, 1] <= case.t_cap
    assert all((found.entry(0, k) < case.tables.shape[2] * case.z.shape[3]).all() for k in (0, 1))


def test_as_many_lists_as_there_can_be() -> None:
    """l = 65535: weights lie in the workspace."""
    rng = np.random.default_rng(0)
    nlist, s = 65535, 2
    sizes = (rng.random((1, 1, s, nlist)) < 0.01).astype(np.int64) * rng.integers(1, 9, (1, 1, s, nlist))
    flat = np.concatenate([[0], np.cumsum(sizes.reshape(-1))])
    tables = np.stack([flat[: nlist + 1], flat[nlist:]]).reshape(1, 1, s, nlist + 1).astype(np.int32)
    meta = np.array([[0, 0, 0, s, 9000, s, 0, 0]], np.int32)
    case = Case(
        rng.normal(size=(1, 1, 2, nlist)).astype(np.float32),
        rng.normal(size=(1, 1, 2, 4)).astype(np.float32),
        tables,
        np.array([[100, 5000]], np.float32),
        meta,
        np.array([[300]], np.int32),
        knobs=SMALL | {"SAAP_FAR": 1},
    )
    assert gpu_select.configuration(case.shape, 132, gpu_select.H200_SHARED_BYTES)["SAAP_FAR"]
    assert_as_specified(case, run(case, runtime()))


def test_configurations() -> None:
    """20 000 runs have room in shared memory, whatever the group; every configuration is among those that are shipped."""
    shipped = [macros for _, _, macros in gpu_select.CONFIGURATIONS]
    bound = gpu_select.H200_SHARED_BYTES
    for b, j, nlist, s, nprobe in (
        (1, 4, 1024, 20, 0),
        (64, 128, 1024, 20, 0),
        (1, 1, 65535, 40, 0),
        (8, 8, 1024, 20, 3),
        (1, 8, 60000, 9, 3),
    ):
        shape = gpu_select.SelectShape(b, 8, j, nlist, s, 16, 7, nprobe)
        macros = gpu_select.configuration(shape, 132, bound)
        assert macros in shipped and gpu_select.shared_bytes(shape, macros) <= bound
        assert macros["SAAP_FAR"] == (nlist > 1024)


def test_refusals() -> None:
    case = make_case(0)
    with pytest.raises(ValueError, match="knots"):
        gpu_select.Select(runtime(), replace(case.shape, knots=33))
    with pytest.raises(ValueError, match="runs"):
        gpu_select.Select(runtime(), replace(case.shape, nlist=65535, segments=40_000))
    case.nprobe, case.unread_mass, case.knobs = 2, np.zeros(2, np.float32), {**SMALL, "SAAP_LISTS": 1}
    with pytest.raises(ValueError, match="miss"):
        run(case, runtime())


# -- sanitizers ------------------------------------------------------------------------------------------------------------


def once() -> None:
    """What the sanitizers watch: several passes over the vectors, both ways to weigh, ties, tail, target mass."""
    on = runtime(SCHEDULES[-1])
    far = make_case(7, "far", "sparse", j=6)
    far.entries, far.unread_mass = np.full((2, 2), 20, np.int32), np.full(2, 0.1, np.float32)
    run(far, on)
    alike = make_case(8, "plain", "plain", ties=True, nlist=200, j=2)
    alike.entries = np.full((2, 2), 20, np.int32)
    assert_as_specified(alike, run(alike, on))
