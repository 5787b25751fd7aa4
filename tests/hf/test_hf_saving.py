"""A saved prompt: asked later, it answers as the cache itself would have; files that do not fit are refused."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damaged_bytes, damaged_json, damaged_tensors
from hf_models import CACHE, SMALL, attached, greedy, left_padded, make_routers, prompt, sealed_tokens, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import saap_index as saap
from saap_index.hf import support

CASES = {
    "one": ("llama", [0], {}),
    "lengths differ": ("llama", [0, 35, 70], {}),
    "padding is still there": ("qwen3", [0, 35, 70], {"break_even": 400}),
    "windows": ("gemma3", [0, 35], {}),
    "angles depend on the length": ("llama_dynamic", [0], {}),
    "lists of its own": ("llama", [0, 30], {"own_lists": True}),
    "codes": ("llama", [0, 35, 70], {"storage": "SQ8/SQ4"}),
    "means": ("llama", [0], {"mean_run_tokens": 2, "tail": 0.3, "selectivity": 0.4}),
}


def read(model: Any, padding: list[int], length: int = 120, **given: Any) -> tuple[saap.SaapCache, dict[str, torch.Tensor]]:
    """A cache that holds a document, and the document."""
    inputs = left_padded(prompt(len(padding), length), padding)
    cache = saap.SaapCache(model)
    with torch.no_grad():
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        model(**inputs, position_ids=positions, **{CACHE: cache})
    return cache, inputs


def ask(model: Any, cache: Any, inputs: dict[str, torch.Tensor], **given: Any) -> torch.Tensor:
    """Answer to a question behind the document."""
    question = prompt(len(inputs["input_ids"]), 9, seed=5)
    ids = torch.cat([inputs["input_ids"], question], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(question)], 1)
    return greedy(model, {"input_ids": ids, "attention_mask": mask}, 20, **{CACHE: cache}, **given)


@pytest.mark.parametrize("name", CASES)
def test_asked_later(tmp_path: Path, name: str) -> None:
    case, padding, options = CASES[name]
    made = tiny(case)
    options = {"selectivity": 0.3, **options}
    cache, inputs = read(attached(made, **options), padding)
    cache.save(tmp_path / "prompt", tokens=inputs["input_ids"])
    want = ask(made, cache, inputs)
    for verify in (False, True):
        later = attached(tiny(case), **options)
        loaded = saap.SaapCache.load(tmp_path / "prompt", later, verify=verify)
        assert torch.equal(loaded.tokens, inputs["input_ids"]) and loaded.get_seq_length() == 120
        assert torch.equal(ask(later, loaded, inputs), want)
        assert sealed_tokens(loaded) == sealed_tokens(cache)
        # windows forget, that model remembers the longest text, and what was sealed meanwhile stays a code
        if case not in ("gemma3", "llama_dynamic") and "storage" not in options:
            loaded.crop(120 - loaded.get_seq_length())
            assert torch.equal(ask(later, loaded, inputs), want), "the document is there again"


def test_the_files_are_mapped_and_stay_as_they_are(tmp_path: Path) -> None:
    model = attached(tiny("llama"), 0.2)
    cache, inputs = read(model, [0])
    cache.save(tmp_path / "prompt")
    before = {path.name: path.read_bytes() for path in (tmp_path / "prompt").iterdir()}
    loaded = saap.SaapCache.load(tmp_path / "prompt", model)
    lists = loaded.layers[1].index.invlists
    address = lists.keys.data_ptr()
    if Path("/proc/self/maps").exists():
        for line in Path("/proc/self/maps").read_text().splitlines():
            low, high = (int(x, 16) for x in line.split()[0].split("-"))
            if low <= address < high:
                assert line.endswith("layer_001.safetensors")
    ask(model, loaded, inputs)
    assert lists.keys.data_ptr() == address, "there is room behind a prompt"
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "prompt").iterdir()}


def test_more_than_the_room(tmp_path: Path) -> None:
    model = attached(tiny("llama", num_hidden_layers=1))
    cache, inputs = read(model, [0])
    cache.save(tmp_path / "prompt")
    loaded = saap.SaapCache.load(tmp_path / "prompt", model, max_tokens=3000)
    more = prompt(1, 2000, seed=1)
    with torch.no_grad():
        want = model(torch.cat([inputs["input_ids"], more], 1)).logits[:, -1]
        got = model(more, **{CACHE: loaded}).logits[:, -1]
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)


def test_an_empty_cache(tmp_path: Path) -> None:
    model = attached(tiny("gemma3"))
    saap.SaapCache(model).save(tmp_path / "prompt")
    loaded = saap.SaapCache.load(tmp_path / "prompt", model)
    assert loaded.get_seq_length() == 0 and greedy(model, prompt(), **{CACHE: loaded}).shape == (1, 24)


def test_in_place_of_an_older_one(tmp_path: Path) -> None:
    model = attached(tiny("llama"))
    for length in (70, 90):
        read(model, [0], length)[0].save(tmp_path / "prompt")
        assert saap.SaapCache.load(tmp_path / "prompt", model).get_seq_length() == length
    assert [path.name for path in tmp_path.iterdir()] == ["prompt"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="other"):
        read(model, [0])[0].save(other)
    assert (other / "thesis.tex").read_text() == "years of work"
    assert {path.name for path in tmp_path.iterdir()} == {"prompt", "other"}


def test_an_interrupted_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached(tiny("llama"))
    read(model, [0], 70)[0].save(tmp_path / "prompt")

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        read(model, [0], 90)[0].save(tmp_path / "prompt")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["prompt"]
    assert saap.SaapCache.load(tmp_path / "prompt", model).get_seq_length() == 70


def test_other_models_and_routers_are_refused(tmp_path: Path) -> None:
    kept = attached(tiny("llama"))
    cache, _ = read(kept, [0])
    cache.save(tmp_path / "prompt")
    del kept
    gc.collect()
    with pytest.raises(saap.StateError, match="one that is gone"):
        cache.save(tmp_path / "prompt")
    with pytest.raises(saap.StateError, match="attach first"):
        saap.SaapCache.load(tmp_path / "prompt", tiny("llama"))
    for model, match in (
        (attached(tiny("llama", seed=5)), "model: .* weights"),
        (attached(tiny("qwen3")), "model: .* model_type 'llama', got 'qwen3'"),
        (attached(tiny("llama", num_hidden_layers=2)), "model: .* layers 3, got 2"),
        (saap.attach(tiny("llama"), make_routers(tiny("llama"), nlist=4), **SMALL), "routers: "),
        (attached(tiny("llama"), dense_layers=[1]), "routers: .* 1 '.*', got None"),
        (attached(tiny("llama"), own_lists=True), "routers: "),
        (attached(tiny("llama"), window=16), "layer 0: .* window 8, got 16"),
        (attached(tiny("llama").to(torch.bfloat16)), "weights|dtype"),
    ):
        with pytest.raises(saap.CompatibilityError, match=match):
            saap.SaapCache.load(tmp_path / "prompt", model)


def test_the_weights_of_now(tmp_path: Path) -> None:
    """Weights that change under attached routers: a prompt read with those of before is refused, one with the new ones fits."""
    model, other = attached(tiny("llama")), tiny("llama", seed=7)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    cache, inputs = read(model, [0])
    cache.save(tmp_path / "before")
    want = ask(model, cache, inputs)

    def replaced() -> None:
        model.load_state_dict(other.state_dict())

    def merged() -> None:
        """As an adapter of low rank is merged: without a word to torch."""
        weight = model.model.layers[1].self_attn.v_proj.weight
        weight.data += 0.01 * torch.randn(len(weight), 1) @ torch.randn(1, weight.shape[1])

    for change in (replaced, merged):
        change()
        with pytest.raises(saap.CompatibilityError, match=r"model: .* weights"):
            saap.SaapCache.load(tmp_path / "before", model)
        read(model, [0])[0].save(tmp_path / "after")
        saap.SaapCache.load(tmp_path / "after", model)
        model.load_state_dict(before)
        with pytest.raises(saap.CompatibilityError, match=r"model: .* weights"):
            saap.SaapCache.load(tmp_path / "after", model)
    assert torch.equal(ask(model, saap.SaapCache.load(tmp_path / "before", model), inputs), want)


def test_routers_of_one_shape_are_told_apart(tmp_path: Path) -> None:
    """Those whose lists are made for each prompt have zeros for lists; what differs is the network, or what it undoes."""
    model = tiny("llama")
    routers = make_routers(model, own_lists=True)
    first = routers.layers[0]
    unmade = replace(first, key_quantizer=saap.KeyQuantizer(torch.zeros_like(first.key_quantizer.centroids)))
    assert first.tower is not None
    other = saap.TwoTower(first.tower.weights.map(lambda x: x * 1.01), first.tower.first_knot)

    def attach(layer: saap.LayerRouters) -> Any:
        return saap.attach(model, saap.Routers(routers.config, dict.fromkeys(range(3), layer)), 0.3, **SMALL)

    read(attach(unmade), [0])[0].save(tmp_path / "prompt")
    for layer in (replace(unmade, tower=other), replace(unmade, rope=None)):
        saap.detach(model)
        with pytest.raises(saap.CompatibilityError, match="routers: "):
            saap.SaapCache.load(tmp_path / "prompt", attach(layer))
    saap.detach(model)
    saap.SaapCache.load(tmp_path / "prompt", attach(unmade))


class Packed(torch.Tensor):
    """A weight in two parts that can do nothing but be taken apart, like a quantised one of torchao."""

    codes: torch.Tensor
    scales: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scales: torch.Tensor) -> Packed:
        self = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        self.codes, self.scales = codes, scales
        return self

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scales)
        raise NotImplementedError(str(function))


def test_quantised_weights_have_a_checksum() -> None:
    def checksum(codes: torch.Tensor, scales: torch.Tensor) -> str:
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(Packed(codes, scales), requires_grad=False)
        module.bits = torch.nn.Parameter(codes, requires_grad=False)
        return support.fingerprint(module)

    codes, scales = torch.arange(12, dtype=torch.int8).view(3, 4), torch.ones(3)
    found = checksum(codes, scales)
    assert found == checksum(codes.clone(), scales.clone())
    assert len({found, checksum(codes + 1, scales), checksum(codes, scales * 2)}) == 3


def test_a_row_or_a_column_that_changes_is_another_model() -> None:
    """Tokens that are trained anew, heads that are cut out, biases, experts, and packed weights, which are buffers."""
    model = tiny("llama")
    model.model.layers[2].register_buffer("packed", torch.zeros((6, 9), dtype=torch.int32))
    model.model.layers[2].register_buffer("experts", torch.zeros(3, 4, 5))
    model.model.layers[2].register_buffer("angles", torch.zeros(4), persistent=False)
    found = support.fingerprint(model.model)
    unseen = []
    tensors = [*model.model.named_parameters(), *model.model.layers[2].named_buffers(recurse=False)]
    for name, x in tensors:
        lines = [x[-1:]] if x.ndim == 1 else [x[len(x) // 2], x[-1], x[..., x.shape[-1] // 2], x[..., -1]]
        for line in lines:
            before = line.clone()
            line.data += 1
            if support.fingerprint(model.model) == found:
                unseen.append(name)
            line.data.copy_(before)
    assert set(unseen) == {"angles"}, "what is made from the configuration belongs to no checkpoint, the rest does"


def test_damage_is_refused(tmp_path: Path) -> None:
    model = attached(tiny("llama"))
    folder = tmp_path / "prompt"
    read(model, [0, 30])[0].save(folder)
    about = json.loads((folder / "cache.json").read_text())
    layer = folder / "layer_001.safetensors"
    whole = layer.read_bytes()

    def refuses(match: str, **given: Any) -> None:
        with pytest.raises(saap.FormatError, match=match):
            saap.SaapCache.load(folder, model, **given)

    layer.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    refuses("damaged", verify=True)
    layer.write_bytes(whole[: len(whole) // 2])
    refuses("SafetensorError")
    layer.write_bytes(whole)
    tensors = load_file(layer)
    for name, other in (
        ("keys", tensors["keys"][:, :, :50].clone()), ("keys", tensors["keys"].double()), ("ids", tensors["ids"].long()),
        ("tables", tensors["tables"][:, :, :1].clone()), ("gaps", torch.zeros((3, 2), dtype=torch.int64)),
    ):
        save_file({**tensors, name: other}, layer)
        refuses("layer 1: expected|dtype: expected")
    save_file({name: x for name, x in tensors.items() if name != "values"}, layer)
    refuses("values")
    layer.write_bytes(whole)
    for change in (
        {"version": 3}, {"version": 5}, {"format": "other"}, {"layers": about["layers"][:2]}, {"layers": None},
        {"layers": [{**about["layers"][0], "lengths": [10**6, 5]}, *about["layers"][1:]]},
        {"layers": [{**about["layers"][0], "lengths": [-1, 5]}, *about["layers"][1:]]},
    ):
        (folder / "cache.json").write_text(json.dumps({**about, **change}))
        refuses(".")
    (folder / "cache.json").write_text("{")
    refuses(".")
    (folder / "cache.json").unlink()
    with pytest.raises(FileNotFoundError):
        saap.SaapCache.load(folder, model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model with layers of every kind, and a prompt that it saved: two lengths, padding taken out, tokens beside it."""
    model = attached(tiny("gemma3"), 0.3)
    cache, inputs = read(model, [0, 35])
    folder = tmp_path_factory.mktemp("saved") / "prompt"
    cache.save(folder, tokens=inputs["input_ids"])
    return model, folder


