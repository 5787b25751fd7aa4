"""The interface of an attention method under test: it is given a prompt's cache, then one token and its queries at a time.

A method sees what an attention layer of the model sees while it decodes, no more: keys and values after RoPE, in order, in the
model's dtype and on its device. Queries and results are float32, and so is the arithmetic here. Everyone
reads the first ``sinks`` tokens and the newest ``window`` tokens (the query's own among them); a budget is a share of the tokens
between the two. Bytes are counted as if keys and values were stored in 16 bits, whatever the arithmetic here is.

Axes: h KV heads, g query heads per KV head, n tokens, d key dim, e value dim.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saap_index.backends.scalar_quantizer import STORAGE_CODES
from saap_index.errors import ParameterError
from saap_index.routing.rope import Rope

_CPU = torch.device("cpu")

ITEM_BYTES = 2
"""Bytes of a stored number."""


@dataclass(frozen=True)
class Layer:
    """One attention layer of a model."""

    number: int
    """Place among the model's layers."""
    heads: int
    """KV heads."""
    group: int
    """Query heads per KV head."""
    d: int
    """Dims of a key."""
    e: int
    """Dims of a value."""
    scale: float
    """Factor of the logits."""
    rope: Rope | None
    """The model's rotation of queries and keys."""
    device: torch.device = _CPU
    """Where its keys and values are, and everything that is computed with them."""
    dtype: torch.dtype = torch.float32
    """Of the model, and of the keys and values that `State.append` is given."""

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token and KV head."""
        return (self.d + self.e) * ITEM_BYTES


@dataclass(frozen=True)
class Attended:
    """One step of one layer."""

    out: Tensor
    """float32 (h, g, e)"""
    tokens: float
    """Keys and values read, mean over the KV heads."""
    kv_bytes: float
    """Of keys and values."""
    other_bytes: float = 0.0
    """Whatever is read to decide what to read, and what takes the place of tokens."""
    shared_bytes: float = 0.0
    """Weights, read once whatever the batch is."""
    chosen: Tensor | None = None
    """bool (h, n) or (h, g, n), the tokens read, sinks and window among them; None where no tokens as such are read"""
    plain_tokens: float | None = None
    """Of the tokens read, those that a storage of codes keeps as numbers; None for sinks and window"""

    def coded_bytes(self, layer: Layer, always: int) -> dict[str, float]:
        """Bytes of keys and values by storage code, if a method's tokens were coded as the index codes its own: all but the first
        and the newest, ``always`` of them where the method does not say. Empty for a method that reads something else than whole
        keys and values."""
        if not math.isclose(self.kv_bytes, self.tokens * layer.heads * layer.token_bytes, rel_tol=1e-6):
            return {}
        plain = min(self.tokens, always if self.plain_tokens is None else self.plain_tokens)
        coded = {name: sum(code.sizes(layer.d, layer.e)) for name, code in STORAGE_CODES.items()}
        return {name: layer.heads * (plain * layer.token_bytes + (self.tokens - plain) * x) for name, x in coded.items()}


class State(ABC):
    """The cache of one layer and one sequence under a method. Every tensor it makes is on the device of the layer."""

    def observe(self, queries: Tensor, positions: Tensor) -> None:  # noqa: B027, most methods do not ask what was looked at
        """See queries of tokens appended already, whose attention was computed elsewhere: of a prompt, at most the last
        ``Method.observed`` ones. float32 (h, g, q, d), positions int64 (q,) ascending."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take the next tokens: (h, n, d) and (h, n, e), in the layer's dtype, on its device. `Cache` keeps them as float32."""

    @abstractmethod
    def attend(self, queries: Tensor) -> Attended:
        """Attention of the queries of the newest token, float32 (h, g, d)."""

    def answer(self, queries: Tensor) -> Attended:
        """`attend` for who does not ask which tokens were read: ``chosen`` may be None."""
        return self.attend(queries)


class Method(ABC):
    """How attention is replaced. ``name`` is what a table says, ``kind`` the group of methods it belongs to; ``observed``, how
    many of a prompt's last queries its states ask to see."""

    name: str
    kind: ClassVar[str]
    observed: int = 0

    def calibrate(  # noqa: B027, most methods have nothing to do here
        self, layer: Layer, keys: Sequence[Tensor], values: Sequence[Tensor], queries: Sequence[Tensor]
    ) -> None:
        """Learn what the method needs of a layer from training sequences: keys (h, n, d), values (h, n, e), queries (h, g, q, d)
        of each, float32. Called once per layer, before `start`."""

    @abstractmethod
    def start(self, layer: Layer, tokens: int) -> State:
        """An empty cache for about so many tokens."""


class Cache:
    """Keys and values in growing buffers, for methods that keep all tokens."""

    def __init__(self, layer: Layer, tokens: int) -> None:
        self.layer, self.length = layer, 0
        self._keys = torch.empty((layer.heads, tokens, layer.d), dtype=torch.float32, device=layer.device)
        self._values = torch.empty((layer.heads, tokens, layer.e), dtype=torch.float32, device=layer.device)

    @property
    def keys(self) -> Tensor:
        """float32 (h, n, d)"""
        return self._keys[:, : self.length]

    @property
    def values(self) -> Tensor:
        """float32 (h, n, e)"""
        return self._values[:, : self.length]

    def append(self, keys: Tensor, values: Tensor) -> None:
        stop = self.length + keys.shape[1]
        if stop > self._keys.shape[1]:
            room = stop + stop // 4
            for name in ("_keys", "_values"):
                old = getattr(self, name)
                new = old.new_empty((old.shape[0], room, old.shape[2]))
                new[:, : self.length] = old[:, : self.length]
                setattr(self, name, new)
        self._keys[:, self.length : stop], self._values[:, self.length : stop] = keys, values
        self.length = stop


def attend_over(cache: Cache, queries: Tensor, chosen: Tensor | None) -> Tensor:
    """Softmax attention over the chosen tokens: queries (h, g, d), chosen bool (h, n) or (h, g, n), None for all -> (h, g, e)."""
    logits = queries @ cache.keys.transpose(1, 2) * cache.layer.scale
    if chosen is not None:
        logits = logits.masked_fill(~(chosen[:, None] if chosen.ndim == 2 else chosen), -torch.inf)
    return logits.softmax(-1) @ cache.values


def budget_tokens(share: float, length: int, sinks: int, window: int) -> int:
    """Tokens that a share of those outside sinks and window comes to."""
    if not 0 < share <= 1:
        raise ParameterError(f"share: expected 0 < share <= 1, got {share}")
    return round(share * max(0, length - sinks - window))
