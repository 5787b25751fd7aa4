"""The specification of operations on pages: looks every token up where it lies, and calls `saap_index.reference`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import reference
from .paged import PagedBackend, PagedBatch, Pages
from .reference import _f64, _padded
from .types import Rotation


class PagedReference(PagedBackend):
    """See `PagedBackend` for the contract of every method."""

    def write(
        self, pages: Pages, keys: Tensor, values: Tensor, slots: Tensor, quantizer: Any, rotation: Rotation | None
    ) -> None:
        size = pages.keys.shape[2]
        lists = None if quantizer is None else self.backend.assign(quantizer, keys.transpose(0, 1), rotation)
        for i, slot in enumerate(slots.tolist()):
            if slot >= 0:
                page, place = divmod(slot, size)
                pages.keys[page, :, place], pages.values[page, :, place] = keys[i], values[i]
                if lists is not None:
                    pages.lists[page, :, place] = lists[:, i].to(torch.uint8)

    def count(self, pages: Pages, batch: PagedBatch, nlist: int) -> Tensor:
        b, most, h = len(batch.lengths), batch.bounds.shape[1] - 1, pages.keys.shape[1]
        tables = np.zeros((b, h, most, nlist + 1), np.int32)
        for i, s in enumerate(batch.num_segments):
            for head in range(h):
                nos = _lists(pages, batch, i, head)
                if s and nos[int(batch.bounds[i, 0]) : int(batch.bounds[i, s])].max(initial=0) >= nlist:
                    raise IndexError(f"pages: lists: a list number lies outside [0, {nlist})")
                tables[i, head, :s] = reference.count_runs(nos, _bounds(batch, i), nlist)
        return torch.from_numpy(tables)

    def find_biased(
        self, pages: Pages, batch: PagedBatch, tables: Tensor, numbers: Tensor | None, counts: Tensor | None,
        biases: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        b, h = len(batch.lengths), pages.keys.shape[1]
        found, raised = [], []
        for i, length in enumerate(batch.lengths):
            bounds = _bounds(batch, i)
            for head in range(h):
                chosen = np.arange(bounds[-1] - bounds[0], dtype=np.int64)
                if numbers is not None and counts is not None and batch.num_segments[i]:
                    chosen = numbers[i, head, : int(counts[i, head])].numpy().astype(np.int64)
                middle = reference.sorted_tokens(_lists(pages, batch, i, head), bounds)[chosen]
                order = np.argsort(middle)
                positions = np.concatenate([np.arange(bounds[0]), middle[order], np.arange(bounds[-1], length)])
                found.append(row_numbers(pages, batch.blocks[i], torch.from_numpy(positions)).numpy())
                if biases is not None:
                    own = np.zeros(len(positions), np.float32)
                    if batch.num_segments[i]:
                        own[bounds[0] :][: len(order)] = biases[i, head, : len(order)].numpy()[order]
                    raised.append(own)
        rows, taken = _padded(found, b, h)
        return rows, taken, None if biases is None else pad_sequence(list(map(torch.from_numpy, raised)), True).view(b, h, -1)

    def scan(
        self, pages: Pages, queries: Tensor, rows: Tensor, counts: Tensor, scale: float, causal: bool,
        biases: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        b, h, g, q, d = queries.shape
        out, lse = np.zeros((b, h, g, q, pages.values.shape[3])), np.full((b, h, g, q), -np.inf)
        for i in range(b):
            for head in range(h):
                n = int(counts[i, head])
                keys, values = (_f64(rows_of(x, pages.row, head, rows[i, head, :n])) for x in (pages.keys, pages.values))
                limit = n - q + 1 + np.arange(q) if causal else np.full(q, n)
                raised = None if biases is None else _f64(biases[i, head, :n])
                seen = np.tile(np.arange(n)[None] < limit[:, None], (g, 1))
                o, e = reference.attend(_f64(queries[i, head]).reshape(g * q, d), keys, values, scale, seen, biases=raised)
                out[i, head], lse[i, head] = o.reshape(g, q, -1), e.reshape(g, q)
        return torch.from_numpy(out).to(queries.dtype), torch.from_numpy(lse).float()


def row_numbers(pages: Pages, blocks: Tensor, positions: Tensor) -> Tensor:
    """Row numbers, int64, of the tokens at ``positions`` of a sequence whose pages are ``blocks``."""
    size, row = pages.keys.shape[2], pages.row
    page = blocks.long()[positions // size]
    return page * (pages.keys.stride(0) // row) + positions % size * (pages.keys.stride(2) // row)


def rows_of(x: Tensor, row: int, head: int, numbers: Tensor) -> Tensor:
    """Rows (t, d) of a head of x : (B, h, N, d) by their numbers (t,)."""
    blocks, _, tokens, d = x.shape
    last = (blocks - 1) * x.stride(0) + (tokens - 1) * x.stride(2)
    every = x.as_strided((last // row + 1, d), (row, 1), x.storage_offset() + head * x.stride(1))
    return every[numbers.long()]


def _bounds(batch: PagedBatch, i: int) -> reference.Ints:
    """Of the segments that count, or the end of the sequence twice."""
    s = batch.num_segments[i]
    if not s:
        return np.array([batch.lengths[i]] * 2, dtype=np.int64)
    found: reference.Ints = batch.bounds[i, : s + 1].numpy().astype(np.int64)
    return found


def _lists(pages: Pages, batch: PagedBatch, i: int, head: int) -> reference.Ints:
    """List numbers of all tokens of a sequence."""
    pieces = pages.lists[batch.blocks[i, : -(-batch.lengths[i] // pages.lists.shape[2])].long(), head]
    found: reference.Ints = pieces.reshape(-1)[: batch.lengths[i]].numpy().astype(np.int64)
    return found
