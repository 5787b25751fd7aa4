"""What a user may say, under "saap" in ``--additional-config``. Knows no vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .. import checks
from ..errors import ParameterError
from ..invlists.layout import Layout
from ..search.params import SELECTIVITY, TARGET_CAP, SearchParametersIVF

KEY = "saap"


@dataclass(frozen=True, kw_only=True)
class Options:
    """routers : a folder written by ``saap train``. selectivity, target_mass, sampled_share : as in `SearchParametersIVF`; 0.05
    if neither of the first two is given. break_even : a sequence with fewer tokens is read whole. layers : numbers of those to
    serve, None for all with routers but those that training advises to leave dense.

    Raises ParameterError for a value outside its range.
    """

    routers: str
    selectivity: float | None = None
    target_mass: float | None = None
    sampled_share: float | None = None
    break_even: int = Layout().break_even
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.routers, str | os.PathLike) or not str(self.routers):
            raise ParameterError(f"routers: expected a folder written by saap train, got {self.routers!r}")
        checks.integer(self.break_even, "break_even", 0)
        for number in self.layers or ():
            checks.integer(number, "layers", 0)
        _ = self.params

    @property
    def params(self) -> SearchParametersIVF:
        selectivity = self.selectivity
        if selectivity is None:
            selectivity = SELECTIVITY if self.target_mass is None else TARGET_CAP
        return SearchParametersIVF(selectivity=selectivity, target_mass=self.target_mass, sampled_share=self.sampled_share)

    @property
    def reads_all(self) -> bool:
        """Whether every token is read anyway."""
        return self.target_mass is None and self.params.selectivity == 1

    @classmethod
    def of(cls, additional_config: Any) -> Options:
        """From vLLM's ``additional_config``. ParameterError, saying how, if there are none for us, or unknown ones."""
        how = "--additional-config '{\"saap\": {\"routers\": \"FOLDER\", \"selectivity\": 0.05}}'"
        said = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        if not isinstance(said, Mapping):
            raise ParameterError(f"saap: expected options for --attention-backend CUSTOM, {how}, got {said!r}")
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(said) - set(names)):
            raise ParameterError(f"saap: expected options among {', '.join(names)}, got {', '.join(unknown)}")
        if "routers" not in said:
            raise ParameterError(f"saap: expected a folder of routers, {how}, got none")
        layers = said.get("layers")
        if layers is not None and not isinstance(layers, list | tuple):
            raise ParameterError(f"layers: expected a list of numbers, got {layers!r}")
        return cls(**{**said, "layers": None if layers is None else tuple(layers)})
