"""How much predicted attention may stay unread for a promised share of the true one: a table per KV head, and how it is measured.

A router is sure of itself on text it was trained on and less right than it thinks on other text. So it is not taken at its word:
on sequences that were held out of the fit, the true attention captured is measured for every amount of predicted attention left
unread (``unread_mass``), and the table holds, for each target, the largest that kept it. Never as much as the router's own word
allows: one that promises too little on text like that of its training promises about right on text of another kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from .. import checks, reference
from ..errors import LengthError, ParameterError
from ..invlists.layout import Layout
from ..precision import full_precision
from .quantizer import KeyQuantizer
from .rope import Rope
from .router import QueryRouter

TARGETS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
"""The targets a table has entries for; below the first its entry serves, above the last the unread mass falls linearly to 0."""

UNREAD_MASSES = (0.0, *np.geomspace(1e-4, 1.0, 81).tolist())
"""The amounts of predicted attention left unread at which the captured mass is measured."""

CONFIDENCE = 0.95
"""Share of texts that are to reach the target in each KV head. With 0.9, of the kind of text calibrated on, 78 of 90 heads of
SmolLM2-135M kept a promise of 0.9 on six texts of other kinds."""

WORD = 0.9
"""Of the unread mass that the router's own word allows, the most that is used: on text of another kind it promises a little too
much."""

GROUP = 16
"""Query positions, in order, that count as one text when the spread over texts is estimated from few sequences."""

PRIOR_TEXTS = 4
"""Texts that the spread of all heads counts for in the spread of each: with few texts its own is anybody's guess."""


@dataclass(frozen=True)
class Calibration:
    """unread_mass : float32 (h, len(TARGETS)), in [0, 1], falling along the targets: what `target_mass` hands to `probe`."""

    unread_mass: Tensor

    def __post_init__(self) -> None:
        checks.array(self.unread_mass, "calibration", "h t", (None, len(TARGETS)), [torch.float32], self.unread_mass.device)
        x = self.unread_mass
        if not bool(((x >= 0) & (x <= 1)).all()) or not bool((x.diff(dim=1) <= 0).all()):
            raise ParameterError("calibration: expected misses in [0, 1] that fall along the targets, got others")

    @classmethod
    def trusting(cls, heads: int) -> Calibration:
        """The router taken at its word: 1 - target, for an index that was not calibrated."""
        return cls((1 - torch.tensor(TARGETS, dtype=torch.float32, device="cpu")).expand(heads, -1).contiguous())

    def at(self, target: float) -> Tensor:
        """The unread mass of every KV head for a target, linear between the targets of the table: float32 (h,)."""
        table = self.unread_mass.cpu().numpy()
        misses = [np.interp(target, [*TARGETS, 1.0], [*row, 0.0]) for row in table]
        return torch.tensor(misses, dtype=torch.float32, device="cpu")


@full_precision
def calibrate(
    sequences: Sequence[tuple[Tensor, Tensor, np.ndarray]], quantizer: KeyQuantizer, router: QueryRouter, rope: Rope | None,
    layout: Layout, scale: float, confidence: float = CONFIDENCE,
) -> Calibration:
    """The table of one layer from whole sequences that were in no training; checked arguments of `AsymmetricIndex.calibrate`.

    sequences : keys (h, n, d) and queries (hq, q, d) as attention sees them, and positions, int64 (q,), of the queries.
    Raises ParameterError for a confidence outside [0.5, 1), and as `replay` and `table` do.
    """
    if not isinstance(confidence, float) or not 0.5 <= confidence < 1:
        raise ParameterError(f"confidence: expected 0.5 <= confidence < 1, got {confidence!r}")
    return table([replay(*sequence, quantizer, router, rope, layout, scale) for sequence in sequences], confidence)


