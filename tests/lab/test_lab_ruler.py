"""RULER's tasks: samples that fit and can be answered from their text, scores, and the whole evaluation on a tiny model."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import VOCABULARY, make_routers, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from saap_index import Routers
from saap_index.errors import LengthError, ParameterError
from saap_lab import report, ruler
from saap_lab.compare import Task, compare
from saap_lab.eval_command import router_task
from saap_lab.questions import ruler_questions
from saap_lab.trained import TrainedMethods

TEXT = ruler.Filler("Some words are here, and others follow: they do. Nobody knows which of them counts! " * 30)


def words(text: str) -> list[int]:
    """A tokenizer: a token for every stretch of letters or digits, and for every other sign."""
    return [hash(x) for x in re.findall(r"\w+|[^\w\s]", text)]


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(list(ruler.KINDS)), seed=st.integers(0, 2**32 - 1), length=st.integers(600, 1500))
def test_a_sample_fits_and_hardly_less(kind: str, seed: int, length: int) -> None:
    made = ruler.sample(kind, seed, length, TEXT, words)
    used = len(words(made.document)) + len(words(made.question + made.begin)) + ruler.KINDS[kind].answer_tokens
    assert 0.93 * length - 40 <= used <= length
    assert made == ruler.sample(kind, seed, length, TEXT, words) != ruler.sample(kind, seed + 1, length, TEXT, words)
    if kind.startswith("niah"):
        for answer in made.answers:
            (line,) = [line for line in made.document.splitlines() if line.endswith(f" {answer}.")]
            assert line.split()[0] in made.question, "it is of a key that is asked for"
        asked = [line for line in made.document.splitlines() if " has the access " in line and line.split()[0] in made.question]
        assert len(asked) == len(made.answers) == {"niah_multivalue": 4, "niah_multiquery": 4}.get(kind, 1)
    elif kind == "vt":
        values: dict[str, str] = {}
        for name, value in re.findall(r"Let (\w+) = (\w+)\.", made.document):
            values[name] = values.get(value, value)  # set before it is read
        (asked_for,) = set(values.values())
        assert tuple(values) == made.answers and asked_for in made.question and len(values) == 5
    else:
        counts = Counter(x for x in made.document.split("\n\n")[1].split() if not re.fullmatch(r"\d+\.|\.\.\.", x))
        best = counts.most_common(len(made.answers) + 1)
        assert {word for word, _ in best[:-1]} == set(made.answers) and best[-2][1] > best[-1][1], "no ties with others"


def test_what_cannot_be_made_is_named() -> None:
    with pytest.raises(LengthError, match="lengths: expected room for cwe"):
        ruler.sample("cwe", 0, 300, TEXT, words)
    with pytest.raises(ParameterError, match="ruler-tasks: expected some of niah_single_1"):
        ruler.sample("qa_1", 0, 4096, TEXT, words)
    with pytest.raises(ParameterError, match="filler: expected text"):
        ruler.sample("niah_single_2", 0, 4096, ruler.Filler(" "), words)
    with pytest.raises(ParameterError, match="chat-template: expected a tokenizer that has one"):
        ruler_questions(Letters(), TEXT.text, (900,), ("vt",), 1, 0, True, False)


def test_the_score_is_the_share_of_strings_that_occur() -> None:
    assert ruler.score("it is ABC-1, and 77", ("abc-1", "78", "7", "x")) == 0.5
    assert [ruler.score(x, ("12",)) for x in ("", "112", "1 2")] == [0, 1, 0]


class Letters:
    """A tokenizer: a token per character. Prompts begin with token 1; a template marks what a user says."""

    bos_token_id = 1
    chat_template = ""

    def __call__(self, text: str, add_special_tokens: bool = True, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [3 + ord(c) % (VOCABULARY - 3) for c in text]}

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(32 + t % 90) for t in tokens)

    def apply_chat_template(self, said: list[dict[str, str]], **options: object) -> str:
        return f"<user>{said[0]['content'].strip()}</user><model>"


def test_questions_in_tokens() -> None:
    """The parts put together are the prompt, with the beginning that the tokenizer gives one, or in the chat template."""
    tokenizer = Letters()
    sparse, dense = (
        ruler_questions(tokenizer, TEXT.text, (900, 1200), ("vt", "niah_multikey_1"), 2, 0, False, x) for x in (False, True)
    )
    assert list(sparse) == [f"{kind}.{n}.{i}" for n in (900, 1200) for kind in ("vt", "niah_multikey_1") for i in range(2)]
    for name, question in sparse.items():
        assert [*question.document, *question.question] == [*dense[name].document, *dense[name].question]
        assert question.document[0] == 1 and len(dense[name].question) == 1 and 1 not in question.question
        assert len(question.document) + len(question.question) + question.answer_tokens <= question.length
    tokenizer.chat_template = "some"
    chat = ruler_questions(tokenizer, TEXT.text, (900,), ("vt",), 1, 0, True, False)["vt.900.0"]
    encode = lambda text: tokenizer(text, False)["input_ids"]  # noqa: E731
    assert list(chat.document[:6]) == encode("<user>") and list(chat.question[:10]) == encode("Question: ")
    said = encode("</user><model>Answer: The 5 variables with the value ")
    assert any(list(chat.question[i : i + len(said)]) == said for i in range(len(chat.question))), "what begins the answer"
    assert len(chat.document) + len(chat.question) + chat.answer_tokens <= 900


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", num_hidden_layers=2)


def make_task(model: Any, routers: Routers, **changes: Any) -> Task:
    methods = TrainedMethods(routers, ("saap", "dense"), (0.3,))
    options: dict[str, Any] = {"tasks": ("ruler",), "kinds": ("fwe", "vt"), "samples": 1, "lengths": (600,)}
    return router_task(model, Letters(), "tiny", methods, [], **{**options, "filler": TEXT.text, **changes})


def test_the_evaluation(model: Any, tmp_path: Path) -> None:
    """Dense answers are those that the model generates by itself, and the report has a table with a column for each task."""
    routers = make_routers(model, own_lists=True)
    task = make_task(model, routers)
    rows = compare(task, tmp_path).rows
    for name, question in task.questions.items():
        ids = torch.tensor([[*question.document, *question.question]], dtype=torch.int64, device="cpu")
        whole = model.generate(ids, max_new_tokens=question.answer_tokens, do_sample=False, attention_mask=torch.ones_like(ids))
        assert rows[f"ruler/{name}/dense/1.0"]["answer"] == Letters().decode(whole[0, ids.shape[1] :].tolist())
        assert rows[f"ruler/{name}/saap/0.3"]["score"] == 0
    rows[f"ruler/{name}/saap/0.3"]["score"] = 0.5
    assert report.ruler_averages(rows) == {("dense", 1.0): {600: 0.0}, ("saap", 0.3): {600: 25.0}}
    table = report.as_text(rows, 2)
    lines = r"RULER's tasks at 600 tokens, 1 sample each.*\n *share method +VT +FWE +mean\n100.0% dense +0 +0 +0.0\n"
    assert re.search(lines, table)
    written = json.loads((tmp_path / "summary.json").read_text())["ruler"]
    assert len(written) == 4 and written[0]["method"] == "dense"
    with pytest.raises(ParameterError, match="out: expected a folder of the same"):
        compare(make_task(model, routers, dense_question=True), tmp_path)
