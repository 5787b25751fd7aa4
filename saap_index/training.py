"""Training the router: true attention mass of sampled queries, summed by list and distance, and a cross-entropy on it.

The loss needs no list of tokens. With z_l the score of list l, a_b the distance term at the centre of distance bin b and N_lb
the number of tokens in both, log softmax of a token is z_l + a_b - log sum N_lb exp(z_l + a_b); so the cross-entropy needs
only the true mass of each list, of each bin, and the counts. Memory per query is nlist * bins, whatever the context.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .backends import RouterWeights
from .errors import LengthError, ParameterError
from .layout import Layout
from .quantizer import KeyQuantizer
from .rope import Rope
from .router import QueryRouter

BINS_PER_OCTAVE = 2
MIN_FIRST_KNOT = 4  # 16 tokens: nearer ones are in any window worth the name


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How `AsymmetricIndex.train` trains. The defaults were measured on SmolLM2-135M and not tuned per model.

    niter : k-means iterations. hidden : units of the MLP, 0 for a linear router. epochs, lr, batch (query positions), decay :
    AdamW with a one-cycle schedule. distance : learn the distance term. count_lists : list sizes inside the softmax.
    seed : of k-means, initial weights and order. progress : called with (epoch, epochs, mean loss in nats) after each epoch.
    """

    niter: int = 10
    hidden: int = 64
    epochs: int = 20
    lr: float = 3e-3
    batch: int = 128
    decay: float = 1e-2
    distance: bool = True
    count_lists: bool = True
    seed: int = 1234
    progress: Callable[[int, int, float], None] | None = None

    def __post_init__(self) -> None:
        for name, least in (("niter", 1), ("hidden", 0), ("epochs", 1), ("batch", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ParameterError(f"{name}: expected an integer of {least} or more, got {getattr(self, name)!r}")
        if self.distance and not self.count_lists:
            raise ParameterError("distance: expected count_lists=True with it (the term is per token), got count_lists=False")

    @classmethod
    def published(cls, **changes: object) -> TrainingConfig:
        """The classifier of the paper: cross-entropy to the mass of whole lists; no distance, no list sizes."""
        return cls(**{"distance": False, "count_lists": False, **changes})  # type: ignore[arg-type]


@dataclass(frozen=True)
class RouterTargets:
    """What the loss needs of P query positions. x : float32 (h, P, g, d), queries as the router sees them.

    outside : float32 (h, P, g), share of the attention that lies outside window and sinks;
    list_mass : float32 (h, P, g, l) and bin_mass : (h, P, g, B), each summing to 1, of that attention;
    counts : int16 or int32 (h, P, B, l) tokens of each list and bin; bins : float32 (B,), log2 of the bins' centres.
    """

    x: Tensor
    outside: Tensor
    list_mass: Tensor
    bin_mass: Tensor
    counts: Tensor
    bins: Tensor

    @classmethod
    def cat(cls, parts: list[RouterTargets]) -> RouterTargets:
        names = ("x", "outside", "list_mass", "bin_mass", "counts")
        x, outside, list_mass, bin_mass, counts = (torch.cat([getattr(p, name) for p in parts], 1) for name in names)
        return cls(x, outside, list_mass, bin_mass, counts, parts[0].bins)


def bin_edges(nearest: int, farthest: int, distance: bool) -> Tensor:
    """Distance bins, in tokens, half an octave each: float64 (B + 1,), from the nearest distance to past the farthest."""
    if not distance:
        return torch.tensor([0.0, math.inf], dtype=torch.float64)
    octaves = math.log2(max(2, farthest) / max(1, nearest))
    count = max(1, math.ceil(octaves * BINS_PER_OCTAVE))
    return max(1, nearest) * 2.0 ** (torch.arange(count + 1, dtype=torch.float64) / BINS_PER_OCTAVE)


def targets(
    keys: Tensor, queries: Tensor, router_queries: Tensor, positions: Tensor, lists: Tensor, nlist: int,
    sinks: int, window: int, scale: float, edges: Tensor,
) -> RouterTargets:  # fmt: skip
    """The true attention mass of one sequence's sampled queries, by list and by distance.

    keys : float32 (h, n, d) and queries : (h, g, q, d), as attention sees them; router_queries : (h, g, q, d), as the router
    does; positions : int64 (q,) of the queries; lists : int (h, n). A query at p has the tokens [sinks, p - window] outside.
    Queries with nothing outside are left out.
    """
    h, n, _ = keys.shape
    positions = positions.to(keys.device)
    some = positions - window >= sinks
    queries, router_queries, positions = queries[:, :, some], router_queries[:, :, some], positions[some]
    g, q = queries.shape[1:3]
    last = positions - window  # newest token outside
    token = torch.arange(n, device=keys.device)
    outside = (token >= sinks) & (token <= last[:, None])  # (q, n)
    num_bins = len(edges) - 1
    # tokens of bin b lie at [first[b + 1], first[b]): the farther, the lower the position
    first = (positions[:, None] + 1 - edges.to(positions.device).clamp(max=2**31).ceil()[None]).long()
    first[:, 0] = last + 1
    first = torch.minimum(first.clamp(min=sinks), last[:, None] + 1)
    first[:, -1] = sinks
    share = keys.new_empty((h, q, g))
    list_mass = keys.new_empty((h, q, g, nlist))
    bin_mass = keys.new_empty((h, q, g, num_bins))
    counts = torch.empty((h, q, num_bins, nlist), dtype=torch.int16 if n < 2**15 else torch.int32, device=keys.device)
    for head in range(h):
        logits = (queries[head].flatten(0, 1) @ keys[head].T).view(g, q, n) * scale
        near = torch.logsumexp(logits.masked_fill(outside | (token > positions[:, None]), float("-inf")), -1)
        far = torch.logsumexp(logits.masked_fill_(~outside, float("-inf")), -1)
        share[head] = torch.sigmoid(far - near).T
        mass = torch.exp(logits - far[..., None])
        index = lists[head].long().expand(g, q, n)
        list_mass[head] = mass.new_zeros((g, q, nlist)).scatter_add_(2, index, mass).transpose(0, 1)
        upto = functional.pad(mass.double().cumsum(-1), (1, 0))  # mass of tokens below each position
        at = upto.gather(2, first.expand(g, q, num_bins + 1))
        bin_mass[head] = (at[..., :-1] - at[..., 1:]).transpose(0, 1)
        hot = torch.zeros((n + 1, nlist), dtype=torch.int32, device=keys.device)
        hot[token + 1, lists[head].long()] = 1
        seen = hot.cumsum(0, dtype=torch.int32)
        counts[head] = seen[first[:, :-1]] - seen[first[:, 1:]]
    centres = torch.log2(edges[:-1]) + 0.5 / BINS_PER_OCTAVE if num_bins > 1 else torch.zeros(1, dtype=torch.float64)
    return RouterTargets(router_queries.transpose(1, 2).contiguous(), share, list_mass, bin_mass, counts, centres.float())


def train_router(data: RouterTargets, nlist: int, config: TrainingConfig, first_knot: int, num_knots: int) -> QueryRouter:
    """Fit the MLPs of all KV heads together. Deterministic for a seed and thread count. Same device as the data.

    With list sizes inside the softmax the router also learns which share of the attention lies outside, by binary cross-entropy:
    a query that attends to nothing far away should have no say in what its group reads.
    """
    h, positions, _, d = data.x.shape
    device = data.x.device
    generator = torch.Generator().manual_seed(config.seed)
    outputs, u = nlist + (num_knots + 1 if config.count_lists else 0), config.hidden

    def weight(rows: int, columns: int, gain: float) -> Tensor:
        drawn = torch.randn((h, rows, columns), generator=generator) * (gain / max(1, columns) ** 0.5)
        moved: Tensor = drawn.to(device).requires_grad_()
        return moved

    hidden, out, skip = weight(u, d, 1.0), weight(outputs, u, 0.1), weight(outputs, d, 0.1)
    bias_hidden, bias_out = torch.zeros((h, u), device=device), torch.zeros((h, outputs), device=device)
    parameters = [hidden, out, skip, bias_hidden.requires_grad_(), bias_out.requires_grad_()]
    mean = data.x.mean((1, 2))
    # what varies by less than a percent of its mean is rounding: blown up, it would decide
    deviation = torch.maximum(data.x.std((1, 2), correction=0), 0.01 * mean.abs() + 1e-4)
    x = (data.x - mean[:, None, None]) / deviation[:, None, None]
    bend = _knot_matrix(data.bins, first_knot, num_knots).to(device)

    steps = config.epochs * math.ceil(positions / config.batch)
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=max(2, steps))
    for epoch in range(config.epochs):
        total = 0.0
        for batch in torch.randperm(positions, generator=generator).split(config.batch):
            batch = batch.to(device)
            part = x[:, batch]
            inner = functional.silu(torch.einsum("hpgd,hud->hpgu", part, hidden) + bias_hidden[:, None, None])
            y = torch.einsum("hpgu,hlu->hpgl", inner, out) + torch.einsum("hpgd,hld->hpgl", part, skip)
            y = y + bias_out[:, None, None]
            loss = _loss(y[..., :nlist], y[..., nlist : nlist + num_knots] @ bend, data, batch, config)
            if config.count_lists:
                loss = loss + functional.binary_cross_entropy_with_logits(y[..., -1], data.outside[:, batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(batch)
        if config.progress is not None:
            config.progress(epoch + 1, config.epochs, total / max(1, positions))

    with torch.no_grad():  # standardisation of the input becomes part of the weights
        hidden_, skip_ = hidden / deviation[:, None], skip / deviation[:, None]
        shift_hidden = bias_hidden - torch.einsum("hud,hd->hu", hidden_, mean)
        shift_out = bias_out - torch.einsum("hld,hd->hl", skip_, mean)
        weights = RouterWeights(hidden_, shift_hidden, out.detach().contiguous(), skip_, shift_out, nlist)
    return QueryRouter(weights, first_knot, config.count_lists)


def _loss(z: Tensor, a: Tensor, data: RouterTargets, batch: Tensor, config: TrainingConfig) -> Tensor:
    """Mean cross-entropy, in nats, of z (h, p, g, l) and a (h, p, g, B) to the true mass of the positions in ``batch``."""
    fit = (data.list_mass[:, batch] * z).sum(-1) + (data.bin_mass[:, batch] * a).sum(-1)
    if not config.count_lists:
        return (torch.logsumexp(z, -1) - fit).mean()
    top_z, top_a = z.detach().amax(-1, keepdim=True), a.detach().amax(-1, keepdim=True)
    counts = data.counts[:, batch].float()  # (h, p, B, l)
    per_bin = counts @ torch.exp(z - top_z).transpose(-1, -2)  # (h, p, B, g)
    total = (per_bin * torch.exp(a - top_a).transpose(-1, -2)).sum(-2)
    return (torch.log(total) + (top_z + top_a)[..., 0] - fit).mean()


def _knot_matrix(bins: Tensor, first_knot: int, num_knots: int) -> Tensor:
    """Piecewise-linear interpolation as a matrix: float32 (m, B), so that a at the knots times it is a at the bins."""
    matrix = torch.zeros((num_knots, len(bins)))
    if num_knots:
        place = (bins - first_knot).clamp(0, num_knots - 1)
        low = place.long().clamp(max=num_knots - 1)
        high = (low + 1).clamp(max=num_knots - 1)
        column = torch.arange(len(bins))
        matrix[low, column] += 1 - (place - low)
        matrix[high, column] += place - low
    return matrix


def train_layer(
    keys: Tensor, queries: Tensor | None, positions: np.ndarray | None, nlist: int, rope: Rope | None, layout: Layout,
    scale: float, config: TrainingConfig,
) -> tuple[KeyQuantizer, QueryRouter]:  # fmt: skip
    """Quantizer and router of one layer from checked arguments of `AsymmetricIndex.train`."""
    b, h, n, d = keys.shape
    coarse = keys.float() if rope is None else rope.unrotate(keys.float(), np.arange(n), n)
    quantizer = KeyQuantizer.train(coarse.transpose(0, 1).reshape(h, b * n, d), nlist, config.niter, config.seed)
    if queries is None or positions is None:
        return quantizer, QueryRouter.symmetric(quantizer.centroids)
    edges = bin_edges(layout.window, n, config.distance)
    first_knot = max(MIN_FIRST_KNOT, max(1, layout.window).bit_length() - 1)
    num_knots = max(1, math.ceil(math.log2(max(2, n))) - first_knot + 1) if config.distance else 0
    parts = []
    for i in range(b):
        grouped = queries[i].float().reshape(h, queries.shape[1] // h, -1, d)
        routed = grouped if rope is None else rope.unrotate(grouped, positions[i], n)
        lists = quantizer.assign(coarse[i])
        where = torch.from_numpy(positions[i])
        found = targets(keys[i].float(), grouped, routed, where, lists, nlist, layout.sinks, layout.window, scale, edges)
        parts.append(found)
    data = RouterTargets.cat(parts)
    if not data.x.shape[1]:
        raise LengthError(f"positions: expected queries past window and sinks, got none among {n} tokens")
    return quantizer, train_router(data, nlist, config, first_knot, num_knots)
