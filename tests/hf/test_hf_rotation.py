"""RoPE whose angles depend on the length of the text: every key of a model is in the list of what it was before it was rotated,
and every query is routed by what it was, whatever a batch, its padding and the texts before it made of the frequencies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import CACHE, DYNAMIC, SMALL, left_padded, make_routers, prompt, tiny
from torch import Tensor
from transformers import DynamicCache

import saap_index as saap
from saap_index.invlists.runs import run_lists
from saap_index.routing.rotations import query_rotation

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [1.5 + i / 4 for i in range(8)],
    "original_max_position_embeddings": 120,
}
LENGTHS = {"max_position_embeddings": 480, "original_max_position_embeddings": 120}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "dynamic": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 120}),
    "longrope": ("Phi3", {"rope_parameters": LONGROPE, **LENGTHS}),
}
LISTS = {"lists of the training": False, "lists of each prompt": True}


class Watched:
    """A model that remembers what its queries and keys of layer 1 were before RoPE, by slot: (b, h, n, d)."""

    def __init__(self, kind: str, own_lists: bool = False, **options: Any) -> None:
        case, changes = MODELS[kind]
        self.model = tiny(case, **changes)
        routers = make_routers(self.model, own_lists=own_lists)
        saap.attach(self.model, routers, 0.5, **{**SMALL, **options})
        self.seen: list[Tensor] = []
        attention = self.model.model.layers[1].self_attn
        for module in ("q_proj", "k_proj", "qkv_proj"):
            if hasattr(attention, module):
                getattr(attention, module).register_forward_hook(lambda _, __, out: self.seen.append(out))

    @torch.no_grad()
    def __call__(self, ids: Tensor, cache: Any, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The call, with the mask of the whole batch; returns queries and keys before RoPE."""
        self.seen.clear()
        given: dict[str, Any] = {}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            given = {"attention_mask": mask, "position_ids": positions}
        self.model(ids, **{CACHE: cache}, **given)
        x = torch.cat(self.seen, -1)
        heads = x.view(*x.shape[:2], -1, 16).transpose(1, 2)
        return heads[:, :4], heads[:, 4:6]


def lists_of(index: saap.AsymmetricIndex, i: int) -> Tensor:
    """List number of every sealed token by position: int (h, n), -1 for the others."""
    lists = index.invlists
    found = torch.full((2, lists.next_position(i)), -1)
    for s, (start, stop) in enumerate(lists.segments[i]):
        found.scatter_(1, lists.ids[i, :, start:stop].long(), run_lists(lists.tables[i, :, s], lists.segments[i][s]).long())
    return found


def check_lists(index: saap.AsymmetricIndex, keys: Tensor, padding: list[int]) -> None:
    """Every sealed token lies in the list that its key without RoPE, (b, h, slots, d), is nearest to."""
    for i, pad in enumerate(padding):
        found = lists_of(index, i)
        sealed = found[0] >= 0
        want = index.key_quantizer.assign(keys[i, :, pad:])
        assert int(sealed.sum()) > 60 and found.shape == want.shape
        same = float((found == want)[:, sealed].float().mean())
        assert same > 0.985, f"sequence {i}: {same:.3f} of the keys in their list"  # float32 may choose the other of two alike


