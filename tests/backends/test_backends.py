"""Every operation of the seam (backends/base.py), for every backend, against the specification on random inputs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from torch import Tensor
from torch.nn import functional

from saap_index import DeviceError, merge_states, reference, register_backend
from saap_index.backends import Backend, Budget, Rotation, RouterWeights, get_backend
from saap_index.backends.reference import ReferenceBackend

BACKENDS = ("cpu", "torch")
CPU = torch.device("cpu")
SPEC = ReferenceBackend()
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
DIMS = st.sampled_from([8, 32, 40, 64, 128])
GROUPS = st.one_of(st.integers(1, 8), st.sampled_from([5, 7, 12, 16]))
SEEDS = st.integers(0, 2**31 - 1)
EPS32 = torch.finfo(torch.float32).eps

over_backends = pytest.mark.over_backends("name", BACKENDS)


def backend(name: str) -> Backend:
    return get_backend(CPU, name)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_names() -> None:
    """`cpu` is the compiled one, and the default of the host; not the torch fallback under its name."""
    assert [backend(name).name for name in ("cpu", "torch", "reference")] == ["cpu", "torch", "reference"]
    assert get_backend(CPU).name == "cpu"


def test_register_backend() -> None:
    made: list[torch.device] = []

    def factory(device: torch.device) -> Backend:
        made.append(device)
        return SPEC

    register_backend("test-only", factory)
    assert get_backend(CPU, "test-only") is SPEC and made == [CPU]
    with pytest.raises(DeviceError, match="test-only"):
        get_backend(CPU, "no such backend")


def test_a_backend_of_ones_own_is_tested_by_name() -> None:
    """The whole way: imported, registered, and in place of ours, in this file and in that of the state machine."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--collect-only"]
    own = "saap_index.backends.plain_torch:TorchBackend"
    files = [__file__, str(Path(__file__).parents[1] / "index" / "test_stateful.py")]
    out = subprocess.run([*command, "--backend", own, *files], capture_output=True, text=True, check=True).stdout
    assert f"test_empty[{own}]" in out and f"test_walk[{own}]" in out
    assert "test_empty[cpu]" not in out and "test_walk[cpu]" not in out


# -- memory ---------------------------------------------------------------------------------------------------------------


@over_backends
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=4), dtype=DTYPES)
def test_empty(name: str, shape: list[int], dtype: torch.dtype) -> None:
    x = backend(name).empty(shape, dtype)
    assert tuple(x.shape) == tuple(shape) and x.dtype == dtype and x.is_contiguous()
    x.zero_()


@st.composite
def strided(draw: st.DrawFn, b: int, h: int, n: int, d: int, dtype: torch.dtype, seed: int) -> Tensor:
    """(b, h, n, d) with any strides but the last: contiguous, heads last but one, or a part of something larger."""
    kind = draw(st.sampled_from(["plain", "transposed", "part"]))
    g = generator(seed)
    if kind == "transposed":
        return torch.randn((b, n, h, d), generator=g).to(dtype).transpose(1, 2)
    if kind == "part":
        return torch.randn((b, h, n + 3, d + 8), generator=g).to(dtype)[:, :, 2 : n + 2, :d]
    return torch.randn((b, h, n, d), generator=g).to(dtype)


