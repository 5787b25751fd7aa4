"""Rope against Hugging Face transformers' own rotary modules, and the algebra that any rotation obeys."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import FrozenInstanceError, dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import CACHE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    Cohere2Config,
    CohereConfig,
    Exaone4Config,
    Gemma3TextConfig,
    GlmConfig,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)
from transformers.models.cohere import modeling_cohere
from transformers.models.cohere2 import modeling_cohere2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.glm import modeling_glm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.phi import modeling_phi
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.stablelm import modeling_stablelm

from saap_index.backends.types import Rotation
from saap_index.errors import CompatibilityError, DTypeError, FormatError, ParameterError, ShapeError
from saap_index.routing.rope import Rope

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 131072,
}
WIDE = {"hidden_size": 128}  # head_dim 32, so that half and a quarter of it are even
PHI3_FACTORS = {"short_factor": [1.0 + i / 16 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}


@dataclass(frozen=True)
class Case:
    """One transformers family or scaling: the config, its rotary module, the function that applies it, what we must read."""

    name: str
    config: Any
    module: Any
    rotary: str
    layer_type: str | None = None
    interleaved: bool = False
    rotary_share: float = 1.0
    scaled: bool = False  # attention_scale differs from 1
    longest: int = 100_000


def tiny(config: Any, **entries: Any) -> Any:
    """A config of the family's class: transformers fills the rope parameters it is given, so each gets its own."""
    return config(**SIZES | copy.deepcopy(entries))


def llama(**parameters: Any) -> Any:
    return tiny(LlamaConfig, rope_parameters={"rope_theta": 10000.0, **parameters})


def dynamic(original: int, factor: float) -> Case:
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": factor}
    config = tiny(LlamaConfig, max_position_embeddings=original, rope_parameters=parameters)
    return Case("dynamic", config, modeling_llama, "Llama")


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096, **PHI3_FACTORS}
GPT_OSS_YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}

CASES = [
    Case("llama", llama(rope_type="default"), modeling_llama, "Llama"),
    Case("llama_theta", llama(rope_type="default", rope_theta=5e5), modeling_llama, "Llama"),
    Case("llama_linear", llama(rope_type="linear", factor=4.0), modeling_llama, "Llama"),
    Case("llama_yarn", llama(**YARN), modeling_llama, "Llama", scaled=True),
    Case("llama_yarn_betas", llama(**YARN, beta_fast=20.0, beta_slow=2.0), modeling_llama, "Llama", scaled=True),
    Case("llama_yarn_factor", llama(**YARN, attention_factor=0.7), modeling_llama, "Llama", scaled=True),
    Case("llama_yarn_mscale", llama(**YARN, mscale=0.7, mscale_all_dim=1.2), modeling_llama, "Llama", scaled=True),
    Case("llama3", llama(**LLAMA3), modeling_llama, "Llama"),
    Case("mistral", tiny(MistralConfig, head_dim=24), modeling_mistral, "Mistral"),
    Case("qwen2", tiny(Qwen2Config, rope_theta=1e6), modeling_qwen2, "Qwen2"),
    Case("qwen3", tiny(Qwen3Config, head_dim=32, rope_theta=1e6), modeling_qwen3, "Qwen3"),
    Case("qwen3_yarn", tiny(Qwen3Config, rope_parameters={"rope_theta": 1e6, **YARN}), modeling_qwen3, "Qwen3", scaled=True),
    Case("gpt_oss", tiny(GptOssConfig, rope_parameters=GPT_OSS_YARN), modeling_gpt_oss, "GptOss", scaled=True),
    Case("stablelm", tiny(StableLmConfig, **WIDE), modeling_stablelm, "StableLm", rotary_share=0.25),
    Case("phi", tiny(PhiConfig, **WIDE), modeling_phi, "Phi", rotary_share=0.5),
    Case("gpt_neox", tiny(GPTNeoXConfig, **WIDE), modeling_gpt_neox, "GPTNeoX", rotary_share=0.25),
    Case("phi3", tiny(Phi3Config, **WIDE, partial_rotary_factor=0.75), modeling_phi3, "Phi3", rotary_share=0.75),
    Case("phi3_longrope", tiny(Phi3Config, rope_parameters=LONGROPE), modeling_phi3, "Phi3", scaled=True),
    Case("phi3_short", tiny(Phi3Config, rope_parameters=LONGROPE), modeling_phi3, "Phi3", scaled=True, longest=4096),
    Case("glm", tiny(GlmConfig, head_dim=32), modeling_glm, "Glm", interleaved=True, rotary_share=0.5),
    Case("cohere", tiny(CohereConfig), modeling_cohere, "Cohere", interleaved=True),
    Case("cohere2", tiny(Cohere2Config), modeling_cohere2, "Cohere2", "sliding_attention", interleaved=True),
    Case("gemma3_full", tiny(Gemma3TextConfig, num_hidden_layers=6), modeling_gemma3, "Gemma3", "full_attention"),
    Case("gemma3_sliding", tiny(Gemma3TextConfig, num_hidden_layers=6), modeling_gemma3, "Gemma3", "sliding_attention"),
]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_positions(longest: int, n: int = 40) -> Tensor:
    """Int64 (n,), in no order, 0 and longest - 1 among them: a sequence of ``longest`` tokens."""
    inner = torch.randint(0, longest, (n - 2,), generator=torch.Generator().manual_seed(longest))
    return torch.cat([torch.tensor([longest - 1, 0]), inner])


