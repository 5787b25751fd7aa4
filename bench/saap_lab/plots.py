"""Records as pictures in files, PNG, PDF or SVG by the name's ending, all in one style, the same bytes for the same records.

Needs matplotlib; the page draws by `svg`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from saap_index import files
from saap_index.errors import MissingDependencyError

from . import palette, report

INK = "#1d2530"
_MARKERS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "ring": "o"}
_STYLE: Any = {
    "figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 10, "axes.edgecolor": "#67717e",
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": "#67717e", "ytick.color": "#67717e", "axes.grid": True,
    "axes.grid.which": "both", "grid.color": "#eeece6", "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "legend.fontsize": 9, "savefig.dpi": 130, "pdf.fonttype": 42,
    "svg.hashsalt": "saap_lab", "figure.facecolor": "white", "legend.handlelength": 1.6,
}

Points = Sequence[tuple[float, float]]


@contextmanager
def _figure(path: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 5)) -> Iterator[tuple[Any, Any]]:
    """A figure in the style of all, and its axes, an array (rows, columns); written to ``path`` at the end."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
        try:
            yield figure, axes
            undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(path.suffix[1:])
            files.write_file(path, partial(figure.savefig, metadata=undated))
        finally:
            pyplot.close(figure)


def curves(
    path: Path, points: Mapping[str, Points], x_label: str, y_label: str, *, title: str = "", log: str = "x",
    labels: Mapping[str, str] | None = None, kinds: Mapping[str, str] | None = None, limits: tuple[float, float] | None = None,
) -> Path:
    """One curve per method, in order of x.

    points : (x, y) by method
    log : axes with a logarithmic scale, of "", "x", "xy"
    labels : what the legend says of a method, its name by default
    kinds : group of a method, which chooses the marker
    limits : of the y axis
    """
    with _figure(path) as (_, grid):
        axes = grid[0, 0]
        for number, (method, each) in enumerate(points.items()):
            shape = palette.MARKERS.get((kinds or {}).get(method, ""), "circle")
            style = "--" if method in (palette.ORACLE, palette.WINDOW) else "-"
            axes.plot(
                *zip(*sorted(each), strict=True), style, color=palette.colour(method, INK, number), marker=_MARKERS[shape],
                markerfacecolor="white" if shape == "ring" else None, markersize=5, label=(labels or {}).get(method, method),
                linewidth=2.6 if method in palette.OURS else 1.4, zorder=3 if method in palette.OURS else 2,
            )
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
        for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            if name in log:
                axes.set(**{f"{name}scale": "log"})
                axis.set_major_formatter(_plain_number)
                axis.set_minor_formatter(_plain_number)
        if limits:
            axes.set_ylim(limits)
        axes.legend()
    return path


def _plain_number(value: float, position: int | None = None) -> str:
    """300 and not 3 x 10^2; without a label where it would be crowded."""
    return f"{value:g}" if f"{value:e}"[:3] in ("1.0", "2.0", "3.0", "5.0", "7.0") else ""


