"""What an index is made for, as one record: shapes, dtype, layout, and what a search reads by default. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from .. import checks
from ..backends import STORAGE_CODES, Backend, StorageCode
from ..errors import DeviceError, ParameterError
from ..invlists.layout import Layout
from .params import SAMPLING, SELECTIVITY, SearchParametersIVF
from .plan import MOST_PLANS

MAX_DIM = 256

Value = TypeVar("Value")


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
    """Of stored keys and values; of sealed ones as they are given, where ``storage`` says otherwise."""
    layout: Layout = field(default_factory=Layout)
    """Which tokens are sinks, recent and sealed."""
    params: SearchParametersIVF = field(default_factory=lambda: SearchParametersIVF(selectivity=SELECTIVITY))
    """Of searches that say nothing else."""
    storage: str | None = None
    """Of sealed keys and values: None, as ``dtype`` says, or "SQ8" or "SQ8/SQ4", see `backends.scalar_quantizer`."""
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
        if self.storage is not None and self.storage not in STORAGE_CODES:
            raise ParameterError(f"storage: expected None or one of {sorted(STORAGE_CODES)}, got {self.storage!r}")
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

    def check_backend(self, backend: Backend, device: torch.device) -> None:
        """DeviceError for codes where nothing reads them."""
        if self.storage is not None and not backend.reads_codes:
            where = f"{str(device)!r}, backend {backend.name!r}"
            raise DeviceError(f"storage: expected a backend that reads codes, got {self.storage!r} on {where}")

    @property
    def code(self) -> StorageCode | None:
        """What sealed keys and values are stored as; None for numbers."""
        return None if self.storage is None else STORAGE_CODES[self.storage]

    # -- of one search ------------------------------------------------------------------------------------------------

    def merged(self, params: SearchParametersIVF | None) -> SearchParametersIVF:
        """Parameters of one search, over those of the index; the same object for equal ones. ParameterError for a tail without
        means, and for what are no parameters."""
        if params is None:
            return self.params
        if not isinstance(params, SearchParametersIVF):
            raise ParameterError(f"params: expected SearchParametersIVF or None, got {type(params).__name__}")
        merged = self._merged.get(params)
        if merged is None:
            merged = self._checked(params.over(self.params))
            if len(self._merged) >= MOST_PLANS:
                self._merged.clear()
            self._merged[params] = merged
        return merged

    def exceeded_by(self, params: SearchParametersIVF) -> bool:
        """Whether a search asks for a larger window or more sinks than the index keeps apart."""
        return (params.window or 0) > self.layout.window or (params.sinks or 0) > self.layout.sinks

    # -- changed ------------------------------------------------------------------------------------------------------

    def changed(self, name: str, value: Any) -> IndexOptions:
        """These options with another value of one field of the layout or of the default search parameters.

        nprobe : unsets selectivity, target_mass and tail. selectivity : the cap of target_mass where there is one; unsets nprobe.
        target_mass : makes selectivity its cap; None makes the cap a budget that is spent. nprobe, target_mass and tail unset
        sampled_share; None for that and the two beside it is what is calibrated.

        ParameterError for a value outside its range, and for no means while there is a tail.
        """
        params = self.params
        if name in Layout.__dataclass_fields__:
            if name == "mean_run_tokens" and not value and params.tail:
                raise ParameterError(f"mean_run_tokens: expected at least 1 while tail is {params.tail}, got {value!r}")
            return replace(self, layout=replace(self.layout, **{name: value}))
        if name == "nprobe":
            return replace(self, params=SearchParametersIVF(nprobe=value, max_codes=params.max_codes))
        if name == "selectivity":
            return replace(self, params=replace(params, nprobe=None, selectivity=value))
        if name in SAMPLING and value is None:
            return replace(self, params=replace(params, **{name: None}))
        if name == "target_mass" and value is None:
            budget = SearchParametersIVF(nprobe=params.nprobe, selectivity=params.selectivity)
        else:
            budget = SearchParametersIVF(**{name: value})
        return replace(self, params=budget.over(params))


_READ_ONLY = "is_trained", "rope"


class Field(property, Generic[Value]):
    """A property of an `AsymmetricIndex`: a field of one of its records, by the path there.

    unset : what a field at None reads as. Those of layout and search parameters may be set (`AsymmetricIndex._set_option`), and
    parts of what is trained (`AsymmetricIndex._set_trained`).
    """

    def __init__(self, path: str, doc: str, unset: Any = None) -> None:
        record, _, name = path.rpartition(".")
        names = path.split(".")

        def read(index: Any) -> Any:
            value = index
            for part in names:  # as torch.compile can trace it
                value = getattr(value, part)
            return unset if value is None else value

        def write_option(index: Any, value: Any) -> None:
            index._set_option(name, value)

        def write_trained(index: Any, value: Any) -> None:
            if not isinstance(value, float) or value != read(index):  # a cache of transformers sets the scale before every step
                index._set_trained(**{name: value})

        writers = dict.fromkeys(("_options.layout", "_options.params"), write_option) | {"_trained": write_trained}
        super().__init__(read, None if name in _READ_ONLY else writers.get(record), doc=doc)
        self.__doc__ = doc  # of a subclass, Python shows the docstring of the class otherwise

    if TYPE_CHECKING:

        def __get__(self, instance: Any, owner: type | None = None) -> Value: ...  # type: ignore[override]

        def __set__(self, instance: Any, value: Value) -> None: ...
