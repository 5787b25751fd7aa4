"""The kernels that build an index, on the emulator: append, assign, seal, means. Bit for bit where nothing is rounded."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from emu.runtime import EmulatedRuntime, available
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saap_index import reference
from saap_index.backends import Frequencies, SegmentChange
from saap_index.backends.codes import FLAGS, FULL, NOT_FINITE
from saap_index.backends.cuda import append_assign as gpu_build
from saap_index.backends.cuda import seal as gpu_seal
from saap_index.backends.cuda import seal_plan
from saap_index.backends.types import Rotation

pytestmark = pytest.mark.skipif(not available(), reason="needs g++")

SCHEDULES = (("fifo", 0, 2), ("lifo", 0, 3), ("random", 1, 1), ("random", 2, 4))
TYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
DIMS = (32, 40, 64, 72, 128, 192, 256)


@cache
def runtime(schedule: tuple[str, int, int]) -> EmulatedRuntime:
    order, seed, inflight = schedule
    return EmulatedRuntime(order, seed, inflight)


schedules = st.sampled_from(SCHEDULES).map(runtime)
dtypes = st.sampled_from(TYPES)
dims = st.sampled_from(DIMS)
seeds = st.integers(0, 2**32 - 1)


def random_rows(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(BITS[a.dtype]), b.contiguous().view(BITS[b.dtype]))


def test_parameters_are_laid_out_as_in_the_kernels() -> None:
    rows = {"SAAP_ROWS": gpu_build.KEYS_PER_BLOCK[-1]}
    for file, name, macros, layout in (
        ("append.cu", "append", {"SAAP_STEP": 0}, gpu_build.APPEND_PARAMS),
        ("assign.cu", "assign", rows, gpu_build.ASSIGN_PARAMS),
        ("seal.cu", "rank", {}, gpu_seal.RANK_PARAMS),
        ("seal.cu", "permute", {}, gpu_seal.PERMUTE_PARAMS),
        ("seal.cu", "publish", {}, gpu_seal.PUBLISH_PARAMS),
        ("means.cu", "means", {}, gpu_seal.MEANS_PARAMS),
    ):
        assert runtime(SCHEDULES[0]).kernel(file, f"saap_{name}", macros).sizeof(name) == layout.itemsize


# -- append ----------------------------------------------------------------------------------------------------------------

LAYOUTS = ("plain", "transposed", "interleaved heads", "odd")


def strided(x: Tensor, layout: str) -> Tensor:
    """The same numbers in other places; the last stride is 1."""
    b, h, n, d = x.shape
    if layout == "transposed":  # as a projection leaves them
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "interleaved heads":  # one projection for queries, keys and values
        room = torch.full((b, n, h, 3, d), torch.nan, dtype=x.dtype)
        room[:, :, :, 1] = x.transpose(1, 2)
        return room[:, :, :, 1].transpose(1, 2)
    if layout == "odd":  # no row begins at a multiple of 16 bytes, but by chance
        room = torch.full((b, h, n, d + 3), torch.nan, dtype=x.dtype)
        room[..., 1 : d + 1] = x
        return room[..., 1 : d + 1]
    return x


def append_to_meta(run: EmulatedRuntime, keys: Tensor, values: Tensor, *where: Tensor | None) -> None:
    if keys.shape[:3].numel():
        gpu_build.bind_append_to_meta(run, keys, values, *where)(keys=keys, values=values)


@given(
    schedules, dtypes, dims, dims, st.sampled_from(LAYOUTS), st.integers(1, 3), st.integers(1, 3),
    st.integers(0, 8) | st.sampled_from([33, 70]), st.booleans(), st.data(),
)
@settings(max_examples=40)
def test_append(
    run: EmulatedRuntime,
    dtype: torch.dtype,
    d: int,
    e: int,
    layout: str,
    b: int,
    h: int,
    n: int,
    by_meta: bool,
    data: st.DataObject,
) -> None:
    capacity = 80
    fresh = torch.full((b, h, capacity, d), 7.0, dtype=dtype), torch.full((b, h, capacity, e), 8.0, dtype=dtype)
    arena, want = [x.clone() for x in fresh], [x.clone() for x in fresh]
    lengths = data.draw(st.lists(st.integers(0, capacity), min_size=b, max_size=b))
    meta = ints([[length, 1, 2, 3, length + 5, 6, 7, 0] for length in lengths])
    flags = torch.zeros(b, dtype=torch.int32)
    for step in range(2):
        keys, values = random_rows((b, h, n, d), dtype, 2 * step), random_rows((b, h, n, e), dtype, 2 * step + 1)
        counts = data.draw(st.none() | st.lists(st.integers(-1, n + 1), min_size=b, max_size=b))
        if n and data.draw(st.booleans()):
            bad = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
            place = [data.draw(st.integers(0, size - 1)) for size in (b, h, n, 2)]
            (values if place[3] else keys)[(*place[:3], data.draw(st.integers(0, min(d, e) - 1)))] = bad
        errors = [0] * b
        for i in range(b):
            count = n if counts is None else min(max(counts[i], 0), n)
            if lengths[i] + count > capacity:
                errors[i] |= FULL
                continue
            at = slice(lengths[i], lengths[i] + count)
            for to, x in zip(want, (keys, values), strict=True):
                to[i, :, at] = x[i, :, :count]
                errors[i] |= 0 if x[i, :, :count].isfinite().all() else NOT_FINITE
            if by_meta:
                lengths[i] += count
        device_counts = None if counts is None else ints(counts)
        given_keys, given_values = strided(keys, layout), strided(values, layout)
        flags.zero_()
        meta[:, FLAGS] = 0
        starts = ints(lengths)
        tickets = torch.full((data.draw(st.sampled_from([1, 70, 3000])),), 5 + step, dtype=torch.int32)
        with run.allow(given_keys, given_values, flags, meta, tickets):
            if by_meta:
                append_to_meta(run, given_keys, given_values, *arena, meta, device_counts, tickets)
                assert not (n and tickets.any())
            else:
                gpu_build.append(run, given_keys, given_values, *arena, starts, device_counts, flags)
        assert all(same_bits(a, w) for a, w in zip(arena, want, strict=True))
        if n:
            assert (meta[:, FLAGS] if by_meta else flags).tolist() == errors
    # both rose by the same, and by nothing where starts were given
    assert meta[:, : FLAGS].tolist() == [[length, 1, 2, 3, length + 5, 6, 7] for length in lengths]


# -- assign ----------------------------------------------------------------------------------------------------------------


def scores_of(keys: np.ndarray, centroids: Tensor) -> tuple[np.ndarray, float]:
    """Scores (n, l) of the keys of one head, and the largest error of torch's in float32."""
    points = centroids.double().numpy()
    exact = keys @ points.T - 0.5 * (points**2).sum(1)
    rounded = torch.from_numpy(keys).float() @ centroids.T - 0.5 * centroids.square().sum(1)
    return exact, float(np.abs(rounded.double().numpy() - exact).max(initial=0.0))