def theirs(case: Case, q: Tensor, k: Tensor, positions: Tensor, module: Any = None) -> tuple[Tensor, Tensor]:
    """q, k (b, h, n, d) rotated at positions (b, n) or (n,) by the family's own code."""
    module = module if module is not None else getattr(case.module, case.rotary + "RotaryEmbedding")(case.config)
    layer_type = () if case.layer_type is None or case.rotary != "Gemma3" else (case.layer_type,)
    cos, sin = module(q, positions if positions.ndim == 2 else positions[None], *layer_type)
    share = cos.shape[-1]
    if case.rotary in ("StableLm", "Phi"):  # their attention splits the head, not the function
        new_q, new_k = case.module.apply_rotary_pos_emb(q[..., :share], k[..., :share], cos, sin)
        return torch.cat([new_q, q[..., share:]], -1), torch.cat([new_k, k[..., share:]], -1)
    return case.module.apply_rotary_pos_emb(q, k, cos, sin)  # type: ignore[no-any-return]


def undone(x: Tensor, rotation: Rotation) -> np.ndarray[Any, Any]:
    """What a kernel does with a Rotation, pair by pair, in NumPy: x (..., n, d)."""
    source, result = x.numpy(), x.numpy().copy()
    cos, sin = rotation.cos.numpy(), rotation.sin.numpy()
    half = cos.shape[1]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if rotation.interleaved else (i, i + half)
        result[..., a] = (source[..., a] * cos[:, i] + source[..., b] * sin[:, i]) * rotation.scale
        result[..., b] = (source[..., b] * cos[:, i] - source[..., a] * sin[:, i]) * rotation.scale
    return result


def close(ours: Any, other: Any, tolerance: float = 1e-5) -> None:
    ours, other = torch.as_tensor(ours), torch.as_tensor(other)
    assert ours.shape == other.shape and ours.dtype == other.dtype
    assert float((ours - other).abs().max()) <= tolerance * float(other.abs().max())


def rope_of(case: Case) -> Rope:
    rope = Rope.from_config(case.config, case.layer_type)
    assert rope is not None
    return rope


# -- against transformers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_transformers(case: Case) -> None:
    rope, positions = rope_of(case), random_positions(case.longest)
    assert rope.interleaved == case.interleaved
    assert rope.rotary_dim == case.rotary_share * rope.head_dim
    assert (rope.attention_scale != 1.0) == case.scaled
    q, k = tokens(2, 4, 40, rope.head_dim), tokens(2, 2, 40, rope.head_dim, seed=1)
    turned_q, turned_k = theirs(case, q, k, positions)
    length = case.longest
    for plain, turned in ((q, turned_q), (k, turned_k)):
        close(rope.rotate(plain, positions, length), turned)
        close(rope.unrotate(turned, positions, length), plain)
        close(undone(turned, rope.rotation(positions, length)), plain)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_frequencies_equal_transformers_to_the_bit(case: Case) -> None:
    module = getattr(case.module, case.rotary + "RotaryEmbedding")(case.config)
    name = "inv_freq" if case.rotary != "Gemma3" else f"{case.layer_type}_inv_freq"
    ours = rope_of(case).inv_freq()
    assert ours.dtype == torch.float32
    assert torch.equal(ours, getattr(module, name))


