"""The specification against independent, direct computations: torch in float64, plain loops, sets of tokens."""

from __future__ import annotations

from itertools import pairwise
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

import saap_index.invlists.layout as layouts
from saap_index import Layout, reference

SEEDS = st.integers(0, 2**32 - 1)
DIMS = st.sampled_from([1, 2, 8, 13])
MERGE_ROWS = 900


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# -- attend and merge_states ----------------------------------------------------------------------------------------------


@given(
    seed=SEEDS, j=st.integers(1, 5), n=st.integers(1, 30), d=DIMS, e=DIMS, size=st.sampled_from([1e-3, 1.0, 1e4]),
    hide=st.booleans(),
)
def test_attend_is_torch_attention(seed: int, j: int, n: int, d: int, e: int, size: float, hide: bool) -> None:
    r = rng(seed)
    queries, keys, values = r.normal(size=(j, d)) * size, r.normal(size=(n, d)), r.normal(size=(n, e))
    visible = r.random((j, n)) < 0.5 if hide else None
    if visible is not None:
        visible[:, r.integers(n)] = True
    mask = None if visible is None else torch.from_numpy(visible)
    tensors = [torch.from_numpy(x)[None, None] for x in (queries, keys, values)]
    want = functional.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=0.7)[0, 0].numpy()
    logits = 0.7 * torch.from_numpy(queries) @ torch.from_numpy(keys).T
    want_lse = torch.logsumexp(logits if mask is None else logits.masked_fill(~mask, -torch.inf), 1).numpy()
    out, lse = reference.attend(queries, keys, values, 0.7, visible)
    np.testing.assert_allclose(out, want, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-12, atol=1e-12)


def test_attend_without_anything_to_see() -> None:
    r = rng(0)
    queries, keys, values = r.normal(size=(3, 4)), r.normal(size=(5, 4)), r.normal(size=(5, 2))
    seen = np.ones((3, 5), bool)
    seen[1] = False
    out, lse = reference.attend(queries, keys, values, 1.0, seen)
    assert not out[1].any() and lse[1] == -np.inf and np.isfinite(out).all() and np.isfinite(lse[[0, 2]]).all()
    out, lse = reference.attend(queries, keys[:0], values[:0], 1.0)
    assert out.shape == (3, 2) and not out.any() and (lse == -np.inf).all()


LSES = st.one_of(st.just(-np.inf), st.sampled_from([-1e4, 0.0, 1e4]), st.floats(-1e4, 1e4), st.floats(-5, 5))
State = tuple[np.ndarray, np.ndarray]


@st.composite
def states(draw: st.DrawFn, how_many: int) -> list[State]:
    """Attention states of the same shape, empty ones and ones of huge logits among them."""
    rows, r = draw(st.integers(0, 4)), rng(draw(SEEDS))
    found = []
    for _ in range(how_many):
        lse = np.array(draw(st.lists(LSES, min_size=rows, max_size=rows)), np.float64)
        found.append((np.where(np.isfinite(lse)[:, None], r.normal(size=(rows, 3)), 0.0), lse))
    return found


def close(a: State, b: State) -> None:
    np.testing.assert_allclose(a[0], b[0], rtol=0, atol=1e-10)  # weights are exp of a lse up to 1e4: 1e-12 of error in them
    np.testing.assert_allclose(a[1], b[1], rtol=1e-14, atol=1e-12)


@given(states(1))
def test_the_empty_state_is_the_identity(parts: list[State]) -> None:
    (out, lse) = parts[0]
    empty = np.zeros_like(out), np.full_like(lse, -np.inf)
    for merged in (reference.merge_states(out, lse, *empty), reference.merge_states(*empty, out, lse)):
        assert np.array_equal(merged[0], out) and np.array_equal(merged[1], lse)


@given(states(2))
def test_merging_commutes(parts: list[State]) -> None:
    a, b = parts
    ab, ba = reference.merge_states(*a, *b), reference.merge_states(*b, *a)
    assert np.array_equal(ab[0], ba[0]) and np.array_equal(ab[1], ba[1])
    assert not np.isnan(ab[0]).any() and not np.isnan(ab[1]).any()


@given(states(3))
def test_merging_is_associative(parts: list[State]) -> None:
    a, b, c = parts
    left = reference.merge_states(*reference.merge_states(*a, *b), *c)
    right = reference.merge_states(*a, *reference.merge_states(*b, *c))
    close(left, right)


def test_two_empty_states_stay_empty() -> None:
    empty = np.zeros((2, 3)), np.full(2, -np.inf)
    out, lse = reference.merge_states(*empty, *empty)
    assert not out.any() and (lse == -np.inf).all()


