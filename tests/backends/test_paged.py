"""Operations on pages that somebody else owns, against dense attention, the specification and the arena's path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_scenes import SCENES, SEEDS, Scene, close, pool, prepared, routing, scene

from saap_index import reference
from saap_index.backends import get_backend, get_paged
from saap_index.backends.paged import PagedBackend, PagedBatch, Pages
from saap_index.backends.paged_reference import row_numbers, rows_of
from saap_index.errors import LayoutError, LengthError, SaapError, ShapeError
from saap_index.invlists.octaves import octaves

_cpu = pytest.importorskip("saap_index._cpu", reason="the native kernels were not built")
CPU = torch.device("cpu")
BACKENDS = {name: get_paged(get_backend(CPU, name)) for name in ("reference", "torch", "cpu")}


@pytest.fixture(params=_cpu.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs on each instruction set that this processor has."""
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield
    _cpu.set_isa(before)


@given(SCENES)
@settings(max_examples=40)
def test_runs_are_counted(scene: Scene) -> None:
    tables = {name: x.count(*prepared(x, scene), scene.nlist) for name, x in BACKENDS.items()}
    for i, s in enumerate(scene.batch.num_segments):
        for name, found in tables.items():
            assert torch.equal(found[i, :, :s], tables["reference"][i, :, :s]), name
        for head in range(scene.heads):
            sizes = tables["cpu"][i, head, :s].diff(dim=1).sum(0)
            low, high = int(scene.batch.bounds[i, 0]), int(scene.batch.bounds[i, s])
            assert torch.equal(sizes.long(), scene.lists[i, head, low:high].bincount(minlength=scene.nlist)) or not s


@given(SCENES, st.floats(0, 1), SEEDS)
@settings(max_examples=40)
def test_tokens_of_chosen_runs_are_found(scene: Scene, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    want = BACKENDS["reference"]
    tables = want.count(*prepared(want, scene), scene.nlist)
    b, h = len(scene.batch.lengths), scene.heads
    chosen = []
    for i, s in enumerate(scene.batch.num_segments):
        for head in range(h):
            numbers = []
            ends = tables[i, head, :s]
            for low, high in zip(ends[:, :-1].flatten().tolist(), ends[:, 1:].flatten().tolist(), strict=True):
                if rng.random() < share:
                    numbers += range(int(rng.integers(low, high + 1)) if rng.random() < 0.3 else low, high)
            chosen.append(numbers)
    t = max(map(len, chosen))
    numbers = torch.tensor([x + [-1] * (t - len(x)) for x in chosen], dtype=torch.int32).view(b, h, t)
    counts = torch.tensor([len(x) for x in chosen], dtype=torch.int32).view(b, h)
    for given_ in ((numbers, counts), (None, None)):
        rows, taken = want.find(*prepared(want, scene), tables, *given_)
        for name, backend in BACKENDS.items():
            found, number = backend.find(*prepared(backend, scene), tables, *given_)
            assert torch.equal(number, taken), name
            for i, length in enumerate(scene.batch.lengths):
                s = scene.batch.num_segments[i]
                behind = length - int(scene.batch.bounds[i, s]) if s else length
                for head in range(h):
                    n = int(taken[i, head])
                    a, z = found[i, head, :n].tolist(), rows[i, head, :n].tolist()
                    assert sorted(a) == sorted(z) and a[n - behind :] == z[n - behind :], name


@given(SCENES, st.floats(0, 1), SEEDS)
@settings(max_examples=25)
def test_sampled_tokens_are_found_with_their_biases(scene: Scene, share: float, seed: int) -> None:
    """Any rows of any runs, and 0 for tokens outside the segments."""
    draw, (b, h) = torch.Generator().manual_seed(seed), (len(scene.batch.lengths), scene.heads)
    want = BACKENDS["reference"]
    tables = want.count(*prepared(want, scene), scene.nlist)
    sealed = [int(x[s] - x[0]) for x, s in zip(scene.batch.bounds, scene.batch.num_segments, strict=True)]
    chosen = [torch.nonzero(torch.rand(n, generator=draw) < share)[:, 0].int() for n in sealed for _ in range(h)]
    counts = torch.tensor(list(map(len, chosen)), dtype=torch.int32).view(b, h)
    numbers = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-1).view(b, h, -1)
    biases = torch.rand(numbers.shape, generator=draw) + 1
    rows, taken, raised = want.find_biased(*prepared(want, scene), tables, numbers, counts, biases)
    assert raised is not None
    for name, backend in BACKENDS.items():
        found, number, own = backend.find_biased(*prepared(backend, scene), tables, numbers, counts, biases)
        assert torch.equal(number, taken) and own is not None, name
        for i, head in np.ndindex(b, h):
            n = int(taken[i, head])
            both = ((rows, raised), (found, own))
            pairs, same = (dict(zip(x[i, head, :n].tolist(), y[i, head, :n].tolist(), strict=True)) for x, y in both)
            assert same == pairs and sum(map(bool, pairs.values())) == counts[i, head], name
            behind = scene.batch.lengths[i] - sealed[i] - int(scene.batch.bounds[i, 0]) if sealed[i] else scene.batch.lengths[i]
            assert torch.equal(found[i, head, n - behind : n], rows[i, head, n - behind : n]), name


