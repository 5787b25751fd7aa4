"""An audit while serving: one step in N, one layer in turn, is compared with dense attention over the same index.

`attach(..., audit_every=N)` asks for it, `audit_stats(model)` tells what came of it. An audited layer reads its whole cache twice
over, sinks and recent tokens once more, and the step returns the same output as any other. Knows indexes and numbers, no model.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import checks
from ..errors import ParameterError
from ..index import AsymmetricIndex
from ..precision import full_precision
from ..search.params import SearchParametersIVF

MIN_AUDITS = 16
"""Audits that a verdict needs: fewer say more of single steps than of the routers."""

KEPT_AUDITS = 128
"""The newest audits, over which the verdict is given."""

TOLERATED = 0.1
"""How much less of the attention outside sinks and window may be captured than training measured. Texts of the kinds trained on
differ by 0.03 to 0.08 in a layer (``spread`` in the routers' config), other kinds capture 0.05 less."""

EVERYTHING = SearchParametersIVF(selectivity=1.0, max_codes=0, tail=0.0, sampled_share=0.0)

WELL_AGAIN = 0.05
"""By how much the bound has to be passed after a warning before there can be another."""

AGE_TOKENS = 128
"""Drift is followed over octaves of the text behind the prompt, of which the first ends here."""


class AuditWarning(UserWarning):
    """An attached model reads less of its attention than it should: the routers do not fit what it reads now."""


@dataclass(frozen=True)
class LayerAudit:
    """Of one layer, over its audits.

    captured : share of the attention outside sinks and window that was read, weighted by mass; NaN if there was none outside.
    total : share of all attention that was read. outside : share of all attention that lies outside sinks and window.
    error : relative error of the output, mean over query heads and steps. promised : what training measured in place of captured,
    NaN where it said nothing. drift : captured late in the text minus captured early, NaN without both.
    """

    audits: int
    captured: float
    total: float
    outside: float
    error: float
    promised: float
    drift: float


@dataclass(frozen=True)
class AuditStats:
    """Of a model.

    steps : searches of a layer. audits : of all layers. captured, promised : as in `LayerAudit`, weighted by mass over layers.
    total, outside, error : means over audits. drift : mean over the layers that have one, NaN without. recent, bound : captured
    over the newest audits and what it is held to, NaN without a bound or with too few audits. seconds : what the audits took, the
    searches included. layers : by number, those audited.
    """

    steps: int
    audits: int
    captured: float
    total: float
    outside: float
    error: float
    promised: float
    drift: float
    recent: float
    bound: float
    seconds: float
    layers: Mapping[int, LayerAudit]


@dataclass
class _Sums:
    """Sums over audits of one layer and octave; read, outside, total and promised : attention, means over the heads of a step."""

    audits: int = 0
    read: float = 0.0
    outside: float = 0.0
    total: float = 0.0
    error: float = 0.0
    promised: float = 0.0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def captured(self) -> float:
        return self.read / self.outside if self.outside > 0 else math.nan


@dataclass(frozen=True)
class Compared:
    """One search beside dense attention over the same index, means over sequences, query heads and queries. out : what the search
    returns; total, outside, read : shares of all attention: read at all, outside sinks and window, and read of that, as ``saap
    train`` measures it: recent tokens before the window are outside, and read; error : of the output, relative, in the Euclidean
    norm."""

    out: Tensor
    total: float
    outside: float
    read: float
    error: float


def compare(index: AsymmetricIndex, query: Tensor, params: SearchParametersIVF | None = None) -> Compared:
    """`search_attend` of ``query`` (b, hq, q, d) with ``params``, compared with all that the index holds.

    The shares are exact: a softmax over some of the tokens has the denominator exp(lse), and its part of all attention is
    exp(lse - lse of all). What the index reports of its last search is the search's, as if nothing had been compared.
    """
    none = torch.full((query.shape[0], index.num_kv_heads, 1), -1, dtype=torch.int32, device=query.device)
    dense, dense_lse = index.search_attend(query, params=EVERYTHING, return_lse=True)
    _, always_lse = index.search_attend_preassigned(query, none, return_lse=True)
    tail = index.tail if params is None or params.tail is None else params.tail
    sampled = index.sampled_share if params is None or params.sampled_share is None else params.sampled_share
    if tail or sampled or (sampled is None and index.sampling is not None):
        # what the router finds is what the best runs hold that the budget has room for, as training measured it
        whole = replace(SearchParametersIVF() if params is None else params, sampled_share=0.0)
        rows = replace(index.select(query, params=whole), tail=None, tail_counts=None)
        _, read_lse = index.attend_selected(query, rows, return_lse=True)
        out = index.search_attend(query, params=params)
    else:
        out, read_lse = index.search_attend(query, params=params, return_lse=True)
    total = (read_lse.double() - dense_lse.double()).exp().clamp(max=1.0)
    always = (always_lse.double() - dense_lse.double()).exp().clamp(max=1.0)
    always = (always - _before_window(index, query, dense_lse)).clamp(min=0.0)
    wanted = dense.double()
    length = torch.linalg.vector_norm(wanted, dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    error = torch.linalg.vector_norm(out.double() - wanted, dim=-1) / length
    figures = torch.stack([total, 1 - always, (total - always).clamp(min=0.0), error]).flatten(1).mean(1).tolist()
    return Compared(out, *figures)


@full_precision
def _before_window(index: AsymmetricIndex, query: Tensor, dense_lse: Tensor) -> Tensor:
    """Share of each query's attention on recent tokens that lie before the window of the newest one: float64 (b, hq, q)."""
    lists, layout, (b, hq, q, d) = index.invlists, index.layout, query.shape
    captured = torch.zeros((b, hq, q), dtype=torch.float64, device=query.device)
    for i, n in enumerate(index.lengths):
        first = max(lists.sealed(i), min(layout.sinks, n))
        keys = lists.key_rows(i, first, max(first, n - min(layout.window, n))).float()
        logits = (query[i].float().view(keys.shape[0], -1, q, d) @ keys[:, None].transpose(2, 3) * index.scale).view(hq, q, -1)
        ends = n - q + 1 + torch.arange(q, dtype=torch.int64, device=query.device)  # query j belongs to token n - q + j
        seen = torch.arange(first, first + keys.shape[1], dtype=torch.int64, device=query.device) < ends[:, None]
        captured[i] = (logits.double() - dense_lse[i, ..., None].double()).exp().mul(seen).sum(-1)
    return captured


class Audit:
    """What `attach` makes of ``audit_every``: shared by every cache of a model, safe for threads.

    every : steps of which one is audited; may be changed. layers : numbers of those that are indexed, audited in turn; with
    ``in_turn=False`` an audited step audits all. promised : by layer, the share of the attention outside sinks and window that
    training captured at this budget, or nothing. target_mass : the share of all attention that the budget is to capture, or None.
    bound : the least share captured, None for what was promised but for `TOLERATED`.

    Raises ParameterError.
    """

    def __init__(
        self, every: int, layers: Sequence[int], promised: Mapping[int, float], target_mass: float | None = None,
        bound: float | None = None, in_turn: bool = True,
    ) -> None:
        self.every, self.in_turn = checks.integer(every, "audit_every", 1), in_turn
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 <= bound <= 1):
            raise ParameterError(f"audit_bound: expected 0 <= audit_bound <= 1, got {bound!r}")
        self._turn = {number: at for at, number in enumerate(sorted(layers))}
        self._promised, self._target_mass, self._bound = dict(promised), target_mass, bound
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget every audit and step."""
        with self._lock:
            self._steps = dict.fromkeys(self._turn, 0)
            self._first: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
            self._sums: dict[tuple[int, int], _Sums] = {}
            self._recent: deque[tuple[float, float, float]] = deque(maxlen=KEPT_AUDITS)  # read, what it is held to, outside
            self._seconds, self._warned = 0.0, False

    def due(self, number: int, layer: Any, tokens: int) -> bool:
        """Count a search of layer ``number`` in a cache, ``layer``, that holds ``tokens``; whether it is to be audited."""
        with self._lock:
            self._first.setdefault(layer, tokens)
            self._steps[number] += 1
            turn, rest = divmod(self._steps[number], self.every)
            return not rest and (not self.in_turn or (turn - 1) % len(self._turn) == self._turn[number])

    def search(
        self, number: int, layer: Any, index: AsymmetricIndex, query: Tensor, params: SearchParametersIVF | None, tokens: int
    ) -> Tensor:
        """Search as `AsymmetricIndex.search_attend` does, and keep what the comparison says."""
        began = time.perf_counter()
        compared = compare(index, query, params)
        seconds = time.perf_counter() - began
        # a comparison without tokens to choose from says nothing; NaN in a query would stay in every sum
        if all(map(math.isfinite, (compared.total, compared.outside, compared.read, compared.error))):
            self._keep(number, layer, compared, tokens, seconds)
        return compared.out

    def _keep(self, number: int, layer: Any, compared: Compared, tokens: int, seconds: float) -> None:
        promised = compared.outside * self._promised.get(number, math.nan)
        if self._target_mass is not None:
            promised = max(0.0, self._target_mass - (1 - compared.outside))
        bound = max(0.0, promised - TOLERATED * compared.outside) if self._bound is None else compared.outside * self._bound
        with self._lock:
            age = max(0, tokens - self._first.get(layer, tokens))
            key = number, (age // AGE_TOKENS).bit_length()
            one = _Sums(1, compared.read, compared.outside, compared.total, compared.error, promised)
            self._sums[key] = self._sums.get(key, _Sums()) + one
            self._seconds += seconds
            if math.isfinite(bound):
                self._recent.append((compared.read, bound, compared.outside))
            newest, least = self._newest()
            warn = newest < least and not self._warned
            self._warned = warn or (self._warned and not newest > least + WELL_AGAIN)
        if warn:
            self._warn()

    def _newest(self) -> tuple[float, float]:
        """Captured share over the newest audits and the bound of it; NaN where there is nothing to judge."""
        outside = sum(outside for _, _, outside in self._recent)
        if len(self._recent) < MIN_AUDITS or not outside > 0:
            return math.nan, math.nan
        return sum(read for read, _, _ in self._recent) / outside, sum(bound for _, bound, _ in self._recent) / outside

    def _warn(self) -> None:
        stats = self.stats()
        worst = min(stats.layers.items(), key=lambda item: item[1].captured if math.isfinite(item[1].captured) else math.inf)
        why = "audit_bound" if self._bound is not None else f"{TOLERATED} less than training promised"
        warnings.warn(
            f"audit: expected the newest steps to capture {stats.bound:.1%} ({why}) of the attention outside sinks and window, "
            f"got {stats.recent:.1%}; over all {stats.audits} audits the least is {worst[1].captured:.1%} in layer {worst[0]}, "
            f"and the output error {stats.error:.3f}. Read more (selectivity), or train routers on text of this kind",
            AuditWarning,
            stacklevel=2,
        )

    def stats(self) -> AuditStats:
        """All audits since `attach` or `reset`."""
        with self._lock:
            sums, newest, seconds, steps = dict(self._sums), self._newest(), self._seconds, max(self._steps.values())
        layers, totals = {}, _Sums()
        for number in sorted({number for number, _ in sums}):
            octaves = {octave: one for (layer, octave), one in sums.items() if layer == number}
            whole = sum(octaves.values(), _Sums())
            drift = octaves[max(octaves)].captured - octaves[min(octaves)].captured if len(octaves) > 1 else math.nan
            layers[number] = LayerAudit(*_figures(whole), drift)
            totals = totals + whole
        drifts = [layer.drift for layer in layers.values() if math.isfinite(layer.drift)]
        drift = sum(drifts) / len(drifts) if drifts else math.nan
        return AuditStats(steps, *_figures(totals), drift, *newest, seconds, layers)


def _figures(sums: _Sums) -> tuple[int, float, float, float, float, float]:
    """audits, captured, total, outside, error, promised."""
    if not sums.audits:
        return (0, *[math.nan] * 5)  # type: ignore[return-value]
    n = sums.audits
    promised = sums.promised / sums.outside if sums.outside > 0 else math.nan
    return n, sums.captured, sums.total / n, sums.outside / n, sums.error / n, promised


def promised_shares(evaluation: Mapping[str, Any], shares: Mapping[int, float]) -> dict[int, float]:
    """What ``saap train`` measured of layers at budgets between and beyond those it measured.

    evaluation : of the routers' config, by layer; shares : by layer, of the tokens outside sinks and window that are read.
    Returns by layer the share of the attention outside that is read, 0 to 1; layers without figures are left out. Linear in the
    logarithm of the share, in proportion below the least that was measured; everything read is everything captured.
    """
    promised = {}
    for number, share in shares.items():
        row = evaluation.get(str(number))
        if not row:
            continue
        points = [*((float(s), float(c) / 100) for s, c in zip(row["shares"], row["captured"], strict=True) if s < 1), (1.0, 1.0)]
        low = points[0]
        if share <= low[0]:
            promised[number] = low[1] * share / low[0]
            continue
        for (s, c), (t, d) in itertools.pairwise(points):
            if s <= share <= t:
                promised[number] = c + (d - c) * (math.log(share / s) / math.log(t / s))
                break
    return promised