def replay(
    keys: Tensor, queries: Tensor, positions: np.ndarray, quantizer: KeyQuantizer, router: QueryRouter, rope: Rope | None,
    layout: Layout, scale: float,
) -> np.ndarray:
    """True attention captured by the queries of one sequence, for every unread mass: float64 (p, h, len(MISSES)), by position.

    keys : (h, n, d), queries : (hq, q, d), positions : int64 (q,). A query is replayed over the segments that the sequence had at
    its position; those before the first seal are left out. Budgets take no part: the promise holds as far as the cap lets it.

    Raises CompatibilityError for a router that does not predict the attention outside sinks and window.
    """
    router.check_outside("calibrate")
    h, n, d = keys.shape
    coarse = keys.float() if rope is None else rope.unrotate(keys.float(), np.arange(n), n)
    lists = quantizer.assign(coarse).cpu().numpy()
    grouped = queries.float().reshape(h, queries.shape[0] // h, -1, d)
    routed = grouped if rope is None else rope.unrotate(grouped, positions, n)
    captured = [
        _captured(keys, grouped[:, :, j], routed[:, :, j], int(positions[j]), lists, router, layout, scale)
        for j in np.argsort(positions, kind="stable")
    ]
    kept = [x for x in captured if x is not None]
    return np.stack(kept) if kept else np.empty((0, h, len(UNREAD_MASSES)))


@full_precision
def _captured(
    keys: Tensor, queries: Tensor, routed: Tensor, position: int, lists: np.ndarray, router: QueryRouter, layout: Layout,
    scale: float,
) -> np.ndarray | None:
    """True attention captured by one query position, for every unread mass: float64 (h, len(MISSES)); None if nothing is sealed.

    keys : (h, n, d); queries, routed : (h, g, d), as attention and as the router see them; lists : int (h, n).
    """
    length, nlist = position + 1, router.nlist
    segments = layout.segments(length)
    if not segments:
        return None
    heads, low, high = len(keys), segments[0][0], segments[-1][1]
    middle = np.array([(start + stop - 1) / 2 for start, stop in segments])
    knots = router.knots(length - 1 - middle).astype(np.float64)
    of_segment = np.repeat(np.arange(len(segments)), [stop - start for start, stop in segments])
    weights = {name: w.double().cpu().numpy() for name, w in router.tensors().items()}
    true = torch.softmax(torch.einsum("hgd,hnd->hgn", queries, keys[:, :length].float()) * scale, -1).double().cpu().numpy()
    x = routed.double().cpu().numpy()
    by_mass = np.empty((heads, len(UNREAD_MASSES)))
    for head in range(heads):
        z, a = reference.route(x[head], nlist=nlist, **{name: w[head] for name, w in weights.items()})
        runs = of_segment * nlist + lists[head, low:high]
        sizes = np.bincount(runs, minlength=len(segments) * nlist)
        tables = np.concatenate([np.zeros((len(segments), 1), np.int64), np.cumsum(sizes.reshape(len(segments), nlist), 1)], 1)
        predicted = reference.run_weights(z, a, knots, tables, True).ravel()
        mean = true[head].mean(axis=0)
        held = np.bincount(runs, mean[low:high], minlength=len(sizes))
        best = np.argsort(-predicted, kind="stable")
        left = np.cumsum((sizes * predicted)[best][::-1])[::-1] / len(z)  # before each run, it included
        captured = np.concatenate([[0.0], np.cumsum(held[best])]) + (1 - mean[low:high].sum())
        # the runs before which more than the unread mass is left
        read_runs = np.searchsorted(-left, -np.array(UNREAD_MASSES), side="left")
        by_mass[head] = captured[read_runs]
    return by_mass


def table(replays: Sequence[np.ndarray], confidence: float = CONFIDENCE) -> Calibration:
    """For each target the largest unread mass, WORD (1 - target) at most, with which the captured mass of a text should reach it.

    replays : of each sequence, as from `replay`. confidence : for each KV head, the share of texts whose mean captured mass is to
    reach the target. Texts are taken to spread normally about the mean of their head, which is known as well as so many let it
    be; the texts are the sequences, or, of fewer than four, stretches of GROUP queries.

    Raises LengthError if no sequence has a query past its window.
    """
    kept = [x for x in replays if len(x)]
    if not kept:
        raise LengthError("positions: expected queries past the window of a sealed sequence, got none")
    pieces = [x for r in kept for x in ([r] if len(kept) >= 4 else np.split(r, range(GROUP, len(r), GROUP)))]
    curves = np.stack([x.mean(axis=0) for x in pieces])
    texts, mean = len(curves), curves.mean(axis=0)
    squares = ((curves - mean) ** 2).sum(axis=0)
    common = squares.mean(axis=0) / max(1, texts - 1)
    spread = np.sqrt((squares + PRIOR_TEXTS * common) / (texts - 1 + PRIOR_TEXTS))
    assured = mean - NormalDist().inv_cdf(confidence) * spread * math.sqrt(1 + 1 / texts)
    assured = np.minimum.accumulate(assured, axis=1)  # more left unread captures no more
    unread_mass = np.zeros((curves.shape[1], len(TARGETS)), np.float32)
    for head, row in enumerate(assured):
        for t, target in enumerate(TARGETS):
            enough = int(np.searchsorted(-row, -target, side="right"))  # leading misses that keep the target
            unread_mass[head, t] = min(UNREAD_MASSES[enough - 1], WORD * (1 - target)) if enough else 0.0
    return Calibration(torch.from_numpy(unread_mass))
