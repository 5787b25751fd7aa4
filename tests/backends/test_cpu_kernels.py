"""The compiled kernels against float64 computations written out here, over shapes, types, thread counts and instruction sets.

Tolerance: the error against float64 may be twice that of torch computing the same in that storage type, plus rounding noise.
"""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from torch import Tensor

from saap_index.backends.cpu import CpuBackend
from saap_index.backends.types import Budget, Rotation, Tail
from saap_index.backends.weights import RouterWeights
from saap_index.errors import DTypeError, LayoutError, LengthError, ShapeError

_cpu = pytest.importorskip("saap_index._cpu", reason="the native kernels were not built")
CPU = CpuBackend()
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
DIMS = st.one_of(st.sampled_from([32, 40, 64, 80, 96, 128, 256]), st.integers(4, 32).map(lambda x: 8 * x))
SEEDS = st.integers(0, 2**31 - 1)
NOISE = 2.0**-20


@pytest.fixture(params=_cpu.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on each instruction set that this processor has."""
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def f64(x: Tensor) -> np.ndarray:
    return x.double().numpy()


# -- scan -----------------------------------------------------------------------------------------------------------------


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """q (j, d), k (t, d), v (t, e), seen (j, t) -> out (j, e), lse (j)."""
    out, lse = np.zeros((len(q), v.shape[1])), np.full(len(q), -np.inf)
    for i in range(len(q)):
        if seen[i].any():
            logits = scale * (k[seen[i]] @ q[i])
            top = logits.max()
            weights = np.exp(logits - top)
            out[i], lse[i] = weights @ v[seen[i]] / weights.sum(), top + np.log(weights.sum())
    return out, lse


def in_storage_type(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: np.ndarray) -> Tensor:
    """What torch makes of the same in the type of the arena and float32 softmax."""
    logits = ((q.to(k.dtype) @ k.T).float() * scale).masked_fill(~torch.from_numpy(seen), float("-inf"))
    return (torch.softmax(logits, -1).nan_to_num(0.0).to(v.dtype) @ v).to(q.dtype)


def visible(rows: list[int], sinks: int, sealed: int, length: int, g: int, q: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    listed = np.array([*range(sinks), *rows, *range(sealed, length)], dtype=np.int64)
    seen = np.ones((g * q, len(listed)), dtype=bool)
    if causal:
        for j in range(g * q):
            seen[j] = (listed < length - q + 1 + j % q) | (np.arange(len(listed)) < sinks + len(rows))
    return listed, seen


def check_scan(
    dtype: torch.dtype,
    d: int,
    e: int,
    g: int,
    q: int,
    shapes: list[tuple[int, int, int]],
    share: float,
    causal: bool,
    seed: int,
    logit: float = 1.0,
    heads: int = 2,
) -> None:
    """shapes: (sinks, sealed, length) of each sequence; share: of the sealed rows that is listed."""
    rng = np.random.default_rng(seed)
    b, capacity = len(shapes), max(s[2] for s in shapes) + 3
    keys, values = CPU.empty((b, heads, capacity, d), dtype), CPU.empty((b, heads, capacity, e), dtype)
    keys.copy_(randn(b, heads, capacity, d, seed=seed))
    values.copy_(randn(b, heads, capacity, e, seed=seed + 1))
    queries = randn(b, heads, g, q, d, seed=seed + 2, dtype=dtype, scale=logit)
    lists = [
        [sorted(rng.choice(np.arange(s, m), round(share * (m - s)), replace=False).tolist()) for _ in range(heads)]
        for s, m, _ in shapes
    ]
    t = max(len(x) for row in lists for x in row)
    rows, counts = torch.full((b, heads, t), -1, dtype=torch.int32), torch.zeros((b, heads), dtype=torch.int32)
    for i in range(b):
        for h in range(heads):
            rows[i, h, : len(lists[i][h])] = torch.tensor(lists[i][h], dtype=torch.int32)
            counts[i, h] = len(lists[i][h])
    sinks, sealed, lengths = ([s[k] for s in shapes] for k in range(3))
    scale = d**-0.5
    out, lse = CPU.scan(queries, keys, values, rows if t else None, counts if t else None, sinks, sealed, lengths, scale, causal)
    assert out.dtype == queries.dtype and lse.dtype == torch.float32
    for i in range(b):
        for h in range(heads):
            listed, seen = visible(lists[i][h], *shapes[i], g, q, causal)
            k, v = keys[i, h, listed], values[i, h, listed]
            x = queries[i, h].reshape(g * q, d)
            want, want_lse = attention(f64(x), f64(k), f64(v), scale, seen)
            got, got_lse = f64(out[i, h]).reshape(g * q, e), f64(lse[i, h]).reshape(-1)
            theirs = f64(in_storage_type(x, k, v, scale, seen)) if len(listed) else np.zeros_like(want)
            reach = max(1.0, logit)  # rounding of a logit in float32 grows with it
            assert np.abs(got - want).max(initial=0) <= 2 * np.abs(theirs - want).max(initial=0) + NOISE * reach * 8
            empty = ~seen.any(1)
            assert (got[empty] == 0).all() and (got_lse[empty] == -np.inf).all()
            assert np.abs(got_lse[~empty] - want_lse[~empty]).max(initial=0) <= NOISE * reach * 8


@settings(max_examples=examples(60))
@given(
    dtype=DTYPES,
    d=DIMS,
    e=DIMS,
    g=st.integers(1, 16),
    q=st.integers(1, 4),
    shapes=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 300), st.integers(0, 70)).map(lambda x: (x[0], x[0] + x[1], sum(x))),
        min_size=1,
        max_size=3,
    ),
    share=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    causal=st.booleans(),
    seed=SEEDS,
)
def test_scan(dtype: torch.dtype, d: int, e: int, g: int, q: int, shapes: list, share: float, causal: bool, seed: int) -> None:
    if causal and any(n - m < q and m for _, m, n in shapes):
        causal = False  # the contract: the last q rows are recent, or all rows are
    check_scan(dtype, d, e, g, q, shapes, share, causal, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [40, 64, 128])
def test_scan_huge_logits(dtype: torch.dtype, d: int) -> None:
    check_scan(dtype, d, d, 3, 2, [(2, 120, 150), (0, 1, 40)], 0.5, True, 7, logit=1e4 / 4)


@pytest.mark.parametrize("g, q", [(1, 1), (3, 1), (4, 16), (7, 9), (1, 150)])
def test_scan_many_queries_and_items(g: int, q: int) -> None:
    """More columns than one pass takes, more rows than one item holds, a causal tail across items."""
    check_scan(torch.bfloat16, 64, 64, g, q, [(4, 3000, 3700), (0, 0, 2500)], 0.4, True, 3, heads=1)


def test_scan_one_row_and_none() -> None:
    check_scan(torch.bfloat16, 128, 64, 4, 1, [(0, 0, 1), (1, 1, 1), (0, 0, 0), (0, 5, 5)], 0.2, False, 5)


def test_scan_more_queries_than_rows() -> None:
    check_scan(torch.float32, 32, 32, 2, 8, [(0, 0, 3)], 0.0, True, 6)


def test_scan_refuses() -> None:
    k = torch.zeros((1, 2, 16, 32), dtype=torch.bfloat16)
    q = torch.zeros((1, 2, 2, 1, 32), dtype=torch.bfloat16)
    rows, counts = torch.zeros((1, 2, 3), dtype=torch.int32), torch.full((1, 2), 3, dtype=torch.int32)
    fine = (q, k, k, rows, counts, [1], [8], [16], 1.0, False)
    CPU.scan(*fine)

    def refused(error: type[Exception], **changes: object) -> None:
        names = ("queries", "arena_keys", "arena_values", "rows", "counts", "sinks", "sealed", "lengths", "scale", "causal")
        args = dict(zip(names, fine, strict=True)) | changes
        with pytest.raises(error):
            CPU.scan(*args.values())  # type: ignore[arg-type]

    refused(IndexError, rows=torch.full((1, 2, 3), 16, dtype=torch.int32))
    refused(IndexError, rows=torch.full((1, 2, 3), -1, dtype=torch.int32))
    refused(IndexError, counts=torch.full((1, 2), 4, dtype=torch.int32))
    refused(ShapeError, rows=rows[:, :1])
    refused(ShapeError, counts=None)
    refused(ShapeError, arena_values=k[:, :1])
    refused(ShapeError, sinks=[0, 0])
    refused(DTypeError, queries=q.double())
    refused(DTypeError, arena_values=k.half())
    refused(DTypeError, rows=rows.long())
    refused(LayoutError, arena_keys=torch.zeros((1, 2, 16, 64), dtype=torch.bfloat16)[..., ::2])
    refused(LengthError, lengths=[17])
    refused(LengthError, sinks=[9])
    refused(LengthError, sealed=[-1])


# -- threads and processes ------------------------------------------------------------------------------------------------


def everything(seed: int) -> list[Tensor]:
    """Each operation once, on shapes that make several items."""
    h, n, d, lists, segments = 3, 5000, 64, 40, 3
    keys, values = randn(1, h, n, d, seed=seed, dtype=torch.bfloat16), randn(1, h, n, d, seed=seed + 1, dtype=torch.bfloat16)
    queries = randn(1, h, 3, 2, d, seed=seed + 2, dtype=torch.bfloat16)
    tables = torch.tensor(np.linspace(4, 4500, segments * lists + 1).astype(np.int32))
    tables = torch.stack([tables[s * lists : (s + 1) * lists + 1] for s in range(segments)]).expand(1, h, -1, -1).contiguous()
    weights = RouterWeights(
        *(randn(*s, seed=seed + 3) for s in ((h, 8, d), (h, 8), (h, lists + 3, 8), (h, lists + 3, d), (h, lists + 3))), lists
    )
    z, a = CPU.route(CPU.prepare_router(weights), queries, None)
    knots, budget = torch.tensor([[2.0, 1.5, 0.0]]), Budget(torch.full((1, h), 700, dtype=torch.int32))
    found = CPU.probe(z, a, knots, tables, [segments], budget, True)
    rows, counts = found.rows, found.counts
    out, lse = CPU.scan(queries, keys, values, rows, counts, [4], [4500], [n], 0.1, True)
    mean_keys, mean_values = (torch.zeros((1, h, 2, lists, d), dtype=torch.bfloat16) for _ in "kv")
    for s in range(2):
        CPU.means(keys[0], values[0], tables[0, :, s], mean_keys[0, :, s], mean_values[0, :, s])
    entries = torch.full((1, h), 30, dtype=torch.int32)
    more = replace(budget, mean_entries=entries, means=[2], unread_mass=torch.full((h,), 1e-3))
    tailed = CPU.probe(z, a, knots, tables, [segments], more, True)
    assert tailed.tail is not None and tailed.tail_counts is not None
    tail = Tail(tailed.tail, tailed.tail_counts, mean_keys, mean_values, tables)
    estimate, _ = CPU.scan(queries, keys, values, tailed.rows, tailed.counts, [4], [4500], [n], 0.1, True, tail)
    list_nos = CPU.assign(CPU.prepare_quantizer(randn(h, lists, d, seed=seed + 4)), keys[0], None)
    arena, ids = keys[0].clone(), torch.arange(n, dtype=torch.int32).repeat(h, 1)
    table = torch.empty((h, lists + 1), dtype=torch.int32)
    CPU.seal(arena, values[0].clone(), ids, 0, list_nos, table)
    means = [mean_keys, mean_values, tailed.rows, tailed.tail, estimate]
    return [*means, z, a, rows, counts, out, lse, list_nos, arena, ids, table, *CPU.combine(out, lse, out.flip(2), lse.flip(2))]


def test_same_bits_for_any_number_of_threads() -> None:
    try:
        results = []
        for threads in (1, 2, 3, 7):
            _cpu.set_num_threads(threads)
            assert _cpu.get_num_threads() == threads
            results += [everything(11) for _ in range(5)]
    finally:
        _cpu.set_num_threads(0)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def _child(results: multiprocessing.connection.Connection, q: Tensor, k: Tensor) -> None:
    out, _ = CPU.scan(q, k, k, None, None, [0], [0], [k.shape[2]], 0.1, False)
    results.send(out.tolist())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_survives_fork() -> None:
    # Made before the fork: torch's own threads do not survive one.
    q, k = torch.ones((1, 4, 1, 1, 64)), torch.ones((1, 4, 4096, 64), dtype=torch.bfloat16)
    everything(1)
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        here, there = context.Pipe(False)
        child = context.Process(target=_child, args=(there, q, k))
        child.start()
        answered = here.poll(30)
        if not answered:
            child.kill()
        assert answered, "the child hangs"
        assert here.recv() == torch.ones((1, 4, 1, 1, 64)).tolist()
        child.join()


# -- probe ----------------------------------------------------------------------------------------------------------------


def probe_head(
    z: np.ndarray, a: np.ndarray, knots: np.ndarray, tables: np.ndarray, budget: int, nprobe: int, size_weighted: bool
) -> list[int]:
    """One head of the contract, run by run. z (j, l), a (j, m + 1), knots (s), tables (s, l + 1)."""
    segments, lists = len(tables), z.shape[1]
    lengths = np.diff(tables, axis=1)
    bend = np.zeros((len(z), segments))
    if a.shape[1] > 1 and size_weighted and not nprobe:
        bend = np.stack([[np.interp(x, range(a.shape[1] - 1), row[:-1]) for x in knots] for row in a])
    scores = np.exp(z[:, None, :] + bend[:, :, None])  # (j, s, l)
    norm = (scores * lengths).sum((1, 2)) if size_weighted else np.exp(z).sum(1)
    norm = norm * (1 + np.exp(-a[:, -1])) if a.shape[1] and size_weighted else norm
    if nprobe:
        weights = (np.exp(z) / norm[:, None]).sum(0) if norm.all() else np.zeros(lists)
        chosen = sorted(range(lists), key=lambda x: (-weights[x], x))[:nprobe]
        order = [(s, x) for x in chosen for s in reversed(range(segments))]
    else:
        weights = (scores / norm[:, None, None]).sum(0) if norm.all() else np.zeros((segments, lists))
        order = sorted(((s, x) for s in range(segments) for x in range(lists)), key=lambda r: (-weights[r], -r[0], r[1]))
    taken: list[int] = []
    for s, x in order:
        n = min(int(lengths[s, x]), budget - len(taken))
        taken += range(tables[s, x + 1] - n, tables[s, x + 1])
    return sorted(taken)


@settings(max_examples=examples(150))
@given(data=st.data(), seed=SEEDS, size_weighted=st.booleans(), ties=st.booleans())
def test_probe(data: st.DataObject, seed: int, size_weighted: bool, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    b, h, j = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    lists, segments, m = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 6)), data.draw(st.integers(0, 4))
    nprobe = data.draw(st.sampled_from([0, 0, 1, 3, 100]))
    # Scores on a coarse grid repeat exactly; others keep a distance that float32 resolves.
    distinct = 0.5 * np.log(1 + rng.permuted(np.arange(b * h * lists))).reshape(b, h, 1, lists)
    z = np.repeat(rng.integers(0, 3, (b, h, 1, lists)) * 1.0 if ties else distinct, j, axis=2)
    a = np.zeros((b, h, j, m)) if ties else 0.37 * rng.standard_normal((b, h, 1, m)).repeat(j, 2)
    knots = rng.uniform(0, max(0, m - 2), (b, segments))
    lengths = rng.integers(0, data.draw(st.sampled_from([1, 2, 6])) + 1, (b, h, segments, lists))
    lengths[..., 0] += lengths.sum((3,)).max(1)[:, None] - lengths.sum(3)  # segments hold as many rows for every head
    tables = np.zeros((b, h, segments, lists + 1), dtype=np.int32)
    start = np.full((b, h), 5)
    for s in range(segments):
        tables[:, :, s] = np.concatenate([np.zeros((b, h, 1)), lengths[:, :, s].cumsum(-1)], -1) + start[..., None]
        start = tables[:, :, s, -1]
    used = [data.draw(st.integers(0, segments)) for _ in range(b)]
    budgets = [data.draw(st.one_of(st.integers(0, 60), st.just(10**6))) for _ in range(b)]
    to = lambda x: torch.from_numpy(np.ascontiguousarray(x)).float()  # noqa: E731
    budget = Budget(torch.tensor(budgets, dtype=torch.int32)[:, None].repeat(1, h), nprobe)
    found = CPU.probe(to(z), to(a), to(knots), torch.from_numpy(tables), used, budget, size_weighted)
    rows, counts = found.rows, found.counts
    assert rows.dtype == counts.dtype == torch.int32 and rows.is_contiguous()
    assert rows.shape == (b, h, counts.max())
    for i in range(b):
        for k in range(h):
            s = used[i]
            want = probe_head(z[i, k], a[i, k], knots[i, :s], tables[i, k, :s], budgets[i], nprobe, size_weighted)
            assert rows[i, k, : counts[i, k]].tolist() == want
            assert (rows[i, k, counts[i, k] :] == -1).all()


@pytest.mark.parametrize("case", ["spread", "one list", "equal", "budget of most"])
def test_probe_of_many_runs(case: str) -> None:
    """So many that the heaviest are guessed from some of them, also where the guess is wrong: attention on a list that is not
    among these, or all weights equal."""
    lists, segments, j = 200, 30, 3
    rng = np.random.default_rng(0)
    z = np.repeat(0.5 * np.log(1 + rng.permutation(lists))[None], j, axis=0)
    if case == "one list":
        z[:] = -3.0
        z[:, 57] = 4.0
    elif case == "equal":
        z[:] = 0
    lengths = rng.integers(0, 9, (segments, lists))
    tables = np.concatenate([np.zeros((segments, 1)), lengths.cumsum(1)], 1)
    tables = (tables + np.concatenate([[0], lengths.sum(1).cumsum()[:-1]])[:, None] + 5).astype(np.int32)
    a = np.zeros((j, 3)) if case == "equal" else 0.37 * rng.standard_normal((1, 3)).repeat(j, 0)
    knots = rng.uniform(0, 1, segments)
    for budget in (20000,) if case == "budget of most" else (1, 40, 700, 5000):
        to = lambda x: torch.from_numpy(np.ascontiguousarray(x)).float()[None, None]  # noqa: E731
        arguments = to(z), to(a), to(knots)[0], torch.from_numpy(tables)[None, None], [segments]
        rows = CPU.probe(*arguments, Budget(torch.tensor([[budget]], dtype=torch.int32)), True).rows
        assert rows[0, 0].tolist() == probe_head(z, a, knots, tables, budget, 0, True)


def test_probe_scores_beyond_float32() -> None:
    """Only runs of vanishing weight hold rows: the order is still that of the scores."""
    z = torch.tensor([[[[0.0, -200.0, -300.0, -250.0]]]])
    tables = torch.tensor([[[[0, 0, 3, 5, 9]]]], dtype=torch.int32)
    budget = Budget(torch.tensor([[5]], dtype=torch.int32))
    rows = CPU.probe(z, torch.zeros((1, 1, 1, 0)), torch.zeros((1, 1)), tables, [1], budget, True).rows
    assert rows[0, 0].tolist() == [0, 1, 2, 7, 8]


def test_probe_refuses_falling_offsets() -> None:
    tables = torch.tensor([[[[0, 9, 3, 5]]]], dtype=torch.int32)
    with pytest.raises(IndexError, match="ascending"):
        budget = Budget(torch.tensor([[4]], dtype=torch.int32))
        CPU.probe(torch.zeros((1, 1, 1, 3)), torch.zeros((1, 1, 1, 0)), torch.zeros((1, 1)), tables, [1], budget, True)


# -- assign, route --------------------------------------------------------------------------------------------------------


def unrotated(x: np.ndarray, rotation: Rotation | None) -> np.ndarray:
    """x (..., n, d) with the angles of n tokens undone."""
    if rotation is None:
        return x
    cos, sin = f64(rotation.cos), f64(rotation.sin)
    half = cos.shape[1]
    first = slice(0, 2 * half, 2) if rotation.interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if rotation.interleaved else slice(half, 2 * half)
    out = x.copy()
    out[..., first] = (x[..., first] * cos + x[..., second] * sin) * rotation.scale
    out[..., second] = (x[..., second] * cos - x[..., first] * sin) * rotation.scale
    return out


def rotations(n: int, d: int, seed: int) -> st.SearchStrategy[Rotation | None]:
    def make(half: int, interleaved: bool) -> Rotation:
        angles = 6.3 * torch.rand((n, half), generator=torch.Generator().manual_seed(seed))
        return Rotation(angles.cos(), angles.sin(), interleaved, 0.9)

    return st.one_of(st.none(), st.builds(make, st.sampled_from([d // 2, d // 4, 1]), st.booleans()))


@settings(max_examples=examples(60))
@given(data=st.data(), dtype=DTYPES, d=DIMS, n=st.integers(0, 220), lists=st.integers(1, 70), seed=SEEDS)
def test_assign(data: st.DataObject, dtype: torch.dtype, d: int, n: int, lists: int, seed: int) -> None:
    h = data.draw(st.integers(1, 3))
    rotation = data.draw(rotations(n, d, seed))
    keys = randn(n, h, d + 8, seed=seed, dtype=dtype).transpose(0, 1)[..., :d]
    centroids = randn(h, lists, d, seed=seed + 1)
    got = CPU.assign(CPU.prepare_quantizer(centroids), keys, rotation)
    assert got.shape == (h, n) and got.dtype == torch.int32
    x, c = unrotated(f64(keys), rotation), f64(centroids)
    scores = np.einsum("hnd,hld->hnl", x, c) - 0.5 * (c**2).sum(-1)[:, None]
    reached = np.take_along_axis(scores, got.numpy().astype(np.int64)[..., None], 2)[..., 0]
    assert (scores.max(-1, initial=-np.inf) - reached <= NOISE * 16 * d).all()


def test_assign_ties_go_to_the_lower_list() -> None:
    centroids = torch.ones((1, 50, 32))
    centroids[0, :7] = 2.0  # worse for a key of ones
    got = CPU.assign(CPU.prepare_quantizer(centroids), torch.ones((1, 9, 32)), None)
    assert (got == 7).all()


@settings(max_examples=examples(60))
@given(data=st.data(), dtype=DTYPES, d=DIMS, seed=SEEDS)
def test_route(data: st.DataObject, dtype: torch.dtype, d: int, seed: int) -> None:
    b, h, g, q = (data.draw(st.integers(1, most)) for most in (2, 3, 8, 12))
    u, lists, m = data.draw(st.sampled_from([0, 5, 16, 64])), data.draw(st.integers(1, 70)), data.draw(st.integers(0, 20))
    dims, narrow = data.draw(st.sampled_from([0, 0, 3, 16, 33])), data.draw(st.booleans())
    leading = dims or lists
    o = leading + m
    shapes = [(h, u, d), (h, u), (h, o, u), (h, o, d), (h, o)] + [(h, lists, dims), (h, dims)] * bool(dims)
    parts = [randn(*s, seed=seed + k, scale=0.3) for k, s in enumerate(shapes)]
    if narrow:
        parts = [x.bfloat16().float() for x in parts]
    if dims and data.draw(st.booleans()):
        parts[5] = (200 * parts[5]).round().clamp(-127, 127)
        parts[6] = parts[6] / 127
    w = RouterWeights(*parts[:5], lists, *parts[5:])
    rotation = data.draw(rotations(b * q, d, seed))
    queries = randn(b, h, g, q, d, seed=seed + 9, dtype=dtype)
    z, a = CPU.route(CPU.prepare_router(w), queries, rotation)
    x = unrotated(f64(queries).transpose(1, 2, 0, 3, 4).reshape(h, g, b * q, d), rotation)
    hidden = np.einsum("hgnd,hud->hgnu", x, f64(w.hidden)) + f64(w.bias_hidden)[:, None, None]
    hidden = hidden / (1 + np.exp(-hidden))
    y = np.einsum("hgnu,hou->hgno", hidden, f64(w.out)) + np.einsum("hgnd,hod->hgno", x, f64(w.skip))
    y = y + f64(w.bias_out)[:, None, None]
    y = y.reshape(h, g, b, q, o).transpose(2, 0, 1, 3, 4).reshape(b, h, g * q, o)
    assert z.shape == (b, h, g * q, lists) and a.shape == (b, h, g * q, m)
    want, limit = y[..., :leading], NOISE * (u + d) * (1 + dims)
    if dims:
        want = np.einsum("bhjk,hlk->bhjl", want * f64(w.list_scales)[:, None], f64(w.lists))
    assert np.abs(f64(z) - want).max() <= limit and np.abs(f64(a) - y[..., leading:]).max(initial=0) <= limit


# -- moving rows ----------------------------------------------------------------------------------------------------------


@settings(max_examples=examples(60))
@given(data=st.data(), dtype=DTYPES, d=DIMS, e=DIMS, n=st.integers(0, 300), lists=st.integers(1, 40), seed=SEEDS)
def test_seal(data: st.DataObject, dtype: torch.dtype, d: int, e: int, n: int, lists: int, seed: int) -> None:
    h, start, capacity = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 5)), n + 9
    keys, values = randn(h, capacity, d, seed=seed, dtype=dtype), randn(h, capacity, e, seed=seed + 1, dtype=dtype)
    ids = torch.arange(h * capacity, dtype=torch.int32).view(h, capacity)
    list_nos = torch.from_numpy(np.random.default_rng(seed).integers(0, lists, (h, n)).astype(np.int32))
    tables = torch.full((h, 3, lists + 1), -7, dtype=torch.int32)
    order = np.argsort(list_nos.numpy(), axis=1, kind="stable") + start
    want = [x.clone() for x in (keys, values, ids)]
    for x in want:
        for head in range(h):
            x[head, start : start + n] = x[head, order[head]].clone()
    CPU.seal(keys, values, ids, start, list_nos, tables[:, 1])
    assert all(torch.equal(x, y) for x, y in zip(want, (keys, values, ids), strict=True))
    for head in range(h):
        sizes = np.bincount(list_nos[head].numpy(), minlength=lists)
        assert tables[head, 1].tolist() == [start, *(start + np.cumsum(sizes))]
    assert (tables[:, [0, 2]] == -7).all()


@settings(max_examples=40)
@given(data=st.data(), dtype=DTYPES, d=DIMS, lists=st.integers(1, 40), cut=st.booleans(), seed=SEEDS)
def test_merge(data: st.DataObject, dtype: torch.dtype, d: int, lists: int, cut: bool, seed: int) -> None:
    """What sealing all of the rows at once leaves; the tables are those of the whole, or cut at the bounds of the parts."""
    h, sizes, e = data.draw(st.integers(1, 3)), data.draw(st.lists(st.integers(0, 80), min_size=1, max_size=5)), 24
    bounds = np.cumsum([data.draw(st.integers(0, 5)), *sizes])
    segments, n = list(itertools.pairwise(bounds.tolist())), int(bounds[-1] - bounds[0])
    keys, values = (randn(h, int(bounds[-1]) + 3, x, seed=seed + x, dtype=dtype) for x in (d, e))
    ids = torch.arange(keys[..., 0].numel(), dtype=torch.int32).view(keys.shape[:2])
    list_nos = torch.from_numpy(np.random.default_rng(seed).integers(0, lists, (h, n)).astype(np.int32))
    want, table = [x.clone() for x in (keys, values, ids)], torch.empty((h, lists + 1), dtype=torch.int32)
    CPU.seal(*want, segments[0][0], list_nos, table)
    tables = torch.full((h, len(segments) + 2, lists + 1), -7, dtype=torch.int32)
    CPU.seal_many(keys, values, ids, segments, list_nos, tables[:, 1:-1])
    joined = None if cut else torch.empty_like(table)
    assert CPU.merge(keys, values, ids, segments, tables[:, 1:-1], joined)
    assert all(torch.equal(x, y) for x, y in zip(want, (keys, values, ids), strict=True))
    if joined is None:
        assert torch.equal(tables[:, 1:-1], torch.stack([table.clamp(low, high) for low, high in segments], 1))
    else:
        assert torch.equal(joined, table)
    assert (tables[:, [0, -1]] == -7).all()


def test_merge_refuses() -> None:
    x, ids = torch.zeros((1, 4, 8)), torch.zeros((1, 4), dtype=torch.int32)
    for bad in ([[0, 1, 2], [2, 3, 5]], [[0, 1, 2], [2, 1, 4]], [[1, 1, 2], [2, 3, 4]]):
        with pytest.raises(IndexError, match="tables"):
            CPU.merge(x, x.clone(), ids, [(0, 2), (2, 4)], torch.tensor([bad], dtype=torch.int32), None)
    with pytest.raises(LengthError, match="segments"):
        CPU.merge(x, x.clone(), ids, [(0, 2), (2, 5)], torch.zeros((1, 2, 3), dtype=torch.int32), None)


def test_seal_refuses_list_numbers_out_of_range() -> None:
    x, ids = torch.zeros((1, 4, 8)), torch.zeros((1, 4), dtype=torch.int32)
    for bad in (-1, 5):
        with pytest.raises(IndexError, match="list_nos"):
            CPU.seal(x, x.clone(), ids, 0, torch.full((1, 4), bad, dtype=torch.int32), torch.zeros((1, 6), dtype=torch.int32))


@settings(max_examples=examples(40))
@given(data=st.data(), dtype=DTYPES, seed=SEEDS, bad=st.sampled_from([None, float("nan"), float("inf"), float("-inf")]))
def test_append(data: st.DataObject, dtype: torch.dtype, seed: int, bad: float | None) -> None:
    b, h, n, d, e = 2, 3, data.draw(st.integers(1, 600)), 40, 24
    keys = randn(b, n, h, d, seed=seed, dtype=dtype).transpose(1, 2)
    values = randn(b, h, n, e + 4, seed=seed, dtype=dtype)[..., 2:-2]
    counts = [data.draw(st.integers(0, n)) for _ in range(b)]
    starts = [3, 0]
    arena_keys, arena_values = torch.full((b, h, n + 5, d), 7.0, dtype=dtype), torch.full((b, h, n + 5, e), 7.0, dtype=dtype)
    want_keys, want_values = arena_keys.clone(), arena_values.clone()
    i = data.draw(st.integers(0, b - 1))
    spoiled = bad is not None and counts[i] > 0
    for x in (keys, values):
        x[i, :, counts[i] :] = float("nan")  # beyond the count: nobody may look
    if spoiled:
        side = data.draw(st.sampled_from([keys, values]))
        head, token = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, counts[i] - 1))
        side[i, head, token, data.draw(st.integers(0, e - 1))] = bad
    else:
        for s in range(b):
            want_keys[s, :, starts[s] : starts[s] + counts[s]] = keys[s, :, : counts[s]]
            want_values[s, :, starts[s] : starts[s] + counts[s]] = values[s, :, : counts[s]]
    assert CPU.append(keys, values, arena_keys, arena_values, starts, counts) is not spoiled
    assert torch.equal(arena_keys, want_keys) and torch.equal(arena_values, want_values)


def test_append_refuses() -> None:
    x, arena = torch.zeros((1, 2, 4, 8)), torch.zeros((1, 2, 6, 8))
    for starts, counts in (([3], [4]), ([-1], [1]), ([0], [5])):
        with pytest.raises(LengthError):
            CPU.append(x, x, arena, arena.clone(), starts, counts)


# -- combine, memory ------------------------------------------------------------------------------------------------------


@given(dtype=DTYPES, n=st.integers(0, 40), e=st.integers(1, 130), seed=SEEDS)
def test_combine(dtype: torch.dtype, n: int, e: int, seed: int) -> None:
    out = [randn(n, e, seed=seed + k, dtype=dtype) for k in range(2)]
    lse = [randn(n, seed=seed + 2 + k, scale=20.0) for k in range(2)]
    for k in range(2):
        lse[k][k::3] = -torch.inf
        out[k][k::3] = 0
    got, got_lse = CPU.combine(out[0], lse[0], out[1], lse[1])
    a, b = f64(lse[0]), f64(lse[1])
    want_lse = np.logaddexp(a, b)
    top = np.where(np.isfinite(want_lse), want_lse, 0)
    want = np.exp(a - top)[:, None] * f64(out[0]) + np.exp(b - top)[:, None] * f64(out[1])
    assert got.dtype == dtype
    finite = np.isfinite(want_lse)
    assert np.abs(f64(got_lse) - want_lse)[finite].max(initial=0) <= NOISE * 64
    assert (f64(got_lse)[~finite] == -np.inf).all() and (f64(got)[~finite] == 0).all()
    assert np.abs(f64(got) - want).max(initial=0) <= 4 * torch.finfo(dtype).eps + NOISE * 64


def test_empty_is_aligned() -> None:
    for shape in ((3, 5), (1, 2, 1000, 64)):
        assert CPU.empty(shape, torch.bfloat16).data_ptr() % 64 == 0
