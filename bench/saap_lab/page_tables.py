"""The tables of a comparison's page: every method at a budget, grouped by kind; this library's indexes in pairs; a verdict.

Knows records, no drawings.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from saap_index.backends.scalar_quantizer import STORAGE_CODES

from .palette import OURS
from .quality import spread
from .report import LayerRow, TextRow, coded_heads, needle_rows

ORACLES = ("dense", "topk", "topk_group", "topk_weighted")
"""What cannot be deployed: these read everything to know what they choose."""

KINDS = ("query-adaptive index", "eviction", "static pattern", "compression", "yardstick")
NOTES = {
    "query-adaptive index": "chooses tokens for each query; every token stays available",
    "eviction": "drops tokens for good, without regard to later queries",
    "static pattern": "reads the same places whatever the text is",
    "compression": "reads all tokens in fewer numbers; quality falls with the rank",
    "yardstick": "bounds and plain baselines; topk and topk_group would have to read everything to know what they choose",
}
_HEAD = (
    "K, V kB", "tables kB", "weights kB", "in all kB", "of dense", "alone", "captured %", "error", "KL", "same 1st",
    "ppl ×", "needles", "ms", *coded_heads("K, V kB"),
)

Key = tuple[str, float]
"""(method, share)"""


class Mean(NamedTuple):
    """A mean and its deviation over sequences, as they are written."""

    mean: str
    deviation: str


Cell = str | Mean


@dataclass(frozen=True)
class Row:
    """A row of a table, or, with ``group``, a heading across it."""

    cells: Sequence[Cell] = ()
    group: str = ""
    note: str = ""
    """Behind the heading."""
    colour: str = ""
    """Of the dot before the first cell."""
    ours: bool = False
    text: bool = False
    """Whether the last cell is a sentence."""


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Section:
    """A part of the page; without table and drawing it is left out."""

    title: str
    note: str
    table: Table | None = None
    drawing: str = ""
    """SVG."""
    legend: Sequence[tuple[str, str]] = ()
    """(mark, what it stands for)"""


def percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def charged(row: LayerRow, batch: int) -> float:
    """Bytes of a layer and step: K, V, tables, and the sequence's part of the weights."""
    return row.kv_bytes + row.other_bytes + row.shared_bytes / batch


def budgets(
    records: Mapping[str, Any], rows: Sequence[LayerRow], texts: Sequence[TextRow], methods: Sequence[str],
    kinds: Mapping[str, str], colours: Mapping[str, str], batch: int,
) -> list[Section]:
    """A table per budget."""
    by, text, needles = {(r.method, r.share): r for r in rows}, {(t.method, t.share): t for t in texts}, needle_rows(records)
    times, sections = _times(records), []
    note = (
        "Mean ± standard deviation over sequences; one sequence has none. Captured is pooled by mass over layers. "
        "In all: keys, values, tables that decide what to read, and weights by the "
        f"sequence if {batch} are decoded at once, per layer and step. Alone: of dense, if one sequence is decoded and reads the "
        "weights for itself. ppl: perplexity of the text by the dense model's. ms: per token in this reference implementation. "
        "SQ8, SQ8/4: keys and values if every method's but the first and newest were stored as 8-bit codes, or with 4-bit values."
    )
    for share in sorted({s for _, s in [*by, *text]}):
        here = [m for m in methods if (m, share) in by or (m, share) in text]
        cells = {m: _cells(by, text, needles, times, (m, share), batch) for m in here}
        shown = [i for i in range(len(_HEAD)) if any(row[i] != "–" for row in cells.values())]
        lines: list[Row] = []
        for kind in [*KINDS, *sorted({kinds[m] for m in methods} - set(KINDS))]:
            members = [m for m in here if kinds[m] == kind]
            if members:
                lines.append(Row(group=kind, note=NOTES.get(kind, "")))
            lines += [Row([m, *(cells[m][i] for i in shown)], colour=colours[m], ours=m in OURS) for m in members]
        head = ["method", *(_HEAD[i] for i in shown)]
        sections.append(Section(f"Budget {percent(share)}", note, _table(head, lines)))
    return sections


def _cells(
    by: Mapping[Key, LayerRow], text: Mapping[Key, TextRow], needles: Mapping[Key, tuple[int, int]], times: Mapping[Key, float],
    key: Key, batch: int,
) -> list[Cell]:
    r, t, right, dense = by.get(key), text.get(key), needles.get(key), by.get(("dense", key[1]))
    cells: list[Cell] = ["–"] * len(_HEAD)
    if r:
        whole, alone = charged(r, batch), charged(r, 1)
        cells[:4] = [f"{x / 1e3:.0f}" for x in (r.kv_bytes, r.other_bytes, r.shared_bytes / batch, whole)]
        if dense:
            cells[4:6] = [f"{100 * x / dense.kv_bytes:.1f} %" for x in (whole, alone)]
        cells[6:8] = [plus_minus(r.captured, 1), plus_minus(r.error, 3)]
    if t:
        cells[8:11] = [plus_minus(t.kl, 4), plus_minus(t.top1, 1), plus_minus(t.perplexity_ratio, 3)]
    if right:
        cells[11] = f"{right[0]}/{right[1]}"
    if key in times:
        cells[12] = f"{times[key]:.0f}"
    for i, name in enumerate(STORAGE_CODES, 13):
        if r and name in r.coded_bytes:
            cells[i] = f"{r.coded_bytes[name] / 1e3:.0f}"
    return cells


def _table(head: Sequence[str], rows: Sequence[Row]) -> Table | None:
    return Table(head, rows) if rows else None


