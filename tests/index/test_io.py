"""Files: what is written comes back bit for bit, and what is damaged, foreign or hostile is a FormatError and nothing else."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import random_router, small_index, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from saap_index import (
    AsymmetricIndex,
    Calibration,
    FormatError,
    QueryRouter,
    Rope,
    Sampling,
    SearchParametersIVF,
    io,
    read_index,
    write_index,
)
from saap_index.invlists.runs import run_lists
from saap_index.io import _checksum
from saap_index.routing.calibration import TARGETS
from saap_index.search.params import SAMPLING

D, E, NLIST, HQ, H = 32, 40, 4, 4, 2
ROPES = {
    "default": Rope(head_dim=D, theta=500.0),
    "interleaved part": Rope(head_dim=D, rotary_dim=16, interleaved=True),
    "linear": Rope(head_dim=D, scaling="linear", factor=4.0),
    "dynamic": Rope(head_dim=D, scaling="dynamic", factor=2.0, original_max_position=32),
    "yarn": Rope(head_dim=D, scaling="yarn", factor=4.0, original_max_position=32),
    "llama3": Rope(
        head_dim=D, scaling="llama3", factor=8.0, original_max_position=64, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    "longrope": Rope(
        head_dim=D, scaling="longrope", original_max_position=32, attention_factor=1.1, short_factor=(1.0,) * 16,
        long_factor=tuple(1.0 + i / 7 for i in range(16)),
    ),
}


def filled(b: int = 2, n: int = 90, lengths: list[int] | None = None, **options: Any) -> AsymmetricIndex:
    index = small_index(D, E, NLIST, HQ, H, **options)
    dtype = index.dtype
    index.add(tokens(b, H, n, D, dtype, 1), tokens(b, H, n, E, dtype, 2), lengths=lengths)
    return index


def removed() -> AsymmetricIndex:
    index = filled(lengths=[90, 70])
    index.remove_ids([np.array([0, 8, 33, 89]), np.array([69])])
    return index


def pending() -> AsymmetricIndex:
    index = filled(lengths=[90, 70])
    nos = torch.randint(0, NLIST, (2, H, 7), generator=torch.Generator().manual_seed(0))
    index.add_preassigned(tokens(2, H, 7, D, seed=3), tokens(2, H, 7, E, seed=4), nos)
    index.add(tokens(2, H, 2, D, seed=5), tokens(2, H, 2, E, seed=6))
    return index


def emptied() -> AsymmetricIndex:
    index = filled()
    index.reset()
    return index


def untrained() -> AsymmetricIndex:
    index = AsymmetricIndex(D, NLIST, HQ, H, window=8, break_even=0, nprobe=3, max_codes=17, scale=0.3)
    index.add_preassigned(tokens(1, H, 80, D), tokens(1, H, 80, D), torch.ones((1, H, 80), dtype=torch.int32))
    return index


def quantizer_only() -> AsymmetricIndex:
    index = AsymmetricIndex(D, NLIST, HQ, H)
    index.key_quantizer = small_index(D, E, NLIST, HQ, H).key_quantizer
    return index


def symmetric() -> AsymmetricIndex:
    index = filled()
    index.query_router = QueryRouter.symmetric(index.key_quantizer.centroids)
    return index


def published() -> AsymmetricIndex:
    index = filled(nprobe=2)
    index.query_router = random_router(H, NLIST, D, knots=-1, size_weighted=False)
    return index


def planned() -> AsymmetricIndex:
    index = filled(budget_shares=[0.3, 2.7], target_mass=0.8, selectivity=0.9)
    index.calibration = Calibration(torch.stack([torch.linspace(0.3, 0.1, len(TARGETS)), torch.linspace(0.9, 0, len(TARGETS))]))
    return index


def sampled() -> AsymmetricIndex:
    index = filled(selectivity=0.4, sample_cap=1.5)
    index.sampling = Sampling([0.5, 0.0], [2.25, 1.0], [0.75, 0.0])
    return index


INDEXES: dict[str, Callable[[], AsymmetricIndex]] = {
    "trained, empty": lambda: small_index(D, E, NLIST, HQ, H),
    "untrained, empty": lambda: AsymmetricIndex(D, NLIST, HQ, H),
    "untrained, holding": untrained,
    "no router": quantizer_only,
    "emptied": emptied,
    "reserved": lambda: (x := small_index(D, E, NLIST, HQ, H)).reserve_memory(50, batch=3) or x,
    "full": filled,
    "ragged": lambda: filled(3, 90, [90, 0, 13]),
    "not sealed": lambda: filled(break_even=1000),
    "removed": removed,
    "pending": pending,
    "symmetric": symmetric,
    "published": published,
    "planned": planned,
    "sampled": sampled,
    "means": lambda: filled(mean_run_tokens=2, tail=0.3),
    "means, ragged": lambda: filled(3, 90, [90, 0, 13], mean_run_tokens=1, tail=0.3, dtype=torch.bfloat16),
    **{f"rope {name}": (lambda rope=rope: filled(rope=rope)) for name, rope in ROPES.items()},
    **{str(t): (lambda t=t: filled(dtype=t)) for t in (torch.bfloat16, torch.float16)},
}
over_indexes = pytest.mark.parametrize("make", INDEXES.values(), ids=INDEXES.keys())


def parts(index: AsymmetricIndex) -> dict[str, Any]:
    """All that an index is, as plain data and bytes."""
    def raw(x: torch.Tensor) -> bytes:
        return x.contiguous().view(torch.uint8).numpy().tobytes()

    names = (
        "d", "d_v", "nlist", "num_heads", "num_kv_heads", "scale", "dtype", "rope", "layout", "nprobe", "selectivity",
        "max_codes", "lengths", "is_trained", "target_mass", "tail", *SAMPLING,
    )
    found = {name: getattr(index, name) for name in names}
    if index.key_quantizer is not None:
        found["centroids"] = raw(index.key_quantizer.centroids)
    if index.query_router is not None:
        found["router"] = {name: raw(x) for name, x in index.query_router.tensors().items()}
        found["knots"] = index.query_router.first_knot, index.query_router.size_weighted
    found["budget_shares"] = None if index.budget_shares is None else index.budget_shares.tolist()
    found["calibration"] = None if index.calibration is None else index.calibration.unread_mass.tolist()
    found["sampling"] = None if index.sampling is None else index.sampling.table().tolist()
    for i, n in enumerate(index.lengths):
        lists = index.invlists
        count = lists.num_means(i)
        found[f"means {i}"] = [x[i, :, :count].tolist() for x in (lists.mean_keys, lists.mean_values)]
        sealed, count = lists.sealed(i), len(lists.segments[i])
        found[f"sequence {i}"] = (
            lists.segments[i], lists.gaps[i].array().tolist(), raw(lists.keys[i, :, :n]), raw(lists.values[i, :, :n]),
            lists.row_ids(i).tolist(), lists.tables[i, :, :count].tolist(),
            None if lists.pending is None else lists.pending[i, :, sealed:n].tolist(),
        )
    return found


def opened(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, Any]]:
    """Tensors, metadata and configuration of a file."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    return tensors, metadata, json.loads(metadata["config"])


