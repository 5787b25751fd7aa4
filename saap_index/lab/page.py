"""The records of a comparison as one HTML page that needs nothing else: curves, heat map, strips and tables, grouped by kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from . import page_style, svg
from .quality import spread
from .report import LayerRow, TextRow, late_layers, layer_rows, needle_rows, text_rows

OURS, ORACLE, WINDOW = "saap", "topk_group", "recent"
"""ORACLE : a token is read for all heads of a group, so their summed probability is the most that so many bytes can capture."""

_KINDS = ("query-adaptive index", "eviction", "static pattern", "compression", "yardstick")
_NOTES = {
    "query-adaptive index": "chooses tokens for each query; every token stays available",
    "eviction": "drops tokens for good, without regard to later queries",
    "static pattern": "reads the same places whatever the text is",
    "compression": "reads all tokens in fewer numbers; quality falls with the rank",
    "yardstick": "bounds and plain baselines; topk and topk_group would have to read everything to know what they choose",
}
_COLOURS = {
    "saap": "#e4572e", "published": "#f0a35e", "loki": "#2e86de", "scfa": "#48a9c5", "scfa-centred": "#1f7a8c", "corm": "#8e44ad",
    "sparsek": "#c06ad6", "scfa-drop": "#5e3370", "moa": "#2d936c", "eigen": "#b8860b", "quest": "#6c7a89", "ivf": "#95a5a6",
    "random": "#b7bec4", "recent": "#7f8c8d", "topk_group": "var(--ink)", "topk": "#566573", "dense": "#566573",
}  # fmt: skip
_SPARE = ("#d81b60", "#00897b", "#5e35b1", "#7cb342")


def html(
    records: Mapping[str, Any], title: str, kinds: Mapping[str, str], depth: int, facts: Sequence[str], batch: int
) -> str:
    """The page. kinds : of every method by name; depth : layers of the model; facts : lines on how it was measured; batch :
    sequences that share the reading of weights."""
    late = late_layers(depth)
    rows, late_rows, texts = layer_rows(records), layer_rows(records, late), text_rows(records)
    methods = [m for m in kinds if m in {r.method for r in rows} | {t.method for t in texts}]
    colours = {m: _COLOURS.get(m, _SPARE[i % len(_SPARE)]) for i, m in enumerate(methods)}
    layers = len({key.split("/")[-3] for key in records if key.startswith("layer/")})
    body = [
        f"<h1>Sparse attention compared on {escape(title)}</h1>",
        "<ul>" + "".join(f"<li>{escape(fact)}</li>" for fact in facts) + "</ul>",
        _curves("Attention captured", rows, colours, False, f"all {layers} layers measured"),
        _curves("Attention captured in late layers", late_rows, colours, False, f"layers {late.start} to {depth - 1}"),
        _curves("Error of the output", rows, colours, True, f"all {layers} layers measured"),
        _text_curves(texts, colours),
        _table(records, rows, texts, methods, kinds, colours),
        _paired(records, kinds),
        _heat(records, methods),
        _looks(records, methods, colours),
        _missing(records),
        _cost(records),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    head += f"<style>{page_style.CSS}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{"".join(body)}</main></body></html>'


def _section(title: str, note: str, inner: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(note)}</p>{inner}</section>" if inner else ""


def _lines(points: Mapping[str, svg.Points], colours: Mapping[str, str]) -> list[svg.Curve]:
    bounds = (ORACLE, WINDOW)
    order = sorted(points, key=lambda m: (m == OURS, m not in bounds))  # ours last, on top
    return [svg.Curve(m, points[m], colours[m], m in bounds, m == OURS) for m in order if m != "dense"]


def _curves(title: str, rows: Sequence[LayerRow], colours: Mapping[str, str], error: bool, where: str) -> str:
    points: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        y = r.error[0] if error else r.captured[0]
        points.setdefault(r.method, []).append(((r.kv_bytes + r.other_bytes) / 1e3, y))
    note = (
        f"Mean over {where} and sequences. "
        + ("Lower is better. " if error else "Mass outside sinks and window. Higher is better. ")
    ) + "The shaded band lies between the best tokens per KV head, the most so many bytes can capture, and a longer window."
    label = "relative error" if error else "% of the attention"
    return _section(
        title, note, svg.curves(_lines(points, colours), "kB read per layer and step", label, error, (ORACLE, WINDOW))
    )


def _text_curves(texts: Sequence[TextRow], colours: Mapping[str, str]) -> str:
    points: dict[str, list[tuple[float, float]]] = {}
    for t in texts:
        points.setdefault(t.method, []).append(((t.kv_bytes + t.other_bytes) / 1e6, t.kl[0]))
    note = "KL divergence of the next token's distribution from the dense model's, every layer replaced. Lower is better."
    drawn = svg.curves(_lines(points, colours), "MB read per token, all layers", "KL, nats", True, (ORACLE, WINDOW))
    return _section("The model's answers", note, drawn)


def _table(
    records: Mapping[str, Any], rows: Sequence[LayerRow], texts: Sequence[TextRow], methods: Sequence[str],
    kinds: Mapping[str, str], colours: Mapping[str, str],
) -> str:  # fmt: skip
    by, text, needles = {(r.method, r.share): r for r in rows}, {(t.method, t.share): t for t in texts}, needle_rows(records)
    times = _times(records)
    head = [
        "method",
        "kB read",
        "of dense",
        "kB weights",
        "captured %",
        "error",
        "KL",
        "same 1st %",
        "perplexity ×",
        "needles",
        "ms/token",
    ]
    tables = []
    for share in sorted({s for _, s in [*by, *text]}):
        dense = by.get(("dense", share))
        decoded = any(s == share for _, s in text)
        absent = {*(() if decoded else ("KL", "same 1st %", "perplexity ×", "ms/token")), *(() if needles else ("needles",))}
        shown = [column for column in head[1:] if column not in absent]
        lines = []
        for kind in [*_KINDS, *sorted({kinds[m] for m in methods} - set(_KINDS))]:
            members = [m for m in methods if kinds[m] == kind and ((m, share) in by or (m, share) in text)]
            if members:
                note = f"<b>{escape(kind)}</b> {escape(_NOTES.get(kind, ''))}"
                lines.append(f'<tr class="kind"><td colspan="{len(shown) + 1}">{note}</td></tr>')
            for m in members:
                r, t, right = by.get((m, share)), text.get((m, share)), needles.get((m, share))
                whole = f"{100 * (r.kv_bytes + r.other_bytes) / dense.kv_bytes:.1f} %" if r and dense else "–"
                cells = [
                    *([f"{(r.kv_bytes + r.other_bytes) / 1e3:.0f}", whole, f"{r.shared_bytes / 1e3:.0f}"] if r else ["–"] * 3),
                    *([_pm(r.captured, 1), _pm(r.error, 3)] if r else ["–"] * 2),
                    *([_pm(t.kl, 4), _pm(t.top1, 1), _pm(t.perplexity_ratio, 3)] if t else ["–"] * 3),
                    f"{right[0]}/{right[1]}" if right else "–",
                    f"{times[m, share]:.0f}" if (m, share) in times else "–",
                ]
                cells = [cell for column, cell in zip(head[1:], cells, strict=True) if column in shown]
                name = f'<td><span class="dot" style="background:{colours[m]}"></span>{escape(m)}</td>'
                style = ' class="ours"' if m == OURS else ""
                lines.append(f"<tr{style}>{name}{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
        note = (
            "Mean ± standard deviation over sequences. kB read: keys, values and what decides what to read, per layer and step."
        )
        tables.append(_section(f"Budget {share:.1%}", note, _html_table([head[0], *shown], lines)))
    return "".join(tables)


def _html_table(head: Sequence[str], lines: Sequence[str]) -> str:
    heads = "".join(f"<th>{h}</th>" for h in head)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>" if lines else ""


def _pm(value: tuple[float, float], digits: int) -> str:
    if math.isnan(value[0]):
        return "–"
    return f'{value[0]:.{digits}f} <span class="pm">±{value[1]:.{digits}f}</span>'


def _times(records: Mapping[str, Any]) -> dict[tuple[str, float], float]:
    found: dict[tuple[str, float], list[float]] = {}
    for key, row in records.items():
        if key.startswith("text/"):
            *_, method, share = key.split("/")
            found.setdefault((method, float(share)), []).append(1e3 * row["seconds_per_token"])
    return {key: spread(values)[0] for key, values in found.items()}


def _paired(records: Mapping[str, Any], kinds: Mapping[str, str]) -> str:
    """Captured mass and KL of this library's index against each other method, on the same sequence at the same budget."""
    mass: dict[tuple[str, float], dict[str, list[float]]] = {}
    kl: dict[tuple[str, float], dict[str, float]] = {}
    for key, row in records.items():
        kind, *rest = key.split("/")
        if kind == "layer":
            pair = mass.setdefault((rest[-2], float(rest[-1])), {}).setdefault(rest[0], [0.0, 0.0])
            pair[0], pair[1] = pair[0] + row["captured"], pair[1] + row["outside"]
        elif kind == "text":
            kl.setdefault((rest[-2], float(rest[-1])), {})[rest[0]] = row["kl"]
    lines = []
    for share in sorted({s for _, s in [*mass, *kl]}):
        for m in kinds:
            if m in (OURS, "dense") or ((m, share) not in mass and (m, share) not in kl):
                continue
            ours, theirs = ({t: 100 * a / b for t, (a, b) in mass.get((x, share), {}).items() if b} for x in (OURS, m))
            gained = spread([ours[t] - theirs[t] for t in ours if t in theirs and not math.isnan(theirs[t])] or [math.nan])
            first, second = kl.get((OURS, share), {}), kl.get((m, share), {})
            less = spread([second[t] - first[t] for t in first if t in second] or [math.nan])
            if not (math.isnan(gained[0]) and math.isnan(less[0])):
                lines.append(f"<tr><td>{escape(m)}</td><td>{share:.1%}</td><td>{_pm(gained, 2)}</td><td>{_pm(less, 4)}</td></tr>")
    table = _html_table(("against", "budget", "points of mass gained", "KL saved, nats"), lines)
    note = "Differences on the same sequences, mean ± standard deviation; positive where this library's index is ahead."
    return _section("This library's index, paired", note, table)


