"""A layer's update and attention as one torch operator, so that `torch.compile` takes a whole model. Knows the layer as opaque.

A cache is Python state and cannot be traced. While a model is traced, `update` therefore only counts slots and hands its layer
over to the attention function, which follows it; that records one operator with the new keys and values and a tensor that
names the layer. Run, the operator does what the two do without a compiler. As the name is data and no constant, what was
compiled for one cache serves every other.
"""

from __future__ import annotations

import itertools
import weakref
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import StateError

_LAYERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)


class _Handover:
    """From `update` to the attention function of the same layer, while both are traced."""

    layer: Any = None


_HANDOVER = _Handover()


def name_of(layer: Any) -> Tensor:
    """A tensor of one number that names ``layer`` to the operator, as long as it lives."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def update(layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    layer.slots = layer.slots + keys.shape[2]
    _HANDOVER.layer = layer
    return keys, values


def pop_layer() -> Any:
    """The layer whose `update` was traced last, once; None for a layer that is not indexed."""
    layer, _HANDOVER.layer = _HANDOVER.layer, None
    return layer


def attend(
    layer: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None,
    position_ids: Tensor | None,
) -> Tensor:
    groups = query.shape[1] // keys.shape[1]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    out: Tensor = torch.ops.saap_index.attend_layer(layer.name, query, keys, values, mask, position_ids, scale, groups)
    return out


@torch.library.custom_op("saap_index::attend_layer", mutates_args=())
def _attend_layer(
    name: Tensor, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, position_ids: Tensor | None, scaling: float,
    groups: int,
) -> Tensor:
    layer = _LAYERS.get(int(name))
    if layer is None:
        raise StateError("compiled step: expected the cache it was called with, got one that is gone")
    slots = layer.slots
    layer.update(keys, values)
    try:  # a call that fails is taken back in every layer
        module = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
        return layer.attend(module, query, mask, scaling, position_ids)
    except BaseException:
        layer.call.fail()
        raise
    finally:
        layer.slots = slots  # the traced program counts them, once it is through


@_attend_layer.register_fake
def _(
    name: Tensor, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, position_ids: Tensor | None, scaling: float,
    groups: int,
) -> Tensor:
    b, hq, q, _ = query.shape
    return query.new_empty((b, q, hq, values.shape[-1]))
