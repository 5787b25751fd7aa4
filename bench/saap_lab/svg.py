"""Small drawings as SVG text for a report that needs no scripts and no other files: curves, a heat map, strips. Knows no methods.

Colours are CSS variables of the page where they must follow a dark or a light theme, else given by the caller. Written by hand
because matplotlib's SVG can do neither this nor a title for each point under the pointer, and a page needs no matplotlib then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """A line with a marker at each point."""

    label: str
    points: Points
    """(x, y), drawn in order of x."""
    colour: str
    dashed: bool = False
    """For a bound rather than a contender."""
    bold: bool = False
    """For what the page is about."""
    marker: str = "circle"
    """Of `MARKERS`."""


_CORNERS: dict[str, Points] = {
    "square": [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)], "triangle": [(0.0, -1.3), (1.2, 0.9), (-1.2, 0.9)],
    "diamond": [(0.0, -1.4), (1.4, 0.0), (0.0, 1.4), (-1.4, 0.0)],
}
MARKERS = {"circle": "●", "square": "■", "triangle": "▲", "diamond": "◆", "ring": "○"}
"""Shapes of points, and how a text shows them."""


def marker(shape: str, x: float, y: float, r: float, colour: str) -> str:
    """The start tag and attributes of a point's drawing, without its end."""
    if shape == "circle":
        return f'circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{colour}"'
    if shape == "ring":
        return f'circle cx="{x:.1f}" cy="{y:.1f}" r="{r - 0.4}" fill="var(--card)" stroke="{colour}" stroke-width="1.6"'
    corners = _path([(x + a * r, y + b * r) for a, b in _CORNERS[shape]])
    return f'polygon points="{corners}" fill="{colour}"'


