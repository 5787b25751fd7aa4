"""What an index is made for, as one record: shapes, dtype, layout, and what a search reads by default. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from .. import checks
from ..errors import ParameterError
from ..invlists.layout import Layout
from .params import SELECTIVITY, SearchParametersIVF
from .plan import MOST_PLANS

MAX_DIM = 256


@dataclass(frozen=True)
class IndexOptions:
    """Options of an `AsymmetricIndex` that are checked once; changing one makes another record.

    Raises ParameterError for a value outside its range.
    """

    d: int
    """Key and query dim, a multiple of 8 up to 256."""
    d_v: int
    """Value dim, of the same range."""
    nlist: int
    """Inverted lists per KV head."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """KV heads; query head i uses KV head i // (num_heads / num_kv_heads)."""
    dtype: torch.dtype = torch.float32
    """Of stored keys and values."""
    layout: Layout = field(default_factory=Layout)
    """Which tokens are sinks, recent and sealed."""
    params: SearchParametersIVF = field(default_factory=lambda: SearchParametersIVF(selectivity=SELECTIVITY))
    """Of searches that say nothing else."""
    _merged: dict[SearchParametersIVF, SearchParametersIVF] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("d", "d_v"):
            if self._integer(name, 8, MAX_DIM) % 8:
                raise ParameterError(f"{name}: expected a multiple of 8, got {getattr(self, name)}")
        self._integer("nlist", 1, 65535)
        self._integer("num_heads", 1)
        if self.num_heads % self._integer("num_kv_heads", 1):
            raise ParameterError(f"num_heads: expected a multiple of num_kv_heads = {self.num_kv_heads}, got {self.num_heads}")
        if self.dtype not in checks.STORAGE_DTYPES:
            raise ParameterError(f"dtype: expected one of {checks.STORAGE_DTYPES}, got {self.dtype!r}")
        self._checked(self.params)

    def _integer(self, name: str, least: int, most: int = 2**31 - 1) -> int:
        value = checks.integer(getattr(self, name), name, least, most)
        object.__setattr__(self, name, value)
        return value

    def _checked(self, params: SearchParametersIVF) -> SearchParametersIVF:
        """``params``, unless they ask for means that this index does not keep."""
        if params.tail and not self.layout.mean_run_tokens:
            raise ParameterError(f"tail: expected an index with mean_run_tokens of 1 or more, got tail={params.tail} and 0")
        return params

    # -- of one search ------------------------------------------------------------------------------------------------

    def merged(self, params: SearchParametersIVF) -> SearchParametersIVF:
        """Parameters of one search, over those of the index; the same object for equal ones. ParameterError for a tail without
        means."""
        found = self._merged.get(params)
        if found is None:
            found = self._checked(params.over(self.params))
            if len(self._merged) >= MOST_PLANS:
                self._merged.clear()
            self._merged[params] = found
        return found

    def exceeded_by(self, params: SearchParametersIVF) -> bool:
        """Whether a search asks for a larger window or more sinks than the index keeps apart."""
        return (params.window or 0) > self.layout.window or (params.sinks or 0) > self.layout.sinks

    # -- changed ------------------------------------------------------------------------------------------------------

    def with_layout(self, **changes: int) -> IndexOptions:
        """Other numbers of the layout, by name. ParameterError for no means while there is a tail."""
        if not changes.get("mean_run_tokens", 1) and self.params.tail:
            value = changes["mean_run_tokens"]
            raise ParameterError(f"mean_run_tokens: expected at least 1 while tail is {self.params.tail}, got {value!r}")
        return replace(self, layout=replace(self.layout, **changes))

    def with_nprobe(self, value: int) -> IndexOptions:
        """Whole lists as the budget: unsets selectivity, target_mass and tail."""
        return replace(self, params=SearchParametersIVF(nprobe=value, max_codes=self.params.max_codes))

    def with_selectivity(self, value: float) -> IndexOptions:
        """Another share, or cap of the target where there is one; unsets nprobe."""
        return replace(self, params=replace(self.params, nprobe=None, selectivity=value))

    def with_target_mass(self, value: float | None) -> IndexOptions:
        """A target in place of the budget, whose selectivity is then its cap; None makes the cap a budget that is spent."""
        if value is None:
            budget = SearchParametersIVF(nprobe=self.params.nprobe, selectivity=self.params.selectivity)
        else:
            budget = SearchParametersIVF(target_mass=value)
        return replace(self, params=budget.over(self.params))

    def with_tail(self, value: float) -> IndexOptions:
        """Another share of the budget for means."""
        return replace(self, params=SearchParametersIVF(tail=value).over(self.params))

    def with_max_codes(self, value: int) -> IndexOptions:
        """Another limit of the sealed tokens read."""
        return replace(self, params=SearchParametersIVF(max_codes=value).over(self.params))
