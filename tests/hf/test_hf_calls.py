"""A call that is refused, or fails, leaves a kept cache as it was, in every layer: the next one answers as if it had not been."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_models import CACHE, attached, left_padded, prompt, tiny
from torch import Tensor
from transformers import DynamicCache

import saap_index as saap
from saap_index.hf import detached

ONE = torch.ones(2, 1, dtype=torch.long)


def given(mask: Tensor | None, q: int) -> dict[str, Tensor]:
    """Arguments of a call of q tokens with the mask of the whole batch."""
    if mask is None:
        return {}
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -q:]}


def skipping(model: Any, cache: Any, ids: Tensor, mask: Tensor | None) -> None:
    n = cache.get_seq_length()
    model(ids, **{CACHE: cache}, **{**given(mask, 20), "position_ids": torch.arange(n + 7, n + 27)[None].expand(2, 20)})


def tree(model: Any, cache: Any, ids: Tensor, mask: Tensor | None) -> None:
    n = cache.get_seq_length()
    shown = torch.ones(2, n + 4, dtype=torch.bool) if mask is None else mask[:, : n + 4].bool()
    shown = shown[:, None, None].expand(2, 1, 4, -1)
    model(ids[:, :4], **{CACHE: cache}, attention_mask=shown)


def numbers(model: Any, cache: Any, ids: Tensor, mask: Tensor | None) -> None:
    n = cache.get_seq_length()
    model(ids, **{CACHE: cache}, attention_mask=torch.zeros(2, 1, 20, n + 20))


def other_batch(model: Any, cache: Any, ids: Tensor, mask: Tensor | None) -> None:
    model(ids[:1], **{CACHE: cache})


def nan_in_layer(number: int) -> Callable[..., None]:
    def call(model: Any, cache: Any, ids: Tensor, mask: Tensor | None) -> None:
        handle = model.model.layers[number].self_attn.v_proj.register_forward_hook(lambda *args: args[-1] * float("nan"))
        try:
            model(ids, **{CACHE: cache}, **given(mask, 20))
        finally:
            handle.remove()

    return call


def dropout_in_layer_1(model: Any, cache: Any, ids: Tensor, mask: Tensor | None) -> None:
    attention = model.model.layers[1].self_attn
    attention.attention_dropout = 0.1
    attention.train()
    try:
        model(ids, **{CACHE: cache}, **given(mask, 20))
    finally:
        attention.eval()


def interrupted(model: Any, cache: Any, ids: Tensor, mask: Tensor | None) -> None:
    """Memory runs out between two layers; that is no refusal, and `attach` sees it all the same."""

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    handle = model.model.layers[2].mlp.register_forward_hook(full)
    try:
        model(ids, **{CACHE: cache}, **given(mask, 20))
    finally:
        handle.remove()


CALLS = {
    "positions that skip": skipping, "a mask of numbers": numbers, "a tree": tree, "another batch size": other_batch,
    "NaN in the first layer": nan_in_layer(0), "NaN in a later layer": nan_in_layer(1), "dropout": dropout_in_layer_1,
    "no memory": interrupted,
}
MODELS: dict[str, tuple[str, list[int], int, dict[str, Any]]] = {
    "one length": ("llama", [0, 0], 100, {}),
    "lengths differ": ("llama", [0, 30], 100, {}),
    "padding is still there": ("llama", [0, 30], 55, {}),
    "windows come first": ("gemma3", [0, 30], 100, {}),
    "nothing sealed": ("gemma3", [0, 0], 50, {}),
    "lists of its own": ("llama", [0, 0], 55, {"own_lists": True}),
    "dense layers": ("llama", [0, 0], 100, {"dense_layers": [0, 2]}),
    "angles depend on the length": ("llama_dynamic", [0, 30], 55, {}),
}


def contents(cache: Any) -> list[Any]:
    """Everything a call can change, layer by layer."""
    found = []
    for layer in cache.layers:
        if hasattr(layer, "slots"):
            index = layer.index
            tokens = [index.reconstruct(range(n), i) for i, n in enumerate(index.lengths)] if not layer.ragged else []
            found.append((layer.slots, index.lengths, index.invlists.segments, [x for pair in tokens for x in pair]))
        else:
            found.append((layer.get_seq_length(), layer.keys, layer.values))
    return found


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_leaves_the_cache_as_it_was(call: str, kind: str) -> None:
    case, padding, length, options = MODELS[kind]
    if call == "a tree" and length < 60:
        length = 65  # masks among the tokens of a dense call are whatever they are
    model, ids = attached(tiny(case), 1.0, **options), prompt(2, length + 40)
    mask = None if padding == [0, 0] else left_padded(ids, padding)["attention_mask"]
    cache = saap.SaapCache(model)
    model(ids[:, :length], **{CACHE: cache}, **given(None if mask is None else mask[:, :length], length))
    before = copy.deepcopy(cache)
    new = ids[:, length : length + 20]
    with pytest.raises((saap.SaapError, torch.OutOfMemoryError, RuntimeError)):
        CALLS[call](model, cache, new, None if mask is None else mask[:, : length + 20])
    assert cache.get_seq_length() == length and {layer.get_seq_length() for layer in cache.layers} == {length}
    if case != "llama_dynamic":  # that model itself remembers the longest text
        for part in (slice(length, length + 1), slice(length + 1, length + 21), slice(length + 21, length + 22)):
            seen = None if mask is None else mask[:, : part.stop]
            a, b = (model(ids[:, part], **{CACHE: x}, **given(seen, part.stop - part.start)).logits for x in (cache, before))
            real = torch.ones_like(ids[:, part], dtype=torch.bool) if mask is None else mask[:, part].bool()
            torch.testing.assert_close(a[real], b[real], atol=2e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("call", CALLS)
def test_nothing_of_it_is_left(call: str) -> None:
    """Bit for bit, and whatever had been in the cache."""
    model, ids = attached(tiny("gemma3"), 0.3), prompt(2, 120)
    cache = saap.SaapCache(model)
    model(ids[:, :100], **{CACHE: cache})
    before = contents(copy.deepcopy(cache))
    with pytest.raises((saap.SaapError, torch.OutOfMemoryError, RuntimeError)):
        CALLS[call](model, cache, ids[:, 100:], None)
    for a, b in zip(contents(cache), before, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("own", [True, False])
def test_the_first_call_may_fail(own: bool) -> None:
    model, ids = attached(tiny("gemma3"), own_lists=own), prompt(2, 90)
    cache = saap.SaapCache(model)
    with detached(model):
        want = model(ids).logits
    for wrong in (skipping, nan_in_layer(0), nan_in_layer(3), interrupted):
        with pytest.raises((saap.SaapError, torch.OutOfMemoryError)):
            wrong(model, cache, ids[:, :20], None)
        assert cache.get_seq_length() == 0 and all(layer.get_seq_length() == 0 for layer in cache.layers)
    torch.testing.assert_close(model(ids, **{CACHE: cache}).logits, want, atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_a_cache_that_cannot_be_taken_over_stays_what_it_is() -> None:
    model, ids = tiny("llama"), prompt(2, 90)
    cache = DynamicCache(config=model.config)
    model(ids, **{CACHE: cache})
    cache.layers[2].values = cache.layers[2].values * float("nan")
    layers = list(cache.layers)
    attached(model)
    with pytest.raises(saap.NotFiniteError):
        model(ids[:, :1], **{CACHE: cache})
    assert all(a is b for a, b in zip(cache.layers, layers, strict=True))


@torch.no_grad()
def test_interrupted_by_hand() -> None:
    """The next call finds the cache as it was before the one that Ctrl-C ended; tokens may be taken back in between, too."""
    model, ids = attached(tiny("llama")), prompt(1, 130)
    cache = saap.SaapCache(model)
    model(ids[:, :100], **{CACHE: cache})

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, 100:120], **{CACHE: cache})
    handle.remove()
    got = model(ids[:, 100:], **{CACHE: cache}).logits
    with detached(model):
        torch.testing.assert_close(got, model(ids).logits[:, 100:], atol=2e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("padding", [[0, 0], [0, 30]])
def test_positions_of_a_step_that_skip(padding: list[int]) -> None:
    model, ids = attached(tiny("llama")), prompt(2, 101)
    mask = None if padding == [0, 0] else left_padded(ids, padding)["attention_mask"]
    cache = saap.SaapCache(model)
    model(ids[:, :100], **{CACHE: cache}, **given(None if mask is None else mask[:, :100], 100))
    wrong = {**given(mask, 1), "position_ids": torch.tensor([[107], [107]])}
    with pytest.raises(saap.CompatibilityError, match="position_ids"):
        model(ids[:, 100:], **{CACHE: cache}, **wrong)
    assert cache.get_seq_length() == 100
    model(ids[:, 100:], **{CACHE: cache}, **given(mask, 1))


@torch.no_grad()
@pytest.mark.parametrize("q", [1, 3, 20])
@pytest.mark.parametrize("case", ["llama", "llama_dynamic"])
def test_positions_may_be_written_into_the_same_tensor(case: str, q: int) -> None:
    """What was read of a tensor in one call says nothing of the next; in inference mode tensors do not count their changes."""
    model, ids = attached(tiny(case)), prompt(2, 160)
    cache = saap.SaapCache(model)
    model(ids[:, :100], **{CACHE: cache})
    places = torch.arange(100, 100 + q)[None].expand(2, q).contiguous()
    got = []
    for start in range(100, 160, q):
        got.append(model(ids[:, start : start + q], position_ids=places, **{CACHE: cache}).logits)
        places += q
    if case == "llama":  # the other's angles are those of the length of each call
        with detached(model):
            torch.testing.assert_close(torch.cat(got, 1), model(ids).logits[:, 100:], atol=2e-3, rtol=1e-3)
    places -= 2 * q
    with pytest.raises(saap.CompatibilityError, match="position_ids"):
        model(ids[:, :q], position_ids=places, **{CACHE: cache})


def moved(places: Tensor) -> Tensor:
    """All but the newest token of each sequence elsewhere than it is."""
    return torch.cat([places[:, :-1].flip(1), places[:, -1:]], 1)


@torch.no_grad()
@pytest.mark.parametrize("length", [50, 100])
@pytest.mark.parametrize("padding", [[0, 0], [0, 30]])
def test_positions_within_a_call_that_skip(padding: list[int], length: int) -> None:
    """The newest is where it should be, those before it are not: routing would undo another rotation than theirs."""
    model, ids = attached(tiny("llama")), prompt(2, length + 20)
    mask = None if padding == [0, 0] else left_padded(ids, padding)["attention_mask"]
    places = torch.arange(length + 20)[None].expand(2, -1) if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    cache, start = saap.SaapCache(model), 0
    for stop in (length, length + 4, length + 20):
        call: dict[str, Any] = {CACHE: cache}
        if mask is not None:
            call["attention_mask"] = mask[:, :stop]
        part = places[:, start:stop]
        with pytest.raises(saap.CompatibilityError, match="position_ids: expected new token"):
            model(ids[:, start:stop], position_ids=moved(part), **call)
        assert cache.get_seq_length() == start
        model(ids[:, start:stop], position_ids=part, **call)
        start = stop


@torch.no_grad()
@pytest.mark.parametrize("first", [2, 50, 100])
def test_positions_go_on_counting_what_they_counted(first: int) -> None:
    """Tokens, as `generate` has them, or slots, as a model that is called with a mask alone; not the one and then the other."""
    model, ids = attached(tiny("llama")), prompt(2, first + 60)
    mask = left_padded(ids, [0, 1])["attention_mask"]
    slots = torch.arange(first + 60)[None].expand(2, -1)
    tokens = (mask.cumsum(1) - 1).clamp(min=0)
    for one, other in ((slots, tokens), (tokens, slots)):
        cache = saap.SaapCache(model)
        for start, stop in ((0, first), (first, first + 20), (first + 20, first + 21), (first + 21, first + 60)):
            call = {CACHE: cache, "attention_mask": mask[:, :stop]}
            if start:
                with pytest.raises(saap.CompatibilityError, match="position_ids"):
                    model(ids[:, start:stop], position_ids=other[:, start:stop], **call)
            model(ids[:, start:stop], position_ids=one[:, start:stop], **call)


@torch.no_grad()
def test_the_first_slots_say_nothing_of_what_is_counted() -> None:
    """One slot at a time, some of them padding: until a token comes behind padding, both ways of counting agree."""
    model, ids = attached(tiny("llama")), prompt(2, 80)
    mask = left_padded(ids, [0, 3])["attention_mask"]
    places = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    cache = saap.SaapCache(model)
    got = [model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], position_ids=places[:, t : t + 1], **{CACHE: cache}).logits
           for t in range(80)]
    with detached(model):
        want = model(ids, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], want[mask.bool()], atol=2e-3, rtol=1e-3)
