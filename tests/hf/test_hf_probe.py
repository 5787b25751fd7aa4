"""What a model really does in its first layers is tried before routers are attached or trained: rotation, masks, calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hf_models import CASES, DYNAMIC, SHAPE, SMALL, attached, greedy, make_routers, prompt, tiny
from torch import Tensor
from transformers.models.llama import modeling_llama

import saap_index as saap
from saap_index.hf import support
from saap_index.hf.probe import check_rotation

half_split = modeling_llama.apply_rotary_pos_emb


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    def apart(x: Tensor) -> Tensor:
        return torch.cat([x[..., ::2], x[..., 1::2]], -1)

    def together(x: Tensor) -> Tensor:
        return torch.stack(x.chunk(2, -1), -1).flatten(-2)

    q, k = half_split(apart(q), apart(k), cos, sin, unsqueeze_dim)
    return together(q), together(k)


def backwards(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    return half_split(q, k, cos, -sin, unsqueeze_dim)


def not_at_all(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    return q, k


def trailing_dims(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    r = q.shape[-1] // 2
    turned = half_split(q[..., r:], k[..., r:], cos[..., :r], sin[..., :r], unsqueeze_dim)
    return tuple(torch.cat([x[..., :r], y], -1) for x, y in zip((q, k), turned, strict=True))  # type: ignore[return-value]


def scaled_after(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    q, k = half_split(q, k, cos, sin, unsqueeze_dim)
    return q, k * torch.linspace(0.5, 2, k.shape[-1])


@pytest.mark.parametrize("rotate", [interleaved, backwards, not_at_all, trailing_dims, scaled_after])
def test_code_that_rotates_otherwise_than_its_config_says(rotate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    routers = make_routers(model)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)
    with pytest.raises(saap.CompatibilityError, match=r"model: expected the rotation of its config.* in layer 0 of LlamaModel"):
        saap.attach(model, routers)
    assert not hasattr(model, "_saap_attached") and model.config._attn_implementation == "sdpa"
    unrotated = {n: replace(layer, rope=None) for n, layer in routers.layers.items()}
    saap.attach(model, saap.Routers(routers.config, unrotated))  # routers that undo nothing do not mind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_families_that_are_known_pass(case: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        model = tiny(case, seed).to(dtype)
        saap.detach(attached(model))


def test_layers_that_do_not_rotate() -> None:
    config = {"no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 2}
    saap.detach(attached(tiny("SmolLM3", **config)))
    model = tiny("llama")
    with pytest.raises(saap.CompatibilityError, match="expected no rotation, in layer 1"):
        check_rotation(model.model, {0: saap.Rope.from_config(model.config), 1: None})


def test_the_model_is_left_as_it_was() -> None:
    """Also what it remembers of the longest text, and which of its modules are being trained."""
    model = tiny("Llama", rope_parameters=DYNAMIC, max_position_embeddings=64)
    routers = make_routers(model)
    with torch.no_grad():
        model(prompt(1, 300))
        model.model.layers[1].train()
        rotary = model.model.rotary_emb
        before = int(rotary.max_seq_len_cached), rotary.inv_freq.clone()
        modes = [module.training for module in model.modules()]
        saap.detach(saap.attach(model, routers))
        assert int(rotary.max_seq_len_cached) == before[0] == 300 and torch.equal(rotary.inv_freq, before[1])
    assert modes == [module.training for module in model.modules()]
    assert model.config._attn_implementation == "sdpa" and not model.model.layers[0].self_attn._forward_hooks


@pytest.mark.parametrize(
    ("family", "match"),
    [("DiffLlama", "once, got 2 calls"), ("Doge", "mask of its own"), ("MiniMax", "hybrid"), ("Lfm2", "hybrid|self_attn")],
)
def test_attention_of_other_kinds_is_refused_when_attaching(family: str, match: str) -> None:
    config = getattr(transformers, f"{family}Config")
    more = {"Lfm2": {"layer_types": ["conv", "full_attention", "conv"]}}.get(family, {})
    model = getattr(transformers, f"{family}ForCausalLM")(config(**{**SHAPE, **more})).eval()
    with pytest.raises(saap.CompatibilityError, match=match):
        saap.attach(model, make_routers(model))


def test_a_family_without_groups_of_heads() -> None:
    shape = {name: value for name, value in SHAPE.items() if name not in ("num_key_value_heads", "head_dim")}
    model = transformers.PersimmonForCausalLM(transformers.PersimmonConfig(**shape)).eval()
    want = greedy(model, prompt(1, 100), eos_token_id=10**6)
    saap.attach(model, make_routers(model), 1.0, **SMALL)
    assert torch.equal(greedy(model, prompt(1, 100), eos_token_id=10**6), want)


def test_a_first_layer_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    routers = make_routers(model)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AttributeError("no such thing")

    monkeypatch.setattr(model.model.layers[0], "forward", fail)
    with pytest.raises(saap.CompatibilityError, match="AttributeError: no such thing"):
        saap.attach(model, routers)
    assert support.decoder_of(model).config._attn_implementation == "sdpa"
