"""What is made of a selection: a wider one, attention over it, its best rows; and selections that no router makes. Stateless."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..backends import Backend, Tail
from ..invlists.segmented import SegmentedInvertedLists
from ..precision import full_precision
from .params import SearchParametersIVF
from .selection import Selection, _leave_out, _padded, ids_of


def side_by_side(selections: Sequence[Selection]) -> Selection:
    """Selections of one query each, of the same sequences, as `SearchSession.select_each` returns them; without their tails and
    biases."""
    b = len(selections[0].lengths)
    sinks, sealed, lengths = (
        [getattr(s, name)[i] for i in range(b) for s in selections] for name in ("sinks", "sealed", "lengths")
    )
    first, counts = selections[0], [s.counts for s in selections]
    if first.rows is None or first.counts is None:
        return Selection(None, None, sinks, sealed, lengths)
    width = max(s.rows.shape[2] for s in selections if s.rows is not None)
    padded = [functional.pad(s.rows, (0, width - s.rows.shape[2]), value=-1) for s in selections if s.rows is not None]
    rows, number = torch.stack(padded, 1).flatten(0, 1), torch.stack([c for c in counts if c is not None], 1).flatten(0, 1)
    return Selection(rows, number, sinks, sealed, lengths, version=first.version)


def best_of(
    backend: Backend, lists: SegmentedInvertedLists, queries: Tensor, selection: Selection, k: int
) -> tuple[Tensor, Tensor]:
    """The k largest inner products of queries (b, h, g, q, d) with the keys that each would read, and the ids of these tokens.

    selection : of `SearchSession.select_each`. Returns float32 (b, h, g, q, k), descending, and int64 of the same shape; -inf and
    -1 for none.
    """
    b, h = queries.shape[:2]
    counts = None if selection.rows is None else selection.counts
    spans = selection.sinks, selection.sealed, selection.lengths
    best = None if lists.code is not None else backend.best(queries, lists.keys, selection.rows, counts, *spans, k)
    scores, rows = _best_rows(lists, queries, selection, k) if best is None else best
    ids = torch.full_like(rows, -1)
    for i, head in np.ndindex(b, h) if any(selection.lengths) else ():
        at = rows[i, head]  # a row of no token has no score; one whose score is -inf is still a token's
        ids[i, head] = torch.where(at < 0, -1, ids_of(lists, i, head, at.clamp(min=0)))
    return scores, ids


def best_of_none(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`best_of` queries (b, h, g, q, d) that read nothing."""
    shape, device = (*queries.shape[:-1], k), queries.device
    scores = torch.full(shape, float("-inf"), dtype=torch.float32, device=device)
    return scores, torch.full(shape, -1, dtype=torch.int64, device=device)


