"""Selection and attention over it: which rows a query reads, and the one softmax over them. Stateless."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .. import checks
from ..backends import Backend, Budget, Rotation, Search, Tail, get_backend
from ..backends.base import InRuns
from ..errors import CompatibilityError, ShapeError, StateError
from ..invlists.segmented import SegmentedInvertedLists
from .params import SearchParametersIVF
from ..precision import full_precision
from ..routing.router import QueryRouter


@dataclass(frozen=True)
class Selection:
    """The tokens that one call reads, the same for every query head of a KV head.

    rows : int32 (b, h, t) rows inside segments, ascending, padded with -1, or None if no segment is read apart (dense, or
    nothing sealed); counts : int32 (b, h) of them. Rows [0, sinks[i]) and [sealed[i], lengths[i]) are read besides; sealed and
    sinks are 0 where every row is read. tail : int32 (b, h, x), numbers segment * nlist + list of the runs that are read through
    their means, ascending, padded with -1, or None for none; tail_counts : int32 (b, h) of them. version : of the inverted lists
    whose rows these are; None holds for any, at the caller's own risk. in_runs : of a step, where ``rows`` is (b, h, 0).
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

    def check(self, lists: SegmentedInvertedLists) -> None:
        """StateError if rows were chosen before they changed."""
        if self.rows is not None and self.version not in (None, lists.version):
            raise StateError("selection: expected one made since the last change of the index, got one of before")


def everything(lists: SegmentedInvertedLists) -> Selection:
    """Dense attention: every token that is stored."""
    none = [0] * lists.batch
    return Selection(None, None, none, none, list(lists.lengths))


def select(
    backend: Backend, lists: SegmentedInvertedLists, router: QueryRouter, prepared: Any, queries: Tensor,
    rotation: Rotation | None, params: SearchParametersIVF, shares: np.ndarray | None, miss: Tensor | None,
) -> Selection:  # fmt: skip
    """Route queries (b, h, g, q, d) and spend the budget on the best runs: one selection per (sequence, KV head).

    shares : float32 (h,), factors of the budget, or None for 1 each; miss : float32 (h,), see `Budget`, or None.
    """
    plan = _plan(lists, router, params, shares, miss)
    if plan.budget is None:
        return everything(lists)
    z, a = backend.route(prepared, queries, rotation)
    distances = np.ones((lists.batch, lists.tables.shape[2]))  # beyond a sequence's segments any number will do
    for i, count in enumerate(plan.num_segments):
        np.subtract(lists.next_position(i) - 1, lists.centres(i), out=distances[i, :count])
    knots = torch.from_numpy(router.knots(distances))
    knots = knots if z.is_cpu else knots.to(z.device)
    found = backend.probe(z, a, knots, lists.tables, plan.num_segments, plan.budget, router.count_lists)
    spans = plan.sinks, plan.sealed, list(lists.lengths)
    return widen(lists, Selection(found.rows, found.counts, *spans, found.tail, found.tail_counts, lists.version), params)


def select_each(
    backend: Backend, lists: SegmentedInvertedLists, router: QueryRouter, prepared: Any, queries: Tensor,
    rotation: Rotation | None, params: SearchParametersIVF, shares: np.ndarray | None, miss: Tensor | None,
) -> Selection:  # fmt: skip
    """`select` for every one of queries (b, h, g, q, d) on its own: as if there were b * q sequences, those of one side by side.

    rotation : angles of the newest position of each sequence, (b, r / 2). Not for a larger window or more sinks than the lists
    have; nothing enters through means.
    """
    b, h, g, q, d = queries.shape
    plan, lengths = _plan(lists, router, params, shares, miss), _repeated(lists.lengths, q)
    if plan.budget is None:
        none = [0] * (b * q)
        return Selection(None, None, none, none, lengths)
    if rotation is not None:
        cos, sin = rotation.cos.repeat_interleave(q, 0), rotation.sin.repeat_interleave(q, 0)
        rotation = Rotation(cos, sin, rotation.interleaved, rotation.scale)
    z, a = backend.route(prepared, queries.permute(0, 3, 1, 2, 4).reshape(b * q, h, g, 1, d).contiguous(), rotation)
    distances = np.ones((b, lists.tables.shape[2]))
    for i, count in enumerate(plan.num_segments):
        np.subtract(lists.next_position(i) - 1, lists.centres(i), out=distances[i, :count])
    knots = torch.from_numpy(router.knots(distances)).repeat_interleave(q, 0).to(z.device)
    budget = Budget(plan.budget.rows.repeat_interleave(q, 0), plan.budget.nprobe, plan.budget.miss)
    tables, used = lists.tables.repeat_interleave(q, 0), _repeated(plan.num_segments, q)
    found = backend.probe(z, a, knots, tables, used, budget, router.count_lists)
    return Selection(found.rows, found.counts, _repeated(plan.sinks, q), _repeated(plan.sealed, q), lengths, version=plan.version)


