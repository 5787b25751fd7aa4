"""By which length a model of transformers rotates the tokens of a call, where its angles depend on it. Knows modules, no tokens.

transformers takes one length for a batch, that of the newest position of all. Dynamic NTK keeps the frequencies of the longest
text that a model has read until one is shorter than the original length (`dynamic_rope_update` in its modeling_rope_utils.py).
"""

from __future__ import annotations

from typing import Any

from ..rope import Rope


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
