"""The query router of every KV head as plain arrays. Knows no backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..precision import full_precision

NETWORK = ("hidden", "bias_hidden", "out", "skip", "bias_out")
"""The tensors that every `RouterWeights` has."""


COMPARED = ("lists", "list_scales")
"""Those of one that compares its outputs with the lists."""


@dataclass(frozen=True)
class RouterWeights:
    """The query router of every KV head, as plain arrays: y, a, c = split(skip x + out silu(hidden x + bias_h) + bias_o).

    hidden : float32 (h, u, d); bias_hidden : float32 (h, u); out : float32 (h, k + m + 1, u)
    skip : float32 (h, k + m + 1, d); bias_out : float32 (h, k + m + 1)
    lists : float32 (h, l, k), list_scales : float32 (h, k), or both None

    The first k outputs, y, give z, log attention mass per token of each list: z = y and k = l without ``lists``, with them
    z = lists (list_scales y). The next m outputs are a at the knots of the log2 distance, the last is c, whose sigmoid is the
    share of the attention that lies outside sinks and window. u = 0 gives a linear router, m = 0 one without distance; k outputs
    alone one without c too. Standardisation of the input is folded into the weights.

    A matrix of whole numbers up to 127 takes a byte per number, one of bfloat16's values two, any other four.
    """

    hidden: Tensor
    bias_hidden: Tensor
    out: Tensor
    skip: Tensor
    bias_out: Tensor
    nlist: int
    lists: Tensor | None = None
    list_scales: Tensor | None = None

    @property
    def leading(self) -> int:
        """k, the outputs before those of distance."""
        return self.nlist if self.lists is None else int(self.lists.shape[2])

    @property
    def num_knots(self) -> int:
        return max(0, int(self.bias_out.shape[1]) - self.leading - 1)

    def tensors(self) -> dict[str, Tensor]:
        """By name; those of `COMPARED` only if there are lists."""
        return {name: getattr(self, name) for name in (NETWORK if self.lists is None else NETWORK + COMPARED)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], nlist: int, prefix: str = "") -> RouterWeights:
        """From `tensors`, or from a file's that has them under ``prefix`` and their names. LookupError if some are missing."""
        names = NETWORK + COMPARED if any(prefix + name in tensors for name in COMPARED) else NETWORK
        return cls(**{name: tensors[prefix + name] for name in names}, nlist=nlist)

    def map(self, change: Callable[[Tensor], Tensor]) -> RouterWeights:
        """With every tensor changed."""
        return RouterWeights.of({name: change(x) for name, x in self.tensors().items()}, self.nlist)

    @full_precision
    def composed(self) -> RouterWeights:
        """The same router with an output for each list in place of ``lists``: for a backend of one product."""
        if self.lists is None or self.list_scales is None:
            return self
        k, lists = self.leading, self.lists * self.list_scales[:, None]
        out, skip = (torch.cat([lists @ x[:, :k], x[:, k:]], 1) for x in (self.out, self.skip))
        bias = torch.cat([(lists @ self.bias_out[:, :k, None])[..., 0], self.bias_out[:, k:]], 1)
        return RouterWeights(self.hidden, self.bias_hidden, out, skip, bias, self.nlist)

    @cached_property
    def nbytes(self) -> int:
        """Of what is read for a query, once per call whatever the batch."""
        both = torch.cat([self.out, self.skip], 2)  # side by side in what is packed
        return _nbytes(self.hidden) + _nbytes(both) + self.bias_hidden.nbytes + self.bias_out.nbytes + self.list_bytes

    @cached_property
    def list_bytes(self) -> int:
        """The part of `nbytes` that is of the lists alone: with lists of a prompt's own nobody else reads it."""
        return 0 if self.lists is None or self.list_scales is None else _nbytes(self.lists) + self.list_scales.nbytes


def _nbytes(weights: Tensor) -> int:
    if weights.ndim < 3:
        return weights.nbytes
    if bool(((weights == weights.round()) & (weights.abs() <= 127)).all()):
        return weights.numel()
    return weights.numel() * (2 if torch.equal(weights, weights.bfloat16().float()) else 4)
