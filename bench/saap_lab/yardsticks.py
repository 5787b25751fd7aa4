"""What every method is measured against: dense attention, the exact best tokens, the recent window, chance, pages, plain IVF."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from saap_index.errors import ParameterError

from .method import ITEM_BYTES, Attended, Cache, Layer, Method, State, attend_over, budget_tokens
from .selections import ITERATIONS, LISTS, PAGE_TOKENS, SELECTIONS, cluster


class Dense(Method):
    """All tokens."""

    name, kind = "dense", "yardstick"

    def start(self, layer: Layer, tokens: int) -> State:
        return _DenseState(Cache(layer, tokens))


class _DenseState(State):
    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.cache.append(keys, values)

    def attend(self, queries: Tensor) -> Attended:
        n, layer = self.cache.length, self.cache.layer
        chosen = torch.ones((layer.heads, n), dtype=torch.bool, device=queries.device)
        return Attended(attend_over(self.cache, queries, None), n, layer.heads * n * layer.token_bytes, chosen=chosen)


class TopK(Method):
    """The tokens of largest attention probability, each query head its own: the oracle, what no selection per head surpasses.

    To know them it would have to read everything; only the tokens are counted, the union over the heads of a group.
    """

    name, kind = "topk", "yardstick"

    def __init__(self, share: float, sinks: int = 4, window: int = 128) -> None:
        self.share, self.sinks, self.window = share, sinks, window

    def start(self, layer: Layer, tokens: int) -> State:
        return _TopKState(self, Cache(layer, tokens))


class _TopKState(_DenseState):
    def __init__(self, method: TopK, cache: Cache) -> None:
        super().__init__(cache)
        self.method = method

    def attend(self, queries: Tensor) -> Attended:
        cache, layer, m = self.cache, self.cache.layer, self.method
        first, last = _between(cache.length, m.sinks, m.window)
        logits = queries @ cache.keys.transpose(1, 2)
        chosen = torch.ones((layer.heads, layer.group, cache.length), dtype=torch.bool, device=queries.device)
        chosen[:, :, first:last] = False
        best = logits[:, :, first:last].topk(budget_tokens(m.share, cache.length, m.sinks, m.window), dim=-1).indices
        chosen.scatter_(2, best + first, True)
        read = float(chosen.any(1).sum()) / layer.heads
        return Attended(attend_over(cache, queries, chosen), read, read * layer.heads * layer.token_bytes, chosen=chosen)


class WeightedTopK(Method):
    """A weighted sample with exact scores, once per KV head: what bounds a weighted selection, as ``topk_group`` a plain one.

    A part of the budget are the tokens of largest probability (mean over the query heads), the rest is drawn from the others
    without replacement, each with a known probability p proportional to its own. The logits of those drawn get min(-log p, cap):
    uncapped the estimate would be unbiased, and noisier. sampled : share of the budget that is drawn. To know the scores it would
    have to read everything; only the tokens are counted. The draw is a function of the position.
    """

    name, kind = "topk_weighted", "yardstick"

    def __init__(self, share: float, sinks: int = 4, window: int = 128, sampled: float = 0.5, cap: float = 1.4) -> None:
        if not 0 <= sampled <= 1 or cap < 0:
            raise ParameterError(f"sampled, cap: expected a share in [0, 1] and 0 nats or more, got {sampled} and {cap}")
        self.share, self.sinks, self.window, self.sampled, self.cap = share, sinks, window, sampled, cap

    def start(self, layer: Layer, tokens: int) -> State:
        return _WeightedState(self, Cache(layer, tokens))


class _WeightedState(_DenseState):
    def __init__(self, method: WeightedTopK, cache: Cache) -> None:
        super().__init__(cache)
        self.method = method

    def attend(self, queries: Tensor) -> Attended:
        cache, layer, m = self.cache, self.cache.layer, self.method
        first, last = _between(cache.length, m.sinks, m.window)
        budget = min(last - first, budget_tokens(m.share, cache.length, m.sinks, m.window))
        drawn = round(m.sampled * budget)
        logits = queries @ cache.keys.transpose(1, 2) * layer.scale
        weights = logits.double().softmax(-1).mean(1)[:, first:last]
        best = weights.topk(budget - drawn, dim=-1).indices
        inclusion = inclusion_probabilities(weights.scatter(1, best, 0.0), drawn)
        taken = systematic_sample(inclusion, seed=cache.length)
        chosen = torch.ones((layer.heads, cache.length), dtype=torch.bool, device=queries.device)
        chosen[:, first:last] = taken.scatter(1, best, True)
        bias = torch.zeros((layer.heads, cache.length), dtype=torch.float32, device=queries.device)
        bias[:, first:last] = torch.where(taken, (-inclusion.log()).clamp(max=m.cap), 0.0).float()
        out = (logits + bias[:, None]).masked_fill(~chosen[:, None], -torch.inf).softmax(-1) @ cache.values
        read = float(chosen.sum()) / layer.heads
        return Attended(out, read, read * layer.heads * layer.token_bytes, chosen=chosen)


def inclusion_probabilities(weights: Tensor, count: int) -> Tensor:
    """min(1, w / tau) with tau such that they sum to ``count``, or to the number of positive weights if that is smaller.

    weights : float64 (h, n), 0 or more -> float64 (h, n)
    """
    if not count or not weights.shape[1]:
        return torch.zeros_like(weights)
    ordered = weights.sort(-1, descending=True).values
    rest = ordered.flip(-1).cumsum(-1).flip(-1)  # of a weight and all smaller ones
    certain = torch.arange(min(count, weights.shape[1]), dtype=torch.int64, device=weights.device)
    tau = rest[:, : len(certain)] / (count - certain)
    fits = ordered[:, : len(certain)] <= tau  # with so many certain, the next one is not; if none fits, all that are positive are
    at = fits.int().argmax(-1, keepdim=True)
    chosen = torch.where(fits.any(-1, keepdim=True), tau.gather(1, at), 0.0)
    return torch.where(weights > 0, (weights / chosen).clamp(max=1.0), 0.0)


def systematic_sample(inclusion: Tensor, seed: int) -> Tensor:
    """Which entries are drawn, each with its probability, in number their sum up to rounding: float64 (h, n) -> bool (h, n).

    Systematic sampling (Madow, 1949) in the order of the tokens, from a start by chance in each row.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand((inclusion.shape[0], 1), generator=generator, dtype=torch.float64, device="cpu").to(inclusion.device)
    passed = torch.cat([start, start + inclusion.cumsum(-1)], 1).floor()
    return (passed[:, 1:] > passed[:, :-1]) | (inclusion >= 1)


