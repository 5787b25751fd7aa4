"""What the index of one layer is made from: shapes, routers, options. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..backends import RouterWeights
from ..errors import CompatibilityError
from ..index import AsymmetricIndex
from ..invlists.layout import Layout
from ..routing.calibration import Calibration
from ..routing.quantizer import KeyQuantizer
from ..routing.rope import Rope
from ..routing.router import QueryRouter
from ..routing.two_tower import TwoTower
from .audit import Audit


@dataclass(frozen=True)
class LayerPlan:
    """One layer: what an empty index of it is made of.

    num_heads, num_kv_heads : of the whole model; shard : (rank, ranks), the share of them in this process.
    rope : what the index undoes to route; tower : makes lists of each prompt's own, or None. options : of `AsymmetricIndex`.
    layer_type : what the config calls it, if it tells layers apart. audit : compares some searches with dense attention, or None.
    break_evens : what was measured, by sequences of a batch; empty where it was given.
    """

    number: int
    num_heads: int
    num_kv_heads: int
    rope: Rope | None
    key_quantizer: KeyQuantizer
    query_router: QueryRouter
    tower: TwoTower | None
    calibration: Calibration | None
    options: Mapping[str, Any]
    shard: tuple[int, int]
    layer_type: str | None = None
    audit: Audit | None = field(default=None, repr=False, compare=False)
    break_evens: Mapping[int, int] = field(default_factory=dict)
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
        dim = self.key_quantizer.centroids.shape[2]
        if kv_heads * ranks != self.num_kv_heads or d != dim:
            raise CompatibilityError(
                f"layer {self.number}: expected keys of {self.num_kv_heads // ranks} KV heads and {dim} dims, "
                f"got {kv_heads} and {d}"
            )
        key = d_v, dtype, device
        if key not in self._empty:
            share = slice(rank * kv_heads, (rank + 1) * kv_heads)
            options = dict(self.options)
            if options.get("budget_shares") is not None:
                options["budget_shares"] = options["budget_shares"][share]
            heads = self.num_heads // self.num_kv_heads * kv_heads
            nlist = self.key_quantizer.nlist
            index = AsymmetricIndex(d, nlist, heads, kv_heads, d_v=d_v, dtype=dtype, device=device, rope=self.rope, **options)
            index.key_quantizer = KeyQuantizer(self.key_quantizer.centroids[share].contiguous())
            if self.tower is not None:
                index.tower = TwoTower(_weights_of(self.tower.weights, share), self.tower.first_knot)
            else:
                index.query_router = _share_of(self.query_router, share)
            if self.calibration is not None:
                index.calibration = Calibration(self.calibration.miss[share].contiguous())
            self._empty[key] = index
        return self._empty[key].fork()


def _share_of(router: QueryRouter, share: slice) -> QueryRouter:
    """The router of some of the KV heads."""
    return QueryRouter(_weights_of(router.weights, share), router.first_knot, router.count_lists)


def _weights_of(w: RouterWeights, share: slice) -> RouterWeights:
    return w.map(lambda x: x[share].contiguous())
