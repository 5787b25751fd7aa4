"""Models whose layers lie on several devices, as accelerate places them: here the CPU and the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_places import PLACES, Place
from hf_models import CACHE, attached, greedy, left_padded, prompt, sealed_tokens, tiny
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
    assert torch.equal(greedy(model, inputs, **{CACHE: cache}), want)
    assert min(sealed_tokens(cache)) > 100
    cache.save(tmp_path / "prompt")
    assert saap.SaapCache.load(tmp_path / "prompt", model).get_seq_length() == cache.get_seq_length()
    assert torch.equal(greedy(saap.detach(model), inputs), want)


@pytest.mark.parametrize("name", PLACES)
def test_on_the_cuda_backend(name: str) -> None:
    """Greedy, beams with padding, and assisted decoding with its crops, on the kernels for CUDA."""
    place = Place(name)
    options = {} if place.real else {"backend": "cuda-emu"}
    model = tiny("llama", head_dim=64, num_hidden_layers=1).to(place.device)
    twice = prompt(1, 50).repeat(1, 2)
    uses: list[tuple[Any, dict[str, Any]]] = [
        (prompt(2), {}), (left_padded(prompt(2), [0, 30]), {"num_beams": 2}), (twice, {"prompt_lookup_num_tokens": 3}),
    ]
    for given, how in uses:
        inputs = given if isinstance(given, dict) else {"input_ids": given, "attention_mask": torch.ones_like(given)}
        inputs = {name: x.to(place.device) for name, x in inputs.items()}
        want = greedy(model, inputs, 8, **how)
        attached(model, **options)
        cache = saap.SaapCache(model)
        assert torch.equal(greedy(model, inputs, 8, **{CACHE: cache}, **how), want)
        assert min(sealed_tokens(cache)) > 80 and "cuda" in repr(cache.layers[0].index)
        saap.detach(model)
