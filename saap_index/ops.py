"""The decode step as torch custom operators, so that `torch.compile` takes it as a whole. Knows the index as two opaque calls.

An index is Python state and cannot be traced. What the compiler sees instead are `saap_index::add` and
`saap_index::search_attend`, each with the number of an index and its token: a tensor of one element that `add` claims to change
and `search_attend` to read, which is what keeps the calls on one index in order, and lets those on another pass.

The methods of an index call `trace_add` and `trace_search` by themselves while they are traced; nothing here need be called by
a user.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import StateError
from .search.params import SAMPLING, SearchParametersIVF

_INDEXES: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)
_NAMES = ("nprobe", "selectivity", "max_codes", "window", "sinks", "target_mass", "tail", *SAMPLING)


def register(index: Any) -> tuple[int, Tensor]:
    """A number for ``index``, valid as long as it lives, and its token."""
    number = next(_NUMBERS)
    _INDEXES[number] = index
    return number, torch.zeros(1, dtype=torch.int32, device=index.device)


def _index(number: int) -> Any:
    index = _INDEXES.get(number)
    if index is None:
        raise StateError("compiled step: expected the index it was traced with, got one that is gone")
    return index


def pack(params: SearchParametersIVF | None) -> list[float] | None:
    """Parameters as an operator takes them: a number each, -1 for None."""
    if params is None:
        return None
    return [-1.0 if getattr(params, name) is None else float(getattr(params, name)) for name in _NAMES]


def _unpack(packed: Sequence[float] | None) -> SearchParametersIVF | None:
    if packed is None:
        return None
    values: dict[str, Any] = {name: x for name, x in zip(_NAMES, packed, strict=True) if x >= 0}
    whole = ("nprobe", "max_codes", "window", "sinks")
    return SearchParametersIVF(**{name: int(x) if name in whole else x for name, x in values.items()})


@torch.library.custom_op("saap_index::add", mutates_args=("token",))
def add(token: Tensor, keys: Tensor, values: Tensor, number: int, seal: bool) -> None:
    _index(number).add(keys, values, seal=seal)


@add.register_fake
def _(token: Tensor, keys: Tensor, values: Tensor, number: int, seal: bool) -> None:
    return None


@torch.library.custom_op("saap_index::search_attend", mutates_args=())
def search_attend(token: Tensor, queries: Tensor, number: int, d_v: int, params: list[float] | None) -> tuple[Tensor, Tensor]:
    out, lse = _index(number).search_attend(queries, params=_unpack(params), return_lse=True)
    return out, lse


@search_attend.register_fake
def _(token: Tensor, queries: Tensor, number: int, d_v: int, params: list[float] | None) -> tuple[Tensor, Tensor]:
    return queries.new_empty((*queries.shape[:-1], d_v)), queries.new_empty(queries.shape[:-1], dtype=torch.float32)


def trace_add(index: Any, keys: Any, values: Any, plain: bool, seal: bool) -> None:
    """`AsymmetricIndex.add` as the compiler sees it; StateError unless its other arguments are ``plain``, their defaults."""
    if not plain:
        raise StateError("compile: expected add of keys and values alone, got coarse_keys or lengths")
    add(index._token, keys, values, index._number, seal)


def trace_search(index: Any, queries: Any, params: SearchParametersIVF | None, plain: bool, return_lse: bool) -> Any:
    """`AsymmetricIndex.search_attend` as the compiler sees it; StateError unless its other arguments are ``plain``."""
    if not plain:
        raise StateError("compile: expected search_attend of queries alone, got coarse_queries or return_error")
    out, lse = search_attend(index._token, queries, index._number, index.d_v, pack(params))
    return (out, lse) if return_lse else out
