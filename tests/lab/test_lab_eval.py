"""`saap eval` on a tiny model: steps at once are steps one by one, what is recorded, resuming, refusals, the reports."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import VOCABULARY, make_routers, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saap_index import Rope, Routers, cli, load_routers, save_routers
from saap_index.errors import CompatibilityError, LengthError, ParameterError
from saap_index.hf.models import LoadedModel
from saap_index.pipeline.settings import TrainSettings
from saap_index.pipeline.train import train_model
from saap_lab import eval_command, evaluate, flags, quality, replace, report
from saap_lab.compare import Task, compare
from saap_lab.eval_command import router_task
from saap_lab.method import Layer
from saap_lab.steps import replay
from saap_lab.trained import TrainedMethods
from saap_lab.yardsticks import Dense, Selected, TopK

LENGTH = 448


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small are faster so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("name", ["dense", "topk", "topk_group", "recent", "random", "ivf", "quest"])
def test_steps_at_once_are_steps_one_by_one(name: str, share: float) -> None:
    layer, g = Layer(0, 2, 3, 16, 8, 0.25, None), torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 400, 16, generator=g), torch.randn(2, 400, 8, generator=g)
    queries, at = torch.randn(2, 3, 40, 16, generator=g), torch.arange(0, 80, 2)
    special = {"dense": Dense(), "topk": TopK(share, 2, 32)}
    method = special.get(name) or Selected(name, share, 2, 32)
    found = []
    for together in (True, False):
        state = method.start(layer, 400)
        state.append(keys[:, :300], values[:, :300])
        found.append(replay(state, keys[:, 300:], values[:, 300:], queries, at, together))
        assert state.cache.length == 400
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.out, b.out, atol=1e-5, rtol=1e-5)
        assert torch.equal(a.chosen, b.chosen)
        assert (a.tokens, a.kv_bytes, a.other_bytes) == pytest.approx((b.tokens, b.kv_bytes, b.other_bytes))


@pytest.mark.parametrize("case", ["llama", "qwen2_mixed", "gemma3"])
def test_layers_without_routers_stay_as_the_model_has_them(case: str) -> None:
    """Sliding windows and all: with dense attention in the others, the model's own logits come out."""
    model, last = tiny(case), 20
    tokens = torch.randint(3, VOCABULARY, (200,)).tolist()
    prompt = replace.read_prompt(model, tokens, None, torch.tensor([180, 199]), last)
    chosen = {n: Dense() for n in range(model.config.num_hidden_layers) if n % 2}
    logits, traffic = replace.decode(model, replace.starting(chosen, prompt, 180, last), tokens[180:], 180, together=True)
    torch.testing.assert_close(logits, prompt.logits, rtol=2e-3, atol=2e-3)
    assert sorted(traffic.per_layer) == sorted(chosen) and traffic.steps == last
    assert quality.layer_quality(Dense(), prompt, 1, 2, 8).error < 1e-4, "the logits have the model's own scale"


