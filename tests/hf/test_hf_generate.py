"""`generate` with an index that reads everything gives the tokens of `generate` without one, whatever users do with it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hf_models import CACHE, CASES, FAMILIES, attached, greedy, left_padded, prompt, sealed_tokens, tiny
from transformers import DynamicCache

import saap_index as saap
from saap_index.hf import support

Inputs = dict[str, torch.Tensor]

IS_OLDER = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < support.NEWEST
"""Than the newest that is tested: such a transformers may have faults of its own."""


def plain(batch: int = 1, length: int = 100) -> Inputs:
    ids = prompt(batch, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


PADDED = left_padded(prompt(3, 110), [0, 37, 80])
TWICE = prompt(1, 50).repeat(1, 2)  # text that repeats itself, so that looked-up continuations are right now and then

USES: dict[str, tuple[Inputs, dict[str, Any]]] = {
    "greedy": (plain(), {}),
    "batch": (plain(3), {}),
    "left padding": (PADDED, {}),
    "padding that outgrows the break-even": (left_padded(prompt(2, 70), [50, 25]), {"new": 60}),
    "short, then long": (plain(1, 40), {"new": 60}),
    "sampling": (plain(2), {"do_sample": True, "top_k": 20}),
    "several answers": (plain(), {"do_sample": True, "num_return_sequences": 3}),
    "beams": (plain(2), {"num_beams": 3}),
    "beams, padded": (PADDED, {"num_beams": 2, "num_return_sequences": 2}),
    "looked-up candidates": ({"input_ids": TWICE, "attention_mask": torch.ones_like(TWICE)}, {"prompt_lookup_num_tokens": 5}),
    "prompt in chunks": (plain(2), {"prefill_chunk_size": 24}),
    "prompt in chunks, padded": (PADDED, {"prefill_chunk_size": 32}),
    "without a cache": (plain(1, 70), {"use_cache": False, "new": 6}),
    "guidance": (plain(), {"guidance_scale": 1.5, "new": 8}),
}


def both(case: str, run: Callable[[Any], torch.Tensor], **options: Any) -> torch.Tensor:
    """Run something on a model alone, on its like with routers attached, and on that detached again: the same tokens."""
    results = []
    for state in ("alone", "attached", "detached"):
        if state != "detached":
            model = tiny(case)
        if state == "attached":
            attached(model, **options)
        if state == "detached":
            saap.detach(model)
            if case == "llama_dynamic":  # its frequencies stay those of the longest text it has seen
                continue
        torch.manual_seed(11)
        try:
            results.append(run(model))
        except (ValueError, RuntimeError) as error:
            if state == "alone" and IS_OLDER:
                pytest.skip(f"transformers {transformers.__version__} itself: {error}")
            raise
        assert torch.equal(results[0], results[-1]), (state, (results[0] != results[-1]).nonzero()[:3])
    return results[0]


def misplaces_chunks(inputs: Inputs, options: dict[str, Any]) -> bool:
    """Whether this transformers gives the first chunk of a prompt the positions of the last, as 5.2 does to a model alone."""
    model, last = tiny("llama"), []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        last.append(-1 if kwargs.get("position_ids") is None else int(kwargs["position_ids"].max()))

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        greedy(model, inputs, 1, **options)
    except ValueError:
        return False
    return last[0] >= options["prefill_chunk_size"]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("case", FAMILIES)
def test_same_tokens(case: str, use: str) -> None:
    inputs, options = USES[use]
    if IS_OLDER and "prefill_chunk_size" in options and misplaces_chunks(inputs, options):
        with pytest.raises(saap.CompatibilityError, match="position_ids: expected the newest token"):
            greedy(attached(tiny(case)), inputs, **options)
        return
    both(case, lambda model: greedy(model, inputs, **options))


@pytest.mark.parametrize("case", sorted(set(CASES) - set(FAMILIES)))
def test_other_rotations_and_layer_patterns(case: str) -> None:
    both(case, lambda model: greedy(model, plain(2)))


@pytest.mark.parametrize("case", FAMILIES)
def test_some_of_the_context_is_read(case: str) -> None:
    """The layers that can be are sealed, and at 20 % a step reads 20 % of what they sealed."""
    model = attached(tiny(case), 0.2)
    out = model.generate(**PADDED, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    cache = out[CACHE]
    assert isinstance(cache, saap.SaapCache)
    assert sorted(cache.indexed) == ([1, 3] if case == "gemma3" else [0, 1, 2])
    assert min(sealed_tokens(cache)) > 150
    for stats in cache.stats().values():
        assert 0.2 <= stats.last_search.selectivity < 0.23
    assert 0.2 < cache.tokens_read() < 0.55


def test_assisted_by_another_model() -> None:
    assistant = tiny("llama", seed=1, num_hidden_layers=1)
    both("llama", lambda model: greedy(model, plain(), assistant_model=assistant))


def test_assisted_by_an_attached_model() -> None:
    assistant = attached(tiny("llama", seed=1, num_hidden_layers=1))
    both("qwen3", lambda model: greedy(model, plain(), assistant_model=assistant))


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_assisted_over_many_rounds(case: str) -> None:
    """Every candidate is refused or taken; the cache is cropped in each round, over block borders too."""
    perfect = tiny(case)  # the same weights: all its candidates are taken
    for tokens in (7, 20):
        both(case, lambda model: greedy(model, plain(), 80, assistant_model=perfect, num_assistant_tokens=tokens))  # noqa: B023


KINDS = [(case, kind) for case in ("llama", "gemma3") for kind in ("ours", "theirs", "theirs, without a config")]


@pytest.mark.parametrize(("case", "kind"), KINDS)
def test_chat_on_a_kept_cache(case: str, kind: str) -> None:
    """Turn after turn on one cache, each longer than what is decoded at once; the same as one dense pass over all of it."""

    def new_cache(model: Any) -> Any:
        if kind == "ours" and hasattr(model, "_saap_attached"):
            return saap.SaapCache(model)
        return DynamicCache() if kind == "theirs, without a config" else DynamicCache(config=model.config)

    def chat(model: Any) -> torch.Tensor:
        cache, ids = new_cache(model), prompt(1, 0)
        for turn in range(4):
            ids = torch.cat([ids, prompt(1, 30 + 10 * turn, seed=turn)], 1)
            ids = torch.cat([ids, greedy(model, ids, 12, **{CACHE: cache})], 1)
            assert cache.get_seq_length() == ids.shape[1] - 1
        return ids

    both(case, chat)


@pytest.mark.parametrize("tokens", [3, 8, 9, 30])
def test_a_few_tokens_at_once_are_searched(tokens: int) -> None:
    """max_sparse_tokens: a question behind an indexed document is decoded, not prefilled; reading everything it is the same."""
    model = tiny("llama")
    document, question = prompt(2, 100), prompt(2, tokens, seed=9)
    with torch.no_grad():
        want = model(torch.cat([document, question], 1)).logits[:, -tokens:]
        attached(model, max_sparse_tokens=30)
        cache = saap.SaapCache(model)
        model(document, **{CACHE: cache})
        got = model(question, **{CACHE: cache}).logits
        assert cache.indexed[0].last_search() is not None
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_bfloat16() -> None:
    """Rounding differs, so tokens may; the distribution may not by much."""
    model = tiny("llama").to(torch.bfloat16)
    ids = prompt(2, 120)
    with torch.no_grad():
        want = model(ids).logits[:, -20:].float()
        attached(model, max_sparse_tokens=20)
        cache = saap.SaapCache(model)
        model(ids[:, :-20], **{CACHE: cache})
        got = model(ids[:, -20:], **{CACHE: cache}).logits.float()
    assert cache.indexed[0].index.dtype == torch.bfloat16 and min(sealed_tokens(cache)) > 100
    assert (got - want).abs().max() < 0.05 * want.abs().max()
    assert greedy(model, plain(2)).shape == (2, 24)


def test_gradient_checkpointing_is_left_alone() -> None:
    """In evaluation it does nothing; in training there is no cache, and an attached model is the dense one, gradients and all."""

    def checkpointed(model: Any) -> Any:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        return model

    def tokens(model: Any) -> torch.Tensor:
        return greedy(checkpointed(model), plain(2))

    both("llama", tokens)
    gradients = []
    for model in (tiny("llama"), attached(tiny("llama"))):
        ids = prompt(2, 100)
        checkpointed(model).train()(ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert gradients[0].abs().sum() > 0 and torch.equal(*gradients)


def test_loaded_with_the_attention_function() -> None:
    """The other road: no attach, the name in from_pretrained and a SaapCache given to generate."""
    from hf_models import SMALL, make_routers

    want = greedy(tiny("qwen3"), PADDED)
    model = tiny("qwen3", attn_implementation="saap")
    cache = saap.SaapCache(model, make_routers(model), 1.0, **SMALL)
    assert torch.equal(greedy(model, PADDED, **{CACHE: cache}), want)
    assert min(sealed_tokens(cache)) > 100
    assert torch.equal(greedy(model, PADDED), want), "without one, it is a dense model"


def test_a_decoder_inside_a_larger_model() -> None:
    """Gemma 3 with eyes: the decoder of its text is attached to, the rest stays as it is."""
    from hf_models import MIXED, SHAPE, SMALL, make_routers

    text = {**SHAPE, **MIXED, "query_pre_attn_scalar": 24}
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }
    tokens = {"image_token_index": 209, "boi_token_index": 207, "eoi_token_index": 208, "mm_tokens_per_image": 4}
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, **tokens)
    ).eval()
    model.generation_config.eos_token_id = 10**6
    want = greedy(model, PADDED)
    saap.attach(model, make_routers(SimpleNamespace(config=model.config.text_config)), 1.0, **SMALL)
    cache = saap.SaapCache(model)
    assert torch.equal(greedy(model, PADDED, **{CACHE: cache}), want) and min(sealed_tokens(cache)) > 100
    assert model.config._attn_implementation == "sdpa" and model.config.text_config._attn_implementation == "saap"
    assert torch.equal(greedy(saap.detach(model), PADDED), want) and model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("inputs", [plain(2), PADDED])
def test_lists_of_each_prompt_s_own(inputs: Inputs) -> None:
    """Routers that serve any partition: the keys of the prompt make the lists, of tokens alone, when the first are sealed."""
    both("llama", lambda model: greedy(model, inputs), own_lists=True)
    model = attached(tiny("llama"), 0.2, own_lists=True)
    cache = saap.SaapCache(model)
    greedy(model, inputs, **{CACHE: cache})
    index, trained = cache.layers[0].index, cache.plan.layers[0].trained.quantizer
    assert not torch.equal(index.key_quantizer.centroids, trained.centroids) and min(sealed_tokens(cache)) > 100
    again = saap.SaapCache(model)
    greedy(model, inputs, 1, **{CACHE: again})
    assert torch.equal(again.layers[0].index.key_quantizer.centroids, index.key_quantizer.centroids)
    model = attached(tiny("llama"), 0.2, own_lists=True, nlist=trained.nlist + 3)
    more = saap.SaapCache(model)
    greedy(model, inputs, 1, **{CACHE: more})
    assert more.layers[0].index.key_quantizer.nlist == trained.nlist + 3