@given(SCENES, st.integers(1, 5), st.integers(1, 8), st.booleans(), SEEDS)
@settings(max_examples=40)
def test_scan_of_all_rows_is_dense_attention(scene: Scene, g: int, q: int, causal: bool, seed: int) -> None:
    b, h, _, d = scene.keys.shape
    dtype = scene.keys.dtype
    queries = torch.randn((b, h, g, q, d), generator=torch.Generator().manual_seed(seed)).to(dtype)
    for name, backend in BACKENDS.items():
        pages, batch = prepared(backend, scene)
        tables = torch.empty((b, h, scene.batch.bounds.shape[1] - 1, scene.nlist + 1), dtype=torch.int32)
        rows, counts = backend.find(pages, batch, tables, None, None)
        out, lse = backend.scan(pages, queries, rows, counts, d**-0.5, causal)
        for i, n in enumerate(scene.batch.lengths):
            limit = n - q + 1 + np.arange(q) if causal else np.full(q, n)
            seen = np.tile(np.arange(n)[None] < limit[:, None], (g, 1))
            for head in range(h):
                k, v = (x[i, head, :n].double().numpy() for x in (scene.keys, scene.values))
                x = queries[i, head].double().numpy().reshape(g * q, d)
                want, want_lse = (torch.from_numpy(y) for y in reference.attend(x, k, v, d**-0.5, seen))
                assert close(out[i, head].reshape(g * q, d), want, dtype), name
                assert close(lse[i, head].flatten(), want_lse, dtype), name


@given(SCENES, st.integers(1, 4), st.integers(1, 3), st.sampled_from([0.0, 0.05, 0.3, 1.0]), SEEDS)
@settings(max_examples=40)
def test_search_is_that_of_an_arena(scene: Scene, g: int, q: int, share: float, seed: int) -> None:
    """The same tokens in an arena, sorted in the same segments: routed, probed and scanned there."""
    b, h, _, d = scene.keys.shape
    dtype = scene.keys.dtype
    queries = torch.randn((b, h, g, q, d), generator=torch.Generator().manual_seed(seed)).to(dtype)
    arena = get_backend(CPU, "cpu")
    keys, values, ids = scene.keys.clone(), scene.values.clone(), torch.zeros(scene.keys.shape[:3], dtype=torch.int32)
    most = scene.batch.bounds.shape[1] - 1
    tables = torch.zeros((b, h, most, scene.nlist + 1), dtype=torch.int32)
    sinks, sealed, knots = [], [], torch.zeros((b, most))
    for i, (n, s) in enumerate(zip(scene.batch.lengths, scene.batch.num_segments, strict=True)):
        bounds = scene.batch.bounds[i].tolist()
        for k in range(s):
            low, high = bounds[k], bounds[k + 1]
            nos = scene.lists[i, :, low:high].int().contiguous()
            table = torch.empty((h, scene.nlist + 1), dtype=torch.int32)
            arena.seal(keys[i], values[i], ids[i], low, nos, table)
            tables[i, :, k] = table
            knots[i, k] = float(np.clip(np.log2(max(1.0, n - 1 - (low + high - 1) / 2)) - 4, 0, 4))
        sinks.append(bounds[0] if s else 0)
        sealed.append(bounds[s] if s else 0)
    way = routing(BACKENDS["cpu"], scene, share, seed)
    z, a = arena.route(way.router, queries, None)
    found = arena.probe(z, a, knots, tables, scene.batch.num_segments, way.budget, True)
    spans = sinks, sealed, scene.batch.lengths
    want, want_lse = arena.scan(queries, keys, values, found.rows, found.counts, *spans, d**-0.5, True)
    backend = BACKENDS["cpu"]
    pages, batch = prepared(backend, scene)
    out, lse, read = backend.search(pages, batch, way, queries, d**-0.5)
    assert close(out, want, dtype) and close(lse, want_lse, torch.float32)
    always = sum(n - (m - s) for s, m, n in zip(*spans, strict=True))
    assert read == int(found.counts.sum()) + h * always


