"""The whole index against two independent implementations: torch's attention, and FAISS's IVF search."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from faiss.contrib.ivf_tools import search_preassigned
from helpers import small_index, tokens
from torch import Tensor
from torch.nn import functional

from saap_index import AsymmetricIndex, CompatibilityError, ParameterError, SearchParametersIVF, ShapeError, merge_states

BACKENDS = ("cpu", "torch", "reference")
NLIST = 4
EPS32 = torch.finfo(torch.float32).eps

over_backends = pytest.mark.parametrize("backend", BACKENDS)

#          query heads, KV heads, d, d_v, dtype, q, lengths
CASES = {
    "one head": (1, 1, 32, 32, torch.float32, 1, [300]),
    "MHA": (4, 4, 64, 64, torch.float32, 1, [300]),
    "GQA of 2": (4, 2, 64, 64, torch.bfloat16, 1, [200, 200]),
    "GQA of 3": (9, 3, 64, 64, torch.float16, 2, [250, 130, 77]),
    "GQA of 4": (8, 2, 128, 128, torch.bfloat16, 1, [400, 40]),
    "GQA of 7": (14, 2, 64, 64, torch.bfloat16, 3, [222]),
    "GQA of 8": (8, 1, 128, 128, torch.float16, 4, [300, 299]),
    "MQA of 16": (16, 1, 64, 64, torch.float32, 8, [260]),
    "narrow values": (4, 2, 96, 32, torch.float32, 5, [190, 12]),
    "wide values": (4, 2, 40, 256, torch.bfloat16, 6, [190, 191]),
    "widest": (2, 2, 256, 256, torch.float16, 7, [300]),
    "too short to seal": (4, 2, 64, 64, torch.float32, 8, [9, 8, 15]),
    "an empty sequence": (4, 2, 64, 64, torch.float32, 1, [120, 0, 1]),
    "fewer tokens than queries": (4, 2, 32, 32, torch.float32, 8, [3, 120]),
}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def build(case: tuple, backend: str, **options: object) -> tuple[AsymmetricIndex, Tensor, Tensor, Tensor]:
    """An index that holds the ragged batch of a case, its keys and values, and queries of the same dtype."""
    hq, h, d, d_v, dtype, q, lengths = case
    b, n = len(lengths), max(lengths)
    keys, values = tokens(b, h, n, d, dtype, 1), tokens(b, h, n, d_v, dtype, 2)
    index = small_index(d, d_v, NLIST, hq, h, dtype=dtype, backend=backend, **options)
    index.add(keys, values, lengths=lengths)
    return index, keys, values, 2 * tokens(b, hq, q, d, dtype, 3)


def sdpa(queries: Tensor, keys: Tensor, values: Tensor, lengths: list[int], scale: float, dtype: torch.dtype) -> Tensor:
    """Torch's attention of the last q tokens of every sequence, in the precision of ``dtype``; 0 where nothing is seen."""
    q, n = queries.shape[2], keys.shape[2]
    ends = torch.tensor(lengths)[:, None] - q + 1 + torch.arange(q)  # query i sees the tokens before its own and its own
    seen = (torch.arange(n) < ends[:, :, None])[:, None]
    out = functional.scaled_dot_product_attention(
        queries.to(dtype), keys.to(dtype), values.to(dtype), attn_mask=seen, scale=scale, enable_gqa=True
    )
    return torch.where(seen.any(-1, keepdim=True), out, 0)


def check(out: Tensor, index: AsymmetricIndex, queries: Tensor, keys: Tensor, values: Tensor) -> None:
    """Error against float64 at most twice torch's own in the precision of the queries, plus rounding."""
    want = sdpa(queries, keys, values, index.lengths, index.scale, torch.float64)
    theirs = sdpa(queries, keys, values, index.lengths, index.scale, queries.dtype).double()
    allowed = 2 * (theirs - want).abs().max() + (torch.finfo(out.dtype).eps + 64 * EPS32) * values.abs().max()
    error = (out.double() - want).abs().max()
    assert out.dtype == queries.dtype and error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


# -- torch's attention ----------------------------------------------------------------------------------------------------


