"""What a step of the engine asks for on a GPU, cut by what the host knows of it without waiting for the device. Knows no vLLM.

Decoding requests come first in a batch. Those of up to 8 query tokens each are answered by the index, in groups of as many tokens
each; from the first other one on all are FlashAttention's.

Axes: r requests of the step, b of a group, q query tokens of each, n tokens of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..backends.cuda.paged import Pool
from ..backends.cuda.paged_session import PagedLayer, PagedPlan, PagedSession


@dataclass(frozen=True)
class Members:
    """Requests of q tokens each. requests, tokens : which of the step, slices where they lie side by side, else their numbers."""

    q: int
    requests: slice | list[int]
    tokens: slice | list[int]


@dataclass(frozen=True)
class Cut:
    """groups : requests answered by the index; requests, tokens : leading ones of the step that are."""

    groups: tuple[Members, ...]
    requests: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Group:
    """tokens : slice, or int64 (b * q,) on the device."""

    tokens: slice | Tensor
    plan: PagedPlan


def cut_step(
    starts: Sequence[int], longest: Sequence[int], prefilling: Sequence[bool], queries: int, break_even: int
) -> Cut:
    """Which requests the index answers.

    starts : first token of each request, and the end, r + 1 numbers; longest : tokens that each sequence has at most;
    prefilling : whether they are part of a prompt; queries : most tokens of a request that is decoding. If no sequence can be as
    long as break_even, none is the index's; else shorter ones that are decoding are as well, and are read whole. Padding has no
    tokens.
    """
    of_size: dict[int, list[int]] = {}
    count = 0
    for i in range(len(longest)):
        q = starts[i + 1] - starts[i]
        if q > queries or (q and prefilling[i]):
            break
        if q:
            of_size.setdefault(q, []).append(i)
        count = i + 1
    if all(longest[i] < break_even for members in of_size.values() for i in members):
        return Cut((), 0, 0)
    groups = []
    for q, members in of_size.items():
        first, last = members[0], members[-1]
        if len(members) == last - first + 1:
            groups.append(Members(q, slice(first, last + 1), slice(starts[first], starts[last + 1])))
        else:
            tokens = [starts[i] + k for i in members for k in range(q)]
            groups.append(Members(q, members, tokens))
    return Cut(tuple(groups), count, starts[count])


def uniform(starts: Sequence[int], tokens: int, queries: int) -> int:
    """Query tokens of each request where all have as many, or none as padding behind the others, up to ``queries``; else 0: a
    step that only decodes, of which a graph may be replayed. tokens : of the step, those of padding included."""
    r = len(starts) - 1
    q = starts[1] - starts[0] if r else 0
    if not 0 < q <= queries or tokens != r * q:
        return 0
    used = sum(b > a for a, b in pairwise(starts))
    return q if list(starts) == [*range(0, used * q + 1, q), *[used * q] * (r - used)] else 0


def plan_groups(session: PagedSession, cut: Cut, lengths: Tensor, blocks: Tensor) -> tuple[Group, ...]:
    """Put the groups of a step on the device. lengths : int32 (r,), blocks : int32 (r, M), both there. Does not wait for it."""
    groups = []
    for members in cut.groups:
        requests, tokens = (_sent(x, lengths.device) for x in (members.requests, members.tokens))
        own, table = lengths[requests], blocks[requests]
        groups.append(Group(tokens, session.plan(members.q, own, table)))
    return tuple(groups)


def answer(
    session: PagedSession, group: Group, layer: PagedLayer, pool: Pool, scale: float, query: Tensor, output: Tensor
) -> None:
    """query, output : (n, hq, d), of which those of the group are read and written."""
    s, q = session.sizes, group.plan.q
    b = len(group.plan.meta)
    shape = b, q, s.heads, s.group, s.d
    # of one query each the order is that of the kernels, and nothing moves
    x = query[group.tokens].reshape(shape).permute(0, 2, 3, 1, 4).contiguous()
    if x.data_ptr() % 4:
        x = x.clone()
    own = output[group.tokens] if isinstance(group.tokens, slice) else None
    if q == 1 and own is not None and own.is_contiguous():
        session.run(group.plan, layer, pool, x, scale, own.view(b, s.heads, s.group, 1, s.e))
        return
    out = torch.empty((*x.shape[:-1], s.e), dtype=x.dtype, device=x.device)
    session.run(group.plan, layer, pool, x, scale, out)
    output[group.tokens] = out.permute(0, 3, 1, 2, 4).reshape(b * q, s.heads * s.group, s.e)


def _sent(numbers: slice | list[int], device: torch.device) -> slice | Tensor:
    """int64 on the device, from pinned memory where it is a GPU."""
    if isinstance(numbers, slice):
        return numbers
    return torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda").to(device, non_blocking=True)
