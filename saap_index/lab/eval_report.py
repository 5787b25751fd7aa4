"""Records of `saap eval` as tables, one JSON summary and plots. Knows records, nothing of how they came to be.

What `report` shows (layers pooled, early and late apart, every layer replaced, needles) and besides: figures layer by layer,
needles by length and depth, and what each target of attention mass came to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from .. import files
from . import report
from .quality import spread
from .report import LayerRow

Records = Mapping[str, Any]
MASS = "saap-mass-"
"""Begins the name of a method with a target."""

_FIRST = ("saap", "published", "topk", "topk_group", "ivf", "quest", "recent", "random")


def as_text(records: Records, depth: int) -> str:
    """Every table that the records have figures for."""
    sequences = {key.split("/")[1] for key in records if key.startswith(("layer/", "text/"))}
    spreads = "spread: standard deviation over sequences" if len(sequences) > 1 else "one has no spread: (-)"
    head = [f"{len(sequences)} sequence{'s' * (len(sequences) > 1)}; {spreads}"] if sequences else []
    tables = [*_layer_tables(records), *_mass_table(records), *_needle_table(records)]
    parts = [*head, report.as_text(records, depth).rstrip(), *tables]
    return "\n".join(parts) + "\n"


def layer_numbers(records: Records) -> list[int]:
    return sorted({int(key.split("/")[-3]) for key in records if key.startswith("layer/")})


def by_layer(records: Records) -> dict[int, list[LayerRow]]:
    """Rows of each layer measured, of methods that choose."""
    return {x: [row for row in report.layer_rows(records, [x]) if row.method != "dense"] for x in layer_numbers(records)}


def _layer_tables(records: Records) -> list[str]:
    rows, lines = by_layer(records), []
    for share in sorted({row.share for found in rows.values() for row in found}):
        at = {layer: {row.method: row for row in found if row.share == share} for layer, found in rows.items()}
        names = _ordered({name for found in at.values() for name in found})
        lines += [
            "", f"layer by layer at {share:.1%}: mass captured %, output error, kB of K, V and tables",
            f"{'layer':>6}" + "".join(f"{name:>26}" for name in names),
        ]  # fmt: skip
        for layer, found in at.items():
            cells = []
            for name in names:
                row = found.get(name)
                kilobytes = (row.kv_bytes + row.other_bytes) / 1e3 if row else 0.0
                cells.append(f"{row.captured[0]:7.1f} {row.error[0]:8.4f} {kilobytes:8.0f}" if row else "")
            lines.append(f"{layer:6}" + "".join(f"{cell:>26}" for cell in cells))
    return lines


def masses(records: Records) -> dict[str, dict[str, float]]:
    """Per target: mean of all attention that was read (sinks and window included), the share of KV heads whose mean over texts
    reaches the target, the worst head, and tokens read."""
    totals: dict[str, dict[tuple[str, int], list[float]]] = {}
    tokens: dict[str, list[float]] = {}
    for key, row in records.items():
        method = key.split("/")[-2] if key.startswith("layer/") else ""
        if method.startswith(MASS):
            tokens.setdefault(method, []).append(row["tokens"])
            for head, total in enumerate(row["total_per_head"]):
                totals.setdefault(method, {}).setdefault((key.split("/")[-3], head), []).append(total)
    found = {}
    for method, heads in totals.items():
        means, target = [spread(values)[0] for values in heads.values()], float(method.removeprefix(MASS))
        found[method] = {
            "target": target, "mean": spread(means)[0], "heads_reaching": sum(x >= target for x in means) / len(means),
            "least": min(means), "tokens": spread(tokens[method])[0], "heads": len(means),
        }  # fmt: skip
    return found


def _mass_table(records: Records) -> list[str]:
    found = masses(records)
    if not found:
        return []
    lines = ["", "targets of attention mass, sinks and window included: mean over layers and KV heads, heads that reach it"]
    for name, m in sorted(found.items()):
        lines.append(
            f"{name:<16} mean {m['mean']:.4f}   {m['heads_reaching']:.1%} of {m['heads']} heads   least {m['least']:.3f}   "
            f"{m['tokens']:.0f} tokens"
        )
    return lines


def needle_cells(records: Records) -> dict[tuple[str, float], dict[tuple[str, int, float], bool]]:
    """By method and share: (kind, length, depth) -> whether the answer was right."""
    found: dict[tuple[str, float], dict[tuple[str, int, float], bool]] = {}
    for key, row in records.items():
        if key.startswith("needle/"):
            _, name, method, share = key.split("/")
            kind, length, depth = name.split(".", 2)
            found.setdefault((method, float(share)), {})[kind, int(length), float(depth)] = bool(row["right"])
    return found


def _needle_table(records: Records) -> list[str]:
    cells = needle_cells(records)
    pairs = {(kind, length) for found in cells.values() for kind, length, _ in found}
    if not pairs:
        return []
    columns = sorted(pairs, key=lambda x: (x[0] != "passkey", x))
    lines = ["", "needles by length in tokens: a letter for each depth, first to last; x right, . wrong"]
    lines.append(f"{'share':>6} {'method':<16}" + "".join(f"{kind} {length}".rjust(17) for kind, length in columns))
    for (method, share), found in sorted(cells.items(), key=lambda x: (x[0][1], _rank(x[0][0]))):
        row = []
        for kind, length in columns:
            depths = sorted(depth for k, n, depth in found if (k, n) == (kind, length))
            row.append("".join("x" if found[kind, length, depth] else "." for depth in depths))
        lines.append(f"{share:6.1%} {method:<16}" + "".join(f"{cell:>17}" for cell in row))
    return lines


def summary(records: Records, depth: int) -> dict[str, Any]:
    """Everything in the tables as plain data; what is not a number is None."""
    late = report.late_layers(depth)
    groups = {"all": None, "late": late, "early": range(late.start)}
    found = {
        "layers": {name: [asdict(r) for r in report.layer_rows(records, group)] for name, group in groups.items()},
        "each_layer": {str(layer): [asdict(r) for r in rows] for layer, rows in by_layer(records).items()},
        "end": [asdict(r) for r in report.text_rows(records)],
        "targets": masses(records),
        "needles": [
            {"method": method, "share": share, "kind": kind, "length": length, "depth": place, "right": right}
            for (method, share), cells in sorted(needle_cells(records).items())
            for (kind, length, place), right in sorted(cells.items())
        ],
    }
    plain: dict[str, Any] = _plain(found)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(records: Records, depth: int, folder: Path) -> list[Path]:
    """`report.plot`, output error against bytes, captured mass by layer at each share, and right answers by length and depth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = report.plot(records, depth, folder)

    def save(figure: Any, name: str) -> None:
        written.append(folder / f"{name}.png")
        files.write_file(written[-1], partial(figure.savefig, dpi=120, bbox_inches="tight"))
        pyplot.close(figure)

    pooled = [row for row in report.layer_rows(records) if row.method != "dense"]
    if pooled:
        figure, axes = pyplot.subplots(figsize=(7, 5))
        for name in _ordered({row.method for row in pooled}):
            points = sorted(((r.kv_bytes + r.other_bytes) / 1e3, r.error[0]) for r in pooled if r.method == name)
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="kB read per step and layer", ylabel="output error, relative")
        axes.grid(alpha=0.3)
        axes.legend()
        save(figure, "error_all")
    rows = by_layer(records)
    for share in sorted({row.share for found in rows.values() for row in found}):
        figure, axes = pyplot.subplots(figsize=(9, 5))
        for name in _ordered({row.method for found in rows.values() for row in found if row.share == share}):
            points = [(x, r.captured[0]) for x, found in rows.items() for r in found if (r.method, r.share) == (name, share)]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xlabel="layer", ylabel="attention mass captured outside sinks and window, %", title=f"{share:.1%} of the tokens")
        axes.grid(alpha=0.3)
        axes.legend()
        save(figure, f"layers_{share:g}")
    cells = needle_cells(records)
    for kind in sorted({kind for found in cells.values() for kind, _, _ in found}):
        save(_grid(pyplot, kind, cells), f"needles_{kind}")
    return written


