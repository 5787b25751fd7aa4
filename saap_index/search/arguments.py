"""Argument checking and conversion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..errors import LengthError, ShapeError
from ..invlists.layout import MAX_QUERY_TOKENS
from ..invlists.segmented import SegmentedInvertedLists
from .options import IndexOptions


@dataclass(frozen=True)
class ArrayForm:
    """How an argument came, and so how results go back: as NumPy arrays, as (n, d)."""

    numpy: bool
    flat: bool

    def output(self, x: Tensor) -> Any:
        x = x[0, 0] if self.flat else x
        return x.cpu().numpy() if self.numpy else x

    def attention(self, out: Tensor, lse: Tensor, return_lse: bool, error: Tensor | None = None) -> Any:
        """Results of queries by KV head, out (b, h, g, q, e), lse and error (b, h, g, q), by query head; out alone, or with the
        others that are asked for."""
        by_head = self.output(out.flatten(1, 2))
        if not return_lse and error is None:
            return by_head
        others = (x for x in (lse if return_lse else None, error) if x is not None)
        return (by_head, *(self.output(x.flatten(1, 2)) for x in others))


_PLAIN = ArrayForm(False, False)


class Arguments:
    """The checks of one index.

    options : read for shapes and dtype, which do not change. device : of the index.
    """

    __slots__ = ("_accepted", "_accepted_new", "device", "options")

    def __init__(self, options: IndexOptions, device: torch.device) -> None:
        self.options, self.device = options, device
        self._accepted: tuple[Any, ...] = ()  # what the last queries that passed the checks were
        self._accepted_new: tuple[Any, ...] = ()  # and the last keys and values

    def tensor(self, value: Any, name: str, axes: str, shape: Sequence[int | None], dtypes: Sequence[torch.dtype]) -> Tensor:
        """A checked tensor of 4 axes; (n, d) becomes (1, 1, n, d)."""
        x = checks.tensor(value, name)
        if x.ndim == 2:
            x = x[None, None]
        checks.array(x, name, axes, shape, dtypes, self.device)
        return x

    def queries(
        self, queries: Any, lists: SegmentedInvertedLists | None, any_number: bool = False
    ) -> tuple[Tensor, ArrayForm]:
        """Checked queries by KV head, (b, h, g, q, d), and the form of the results. lists : of the batch; None for one of any
        size."""
        batch = None if lists is None else lists.batch
        if isinstance(queries, list | tuple):
            queries = checks.tensor(queries, "queries").numpy()
        plain = isinstance(queries, Tensor) and queries.ndim == 4
        options = self.options
        kind: tuple[Any, ...] = ()
        if plain:
            kind = queries.shape, queries.stride(), queries.dtype, queries.device, batch, any_number
        if plain and kind == self._accepted:  # a decode step is like the last: checking it again costs as much as choosing lists
            x, form = queries.detach() if queries.requires_grad else queries, _PLAIN
        else:
            form = _PLAIN if plain else ArrayForm(isinstance(queries, np.ndarray), getattr(queries, "ndim", 4) == 2)
            x = self.tensor(queries, "queries", "b hq q d", (batch, options.num_heads, None, options.d), checks.STORAGE_DTYPES)
        b, hq, q, d = x.shape
        if not any_number and not 1 <= q <= MAX_QUERY_TOKENS:
            raise ShapeError(f"queries: expected 1 to {MAX_QUERY_TOKENS} queries per sequence, got {q}")
        self._accepted = kind
        h = options.num_kv_heads
        return x.reshape(b, h, hq // h, q, d).contiguous(), form

    def coarse_queries(self, queries: Any, lists: SegmentedInvertedLists, shape: Sequence[int]) -> Tensor:
        """Checked queries to route in place of others, of their shape (b, h, g, q, d)."""
        coarse, _ = self.queries(queries, lists)
        if coarse.shape != shape:
            raise ShapeError(f"coarse_queries: expected {shape[3]} queries per sequence, got {coarse.shape[3]}")
        return coarse

    def tokens(
        self, keys: Any, values: Any, lengths: Sequence[int] | None, stored: Sequence[int]
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Checked keys (b, h, n, d) and values (b, h, n, e) to add, and how many of each sequence.

        stored : tokens of each sequence that are there; with none in any, the batch may become another.
        """
        batch = len(stored) if any(stored) else None
        kind: tuple[Any, ...] = ()
        if batch and lengths is None and isinstance(keys, Tensor) and isinstance(values, Tensor):
            kind = batch, *((x.shape, x.stride(), x.dtype, x.device) for x in (keys, values))
            if kind == self._accepted_new and max(stored) + keys.shape[2] < 2**31:  # a decode step is like the last
                return keys.detach(), values.detach(), [keys.shape[2]] * batch
        plain = kind if kind and keys.ndim == 4 == values.ndim else ()
        keys, values = self.step_tokens(keys, values, batch)
        b, _, n, _ = keys.shape
        counts = [n] * b if lengths is None else checks.counts(lengths, b, n)
        if batch and max(stored) + max(counts) >= 2**31:
            raise LengthError(f"add: expected fewer than 2**31 tokens per sequence, got {max(stored) + max(counts)}")
        self._accepted_new = plain
        return keys, values, counts

    def step_tokens(self, keys: Any, values: Any, batch: int | None) -> tuple[Tensor, Tensor]:
        """Checked keys (b, h, n, d) and values (b, h, n, e) of the storage dtype."""
        o = self.options
        keys = self.tensor(keys, "keys", "b h n d", (batch, o.num_kv_heads, None, o.d), (o.dtype,))
        b, h, n, _ = keys.shape
        if not b:
            raise ShapeError("keys: expected at least one sequence, got none")
        return keys, self.tensor(values, "values", "b h n e", (b, h, n, o.d_v), (o.dtype,))

    def coarse_keys(self, keys: Any, shape: Sequence[int]) -> Tensor:
        """Checked keys to assign in place of others, of their shape (b, h, n, d)."""
        coarse = self.tensor(keys, "coarse_keys", "b h n d", tuple(shape), checks.STORAGE_DTYPES)
        checks.finite(coarse, "coarse_keys")
        return coarse

    def list_nos(self, list_nos: Any, axes: str, shape: Sequence[int | None], least: int) -> Tensor:
        """Checked list numbers, int32 (b, h, ...); a vector becomes (1, 1, n)."""
        nos = checks.tensor(list_nos, "list_nos")
        nos = nos[None, None] if nos.ndim == 1 else nos
        if nos.ndim:  # rows of a strided view are fine here: they are small, and read once
            nos = nos.contiguous()
        checks.array(nos, "list_nos", axes, shape, [torch.int32, torch.int64], self.device)
        checks.list_numbers(nos, "list_nos", self.options.nlist, least)
        return nos.int()

    def sequences(self, keys: Any, queries: Any, positions: Any) -> list[tuple[Tensor, Any, Any]]:
        """Of whole sequences each: checked keys (h, n, d), queries (hq, q, d) and positions (q,); None without queries."""
        o = self.options
        keys = self.tensor(keys, "keys", "b h n d", (None, o.num_kv_heads, None, o.d), checks.STORAGE_DTYPES)
        checks.finite(keys, "keys")
        if queries is None:
            return [(x, None, None) for x in keys]
        queries = self.tensor(queries, "queries", "b hq q d", (keys.shape[0], o.num_heads, None, o.d), checks.STORAGE_DTYPES)
        checks.finite(queries, "queries")
        return list(zip(keys, queries, checks.positions(positions, keys.shape[0], queries.shape[2], keys.shape[2]), strict=True))

    def with_values(self, sequences: list[tuple[Tensor, Any, Any]], values: Any) -> list[tuple[Tensor, Any, Any, Tensor]]:
        """These `sequences`, each with its checked values (h, n, e)."""
        shape = (len(sequences), self.options.num_kv_heads, sequences[0][0].shape[1], self.options.d_v)
        each = self.tensor(values, "values", "b h n e", shape, checks.STORAGE_DTYPES)
        return [(*x, v) for x, v in zip(sequences, each, strict=True)]
