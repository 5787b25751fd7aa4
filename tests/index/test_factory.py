"""FAISS's factory, parameter strings, clones and inverted lists."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from helpers import small_index, tokens

import saap_index
from saap_index import AsymmetricIndex, ParameterError, ParameterSpace, Rope, clone_index, index_factory


def filled(**options: object) -> AsymmetricIndex:
    index = small_index(rope=Rope(32), **options)  # type: ignore[arg-type]
    index.add(tokens(1, 2, 200, 32, seed=1), tokens(1, 2, 200, 32, seed=2))
    return index


@pytest.mark.parametrize("description, dtype, storage", [
    ("IVF16", torch.float32, None),
    ("IVF16,Flat", torch.float32, None),
    ("IVF16,SAAP", torch.float32, None),
    ("IVF16, SQbf16, SAAP", torch.bfloat16, None),
    ("IVF16,SQfp16,SQ8", torch.float16, "SQ8"),
    ("IVF16,SQ8/SQ4,SAAP", torch.float32, "SQ8/SQ4"),
])
def test_descriptions(description: str, dtype: torch.dtype, storage: str | None) -> None:
    index = index_factory(64, description, num_heads=4, num_kv_heads=2, window=9)
    plain = AsymmetricIndex(64, 16, 4, 2, dtype=dtype, storage=storage, window=9)
    assert index.options == plain.options and index.nlist == 16


@pytest.mark.parametrize("description", [
    "", "Flat", "IVF", "IVF0", "IVF-4", "IVF16,PQ8", "IVF16,SAAP,Flat", "IVF16,Flat,SQfp16", "IVF16,SQ8,SQ8", "IVF16,,Flat",
    "ivf16", "IVF16,Flat,", None, 16,
])
def test_descriptions_that_are_none(description: object) -> None:
    with pytest.raises(ParameterError, match="description: expected"):
        index_factory(64, description)  # type: ignore[arg-type]


@pytest.mark.parametrize("options, name", [({"nlist": 4}, "nlist"), ({"dtype": torch.float16}, "dtype")])
def test_one_thing_said_twice(options: dict[str, object], name: str) -> None:
    with pytest.raises(ParameterError, match=f"{name}: expected in the description or as arguments"):
        index_factory(64, "IVF16,SQbf16", **options)


def test_parameters_from_a_string() -> None:
    index, space = AsymmetricIndex(64, 16), ParameterSpace()
    space.set_index_parameters(index, "nprobe=3, max_codes=99")
    assert (index.nprobe, index.max_codes, index.selectivity) == (3, 99, None)
    space.set_index_parameters(index, "selectivity=0.1,window=12")
    assert (index.nprobe, index.selectivity, index.window) == (None, 0.1, 12)
    space.set_index_parameters(index, "target_mass=0.9,selectivity=0.2")
    assert (index.target_mass, index.selectivity) == (0.9, 0.2)
    space.set_index_parameter(index, "max_codes", 7)
    assert (index.target_mass, index.max_codes) == (0.9, 7)
    faiss_index = faiss.index_factory(64, "IVF16,Flat", faiss.METRIC_INNER_PRODUCT)
    faiss.ParameterSpace().set_index_parameters(faiss_index, "nprobe=3,max_codes=99")
    space.set_index_parameters(index, "nprobe=3,max_codes=99")
    assert (index.nprobe, index.max_codes) == (faiss_index.nprobe, faiss_index.max_codes)


@pytest.mark.parametrize("text, name", [
    ("", "parameters"), ("nprobe", "parameters"), ("ht=4", "parameters"), ("nprobe=4,", "parameters"),
    ("max_codes=2,nprobe=0", "nprobe"),
    ("max_codes=2,selectivity=2", "selectivity"), ("nprobe=1.5", "nprobe"), ("selectivity=much", "selectivity"),
    ("window=-1", "window"), ("max_codes=2,tail=0.5", "mean_run_tokens"),
])
def test_a_string_that_is_wrong_changes_nothing(text: str, name: str) -> None:
    index = AsymmetricIndex(64, 16)
    before = index.options
    with pytest.raises(ParameterError, match=name):
        ParameterSpace().set_index_parameters(index, text)
    assert index.options == before


def test_a_clone_is_another_index() -> None:
    index = filled()
    clone = clone_index(index)
    queries = tokens(1, 4, 1, 32, seed=3)
    assert torch.equal(clone.search_attend(queries), index.search_attend(queries))
    clone.add(tokens(1, 2, 1, 32, seed=4), tokens(1, 2, 1, 32, seed=5))
    assert (index.ntotal, clone.ntotal) == (200, 201)
    assert clone_index(AsymmetricIndex(64, 16)).ntotal == 0


def test_lists_are_those_of_faiss() -> None:
    """Every sealed token is in one list of each head, that of its key."""
    index = filled()
    lists = index.invlists
    sealed = set(range(lists.sinks(0), lists.sealed(0)))
    assert sealed
    for head in range(2):
        ivf, _ = index.to_faiss(0, head)
        every = []
        for list_no in range(index.nlist):
            ids = lists.get_ids(list_no, head=head)
            assert ids.dtype == torch.int32
            assert lists.list_size(list_no, 0, head) == len(ids) == lists.list_sizes()[0, head, list_no]
            there = faiss.rev_swig_ptr(ivf.invlists.get_ids(list_no), ivf.invlists.list_size(list_no)).tolist()
            assert set(ids.tolist()) == sealed & set(there)
            every += ids.tolist()
        assert sorted(every) == sorted(sealed)
    sizes = np.array([[lists.list_size(n, 0, head) for n in range(index.nlist)] for head in range(2)], np.float64)
    factor = (index.nlist * (sizes**2).sum(1) / sizes.sum(1) ** 2).mean()
    assert lists.imbalance_factor() == pytest.approx(factor) == index.stats().imbalance_factor
    with pytest.raises(ParameterError, match="list_no"):
        lists.get_ids(index.nlist)
    with pytest.raises(ParameterError, match="head"):
        lists.list_size(0, 0, 2)


def test_names_of_the_package() -> None:
    assert {"index_factory", "ParameterSpace", "clone_index"} <= set(dir(saap_index))
