"""Which models of transformers an index can serve, and which of their layers. Refuses the others by name, before anything runs.

Looks at configs and modules; knows no tokens, caches or attention.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..errors import CompatibilityError, MissingDependencyError, ParameterError

OLDEST, NEWEST = (5, 0), (5, 24)
"""The first version of transformers that is supported, and the last that was tested; a later 5.x is served as long as it fits."""

CACHE_NAMES = ("cache", "past_key_values")
"""What decoders call the argument that brings a cache: since transformers 5.24, and before."""

MAX_DIM, DIM_STEP = 256, 8  # head dims that the kernels take


def check_version() -> None:
    """MissingDependencyError unless transformers is there in a version that works."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError("attaching an index to a model needs transformers: pip install 'transformers>=5'") from error
    installed = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not OLDEST <= installed < (6, 0):
        raise MissingDependencyError(
            f"transformers: expected {OLDEST[0]}.{OLDEST[1]} or later, below 6, got {transformers.__version__}"
        )


def version() -> str:
    """The installed transformers, as messages name it."""
    import transformers

    return f"transformers {transformers.__version__}"


def cache_argument(module: Any) -> str:
    """By which keyword the forward of ``module`` takes a cache: of `CACHE_NAMES`, what its signature has.

    Raises CompatibilityError, naming the installed version, if it has neither.
    """
    names = inspect.signature(module.forward).parameters
    for name in CACHE_NAMES:
        if name in names:
            return name
    raise CompatibilityError(
        f"model: expected a forward that takes a cache as one of {CACHE_NAMES}, got {type(module).__name__} of {version()}, "
        f"which takes {tuple(names)}"
    )


def decoder_of(model: Any) -> Any:
    """The module of ``model`` that holds the decoder layers; CompatibilityError if it has none as they are known here."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        inside = {"get_base_model": "model.get_base_model()", "_orig_mod": "model._orig_mod", "module": "model.module"}
        hint = next((f"; attach to what it wraps, {way}" for name, way in inside.items() if hasattr(model, name)), "")
        raise ParameterError(f"model: expected a PreTrainedModel of transformers, got {type(model).__name__}{hint}")
    if model.config.is_encoder_decoder:
        raise CompatibilityError(f"model: expected a decoder, got the encoder-decoder {type(model).__name__}")
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if layers is None or not all(hasattr(layer, "self_attn") for layer in attention_layers(decoder)):
        raise CompatibilityError(f"model: expected decoder layers with self_attn as in Llama, got {type(model).__name__}")
    if not model._can_set_attn_implementation() or not decoder._can_set_attn_implementation():
        raise CompatibilityError(f"model: expected one whose attention goes by AttentionInterface, got {type(model).__name__}")
    return decoder


def attention_layers(decoder: Any) -> list[Any]:
    """The decoder layers in use; a config may ask for fewer than there are."""
    return list(decoder.layers)[: decoder.config.num_hidden_layers]


def check_decoder(decoder: Any) -> None:
    """CompatibilityError for what no layer of a decoder may have, indexed or not: it would change what attention computes."""
    from transformers.cache_utils import DynamicLayer

    config, name = decoder.config, type(decoder).__name__
    others = sorted({type(layer).__name__ for layer in _cache_layers(config) if not isinstance(layer, DynamicLayer)})
    if others:
        raise CompatibilityError(
            f"model: expected layers with softmax attention alone, got {name}, a hybrid whose other layers keep a state of their "
            f"own ({', '.join(others)})"
        )
    if getattr(config, "kv_sharing_modes", None) or getattr(config, "num_kv_shared_layers", 0):
        raise CompatibilityError(f"model: expected keys and values of its own in each layer, got {name}, whose layers share them")
    if not getattr(config, "is_causal", True):
        raise CompatibilityError(f"model: expected causal attention, got {name} with is_causal=False")
    for number, layer in enumerate(attention_layers(decoder)):
        attention = getattr(layer, "self_attn", None)
        cap = getattr(attention, "attn_logit_softcapping", None)
        if cap is not None:
            raise CompatibilityError(
                f"model: expected plain softmax attention, got attn_logit_softcapping={cap} in layer {number} of {name}; neither "
                "the scan nor SDPA can cap logits"
            )
        if getattr(attention, "sinks", None) is not None:
            raise CompatibilityError(
                f"model: expected plain softmax attention, got learnt attention sinks in layer {number} of {name}"
            )


def global_layers(decoder: Any) -> list[int]:
    """Layers with full attention over the whole context: those there is something to index in."""
    from transformers.cache_utils import DynamicLayer

    return [number for number, layer in enumerate(_cache_layers(decoder.config)) if type(layer) is DynamicLayer]


def _cache_layers(config: Any) -> list[Any]:
    """The layers of the cache that transformers makes for a decoder of this config."""
    from transformers.cache_utils import DynamicCache

    layers: list[Any] = DynamicCache(config=config).layers
    return layers


def kv_heads_of(config: Any) -> int:
    """KV heads of a decoder; as many as query heads in a family that does not group them."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def check_dense_layers(dense_layers: Iterable[int], count: int) -> frozenset[int]:
    """Numbers of layers to leave dense; negative ones count from the end. ParameterError for one that is not there."""
    numbers = []
    for number in dense_layers:
        if isinstance(number, bool) or not isinstance(number, int) or not -count <= number < count:
            raise ParameterError(f"dense_layers: expected numbers of the {count} layers, got {number!r}")
        numbers.append(number % count)
    return frozenset(numbers)


