"""``break_even`` of an attached model: what a decode step of a layer takes, dense and sparse, on this machine.

Both sides are what a layer of a cache does: attention to the rows as they lie, and a search of the index.
Knows a layer by its plan, no tokens of a text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .. import checks
from ..index import AsymmetricIndex
from ..invlists.layout import NEVER
from . import capture, crossover
from .layer_plan import LayerPlan

Step = Callable[[], None]

ROUNDS = 7
"""Of which the fastest counts: whatever else runs only makes a step slower."""

EVICT_BYTES = 64 << 20
"""Touched before every step: in a model, weights and other layers pass through the processor's caches between two steps."""


BATCHES = {"cuda": (1, 8)}
"""Sequences of the batches that are measured, by kind of device; one elsewhere. A larger batch gains from fewer tokens on."""


def break_evens(
    layers: Mapping[int, LayerPlan], modules: Any, dtype: torch.dtype, graphs: bool = False
) -> dict[int, dict[int, int]]:
    """``break_even`` by layer and batch, measured once for each kind of layer and kept in the cache folder.

    modules : the decoder layers by number; dtype : of keys and values; graphs : whether steps are to be replayed. Layers whose
    weights are not in memory, and dtypes that no index stores, are left out: for them holds what `Layout` says.
    """
    lengths: dict[int, dict[int, int]] = {}
    done: dict[str, dict[int, int]] = {}
    for number, layer in layers.items():
        device = next(iter(modules[number].self_attn.parameters())).device
        if device.type == "meta" or dtype not in checks.STORAGE_DTYPES:
            continue
        kind = repr(key_of(layer, dtype, device))
        if kind not in done:
            done[kind] = {}
            for batch in BATCHES.get(device.type, (1,)):
                times = LayerTimes(layer, dtype, device, batch, graphs)
                done[kind][batch] = crossover.measured(key_of(layer, dtype, device, batch, graphs), times).tokens
        lengths[number] = done[kind]
    return lengths


def key_of(
    layer: LayerPlan, dtype: torch.dtype, device: torch.device, batch: int = 1, graphs: bool = False
) -> dict[str, Any]:
    """What the times of a step depend on, beside the machine."""
    trained = layer.trained
    weights = trained.router.weights if trained.tower is None else trained.tower.weights
    names = (
        "selectivity", "nprobe", "target_mass", "max_codes", "tail", "sampled_share", "mean_run_tokens", "window", "sinks",
        "backend",
    )
    return {
        "heads": layer.num_heads, "kv_heads": layer.num_kv_heads, "ranks": layer.shard[1],
        "lists": list(trained.quantizer.centroids.shape), "own_lists": trained.tower is not None,
        "router": list(weights.hidden.shape), "dtype": str(dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        **({"batch": batch} if batch > 1 else {}), **({"graphs": True} if graphs else {}),
        **{name: layer.options[name] for name in names if layer.options.get(name) is not None},
    }


class LayerTimes:
    """tokens -> seconds of a dense and of a sparse step of one layer, over random keys; see `crossover.Times`.

    Eager, dense is SDPA over the rows, as transformers calls it. With ``graphs`` both are what a recorded step holds of a layer:
    the token appended, and a search over an index that has nothing sealed, or all that its length asks for.
    """

    def __init__(
        self, layer: LayerPlan, dtype: torch.dtype, device: torch.device, batch: int = 1, graphs: bool = False
    ) -> None:
        self.layer = replace(layer, options={**layer.options, "break_even": 0}, break_evens={}, audit=None, _empty={})
        self.dtype, self.device, self.batch, self.graphs = dtype, device, batch, graphs

    @torch.no_grad()
    def __call__(self, tokens: int) -> tuple[float, float]:
        h, _, d = self.layer.trained.quantizer.centroids.shape
        h //= self.layer.shard[1]
        b, groups = self.batch, self.layer.num_heads // self.layer.num_kv_heads
        draw = torch.Generator(self.device).manual_seed(tokens)  # of its own: a user's random numbers stay what they are

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float32, device=self.device).to(self.dtype)

        room = tokens + tokens // 8
        keys, values, query = random(b, h, room, d), random(b, h, room, d), random(b, h * groups, 1, d)
        keys, values = keys[:, :, :tokens], values[:, :, :tokens]
        index = self.layer.new_index(h, d, d, self.dtype, self.device)
        index.reserve_memory(tokens + 4 * ROUNDS, batch=b)
        index.add(keys, values)
        if self.graphs:
            whole = index.fork()
            whole.break_even = NEVER
            whole.reserve_memory(tokens + 4 * ROUNDS)
            dense, sparse = (self._recorded(x, keys[:, :, :1], values[:, :, :1], query) for x in (whole, index))
        else:
            dense, sparse = self._eager(index, keys, values, query, groups)
        evict = torch.zeros(EVICT_BYTES // 4, dtype=torch.float32, device=self.device)
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

    def _eager(self, index: AsymmetricIndex, keys: Tensor, values: Tensor, query: Tensor, groups: int) -> tuple[Step, Step]:
        module: Any = SimpleNamespace(num_key_value_groups=groups, is_causal=True)

        def dense() -> None:
            sdpa_attention_forward(module, query, keys, values, None, scaling=index.scale)

        def sparse() -> None:
            index.search_attend(query).transpose(1, 2).contiguous()

        return dense, sparse

    def _recorded(self, index: AsymmetricIndex, key: Tensor, value: Tensor, query: Tensor) -> Step:
        """A step in a graph. The device is ahead of the host afterwards, and the index done with."""
        index.search_attend(query)

        def step() -> None:
            index.add(key, value)
            index.search_attend(query).transpose(1, 2).contiguous()

        record = capture.capture_on(self.device)
        assert record is not None
        replay = record(self.device, step)
        return partial(_replay, replay, index)

    def _finish(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


def _replay(replay: Step, index: AsymmetricIndex) -> None:
    """``index`` is there because a graph knows addresses, and not whose they are."""
    replay()
