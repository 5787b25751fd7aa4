"""The configuration and the attributes of an index, and the checks of what its methods are given. No operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks, ops
from ._arguments import IndexArguments
from .backends import Frequencies, get_backend
from .errors import CompatibilityError, ParameterError, StateError
from .invlists.layout import Layout
from .invlists.segmented import SegmentedInvertedLists
from .routing.calibration import Calibration
from .routing.quantizer import MAX_POINTS_PER_CENTROID, KeyQuantizer
from .routing.rope import Rope
from .routing.router import QueryRouter
from .routing.two_tower import TwoTower
from .search.params import SELECTIVITY, SearchParametersIVF
from .search.selection import Selection
from .whole import signals_wait

MAX_DIM = 256

_STATE = (
    "_calibration", "_key_quantizer", "_last", "_layout", "_lists", "_miss", "_prepared_quantizer", "_prepared_router",
    "_query_router", "_tower",
)  # fmt: skip
"""What a change may set."""


class AssignRows:
    """`Assign` of an index."""

    __slots__ = ("_index",)

    def __init__(self, index: IndexBase) -> None:
        self._index = index

    def __call__(self, i: int, start: int, stop: int) -> Tensor:
        return self._index._lists_of_rows(i, start, stop)

    def by_position(self) -> tuple[Any, Frequencies | None] | None:
        index, rope = self._index, self._index.rope
        if rope is None:
            return index._prepared_quantizer, None
        return None if rope.is_dynamic else (index._prepared_quantizer, rope.frequencies(index.device))


class IndexBase(IndexArguments):
    """What `AsymmetricIndex` is made with and shows; see there."""

    __slots__ = (
        "__weakref__", "_asked", "_backend", "_budget_shares", "_calibration", "_defaults", "_key_quantizer",
        "_last", "_layout", "_lists", "_miss", "_number", "_prepared_quantizer", "_prepared_router", "_query_router", "_token",
        "_tower", "backend_name", "d", "d_v", "device", "dtype", "nlist", "num_heads", "num_kv_heads", "rope", "scale",
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
        self._last: Selection | None = None
        self._name_for_compiler()

    def _name_for_compiler(self) -> None:
        """A number and a token of its own, see ops.py."""
        self._number = ops.register(self)
        self._token = torch.zeros(1, dtype=torch.int32, device=self.device)

    def __repr__(self) -> str:
        names = ("d", "d_v", "nlist", "num_heads", "num_kv_heads", "dtype", "ntotal", "is_trained")
        return f"AsymmetricIndex({', '.join(f'{n}={getattr(self, n)}' for n in names)}, backend={self._backend.name!r})"

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

    # -- attributes of a FAISS IVF index -------------------------------------------------------------------------------

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

    def _relayout(self, **changes: int) -> None:
        self._layout = replace(self._layout, **changes)
        if self._lists is not None:
            if self._tower is not None:
                self._repartition(self._lists, self._lists.keys[:, :, :0], [0] * self._lists.batch)
            self._lists.relayout(self._layout, self._assign_rows)

    # -- arguments -----------------------------------------------------------------------------------------------------

    def _checked(self, params: SearchParametersIVF) -> SearchParametersIVF:
        """``params``, unless they ask for means that this index does not keep."""
        if params.tail and not self.mean_run_tokens:
            raise ParameterError(f"tail: expected an index with mean_run_tokens of 1 or more, got tail={params.tail} and 0")
        return params

    @property
    def _assign_rows(self) -> AssignRows:
        """What the inverted lists ask when they seal."""
        return AssignRows(self)

    def _lists_of_rows(self, i: int, start: int, stop: int) -> Tensor:
        """List numbers of recent rows of sequence i."""
        lists = self.invlists
        rotation = None
        if self.rope is not None:
            lengths = lists.rotated.at(i, start, stop) if self.rope.is_dynamic else None
            rotation = self.rope.rotation(lists.positions(i, np.arange(start, stop)), lengths, device=self.device)
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
