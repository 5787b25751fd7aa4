"""What a layer's routers are worth on sequences that were held out: attention captured, output error, and loss by budget.

Replays queries as an index would have them: over the segments that the sequence had at their position, runs by the router's
score. Reads rows in the order of score instead of calling an index, so that every budget is measured in one go.

Axes: h KV heads, g query heads per KV head, q queries, n tokens, d key dim, e value dim, l lists, s shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import TorchBackend
from ..invlists.layout import Layout
from ..precision import full_precision
from ..routing.quantizer import KeyQuantizer
from ..routing.rope import Rope
from ..routing.router import QueryRouter

GRID = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Shares of the sealed tokens at which the loss is measured."""

SHARES = (0.02, 0.05, 0.1, 0.2)
"""Shares of all tokens outside sinks and window at which figures are reported."""


MEASURED_QUERIES = 32
"""Query positions of a sequence that are replayed."""


@dataclass(frozen=True)
class HeldOut:
    """One layer of one sequence that was in no training, with some of its queries. keys : float32 (h, n, d) and queries :
    (h, g, q, d) as attention sees them; coarse and routed : the same as lists and router see them; values : (h, n, e);
    positions : int64 (q,)."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    coarse: Tensor
    routed: Tensor
    positions: np.ndarray

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, queries: Tensor, positions: np.ndarray, rope: Rope | None) -> HeldOut:
        """Of keys (h, n, d), values (h, n, e), queries (hq, q, d) at int64 (q,) positions up to `MEASURED_QUERIES`, evenly."""
        h, n, d = keys.shape
        some = np.unique(np.linspace(0, len(positions) - 1, min(len(positions), MEASURED_QUERIES)).round().astype(np.int64))
        positions, keys = positions[some], keys.float()
        grouped = queries[:, some].float().reshape(h, -1, len(some), d)
        if rope is None:
            return cls(keys, values.float(), grouped, keys, grouped, positions)
        coarse, routed = rope.unrotate(keys, np.arange(n), n), rope.unrotate(grouped, positions, n)
        return cls(keys, values.float(), grouped, coarse, routed, positions)

    def replayed(self, quantizer: KeyQuantizer, router: QueryRouter, layout: Layout, scale: float) -> tuple[Any, ...]:
        """Arguments of `measure` and of `sampling.sample_errors`."""
        lists = quantizer.assign(self.coarse)
        return self.keys, self.values, self.queries, self.routed, self.positions, lists, router, layout, scale


@dataclass
class Measured:
    """Sums over queries, float64. captured : (h, len(SHARES)) and best : likewise, attention outside sinks and window that is
    read, by the router's order and by the true one; outside : (h,) all of it; error : (h, len(SHARES)) relative, of the output;
    loss : (h, len(GRID)) squared error of the output; norm : (h,) its squared length; queries : how many, all heads of a group.
    """

    captured: np.ndarray
    best: np.ndarray
    outside: np.ndarray
    error: np.ndarray
    loss: np.ndarray
    norm: np.ndarray
    queries: int

    def __add__(self, other: Measured) -> Measured:
        return Measured(
            self.captured + other.captured, self.best + other.best, self.outside + other.outside, self.error + other.error,
            self.loss + other.loss, self.norm + other.norm, self.queries + other.queries,
        )


def measure(
    keys: Tensor, values: Tensor, queries: Tensor, routed: Tensor, positions: np.ndarray, lists: Tensor, router: QueryRouter,
    layout: Layout, scale: float,
) -> Measured:
    """One layer of one sequence. keys : float32 (h, n, d); values : (h, n, e); queries, routed : (h, g, q, d), as attention and
    as the router see them; positions : int64 (q,); lists : int (h, n). Queries before anything is sealed are left out."""
    h, g, q, _ = queries.shape
    shares, grid = np.zeros((h, len(SHARES))), np.zeros((h, len(GRID)))
    total = Measured(shares, shares, np.zeros(h), shares, grid, np.zeros(h), 0)
    z, a = TorchBackend(keys.device).route(router.weights, routed.reshape(1, h, g, q, -1), None)
    z, a = z[0].view(h, g, q, -1), a[0].view(h, g, q, -1)
    for j, position in enumerate(positions.tolist()):
        segments = layout.segments(position + 1)
        if segments:
            total += _one(keys, values, queries[:, :, j], z[:, :, j], a[:, :, j], position, lists, router, layout, scale)
    return total


@full_precision
def _one(
    keys: Tensor, values: Tensor, x: Tensor, z: Tensor, a: Tensor, position: int, lists: Tensor, router: QueryRouter,
    layout: Layout, scale: float,
) -> Measured:
    """One query position; x : (h, g, d), z : (h, g, l), a : (h, g, m + 1)."""
    segments = layout.segments(position + 1)
    low, high = segments[0][0], segments[-1][1]
    n, window_start = position + 1, position + 1 - layout.window
    p = torch.softmax(torch.einsum("hgd,hnd->hgn", x, keys[:, :n]) * scale, -1)
    weights = run_weights(z, a, lists[:, low:high], segments, position, router)
    # stable, newest first among the tokens of a run
    order = high - low - 1 - weights.flip(1).argsort(dim=1, descending=True, stable=True)
    sealed = p[:, :, low:high]
    ordered = sealed.gather(2, order[:, None].expand_as(sealed))
    rows = torch.stack([some.index_select(0, at) for some, at in zip(values[:, low:high], order, strict=True)])
    upto = torch.nn.functional.pad(ordered.cumsum(-1, dtype=torch.float64), (1, 0))
    outside = window_start - layout.sinks
    spare = window_start - high  # recent tokens beyond the window: read anyway, and part of the budget
    report = [min(high - low, max(0, round(share * outside) - spare)) for share in SHARES]
    grid = [round(share * (high - low)) for share in GRID]
    beyond = p[:, :, high:window_start].sum(-1, dtype=torch.float64)
    always = torch.cat([p[:, :, :low], p[:, :, high:]], -1)
    always_values = torch.cat([values[:, :low], values[:, high:n]], 1)
    out, outs, at = (always @ always_values).double(), {}, 0
    for budget in sorted({*report, *grid}):
        out = out + ordered[:, :, at:budget] @ rows[:, at:budget]
        outs[budget], at = out / (always.sum(-1, dtype=torch.float64) + upto[:, :, budget])[..., None], budget
    exact = outs[high - low]

    def numbers(value: Tensor) -> np.ndarray:
        array: np.ndarray = value.double().cpu().numpy()
        return array

    squares = {budget: (out - exact).square().sum(-1) for budget, out in outs.items()}  # (h, g)
    norm = exact.square().sum(-1)
    top = sealed.sum(1).sort(dim=1, descending=True).values.cumsum(1, dtype=torch.float64)
    top = torch.nn.functional.pad(top, (1, 0))
    return Measured(
        captured=numbers(torch.stack([(upto[:, :, b] + beyond).sum(1) for b in report], 1)),
        best=numbers(torch.stack([top[:, b] + beyond.sum(1) for b in report], 1)),
        outside=numbers((sealed.sum(-1, dtype=torch.float64) + beyond).sum(1)),
        error=numbers(torch.stack([(squares[b] / norm).sqrt().sum(1) for b in report], 1)),
        loss=numbers(torch.stack([squares[b].sum(1) for b in grid], 1)),
        norm=numbers(norm.sum(1)),
        queries=x.shape[1],
    )


@full_precision
def run_weights(
    z: Tensor, a: Tensor, lists: Tensor, segments: tuple[tuple[int, int], ...], position: int, router: QueryRouter
) -> Tensor:
    """Predicted attention per token, summed over the group, as `Backend.probe` defines it: (h, n) of the sealed tokens."""
    h, g, nlist = z.shape
    middle = np.array([(start + stop - 1) / 2 for start, stop in segments])
    place = torch.from_numpy(router.knots(position - middle)).to(z.device)
    of_segment = torch.repeat_interleave(
        torch.arange(len(segments), dtype=torch.int64, device=z.device),
        torch.tensor([b - a for a, b in segments], dtype=torch.int64, device=z.device),
    )
    runs = of_segment * nlist + lists.long()
    sizes = torch.zeros((h, len(segments) * nlist), dtype=torch.float32, device=z.device).scatter_add_(
        1, runs, torch.ones_like(runs, dtype=z.dtype)
    )
    scores = z[:, :, None, :].expand(h, g, len(segments), nlist)
    if not router.size_weighted:
        return torch.softmax(z, -1).sum(1).gather(1, lists.long())
    if router.num_knots:
        lower = place.long().clamp(max=router.num_knots - 1)
        upper = (lower + 1).clamp(max=router.num_knots - 1)
        scores = scores + (a[..., lower] * (1 - (place - lower)) + a[..., upper] * (place - lower))[..., None]
    flat = scores.reshape(h, g, -1)
    mass = torch.exp(flat - torch.logsumexp(flat + sizes.log()[:, None], -1, keepdim=True))
    if router.predicts_outside:
        mass = mass * torch.sigmoid(a[..., -1:])
    return mass.sum(1).gather(1, runs)
