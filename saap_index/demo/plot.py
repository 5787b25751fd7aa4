"""The demo's picture: captured attention mass against bytes read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import files
from ..errors import MissingDependencyError
from .evaluate import Table, pooled

STYLES = {
    "routers": ("#d1495b", "o", "-"),
    "saap_index": ("#e59500", "D", "-"),
    "published": ("#8d5a97", "s", "-"),
    "ivf": ("#30638e", "^", "-"),
    "recent": ("#888888", "v", "--"),
    "topk_group": ("#222222", None, ":"),
}


def mass_against_bytes(table: Table, layers: Sequence[int], names: Mapping[str, str], path: Path) -> None:
    """One curve per method, pooled over the layers: bytes read per step and layer (K, V and tables) against captured mass."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("the plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    shares = sorted({share for _, _, share in table})
    for method, name in names.items():
        color, marker, line = STYLES[method]
        size = []
        for share in shares:
            rows = [table[method, layer, share] for layer in layers]
            size.append(sum(r.kv_bytes + r.other_bytes for r in rows) / len(rows) / 1e6)
        mass = [pooled(table, method, share, layers)[0] for share in shares]
        axes.plot(size, mass, line, color=color, marker=marker, label=name)
    for share, at in zip(shares, size, strict=True):
        axes.annotate(f"{share:.0%}", (at, 2), ha="center", fontsize=8, color="#666666")
    axes.set_xlabel("MB read per step and layer (float32 K, V, tables; router weights apart)")
    axes.set_ylabel("attention mass captured outside\nsinks and window, %")
    axes.set_ylim(0, 101)
    numbers = ", ".join(map(str, layers))
    axes.set_title(f"SmolLM2-135M-Instruct (from Q4_1), 8192 tokens of unseen text, layers {numbers}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.06))
    files.write_file(path, lambda draft: figure.savefig(draft, dpi=150))
    pyplot.close(figure)