def same_content(a: Path, b: Path) -> bool:
    """Equal but for the order of the metadata, which safetensors leaves to chance."""
    (tensors, metadata, _), (others, other_metadata, _) = opened(a), opened(b)
    return metadata == other_metadata and tensors.keys() == others.keys() and all(
        torch.equal(x.view(torch.uint8), others[name].view(torch.uint8)) for name, x in tensors.items()
    )


# -- round trip -----------------------------------------------------------------------------------------------------------


@over_indexes
def test_round_trip(make: Callable[[], AsymmetricIndex], tmp_path: Path) -> None:
    index = make()
    path = tmp_path / "index"
    before = parts(index)
    write_index(index, path)
    assert parts(index) == before, "writing changes nothing"
    assert [p.name for p in tmp_path.iterdir()] == ["index"]
    again = read_index(str(path))
    assert parts(again) == before
    if index.is_trained:
        queries = tokens(max(1, len(index.lengths)), HQ, 3, D, seed=9)
        for params in (None, SearchParametersIVF(nprobe=2), SearchParametersIVF(selectivity=0.3, max_codes=9)):
            wanted = index.search_attend(queries, params=params, return_lse=True)
            for want, got in zip(wanted, again.search_attend(queries, params=params, return_lse=True), strict=True):
                assert torch.equal(want, got)
    write_index(again, tmp_path / "again")
    assert same_content(tmp_path / "again", path)


