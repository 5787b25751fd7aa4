"""The two-tower router: against plain arithmetic, and an index whose lists are its prompt's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training import NLIST, D, N, asymmetric, captured, index_for, several
from torch import Tensor

from saap_index import AsymmetricIndex, KeyQuantizer, Rope, SearchParametersIVF, TrainingConfig, TwoTower, read_index, write_index
from saap_index.backends import RouterWeights, TorchBackend
from saap_index.errors import CompatibilityError, ParameterError, ShapeError, StateError
from saap_index.invlists.runs import run_lists

SEEDS = st.integers(0, 2**31 - 1)


def some_tower(seed: int, heads: int = 2, d: int = 8, hidden: int = 6, knots: int = 3) -> TwoTower:
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    outputs = d + knots + 1
    weights = RouterWeights(
        draw(heads, hidden, d),
        draw(heads, hidden),
        draw(heads, outputs, hidden),
        draw(heads, outputs, d),
        draw(heads, outputs),
        d,
    )
    return TwoTower(weights, 5)


@given(seed=SEEDS, heads=st.integers(1, 3), nlist=st.integers(1, 9), hidden=st.integers(0, 5))
def test_a_list_scores_the_product_of_its_centroid_and_the_wanted_key(seed: int, heads: int, nlist: int, hidden: int) -> None:
    tower = some_tower(seed, heads, hidden=hidden)
    rng = torch.Generator().manual_seed(seed + 1)
    centroids, queries = torch.randn((heads, nlist, 8), generator=rng), torch.randn((1, heads, 2, 3, 8), generator=rng)
    router = tower.for_lists(centroids)
    assert (router.nlist, router.num_knots, router.first_knot, router.predicts_outside) == (nlist, 3, 5, True)
    z, a = TorchBackend().route(router.weights, queries, None)
    wanted, same = TorchBackend().route(tower.weights, queries, None)
    middle = centroids - centroids.mean(1, keepdim=True)
    error = (z - wanted @ middle[None].transpose(2, 3)).abs()
    step = middle.abs().amax(1, keepdim=True)[None] / 127
    assert bool((error <= 0.51 * (wanted.abs() * step).sum(-1, keepdim=True) + 1e-4).all())
    torch.testing.assert_close(a, same, atol=1e-5, rtol=1e-5)
    assert router.weights.list_bytes == centroids.numel() + heads * 8 * 4


def test_the_symmetric_tower_is_plain_ivf() -> None:
    centroids, queries = torch.randn(2, 5, 8), torch.randn(1, 2, 1, 1, 8)
    z, _ = TorchBackend().route(TwoTower.symmetric(2, 8).for_lists(centroids).weights, queries, None)
    want = torch.einsum("hd,hld->hl", queries[0, :, 0, 0], centroids)  # but for a constant, which a softmax does not see
    torch.testing.assert_close(z[0, :, 0] - z[0, :, 0].mean(-1, True), want - want.mean(-1, True), atol=0.05, rtol=0)


@given(seed=SEEDS, heads=st.integers(1, 2), n=st.integers(1, 300), nlist=st.integers(1, 12))
def test_lists_of_a_prompt(seed: int, heads: int, n: int, nlist: int) -> None:
    """The same each time, every key with its nearest centroid, and no farther from them than from where k-means began."""
    keys = torch.randn((heads, n, 4), generator=torch.Generator().manual_seed(seed))
    found = KeyQuantizer.of_prompt(keys, nlist)
    assert torch.equal(found.centroids, KeyQuantizer.of_prompt(keys, nlist).centroids)
    assert found.centroids.shape == (heads, nlist, 4)

    def far(quantizer: KeyQuantizer) -> float:
        chosen = quantizer.centroids.gather(1, quantizer.assign(keys).long()[..., None].expand(-1, -1, 4))
        return float((keys - chosen).square().sum())

    assert far(found) <= far(KeyQuantizer.of_prompt(keys, nlist, niter=0)) * (1 + 1e-5)


@given(seed=SEEDS, heads=st.integers(1, 2), nlist=st.integers(1, 9))
def test_lists_in_the_metric_of_the_queries(seed: int, heads: int, nlist: int) -> None:
    """A key lies with the centroid nearest to it once both are transformed, whatever all of them have in common."""
    tower, rng = some_tower(seed, heads), torch.Generator().manual_seed(seed + 1)
    queries = torch.randn((heads, 2, 40, 8), generator=rng)
    made = tower.with_transform(queries)
    assert made.transform is not None and torch.equal(made.transform, made.transform.bfloat16().float())
    keys = torch.randn((heads, 60, 8), generator=rng) * 2 + 5
    quantizer, router = made.for_prompt(keys, nlist)
    assert torch.equal(router.weights.lists, tower.for_lists(quantizer.centroids).weights.lists)
    x, c = (each.double() @ made.transform.double() for each in (keys, quantizer.centroids))
    far = torch.cdist(x, c)
    lists = quantizer.assign(keys)
    assert bool((far.gather(2, lists[..., None].long())[..., 0] <= far.min(2).values + 1e-3 * far.max()).all())
    cpu = TorchBackend()
    assert torch.equal(cpu.assign(cpu.prepare_quantizer(*quantizer.products()), keys, None), lists)
    for part in (slice(0, 1), slice(heads - 1, heads)):
        alone = made.of_heads(part)
        torch.testing.assert_close(alone.transform, tower.of_heads(part).with_transform(queries[part]).transform)
        assert torch.equal(quantizer.of_heads(part).assign(keys[part]), lists[part])


def test_a_transform_gives_lists_to_the_directions_that_queries_look_in() -> None:
    """Keys differ most in the first dim, queries look at the second alone: lists tell keys apart in the second."""
    rng = torch.Generator().manual_seed(0)
    keys = torch.randn((1, 400, 8), generator=rng) * torch.tensor([3.0, 1, 0, 0, 0, 0, 0, 0])
    queries = torch.zeros((1, 1, 64, 8))
    queries[..., 1] = torch.randn(64, generator=rng)
    plain = TwoTower.symmetric(1, 8)

    def lost(tower: TwoTower) -> float:
        quantizer = tower.for_prompt(keys, 8)[0]
        mean = quantizer.centroids[0][quantizer.assign(keys)[0].long()]
        return float((keys[0] - mean)[:, 1].square().mean())

    assert lost(plain.with_transform(queries)) < 0.3 * lost(plain)


@given(seed=SEEDS, n=st.integers(1, 60), nlist=st.integers(1, 5), seen=st.integers(0, 200))
def test_lists_move_towards_more_keys(seed: int, n: int, nlist: int, seen: int) -> None:
    """Against plain means, in float64, of the keys that lie nearest and as many as a list stands for."""
    draw = torch.Generator().manual_seed(seed)
    before, keys = torch.randn((1, nlist, 4), generator=draw), torch.randn((1, n, 4), generator=draw)
    want, halves, weight = before[0].double().numpy(), [keys[0].double().numpy()], seen / nlist
    if n >= 8 * nlist:
        halves, weight = [halves[0][1::2], halves[0][::2]], weight / 2
    for step in range(3):
        some, moved = halves[step % len(halves)], want.copy()
        nearest = ((some[:, None] - want) ** 2).sum(-1).argmin(1)
        for i in range(nlist):
            own = some[nearest == i]
            if len(own) or weight:
                moved[i] = (own.sum(0) + weight * before[0, i].double().numpy()) / (len(own) + weight)
        want = moved
    np.testing.assert_allclose(KeyQuantizer(before).refined(keys, seen).centroids[0], want, atol=1e-4)


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="transform"):
        TwoTower(some_tower(0).weights, 5, torch.zeros(2, 8, 7))
    with pytest.raises(ShapeError, match="transform"):
        KeyQuantizer(torch.zeros(2, 3, 4), torch.zeros(1, 4, 4))
    with pytest.raises(ParameterError, match="keys"):
        KeyQuantizer.of_prompt(torch.zeros(1, 0, 4), 2)
    tower = some_tower(0)
    with pytest.raises(CompatibilityError, match="centroids"):
        tower.for_lists(torch.zeros(2, 3, 4))
    with pytest.raises(ShapeError, match="two-tower"):
        w = tower.weights
        TwoTower(RouterWeights(w.hidden, w.bias_hidden, w.out, w.skip, w.bias_out, w.nlist - 1))
    index = AsymmetricIndex(8, 4, 4, 2)
    with pytest.raises(StateError, match="tower"):
        index.tower = tower
    index.key_quantizer = KeyQuantizer(torch.randn(2, 4, 8))
    with pytest.raises(CompatibilityError, match="tower"):
        index.tower = some_tower(0, heads=1)
    with pytest.raises(ParameterError, match="two_tower"):
        TrainingConfig(two_tower=True, closed_form=True)
    with pytest.raises(ParameterError, match="router"):
        TrainingConfig.named("best")


# -- in an index ------------------------------------------------------------------------------------------------------------


def adaptive(rope: Rope | None = None, **options: object) -> AsymmetricIndex:
    index = AsymmetricIndex(8, 4, 4, 2, rope=rope, break_even=64, window=16, sinks=2, seal_tokens=16, selectivity=0.25, **options)
    index.key_quantizer = KeyQuantizer(torch.randn((2, 4, 8), generator=torch.Generator().manual_seed(3)))
    index.tower = some_tower(4)
    return index


def sequence(seed: int, n: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn((batch, 2, n, 8), generator=rng), torch.randn((batch, 2, n, 8), generator=rng)


@pytest.mark.parametrize("rope", [None, Rope(head_dim=8)])
def test_the_first_tokens_sealed_decide_the_lists(rope: Rope | None) -> None:
    keys, values = sequence(0, 200)
    index = adaptive(rope)
    before = index.key_quantizer.centroids.clone()
    index.add(keys[:, :, :50], values[:, :, :50])
    assert torch.equal(index.key_quantizer.centroids, before), "nothing is sealed yet"
    index.add(keys[:, :, 50:150], values[:, :, 50:150])
    coarse = keys[0, :, :150] if rope is None else rope.unrotate(keys[0, :, :150], range(150))
    want = KeyQuantizer.of_prompt(coarse, 4)
    torch.testing.assert_close(index.key_quantizer.centroids, want.centroids, atol=1e-5, rtol=1e-4)
    wanted = some_tower(4).for_lists(want.centroids).weights.out
    torch.testing.assert_close(index.query_router.weights.out, wanted, atol=1e-4, rtol=1e-4)
    held = index.key_quantizer.centroids.clone()
    index.add(keys[:, :, 150:], values[:, :, 150:])
    assert torch.equal(index.key_quantizer.centroids, held), "later tokens change nothing"
    lists = index.invlists
    ids = lists.ids[0, :, lists.sinks(0) : lists.sealed(0)].long()
    assert torch.equal(ids.sort(dim=1).values[0], torch.arange(lists.sinks(0), lists.sealed(0)))


def test_another_prompt_gets_other_lists_and_the_same_the_same() -> None:
    index, found = adaptive(), []
    for seed in (0, 1, 0):
        index.reset()
        index.add(*sequence(seed, 200))
        found.append(index.key_quantizer.centroids.clone())
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_a_batch_has_lists_in_common_and_late_sealing_makes_them_too() -> None:
    keys, values = sequence(5, 150, batch=2)
    index, late = adaptive(), adaptive()
    index.add(keys, values)
    want = KeyQuantizer.of_prompt(torch.cat([keys[0], keys[1]], 1), 4)
    torch.testing.assert_close(index.key_quantizer.centroids, want.centroids)
    late.add(keys, values, seal=False)
    late.seal()
    assert torch.equal(late.key_quantizer.centroids, index.key_quantizer.centroids)
    query = torch.randn((2, 4, 1, 8), generator=torch.Generator().manual_seed(6))
    assert torch.equal(late.search_attend(query), index.search_attend(query))


def test_a_copy_adapts_on_its_own_and_everything_read_is_dense_attention() -> None:
    index = adaptive()
    index.add(*sequence(0, 200))
    copy = index.fork()
    copy.reset()
    copy.add(*sequence(1, 200))
    assert not torch.equal(copy.key_quantizer.centroids, index.key_quantizer.centroids)
    keys, values = sequence(1, 200)
    query = torch.randn((1, 4, 1, 8), generator=torch.Generator().manual_seed(6))
    dense = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    got = copy.search_attend(query, params=SearchParametersIVF(selectivity=1.0))
    torch.testing.assert_close(got, dense, atol=1e-5, rtol=1e-5)


def test_it_learns_what_the_symmetric_router_cannot_and_serves_lists_it_never_saw() -> None:
    keys, queries, positions = several(asymmetric)
    fresh_keys, fresh_queries, _ = asymmetric(9)
    budget = SearchParametersIVF(selectivity=0.2)
    index = index_for()
    index.train(keys)
    symmetric, _ = captured(index, fresh_keys, fresh_queries, budget)
    index.reset()
    index.train(keys, queries, positions=positions, config=TrainingConfig.named("two-tower"))
    assert index.tower is not None
    own, _ = captured(index, fresh_keys, fresh_queries, budget)
    tower, shared = index.tower, index_for()
    shared.train(keys)
    shared.query_router = tower.for_lists(shared.key_quantizer.centroids)
    offline, _ = captured(shared, fresh_keys, fresh_queries, budget)
    assert min(own, offline) > 0.5 and min(own, offline) > 1.6 * symmetric, (own, offline, symmetric)


def test_calibration_survives_new_lists_and_same_seed_same_tower() -> None:
    keys, queries, positions = asymmetric(2, 512, 64)
    config = TrainingConfig.named("two-tower", epochs=2, hidden=8)
    towers = []
    for _ in range(2):
        index = index_for()
        index.train(keys, queries, positions=positions, config=config)
        index.calibrate(keys, queries, positions=positions)
        assert index.tower is not None
        towers.append(index.tower.tensors())
    assert all(torch.equal(a, b) for a, b in zip(*(t.values() for t in towers), strict=True))
    table = index.calibration
    index.add(keys, keys)
    assert table is not None and index.calibration is table


def test_linear_routers_are_least_squares() -> None:
    """Queries whose log density is linear in them are ranked right, in closed form and without a seed."""
    keys, queries, positions = several(lambda seed: linear_task(seed), 2)
    index = index_for()
    index.train(keys, queries, positions=positions, config=TrainingConfig.named("linear"))
    router = index.query_router
    assert router.weights.hidden.shape[1] == 0 and router.num_knots > 0 and router.predicts_outside
    fresh_keys, fresh_queries, _ = linear_task(9)
    found, newest = captured(index, fresh_keys, fresh_queries, SearchParametersIVF(selectivity=0.2))
    assert found > 0.5 and found > 1.5 * newest


def linear_task(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that want the cluster they point at."""
    rng = torch.Generator().manual_seed(seed)
    basis = torch.eye(D)
    cluster, wanted = (torch.randint(0, NLIST, (n,), generator=rng) for n in (N, 256))
    keys = 4 * basis[cluster] + 0.1 * torch.randn((N, D), generator=rng)
    queries = 5 * basis[wanted] + 0.1 * torch.randn((256, D), generator=rng)
    places = torch.from_numpy(np.sort(torch.randint(200, N, (1, 256), generator=rng).numpy()))
    return keys[None, None], queries[None, None], places


