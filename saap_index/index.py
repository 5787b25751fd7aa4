"""`AsymmetricIndex`: an IVF index over attention keys, with one map for keys and another for queries.

The only stateful public class. It checks arguments, turns parameters into numbers, and calls its parts in one direction:
quantizer and router (maps), inverted lists (storage), search (selection and softmax), and through them a backend.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from . import checks, interop, ops
from .backends import get_backend
from .backends.types import MAX_STEP_TOKENS
from .errors import LengthError, NotTrainedError, ShapeError, StateError
from .invlists.layout import Layout
from .invlists.runs import rows_of
from .invlists.segmented import SegmentedInvertedLists
from .routing.assign import AssignRows, prompt_lists
from .routing.calibration import CONFIDENCE, Calibration, calibrate
from .routing.quantizer import KeyQuantizer
from .routing.rope import Rope
from .routing.rotations import note_rotation, rotation_lengths
from .routing.router import QueryRouter
from .routing.sampling import Sampling
from .routing.trained import TrainedLayer
from .routing.two_tower import TwoTower
from .search.arguments import Arguments, ArrayForm
from .search.options import Field, IndexOptions
from .search.params import SELECTIVITY, SearchParametersIVF
from .search.select import attend, best_of, best_of_none, extend_to_window, sample_error, select_lists, side_by_side
from .search.selection import Selection, read_ids
from .search.session import SearchSession
from .search.states import empty_state
from .search.stats import IndexStats, gather
from .search.steady import SteadySteps
from .training.config import TrainingConfig
from .training.layer import announced, train_layer
from .training.sampling import calibrate_sampling
from .whole import whole, within

_STATE = "_last", "_lists", "_options", "_prepared_quantizer", "_prepared_router", "_session", "_trained"
"""What a change may set."""


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
    sampled_share, sample_exponent, sample_cap : how much of the budget is spent on a weighted sample, and how, see
        `SearchParametersIVF`; None: as `sampling` says for each KV head.
    window, sinks : tokens at the end and the start that are always read.
    scale : of the logits, default d ** -0.5.
    break_even : sequences shorter than this are not sealed, and attention over them is dense.
    seal_tokens, max_segment : see `Layout`.
    storage : what keys and values become when they are sealed. None: they stay as given. "SQ8": 8 bits and a scale per token and
        head. "SQ8/SQ4": 8 bits for keys, 4 for values. Sinks and recent tokens stay as given.
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
        "__weakref__", "_arguments", "_backend", "_last", "_lists", "_number", "_options", "_prepared_quantizer",
        "_prepared_router", "_rotates_by_length", "_session", "_steady", "_token", "_trained", "backend_name", "device",
        "verbose",
    )

    def __init__(
        self, d: int, nlist: int = 256, num_heads: int = 1, num_kv_heads: int | None = None, *, d_v: int | None = None,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", rope: Rope | None = None,
        selectivity: float | None = None, nprobe: int | None = None, max_codes: int = 0, window: int = 128, sinks: int = 4,
        scale: float | None = None, break_even: int = 2048, seal_tokens: int = 0, max_segment: int = 8192,
        target_mass: float | None = None, budget_shares: Any = None, mean_run_tokens: int = 0, tail: float = 0.0,
        storage: str | None = None, sampled_share: float | None = None, sample_exponent: float | None = None,
        sample_cap: float | None = None, backend: str | None = None,
    ) -> None:
        layout = Layout(sinks, window, seal_tokens, max_segment, break_even, mean_run_tokens)
        params = SearchParametersIVF(
            nprobe=nprobe, selectivity=selectivity, target_mass=target_mass, max_codes=max_codes, tail=tail,
            sampled_share=sampled_share, sample_exponent=sample_exponent, sample_cap=sample_cap,
        ).over(SearchParametersIVF(selectivity=SELECTIVITY))
        heads = num_heads, num_heads if num_kv_heads is None else num_kv_heads
        self._options = IndexOptions(d, d if d_v is None else d_v, nlist, *heads, dtype, layout, params, storage)
        shares = None if budget_shares is None else checks.shares(budget_shares, "budget_shares", self.num_kv_heads)
        self._trained = TrainedLayer(None, None, rope, rope, self.d**-0.5 if scale is None else scale, budget_shares=shares)
        self._trained.check(self.num_kv_heads, self.d, self.nlist)
        named = checks.named_device(device)
        self._backend = get_backend(named, backend)  # which has the better words where its device cannot serve
        self.device = checks.device(getattr(self._backend, "device", named))
        self._options.check_backend(self._backend, self.device)
        self.backend_name = backend
        self._arguments = Arguments(self._options, self.device)
        self._rotates_by_length = rope is not None and rope.is_dynamic
        self._prepared_quantizer: Any = None
        self._prepared_router: Any = None
        self._lists: SegmentedInvertedLists | None = None
        self._session: SearchSession | None = None  # of these lists, or of earlier ones
        self._last: Selection | None = None
        self._steady = SteadySteps()
        self._number, self._token = ops.register(self)
        self.verbose = False
        """Whether `train` prints what it does, as an index of FAISS does; an attribute to set."""

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
        self._require_empty("train")
        sequences = self._arguments.sequences(keys, queries, positions)
        config = TrainingConfig() if config is None else config
        config = announced(sequences, self.nlist, config) if self.verbose else config
        self.load_trained(train_layer(sequences, self.nlist, self.rope, self.layout, self.scale, config))

    def load_trained(self, layer: TrainedLayer) -> None:
        """Take over quantizer, router, tower, calibration and sampling of a layer that was trained before; rope, scale and budget
        shares are those of the constructor.

        Raises CompatibilityError for another shape, StateError while tokens are stored; the index is unchanged then.
        """
        new = layer.to(self.device)
        parts: dict[str, Any] = {"tower": new.tower, "calibration": new.calibration, "sampling": new.sampling}
        if new.key_quantizer is not None:
            self._require_empty("key_quantizer")
            lists = new.key_quantizer
            parts["key_quantizer"] = KeyQuantizer(lists.centroids.contiguous(), lists.transform)
        if layer.tower is not None:
            parts["query_router"] = self._router_of(layer.tower, parts.get("key_quantizer", self.key_quantizer))
        elif new.query_router is not None:
            parts["query_router"] = new.query_router
        self._set_trained(**parts)

    def calibrate(
        self, keys: Any, queries: Any, *, positions: Any = None, confidence: float = CONFIDENCE, values: Any = None
    ) -> None:
        """Measure what `target_mass` must ask of the router, on whole sequences that it was not trained on; sets `calibration`.

        keys, queries, positions : as in `train`; some tens of positions of each of four sequences or more are enough.
        values : the same kinds (b, h, n, e); with them it is measured, too, in which KV heads a weighted sample makes the output
            better, and which: sets `sampling`.
        confidence : for each KV head, the share of texts whose mean captured attention is to reach the target.

        Raises NotTrainedError, CompatibilityError for a router that does not predict the attention outside sinks and window,
        LengthError if no query lies past the window of a sealed sequence, and as `train` does. The index is unchanged then.
        """
        if not self.is_trained:
            raise NotTrainedError("calibrate: expected a trained index, got one without key_quantizer and query_router")
        sequences, layer = self._arguments.sequences(keys, queries, positions), self._trained
        parts = layer.quantizer, layer.router, layer.rope, self.layout, layer.scale
        measured: dict[str, Any] = {"calibration": calibrate(sequences, *parts, confidence)}
        if values is not None:
            measured["sampling"] = calibrate_sampling(self._arguments.with_values(sequences, values), *parts)
        self._set_trained(**measured)

    # -- adding -------------------------------------------------------------------------------------------------------

    def add(
        self, keys: Any, values: Any, *, lengths: Sequence[int] | None = None, coarse_keys: Any = None, seal: bool = True,
        seq_len: int | Sequence[int] | None = None,
    ) -> None:
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
            return ops.trace_add(self, keys, values, lengths is None and coarse_keys is None and seq_len is None, seal)
        steady = self._steady.add
        if steady is not None and steady(
            keys, values, self._lists, self._session, self._trained, lengths, coarse_keys, seq_len, seal
        ):
            return
        if self._prepared_quantizer is None:
            raise NotTrainedError("add: expected a trained index, got one without key_quantizer; call train or set it")
        capturing = self._capturing()
        if capturing is not None:
            return self._record_add(capturing, keys, values, lengths is None and coarse_keys is None)
        keys, values, counts = self._arguments.tokens(keys, values, lengths, self.lengths)
        list_nos = None
        if coarse_keys is not None:
            if self.tower is not None and (self._lists is None or not any(self._lists.segments)):
                raise StateError("coarse_keys: expected lists to assign them to, got a tower, which is yet to make them")
            coarse = self._arguments.coarse_keys(coarse_keys, keys.shape)
            list_nos = torch.stack([self._backend.assign(self._prepared_quantizer, x, None) for x in coarse])
        by_length = self._rotates_by_length or seq_len is not None
        rotated = rotation_lengths(self._trained.rope, self._lists, counts, seq_len) if by_length else None
        self._append(keys, values, counts, list_nos, seal, rotated)

    def add_preassigned(
        self, keys: Any, values: Any, list_nos: Any, *, lengths: Sequence[int] | None = None,
        seq_len: int | Sequence[int] | None = None,
    ) -> None:
        """`add` with the list numbers given: int32 or int64 (b, h, n), in [0, nlist). Needs no trained quantizer."""
        self._refuse_capture("add_preassigned")
        keys, values, counts = self._arguments.tokens(keys, values, lengths, self.lengths)
        nos = self._arguments.list_nos(list_nos, "b h n", tuple(keys.shape[:3]), least=0)
        self._append(keys, values, counts, nos, rotated=rotation_lengths(self._trained.rope, self._lists, counts, seq_len))

    def note_rotation(self, n: int, seq_len: int) -> None:
        """Correct the ``seq_len`` of `add` for the n newest tokens of every sequence, which are not sealed yet."""
        note_rotation(self.rope, self.invlists, n, seq_len)

    def seal(self) -> None:
        """Bring tokens that were added with ``seal=False`` to where a plain `add` would have put them."""
        self._refuse_capture("seal")
        session = self._present_session()
        if session is not None:
            session.follow_stream()  # and not synchronize: as `add`, it does not wait for the device
        with self._whole():
            if self._lists is not None:
                self._make_lists(self._lists)
                self._lists.seal(self._assign_rows, last=True)
        if session is not None:
            session.changed()

    @within("_changing")
    def rearrange(self) -> None:
        """Bring tokens that lie as in another version of this library, as in a file of before, to where `add` puts them."""
        if self._lists is not None:
            self._lists.rearrange(self._assign_rows)

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
        if seal:
            with self._whole():
                self._make_lists(session.lists)
                session.lists.seal(self._assign_rows, last=True)
            session.publish()
        if problem is not None:
            raise problem

    def seal_ahead(self, n: int = 1) -> None:
        """Seal what the next n tokens of every sequence make due, 1 <= n <= 8, before a replay brings them: it then reads what a
        step without a graph would read. They have to come next.

        Does not wait for the device. Raises StateError for a backend without graphs, inside a capture, or if the device held more
        or fewer tokens than the index when it last sealed; NotFiniteError if a step before that brought NaN or infinity.
        """
        session = self._device_session("seal_ahead")
        session.refuse_capture("seal_ahead")
        checks.integer(n, "n", 1, MAX_STEP_TOKENS)
        if any(map(self._options.layout.num_blocks, (x + n for x in self.lengths))):
            session.follow_stream()
            with self._whole():
                session.lists.seal_ahead(n, self._assign_rows)
            session.changed()

    def _append(
        self, keys: Tensor, values: Tensor, counts: list[int], list_nos: Tensor | None, seal: bool = True,
        rotated: list[int] | None = None,
    ) -> None:
        lists = self._lists
        same_batch = lists is not None and lists.batch == keys.shape[0]
        if lists is not None and same_batch and list_nos is None and keys.shape[2] and lists.only_grows(counts, seal):
            session = self._session_of(lists)
            session.append(keys, values, counts, None, rotated)  # nearly every step: nothing is left half done
            if seal and rotated is None and self._backend.captures:
                self._steady.note_add(session, keys, values, counts, (lists, session, self._trained, None, None, None, True))
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
        if self._rotates_by_length:
            session.refuse_capture("a rope whose angles depend on the length")
        self._refuse_lists_to_come(session)
        keys, values = self._arguments.step_tokens(keys, values, session.lists.batch)
        session.record_append(keys, values)

    # -- searching ----------------------------------------------------------------------------------------------------

    def search_attend(
        self, queries: Any, *, params: SearchParametersIVF | None = None, coarse_queries: Any = None, return_lse: bool = False,
        return_error: bool = False,
    ) -> Any:
        """Attention of the newest tokens over what the index holds, reading only what the router expects to matter.

        Parameters
        ----------
        queries : float32, bfloat16 or float16 (b, hq, q, d), rotated as attention expects, 1 <= q <= 8. They belong to the
            last q tokens added: query i of q does not see the q - 1 - i newest tokens (speculative decoding).
        params : replaces the index's own parameters for this call.
        coarse_queries : float (b, hq, q, d), what to route in place of the queries with RoPE undone.
        return_lse : also return the log of the softmax denominator, for `merge_states`.
        return_error : also return how far off ``out`` may be, by its sampled part. Reads the selected rows once more: not for
            the decode path, and not inside a capture or a compiled step.

        Returns
        -------
        out : dtype of queries (b, hq, q, e): one softmax over sinks, recent tokens and the selected ones.
        lse : float32 (b, hq, q), natural log, if asked for. Nothing to attend: out = 0, lse = -inf.
        error : float32 (b, hq, q), if asked for: the standard error of ``out``, an estimate of the Euclidean norm of its distance
            from attention over all tokens that had a chance to be sampled. 0 where nothing was sampled, which says nothing of
            what is unread. It leaves out what the cap on the logits makes of the mean, and tokens too unlikely to be sampled.

        Raises NotTrainedError without a router (but for an index that never held a token, which gives zeros), ShapeError,
        DTypeError, DeviceError, LayoutError, ParameterError. NaN in a query gives NaN in its own output, and an arbitrary
        selection to its group.
        """
        if torch.compiler.is_compiling():
            return ops.trace_search(self, queries, params, coarse_queries is None and not return_error, return_lse)
        steady = self._steady.search
        if steady is not None and not return_error:
            by = self._lists, self._session, self._trained, self._options, params, coarse_queries, return_lse
            if (out := steady(queries, *by)) is not None:
                self._last = steady.chosen
                return out
        lists = self._lists
        x, form = self._arguments.queries(queries, lists)
        if lists is None:
            out, lse = empty_state(x, self.d_v)
            return form.attention(out, lse, return_lse, torch.zeros_like(lse) if return_error else None)
        if coarse_queries is None and not return_error:
            settings, session = self._settings(params), self._session_of(lists)
            if params is None or not self._options.exceeded_by(settings):
                self._refuse_lists_to_come(session)
                out, lse, self._last = session.run(x, self._trained, self._prepared_router, settings)
                if self._backend.captures and not return_lse:
                    by = lists, session, self._trained, self._options, params, None, False
                    self._steady.note_search(session, queries, x, self._last, by)
                return form.attention(out, lse, return_lse)
            session.refuse_capture("a larger window or more sinks than the index has")
        return self._attend(x, self._select(x, params, coarse_queries), form, return_lse, return_error)

    def search_attend_preassigned(
        self, queries: Any, list_nos: Any, *, params: SearchParametersIVF | None = None, return_lse: bool = False
    ) -> Any:
        """`search_attend` over whole lists given by number: int32 or int64 (b, h, p), -1 for none, duplicates once.

        Sinks and recent tokens are read besides. Of ``params`` only window and sinks apply.
        """
        self._refuse_capture("search_attend_preassigned")
        x, form = self._arguments.queries(queries, self._lists)
        nos = self._arguments.list_nos(list_nos, "b h p", (x.shape[0], self.num_kv_heads, None), least=-1)
        if self._lists is None:
            return form.attention(*empty_state(x, self.d_v), return_lse)
        selection = select_lists(self._lists, nos, SearchParametersIVF() if params is None else params)
        return self._attend(x, selection, form, return_lse)

    def search(self, queries: Any, k: int, *, params: SearchParametersIVF | None = None) -> tuple[Any, Any]:
        """The k keys of largest inner product among the tokens that each query would read: FAISS's search, for inspection.

        queries : as in `search_attend`, any q, and every query on its own. Returns scores : float32 (b, hq, q, k), descending,
        not scaled, and ids : int64 (b, hq, q, k), positions; -inf and -1 where fewer than k tokens were read.
        """
        checks.integer(k, "k", 1)
        x, form = self._arguments.queries(queries, self._lists, any_number=True)
        if self._lists is None or not x.shape[3]:
            scores, ids = best_of_none(x, k)
        else:
            self._last = self._select_each(x, params)
            scores, ids = best_of(self._backend, self._lists, x, self._last, k)
        return form.output(scores.flatten(1, 2)), form.output(ids.flatten(1, 2))

    def assign(self, queries: Any, k: int = 1, *, params: SearchParametersIVF | None = None) -> Any:
        """The ids of `search` alone, as FAISS's assign: int64 (b, hq, q, k). The list of a key: ``key_quantizer.assign``."""
        return self.search(queries, k, params=params)[1]

    def select(self, queries: Any, *, params: SearchParametersIVF | None = None, coarse_queries: Any = None) -> Selection:
        """The first half of `search_attend`: which rows it would read. `read_ids` gives the tokens in them."""
        x, _ = self._arguments.queries(queries, self._lists)
        return self._select(x, params, coarse_queries)

    def attend_selected(self, queries: Any, selection: Selection, *, return_lse: bool = False) -> Any:
        """The second half of `search_attend`: one softmax over a selection made since the last change of the index.

        Raises StateError for one of before, and as `search_attend` does for the queries.
        """
        self._refuse_capture("attend_selected")
        x, form = self._arguments.queries(queries, self._lists)
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
            queries = self._arguments.coarse_queries(coarse_queries, lists, x.shape)
        layer = self._trained, self._prepared_router
        selection = self._session_of(lists).select(queries, *layer, settings, coarse_queries is not None)
        return extend_to_window(lists, selection, settings)

    def _select_each(self, x: Tensor, params: SearchParametersIVF | None) -> Selection:
        """`_select` for every query on its own, see `SearchSession.select_each`."""
        self._refuse_capture("a selection apart from attention")
        settings, session = self._settings(params), self._session_of(self.invlists)
        if self._options.exceeded_by(settings) or self._backend.captures:
            return side_by_side([self._select(x[:, :, :, j : j + 1].contiguous(), params, None) for j in range(x.shape[3])])
        return session.select_each(x, self._trained, self._prepared_router, settings)

    def _attend(self, x: Tensor, selection: Selection, form: ArrayForm, return_lse: bool, return_error: bool = False) -> Any:
        self._last = selection
        out, lse = attend(self._backend, self.invlists, x, selection, self.scale, causal=True)
        error = sample_error(self.invlists, x, selection, out, lse, self.scale) if return_error else None
        return form.attention(out, lse, return_lse, error)

    # -- shrinking, copying, memory -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget every token; keep the training and the memory. The next `add` may bring another batch size."""
        if (session := self._present_session()) is not None:
            session.invalidate()
        with self._whole():
            if self._lists is not None:
                self._lists.clear()
            self._last = None
        if session is not None:
            session.changed()

    @within("_changing")
    def truncate(self, n: int | Sequence[int]) -> None:
        """Keep the first n tokens of every sequence (or n[i] of sequence i), in the state they were in at that length.

        Raises LengthError beyond the end, ShapeError for another number of sequences; the index is unchanged then.
        """
        keep = checks.kept(n, None if self._lists is None else self._lists.lengths)
        if self._lists is not None:
            for i, count in enumerate(keep):
                self._lists.truncate(i, count, self._assign_rows)

    @within("_changing")
    def remove_ids(self, ids: Any, *, close_gaps: bool = False) -> int:
        """Take tokens out: int64 ids (n,) in every sequence, or one such array per sequence. Others keep their positions.

        Ids that are not stored are ignored, as in FAISS. Returns the number of tokens removed, summed over the sequences.
        close_gaps : those behind a removed one move up, as if it had never been there; for padding, whose place the model did
            not count when it rotated the others.
        """
        lists = self._lists
        if lists is None:
            return 0
        chosen = checks.ids_per_sequence(ids, lists.batch)
        return sum(lists.remove(i, x, self._assign_rows, close_gaps) for i, x in enumerate(chosen))

    def reconstruct(self, ids: Any, sequence: int = 0) -> tuple[Any, Any]:
        """Keys (h, n, d) and values (h, n, e) of the tokens with these ids, as they were added; of sealed ones with ``storage``,
        what their codes stand for.

        Raises LengthError for an id that is not stored, ParameterError for a sequence that is not there.
        """
        positions = checks.token_ids([ids] if isinstance(ids, int | np.integer) else ids, "ids")
        sequence = checks.integer(sequence, "sequence", 0, max(0, len(self.lengths) - 1))
        if not self.ntotal and len(positions):
            raise LengthError(f"ids: expected ids that are stored, got {positions[0]}")
        return self.invlists.rows(sequence, rows_of(self.invlists.row_ids(sequence), positions))

    @within("_in_step")
    def fork(self, sequences: Sequence[int] | None = None) -> Self:
        """An independent copy with the same training, of all sequences or of those named, in that order (beam search).

        Copies the tokens in use: the cost is that of reading and writing them once.
        """
        new = self._clone()
        if self._lists is not None:
            batch = self._lists.batch
            new._lists = self._lists.fork(checks.sequences(range(batch) if sequences is None else sequences, batch))
        return new

    def __copy__(self, memo: Any = None) -> Self:
        """A copy is a `fork`: tokens of its own, the training shared."""
        return self.fork()

    __deepcopy__ = __copy__

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StateError("pickle: expected write_index and read_index, which keep an index in a file, got an index to pickle")

    @within("_changing")
    def reorder(self, sequences: Sequence[int]) -> None:
        """Sequence i becomes what sequences[i] was, in place (a step of beam search): `fork`, but sequences that stem from one
        another copy only what came since. Raises ShapeError for another number of sequences, ParameterError for one not there.
        """
        if self._lists is not None:
            self._lists.reorder(checks.sequences(map(int, sequences), self._lists.batch, complete=True))

    @within("_in_step")
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
        new._steady = SteadySteps()
        if device is not None:
            new.device, new._backend, new.backend_name = device, get_backend(device), None
            new._options.check_backend(new._backend, device)
            new._trained = self._trained.to(device)
            new._prepare()
        new._arguments = Arguments(new._options, new.device)
        new._number, new._token = ops.register(new)
        return new

    @within("_changing")
    def reserve_memory(self, n: int, batch: int | None = None) -> None:
        """Make room for n tokens per sequence, so that no `add` up to there allocates. ``batch``: for an empty index."""
        checks.integer(n, "n", 0)
        size = checks.integer(batch, "batch", 1) if batch is not None else max(1, len(self.lengths))
        if self._lists is None or (self._lists.batch != size and not self.ntotal):
            self._lists = self._new_lists(size)
        elif self._lists.batch != size:
            raise ShapeError(f"batch: expected {self._lists.batch}, the sequences stored, got {size}")
        self._lists.reserve(n)

    @within("_changing")
    def reclaim_memory(self) -> int:
        """Give back memory that no token uses; returns the bytes freed."""
        return 0 if self._lists is None else self._lists.reclaim()

    @within("_in_step")
    def stats(self) -> IndexStats:
        """What the index holds, and what its last search read. Reads device memory: not for the decode path."""
        if (session := self._present_session()) is not None:
            self._last = session.newest(self._last)
        return gather(self._lists, self._last, self.key_quantizer, self.query_router)

    def _new_lists(self, batch: int) -> SegmentedInvertedLists:
        shape = (batch, self.num_kv_heads, self.d, self.d_v, self.nlist)
        return SegmentedInvertedLists(self._backend, self._options.layout, *shape, self.dtype, self._options.code)

    # -- FAISS --------------------------------------------------------------------------------------------------------

    def to_faiss(self, sequence: int = 0, head: int = 0) -> tuple[Any, np.ndarray]:
        """One KV head of one sequence as a FAISS `IndexIVFFlat` with the same lists, and its values by id; see `interop`."""
        return interop.to_faiss(self, sequence, head)

    @classmethod
    def from_faiss(cls, faiss_index: Any, values: np.ndarray, **options: Any) -> AsymmetricIndex:
        """An index of one head with the lists of a FAISS `IndexIVFFlat` of ids 0 to n - 1; values : float32 (n, e) by id.

        ``options`` are those of the constructor. Queries are routed as FAISS does: by inner product with the centroids.
        Raises CompatibilityError for another kind of index, ParameterError for other ids, ShapeError.
        """
        return interop.from_faiss(cls, faiss_index, values, options)

    # -- attributes of a FAISS IVF index ------------------------------------------------------------------------------

    d = Field[int]("_options.d", "Key and query dim.")
    d_v = Field[int]("_options.d_v", "Value dim.")
    nlist = Field[int]("_options.nlist", "Inverted lists per KV head.")
    num_heads = Field[int]("_options.num_heads", "Query heads.")
    num_kv_heads = Field[int]("_options.num_kv_heads", "KV heads; query head i uses KV head i // (num_heads / num_kv_heads).")
    dtype = Field[torch.dtype]("_options.dtype", "Of stored keys and values.")
    storage = Field["str | None"]("_options.storage", "What sealed keys and values are stored as; None: as ``dtype`` says.")
    layout = Field[Layout]("_options.layout", "Which tokens are sinks, recent and sealed.")
    window = Field[int]("_options.layout.window", "Recent tokens always read, at least. Setting it re-sorts what is stored.")
    sinks = Field[int]("_options.layout.sinks", "First tokens always read. Setting it re-sorts what is stored.")
    mean_run_tokens = Field[int](
        "_options.layout.mean_run_tokens", "Tokens per run of a segment that keeps the means of its runs; 0: none. Re-sorts."
    )
    break_even = Field[int]("_options.layout.break_even", "Shorter sequences are not sealed. Setting it re-sorts what is stored.")
    nprobe = Field["int | None"](
        "_options.params.nprobe", "Lists visited per query (as published); setting it unsets selectivity, target_mass and tail."
    )
    selectivity = Field["float | None"](
        "_options.params.selectivity",
        "Share of the sealed tokens read, or the most of them with `target_mass`; setting it unsets `nprobe`.",
    )
    target_mass = Field["float | None"](
        "_options.params.target_mass",
        """Attention that each step and KV head is to capture, by the router's estimate; see `SearchParametersIVF`.

        Setting it where it was None makes `selectivity` the cap, 0.25; setting None makes that a budget that is spent.""",
    )
    tail = Field[float]("_options.params.tail", "Share of the budget spent on the means of runs that are not read.", 0.0)
    sampled_share = Field["float | None"](
        "_options.params.sampled_share", "Share of the budget that is spent on a weighted sample; None: as `sampling` says."
    )
    sample_exponent = Field["float | None"](
        "_options.params.sample_exponent", "Of a run's weight in the probability of its tokens; None: as `sampling` says, else 2."
    )
    sample_cap = Field["float | None"](
        "_options.params.sample_cap", "Most that the logit of a sampled token is raised by; None: as `sampling` says, else 2."
    )
    max_codes = Field[int]("_options.params.max_codes", "Most sealed tokens read per KV head; 0 means no limit.", 0)
    options = Field[IndexOptions]("_options", "Shapes, dtype, layout and default search parameters, as one record.")
    trained = Field[TrainedLayer]("_trained", "What is trained of this layer, for `Routers` and `load_trained` of another index.")
    is_trained = Field[bool]("_trained.is_trained", "Whether there are a key quantizer and a query router.")
    rope = Field["Rope | None"]("_trained.rope", "The rotary embedding that is undone to route, or None.")
    scale = Field[float]("_trained.scale", "Of the logits.")
    calibration = Field[Calibration | None](
        "_trained.calibration", "What `target_mass` makes of the router's word, see `calibrate`; None takes it at its word."
    )
    sampling = Field[Sampling | None](
        "_trained.sampling",
        "What of the budget each KV head spends on a weighted sample where the search parameters say nothing; None: nothing.",
    )

    @property
    def ntotal(self) -> int:
        """Tokens stored, summed over the sequences; a token counts once, whatever the heads."""
        return sum(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence; empty before the first `add`."""
        return [] if self._lists is None else list(self._lists.lengths)

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
        replace(self._trained, key_quantizer=quantizer).check(self.num_kv_heads, self.d, self.nlist)
        self._require_empty("key_quantizer")
        self._set_trained(key_quantizer=quantizer.to(self.device))

    @property
    def query_router(self) -> QueryRouter | None:
        """The classifier of queries. One for the same lists may replace it, which drops `calibration` and `sampling`."""
        return self._trained.query_router

    @query_router.setter
    def query_router(self, router: QueryRouter) -> None:
        self._set_trained(query_router=router.to(self.device), calibration=None, sampling=None)

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
            self._set_trained(tower=None)
        else:
            router = self._router_of(tower, self.key_quantizer)
            self._set_trained(tower=tower.to(self.device), query_router=router, calibration=None, sampling=None)

    @property
    def budget_shares(self) -> np.ndarray | None:
        """float32 (h,): what `selectivity` is multiplied with for each KV head; None for 1 each."""
        shares = self._trained.budget_shares
        return None if shares is None else shares.copy()

    @budget_shares.setter
    def budget_shares(self, value: Any) -> None:
        self._set_trained(budget_shares=None if value is None else checks.shares(value, "budget_shares", self.num_kv_heads))

    # -- what is trained, and parameters ------------------------------------------------------------------------------

    def _set_trained(self, **parts: Any) -> None:
        """Other parts of what is trained, checked, and prepared as the backend keeps them; whole or not at all."""
        layer = replace(self._trained, **parts)
        layer.check(self.num_kv_heads, self.d, self.nlist)
        with self._whole():
            self._trained = layer
            self._prepare({"key_quantizer", "query_router"} & parts.keys())

    def _prepare(self, names: Collection[str] = ("key_quantizer", "query_router")) -> None:
        layer = self._trained
        if "key_quantizer" in names and layer.key_quantizer is not None:
            self._prepared_quantizer = self._backend.prepare_quantizer(*layer.key_quantizer.products())
        if "query_router" in names and layer.query_router is not None:
            self._prepared_router = self._backend.prepare_router(layer.query_router.weights)

    def _require_empty(self, name: str) -> None:
        """StateError while tokens are stored."""
        if self.ntotal:
            raise StateError(f"{name}: expected an empty index, got one with {self.ntotal} tokens; call reset first")

    def _router_of(self, tower: TwoTower, quantizer: KeyQuantizer | None) -> QueryRouter:
        """What a new tower makes of the lists there are."""
        tower.check_heads(self.num_kv_heads, self.d)
        if quantizer is None or (self.ntotal and self.tower is None):
            raise StateError("tower: expected an index with a key_quantizer, and with a tower or without tokens, got another")
        return tower.for_lists(quantizer.centroids.to(tower.weights.hidden.device)).to(self.device)

    def _settings(self, params: SearchParametersIVF | None) -> SearchParametersIVF:
        """Checked parameters of one search: those given, over the index's own."""
        if self._prepared_router is None:
            raise NotTrainedError("search: expected a trained index, got one without query_router; call train or set it")
        return self._options.params if params is None else self._options.merged(params)

    @property
    def _assign_rows(self) -> AssignRows:
        """What the inverted lists ask when they seal."""
        return AssignRows(self._backend, self.invlists, self._prepared_quantizer, self._trained.rope, self._rotates_by_length)

    def _make_lists(
        self, lists: SegmentedInvertedLists, keys: Tensor | None = None, counts: Sequence[int] | None = None,
        rotated: Sequence[int] | None = None,
    ) -> None:
        """With a tower, if adding counts[i] of keys : storage dtype (b, h, n, d) seals the first tokens: lists of these very
        sequences, before any token is in one. The calibration stays, for it was measured on lists of their kind.

        rotated : the length at which the new keys of each sequence were rotated, where the angles depend on it.
        """
        tower = self._trained.tower
        if tower is None or any(lists.segments):
            return
        if keys is None or counts is None:
            keys, counts = lists.arena.numbers[0][:, :, :0], [0] * lists.batch
        if any(map(self.layout.num_blocks, map(sum, zip(lists.lengths, counts, strict=True)))):
            session = self._session
            if session is not None and session.lists is lists and session.backend_session.captured:
                raise StateError("tower: expected the lists that a CUDA graph routes to, got tokens that make new ones")
            quantizer, router = prompt_lists(self._backend, tower, lists, keys, counts, rotated, self.rope)
            self._set_trained(key_quantizer=quantizer, query_router=router)
            lists.forget_lists()

    def _set_option(self, name: str, value: Any) -> None:
        options = self._options.changed(name, value)
        if options.layout is self.layout:
            self._options = options
        else:
            self._relayout(options)

    @within("_changing")
    def _relayout(self, options: IndexOptions) -> None:
        self._options = options
        if self._lists is not None:
            self._make_lists(self._lists)
            self._lists.relayout(options.layout, self._assign_rows)

    # -- changes and steps --------------------------------------------------------------------------------------------

    def _whole(self) -> AbstractContextManager[None]:
        """Around a change: it happens whole or not at all, whatever is raised in it; signals are answered after it."""
        return whole(self, _STATE, None if self._lists is None else self._lists.whole())

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around a change: `_in_step`, and whole or not at all."""
        with self._in_step(), self._whole():
            yield

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Host and device agree before it, and after it where a graph may be replayed next."""
        if (session := self._present_session()) is not None:
            session.synchronize()
        yield
        if (session := self._present_session()) is not None:
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
        if (session := self._capturing()) is not None:
            session.refuse_capture(what)

    def _refuse_lists_to_come(self, session: SearchSession) -> None:
        """A graph cannot follow a router that is yet to be made."""
        if self.tower is not None and not any(session.lists.segments):
            session.refuse_capture("a two-tower router before any token is sealed, which is when it makes its lists")

    def release_graphs(self) -> None:
        """Say that no CUDA graph captured over this index is replayed any more: its memory may move again, as `add` asks for."""
        if (session := self._present_session()) is not None:
            session.release_graphs()

    def graph_key(self, params: SearchParametersIVF | None = None) -> tuple[Any, ...]:
        """What a graph of `add` and of `search_attend` with these parameters was made for, beside the shapes of their arguments.

        It may be replayed as long as `same_graph` says so.
        """
        layer, moved = self._trained, None if self._lists is None else self._lists.moved
        trained = layer.query_router, layer.budget_shares, layer.calibration, layer.sampling
        return moved, layer.scale, params, self._options.params, *trained

    def same_graph(self, key: tuple[Any, ...], params: SearchParametersIVF | None = None) -> bool:
        """Whether a graph with this `graph_key` still holds: numbers are the same by value, all else by identity."""
        now = self.graph_key(params)
        return all(x is y or (isinstance(x, int | float) and x == y) for x, y in zip(key, now, strict=True))
