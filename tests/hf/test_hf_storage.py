"""Models of transformers whose indexes store codes: every use of `generate` runs, and logits are nearly those of numbers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hf_models import CACHE, attached, greedy, left_padded, prompt, sealed_tokens, tiny

import saap_index as saap
from saap_index.invlists import stored

STORAGES = {"SQ8": 0.05, "SQ8/SQ4": 0.3}
"""Root mean square of the difference of logits, in deviations of the logits: of random weights, which forgive nothing."""

USES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "looked-up candidates": {"prompt_lookup_num_tokens": 5},
    "prompt in chunks": {"prefill_chunk_size": 24},
}


def logits_of(model: Any, inputs: dict[str, torch.Tensor], later: torch.Tensor, chunk: int) -> tuple[torch.Tensor, Any]:
    """Of the tokens ``later``, one by one behind a prompt that is read ``chunk`` tokens at a time."""
    cache, found = saap.SaapCache(model), []
    ids, n = torch.cat([inputs["input_ids"], later], 1), inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(later)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    steps = [*range(0, n, chunk), *range(n, ids.shape[1] + 1)]
    with torch.no_grad():
        for start, stop in itertools.pairwise(steps):
            given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop], CACHE: cache}
            out = model(input_ids=ids[:, start:stop], **given)
            if start >= n:
                found.append(out.logits[:, -1])
    return torch.stack(found, 1), cache


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("case", "padding"), [("llama", [0]), ("llama", [0, 21]), ("gemma3", [0]), ("qwen3", [13, 0])])
@pytest.mark.parametrize("chunk", [200, 40])
def test_logits_are_nearly_those_of_numbers(storage: str, case: str, padding: list[int], chunk: int) -> None:
    inputs, later = left_padded(prompt(len(padding), 200), padding), prompt(len(padding), 12, seed=9)
    want, _ = logits_of(attached(tiny(case)), inputs, later, chunk)
    got, cache = logits_of(attached(tiny(case), storage=storage), inputs, later, chunk)
    assert min(sealed_tokens(cache)) > 100
    error = float((got - want).square().mean().sqrt() / want.std())
    assert 0 < error < STORAGES[storage], error


def test_a_step_decodes_no_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, later = left_padded(prompt(1, 200), [0]), prompt(1, 12, seed=9)
    model = attached(tiny("llama"), storage="SQ8")
    cache = saap.SaapCache(model)
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
        assert min(sealed_tokens(cache)) > 100
        monkeypatch.setattr(stored, "rows_at", lambda *args, **kwargs: pytest.fail("codes were decoded"))
        for i in range(later.shape[1]):
            assert model(later[:, i : i + 1], **{CACHE: cache}).logits.isfinite().all()


@pytest.mark.parametrize("use", USES)
def test_every_use_runs(use: str) -> None:
    model = attached(tiny("llama"), 0.3, storage="SQ8/SQ4")
    inputs = prompt(1, 150) if use == "looked-up candidates" else left_padded(prompt(2, 150), [0, 30])
    torch.manual_seed(3)
    out = greedy(model, inputs, 24, **USES[use])
    assert out.shape[1] == 24 or out.shape[1] == 174
