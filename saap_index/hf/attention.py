"""The attention function "saap" of transformers, and its place in the registries. Knows the cache layer, not the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import CompatibilityError, StateError
from . import support, traced
from .layer import IndexedLayer
from .probe import UNSERVED
from .slots import LAYER

NAME = "saap"

INDEXED = "_saap_indexed"
"""Attribute of the attention modules that `attach` gave an index: keys of another cache are refused there."""


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: query (b, hq, q, d), key (b, h, n, d), value (b, h, n, e) -> (b, q, hq, e).

    Keys from a layer of a `SaapCache` lead to its index. Any other keys, those of a layer left dense or of a call without a
    cache, are attended to by transformers' SDPA, with the same arguments. A layer that routers are attached to gets none but its
    index's, or StateError: what brought them past `attach` may be named as it will.
    """
    layer: IndexedLayer | None = traced.pop_layer() if torch.compiler.is_compiling() else getattr(key, LAYER, None)
    if kwargs.get("cache") is not None:
        raise CompatibilityError("generate_batch: expected generate, got continuous batching, whose paged cache has no index")
    if layer is None:
        if key.shape[2] != query.shape[2] and getattr(module, INDEXED, False):
            raise StateError(
                f"cache: expected a SaapCache in a model that routers are attached to, got {key.shape[2]} keys of another for "
                f"{query.shape[2]} queries ({support.version()}); call the model itself, with its own argument for a cache"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    try:
        return _indexed(layer, module, query, key, value, attention_mask, dropout, scaling, kwargs), None
    except BaseException:
        layer.call.fail()
        raise


def _indexed(
    layer: IndexedLayer, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float,
    scaling: float | None, kwargs: dict[str, Any],
) -> Tensor:
    """`attention` of an indexed layer."""
    for name in UNSERVED:
        if kwargs.get(name) is not None:
            raise CompatibilityError(f"layer {layer.plan.number}: expected plain softmax attention, got {name}")
    if dropout:
        raise StateError(f"SaapCache: expected a model in evaluation mode, got dropout={dropout}; call model.eval()")
    if torch.compiler.is_compiling():
        return traced.attend(layer, query, key, value, attention_mask, scaling, kwargs.get("position_ids"))
    return layer.attend(module, query, attention_mask, scaling, **{"position_ids": None, **kwargs})


def register() -> None:
    """Make the name known to transformers, with SDPA's masks: without those, padding would be ignored silently."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
