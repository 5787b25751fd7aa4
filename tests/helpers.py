"""Small indexes, random tokens, and the tolerance of a comparison: the one place that decides each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from saap_index import AsymmetricIndex, KeyQuantizer, QueryRouter, reference
from saap_index.backends import RouterWeights

SMALL = {"sinks": 2, "window": 8, "seal_tokens": 4, "max_segment": 64, "break_even": 0}
"""A layout in which 40 tokens already have several segments."""


def random_router(
    heads: int, nlist: int, d: int, knots: int = 3, units: int = 5, seed: int = 0, size_weighted: bool = True
) -> QueryRouter:
    """Random weights; knots = -1 for a router of lists alone."""
    g = torch.Generator().manual_seed(seed)
    outputs = nlist + knots + 1
    shapes = ((heads, units, d), (heads, units), (heads, outputs, units), (heads, outputs, d), (heads, outputs))
    hidden, bias_hidden, out, skip, bias_out = (torch.randn(s, generator=g) * 0.5 for s in shapes)
    weights = RouterWeights(hidden, bias_hidden, out, skip, bias_out, nlist)
    return QueryRouter(weights, first_knot=1, size_weighted=size_weighted)


def small_index(
    d: int = 32, d_v: int | None = None, nlist: int = 4, heads: int = 4, kv_heads: int = 2, seed: int = 0, **options: object
) -> AsymmetricIndex:
    """A trained-looking index: random centroids and router, the small layout unless ``options`` say otherwise."""
    index = AsymmetricIndex(d, nlist, heads, kv_heads, d_v=d_v, **{**SMALL, **options})  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(seed)
    index.key_quantizer = KeyQuantizer(torch.randn((kv_heads, nlist, d), generator=g))
    index.query_router = random_router(kv_heads, nlist, d, seed=seed)
    return index


def tokens(b: int, heads: int, n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn((b, heads, n, d), generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, hidden: np.ndarray | None = None,
    stand_for: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Float64 attention of queries (g, q, d) over the keys (n, d), values (n, e) of one KV head; hidden : bool (q, n);
    stand_for : (n,) tokens that a key stands for, default 1."""
    g, q, d = queries.shape
    visible = None if hidden is None else np.tile(~hidden, (g, 1))
    flat = queries.double().reshape(g * q, d).numpy()
    out, lse = reference.attend(flat, keys.double().numpy(), values.double().numpy(), scale, visible, stand_for)
    return out.reshape(g, q, -1), lse.reshape(g, q)


def assert_close(got: Tensor, want: np.ndarray, dtype: torch.dtype, magnitude: float = 1.0) -> None:
    """``got`` within rounding of ``want``: a few units in the last place of ``dtype``, of values of that magnitude."""
    error = np.abs(got.double().numpy() - want).max(initial=0.0)
    limit = max(4 * torch.finfo(dtype).eps, 3e-5) * max(1.0, magnitude)
    assert error <= limit, f"error {error:.3g}, allowed {limit:.3g}"
