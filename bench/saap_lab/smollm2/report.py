"""The demo's table and picture: every method and layer at one budget, and captured mass against bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import plots
from . import model
from .evaluate import Table, pooled

NAMES = {
    "routers": "index, trained routers",
    "saap_index": "index, trained here",
    "published": "SAAP as published",
    "ivf": "plain IVF, per prompt",
    "recent": "recent window",
    "topk_group": "exact top-k (bound)",
}
DRAWN_AS = {"routers": "saap", "saap_index": "saap-own"}
"""Colours of the comparison's methods."""
SHARES = (0.02, 0.05, 0.1, 0.2)
SHOWN = 0.05
LATE = 14


def as_text(table: Table, layers: Sequence[int], training: int, unseen: int) -> list[str]:
    """Every method and layer at one budget, then pooled over the late and over all layers."""
    lines = [
        "",
        f"{model.TITLE}, 8192 tokens of text, {training} training and {unseen} unseen sequences;",
        "one selection per KV head. Rows late and all: mass pooled by mass over layers, error the mean of layers.",
        f"Budget {SHOWN:.0%} of the tokens outside 4 sinks and the newest 128. mass: attention captured of what lies outside;",
        "error: of the output, relative; tables: offsets, row lists, centroids; router: weights, once a step (batch 1).",
        "",
        f"{'layer':>6}  {'method':22} {'tokens':>7} {'K+V kB':>8} {'tables kB':>10} {'router kB':>10} {'mass %':>7} {'error':>6}",
    ]
    for layer in layers:
        for method, name in NAMES.items():
            row = table[method, layer, SHOWN]
            sizes = f"{row.kv_bytes / 1e3:8.0f} {row.other_bytes / 1e3:10.0f} {row.router_bytes / 1e3:10.0f}"
            lines.append(f"{layer:6}  {name:22} {row.tokens:7.0f} {sizes} {row.mass_percent:7.1f} {row.error:6.3f}")
    for title, group in (("late", [x for x in layers if x >= LATE]), ("all", list(layers))):
        if group:
            for method, name in NAMES.items():
                mass, _, error = pooled(table, method, SHOWN, group)
                lines.append(f"{title:>6}  {name:22} {'':7} {'':8} {'':10} {'':10} {mass:7.1f} {error:6.3f}")
    return lines


def plot(table: Table, layers: Sequence[int], path: Path) -> None:
    """One curve per method, pooled over the layers: bytes read per step and layer (K, V and tables) against captured mass."""
    points: dict[str, list[tuple[float, float]]] = {}
    for method in NAMES:
        for share in SHARES:
            rows = [table[method, layer, share] for layer in layers]
            size = sum(r.kv_bytes + r.other_bytes for r in rows) / len(rows) / 1e6
            points.setdefault(DRAWN_AS.get(method, method), []).append((size, pooled(table, method, share, layers)[0]))
    plots.curves(
        path, points, "MB read per step and layer (float32 K, V, tables; router weights apart)",
        "attention mass captured outside sinks and window, %", log="", limits=(0, 101),
        title=f"{model.TITLE}, unseen text, layers {', '.join(map(str, layers))}",
        labels={DRAWN_AS.get(method, method): name for method, name in NAMES.items()},
    )
