"""The picture of the README, docs/overview.svg, from what was measured: ``python bench/overview.py``.

Left, how long a decode step of one layer takes; right, what of the attention each method captures at equal bytes. Text, lines and
the theme (light or dark) are the viewer's own: no fonts, no scripts, no other files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PICTURE = ROOT / "docs" / "overview.svg"

STEPS = {
    "torch SDPA, group folded into rows": "torch, its best",
    "ours, dense": "saap_index, dense",
    "a bare read of K and V": "a bare read of K and V",
    "ours, selectivity 5%": "saap_index, 5 %",
}
"""Of `cpu_llama_128k.json`, and what the picture calls them."""

METHODS = {
    "topk_group": "exact top-k (bound)",
    "saap-own": "saap_index",
    "ivf": "plain IVF",
    "published": "SAAP as published",
    "recent": "recent window",
}
"""Of `cpu_compare_8k.txt`, likewise; the first is a bound, the second what the picture is about."""

STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1d2530; }
.title { font-size: 13px; font-weight: 600; }
.soft { fill: #67717e; }
.ours { fill: #d9480f; font-weight: 700; }
.bar { fill: #b9bfc7; }
.bar.ours { fill: #e4572e; }
.grid { stroke: #d9d9d9; }
.line { fill: none; stroke: #8d96a1; stroke-width: 1.8; }
.line.ours { fill: none; stroke: #e4572e; stroke-width: 3.2; }
.line.bound { stroke-dasharray: 5 4; }
@media (prefers-color-scheme: dark) {
  text { fill: #e8e6e1; }
  .soft { fill: #9aa4b0; }
  .ours { fill: #ff8a5c; }
  .bar { fill: #56606c; }
  .grid { stroke: #39424d; }
}
"""

WIDTH, HEIGHT, TOP = 860, 250, 50
SECOND = 420
"""Where the right half begins."""


def steps() -> dict[str, float]:
    """Milliseconds of one decode step."""
    times = json.loads((RESULTS / "cpu_llama_128k.json").read_text())["times"]
    return {name: times[key]["ms"] for key, name in STEPS.items()}


def captured() -> dict[str, dict[float, float]]:
    """Attention outside sinks and window, in percent, by method and share of the bytes in percent; all layers."""
    table = (RESULTS / "cpu_compare_8k.txt").read_text().split("late layers")[0]
    rows = [line.split() for line in table.splitlines() if line.strip()[:1].isdigit()]
    return {
        name: {float(share.rstrip("%")): float(mass) for share, method, mass, *_ in rows if method == key}
        for key, name in METHODS.items()
    }


def draw(times: Mapping[str, float], shares: Mapping[str, Mapping[float, float]]) -> str:
    """The picture as SVG."""
    label = "a decode step in milliseconds, and attention captured at equal bytes"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">',
        f"<style>{STYLE}</style>",
        *_bars(times),
        *_curves(shares),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _text(x: float, y: float, words: str, css: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(words)}</text>'


def _bars(times: Mapping[str, float]) -> list[str]:
    left, wide, tall = 150, 190, 44
    longest = max(times.values())
    parts = [
        _text(0, 14, "Time of a decode step, ms", "title"),
        _text(0, 31, "one layer, 128k tokens, bfloat16, two CPU cores", "soft"),
    ]
    for i, (name, time) in enumerate(times.items()):
        y = TOP + i * tall
        ours, width = "ours" if i == len(times) - 1 else "", wide * time / longest
        parts.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{tall - 18}" rx="2" class="bar {ours}"/>')
        parts.append(_text(left - 8, y + 17, name, ours, "end"))
        parts.append(_text(left + width + 6, y + 17, f"{time:.3g}", ours))
    return parts


def _curves(shares: Mapping[str, Mapping[float, float]]) -> list[str]:
    left, right, bottom = SECOND + 34, WIDTH - 128, HEIGHT - 38
    budgets = sorted(next(iter(shares.values())))

    def at(budget: float, percent: float) -> tuple[float, float]:
        across = left + 14 + (right - left - 28) * budgets.index(budget) / (len(budgets) - 1)
        return across, bottom - (bottom - TOP) * percent / 100

    parts = [
        _text(SECOND, 14, "Attention captured, %, at equal bytes", "title"),
        _text(SECOND, 31, "SmolLM2-135M, all 30 layers, 8k tokens", "soft"),
    ]
    for percent in range(0, 101, 25):
        y = at(budgets[0], percent)[1]
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(_text(left - 8, y + 4, f"{percent}", "soft", "end"))
    for budget in budgets:
        parts.append(_text(at(budget, 0)[0], bottom + 16, f"{budget:g} %", "soft", "middle"))
    parts.append(_text((left + right) / 2, HEIGHT - 6, "bytes read, of those of K and V", "soft", "middle"))
    ends = _apart([at(budgets[-1], line[budgets[-1]])[1] for line in shares.values()], 15)
    for i, ((name, line), end) in enumerate(zip(shares.items(), ends, strict=True)):
        css = ("bound", "ours")[i] if i < 2 else ""
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(budget, line[budget]) for budget in budgets))
        parts.append(f'<polyline points="{points}" class="line {css}"/>')
        parts.append(_text(right, end + 4, name, css if css == "ours" else ""))
    return parts


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Heights of labels, moved down where they would touch."""
    moved: dict[int, float] = {}
    above = float("-inf")
    for i in sorted(range(len(heights)), key=lambda i: heights[i]):
        above = moved[i] = max(heights[i], above + least)
    return [moved[i] for i in range(len(heights))]


if __name__ == "__main__":
    PICTURE.write_text(draw(steps(), captured()))
    print(f"wrote {PICTURE}")
