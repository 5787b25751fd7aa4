"""The executable specification: what every operation of the index computes, in NumPy float64, slow and obvious.

It imports nothing of ours. A backend is right when it gives these results up to rounding; the property tests say how close.
One sequence and one KV head at a time: the loops over both are the caller's.

Axes: j query vectors of one KV head (group times queries), n tokens, d key dim, e value dim, l lists, s segments, m knots.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


def attend(
    queries: Array, keys: Array, values: Array, scale: float, visible: NDArray[np.bool_] | None = None,
    counts: Array | None = None, biases: Array | None = None,
) -> tuple[Array, Array]:
    """Softmax attention of queries (j, d) over keys (n, d), values (n, e); visible : bool (j, n) hides pairs.

    counts (n,) : the tokens that each key stands for (a run read through its means), default 1 each. biases (n,) : added to the
    logits of each key (one that was sampled), default 0 each.

    Returns out (j, e) and lse (j,), the natural log of the sum of exp(logits). A query that sees nothing has out 0, lse -inf.
    """
    logits = scale * (queries @ keys.T)
    if counts is not None:
        logits = logits + np.log(counts)
    if biases is not None:
        logits = logits + biases
    if visible is not None:
        logits = np.where(visible, logits, -np.inf)
    top = logits.max(axis=1, initial=-np.inf, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=1, keepdims=True)
    out = (weights @ values) / np.where(total > 0, total, 1.0)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + top
    return out, np.where(total > 0, lse, -np.inf)[:, 0]


def merge_states(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Attention over the union of two disjoint token sets, from the states (out (..., e), lse (...)) over each."""
    top = np.maximum(lse_a, lse_b)
    safe = np.where(np.isfinite(top), top, 0.0)
    weight_a, weight_b = np.exp(lse_a - safe), np.exp(lse_b - safe)
    total = weight_a + weight_b
    whole = np.where(total > 0, total, 1.0)[..., None]
    # a side of weight zero is left out, not multiplied: it may hold anything
    pairs = (weight_a[..., None], out_a), (weight_b[..., None], out_b)
    parts = [np.where(w == 0, 0.0, w / whole * np.where(w == 0, 0.0, x)) for w, x in pairs]
    out = parts[0] + parts[1]
    with np.errstate(divide="ignore"):
        return out, np.where(total > 0, np.log(total) + safe, -np.inf)


def unrotate(x: Array, cos: Array, sin: Array, interleaved: bool, scale: float) -> Array:
    """Undo RoPE. x (..., n, d), cos and sin (n, r / 2): each pair (x, y) becomes (x cos + y sin, y cos - x sin) * scale."""
    half = cos.shape[-1]
    out = np.array(x, dtype=np.float64)
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    a, b = out[..., first].copy(), out[..., second].copy()
    out[..., first] = (a * cos + b * sin) * scale
    out[..., second] = (b * cos - a * sin) * scale
    return out


def assign(keys: Array, centroids: Array, bias: Array | None = None) -> Ints:
    """The list of each key, that of the largest <k, c> + bias: keys (n, d), centroids (l, d), bias (l,) -> (n,). Without a bias
    that of the nearest centroid (Euclidean). Ties go to the lower list."""
    scores = keys @ centroids.T + (-0.5 * (centroids**2).sum(axis=1) if bias is None else bias)
    nearest: Ints = scores.argmax(axis=1)
    return nearest


def sort_segment(list_nos: Ints, nlist: int) -> tuple[Ints, Ints]:
    """The order of a segment's rows (n,), stable by list number, and the offsets (l + 1,) of its runs."""
    order = np.argsort(list_nos, kind="stable")
    return order, np.concatenate([[0], np.cumsum(np.bincount(list_nos, minlength=nlist))])


def count_runs(list_nos: Ints, bounds: Ints, nlist: int) -> Ints:
    """Offsets (s, l + 1) of runs of tokens that are not sorted, as if they were: by segment, list and position.

    list_nos (n,) of the tokens of a sequence; segment i is [bounds[i], bounds[i + 1]), bounds (s + 1,).
    """
    tables = np.zeros((len(bounds) - 1, nlist + 1), dtype=np.int64)
    for i, (start, stop) in enumerate(pairwise(bounds)):
        tables[i] = start - bounds[0] + sort_segment(list_nos[start:stop], nlist)[1]
    return tables


