"""A forward call that fails is taken back: every layer of a cache becomes what it was before it. Knows layers by two methods.

A model goes through its layers one by one, so a call that is refused in one of them has changed those before it. A `Call` is
shared by the layers of one cache; each notes what it was when the call reaches it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from transformers.cache_utils import DynamicLayer
from typing_extensions import Self

_numbers = itertools.count(1)


class Call:
    """The forward call in progress, of one cache.

    number : tells it from all others; what was read of the arguments of one call says nothing of the next, whose arguments may
    be the same tensors with other contents.
    """

    def __init__(self) -> None:
        self.number = 0
        self._undo: dict[int, Callable[[], None]] = {}

    def begin(self, layer: Any, undo: Callable[[], None]) -> None:
        """The call reaches ``layer``; ``undo`` makes it what it is now. A layer that is reached again begins another call."""
        if id(layer) in self._undo:
            self._undo.clear()
        if not self._undo:
            self.number = next(_numbers)
        self._undo[id(layer)] = undo

    def finish(self) -> None:
        """The call is through: nothing is taken back any more."""
        self._undo.clear()

    def fail(self) -> None:
        """Make every layer that the call reached what it was."""
        while self._undo:
            self._undo.popitem()[1]()

    def __deepcopy__(self, memo: Any) -> Self:
        return type(self)()  # a copied cache is in no call


def undo_of(layer: DynamicLayer) -> Callable[[], None]:
    """What makes a layer of transformers what it is now. One with a window forgets, so what it holds is kept; others are cut."""
    state = dict(layer.__dict__)
    if layer.is_sliding or not layer.is_initialized:

        def undo() -> None:
            layer.__dict__.clear()
            layer.__dict__.update(state)
    else:
        length = layer.get_seq_length()

        def undo() -> None:
            assert layer.keys is not None and layer.values is not None
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]

    return undo
