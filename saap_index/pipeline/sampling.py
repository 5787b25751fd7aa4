"""Calibrating routers that were trained before, from captures of a model: the metric of the lists that prompts make, and the
weighted sample. Nothing is trained anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..errors import ParameterError
from ..invlists.layout import Layout
from ..routers import Routers
from ..training.measure import HeldOut
from ..training.sampling import best_sampling, sample_errors
from .capture import Capture, LayerCapture

Texts = Sequence[Callable[[int], tuple[Capture, LayerCapture]]]
"""Of each text, from the number of a layer to the capture and that layer's part of it."""


def with_transforms(routers: Routers, texts: Texts) -> Routers:
    """The same routers, with `TwoTower.transform` of every layer that has a tower, for queries like those of these texts: some
    tens of positions past an eighth of four varied ones are enough. ParameterError without texts.

    What else was measured of them was measured on the lists of before; these capture more.
    """
    if not texts:
        raise ParameterError("texts: expected at least one, got none")
    layers = {}
    for number, layer in routers.layers.items():
        if layer.tower is not None:
            parts = []
            for text in texts:
                capture, row = text(number)
                x = row.queries[0].float().reshape(layer.tower.heads, -1, *row.queries.shape[2:])
                parts.append(x if layer.rope is None else layer.rope.unrotate(x, capture.positions.numpy(), row.keys.shape[2]))
            layer = replace(layer, tower=layer.tower.with_transform(torch.cat(parts, 2)))
        layers[number] = layer
    return Routers(routers.config, layers)


def with_sampling(routers: Routers, texts: Texts, step: Callable[[int], None] | None = None) -> Routers:
    """The same routers, with `TrainedLayer.sampling` of every layer as these texts ask for.

    texts : some tens of query positions past an eighth of four of them are enough. They should be as varied as those of the
    training, and in no test. step : told of each layer that is done.

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
            keys, values, queries = (x[0] for x in (row.keys, row.values, row.queries))
            held_out = HeldOut.of(keys, values, queries, capture.positions.numpy(), layer.rope)
            layout = replace(Layout(**settings), break_even=min(Layout().break_even, keys.shape[1] // 2))
            parts = layer.quantizer, layer.router
            if layer.tower is not None:  # lists of the text itself, as far as it was read before the first query
                first = int(held_out.positions.min())
                parts = layer.tower.for_prompt(held_out.coarse[:, :first], layer.quantizer.nlist)
            errors.append(sample_errors(*held_out.replayed(*parts, layout, layer.scale)))
        layers[number] = replace(layer, sampling=best_sampling(errors))
        if step is not None:
            step(number)
    return Routers(routers.config, layers)