def test_positions_of_each_sequence() -> None:
    case = CASES[0]
    rope, positions = rope_of(case), torch.stack([random_positions(50), random_positions(70_000)])
    q = tokens(2, 4, 40, rope.head_dim)
    turned, _ = theirs(case, q, q, positions)
    close(rope.rotate(q, positions), turned)
    close(rope.unrotate(turned, positions.numpy()), q)
    grouped = turned.reshape(2, 2, 2, 40, -1)
    assert torch.equal(rope.unrotate(grouped, positions).reshape(turned.shape), rope.unrotate(turned, positions))
    assert torch.equal(rope.unrotate(turned, positions[:1]), rope.unrotate(turned, positions[0]))
    assert torch.equal(rope.rotate(q, [7]), rope.rotate(q, [7] * 40))


@pytest.mark.parametrize("length", [1, 100, 2047, 2048, 2049, 5000, 100_000])
def test_dynamic_below_and_above_the_original_length(length: int) -> None:
    case = dynamic(2048, 4.0)
    rope = rope_of(case)
    assert rope.is_dynamic
    module = modeling_llama.LlamaRotaryEmbedding(case.config)
    positions = random_positions(length)
    q = tokens(1, 4, 40, rope.head_dim)
    turned, _ = theirs(case, q, q, positions, module)
    assert torch.equal(rope.inv_freq(length), module.inv_freq)
    assert torch.equal(rope.inv_freq(length), rope.inv_freq()) == (length <= 2048)
    close(rope.rotate(q, positions, length), turned)
    close(rope.unrotate(turned, positions, length), q)
    close(undone(turned, rope.rotation(positions, length)), q)


def test_a_dynamic_cache_is_undone_by_the_length_of_each_rotation() -> None:
    case = dynamic(64, 2.0)
    rope, module = rope_of(case), modeling_llama.LlamaRotaryEmbedding(case.config)
    x = tokens(1, 1, 1, rope.head_dim)
    for position in range(60, 80):
        turned, _ = theirs(case, x, x, torch.tensor([position]), module)
        close(rope.unrotate(turned, [position], position + 1), x)
        close(undone(turned, rope.rotation(range(position, position + 1), position + 1)), x)


def test_longrope_changes_its_factors_beyond_the_original_length() -> None:
    rope = rope_of(next(case for case in CASES if case.name == "phi3_longrope"))
    assert rope.is_dynamic
    assert torch.equal(rope.inv_freq(4096), rope.inv_freq())
    assert not torch.equal(rope.inv_freq(4097), rope.inv_freq())
    assert torch.equal(rope.inv_freq(4097), rope.inv_freq(90_000))
    assert rope.attention_scale == math.sqrt(1 + math.log(32) / math.log(4096))


@pytest.mark.parametrize("rotary_dim", [8, 16])
def test_gptj(rotary_dim: int) -> None:
    config = GPTJConfig(n_embd=64, n_head=4, n_layer=1, rotary_dim=rotary_dim, n_positions=1000, vocab_size=32)
    rope = Rope.from_config(config)
    assert rope == Rope(16, rotary_dim=rotary_dim, interleaved=True)
    positions = torch.randint(0, 1000, (40,), generator=torch.Generator().manual_seed(3))
    q = tokens(1, 4, 40, 16)
    sin, cos = modeling_gptj.create_sinusoidal_positions(1000, rotary_dim)[positions][None].chunk(2, dim=-1)
    head = modeling_gptj.apply_rotary_pos_emb(q.transpose(1, 2)[..., :rotary_dim], sin, cos)
    turned = torch.cat([head.transpose(1, 2), q[..., rotary_dim:]], -1)
    close(rope.rotate(q, positions), turned)
    close(rope.unrotate(turned, positions), q)
    close(undone(turned, rope.rotation(positions)), q)


