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
    """One of the selections once per KV head: ``topk_group``, ``ivf`` per prompt, ``quest`` pages, ``recent``, ``random``.

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
        other = {"quest": 2 * layer.d * ITEM_BYTES * (last - first) / PAGE_TOKENS, "ivf": LISTS * layer.d * ITEM_BYTES}
        return Attended(
            attend_over(cache, queries, chosen), read, read * layer.heads * layer.token_bytes,
            other.get(m.name, 0.0) * layer.heads, chosen=chosen,
        )


def _between(length: int, sinks: int, window: int) -> tuple[int, int]:
    """The tokens that are neither sinks nor in the window: [first, last)."""
    last = max(length - window, 0)
    return min(sinks, last), last
