"""What records a decode step for replay: CUDA graphs of torch. And which decoders are known to do what no graph can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..backends import get_backend
from . import support
from .layer_plan import LayerPlan

Capture = Callable[[torch.device, Callable[[], None]], Callable[[], None]]
"""(device, step) -> replay: records what ``step`` launches instead of running it, and returns what runs it."""


def torch_capture(device: torch.device, step: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of torch. Other threads may use the device meanwhile."""
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    return graph.replay


def capture_on(device: torch.device) -> Capture | None:
    """What records a step on ``device``; None for a kind of device without graphs."""
    return torch_capture if device.type == "cuda" else None


def obstacle(decoder: Any, layers: Mapping[int, LayerPlan]) -> str | None:
    """Why no step of this decoder can be recorded, in words that follow "got"; None if nothing is known that is in the way.

    layers : those that are indexed.
    """
    devices = {x.device for x in decoder.parameters()}
    modules = support.attention_layers(decoder)
    whole = support.global_layers(decoder)
    sliding = [number for number in range(len(modules)) if number not in whole]
    dims = {n: getattr(modules[n].self_attn, "head_dim", 0) for n in whole if n not in layers}
    odd = {n: d for n, d in dims.items() if not isinstance(d, int) or d % support.DIM_STEP or not 0 < d <= support.MAX_DIM}
    if len(devices) != 1 or capture_on(next(iter(devices))) is None:
        return f"one on {', '.join(sorted(map(str, devices))) or 'no device'}"
    if not all(get_backend(next(iter(devices)), x.options.get("backend")).captures for x in layers.values()):
        return "a backend that keeps no state on the device"
    if "forward" in vars(decoder) or any(hasattr(module, "_hf_hook") for module in decoder.modules()):
        return "one whose forward something else has wrapped"
    if any(layer.shard[1] > 1 for layer in layers.values()):
        return "one that is split among processes"
    if any(layer.trained.rope is not None and layer.trained.rope.is_dynamic for layer in layers.values()):
        return "a rope whose angles depend on the length"
    if sliding:
        return f"layers with a window, {sliding}"
    if odd:
        return f"dense layers with head dims that the kernels do not take, {odd}"
    return None
