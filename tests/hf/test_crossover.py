"""The length from which sparse steps are faster: decided from given times, kept in a file, used by `attach`. Nothing is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import CACHE, SMALL, greedy, make_routers, prompt, sealed_tokens, tiny

import saap_index as saap
from saap_index.hf import crossover as module
from saap_index.hf.break_even import LayerTimes, key_of
from saap_index.hf.crossover import FILE, LENGTHS, NOWHERE, Crossover, crossover, measured

WITHOUT = {name: value for name, value in SMALL.items() if name != "break_even"}


def times(dense: tuple[float, float], sparse: tuple[float, float]) -> Any:
    """Seconds at so many tokens, of lines (at none, for each)."""
    return lambda n: (dense[0] + dense[1] * n, sparse[0] + sparse[1] * n)


@pytest.mark.parametrize(
    ("dense", "sparse", "want"),
    [
        ((0.0, 1.0), (3000.0, 0.1), 4096),  # they meet at 3333
        ((0.0, 1.0), (0.0, 0.5), LENGTHS[0]),
        ((0.0, 1.0), (27648.0, 0.5), 55297),  # beyond what was timed, on the line
        ((0.0, 1.0), (90000.0, 0.0), 90001),
        ((0.0, 0.5), (1.0, 0.6), NOWHERE),
        ((0.0, 0.5), (1.0, 0.5), NOWHERE),
        ((0.0, 1e-9), (1e6, 0.0), NOWHERE),
    ],
)
def test_where_lines_meet(dense: tuple[float, float], sparse: tuple[float, float], want: int) -> None:
    assert crossover(times(dense, sparse)).tokens == pytest.approx(want, abs=1)


def test_one_win_is_none() -> None:
    """A neighbour that slows a single dense step down does not make a crossover, nor does one that was faster only at the end."""
    won = {2048: True, 4096: True, 6144: True}
    found = crossover(lambda n: (2.0 if won.get(n) else 1.0, 1.5))
    assert found.tokens == 4096 and [n for n, *_ in found.steps] == [1024, 1536, 2048, 3072, 4096, 6144]
    assert crossover(lambda n: (2.0 if n == LENGTHS[-1] else 1.0, 1.5)).tokens > LENGTHS[-1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_measured_once_and_kept(folder: Path) -> None:
    calls: list[int] = []

    def slow(n: int) -> tuple[float, float]:
        calls.append(n)
        return float(n), 2000.0

    first = measured({"d": 64}, slow)
    assert first.tokens == 2048 and calls
    calls.clear()
    assert measured({"d": 64}, slow) == first and not calls
    assert measured({"d": 128}, slow) == first and calls  # another shape is measured anew, and both are kept
    assert len(json.loads((folder / FILE).read_text())) == 2
    assert [path.name for path in folder.iterdir()] == [FILE]


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, '{"x": 3}', "\udcff"])
def test_a_damaged_file_is_measured_anew(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert measured({}, times((0.0, 1.0), (0.0, 0.5))).tokens == 1024
    assert module.kept(module.machine()) is not None


@pytest.mark.parametrize("value", [3, {"tokens": "x", "steps": []}, {"tokens": -1, "steps": []}, {"tokens": 5, "steps": [[1]]}])
def test_a_damaged_entry_is_measured_anew(folder: Path, value: Any) -> None:
    folder.mkdir()
    (folder / FILE).write_text(json.dumps({json.dumps(module.machine(), sort_keys=True): value}))
    assert measured({}, times((0.0, 1.0), (0.0, 0.5))).tokens == 1024


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "file" / "cache"))
    assert measured({}, times((0.0, 1.0), (0.0, 0.5))).tokens == 1024


def measures(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[Any]:
    """Every measurement says ``tokens``; returns the keys it is asked for."""
    keys: list[Any] = []

    def answer(key: Any, times: Any) -> Crossover:
        keys.append(key)
        return Crossover(tokens, ())

    monkeypatch.setattr(module, "measured", answer)
    return keys


def test_attach_takes_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense, bit for bit, one token below it; sparse from it on. Layers of one kind are measured once."""
    keys = measures(monkeypatch, 90)
    model = tiny("llama")
    ids = prompt(1, 80)
    want = greedy(model, ids, 9)
    saap.attach(model, make_routers(model), 0.1, **WITHOUT)
    assert len(keys) == 1 and keys[0]["selectivity"] == 0.1
    cache = saap.SaapCache(model)
    assert torch.equal(greedy(model, ids, 9, **{CACHE: cache}), want)
    assert cache.get_seq_length() == 88 and sealed_tokens(cache) == [0, 0, 0] and cache.tokens_read() == 1
    greedy(model, torch.cat([ids, want], 1), 5, **{CACHE: cache})
    assert min(sealed_tokens(cache)) > 0 and cache.tokens_read() < 1
    cache.reset()
    greedy(model, ids, 5, **{CACHE: cache})
    assert sealed_tokens(cache) == [0, 0, 0]


def test_a_number_is_taken_without_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = measures(monkeypatch, 90)
    model = tiny("llama")
    saap.attach(model, make_routers(model), 0.1, **SMALL)
    assert not keys and {plan.options["break_even"] for plan in model._saap_attached.plan.layers.values()} == {60}


def test_layers_of_two_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = measures(monkeypatch, 90)
    model = tiny("llama")
    routers = make_routers(model)
    other = make_routers(model, nlist=4)
    mixed = saap.Routers(routers.config, {0: routers.layers[0], 1: other.layers[1], 2: routers.layers[2]})
    saap.attach(model, mixed, 0.1, **WITHOUT)
    assert [key["lists"][1] for key in keys] == [8, 4]


def test_weights_that_are_not_there_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = measures(monkeypatch, 90)
    model = tiny("llama").to("meta")
    saap.attach(model, make_routers(model), 0.1, **WITHOUT)
    assert not keys and all("break_even" not in plan.options for plan in model._saap_attached.plan.layers.values())


def test_a_saved_prompt_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read where 90 tokens are long, loaded where 500 are: what was sealed is searched on."""
    measures(monkeypatch, 90)
    model = tiny("llama")
    routers, ids = make_routers(model), prompt(1, 120)
    saap.attach(model, routers, 0.1, **WITHOUT)
    cache = saap.SaapCache(model)
    with torch.no_grad():
        model(ids, **{CACHE: cache})
    cache.save(tmp_path / "read", tokens=ids)
    longer = torch.cat([ids, prompt(1, 3, seed=9)], 1)
    want = greedy(model, longer, 8, **{CACHE: cache})
    measures(monkeypatch, 500)
    saap.attach(saap.detach(model), routers, 0.1, **WITHOUT)
    loaded = saap.SaapCache.load(tmp_path / "read", model)
    assert torch.equal(greedy(model, longer, 8, **{CACHE: loaded}), want) and min(sealed_tokens(loaded)) > 0


@pytest.mark.parametrize("own_lists", [False, True])
def test_both_sides_are_timed(own_lists: bool) -> None:
    """Seconds above zero for dense and sparse, and a user's random numbers as they were."""
    model = tiny("llama")
    saap.attach(model, make_routers(model, own_lists=own_lists), 0.1, **SMALL)
    layer = model._saap_attached.plan.layers[0]
    before = torch.get_rng_state()
    found = LayerTimes(layer, torch.float32, torch.device("cpu"))(300)
    assert all(0 < seconds < 60 for seconds in found) and torch.equal(torch.get_rng_state(), before)
    assert json.dumps(key_of(layer, torch.float32, torch.device("cpu")))