FAMILIES = [
    "cohere2", "ernie4_5", "exaone4", "gemma3_text", "glm4", "gpt_oss", "gptj", "granite", "helium", "llama", "llama4_text",
    "mixtral", "nemotron", "olmo2", "persimmon", "phi3", "qwen3_moe", "smollm3", "stablelm",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_keys_of_one_token_repeated_are_equal_once_undone(family: str) -> None:
    """Whole models: without rotation every position of such a prompt has the same keys, so what remains is the rotation."""
    sizes = SIZES | {
        "num_hidden_layers": 4,
        "sliding_window": 64,
        "rotary_dim": 8,
        "n_positions": 64,
        "moe_intermediate_size": 16,
    }
    sizes |= {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size_mlp": 32}
    if family == "gptj":
        del sizes["max_position_embeddings"]
    config = AutoConfig.for_model(family, **sizes | {"head_dim": 16})
    torch.manual_seed(0)
    make: Any = AutoModel
    with torch.no_grad():
        cache = make.from_config(config).eval()(torch.full((1, 40), 7), use_cache=True)[CACHE]
    rotating = 0
    for layer in range(1 if family == "gpt_oss" else 4):  # its attention sinks make later layers depend on the position
        rope, keys = Rope.from_config(config, layer=layer), cache.layers[layer].keys
        plain = keys if rope is None else rope.unrotate(keys, range(40))
        close(plain, plain[:, :, :1].expand_as(plain))
        rotating += rope is not None
    assert rotating


# -- reading configs -------------------------------------------------------------------------------------------------------

OLD = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 131072}


LINEAR, DYNAMIC = {"rope_type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize("scaling", [None, LINEAR, DYNAMIC, YARN, LLAMA3])
@pytest.mark.parametrize("as_dict", [True, False])
def test_old_and_new_style_configs_agree(scaling: dict[str, Any] | None, as_dict: bool) -> None:
    old = OLD | {"rope_theta": 5e5, "rope_scaling": scaling}
    new = tiny(LlamaConfig, rope_parameters={"rope_theta": 5e5, **(scaling or {"rope_type": "default"})})
    rope = Rope.from_config(old if as_dict else SimpleNamespace(**old))
    assert rope is not None
    assert rope == Rope.from_config(new) == Rope.from_config(new.to_dict()) == Rope.from_config({"text_config": old})


def test_two_thetas_of_gemma3() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    config = tiny(Gemma3TextConfig, num_hidden_layers=6, head_dim=32, rope_scaling=scaling)
    full, sliding = Rope(32, 1e6, scaling="linear", factor=8.0), Rope(32, 1e4)
    assert Rope.from_config(config, "full_attention") == Rope.from_config(config, layer=5) == full
    assert Rope.from_config(config, "sliding_attention") == Rope.from_config(config, layer=0) == sliding
    old = {
        "model_type": "gemma3_text", "head_dim": 32, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "rope_scaling": scaling,
    }
    assert Rope.from_config(old, "full_attention") == full
    assert Rope.from_config(old, "sliding_attention") == sliding
    for one in (config, old):
        with pytest.raises(ParameterError, match="layer_type: expected"):
            Rope.from_config(one)
        with pytest.raises(ParameterError, match="layer_type: expected"):
            Rope.from_config(one, "linear_attention")


def test_partial_rotary_of_a_plain_config_json() -> None:
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "rope_theta": 1e4}
    for model_type, share in {"stablelm": 8, "phi": 16, "glm": 16, "llama": 32}.items():
        rope = Rope.from_config(sizes | {"model_type": model_type})
        assert rope is not None and rope.rotary_dim == share
    assert Rope.from_config(sizes | {"model_type": "phi", "partial_rotary_factor": 0.25}) == Rope(32, rotary_dim=8)
    neox = {"model_type": "gpt_neox", "hidden_size": 128, "num_attention_heads": 4, "rotary_emb_base": 1e4, "rotary_pct": 0.5}
    assert Rope.from_config(neox) == Rope(32, rotary_dim=16)


def test_layers_without_rotation_give_none() -> None:
    cohere = tiny(Cohere2Config)
    assert Rope.from_config(cohere, "full_attention") is None
    exaone = tiny(Exaone4Config, sliding_window=128, sliding_window_pattern=2)
    assert Rope.from_config(exaone, "full_attention") is None
    assert Rope.from_config(exaone, "sliding_attention") is not None
    assert Rope.from_config({**exaone.to_dict(), "sliding_window": None}, "full_attention") is not None
    smol = tiny(SmolLM3Config, num_hidden_layers=4)
    assert [Rope.from_config(smol, layer=i) is None for i in range(4)] == [False, False, False, True]
    assert Rope.from_config(tiny(GraniteMoeHybridConfig)) is None
    assert Rope.from_config(OLD | {"model_type": "falcon", "alibi": True}) is None
    assert Rope.from_config(OLD | {"rope_parameters": {"full_attention": None, "other_attention": {}}}, "full_attention") is None
    for config in (cohere, exaone, smol):
        with pytest.raises(ParameterError, match="layer"):
            Rope.from_config(config)
    with pytest.raises(ParameterError, match="layer: expected a number below 4, got 4"):
        Rope.from_config(smol, layer=4)


def test_interleaved_can_be_said() -> None:
    config = OLD | {"rope_theta": 1e4, "model_type": "of_tomorrow"}
    assert Rope.from_config(config) == Rope(16)
    assert Rope.from_config(config, interleaved=True) == Rope(16, interleaved=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "proportional"}, "rope_theta": 1e4}, "'proportional'"),
        ({"rope_parameters": {"rope_type": "axial"}, "rope_theta": 1e4}, "'axial'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "alpha": 9.0}, "rope_theta": 1e4}, "'dynamic' with alpha"),
        ({"rope_parameters": {"mrope_section": [2, 3, 3]}, "rope_theta": 1e4}, "'default' with mrope_section"),
        ({"qk_rope_head_dim": 8, "rope_theta": 1e4, "model_type": "deepseek_v3"}, "latent attention .'deepseek_v3'."),
        ({"model_type": "gpt2"}, "has the model RoPE"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "expected rope_theta, got none"),
        ({"hidden_size": None, "rope_theta": 1e4}, "expected head_dim"),
        ({"layer_rope_theta": [1e4, 0], "rope_theta": 1e4}, "a rule of its own"),
        ({"model_type": "nanochat", "rope_theta": 1e4}, "'nanochat'"),
    ],
)
def test_configs_we_cannot_follow_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CompatibilityError, match=message):
        Rope.from_config(OLD | change)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "linear"}, "factor: expected a value, scaling 'linear' needs it"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor: expected a value"),
        ({"rope_type": "longrope", **PHI3_FACTORS, "short_factor": [1.0]}, "short_factor: expected 8 numbers"),
        ({"rope_type": "default", "partial_rotary_factor": 0.95}, "rotary_dim: expected an even number <= head_dim = 16, got 15"),
        ({"rope_type": "default", "partial_rotary_factor": 1.5}, "rotary_dim: expected an even number"),
    ],
)
def test_bad_parameters_of_a_config(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Rope.from_config(OLD | {"rope_theta": 1e4, "rope_parameters": parameters})


# -- plain data ------------------------------------------------------------------------------------------------------------


def test_defaults_are_filled_in_so_that_equal_means_alike() -> None:
    yarn = Rope(16, scaling="yarn", factor=16, original_max_position=4096)
    assert yarn == Rope(16, 1e4, 16, False, "yarn", 16.0, 4096, 0.1 * math.log(16) + 1, 32, 1, True)
    assert hash(yarn) == hash(replace(yarn)) and yarn != replace(yarn, beta_fast=16.0)
    assert Rope(np.int64(16), rotary_dim=16) == Rope(16)  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        yarn.theta = 1.0  # type: ignore[misc]
    yarn.rotation(range(3))
    assert pickle.loads(pickle.dumps(yarn)) == yarn


LONG = {"original_max_position": 9, "attention_factor": 1, "long_factor": [1] * 8}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rotary_dim": 7}, "rotary_dim: expected an even number <= head_dim = 16, got 7"),
        ({"rotary_dim": 18}, "rotary_dim: expected an even number <= head_dim = 16, got 18"),
        ({"head_dim": 15}, "rotary_dim: expected an even number <= head_dim = 15, got 15"),
        ({"head_dim": 0}, "head_dim: expected an integer of at least 2, got 0"),
        ({"head_dim": 16.0}, "head_dim: expected an integer"),
        ({"theta": 0.0}, "theta: expected a positive finite number, got 0.0"),
        ({"theta": math.nan}, "theta: expected a positive finite number, got nan"),
        ({"theta": "1e4"}, "theta: expected a positive finite number, got '1e4'"),
        ({"interleaved": 1}, "interleaved: expected a boolean, got 1"),
        ({"scaling": "ntk"}, "scaling: expected one of .*'yarn'.*, got 'ntk'"),
        ({"scaling": "linear"}, "factor: expected a value, scaling 'linear' needs it, got None"),
        ({"scaling": "linear", "factor": -1}, "factor: expected a positive finite number, got -1"),
        ({"scaling": "dynamic", "factor": 2}, "original_max_position: expected a value"),
        ({"scaling": "dynamic", "factor": 2, "original_max_position": 0}, "original_max_position: expected an integer"),
        ({"scaling": "dynamic", "factor": 0.5, "original_max_position": 9}, "factor: expected at least 1"),
        ({"scaling": "dynamic", "factor": 2, "original_max_position": 9, "rotary_dim": 2}, "rotary_dim: expected at least 4"),
        ({"scaling": "yarn", "factor": 2, "original_max_position": 9, "beta_slow": 50}, "beta_fast: expected at least beta_slow"),
        ({"scaling": "yarn", "factor": 2, "original_max_position": 9, "theta": 1}, "theta: expected more than 1"),
        ({"scaling": "yarn", "factor": 2, "original_max_position": 9, "truncate": 0}, "truncate: expected a boolean"),
        ({"scaling": "llama3", "factor": 2, "original_max_position": 9}, "low_freq_factor: expected a value"),
        (
            {"scaling": "llama3", "factor": 2, "original_max_position": 9, "low_freq_factor": 2, "high_freq_factor": 2},
            "high_freq_factor: expected more than low_freq_factor",
        ),
        ({"factor": 2.0}, "factor: expected None, scaling 'default' does not use it, got 2.0"),
        (
            {"scaling": "longrope", **LONG, "short_factor": [1] * 7},
            "short_factor: expected 8 numbers",
        ),
        (
            {"scaling": "longrope", **LONG, "short_factor": [0] * 8},
            "short_factor: expected a positive",
        ),
    ],
)
def test_wrong_parameters_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Rope(**{"head_dim": 16} | given)
    with pytest.raises(ParameterError, match=message):
        Rope.from_dict({"head_dim": 16} | given)


