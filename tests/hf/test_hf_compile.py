"""torch.compile of a model with an index attached: one graph, and none more for another cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf_models import CACHE, attached, greedy, left_padded, prompt, sealed_tokens, tiny
from torch._dynamo.utils import counters

import saap_index as saap

PADDED = left_padded(prompt(2), [0, 20])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_a_whole_model_is_one_graph(case: str) -> None:
    small = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]} if case == "gemma3" else {}
    model = tiny(case, **{"num_hidden_layers": 1, **small})
    want = greedy(model, PADDED, 12)
    attached(model)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    cache = saap.SaapCache(model)
    assert torch.equal(greedy(model, PADDED, 12, **{CACHE: cache}), want)
    assert cache.get_seq_length() == 111 and min(sealed_tokens(cache)) > 100
    graphs = counters["stats"]["unique_graphs"]
    assert torch.equal(greedy(model, PADDED, 12, **{CACHE: saap.SaapCache(model)}), want)
    assert counters["stats"]["unique_graphs"] == graphs, "what was compiled for one cache serves another"
    if case == "gemma3":
        return  # windows forget what a crop would need
    again = copy.deepcopy(cache)
    again.crop(-8)
    held = torch.cat([PADDED["input_ids"], want[:, :3]], 1)
    mask = torch.cat([PADDED["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
    inputs = {"input_ids": torch.cat([held, want[:, 3:4]], 1), "attention_mask": mask}
    assert torch.equal(greedy(model, inputs, 8, **{CACHE: again}), want[:, 4:])
    assert cache.get_seq_length() == 111, "a copy is a cache of its own"


def test_the_cache_that_generate_makes() -> None:
    """Its first call becomes ours outside the graph; assisted decoding and beams on top."""
    model = tiny("llama", num_hidden_layers=1)
    inputs = prompt(1, 50).repeat(1, 2)
    options: list[dict[str, Any]] = [{}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}]
    want = [greedy(model, inputs, 8, **given) for given in options]
    attached(model)
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    for given, expected in zip(options, want, strict=True):
        assert torch.equal(greedy(model, inputs, 8, **given), expected)


def test_a_cache_that_is_gone() -> None:
    from saap_index.hf import traced

    x = torch.zeros(1, 2, 1, 16)
    with pytest.raises(saap.StateError, match="one that is gone"):
        torch.ops.saap_index.attend_layer(torch.tensor(10**9), x, x, x, None, None, 1.0, 1)
    assert traced.pop_layer() is None