@pytest.mark.parametrize("transformed", [False, True])
def test_a_file_keeps_the_tower_and_the_lists_of_the_prompt(transformed: bool, tmp_path: Path) -> None:
    index = adaptive()
    if transformed:
        queries = torch.randn((2, 2, 9, 8), generator=torch.Generator().manual_seed(8)) * torch.arange(8)
        index.tower = index.tower.with_transform(queries)
    index.add(*sequence(0, 200))
    write_index(index, tmp_path / "index.safetensors")
    again = read_index(tmp_path / "index.safetensors")
    query = torch.randn((1, 4, 1, 8), generator=torch.Generator().manual_seed(6))
    assert torch.equal(again.search_attend(query), index.search_attend(query))
    assert (index.key_quantizer.transform is not None) == transformed
    for x in (index, again):
        x.reset()
        x.add(*sequence(1, 200))
    assert again.key_quantizer is not None and index.key_quantizer is not None
    assert torch.equal(again.key_quantizer.centroids, index.key_quantizer.centroids)


LENGTH_DEPENDENT = {
    "dynamic": Rope(head_dim=8, scaling="dynamic", factor=4.0, original_max_position=90),
    "longrope": Rope(
        head_dim=8, scaling="longrope", original_max_position=90, attention_factor=1.2, short_factor=(1.0,) * 4,
        long_factor=(2.0, 3.0, 4.0, 5.0),
    ),
}


