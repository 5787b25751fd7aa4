"""SCFA (Pagliardini et al., 2023, arXiv 2306.01160): a query attends to the keys that fall into its own hash bucket; and QK-drop.

Keys and queries are hashed by the same random projection (angular LSH, one round). Exact for the mask that the hash makes, an
approximation of dense attention. The published models are trained with it; here it meets a model that was not. The projection is
drawn once, since a cache outlives a step. The method was published for training: `hash_prefill` is a whole causal pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saap_index.errors import ParameterError

from .method import ITEM_BYTES, Attended, Cache, Layer, Method, State, attend_over


class ScfaHash(Method):
    """buckets : even number of them, of which a query reads one. centred : subtract the means of training keys and queries before
    hashing (not in the paper). Buckets of the heads of a group are read once each; an empty one gives zeros, as published."""

    kind = "query-adaptive index"

    def __init__(
        self, buckets: int, centred: bool = False, seed: int = 0, sinks: int = 4, window: int = 128, name: str = "scfa-hash"
    ) -> None:
        if buckets < 1 or (buckets > 1 and buckets % 2):
            raise ParameterError(f"buckets: expected 1 or an even number, got {buckets}")
        self.name, self.buckets, self.centred, self.seed = name, buckets, centred, seed
        self.sinks, self.window = sinks, window
        self.means: dict[int, tuple[Tensor, Tensor]] = {}

    def calibrate(self, layer: Layer, keys: Sequence[Tensor], values: Sequence[Tensor], queries: Sequence[Tensor]) -> None:
        if self.centred:
            self.means[layer.number] = torch.cat(list(keys), 1).mean(1), torch.cat(list(queries), 2).mean((1, 2))

    def start(self, layer: Layer, tokens: int) -> State:
        return _ScfaState(self, Cache(layer, tokens))

    def hash(self, layer: Layer, x: Tensor, is_query: bool) -> Tensor:
        """Buckets of x (h, ..., d): int64 (h, ...)."""
        if self.buckets == 1:
            return torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
        generator = torch.Generator().manual_seed(self.seed * 10007 + layer.number)
        directions = torch.randn(
            (layer.heads, layer.d, self.buckets // 2), generator=generator, dtype=torch.float32, device="cpu"
        )
        directions = (directions / directions.norm(dim=1, keepdim=True)).to(x.device)
        if layer.number in self.means:
            x = x - self.means[layer.number][is_query].view(layer.heads, *[1] * (x.ndim - 2), layer.d)
        projected = (x.flatten(1, -2) @ directions).view(*x.shape[:-1], -1)
        return torch.cat([projected, -projected], -1).argmax(-1)


class _ScfaState(State):
    def __init__(self, method: ScfaHash, cache: Cache) -> None:
        self.method, self.cache = method, cache
        self.codes = torch.zeros((cache.layer.heads, 0), dtype=torch.int64, device=cache.layer.device)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.cache.append(keys, values)
        self.codes = torch.cat([self.codes, self.method.hash(self.cache.layer, keys.float(), False)], 1)

    def attend(self, queries: Tensor) -> Attended:
        cache, layer, m = self.cache, self.cache.layer, self.method
        chosen = m.hash(layer, queries, True)[:, :, None] == self.codes[:, None]
        chosen[:, :, : m.sinks] = True
        chosen[:, :, max(0, cache.length - m.window) :] = True
        out = attend_over(cache, queries, chosen).nan_to_num(0.0)  # nothing to attend: no weights, zeros
        read = float(chosen.any(1).sum()) / layer.heads
        offsets = layer.heads * layer.group * 8
        weights = layer.heads * layer.d * (m.buckets // 2) * ITEM_BYTES
        return Attended(out, read, read * layer.heads * layer.token_bytes, offsets, weights, chosen)


class ScfaDrop(Method):
    """QK-drop: a random share of the keys is kept when they come, a query head is silent (zeros) with the other probability.

    keep_keys, keep_queries : probabilities; published with both equal. Drawn once per token, so that steps agree.
    """

    kind = "eviction"

    def __init__(self, keep_keys: float, keep_queries: float = 1.0, seed: int = 0, name: str = "scfa-drop") -> None:
        for label, value in (("keep_keys", keep_keys), ("keep_queries", keep_queries)):
            if not 0 < value <= 1:
                raise ParameterError(f"{label}: expected 0 < {label} <= 1, got {value}")
        self.name, self.keep_keys, self.keep_queries, self.seed = name, keep_keys, keep_queries, seed

    def start(self, layer: Layer, tokens: int) -> State:
        return _DropState(self, Cache(layer, tokens))


class _DropState(State):
    def __init__(self, method: ScfaDrop, cache: Cache) -> None:
        self.method, self.cache = method, cache
        self.kept = torch.zeros((cache.layer.heads, 0), dtype=torch.bool, device=cache.layer.device)
        self.generator = torch.Generator().manual_seed(method.seed * 10007 + cache.layer.number)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.cache.append(keys, values)
        drawn = (
            torch.rand(keys.shape[1], keys.shape[0], generator=self.generator, dtype=torch.float32, device="cpu").T
            < self.method.keep_keys
        )
        self.kept = torch.cat([self.kept, drawn.to(keys.device)], 1)

    def attend(self, queries: Tensor) -> Attended:
        cache, layer = self.cache, self.cache.layer
        speaks = (
            torch.rand(layer.heads, layer.group, generator=self.generator, dtype=torch.float32, device="cpu")
            < self.method.keep_queries
        ).to(queries.device)
        out = attend_over(cache, queries, self.kept).nan_to_num(0.0) * speaks[:, :, None]
        chosen = self.kept & speaks.any(1)[:, None]
        read = float(chosen.sum()) / layer.heads
        return Attended(out, read, read * layer.heads * layer.token_bytes, 0.0, chosen=chosen)


def hash_prefill(
    queries: Tensor, keys: Tensor, values: Tensor, q_codes: Tensor, k_codes: Tensor, scale: float, strict: bool = False
) -> Tensor:
    """A whole causal pass by sorting: queries, keys (n, d), values (n, e), codes int64 (n,) -> (n, e), zeros where none is seen.

    Rows are sorted by bucket, stably, so a bucket is one stretch in order of time and its attention one causal triangle: the same
    as masking dense attention by equal codes. strict : a token does not see itself, as in the published models.
    """
    out = torch.zeros((queries.shape[0], values.shape[1]), dtype=values.dtype, device=values.device)
    q_order, k_order = q_codes.argsort(stable=True), k_codes.argsort(stable=True)
    for code in q_codes.unique().tolist():
        rows, cols = q_order[q_codes[q_order] == code], k_order[k_codes[k_order] == code]
        visible = cols < rows[:, None] if strict else cols <= rows[:, None]
        logits = (queries[rows] @ keys[cols].T * scale).masked_fill(~visible, -torch.inf)
        out[rows] = logits.softmax(-1).nan_to_num(0.0) @ values[cols]
    return out