def scatter(path: Path, panels: Mapping[str, Mapping[str, tuple[float, float]]], x_label: str, y_label: str) -> Path:
    """A panel per title, a named point per method, both axes logarithmic."""
    with _figure(path, 1, len(panels), (5 * len(panels), 4.2)) as (_, grid):
        for axes, (title, points) in zip(grid[0], panels.items(), strict=True):
            for method, place in points.items():
                ours = method in palette.OURS
                axes.scatter(*place, color=palette.COLOURS["saap" if ours else "loki"], zorder=2 + ours)
                axes.annotate(method, place, fontsize=8, xytext=(4, 3), textcoords="offset points")
            axes.set(title=title, xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
    return path


def write(records: report.Records, depth: int, folder: Path, ending: str = "png") -> list[Path]:
    """Every picture that the records have figures for: mass (all and late layers), output error and KL against bytes, captured
    mass by layer at each share, drift, RULER's mean by length, right answers to needles by length and depth."""
    kinds = {key.split("/")[-2]: row["kind"] for key, row in records.items() if isinstance(row, dict) and "kind" in row}
    pooled = {"mass_all": report.layer_rows(records), "mass_late": report.layer_rows(records, report.late_layers(depth))}
    per_layer, mass = "kB read per step and layer", "attention mass captured outside sinks and window, %"
    draw, written = partial(curves, kinds=kinds), []
    for name, rows in pooled.items():
        if rows:
            points = _by_method([(r.method, (r.kv_bytes + r.other_bytes) / 1e3, r.captured[0]) for r in rows])
            written.append(draw(folder / f"{name}.{ending}", points, per_layer, mass))
    texts = report.text_rows(records)
    if texts:
        points = _by_method([(t.method, (t.kv_bytes + t.other_bytes) / 1e3, t.kl[0]) for t in texts])
        where = "kB read per step, layers replaced"
        written.append(draw(folder / f"kl.{ending}", points, where, "KL to the dense model, nats", log="xy"))
    rows = [row for row in pooled["mass_all"] if row.method != "dense"]
    if rows:
        points = _by_method([(r.method, (r.kv_bytes + r.other_bytes) / 1e3, r.error[0]) for r in rows])
        written.append(draw(folder / f"error_all.{ending}", points, per_layer, "output error, relative", log="xy"))
    by_layer = report.by_layer(records)
    for share in sorted({row.share for rows in by_layer.values() for row in rows}):
        points = _by_method([(r.method, x, r.captured[0]) for x, rows in by_layer.items() for r in rows if r.share == share])
        title = f"{share:.1%} of the tokens"
        written.append(draw(folder / f"layers_{share:g}.{ending}", points, "layer", mass, title=title, log=""))
    drifts = report.drift_rows(records)
    for share in sorted({share for method, share in drifts if method != "dense"}):
        points = _by_method([(m, x, kl) for (m, s), each in drifts.items() if s == share for x, kl, _ in each])
        where, title = "tokens after the prompt, written by the dense model", f"{share:.1%} of the tokens"
        path = folder / f"drift_{share:g}.{ending}"
        written.append(draw(path, points, where, "KL to the dense model, nats", title=title, log="y"))
    averages = report.ruler_averages(records)
    if averages:
        names = {key: key[0] if key[0] == "dense" else f"{key[0]} {key[1]:.1%}" for key in averages}
        points = {names[key]: list(each.items()) for key, each in averages.items()}
        written.append(
            curves(folder / f"ruler.{ending}", points, "tokens", "mean of RULER's tasks, %", kinds=kinds, limits=(0, 100))
        )
    cells = report.needle_cells(records)
    for kind in sorted({kind for answers in cells.values() for kind, _, _ in answers}):
        written.append(_needles(folder / f"needles_{kind}.{ending}", kind, cells))
    return written


def _by_method(rows: Sequence[tuple[str, float, float]]) -> dict[str, Points]:
    methods = report.ordered({method for method, _, _ in rows})
    return {method: [(x, y) for name, x, y in rows if name == method] for method in methods}


def _needles(path: Path, kind: str, cells: Mapping[tuple[str, float], Mapping[tuple[str, int, float], bool]]) -> Path:
    """A small map of right and wrong answers for each method and share: length to the right, depth downwards."""
    order = sorted(cells, key=lambda key: (key[1], report.rank(key[0])))
    places = {(n, depth) for answers in cells.values() for k, n, depth in answers if k == kind}
    lengths, depths = sorted({n for n, _ in places}), sorted({depth for _, depth in places})
    columns = min(4, len(order))
    lines = -(-len(order) // columns)
    with _figure(path, lines, columns, (2.6 * columns, 2.2 * lines)) as (figure, grid):
        for axes in grid.flat[len(order) :]:
            axes.axis("off")
        for axes, (method, share) in zip(grid.flat, order, strict=False):
            answers = cells[method, share]
            right = [[float(answers.get((kind, n, x), math.nan)) for n in lengths] for x in depths]
            axes.imshow(right, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
            axes.grid(False)
            axes.set_xticks(range(len(lengths)), lengths)
            axes.set_yticks(range(len(depths)), [f"{x:g}" for x in depths])
            axes.set_title(f"{method} {share:.0%}", fontsize=9)
        figure.suptitle(f"{kind}: right (green) or wrong (red), by length in tokens and depth")
    return path
