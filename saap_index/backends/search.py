"""A search as one call, for a backend that can execute it so. Axes as in base.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .base import Budget, Probed, Rotation


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


class PreparedSearch(Protocol):
    """A search as `Backend.prepare_search` packed it."""

    def __call__(
        self, queries: Tensor, rotation: Rotation | None, ends: Sequence[int], lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor, Probed]:
        """queries, rotation : as in `Backend.route`; lengths : as in `Backend.scan`; ends : position of the token that comes next
        in each sequence. A segment lies on the knots where log2 of the distance of its middle from the newest token, at least 1,
        less first_knot does. Returns out and lse as `Backend.scan`, and what was taken.
        """
