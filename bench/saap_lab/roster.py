"""All methods by name, calibrated on training sequences and set to read equal bytes, index and metadata included.

A budget is a share of the tokens between sinks and window. A method whose own tables cost bytes gets fewer tokens for it; one
that cannot do with so few bytes is left out, with the reason. Weights that all sequences share are reported beside, not charged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from saap_index.errors import ParameterError
from saap_index.routers import Routers

from .corm import Corm
from .eigen import Eigen
from .evaluate import Settings
from .flags import check_names
from .indexes import CONFIGS, Indexes
from .loki import Loki
from .method import ITEM_BYTES, Method
from .moa_profile import Profile
from .replace import Prompt
from .saap import Prefilled, Saap
from .scfa import ScfaDrop, ScfaHash
from .selections import SELECTIONS
from .spans import Moa
from .sparsek import SparseK
from .yardsticks import Clusters, Dense, Selected, TopK, WeightedTopK

KINDS = {
    "dense": "yardstick",
    "topk": "yardstick",
    "topk_group": "yardstick",
    "topk_weighted": "yardstick",
    "recent": "yardstick",
    "random": "yardstick",
    "ivf": "yardstick",
    "quest": "yardstick",
    "moments": "yardstick",
    "saap": "query-adaptive index",
    "saap-own": "query-adaptive index",
    "published": "query-adaptive index",
    "loki": "query-adaptive index",
    "scfa": "query-adaptive index",
    "scfa-centred": "query-adaptive index",
    "scfa-drop": "eviction",
    "sparsek": "eviction",
    "corm": "eviction",
    "moa": "static pattern",
    "eigen": "compression",
}
"""Every built-in method and the group it belongs to, in the order of the tables."""

TOLERANCE = 0.003
"""A method may read this much more than its budget, for whole tokens."""

_NEAR = 0.015
"""A method that comes this near to its budget from below is not asked to read more."""

_TRIES = 9
_STEPS = 8
"""Late steps of a training sequence over which the bytes of a method are averaged."""

_LOKI_SHARE = 0.5
"""Of its bytes that Loki may spend on ranking: with less it ranks badly, with more it reads nothing."""

BATCH = 16
"""Sequences decoded at once, if nothing else is said: each is charged so much less of the weights that they share."""

Build = Callable[[float], Method]
"""A method from the one number that says how much it reads, in (0, 1]; what is calibrated is shared by all that it builds."""


@dataclass
class Roster:
    """Calibrated methods by name and share."""

    names: Sequence[str]
    """Of `KINDS` or of ``own``."""
    prompts: Sequence[Prompt]
    """Training sequences, with queries kept."""
    settings: Settings
    numbers: Sequence[int]
    """Layers that will be measured or replaced."""
    folder: Path | None = None
    """Where trained indexes are kept; None for nowhere."""
    own: Mapping[str, Build] | None = None
    """A user's methods."""
    profile: Profile | None = None
    """For ``moa``."""
    batch: int = BATCH
    """Sequences that share weights."""
    routers: Routers | None = None
    """From ``saap train``, in place of training."""
    once: Callable[[str, Callable[[], Any]], Any] = lambda key, measure: measure()
    """(key, measure) -> plain data, measured or from an earlier run."""
    progress: Callable[[str], None] = lambda line: None
    """Is told what takes long."""

    def __post_init__(self) -> None:
        check_names("methods", self.names, (*KINDS, *(self.own or {})))
        self.missing: dict[tuple[str, float], str] = {}
        self._methods: dict[float, list[Method]] = {}
        self._donors: dict[object, Method] = {}
        self._indexes = Indexes(self.prompts, self.settings, self.numbers, self.folder, self.routers, self.progress)
        self._clusters = Clusters()

    def at(self, share: float, length: int = 0) -> list[Method]:
        """The methods that can be had at a share, the same objects each time; they are the same for texts of any length."""
        if share not in self._methods:
            self._methods[share] = [m for m in (self._fitted(name, share) for name in self.names) if m is not None]
        return self._methods[share]

    def _fitted(self, name: str, share: float) -> Method | None:
        if name == "dense":
            return Dense()
        self.progress(f"{name}: calibrating for {share:.1%}")
        build = self._build(name, share)
        row = self.once(f"fit/{name}/{share}", lambda: self._fit(build, share))
        if row["number"] is None:
            self.missing[name, share] = row["reason"]
            return None
        method = build(row["number"])
        method.name = name
        if isinstance(method, Saap):
            method.prefilled = None
        return method

    def _fit(self, build: Build, share: float) -> dict[str, Any]:
        """number : what the method is built with, None if nothing fits, for this reason."""
        tried: list[tuple[float, str]] = []

        def measure(method: Method) -> float:
            tried.append(self._bytes(method))
            return tried[-1][0]

        target = self._target(share)
        number = fit(build, share, measure, target)
        reason = f"reads more than the budget of {target / 1e3:.0f} kB per layer and step"
        if tried:
            reason += f"; the least it was set to: {min(tried)[0] / 1e3:.0f} kB, {min(tried)[1]}"
        return {"number": number, "reason": "" if number is not None else reason}

    def _target(self, share: float) -> float:
        """Bytes of a step with so many tokens and nothing else, mean over the layers that `_bytes` measures."""
        s, sizes = self.settings, []
        for slot in self._sample():
            layer = self.prompts[0].layers[slot]
            for n in (self._last() + 1).tolist():
                always = min(n, s.sinks + s.window)
                sizes.append((always + share * (n - always)) * layer.heads * layer.token_bytes)
        return sum(sizes) / len(sizes)

    def _bytes(self, method: Method) -> tuple[float, str]:
        """Mean over late steps of the first training sequence, and what it is made of: an index reads more just before it seals a
        block than after."""
        prompt, sizes, last = self.prompts[0], [], self._last()
        for slot in self._every() if _uneven(method) else self._sample():
            state = method.start(prompt.layers[slot], prompt.keys[slot].shape[1])
            done = 0
            for position, query in zip(last.tolist(), prompt.queries[slot][:, :, -len(last) :].unbind(2), strict=True):
                state.append(prompt.keys[slot][:, done : position + 1], prompt.values[slot][:, done : position + 1])
                prompt.show(state, slot, max(done, position - method.observed), position)
                done = position + 1
                step = state.answer(query.float())
                sizes.append([step.kv_bytes, step.other_bytes, step.shared_bytes / self.batch])
        parts = [sum(x) / len(sizes) for x in zip(*sizes, strict=True)]
        kv_bytes, other, weights = (x / 1e3 for x in parts)
        return sum(parts), f"{kv_bytes:.0f} of K and V, {other:.0f} of tables, {weights:.0f} of weights"

    def _last(self) -> Tensor:
        """The newest kept positions of the first training sequence."""
        return self.prompts[0].positions[-_STEPS:]

    def _every(self) -> list[int]:
        """Positions in the prompt of the layers that will be measured."""
        return [i for i, layer in enumerate(self.prompts[0].layers) if layer.number in set(self.numbers)]

    def _sample(self) -> list[int]:
        """Of an early, a middle and a late one of them."""
        slots = self._every()
        return sorted({slots[0], slots[len(slots) // 2], slots[-1]})

    def _build(self, name: str, share: float) -> Build:
        s = self.settings
        outside = {"sinks": s.sinks, "window": s.window}
        own = (self.own or {}).get(name)
        if own is not None:
            return lambda x: self._calibrate(own(x))
        if name == "eigen":
            return self._eigen
        if name == "moa":
            profile = self._profile()
            return lambda x: Moa(profile.plan(x))
        if name in CONFIGS:
            indexes, prefilled = self._indexes.at(name, share), Prefilled()
            return lambda x: Saap(name, indexes, x, prefilled=prefilled)
        if name == "loki":
            layer = self.prompts[0].layers[0]
            # whole powers of two, as many dims as fit into that part of the bytes
            dims = _LOKI_SHARE * share * layer.token_bytes / ITEM_BYTES
            r = max([1, *(2**i for i in range(12) if 2**i <= min(dims, layer.d))])
            return self._calibrated(("loki", r), lambda x: Loki(x, r, sinks=s.sinks, window=s.window))
        builds: dict[str, Build] = {
            "topk": lambda x: TopK(x, **outside),
            "topk_weighted": lambda x: WeightedTopK(x, **outside),
            "scfa": lambda x: ScfaHash(_even(1 / x), False, sinks=s.sinks, window=s.window),
            "scfa-centred": lambda x: ScfaHash(_even(1 / x), True, sinks=s.sinks, window=s.window),
            "scfa-drop": lambda x: ScfaDrop(x),
            "sparsek": lambda x: SparseK(x, sinks=s.sinks, window=s.window),
            "corm": lambda x: Corm(s.window, x, sinks=s.sinks),
        }
        if name in SELECTIONS:
            return lambda x: self._selected(name, x)
        return self._calibrated(name, builds[name])

    def _selected(self, name: str, x: float) -> Selected:
        method = Selected(name, x, self.settings.sinks, self.settings.window)
        method.clusters = self._clusters
        return method

    def _calibrated(self, key: object, build: Build) -> Build:
        """Calibrate once; what was learnt does not depend on how much is read, so later methods take it from the first."""

        def calibrated(x: float) -> Method:
            method = build(x)
            if key not in self._donors:
                self._donors[key] = self._calibrate(method)
            for part in ("bases", "means", "scorers"):
                if hasattr(method, part):
                    setattr(method, part, getattr(self._donors[key], part))
            return method

        return calibrated

    def _calibrate(self, method: Method) -> Method:
        for slot in self._every():
            training = ([getattr(p, part)[slot].float() for p in self.prompts] for part in ("keys", "values", "queries"))
            method.calibrate(self.prompts[0].layers[slot], *training)
        return method

    def _eigen(self, x: float) -> Method:
        """A basis of lower rank is the first directions of the whole one."""
        layer = self.prompts[0].layers[0]
        if "eigen" not in self._donors:
            self._donors["eigen"] = self._calibrate(Eigen(layer.d, layer.e))
        both = max(1, round(x * (layer.d + layer.e) / 2))
        cut, whole = Eigen(min(layer.d, both), min(layer.e, both)), self._donors["eigen"]
        assert isinstance(whole, Eigen)
        cut.bases = {
            i: (k[:, : cut.rank_k].contiguous(), v[:, :, : cut.rank_v].contiguous()) for i, (k, v) in whole.bases.items()
        }
        return cut

    def _profile(self) -> Profile:
        if self.profile is None:
            raise ParameterError("profile: expected one for moa, got none; see moa_profile.profile")
        return self.profile


def fit(build: Build, share: float, measure: Callable[[Method], float], target: float) -> float | None:
    """The number with which a method reads ``target`` bytes, hardly more; None if even little of it reads more.

    Bytes grow with the number, in steps for some methods: the result is the largest number tried whose bytes fit.
    """
    low, high, x = 0.0, 1.0, min(1.0, share)
    best = None
    for _ in range(_TRIES):
        try:
            size = measure(build(x))
        except ParameterError:  # less than the method can be set to
            size = 0.0
            low = x
        else:
            if size <= target * (1 + TOLERANCE):
                best, low = x, x
                if size >= target * (1 - _NEAR) or x >= 1:
                    break
            else:
                high = x
        # up by what is missing, down by halves: bytes are about linear in the number
        x = min(high if high == 1.0 else (low + high) / 2, x * target / size) if size and high == 1.0 else (low + high) / 2
        if high - low < 1e-4:
            break
    return best


def _uneven(method: Method) -> bool:
    """Whether layers read unlike numbers of bytes."""
    spread = isinstance(method, Saap) and any(x.budget_shares is not None for x in method.indexes.values())
    return spread or isinstance(method, Moa)


def _even(x: float) -> int:
    return max(2, 2 * round(x / 2)) if x > 1 else 1
