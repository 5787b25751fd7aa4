"""An index whose sealed tokens are codes: what it selects, holds, counts and refuses. `test_stateful` walks through the rest."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_index, tokens

import saap_index.io
from saap_index import (
    AsymmetricIndex,
    DeviceError,
    FormatError,
    ParameterError,
    SearchParametersIVF,
    read_index,
    register_backend,
    write_index,
)
from saap_index.backends.plain_torch import TorchBackend
from saap_index.backends.scalar_quantizer import decode, encode
from saap_index.invlists.arena import nbytes

STORAGES = ("SQ8", "SQ8/SQ4")
over_storages = pytest.mark.parametrize("storage", STORAGES)


@over_storages
def test_what_is_selected_does_not_depend_on_codes(storage: str) -> None:
    """Lists follow from the keys themselves, also of tokens that were sealed, taken back and sealed again."""
    coded, plain = small_index(storage=storage, selectivity=0.2), small_index(selectivity=0.2)
    keys, values = tokens(2, 2, 400, 32, seed=1), tokens(2, 2, 400, 32, seed=2)
    for index in (coded, plain):
        index.add(keys[:, :, :300], values[:, :, :300])
        index.truncate([131, 250])
        index.add(keys[:, :, 300:], values[:, :, 300:])
    queries = tokens(2, 4, 1, 32, seed=3)
    for params in (None, SearchParametersIVF(nprobe=2), SearchParametersIVF(selectivity=0.1, window=40)):
        for index in (coded, plain):
            index.search_attend(queries, params=params)
        ids = [index.read_ids(index._last) for index in (coded, plain)]
        assert all(torch.equal(a, b) for x, y in zip(*ids, strict=True) for a, b in zip(x, y, strict=True))
    for i in range(2):
        assert torch.equal(coded.invlists.row_ids(i), plain.invlists.row_ids(i))
    assert coded.invlists.pending is None, "nothing is kept of what is sealed again"


@over_storages
def test_a_token_is_coded_once(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is merged, truncated to, removed and sealed again: codes are moved."""
    index, coded = small_index(storage=storage), Counter[bytes]()
    kind = type(index._backend)
    original = kind.encode

    def counted(self: Any, code: Any, keys: torch.Tensor, *rest: Any) -> None:
        coded.update(row.numpy().tobytes() for row in keys[0])
        original(self, code, keys, *rest)

    monkeypatch.setattr(kind, "encode", counted)
    keys, values = tokens(1, 2, 500, 32, seed=1), tokens(1, 2, 500, 32, seed=2)
    index.add(keys[:, :, :300], values[:, :, :300])
    index.truncate(200)
    index.truncate(57)
    index.remove_ids(np.array([3, 30, 31, 55]))
    index.sinks = 6
    index.window = 40
    index.window = 3
    index = index.fork([0])
    for t in range(300, 500):
        index.add(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    index.reorder([0])
    assert len(coded) > 400 and set(coded.values()) == {1}


@over_storages
def test_recent_tokens_and_sinks_stay_as_they_came(storage: str) -> None:
    index = small_index(storage=storage, dtype=torch.bfloat16)
    keys, values = (tokens(1, 2, 300, 32, torch.bfloat16, seed) for seed in (1, 2))
    index.add(keys, values)
    low, high = index.invlists.sinks(0), index.invlists.sealed(0)
    ids = np.array([*range(low), *range(high, 300)])
    got = index.reconstruct(ids)
    assert torch.equal(got[0], keys[0][:, ids]) and torch.equal(got[1], values[0][:, ids])
    code, inside = index.options.code, np.arange(low, high)
    assert code is not None
    for x, y, bits in zip(index.reconstruct(inside), (keys, values), (code.key_bits, code.value_bits), strict=True):
        assert torch.equal(x, decode(encode(y[0][:, inside], bits), 32, bits).bfloat16())


@pytest.mark.parametrize(("storage", "share"), [("SQ8", 0.52), ("SQ8/SQ4", 0.40)])
def test_memory(storage: str, share: float) -> None:
    """Of a long prompt at d = 128, all arrays of keys and values; and what stats says of it and of a search."""
    n = 20000
    indexes = [AsymmetricIndex(128, 16, 2, 1, dtype=torch.bfloat16, storage=x, selectivity=0.1) for x in (storage, None)]
    keys, values = (tokens(1, 1, n, 128, torch.bfloat16, seed) for seed in (1, 2))
    for index in indexes:
        index.train(keys[:, :, :2000])
        index.add(keys, values)
        index.reclaim_memory()
        index.search_attend(tokens(1, 2, 1, 128, torch.bfloat16, 3))
    coded, plain = indexes
    arrays = [x.arena for x in (coded.invlists, plain.invlists)]
    sealed = coded.stats().sealed_tokens
    assert sum(arrays[0].keys[:, :, 0].nbytes + arrays[0].values[:, :, 0].nbytes for _ in range(sealed)) <= share * sealed * 512
    assert nbytes(arrays[0]) - nbytes(arrays[1]) < (share - 1) * 512 * sealed + 512 * 400, "the numbers of sealed rows are gone"
    stats = coded.stats()
    row = sum(coded.options.code.sizes(128, 128))
    assert stats.kv_bytes == sealed * row + (n - sealed) * 512 and plain.stats().kv_bytes == n * 512
    assert stats.slack_bytes >= 0
    last = stats.last_search
    assert last.kv_bytes == round(last.read_sealed) * row + round(last.dense_tokens) * 512
    coded.search_attend(tokens(1, 2, 1, 128, torch.bfloat16, 3), params=SearchParametersIVF(selectivity=1.0))
    assert coded.stats().last_search.kv_bytes == stats.kv_bytes, "dense attention reads codes"


@over_storages
def test_speculative_steps(storage: str) -> None:
    """Truncated into a sealed segment, what was sealed is read as codes, by several queries, each of which sees its own past."""
    index = small_index(storage=storage)
    keys, values = tokens(1, 2, 220, 32, seed=1), tokens(1, 2, 220, 32, seed=2)
    index.add(keys, values)
    index.truncate(203)
    queries = tokens(1, 4, 5, 32, seed=3)
    full = SearchParametersIVF(selectivity=1.0)
    out = index.search_attend(queries, params=full)
    for j in range(5):
        one = index.fork()
        one.truncate(203 - 4 + j)
        assert torch.allclose(one.search_attend(queries[:, :, j : j + 1], params=full), out[:, :, j : j + 1], atol=2e-6)


@over_storages
def test_a_file_and_one_that_lies(storage: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    index = small_index(storage=storage)
    index.add(tokens(1, 2, 120, 32, seed=1), tokens(1, 2, 120, 32, seed=2))
    index.truncate(100)
    write_index(index, tmp_path / "index")
    again = read_index(tmp_path / "index")
    queries = tokens(1, 4, 1, 32, seed=3)
    assert again.storage == storage and torch.equal(again.search_attend(queries), index.search_attend(queries))
    assert again.invlists.coded_spans == index.invlists.coded_spans
    low, high = index.invlists.coded_spans[0]
    rows = saap_index.io.stretches(index.invlists)
    monkeypatch.setattr(saap_index.io, "stretches", lambda lists: {**rows, "coded": [[low + 20, high + 20]]})
    write_index(index, tmp_path / "index")
    with pytest.raises(FormatError, match="coded"):
        read_index(tmp_path / "index")
    monkeypatch.undo()
    plain = small_index()
    write_index(plain, tmp_path / "plain")
    assert b'"storage' not in (tmp_path / "plain").read_bytes(), "a file without codes is what it was"


def test_refusals() -> None:
    for wrong in ("SQ4", "sq8", 8, ""):
        with pytest.raises(ParameterError, match="storage"):
            AsymmetricIndex(32, 4, storage=wrong)  # type: ignore[arg-type]

    class Without(TorchBackend):
        reads_codes = False

    register_backend("without codes", lambda device: Without(device))
    with pytest.raises(DeviceError, match=r"storage.*SQ8"):
        AsymmetricIndex(32, 4, storage="SQ8", backend="without codes")
    AsymmetricIndex(32, 4, backend="without codes")