def sealed_lists(index: AsymmetricIndex, i: int) -> tuple[Tensor, Tensor]:
    """Positions of the sealed tokens of a sequence, per head, and their lists: (h, n) each."""
    lists = index.invlists
    numbers = [run_lists(lists.tables[i, :, s], lists.segments[i][s]) for s in range(len(lists.segments[i]))]
    return lists.ids[i, :, lists.sinks(i) : lists.sealed(i)].long(), torch.cat(numbers, 1).long()


def check_lists(index: AsymmetricIndex, raw: Tensor) -> None:
    """Every sealed token is in the list nearest to its key before RoPE, raw : (b, h, n, d), and no list has them all."""
    for i in range(len(raw)):
        positions, numbers = sealed_lists(index, i)
        want = index.key_quantizer.assign(raw[i]).long().gather(1, positions)
        assert float((want == numbers).float().mean()) > 0.985
        assert all(len(row.unique()) > 1 for row in numbers)


@pytest.mark.parametrize("own", [True, False], ids=["lists of the prompt", "lists of the training"])
@pytest.mark.parametrize(
    "how", ["at once", "sealed later", "in parts", "one length for the batch", "padding taken out", "read again"]
)
@pytest.mark.parametrize("name", LENGTH_DEPENDENT)
def test_keys_are_unrotated_by_the_length_of_their_rotation(name: str, how: str, own: bool, tmp_path: Path) -> None:
    rope, n = LENGTH_DEPENDENT[name], 200
    raw, values = sequence(7, n, batch=2)
    index = adaptive(rope)
    if not own:
        index.tower = None
    if how in ("at once", "sealed later"):
        keys = rope.rotate(raw, range(n), n)
        index.add(keys, values, seal=how == "at once")
    elif how == "one length for the batch":
        index.add(rope.rotate(raw, range(n), 300), values, seq_len=300)
    elif how == "padding taken out":
        keys = torch.cat([torch.randn(2, 2, 50, 8), rope.rotate(raw, range(n), n)], 2)
        index.add(keys, torch.cat([values[:, :, :50], values], 2), seal=False, seq_len=n)
        index.remove_ids(range(50), close_gaps=True)
    else:
        for begin, end in ((0, 40), (40, 80), (80, 88), *((j, j + 1) for j in range(88, 110)), (110, 150), (150, n)):
            index.add(rope.rotate(raw[:, :, begin:end], range(begin, end), end), values[:, :, begin:end])
            if how == "read again" and end in (80, 100):
                write_index(index, tmp_path / "index")
                index = read_index(tmp_path / "index")
    index.seal()
    check_lists(index, raw)
    index.truncate(120)
    index = index.fork([1, 0])
    index.remove_ids(range(60, 70))
    index.window = 8  # all is sorted anew
    kept = torch.cat([raw[:, :, :60], torch.zeros(2, 2, 10, 8), raw[:, :, 70:120]], 2)
    check_lists(index, kept[[1, 0]])


def test_coarse_keys_before_there_are_lists() -> None:
    """Lists of a prompt's own are made of stored keys; others cannot be assigned to those that are yet to come."""
    keys, values = sequence(0, 200)
    index = adaptive()
    with pytest.raises(StateError, match="coarse_keys"):
        index.add(keys, values, coarse_keys=keys)
    assert index.lengths == []
    index.add(keys, values)
    index.add(keys[:, :, :3], values[:, :, :3], coarse_keys=keys[:, :, :3])
    assert index.lengths == [203]
