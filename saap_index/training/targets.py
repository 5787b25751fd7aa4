"""What a router is trained to say: the true attention mass of sampled queries, summed by list and by distance.

Memory per query is nlist * bins, whatever the context. Knows sequences and lists, not networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..precision import full_precision

BINS_PER_OCTAVE = 2
LISTS_AT_ONCE = 64
"""Whose tokens are counted: what a long prompt takes of memory."""

COLUMNS = 64
"""Whose attention is summed in float32."""

BLOCK = 1 << 20
"""Logits at a time on a CPU: what its cache holds."""

_BLOCK = {"cpu": BLOCK, "cuda": 1 << 26}  # the second is what keeps a GPU busy


@dataclass(frozen=True)
class RouterTargets:
    """What the loss needs of P query positions. x : float32 (h, P, g, d), queries as the router sees them.

    outside : float32 (h, P, g), share of the attention that lies outside window and sinks;
    list_mass : float32 (h, P, g, l) and bin_mass : (h, P, g, B), each summing to 1, of that attention;
    counts : int16, int32 or float32 (h, P, B, l) tokens of each list and bin; bins : float32 (B,), log2 of the bins' centres.
    """

    x: Tensor
    outside: Tensor
    list_mass: Tensor
    bin_mass: Tensor
    counts: Tensor
    bins: Tensor

    @classmethod
    def cat(cls, parts: list[RouterTargets]) -> RouterTargets:
        names = ("x", "outside", "list_mass", "bin_mass", "counts")
        x, outside, list_mass, bin_mass, counts = (torch.cat([getattr(p, name) for p in parts], 1) for name in names)
        return cls(x, outside, list_mass, bin_mass, counts, parts[0].bins)

    def picked(self, order: Tensor) -> RouterTargets:
        """Those of some positions, int64 (p,), in that order; counts in float32, as the loss takes them."""
        x, outside, list_mass, bin_mass = (part[:, order] for part in (self.x, self.outside, self.list_mass, self.bin_mass))
        return RouterTargets(x, outside, list_mass, bin_mass, self.counts[:, order].float(), self.bins)


def bin_edges(nearest: int, farthest: int, distance: bool) -> Tensor:
    """Distance bins, in tokens, half an octave each: float64 (B + 1,), from the nearest distance to past the farthest."""
    if not distance:
        return torch.tensor([0.0, math.inf], dtype=torch.float64, device="cpu")
    octaves = math.log2(max(2, farthest) / max(1, nearest))
    count = max(1, math.ceil(octaves * BINS_PER_OCTAVE))
    return max(1, nearest) * 2.0 ** (torch.arange(count + 1, dtype=torch.float64, device="cpu") / BINS_PER_OCTAVE)


@full_precision
def targets(
    keys: Tensor, queries: Tensor, router_queries: Tensor, positions: Tensor, lists: Tensor, nlist: int,
    sinks: int, window: int, scale: float, edges: Tensor,
) -> RouterTargets:
    """The true attention mass of one sequence's sampled queries, by list and by distance.

    keys : float32 (h, n, d) and queries : (h, g, q, d), as attention sees them; router_queries : (h, g, q, d), as the router
    does; positions : int64 (q,) of the queries; lists : int (h, n). A query at p has the tokens [sinks, p - window] outside.
    Queries with nothing outside are left out.
    """
    h, n, d = keys.shape
    positions = positions.to(keys.device)
    some = positions - window >= sinks
    queries, router_queries, positions = queries[:, :, some], router_queries[:, :, some], positions[some]
    g, q = queries.shape[1:3]
    last = positions - window  # newest token outside
    num_bins = len(edges) - 1
    # tokens of bin b lie at [first[b + 1], first[b]): the farther, the lower the position
    first = (positions[:, None] + 1 - edges.to(positions.device).clamp(max=2**31).ceil()[None]).long()
    first[:, 0] = last + 1
    first = torch.minimum(first.clamp(min=sinks), last[:, None] + 1)
    first[:, -1] = sinks
    near = torch.cat([torch.arange(sinks, dtype=torch.int64, device=keys.device).expand(q, -1), _window(positions, window)], 1)
    share = keys.new_empty((h, q, g))
    list_mass, bin_mass = keys.new_zeros((h, q, g, nlist)), keys.new_empty((h, q, g, num_bins))
    counts = torch.empty((h, q, num_bins, nlist), dtype=torch.int16 if n < 2**15 else torch.int32, device=keys.device)
    rising = positions.argsort()  # queries of a block see about the same tokens, so none computes many that it does not see
    block = max(1, _BLOCK.get(keys.device.type, 1 << 22) // (g * n))
    for head in range(h):
        index = lists[head].long()
        for some_queries in rising.split(block) if q else ():
            stop = int(last[some_queries[-1]]) + 1
            x = queries[head][:, some_queries].transpose(0, 1) * scale  # (p, g, d)
            logits = (x.reshape(-1, d) @ keys[head, sinks:stop].T).view(len(some_queries), g, -1)
            beyond = torch.arange(sinks, stop, dtype=torch.int64, device=keys.device) > last[some_queries, None]
            mixed = int(last[some_queries[0]]) + 1 - sinks  # columns from here on are seen by some of the block only
            logits[..., mixed:].masked_fill_(beyond[:, None, mixed:], float("-inf"))
            top = logits.amax(-1, keepdim=True)
            mass = logits.sub_(top).exp_()
            total, at = _leading_sums(mass, first[some_queries] - sinks)  # of the tokens below each position
            mass /= total[..., None].float()
            bin_mass[head, some_queries] = ((at[..., :-1] - at[..., 1:]) / total[..., None]).float()
            beside = (x[:, :, None] @ keys[head][near[some_queries]].transpose(1, 2)[:, None])[:, :, 0]
            share[head, some_queries] = torch.sigmoid(total.log().float() + top[..., 0] - torch.logsumexp(beside, -1))
            by_list = mass.new_zeros((len(some_queries), g, nlist))
            list_mass[head, some_queries] = by_list.scatter_add_(2, index[sinks:stop].expand_as(mass), mass)
        for low in range(0, nlist, LISTS_AT_ONCE):  # whose tokens below each position are counted at a time
            some_lists = torch.arange(low, min(low + LISTS_AT_ONCE, nlist), dtype=torch.int64, device=keys.device)
            hot = (index == some_lists[:, None]).int()
            upto_each = functional.pad(hot.cumsum(1, dtype=torch.int32), (1, 0))[:, first]  # (l, q, B + 1)
            counts[head, :, :, low : low + LISTS_AT_ONCE] = (upto_each[..., :-1] - upto_each[..., 1:]).permute(1, 2, 0)
    centres = (
        torch.log2(edges[:-1]) + 0.5 / BINS_PER_OCTAVE if num_bins > 1 else torch.zeros(1, dtype=torch.float64, device="cpu")
    )
    return RouterTargets(router_queries.transpose(1, 2).contiguous(), share, list_mass, bin_mass, counts, centres.float())


def _leading_sums(x: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of x : float32 (p, g, n), not negative, over all columns, float64 (p, g), and over those below each of stops : int64
    (p, k) in [0, n], float64 (p, g, k). By blocks of columns: a running sum of each would write twice what x holds."""
    p, g, n = x.shape
    whole = n // COLUMNS
    blocks = x[..., : whole * COLUMNS].view(p, g, whole, COLUMNS).sum(-1)
    upto = functional.pad(blocks.cumsum(-1, dtype=torch.float64), (1, 0))
    total = upto[..., -1] + x[..., whole * COLUMNS :].sum(-1, dtype=torch.float64)
    first = (stops // COLUMNS).clamp(max=whole)
    column = first[..., None] * COLUMNS + torch.arange(COLUMNS, dtype=torch.int64, device=x.device)  # (p, k, COLUMNS)
    part = x.gather(2, column.clamp(max=n - 1).view(p, 1, -1).expand(-1, g, -1)).view(p, g, -1, COLUMNS)
    rest = part.masked_fill((column >= stops[..., None])[:, None], 0.0).sum(-1, dtype=torch.float64)
    return total, upto.gather(2, first[:, None].expand(-1, g, -1)) + rest


def _window(positions: Tensor, window: int) -> Tensor:
    """The newest ``window`` tokens of each position, its own included: int64 (q, window)."""
    return positions[:, None] - torch.arange(window, dtype=torch.int64, device=positions.device)
