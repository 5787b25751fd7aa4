"""Many steps of one layer: the tokens of a stretch of text one after the other, with attention where it is asked for.

Any state answers step by step. Dense attention and the plain selections are also written for many queries at once, with the same
result: they look at every key, so one product serves them all. A budget that depends on the length is each query's own.

Axes: h KV heads, g query heads per KV head, q queries, m new tokens, n tokens, d key dim, e value dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .method import ITEM_BYTES, Attended, State, budget_tokens
from .selections import LISTS
from .yardsticks import Selected, TopK, _DenseState, _SelectedState, _TopKState

_CHUNK = 32
"""Queries at once: their logits over the whole context are what takes memory."""

Show = Callable[[int, int], None]
"""Called with [first, stop) of tokens just appended, counted from the first new one, before a query is asked."""

_Choose = Callable[..., Tensor]
"""(state, queries (h, g, q, d), logits (h, g, q, n), lengths (q,)) -> bool (h, g or 1, q, n), the tokens read."""


def replay(
    state: State, keys: Tensor, values: Tensor, queries: Tensor, at: Tensor, together: bool = False, show: Show | None = None,
    chosen: bool = True,
) -> list[Attended]:
    """Append tokens in order, and attend with query j when token at[j] is the newest.

    keys : (h, m, d), values : (h, m, e), all the new tokens; queries : float32 (h, g, q, d); at : int64 (q,), ascending, in
    [0, m). together : several queries at once where the state can; chosen : False if nobody asks which tokens were read. Tokens
    behind the last query are appended too.
    """
    if together and len(at) > 1 and isinstance(state, _DenseState) and (choose := _choice(state)) is not None:
        return _several(state, choose, keys, values, queries, at)
    steps, done = [], 0
    for j, place in enumerate(at.tolist()):
        state.append(keys[:, done : place + 1], values[:, done : place + 1])
        if show is not None:
            show(done, place)
        done = place + 1
        steps.append(state.attend(queries[:, :, j]) if chosen else state.answer(queries[:, :, j]))
    if done < keys.shape[1]:
        state.append(keys[:, done:], values[:, done:])
    return steps


def _choice(state: _DenseState) -> _Choose | None:
    """How a state chooses for several queries; None for one that can do so only step by step."""
    kind = next(kind for kind in _SEVERAL if isinstance(state, kind))
    if type(state).attend is not kind.attend:
        return None
    if isinstance(state, _SelectedState):
        name = state.method.name
        if name not in _SCORES or (name == "ivf" and not state.cache.length):  # lists are made of a prompt alone
            return None
    return _SEVERAL[kind]


def _several(state: _DenseState, choose: _Choose, keys: Tensor, values: Tensor, queries: Tensor, at: Tensor) -> list[Attended]:
    cache, before = state.cache, state.cache.length
    state.append(keys, values)
    lengths = before + at.to(keys.device) + 1
    steps: list[Attended] = []
    for part in range(0, len(at), _CHUNK):
        upto = lengths[part : part + _CHUNK]
        n = int(upto.max())
        seen = torch.arange(n, dtype=torch.int64, device=keys.device) < upto[:, None]  # (q, n)
        logits = queries[:, :, part : part + _CHUNK] @ cache.keys[:, None, :n].transpose(2, 3) * cache.layer.scale
        logits.masked_fill_(~seen, -torch.inf)
        chosen = choose(state, queries[:, :, part : part + _CHUNK], logits, upto)  # (h, g or 1, q, n)
        out = logits.masked_fill(~chosen, -torch.inf).softmax(-1) @ cache.values[:, None, :n]
        tokens = chosen.any(1).sum(-1).double().mean(0).tolist()
        layer, other = cache.layer, _other(state)
        for j, (length, read) in enumerate(zip(upto.tolist(), tokens, strict=True)):
            which = chosen[:, :, j, :length] if isinstance(state, _TopKState) else chosen[:, 0, j, :length]
            steps.append(Attended(out[:, :, j], read, read * layer.heads * layer.token_bytes, other, chosen=which))
    return steps


def _other(state: _DenseState) -> float:
    """Bytes besides K and V: the centroids of ``ivf``."""
    lists = isinstance(state, _SelectedState) and state.method.name == "ivf"
    return LISTS * state.cache.layer.d * ITEM_BYTES * state.cache.layer.heads if lists else 0.0


def _all(state: _DenseState, queries: Tensor, logits: Tensor, lengths: Tensor) -> Tensor:
    place = torch.arange(logits.shape[3], dtype=torch.int64, device=logits.device)
    return (place < lengths[:, None]).expand(logits.shape[0], 1, -1, -1)


def _best(state: _TopKState, queries: Tensor, logits: Tensor, lengths: Tensor) -> Tensor:
    return _largest(state.method, logits, lengths)


def _selected(state: _SelectedState, queries: Tensor, logits: Tensor, lengths: Tensor) -> Tensor:
    scores = _SCORES[state.method.name](state, queries, logits, lengths)
    return _largest(state.method, scores[:, None].expand(logits.shape[0], -1, -1, -1), lengths)


def _largest(method: TopK | Selected, scores: Tensor, lengths: Tensor) -> Tensor:
    """Sinks, window, and each query's budget of the tokens between of largest score (h, x, q, n): bool of that shape."""
    place, until = torch.arange(scores.shape[3], dtype=torch.int64, device=scores.device), lengths[:, None]
    first = (until - method.window).clamp(min=0, max=method.sinks)
    between = (place >= first) & (place < until - method.window)
    budgets = torch.tensor(
        [budget_tokens(method.share, x, method.sinks, method.window) for x in lengths.tolist()], dtype=torch.int64,
        device=scores.device,
    )
    most = min(int(budgets.max()), scores.shape[3])
    best = scores.masked_fill(~between, -torch.inf).topk(most, dim=-1).indices
    within = (torch.arange(most, dtype=torch.int64, device=scores.device) < budgets[:, None]).expand_as(best)
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(3, best, within)
    return (chosen & between) | ((place < until) & ~between)


