"""Plain records that go into and come out of a backend. Axes as in base.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from .scalar_quantizer import Coded


@dataclass(frozen=True)
class Rotation:
    """Angles that undo RoPE for n consecutive tokens: cos, sin : float32 (n, r / 2), r rotated dims of d, r even.

    interleaved False (half-split, Llama): pairs are dims (i, i + r/2); True (GPT-J): pairs are dims (2i, 2i + 1).
    Undoing computes x' = (x cos + y sin) * scale, y' = (y cos - x sin) * scale for a pair (x, y); other dims pass through.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool
    scale: float


@dataclass(frozen=True)
class Budget:
    """What `Backend.probe` may take of each (sequence, KV head).

    rows : int32 (b, h), most rows.
    nprobe : 0, or lists to visit whole, as SAAP was published; then there is neither ``miss`` nor ``entries``.
    miss : float32 (h,) or None: attention per query vector, as predicted, that may stay unread outside sinks and window; no
        further run is taken once no more than that is left. Needs count_lists and a router with c.
    entries : int32 (b, h) or None, most unread runs to enter through their means. Needs count_lists.
    means : leading segments of each sequence that have run means, b numbers <= num_segments; read with ``entries`` only.
    """

    rows: Tensor
    nprobe: int = 0
    miss: Tensor | None = None
    entries: Tensor | None = None
    means: Sequence[int] = ()


class InRuns(Protocol):
    """Rows where a step left them, until the next one."""

    def rows(self) -> Tensor:
        """int32 (b, h, t), in any order; anything behind the last."""


@dataclass(frozen=True)
class Probed:
    """What `Backend.probe` took. rows : int32 (b, h, t), ascending, padded with -1, t = the largest count; counts : int32 (b, h).

    in_runs : of a step that lists no rows; they are then (b, h, 0).
    tail : int32 (b, h, x), numbers s * l + list of runs that enter through their means, ascending, padded with -1, x = the
    largest count; tail_counts : int32 (b, h). Both None where ``entries`` was.
    """

    rows: Tensor
    counts: Tensor
    tail: Tensor | None = None
    tail_counts: Tensor | None = None
    in_runs: InRuns | None = None


@dataclass(frozen=True)
class Tail:
    """Runs that `Backend.scan` reads through their means, each an entry of logit scale * <q, mean key> + ln(its tokens).

    runs : int32 (b, h, x), counts : int32 (b, h), as in `Probed`; none of their rows is read. tables : int32 (b, h, S, l + 1);
    keys : storage dtype (b, h, M, l, d), values : (b, h, M, l, e), as from `Backend.means`.
    """

    runs: Tensor
    counts: Tensor
    keys: Tensor
    values: Tensor
    tables: Tensor


MAX_STEP_TOKENS = 8
"""Tokens per sequence that one launch appends; more come in bulk, by `Backend.append`."""


LENGTH, SINKS, SEALED, SEGMENTS, NEXT, MEANS, RESERVED, FLAGS = range(8)
"""Columns of meta : int32 (b, 8): rows in use; sink rows; row past the last segment, 0 if there is none; segments; position of
the token that comes next; leading segments with run means; nothing; error flags. Without segments every row is recent."""


NOT_FINITE, FULL = 1, 2
"""Error flags: a key or value was not finite; a sequence had no room for its tokens."""


@dataclass(frozen=True)
class Placement:
    """Where a batch lies. keys, values, ids, tables : as in `Backend`; mean_keys, mean_values : as in `Tail`.

    meta : int32 (b, 7), the columns before the flags; centres : float32 (b, S), position of the middle of each segment.
    """

    keys: Tensor
    values: Tensor
    ids: Tensor
    tables: Tensor
    mean_keys: Tensor
    mean_values: Tensor
    meta: np.ndarray[Any, Any]
    centres: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Routing:
    """How a step routes. router : as from `Backend.prepare_router`; first_knot : log2 of the distance of the first knot.

    frequencies : float32 (r / 2), radians per token, interleaved and scale as in `Rotation`; or rotation, the angles themselves,
    where they depend on more than the position; or neither.
    """

    router: Any
    first_knot: int
    count_lists: bool
    frequencies: Tensor | None = None
    interleaved: bool = False
    scale: float = 1.0
    rotation: Rotation | None = None


@dataclass(frozen=True)
class Search:
    """What a search needs besides queries: the same from step to step until tokens are sealed or memory moves.

    router : as from `Backend.prepare_router`; first_knot : log2 of the distance of the first knot.
    centres : float64 (b, S), position of the middle of each segment; segments beyond num_segments[i] are not looked at.
    tables, num_segments, budget, count_lists : as in `Backend.probe`.
    keys, values, sinks, sealed, scale : as in `Backend.scan`.
    mean_keys, mean_values : as in `Tail`, read with budget.entries only. coded : as in `Backend.scan`.
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
    coded: Coded | None = None