@given(seed=SEEDS, cuts=st.lists(st.integers(0, 40), min_size=1, max_size=3), size=st.sampled_from([1.0, 1e4]))
def test_merging_is_attention_over_the_union(seed: int, cuts: list[int], size: float) -> None:
    r = rng(seed)
    queries, keys, values = r.normal(size=(4, 6)) * size, r.normal(size=(40, 6)), r.normal(size=(40, 5))
    state = np.zeros((4, 5)), np.full(4, -np.inf)
    edges = [0, *sorted(cuts), 40]
    for low, high in pairwise(edges):
        state = reference.merge_states(*state, *reference.attend(queries, keys[low:high], values[low:high], 1.0))
    close(state, reference.attend(queries, keys, values, 1.0))


# -- maps -----------------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, n=st.integers(0, 6), half=st.integers(1, 4), rest=st.integers(0, 3), interleaved=st.booleans())
def test_unrotate_undoes_a_complex_rotation(seed: int, n: int, half: int, rest: int, interleaved: bool) -> None:
    r = rng(seed)
    x, angles, stretch = r.normal(size=(2, n, 2 * half + rest)), r.uniform(-9, 9, (n, half)), r.uniform(0.5, 2)
    rotated = x.copy()
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, half + i)
        turned = (x[..., a] + 1j * x[..., b]) * np.exp(1j * angles[:, i]) * stretch
        rotated[..., a], rotated[..., b] = turned.real, turned.imag
    given_ = rotated.copy()
    back = reference.unrotate(rotated, np.cos(angles), np.sin(angles), interleaved, 1 / stretch)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-13)
    assert np.array_equal(rotated, given_), "the argument is left as it is"


@given(seed=SEEDS, n=st.integers(0, 20), nlist=st.integers(1, 9), d=DIMS)
def test_assign_is_the_nearest_centroid_and_ties_go_down(seed: int, n: int, nlist: int, d: int) -> None:
    r = rng(seed)
    keys, centroids = r.integers(-2, 3, (n, d)).astype(float), r.integers(-2, 3, (nlist, d)).astype(float)  # ties abound
    distances = ((keys[:, None] - centroids[None]) ** 2).sum(-1)
    assert np.array_equal(reference.assign(keys, centroids), distances.argmin(1) if n else np.empty(0, int))


@given(st.lists(st.integers(0, 5)))
def test_sort_segment_is_a_stable_sort(list_nos: list[int]) -> None:
    order, offsets = reference.sort_segment(np.array(list_nos, np.int64), 6)
    assert order.tolist() == sorted(range(len(list_nos)), key=lambda i: list_nos[i])
    assert offsets.tolist() == [sum(no < bound for no in list_nos) for bound in range(7)]


@given(seed=SEEDS, j=st.integers(1, 4), u=st.integers(0, 5), d=DIMS, nlist=st.integers(1, 6), knots=st.integers(0, 3))
def test_route_is_one_hidden_layer_and_a_skip(seed: int, j: int, u: int, d: int, nlist: int, knots: int) -> None:
    r = rng(seed)
    x, m = r.normal(size=(j, d)) * 3, nlist + knots
    hidden, bias_hidden, out, skip, bias_out = (r.normal(size=s) for s in ((u, d), (u,), (m, u), (m, d), (m,)))
    z, a = reference.route(x, hidden, bias_hidden, out, skip, bias_out, nlist)
    inner = functional.silu(torch.from_numpy(x @ hidden.T + bias_hidden)).numpy()
    np.testing.assert_allclose(np.concatenate([z, a], 1), inner @ out.T + x @ skip.T + bias_out, rtol=0, atol=1e-12)


def test_route_survives_huge_activations() -> None:
    one = np.ones((1, 1))
    z, _ = reference.route(np.array([[-1e4], [1e4]]), one, np.zeros(1), one, 0 * one, np.zeros(1), 1)
    np.testing.assert_allclose(z[:, 0], [0.0, 1e4], atol=1e-300)


# -- layout and probe -----------------------------------------------------------------------------------------------------


@given(
    sinks=st.integers(0, 40), window=st.integers(0, 400), seal_tokens=st.integers(0, 300), break_even=st.integers(0, 3000),
    max_segment=st.integers(1, 20000), length=st.one_of(st.integers(0, 6000), st.integers(0, 200_000)), heads=st.integers(1, 9),
)
@patch.object(layouts, "MERGE_ROWS", MERGE_ROWS)
def test_segments_are_those_of_the_layout(
    sinks: int, window: int, seal_tokens: int, break_even: int, max_segment: int, length: int, heads: int
) -> None:
    layout = Layout(sinks, window, seal_tokens, max_segment, break_even)
    want = reference.arrangement(length, sinks, layout.recent, layout.block, max_segment, heads, MERGE_ROWS)
    if length < break_even:
        want = [], (0, 0, 0)
    found = layout.arrangement(length, heads)
    merging = (0, 0, 0)
    if found.merging is not None:
        parts = found.segments[found.merging.first : found.merging.stop]
        merging = parts[0][0], parts[-1][1], found.merging.heads
    assert (list(found.segments), merging) == want and layout.segments(length) == found.segments