def _by_mass(state: _SelectedState, queries: Tensor, logits: Tensor, lengths: Tensor) -> Tensor:
    return logits.softmax(-1).mean(1)


def _by_age(state: _SelectedState, queries: Tensor, logits: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(logits.shape[3], dtype=torch.float32, device=logits.device).expand(1, len(lengths), -1)


def _by_chance(state: _SelectedState, queries: Tensor, logits: Tensor, lengths: Tensor) -> Tensor:
    """The draws of `selections.uniform`."""
    scores = torch.zeros(logits.shape[0], *logits.shape[2:], dtype=torch.float32, device=logits.device)
    for j, length in enumerate(lengths.tolist()):
        last = max(length - state.method.window, 0)
        first = min(state.method.sinks, last)
        generator = torch.Generator().manual_seed(length - 1)
        scores[:, j, first:last] = torch.rand(
            logits.shape[0], last - first, generator=generator, dtype=torch.float32, device="cpu"
        ).to(logits.device)
    return scores


def _by_list(state: _SelectedState, queries: Tensor, logits: Tensor, lengths: Tensor) -> Tensor:
    """Lists in the order of their centroid's product with the mean query; in a list the newest token first."""
    assert state.lists is not None
    centroids, assigned = state.lists
    n = logits.shape[3]
    order = (queries.mean(1) @ centroids.transpose(1, 2)).argsort(dim=-1, descending=True, stable=True)  # (h, q, l)
    ranks = torch.empty_like(order).scatter_(
        2, order, torch.arange(order.shape[2], dtype=torch.int64, device=order.device).expand_as(order)
    )
    of_token = ranks.gather(2, assigned[:, None, :n].expand(-1, len(lengths), -1))
    return (torch.arange(n, dtype=torch.int64, device=logits.device) - of_token * n).double()


_SCORES: dict[str, Callable[[_SelectedState, Tensor, Tensor, Tensor], Tensor]] = {
    "topk_group": _by_mass, "recent": _by_age, "random": _by_chance, "ivf": _by_list,
}
_SEVERAL: dict[type[_DenseState], _Choose] = {_TopKState: _best, _SelectedState: _selected, _DenseState: _all}
