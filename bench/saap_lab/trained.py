"""The methods that `saap eval` compares: an index with trained routers, and yardsticks that read as many bytes. Knows no files.

A budget is a share of the tokens between sinks and window, the average over layers and KV heads. The index reads offset tables
and row lists besides; a yardstick is given as many more tokens as these bytes come to. What routing reads (weights of the router,
the centroids of ``ivf``) is charged to neither, and stands in columns of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from saap_index.errors import ParameterError
from saap_index.invlists.layout import Layout
from saap_index.routers import Routers
from saap_index.search.params import TARGET_CAP, SearchParametersIVF

from .flags import check_names
from .method import ITEM_BYTES, Method
from .own import Build, builder, learns
from .replace import Prompt
from .report import MASS
from .saap import Prefilled, Saap
from .yardsticks import Clusters, Dense, Selected, TopK, WeightedTopK

YARDSTICKS = ("dense", "topk", "topk_group", "topk_weighted", "ivf", "quest", "moments", "recent", "random")
INDEX_OPTIONS: dict[str, dict[str, Any]] = {
    "saap": {},  # spends by the routers' budget plan
    "saap-even": {"budget_shares": None},  # the same share in every layer and head
    "published": {"nprobe": 1, "budget_shares": None},
}
METHODS = (*INDEX_OPTIONS, *YARDSTICKS)
DEFAULT = "saap,saap-even,published,dense,topk_group,ivf,recent,random"
"""``published`` is left out where the routers are of another kind."""

_TABLE_ENTRY = _ROW_NUMBER = 4  # bytes


class TrainedMethods:
    """Methods by share, the same objects each time, for texts of about one length.

    routers : of every layer that is indexed
    names : of `METHODS`, ``published`` among them only if the routers are the published classifier's
    budgets : shares of the tokens at which they are measured
    masses : targets of `target_mass`, each a method at the share that is its cap
    own : a user's classes, see `own`

    Raises ParameterError for names or targets that cannot be had.
    """

    def __init__(
        self, routers: Routers, names: Sequence[str], budgets: Sequence[float], masses: Sequence[float] = (),
        own: Mapping[str, type[Method]] | None = None,
    ) -> None:
        check_names("methods", names, METHODS)
        if not all(0 < x < 1 for x in masses):
            raise ParameterError(f"target-mass: expected targets in (0, 1), as 0.9, got {', '.join(map(str, masses))}")
        if "published" in names and not publishable(routers):
            raise ParameterError(
                f"methods: expected routers trained with --router mlp for published, got {routers.config.get('router')!r}"
            )
        if masses and any(layer.calibration is None for layer in routers.layers.values()):
            raise ParameterError("target-mass: expected routers with a calibration, got some without")
        self.routers, self.names, self.budgets, self.masses = routers, names, budgets, masses
        self.layout: Layout = routers.index(min(routers.layers), break_even=0).layout
        self.own: Mapping[str, type[Method]] = own or {}
        """A user's, by name; measured beside ``names``."""
        self.prompts: Sequence[Prompt] = ()
        """What those of a user learn from, if they do; set before methods are asked for."""
        self.missing: dict[tuple[str, float], str] = {}
        self.dtype = torch.float32
        """Of the model, and so of the indexes; set before methods are asked for."""
        self._indexes: dict[str, Any] = {}
        self._clusters = Clusters()
        self._methods: dict[tuple[float, int], list[Method]] = {}

    def shares(self) -> tuple[float, ...]:
        """Budgets, the cap if there are targets, and 1 for dense attention; ascending."""
        cap = {TARGET_CAP} if self.masses else set()
        return tuple(sorted({*self.budgets, *cap, *({1.0} if "dense" in self.names else ())}))

    def at(self, share: float, length: int) -> list[Method]:
        """What is measured at a share, on texts of so many tokens."""
        if (share, length) not in self._methods:
            self._methods[share, length] = self._build(share, length)
        return self._methods[share, length]

    def _build(self, share: float, length: int) -> list[Method]:
        methods: list[Method] = []
        if share in self.budgets:
            methods += [self._method(name, length, share) for name in self.names if name != "dense"]
            methods += [self._own(build, self.equal_share(length, share)) for build in self.own_builds().values()]
        if share == TARGET_CAP:
            methods += [self._saap("saap", f"{MASS}{x:g}", None, SearchParametersIVF(target_mass=x)) for x in self.masses]
        if share == 1.0 and "dense" in self.names:
            methods.append(Dense())
        return methods

    def _method(self, name: str, length: int, share: float) -> Method:
        if name in INDEX_OPTIONS:
            return self._saap(name, name, share, None)
        share = self.equal_share(length, share)
        if name == "topk":
            return TopK(share, self.layout.sinks, self.layout.window)
        if name == "topk_weighted":
            return WeightedTopK(share, self.layout.sinks, self.layout.window)
        method = Selected(name, share, self.layout.sinks, self.layout.window)
        method.clusters = self._clusters
        return method

    def own_builds(self) -> dict[str, Build]:
        """A user's methods from the share that they read."""
        return {name: builder(name, kind, self.layout.sinks, self.layout.window) for name, kind in self.own.items()}

    def _own(self, build: Build, share: float) -> Method:
        method = build(share)
        for slot, layer in enumerate(self.prompts[0].layers if learns(type(method)) else ()):
            training = ([getattr(p, part)[slot].float() for p in self.prompts] for part in ("keys", "values", "queries"))
            method.calibrate(layer, *training)
        return method

    def _saap(self, kind: str, name: str, share: float | None, params: SearchParametersIVF | None) -> Saap:
        if kind not in self._indexes:
            options = {"break_even": 0, "dtype": self.dtype, **INDEX_OPTIONS[kind]}  # a short text is no excuse here
            self._indexes[kind] = {n: self.routers.index(n, **options) for n in self.routers.layers}, Prefilled()
        indexes, prefilled = self._indexes[kind]
        return Saap(name, indexes, share, params, prefilled)

    def equal_share(self, length: int, share: float) -> float:
        """The share that a method without tables may read for the bytes that the index reads at ``share``, near that length."""
        layer = next(iter(self.routers.layers.values()))
        _, nlist, d = layer.quantizer.centroids.shape
        between = length - self.layout.sinks - self.layout.window
        segments = self.layout.segments(length)
        if not segments or between <= 0:
            return share
        rows = max(0.0, share * between - (length - self.layout.window - segments[-1][1]))
        tables = len(segments) * (nlist + 1) * _TABLE_ENTRY + rows * _ROW_NUMBER
        return min(1.0, share + tables / (2 * d * ITEM_BYTES) / between)


def publishable(routers: Routers) -> bool:
    """Whether the routers are the published classifier's, of lists and not of tokens."""
    return all(layer.tower is None and not layer.router.size_weighted for layer in routers.layers.values())
