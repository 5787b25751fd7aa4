"""A cache reaches its index under whatever name it comes, or attention is refused: never dense without a word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hf_models import CACHE, attached, greedy, prompt, tiny
from transformers import DynamicCache

import saap_index as saap
from saap_index.hf import support

IDS = prompt(1, 120)
STEP = IDS[:, :1]
NAMES = support.CACHE_NAMES[support.CACHE_NAMES.index(CACHE) :]
"""What this version of transformers takes: its own name, and those of older ones."""


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generate_decodes_through_its_index(family: str) -> None:
    """What a rename in transformers breaks first: the kind of the cache that comes back, and what it read."""
    model = attached(tiny(family), 0.05)
    out = model.generate(IDS, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert type(out[CACHE]) is saap.SaapCache and out[CACHE].tokens_read() < 0.5


@pytest.mark.parametrize("name", [*NAMES, "by its place"])
@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_a_decoder_may_be_called_with_each_name(name: str) -> None:
    model = attached(tiny("llama"), 0.05)
    cache = DynamicCache(config=model.config)
    for ids in (IDS, STEP):
        with torch.no_grad():
            model.model(ids, None, None, cache) if name == "by its place" else model.model(ids, **{name: cache})
    assert [layer.index.ntotal for layer in cache.layers] == [121] * 3
    assert all(layer.last_search().sealed_tokens > 0 for layer in cache.layers)


def test_a_name_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a transformers to come: a cache is known by what it is, and a decoder that seems to take none is not attached to."""
    model = attached(tiny("llama"), 0.05)
    monkeypatch.setattr(support, "CACHE_NAMES", ("state",))
    out = model.generate(IDS, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert type(out[CACHE]) is saap.SaapCache and out[CACHE].tokens_read() < 0.5
    with pytest.raises(saap.CompatibilityError, match=f"{transformers.__version__}.*{CACHE}"):
        attached(tiny("llama"))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_keys_of_another_cache(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever way a cache takes past the hook: the first step that would attend densely to what it holds is refused."""
    model = attached(tiny(family))
    decoder = model.get_decoder()
    monkeypatch.setattr(decoder, "_forward_pre_hooks", type(decoder._forward_pre_hooks)())
    with pytest.raises(saap.StateError, match=f"121 keys of another for 1 queries.*{transformers.__version__}"):
        greedy(model, IDS)


def test_a_forward_that_brings_no_cache() -> None:
    """Scoring and training stay dense; who asks for a cache gets an index, and one that the decoder made is taken over."""
    model = tiny("llama")
    with torch.no_grad():
        want = model(IDS).logits
        attached(model)
        assert torch.equal(model(IDS, use_cache=False).logits, want)
        for given in ({}, {"use_cache": True}, {"use_cache": True, CACHE: None}):
            out = model(IDS, **given)
            assert torch.equal(out.logits, want) and (type(out[CACHE]) is saap.SaapCache) == bool(given)
            cache: Any = out[CACHE]
            model(STEP, **{CACHE: cache})
            assert [layer.index.ntotal for layer in cache.layers] == [121] * 3
        assert type(model.model(IDS, None, None, None, use_cache=True)[CACHE]) is saap.SaapCache
