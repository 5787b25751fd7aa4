"""A search as one call, for a backend that can execute it so. Axes as in base.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .base import Budget


@dataclass(frozen=True)
class Search:
    """What a search needs besides queries: the same from step to step until tokens are sealed or memory moves.

    router : as from `Backend.prepare_router`; first_knot : log2 of the distance of the first knot.
    centres : float64 (b, S), position of the middle of each segment; segments beyond num_segments[i] are not looked at.
    tables, num_segments, budget, count_lists : as in `Backend.probe`.
    keys, values, sinks, sealed, scale : as in `Backend.scan`.
    mean_keys, mean_values : as in `Tail`, read with budget.entries only.
    """

    router: Any
    first_knot: int
    count_lists: bool
    centres: Tensor
    tables: Tensor
    num_segments: Sequence[int]
    budget: Budget
    keys: Tensor
    values: Tensor
    mean_keys: Tensor
    mean_values: Tensor
    sinks: Sequence[int]
    sealed: Sequence[int]
    scale: float
