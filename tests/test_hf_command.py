"""`saap generate`, on a tiny model and a tokenizer of words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import VOCABULARY, greedy, make_routers, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import saap_index as saap
from saap_index import cli

LONG = 2300


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a model, its tokenizer, routers, and a long text."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    special = {"<pad>": 0, "<bos>": 1, "<unk>": 2}
    words = Tokenizer(models.WordLevel({**special, **{f"w{i}": i for i in range(3, VOCABULARY)}}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(" ".join(f"w{3 + 7 * i % 208}" for i in range(LONG)))
    saap.save_routers(make_routers(model), tmp_path / "routers")
    return tmp_path


def command(files: Path, *arguments: Any) -> int:
    """With float32 unless a dtype is named: what "auto" is depends on the processor."""
    given = ["--model", files / "model", "--routers", files / "routers", "--new", 12, "--threads", 2]
    given += [*([] if "--dtype" in arguments else ["--dtype", "float32"]), *arguments]
    return cli.main(["generate", *map(str, given)])


def test_an_answer(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(files, "--prompt", files / "text", "--selectivity", 1.0) == 0
    out, err = capsys.readouterr()
    ids = torch.tensor([[3 + 7 * i % 208 for i in range(LONG)]])
    assert out.split() == [f"w{token}" for token in greedy(tiny("llama"), ids, 12)[0].tolist()]
    assert "llama, 2300 tokens, 3 of 3 layers indexed" in err
    assert "first token" in err and "tokens/s" in err and "100.0% of 2311 tokens read" in err


@pytest.mark.parametrize("computes_bfloat16", [False, True])
def test_the_dtype_that_the_processor_computes_in(
    computes_bfloat16: bool, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AVX512_BF16 or AMX the default is bfloat16: the answer is that of the same model, attached, in that dtype."""
    monkeypatch.setattr("saap_index.pipeline.models._computes_bfloat16", lambda device: computes_bfloat16)
    assert command(files, "--prompt", files / "text", "--selectivity", 1.0, "--dtype", "auto") == 0
    dtype = torch.bfloat16 if computes_bfloat16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(files / "model", dtype=dtype).eval()
    saap.attach(model, saap.load_routers(files / "routers"), 1.0)
    ids = torch.tensor([[3 + 7 * i % 208 for i in range(LONG)]])
    assert capsys.readouterr().out.split() == [f"w{token}" for token in greedy(model, ids, 12)[0].tolist()]


def test_side_by_side(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(files, "--prompt", files / "text", "--compare", "--selectivity", 1.0, "--chunk", 512)
    out = capsys.readouterr().out
    _, sparse, rest = out.split("--- ")
    dense, report = rest.split("---\n")
    assert sparse.split()[0] == "sparse" and dense.split()[0] == "dense" and sparse.split()[1:] == dense.split()[1:]
    assert "The first 12 tokens are the same" in report and "takes 11 of 11 as dense does" in report
    command(files, "--prompt", files / "text", "--compare")
    assert " s" in (line := next(x for x in capsys.readouterr().out.splitlines() if x.startswith("sparse  "))) and "%" in line


def test_read_now_and_asked_later(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(files, "--prompt", files / "text", "--save", files / "read", "--question", "w5 w6 w7")
    first = capsys.readouterr()
    assert "saved to" in first.err
    command(files, "--load", files / "read", "--question", "w5 w6 w7")
    assert capsys.readouterr().out == first.out and len(first.out.split()) > 5
    torch.manual_seed(0)
    command(files, "--load", files / "read", "--question", "w5", "--temperature", 2.0, "--chunk", 4)
    assert capsys.readouterr().out != first.out


@pytest.mark.parametrize("arguments", [[], ["--prompt", "a", "--load", "b"], ["--prompt", "a", "--compare", "--temperature", 1]])
def test_flags_that_do_not_go_along(files: Path, arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(files, *arguments) == 1
    assert "saap generate: error: --" in capsys.readouterr().err
