"""``break_even`` of an attached model: what a decode step of a layer takes, dense and sparse, on this machine.

Both sides are what a layer of a cache does: SDPA over the rows as they lie, as transformers calls it, and a search of the index.
Knows a layer by its plan, no tokens of a text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .. import checks, crossover

if TYPE_CHECKING:
    from .plan import LayerPlan

ROUNDS = 7
"""Of which the fastest counts: whatever else runs only makes a step slower."""

EVICT_BYTES = 64 << 20
"""Touched before every step: in a model, weights and other layers pass through the processor's caches between two steps."""


def break_evens(layers: Mapping[int, LayerPlan], modules: Any, dtype: torch.dtype) -> dict[int, int]:
    """``break_even`` by layer, measured once for each kind of layer and kept in the cache folder.

    modules : the decoder layers by number; dtype : of keys and values. Layers whose weights are not in memory, and dtypes that no
    index stores, are left out: for them holds what `Layout` says.
    """
    found: dict[int, int] = {}
    done: dict[str, int] = {}
    for number, layer in layers.items():
        device = next(iter(modules[number].self_attn.parameters())).device
        if device.type == "meta" or dtype not in checks.STORAGE_DTYPES:
            continue
        key = key_of(layer, dtype, device)
        if repr(key) not in done:
            done[repr(key)] = crossover.measured(key, LayerTimes(layer, dtype, device)).tokens
        found[number] = done[repr(key)]
    return found


def key_of(layer: LayerPlan, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What the times of a step depend on, beside the machine."""
    weights = layer.query_router.weights if layer.tower is None else layer.tower.weights
    names = ("selectivity", "nprobe", "target_mass", "max_codes", "tail", "mean_run_tokens", "window", "sinks", "backend")
    return {
        "heads": layer.num_heads, "kv_heads": layer.num_kv_heads, "ranks": layer.shard[1],
        "lists": list(layer.key_quantizer.centroids.shape), "own_lists": layer.tower is not None,
        "router": list(weights.hidden.shape), "dtype": str(dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        **{name: layer.options[name] for name in names if layer.options.get(name) is not None},
    }  # fmt: skip


class LayerTimes:
    """tokens -> seconds of a dense and of a sparse step of one layer, over random keys; see `crossover.Times`."""

    def __init__(self, layer: LayerPlan, dtype: torch.dtype, device: torch.device) -> None:
        self.layer = replace(layer, options={**layer.options, "break_even": 0}, audit=None, _empty={})
        self.dtype, self.device = dtype, device

    @torch.no_grad()
    def __call__(self, tokens: int) -> tuple[float, float]:
        h, _, d = self.layer.key_quantizer.centroids.shape
        h //= self.layer.shard[1]
        groups = self.layer.num_heads // self.layer.num_kv_heads
        draw = torch.Generator().manual_seed(tokens)  # of its own: a user's random numbers stay what they are

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu").to(self.device, self.dtype)

        room = tokens + tokens // 8
        keys, values, query = random(1, h, room, d), random(1, h, room, d), random(1, h * groups, 1, d)
        keys, values = keys[:, :, :tokens], values[:, :, :tokens]
        index = self.layer.new_index(h, d, d, self.dtype, self.device)
        index.add(keys, values)
        module: Any = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
        evict = torch.zeros(EVICT_BYTES // 4, dtype=torch.float32, device=self.device)

        def dense() -> None:
            sdpa_attention_forward(module, query, keys, values, None, scaling=index.scale)

        def sparse() -> None:
            index.search_attend(query).transpose(1, 2).contiguous()

        best = [float("inf"), float("inf")]
        for turn in range(ROUNDS + 1):  # the first prepares what later calls keep
            for side, step in enumerate((dense, sparse)):
                evict.add_(1)
                self._finish()
                began = time.perf_counter()
                step()
                self._finish()
                seconds = time.perf_counter() - began
                best[side] = min(best[side], seconds) if turn else best[side]
        return best[0], best[1]

    def _finish(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
