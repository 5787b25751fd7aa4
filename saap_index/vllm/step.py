"""What a step of the engine asks for, as the layers answer it: queries in groups that one search serves. Knows no vLLM.

Axes: r requests of the step, b sequences of a group, q query tokens of each, n tokens of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import Budget, Rotation
from ..backends.paged import PagedBackend, PagedBatch
from ..invlists.layout import MAX_QUERY_TOKENS
from ..invlists.octaves import bounds_of
from ..routing.rope import Rope
from .layers import ServedModel


@dataclass(frozen=True)
class Prefill:
    """Tokens [first, last) of the step are the last ones of a sequence of ``length`` tokens in pages ``blocks`` : int64 (m,)."""

    first: int
    last: int
    length: int
    blocks: Tensor


@dataclass(frozen=True)
class Group:
    """Sequences of q query tokens each.

    tokens : where these are in the step, a slice where they lie side by side, else int64 (b * q,); sealed : tokens that are
    chosen among, of each sequence, 0 where all are read.
    """

    q: int
    tokens: slice | Tensor
    batch: PagedBatch
    sealed: tuple[int, ...]
    backend: PagedBackend = field(repr=False)
    model: ServedModel = field(repr=False)

    @cached_property
    def sparse(self) -> int:
        """Sequences that are not read whole."""
        return sum(1 for n in self.sealed if n)

    @cached_property
    def whole_tokens(self) -> int:
        """Of the sequences that are."""
        return sum(n for n, chosen in zip(self.batch.lengths, self.sealed, strict=True) if not chosen)

    @cached_property
    def partial_tokens(self) -> int:
        """Of those that are not."""
        return sum(self.batch.lengths) - self.whole_tokens

    @cached_property
    def selecting(self) -> Any:
        """The batch as prepared for layers with routers."""
        return self.backend.prepare_batch(self.batch)

    @cached_property
    def whole(self) -> Any:
        """The batch as prepared for layers without."""
        none = self.batch.bounds.new_zeros((len(self.sealed), 1))
        return self.backend.prepare_batch(PagedBatch(self.batch.blocks, self.batch.lengths, none, [0] * len(self.sealed)))

    @cached_property
    def budgets(self) -> tuple[Budget, ...]:
        """Of each served layer."""
        rows, layers = self.model.budgets(self.sealed), sorted(self.model.layers.values(), key=lambda x: x.place)
        samples = self.model.samples(rows, self.sealed)
        return tuple(
            Budget(x, unread_mass=layer.unread_mass, sample=y) for x, y, layer in zip(rows.unbind(), samples, layers, strict=True)
        )


@dataclass(frozen=True)
class Step:
    """A step. positions : integers (n,), of its tokens."""

    positions: Tensor
    groups: tuple[Group, ...]
    prefills: tuple[Prefill, ...]
    _angles: dict[Any, Rotation] = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    def rotation(self, rope: Rope | None, group: Group | None = None) -> Rotation | None:
        """Angles of the positions of a group's queries, or of all tokens: the same for all layers of that RoPE."""
        if rope is None:
            return None
        key = id(rope), None if group is None else id(group)
        if key not in self._angles:
            places = self.positions if group is None else self.positions[group.tokens]
            self._angles[key] = rope.rotation(places.long())
        return self._angles[key]


def plan_step(
    model: ServedModel, backend: PagedBackend, starts: Sequence[int], lengths: Sequence[int], prefilling: Sequence[bool],
    blocks: Tensor, positions: Tensor,
) -> Step:
    """Cut a step into groups and prefills.

    starts : first token of each request, and the end, r + 1 numbers; lengths : tokens of each sequence, the step's included;
    prefilling : whether they are part of a prompt, which is read whole; blocks : int32 (r, M); positions : integers (n,).

    A request of up to 8 tokens goes into a group, a longer one is a prefill. Requests without tokens are left out.
    """
    of_size: dict[int, list[int]] = {}
    prefills = []
    for i, length in enumerate(lengths):
        q = starts[i + 1] - starts[i]
        if 0 < q <= MAX_QUERY_TOKENS and length >= q:
            of_size.setdefault(q, []).append(i)
        elif q > 0 and length >= q:
            prefills.append(Prefill(starts[i], starts[i + 1], length, blocks[i].long()))
    groups = []
    for q, members in of_size.items():
        own = [lengths[i] for i in members]
        chosen = [
            0 if prefilling[i] or lengths[i] < model.options.break_even or model.options.reads_all else lengths[i]
            for i in members
        ]
        bounds, used = bounds_of(chosen, model.sinks, model.window)
        sealed = tuple(int(row[s] - row[0]) if s else 0 for row, s in zip(bounds, used, strict=True))
        first = [starts[i] for i in members]
        tokens: slice | Tensor = slice(first[0], first[0] + q * len(members))
        if first != list(range(first[0], first[0] + q * len(members), q)):
            tokens = torch.from_numpy((np.array(first)[:, None] + np.arange(q)).reshape(-1))
        table = blocks[members[0] : members[-1] + 1] if len(members) == members[-1] - members[0] + 1 else blocks[members]
        batch = PagedBatch(table.contiguous(), own, torch.from_numpy(bounds), used)
        groups.append(Group(q, tokens, batch, sealed, backend, model))
    return Step(positions, tuple(groups), tuple(prefills))