@over_backends
@given(data=st.data(), b=st.integers(1, 3), h=st.integers(1, 3), n=st.integers(0, 40), d=DIMS, e=DIMS, dtype=DTYPES, seed=SEEDS)
def test_append(name: str, data: st.DataObject, b: int, h: int, n: int, d: int, e: int, dtype: torch.dtype, seed: int) -> None:
    keys, values = data.draw(strided(b, h, n, d, dtype, seed)), data.draw(strided(b, h, n, e, dtype, seed + 1))
    counts = [data.draw(st.integers(0, n)) for _ in range(b)]
    starts = [data.draw(st.integers(0, 9)) for _ in range(b)]
    arenas = [torch.full((b, h, n + 9, width), 7.0, dtype=dtype) for width in (d, e)]
    want = [x.clone() for x in arenas]
    for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
        for arena, x in zip(want, (keys, values), strict=True):
            arena[i, :, start : start + count] = x[i, :, :count]
    for i, count in enumerate(counts):  # what is not taken may be anything
        keys[i, :, count:], values[i, :, count:] = torch.nan, torch.inf
    bad = data.draw(st.sampled_from([None, torch.nan, torch.inf, -torch.inf]))
    places = [i for i, count in enumerate(counts) if count]
    if bad is not None and places:
        i, x = data.draw(st.sampled_from(places)), data.draw(st.sampled_from([keys, values]))
        token = data.draw(st.one_of(st.just(counts[i] - 1), st.integers(0, counts[i] - 1)))
        dim = data.draw(st.one_of(st.just(x.shape[3] - 1), st.integers(0, x.shape[3] - 1)))
        x[i, data.draw(st.integers(0, h - 1)), token, dim] = bad
        assert backend(name).append(keys, values, *arenas, starts, counts) is False
        want = [torch.full_like(x, 7.0) for x in arenas]
    else:
        assert backend(name).append(keys, values, *arenas, starts, counts) is True
    for got, x in zip(arenas, want, strict=True):
        assert torch.equal(got, x)


@over_backends
@given(
    data=st.data(), h=st.integers(1, 3), n=st.integers(0, 70), start=st.integers(0, 5), d=DIMS, e=DIMS, dtype=DTYPES, seed=SEEDS
)
def test_seal(name: str, data: st.DataObject, h: int, n: int, start: int, d: int, e: int, dtype: torch.dtype, seed: int) -> None:
    """Bit for bit, whatever the lists: few, many, one with everything, or a permutation (as when a segment is undone)."""
    g = generator(seed)
    kind = data.draw(st.sampled_from(["few", "many", "one", "permutation"]))
    nlist = {"few": 4, "many": 300, "one": 5, "permutation": max(1, n)}[kind]
    list_nos = torch.randint(0, nlist, (h, n), generator=g, dtype=torch.int32)
    if kind == "one":
        list_nos.fill_(data.draw(st.integers(0, nlist - 1)))
    if kind == "permutation" and n:
        list_nos = torch.stack([torch.randperm(n, generator=g) for _ in range(h)]).int()
    rows = start + n + 3
    arena = [torch.randn((h, rows, d), generator=g).to(dtype), torch.randn((h, rows, e), generator=g).to(dtype)]
    arena.append(torch.randint(0, 10**6, (h, rows), generator=g, dtype=torch.int32))
    want = [x.clone() for x in arena]
    tables = torch.full((2, h, 3, nlist + 1), -5, dtype=torch.int32)  # the table is strided over the heads
    SPEC.seal(*want, start, list_nos, tables[0, :, 1])
    backend(name).seal(*arena, start, list_nos, tables[1, :, 1])
    for got, x in zip([*arena, tables[1]], [*want, tables[0]], strict=True):
        assert torch.equal(got, x)


# -- maps -----------------------------------------------------------------------------------------------------------------


def rotation(rows: int, half: int, interleaved: bool, scale: float, seed: int) -> Rotation:
    angles = torch.rand((rows, half), generator=generator(seed)) * 6
    return Rotation(angles.cos(), angles.sin(), interleaved, scale)


ROTATIONS = st.one_of(st.none(), st.tuples(st.sampled_from([1, 2, 4]), st.booleans(), st.sampled_from([1.0, 0.6])))


