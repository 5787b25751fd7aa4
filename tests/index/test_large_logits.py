"""Logits of any size: weights sum to one, whatever the rounding of the logarithm of their sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import small_index
from hypothesis import given, settings
from hypothesis import strategies as st

from saap_index import reference
from saap_index.backends import get_backend

BACKENDS = ["cpu", "torch", "reference"]
LSE = st.floats(-(2.0**124), 2.0**124, width=32)
SIZES = [1e3, 1e5, 1e7, 1e9, 3e10, 1e20, 1e30, 3e31, 1e35, 1e37]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_of_any_size(backend: str, size: float, sign: int) -> None:
    index = small_index(32, backend=backend, heads=1, kv_heads=1, scale=1.0, selectivity=1.0)
    values = torch.linspace(-1, 3, 32).expand(1, 1, 60, 32).contiguous()
    index.add(torch.full((1, 1, 60, 32), size / 32), values)
    out, lse = index.search_attend(torch.full((1, 1, 1, 32), float(sign)), return_lse=True)
    assert torch.allclose(out[0, 0, 0], values[0, 0, 0], rtol=1e-5, atol=1e-6)
    assert lse.item() == pytest.approx(sign * size + np.log(60), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40)
@given(
    a=LSE, b=st.one_of(st.none(), st.floats(-20, 20, width=32), LSE), near=st.booleans(),
)
def test_states_merge_at_any_size(backend: str, a: float, b: float | None, near: bool) -> None:
    lse_a = torch.tensor([a], dtype=torch.float32)
    lse_b = torch.tensor([-np.inf if b is None else (a + b if near else b)], dtype=torch.float32)
    x, y = torch.linspace(0, 1, 8)[None], torch.linspace(5, 4, 8)[None]
    out, lse = get_backend(torch.device("cpu"), backend).combine(x, lse_a, y, lse_b)
    want, want_lse = reference.merge_states(*(t.double().numpy() for t in (x, lse_a, y, lse_b)))
    # a float32 lse is no nearer than half a unit: exp of that is what the weights may be off by
    unit = float(max(abs(a), abs(float(lse_b)) if b is not None else 0.0)) * 2.0**-22
    assert np.allclose(lse.numpy(), want_lse, rtol=1e-6, atol=1e-6)
    lowest, highest = torch.minimum(x, y), torch.maximum(x, y)
    assert bool((out >= lowest - 1e-5).all()) and bool((out <= highest + 1e-5).all()), "a mean of the two"
    if unit < 1e-6:
        assert np.allclose(out.numpy(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_has_no_weight_may_hold_anything(backend: str) -> None:
    out, lse = get_backend(torch.device("cpu"), backend).combine(
        torch.ones(1, 8), torch.zeros(1), torch.full((1, 8), float("nan")), torch.full((1,), -torch.inf)
    )
    assert bool((out == 1).all()) and lse.item() == 0