@full_precision
def _best_rows(lists: SegmentedInvertedLists, queries: Tensor, selection: Selection, k: int) -> tuple[Tensor, Tensor]:
    """What `Backend.best` returns."""
    b, h, g, q, d = queries.shape
    device = queries.device
    scores, best = best_of_none(queries, k)
    width = 0 if selection.rows is None else selection.rows.shape[2]
    rows_in_use = max(selection.sealed, default=0)
    at_once = q * width >= rows_in_use  # to multiply all sealed keys reads less than to gather those of each query
    step = max(1, GATHER_BYTES // (4 * max(g * rows_in_use if at_once else d * width, 1)))
    for i, head in np.ndindex(b, h):
        always = _always(selection, i * q, device)
        x = queries[i, head].float()  # (g, q, d)
        keys = lists.key_rows(i, 0, lists.lengths[i], head)
        beside = x @ keys.index_select(0, always).float().T
        for first in range(0, q, step):
            part = slice(first, first + step)
            count = min(step, q - first)
            inner, rows = beside[:, part], always.expand(count, -1)
            if selection.rows is not None:
                chosen = selection.rows[i * q + first : i * q + first + count, head].long()
                inside = chosen.clamp(min=0)
                if at_once:
                    sealed = (x[:, part] @ keys[:rows_in_use].float().T).gather(2, inside.expand(g, -1, -1))
                else:
                    gathered = keys.index_select(0, inside.reshape(-1)).view(count, width, d).float()
                    sealed = torch.einsum("gqd,qtd->gqt", x[:, part], gathered)
                sealed = sealed.masked_fill(chosen < 0, float("-inf"))
                inner, rows = torch.cat([inner, sealed], 2), torch.cat([rows, chosen], 1)
            top = inner.topk(min(k, inner.shape[2]), dim=2)
            n = top.values.shape[2]
            scores[i, head, :, part, :n] = top.values
            best[i, head, :, part, :n] = rows.expand(g, -1, -1).gather(2, top.indices)
    return scores, best


GATHER_BYTES = 64 << 20
"""Most memory for keys that `best_of` looks at together."""


def select_lists(lists: SegmentedInvertedLists, list_nos: Tensor, params: SearchParametersIVF) -> Selection:
    """Whole lists, every segment of each: list_nos : int (b, h, p), -1 for none, duplicates once. max_codes is not applied."""
    b, h, _ = list_nos.shape
    chosen = torch.zeros((b, h, lists.nlist + 1), dtype=torch.bool, device=list_nos.device)
    chosen.scatter_(2, torch.where(list_nos < 0, lists.nlist, list_nos).long(), True)
    picked = []
    for i in range(b):
        sizes = lists.tables[i, :, : len(lists.segments[i])].diff(dim=-1)  # (h, s, l)
        for head in range(h):
            keep = chosen[i, head, :-1].expand_as(sizes[head]).reshape(-1).repeat_interleave(sizes[head].reshape(-1).long())
            picked.append(torch.nonzero(keep)[:, 0].int() + lists.sinks(i))
    return extend_to_window(lists, _padded(picked, b, h, lists), params)


def extend_to_window(lists: SegmentedInvertedLists, selection: Selection, params: SearchParametersIVF) -> Selection:
    """Add the sealed tokens that a larger window or more sinks, asked for in this call, read besides."""
    layout = lists.layout
    window, sinks = params.window or 0, params.sinks or 0
    if (window <= layout.window and sinks <= layout.sinks) or selection.rows is None:
        return selection
    picked, tail = [], None if selection.tail is None else selection.tail.clone()
    biases: list[Tensor] = []
    for i in range(lists.batch):
        low, high = lists.sinks(i), lists.sealed(i)
        ids = lists.ids[i, :, low:high]
        # ranks are read, not positions: tokens that were removed take no part
        first = int(lists.positions(i, np.array([max(0, lists.lengths[i] - window)]))[0])
        last = int(lists.positions(i, np.array([sinks]))[0])
        for head in range(lists.heads):
            keep = (ids[head] >= first) | (ids[head] < last)
            rows = selection.rows[i, head]
            chosen = rows[rows >= 0].long() - low
            if selection.biases is not None:  # what is read anyway stands for itself alone
                bias = torch.zeros(high - low, dtype=torch.float32, device=keep.device)
                bias[chosen] = selection.biases[i, head, : len(chosen)]
                bias[keep] = 0.0
            keep[chosen] = True
            picked.append(torch.nonzero(keep)[:, 0].int() + low)
            if selection.biases is not None:
                biases.append(bias[keep])
            if tail is not None:
                _leave_out(tail[i, head], lists.tables[i, head], picked[-1])
    wider = _padded(picked, lists.batch, lists.heads, lists)
    if biases:
        beside = torch.nn.utils.rnn.pad_sequence(biases, batch_first=True).view(lists.batch, lists.heads, -1)
        wider = replace(wider, biases=beside)
    return wider if tail is None else replace(wider, tail=tail, tail_counts=(tail >= 0).sum(-1).int())


def attend(
    backend: Backend, lists: SegmentedInvertedLists, queries: Tensor, selection: Selection, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """One softmax over the sinks, the selected rows, the tail and the recent tokens: out (b, h, g, q, e), lse (b, h, g, q)."""
    tail = None
    if selection.tail is not None and selection.tail_counts is not None:
        tail = Tail(selection.tail, selection.tail_counts, lists.mean_keys, lists.mean_values, lists.tables)
    # backends of others may know no biases
    biases = () if selection.biases is None else (selection.biases,)
    return backend.scan(
        queries, *lists.arena.numbers, selection.rows, selection.counts, selection.sinks, selection.sealed, selection.lengths,
        scale, causal, tail, lists.coded, *biases,
    )


@full_precision
def sample_error(
    lists: SegmentedInvertedLists, queries: Tensor, selection: Selection, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    """See `reference.sample_error`: float32 (b, h, g, q), 0 where nothing was sampled.

    queries (b, h, g, q, d), out (b, h, g, q, e) and lse (b, h, g, q) of attention over ``selection``.
    """
    error = torch.zeros(lse.shape, dtype=torch.float32, device=lse.device)
    if selection.rows is None or selection.biases is None or selection.counts is None:
        return error
    places = torch.arange(selection.rows.shape[2], dtype=torch.int32, device=lse.device)
    for i in range(len(error)):
        present = places < selection.counts[i, :, None]
        bias = torch.where(present, selection.biases[i], 0.0)  # of a row that is read for certain, 0 leaves nothing of it
        keys, values = (x.float() for x in lists.rows(i, selection.rows[i].clamp(min=0).long()))
        logits = torch.einsum("hgqd,htd->hgqt", queries[i].float(), keys) * scale + bias[:, None, None]
        shares = torch.exp(logits - lse[i, ..., None]).square() * (1 - torch.exp(-bias))[:, None, None]
        for j in range(lse.shape[3]):
            squares = (values[:, None] - out[i, :, :, j, None].float()).square().sum(-1)
            error[i, :, :, j] = (shares[:, :, j] * squares).sum(-1).sqrt()
    return error


def _always(selection: Selection, i: int, device: torch.device) -> Tensor:
    """Rows of sequence i that are read besides the selected ones: int64 (t,)."""
    spans = (0, selection.sinks[i]), (selection.sealed[i], selection.lengths[i])
    return torch.cat([torch.arange(low, high, dtype=torch.int64, device=device) for low, high in spans])

