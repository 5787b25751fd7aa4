"""What cannot be served is refused by a named error, before a token is generated, and leaves the model as it was."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hf_models import CACHE, MIXED, SMALL, attached, greedy, left_padded, make_routers, prompt, tiny
from transformers import DynamicCache, StaticCache

import saap_index as saap
from saap_index.hf import support

NONE = saap.Routers({"layout": {"sinks": 4, "window": 128}}, {})


def refused(model: Any, error: type[Exception], match: str, routers: Any = None, **options: Any) -> None:
    before = getattr(model, "config", None) and model.config._attn_implementation
    with pytest.raises(error, match=match):
        saap.attach(model, make_routers(model) if routers is None else routers, **options)
    assert not hasattr(model, "_saap_attached")
    assert (getattr(model, "config", None) and model.config._attn_implementation) == before


def test_attention_that_is_not_a_plain_softmax() -> None:
    refused(tiny("Gemma2", **MIXED, query_pre_attn_scalar=16), saap.CompatibilityError, "attn_logit_softcapping=50.0 in layer 0")
    sinks = transformers.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
    )
    refused(transformers.GptOssForCausalLM(sinks), saap.CompatibilityError, "attention sinks in layer 0")


def test_gemma2_without_its_cap_is_served() -> None:
    model = tiny("Gemma2", **MIXED, query_pre_attn_scalar=16, attn_logit_softcapping=None)
    want = greedy(model, prompt(2))
    assert torch.equal(greedy(attached(model), prompt(2)), want)


def test_models_without_anything_to_index() -> None:
    refused(tiny("Mistral", sliding_window=32), saap.CompatibilityError, r"layers \[\] with such attention")
    refused(tiny("llama"), saap.CompatibilityError, "dense_layers", dense_layers=[0, 1, 2])
    refused(tiny("llama"), saap.CompatibilityError, r"routers for \[\]", routers=make_routers(tiny("llama"), layers=[]))


def test_other_kinds_of_models() -> None:
    config = transformers.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, vocab_size=64)
    t5 = transformers.T5ForConditionalGeneration(config)
    refused(t5, saap.CompatibilityError, "encoder-decoder", routers=NONE)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=64))
    refused(gpt2, saap.CompatibilityError, "decoder layers", routers=NONE)
    refused(torch.nn.Linear(2, 2), saap.ParameterError, "PreTrainedModel", routers=NONE)
    wrapped = torch.compile(tiny("llama"), backend="eager")
    refused(wrapped, saap.ParameterError, r"OptimizedModule; attach to what it wraps, model\._orig_mod", routers=NONE)
    peft = SimpleNamespace(get_base_model=lambda: None, config=None)
    refused(peft, saap.ParameterError, r"attach to what it wraps, model\.get_base_model\(\)", routers=NONE)
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64))
    refused(mamba, saap.CompatibilityError, "decoder layers", routers=NONE)


def test_routers_of_another_model() -> None:
    model, error = tiny("llama"), saap.CompatibilityError
    refused(model, error, "num_key_value_heads = 4, got 2", make_routers(tiny("llama", num_key_value_heads=4)))
    refused(model, error, "head_dim = 32, got 16", make_routers(tiny("llama", head_dim=32)))
    refused(model, error, "model_type = 'qwen3', got 'llama'", make_routers(tiny("qwen3")))
    refused(model, error, "expected layer 0 with", make_routers(tiny("llama_yarn")))
    refused(model, saap.ParameterError, "routers: expected a folder made by saap train, or a name", "path/to/routers")
    refused(model, saap.ParameterError, "load_routers", 3)
    mixed, other = make_routers(model), make_routers(tiny("llama", num_key_value_heads=4)).layers[1]
    mixed.layers[1] = replace(mixed.layers[1], query_router=make_routers(model, nlist=4).layers[1].query_router)
    refused(model, error, "nlist = 8", mixed)
    mixed.layers[1] = replace(mixed.layers[1], key_quantizer=other.key_quantizer)
    refused(model, error, "2 KV heads and 16 dims in layer 1, got 4", mixed)


def test_rotations_that_are_not_known() -> None:
    model = tiny("llama")
    model.config.rope_parameters["rope_type"] = "spiral"
    refused(model, saap.CompatibilityError, "spiral")


def test_options() -> None:
    model = tiny("llama")
    refused(model, saap.ParameterError, "selectivity", selectivity=1.5)
    refused(model, saap.ParameterError, "nprobe", nprobe=0)
    refused(model, saap.ParameterError, "options: expected some of .*window.*, got d_v, warp$", warp=9, d_v=32)
    with pytest.raises(saap.ParameterError, match=r"options: .* got audit_every$"):
        saap.SaapCache(model, make_routers(model), audit_every=3)
    refused(model, saap.ParameterError, "dense_layers: .* 3 layers, got 3", dense_layers=[3])
    refused(model, saap.ParameterError, "max_sparse_tokens", max_sparse_tokens=0)


def test_heads_that_the_kernels_do_not_take() -> None:
    refused(tiny("llama", head_dim=12), saap.CompatibilityError, "layer 0: .* multiple of 8 up to 256, got 12")


def test_attach_and_detach_twice() -> None:
    model = attached(tiny("llama"))
    with pytest.raises(saap.StateError, match="detach first"):
        attached(model)
    saap.detach(model)
    with pytest.raises(saap.StateError, match="attach was called"):
        saap.detach(model)


def test_detach_leaves_nothing() -> None:
    model = tiny("gemma3", attn_implementation="eager")

    def hooks_and_attributes() -> dict[str, Any]:
        return {name: (len(m._forward_pre_hooks), len(m._forward_hooks), sorted(vars(m))) for name, m in model.named_modules()}

    before = hooks_and_attributes()
    config = model.config.to_dict()
    want = greedy(model, prompt())
    saap.detach(attached(model))
    assert before == hooks_and_attributes()
    assert model.config._attn_implementation == "eager" and model.config.to_dict() == config
    assert torch.equal(greedy(model, prompt()), want)


@pytest.mark.parametrize("implementation", ["static", "quantized", "offloaded"])
@pytest.mark.filterwarnings("ignore")
def test_other_caches(implementation: str) -> None:
    model = attached(tiny("llama"))
    error: Any = saap.CompatibilityError
    if implementation == "quantized":  # transformers asks for packages of its own first
        error = (saap.CompatibilityError, ImportError, ValueError)
    if implementation == "offloaded":  # which needs a stream: a torch for CUDA without a GPU has none
        error = (saap.CompatibilityError, RuntimeError)
    with pytest.raises(error, match=r"^cache: |quanto|new Stream|CUDA driver"):
        greedy(model, prompt(), cache_implementation=implementation)


def test_caches_of_other_models_and_routers() -> None:
    model = attached(tiny("llama"))
    with pytest.raises(saap.CompatibilityError, match="StaticCache"):
        greedy(model, prompt(), **{CACHE: StaticCache(config=model.config, max_cache_len=200)})
    other = saap.SaapCache(attached(tiny("llama")))
    with pytest.raises(saap.CompatibilityError, match="this model and these routers"):
        greedy(model, prompt(), **{CACHE: other})
    with torch.no_grad():
        view = DynamicCache(config=model.config)
        other_model = attached(tiny("llama"))
        other_model(prompt(), **{CACHE: view})
        with pytest.raises(saap.CompatibilityError, match="this model and these routers"):
            model(prompt(), **{CACHE: view})


def test_a_cache_without_its_attention_function() -> None:
    model = tiny("llama")
    with pytest.raises(saap.StateError, match="routers"):
        saap.SaapCache(model)
    with pytest.raises(saap.StateError, match="attn_implementation='saap'"):
        saap.SaapCache(model, make_routers(model), **SMALL)
    attached(model)
    with pytest.raises(saap.StateError, match="expected none for a model"):
        saap.SaapCache(model, make_routers(model))
    with pytest.raises(saap.ParameterError, match="attached model"):
        saap.SaapCache(model, selectivity=0.5)
    cache = saap.SaapCache(model)
    saap.detach(model)
    with torch.no_grad():
        model(prompt(), **{CACHE: cache})
        with pytest.raises(saap.StateError, match="attention function 'saap'"):
            model(prompt(1, 1), **{CACHE: cache})


def test_gradients() -> None:
    model = attached(tiny("llama"))
    with pytest.raises(saap.StateError, match="no_grad"):
        model(prompt(), **{CACHE: saap.SaapCache(model)})
    loss = model(prompt(), labels=prompt()).loss
    loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad is not None, "without a cache a model trains as ever"


def test_training_mode() -> None:
    model = attached(tiny("llama", attention_dropout=0.1)).train()
    with torch.no_grad(), pytest.raises(saap.StateError, match=r"model.eval\(\)"):
        model(prompt(), **{CACHE: saap.SaapCache(model)})


def test_masks_and_positions_of_another_kind() -> None:
    model, ids = attached(tiny("llama")), prompt(2, 90)

    def cache() -> saap.SaapCache:
        made = saap.SaapCache(model)
        with torch.no_grad():
            model(ids, **{CACHE: made}, attention_mask=mask)
        return made

    def refuses(
        match: str, made: Any, error: type[Exception] = saap.CompatibilityError, tokens: Any = ids[:, :1], **given: Any
    ) -> None:
        with torch.no_grad(), pytest.raises(error, match=match):
            model(tokens, **{CACHE: made}, **given)

    mask = torch.ones_like(ids)
    refuses("bool", saap.SaapCache(model), tokens=ids, attention_mask=torch.zeros(2, 1, 90, 90))
    refuses("position_ids", saap.SaapCache(model), tokens=ids, position_ids=torch.arange(5, 95)[None])
    tree = torch.ones(2, 1, 4, 94, dtype=torch.bool)
    refuses("causal attention among the new tokens", cache(), tokens=ids[:, :4], attention_mask=tree)
    mask = left_padded(ids, [0, 20])["attention_mask"]
    one = torch.ones(2, 1, dtype=torch.long)
    made = cache()
    refuses("mask of the whole batch", made, saap.StateError)
    refuses("hides or shows", cache(), attention_mask=torch.cat([left_padded(ids, [0, 10])["attention_mask"], one], 1))
    with torch.no_grad():
        model(ids[:, :1], **{CACHE: cache()}, attention_mask=torch.cat([mask, one], 1))


@pytest.mark.parametrize("length", [100, 90])
def test_a_prompt_that_is_wholly_cached(length: int) -> None:
    """transformers reads it once more, behind itself; refused here, saying what to do, which gives what no cache gives."""
    model, ids = attached(tiny("llama")), prompt(1, 100)
    want = greedy(model, ids[:, :length], 3)
    cache = saap.SaapCache(model)
    with torch.no_grad():
        model(ids, **{CACHE: cache})
    with pytest.raises(saap.CompatibilityError, match=rf"the prompt of {length} tokens already.* cache\.crop\({length - 1}\)"):
        greedy(model, ids[:, :length], 3, **{CACHE: cache})
    assert cache.get_seq_length() == 100
    cache.crop(length - 1)
    assert torch.equal(greedy(model, ids[:, :length], 3, **{CACHE: cache}), want)


def test_other_kinds_of_attention_as_they_arrive() -> None:
    from saap_index.hf.attention import attention

    keys = prompt(1, 16).float().view(1, 1, 1, 16)
    layer = saap.SaapCache(attached(tiny("llama"))).layers[0]
    keys.saap_layer = layer
    for name in ("s_aux", "softcap", "position_bias"):
        with pytest.raises(saap.CompatibilityError, match=name):
            attention(SimpleNamespace(), keys, keys, keys, None, **{name: 1.0})
    with pytest.raises(saap.CompatibilityError, match="continuous batching"):
        attention(SimpleNamespace(), keys, keys, keys, None, cache=object())


@pytest.mark.parametrize(("version", "fine"), [("4.57.6", False), ("5.0.0", True), ("5.99.0.dev0", True), ("6.0.0", False)])
def test_versions(version: str, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    if fine:
        support.check_version()
    else:
        with pytest.raises(saap.MissingDependencyError, match=version):
            support.check_version()
