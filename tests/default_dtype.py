"""Another default dtype or device of torch for the library alone: what a test makes itself stays float32 on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import saap_index
import saap_lab

_ROOT, _LAB = Path(saap_index.__file__).parent, Path(saap_lab.__file__).parent
LIBRARY = tuple(f"{folder}/" for folder in {_ROOT, _ROOT.resolve(), _LAB})
_TORCH = f"{Path(torch.__file__).parent}/"


def in_library() -> bool:
    """Whether the nearest caller that is neither torch nor a mode of the tests is code of the library."""
    frame: Any = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename.startswith(_TORCH) or frame.f_code.co_name == "__torch_function__"):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(LIBRARY)


class _ForTheLibrary(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wanted = self.dtype if in_library() else torch.float32
        before = torch.get_default_dtype()
        if wanted is before:
            return func(*args, **(kwargs or {}))
        torch.set_default_dtype(wanted)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch.set_default_dtype(before)


@contextmanager
def for_the_library(dtype: torch.dtype) -> Iterator[None]:
    """Inside, torch's default dtype is ``dtype`` for calls that the library makes, and float32 for all others."""
    with _ForTheLibrary(dtype):
        yield
