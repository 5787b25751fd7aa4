"""Changes that happen whole: methods within a context of their object, and signals that wait for its end."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

try:  # the functions beneath those of `signal`, which spend a hundred times as long on looking for an enum
    from _signal import getsignal  # type: ignore[import-not-found]
    from _signal import signal as set_handler
except ImportError:
    from signal import getsignal
    from signal import signal as set_handler

_NAMES = ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2")
_SIGNALS = [int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name)]

_Method = TypeVar("_Method", bound=Callable[..., Any])


def within(name: str) -> Callable[[_Method], _Method]:
    """Decorator of a method: it runs inside the context manager that the method ``name`` of its object returns."""

    def decorate(method: _Method) -> _Method:
        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **options: Any) -> Any:
            with getattr(self, name)():
                return method(self, *args, **options)

        return wrapped  # type: ignore[return-value]

    return decorate


@contextmanager
def restored(owner: Any, names: Sequence[str]) -> Iterator[None]:
    """If the block raises, these attributes of ``owner`` are what they were."""
    before = [(name, getattr(owner, name)) for name in names]
    try:
        yield
    except BaseException:
        for name, value in before:
            setattr(owner, name, value)
        raise


@contextmanager
def signals_wait() -> Iterator[None]:
    """Handlers written in Python, that of Ctrl-C for one, run after the block, once for each signal that came in it.

    They run in the main thread only, so in another there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Any] = {}
    came: list[int] = []
    try:
        for number in _SIGNALS:
            handler = getsignal(number)
            if callable(handler):
                handlers[number] = handler
                set_handler(number, lambda n, frame: came.append(n))
        yield
    finally:
        _restore(list(handlers.items()))
        for number in came:
            signal.raise_signal(number)


@contextmanager
def whole(owner: Any, names: Sequence[str], part: AbstractContextManager[None] | None) -> Iterator[None]:
    """Around a change of ``owner``: if it raises, these attributes are what they were, and what ``part`` is the context of takes
    back its own; signals are answered after it."""
    with signals_wait(), restored(owner, names), nullcontext() if part is None else part:
        yield


def _restore(handlers: list[tuple[int, Any]]) -> None:
    """All of them, though one that is back may raise at once."""
    if handlers:
        try:
            set_handler(*handlers[0])
        finally:
            _restore(handlers[1:])
