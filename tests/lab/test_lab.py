"""Methods side by side: with an unlimited budget each is dense attention; what is counted is what was read."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saap_index import AsymmetricIndex, KeyQuantizer, QueryRouter, Rope, SearchParametersIVF
from saap_index.errors import LengthError, ParameterError, ShapeError
from saap_lab import needles, quality, replace
from saap_lab.method import Method, budget_tokens
from saap_lab.saap import Saap
from saap_lab.yardsticks import Dense, Selected, TopK

N, LAST = 400, 6


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 99, (N,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def prompt(model, tokens):
    return replace.read_prompt(model, tokens, Rope.from_config(model.config), torch.tensor([200, 333, N - 1]), LAST)


def indexes(prompt, **options) -> dict[int, AsymmetricIndex]:
    found = {}
    for layer, keys in zip(prompt.layers, prompt.keys, strict=True):
        coarse = torch.stack([layer.rope.unrotate(k, range(N), N) for k in keys])
        index = AsymmetricIndex(layer.d, 8, 4, 2, rope=layer.rope, window=32, sinks=2, break_even=0, **options)
        index.key_quantizer = KeyQuantizer.train(coarse, 8)
        index.query_router = QueryRouter.symmetric(index.key_quantizer.centroids)
        found[layer.number] = index
    return found


def methods(prompt, share: float) -> list[Method]:
    names = ("topk_group", "ivf", "quest", "recent", "random")
    options = {"sinks": 2, "window": 32}
    return [
        Dense(), TopK(share, **options), *(Selected(name, share, **options) for name in names),
        Saap("saap", indexes(prompt), share), Saap("published", indexes(prompt, nprobe=2), share),
    ]


def test_prompt_is_what_the_model_saw(model, tokens, prompt) -> None:
    with torch.no_grad():
        want = model(torch.tensor([tokens])).logits[0, -LAST:]
    torch.testing.assert_close(prompt.logits, want, rtol=1e-4, atol=1e-5)
    assert [layer.number for layer in prompt.layers] == [0, 1] and prompt.queries[0].shape == (2, 2, 3, 16)
    assert model.config._attn_implementation == "sdpa"


def test_every_method_with_an_unlimited_budget_is_dense(model, tokens, prompt) -> None:
    first = N - LAST
    for method in methods(prompt, 1.0):
        states = replace.start(dict.fromkeys(range(2), method), prompt, first, LAST)
        logits, traffic = replace.decode(model, states, tokens[first:], first)
        torch.testing.assert_close(logits, prompt.logits, rtol=1e-3, atol=1e-4, msg=method.name)
        assert traffic.tokens == pytest.approx(first + (LAST + 1) / 2)
        same = quality.agreement(prompt.logits, logits, torch.tensor(tokens[first:]))
        assert same.kl < 1e-6 and same.top1 == 1


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_budgets_are_kept_and_bytes_counted(prompt, share) -> None:
    for method in methods(prompt, share):
        found = quality.layer_quality(method, prompt, 1, sinks=2, window=32)
        lengths = prompt.positions + 1
        budget = sum(34 + round(share * (int(n) - 34)) for n in lengths) / len(lengths)
        if method.name == "dense":
            assert found.error < 1e-5 and found.captured == pytest.approx(found.outside)
            continue
        if method.name == "topk":  # a union over the heads of a group
            assert budget <= found.tokens <= 34 + 2 * (budget - 34)
        else:
            assert found.tokens == pytest.approx(budget, abs=1) or (
                found.tokens > budget and method.name in ("saap", "published")
            )
        assert found.kv_bytes == pytest.approx(found.tokens * 2 * 32 * 2)
        assert 0 < found.captured < found.outside and 0 < found.error < 2
        assert (found.total_per_head <= 1 + 1e-9).all()


def test_topk_is_the_best_of_all(prompt) -> None:
    found = {m.name: quality.layer_quality(m, prompt, 1, sinks=2, window=32).captured for m in methods(prompt, 0.3)[1:]}
    assert max(found, key=found.__getitem__) == "topk"
    assert found["topk_group"] >= max(v for k, v in found.items() if k != "topk") - 1e-9


def test_target_mass_is_a_budget_too(model, tokens, prompt) -> None:
    everything = SearchParametersIVF(selectivity=1.0)
    method = Saap("all", indexes(prompt), None, everything)
    assert quality.layer_quality(method, prompt, 0).error < 1e-4


def test_greedy_continuation_is_the_models_own(model, tokens, prompt) -> None:
    first = N - LAST
    states = replace.start(dict.fromkeys(range(2), Dense()), prompt, first, 20)
    found = replace.generate(model, states, tokens[first:], first, 5)
    want = model.generate(torch.tensor([tokens]), max_new_tokens=5, do_sample=False, pad_token_id=0)[0, N:].tolist()
    assert found == want


def test_needles_stand_where_they_should() -> None:
    filler = " ".join(f"Sentence {i} says nothing of note." for i in range(400))
    one = needles.passkey(filler, 2000, 0.5, seed=3)
    assert one.answer in one.document and one.prompt.endswith(one.question)
    assert abs(one.prompt.index(one.answer) / len(one.prompt) - 0.5) < 0.1
    many = needles.multi_key(filler, 3000, 4, seed=1)
    assert many.prompt.count(many.answer) == 1 and many.prompt.count("magic number") == 6
    assert needles.passkey(filler, 2000, 0.5, seed=3) == one
    with pytest.raises(ParameterError, match="depth"):
        needles.passkey(filler, 2000, 1.5)


def test_bad_input_is_named(model, tokens) -> None:
    with pytest.raises(LengthError, match="positions"):
        replace.read_prompt(model, tokens, None, torch.tensor([N]))
    with pytest.raises(ShapeError, match="dense, sparse"):
        quality.agreement(torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ParameterError, match="name"):
        Selected("best", 0.1)
    with pytest.raises(ParameterError, match="share"):
        Saap("x", {}, None) and budget_tokens(0.0, 100, 4, 8)


def test_records_resume_and_reports_are_made(model, tokens, prompt, tmp_path) -> None:
    from saap_lab import evaluate, plots, report

    path = tmp_path / "records.json"
    settings = evaluate.Settings(shares=(0.1, 0.3), span=100, step=50, decoded=LAST, decode_shares=(0.3,), sinks=2, window=32)
    trained, lines = indexes(prompt), []

    def methods_at(share: float) -> list[Method]:
        return [Dense(), Selected("recent", share, 2, 32), Saap("saap", trained, share)]

    rope = Rope.from_config(model.config)
    records = evaluate.Records(path)
    evaluate.evaluate_text(model, rope, "a/b", tokens, methods_at, settings, records, lines.append)
    assert len(records.rows) == 2 * 2 * 3 + 3 and len(lines) == 1 + 2 + 3
    again = evaluate.Records(path)
    evaluate.evaluate_text(model, rope, "a/b", tokens, methods_at, settings, again, lines.append)
    assert again.rows == records.rows and len(lines) == 6
    dense = records.rows["text/a/b/dense/0.3"]
    assert dense["kl"] == pytest.approx(0, abs=1e-6) and dense["top1"] == 1
    printed = report.as_text(records.rows, 2)
    assert "late layers" in printed and "every layer replaced" in printed and "recent" in printed
    assert [p.name for p in plots.write(records.rows, 2, tmp_path)][:3] == ["mass_all.png", "mass_late.png", "kl.png"]
    assert all(p.read_bytes().startswith(b"%PDF") for p in plots.write(records.rows, 2, tmp_path, "pdf"))
