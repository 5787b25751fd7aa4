"""What a FAISS user finds under FAISS's names: the table of members, their parameters, and one program on both."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import faiss
import faiss.contrib.ivf_tools
import numpy as np
import pytest
import torch

import saap_index
from saap_index import AsymmetricIndex, KeyQuantizer, QueryRouter, SearchParametersIVF

IVF = faiss.IndexIVFFlat
# FAISS's member -> ours, and the parameters (FAISS's name -> ours) that mean the same in both.
METHODS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, str]]] = {
    "train": (IVF.train, AsymmetricIndex.train, {"x": "keys"}),
    "add": (IVF.add, AsymmetricIndex.add, {"x": "keys"}),
    "search": (IVF.search, AsymmetricIndex.search, {"x": "queries", "k": "k", "params": "params"}),
    "reset": (IVF.reset, AsymmetricIndex.reset, {}),
    "reconstruct": (IVF.reconstruct, AsymmetricIndex.reconstruct, {"key": "ids"}),
    "reconstruct_batch": (IVF.reconstruct_batch, AsymmetricIndex.reconstruct, {"key": "ids"}),
    "remove_ids": (IVF.remove_ids, AsymmetricIndex.remove_ids, {"x": "ids"}),
    "search_preassigned": (
        faiss.contrib.ivf_tools.search_preassigned, AsymmetricIndex.search_attend_preassigned,
        {"xq": "queries", "list_nos": "list_nos"},
    ),
    "add_preassigned": (
        faiss.contrib.ivf_tools.add_preassigned, AsymmetricIndex.add_preassigned, {"x": "keys", "a": "list_nos"},
    ),
    "write_index": (faiss.write_index, saap_index.write_index, {}),
    "read_index": (faiss.read_index, saap_index.read_index, {}),
    "invlists.imbalance_factor": (faiss.InvertedLists.imbalance_factor, AsymmetricIndex.stats, {}),
}
# GpuIndexIVFFlat.reserveMemory(numVecs) and reclaimMemory(): only in builds of FAISS with a GPU, so by name
GPU_METHODS = {"reserveMemory": (AsymmetricIndex.reserve_memory, ["n"]), "reclaimMemory": (AsymmetricIndex.reclaim_memory, [])}
ATTRIBUTES = ["d", "ntotal", "is_trained", "nlist", "nprobe", "max_codes", "invlists"]
# Where FAISS has one, we have two.
SPLIT = {"quantizer": ("key_quantizer", "query_router")}


def parameters(function: Callable[..., Any]) -> list[str]:
    """Named parameters, without self; SWIG's wrappers of C++ have none but *args."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.name not in ("self", "index", "index_ivf") and p.kind not in kinds]


@pytest.mark.parametrize("member", METHODS)
def test_methods(member: str) -> None:
    theirs, ours, same = METHODS[member]
    known = parameters(theirs)
    if known:
        assert set(same) <= set(known), f"FAISS's {member} has {known}"
    found = parameters(ours)
    assert set(same.values()) <= set(found), f"ours has {found}"
    shared = [name for name in known if name in same]
    assert [same[name] for name in shared] == [name for name in found if name in {same[x] for x in shared}], "in the same order"


def test_search_takes_what_faiss_takes() -> None:
    """search(x, k, *, params): k by position, params by keyword only, in both."""
    for function in (IVF.search, AsymmetricIndex.search):
        found = inspect.signature(function).parameters
        assert list(found)[2] == "k" and found["k"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert found["params"].kind is inspect.Parameter.KEYWORD_ONLY and found["params"].default is None


@pytest.mark.parametrize("member", GPU_METHODS)
def test_gpu_methods(member: str) -> None:
    ours, wanted = GPU_METHODS[member]
    assert parameters(ours)[: len(wanted)] == wanted
    assert ours.__name__ == member.replace("M", "_m")


def test_attributes() -> None:
    theirs = IVF(faiss.IndexFlatIP(32), 32, 4)
    ours = AsymmetricIndex(d=32, nlist=4)
    ours.reserve_memory(8, batch=1)
    for name in ATTRIBUTES:
        assert hasattr(theirs, name) and hasattr(ours, name), name
    for name, halves in SPLIT.items():
        assert hasattr(theirs, name) and all(hasattr(ours, half) for half in halves)
    for name in ("d", "ntotal", "is_trained", "nlist", "max_codes"):
        if name != "is_trained":  # FAISS's quantizer is flat here, and counts as trained when it holds nlist vectors
            assert getattr(theirs, name) == getattr(ours, name), name
        assert type(getattr(theirs, name)) is type(getattr(ours, name))
    assert ours.is_trained is False


def test_search_parameters() -> None:
    """The same class name, the same keywords, applied to one call only."""
    for name in ("nprobe", "max_codes"):
        theirs, ours = faiss.SearchParametersIVF(**{name: 3}), SearchParametersIVF(**{name: 3})
        assert getattr(theirs, name) == getattr(ours, name) == 3
    assert type(faiss.SearchParametersIVF()).__name__ == SearchParametersIVF.__name__


def test_imbalance_factor_is_faiss_s() -> None:
    r = np.random.default_rng(0)
    nos = r.choice(8, size=400, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05, 0.0])
    index = AsymmetricIndex(d=32, nlist=8, window=0, sinks=0, seal_tokens=4, break_even=0)
    x = torch.randn(1, 1, 400, 32)
    index.add_preassigned(x, x, torch.from_numpy(nos)[None, None])
    sealed = index.stats().sealed_tokens
    lists = faiss.ArrayInvertedLists(8, 4)
    for no in range(8):
        size = int((nos[:sealed] == no).sum())
        if size:
            lists.add_entries(no, size, faiss.swig_ptr(np.zeros(size, np.int64)), faiss.swig_ptr(np.zeros(4 * size, np.uint8)))
    assert index.stats().imbalance_factor == pytest.approx(lists.imbalance_factor(), rel=1e-9)


