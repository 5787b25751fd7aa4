"""Routers from one prompt: the sample, the fit, what refining keeps, and the memory that it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import saap_index as saap
from saap_index.errors import LengthError, ParameterError
from saap_index.hf.sample import QuerySample
from saap_index.invlists.layout import Layout
from saap_index.training.prompt import PromptTraining, fit_bytes, fit_prompt, priorities
from saap_index.training.targets import RouterTargets

SMALL = PromptTraining(nlist=16, queries=96, epochs=6)
LAYOUT = Layout(sinks=2, window=16)


def scene(seed: int = 0, n: int = 600, h: int = 2, g: int = 2, d: int = 16, q: int = 96) -> tuple[Tensor, Tensor, np.ndarray]:
    """Keys of a few kinds, and queries that look for kinds by a fixed map: what a router can learn."""
    draw = torch.Generator().manual_seed(seed)
    kinds = 3 * torch.randn((h, 12, d), generator=draw)
    turn = torch.linalg.qr(torch.randn((h, d, d), generator=torch.Generator().manual_seed(77)))[0]
    keys = torch.gather(kinds, 1, torch.randint(12, (h, n, 1), generator=draw).expand(-1, -1, d))
    keys = keys + 0.3 * torch.randn((h, n, d), generator=draw)
    wanted = torch.gather(kinds, 1, torch.randint(12, (h, g * q, 1), generator=draw).expand(-1, -1, d))
    queries = keys.new_zeros((h * g, q, d))
    for head in range(h):
        queries[head * g : (head + 1) * g] = (wanted[head] @ turn[head].T).view(g, q, d)
    # what attention sees is turned back by the keys' own map
    keys = torch.einsum("hnd,hed->hne", keys, turn)
    mixed = torch.einsum("hnd,hed->hne", keys, turn)
    positions = np.sort(np.random.default_rng(seed).permutation(np.arange(40, n))[:q])
    return 0.5 * (keys + mixed), queries, positions


def fit(seed: int = 0, options: PromptTraining = SMALL, start: Any = None, **sizes: int) -> Any:
    keys, queries, positions = scene(seed, **sizes)
    rope = saap.Rope(head_dim=keys.shape[2])
    return fit_prompt(keys, queries, positions, rope, keys.shape[2] ** -0.5, LAYOUT, options, start)


@settings(max_examples=30)
@given(st.integers(0, 2**31 - 1), st.lists(st.integers(1, 400), min_size=1, max_size=6), st.integers(1, 64))
def test_chunks_of_any_size_give_one_sample(seed: int, sizes: list[int], count: int) -> None:
    n = sum(sizes)
    query = torch.arange(n, dtype=torch.float32).view(1, 1, n, 1)
    whole = QuerySample(count, seed).with_call(query, 0, None)
    sample: QuerySample | None = QuerySample(count, seed)
    at = 0
    for size in sizes:
        assert sample is not None
        sample = sample.with_call(query[:, :, at : at + size], at, None)
        at += size
    assert sample is not None and whole is not None and sample.queries is not None
    assert len(sample.positions) == min(n, count)
    np.testing.assert_array_equal(sample.positions, whole.positions)
    np.testing.assert_array_equal(sample.queries[0, :, 0].numpy(), sample.positions)  # each query is that of its position


def test_late_positions_are_likelier() -> None:
    n, hits = 2000, np.zeros(2000)
    for seed in range(200):
        hits[np.argsort(-priorities(np.arange(n), seed))[:200]] += 1
    quarters = hits.reshape(4, -1).sum(1)
    assert quarters[3] > 1.8 * quarters[1] > 2 * quarters[0]  # as 7, 3 and 1
    assert np.isfinite(priorities(np.arange(n), 3)).all()


def test_padding_teaches_nothing() -> None:
    query, visible = torch.randn(2, 2, 8, 4), torch.ones((2, 8), dtype=torch.bool)
    visible[0, :3] = False
    sample = QuerySample(4, 0).with_call(query, 0, visible)
    assert sample is not None and sample.sequence == 1 and sample.queries is not None
    assert torch.equal(sample.queries, query[1][:, sample.positions])
    assert QuerySample(4, 0).with_call(query[:1], 0, visible[:1]) is None
    later = torch.ones((2, 16), dtype=torch.bool)
    later[1, 12] = False
    assert sample.with_call(query, 8, later) is None


def test_better_than_what_it_begins_with() -> None:
    """The symmetric router is where a fit begins; refining it tells the cross-entropy before and after."""
    start = saap.TwoTower.symmetric(2, 16, 0.25)
    untrained = fit(start=start)
    trained = fit(start=fit().tower)
    assert trained.before < untrained.before - 0.2 and untrained.after < untrained.before - 0.2
    assert untrained.tower is not None


def test_same_seed_same_routers() -> None:
    one, two, other = fit(), fit(), fit(options=PromptTraining(nlist=16, queries=96, epochs=6, seed=1))
    mine, again = one.tower.tensors(), two.tower.tensors()
    assert all(torch.equal(x, again[name]) for name, x in mine.items())
    assert not torch.equal(mine["skip"], other.tower.tensors()["skip"])


def test_lists_that_prompts_share() -> None:
    """Of one prompt its own; of a second one those of the first, moved."""
    options = PromptTraining(nlist=16, queries=96, epochs=1)
    first, (keys, queries, positions) = fit(options=options), scene(1)
    rope = saap.Rope(head_dim=16)
    coarse = [rope.unrotate(x.float(), np.arange(600), 600) for x in (scene(0)[0], keys)]
    assert torch.equal(first.lists.centroids, saap.KeyQuantizer.of_prompt(coarse[0], 16).centroids)
    again = fit_prompt(keys, queries, positions, rope, 0.25, LAYOUT, options, first.tower, shared=first.lists, prompts=1)
    assert torch.equal(again.lists.centroids, first.lists.refined(coarse[1], 600).centroids)


def test_refining_keeps_what_is_no_better() -> None:
    """On the prompt that they are of, routers have little to learn: what comes back is better, or nothing."""
    start = fit(options=PromptTraining(nlist=16, queries=96, epochs=30)).tower
    refined = fit(start=start, options=PromptTraining(nlist=16, queries=96, epochs=1))
    assert (refined.tower is None) == (refined.after >= refined.before - 0.01)


def test_refining_on_a_longer_prompt_adds_knots() -> None:
    short = fit().tower
    long = fit(1, start=short, n=2500)
    assert long.tower is not None
    assert short.weights.num_knots == 7 and long.tower.weights.num_knots == 9  # 16, 32, ... up to what n asks for
    assert long.tower.first_knot == short.first_knot


def test_few_queries_are_refused() -> None:
    keys, queries, positions = scene()
    with pytest.raises(LengthError, match="positions: expected 16 queries or more past window and sinks, got 5"):
        fit_prompt(keys, queries[:, :5], positions[:5] + 20, None, 0.25, LAYOUT, SMALL)


@pytest.mark.parametrize("name, value", [
    ("max_seconds", 0), ("max_seconds", True), ("max_seconds", "long"), ("max_bytes", 1000), ("min_tokens", 10), ("prompts", 0),
    ("queries", 3), ("nlist", 0), ("epochs", 0), ("seed", -1), ("progress", 1),
])
def test_bad_options_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=f"^{name}: expected"):
        PromptTraining(**{name: value})


@pytest.mark.parametrize("n, q, nlist", [(600, 96, 16), (2500, 64, 64), (1200, 256, 128)])
def test_memory_is_as_told(n: int, q: int, nlist: int) -> None:
    """The peak of torch's own allocations, beside what came in."""
    keys, queries, positions = scene(n=n, q=q)
    rope = saap.Rope(head_dim=16)
    options = PromptTraining(nlist=nlist, epochs=1)
    with torch.profiler.profile(profile_memory=True) as profiled:
        fit_prompt(keys, queries, positions, rope, 0.25, LAYOUT, options)
    events = sorted(
        (event.start_ns(), event.nbytes()) for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"
    )
    held = peak = 0
    for _, size in events:
        held += size
        peak = max(peak, held)
    assert 0 < peak <= fit_bytes(4, 2, 16, n, q, nlist)


def test_counts_do_not_depend_on_how_many_lists_are_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from saap_index.training import targets as module

    keys, queries, positions = scene()
    lists = torch.randint(16, (2, 600), generator=torch.Generator().manual_seed(0))
    grouped = queries.view(2, 2, -1, 16)

    def made() -> RouterTargets:
        edges = module.bin_edges(16, 600, True)
        return module.targets(keys, grouped, grouped, torch.from_numpy(positions), lists, 16, 2, 16, 0.25, edges)

    whole = made()
    monkeypatch.setattr(module, "LISTS_AT_ONCE", 5)
    assert torch.equal(made().counts, whole.counts)
    for i, position in enumerate(positions.tolist()):
        outside = lists[:, 2 : position - 16 + 1]
        want = torch.stack([torch.bincount(row, minlength=16) for row in outside])
        assert torch.equal(whole.counts[:, i].sum(1).long(), want)
