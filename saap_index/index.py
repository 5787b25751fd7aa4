"""`AsymmetricIndex`: an IVF index over attention keys, with one map for keys and another for queries.

The only stateful public class. It checks arguments, turns parameters into numbers, and calls its parts in one direction:
quantizer and router (maps), inverted lists (storage), search (selection and softmax), and through them a backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from . import checks, interop, ops
from .backends import get_backend
from .backends.types import MAX_STEP_TOKENS
from .errors import LengthError, NotTrainedError, ParameterError, ShapeError, StateError
from .invlists.layout import Layout
from .invlists.segmented import SegmentedInvertedLists
from .routing.assign import AssignRows
from .routing.calibration import CONFIDENCE, Calibration, calibrate
from .routing.quantizer import KeyQuantizer
from .routing.rope import Rope
from .routing.router import QueryRouter
from .routing.trained import TrainedLayer
from .routing.two_tower import TwoTower, prompt_keys
from .search.arguments import Arguments, Form
from .search.options import IndexOptions
from .search.params import SELECTIVITY, SearchParametersIVF
from .search.plan import unread_mass_for
from .search.select import attend, best_of, extend_to_window, select_lists, side_by_side
from .search.selection import Selection, read_ids
from .search.session import SearchSession, Terms
from .search.stats import IndexStats, gather
from .training.config import TrainingConfig
from .training.layer import train_layer
from .whole import signals_wait

_STATE = "_last", "_lists", "_options", "_prepared_quantizer", "_prepared_router", "_session", "_trained"
"""What a change may set."""


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _between_steps(method: _Method) -> _Method:
    """Host and device agree before the method, and after it where a graph may be replayed next."""

    @functools.wraps(method)
    def wrapped(self: AsymmetricIndex, *args: Any, **options: Any) -> Any:
        with self._in_step():
            return method(self, *args, **options)

    return wrapped  # type: ignore[return-value]


def _change(method: _Method) -> _Method:
    """As `_between_steps`; and what the method changes, changes whole or not at all."""

    @functools.wraps(method)
    def wrapped(self: AsymmetricIndex, *args: Any, **options: Any) -> Any:
        with self._changing():
            return method(self, *args, **options)

    return wrapped  # type: ignore[return-value]


class AsymmetricIndex:
    """IVF index over the keys and values of one attention layer; searching it is attention.

    "Asymmetric" as in SAAP (arXiv 2502.08246): keys are assigned to inverted lists by k-means (`key_quantizer`), queries by a
    classifier trained to predict where their attention mass lies (`query_router`). Both are trained once per layer and shared;
    the index itself holds one batch of sequences.

    Axes: b sequences, hq query heads, h KV heads, n tokens, q queries, d key dim, e value dim, l lists. Arrays are torch
    tensors on ``device``, or NumPy arrays (results are then NumPy arrays too); (n, d) stands for (1, 1, n, d). The last axis
    must be contiguous; the others may be strided.

    Parameters
    ----------
    d : key and query dim, a multiple of 8 up to 256.
    nlist : inverted lists per KV head.
    num_heads, num_kv_heads : query heads and KV heads; query head i uses KV head i // (num_heads / num_kv_heads).
    d_v : value dim, default d.
    dtype : of stored keys and values: float32, bfloat16 or float16.
    device : where K and V live.
    rope : the model's rotary embedding. Keys and queries come rotated; the index undoes it to route. None: no rotation.
    selectivity, nprobe, target_mass, max_codes : default budget, see `SearchParametersIVF`; 5 % of the sealed tokens if none is
        given. With ``target_mass`` selectivity is the cap, 25 % if not given.
    budget_shares : float (h,), what a selectivity below 1 is multiplied with for each KV head (as many tokens as are sealed at
        most), so that a model's budget may be spread unevenly over layers and heads. The cap of ``target_mass`` is one for all.
    mean_run_tokens, tail : keep the mean key and value of the runs of segments whose average run has that many tokens (0: none),
        and spend that share of the budget on means of runs that are not read, in place of rows.
    window, sinks : tokens at the end and the start that are always read.
    scale : of the logits, default d ** -0.5.
    break_even : sequences shorter than this are not sealed, and attention over them is dense.
    seal_tokens, max_segment : see `Layout`.
    backend : by name, see `saap_index.backends`; default the one for the device.

    Raises ParameterError for a value outside its range, CompatibilityError for a rope of another dim, DeviceError.

    Not safe for concurrent changes; concurrent searches are.

    >>> keys, values = torch.randn(1, 1, 4096, 64), torch.randn(1, 1, 4096, 64)
    >>> index = AsymmetricIndex(d=64, nlist=16)
    >>> index.train(keys)
    >>> index.add(keys, values)
    >>> index.search_attend(torch.randn(1, 1, 1, 64)).shape, index.ntotal
    (torch.Size([1, 1, 1, 64]), 4096)
    """

    __slots__ = (
        "__weakref__",
        "_arguments",
        "_backend",
        "_last",
        "_lists",
        "_number",
        "_options",
        "_prepared_quantizer",
        "_prepared_router",
        "_session",
        "_token",
        "_trained",
        "_unread_mass",
        "backend_name",
        "device",
    )  # fmt: skip

    def __init__(
        self,
        d: int,
        nlist: int = 256,
        num_heads: int = 1,
        num_kv_heads: int | None = None,
        *,
        d_v: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rope: Rope | None = None,
        selectivity: float | None = None,
        nprobe: int | None = None,
        max_codes: int = 0,
        window: int = 128,
        sinks: int = 4,
        scale: float | None = None,
        break_even: int = 2048,
        seal_tokens: int = 0,
        max_segment: int = 32768,
        target_mass: float | None = None,
        budget_shares: Any = None,
        mean_run_tokens: int = 0,
        tail: float = 0.0,
        backend: str | None = None,
    ) -> None:
        layout = Layout(sinks, window, seal_tokens, max_segment, break_even, mean_run_tokens)
        params = SearchParametersIVF(
            nprobe=nprobe, selectivity=selectivity, target_mass=target_mass, max_codes=max_codes, tail=tail
        ).over(SearchParametersIVF(selectivity=SELECTIVITY))
        dims, heads = (d, d if d_v is None else d_v), (num_heads, num_heads if num_kv_heads is None else num_kv_heads)
        self._options = IndexOptions(*dims, nlist, *heads, dtype, layout, params)
        self._trained = TrainedLayer(None, None, rope, rope, self.d**-0.5 if scale is None else scale)
        self.budget_shares = budget_shares
        named = checks.named_device(device)
        self._backend = get_backend(named, backend)  # which has the better words where its device cannot serve
        self.device = checks.device(getattr(self._backend, "device", named))
        self.backend_name = backend
        self._arguments = Arguments(self._options, self.device)
        self._unread_mass: tuple[Any, ...] = (None, None, None)  # a trained layer and a target, and what they allow
        self._prepared_quantizer: Any = None
        self._prepared_router: Any = None
        self._lists: SegmentedInvertedLists | None = None
        self._session: SearchSession | None = None  # of these lists, or of earlier ones
        self._last: Selection | None = None
        self._name_for_compiler()

    def _name_for_compiler(self) -> None:
        """A number and a token of its own, see ops.py."""
        self._number = ops.register(self)
        self._token = torch.zeros(1, dtype=torch.int32, device=self.device)

    def __repr__(self) -> str:
        names = ("d", "d_v", "nlist", "num_heads", "num_kv_heads", "dtype", "ntotal", "is_trained")
        return f"AsymmetricIndex({', '.join(f'{n}={getattr(self, n)}' for n in names)}, backend={self._backend.name!r})"

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, keys: Any, queries: Any = None, *, positions: Any = None, config: TrainingConfig | None = None) -> None:
        """Train the key quantizer and the query router of this layer on whole sequences. Replaces earlier ones.

        Parameters
        ----------
        keys : float32, bfloat16 or float16 (b, h, n, d), token i of a sequence at position i, as attention sees them.
        queries : the same kinds (b, hq, q, d), a sample of the sequences' queries, as attention sees them. None trains the
            quantizer alone and routes symmetrically, as a plain IVF index does.
        positions : int (b, q) or (q,), position of each query; default the last q positions.
        config : see `TrainingConfig`.

        Raises StateError while tokens are stored, ShapeError, DTypeError, NotFiniteError, LengthError for a position outside
        [0, n), ParameterError with fewer keys than lists, MissingDependencyError without FAISS. The index is unchanged then.
        """
        if self.ntotal:
            raise StateError(f"train: expected an empty index, got one with {self.ntotal} tokens; call reset first")
        keys, queries, places = self._arguments.sequences(keys, queries, positions)
        none: list[Any] = [None] * len(keys)
        sequences = list(zip(keys, none if queries is None else queries, none if places is None else places, strict=True))
        settings = self.nlist, self.rope, self.layout, self.scale, TrainingConfig() if config is None else config
        self.load_trained(train_layer(sequences, *settings))

    def load_trained(self, layer: TrainedLayer) -> None:
        """Take over quantizer, router, tower and calibration of a layer that was trained before; rope, scale and budget shares
        are those of the constructor.

        Raises CompatibilityError for another shape, StateError while tokens are stored; the index is unchanged then.
        """
        with self._whole():
            self.tower = None
            if layer.key_quantizer is not None:
                self.key_quantizer = KeyQuantizer(layer.key_quantizer.centroids.contiguous())
            if layer.tower is not None:
                self.tower = layer.tower  # makes the router for the lists there are
            elif layer.query_router is not None:
                self.query_router = layer.query_router
            self.calibration = layer.calibration

    def calibrate(self, keys: Any, queries: Any, *, positions: Any = None, confidence: float = CONFIDENCE) -> None:
        """Measure what `target_mass` must ask of the router, on whole sequences that it was not trained on; sets `calibration`.

        keys, queries, positions : as in `train`; some tens of positions of each of four sequences or more are enough.
        confidence : for each KV head, the share of texts whose mean captured attention is to reach the target.

        Raises NotTrainedError, CompatibilityError for a router that does not predict the attention outside sinks and window,
        LengthError if no query lies past the window of a sealed sequence, and as `train` does. The index is unchanged then.
        """
        if not self.is_trained:
            raise NotTrainedError("calibrate: expected a trained index, got one without key_quantizer and query_router")
        if not isinstance(confidence, float) or not 0.5 <= confidence < 1:
            raise ParameterError(f"confidence: expected 0.5 <= confidence < 1, got {confidence!r}")
        keys, queries, places = self._arguments.sequences(keys, queries, positions)
        layer = self._trained
        parts = layer.quantizer, layer.router, layer.rope, self.layout, layer.scale
        self.calibration = calibrate(keys, queries, places, *parts, confidence)

    # -- adding -------------------------------------------------------------------------------------------------------

    def add(
        self, keys: Any, values: Any, *, lengths: Sequence[int] | None = None, coarse_keys: Any = None, seal: bool = True,
        seq_len: int | Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """Append tokens: a prompt, or one per sequence while decoding. Their ids are their positions.

        Parameters
        ----------
        keys : storage dtype (b, h, n, d), as attention sees them (rotated); values : storage dtype (b, h, n, e).
        lengths : tokens to take of each sequence, the leading ones; default all n.
        coarse_keys : float (b, h, n, d), what to assign in place of the keys with RoPE undone.
        seal : False leaves the new tokens in arrival order behind the others, for the caller to attend to densely, until
            `seal`, or the next change of the index, brings them where their number asks for.
        seq_len : for a rope whose angles depend on the length (`Rope.is_dynamic`), the length at which the model rotated these
            tokens, for all sequences or for each; default each sequence's own, the new tokens included. transformers rotates
            a batch by the length of its longest sequence.

        Raises NotTrainedError, ShapeError, DTypeError, DeviceError, LayoutError, NotFiniteError, LengthError; the index is
        unchanged then. On a CUDA device up to 8 tokens are stored unseen; NotFiniteError comes from a later call (docs/gpu.md).
        """
        if torch.compiler.is_compiling():
            return self._traced_add(keys, values, lengths is None and coarse_keys is None and seq_len is None, seal)
        if self._prepared_quantizer is None:
            raise NotTrainedError("add: expected a trained index, got one without key_quantizer; call train or set it")
        capturing = self._capturing()
        if capturing is not None:
            return self._record_add(capturing, keys, values, lengths is None and coarse_keys is None)
        stored = () if self._lists is None else self._lists.lengths
        keys, values, counts = self._arguments.tokens(keys, values, lengths, stored)
        list_nos = None
        if coarse_keys is not None:
            if self.tower is not None and (self._lists is None or not any(self._lists.segments)):
                raise StateError("coarse_keys: expected lists to assign them to, got a tower, which is yet to make them")
            coarse = self._arguments.coarse_keys(coarse_keys, keys.shape)
            list_nos = torch.stack([self._backend.assign(self._prepared_quantizer, x, None) for x in coarse])
        self._append(keys, values, counts, list_nos, seal, self._rotated_at(counts, seq_len))

    def add_preassigned(
        self, keys: Any, values: Any, list_nos: Any, *, lengths: Sequence[int] | None = None,
        seq_len: int | Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """`add` with the list numbers given: int32 or int64 (b, h, n), in [0, nlist). Needs no trained quantizer."""
        self._refuse_capture("add_preassigned")
        stored = () if self._lists is None else self._lists.lengths
        keys, values, counts = self._arguments.tokens(keys, values, lengths, stored)
        nos = self._arguments.list_nos(list_nos, "b h n", tuple(keys.shape[:3]), least=0)
        self._append(keys, values, counts, nos, rotated=self._rotated_at(counts, seq_len))

    def note_rotation(self, n: int, seq_len: int) -> None:
        """Correct the ``seq_len`` of `add` for the n newest tokens of every sequence, which are not sealed yet."""
        lists = self.invlists
        for i, length in enumerate(lists.lengths):
            if not 0 <= n <= length - lists.sealed(i):
                raise LengthError(f"n: expected at most {length - lists.sealed(i)} tokens that are not sealed, got {n}")
        if n and self.rope is not None:
            for i, length in enumerate(lists.lengths):
                lists.rotated.append(i, length - n, self.rope.effective_length(seq_len))

    def seal(self) -> None:
        """Bring tokens that were added with ``seal=False`` to where a plain `add` would have put them."""
        if self._lists is not None:
            with self._changing():
                self._make_lists(self._lists)
                self._lists.seal(self._assign_rows, last=True)

    def advance(self, n: int | Sequence[int] | None = None, *, seal: bool = True) -> None:
        """Take note of tokens that replays of a CUDA graph appended, and seal what is due (docs/gpu.md).

        n : tokens per sequence since the last call; None asks the device, and waits for it. May be called late, for what is
        not sealed yet is read in full, but before any other method. Not needed where `add` was called without a graph.
        seal : False only takes note; a later call, or `seal_ahead`, seals.

        Raises StateError for a backend without graphs, and if a replay found no room (what it brought is lost) or the device
        holds another number of tokens; NotFiniteError if a step brought NaN or infinity. The index can be used further.
        """
        session = self._device_session("advance")
        if not seal and type(n) is int and n >= 0:  # after every replay, in every layer of a model
            return session.count(n)
        counts = None if n is None else checks.counts(n, session.lists.batch, 2**31 - 1, "n")
        problem = session.advance(counts)
        if not seal:
            if problem is not None:
                raise problem
            return
        with self._whole():
            self._make_lists(session.lists)
            session.lists.seal(self._assign_rows, last=True)
        session.publish()
        if problem is not None:
            raise problem

    def seal_ahead(self, n: int = 1) -> None:
        """Seal what the next n tokens of every sequence make due, 1 <= n <= 8, before a replay brings them: it then reads what a
        step without a graph would read. They have to come next.

        Raises StateError for a backend without graphs, inside a capture, or if the device holds another number of tokens than the
        index; NotFiniteError if a step brought NaN or infinity.
        """
        session = self._device_session("seal_ahead")
        checks.integer(n, "n", 1, MAX_STEP_TOKENS)
        if any(map(self._options.layout.num_blocks, (x + n for x in self.lengths))):
            with self._changing():
                session.lists.seal_ahead(n, self._assign_rows)

    def _append(
        self, keys: Tensor, values: Tensor, counts: list[int], list_nos: Tensor | None, seal: bool = True,
        rotated: list[int] | None = None,
    ) -> None:  # fmt: skip
        lists = self._lists
        same_batch = lists is not None and lists.batch == keys.shape[0]
        if lists is not None and same_batch and list_nos is None and keys.shape[2] and lists.only_grows(counts, seal):
            self._session_of(lists).append(keys, values, counts, None, rotated)  # nearly every step: nothing is left half done
            return
        with self._whole():
            if lists is None or (not same_batch and not self.ntotal):
                lists = self._new_lists(keys.shape[0])
            if list_nos is None and seal:
                self._make_lists(lists, keys, counts, rotated)
            self._lists = lists
            session = self._session_of(lists)
            session.append(keys, values, counts, list_nos, rotated)
            if seal:
                lists.seal(self._assign_rows, last=True)
        session.changed(step_next=True)

    def _record_add(self, session: SearchSession, keys: Any, values: Any, plain: bool) -> None:
        """`add` inside a capture."""
        if not plain:
            raise StateError("capture: expected add of keys and values alone, got coarse_keys or lengths")
        if self.rope is not None and self.rope.is_dynamic:
            session.refuse_capture("a rope whose angles depend on the length")
        self._refuse_lists_to_come(session)
        keys, values = self._arguments.step_tokens(keys, values, session.lists.batch)
        session.record_append(keys, values)

    def _rotated_at(self, counts: list[int], seq_len: int | Sequence[int] | None) -> list[int] | None:
        """The length that the angles of counts[i] new tokens of each sequence belong to; None if they depend on none."""
        if seq_len is not None:
            lengths = checks.counts(seq_len, len(counts), 2**31 - 1, "seq_len")
        rope = self.rope
        if rope is None or not rope.is_dynamic:
            return None
        if seq_len is None:
            before = [self.invlists.next_position(i) for i in range(len(counts))] if self.ntotal else [0] * len(counts)
            lengths = [start + count for start, count in zip(before, counts, strict=True)]
        return [rope.effective_length(n) for n in lengths]

    # -- searching ----------------------------------------------------------------------------------------------------

    def search_attend(
        self, queries: Any, *, params: SearchParametersIVF | None = None, coarse_queries: Any = None, return_lse: bool = False
    ) -> Any:
        """Attention of the newest tokens over what the index holds, reading only what the router expects to matter.

        Parameters
        ----------
        queries : float32, bfloat16 or float16 (b, hq, q, d), rotated as attention expects, 1 <= q <= 8. They belong to the
            last q tokens added: query i of q does not see the q - 1 - i newest tokens (speculative decoding).
        params : replaces the index's own parameters for this call.
        coarse_queries : float (b, hq, q, d), what to route in place of the queries with RoPE undone.
        return_lse : also return the log of the softmax denominator, for `merge_states`.

        Returns
        -------
        out : dtype of queries (b, hq, q, e): one softmax over sinks, recent tokens and the selected ones.
        lse : float32 (b, hq, q), natural log, if asked for. Nothing to attend: out = 0, lse = -inf.

        Raises NotTrainedError without a router (but for an index that never held a token, which gives zeros), ShapeError,
        DTypeError, DeviceError, LayoutError, ParameterError. NaN in a query gives NaN in its own output, and an arbitrary
        selection to its group.
        """
        if torch.compiler.is_compiling():
            return self._traced_search(queries, params, coarse_queries is None, return_lse)
        lists = self._lists
        x, form = self._arguments.queries(queries, None if lists is None else lists.batch)
        if lists is None:
            return self._nothing(x, form, return_lse)
        if coarse_queries is None:
            settings, session = self._settings(params), self._session_of(lists)
            if not self._options.exceeded_by(settings):
                self._refuse_lists_to_come(session)
                routing = session.routing_of(self._trained, self._prepared_router, x.shape[3])
                out, lse, self._last = session.run(x, self._terms(settings), routing, self._trained.scale)
                return self._result(out, lse, form, return_lse)
            session.refuse_capture("a larger window or more sinks than the index has")
        return self._attend(x, self._select(x, params, coarse_queries), form, return_lse)

    def search_attend_preassigned(
        self, queries: Any, list_nos: Any, *, params: SearchParametersIVF | None = None, return_lse: bool = False
    ) -> Any:
        """`search_attend` over whole lists given by number: int32 or int64 (b, h, p), -1 for none, duplicates once.

        Sinks and recent tokens are read besides. Of ``params`` only window and sinks apply.
        """
        self._refuse_capture("search_attend_preassigned")
        x, form = self._arguments.queries(queries, self._batch)
        nos = self._arguments.list_nos(list_nos, "b h p", (x.shape[0], self.num_kv_heads, None), least=-1)
        if self._lists is None:
            return self._nothing(x, form, return_lse)
        selection = select_lists(self._lists, nos, SearchParametersIVF() if params is None else params)
        return self._attend(x, selection, form, return_lse)

    def search(self, queries: Any, k: int, *, params: SearchParametersIVF | None = None) -> tuple[Any, Any]:
        """The k keys of largest inner product among the tokens that each query would read: FAISS's search, for inspection.

        queries : as in `search_attend`, any q, and every query on its own. Returns scores : float32 (b, hq, q, k), descending,
        not scaled, and ids : int64 (b, hq, q, k), positions; -inf and -1 where fewer than k tokens were read.
        """
        checks.integer(k, "k", 1)
        x, form = self._arguments.queries(queries, self._batch, any_number=True)
        b, h, g, q, _ = x.shape
        if self._lists is None or not q:
            scores = torch.full((b, h, g, q, k), float("-inf"), dtype=torch.float32, device=self.device)
            ids = torch.full((b, h, g, q, k), -1, dtype=torch.int64, device=self.device)
        else:
            self._last = self._select_each(x, params)
            scores, ids = best_of(self._backend, self._lists, x, self._last, k)
        return form.output(scores.view(b, h * g, q, k)), form.output(ids.view(b, h * g, q, k))

    def select(self, queries: Any, *, params: SearchParametersIVF | None = None, coarse_queries: Any = None) -> Selection:
        """The first half of `search_attend`: which rows it would read. `read_ids` gives the tokens in them."""
        x, _ = self._arguments.queries(queries, self._batch)
        return self._select(x, params, coarse_queries)

    def attend_selected(self, queries: Any, selection: Selection, *, return_lse: bool = False) -> Any:
        """The second half of `search_attend`: one softmax over a selection made since the last change of the index.

        Raises StateError for one of before, and as `search_attend` does for the queries.
        """
        self._refuse_capture("attend_selected")
        x, form = self._arguments.queries(queries, self._batch)
        if selection.lengths != self.lengths:
            raise StateError(f"selection: expected one made at lengths {self.lengths}, got {selection.lengths}")
        selection.check(self.invlists)
        return self._attend(x, selection, form, return_lse)

    def read_ids(self, selection: Selection) -> list[list[Tensor]]:
        """Ids (positions) of every token that ``selection`` reads: [sequence][KV head] -> int64 (t,), ascending."""
        return read_ids(self.invlists, selection)

    def _select(self, x: Tensor, params: SearchParametersIVF | None, coarse_queries: Any) -> Selection:
        self._refuse_capture("a selection apart from attention")
        lists, settings, queries = self.invlists, self._settings(params), x
        if coarse_queries is not None:
            queries, _ = self._arguments.queries(coarse_queries, self._batch)
            if queries.shape != x.shape:
                raise ShapeError(f"coarse_queries: expected {x.shape[3]} queries per sequence, got {queries.shape[3]}")
        session = self._session_of(lists)
        routing = session.routing_of(self._trained, self._prepared_router, x.shape[3], coarse_queries is not None)
        return extend_to_window(lists, session.select(queries, self._terms(settings), routing), settings)

    def _select_each(self, x: Tensor, params: SearchParametersIVF | None) -> Selection:
        """`_select` for every query on its own, see `SearchSession.select_each`."""
        self._refuse_capture("a selection apart from attention")
        settings, session = self._settings(params), self._session_of(self.invlists)
        if self._options.exceeded_by(settings) or self._backend.captures:
            return side_by_side([self._select(x[:, :, :, j : j + 1].contiguous(), params, None) for j in range(x.shape[3])])
        return session.select_each(x, self._terms(settings), session.routing_of(self._trained, self._prepared_router, 1))

    def _attend(self, x: Tensor, selection: Selection, form: Form, return_lse: bool) -> Any:
        self._last = selection
        out, lse = attend(self._backend, self.invlists, x, selection, self.scale, causal=True)
        return self._result(out, lse, form, return_lse)

    def _nothing(self, x: Tensor, form: Form, return_lse: bool) -> Any:
        out = x.new_zeros((*x.shape[:-1], self.d_v))
        return self._result(out, torch.full(x.shape[:-1], float("-inf"), dtype=torch.float32, device=x.device), form, return_lse)

    def _result(self, out: Tensor, lse: Tensor, form: Form, return_lse: bool) -> Any:
        b, h, g, q, e = out.shape
        found = form.output(out.view(b, h * g, q, e))
        return (found, form.output(lse.view(b, h * g, q))) if return_lse else found

    # -- shrinking, copying, memory -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget every token; keep the training and the memory. The next `add` may bring another batch size."""
        session = self._present_session()
        if session is not None:
            session.invalidate()
        with self._whole():
            if self._lists is not None:
                self._lists.clear()
            self._last = None
        if session is not None:
            session.changed()

    @_change
    def truncate(self, n: int | Sequence[int]) -> None:
        """Keep the first n tokens of every sequence (or n[i] of sequence i), in the state they were in at that length.

        Raises LengthError beyond the end, ShapeError for another number of sequences; the index is unchanged then.
        """
        if self._lists is None:
            one = isinstance(n, int | np.integer)  # an empty index may become a batch of any size
            checks.counts(n, 1 if one else len(n), 0, "n")  # type: ignore[arg-type]
            return
        keep = checks.counts(n, self._lists.batch, 2**31 - 1, "n")
        for i, (count, length) in enumerate(zip(keep, self._lists.lengths, strict=True)):
            if count > length:
                raise LengthError(f"n: expected at most the {length} tokens of sequence {i}, got {count}")
        for i, count in enumerate(keep):
            self._lists.truncate(i, count, self._assign_rows)

    @_change
    def remove_ids(self, ids: Any, *, close_gaps: bool = False) -> int:
        """Take tokens out: int64 ids (n,) in every sequence, or one such array per sequence. Others keep their positions.

        Ids that are not stored are ignored, as in FAISS. Returns the number of tokens removed, summed over the sequences.
        close_gaps : those behind a removed one move up, as if it had never been there; for padding, whose place the model did
            not count when it rotated the others.
        """
        lists = self._lists
        if lists is None:
            return 0
        nested = isinstance(ids, list | tuple) and len(ids) > 0 and not isinstance(ids[0], int | np.integer)
        per_sequence = list(ids) if nested else [ids] * lists.batch
        if len(per_sequence) != lists.batch:
            raise ShapeError(f"ids: expected one array per sequence ({lists.batch}), got {len(per_sequence)}")
        chosen = [checks.ids(x, f"ids[{i}]" if nested else "ids") for i, x in enumerate(per_sequence)]
        removed = 0
        for i, wanted in enumerate(chosen):
            ranks = np.flatnonzero(np.isin(lists.positions(i, np.arange(lists.lengths[i])), wanted))
            lists.remove(i, ranks, self._assign_rows, close_gaps)
            removed += len(ranks)
        return removed

    def reconstruct(self, ids: Any, sequence: int = 0) -> tuple[Any, Any]:
        """Keys (h, n, d) and values (h, n, e) of the tokens with these ids, as they were added.

        Raises LengthError for an id that is not stored, ParameterError for a sequence that is not there.
        """
        wanted = checks.ids([ids] if isinstance(ids, int | np.integer) else ids, "ids")
        sequence = checks.integer(sequence, "sequence", 0, max(0, len(self.lengths) - 1))
        stored = self.invlists.row_ids(sequence).long() if self.ntotal else torch.empty((1, 0), dtype=torch.int64, device="cpu")
        found, order = stored.sort(dim=1)
        missing = np.setdiff1d(wanted, found[0].cpu().numpy())
        if len(missing):
            raise LengthError(f"ids: expected ids that are stored, got {missing[0]}")
        targets = torch.from_numpy(wanted).to(stored.device).expand(len(stored), -1).contiguous()
        rows = order.gather(1, torch.searchsorted(found, targets))[:, :, None]
        keys, values = self.invlists.keys[sequence], self.invlists.values[sequence]
        return tuple(x.gather(1, rows.expand(-1, -1, x.shape[2])) for x in (keys, values))  # type: ignore[return-value]

    @_between_steps
    def fork(self, sequences: Sequence[int] | None = None) -> Self:
        """An independent copy with the same training, of all sequences or of those named, in that order (beam search).

        Copies the tokens in use: the cost is that of reading and writing them once.
        """
        new = self._clone()
        if self._lists is not None:
            chosen = list(range(self._lists.batch)) if sequences is None else list(sequences)
            if not chosen:
                raise ParameterError("sequences: expected at least one, got none")
            for s in chosen:
                checks.integer(s, "sequences", 0, self._lists.batch - 1)
            new._lists = self._lists.fork(chosen)
        return new

    def __copy__(self) -> Self:
        """A copy is a `fork`: tokens of its own, the training shared."""
        return self.fork()

    def __deepcopy__(self, memo: Any) -> Self:
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StateError("pickle: expected write_index and read_index, which keep an index in a file, got an index to pickle")

    @_change
    def reorder(self, sequences: Sequence[int]) -> None:
        """Sequence i becomes what sequences[i] was, in place (a step of beam search): `fork`, but sequences that stem from one
        another copy only what came since. Raises ShapeError for another number of sequences, ParameterError for one not there.
        """
        chosen = [int(i) for i in sequences]
        if self._lists is None:
            return
        if len(chosen) != self._lists.batch:
            raise ShapeError(f"sequences: expected one per sequence ({self._lists.batch}), got {len(chosen)}")
        for s in chosen:
            checks.integer(s, "sequences", 0, self._lists.batch - 1)
        self._lists.reorder(chosen)

    @_between_steps
    def to(self, device: torch.device | str) -> Self:
        """This index on another device: itself if it is there already, else a copy."""
        device = checks.device(device)
        if device == self.device:
            return self
        new = self._clone(device)
        if self._lists is not None:
            new._lists = self._lists.to(new._backend, device)
        return new

    def _clone(self, device: torch.device | None = None) -> Self:
        new = object.__new__(type(self))
        for name in type(self).__slots__:
            if name != "__weakref__":
                setattr(new, name, getattr(self, name))
        new._lists = new._session = new._last = None
        if device is not None:
            new.device, new._backend, new.backend_name = device, get_backend(device), None
            new._trained = self._trained.to(device)
            new._prepare(quantizer=True, router=True)
        new._arguments = Arguments(new._options, new.device)
        new._name_for_compiler()
        return new

    @_change
    def reserve_memory(self, n: int, batch: int | None = None) -> None:
        """Make room for n tokens per sequence, so that no `add` up to there allocates. ``batch``: for an empty index."""
        checks.integer(n, "n", 0)
        size = checks.integer(batch, "batch", 1) if batch is not None else max(1, len(self.lengths))
        if self._lists is None or (self._lists.batch != size and not self.ntotal):
            self._lists = self._new_lists(size)
        elif self._lists.batch != size:
            raise ShapeError(f"batch: expected {self._lists.batch}, the sequences stored, got {size}")
        self._lists.reserve(n)

    @_change
    def reclaim_memory(self) -> int:
        """Give back memory that no token uses; returns the bytes freed."""
        return 0 if self._lists is None else self._lists.reclaim()

    @_between_steps
    def stats(self) -> IndexStats:
        """What the index holds, and what its last search read. Reads device memory: not for the decode path."""
        session = self._present_session()
        if session is not None:
            self._last = session.newest(self._last)
        return gather(self._lists, self._last, self.key_quantizer, self.query_router)

    def _new_lists(self, batch: int) -> SegmentedInvertedLists:
        shape = (batch, self.num_kv_heads, self.d, self.d_v, self.nlist)
        return SegmentedInvertedLists(self._backend, self._options.layout, *shape, self.dtype)

    # -- FAISS --------------------------------------------------------------------------------------------------------

    def to_faiss(self, sequence: int = 0, head: int = 0) -> tuple[Any, np.ndarray]:
        """One KV head of one sequence as a FAISS `IndexIVFFlat` with the same lists, and its values by id; see `interop`."""
        checks.integer(sequence, "sequence", 0, max(0, len(self.lengths) - 1))
        checks.integer(head, "head", 0, self.num_kv_heads - 1)
        return interop.to_faiss(self, sequence, head)

    @classmethod
    def from_faiss(cls, faiss_index: Any, values: np.ndarray, **options: Any) -> AsymmetricIndex:
        """An index of one head with the lists of a FAISS `IndexIVFFlat` of ids 0 to n - 1; values : float32 (n, e) by id.

        ``options`` are those of the constructor. Queries are routed as FAISS does: by inner product with the centroids.
        Raises CompatibilityError for another kind of index, ParameterError for other ids, ShapeError.
        """
        return interop.from_faiss(cls, faiss_index, values, options)

    # -- attributes of a FAISS IVF index ------------------------------------------------------------------------------

    @property
    def options(self) -> IndexOptions:
        """Shapes, dtype, layout and default search parameters, as one record."""
        return self._options

    @property
    def trained(self) -> TrainedLayer:
        """What routes the queries of this layer, as one record; for `Routers`, and for `load_trained` of another index."""
        return self._trained

    @property
    def rope(self) -> Rope | None:
        """The rotary embedding that is undone to route, or None."""
        return self._trained.rope

    @property
    def scale(self) -> float:
        """Of the logits."""
        return self._trained.scale

    @scale.setter
    def scale(self, value: float) -> None:
        if value != self._trained.scale:  # set before every step by a cache of transformers
            self._trained = replace(self._trained, scale=value)

    @property
    def d(self) -> int:
        """Key and query dim."""
        return self._options.d

    @property
    def d_v(self) -> int:
        """Value dim."""
        return self._options.d_v

    @property
    def nlist(self) -> int:
        """Inverted lists per KV head."""
        return self._options.nlist

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self._options.num_heads

    @property
    def num_kv_heads(self) -> int:
        """KV heads; query head i uses KV head i // (num_heads / num_kv_heads)."""
        return self._options.num_kv_heads

    @property
    def dtype(self) -> torch.dtype:
        """Of stored keys and values."""
        return self._options.dtype

    @property
    def ntotal(self) -> int:
        """Tokens stored, summed over the sequences; a token counts once, whatever the heads."""
        return sum(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence; empty before the first `add`."""
        return [] if self._lists is None else list(self._lists.lengths)

    @property
    def is_trained(self) -> bool:
        return self._trained.is_trained

    @property
    def invlists(self) -> SegmentedInvertedLists:
        """The inverted lists of this batch; StateError before the first `add` or `reserve_memory`."""
        if self._lists is None:
            raise StateError("invlists: expected an index that holds a batch, got one without; call add first")
        return self._lists

    @property
    def key_quantizer(self) -> KeyQuantizer | None:
        """The k-means partition. Assigning one checks its shape; StateError while tokens are stored."""
        return self._trained.key_quantizer

    @key_quantizer.setter
    def key_quantizer(self, quantizer: KeyQuantizer) -> None:
        trained = self._with(key_quantizer=quantizer.to(self.device))
        if self.ntotal:
            raise StateError(f"key_quantizer: expected an empty index, got one with {self.ntotal} tokens; call reset first")
        with self._whole():
            self._trained = trained
            self._prepare(quantizer=True)

    @property
    def query_router(self) -> QueryRouter | None:
        """The classifier of queries. May be replaced at any time by one for the same lists, which drops `calibration`."""
        return self._trained.query_router

    @query_router.setter
    def query_router(self, router: QueryRouter) -> None:
        trained = self._with(query_router=router.to(self.device), calibration=None)
        with self._whole():
            self._trained = trained
            self._prepare(router=True)

    @property
    def tower(self) -> TwoTower | None:
        """A router for any lists, or None. With one, an index has lists of its own for every batch of sequences: k-means over all
        tokens that are there when the first are sealed (with a prompt, all of it), by which `key_quantizer` and `query_router`
        are replaced. So the state follows from how tokens were added, not from the tokens alone.

        Assigning one sets `query_router` for the lists there are. StateError without them, or while tokens are stored.
        """
        return self._trained.tower

    @tower.setter
    def tower(self, tower: TwoTower | None) -> None:
        if tower is None:
            self._trained = replace(self._trained, tower=None)
            return
        here, quantizer = self._with(tower=tower.to(self.device)).tower, self.key_quantizer
        if quantizer is None or self.ntotal:
            raise StateError("tower: expected an index with a key_quantizer and without tokens, got another")
        with self._whole():
            self.query_router = tower.at(quantizer.centroids.to(tower.weights.hidden.device))
            self._trained = replace(self._trained, tower=here)

    @property
    def calibration(self) -> Calibration | None:
        """What `target_mass` makes of the router's word, see `calibrate`; None takes the router at its word."""
        return self._trained.calibration

    @calibration.setter
    def calibration(self, value: Calibration | None) -> None:
        self._trained = self._with(calibration=value)

    @property
    def nprobe(self) -> int | None:
        """Lists visited per query, SAAP as published; setting it unsets `selectivity`, `target_mass` and `tail`. None: the budget
        decides."""
        return self._options.params.nprobe

    @nprobe.setter
    def nprobe(self, value: int) -> None:
        self._options = self._options.with_nprobe(value)

    @property
    def selectivity(self) -> float | None:
        """Share of the sealed tokens read, or the most of them with `target_mass`; setting it unsets `nprobe`."""
        return self._options.params.selectivity

    @selectivity.setter
    def selectivity(self, value: float) -> None:
        self._options = self._options.with_selectivity(value)

    @property
    def target_mass(self) -> float | None:
        """Attention that each step and KV head is to capture, by the router's estimate; see `SearchParametersIVF`.

        Setting it where it was None makes `selectivity` the cap, 0.25; setting None makes that a budget that is spent.
        """
        return self._options.params.target_mass

    @target_mass.setter
    def target_mass(self, value: float | None) -> None:
        self._options = self._options.with_target_mass(value)

    @property
    def tail(self) -> float:
        """Share of the budget spent on the means of runs that are not read."""
        return self._options.params.tail or 0.0

    @tail.setter
    def tail(self, value: float) -> None:
        self._options = self._options.with_tail(value)

    @property
    def budget_shares(self) -> np.ndarray | None:
        """float32 (h,): what `selectivity` is multiplied with for each KV head; None for 1 each."""
        shares = self._trained.budget_shares
        return None if shares is None else shares.copy()

    @budget_shares.setter
    def budget_shares(self, value: Any) -> None:
        shares = None if value is None else checks.shares(value, "budget_shares", self.num_kv_heads)
        self._trained = self._with(budget_shares=shares)

    @property
    def max_codes(self) -> int:
        """Most sealed tokens read per KV head; 0 means no limit."""
        return self._options.params.max_codes or 0

    @max_codes.setter
    def max_codes(self, value: int) -> None:
        self._options = self._options.with_max_codes(value)

    @property
    def window(self) -> int:
        """Recent tokens always read, at least. Setting it re-sorts what is stored."""
        return self._options.layout.window

    @window.setter
    def window(self, value: int) -> None:
        self._relayout(window=value)

    @property
    def sinks(self) -> int:
        """First tokens always read. Setting it re-sorts what is stored."""
        return self._options.layout.sinks

    @sinks.setter
    def sinks(self, value: int) -> None:
        self._relayout(sinks=value)

    @property
    def mean_run_tokens(self) -> int:
        """Tokens that an average run of a segment needs for its runs to keep their means; 0: none do. Setting it re-sorts."""
        return self._options.layout.mean_run_tokens

    @mean_run_tokens.setter
    def mean_run_tokens(self, value: int) -> None:
        self._relayout(mean_run_tokens=value)

    @property
    def break_even(self) -> int:
        """Shorter sequences are not sealed. Setting it re-sorts what is stored."""
        return self._options.layout.break_even

    @break_even.setter
    def break_even(self, value: int) -> None:
        self._relayout(break_even=value)

    @property
    def layout(self) -> Layout:
        """Which tokens are sinks, recent and sealed."""
        return self._options.layout

    # -- what is trained, and parameters ------------------------------------------------------------------------------

    @property
    def _batch(self) -> int | None:
        return None if self._lists is None else self._lists.batch

    def _with(self, **parts: Any) -> TrainedLayer:
        """What is trained, with other parts; checked."""
        layer = replace(self._trained, **parts)
        layer.check(self.num_kv_heads, self.d, self.nlist)
        return layer

    def _prepare(self, quantizer: bool = False, router: bool = False) -> None:
        """What is trained, as the backend keeps it."""
        layer = self._trained
        if quantizer and layer.key_quantizer is not None:
            self._prepared_quantizer = self._backend.prepare_quantizer(layer.key_quantizer.centroids)
        if router and layer.query_router is not None:
            self._prepared_router = self._backend.prepare_router(layer.query_router.weights)

    def _settings(self, params: SearchParametersIVF | None) -> SearchParametersIVF:
        """Checked parameters of one search: those given, over the index's own."""
        if self._trained.query_router is None:
            raise NotTrainedError("search: expected a trained index, got one without query_router; call train or set it")
        if params is not None and not isinstance(params, SearchParametersIVF):
            raise ParameterError(f"params: expected SearchParametersIVF or None, got {type(params).__name__}")
        return self._options.params if params is None else self._options.merged(params)

    def _terms(self, params: SearchParametersIVF) -> Terms:
        """What a plan for these parameters follows from."""
        layer, target = self._trained, params.target_mass
        if target is None:
            return params, layer.router, layer.budget_shares, None
        last = self._unread_mass
        if last[0] is not layer or last[1] != target:
            self._unread_mass = last = layer, target, unread_mass_for(layer, target, self.num_kv_heads, self.device)
        return params, layer.router, layer.budget_shares, last[2]

    @property
    def _assign_rows(self) -> AssignRows:
        """What the inverted lists ask when they seal."""
        return AssignRows(self._backend, self.invlists, self._prepared_quantizer, self.rope)

    def _make_lists(
        self, lists: SegmentedInvertedLists, keys: Tensor | None = None, counts: Sequence[int] | None = None,
        rotated: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """With a tower, if adding counts[i] of keys : storage dtype (b, h, n, d) seals the first tokens: lists of these very
        sequences, before any token is in one. The calibration stays, for it was measured on lists of their kind.

        rotated : the length at which the new keys of each sequence were rotated, where the angles depend on it.
        """
        tower = self._trained.tower
        if tower is None or any(lists.segments):
            return
        if keys is None or counts is None:
            keys, counts = lists.keys[:, :, :0], [0] * lists.batch
        if not any(self.layout.num_blocks(n + count) for n, count in zip(lists.lengths, counts, strict=True)):
            return
        session = self._session
        if session is not None and session.lists is lists and session.backend_session.captured:
            raise StateError("tower: expected the lists that a CUDA graph routes to, got tokens that make new ones")

        def assign(centroids: Tensor, keys: Tensor) -> Tensor:
            return self._backend.assign(self._backend.prepare_quantizer(centroids), keys, None)

        x = prompt_keys(lists, keys, counts, rotated, self.rope)
        quantizer, router = tower.for_prompt(x, self.nlist, assign if x.is_cpu else None)
        self._trained = replace(self._trained, key_quantizer=quantizer, query_router=router)
        self._prepare(quantizer=True, router=True)

    @_change
    def _relayout(self, **changes: int) -> None:
        self._options = self._options.with_layout(**changes)
        if self._lists is not None:
            self._make_lists(self._lists)
            self._lists.relayout(self.layout, self._assign_rows)

    # -- changes and steps --------------------------------------------------------------------------------------------

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Around a change: it happens whole or not at all, whatever is raised in it; signals are answered after it."""
        with signals_wait():
            before = [(name, getattr(self, name)) for name in _STATE]
            try:
                with nullcontext() if self._lists is None else self._lists.whole():
                    yield
            except BaseException:
                for name, value in before:
                    setattr(self, name, value)
                raise

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around a change: `_in_step`, and whole or not at all."""
        with self._in_step(), self._whole():
            yield

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Host and device agree before it, and after it where a graph may be replayed next."""
        session = self._present_session()
        if session is not None:
            session.synchronize()
        yield
        session = self._present_session()
        if session is not None:
            session.changed()

    def _session_of(self, lists: SegmentedInvertedLists) -> SearchSession:
        """The session of the lists there are, made on first use."""
        session = self._session
        if session is None or session.lists is not lists:
            self._session = session = SearchSession(self._backend, lists)
        return session

    def _present_session(self) -> SearchSession | None:
        """The session of the lists there are, if there is anything that it may have to say."""
        lists, session = self._lists, self._session
        if lists is not None and self._backend.captures:
            return self._session_of(lists)
        return session if session is not None and session.lists is lists else None

    def _device_session(self, what: str) -> SearchSession:
        """The session; StateError for a backend that keeps none on its device, or without a batch."""
        if self._lists is None or not self._backend.captures:
            raise StateError(f"{what}: expected an index whose state lies on its device, got backend {self._backend.name!r}")
        return self._session_of(self._lists)

    def _capturing(self) -> SearchSession | None:
        """The session while a graph is captured, else None."""
        if not self._backend.captures or self._lists is None:
            return None
        session = self._session_of(self._lists)
        return session if session.backend_session.capturing else None

    def _refuse_capture(self, what: str) -> None:
        """StateError while a graph is captured."""
        session = self._capturing()
        if session is not None:
            session.refuse_capture(what)

    def _refuse_lists_to_come(self, session: SearchSession) -> None:
        """A graph cannot follow a router that is yet to be made."""
        if self.tower is not None and not any(session.lists.segments):
            session.refuse_capture("a two-tower router before any token is sealed, which is when it makes its lists")

    def release_graphs(self) -> None:
        """Say that no CUDA graph captured over this index is replayed any more: its memory may move again, as `add` asks for."""
        session = self._present_session()
        if session is not None:
            session.release_graphs()

    def graph_key(self, params: SearchParametersIVF | None = None) -> tuple[Any, ...]:
        """What a graph of `add` and of `search_attend` with these parameters was made for, beside the shapes of their arguments.

        It may be replayed as long as `same_graph` says so.
        """
        lists = self._lists
        moved = None if lists is None else lists.moved
        layer = self._trained
        return moved, layer.scale, params, self._options.params, layer.query_router, layer.budget_shares, layer.calibration

    def same_graph(self, key: tuple[Any, ...], params: SearchParametersIVF | None = None) -> bool:
        """Whether a graph with this `graph_key` still holds: numbers are the same by value, all else by identity."""
        now = self.graph_key(params)
        return all(x is y or (isinstance(x, int | float) and x == y) for x, y in zip(key, now, strict=True))

    # -- compiled -----------------------------------------------------------------------------------------------------

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
