"""One layer of a cache of transformers whose keys and values live in an index: its attention. Knows tokens and masks, no model.

transformers calls `update` with the keys and values of new tokens, then the attention function, which hands over to `attend`.
Tokens are appended in `update` in arrival order, so that a prompt or a chunk of one attends densely to the rows as they lie;
they are sealed once that is done. Where the tokens before it lie does not matter to a softmax over all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..errors import StateError
from ..invlists.layout import MAX_QUERY_TOKENS
from .masks import Seen, check_causal, read_mask
from .slots import SlotLayer


class IndexedLayer(SlotLayer):
    """Keys, values and index of one layer, for the `Cache` of transformers.

    plan : what the index is made of; max_sparse_tokens : how many new tokens are attended to as decoding does; room_tokens :
    slots to make room for at once.

    Attributes to read: index : None before the first token; slots : tokens and padding per sequence; ragged : whether padding
    was taken out; visible : bool (b, slots), the slots that are tokens, or None for all.
    """

    def attend(
        self, module: Any, query: Tensor, mask: Tensor | None, scaling: float | None, position_ids: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Attention of the tokens that `update` brought last: query (b, hq, q, d) -> (b, q, hq, e).

        A few tokens behind a sealed context are searched for; anything else is dense, by transformers' own SDPA.
        """
        assert self.index is not None and self._new is not None
        (keys, values), self._new = self._new, None
        b, q = query.shape[0], query.shape[2]
        self._seq_len = self._length_of_rotation(position_ids)
        if not self.ragged:
            self._note_rotation(q, self._seq_len)
        self.index.scale = query.shape[3] ** -0.5 if scaling is None else scaling
        seen = read_mask(mask, b, q, self.slots, self.call.number)
        if self.sample is not None and q > self.max_sparse_tokens:
            self.sample = self.sample.with_call(query, self.slots - q, None if seen is None else seen.visible)
        if self.ragged or seen is not None:
            return self._attend_padded(module, query, keys, values, mask, seen, position_ids, kwargs)
        if q > self.max_sparse_tokens or query.is_cpu:  # reading one position of an accelerator costs a step much
            self._check_positions([self.slots] * b, position_ids)
        if self._seals(self.slots) and 0 < q <= self.max_sparse_tokens and q < self.slots:
            check_causal(mask, self.call.number)
            if q <= MAX_QUERY_TOKENS:
                self._seal()
                return self._search(query)
            self.index.truncate(self.slots - q)
            return self._search_in_pieces(query, keys, values)
        out = self._dense(module, query, *self._rows(), mask, **kwargs)
        self._seal()
        return out

    def _attend_padded(
        self, module: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, seen: Seen | None,
        position_ids: Tensor | None, kwargs: dict[str, Any],
    ) -> Tensor:
        """`attend` for sequences of different lengths."""
        assert self.index is not None
        q = query.shape[2]
        if seen is None:
            raise StateError("attention_mask: expected the mask of the whole batch, whose padding was seen before, got none")
        seen.check_follows(self.visible)
        self.visible = seen.visible
        few = q <= self.max_sparse_tokens and q < self.slots and not seen.new_padding
        if not self.ragged:
            seals = self._seals(max(seen.counts))
            if not (seals and few):  # the mask hides the padding
                out = self._dense(module, query, *self._rows(), mask, **kwargs)
                if seals:
                    self._take_padding_out(seen, position_ids)
                else:
                    self._counts_slots(seen, position_ids)
                    self._hold()
                return out
            self._take_padding_out(seen, position_ids)
            if q <= MAX_QUERY_TOKENS:
                check_causal(mask, self.call.number)
                return self._search(query)
            self.index.truncate([n - q for n in self.index.lengths])
        if few:
            check_causal(mask, self.call.number)
            if query.is_cpu:
                self._check_positions([n + q for n in self._ends()], position_ids)
            return self._search_in_pieces(query, keys, values)
        out = self._dense_ragged(module, query, keys, values, seen, kwargs)
        self._check_positions(self._ends(), position_ids)
        self.index.seal()
        return out

    def _ends(self) -> list[int]:
        """Position past the newest token of every sequence."""
        assert self.index is not None
        return [self.index.invlists.next_position(i) for i in range(self.index.invlists.batch)]

    def _search(self, query: Tensor) -> Tensor:
        assert self.index is not None
        audit = self.plan.audit
        if audit is not None and audit.due(self.plan.number, self, self.slots):
            out: Tensor = audit.search(self.plan.number, self, self.index, query, self.params, self.slots)
        else:
            out = self.index.search_attend(query, params=self.params)
        return out.transpose(1, 2).contiguous()

    def _search_in_pieces(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Append the tokens that `query` belongs to, a few at a time, each searching what was there and those before it."""
        assert self.index is not None
        parts = []
        for start in range(0, query.shape[2], MAX_QUERY_TOKENS):
            piece = slice(start, start + MAX_QUERY_TOKENS)
            self.index.add(keys[:, :, piece], values[:, :, piece], seq_len=self._seq_len)
            parts.append(self._search(query[:, :, piece]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _dense(self, module: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        assert self.index is not None
        out: Tensor = sdpa_attention_forward(module, query, keys, values, mask, scaling=self.index.scale, **kwargs)[0]
        return out

    def _dense_ragged(
        self, module: Any, query: Tensor, keys: Tensor, values: Tensor, seen: Seen, kwargs: dict[str, Any]
    ) -> Tensor:
        """Append a chunk of which each sequence has its own share, and attend to all that is there, one sequence at a time."""
        assert self.index is not None
        b, hq, q, _ = query.shape
        fresh = seen.visible[:, -q:]
        order = (~fresh).int().argsort(dim=1, stable=True)[:, None, :, None]  # tokens first, padding behind them
        counts = fresh.sum(1).tolist()
        packed = [x.gather(2, order.expand_as(x)) for x in (keys, values)]
        self.index.add(*packed, lengths=counts, seal=False, seq_len=self._seq_len)
        lists = self.index.invlists
        out = query.new_zeros((b, q, hq, values.shape[-1]))
        for i, (count, length) in enumerate(zip(counts, lists.lengths, strict=True)):
            if count:
                one = slice(i, i + 1)
                places = fresh[i].nonzero()[:, 0]
                causal = torch.ones((1, 1, count, length), dtype=torch.bool, device=query.device).tril(length - count)
                rows = lists.all_rows(one, length)
                out[i, places] = self._dense(module, query[one, :, places], *rows, causal, **kwargs)[0]
        return out