@pytest.mark.parametrize("data", [None, [], "rope", {}, {"theta": 1}, {"head_dim": 16, "base": 1}, {"head_dim": 16, "_memo": {}}])
def test_data_that_is_no_rope_is_refused(data: Any) -> None:
    with pytest.raises(FormatError, match="rope: expected"):
        Rope.from_dict(data)


# -- arguments of the operations -------------------------------------------------------------------------------------------


def test_rotation_of_every_kind_of_positions() -> None:
    rope = Rope(16)
    want = rope.rotation(torch.arange(5, 300))
    assert want.cos.dtype == want.sin.dtype == torch.float32 and want.cos.shape == want.sin.shape == (295, 8)
    close(want.cos**2 + want.sin**2, torch.ones(295, 8))
    for stop in (300, 20, 6, 5):
        given = range(5, stop)
        numbers = np.arange(5, stop)
        forms: list[Any] = [given, list(given), tuple(given), numbers, numbers.astype(np.uint16), torch.tensor(numbers)]
        for form in [*forms, torch.tensor(numbers).int()]:
            for _ in range(2):  # the second comes from what was kept
                rotation = rope.rotation(form)
                close(torch.cat([rotation.cos, want.cos]), torch.cat([want.cos[: stop - 5], want.cos]), 2e-7)
                close(torch.cat([rotation.sin, want.sin]), torch.cat([want.sin[: stop - 5], want.sin]), 2e-7)
    assert rope.rotation(range(2), device="meta").cos.device.type == "meta"


