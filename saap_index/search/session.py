"""The decode step of one batch: plans once what searches may read, and runs append and search by the session of a backend.

The host decides segments, budgets and where memory lies, and publishes them when they change: when tokens are sealed, once in
some hundred steps. Lengths change with every token; a device counts them itself. In between, host and device agree unless a
CUDA graph was replayed, of which the host learns by `AsymmetricIndex.advance`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..backends import Backend, Placement, Plan, Routing
from ..backends.codes import FLAGS, MEANS, NEXT, SEGMENTS
from ..backends.types import MAX_STEP_TOKENS, Probed
from ..errors import CompatibilityError, StateError
from ..invlists.segmented import SegmentedInvertedLists
from ..routing.rotations import query_rotation
from ..routing.trained import TrainedLayer
from .params import SearchParametersIVF
from .plan import MOST_PLANS, Terms, budget_of, new_plan, terms_of
from .selection import Selection, dense_selection


class Step(NamedTuple):
    """What a search needs besides queries, as long as layer, router and parameters are these very objects."""

    layer: TrainedLayer
    prepared: Any
    params: SearchParametersIVF
    routing: Routing
    plan: Plan


class SearchSession:
    """What an index keeps of its batch from step to step. ``backend_session``: the half of it that runs; see `Session`."""

    def __init__(self, backend: Backend, lists: SegmentedInvertedLists) -> None:
        self.lists, self._captures = lists, backend.captures
        self.backend_session = backend.session(lists.batch, lists.heads, lists.d, lists.d_v, lists.nlist, lists.dtype)
        self._routing: dict[bool, Routing] = {}  # kept for the next step, of coarse queries and of others
        self._version = self._moved = 0  # of the lists, as published
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._step: Step | None = None  # the last one, for the next is nearly always the same
        self._sinks: list[int] = []
        self._sealed: list[int] = []
        self._recorded: Selection | None = None  # of the newest capture
        self._replayed = False  # since the last step outside a graph
        self._steady: tuple[Selection, list[int]] | None = None  # a selection, and the lengths at the newest step that it was of

    # -- what changed ------------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Publish what changed on the host since the last time; raises what the device had noted when that last was so.

        Cheap if nothing changed, and never waits for the device. StateError inside a capture, for it would be part of the graph.
        """
        lists, session = self.lists, self.backend_session
        if self._version == lists.version and session.lengths == lists.lengths:
            return
        self.refuse_capture("a change of the index since the last step outside a capture")
        problem = session.published_error()
        self._step = None
        if self._moved != lists.moved:  # sizes follow from the capacity, and graphs of before hold addresses of before
            self._plans.clear()
        batch = range(lists.batch)
        self._sinks, self._sealed = [lists.sinks(i) for i in batch], [lists.sealed(i) for i in batch]
        budgets = []
        for key, plan in list(self._plans.items()):
            try:
                budgets.append((plan, budget_of(plan, lists)))
            except CompatibilityError:  # for whoever asks for it again
                del self._plans[key]
        session.publish(self._placement(), budgets)
        self._version, self._moved = lists.version, lists.moved
        if problem is not None:
            raise problem

    def _placement(self) -> Placement:
        lists = self.lists
        meta = np.zeros((lists.batch, FLAGS), np.int32)
        centres = np.zeros((lists.batch, lists.tables.shape[2]), np.float64)
        for i, segments in enumerate(lists.segments):
            meta[i, : SEGMENTS + 1] = lists.lengths[i], self._sinks[i], self._sealed[i], len(segments)
            meta[i, NEXT : MEANS + 1] = lists.next_position(i), lists.num_means(i)
            centres[i, : len(segments)] = lists.centres(i)
        return Placement(lists.arena, meta, centres, lists.coded)

    def synchronize(self) -> None:
        """Before a change of the index: make sure that host and device agree, and raise what the device noted."""
        self.refuse_capture("an operation other than add and search_attend")
        problem = self.backend_session.synchronize()
        if problem is not None:
            raise problem

    def follow_stream(self) -> None:
        """Before a change that does not wait for the device: `publish`, and what comes is behind what was started before."""
        self.backend_session.wait_stream()
        self.publish()

    def changed(self, step_next: bool = False) -> None:
        """After a change of the index: a graph may be replayed next, and memory that is not the lists' any more is let go.

        step_next : a step comes next, which may be one to capture.
        """
        if self.backend_session.captured or (step_next and self._captures):
            self.publish()
        elif self._moved != self.lists.moved:
            self._step = None
            self._plans.clear()
            self.backend_session.release()

    def invalidate(self) -> None:
        """The tokens are about to go, and what the device noted about them with them."""
        self.refuse_capture("reset")
        self.backend_session.invalidate()

    def refuse_capture(self, what: str) -> None:
        """StateError while a graph is captured."""
        if self.backend_session.capturing:
            raise StateError(f"capture: expected steps that only launch kernels, got {what}")

    # -- appending ---------------------------------------------------------------------------------------------------

    def append(
        self, keys: Tensor, values: Tensor, counts: Sequence[int], list_nos: Tensor | None = None,
        rotated: Sequence[int] | None = None,
    ) -> None:
        """Write counts[i] tokens behind those of sequence i. list_nos, rotated : as in `SegmentedInvertedLists.advance`.

        Raises NotFiniteError, having changed nothing, if a key or value is NaN or infinite, unless the device notes it for later.
        """
        lists, session = self.lists, self.backend_session
        in_bulk = list_nos is not None or keys.shape[2] > MAX_STEP_TOKENS
        if in_bulk:
            self.synchronize()
        if not lists.has_room(counts):
            if session.captured:
                what = "a CUDA graph holds the addresses of this index; call reserve_memory and capture again"
                raise StateError(f"add: expected room, for {what}")
            lists.make_room(counts)
        if self._captures or lists.code is not None or self._moved != lists.moved:
            self.publish()
        else:  # memory is where it was, which is all that the host needs: the rest is for the next search
            session.lengths = lists.lengths
        session.append(keys, values, counts, in_bulk)
        lists.advance(counts, list_nos, rotated)
        if session.captured and session.lengths != lists.lengths:
            self.publish()

    def record_append(self, keys: Tensor, values: Tensor) -> None:
        """`append` inside a capture: nothing is appended now, and the host's lengths stay."""
        lists, n = self.lists, keys.shape[2]
        if not 0 < n <= MAX_STEP_TOKENS:
            raise StateError(f"capture: expected 1 to {MAX_STEP_TOKENS} tokens per sequence, got {n}")
        self.publish()
        tables = lists.layout.most_segments(lists.capacity)
        if max(lists.lengths) + n > lists.capacity or tables > lists.tables.shape[2]:
            raise StateError(
                f"capture: expected room to grow, got {lists.capacity} rows and {lists.tables.shape[2]} segments for "
                f"{max(lists.lengths)} tokens; call reserve_memory first"
            )
        self.backend_session.append(keys, values, [n] * lists.batch)

    def advance(self, counts: Sequence[int] | None) -> Exception | None:
        """Take note of tokens that replays appended, as many as the device says where None. Returns what it noted."""
        self.refuse_capture("advance")
        lists, session, problem = self.lists, self.backend_session, None
        session.wait_stream()
        if session.lengths is None:
            self.publish()
        lengths: list[int] = session.lengths or []
        if counts is None:
            now, problem = session.read_lengths()
            counts = [after - before for after, before in zip(now, lengths, strict=True)]
        elif max(map(sum, zip(lengths, counts, strict=True))) > lists.capacity:
            room = [lists.capacity - length for length in lengths]
            raise StateError(f"advance: expected at most {room} tokens, for which there was room, got {list(counts)}")
        if min(counts) < 0:
            raise StateError(f"advance: expected at least {lengths} tokens on the device, got {list(counts)} more")
        session.lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
        self._replayed = True
        lists.advance(counts)
        return problem

    def count(self, n: int) -> None:
        """`advance` by n tokens of every sequence, of which nothing is asked but that there was room."""
        lists, session = self.lists, self.backend_session
        lengths = [length + n for length in lists.lengths]
        if session.lengths != lists.lengths or max(lengths) > lists.capacity:
            self.advance([n] * lists.batch)
            return
        session.lengths, self._replayed = lengths, True
        lists.advance([n] * lists.batch)

    def release_graphs(self) -> None:
        """No graph is replayed any more."""
        self.refuse_capture("release_graphs")
        self.backend_session.release_graphs()

    # -- searching ---------------------------------------------------------------------------------------------------

    def run(
        self, queries: Tensor, layer: TrainedLayer, prepared: Any, params: SearchParametersIVF
    ) -> tuple[Tensor, Tensor, Selection]:
        """`search_attend` of queries (b, h, g, q, d), of the newest tokens: out, lse, and what was read.

        prepared : the layer's router as the backend keeps it. params : of this search, merged with those of the index.
        """
        self.publish()
        step, session = self._step, self.backend_session
        if step is None or step.layer is not layer or step.prepared is not prepared or step.params is not params:
            step = self._new_step(layer, prepared, params, queries.shape[3])
        out, lse, probed = session.run(queries, step.routing, step.plan, layer.scale)
        selection = self._selection(probed)
        self._replayed = False
        if session.capturing:
            self._recorded = selection
        return out, lse, selection

    def select(
        self, queries: Tensor, layer: TrainedLayer, prepared: Any, params: SearchParametersIVF, coarse: bool = False
    ) -> Selection:
        """What `run` would read, as the caller's own copy. coarse : queries come without RoPE."""
        self.publish()
        self.refuse_capture("select")
        plan = self._plan(terms_of(layer, params, queries.device))
        if plan.dense:
            return self._selection(None)
        routing = self._routing_of(layer, prepared, queries.shape[3], coarse)
        return self._selection(self.backend_session.select(queries, routing, plan))

    def select_each(self, queries: Tensor, layer: TrainedLayer, prepared: Any, params: SearchParametersIVF) -> Selection:
        """`select` for every one of queries (b, h, g, q, d) on its own, each as the newest token's: of b * q sequences, those of
        one side by side. Nothing enters through means.
        """
        self.publish()
        self.refuse_capture("select")
        plan, q, probed = self._plan(terms_of(layer, params, queries.device)), queries.shape[3], None
        if not plan.dense:
            probed = self.backend_session.select_each(queries, self._routing_of(layer, prepared, 1), plan)
        chosen = self._selection(probed)
        sinks, sealed, lengths = (
            [x for x in values for _ in range(q)] for values in (chosen.sinks, chosen.sealed, chosen.lengths)
        )
        return replace(chosen, sinks=sinks, sealed=sealed, lengths=lengths)

    def _new_step(self, layer: TrainedLayer, prepared: Any, params: SearchParametersIVF, q: int) -> Step:
        routing = self._routing_of(layer, prepared, q)
        step = Step(layer, prepared, params, routing, self._plan(terms_of(layer, params, self.lists.keys.device)))
        if layer.rope is None or not layer.rope.is_dynamic:  # whose angles are another step's in the next
            self._step = step
        return step

    def _routing_of(self, layer: TrainedLayer, prepared: Any, q: int, coarse: bool = False) -> Routing:
        """How queries of the last q tokens are routed, with RoPE undone or, coarse, as they come."""
        router, rope = layer.router, None if coarse else layer.rope
        if rope is not None and rope.is_dynamic:
            self.refuse_capture("a rope whose angles depend on the length")
            return Routing(prepared, router.first_knot, router.size_weighted, query_rotation(rope, self.lists, q))
        kept = self._routing.get(coarse)
        if kept is None or kept.router is not prepared:
            turn = None if rope is None else rope.frequencies(self.lists.keys.device)
            kept = self._routing[coarse] = Routing(prepared, router.first_knot, router.size_weighted, turn)
        return kept

    def is_published(self, version: int) -> bool:
        """Whether `publish` would find nothing to do, and the lists are those of that version."""
        lists = self.lists
        return version == self._version == lists.version and self.backend_session.lengths == lists.lengths

    def steady_append(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> Callable[[Tensor, Tensor], bool] | None:
        """See `Session.steady_append`; after an `append` of these."""
        return self.backend_session.steady_append(keys, values, counts)

    def steady_search(self, queries: Tensor) -> Callable[[Tensor], Tensor | None] | None:
        """See `Session.steady_search`; after a `run` of these."""
        step = self._step
        return None if step is None else self.backend_session.steady_search(queries, step.routing, step.plan, step.layer.scale)

    def note_steady(self, chosen: Selection) -> None:
        """A step was taken that chose as ``chosen`` says, at the lengths there are now."""
        self._steady, self._replayed = (chosen, self.lists.lengths), False

    def newest(self, last: Selection | None) -> Selection | None:
        """What the last search read: ``last``, or what steps like it or the replays since then did."""
        if self._steady is not None and last is self._steady[0]:
            last = replace(last, lengths=list(self._steady[1]))
        recorded = self._recorded
        if not self._replayed or recorded is None:
            return last
        if recorded.rows is None:
            return dense_selection(self.lists)
        lengths, version = list(self.lists.lengths), self.lists.version
        return replace(recorded, sinks=self._sinks, sealed=self._sealed, lengths=lengths, version=version)

    def _selection(self, probed: Probed | None) -> Selection:
        """A selection of the rows there are now; without anything probed all of them."""
        lists = self.lists
        if probed is None:
            return dense_selection(lists)
        spans, tail = (self._sinks, self._sealed, list(lists.lengths)), (probed.tail, probed.tail_counts)
        return Selection(probed.rows, probed.counts, *spans, *tail, lists.version, probed.in_runs, probed.biases)

    def _plan(self, terms: Terms) -> Plan:
        params, router, shares, unread_mass, sampling = terms
        # it holds what the ids stand for
        plan = self._plans.get((id(params), id(router), id(shares), id(unread_mass), id(sampling)))
        return self._new_plan(terms) if plan is None else plan

    def _new_plan(self, terms: Terms) -> Plan:
        session, plans = self.backend_session, self._plans
        for plan in list(plans.values()):
            if plan.key[0] == terms[0] and all(x is y for x, y in zip(plan.key[1:], terms[1:], strict=True)):
                return plan
        if session.capturing:
            raise StateError("capture: expected a step that ran once before, got one with other search parameters")
        plan, budget = new_plan(self.lists, *terms, for_good=self._captures)
        session.plan(plan, budget)
        while len(plans) >= MOST_PLANS and not all(plan.captured for plan in plans.values()):
            plans.pop(next(key for key, plan in plans.items() if not plan.captured))
        plans[tuple(map(id, terms))] = plan
        return plan
