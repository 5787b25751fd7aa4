"""`AsymmetricIndex`: an IVF index over attention keys, with one map for keys and another for queries.

The only stateful public class. It checks arguments, turns parameters into numbers, and calls its parts in one direction:
quantizer and router (maps), inverted lists (storage), search (selection and softmax), and through them a backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from . import checks, interop, ops
from .backends import Frequencies, Rotation, get_backend
from .backends.types import MAX_STEP_TOKENS, Routing
from .errors import CompatibilityError, LengthError, NotTrainedError, ParameterError, ShapeError, StateError
from .invlists.layout import MAX_QUERY_TOKENS, Layout
from .invlists.segmented import SegmentedInvertedLists
from .routing.calibration import CONFIDENCE, Calibration, calibrate
from .routing.quantizer import MAX_POINTS_PER_CENTROID, KeyQuantizer
from .routing.rope import Rope
from .routing.router import QueryRouter
from .routing.two_tower import TwoTower
from .search.params import SELECTIVITY, SearchParametersIVF
from .search.plan import MOST_PLANS
from .search.select import attend, best_of, extend_to_window, select_lists, side_by_side
from .search.selection import Selection, read_ids
from .search.session import SearchSession, Terms
from .search.stats import IndexStats, gather
from .training.config import TrainingConfig
from .training.layer import train_layer
from .whole import signals_wait

MAX_DIM = 256

_STATE = (
    "_calibration", "_key_quantizer", "_last", "_layout", "_lists", "_miss", "_prepared_quantizer", "_prepared_router",
    "_query_router", "_session", "_tower",
)  # fmt: skip
"""What a change may set."""


@dataclass(frozen=True)
class Form:
    """How an argument came, and so how results go back: as NumPy arrays, as (n, d)."""

    numpy: bool
    flat: bool

    def output(self, x: Tensor) -> Any:
        x = x[0, 0] if self.flat else x
        return x.cpu().numpy() if self.numpy else x


_PLAIN = Form(False, False)


class AssignRows:
    """`Assign` of an index."""

    __slots__ = ("_index",)

    def __init__(self, index: AsymmetricIndex) -> None:
        self._index = index

    def __call__(self, i: int, start: int, stop: int) -> Tensor:
        return self._index._lists_of_rows(i, start, stop)

    def by_position(self) -> tuple[Any, Frequencies | None] | None:
        index, rope = self._index, self._index.rope
        if rope is None:
            return index._prepared_quantizer, None
        return None if rope.is_dynamic else (index._prepared_quantizer, rope.frequencies(index.device))


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
        "_accepted",
        "_accepted_new",
        "_asked",
        "_backend",
        "_budget_shares",
        "_calibration",
        "_defaults",
        "_key_quantizer",
        "_last",
        "_layout",
        "_lists",
        "_miss",
        "_number",
        "_prepared_quantizer",
        "_prepared_router",
        "_query_router",
        "_session",
        "_token",
        "_tower",
        "backend_name",
        "d",
        "d_v",
        "device",
        "dtype",
        "nlist",
        "num_heads",
        "num_kv_heads",
        "rope",
        "scale",
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
        for name, dim in (("d", d), ("d_v", d if d_v is None else d_v)):
            if checks.integer(dim, name, 8, MAX_DIM) % 8:
                raise ParameterError(f"{name}: expected a multiple of 8, got {dim}")
        self.d, self.d_v = int(d), int(d if d_v is None else d_v)
        self.nlist = checks.integer(nlist, "nlist", 1, 65535)
        self.num_heads = checks.integer(num_heads, "num_heads", 1)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else checks.integer(num_kv_heads, "num_kv_heads", 1)
        if self.num_heads % self.num_kv_heads:
            raise ParameterError(f"num_heads: expected a multiple of num_kv_heads = {self.num_kv_heads}, got {num_heads}")
        if dtype not in checks.STORAGE_DTYPES:
            raise ParameterError(f"dtype: expected one of {checks.STORAGE_DTYPES}, got {dtype!r}")
        if rope is not None and not isinstance(rope, Rope):
            raise ParameterError(f"rope: expected a saap_index.Rope or None, got {type(rope).__name__}")
        if rope is not None and rope.head_dim != self.d:
            raise CompatibilityError(f"rope: expected head_dim = {self.d}, got {rope.head_dim}")
        if scale is not None and (not isinstance(scale, int | float | np.number) or not 0 < float(scale) < np.inf):
            raise ParameterError(f"scale: expected a positive number, got {scale!r}")
        self.scale = float(self.d**-0.5 if scale is None else scale)
        self._layout = Layout(sinks, window, seal_tokens, max_segment, break_even, mean_run_tokens)
        asked = SearchParametersIVF(
            nprobe=nprobe, selectivity=selectivity, target_mass=target_mass, max_codes=max_codes, tail=tail
        )
        self._defaults = self._checked(asked.over(SearchParametersIVF(selectivity=SELECTIVITY)))
        self._budget_shares: np.ndarray | None = None
        self.budget_shares = budget_shares
        self.dtype, self.rope = dtype, rope
        named = checks.named_device(device)
        self._backend = get_backend(named, backend)  # which has the better words where its device cannot serve
        self.device = checks.device(getattr(self._backend, "device", named))
        self.backend_name = backend
        self._key_quantizer: KeyQuantizer | None = None
        self._query_router: QueryRouter | None = None
        self._calibration: Calibration | None = None
        self._miss: tuple[float, Tensor] | None = None
        self._asked: tuple[Any, dict[Any, Any]] = (None, {})  # the defaults, and what the parameters of calls came to over them
        self._accepted: tuple[Any, ...] = ()  # what the last queries that passed the checks were
        self._accepted_new: tuple[Any, ...] = ()  # and the last keys and values
        self._tower: TwoTower | None = None
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
            if self._tower is not None:
                self._repartition(session.lists, session.lists.keys[:, :, :0], [0] * session.lists.batch)
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
        if any(map(self._layout.num_blocks, (x + n for x in self.lengths))):
            with self._changing():
                session.lists.seal_ahead(n, self._assign_rows)

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
            self._session_of(lists).append(keys, values, counts, None, rotated)  # nearly every step: nothing is left half done
            return
        with self._whole():
            if lists is None or (not same_batch and not self.ntotal):
                lists = self._new_lists(keys.shape[0])
            if self._tower is not None and list_nos is None and seal:
                self._repartition(lists, keys, counts, rotated)
            self._lists = lists  # assigning reads it
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
        shape = (session.lists.batch, self.num_kv_heads, None, self.d)
        keys = self._input(keys, "keys", "b h n d", shape, (self.dtype,))
        values = self._input(values, "values", "b h n e", (*keys.shape[:3], self.d_v), (self.dtype,))
        session.record_append(keys, values)

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
        x, form = self._queries(queries)
        lists = self._lists
        if lists is None:
            return self._nothing(x, form, return_lse)
        if coarse_queries is None:
            settings, session = self._settings(params), self._session_of(lists)
            if not self._reads_more(settings):
                self._refuse_lists_to_come(session)
                routing = self._routing(session, x.shape[3])
                out, lse, self._last = session.run(x, self._terms(settings), routing, self.scale)
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

    def _reads_more(self, params: SearchParametersIVF) -> bool:
        """Whether the call asks for a larger window or more sinks than the index has."""
        return (params.window or 0) > self._layout.window or (params.sinks or 0) > self._layout.sinks

    def _select(self, x: Tensor, params: SearchParametersIVF | None, coarse_queries: Any) -> Selection:
        self._refuse_capture("a selection apart from attention")
        lists, settings, queries = self.invlists, self._settings(params), x
        if coarse_queries is not None:
            queries, _ = self._queries(coarse_queries)
            if queries.shape != x.shape:
                raise ShapeError(f"coarse_queries: expected {x.shape[3]} queries per sequence, got {queries.shape[3]}")
        session = self._session_of(lists)
        routing = self._routing(session, x.shape[3], coarse_queries is not None)
        return extend_to_window(lists, session.select(queries, self._terms(settings), routing), settings)

    def _select_each(self, x: Tensor, params: SearchParametersIVF | None) -> Selection:
        """`_select` for every query on its own, see `SearchSession.select_each`."""
        self._refuse_capture("a selection apart from attention")
        settings, session = self._settings(params), self._session_of(self.invlists)
        if self._reads_more(settings) or self._backend.captures:
            return side_by_side([self._select(x[:, :, :, j : j + 1].contiguous(), params, None) for j in range(x.shape[3])])
        return session.select_each(x, self._terms(settings), self._routing(session, 1))

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
        new._accepted, new._accepted_new, new._asked = (), (), (None, {})
        if device is not None:
            new.device, new._backend, new.backend_name = device, get_backend(device), None
            if self._key_quantizer is not None:
                new.key_quantizer = self._key_quantizer
            if self._query_router is not None:
                new.query_router = self._query_router
            new.calibration = self._calibration
            new._tower = None if self._tower is None else self._tower.to(device)
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
        return gather(self._lists, self._last, self._key_quantizer, self._query_router)

    def _new_lists(self, batch: int) -> SegmentedInvertedLists:
        shape = (batch, self.num_kv_heads, self.d, self.d_v, self.nlist)
        return SegmentedInvertedLists(self._backend, self._layout, *shape, self.dtype)

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
    def ntotal(self) -> int:
        """Tokens stored, summed over the sequences; a token counts once, whatever the heads."""
        return sum(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence; empty before the first `add`."""
        return [] if self._lists is None else list(self._lists.lengths)

    @property
    def is_trained(self) -> bool:
        return self._key_quantizer is not None and self._query_router is not None

    @property
    def invlists(self) -> SegmentedInvertedLists:
        """The inverted lists of this batch; StateError before the first `add` or `reserve_memory`."""
        if self._lists is None:
            raise StateError("invlists: expected an index that holds a batch, got one without; call add first")
        return self._lists

    @property
    def key_quantizer(self) -> KeyQuantizer | None:
        """The k-means partition. Assigning one checks its shape; StateError while tokens are stored."""
        return self._key_quantizer

    @key_quantizer.setter
    def key_quantizer(self, quantizer: KeyQuantizer) -> None:
        h, nlist, d = quantizer.centroids.shape
        if (h, nlist, d) != (self.num_kv_heads, self.nlist, self.d):
            want = (self.num_kv_heads, self.nlist, self.d)
            raise CompatibilityError(f"key_quantizer: expected centroids {want}, got {(h, nlist, d)}")
        if self.ntotal:
            raise StateError(f"key_quantizer: expected an empty index, got one with {self.ntotal} tokens; call reset first")
        with self._whole():
            self._key_quantizer = quantizer.to(self.device)
            self._prepared_quantizer = self._backend.prepare_quantizer(self._key_quantizer.centroids)

    @property
    def query_router(self) -> QueryRouter | None:
        """The classifier of queries. May be replaced at any time by one for the same lists, which drops `calibration`."""
        return self._query_router

    @query_router.setter
    def query_router(self, router: QueryRouter) -> None:
        router.check_heads(self.num_kv_heads, self.d, self.nlist)
        with self._whole():
            self._query_router = router.to(self.device)
            self._prepared_router = self._backend.prepare_router(self._query_router.weights)
            self._calibration = self._miss = None

    @property
    def tower(self) -> TwoTower | None:
        """A router for any lists, or None. With one, an index has lists of its own for every batch of sequences: k-means over all
        tokens that are there when the first are sealed (with a prompt, all of it), by which `key_quantizer` and `query_router`
        are replaced. So the state follows from how tokens were added, not from the tokens alone.

        Assigning one sets `query_router` for the lists there are. StateError without them, or while tokens are stored.
        """
        return self._tower

    @tower.setter
    def tower(self, tower: TwoTower | None) -> None:
        if tower is not None:
            tower.check_heads(self.num_kv_heads, self.d)
            if self._key_quantizer is None or self.ntotal:
                raise StateError("tower: expected an index with a key_quantizer and without tokens, got another")
            here = tower.to(self.device)
            with self._whole():
                self.query_router = tower.at(self._key_quantizer.centroids.to(tower.weights.hidden.device))
                self._tower = here
        else:
            self._tower = None

    @property
    def calibration(self) -> Calibration | None:
        """What `target_mass` makes of the router's word, see `calibrate`; None takes the router at its word."""
        return self._calibration

    @calibration.setter
    def calibration(self, value: Calibration | None) -> None:
        if value is not None and not isinstance(value, Calibration):
            raise ParameterError(f"calibration: expected a Calibration or None, got {type(value).__name__}")
        if value is not None and len(value.miss) != self.num_kv_heads:
            raise CompatibilityError(f"calibration: expected {self.num_kv_heads} KV heads, got {len(value.miss)}")
        self._miss, self._calibration = None, value

    @property
    def nprobe(self) -> int | None:
        """Lists visited per query, SAAP as published; setting it unsets `selectivity`, `target_mass` and `tail`. None: the budget
        decides."""
        return self._defaults.nprobe

    @nprobe.setter
    def nprobe(self, value: int) -> None:
        self._defaults = SearchParametersIVF(nprobe=value, max_codes=self.max_codes)

    @property
    def selectivity(self) -> float | None:
        """Share of the sealed tokens read, or the most of them with `target_mass`; setting it unsets `nprobe`."""
        return self._defaults.selectivity

    @selectivity.setter
    def selectivity(self, value: float) -> None:
        self._defaults = SearchParametersIVF(
            selectivity=value, target_mass=self.target_mass, max_codes=self.max_codes, tail=self._defaults.tail
        )

    @property
    def target_mass(self) -> float | None:
        """Attention that each step and KV head is to capture, by the router's estimate; see `SearchParametersIVF`.

        Setting it where it was None makes `selectivity` the cap, 0.25; setting None makes that a budget that is spent.
        """
        return self._defaults.target_mass

    @target_mass.setter
    def target_mass(self, value: float | None) -> None:
        if value is None:
            budget = SearchParametersIVF(nprobe=self.nprobe, selectivity=self.selectivity)
        else:
            budget = SearchParametersIVF(target_mass=value)
        self._defaults = budget.over(self._defaults)

    @property
    def tail(self) -> float:
        """Share of the budget spent on the means of runs that are not read."""
        return self._defaults.tail or 0.0

    @tail.setter
    def tail(self, value: float) -> None:
        self._defaults = self._checked(SearchParametersIVF(tail=value).over(self._defaults))

    @property
    def budget_shares(self) -> np.ndarray | None:
        """float32 (h,): what `selectivity` is multiplied with for each KV head; None for 1 each."""
        return None if self._budget_shares is None else self._budget_shares.copy()

    @budget_shares.setter
    def budget_shares(self, value: Any) -> None:
        self._budget_shares = None if value is None else checks.shares(value, "budget_shares", self.num_kv_heads)

    @property
    def max_codes(self) -> int:
        """Most sealed tokens read per KV head; 0 means no limit."""
        return self._defaults.max_codes or 0

    @max_codes.setter
    def max_codes(self, value: int) -> None:
        self._defaults = SearchParametersIVF(max_codes=value).over(self._defaults)

    @property
    def window(self) -> int:
        """Recent tokens always read, at least. Setting it re-sorts what is stored."""
        return self._layout.window

    @window.setter
    def window(self, value: int) -> None:
        self._relayout(window=value)

    @property
    def sinks(self) -> int:
        """First tokens always read. Setting it re-sorts what is stored."""
        return self._layout.sinks

    @sinks.setter
    def sinks(self, value: int) -> None:
        self._relayout(sinks=value)

    @property
    def mean_run_tokens(self) -> int:
        """Tokens that an average run of a segment needs for its runs to keep their means; 0: none do. Setting it re-sorts."""
        return self._layout.mean_run_tokens

    @mean_run_tokens.setter
    def mean_run_tokens(self, value: int) -> None:
        if not value and self.tail:
            raise ParameterError(f"mean_run_tokens: expected at least 1 while tail is {self.tail}, got {value!r}")
        self._relayout(mean_run_tokens=value)

    @property
    def break_even(self) -> int:
        """Shorter sequences are not sealed. Setting it re-sorts what is stored."""
        return self._layout.break_even

    @break_even.setter
    def break_even(self, value: int) -> None:
        self._relayout(break_even=value)

    @property
    def layout(self) -> Layout:
        return self._layout

    # -- arguments and parameters -------------------------------------------------------------------------------------

    def _input(self, value: Any, name: str, axes: str, shape: Sequence[int | None], dtypes: Sequence[torch.dtype]) -> Tensor:
        """A checked tensor of 4 axes; (n, d) becomes (1, 1, n, d)."""
        x = checks.tensor(value, name)
        if x.ndim == 2:
            x = x[None, None]
        checks.array(x, name, axes, shape, dtypes, self.device)
        return x

    def _queries(self, queries: Any, any_number: bool = False) -> tuple[Tensor, Form]:
        """Checked queries by KV head, (b, h, g, q, d), and the form of the results."""
        batch = self._lists.batch if self._lists is not None else None
        if isinstance(queries, list | tuple):
            queries = checks.tensor(queries, "queries").numpy()
        plain = isinstance(queries, Tensor) and queries.ndim == 4
        kind: tuple[Any, ...] = ()
        if plain:
            kind = queries.shape, queries.stride(), queries.dtype, queries.device, batch, any_number
        if plain and kind == self._accepted:  # a decode step is like the last: checking it again costs as much as choosing lists
            x, form = queries.detach(), _PLAIN
        else:
            form = _PLAIN if plain else Form(isinstance(queries, np.ndarray), getattr(queries, "ndim", 4) == 2)
            x = self._input(queries, "queries", "b hq q d", (batch, self.num_heads, None, self.d), checks.STORAGE_DTYPES)
        b, hq, q, d = x.shape
        if not any_number and not 1 <= q <= MAX_QUERY_TOKENS:
            raise ShapeError(f"queries: expected 1 to {MAX_QUERY_TOKENS} queries per sequence, got {q}")
        self._accepted = kind
        return x.reshape(b, self.num_kv_heads, hq // self.num_kv_heads, q, d).contiguous(), form

    def _list_nos(self, list_nos: Any, axes: str, shape: Sequence[int | None], least: int) -> Tensor:
        """Checked list numbers, int32 (b, h, ...); a vector becomes (1, 1, n)."""
        nos = checks.tensor(list_nos, "list_nos")
        nos = nos[None, None] if nos.ndim == 1 else nos
        if nos.ndim:  # rows of a strided view are fine here: they are small, and read once
            nos = nos.contiguous()
        checks.array(nos, "list_nos", axes, shape, [torch.int32, torch.int64], self.device)
        checks.list_numbers(nos, "list_nos", self.nlist, least)
        return nos.int()

    def _checked(self, params: SearchParametersIVF) -> SearchParametersIVF:
        """``params``, unless they ask for means that this index does not keep."""
        if params.tail and not self.mean_run_tokens:
            raise ParameterError(f"tail: expected an index with mean_run_tokens of 1 or more, got tail={params.tail} and 0")
        return params

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

    def _terms(self, params: SearchParametersIVF) -> Terms:
        """What a plan for these parameters follows from."""
        assert self._query_router is not None
        unread_mass = None if params.target_mass is None else self._allowed_miss(params.target_mass)
        return params, self._query_router, self._budget_shares, unread_mass

    def _allowed_miss(self, target: float) -> Tensor:
        """Attention per query that every KV head may leave unread, by the router's estimate: float32 (h,)."""
        assert self._query_router is not None
        self._query_router.check_outside("target_mass")
        known = self._miss
        if known is None or known[0] != target:
            table = Calibration.trusting(self.num_kv_heads) if self._calibration is None else self._calibration
            self._miss = known = (target, table.at(target).to(self.device))
        return known[1]

    # -- routing ------------------------------------------------------------------------------------------------------

    def _routing(self, session: SearchSession, q: int, coarse: bool = False) -> Routing:
        """How queries of the last q tokens are routed; coarse : as they come."""
        router, rope = self._query_router, None if coarse else self.rope
        assert router is not None
        if rope is not None and rope.is_dynamic:
            session.refuse_capture("a rope whose angles depend on the length")
            return Routing(self._prepared_router, router.first_knot, router.count_lists, self._query_rotation(q))
        kept = session.routing.get(coarse)
        if kept is None or kept.router is not self._prepared_router:
            turn = None if rope is None else rope.frequencies(self.device)
            kept = session.routing[coarse] = Routing(self._prepared_router, router.first_knot, router.count_lists, turn)
        return kept

    def _query_rotation(self, q: int) -> Rotation:
        """Angles of the last q positions of every sequence, (b * q, r / 2), where they depend on the length.

        A query was rotated in the call that brought its token.
        """
        assert self.rope is not None
        lists, parts = self.invlists, []
        for i, n in enumerate(lists.lengths):
            each = lists.rotated.at(i, max(0, n - q), n) if n else np.zeros(1, np.int64)
            length: Any = int(each[0]) if (each == each[0]).all() else np.pad(each, (q - len(each), 0), mode="edge")
            end = lists.next_position(i)
            parts.append(self.rope.rotation(range(max(0, end - q), max(q, end)), length, device=self.device))
        if len(parts) == 1:
            return parts[0]
        cos, sin = torch.cat([p.cos for p in parts]), torch.cat([p.sin for p in parts])
        return Rotation(cos, sin, parts[0].interleaved, parts[0].scale)

    @property
    def _assign_rows(self) -> AssignRows:
        """What the inverted lists ask when they seal."""
        return AssignRows(self)

    def _lists_of_rows(self, i: int, start: int, stop: int) -> Tensor:
        """List numbers of recent rows of sequence i."""
        lists = self.invlists
        rotation, rope, places = None, self.rope, lists.positions(i, np.arange(start, stop))
        if rope is not None and rope.is_dynamic:
            rotation = rope.rotation(places, lists.rotated.at(i, start, stop), device=self.device)
        elif rope is not None:
            rotation = rope.frequencies(self.device).at(places)
        return self._backend.assign(self._prepared_quantizer, lists.keys[i, :, start:stop], rotation)

    def _repartition(
        self, lists: SegmentedInvertedLists, keys: Tensor, counts: Sequence[int], rotated: Sequence[int] | None = None
    ) -> None:
        """If adding counts[i] of keys : storage dtype (b, h, n, d) seals the first tokens: lists of these very sequences.

        rotated : the length at which the new keys of each sequence were rotated, where the angles depend on it.
        """
        totals = [n + count for n, count in zip(lists.lengths, counts, strict=True)]
        if any(lists.segments) or not any(map(self._layout.num_blocks, totals)):
            return
        assert self._tower is not None
        session = self._session
        if session is not None and session.lists is lists and session.backend_session.captured:
            raise StateError("tower: expected the lists that a CUDA graph routes to, got tokens that make new ones")
        step = max(1, sum(totals) // (self.nlist * MAX_POINTS_PER_CENTROID))
        parts = []
        for i, (n, total) in enumerate(zip(lists.lengths, totals, strict=True)):
            ranks = np.arange(step // 2, total, step)
            x = lists.keys[i, :, :n] if total == n else torch.cat([lists.keys[i, :, :n], keys[i, :, : total - n]], 1)
            x = x[:, step // 2 :: step].float()
            gone = lists.gaps[i].count
            places = np.where(ranks < n, lists.positions(i, np.minimum(ranks, max(0, n - 1))), ranks + gone)
            lengths = None
            if self.rope is not None and self.rope.is_dynamic:
                each = np.append(lists.rotated.at(i, 0, n), [0 if rotated is None else rotated[i]])
                lengths = each[np.minimum(ranks, n)]
            parts.append(x if self.rope is None else self.rope.unrotate(x, places, lengths))

        def assign(centroids: Tensor, keys: Tensor) -> Tensor:
            return self._backend.assign(self._backend.prepare_quantizer(centroids), keys, None)

        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        self._adopt(*self._tower.for_prompt(x, self.nlist, assign if x.is_cpu else None))

    def _adopt(self, quantizer: KeyQuantizer, router: QueryRouter) -> None:
        """Lists of this batch's own, before any token is in one; the calibration was measured on lists of their kind."""
        self._key_quantizer, calibration = quantizer, self._calibration
        self._prepared_quantizer = self._backend.prepare_quantizer(quantizer.centroids)
        self.query_router = router
        self.calibration = calibration

    @_change
    def _relayout(self, **changes: int) -> None:
        self._layout = replace(self._layout, **changes)
        if self._lists is not None:
            if self._tower is not None:
                self._repartition(self._lists, self._lists.keys[:, :, :0], [0] * self._lists.batch)
            self._lists.relayout(self._layout, self._assign_rows)

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
        if self._tower is not None and not any(session.lists.segments):
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
        return moved, self.scale, params, self._defaults, self._query_router, self._budget_shares, self._calibration

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