def near_ties(keys: np.ndarray, nlist: int, rng: np.random.Generator) -> Tensor:
    """Centroids (l, d), two of them about each of the first keys, of which the nearer is so by 4e-6 of the score."""
    n, d = keys.shape
    centroids = rng.standard_normal((nlist, d)) * (np.abs(keys).max(initial=0.0) or 1.0) / 4
    for i in range(min(n, nlist // 2)):
        away = rng.standard_normal((2, d))
        lengths = (keys[i] ** 2).sum() * (0.1 + rng.choice([-4e-6, 4e-6]) * np.array([0, 1]))
        centroids[2 * i : 2 * i + 2] = keys[i] + away * np.sqrt(lengths / (away**2).sum(1))[:, None]
    return torch.from_numpy(centroids).float()


def assert_nearest(got: Tensor, exact: np.ndarray, error: float) -> None:
    """Every choice is the best, or so close that a score computed with twice the error of float32 may prefer it."""
    n = len(exact)
    chosen = exact[np.arange(n), got.numpy()]
    best = exact[np.arange(n), exact.argmax(1)]
    floor = 1e-7 * np.abs(exact).max(initial=0.0)
    assert (best - chosen <= 2 * (2 * error + floor)).all(), f"{(best - chosen).max():.3g} worse, float32 errs by {error:.3g}"


@given(
    schedules, dtypes, dims, st.integers(1, 300), st.sampled_from([0, 1, 5, 64, 67, 130]), st.integers(1, 2),
    st.sampled_from(["none", "angles", "positions", "range"]), st.booleans(), st.sampled_from([1.0, 0.5, 0.125]),
    st.sampled_from([1.0, 1e-6, 5e3]), st.sampled_from(["plain", "odd"]), st.sampled_from(gpu_build.KEYS_PER_BLOCK), seeds,
)
@settings(max_examples=40)
def test_assign(
    run: EmulatedRuntime, dtype: torch.dtype, d: int, nlist: int, n: int, h: int, how: str, interleaved: bool, share: float,
    size: float, layout: str, rows: int, seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    keys = random_rows((h, n, d), dtype, seed) * size
    rotated = 0 if how == "none" else max(2, int(d * share) // 2 * 2)
    inv_freq = torch.from_numpy(1e4 ** -(np.arange(rotated // 2) * 2 / max(rotated, 1))).float()
    first = int(rng.integers(0, 1 << 20))
    positions = ints(rng.integers(0, 1 << 20, n)) if how == "positions" else torch.arange(first, first + n, dtype=torch.int32)
    angles = (positions.float()[:, None] * inv_freq).double().numpy()  # the model rounds them to float32
    cos, sin, scale = np.cos(angles), np.sin(angles), 1.0 if how == "none" else float(rng.choice([0.75, 100.0]))
    rotation: Rotation | gpu_build.Turns | None = None
    if how == "angles":
        cos, sin = cos.astype(np.float32), sin.astype(np.float32)
        rotation = Rotation(torch.from_numpy(cos), torch.from_numpy(sin), interleaved, scale)
    elif how != "none":
        rotation = gpu_build.Turns(inv_freq, positions if how == "positions" else None, first, interleaved, scale)
    turned = [reference.unrotate(x.double().numpy(), cos, sin, interleaved, scale) for x in keys]
    centroids = torch.stack([near_ties(x, nlist, rng) for x in turned])
    given_keys = strided(keys[None], layout)[0]
    packed = gpu_build.pack_centroids(centroids)
    room = torch.full((h, n + 3), -5, dtype=torch.int32)
    with run.allow(given_keys, packed.panels, packed.scales):
        gpu_build.assign(run, packed, given_keys, room[:, :n], rotation, rows)
    assert (room[:, n:] == -5).all()
    for head in range(h):
        exact, error = scores_of(turned[head], centroids[head])
        assert bool((room[head, :n] >= 0).all()) and bool((room[head, :n] < nlist).all())
        assert_nearest(room[head, :n], exact, error)


def test_assign_with_a_bias_of_the_lists_own() -> None:
    """That of |c|^2 / 2 is the default; another one moves keys as it says."""
    h, nlist, d = 2, 130, 40
    centroids, keys = random_rows((h, nlist, d), torch.float32, 0), random_rows((h, 70, d), torch.float32, 1)
    bias = torch.randn((h, nlist), generator=torch.Generator().manual_seed(2)) * 5
    found = []
    for given_bias in (None, -0.5 * centroids.square().sum(-1), bias):
        found.append(torch.empty((h, 70), dtype=torch.int32))
        gpu_build.assign(runtime(SCHEDULES[0]), gpu_build.pack_centroids(centroids, given_bias), keys, found[-1], None, 64)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    want = torch.einsum("hnd,hld->hnl", keys.double(), centroids.double()) + bias[:, None].double()
    assert torch.equal(found[2].long(), want.argmax(-1))


def test_assign_reads_many_lists_and_finds_the_first_of_equals() -> None:
    nlist, d = 2000, 32
    centroids = random_rows((1, nlist, d), torch.float32, 0)
    centroids[0, 700:1400] = centroids[0, :700]  # every list of the first 700 twice
    centroids[0, 1999] = centroids[0, 1998]
    keys = torch.cat([centroids[:, ::20], centroids[:, 1990:]], 1) * 1.5
    exact, error = scores_of(keys[0].double().numpy(), centroids[0])
    packed, results = gpu_build.pack_centroids(centroids), []
    for schedule in SCHEDULES:
        results.append(torch.empty((1, keys.shape[1]), dtype=torch.int32))
        gpu_build.assign(runtime(schedule), packed, keys, results[-1], None, 64)
        assert torch.equal(results[-1], results[0])
    assert_nearest(results[0][0], exact, error)
    assert not ((results[0] >= 700) & (results[0] < 1400)).any() and not (results[0] == 1999).any()
    assert torch.equal(results[0][0, :35].long(), torch.arange(0, 700, 20))


@given(
    schedules, dtypes, st.sampled_from([40, 64, 128]), st.integers(1, 200), st.integers(1, 2), st.booleans(), st.booleans(),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.sampled_from([1, 5, 64, 67, 130])), min_size=1, max_size=4),
    seeds,
)
@settings(max_examples=15)
def test_assign_of_stretches_is_assign_of_each(
    run: EmulatedRuntime, dtype: torch.dtype, d: int, nlist: int, h: int, turned: bool, gaps: bool,
    stretches: list[tuple[int, int, int]], seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    keys, centroids = random_rows((3, h, 170, d), dtype, seed), random_rows((h, nlist, d), torch.float32, seed + 1)
    packed, total = gpu_build.pack_centroids(centroids), sum(n for _, _, n in stretches)
    firsts = rng.integers(0, 1 << 20, len(stretches)).tolist()
    inv_freq = torch.from_numpy(1e4 ** -(np.arange(d // 2) * 2 / d)).float()
    each = [first + np.arange(n) * (1 + gaps) for first, (_, _, n) in zip(firsts, stretches, strict=True)]
    positions = np.concatenate(each)
    at = np.cumsum([0, *(n for _, _, n in stretches)]).tolist()
    numbers = ints([[*x, begin, first, 0, 0, 0] for x, begin, first in zip(stretches, at, firsts, strict=False)])
    jobs = gpu_build.AssignJobs(numbers, len(stretches), max(n for _, _, n in stretches))
    turns = gpu_build.Turns(inv_freq, ints(positions) if gaps else None, 0, False, 0.75) if turned else None
    room = torch.full((h, total + 3), -5, dtype=torch.int32)
    with run.allow(keys, packed.panels, packed.scales):
        gpu_build.assign_jobs(run, packed, keys, jobs, room[:, :total], turns)
    assert (room[:, total:] == -5).all()
    for (i, row, n), begin in zip(stretches, at, strict=False):
        alone = torch.empty((h, n), dtype=torch.int32)
        turn = gpu_build.Turns(inv_freq, ints(positions[begin : begin + n]), 0, False, 0.75) if turned else None
        gpu_build.assign(run, packed, keys[i, :, row : row + n], alone, turn)
        assert torch.equal(room[:, begin : begin + n], alone)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_assign_of_numbers_that_are_none_stays_in_range(bad: float) -> None:
    keys, centroids = random_rows((1, 6, 64), torch.bfloat16, 0), random_rows((1, 9, 64), torch.float32, 1)
    want, got = torch.empty((1, 6), dtype=torch.int32), torch.empty((1, 6), dtype=torch.int32)
    packed = gpu_build.pack_centroids(centroids)
    gpu_build.assign(runtime(SCHEDULES[0]), packed, keys, want, None)
    keys[0, 2, 5] = bad
    gpu_build.assign(runtime(SCHEDULES[0]), packed, keys, got, None)
    others = torch.arange(6) != 2
    assert torch.equal(got[0, others], want[0, others]) and 0 <= int(got[0, 2]) < 9


def test_packed_centroids_are_as_exact_as_float32() -> None:
    centroids = random_rows((2, 130, 72), torch.float32, 0) * torch.tensor([1e-8, 1e5])[:, None, None]
    packed = gpu_build.pack_centroids(centroids)
    half = gpu_build.LISTS_PER_PANEL * gpu_build.DIMS_PER_PANEL * 2
    parts = packed.panels[..., : 2 * half].contiguous().view(torch.float16).reshape(2, 2, 2, 2, 128, 8, 8).double().sum(3)
    lists = torch.arange(128)
    rows = parts[:, :, :, lists[:, None], torch.arange(8) ^ (lists % 8)[:, None]].movedim(2, 3).reshape(2, 256, 128)
    back = rows * packed.scales.double()[:, None, None]
    assert not back[:, 130:].any() and not back[:, :, 72:].any()
    largest = centroids.double().abs().amax((1, 2), keepdim=True)
    assert ((back[:, :130, :72] - centroids).abs() <= 2**-22 * centroids.abs() + 2**-38 * largest).all()
    bias = packed.panels[..., 2 * half :].contiguous().view(torch.float32)
    want = (-0.5 * centroids.double().square().sum(2)).float()
    assert torch.equal(bias[:, :, 0].reshape(2, 256)[:, :130], want) and torch.equal(bias[:, :, 0], bias[:, :, 1])
    assert (bias[:, :, 0].reshape(2, 256)[:, 130:] == -torch.inf).all()


# -- seal ------------------------------------------------------------------------------------------------------------------

KINDS = ("random", "one list", "falling", "few lists", "sorted")


def lists_of(kind: str, n: int, nlist: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "one list":
        return np.full(n, rng.integers(nlist))
    if kind == "falling":
        return np.maximum(nlist - 1 - np.arange(n), 0)
    if kind == "few lists":
        return rng.choice(rng.integers(0, nlist, 3), n)
    lists = rng.integers(0, nlist, n)
    return np.sort(lists) if kind == "sorted" else lists


class Rows:
    """One sequence of random rows, and what sorting its segments should make of it."""

    def __init__(self, h: int, capacity: int, d: int, e: int, dtype: torch.dtype, seed: int) -> None:
        self.keys, self.values = random_rows((h, capacity, d), dtype, seed), random_rows((h, capacity, e), dtype, seed + 1)
        self.ids = torch.arange(h * capacity, dtype=torch.int32).reshape(h, capacity)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keys, self.values, self.ids

    def sorted(self, segments: list[tuple[int, int]], list_nos: np.ndarray, nlist: int) -> tuple[list[Tensor], Tensor]:
        """keys, values, ids, and tables (h, s, l + 1). list_nos : (h, n) of all rows of the segments."""
        want, tables = [x.clone() for x in self.parts], np.zeros((len(self.ids), len(segments), nlist + 1), np.int32)
        for head in range(len(self.ids)):
            for s, (start, stop) in enumerate(segments):
                lists = list_nos[head, start - segments[0][0] : stop - segments[0][0]]
                order, offsets = reference.sort_segment(lists, nlist)
                tables[head, s] = start + offsets
                for to, x in zip(want, self.parts, strict=True):
                    to[head, start:stop] = x[head, start:stop][torch.from_numpy(order)]
        return want, torch.from_numpy(tables)


def seal_given(
    run: EmulatedRuntime, rows: Rows, segments: list[tuple[int, int]], list_nos: Tensor, tables: Tensor, generous: float
) -> None:
    """Seal segments of rows whose ids are there and whose lists are ``list_nos``. generous : how far from the least workspace."""
    arena = gpu_seal.Arena(*(x[None] for x in rows.parts), tables[None])
    jobs, at = [], 0
    for slot, (start, stop) in enumerate(segments):
        jobs.append(seal_plan.Job(0, start, stop - start, at, slot, 0, 0, start, start - segments[0][0], -1))
        at += seal_plan.places(stop - start)
    space = workspace(arena, jobs, generous)
    with run.allow(*rows.parts, space):
        gpu_seal.seal(run, arena, jobs, ints(jobs), gpu_seal.Fresh(list_nos), space)


def workspace(arena: gpu_seal.Arena, jobs: list[seal_plan.Job], generous: float, before: int = 0) -> Tensor:
    least, most = gpu_seal.workspace_bytes(arena, jobs)
    return torch.full((before + least + int((most - least) * generous),), 255, dtype=torch.uint8)


@given(
    schedules, dtypes, dims, dims, st.integers(1, 3), st.integers(1, 300) | st.just(6000),
    st.sampled_from([0, 1, 31, 64, 200, 700]), st.sampled_from(KINDS), st.sampled_from([0.0, 0.6, 1.0]), seeds,
)
@settings(max_examples=30)
def test_seal(
    run: EmulatedRuntime, dtype: torch.dtype, d: int, e: int, h: int, nlist: int, n: int, kind: str, generous: float, seed: int
) -> None:
    rng, start = np.random.default_rng(seed), 5
    rows = Rows(h, n + 9, d, e, dtype, seed)
    list_nos = np.stack([lists_of(kind, n, nlist, rng) for _ in range(h)]).astype(np.int32)
    want, tables = rows.sorted([(start, start + n)], list_nos, nlist)
    room = torch.full((h, 2, nlist + 1), -5, dtype=torch.int32)
    seal_given(run, rows, [(start, start + n)], torch.from_numpy(list_nos), room[:, 1:], generous)
    assert all(torch.equal(a, w) for a, w in zip(rows.parts, want, strict=True))
    assert torch.equal(room[:, 1], tables[:, 0]) and (room[:, 0] == -5).all()


@given(
    schedules, dtypes, st.integers(1, 3), st.integers(1, 70),
    st.lists(st.sampled_from([0, 1, 7, 32, 100, 260]), min_size=1, max_size=5), st.sampled_from([0.0, 0.5, 1.0]), seeds,
)
@settings(max_examples=20)
def test_seal_of_many_segments(
    run: EmulatedRuntime, dtype: torch.dtype, h: int, nlist: int, lengths: list[int], generous: float, seed: int
) -> None:
    rng, d, e = np.random.default_rng(seed), 32, 40
    ends = (3 + np.cumsum([0, *lengths])).tolist()
    segments = list(pairwise(ends))
    rows = Rows(h, ends[-1] + 2, d, e, dtype, seed)
    list_nos = np.stack([lists_of(KINDS[head], sum(lengths), nlist, rng) for head in range(h)]).astype(np.int32)
    want, tables = rows.sorted(segments, list_nos, nlist)
    room = torch.full((h, len(segments) + 1, nlist + 1), -5, dtype=torch.int32)
    seal_given(run, rows, segments, torch.from_numpy(list_nos), room[:, 1:], generous)
    assert all(torch.equal(a, w) for a, w in zip(rows.parts, want, strict=True))
    assert torch.equal(room[:, 1:], tables) and (room[:, 0] == -5).all()


Spans = tuple[list[tuple[int, int]], list[tuple[int, int]], int]


@st.composite
def changes(draw: st.DrawFn) -> Spans:
    """Segments of a sequence before and after, and how many stay: some merge, the last may take in fresh rows, more may come."""
    sizes = st.sampled_from([1, 7, 32, 65])
    start, have, want = draw(st.integers(0, 4)), [], []
    kept = draw(st.integers(0, 2))
    for i in range(kept + draw(st.integers(0, 2))):
        parts = 1 if i < kept else draw(st.integers(1, 3))
        ends = [start, *(start := start + draw(sizes) for _ in range(parts))]
        have += pairwise(ends)
        want.append((ends[0], start))
    if want[kept:] and draw(st.booleans()):
        start += draw(sizes)
        want[-1] = want[-1][0], start
    for _ in range(draw(st.integers(0 if want[kept:] else 1, 2))):
        want.append((start, start := start + draw(sizes)))
    return have, want, kept


@given(
    schedules, dtypes, st.integers(1, 2), st.integers(1, 70), st.lists(changes(), min_size=1, max_size=3),
    st.sampled_from(["assigned", "given", "both"]), st.booleans(), st.sampled_from([0.0, 0.4, 1.0]), seeds,
)
@settings(max_examples=40)
def test_seal_of_a_batch(
    run: EmulatedRuntime, dtype: torch.dtype, h: int, nlist: int, spans: list[Spans], lists: str, gaps: bool, generous: float,
    seed: int,
) -> None:
    """Sequences that seal other segments with other merges, at once: each as if sorted anew, lists of old rows from tables."""
    rng, d, e = np.random.default_rng(seed), 32, 40
    capacity = max(want[-1][1] for _, want, _ in spans) + 3
    slots = max(len(x) for have, want, _ in spans for x in (have, want)) + 1
    batch = [Rows(h, capacity, d, e, dtype, seed + i) for i in range(len(spans))]
    tables = torch.full((len(spans), h, slots, nlist + 1), -5, dtype=torch.int32)
    every = rng.integers(0, nlist, (len(spans), h, capacity)).astype(np.int32)  # in arrival order
    wanted, due = [], []
    for i, (have, want, kept) in enumerate(spans):
        rows, first, last = batch[i], want[0][0], want[-1][1]
        sealed = have[-1][1] if have else first
        positions = np.arange(1000 * i, 1000 * i + capacity) * (1 + gaps)
        rows.ids[:] = torch.from_numpy(positions)
        final, after = rows.sorted(want, every[i, :, first:last], nlist)
        before, old = rows.sorted(have, every[i, :, first:sealed], nlist) if have else (list(rows.parts), None)
        if old is not None:
            tables[i, :, : len(have)] = old
        for to, x in zip(rows.parts, before, strict=True):
            to[:] = x
        rows.ids[:, sealed:] = -9  # written when rows are sealed
        final[2][:, last:] = -9
        wanted.append((final, after))
        due.append(SegmentChange(i, kept, have, want, positions[max(sealed, want[kept][0]) : last], 0))
    arena = gpu_seal.Arena(*(torch.stack(x) for x in zip(*(rows.parts for rows in batch), strict=True)), tables)
    plan = seal_plan.planned(due)
    given_lists = torch.from_numpy(every.copy()) if lists != "assigned" else None
    centroids = None
    if lists != "given":
        found = random_rows((h, nlist, d), torch.float32, seed + 9)
        centroids = gpu_build.pack_centroids(found)
        for c in due:  # what the quantizer says, where nothing is given
            start = c.want[-1][1] - len(c.positions)
            if given_lists is not None:
                given_lists[c.sequence, :, start : start + len(c.positions) // 2] = -1
    turn = Frequencies(1e4 ** -torch.arange(0, 1, 2 / d), False, 1.0)
    nbytes = gpu_seal.aligned(4 * h * plan.fresh) if centroids is not None else 0
    space, numbers = workspace(arena, plan.jobs, generous, nbytes), torch.from_numpy(plan.numbers)
    if centroids is not None:  # then the wanted state is that of the lists it gives
        for i, c in enumerate(due):
            n, last = len(c.positions), c.want[-1][1]
            if not n:
                continue
            nos = torch.empty((h, n), dtype=torch.int32)
            turns = gpu_build.Turns(turn.inv_freq, ints(c.positions), 0, False, 1.0)
            gpu_build.assign(run, centroids, arena.keys[i, :, last - n : last], nos, turns)
            if given_lists is not None:
                part = given_lists[i, :, last - n : last]
                nos = torch.where(part < 0, nos, part)
            every[i, :, last - n : last] = nos.numpy()
            whole = Rows(h, capacity, d, e, dtype, seed + i)
            whole.ids[:] = torch.from_numpy(np.arange(1000 * i, 1000 * i + capacity) * (1 + gaps))
            final, after = whole.sorted(c.want, every[i, :, c.want[0][0] : last], nlist)
            final[2][:, last:] = -9
            wanted[i] = final, after
    keep = tables.clone()
    with run.allow(*arena[:3], space, *(() if centroids is None else (centroids.panels, centroids.scales))):
        gpu_seal.seal_batch(run, arena, plan, numbers, centroids, turn, given_lists, space)
    for i, (have, want, kept) in enumerate(spans):
        final, after = wanted[i]
        first, last = want[0][0], want[-1][1]
        for name, x, w in zip(("keys", "values", "ids"), arena[:3], final, strict=True):
            assert torch.equal(x[i, :, first:], w[:, first:]), (name, i)
        assert torch.equal(tables[i, :, kept : len(want)], after[:, kept:])
        others = [*range(kept), *range(len(want), slots)]
        assert torch.equal(tables[i][:, others], keep[i][:, others]) and len(have) >= kept


def test_seal_of_list_numbers_out_of_range_moves_every_row_once() -> None:
    run, n = runtime(SCHEDULES[2]), 90
    rows = Rows(1, n, 32, 32, torch.float16, 0)
    before = rows.ids.clone()
    list_nos = torch.randint(-(2**31), 2**31, (1, n), dtype=torch.int64).int()
    table = torch.empty((1, 1, 8), dtype=torch.int32)
    seal_given(run, rows, [(0, n)], list_nos, table, 1.0)
    assert torch.equal(rows.ids.sort().values, before)
    assert table[0, 0, 0] == 0 and table[0, 0, -1] == n and bool((table.diff() >= 0).all())


def test_seal_by_tables_that_are_none_moves_every_row_once() -> None:
    run, n = runtime(SCHEDULES[2]), 90
    rows = Rows(1, n, 32, 32, torch.float16, 0)
    before = rows.ids.clone()
    tables = torch.randint(-(2**31), 2**31, (1, 1, 4, 8), dtype=torch.int64).int()
    arena = gpu_seal.Arena(*(x[None] for x in rows.parts), tables)
    jobs = [seal_plan.Job(0, 0, n, 0, 3, 0, 3, n, 0, 0)]
    gpu_seal.seal(run, arena, jobs, ints(jobs), gpu_seal.Fresh(None), workspace(arena, jobs, 1.0))
    assert torch.equal(rows.ids.sort().values, before) and bool((tables[0, 0, 3].diff() >= 0).all())


def test_seal_says_what_does_not_fit() -> None:
    run, rows = runtime(SCHEDULES[0]), Rows(1, 40, 32, 32, torch.float16, 0)
    arena = gpu_seal.Arena(*(x[None] for x in rows.parts), torch.empty((1, 1, 1, 5), dtype=torch.int32))
    jobs = [seal_plan.Job(0, 0, 40, 0, 0, 0, 0, 0, 0, -1)]
    lists, space = torch.zeros((1, 40), dtype=torch.int32), workspace(arena, jobs, 0.0)
    with pytest.raises(ValueError, match=f"workspace of {len(space)} bytes"):
        gpu_seal.seal(run, arena, jobs, ints(jobs), gpu_seal.Fresh(lists), space[:-16])
    with pytest.raises(ValueError, match="60000 lists do not fit"):
        gpu_seal.rank_warps(run, 100, 60000)
    with pytest.raises(ValueError, match="up to 256 dims"):
        gpu_build.assign(run, gpu_build.pack_centroids(torch.zeros((1, 1, 264))), torch.zeros((1, 1, 264)), lists, None)


@given(schedules, st.lists(st.integers(1, 300), min_size=1, max_size=6), seeds)
@settings(max_examples=10)
def test_publish(run: EmulatedRuntime, sizes: list[int], seed: int) -> None:
    rng, room = np.random.default_rng(seed), torch.full((sum(sizes) + len(sizes) + 1,), 7, dtype=torch.int32)
    want, writes, at = room.clone(), [], 1
    for i, n in enumerate(sizes):
        numbers = rng.standard_normal(n).astype(np.float32) if i % 2 else rng.integers(-(2**31), 2**31, n).astype(np.int32)
        want[at : at + n] = torch.from_numpy(numbers.view(np.int32))
        writes.append((room[at:].data_ptr(), numbers))
        at += n + 1
    gpu_seal.publish(run, len(writes), torch.from_numpy(gpu_seal.pieces_of(writes)))
    assert torch.equal(room, want)


# -- means -----------------------------------------------------------------------------------------------------------------


@given(dtypes, dims, dims, st.integers(1, 2), st.integers(1, 40), st.integers(1, 2), st.sampled_from(KINDS), seeds)
@settings(max_examples=15)
def test_means(dtype: torch.dtype, d: int, e: int, h: int, nlist: int, s: int, kind: str, seed: int) -> None:
    rng, n, start = np.random.default_rng(seed), 150, 3
    keys, values = random_rows((h, n * s + 9, d), dtype, seed), random_rows((h, n * s + 9, e), dtype, seed + 1)
    tables = np.zeros((h, s, nlist + 1), np.int32)
    for head in range(h):
        for segment in range(s):
            tables[head, segment] = start + n * segment + reference.sort_segment(lists_of(kind, n, nlist, rng), nlist)[1]
    results = []
    for schedule in SCHEDULES[:: max(1, seed % 3)]:
        room = torch.full((h, s + 1, nlist, d), 9.0, dtype=dtype), torch.full((h, s + 1, nlist, e), 9.0, dtype=dtype)
        with runtime(schedule).allow(keys, values):
            parts = keys, values, torch.from_numpy(tables), room[0][:, 1:], room[1][:, 1:]
            gpu_seal.means(runtime(schedule), *(x[None] for x in parts))
        assert (room[0][:, 0] == 9).all() and (room[1][:, 0] == 9).all()
        results.append(room)
        assert same_bits(room[0], results[0][0]) and same_bits(room[1], results[0][1])
    for x, got in zip((keys, values), results[0], strict=True):
        exact, ours, torchs = x.double(), [0.0], [0.0]
        for head, segment, run in np.ndindex(h, s, nlist):
            rows = slice(int(tables[head, segment, run]), int(tables[head, segment, run + 1]))
            mean = got[head, 1 + segment, run].double()
            if rows.start == rows.stop:
                assert not mean.any()
                continue
            want = exact[head, rows].mean(0)
            assert mean.isfinite().all()  # max would pass over NaN
            ours.append(float((mean - want).abs().max()))
            torchs.append(float((x[head, rows].mean(0).double() - want).abs().max()))
        assert max(ours) <= 2 * max(torchs) + 1e-7


def test_means_stay_inside_the_arena_whatever_the_offsets() -> None:
    run, keys = runtime(SCHEDULES[0]), random_rows((1, 20, 32), torch.float16, 0)
    tables = ints([[[-7, 5, 3, 2**31 - 1, -(2**31), 30]]])
    out = torch.empty((1, 1, 5, 32), dtype=torch.float16), torch.empty((1, 1, 5, 32), dtype=torch.float16)
    with run.allow(keys):
        gpu_seal.means(run, *(x[None] for x in (keys, keys, tables, *out)))
    assert torch.isfinite(out[0]).all() and not out[0][0, 0, 1].any()


def test_means_of_some_segments_of_some_sequences() -> None:
    run, dtype, h, nlist, n, d = runtime(SCHEDULES[3]), torch.bfloat16, 2, 5, 60, 40
    rng = np.random.default_rng(0)
    keys, values = random_rows((3, h, n, d), dtype, 0), random_rows((3, h, n, d), dtype, 1)
    offsets = np.sort(rng.integers(0, n + 1, (3, h, 2, nlist + 1)), axis=-1).astype(np.int32)
    tables, due = torch.from_numpy(offsets), [(2, 0), (0, 1), (2, 1)]
    outs = [torch.full((3, h, 2, nlist, d), 9.0, dtype=dtype) for _ in range(2)]
    gpu_seal.means(run, keys, values, tables, *outs, ints(due), len(due))
    for i in range(3):
        alone = [torch.empty((1, h, 2, nlist, d), dtype=dtype) for _ in range(2)]
        gpu_seal.means(run, *(x[i : i + 1] for x in (keys, values, tables)), *alone)
        for s in range(2):
            for x, one in zip(outs, alone, strict=True):
                assert same_bits(x[i, :, s], one[0, :, s]) if (i, s) in due else bool((x[i, :, s] == 9).all())


# -- for sanitizers ------------------------------------------------------------------------------------------------------------


def once() -> None:
    """A small build, every kernel of it: what the sanitizers watch."""
    run, dtype, h, n, d, nlist = EmulatedRuntime("random", 3, 3), torch.bfloat16, 2, 70, 40, 7
    keys, values = random_rows((1, h, n, d), dtype, 0), random_rows((1, h, n, d), dtype, 1)
    arena = [torch.zeros((1, h, n + 5, d), dtype=dtype) for _ in range(2)]
    meta = torch.zeros((1, 8), dtype=torch.int32)
    append_to_meta(run, keys, values, *arena, meta, None, ints([3] * 5))
    assert meta.tolist() == [[n, 0, 0, 0, n, 0, 0, 0]]
    gpu_build.append(run, keys[:, :, :5], values[:, :, :5], *arena, ints([n]), ints([4]), torch.zeros(1, dtype=torch.int32))
    list_nos = torch.empty((h, n), dtype=torch.int32)
    turns = gpu_build.Turns(1e4 ** -torch.arange(0, 1, 2 / d), None, 0, False, 1.0)
    centroids = gpu_build.pack_centroids(random_rows((h, 300, d), torch.float32, 2))  # an odd number of panels
    gpu_build.assign(run, centroids, arena[0][0, :, :n], list_nos, turns, 64)
    centroids = gpu_build.pack_centroids(random_rows((h, nlist, d), torch.float32, 3))
    ids = torch.arange(n + 5, dtype=torch.int32).repeat(1, h, 1)
    parts = gpu_seal.Arena(*arena, ids, torch.empty((1, h, 3, nlist + 1), dtype=torch.int32))
    for have, want in (([], [(2, 20), (20, 34)]), ([(2, 20), (20, 34)], [(2, 34), (34, n - 2)])):  # sealed, then merged
        fresh = np.arange(have[-1][1] if have else 2, want[-1][1])
        plan = seal_plan.planned([SegmentChange(0, 0, have, want, fresh, 1)])
        numbers = torch.from_numpy(plan.numbers)
        space = workspace(parts, plan.jobs, 0.5, gpu_seal.aligned(4 * h * plan.fresh))
        gpu_seal.seal_batch(run, parts, plan, numbers, centroids, Frequencies(turns.inv_freq, False, 1.0), None, space)
        means = [torch.empty((1, h, 2, nlist, d), dtype=dtype) for _ in range(2)]
        gpu_seal.means(run, *parts[:2], parts.tables, *means, numbers[plan.means_at :], plan.means)
    gpu_seal.publish(run, 1, torch.from_numpy(gpu_seal.pieces_of([(meta.data_ptr(), np.arange(8, dtype=np.int32))])))
    assert meta.tolist() == [list(range(8))]