def _grid(pyplot: Any, kind: str, cells: Mapping[tuple[str, float], Mapping[tuple[str, int, float], bool]]) -> Any:
    """A small map of right and wrong answers for each method and share: length to the right, depth downwards."""
    order = sorted(cells, key=lambda x: (x[1], _rank(x[0])))
    places = {(n, depth) for found in cells.values() for k, n, depth in found if k == kind}
    lengths, depths = sorted({n for n, _ in places}), sorted({depth for _, depth in places})
    columns = min(4, len(order))
    lines = -(-len(order) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(2.6 * columns, 2.2 * lines), squeeze=False)
    for at, box in enumerate(axes.flat):
        if at >= len(order):
            box.axis("off")
            continue
        found = cells[order[at]]
        box.imshow(
            [[float(found.get((kind, n, x), math.nan)) for n in lengths] for x in depths], cmap="RdYlGn", vmin=0, vmax=1,
            aspect="auto",
        )  # fmt: skip
        box.set_xticks(range(len(lengths)), lengths)
        box.set_yticks(range(len(depths)), [f"{x:g}" for x in depths])
        box.set_title(f"{order[at][0]} {order[at][1]:.0%}", fontsize=9)
    figure.suptitle(f"{kind}: right (green) or wrong (red), by length in tokens and depth")
    figure.tight_layout()
    return figure


def _rank(method: str) -> int:
    return _FIRST.index(method) if method in _FIRST else -1


def _ordered(names: Sequence[str] | set[str]) -> list[str]:
    return sorted(names, key=lambda name: (_rank(name), name))