@over_indexes
def test_an_index_that_was_read_goes_on_alike(make: Callable[[], AsymmetricIndex], tmp_path: Path) -> None:
    index = make()
    write_index(index, tmp_path / "index")
    again = read_index(tmp_path / "index")
    b = max(1, len(index.lengths))
    for x in (index, again):
        nos = torch.zeros((b, H, 30), dtype=torch.int32)
        args = tokens(b, H, 30, D, x.dtype, 7), tokens(b, H, 30, x.d_v, x.dtype, 8)
        if x.key_quantizer is None:
            x.add_preassigned(*args, nos)
        else:
            x.add(*args)
        x.truncate([n - 5 for n in x.lengths])
        x.remove_ids([2])
    assert parts(index) == parts(again)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_a_file_belongs_to_no_backend(backend: str, tmp_path: Path) -> None:
    write_index(filled(backend=backend), tmp_path / "index")
    for other in ("cpu", "torch", "reference"):
        again = read_index(tmp_path / "index", backend=other)
        assert parts(again) == parts(filled(backend="reference"))


def test_memory_that_no_token_owns_is_not_written(tmp_path: Path) -> None:
    """What was removed is gone: the file of an index does not depend on what its memory held before."""
    keys, values = tokens(2, H, 90, D, seed=1), tokens(2, H, 90, E, seed=2)
    index, fresh = small_index(D, E, NLIST, HQ, H), small_index(D, E, NLIST, HQ, H)
    index.add(keys, values)
    index.truncate([40, 9])
    fresh.add(keys[:, :, :40], values[:, :, :40], lengths=[40, 9])
    for x in (index, fresh):
        x.remove_ids([3])
    write_index(index, tmp_path / "a")
    write_index(fresh, tmp_path / "b")
    assert same_content(tmp_path / "a", tmp_path / "b")


# -- damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file with everything in it: ragged, removed tokens, pending lists, a rope."""
    index = small_index(8, 8, 2, 2, 1, rope=Rope(head_dim=8, scaling="linear", factor=2.0))
    index.add(tokens(2, 1, 40, 8, seed=1), tokens(2, 1, 40, 8, seed=2), lengths=[40, 22])
    index.remove_ids([5])
    index.add_preassigned(tokens(2, 1, 2, 8), tokens(2, 1, 2, 8), torch.ones((2, 1, 2), dtype=torch.int64))
    path = tmp_path_factory.mktemp("good") / "index"
    write_index(index, path)
    return path


def refuse(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        read_index(path)
    assert str(caught.value)


fuzz = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def test_every_truncation_of_the_header_and_many_of_the_data(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for length in [*range(0, header, 7), *range(header - 9, header + 9), *range(header, len(data), 97), len(data) - 1]:
        refuse(data[:length], tmp_path / "cut")


@fuzz
@given(data=st.data())
def test_any_bit_flipped(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(good.read_bytes())
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    at = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(whole) - 1)))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    refuse(bytes(whole), tmp_path / "flipped")


@fuzz
@given(data=st.data())
def test_a_stretch_overwritten_or_taken_out_or_put_in(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = good.read_bytes()
    at, noise = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.binary(min_size=1, max_size=40))
    changed = {
        "over": whole[:at] + noise + whole[at + len(noise) :], "out": whole[:at] + whole[at + len(noise) :],
        "in": whole[:at] + noise + whole[at:],
    }[data.draw(st.sampled_from(["over", "out", "in"]))]
    if changed != whole:
        refuse(changed, tmp_path / "changed")


