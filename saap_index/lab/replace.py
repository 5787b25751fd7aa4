"""A transformers model whose attention is served by a method under test: dense over the prompt, the method token by token.

The model decodes without a cache of its own: it is given one token at a time, and each attention layer hands that token's query,
key and value to the method's state, which holds everything before. Nothing of the model is patched, and it is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import LengthError
from ..rope import Rope
from .method import Attended, Layer, Method, State

_NAME = "saap_lab"

Attend = Callable[[Any, Tensor, Tensor, Tensor, "Tensor | None", dict[str, Any]], Tensor]
"""(module, query, key, value, mask, options) -> (b, q, hq, e)"""


@dataclass(frozen=True)
class Prompt:
    """A sequence as the dense model saw it.

    tokens : int64 (n,); positions : int64 (q,) of the queries kept, ascending; logits : float32 (k, vocabulary), of the last k
    tokens; layers, keys : float32 (h, n, d), values : (h, n, e), queries : (h, g, q, d), one per attention layer; recent :
    (h, g, r, d), the queries of the last r tokens, for methods that go by what was looked at.
    """

    tokens: Tensor
    positions: Tensor
    logits: Tensor
    layers: tuple[Layer, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    recent: tuple[Tensor, ...]

    def show(self, state: State, at: int, first: int, stop: int) -> None:
        """Let the state of layer number ``at`` of this prompt observe the queries of tokens [first, stop), as far as kept."""
        start = len(self.tokens) - self.recent[at].shape[2]
        first = max(first, start)
        if first < stop:
            state.observe(self.recent[at][:, :, first - start : stop - start], torch.arange(first, stop))


@dataclass
class Traffic:
    """What was read: bytes summed over the layers, tokens their mean; per step once `mean` was taken."""

    steps: int = 0
    kv_bytes: float = 0.0
    other_bytes: float = 0.0
    shared_bytes: float = 0.0
    tokens: float = 0.0
    per_layer: dict[int, float] = field(default_factory=dict)

    def add(self, layer: Layer, step: Attended) -> None:
        self.kv_bytes += step.kv_bytes
        self.other_bytes += step.other_bytes
        self.shared_bytes += step.shared_bytes
        self.tokens += step.tokens
        self.per_layer[layer.number] = self.per_layer.get(layer.number, 0.0) + step.tokens

    def mean(self) -> Traffic:
        n = max(1, self.steps)
        per_layer = {layer: x / n for layer, x in self.per_layer.items()}
        tokens = self.tokens / n / max(1, len(per_layer))
        return Traffic(self.steps, self.kv_bytes / n, self.other_bytes / n, self.shared_bytes / n, tokens, per_layer)


def read_prompt(
    model: Any, tokens: Sequence[int], rope: Rope | None, positions: Tensor | None = None, logits: int = 0, recent: int = 0
) -> Prompt:
    """One dense pass over a sequence, keeping keys and values of every layer.

    positions : int64 (q,) at which queries are kept, none by default; logits : of so many last tokens; recent : queries of so
    many last tokens are kept for `Prompt.show`.

    Raises LengthError for an empty sequence or positions outside it.
    """
    n = len(tokens)
    positions = torch.empty(0, dtype=torch.int64) if positions is None else positions
    if not n or (len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < n):
        raise LengthError(f"tokens, positions: expected positions in [0, {n}), got {positions.tolist()}")
    rows: list[tuple[Layer, Tensor, Tensor, Tensor, Tensor]] = []
    first = max(0, n - recent)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        layer = _layer(module, query, key, value, options, rope)
        kept, last = (query[0][:, x].unflatten(0, (layer.heads, layer.group)) for x in (positions, slice(first, n)))
        keep = [x.float().cpu().clone() for x in (key[0], value[0], kept, last)]
        rows.append((layer, keep[0], keep[1], keep[2], keep[3]))
        out: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
        return out

    ids = torch.tensor([list(tokens)])
    with torch.no_grad(), _serving(model, attend):
        hidden = model.base_model(ids.to(model.device), use_cache=False).last_hidden_state[:, n - logits :]
        scores = model.lm_head(hidden)[0].float().cpu() if logits else torch.empty((0, 0))
    layers, keys, values, queries, last = zip(*rows, strict=True)
    return Prompt(ids[0], positions, scores, layers, keys, values, queries, last)


def start(methods: Mapping[int, Method], prompt: Prompt, length: int, room: int) -> list[State]:
    """A state per layer that holds the first ``length`` tokens of a prompt, with room for more; methods : by layer number."""
    states = []
    for at, (layer, keys, values) in enumerate(zip(prompt.layers, prompt.keys, prompt.values, strict=True)):
        method = methods[layer.number]
        state = method.start(layer, length + room)
        state.append(keys[:, :length], values[:, :length])
        prompt.show(state, at, length - method.observed, length)
        states.append(state)
    return states


def decode(model: Any, states: Sequence[State], tokens: Sequence[int], position: int) -> tuple[Tensor, Traffic]:
    """Feed tokens one at a time from a position on, every layer's attention served by its state.

    Returns logits : float32 (n, vocabulary) after each token, and what was read per step.
    """
    traffic = Traffic()
    order = iter(range(0))

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        layer = _layer(module, query, key, value, options, None)
        state = states[next(order)]
        state.append(key[0].float().cpu(), value[0].float().cpu())
        step = state.attend(query[0].float().cpu().view(layer.heads, layer.group, layer.d))
        traffic.add(layer, step)
        return step.out.reshape(1, 1, layer.heads * layer.group, layer.e).to(query)

    found = []
    with torch.no_grad(), _serving(model, attend):
        for i, token in enumerate(tokens):
            order = iter(range(len(states)))
            where = torch.tensor([[position + i]], device=model.device)
            hidden = model.base_model(
                torch.tensor([[token]], device=model.device), position_ids=where, use_cache=False
            ).last_hidden_state
            found.append(model.lm_head(hidden)[0, 0].float().cpu())
            traffic.steps += 1
    return torch.stack(found), traffic.mean()


def generate(model: Any, states: Sequence[State], tokens: Sequence[int], position: int, count: int) -> list[int]:
    """Feed tokens as `decode` does, then continue greedily: the ``count`` tokens that follow."""
    logits, _ = decode(model, states, tokens, position)
    found = [int(logits[-1].argmax())]
    while len(found) < count:
        logits, _ = decode(model, states, found[-1:], position + len(tokens) + len(found) - 1)
        found.append(int(logits[-1].argmax()))
    return found


def _layer(module: Any, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any], rope: Rope | None) -> Layer:
    heads, d, e = key.shape[1], key.shape[3], value.shape[3]
    scale = options.get("scaling")
    return Layer(module.layer_idx, heads, query.shape[1] // heads, d, e, d**-0.5 if scale is None else float(scale), rope)


@contextmanager
def _serving(model: Any, attend: Attend) -> Iterator[None]:
    """Let ``attend`` compute the model's attention; masks are SDPA's."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def forward(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        return attend(module, query, key, value, attention_mask, options), None

    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, forward)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    try:
        model.set_attn_implementation(_NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        for interface in (AttentionInterface, AttentionMaskInterface):  # transformers cannot take a registration back
            interface._global_mapping.pop(_NAME, None)
