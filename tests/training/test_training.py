"""Training: its targets and its loss against brute force, and what a trained router must learn on made-up tasks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saap_index import AsymmetricIndex, KeyQuantizer, QueryRouter, Rope, SearchParametersIVF, TrainingConfig
from saap_index.backends import TorchBackend
from saap_index.training.fitting import cross_entropy, train_router
from saap_index.training.targets import RouterTargets, bin_edges, targets

SEEDS = st.integers(0, 2**31 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- targets and loss, token by token -------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [True, False])
@given(
    seed=SEEDS, h=st.integers(1, 2), g=st.integers(1, 3), q=st.integers(1, 6), n=st.integers(4, 60), nlist=st.integers(1, 5),
    sinks=st.integers(0, 5), window=st.integers(0, 20), scale=st.sampled_from([0.1, 1.0]),
)
def test_targets(
    distance: bool, seed: int, h: int, g: int, q: int, n: int, nlist: int, sinks: int, window: int, scale: float
) -> None:
    rng = generator(seed)
    keys, queries, routed = (torch.randn(s, generator=rng) for s in ((h, n, 8), (h, g, q, 8), (h, g, q, 8)))
    positions, lists = torch.randint(0, n, (q,), generator=rng), torch.randint(0, nlist, (h, n), generator=rng)
    edges = bin_edges(window, n, distance)
    data = targets(keys, queries, routed, positions, lists, nlist, sinks, window, scale, edges)
    kept = [i for i in range(q) if int(positions[i]) - window >= sinks]
    bins = len(edges) - 1
    assert data.x.shape == (h, len(kept), g, 8) and data.counts.shape == (h, len(kept), bins, nlist)
    assert data.list_mass.shape == (h, len(kept), g, nlist) and data.bin_mass.shape == (h, len(kept), g, bins)
    for place, i in enumerate(kept):
        p = int(positions[i])
        outside = np.arange(sinks, p - window + 1)
        bin_of = np.clip(np.searchsorted(edges.numpy(), p - outside, side="right") - 1, 0, bins - 1)
        for head in range(h):
            nos = lists[head].numpy()[outside]
            counts = np.zeros((bins, nlist), np.int64)
            np.add.at(counts, (bin_of, nos), 1)
            assert np.array_equal(data.counts[head, place].numpy(), counts)
            for j in range(g):
                assert torch.equal(data.x[head, place, j], routed[head, j, i])
                logits = scale * keys[head].double().numpy()[outside] @ queries[head, j, i].double().numpy()
                every = scale * keys[head, : p + 1].double().numpy() @ queries[head, j, i].double().numpy()
                share = np.exp(logits).sum() / np.exp(every).sum()
                assert float(data.outside[head, place, j]) == pytest.approx(share, abs=1e-5)
                mass = np.exp(logits - logits.max())
                mass /= mass.sum()
                by_list, by_bin = np.bincount(nos, mass, nlist), np.bincount(bin_of, mass, bins)
                np.testing.assert_allclose(data.list_mass[head, place, j], by_list, atol=1e-5)
                np.testing.assert_allclose(data.bin_mass[head, place, j], by_bin, atol=1e-5)


@given(nearest=st.integers(0, 300), farthest=st.integers(1, 10**6))
def test_bins_cover_every_distance_in_half_octaves(nearest: int, farthest: int) -> None:
    edges = bin_edges(nearest, farthest, True).numpy()
    assert edges[0] == max(1, nearest) and (edges[-1] >= farthest * (1 - 1e-9) or farthest <= max(2, nearest))
    np.testing.assert_allclose(edges[1:] / edges[:-1], 2**0.5)


def made_up(seed: int, h: int = 2, p: int = 40, g: int = 2, d: int = 8, nlist: int = 5, bins: int = 4) -> RouterTargets:
    """Targets of no sequence: any masses and counts."""
    rng = generator(seed)
    counts = torch.randint(0, 6, (h, p, bins, nlist), generator=rng)
    counts[..., 0, 0] += 1
    mass = [torch.softmax(2 * torch.randn((h, p, g, size), generator=rng), -1) for size in (nlist, bins)]
    x, outside = torch.randn((h, p, g, d), generator=rng), torch.rand((h, p, g), generator=rng)
    return RouterTargets(x, outside, *mass, counts, torch.arange(bins) / 2 + 5)


@given(seed=SEEDS)
@settings(max_examples=30)
def test_loss_is_the_cross_entropy_over_tokens(seed: int) -> None:
    """A softmax over every single token, each with the score of its list and of its bin."""
    data = made_up(seed, 1, 3, 2)
    rng = generator(seed + 1)
    z, a = torch.randn((1, 3, 2, 5), generator=rng) * 3, torch.randn((1, 3, 2, 4), generator=rng) * 3
    batch = torch.tensor([2, 0])
    total = published = 0.0
    for i in batch.tolist():
        for j in range(2):
            fit = float(data.list_mass[0, i, j] @ z[0, i, j] + data.bin_mass[0, i, j] @ a[0, i, j])
            tokens = [float(z[0, i, j, no] + a[0, i, j, b]) for b in range(4) for no in range(5)
                      for _ in range(int(data.counts[0, i, b, no]))]
            total += math.log(sum(map(math.exp, tokens))) - fit
            published += float(z[0, i, j].exp().sum().log() - data.list_mass[0, i, j] @ z[0, i, j])
    got = cross_entropy(z[:, batch], a[:, batch], data, batch, True)
    assert float(got) == pytest.approx(total / 4, rel=1e-4, abs=1e-4)
    got = cross_entropy(z[:, batch], 0 * a[:, batch], data, batch, False)
    assert float(got) == pytest.approx(published / 4, rel=1e-4, abs=1e-4)


# -- the optimiser --------------------------------------------------------------------------------------------------------

QUICK = {"hidden": 16, "epochs": 6, "batch": 32}


def test_same_seed_same_weights() -> None:
    def weights(seed: int) -> list[Tensor]:
        return list(train_router(made_up(0), 5, TrainingConfig(**QUICK, seed=seed), 5, 3).tensors().values())

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("config", [
    TrainingConfig(**QUICK), TrainingConfig(**QUICK, distance=False), TrainingConfig.published(**QUICK),
    TrainingConfig(**{**QUICK, "hidden": 0}),
], ids=["distance", "no distance", "published", "linear"])
def test_loss_falls_and_is_reported(config: TrainingConfig) -> None:
    seen: list[tuple[int, int, float]] = []
    config = TrainingConfig(**{**vars(config), "progress": lambda *args: seen.append(args)})
    knots = 3 if config.distance else 0
    router = train_router(made_up(3), 5, config, 5, knots)
    assert [(epoch, of) for epoch, of, _ in seen] == [(i + 1, 6) for i in range(6)]
    losses = [loss for _, _, loss in seen]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))
    assert (router.nlist, router.num_knots, router.size_weighted) == (5, knots, config.size_weighted)
    assert router.weights.hidden.shape[1] == config.hidden


def outputs(router: QueryRouter, x: Tensor) -> Tensor:
    """z, a and c of x (h, p, g, d)."""
    return torch.cat(TorchBackend().route(router.weights, x[None].transpose(2, 3), None), -1)[0]


@pytest.mark.parametrize("hidden", [0, 16])
def test_standardisation_is_folded_into_the_weights(hidden: int) -> None:
    """Other units and another origin of the input change nothing: the router takes queries as they come."""
    data = made_up(4)
    config = TrainingConfig(**{**QUICK, "hidden": hidden})
    size, shift = torch.logspace(-2, 2, 8), torch.linspace(-3, 30, 8)
    moved = replace(data, x=data.x * size + shift * size)
    plain, other = train_router(data, 5, config, 5, 3), train_router(moved, 5, config, 5, 3)
    want, got = outputs(plain, data.x), outputs(other, moved.x)
    assert float((want - got).abs().max()) < 2e-2 * float(want.abs().max())


def test_an_input_that_never_changes_does_no_harm() -> None:
    """A dim of deviation 0, far from 0, is as if it were not there."""
    data, found = made_up(5), []
    for value in (0.0, 7.0):
        x = data.x.clone()
        x[..., 3] = value
        found.append(outputs(train_router(replace(data, x=x), 5, TrainingConfig(**QUICK), 5, 3), x))
    assert float((found[0] - found[1]).abs().max()) < 2e-2 * float(found[0].abs().max())


# -- made-up tasks --------------------------------------------------------------------------------------------------------

D, NLIST, N = 32, 8, 1024
BASIS = torch.eye(D)


def asymmetric(seed: int, n: int = N, q: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Keys in 8 clusters, and queries whose mass is where the keys vary, not where their mean lies.

    Keys of cluster l: 4 e_l + 3 N(0, 1) e_{8 + l}. A query for l points along e_{8 + l}, in which the mean of the cluster is 0
    and some of its keys are far out, and a little towards the centroid of the next cluster: there a symmetric router sends it.
    """
    rng = generator(seed)
    cluster = torch.randint(0, NLIST, (n,), generator=rng)
    spread = 3 * torch.randn((n, 1), generator=rng)
    keys = 4 * BASIS[cluster] + spread * BASIS[NLIST + cluster] + 0.1 * torch.randn((n, D), generator=rng)
    wanted = torch.randint(0, NLIST, (q,), generator=rng)
    sign = torch.randint(0, 2, (q, 1), generator=rng) * 2 - 1
    queries = 6 * sign * BASIS[NLIST + wanted] + BASIS[(wanted + 1) % NLIST] + 0.1 * torch.randn((q, D), generator=rng)
    return keys[None, None], queries[None, None], torch.sort(torch.randint(200, n, (1, q), generator=rng)).values


