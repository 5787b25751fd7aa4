"""What evaluation harnesses ask of a model: likelihoods of continuations in a padded batch, and answers up to a stop word."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import CACHE, attached, left_padded, prompt, tiny

import saap_index as saap
from saap_index.hf import detached

EXAMPLE = Path(__file__).parents[2] / "examples" / "needles.py"


@torch.no_grad()
def loglikelihoods(model: Any, rows: list[tuple[torch.Tensor, torch.Tensor]], use_cache: bool | None) -> list[tuple[float, bool]]:
    """Of each continuation behind its context, and whether it is the greedy one; padded to the right, without a mask."""
    longest = max(len(context) + len(continuation) for context, continuation in rows)
    batch = torch.zeros(len(rows), longest - 1, dtype=torch.int64)
    for row, (context, continuation) in zip(batch, rows, strict=True):
        text = torch.cat([context, continuation])[:-1]
        row[: len(text)] = text
    logits = model(batch, use_cache=use_cache).logits.log_softmax(-1)
    found = []
    for row, (context, continuation) in zip(logits, rows, strict=True):
        part = row[len(context) - 1 : len(context) + len(continuation) - 1]
        likelihood = part.gather(1, continuation[:, None]).sum()
        found.append((float(likelihood), bool((part.argmax(1) == continuation).all())))
    return found


@pytest.mark.parametrize("use_cache", [None, False])
def test_loglikelihoods_are_those_of_the_model(use_cache: bool | None) -> None:
    """Scored in one pass, they are dense: the very numbers of the model alone."""
    model = attached(tiny("llama"), 0.05)
    rows = [(prompt(1, n, n)[0], prompt(1, 4 + n % 3, 1)[0]) for n in (150, 90, 31)]
    got = loglikelihoods(model, rows, use_cache)
    with detached(model):
        assert loglikelihoods(model, rows, use_cache) == got


def test_answers_up_to_a_stop_word() -> None:
    model = tiny("qwen3")
    inputs = left_padded(prompt(3, 120), [0, 11, 50])

    def answers() -> torch.Tensor:
        return model.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=[17, 44, 100, 150], pad_token_id=0)

    want = answers()
    assert torch.equal(answers() if attached(model) else want, want)


def test_a_question_behind_a_document_is_scored_by_search() -> None:
    """max_sparse_tokens: the likelihood of an answer whose document was read alone, the way to judge an index."""
    model = attached(tiny("llama"), 1.0, max_sparse_tokens=16)
    document, answer = prompt(1, 150), prompt(1, 12, 7)
    with torch.no_grad():
        cache = saap.SaapCache(model)
        model(document, **{CACHE: cache}, logits_to_keep=1)
        logits = model(answer, **{CACHE: cache}).logits[0, :-1].log_softmax(-1)
        sparse = float(logits.gather(1, answer[0, 1:, None]).sum())
        assert cache.layers[0].last_search() is not None
    ((dense, _),) = loglikelihoods(model, [(torch.cat([document, answer[:, :1]], 1)[0], answer[0, 1:])], False)
    assert sparse == pytest.approx(dense, abs=1e-3)


@pytest.mark.harness
@pytest.mark.filterwarnings("ignore")
def test_the_harness_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_hf_docs import make_folder

    make_folder(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(EXAMPLE.parent)])
    import needles

    files = ["--model", str(tmp_path / "checkpoint"), "--routers", str(tmp_path / "routers")]
    results = needles.main([*files, "--tokens", "600", "--documents", "2", "--selectivity", "1.0"])
    assert results["sparse"] == results["dense"]


def test_the_example_is_python() -> None:
    compile(EXAMPLE.read_text(), str(EXAMPLE), "exec")
