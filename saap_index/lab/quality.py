"""What a method's answers are worth: per layer against exact attention, and as next-token distributions against dense ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ShapeError
from .measures import Exact, exact_attention
from .method import Layer, Method
from .replace import Prompt


@dataclass(frozen=True)
class LayerQuality:
    """One layer, one sequence; sums and means over its query heads and query positions.

    captured, outside : attention probability of the tokens read, and of all tokens, outside sinks and window; captured is NaN
        for a method that reads no tokens as such. error : mean of |out - exact| / |exact|. total_per_head : float64 (h,), the
        share of all attention that was read, sinks and window included. tokens and the bytes : per step
    """

    captured: float
    outside: float
    error: float
    total_per_head: Tensor
    tokens: float
    kv_bytes: float
    other_bytes: float
    shared_bytes: float


def layer_quality(
    method: Method, prompt: Prompt, number: int, sinks: int = 4, window: int = 128, exact: Exact | None = None
) -> LayerQuality:
    """Replay the kept queries of one layer of a prompt, each over exactly the tokens before it; exact : if known already."""
    at = next(i for i, layer in enumerate(prompt.layers) if layer.number == number)
    layer: Layer = prompt.layers[at]
    keys, values, queries = prompt.keys[at], prompt.values[at], prompt.queries[at]
    if exact is None:
        exact = exact_attention(keys, values, queries.flatten(0, 1), prompt.positions, sinks, window)
    state = method.start(layer, keys.shape[1])
    done = 0
    captured = outside = 0.0
    errors, reads = [], []
    total = torch.zeros(layer.heads, dtype=torch.float64)
    for j, position in enumerate(prompt.positions.tolist()):
        state.append(keys[:, done : position + 1], values[:, done : position + 1])
        if method.observed:  # the queries between those that are measured
            prompt.show(state, at, max(done, position - method.observed), position)
        done = position + 1
        step = state.attend(queries[:, :, j])
        want = exact.output[:, :, j]
        errors.append(((step.out - want).norm(dim=-1) / want.norm(dim=-1)).mean())
        mass = exact.probabilities[:, :, j, :done]
        far = exact.outside[j, :done]
        outside += float(mass[:, :, far].sum())
        if step.chosen is None:
            captured = float("nan")
        else:
            chosen = step.chosen[:, None] if step.chosen.ndim == 2 else step.chosen
            captured += float((mass * (chosen & far)).sum())
            total += (mass * chosen).sum(-1).mean(1)
        reads.append(torch.tensor([step.tokens, step.kv_bytes, step.other_bytes, step.shared_bytes]))
    tokens, kv_bytes, other_bytes, shared_bytes = torch.stack(reads).double().mean(0).tolist()
    steps = len(prompt.positions)
    return LayerQuality(
        captured, outside, float(torch.stack(errors).mean()), total / steps, tokens, kv_bytes, other_bytes, shared_bytes
    )


@dataclass(frozen=True)
class Agreement:
    """Next-token distributions against the dense model's, means over the tokens.

    kl : KL(dense || method), nats; top1 : share of tokens with the same first choice; log_perplexity_ratio : mean negative
    log-likelihood of the text minus the dense model's (the logarithm of the perplexity ratio).
    """

    kl: float
    top1: float
    log_perplexity_ratio: float


def agreement(dense: Tensor, found: Tensor, targets: Tensor) -> Agreement:
    """dense, found : logits (n, vocabulary); targets : int64 (n,), the tokens that follow."""
    if dense.shape != found.shape or targets.shape != dense.shape[:1]:
        shapes = [tuple(x.shape) for x in (dense, found, targets)]
        raise ShapeError(f"dense, found, targets: expected equal lengths, got {shapes}")
    p, q = dense.double().log_softmax(-1), found.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    gained = (p - q).gather(1, targets[:, None]).mean()
    return Agreement(float(kl), float((dense.argmax(-1) == found.argmax(-1)).double().mean()), float(gained))


def spread(values: Mapping[str, float] | list[float]) -> tuple[float, float]:
    """Mean and standard deviation (0 for a single value)."""
    x = torch.tensor(list(values.values()) if isinstance(values, Mapping) else values, dtype=torch.float64)
    return float(x.mean()), float(x.std()) if len(x) > 1 else 0.0
