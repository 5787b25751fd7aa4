"""FAISS's ways to make an index, to set its parameters from a string, and to copy it."""

from __future__ import annotations

import re
from typing import Any

import torch

from .backends import STORAGE_CODES
from .errors import ParameterError
from .index import AsymmetricIndex

_DTYPES = {"Flat": torch.float32, "SQfp16": torch.float16, "SQbf16": torch.bfloat16}
"""What keys and values are stored as, by FAISS's names of codes."""

_INTEGERS = "break_even", "max_codes", "nprobe", "sinks", "window"
_FLOATS = "sample_cap", "sample_exponent", "sampled_share", "selectivity", "tail", "target_mass"

PARAMETERS = tuple(sorted((*_INTEGERS, *_FLOATS)))
"""What `ParameterSpace` sets."""


def index_factory(d: int, description: str, **options: Any) -> AsymmetricIndex:
    """An empty, untrained index, as `faiss.index_factory` makes one.

    Parameters
    ----------
    d : key and query dim.
    description : parts with commas between them, each at most once. ``IVF256``: 256 inverted lists per KV head; comes first, and
        must be there. Then what is stored: ``Flat`` (float32, FAISS's and the default), ``SQfp16``, ``SQbf16``; and ``SQ8`` or
        ``SQ8/SQ4``, codes of sealed tokens, beside it or alone. ``SAAP`` at the end says what `train` with queries makes of it
        anyway: queries have a router of their own.
    options : further arguments of `AsymmetricIndex`, but nlist, and dtype and storage where the description has them.

    Raises ParameterError for a description that is none, or options that it contradicts; and what `AsymmetricIndex` raises.

    >>> index_factory(128, "IVF256,SQbf16,SQ8,SAAP", num_heads=32, num_kv_heads=8).nlist
    256
    """
    parts = [part.strip() for part in description.split(",")] if isinstance(description, str) else []
    lists = re.fullmatch(r"IVF([1-9]\d{0,8})", parts[0]) if parts else None
    if lists is None:
        raise ParameterError(f"description: expected one that begins with IVF and a number of lists, got {description!r}")
    chosen: dict[str, Any] = {"nlist": int(lists[1])}
    for place, part in enumerate(parts[1:], 1):
        if part == "SAAP" and place == len(parts) - 1:
            break
        name, value = ("dtype", _DTYPES[part]) if part in _DTYPES else ("storage", part)
        if part not in {**_DTYPES, **STORAGE_CODES} or name in chosen:
            names = ", ".join((*_DTYPES, *STORAGE_CODES))
            raise ParameterError(
                f"description: expected at most one dtype and one code behind IVF, of {names}, and SAAP last, got {part!r} in "
                f"{description!r}"
            )
        chosen[name] = value
    both = sorted(chosen.keys() & options.keys())
    if both:
        raise ParameterError(f"{', '.join(both)}: expected in the description or as arguments, got both with {description!r}")
    return AsymmetricIndex(d, **chosen, **options)


class ParameterSpace:
    """Sets parameters of an index by name, from strings too, as FAISS's class of this name does."""

    def set_index_parameter(self, index: AsymmetricIndex, name: str, value: float | int | str | None) -> None:
        """One of `PARAMETERS`. ParameterError for another name and for a value out of its range; the index is unchanged then."""
        self.set_index_parameters(index, f"{name}={value}")

    def set_index_parameters(self, index: AsymmetricIndex, description: str) -> None:
        """Several, as ``"nprobe=16,max_codes=4096"``: set in this order, all of them or none.

        Raises ParameterError as `set_index_parameter` does, and for anything that is not ``name=value``.
        """
        changes = [_change(text, description) for text in description.split(",")]
        options = index.options
        for name, value in changes:  # tried first, in order: a budget replaces one of another kind
            options = options.changed(name, value)
        for name, value in changes:
            setattr(index, name, value)


def _change(text: str, description: str) -> tuple[str, Any]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or name not in PARAMETERS:
        raise ParameterError(
            f"parameters: expected name=value, of {', '.join(PARAMETERS)}, got {text!r} in {description!r}"
        )
    try:
        return name, int(value) if name in _INTEGERS else float(value)
    except ValueError as error:
        kind = "an integer" if name in _INTEGERS else "a number"
        raise ParameterError(f"{name}: expected {kind}, got {value!r} in {description!r}") from error


def clone_index(index: AsymmetricIndex) -> AsymmetricIndex:
    """A copy with the same training, parameters and tokens, as `faiss.clone_index` makes one; `AsymmetricIndex.fork` by another
    name. The copy shares what is trained, and no token."""
    return index.fork()
