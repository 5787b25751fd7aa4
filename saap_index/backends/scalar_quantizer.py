"""Scalar quantizers for stored keys and values: what a code is, and how plain torch makes and reads one. Knows rows, not arenas.

`reference.encode` and `reference.decode` specify them. A code is made from its row alone, bit for bit the same on every backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import reference

SCALE_BYTES = 4

_NUMBERS = torch.tensor([*reference.LEVELS, *-reference.LEVELS], dtype=torch.float64, device="cpu")
_BETWEEN = torch.from_numpy((reference.LEVELS[:-1] + reference.LEVELS[1:]) / 2)


@dataclass(frozen=True)
class StorageCode:
    """How sealed tokens are stored. name : as FAISS names them, keys before values; key_bits, value_bits : 8 or 4."""

    name: str
    key_bits: int
    value_bits: int

    def sizes(self, d: int, d_v: int) -> tuple[int, int]:
        """Bytes of the code of a key and of a value (FAISS's ``code_size``)."""
        return d * self.key_bits // 8 + SCALE_BYTES, d_v * self.value_bits // 8 + SCALE_BYTES


STORAGE_CODES = {code.name: code for code in (StorageCode("SQ8", 8, 8), StorageCode("SQ8/SQ4", 8, 4))}


@dataclass(frozen=True)
class Coded:
    """The rows of a batch that are stored as codes, beside an arena that holds the others.

    keys : uint8 (b, h, N, c), values : uint8 (b, h, N, c_v), as `encode` makes them. Rows [first[i], last[i]) of sequence i are
    here, under the same number; in the arena the rows before them keep their number, and those behind them follow at once: row
    r >= last[i] lies at r - (last[i] - first[i]). Everything sealed is among the coded rows.
    """

    code: StorageCode
    keys: Tensor
    values: Tensor
    first: Sequence[int]
    last: Sequence[int]

    def plain_rows(self, lengths: Sequence[int]) -> list[int]:
        """How many rows of sequences of these lengths lie in the arena."""
        return [n - (high - low) for n, low, high in zip(lengths, self.first, self.last, strict=True)]


def encode(x: Tensor, bits: int) -> Tensor:
    """Codes of rows x : float32, bfloat16 or float16 (..., dim), finite: uint8 (..., code size)."""
    if bits == 8:
        x = x.float()
        scale = x.abs().amax(-1) / torch.tensor(127.0, dtype=torch.float32, device=x.device)
        there = (scale > 0)[..., None]
        numbers = (x / torch.where(there, scale[..., None], 1.0)).round()
        payload = torch.where(there, numbers, 0.0).clamp(-127, 127).to(torch.int8).view(torch.uint8)
    else:
        dim = x.shape[-1]
        rotated = rotate(x.double()).float().double()
        unit = (_pairwise_sum(rotated.square()) / dim).sqrt() / reference.GAUSS
        parts = rotated / torch.where(unit > 0, unit, 1.0)[..., None]
        number = torch.searchsorted(_BETWEEN.to(x.device), parts.abs().contiguous(), right=False) + 8 * (parts < 0)
        levels = _NUMBERS.to(x.device)[number]
        scale = (_pairwise_sum(rotated * levels) / _pairwise_sum(levels.square())).float()
        low, high = (torch.from_numpy(i).to(x.device) for i in reference.nibbles(dim))
        payload = (number[..., low] | number[..., high] << 4).to(torch.uint8)
    return torch.cat([payload, scale[..., None].contiguous().view(torch.uint8)], -1)


def decode(codes: Tensor, dim: int, bits: int) -> Tensor:
    """Rows that codes : uint8 (..., code size) stand for: float32 (..., dim)."""
    scale = codes[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    payload = codes[..., :-SCALE_BYTES]
    if bits == 8:
        return payload.view(torch.int8).float() * scale
    low, high = (torch.from_numpy(i).to(codes.device) for i in reference.nibbles(dim))
    number = torch.empty((*codes.shape[:-1], dim), dtype=torch.int64, device=codes.device)
    number[..., low], number[..., high] = (payload & 15).long(), (payload >> 4).long()
    return rotate(_NUMBERS.to(codes.device, torch.float32)[number] * scale, back=True)


def rows_at(arena: Tensor, index: Tensor, coded: Coded | None, i: int, side: str) -> Tensor:
    """Rows index : int64 (h, t) of sequence i: float32 (h, t, dim). arena : (h, N, dim); side : "key" or "value"."""
    h, t = index.shape
    dim = arena.shape[-1]
    if coded is None:
        return arena.gather(1, index[:, :, None].expand(h, t, dim)).float()
    low, high = coded.first[i], coded.last[i]
    codes, bits = (coded.keys, coded.code.key_bits) if side == "key" else (coded.values, coded.code.value_bits)
    within = (index >= low) & (index < high)
    in_arena = torch.where(within, 0, torch.where(index < low, index, index - (high - low)))
    rows = arena.new_zeros((h, t, dim), dtype=torch.float32)
    if arena.shape[1]:
        rows = arena.gather(1, in_arena[:, :, None].expand(h, t, dim)).float()
    if high > low:
        at = torch.where(within, index, low)[:, :, None].expand(h, t, codes.shape[-1])
        rows = torch.where(within[:, :, None], decode(codes[i].gather(1, at), dim, bits), rows)
    return rows


def rotate(x: Tensor, back: bool = False) -> Tensor:
    """`reference.rotate` of rows x : float32 or float64 (..., dim), in that dtype."""
    dim = x.shape[-1]
    hashes = (np.arange(1, dim + 1, dtype=np.uint64) * 0x9E3779B1) >> 31 & 1
    signs = torch.from_numpy(np.where(hashes, -1.0, 1.0)).to(x)
    y = x.clone() if back else x * signs
    for start, size in reference.blocks(dim):
        part = y[..., start : start + size]
        half = 1
        while half < size:
            pairs = part.reshape(*part.shape[:-1], size // (2 * half), 2, half)
            a, b = pairs.unbind(-2)
            part = torch.stack([a + b, a - b], -2).reshape(part.shape)
            half *= 2
        y[..., start : start + size] = part * (1 / math.sqrt(size))
    largest = torch.finfo(torch.float32).max
    return y * signs if back else y.clamp(-largest, largest)


def _pairwise_sum(x: Tensor) -> Tensor:
    """`reference.pairwise_sum` over the last axis."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, size - x.shape[-1]))
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x[..., 0]
