"""`saap generate`, on a tiny model and a tokenizer of words."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import VOCABULARY, greedy, make_routers, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import saap_index as saap
from saap_index import cli
from saap_index.hf.models import position_limit

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


def test_storage(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The answer of the same model attached with these codes."""
    assert command(files, "--prompt", files / "text", "--selectivity", 0.5, "--storage", "SQ8/SQ4") == 0
    model = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32).eval()
    saap.attach(model, saap.load_routers(files / "routers"), 0.5, storage="SQ8/SQ4")
    ids = torch.tensor([[3 + 7 * i % 208 for i in range(LONG)]])
    assert capsys.readouterr().out.split() == [f"w{token}" for token in greedy(model, ids, 12)[0].tolist()]


@pytest.mark.parametrize("computes_bfloat16", [False, True])
def test_the_dtype_that_the_processor_computes_in(
    computes_bfloat16: bool, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AVX512_BF16 or AMX the default is bfloat16: the answer is that of the same model, attached, in that dtype."""
    monkeypatch.setattr("saap_index.hf.models._computes_bfloat16", lambda device: computes_bfloat16)
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


def test_the_end_of_the_models_positions(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((files / "model" / "config.json").read_text())
    for limit, status in ((LONG + 5, 0), (LONG, 1), (LONG - 1, 1)):
        (files / "model" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": limit}))
        saap.save_routers(make_routers(tiny("llama", max_position_embeddings=limit)), files / "routers")
        assert command(files, "--prompt", files / "text") == status
        err = capsys.readouterr().err
        if status:
            assert f"--prompt, --question: expected at most {limit} tokens, the positions that this model has, got" in err
        else:
            assert "--new: 5 tokens instead of 12" in err and f"of {LONG + 4} tokens read" in err
    stretching = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    assert position_limit(tiny("llama", max_position_embeddings=64, rope_parameters=stretching).config) is None


def test_layers_that_training_would_leave_dense(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    routers = saap.load_routers(files / "routers")
    saap.save_routers(saap.Routers({**routers.config, "budget": {"dense_layers": [0]}}, routers.layers), files / "routers")
    command(files, "--prompt", files / "text")
    err = capsys.readouterr().err
    assert "the routers advise to leave layers 0 dense: --dense-layers 0" in err and "3 of 3 layers indexed" in err
    command(files, "--prompt", files / "text", "--dense-layers", "0")
    err = capsys.readouterr().err
    assert "advise" not in err and "2 of 3 layers indexed" in err
    assert saap.load_routers(files / "routers").dense_layers == (0,)


def test_a_prompt_that_is_no_text(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (files / "latin").write_bytes("w5 Größe".encode("latin-1"))
    assert command(files, "--prompt", files / "latin") == 1
    assert "latin: expected --prompt in UTF-8, got 'utf-8' codec can't decode byte" in capsys.readouterr().err
    (files / "empty").write_text("")
    assert command(files, "--prompt", files / "empty") == 1
    assert "--prompt, --question: expected text, got none" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8"))
    assert command(files, "--prompt", "-") == 1
    assert "--prompt: expected text on the standard input" in capsys.readouterr().err
    assert command(files, "--prompt", files / "text", "--save", files / "read") == 0
    assert "nothing is generated: no --question" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [
    ["--prompt", "a", "--dense-layers", "x"], [], ["--prompt", "a", "--load", "b"],
    ["--prompt", "a", "--compare", "--temperature", 1], ["--prompt", "a", "--new", -1], ["--prompt", "a", "--chunk", 0],
    ["--prompt", "a", "--temperature", -1], ["--prompt", "a", "--temperature", "nan"], ["--load", "a"],
    ["--prompt", "a", "--compare", "--new", 0],
])
def test_flags_that_do_not_go_along(files: Path, arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(files, *arguments) == 1
    assert "saap generate: error: --" in capsys.readouterr().err
