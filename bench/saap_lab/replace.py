"""A transformers model whose attention is served by a method under test: dense over the prompt, the method token by token.

The model decodes without a cache of its own: each attention layer hands queries, keys and values of the tokens it is given to the
method's state, which holds everything before and answers one token after the other. As the tokens are known in advance, all of
them pass a layer before the next one, which gives what feeding them one at a time gives, at a fraction of the time. Nothing of
the model is patched, and it is left as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saap_index.errors import LengthError
from saap_index.routing.rope import Rope

from .method import Attended, Cache, Layer, Method, State
from .steps import replay

_NAME = "saap_lab"

Attend = Callable[[Any, Tensor, Tensor, Tensor, "Tensor | None", dict[str, Any]], Tensor]
"""(module, query, key, value, mask, options) -> (b, q, hq, e)"""


@dataclass(frozen=True)
class Prompt:
    """A sequence as the dense model saw it; tuples have an entry per attention layer."""

    tokens: Tensor
    """int64 (n,)"""
    positions: Tensor
    """int64 (q,), ascending: of the queries kept"""
    logits: Tensor
    """float32 (k, vocabulary), of the last k tokens"""
    layers: tuple[Layer, ...]
    keys: tuple[Tensor, ...]
    """(h, n, d), in the model's dtype and on its device, as the others"""
    values: tuple[Tensor, ...]
    """(h, n, e)"""
    queries: tuple[Tensor, ...]
    """(h, g, q, d)"""
    recent: tuple[Tensor, ...]
    """(h, g, r, d), queries of the last r tokens, for methods that go by what was looked at"""
    hidden: Tensor | None = None
    """(k, width), of the last k tokens, what the head of the model makes logits of; None if nobody asked"""

    def show(self, state: State, at: int, first: int, stop: int) -> None:
        """Let the state of layer number ``at`` of this prompt observe the queries of tokens [first, stop), as far as kept."""
        start = len(self.tokens) - self.recent[at].shape[2]
        first = max(first, start)
        if first < stop:
            seen = self.recent[at][:, :, first - start : stop - start].float()
            state.observe(seen, torch.arange(first, stop, dtype=torch.int64, device=seen.device))


@dataclass
class Traffic:
    """What was read: summed over steps and layers, or per step once `mean` was taken."""

    steps: int = 0
    kv_bytes: float = 0.0
    other_bytes: float = 0.0
    shared_bytes: float = 0.0
    tokens: float = 0.0
    """`mean` takes it over the layers too."""
    per_layer: dict[int, float] = field(default_factory=dict)
    """Tokens by number of the layer."""
    seconds: float = 0.0
    """Spent in the states."""
    coded_bytes: dict[str, float] | None = None
    """Of keys and values by storage code, see `Attended.coded_bytes`; empty where they cannot be coded, None before the first."""

    def add(self, layer: Layer, step: Attended, always: int = 0) -> None:
        """always : tokens that everyone reads, of those that are there."""
        coded, before = step.coded_bytes(layer, always), self.coded_bytes
        self.coded_bytes = coded if before is None else {name: before[name] + x for name, x in coded.items() if name in before}
        self.kv_bytes += step.kv_bytes
        self.other_bytes += step.other_bytes
        self.shared_bytes += step.shared_bytes
        self.tokens += step.tokens
        self.per_layer[layer.number] = self.per_layer.get(layer.number, 0.0) + step.tokens

    def mean(self) -> Traffic:
        n = max(1, self.steps)
        per_layer = {layer: x / n for layer, x in self.per_layer.items()}
        tokens = self.tokens / n / max(1, len(per_layer))
        each = self.kv_bytes / n, self.other_bytes / n, self.shared_bytes / n
        coded = {name: x / n for name, x in (self.coded_bytes or {}).items()}
        return Traffic(self.steps, *each, tokens, per_layer, self.seconds / n, coded)


def read_prompt(
    model: Any, tokens: Sequence[int], rope: Rope | None, positions: Tensor | None = None, logits: int = 0, recent: int = 0,
    hidden: int = 0,
) -> Prompt:
    """One dense pass over a sequence, keeping keys and values of every layer.

    positions : int64 (q,) at which queries are kept, none by default; logits, hidden : of so many last tokens; recent : queries
    of so many last tokens are kept for `Prompt.show`.

    Raises LengthError for an empty sequence or positions outside it.
    """
    n = len(tokens)
    positions = torch.empty(0, dtype=torch.int64, device="cpu") if positions is None else positions
    if not n or (len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < n):
        raise LengthError(f"tokens, positions: expected positions in [0, {n}), got {positions.tolist()}")
    rows: list[tuple[Layer, Tensor, Tensor, Tensor, Tensor]] = []
    first = max(0, n - recent)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        layer = _layer(module, query, key, value, options, rope)
        kept, last = (query[0][:, x].unflatten(0, (layer.heads, layer.group)) for x in (positions, slice(first, n)))
        keep = [x.clone() for x in (key[0], value[0], kept, last)]
        rows.append((layer, keep[0], keep[1], keep[2], keep[3]))
        out: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
        return out

    ids = torch.tensor([list(tokens)], dtype=torch.int64, device="cpu")
    with torch.no_grad(), _serving(model, attend):
        last_layer = model.base_model(ids.to(model.device), use_cache=False).last_hidden_state[0]
        nothing = torch.empty((0, 0), dtype=torch.float32, device="cpu")
        scores = model.lm_head(last_layer[n - logits :]).float().cpu() if logits else nothing
    layers, keys, values, queries, last = zip(*rows, strict=True)
    kept_hidden = last_layer[n - hidden :].clone() if hidden else None
    return Prompt(ids[0], positions, scores, layers, keys, values, queries, last, kept_hidden)


