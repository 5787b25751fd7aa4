"""The audit of an attached model: what it measures against dense attention in float64, when, and what it says."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import SMALL, attached, greedy, left_padded, make_routers, prompt, tiny

import saap_index as saap
from saap_index.hf import AuditWarning, audit_stats, detached
from saap_index.hf.audit import KEPT_AUDITS, MIN_AUDITS, Audit, compare, promised_shares

LAYERS = 3  # of a tiny llama


def filled(b: int, g: int, q: int, dtype: torch.dtype, **options: Any) -> tuple[saap.AsymmetricIndex, torch.Tensor]:
    """An index of two sequences at most, of different lengths, and queries of the newest tokens."""
    h, d, n = 2, 16, 150
    index = saap.AsymmetricIndex(d, 4, h * g, h, dtype=dtype, **{"break_even": 0, **SMALL, "selectivity": 0.2, **options})
    keys, values = (torch.randn(b, h, n, d, dtype=torch.float32, device="cpu").to(dtype) for _ in range(2))
    centroids = torch.randn(h, 4, d, dtype=torch.float32, device="cpu")
    index.key_quantizer, index.query_router = saap.KeyQuantizer(centroids), saap.QueryRouter.symmetric(centroids)
    index.add(keys, values, lengths=[n, n - 37][:b])
    return index, torch.randn(b, h * g, q, d, dtype=torch.float32, device="cpu").to(dtype)


@pytest.mark.parametrize(
    ("dtype", "g", "q", "options"),
    [
        (torch.float32, 1, 1, {}),
        (torch.float32, 3, 5, {}),
        (torch.bfloat16, 2, 1, {}),
        (torch.float32, 2, 1, {"tail": 0.5, "mean_run_tokens": 1}),
        (torch.float32, 2, 1, {"selectivity": None, "nprobe": 1}),
        (torch.float32, 2, 1, {"max_codes": 9}),
    ],
)
def test_figures_are_those_of_dense_attention(dtype: torch.dtype, g: int, q: int, options: dict[str, Any]) -> None:
    index, query = filled(2, g, q, dtype, **options)
    want_out = index.search_attend(query)
    ids = index.read_ids(index.select(query))
    found = compare(index, query)
    assert torch.equal(found.out, want_out)
    totals, outsides, reads, errors = [], [], [], []
    for i, n in enumerate(index.lengths):
        for head in range(index.num_heads):
            for j in range(q):
                at, kv = n - q + j, head // g
                order = np.argsort(index.invlists.row_ids(i)[kv][:n].numpy())
                keys, values = (x[i, kv, :n].double()[order][: at + 1] for x in (index.invlists.keys, index.invlists.values))
                p = (keys @ query[i, head, j].double() * index.scale).softmax(0)
                place = torch.arange(at + 1)
                outside = (place >= index.sinks) & (place < n - index.window)
                read = torch.zeros(at + 1, dtype=torch.bool)
                read[ids[i][kv][ids[i][kv] <= at]] = True
                dense = p @ values
                totals.append(p[read].sum())
                outsides.append(p[outside].sum())
                reads.append(p[outside & read].sum())
                errors.append((found.out[i, head, j].double() - dense).norm() / dense.norm())
    rough = {} if dtype == torch.float32 else {"rel": 0.02}
    for got, want in (
        (found.total, totals), (found.outside, outsides), (found.read, reads), (found.error, errors),
    ):
        assert got == pytest.approx(float(torch.stack(want).mean()), **(rough or {"rel": 1e-4, "abs": 1e-6}))


def test_the_index_reports_the_search_and_not_the_comparison() -> None:
    index, query = filled(1, 2, 1, torch.float32)
    index.search_attend(query)
    before = index.stats()
    compare(index, query)
    assert index.stats() == before and 0 < before.last_search.selectivity < 0.5


@pytest.mark.parametrize("padding", [None, [0, 20]])
def test_answers_stay_as_they_are(padding: list[int] | None) -> None:
    ids = prompt(2, 100)
    inputs = ids if padding is None else left_padded(ids, padding)
    want = greedy(attached(tiny("llama"), 0.1), inputs)
    model = attached(tiny("llama"), 0.1, audit_every=2)
    assert torch.equal(greedy(model, inputs), want)
    assert audit_stats(model).audits == audit_stats(model).steps // 2 > 5


def test_one_step_in_n_one_layer_in_turn() -> None:
    model = attached(tiny("llama"), 0.1, audit_every=3)
    greedy(model, prompt(1, 100), 1 + 3 * 7)
    stats = audit_stats(model)
    assert stats.steps == 21 and stats.audits == 7 and stats.seconds > 0
    assert {number: layer.audits for number, layer in stats.layers.items()} == {0: 3, 1: 2, 2: 2}
    assert 0 < stats.captured < 1 and 0 < stats.outside < 1 and 0 < stats.error
    assert stats.total == pytest.approx(sum(x.total * x.audits for x in stats.layers.values()) / 7)
    assert math.isnan(stats.promised) and math.isnan(stats.bound)  # these routers come from no training
    with detached(model):
        pass
    assert audit_stats(model).captured == stats.captured and audit_stats(model).audits == 7
    model._saap_attached.plan.audit.reset()
    assert audit_stats(model).audits == 0


def test_everything_read_is_everything_captured() -> None:
    model = attached(tiny("qwen3"), 1.0, audit_every=1, audit_bound=0.99)
    greedy(model, prompt(1, 100), 60)
    stats = audit_stats(model)
    assert stats.captured == pytest.approx(1, abs=1e-5) and stats.error < 1e-5 and stats.recent == pytest.approx(1, abs=1e-5)


def test_a_warning_by_name_once_until_it_is_well_again() -> None:
    audit = Audit(1, [4], {}, bound=0.5)
    layer = type("Layer", (), {})()
    index, query = filled(1, 1, 1, torch.float32)
    found = compare(index, query)

    def keep(read: float, times: int) -> list[Any]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(times):
                audit._keep(4, layer, type(found)(found.out, 0.9, 0.4, read, 0.1), 100, 0.0)
        return caught

    assert not keep(0.1, MIN_AUDITS - 1)
    (caught,) = keep(0.1, 50)
    assert caught.category is AuditWarning and "audit_bound" in str(caught.message) and "25.0% in layer 4" in str(caught.message)
    assert not keep(0.4, KEPT_AUDITS) and audit.stats().recent == pytest.approx(1.0)
    assert len(keep(0.1, KEPT_AUDITS)) == 1
    with pytest.warns(AuditWarning, match="expected the newest steps to capture 60.0%"):
        model = attached(tiny("llama"), 0.02, audit_every=1, audit_bound=0.6)
        greedy(model, prompt(1, 100), 60)


def test_drift_is_late_minus_early_in_the_text() -> None:
    audit, layer = Audit(1, [0, 1], {}), type("Layer", (), {})()
    found = compare(*filled(1, 1, 1, torch.float32))
    assert audit.due(0, layer, 1000)
    for tokens, read in ((1000, 0.4), (1100, 0.4), (1200, 0.2), (1900, 0.1)):
        audit._keep(0, layer, type(found)(found.out, 0.9, 0.5, read, 0.1), tokens, 0.0)
    assert audit.stats().drift == pytest.approx((0.1 - 0.4) / 0.5)
    audit._keep(1, layer, type(found)(found.out, math.nan, 0.5, 0.5, 0.1), 1000, 0.0)
    assert audit.stats().audits == 5


def test_what_training_promised() -> None:
    evaluation = {"0": {"shares": [0.02, 0.05, 0.1, 0.2], "captured": [20.0, 50.0, 70.0, 90.0]}}
    found = {s: promised_shares(evaluation, {0: s})[0] for s in (0.01, 0.02, 0.05, 0.1, 0.15, 1.0)}
    assert found[0.01] == pytest.approx(0.1) and found[0.02] == pytest.approx(0.2) and found[0.1] == pytest.approx(0.7)
    assert 0.7 < found[0.15] < 0.9 and found[1.0] == 1
    assert promised_shares(evaluation, {7: 0.1}) == {}


def test_the_bound_comes_from_training() -> None:
    model = tiny("llama")
    routers = make_routers(model)
    row = {"shares": [0.02, 0.05, 0.1, 0.2], "captured": [90.0, 99.0, 99.0, 99.0]}
    config = {**routers.config, "evaluation": {str(number): row for number in range(LAYERS)}}
    saap.attach(model, saap.Routers(config, routers.layers), 0.05, audit_every=1, **SMALL)
    with pytest.warns(AuditWarning, match="less than training promised"):
        greedy(model, prompt(1, 100), 60)
    stats = audit_stats(model)
    assert stats.promised == pytest.approx(0.99) and stats.recent < stats.bound == pytest.approx(0.89)


def test_refused_by_name() -> None:
    model = tiny("llama")
    for options in ({"audit_every": -1}, {"audit_every": 1.5}, {"audit_bound": 0.5}, {"audit_every": 2, "audit_bound": 1.5}):
        with pytest.raises(saap.ParameterError, match="audit_"):
            attached(model, **options)
        assert not hasattr(model, "_saap_attached")
    with pytest.raises(saap.StateError, match="audit_every"):
        audit_stats(attached(model))
