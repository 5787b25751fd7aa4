"""docs/transformers.md runs as written: its Python, and its commands but the first. So do the README's lines for transformers."""

from __future__ import annotations

import doctest
import shlex
from pathlib import Path

import pytest
import torch
from hf_models import CACHE, make_routers, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import saap_index as saap
from saap_index import cli
from saap_index.hf.cache import ATTACHED

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "transformers.md"


def make_folder(folder: Path) -> None:
    """A model of bytes in ``checkpoint``, and routers for it in ``routers``."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    spelling = Tokenizer(models.BPE(letters, []))
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelling.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=spelling, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        folder / "checkpoint"
    )
    model = tiny("llama", vocab_size=260, pad_token_id=256, eos_token_id=257)
    model.save_pretrained(folder / "checkpoint")
    saap.save_routers(make_routers(model), folder / "routers")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the page speaks of."""
    make_folder(tmp_path)
    (tmp_path / "book.txt").write_text("It was a long book, and it went on. " * 80)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(kind: str) -> list[str]:
    return [part.split("\n", 1)[1] for part in PAGE.read_text().split("```")[1::2] if part.startswith(f"{kind}\n")]


def test_python(folder: Path) -> None:
    text = "\n".join(block for block in blocks("python") if block.startswith(">>>"))
    text = text.replace("out.cache", f"out.{CACHE}").replace(" cache=cache", f" {CACHE}=cache")
    test = doctest.DocTestParser().get_doctest(text, {}, PAGE.name, str(PAGE), 0)
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.tries > 20 and not runner.failures


def test_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    assert [line[:2] for line in lines[:2]] == [["saap", "train"], ["saap", "generate"]]
    for line in lines[1:]:
        assert cli.main([*line[1:], "--threads", "2"]) == 0
    out, err = capsys.readouterr()
    assert "as dense does" in out and "saved to read" in err


def test_the_lines_of_the_readme(folder: Path) -> None:
    """An attached model, which answers."""
    section = (ROOT / "README.md").read_text().split("## Inside transformers")[1]
    code = section.split("```python\n")[1].split("```")[0]
    inputs = {"input_ids": torch.arange(2, 40)[None], "attention_mask": torch.ones((1, 38), dtype=torch.int64)}
    model = AutoModelForCausalLM.from_pretrained("checkpoint")
    names = {"model": model, "inputs": inputs, "answers": []}
    exec(code.replace("model.generate(", "answers.append(model.generate(").replace("=200)", "=20))"), names)
    assert names["answers"][0].shape == (1, 58) and hasattr(model, ATTACHED)


def test_examples_in_passing_are_python() -> None:
    for block in blocks("python"):
        code = doctest.script_from_examples(block) if block.startswith(">>>") else block.replace("[...]", "[]")
        compile(code, PAGE.name, "exec")
