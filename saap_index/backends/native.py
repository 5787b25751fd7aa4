"""Loads the compiled module. Knows nothing of tensors or operations."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType


@functools.cache
def load() -> ModuleType | None:
    """The module ``saap_index._cpu``, or None, with one warning, where it was not built."""
    try:
        return importlib.import_module("saap_index._cpu")
    except ImportError as error:
        warnings.warn(
            f"saap_index._cpu, the native CPU kernels, cannot be loaded ({error}); the torch backend is used instead. "
            "Installing from source with a C++20 compiler (g++ 12 or clang 15) at hand builds them.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
