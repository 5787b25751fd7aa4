"""SparseK (Lou et al., 2024, arXiv 2406.16747): a differentiable top-k over scores that do not depend on the query.

The operator is the Euclidean projection of scores onto {p in [0, 1]^m, sum p = k}: p = clip(z - tau, 0, 1). As candidates are
added tau never falls, so a token that left the best k never comes back and the cache keeps a constant size. Scores come from a
linear map of a token's key and value, trained here on a frozen model (published: of hidden states, trained with the model).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saap_index.errors import NotTrainedError, ParameterError

from .method import ITEM_BYTES, Attended, Cache, Layer, Method, State


class _Project(torch.autograd.Function):
    """The projection with its exact gradient: on the entries strictly inside (0, 1), the identity minus their mean."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, k: int) -> Tensor:
        p = (z - threshold(z, k)).clamp(0, 1)
        ctx.save_for_backward((p > 0) & (p < 1))
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        grad = grads[0] * inside
        count = inside.sum(-1, keepdim=True).clamp(min=1)
        return inside * (grad - grad.sum(-1, keepdim=True) / count), None


def project(z: Tensor, k: int) -> Tensor:
    """p = argmin |p - z|^2 over 0 <= p <= 1, sum p = min(k, m); z (..., m) of any float dtype. Differentiable."""
    if k < 0:
        raise ParameterError(f"k: expected at least 0, got {k}")
    p: Tensor = torch.ones_like(z) if k >= z.shape[-1] else _Project.apply(z, k)  # type: ignore[no-untyped-call]
    return p


def threshold(z: Tensor, k: int) -> Tensor:
    """tau with sum clip(z - tau, 0, 1) = k, for 0 <= k < m: (..., 1). Exact, by sorting the 2 m breakpoints z and z - 1."""
    points = torch.cat([z, z - 1], -1).sort(-1, descending=True).values
    # The sum as a function of tau, at each breakpoint; it rises as tau falls, and is linear in between.
    ordered = z.sort(-1, descending=True).values
    sums = torch.cat([torch.zeros_like(ordered[..., :1]), ordered.cumsum(-1)], -1)
    ascending = -ordered
    above = torch.searchsorted(ascending.contiguous(), (-points).contiguous())  # entries > tau
    full = torch.searchsorted(ascending.contiguous(), (-(points + 1)).contiguous(), right=True)  # entries >= tau + 1
    total = full + sums.gather(-1, above) - sums.gather(-1, full) - (above - full) * points
    at = (total >= k).int().argmax(-1, keepdim=True)  # the first breakpoint whose sum reaches k
    tau_high, tau_low = points.gather(-1, (at - 1).clamp(min=0)), points.gather(-1, at)
    sum_high, sum_low = total.gather(-1, (at - 1).clamp(min=0)), total.gather(-1, at)
    share = (k - sum_high) / (sum_low - sum_high).clamp(min=torch.finfo(z.dtype).tiny)
    return tau_high + (tau_low - tau_high) * share