def side_by_side(selections: Sequence[Selection]) -> Selection:
    """Selections of one query each, of the same sequences, as `select_each` returns them; without their tails."""
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


def _repeated(values: Sequence[int], times: int) -> list[int]:
    return [value for value in values for _ in range(times)]


def best_of(
    backend: Backend, lists: SegmentedInvertedLists, queries: Tensor, selection: Selection, k: int
) -> tuple[Tensor, Tensor]:
    """The k largest inner products of queries (b, h, g, q, d) with the keys that each would read, and the ids of these tokens.

    selection : of `select_each`. Returns float32 (b, h, g, q, k), descending, and int64 of the same shape; -inf and -1 for none.
    """
    b, h = queries.shape[:2]
    counts = None if selection.rows is None else selection.counts
    spans = selection.sinks, selection.sealed, selection.lengths
    best = backend.best(queries, lists.keys, selection.rows, counts, *spans, k)
    scores, rows = _best_rows(lists, queries, selection, k) if best is None else best
    ids = torch.full_like(rows, -1)
    for i, head in np.ndindex(b, h) if any(selection.lengths) else ():
        at = rows[i, head]  # a row of no token has no score; one whose score is -inf is still a token's
        ids[i, head] = torch.where(at < 0, -1, lists.ids_of(i, head, at.clamp(min=0)))
    return scores, ids


