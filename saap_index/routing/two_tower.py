"""A router for any partition: from a query to the key it looks for, which the centroid of any list can be compared with.

A `QueryRouter` is bound to the lists it was trained for. This network is not: it maps a query into the space of keys (RoPE
undone, if there is RoPE), and a list scores what its centroid's inner product with that vector is. So the partition may change
without training, even with every prompt: its own k-means separates its own content better than centroids of other texts do, most
of all if the text is of another kind. Knows queries and centroids, not tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .. import checks
from ..backends import RouterWeights
from ..errors import CompatibilityError, ShapeError
from ..invlists.segmented import SegmentedInvertedLists
from ..precision import full_precision
from .quantizer import MAX_POINTS_PER_CENTROID, Assign, KeyQuantizer
from .rope import Rope
from .router import QueryRouter

TRANSFORM = "transform"

POWER, RIDGE = 0.7, 0.02
"""Of the second moment of what queries look for, its power and what is added to its mean: chosen on SmolLM2-135M. The queries of
one text are not those of the next, so directions that these never look in are not to be worth nothing."""


@dataclass(frozen=True)
class TwoTower:
    """One small MLP per KV head, frozen and shared by every sequence and partition.

    weights : `RouterWeights` with d in place of l: the first d outputs are the wanted key w(q), the next m the distance term at
        the knots, the last the share of attention outside sinks and window. first_knot : as in `QueryRouter`.
    transform : float32 (h, d, d) or None, of the lists that prompts make, see `with_transform`.

    The score of list l, log attention mass per token, is z_l(q) = <centroid of l, w(q)> + const(q).

    Source: the two maps onto one partition are SAAP's (arXiv 2502.08246); that the second is a map into key space, so that the
    partition is free, is two-tower retrieval (Covington et al., RecSys 2016).
    """

    weights: RouterWeights
    first_knot: int = 7
    transform: Tensor | None = None

    def __post_init__(self) -> None:
        router = QueryRouter(self.weights, self.first_knot)  # checks all but what follows
        d = self.weights.hidden.shape[2]
        if router.nlist != d or not router.predicts_outside:
            raise ShapeError(f"two-tower router: expected d + m + 1 outputs, the first d = {d} a key, got nlist = {router.nlist}")
        if self.transform is not None:
            device = self.weights.hidden.device
            checks.array(self.transform, "transform", "h d d", (self.heads, d, d), [torch.float32], device)
            checks.finite(self.transform, "transform")

    @classmethod
    def symmetric(cls, heads: int, d: int, scale: float = 1.0) -> TwoTower:
        """Plain IVF: the key that a query looks for is the query itself, times ``scale``. No training."""
        skip = (
            torch.cat([torch.eye(d, dtype=torch.float32, device="cpu"), torch.zeros(1, d, dtype=torch.float32, device="cpu")])
            .mul(scale)
            .expand(heads, -1, -1)
            .contiguous()
        )
        zeros = skip.new_zeros
        return cls(
            RouterWeights(zeros((heads, 0, d)), zeros((heads, 0)), zeros((heads, d + 1, 0)), skip, zeros((heads, d + 1)), d)
        )

    @property
    def d(self) -> int:
        return int(self.weights.hidden.shape[2])

    @property
    def heads(self) -> int:
        return int(self.weights.hidden.shape[0])

    def for_lists(self, centroids: Tensor) -> QueryRouter:
        """The router for lists with these centroids : float32 (h, l, d).

        Centroids are compared without their mean, which says nothing of any list, and with 8 bits a dim: a step reads them all,
        and the order of the lists is hardly another.
        """
        if centroids.ndim != 3 or (centroids.shape[0], centroids.shape[2]) != (self.heads, self.d):
            raise CompatibilityError(
                f"two-tower router: expected centroids ({self.heads}, l, {self.d}), got {tuple(centroids.shape)}"
            )
        apart = centroids - centroids.mean(1, keepdim=True)
        scales = (apart.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        lists = (apart / scales[:, None]).round().clamp(-127, 127)
        weights = replace(self.weights, nlist=int(centroids.shape[1]), lists=lists, list_scales=scales)
        return QueryRouter(weights, self.first_knot)

    @full_precision
    def with_transform(self, queries: Tensor) -> TwoTower:
        """With a transform for queries like these : float (h, g, q, d), RoPE undone, some hundreds of a few texts.

        How far lists are off by a key counts as queries see it: <k - c, w(q)>, whose mean square over queries is
        (k - c)' M (k - c) with M the second moment of the keys they look for, each as often as it attends outside sinks and
        window. K-means in the metric of M spends its lists where queries tell keys apart, not where keys differ most. `POWER`
        says how far.

        Source: k-means under a quadratic form; that the form is the other side's second moment is score-aware quantisation
        (Guo et al., ScaNN, ICML 2020, whose loss it is without its weighing by direction).
        """
        y = self._outputs(queries.float())
        wanted, weight = y[..., : self.d].double(), torch.sigmoid(y[..., -1:].double())
        moment = torch.einsum("hgqd,hgqe->hde", wanted * weight, wanted) / weight.sum((1, 2)).clamp(min=1e-30)[..., None]
        values, vectors = torch.linalg.eigh(moment)
        values = values / values.mean(1, keepdim=True).clamp(min=1e-30) + RIDGE
        root = vectors * values[:, None] ** (POWER / 2) @ vectors.transpose(1, 2)
        return replace(self, transform=root.to(torch.bfloat16).float().contiguous())

    def mixed(self, other: TwoTower) -> TwoTower:
        """With the mean of both transforms, of towers that have some: lists for queries of either kind."""
        assert self.transform is not None and other.transform is not None
        mean = (self.transform + other.transform.to(self.transform.device)) / 2
        return replace(self, transform=mean.to(torch.bfloat16).float())

    @full_precision
    def _outputs(self, queries: Tensor) -> Tensor:
        """Of queries : float32 (h, g, q, d), all outputs: (h, g, q, d + m + 1)."""
        w = self.weights
        inner = functional.silu(torch.einsum("hgqd,hud->hgqu", queries, w.hidden) + w.bias_hidden[:, None, None])
        y = torch.einsum("hgqu,hlu->hgql", inner, w.out) + torch.einsum("hgqd,hld->hgql", queries, w.skip)
        return y + w.bias_out[:, None, None]

    def for_prompt(self, keys: Tensor, nlist: int, assign: Assign | None = None) -> tuple[KeyQuantizer, QueryRouter]:
        """Lists of a prompt's own, from its keys with RoPE undone : float (h, n, d), and the router for them.

        assign : as in `KeyQuantizer.of_prompt`.
        """
        quantizer = KeyQuantizer.of_prompt(keys, nlist, assign=assign, transform=self.transform)
        return quantizer, self.for_lists(quantizer.centroids)

    def to(self, device: torch.device | str) -> TwoTower:
        transform = None if self.transform is None else self.transform.to(device)
        return TwoTower(self.weights.map(lambda x: x.to(device)), self.first_knot, transform)

    def of_heads(self, share: slice) -> TwoTower:
        """The same for some of the KV heads."""
        transform = None if self.transform is None else self.transform[share]
        return TwoTower(self.weights.map(lambda x: x[share]), self.first_knot, transform)

    def tensors(self) -> dict[str, Tensor]:
        """By name; the transform only if there is one."""
        return {**self.weights.tensors(), **({} if self.transform is None else {TRANSFORM: self.transform})}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], d: int, first_knot: int, prefix: str = "") -> TwoTower:
        """From `tensors`, or from a file's that has them under ``prefix`` and their names. LookupError if some are missing."""
        return cls(RouterWeights.of(tensors, d, prefix), first_knot, tensors.get(prefix + TRANSFORM))

    def check_heads(self, num_kv_heads: int, d: int) -> None:
        """CompatibilityError if the router belongs to another head shape."""
        if (self.heads, self.d) != (num_kv_heads, d):
            raise CompatibilityError(f"tower: expected {num_kv_heads} KV heads and d = {d}, got {self.heads} and {self.d}")


