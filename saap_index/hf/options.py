"""What `attach` may be asked for, as one record. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .. import checks
from ..errors import ParameterError

MAX_SPARSE_TOKENS = 8
"""Tokens that one forward call may bring and still be attended to as decoding does: those that assisted decoding verifies."""

TRAINED = "trained"
"""``budget_shares`` that come with the routers."""


@dataclass(frozen=True)
class AttachOptions:
    """Options of `attach`, and of `SaapCache` with routers of its own; see there. Those of an index are None where the index, or
    its routers, decide; their values are checked by the index.

    Raises ParameterError for a value outside its range.
    """

    dense_layers: Sequence[int] = ()
    max_sparse_tokens: int = MAX_SPARSE_TOKENS
    audit_every: int = 0
    audit_bound: float | None = None
    cuda_graphs: bool | str = "auto"
    nlist: int | None = None
    """Of lists that are made for each prompt."""
    budget_shares: Any = TRAINED
    """`TRAINED`, None for 1 each, or float (h,) for every layer."""
    selectivity: float | None = None
    nprobe: int | None = None
    target_mass: float | None = None
    max_codes: int | None = None
    window: int | None = None
    sinks: int | None = None
    break_even: int | None = None
    """None: as measured on this machine."""
    seal_tokens: int | None = None
    max_segment: int | None = None
    mean_run_tokens: int | None = None
    tail: float | None = None
    sampled_share: float | None = None
    sample_exponent: float | None = None
    sample_cap: float | None = None
    storage: str | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        checks.integer(self.max_sparse_tokens, "max_sparse_tokens", 1)
        if self.audit_bound is not None and not self.audit_every:
            raise ParameterError("audit_bound: expected audit_every beside it, got none")
        if self.cuda_graphs not in (True, False, "auto"):
            raise ParameterError(f"cuda_graphs: expected True, False or 'auto', got {self.cuda_graphs!r}")

    @classmethod
    def of(cls, further: Mapping[str, Any], **named: Any) -> AttachOptions:
        """From arguments of `attach` and its ``options``. ParameterError for one of these that there is none of."""
        names = _names_from("nlist")
        unknown = sorted(further.keys() - set(names))
        if unknown:
            raise ParameterError(f"options: expected some of {', '.join(sorted(names))}, got {', '.join(unknown)}")
        return cls(**named, **further)

    @property
    def own_shares(self) -> bool:
        """Whether ``budget_shares`` are the user's."""
        return not (isinstance(self.budget_shares, str) and self.budget_shares == TRAINED)

    @property
    def of_index(self) -> dict[str, Any]:
        """Those of `AsymmetricIndex` that were given, budget shares apart."""
        given = {name: getattr(self, name) for name in _names_from("selectivity")}
        return {name: value for name, value in given.items() if value is not None}


def _names_from(first: str) -> list[str]:
    names = [field.name for field in fields(AttachOptions)]
    return names[names.index(first) :]
