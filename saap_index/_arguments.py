"""What the methods of an index are given: checked, and brought to the one form that the rest works with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks
from .errors import ShapeError
from .invlists.layout import MAX_QUERY_TOKENS
from .invlists.segmented import SegmentedInvertedLists


@dataclass(frozen=True)
class Form:
    """How an argument came, and so how results go back: as NumPy arrays, as (n, d)."""

    numpy: bool
    flat: bool

    def output(self, x: Tensor) -> Any:
        x = x[0, 0] if self.flat else x
        return x.cpu().numpy() if self.numpy else x


_PLAIN = Form(False, False)


class IndexArguments:
    """The checks of `AsymmetricIndex`; see there."""

    __slots__ = ("_accepted", "_accepted_new")

    # of the index
    d: int
    nlist: int
    num_heads: int
    num_kv_heads: int
    device: torch.device
    _lists: SegmentedInvertedLists | None
    _accepted: tuple[Any, ...]
    _accepted_new: tuple[Any, ...]

    def _input(self, value: Any, name: str, axes: str, shape: Sequence[int | None], dtypes: Sequence[torch.dtype]) -> Tensor:
        """A checked tensor of 4 axes; (n, d) becomes (1, 1, n, d)."""
        x = checks.tensor(value, name)
        if x.ndim == 2:
            x = x[None, None]
        checks.array(x, name, axes, shape, dtypes, self.device)
        return x

    def _queries(self, queries: Any, any_number: bool = False) -> tuple[Tensor, Form]:
        """Checked queries by KV head, (b, h, g, q, d), and the form of the results."""
        batch = self._lists.batch if self._lists is not None else None
        if isinstance(queries, list | tuple):
            queries = checks.tensor(queries, "queries").numpy()
        plain = isinstance(queries, Tensor) and queries.ndim == 4
        kind: tuple[Any, ...] = ()
        if plain:
            kind = queries.shape, queries.stride(), queries.dtype, queries.device, batch, any_number
        if plain and kind == self._accepted:  # a decode step is like the last: checking it again costs as much as choosing lists
            x, form = queries.detach(), _PLAIN
        else:
            form = _PLAIN if plain else Form(isinstance(queries, np.ndarray), getattr(queries, "ndim", 4) == 2)
            x = self._input(queries, "queries", "b hq q d", (batch, self.num_heads, None, self.d), checks.STORAGE_DTYPES)
        b, hq, q, d = x.shape
        if not any_number and not 1 <= q <= MAX_QUERY_TOKENS:
            raise ShapeError(f"queries: expected 1 to {MAX_QUERY_TOKENS} queries per sequence, got {q}")
        self._accepted = kind
        return x.reshape(b, self.num_kv_heads, hq // self.num_kv_heads, q, d).contiguous(), form

    def _list_nos(self, list_nos: Any, axes: str, shape: Sequence[int | None], least: int) -> Tensor:
        """Checked list numbers, int32 (b, h, ...); a vector becomes (1, 1, n)."""
        nos = checks.tensor(list_nos, "list_nos")
        nos = nos[None, None] if nos.ndim == 1 else nos
        if nos.ndim:  # rows of a strided view are fine here: they are small, and read once
            nos = nos.contiguous()
        checks.array(nos, "list_nos", axes, shape, [torch.int32, torch.int64], self.device)
        checks.list_numbers(nos, "list_nos", self.nlist, least)
        return nos.int()