def ours_like(ivf: faiss.IndexIVFFlat) -> AsymmetricIndex:
    """An empty index with FAISS's centroids on both sides, and no window, so that few tokens stay out of the lists."""
    index = AsymmetricIndex(d=ivf.d, nlist=ivf.nlist, d_v=8, window=0, sinks=0, seal_tokens=4, break_even=0)
    centroids = torch.from_numpy(ivf.quantizer.reconstruct_n(0, ivf.nlist))[None]
    index.key_quantizer, index.query_router = KeyQuantizer(centroids), QueryRouter.symmetric(centroids)
    return index


def test_one_program_on_both() -> None:
    """NumPy in, NumPy out; (n, d) arrays; the same calls give the same state and, where nothing is left out, the same results."""
    r = np.random.default_rng(0)
    x, queries = r.normal(size=(600, 32)).astype(np.float32), r.normal(size=(7, 32)).astype(np.float32)
    values = r.normal(size=(600, 8)).astype(np.float32)
    theirs = faiss.IndexIVFFlat(faiss.IndexFlatL2(32), 32, 6, faiss.METRIC_INNER_PRODUCT)
    theirs.cp.min_points_per_centroid = 1
    theirs.train(x)
    ours = ours_like(theirs)
    for index, extra in ((theirs, ()), (ours, (values,))):
        assert index.is_trained and index.ntotal == 0 and index.d == 32 and index.nlist == 6
        index.add(x[:400], *(v[:400] for v in extra))
        index.add(x[400:], *(v[400:] for v in extra))
        assert index.ntotal == 600
        index.nprobe = 6
    assert ours.nprobe == theirs.nprobe == 6
    theirs.make_direct_map()
    assert np.array_equal(ours.reconstruct(5)[0][0, 0].numpy(), theirs.reconstruct(5))
    theirs.set_direct_map_type(faiss.DirectMap.NoMap)  # it cannot remove ids otherwise

    def same() -> None:
        (scores, ids), (want_scores, want_ids) = ours.search(queries, 10), theirs.search(queries, 10)
        for got, want in ((scores, want_scores), (ids, want_ids)):
            assert isinstance(got, np.ndarray) and got.dtype == want.dtype and got.shape == want.shape
        assert np.array_equal(ids, want_ids)
        np.testing.assert_allclose(scores, want_scores, rtol=1e-5, atol=1e-5)

    same()
    few_ids, want_ids = ours.search(queries[:1], 700)[1], theirs.search(queries[:1], 700)[1]
    assert np.array_equal(few_ids, want_ids) and (few_ids[0, 600:] == -1).all(), "what is missing is -1 in both"
    ids = np.array([0, 17, 599, 10**6])
    assert ours.remove_ids(ids) == theirs.remove_ids(ids) == 3
    assert ours.ntotal == theirs.ntotal == 597
    same()
    keys, _ = ours.reconstruct(5)
    assert np.array_equal(keys[0, 0].numpy(), x[5])
    for index in (ours, theirs):
        index.reset()
        assert index.ntotal == 0 and index.is_trained and index.nprobe == 6
    assert (ours.search(queries, 3)[1] == -1).all() and (theirs.search(queries, 3)[1] == -1).all()
    out = ours.search_attend(queries[:2])
    assert isinstance(out, np.ndarray) and out.shape == (2, 8) and out.dtype == np.float32 and not out.any()


def test_per_call_parameters_leave_the_index_alone() -> None:
    r = np.random.default_rng(1)
    x, queries = r.normal(size=(300, 32)).astype(np.float32), r.normal(size=(3, 32)).astype(np.float32)
    ivf = faiss.index_factory(32, "IVF5,Flat", faiss.METRIC_INNER_PRODUCT)
    ivf.cp.min_points_per_centroid = 1
    ivf.train(x)
    index = ours_like(ivf)
    index.add(x, x[:, :8])
    index.nprobe = 2
    before = index.search(queries, 4)
    everything = index.search(queries, 4, params=SearchParametersIVF(nprobe=5))
    assert index.nprobe == 2 and all(np.array_equal(a, b) for a, b in zip(before, index.search(queries, 4), strict=True))
    ivf.add(x)
    wanted = ivf.search(queries, 4, params=faiss.SearchParametersIVF(nprobe=5))
    assert np.array_equal(everything[1], wanted[1])


def test_add_preassigned_fills_the_same_lists() -> None:
    r = np.random.default_rng(2)
    x, nos = r.normal(size=(200, 32)).astype(np.float32), r.integers(0, 5, 200)
    ivf = faiss.index_factory(32, "IVF5,Flat", faiss.METRIC_INNER_PRODUCT)
    ivf.cp.min_points_per_centroid = 1
    ivf.train(x)
    index = ours_like(ivf)
    index.add_preassigned(x, x[:, :8], nos)
    faiss.contrib.ivf_tools.add_preassigned(ivf, x, nos)
    back, _ = index.to_faiss()
    sizes = [[i.invlists.list_size(no) for no in range(5)] for i in (back, ivf)]
    assert sizes[0] == sizes[1] == np.bincount(nos, minlength=5).tolist()
