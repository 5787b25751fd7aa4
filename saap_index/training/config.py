"""How a layer is trained, as plain data. Knows no tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ParameterError

ROUTERS = ("kmeans", "linear", "mlp", "mlp-distance", "two-tower")
"""Routers by name, see `TrainingConfig.named`."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How `AsymmetricIndex.train` trains. The defaults were measured on SmolLM2-135M and not tuned per model.

    niter : k-means iterations. hidden : units of the MLP, 0 for a linear router. epochs, lr, batch (query positions), decay :
    AdamW with a one-cycle schedule. distance : learn the distance term. size_weighted : list sizes inside the softmax.
    closed_form : least squares in place of a network. two_tower : a network that serves any partition, see `TwoTower`.
    seed : of k-means, initial weights and order. progress : called with (epoch, epochs, mean loss in nats) after each epoch.
    """

    niter: int = 10
    hidden: int = 64
    epochs: int = 20
    lr: float = 3e-3
    batch: int = 128
    decay: float = 1e-2
    distance: bool = True
    size_weighted: bool = True
    closed_form: bool = False
    two_tower: bool = False
    seed: int = 1234
    progress: Callable[[int, int, float], None] | None = None

    def __post_init__(self) -> None:
        for name, least in (("niter", 1), ("hidden", 0), ("epochs", 1), ("batch", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ParameterError(f"{name}: expected an integer of {least} or more, got {getattr(self, name)!r}")
        for name in ("distance", "closed_form", "two_tower"):
            if getattr(self, name) and not self.size_weighted:
                raise ParameterError(f"{name}: expected size_weighted=True with it, for its scores are per token, got False")
        if self.two_tower and self.closed_form:
            raise ParameterError("two_tower: expected closed_form=False with it, got closed_form=True")

    @classmethod
    def published(cls, **changes: object) -> TrainingConfig:
        """The classifier of the paper: cross-entropy to the mass of whole lists; no distance, no list sizes."""
        return cls(**{"distance": False, "size_weighted": False, **changes})  # type: ignore[arg-type]

    @classmethod
    def named(cls, router: str, **changes: object) -> TrainingConfig:
        """The configuration of one of `ROUTERS`.

        kmeans : none at all, the query is compared with the centroids (train without queries). linear : least squares. mlp : the
        classifier of the paper. mlp-distance : that, per token and with distance; bound to one partition, as those before.
        two-tower : the same network with a key as its output; serves any partition, a prompt's own too.
        """
        if router not in ROUTERS:
            raise ParameterError(f"router: expected one of {', '.join(ROUTERS)}, got {router!r}")
        if router == "mlp":
            return cls.published(**changes)
        # the tower's output is d dims instead of nlist, each with a say in all lists: it bears, and wants, larger steps
        kinds: dict[str, dict[str, object]] = {"linear": {"closed_form": True}, "two-tower": {"two_tower": True, "lr": 6e-3}}
        kind = kinds.get(router, {})
        return cls(**{**kind, **changes})  # type: ignore[arg-type]
