"""Calibrating the weighted sample of routers that were trained before, from captures of a model: nothing is trained anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import ParameterError
from ..invlists.layout import Layout
from ..routers import Routers
from ..training.measure import HeldOut
from ..training.sampling import best_sampling, sample_errors
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
