"""What the index of one layer is made from: shapes, routers, options. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CompatibilityError
from ..index import AsymmetricIndex
from ..invlists.layout import Layout
from ..routing.trained import TrainedLayer
from .audit import Audit
from .sample import QuerySample


@dataclass(frozen=True)
class LayerPlan:
    """One layer: what an empty index of it is made of.

    num_heads, num_kv_heads : of the whole model; shard : (rank, ranks), the share of them in this process.
    trained : of all its KV heads. options : of `AsymmetricIndex`, but what is trained.
    layer_type : what the config calls it, if it tells layers apart. audit : compares some searches with dense attention, or None.
    break_evens : what was measured, by sequences of a batch; empty where it was given. sample : to begin with in each cache, if
    prompts are to be learnt from.
    """

    number: int
    num_heads: int
    num_kv_heads: int
    trained: TrainedLayer
    options: Mapping[str, Any]
    shard: tuple[int, int]
    layer_type: str | None = None
    audit: Audit | None = field(default=None, repr=False, compare=False)
    break_evens: Mapping[int, int] = field(default_factory=dict)
    sample: QuerySample | None = field(default=None, repr=False, compare=False)
    _empty: dict[Any, AsymmetricIndex] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_empty": {}}  # made again where the model is loaded

    def break_even(self, batch: int) -> int:
        """Tokens below which a batch of so many sequences stays dense: as measured for the largest batch that is no larger."""
        measured = [n for n in self.break_evens if n <= batch]
        if measured:
            return self.break_evens[max(measured)]
        return int(self.options.get("break_even", Layout().break_even))

    def new_index(self, kv_heads: int, d: int, d_v: int, dtype: torch.dtype, device: torch.device) -> AsymmetricIndex:
        """An empty index for keys of this shape; the packed router and quantizer are shared by all of one kind.

        Raises CompatibilityError for keys of another shape than the routers were trained on.
        """
        rank, ranks = self.shard
        _, nlist, dim = self.trained.quantizer.centroids.shape
        if kv_heads * ranks != self.num_kv_heads or d != dim:
            raise CompatibilityError(
                f"layer {self.number}: expected keys of {self.num_kv_heads // ranks} KV heads and {dim} dims, "
                f"got {kv_heads} and {d}"
            )
        key = d_v, dtype, device
        if key not in self._empty:
            mine = self.trained.of_heads(slice(rank * kv_heads, (rank + 1) * kv_heads))
            heads = self.num_heads // self.num_kv_heads * kv_heads
            kinds: dict[str, Any] = {"d_v": d_v, "dtype": dtype, "device": device}
            parts: dict[str, Any] = {"rope": mine.rope, "budget_shares": mine.budget_shares}
            index = AsymmetricIndex(d, nlist, heads, kv_heads, **kinds, **parts, **self.options)
            index.load_trained(mine)
            self._empty[key] = index
        return self._empty[key].fork()
