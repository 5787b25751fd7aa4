"""What a model really rotates by, tried on itself. Knows modules and angles, no routers.

A config says how a family that is known rotates; of others, and of code of a checkpoint's own, it says nothing for sure. So a few
copies of one token go through the first layers, at positions far apart: copies are alike until they are rotated, and so they must
be again once the rotation that the config states is undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import CompatibilityError
from ..routing.rope import Rope
from .rotation import fresh_rotation, rotary_of
from .support import attention_layers

_NAME = "saap_probe"
_POSITIONS, _NEAR = (0, 1, 2, 5, 17, 60, 200, 700), 17
_TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Of the length of a key, by the dtype of keys. Rounding, in angles, products and layers before, makes a third; another rotation
about 1."""


UNSERVED = ("softcap", "s_aux", "position_bias")
"""Arguments of attention functions that change what a softmax is taken of."""

_Call = tuple[Tensor, Tensor, Tensor, Tensor | None, dict[str, Any]]


class _Done(Exception):
    """Every layer that is to be looked at was."""


def check_rotation(decoder: Any, ropes: Mapping[int, Rope | None]) -> None:
    """CompatibilityError unless layers of ``decoder``, by number, rotate their keys as ``ropes`` says; None: not at all.

    Of layers with the same rope the first is tried. Nothing is said of a model whose weights are not in memory.
    """
    first: dict[Any, int] = {}
    for number in sorted(ropes):
        first.setdefault(ropes[number], number)
    if not first or any(parameter.device.type == "meta" for parameter in decoder.parameters()):
        return
    longest = getattr(decoder.config, "max_position_embeddings", None) or _POSITIONS[-1] + 1
    kept = getattr(rotary_of(decoder), "inv_freq", None)
    if kept is not None and kept.dtype != torch.float32:  # model.to(bfloat16) rounds them: far away angles are anybody's guess
        longest = min(longest, _NEAR)
    for rope in first:
        if rope is not None and rope.is_dynamic and rope.original_max_position is not None:
            longest = min(longest, rope.original_max_position)
    positions = [p for p in _POSITIONS if p < longest]
    calls = _calls(decoder, sorted(first.values()), positions)
    for rope, number in first.items():
        tolerance = _TOLERANCE.get(calls[number][0][1].dtype, 0.02) if calls[number] else 0.0
        k = _one_key(calls[number], f"layer {number} of {type(decoder).__name__}", len(positions))
        if rope is not None and rope.head_dim != k.shape[-1]:
            raise CompatibilityError(f"model: expected keys of {rope.head_dim} dims in layer {number}, got {k.shape[-1]}")
        k = k if rope is None else rope.unrotate(k, positions, positions[-1] + 1)
        apart = (k - k[:, :, :1]).norm(dim=-1) / k[:, :, :1].norm(dim=-1).clamp(min=1e-12)
        if not bool((apart <= tolerance).all()):
            how = "no rotation" if rope is None else f"the rotation of its config, {rope.to_dict()}"
            raise CompatibilityError(
                f"model: expected {how}, in layer {number} of {type(decoder).__name__}, got keys of one token that differ by "
                f"{float(apart.max()):.2f} of their length once it is undone"
            )


def _one_key(calls: list[_Call], where: str, n: int) -> Tensor:
    """Keys (1, h, n, d) in float32, if a layer called attention as Llama does; CompatibilityError otherwise."""
    if len(calls) != 1:
        raise CompatibilityError(f"model: expected {where} to call the attention function once, got {len(calls)} calls")
    query, key, value, mask, options = calls[0]
    shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    alike = query.ndim == key.ndim == value.ndim == 4 and query.shape[::2] == key.shape[::2] == (1, n)
    if not alike or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1] or value.shape[:3] != key.shape[:3]:
        raise CompatibilityError(
            f"model: expected queries (1, hq, {n}, d), keys (1, h, {n}, d) and values (1, h, {n}, e) in {where}, got {shapes}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1):
        raise CompatibilityError(
            f"model: expected attention that a mask of tokens decides, got a mask of its own in {where}, {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    for name in UNSERVED:
        if options.get(name) is not None:
            raise CompatibilityError(f"model: expected plain softmax attention, got {name} in {where}")
    return key.detach().to("cpu", torch.float32)


@torch.no_grad()
def _calls(decoder: Any, layers: list[int], positions: list[int]) -> dict[int, list[_Call]]:
    """What attention was called with for one token at these positions: queries, keys, values, mask and options, by layer."""
    calls: dict[int, list[_Call]] = {number: [] for number in layers}

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        number = getattr(module, "layer_idx", None)
        if number in calls:
            calls[number].append((query, key, value, attention_mask, options))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    def stop(*_: Any) -> None:
        raise _Done

    embedding = decoder.get_input_embeddings().weight
    token = torch.full((1, len(positions)), len(embedding) // 2, dtype=torch.int64, device=embedding.device)
    places = torch.tensor([positions], dtype=torch.int64, device=embedding.device)
    training = [module for module in decoder.modules() if module.training]
    last = attention_layers(decoder)[layers[-1]].self_attn.register_forward_hook(stop)
    with _function(decoder, attend):
        for module in training:
            module.training = False
        try:
            decoder(input_ids=token, position_ids=places, use_cache=False)
        except _Done:
            pass
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise CompatibilityError(
                f"model: expected attention that is called as in Llama, got {type(decoder).__name__}, whose first layers fail "
                f"with {type(error).__name__}: {error}"
            ) from error
        finally:
            last.remove()
            for module in training:
                module.training = True
    return calls


@contextmanager
def _function(decoder: Any, attend: Any) -> Iterator[None]:
    """The decoder with another attention function; its rotary module remembers no more than before."""
    before = decoder.config._attn_implementation
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    try:
        decoder.set_attn_implementation(_NAME)
        with fresh_rotation(rotary_of(decoder)):
            yield
    finally:
        decoder.set_attn_implementation(before)
        for interface in (AttentionInterface, AttentionMaskInterface):  # transformers has no call that takes one back
            interface._global_mapping.pop(_NAME, None)
