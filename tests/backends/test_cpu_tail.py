"""The compiled kernels on each instruction set: stopping at enough mass, means of runs, and the tail in probe and scan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from test_backends import DTYPES, SEEDS, check_probe
from test_cpu_kernels import CPU, DIMS, _cpu, randn
from test_tail import check_tail, scans_with_tails, tails
from torch import Tensor

from saap_index.backends import Budget, Tail
from saap_index.errors import DTypeError, LayoutError, LengthError, ShapeError


@pytest.fixture(params=_cpu.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


@settings(max_examples=examples(40))
@given(dtype=DTYPES, d=DIMS, e=DIMS, lists=st.integers(1, 5), longest=st.sampled_from([1, 40]), seed=SEEDS)
def test_means(dtype: torch.dtype, d: int, e: int, lists: int, longest: int, seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(0, longest + 1, lists)
    table = torch.from_numpy(np.concatenate([[2], 2 + sizes.cumsum()])).int()[None]
    rows = int(table[0, -1]) + 3
    keys, values = randn(1, rows, d, seed=seed, dtype=dtype), randn(1, rows, e, seed=seed + 1, dtype=dtype)
    outs = [torch.full((1, lists, x), torch.nan, dtype=dtype) for x in (d, e)]
    CPU.means(keys, values, table, *outs)
    for x, out in zip((keys, values), outs, strict=True):
        sums = np.zeros((lists, x.shape[2]), np.float32)
        for no in range(lists):
            for row in x[0, table[0, no] : table[0, no + 1]].float().numpy():
                sums[no] += row
        want = torch.from_numpy(sums / np.maximum(1, sizes)[:, None].astype(np.float32)).to(dtype)
        assert torch.equal(out[0], want), "float32 sums in row order, rounded once"


def test_means_refuses() -> None:
    x, out = torch.zeros((1, 9, 8)), torch.zeros((1, 3, 8))
    for table in ([0, 3, 2, 5], [-1, 2, 3, 4], [0, 2, 3, 10]):
        with pytest.raises(IndexError, match="means: table"):
            CPU.means(x, x, torch.tensor([table]).int(), out, out)
    with pytest.raises(ShapeError, match="mean_values"):
        CPU.means(x, x, torch.zeros((1, 4)).int(), out, out[:, :2])
    with pytest.raises(LayoutError, match="mean_keys"):
        CPU.means(x, x, torch.zeros((1, 4)).int(), torch.zeros((1, 8, 3)).transpose(1, 2), out)


@settings(max_examples=examples(60))
@given(case=tails())
def test_probe_of_the_tail(case: dict[str, Any]) -> None:
    b, h, j, lists, m = case["shape"]
    z, a = (torch.from_numpy(case["r"].normal(size=(b, h, j, x)).astype(np.float32)) for x in (lists, m))
    check_probe("cpu", case, 2 * z, a)


def test_enough_of_scores_beyond_float32() -> None:
    """The weights are those of float64: half of the attention lies in either of two runs, e**-200 of it in all the others."""
    z, a = torch.tensor([[[[0.0, -200.0, 0.0, -250.0]]]]), torch.full((1, 1, 1, 1), 50.0)
    tables, knots = torch.tensor([[[[0, 3, 6, 9, 12]]]], dtype=torch.int32), torch.zeros((1, 1))
    for unread_mass, want in ((0.6, [0, 1, 2]), (0.4, [0, 1, 2, 6, 7, 8]), (1e-30, [0, 1, 2, 6, 7, 8]), (1.1, [])):
        budget = Budget(torch.tensor([[12]], dtype=torch.int32), unread_mass=torch.tensor([unread_mass]))
        assert CPU.probe(z, a, knots, tables, [1], budget, True).rows[0, 0].tolist() == want


def test_probe_refuses_budgets() -> None:
    z, a = torch.zeros((1, 2, 1, 3)), torch.zeros((1, 2, 1, 1))
    tables = torch.tensor([0, 1, 2, 3]).int().expand(1, 2, 1, 4).contiguous()
    ones = torch.ones((1, 2), dtype=torch.int32)

    def refused(error: type[Exception], word: str, budget: Budget) -> None:
        with pytest.raises(error, match=word):
            CPU.probe(z, a, torch.zeros((1, 1)), tables, [1], budget, True)

    refused(ShapeError, r"budget\.rows", Budget(ones[:, :1]))
    refused(DTypeError, r"budget\.rows", Budget(ones.long()))
    refused(ShapeError, r"budget\.miss", Budget(ones, unread_mass=torch.ones(3)))
    refused(DTypeError, r"budget\.miss", Budget(ones, unread_mass=torch.ones(2).double()))
    refused(LengthError, r"budget\.means", Budget(ones, mean_entries=ones))
    refused(LengthError, r"budget\.means", Budget(ones, mean_entries=ones, means=[2]))
    refused(ShapeError, r"budget\.entries", Budget(ones, mean_entries=ones[:, :1], means=[1]))
    found = CPU.probe(z, a, torch.zeros((1, 1)), tables, [1], Budget(-ones, mean_entries=-ones, means=[1]), True)
    assert found.rows.shape == (1, 2, 0) and found.tail is not None and found.tail.shape == (1, 2, 0)


@settings(max_examples=examples(40))
@given(case=scans_with_tails(), d=DIMS, e=DIMS, stored=DTYPES, asked=DTYPES)
def test_scan_with_a_tail(case: dict[str, Any], d: int, e: int, stored: torch.dtype, asked: torch.dtype) -> None:
    check_tail("cpu", case, d, e, stored, asked, 1.0)


def test_scan_refuses_entries() -> None:
    k, means = torch.zeros((1, 2, 16, 32), dtype=torch.bfloat16), torch.zeros((1, 2, 1, 4, 32), dtype=torch.bfloat16)
    q, tables = torch.zeros((1, 2, 2, 1, 32)), torch.tensor([1, 3, 3, 4, 8], dtype=torch.int32).expand(1, 2, 2, 5).contiguous()
    fine = Tail(torch.tensor([0, 2]).int().expand(1, 2, 2).contiguous(), torch.full((1, 2), 2).int(), means, means, tables)

    def scan(**changes: Tensor) -> None:
        CPU.scan(q, k, k, None, None, [1], [8], [16], 1.0, False, replace(fine, **changes))

    scan()
    for runs in ([0, 4], [0, -1], [0, 1], [0, 2**31 - 1]):  # past the means, none, an empty run, far away
        with pytest.raises(IndexError, match="tail"):
            scan(runs=torch.tensor(runs).int().expand(1, 2, 2).contiguous())
    for counts in (3, -1):
        with pytest.raises(IndexError, match="tail"):
            scan(counts=torch.full((1, 2), counts).int())
    for name, error in (("runs", ShapeError), ("counts", ShapeError), ("keys", ShapeError), ("values", ShapeError)):
        with pytest.raises(error, match=rf"tail\.{name}"):
            scan(**{name: getattr(fine, name)[:, :1]})
    with pytest.raises(DTypeError, match=r"tail\.keys"):
        scan(keys=means.half())
    with pytest.raises(ShapeError, match=r"tail\.tables"):
        scan(tables=tables[..., :-1].contiguous())
