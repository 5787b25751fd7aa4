"""Operators of other architectures: a chunked pass equals the recurrence and the sum it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saap_index.errors import LengthError, ParameterError, ShapeError
from saap_lab import linear
from saap_lab.method import Layer


def arrays(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, n, x, generator=g, dtype=torch.float64) for x in (8, 8, 12))
    return q, k, v


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 70), chunk=st.integers(1, 80), layer=st.integers(0, 3), seed=st.integers(0, 99))
def test_chunks_equal_the_recurrence_and_the_sum(n: int, chunk: int, layer: int, seed: int) -> None:
    q, k, v = arrays(n, seed)
    decays = linear.lightning_decays(3, layer, 4)
    found, last = linear.decayed_prefill(q, k, v, decays, chunk)
    state, outs = torch.zeros(3, 8, 12, dtype=torch.float64), []
    for t in range(n):
        out, state = linear.decayed_step(state, q[:, t], k[:, t], v[:, t], decays)
        outs.append(out)
    torch.testing.assert_close(found, torch.stack(outs, 1))
    torch.testing.assert_close(last, state)
    age = torch.arange(n)[:, None] - torch.arange(n)
    weights = (decays[:, None, None] ** age.clamp(min=0)) * (age >= 0)
    torch.testing.assert_close(found, (q @ k.mT * weights) @ v)


def test_fast_forgetting_heads_stay_finite() -> None:
    q, k, v = arrays(300)
    found, _ = linear.decayed_prefill(q.float(), k.float(), v.float(), torch.tensor([1e-6, 0.5, 1.0]), 128)
    assert found.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 30), seed=st.integers(0, 99))
def test_simpletron_is_the_product_in_either_order_and_its_last_causal_row(n: int, seed: int) -> None:
    q, k, v = arrays(n, seed)
    found = linear.simpletron(q, k, v)
    torch.testing.assert_close(found, torch.einsum("hnd,hmd,hme->hne", q, k, v) / n)
    causal, _ = linear.decayed_prefill(q, k, v, torch.ones(3))
    torch.testing.assert_close(found[:, -1], causal[:, -1] / n)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 99))
def test_kronecker_attends_to_means(rows: int, columns: int, seed: int) -> None:
    q, k, v = arrays(rows * columns, seed)
    found = linear.kronecker(q, k, v, rows, 0.5)
    grid = k.view(3, rows, columns, 8), v.view(3, rows, columns, 12)
    means = [torch.cat([torch.stack([x[:, r].mean(1) for r in range(rows)], 1), x.mean(1)], 1) for x in grid]
    torch.testing.assert_close(found, (q @ means[0].mT * 0.5).softmax(-1) @ means[1])
    if columns == 1 and rows == 1:  # one token sees itself
        torch.testing.assert_close(found, v)
    both = linear.kronecker_all(q, k, v, rows, 0.5).view(3, rows, columns, 12)
    torch.testing.assert_close(
        both[:, :1] - both, (both[:, :1, :1] - both[:, :, :1]).expand_as(both)
    )  # a sum of rows and columns


def test_a_constant_grid_is_dense_attention() -> None:
    q, k, v = arrays(12)
    k, v = k[:, :1].expand(-1, 12, -1), v[:, :1].expand(-1, 12, -1)
    torch.testing.assert_close(linear.kronecker(q, k, v, 3, 0.3), (q @ k.mT * 0.3).softmax(-1) @ v)


def test_cost_lines_count_what_a_step_reads() -> None:
    found = {line.name: line for line in linear.cost_lines(Layer(0, 2, 3, 16, 24, 0.25, None), 144, repeats=2)}
    assert found["dense"].bytes == 2 * 144 * 40 * 2 and found["dense"].kind == "yardstick"
    assert found["lightning"].bytes == found["simpletron"].bytes == 2 * 6 * 16 * 24 * 4
    assert found["kronecker"].bytes == 2 * 24 * 40 * 2 and found["kronecker"].kind == "other architecture"
    assert all(line.seconds > 0 for line in found.values())


def test_bad_input_is_named() -> None:
    q, k, v = arrays(6)
    with pytest.raises(ParameterError, match="chunk"):
        linear.decayed_prefill(q, k, v, torch.ones(3), 0)
    with pytest.raises(ShapeError, match="rows"):
        linear.kronecker(q, k, v, 4, 1.0)
    with pytest.raises(ShapeError, match="expected"):
        linear.simpletron(q, k[:, :2], v)
    with pytest.raises(LengthError, match="queries"):
        linear.simpletron(q[:, :0], k[:, :0], v[:, :0])
    with pytest.raises(ParameterError, match="tokens"):
        linear.cost_lines(Layer(0, 1, 1, 4, 4, 1.0, None), 0)
