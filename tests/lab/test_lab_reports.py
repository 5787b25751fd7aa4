"""Reports say what was measured: how many layers were replaced, no spread of one sequence, and no choice after measuring."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from saap_lab import page, page_tables, quality, report
from saap_lab.smollm2 import model as demo_model
from saap_lab.smollm2.evaluate import Row, pooled

ROOT = Path(__file__).parents[2]
KINDS = {"saap": "query-adaptive index", "saap-own": "query-adaptive index", "ivf": "yardstick", "recent": "yardstick"}
CAPTURED = {"saap": (0.7, 0.9), "saap-own": (0.8, 0.85), "ivf": (0.75, 0.8), "recent": (0.2, 0.3)}
"""Of each sequence, the first half of it in each of two layers; saap-own is ahead by one point and a half on the whole."""


def records(sequences: int = 2, replaced: int = 2, methods: tuple[str, ...] = tuple(CAPTURED)) -> dict[str, Any]:
    found: dict[str, Any] = {}
    reads = {"tokens": 9.0, "kv_bytes": 1e3, "other_bytes": 10.0, "shared_bytes": 100.0}
    for i in range(sequences):
        for method in methods:
            for layer in (0, 3):
                found[f"layer/{i}/{layer}/{method}/0.05"] = {
                    "captured": CAPTURED[method][i], "outside": 1.0, "error": 0.1, "total_per_head": [0.9], **reads,
                }
            found[f"text/{i}/{method}/0.05"] = {
                "kl": 0.1 + i, "top1": 0.9, "log_perplexity_ratio": 0.0, "seconds_per_token": 0.1,
                "per_layer": {str(n): 9.0 for n in range(replaced)}, **reads,
            }
    return found


@pytest.mark.parametrize(("replaced", "said"), [
    (2, "2 of 4 layers replaced, the others as the model has them"), (4, "every layer replaced (4)"),
])
def test_how_many_layers_were_replaced(replaced: int, said: str) -> None:
    rows = records(replaced=replaced)
    text, html = report.as_text(rows, 4), page.html(rows, "t", KINDS, 4, [], 16)
    assert said in text and said in html
    assert ("every layer" in text + html) == (replaced == 4)
    assert "pooled by mass over layers" in text and "Captured is pooled by mass over layers" in html


def test_one_sequence_has_no_spread() -> None:
    assert math.isnan(quality.spread([3.0])[1]) and quality.spread([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    rows = records(1)
    text, html = report.as_text(rows, 4, each_layer=True), page.html(rows, "t", KINDS, 4, [], 16)
    assert "1 sequence; one has no spread: (-)" in text and ", 1 sequence: against" in text
    assert "1 sequences" not in text and "(0.0" not in text and "(-)" in text
    assert "±0.0" not in html and "± 0.0" not in html and "nan" not in text + html
    assert '<span class="pm">' not in html
    assert report.summary(rows, 4)["layers"]["all"][0]["captured"][1] is None
    assert "(0." in report.as_text(records(2), 4) and '<span class="pm">' in page.html(records(2), "t", KINDS, 4, [], 16)
    one = {("x", 0, 0.05): Row([0.5], [1.0], [0.1])}
    assert math.isnan(pooled(one, "x", 0.05, [0])[1])


def test_each_index_has_a_verdict_of_its_own() -> None:
    """The better one of two is known only after measuring."""
    lines = page_tables.verdict(records(), KINDS, [3])
    assert lines == [
        f"5 %{where}: {said}" for where in ("", ", late layers") for said in (
            "saap captures more than 2 of the 2 methods that can be deployed; the nearest, ivf, by 2.5 ± 10.6 points.",
            "saap-own captures more than 2 of the 2 methods that can be deployed; the nearest, ivf, by 5.0 ± 0.0 points.",
        )
    ]
    alone = "\n".join(page_tables.verdict(records(1), KINDS, [3]))
    assert "saap captures more than 1 of the 2 methods that can be deployed, not more than ivf (5.0 points)." in alone
    assert "saap-own captures more than 2" in alone and "±" not in alone
    only = {name: kind for name, kind in KINDS.items() if name != "saap-own"}
    fewer = records(methods=("saap", "ivf"))
    assert "saap-own" not in "\n".join(page_tables.verdict(fewer, only, [3]))
    assert "saap-own was not measured" in "\n".join(page_tables.verdict(fewer, KINDS, [3]))


def page_text(name: str) -> str:
    """A document in one line, so that figures are found wherever its lines break."""
    return " ".join((ROOT / name).read_text().split())


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
    return found


def test_accuracy_in_the_documents_is_that_of_the_results() -> None:
    """Which figures are pooled by mass, and which are means of layers."""
    text = page_text("docs/results.md")
    groups = {"": (3, 8, 14, 20, 26), "late": (14, 20, 26)}
    table, means = [], []
    for name in ("cpu_accuracy_smollm2", "cpu_accuracy_smollm2_other_text"):
        found = result(name)["groups"]
        for group, layers in groups.items():
            cell = found[group or "all"]["saap_index"]["0.05"]
            table.append(f"{cell[0]:.1f} / {cell[2]:.3f}")
            means.append(sum(found[f"layer {x}"]["saap_index"]["0.05"][0] for x in layers) / len(layers))
    assert f"| **this index** | {' | '.join(table)} |" in text
    assert f"{means[0]:.1f} ({means[1]:.1f}) % on unseen text and {means[2]:.1f} ({means[3]:.1f}) % on text of another" in text

    def rows(found: dict[str, Any], where: Any) -> dict[str, Any]:
        row: dict[str, Any] = next(r for r in where if (r["method"], r["share"]) == ("saap-even", 0.05))
        return row

    unseen, other = result("cpu_eval_unseen"), result("cpu_eval_other_text")
    layered = [
        sum(rows(found, found["each_layer"][str(x)])["captured"][0] for x in layers) / len(layers)
        for found in (unseen, other)
        for layers in groups.values()
    ]
    both = rows(unseen, unseen["layers"]["all"]), rows(unseen, unseen["layers"]["late"])
    assert f"{both[0]['captured'][0]:.1f} % pooled by mass over these layers and {both[1]['captured'][0]:.1f} %" in text
    assert f"or {layered[0]:.1f} and {layered[1]:.1f} % as means of layers, error {both[0]['error'][0]:.3f}" in text
    assert f"on text of other kinds {layered[2]:.1f} and {layered[3]:.1f} %, means of layers" in text


SPEED_COLUMNS = {"cpu_llama_128k": 3, "cpu_mha_128k": 3, "cpu_smollm2_8k": 2}
"""Tables of `bench/search_attend.py`, in the order of the columns of docs/results.md, and digits of their times."""


def test_speed_in_the_documents_is_that_of_the_results() -> None:
    text, (llama, mha, small) = page_text("docs/results.md"), [result(name)["times"] for name in SPEED_COLUMNS]

    def row(key: str) -> str:
        texts = (f"{each[key]['ms']:.{digits}g} ms" for each, digits in zip((llama, mha, small), (3, 3, 2), strict=True))
        return " | ".join(texts)

    rows = {
        "torch SDPA, `enable_gqa`": row("torch SDPA, enable_gqa"),
        "a bare read of K and V": row("a bare read of K and V"),
        "this library, dense": f"{llama['ours, dense']['ms']:.1f} ms | {mha['ours, dense']['ms']:.1f} ms | 0.60 ms",
    }
    assert round(small["ours, dense"]["ms"], 2) == 0.6
    for name, cells in rows.items():
        assert f"| {name} | {cells} |" in text
    ours = [each["ours, selectivity 5%"] for each in (llama, mha, small)]
    cells = [f"{each['ms']:.2f} ms: {each['vs_best_torch']:.{digits}f}x" for each, digits in zip(ours, (0, 0, 1), strict=True)]
    assert f"| **this library, 5 %** | **{cells[0]} best torch, {ours[0]['vs_own_dense']:.0f}x our dense**" in text
    assert f"**{cells[1]} and {ours[1]['vs_own_dense']:.0f}x** | **{cells[2]} best torch** |" in text


def compared() -> tuple[dict[tuple[str, str], float], dict[str, float]]:
    """Attention captured of all layers by method and share, and KL at 5 % by method."""
    text = (ROOT / "bench" / "results" / "cpu_compare_8k.txt").read_text()
    captured, ends = (
        [line.split()[:3] for line in part.splitlines() if re.match(r" *[\d.]+% ", line)]
        for part in (text.split("late layers: ")[0], text.split("every layer replaced")[1])
    )
    return {(method, share): float(mass) for share, method, mass in captured}, {method: float(kl) for _, method, kl in ends}


def gpu_step(tokens: int, batch: int) -> tuple[float, float]:
    """Microseconds of a step of 5 % in a graph on the H200, as the kernels are now, and how often dense attention takes that."""
    folder = "gpu-2026-11-27-h200-runs"
    size = f"{tokens // 1024}k x {batch}"
    row = rf"^{size}  ours step 5% route_select:SAAP_REHEARSE=0 +[\d.]+ +[\d.]+ +([\d.]+)"
    found = re.search(row, (ROOT / "bench" / "results" / folder / "sweep.txt").read_text(), re.MULTILINE)
    assert found
    figures = [f for f in result(f"{folder}/gpu_step")["figures"] if (f["tokens"], f["batch"]) == (tokens, batch)]
    dense = min(f["graph_us"] for f in figures if f["name"].startswith(("torch SDPA", "FlashInfer")) and "graph_us" in f)
    return float(found[1]), dense / float(found[1])


def test_gpu_steps_in_the_documents_are_those_of_the_results() -> None:
    text = page_text("docs/gpu.md")
    for tokens, batch in ((131072, 1), (131072, 8), (524288, 1)):
        us, faster = gpu_step(tokens, batch)
        assert re.search(rf"\| {tokens // 1024}k x {batch} \| {us * faster:.0f} us \| {us} us: {faster:.1f}x \|", text)
    layers = {x["name"]: x["ms"] for x in result("gpu-2026-11-27-h200-runs/gpu_generate")["figures"]}
    names = {"5 %, graphs": "ours 5 %, graphs", "all tokens read (selectivity 1), graphs": "ours 100 %, graphs"}
    assert all(f"| {row} | {layers[name]:.2f} ms |" in text for row, name in names.items())


def test_figures_of_the_readme_are_those_of_the_results() -> None:
    text, (mass, kl) = page_text("README.md"), compared()
    step = result("cpu_llama_128k")["times"]["ours, selectivity 5%"]
    assert f"takes {step['ms']:.2f} ms, {step['vs_best_torch']:.0f} times as fast as the best torch" in text
    (one, faster), (eight, much_faster) = (gpu_step(131072, batch) for batch in (1, 8))
    assert f"{one:.0f} us a step in a CUDA graph, {faster:.1f} times as fast as the fastest dense" in text
    assert f"{eight:.0f} us with a batch of 8, {much_faster:.1f} times" in text
    ours, ivf, published = (f"{mass[method, '5.0%']:.1f} %" for method in ("saap-own", "ivf", "published"))
    assert f"{ours} of the attention outside first and newest tokens is captured, pooled by mass over layers," in text
    assert f"a KL of {kl['saap-own']:.3f};" in text
    assert f"plain IVF has {ivf} and {kl['ivf']:.3f}, SAAP as published {published} and {kl['published']:.3f}" in text


def test_the_comparison_in_the_documents_is_that_of_the_results() -> None:
    """Its table against the kept output of the comparison; the distances sequence by sequence against the means of both."""
    text = (ROOT / "docs" / "results.md").read_text()
    kept = (ROOT / "bench" / "results" / "cpu_compare_8k.txt").read_text().split("\n\n")

    def figures(title: str) -> dict[tuple[str, str], float]:
        part = next(x for x in kept if x.startswith(title) or f"\n{title}" in x)
        rows = re.findall(r"^ *([0-9.]+)% (\S+) +(\S+)", part, re.MULTILINE)
        return {(method, share): float(figure) for share, method, figure in rows}

    captured, late = figures("all layers measured"), figures("late layers")
    distance = next(figures(x) for x in (" share method                 KL",))
    names = {
        "**this index, lists of each prompt**": "saap-own", "this index, lists of the training texts": "saap", "plain IVF": "ivf",
        "CORM": "corm", "SAAP as published": "published", "SparseK, scorer on a frozen model": "sparsek",
        "recent window": "recent", "MoA": "moa", "Loki": "loki", "SCFA": "scfa",
        "exact best tokens per KV head (bound)": "topk_group",
    }
    table = text[text.index("| | 2 % of the bytes |") :]
    for title, method in names.items():
        cells = [x.strip(" *") for x in re.search(rf"^\| {re.escape(title)} \|(.*)\|$", table, re.MULTILINE)[1].split("|")]  # type: ignore[index]
        assert cells[:3] == [f"{captured[method, share]:.1f}" for share in ("2.0", "5.0", "10.0")], method
        digits = len(cells[3].partition(".")[2])
        assert cells[3] == f"{distance[method, '5.0']:.{digits}f}", method
    nearest = [max(late[m, share] for m in ("ivf", "corm", "published")) for share in ("2.0", "5.0", "10.0")]
    ahead = [late["saap-own", share] - best for share, best in zip(("2.0", "5.0", "10.0"), nearest, strict=True)]
    said = re.search(r"in the late layers by ([0-9.]+) \+- [0-9.]+, ([0-9.]+) \([^)]*\) and ([0-9.]+)", " ".join(text.split()))
    assert said and [float(x) for x in said.groups()] == pytest.approx(ahead, abs=0.11)
    quest = captured["quest", "10.0"]
    assert ("quest", "5.0") not in captured and f"| Quest | - | - | {quest:.1f} | |" in text


def test_whose_weights_were_measured() -> None:
    assert "dequantised from Q4_1" in demo_model.TITLE
    for name in ("README.md", "docs/results.md", "docs/training.md"):
        assert re.search(r"SmolLM2-135M.{0,200}dequantised from Q4_1", (ROOT / name).read_text(), re.DOTALL), name
