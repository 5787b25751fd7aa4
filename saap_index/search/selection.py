"""Which rows one call reads, and the tokens in them. Knows no router and no backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..backends.types import InRuns
from ..errors import StateError
from ..invlists.segmented import SegmentedInvertedLists


@dataclass(frozen=True)
class Selection:
    """The tokens that one call reads, the same for every query head of a KV head.

    rows : int32 (b, h, t) rows inside segments, ascending, padded with -1, or None if no segment is read apart (dense, or
    nothing sealed); counts : int32 (b, h) of them. Rows [0, sinks[i]) and [sealed[i], lengths[i]) are read besides; sealed and
    sinks are 0 where every row is read. tail : int32 (b, h, x), numbers segment * nlist + list of the runs that are read through
    their means, ascending, padded with -1, or None for none; tail_counts : int32 (b, h) of them. version : of the inverted lists
    whose rows these are; None holds for any, at the caller's own risk. in_runs : of a step, where ``rows`` is (b, h, 0).
    biases : float32 (b, h, t), nats, what is added to the logits of ``rows``: above 0 for those that were sampled and stand for
    others besides; anything behind the last. None for 0 each.
    """

    rows: Tensor | None
    counts: Tensor | None
    sinks: list[int]
    sealed: list[int]
    lengths: list[int]
    tail: Tensor | None = None
    tail_counts: Tensor | None = None
    version: int | None = None
    in_runs: InRuns | None = None
    biases: Tensor | None = None

    def check(self, lists: SegmentedInvertedLists) -> None:
        """StateError if rows were chosen before they changed."""
        if self.rows is not None and self.version not in (None, lists.version):
            raise StateError("selection: expected one made since the last change of the index, got one of before")


def dense_selection(lists: SegmentedInvertedLists) -> Selection:
    """Dense attention: every token that is stored."""
    none = [0] * lists.batch
    return Selection(None, None, none, none, list(lists.lengths))


def _padded(picked: list[Tensor], b: int, h: int, lists: SegmentedInvertedLists) -> Selection:
    rows = torch.nn.utils.rnn.pad_sequence(picked, batch_first=True, padding_value=-1).view(b, h, -1)
    counts = torch.tensor([len(r) for r in picked], dtype=torch.int32, device=rows.device).view(b, h)
    sinks, sealed = [lists.sinks(i) for i in range(b)], [lists.sealed(i) for i in range(b)]
    return Selection(rows, counts, sinks, sealed, list(lists.lengths), version=lists.version)


def _leave_out(runs: Tensor, tables: Tensor, rows: Tensor) -> None:
    """Take out of ``runs`` (x,), in place, those of which one of ``rows`` (t,), ascending, is read. tables : (S, l + 1)."""
    nlist, real = tables.shape[1] - 1, runs[runs >= 0].long()
    first, past = tables[real // nlist, real % nlist], tables[real // nlist, real % nlist + 1]
    untouched = real[torch.searchsorted(rows, first) == torch.searchsorted(rows, past)]
    runs.fill_(-1)
    runs[: len(untouched)] = untouched.int()


def ids_of(lists: SegmentedInvertedLists, i: int, head: int, rows: Tensor) -> Tensor:
    """Positions of the tokens in these rows of one sequence and KV head: int64, of the shape of ``rows``."""
    in_order = torch.from_numpy(np.asarray(lists.positions(i, rows.cpu().numpy()))).to(rows.device)
    sealed = (rows >= lists.sinks(i)) & (rows < lists.sealed(i))
    return torch.where(sealed, lists.ids[i, head][rows].long(), in_order)


def read_ids(lists: SegmentedInvertedLists, selection: Selection) -> list[list[Tensor]]:
    """Positions of the tokens read, those in the tail not among them, per sequence and KV head: int64, ascending.

    StateError for a selection of before a change.
    """
    selection.check(lists)
    ids, listed = [], selection.rows if selection.in_runs is None else selection.in_runs.rows()
    for i in range(lists.batch):
        row_ids, low, high, n = lists.row_ids(i), selection.sinks[i], selection.sealed[i], selection.lengths[i]
        keep = torch.zeros((lists.heads, n), dtype=torch.bool, device=row_ids.device)
        keep[:, :low] = True
        keep[:, high:] = True
        for head in range(lists.heads):
            if listed is not None and selection.counts is not None:  # of a step, anything lies behind
                rows = listed[i, head, : int(selection.counts[i, head])]
                keep[head, rows[rows >= 0].long()] = True
        ids.append([row_ids[head][keep[head]].long().sort().values for head in range(lists.heads)])
    return ids