@st.composite
def scored_runs(draw: st.DrawFn) -> dict[str, object]:
    """Scores and offset tables of one KV head, with empty runs and with ties."""
    r = rng(draw(SEEDS))
    j, nlist, s, m = (draw(st.integers(*span)) for span in ((1, 4), (1, 5), (0, 5), (0, 3)))
    sizes = r.integers(0, 4, (s, nlist)) * (r.random((s, nlist)) < 0.7)
    starts = 3 + np.concatenate([[0], np.cumsum(sizes.sum(1))])[:s]
    tables = np.concatenate([starts[:, None], starts[:, None] + np.cumsum(sizes, 1)], 1).astype(np.int64)
    if draw(st.booleans()):
        z, a = r.normal(size=(j, nlist)) * 3, r.normal(size=(j, m))
    else:  # the same few scores for every query of the group, so that equal runs are equal to the last bit
        z, a = np.tile(r.integers(0, 2, nlist).astype(float), (j, 1)), np.tile(r.integers(0, 2, m).astype(float), (j, 1))
    knots = r.uniform(0, max(0, m - 2), s) if draw(st.booleans()) else r.integers(0, max(1, m - 1), s).astype(float)
    return {"z": z, "a": a, "knots": knots, "tables": tables, "size_weighted": draw(st.booleans())}


def plain_run_weight(z: np.ndarray, a: np.ndarray, knots: np.ndarray, tables: np.ndarray, size_weighted: bool) -> np.ndarray:
    """Softmax over single tokens, each with its own score: what a run's weight means, without any grouping."""
    s, nlist = tables.shape[0], z.shape[1]
    m = max(0, a.shape[1] - 1)  # the last column tells how much the query counts
    weights = np.zeros((s, nlist))
    for z_j, a_j in zip(z, a, strict=True):
        bend = np.interp(knots, np.arange(m), a_j[:m]) if m and size_weighted else np.zeros(s)
        scores = z_j[None] + bend[:, None]
        sizes = np.diff(tables, axis=1)
        tokens = np.repeat(scores.ravel(), sizes.ravel()) if size_weighted else z_j
        share = 1 / (1 + np.exp(-a_j[-1])) if a.shape[1] and size_weighted else 1.0
        weights += share * np.exp(scores - np.logaddexp.reduce(tokens)) if tokens.size else 0.0
    return weights


@given(scored_runs())
def test_run_weights_are_a_softmax_over_tokens(case: dict[str, np.ndarray]) -> None:
    got = reference.run_weights(**case)
    filled = np.diff(case["tables"], axis=1) > 0
    np.testing.assert_allclose(got[filled], plain_run_weight(**case)[filled], rtol=1e-12)


@given(case=scored_runs(), budget=st.integers(0, 40), data=st.data())
def test_probe_takes_the_best_tokens_one_by_one(case: dict[str, np.ndarray], budget: int, data: st.DataObject) -> None:
    tables, nlist = case["tables"], case["z"].shape[1]
    nprobe = data.draw(st.integers(0, nlist), label="nprobe")
    tokens = [(s, no, row) for s in range(len(tables)) for no in range(nlist) for row in range(tables[s, no], tables[s, no + 1])]
    if nprobe:
        weights = reference.list_weights(case["z"], case["a"], np.diff(tables, axis=1).sum(0), case["size_weighted"])
        place = {no: rank for rank, no in enumerate(sorted(range(nlist), key=lambda no: (-weights[no], no)))}
        tokens = sorted((t for t in tokens if place[t[1]] < nprobe), key=lambda t: (place[t[1]], -t[0], -t[2]))
    else:
        weights = reference.run_weights(**case)
        tokens.sort(key=lambda t: (-weights[t[0], t[1]], -t[0], t[1], -t[2]))
    got = reference.probe(case["z"], case["a"], case["knots"], tables, budget, nprobe, case["size_weighted"])
    assert got.tolist() == sorted(row for _, _, row in tokens[:budget])


