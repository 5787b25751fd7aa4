"""The routers of a model as the layers of one process use them. Knows no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import Backend
from ..backends.paged import MAX_LISTS
from ..backends.types import Sample
from ..errors import CompatibilityError, ParameterError
from ..routers import LayerRouters, Routers
from ..routing.rope import Rope
from ..routing.sampling import Sampling
from ..search.plan import of_sample, sampled_rows, sampling_of
from .options import Options


@dataclass(frozen=True)
class ServedLayer:
    """place : among the served layers of this process. quantizer, router : prepared by the backend. shares : float32 (h,);
    unread_mass : float32 (h,) or None, as in `Budget`; sampling : of the KV heads, or None where nothing is sampled."""

    number: int
    place: int
    rope: Rope | None
    quantizer: Any
    router: Any
    nlist: int
    first_knot: int
    size_weighted: bool
    shares: np.ndarray
    unread_mass: Tensor | None
    sampling: Sampling | None


@dataclass(frozen=True)
class ServedModel:
    """sinks, window : what every query reads; layers : by number; ropes : those that differ. unread_samples : whether weighted
    samples are asked for, which the backend does not read."""

    options: Options
    sinks: int
    window: int
    layers: dict[int, ServedLayer]
    ropes: tuple[Rope, ...]
    shares: np.ndarray
    unread_samples: bool = False

    def budgets(self, sealed: Sequence[int]) -> Tensor:
        """Most tokens that each layer, sequence and KV head may read of so many, int32 (layers, b, h): for each what
        `SearchParametersIVF.budget` says."""
        params = self.options.params
        n = np.array(sealed, np.float64)[None, :, None]
        shares = np.ones_like(self.shares) if params.target_mass is not None else self.shares
        wanted = np.ceil((params.selectivity or 1.0) * shares[:, None].astype(np.float64) * n - 1e-6)
        return torch.from_numpy(np.minimum(n, wanted).astype(np.int32))

    def samples(self, budgets: Tensor, sealed: Sequence[int]) -> tuple[Sample | None, ...]:
        """What of `budgets` each layer reads as a weighted sample."""
        ways = [x.sampling for x in sorted(self.layers.values(), key=lambda x: x.place)]
        rows = [None if x is None else sampled_rows(y.numpy(), x.shares, sealed) for x, y in zip(ways, budgets, strict=True)]
        return tuple(
            None if x is None or y is None or not y.any() else Sample(torch.from_numpy(y), *of_sample(x))
            for x, y in zip(ways, rows, strict=True)
        )

    @property
    def sampled(self) -> float:
        """Share of the budget that is sampled, on average over layers and heads."""
        return float(np.mean([0.0 if x.sampling is None else x.sampling.shares.mean() for x in self.layers.values()] or [0.0]))


def heads_of_rank(total: int, rank: int, ranks: int) -> slice:
    """The KV heads that one of so many processes of tensor parallelism holds, as vLLM deals them out: equal parts, or one head
    for several processes. CompatibilityError if they do not divide."""
    if total % ranks == 0:
        each = total // ranks
        return slice(rank * each, (rank + 1) * each)
    if ranks % total == 0:
        one = rank * total // ranks
        return slice(one, one + 1)
    raise CompatibilityError(f"tensor parallelism: expected {total} KV heads that divide among {ranks} processes")


def serve(
    routers: Routers, options: Options, backend: Backend, numbers: Sequence[int], rank: int = 0, ranks: int = 1
) -> ServedModel:
    """What the layers with these numbers need in process ``rank`` of ``ranks``.

    Raises ParameterError for options.layers without routers, CompatibilityError for routers that have no lists that all prompts
    share, or more than a byte can number, or angles that depend on the length of the text.
    """
    if options.layers is not None and (missing := sorted(set(options.layers) - set(routers.layers))):
        raise ParameterError(f"layers: expected some of those with routers, {sorted(routers.layers)}, got {missing}")
    chosen = set(routers.layers) - set(routers.dense_layers) if options.layers is None else set(options.layers)
    layout = routers.config.get("layout", {})
    served: dict[int, ServedLayer] = {}
    ropes: list[Rope] = []
    for number in sorted(chosen & set(numbers)):
        served[number] = layer = _served(routers.layers[number], number, len(served), options, backend, ropes, rank, ranks)
        if layer.rope is not None and layer.rope not in ropes:
            ropes.append(layer.rope)
    shares = np.stack([x.shares for x in served.values()]) if served else np.ones((0, 0), np.float32)
    ways = [sampling_of(options.params, routers.layers[number].sampling, 1) for number in served]
    asked = not backend.reads_samples and any(x is not None and x.shares.any() for x in ways)
    return ServedModel(options, layout.get("sinks", 4), layout.get("window", 128), served, tuple(ropes), shares, asked)


def _served(
    layer: LayerRouters, number: int, place: int, options: Options, backend: Backend, ropes: Sequence[Rope], rank: int, ranks: int
) -> ServedLayer:
    parts = layer.shared()
    if parts is None:
        raise CompatibilityError(
            f"routers: expected lists that all prompts share in layer {number}, got those that each prompt makes its own: in an "
            "engine prompts share pages. `saap train`, also with --quick, makes both: train anew"
        )
    quantizer, router = parts
    total, nlist, _ = quantizer.centroids.shape
    if nlist > MAX_LISTS:
        raise CompatibilityError(f"routers: expected at most {MAX_LISTS} lists, a byte's worth, got {nlist} in layer {number}")
    if layer.rope is not None and layer.rope.is_dynamic:
        raise CompatibilityError(
            f"routers: expected RoPE that depends on positions alone, got {layer.rope.scaling!r} in layer {number}, whose angles "
            "change with the length: pages that prompts share have no one length"
        )
    own = heads_of_rank(total, rank, ranks)

    layer = layer.of_heads(own)
    shares = np.ones(own.stop - own.start, np.float32) if layer.budget_shares is None else layer.budget_shares
    target = options.target_mass
    device = getattr(backend, "device", torch.device("cpu"))
    unread_mass = None if target is None else layer.unread_mass(target, device)
    sampling = None
    if backend.reads_samples and router.size_weighted:
        sampling = sampling_of(options.params, layer.sampling, own.stop - own.start)
    weights = router.weights.map(lambda x: x[own].contiguous().to(device))
    vectors, bias = quantizer.of_heads(own).to(device).products()
    lists = backend.prepare_quantizer(vectors.contiguous(), bias)
    rope = next((x for x in ropes if x == layer.rope), layer.rope)
    return ServedLayer(
        number, place, rope, lists, backend.prepare_router(weights), nlist, router.first_knot,
        router.size_weighted, np.asarray(shares, np.float32), unread_mass, sampling,
    )