class Clusters:
    """The k-means of a prompt's layers, for methods that differ in their budgets alone; of the last prompt only."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}

    def of(self, number: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Centroids and lists of the tokens, see `cluster`, of keys (h, n, d) of a layer."""
        held = self._held.get(number)
        # the keys are held, so no other tensor can have their address
        if held is None or held[0].data_ptr() != keys.data_ptr() or held[0].shape != keys.shape:
            self._held[number] = held = keys, cluster(keys, LISTS, ITERATIONS)
        return held[1]


class Selected(Method):
    """One of the selections once per KV head: ``topk_group``, ``ivf`` per prompt, ``quest`` and ``moments`` pages, ``recent``,
    ``random``.

    ``clusters`` may be shared by the methods of several budgets.
    """

    kind: ClassVar[str] = "yardstick"

    def __init__(self, name: str, share: float, sinks: int = 4, window: int = 128) -> None:
        if name not in SELECTIONS:
            raise ParameterError(f"name: expected one of {', '.join(SELECTIONS)}, got {name!r}")
        self.name, self.share, self.sinks, self.window = name, share, sinks, window
        self.clusters = Clusters()

    def start(self, layer: Layer, tokens: int) -> State:
        return _SelectedState(self, Cache(layer, tokens))


class _SelectedState(_DenseState):
    def __init__(self, method: Selected, cache: Cache) -> None:
        super().__init__(cache)
        self.method = method
        self.lists: tuple[Tensor, Tensor] | None = None

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.cache.append(keys, values)
        if self.method.name != "ivf":
            return
        if self.lists is None:  # the prompt is clustered, later tokens join the lists
            self.lists = self.method.clusters.of(self.cache.layer.number, keys)
            return
        centroids, assigned = self.lists
        nearest = (keys.float() @ centroids.transpose(1, 2) - 0.5 * centroids.square().sum(-1)[:, None]).argmax(-1)
        self.lists = centroids, torch.cat([assigned, nearest], 1)

    def attend(self, queries: Tensor) -> Attended:
        cache, layer, m = self.cache, self.cache.layer, self.method
        first, last = _between(cache.length, m.sinks, m.window)
        budget = budget_tokens(m.share, cache.length, m.sinks, m.window)
        options = {"lists": self.lists} if m.name == "ivf" else {}
        chosen = SELECTIONS[m.name](
            cache.keys, queries.flatten(0, 1), cache.length - 1, budget, sinks=m.sinks, window=m.window, **options
        )
        chosen[:, :first] = chosen[:, last:] = True
        read = float(chosen.sum()) / layer.heads
        pages = 2 * layer.d * ITEM_BYTES * (last - first) / PAGE_TOKENS
        other = {"quest": pages, "moments": pages, "ivf": LISTS * layer.d * ITEM_BYTES}
        return Attended(
            attend_over(cache, queries, chosen), read, read * layer.heads * layer.token_bytes,
            other.get(m.name, 0.0) * layer.heads, chosen=chosen,
        )


def _between(length: int, sinks: int, window: int) -> tuple[int, int]:
    """The tokens that are neither sinks nor in the window: [first, last)."""
    last = max(length - window, 0)
    return min(sinks, last), last
