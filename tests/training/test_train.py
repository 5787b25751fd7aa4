"""`saap train` on a tiny model: from texts to routers, interrupted anywhere, repeated, refused by name."""

from __future__ import annotations

import itertools
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import CACHE, VOCABULARY, greedy, tiny
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saap_index import AsymmetricIndex, Rope, SaapCache, SearchParametersIVF, attach, cli, load_routers, save_routers
from saap_index.errors import (
    CompatibilityError,
    FormatError,
    LengthError,
    MissingDependencyError,
    NotFiniteError,
    ParameterError,
    StateError,
)
from saap_index.hf.models import LoadedModel, load_model
from saap_index.pipeline import capture, layers, texts, train
from saap_index.pipeline.costs import costs, costs_of
from saap_index.pipeline.settings import TrainSettings
from saap_index.pipeline.store import CaptureStore
from saap_index.pipeline.train import train_model
from saap_index.training.measure import SHARES, measure

SETTINGS = TrainSettings(tokens=1536, context=512, held_out=2, queries=48, nlist=8, window=32)
FILES = ("config.json", "model.safetensors")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(tiny("llama", num_hidden_layers=2), None, "tiny", "0")


@pytest.fixture(scope="module")
def sequences() -> list[texts.TokenSequence]:
    rng = np.random.default_rng(0)
    return [(f"kind:{i}", rng.integers(3, VOCABULARY, SETTINGS.context).tolist()) for i in range(SETTINGS.sequences)]