class SparseK(Method):
    """share : of the tokens outside sinks and window kept when decoding starts; the number stays from there on.

    gate : whether p multiplies a kept token's key and value, as published. ridge : of the scorer's fit.
    """

    kind = "eviction"

    def __init__(
        self, share: float, gate: bool = True, ridge: float = 1e-3, sinks: int = 4, window: int = 128, name: str = "sparsek"
    ) -> None:
        self.name, self.share, self.gate, self.ridge = name, share, gate, ridge
        self.sinks, self.window = sinks, window
        self.scorers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def calibrate(self, layer: Layer, keys: Sequence[Tensor], values: Sequence[Tensor], queries: Sequence[Tensor]) -> None:
        """Fit the scorer so that the log of p follows the log attention that a token gets from the later training queries: least
        squares, a sequence at a time. weights float32 (h, f), of features less their mean by their deviation."""
        features = [_features(k, v).double() for k, v in zip(keys, values, strict=True)]
        targets = [(_received(layer, k, q).double() + 1e-9).log() for k, q in zip(keys, queries, strict=True)]
        count = sum(x.shape[1] for x in features)
        mean = torch.stack([x.sum(1, keepdim=True) for x in features]).sum(0) / count
        aim = torch.stack([y.sum(1, keepdim=True) for y in targets]).sum(0) / count
        products = torch.stack([(x - mean).mT @ (x - mean) for x in features]).sum(0) / count
        with_target = torch.stack([((x - mean) * (y - aim)[:, :, None]).sum(1) for x, y in zip(features, targets, strict=True)])
        deviation = products.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-6)
        scaled = products / deviation[:, :, None] / deviation[:, None] + self.ridge * torch.eye(
            deviation.shape[1], dtype=torch.float32, device=deviation.device
        )
        weights = torch.linalg.solve(scaled, with_target.sum(0) / count / deviation)
        self.scorers[layer.number] = weights.float(), mean.float(), deviation[:, None].float()

    def start(self, layer: Layer, tokens: int) -> State:
        if layer.number not in self.scorers:
            raise NotTrainedError(f"sparsek: expected a scorer of layer {layer.number}, got none; call calibrate first")
        return SparseKState(self, Cache(layer, tokens))


class SparseKState(State):
    """scores float32 (h, n); kept bool (h, n): the best k of what left the window, which loses members to better ones only."""

    def __init__(self, method: SparseK, cache: Cache) -> None:
        self.method, self.cache = method, cache
        heads = cache.layer.heads
        self.scores, self.kept = (
            torch.zeros((heads, 0), dtype=torch.float32, device=cache.layer.device),
            torch.zeros((heads, 0), dtype=torch.bool, device=cache.layer.device),
        )
        self.k: int | None = None

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.cache.append(keys, values)
        weights, mean, deviation = self.method.scorers[self.cache.layer.number]
        new = torch.einsum("hnf,hf->hn", (_features(keys.float(), values.float()) - mean) / deviation, weights)
        self.scores = torch.cat([self.scores, new], 1)
        self.kept = torch.cat([self.kept, torch.zeros_like(new, dtype=torch.bool)], 1)

    def attend(self, queries: Tensor) -> Attended:
        cache, layer, m = self.cache, self.cache.layer, self.method
        n = cache.length
        last = max(n - m.window, 0)
        first = min(m.sinks, last)
        if self.k is None:
            self.k = round(m.share * (last - first))
        candidates = self.scores[:, first:last]
        self.kept[:] = False
        best = candidates.topk(min(self.k, last - first), dim=-1).indices
        self.kept.scatter_(1, best + first, True)
        gates = torch.ones((layer.heads, n), dtype=torch.float32, device=queries.device)
        if m.gate and self.k < last - first:
            gates[:, first:last] = project(candidates, self.k)
        chosen = self.kept.clone()
        chosen[:, :first] = chosen[:, last:] = True
        logits = queries @ (cache.keys * gates[:, :, None]).transpose(1, 2) * layer.scale
        weights = logits.masked_fill(~chosen[:, None], -torch.inf).softmax(-1)
        out = weights @ (cache.values * gates[:, :, None])
        read = float(chosen.sum()) / layer.heads
        shared = layer.heads * (layer.d + layer.e) * ITEM_BYTES
        return Attended(out, read, read * layer.heads * layer.token_bytes, 4.0 * self.k * layer.heads, shared, chosen)


def _features(keys: Tensor, values: Tensor) -> Tensor:
    return torch.cat([keys, values], -1)


def _received(layer: Layer, keys: Tensor, queries: Tensor) -> Tensor:
    """Mean attention that each token gets from the kept queries of one sequence (all as if at its end): (h, n)."""
    logits = queries.flatten(1, 2) @ keys.transpose(1, 2) * layer.scale
    return logits.softmax(-1).mean(1)