def loads_or_refuses(model: Any, folder: Path) -> None:
    """FormatError or CompatibilityError, or a cache that answers, is cropped and copied: no other error."""
    try:
        cache = saap.SaapCache.load(folder, model)
    except (saap.FormatError, saap.CompatibilityError, FileNotFoundError) as error:
        assert str(error)
        return
    index, slots = cache.layers[1].index, cache.get_seq_length()
    b = 2 if index is None else len(index.lengths)
    ids = prompt(b, 2, seed=5)
    mask = torch.ones((b, slots + 2), dtype=torch.int64)
    visible = cache.layers[1].visible
    if visible is not None:
        mask[:, :slots] = visible
    positions = (mask.cumsum(1) - 1)[:, -2:]
    for copied in (cache, copy.deepcopy(cache)):
        with torch.no_grad(), contextlib.suppress(saap.NotFiniteError):  # keys that are NaN now are not looked at before
            model(ids, attention_mask=mask, position_ids=positions, **{CACHE: copied})
        for layer in copied.indexed.values():
            layer.crop(-10)


fuzz = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@fuzz
@given(data=st.data())
def test_any_value_of_the_description(saved: tuple[Any, Path], tmp_path: Path, data: st.DataObject) -> None:
    model, good = saved
    folder = tmp_path / "prompt"
    shutil.copytree(good, folder, dirs_exist_ok=True)
    about = json.loads((good / "cache.json").read_text())
    (folder / "cache.json").write_bytes(data.draw(damaged_json(about)))
    loads_or_refuses(model, folder)


