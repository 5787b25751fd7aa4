"""Other ways to choose which tokens a query reads, at the same budget, to compare an index with.

A query at position p sees the tokens [0, p]. Everyone reads the first `sinks` tokens and the newest `window` tokens (the query's
own among them); a selection distributes a budget of t tokens over the candidates between the two, once per KV head for all of
its query heads. Whatever chooses units of several tokens takes them in order of their score and cuts the last one to the exact
budget, newest tokens first. These are plain float32 references, not fast implementations.

Axes: h KV heads, g query heads per KV head, n tokens, d dims, c candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saap_index.errors import LengthError, MissingDependencyError, ParameterError, ShapeError

SINKS = 4
WINDOW = 128
LISTS = 256
ITERATIONS = 10
PAGE_TOKENS = 16
DEVIATIONS = 0.5

Selector = Callable[[Tensor, int, int], Tensor]
"""(queries float32 (h * g, d), position, budget) -> bool (h, n), True for the candidates to read."""


def candidates(position: int, sinks: int = SINKS, window: int = WINDOW) -> tuple[int, int]:
    """The half-open range of tokens over which a budget is spent for a query at `position`; empty for a short context."""
    stop = max(position + 1 - window, 0)
    return min(sinks, stop), stop


def recent(keys: Tensor, queries: Tensor, position: int, budget: int, *, sinks: int = SINKS, window: int = WINDOW) -> Tensor:
    """A window that is longer by the budget: the newest candidates.

    Parameters
    ----------
    keys : float32 (h, n, d)
        After RoPE, as for every selection here.
    queries : float32 (h * g, d)
        After RoPE, of one position.
    position : int
        Position of the query, in [0, n).
    budget : int
        Tokens to choose per KV head; more than there are candidates means all of them.
    sinks, window : int
        Tokens that are read anyway and are not candidates.

    Returns
    -------
    Tensor
        bool (h, n), True for the tokens chosen.
    """
    first, last = _checked(keys, queries, position, budget, sinks, window)
    scores = torch.zeros(keys.shape[0], last - first, dtype=torch.float32, device=keys.device)
    return _newest_first(scores, first, keys.shape[1], budget)


def uniform(
    keys: Tensor,
    queries: Tensor,
    position: int,
    budget: int,
    *,
    seed: int = 0,
    sinks: int = SINKS,
    window: int = WINDOW,
) -> Tensor:
    """Random candidates, other ones for every KV head and position. Parameters and result as for :func:`recent`."""
    first, last = _checked(keys, queries, position, budget, sinks, window)
    generator = torch.Generator().manual_seed(seed * keys.shape[1] + position)
    scores = torch.rand(keys.shape[0], last - first, generator=generator, dtype=torch.float32, device="cpu")
    return _newest_first(scores.to(keys.device), first, keys.shape[1], budget)


def topk_group(keys: Tensor, queries: Tensor, position: int, budget: int, *, sinks: int = SINKS, window: int = WINDOW) -> Tensor:
    """The candidates with the largest attention probability, averaged over the query heads: what no index can surpass.

    Parameters and result as for :func:`recent`.
    """
    first, last = _checked(keys, queries, position, budget, sinks, window)
    visible = keys[:, : position + 1]
    logits = _grouped(keys, queries) @ visible.transpose(1, 2) * keys.shape[2] ** -0.5
    probabilities = logits.softmax(-1).mean(1)
    return _newest_first(probabilities[:, first:last], first, keys.shape[1], budget)


def quest(
    keys: Tensor,
    queries: Tensor,
    position: int,
    budget: int,
    *,
    page_tokens: int = PAGE_TOKENS,
    sinks: int = SINKS,
    window: int = WINDOW,
) -> Tensor:
    """Pages of consecutive tokens by an upper bound of their logits, from the smallest and largest key per dimension.

    A page counts as much as the query head that wants it most. The method of Tang et al., 2024 (arXiv 2406.10774). Parameters
    and result as for :func:`recent`.
    """
    if page_tokens < 1:
        raise ParameterError(f"page_tokens: expected at least 1, got {page_tokens}")
    first, last = _checked(keys, queries, position, budget, sinks, window)
    grouped = _grouped(keys, queries)

    def bounds(paged: Tensor) -> Tensor:
        low, high = paged.amin(2), paged.amax(2)
        return grouped.clamp(min=0) @ high.transpose(1, 2) + grouped.clamp(max=0) @ low.transpose(1, 2)

    return _best_pages(keys, bounds, first, last, budget, page_tokens)


def moments(
    keys: Tensor,
    queries: Tensor,
    position: int,
    budget: int,
    *,
    page_tokens: int = PAGE_TOKENS,
    deviations: float = DEVIATIONS,
    sinks: int = SINKS,
    window: int = WINDOW,
) -> Tensor:
    """Pages of consecutive tokens by mean and deviation of their keys per dimension: q . mean + ``deviations`` |q| . std.

    What engines put in place of Quest's corners, of which few keys come near; as many bytes. A page counts as much as the query
    head that wants it most. Parameters and result as for :func:`recent`.
    """
    if page_tokens < 1:
        raise ParameterError(f"page_tokens: expected at least 1, got {page_tokens}")
    first, last = _checked(keys, queries, position, budget, sinks, window)
    grouped = _grouped(keys, queries)

    def reach(paged: Tensor) -> Tensor:
        spread = paged.std(2, correction=0)
        return grouped @ paged.mean(2).transpose(1, 2) + deviations * grouped.abs() @ spread.transpose(1, 2)

    return _best_pages(keys, reach, first, last, budget, page_tokens)


def ivf(
    keys: Tensor,
    queries: Tensor,
    position: int,
    budget: int,
    *,
    lists: tuple[Tensor, Tensor] | None = None,
    sinks: int = SINKS,
    window: int = WINDOW,
) -> Tensor:
    """An inverted file over this very sequence: its lists ranked by the inner product of centroid and mean query.

    Parameters
    ----------
    lists : (float32 (h, l, d), int64 (h, n)), optional
        Centroids and the list of every token, from :func:`cluster`, which is called if they are not given.

    Others and the result as for :func:`recent`.
    """
    first, last = _checked(keys, queries, position, budget, sinks, window)
    centroids, assignment = cluster(keys) if lists is None else lists
    wanted = torch.einsum("hd,hld->hl", _grouped(keys, queries).mean(1), centroids)
    # Ranks rather than scores: two lists of one score are still read one after the other.
    order = wanted.argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], dtype=torch.int64, device=order.device).expand_as(order)
    )
    return _newest_first(-ranks.gather(1, assignment[:, first:last]), first, keys.shape[1], budget)


def cluster(keys: Tensor, lists: int = LISTS, iterations: int = ITERATIONS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """k-means of FAISS over the keys of each KV head.

    Parameters
    ----------
    keys : float32 (h, n, d)

    Returns
    -------
    centroids : float32 (h, l, d)
        l is `lists`, or n if that is smaller.
    assignment : int64 (h, n)
        The nearest centroid of every token.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError("the ivf baseline needs FAISS; install with: pip install faiss-cpu") from error
    centroids, assignment = [], []
    for rows in keys.float().contiguous().cpu().numpy():
        kmeans: Any = faiss.Kmeans(
            rows.shape[1], min(lists, rows.shape[0]), niter=iterations, seed=seed, min_points_per_centroid=1, verbose=False
        )
        kmeans.train(rows)
        centroids.append(torch.from_numpy(kmeans.centroids))
        assignment.append(torch.from_numpy(kmeans.index.search(rows, 1)[1][:, 0]))
    return torch.stack(centroids).to(keys.device), torch.stack(assignment).to(keys.device)