def prompt_keys(
    lists: SegmentedInvertedLists, keys: Tensor, counts: Sequence[int], rotated: Sequence[int] | None, rope: Rope | None
) -> Tensor:
    """What the lists of a batch are made from: its keys with RoPE undone, float32 (h, m, d), of all sequences behind each other.

    keys : storage dtype (b, h, n, d), of which counts[i] are about to follow those that are stored; rotated : the length at which
    those of each sequence were rotated, where the angles depend on it. All keys, or every so many-th of each sequence if there
    are more than k-means takes.
    """
    totals = [n + count for n, count in zip(lists.lengths, counts, strict=True)]
    step = max(1, sum(totals) // (lists.nlist * MAX_POINTS_PER_CENTROID))
    parts = []
    for i, (n, total) in enumerate(zip(lists.lengths, totals, strict=True)):
        ranks = np.arange(step // 2, total, step)
        x = lists.key_rows(i, 0, n)
        x = x if total == n else torch.cat([x, keys[i, :, : total - n]], 1)
        x = x[:, step // 2 :: step].float()
        places = np.where(ranks < n, lists.positions(i, np.minimum(ranks, max(0, n - 1))), ranks + lists.gaps[i].count)
        lengths = None
        if rope is not None and rope.is_dynamic:
            each = np.append(lists.rotated.at(i, 0, n), [0 if rotated is None else rotated[i]])
            lengths = each[np.minimum(ranks, n)]
        parts.append(x if rope is None else rope.unrotate(x, places, lengths))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