KINDS = st.sampled_from([(0, None, None), (2, None, None), (0, 0.2, None), (0, None, 0.5)])  # nprobe, miss and sampled


@given(SCENES, st.integers(1, 4), st.sampled_from([0.0, 0.05, 0.3, 1.0]), KINDS, SEEDS)
@settings(max_examples=30)
def test_search_in_one_call_is_its_parts(
    scene: Scene, g: int, share: float, kind: tuple[int, float | None, float | None], seed: int
) -> None:
    """The one call of the kernels, their parts one after the other, and the same on torch and of the specification."""
    b, h, _, d = scene.keys.shape
    dtype = scene.keys.dtype
    queries = torch.randn((b, h, g, 1, d), generator=torch.Generator().manual_seed(seed))
    cpu = BACKENDS["cpu"]
    pages, batch = prepared(cpu, scene)
    way = routing(cpu, scene, share, seed, *kind)
    own = torch.full((b, h, g, 1, d), float("nan"))
    out, lse, read = cpu.search(pages, batch, way, queries, d**-0.5, own)
    assert out is own

    class Parts(type(cpu)):  # type: ignore[misc]
        search = PagedBackend.search

    class Plan(PagedBatch):
        handle, plan = batch.handle, scene.batch

    plan = Plan(**vars(scene.batch))
    same = Parts(cpu.backend).search(pages, plan, way, queries, d**-0.5)
    assert torch.equal(out, same[0]) and torch.equal(lse, same[1]) and read == same[2]
    for name in ("torch", "reference"):
        backend = BACKENDS[name]
        other = backend.search(*prepared(backend, scene), routing(backend, scene, share, seed, *kind), queries, d**-0.5)
        if kind[1] is None:  # a target may end in another run where sums round differently
            assert other[2] == read, name
            assert close(out, other[0], dtype if share in (0.0, 1.0) else torch.bfloat16), name


@given(SCENES, SEEDS)
@settings(max_examples=20)
def test_tokens_are_written_where_their_slots_say(scene: Scene, seed: int) -> None:
    """Keys, values and list numbers, some tokens without a slot; other rows stay as they are."""
    rng = np.random.default_rng(seed)
    blocks, h, size, d = scene.pages.keys.shape
    n = int(rng.integers(1, blocks * size))
    slots = torch.from_numpy(rng.permutation(blocks * size)[:n].copy())
    slots[torch.from_numpy(rng.random(n) < 0.2)] = -1
    dtype = scene.keys.dtype
    both = torch.randn((n, h, 2 * d), generator=torch.Generator().manual_seed(seed)).to(dtype)
    keys, values = both[..., :d], both[..., d:]
    centroids = torch.randn((h, scene.nlist, d), generator=torch.Generator().manual_seed(seed + 1))
    for name, backend in BACKENDS.items():
        mine = pool(blocks, h, size, d, d, dtype, "HND")
        mine.lists.fill_(0)
        backend.write(backend.prepare_pages(mine), keys, values, slots, backend.backend.prepare_quantizer(centroids), None)
        lists = backend.backend.assign(backend.backend.prepare_quantizer(centroids), keys.transpose(0, 1), None)
        held = slots >= 0
        page, place = slots[held] // size, slots[held] % size
        assert torch.equal(mine.keys[page, :, place], keys[held]) and torch.equal(mine.values[page, :, place], values[held]), name
        assert torch.equal(mine.lists[page, :, place], lists.T[held].to(torch.uint8)), name
        assert int(mine.keys.isfinite().all(-1).sum()) == h * int(held.sum()), name


