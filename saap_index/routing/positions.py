"""Positions of tokens, in whatever form a caller has them. Knows nothing of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import DTypeError

Positions: TypeAlias = "Tensor | np.ndarray[Any, Any] | range | Sequence[int]"

_CPU = torch.device("cpu")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_MEMO_TOKENS = 256  # the block an index seals at once; longer results are not kept, they would hold memory


def place(positions: Positions, device: torch.device | str | None) -> torch.device:
    """Where a result belongs: on ``device``, else where the positions are."""
    if device is not None:
        return torch.device(device)
    return positions.device if isinstance(positions, Tensor) else _CPU


def content(positions: Positions) -> tuple[int, ...] | range | None:
    """Few positions in host memory as a value to compare by; None for many, for an accelerator's and for invalid ones."""
    if isinstance(positions, range):
        return positions if len(positions) <= _MEMO_TOKENS else None
    if isinstance(positions, np.ndarray):
        if positions.ndim == 1 and positions.dtype.kind in "iu" and len(positions) <= _MEMO_TOKENS:
            return tuple(positions.tolist())
    elif isinstance(positions, Tensor):
        host = positions.device.type == "cpu" and positions.ndim == 1 and positions.numel() <= _MEMO_TOKENS
        if host and positions.dtype in _INTEGERS:
            return tuple(positions.tolist())
    return None


def count(positions: Positions) -> int | None:
    """How many there are, if they are a vector."""
    vector = getattr(positions, "ndim", 1) == 1 and hasattr(positions, "__len__")
    return len(positions) if vector else None


def integers(positions: Positions, device: torch.device) -> Tensor:
    """Positions as an integer tensor of any shape on ``device``."""
    if isinstance(positions, range):
        return (
            torch.arange(positions.start, positions.stop, positions.step, dtype=torch.int64, device=device)
            if positions
            else _none(device)
        )
    if isinstance(positions, list | tuple):
        positions = np.asarray(positions) if len(positions) else np.empty(0, np.int64)
    if isinstance(positions, np.ndarray) and positions.dtype.kind in "iu":
        return torch.tensor(positions.astype(np.int64), dtype=torch.int64, device=device)
    if isinstance(positions, Tensor) and positions.dtype in _INTEGERS:
        return positions.to(device)
    got = getattr(positions, "dtype", type(positions).__name__)
    raise DTypeError(f"positions: expected a tensor, array, sequence or range of integers, got {got}")


def _none(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=device)
