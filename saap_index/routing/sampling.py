"""How much of a layer's budget goes to a weighted sample, per KV head: plain data. How it is chosen: training/sampling.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ParameterError, ShapeError

EXPONENT, CAP = 2.0, 2.0
"""Where a share is asked for and nothing else is known: the best pair for all heads of five layers of SmolLM2-135M at once."""

MOST_EXPONENT = 16.0


@dataclass(frozen=True, eq=False)
class Sampling:
    """shares : float32 (h,), of the budget, in [0, 1], what is spent on a sample; exponents : float32 (h,), whole quarters of
    0.25 to 16, of a run's weight in the probability of its tokens; caps : float32 (h,), nats, most that a logit is raised by.

    Raises ShapeError or ParameterError for anything else.
    """

    shares: np.ndarray
    exponents: np.ndarray
    caps: np.ndarray

    def __post_init__(self) -> None:
        for name in ("shares", "exponents", "caps"):
            object.__setattr__(self, name, np.array(getattr(self, name), np.float32))
        if self.shares.ndim != 1 or not self.shares.shape == self.exponents.shape == self.caps.shape:
            got = [x.shape for x in (self.shares, self.exponents, self.caps)]
            raise ShapeError(f"sampling: expected shares, exponents and caps (h,), got {got}")
        for name, fine, want in (
            ("shares", (self.shares >= 0) & (self.shares <= 1), "of [0, 1]"),
            (
                "exponents", (self.exponents >= 0.25) & (self.exponents <= MOST_EXPONENT) & (self.exponents * 4 % 1 == 0),
                f"whole quarters of [0.25, {MOST_EXPONENT:g}]",
            ),
            ("caps", (self.caps >= 0) & np.isfinite(self.caps), "finite and not negative"),
        ):
            if not fine.all():
                raise ParameterError(f"sampling: expected {name} {want}, got {getattr(self, name).tolist()}")

    def __len__(self) -> int:
        return len(self.shares)

    def of_heads(self, share: slice) -> Sampling:
        """The same for some of the KV heads."""
        return Sampling(self.shares[share], self.exponents[share], self.caps[share])

    @classmethod
    def cat(cls, parts: Sequence[Sampling]) -> Sampling:
        """That of some KV heads, and of the next, as one."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("shares", "exponents", "caps")))

    def table(self) -> Tensor:
        """As files keep it: float32 (h, 3), shares, exponents, caps."""
        return torch.from_numpy(np.stack([self.shares, self.exponents, self.caps], 1))

    @classmethod
    def of_table(cls, table: Tensor) -> Sampling:
        """Of what `table` returned; ShapeError or ParameterError for anything else."""
        if table.ndim != 2 or table.shape[1] != 3 or table.dtype != torch.float32:
            raise ShapeError(f"sampling: expected float32 (h, 3), got {table.dtype} {tuple(table.shape)}")
        return cls(*table.cpu().numpy().T)
