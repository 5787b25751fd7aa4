"""Search parameters, per call or as the defaults of an index. Plain data; knows no tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ParameterError


@dataclass(frozen=True, kw_only=True)
class SearchParametersIVF:
    """What one search may read. A field left at None keeps the index's own value.

    nprobe : lists visited, over all segments and without the distance term: SAAP as published. Excludes ``selectivity``.
    selectivity : share of the sealed tokens that is read, 0 < selectivity <= 1. Excludes ``nprobe``.
    max_codes : most sealed tokens read, together with either; 0 means no limit, as in FAISS.
    window, sinks : tokens at the end and at the start that are read at least. The index reads its own in any case, so a
        larger value adds tokens and a smaller one changes nothing.

    Raises ParameterError for a value outside its range.
    """

    nprobe: int | None = None
    selectivity: float | None = None
    max_codes: int | None = None
    window: int | None = None
    sinks: int | None = None

    def __post_init__(self) -> None:
        if self.nprobe is not None and self.selectivity is not None:
            raise ParameterError(
                f"nprobe, selectivity: expected one of them, got nprobe={self.nprobe}, selectivity={self.selectivity}"
            )
        for name, least in (("nprobe", 1), ("max_codes", 0), ("window", 0), ("sinks", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ParameterError(f"{name}: expected an integer of {least} or more, got {value!r}")
        share = self.selectivity
        if share is not None and (not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1):
            raise ParameterError(f"selectivity: expected 0 < selectivity <= 1, got {share!r}")

    def over(self, defaults: SearchParametersIVF) -> SearchParametersIVF:
        """These parameters, with ``defaults`` where a field is None (a budget given here replaces the other kind there)."""
        budget = self if self.nprobe is not None or self.selectivity is not None else defaults
        return SearchParametersIVF(
            nprobe=budget.nprobe,
            selectivity=budget.selectivity,
            max_codes=defaults.max_codes if self.max_codes is None else self.max_codes,
            window=defaults.window if self.window is None else self.window,
            sinks=defaults.sinks if self.sinks is None else self.sinks,
        )

    def budget(self, sealed_tokens: int) -> int:
        """Most of ``sealed_tokens`` that may be read."""
        tokens = (
            sealed_tokens if self.selectivity is None else min(sealed_tokens, math.ceil(self.selectivity * sealed_tokens - 1e-6))
        )
        return min(tokens, self.max_codes) if self.max_codes else tokens
