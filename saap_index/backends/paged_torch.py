"""Operations on pages on plain torch, on any device it knows: right first, fast second."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..precision import full_precision
from .paged import PagedBackend, PagedBatch, Pages
from .paged_reference import row_numbers
from .types import Rotation


class PagedTorch(PagedBackend):
    """See `PagedBackend` for the contract of every method."""

    def write(
        self, pages: Pages, keys: Tensor, values: Tensor, slots: Tensor, quantizer: Any, rotation: Rotation | None
    ) -> None:
        size = pages.keys.shape[2]
        held = slots >= 0
        page, place = slots[held] // size, slots[held] % size
        pages.keys[page, :, place], pages.values[page, :, place] = keys[held], values[held]
        if quantizer is not None:
            lists = self.backend.assign(quantizer, keys.transpose(0, 1), rotation)
            pages.lists[page, :, place] = lists.T[held].to(torch.uint8)

    def count(self, pages: Pages, batch: PagedBatch, nlist: int) -> Tensor:
        b, most, h = len(batch.lengths), batch.bounds.shape[1] - 1, pages.keys.shape[1]
        device = pages.lists.device
        tables = torch.zeros((b, h, most, nlist + 1), dtype=torch.int32, device=device)
        for i, bounds in enumerate(batch.bounds.tolist()):
            nos, from_ = _lists(pages, batch, i), torch.zeros(h, dtype=torch.int64, device=device)
            for s in range(batch.num_segments[i]):
                part = nos[:, bounds[s] : bounds[s + 1]]
                if part.numel() and int(part.max()) >= nlist:
                    raise IndexError(f"pages: lists: a list number lies outside [0, {nlist})")
                sizes = torch.zeros((h, nlist), dtype=torch.int64, device=device)
                sizes.scatter_add_(1, part, torch.ones_like(part))
                ends = from_[:, None] + sizes.cumsum(1)
                tables[i, :, s, 0], tables[i, :, s, 1:] = from_.int(), ends.int()
                from_ = ends[:, -1]
        return tables

    def find_biased(
        self, pages: Pages, batch: PagedBatch, tables: Tensor, numbers: Tensor | None, counts: Tensor | None,
        biases: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        b, h, device = len(batch.lengths), pages.keys.shape[1], pages.lists.device
        found, raised = [], []
        for i, bounds in enumerate(batch.bounds.tolist()):
            length, s = batch.lengths[i], batch.num_segments[i]
            low, high = (bounds[0], bounds[s]) if s else (length, length)
            before, behind = (torch.arange(*x, dtype=torch.int64, device=device) for x in ((0, low), (high, length)))
            nos = _lists(pages, batch, i)[:, low:high]
            places = torch.arange(low, high, dtype=torch.int64, device=device)
            ends = torch.tensor(bounds[1 : s + 1], dtype=torch.int64, device=device)
            order = (torch.searchsorted(ends, places, right=True) * 256 + nos).argsort(dim=1, stable=True) + low
            for head in range(h):
                middle = places
                if numbers is not None and counts is not None and s:
                    middle = order[head, numbers[i, head, : int(counts[i, head])].long()]
                found.append(row_numbers(pages, batch.blocks[i].to(device), torch.cat([before, middle, behind])))
                if biases is not None:
                    own = biases.new_zeros(len(found[-1]))
                    if s:
                        own[low : low + len(middle)] = biases[i, head, : len(middle)]
                    raised.append(own)
        taken = torch.tensor([len(x) for x in found], dtype=torch.int32, device=device).view(b, h)
        rows = pad_sequence(found, batch_first=True, padding_value=-1).int().view(b, h, -1)
        return rows, taken, None if biases is None else pad_sequence(raised, batch_first=True).view(b, h, -1)

    @full_precision
    def scan(
        self, pages: Pages, queries: Tensor, rows: Tensor, counts: Tensor, scale: float, causal: bool,
        biases: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        b, h, g, q, _ = queries.shape
        t = rows.shape[2]
        place = torch.arange(t, dtype=torch.int64, device=rows.device)
        back = q - 1 - torch.arange(q, dtype=torch.int64, device=rows.device) if causal else place.new_zeros(q)
        seen = place < (counts[:, :, None] - back)[..., None]  # (b, h, q, t)
        keys, values = (_gather(x, pages.row, rows).float() for x in (pages.keys, pages.values))
        logits = torch.einsum("bhgqd,bhtd->bhgqt", queries.float(), keys) * scale
        if biases is not None:
            logits = logits + biases[:, :, None, None]
        logits = logits.masked_fill(~seen[:, :, None], float("-inf"))
        lse = torch.logsumexp(logits, -1) if t else logits.new_full((b, h, g, q), float("-inf"))
        weights = torch.exp(logits - lse.nan_to_num(neginf=0.0)[..., None])
        values = values.masked_fill(~(place < counts[..., None])[..., None], 0.0)  # what is padded may be anything
        return torch.einsum("bhgqt,bhte->bhgqe", weights, values).to(queries.dtype), lse


def _gather(x: Tensor, row: int, numbers: Tensor) -> Tensor:
    """Rows (b, h, t, d) of x : (B, h, N, d) by their numbers (b, h, t); a number below 0 stands for any row."""
    h, d = x.shape[1], x.shape[3]
    last = (x.shape[0] - 1) * x.stride(0) + (x.shape[2] - 1) * x.stride(2)
    parts = []
    for head in range(h):
        every = x.as_strided((last // row + 1, d), (row, 1), x.storage_offset() + head * x.stride(1))
        parts.append(every[numbers[:, head].long().clamp(min=0)])
    return torch.stack(parts, 1)


def _lists(pages: Pages, batch: PagedBatch, i: int) -> Tensor:
    """List numbers of all tokens of a sequence, int64 (h, n)."""
    size, length = pages.lists.shape[2], batch.lengths[i]
    pieces = pages.lists[batch.blocks[i, : -(-length // size)].long().to(pages.lists.device)]
    return pieces.transpose(0, 1).reshape(pieces.shape[1], -1)[:, :length].long()
