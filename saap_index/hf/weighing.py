"""What a layer's attention adds to the hidden state, as a share of it: so errors of different layers can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import support


@contextmanager
def weighing(decoder: Any, layers: Sequence[int], first: int) -> Iterator[dict[int, float]]:
    """During a call, what attention adds to the hidden state of each layer: squared length of the one by that of the other, over
    the tokens from ``first`` of the call on. Filled while it runs, by layer."""
    modules = support.attention_layers(decoder)
    shares: dict[int, float] = {}
    before: dict[int, Tensor] = {}

    def hooks(layer: int) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            before[layer] = _energy(args[0] if args else options["hidden_states"], first)

        def leave(_: Any, args: Any, added: Any) -> None:
            shares[layer] = float(_energy(added[0] if isinstance(added, tuple) else added, first) / before.pop(layer))

        return enter, leave

    handles = []
    for layer in layers:
        enter, leave = hooks(layer)
        handles.append(modules[layer].register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(modules[layer].self_attn.register_forward_hook(leave))
    try:
        yield shares
    finally:
        for handle in handles:
            handle.remove()


def _energy(x: Tensor, first: int) -> Tensor:
    """Squared length of x : (b, n, width) from a token on, float32, without a copy of it in that."""
    return torch.linalg.vector_norm(x.detach()[:, first:], dtype=torch.float32).square()
