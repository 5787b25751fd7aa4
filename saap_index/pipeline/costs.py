"""What `saap train` will take, said before it begins: time, memory and disk, from a model's config and the settings.

Time is counted in multiplications, and the machine is asked how many it does in a second. What share of that passes and layers
reach was measured on SmolLM2-135M, on two cores with AVX2, and is a guess elsewhere: read it as the size of what is to come.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from ..hf import support
from ..precision import full_precision
from ..routers import model_shape
from ..training.config import TrainingConfig
from .settings import TrainSettings
from .store import StoreShape, parts_of, size_in_words

PASSES_REACH, LAYERS_REACH = 0.6, 0.15
"""Of the rate of a large product. On SmolLM2-135M, two cores, these give the half hour that its 200 thousand tokens take."""

_SIZE = 768  # of the product that is timed


@dataclass(frozen=True)
class Costs:
    """passes : over all texts; *_multiplications : of all passes and of all layers; disk, memory : bytes, of captures, and beside
    the model's weights; rate : multiplications a second of this device."""

    passes: int
    pass_multiplications: float
    layer_multiplications: float
    disk: int
    memory: int
    rate: float

    @property
    def seconds(self) -> float:
        """An estimate."""
        return (self.pass_multiplications / PASSES_REACH + self.layer_multiplications / LAYERS_REACH) / self.rate

    def line(self) -> str:
        """For a person."""
        minutes = self.seconds / 60
        length = f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{max(1, round(minutes))} min"
        return (
            f"this will take about {length} (an estimate), {size_in_words(self.disk)} of disk for captures in "
            f"{self.passes} pass{'es' if self.passes > 1 else ''} over the texts, and {size_in_words(self.memory)} of memory "
            "beside the model"
        )


def costs(model: Any, settings: TrainSettings, max_disk_bytes: int | None = None) -> Costs:
    """Of training a model; takes a tenth of a second, for the rate."""
    decoder = support.decoder_of(model)
    weights = sum(p.numel() for p in decoder.parameters()) - sum(p.numel() for p in decoder.get_input_embeddings().parameters())
    return costs_of(
        model_shape(decoder.config), weights, settings, _rate(torch.device(model.device), decoder.dtype), max_disk_bytes,
        len(support.global_layers(decoder)),
    )


def costs_of(
    shape: dict[str, Any], weights: int, settings: TrainSettings, rate: float, max_disk_bytes: int | None, global_layers: int
) -> Costs:
    """The same from numbers. shape : as `model_shape` has it; weights : of the layers, embeddings aside; rate : multiplications a
    second; global_layers : that attend to the whole context."""
    heads, kv_heads, d = (shape[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    layers = tuple(settings.layers or range(global_layers))
    n, q, sequences = settings.context, settings.queries, settings.sequences
    store = StoreShape(
        sequences, settings.held_out_numbers, layers, heads, kv_heads, d, d, n, min(q, n - n // 8), torch.float16
    )
    parts = parts_of(store, max_disk_bytes)
    one_pass = sequences * (n * weights + shape["num_hidden_layers"] * heads * d * n * n)
    config = TrainingConfig.named(settings.router)
    exact = sequences * heads * q * n * d  # half of the tokens are seen by a query, each is multiplied twice
    lists = kv_heads * d * settings.nlist * (n * 3 * sequences + config.niter * min(256 * settings.nlist, settings.tokens))
    steps = 0 if settings.router in ("kmeans", "linear") else config.epochs
    network = 3 * steps * sequences * q * heads * (d * settings.nlist + 4 * config.hidden * d + d * d)
    # a pass for a part ends with the last layer of it
    depth = sum(part.layers[-1] + 1 for part in parts) / max(1, shape["num_hidden_layers"])
    largest = max(part.total_bytes for part in parts)
    bins = 14
    targets = sequences * q * (heads * (2 * settings.nlist + 4 * d) * 4 + kv_heads * bins * settings.nlist * 2)
    return Costs(
        len(parts), one_pass * depth, len(layers) * (exact + lists + network), largest, targets + 12 * n * kv_heads * d * 4, rate
    )


@full_precision
def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications a second in a large product."""
    x = torch.ones((_SIZE, _SIZE), dtype=dtype, device=device)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        float((x @ x)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return _SIZE**3 / best