def test_what_is_kept_is_never_mistaken() -> None:
    rope = Rope(8, scaling="dynamic", factor=4.0, original_max_position=10)
    calls: list[tuple[Any, int]] = [
        (range(3, 5), 9), (range(3, 5), 20), (range(3, 5), 21), (range(3, 5), 20), (range(3, 4), 20), (range(4, 5), 20),
        (torch.tensor([3, 4]), 20), (torch.tensor([4, 3]), 20), (np.array([3]), 20), (range(3, 7, 2), 20), (range(3, 5), 10),
    ]
    for positions, length in calls:
        kept, fresh = rope.rotation(positions, length), replace(rope).rotation(positions, length)
        assert torch.equal(kept.cos, fresh.cos) and torch.equal(kept.sin, fresh.sin)
    changed = torch.tensor([1, 2])
    before = rope.rotation(changed, 5)
    changed[0] = 7
    assert not torch.equal(rope.rotation(changed, 5).cos, before.cos)
    assert rope.rotation(range(3), 5) is rope.rotation(range(3), 6)
    frequencies = rope.inv_freq()
    frequencies.zero_()
    assert not torch.equal(rope.inv_freq(), frequencies)


def test_precision_and_dtypes() -> None:
    rope = Rope(16, rotary_dim=8)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = tokens(2, 3, 5, 16).to(dtype)
        turned = rope.rotate(x, range(5))
        assert turned.dtype == dtype and torch.equal(turned[..., 8:], x[..., 8:])
        exact = rope.rotate(x, range(5), dtype=torch.float32)
        assert exact.dtype == torch.float32
        assert torch.equal(turned, exact.to(dtype)) and torch.equal(exact, rope.rotate(x.float(), range(5)))
    turns = tokens(1, 4, 16)[:, :, ::2]
    assert torch.equal(Rope(8).rotate(turns, range(4)), Rope(8).rotate(turns.contiguous(), range(4)))
    leaf = tokens(3, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(rope.unrotate(leaf, range(3)).square().sum(), leaf)
    close(gradient, 2 * leaf.detach())
    with torch.inference_mode():
        kept = Rope(16)
        kept.rotation(range(3))
    torch.autograd.grad(kept.unrotate(leaf, range(3)).sum(), leaf)


def test_wrong_arguments_are_refused_by_name() -> None:
    rope, x = Rope(16), tokens(2, 3, 5, 16)
    for positions in (np.arange(5.0), torch.arange(5.0), [0.5] * 5, torch.ones(5, dtype=torch.bool), "01234", None):
        with pytest.raises(DTypeError, match="positions: expected"):
            rope.rotation(positions)  # type: ignore[arg-type]
        with pytest.raises(DTypeError, match="positions: expected"):
            rope.rotate(x, positions)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"positions: expected shape .n,., got .1, 5."):
        rope.rotation(torch.zeros(1, 5, dtype=torch.int64))
    for shape in ((4,), (), (3, 5), (1, 1, 5), (2, 4)):
        with pytest.raises(ShapeError, match="positions: expected shape"):
            rope.unrotate(x, torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ShapeError, match="positions: expected shape"):
        rope.rotate(x[0, 0], torch.zeros(1, 5, dtype=torch.int64))
    for wrong in (x[..., :8], x[0, 0, 0]):
        with pytest.raises(ShapeError, match="x: expected shape"):
            rope.rotate(wrong, range(5))
    for other in (x.long(), x.numpy()):
        with pytest.raises(DTypeError, match="x: expected a torch tensor of a float dtype"):
            rope.rotate(other, range(5))  # type: ignore[arg-type]
    grows = Rope(16, scaling="dynamic", factor=4.0, original_max_position=10)
    for call in (grows.rotation, lambda p: grows.rotate(x, p), lambda p: grows.unrotate(x, p)):
        with pytest.raises(ParameterError, match="seq_len: expected the sequence length"):
            call(range(5))
    for length in (-1, 2.5, True):
        with pytest.raises(ParameterError, match="seq_len: expected an integer"):
            grows.rotation(range(5), length)  # type: ignore[arg-type]


