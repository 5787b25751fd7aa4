"""The tail estimate through the index: the output, budgets, memory, and that means follow the tokens whatever is done to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import dense, random_router, small_index, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saap_index import AsymmetricIndex, CompatibilityError, Layout, ParameterError, SearchParametersIVF, read_index, write_index

INDEXES = pytest.mark.parametrize("name", ["cpu", "torch", "reference"])
OPTIONS = {"mean_run_tokens": 3, "max_segment": 64}


def filled(name: str, lengths: list[int], **options: Any) -> AsymmetricIndex:
    index = small_index(32, 40, 4, 4, 2, backend=name, **{**OPTIONS, **options})
    b, n, dtype = len(lengths), max(lengths), index.dtype
    index.add(tokens(b, 2, n, 32, dtype, 1), tokens(b, 2, n, 40, dtype, 2), lengths=lengths)
    return index


def test_only_leading_segments_have_means() -> None:
    """No segment is longer than the one before it, whatever the layout: so a number says which have means."""

    @given(
        length=st.integers(0, 100_000), window=st.integers(0, 300), seal=st.integers(0, 100), most=st.integers(1, 50_000),
        least=st.integers(1, 100), nlist=st.integers(1, 64),
    )
    def check(length: int, window: int, seal: int, most: int, least: int, nlist: int) -> None:
        layout = Layout(4, window, seal, most, 0, least)
        segments = layout.segments(length)
        sizes = [stop - start for start, stop in segments]
        count = layout.num_means(segments, nlist)
        assert sizes == sorted(sizes, reverse=True)
        assert all((size >= least * nlist) == (s < count) for s, size in enumerate(sizes))
        assert count <= layout.most_means(length, nlist)

    check()


@INDEXES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_a_softmax_over_tokens_and_means(name: str, dtype: torch.dtype) -> None:
    index = filled(name, [300, 40, 170], dtype=dtype, selectivity=0.2, tail=0.3)
    queries = tokens(3, 4, 2, 32, torch.float32, 9)
    selection = index.select(queries)
    out, lse = index.attend_selected(queries, selection, return_lse=True)
    assert torch.equal(out, index.search_attend(queries))
    lists, entries = index.invlists, 0
    for i in range(3):
        budget = index.options.params.budget(lists.sealed(i) - lists.sinks(i))
        for head in range(2):
            rows = selection.rows[i, head, : selection.counts[i, head]].long()
            runs = selection.tail[i, head, : selection.tail_counts[i, head]].long()
            assert len(rows) + len(runs) <= budget and len(runs) <= 0.3 * budget
            recent = torch.arange(lists.sealed(i), lists.lengths[i])
            ids = torch.cat([torch.arange(lists.sinks(i)), rows, recent])
            k, v = lists.keys[i, head, ids], lists.values[i, head, ids]
            sizes = []
            for run in runs.tolist():
                low, high = lists.tables[i, head, run // 4, run % 4 :][:2].tolist()
                assert high > low and not ((rows >= low) & (rows < high)).any()
                sizes.append(high - low)
                k = torch.cat([k, lists.mean_keys[i, head, run // 4, run % 4][None]])
                v = torch.cat([v, lists.mean_values[i, head, run // 4, run % 4][None]])
            entries += len(runs)
            hidden = ids[None] > lists.lengths[i] - 2 + torch.arange(2)[:, None]
            logits = index.scale * queries[i, 2 * head : 2 * head + 2].double() @ k.double().T
            logits[..., len(ids) :] += torch.tensor(sizes, dtype=torch.float64).log()
            logits[..., : len(ids)].masked_fill_(hidden, -torch.inf)
            want = torch.softmax(logits, -1) @ v.double()
            assert torch.allclose(out[i, 2 * head : 2 * head + 2].double(), want, rtol=0, atol=2e-5)
            assert torch.allclose(lse[i, 2 * head : 2 * head + 2].double(), logits.logsumexp(-1), rtol=0, atol=2e-5)
    assert entries
    stats = index.stats()
    row_bytes = 72 * dtype.itemsize
    assert stats.last_search.tail_entries == entries / 6 and stats.last_search.mean_bytes == entries * row_bytes
    assert stats.last_search.total_bytes > stats.last_search.kv_bytes + stats.last_search.mean_bytes
    means = sum(lists.num_means(i) for i in range(3))
    assert stats.mean_bytes == means * 2 * 4 * row_bytes and stats.mean_bytes < stats.metadata_bytes


@INDEXES
def test_runs_of_equal_keys_lose_nothing(name: str) -> None:
    """If all keys of a list are one key, the mean says all: the estimate is dense attention at a fraction of the bytes."""
    index = small_index(32, 40, 4, 4, 2, backend=name, **OPTIONS)
    values, nos = tokens(1, 2, 400, 40, seed=2), torch.randint(0, 4, (1, 2, 400), generator=torch.Generator().manual_seed(3))
    one = tokens(1, 2, 4, 32, seed=1)
    keys = one.gather(2, nos[..., None].expand(-1, -1, -1, 32)).contiguous()
    index.add_preassigned(keys, values, nos)
    queries = tokens(1, 4, 1, 32, seed=4)
    assert index.invlists.num_means(0) >= 3
    got = index.search_attend(queries, params=SearchParametersIVF(selectivity=0.3, tail=0.4))
    stats = index.stats().last_search
    assert stats.tail_entries + stats.read_sealed < 0.31 * stats.sealed_tokens
    sealed = index.invlists.segments[0][index.invlists.num_means(0) - 1][1]
    error = {}
    for what, tail in (("with", 0.4), ("without", 0.0)):
        got = index.search_attend(queries, params=SearchParametersIVF(selectivity=0.3, tail=tail))
        want = [dense(queries[0, 2 * k : 2 * k + 2], keys[0, k], values[0, k], index.scale)[0] for k in range(2)]
        error[what] = float((got.double()[0] - torch.from_numpy(np.concatenate(want))).abs().max())
    assert sealed and error["with"] < 0.5 * error["without"]


@INDEXES
def test_a_tail_that_leaves_out_nothing_is_dense_attention(name: str) -> None:
    """Rows of the segments without means, means of one-key runs for all the others: exactly dense."""
    index = small_index(32, 40, 4, 4, 2, backend=name, mean_run_tokens=1)
    values, nos = tokens(1, 2, 90, 40, seed=2), torch.arange(90).expand(1, 2, -1) % 4
    one = tokens(1, 2, 4, 32, seed=1)
    keys = one.gather(2, nos[..., None].expand(-1, -1, -1, 32)).contiguous()
    index.add_preassigned(keys, values, nos.contiguous())
    runs = index.invlists.num_means(0) * 4
    sealed = index.invlists.sealed(0) - index.invlists.sinks(0)
    assert index.invlists.num_means(0) == len(index.invlists.segments[0])
    queries = tokens(1, 4, 1, 32, seed=4)
    got = index.search_attend(queries, params=SearchParametersIVF(selectivity=1.0, max_codes=runs + 1, tail=runs / (runs + 1)))
    assert index.stats().last_search.read_sealed == 1 < sealed
    for k in range(2):
        # the cut run lost all but one of its tokens: dense over the others
        ids = index.read_ids(index._last)[0][k].tolist()
        segments = {s: t for s, t in enumerate(index.invlists.segments[0])}
        cut = next(t for t in ids if 2 <= t < index.invlists.sealed(0))
        s = next(s for s, (low, high) in segments.items() if low <= cut < high)
        gone = [t for t in range(*segments[s]) if t % 4 == cut % 4 and t != cut]
        kept = [t for t in range(90) if t not in gone]
        want, _ = dense(queries[0, 2 * k : 2 * k + 2], keys[0, k, kept], values[0, k, kept], index.scale)
        assert np.abs(got[0, 2 * k : 2 * k + 2].double().numpy() - want).max() < 2e-5


def means_of(index: AsymmetricIndex, i: int) -> list[Tensor]:
    count = index.invlists.num_means(i)
    return [index.invlists.mean_keys[i, :, :count], index.invlists.mean_values[i, :, :count]]


@INDEXES
def test_means_follow_the_tokens(name: str, tmp_path: Path) -> None:
    """However a state is reached, its means are those of a fresh index with the same tokens, bit for bit."""
    fresh, n = filled(name, [200]), 200

    def same(index: AsymmetricIndex, i: int = 0) -> None:
        assert index.invlists.num_means(i) == fresh.invlists.num_means(0) >= 2
        assert all(torch.equal(a, b) for a, b in zip(means_of(index, i), means_of(fresh, 0), strict=True))

    keys, values = tokens(1, 2, 260, 32, seed=1), tokens(1, 2, 260, 40, seed=2)
    keys[:, :, :n], values[:, :, :n] = (x[:, :, :n] for x in (tokens(1, 2, n, 32, seed=1), tokens(1, 2, n, 40, seed=2)))
    stepwise = small_index(32, 40, 4, 4, 2, backend=name, **OPTIONS)
    for t in range(n):
        stepwise.add(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    same(stepwise)
    stepwise.add(keys[:, :, n:], values[:, :, n:])
    stepwise.truncate(n)
    same(stepwise)
    same(stepwise.fork([0, 0]), 1)
    write_index(stepwise, tmp_path / "index")
    same(read_index(tmp_path / "index", backend=name))
    stepwise.window = 20
    stepwise.window = fresh.window
    same(stepwise)
    stepwise.mean_run_tokens = 0
    assert stepwise.invlists.mean_keys.numel() == 0 and stepwise.stats().mean_bytes == 0
    stepwise.mean_run_tokens = 3
    stepwise.reclaim_memory()
    same(stepwise)
    stepwise.reserve_memory(1000)
    same(stepwise)
    longer = small_index(32, 40, 4, 4, 2, backend=name, **OPTIONS)
    longer.add(torch.cat([keys[:, :, :9], keys[:, :, :n]], 2), torch.cat([values[:, :, :9], values[:, :, :n]], 2))
    longer.remove_ids(range(9))
    if name == "reference":  # other backends may assign keys to other lists where two are equally near
        assert longer.invlists.num_means(0) == fresh.invlists.num_means(0)
    else:
        same(longer)


@pytest.mark.parametrize("least", [4, 34])
def test_memory_of_means(least: int) -> None:
    """At most one row in mean_run_tokens: 3 % at 34, of what is stored and of what is allocated."""
    index = filled("cpu", [5000], mean_run_tokens=least, max_segment=32768)
    stats, lists = index.stats(), index.invlists
    assert 0 < stats.mean_bytes <= stats.kv_bytes / least
    assert lists.mean_keys.nbytes + lists.mean_values.nbytes <= (lists.keys.nbytes + lists.values.nbytes) / least


@INDEXES
def test_a_wider_window_takes_entries_away(name: str) -> None:
    """Tokens that a call's window or sinks add are not counted again through the mean of their run."""
    index = filled(name, [300], selectivity=0.1, tail=0.9)
    queries = tokens(1, 4, 1, 32, seed=9)
    plain, lists = index.select(queries), index.invlists
    wide = index.select(queries, params=SearchParametersIVF(window=250, sinks=6))
    assert int(wide.tail_counts.sum()) < int(plain.tail_counts.sum())
    for head in range(2):
        rows = wide.rows[0, head, : wide.counts[0, head]]
        runs = wide.tail[0, head, : wide.tail_counts[0, head]].tolist()
        assert set(runs) <= set(plain.tail[0, head].tolist()) and bool((wide.tail[0, head, len(runs) :] == -1).all())
        for run in runs:
            low, high = lists.tables[0, head, run // 4, run % 4 :][:2].tolist()
            assert not ((rows >= low) & (rows < high)).any()
    index.attend_selected(queries, wide)


def test_parameters() -> None:
    index = filled("cpu", [200])
    queries = tokens(1, 4, 1, 32, seed=9)
    assert index.tail == 0 and index.mean_run_tokens == 3 and index.select(queries).tail is None
    index.tail = 0.5
    assert index.select(queries).tail is not None
    assert index.select(queries, params=SearchParametersIVF(nprobe=2)).tail is None, "whole lists have no tail"
    assert index.select(queries, params=SearchParametersIVF(tail=0.0)).tail is None
    assert index.select(queries, params=SearchParametersIVF(selectivity=1.0)).rows is None, "to read all is to estimate nothing"
    with pytest.raises(ParameterError, match=r"mean_run_tokens: expected at least 1 while tail is 0.5, got 0"):
        index.mean_run_tokens = 0
    with pytest.raises(ParameterError, match=r"nprobe, tail: expected one of them, got nprobe=2, tail=0.1"):
        SearchParametersIVF(nprobe=2, tail=0.1)
    for tail in (-0.1, 1.0, True, "0.1"):
        with pytest.raises(ParameterError, match=r"tail: expected 0 <= tail < 1, got"):
            index.tail = tail
    bare = filled("cpu", [200], mean_run_tokens=0)
    for call in (lambda: setattr(bare, "tail", 0.2), lambda: bare.select(queries, params=SearchParametersIVF(tail=0.2))):
        with pytest.raises(ParameterError, match=r"tail: expected an index with mean_run_tokens of 1 or more, got"):
            call()
    assert bare.tail == 0
    index.query_router = random_router(2, 4, 32, knots=-1, size_weighted=False)
    with pytest.raises(CompatibilityError, match=r"tail: expected a query_router of mass per token, got the published"):
        index.search_attend(queries)
    index.nprobe = 2
    assert index.tail == 0 and index.search_attend(queries).isfinite().all()


