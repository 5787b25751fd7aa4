"""Attention spans fixed in advance: MoA (Fu et al., 2024, arXiv 2406.14909) and the uniform window of StreamingLLM.

Query head i of a layer reads ``sinks`` first tokens and the newest ones, S = alpha + beta N together, N the length of the
request; which heads get long spans is decided offline. Heads of a group share K and V here, so a group reads its longest span
once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saap_index import files
from saap_index.errors import FormatError, ParameterError

from .method import Attended, Cache, Layer, Method, State, attend_over


@dataclass(frozen=True)
class SpanPlan:
    """alpha (tokens) and beta (share of N) of every layer and query head, [layer][head]; JSON as the published plans have it."""

    alphas: tuple[tuple[float, ...], ...]
    betas: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if [len(a) for a in self.alphas] != [len(b) for b in self.betas]:
            raise ParameterError("plan: expected as many betas as alphas in every layer, got others")
        if any(not 0 <= b <= 1 for row in self.betas for b in row):
            raise ParameterError("plan: expected betas in [0, 1], got others")

    @classmethod
    def uniform(cls, layers: int, heads: int, share: float) -> SpanPlan:
        """The same share of N everywhere: StreamingLLM."""
        return cls(((0.0,) * heads,) * layers, ((share,) * heads,) * layers)

    @classmethod
    def read(cls, path: Path) -> SpanPlan:
        """A plan from ``{"alphas": [[...]], "betas": [[...]]}``. Raises FormatError for anything else."""
        rules = files.read_json(path, "a JSON object with alphas and betas")
        try:
            alphas, betas = (tuple(tuple(map(float, row)) for row in rules[x]) for x in ("alphas", "betas"))
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            raise FormatError(
                f"{path.name}: expected a JSON object with alphas and betas, rows of numbers, got {error!r}"
            ) from error
        return cls(alphas, betas)

    def write(self, path: Path) -> None:
        files.write_json(path, {"alphas": self.alphas, "betas": self.betas}, indent=None)

    def span(self, layer: int, head: int, length: int, block: int = 64, least: int = 128) -> int:
        """S of one query head for a request of ``length`` tokens, whole blocks, as the published code rounds it."""
        wanted = int(self.alphas[layer][head] + self.betas[layer][head] * length)
        return block * math.ceil(max(least, min(length, wanted)) / block)

    def density(self, layer: int, length: int) -> float:
        """Share of ``length`` tokens that a layer's query heads read, their mean."""
        heads = range(len(self.alphas[layer]))
        return sum(min(length, self.span(layer, h, length)) for h in heads) / len(heads) / length


class Moa(Method):
    """plan : the spans; length : N of the request, None for the tokens that `start` is told of. sinks are part of a span."""

    kind = "static pattern"

    def __init__(self, plan: SpanPlan, length: int | None = None, sinks: int = 64, name: str = "moa") -> None:
        self.name, self.plan, self.length, self.sinks = name, plan, length, sinks

    def start(self, layer: Layer, tokens: int) -> State:
        length = self.length or tokens
        heads = layer.heads * layer.group
        each = [self.plan.span(layer.number, i, length) for i in range(heads)]
        spans = torch.tensor(each, dtype=torch.int64, device=layer.device)
        return _SpanState(Cache(layer, tokens), spans.view(layer.heads, layer.group), self.sinks)


class _SpanState(State):
    def __init__(self, cache: Cache, spans: Tensor, sinks: int) -> None:
        self.cache, self.spans, self.sinks = cache, spans, sinks

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.cache.append(keys, values)

    def attend(self, queries: Tensor) -> Attended:
        cache, layer = self.cache, self.cache.layer
        at = torch.arange(cache.length, dtype=torch.int64, device=queries.device)
        chosen = (at < self.sinks) | (at >= cache.length - (self.spans[:, :, None] - self.sinks))
        read = float(chosen.any(1).sum()) / layer.heads  # spans are nested: the union is the longest
        return Attended(attend_over(cache, queries, chosen), read, read * layer.heads * layer.token_bytes, chosen=chosen)