@over_backends
@over_cases
def test_reading_everything_is_attention(case: tuple, backend: str) -> None:
    """By selectivity, by nprobe, by naming every list: three ways to read all, one result."""
    index, keys, values, queries = build(case, backend)
    everything = {
        "selectivity": index.search_attend(queries, params=SearchParametersIVF(selectivity=1.0)),
        "nprobe": index.search_attend(queries, params=SearchParametersIVF(nprobe=NLIST)),
        "more lists than there are": index.search_attend(queries, params=SearchParametersIVF(nprobe=NLIST + 9)),
        "preassigned": index.search_attend_preassigned(queries, all_lists(index)),
    }
    for way, out in everything.items():
        check(out, index, queries, keys, values)
        assert out.shape == (*queries.shape[:3], index.d_v), way
    sealed = [bool(segments) for segments in index.invlists.segments]
    assert sealed == [n >= 2 + 8 + 4 for n in index.lengths], "the cases do exercise segments"


def all_lists(index: AsymmetricIndex) -> Tensor:
    return torch.arange(index.nlist).expand(index.invlists.batch, index.num_kv_heads, -1).contiguous()


@over_backends
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_of_another_dtype(backend: str, stored: torch.dtype, asked: torch.dtype) -> None:
    index, keys, values, _ = build((4, 2, 64, 32, stored, 1, [150, 40]), backend)
    queries = tokens(2, 4, 2, 64, asked, 5)
    check(index.search_attend(queries, params=SearchParametersIVF(nprobe=NLIST)), index, queries, keys, values)


@over_backends
def test_below_break_even_any_budget_is_attention(backend: str) -> None:
    index, keys, values, queries = build((4, 2, 64, 64, torch.float32, 2, [120, 60]), backend, break_even=121, nprobe=1)
    check(index.search_attend(queries), index, queries, keys, values)
    assert index.stats().num_segments == 0


