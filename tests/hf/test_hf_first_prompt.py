"""`attach` without routers: the first long prompt trains some, decoding is sparse then, and they are kept for who comes next."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import CACHE, SMALL, greedy, left_padded, make_routers, prompt, sealed_tokens, tiny

import saap_index as saap
from saap_index.errors import NotFiniteError, ParameterError
from saap_index.hf import kept, learner
from saap_index.hf.cache import ATTACHED, plan_of
from saap_index.training.budget import plan_budget
from saap_index.training.prompt import PromptTraining

QUICK = PromptTraining(min_tokens=256, queries=64, nlist=8, epochs=2, progress=False)
LONG = 320


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "routers"


def learning(model: Any, selectivity: float = 1.0, train: Any = QUICK, **options: Any) -> Any:
    return saap.attach(model, selectivity=selectivity, train=train, **{**SMALL, **options})


def told(model: Any, inputs: Any, new: int = 6) -> tuple[torch.Tensor, Any]:
    """New tokens, and the cache they came with."""
    ids = inputs if isinstance(inputs, torch.Tensor) else inputs["input_ids"]
    given = inputs if isinstance(inputs, dict) else {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    out = model.generate(**given, max_new_tokens=new, do_sample=False, return_dict_in_generate=True)
    return out.sequences[:, ids.shape[1] :], out[CACHE]


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name != ".writing")


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma3", "llama_dynamic"])
def test_sparse_after_the_first_prompt(case: str, folder: Path) -> None:
    model, ids = tiny(case), prompt(length=LONG)
    dense = greedy(tiny(case), ids, 6)  # another, for angles may depend on what a model has read
    learning(model)
    tokens, cache = told(model, ids)
    assert torch.equal(tokens, dense)  # selectivity 1
    assert all(n > 200 for n in sealed_tokens(cache)) and cache.plan is plan_of(model)
    cache.set_search(saap.SearchParametersIVF(selectivity=0.1))
    with torch.no_grad():
        model(ids[:, :1], **{CACHE: cache})
    assert cache.tokens_read() < 0.3
    assert [path.name for path in files_of(folder)] == ["config.json", "model.safetensors"]


def test_in_codes() -> None:
    """Indexed keys in 8 bits: the prompt that trains is numbers until it is sealed, one that refines is codes."""
    model = tiny("llama")
    dense = [greedy(model, prompt(length=LONG, seed=seed), 1) for seed in (3, 4)]
    learning(model, storage="SQ8", train=replace(QUICK, nlist=8))
    for seed, want in zip((3, 4), dense, strict=True):
        tokens, cache = told(model, prompt(length=LONG, seed=seed), 4)
        assert torch.equal(tokens[:, :1], want) and min(sealed_tokens(cache)) > 200
    assert plan_of(model).learner.prompts == {0: 2, 1: 2, 2: 2}


def test_the_prompt_itself_is_dense() -> None:
    model, ids = tiny("llama"), prompt(length=LONG)
    with torch.no_grad():
        dense = model(ids).logits
        learning(model, 0.05)
        cache = saap.SaapCache(model)
        read = model(ids, **{CACHE: cache}).logits
    assert torch.equal(read, dense) and sealed_tokens(cache) == [0, 0, 0]
    with torch.no_grad():
        model(ids[:, :1], **{CACHE: cache})
    assert min(sealed_tokens(cache)) > 200


def test_short_prompts_teach_nothing(folder: Path) -> None:
    model = tiny("llama")
    dense = greedy(model, prompt(length=200), 6)
    learning(model, 0.05)
    tokens, cache = told(model, prompt(length=200))
    assert torch.equal(tokens, dense) and sealed_tokens(cache) == [0, 0, 0] and not folder.exists()


def test_a_chat_grows_long_enough(folder: Path) -> None:
    model = tiny("llama")
    learning(model)
    cache = saap.SaapCache(model)
    ids = prompt(length=400)
    for end in (120, 240, 400):
        ids_so_far = ids[:, :end]
        model.generate(ids_so_far, **{CACHE: cache}, max_new_tokens=1, do_sample=False)
    with torch.no_grad():
        model(ids[:, :1], **{CACHE: cache})
    assert min(sealed_tokens(cache)) > 250 and files_of(folder)


def test_chunks_and_padding() -> None:
    model, ids = tiny("llama"), prompt(2, LONG)
    inputs = left_padded(ids, [0, 40])
    dense = greedy(model, inputs, 6)
    learning(model)
    tokens, cache = told(model, inputs)
    assert torch.equal(tokens, dense) and all(layer.ragged for layer in cache.indexed.values())
    saap.detach(model)
    one = ids[:1]
    dense = greedy(model, one, 6)
    learning(model, train=replace(QUICK, prompts=9))
    tokens, cache = told(model, one)
    assert torch.equal(tokens, dense)
    cache = saap.SaapCache(model)
    with torch.no_grad():
        for part in one.split(100, 1):
            model(part, **{CACHE: cache})
    out = model.generate(torch.cat([one, dense[:, :1]], 1), **{CACHE: cache}, max_new_tokens=5, do_sample=False)
    assert torch.equal(out[:, LONG:], dense) and min(sealed_tokens(cache)) > 200


def test_beams() -> None:
    model, ids = tiny("llama"), prompt(length=LONG)
    dense = greedy(model, ids, 6, num_beams=2)
    learning(model)
    assert torch.equal(greedy(model, ids, 6, num_beams=2), dense)
    assert plan_of(model).learner.prompts == {0: 1, 1: 1, 2: 1}


def test_kept_loaded_and_refined(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, ids = tiny("llama"), prompt(length=LONG)
    learning(model)
    told(model, ids)
    assert "training routers of 3 layers" in caplog.text and str(folder) in caplog.text
    mine = plan_of(model).layers[1].trained
    other = tiny("llama")
    saap.attach(other, train="never", **SMALL)
    theirs = plan_of(other).layers[1].trained
    assert plan_of(other).learner is None
    assert all(torch.equal(x, theirs.tower.tensors()[name]) for name, x in mine.tower.tensors().items())
    caplog.clear()
    again = learning(tiny("llama"))
    assert plan_of(again).learner.prompts == {0: 1, 1: 1, 2: 1}
    for seed in range(3):
        _, cache = told(again, prompt(length=LONG, seed=10 + seed))
        assert min(sealed_tokens(cache)) > 200
    assert caplog.text.count("refining routers of 3 layers") == 2 and plan_of(again).learner.complete
    assert json.loads(next(folder.rglob("config.json")).read_text())["prompts"] == {"0": 3, "1": 3, "2": 3}
    last = learning(tiny("llama"))
    assert plan_of(last).learner is None  # nothing is left to learn


def test_the_budget_is_spread_over_layers_and_heads(folder: Path) -> None:
    """By what each loses on queries of the prompt that were held out; searched with at once, kept, and known of every layer."""
    model = learning(tiny("llama"), 0.2)
    _, cache = told(model, prompt(length=LONG))
    plan = plan_of(model)
    shares = np.stack([layer.trained.budget_shares for layer in plan.layers.values()])
    assert shares.mean() == pytest.approx(1) and 0.6 <= shares.min() < shares.max() <= 3
    for number, layer in cache.indexed.items():
        np.testing.assert_array_equal(layer.index.budget_shares, shares[number])
    kept_there = saap.load_routers(next(folder.rglob("config.json")).parent)
    losses = np.stack([kept_there.layers[number].losses for number in range(3)])
    want = plan_budget(losses, np.array(kept_there.config["budget"]["grid"]), 0.05)
    np.testing.assert_allclose(shares, want.shares, rtol=1e-6)
    np.testing.assert_array_equal(shares, np.stack([kept_there.layers[number].budget_shares for number in range(3)]))
    assert (losses[:, :, 0] >= losses[:, :, -1]).all() and np.allclose(losses[:, :, -1], 0) and (losses[:, :, 0] > 0).all()
    assert not any(module._forward_pre_hooks for module in model.model.layers)  # of the weights, while a prompt is read


def test_shares_of_a_user_stay() -> None:
    model = learning(tiny("llama"), 0.2, budget_shares=[0.5, 1.5])
    _, cache = told(model, prompt(length=LONG))
    for layer in cache.indexed.values():
        np.testing.assert_array_equal(layer.index.budget_shares, [0.5, 1.5])


def test_other_weights_have_routers_of_their_own() -> None:
    model = learning(tiny("llama"))
    told(model, prompt(length=LONG))
    with pytest.raises(ParameterError, match="routers: expected some, as train='never' makes none, got None"):
        saap.attach(tiny("llama", seed=1), train="never", **SMALL)


def test_same_prompt_same_routers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = []
    for name in ("one", "two"):
        monkeypatch.setenv("SAAP_CACHE", str(tmp_path / name))
        model = learning(tiny("llama"))
        torch.manual_seed(hash(name) % 1000)  # of no influence
        told(model, prompt(length=LONG))
        raw.append(next((tmp_path / name).rglob("model.safetensors")).read_bytes())
    assert raw[0] == raw[1]


def test_interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second layer: the first has routers, which are kept; the model answers as before, and so does the cache."""
    model, ids = tiny("llama"), prompt(length=LONG)
    dense = greedy(model, ids, 6)
    learning(model)
    fit, calls = learner.fit_prompt, []

    def interrupted(*args: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*args)

    monkeypatch.setattr(learner, "fit_prompt", interrupted)
    cache = saap.SaapCache(model)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, **{CACHE: cache}, max_new_tokens=6, do_sample=False)
    assert plan_of(model).learner.prompts == {0: 1}
    assert set(saap.load_routers(next(folder.rglob("config.json")).parent).layers) == {0}
    assert not list(folder.rglob("*.draft"))
    # the cache goes on where it was, and is not learnt from again
    out = model.generate(torch.cat([ids, dense[:, :1]], 1), **{CACHE: cache}, max_new_tokens=5, do_sample=False)
    assert torch.equal(out[:, LONG:], dense) and len(calls) == 2
    sealed = sealed_tokens(cache)
    assert sealed[0] > 200 and sealed[1:] == [0, 0]
    tokens, cache = told(model, ids)  # the next prompt goes on, those without routers first
    assert torch.equal(tokens, dense) and min(sealed_tokens(cache)) > 200
    assert plan_of(model).learner.prompts == {0: 2, 1: 1, 2: 1}


