"""Records of an evaluation as tables: mean and spread over sequences, early and late layers apart, beside the bytes read."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import files
from .quality import spread

LATE = 0.45
"""Layers from this share of the model's depth on are late: in early ones a few frequent tokens draw much of the attention."""


@dataclass(frozen=True)
class LayerRow:
    """A method at a share over a group of layers: captured mass in percent (mean, spread over sequences), output error, bytes."""

    method: str
    share: float
    captured: tuple[float, float]
    error: tuple[float, float]
    tokens: float
    kv_bytes: float
    other_bytes: float
    shared_bytes: float


@dataclass(frozen=True)
class TextRow:
    """A method at a share in every layer: KL in nats, agreement in percent, perplexity ratio; tokens read per layer and step."""

    method: str
    share: float
    kl: tuple[float, float]
    top1: tuple[float, float]
    perplexity_ratio: tuple[float, float]
    tokens: float
    kv_bytes: float
    other_bytes: float
    sequences: int


def layer_rows(records: Mapping[str, Any], layers: Iterable[int] | None = None) -> list[LayerRow]:
    """Pool over layers (None: all): mass weighted by mass within a sequence, then mean and spread over the sequences."""
    wanted = None if layers is None else set(layers)
    groups: dict[tuple[str, float], dict[str, list[Mapping[str, Any]]]] = {}
    for key, row in records.items():
        kind, *rest = key.split("/")
        if kind != "layer":
            continue
        *name, layer, method, at = rest
        if wanted is None or int(layer) in wanted:
            groups.setdefault((method, float(at)), {}).setdefault("/".join(name), []).append(row)
    found = []
    for (method, share), by_text in groups.items():
        captured = [100 * sum(r["captured"] for r in rows) / sum(r["outside"] for r in rows) for rows in by_text.values()]
        errors = [sum(r["error"] for r in rows) / len(rows) for rows in by_text.values()]
        every = [r for rows in by_text.values() for r in rows]
        means = (sum(r[x] for r in every) / len(every) for x in ("tokens", "kv_bytes", "other_bytes", "shared_bytes"))
        found.append(LayerRow(method, share, spread(captured), spread(errors), *means))
    return sorted(found, key=lambda r: (r.share, -(r.captured[0] if not math.isnan(r.captured[0]) else -1)))


