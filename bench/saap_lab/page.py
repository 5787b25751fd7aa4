"""The records of a comparison as one HTML page that needs nothing else: curves, heat map, strips and tables, grouped by kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from . import page_tables, palette, svg
from .page_tables import Section, charged, percent
from .palette import MARKERS, ORACLE, OURS, WINDOW
from .quality import spread
from .report import LayerRow, late_layers, layer_rows, layers_replaced, text_rows


def html(records: Mapping[str, Any], title: str, kinds: Mapping[str, str], depth: int, facts: Sequence[str], batch: int) -> str:
    """The page. kinds : of every method by name; depth : layers of the model; facts : lines on how it was measured; batch :
    sequences that share the reading of weights."""
    late = late_layers(depth)
    rows, late_rows, texts = layer_rows(records), layer_rows(records, late), text_rows(records)
    every, measured = [*page_tables.KINDS, *kinds.values()], {r.method for r in rows} | {t.method for t in texts}
    methods = sorted((m for m in kinds if m in measured), key=lambda m: every.index(kinds[m]))
    colours = {m: palette.colour(m, "var(--ink)", i) for i, m in enumerate(methods)}
    style = _Style(colours, kinds, batch)
    layers = len({key.split("/")[-3] for key in records if key.startswith("layer/")})
    sections = [
        _curves("Attention captured", rows, style, False, f"all {layers} layers measured"),
        _curves("Attention captured in late layers", late_rows, style, False, f"layers {late.start} to {depth - 1}"),
        _curves("Error of the output", rows, style, True, f"all {layers} layers measured"),
        _text_curves(records, style, depth),
        *page_tables.budgets(records, rows, texts, methods, kinds, colours, batch),
        *page_tables.paired(records, methods),
        _heat(records, methods),
        _looks(records, methods, colours),
        page_tables.missing(records),
        page_tables.cost(records),
    ]
    shown = [section for section in sections if section.drawing or section.table]
    return _template().render(title=title, facts=facts, verdict=page_tables.verdict(records, kinds, late), sections=shown)


def _template() -> Any:
    loader = jinja2.PackageLoader("saap_lab")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template("report.html")


@dataclass(frozen=True)
class _Style:
    """How methods are drawn, the same in all drawings."""

    colours: Mapping[str, str]
    kinds: Mapping[str, str]
    batch: int

    def lines(self, points: Mapping[str, svg.Points]) -> list[svg.Curve]:
        bounds = (ORACLE, WINDOW)
        order = sorted((m for m in points if m != "dense"), key=lambda m: (m in OURS, m not in bounds))  # ours last, on top
        marker = {m: MARKERS.get(self.kinds[m], "circle") for m in order}
        return [svg.Curve(m, points[m], self.colours[m], m in bounds, m in OURS, marker[m]) for m in order]

    def drawn(self, points: Mapping[str, svg.Points], x_label: str, y_label: str, log_y: bool) -> str:
        """Twice, for wide and for narrow pages, of which the style sheet shows one."""
        lines = self.lines(points)
        return "".join(svg.curves(lines, x_label, y_label, log_y, (ORACLE, WINDOW), narrow) for narrow in (False, True))

    def legend(self, points: Mapping[str, svg.Points]) -> list[tuple[str, str]]:
        kinds = [kind for kind in page_tables.KINDS if any(self.kinds[m] == kind for m in points)]
        return [(svg.MARKERS[MARKERS[kind]], kind) for kind in kinds]


def _curves(title: str, rows: Sequence[LayerRow], style: _Style, error: bool, where: str) -> Section:
    points: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        y = r.error[0] if error else r.captured[0]
        points.setdefault(r.method, []).append((charged(r, style.batch) / 1e3, y))
    note = (
        f"Mean over {where} and sequences. Lower is better. "
        if error
        else f"Mass outside sinks and window, pooled by mass over {where}, mean over sequences. Higher is better. "
    ) + "The shaded band lies between the best tokens per KV head, the most so many bytes can capture, and a longer window."
    label = "relative error" if error else "% of the attention"
    drawn = style.drawn(points, "kB read per layer and step", label, error)
    return Section(title, note, drawing=drawn, legend=style.legend(points))


def _text_curves(records: Mapping[str, Any], style: _Style, depth: int) -> Section:
    read: dict[tuple[str, float], list[float]] = {}
    for key, row in records.items():
        if key.startswith("text/"):
            *_, method, share = key.split("/")
            megabytes = (row["kv_bytes"] + row["other_bytes"] + row["shared_bytes"] / style.batch) / 1e6
            read.setdefault((method, float(share)), []).append(megabytes)
    points: dict[str, list[tuple[float, float]]] = {}
    for t in text_rows(records):
        points.setdefault(t.method, []).append((spread(read[t.method, t.share])[0], t.kl[0]))
    where = layers_replaced(records, depth)
    note = f"KL divergence of the next token's distribution from the dense model's, {where}. Lower is better."
    drawn = style.drawn(points, "MB read per token, these layers", "KL, nats", True)
    return Section("The model's answers", note, drawing=drawn, legend=style.legend(points))


def _middle(shares: Sequence[float]) -> float:
    return sorted(shares)[len(shares) // 2]


def _heat(records: Mapping[str, Any], methods: Sequence[str]) -> Section:
    parts = [key.split("/") for key in records if key.startswith("layer/")]
    if not parts:
        return Section("Layer by layer", "")
    share = _middle(sorted({float(p[-1]) for p in parts}))
    sums: dict[str, dict[int, list[float]]] = {m: {} for m in methods if m != "dense"}
    for p in parts:
        row = records["/".join(p)]
        if float(p[-1]) == share and p[-2] in sums and not math.isnan(row["captured"]):
            pair = sums[p[-2]].setdefault(int(p[-3]), [0.0, 0.0])
            pair[0], pair[1] = pair[0] + row["captured"], pair[1] + row["outside"]
    rows = {m: {x: 100 * a / b for x, (a, b) in layers.items() if b} for m, layers in sums.items() if layers}
    note = f"Attention mass captured outside sinks and window at {percent(share)}, percent; columns are layers."
    return Section("Layer by layer", note, drawing=svg.heat_map(rows, sorted({int(p[-3]) for p in parts}), "%"))


def _looks(records: Mapping[str, Any], methods: Sequence[str], colours: Mapping[str, str]) -> Section:
    looks = {key.split("/")[2]: (key.split("/"), row) for key, row in records.items() if key.startswith("looks/")}
    if not looks:
        return Section("Where each method looks", "")
    (_, layer, _, share), row = next(iter(looks.values()))
    lanes = {m: looks[m][1]["read"] for m in methods if m in looks and m != "dense"}
    note = (
        f"The newest query of the first sequence in layer {layer} at {percent(float(share))}. Above: where its attention is, "
        "mean over the heads, on a square-root scale. Below: the share of each stretch that a method reads, mean over the KV "
        "heads."
    )
    drawn = svg.strips(row["mass"], lanes, colours, int(row["tokens"]))
    return Section("Where each method looks", note, drawing=drawn)
