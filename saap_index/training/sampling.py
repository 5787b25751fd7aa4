"""Which part of a layer's budget is best spent on a weighted sample: measured on sequences held out, for each KV head.

Replays queries as an index would have them, once for every candidate, and compares the output with dense attention. A sample pays
where much attention lies beyond what the budget reads, spread over many tokens; where a few tokens hold it, one that is drawn by
chance and counts for several does harm. So heads differ, and a head in which no candidate is surely better samples nothing.

Axes: h KV heads, g query heads per KV head, q queries, n tokens, d key dim, e value dim, c candidates, the first of which is no
sample at all, s budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from ..backends import Backend, Budget, Sample, TorchBackend, get_backend
from ..errors import LengthError
from ..invlists.layout import Layout
from ..precision import full_precision
from ..routing.quantizer import KeyQuantizer
from ..routing.rope import Rope
from ..routing.router import QueryRouter
from ..routing.sampling import CAP, EXPONENT, Sampling
from .measure import HeldOut

BUDGETS = (0.05, 0.1)
"""Shares of the sealed tokens at which candidates are compared."""

SHARES, EXPONENTS, CAPS = (0.25, 0.5, 0.75, 1.0), (1.5, 2.0, 3.0, 4.0), (1.0, 1.5, 2.0, 2.5)

Candidates = tuple[tuple[float, float, float], ...]
"""(share, exponent, cap) of each; the first is no sample at all, the others are all products of shares, exponents and caps."""

NONE = 0.0, EXPONENT, CAP

CANDIDATES: Candidates = (NONE, *product(SHARES, EXPONENTS, CAPS))

FEW_CANDIDATES: Candidates = (NONE, *product((0.5, 1.0), (1.5,), (1.5, 2.5)))
"""For where few queries of a single text can be had: a choice among many would be chance, and takes ten times as long. Those that
the layers of SmolLM2-135M choose most."""

LEAST_GAIN = 0.02
"""By how much the error has to be smaller, and surely so: text of other kinds gains a little less."""

FLOOR = 1e-3
"""Of the errors of a text, in all: a head that reads all it attends to gains nothing by anything."""

MeasuredSequence = tuple[Tensor, Tensor, np.ndarray, Tensor]
"""Keys (h, n, d) and queries (hq, q, d) as attention sees them, positions int64 (q,) of the queries, values (h, n, e)."""


def calibrate_sampling(
    sequences: Sequence[MeasuredSequence], quantizer: KeyQuantizer, router: QueryRouter, rope: Rope | None, layout: Layout,
    scale: float,
) -> Sampling | None:
    """What each KV head should sample, from whole sequences that were in no training; None for a router of whole lists.

    Raises LengthError if no sequence has a query past its window.
    """
    texts = (HeldOut.of(keys, values, queries, positions, rope) for keys, queries, positions, values in sequences)
    return best_sampling([sample_errors(*text.replayed(quantizer, router, layout, scale)) for text in texts])


def best_sampling(errors: Sequence[np.ndarray | None], candidates: Candidates = CANDIDATES) -> Sampling | None:
    """The candidate of each KV head that makes the error smallest, as a mean over texts and budgets with a standard error more
    that it has over the texts; none where it gains less than `LEAST_GAIN`.

    errors : of each text, as from `sample_errors`. None if all of them are for want of a router that can be sampled by.
    """
    ratios = [(x[1:] + FLOOR) / (x[:1] + FLOOR) for x in errors if x is not None]
    if not ratios:
        if errors:
            return None
        raise LengthError("positions: expected queries past the window of a sealed sequence, got none")
    each = np.stack([x.mean(axis=1) for x in ratios])  # (texts, c - 1, h)
    spread = each.std(axis=0, ddof=1) / np.sqrt(len(each)) if len(each) > 1 else np.zeros(each.shape[1:])
    score = each.mean(axis=0) + spread
    best = np.where(score.min(axis=0) <= 1 - LEAST_GAIN, score.argmin(axis=0) + 1, 0)
    return Sampling(*(np.array([candidates[i][k] for i in best], np.float32) for k in range(3)))


def sample_errors(
    keys: Tensor, values: Tensor, queries: Tensor, routed: Tensor, positions: np.ndarray, lists: Tensor, router: QueryRouter,
    layout: Layout, scale: float, candidates: Candidates = CANDIDATES,
) -> np.ndarray | None:
    """Relative errors of the output, sums over the queries of one sequence: float64 (c, s, h). None where nothing is sealed, or
    for a router of whole lists.

    keys : float32 (h, n, d); values : (h, n, e); queries, routed : (h, g, q, d), as attention and as the router see them;
    positions : int64 (q,); lists : int (h, n).
    """
    keys, values, queries, routed, lists = (x.cpu() for x in (keys, values, queries, routed, lists))
    host = torch.device("cpu")
    backend, router = get_backend(host), router.to(host)
    if not router.size_weighted or not backend.reads_samples:
        return None
    h, g, q, _ = queries.shape
    z, a = TorchBackend(host).route(router.weights, routed.reshape(1, h, g, q, -1), None)
    z, a = z.view(1, h, g, q, -1), a.view(1, h, g, q, -1)
    total, replayed = np.zeros((len(candidates), len(BUDGETS), h)), False
    for j, position in enumerate(positions.tolist()):
        if layout.segments(position + 1):
            scores = z[:, :, :, j].contiguous(), a[:, :, :, j].contiguous()
            total += _one(backend, keys, values, queries[:, :, j], *scores, position, lists, router, layout, scale, candidates)
            replayed = True
    return total if replayed else None


@full_precision
def _one(
    backend: Backend, keys: Tensor, values: Tensor, x: Tensor, z: Tensor, a: Tensor, position: int, lists: Tensor,
    router: QueryRouter, layout: Layout, scale: float, candidates: Candidates,
) -> np.ndarray:
    """One query position; x : (h, g, d), z : (1, h, g, l), a : (1, h, g, m + 1). float64 (c, s, h)."""
    segments = layout.segments(position + 1)
    h, nlist, used = len(keys), router.nlist, len(segments)
    low, high = segments[0][0], segments[-1][1]
    of_segment = torch.repeat_interleave(
        torch.arange(used, dtype=torch.int64, device="cpu"),
        torch.tensor([stop - start for start, stop in segments], dtype=torch.int64, device="cpu"),
    )
    runs = of_segment * nlist + lists[:, low:high].long()
    order = low + runs.argsort(dim=1, stable=True)
    sizes = torch.zeros((h, used * nlist), dtype=torch.int64, device="cpu").scatter_add_(1, runs, torch.ones_like(runs))
    ends = low + sizes.cumsum(1).view(h, used, nlist)
    starts = torch.tensor([start for start, _ in segments], dtype=torch.int64, device="cpu").expand(h, -1)
    tables = torch.cat([starts[..., None], ends], 2).int()[None]
    middle = np.array([(start + stop - 1) / 2 for start, stop in segments])
    knots = torch.from_numpy(router.knots(position - middle))[None].float()

    logits = torch.einsum("hgd,hnd->hgn", x, keys[:, : position + 1]) * scale
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    exact = torch.einsum("hgn,hne->hge", weights, values[:, : position + 1]) / weights.sum(-1, keepdim=True)
    length = torch.linalg.vector_norm(exact, dim=-1).clamp(min=1e-30)
    beside = torch.cat([weights[..., :low], weights[..., high:]], -1)
    beside_values = torch.cat([values[:, :low], values[:, high : position + 1]], 1)
    sums, mass = torch.einsum("hgn,hne->hge", beside, beside_values), beside.sum(-1)

    shares, exponents, caps = (list(dict.fromkeys(c[k] for c in candidates[1:])) for k in range(3))
    cells = list(product(BUDGETS, (0.0, *shares)))
    rows = np.array([int(np.ceil(budget * (high - low) - 1e-6)) for budget, _ in cells], np.int32)
    sampled = np.floor(rows * np.array([share for _, share in cells]) + 1e-6).astype(np.int32)
    of_cells = [torch.from_numpy(n)[:, None].expand(-1, h).contiguous() for n in (rows, sampled)]

    def repeated(t: Tensor) -> Tensor:
        return t.expand(len(cells), *t.shape[1:]).contiguous()

    scores = repeated(z), repeated(a), repeated(knots), repeated(tables)
    errors = np.zeros((len(candidates), len(BUDGETS), h))
    number = {candidate: i for i, candidate in enumerate(candidates)}
    for exponent in exponents:
        quarters = torch.full((h,), round(4 * exponent), dtype=torch.int32, device="cpu")
        sample = Sample(of_cells[1], quarters, torch.full((h,), 99.0, dtype=torch.float32, device="cpu"))
        found = backend.probe(*scores, [used] * len(cells), Budget(of_cells[0], sample=sample), True)
        assert found.biases is not None
        for i, (budget, share) in enumerate(cells):
            count = int(found.counts[i].max())
            at = found.rows[i, :, :count].long()
            present = torch.arange(count, dtype=torch.int32, device="cpu") < found.counts[i, :, None]
            real = order.gather(1, (at - low).clamp(min=0))
            seen = weights.gather(2, real[:, None].expand(-1, x.shape[1], -1)) * present[:, None]
            picked = values.gather(1, real[..., None].expand(-1, -1, values.shape[2]))
            if not share and exponent != exponents[0]:
                continue
            for cap in caps if share else (CAP,):
                counted = seen * torch.exp(found.biases[i, :, :count].clamp(max=cap))[:, None]
                out = (sums + torch.bmm(counted, picked)) / (mass + counted.sum(-1))[..., None]
                error = (torch.linalg.vector_norm(out - exact, dim=-1) / length).sum(1)
                candidate = number[(share, exponent, cap) if share else NONE]
                errors[candidate, BUDGETS.index(budget)] = error.double().numpy()
    return errors
