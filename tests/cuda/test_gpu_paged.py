"""Operations on pages as CUDA kernels, on the emulator, against the specification; every step of an engine against its parts."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import emulated as emulated_graphs
import numpy as np
import pytest
import torch
from emu.runtime import EmulatedRuntime, available
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_scenes import SEEDS, Scene, close, pool, prepared, routing, scene, scenes, weights_of

from saap_index.backends import Budget, Frequencies, get_backend, get_paged
from saap_index.backends.cuda import paged as gpu_paged
from saap_index.backends.cuda.backend import CudaBackend
from saap_index.backends.cuda.paged import PagedCuda
from saap_index.backends.cuda.paged_session import PagedLayer, PagedSession, PagedSizes, rows_read
from saap_index.backends.cuda.route import PackedRouter
from saap_index.backends.paged import PagedBatch, PagedRouting, Pages
from saap_index.errors import LayoutError, ParameterError
from saap_index.invlists.octaves import octaves

pytestmark = pytest.mark.skipif(not available(), reason="needs a C++ compiler")

CPU = torch.device("cpu")
REFERENCE = get_paged(get_backend(CPU, "reference"))
SCHEDULES = st.sampled_from([("fifo", 0, 2), ("lifo", 0, 3), ("random", 1, 1), ("random", 2, 4)])
PARTS = st.sampled_from([1, 2, 5])
SCENES = st.one_of(*(scenes(st.just(d), st.just(dtype)) for d, dtype in ((24, torch.bfloat16), (8, torch.float32))))
"""Two shapes of rows: every one is a build of the scan."""

SMALL = {"select": {"SAAP_THREADS": 64, "SAAP_COLUMNS": 4}, "scan": {"SAAP_WARPS": 2, "SAAP_STAGES": 3, "SAAP_GROUPS": 1}}


@cache
def emulated(schedule: tuple[str, int, int], parts: int) -> PagedCuda:
    """parts : slices of every sequence, which a device with more of everything would cut it into."""
    runtime = EmulatedRuntime(*schedule)
    runtime.multiprocessors = 2 if parts == 1 else 3 * parts

    class Cut(PagedCuda):
        parts_of = staticmethod(lambda runtime, sequences, heads, most_tokens: parts)

    paged = get_paged(CudaBackend(CPU, runtime, SMALL))
    assert type(paged) is PagedCuda
    return Cut(paged.backend)


@given(SCENES, SCHEDULES, PARTS)
@settings(max_examples=12)
def test_runs_are_counted(scene: Scene, schedule: tuple[str, int, int], parts: int) -> None:
    want = REFERENCE.count(*prepared(REFERENCE, scene), scene.nlist)
    cuda = emulated(schedule, parts)
    pages, batch = prepared(cuda, scene)
    found = cuda.count(pages, batch, scene.nlist)
    for i, s in enumerate(scene.batch.num_segments):
        assert torch.equal(found[i, :, :s], want[i, :, :s])


@given(SCENES, st.floats(0, 1), SCHEDULES, PARTS, SEEDS)
@settings(max_examples=15)
def test_tokens_of_chosen_runs_are_found(
    scene: Scene, share: float, schedule: tuple[str, int, int], parts: int, seed: int
) -> None:
    """The same rows as the specification, in the order of positions: first, chosen and newest tokens."""
    rng = np.random.default_rng(seed)
    tables = REFERENCE.count(*prepared(REFERENCE, scene), scene.nlist)
    b, h = len(scene.batch.lengths), scene.heads
    chosen = []
    for i, s in enumerate(scene.batch.num_segments):
        for head in range(h):
            numbers: list[int] = []
            ends = tables[i, head, :s]
            for low, high in zip(ends[:, :-1].flatten().tolist(), ends[:, 1:].flatten().tolist(), strict=True):
                if rng.random() < share:
                    numbers += range(int(rng.integers(low, high + 1)) if rng.random() < 0.3 else low, high)
            chosen.append(numbers)
    t = max(map(len, chosen))
    numbers_ = torch.tensor([x + [-1] * (t - len(x)) for x in chosen], dtype=torch.int32).view(b, h, t)
    counts = torch.tensor([len(x) for x in chosen], dtype=torch.int32).view(b, h)
    cuda = emulated(schedule, parts)
    for given_ in ((numbers_, counts), (None, None)):
        want, taken = REFERENCE.find(*prepared(REFERENCE, scene), tables, *given_)
        found, number = cuda.find(*prepared(cuda, scene), tables, *given_)
        assert torch.equal(number, taken)
        for i, head in np.ndindex(b, h):
            n = int(taken[i, head])
            assert torch.equal(found[i, head, :n], want[i, head, :n])


@given(SCENES, st.integers(1, 5), st.integers(1, 8), st.booleans(), st.floats(0, 1), SCHEDULES, SEEDS)
@settings(max_examples=12)
def test_rows_of_the_pool_are_scanned(
    scene: Scene, g: int, q: int, causal: bool, share: float, schedule: tuple[str, int, int], seed: int
) -> None:
    """Lists in any order, of any length, also of fewer rows than there are queries; what they do not name is NaN."""
    b, h, _, d = scene.keys.shape
    queries = torch.randn((b, h, g, q, d), generator=torch.Generator().manual_seed(seed)).to(scene.keys.dtype)
    want = REFERENCE
    rows, counts = want.find(*prepared(want, scene), torch.empty((b, h, 0, 2), dtype=torch.int32), None, None)
    counts = (counts * share).int()
    expected, lse = want.scan(scene.pages, queries, rows, counts, d**-0.5, causal)
    cuda = emulated(schedule, 1)
    found, found_lse = cuda.scan(cuda.prepare_pages(scene.pages), queries, rows, counts, d**-0.5, causal)
    assert close(found, expected, scene.keys.dtype) and close(found_lse, lse, torch.float32)


@given(SCENES, st.integers(1, 4), st.integers(1, 3), st.sampled_from([0.0, 0.05, 0.3, 1.0]), SCHEDULES, PARTS, SEEDS)
@settings(max_examples=10)
def test_search_is_that_of_the_specification(
    scene: Scene, g: int, q: int, share: float, schedule: tuple[str, int, int], parts: int, seed: int
) -> None:
    b, h, _, d = scene.keys.shape
    queries = torch.randn((b, h, g, q, d), generator=torch.Generator().manual_seed(seed)).to(scene.keys.dtype)
    cuda, results = emulated(schedule, parts), []
    for backend in (REFERENCE, cuda):
        results.append(backend.search(*prepared(backend, scene), routing(backend, scene, share, seed), queries, d**-0.5))
    assert results[0][2] == results[1][2]
    if share in (0.0, 1.0):  # else runs whose weights are equal but for rounding may change places: the router is fp16 here
        assert close(results[0][0], results[1][0], scene.keys.dtype)


@given(SCENES, SCHEDULES, SEEDS)
@settings(max_examples=10)
def test_tokens_are_written_where_their_slots_say(scene: Scene, schedule: tuple[str, int, int], seed: int) -> None:
    """Some without a slot, or with one that is not there; rows from any address; other rows stay as they are."""
    rng = np.random.default_rng(seed)
    blocks, h, size, d = scene.pages.keys.shape
    n, dtype, cuda = int(rng.integers(1, min(blocks * size, 60))), scene.keys.dtype, emulated(schedule, 1)
    slots = torch.from_numpy(rng.permutation(blocks * size)[:n].copy())
    outside = torch.from_numpy(rng.random(n) < 0.2)
    slots[outside] = torch.from_numpy(rng.choice([-1, -(2**40), blocks * size, 2**40], n))[outside]
    odd = int(rng.integers(0, 2))
    both = torch.randn((n, h, 2 * d + 1), generator=torch.Generator().manual_seed(seed)).to(dtype)[..., odd:]
    keys, values = both[..., :d], both[..., d : 2 * d]
    centroids = torch.randn((h, scene.nlist, d), generator=torch.Generator().manual_seed(seed + 1))
    quantizer = cuda.backend.prepare_quantizer(centroids)
    for lists in (True, False):
        mine = pool(blocks, h, size, d, d, dtype, "NHD" if odd else "HND")
        mine.lists.fill_(7)
        cuda.write(cuda.prepare_pages(mine), keys, values, slots, quantizer if lists else None, None)
        held = ~outside
        page, place = slots[held] // size, slots[held] % size
        assert torch.equal(mine.keys[page, :, place], keys[held]) and torch.equal(mine.values[page, :, place], values[held])
        assert int(mine.keys.isfinite().all(-1).sum()) == h * int(held.sum())
        want = cuda.backend.assign(quantizer, keys.transpose(0, 1), None).T[held].to(torch.uint8)
        assert torch.equal(mine.lists[page, :, place], want if lists else torch.full_like(want, 7))
        mine.lists[page, :, place] = 7
        assert bool((mine.lists == 7).all())


def test_what_the_kernels_cannot_read_is_refused() -> None:
    cuda, x = emulated(("fifo", 0, 2), 1), scene([300, 200], 2, 32, 8, 5, 0)
    with pytest.raises(LayoutError, match="multiple of 16 tokens"):
        cuda.prepare_pages(pool(4, 2, 24, 8, 8, torch.float32, "HND"))
    with pytest.raises(LayoutError, match="multiples of 8"):
        cuda.prepare_pages(pool(4, 2, 32, 12, 12, torch.float32, "HND"))
    x.pages.lists[int(x.batch.blocks[0, 1])] = 5
    with pytest.raises(IndexError, match=r"\[0, 5\)"):
        cuda.count(*prepared(cuda, x), 5)


def test_structs_are_those_of_the_kernels() -> None:
    runtime = EmulatedRuntime()
    for name in ("plan", "count", "find", "write"):
        layout = getattr(gpu_paged, f"{name.upper()}_PARAMS")
        assert runtime.kernel(gpu_paged.FILE, f"saap_paged_{name}", gpu_paged.MACROS).sizeof(f"paged_{name}") == layout.itemsize


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0.05, 1.0])
def test_on_a_device(share: float) -> None:
    """The same on a real one, in as many slices as it takes; what is written there too."""
    x, device = scene([40_000, 70, 9000], 2, 32, 64, 256, 0, torch.bfloat16, sinks=4, window=128), torch.device("cuda")
    cuda = get_paged(get_backend(device))
    assert isinstance(cuda, PagedCuda)
    there = Pages(*(y.to(device) for y in vars(x.pages).values()))
    pages, batch = cuda.prepare_pages(there), cuda.prepare_batch(x.batch)
    tables = REFERENCE.count(*prepared(REFERENCE, x), x.nlist)
    found = cuda.count(pages, batch, x.nlist).cpu()
    assert all(torch.equal(found[i, :, :s], tables[i, :, :s]) for i, s in enumerate(x.batch.num_segments))
    queries = torch.randn((3, 2, 4, 2, 64), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    way, here = routing(cuda, x, share, 0), routing(REFERENCE, x, share, 0)
    router = PackedRouter(*(y.to(device) if isinstance(y, torch.Tensor) else y for y in vars(way.router).values()))
    budget = Budget(way.budget.rows.to(device), 0, None)
    out, lse, read = cuda.search(pages, batch, replace(way, router=router, budget=budget), queries.to(device), 0.125)
    want, want_lse, rows = REFERENCE.search(*prepared(REFERENCE, x), here, queries, 0.125)
    assert read == rows and bool(out.isfinite().all())
    if share == 1:
        assert close(out.cpu(), want, torch.bfloat16) and close(lse.cpu(), want_lse, torch.bfloat16)


# -- steps of an engine ---------------------------------------------------------------------------------------------------


H, G, D, L = 2, 2, 24, 33
SPARED = 3, 32, 70
"""Sinks, recent tokens, break-even."""


def session(cuda: PagedCuda, selectivity: float, queries: int = 3, miss: float | None = None) -> PagedSession:
    layers = []
    for place in range(2):
        weights = weights_of(H, D, L, 5, place)
        rope = Frequencies(torch.rand(D // 4, generator=torch.Generator().manual_seed(1)), False, 1.0)
        unread = None if miss is None else torch.full((H,), miss)
        layers.append(PagedLayer(place, cuda.backend.prepare_router(weights), 4, True, rope if place else None, unread))
    segments = max(len(octaves(n, *SPARED[:2])) for n in range(701)) - 1
    shares = np.array([[0.5, 1.5], [1.0, 1.0]], np.float32)
    rows = rows_read(shares, selectivity, 700, SPARED)
    sizes = PagedSizes(3, 700, segments, queries, rows, H, G, D, D, torch.bfloat16)
    return PagedSession(cuda, sizes, layers, shares, selectivity, SPARED)


def of_lengths(lengths: list[int], seed: int, size: int = 16) -> Scene:
    return scene(lengths, H, size, D, L, seed, torch.bfloat16, "NHD", SPARED[0], SPARED[1])


@given(st.lists(st.integers(0, 700), min_size=1, max_size=3), st.floats(0.01, 1), SCHEDULES)
@settings(max_examples=15)
def test_a_plan_is_that_of_octaves(lengths: list[int], selectivity: float, schedule: tuple[str, int, int]) -> None:
    steps = session(emulated(schedule, 1), selectivity)
    steps._tickets.fill_(3)
    plan = steps.plan(2, torch.tensor(lengths, dtype=torch.int32), torch.zeros((len(lengths), 44), dtype=torch.int32))
    assert not steps._tickets.any()
    for i, n in enumerate(lengths):
        bounds = octaves(n, *SPARED[:2]) if n >= SPARED[2] else []
        low, high = (bounds[0], bounds[-1]) if bounds else (0, 0)
        assert plan.meta[i].tolist() == [n, low, high, max(0, len(bounds) - 1), n, 0, 0, 0]
        assert plan.bounds[i, : len(bounds)].tolist() == bounds and plan.bounds[i, len(bounds) :].eq(high).all()
        assert plan.centres[i, : max(0, len(bounds) - 1)].tolist() == [(a + b - 1) / 2 for a, b in pairwise(bounds)]
        for layer, shares in enumerate(([0.5, 1.5], [1.0, 1.0])):
            wanted = [min(high - low, int(np.ceil(selectivity * x * (high - low) - 1e-6))) for x in shares]
            assert plan.budgets[layer][i].tolist() == wanted
            assert max(wanted) + n - (high - low) <= steps.sizes.rows


@given(
    st.lists(st.integers(3, 700), min_size=1, max_size=3), st.integers(1, 3), st.sampled_from([0.05, 0.4, 1.0]),
    st.sampled_from([None, 0.2]), SCHEDULES, PARTS, SEEDS,
)
@settings(max_examples=12)
def test_a_step_is_a_search(
    lengths: list[int], q: int, selectivity: float, miss: float | None, schedule: tuple[str, int, int], parts: int, seed: int
) -> None:
    """What a session computes for every layer is what the seam's parts compute, one after the other."""
    cuda, x = emulated(schedule, parts), of_lengths(lengths, seed)
    steps = session(cuda, selectivity, miss=miss)
    pool_, b = cuda.prepare_pages(x.pages), len(lengths)
    queries = torch.randn((b, H, G, q, D), generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    blocks = x.batch.blocks
    plan = steps.plan(q, torch.tensor(lengths, dtype=torch.int32), blocks)
    ends = [octaves(n, *SPARED[:2]) if n >= SPARED[2] else [] for n in lengths]
    bounds = torch.zeros((b, steps.sizes.segments + 1), dtype=torch.int32)
    for row, some in zip(bounds, ends, strict=True):
        row[: len(some)] = torch.tensor(some, dtype=torch.int32)
        row[len(some) :] = some[-1] if some else 0
    batch = cuda.prepare_batch(PagedBatch(blocks, lengths, bounds, [max(0, len(e) - 1) for e in ends]))
    read = stored = 0
    for layer in steps.layers:
        out = torch.full((b, H, G, q, D), float("nan"), dtype=torch.bfloat16)
        steps.run(plan, layer, pool_, queries, D**-0.5, out)
        rotation = None if layer.rope is None else layer.rope.before(lengths, q)
        budget = Budget(plan.budgets[layer.place].clone(), 0, layer.unread_mass)
        way = PagedRouting(layer.router, L, layer.first_knot, True, rotation, budget)
        want, _, rows = cuda.search(pool_, batch, way, queries, D**-0.5)
        assert close(out, want, torch.bfloat16)
        whole = sum(n for n, e in zip(lengths, ends, strict=True) if not e)
        read, stored = read + rows - H * whole, stored + H * (sum(lengths) - whole)
    sparse = sum(map(bool, ends))
    assert steps.totals.tolist() == [2 * q * sparse, 2 * q * (b - sparse), q * read, q * stored]


def test_a_captured_step_follows_lengths_and_pages() -> None:
    """Replays read lengths, pages and rows of that time; sequences of no tokens, whatever their pages say, are nothing to do."""
    runtime = emulated_graphs.register("cuda-paged")
    cuda = get_paged(get_backend(CPU, "cuda-paged"))
    assert isinstance(cuda, PagedCuda)
    steps, x = session(cuda, 0.3, 1), of_lengths([640, 300], 3)
    pool_, blocks = cuda.prepare_pages(x.pages), torch.full((3, x.batch.blocks.shape[1]), 10**6, dtype=torch.int32)
    lengths, queries = torch.zeros(3, dtype=torch.int32), torch.zeros((3, H, G, 1, D), dtype=torch.bfloat16)
    outs = [torch.zeros_like(queries) for _ in steps.layers]

    def step() -> None:
        plan = steps.plan(1, lengths, blocks)
        for layer, out in zip(steps.layers, outs, strict=True):
            steps.run(plan, layer, pool_, queries, D**-0.5, out)

    step()
    assert all(not out.any() for out in outs)
    with runtime.capture() as graph:
        step()
    kernels = ["saap_paged_count", "saap_route", "saap_select", "saap_paged_find", "saap_scan"]
    assert graph.names == ["saap_paged_plan", *kernels, *kernels]
    for some in ([640, 300, 0], [65, 0, 200]):
        lengths[:] = torch.tensor(some, dtype=torch.int32)
        blocks[:2], blocks[2] = x.batch.blocks, x.batch.blocks[1]
        queries.normal_(generator=torch.Generator().manual_seed(sum(some)))
        graph.replay()
        replayed = [out.clone() for out in outs]
        assert all(out[i].any() == bool(n) for out in replayed for i, n in enumerate(some))
        step()
        assert all(torch.equal(a, b) for a, b in zip(replayed, outs, strict=True))


def test_what_a_session_is_not_made_for_is_refused() -> None:
    cuda, x = emulated(("fifo", 0, 2), 1), of_lengths([100], 0)
    steps = session(cuda, 0.3)
    assert steps.num_bytes > 0
    with pytest.raises(ParameterError, match="up to 3 queries"):
        steps.plan(4, torch.zeros(1, dtype=torch.int32), x.batch.blocks)
    plan = steps.plan(1, torch.tensor([100], dtype=torch.int32), x.batch.blocks)
    for wrong in (torch.zeros((1, H, G + 1, 1, D), dtype=torch.bfloat16), torch.zeros((1, H, G, 1, D))):
        with pytest.raises(ParameterError, match="queries"):
            steps.run(plan, steps.layers[0], cuda.prepare_pages(x.pages), wrong, 1.0, torch.empty_like(wrong))
    with pytest.raises(ParameterError, match="queries"):
        session(cuda, 0.3, 9)


# -- sanitizers -----------------------------------------------------------------------------------------------------------


def once() -> None:
    """What the sanitizers watch: sequences in several slices and in none, several blocks at once. The other kernels of a step
    have tests of their own."""
    cuda, x = emulated(SCHEDULE, 5), of_lengths([690, 33, 200], 1)
    pages, batch = prepared(cuda, x)
    tables = cuda.count(pages, batch, L)
    numbers = torch.arange(0, 150, dtype=torch.int32).expand(3, H, -1).contiguous()
    cuda.find(pages, batch, tables, numbers, torch.tensor([[150, 7], [0, 0], [90, 150]], dtype=torch.int32))
    keys = torch.randn((9, H, D)).to(torch.bfloat16)
    cuda.write(pages, keys, keys, torch.arange(9), None, None)


SCHEDULE = "random", 2, 4
