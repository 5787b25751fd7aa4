"""Steps of an index like the last one: `add` of a token and `search_attend`, with what the last one had checked and looked up.

A backend says what such a step comes to (`Session.steady_append`, `Session.steady_search`); here is asked whether a step is one.
Who makes one of these has just taken such a step the longer way. In doubt they do nothing and say so: the longer way knows every
error.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .selection import Selection
from .session import SearchSession

Kind = tuple[Any, ...]


def kind_of(x: Tensor) -> Kind:
    """What a check of a tensor depends on."""
    return x.shape, x.stride(), x.dtype, x.device


def is_of(x: Any, kind: Kind) -> bool:
    """Whether ``x`` is a tensor of that `kind_of`."""
    shape, stride, dtype, device = kind
    return type(x) is Tensor and x.shape == shape and x.dtype is dtype and x.stride() == stride and x.device == device


class SteadyAdd:
    """The same number of tokens more to every sequence. by : identities that it follows from."""

    __slots__ = ("_append", "_by", "_counts", "_keys", "_left", "_lengths", "_session", "_values", "_version")

    MOST = 64
    """Steps, before the longer way is taken again."""

    def __init__(
        self, session: SearchSession, append: Callable[[Tensor, Tensor], bool], keys: Tensor, values: Tensor, counts: list[int],
        by: tuple[Any, ...],
    ) -> None:
        lists = session.lists
        self._session, self._append, self._version, self._lengths = session, append, lists.version, lists.lengths
        self._keys, self._values, self._counts, self._by = kind_of(keys), kind_of(values), counts, by
        # As a sequence grows its segments change at certain lengths: what holds for many tokens holds for the first of them.
        self._left = next((n for n in (self.MOST, 16, 4, 1) if lists.only_grows([n * count for count in counts])), 0)

    def __call__(self, keys: Any, values: Any, *by: Any) -> bool:
        """Whether the tokens were appended."""
        session, lists = self._session, self._session.lists
        # a list of lengths is never changed, only replaced: with this one nothing has come or gone but by this very way
        if not self._left or lists.lengths is not self._lengths or not session.is_published(self._version):
            return False
        if not all(map(operator.is_, by, self._by)) or not is_of(keys, self._keys) or not is_of(values, self._values):
            return False
        if not self._append(keys, values):
            return False
        lists.advance(self._counts)
        self._lengths, self._left = lists.lengths, self._left - 1
        return True


class SteadySearch:
    """Another search of queries of one form by the same parameters, for the output alone. by : as above; chosen : the selection
    of the last one, which holds but for its lengths."""

    __slots__ = ("_by", "_queries", "_search", "_session", "_version", "chosen")

    def __init__(
        self, session: SearchSession, search: Callable[[Tensor], Tensor | None], queries: Tensor, chosen: Selection,
        by: tuple[Any, ...],
    ) -> None:
        self._session, self._search, self._version = session, search, session.lists.version
        self._queries, self._by, self.chosen = kind_of(queries), by, chosen

    def __call__(self, queries: Any, *by: Any) -> Tensor | None:
        """The output; None if the search is another, or something has changed."""
        if not all(map(operator.is_, by, self._by)) or not is_of(queries, self._queries):
            return None
        session = self._session
        if not session.is_published(self._version):
            return None
        out = self._search(queries)
        if out is not None:
            session.note_steady(self.chosen)
        return out


class SteadySteps:
    """Of an index: what takes an `add` and a `search_attend` like the last ones, or None where the backend has no shorter way."""

    __slots__ = ("_by", "add", "search")

    def __init__(self) -> None:
        self.add: SteadyAdd | None = None
        self.search: SteadySearch | None = None
        self._by: tuple[Any, ...] = ()  # what the last search followed from

    def note_add(
        self, session: SearchSession, keys: Tensor, values: Tensor, counts: list[int], by: tuple[Any, ...]
    ) -> None:
        """These were appended the longer way."""
        append = session.steady_append(keys, values, counts)
        self.add = None if append is None else SteadyAdd(session, append, keys, values, counts, by)

    def note_search(
        self, session: SearchSession, queries: Any, x: Tensor, chosen: Selection | None, by: tuple[Any, ...]
    ) -> None:
        """These were searched for the longer way; the second time in a row with the same of everything may be the first of many.

        x : the same queries by KV head."""
        again = len(by) == len(self._by) and all(map(operator.is_, by, self._by))
        self._by, self.search = by, None
        if again and isinstance(queries, Tensor) and queries.ndim == 4 and queries.is_contiguous() and chosen is not None:
            search = session.steady_search(x)
            self.search = None if search is None else SteadySearch(session, search, queries, chosen, by)
