"""Search parameters, per call or as the defaults of an index. Plain data; knows no tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ParameterError
from ..routing.sampling import MOST_EXPONENT

SELECTIVITY = 0.05
"""Share of the sealed tokens that is read where nothing is said."""

TARGET_CAP = 0.25
"""Most of the sealed tokens that `target_mass` may read where no selectivity is given beside it."""

SAMPLING = "sampled_share", "sample_exponent", "sample_cap"
"""Parameters of the weighted sample; None for what is calibrated."""


@dataclass(frozen=True, kw_only=True)
class SearchParametersIVF:
    """What one search may read. A field left at None keeps the index's own value.

    nprobe : lists visited, over all segments and without the distance term: SAAP as published. Excludes the next two.
    selectivity : share of the sealed tokens that is read, 0 < selectivity <= 1.
    target_mass : read no more tokens than the router thinks are needed to capture this share of the attention, sinks and window
        included, 0 < target_mass < 1. ``selectivity`` is then the most that may be read, 0.25 if not given beside it.
    max_codes : most sealed tokens read, together with any of these; 0 means no limit, as in FAISS.
    tail : share of the budget (of the cap, with ``target_mass``), 0 <= tail < 1, spent on the means of runs that are not read:
        each costs what one token does. Needs an index with ``mean_run_tokens``; not with ``nprobe``.
    sampled_share : share of the budget, 0 <= sampled_share <= 1, spent on a weighted sample of the tokens that the best runs
        for the rest of it leave unread: each is read with a probability proportional to a power of its run's weight, and counts
        for the inverse. 0 reads the best runs alone. None: for each KV head as calibrated in training, 0 where it was
        not. With ``nprobe``, ``target_mass`` or ``tail`` nothing is sampled, and a share above 0 beside them is refused.
    sample_exponent : that power, a multiple of 0.25 up to 16. sample_cap : most that the logit of a sampled token is raised by,
        in nats, which bounds the variance and makes the sum too small. None: as calibrated, else 2 and 2.
    window, sinks : tokens at the end and at the start that are read at least. The index reads its own in any case, so a
        larger value adds tokens and a smaller one changes nothing.

    nprobe, selectivity and target_mass are one choice: a call that gives any of them replaces the index's.

    Raises ParameterError for a value outside its range.
    """

    nprobe: int | None = None
    selectivity: float | None = None
    max_codes: int | None = None
    window: int | None = None
    sinks: int | None = None
    target_mass: float | None = None
    tail: float | None = None
    sampled_share: float | None = None
    sample_exponent: float | None = None
    sample_cap: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.generic) and not isinstance(value, np.bool_):
                object.__setattr__(self, name, value.item())
        for name in ("selectivity", "target_mass", "tail"):
            if self.nprobe is not None and getattr(self, name):
                raise ParameterError(
                    f"nprobe, {name}: expected one of them, got nprobe={self.nprobe}, {name}={getattr(self, name)}"
                )
        for name in ("nprobe", "target_mass", "tail"):
            if self.sampled_share and getattr(self, name):
                raise ParameterError(
                    f"sampled_share, {name}: expected one of them, got sampled_share={self.sampled_share}, "
                    f"{name}={getattr(self, name)}"
                )
        for name, least in (("nprobe", 1), ("max_codes", 0), ("window", 0), ("sinks", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ParameterError(f"{name}: expected an integer of {least} or more, got {value!r}")
        _share(self.selectivity, "selectivity", "0 < selectivity <= 1", lambda x: 0 < x <= 1)
        _share(self.target_mass, "target_mass", "0 < target_mass < 1", lambda x: 0 < x < 1)
        _share(self.tail, "tail", "0 <= tail < 1", lambda x: 0 <= x < 1)
        _share(self.sampled_share, "sampled_share", "0 <= sampled_share <= 1", lambda x: 0 <= x <= 1)
        quarters = f"a multiple of 0.25 up to {MOST_EXPONENT:g}"
        _share(self.sample_exponent, "sample_exponent", quarters, lambda x: 0.25 <= x <= MOST_EXPONENT and not x * 4 % 1)
        _share(self.sample_cap, "sample_cap", "0 <= sample_cap < inf", lambda x: 0 <= x < math.inf)

    def over(self, defaults: SearchParametersIVF) -> SearchParametersIVF:
        """These parameters, with ``defaults`` where a field is None (a budget given here replaces the other kind there)."""
        own = self.nprobe is not None or self.selectivity is not None or self.target_mass is not None
        budget = self if own else defaults
        selectivity = budget.selectivity
        if budget.target_mass is not None and selectivity is None:
            selectivity = TARGET_CAP if defaults.target_mass is None else defaults.selectivity
        tail = defaults.tail if self.tail is None else self.tail
        if budget.nprobe is not None and self.tail is None:
            tail = None
        sampled = self.sampled_share
        if sampled is None and not (budget.nprobe or budget.target_mass or tail):
            sampled = defaults.sampled_share
        return SearchParametersIVF(
            nprobe=budget.nprobe,
            selectivity=selectivity,
            target_mass=budget.target_mass,
            max_codes=defaults.max_codes if self.max_codes is None else self.max_codes,
            window=defaults.window if self.window is None else self.window,
            sinks=defaults.sinks if self.sinks is None else self.sinks,
            tail=tail,
            sampled_share=sampled,
            sample_exponent=defaults.sample_exponent if self.sample_exponent is None else self.sample_exponent,
            sample_cap=defaults.sample_cap if self.sample_cap is None else self.sample_cap,
        )

    @property
    def samples(self) -> bool:
        """Whether anything may be sampled with these parameters."""
        return not (self.nprobe or self.target_mass or self.tail) and self.sampled_share != 0

    def budget(self, sealed_tokens: int, share: float = 1.0) -> int:
        """Most of ``sealed_tokens`` that may be read by a KV head whose selectivity is multiplied by ``share``.

        A selectivity of 1 is everything, whatever the share; and the cap of a target is the same for every head.
        """
        tokens = sealed_tokens
        if self.selectivity is not None and self.selectivity < 1:
            share = 1.0 if self.target_mass is not None else share
            tokens = min(sealed_tokens, math.ceil(self.selectivity * share * sealed_tokens - 1e-6))
        return min(tokens, self.max_codes) if self.max_codes else tokens

    def budgets(self, sealed_tokens: Sequence[int], heads: int, shares: np.ndarray | None) -> np.ndarray:
        """`budget` of every sequence and KV head, whose shares are float32 (h,) or None for 1 each: int32 (b, h)."""
        rows = np.empty((len(sealed_tokens), heads), np.int32)
        for i, n in enumerate(sealed_tokens):
            rows[i] = self.budget(n) if shares is None else [self.budget(n, float(share)) for share in shares]
        return rows


def _share(value: float | None, name: str, want: str, fine: Callable[[float], bool]) -> None:
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not fine(value)):
        raise ParameterError(f"{name}: expected {want}, got {value!r}")
