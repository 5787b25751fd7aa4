"""`AsymmetricIndex`: an IVF index over attention keys, with one map for keys and another for queries.

The only stateful public class. It checks arguments, turns parameters into numbers, and calls its parts in one direction:
quantizer and router (maps), invlists (storage), attend (selection and softmax), and through them a backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks, interop
from ._arguments import Form
from ._decode import IndexDecode
from .backends.types import MAX_STEP_TOKENS
from .errors import LengthError, NotTrainedError, ParameterError, ShapeError, StateError
from .routing.calibration import CONFIDENCE, calibrate
from .search.params import SearchParametersIVF
from .search.plan import MOST_PLANS
from .search.select import attend, best_of, select, select_each, select_lists, side_by_side, widen
from .search.selection import Selection, read_ids
from .training.config import TrainingConfig
from .training.layer import train_layer


class AsymmetricIndex(IndexDecode):
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

    __slots__ = ()

    # -- training ------------------------------------------------------------------------------------------------------

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
        keys, queries, places = self._sequences(keys, queries, positions)
        none: list[Any] = [None] * len(keys)
        sequences = list(zip(keys, none if queries is None else queries, none if places is None else places, strict=True))
        settings = self.nlist, self.rope, self._layout, self.scale, TrainingConfig() if config is None else config
        found = train_layer(sequences, *settings)
        with self._whole():
            self.tower = None
            self.key_quantizer, self.query_router = found.quantizer, found.router
            self.tower = found.tower

    def calibrate(self, keys: Any, queries: Any, *, positions: Any = None, confidence: float = CONFIDENCE) -> None:
        """Measure what `target_mass` must ask of the router, on whole sequences that it was not trained on; sets `calibration`.

        keys, queries, positions : as in `train`; some tens of positions of each of four sequences or more are enough.
        confidence : for each KV head, the share of texts whose mean captured attention is to reach the target.

        Raises NotTrainedError, CompatibilityError for a router that does not predict the attention outside sinks and window,
        LengthError if no query lies past the window of a sealed sequence, and as `train` does. The index is unchanged then.
        """
        if self._key_quantizer is None or self._query_router is None:
            raise NotTrainedError("calibrate: expected a trained index, got one without key_quantizer and query_router")
        if not isinstance(confidence, float) or not 0.5 <= confidence < 1:
            raise ParameterError(f"confidence: expected 0.5 <= confidence < 1, got {confidence!r}")
        keys, queries, places = self._sequences(keys, queries, positions)
        parts = self._key_quantizer, self._query_router, self.rope, self._layout, self.scale
        self.calibration = calibrate(keys, queries, places, *parts, confidence)

    def _sequences(self, keys: Any, queries: Any, positions: Any) -> tuple[Tensor, Any, Any]:
        """Checked keys (b, h, n, d), queries (b, hq, q, d) and positions (b, q) of whole sequences; None without queries."""
        keys = self._input(keys, "keys", "b h n d", (None, self.num_kv_heads, None, self.d), checks.STORAGE_DTYPES)
        checks.finite(keys, "keys")
        if queries is None:
            return keys, None, None
        shape = (keys.shape[0], self.num_heads, None, self.d)
        queries = self._input(queries, "queries", "b hq q d", shape, checks.STORAGE_DTYPES)
        checks.finite(queries, "queries")
        return keys, queries, checks.positions(positions, keys.shape[0], queries.shape[2], keys.shape[2])

    # -- adding --------------------------------------------------------------------------------------------------------

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
        keys, values, counts = self._new_tokens(keys, values, lengths)
        list_nos = None
        if coarse_keys is not None:
            if self._tower is not None and (self._lists is None or not any(self._lists.segments)):
                raise StateError("coarse_keys: expected lists to assign them to, got a tower, which is yet to make them")
            coarse = self._input(coarse_keys, "coarse_keys", "b h n d", tuple(keys.shape), checks.STORAGE_DTYPES)
            checks.finite(coarse, "coarse_keys")
            list_nos = torch.stack([self._backend.assign(self._prepared_quantizer, x, None) for x in coarse])
        self._append(keys, values, counts, list_nos, seal, self._rotated_at(counts, seq_len))

    def add_preassigned(
        self, keys: Any, values: Any, list_nos: Any, *, lengths: Sequence[int] | None = None,
        seq_len: int | Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """`add` with the list numbers given: int32 or int64 (b, h, n), in [0, nlist). Needs no trained quantizer."""
        self._refuse_capture("add_preassigned")
        keys, values, counts = self._new_tokens(keys, values, lengths)
        nos = self._list_nos(list_nos, "b h n", tuple(keys.shape[:3]), least=0)
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
                if self._tower is not None:
                    self._repartition(self._lists, self._lists.keys[:, :, :0], [0] * self._lists.batch)
                self._lists.seal(self._assign_rows, last=True)

    def _new_tokens(self, keys: Any, values: Any, lengths: Sequence[int] | None) -> tuple[Tensor, Tensor, list[int]]:
        batch = self._lists.batch if self._lists is not None and self.ntotal else None
        kind: tuple[Any, ...] = ()
        if batch and lengths is None and isinstance(keys, Tensor) and isinstance(values, Tensor):
            kind = batch, *((x.shape, x.stride(), x.dtype, x.device) for x in (keys, values))
            if kind == self._accepted_new and max(self.lengths) + keys.shape[2] < 2**31:  # a decode step is like the last
                return keys.detach(), values.detach(), [keys.shape[2]] * batch
        plain = kind if kind and keys.ndim == 4 == values.ndim else ()
        keys = self._input(keys, "keys", "b h n d", (batch, self.num_kv_heads, None, self.d), (self.dtype,))
        b, h, n, _ = keys.shape
        if not b:
            raise ShapeError("keys: expected at least one sequence, got none")
        values = self._input(values, "values", "b h n e", (b, h, n, self.d_v), (self.dtype,))
        counts = [n] * b if lengths is None else checks.counts(lengths, b, n)
        if batch and max(self.lengths) + max(counts) >= 2**31:
            raise LengthError(f"add: expected fewer than 2**31 tokens per sequence, got {max(self.lengths) + max(counts)}")
        self._accepted_new = plain
        return keys, values, counts

    def _append(
        self, keys: Tensor, values: Tensor, counts: list[int], list_nos: Tensor | None, seal: bool = True,
        rotated: list[int] | None = None,
    ) -> None:  # fmt: skip
        lists = self._lists
        same_batch = lists is not None and lists.batch == keys.shape[0]
        if lists is not None and same_batch and list_nos is None and keys.shape[2] and lists.only_grows(counts, seal):
            lists.append(keys, values, counts, None, None, rotated)  # nearly every step: nothing that could be left half done
            return
        with self._whole():
            if lists is None or (not same_batch and not self.ntotal):
                lists = self._new_lists(keys.shape[0])
            if self._tower is not None and list_nos is None and seal:
                self._repartition(lists, keys, counts, rotated)
            self._lists = lists  # assigning reads it
            state = self._decode_state()
            if state is not None and (list_nos is not None or keys.shape[2] > MAX_STEP_TOKENS):
                state.settle()
            lists.append(keys, values, counts, list_nos, self._assign_rows if seal else None, rotated)
        if state is not None:
            state.follow()

    def _rotated_at(self, counts: list[int], seq_len: int | Sequence[int] | None) -> list[int] | None:
        """The length that the angles of counts[i] new tokens of each sequence belong to; None if they depend on none."""
        if seq_len is not None:
            lengths = checks.counts(seq_len, len(counts), 2**31 - 1, "seq_len")
        if self.rope is None or not self.rope.is_dynamic:
            return None
        if seq_len is None:
            before = [self.invlists.next_position(i) for i in range(len(counts))] if self.ntotal else [0] * len(counts)
            lengths = [start + count for start, count in zip(before, counts, strict=True)]
        return [self.rope.effective_length(n) for n in lengths]

    # -- searching -----------------------------------------------------------------------------------------------------

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
        x, form = self._queries(queries)
        if self._lists is None:
            return self._nothing(x, form, return_lse)
        found = self._fused(x, self._settings(params)) if coarse_queries is None else None
        if found is not None:
            return self._result(*found, form, return_lse)
        return self._attend(x, self._select(x, params, coarse_queries), form, return_lse)

    def search_attend_preassigned(
        self, queries: Any, list_nos: Any, *, params: SearchParametersIVF | None = None, return_lse: bool = False
    ) -> Any:
        """`search_attend` over whole lists given by number: int32 or int64 (b, h, p), -1 for none, duplicates once.

        Sinks and recent tokens are read besides. Of ``params`` only window and sinks apply.
        """
        self._refuse_capture("search_attend_preassigned")
        x, form = self._queries(queries)
        nos = self._list_nos(list_nos, "b h p", (x.shape[0], self.num_kv_heads, None), least=-1)
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
        x, form = self._queries(queries, any_number=True)
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
        x, _ = self._queries(queries)
        return self._select(x, params, coarse_queries)

    def attend_selected(self, queries: Any, selection: Selection, *, return_lse: bool = False) -> Any:
        """The second half of `search_attend`: one softmax over a selection made since the last change of the index.

        Raises StateError for one of before, and as `search_attend` does for the queries.
        """
        self._refuse_capture("attend_selected")
        x, form = self._queries(queries)
        if selection.lengths != self.lengths:
            raise StateError(f"selection: expected one made at lengths {self.lengths}, got {selection.lengths}")
        selection.check(self.invlists)
        return self._attend(x, selection, form, return_lse)

    def read_ids(self, selection: Selection) -> list[list[Tensor]]:
        """Ids (positions) of every token that ``selection`` reads: [sequence][KV head] -> int64 (t,), ascending."""
        return read_ids(self.invlists, selection)

    def _select(self, x: Tensor, params: SearchParametersIVF | None, coarse_queries: Any) -> Selection:
        self._refuse_capture("a selection apart from attention")
        lists, params = self.invlists, self._settings(params)
        assert self._query_router is not None
        found = self._resident_select(x, params) if coarse_queries is None else None
        if found is not None:
            return widen(lists, found, params)
        routed, rotation = x, None
        if coarse_queries is not None:
            routed, _ = self._queries(coarse_queries)
            if routed.shape != x.shape:
                raise ShapeError(f"coarse_queries: expected {x.shape[3]} queries per sequence, got {routed.shape[3]}")
        elif self.rope is not None:
            rotation = self._query_rotation(x.shape[3])
        shares, miss = self._given(params)
        router, prepared = self._query_router, self._prepared_router
        return select(self._backend, lists, router, prepared, routed, rotation, params, shares, miss)

    def _select_each(self, x: Tensor, params: SearchParametersIVF | None) -> Selection:
        """`_select` for every query on its own, see `select.select_each`."""
        self._refuse_capture("a selection apart from attention")
        settings, q = self._settings(params), x.shape[3]
        wide = (settings.window or 0) > self.window or (settings.sinks or 0) > self.sinks
        if wide or self._decode_state() is not None:
            return side_by_side([self._select(x[:, :, :, j : j + 1].contiguous(), params, None) for j in range(q)])
        assert self._query_router is not None
        rotation = None if self.rope is None else self._query_rotation(1)
        router = self._query_router, self._prepared_router
        return select_each(self._backend, self.invlists, *router, x, rotation, settings, *self._given(settings))

    def _settings(self, params: SearchParametersIVF | None) -> SearchParametersIVF:
        """Checked parameters of one search: those given, over the index's own."""
        if self._query_router is None:
            raise NotTrainedError("search: expected a trained index, got one without query_router; call train or set it")
        if params is not None and not isinstance(params, SearchParametersIVF):
            raise ParameterError(f"params: expected SearchParametersIVF or None, got {type(params).__name__}")
        if params is None:
            return self._defaults
        defaults, known = self._asked
        if defaults is not self._defaults or len(known) > MOST_PLANS:
            known = {}
            self._asked = self._defaults, known
        found: SearchParametersIVF | None = known.get(params)
        if found is None:
            known[params] = found = self._checked(params.over(self._defaults))
        return found

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

    # -- FAISS ---------------------------------------------------------------------------------------------------------

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
