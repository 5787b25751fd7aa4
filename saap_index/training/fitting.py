"""Fitting a router's network to targets: a cross-entropy over all tokens, without a list of them; or in closed form.

With z_l the score of list l, a_b the distance term at the centre of distance bin b and N_lb the number of tokens in both, log
softmax of a token is z_l + a_b - log sum N_lb exp(z_l + a_b); so the cross-entropy needs only the true mass of each list, of each
bin, and the counts. Knows targets and networks, not sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..backends import RouterWeights
from ..precision import full_precision
from ..routing.router import QueryRouter
from ..routing.two_tower import TwoTower
from .config import TrainingConfig
from .targets import RouterTargets

Batch = Tensor | slice
"""Positions, int64 (p,), or a stretch of them."""

Scores = Callable[[Tensor, Batch], Tensor]
"""The outputs (h, p, g, o) and the positions of a batch -> z (h, p, g, l)."""

RIDGE = 1e-3  # of the number of queries, on standardised inputs
LEAST_DENSITY = 1e-3  # of the mean: what a list holds that got no attention at all


@full_precision
def train_router(data: RouterTargets, nlist: int, config: TrainingConfig, first_knot: int, num_knots: int) -> QueryRouter:
    """Fit the MLPs of all KV heads, an output per list. Deterministic for a seed and thread count; on the data's device.

    With list sizes inside the softmax the router also learns which share of the attention lies outside, by binary cross-entropy:
    a query that attends to nothing far away should have no say in what its group reads.
    """
    network = _Network(data, nlist, num_knots, config)
    positions = data.x.shape[1]

    def batches() -> list[Tensor]:
        return list(torch.randperm(positions, generator=network.generator, dtype=torch.int64, device="cpu").split(config.batch))

    network.fit(batches, lambda y, batch: y[..., :nlist], first_knot)
    return QueryRouter(network.weights(None), first_knot, config.size_weighted)


@full_precision
def train_tower(
    data: RouterTargets, centroids: Tensor, sequence: Tensor, config: TrainingConfig, first_knot: int, num_knots: int
) -> TwoTower:
    """Fit the network of a `TwoTower`, on lists that may differ from sequence to sequence.

    centroids : float32 (S, h, l, d), of the lists that the targets of sequence s speak of; sequence : int64 (P,), in [0, S), that
    each position is of. Every batch is of one sequence. Otherwise as `train_router`.
    """
    d = data.x.shape[-1]
    network = _Network(data, d, num_knots, config)
    members = [torch.nonzero(sequence.cpu() == s)[:, 0] for s in range(len(centroids))]
    seen, deviation = _standard_lists(centroids)

    def batches() -> list[Tensor]:
        shuffled = [
            m[torch.randperm(len(m), generator=network.generator, dtype=torch.int64, device="cpu")] for m in members if len(m)
        ]
        parts = [batch for m in shuffled for batch in m.split(config.batch)]
        return [
            parts[i] for i in torch.randperm(len(parts), generator=network.generator, dtype=torch.int64, device="cpu").tolist()
        ]

    def scores(y: Tensor, batch: Batch) -> Tensor:
        lists = seen[int(sequence[batch][0])]
        return torch.einsum("hpgd,hld->hpgl", y[..., :d], lists)

    network.fit(batches, scores, first_knot)
    return TwoTower(network.weights(deviation), first_knot)


@full_precision
def fit_tower(
    data: RouterTargets, centroids: Tensor, held_out: int, config: TrainingConfig, first_knot: int, num_knots: int,
    start: TwoTower,
) -> tuple[TwoTower, float, float]:
    """Fit the network of a `TwoTower` to one sequence, beginning at ``start``: the tower, and the mean cross-entropy in nats of
    the positions held out before and after; nan if none are.

    data : positions in random order, of which a stretch is a batch: gathering one anew in each epoch takes a quarter of the time.
    centroids : float32 (h, l, d), of the sequence's lists; held_out : how many positions, the last, are not fitted to.
    A start without hidden units is given ``config.hidden``, which say nothing yet; one with fewer knots, more like its last.
    Otherwise as `train_router`.
    """
    d, positions = data.x.shape[-1], data.x.shape[1]
    seen, deviation = _standard_lists(centroids[None])
    fitted_to = positions - held_out
    network = _Network(data, d, num_knots, config)
    network.begin_at(start.weights, deviation)
    every = [slice(at, min(at + config.batch, fitted_to)) for at in range(0, fitted_to, config.batch)]

    def batches() -> list[slice]:
        order = torch.randperm(len(every), generator=network.generator, dtype=torch.int64, device="cpu")
        return [every[i] for i in order.tolist()]

    def scores(y: Tensor, batch: Batch) -> Tensor:
        h, p, g, _ = y.shape
        return (y[..., :d].reshape(h, p * g, d) @ seen[0].transpose(1, 2)).view(h, p, g, seen.shape[2])

    left_out = slice(fitted_to, positions)
    before = network.loss(left_out, scores, first_knot)
    network.fit(batches, scores, first_knot)
    after = network.loss(left_out, scores, first_knot)
    return TwoTower(network.weights(deviation), first_knot), before, after


def _standard_lists(centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Centroids (S, h, l, d) in units of their deviation (h, d), and that. Where lists differ matters, not where they lie:
    without the common mean and scale of a dim no dim decides by its size."""
    deviation = centroids.std((0, 2), correction=0)
    deviation = torch.maximum(deviation, 1e-4 + 0.01 * deviation.amax(-1, keepdim=True))
    return (centroids - centroids.mean((0, 2))[None, :, None]) / deviation[None, :, None], deviation


