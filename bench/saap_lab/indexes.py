"""The indexes of a comparison: trained on its training sequences, or taken from what ``saap train`` wrote.

Three kinds: ``saap``, lists shared by all texts; ``saap-own``, lists of each prompt's own and a router for any partition;
``published``, the classifier of the paper. What a router knows of lists of a prompt's own is of that prompt, so it is read for it
alone and charged to it, and a smaller budget gets fewer lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from saap_index.files import make_folder
from saap_index.index import AsymmetricIndex
from saap_index.io import read_index, write_index
from saap_index.routers import Routers
from saap_index.routing.quantizer import KeyQuantizer
from saap_index.training.config import TrainingConfig

from .evaluate import Settings
from .method import ITEM_BYTES, Layer
from .replace import Prompt

CONFIGS = {"saap": TrainingConfig(), "saap-own": TrainingConfig.named("two-tower"), "published": TrainingConfig.published()}
OWN = "saap-own"

LISTS = 256
ROUTING_SHARE = 1 / 3
"""Of a budget that may go into lists of a prompt's own."""

LEAST_BLOCK = 16
"""Tokens sealed at once at least: every block has a table of all lists."""


@dataclass
class Indexes:
    """Indexes by kind, trained when they are first asked for."""

    prompts: Sequence[Prompt]
    """Training sequences."""
    settings: Settings
    numbers: Sequence[int]
    """Of the layers."""
    folder: Path | None = None
    """Where trained indexes are kept; None for nowhere."""
    routers: Routers | None = None
    """Stand for ``saap-own`` if their lists are each prompt's own, else for ``saap``."""
    progress: Callable[[str], None] = lambda line: None
    """Is told what takes long."""
    _trained: dict[str, dict[int, AsymmetricIndex]] = field(default_factory=dict)

    def at(self, name: str, share: float) -> dict[int, AsymmetricIndex]:
        """Empty indexes by layer, for a share of the tokens outside sinks and window."""
        if name not in self._trained:
            self._trained[name] = {}
            for slot, layer in enumerate(self.prompts[0].layers):
                if layer.number in set(self.numbers):
                    self._trained[name][layer.number] = self._index(name, slot, layer)
                    self.progress(f"{name}: index of layer {layer.number}")
        return {number: self._laid_out(index, share) for number, index in self._trained[name].items()}

    def _index(self, name: str, slot: int, layer: Layer) -> AsymmetricIndex:
        routers = self.routers and self.routers.layers.get(layer.number)
        outside: dict[str, Any] = {"window": self.settings.window, "sinks": self.settings.sinks, "break_even": 0}
        if routers and (OWN if routers.tower is not None else "saap") == name:
            assert self.routers is not None
            return self.routers.index(layer.number, dtype=layer.dtype, **outside)  # a short text is no excuse here: break_even
        path = self.folder and self.folder / f"{name}.{layer.number}.saap"
        if path and path.is_file():
            return read_index(path)
        keys, queries = (torch.stack([getattr(p, part)[slot] for p in self.prompts]).cpu() for part in ("keys", "queries"))
        positions = torch.stack([p.positions for p in self.prompts])
        budget = {"nprobe": 32} if name == "published" else {"selectivity": 0.05}
        nlist = min(LISTS, max(8, keys.shape[2] // 32))
        options = {"d_v": layer.e, "rope": layer.rope, "scale": layer.scale, "dtype": layer.dtype, **outside, **budget}
        index = AsymmetricIndex(layer.d, nlist, layer.heads * layer.group, layer.heads, **options)
        index.train(keys, queries.flatten(1, 2), positions=positions, config=replace(CONFIGS[name], seed=1234))
        if path:
            make_folder(path.parent)
            write_index(index, path)
        return index

    def _laid_out(self, index: AsymmetricIndex, share: float) -> AsymmetricIndex:
        """The same maps in a layout for so small a share: recent tokens that wait to be sealed are read anyway, so a block is at
        most a quarter of the budget; and of lists of a prompt's own as many, a power of two, as a third of the bytes pays for."""
        assert index.key_quantizer is not None and index.query_router is not None
        between = len(self.prompts[0].tokens) - self.settings.sinks - self.settings.window
        nlist, centroids, tower = index.nlist, index.key_quantizer.centroids, index.tower
        if tower is not None:
            room = ROUTING_SHARE * share * between * (index.d + index.d_v) * ITEM_BYTES / tower.d
            nlist = max([4, *(2**i for i in range(2, 20) if 2**i <= min(room, nlist))])
        block = min(index.layout.block, max(LEAST_BLOCK, 1 << max(0, int(share * between / 4).bit_length() - 1)))
        budget: dict[str, Any] = {} if index.nprobe is None else {"nprobe": index.nprobe}
        fitted = AsymmetricIndex(
            index.d, nlist, index.num_heads, index.num_kv_heads, d_v=index.d_v, rope=index.rope, scale=index.scale,
            dtype=index.dtype, window=index.layout.window, sinks=index.layout.sinks, break_even=0, seal_tokens=block,
            budget_shares=index.budget_shares, **budget,
        )
        fitted.key_quantizer = KeyQuantizer(centroids[:, :nlist].contiguous())  # a prompt's own replace the first ones
        if tower is None:
            fitted.query_router = index.query_router
        else:
            fitted.tower = tower
        return fitted
