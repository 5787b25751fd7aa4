"""What torch's defaults are set to changes nothing: tensors name their dtype and their device, and results are the same."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from default_dtype import LIBRARY, for_the_library
from helpers import random_router, small_index, tokens

import saap_index
import saap_lab
from saap_index import (
    KeyQuantizer,
    QueryRouter,
    Rope,
    SearchParametersIVF,
    TrainingConfig,
    TwoTower,
    merge_states,
    read_index,
    write_index,
)

FACTORIES = {
    "arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty", "empty_permuted", "empty_strided",
    "eye", "full", "hamming_window", "hann_window", "kaiser_window", "linspace", "logspace", "normal", "ones", "rand", "randint",
    "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}
OF_DEFAULT_DTYPE = {"Tensor", "FloatTensor", "set_default_dtype", "set_default_device", "set_default_tensor_type"}
PACKAGE, LAB = Path(saap_index.__file__).parent, Path(saap_lab.__file__).parent
FILES = sorted([*PACKAGE.rglob("*.py"), *LAB.rglob("*.py")])
PLAIN: dict[str, list[Any]] = {}  # what `everything` gives under the usual default, by backend
OTHERS = (torch.float64, torch.bfloat16, torch.float16)


def careless(source: str) -> Iterator[str]:
    """Calls that make a tensor and leave its dtype or device to torch's defaults: 'line: what is missing'."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        named = {keyword.arg for keyword in node.keywords}
        if node.func.attr in FACTORIES and not {"dtype", "device"} <= named:
            yield f"{node.lineno}: torch.{node.func.attr} without {sorted({'dtype', 'device'} - named)}"
        if node.func.attr in OF_DEFAULT_DTYPE:
            yield f"{node.lineno}: torch.{node.func.attr}"