def recency(seed: int, n: int = N, q: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Attention that decays with distance by exp(-distance / 64), whatever the list; the lists are of no help."""
    rng = generator(seed)
    cluster = torch.randint(0, NLIST, (n,), generator=rng)
    keys = 4 * BASIS[cluster] + 0.1 * torch.randn((n, D), generator=rng)
    keys[:, -1] = torch.arange(n) / n
    queries = 0.1 * torch.randn((q, D), generator=rng)
    queries[:, -1] = D**0.5 * n / 64 * (1 + 0.05 * torch.randn(q, generator=rng))
    return keys[None, None], queries[None, None], torch.sort(torch.randint(200, n, (1, q), generator=rng)).values


def several(made: Callable[[int], tuple[Tensor, Tensor, Tensor]], count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of such sequences, to train on."""
    keys, queries, positions = (torch.cat(x) for x in zip(*map(made, range(count)), strict=True))
    return keys, queries, positions


def index_for(**options: object) -> AsymmetricIndex:
    return AsymmetricIndex(D, NLIST, window=32, sinks=0, seal_tokens=16, max_segment=128, break_even=0, **options)


def captured(index: AsymmetricIndex, keys: Tensor, queries: Tensor, params: SearchParametersIVF) -> tuple[float, float]:
    """Mean share of the sealed tokens' attention mass that is read, and that as many of the newest sealed tokens hold."""
    index.reset()
    index.add(keys, keys)
    sealed = index.invlists.sealed(0)
    found, newest = [], []
    for i in range(40):
        query = queries[:, :, i : i + 1]
        ids = index.read_ids(index.select(query, params=params))[0][0]
        mass = torch.softmax(index.scale * keys[0, 0, :sealed] @ query[0, 0, 0], 0)
        read = ids[ids < sealed]
        found.append(float(mass[read].sum()))
        newest.append(float(mass[sealed - len(read) :].sum()))
    return float(np.mean(found)), float(np.mean(newest))


def test_the_trained_router_finds_what_the_symmetric_one_cannot() -> None:
    keys, queries, positions = several(asymmetric)
    fresh_keys, fresh_queries, _ = asymmetric(9)
    index = index_for()
    index.train(keys)
    budget = SearchParametersIVF(selectivity=0.2)
    symmetric, newest = captured(index, fresh_keys, fresh_queries, budget)
    index.reset()
    index.train(keys, queries, positions=positions)
    trained, _ = captured(index, fresh_keys, fresh_queries, budget)
    assert trained > 0.6 and trained > 2 * symmetric and trained > 2 * newest, (trained, symmetric, newest)


def test_the_published_classifier_finds_it_by_nprobe() -> None:
    keys, queries, positions = several(asymmetric)
    fresh_keys, fresh_queries, _ = asymmetric(9)
    index = index_for(nprobe=1)
    index.train(keys)
    symmetric, _ = captured(index, fresh_keys, fresh_queries, SearchParametersIVF(nprobe=1))
    index.reset()
    index.train(keys, queries, positions=positions, config=TrainingConfig.published())
    assert index.query_router.num_knots == 0 and not index.query_router.size_weighted
    trained, newest = captured(index, fresh_keys, fresh_queries, SearchParametersIVF(nprobe=1))
    assert trained > 0.6 and trained > 2 * symmetric and trained > 2 * newest, (trained, symmetric, newest)


def test_the_distance_term_learns_that_the_recent_matter() -> None:
    keys, queries, positions = several(recency)
    fresh_keys, fresh_queries, _ = recency(9)
    budget, shares = SearchParametersIVF(selectivity=0.1), {}
    for distance in (True, False):
        index = index_for()
        index.train(keys, queries, positions=positions, config=TrainingConfig(distance=distance))
        shares[distance], newest = captured(index, fresh_keys, fresh_queries, budget)
        if distance:
            router = index.query_router
            a = outputs(router, fresh_queries)[0, :, NLIST : NLIST + router.num_knots].mean(0)
            octaves = router.first_knot + torch.arange(router.num_knots)
            assert router.num_knots > 3 and bool((a.diff()[octaves[1:] <= 9] < 0).all()), f"{a.tolist()} falls with distance"
    assert shares[True] > 2 * shares[False] and shares[True] > 0.7 * newest, (shares, newest)


def test_rope_is_undone_for_training() -> None:
    """Rotated keys and queries with the rope give the router that the unrotated ones give without."""
    keys, queries, positions = asymmetric(2, 512, 256)
    rope = Rope(head_dim=D)
    plain, roped = index_for(), index_for(rope=rope)
    config = TrainingConfig(**QUICK)
    roped.train(rope.rotate(keys, range(512)), rope.rotate(queries, positions), positions=positions, config=config)
    want = KeyQuantizer.train(keys[0], NLIST, config.niter, config.seed)
    assert float((roped.key_quantizer.centroids - want.centroids).abs().max()) < 1e-3
    plain.train(keys, queries, positions=positions, config=config)
    x = queries.transpose(1, 2).reshape(1, -1, 1, D)
    # the logits differ (these are rotated), the inputs do not; both must have learnt which lists are for whom
    assert outputs(plain.query_router, x).shape == outputs(roped.query_router, x).shape
    assert torch.equal(plain.key_quantizer.assign(keys[0]), roped.key_quantizer.assign(keys[0]))


def test_default_positions_are_the_last_ones_and_batches_count_alike() -> None:
    keys, queries, _ = asymmetric(3, 256, 32)
    config = TrainingConfig(**QUICK)
    first, second = index_for(), index_for()
    first.train(keys.repeat(2, 1, 1, 1), queries.repeat(2, 1, 1, 1), config=config)
    second.train(keys.repeat(2, 1, 1, 1), queries.repeat(2, 1, 1, 1), positions=np.arange(224, 256), config=config)
    for a, b in zip(first.query_router.tensors().values(), second.query_router.tensors().values(), strict=True):
        assert torch.equal(a, b)


def test_every_head_has_its_own_router() -> None:
    (keys, queries, positions), (more_keys, more_queries, _) = asymmetric(0), asymmetric(5)
    keys, queries = torch.cat([keys, more_keys], 1), torch.cat([queries, more_queries], 1)
    index = AsymmetricIndex(D, NLIST, 2, 2, window=32, sinks=0, break_even=0)
    index.train(keys, queries, positions=positions, config=TrainingConfig(**QUICK))
    assert index.key_quantizer.centroids.shape == (2, NLIST, D)
    assert not torch.equal(*index.query_router.weights.skip)
