"""A user's own method from a file or a module: found, tried on the model's layer, measured beside the others."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import VOCABULARY, make_routers, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saap_index import cli, save_routers
from saap_index.errors import ParameterError
from saap_lab.method import Layer
from saap_lab.own import builder, check_method, learns, load_methods

LAYER = Layer(0, 2, 3, 16, 24, 0.25, None)
DOCS = Path(__file__).parents[2] / "docs" / "compare.md"


def documented() -> str:
    """The example's module."""
    (block,) = [x for x in re.findall(r"```\n(.*?)```", DOCS.read_text(), re.DOTALL) if "class LongValues" in x]
    return "\n".join(line[4:] for line in block.splitlines() if line.startswith((">>> ", "... "))) + "\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, text, routers and the documented method as a file, in the working folder."""
    model = tiny("llama", num_hidden_layers=2)
    model.save_pretrained(tmp_path / "tiny")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w2").save_pretrained(tmp_path / "tiny")
    (tmp_path / "a.txt").write_text(" ".join(f"w{i}" for i in np.random.default_rng(1).integers(3, VOCABULARY, 2000)))
    save_routers(make_routers(model, own_lists=True), tmp_path / "routers")
    learning = "    def calibrate(self, layer, keys, values, queries):\n        self.seen = len(keys)\n"
    (tmp_path / "long_values.py").write_text(documented().replace("    def start(", learning + "    def start(", 1))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("long_values", None)


def test_the_documented_method_beside_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", "tiny", "--text", "a.txt", "--length", "300", "--sequences", "1", "--budgets", "0.3", "--threads", "1"]
    asked = ["eval", *common, "--routers", "routers", "--own", "long_values:LongValues", "--methods", "recent"]
    assert cli.main([*asked, "--tasks", "layers", "--continuation", "8", "--out", "eval", "--training", "3"]) == 0
    asked = ["compare", *common, "--own", "long_values.py:LongValues", "--methods", "recent", "--decoded", "0", "--layers", "1"]
    assert cli.main([*asked, "--training", "1", "--out", "compare"]) == 0
    for out in ("eval", "compare"):
        rows = json.loads((folder / out / "records.json").read_text())
        mine, recent = (rows[f"layer/0/1/{name}/0.3"] for name in ("long-values", "recent"))
        assert mine["tokens"] == pytest.approx(recent["tokens"], rel=0.5) and mine["kind"] == "eviction"
        assert "long-values" in (folder / out / "table.txt").read_text()
    assert "training sequence 3 of 3 read" in capsys.readouterr().err
    assert "long-values" in (folder / "compare" / "report.html").read_text()


GOOD = """
import torch
from saap_lab.method import Attended, Cache, Method, State, attend_over
class Good(Method):
    kind = "eviction"
    def __init__(self, share, window=8): self.share, self.window = share, window
    def start(self, layer, tokens): return Rows(Cache(layer, tokens))
class Rows(State):
    def __init__(self, cache): self.cache = cache
    def append(self, keys, values): self.cache.append(keys, values)
    def attend(self, queries): return Attended(attend_over(self.cache, queries, None), 3, 5)
"""


@pytest.mark.parametrize(("old", "new", "message"), [
    ("", "import nothing_of_that_name", "own: expected .*bad.py to be importable, got ModuleNotFoundError: No module named"),
    ("", "(", "to be importable, got SyntaxError"), ("class Good(Method)", "class Good", "a subclass of saap_lab.method.M"),
    ("class Good(", "class Better(", "to be a subclass of saap_lab.method.Method, got nothing of that name"),
    ("    def start(", "    def begin(", "expected .*bad.py:Good to define start, got a class without"),
    ("share, window=8", "share, window", r"expected Good\(share\) to build one, got Good\(share, window\): missing a"),
    ('kind = "eviction"', "name, kind = 'a/b', ''", "expected a name without commas and slashes"),
    ('kind = "eviction"', "name, kind = 'topk', ''", "expected a name that no other method has"),
    ('kind = "eviction"', "pass", "expected Good to say its kind"), ("return Attended(", "return (", "got t"),
    ("None), 3", "None)[0], 3", r"expected out of Good.attend as torch.float32 \(2, 3, 24\) on cpu, got torch.float32 \(3, 2"),
    ("3, 5)", "3, 5, chosen=torch.ones(9))", r"chosen of Good.attend as torch.bool \(2, 160\) or \(2, 3, 160\)"),
    ("None), 3", "None) / 0, 3", "expected finite numbers"), ("3, 5)", "-1, 5)", "expected tokens of Good.attend as a number"),
    ("self.cache.append(keys, values)", "self.rows += keys", "append of Good to run on 160 tokens, got AttributeError"),
])
def test_what_does_not_fit_is_said_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(GOOD.replace(old, new, 1) if old else new)
    with pytest.raises(ParameterError, match=message):
        for name, kind in load_methods([f"{tmp_path / 'bad.py'}:Good"], ("topk",)).items():
            check_method(name, builder(name, kind, 4, 32), LAYER)


def test_a_class_that_fits(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    (kind,) = load_methods([f"{tmp_path / 'good.py'}:Good"]).values()
    build = builder("Good", kind, 4, 32)
    check_method("Good", build, LAYER)
    made: Any = build(0.3)
    assert (made.name, made.share, made.window) == ("Good", 0.3, 32) and not learns(kind)
    layer = Layer(0, 1, 2, 8, 8, 0.3, None, torch.device("cpu"), torch.bfloat16)
    check_method("Good", build, layer)
    for spec in ("good", "good.py:", ":Good", "a b:c d", "absent.py:Good"):
        with pytest.raises(ParameterError, match="own: expected"):
            load_methods([spec])
