"""Plain records that go into and come out of a backend. Axes as in base.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
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


_MOST_KEPT = 256
"""Positions whose angles are kept: a block that an index seals at once."""


@dataclass(eq=False)
class Frequencies:
    """RoPE whose angles follow from the position alone. inv_freq : float32 (r / 2), radians per position, on the backend's
    device; interleaved, scale : as in `Rotation`."""

    inv_freq: Tensor
    interleaved: bool
    scale: float
    _last: tuple[Any, Rotation] | None = field(init=False, repr=False, default=None)

    def before(self, ends: Sequence[int], q: int) -> Rotation:
        """Angles of the q positions before each of ``ends``, b of them, but of none before 0: (b * q, r / 2).

        Do not write to the results, here and in `at`: the last is kept, for the other layers of a model ask the same.
        """
        last, key = self._last, (*ends, q)
        if last is not None and last[0] == key:
            return last[1]
        rotation = self._angles(np.array([[*range(max(0, end - q), max(q, end))] for end in ends], np.float32))
        self._last = key, rotation
        return rotation

    def at(self, positions: np.ndarray[Any, Any]) -> Rotation:
        """Angles of positions : int (n,)."""
        if len(positions) > _MOST_KEPT:
            return self._angles(positions)
        last, key = self._last, positions.tobytes()
        if last is not None and last[0] == key:
            return last[1]
        rotation = self._angles(positions)
        self._last = key, rotation
        return rotation

    def _angles(self, positions: np.ndarray[Any, Any]) -> Rotation:
        place = positions.astype(np.float32, copy=False).reshape(-1, 1)
        if self.inv_freq.is_cpu:  # torch wakes threads for a few numbers, and on a loaded machine waits for milliseconds
            radians = place * self.inv_freq.numpy()
            return Rotation(torch.from_numpy(np.cos(radians)), torch.from_numpy(np.sin(radians)), self.interleaved, self.scale)
        angles = torch.from_numpy(place).to(self.inv_freq.device) * self.inv_freq
        return Rotation(angles.cos(), angles.sin_(), self.interleaved, self.scale)


MAX_SAMPLED = 1 << 21
"""Most rows of a `Sample` per (sequence, KV head): what the whole numbers of its probabilities have room for."""

MAX_EXPONENT = 64
"""Of the weight of a run in the probability of its tokens, in quarters."""


@dataclass(frozen=True)
class Sample:
    """How much of a budget goes to a sample of what the rest leaves unread; see `reference.weighted_probe`.

    The best runs are read as with a budget of ``Budget.rows - rows``. Of the tokens of other runs, and of what the cut left of
    the last one, each is read with a probability p proportional to the weight of its run ** (exponent / 4), those for which that
    would be more than 1 for certain, and its logit is raised by min(-ln p, cap). Probabilities are whole parts of 2**20 and
    follow from the bin of the weight (an eighth of an octave) and from run lengths, and which rows are taken follows from them: a
    systematic sample over the rows in the order of memory, the same from every backend for the same weights.

    So a selection is a list of runs {first row, rows, p, logit bias}: of a run of which so many rows are taken, the n-th, from 1,
    is first + (n * 2**20 - r + p - 1) // p - 1, where r is the sum of the probabilities of all sampled rows before it, plus
    2**19, modulo 2**20. A run that is read whole, or its end where the budget for whole runs ends, has p = 2**20 and no bias.

    rows : int32 (b, h), at most `MAX_SAMPLED` and at most ``Budget.rows``; 0 for none. exponents : int32 (h,), of 1 to
    `MAX_EXPONENT` quarters; caps : float32 (h,), nats, not negative.
    """

    rows: Tensor
    exponents: Tensor
    caps: Tensor


@dataclass(frozen=True)
class Budget:
    """What `Backend.probe` may take of each (sequence, KV head).

    rows : int32 (b, h), most rows.
    nprobe : 0, or lists to visit whole, as SAAP was published; then there is neither ``unread_mass`` nor ``mean_entries``.
    unread_mass : float32 (h,) or None: attention per query vector, as predicted, that may stay unread outside sinks and window;
        no further run is read once no more than that is left. Needs size_weighted and a router with c.
    mean_entries : int32 (b, h) or None, most unread runs to enter through their means. Needs size_weighted.
    means : leading segments of each sequence that have run means, b numbers <= num_segments; read with ``mean_entries`` only.
    sample : how many of the rows are sampled, or None. Needs size_weighted, nprobe 0, no unread_mass, no mean_entries, and a
        backend that ``reads_samples``.
    """

    rows: Tensor
    nprobe: int = 0
    unread_mass: Tensor | None = None
    mean_entries: Tensor | None = None
    means: Sequence[int] = ()
    sample: Sample | None = None


class InRuns(Protocol):
    """Rows where a step left them, until the next one."""

    def rows(self) -> Tensor:
        """int32 (b, h, t), in any order; anything behind the last."""

    def biases(self) -> Tensor | None:
        """float32 (b, h, t), as `Probed.biases`, in the order of the rows; None for 0 each."""


@dataclass(frozen=True)
class Probed:
    """What `Backend.probe` took. rows : int32 (b, h, t), ascending, padded with -1, t = the largest count; counts : int32 (b, h).

    in_runs : of a step that lists no rows; they are then (b, h, 0).
    tail : int32 (b, h, x), numbers s * l + list of runs that enter through their means, ascending, padded with -1, x = the
    largest count; tail_counts : int32 (b, h). Both None where ``mean_entries`` was.
    biases : float32 (b, h, t), nats, added to the logits of ``rows``; anything behind the last. None where ``sample`` was.
    """

    rows: Tensor
    counts: Tensor
    tail: Tensor | None = None
    tail_counts: Tensor | None = None
    in_runs: InRuns | None = None
    biases: Tensor | None = None


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


@dataclass(frozen=True)
class Arena:
    """The memory of a batch. keys, values, ids, tables : as a backend's operations name them; mean_keys, mean_values : as in
    `Tail`; pending : int32 (b, h, N), lists of rows not sealed yet, -1 where the quantizer decides, or None for -1 everywhere.

    Where sealed rows are stored as codes, keys and values hold these, as in `Coded`, and plain_keys : storage dtype (b, h, R, d),
    plain_values : (b, h, R, e) the other rows.
    """

    keys: Tensor
    values: Tensor
    ids: Tensor
    tables: Tensor
    mean_keys: Tensor
    mean_values: Tensor
    pending: Tensor | None
    plain_keys: Tensor | None = None
    plain_values: Tensor | None = None

    @property
    def numbers(self) -> tuple[Tensor, Tensor]:
        """Where keys and values are written to as numbers."""
        if self.plain_keys is None or self.plain_values is None:
            return self.keys, self.values
        return self.plain_keys, self.plain_values


@dataclass(frozen=True)
class Placement:
    """Where a batch lies.

    meta : int32 (b, 7), the columns before the flags; centres : float64 (b, S), position of the middle of each segment;
    coded : which rows are codes, or None.
    """

    arena: Arena
    meta: np.ndarray[Any, Any]
    centres: np.ndarray[Any, Any]
    coded: Coded | None = None


@dataclass(frozen=True, eq=False)
class Routing:
    """How a step routes. router : as from `Backend.prepare_router`; first_knot : log2 of the distance of the first knot.

    rope : what undoes RoPE, from the position alone; or the angles of this very step, (b * q, r / 2), where they depend on more;
    or None.
    """

    router: Any
    first_knot: int
    size_weighted: bool
    rope: Frequencies | Rotation | None = None


@dataclass(eq=False)
class Plan:
    """What searches with one set of parameters may read: made when it is first used, brought up to date with the segments.

    key : the objects that it follows from.
    dense : whether every row is read now; always_dense : and whatever else is sealed.
    max_rows, max_entries : no later budget is larger; samples : whether one may have a sample; of a session that `captures`.
    budget : of the segments there are now, where the session reads it; packed : what else it made of the plan.
    captured : whether a graph may read it.
    """

    key: tuple[Any, ...]
    dense: bool = False
    always_dense: bool = False
    max_rows: int = 0
    max_entries: int = 0
    samples: bool = False
    budget: Budget | None = None
    packed: Any = None
    captured: bool = False


def columns_in_use(lists: Tensor, counts: Tensor, in_order: bool = True) -> Tensor:
    """A copy of lists : int32 (b, h, t), of which counts : int32 (b, h) numbers are written, as wide as the longest: ascending,
    then -1."""
    lists = lists[:, :, : int(counts.max()) if counts.numel() else 0]
    behind = torch.arange(lists.shape[2], dtype=torch.int32, device=lists.device) >= counts[..., None]
    if in_order:
        return lists.masked_fill(behind, -1)
    return lists.masked_fill(behind, torch.iinfo(torch.int32).max).sort(2).values.masked_fill(behind, -1)
