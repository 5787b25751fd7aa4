"""CORM (Dai et al., 2024, arXiv 2404.15949): drop a token once none of the last w queries gave it more than an even share.

A key is minor for a query at length t if its attention probability is below 1 / t. What was minor to all of the last w queries is
dropped for good; the newest w tokens stay. The cache's size follows the text, it is not chosen, unless ``share`` bounds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saap_index.errors import LengthError, ParameterError

from .method import Attended, Cache, Layer, Method, State, attend_over, budget_tokens

_CHUNK = 64
"""Observed queries whose attention is held at once."""

COUNTER_BYTES = 2
"""Per live token and KV head: the step at which it was important last."""


class Corm(Method):
    """w : queries remembered, and newest tokens kept. share : if given, at most that share of the tokens outside sinks and window
    is kept, those that were important last (not in the paper). The heads of a group share a cache: important to one is important
    to all."""

    kind = "eviction"

    def __init__(self, w: int = 256, share: float | None = None, sinks: int = 0, name: str = "corm") -> None:
        if w < 1:
            raise ParameterError(f"w: expected at least 1, got {w}")
        if share is not None:
            budget_tokens(share, 0, 0, 0)
        self.name, self.w, self.share, self.sinks = name, w, share, sinks
        self.observed = w

    def start(self, layer: Layer, tokens: int) -> State:
        return CormState(self, Cache(layer, tokens))


class CormState(State):
    """last_important : int64 (h, n), the newest step at which a token was important; a step is a query seen, and a token is
    important when it comes. It says as much as w bits per token do. live : bool (h, n), tokens that were not dropped."""

    def __init__(self, method: Corm, cache: Cache) -> None:
        self.method, self.cache = method, cache
        self.steps = 0
        self.last_important = torch.zeros((cache.layer.heads, 0), dtype=torch.int64, device=cache.layer.device)
        self.live = torch.zeros((cache.layer.heads, 0), dtype=torch.bool, device=cache.layer.device)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.cache.append(keys, values)
        came = torch.full(keys.shape[:2], self.steps, dtype=torch.int64, device=keys.device)
        self.last_important = torch.cat([self.last_important, came], 1)
        self.live = torch.cat([self.live, torch.ones_like(came, dtype=torch.bool)], 1)

    def observe(self, queries: Tensor, positions: Tensor) -> None:
        """The prompt was read densely: all queries see all tokens that live now, and what goes is dropped after the last."""
        if not len(positions):
            return
        if int(positions.max()) >= self.cache.length:
            raise LengthError(f"positions: expected below {self.cache.length}, got {int(positions.max())}")
        for at in torch.arange(len(positions), dtype=torch.int64, device=positions.device).split(_CHUNK):
            important = self._important(queries[:, :, at], positions[at] + 1)
            step = torch.arange(1, len(at) + 1, dtype=torch.int64, device=important.device)
            newest = (step[:, None] * important).amax(1)  # (h, n), 0 for minor
            self.last_important = torch.where(newest > 0, self.steps + newest, self.last_important)
            self.steps += len(at)
        self._drop()

    def attend(self, queries: Tensor) -> Attended:
        cache, layer = self.cache, self.cache.layer
        length = torch.tensor([cache.length], dtype=torch.int64, device=queries.device)
        important = self._important(queries[:, :, None], length)[:, 0]
        self.steps += 1
        self.last_important = torch.where(important, self.steps, self.last_important)
        chosen = self.live.clone()
        out = attend_over(cache, queries, chosen)
        live = float(chosen.sum())
        self._drop()
        return Attended(out, live / layer.heads, live * layer.token_bytes, live * COUNTER_BYTES, chosen=chosen)

    def _important(self, queries: Tensor, lengths: Tensor) -> Tensor:
        """Live tokens with a probability of at least 1 / t for a head of the group: queries (h, g, q, d), t (q,) -> (h, q, n)."""
        cache = self.cache
        logits = queries @ cache.keys[:, None].transpose(2, 3) * cache.layer.scale
        seen = self.live[:, None] & (torch.arange(cache.length, dtype=torch.int64, device=lengths.device) < lengths[:, None])
        probabilities = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        important: Tensor = (probabilities >= 1 / lengths[:, None]).any(1) & seen
        return important

    def _drop(self) -> None:
        m, t = self.method, self.cache.length
        always = torch.zeros_like(self.live)
        always[:, : m.sinks] = always[:, max(0, t - m.w) :] = True
        self.live &= always | (self.steps - self.last_important < m.w)
        if m.share is None:
            return
        budget = budget_tokens(m.share, t, m.sinks, m.w)
        ranks = torch.where(self.live & ~always, self.last_important, -1)
        for head, rank in enumerate(ranks):
            excess = int((rank >= 0).sum()) - budget
            if excess > 0:  # the longest unimportant go first, the older among equals
                order = rank.argsort(stable=True)
                self.live[head, order[rank[order] >= 0][:excess]] = False