def test_out_of_time(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = learning(tiny("llama"), train=replace(QUICK, max_seconds=1e-9))
    _, cache = told(model, prompt(length=LONG))
    assert [n > 0 for n in sealed_tokens(cache)] == [True, False, False]
    assert "routers of 1 of 3 layers" in caplog.text
    _, cache = told(model, prompt(length=LONG))
    assert [n > 0 for n in sealed_tokens(cache)] == [True, True, False]


def test_out_of_memory(caplog: pytest.LogCaptureFixture) -> None:
    """Too little for a layer leaves it dense, and says how much it takes."""
    model = tiny("llama")
    dense = greedy(model, prompt(length=LONG), 6)
    learning(model, 0.05, train=replace(QUICK, max_bytes=1 << 20, nlist=4096))
    tokens, cache = told(model, prompt(length=LONG))
    assert torch.equal(tokens, dense) and sealed_tokens(cache) == [0, 0, 0] and "max_bytes: expected" in caplog.text


def test_heads_one_after_the_other_are_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), prompt(length=LONG)
    sizes: list[int] = []
    fit = learner.fit_prompt

    def seen(keys: torch.Tensor, queries: torch.Tensor, *rest: Any) -> Any:
        sizes.append(keys.shape[0])
        assert queries.shape[0] == 2 * keys.shape[0]
        return fit(keys, queries, *rest)

    monkeypatch.setattr(learner, "fit_prompt", seen)
    monkeypatch.setattr(learner, "fit_bytes", lambda heads, kv_heads, *rest: kv_heads * 200_000)
    learning(model, train=replace(QUICK, max_bytes=1 << 20, nlist=8))
    monkeypatch.setattr(learner, "fit_bytes", lambda heads, kv_heads, *rest: kv_heads << 19)
    _, cache = told(model, ids)
    assert sizes == [1] * 6 and min(sealed_tokens(cache)) > 200


