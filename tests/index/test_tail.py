"""The tail estimate at the seam: means of runs, which of them are read, and what they add to the softmax, by backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backends import (
    DIMS,
    DTYPES,
    EPS32,
    GROUPS,
    SEEDS,
    backend,
    check_probe,
    check_scan,
    generator,
    over_backends,
    probes,
    tables_of,
)
from torch import Tensor

from saap_index.backends import Budget, Tail

INDEXES = pytest.mark.parametrize("name", ["cpu", "torch", "reference"])

# -- means ----------------------------------------------------------------------------------------------------------------


@over_backends
@given(
    h=st.integers(1, 3), nlist=st.integers(1, 9), longest=st.sampled_from([1, 3, 40]), start=st.integers(0, 5), d=DIMS, e=DIMS,
    dtype=DTYPES, offset=st.sampled_from([0.0, 100.0]), seed=SEEDS,
)
def test_means(
    name: str, h: int, nlist: int, longest: int, start: int, d: int, e: int, dtype: torch.dtype, offset: float, seed: int
) -> None:
    """One rounding to the storage type, and that of float32 sums; memory beside the outputs is left alone."""
    r = np.random.default_rng(seed)
    sizes = r.integers(0, longest + 1, (1, h, 1, nlist))
    sizes[:, :, 0, 0] += sizes.sum(3).max() - sizes.sum(3)[:, :, 0]  # as many rows for every head
    tables = torch.from_numpy(tables_of(sizes, start)).expand(2, h, 3, -1).clone()
    rows = start + int(sizes[0, 0].sum()) + 3
    keys, values = ((offset + torch.randn((h, rows, x), generator=generator(seed))).to(dtype) for x in (d, e))
    outs = [torch.full((2, h, 3, nlist, x), 7.0, dtype=dtype) for x in (d, e)]
    backend(name).means(keys, values, tables[0, :, 1], outs[0][0, :, 1], outs[1][0, :, 1])
    for out, x in zip(outs, (keys, values), strict=True):
        assert bool((out[1] == 7).all() and (out[0, :, 0] == 7).all() and (out[0, :, 2] == 7).all())
        for head, no in np.ndindex(h, nlist):
            low, high = tables[0, head, 1, no], tables[0, head, 1, no + 1]
            got, part = out[0, head, 1, no].double(), x[head, low:high].double()
            if not len(part):
                assert not got.any()
                continue
            worst = len(part) * EPS32 * part.abs().max() + torch.finfo(dtype).eps / 2 * part.mean(0).abs()
            assert bool(((got - part.mean(0)).abs() <= worst + torch.finfo(dtype).smallest_normal).all())


@over_backends
def test_means_of_the_largest_numbers_are_finite(name: str) -> None:
    keys = torch.full((1, 300, 8), torch.finfo(torch.float16).max, dtype=torch.float16)
    table, out = torch.tensor([[0, 300]], dtype=torch.int32), torch.empty((1, 1, 8), dtype=torch.float16)
    backend(name).means(keys, keys, table, out, out.clone())
    assert torch.equal(out[0, 0], keys[0, 0])


# -- which runs -----------------------------------------------------------------------------------------------------------


@st.composite
def tails(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `probe` that ask for entries: of no segment, some, or all; none, a few, or more than there are runs."""
    case = draw(probes())
    b, h, _, nlist, _ = case["shape"]
    limits = [[draw(st.one_of(st.integers(0, 2 * nlist), st.sampled_from([0, 7 * nlist]))) for _ in range(h)] for _ in range(b)]
    means = [draw(st.integers(0, s)) for s in case["num_segments"]]
    budget = replace(case["budget"], nprobe=0, mean_entries=torch.tensor(limits, dtype=torch.int32), means=means)
    return {**case, "budget": budget, "size_weighted": True}


@over_backends
@given(case=tails())
@settings(max_examples=120)
def test_probe_of_the_tail(name: str, case: dict[str, Any]) -> None:
    b, h, j, nlist, m = case["shape"]
    z, a = (torch.from_numpy(case["r"].normal(size=(b, h, j, x)).astype(np.float32)) for x in (nlist, m))
    check_probe(name, case, 2 * z, a)


