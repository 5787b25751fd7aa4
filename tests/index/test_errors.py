"""Every documented error: the right class, a message that says what was expected and what came, and nothing changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_router, small_index, tokens

import saap_index
from saap_index import (
    AsymmetricIndex,
    CompatibilityError,
    DeviceError,
    DTypeError,
    FormatError,
    KeyQuantizer,
    LayoutError,
    LengthError,
    NotFiniteError,
    NotTrainedError,
    ParameterError,
    QueryRouter,
    Rope,
    SaapError,
    SearchParametersIVF,
    ShapeError,
    StateError,
    TrainingConfig,
    merge_states,
    read_index,
    write_index,
)
from saap_index.backends import RouterWeights

BACKENDS = ("cpu", "torch", "reference")
D, E, NLIST, HQ, H, B = 32, 40, 4, 4, 2, 2
LENGTHS = [70, 90]

over_backends = pytest.mark.parametrize("backend", BACKENDS)


@dataclass(frozen=True)
class Case:
    """A call on an index that must fail: what it raises, and words that the message holds."""

    call: Callable[[AsymmetricIndex], object]
    error: type[SaapError]
    words: tuple[str, ...]


def holding(backend: str, **options: object) -> AsymmetricIndex:
    """A ragged batch with segments, recent tokens, a removed token and given list numbers."""
    index = small_index(D, E, NLIST, HQ, H, backend=backend, **options)
    index.add(tokens(B, H, 90, D, seed=1), tokens(B, H, 90, E, seed=2), lengths=LENGTHS)
    index.remove_ids([5])
    index.add_preassigned(tokens(B, H, 3, D, seed=3), tokens(B, H, 3, E, seed=4), torch.ones((B, H, 3), dtype=torch.int32))
    return index


def digest(index: AsymmetricIndex) -> list[object]:
    """All that an index is, as values that compare: training, parameters, and every array as far as tokens own it."""
    found: list[object] = [index.lengths, index.layout, index.options.params, index.is_trained]
    found += [index.calibration, None if index.budget_shares is None else index.budget_shares.tolist()]
    if index.key_quantizer is not None:
        found.append(index.key_quantizer.centroids.numpy().tobytes())
    if index.query_router is not None:
        found += [x.numpy().tobytes() for x in index.query_router.tensors().values()]
    if index._lists is None:
        return found
    lists = index.invlists
    found += [lists.segments, [x.array().tolist() for x in lists.gaps], lists.pending is not None]
    for i, n in enumerate(lists.lengths):
        arrays = [lists.keys[i, :, :n], lists.values[i, :, :n], lists.row_ids(i), lists.tables[i, :, : len(lists.segments[i])]]
        if lists.pending is not None:
            arrays.append(lists.pending[i, :, lists.sealed(i) : n])
        found += [x.contiguous().view(torch.uint8).numpy().tobytes() for x in arrays]
    return found


def result(index: AsymmetricIndex) -> bytes:
    """Of a search, which also shows that the index still works."""
    if not index.is_trained or not index.lengths:
        return b""
    return index.search_attend(tokens(len(index.lengths), HQ, 2, D, seed=8)).numpy().tobytes()


def refused(index: AsymmetricIndex, case: Case) -> None:
    before, found = digest(index), result(index)
    with pytest.raises(case.error) as caught:
        case.call(index)
    message = str(caught.value)
    assert type(caught.value) is case.error
    assert re.search(r"expected .+ got ", message), message
    for word in case.words:
        assert word in message, message
    assert digest(index) == before and result(index) == found, "the index is unchanged"


def each(cases: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


# -- arguments by name and kind -------------------------------------------------------------------------------------------


def kv(b: int = B, h: int = H, n: int = 5, d: int = D, e: int = E) -> tuple[torch.Tensor, torch.Tensor]:
    return tokens(b, h, n, d, seed=5), tokens(b, h, n, e, seed=6)


def queries(b: int = B, hq: int = HQ, q: int = 2, d: int = D) -> torch.Tensor:
    return tokens(b, hq, q, d, seed=7)


def every_other(x: torch.Tensor) -> torch.Tensor:
    """The same shape as x, but rows that are not contiguous."""
    return x.repeat_interleave(2, -1)[..., ::2]


def nos(*shape: int, fill: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.full(shape, fill, dtype=dtype)


K, V = kv()
ADD = {
    "keys: axes": Case(lambda x: x.add(K[0], V), ShapeError, ("keys", "(2, 2, n, 32)", "(2, 5, 32)")),
    "keys: 5 axes": Case(lambda x: x.add(K[None], V), ShapeError, ("keys", "(1, 2, 2, 5, 32)")),
    "keys: (n, d) for a batch": Case(lambda x: x.add(K[0, 0], V[0, 0]), ShapeError, ("keys", "(1, 1, 5, 32)")),
    "keys: batch": Case(lambda x: x.add(*kv(b=3)), ShapeError, ("keys", "(2, 2, n, 32)", "(3, 2, 5, 32)")),
    "keys: heads": Case(lambda x: x.add(*kv(h=HQ)), ShapeError, ("keys", "(2, 2, n, 32)", "(2, 4, 5, 32)")),
    "keys: dim": Case(lambda x: x.add(*kv(d=40)), ShapeError, ("keys", "(2, 2, n, 32)", "(2, 2, 5, 40)")),
    "keys: dtype": Case(lambda x: x.add(K.half(), V), DTypeError, ("keys", "float32", "float16")),
    "keys: double": Case(lambda x: x.add(K.double(), V), DTypeError, ("keys", "float32", "float64")),
    "keys: integers": Case(lambda x: x.add(K.long(), V), DTypeError, ("keys", "float32", "int64")),
    "keys: uneven lists": Case(lambda x: x.add([[1.0], [2.0, 3.0]], V), ShapeError, ("keys", "equal lengths")),
    "keys: None": Case(lambda x: x.add(None, V), DTypeError, ("keys", "NoneType")),
    "keys: strings": Case(lambda x: x.add(np.array([["a"]]), V), DTypeError, ("keys", "NumPy")),
    "keys: big-endian": Case(lambda x: x.add(K.numpy().astype(">f4"), V), DTypeError, ("keys", ">f4")),
    "keys: device": Case(lambda x: x.add(K.to("meta"), V), DeviceError, ("keys", "cpu", "meta")),
    "keys: rows": Case(lambda x: x.add(every_other(K), V), LayoutError, ("keys", "contiguous", "stride 2")),
    "values: axes": Case(lambda x: x.add(K, V[0]), ShapeError, ("values", "(2, 2, 5, 40)")),
    "values: tokens": Case(lambda x: x.add(K, V[:, :, :4]), ShapeError, ("values", "(2, 2, 5, 40)", "(2, 2, 4, 40)")),
    "values: heads": Case(lambda x: x.add(K, V[:, :1]), ShapeError, ("values", "(2, 1, 5, 40)")),
    "values: dim": Case(lambda x: x.add(K, K), ShapeError, ("values", "(2, 2, 5, 40)", "(2, 2, 5, 32)")),
    "values: dtype": Case(lambda x: x.add(K, V.bfloat16()), DTypeError, ("values", "float32", "bfloat16")),
    "values: device": Case(lambda x: x.add(K, V.to("meta")), DeviceError, ("values", "meta")),
    "values: rows": Case(lambda x: x.add(K, every_other(V)), LayoutError, ("values", "stride 2")),
    "lengths: too few": Case(lambda x: x.add(K, V, lengths=[3]), ShapeError, ("lengths", "(2)", "got 1")),
    "lengths: too many": Case(lambda x: x.add(K, V, lengths=[3, 3, 3]), ShapeError, ("lengths", "(2)", "got 3")),
    "lengths: too long": Case(lambda x: x.add(K, V, lengths=[5, 6]), LengthError, ("lengths", "[0, 5]", "got 6")),
    "lengths: negative": Case(lambda x: x.add(K, V, lengths=[5, -1]), LengthError, ("lengths", "[0, 5]", "got -1")),
    "lengths: not numbers": Case(lambda x: x.add(K, V, lengths=["a", "b"]), ShapeError, ("lengths", "'a'")),
    "lengths: fractions": Case(lambda x: x.add(K, V, lengths=[1.5, 2]), ShapeError, ("lengths", "1.5")),
    "coarse_keys: shape": Case(lambda x: x.add(K, V, coarse_keys=K[:, :, :4]), ShapeError, ("coarse_keys", "(2, 2, 5, 32)")),
    "coarse_keys: NaN": Case(lambda x: x.add(K, V, coarse_keys=K * torch.nan), NotFiniteError, ("coarse_keys", "finite")),
    "coarse_keys: device": Case(lambda x: x.add(K, V, coarse_keys=K.to("meta")), DeviceError, ("coarse_keys", "meta")),
    "list_nos: shape": Case(lambda x: x.add_preassigned(K, V, nos(B, H, 4)), ShapeError, ("list_nos", "(2, 2, 5)", "(2, 2, 4)")),
    "list_nos: dtype": Case(lambda x: x.add_preassigned(K, V, K[..., 0]), DTypeError, ("list_nos", "int32 or int64", "float32")),
    "list_nos: -1": Case(lambda x: x.add_preassigned(K, V, nos(B, H, 5, fill=-1)), ParameterError, ("list_nos", "[0, 4)", "-1")),
    "list_nos: nlist": Case(lambda x: x.add_preassigned(K, V, nos(B, H, 5, fill=4)), ParameterError, ("list_nos", "[0, 4)", "4")),
    "list_nos: 2**32": Case(
        lambda x: x.add_preassigned(K, V, nos(B, H, 5, fill=2**32)), ParameterError, ("list_nos", "4294967296"),
    ),
    "list_nos: device": Case(lambda x: x.add_preassigned(K, V, nos(B, H, 5).to("meta")), DeviceError, ("list_nos", "meta")),
}

Q = queries()
LISTS = nos(B, H, 2)
SEARCH = {
    "queries: axes": Case(lambda x: x.search_attend(Q[0]), ShapeError, ("queries", "(2, 4, q, 32)", "(4, 2, 32)")),
    "queries: batch": Case(lambda x: x.search_attend(queries(b=1)), ShapeError, ("queries", "(2, 4, q, 32)", "(1, 4, 2, 32)")),
    "queries: heads": Case(lambda x: x.search_attend(queries(hq=H)), ShapeError, ("queries", "(2, 4, q, 32)", "(2, 2, 2, 32)")),
    "queries: dim": Case(lambda x: x.search_attend(queries(d=40)), ShapeError, ("queries", "(2, 4, 2, 40)")),
    "queries: dtype": Case(lambda x: x.search_attend(Q.double()), DTypeError, ("queries", "float32", "bfloat16", "float64")),
    "queries: uneven lists": Case(lambda x: x.search_attend([[1.0], [2.0, 3.0]]), ShapeError, ("queries", "equal lengths")),
    "queries: device": Case(lambda x: x.search_attend(Q.to("meta")), DeviceError, ("queries", "cpu", "meta")),
    "queries: rows": Case(lambda x: x.search_attend(every_other(Q)), LayoutError, ("queries", "stride 2")),
    "q = 0": Case(lambda x: x.search_attend(queries(q=0)), ShapeError, ("queries", "1 to 8", "got 0")),
    "q = 9": Case(lambda x: x.search_attend(queries(q=9)), ShapeError, ("queries", "1 to 8", "got 9")),
    "coarse_queries: q": Case(
        lambda x: x.search_attend(Q, coarse_queries=queries(q=1)), ShapeError, ("coarse_queries", "2", "got 1"),
    ),
    "coarse_queries: dim": Case(
        lambda x: x.search_attend(Q, coarse_queries=queries(d=40)), ShapeError, ("queries", "(2, 4, 2, 40)"),
    ),
    "preassigned, q = 9": Case(lambda x: x.search_attend_preassigned(queries(q=9), LISTS), ShapeError, ("queries", "got 9")),
    "preassigned, batch": Case(
        lambda x: x.search_attend_preassigned(queries(b=1), LISTS[:1]), ShapeError, ("queries", "(2, 4, q, 32)"),
    ),
    "list_nos: axes": Case(lambda x: x.search_attend_preassigned(Q, LISTS[0]), ShapeError, ("list_nos", "(2, 2, p)", "(2, 2)")),
    "list_nos: heads": Case(lambda x: x.search_attend_preassigned(Q, nos(B, HQ, 2)), ShapeError, ("list_nos", "(2, 2, p)")),
    "list_nos: dtype": Case(lambda x: x.search_attend_preassigned(Q, LISTS.float()), DTypeError, ("list_nos", "int32 or int64")),
    "list_nos: bool": Case(lambda x: x.search_attend_preassigned(Q, LISTS.bool()), DTypeError, ("list_nos", "bool")),
    "list_nos: -2": Case(lambda x: x.search_attend_preassigned(Q, LISTS - 2), ParameterError, ("list_nos", "[-1, 4)", "-2")),
    "list_nos: nlist": Case(lambda x: x.search_attend_preassigned(Q, LISTS + 4), ParameterError, ("list_nos", "[-1, 4)", "4")),
    "list_nos: 2**33": Case(lambda x: x.search_attend_preassigned(Q, LISTS + 2**33), ParameterError, ("list_nos", "8589934592")),
    "list_nos: device": Case(lambda x: x.search_attend_preassigned(Q, LISTS.to("meta")), DeviceError, ("list_nos", "meta")),
    "search: heads": Case(lambda x: x.search(queries(hq=H), 3), ShapeError, ("queries", "(2, 4, q, 32)")),
    "search: k = 0": Case(lambda x: x.search(Q, 0), ParameterError, ("k", "[1, ", "got 0")),
    "search: k = 1.0": Case(lambda x: x.search(Q, 1.0), ParameterError, ("k", "got 1.0")),
    "search: dtype": Case(lambda x: x.search(Q.numpy().astype(np.float64), 3), DTypeError, ("queries", "float64")),
    "select: q = 9": Case(lambda x: x.select(queries(q=9)), ShapeError, ("queries", "got 9")),
}

CHANGE = {
    "truncate: beyond": Case(lambda x: x.truncate([72, 93]), LengthError, ("n", "92", "sequence 1", "93")),
    "truncate: all beyond": Case(lambda x: x.truncate(93), LengthError, ("n", "72", "sequence 0", "93")),
    "truncate: negative": Case(lambda x: x.truncate(-1), LengthError, ("n", "got -1")),
    "truncate: one of two": Case(lambda x: x.truncate([3]), ShapeError, ("n", "(2)", "got 1")),
    "truncate: a fraction": Case(lambda x: x.truncate(1.5), ShapeError, ("n", "1.5")),
    "truncate: fractions": Case(lambda x: x.truncate([1.5, 1.5]), ShapeError, ("n", "1.5")),
    "truncate: a truth": Case(lambda x: x.truncate(True), ShapeError, ("n", "True")),
    "remove_ids: one of two": Case(lambda x: x.remove_ids([[1]]), ShapeError, ("ids", "(2)", "got 1")),
    "remove_ids: axes": Case(lambda x: x.remove_ids(np.zeros((2, 2), np.int64)), ShapeError, ("ids", "(n,)", "(2, 2)")),
    "remove_ids: second has axes": Case(lambda x: x.remove_ids([[1], [[2]]]), ShapeError, ("ids[1]", "(n,)", "(1, 1)")),
    "remove_ids: floats": Case(lambda x: x.remove_ids(np.array([1.0])), DTypeError, ("ids", "integers", "float64")),
    "remove_ids: a number": Case(lambda x: x.remove_ids(7), DTypeError, ("ids", "int")),
    "reconstruct: never there": Case(lambda x: x.reconstruct([0, 999]), LengthError, ("ids", "999")),
    "reconstruct: negative": Case(lambda x: x.reconstruct([-1]), LengthError, ("ids", "-1")),
    "reconstruct: removed": Case(lambda x: x.reconstruct(5), LengthError, ("ids", "5")),
    "reconstruct: beyond this one": Case(lambda x: x.reconstruct([80], sequence=0), LengthError, ("ids", "80")),
    "reconstruct: floats": Case(lambda x: x.reconstruct(np.array([1.0])), DTypeError, ("ids", "integers", "float64")),
    "reconstruct: sequence": Case(lambda x: x.reconstruct([0], sequence=2), ParameterError, ("sequence", "[0, 1]", "got 2")),
    "fork: sequence": Case(lambda x: x.fork([0, 2]), ParameterError, ("sequences", "[0, 1]", "got 2")),
    "fork: negative": Case(lambda x: x.fork([-1]), ParameterError, ("sequences", "got -1")),
    "reserve_memory: negative": Case(lambda x: x.reserve_memory(-1), ParameterError, ("n", "got -1")),
    "reserve_memory: fraction": Case(lambda x: x.reserve_memory(1.5), ParameterError, ("n", "got 1.5")),
    "reserve_memory: batch": Case(lambda x: x.reserve_memory(9, batch=3), ShapeError, ("batch", "2", "got 3")),
    "reserve_memory: no batch": Case(lambda x: x.reserve_memory(9, batch=0), ParameterError, ("batch", "got 0")),
    "to_faiss: sequence": Case(lambda x: x.to_faiss(2), ParameterError, ("sequence", "[0, 1]", "got 2")),
    "to_faiss: head": Case(lambda x: x.to_faiss(0, 2), ParameterError, ("head", "[0, 1]", "got 2")),
    "attend_selected: older": Case(lambda x: x.attend_selected(Q, older(x)), StateError, ("selection", "lengths")),
    "nprobe 0": Case(lambda x: setattr(x, "nprobe", 0), ParameterError, ("nprobe", "1 or more", "got 0")),
    "nprobe 1.5": Case(lambda x: setattr(x, "nprobe", 1.5), ParameterError, ("nprobe", "got 1.5")),
    "selectivity 0": Case(lambda x: setattr(x, "selectivity", 0.0), ParameterError, ("selectivity", "0 <", "got 0.0")),
    "selectivity 1.1": Case(lambda x: setattr(x, "selectivity", 1.1), ParameterError, ("selectivity", "<= 1", "got 1.1")),
    "selectivity NaN": Case(lambda x: setattr(x, "selectivity", float("nan")), ParameterError, ("selectivity", "nan")),
    "max_codes -1": Case(lambda x: setattr(x, "max_codes", -1), ParameterError, ("max_codes", "0 or more", "got -1")),
    "window -1": Case(lambda x: setattr(x, "window", -1), ParameterError, ("window", "0 or more", "got -1")),
    "window 1.5": Case(lambda x: setattr(x, "window", 1.5), ParameterError, ("window", "got 1.5")),
    "sinks -1": Case(lambda x: setattr(x, "sinks", -1), ParameterError, ("sinks", "0 or more", "got -1")),
    "target_mass 1": Case(lambda x: setattr(x, "target_mass", 1.0), ParameterError, ("target_mass", "< 1", "got 1.0")),
    "tail 1": Case(lambda x: setattr(x, "tail", 1.0), ParameterError, ("tail", "< 1", "got 1.0")),
    "tail without means": Case(lambda x: setattr(x, "tail", 0.5), ParameterError, ("tail", "mean_run_tokens", "0.5")),
    "tail of a call without means": Case(
        lambda x: x.search_attend(Q, params=SearchParametersIVF(tail=0.1)), ParameterError, ("tail", "mean_run_tokens", "0.1"),
    ),
    "mean_run_tokens -1": Case(lambda x: setattr(x, "mean_run_tokens", -1), ParameterError, ("mean_run_tokens", "got -1")),
    "budget_shares: heads": Case(lambda x: setattr(x, "budget_shares", [1]), ShapeError, ("budget_shares", "(2,)", "(1,)")),
    "calibration: heads": Case(
        lambda x: setattr(x, "calibration", saap_index.Calibration.trusting(3)), CompatibilityError, ("calibration", "2", "3"),
    ),
    "calibrate: heads": Case(lambda x: x.calibrate(tokens(1, 3, 99, D), Q), ShapeError, ("keys", "2", "3")),
    "calibrate: positions": Case(
        lambda x: x.calibrate(tokens(1, H, 99, D), tokens(1, HQ, 2, D), positions=[99, 3]), LengthError, ("positions", "99"),
    ),
    "calibrate: too early": Case(
        lambda x: x.calibrate(tokens(1, H, 99, D), tokens(1, HQ, 2, D), positions=[3, 4]), LengthError, ("positions", "window"),
    ),
    "key_quantizer with tokens": Case(
        lambda x: setattr(x, "key_quantizer", x.key_quantizer), StateError, ("key_quantizer", "164"),
    ),
    "key_quantizer: lists": Case(
        lambda x: setattr(x, "key_quantizer", quantizer(nlist=5)), CompatibilityError, ("key_quantizer", "5"),
    ),
    "query_router: heads": Case(
        lambda x: setattr(x, "query_router", random_router(3, 4, D)), CompatibilityError, ("query_router", "3"),
    ),
    "query_router: lists": Case(
        lambda x: setattr(x, "query_router", random_router(2, 5, D)), CompatibilityError, ("query_router", "5"),
    ),
    "query_router: dim": Case(
        lambda x: setattr(x, "query_router", random_router(2, 4, 40)), CompatibilityError, ("query_router", "40"),
    ),
    "train with tokens": Case(lambda x: x.train(tokens(1, H, 99, D)), StateError, ("train", "empty", "164 tokens", "reset")),
}


def quantizer(h: int = H, nlist: int = NLIST, d: int = D) -> KeyQuantizer:
    return KeyQuantizer(torch.zeros((h, nlist, d)))


def older(index: AsymmetricIndex) -> saap_index.Selection:
    """A selection of a copy that holds fewer tokens."""
    copy = index.fork()
    copy.truncate(60)
    return copy.select(Q)


@over_backends
@each({**ADD, **SEARCH, **CHANGE})
def test_refused(backend: str, case: Case) -> None:
    refused(holding(backend), case)


# -- what is not finite ---------------------------------------------------------------------------------------------------


@over_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_anywhere(backend: str, dtype: torch.dtype, bad: float) -> None:
    """The first and the last number of the first and the last token of every sequence and head, of keys and of values."""
    index = small_index(D, E, NLIST, HQ, H, backend=backend, dtype=dtype)
    index.add(*(x.to(dtype) for x in kv(n=40)), lengths=[40, 31])
    lengths = [3, 20]
    for which in (0, 1):
        for i, n in enumerate(lengths):
            for head in range(H):
                for token, dim in ((0, 0), (n - 1, -1), (n - 1, 0), (n // 2, 17)):
                    new = [x.to(dtype).clone() for x in kv(n=20)]
                    new[which][i, head, token, dim] = bad
                    case = Case(lambda x, new=new: x.add(*new, lengths=lengths), NotFiniteError, ("keys, values", "NaN"))
                    before = digest(index)
                    with pytest.raises(NotFiniteError, match="keys, values: expected finite numbers, got NaN or infinity"):
                        case.call(index)
                    assert digest(index) == before
    refused(index, case)


@over_backends
def test_what_lies_beyond_lengths_may_be_anything(backend: str) -> None:
    index, clean = holding(backend), holding(backend)
    keys, values = kv()
    clean.add(keys, values, lengths=[2, 5])
    keys[0, :, 2:], values[0, :, 2:] = torch.nan, torch.inf
    index.add(keys, values, lengths=[2, 5])
    assert digest(index) == digest(clean)


@over_backends
def test_a_refused_first_add_leaves_no_batch(backend: str) -> None:
    index = small_index(D, E, NLIST, HQ, H, backend=backend)
    keys, values = kv()
    with pytest.raises(NotFiniteError):
        index.add(keys * torch.nan, values)
    assert index.lengths == [] and index.ntotal == 0
    index.add(*kv(b=3))
    assert index.lengths == [5, 5, 5]


@over_backends
def test_a_nan_query_spoils_only_its_group(backend: str) -> None:
    index = holding(backend)
    asked = queries()
    want = index.search_attend(asked, params=SearchParametersIVF(selectivity=1.0))
    asked[0, 1, 0, 3] = torch.nan
    got = index.search_attend(asked, params=SearchParametersIVF(selectivity=1.0))
    assert bool(got[0, 1, 0].isnan().all())
    assert torch.equal(got[0, 2:], want[0, 2:]) and torch.equal(got[1], want[1])


# -- untrained, empty -----------------------------------------------------------------------------------------------------


@over_backends
def test_untrained(backend: str) -> None:
    index = AsymmetricIndex(D, NLIST, HQ, H, d_v=E, window=8, break_even=0, backend=backend)
    refused(index, Case(lambda x: x.add(K, V), NotTrainedError, ("add", "key_quantizer", "train")))
    index.add_preassigned(*kv(n=90), nos(B, H, 90))  # needs no quantizer, and searching named lists needs no router
    assert index.search_attend_preassigned(Q, LISTS).shape == (B, HQ, 2, E)
    refused(index, Case(lambda x: x.search_attend(Q), NotTrainedError, ("search", "query_router", "train")))
    refused(index, Case(lambda x: x.search(Q, 3), NotTrainedError, ("search", "query_router", "train")))
    refused(index, Case(lambda x: x.select(Q), NotTrainedError, ("search", "query_router")))
    refused(index, Case(lambda x: x.to_faiss(), NotTrainedError, ("to_faiss", "key_quantizer")))
    refused(index, Case(lambda x: x.add(K, V), NotTrainedError, ("add", "key_quantizer")))


@over_backends
def test_empty(backend: str) -> None:
    index = small_index(D, E, NLIST, HQ, H, backend=backend)
    refused(index, Case(lambda x: x.invlists, StateError, ("invlists", "add")))
    refused(index, Case(lambda x: x.reconstruct([0]), LengthError, ("ids", "0")))
    refused(index, Case(lambda x: x.search_attend(queries(q=9)), ShapeError, ("queries", "got 9")))
    out, lse = index.search_attend(Q, return_lse=True)
    assert not out.any() and bool((lse == -torch.inf).all()) and out.shape == (B, HQ, 2, E)


def test_unknown_attributes_are_refused() -> None:
    index = holding("torch")
    for name in ("n_probe", "ntotal", "foo", "is_trained"):
        with pytest.raises(AttributeError):
            setattr(index, name, 3)
    with pytest.raises(AttributeError):
        SearchParametersIVF(nprobe=3).nprobe = 4  # type: ignore[misc]


# -- constructors ---------------------------------------------------------------------------------------------------------

ROPE = Rope(head_dim=64)
CONSTRUCTOR = {
    "d 0": ({"d": 0}, ParameterError, ("d", "[8, 256]", "got 0")),
    "d 12": ({"d": 12}, ParameterError, ("d", "multiple of 8", "got 12")),
    "d 264": ({"d": 264}, ParameterError, ("d", "[8, 256]", "got 264")),
    "d 32.0": ({"d": 32.0}, ParameterError, ("d", "integer", "got 32.0")),
    "d None": ({"d": None}, ParameterError, ("d", "integer", "None")),
    "d_v 12": ({"d_v": 12}, ParameterError, ("d_v", "multiple of 8", "got 12")),
    "d_v 512": ({"d_v": 512}, ParameterError, ("d_v", "[8, 256]", "got 512")),
    "nlist 0": ({"nlist": 0}, ParameterError, ("nlist", "[1, 65535]", "got 0")),
    "nlist 65536": ({"nlist": 65536}, ParameterError, ("nlist", "got 65536")),
    "nlist True": ({"nlist": True}, ParameterError, ("nlist", "True")),
    "num_heads 0": ({"num_heads": 0}, ParameterError, ("num_heads", "got 0")),
    "num_kv_heads 0": ({"num_kv_heads": 0}, ParameterError, ("num_kv_heads", "got 0")),
    "num_heads 3 of 2": ({"num_heads": 3, "num_kv_heads": 2}, ParameterError, ("num_heads", "multiple", "2", "got 3")),
    "dtype double": ({"dtype": torch.float64}, ParameterError, ("dtype", "float64")),
    "dtype by name": ({"dtype": "float32"}, ParameterError, ("dtype", "'float32'")),
    "rope of another dim": ({"rope": ROPE}, CompatibilityError, ("rope", "32", "64")),
    "scale 0": ({"scale": 0.0}, ParameterError, ("scale", "positive", "0.0")),
    "scale -1": ({"scale": -1.0}, ParameterError, ("scale", "positive")),
    "scale NaN": ({"scale": float("nan")}, ParameterError, ("scale", "nan")),
    "scale inf": ({"scale": float("inf")}, ParameterError, ("scale", "inf")),
    "nprobe and selectivity": ({"nprobe": 2, "selectivity": 0.1}, ParameterError, ("nprobe, selectivity", "one of them")),
    "nprobe 0": ({"nprobe": 0}, ParameterError, ("nprobe", "got 0")),
    "selectivity 0": ({"selectivity": 0}, ParameterError, ("selectivity", "got 0")),
    "selectivity 2": ({"selectivity": 2.0}, ParameterError, ("selectivity", "got 2.0")),
    "max_codes -1": ({"max_codes": -1}, ParameterError, ("max_codes", "got -1")),
    "window -1": ({"window": -1}, ParameterError, ("window", "got -1")),
    "sinks -1": ({"sinks": -1}, ParameterError, ("sinks", "got -1")),
    "sinks 2**31": ({"sinks": 2**31}, ParameterError, ("sinks", "2**31")),
    "break_even -1": ({"break_even": -1}, ParameterError, ("break_even", "got -1")),
    "seal_tokens -1": ({"seal_tokens": -1}, ParameterError, ("seal_tokens", "got -1")),
    "mean_run_tokens 1.5": ({"mean_run_tokens": 1.5}, ParameterError, ("mean_run_tokens", "got 1.5")),
    "target_mass 0": ({"target_mass": 0}, ParameterError, ("target_mass", "got 0")),
    "target_mass and nprobe": ({"nprobe": 2, "target_mass": 0.5}, ParameterError, ("nprobe, target_mass", "one of them")),
    "tail -1": ({"tail": -1, "mean_run_tokens": 9}, ParameterError, ("tail", "got -1")),
    "tail without means": ({"tail": 0.2}, ParameterError, ("tail", "mean_run_tokens", "0.2")),
    "tail and nprobe": ({"nprobe": 2, "tail": 0.2, "mean_run_tokens": 9}, ParameterError, ("nprobe, tail", "one of them")),
    "budget_shares NaN": ({"budget_shares": [1, float("nan")]}, ParameterError, ("budget_shares", "finite", "nan")),
    "max_segment 0": ({"max_segment": 0}, ParameterError, ("max_segment", "got 0")),
    "backend": ({"backend": "fast"}, DeviceError, ("backend", "cpu", "'fast'")),
    "backend of another device": ({"backend": "cpu", "device": "meta"}, DeviceError, ("backend", "'cpu'", "'meta'")),
}


@pytest.mark.parametrize("options, error, words", CONSTRUCTOR.values(), ids=CONSTRUCTOR.keys())
def test_constructor(options: dict[str, object], error: type[SaapError], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        AsymmetricIndex(**{"d": D, "nlist": NLIST, "num_heads": HQ, "num_kv_heads": H, **options})
    assert type(caught.value) is error and re.search(r"expect(ed|s) .+ got ", str(caught.value))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("options", [
    {"nprobe": 1, "selectivity": 0.5}, {"nprobe": 0}, {"nprobe": -1}, {"nprobe": True}, {"selectivity": 0.0},
    {"selectivity": -0.1}, {"selectivity": 1.01}, {"selectivity": float("nan")}, {"selectivity": True}, {"selectivity": "1"},
    {"max_codes": -1}, {"max_codes": 1.0}, {"window": -1}, {"window": 2.0}, {"sinks": -1}, {"sinks": "1"},
    {"nprobe": 1, "target_mass": 0.5}, {"nprobe": 1, "tail": 0.5}, {"target_mass": 0.0}, {"target_mass": 1}, {"target_mass": "1"},
    {"tail": -0.1}, {"tail": 1.0}, {"tail": True},
])
def test_search_parameters(options: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match=r"expected .+, got ") as caught:
        SearchParametersIVF(**options)
    assert str(caught.value).startswith(next(iter(options)))
    with pytest.raises(TypeError):
        SearchParametersIVF(**options, quantizer_params=None)  # a name that is not there


@pytest.mark.parametrize("options", [
    {"niter": 0}, {"hidden": -1}, {"epochs": 0}, {"batch": 0}, {"batch": 2.5}, {"distance": True, "size_weighted": False},
])
def test_training_config(options: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match=r"expected .+, got ") as caught:
        TrainingConfig(**options)
    assert str(caught.value).startswith(next(iter(options)))


def weights(**changes: torch.Tensor) -> RouterWeights:
    parts = {
        "hidden": torch.zeros(2, 5, D), "bias_hidden": torch.zeros(2, 5), "out": torch.zeros(2, 6, 5),
        "skip": torch.zeros(2, 6, D), "bias_out": torch.zeros(2, 6),
    }
    return RouterWeights(**{**parts, **changes}, nlist=4)


@pytest.mark.parametrize("changes, error, word", [
    ({"hidden": torch.zeros(5, D)}, ShapeError, "hidden"),
    ({"bias_out": torch.zeros(2, 3)}, ShapeError, "bias_out"),
    ({"bias_hidden": torch.zeros(2, 4)}, ShapeError, "bias_hidden"),
    ({"out": torch.zeros(2, 6, 4)}, ShapeError, "out"),
    ({"skip": torch.zeros(2, 5, D)}, ShapeError, "skip"),
    ({"skip": torch.zeros(2, 6, D).half()}, DTypeError, "skip"),
    ({"skip": torch.full((2, 6, D), torch.nan)}, NotFiniteError, "skip"),
    ({"hidden": torch.full((2, 5, D), torch.inf)}, NotFiniteError, "hidden"),
    ({"out": torch.zeros((2, 6, 5), device="meta")}, DeviceError, "out"),
    ({"lists": torch.zeros(2, 4), "list_scales": torch.zeros(2, 4)}, ShapeError, "lists"),
    ({"lists": torch.zeros(2, 3, 4), "list_scales": torch.zeros(2, 4)}, ShapeError, "lists"),
    ({"lists": torch.zeros(2, 4, 7), "list_scales": torch.zeros(2, 7)}, ShapeError, "bias_out"),
    ({"lists": torch.zeros(2, 4, 4).double(), "list_scales": torch.zeros(2, 4)}, DTypeError, "lists"),
    ({"lists": torch.zeros(2, 4, 4), "list_scales": torch.zeros(2, 3)}, ShapeError, "list_scales"),
    ({"lists": torch.zeros(2, 4, 4)}, ShapeError, "lists, list_scales"),
])
def test_router_weights(changes: dict[str, torch.Tensor], error: type[SaapError], word: str) -> None:
    with pytest.raises(error, match=rf"router {word}: expected .+, got "):
        QueryRouter(weights(**changes))


@pytest.mark.parametrize("centroids, error", [
    (torch.zeros(4, D), ShapeError), (torch.zeros(2, 4, D).double(), DTypeError),
    (torch.full((2, 4, D), torch.nan), NotFiniteError),
])
def test_centroids(centroids: torch.Tensor, error: type[SaapError]) -> None:
    with pytest.raises(error, match=r"centroids: expected .+, got "):
        KeyQuantizer(centroids)


# -- training -------------------------------------------------------------------------------------------------------------

X = tokens(1, H, 99, D, seed=1)
XQ = tokens(1, HQ, 6, D, seed=2)
TRAIN = {
    "keys: heads": Case(lambda x: x.train(tokens(1, 3, 99, D)), ShapeError, ("keys", "(b, 2, n, 32)", "(1, 3, 99, 32)")),
    "keys: dtype": Case(lambda x: x.train(X.double()), DTypeError, ("keys", "float64")),
    "keys: NaN": Case(lambda x: x.train(X * torch.nan), NotFiniteError, ("keys", "NaN")),
    "keys: too few": Case(lambda x: x.train(X[:, :, :3]), ParameterError, ("keys", "nlist = 4", "got 3")),
    "keys: device": Case(lambda x: x.train(X.to("meta")), DeviceError, ("keys", "meta")),
    "queries: heads": Case(lambda x: x.train(X, XQ[:, :2]), ShapeError, ("queries", "(1, 4, q, 32)")),
    "queries: batch": Case(lambda x: x.train(X, XQ.repeat(2, 1, 1, 1)), ShapeError, ("queries", "(1, 4, q, 32)")),
    "queries: inf": Case(lambda x: x.train(X, XQ * torch.inf), NotFiniteError, ("queries", "infinity")),
    "positions: shape": Case(lambda x: x.train(X, XQ, positions=[1, 2]), ShapeError, ("positions", "(6,)", "(2,)")),
    "positions: beyond": Case(lambda x: x.train(X, XQ, positions=[50] * 5 + [99]), LengthError, ("positions", "[0, 99)", "99")),
    "positions: negative": Case(lambda x: x.train(X, XQ, positions=[50] * 5 + [-1]), LengthError, ("positions", "-1")),
    "positions: fractions": Case(
        lambda x: x.train(X, XQ, positions=[50.5] * 6), DTypeError, ("positions", "integers", "float64"),
    ),
    "positions: all recent": Case(lambda x: x.train(X, XQ, positions=range(6)), LengthError, ("positions", "none among 99")),
}


@each(TRAIN)
@pytest.mark.parametrize("trained", [False, True])
def test_train(case: Case, trained: bool) -> None:
    options = {"window": 8, "sinks": 2, "d_v": E, "backend": "torch"}
    refused(small_index(D, E, NLIST, HQ, H, backend="torch") if trained else AsymmetricIndex(D, NLIST, HQ, H, **options), case)


# -- functions and files --------------------------------------------------------------------------------------------------

S = torch.ones(2, 8), torch.ones(2)


@pytest.mark.parametrize("args, error", [
    ((S[0], S[1], torch.ones(2, 7), S[1]), ShapeError), ((*S, S[0], torch.ones(3)), ShapeError),
    ((*S, S[0].half(), S[1]), DTypeError), ((S[0], S[1].double(), *S), DTypeError), ((*S, S[0], S[1].double()), DTypeError),
    ((*S, S[0].to("meta"), S[1]), DeviceError), ((*S, S[0], S[1].to("meta")), DeviceError),
])
def test_merge_states(args: tuple[torch.Tensor, ...], error: type[SaapError]) -> None:
    with pytest.raises(error, match=r"expected .+ got "):
        merge_states(*args)


def test_files(tmp_path: Path) -> None:
    index = holding("torch")
    before = digest(index)
    with pytest.raises(OSError):
        write_index(index, tmp_path / "no such folder" / "index")
    with pytest.raises(OSError):
        write_index(index, tmp_path)
    assert digest(index) == before and list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        read_index(tmp_path / "absent")
    with pytest.raises(OSError):
        read_index(tmp_path)
    (tmp_path / "text").write_text("not an index")
    with pytest.raises(FormatError, match=r"expected .+ got "):
        read_index(tmp_path / "text")


@pytest.mark.parametrize("built_in, errors", [
    (ValueError, [ShapeError, DeviceError, LayoutError, NotFiniteError, ParameterError, FormatError, CompatibilityError]),
    (TypeError, [DTypeError]), (RuntimeError, [NotTrainedError, StateError]), (IndexError, [LengthError]),
    (ImportError, [saap_index.MissingDependencyError]),
])
def test_each_error_is_also_a_built_in(built_in: type[Exception], errors: list[type[SaapError]]) -> None:
    assert all(issubclass(error, built_in) and issubclass(error, SaapError) for error in errors)


@pytest.mark.parametrize("seal", [True, False])
def test_tokens_unlike_the_last_are_checked(seal: bool) -> None:
    """A step like the one before is not checked again; any other is, and nothing of it is stored."""
    index = small_index()
    good = torch.zeros((2, index.num_kv_heads, 1, index.d))
    for _ in range(3):
        index.add(good, good, seal=seal)
    wrong: list[tuple[type[Exception], Any, Any]] = [
        (DTypeError, good, good.half()), (ShapeError, good[:1], good[:1]), (ShapeError, good, good[:, :, :, :-8]),
        (ShapeError, good, good.expand(2, -1, 2, -1)), (LayoutError, good, good.transpose(0, 3).contiguous().transpose(0, 3)),
        (NotFiniteError, good, good / 0), (DTypeError, good, None),
    ]
    for error, keys, values in wrong:
        with pytest.raises(error):
            index.add(keys, values, seal=seal)
        assert index.lengths == [3, 3]
    index.add(good, good, seal=seal)
    other = index.fork()
    other.add(good.numpy(), good.numpy(), seal=seal)
    assert index.lengths == [4, 4] and other.lengths == [5, 5]
