"""Models whose layers lie on several devices, as accelerate places them: here the CPU and the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import attached, greedy, left_padded, prompt, sealed_tokens, tiny
from transformers import AutoModelForCausalLM

import saap_index as saap

pytest.importorskip("accelerate")


@pytest.mark.filterwarnings("ignore")
def test_layers_on_the_disk(tmp_path: Path) -> None:
    model = tiny("llama")
    inputs = left_padded(prompt(2), [0, 30])
    want = greedy(model, inputs)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(3)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
    model.generation_config.eos_token_id = 10**6
    attached(model)
    cache = saap.SaapCache(model)
    assert torch.equal(greedy(model, inputs, past_key_values=cache), want)
    assert min(sealed_tokens(cache)) > 100
    cache.save(tmp_path / "prompt")
    assert saap.SaapCache.load(tmp_path / "prompt", model).get_seq_length() == cache.get_seq_length()
    assert torch.equal(greedy(saap.detach(model), inputs), want)
