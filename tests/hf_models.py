"""Tiny models of real architectures, routers for them, and prompts: what every test of the transformers integration needs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

import saap_index as saap
from saap_index.hf import support
from saap_index.routers import model_shape

VOCABULARY = 211

CACHE = support.cache_argument(transformers.LlamaForCausalLM)
"""The name of a cache, as argument and in what comes back: "cache", or "past_key_values" before transformers 5.24."""

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 16384, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0, "initializer_range": 0.3,
}
MIXED = {"num_hidden_layers": 4, "sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"] * 2}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "gemma3": ("Gemma3", {**MIXED, "query_pre_attn_scalar": 24}),
    "llama_llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "llama_dynamic": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
    "phi_partial": ("Phi", {"partial_rotary_factor": 0.5}),
    "glm_partial_interleaved": ("Glm", {"partial_rotary_factor": 0.5}),
    "qwen2_mixed": ("Qwen2", {**MIXED, "use_sliding_window": True}),
}
"""Name -> family and what its config has besides `SHAPE`."""

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3")

SMALL: dict[str, Any] = {"sinks": 2, "window": 8, "seal_tokens": 4, "max_segment": 64, "break_even": 60}
"""A layout in which a hundred tokens have several segments, and sixty none."""


def tiny(case: str, seed: int = 0, **changes: Any) -> Any:
    """A model with random weights that are large enough for its choices to be clear, and that never stops by itself."""
    family, config = CASES.get(case, (case, {}))
    names = {"Gemma3": "Gemma3Text"}
    shape = {k: v for k, v in SHAPE.items() if (family, k) not in (("Qwen2", "head_dim"), ("Phi", "head_dim"))}
    torch.manual_seed(seed)
    made = getattr(transformers, f"{names.get(family, family)}Config")(**{**shape, **config, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(made).eval()
    model.generation_config.eos_token_id = 10**6  # no token: it never stops by itself
    return model


def make_routers(model: Any, nlist: int = 8, layers: Any = None, own_lists: bool = False) -> saap.Routers:
    """Routers as a plain IVF index has them, around random centroids; or with lists of every prompt's own."""
    shape = model_shape(model.config)
    heads, d = shape["num_key_value_heads"], shape["head_dim"]
    g = torch.Generator().manual_seed(1)
    made = {}
    for layer in range(shape["num_hidden_layers"]) if layers is None else layers:
        centroids = torch.randn((heads, nlist, d), generator=g)
        rope = saap.Rope.from_config(model.config, layer=layer)
        tower = saap.TwoTower.symmetric(heads, d) if own_lists else None
        if tower is not None:
            tower = tower.with_transform(torch.randn((heads, 1, 3 * d, d), generator=g))
        parts = saap.KeyQuantizer(centroids), saap.QueryRouter.symmetric(centroids), rope, rope, d**-0.5, tower
        made[layer] = saap.LayerRouters(*parts)
    return saap.Routers({"model": shape, "layout": {"sinks": 2, "window": 8}}, made)


def attached(model: Any, selectivity: float = 1.0, own_lists: bool = False, **options: Any) -> Any:
    return saap.attach(model, make_routers(model, own_lists=own_lists), selectivity, **{**SMALL, **options})


def prompt(batch: int = 1, length: int = 100, seed: int = 3) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: Tensor, padding: list[int]) -> dict[str, Tensor]:
    """The same prompts, the first ``padding[i]`` tokens of each made padding."""
    mask = (torch.arange(ids.shape[1])[None] >= torch.tensor(padding)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def greedy(model: Any, inputs: Tensor | dict[str, Tensor], new: int = 24, **options: Any) -> Tensor:
    """New tokens (b, new) of `generate`."""
    given = inputs if isinstance(inputs, dict) else {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    out = model.generate(**given, max_new_tokens=new, **{"do_sample": False, **options})
    return out[:, given["input_ids"].shape[1] :]


def sealed_tokens(cache: Any) -> list[int]:
    """Of every indexed layer: how many tokens lie in lists."""
    return [stats.sealed_tokens for stats in cache.stats().values()]
