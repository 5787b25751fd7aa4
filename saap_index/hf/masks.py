"""What an attention mask and position ids of transformers say of the tokens in a cache. Knows no index.

Both are the same objects for every layer of a forward call, so what was read from one is kept on it, and read once. It is kept
for that call, by its number: a caller may write the next step's positions into the same tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CompatibilityError

_NOTE, _CAUSAL = "_saap_read", "_saap_causal"  # attributes of the tensors themselves: they live as long as they do


@dataclass
class Seen:
    """The slots of a cache that hold tokens, as the newest query sees them.

    visible : bool (b, slots), False for padding; counts : tokens of each sequence; new_padding : whether the newest slots are
    not all tokens.
    """

    visible: Tensor
    counts: list[int]
    new_padding: bool
    _before: Tensor | None = None

    def check_follows(self, before: Tensor | None) -> None:
        """CompatibilityError unless tokens and padding of the last call, ``before`` : bool (b, n), are what they were."""
        if before is None or before is self._before:  # the layers of a model share what they saw
            return
        if not torch.equal(before, self.visible[:, : before.shape[1]]):
            raise CompatibilityError(
                "attention_mask: expected the mask of before and more, got one that hides or shows older tokens"
            )
        self._before = before


def read_mask(mask: Tensor | None, batch: int, q: int, slots: int, call: int) -> Seen | None:
    """Which of ``slots`` slots are tokens, by the mask that an attention layer was given; None: all of them.

    mask : bool (b, 1, q, slots), True where a query may look, as `sdpa_mask` makes it, or None for plain causal attention.
    call : its number, here and below, see `Call`. Raises CompatibilityError for a mask of another form.
    """
    if mask is None:
        return None
    note = getattr(mask, _NOTE, None)
    if note is None or note[0] != (batch, q, slots, call):
        if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, q, slots):
            raise CompatibilityError(
                f"attention_mask: expected a mask of tokens (b, n), which becomes bool (b, 1, {q}, {slots}), got {mask.dtype} "
                f"{tuple(mask.shape)}"
            )
        visible = mask[:, 0, -1].expand(batch, slots)
        counts = visible.sum(1).tolist()
        seen = None if min(counts) == slots else Seen(visible, counts, not bool(visible[:, -q:].all()))
        note = (batch, q, slots, call), seen
        setattr(mask, _NOTE, note)
    noted: Seen | None = note[1]
    return noted


def check_causal(mask: Tensor | None, call: int) -> None:
    """CompatibilityError unless the newest q tokens see each other causally, and everything before them alike."""
    if mask is None or mask.shape[2] == 1 or getattr(mask, _CAUSAL, 0) == call:
        return
    q, slots = mask.shape[2:]
    ages = torch.arange(slots, dtype=torch.int64, device=mask.device)[None] - (
        slots - q + torch.arange(q, dtype=torch.int64, device=mask.device)[:, None]
    )
    if not torch.equal(mask, mask[:, :, -1:] & (ages <= 0)):
        raise CompatibilityError("attention_mask: expected causal attention among the new tokens, got a mask of another pattern")
    setattr(mask, _CAUSAL, call)


@dataclass
class Positions:
    """Positions of the new slots of a call, as the model rotated them.

    numbers : int64 (b, n); newest : the largest of them; agreed : what they were last seen to agree with.
    """

    call: int
    numbers: np.ndarray
    newest: int
    agreed: Any = None


def read_positions(position_ids: Tensor | None, batch: int, call: int) -> Positions | None:
    """None if they were not told; CompatibilityError for positions of another form."""
    if position_ids is None or not position_ids.numel():
        return None
    note: Positions | None = getattr(position_ids, _NOTE, None)
    if note is None or note.call != call or len(note.numbers) != batch:
        if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch):
            raise CompatibilityError(f"position_ids: expected (b, n), got {tuple(position_ids.shape)}")
        numbers = position_ids.expand(batch, -1).cpu().numpy().copy()
        note = Positions(call, numbers, int(numbers.max()))
        setattr(position_ids, _NOTE, note)
    return note
