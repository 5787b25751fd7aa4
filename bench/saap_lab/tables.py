"""The figures of a comparison for other programs: CSV, a row for each method and budget, and LaTeX tables for a paper.

Knows records, no files. Units are in the names of the columns, or nats and shares of 1 for what has none; ``_std`` is the
standard deviation over sequences, empty for one.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from saap_index.backends.scalar_quantizer import STORAGE_CODES

from . import report, ruler
from .report import LayerRow, Records, TextRow, rank

Cell = str | float | int

_SPECIAL = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"}


def rows(records: Records, depth: int) -> list[dict[str, Cell]]:
    """A row for each method and budget, in order of the budgets; columns that a method has no figure for are not there."""
    table: dict[tuple[str, float], dict[str, Cell]] = {}
    kinds = {key.split("/")[-2]: row["kind"] for key, row in records.items() if isinstance(row, Mapping) and "kind" in row}

    def row(method: str, share: float) -> dict[str, Cell]:
        first = {"method": method, "kind": kinds.get(method, ""), "budget": share}
        return table.setdefault((method, share), first)

    late = report.late_layers(depth)
    for group, layers in (("all", None), ("late", late), ("early", range(late.start))):
        for r in report.layer_rows(records, layers):
            found = row(r.method, r.share)
            found |= _mean(f"captured_{group}_percent", r.captured) | _mean(f"error_{group}", r.error)
            if layers is None:
                found |= _bytes("layer", r)
    for t in report.text_rows(records):
        found = row(t.method, t.share)
        found |= {"sequences": t.sequences} | _mean("kl", t.kl) | _mean("same_first_percent", t.top1)
        found |= _mean("perplexity_ratio", t.perplexity_ratio) | _bytes("token", t)
    for (method, share), (right, asked) in report.needle_rows(records).items():
        row(method, share).update(needles_right=right, needles_asked=asked)
    for (method, share), points in report.drift_rows(records).items():
        quarter = len(points) // 4
        for name, part in (("first", points[:quarter]), ("last", points[-quarter:])):
            row(method, share)[f"drift_kl_{name}_quarter"] = sum(kl for _, kl, _ in part) / quarter
    for (method, share), cells in report.ruler_rows(records).items():
        order = list(ruler.KINDS)
        for task, length in sorted(cells, key=lambda cell: (cell[1], order.index(cell[0]))):
            row(method, share)[f"ruler_{length}_{task}_percent"] = cells[task, length][0]
        for length, mean in report.ruler_averages(records)[method, share].items():
            row(method, share)[f"ruler_{length}_mean_percent"] = mean
    return [table[key] for key in sorted(table, key=lambda key: (key[1], rank(key[0]), key[0]))]


def as_csv(records: Records, depth: int) -> str:
    """`rows` with a head, comma separated, numbers in full; an empty field is a figure that there is not."""
    table = rows(records, depth)
    columns = list(dict.fromkeys(name for row in table for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if isinstance(x, float) and math.isnan(x) else x for name, x in row.items()} for row in table)
    return text.getvalue()


def as_latex(records: Records, depth: int) -> str:
    """Tables with booktabs' rules: quality and bytes by budget and method, and one of RULER's tasks for each length."""
    table, parts = rows(records, depth), ["% \\usepackage{booktabs}"]
    head = {
        "captured_late_percent": ("captured, late (\\%)", 1), "captured_all_percent": ("captured (\\%)", 1),
        "error_all": ("error", 3), "kl": ("KL (nats)", 4), "same_first_percent": ("same first (\\%)", 1),
        "perplexity_ratio": ("perplexity ($\\times$)", 3), "layer_total_bytes": ("kB per layer", 1),
        "token_total_bytes": ("MB per token", 2),
    }
    shown = [name for name in head if any(name in row for row in table)]
    if shown:
        lines = [[_share(row), _plain(str(row["method"])), *(_cell(row, x, head[x][1]) for x in shown)] for row in table]
        caption = "Sparse attention at equal bytes, mean and standard deviation over sequences."
        parts.append(_table("quality", caption, ["budget", "method", *(head[x][0] for x in shown)], lines))
    scores = report.ruler_rows(records)
    for length in sorted({n for cells in scores.values() for _, n in cells}):
        tasks = [task for task in ruler.KINDS if any((task, length) in cells for cells in scores.values())]
        names = [f"ruler_{length}_{task}_percent" for task in (*tasks, "mean")]
        scored = [row for row in table if any(name in row for name in names)]
        lines = [[_share(row), _plain(str(row["method"])), *(_cell(row, x, 1) for x in names)] for row in scored]
        caption = f"Synthetic tasks after RULER at {length} tokens, percent of the wanted strings found."
        columns = ["budget", "method", *(ruler.KINDS[x].short for x in tasks), "mean"]
        parts.append(_table(f"ruler-{length}", caption, columns, lines))
    return "\n\n".join(parts) + "\n"


def _mean(name: str, value: tuple[float, float]) -> dict[str, Cell]:
    return {name: value[0], f"{name}_std": value[1]}


def _bytes(per: str, row: LayerRow | TextRow) -> dict[str, Cell]:
    """Of keys and values, tables, both; and of both if keys and values were codes."""
    found: dict[str, Cell] = {
        f"{per}_tokens": row.tokens, f"{per}_kv_bytes": row.kv_bytes, f"{per}_other_bytes": row.other_bytes,
        f"{per}_total_bytes": row.kv_bytes + row.other_bytes,
    }
    if isinstance(row, LayerRow):
        found[f"{per}_shared_bytes"] = row.shared_bytes
    for name in STORAGE_CODES:
        if name in row.coded_bytes:
            found[f"{per}_total_{name.replace('/', '_').lower()}_bytes"] = row.coded_bytes[name] + row.other_bytes
    return found


def _share(row: Mapping[str, Cell]) -> str:
    return f"{100 * float(row['budget']):g}\\%"


def _cell(row: Mapping[str, Cell], name: str, digits: int) -> str:
    if name not in row or math.isnan(value := float(row[name])):
        return "--"
    if name.endswith("_bytes"):
        return f"{value / (1e3 if name.startswith('layer') else 1e6):.{digits}f}"
    spread: Any = row.get(f"{name}_std", math.nan)
    deviation = "" if math.isnan(spread) else f" $\\pm$ {spread:.{digits}f}"
    return f"{value:.{digits}f}{deviation}"


def _table(label: str, caption: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [" & ".join(line) + r" \\" for line in lines]
    for i in range(len(lines) - 1, 0, -1):
        if lines[i][0] != lines[i - 1][0]:
            rows.insert(i, r"\midrule")
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\label{{tab:{label}}}",
        rf"\begin{{tabular}}{{rl{'r' * (len(head) - 2)}}}", r"\toprule", " & ".join(head) + r" \\", r"\midrule", *rows,
        r"\bottomrule", r"\end{tabular}", r"\end{table}",
    ])


def _plain(text: str) -> str:
    """A name as LaTeX prints it."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text.replace("\\", "/"))
