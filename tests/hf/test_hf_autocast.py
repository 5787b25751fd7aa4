"""torch.autocast over float32 weights: keys and values come in different dtypes, and are kept in that of autocast."""

from __future__ import annotations

import pytest
import torch
from hf_models import CACHE, attached, left_padded, prompt, tiny
from transformers import DynamicCache

import saap_index as saap


@torch.no_grad()
@pytest.mark.parametrize("padding", [[0, 0], [0, 30]])
@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_as_the_model_alone(case: str, padding: list[int]) -> None:
    model, inputs = tiny(case), left_padded(prompt(2, 112), padding)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    steps, found = (slice(0, 100), slice(100, 101), slice(101, 104), slice(104, 112)), []
    for caches in ("dense", "indexed"):
        if caches == "indexed":
            attached(model)
        cache = DynamicCache(config=model.config) if caches == "dense" else saap.SaapCache(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for step in steps:
                positions = (mask[:, : step.stop].cumsum(1) - 1).clamp(min=0)[:, step]
                given = {"attention_mask": mask[:, : step.stop], "position_ids": positions}
                found.append(model(ids[:, step], **{CACHE: cache}, **given).logits.float())
    real = mask.bool()
    for step, want, got in zip(steps, found[:4], found[4:], strict=True):
        error = (got - want)[real[:, step]].norm() / want[real[:, step]].norm()
        assert float(error) < 0.1, "bfloat16 rounds a little differently in another order"
    index = cache.layers[1].index
    assert index.dtype == torch.bfloat16 and index.stats().sealed_tokens > 100


@torch.no_grad()
def test_a_cache_keeps_its_dtype() -> None:
    model = attached(tiny("llama"))
    cache = saap.SaapCache(model)
    model(prompt(1, 100), **{CACHE: cache})
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(saap.CompatibilityError, match="float32, as this cache"):
        model(prompt(1, 1), **{CACHE: cache})
    model(prompt(1, 1), **{CACHE: cache})
    assert cache.get_seq_length() == 101
