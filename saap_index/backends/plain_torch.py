"""The index on plain torch: any device torch knows, no kernels of ours.

It is the fallback where the C++ module is absent and the start for a device that has no kernels yet; right first, fast second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..precision import full_precision
from ..reference import BIN_OFFSET, BIN_SHIFT, ONE, POWERS
from .base import Backend
from .scalar_quantizer import Coded, rows_at
from .types import Budget, Probed, Rotation, Sample, Tail
from .weights import RouterWeights

ASSIGN_TOKENS = 4096  # bounds the score matrix of `assign`: tokens at a time


class TorchBackend(Backend):
    """See `Backend` for the contract of every method."""

    name = "torch"
    reads_codes = reads_samples = True

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None and torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())  # "cuda" alone would accept tensors of any

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if self.device.type == "cpu" and nbytes:  # NumPy asks for huge pages, torch does not: a tenth of the scan time
            return torch.from_numpy(np.empty(nbytes, np.uint8)).view(dtype).reshape(tuple(shape))
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def append(
        self, keys: Tensor, values: Tensor, arena_keys: Tensor, arena_values: Tensor, starts: Sequence[int], counts: Sequence[int]
    ) -> bool:
        finite = [torch.isfinite(x[i, :, :count]).all() for i, count in enumerate(counts) for x in (keys, values) if count]
        if finite and not bool(torch.stack(finite).all()):
            return False
        for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
            arena_keys[i, :, start : start + count] = keys[i, :, :count]
            arena_values[i, :, start : start + count] = values[i, :, :count]
        return True

    def prepare_quantizer(self, centroids: Tensor, bias: Tensor | None = None) -> Any:
        return centroids.transpose(1, 2).contiguous(), -0.5 * centroids.square().sum(-1) if bias is None else bias

    @full_precision
    def assign(self, quantizer: Any, keys: Tensor, rotation: Rotation | None) -> Tensor:
        centroids, bias = quantizer
        out = torch.empty(keys.shape[:2], dtype=torch.int32, device=keys.device)
        for begin in range(0, keys.shape[1], ASSIGN_TOKENS):
            part = slice(begin, begin + ASSIGN_TOKENS)
            x = keys[:, part].float()
            if rotation is not None:
                x = unrotate(x, rotation.cos[part], rotation.sin[part], rotation)
            out[:, part] = torch.baddbmm(bias[:, None], x, centroids).max(-1).indices
        return out

    def seal(self, keys: Tensor, values: Tensor, ids: Tensor, start: int, list_nos: Tensor, table: Tensor) -> None:
        heads, n = list_nos.shape
        order = torch.argsort(list_nos, dim=1, stable=True)
        sizes = torch.zeros((heads, table.shape[1] - 1), dtype=torch.int64, device=table.device)
        sizes.scatter_add_(1, list_nos.long(), torch.ones_like(list_nos, dtype=torch.int64))
        ends = start + sizes.cumsum(1)
        parts = [rows[:, start : start + n] for rows in (keys, values, ids)]
        indices = [order if part.ndim == 2 else order[:, :, None].expand_as(part) for part in parts]
        sorted_ = [part.gather(1, index) for part, index in zip(parts, indices, strict=True)]
        table[:, 0] = start
        table[:, 1:] = ends
        for part, rows in zip(parts, sorted_, strict=True):  # all that may lack memory is done
            part.copy_(rows)

    def means(self, keys: Tensor, values: Tensor, table: Tensor, mean_keys: Tensor, mean_values: Tensor) -> None:
        for head, offsets in enumerate(table.long()):
            sizes = offsets.diff()
            for rows, means in ((keys, mean_keys), (values, mean_values)):
                part = rows[head, int(offsets[0]) : int(offsets[-1])].float()
                sums = torch.segment_reduce(part, "sum", lengths=sizes, axis=0, initial=0.0)  # in row order on every device
                means[head] = sums / sizes.clamp(min=1)[:, None]

    def prepare_router(self, weights: RouterWeights) -> Any:
        return weights

    @full_precision
    def route(self, router: Any, queries: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        b, h, g, q, d = queries.shape
        x = queries.float()
        if rotation is not None:
            x = unrotate(x, rotation.cos.view(b, 1, 1, q, -1), rotation.sin.view(b, 1, 1, q, -1), rotation)
        x = x.reshape(b, h, g * q, d)
        hidden = functional.silu(torch.einsum("bhjd,hud->bhju", x, router.hidden) + router.bias_hidden[:, None])
        y = torch.einsum("bhju,hlu->bhjl", hidden, router.out) + torch.einsum("bhjd,hld->bhjl", x, router.skip)
        y = y + router.bias_out[:, None]
        z, a = y[..., : router.leading], y[..., router.leading :].contiguous()
        if router.lists is not None and router.list_scales is not None:
            z = torch.einsum("bhjk,hlk->bhjl", z * router.list_scales[:, None], router.lists)
        return z.contiguous(), a

    def probe(
        self,
        z: Tensor,
        a: Tensor,
        knots: Tensor,
        tables: Tensor,
        num_segments: Sequence[int],
        budget: Budget,
        size_weighted: bool,
    ) -> Probed:
        b, h, j, nlist = z.shape
        top = max(num_segments, default=0)
        tables = tables[:, :, :top]
        valid = _arange(0, top, z) < _integers(num_segments, z)[:, None]  # (b, s)
        sizes = (tables[..., 1:] - tables[..., :-1]) * valid[:, None, :, None]
        starts = tables[..., :-1]
        newest = _arange(0, top, z).flip(0)  # newest first, so that a stable sort breaks ties our way
        sizes, starts = sizes[:, :, newest], starts[:, :, newest]
        if budget.nprobe:
            weights = _list_weights(z, _log_shares(a, size_weighted), sizes.sum(2), size_weighted)
            rank = torch.argsort(torch.argsort(-weights, dim=-1, stable=True), dim=-1)
            keep = rank < budget.nprobe
            order_key = rank[:, :, None, :] * top + _arange(0, top, z)[:, None]
            open_ = sizes * keep[:, :, None]
        else:
            bend = _bend(a, knots[:, :top], size_weighted)[..., newest]
            weights = _run_weights(z, bend, _log_shares(a, size_weighted), sizes, size_weighted)
            order_key, open_ = -weights, sizes
        order = torch.argsort(order_key.reshape(b, h, -1), dim=-1, stable=True)
        open_, starts = open_.reshape(b, h, -1).long(), starts.reshape(b, h, -1).long()
        ordered = open_.gather(2, order)
        if budget.unread_mass is not None:
            mass = (sizes * weights).reshape(b, h, -1).gather(2, order).double()
            left = mass.flip(2).cumsum(2).flip(2)  # before each run, it included
            ordered = ordered * (left > budget.unread_mass[:, None].double() * j)
        before = ordered.cumsum(2) - ordered
        certain = budget.rows if budget.sample is None else budget.rows - budget.sample.rows
        taken = torch.minimum(ordered, (certain[:, :, None] - before).clamp(min=0))
        taken = torch.zeros_like(open_).scatter_(2, order, taken)
        rows, counts = _rows(starts + open_ - taken, taken)
        if budget.sample is not None:
            bins = (weights.reshape(b, h, -1).float().contiguous().view(torch.int32).long() + BIN_OFFSET) >> BIN_SHIFT
            return _with_sample(rows, counts, starts, open_ - taken, bins, budget.sample)
        if budget.mean_entries is None:
            return Probed(rows, counts)
        with_means = newest < _integers(budget.means, z)[:, None]  # (b, s)
        unread = (taken.view_as(sizes) == 0) & (sizes > 0) & with_means[:, None, :, None]
        mass = torch.where(unread, sizes * weights, -1.0)
        numbers = newest[:, None] * nlist + _arange(0, nlist, z)
        return Probed(rows, counts, *_best(mass.reshape(b, h, -1), numbers.flatten(), budget.mean_entries))

    @full_precision
    def scan(
        self,
        queries: Tensor,
        arena_keys: Tensor,
        arena_values: Tensor,
        rows: Tensor | None,
        counts: Tensor | None,
        sinks: Sequence[int],
        sealed: Sequence[int],
        lengths: Sequence[int],
        scale: float,
        causal: bool,
        tail: Tail | None = None,
        coded: Coded | None = None,
        biases: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        b, h, g, q, _ = queries.shape
        out = torch.empty((b, h, g, q, arena_values.shape[-1]), dtype=queries.dtype, device=queries.device)
        lse = torch.empty((b, h, g, q), dtype=torch.float32, device=queries.device)
        for i in range(b):
            dense = torch.cat([_arange(0, sinks[i], queries), _arange(sealed[i], lengths[i], queries)]).expand(h, -1)
            picked = dense if rows is None else torch.cat([rows[i].long(), dense], 1)  # -1 rows are masked below
            width = picked.shape[1]
            limit = lengths[i] - q + 1 + _arange(0, q, queries) if causal else _integers([lengths[i]] * q, queries)
            recent = picked >= sealed[i]
            seen = (picked[:, None] >= 0) & (~recent[:, None] | (picked[:, None] < limit[None, :, None]))  # (h, q, t)
            index = picked.clamp(min=0)
            k = rows_at(arena_keys[i], index, coded, i, "key")
            v = rows_at(arena_values[i], index, coded, i, "value")
            logits = torch.einsum("hgqd,htd->hgqt", queries[i].float() * scale, k)
            if biases is not None:
                logits[..., : biases.shape[2]] += biases[i, :, None, None]
            logits = logits.masked_fill(~seen[:, None], float("-inf"))
            if tail is not None:
                entry_logits, entry_values = _entries(tail, i, queries[i].float() * scale)
                logits, v = torch.cat([logits, entry_logits], -1), torch.cat([v, entry_values], 1)
                width += entry_values.shape[1]
            if not width:
                out[i], lse[i] = 0.0, float("-inf")
                continue
            # less the largest, and divided by the sum: the logarithm of a large sum has no digits left for the weights
            top = logits.amax(-1)
            weights = torch.exp(logits - torch.where(top == float("-inf"), 0.0, top)[..., None])
            total = weights.sum(-1)
            sums = torch.einsum("hgqt,hte->hgqe", weights, v)
            out[i] = (sums / torch.where(total == 0, 1.0, total)[..., None]).to(queries.dtype)
            lse[i] = torch.where(top == float("-inf"), top, top + torch.log(total))
        return out, lse

    def combine(self, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        top = torch.maximum(lse_a, lse_b)
        safe = torch.where(top == float("-inf"), 0.0, top)
        keep, take = torch.exp(lse_a - safe), torch.exp(lse_b - safe)
        total = keep + take
        whole = torch.where(total == 0, 1.0, total)
        # a side of weight zero is left out, not multiplied: it may hold anything
        pairs = (keep[..., None], out_a), (take[..., None], out_b)
        parts = [torch.where(w == 0, 0.0, w / whole[..., None] * x.float()) for w, x in pairs]
        return (parts[0] + parts[1]).to(out_a.dtype), top + torch.log(whole)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> Tensor:
    """Undo RoPE on float32 x (..., n, d) with angles that broadcast to (..., n, r / 2)."""
    half = cos.shape[-1]
    out = x.clone()
    first = slice(0, 2 * half, 2) if rotation.interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if rotation.interleaved else slice(half, 2 * half)
    a, b = x[..., first], x[..., second]
    out[..., first] = (a * cos + b * sin) * rotation.scale
    out[..., second] = (b * cos - a * sin) * rotation.scale
    return out


@full_precision
def _entries(tail: Tail, i: int, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (h, g, q, x) and values (h, x, e) of the entries of sequence i; -inf where there is none. queries : scaled."""
    h, d, e = tail.keys.shape[1], tail.keys.shape[4], tail.values.shape[4]
    runs = tail.runs[i].long().clamp(min=0)
    present = _arange(0, runs.shape[1], runs) < tail.counts[i][:, None]
    sizes = tail.tables[i].diff(dim=-1).flatten(1).gather(1, runs)
    keys = tail.keys[i].reshape(h, -1, d).gather(1, runs[:, :, None].expand(-1, -1, d)).float()
    values = tail.values[i].reshape(h, -1, e).gather(1, runs[:, :, None].expand(-1, -1, e)).float()
    logits = torch.einsum("hgqd,hxd->hgqx", queries, keys) + torch.log(sizes.float())[:, None, None]
    return logits.masked_fill(~present[:, None, None], float("-inf")), torch.where(present[:, :, None], values, 0.0)


