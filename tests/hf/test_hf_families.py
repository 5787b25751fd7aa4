"""Every decoder of the installed transformers that a small config makes: served, or refused by name when routers are attached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hf_models import SMALL, make_routers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import saap_index as saap
from saap_index.routers import model_shape

SHAPE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "pad_token_id": 0, "eos_token_id": None,
    "bos_token_id": 1, "num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "n_routed_experts": 2,
    "moe_intermediate_size": 32, "initializer_range": 0.2,
}
MOST_PARAMETERS = 5_000_000
GROUPED = ("num_key_value_heads", "head_dim")
SERVED = {"llama", "qwen2", "qwen3", "mixtral", "phi3", "persimmon", "gemma", "olmo2"}
REFUSED = {"diffllama", "doge", "minimax", "gpt_neox"}
NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def made(name: str) -> Any:
    """A model of two layers in evaluation mode; None where this shape makes none, or none that runs."""
    shape = {key: value for key, value in SHAPE.items() if name != "persimmon" or key not in GROUPED}
    try:
        config = CONFIG_MAPPING[name](**shape)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            return None
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    except Exception:  # of transformers: a config of another kind
        return None
    model.generation_config.eos_token_id = 10**6
    return model


def generated(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 100, (1, 70), generator=torch.Generator().manual_seed(1))
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(8))
def test_served_or_refused(part: int) -> None:
    """Parts, so that processes share them."""
    transformers.logging.set_verbosity_error()
    ends: dict[str, str] = {}
    for name in NAMES[part::8]:
        model = made(name)
        if model is None:
            continue
        try:
            saap.attach(model, make_routers(model), 1.0, **SMALL)
        except saap.SaapError as error:
            ends[name] = f"refused: {error}"
            continue
        sparse = generated(model)
        assert torch.equal(generated(saap.detach(model)), sparse), name
        ends[name] = "served"
    assert len(ends) > len(NAMES[part::8]) // 3
    assert {name for name in SERVED & set(NAMES[part::8]) if ends.get(name) != "served"} == set(), ends
    assert {name for name in REFUSED & ends.keys() if not ends[name].startswith("refused")} == set(), ends


def test_fuyu() -> None:
    text = {key: value for key, value in SHAPE.items() if key not in GROUPED}
    model = transformers.FuyuForCausalLM(transformers.FuyuConfig(text_config={**text, "model_type": "persimmon"})).eval()
    model.generation_config.eos_token_id = 10**6
    want = generated(model)
    assert torch.equal(generated(saap.attach(model, make_routers(model), 1.0, **SMALL)), want)


def test_layers_of_several_shapes() -> None:
    """Gemma 4 has heads of other dims in its global layers, and its config refuses to name one."""
    if not hasattr(transformers, "Gemma4TextConfig"):
        return
    config = transformers.Gemma4TextConfig(**SHAPE, hidden_size_per_layer_input=0, num_kv_shared_layers=0)
    model = transformers.Gemma4ForCausalLM(config).eval()
    with pytest.raises(saap.CompatibilityError):
        saap.attach(model, make_routers_of_llama())
    with pytest.raises(saap.CompatibilityError, match="of one shape"):
        model_shape(config)


def make_routers_of_llama() -> saap.Routers:
    return make_routers(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)))