@over_backends
def test_one_token_at_a_time(backend: str) -> None:
    """Prefill, then decode with a query a step, through the break-even length and several merges."""
    hq, h, d, n = 4, 2, 32, 150
    keys, values, queries = tokens(1, h, n, d, seed=1), tokens(1, h, n, d, seed=2), tokens(1, hq, n, d, seed=3)
    index = small_index(d, d, NLIST, hq, h, backend=backend, break_even=50, selectivity=1.0)
    index.add(keys[:, :, :40], values[:, :, :40])
    for t in range(40, n):
        index.add(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        out = index.search_attend_preassigned(queries[:, :, t : t + 1], all_lists(index))
        check(out, index, queries[:, :, t : t + 1], keys[:, :, : t + 1], values[:, :, : t + 1])
    assert index.stats().num_segments > 3


@over_backends
def test_two_halves_merge(backend: str) -> None:
    case = (4, 2, 64, 32, torch.float32, 1, [160, 90])
    keys, values = tokens(2, 2, 160, 64, seed=1), tokens(2, 2, 160, 32, seed=2)
    queries, state = tokens(2, 4, 1, 64, seed=3), None
    for part in (slice(0, 71), slice(71, 160)):
        index = small_index(64, 32, NLIST, 4, 2, backend=backend, nprobe=NLIST)
        lengths = [min(n, part.stop) - min(n, part.start) for n in case[-1]]
        index.add(keys[:, :, part], values[:, :, part], lengths=lengths)
        found = index.search_attend(queries, return_lse=True)
        state = found if state is None else merge_states(*state, *found)
    assert state is not None
    whole = build(case, backend)[0]
    check(state[0], whole, queries, keys, values)
    logits = whole.scale * queries.double() @ keys.double().repeat_interleave(2, 1).transpose(2, 3)
    seen = torch.arange(160) < torch.tensor([[160], [90]])[:, None, None]
    want = logits.masked_fill(~seen, -torch.inf).logsumexp(-1)
    assert torch.allclose(state[1].double(), want, rtol=0, atol=1e-5)


# -- FAISS ----------------------------------------------------------------------------------------------------------------


def faiss_visits(ivf: faiss.IndexIVF, query: np.ndarray, lists: list[int]) -> dict[int, float]:
    """Every id in these lists with its inner product, by FAISS's own search_preassigned with k = ntotal."""
    probes = np.full((1, max(1, len(lists))), -1, np.int64)
    probes[0, : len(lists)] = lists
    ivf.nprobe = probes.shape[1]  # FAISS insists
    products, ids = search_preassigned(ivf, query[None], ivf.ntotal, probes, np.zeros(probes.shape, np.float32))
    return {int(i): float(p) for i, p in zip(ids[0], products[0], strict=True) if i >= 0}


@over_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window, sinks", [(0, 0), (8, 2)])
def test_preassigned_search_is_faiss_and_a_softmax(backend: str, dtype: torch.dtype, window: int, sinks: int) -> None:
    """The visited set, the inner products, and what the softmax over them makes of FAISS's own values."""
    hq, h, d, lengths = 6, 2, 32, [170, 90]
    index, _, _, _ = build((hq, h, d, 24, dtype, 1, lengths), backend, window=window, sinks=sinks)
    queries = tokens(2, hq, 1, d, dtype, 9)
    chosen = torch.tensor([[[0, 2], [3, -1]], [[1, 1], [-1, -1]]])  # a duplicate, and lists of nothing
    out, lse = index.search_attend_preassigned(queries, chosen, return_lse=True)
    read = index.read_ids(index._last)
    for i, n in enumerate(lengths):
        dense = {*range(sinks), *range(index.invlists.sealed(i), n)}
        for head in range(h):
            ivf, values = index.to_faiss(i, head)
            assert ivf.ntotal == n and values.shape == (n, 24)
            lists = sorted({x for x in chosen[i, head].tolist() if x >= 0})
            for g in range(hq // h):
                query = queries[i, head * (hq // h) + g, 0].float().numpy()
                everything = faiss_visits(ivf, query, list(range(NLIST)))
                visited = faiss_visits(ivf, query, lists) if lists else {}
                assert len(everything) == n
                ids = sorted({*visited, *dense})
                assert ids == read[i][head].tolist()
                logits = index.scale * np.array([everything[x] for x in ids], np.float64)
                weights = np.exp(logits - logits.max())
                want = weights @ values[ids] / weights.sum()
                got = out[i, head * (hq // h) + g, 0].double().numpy()
                eps = torch.finfo(dtype).eps
                assert np.abs(got - want).max() <= (2 * eps + 64 * EPS32) * np.abs(values).max()
                got_lse = float(lse[i, head * (hq // h) + g, 0])
                assert abs(got_lse - (np.log(weights.sum()) + logits.max())) <= 64 * EPS32 * (1 + np.abs(logits).max())


@over_backends
def test_to_faiss_has_every_token_in_its_list(backend: str) -> None:
    index, keys, values, _ = build((2, 2, 32, 40, torch.float32, 1, [140, 60]), backend)
    removed = [3, 17, 70]
    index.remove_ids([np.array(removed), np.array([], np.int64)])
    given = torch.full((2, 2, 5), 1, dtype=torch.int64)
    more = tokens(2, 2, 5, 32, seed=11), tokens(2, 2, 5, 40, seed=12)
    index.add_preassigned(*more, given)
    for i, gone in enumerate((removed, [])):
        old = [140, 60][i]
        all_keys, all_values = (torch.cat([x[i, :, :old], y[i]], 1) for x, y in zip((keys, values), more, strict=True))
        kept = np.setdiff1d(np.arange(old + 5), gone)
        for head in range(2):
            ivf, found = index.to_faiss(i, head)
            lists = list_of(ivf)
            assert sorted(lists) == kept.tolist() and ivf.ntotal == index.lengths[i] == len(kept)
            nearest = index.key_quantizer.assign(all_keys)[head]
            assert all(lists[x] == (int(nearest[x]) if x < old else 1) for x in kept.tolist())
            assert all(np.array_equal(vector(ivf, lists[x], x), all_keys[head, x]) for x in kept.tolist())
            assert np.array_equal(found[kept], all_values[head, kept].numpy()) and not found[gone].any()


def vector(ivf: faiss.IndexIVFFlat, list_no: int, position: int) -> np.ndarray:
    """The stored vector of one id of one list."""
    size = ivf.invlists.list_size(list_no)
    ids = faiss.rev_swig_ptr(ivf.invlists.get_ids(list_no), size)
    vectors = faiss.rev_swig_ptr(ivf.invlists.get_codes(list_no), size * ivf.code_size).view(np.float32).reshape(size, ivf.d)
    return vectors[np.flatnonzero(ids == position)[0]]


def trained_faiss(n: int, d: int = 32, nlist: int = 8) -> tuple[faiss.IndexIVFFlat, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    ivf = faiss.index_factory(d, f"IVF{nlist},Flat", faiss.METRIC_INNER_PRODUCT)
    ivf.cp.min_points_per_centroid = 1
    ivf.train(x)
    ivf.add(x)
    return ivf, x


def list_of(ivf: faiss.IndexIVF) -> dict[int, int]:
    found = {}
    for x in range(ivf.nlist):
        size = ivf.invlists.list_size(x)
        if size:
            found.update(dict.fromkeys(faiss.rev_swig_ptr(ivf.invlists.get_ids(x), size).tolist(), x))
    return found


@over_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_from_faiss_and_back(backend: str, dtype: torch.dtype) -> None:
    ivf, x = trained_faiss(500)
    values = np.random.default_rng(1).normal(size=(500, 40)).astype(np.float32)
    options = {"window": 16, "sinks": 2, "seal_tokens": 8, "break_even": 0, "backend": backend, "dtype": dtype}
    index = AsymmetricIndex.from_faiss(ivf, values, **options)
    assert (index.d, index.d_v, index.nlist, index.ntotal, index.is_trained) == (32, 40, 8, 500, True)
    keys, stored = index.reconstruct(range(500))
    assert torch.equal(keys[0], torch.from_numpy(x).to(dtype)) and torch.equal(stored[0], torch.from_numpy(values).to(dtype))
    back, back_values = index.to_faiss()
    assert list_of(back) == list_of(ivf) and back.ntotal == 500
    assert np.array_equal(back_values, stored[0].float().numpy())
    assert np.array_equal(back.quantizer.reconstruct_n(0, 8), ivf.quantizer.reconstruct_n(0, 8))


@over_backends
@pytest.mark.parametrize("nprobe", [1, 2, 5, 8])
def test_search_with_a_symmetric_router_is_faiss(backend: str, nprobe: int) -> None:
    """The same lists by the same inner products; to FAISS's visited set come the recent tokens, which we always read."""
    ivf, x = trained_faiss(500)
    values = np.zeros((500, 8), np.float32)
    index = AsymmetricIndex.from_faiss(ivf, values, window=0, sinks=0, seal_tokens=4, break_even=0, backend=backend)
    queries = np.random.default_rng(2).normal(size=(6, 32)).astype(np.float32)
    k = 20
    scores, ids = index.search(queries, k, params=SearchParametersIVF(nprobe=nprobe))
    assert isinstance(scores, np.ndarray) and scores.shape == ids.shape == (6, k)
    recent = np.arange(index.invlists.sealed(0), 500)
    assert 8 <= len(recent) < 12
    everything, all_ids = ivf.search(queries, ivf.ntotal, params=faiss.SearchParametersIVF(nprobe=nprobe))
    for query, got, got_ids, inner, visited in zip(queries, scores, ids, everything, all_ids, strict=True):
        want = dict(zip(visited[visited >= 0].tolist(), inner[visited >= 0].tolist(), strict=True))
        want.update(zip(recent.tolist(), (x[recent] @ query).tolist(), strict=True))
        best = sorted(want, key=lambda i: -want[i])[:k]
        np.testing.assert_allclose(got[: len(best)], [want[i] for i in best], rtol=1e-5, atol=1e-5)
        assert got_ids[: len(best)].tolist() == best
        assert (got_ids[len(best) :] == -1).all() and (got[len(best) :] == -np.inf).all()


def test_from_faiss_refuses_what_it_cannot_hold() -> None:
    ivf, x = trained_faiss(100)
    values = np.zeros((100, 8), np.float32)
    flat = faiss.IndexFlatIP(32)
    with pytest.raises(CompatibilityError, match="faiss_index: expected an IndexIVFFlat, got IndexFlat"):
        AsymmetricIndex.from_faiss(flat, values)
    with pytest.raises(ShapeError, match="values: expected"):
        AsymmetricIndex.from_faiss(ivf, values[:99])
    with pytest.raises(ShapeError, match="values: expected"):
        AsymmetricIndex.from_faiss(ivf, values[0])
    ivf.add_with_ids(x[:1], np.array([7]))
    with pytest.raises(ParameterError, match="faiss_index: expected ids"):
        AsymmetricIndex.from_faiss(ivf, np.zeros((101, 8), np.float32))