@full_precision
def _best_rows(lists: SegmentedInvertedLists, queries: Tensor, selection: Selection, k: int) -> tuple[Tensor, Tensor]:
    """What `Backend.best` returns."""
    b, h, g, q, d = queries.shape
    device = queries.device
    scores = torch.full((b, h, g, q, k), float("-inf"), dtype=torch.float32, device=device)
    best = torch.full((b, h, g, q, k), -1, dtype=torch.int64, device=device)
    width = 0 if selection.rows is None else selection.rows.shape[2]
    rows_in_use = max(selection.sealed, default=0)
    at_once = q * width >= rows_in_use  # to multiply all sealed keys reads less than to gather those of each query
    step = max(1, GATHER_BYTES // (4 * max(g * rows_in_use if at_once else d * width, 1)))
    for i, head in np.ndindex(b, h):
        always = _always(selection, i * q, device)
        x = queries[i, head].float()  # (g, q, d)
        keys = lists.keys[i, head]
        beside = x @ keys.index_select(0, always).float().T
        for first in range(0, q, step):
            part = slice(first, first + step)
            count = min(step, q - first)
            inner, rows = beside[:, part], always.expand(count, -1)
            if selection.rows is not None:
                chosen = selection.rows[i * q + first : i * q + first + count, head].long()
                found = chosen.clamp(min=0)
                if at_once:
                    sealed = (x[:, part] @ keys[:rows_in_use].float().T).gather(2, found.expand(g, -1, -1))
                else:
                    gathered = keys.index_select(0, found.reshape(-1)).view(count, width, d).float()
                    sealed = torch.einsum("gqd,qtd->gqt", x[:, part], gathered)
                sealed = sealed.masked_fill(chosen < 0, float("-inf"))
                inner, rows = torch.cat([inner, sealed], 2), torch.cat([rows, chosen], 1)
            top = inner.topk(min(k, inner.shape[2]), dim=2)
            n = top.values.shape[2]
            scores[i, head, :, part, :n] = top.values
            best[i, head, :, part, :n] = rows.expand(g, -1, -1).gather(2, top.indices)
    return scores, best


def search(
    backend: Backend, lists: SegmentedInvertedLists, router: QueryRouter, prepared: Any, queries: Tensor,
    rotation: Rotation | None, params: SearchParametersIVF, shares: np.ndarray | None, miss: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Selection] | None:  # fmt: skip
    """`select` and `attend` over it, in one call of the backend; None where there is no such call, or nothing to choose.

    Not for parameters with a larger window or more sinks than the lists have: see `widen`.
    """
    plan = _plan(lists, router, params, shares, miss)
    if plan.budget is None:
        return None
    known = plan.search
    if known is None or known[0] is not prepared or known[1] != scale:
        found = backend.prepare_search(_search(lists, router, prepared, plan, plan.budget, scale))
        plan.search = known = prepared, scale, found
    if known[2] is None:
        return None
    lengths = list(lists.lengths)
    ends = [lists.next_position(i) for i in range(lists.batch)]
    out, lse, taken = known[2](queries, rotation, ends, lengths)
    rows, spans = (taken.rows, taken.counts), (plan.sinks, plan.sealed, lengths)
    return out, lse, Selection(*rows, *spans, taken.tail, taken.tail_counts, plan.version)


def _search(
    lists: SegmentedInvertedLists, router: QueryRouter, prepared: Any, plan: _Plan, budget: Budget, scale: float
) -> Search:
    centres = torch.zeros((lists.batch, lists.tables.shape[2]), dtype=torch.float64, device="cpu")
    for i, count in enumerate(plan.num_segments):
        centres[i, :count] = torch.from_numpy(lists.centres(i))
    memory = lists.keys, lists.values, lists.mean_keys, lists.mean_values
    how = router.first_knot, router.count_lists, centres, lists.tables, plan.num_segments, budget
    return Search(prepared, *how, *memory, plan.sinks, plan.sealed, scale)


GATHER_BYTES = 64 << 20
"""Most memory for keys that `best_of` looks at together."""

MOST_PLANS = 16
"""Sets of search parameters for which a plan is kept."""


class _Plan:
    """What a selection needs of segments and parameters: the same from step to step, until tokens are sealed.

    Written to in one piece, so that threads may search one index.
    """

    __slots__ = ("budget", "key", "num_segments", "sealed", "search", "sinks", "version")

    def __init__(
        self, key: tuple[Any, ...], lists: SegmentedInvertedLists, router: QueryRouter, params: SearchParametersIVF,
        shares: np.ndarray | None, miss: Tensor | None,
    ) -> None:  # fmt: skip
        batch = range(lists.batch)
        self.version = lists.version
        self.key = key  # holds the objects, so that no other takes the place of one that is gone
        self.sinks, self.sealed = [lists.sinks(i) for i in batch], [lists.sealed(i) for i in batch]
        self.num_segments = [len(s) for s in lists.segments]
        sizes = [high - low for low, high in zip(self.sinks, self.sealed, strict=True)]
        budgets = params.budgets(sizes, lists.heads, shares)
        fits = everything_fits(params, router, sizes, budgets, miss)
        self.budget = None if fits else spend(lists, router, params, budgets, miss)
        self.search: tuple[Any, float, Any] | None = None  # router and scale, and what `Backend.prepare_search` made of them


def _plan(
    lists: SegmentedInvertedLists, router: QueryRouter, params: SearchParametersIVF, shares: np.ndarray | None,
    miss: Tensor | None,
) -> _Plan:  # fmt: skip
    """The plan of an earlier call with these parameters, kept with the lists, where it still holds."""
    key = params, router, shares, miss
    plan: _Plan | None = lists.plans.get(id(params))
    if plan is None or plan.version != lists.version or not all(map(operator.is_, plan.key, key)):
        if len(lists.plans) >= MOST_PLANS:
            lists.plans.clear()
        lists.plans[id(params)] = plan = _Plan(key, lists, router, params, shares, miss)
    return plan


def everything_fits(
    params: SearchParametersIVF, router: QueryRouter, sizes: Sequence[int], budgets: np.ndarray, miss: Tensor | None
) -> bool:
    """Whether budgets (b, h) allow every sealed token of every sequence, ``sizes`` of them, so that nothing need be chosen."""
    nprobe = params.nprobe or 0
    return miss is None and (not nprobe or nprobe >= router.nlist) and bool((budgets == np.array(sizes)[:, None]).all())


def spend(
    lists: SegmentedInvertedLists, router: QueryRouter, params: SearchParametersIVF, budgets: np.ndarray, miss: Tensor | None,
    device: torch.device | None = None,
) -> Budget:  # fmt: skip
    """Tokens to read, int32 (b, h), as rows and as entries of the tail: an entry costs the bytes of a row. On the device of the
    lists, or on ``device``."""
    device, nprobe = device or lists.keys.device, min(params.nprobe or 0, router.nlist)
    if not params.tail or nprobe:
        return Budget(torch.from_numpy(budgets).to(device), nprobe, miss)
    if not router.count_lists:
        raise CompatibilityError("tail: expected a query_router of mass per token, got the published classifier")
    means = [lists.num_means(i) for i in range(lists.batch)]
    most = np.array(means)[:, None] * lists.nlist
    entries = np.minimum(np.floor(budgets * params.tail + 1e-6), most).astype(np.int32)
    if not entries.any():
        return Budget(torch.from_numpy(budgets).to(device), nprobe, miss)
    rows = torch.from_numpy(budgets - entries).to(device)
    return Budget(rows, nprobe, miss, torch.from_numpy(entries).to(device), means)


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
    return widen(lists, _padded(picked, b, h, lists), params)


def _padded(picked: list[Tensor], b: int, h: int, lists: SegmentedInvertedLists) -> Selection:
    rows = torch.nn.utils.rnn.pad_sequence(picked, batch_first=True, padding_value=-1).view(b, h, -1)
    counts = torch.tensor([len(r) for r in picked], dtype=torch.int32, device=rows.device).view(b, h)
    sinks, sealed = [lists.sinks(i) for i in range(b)], [lists.sealed(i) for i in range(b)]
    return Selection(rows, counts, sinks, sealed, list(lists.lengths), version=lists.version)


def widen(lists: SegmentedInvertedLists, selection: Selection, params: SearchParametersIVF) -> Selection:
    """Add the sealed tokens that a larger window or more sinks, asked for in this call, read besides."""
    layout = lists.layout
    window, sinks = params.window or 0, params.sinks or 0
    if (window <= layout.window and sinks <= layout.sinks) or selection.rows is None:
        return selection
    picked, tail = [], None if selection.tail is None else selection.tail.clone()
    for i in range(lists.batch):
        low, high = lists.sinks(i), lists.sealed(i)
        ids = lists.ids[i, :, low:high]
        # ranks are read, not positions: tokens that were removed take no part
        first = int(lists.positions(i, np.array([max(0, lists.lengths[i] - window)]))[0])
        last = int(lists.positions(i, np.array([sinks]))[0])
        for head in range(lists.heads):
            keep = (ids[head] >= first) | (ids[head] < last)
            rows = selection.rows[i, head]
            keep[rows[rows >= 0].long() - low] = True
            picked.append(torch.nonzero(keep)[:, 0].int() + low)
            if tail is not None:
                _leave_out(tail[i, head], lists.tables[i, head], picked[-1])
    wider = _padded(picked, lists.batch, lists.heads, lists)
    return wider if tail is None else replace(wider, tail=tail, tail_counts=(tail >= 0).sum(-1).int())


def _leave_out(runs: Tensor, tables: Tensor, rows: Tensor) -> None:
    """Take out of ``runs`` (x,), in place, those of which one of ``rows`` (t,), ascending, is read. tables : (S, l + 1)."""
    nlist, real = tables.shape[1] - 1, runs[runs >= 0].long()
    first, past = tables[real // nlist, real % nlist], tables[real // nlist, real % nlist + 1]
    untouched = real[torch.searchsorted(rows, first) == torch.searchsorted(rows, past)]
    runs.fill_(-1)
    runs[: len(untouched)] = untouched.int()


def attend(
    backend: Backend, lists: SegmentedInvertedLists, queries: Tensor, selection: Selection, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """One softmax over the sinks, the selected rows, the tail and the recent tokens: out (b, h, g, q, e), lse (b, h, g, q)."""
    tail = None
    if selection.tail is not None and selection.tail_counts is not None:
        tail = Tail(selection.tail, selection.tail_counts, lists.mean_keys, lists.mean_values, lists.tables)
    return backend.scan(
        queries, lists.keys, lists.values, selection.rows, selection.counts, selection.sinks, selection.sealed, selection.lengths,
        scale, causal, tail,
    )  # fmt: skip


def read_ids(lists: SegmentedInvertedLists, selection: Selection) -> list[list[Tensor]]:
    """Positions of the tokens read, those in the tail not among them, per sequence and KV head: int64, ascending.

    StateError for a selection of before a change.
    """
    selection.check(lists)
    found, listed = [], selection.rows if selection.in_runs is None else selection.in_runs.rows()
    for i in range(lists.batch):
        row_ids, low, high, n = lists.row_ids(i), selection.sinks[i], selection.sealed[i], selection.lengths[i]
        keep = torch.zeros((lists.heads, n), dtype=torch.bool, device=row_ids.device)
        keep[:, :low] = True
        keep[:, high:] = True
        for head in range(lists.heads):
            if listed is not None and selection.counts is not None:  # of a step, anything lies behind
                rows = listed[i, head, : int(selection.counts[i, head])]
                keep[head, rows[rows >= 0].long()] = True
        found.append([row_ids[head][keep[head]].long().sort().values for head in range(lists.heads)])
    return found


def _always(selection: Selection, i: int, device: torch.device) -> Tensor:
    """Rows of sequence i that are read besides the selected ones: int64 (t,)."""
    spans = (0, selection.sinks[i]), (selection.sealed[i], selection.lengths[i])
    return torch.cat([torch.arange(low, high, dtype=torch.int64, device=device) for low, high in spans])


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint token sets, from the attention over each.

    out_a, out_b : float (..., e), same dtype; lse_a, lse_b : float32 (...), natural log. Returns (out, lse) alike. Associative
    and commutative; the state of no tokens, out 0 and lse -inf, is the identity, and merging two of them gives it again.

    Raises ShapeError or DTypeError. Source: Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135.

    >>> out, lse = merge_states(torch.ones(2, 8), torch.zeros(2), torch.zeros(2, 8), torch.full((2,), -torch.inf))
    >>> bool((out == 1).all()), lse.tolist()
    (True, [0.0, 0.0])
    """
    if out_a.shape != out_b.shape or lse_a.shape != out_a.shape[:-1] or lse_b.shape != lse_a.shape:
        shapes = [tuple(x.shape) for x in (out_a, lse_a, out_b, lse_b)]
        raise ShapeError(f"merge_states: expected out (..., e) and lse (...) of the same shapes, got {shapes}")
    for x, name in ((out_b, "out_b"),):
        checks.array(x, name, "x " * x.ndim, list(out_a.shape), [out_a.dtype], out_a.device)
    for x, name in ((lse_a, "lse_a"), (lse_b, "lse_b")):
        checks.array(x, name, "x " * x.ndim, list(lse_a.shape), [torch.float32], out_a.device)
    args = [x.contiguous() for x in (out_a, lse_a, out_b, lse_b)]
    return get_backend(out_a.device).combine(*args)
