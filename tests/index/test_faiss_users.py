"""What users of FAISS bring along: NumPy's numbers, empty arrays, lists, other metrics, many queries at once."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from helpers import random_router, small_index, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from saap_index import (
    AsymmetricIndex,
    CompatibilityError,
    DeviceError,
    DTypeError,
    LengthError,
    ParameterError,
    Rope,
    SearchParametersIVF,
    ShapeError,
    TrainingConfig,
)
from saap_index.backends import get_backend, native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def filled(**options: object) -> AsymmetricIndex:
    index = small_index(rope=Rope(32), **options)  # type: ignore[arg-type]
    index.add(tokens(1, 2, 200, 32, seed=1), tokens(1, 2, 200, 32, seed=2))
    return index


def test_numbers_of_numpy_are_numbers() -> None:
    plain = SearchParametersIVF(selectivity=0.25, max_codes=9, window=5, sinks=3, tail=0.5)
    numpy = SearchParametersIVF(
        selectivity=np.float32(0.25), max_codes=np.int64(9), window=np.int32(5), sinks=np.uint8(3), tail=np.float64(0.5)
    )
    assert numpy == plain and hash(numpy) == hash(plain) and type(numpy.selectivity) is float and type(numpy.window) is int
    index = AsymmetricIndex(np.int64(32), np.int64(4), np.int32(2), sinks=np.int64(3), window=np.int16(9), scale=np.float32(0.5))
    assert index.layout == AsymmetricIndex(32, 4, 2, sinks=3, window=9).layout and type(index.layout.window) is int
    index.nprobe = np.int64(2)
    index.window = np.int64(12)
    assert (index.nprobe, index.window) == (2, 12)
    index.selectivity = np.float64(0.5)
    index.truncate(np.int64(0))
    index = filled()
    index.truncate(np.int64(150))
    assert index.reconstruct(np.int64(7))[0].shape == (2, 1, 32) and index.lengths == [150]
    with pytest.raises(ParameterError, match="nprobe"):
        SearchParametersIVF(nprobe=np.float64(2.5))
    with pytest.raises(ParameterError, match="nprobe"):
        SearchParametersIVF(nprobe=np.bool_(True))


def test_arrays_of_no_row() -> None:
    index = small_index(32, heads=1, kv_heads=1)
    nothing = np.empty((0, 32), np.float32)
    index.add(nothing, nothing)
    assert index.ntotal == 0
    scores, ids = index.search(nothing, 5)
    assert scores.shape == ids.shape == (0, 5) and isinstance(scores, np.ndarray)
    scores, ids = index.search(np.ones((2, 32), np.float32), 3)
    assert (ids == -1).all() and np.isneginf(scores).all()
    index.add(np.ones((5, 32), np.float32), np.ones((5, 32), np.float32))
    index.add(nothing, nothing)
    assert index.ntotal == 5 and index.search(nothing, 2)[0].shape == (0, 2)
    assert index.remove_ids(np.empty(0, np.int64)) == 0 and index.remove_ids([]) == 0


def test_lists_of_numbers() -> None:
    index = small_index(32, heads=1, kv_heads=1)
    index.add([[0.5] * 32, [0.25] * 32, [0.125] * 32], [[1.5] * 32] * 3)
    assert index.ntotal == 3 and index.search([[1.0] * 32], 1)[1].tolist() == [[0]]
    with pytest.raises(ShapeError, match="keys"):
        index.add([[0.5] * 32, [1.0]], [[1.5] * 32] * 2)
    with pytest.raises(DTypeError, match="keys"):
        index.add([["a"] * 32], [[1.5] * 32])


def test_another_metric_is_refused() -> None:
    x = np.random.default_rng(0).standard_normal((300, 32), np.float32)
    source = faiss.IndexIVFFlat(faiss.IndexFlatL2(32), 32, 4, faiss.METRIC_L2)
    source.train(x)
    source.add(x)
    with pytest.raises(CompatibilityError, match="METRIC_INNER_PRODUCT"):
        AsymmetricIndex.from_faiss(source, x)


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "mps", "xpu", "meta", "nonsense"])
def test_a_device_that_is_not_there(device: str) -> None:
    if device.split(":")[0] == "cuda" and torch.cuda.device_count() > 99 * (":" in device):
        device = "mps"
    for call in (lambda: AsymmetricIndex(32, 4, device=device), lambda: filled().to(device)):
        with pytest.raises(DeviceError, match="device: expected") as refusal:
            call()
        assert len(str(refusal.value)) < 200


def test_the_cpu_may_have_a_number() -> None:
    """Tensors there have none, whatever they are asked for."""
    k, v, q = tokens(1, 1, 40, 32), tokens(1, 1, 40, 32, seed=1), tokens(1, 1, 1, 32, seed=2)
    index = AsymmetricIndex(32, 4, device="cpu:0")
    index.train(k)
    index.add(k, v)
    for other in (index, index.to("cpu:0")):
        assert other.device == torch.device("cpu") and other.search_attend(q).shape == (1, 1, 1, 32)


PARAMS = [
    {}, {"nprobe": 2}, {"selectivity": 1.0}, {"selectivity": 0.1, "max_codes": 7}, {"target_mass": 0.6}, {"tail": 0.4},
    {"selectivity": 0.2, "window": 60, "sinks": 9},
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_many_queries_are_as_many_searches(params: dict[str, float], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged, with removed tokens and a router of distance; in chunks or at once."""
    index = small_index(backend=backend, rope=Rope(32), mean_run_tokens=1, selectivity=0.2, dtype=torch.bfloat16)
    index.query_router = random_router(2, 4, 32, 4, seed=2)
    k, v = tokens(2, 2, 200, 32, torch.bfloat16, seed=1), tokens(2, 2, 200, 32, torch.bfloat16, seed=2)
    index.add(k, v, lengths=[200, 90])
    index.remove_ids([[3, 50, 199], range(20)])
    queries, asked = tokens(2, 4, 11, 32, seed=3), SearchParametersIVF(**params)  # type: ignore[arg-type]
    scores, ids = index.search(queries, 6, params=asked)
    stats = index.stats().last_search
    for j in range(11):
        one = queries[:, :, j : j + 1]
        got = index.search(one, 6, params=asked)
        assert torch.equal(got[1], ids[:, :, j : j + 1]) and torch.allclose(got[0], scores[:, :, j : j + 1], rtol=1e-5)
        read = index.read_ids(index.select(one, params=asked))
        for i, head in np.ndindex(2, 4):
            stored, _ = index.reconstruct(read[i][head // 2].numpy(), sequence=i)
            want = (stored[head // 2].float() @ one[i, head, 0]).sort(descending=True)
            assert ids[i, head, j].tolist() == read[i][head // 2][want.indices[:6]].tolist()
    monkeypatch.setattr("saap_index.search.select.GATHER_BYTES", 1)
    again = index.search(queries, 6, params=asked)
    assert torch.equal(again[1], ids) and torch.allclose(again[0], scores, rtol=1e-5)
    assert stats.dense_tokens > 0 and stats.kv_bytes > 0 and (stats.read_sealed > 0 or params == {"selectivity": 1.0})


@pytest.mark.parametrize("isa", native.load().isas())
@settings(max_examples=25)
@given(
    b=st.integers(1, 2), h=st.integers(1, 2), g=st.integers(1, 67), q=st.integers(1, 3), d=st.sampled_from([8, 24, 64, 72]),
    n=st.integers(1, 60), k=st.integers(1, 70), stored=st.sampled_from(DTYPES), asked=st.sampled_from(DTYPES),
    whole=st.booleans(), seed=st.integers(0, 99),
)
def test_best_rows_of_the_kernels(
    isa: str, b: int, h: int, g: int, q: int, d: int, n: int, k: int, stored: torch.dtype, asked: torch.dtype, whole: bool,
    seed: int,
) -> None:
    """Whole numbers, so that sums are exact and ties happen: of equal products the row that is read first."""
    r = np.random.default_rng(seed)
    keys = torch.from_numpy(r.integers(-2, 3, (b, h, n, d))).to(stored)
    queries = torch.from_numpy(r.integers(-2, 3, (b, h, g, q, d))).to(asked)
    queries[0, 0, 0, 0, 0] = [1.0, float("nan")][seed % 2]
    spans = np.sort(r.integers(0, n + 1, (b * q, 3)), 1)
    listed = [[np.sort(r.permutation(np.arange(low, mid))[: r.integers(0, 9)]) for _ in range(h)] for low, mid, _ in spans]
    rows = torch.full((b * q, h, 9), -1, dtype=torch.int32)
    for one, head in np.ndindex(b * q, h):
        rows[one, head, : len(listed[one][head])] = torch.from_numpy(listed[one][head])
    counts = torch.tensor([[len(x) for x in heads] for heads in listed], dtype=torch.int32)
    cpu, module, before = get_backend(torch.device("cpu"), "cpu"), native.load(), native.load().isa()
    module.set_isa(isa)
    try:
        selected = (None, None) if whole else (rows, counts)
        scores, found = cpu.best(queries, keys, *selected, *spans.T.tolist(), k)  # type: ignore[misc]
    finally:
        module.set_isa(before)
    for i, head, j in np.ndindex(b, h, q):
        low, mid, high = spans[i * q + j]
        read = np.concatenate([np.arange(low), [] if whole else listed[i * q + j][head], np.arange(mid, high)]).astype(int)
        inner = queries[i, head, :, j].double().numpy() @ keys[i, head, read].double().numpy().T
        order = np.argsort(-np.where(np.isnan(inner), np.inf, inner), axis=1, kind="stable")[:, :k]
        m = order.shape[1]
        assert (found[i, head, :, j, :m].numpy() == read[order]).all() and (found[i, head, :, j, m:] == -1).all()
        np.testing.assert_array_equal(scores[i, head, :, j, :m].numpy(), np.take_along_axis(inner, order, 1))
        assert np.isneginf(scores[i, head, :, j, m:].numpy()).all()


def test_best_rows_refuse_what_is_not_there() -> None:
    cpu, keys, queries = get_backend(torch.device("cpu"), "cpu"), torch.ones((1, 1, 5, 8)), torch.ones((1, 1, 1, 1, 8))
    rows, counts = torch.tensor([[[1, 5]]], dtype=torch.int32), torch.tensor([[2]], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"outside \[0, 5\)"):
        cpu.best(queries, keys, rows, counts, [0], [5], [5], 1)
    with pytest.raises(IndexError, match="count"):
        cpu.best(queries, keys, rows, counts + 1, [0], [5], [5], 1)
    with pytest.raises(LengthError, match="<= 5"):
        cpu.best(queries, keys, None, None, [0], [5], [6], 1)
    with pytest.raises(ShapeError, match="both or neither"):
        cpu.best(queries, keys, rows, None, [0], [5], [5], 1)


def test_many_queries_go_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """FAISS's search is twice as fast (bench/search.py); products by torch over gathered keys were six times slower than that."""
    monkeypatch.setattr("saap_index.search.select._best_rows", None)
    index = filled()
    assert index.search(tokens(1, 4, 50, 32), 3)[1].shape == (1, 4, 50, 3)


def test_statistics_of_a_search() -> None:
    index = filled(selectivity=0.2)
    index.search(tokens(1, 4, 1, 32), 3)
    one = index.stats().last_search
    index.search_attend(tokens(1, 4, 1, 32))
    assert index.stats().last_search == one
    index.search(tokens(1, 4, 1, 32).expand(-1, -1, 5, -1), 3)
    five = index.stats().last_search
    assert five.selectivity == one.selectivity and five.kv_bytes == 5 * one.kv_bytes


def test_a_sliding_window_takes_no_room_as_it_slides() -> None:
    """One token in, the oldest but the sinks out: what is kept of the tokens that went is one stretch."""
    index = filled()
    key, value = tokens(1, 2, 1, 32, seed=5), tokens(1, 2, 1, 32, seed=6)
    for step in range(60):
        index.add(key, value)
        assert index.remove_ids([2 + step]) == 1
        assert len(index.invlists.gaps[0].starts) == 1 and index.invlists.next_position(0) == 201 + step
    many = tokens(1, 2, 500, 32, seed=7)
    for _ in range(20):
        first = index.invlists.gaps[0].stops[0]
        index.add(many, many)
        index.remove_ids(range(first, first + 500))
    gaps = index.invlists.gaps[0]
    assert (gaps.array() == [[2, 62 + 20 * 500]]).all() and index.ntotal == 200
    index.truncate(10)
    assert gaps.positions(np.arange(4)).tolist() == [0, 1, 62 + 20 * 500, 63 + 20 * 500]


def test_verbose_prints_what_training_does(capsys: pytest.CaptureFixture[str]) -> None:
    index = AsymmetricIndex(16, 8, num_heads=4, num_kv_heads=2, window=4, sinks=1)
    keys, queries = tokens(2, 2, 300, 16, seed=1), tokens(2, 4, 40, 16, seed=2)
    config = TrainingConfig(epochs=2)
    index.train(keys, queries, config=config)
    assert capsys.readouterr().out == "" and not index.verbose
    quiet = index.query_router.tensors()
    index.verbose = True
    index.train(keys, queries, config=config)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Training 8 lists of 2 KV heads on 600 keys of 16 dims"
    assert lines[1] == "Training the query router on 80 queries per head"
    assert [line.split(":")[0] for line in lines[2:]] == ["  epoch 1 of 2", "  epoch 2 of 2"]
    assert all(torch.equal(x, quiet[name]) for name, x in index.query_router.tensors().items()) and index.fork().verbose
    index.train(keys)
    assert capsys.readouterr().out.endswith("No queries: routing is symmetric\n")


def test_assign_gives_the_ids_of_search() -> None:
    index, queries = filled(), tokens(1, 4, 5, 32, seed=3)
    _, ids = index.search(queries, 3)
    assert torch.equal(index.assign(queries, 3), ids) and torch.equal(index.assign(queries), ids[..., :1])
