"""Copies by Python's own means: of an index they are forks, and what cannot be pickled says what to do instead."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_models import CACHE, attached, greedy, prompt, tiny

import saap_index as saap


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_an_index_is_a_fork(copied: Callable[[Any], Any]) -> None:
    index = saap.AsymmetricIndex(8, 4, 2, 1, break_even=64, window=16)
    assert copied(index).ntotal == 0
    g = torch.Generator().manual_seed(0)
    keys, values = torch.randn((1, 1, 300, 8), generator=g), torch.randn((1, 1, 300, 8), generator=g)
    index.train(keys)
    index.add(keys[:, :, :200], values[:, :, :200])
    queries = torch.randn((1, 2, 1, 8), generator=g)
    want = index.search_attend(queries)
    other = copied([index, index])[0] if copied is copy.deepcopy else copied(index)
    other.add(keys[:, :, 200:], values[:, :, 200:])
    assert (index.ntotal, other.ntotal) == (200, 300)
    assert torch.equal(index.search_attend(queries), want) and other.key_quantizer is index.key_quantizer
    other.truncate(200)
    assert torch.equal(other.search_attend(queries), want)


def test_what_is_not_pickled() -> None:
    with pytest.raises(saap.StateError, match="write_index"):
        pickle.dumps(saap.AsymmetricIndex(8))
    model = attached(tiny("llama"))
    cache = saap.SaapCache(model)
    for filled in (False, True):
        if filled:
            with torch.no_grad():
                model(prompt(1, 100), **{CACHE: cache})
        with pytest.raises(saap.StateError, match="save and load"):
            pickle.dumps(cache)


def test_an_attached_model_is_pickled() -> None:
    """Also after it generated, which made indexes for its plan."""
    model = attached(tiny("llama"))
    want = greedy(model, prompt(), 6)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(greedy(torch.load(buffer, weights_only=False), prompt(), 6), want)


def test_what_needs_transformers_is_listed() -> None:
    assert {"attach", "detach", "SaapCache", "AsymmetricIndex"} <= set(dir(saap))