def sorted_tokens(list_nos: Ints, bounds: Ints) -> Ints:
    """Positions of the tokens of all segments in the order that `count_runs` speaks of."""
    parts = [start + np.argsort(list_nos[start:stop], kind="stable") for start, stop in pairwise(bounds)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def run_means(keys: Array, values: Array, offsets: Ints) -> tuple[Array, Array]:
    """Mean key (l, d) and mean value (l, e) of the runs [offsets[i], offsets[i + 1]) of keys (n, d), values (n, e); empty: 0."""
    bounds = list(pairwise(offsets))
    mean_keys, mean_values = (
        np.stack([x[low:high].sum(axis=0) / max(1, high - low) for low, high in bounds]) for x in (keys, values)
    )
    return mean_keys, mean_values


def arrangement(
    length: int, sinks: int, window: int, block: int, max_segment: int, heads: int, merge_rows: int
) -> tuple[list[tuple[int, int]], tuple[int, int, int]]:
    """The segments [start, stop) of a sequence of ``length`` tokens, a function of the length alone; and start and stop of those
    that are being merged, and for how many KV heads they are one already, or three zeros.

    Tokens leave the recent ones a block at a time. The merges that are due with a block are carried out one after the other, the
    short ones first, over the tokens up to the next block, each in a share of them that is its share of the rows; in it, heads
    follow at equal distances, so many together as have ``merge_rows`` rows, or one.
    """
    blocks = max(0, (length - sinks - window) // block)
    if not blocks:
        return [], (0, 0, 0)
    spans = segments(blocks - 1, sinks, window, block, max_segment)
    spans.append((sinks + (blocks - 1) * block, sinks + blocks * block))
    due = [x for x in segments(blocks, sinks, window, block, max_segment) if x not in spans]
    tokens, rows, done = length - sinks - window - blocks * block, sum(stop - start for start, stop in due), 0
    for size, start, stop in sorted((stop - start, start, stop) for start, stop in due):
        begin, end = (1 + (block - 1) * x // rows for x in (done, done + size))
        done += size
        if tokens >= end - 1:
            spans = sorted([x for x in spans if not start <= x[0] < stop] + [(start, stop)])
            continue
        together = max(1, merge_rows // size)
        groups = (heads + together - 1) // together
        merged = together * (groups * max(0, tokens - begin + 1) // (end - begin))
        return spans, (start, stop, merged) if merged else (0, 0, 0)
    return spans, (0, 0, 0)


def segments(blocks: int, sinks: int, window: int, block: int, max_segment: int, fanout: int = 4) -> list[tuple[int, int]]:
    """The segments [start, stop) of a sequence of which so many blocks are sealed, when their merges are done.

    An aligned stretch of fanout**k blocks is one segment as soon as it is at least as old as it is long, its age being counted
    from the moment the newest block was sealed.
    """
    sealed_at = window + blocks * block
    spans, i = [], 0
    while i < blocks:
        size = 1
        while True:
            bigger = size * fanout
            stop = (i + bigger) * block
            if i % bigger or i + bigger > blocks or bigger * block > min(max_segment, sealed_at - stop):
                break
            size = bigger
        spans.append((sinks + i * block, sinks + (i + size) * block))
        i += size
    return spans


def route(
    x: Array, hidden: Array, bias_hidden: Array, out: Array, skip: Array, bias_out: Array, nlist: int,
    lists: Array | None = None, list_scales: Array | None = None,
) -> tuple[Array, Array]:
    """The router: x (j, d) -> z (j, l), log mass per token of each list, and a (j, m + 1), the distance term at m knots and c.

    lists (l, k), list_scales (k,): the first k outputs, scaled, are compared with the lists instead of being z.
    """
    pre = x @ hidden.T + bias_hidden
    y = (pre * 0.5 * (1.0 + np.tanh(0.5 * pre))) @ out.T + x @ skip.T + bias_out
    if lists is None or list_scales is None:
        return y[:, :nlist], y[:, nlist:]
    k = lists.shape[1]
    return (y[:, :k] * list_scales) @ lists.T, y[:, k:]


def run_weights(z: Array, a: Array, knots: Array, tables: Ints, size_weighted: bool) -> Array:
    """Predicted attention per token of every run, summed over the group: (s, l). knots (s,), tables (s, l + 1)."""
    num_segments, nlist = tables.shape[0], z.shape[1]
    bend = np.zeros((z.shape[0], num_segments))
    if a.shape[1] > 1 and size_weighted:
        last = a.shape[1] - 2
        for s, knot in enumerate(knots):
            low = min(int(knot), last)
            bend[:, s] = (1 - (knot - low)) * a[:, low] + (knot - low) * a[:, min(low + 1, last)]
    shares = head_shares(a, size_weighted)
    sizes = np.diff(tables, axis=1)
    weights = np.zeros((num_segments, nlist))
    for z_j, bend_j, share in zip(z, bend, shares, strict=True):
        scores = bend_j[:, None] + z_j[None, :]
        top = scores.max(initial=-np.inf) if size_weighted else z_j.max(initial=-np.inf)
        mass = np.exp(scores - (top if np.isfinite(top) else 0.0))
        total = (sizes * mass).sum() if size_weighted else np.exp(z_j - (top if np.isfinite(top) else 0.0)).sum()
        weights += share * mass / total if total > 0 else 0.0
    return weights


def head_shares(a: Array, size_weighted: bool) -> Array:
    """How much each query vector counts in the sum over the group: its predicted attention outside sinks and window, (j,)."""
    return 1.0 / (1.0 + np.exp(-a[:, -1])) if a.shape[1] and size_weighted else np.ones(a.shape[0])


def list_weights(z: Array, a: Array, sizes: Ints, size_weighted: bool) -> Array:
    """Predicted attention per token of every list without distance, summed over the group: (l,). sizes (l,)."""
    weights = np.zeros(z.shape[1])
    for z_j, share in zip(z, head_shares(a, size_weighted), strict=True):
        top = z_j.max()
        mass = np.exp(z_j - (top if np.isfinite(top) else 0.0))
        total = (sizes * mass).sum() if size_weighted else mass.sum()
        weights += share * mass / total if total > 0 else 0.0
    return weights


def probe(
    z: Array, a: Array, knots: Array, tables: Ints, budget: int, nprobe: int, size_weighted: bool,
    unread_mass: float | None = None,
) -> Ints:
    """The rows to read, ascending: best runs first until the budget is spent; the last run is cut, newest tokens kept.

    unread_mass : stop also before a run if the runs left, this one included, hold at most that much attention per query vector.
    nprobe > 0 takes instead the nprobe best lists, every segment of each: SAAP as published.
    """
    num_segments, nlist = tables.shape[0], z.shape[1]
    newest_first = [s for s in range(num_segments - 1, -1, -1)]
    if nprobe:
        weights = list_weights(z, a, np.diff(tables, axis=1).sum(axis=0), size_weighted)
        chosen = sorted(range(nlist), key=lambda l: (-weights[l], l))[:nprobe]
        runs = [(s, l) for l in chosen for s in newest_first]
    else:
        per_run = run_weights(z, a, knots, tables, size_weighted)
        runs = sorted(((s, l) for s in newest_first for l in range(nlist)), key=lambda r: (-per_run[r], -r[0], r[1]))
        if unread_mass is not None:
            mass = np.diff(tables, axis=1) * per_run
            left = np.cumsum([mass[r] for r in reversed(runs)])[::-1]
            runs = [run for run, unread in zip(runs, left, strict=True) if unread > unread_mass * z.shape[0]]
    rows: list[int] = []
    for s, l in runs:
        run = range(tables[s, l], tables[s, l + 1])
        rows.extend(run[max(0, len(run) - (budget - len(rows))) :] if budget > len(rows) else [])
    return np.array(sorted(rows), dtype=np.int64)


ONE = 1 << 20
"""The whole of a probability of inclusion, which is a whole number of these parts."""

POWERS = [round(ONE * 2 ** (i / 32)) for i in range(32)]
"""2 ** (i / 32) in these parts."""

BIN_SHIFT, BIN_OFFSET = 20, 0x5A5A5
"""Of the bits of a float32: dropped, and added before, which keeps the edges of bins off the fractions at which equal runs have
their weights."""


def weight_bins(weights: Array) -> Ints:
    """Bins of an eighth of an octave, of weights as float32."""
    bins: Ints = (weights.astype(np.float32).view(np.int32).astype(np.int64) + BIN_OFFSET) >> BIN_SHIFT
    return bins


def inclusion(bins: Ints, sizes: Ints, rows: int, exponent: int) -> Ints:
    """Probability of inclusion, in parts of `ONE`, of each token of runs: proportional to 2 ** (exponent / 4 * bin / 8), thus to
    weight ** (exponent / 4), but for those that are read for certain; the sum over all tokens is ``rows`` at most.

    bins, sizes (r,) : of the weight of each run, and its tokens. exponent : at least 1.
    """
    probability = np.zeros(len(bins), dtype=np.int64)
    left = rows
    for top in sorted({int(b) for b, n in zip(bins, sizes, strict=True) if n}, reverse=True):
        steps = exponent * (top - bins)
        terms = np.array([POWERS[-s % 32] >> min(62, -(-s // 32)) if s >= 0 else 0 for s in steps.tolist()], dtype=np.int64)
        total = int((sizes * terms).sum())
        if left * ONE < total:
            for i in np.flatnonzero(terms):
                probability[i] = int(terms[i]) * left * ONE // total
            break
        whole = bins == top
        probability[whole] = ONE
        left -= int(sizes[whole].sum())
    return probability


def sample(first: Ints, sizes: Ints, probability: Ints, phase: int = ONE // 2) -> tuple[Ints, Ints]:
    """A systematic sample of runs of rows [first, first + size), which rise: rows, ascending, and the probability of each.

    Tokens are laid on a line one behind the other, each as long as its probability; those on which one of the marks at
    ONE - phase, 2 ONE - phase, ... lies are taken. So each is taken with its probability, over all phases in [0, ONE), and of
    neighbours no two more than they have to be.
    Source: systematic sampling with probability proportional to size, W. G. Madow, 1949.
    """
    each = np.repeat(probability, sizes)
    ends = phase + np.cumsum(each)
    taken = np.flatnonzero(ends // ONE > (ends - each) // ONE)
    rows = np.concatenate([np.zeros(0, np.int64), *(np.arange(f, f + n) for f, n in zip(first, sizes, strict=True))])
    return rows[taken], each[taken]


def weighted_probe(
    z: Array, a: Array, knots: Array, tables: Ints, budget: int, sampled: int, exponent: int, cap: float, phase: int = ONE // 2
) -> tuple[Ints, Array]:
    """`probe` that spends ``sampled`` rows of the budget on a sample of what the others leave: rows, ascending, and what is added
    to the logit of each: the log of one by its probability, ``cap`` at most."""
    sure = probe(z, a, knots, tables, budget - sampled, 0, True)
    # what is left of a run that was cut is its beginning
    first, sizes = tables[:, :-1].ravel(), np.diff(tables, axis=1).ravel()
    sizes = sizes - np.diff(np.searchsorted(sure, tables), axis=1).ravel()
    bins = weight_bins(run_weights(z, a, knots, tables, True)).ravel()
    rows, probability = sample(first, sizes, inclusion(bins, sizes, sampled, exponent))
    biases = np.concatenate([np.zeros(len(sure)), np.minimum(np.log(ONE / probability), cap)])
    order = np.argsort(np.concatenate([sure, rows]), kind="stable")
    return np.concatenate([sure, rows])[order], biases[order]


def sample_error(
    queries: Array, keys: Array, values: Array, scale: float, biases: Array, out: Array, lse: Array
) -> Array:
    """Standard error of attention from its sampled rows, (j,): the root of the sum of (1 - p) w^2 |value - out|^2 over them, w
    the weight that a row has in the softmax, its bias included, and p = exp(-bias) its probability where that is not capped.

    keys (m, d), values (m, e), biases (m,) : of the rows read; those without a bias contribute nothing. out (j, e), lse (j,).
    Source: the variance of a Horvitz-Thompson estimate of a ratio, as of independent inclusions.
    """
    weights = np.exp(scale * (queries @ keys.T) + biases - lse[:, None])
    squares = ((values[None] - out[:, None]) ** 2).sum(axis=2)
    error: Array = np.sqrt(((1 - np.exp(-biases)) * weights**2 * squares).sum(axis=1))
    return error


def tail(z: Array, a: Array, knots: Array, tables: Ints, rows: Ints, mean_entries: int, means: int) -> Ints:
    """Numbers s * l + list, ascending, of the runs to read through their means: of the first ``means`` segments and without a
    row in ``rows``, those of most predicted attention (ties: newer segment, then lower list)."""
    nlist = z.shape[1]
    sizes = np.diff(tables, axis=1)
    mass = sizes * run_weights(z, a, knots, tables, True)
    taken = np.diff(np.searchsorted(rows, tables), axis=1)
    unread = [(s, l) for s in range(means) for l in range(nlist) if sizes[s, l] and not taken[s, l]]
    best = sorted(unread, key=lambda r: (-mass[r], -r[0], r[1]))[:mean_entries]
    return np.array(sorted(s * nlist + l for s, l in best), dtype=np.int64)


LEVELS = np.array([6, 18, 31, 44, 58, 75, 96, 127], np.float64)
"""Positive half of the 4-bit codebook: the best 16 values for a Gaussian (Max, 1960), in whole 1 / GAUSS of its deviation."""

GAUSS = 46.476


def code_size(dim: int, bits: int) -> int:
    """Bytes of the code of one row of ``dim`` numbers: the numbers, then a float32 scale."""
    return dim * bits // 8 + 4


def encode(x: Array, bits: int) -> NDArray[np.uint8]:
    """Codes (n, code_size) of rows x (n, dim), which hold what a float32 can; a function of the row alone, bit for bit.

    8 bits: whole numbers of a scale, the largest magnitude / 127. 4 bits: the row is rotated, its numbers are then nearly
    Gaussian and become the nearest of a codebook, and the scale is the one of least squared error. Two numbers share a byte, see
    `nibbles`.
    """
    x32 = x.astype(np.float32)
    if bits == 8:
        scale = np.abs(x32).max(axis=1, initial=0) / np.float32(127)
        numbers = np.rint(x32 / np.where(scale > 0, scale, np.float32(1))[:, None])
        payload = np.clip(np.where(scale[:, None] > 0, numbers, 0), -127, 127).astype(np.int8).view(np.uint8)
    else:
        rotated = rotate(x32.astype(np.float64))
        unit = np.sqrt(pairwise_sum(rotated**2) / x.shape[1]) / GAUSS
        parts = rotated / np.where(unit > 0, unit, 1.0)[:, None]
        index = np.searchsorted((LEVELS[:-1] + LEVELS[1:]) / 2, np.abs(parts), side="left")
        levels = np.where(parts < 0, -LEVELS[index], LEVELS[index])
        scale = (pairwise_sum(rotated * levels) / pairwise_sum(levels**2)).astype(np.float32)
        low, high = nibbles(x.shape[1])
        number = (index + 8 * (parts < 0)).astype(np.uint8)
        payload = (number[:, low] | number[:, high] << 4).astype(np.uint8)
    return np.concatenate([payload, scale.astype("<f4")[:, None].view(np.uint8)], 1)


def decode(codes: NDArray[np.uint8], dim: int, bits: int) -> Array:
    """Rows (n, dim) that codes (n, code_size) stand for."""
    payload, scale = codes[:, :-4], np.ascontiguousarray(codes[:, -4:]).view("<f4").astype(np.float64)
    if bits == 8:
        return payload.view(np.int8) * scale
    low, high = nibbles(dim)
    number = np.empty((len(codes), dim), np.int64)
    number[:, low], number[:, high] = payload & 15, payload >> 4
    return rotate(np.where(number < 8, 1, -1) * LEVELS[number % 8] * scale, back=True)


def nibbles(dim: int) -> tuple[Ints, Ints]:
    """Which numbers of a row lie in the lower and the upper half of each byte: 16 and the next 16; at the end, halves of what is
    left."""
    starts = [(start, min(32, dim - start) // 2) for start in range(0, dim, 32)]
    low = np.concatenate([np.arange(start, start + half) for start, half in starts])
    return low, low + np.concatenate([np.full(half, half) for _, half in starts])


def rotate(x: Array, back: bool = False) -> Array:
    """Rows x (n, dim) times a fixed orthogonal matrix, or its transpose: signs, then a Walsh-Hadamard transform of each block of
    `blocks`, after which the numbers of a row are about as large as each other. Forward the result is rounded to float32."""
    dim = x.shape[1]
    signs = np.where((np.arange(1, dim + 1, dtype=np.uint64) * 0x9E3779B1) >> 31 & 1, -1.0, 1.0)
    y = x.copy() if back else x * signs
    for start, size in blocks(dim):
        part = y[:, start : start + size]
        half = 1
        while half < size:
            pairs = part.reshape(-1, size // (2 * half), 2, half)
            a, b = pairs[:, :, 0].copy(), pairs[:, :, 1].copy()
            pairs[:, :, 0], pairs[:, :, 1] = a + b, a - b
            half *= 2
        y[:, start : start + size] = part * (1 / np.sqrt(size))
    largest = float(np.finfo(np.float32).max)
    return y * signs if back else np.clip(y, -largest, largest).astype(np.float32).astype(np.float64)


def blocks(dim: int) -> list[tuple[int, int]]:
    """(start, size) of the powers of two, falling, that make up ``dim``."""
    sizes = [1 << bit for bit in reversed(range(dim.bit_length())) if dim >> bit & 1]
    return list(zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True))


def pairwise_sum(x: Array) -> Array:
    """Sums of rows x (n, dim), the second half added to the first until one is left: an order that every backend can follow."""
    size = 1 << (x.shape[1] - 1).bit_length()
    x = np.concatenate([x, np.zeros((len(x), size - x.shape[1]))], 1)
    while size > 1:
        size //= 2
        x = x[:, :size] + x[:, size:]
    return x[:, 0]
