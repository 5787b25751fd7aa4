"""Drift: how far a method is from the dense model, by position in a long text that the dense model wrote.

The dense model goes on from a prompt by itself, by chance at temperature 1 (its likeliest tokens soon run in circles). The method
is then fed the same tokens, and its distribution of the next one compared with the dense model's at every position: what is
measured is how its memory ages, not where two texts part. The prompt is read densely, as always, and nothing after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saap_index.errors import LengthError
from saap_index.hf.support import cache_argument

from .quality import divergence

STRETCHES = 16
"""Equal parts of the text, each with a mean."""

_ROWS = 64
"""Logits at once: a vocabulary is wide."""


def continuation(model: Any, tokens: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """``count`` tokens that a model writes after these, drawn from its distribution; a token that ends a text is one as any."""
    from transformers import DynamicCache

    cache, written = {cache_argument(model.base_model): DynamicCache(config=model.config)}, list[int]()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([list(tokens)], dtype=torch.int64, device=model.device)
    with torch.no_grad():
        while len(written) < count:
            hidden = model.base_model(ids, **cache, use_cache=True).last_hidden_state[:, -1]
            chances = model.lm_head(hidden)[0].float().softmax(-1).cpu()
            written.append(int(torch.multinomial(chances, 1, generator=generator)))
            ids = torch.tensor([written[-1:]], dtype=torch.int64, device=model.device)
    return written


def by_position(model: Any, dense: Tensor, sparse: Tensor) -> dict[str, list[float]]:
    """Means over `STRETCHES` of a text, of hidden states (n, width) before the model's head.

    Raises LengthError for fewer tokens than stretches.
    """
    if len(dense) < STRETCHES:
        raise LengthError(f"drift-tokens: expected {STRETCHES} or more, got {len(dense)}")
    kl, same = [], []
    with torch.no_grad():
        for p, q in zip(dense.split(_ROWS), sparse.split(_ROWS), strict=True):
            each, agree = divergence(model.lm_head(p), model.lm_head(q))
            kl.append(each.cpu())
            same.append(agree.double().cpu())
    means = [[float(x.mean()) for x in torch.cat(parts).tensor_split(STRETCHES)] for parts in (kl, same)]
    return {"kl": means[0], "top1": means[1]}
