"""What `saap compare` and `saap eval` take on the command line, as numbers and names. Checked before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..errors import ParameterError


def numbers(name: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """Numbers separated by commas; ParameterError, naming the flag, for others."""
    try:
        return tuple(kind(x) for x in text.split(","))
    except ValueError:
        raise ParameterError(f"{name}: expected numbers separated by commas, got {text!r}") from None


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def check_names(what: str, found: Iterable[str], known: Iterable[str]) -> None:
    """ParameterError unless there is a name and all are known."""
    found, known = tuple(found), tuple(known)
    unknown = [name for name in found if name not in known]
    if unknown or not found:
        raise ParameterError(f"{what}: expected some of {', '.join(known)}, got {', '.join(unknown) or 'none'}")


def check_shares(what: str, found: Iterable[float]) -> None:
    """ParameterError unless there is a share and all lie in (0, 1]."""
    found = tuple(found)
    if not found or not all(0 < share <= 1 for share in found):
        raise ParameterError(f"{what}: expected shares in (0, 1], as 0.05 for 5 %, got {', '.join(map(str, found)) or 'none'}")
