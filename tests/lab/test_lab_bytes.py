"""Bytes of coded storage for every method, pages by moments, and weighted samples with exact scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saap_index import AsymmetricIndex
from saap_lab import report
from saap_lab.eigen import Eigen
from saap_lab.method import Attended, Cache, Layer, attend_over
from saap_lab.saap import Saap
from saap_lab.selections import moments
from saap_lab.yardsticks import Dense, Selected, TopK, WeightedTopK, inclusion_probabilities, systematic_sample

LAYER = Layer(0, 2, 3, 64, 64, 0.125, None)
SEEDS = st.integers(0, 2**31)


def cache(n: int, seed: int = 0) -> tuple[Cache, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = Cache(LAYER, n)
    made.append(torch.randn(2, n, 64, generator=g), torch.randn(2, n, 64, generator=g))
    return made, 2 * torch.randn(2, 3, 64, generator=g)


def test_a_method_is_coded_like_the_index() -> None:
    """Its tokens but sinks and window with 8 or 4 bits a number and a scale; the index's own recent tokens are plain too."""
    tokens, queries = cache(400)
    for method in (Dense(), TopK(0.2, 4, 32), WeightedTopK(0.2, 4, 32), *(Selected(x, 0.2, 4, 32) for x in ("quest", "moments"))):
        state = method.start(LAYER, 400)
        state.append(tokens.keys, tokens.values)
        step = state.attend(queries)
        far = (step.tokens - 36) * 2 * 256
        coded = {"SQ8": 36 * 2 * 256 + far * 136 / 256, "SQ8/SQ4": 36 * 2 * 256 + far * 104 / 256}
        assert step.coded_bytes(LAYER, 36) == pytest.approx(coded)
    eigen = Eigen(8, 8)
    eigen.calibrate(LAYER, [tokens.keys], [tokens.values], [queries[:, :, None]])
    state = eigen.start(LAYER, 400)
    state.append(tokens.keys, tokens.values)
    assert state.attend(queries).coded_bytes(LAYER, 36) == {}, "no whole keys and values"
    index = AsymmetricIndex(64, 8, 6, 2, window=32, sinks=4, seal_tokens=32, break_even=0)
    index.train(tokens.keys[None], queries[None].reshape(1, 6, 1, 64), positions=torch.tensor([[399]]))
    state = Saap("saap", {0: index}, 0.2).start(LAYER, 400)
    state.append(tokens.keys, tokens.values)
    step = state.attend(queries)
    assert step.plain_tokens is not None and step.plain_tokens >= 36
    want = step.plain_tokens * 2 * 256 + (step.tokens - step.plain_tokens) * 2 * 136
    assert step.coded_bytes(LAYER, 36)["SQ8"] == pytest.approx(want)
    assert Attended(queries, 10, 10 * 512).coded_bytes(LAYER, 36)["SQ8"] == 10 * 512, "a short text is all sinks and window"


def test_tables_say_what_was_not_counted() -> None:
    row = {"captured": 0.5, "outside": 1.0, "error": 0.1, "tokens": 9.0, "kv_bytes": 2e3, "other_bytes": 0.0, "shared_bytes": 0.0}
    rows = {"layer/0/0/topk/0.1": {**row, "coded_bytes": {"SQ8": 1e3, "SQ8/SQ4": 7e2}}, "layer/0/0/eigen/0.1": row}
    lines = [line.split() for line in report.as_text(rows, 1).splitlines()]
    assert next(line for line in lines if "topk" in line)[-2:] == ["1.0", "0.7"]
    assert next(line for line in lines if "eigen" in line)[-2:] == ["-", "-"]
    assert next(line for line in lines if line[:1] == ["share"])[-4:] == ["kB", "SQ8", "kB", "SQ8/4"]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 300), budget=st.integers(0, 80), page=st.sampled_from([1, 4, 16]), seed=SEEDS)
def test_pages_by_moments(n: int, budget: int, page: int, seed: int) -> None:
    """Of single tokens they are the best tokens; a page's score lies above its mean logit."""
    made, queries = cache(n, seed)
    chosen = moments(made.keys, queries.flatten(0, 1), n - 1, budget, page_tokens=page, sinks=2, window=16)
    between = max(0, n - 16 - 2)
    assert (chosen.sum(1) == min(budget, between)).all() and not chosen[:, :2].any() and not chosen[:, max(0, n - 16) :].any()
    if page == 1 and between:
        logits = (queries @ made.keys.mT).amax(1)[:, 2 : n - 16]
        best = logits.topk(min(budget, between)).indices + 2
        assert torch.equal(chosen, torch.zeros_like(chosen).scatter(1, best, True))


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 1e-9, 0.1, 0.5, 1.0, 30.0]), min_size=1, max_size=20), count=st.integers(0, 25),
    seed=SEEDS,
)
def test_inclusion_probabilities(weights: list[float], count: int, seed: int) -> None:
    w = torch.tensor([weights], dtype=torch.float64)
    p = inclusion_probabilities(w, count)
    positive = int((w > 0).sum())
    assert float(p.sum()) == pytest.approx(min(count, positive)) and bool(((p >= 0) & (p <= 1)).all()) and not p[w == 0].any()
    free = (p > 0) & (p < 1)
    if free.any():  # proportional, and what is certain weighs at least as much
        ratio = (p / w)[free]
        assert float(ratio.max()) == pytest.approx(float(ratio.min())) and bool((w[p == 1] * ratio.max() >= 1 - 1e-9).all())
    drawn = systematic_sample(p, seed)
    assert abs(int(drawn.sum()) - float(p.sum())) < 1 + 1e-6 and bool(drawn[p == 1].all()) and not drawn[p == 0].any()


def test_a_weighted_sample_is_unbiased_and_beats_the_best_tokens() -> None:
    """Each token is drawn as often as its probability says; and the error is below that of `topk_group`."""
    weights = torch.rand(1, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64).square()
    p = inclusion_probabilities(weights, 10)
    mean = torch.stack([systematic_sample(p, seed) for seed in range(2000)]).double().mean(0)
    torch.testing.assert_close(mean, p, rtol=0, atol=0.05)
    kinds = {
        "best": Selected("topk_group", 0.2, 4, 32), "weighted": WeightedTopK(0.2, 4, 32), "all": WeightedTopK(1.0, 4, 32),
    }
    errors = dict.fromkeys(kinds, 0.0)
    for seed in range(6):
        made, queries = cache(600, seed)
        made.values[:] = made.keys  # so that what is left out is unlike what is read
        want = attend_over(made, queries, None)
        for name, method in kinds.items():
            state = method.start(LAYER, 600)
            state.append(made.keys, made.values)
            step = state.attend(queries)
            errors[name] += float(((step.out - want).norm(dim=-1) / want.norm(dim=-1)).mean())
            assert step.tokens == pytest.approx(36 + method.share * 564, abs=1.5)
    assert errors["all"] < 1e-4 and errors["weighted"] < 0.9 * errors["best"]
