"""`Rope` from the config of a Hugging Face model: which families rotate how, and where their configs say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CompatibilityError, ParameterError
from .rope_parameters import _OPTIONAL, _REQUIRED, _integer, _longrope_magnitude, _positive, _yarn_magnitude

_INTERLEAVED = {
    "codegen", "cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "gptj", "helium", "llama4_text",
    "moonshine", "moonshine_streaming",
}
# Families that rotate in sliding-window layers only; True: if the model has no window at all, every layer rotates.
_ONLY_SLIDING = {
    "afmoe": False, "cohere2": False, "exaone4": True, "exaone4_5_text": True, "exaone_moe": True, "flint": False,
    "kolibri1": True,
}
# Families of another rule: layers chosen otherwise, heads that differ by layer, angles of the other sign, a learnt norm after it.
_OWN_RULE = {
    "blt", "blt_global_transformer", "blt_local_decoder", "blt_local_encoder", "blt_patcher", "cohere2_moe", "gemma4_text",
    "gemma4_unified_text", "hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "nanochat",
}
# partial_rotary_factor of a config.json that does not state it; config objects always do.
_PARTIAL = {
    "glm": 0.5, "glm4": 0.5, "glm4_moe": 0.5, "gpt_neox": 0.25, "nemotron": 0.5, "persimmon": 0.5, "phi": 0.5, "qwen3_next": 0.25,
    "stablelm": 0.25,
}
# Entries of rope_parameters that a scaling of another name uses, or that do not concern the angles.
_KNOWN = {
    "attention_factor", "beta_fast", "beta_slow", "factor", "finetuned", "high_freq_factor", "llama_4_scaling_beta",
    "long_factor", "low_freq_factor", "max_position_embeddings", "mscale", "mscale_all_dim", "original_max_position_embeddings",
    "partial_rotary_factor", "rope_theta", "rope_type", "short_factor", "truncate", "type",
}
_RENAMED = {"su": "longrope"}


def _read(config: Any, name: str, default: Any = None) -> Any:
    """An entry of a dict or an attribute of an object; ``default`` if it is absent or None."""
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return default if value is None else value


def _text_config(config: Any) -> Any:
    text = _read(config, "text_config")
    return config if text is None else text


def rope_options(config: Any, layer_type: str | None, layer: int | None, interleaved: bool | None) -> dict[str, Any] | None:
    """What `Rope.from_config` makes a `Rope` of, by argument; None for no rotation. Arguments and errors as there."""
    config = _text_config(config)
    model_type = str(_read(config, "model_type", ""))
    if model_type in _OWN_RULE or _read(config, "layer_rope_theta") is not None:
        raise CompatibilityError(
            f"config: expected a rotation as in Llama or GPT-J, got the family {model_type!r} with a rule of its own"
        )
    layer_type = _layer_type(config, layer_type, layer)
    if not _rotates(config, model_type, layer_type, layer):
        return None
    if _read(config, "qk_rope_head_dim") is not None:
        raise CompatibilityError(f"config: expected rotary dims that lead each head, got latent attention ({model_type!r})")
    if model_type in ("gptj", "codegen"):
        return {
            "head_dim": _head_dim(config), "rotary_dim": _integer(_read(config, "rotary_dim"), "rotary_dim", 2),
            "interleaved": True if interleaved is None else interleaved,
        }
    section = _rope_parameters(config, layer_type)
    if section is None:
        return None
    parameters, nested = section
    theta = parameters.get("rope_theta")
    if theta is None:
        raise CompatibilityError(
            f"config: expected rope_theta, got none for {model_type!r}; pass a transformers config, not its dict"
        )
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    kind = _RENAMED.get(kind, kind)
    unknown = sorted(name for name, value in parameters.items() if name not in _KNOWN and value is not None)
    if kind not in _REQUIRED or unknown:
        detail = f" with {', '.join(unknown)}" if unknown else ""
        raise CompatibilityError(f"config: expected a rope type of {sorted(_REQUIRED)}, got {kind!r}{detail}")
    head_dim = _head_dim(config)
    partial = parameters.get("partial_rotary_factor")
    partial = _read(config, "rotary_pct", _PARTIAL.get(model_type, 1.0)) if partial is None else partial
    return {
        "head_dim": head_dim, "theta": theta, "rotary_dim": int(head_dim * _positive(partial, "partial_rotary_factor")),
        "interleaved": model_type in _INTERLEAVED if interleaved is None else interleaved, "scaling": kind,
    } | _scaling(kind, parameters, config, nested)


def _layer_type(config: Any, layer_type: str | None, layer: int | None) -> str | None:
    if layer is None or layer_type is not None:
        return layer_type
    types = _read(config, "layer_types")
    if types is None:
        return None
    if _integer(layer, "layer", 0) >= len(types):
        raise ParameterError(f"layer: expected a number below {len(types)}, got {layer}")
    return str(types[layer])


def _rotates(config: Any, model_type: str, layer_type: str | None, layer: int | None) -> bool:
    """Whether a layer rotates at all, by what is known of its family."""
    if _read(config, "alibi", False) or not _read(config, "use_mem_rope", True):
        return False
    if _read(config, "position_embedding_type", "nope" if model_type == "granitemoehybrid" else "rope") not in ("rope", "rotary"):
        return False
    uses = _read(config, "no_rope_layers", [])  # 1: the layer rotates, whatever the name says
    if len(uses) and not all(uses):
        if layer is None:
            raise ParameterError(f"layer: expected a layer number, some layers of {model_type!r} do not rotate, got None")
        if layer >= len(uses):
            raise ParameterError(f"layer: expected a number below {len(uses)}, got {layer}")
        return bool(uses[layer])
    if model_type in _ONLY_SLIDING:
        if _ONLY_SLIDING[model_type] and _read(config, "sliding_window") is None:
            return True
        if layer_type is None:
            raise ParameterError(f"layer_type: expected one, only sliding-window layers of {model_type!r} rotate, got None")
        return layer_type == "sliding_attention"
    return True


def _head_dim(config: Any) -> int:
    head_dim = _read(config, "head_dim")
    if head_dim is None:
        hidden = _read(config, "hidden_size", _read(config, "n_embd"))
        heads = _read(config, "num_attention_heads", _read(config, "n_head"))
        if hidden is None or heads is None:
            raise CompatibilityError("config: expected head_dim, or hidden_size and num_attention_heads, got none of them")
        head_dim = hidden // heads
    return _integer(head_dim, "head_dim", 2)


def _rope_parameters(config: Any, layer_type: str | None) -> tuple[dict[str, Any], dict[str, Any] | None] | None:
    """rope_parameters of the layer with its theta, and the outer dict if they were nested by layer type; None for no rotation."""
    section = _read(config, "rope_parameters")
    theta = _read(config, "rope_theta", _read(config, "rotary_emb_base"))
    partial = _read(config, "partial_rotary_factor")
    nested: dict[str, Any] | None = None
    if section and any(
        isinstance(value, Mapping) or (value is None and str(name).endswith("_attention")) for name, value in section.items()
    ):
        if layer_type not in section:
            raise ParameterError(f"layer_type: expected one of {list(section)}, got {layer_type!r}")
        nested, section = dict(section), section[layer_type]
        if section is None:
            return None
    elif layer_type is not None:
        local = _read(config, "rope_local_base_freq")
        types = _read(config, "layer_types") or ([] if local is None else ["full_attention", "sliding_attention"])
        if len(types) and layer_type not in types:
            raise ParameterError(f"layer_type: expected one of {sorted(set(types))}, got {layer_type!r}")
        if local is not None and layer_type == "sliding_attention":  # Gemma 3 before transformers 5: only the global layers scale
            return {"rope_theta": local}, None
    elif _read(config, "rope_local_base_freq") is not None:
        raise ParameterError("layer_type: expected full_attention or sliding_attention, their rope_theta differ, got None")
    section = section or _read(config, "rope_scaling")
    if not section and theta is None:
        raise CompatibilityError(
            "config: expected rope_parameters, rope_theta or rotary_dim, got none of them; has the model RoPE?"
        )
    parameters = {**({} if theta is None else {"rope_theta": theta}), **(section or {})}
    if partial is not None:
        parameters.setdefault("partial_rotary_factor", partial)
    return parameters, nested


def _scaling(kind: str, parameters: dict[str, Any], config: Any, nested: dict[str, Any] | None) -> dict[str, Any]:
    """The fields of `Rope` that belong to the scaling, with transformers' defaults where they depend on the config."""
    names = set(_REQUIRED[kind]) | set(_OPTIONAL.get(kind, ()))
    scaling = {name: parameters[name] for name in names if parameters.get(name) is not None}
    longest = _read(config, "max_position_embeddings")
    if kind == "dynamic":
        scaling["original_max_position"] = longest
    elif "original_max_position" in names:
        original = parameters.get("original_max_position_embeddings")
        if nested is None:
            original = _read(config, "original_max_position_embeddings", original)
        scaling["original_max_position"] = longest if original is None else original
    if kind in ("yarn", "longrope"):
        factor = parameters.get("factor")
        if factor is None and longest is not None and scaling["original_max_position"]:
            factor = longest / scaling["original_max_position"]
        if kind == "yarn":
            scaling["factor"] = factor
            mscale, over = parameters.get("mscale"), parameters.get("mscale_all_dim")
            if scaling.get("attention_factor") is None and factor and mscale and over:
                scaling["attention_factor"] = _yarn_magnitude(factor, mscale) / _yarn_magnitude(factor, over)
            if nested is not None:  # transformers looks for it beside the layer types
                scaling["truncate"] = nested.get("truncate", True)
            scaling = {name: value for name, value in scaling.items() if value or name not in ("beta_fast", "beta_slow")}
        elif scaling.get("attention_factor") is None and factor is not None and scaling["original_max_position"] is not None:
            scaling["attention_factor"] = _longrope_magnitude(factor, scaling["original_max_position"])
    return scaling
