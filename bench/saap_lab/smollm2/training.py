"""Indexes for the demo: this library's and SAAP as published, trained on the same captures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from saap_index.index import AsymmetricIndex
from saap_index.routing.rope import Rope
from saap_index.training.config import TrainingConfig

from .capture import Capture

METHODS = {
    "saap_index": TrainingConfig(),
    "published": TrainingConfig.published(),
}


def train_index(method: str, sequences: Sequence[Capture], layer: int, rope: Rope | None, seed: int = 1234) -> AsymmetricIndex:
    """A trained, empty index of one layer. ``method``: "saap_index" (distance, budget) or "published" (lists by nprobe)."""
    captures = [s.layers[layer] for s in sequences]
    keys, queries = torch.cat([f.keys for f in captures]), torch.cat([f.queries for f in captures])
    count = min(len(s.positions) for s in sequences)
    positions = torch.stack([s.positions[:count] for s in sequences])
    heads, kv_heads, d = queries.shape[1], keys.shape[1], keys.shape[3]
    budget = {"nprobe": 32} if method == "published" else {"selectivity": 0.05}
    index = AsymmetricIndex(d, 256, heads, kv_heads, d_v=captures[0].values.shape[-1], rope=rope, **budget)
    index.train(keys, queries[:, :, :count], positions=positions, config=replace(METHODS[method], seed=seed))
    return index