# -- the whole evaluation -----------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer: a token per character."""

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % VOCABULARY for c in text]}

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(32 + t % 90) for t in tokens)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def routers(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Routers:
    rng, settings = np.random.default_rng(0), TrainSettings(
        tokens=1024, context=512, held_out=1, queries=32, nlist=8, window=32,
    )
    sequences = [(f"kind:{i}", rng.integers(3, VOCABULARY, 512).tolist()) for i in range(settings.sequences)]
    out = tmp_path_factory.mktemp("trained")
    train_model(LoadedModel(model, None, "tiny", "0"), sequences, settings, out)
    return load_routers(out)


def make_task(
    model: Any, routers: Routers, methods: tuple[str, ...] = ("saap", "dense", "topk_group", "ivf", "recent", "random"),
    budgets: tuple[float, ...] = (0.1, 0.3), masses: tuple[float, ...] = (0.5,), identity: str = "tiny",
    sequences: Any = None, **changes: Any,
) -> Task:
    rng = np.random.default_rng(5)
    given = sequences or [(f"t{i}", rng.integers(3, VOCABULARY, LENGTH).tolist()) for i in range(2)]
    options: dict[str, Any] = {
        "continuation": 16, "queries": 4, "lengths": (LENGTH,), "depths": (0.5,), "filler": "some words and others " * 60,
    }
    trained = TrainedMethods(routers, methods, budgets, masses)
    return router_task(model, Letters(), identity, trained, given, **{**options, **changes})


@pytest.fixture(scope="module")
def folder(model: Any, routers: Routers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Needles with fewer methods than the rest."""
    out = tmp_path_factory.mktemp("eval")
    compare(make_task(model, routers, tasks=("needles",), methods=("saap", "dense"), budgets=(0.3,), masses=()), out)
    compare(make_task(model, routers, tasks=("layers", "end")), out)
    return out


def test_everything_is_measured_and_reported(folder: Path) -> None:
    rows = json.loads((folder / "records.json").read_text())
    methods = [*(f"{m}/{s}" for s in (0.1, 0.3) for m in ("saap", "topk_group", "ivf", "recent", "random"))]
    for method in [*methods, "saap-mass-0.5/0.25", "dense/1.0"]:
        for sequence in range(2):
            assert 0 <= rows[f"text/{sequence}/{method}"]["top1"] <= 1
            assert all(rows[f"layer/{sequence}/{layer}/{method}"]["error"] >= 0 for layer in range(2))
    for method in ("saap/0.3", "dense/1.0"):
        assert sum(key.startswith("needle/") and key.endswith(f"/{method}") for key in rows) == 1 + 4
    assert rows["text/0/dense/1.0"]["kl"] < 1e-6 and rows["layer/1/1/dense/1.0"]["error"] < 1e-5
    table = (folder / "table.txt").read_text()
    for text in ("2 sequences", "late layers", "early layers", "every layer replaced", "by layer at 10.0%", "multi-key 448"):
        assert text in table, text
    assert "saap-mass-0.5    mean 0." in table
    found = json.loads((folder / "summary.json").read_text())
    assert set(found["layers"]) == {"all", "late", "early"} and set(found["each_layer"]) == {"0", "1"}
    assert len(found["end"]) == len(methods) + 2 and len(found["needles"]) == 5 * 2
    assert found["targets"]["saap-mass-0.5"]["heads"] == 4 and found["targets"]["saap-mass-0.5"]["mean"] > 0.35
    pictures = {path.stem for path in folder.glob("*.png")}
    assert pictures == {
        "mass_all", "mass_late", "kl", "error_all", "layers_0.1", "layers_0.25", "layers_0.3", "needles_passkey",
        "needles_multi-key",
    }


def test_bytes_are_equal(folder: Path) -> None:
    """K, V and tables of the index against K and V of each yardstick, on average over layers, queries and texts."""
    rows = json.loads((folder / "records.json").read_text())
    for share in (0.1, 0.3):
        read = {}
        for method in ("saap", "topk_group", "ivf", "recent", "random"):
            found = [row for key, row in rows.items() if key.startswith("layer/") and key.endswith(f"/{method}/{share}")]
            read[method] = sum(row["kv_bytes"] for row in found) / len(found)
        between = LENGTH - 8 - 36
        tokens = 36 + share * between
        assert read["saap"] == pytest.approx(tokens * 2 * 64, rel=0.05)
        for method in ("ivf", "recent", "random"):
            assert read[method] == read["topk_group"] > read["saap"]
        assert (read["recent"] - read["saap"]) / 2 < 9 * 4 + (share * between + 2) * 4 + 128, "one segment's table, row numbers"


def test_a_stopped_run_goes_on(model: Any, routers: Routers, tmp_path: Path, monkeypatch: Any) -> None:
    small = {"budgets": (0.3,), "methods": ("saap", "recent"), "masses": (), "lengths": (300,), "depths": (0.5,)}
    task, steps = make_task(model, routers, **small), []
    want = compare(task, tmp_path / "whole").rows

    def stop(line: str) -> None:
        steps.append(line)
        if len(steps) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(task, tmp_path, stop)
    kept = json.loads((tmp_path / "records.json").read_text())
    got = compare(task, tmp_path).rows
    assert 8 <= len(kept) < len(got) and kept.items() <= got.items()
    for rows in (got, want):
        for row in rows.values():
            if isinstance(row, dict):
                row.pop("seconds_per_token", None)
    assert got == want, "as if it had not been stopped"
    monkeypatch.setattr(evaluate, "read_prompt", None)
    compare(task, tmp_path)  # measures nothing
    with pytest.raises(ParameterError, match="out: expected a folder of the same"):
        compare(make_task(model, routers, **small, identity="other"), tmp_path)
    with pytest.raises(ParameterError, match="out: expected a folder of the same"):
        compare(make_task(model, routers, **small, sequences=task.sequences[::-1]), tmp_path)


def test_a_prompt_is_indexed_once_and_the_copies_agree(model: Any, routers: Routers) -> None:
    """Budgets share what does not depend on them, and get what they would get alone."""
    tokens = make_task(model, routers).sequences[0][1]
    prompt = replace.read_prompt(model, tokens, Rope.from_config(model.config), torch.arange(LENGTH - 16, LENGTH, 4))
    shared = TrainedMethods(routers, ("saap", "ivf"), (0.1, 0.3))
    for share in (0.3, 0.1):
        for got in shared.at(share, LENGTH):
            alone = next(m for m in TrainedMethods(routers, ("saap", "ivf"), (share,)).at(share, LENGTH) if m.name == got.name)
            a, b = (quality.layer_quality(m, prompt, 1, 4, 32) for m in (got, alone))
            assert (a.captured, a.error, a.tokens) == (b.captured, b.error, b.tokens)


def test_the_budget_of_a_layer(model: Any, routers: Routers) -> None:
    """By the plan with saap, the same everywhere with saap-even."""
    shares = np.array([0.5, 1.0], np.float32)
    planned = {n: dataclasses.replace(layer, budget_shares=shares) for n, layer in routers.layers.items()}
    methods = TrainedMethods(Routers(routers.config, planned), ("saap", "saap-even"), (0.2,))
    tokens = make_task(model, routers).sequences[0][1]
    prompt = replace.read_prompt(model, tokens, Rope.from_config(model.config), torch.arange(LENGTH - 8, LENGTH))
    saap, even = (quality.layer_quality(m, prompt, 1, 4, 32) for m in methods.at(0.2, LENGTH))
    assert saap.tokens < even.tokens


def test_what_cannot_be_measured_is_named(model: Any, routers: Routers, tmp_path: Path) -> None:
    for changes, error, name in (
        ({"methods": ("best",)}, ParameterError, "methods"), ({"methods": ("published",)}, ParameterError, "router mlp"),
        ({"tasks": ("all",)}, ParameterError, "tasks"), ({"budgets": (1.5,)}, ParameterError, "budgets"),
        ({"layers": (7,)}, ParameterError, "layers"), ({"continuation": 1}, ParameterError, "continuation"),
        ({"continuation": 300}, LengthError, "length"), ({"lengths": (40,)}, LengthError, "lengths"),
        ({"model": tiny("llama")}, CompatibilityError, "num_hidden_layers"), ({"filler": "x"}, ParameterError, "filler"),
    ):
        with pytest.raises(error, match=name):
            task = make_task(changes.get("model", model), routers, **{k: v for k, v in changes.items() if k != "model"})
            compare(task, tmp_path / "out")
    plain = make_routers(model)
    with pytest.raises(ParameterError, match="calibration"):
        TrainedMethods(plain, ("saap",), (0.1,), (0.9,))


def test_drift_by_position_in_what_the_dense_model_writes(model: Any, routers: Routers, tmp_path: Path) -> None:
    task = make_task(model, routers, ("saap", "dense", "recent"), (0.1,), (), tasks=("drift",), drift_tokens=48)
    rows = compare(task, tmp_path).rows
    for i, (_, tokens) in enumerate(task.sequences):
        ids, generator, written = tokens[:-48], torch.Generator().manual_seed(0), rows[f"written/{i}"]
        for token in written[:6]:
            with torch.no_grad():
                chances = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
            assert token == int(torch.multinomial(chances, 1, generator=generator)), "what the model itself would write"
            ids = [*ids, token]
        assert len(written) == 48 and max(rows[f"drift/{i}/dense/1.0"]["kl"]) < 1e-6
        assert rows[f"drift/{i}/dense/1.0"]["top1"] == [1.0] * 16 and min(rows[f"drift/{i}/recent/0.1"]["kl"]) > 1e-6
    points = report.drift_rows(rows)["recent", 0.1]
    assert [x for x, _, _ in points] == [1.5 + 3 * i for i in range(16)]
    assert points[3][1] == pytest.approx(sum(rows[f"drift/{i}/recent/0.1"]["kl"][3] for i in range(2)) / 2)
    assert "drift: KL to the dense model in 48 tokens" in (tmp_path / "table.txt").read_text()
    assert {path.stem for path in tmp_path.glob("*.png")} == {"drift_0.1"}
    for count in (8, 440):
        with pytest.raises(LengthError, match="drift-tokens: expected 16 to"):
            make_task(model, routers, tasks=("drift",), drift_tokens=count)


def test_a_model_of_which_some_layers_are_indexed(tmp_path: Path) -> None:
    model = tiny("qwen2_mixed")
    routers = make_routers(model, layers=(1, 3), own_lists=True)
    task = make_task(model, routers, methods=("saap", "dense"), masses=(), tasks=("layers", "end"))
    rows = compare(task, tmp_path).rows
    assert rows["text/0/dense/1.0"]["kl"] < 1e-5 and sorted(rows["text/0/saap/0.1"]["per_layer"]) == ["1", "3"]
    assert report.layer_numbers(rows) == [1, 3]


def test_the_published_classifier(model: Any, tmp_path: Path) -> None:
    rng, settings = np.random.default_rng(0), TrainSettings(
        router="mlp", partition="pre-rope", tokens=1024, context=512, held_out=1, queries=32, nlist=8, window=32,
    )
    sequences = [(f"kind:{i}", rng.integers(3, VOCABULARY, 512).tolist()) for i in range(settings.sequences)]
    train_model(LoadedModel(model, None, "tiny", "0"), sequences, settings, tmp_path / "mlp")
    trained = load_routers(tmp_path / "mlp")
    task = make_task(model, trained, methods=("published", "saap"), masses=(), tasks=("layers",), budgets=(0.3,))
    rows = compare(task, tmp_path / "out").rows
    assert rows["layer/0/1/published/0.3"]["captured"] > 0


def test_the_command(model: Any, routers: Routers, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.save_pretrained(tmp_path / "tiny")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w2").save_pretrained(tmp_path / "tiny")
    (tmp_path / "a.txt").write_text(" ".join(f"w{i}" for i in np.random.default_rng(1).integers(3, VOCABULARY, 900)))
    save_routers(routers, tmp_path / "routers")
    arguments = [
        "eval", "--model", tmp_path / "tiny", "--routers", tmp_path / "routers", "--text", tmp_path / "a.txt", "--out",
        tmp_path / "out", "--sequences", 2, "--length", 400, "--continuation", 8, "--queries", 4, "--budgets", "0.2", "--depths",
        "0.5", "--needle-lengths", "300", "--methods", "saap,recent", "--threads", 2,
    ]
    given = [str(x) for x in arguments]
    assert cli.main(given) == 0
    out, err = capsys.readouterr()
    assert "late layers" in out and "passkey 300" in out and "min left]" in err
    depth = model.config.num_hidden_layers
    assert f"0: saap at 20.0% in {len(routers.layers)} of {depth} layers  [" in err and "every layer" not in err
    less = [*given[: given.index("--needle-lengths")], "--methods", "saap,dense", "--out", str(tmp_path / "less")]
    less += ["--layers", "1", "--dtype", "bfloat16", "--device", "cpu"]
    assert cli.main([*less, "--tasks", "layers,end", "--length", "200"]) == 0, "lengths of needles that are not asked for"
    rows = json.loads((tmp_path / "less" / "records.json").read_text())
    assert rows["task"]["identity"].endswith(" bfloat16"), "not mixed with figures of float32"
    assert 1e-9 < rows["text/0/dense/1.0"]["kl"] < 1e-2 and 1e-9 < rows["layer/0/1/dense/1.0"]["error"] < 1e-2
    capsys.readouterr()
    assert cli.main([*given, "--layers", "one"]) == 1 and "layers: expected numbers" in capsys.readouterr().err
    assert cli.main([*given, "--sequences", "9"]) == 1 and "texts: expected 9 sequences" in (err := capsys.readouterr().err)
    assert "ask for less with --sequences or --length" in err
    assert eval_command._checksum(tmp_path / "routers") != eval_command._checksum(tmp_path / "tiny")


@pytest.mark.parametrize(("more", "message"), [
    (["--budgets", "5"], "budgets: expected shares in (0, 1], as 0.05 for 5 %, got 5.0"), (["--budgets", "0"], "budgets: exp"),
    (["--methods", "saap,magic"], "methods: expected some of saap, "), (["--tasks", "all"], "tasks: expected some of layers"),
    (["--layers", "99"], "layers: expected some of"), (["--depths", "50"], "depths: expected places in [0, 1]"),
    (["--target-mass", "90"], "target-mass: expected"), (["--sequences", "0"], "sequences: expected 1 or more, got 0"),
    (["--sequences", "-1", "--tasks", "needles"], "sequences: expected 0 or more"), (["--length", "0"], "length: expected 1"),
    (["--continuation", "1"], "continuation: expected 2 or more"), (["--queries", "0"], "queries: expected 1 or more"),
    (["--device", "nowhere"], "device: expected"), (["--threads", "0"], "threads: expected 1 or more"),
])
def test_what_cannot_be_is_said_before_anything_is_read(
    routers: Routers, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any, more: list[str], message: str
) -> None:
    save_routers(routers, tmp_path / "routers")
    for name in ("read_texts", "demo_texts.unseen_texts", "demo_model.load", "models.load_model"):
        monkeypatch.setattr(f"saap_lab.eval_command.{name}", lambda *args, **kwargs: pytest.fail("nothing is read"))
    assert cli.main(["eval", "--routers", str(tmp_path / "routers"), "--out", str(tmp_path / "out"), *more]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_more_tokens_than_positions_are_refused(model: Any, routers: Routers, tmp_path: Path) -> None:
    limit = model.config.max_position_embeddings
    with pytest.raises(LengthError, match=f"length: expected at most {limit} tokens, .* got {limit + 1}"):
        make_task(model, routers, sequences=[("x", [5] * (limit + 1))], filler="x")
    with pytest.raises(LengthError, match="lengths: expected at most"):
        make_task(model, routers, sequences=[("x", [5] * 2000)], lengths=(limit + 1,), filler="x")
    task = dataclasses.replace(make_task(model, routers), sequences=[("x", [5] * (limit + 1))])
    with pytest.raises(LengthError, match=f"length: expected at most {limit} tokens, .* got {limit + 1}"):
        compare(task, tmp_path)


def test_the_model_is_loaded_as_the_flags_say(routers: Routers, tmp_path: Path, monkeypatch: Any) -> None:
    save_routers(routers, tmp_path / "routers")
    asked: list[dict[str, str]] = []

    def load(*path: object, **options: str) -> None:
        asked.append(options)
        raise LengthError("enough")

    computing = ["--device", "elsewhere:3", "--dtype", "bfloat16"]
    for name in ("models.load_model", "demo_model.load"):
        monkeypatch.setattr(f"saap_lab.eval_command.{name}", load)
    monkeypatch.setattr("saap_lab.flags.checked_device", lambda name: asked.append({"checked": name}))
    both = ["--routers", str(tmp_path / "routers"), *computing]
    for arguments in (["eval", "--model", "m", *both], ["eval", *both], ["compare", "--model", "m", "--text", "t", *computing]):
        assert cli.main(arguments) == 1
        assert asked == [{"checked": "elsewhere:3"}, {"device": "elsewhere:3", "dtype": "bfloat16"}]
        asked.clear()


def test_the_documented_commands_can_be_given() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    lines = [line.split()[2:] for line in text.splitlines() if line.startswith("    saap eval")]
    assert len(lines) >= 3
    parser = argparse.ArgumentParser()
    eval_command.add_arguments(parser)
    for line in lines:
        given = parser.parse_args(line)
        assert set(flags.names(given.tasks)) <= set(eval_command.TASKS)
    section = text[text.index("## Judging routers") : text.index("## When it will not help")]
    options = {option for action in parser._actions for option in action.option_strings}
    assert set(re.findall(r"--[a-z][a-z-]+", section)) - {"--router"} <= options