SELECTIONS: dict[str, Callable[..., Tensor]] = {
    "recent": recent,
    "random": uniform,
    "topk_group": topk_group,
    "ivf": ivf,
    "quest": quest,
    "moments": moments,
}
"""Every selection by name; all take (keys, queries, position, budget, *, sinks, window)."""


def selector(name: str, keys: Tensor, *, sinks: int = SINKS, window: int = WINDOW) -> Selector:
    """Bind a selection to the keys of one sequence and layer; what can be prepared (the clustering of ``ivf``) is done once.

    Parameters
    ----------
    name : str
        One of ``SELECTIONS``.
    keys : float32 (h, n, d)

    Returns
    -------
    Selector
    """
    if name not in SELECTIONS:
        raise ParameterError(f"name: expected one of {', '.join(SELECTIONS)}, got {name!r}")
    choose = SELECTIONS[name]
    prepared = {"lists": cluster(keys)} if name == "ivf" else {}

    def select(queries: Tensor, position: int, budget: int) -> Tensor:
        return choose(keys, queries, position, budget, sinks=sinks, window=window, **prepared)

    return select


def _checked(keys: Tensor, queries: Tensor, position: int, budget: int, sinks: int, window: int) -> tuple[int, int]:
    """Check the arguments that all selections share; returns the range of candidates."""
    if keys.ndim != 3:
        raise ShapeError(f"keys: expected (h, n, d), got {tuple(keys.shape)}")
    heads, tokens, dims = keys.shape
    if queries.ndim != 2 or queries.shape[1] != dims or queries.shape[0] % heads or not queries.shape[0]:
        raise ShapeError(f"queries: expected (a multiple of {heads}, {dims}), got {tuple(queries.shape)}")
    if not 0 <= position < tokens:
        raise LengthError(f"position: expected one of [0, {tokens}), got {position}")
    for name, value in (("budget", budget), ("sinks", sinks), ("window", window)):
        if value < 0:
            raise ParameterError(f"{name}: expected at least 0, got {value}")
    return candidates(position, sinks, window)


