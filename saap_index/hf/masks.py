"""What an attention mask and position ids of transformers say of the tokens in a cache. Knows no index.

Both are the same objects for every layer of a forward call, so what was read from one is kept on it, and read once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CompatibilityError

_NOTE, _NEWEST = "_saap_read", "_saap_newest"  # attributes of the tensors themselves: they live as long as they do


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


def read_mask(mask: Tensor | None, batch: int, q: int, slots: int) -> Seen | None:
    """Which of ``slots`` slots are tokens, by the mask that an attention layer was given; None: all of them.

    mask : bool (b, 1, q, slots), True where a query may look, as `sdpa_mask` makes it, or None for plain causal attention.
    Raises CompatibilityError for a mask of another form.
    """
    if mask is None:
        return None
    note = getattr(mask, _NOTE, None)
    if note is None or note[0] != (batch, q, slots):
        if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, q, slots):
            raise CompatibilityError(
                f"attention_mask: expected a mask of tokens (b, n), which becomes bool (b, 1, {q}, {slots}), got {mask.dtype} "
                f"{tuple(mask.shape)}"
            )
        visible = mask[:, 0, -1].expand(batch, slots)
        counts = visible.sum(1).tolist()
        seen = None if min(counts) == slots else Seen(visible, counts, not bool(visible[:, -q:].all()))
        note = (batch, q, slots), seen
        setattr(mask, _NOTE, note)
    noted: Seen | None = note[1]
    return noted


def check_causal(mask: Tensor | None) -> None:
    """CompatibilityError unless the newest q tokens see each other causally, and everything before them alike."""
    if mask is None or mask.shape[2] == 1 or getattr(mask, "_saap_causal", False):
        return
    q, slots = mask.shape[2:]
    ages = torch.arange(slots, dtype=torch.int64, device=mask.device)[None] - (
        slots - q + torch.arange(q, dtype=torch.int64, device=mask.device)[:, None]
    )
    if not torch.equal(mask, mask[:, :, -1:] & (ages <= 0)):
        raise CompatibilityError("attention_mask: expected causal attention among the new tokens, got a mask of another pattern")
    mask._saap_causal = True  # type: ignore[attr-defined]


def newest_position(position_ids: Tensor | None) -> int | None:
    """The largest position of a call, whatever the sequence; None if it was not told."""
    if position_ids is None or not position_ids.numel():
        return None
    note: int | None = getattr(position_ids, _NEWEST, None)
    if note is None:
        note = int(position_ids.max())
        setattr(position_ids, _NEWEST, note)
    return note


def last_positions(position_ids: Tensor | None, batch: int) -> list[int] | None:
    """Position of the newest token of every sequence, as the model rotated it; None if it was not told."""
    if position_ids is None:
        return None
    note: list[int] | None = getattr(position_ids, _NOTE, None)
    if note is None or len(note) != batch:
        if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch):
            raise CompatibilityError(f"position_ids: expected (b, n), got {tuple(position_ids.shape)}")
        note = position_ids[:, -1].expand(batch).tolist()
        setattr(position_ids, _NOTE, note)
    return note
