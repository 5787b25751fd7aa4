"""SaapCache as a cache: what it shares with SDPA, what it gives back, and what it holds after users did what they do."""

from __future__ import annotations

import copy
import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close, dense
from hf_models import CACHE, SMALL, attached, greedy, left_padded, make_routers, prompt, sealed_tokens, tiny
from torch import Tensor
from transformers import DynamicCache

import saap_index as saap
from saap_index.hf import detached
from saap_index.hf import layer as layer_module


@torch.no_grad()
def logits(model: Any, ids: Tensor, cache: Any, mask: Tensor | None = None) -> Tensor:
    """Of the new tokens ``ids``, whose mask is that of the whole batch so far."""
    given = (
        {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]}
    )
    return model(ids, **{CACHE: cache}, **given).logits


@pytest.mark.parametrize("padding", [None, [0, 21, 40]])
@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_below_break_even_it_is_sdpa(case: str, padding: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, on the rows of the index themselves."""
    model, ids = tiny(case), prompt(3, 90)
    mask = None if padding is None else left_padded(ids, padding)["attention_mask"]
    plain = DynamicCache(config=model.config)
    steps = [ids[:, :60], *ids[:, 60:85].split(1, 1), ids[:, 85:]]
    want = []
    for step in steps:
        seen = plain.get_seq_length() + step.shape[1]
        want.append(logits(model, step, plain, None if mask is None else mask[:, :seen]))
    attached(model, break_even=2048)
    cache = saap.SaapCache(model)
    used = []

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        used.append((module.layer_idx, key.data_ptr(), value.data_ptr()))
        return real(module, query, key, value, *args, **kwargs)

    real = layer_module.sdpa_attention_forward
    monkeypatch.setattr(layer_module, "sdpa_attention_forward", spy)
    for step, expected in zip(steps, want, strict=True):
        seen = cache.get_seq_length() + step.shape[1]
        assert torch.equal(logits(model, step, cache, None if mask is None else mask[:, :seen]), expected)
        for number, keys, values in used:
            lists = cache.layers[number].index.invlists
            assert (keys, values) == (lists.keys.data_ptr(), lists.values.data_ptr())
        assert len(used) == len(cache.indexed)
        used.clear()
    assert sealed_tokens(cache) == [0] * len(cache.indexed)


def test_a_layer_attends_to_what_its_index_says_it_read() -> None:
    """One layer by itself, at 20 %: exact attention over the tokens read, among them the recent ones and the sinks."""
    model = attached(tiny("llama"), 0.2)
    layer = saap.SaapCache(model).layers[1]
    g = torch.Generator().manual_seed(0)
    keys, values = torch.randn((2, 2, 120, 16), generator=g), torch.randn((2, 2, 120, 16), generator=g)
    attention = model.model.layers[1].self_attn
    queries = torch.randn((2, 4, 120, 16), generator=g)
    for part in (slice(0, 100), slice(100, 101), slice(101, 106), slice(106, 118), slice(118, 120)):
        layer.update(keys[:, :, part], values[:, :, part])
        mask = torch.ones(part.stop - part.start, part.stop, dtype=torch.bool).tril(part.start)[None, None].expand(2, 1, -1, -1)
        out = layer.attend(attention, queries[:, :, part], None if mask.shape[2] in (1, 100) else mask, 0.3, None)
        is_search = 1 <= mask.shape[2] <= 8
        read = layer.index.read_ids(layer.index._last) if is_search else [[torch.arange(part.stop)] * 2] * 2
        for b in range(2):
            for head in range(2):
                ids = read[b][head]
                assert is_search is (len(ids) < part.stop)
                assert {0, 1, *range(part.stop - 8, part.stop)} <= set(ids.tolist())
                hidden = ids.numpy()[None] > np.arange(part.start, part.stop)[:, None]
                rows = [x[b, head, ids] for x in (keys, values)]
                heads = slice(2 * head, 2 * head + 2)
                want, _ = dense(queries[b, heads, part], *rows, 0.3, hidden)
                assert_close(out[b].transpose(0, 1)[heads], want, torch.float32, 3.0)


def walk(
    model: Any, rng: np.random.Generator, ids: Tensor, mask: Tensor | None, cache: Any, steps: int, crops: bool
) -> tuple[Tensor, Any]:
    """Calls of all sizes, crops, reorders and copies; returns the slots (b, n) that the cache should hold, and the cache."""
    b, n = ids.shape
    held, at = ids[:, :0], 0
    for _ in range(steps):
        kind = rng.choice(["token", "few", "many", "crop", "reorder", "copy"], p=[0.4, 0.15, 0.1, 0.15, 0.1, 0.1])
        if kind == "crop" and crops and held.shape[1] > 70:
            gone = int(rng.integers(0, 20))
            cache.crop(-gone)
            held = held[:, : held.shape[1] - gone]
        elif kind == "crop":
            continue
        elif kind == "reorder" and mask is None and held.shape[1]:
            order = torch.from_numpy(rng.integers(0, b, b))
            cache.reorder_cache(order)
            held = held[order]
        elif kind == "copy":
            cache = copy.deepcopy(cache)
        else:
            size = {"token": 1, "few": int(rng.integers(2, 9)), "many": int(rng.integers(20, 50))}.get(kind, 1)
            size = 75 if not held.shape[1] else size
            new = ids[:, at : at + size]
            at += size
            seen = held.shape[1] + new.shape[1]
            if not new.shape[1] or seen > n:
                break
            held = torch.cat([held, new], 1)
            got = logits(model, new, cache, None if mask is None else mask[:, :seen])
            with detached(model):
                want = logits(model, held, DynamicCache(config=model.config), None if mask is None else mask[:, :seen])
            tokens = slice(-new.shape[1], None) if mask is None else mask[:, :seen][:, -new.shape[1] :].bool()
            expected = want[:, -new.shape[1] :]
            if mask is None:
                torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)
            else:
                torch.testing.assert_close(got[tokens], expected[tokens], atol=2e-3, rtol=1e-3)
        assert cache.get_seq_length() == held.shape[1]
    return held, cache


@pytest.mark.parametrize("padding", [None, [0, 30, 64]])
@pytest.mark.parametrize(("case", "seed"), [("llama", 0), ("llama", 1), ("llama", 2), ("qwen3", 3), ("gemma3", 4)])
def test_walks(case: str, seed: int, padding: list[int] | None) -> None:
    """Whatever happened to the cache before, a call gives the logits of a dense pass over the tokens that are left.

    Layers with a window forget what they may be asked to crop back to, with or without an index beside them.
    """
    model, ids = attached(tiny(case)), prompt(3, 400, seed)
    rng = np.random.default_rng(seed)
    mask = None if padding is None else left_padded(ids, padding)["attention_mask"]
    cache = saap.SaapCache(model)
    walk(model, rng, ids, mask, cache, 40, crops=case != "gemma3")


def test_tokens_hidden_in_the_middle_and_at_the_end() -> None:
    """A second turn that is padded too, to the left and to the right: masks as tokenizers make them."""
    model, ids = tiny("llama"), prompt(2, 160)
    mask = torch.ones_like(ids)
    mask[0, :20], mask[1, 90:100], mask[0, 125:130] = 0, 0, 0
    plain = DynamicCache(config=model.config)
    calls = [(0, 90), (90, 91), (91, 130), (130, 131), (131, 135), (135, 160)]
    want = [logits(model, ids[:, a:b], plain, mask[:, :b]) for a, b in calls]
    attached(model)
    cache = saap.SaapCache(model)
    for (a, b), expected in zip(calls, want, strict=True):
        got, real = logits(model, ids[:, a:b], cache, mask[:, :b]), mask[:, a:b].bool()
        torch.testing.assert_close(got[real], expected[real], atol=2e-3, rtol=1e-3)
    assert cache.layers[0].index.lengths == mask.sum(1).tolist()


def test_positions_may_count_slots() -> None:
    """A model that is called with a mask and no positions counts padding, and so does the index."""
    model, ids = tiny("qwen2"), prompt(2, 90)
    mask = left_padded(ids, [0, 25])["attention_mask"]
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        want = [model(ids[:, a:b], attention_mask=mask[:, :b], **{CACHE: plain}).logits for a, b in ((0, 80), (80, 81))]
        attached(model)
        cache = saap.SaapCache(model)
        got = [model(ids[:, a:b], attention_mask=mask[:, :b], **{CACHE: cache}).logits for a, b in ((0, 80), (80, 81))]
    torch.testing.assert_close(got[1], want[1], atol=2e-3, rtol=1e-3)
    assert cache.layers[0].index.invlists.next_position(1) == 81 and cache.layers[0].index.lengths == [81, 56]


@pytest.mark.parametrize("padding", [None, [13, 0]])
def test_a_dense_cache_is_taken_over(padding: list[int] | None) -> None:
    """A prompt that was read before the routers were attached is indexed when the model is called with its cache."""
    model, ids = tiny("gemma3"), prompt(2, 120)
    mask = None if padding is None else left_padded(ids, padding)["attention_mask"]
    steps = [ids[:, :100], ids[:, 100:101], ids[:, 101:]]
    caches = [DynamicCache(config=model.config), DynamicCache(config=model.config)]
    want, got = [], []
    for cache, found in zip(caches, (want, got), strict=True):
        for number, step in enumerate(steps):
            if number == 1 and found is got:
                attached(model)
            seen = cache.get_seq_length() + step.shape[1]
            found.append(logits(model, step, cache, None if mask is None else mask[:, :seen]))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)
    assert caches[1].layers[1].index.stats().sealed_tokens > 100


def test_select_repeat_and_reset() -> None:
    model, ids = tiny("llama"), prompt(3, 90)
    new = prompt(4, 1, 8)
    want = logits(model, torch.cat([ids[[2, 2, 0, 0]], new], 1), DynamicCache(config=model.config))[:, -1:]
    attached(model)
    cache = saap.SaapCache(model)
    logits(model, ids, cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(logits(model, new, cache), want, atol=2e-3, rtol=1e-3)
    cache.reset()
    assert cache.get_seq_length() == 0
    want = logits(model, ids, None)
    torch.testing.assert_close(logits(model, ids, cache), want, atol=2e-3, rtol=1e-3)
    assert min(sealed_tokens(cache)) > 200


def test_other_search_parameters_for_one_cache() -> None:
    model, ids = attached(tiny("llama"), 0.1), prompt(1, 150)
    cache = saap.SaapCache(model)
    logits(model, ids, cache)
    logits(model, ids[:, :1], cache)
    few = cache.tokens_read()
    cache.set_search(saap.SearchParametersIVF(selectivity=0.9))
    logits(model, ids[:, :1], cache)
    assert few < 0.4 < 0.85 < cache.tokens_read()
    cache.set_search(None)
    logits(model, ids[:, :1], cache)
    assert cache.tokens_read() < 0.4


def test_room_is_made_once() -> None:
    """max_tokens: no arena moves until it is full."""
    model, ids = attached(tiny("llama")), prompt(1, 100)
    cache = saap.SaapCache(model, max_tokens=300)
    logits(model, ids[:, :90], cache)
    before = cache.layers[0].index.invlists.keys.data_ptr()
    greedy(model, ids, 150, **{CACHE: cache})
    assert cache.layers[0].index.invlists.keys.data_ptr() == before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use as Linux tells it")
def test_a_hundred_generations_leave_nothing_behind() -> None:
    model = attached(tiny("llama", num_hidden_layers=1), 0.2)
    rng = np.random.default_rng(0)

    def generation(number: int) -> None:
        ids = prompt(int(rng.integers(1, 4)), int(rng.integers(40, 600)), number)
        kind = number % 5
        if kind == 4:
            cache = saap.SaapCache(model)
            greedy(model, ids, 4, **{CACHE: cache})
            cache.crop(-int(rng.integers(1, 30)))
            greedy(model, torch.cat([ids, ids[:, :40]], 1), 4, **{CACHE: cache})
        else:
            greedy(model, ids[:1] if kind == 3 else ids, 6, **({}, {"num_beams": 3}, {}, {"prompt_lookup_num_tokens": 3})[kind])

    def alive() -> int:
        gc.collect()
        return sum(type(x) is saap.AsymmetricIndex for x in gc.get_objects())

    for number in range(20):
        generation(number)
    indexes, memory = alive(), resident_bytes()
    for number in range(100):
        generation(number)
    assert alive() == indexes
    assert resident_bytes() - memory < 8 << 20


def test_a_plan_is_shared_and_routers_are_packed_once() -> None:
    model = attached(tiny("llama"))
    first, second = saap.SaapCache(model), saap.SaapCache(model)
    for cache in (first, second):
        logits(model, prompt(), cache)
    a, b = first.layers[0].index, second.layers[0].index
    assert a is not b and a._prepared_router is b._prepared_router and a._prepared_quantizer is b._prepared_quantizer


def test_layers_without_routers_and_layers_named_stay_dense() -> None:
    model = tiny("llama")
    saap.attach(model, make_routers(model, layers=[0, 2]), **SMALL)
    assert sorted(saap.SaapCache(model).indexed) == [0, 2]
    saap.detach(model)
    attached(model, dense_layers=[0, -1])
    cache = saap.SaapCache(model)
    assert sorted(cache.indexed) == [1] and cache.plan.dense_layers == [0, 2]
    assert greedy(model, prompt(), **{CACHE: cache}).shape == (1, 24)
