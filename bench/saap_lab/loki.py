"""Loki (Singhania et al., NeurIPS 2024, arXiv 2406.02542): score every token in the leading principal directions of the keys.

Keys and queries are turned into the basis of the keys' principal components, found offline per layer and KV head; the first r
dims rank all tokens, the best are attended exactly. The turn keeps inner products, so keys may be stored turned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from saap_index.errors import NotTrainedError, ParameterError

from .method import ITEM_BYTES, Attended, Cache, Layer, Method, State, attend_over, budget_tokens


class Loki(Method):
    """share : of the tokens outside sinks and window that are attended exactly. r : dims that rank.

    select : ``head`` (as published: each query head its own tokens) or ``group`` (one set per KV head by the sum of the heads'
    softmax scores: K and V are then read once). The paper protects neither sinks nor window; ``sinks=0, window=1`` is that.
    """

    kind = "query-adaptive index"

    def __init__(
        self,
        share: float,
        r: int,
        select: Literal["head", "group"] = "group",
        sinks: int = 4,
        window: int = 128,
        name: str = "loki",
    ) -> None:
        if r < 1:
            raise ParameterError(f"r: expected at least 1, got {r}")
        if select not in ("head", "group"):
            raise ParameterError(f"select: expected 'head' or 'group', got {select!r}")
        self.name, self.share, self.r, self.select, self.sinks, self.window = name, share, r, select, sinks, window
        self.bases: dict[int, Tensor] = {}

    def calibrate(self, layer: Layer, keys: Sequence[Tensor], values: Sequence[Tensor], queries: Sequence[Tensor]) -> None:
        self.bases[layer.number] = principal_basis(keys)

    def start(self, layer: Layer, tokens: int) -> State:
        if layer.number not in self.bases:
            raise NotTrainedError(f"loki: expected a basis of layer {layer.number}, got none; call calibrate first")
        return _LokiState(self, Cache(layer, tokens), self.bases[layer.number])


class _LokiState(State):
    def __init__(self, method: Loki, cache: Cache, basis: Tensor) -> None:
        self.method, self.cache = method, cache
        self.basis = basis[:, :, : method.r]
        self.leading = cache.keys.new_empty((cache.layer.heads, 0, self.basis.shape[2]))

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.cache.append(keys, values)
        self.leading = torch.cat([self.leading, keys.float() @ self.basis], 1)

    def attend(self, queries: Tensor) -> Attended:
        cache, layer, m = self.cache, self.cache.layer, self.method
        last = max(cache.length - m.window, 0)
        first = min(m.sinks, last)
        scores = (queries @ self.basis) @ self.leading.transpose(1, 2) * layer.scale
        if m.select == "group":
            scores = scores.softmax(-1).sum(1, keepdim=True)
        budget = budget_tokens(m.share, cache.length, m.sinks, m.window)
        chosen = torch.ones_like(scores, dtype=torch.bool)
        chosen[:, :, first:last] = False
        chosen.scatter_(2, scores[:, :, first:last].topk(budget, dim=-1).indices + first, True)
        read = float(chosen.any(1).sum()) / layer.heads
        ranking = layer.heads * (last - first) * self.basis.shape[2] * ITEM_BYTES
        weights = layer.heads * layer.d * self.basis.shape[2] * ITEM_BYTES
        chosen = chosen[:, 0] if m.select == "group" else chosen
        out = attend_over(cache, queries, chosen)
        return Attended(out, read, read * layer.heads * layer.token_bytes, ranking, weights, chosen)


def principal_basis(keys: Sequence[Tensor]) -> Tensor:
    """Principal directions of keys (h, n, d), largest variance first, from sums gathered a sequence at a time: (h, d, d).

    The mean is taken out for the fit only: taking it out of the keys would shift all scores of a query alike.
    """
    count = sum(k.shape[1] for k in keys)
    if not count:
        raise ParameterError("keys: expected at least one, got none")
    mean = torch.stack([k.double().sum(1) for k in keys]).sum(0) / count
    products = torch.stack([k.double().transpose(1, 2) @ k.double() for k in keys]).sum(0) / count
    spread = products - mean[:, :, None] * mean[:, None, :]
    return torch.linalg.eigh(spread).eigenvectors.flip(-1).float()
