"""One layer, from its captures to its routers: trained, measured and calibrated on the sequences held out. Knows no models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..routing.calibration import replay, table
from ..routing.rope import Rope
from ..routing.trained import TrainedLayer
from ..routing.two_tower import TwoTower
from ..training.config import TrainingConfig
from ..training.layer import TrainingSequence, train_layer
from ..training.measure import GRID, SHARES, HeldOut, Measured, measure
from ..training.sampling import best_sampling, sample_errors
from .settings import TrainSettings
from .store import CaptureStore

Positions = Callable[[TrainSettings, int], np.ndarray]
"""(settings, sequence) -> positions of its queries, int64 (q,)."""


@dataclass(frozen=True)
class LayerResult:
    """figures : plain data, of the sequences held out; see `_figures`."""

    routers: TrainedLayer
    figures: dict[str, Any]


def train_one(
    store: CaptureStore, layer: int, settings: TrainSettings, model_rope: Rope | None, scale: float, device: torch.device,
    positions_of: Positions,
) -> LayerResult:
    """Train a layer on all sequences but those held out."""
    rope = None if settings.partition == "post-rope" else model_rope
    numbers = [n for n in range(store.shape.sequences) if n not in store.shape.held_out]
    config = TrainingConfig.named(settings.router, seed=settings.seed * 1009 + layer)
    sequences = store.layer(layer, numbers, [positions_of(settings, n) for n in numbers], device)
    source = _without_queries(store, layer, numbers, device) if settings.router == "kmeans" else sequences
    trained = train_layer(source, settings.nlist, rope, settings.layout, scale, config)
    tower = trained.tower if settings.partition == "per-prompt" else None
    if settings.partition == "per-prompt" and tower is None:
        tower = TwoTower.symmetric(store.shape.kv_heads, store.shape.d).to(device)
    trained = replace(trained, tower=tower)
    rest = trained, settings, rope, scale, device
    results = [_measure(store, layer, n, positions_of(settings, n), *rest) for n in store.shape.held_out]
    measured, curves = [m for m, _, _ in results], [c for _, c, _ in results if c is not None]
    total = sum(measured[1:], measured[0])
    losses = total.loss / max(1e-30, float(total.norm.sum())) * store.weight(layer)
    calibration = table(curves) if curves else None
    sampling = best_sampling([errors for _, _, errors in results])
    shared = None if tower is None else trained.quantizer.rounded()
    routers = replace(
        trained, model_rope=model_rope, calibration=calibration, losses=losses.astype(np.float32), shared_lists=shared,
        sampling=sampling,
    )
    return LayerResult(routers, _figures(measured, store.weight(layer)))


def _without_queries(store: CaptureStore, layer: int, numbers: list[int], device: torch.device) -> list[TrainingSequence]:
    return [(store.keys(layer, n).to(device), None, None) for n in numbers]


def _measure(
    store: CaptureStore, layer: int, number: int, positions: np.ndarray, trained: TrainedLayer, settings: TrainSettings,
    rope: Rope | None, scale: float, device: torch.device,
) -> tuple[Measured, np.ndarray | None, np.ndarray | None]:
    """One sequence that was held out: its figures; for calibration the attention captured by how much was left unread, and the
    errors by what is sampled."""
    keys, values, queries = (
        x.to(device, torch.float32)
        for x in (store.keys(layer, number), store.values(layer, number), store.queries(layer, number))
    )
    held_out = HeldOut.of(keys, values, queries, positions, rope)
    parts = trained.quantizer, trained.router
    if trained.tower is not None:
        parts = trained.tower.for_prompt(held_out.coarse[:, : int(positions.min())], settings.nlist)
    replayed = held_out.replayed(*parts, settings.layout, scale)
    measured, errors = measure(*replayed), sample_errors(*replayed)
    # the symmetric tower has the output, but learnt nothing
    trusts = trained.router.predicts_outside and settings.router != "kmeans"
    by_head = held_out.queries.flatten(0, 1), held_out.positions
    return measured, replay(keys, *by_head, *parts, rope, settings.layout, scale) if trusts else None, errors


def _figures(measured: list[Measured], weight: float) -> dict[str, Any]:
    """Attention captured outside sinks and window in percent and its spread over sequences (None for one), the same for the
    exact best, relative output error, per share; share of attention outside; weight of the layer; by KV head at 5 %."""
    total = sum(measured[1:], measured[0])
    at = SHARES.index(0.05)

    def percent(part: np.ndarray, whole: np.ndarray) -> list[float]:
        return [round(100 * float(x), 3) for x in part / np.maximum(whole, 1e-30)]

    each = [100 * m.captured.sum(0) / max(1e-30, m.outside.sum()) for m in measured]
    heads = total.queries
    return {
        "shares": list(SHARES), "grid": list(GRID), "sequences": len(measured), "queries": heads,
        "captured": percent(total.captured.sum(0), total.outside.sum()),
        "spread": [round(float(x), 3) for x in np.std(each, axis=0, ddof=1)] if len(each) > 1 else [None] * len(SHARES),
        "best": percent(total.best.sum(0), total.outside.sum()),
        "error": [round(float(x), 6) for x in total.error.sum(0) / max(1, heads) / len(total.outside)],
        "captured_by_head": percent(total.captured[:, at], total.outside),
        "outside": [round(float(x), 6) for x in total.outside / max(1, heads)],
        "weight": round(weight, 6),
    }
