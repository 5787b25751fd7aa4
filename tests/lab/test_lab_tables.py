"""Figures as CSV and LaTeX, pictures in three formats, and a page that a narrow screen can show."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest

from saap_index import cli
from saap_lab import page, plots, svg, tables

READS = {
    "tokens": 9.0, "kv_bytes": 2e3, "other_bytes": 10.0, "shared_bytes": 100.0, "coded_bytes": {"SQ8": 1e3, "SQ8/SQ4": 800.0},
}


def records() -> dict[str, Any]:
    """Two sequences, two layers of four, two methods, one of them with an underscore; one does without codes and drift."""
    rows: dict[str, Any] = {}
    for name, kind, reads in (("topk_group", "yardstick", READS), ("eigen", "compression", {**READS, "coded_bytes": {}})):
        for i in range(2):
            for layer in (0, 3):
                rows[f"layer/{i}/{layer}/{name}/0.05"] = {
                    "captured": 0.5 + i / 4, "outside": 1.0, "error": 0.125, "total_per_head": [0.9], "kind": kind, **reads,
                }
            rows[f"text/{i}/{name}/0.05"] = {
                "kl": 0.25, "top1": 0.75, "log_perplexity_ratio": 0.0, "seconds_per_token": 0.1, "per_layer": {"0": 9.0}, **reads,
            }
    rows["drift/0/topk_group/0.05"] = {"kl": [0.1] * 8 + [0.2] * 8, "top1": [1.0] * 16, "tokens": 160, "kind": "yardstick"}
    for task, score in (("vt", 0.5), ("niah_single_1", 1.0)):
        rows[f"ruler/{task}.4096.0/topk_group/0.05"] = {"score": score, "answer": "", "tokens": 9}
    rows["needle/passkey.2048.0.5/eigen/0.1"] = {"answer": "1", "right": True, "tokens": 9}
    return rows


def test_csv_has_a_row_for_each_method_and_budget() -> None:
    table = list(csv.DictReader(io.StringIO(tables.as_csv(records(), 4))))
    assert [(row["budget"], row["method"]) for row in table] == [("0.05", "eigen"), ("0.05", "topk_group"), ("0.1", "eigen")]
    eigen, best, needles = table
    assert (best["kind"], best["captured_late_percent"]) == ("yardstick", "62.5") and float(best["captured_all_percent_std"]) > 17
    assert [best[f"layer_total_{name}bytes"] for name in ("", "sq8_", "sq8_sq4_")] == ["2010.0", "1010.0", "810.0"]
    assert best["kl"] == "0.25" and best["kl_std"] == "0.0" and best["same_first_percent"] == "75.0" and best["sequences"] == "2"
    assert [float(best[f"drift_kl_{name}_quarter"]) for name in ("first", "last")] == pytest.approx([0.1, 0.2])
    assert best["ruler_4096_niah_single_1_percent"] == "100.0" and best["ruler_4096_mean_percent"] == "75.0"
    assert eigen["layer_total_sq8_bytes"] == eigen["ruler_4096_vt_percent"] == "", "no figure"
    assert (needles["needles_right"], needles["needles_asked"], needles["kl"]) == ("1", "1", "")
    lone = {key: row for key, row in records().items() if "/1/" not in key[:8]}
    assert next(csv.DictReader(io.StringIO(tables.as_csv(lone, 4))))["kl_std"] == "", "one sequence has no deviation"


def test_latex_tables_are_whole() -> None:
    text = tables.as_latex(records(), 4)
    for name in ("table", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 2
    assert "5\\% & topk\\_group & 62.5 $\\pm$ 17.7" in text and r"\label{tab:ruler-4096}" in text and "nan" not in text
    for body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\bottomrule", text, re.DOTALL):
        lines = [line for line in body[1].splitlines() if line.endswith(r"\\")]
        assert len(lines) >= 2 and all(line.count(" & ") == len(body[0]) - 1 for line in lines)
    assert not re.search(r"(?<!\\)[%#]", text.partition("\n")[2])


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_pictures_are_the_same_for_the_same_records(tmp_path: Path, ending: str, begins: bytes) -> None:
    rows = {key: row for key, row in records().items() if key.startswith(("drift", "ruler"))}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        drawn = {path.name for path in plots.write(rows, 4, tmp_path / folder, ending)}
        assert drawn == {f"drift_0.05.{ending}", f"ruler.{ending}"}
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes().startswith(begins) and path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_narrow_page_has_text_as_large_as_a_wide_one() -> None:
    """What is as wide as the screen is drawn for it, and the rest scrolls in its own frame."""
    text = page.html(records(), "x", {"topk_group": "yardstick", "eigen": "compression"}, 4, ["a fact"], 16)
    assert text.count('class="narrow"') == text.count('class="broad"') == 4
    assert all(float(width) <= 360 for width in re.findall(r'class="narrow" viewBox="0 0 (\d+)', text))
    assert "@media (max-width: 640px)" in text and text.count("<svg") == text.count("</svg>")
    assert re.findall(r'<div class="wide">\s*<(svg|table)', text) and not re.search(r"</p>\s*<svg", text)
    many = [svg.Curve(f"method {i}", [(1.0, 50.0), (2.0, 90.0)], "#111") for i in range(25)]
    heights = [float(y) for y in re.findall(r'<text x="[^"]*" y="([^"]*)" fill=', svg.curves(many, "x", "y", narrow=True))]
    tall = float(re.findall(r'viewBox="0 0 350 (\d+)', svg.curves(many, "x", "y", narrow=True))[0])
    assert len(heights) == 25 and max(heights) < tall


@pytest.mark.parametrize(("more", "message"), [
    (["--csv", "absent/x.csv"], "csv: expected a file in a folder that is there, got absent/x.csv"),
    (["--latex", "."], "latex: expected a file"), (["--plots", "gif"], "plots: expected some of png, pdf, svg, got gif"),
])
def test_files_that_cannot_be_written_are_refused_at_once(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["eval"], ["compare", "--model", "m", "--text", "t"]):
        assert cli.main([*command, *more]) == 1 and message in capsys.readouterr().err