@over_backends
@given(
    data=st.data(), h=st.integers(1, 3), n=st.one_of(st.integers(0, 40), st.sampled_from([255, 300])), nlist=st.integers(1, 70),
    d=DIMS, dtype=DTYPES, turn=ROTATIONS, biased=st.booleans(), seed=SEEDS,
)
def test_assign(
    name: str, data: st.DataObject, h: int, n: int, nlist: int, d: int, dtype: torch.dtype, turn: Any, biased: bool, seed: int
) -> None:
    keys = data.draw(strided(1, h, n, d, dtype, seed))[0]
    centroids = torch.randn((h, nlist, d), generator=generator(seed + 1))
    bias = torch.randn((h, nlist), generator=generator(seed + 2)) * d**0.5 if biased else None
    angles = None if turn is None else rotation(n, d // 2 // turn[0], turn[1], turn[2], seed)
    ours = backend(name)
    got = ours.assign(ours.prepare_quantizer(centroids, bias), keys, angles)
    assert got.dtype == torch.int32 and got.shape == (h, n)
    x = keys.double().numpy()
    if angles is not None:
        x = reference.unrotate(x, angles.cos.double().numpy(), angles.sin.double().numpy(), angles.interleaved, angles.scale)
    c = centroids.double().numpy()
    raised = -0.5 * (c**2).sum(-1) if bias is None else bias.double().numpy()
    scores = np.einsum("hnd,hld->hnl", x, c) + raised[:, None]
    chosen = np.take_along_axis(scores, got.numpy()[:, :, None].astype(np.int64), 2)[:, :, 0]
    worst = np.abs(x).max(initial=1.0) * np.abs(c).max() * d * 4 * EPS32  # of a float32 sum of d products
    assert (chosen >= scores.max(2, initial=-np.inf) - worst).all()
    assert (got == SPEC.assign(SPEC.prepare_quantizer(centroids, bias), keys, angles)).float().mean() > 0.99 or n * h < 100


@over_backends
@given(h=st.integers(1, 2), n=st.integers(1, 40), nlist=st.integers(1, 40), d=DIMS, dtype=DTYPES, seed=SEEDS)
def test_assign_breaks_ties_downwards(name: str, h: int, n: int, nlist: int, d: int, dtype: torch.dtype, seed: int) -> None:
    """Small integers: every sum is exact, ties are common, and the answer is one."""
    g = generator(seed)
    keys = torch.randint(-1, 2, (h, n, d), generator=g).to(dtype)
    centroids = torch.randint(-1, 2, (h, min(nlist, 6), d), generator=g).float()[:, torch.arange(nlist) % 6 % min(nlist, 6)]
    ours = backend(name)
    got = ours.assign(ours.prepare_quantizer(centroids.contiguous()), keys, None)
    assert torch.equal(got, SPEC.assign(SPEC.prepare_quantizer(centroids), keys, None))


def weights(h: int, u: int, d: int, nlist: int, knots: int, seed: int, dims: int = 0, narrow: bool = False) -> RouterWeights:
    """dims : of the lists that outputs are compared with, 0 for outputs that are scores; narrow : of bfloat16's values, and whole
    numbers in the lists."""
    g = generator(seed)
    m = (dims or nlist) + knots
    shapes = [(h, u, d), (h, u), (h, m, u), (h, m, d), (h, m)] + [(h, nlist, dims), (h, dims)] * bool(dims)
    parts = [torch.randn(s, generator=g) * max(1, s[-1]) ** -0.5 for s in shapes]
    if narrow:
        parts[:5] = [x.bfloat16().float() for x in parts[:5]]
        parts[5:6] = [(100 * x).round().clamp(-127, 127) for x in parts[5:6]]
    return RouterWeights(*parts[:5], nlist, *parts[5:])


@over_backends
@given(
    b=st.integers(1, 3), h=st.integers(1, 3), g=GROUPS, q=st.integers(1, 8), d=DIMS, u=st.sampled_from([0, 1, 5, 64]),
    nlist=st.sampled_from([1, 3, 16, 65]), knots=st.integers(0, 9), dims=st.sampled_from([0, 0, 1, 20, 64]),
    narrow=st.booleans(), dtype=DTYPES, turn=ROTATIONS, seed=SEEDS,
)
@settings(max_examples=examples(90))
def test_route(
    name: str, b: int, h: int, g: int, q: int, d: int, u: int, nlist: int, knots: int, dims: int, narrow: bool,
    dtype: torch.dtype, turn: Any, seed: int,
) -> None:
    router = weights(h, u, d, nlist, knots, seed, dims, narrow)
    queries = torch.randn((b, h, g, q, d), generator=generator(seed + 1)).to(dtype)
    angles = None if turn is None else rotation(b * q, d // 2 // turn[0], turn[1], turn[2], seed)
    ours = backend(name)
    found = ours.route(ours.prepare_router(router), queries, angles)
    wanted = SPEC.route(SPEC.prepare_router(router), queries, angles)
    for got, want, size in zip(found, wanted, (nlist, knots), strict=True):
        assert got.shape == (b, h, g * q, size) and got.dtype == torch.float32
        if size:
            assert float((got - want).abs().max()) <= 4 * EPS32 * (d + u + dims) ** 0.5 * max(1.0, float(want.abs().max()))


@given(dims=st.sampled_from([1, 20, 64]), knots=st.integers(0, 3), seed=SEEDS)
@settings(max_examples=examples(20))
def test_a_composed_router_is_the_same_router(dims: int, knots: int, seed: int) -> None:
    router = weights(2, 5, 8, 7, knots, seed, dims)
    queries = torch.randn((1, 2, 3, 1, 8), generator=generator(seed + 1))
    found, wanted = (SPEC.route(SPEC.prepare_router(x), queries, None) for x in (router.composed(), router))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert router.composed().lists is None and router.num_knots == router.composed().num_knots == max(0, knots - 1)


def test_weights_that_need_fewer_bytes_take_fewer() -> None:
    h, u, d, nlist, dims = 2, 5, 8, 7, 4
    sizes = [h * u * d, h * (dims + 3) * (u + d), h * nlist * dims]
    biases = 4 * h * (u + dims + 3)
    wide, narrow = (weights(h, u, d, nlist, 3, 1, dims, x) for x in (False, True))
    scales = 4 * h * dims
    assert wide.nbytes == 4 * sum(sizes) + biases + scales and wide.list_bytes == 4 * sizes[2] + scales
    assert narrow.nbytes == 2 * sum(sizes[:2]) + sizes[2] + biases + scales
    assert replace(narrow, lists=wide.lists.bfloat16().float()).nbytes == 2 * sum(sizes) + biases + scales
    assert weights(h, u, d, nlist, 3, 1).list_bytes == 0


# -- probe ----------------------------------------------------------------------------------------------------------------


def tables_of(sizes: np.ndarray, sinks: int) -> np.ndarray:
    """Offsets int32 (b, h, S, l + 1) of runs of sizes (b, h, S, l) whose segments are as long in every head."""
    length = sizes.sum(-1)[:, :1]
    starts = sinks + np.cumsum(length, -1) - length
    inner = np.concatenate([np.zeros_like(sizes[..., :1]), np.cumsum(sizes, -1)], -1)
    return (starts[..., None] + inner).astype(np.int32)


@st.composite
def probes(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `probe`: ragged batches, empty runs, one list with everything, no segments, any budget."""
    b, h, j = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.one_of(st.integers(1, 8), st.sampled_from([16, 31])))
    nlist, m, most = draw(st.sampled_from([1, 2, 4, 9, 33])), draw(st.sampled_from([0, 1, 2, 6])), draw(st.integers(0, 6))
    r = np.random.default_rng(draw(SEEDS))
    num_segments = [draw(st.integers(0, most)) for _ in range(b)]
    sizes = np.zeros((b, h, most, nlist), np.int64)
    lengths = r.integers(1, 60, (b, most))
    kind = draw(st.sampled_from(["even", "skewed", "one list"]))
    for where in np.ndindex(b, h, most):
        share = np.ones(nlist) if kind == "even" else r.dirichlet(np.full(nlist, 0.3))
        if kind == "one list":
            share = np.eye(nlist)[r.integers(nlist)]
        sizes[where] = r.multinomial(lengths[where[0], where[2]], share / share.sum())
    tables = tables_of(sizes, draw(st.integers(0, 4)))
    for i, s in enumerate(num_segments):
        tables[i, :, s:] = r.integers(-(10**6), 10**6, tables[i, :, s:].shape)  # never written, never read
    total = [int(lengths[i, :s].sum()) for i, s in enumerate(num_segments)]
    limits = [[draw(st.one_of(st.integers(0, max(1, t)), st.sampled_from([0, t, t + 9]))) for _ in range(h)] for t in total]
    nprobe = draw(st.one_of(st.just(0), st.integers(1, nlist)))
    return {
        "knots": torch.from_numpy(r.uniform(0, max(0, m - 2), (b, most)).astype(np.float32)),
        "tables": torch.from_numpy(tables), "num_segments": num_segments, "size_weighted": draw(st.booleans()),
        "budget": Budget(torch.tensor(limits, dtype=torch.int32), nprobe), "shape": (b, h, j, nlist, m), "r": r,
    }


def check_probe(name: str, case: dict[str, Any], z: Tensor, a: Tensor) -> None:
    order = ("knots", "tables", "num_segments", "budget", "size_weighted")
    got, want = (x.probe(z, a, *(case[x] for x in order)) for x in (backend(name), SPEC))
    for rows, counts, want_rows, want_counts in (
        (got.rows, got.counts, want.rows, want.counts), (got.tail, got.tail_counts, want.tail, want.tail_counts)
    ):
        assert (rows is None) == (counts is None) == (want_rows is None)
        if rows is not None:
            assert rows.dtype == counts.dtype == torch.int32 and torch.equal(counts, want_counts)
            assert rows.shape == want_rows.shape and torch.equal(rows, want_rows)


@over_backends
@given(case=probes())
@settings(max_examples=examples(200))
def test_probe(name: str, case: dict[str, Any]) -> None:
    b, h, j, nlist, m = case["shape"]
    z, a = (torch.from_numpy(case["r"].normal(size=(b, h, j, x)).astype(np.float32)) for x in (nlist, m))
    check_probe(name, case, 2 * z, a)


@over_backends
@given(case=probes(), steps=st.integers(1, 3), minus=st.booleans())
@settings(max_examples=examples(200))
def test_probe_with_ties(name: str, case: dict[str, Any], steps: int, minus: bool) -> None:
    """Scores from very few values, all alike among them, some of them -inf: newer segments first, then lower lists."""
    b, h, j, nlist, m = case["shape"]
    r = case["r"]
    z = torch.from_numpy(r.integers(0, steps, (b, h, 1, nlist)).astype(np.float32)).expand(-1, -1, j, -1).contiguous()
    a = torch.from_numpy(r.integers(0, steps, (b, h, 1, m)).astype(np.float32)).expand(-1, -1, j, -1).contiguous()
    case["knots"] = case["knots"].round()
    if minus:
        z[:, :, :, r.integers(nlist)] = -torch.inf
    check_probe(name, case, z, a)


@over_backends
@pytest.mark.parametrize("nprobe", [0, 1, 4])
@pytest.mark.parametrize("size_weighted", [True, False])
def test_probe_of_equal_scores_takes_the_newest(name: str, nprobe: int, size_weighted: bool) -> None:
    tables = torch.from_numpy(tables_of(np.full((1, 1, 3, 4), 2), 1))  # 3 segments of 4 runs of 2 rows, from row 1
    z, a, knots = torch.zeros((1, 1, 2, 4)), torch.zeros((1, 1, 2, 0)), torch.zeros((1, 3))
    budget = Budget(torch.tensor([[5]], dtype=torch.int32), nprobe)
    found = backend(name).probe(z, a, knots, tables, [3], budget, size_weighted)
    want = {0: [17, 18, 19, 20, 22], 1: [2, 9, 10, 17, 18], 4: [2, 9, 10, 17, 18]}[nprobe]
    assert found.rows[0, 0].tolist() == want and found.counts.tolist() == [[5]] and found.tail is None


@over_backends
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["one list", "one head", "every score", "a knot", "every knot", "the last knot"])
@pytest.mark.parametrize("nprobe", [0, 2])
@pytest.mark.parametrize("size_weighted", [True, False])
def test_probe_of_scores_that_are_no_numbers(name: str, bad: float, where: str, nprobe: int, size_weighted: bool) -> None:
    """What a query that holds NaN or infinity leads to: any choice will do, but of rows that are there, and no more of them."""
    r = np.random.default_rng(0)
    sizes = np.repeat(r.integers(1, 4, (1, 1, 8, 5)), 2, 1)
    z, a = (torch.from_numpy(r.normal(size=(1, 2, 3, n)).astype(np.float32)) for n in (5, 3))
    part = {
        "one list": z[:, 0, :, 1], "one head": z[:, 0, 1], "every score": z, "a knot": a[:, 0, :, 0], "every knot": a,
        "the last knot": a[:, 0, 0, -1],
    }[where]
    part.fill_(bad)
    knots, tables, budget = torch.linspace(0, 1, 8)[None], torch.from_numpy(tables_of(sizes, 2)), 11
    limits = Budget(torch.full((1, 2), budget, dtype=torch.int32), nprobe)
    for _ in range(20):
        found = backend(name).probe(z, a, knots, tables, [8], limits, size_weighted)
        rows = found.rows
        assert found.counts.tolist() == [[budget, budget]] and rows.shape == (1, 2, budget)
        assert bool((rows.diff() > 0).all()) and int(rows.min()) >= 2 and int(rows.max()) < 2 + sizes[0, 0].sum()
    if where == "every score" and bad == -torch.inf:
        assert torch.equal(rows, SPEC.probe(z, a, knots, tables, [8], limits, size_weighted).rows)


# -- scan -----------------------------------------------------------------------------------------------------------------


@st.composite
def scans(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `scan`: dense or with row lists, ragged, with sequences of no tokens and of no rows."""
    b, h, g, q = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(GROUPS), draw(st.integers(1, 8))
    r = np.random.default_rng(draw(SEEDS))
    dense = draw(st.booleans())
    sinks, sealed, lengths, picked = [], [], [], []
    for _ in range(b):
        low = 0 if dense else draw(st.integers(0, 5))
        high = low + (0 if dense else draw(st.sampled_from([0, 1, 7, 64, 150])))
        recent = draw(st.sampled_from([0, 1, 3, 20, 90]) if dense or high == low == 0 else st.sampled_from([8, 9, 30]))
        recent = max(recent, q) if high else recent
        sinks, sealed, lengths = [*sinks, low], [*sealed, high], [*lengths, high + recent]
        share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
        picked.append([np.flatnonzero(r.random(high - low) < share) + low for _ in range(h)])
    counts = np.array([[len(x) for x in heads] for heads in picked], np.int32)
    rows = np.full((b, h, counts.max(initial=0)), -1, np.int32)
    for i, head in np.ndindex(b, h):
        rows[i, head, : counts[i, head]] = picked[i][head]
    return {
        "shape": (b, h, g, q), "capacity": max(lengths) + draw(st.integers(0, 5)), "causal": draw(st.booleans()),
        "rows": None if dense else torch.from_numpy(rows), "counts": None if dense else torch.from_numpy(counts),
        "sinks": sinks, "sealed": sealed, "lengths": lengths, "seed": draw(SEEDS),
    }


def torch_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float, seen: Tensor, tokens: Tensor) -> Tensor:
    """What torch makes of (g, q, d) over (n, d), (n, e) in the precision of the queries; seen : bool (q, n); tokens : (n,) that
    each key stands for."""
    to = queries.dtype
    k, v = (x.to(to).expand(len(queries), -1, -1) for x in (keys, values))
    mask = torch.log(tokens.to(to)).expand(seen.shape).masked_fill(~seen, -torch.inf)
    return functional.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=scale)


def check_scan(name: str, case: dict[str, Any], queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
    """Error against float64 at most twice torch's own in the same precision, plus the rounding of the result."""
    tail = case.get("tail")
    order = ("rows", "counts", "sinks", "sealed", "lengths")
    args = [*(case[x] for x in order), scale, case["causal"]]
    biases = case.get("biases")
    out, lse = backend(name).scan(queries, keys, values, *args, tail, None, biases)
    b, h, g, q = case["shape"]
    assert out.shape == (b, h, g, q, values.shape[-1]) and out.dtype == queries.dtype
    assert lse.shape == (b, h, g, q) and lse.dtype == torch.float32
    for i, head in np.ndindex(b, h):
        low, high, n = (case[x][i] for x in ("sinks", "sealed", "lengths"))
        picked = [] if case["rows"] is None else case["rows"][i, head, : case["counts"][i, head]].tolist()
        ids = torch.tensor([*range(low), *picked, *range(high, n)], dtype=torch.int64)
        limit = torch.arange(n - q + 1, n + 1) if case["causal"] else torch.full((q,), n)
        seen = (ids < high) | (ids < limit[:, None])
        k, v, x, tokens = keys[i, head, ids], values[i, head, ids], queries[i, head], torch.ones(len(ids))
        if tail is not None:
            runs = tail.runs[i, head, : tail.counts[i, head]].long()
            k, v = (torch.cat([y, m[i, head].flatten(0, 1)[runs]]) for y, m in ((k, tail.keys), (v, tail.values)))
            tokens = torch.cat([tokens, tail.tables[i, head].diff(dim=1).flatten()[runs]])
            seen = torch.cat([seen, torch.ones((q, len(runs)), dtype=torch.bool)], 1)
        if biases is not None:  # as if a key stood for as many tokens
            tokens[low : low + len(picked)] *= biases[i, head, : len(picked)].exp()
        logits = (scale * x.double() @ k.double().T + tokens.double().log()).masked_fill(~seen, -torch.inf)
        flat, plain = x.double().reshape(g * q, -1).numpy(), [y.double().numpy() for y in (k, v)]
        want, want_lse = reference.attend(flat, *plain, scale, seen.repeat(g, 1).numpy(), tokens.double().numpy())
        want = torch.from_numpy(want).view(g, q, -1)
        want_lse = torch.from_numpy(want_lse).view(g, q)
        nothing = ~want_lse.isfinite()
        assert bool((lse[i, head][nothing] == -torch.inf).all()) and not out[i, head][nothing].any()
        if bool(nothing.all()):
            continue
        top = float(logits[logits.isfinite()].abs().max())
        noise = 16 * EPS32 * (1 + top)
        assert float((lse[i, head].double() - want_lse)[~nothing].abs().max()) <= noise
        theirs = torch_attention(x, k, v, scale, seen, tokens).double()
        allowed = 2 * float((theirs - want)[~nothing].abs().max())
        allowed += (torch.finfo(queries.dtype).eps + noise) * float(v.double().abs().max())
        error = float((out[i, head].double() - want)[~nothing].abs().max())
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@over_backends
@given(case=scans(), d=DIMS, e=DIMS, stored=DTYPES, asked=DTYPES, size=st.sampled_from([0.0, 1.0, 30.0]))
@settings(max_examples=examples(150))
def test_scan(
    name: str, case: dict[str, Any], d: int, e: int, stored: torch.dtype, asked: torch.dtype, size: float
) -> None:
    b, h, g, q = case["shape"]
    rng = generator(case["seed"])
    queries = (size * torch.randn((b, h, g, q, d), generator=rng)).to(asked)
    keys = torch.randn((b, h, case["capacity"], d), generator=rng).to(stored)
    values = torch.randn((b, h, case["capacity"], e), generator=rng).to(stored)
    for i, n in enumerate(case["lengths"]):  # memory past the end is not read
        keys[i, :, n:], values[i, :, n:] = torch.nan, torch.nan
    check_scan(name, case, queries, keys, values, d**-0.5)


@over_backends
@pytest.mark.parametrize("d", [8, 16, 24, 48, 72, 96, 128, 136, 192, 200, 256])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_scan_in_every_dim(name: str, d: int, stored: torch.dtype) -> None:
    case = {
        "shape": (1, 1, 3, 2), "causal": True, "rows": torch.arange(2, 60, 3, dtype=torch.int32)[None, None],
        "counts": torch.tensor([[20]], dtype=torch.int32), "sinks": [2], "sealed": [60], "lengths": [75],
    }
    rng = generator(d)
    queries = torch.randn((1, 1, 3, 2, d), generator=rng)
    keys, values = (torch.randn((1, 1, 80, w), generator=rng).to(stored) for w in (d, 264 - d))
    check_scan(name, case, queries, keys, values, d**-0.5)


@over_backends
def test_scan_of_a_long_context_does_not_depend_on_threads(name: str) -> None:
    rng = generator(5)
    n = 20_000
    queries = torch.randn((1, 2, 4, 1, 64), generator=rng)
    keys, values = (torch.randn((1, 2, n, 64), generator=rng) for _ in "kv")
    rows = torch.arange(4, 16_000, 2, dtype=torch.int32).expand(1, 2, -1).contiguous()
    counts = torch.full((1, 2), rows.shape[2], dtype=torch.int32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(backend(name).scan(queries, keys, values, rows, counts, [4], [16_000], [n], 0.125, True))
    finally:
        torch.set_num_threads(before)
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0]) and torch.equal(lse, found[0][1])


# -- combine --------------------------------------------------------------------------------------------------------------

LSES = st.one_of(st.just(-torch.inf), st.sampled_from([-1e4, 0.0, 1e4]), st.floats(-20, 20, width=32))


def through_seam(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return merge_states if name == "public" else backend(name).combine


@pytest.mark.parametrize("name", [*BACKENDS, "public"])
@given(data=st.data(), rows=st.integers(0, 5), e=DIMS, dtype=DTYPES, seed=SEEDS)
def test_combine(name: str, data: st.DataObject, rows: int, e: int, dtype: torch.dtype, seed: int) -> None:
    parts = []
    for part in range(2):
        lse = torch.tensor(data.draw(st.lists(LSES, min_size=rows, max_size=rows)), dtype=torch.float32)
        out = torch.randn((rows, e), generator=generator(seed + part)).to(dtype)
        parts += [torch.where(lse.isfinite()[:, None], out, 0), lse]
    before = [x.clone() for x in parts]
    out, lse = through_seam(name)(*parts)
    assert out.dtype == dtype and lse.dtype == torch.float32 and not out.isnan().any() and not lse.isnan().any()
    want, want_lse = SPEC.combine(*parts)
    assert torch.allclose(lse, want_lse, rtol=4 * EPS32, atol=4 * EPS32)
    size = max(float(x.abs().max()) if rows else 0.0 for x in (parts[0], parts[2]))
    worst = 2e-3 if bool((want_lse.abs() > 1e3).any()) else 64 * EPS32  # a float32 lse of 1e4 is known to 1e-3
    assert float((out.double() - want.double()).abs().max() if rows else 0) <= (torch.finfo(dtype).eps + worst) * size
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True)), "arguments are left as they are"
    swapped = through_seam(name)(*parts[2:], *parts[:2])
    assert torch.equal(lse, swapped[1]) and torch.allclose(out.float(), swapped[0].float(), rtol=0, atol=float(size * 4 * EPS32))
    empty = torch.zeros_like(parts[0]), torch.full_like(parts[1], -torch.inf)
    same = through_seam(name)(parts[0], parts[1], *empty)
    assert torch.equal(same[0], parts[0]), "the empty state is the identity"
    assert torch.allclose(same[1], parts[1], rtol=2 * EPS32, atol=0), "of lse up to rounding: a kernel may count in powers of 2"
