"""Which lists the rows of a batch belong to, for when they are sealed, and lists of a prompt's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..backends import Backend, Frequencies
from ..invlists.segmented import SegmentedInvertedLists
from .quantizer import KeyQuantizer
from .rope import Rope
from .rotations import row_rotation
from .router import QueryRouter
from .two_tower import TwoTower, prompt_keys


class AssignRows:
    """`invlists.runs.Assign` of a quantizer, as a backend prepared it, and a rope or None.

    by_length : whether the rope's angles depend on the length of the sequence.
    """

    __slots__ = ("_backend", "_lists", "_quantizer", "_rope", "from_keys")

    def __init__(
        self, backend: Backend, lists: SegmentedInvertedLists, quantizer: Any, rope: Rope | None, by_length: bool
    ) -> None:
        self._backend, self._lists, self._quantizer, self._rope = backend, lists, quantizer, rope
        self.from_keys = quantizer is not None and not by_length

    def __call__(self, i: int, start: int, stop: int) -> Tensor:
        rotation = None if self._rope is None else row_rotation(self._rope, self._lists, i, start, stop)
        return self._backend.assign(self._quantizer, self._lists.key_rows(i, start, stop), rotation)

    def by_position(self) -> tuple[Any, Frequencies | None] | None:
        rope = self._rope
        if rope is None:
            return self._quantizer, None
        return None if rope.is_dynamic else (self._quantizer, rope.frequencies(self._lists.keys.device))


def prompt_lists(
    backend: Backend, tower: TwoTower, lists: SegmentedInvertedLists, keys: Tensor, counts: Sequence[int],
    rotated: Sequence[int] | None, rope: Rope | None,
) -> tuple[KeyQuantizer, QueryRouter]:
    """Lists of these very sequences and the router for them; arguments as of `two_tower.prompt_keys`."""

    def assign(quantizer: KeyQuantizer, keys: Tensor) -> Tensor:
        return backend.assign(backend.prepare_quantizer(*quantizer.products()), keys, None)

    x = prompt_keys(lists, keys, counts, rotated, rope)
    return tower.for_prompt(x, lists.nlist, assign if x.is_cpu else None)