def _middle(shares: Sequence[float]) -> float:
    return sorted(shares)[len(shares) // 2]


def _heat(records: Mapping[str, Any], methods: Sequence[str]) -> str:
    parts = [key.split("/") for key in records if key.startswith("layer/")]
    if not parts:
        return ""
    share = _middle(sorted({float(p[-1]) for p in parts}))
    sums: dict[str, dict[int, list[float]]] = {m: {} for m in methods if m != "dense"}
    for p in parts:
        row = records["/".join(p)]
        if float(p[-1]) == share and p[-2] in sums and not math.isnan(row["captured"]):
            pair = sums[p[-2]].setdefault(int(p[-3]), [0.0, 0.0])
            pair[0], pair[1] = pair[0] + row["captured"], pair[1] + row["outside"]
    rows = {m: {x: 100 * a / b for x, (a, b) in found.items() if b} for m, found in sums.items() if found}
    note = f"Attention mass captured outside sinks and window at {share:.1%}, percent; columns are layers."
    return _section("Layer by layer", note, svg.heat_map(rows, sorted({int(p[-3]) for p in parts}), "%"))


def _looks(records: Mapping[str, Any], methods: Sequence[str], colours: Mapping[str, str]) -> str:
    found = {key.split("/")[2]: (key.split("/"), row) for key, row in records.items() if key.startswith("looks/")}
    if not found:
        return ""
    (_, layer, _, share), row = next(iter(found.values()))
    lanes = {m: found[m][1]["read"] for m in methods if m in found and m != "dense"}
    note = (
        f"The newest query of the first sequence in layer {layer} at {float(share):.1%}. Above: where its attention is, mean "
        "over the heads, on a square-root scale. Below: the share of each stretch that a method reads, mean over the KV heads."
    )
    return _section("Where each method looks", note, svg.strips(row["mass"], lanes, colours, int(row["tokens"])))


def _missing(records: Mapping[str, Any]) -> str:
    lines = [
        f"<tr><td>{escape(key.split('/')[1])}</td><td>{float(key.split('/')[2]):.1%}</td><td>{escape(row['reason'])}</td></tr>"
        for key, row in records.items() if key.startswith("missing/")
    ]  # fmt: skip
    table = _html_table(("method", "budget", "why"), lines)
    return _section("Not possible at a budget", "Methods that were asked for and cannot read so little.", table)


def _cost(records: Mapping[str, Any]) -> str:
    lines = []
    for c in records.get("cost", ()):
        cells = escape(c["name"]), escape(c["kind"]), f"{c['bytes'] / 1e3:.1f}", f"{1e6 * c['seconds']:.0f}"
        lines.append("<tr>" + "".join(f"<td>{x}</td>" for x in cells) + "</tr>")
    table = _html_table(("operator", "kind", "kB per layer and step", "µs per layer and step"), lines)
    note = "These replace softmax and need a model trained with them, so they have no quality here: only what a step costs."
    return _section("Other architectures", note, table)
