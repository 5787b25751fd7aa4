"""Softmax states over disjoint sets of tokens, and their merge."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..backends import get_backend
from ..errors import ShapeError


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint token sets, from the attention over each.

    out_a, out_b : float (..., e), same dtype; lse_a, lse_b : float32 (...), natural log. Returns (out, lse) alike. Associative
    and commutative; the state of no tokens, out 0 and lse -inf, is the identity, and merging two of them gives it again.

    Raises ShapeError or DTypeError. Source: Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135.

    >>> out, lse = merge_states(torch.ones(2, 8), torch.zeros(2), torch.zeros(2, 8), torch.full((2,), -torch.inf))
    >>> bool((out == 1).all()), lse.tolist()
    (True, [0.0, 0.0])
    """
    if out_a.shape != out_b.shape or lse_a.shape != out_a.shape[:-1] or lse_b.shape != lse_a.shape:
        shapes = [tuple(x.shape) for x in (out_a, lse_a, out_b, lse_b)]
        raise ShapeError(f"merge_states: expected out (..., e) and lse (...) of the same shapes, got {shapes}")
    for x, name in ((out_b, "out_b"),):
        checks.array(x, name, "x " * x.ndim, list(out_a.shape), [out_a.dtype], out_a.device)
    for x, name in ((lse_a, "lse_a"), (lse_b, "lse_b")):
        checks.array(x, name, "x " * x.ndim, list(lse_a.shape), [torch.float32], out_a.device)
    args = [x.contiguous() for x in (out_a, lse_a, out_b, lse_b)]
    return get_backend(out_a.device).combine(*args)


def empty_state(queries: Tensor, d_v: int) -> tuple[Tensor, Tensor]:
    """The state of no tokens, for queries (..., d): out of their dtype, (..., d_v), 0; lse float32 (...), -inf."""
    lse = torch.full(queries.shape[:-1], float("-inf"), dtype=torch.float32, device=queries.device)
    return queries.new_zeros((*queries.shape[:-1], d_v)), lse
