"""By which length a model of transformers rotates the tokens of a call, where its angles depend on it. Knows modules, no tokens.

transformers takes one length for a batch, that of the newest position of all. Dynamic NTK keeps the frequencies of the longest
text that a model has read until one is shorter than the original length (`dynamic_rope_update` in its modeling_rope_utils.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..routing.rope import Rope


def rotary_of(decoder: Any) -> Any:
    """The module that makes the angles of all layers; None in a model that has it elsewhere."""
    return getattr(decoder, "rotary_emb", None)


def length_of_rotation(rope: Rope, rotary: Any, layer_type: str | None, newest: int) -> int:
    """The length whose frequencies ``rotary`` took for a call with ``newest`` + 1 positions, or will take: asked before the call,
    after it or, as a compiled model may leave its state behind, within."""
    length = newest + 1
    original = rope.original_max_position
    if rope.scaling != "dynamic" or rotary is None or original is None:
        return length
    held = getattr(rotary, "max_seq_len_cached", 0)
    if isinstance(getattr(rotary, "rope_type", None), dict):
        held = getattr(rotary, f"{layer_type}_max_seq_len_cached", held)
    return original if length < original else max(length, int(held))


@contextmanager
def fresh_rotation(rotary: Any) -> Iterator[None]:
    """While it lasts, ``rotary`` has read no text yet; afterwards it remembers what it did before. None: nothing happens."""
    if rotary is None:
        yield
        return
    state = {**rotary.__dict__, "_buffers": dict(rotary._buffers)}
    original = getattr(rotary, "original_max_seq_len", None)
    end = "max_seq_len_cached"
    for prefix in [name.removesuffix(end) for name in state if name.endswith(end)]:
        first = getattr(rotary, f"{prefix}original_inv_freq", None)
        if original is not None and first is not None and getattr(rotary, prefix + end) > original:
            setattr(rotary, prefix + end, original)
            rotary._buffers[f"{prefix}inv_freq"] = first.to(getattr(rotary, f"{prefix}inv_freq").device, copy=True)
    try:
        yield
    finally:
        rotary.__dict__.update(state)
