"""The whole comparison on a tiny model: equal bytes, resuming, the page; a user's own method; drawings."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from saap_index import cli
from saap_index.errors import LengthError, ParameterError
from saap_lab import compare, needles, svg
from saap_lab.evaluate import Settings
from saap_lab.method import Attended, Cache, Layer, Method, State, attend_over
from saap_lab.roster import KINDS, TOLERANCE, fit

N, VOCABULARY = 512, 99
SETTINGS = Settings(shares=(0.1, 0.3), span=64, step=16, decoded=3, decode_shares=(0.3,), window=32)


class Letters:
    """A tokenizer: a token per character."""

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % VOCABULARY for c in text]}

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(32 + t % 90) for t in tokens)


class Strided(Method):
    """Every k-th token: a user's own method."""

    kind = "static pattern"

    def __init__(self, share: float) -> None:
        self.name, self.share = "strided", share

    def start(self, layer: Layer, tokens: int) -> State:
        return StridedState(Cache(layer, tokens), self.share)


class StridedState(State):
    def __init__(self, cache: Cache, share: float) -> None:
        self.cache, self.share = cache, share

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.cache.append(keys, values)

    def attend(self, queries: torch.Tensor) -> Attended:
        n, layer = self.cache.length, self.cache.layer
        chosen = torch.zeros(layer.heads, n, dtype=torch.bool)
        chosen[:, torch.linspace(n - 1, 0, max(1, round(self.share * n))).long()] = True
        read = float(chosen.sum()) / layer.heads
        return Attended(attend_over(self.cache, queries, chosen), read, read * layer.heads * layer.token_bytes, chosen=chosen)


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.2,
    )
    g = torch.Generator().manual_seed(1)
    sequences = [(f"t{i}", torch.randint(0, VOCABULARY, (N,), generator=g).tolist()) for i in range(3)]
    model = LlamaForCausalLM(config).eval()
    names = [*KINDS, "strided"]
    asked = needles.haystacks("word and " * 60, 1)
    return compare.Task(model, Letters(), "tiny", sequences, 1, names, SETTINGS, asked, {"strided": Strided})