def plus_minus(value: tuple[float, float], digits: int) -> Cell:
    if math.isnan(value[0]):
        return "–"
    if math.isnan(value[1]):  # of one sequence
        return f"{value[0]:.{digits}f}"
    return Mean(f"{value[0]:.{digits}f}", f"{value[1]:.{digits}f}")


def _times(records: Mapping[str, Any]) -> dict[Key, float]:
    times: dict[Key, list[float]] = {}
    for key, row in records.items():
        if key.startswith("text/"):
            *_, method, share = key.split("/")
            times.setdefault((method, float(share)), []).append(1e3 * row["seconds_per_token"])
    return {key: spread(values)[0] for key, values in times.items()}


def _captured(records: Mapping[str, Any], layers: Collection[int] | None = None) -> dict[Key, dict[str, float]]:
    """Percent of the mass outside in these layers (None: all), by sequence."""
    sums: dict[Key, dict[str, list[float]]] = {}
    for key, row in records.items():
        kind, *rest = key.split("/")
        if kind == "layer" and (layers is None or int(rest[-3]) in layers) and not math.isnan(row["captured"]):
            pair = sums.setdefault((rest[-2], float(rest[-1])), {}).setdefault("/".join(rest[:-3]), [0.0, 0.0])
            pair[0], pair[1] = pair[0] + row["captured"], pair[1] + row["outside"]
    return {key: {name: 100 * a / b for name, (a, b) in sequences.items() if b} for key, sequences in sums.items()}


def _divergence(records: Mapping[str, Any]) -> dict[Key, dict[str, float]]:
    divergence: dict[Key, dict[str, float]] = {}
    for key, row in records.items():
        kind, *rest = key.split("/")
        if kind == "text":
            divergence.setdefault((rest[-2], float(rest[-1])), {})["/".join(rest[:-2])] = row["kl"]
    return divergence


def _difference(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[float, float]:
    return spread([first[x] - second[x] for x in first if x in second] or [math.nan])


def paired(records: Mapping[str, Any], methods: Sequence[str]) -> list[Section]:
    """Captured mass and KL of this library's indexes against each other method, on the same sequence at the same budget."""
    mass, kl, sections = _captured(records), _divergence(records), []
    shares, decoded = sorted({s for _, s in [*mass, *kl]}), {s for _, s in kl}
    for ours in OURS:
        lines = []
        for m in methods:
            cells: list[Cell] = []
            for share in shares:
                gained = _difference(mass.get((ours, share), {}), mass.get((m, share), {}))
                saved = _difference(kl.get((m, share), {}), kl.get((ours, share), {}))
                cells += [plus_minus(gained, 1)] + ([plus_minus(saved, 4)] if share in decoded else [])
            if m not in (*OURS, "dense") and any(cell != "–" for cell in cells):
                lines.append(Row([m, *cells]))
        columns = [(what, share) for share in shares for what in ("points", "KL") if what == "points" or share in decoded]
        head = ("against", *(f"{what}, {percent(share)}" for what, share in columns))
        note = (
            f"{ours} and each other method on the same sequences, mean ± standard deviation: points of captured attention "
            "gained, and KL saved in nats. Positive where this library's index is ahead."
        )
        sections.append(Section(f"In pairs: {ours}", note, _table(head, lines)))
    return sections


def verdict(records: Mapping[str, Any], kinds: Mapping[str, str], late: Collection[int]) -> list[str]:
    """A sentence per budget and index of this library, for all layers and for the late ones: whom it is ahead of, and whom not,
    of the methods that can be deployed. Each index has its own: to name the better one is to choose after measuring."""
    return [*_verdict(_captured(records), kinds, ""), *_verdict(_captured(records, late), kinds, ", late layers")]


def _verdict(mass: Mapping[Key, Mapping[str, float]], kinds: Mapping[str, str], where: str) -> list[str]:
    lines = []
    for share in sorted({s for _, s in mass}):
        for ours in (x for x in OURS if x in kinds):
            if (ours, share) not in mass:
                lines.append(f"{percent(share)}{where}: {ours} was not measured, or cannot read so little, see below.")
                continue
            against = {
                m: _difference(mass[ours, share], mass[m, share])
                for m in kinds if m not in (*OURS, *ORACLES) and (m, share) in mass
            }
            behind = [f"{m} ({_points((-d[0], d[1]))})" for m, d in against.items() if d[0] <= 0]
            ahead = len(against) - len(behind)
            of = f"{ahead} of the {len(against)} methods that can be deployed"
            said = f"{percent(share)}{where}: {ours} captures more than {of}"
            if behind:
                said += f", not more than {', '.join(behind)}"
            elif against:
                near = min(against, key=lambda m: against[m][0])
                said += f"; the nearest, {near}, by {_points(against[near])}"
            lines.append(f"{said}.")
    return lines


def _points(value: tuple[float, float]) -> str:
    return f"{value[0]:.1f} points" if math.isnan(value[1]) else f"{value[0]:.1f} ± {value[1]:.1f} points"


def missing(records: Mapping[str, Any]) -> Section:
    lines = []
    for key, row in records.items():
        kind, *rest = key.split("/")
        if kind == "missing":
            lines.append(Row([rest[0], percent(float(rest[1])), row["reason"]], text=True))
    note = "Methods that were asked for and cannot read so little: what they read when set to the least."
    return Section("Not possible at a budget", note, _table(("method", "budget", "why"), lines))


def cost(records: Mapping[str, Any]) -> Section:
    rows = []
    for c in records.get("cost", ()):
        rows.append(Row([c["name"], c["kind"], f"{c['bytes'] / 1e3:.1f}", f"{1e6 * c['seconds']:.0f}"]))
    note = "These replace softmax and need a model trained with them, so they have no quality here: only what a step costs."
    head = ("operator", "kind", "kB per layer and step", "µs per layer and step")
    return Section("Other architectures", note, _table(head, rows))