def routed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Queries without RoPE, as the index of layer 1 routes them: (b, hq, q, d), in the order of the searches."""
    found: list[Tensor] = []
    search = saap.AsymmetricIndex.search_attend

    def spy(index: saap.AsymmetricIndex, queries: Tensor, **options: Any) -> Any:
        q, d = queries.shape[2:]
        turn = query_rotation(index.rope, index.invlists, q)
        cos, sin = (x.view(-1, 1, q, d // 2) * turn.scale for x in (turn.cos, turn.sin))
        first, second = queries[..., : d // 2], queries[..., d // 2 :]
        found.append(torch.cat([first * cos + second * sin, second * cos - first * sin], -1))
        return search(index, queries, **options)

    monkeypatch.setattr(saap.AsymmetricIndex, "search_attend", spy)
    return found


@pytest.mark.parametrize("own_lists", LISTS.values(), ids=LISTS.keys())
@pytest.mark.parametrize("padding", [[0], [0, 45], [30, 3]], ids=["one", "left padding", "no sequence without"])
@pytest.mark.parametrize("kind", MODELS)
def test_prompts_and_steps(kind: str, padding: list[int], own_lists: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, chunks and single tokens, across the length at which the frequencies change."""
    watched, ids = Watched(kind, own_lists), prompt(len(padding), 200)
    mask = None if padding == [0] else left_padded(ids, padding)["attention_mask"]
    cache = saap.SaapCache(watched.model)
    asked = routed(monkeypatch)
    parts, at = [], 0
    for size in (105, 4, *[1] * 24, 30, 1, 3, *[1] * 20):
        asked.clear()
        queries, keys = watched(ids[:, at : at + size], cache, None if mask is None else mask[:, : at + size])
        parts.append(keys)
        at += size
        if size <= 8:
            torch.testing.assert_close(asked[1], queries, atol=2e-3, rtol=1e-3)
    check_lists(cache.layers[1].index, torch.cat(parts, 2), padding)


@pytest.mark.parametrize("own_lists", LISTS.values(), ids=LISTS.keys())
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("between", [400, 130, 40])
def test_after_another_text(kind: str, own_lists: bool, between: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamic NTK keeps the frequencies of the longest text until one is short."""
    watched, ids = Watched(kind, own_lists), prompt(1, 151)
    watched(prompt(1, between, seed=8), saap.SaapCache(watched.model))
    cache, asked = saap.SaapCache(watched.model), routed(monkeypatch)
    _, keys = watched(ids[:, :150], cache)
    queries, _ = watched(ids[:, 150:], cache)
    torch.testing.assert_close(asked[1], queries, atol=2e-3, rtol=1e-3)
    check_lists(cache.layers[1].index, torch.cat([keys, keys[:, :, :1]], 2), [0])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_dense_cache_is_taken_over(kind: str) -> None:
    """A prompt that was read without an index, behind a longer one."""
    watched, ids = Watched(kind), prompt(1, 151)
    routers = make_routers(watched.model)
    saap.detach(watched.model)
    watched(prompt(1, 300, seed=8), DynamicCache(config=watched.model.config))
    cache = DynamicCache(config=watched.model.config)
    _, keys = watched(ids[:, :150], cache)
    saap.attach(watched.model, routers, 0.5, **SMALL)
    _, last = watched(ids[:, 150:], cache)
    check_lists(cache.layers[1].index, torch.cat([keys, last], 2), [0])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_copied_model_has_angles_of_its_own(kind: str) -> None:
    watched, ids = Watched(kind), prompt(1, 150)
    other = copy.deepcopy(watched.model)
    watched(prompt(1, 400, seed=8), saap.SaapCache(watched.model))
    for model in (watched.model, other):
        watched.model, cache = model, saap.SaapCache(model)
        _, keys = watched(ids, cache)  # hooks are copied with a model
        check_lists(cache.layers[1].index, keys, [0])


@pytest.mark.parametrize("own_lists", LISTS.values(), ids=LISTS.keys())
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_saved_cropped_copied_and_reordered(kind: str, own_lists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of the rotations goes where the tokens go."""
    watched, ids = Watched(kind, own_lists), prompt(2, 180)
    cache = saap.SaapCache(watched.model)
    parts = [watched(part, cache)[1] for part in (ids[:, :100], *ids[:, 100:130].split(1, 1), ids[:, 130:150])]
    cache.crop(-35)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.save(tmp_path / "read")
    cache = copy.deepcopy(saap.SaapCache.load(tmp_path / "read", watched.model))
    keys = torch.cat(parts, 2)[[1, 0], :, :115]
    asked = routed(monkeypatch)
    for part in (ids[:, 115:117], ids[:, 117:118], ids[:, 118:180]):
        asked.clear()
        queries, new = watched(part, cache)
        keys = torch.cat([keys, new], 2)
        if part.shape[1] <= 8:
            torch.testing.assert_close(asked[1], queries, atol=2e-3, rtol=1e-3)
    check_lists(cache.layers[1].index, keys, [0, 0])