@given(st.integers(0, 100_000), st.integers(0, 8), st.sampled_from([0, 8, 100, 128, 256]))
def test_octaves_know_their_distance(length: int, sinks: int, window: int) -> None:
    bounds = octaves(length, sinks, window)
    recent = max(window, 8)
    if length <= sinks + recent:
        assert bounds == []
        return
    assert bounds[0] == sinks and bounds[-1] == length - recent and bounds == sorted(set(bounds))
    for low, high in pairwise(bounds):
        nearest, farthest = length - high, length - low
        assert farthest <= 2.5 * nearest + 1


def test_row_numbers_are_places_in_the_pool() -> None:
    for order in ("HND", "NHD"):
        x = scene([130], 2, 32, 8, 5, 0, order=order)
        numbers = row_numbers(x.pages, x.batch.blocks[0], torch.arange(130))
        assert int(numbers.max()) < x.pages.num_rows
        for head in range(2):
            assert torch.equal(rows_of(x.pages.keys, x.pages.row, head, numbers), x.keys[0, head])


def test_what_does_not_fit_is_refused() -> None:
    cpu, x = BACKENDS["cpu"], scene([300, 200], 2, 32, 8, 5, 0)
    k, v, lists = x.pages.keys, x.pages.values, x.pages.lists
    with pytest.raises(ShapeError, match="lists"):
        Pages(k, v, lists[:, :1])
    with pytest.raises(LayoutError, match="strides"):
        Pages(k, v.contiguous(), lists)
    with pytest.raises(LengthError, match="32 bits"):
        rows = torch.empty_strided((2**29, 1, 16, 8), (128, 128, 8, 1), dtype=torch.float32, device="meta")
        Pages(rows, rows, torch.empty((2**29, 1, 16), dtype=torch.uint8, device="meta"))
    with pytest.raises(LengthError, match="num_segments"):
        replace(x.batch, num_segments=[99, 0])
    with pytest.raises(SaapError):
        replace(x.batch, num_segments=[1])
    pages, batch = prepared(cpu, x)
    x.pages.lists[int(x.batch.blocks[0, 1])] = 5
    for name, backend in BACKENDS.items():
        with pytest.raises(IndexError, match=r"\[0, 5\)"):
            backend.count(*prepared(backend, x), 5)
        assert name
    x.pages.lists[int(x.batch.blocks[0, 1])] = 1
    tables = cpu.count(pages, batch, 5)
    one = torch.ones((2, 2), dtype=torch.int32)
    run = int(tables[0, 0, 0, 2])  # the last of a run is run - 1: a number alone that is not
    with pytest.raises(IndexError, match="without biases the last of runs"):
        cpu.find(pages, batch, tables, torch.full((2, 2, 1), run - 2, dtype=torch.int32), one)
    x.pages.lists[int(x.batch.blocks[0, 1])] = 3  # other lists than were counted
    with pytest.raises(IndexError, match="still what was counted"):
        cpu.find(pages, batch, tables, torch.arange(run, dtype=torch.int32).expand(2, 2, -1).contiguous(), run * one)
    for change in ({"lengths": [3000, 200]}, {"bounds": x.batch.bounds.flip(1)}, {"blocks": x.batch.blocks.clamp(min=1000)}):
        bad = cpu.prepare_batch(replace(x.batch, **change))
        with pytest.raises(IndexError, match="pages: "):
            cpu.count(pages, bad, 5)
    q = torch.zeros((2, 2, 1, 1, 8))
    with pytest.raises(ShapeError, match="router"):
        cpu.search(pages, batch, replace(routing(cpu, x, 0.1, 0), nlist=4), q, 1.0)
    with pytest.raises(IndexError, match="row number"):
        cpu.scan(pages, q, torch.full((2, 2, 1), x.pages.num_rows, dtype=torch.int32), one, 1.0, True)
    with pytest.raises(IndexError, match="slot"):
        cpu.write(pages, torch.zeros(1, 2, 8), torch.zeros(1, 2, 8), torch.tensor([len(k) * 32]), None, None)