@pytest.fixture(scope="module")
def folder(task, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    compare.compare(task, out)
    return out


def test_methods_read_equal_bytes_or_say_why_not(folder) -> None:
    rows = json.loads((folder / "records.json").read_text())
    for share in SETTINGS.shares:
        by = {
            m: [r for k, r in rows.items() if k.startswith("layer/") and k.endswith(f"/{m}/{share}")] for m in [*KINDS, "strided"]
        }
        tokens = N - 64 + 24 + 1  # of the measured queries, on average
        budget = (36 + share * (tokens - 36)) * 2 * 32 * 2
        for method, found in by.items():
            if not found:
                assert f"missing/{method}/{share}" in rows, method
                continue
            read = sum(r["kv_bytes"] + r["other_bytes"] for r in found) / len(found)
            if method == "dense":
                assert read == pytest.approx(tokens * 2 * 32 * 2)
            else:  # set on training text: what the texts of the test read differs a little where it follows the text
                assert read < budget * 1.25, method
            if method in ("recent", "random", "topk_group", "loki"):
                assert read == pytest.approx(budget, rel=0.06), method
    assert rows["text/0/dense/0.3"]["kl"] == pytest.approx(0, abs=1e-6)
    assert sum(k.startswith("needle/") for k in rows) >= 2 * (len(KINDS) - 4)


def test_a_second_run_measures_nothing_and_another_task_is_refused(task, folder, monkeypatch) -> None:
    before = (folder / "records.json").read_bytes()
    monkeypatch.setattr(compare.evaluate, "read_prompt", None)
    compare.compare(task, folder)
    assert (folder / "records.json").read_bytes() == before
    with pytest.raises(ParameterError, match="out"):
        compare.compare(replace(task, title="other"), folder)
    with pytest.raises(ParameterError, match="training"):
        compare.compare(replace(task, training=3), folder)
    with pytest.raises(ParameterError, match="methods"):
        compare.compare(replace(task, methods=("best",)), folder / "new")
    for decoded in (-1, 1, len(task.sequences[0][1])):
        with pytest.raises(LengthError, match="decoded"):
            compare.compare(replace(task, settings=replace(SETTINGS, decoded=decoded)), folder / "new")


def test_needles_are_asked_with_the_layers_compared_replaced_alone(task, tmp_path) -> None:
    """Nothing is calibrated for the others."""
    some = Settings(shares=(0.3,), layers=(1,), span=64, step=16, decoded=0, window=32, replaced=(1,))
    rows = compare.compare(replace(task, methods=("loki",), settings=some), tmp_path).rows
    assert "needle/passkey.0/loki/0.3" in rows and "layer/0/1/loki/0.3" in rows
    with pytest.raises(ParameterError, match="out"):
        other = needles.haystacks("others and " * 60, 1)
        compare.compare(replace(task, methods=("loki",), settings=some, needles=other), tmp_path)


@pytest.mark.parametrize(("more", "message"), [
    (["--budgets", "5"], "budgets: expected shares in (0, 1], as 0.05 for 5 %, got 5.0"),
    (["--methods", "saap,magic"], "methods: expected some of dense, "), (["--routers", "absent"], "absent"),
    (["--decoded", "9000"], "decoded: expected 0, or 2 to 8191 of the 8192 tokens of a sequence, got 9000"),
    (["--decoded", "1"], "decoded: expected 0, or 2 to"), (["--decoded", "-1"], "decoded: expected 0, or 2 to"),
    *(([f"--{name}", str(least - 1)], f"{name}: expected {least} or more, got {least - 1}")
      for name, least in (("length", 1), ("training", 1), ("sequences", 1), ("needles", 0), ("batch", 1))),
])
def test_what_cannot_be_is_said_before_anything_is_read(tmp_path, capsys, monkeypatch, more: list[str], message: str) -> None:
    for name in ("read_texts", "models.load_model"):
        monkeypatch.setattr(f"saap_lab.compare.{name}", lambda *args, **kwargs: pytest.fail("nothing is read"))
    assert cli.main(["compare", "--model", "m", "--text", "t", "--out", str(tmp_path / "out"), *more]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_page_stands_alone(folder) -> None:
    page = (folder / "report.html").read_text()
    assert not re.search(r"<script|https?://|<link|<img", page) and "nan" not in page
    body = page[page.index("<body>") : page.index("</html>")].replace("&times;", "×")
    ElementTree.fromstring(body)  # every tag is closed
    for text in (
        "Where each method looks",
        "Layer by layer",
        "Other architectures",
        "query-adaptive index",
        "strided",
        "Budget 10 %",
        "In pairs: saap",
        "methods that can be deployed",
        "static pattern",
    ):
        assert text in page, text
    assert "strided" in (folder / "table.txt").read_text()


@settings(max_examples=50, deadline=None)
@given(target=st.floats(1, 1000), slope=st.floats(10, 5000), fixed=st.floats(0, 500), step=st.sampled_from([0.0, 0.05, 0.3]))
def test_fit_never_reads_more_than_its_budget(target: float, slope: float, fixed: float, step: float) -> None:
    def size(x: float) -> float:
        x = math.ceil(x / step) * step if step else x
        return fixed + slope * x

    found = fit(lambda x: x, 0.05, size, target)  # type: ignore[arg-type, return-value]
    if found is None:
        assert fixed + slope * max(step, 0.05 / 2**8) > target
    else:
        assert size(found) <= target * (1 + TOLERANCE) + 1e-9
        assert step or size(found) >= 0.9 * min(target, fixed + slope)


def test_drawings_are_well_formed_and_skip_what_is_not_there() -> None:
    lines = [
        svg.Curve("a<b", [(1.0, 2.0), (10.0, float("nan")), (100.0, 5.0)], "#111", True),
        svg.Curve("c", [(3.0, 2.0)], "#222", bold=True),
        *(svg.Curve(shape, [(3.0, 2.0), (30.0, 4.0)], "#333", marker=shape) for shape in svg.MARKERS),
    ]
    for text in (
        svg.curves(lines, "x & y", "z", band=("a<b", "c")), svg.curves(lines, "x", "z", log_y=True),
        svg.heat_map({"a<b": {0: 12.0, 2: 99.0}}, [0, 1, 2], "%"), svg.strips([0.1, 0.9], {"a": [0.0, 1.0]}, {}, 64),
    ):
        ElementTree.fromstring(text)
    assert svg.curves([], "x", "y") == "" and svg.curves([svg.Curve("a", [(0.0, 1.0)], "#111")], "x", "y") == ""


def test_no_label_is_cut_off_where_many_curves_end_at_the_top() -> None:
    drawn = svg.curves([svg.Curve(f"m{i}", [(1.0, 50.0), (2.0, 100.0)], "#111") for i in range(12)], "x", "y")
    heights = sorted(float(y) for y in re.findall(r'<text x="[^"]*" y="([^"]*)" fill=', drawn))
    assert len(heights) == 12 and heights[0] >= 14 and all(b - a >= 13.9 for a, b in itertools.pairwise(heights))


@settings(max_examples=50, deadline=None)
@given(wanted=st.lists(st.floats(0, 400), max_size=12))
def test_labels_keep_apart(wanted: list[float]) -> None:
    found = sorted(svg._apart(wanted, 14))
    assert all(b - a >= 14 - 1e-6 for a, b in itertools.pairwise(found))
