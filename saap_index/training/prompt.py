"""Routers of one layer from one prompt: its own keys, and a sample of its own queries, are all the training data there is.

What is little is used well: positions are sampled by weight, and a network of all KV heads is fitted at once. It begins where the
key that a query looks for is the query itself, which is half of the way, or at routers that are there already; then part of the
sample, held out, says whether they got better. Knows arrays, no models and no files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..errors import LengthError, ParameterError
from ..invlists.layout import Layout
from ..precision import full_precision
from ..routing.quantizer import KeyQuantizer
from ..routing.rope import Rope
from ..routing.sampling import Sampling
from ..routing.two_tower import TwoTower
from .config import TrainingConfig
from .fitting import fit_tower
from .layer import MIN_FIRST_KNOT
from .measure import Measured, measure
from .sampling import FEW_CANDIDATES, best_sampling, sample_errors
from .targets import BLOCK, LISTS_AT_ONCE, bin_edges, targets

HELD_OUT = 8
"""One in so many queries of the sample is fitted to by nobody, and tells whether a fit is better than what was there."""

MEASURED = 16
"""Of the queries that nobody is fitted to, so many tell what each KV head loses at each budget."""

GAIN = 0.01
"""Nats of cross-entropy on those, by which routers must get better to take the place of others: less is chance."""

LEARNING_RATE, REFINING_RATE = 1e-2, 3e-3
"""At the peak of the one-cycle schedule. On SmolLM2-135M 12 epochs of the first capture what 20 of 6e-3 do."""


_PRODUCTS = 1 << 21  # of keys and centroids at a time


@dataclass(frozen=True, kw_only=True)
class PromptTraining:
    """How `attach` trains routers from the prompts of a model that has none. The defaults were measured on SmolLM2-135M.

    max_seconds : of a prompt, until layers that are not done are left for the next prompt; checked after each layer.
    max_bytes : of memory beyond the model and its cache, for sampled queries of all layers and the fit of one.
    min_tokens : of a prompt; shorter ones are read as ever, and teach nothing.
    prompts : how many of them routers learn from: the first trains, the others refine; then they stay what they are.
    queries : positions whose queries are sampled of a prompt, fewer if ``max_bytes`` asks for it.
    nlist : lists per KV head. epochs : passes over the sample. seed : of the sample, the network and the order.
    progress : show a bar, as transformers does; also not where its own are off.

    Raises ParameterError for a value outside its range.
    """

    max_seconds: float = 300.0
    max_bytes: int = 300 << 20
    min_tokens: int = 2048
    prompts: int = 3
    queries: int = 512
    nlist: int = 256
    epochs: int = 12
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        seconds = self.max_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
            raise ParameterError(f"max_seconds: expected a positive number, got {seconds!r}")
        least = {"max_bytes": 1 << 20, "min_tokens": 256, "prompts": 1, "queries": 16, "nlist": 1, "epochs": 1, "seed": 0}
        for name, value in least.items():
            checks.integer(getattr(self, name), name, value, 2**62 if name == "max_bytes" else 2**31 - 1)
        if not isinstance(self.progress, bool):
            raise ParameterError(f"progress: expected True or False, got {self.progress!r}")


def priorities(positions: np.ndarray, seed: int) -> np.ndarray:
    """A number for each position, float64: the largest of a text are a sample of it, without replacement, in which a position is
    as likely as it is late. A function of position and seed alone, so that chunks of a prompt may come in any sizes.

    Source: Efraimidis and Spirakis, weighted random sampling with a reservoir, 2006, log u / w with w = position; u is a hash.
    """
    x = positions.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 1) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):  # splitmix64
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    u = (x >> np.uint64(11)).astype(np.float64) / 2.0**53 + 2.0**-54
    order: np.ndarray = np.log(u) / np.maximum(1, positions)
    return order


@dataclass(frozen=True)
class PromptFit:
    """tower : the routers, or None if those of before were kept; before, after : cross-entropy in nats on what was held out, of
    the routers that were there and of the new ones, nan without any; queries : positions that were sampled. measured : what the
    routers that are used from now on lose at each budget, on queries that were held out, and sampling : what is best sampled of
    it; None without values, or where none of these has a sealed token. lists : of the keys of this prompt and those before, for
    where prompts share them."""

    tower: TwoTower | None
    before: float
    after: float
    queries: int
    measured: Measured | None
    lists: KeyQuantizer
    sampling: Sampling | None = None


@full_precision
def fit_prompt(
    keys: Tensor, queries: Tensor, positions: np.ndarray, rope: Rope | None, scale: float, layout: Layout,
    options: PromptTraining, start: TwoTower | None = None, lengths: np.ndarray | None = None, values: Tensor | None = None,
    shared: KeyQuantizer | None = None, prompts: int = 0,
) -> PromptFit:
    """Train the routers of one layer, or refine ``start``.

    keys : float (h, n, d) and queries : float (hq, q, d) as attention sees them; positions : int64 (q,) of the queries, each
    before n; lengths : int64 (n,), those that the keys were rotated at, where the angles depend on them. values : float
    (h, n, e), with which budgets are measured. shared : lists of so many prompts before, counted as if as long as this one.

    Deterministic for a seed and thread count. LengthError with too few queries past window and sinks to fit and hold out any.
    """
    h, n, d = keys.shape
    order = np.argsort(positions, kind="stable")
    positions, queries = positions[order], queries[:, torch.from_numpy(order).to(queries.device)]
    keys = keys.float()
    coarse, routed = keys, queries.float().reshape(h, queries.shape[0] // h, -1, d)
    grouped = routed
    if rope is not None:
        by_key = n if lengths is None else lengths
        by_query = n if lengths is None else lengths[positions]
        coarse, routed = rope.unrotate(coarse, np.arange(n), by_key), rope.unrotate(grouped, positions, by_query)
    # lists that tell keys apart as queries do: without routers yet, as if these asked for themselves
    begin = TwoTower.symmetric(h, d, scale).to(keys.device).with_transform(routed) if start is None else start
    quantizer = KeyQuantizer.of_prompt(coarse, options.nlist, assign=_assign, transform=begin.transform)
    lists = _assign(quantizer, coarse)
    if shared is None:
        shared = KeyQuantizer.of_prompt(coarse, options.nlist, assign=_assign)
    else:
        shared = shared.refined(coarse, prompts * n, assign=_assign)
    first_knot = max(MIN_FIRST_KNOT, max(1, layout.window).bit_length() - 1)
    num_knots = max(1, math.ceil(math.log2(n)) - first_knot + 1)
    if start is not None:
        first_knot = start.first_knot
        num_knots = max(start.weights.num_knots, math.ceil(math.log2(n)) - first_knot + 1)
    edges = bin_edges(layout.window, n, True)
    where = torch.from_numpy(positions)
    data = targets(
        keys, grouped, routed, where, lists, options.nlist, layout.sinks, layout.window, scale, edges
    )
    count = data.x.shape[1]
    if count < 2 * HELD_OUT:
        raise LengthError(f"positions: expected {2 * HELD_OUT} queries or more past window and sinks, got {count}")
    rate = LEARNING_RATE if start is None else REFINING_RATE
    config = TrainingConfig.named("two-tower", seed=options.seed, epochs=options.epochs, lr=rate)
    draw = torch.Generator().manual_seed(config.seed)
    shuffled = torch.randperm(count, generator=draw, dtype=torch.int64, device="cpu")
    data = data.picked(shuffled.to(keys.device))
    held_out = count // HELD_OUT if start is not None else 0 if values is None else min(MEASURED, count // HELD_OUT)
    fitted, before, after = fit_tower(data, quantizer.centroids, held_out, config, first_knot, num_knots, begin)
    tower = None
    if start is None or after < before - GAIN:
        tower = fitted.with_transform(routed)
        if start is not None and start.transform is not None:
            tower = tower.mixed(start)
    if values is None:
        return PromptFit(tower, before, after, count, None, shared)
    del data
    if tower is not None:  # measured as it will be used
        quantizer = KeyQuantizer.of_prompt(coarse, options.nlist, assign=_assign, transform=tower.transform)
        lists = _assign(quantizer, coarse)
    del coarse
    outside = np.flatnonzero(positions - layout.window >= layout.sinks)
    places = np.sort(outside[shuffled[count - held_out :].numpy()][:MEASURED])
    router = (tower or begin).for_lists(quantizer.centroids)
    sealed = replace(layout, break_even=min(layout.break_even, n // 2))  # also of a prompt that is sealed for what follows
    some = torch.from_numpy(places).to(keys.device)
    replayed = keys, values.float(), grouped[:, :, some], routed[:, :, some], positions[places], lists, router, sealed, scale
    measured = measure(*replayed)
    if not measured.queries:
        return PromptFit(tower, before, after, count, None, shared)
    sampling = best_sampling([sample_errors(*replayed, FEW_CANDIDATES)], FEW_CANDIDATES)
    return PromptFit(tower, before, after, count, measured, shared, sampling)


def _assign(quantizer: KeyQuantizer, keys: Tensor) -> Tensor:
    """Nearest centroids, as `Assign` says, of some keys at a time."""
    some = max(1, _PRODUCTS // (quantizer.centroids.shape[0] * quantizer.nlist))
    return torch.cat([quantizer.assign(part) for part in keys.split(some, 1)], 1)


def fit_bytes(heads: int, kv_heads: int, d: int, tokens: int, queries: int, nlist: int) -> int:
    """Memory that `fit_prompt` of so many heads of a layer takes on a CPU, at most, beside the keys and values it is given."""
    bins = len(bin_edges(128, tokens, True)) + 9  # a smaller window has more
    keys = tokens * kv_heads * d * 4
    rotation = 7 * keys + 16 * tokens * d
    measuring = 3 * keys + tokens * (heads * 24 + kv_heads * 64)
    products = 8 * min(_PRODUCTS, tokens * kv_heads * nlist) + 8 * tokens * kv_heads
    masses = 40 * min(BLOCK, tokens * queries * heads // kv_heads) + 16 * min(nlist, LISTS_AT_ONCE) * (tokens + queries * bins)
    targets_of_queries = queries * (heads * (nlist + 4 * d + 6 * bins) * 8 + kv_heads * bins * nlist * 8)
    network = 16 * kv_heads * (2 * d + bins) * 4 * (d + 128)
    step = 12 * min(queries, 128) * heads * (nlist + 6 * d + 8 * bins) * 4
    return rotation + keys + products + masses + targets_of_queries + network + max(step, measuring)