def imported_factories(source: str) -> Iterator[str]:
    """Factories that `careless` would not see, for they are called by a name of their own."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            yield from (alias.name for alias in node.names if alias.name in FACTORIES)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name == "torch" and alias.asname)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(LAB.parent if LAB in p.parents else PACKAGE)))
def test_every_new_tensor_names_dtype_and_device(path: Path) -> None:
    source = path.read_text()
    assert [*careless(source), *imported_factories(source)] == []


def test_the_lint_sees_what_it_should() -> None:
    assert list(careless("x = torch.empty(3, dtype=torch.int8)")) == ["1: torch.empty without ['device']"]
    assert list(careless("torch.zeros((2,), device=d)")) == ["1: torch.zeros without ['dtype']"]
    assert list(careless("torch.zeros((2,), device=d, dtype=t); x.new_zeros(3); torch.zeros_like(x)")) == []
    assert list(imported_factories("from torch import Tensor, zeros")) == ["zeros"]
    assert len(FILES) > 80 and all(str(p).startswith(LIBRARY) for p in FILES)


def everything(backend: str, tmp_path: Path) -> list[Any]:
    """Results of the whole interface: training, adding, searching, changing, saving."""
    config = TrainingConfig(epochs=1, hidden=8)
    rope = Rope(head_dim=32, theta=100.0)
    trained = small_index(backend=backend, rope=rope, nlist=8, mean_run_tokens=2, selectivity=0.2)
    keys, queries = tokens(2, 2, 300, 32, seed=1), tokens(2, 4, 60, 32, seed=2)
    trained.train(keys, queries, config=config)
    trained.calibrate(keys, queries)
    results: list[Any] = [trained.key_quantizer.centroids, *trained.query_router.tensors().values()]
    results.append(trained.calibration.unread_mass)
    two_tower = small_index(backend=backend, rope=rope)
    two_tower.tower = TwoTower.symmetric(2, 32)
    published = small_index(backend=backend)
    published.query_router = random_router(2, 4, 32, knots=-1, size_weighted=False)
    symmetric = small_index(backend=backend, dtype=torch.bfloat16)
    symmetric.query_router = QueryRouter.symmetric(symmetric.key_quantizer.centroids)
    scaled = Rope(head_dim=32, theta=100.0, scaling="dynamic", factor=2.0, original_max_position=32)
    dynamic = small_index(backend=backend, rope=scaled, dtype=torch.float16)
    asked = SearchParametersIVF(target_mass=0.6, selectivity=0.5, tail=0.3), SearchParametersIVF(nprobe=2)
    for index in (trained, two_tower, published, symmetric, dynamic):
        dtype = index.dtype
        index.add(keys.to(dtype), tokens(2, 2, 300, 32, dtype, seed=3), lengths=[300, 200])
        index.add_preassigned(keys[:, :, :5].to(dtype), keys[:, :, :5].to(dtype), torch.zeros((2, 2, 5), dtype=torch.int64))
        for q in (1, 3):
            x = tokens(2, 4, q, 32, seed=5)
            for params in (None, *(asked if index is trained else asked[1:])):
                results += index.search_attend(x, params=params, return_lse=True)
                results += index.search(x, 5, params=params)
        results += index.search_attend(x, params=SearchParametersIVF(selectivity=0.1, window=40, sinks=9), return_lse=True)
        results += index.search_attend_preassigned(x, torch.tensor([[[1, -1]] * 2] * 2), return_lse=True)
        results += index.search_attend(x, coarse_queries=x, return_lse=True)
        results += [r for row in index.read_ids(index.select(x)) for r in row]
        index.remove_ids([[3, 4, 90], [7]])
        index.truncate([250, 190])
        index.reorder([1, 0])
        index.window = 16
        write_index(index, tmp_path / "index")
        index = read_index(tmp_path / "index", backend=backend).fork([0, 0])
        results += index.search_attend(x, return_lse=True)
        results += [index.reconstruct([5, 9])[0], *(float(n) for n in index.stats().__dict__.values() if isinstance(n, float))]
        results.append(index.stats().last_search.selectivity)
        index.reset()
        results += index.search_attend(x, return_lse=True)
    results += small_index().search_attend(tokens(1, 4, 1, 32), return_lse=True)  # of an index that never held a token
    results += merge_states(*(x for seed in (1, 2) for x in (tokens(1, 2, 3, 8, seed=seed), tokens(1, 1, 2, 3, seed=seed)[0])))
    results.append(KeyQuantizer.of_prompt(keys[0], 8).assign(keys[0]))
    if trained.key_quantizer is not None:
        results += trained.to_faiss()[1:]
    return results


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_results_do_not_depend_on_the_default_dtype(dtype: torch.dtype, backend: str, tmp_path: Path) -> None:
    if backend not in PLAIN:
        PLAIN[backend] = everything(backend, tmp_path)
    want = PLAIN[backend]
    with for_the_library(dtype):
        found = everything(backend, tmp_path)
    assert len(found) == len(want) > 100
    for got, expected in zip(found, want, strict=True):
        if isinstance(expected, torch.Tensor):
            assert got.dtype == expected.dtype and torch.equal(got, expected)
        else:
            assert np.array_equal(got, expected)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_results_do_not_depend_on_autocast(backend: str, tmp_path: Path) -> None:
    if backend not in PLAIN:
        PLAIN[backend] = everything(backend, tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = everything(backend, tmp_path)
    for got, expected in zip(found, PLAIN[backend], strict=True):
        if isinstance(expected, torch.Tensor):
            assert got.dtype == expected.dtype and torch.equal(got, expected)
        else:
            assert np.array_equal(got, expected)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_an_index_on_the_cpu_stays_there_whatever_the_default_device(backend: str) -> None:
    keys, queries = tokens(1, 2, 300, 32, seed=1), tokens(1, 4, 1, 32, seed=2)
    index = small_index(backend=backend, rope=Rope(head_dim=32), selectivity=0.2)
    with torch.device("meta"):
        index.add(keys, keys)
        out, scores, ids = index.search_attend(queries), *index.search(queries, 3)
        index.remove_ids([9])
        index.truncate(200)
        index.window = 16
        copy = index.fork()
    assert {x.device.type for x in (out, scores, ids)} == {"cpu"} and out.isfinite().all()
    assert torch.equal(copy.search_attend(queries), index.search_attend(queries))


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_all_of_torch_under_another_default(dtype: torch.dtype) -> None:
    """As a program sets it, with no part of torch left out."""
    index = small_index(selectivity=0.2)
    index.add(tokens(1, 2, 300, 32, seed=1), tokens(1, 2, 300, 32, seed=2))
    queries = tokens(1, 4, 1, 32, seed=3)
    want = index.search_attend(queries, return_lse=True)
    torch.set_default_dtype(dtype)
    try:
        found = index.search_attend(queries, return_lse=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, want, strict=True))
