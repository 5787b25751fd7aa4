"""Captured attention mass and output error of indexes and other selections, on captured sequences, at equal tokens read.

The protocol: queries near the end of an unseen sequence; sinks and the newest `WINDOW` tokens are read by everyone; a budget,
a share of the other tokens, is spent by each method, once per KV head. What the index reads of its recent tokens beyond the
window counts against its budget. Axes as in measures.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saap_index.index import AsymmetricIndex
from saap_index.search.params import SearchParametersIVF

from ..measures import Exact, exact_attention, measure, output_error
from ..selections import SINKS, WINDOW, Selector, selector
from .capture import Capture


@dataclass
class Row:
    """One method, layer and share, over all sequences so far. Sizes are the last sequence's: they hardly differ."""

    captured: list[float] = field(default_factory=list)
    """Attention mass per sequence of the tokens chosen, summed over queries and heads."""
    outside: list[float] = field(default_factory=list)
    """The same of all tokens outside sinks and window."""
    errors: list[float] = field(default_factory=list)
    """Mean output error per sequence."""
    tokens: float = 0.0
    """Read per query and KV head, sinks and window included."""
    kv_bytes: float = 0.0
    """Of these tokens, in the dtype of the index."""
    other_bytes: float = 0.0
    """Tables, row lists, centroids."""
    router_bytes: float = 0.0
    """Router weights, read once per step whatever the batch."""

    @property
    def mass_percent(self) -> float:
        """Captured mass in percent of the mass outside, weighted by mass."""
        return 100 * sum(self.captured) / sum(self.outside)

    @property
    def error(self) -> float:
        return sum(self.errors) / len(self.errors)


Table = dict[tuple[str, int, float], Row]
"""By method, layer and share."""


def evaluate(
    sequences: Iterable[Capture], indexes: Mapping[str, Mapping[int, AsymmetricIndex]], baselines: Sequence[str],
    layers: Sequence[int], shares: Sequence[float], step: Callable[[str], None] | None = None,
) -> Table:
    """Measure every index and baseline on every sequence, layer and share.

    indexes : by method and layer, trained, of batch 1; their tokens are replaced. An index whose default budget is ``nprobe``
    visits whole lists in the router's order up to the budget: SAAP as published. baselines : names of `selections.SELECTIONS`.
    step : called with a line of text after each sequence.
    """
    table: Table = {}
    for number, sequence in enumerate(sequences):
        for layer in layers:
            captured = sequence.layers[layer]
            exact = exact_attention(captured.keys[0], captured.values[0], captured.queries[0], sequence.positions, SINKS, WINDOW)
            for name in baselines:
                choose = selector(name, captured.keys[0], sinks=SINKS, window=WINDOW)
                for share in shares:
                    _baseline(table.setdefault((name, layer, share), Row()), name, choose, sequence, layer, exact, share)
            for method, by_layer in indexes.items():
                rows = [table.setdefault((method, layer, share), Row()) for share in shares]
                _index(rows, by_layer[layer], sequence, layer, exact, shares)
        if step is not None:
            step(f"sequence {number + 1}: {sequence.name}")
    return table


def _baseline(row: Row, name: str, choose: Selector, sequence: Capture, layer: int, exact: Exact, share: float) -> None:
    captured = sequence.layers[layer]
    keys, queries = captured.keys[0], captured.queries[0]
    budgets = [round(share * int(n)) for n in exact.outside.sum(1)]
    chosen = [choose(queries[:, j], int(p), budgets[j]) for j, p in enumerate(sequence.positions)]
    measures = measure(exact, torch.stack(chosen, 1))
    _record(row, measures.captured, measures.outside, measures.error)
    heads, n, d = keys.shape
    row.tokens = float(exact.always.sum(1).float().mean()) + sum(budgets) / len(budgets)
    row.kv_bytes = row.tokens * heads * (d + captured.values.shape[-1]) * keys.dtype.itemsize
    per_token = {"quest": 2 * d * keys.dtype.itemsize / 16}.get(name, 0.0)  # a page's bounds
    fixed = {"ivf": 256 * d * keys.dtype.itemsize}.get(name, 0)  # centroids
    row.other_bytes = heads * (per_token * n + fixed)


def _index(
    rows: Sequence[Row], index: AsymmetricIndex, sequence: Capture, layer: int, exact: Exact, shares: Sequence[float]
) -> None:
    captured = sequence.layers[layer]
    heads, n = captured.keys.shape[1:3]
    chosen = torch.zeros((len(shares), heads, len(sequence.positions), n), dtype=torch.bool, device="cpu")
    outputs: list[list[Tensor]] = [[] for _ in shares]
    sums = [[0.0] * 4 for _ in shares]
    index.reset()
    index.reserve_memory(n)
    done = 0
    for j, position in enumerate(sequence.positions.tolist()):
        index.add(captured.keys[:, :, done : position + 1], captured.values[:, :, done : position + 1])
        done = position + 1
        sealed = index.invlists.sealed(0)
        spare = done - sealed - WINDOW  # recent tokens beyond the window: read anyway, and part of the budget
        for k, share in enumerate(shares):
            budget = max(1, round(share * int(exact.outside[j].sum())) - spare)
            if index.nprobe is None:
                params = SearchParametersIVF(selectivity=1.0, max_codes=budget)
            else:
                params = SearchParametersIVF(nprobe=index.nlist, max_codes=budget)
            queries = captured.queries[:, :, j : j + 1]
            selection = index.select(queries, params=params)
            outputs[k].append(index.attend_selected(queries, selection)[0, :, 0])
            for head, ids in enumerate(index.read_ids(selection)[0]):
                chosen[k, head, j, ids] = True
            last = index.stats().last_search
            read = last.read_sealed + last.dense_tokens
            for at, value in enumerate((read, last.kv_bytes, last.metadata_bytes, last.router_bytes)):
                sums[k][at] += value / len(sequence.positions)
    for k, row in enumerate(rows):
        measures = measure(exact, chosen[k])
        _record(row, measures.captured, measures.outside, output_error(exact, torch.stack(outputs[k], 1)))
        row.tokens, row.kv_bytes, row.other_bytes, row.router_bytes = sums[k]


def _record(row: Row, captured: Tensor, outside: Tensor, error: Tensor) -> None:
    row.captured.append(float(captured.sum()))
    row.outside.append(float(outside.sum()))
    row.errors.append(float(error.mean()))


def pooled(table: Table, method: str, share: float, layers: Sequence[int]) -> tuple[float, float, float]:
    """Over some layers: mass in percent weighted by mass, its standard deviation over the sequences (NaN for one), mean output
    error."""
    rows = [table[method, layer, share] for layer in layers]
    count = len(rows[0].captured)
    per_sequence = torch.tensor(
        [100 * sum(r.captured[i] for r in rows) / sum(r.outside[i] for r in rows) for i in range(count)],
        dtype=torch.float32,
        device="cpu",
    )
    mass = 100 * sum(sum(r.captured) for r in rows) / sum(sum(r.outside) for r in rows)
    return mass, float(per_sequence.std()) if count > 1 else math.nan, sum(r.error for r in rows) / len(rows)
