"""Weighted samples at the seam: probabilities of inclusion, which rows are taken, and what their biases add, by backend."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_backends import DIMS, DTYPES, SEEDS, SPEC, backend, check_scan, generator, over_backends, probes, scans, tables_of

from saap_index import LengthError, ParameterError, reference
from saap_index.backends import Budget, Sample
from saap_index.backends.types import MAX_SAMPLED
from saap_index.reference import ONE

# -- the specification ----------------------------------------------------------------------------------------------------


@given(
    bins=st.lists(st.integers(900, 1020), min_size=1, max_size=60), exponent=st.integers(1, 32), share=st.floats(0, 1), seed=SEEDS
)
@settings(max_examples=150)
def test_inclusion(bins: list[int], exponent: int, share: float, seed: int) -> None:
    """Probabilities spend the rows, rise with the weight, and are in proportion where they are not certain."""
    sizes = np.random.default_rng(seed).integers(0, 20, len(bins))
    rows = int(share * sizes.sum())
    found = reference.inclusion(np.array(bins), sizes, rows, exponent)
    spent = int((found * sizes).sum())
    assert found.min() >= 0 and found.max() <= ONE and rows * ONE - len(bins) * 20 < spent <= rows * ONE
    full = [(b, int(p)) for b, p, n in zip(bins, found, sizes, strict=True) if n]
    assert [p for _, p in sorted(full)] == sorted(p for _, p in full)
    for (b, p), (c, q) in pairwise(full):
        if 1 << 10 < min(p, q) and max(p, q) < ONE:
            assert np.log2(p / q) == pytest.approx(exponent * (b - c) / 32, abs=2e-3)


@given(runs=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 16)), max_size=40))
@settings(max_examples=100)
def test_every_row_is_taken_with_its_probability(runs: list[tuple[int, int]]) -> None:
    """Over 16 phases, of probabilities in sixteenths: a row that has p sixteenths is taken p times, and the estimate of any sum
    over the rows, each counted by one over its probability, is that sum on average."""
    sizes, sixteenths = (np.array([run[k] for run in runs], dtype=np.int64) for k in (0, 1))
    first = np.cumsum(sizes) - sizes
    each = np.repeat(sixteenths, sizes)
    taken, counted = np.zeros(len(each)), np.zeros(len(each))
    for phase in range(16):
        rows, probability = reference.sample(first, sizes, sixteenths * (ONE // 16), phase * (ONE // 16))
        assert bool((np.diff(rows) > 0).all()) and abs(len(rows) - each.sum() / 16) < 1
        np.add.at(taken, rows, 1)
        np.add.at(counted, rows, ONE / probability)
    assert np.array_equal(taken, each) and np.allclose(counted[each > 0], 16)


# -- probe ----------------------------------------------------------------------------------------------------------------


@st.composite
def sampled_probes(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `probe` with a sample of none, some or all of each budget."""
    case = draw(probes())
    h, rows = case["shape"][1], case["budget"].rows
    part = torch.tensor([[draw(st.integers(0, int(x))) for x in row] for row in rows], dtype=torch.int32).reshape(rows.shape)
    if draw(st.booleans()):
        part[:, 0] = 0
    exponents = torch.tensor([draw(st.sampled_from([1, 4, 6, 8, 13, 64])) for _ in range(h)], dtype=torch.int32)
    caps = torch.tensor([draw(st.sampled_from([0.0, 1.0, 2.0, 9.0])) for _ in range(h)])
    return {**case, "budget": Budget(rows, sample=Sample(part, exponents, caps)), "size_weighted": True}


@over_backends
@given(case=sampled_probes(), ties=st.booleans())
@settings(max_examples=200)
def test_probe(name: str, case: dict[str, Any], ties: bool) -> None:
    b, h, j, nlist, m = case["shape"]
    z, a = (torch.from_numpy(case["r"].normal(size=(b, h, j, x)).astype(np.float32)) for x in (nlist, m))
    if ties:
        z, a = torch.zeros_like(z), torch.zeros_like(a)
    else:
        z = 2 * z
    weights = []
    for i, head in np.ndindex(b, h):
        s = case["num_segments"][i]
        args = (x.double().numpy() for x in (z[i, head], a[i, head], case["knots"][i, :s]))
        weights.append(reference.run_weights(*args, case["tables"][i, head, :s].numpy().astype(np.int64), True).ravel())
    # float32 cannot tell on which side of an edge a weight lies that is this near to it
    every = np.concatenate(weights).astype(np.float32)
    fraction = (every.view(np.int32).astype(np.int64) + 0x5A5A5) & (1 << 20) - 1
    assume(bool(((fraction > 200) & (fraction < (1 << 20) - 200)).all()))
    order = ("knots", "tables", "num_segments", "budget", "size_weighted")
    got, want = (x.probe(z, a, *(case[x] for x in order)) for x in (backend(name), SPEC))
    assert torch.equal(got.counts, want.counts) and torch.equal(got.rows, want.rows)
    assert got.biases is not None and want.biases is not None and got.biases.dtype == torch.float32
    assert got.biases.shape == got.rows.shape
    present = got.rows >= 0
    torch.testing.assert_close(got.biases[present], want.biases[present], rtol=1e-6, atol=1e-7)
    total = [int(case["tables"][i, 0, :s].long().diff(dim=1).sum()) for i, s in enumerate(case["num_segments"])]
    short = torch.minimum(case["budget"].rows, torch.tensor(total, dtype=torch.int32)[:, None]) - got.counts
    assert bool((short >= 0).all()) and int(short.max()) <= 1
    # without a sample the same rows as ever, to the bit
    plain = backend(name).probe(z, a, case["knots"], case["tables"], case["num_segments"], Budget(case["budget"].rows), True)
    for i, head in np.ndindex(b, h):
        if not case["budget"].sample.rows[i, head]:
            n = int(plain.counts[i, head])
            assert torch.equal(got.rows[i, head, :n], plain.rows[i, head, :n]) and not got.biases[i, head, :n].any()


