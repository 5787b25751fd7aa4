"""How methods and their groups are drawn: one colour and marker for the page, PNG and PDF. Plain data."""

from __future__ import annotations

COLOURS = {
    "saap": "#e4572e", "saap-own": "#d6256f", "saap-even": "#f2935c", "published": "#d98324", "loki": "#2e86de",
    "scfa": "#45a5c4", "scfa-centred": "#1f8a9c", "scfa-drop": "#7d5ba6", "corm": "#8e5bc9", "sparsek": "#c06ad6",
    "moa": "#2d936c", "eigen": "#a67c00", "quest": "#78828d", "moments": "#8a6f5c", "ivf": "#6d8f3c", "random": "#98a1a9",
    "recent": "#7f8c8d", "topk": "#7788a0", "topk_weighted": "#3f6fb5", "dense": "#7788a0",
}
"""Legible on white and on dark."""

ORACLE, WINDOW = "topk_group", "recent"
"""Bounds of every drawing. ORACLE : a token is read for all heads of a group, so their summed probability is the most that so
many bytes can capture; drawn in the colour of the text. WINDOW : what must be beaten."""

OURS = ("saap", "saap-own")

MARKERS = {
    "query-adaptive index": "circle", "eviction": "square", "static pattern": "triangle", "compression": "diamond",
    "yardstick": "ring",
}
"""By group of methods."""

_SPARE = ("#d81b60", "#00897b", "#5e35b1", "#7cb342")


def colour(method: str, ink: str, number: int = 0) -> str:
    """ink : the colour of text; number : of a method that has no colour of its own."""
    return ink if method == ORACLE else COLOURS.get(method, _SPARE[number % len(_SPARE)])