@pytest.fixture(scope="module")
def whole(loaded: LoadedModel, sequences: list[texts.TokenSequence], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained in one go."""
    out = tmp_path_factory.mktemp("whole") / "routers"
    train_model(loaded, sequences, SETTINGS, out)
    return out


def content(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


class Interruption(KeyboardInterrupt):
    pass


# -- one run ----------------------------------------------------------------------------------------------------------------


def test_what_is_written(whole: Path, loaded: LoadedModel) -> None:
    assert sorted(path.name for path in whole.iterdir()) == sorted(FILES), "nothing unfinished is left"
    routers = load_routers(whole)
    config = routers.config
    assert sorted(routers.layers) == [0, 1]
    assert config["model"]["name"] == "tiny" and config["model"]["num_key_value_heads"] == 2
    assert config["data"]["tokens"] == SETTINGS.sequences * SETTINGS.context and len(config["data"]["hash"]) == 16
    assert config["settings"]["seed"] == 0 and config["settings"]["layers"] == [0, 1] and "torch" in config["versions"]
    assert (config["router"], config["partition"], config["nlist"]) == ("two-tower", "per-prompt", 8)
    for number, layer in routers.layers.items():
        row = config["evaluation"][str(number)]
        assert len(row["captured"]) == len(SHARES) and row["sequences"] == 2
        assert all(0 <= x <= best + 1e-3 for x, best in zip(row["captured"], row["best"], strict=True))
        assert all(a <= b + 1e-9 for a, b in itertools.pairwise(row["captured"])), "a larger budget captures more"
        assert layer.tower is not None and layer.calibration is not None and layer.rope == Rope.from_config(loaded.model.config)
        assert layer.losses is not None and layer.losses.shape == (2, len(row["grid"])) and layer.losses[:, -1].max() < 1e-9
    shares = np.stack([layer.budget_shares for layer in routers.layers.values()])
    assert shares.mean() == pytest.approx(1) and (shares > 0).all()
    routers.check(loaded.model.config)
    text = (whole / "config.json").read_text()
    assert str(whole.parent) not in text, "the result says nothing of this machine"


def test_an_index_from_the_routers_works(whole: Path) -> None:
    routers = load_routers(whole)
    index = routers.index(1, break_even=64)
    assert index.tower is not None and index.calibration is not None and index.window == 32
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn((1, 2, 300, 16), generator=generator), torch.randn((1, 2, 300, 16), generator=generator)
    index.add(keys, values)
    query = torch.randn((1, 4, 1, 16), generator=generator)
    dense = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True, scale=index.scale)
    torch.testing.assert_close(
        index.search_attend(query, params=SearchParametersIVF(selectivity=1.0)), dense, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ParameterError, match="layer"):
        routers.index(2)


def test_the_model_generates_through_them(whole: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    """Reading everything gives what the model gives alone; a prompt's own lists are saved with it."""
    model, ids = tiny("llama", num_hidden_layers=2), torch.randint(3, VOCABULARY, (1, 700))
    want = greedy(model, ids, 6)
    model = attach(model, load_routers(whole), selectivity=1.0, break_even=256)
    cache = SaapCache(model)
    assert torch.equal(greedy(model, ids, 6, **{CACHE: cache}), want)
    index = cache.layers[0].index
    assert not torch.equal(index.key_quantizer.centroids, load_routers(whole).layers[0].key_quantizer.centroids)
    cache.save(tmp_path / "prompt")
    again = SaapCache.load(tmp_path / "prompt", model).layers[0].index
    assert torch.equal(again.key_quantizer.centroids, index.key_quantizer.centroids)
    query, params = torch.randn(1, 4, 1, 16), SearchParametersIVF(selectivity=0.1)
    assert torch.equal(again.search_attend(query, params=params), index.search_attend(query, params=params))


def test_saved_again_the_files_are_the_same(whole: Path, tmp_path: Path) -> None:
    save_routers(load_routers(whole), tmp_path)
    assert content(tmp_path) == content(whole)


# -- again, and after an interruption -----------------------------------------------------------------------------------------


def test_same_seed_same_files_another_seed_others(
    whole: Path, loaded: LoadedModel, sequences: list[texts.TokenSequence], tmp_path: Path
) -> None:
    train_model(loaded, sequences, SETTINGS, tmp_path / "again")
    assert content(tmp_path / "again") == content(whole)
    train_model(loaded, sequences, replace(SETTINGS, seed=1), tmp_path / "other")
    same = [
        torch.equal(a, b) for a, b in zip(*(load_file(f / FILES[1]).values() for f in (whole, tmp_path / "other")), strict=True)
    ]
    assert not all(same)


def test_some_layers_at_a_time_take_less_disk_and_give_the_same(
    whole: Path, loaded: LoadedModel, sequences: list[texts.TokenSequence], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's captures alone; interrupted between two, what is trained is neither captured nor trained again."""
    stored: list[tuple[int, ...]] = []
    made, parts = train.CaptureStore, []

    def store(folder: Path, shape: Any) -> CaptureStore:
        stored.append(shape.layers)
        return made(folder, shape)

    def step(what: str, done: int, total: int) -> None:
        parts.append((what, done, total))
        if what == "layer" and len([part for part in parts if part[0] == "layer"]) == 1:
            raise Interruption

    monkeypatch.setattr(train, "CaptureStore", store)
    with pytest.raises(Interruption):
        train_model(loaded, sequences, SETTINGS, tmp_path / "out", step=step, max_disk_bytes=1)
    train_model(loaded, sequences, SETTINGS, tmp_path / "out", resume=True, step=step, max_disk_bytes=1)
    assert content(tmp_path / "out") == content(whole)
    assert stored == [(0,), (1,)]
    count = SETTINGS.sequences
    assert parts[count - 1] == ("capture", count, 2 * count) and parts[-1] == ("layer", 2, 2)


def test_what_it_will_take(loaded: LoadedModel) -> None:
    """An 8B model: 19 GB of captures at once, a tenth in parts; time grows with the tokens, and shrinks with the rate."""
    shape = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    settings = TrainSettings()
    whole, parts = (costs_of(shape, 7 * 10**9, settings, 1e12, most, 32) for most in (None, 19 * 10**8))
    assert 17e9 < whole.disk < 20e9 and whole.passes == 1
    assert parts.disk <= 1.9e9 and 10 <= parts.passes <= 16 and parts.layer_multiplications == whole.layer_multiplications
    assert 5 < parts.pass_multiplications / whole.pass_multiplications < 9
    more = costs_of(shape, 7 * 10**9, replace(settings, tokens=400_000), 2e12, None, 32)
    assert more.disk > 1.7 * whole.disk and whole.seconds / 2 < more.seconds < whole.seconds
    assert "GB of disk" in whole.line() and "10 pass" not in whole.line()
    assert costs(loaded.model, SETTINGS).seconds > 0


STAGES = ["first sequence", "while writing a sequence", "captures", "first layer", "while training a layer", "while saving"]


@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_and_resumed(
    stage: str, whole: Path, loaded: LoadedModel, sequences: list[texts.TokenSequence], tmp_path: Path, monkeypatch: Any
) -> None:
    steps = {"first sequence": ("capture", 1), "captures": ("capture", SETTINGS.sequences), "first layer": ("layer", 1)}

    def step(what: str, done: int, total: int) -> None:
        if steps.get(stage) == (what, done):
            raise Interruption

    calls = {"writes": 0}

    def interrupting(function: Any, after: int = 0) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls["writes"] += 1
            if calls["writes"] > after:
                raise Interruption
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        if stage == "while writing a sequence":
            patch.setattr(CaptureStore, "write", interrupting(CaptureStore.write, 5))
        if stage == "while training a layer":
            patch.setattr(layers, "measure", interrupting(layers.measure, 1))
        if stage == "while saving":
            patch.setattr(train, "save_routers", interrupting(train.save_routers))
        with pytest.raises(Interruption):
            train_model(loaded, sequences, SETTINGS, tmp_path / "out", step=step)
    with pytest.raises(StateError, match="--resume"):
        train_model(loaded, sequences, SETTINGS, tmp_path / "out")
    passes = []
    monkeypatch.setattr(capture, "run", lambda *args, run=capture.run: (passes.append(len(args[1])), run(*args)))
    train_model(loaded, sequences, SETTINGS, tmp_path / "out", resume=True)
    done = {"first sequence": 1, "while writing a sequence": 2}.get(stage, SETTINGS.sequences)
    assert len([n for n in passes if n > 2]) == SETTINGS.sequences - done, "finished sequences are not run again"
    assert content(tmp_path / "out") == content(whole)


def test_resuming_what_is_finished_reads_it(
    whole: Path, loaded: LoadedModel, sequences: list[texts.TokenSequence], monkeypatch: Any
) -> None:
    monkeypatch.setattr(train, "_captured", None)
    routers = train_model(loaded, sequences, SETTINGS, whole, resume=True)
    assert sorted(routers.layers) == [0, 1]
    with pytest.raises(StateError, match="without routers"):
        train_model(loaded, sequences, SETTINGS, whole)


def test_resuming_something_else_is_refused_by_name(
    loaded: LoadedModel, sequences: list[texts.TokenSequence], tmp_path: Path
) -> None:
    def step(what: str, done: int, total: int) -> None:
        raise Interruption

    with pytest.raises(Interruption):
        train_model(loaded, sequences, SETTINGS, tmp_path, step=step)
    others = [("kind:x", [5] * SETTINGS.context), *sequences[1:]]
    for name, given in {
        "nlist": (loaded, sequences, replace(SETTINGS, nlist=4)),
        "seed": (loaded, sequences, replace(SETTINGS, seed=3)),
        "hash": (loaded, others, SETTINGS),
        "fingerprint": (replace(loaded, fingerprint="1"), sequences, SETTINGS),
    }.items():
        with pytest.raises(CompatibilityError, match=name):
            train_model(*given, tmp_path, resume=True)


@pytest.mark.parametrize("router", ["two-tower", "kmeans"])
def test_without_faiss_nothing_is_begun(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], router: str,
    loaded: LoadedModel, sequences: list[texts.TokenSequence],
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(capture, "run", lambda *args: pytest.fail("no pass of the model without FAISS"))
    with pytest.raises(MissingDependencyError, match="FAISS"):
        train_model(loaded, sequences, replace(SETTINGS, router=router), tmp_path / "out")
    monkeypatch.setattr("saap_index.hf.models.load_model", lambda *args: pytest.fail("nor is one loaded"))
    assert command(checkpoint, tmp_path / "out", "--router", router) == 1
    assert "pip install faiss-cpu" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("module", "said"), [
    (None, "got another module of its name, none of a file"),  # a folder: what is left of an installation, or FAISS's own sources
    ("raise OSError('libmkl.so: cannot open')", "got one that fails when imported, OSError: libmkl.so"),
    ("Kmeans = None", "got another module of its name"),
])
def test_a_faiss_that_is_none(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str | None,
    said: str,
) -> None:
    (tmp_path / "path" / "faiss").mkdir(parents=True)
    (tmp_path / "path" / "faiss" / "__init__.py").write_text(module or "")
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    if module is None:
        monkeypatch.setitem(sys.modules, "faiss", types.ModuleType("faiss"))
    monkeypatch.setattr("saap_index.hf.models.load_model", lambda *args: pytest.fail("no model is loaded without FAISS"))
    assert command(checkpoint, tmp_path / "out") == 1
    assert said in (err := capsys.readouterr().err) and "faiss-cpu" in err and not (tmp_path / "out").exists()


def test_another_faiss_keeps_what_was_captured(
    whole: Path, loaded: LoadedModel, sequences: list[texts.TokenSequence], tmp_path: Path, monkeypatch: Any
) -> None:
    """Captures are the model's; layers are trained anew, so that all are of one version."""
    import faiss

    def step(what: str, done: int, total: int) -> None:
        if (what, done) == ("layer", 1):
            raise Interruption

    with monkeypatch.context() as patch, pytest.raises(Interruption):
        patch.setattr(faiss, "__version__", "0.1")
        train_model(loaded, sequences, SETTINGS, tmp_path / "out", step=step)
    passes, trained = [], []
    monkeypatch.setattr(capture, "run", lambda *args, run=capture.run: (passes.append(len(args[1])), run(*args)))
    monkeypatch.setattr(train, "train_one", lambda *args, one=train.train_one: (trained.append(args[1]), one(*args))[1])
    train_model(loaded, sequences, SETTINGS, tmp_path / "out", resume=True)
    assert passes == [2] and trained == [0, 1]
    assert content(tmp_path / "out") == content(whole)
    monkeypatch.setattr(faiss, "__version__", "0.2")
    train_model(loaded, sequences, SETTINGS, tmp_path / "out", resume=True)
    assert trained == [0, 1], "what is finished is read"


def test_captures_without_a_job_are_not_taken_over(
    whole: Path, loaded: LoadedModel, sequences: list[texts.TokenSequence], tmp_path: Path
) -> None:
    """As a killed clean-up leaves them."""

    def step(what: str, done: int, total: int) -> None:
        if (what, done) == ("layer", 1):
            raise Interruption

    others = [(name, tokens[::-1]) for name, tokens in sequences]
    with pytest.raises(Interruption):
        train_model(loaded, others, SETTINGS, tmp_path, step=step)
    (tmp_path / train.UNFINISHED / "job.json").unlink()
    train_model(loaded, sequences, SETTINGS, tmp_path)
    assert content(tmp_path) == content(whole)


def test_every_refusal_to_go_on_says_how_to_begin_anew(
    loaded: LoadedModel, sequences: list[texts.TokenSequence], tmp_path: Path
) -> None:
    def step(what: str, done: int, total: int) -> None:
        if what == "layer":
            raise Interruption

    with pytest.raises(Interruption):
        train_model(loaded, sequences, SETTINGS, tmp_path, step=step)
    work = tmp_path / train.UNFINISHED
    anew = rf"to begin anew delete {work} or name another --out"
    with pytest.raises(StateError, match=f"--resume continues it, and {anew}"):
        train_model(loaded, sequences, SETTINGS, tmp_path)
    with pytest.raises(CompatibilityError, match=f"go on with that, and {anew}"):
        train_model(loaded, sequences, replace(SETTINGS, seed=3), tmp_path, resume=True)
    for name, match in (("captures/captured.json", anew), ("job.json", anew), ("layer_000.safetensors", "delete the file")):
        whole = (work / name).read_bytes()
        for damaged in (b"[[", b"\xff", whole[: len(whole) // 2], b'{"0": 1e999}', b'{"99": {}}'):
            (work / name).write_bytes(damaged)
            with pytest.raises((FormatError, CompatibilityError), match=match):
                train_model(loaded, sequences, SETTINGS, tmp_path, resume=True)
        (work / name).write_bytes(whole)
    renamed = [(f"{name} and a name that goes on and on" * 9, tokens) for name, tokens in sequences]
    with pytest.raises(CompatibilityError, match=anew) as refused:
        train_model(loaded, renamed, SETTINGS, tmp_path, resume=True)
    assert len(str(refused.value)) < 600
    for name in ("layer_000.keys", "layer_001.queries", "layer_001.values"):
        whole = (work / "captures" / name).read_bytes()
        (work / "captures" / name).write_bytes(whole[:-2])
        with pytest.raises(FormatError, match=rf"{name}: expected {len(whole)} bytes .*, got {len(whole) - 2}; and {anew}"):
            train_model(loaded, sequences, SETTINGS, tmp_path, resume=True)
        (work / "captures" / name).unlink()
        with pytest.raises(FormatError, match=rf"{name}: expected .*, got 0; and {anew}"):
            train_model(loaded, sequences, SETTINGS, tmp_path, resume=True)
        (work / "captures" / name).write_bytes(whole)
    train_model(loaded, sequences, SETTINGS, tmp_path, resume=True)
    with pytest.raises(StateError, match=f"to train anew delete {tmp_path}"):
        train_model(loaded, sequences, SETTINGS, tmp_path)
    (tmp_path / FILES[1]).write_bytes(b"x")
    with pytest.raises(FormatError, match=f"to begin anew delete {tmp_path}"):
        train_model(loaded, sequences, SETTINGS, tmp_path, resume=True)
    (tmp_path / FILES[1]).unlink()
    with pytest.raises(FormatError, match=f"to begin anew delete {tmp_path}"):
        train_model(loaded, sequences, SETTINGS, tmp_path, resume=True)


def test_room_on_the_disk_is_looked_at_before_the_capture(
    loaded: LoadedModel, sequences: list[texts.TokenSequence], tmp_path: Path, monkeypatch: Any
) -> None:
    """2 layers of 5 sequences: 2 heads of 512 keys and 4 of 48 queries, and values of two sequences, 16 dims of 2 bytes."""
    need = 2 * 16 * 2 * (5 * (2 * 512 + 4 * 48) + 2 * 2 * 512)
    usage = type(train.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: usage(10**12, 0, need))
    monkeypatch.setattr(CaptureStore, "write", lambda *args: pytest.fail("nothing is written"))
    for _ in range(2):  # nothing of the first stands in the way of the second
        with pytest.raises(OSError, match=r"expected room for 0\.6 MB .* got 0\.5 MB free; train on fewer --tokens or --layers"):
            train_model(loaded, sequences, SETTINGS, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: usage(10**12, 0, int(1.1 * need)))
    train_model(loaded, sequences, SETTINGS, tmp_path)


# -- routers and partitions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("router", "partition"), [
    ("kmeans", "per-prompt"), ("kmeans", "pre-rope"), ("linear", "pre-rope"), ("mlp", "post-rope"), ("mlp-distance", "pre-rope"),
    ("two-tower", "post-rope"), ("two-tower", "pre-rope"),
])
def test_every_router_and_partition(
    router: str, partition: str, loaded: LoadedModel, sequences: list[texts.TokenSequence], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, router=router, partition=partition, layers=(1,))
    routers = train_model(loaded, sequences, settings, tmp_path)
    layer = routers.layers[1]
    assert (layer.rope is None) == (partition == "post-rope") and (layer.tower is not None) == (partition == "per-prompt")
    assert (layer.calibration is not None) == (router in ("linear", "mlp-distance", "two-tower"))
    again = load_routers(tmp_path)
    for name, want in layer.query_router.tensors().items():
        torch.testing.assert_close(again.layers[1].query_router.tensors()[name], want)
    again.check(loaded.model.config)
    index = again.index(1, break_even=64)
    keys = torch.randn((1, 2, 300, 16), generator=torch.Generator().manual_seed(0))
    index.add(keys, keys)
    assert index.search_attend(keys[:, :, :1].repeat(1, 2, 1, 1)).shape == (1, 4, 1, 16)


@pytest.mark.parametrize("partition", ["per-prompt", "pre-rope", "post-rope"])
def test_measured_is_what_an_index_reads(
    partition: str, loaded: LoadedModel, sequences: list[texts.TokenSequence], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, partition=partition, layers=(1,))
    routers = train_model(loaded, sequences, settings, tmp_path)
    layer, number = routers.layers[1], settings.held_out_numbers[0]
    positions = train.query_positions(settings, number)[::12]
    found = capture.capture(loaded.model, sequences[number][1], [1], torch.from_numpy(positions)).layers[1]
    keys, values, queries = found.keys[0], found.values[0], found.queries[0].view(2, 2, -1, 16)
    first, n = int(positions.min()), keys.shape[1]
    index: AsymmetricIndex = routers.index(1, break_even=settings.layout.break_even, budget_shares=None)
    index.add(keys[None, :, :first], values[None, :, :first])
    quantizer, router = index.key_quantizer, index.query_router
    coarse = keys if layer.rope is None else layer.rope.unrotate(keys, range(n))
    routed = queries if layer.rope is None else layer.rope.unrotate(queries, positions)
    assert quantizer is not None and router is not None
    parts = quantizer.assign(coarse), router, settings.layout, layer.scale
    done = first
    for j, position in enumerate(positions.tolist()):
        one = measure(keys, values, queries[:, :, j : j + 1], routed[:, :, j : j + 1], positions[j : j + 1], *parts)
        index.add(keys[None, :, done : position + 1], values[None, :, done : position + 1])
        done = position + 1
        sealed, window = index.invlists.sealed(0), done - settings.window
        p = torch.softmax(torch.einsum("hgd,hnd->hgn", queries[:, :, j], keys[:, :done]) * layer.scale, -1).sum(1)
        for at, share in enumerate(SHARES):
            budget = round(share * (window - settings.sinks)) - (window - sealed)
            if budget < 1:
                continue
            params = SearchParametersIVF(selectivity=1.0, max_codes=budget, sampled_share=0.0)  # the best runs alone
            selection = index.select(found.queries[:, :, j : j + 1], params=params)
            read = index.read_ids(selection)[0]
            captured = [float(p[h][ids[(ids >= settings.sinks) & (ids < window)]].sum()) for h, ids in enumerate(read)]
            np.testing.assert_allclose(one.captured[:, at], captured, atol=2e-5)


# -- checks of files and models -----------------------------------------------------------------------------------------------


def test_another_model_is_refused_by_name(whole: Path) -> None:
    routers = load_routers(whole)
    for name, changes in {
        "num_key_value_heads": {"num_key_value_heads": 4}, "num_hidden_layers": {"num_hidden_layers": 3},
        "head_dim": {"head_dim": 32}, "vocab_size": {"vocab_size": 99},
    }.items():
        with pytest.raises(CompatibilityError, match=name):
            routers.check(tiny("llama", **{"num_hidden_layers": 2, **changes}).config)
    with pytest.raises(CompatibilityError, match="model_type"):
        routers.check(tiny("qwen3", num_hidden_layers=2).config)
    other = tiny("llama", num_hidden_layers=2, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    with pytest.raises(CompatibilityError, match=r"layer 0.*theta"):
        routers.check(other.config)


def test_lists_of_each_prompt_may_be_as_many_as_one_likes(whole: Path) -> None:
    routers = load_routers(whole)
    trained = routers.layers[0]
    assert trained.tower is not None
    index = routers.index(0, nlist=5, break_even=64, seal_tokens=16)
    assert (index.nlist, index.key_quantizer.nlist, index.query_router.nlist) == (5, 5, 5)
    keys = torch.randn((1, index.num_kv_heads, 200, index.d), generator=torch.Generator().manual_seed(0))
    index.add(keys, keys)
    assert index.key_quantizer.centroids.abs().sum() > 0 and index.invlists.nlist == 5
    assert routers.index(0).nlist == trained.key_quantizer.nlist != 5
    fixed = replace(trained, tower=None)
    with pytest.raises(ParameterError, match="nlist"):
        fixed.with_lists(5)
    with pytest.raises(ParameterError, match="nlist"):
        routers.index(0, nlist=0)


def test_damaged_files_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError):
        load_routers(tmp_path)
    config, arrays = json.loads((whole / FILES[0]).read_text()), load_file(whole / FILES[1])

    def attempt(changed: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        (tmp_path / FILES[0]).write_text(json.dumps(changed))
        save_file(tensors, tmp_path / FILES[1])
        with pytest.raises(FormatError):
            load_routers(tmp_path)

    attempt({**config, "version": 99}, arrays)
    attempt({"format": "something"}, arrays)
    attempt(config, {name: x for name, x in arrays.items() if name != "layers.1.router.skip"})
    attempt(config, {**arrays, "layers.0.router.out": arrays["layers.0.router.out"][:, :-1].contiguous()})
    attempt(config, {**arrays, "layers.0.router.out": torch.full_like(arrays["layers.0.router.out"], torch.nan)})
    attempt(config, {**arrays, "layers.0.router.out": arrays["layers.0.router.out"].long()})
    attempt(config, {**arrays, "layers.0.centroids": torch.zeros(2, 0)})
    attempt({**config, "layers": {**config["layers"], "0": {}}}, arrays)
    (tmp_path / FILES[0]).write_text("{")
    with pytest.raises(FormatError):
        load_routers(tmp_path)
    (tmp_path / FILES[0]).write_text(json.dumps(config))
    (tmp_path / FILES[1]).write_bytes(b"abc")
    with pytest.raises(FormatError):
        load_routers(tmp_path)


@pytest.mark.parametrize(("changes", "name"), [
    ({"router": "best"}, "router"), ({"partition": "none"}, "partition"), ({"router": "mlp"}, "partition"),
    ({"nlist": 0}, "nlist"), ({"context": 40}, "context"), ({"tokens": 100}, "tokens"), ({"held_out": 0}, "held_out"),
    ({"queries": 0}, "queries"), ({"seed": -1}, "seed"), ({"nlist": SETTINGS.tokens + 1}, "nlist.*tokens to train on"),
])
def test_settings_out_of_range(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ParameterError, match=name):
        replace(SETTINGS, **changes)


def test_wrong_sequences_and_layers(loaded: LoadedModel, sequences: list[texts.TokenSequence], tmp_path: Path) -> None:
    with pytest.raises(LengthError, match="sequences"):
        train_model(loaded, sequences[:-1], SETTINGS, tmp_path)
    with pytest.raises(ParameterError, match="layers"):
        train_model(loaded, sequences, replace(SETTINGS, layers=(2,)), tmp_path)
    mixed = replace(loaded, model=tiny("gemma3"))
    with pytest.raises(ParameterError, match=r"layers.*\[1, 3\]"):
        train_model(mixed, sequences, replace(SETTINGS, layers=(0,)), tmp_path)


def test_a_model_with_infinite_keys_is_refused(sequences: list[texts.TokenSequence], tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1e9)
    with pytest.raises(NotFiniteError, match="layer 1, keys"):
        train_model(LoadedModel(model, None, "broken", "0"), sequences, SETTINGS, tmp_path)


# -- texts ------------------------------------------------------------------------------------------------------------------


def test_texts_of_files_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("two")
    (folder / "deep" / "a.md").write_bytes(b"caf\xc3\xa9 \xff")
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (folder / ".hidden").write_text("no")
    (folder / "empty").write_text(" \n")
    (tmp_path / "book.txt").write_text("one")
    found = list(texts.read_texts([folder, tmp_path / "book.txt"]))
    assert found == [("0.docs:b.txt", "two"), ("0.docs:deep/a.md", "caf\u00e9 \ufffd"), ("1.book:book.txt", "one")]
    for bad in (tmp_path / "absent", folder / "empty"):
        with pytest.raises(ParameterError, match="text"):
            list(texts.read_texts([bad]))


def test_a_data_set_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="datasets"):
        list(texts.read_texts([tmp_path]))

    class Rows(list):
        column_names = ("id", "text")

    fake: Any = ModuleType("datasets")
    fake.DatasetDict, fake.load_from_disk = (
        type("DatasetDict", (dict,), {}),
        lambda path: Rows([{"text": "one"}, {"text": "two"}]),
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert [text for _, text in texts.read_texts([tmp_path])] == ["one", "two"]
    Rows.column_names = ("id",)
    with pytest.raises(ParameterError, match="column"):
        list(texts.read_texts([tmp_path]))


# -- the command ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    tiny("llama", num_hidden_layers=2).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w2").save_pretrained(folder)
    rng = np.random.default_rng(1)
    for name in ("a", "b"):
        (folder.parent / f"{name}.txt").write_text(" ".join(f"w{i}" for i in rng.integers(3, VOCABULARY, 1600)))
    return folder


def command(checkpoint: Path, out: Path, *more: str) -> int:
    sources = [str(checkpoint.parent / f"{name}.txt") for name in ("a", "b")]
    small = ["--tokens", "1024", "--context", "512", "--held-out", "1", "--nlist", "8", "--queries", "16", "--threads", "2"]
    return cli.main(["train", "--model", str(checkpoint), "--text", *sources, "--out", str(out), *small, *more])


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(checkpoint, tmp_path / "out", "--layers", "1") == 0
    out, err = capsys.readouterr()
    assert "two-tower routers, per-prompt lists" in out and "captured %" in out and "passes" in err and "layers" in err
    routers = load_routers(tmp_path / "out")
    assert list(routers.layers) == [1] and routers.config["model"]["name"] == "tiny-llama"
    assert command(checkpoint, tmp_path / "out", "--layers", "1") == 1
    assert "saap train: error: out: expected a folder without routers" in capsys.readouterr().err
    assert command(checkpoint, tmp_path / "out", "--layers", "1", "--resume") == 0


def test_quick(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(checkpoint.parent / "a.txt")
    some = ["train", "--model", str(checkpoint), "--quick", text, "--nlist", "8", "--threads", "2", "--dtype", "float32"]
    done = cli.main([*some, "--context", "512", "--out", str(tmp_path / "out")])
    assert done == 0 and "reading 3 sequences of 512 tokens" in capsys.readouterr().err
    routers = load_routers(tmp_path / "out")
    assert sorted(routers.layers) == [0, 1] and routers.config["prompts"] == {"0": 3, "1": 3}
    shared = [layer.shared() for layer in routers.layers.values()]  # an engine can serve them as they are
    assert [None if parts is None else parts[0].nlist for parts in shared] == [8, 8]
    model = load_model(checkpoint, dtype="float32").model
    ids = torch.randint(3, VOCABULARY, (1, 600), generator=torch.Generator().manual_seed(2))
    dense = greedy(model, ids, 4)
    assert torch.equal(greedy(attach(model, routers, 1.0, break_even=256), ids, 4), dense)
    assert cli.main([*some, "--context", "512", "--out", str(tmp_path / "out")]) == 1
    assert "out: expected a folder without routers" in capsys.readouterr().err
    assert cli.main([*some, "--context", "1500", "--out", str(tmp_path / "one")]) == 0
    assert load_routers(tmp_path / "one").config["prompts"] == {"0": 1, "1": 1}
    with pytest.raises(SystemExit):
        cli.main([*some, "--text", text])


@pytest.mark.parametrize(("more", "message"), [
    (["--layers", "x"], "layers: expected numbers"), (["--layers", "7"], "layers: expected some of"),
    (["--tokens", "100000"], "enough text for"), (["--tokens", "90000", "--context", "16385"], "context: expected at most 16384"),
    (["--router", "mlp", "--partition", "per-prompt"], "partition: expected"),
    *((["--device", device, "--model", "absent"], "device: expected")
      for device in ("nonsense", "mps", "xpu", "cuda:99")),
    (["--text", "absent.txt"], "text: expected a file"),
])
def test_errors_of_the_command(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert command(checkpoint, tmp_path / "out", *more) == 1
    err = capsys.readouterr().err
    if message == "enough text for":
        assert "give more text, or ask for less with --tokens, --held-out or --context" in err
    assert f"saap train: error: {message}" in err.replace("texts: expected 196 sequences of 512 tokens, got ", "")
    assert "Traceback" not in err


def test_ctrl_c_is_no_traceback(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CaptureStore, "finish", interrupt)
    assert command(checkpoint, tmp_path / "out") == 130
    assert "interrupted" in capsys.readouterr().err


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["absent"], ["train"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0 and "--resume" in capsys.readouterr().out


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="neither folder nor GGUF"):
        load_model(tmp_path / "absent")
    with pytest.raises(ParameterError, match="0 GGUF files"):
        load_model(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ParameterError, match="2 GGUF files"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="checkpoint"):
        load_model(tmp_path)
    with pytest.raises(ParameterError, match="dtype"):
        load_model(tmp_path, dtype="int8")


def test_two_trainings_in_one_folder(loaded: LoadedModel, sequences: list[texts.TokenSequence], tmp_path: Path) -> None:
    """The second is refused while the first is at work, and goes on with what the first left when it died."""
    out, tried = tmp_path / "routers", []

    def step(*_: object) -> None:
        if not tried:
            with pytest.raises(StateError, match="no other training is at work") as error:
                train_model(loaded, sequences, SETTINGS, out, resume=True)
            tried.append(str(error.value))
            raise Interruption

    with pytest.raises(Interruption):
        train_model(loaded, sequences, SETTINGS, out, step=step)
    assert str(out) in tried[0]
    train_model(loaded, sequences, SETTINGS, out, resume=True)
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)


def test_angles_are_those_of_a_text_whatever_was_read_before(loaded: LoadedModel) -> None:
    """Dynamic NTK keeps the frequencies of the longest text of a model; a capture neither meets nor leaves them."""
    model = tiny("llama_dynamic")
    positions = torch.arange(0, 100, 7)
    ids = torch.arange(3, 203)

    def keys(n: int) -> torch.Tensor:
        return capture.capture(model, ids[:n].tolist(), [0, 1], positions).layers[1].keys

    with torch.no_grad():
        want = keys(100)
        longer = keys(200)[:, :, :100]
        assert torch.equal(keys(100), want) and not torch.allclose(longer, want, atol=1e-2), "a longer capture came before"
        model(ids[None])
        dense = model(ids[None, :100]).logits
        assert torch.equal(keys(100), want), "the model has read a longer text"
        assert torch.equal(model(ids[None, :100]).logits, dense), "it is left as it was"
        one = torch.full((100,), 9)
        rope = Rope.from_config(model.config)
        assert rope is not None
        same = capture.capture(model, one.tolist(), [0], positions).layers[0].keys
        bare = rope.unrotate(same, torch.arange(100), 100)
        assert torch.allclose(bare, bare[:, :, :1].expand_as(bare), atol=1e-3)