def test_a_fit_that_fails_leaves_a_layer_dense(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*args: Any) -> Any:
        raise NotFiniteError("keys: expected finite numbers, got NaN")

    monkeypatch.setattr(learner, "fit_prompt", fails)
    model, ids = tiny("llama"), prompt(length=LONG)
    dense = greedy(model, ids, 6)
    learning(model, 0.05)
    tokens, cache = told(model, ids)
    assert torch.equal(tokens, dense) and sealed_tokens(cache) == [0, 0, 0]
    assert "layer 0: routers are not trained on this prompt: keys: expected finite numbers" in caplog.text


def test_damaged_ones_are_trained_anew(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    told(learning(tiny("llama")), prompt(length=LONG))
    path = next(folder.rglob("model.safetensors"))
    path.write_bytes(path.read_bytes()[:-9])
    caplog.clear()
    model = learning(tiny("llama"))
    assert "cannot be used, and are trained anew" in caplog.text and plan_of(model).learner.prompts == {}
    told(model, prompt(length=LONG))
    assert set(saap.load_routers(path.parent).layers) == {0, 1, 2}


def test_a_folder_that_cannot_be_written(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file")
    _, cache = told(learning(tiny("llama")), prompt(length=LONG))
    assert min(sealed_tokens(cache)) > 200 and "routers are not kept" in caplog.text


def test_writers_at_once_keep_the_newer_layers(folder: Path) -> None:
    """Each brings some layers; at no moment is the folder of two halves, and the routers of more prompts stay."""
    model = tiny("llama")
    whole = make_routers(model, own_lists=True)
    place = folder / "some"
    errors: list[BaseException] = []

    def write(number: int) -> None:
        layers = {n: x for n, x in whole.layers.items() if n != number % 3}
        config = {**whole.config, kept.PROMPTS: {str(n): 1 + (number == 4) for n in layers}}
        try:
            for _ in range(3):
                assert kept.keep(saap.Routers(config, layers), place, model.config) == place
                saap.load_routers(place)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    last = kept.kept_routers(place, model.config)
    assert last is not None and kept.prompts_of(last) == {0: 2, 1: 1, 2: 2}
    assert not list(folder.rglob("*.draft"))


LEARNS = """
import sys
from hf_models import prompt
from test_hf_first_prompt import LONG, QUICK, SMALL, learning, tiny, told
from saap_index.hf import crossover
crossover.measured = lambda key, times: crossover.Crossover(2048, ())
model = learning(tiny("llama"))
told(model, prompt(length=LONG, seed=int(sys.argv[1])))
"""


def test_two_processes_learn_at_once(folder: Path) -> None:
    """Neither fails, neither leaves a broken file, and what is kept is whole, and good for a third."""
    places = os.pathsep.join(str(Path(__file__).parents[i]) for i in (0, 1, 2))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([places, os.environ.get("PYTHONPATH", "")])}
    running = [subprocess.Popen([sys.executable, "-c", LEARNS, str(seed)], env=env, stderr=subprocess.PIPE) for seed in (1, 2)]
    ends = [(process.communicate(timeout=600)[1].decode(), process.returncode) for process in running]
    assert [status for _, status in ends] == [0, 0], ends
    assert not list(folder.rglob("*.draft"))
    place = next(folder.rglob("config.json")).parent
    there = saap.load_routers(place)
    assert set(there.layers) == {0, 1, 2} and set(there.config["prompts"].values()) <= {1, 2}
    assert np.mean([layer.budget_shares for layer in there.layers.values()]) == pytest.approx(1)
    third = tiny("llama")
    saap.attach(third, train="never", **SMALL)
    assert min(sealed_tokens(told(third, prompt(length=LONG))[1])) > 200


def test_saving_a_prompt_trains_first(tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(length=LONG)
    dense = greedy(model, ids, 6)
    learning(model)
    cache = saap.SaapCache(model)
    with torch.no_grad():
        model(ids, **{CACHE: cache})
    cache.save(tmp_path / "read", tokens=ids)
    assert min(sealed_tokens(cache)) > 200
    again = saap.SaapCache.load(tmp_path / "read", model)
    out = model.generate(torch.cat([ids, dense[:, :1]], 1), **{CACHE: again}, max_new_tokens=5, do_sample=False)
    assert torch.equal(out[:, LONG:], dense)


def test_caches_of_before_get_the_routers_too() -> None:
    model, ids = tiny("llama"), prompt(length=LONG)
    dense = greedy(model, ids, 6)
    learning(model)
    early = saap.SaapCache(model)
    with torch.no_grad():
        model(ids, **{CACHE: early})
    told(model, prompt(length=LONG, seed=9))
    prompts = dict(plan_of(model).learner.prompts)
    out = model.generate(torch.cat([ids, dense[:, :1]], 1), **{CACHE: early}, max_new_tokens=5, do_sample=False)
    assert torch.equal(out[:, LONG:], dense) and min(sealed_tokens(early)) > 200
    assert prompts == {0: 1, 1: 1, 2: 1} and set(plan_of(model).learner.prompts.values()) == {2}  # it taught, too


def test_detached_and_attached_again() -> None:
    from saap_index.hf import detached

    model, ids = tiny("llama"), prompt(length=LONG)
    learning(model)
    told(model, ids)
    plan = plan_of(model)
    with detached(model):
        assert not hasattr(model, ATTACHED)
    assert plan_of(model) is plan
    saap.detach(model)


@pytest.mark.parametrize("train", ["sometimes", None, 3, True])
def test_bad_train_is_refused(train: Any) -> None:
    with pytest.raises(ParameterError, match="train: expected 'auto', 'never' or a PromptTraining"):
        saap.attach(tiny("llama"), train=train)


def test_what_no_index_serves_is_refused_without_routers_too(folder: Path) -> None:
    for model, match in (
        (tiny("Gemma2", query_pre_attn_scalar=16, sliding_window=48), "attn_logit_softcapping"),
        (tiny("llama", head_dim=12), "head dim"), (torch.nn.Linear(2, 2), "PreTrainedModel"),
    ):
        with pytest.raises((saap.CompatibilityError, ParameterError), match=match):
            saap.attach(model)
        assert not hasattr(model, ATTACHED) and not folder.exists()


def test_training_beside_routers_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(ParameterError, match="train: expected no PromptTraining beside routers"):
        saap.attach(model, make_routers(model), train=QUICK)
    assert not hasattr(model, ATTACHED)


def test_routers_by_folder_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    saap.save_routers(make_routers(model), tmp_path / "some")
    saap.attach(model, str(tmp_path / "some"), 1.0, **SMALL)
    saap.detach(model)
    saap.attach(model, tmp_path / "some", 1.0, **SMALL)
    from saap_index import shipped

    monkeypatch.setattr(shipped, "shipped_routers", lambda: {"small": tmp_path / "some"})
    assert saap.from_pretrained("someone/small").layers.keys() == {0, 1, 2}
    with pytest.raises(ParameterError, match=r"routers: expected a folder .*, or a name of shipped ones \(small\), got other"):
        saap.from_pretrained("other")


def test_what_comes_with_the_package() -> None:
    from saap_index.shipped import shipped_routers
    from saap_lab.smollm2.shipped import SHIPPED

    assert shipped_routers() == {"SmolLM2-135M-Instruct": SHIPPED}
    assert len(saap.from_pretrained("SmolLM2-135M-Instruct").layers) == 30


def test_the_line_and_the_bar(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.WARNING, "saap_index"):
        told(learning(tiny("llama"), train=replace(QUICK, progress=True)), prompt(length=LONG))
    line = next(record.getMessage() for record in caplog.records if "training routers" in record.getMessage())
    assert "320 tokens" in line and "at most 300 s and 300 MB" in line and "train='never'" in line
    assert "training routers: 100%" in capsys.readouterr().err
