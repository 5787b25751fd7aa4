"""Training one attention layer: sequences in, a key quantizer and a query router out. Memory is that of one sequence's keys, and
of the targets: nlist * bins per query, whatever the context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..errors import LengthError
from ..invlists.layout import Layout
from ..precision import full_precision
from ..routing.quantizer import MAX_POINTS_PER_CENTROID, KeyQuantizer
from ..routing.rope import Rope
from ..routing.router import QueryRouter
from ..routing.trained import TrainedLayer
from .config import TrainingConfig
from .fitting import fit_linear, train_router, train_tower
from .targets import RouterTargets, bin_edges, targets

TRANSFORM_QUERIES = 1024
"""Positions, about, whose queries say in which metric prompts make their lists."""

MIN_FIRST_KNOT = 4  # 16 tokens: nearer ones are in any window worth the name

TrainingSequence = tuple[Tensor, "Tensor | None", "np.ndarray | None"]
"""keys : float (h, n, d) and queries : float (hq, q, d) as attention sees them, positions : int64 (q,)."""


@full_precision
def train_layer(
    sequences: Sequence[TrainingSequence], nlist: int, rope: Rope | None, layout: Layout, scale: float, config: TrainingConfig
) -> TrainedLayer:
    """Quantizer and router of one layer, and the tower that made the router, if one did. Sequences are read one at a time, twice;
    without queries the router is symmetric.

    Raises ParameterError with fewer keys than lists, LengthError without a query past window and sinks.
    """
    quantizer = KeyQuantizer.train(_sample(sequences, nlist, rope), nlist, config.niter, config.seed)
    about = rope, rope, scale
    if not len(sequences) or sequences[0][1] is None:
        return TrainedLayer(quantizer, QueryRouter.symmetric(quantizer.centroids), *about)
    longest = max(int(keys.shape[1]) for keys, _, _ in sequences)
    edges = bin_edges(layout.window, longest, config.distance)
    first_knot = max(MIN_FIRST_KNOT, max(1, layout.window).bit_length() - 1)
    num_knots = max(1, math.ceil(math.log2(max(2, longest))) - first_knot + 1) if config.distance else 0
    parts, centroids, of_sequence = [], [], []
    for number, sequence in enumerate(sequences):
        sequence_targets, own = _targets(sequence, quantizer, nlist, rope, layout, scale, edges, config.two_tower)
        parts.append(sequence_targets)
        centroids.append(own.centroids)
        of_sequence.append(torch.full((sequence_targets.x.shape[1],), number, dtype=torch.int64, device="cpu"))
    data = RouterTargets.cat(parts)
    if not data.x.shape[1]:
        raise LengthError(f"positions: expected queries past window and sinks, got none among {longest} tokens")
    if config.closed_form:
        return TrainedLayer(quantizer, fit_linear(data, nlist, first_knot, num_knots), *about)
    if not config.two_tower:
        return TrainedLayer(quantizer, train_router(data, nlist, config, first_knot, num_knots), *about)
    tower = train_tower(data, torch.stack(centroids), torch.cat(of_sequence), config, first_knot, num_knots)
    some = data.x[:, :: max(1, data.x.shape[1] // TRANSFORM_QUERIES)]
    tower = tower.with_transform(some.transpose(1, 2))
    return TrainedLayer(quantizer, tower.for_lists(quantizer.centroids), *about, tower)


def announced(sequences: Sequence[TrainingSequence], nlist: int, config: TrainingConfig) -> TrainingConfig:
    """Print what is about to be trained; returns a config that goes on to print, as an index of FAISS does."""
    num_queries = sum(queries.shape[1] for _, queries, _ in sequences if queries is not None)
    h, _, d = sequences[0][0].shape
    num_keys = sum(int(keys.shape[1]) for keys, _, _ in sequences)
    print(f"Training {nlist} lists of {h} KV heads on {num_keys} keys of {d} dims")
    router = f"Training the query router on {num_queries} queries per head"
    print(router if num_queries else "No queries: routing is symmetric")
    return config if config.progress is not None else replace(config, progress=_print_epoch)


def _print_epoch(epoch: int, epochs: int, loss: float) -> None:
    print(f"  epoch {epoch} of {epochs}: cross-entropy {loss:.4f} nats")


def _sample(sequences: Sequence[TrainingSequence], nlist: int, rope: Rope | None) -> Tensor:
    """Keys with RoPE undone for k-means, float32 (h, m, d): all, or every so many-th of each if there are more than it takes."""
    total = sum(int(keys.shape[1]) for keys, _, _ in sequences)
    step = max(1, total // (nlist * MAX_POINTS_PER_CENTROID))
    return torch.cat([_coarse(keys, rope)[:, step // 2 :: step] for keys, _, _ in sequences], 1)


def _coarse(keys: Tensor, rope: Rope | None) -> Tensor:
    n = keys.shape[1]
    return keys.float() if rope is None else rope.unrotate(keys.float(), np.arange(n), n)


def _targets(
    sequence: TrainingSequence, quantizer: KeyQuantizer, nlist: int, rope: Rope | None, layout: Layout, scale: float,
    edges: Tensor, own_lists: bool,
) -> tuple[RouterTargets, KeyQuantizer]:
    """Targets of one sequence, and the lists they speak of: the shared ones, or the sequence's own."""
    keys, queries, positions = sequence
    assert queries is not None and positions is not None
    h, n, d = keys.shape
    coarse = _coarse(keys, rope)
    grouped = queries.float().reshape(h, queries.shape[0] // h, -1, d)
    routed = grouped if rope is None else rope.unrotate(grouped, positions, n)
    if own_lists:
        quantizer = KeyQuantizer.of_prompt(coarse, nlist)
    lists = quantizer.assign(coarse)
    where = torch.from_numpy(positions)
    return targets(keys.float(), grouped, routed, where, lists, nlist, layout.sinks, layout.window, scale, edges), quantizer