def check_head_dim(dim: int, number: int) -> None:
    if dim % DIM_STEP or dim > MAX_DIM:
        raise CompatibilityError(
            f"layer {number}: expected a head dim that is a multiple of {DIM_STEP} up to {MAX_DIM}, got {dim}; name it in "
            "dense_layers"
        )


def head_shard(attention: Any) -> tuple[int, int]:
    """(rank, ranks): which share of the KV heads of an attention module lives in this process, by its key projection.

    Tensor parallelism splits the rows of the projection, head after head; without it the answer is (0, 1).
    """
    from torch.distributed.tensor import DTensor, Shard

    weight = getattr(getattr(attention, "k_proj", None), "weight", None)
    if not isinstance(weight, DTensor):
        return 0, 1
    for axis, placement in enumerate(weight.placements):
        if isinstance(placement, Shard) and placement.dim == 0:
            return weight.device_mesh.get_local_rank(axis), weight.device_mesh.size(axis)
    return 0, 1


def fingerprint(decoder: Any) -> str:
    """A checksum of some numbers of every row and every column of each weight in this process: tells two checkpoints of one
    architecture apart, and one from what it became by training, merging or cutting out heads, of one row too.

    Of quantised weights (torchao, bitsandbytes, GPTQ) it is that of what they are packed into. Of adapters (PEFT) it says too
    which of them are at work, and by how much.
    """
    value = 0
    for name, x in _weights(decoder):
        for part in _plain_tensors(x.detach()):
            if part.device.type == "meta":  # on disk: its values are not here
                continue
            some = _some_numbers(part).cpu()
            some = some.float() if some.is_floating_point() else some.contiguous().view(torch.uint8)
            value = zlib.crc32(some.numpy().tobytes(), zlib.crc32(name.encode(), value))
    for name, module in decoder.named_modules():
        if isinstance(getattr(module, "disable_adapters", None), bool):  # PEFT's layers; every model has methods of these names
            names, scaling = () if module.disable_adapters else module.active_adapters, getattr(module, "scaling", {})
            active = [(adapter, scaling.get(adapter)) for adapter in names]
            value = zlib.crc32(f"{name} {active}".encode(), value)
    return f"{value:08x}"


def _weights(decoder: Any) -> Iterator[tuple[str, Any]]:
    """Parameters, and the buffers that a checkpoint holds: packed weights may be those; angles of RoPE are not among them."""
    yield from decoder.named_parameters()
    for prefix, module in decoder.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _some_numbers(x: torch.Tensor) -> torch.Tensor:
    """A number of every row and of every column of ``x``, its leading axes taken as one; all of a vector."""
    if x.ndim < 2 or not x.numel():
        return x.reshape(-1)
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    turn = torch.arange(max(rows, columns), dtype=torch.int64, device=x.device)
    return x.reshape(rows, columns)[turn % rows, turn % columns]


def _plain_tensors(x: Any) -> Iterator[Any]:
    """The tensors that hold the numbers of ``x``: itself, the share of this process, or what a packed weight is made of."""
    from torch.distributed.tensor import DTensor

    if isinstance(x, DTensor):
        yield from _plain_tensors(x.to_local())
    elif hasattr(x, "__tensor_flatten__"):
        names, _ = x.__tensor_flatten__()
        for name in names:
            yield from _plain_tensors(getattr(x, name))
    else:
        yield x