def _arange(start: int, stop: int, like: Tensor) -> Tensor:
    return torch.arange(start, max(start, stop), dtype=torch.int64, device=like.device)


def _integers(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device=like.device)


def _bend(a: Tensor, knots: Tensor, size_weighted: bool) -> Tensor:
    """The distance term of each segment: a (b, h, j, m + 1) at knots (b, s) -> (b, h, j, s)."""
    b, h, j, m = a.shape[0], a.shape[1], a.shape[2], a.shape[3] - 1
    if m < 1 or not size_weighted:
        return a.new_zeros((b, h, j, knots.shape[1]))
    low = knots.long().clamp(max=m - 1)
    share = (knots - low)[:, None, None]
    at = low[:, None, None].expand(b, h, j, -1)
    return (1 - share) * a.gather(3, at) + share * a.gather(3, (at + 1).clamp(max=m - 1))


def _log_shares(a: Tensor, size_weighted: bool) -> Tensor:
    """Log of how much each query vector counts in the sum over the group: (b, h, j)."""
    return functional.logsigmoid(a[..., -1]) if a.shape[3] and size_weighted else a.new_zeros(a.shape[:3])


def _run_weights(z: Tensor, bend: Tensor, log_shares: Tensor, sizes: Tensor, size_weighted: bool) -> Tensor:
    """Predicted attention per token of each run, summed over the group: (b, h, s, l)."""
    scores = bend[..., :, None] + z[..., None, :]  # (b, h, j, s, l)
    if size_weighted:
        norm = torch.logsumexp(scores + torch.log(sizes[:, :, None].float()), dim=(-2, -1))
    else:
        norm = torch.logsumexp(z, dim=-1)
    return _sum_over_group(torch.exp(scores - (norm - log_shares)[..., None, None]))