@fuzz
@given(data=st.binary(max_size=300), magic=st.booleans())
def test_random_bytes(tmp_path: Path, data: bytes, magic: bool) -> None:
    refuse(struct.pack("<Q", len(data)) + b"{" + data if magic else data, tmp_path / "random")


@pytest.mark.parametrize("length", [0, 1, 2, 99, 2**24, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
def test_any_header_length(length: int, good: Path, tmp_path: Path) -> None:
    refuse(struct.pack("<Q", length) + good.read_bytes()[8:], tmp_path / "length")


def test_other_files(good: Path, tmp_path: Path) -> None:
    import faiss

    faiss.write_index(faiss.IndexFlatIP(8), str(tmp_path / "faiss"))
    np.savez(tmp_path / "numpy.npz", a=np.zeros(3))
    torch.save({"a": torch.zeros(3)}, tmp_path / "torch")
    save_file({"a": torch.zeros(3)}, tmp_path / "safetensors")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "json").write_text('{"format": "saap_index"}')
    for path in list(tmp_path.iterdir()):
        refuse(path.read_bytes(), tmp_path / "other")


# -- whole files with other content ---------------------------------------------------------------------------------------

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


def forge(source: Path, to: Path, change: Callable[[Tensors, Config], object]) -> None:
    """The file with other tensors and configuration, and a checksum that is right."""
    tensors, metadata, config = opened(source)
    found = change(tensors, config)
    text = found if isinstance(found, str) else json.dumps(config, sort_keys=True)
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    save_file(tensors, to, {**metadata, "config": text, "checksum": _checksum(tensors, text)})


def test_forging_as_such_is_accepted(good: Path, tmp_path: Path) -> None:
    """The cases below are refused for what they change, not for how they are made."""
    forge(good, tmp_path / "forged", lambda tensors, config: None)
    assert parts(read_index(tmp_path / "forged")) == parts(read_index(good))


def entry(*path: str, value: object) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        where = config
        for name in path[:-1]:
            where = where[name]
        where[path[-1]] = value

    return change


def tensor(name: str, edit: Callable[[torch.Tensor], object]) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        new = edit(tensors[name])
        if isinstance(new, torch.Tensor):
            tensors[name] = new

    return change


def put(name: str, index: tuple[Any, ...], value: object) -> Callable[[Tensors, Config], None]:
    return tensor(name, lambda x: x.__setitem__(index, value))


WRONG = [None, -1, 0, 1.5, "x", True, [], {}, 2**31, 2**63, 10**30]
CONFIGS = {
    **{
        f"{name} = {value!r}": entry("index", name, value=value)
        for name in (
            "d", "d_v", "nlist", "num_heads", "num_kv_heads", "sinks", "window", "seal_tokens", "max_segment", "mean_run_tokens",
            "target_mass", "tail", "budget_shares",
        )
        for value in WRONG
        if not (name in ("sinks", "window", "seal_tokens", "mean_run_tokens", "tail") and value == 0)
        and not (name in ("target_mass", "tail", "budget_shares") and value is None)
    },
    **{
        f"{name} = {value!r}": entry(name, value=value)
        for name in ("dtype", "lengths", "index", "gaps")
        for value in [*WRONG, [None], [-1, 5], [2**40, 3], ["a", "b"], [[1], [2]], [1.5, 2]]
    },
    **{f"router = {value!r}": entry("router", value=value) for value in [None, 3, "x", [], {}]},
    **{f"units = {value!r}": entry("router", "units", value=value) for value in [None, -1, 6, "x", 2**63]},
    **{f"outputs = {value!r}": entry("router", "outputs", value=value) for value in [None, -9, 99, "x", 2**63]},
    **{f"first_knot = {value!r}": entry("router", "first_knot", value=value) for value in [None, "x", [], 10**400]},
    **{f"rope = {value!r}": entry("rope", value=value) for value in [3, "x", [], {}, {"head_dim": 8, "theta": "x"}]},
    "rope of another dim": entry("rope", "head_dim", value=16),
    "rope of a hostile name": entry("rope", "__class__", value=1),
    "an unknown parameter": entry("index", "speed", value=9),
    "a parameter of the reader": entry("index", "device", value="cuda"),
    "no quantizer": entry("quantizer", value=False),
    "not pending": entry("pending", value=False),
    "dtype of another name": entry("dtype", value="Tensor"),
    "fewer tokens": entry("lengths", value=[30, 23]),
    "one sequence": entry("lengths", value=[41]),
    "three sequences": entry("lengths", value=[41, 23, 1]),
    "more removed": entry("gaps", value=[2, 1]),
    "removed moved by a negative count": entry("gaps", value=[3, -1]),
    "removed of three": entry("gaps", value=[1, 1, 0]),
    **{f"calibrated = {value!r}": entry("calibrated", value=value) for value in [True, 3, "x", [1]]},
    "a tail without means": entry("index", "tail", value=0.5),
    "another window": entry("index", "window", value=30),
    "another max_segment": entry("index", "max_segment", value=4),
    "deeply nested": lambda tensors, config: "[" * 100_000 + "]" * 100_000,
    "not JSON": lambda tensors, config: "{",
    "a list": lambda tensors, config: "[]",
    "an enormous number": lambda tensors, config: "1" * 10_000,
    "empty": lambda tensors, config: "{}",
}
TENSORS = {
    **{f"no {name}": (lambda t, c, name=name: t.pop(name)) for name in ("keys", "ids", "tables", "centroids", "router.out")},
    "one more": lambda t, c: t.__setitem__("extra", torch.zeros(3)),
    "keys of another dtype": tensor("keys", lambda x: x.half()),
    "keys as integers": tensor("keys", lambda x: x.int()),
    "keys as bits": tensor("keys", lambda x: x.view(torch.int32)),
    "ids as int64": tensor("ids", lambda x: x.long()),
    "removed as int32": tensor("gaps", lambda x: x.int()),
    "fewer rows": tensor("keys", lambda x: x[:, :, :-1]),
    "values of another shape": tensor("values", lambda x: x.transpose(2, 3)),
    "no axes": tensor("keys", lambda x: torch.zeros(())),
    "two axes": tensor("keys", lambda x: x.flatten(1)),
    "one table less": tensor("tables", lambda x: x[:, :, :-1]),
    "keys of no sequence, but long": tensor("keys", lambda x: x.new_empty((0, 1, 2**31, 8))),
    "centroids NaN": put("centroids", (0, 0, 0), torch.nan),
    "router infinite": put("router.out", (0, 0, 0), torch.inf),
}
UNSAFE = {
    "offset past the segment": put("tables", (0, 0, 0, 1), 10**6),
    "offset before the segment": put("tables", (0, 0, 0, 1), -3),
    "first offset": put("tables", (0, 0, 0, 0), 0),
    "last offset": put("tables", (0, 0, 0, -1), 7),
    "last offset of the second sequence": put("tables", (1, 0, 0, -1), 2**30),
    "offsets fall": tensor("tables", lambda x: x[0, 0, 0].copy_(x[0, 0, 0].flip(0))),
    "an id twice": tensor("ids", lambda x: x[0, 0].__setitem__(3, int(x[0, 0, 4]))),
    "an id out of range": put("ids", (0, 0, 3), 10**6),
    "a negative id": put("ids", (0, 0, 3), -7),
    "an id of another segment": put("ids", (0, 0, 3), 39),
    "an id that was removed": put("ids", (0, 0, 3), 5),
    "a pending list out of range": put("pending", (0, 0, -1), NLIST + 10**6),
    "a pending list just out of range": put("pending", (0, 0, -1), 2),
    "a negative pending list": put("pending", (1, 0, 22), -2),
    "a removed id that is negative": put("gaps", (0, 0), -1),
    "a removed id far away": put("gaps", (0, 1), 10**9),
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=[name[:60] for name in CONFIGS])
def test_a_configuration_that_does_not_fit(change: Callable[[Tensors, Config], object], good: Path, tmp_path: Path) -> None:
    forge(good, tmp_path / "forged", change)
    refuse((tmp_path / "forged").read_bytes(), tmp_path / "forged")


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_do_not_fit(change: Callable[[Tensors, Config], object], good: Path, tmp_path: Path) -> None:
    forge(good, tmp_path / "forged", change)
    refuse((tmp_path / "forged").read_bytes(), tmp_path / "forged")


@pytest.mark.parametrize("change", UNSAFE.values(), ids=UNSAFE.keys())
def test_unsafe_values(change: Callable[[Tensors, Config], object], good: Path, tmp_path: Path) -> None:
    """A right checksum is no excuse: a kernel would follow these numbers into memory that is not there."""
    forge(good, tmp_path / "forged", change)
    refuse((tmp_path / "forged").read_bytes(), tmp_path / "forged")


@pytest.mark.parametrize("key, value", [("format", "other"), ("version", "0"), ("version", "3"), ("checksum", "00000000")])
def test_other_metadata(key: str, value: str, good: Path, tmp_path: Path) -> None:
    tensors, metadata, _ = opened(good)
    for changed in ({**metadata, key: value}, {k: v for k, v in metadata.items() if k != key}):
        save_file(tensors, tmp_path / "file", changed)
        refuse((tmp_path / "file").read_bytes(), tmp_path / "file")
    save_file(tensors, tmp_path / "file")
    refuse((tmp_path / "file").read_bytes(), tmp_path / "file")


READ_ALL = """
import resource, sys
from pathlib import Path
from saap_index import FormatError, read_index
good, *bad = map(Path, sys.argv[1:])
for _ in range(3):
    read_index(good)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (8 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in bad:
    try:
        read_index(path)
    except FormatError:
        continue
    sys.exit(f"{path} was accepted")
"""


def test_no_file_makes_the_reader_allocate_much(good: Path, tmp_path: Path) -> None:
    """With 8 MiB of address space left, every refusal is still a FormatError: nothing is made to the file's measure."""
    data, paths = good.read_bytes(), []

    def add(name: str) -> Path:
        paths.append(tmp_path / name)
        return paths[-1]

    for length in (2**24, 2**31, 2**40, 2**63):
        add(f"header {length}").write_bytes(struct.pack("<Q", length) + data[8:])
    huge = {
        "a billion tokens": entry("lengths", value=[2**31 - 1, 2**31 - 1]),
        "many lists": entry("index", "nlist", value=65535),
        "many heads": lambda t, c: c["index"].update(num_heads=2**31 - 1, num_kv_heads=2**31 - 1),
        "many units": entry("router", "units", value=2**40),
        "many sequences": entry("lengths", value=[0] * 100_000),
        "keys of no sequence, a billion tokens": lambda t, c: (
            t.update(keys=torch.empty((0, 1, 2**31 - 1, 8))), c.update(lengths=[2**31 - 1, 5])
        ),
        "a million segments": lambda t, c: (
            t.update(keys=torch.empty((0, 1, 2**30, 8))), c.update(lengths=[2**24 - 2, 5]),
            c["index"].update(seal_tokens=1, max_segment=1),
        ),
        "deeply nested": CONFIGS["deeply nested"],
    }
    for name, change in huge.items():
        forge(good, add(name), change)
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(good), *map(str, paths)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY, "only the child was limited"


# -- interruption ---------------------------------------------------------------------------------------------------------


def half_written(tensors: Tensors, path: Path, metadata: dict[str, str]) -> None:
    save_file(tensors, path, metadata)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["save_file", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file(
    step: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "index"
    old = filled()
    write_index(old, path)

    def interrupt(*args: object) -> None:
        if step == "save_file":
            with pytest.raises(KeyboardInterrupt):
                half_written(*args)
        raise error("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(f"saap_index.files.{step}", interrupt)
        with pytest.raises(error, match="interrupted"):
            write_index(removed(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["index"]
    assert parts(read_index(path)) == parts(old)
    write_index(removed(), path)
    assert parts(read_index(path)) == parts(removed())


KILLED = """
import os, signal, sys
import saap_index.files
from saap_index import read_index, write_index
step, path = sys.argv[1:]
index = read_index(path)
index.truncate(7)

def killed(*args):
    if step == "save_file":
        save(*args)
        with open(args[1], "r+b") as file:
            file.truncate(os.stat(args[1]).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)

save = saap_index.files.save_file
if step == "save_file":
    saap_index.files.save_file = killed
else:
    setattr(os, step, killed)
write_index(index, path)
"""


@pytest.mark.parametrize("step", ["save_file", "replace"])
def test_a_killed_write_leaves_the_old_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index"
    write_index(filled(), path)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, step, str(path)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert done.returncode == -signal.SIGKILL
    left = [p for p in tmp_path.iterdir() if p != path]
    assert parts(read_index(path)) == parts(filled()) and len(left) == 1
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in a container, where every process has this number
    write_index(removed(), path)
    assert parts(read_index(path)) == parts(removed()) and not left[0].exists()


def test_a_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors wraps what the system says in an error of its own; the caller sees the one that is documented."""
    path = tmp_path / "index"
    write_index(filled(), path)

    def full(*args: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("saap_index.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_index(removed(), path)
    assert parts(read_index(path)) == parts(filled())


def test_a_file_of_before_merges_took_their_time(tmp_path: Path) -> None:
    """Version 1 has every merge done when it is due; what is read is the state of the tokens, lists that were given included."""
    keys, values = tokens(2, 2, 99, 32, seed=1), tokens(2, 2, 99, 32, seed=2)
    merging = 0
    for n in range(60, 99, 3):
        index = small_index()
        index.add_preassigned(keys[:, :, :20], values[:, :, :20], torch.zeros((2, 2, 20)).int())
        index.add(keys[:, :, 20:n], values[:, :, 20:n], lengths=[n - 20, n - 27])
        old = index.fork()
        lists = old.invlists
        for i, length in enumerate(lists.lengths):
            have, merging = lists.arrangement(i), merging + (lists.merging[i] is not None)
            merged_segments = lists.layout.merged_segments(length)
            lists.resize_tables(max(lists.tables.shape[2], len(merged_segments)))
            for first, (start, stop) in ((s, x) for s, x in enumerate(merged_segments) if x not in have.segments):
                assert lists.segments[i][first][0] == start
                parts = [x for x in lists.segments[i] if start <= x[0] < stop]
                lists.segments[i] = (*lists.segments[i][:first], (start, stop), *lists.segments[i][first + len(parts) :])
                numbers = torch.cat([run_lists(lists.tables[i, :, first + k], x) for k, x in enumerate(parts)], 1)
                left = lists.tables[i, :, first + len(parts) :].clone()
                lists.backend.seal(lists.keys[i], lists.values[i], lists.ids[i], start, numbers, lists.tables[i, :, first])
                lists.tables[i, :, first + 1 : first + 1 + left.shape[1]] = left
            lists.merging[i] = None
            assert lists.segments[i] == merged_segments
        with patch.object(io, "VERSION", io.AT_ONCE), patch.object(AsymmetricIndex, "seal", lambda index: None):
            write_index(old, tmp_path / "old")
        read = read_index(tmp_path / "old")
        for i, length in enumerate(index.lengths):
            one, other = index.invlists, read.invlists
            assert other.arrangement(i) == one.arrangement(i) == one.layout.arrangement(length, 2)
            parts = len(one.segments[i])
            assert torch.equal(other.tables[i, :, :parts], one.tables[i, :, :parts])
            assert torch.equal(other.row_ids(i), one.row_ids(i))
            assert torch.equal(other.keys[i, :, :length], one.keys[i, :, :length])
    assert merging