class _Network:
    """The parameters of one MLP per KV head while they are fitted, its input standardised."""

    def __init__(self, data: RouterTargets, leading: int, num_knots: int, config: TrainingConfig) -> None:
        h, _, _, d = data.x.shape
        self.data, self.leading, self.num_knots, self.config = data, leading, num_knots, config
        self.generator = torch.Generator().manual_seed(config.seed)
        outputs, u = leading + (num_knots + 1 if config.size_weighted else 0), config.hidden
        device = data.x.device

        def weight(rows: int, columns: int, gain: float) -> Tensor:
            drawn = torch.randn((h, rows, columns), generator=self.generator, dtype=torch.float32, device="cpu") * (
                gain / max(1, columns) ** 0.5
            )
            moved: Tensor = drawn.to(device).requires_grad_()
            return moved

        self.hidden, self.out, self.skip = weight(u, d, 1.0), weight(outputs, u, 0.1), weight(outputs, d, 0.1)
        self.bias_hidden = torch.zeros((h, u), dtype=torch.float32, device=device).requires_grad_()
        self.bias_out = torch.zeros((h, outputs), dtype=torch.float32, device=device).requires_grad_()
        self.mean, self.deviation, self.x = standardised(data.x)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.hidden, self.out, self.skip, self.bias_hidden, self.bias_out]

    @torch.no_grad()
    @full_precision
    def begin_at(self, weights: RouterWeights, divisor: Tensor) -> None:
        """Take over a network that was fitted: the inverse of `weights`. The hidden units of one that has none stay as drawn, the
        outputs that it lacks are those of its last knot, or, without any, as drawn."""
        have, lack = weights.num_knots, self.num_knots - weights.num_knots
        knots = [*range(self.leading), *range(self.leading, self.leading + have)]
        rows = [*knots, *[knots[-1]] * (lack if have else 0), self.leading + have]
        mine = slice(None) if have or not lack else [*range(self.leading), self.leading + self.num_knots]
        scale = torch.ones_like(self.bias_out)
        scale[:, : self.leading] = divisor
        scale = scale[:, mine]
        if weights.hidden.shape[1]:
            self.hidden = weights.hidden * self.deviation[:, None]
            self.bias_hidden = weights.bias_hidden + torch.einsum("hud,hd->hu", weights.hidden, self.mean)
            self.out = weights.out[:, rows] * scale[..., None]
        out, skip = self.out.clone(), self.skip.clone()
        bias = self.bias_out.clone()
        skip[:, mine] = weights.skip[:, rows] * scale[..., None] * self.deviation[:, None]
        bias[:, mine] = (weights.bias_out + torch.einsum("hld,hd->hl", weights.skip, self.mean))[:, rows] * scale
        self.out, self.skip, self.bias_out = out, skip, bias
        for x in self.parameters:
            x.requires_grad_()

    @torch.no_grad()
    @full_precision
    def loss(self, where: slice, scores: Scores, first_knot: int) -> float:
        """Mean cross-entropy of the positions ``where``, in nats; nan for none."""
        if where.stop == where.start:
            return math.nan
        total, bend = 0.0, knot_matrix(self.data.bins, first_knot, self.num_knots).to(self.x.device)
        for at in range(where.start, where.stop, self.config.batch):
            batch = slice(at, min(at + self.config.batch, where.stop))
            z, a, _ = self._outputs(batch, scores, bend)
            total += float(cross_entropy(z, a, self.data, batch, self.config.size_weighted)) * (batch.stop - at)
        return total / (where.stop - where.start)

    @full_precision
    def _outputs(self, where: Batch, scores: Scores, bend: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (h, p, g, l), a (h, p, g, B) and all outputs of the positions of a batch."""
        part = self.x[:, where]
        inner = functional.silu(torch.einsum("hpgd,hud->hpgu", part, self.hidden) + self.bias_hidden[:, None, None])
        y = torch.einsum("hpgu,hlu->hpgl", inner, self.out) + torch.einsum("hpgd,hld->hpgl", part, self.skip)
        y = y + self.bias_out[:, None, None]
        return scores(y, where), y[..., self.leading : self.leading + self.num_knots] @ bend, y

    @full_precision
    def fit(self, batches: Callable[[], Sequence[Batch]], scores: Scores, first_knot: int) -> None:
        """scores : the outputs (h, p, g, o) and the positions of a batch -> z (h, p, g, l)."""
        data, config = self.data, self.config
        positions, device = data.x.shape[1], data.x.device
        bend = knot_matrix(data.bins, first_knot, self.num_knots).to(device)
        optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=config.decay)
        plan = [batches() for _ in range(config.epochs)]
        steps = max(2, sum(map(len, plan)))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps)
        for epoch, order in enumerate(plan):
            total = 0.0
            for where in order:
                batch = where if isinstance(where, slice) else where.to(device)
                z, a, y = self._outputs(batch, scores, bend)
                loss = cross_entropy(z, a, data, batch, config.size_weighted)
                if config.size_weighted:
                    loss = loss + functional.binary_cross_entropy_with_logits(y[..., -1], data.outside[:, batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * z.shape[1]
            if config.progress is not None:
                config.progress(epoch + 1, config.epochs, total / max(1, positions))

    @torch.no_grad()
    @full_precision
    def weights(self, divisor: Tensor | None) -> RouterWeights:
        """What was fitted, with the standardisation of the input as part of it; leading outputs divided by (h, leading).

        Rounded to bfloat16, as weights are read every step; the biases, made after that, keep the mean of the input exact.
        """
        scale = torch.ones_like(self.bias_out)
        if divisor is not None:
            scale[:, : self.leading] = 1 / divisor
        hidden = _rounded(self.hidden / self.deviation[:, None])
        out, skip = _rounded(self.out * scale[..., None]), _rounded(self.skip * scale[..., None] / self.deviation[:, None])
        bias_hidden = self.bias_hidden - torch.einsum("hud,hd->hu", hidden, self.mean)
        bias_out = self.bias_out * scale - torch.einsum("hld,hd->hl", skip, self.mean)
        return RouterWeights(hidden, bias_hidden, out, skip, bias_out, self.leading)


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


@full_precision
def fit_linear(data: RouterTargets, nlist: int, first_knot: int, num_knots: int) -> QueryRouter:
    """A linear router in closed form: ridge regression of the log density of attention in each list and at each distance.

    What a network must beat to be worth its training. Everything as in `QueryRouter` with u = 0.
    """
    h, positions, g, d = data.x.shape
    mean, deviation, x = standardised(data.x)
    tokens = data.counts.float()  # (h, P, B, l)
    every = tokens.sum((2, 3), keepdim=True)[..., 0].clamp(min=1)  # (h, P, 1)

    def density(mass: Tensor, counts: Tensor) -> Tensor:
        """Log of attention per token by the mean of that, (h, P, g, ...); 0 where there are no tokens."""
        share = mass / (counts / every).clamp(min=1e-9)[:, :, None]
        return torch.where(counts[:, :, None] > 0, share.clamp(min=LEAST_DENSITY).log(), 0.0)

    wanted = [density(data.list_mass, tokens.sum(2))]
    if num_knots:
        bend = knot_matrix(data.bins, first_knot, num_knots).to(x.device)
        wanted.append(density(data.bin_mass, tokens.sum(3)) @ torch.linalg.pinv(bend))
    wanted.append(torch.logit(data.outside, eps=1e-3)[..., None])
    rows = torch.cat([x, torch.ones_like(x[..., :1])], -1).reshape(h, positions * g, d + 1).double()
    y = torch.cat(wanted, -1).reshape(h, positions * g, -1).double()
    penalty = RIDGE * positions * g * torch.eye(d + 1, dtype=torch.float64, device=x.device)
    penalty[-1, -1] = 1e-9  # the constant is free
    solved = torch.linalg.solve(rows.transpose(1, 2) @ rows + penalty, rows.transpose(1, 2) @ y)
    skip = (solved[:, :-1].transpose(1, 2).float() / deviation[:, None]).contiguous()
    bias = solved[:, -1].float() - torch.einsum("hld,hd->hl", skip, mean)
    zeros = skip.new_zeros
    weights = RouterWeights(zeros((h, 0, d)), zeros((h, 0)), zeros((h, skip.shape[1], 0)), skip, bias, nlist)
    return QueryRouter(weights, first_knot)


def standardised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviation (h, d) of queries x : (h, P, g, d), and these in units of them."""
    mean = x.mean((1, 2))
    # what varies by less than a percent of its mean is rounding: blown up, it would decide
    deviation = torch.maximum(x.std((1, 2), correction=0), 0.01 * mean.abs() + 1e-4)
    return mean, deviation, (x - mean[:, None, None]) / deviation[:, None, None]


@full_precision
def cross_entropy(z: Tensor, a: Tensor, data: RouterTargets, batch: Batch, size_weighted: bool) -> Tensor:
    """Mean cross-entropy, in nats, of z (h, p, g, l) and a (h, p, g, B) to the true mass of the positions in ``batch``."""
    fit = (data.list_mass[:, batch] * z).sum(-1) + (data.bin_mass[:, batch] * a).sum(-1)
    if not size_weighted:
        return (torch.logsumexp(z, -1) - fit).mean()
    top_z, top_a = z.detach().amax(-1, keepdim=True), a.detach().amax(-1, keepdim=True)
    counts = data.counts[:, batch].float()  # (h, p, B, l)
    # a head at a time, for counts of some positions of all heads are not one piece; and for a gradient from counts as they lie
    per_bin = torch.stack([e @ c.transpose(1, 2) for e, c in zip(torch.exp(z - top_z), counts, strict=True)])  # (h, p, g, B)
    total = (per_bin * torch.exp(a - top_a)).sum(-1)
    return (torch.log(total) + (top_z + top_a)[..., 0] - fit).mean()


def knot_matrix(bins: Tensor, first_knot: int, num_knots: int) -> Tensor:
    """Piecewise-linear interpolation as a matrix: float32 (m, B), so that a at the knots times it is a at the bins."""
    matrix = torch.zeros((num_knots, len(bins)), dtype=torch.float32, device="cpu")
    if num_knots:
        place = (bins.cpu() - first_knot).clamp(0, num_knots - 1)
        low = place.long().clamp(max=num_knots - 1)
        high = (low + 1).clamp(max=num_knots - 1)
        column = torch.arange(len(bins), dtype=torch.int64, device="cpu")
        matrix[low, column] += 1 - (place - low)
        matrix[high, column] += place - low
    return matrix
