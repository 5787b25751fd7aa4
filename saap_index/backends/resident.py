"""What a backend may keep on its device for one batch, so that a decode step needs nothing from the host but its launches.

A backend without it (`Backend.resident` returns None) executes a step by the operations of base.py, with numbers from the host.
With it, lengths and positions live on the device: the kernels read them there and the append kernel advances them, so that the
same launches are right at every step, and a CUDA graph of them can be replayed while the index grows. The host publishes
what else it decides (segments, budgets) whenever it changes. Axes as in base.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .base import Budget, Probed, Rotation

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


class Resident(ABC):
    """The state of one batch on the device.

    `append` and `step` only launch kernels. `step` writes the selection into memory of the batch, where it is valid until the
    next one.
    """

    @property
    @abstractmethod
    def capturing(self) -> bool:
        """Whether launches are recorded now, for a graph, instead of run."""

    @abstractmethod
    def enter(self) -> None:
        """What follows, on the current stream, waits for what was started before on another; not inside a capture."""

    @abstractmethod
    def release(self) -> None:
        """No graph that was captured is replayed any more: what is kept for them may go."""

    @abstractmethod
    def ready(self, queries: Tensor, routing: Routing | None, limits: Any) -> bool:
        """Whether a `step` with such queries finds its memory and kernels in place, as it does from the second time on."""

    @abstractmethod
    def prepare(self, queries: Tensor, routing: Routing | None, limits: Any) -> None:
        """Put memory and kernels in place for a `step` with such queries."""

    @abstractmethod
    def publish(self, placement: Placement, counted: bool, budgets: Sequence[tuple[Any, Budget]]) -> None:
        """Use this memory and these numbers from now on, and write each budget to the memory of its limits.

        Flags stay as they are. counted : so do lengths and next positions, for the device has counted them itself. Does not wait
        for the device.
        """

    @abstractmethod
    def watch(self) -> None:
        """Have meta fetched as it is now, for `watched`. Does not wait for the device."""

    @abstractmethod
    def watched(self) -> np.ndarray[Any, Any]:
        """meta : int32 (b, 8) as it was when `watch` was called last; waits until then, and no longer."""

    @abstractmethod
    def limits(self, budget: Budget, most_rows: int, most_entries: int) -> Any:
        """What a search may take, on the device for as long as its parameters are in use. No later budget exceeds the sizes.

        budget : rows and entries on the host, here and in `publish`.
        """

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, counts: Sequence[int] | None) -> None:
        """Append ``counts[i]`` leading tokens of sequence i, or all n <= MAX_STEP_TOKENS, and advance lengths and positions.

        keys : storage dtype (b, h, n, d), values : (b, h, n, e), any strides but the last. What is not finite is stored, and
        noted in the flags; a sequence without room is left alone, and that is noted.
        """

    @abstractmethod
    def select(self, queries: Tensor, routing: Routing, limits: Any) -> Probed:
        """Route and probe queries (b, h, g, q, d) of the last q tokens, into new memory, as wide as ``limits`` allow."""

    @abstractmethod
    def step(
        self, queries: Tensor, routing: Routing | None, limits: Any, scale: float
    ) -> tuple[Tensor, Tensor, Probed | None]:
        """`select` and the causal `Backend.scan` over it, with nothing in between; without routing over every row.

        Returns out : dtype of queries (b, h, g, q, e), lse : float32 (b, h, g, q), newly allocated, and the selection.
        """

    @abstractmethod
    def read(self) -> np.ndarray[Any, Any]:
        """Wait for the device and return meta : int32 (b, 8); its flags are reset."""
