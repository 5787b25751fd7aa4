"""The key quantizer: the k-means partition that decides in which inverted list a key lies. Knows keys, not queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .. import checks
from ..errors import MissingDependencyError, ParameterError
from ..precision import full_precision

MAX_POINTS_PER_CENTROID = 256  # FAISS's own default: more keys make the centroids hardly better
PROMPT_ITERATIONS = 3
"""Steps of k-means over a prompt, each over every second key. The first token waits for them: on SmolLM2 at 8k eight steps over
all keys take five times as long, and capture 0.3 points more of the attention at 5 %."""

_KEYS_OF_A_HALF = 4  # per list: with fewer, a step looks at all keys

Assign = Callable[["KeyQuantizer", Tensor], Tensor]
"""Of a quantizer and keys float32 (h, n, d): the nearest centroid of every key, integers (h, n)."""


@dataclass(frozen=True)
class KeyQuantizer:
    """Centroids of every KV head, trained once per attention layer, frozen, and shared by every sequence.

    centroids : float32 (h, l, d), of keys with RoPE undone if the index has a `Rope`, else of keys as they come.
    transform : float32 (h, d, d), what keys and centroids are multiplied with before they are compared, so that directions in
        which queries tell keys apart count for more; see `TwoTower.transform`. None: they are compared as they are.
    """

    centroids: Tensor
    transform: Tensor | None = None

    def __post_init__(self) -> None:
        checks.array(self.centroids, "centroids", "h l d", (None, None, None), [torch.float32], self.centroids.device)
        checks.finite(self.centroids, "centroids")
        if self.transform is not None:
            h, _, d = self.centroids.shape
            checks.array(self.transform, "transform", "h d d", (h, d, d), [torch.float32], self.centroids.device)
            checks.finite(self.transform, "transform")

    @property
    def nlist(self) -> int:
        return int(self.centroids.shape[1])

    def to(self, device: torch.device | str) -> KeyQuantizer:
        return KeyQuantizer(self.centroids.to(device), None if self.transform is None else self.transform.to(device))

    def of_heads(self, share: slice) -> KeyQuantizer:
        """The same for some of the KV heads."""
        return KeyQuantizer(self.centroids[share], None if self.transform is None else self.transform[share])

    @full_precision
    def products(self) -> tuple[Tensor, Tensor | None]:
        """What a list is found by: vectors v float32 (h, l, d) and a bias b float32 (h, l), so that a key k lies in the list with
        the largest <k, v> + b. None for the bias of Euclidean distance, -|v|^2 / 2, which `Backend.prepare_quantizer` knows.

        With a transform T, |kT - cT|^2 is least where <k, c T T'> - |cT|^2 / 2 is largest: a key need not be transformed. What
        all centroids have in common is left out, for it raises the score of every list alike.
        """
        if self.transform is None:
            return self.centroids, None
        middle = self.centroids.mean(1, keepdim=True)
        apart, common = (self.centroids - middle) @ self.transform, middle @ self.transform
        bias = -0.5 * apart.square().sum(-1) - (apart * common).sum(-1)
        return (apart @ self.transform.transpose(1, 2)).contiguous(), bias

    @full_precision
    def assign(self, keys: Tensor) -> Tensor:
        """Nearest centroid of keys : float (h, n, d) with RoPE undone, once transformed; int32 (h, n). Ties go to the lower
        list."""
        vectors, bias = self.products()
        bias = -0.5 * vectors.square().sum(-1) if bias is None else bias
        return torch.baddbmm(bias[:, None], keys.float(), vectors.transpose(1, 2)).max(-1).indices.int()

    @classmethod
    def train(cls, keys: Tensor, nlist: int, niter: int = 10, seed: int = 1234) -> KeyQuantizer:
        """Lloyd's k-means by FAISS on keys : float32 (h, n, d), every KV head on its own.

        Raises ParameterError with fewer than ``nlist`` keys, MissingDependencyError without FAISS.
        """
        faiss = require_faiss()
        heads, n, d = keys.shape
        if n < nlist:
            raise ParameterError(f"keys: expected at least nlist = {nlist} keys per KV head to train on, got {n}")
        centroids = np.empty((heads, nlist, d), np.float32)
        for head in range(heads):
            x = np.ascontiguousarray(keys[head].float().cpu().numpy())
            kmeans = faiss.Kmeans(
                d,
                nlist,
                niter=niter,
                seed=seed + head,
                min_points_per_centroid=1,
                max_points_per_centroid=MAX_POINTS_PER_CENTROID,
            )
            kmeans.train(x)
            centroids[head] = kmeans.centroids
        return cls(torch.from_numpy(centroids).to(keys.device))

    @classmethod
    def of_prompt(
        cls, keys: Tensor, nlist: int, niter: int = PROMPT_ITERATIONS, assign: Assign | None = None,
        transform: Tensor | None = None,
    ) -> KeyQuantizer:
        """The partition of one prompt: k-means over its own keys : float (h, n, d), on their device, without FAISS.

        Starts from evenly spaced keys; each step moves the centroids to the means of every second key, the odd and the even
        ones in turn; at most 256 evenly spaced keys per list are looked at. The same keys give the same lists. A list that
        loses all its keys keeps its centroid; with fewer keys than lists some stay empty. Raises ParameterError without a key.

        assign : what finds the nearest centroids, a backend's own; default torch's products. transform : of the quantizer.
        """
        n = keys.shape[1]
        if not n:
            raise ParameterError("keys: expected at least one key per KV head, got none")
        x = keys.float()
        if n > nlist * MAX_POINTS_PER_CENTROID:
            x = x[:, _evenly(n, nlist * MAX_POINTS_PER_CENTROID, keys.device)]
        transform = None if transform is None else transform.to(keys.device)
        centroids = x[:, _evenly(x.shape[1], nlist, keys.device)]
        return cls(_steps(x, cls(centroids, transform), niter, assign), transform)

    def refined(self, keys: Tensor, seen: int, niter: int = PROMPT_ITERATIONS, assign: Assign | None = None) -> KeyQuantizer:
        """These lists, moved towards further keys : float (h, n, d), as if ``seen`` keys before lay in them, in all alike.

        Steps as in `of_prompt`, from here. Source: mini-batch k-means, Sculley 2010, with one weight for all lists.
        """
        most = self.nlist * MAX_POINTS_PER_CENTROID
        n, x = keys.shape[1], keys.float()
        if n > most:
            x, seen = x[:, _evenly(n, most, keys.device)], seen * most // n
        return KeyQuantizer(_steps(x, self, niter, assign, seen / self.nlist), self.transform) if n else self

    def rounded(self) -> KeyQuantizer:
        """As a file keeps lists that prompts share, in 16 bits."""
        return KeyQuantizer(self.centroids.bfloat16().float())


def require_faiss(what: str = "training key quantizers") -> Any:
    """The module; MissingDependencyError without a FAISS that can be used, for ``what`` will need it later."""
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(f"{what}: expected FAISS, got none; pip install faiss-cpu ({error})") from error
    except Exception as error:  # a library that does not fit this NumPy or this machine raises what it likes
        raise MissingDependencyError(
            f"{what}: expected FAISS, got one that fails when imported, {type(error).__name__}: {error}; "
            "pip install --force-reinstall faiss-cpu"
        ) from error
    if not hasattr(faiss, "Kmeans") or not hasattr(faiss, "__version__"):  # as a folder of this name is a package without a file
        where = getattr(faiss, "__file__", None) or ", ".join(map(str, getattr(faiss, "__path__", ()))) or "none of a file"
        raise MissingDependencyError(f"{what}: expected FAISS, got another module of its name, {where}; pip install faiss-cpu")
    return faiss


def _evenly(n: int, count: int, device: torch.device) -> Tensor:
    """``count`` of n places, the middle of as many equal stretches: int64; places repeat if there are fewer."""
    return (torch.arange(count, dtype=torch.int64, device=device) * n + n // 2) // count


def _steps(x: Tensor, start: KeyQuantizer, niter: int, assign: Assign | None, weight: float = 0.0) -> Tensor:
    """Steps of k-means from ``start`` over every second of the keys x : (h, n, d), the odd and the even ones in turn: centroids
    (h, l, d). weight : keys that each centroid of the start stands for."""
    centroids, halves = start.centroids, [x]
    if x.shape[1] >= 2 * _KEYS_OF_A_HALF * start.nlist:
        halves, weight = [x[:, 1::2], x[:, ::2]], weight / 2
    for step in range(niter):
        some = halves[step % len(halves)]
        made = KeyQuantizer(centroids, start.transform)
        lists = made.assign(some) if assign is None else assign(made, some)
        centroids = _means(some, lists, centroids, start.centroids * weight, weight)
    return centroids


def _means(x: Tensor, lists: Tensor, before: Tensor, added: Tensor, weight: float) -> Tensor:
    """Means of the keys x : (h, n, d) of each list, ``before`` : (h, l, d) where it has none; added up in order, and at last
    ``added`` : (h, l, d), the sum of ``weight`` keys more of each list."""
    heads, nlist, d = before.shape
    bags = (lists + torch.arange(heads, dtype=torch.int64, device=x.device)[:, None] * nlist).reshape(-1)
    counts = torch.bincount(bags, minlength=heads * nlist)
    order = bags.argsort(stable=True)
    sums = functional.embedding_bag(order, x.reshape(-1, d), counts.cumsum(0) - counts, mode="sum").view(heads, nlist, d)
    counts = counts.view(heads, nlist, 1)
    if not weight:
        return torch.where(counts > 0, sums / counts.clamp(min=1), before)
    return (sums + added) / (counts + weight)