def curves(
    lines: Sequence[Curve], x_label: str, y_label: str, log_y: bool = False, band: tuple[str, str] | None = None,
    narrow: bool = False,
) -> str:
    """Curves over a logarithmic x axis, each labelled at its end; band : the labels of two curves between which is shaded;
    narrow : for a telephone, where the text is as large as on a wide page."""
    lines = [line for line in lines if any(x > 0 and math.isfinite(y) and (y > 0 or not log_y) for x, y in line.points)]
    if not lines:
        return ""
    width, height, left, right, top, bottom = 860, 400, 62, 122, 14, 48
    if narrow:
        width, height, left, right = 350, max(340, 14 * len(lines) + 66), 46, 104
    ok = {c.label: sorted((x, y) for x, y in c.points if x > 0 and math.isfinite(y) and (y > 0 or not log_y)) for c in lines}
    xs, ys = ([p[i] for points in ok.values() for p in points] for i in (0, 1))
    x0, x1 = math.log10(min(xs)) - 0.03, math.log10(max(xs)) + 0.03
    y0, y1 = (math.log10(min(ys)), math.log10(max(ys))) if log_y else (min(0.0, *ys), max(ys) * 1.04 or 1.0)
    y1 = y1 if y1 > y0 else y0 + 1

    def at(x: float, y: float) -> tuple[float, float]:
        v = math.log10(y) if log_y else y
        across = left + (math.log10(x) - x0) / (x1 - x0) * (width - left - right)
        return across, height - bottom - (v - y0) / (y1 - y0) * (height - top - bottom)

    shape = "narrow" if narrow else "broad"
    spoken = f"{escape(y_label)} against {escape(x_label)}"
    parts = [f'<svg class="{shape}" viewBox="0 0 {width} {height}" role="img" aria-label="{spoken}">']
    for v in _ticks(y0, y1, log_y):
        y = at(min(xs), v)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{v:g}</text>')
    for v in _log_ticks(x0, x1)[:: 2 if narrow else 1]:
        x = at(v, max(ys))[0]
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - bottom + 17}" text-anchor="middle">{v:g}</text>')
    if band and all(label in ok for label in band):
        ring = [at(*p) for p in ok[band[0]]] + [at(*p) for p in reversed(ok[band[1]])]
        parts.append(f'<polygon class="band" points="{_path(ring)}"/>')
    ends = []
    for line in lines:
        points = [at(*p) for p in ok[line.label]]
        style = f'stroke="{line.colour}" stroke-width="{3.2 if line.bold else 1.8}"' + (
            ' stroke-dasharray="6 4"' if line.dashed else ""
        )
        parts.append(f'<polyline fill="none" {style} points="{_path(points)}"/>')
        for (x, y), (bytes_, value) in zip(points, ok[line.label], strict=True):
            title = f"<title>{escape(line.label)}: {value:.4g} at {bytes_:.4g}</title>"
            drawn = marker(line.marker, x, y, 4.5 if line.bold else 3.2, line.colour)
            parts.append(f"<{drawn}>{title}</{drawn.partition(' ')[0]}>")
        ends.append((points[-1], line))
    heights = _apart([e[0][1] for e in ends], 14)
    by_height = sorted(range(len(ends)), key=heights.__getitem__)
    highest = {i: top + 14 * place for place, i in enumerate(by_height)}  # so that none is cut off
    for i, (y, ((x, end), line)) in enumerate(zip(heights, ends, strict=True)):
        y = max(y, highest[i])
        weight = ' font-weight="700"' if line.bold else ""
        parts.append(f'<path class="leader" d="M{x + 5:.1f} {end:.1f} L{width - right + 14} {y:.1f}"/>')
        parts.append(f'<text x="{width - right + 18}" y="{y + 4:.1f}" fill="{line.colour}"{weight}>{escape(line.label)}</text>')
    middle = (height - bottom + top) / 2
    parts.append(
        f'<text class="axis" x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text class="axis" transform="translate(15 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return "".join([*parts, "</svg>"])


def heat_map(rows: Mapping[str, Mapping[int, float]], columns: Sequence[int], unit: str) -> str:
    """One row per label, one cell per column (a layer), 0 to 100; cells without a value are hatched."""
    left, cell, tall = 118, max(14, min(40, 760 // max(1, len(columns)))), 24
    width, height = left + cell * len(columns) + 8, tall * len(rows) + 30
    parts = [f'<svg viewBox="0 0 {width} {height}" style="max-width:{width * 1.25:.0f}px" role="img" aria-label="per layer">']
    for r, (label, values) in enumerate(rows.items()):
        y = r * tall
        parts.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{escape(label)}</text>')
        for c, layer in enumerate(columns):
            value = values.get(layer, math.nan)
            fill = "var(--empty)" if math.isnan(value) else _heat(value / 100)
            title = f"<title>{escape(label)}, layer {layer}: {value:.1f} {escape(unit)}</title>"
            box = f'x="{left + c * cell}" y="{y + 2}" width="{cell - 2}" height="{tall - 4}" rx="2"'
            parts.append(f'<rect {box} fill="{fill}">{title}</rect>')
            if cell >= 24 and not math.isnan(value):
                ink = "#fff" if value < 52 else "#102"
                x = left + c * cell + cell / 2 - 1
                parts.append(f'<text class="small" x="{x}" y="{y + 16}" text-anchor="middle" fill="{ink}">{value:.0f}</text>')
    for c, layer in enumerate(columns):
        if cell >= 20 or c % 2 == 0:
            x = left + c * cell + cell / 2 - 1
            parts.append(f'<text class="tick" x="{x}" y="{height - 12}" text-anchor="middle">{layer}</text>')
    return "".join([*parts, "</svg>"])


def strips(mass: Sequence[float], rows: Mapping[str, Sequence[float]], colours: Mapping[str, str], length: int) -> str:
    """A profile of ``mass`` along a text, on a square-root scale, and below it one strip per label: how much of each stretch."""
    left, wide, tall, top = 118, 780, 20, 96
    step = wide / max(1, len(mass))
    height = top + tall * len(rows) + 34
    parts = [f'<svg viewBox="0 0 {left + wide + 12} {height}" role="img" aria-label="where each method reads">']
    high = max(mass, default=0.0) or 1.0
    for i, value in enumerate(mass):
        h = (value / high) ** 0.5 * (top - 14)
        title = f"<title>{100 * value:.2f} % of the attention</title>"
        box = f'x="{left + i * step:.2f}" y="{top - 6 - h:.2f}" width="{step * 0.86:.2f}" height="{h:.2f}"'
        parts.append(f'<rect class="mass" {box}>{title}</rect>')
    parts.append(f'<text x="{left - 8}" y="{top - 12}" text-anchor="end">attention</text>')
    for r, (label, values) in enumerate(rows.items()):
        y = top + r * tall
        parts.append(f'<rect class="lane" x="{left}" y="{y + 1}" width="{wide}" height="{tall - 3}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(label)}</text>')
        for i, value in enumerate(values):
            if value > 0:
                opacity = 0.12 + 0.88 * min(1.0, value) ** 0.5
                box = f'x="{left + i * step:.2f}" y="{y + 1}" width="{step:.2f}" height="{tall - 3}"'
                title = f"<title>{escape(label)}: {100 * value:.0f} % of this stretch</title>"
                parts.append(f'<rect {box} fill="{colours.get(label, "#888")}" fill-opacity="{opacity:.2f}">{title}</rect>')
    for i in range(5):
        x, anchor = left + wide * i / 4, ("start", "middle", "middle", "middle", "end")[i]
        parts.append(f'<text class="tick" x="{x:.0f}" y="{height - 14}" text-anchor="{anchor}">token {length * i // 4}</text>')
    return "".join([*parts, "</svg>"])


def _path(points: Points) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade within the exponents [low, high], or as many more as make it four."""
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 2, 3, 5, 7), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), [1 + i / 5 for i in range(45)]):
        every = [float(f"{m * 10.0**e:.3g}") for e in range(math.floor(low), math.ceil(high) + 1) for m in steps]
        ticks = [v for v in every if low <= math.log10(v) <= high]
        if len(ticks) >= 4:
            break
    return ticks


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        ticks = _log_ticks(low, high)
        return ticks if len(ticks) < 9 else [v for v in ticks if math.log10(v) % 1 == 0]
    rough = 0.95 * (high - low) / 5
    step = next(
        m * 10.0 ** math.floor(math.log10(rough)) for m in (1, 2, 5, 10) if m * 10.0 ** math.floor(math.log10(rough)) >= rough
    )
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _apart(wanted: Sequence[float], least: float) -> list[float]:
    """Heights of labels: as wanted, but at least so far apart, those that crowd spread about their middle."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[float]] = []  # (sum of what would be the first label's height, members)
    for i in order:
        groups.append([wanted[i], 1])
        while len(groups) > 1:
            (a, n), (b, m) = groups[-2:]
            if b >= a + n * least:
                break
            groups[-2:] = [[(a * n + (b - n * least) * m) / (n + m), n + m]]
    heights = [first + k * least for first, members in groups for k in range(int(members))]
    apart = [0.0] * len(wanted)
    for i, height in zip(order, heights, strict=True):
        apart[i] = height
    return apart


def _heat(share: float) -> str:
    """Dark violet to pale yellow, through teal."""
    stops = ((45, 18, 77), (52, 84, 142), (33, 145, 140), (94, 201, 98), (250, 231, 90))
    x = max(0.0, min(1.0, share)) * (len(stops) - 1)
    i = min(int(x), len(stops) - 2)
    mixed = (round(a + (b - a) * (x - i)) for a, b in zip(stops[i], stops[i + 1], strict=True))
    return "#" + "".join(f"{c:02x}" for c in mixed)