@fuzz
@given(data=st.data())
def test_any_array_or_bytes(saved: tuple[Any, Path], tmp_path: Path, data: st.DataObject) -> None:
    """Without `verify`, which would see a checksum that differs: nothing that is loaded is followed unseen."""
    model, good = saved
    folder = tmp_path / "prompt"
    shutil.copytree(good, folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["layer_000", "layer_001", "shared", "cache"]))
    if name == "cache":
        whole = (good / "cache.json").read_bytes()
        (folder / "cache.json").write_bytes(data.draw(damaged_bytes(whole, len(whole))))
    elif data.draw(st.booleans()):
        save_file(data.draw(damaged_tensors(load_file(good / f"{name}.safetensors"))), folder / f"{name}.safetensors")
    else:
        whole = (good / f"{name}.safetensors").read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        (folder / f"{name}.safetensors").write_bytes(data.draw(damaged_bytes(whole, header)))
    loads_or_refuses(model, folder)


def test_tables_are_checked_before_they_are_followed(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, good = saved
    for name, at, value in (("tables", (0, 0, 0, 1), 10**6), ("tables", (0, 0, 0, 1), -3), ("tables", (0, 0, 0, -1), 7)):
        folder = tmp_path / f"{at}{value}"
        shutil.copytree(good, folder)
        tensors = load_file(folder / "layer_001.safetensors")
        tensors[name][at] = value
        save_file(tensors, folder / "layer_001.safetensors")
        with pytest.raises(saap.FormatError, match="expected the offsets of segment"):
            saap.SaapCache.load(folder, model)


def test_tokens_to_be_saved_are_checked(saved: tuple[Any, Path], tmp_path: Path) -> None:
    cache = saap.SaapCache(saved[0])
    with pytest.raises(saap.ShapeError, match="tokens"):
        cache.save(tmp_path / "prompt", tokens=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(saap.DTypeError, match="tokens"):
        cache.save(tmp_path / "prompt", tokens=torch.zeros((1, 3), dtype=torch.float32))
    assert not list(tmp_path.iterdir())


def test_adapters_that_are_switched_belong_to_the_weights(tmp_path: Path) -> None:
    """What PEFT's layers say of themselves: which adapters are at work, whether any is, and how much it counts."""

    class Adapted(torch.nn.Linear):
        active_adapters, disable_adapters, scaling = ["one"], False, {"one": 2.0}

    model = tiny("llama")
    bare = support.fingerprint(model.model)
    layer = model.model.layers[1].self_attn.q_proj
    layer.__class__ = Adapted
    seen = [bare]
    for name, value in (("active_adapters", ["one"]), ("active_adapters", ["two"]), ("disable_adapters", True)):
        setattr(layer, name, value)
        seen.append(support.fingerprint(model.model))
    layer.disable_adapters, layer.active_adapters, layer.scaling = False, ["one"], {"one": 1.0}
    seen.append(support.fingerprint(model.model))
    assert len(set(seen)) == len(seen)