# -- the algebra -----------------------------------------------------------------------------------------------------------

SCALINGS = ["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
several = settings(max_examples=60, deadline=None, database=None)


@st.composite
def ropes(draw: st.DrawFn) -> Rope:
    half = draw(st.integers(2, 8))
    given: dict[str, Any] = {
        "head_dim": 2 * half + draw(st.integers(0, 5)), "rotary_dim": 2 * half, "interleaved": draw(st.booleans()),
        "theta": draw(st.floats(2.0, 1e7)), "scaling": draw(st.sampled_from(SCALINGS)),
    }
    factor, original = draw(st.floats(1.0, 64.0)), draw(st.integers(2, 5000))
    magnitude = st.floats(0.5, 2.0)
    if given["scaling"] not in ("default", "longrope"):
        given["factor"] = factor
    if given["scaling"] not in ("default", "linear"):
        given["original_max_position"] = original
    if given["scaling"] == "yarn":
        given |= draw(st.fixed_dictionaries({}, optional={"attention_factor": magnitude, "truncate": st.booleans()}))
    if given["scaling"] == "llama3":
        given |= {"low_freq_factor": draw(st.floats(0.5, 2.0)), "high_freq_factor": draw(st.floats(2.5, 8.0))}
    if given["scaling"] == "longrope":
        factors = st.lists(st.floats(1.0, 64.0), min_size=half, max_size=half)
        given |= {"short_factor": draw(factors), "long_factor": draw(factors), "attention_factor": draw(magnitude)}
    return Rope(**given)


positions_up_to = st.lists(st.integers(0, 200_000), min_size=1, max_size=6)


@several
@given(ropes(), positions_up_to, st.integers(0, 2**31))
def test_unrotate_undoes_rotate(rope: Rope, positions: list[int], seed: int) -> None:
    x, length = tokens(2, len(positions), rope.head_dim, seed=seed), max(positions) + 1
    turned = rope.rotate(x, positions, length)
    close(rope.unrotate(turned, positions, length), x, 2e-6)
    close(rope.rotate(rope.unrotate(x, positions, length), positions, length), x, 2e-6)
    close(undone(turned, rope.rotation(positions, length)), x, 2e-6)


@several
@given(ropes(), positions_up_to, st.integers(0, 2**31))
def test_rotation_is_an_isometry_up_to_its_scale(rope: Rope, positions: list[int], seed: int) -> None:
    x, r = tokens(len(positions), rope.head_dim, seed=seed), rope.rotary_dim
    turned = rope.rotate(x, positions, max(positions) + 1)
    close(turned[:, :r].norm(dim=-1), x[:, :r].norm(dim=-1) * rope.attention_scale, 2e-6)
    assert torch.equal(turned[:, r:], x[:, r:])


@several
@given(ropes(), st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2**31))
def test_dot_products_depend_on_the_distance_alone(rope: Rope, first: int, second: int, shift: int, seed: int) -> None:
    q, k = tokens(2, 1, rope.head_dim, seed=seed)
    length = 4001
    near = rope.rotate(q, [first], length) @ rope.rotate(k, [second], length).T
    far = rope.rotate(q, [first + shift], length) @ rope.rotate(k, [second + shift], length).T
    bound = float(q.norm() * k.norm()) * max(1.0, rope.attention_scale) ** 2
    assert abs(float(near - far)) <= 2e-3 * bound  # half a unit in the last place of an angle of 4000 is 1.2e-4


