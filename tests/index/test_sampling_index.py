"""Weighted samples of an index: what comes out is attention over what was read, with its biases, however the index came about."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close, dense, random_router, small_index, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saap_index import (
    AsymmetricIndex,
    CompatibilityError,
    DeviceError,
    ParameterError,
    ParameterSpace,
    Sampling,
    SearchParametersIVF,
    ShapeError,
    read_index,
    reference,
    register_backend,
    write_index,
)
from saap_index.backends import TorchBackend
from saap_index.search.select import sample_error
from saap_index.training.sampling import CANDIDATES, best_sampling

BACKENDS = pytest.mark.parametrize("name", ["cpu", "torch", "reference"])
SOME = SearchParametersIVF(selectivity=0.3, sampled_share=0.5)


def filled(name: str, lengths: list[int], **options: Any) -> AsymmetricIndex:
    index = small_index(32, 40, 4, 4, 2, backend=name, **options)
    b, n, dtype = len(lengths), max(lengths), index.dtype
    index.add(tokens(b, 2, n, 32, dtype, 1), tokens(b, 2, n, 40, dtype, 2), lengths=lengths)
    return index


def want(index: AsymmetricIndex, queries: Tensor, params: SearchParametersIVF) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Out (b, hq, q, e), lse and error (b, hq, q) of attention in float64 over what a selection reads, each row with its bias."""
    selection, lists = index.select(queries, params=params), index.invlists
    b, hq, q, _ = queries.shape
    out, lse, error = np.zeros((b, hq, q, index.d_v)), np.zeros((b, hq, q)), np.zeros((b, hq, q))
    for i, head in np.ndindex(b, index.num_kv_heads):
        count = 0 if selection.rows is None else int(selection.counts[i, head])
        rows = [] if selection.rows is None else selection.rows[i, head, :count].tolist()
        assert rows == sorted(set(rows))
        bias = np.zeros(count) if selection.biases is None else selection.biases[i, head, :count].double().numpy()
        n, sealed = selection.lengths[i], selection.sealed[i]
        every = [*range(selection.sinks[i]), *rows, *range(sealed, n)]
        bias = np.concatenate([np.zeros(selection.sinks[i]), bias, np.zeros(n - sealed)])
        keys, values = (x[head].double().numpy() for x in lists.rows(i, torch.tensor(every).expand(index.num_kv_heads, -1)))
        group = slice(head * hq // index.num_kv_heads, (head + 1) * hq // index.num_kv_heads)
        x = queries[i, group].double().flatten(0, 1).numpy()
        seen = np.array([(r < sealed) | (r < n - q + 1 + np.arange(q)) for r in every]).T
        o, e = reference.attend(x, keys, values, index.scale, np.tile(seen, (hq // index.num_kv_heads, 1)), biases=bias)
        out[i, group], lse[i, group] = o.reshape(-1, q, index.d_v), e.reshape(-1, q)
        error[i, group] = reference.sample_error(x, keys, values, index.scale, bias, o, e).reshape(-1, q)
    return out, lse, error


@pytest.mark.parametrize("name", ["cpu", "torch"])
@given(
    lengths=st.lists(st.integers(1, 250), min_size=1, max_size=3), q=st.integers(1, 3),
    selectivity=st.sampled_from([0.1, 0.4, 1.0]), share=st.sampled_from([0.0, 0.3, 1.0]),
    exponent=st.sampled_from([0.25, 2.0, 4.0]), cap=st.sampled_from([0.5, 2.0, 9.0]), window=st.sampled_from([0, 60]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=40)
def test_it_is_attention_over_what_was_read(
    name: str, lengths: list[int], q: int, selectivity: float, share: float, exponent: float, cap: float, window: int,
    dtype: torch.dtype,
) -> None:
    index = filled(name, [max(n, q) for n in lengths], dtype=dtype)
    queries = tokens(len(lengths), 4, q, 32, seed=3)
    params = SearchParametersIVF(
        selectivity=selectivity, sampled_share=share, sample_exponent=exponent, sample_cap=cap, window=window
    )
    out, lse, error = index.search_attend(queries, params=params, return_lse=True, return_error=True)
    exact, exact_lse, exact_error = want(index, queries, params)
    assert_close(out, exact, torch.float32, 4)
    assert_close(lse, exact_lse, torch.float32, 4)
    assert_close(error, exact_error, torch.float32, 40)
    step = index.search_attend(queries, params=params)
    assert_close(step, exact, torch.float32, 4)
    if selectivity == 1:
        assert index.select(queries, params=params).rows is None, "all is read: nothing is left to sample"
    last = index.stats().last_search
    assert last.sampled_tokens <= last.read_sealed and (share > 0 or not last.sampled_tokens)


@BACKENDS
def test_a_share_of_nothing_is_no_sample(name: str) -> None:
    """Bit for bit what an index without any does, also where only some heads sample."""
    index, queries = filled(name, [300, 90], selectivity=0.2), tokens(2, 4, 1, 32, seed=3)
    plain = index.search_attend(queries)
    before = index.stats().last_search
    index.sampling = Sampling([0.0, 0.0], [2.0, 2.0], [2.0, 2.0])
    assert torch.equal(index.search_attend(queries), plain) and index.select(queries).biases is None
    index.sampling = Sampling([0.7, 0.0], [2.0, 2.0], [2.0, 2.0])
    got = index.search_attend(queries)
    assert torch.equal(got[:, 2:], plain[:, 2:]) and not torch.equal(got[:, :2], plain[:, :2])
    last = index.stats().last_search
    assert 0 <= before.read_sealed - last.read_sealed <= 1 and last.sampled_tokens > 0 == before.sampled_tokens
    assert torch.equal(index.search_attend(queries, params=SearchParametersIVF(sampled_share=0.0)), plain)
    assert not index.search_attend(queries, return_error=True)[1][:, 2:].any(), "no sample, nothing to tell an error by"


@BACKENDS
def test_backends_read_the_same(name: str) -> None:
    queries = tokens(2, 4, 2, 32, seed=3)
    ours, theirs = (filled(x, [400, 120]).select(queries, params=SOME) for x in (name, "reference"))
    assert torch.equal(ours.rows, theirs.rows) and torch.equal(ours.counts, theirs.counts)
    torch.testing.assert_close(ours.biases[ours.rows >= 0], theirs.biases[theirs.rows >= 0])


@BACKENDS
def test_a_sequence_in_a_batch_reads_what_it_reads_alone(name: str, tmp_path: Path) -> None:
    """So do its copies, what is read from a file, and what it was before tokens came and went."""
    index, queries = filled(name, [300, 150, 220]), tokens(3, 4, 1, 32, seed=3)
    index.sampling = Sampling([0.5, 1.0], [2.0, 1.5], [2.0, 1.0])
    index.selectivity = 0.25
    got = index.search_attend(queries)
    for i, n in enumerate((300, 150, 220)):
        alone = small_index(32, 40, 4, 4, 2, backend=name, selectivity=0.25)
        alone.add(tokens(3, 2, 300, 32, seed=1)[i : i + 1, :, :n], tokens(3, 2, 300, 40, seed=2)[i : i + 1, :, :n])
        alone.sampling = index.sampling
        torch.testing.assert_close(alone.search_attend(queries[i : i + 1]), got[i : i + 1], rtol=1e-5, atol=1e-6)
    copy = index.fork([2, 0])
    torch.testing.assert_close(copy.search_attend(queries[[2, 0]]), got[[2, 0]], rtol=1e-5, atol=1e-6)
    write_index(index, tmp_path / "index")
    again = read_index(tmp_path / "index", backend=name)
    assert again.sampling is not None and torch.equal(again.sampling.table(), index.sampling.table())
    assert torch.equal(again.search_attend(queries), got)
    index.add(tokens(3, 2, 60, 32, seed=7), tokens(3, 2, 60, 40, seed=8))
    index.truncate([300, 150, 220])
    assert torch.equal(index.search_attend(queries), got)


@pytest.mark.parametrize("storage", ["SQ8", "SQ8/SQ4"])
def test_rows_of_codes_have_biases_too(storage: str) -> None:
    index, queries = filled("cpu", [300], storage=storage), tokens(1, 4, 1, 32, seed=3)
    out, error = index.search_attend(queries, params=SOME, return_error=True)
    exact, _, exact_error = want(index, queries, SOME)
    assert_close(out, exact, torch.float32, 30)
    assert_close(error, exact_error, torch.float32, 300)
    assert_close(index.search_attend(queries, params=SOME), exact, torch.float32, 30)


def test_search_shows_what_was_sampled() -> None:
    """`search` looks at the tokens that attention reads, sampled ones among them."""
    index, queries = filled("cpu", [300]), tokens(1, 4, 1, 32, seed=3)
    selection = index.select(queries, params=SOME)
    _, ids = index.search(queries, 300, params=SOME)
    for head in range(2):
        assert set(ids[0, 2 * head, 0].tolist()) - {-1} == set(index.read_ids(selection)[0][head].tolist())


def test_a_larger_window_reads_sampled_tokens_for_themselves() -> None:
    index, queries = filled("cpu", [300]), tokens(1, 4, 1, 32, seed=3)
    wide = index.select(queries, params=SearchParametersIVF(selectivity=0.3, sampled_share=1.0, window=250, sinks=6))
    some = index.select(queries, params=SearchParametersIVF(selectivity=0.3, sampled_share=1.0))
    lists = index.invlists
    for head in range(2):
        count = int(wide.counts[0, head])
        rows, bias = wide.rows[0, head, :count].long(), wide.biases[0, head, :count]
        forced = lists.ids[0, head, rows] >= 50
        assert bool(forced.any()) and not bias[forced].any() and not bias[lists.ids[0, head, rows] < 6].any()
        before = dict(zip(some.rows[0, head].tolist(), some.biases[0, head].tolist(), strict=True))
        others = ~forced & (lists.ids[0, head, rows] >= 6)
        assert [before[r] for r in rows[others].tolist()] == bias[others].tolist()


# -- parameters -----------------------------------------------------------------------------------------------------------


def test_parameters() -> None:
    index, queries = filled("cpu", [300], mean_run_tokens=2), tokens(1, 4, 1, 32, seed=9)
    assert index.sampled_share is None and index.select(queries).biases is None
    ParameterSpace().set_index_parameters(index, "selectivity=0.3,sampled_share=0.5,sample_exponent=1.5,sample_cap=0.75")
    assert (index.sampled_share, index.sample_exponent, index.sample_cap) == (0.5, 1.5, 0.75)
    biases = index.select(queries).biases
    assert 0 < float(biases.max()) <= 0.75
    for other in ({"nprobe": 2}, {"tail": 0.2}, {"target_mass": 0.5}, {"selectivity": 1.0}, {"sampled_share": 0.0}):
        assert index.select(queries, params=SearchParametersIVF(**other)).biases is None
    for name, value in (("nprobe", 2), ("target_mass", 0.9), ("tail", 0.1)):
        with pytest.raises(ParameterError, match=rf"sampled_share, {name}: expected one of them, got sampled_share=0\.5"):
            SearchParametersIVF(sampled_share=0.5, **{name: value})
    for name, bad in (
        ("sampled_share", (-0.1, 1.1, True, "1")), ("sample_exponent", (0.0, 0.3, 17.0)), ("sample_cap", (-1.0, float("inf")))
    ):
        for value in bad:
            with pytest.raises(ParameterError, match=rf"{name}: expected"):
                setattr(index, name, value)
    index.sampled_share = index.sample_exponent = index.sample_cap = None
    assert index.select(queries).biases is None
    index.query_router = random_router(2, 4, 32, knots=-1, size_weighted=False)
    with pytest.raises(CompatibilityError, match=r"sampled_share: expected a query_router of mass per token"):
        index.search_attend(queries, params=SOME)


def test_a_table_that_is_none() -> None:
    index = filled("cpu", [100])
    with pytest.raises(CompatibilityError, match="sampling: expected 2 KV heads, got 3"):
        index.sampling = Sampling([0.5] * 3, [2.0] * 3, [2.0] * 3)
    with pytest.raises(ParameterError, match="sampling: expected a Sampling or None"):
        index.sampling = [0.5, 0.5]
    for table in (([1.5], [2], [1]), ([0.5], [0.3], [1]), ([0.5], [17], [1]), ([0.5], [2], [-1]), ([np.nan], [2], [1])):
        with pytest.raises(ParameterError, match="sampling: expected"):
            Sampling(*table)
    with pytest.raises(ShapeError, match="sampling: expected"):
        Sampling([0.5, 0.5], [2.0], [1.0])
    with pytest.raises(ShapeError, match="sampling: expected"):
        Sampling.of_table(torch.zeros((2, 2)))


class _Plain(TorchBackend):
    name = "plain"
    reads_samples = False


def test_a_backend_that_reads_none_says_so() -> None:
    """It refuses what was asked for, and warns of what is calibrated; it never does without in silence."""
    register_backend("plain", _Plain)
    index, queries = filled("plain", [300], selectivity=0.3), tokens(1, 4, 1, 32, seed=3)
    with pytest.raises(DeviceError, match=r"sampled_share: expected a backend that reads samples, got 0\.5 and backend 'plain'"):
        index.search_attend(queries, params=SOME)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = index.search_attend(queries)
        index.sampling = Sampling([0.0, 0.0], [2.0, 2.0], [2.0, 2.0])
        index.search_attend(queries)
    index.sampling = Sampling([0.5, 0.0], [2.0, 2.0], [2.0, 2.0])
    with pytest.warns(RuntimeWarning, match="a part of the budget on a weighted sample, which backend 'plain'"):
        assert torch.equal(index.search_attend(queries), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index.search_attend(queries, params=SearchParametersIVF(sampled_share=0.0))


def test_the_error_of_no_index() -> None:
    index = small_index(32, 40, 4, 4, 2)
    out, lse, error = index.search_attend(tokens(2, 4, 3, 32), return_lse=True, return_error=True)
    assert not out.any() and bool((lse == -torch.inf).all()) and not error.any() and error.dtype == torch.float32
    assert error.shape == (2, 4, 3)
    full, queries = filled("cpu", [300]), tokens(1, 4, 1, 32)
    zero = sample_error(full.invlists, queries[:, None], full.select(queries), torch.zeros(1), torch.zeros((1, 2, 2, 1)), 1.0)
    assert not zero.any()
    as_numpy = full.search_attend(queries.numpy(), params=SOME, return_error=True)[1]
    assert isinstance(as_numpy, np.ndarray) and as_numpy.shape == (1, 4, 1) and bool((as_numpy > 0).all())


# -- calibration ----------------------------------------------------------------------------------------------------------


def test_the_best_candidate_is_one_that_is_surely_better() -> None:
    r = np.random.default_rng(0)
    errors = [np.ones((len(CANDIDATES), 2, 3)) + 0.01 * r.normal(size=(len(CANDIDATES), 2, 3)) for _ in range(4)]
    for x in errors:
        x[7, :, 0] *= 0.8  # better in every text
        x[:, :, 2] = 1.0
        x[9, :, 2] = 0.99  # better, by too little to be sure on other texts
    errors[0][5, :, 1], errors[1][5, :, 1] = 0.5, 1.6  # in one text alone
    best = best_sampling([*errors, None])
    assert (best.shares[0], best.exponents[0], best.caps[0]) == CANDIDATES[7]
    assert best.shares[1] == best.shares[2] == 0
    assert best_sampling([None]) is None


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_calibration_samples_where_attention_is_spread(name: str) -> None:
    """A head that attends to all tokens alike, whose values differ by list, gains by a sample; one that attends to a sink has no
    use of it. On a sequence that was not calibrated on, the error falls in the one and stays as it was in the other."""
    d, n = 32, 1200
    index = small_index(d, d, 8, 4, 2, backend=name, selectivity=0.1, seal_tokens=32, max_segment=512)
    g = torch.Generator().manual_seed(0)
    means = 3 * torch.randn((8, d), generator=g)

    def sequences(b: int) -> tuple[Tensor, Tensor]:
        keys = torch.randn((b, 2, n, d), generator=g)
        lists = torch.stack([index.key_quantizer.assign(x) for x in keys])
        return keys, means[lists.long()] + torch.randn((b, 2, n, d), generator=g)

    def queries(b: int, q: int, keys: Tensor) -> Tensor:
        x = 0.1 * torch.randn((b, 4, q, d), generator=g)
        x[:, 2:] = 9 * keys[:, 1:, :1].expand(-1, 2, q, -1)
        return x

    keys, values = sequences(4)
    positions = torch.arange(600, 600 + 40 * 15, 15)
    index.calibrate(keys, queries(4, 40, keys), positions=positions, values=values)
    assert index.sampling is not None and index.sampling.shares[0] > 0 == index.sampling.shares[1]
    keys, values = sequences(1)
    index.add(keys, values)
    x, errors = queries(1, 1, keys), []
    for params in (None, SearchParametersIVF(sampled_share=0.0)):
        out = index.search_attend(x, params=params)
        exact = [dense(x[0, 2 * k : 2 * k + 2], keys[0, k], values[0, k], index.scale)[0] for k in range(2)]
        errors.append([np.linalg.norm(out[0, 2 * k : 2 * k + 2].numpy() - exact[k]) for k in range(2)])
    assert errors[0][0] < 0.7 * errors[1][0] and errors[0][1] == errors[1][1]