def _grouped(keys: Tensor, queries: Tensor) -> Tensor:
    """Queries by KV head: float32 (h, g, d)."""
    return queries.view(keys.shape[0], -1, keys.shape[2])


def _best_pages(
    keys: Tensor, score: Callable[[Tensor], Tensor], first: int, last: int, budget: int, page_tokens: int
) -> Tensor:
    """Choose pages of the candidates [first, last). score : of paged keys (h, pages, tokens, d), by query head: (h, g, pages)."""
    heads, tokens, dims = keys.shape
    if first == last:
        return torch.zeros(heads, tokens, dtype=torch.bool, device=keys.device)
    pages = -(-(last - first) // page_tokens)
    # Repeating the last key fills the last page without moving its bounds.
    rows = torch.arange(first, first + pages * page_tokens, dtype=torch.int64, device=keys.device).clamp(max=last - 1)
    paged = keys[:, rows].view(heads, pages, page_tokens, dims)
    scores = score(paged).amax(1).repeat_interleave(page_tokens, dim=1)[:, : last - first]
    return _newest_first(_unit_ranks(scores, page_tokens), first, tokens, budget)


def _unit_ranks(scores: Tensor, unit: int) -> Tensor:
    """Replace the scores of candidates in units of consecutive tokens by the negated rank of their unit, so none are equal."""
    heads, count = scores.shape
    order = scores[:, ::unit].argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], dtype=torch.int64, device=order.device).expand_as(order)
    )
    return -ranks.repeat_interleave(unit, dim=1)[:, :count].view(heads, count)


def _newest_first(scores: Tensor, first: int, tokens: int, budget: int) -> Tensor:
    """Choose the `budget` candidates of the largest score, the newest first among equals.

    scores : (h, c), of the tokens [first, first + c)
    Returns bool (h, tokens).
    """
    heads, count = scores.shape
    chosen = torch.zeros(heads, tokens, dtype=torch.bool, device=scores.device)
    order = scores.flip(1).argsort(dim=1, descending=True, stable=True)[:, :budget]
    return chosen.scatter_(1, first + count - 1 - order, True)