@several
@given(ropes())
def test_json_round_trip(rope: Rope) -> None:
    again = Rope.from_dict(json.loads(json.dumps(rope.to_dict())))
    assert again == rope and hash(again) == hash(rope) and again.to_dict() == rope.to_dict()
    assert torch.equal(again.inv_freq(9000), rope.inv_freq(9000))


@several
@given(ropes(), st.integers(1, 10_000))
def test_frequencies_are_finite_and_fall_within_bounds(rope: Rope, length: int) -> None:
    frequencies = rope.inv_freq(length)
    assert frequencies.shape == (rope.rotary_dim // 2,) and frequencies.dtype == torch.float32
    assert bool(torch.isfinite(frequencies).all()) and bool((frequencies > 0).all()) and float(frequencies.max()) <= 1.0


@pytest.mark.parametrize("scaling", ["dynamic", "longrope", "linear"])
def test_a_length_for_each_position(scaling: str) -> None:
    """The same bits as for each position by itself."""
    ropes = {
        "dynamic": Rope(16, scaling="dynamic", factor=4.0, original_max_position=10),
        "longrope": Rope(
            16, scaling="longrope", original_max_position=10, attention_factor=1.1, short_factor=(1.0,) * 8,
            long_factor=(3.0,) * 8,
        ),
        "linear": Rope(16, scaling="linear", factor=2.0),
    }
    rope, lengths = ropes[scaling], [5, 5, 12, 30, 12, 0]
    positions, x = list(range(20, 26)), torch.randn(2, 6, 16)
    found, turned = rope.rotation(positions, lengths), rope.rotate(x, positions, lengths)
    for j, (position, length) in enumerate(zip(positions, lengths, strict=True)):
        alone = rope.rotation([position], length)
        torch.testing.assert_close(found.cos[j], alone.cos[0], atol=1e-6, rtol=0)
        assert torch.equal(turned[:, j : j + 1], rope.rotate(x[:, j : j + 1], [position], length))
    assert [rope.effective_length(n) for n in (0, 10, 11, 30)] == {"dynamic": [0, 0, 11, 30], "longrope": [0, 0, 11, 11]}.get(
        scaling, [0, 0, 0, 0]
    )
    torch.testing.assert_close(rope.unrotate(turned, positions, np.array(lengths)), x, atol=1e-5, rtol=1e-5)
    with pytest.raises(ShapeError, match="seq_len"):
        rope.rotation(positions, [5, 6])
    if rope.is_dynamic:
        with pytest.raises(ParameterError, match="seq_len"):
            rope.rotation(positions, 1.5)  # type: ignore[arg-type]