@over_backends
@given(case=tails(), minus=st.booleans())
@settings(max_examples=60)
def test_probe_of_the_tail_with_ties(name: str, case: dict[str, Any], minus: bool) -> None:
    """Equal runs: those of newer segments first, then those of lower lists; runs that weigh nothing come last, but they come."""
    b, h, j, nlist, m = case["shape"]
    z = torch.zeros((b, h, j, nlist))
    if minus:
        z[..., case["r"].integers(nlist)] = -torch.inf
    check_probe(name, case, z, torch.zeros((b, h, j, m)))


@INDEXES
def test_the_tail_is_the_best_of_what_is_not_read(name: str) -> None:
    tables = torch.from_numpy(tables_of(np.array([[[[2, 2, 0], [1, 3, 0], [2, 2, 2]]]]), 1))  # runs of 2 2 0, 1 3 0, 2 2 2 rows
    z, a, knots = torch.tensor([[[[1.0, 0.0, 9.0]]]]), torch.zeros((1, 1, 1, 0)), torch.zeros((1, 3))

    def probe(rows: int, entries: int, means: int) -> tuple[list[int], list[int]]:
        one = [torch.tensor([[x]], dtype=torch.int32) for x in (rows, entries)]
        found = backend(name).probe(z, a, knots, tables, [3], Budget(one[0], mean_entries=one[1], means=[means]), True)
        assert found.tail is not None and found.tail_counts is not None and found.tail_counts.tolist() == [[found.tail.shape[2]]]
        return found.rows[0, 0].tolist(), found.tail[0, 0].tolist()

    assert probe(2, 1, 3) == ([13, 14], [6])  # run 8 is read; e**1 * 2 is more than e**0 * 3; run 6 is newer than run 0
    assert probe(2, 3, 3) == ([13, 14], [0, 4, 6])
    assert probe(3, 3, 3) == ([10, 13, 14], [0, 3, 4]), "a run of which one row is read is no entry"
    assert probe(2, 9, 2) == ([13, 14], [0, 1, 3, 4]), "nor is one of a segment without means, or an empty one"
    assert probe(2, 9, 0) == ([13, 14], []) and probe(0, 0, 3) == ([], [])


@over_backends
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["one list", "every score", "the last knot"])
def test_the_tail_of_scores_that_are_no_numbers(name: str, bad: float, where: str) -> None:
    r = np.random.default_rng(0)
    sizes = np.repeat(r.integers(1, 4, (1, 1, 8, 5)), 2, 1)
    z, a = (torch.from_numpy(r.normal(size=(1, 2, 3, n)).astype(np.float32)) for n in (5, 3))
    {"one list": z[:, 0, :, 1], "every score": z, "the last knot": a[:, 0, 0, -1]}[where].fill_(bad)
    limits = [torch.full((1, 2), x, dtype=torch.int32) for x in (11, 6)]
    tables, knots = torch.from_numpy(tables_of(sizes, 2)), torch.linspace(0, 1, 8)[None]
    budget = Budget(limits[0], mean_entries=limits[1], means=[4], unread_mass=torch.tensor([0.1, 0.0]))
    found = backend(name).probe(z, a, knots, tables, [8], budget, True)
    for head in range(2):
        rows = found.rows[0, head, : found.counts[0, head]]
        tail = found.tail[0, head, : found.tail_counts[0, head]].long()
        assert len(rows) <= 11 and bool((rows.diff() > 0).all())
        assert len(tail) == 6 and bool((tail.diff() > 0).all()) and int(tail.min()) >= 0 and int(tail.max()) < 20
        first, past = (tables[0, head, :, x].flatten()[tail] for x in (slice(0, 5), slice(1, 6)))
        assert not any(((rows >= low) & (rows < high)).any() for low, high in zip(first, past, strict=True))


# -- what they add --------------------------------------------------------------------------------------------------------


