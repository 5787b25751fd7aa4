"""Lists of training texts for routers that were made without: for an engine, which shares pages between prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ParameterError
from ..hf.models import LoadedModel
from ..routers import LayerRouters, Routers
from ..routing.quantizer import MAX_POINTS_PER_CENTROID, KeyQuantizer, require_faiss
from . import capture
from .texts import TokenSequence


def with_shared_lists(
    loaded: LoadedModel, routers: Routers, sequences: Sequence[TokenSequence], nlist: int = 256, seed: int = 0,
    step: Callable[[int], None] | None = None,
) -> Routers:
    """The routers with `LayerRouters.shared_lists` of the keys of these texts; layers that make no lists stay as they are.

    step : told of every text that is read. Needs memory for ``256 * nlist`` keys of every layer. Raises ParameterError without
    texts, MissingDependencyError without FAISS, CompatibilityError for routers of another model.
    """
    require_faiss()
    routers.check(loaded.model.config)
    if not sequences:
        raise ParameterError("sequences: expected at least one text, got none")
    wanted = {number: layer for number, layer in routers.layers.items() if layer.tower is not None}
    found: dict[int, list[Tensor]] = {number: [] for number in wanted}
    stride = max(1, sum(len(tokens) for _, tokens in sequences) // (nlist * MAX_POINTS_PER_CENTROID))

    def keep(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        if layer in wanted:
            rope, n = wanted[layer].rope, key.shape[2]
            places = torch.arange(stride // 2, n, stride, dtype=torch.int64, device=key.device)
            some = key[0, :, places].float()
            found[layer].append((some if rope is None else rope.unrotate(some, places, n)).cpu())

    for number, (_, tokens) in enumerate(sequences):
        capture.run(loaded.model, tokens, keep)
        if step is not None:
            step(number + 1)

    def made(number: int, layer: LayerRouters) -> LayerRouters:
        if number not in wanted:
            return layer
        quantizer = KeyQuantizer.train(torch.cat(found.pop(number), 1), nlist, seed=seed * 1009 + number)
        return replace(layer, shared_lists=quantizer.rounded())

    return Routers(routers.config, {number: made(number, layer) for number, layer in routers.layers.items()})
