"""Which token lies in a row, and in which row a token."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import LengthError
from .segmented import SegmentedInvertedLists


def ids_of(lists: SegmentedInvertedLists, i: int, head: int, rows: Tensor) -> Tensor:
    """Positions of the tokens in these rows of one sequence and KV head: int64, of the shape of ``rows``."""
    in_order = torch.from_numpy(np.asarray(lists.positions(i, rows.cpu().numpy()))).to(rows.device)
    sealed = (rows >= lists.sinks(i)) & (rows < lists.sealed(i))
    return torch.where(sealed, lists.ids[i, head][rows].long(), in_order)


def rows_of(lists: SegmentedInvertedLists, i: int, ids: np.ndarray) -> Tensor:
    """Rows of the tokens of sequence i with these ids : int64 (n,), by KV head: int64 (h, n). LengthError for another."""
    stored, order = lists.row_ids(i).long().sort(dim=1)
    missing = np.setdiff1d(ids, stored[0].cpu().numpy())
    if len(missing):
        raise LengthError(f"ids: expected ids that are stored, got {missing[0]}")
    targets = torch.from_numpy(ids).to(stored.device).expand(lists.heads, -1).contiguous()
    return order.gather(1, torch.searchsorted(stored, targets))
