"""The query router: from a query to a score for every inverted list, and a distance term. Knows queries, not tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..backends import RouterWeights
from ..backends.base import knots_of
from ..errors import CompatibilityError, ShapeError


@dataclass(frozen=True)
class QueryRouter:
    """One small MLP per KV head, applied to each query head of its group; frozen and shared by every sequence.

    weights : see `RouterWeights`; the input is the query with RoPE undone if the index has a `Rope`, else as it comes.
    first_knot : log2 of the distance, in tokens, of the first knot; the knots are an octave apart.
    size_weighted : whether z is log mass per *token* (list sizes enter the softmax, the default of training) or, as in the
        published classifier, the log probability of a whole list.

    Source: SAAP (arXiv 2502.08246) for the classifier; the distance term and the list sizes in the softmax are this library's.
    """

    weights: RouterWeights
    first_knot: int = 7
    size_weighted: bool = True

    def __post_init__(self) -> None:
        checks.integer(self.first_knot, "first_knot", 0, 62)
        w = self.weights
        if w.hidden.ndim != 3:
            raise ShapeError(f"router hidden: expected shape (h, u, d), got {tuple(w.hidden.shape)}")
        h, u, d = w.hidden.shape
        outputs = w.bias_out.shape[-1]
        shapes = {
            "bias_hidden": (h, u), "out": (h, outputs, u), "skip": (h, outputs, d), "bias_out": (h, outputs), "hidden": (h, u, d),
        }
        if (w.lists is None) != (w.list_scales is None):
            raise ShapeError("router lists, list_scales: expected both or neither, got one")
        if w.lists is not None:
            k = w.lists.shape[-1] if w.lists.ndim == 3 else 0
            shapes |= {"lists": (h, w.nlist, k), "list_scales": (h, k)}
        else:
            k = w.nlist
        if outputs < k:
            named = f"nlist = {k}" if w.lists is None else f"{k}, as lists has dims,"
            raise ShapeError(f"router bias_out: expected at least {named} outputs, got {outputs}")
        for name, shape in shapes.items():
            x = getattr(w, name)
            checks.array(x, f"router {name}", " ".join("hxy"[: len(shape)]), shape, [torch.float32], w.hidden.device)
            checks.finite(x, f"router {name}")

    @property
    def nlist(self) -> int:
        return self.weights.nlist

    @property
    def num_knots(self) -> int:
        return self.weights.num_knots

    @property
    def predicts_outside(self) -> bool:
        """Whether there is an output for the share of the attention outside sinks and window."""
        return self.size_weighted and int(self.weights.bias_out.shape[1]) > self.weights.leading

    def knots(self, distances: np.ndarray) -> np.ndarray:
        """Where distances in tokens lie on the knots: float32 in [0, m - 1], clamped at both ends. Of the shape of distances."""
        return knots_of(distances, self.first_knot, self.num_knots)

    def to(self, device: torch.device | str) -> QueryRouter:
        return QueryRouter(self.weights.map(lambda x: x.to(device)), self.first_knot, self.size_weighted)

    def tensors(self) -> dict[str, Tensor]:
        return self.weights.tensors()

    def nbytes(self) -> int:
        return self.weights.nbytes

    @classmethod
    def symmetric(cls, centroids: Tensor) -> QueryRouter:
        """Plain IVF: a query goes to the lists whose centroids have the largest inner product with it. No training."""
        h, nlist, d = centroids.shape
        zeros = centroids.new_zeros
        weights = RouterWeights(zeros((h, 0, d)), zeros((h, 0)), zeros((h, nlist, 0)), centroids, zeros((h, nlist)), nlist)
        return cls(weights, size_weighted=True)

    def check_heads(self, num_kv_heads: int, d: int, nlist: int) -> None:
        """CompatibilityError if the router belongs to another head shape or partition."""
        h, _, dim = self.weights.hidden.shape
        if (h, dim, self.nlist) != (num_kv_heads, d, nlist):
            raise CompatibilityError(
                f"query_router: expected {num_kv_heads} KV heads, d = {d}, nlist = {nlist}, got {h}, {dim}, {self.nlist}"
            )

    def check_outside(self, what: str) -> None:
        """CompatibilityError, naming ``what`` needs it, if no output predicts the attention outside sinks and window."""
        if not self.predicts_outside:
            kind = "a symmetric one, or one of lists alone" if self.size_weighted else "the published classifier"
            raise CompatibilityError(
                f"{what}: expected a query_router that predicts the attention outside sinks and window, got {kind}"
            )