def _list_weights(z: Tensor, log_shares: Tensor, sizes: Tensor, size_weighted: bool) -> Tensor:
    """Predicted attention per token of each list, summed over the group: (b, h, l)."""
    norm = torch.logsumexp(z + torch.log(sizes[:, :, None].float()) if size_weighted else z, dim=-1)
    return _sum_over_group(torch.exp(z - (norm - log_shares)[..., None]))


def _sum_over_group(mass: Tensor) -> Tensor:
    """Sum of (b, h, j, ...) over j, one after the other: torch's own order of summation depends on the place of a column in
    memory, and equal runs must stay equal to the last bit."""
    return sum(mass.nan_to_num(0.0, 0.0, 0.0).unbind(2), mass.new_zeros(()))


def _rows(firsts: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers of runs [first, first + taken), ascending and padded with -1. Both int64 (b, h, runs)."""
    b, h, runs = taken.shape
    order = torch.argsort(firsts, dim=-1, stable=True)
    firsts, taken = firsts.gather(2, order).view(b * h, runs), taken.gather(2, order).view(b * h, runs)
    counts = taken.sum(1)
    width = int(counts.max()) if counts.numel() else 0
    ends = taken.cumsum(1)
    slots = _arange(0, width, taken).expand(b * h, -1).contiguous()
    run = torch.searchsorted(ends, slots, right=True).clamp(max=max(0, runs - 1))
    if not runs:
        return taken.new_empty((b, h, 0), dtype=torch.int32), counts.view(b, h).int()
    rows = firsts.gather(1, run) + slots - (ends - taken).gather(1, run)
    rows = torch.where(slots < counts[:, None], rows, -1)
    return rows.view(b, h, width).int(), counts.view(b, h).int()


_POWERS = torch.tensor(POWERS, dtype=torch.int64, device="cpu")

LAST_STEP = 32 * 21
"""From here on a power is 0."""

BINS = 2049


def _powers(steps: Tensor) -> Tensor:
    """2 ** (-steps / 32) in parts of `ONE`; 0 for negative ones."""
    whole = _POWERS.to(steps.device)[-steps % 32] >> ((steps + 31) // 32).clamp(0, 62)
    return torch.where(steps < 0, 0, whole)


def _inclusion(bins: Tensor, sizes: Tensor, sample: Sample) -> Tensor:
    """Probability of inclusion of each run's tokens; all int64 (b, h, r)."""
    b, h, _ = bins.shape
    exponents, rows = sample.exponents.long()[:, None], sample.rows.long()
    there = torch.zeros((b, h, BINS), dtype=torch.int64, device=bins.device).scatter_add_(2, bins, sizes)
    totals = there * ONE  # of each bin as the best one, and all below
    farthest = min(BINS - 1, LAST_STEP // max(1, int(sample.exponents.min()) if h else 1))
    for distance in range(1, farthest + 1):
        totals[..., distance:] += there[..., :-distance] * _powers(exponents * distance)
    above = there.sum(2, keepdim=True) - there.cumsum(2)
    left = rows[..., None] - above
    partial = (there > 0) & (left * ONE < totals)
    places = _arange(0, BINS, bins)
    top = torch.where(partial, places, -1).amax(2, keepdim=True)
    at = top.clamp(min=0)
    share = _powers(exponents * (top - bins)) * left.gather(2, at) * ONE // totals.gather(2, at).clamp(min=1)
    return torch.where(bins > top, ONE, share)


def _with_sample(rows: Tensor, counts: Tensor, starts: Tensor, sizes: Tensor, bins: Tensor, sample: Sample) -> Probed:
    """Rows int32 (b, h, t) that are read for certain, and a sample of runs [start, start + size), int64 (b, h, r)."""
    b, h, runs = starts.shape
    order = torch.argsort(starts, dim=-1, stable=True)
    starts, sizes, bins = (x.gather(2, order) for x in (starts, sizes, bins))
    each = _inclusion(bins, sizes, sample)
    ends = ONE // 2 + (each * sizes).cumsum(2)
    begins = ends - each * sizes
    marks = ends // ONE - begins // ONE
    marked = marks.cumsum(2)
    width = int(marked[..., -1].max()) if marked.numel() else 0
    slots = _arange(0, width, starts).expand(b, h, -1).contiguous()
    run = torch.searchsorted(marked, slots, right=True).clamp(max=max(0, runs - 1))
    if not runs:
        run = slots
    probability, nth = each.gather(2, run).clamp(min=1), slots - (marked - marks).gather(2, run) + 1
    place = (nth * ONE - begins.gather(2, run) % ONE + probability - 1) // probability - 1
    present = slots < marked[..., -1:] if runs else slots < 0
    nowhere = torch.iinfo(torch.int32).max
    sampled = torch.where(present, starts.gather(2, run) + place, nowhere)
    biases = torch.minimum(torch.log(ONE / probability.double()).float(), sample.caps[:, None])
    both = torch.cat([torch.where(rows < 0, nowhere, rows).long(), sampled], 2)
    biases = torch.cat([torch.zeros_like(rows, dtype=torch.float32), biases], 2)
    both, order = both.sort(dim=2, stable=True)
    counts = counts + (marked[..., -1].int() if runs else 0)
    width = int(counts.max()) if counts.numel() else 0
    both, biases = both[..., :width], biases.gather(2, order)[..., :width]
    past = both == nowhere
    return Probed(both.masked_fill(past, -1).int(), counts, biases=biases.masked_fill(past, 0.0).contiguous())


def _best(mass: Tensor, numbers: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers (runs,) of the most[b, h] largest mass (b, h, runs), those below zero left out: ascending, padded with -1."""
    order = torch.argsort(-mass, dim=-1, stable=True)
    rank = torch.argsort(order, dim=-1)
    chosen = (rank < most[:, :, None]) & (mass >= 0)
    counts = chosen.sum(-1)
    width = int(counts.max()) if counts.numel() else 0
    numbered = torch.where(chosen, numbers, torch.iinfo(torch.int64).max).sort(-1).values[..., :width]
    present = _arange(0, width, mass) < counts[:, :, None]
    return torch.where(present, numbered, -1).int(), counts.int()