class Untouched:
    """A layer that stays as the model has it, with a sliding window if it has one; nothing of it is counted."""

    def __init__(self, layer: Layer, tokens: int) -> None:
        self.cache = Cache(layer, tokens)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.cache.append(keys, values)

    def attend(self, queries: Tensor, window: int | None) -> Tensor:
        """The newest q tokens' queries (h, g, q, d) -> (h, g, q, e); window : of the layer, None for the whole context."""
        n, q = self.cache.length, queries.shape[2]
        place = torch.arange(n, dtype=torch.int64, device=queries.device)
        age = place[n - q :, None] - place
        seen = (age >= 0) & (age < (n if window is None else window))
        logits = queries @ self.cache.keys[:, None].transpose(2, 3) * self.cache.layer.scale
        return logits.masked_fill(~seen, -torch.inf).softmax(-1) @ self.cache.values[:, None]


def start(methods: Mapping[int, Method], prompt: Prompt, length: int, room: int) -> list[State | Untouched]:
    """A state per layer that holds the first ``length`` tokens of a prompt, with room for more; methods : by layer number, a
    layer without one stays as the model has it."""
    return list(starting(methods, prompt, length, room))


def starting(methods: Mapping[int, Method], prompt: Prompt, length: int, room: int) -> Iterator[State | Untouched]:
    """`start`, one layer at a time as it is asked for, so that one need be in memory."""
    for at, (layer, keys, values) in enumerate(zip(prompt.layers, prompt.keys, prompt.values, strict=True)):
        method = methods.get(layer.number)
        if method is None:
            left = Untouched(layer, length + room)
            left.append(keys[:, :length], values[:, :length])
            yield left
            continue
        state = method.start(layer, length + room)
        state.append(keys[:, :length], values[:, :length])
        prompt.show(state, at, length - method.observed, length)
        yield state


def decode(
    model: Any, states: Iterable[State | Untouched], tokens: Sequence[int], position: int, together: bool = False,
    always: int = 0,
) -> tuple[Tensor, Traffic]:
    """Feed tokens from a position on, every layer's attention served by its state.

    states : one per attention layer, in order; taken when its layer is reached. together : let states that can answer several
    tokens at once do so, see `steps.replay`. always : sinks and window, which no storage codes. Returns logits : float32
    (n, vocabulary) after each token, and what was read per step.
    """
    hidden, traffic = decode_hidden(model, states, tokens, position, together, always)
    with torch.no_grad():
        logits: Tensor = model.lm_head(hidden).float().cpu()
    return logits, traffic


def decode_hidden(
    model: Any, states: Iterable[State | Untouched], tokens: Sequence[int], position: int, together: bool = False,
    always: int = 0,
) -> tuple[Tensor, Traffic]:
    """`decode` without the head, whose logits take much memory where tokens are many: (n, width), in the model's dtype."""
    traffic, order, count = Traffic(steps=len(tokens)), iter(states), len(tokens)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        layer = _layer(module, query, key, value, options, None)
        state = next(order)
        keys, values, queries = key[0], value[0], query[0].float()
        queries = queries.reshape(layer.heads, layer.group, count, layer.d)
        if isinstance(state, Untouched):
            state.append(keys, values)
            out = state.attend(queries, options.get("sliding_window"))
        else:
            began = time.perf_counter()
            every = torch.arange(count, dtype=torch.int64, device="cpu")
            steps = replay(state, keys, values, queries, every, together, chosen=False)
            traffic.seconds += time.perf_counter() - began
            for place, step in enumerate(steps, position + 1):
                traffic.add(layer, step, min(place, always))
            out = torch.stack([step.out for step in steps], 2)
        return out.flatten(0, 1).transpose(0, 1)[None].to(query)

    with torch.no_grad(), _serving(model, attend):
        where = torch.arange(position, position + count, dtype=torch.int64, device=model.device)[None]
        hidden: Tensor = model.base_model(
            torch.tensor([list(tokens)], dtype=torch.int64, device=model.device), position_ids=where, use_cache=False
        ).last_hidden_state[0]
    return hidden, traffic.mean()


def generate(
    model: Any, states: Sequence[State | Untouched], tokens: Sequence[int], position: int, count: int,
    done: Callable[[list[int]], bool] = lambda answer: False,
) -> list[int]:
    """Feed tokens as `decode` does, then continue greedily: the ``count`` tokens that follow, or fewer when ``done`` says of
    those there are that no more are wanted."""
    logits, _ = decode(model, states, tokens, position)
    answer = [int(logits[-1].argmax())]
    while len(answer) < count and not done(answer):
        logits, _ = decode(model, states, answer[-1:], position + len(tokens) + len(answer) - 1)
        answer.append(int(logits[-1].argmax()))
    return answer


def _layer(module: Any, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any], rope: Rope | None) -> Layer:
    heads, d, e = key.shape[1], key.shape[3], value.shape[3]
    scale = options.get("scaling")
    factor = d**-0.5 if scale is None else float(scale)
    return Layer(module.layer_idx, heads, query.shape[1] // heads, d, e, factor, rope, key.device, key.dtype)


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
