"""List numbers of rows, of sealed ones by the offsets of their runs, of recent ones by whoever assigns them; rows of ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..backends import Frequencies
from ..errors import LengthError
from .layout import Segment


class Assign(Protocol):
    """What says which lists rows in arrival order belong to.

    from_keys : whether that follows from their keys and positions alone, so that it may be asked before they are sealed.
    """

    from_keys: bool

    def __call__(self, i: int, start: int, stop: int) -> Tensor:
        """List numbers of rows [start, stop) of sequence i: int32 (h, n)."""

    def by_position(self) -> tuple[Any, Frequencies | None] | None:
        """What a backend needs to find them itself: its quantizer, or None without one, and RoPE, if there is one; None if the
        angles depend on more than the position."""


class KnownLists:
    """`Assign` where list numbers are there already: lists[i] is (first row, int32 (h, n)) of sequence i."""

    __slots__ = ("_lists",)
    from_keys = False

    def __init__(self, lists: Mapping[int, tuple[int, Tensor]]) -> None:
        self._lists = lists

    def __call__(self, i: int, start: int, stop: int) -> Tensor:
        first, lists = self._lists[i]
        return lists[:, start - first : stop - first]

    def by_position(self) -> None:
        return None


def run_lists(table: Tensor, segment: Segment) -> Tensor:
    """List numbers of the rows of a segment, as they lie: int32 (h, n), from its offsets, int32 (h, l + 1)."""
    start, stop = segment
    begins = (table[:, 1:-1] - start).long()  # of every list but the first; past the end if the rest is empty
    marks = torch.zeros((len(table), stop - start + 1), dtype=torch.int32, device=table.device)
    marks.scatter_add_(1, begins, torch.ones_like(begins, dtype=torch.int32))
    return marks[:, :-1].cumsum(1, dtype=torch.int32)


def merged_lists(
    tables: Tensor, have: Sequence[Segment], want: Segment, recent_lists: Callable[[int, int], Tensor] | None = None
) -> Tensor:
    """List numbers of the rows that become the segment ``want``, as they lie: int32 (h, n).

    tables : int32 (h, S, l + 1), of the segments ``have``, whose rows stay in front; behind them recent_lists(start, stop) has
    those of recent rows, if there are any.
    """
    sealed, (start, stop) = have[-1][1] if have else 0, want
    parts = [run_lists(tables[:, s], (a, b)) for s, (a, b) in enumerate(have) if start <= a and b <= stop]
    if stop > sealed:
        assert recent_lists is not None, f"expected rows in segments, got recent ones up to {stop}"
        parts.append(recent_lists(max(start, sealed), stop))
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, 1)


def joined_table(tables: Tensor) -> Tensor:
    """Offsets of neighbours sorted as one: int32 (h, l + 1), from those of each, int32 (h, s, l + 1)."""
    return (tables - tables[:, :, :1]).sum(1, dtype=tables.dtype) + tables[:, 0, :1]


def cut_table(table: Tensor, parts: Sequence[Segment]) -> Tensor:
    """Offsets of each of some neighbours that are sorted as one, int32 (h, s, l + 1), from those of all, int32 (h, l + 1)."""
    return torch.stack([table.clamp(low, high) for low, high in parts], 1)


def rows_of(row_ids: Tensor, ids: np.ndarray) -> Tensor:
    """Rows of the tokens with these ids : int64 (n,), by KV head: int64 (h, n). row_ids : int (h, N). LengthError for others."""
    stored, order = row_ids.long().sort(dim=1)
    missing = np.setdiff1d(ids, stored[0].cpu().numpy())
    if len(missing):
        raise LengthError(f"ids: expected ids that are stored, got {missing[0]}")
    targets = torch.from_numpy(ids).to(stored.device).expand(len(stored), -1).contiguous()
    return order.gather(1, torch.searchsorted(stored, targets))
