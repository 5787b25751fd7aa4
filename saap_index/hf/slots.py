"""The slots of one cache layer, and the index that their keys and values lie in. Knows tokens and padding, not attention.

transformers counts slots: tokens and padding, alike for all sequences. While a batch with padding is short enough to stay
dense, the index holds its padding too, and the mask hides it, as in any other cache. Before anything is sealed the padding is
taken out; from then on the sequences have different lengths (``ragged``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin
from typing_extensions import Self

from ..errors import CompatibilityError, StateError
from ..index import AsymmetricIndex
from ..invlists.layout import NEVER
from ..search.params import SearchParametersIVF
from ..search.stats import SearchStats
from . import traced
from .calls import Call
from .layer_plan import LayerPlan
from .masks import Seen, read_positions
from .rotation import length_of_rotation

LAYER = "saap_layer"
"""Attribute of the keys that `update` returns: by it the attention function finds the layer."""

SPREAD_TOKENS = 128
"""Tokens over which the layers of a model move to larger memory."""

ROOM_TOKENS = 256  # a prompt is given room for so many tokens more, or an eighth of its length


class SlotLayer(CacheLayerMixin):
    """The half of `IndexedLayer` that a `Cache` calls; see there."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, plan: LayerPlan, max_sparse_tokens: int, room_tokens: int = 0) -> None:
        super().__init__()
        self.plan, self.max_sparse_tokens, self.room_tokens = plan, max_sparse_tokens, room_tokens
        self.index: AsymmetricIndex | None = None
        self.name = traced.name_of(self)
        self.slots = 0
        self.ragged = False
        self.visible: Tensor | None = None
        self.by_slot: bool | None = None  # whether positions count padding too; None before there was any
        self.sample = plan.sample  # of the queries of a prompt, for routers to be trained on; None: not of this one
        self.params: SearchParametersIVF | None = None  # in place of the index's own
        self.call = Call()  # shared by the layers of a cache
        self.rotary: Any = None  # what made the angles, asked for the length they belong to
        self._new: tuple[Tensor, Tensor] | None = None  # what `update` brought and `attend` has not seen
        self._seq_len: int | None = None  # the length by which the tokens of this call were rotated, where it matters
        self._due = False  # whether the index has tokens to seal
        self._break_even = plan.break_even(1)  # of the batch, as soon as there is one

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        b, h, _, d = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.index = self.plan.new_index(h, d, value_states.shape[-1], self.dtype, self.device)
        self._break_even = self.plan.break_even(b)
        if self.index.break_even != self._break_even:
            self.index.break_even = self._break_even
        if self.room_tokens:
            self.index.reserve_memory(self.room_tokens, batch=b)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens: keys (b, h, q, d), after RoPE, and values (b, h, q, e). Returns those of all slots, views of the index;
        in an index of codes tensors of that shape, as `attend` asks for rows where it needs them, and no step is to decode all.

        Raises StateError if the attention function "saap" has not seen what came before, or if gradients are asked for. A call
        that fails, here or later, leaves all layers of the cache as they were.
        """
        if torch.compiler.is_compiling():
            return traced.update(self, key_states, value_states)
        self.call.begin(self, self._undo())
        try:
            return self._update(key_states, value_states)
        except BaseException:
            self.call.fail()
            raise

    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if self._new is not None:
            raise StateError(
                f"layer {self.plan.number}: expected the attention function 'saap', which searches this cache, got another; load "
                "the model with attn_implementation='saap', or attach to it"
            )
        if key_states.requires_grad or value_states.requires_grad:
            raise StateError("SaapCache: expected no gradients, which do not pass an index; call the model under torch.no_grad()")
        key_states, value_states = self._one_dtype(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._new = key_states, value_states
        self.slots += key_states.shape[2]
        if not self.ragged:
            self._append(key_states, value_states)
            key_states, value_states = self._shown()
        setattr(key_states, LAYER, self)
        return key_states, value_states

    def _one_dtype(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Under autocast keys leave RoPE in float32, and values come in the dtype attention casts all to: keys get it too."""
        kind = keys.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            keys, values = keys.to(dtype), values.to(dtype)
        if keys.dtype != values.dtype:
            raise CompatibilityError(
                f"layer {self.plan.number}: expected keys and values of one dtype, got {keys.dtype} and {values.dtype}"
            )
        if self.index is not None and keys.dtype != self.index.dtype:
            raise CompatibilityError(
                f"layer {self.plan.number}: expected {self.index.dtype}, as this cache holds, got {keys.dtype}; call it under "
                "the autocast under which it was filled, or none"
            )
        return keys, values

    def _undo(self) -> Callable[[], None]:
        """What makes this layer what it is now, after tokens were appended, padding was taken out, and any part of both."""
        before, index = dict(self.__dict__), self.index
        lengths, break_even = ([], 0) if index is None else (index.lengths, index.break_even)

        def undo() -> None:
            ragged, visible = self.ragged, self.visible
            self.__dict__.update(before)
            if index is None or not sum(lengths):
                if index is not None:
                    index.reset()
                    index.break_even = self._break_even
                return
            keep = lengths
            if ragged and not self.ragged:  # the padding of before is gone for good, and no query is to see it
                assert visible is not None
                self.ragged, self.visible = True, visible[:, : self.slots]
                keep = self.visible.sum(1).tolist()
                index.break_even = self._break_even
            elif index.break_even != break_even:
                index.break_even = break_even
            index.truncate([min(n, have) for n, have in zip(keep, index.lengths, strict=True)])

        return undo

    def adopt(self, keys: Tensor, values: Tensor) -> None:
        """Take over the slots of a layer of another cache; the mask of the next call tells which of them are padding."""
        if keys.requires_grad or values.requires_grad:
            raise StateError("cache: expected no gradients, which do not pass an index; call the model under torch.no_grad()")
        self.lazy_initialization(keys, values)
        self.slots = keys.shape[2]
        self._append(keys, values)
        self._note_rotation(self.slots, self._length_of_rotation(None))

    def last_search(self) -> SearchStats | None:
        """What the last step read; None before the first one that searched."""
        stats = None if self.index is None else self.index.stats().last_search
        return stats if stats is not None and stats.dense_tokens else None

    def get_seq_length(self) -> int:
        return self.slots

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Slots that attention will see, and the first of them. query_length : an int; positions, in older transformers."""
        q = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.slots + q, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """What `get_max_length` was called before."""
        return -1

    def reset(self) -> None:
        self.call.finish()
        if self.index is not None:
            self.index.reset()
            self.index.break_even = self._break_even
        self.slots, self.ragged, self.visible, self.by_slot, self._new = 0, False, None, None, None
        self.sample = self.plan.sample

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget that many of the newest slots, a number below zero; one above zero is the number to keep, as it once was.

        transformers 5.14 to 5.17 bring it as a tensor.
        """
        self.call.finish()
        tokens_to_remove = int(tokens_to_remove)
        remove = self.slots - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        remove = max(0, min(remove, self.slots))
        if not remove or self.index is None:
            return
        if remove == self.slots:  # what comes next may be padded, and counted, in another way
            self.reset()
            return
        lengths = self.index.lengths
        if self.ragged:
            assert self.visible is not None
            gone = self.visible[:, self.slots - remove :].sum(1).tolist()
            self.index.truncate([n - g for n, g in zip(lengths, gone, strict=True)])
        else:
            self.index.truncate(self.slots - remove)
        self.slots -= remove
        self.sample = None
        if self.visible is not None:
            self.visible = self.visible[:, : self.slots]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.call.finish()
        if self.index is not None:
            self.index.reorder(beam_idx.tolist())
            self._pick(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.index is not None:
            self.batch_select_indices(
                torch.arange(len(self.index.lengths), dtype=torch.int64, device="cpu").repeat_interleave(repeats)
            )

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.index is not None and self.index.lengths:
            self.call.finish()
            chosen = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
            self.index = self.index.fork(chosen.tolist())
            self._pick(chosen)

    def _pick(self, sequences: Tensor) -> None:
        self.sample = None if self.sample is None else self.sample.picked(sequences.tolist())
        if self.visible is not None:
            self.visible = self.visible[sequences.to(self.visible.device)]

    def offload(self) -> None:
        raise CompatibilityError("SaapCache: expected a cache that stays where it is, got offloading=True")

    def __deepcopy__(self, memo: Any) -> Self:
        """A copy with tokens of its own and the same plan: what users of transformers do to ask a prompt twice."""
        new = type(self)(self.plan, self.max_sparse_tokens, self.room_tokens)
        new.__dict__.update({name: value for name, value in self.__dict__.items() if name != "name"})
        new.index = None if self.index is None else self.index.fork()
        new.call = copy.deepcopy(self.call, memo)
        return new

    def renew(self, plan: LayerPlan) -> None:
        """Go on with routers that were trained since; what is in lists stays there. Nothing, if it has them."""
        if plan is self.plan:
            return
        index = self.index
        if index is not None:
            if plan.trained is not self.plan.trained:
                index.load_trained(replace(plan.trained, key_quantizer=None, query_router=None))
                index.budget_shares = plan.trained.budget_shares
            self._break_even = plan.break_even(max(1, len(index.lengths)))
            held = self.visible is not None and not self.ragged
            if not held and index.break_even != self._break_even:
                index.break_even = self._break_even
        self.plan = plan

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _seals(self, length: int) -> bool:
        """Whether a sequence of that many tokens has some in lists."""
        assert self.index is not None
        layout = self.index.layout
        if layout.break_even == NEVER:
            return length >= self._break_even and length - layout.sinks - layout.recent >= layout.block
        return layout.num_blocks(length) > 0

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Append at the end in arrival order, with room for some more where the arena has to grow."""
        assert self.index is not None
        n = keys.shape[2]
        if self.slots == n and self.room_tokens < n + ROOM_TOKENS:
            self.index.reserve_memory(n + max(ROOM_TOKENS, n // 8), batch=keys.shape[0])
        elif keys.is_cpu:
            self._grow()
        self.index.add(keys, values, seal=False)
        self._due = self._due or self.index.invlists.due()

    def _grow(self) -> None:
        """Make room before there is none, each layer at another token: that copies what it holds."""
        assert self.index is not None
        capacity = self.index.invlists.capacity
        if self.slots + self.plan.number % SPREAD_TOKENS >= capacity:
            self.index.reserve_memory(max(self.slots + ROOM_TOKENS, capacity + capacity // 2))

    def _length_of_rotation(self, position_ids: Tensor | None) -> int | None:
        """The length that the angles of the newest tokens belong to; None if they depend on none."""
        rope = self.plan.trained.rope
        if rope is None or not rope.is_dynamic:
            return None
        assert self.index is not None
        positions = read_positions(position_ids, len(self.index.lengths), self.call.number)
        newest = self.slots - 1 if positions is None else positions.newest
        return length_of_rotation(rope, self.rotary, self.plan.layer_type, newest)

    def _note_rotation(self, n: int, length: int | None) -> None:
        """The n newest tokens in the index, not sealed yet, were rotated at this length."""
        assert self.index is not None
        if length is not None:
            self.index.note_rotation(n, length)

    def _shown(self) -> tuple[Tensor, Tensor]:
        """`_rows`, of which transformers and the attention function look at the shape; NaN in place of what codes stand for."""
        assert self.index is not None
        lists = self.index.invlists
        if lists.code is None:
            return self._rows()
        nan = torch.full((1, 1, 1, 1), torch.nan, dtype=lists.dtype, device=lists.keys.device)
        shape = lists.batch, lists.heads, self.slots
        return nan.expand(*shape, lists.d), nan.expand(*shape, lists.d_v)

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Keys (b, h, slots, d) and values (b, h, slots, e): views of the arena, or what its codes stand for."""
        assert self.index is not None
        return self.index.invlists.all_rows(slice(None), self.slots)

    def _seal(self) -> None:
        """Bring what `_append` left behind to its lists, if it is time for some."""
        assert self.index is not None
        if self._due:
            self.index.seal()
            self._due = False

    def _hold(self) -> None:
        """Seal nothing: there is padding among the rows."""
        assert self.index is not None
        if self.index.break_even != NEVER:
            self.index.break_even = NEVER

    def _take_padding_out(self, seen: Seen, position_ids: Tensor | None) -> None:
        """Leave nothing but tokens, and seal what their number asks for."""
        assert self.index is not None
        self._hold()
        by_slot = self._counts_slots(seen, position_ids)
        hidden = ~seen.visible.cpu().numpy()
        self.index.remove_ids([np.flatnonzero(row) for row in hidden], close_gaps=not by_slot)
        self.ragged = True
        self.index.break_even = self._break_even

    def _counts_slots(self, seen: Seen, position_ids: Tensor | None) -> bool:
        """Whether positions count slots, as where a model is called with a mask alone, and not tokens, as `generate` has them.

        CompatibilityError if they do neither, or if those of the calls before did the other.
        """
        positions = read_positions(position_ids, len(seen.counts), self.call.number)
        if positions is None:
            return bool(self.by_slot)
        n = positions.numbers.shape[1]
        padded = [i for i, count in enumerate(seen.counts) if count < self.slots]
        fresh, votes = seen.visible[:, -n:].cpu().numpy(), set()
        for i in padded:  # padding before a token tells, not that behind it
            for at in np.flatnonzero(fresh[i])[-1:]:
                place = self.slots - n + int(at)
                if place != seen.counts[i] - 1:
                    votes.add(bool(positions.numbers[i, at] == place))
        by_slot = votes == {True}
        if not votes:
            behind = self.slots > 2 and bool((positions.numbers[padded, -1] >= self.slots - 1).all())  # 0, 1 or a slot
            by_slot = behind if self.by_slot is None else self.by_slot
        if self.by_slot not in (None, by_slot):
            kinds = {True: "slots", False: "tokens"}
            raise CompatibilityError(
                f"position_ids: expected them to count {kinds[not by_slot]}, as in the calls before, got {kinds[by_slot]}"
            )
        self._check_positions([self.slots] * len(seen.counts) if by_slot else seen.counts, position_ids, by_slot)
        if votes:
            self.by_slot = by_slot
        return by_slot

    def _check_positions(self, ends: list[int], position_ids: Tensor | None, by_slot: bool = False) -> None:
        """CompatibilityError unless the new tokens of every sequence were rotated by their places, the last ``ends`` less one:
        routing undoes RoPE by that. by_slot : padding among them counts too."""
        positions = read_positions(position_ids, len(ends), self.call.number)
        if positions is None or positions.checked == (ends, by_slot):
            return
        n = positions.numbers.shape[1]
        fresh = np.ones((len(ends), n), dtype=np.bool_) if self.visible is None else self.visible[:, -n:].cpu().numpy()
        for i, (end, row, tokens) in enumerate(zip(ends, positions.numbers, fresh, strict=True)):
            want = np.arange(end - n, end) if by_slot else end - tokens[::-1].cumsum()[::-1]
            wrong = np.flatnonzero(tokens & (row != want))
            if len(wrong):
                at = int(wrong[-1])
                newest = at == np.flatnonzero(tokens)[-1]
                which = "the newest token" if newest else f"new token {at} of {n}"
                hint = ""
                if newest and self.visible is None and 0 < row[at] + 1 <= end - n:
                    # generate reads a prompt once more, behind itself, where the cache leaves nothing of it to read
                    length = int(row[at]) + 1
                    hint = (
                        f"; if the cache holds the prompt of {length} tokens already, generate needs one of them to read: call "
                        f"cache.crop({length - 1}) first, or bring what comes after it"
                    )
                raise CompatibilityError(
                    f"position_ids: expected {which} of sequence {i} at {want[at]}, counting its tokens or its slots from 0, got "
                    f"{row[at]}{hint}"
                )
        positions.checked = ends, by_slot
