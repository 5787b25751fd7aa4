"""The decode step of an index: in three launches where the backend keeps state on the device, in a CUDA graph, or compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from . import checks, ops
from ._storage import IndexStorage
from .backends import Rotation
from .backends.types import MAX_STEP_TOKENS, Routing
from .errors import StateError
from .invlists.segmented import SegmentedInvertedLists
from .routing.calibration import Calibration
from .search.params import SearchParametersIVF
from .search.select import search
from .search.selection import Selection
from .search.session import DecodeState
from .search.stats import IndexStats


class IndexDecode(IndexStorage):
    """The decoding half of `AsymmetricIndex`; see there."""

    __slots__ = ()

    def advance(self, n: int | Sequence[int] | None = None, *, seal: bool = True) -> None:
        """Take note of tokens that replays of a CUDA graph appended, and seal what is due (docs/gpu.md).

        n : tokens per sequence since the last call; None asks the device, and waits for it. May be called late, for what is
        not sealed yet is read in full, but before any other method. Not needed where `add` was called without a graph.
        seal : False only takes note; a later call, or `seal_ahead`, seals.

        Raises StateError for a backend without graphs, and if a replay found no room (what it brought is lost) or the device
        holds another number of tokens; NotFiniteError if a step brought NaN or infinity. The index can be used further.
        """
        state = self._decode_state()
        if state is None:
            raise StateError(f"advance: expected an index whose state lies on its device, got backend {self._backend.name!r}")
        if not seal and type(n) is int and n >= 0:  # after every replay, in every layer of a model
            return state.count(n)
        counts = None if n is None else checks.counts(n, state.lists.batch, 2**31 - 1, "n")
        problem = state.advance(counts)
        if not seal:
            if problem is not None:
                raise problem
            return
        with self._whole():
            if self._tower is not None:
                self._repartition(state.lists, state.lists.keys[:, :, :0], [0] * state.lists.batch)
            state.lists.seal(self._assign_rows, last=True)
        state.follow()
        if problem is not None:
            raise problem

    def seal_ahead(self, n: int = 1) -> None:
        """Seal what the next n tokens of every sequence make due, 1 <= n <= 8, before a replay brings them: it then reads what a
        step without a graph would read. They have to come next.

        Raises StateError for a backend without graphs, inside a capture, or if the device holds another number of tokens than the
        index; NotFiniteError if a step brought NaN or infinity.
        """
        state = self._decode_state()
        if state is None:
            raise StateError(f"seal_ahead: expected an index whose state lies on its device, got backend {self._backend.name!r}")
        checks.integer(n, "n", 1, MAX_STEP_TOKENS)
        if any(map(self._layout.num_blocks, (x + n for x in self.lengths))):
            with self._changing():
                state.lists.seal_ahead(n, self._assign_rows)

    def release_graphs(self) -> None:
        """Say that no CUDA graph captured over this index is replayed any more: its memory may move again, as `add` asks for."""
        state = self._decode_state()
        if state is not None:
            state.refuse_capture("release_graphs")
            state.release()

    def graph_key(self, params: SearchParametersIVF | None = None) -> tuple[Any, ...]:
        """What a graph of `add` and of `search_attend` with these parameters was made for, beside the shapes of their arguments.

        It may be replayed as long as `same_graph` says so.
        """
        lists = self._lists
        moved = None if lists is None else lists.moved
        return moved, self.scale, params, self._defaults, self._query_router, self._budget_shares, self._calibration

    def same_graph(self, key: tuple[Any, ...], params: SearchParametersIVF | None = None) -> bool:
        """Whether a graph with this `graph_key` still holds: numbers are the same by value, all else by identity."""
        now = self.graph_key(params)
        return all(x is y or (isinstance(x, int | float) and x == y) for x, y in zip(key, now, strict=True))

    # -- the device in step --------------------------------------------------------------------------------------------

    def _decode_state(self) -> DecodeState | None:
        """The device state of this batch, made on first use; None for a backend that keeps none, or without a batch."""
        lists = self._lists
        if not self._backend.keeps_state or lists is None:
            return None
        if lists.decode is not None:
            state: DecodeState = lists.decode
            return state
        resident = self._backend.resident(lists.batch, lists.heads, lists.d, lists.d_v, lists.nlist, lists.dtype)
        if resident is not None:
            lists.decode = DecodeState(resident, lists)
        return lists.decode

    def _capturing(self) -> DecodeState | None:
        """The device state while a graph is captured, else None."""
        state = self._decode_state()
        return state if state is not None and state.resident.capturing else None

    def _refuse_capture(self, what: str) -> None:
        """StateError while a graph is captured."""
        state = self._capturing()
        if state is not None:
            state.refuse_capture(what)

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Host and device agree before it, and after it where a graph may be replayed next."""
        state = self._decode_state()
        if state is not None:
            state.settle()
        yield
        self._follow()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around a change: `_in_step`, and whole or not at all."""
        with self._in_step(), self._whole():
            yield

    def _follow(self) -> None:
        state = self._decode_state()
        if state is not None and state.captured:
            state.follow()

    def reset(self) -> None:
        state = self._decode_state()
        if state is not None:
            state.forget()
        with self._whole():
            super().reset()
        self._follow()

    def truncate(self, n: int | Sequence[int]) -> None:
        with self._changing():
            super().truncate(n)

    def remove_ids(self, ids: Any, **options: Any) -> int:
        with self._changing():
            return super().remove_ids(ids, **options)

    def reorder(self, sequences: Sequence[int]) -> None:
        with self._changing():
            super().reorder(sequences)

    def fork(self, sequences: Sequence[int] | None = None) -> Self:
        with self._in_step():
            return super().fork(sequences)

    def to(self, device: torch.device | str) -> Self:
        with self._in_step():
            return super().to(device)

    def reserve_memory(self, n: int, batch: int | None = None) -> None:
        with self._changing():
            super().reserve_memory(n, batch)

    def reclaim_memory(self) -> int:
        with self._changing():
            return super().reclaim_memory()

    def stats(self) -> IndexStats:
        with self._in_step():
            state = self._decode_state()
            if state is not None:
                self._last = state.newest(self._last)
            return super().stats()

    def _relayout(self, **changes: int) -> None:
        with self._changing():
            super()._relayout(**changes)

    def _repartition(
        self, lists: SegmentedInvertedLists, keys: Tensor, counts: Sequence[int], rotated: Sequence[int] | None = None
    ) -> None:
        if lists.decode is not None and lists.decode.captured and not any(lists.segments):
            totals = [n + count for n, count in zip(lists.lengths, counts, strict=True)]
            if any(map(self._layout.num_blocks, totals)):
                raise StateError("tower: expected the lists that a CUDA graph routes to, got tokens that make new ones")
        super()._repartition(lists, keys, counts, rotated)

    # -- a step --------------------------------------------------------------------------------------------------------

    def _record_add(self, state: DecodeState, keys: Any, values: Any, plain: bool) -> None:
        """`add` inside a capture."""
        if not plain:
            raise StateError("capture: expected add of keys and values alone, got coarse_keys or lengths")
        if self.rope is not None and self.rope.is_dynamic:
            state.refuse_capture("a rope whose angles depend on the length")
        self._refuse_lists_to_come(state)
        shape = (state.lists.batch, self.num_kv_heads, None, self.d)
        keys = self._input(keys, "keys", "b h n d", shape, (self.dtype,))
        values = self._input(values, "values", "b h n e", (*keys.shape[:3], self.d_v), (self.dtype,))
        state.record_append(keys, values)

    def _fused(self, x: Tensor, params: SearchParametersIVF) -> tuple[Tensor, Tensor] | None:
        """Selection and attention in one go, for queries (b, h, g, q, d); None where the general way must be taken."""
        state = self._decode_state()
        if (params.window or 0) > self.window or (params.sinks or 0) > self.sinks:
            if state is not None:
                state.refuse_capture("a larger window or more sinks than the index has")
            return None
        if state is None:
            return self._in_one_call(x, params)
        self._refuse_lists_to_come(state)
        routing, given = self._routing(state, x.shape[3]), self._given(params)
        assert self._query_router is not None
        out, lse, self._last = state.step(x, params, self._query_router, routing, given, self.scale)
        return out, lse

    def _in_one_call(self, x: Tensor, params: SearchParametersIVF) -> tuple[Tensor, Tensor] | None:
        """`_fused` for a backend that keeps no state."""
        assert self._query_router is not None
        rotation = None if self.rope is None else self._query_rotation(x.shape[3])
        router = self._query_router, self._prepared_router
        found = search(self._backend, self.invlists, *router, x, rotation, params, *self._given(params), self.scale)
        if found is None:
            return None
        out, lse, self._last = found
        return out, lse

    def _refuse_lists_to_come(self, state: DecodeState) -> None:
        """A graph cannot follow a router that is yet to be made."""
        if self._tower is not None and not any(state.lists.segments):
            state.refuse_capture("a two-tower router before any token is sealed, which is when it makes its lists")

    def _resident_select(self, x: Tensor, params: SearchParametersIVF) -> Selection | None:
        """The selection that `_fused` attends to; None for a backend without state."""
        state = self._decode_state()
        if state is None:
            return None
        assert self._query_router is not None
        return state.select(x, params, self._query_router, self._routing(state, x.shape[3]), self._given(params))

    def _routing(self, state: DecodeState, q: int) -> Routing:
        """How queries of the last q tokens are routed."""
        router, rope = self._query_router, self.rope
        assert router is not None
        known = state.routing
        if known is None or known.router is not self._prepared_router:
            known = Routing(self._prepared_router, router.first_knot, router.count_lists)
            if rope is not None and not rope.is_dynamic:
                turn = rope.inv_freq().to(self.device), rope.interleaved, 1.0 / rope.attention_scale
                known = Routing(self._prepared_router, router.first_knot, router.count_lists, *turn)
            state.routing = known
        if rope is None or not rope.is_dynamic:
            return known
        state.refuse_capture("a rope whose angles depend on the length")
        return Routing(known.router, known.first_knot, known.count_lists, rotation=self._query_rotation(q))

    def _given(self, params: SearchParametersIVF) -> tuple[Any, Tensor | None]:
        """Shares and miss, see `select.select`."""
        return self._budget_shares, None if params.target_mass is None else self._allowed_miss(params.target_mass)

    def _allowed_miss(self, target: float) -> Tensor:
        """Attention per query that every KV head may leave unread, by the router's estimate: float32 (h,)."""
        assert self._query_router is not None
        self._query_router.check_outside("target_mass")
        known = self._miss
        if known is None or known[0] != target:
            table = Calibration.trusting(self.num_kv_heads) if self._calibration is None else self._calibration
            self._miss = known = (target, table.at(target).to(self.device))
        return known[1]

    def _query_rotation(self, q: int) -> Rotation:
        """Angles of the last q positions of every sequence, (b * q, r / 2)."""
        assert self.rope is not None
        lists = self.invlists
        ends = [lists.next_position(i) for i in range(lists.batch)]
        lengths: list[Any] = [None] * lists.batch
        if self.rope.is_dynamic:  # a query was rotated in the call that brought its token
            for i, n in enumerate(lists.lengths):
                each = lists.rotated.at(i, max(0, n - q), n) if n else np.zeros(1, np.int64)
                lengths[i] = int(each[0]) if (each == each[0]).all() else np.pad(each, (q - len(each), 0), mode="edge")
        turns = [(range(max(0, end - q), max(q, end)), length) for end, length in zip(ends, lengths, strict=True)]
        parts = [self.rope.rotation(*turn, device=self.device) for turn in turns]
        if len(parts) == 1:
            return parts[0]
        cos, sin = torch.cat([p.cos for p in parts]), torch.cat([p.sin for p in parts])
        return Rotation(cos, sin, parts[0].interleaved, parts[0].scale)

    # -- compiled ------------------------------------------------------------------------------------------------------

    def _traced_add(self, keys: Any, values: Any, plain: bool, seal: bool) -> None:
        """`add` as the compiler sees it."""
        if not plain:
            raise StateError("compile: expected add of keys and values alone, got coarse_keys or lengths")
        ops.add(self._token, keys, values, self._number, seal)

    def _traced_search(self, queries: Any, params: SearchParametersIVF | None, plain: bool, return_lse: bool) -> Any:
        """`search_attend` as the compiler sees it."""
        if not plain:
            raise StateError("compile: expected search_attend of queries alone, got coarse_queries")
        out, lse = ops.search_attend(self._token, queries, self._number, self.d_v, ops.pack(params))
        return (out, lse) if return_lse else out
