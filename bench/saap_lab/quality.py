"""What a method's answers are worth: per layer against exact attention, and as next-token distributions against dense ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saap_index.errors import ShapeError

from .measures import Exact, exact_attention
from .method import Layer, Method
from .replace import Prompt
from .steps import replay


@dataclass(frozen=True)
class LayerQuality:
    """One layer, one sequence; sums and means over its query heads and query positions."""

    captured: float
    """Attention probability of the tokens read outside sinks and window; NaN for a method that reads no tokens as such."""
    outside: float
    """Attention probability of all tokens outside sinks and window."""
    error: float
    """Mean of |out - exact| / |exact|."""
    total_per_head: Tensor
    """float64 (h,), the share of all attention that was read, sinks and window included"""
    tokens: float
    """Read per step."""
    kv_bytes: float
    """Per step, as the others."""
    other_bytes: float
    shared_bytes: float
    coded_bytes: dict[str, float] = field(default_factory=dict, kw_only=True)
    """Of keys and values per step by storage code, see `Attended.coded_bytes`; empty where they cannot be coded."""


def exact_layer(prompt: Prompt, at: int, sinks: int = 4, window: int = 128) -> Exact:
    """Exact attention of the kept queries in layer number ``at`` of those of a prompt."""
    layer = prompt.layers[at]
    queries = prompt.queries[at].float().flatten(0, 1) * (layer.scale * layer.d**0.5)  # the measure divides by the root of d
    return exact_attention(prompt.keys[at], prompt.values[at], queries, prompt.positions, sinks, window)


def layer_quality(
    method: Method, prompt: Prompt, number: int, sinks: int = 4, window: int = 128, exact: Exact | None = None,
    together: bool = False,
) -> LayerQuality:
    """Replay the kept queries of one layer of a prompt, each over exactly the tokens before it. What precedes the first of them
    comes at once, as a prompt does. exact : if known already; together : see `steps.replay`."""
    at = next(i for i, layer in enumerate(prompt.layers) if layer.number == number)
    layer: Layer = prompt.layers[at]
    first, stop = int(prompt.positions[0]), int(prompt.positions[-1]) + 1
    exact = exact_layer(prompt, at, sinks, window) if exact is None else exact
    state = method.start(layer, prompt.keys[at].shape[1])

    def show(begin: int, end: int) -> None:
        """The queries between those that are measured."""
        prompt.show(state, at, max(first + begin, first + end - method.observed), first + end)

    if first:
        state.append(prompt.keys[at][:, :first], prompt.values[at][:, :first])
        prompt.show(state, at, first - method.observed, first)
    keys, values = prompt.keys[at][:, first:stop], prompt.values[at][:, first:stop]
    queries, at_steps = prompt.queries[at].float(), prompt.positions - first
    steps = replay(state, keys, values, queries, at_steps, together, show if method.observed else None)
    captured = outside = 0.0
    total = torch.zeros(layer.heads, dtype=torch.float64, device=layer.device)
    for j, (step, done) in enumerate(zip(steps, (prompt.positions + 1).tolist(), strict=True)):
        mass, far = exact.probabilities[:, :, j, :done], exact.outside[j, :done]
        outside += float(mass[:, :, far].sum())
        if step.chosen is None:
            captured = float("nan")
        else:
            read = mass * (step.chosen[:, None] if step.chosen.ndim == 2 else step.chosen)
            captured += float(read[:, :, far].sum())
            total += read.sum(-1).mean(1)
    out, want = torch.stack([step.out for step in steps], 2), exact.output
    error = ((out - want).norm(dim=-1) / want.norm(dim=-1)).mean()
    reads = torch.tensor(
        [[step.tokens, step.kv_bytes, step.other_bytes, step.shared_bytes] for step in steps], dtype=torch.float64, device="cpu"
    )
    places = (prompt.positions + 1).tolist()
    coded = mean_by_name([step.coded_bytes(layer, min(n, sinks + window)) for step, n in zip(steps, places, strict=True)])
    return LayerQuality(captured, outside, float(error), (total / len(steps)).cpu(), *reads.mean(0).tolist(), coded_bytes=coded)


@dataclass(frozen=True)
class Agreement:
    """Next-token distributions against the dense model's, means over the tokens."""

    kl: float
    """KL(dense || method), nats."""
    top1: float
    """Share of tokens with the same first choice."""
    log_perplexity_ratio: float
    """Mean negative log-likelihood of the text minus the dense model's."""


def agreement(dense: Tensor, sparse: Tensor, targets: Tensor) -> Agreement:
    """dense, sparse : logits (n, vocabulary); targets : int64 (n,), the tokens that follow."""
    if dense.shape != sparse.shape or targets.shape != dense.shape[:1]:
        shapes = [tuple(x.shape) for x in (dense, sparse, targets)]
        raise ShapeError(f"dense, sparse, targets: expected equal lengths, got {shapes}")
    kl, same = divergence(dense, sparse)
    p, q = dense.double().log_softmax(-1), sparse.double().log_softmax(-1)
    gained = (p - q).gather(1, targets[:, None]).mean()
    return Agreement(float(kl.mean()), float(same.double().mean()), float(gained))


def divergence(dense: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token: KL(dense || sparse) in nats, float64 (n,), and whether the first choice is the same, bool (n,)."""
    p, q = dense.double().log_softmax(-1), sparse.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1), dense.argmax(-1) == sparse.argmax(-1)


def mean_by_name(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of what all of them have."""
    names = [name for name in (each[0] if each else {}) if all(name in x for x in each)]
    return {name: sum(x[name] for x in each) / len(each) for name in names}


def spread(values: Mapping[str, float] | list[float]) -> tuple[float, float]:
    """Mean and standard deviation; a single value has none, NaN."""
    x = torch.tensor(list(values.values()) if isinstance(values, Mapping) else values, dtype=torch.float64, device="cpu")
    return float(x.mean()), float(x.std()) if len(x) > 1 else math.nan