def text_rows(records: Mapping[str, Any]) -> list[TextRow]:
    """End to end: mean and spread over the sequences."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for key, row in records.items():
        kind, *rest = key.split("/")
        if kind == "text":
            groups.setdefault((rest[-2], float(rest[-1])), []).append(row)
    found = []
    for (method, share), rows in groups.items():
        kl, top1 = (spread([r[x] for r in rows]) for x in ("kl", "top1"))
        ratio = spread([math.exp(r["log_perplexity_ratio"]) for r in rows])
        tokens, kv_bytes, other_bytes = (sum(r[x] for r in rows) / len(rows) for x in ("tokens", "kv_bytes", "other_bytes"))
        percent = (100 * top1[0], 100 * top1[1])
        found.append(TextRow(method, share, kl, percent, ratio, tokens, kv_bytes, other_bytes, len(rows)))
    return sorted(found, key=lambda r: (r.share, r.kl[0]))


def needle_rows(records: Mapping[str, Any]) -> dict[tuple[str, float], tuple[int, int]]:
    """Right answers and questions by method and share."""
    found: dict[tuple[str, float], tuple[int, int]] = {}
    for key, row in records.items():
        kind, *rest = key.split("/")
        if kind == "needle":
            right, asked = found.get((rest[-2], float(rest[-1])), (0, 0))
            found[rest[-2], float(rest[-1])] = right + bool(row["right"]), asked + 1
    return found


def layers_replaced(records: Mapping[str, Any], depth: int) -> str:
    """How many layers of the model had another attention when its answers were measured, in words; '' if they were not."""
    counts = {len(row["per_layer"]) for key, row in records.items() if key.startswith("text/") and "per_layer" in row}
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    if low == high == depth:
        return f"every layer replaced ({depth})"
    return f"{high if low == high else f'{low} to {high}'} of {depth} layers replaced, the others as the model has them"


def deviation(value: float, digits: int) -> str:
    """A standard deviation in brackets; a single sequence has none."""
    return "(-)" if math.isnan(value) else f"({value:.{digits}f})"


def late_layers(depth: int) -> range:
    return range(math.ceil(LATE * depth), depth)


def print_report(records: Mapping[str, Any], depth: int) -> None:
    """Every table that the records have figures for."""
    late = late_layers(depth)
    for title, layers in (("all layers measured", None), ("late layers", late), ("early layers", range(late.start))):
        rows = layer_rows(records, layers)
        if rows:
            print(
                f"\n{title}: attention mass captured outside sinks and window, pooled by mass over layers, and output error, the "
                "mean of layers (mean, spread over sequences)"
            )
            print(_line("share", "method", "mass %", "", "error", "", "tokens", "kB K, V", "kB other", "kB weights"))
        for r in rows:
            spreads = deviation(r.captured[1], 1), deviation(r.error[1], 4)
            figures = (f"{r.captured[0]:.1f}", spreads[0], f"{r.error[0]:.4f}", spreads[1])
            kilobytes = (f"{x / 1e3:.1f}" for x in (r.kv_bytes, r.other_bytes, r.shared_bytes))
            print(_line(f"{r.share:.1%}", r.method, *figures, f"{r.tokens:.0f}", *kilobytes))
    texts = text_rows(records)
    if texts:
        where = layers_replaced(records, depth) or "layers replaced"
        print(f"\n{where}, {texts[0].sequences} sequences: against the dense model (mean, spread over sequences)")
        print(_line("share", "method", "KL", "", "same 1st %", "", "perplex. x", "", "tokens", "MB a token"))
    for t in texts:
        figures = (f"{t.kl[0]:.4f}", deviation(t.kl[1], 4), f"{t.top1[0]:.1f}", deviation(t.top1[1], 1))
        ratio = (f"{t.perplexity_ratio[0]:.4f}", deviation(t.perplexity_ratio[1], 4))
        print(_line(f"{t.share:.1%}", t.method, *figures, *ratio, f"{t.tokens:.0f}", f"{(t.kv_bytes + t.other_bytes) / 1e6:.2f}"))
    needles = needle_rows(records)
    if needles:
        print("\nneedles, the question processed by the method too: right answers")
    for (method, share), (right, asked) in sorted(needles.items(), key=lambda x: (x[0][1], x[0][0])):
        print(f"{share:6.1%} {method:<14} {right:3d} of {asked}")


def as_text(records: Mapping[str, Any], depth: int) -> str:
    """What `print_report` prints."""
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        print_report(records, depth)
    return written.getvalue()


def _line(share: str, method: str, *cells: str) -> str:
    return f"{share:>6} {method:<14}" + "".join(f"{cell:>11}" for cell in cells)


def plot(records: Mapping[str, Any], depth: int, folder: Path) -> list[Path]:
    """Mass against bytes (all and late layers) and KL against bytes, as PNG files; those there is nothing for are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: list[tuple[str, str, Mapping[str, Sequence[tuple[float, float]]]]] = []
    for title, layers in (("mass_all", None), ("mass_late", late_layers(depth))):
        points: dict[str, list[tuple[float, float]]] = {}
        for r in layer_rows(records, layers):
            points.setdefault(r.method, []).append(((r.kv_bytes + r.other_bytes) / 1e3, r.captured[0]))
        curves.append((title, "attention mass captured outside sinks and window, %", points))
    points = {}
    for t in text_rows(records):
        points.setdefault(t.method, []).append(((t.kv_bytes + t.other_bytes) / 1e3, t.kl[0]))
    curves.append(("kl", "KL to the dense model, nats", points))
    written = []
    for title, axis, by_method in curves:
        if not by_method:
            continue
        figure, axes = pyplot.subplots(figsize=(7, 5))
        for method, found in by_method.items():
            axes.plot(*zip(*sorted(found), strict=True), marker="o", label=method)
        axes.set(xscale="log", xlabel="kB read per step" + (" and layer" if title != "kl" else ", all layers"), ylabel=axis)
        if title == "kl":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
        written.append(folder / f"{title}.png")
        files.write_file(written[-1], partial(figure.savefig, dpi=120, bbox_inches="tight"))
        pyplot.close(figure)
    return written