@st.composite
def scans_with_tails(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `scan` with entries: rows of some runs, means of some others, none of either now and then."""
    b, h, g, q = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(GROUPS), draw(st.integers(1, 8))
    r = np.random.default_rng(draw(SEEDS))
    nlist, segments, means = draw(st.sampled_from([1, 3, 40])), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    means = min(means, segments)
    sizes = r.integers(0, 5, (b, h, segments, nlist))
    sizes[:, :, :, 0] += sizes.sum(3).max((1, 2))[:, None, None] - sizes.sum(3)
    sinks = draw(st.integers(0, 3))
    tables = tables_of(sizes, sinks)
    sealed = [int(tables[i, 0, -1, -1]) for i in range(b)]
    recent = draw(st.sampled_from([8, 30]))
    kind = draw(st.sampled_from(["both", "rows only", "entries only", "neither"]))
    choice = r.integers(0, 3, (b, h, segments, nlist))  # 1: rows are read, 2: the mean is
    rows = [[np.concatenate([np.empty(0, np.int32)] + [
        np.arange(tables[i, k, s, x], tables[i, k, s, x + 1]) for s in range(segments) for x in range(nlist)
        if choice[i, k, s, x] == 1 and kind in ("both", "rows only")
    ]) for k in range(h)] for i in range(b)]
    runs = [[np.array([
        s * nlist + x for s in range(means) for x in range(nlist)
        if choice[i, k, s, x] == 2 and sizes[i, k, s, x] and kind in ("both", "entries only")
    ], np.int32) for k in range(h)] for i in range(b)]

    def padded(found: list[list[np.ndarray]]) -> tuple[Tensor, Tensor]:
        counts = np.array([[len(x) for x in heads] for heads in found], np.int32)
        out = np.full((b, h, counts.max()), -1, np.int32)
        for i, k in np.ndindex(b, h):
            out[i, k, : counts[i, k]] = found[i][k]
        return torch.from_numpy(out), torch.from_numpy(counts)

    return {
        "shape": (b, h, g, q), "capacity": max(sealed) + recent + 2, "causal": draw(st.booleans()), "seed": draw(SEEDS),
        **dict(zip(("rows", "counts"), padded(rows), strict=True)), "runs": padded(runs), "means": (means, nlist),
        "sinks": [sinks] * b, "sealed": sealed, "lengths": [n + recent for n in sealed], "tables": torch.from_numpy(tables),
    }


@over_backends
@given(
    case=scans_with_tails(), d=DIMS, e=DIMS, stored=DTYPES, asked=DTYPES, size=st.sampled_from([0.0, 1.0, 30.0]),
)
@settings(max_examples=80)
def test_scan_with_a_tail(
    name: str, case: dict[str, Any], d: int, e: int, stored: torch.dtype, asked: torch.dtype, size: float
) -> None:
    check_tail(name, case, d, e, stored, asked, size)


def check_tail(
    name: str, case: dict[str, Any], d: int, e: int, stored: torch.dtype, asked: torch.dtype, size: float
) -> None:
    b, h, g, q = case["shape"]
    rng = generator(case["seed"])
    queries = (size * torch.randn((b, h, g, q, d), generator=rng)).to(asked)
    keys, values = (torch.randn((b, h, case["capacity"], x), generator=rng).to(stored) for x in (d, e))
    means = [torch.full((b, h, *case["means"], x), torch.nan, dtype=stored) for x in (d, e)]  # of other runs: never read
    runs, counts = case["runs"]
    for i, k in np.ndindex(b, h):
        chosen = runs[i, k, : counts[i, k]].long()
        for x in means:
            x[i, k].view(-1, x.shape[-1])[chosen] = torch.randn((len(chosen), x.shape[-1]), generator=rng).to(stored)
    case["tail"] = Tail(runs, counts, *means, case["tables"])
    check_scan(name, case, queries, keys, values, d**-0.5)


@over_backends
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_scan_of_many_entries(name: str, stored: torch.dtype) -> None:
    """More than one item of work holds; no row read but for the recent ones."""
    nlist, rng = 5000, generator(1)
    tables = torch.arange(0, 2 * nlist + 1, 2, dtype=torch.int32)[None, None, None]
    means = [torch.randn((1, 1, 1, nlist, x), generator=rng).to(stored) for x in (64, 40)]
    runs = torch.arange(0, nlist, 2, dtype=torch.int32)[None, None]
    case = {
        "shape": (1, 1, 3, 2), "causal": True, "rows": None, "counts": None, "sinks": [0], "sealed": [2 * nlist],
        "lengths": [2 * nlist + 9], "tail": Tail(runs, torch.tensor([[nlist // 2]], dtype=torch.int32), *means, tables),
    }
    keys, values = (torch.randn((1, 1, 2 * nlist + 9, x), generator=rng).to(stored) for x in (64, 40))
    check_scan(name, case, torch.randn((1, 1, 3, 2, 64), generator=rng), keys, values, 0.125)