@over_backends
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_sample_of_scores_that_are_no_numbers(name: str, bad: float) -> None:
    """Any choice will do, but of rows that are there, and of as many."""
    sizes = np.repeat(np.random.default_rng(0).integers(1, 4, (1, 1, 8, 5)), 2, 1)
    tables, knots = torch.from_numpy(tables_of(sizes, 2)), torch.linspace(0, 1, 8)[None]
    z, a = torch.full((1, 2, 3, 5), bad), torch.zeros((1, 2, 3, 3))
    both = [torch.full((1, 2), x, dtype=torch.int32) for x in (20, 11)]
    budget = Budget(both[0], sample=Sample(both[1], torch.tensor([8, 8], dtype=torch.int32), torch.tensor([2.0, 2.0])))
    found = backend(name).probe(z, a, knots, tables, [8], budget, True)
    assert found.counts.tolist() == [[20, 20]] and bool((found.rows.diff() > 0).all()) and bool(found.biases.isfinite().all())
    assert int(found.rows.min()) >= 2 and int(found.rows.max()) < 2 + sizes[0, 0].sum()


def test_what_the_compiled_module_refuses() -> None:
    tables = torch.tensor([[[[0, 9]]]], dtype=torch.int32)
    z, a, knots = torch.zeros((1, 1, 1, 1)), torch.zeros((1, 1, 1, 0)), torch.zeros((1, 1))

    def probe(rows: int, exponent: int, **more: Any) -> None:
        one = [torch.tensor([[x]], dtype=torch.int32) for x in (5, rows)]
        sample = Sample(one[1], torch.tensor([exponent], dtype=torch.int32), torch.tensor([1.0]))
        backend("cpu").probe(z, a, knots, tables, [1], Budget(one[0], sample=sample, **more), True)

    probe(5, 1)
    for rows, exponent, what in ((-1, 1, "rows"), (MAX_SAMPLED + 1, 1, "rows"), (5, 0, "exponents"), (5, 65, "exponents")):
        with pytest.raises(LengthError, match=rf"budget\.sample\.{what}: expected"):
            probe(rows, exponent)
    with pytest.raises(ParameterError, match=r"budget\.sample: expected a budget of rows alone"):
        probe(5, 1, nprobe=1)


# -- scan -----------------------------------------------------------------------------------------------------------------


@over_backends
@given(case=scans(), d=DIMS, e=DIMS, stored=DTYPES, asked=DTYPES, some=st.booleans())
@settings(max_examples=100)
def test_scan(name: str, case: dict[str, Any], d: int, e: int, stored: torch.dtype, asked: torch.dtype, some: bool) -> None:
    """Logits of rows with their biases, of all or of a few."""
    assume(case["rows"] is not None)
    b, h, g, q = case["shape"]
    rng = generator(case["seed"])
    queries = torch.randn((b, h, g, q, d), generator=rng).to(asked)
    keys, values = (torch.randn((b, h, case["capacity"], x), generator=rng).to(stored) for x in (d, e))
    biases = 3 * torch.rand(case["rows"].shape, generator=rng)
    if some:
        biases *= torch.rand(biases.shape, generator=rng) < 0.1
    check_scan(name, {**case, "biases": biases}, queries, keys, values, d**-0.5)


@over_backends
def test_biases_of_zero_change_no_bit(name: str) -> None:
    rng = generator(3)
    queries = torch.randn((2, 2, 3, 1, 64), generator=rng)
    keys, values = (torch.randn((2, 2, 900, 64), generator=rng) for _ in "kv")
    rows = torch.arange(4, 700, 2, dtype=torch.int32).expand(2, 2, -1).contiguous()
    args = rows, torch.full((2, 2), rows.shape[2], dtype=torch.int32), [4, 4], [700, 700], [900, 900], 0.125, True
    plain = backend(name).scan(queries, keys, values, *args)
    zero = backend(name).scan(queries, keys, values, *args, None, None, torch.zeros(rows.shape))
    assert all(torch.equal(x, y) for x, y in zip(plain, zero, strict=True))


# -- the error ------------------------------------------------------------------------------------------------------------


def test_the_estimate_of_the_error_is_of_its_size() -> None:
    """Over many draws, the root mean square of the error and of its estimate agree within a third."""
    squares = np.zeros(2)
    for seed in range(4):
        r = np.random.default_rng(seed)
        d, runs, length = 16, 60, 12
        keys, values = r.normal(size=(runs * length, d)), r.normal(size=(runs * length, d))
        queries = r.normal(size=(8, d))
        first, sizes = np.arange(runs) * length, np.full(runs, length)
        probability = reference.inclusion(reference.weight_bins(np.exp(r.normal(size=runs))), sizes, 200, 4)
        want, _ = reference.attend(queries, keys, values, 0.25)
        for phase in range(0, ONE, ONE // 32):
            rows, each = reference.sample(first, sizes, probability, phase)
            biases = np.log(ONE / each)
            out, lse = reference.attend(queries, keys[rows], values[rows], 0.25, biases=biases)
            estimate = reference.sample_error(queries, keys[rows], values[rows], 0.25, biases, out, lse)
            squares += ((out - want) ** 2).sum(), (estimate**2).sum()
    assert 0.75 < np.sqrt(squares[1] / squares[0]) < 1.33
