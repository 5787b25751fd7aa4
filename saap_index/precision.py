"""The library's own products are float32 wherever it says so, also inside `torch.autocast`. Knows nothing of what is computed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

import torch

_KINDS = ("cpu", "cuda", "xpu", "mps")
_Result = TypeVar("_Result")


def full_precision(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """``function`` with autocast off: routing and the lists of keys must not depend on where they are asked for."""

    @functools.wraps(function)
    def call(*args: object, **options: object) -> _Result:
        on = [kind for kind in _KINDS if torch.is_autocast_enabled(kind)]
        if not on:
            return function(*args, **options)
        with ExitStack() as stack:
            for kind in on:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **options)

    return call
