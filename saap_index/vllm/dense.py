"""Prompts: dense causal attention of many queries over the pages of one sequence, by torch. Knows no vLLM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..precision import full_precision

QUERIES = 512
"""At a time, where a prompt goes on: bounds what is multiplied only to be hidden."""


@full_precision
def continue_prompt(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of the last q of n tokens. queries : (q, hq, d); keys : (h, n, d), values : (h, n, e) of one dtype.

    Returns (q, hq, e).
    """
    q, n = len(queries), keys.shape[1]
    x, k, v = queries.transpose(0, 1)[None], keys[None], values[None]
    if q == n:
        out = functional.scaled_dot_product_attention(x, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)
    parts = []
    for first in range(0, q, QUERIES):
        last = min(q, first + QUERIES)
        end = n - q + last
        newest = torch.arange(end - (last - first), end, dtype=torch.int64, device=queries.device)
        seen = torch.arange(end, dtype=torch.int64, device=queries.device) <= newest[:, None]
        part = x[:, :, first:last], k[:, :, :end], v[:, :, :end]
        parts.append(functional.scaled_dot_product_attention(*part, attn_mask=seen, scale=scale, enable_gqa=True))
    return torch.cat(parts, 2)[0].transpose(0, 1)
