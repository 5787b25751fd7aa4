"""What is trained of one attention layer, as one record, with its checks. Knows no files and no index."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..errors import CompatibilityError, NotTrainedError, ParameterError
from .calibration import Calibration
from .quantizer import KeyQuantizer
from .rope import Rope
from .router import QueryRouter
from .sampling import Sampling
from .two_tower import TwoTower

MAX_LISTS = 1 << 16
"""Of a KV head, where each prompt makes its own: beyond it lists are no help, and a number in a file no reason to allocate."""

MOST_TARGETS = 16
"""Values of `target_mass` whose allowances a layer keeps."""


@dataclass(frozen=True)
class TrainedLayer:
    """What routes the queries of one attention layer: made by training, kept in files, read by an index.

    Raises ParameterError for a rope, scale or calibration that is none.
    """

    key_quantizer: KeyQuantizer | None
    """The k-means partition of the keys; None before training. With a tower it only says how many lists there are, and is zero
    once written and read."""
    query_router: QueryRouter | None
    """The classifier of queries, for these lists; None before training."""
    rope: Rope | None
    """What the index undoes to route; None for lists of keys as they are."""
    model_rope: Rope | None
    """What the layer rotates by."""
    scale: float
    """Of the logits."""
    tower: TwoTower | None = None
    """Set if the lists are made anew for each prompt: a router for any of them."""
    calibration: Calibration | None = None
    """What `target_mass` makes of the router's word; None takes it at its word."""
    budget_shares: np.ndarray | None = None
    """float32 (h,), what the selectivity is multiplied with for each KV head; mean 1 over the model. None: 1 each."""
    losses: np.ndarray | None = None
    """float32 (h, s), see `training.budget.plan_budget`, at the shares of ``config["budget"]["grid"]``; None: not measured."""
    shared_lists: KeyQuantizer | None = None
    """Beside a tower, lists of the training texts, for where no prompt can have its own: in an engine, in which prompts share
    pages. None in folders of before."""
    sampling: Sampling | None = None
    """What of the budget each KV head spends on a weighted sample; None: nothing."""

    _unread_mass: dict[tuple[float, torch.device], Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        for rope in (self.rope, self.model_rope):
            if rope is not None and not isinstance(rope, Rope):
                raise ParameterError(f"rope: expected a saap_index.Rope or None, got {type(rope).__name__}")
        scale = self.scale
        if not isinstance(scale, int | float | np.number) or not 0 < float(scale) < np.inf:
            raise ParameterError(f"scale: expected a positive number, got {scale!r}")
        object.__setattr__(self, "scale", float(scale))
        if self.calibration is not None and not isinstance(self.calibration, Calibration):
            raise ParameterError(f"calibration: expected a Calibration or None, got {type(self.calibration).__name__}")
        if self.sampling is not None and not isinstance(self.sampling, Sampling):
            raise ParameterError(f"sampling: expected a Sampling or None, got {type(self.sampling).__name__}")

    @property
    def is_trained(self) -> bool:
        return self.key_quantizer is not None and self.query_router is not None

    @property
    def quantizer(self) -> KeyQuantizer:
        """`key_quantizer`; NotTrainedError before training."""
        if self.key_quantizer is None:
            raise NotTrainedError("key_quantizer: expected a trained layer, got one without")
        return self.key_quantizer

    @property
    def router(self) -> QueryRouter:
        """`query_router`; NotTrainedError before training."""
        if self.query_router is None:
            raise NotTrainedError("query_router: expected a trained layer, got one without")
        return self.query_router

    def check(self, num_kv_heads: int, d: int, nlist: int) -> None:
        """CompatibilityError, naming the part, unless all are of this shape; ShapeError or ParameterError for other shares."""
        for rope in (self.rope, self.model_rope):
            if rope is not None and rope.head_dim != d:
                raise CompatibilityError(f"rope: expected head_dim = {d}, got {rope.head_dim}")
        if self.key_quantizer is not None:
            want, got = (num_kv_heads, nlist, d), tuple(self.key_quantizer.centroids.shape)
            if got != want:
                raise CompatibilityError(f"key_quantizer: expected centroids {want}, got {got}")
        if self.query_router is not None:
            self.query_router.check_heads(num_kv_heads, d, nlist)
        if self.tower is not None:
            self.tower.check_heads(num_kv_heads, d)
        if self.calibration is not None and len(self.calibration.unread_mass) != num_kv_heads:
            raise CompatibilityError(f"calibration: expected {num_kv_heads} KV heads, got {len(self.calibration.unread_mass)}")
        if self.sampling is not None and len(self.sampling) != num_kv_heads:
            raise CompatibilityError(f"sampling: expected {num_kv_heads} KV heads, got {len(self.sampling)}")
        if self.budget_shares is not None:
            checks.shares(self.budget_shares, "budget_shares", num_kv_heads)

    def unread_mass(self, target: float, device: torch.device) -> Tensor:
        """Attention per query that every KV head may leave unread for ``target``, by the router's estimate: float32 (h,).

        The same tensor for the same target. CompatibilityError for a router that gives no estimate.
        """
        mass = self._unread_mass.get((target, device))
        if mass is None:
            self.router.check_outside("target_mass")
            table = self.calibration or Calibration.trusting(len(self.router.weights.hidden))
            if len(self._unread_mass) >= MOST_TARGETS:
                self._unread_mass.clear()
            self._unread_mass[target, device] = mass = table.at(target).to(device)
        return mass

    def shared(self) -> tuple[KeyQuantizer, QueryRouter] | None:
        """Lists that are the same for every prompt, and the router for them; None if there are none."""
        if self.tower is None:
            return self.quantizer, self.router
        return None if self.shared_lists is None else (self.shared_lists, self.tower.for_lists(self.shared_lists.centroids))

    def with_lists(self, nlist: int) -> TrainedLayer:
        """The same for another number of lists; ParameterError unless they are made anew for each prompt."""
        checks.integer(nlist, "nlist", 1, MAX_LISTS)
        if self.tower is None:
            raise ParameterError(f"nlist: expected {self.quantizer.nlist}, as these lists were trained, got {nlist}")
        quantizer, router = unmade_lists(self.tower, nlist)
        return replace(self, key_quantizer=quantizer, query_router=router)

    def of_heads(self, share: slice) -> TrainedLayer:
        """The same for some of the KV heads."""
        quantizer, router, tower, calibration = self.key_quantizer, self.query_router, self.tower, self.calibration
        return replace(
            self,
            key_quantizer=None if quantizer is None else quantizer.of_heads(share),
            query_router=None if router is None else replace(router, weights=router.weights.map(lambda x: x[share])),
            tower=None if tower is None else tower.of_heads(share),
            calibration=None if calibration is None else Calibration(calibration.unread_mass[share]),
            budget_shares=None if self.budget_shares is None else self.budget_shares[share],
            losses=None if self.losses is None else self.losses[share],
            shared_lists=None if self.shared_lists is None else self.shared_lists.of_heads(share),
            sampling=None if self.sampling is None else self.sampling.of_heads(share),
        )

    def to(self, device: torch.device | str) -> TrainedLayer:
        """The same on another device."""
        parts = {name: getattr(self, name) for name in ("key_quantizer", "query_router", "tower", "shared_lists")}
        return replace(self, **{name: x.to(device) for name, x in parts.items() if x is not None})


def unmade_lists(tower: TwoTower, nlist: int) -> tuple[KeyQuantizer, QueryRouter]:
    """So many lists that a prompt will make, and the router for them, as `TwoTower.for_lists` gives it for centroids of zero.

    All lists are one piece of memory: how many there are costs nothing before a prompt makes them.
    """
    zeros = torch.zeros((tower.heads, 1, tower.d), dtype=torch.float32, device=tower.weights.hidden.device)
    one = tower.for_lists(zeros).weights
    assert one.lists is not None
    weights = replace(one, nlist=nlist, lists=one.lists.expand(-1, nlist, -1))
    return KeyQuantizer(zeros.expand(-1, nlist, -1)), QueryRouter(weights, tower.first_knot)