@given(case=scored_runs(), budget=st.integers(0, 40), unread_mass=st.floats(0, 1))
def test_probe_stops_when_little_is_left(case: dict[str, np.ndarray], budget: int, unread_mass: float) -> None:
    """What is left unread is at most what may be, or the budget is spent; with one run less it would have been more."""
    case["size_weighted"] = True
    weights, tables = reference.run_weights(**case), case["tables"]
    args = case["z"], case["a"], case["knots"], tables, budget, 0, True
    everything, rows = reference.probe(*args).tolist(), reference.probe(*args, unread_mass).tolist()
    assert set(rows) <= set(everything)
    per_row = {r: weights[s, no] for s, no in np.ndindex(weights.shape) for r in range(tables[s, no], tables[s, no + 1])}
    runs = {r: (s, no) for s, no in np.ndindex(weights.shape) for r in range(tables[s, no], tables[s, no + 1])}
    allowed = unread_mass * len(case["z"])
    unread = sum(w for r, w in per_row.items() if r not in rows)
    if len(rows) < len(everything):
        assert unread <= allowed * (1 + 1e-9) + 1e-12
    if rows:
        worst = min((runs[r] for r in rows), key=lambda run: (weights[run], run[0], -run[1]))
        without = unread + sum(per_row[r] for r in rows if runs[r] == worst)
        assert without > allowed * (1 - 1e-9) - 1e-12


@given(case=scored_runs(), budget=st.integers(0, 20), entries=st.integers(0, 12), data=st.data())
def test_tail_is_the_heaviest_of_the_unread(
    case: dict[str, np.ndarray], budget: int, entries: int, data: st.DataObject
) -> None:
    tables, nlist = case["tables"], case["z"].shape[1]
    means = data.draw(st.integers(0, len(tables)))
    args = case["z"], case["a"], case["knots"], tables
    rows = reference.probe(*args, budget, 0, True)
    runs = reference.tail(*args, rows, entries, means)
    mass = np.diff(tables, axis=1) * reference.run_weights(*args, True)
    touched = {(s, no) for s, no in np.ndindex(mass.shape) for r in rows if tables[s, no] <= r < tables[s, no + 1]}
    could = {s * nlist + no for s, no in np.ndindex(means, nlist) if tables[s, no + 1] > tables[s, no] and (s, no) not in touched}
    assert set(runs) <= could and len(runs) == min(entries, len(could)) and (np.diff(runs) > 0).all()
    if len(runs) and len(runs) < len(could):
        assert mass.ravel()[runs].min() >= max(mass.ravel()[list(could - set(runs))])


@given(seed=SEEDS, sizes=st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_run_means_stand_for_their_runs(seed: int, sizes: list[int]) -> None:
    """Of equal keys the mean is each of them: one entry that counts for all gives the attention over all."""
    r, offsets = rng(seed), np.cumsum([0, *sizes])
    keys = np.repeat(r.normal(size=(len(sizes), 5)), sizes, axis=0)
    values, queries = r.normal(size=(len(keys), 3)), r.normal(size=(4, 5))
    mean_keys, mean_values = reference.run_means(keys, values, offsets)
    filled = np.array(sizes) > 0
    assert not mean_keys[~filled].any() and not mean_values[~filled].any()
    close(
        reference.attend(queries, mean_keys[filled], mean_values[filled], 0.7, None, np.array(sizes)[filled]),
        reference.attend(queries, keys, values, 0.7),
    )


@given(case=scored_runs())
def test_list_weights_ignore_distance(case: dict[str, np.ndarray]) -> None:
    sizes = np.diff(case["tables"], axis=1).sum(0)
    got = reference.list_weights(case["z"], case["a"], sizes, case["size_weighted"])
    one_segment = np.concatenate([[0], np.cumsum(sizes)])[None]
    want = plain_run_weight(case["z"], case["a"][:, -1:], np.zeros(1), one_segment, case["size_weighted"])[0]
    if sizes.any() or not case["size_weighted"]:
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_scores_of_minus_infinity_weigh_nothing() -> None:
    """Of one list, and of all of them: no NaN, no warning; the rows are still taken when the budget reaches them."""
    tables = np.array([[0, 2, 4]])
    for z in ([[-np.inf, 0.0]], [[-np.inf, -np.inf]]):
        args = np.array(z), np.zeros((1, 0)), np.zeros(1), tables
        assert np.isfinite(reference.run_weights(*args, True)).all() and np.isfinite(reference.run_weights(*args, False)).all()
        assert reference.probe(*args, 4, 0, True).tolist() == [0, 1, 2, 3]
        assert reference.probe(*args, 4, 2, True).tolist() == [0, 1, 2, 3]
    assert reference.probe(np.array([[-np.inf, 0.0]]), *args[1:], 2, 0, True).tolist() == [2, 3]
