"""Calibrating the weighted sample of routers that were trained before, from captures of a model: nothing is trained anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..errors import ParameterError
from ..invlists.layout import Layout
from ..routers import Routers
from ..training.sampling import MEASURED, best_sampling, sample_errors
from .capture import Capture, LayerCapture


def with_sampling(
    routers: Routers, texts: Sequence[Callable[[int], tuple[Capture, LayerCapture]]], step: Callable[[int], None] | None = None
) -> Routers:
    """The same routers, with `TrainedLayer.sampling` of every layer as these texts ask for.

    texts : of each text, from the number of a layer to the capture and that layer's part of it; some tens of query positions past
    an eighth of four texts are enough. They should be as varied as those of the training, and in no test. step : told of each
    layer that is done.

    Raises ParameterError without texts, and what `best_sampling` raises.
    """
    if not texts:
        raise ParameterError("texts: expected at least one, got none")
    settings = {name: value for name, value in routers.config.get("layout", {}).items() if name in ("sinks", "window")}
    layers = {}
    for number, layer in routers.layers.items():
        errors = []
        for text in texts:
            capture, row = text(number)
            every = capture.positions.numpy()
            some = np.unique(np.linspace(0, len(every) - 1, min(len(every), MEASURED)).round().astype(np.int64))
            places, keys, values = every[some], row.keys[0].float(), row.values[0].float()
            h, n, d = keys.shape
            layout = replace(Layout(**settings), break_even=min(Layout().break_even, n // 2))
            grouped = row.queries[0][:, some].float().reshape(h, -1, len(some), d)
            rope = layer.rope
            coarse = keys if rope is None else rope.unrotate(keys, np.arange(n), n)
            routed = grouped if rope is None else rope.unrotate(grouped, places, n)
            parts = layer.quantizer, layer.router
            if layer.tower is not None:  # lists of the text itself, as far as it was read before the first query
                parts = layer.tower.for_prompt(coarse[:, : int(places.min())], layer.quantizer.nlist)
            replayed = keys, values, grouped, routed, places, parts[0].assign(coarse), parts[1], layout, layer.scale
            errors.append(sample_errors(*replayed))
        layers[number] = replace(layer, sampling=best_sampling(errors))
        if step is not None:
            step(number)
    return Routers(routers.config, layers)
