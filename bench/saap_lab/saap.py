"""This library's index, and SAAP as published, as methods under test."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from saap_index.index import AsymmetricIndex
from saap_index.search.params import SearchParametersIVF
from saap_index.search.stats import search_stats

from .method import Attended, Layer, Method, State


class Prefilled:
    """Indexes of one model that hold a prompt, by layer: methods that differ in their budgets alone start from copies of them."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, AsymmetricIndex]] = {}

    def fork(self, number: int, empty: AsymmetricIndex, keys: Tensor, values: Tensor) -> AsymmetricIndex:
        """A copy of ``empty`` with a prompt's keys (h, n, d) and values (h, n, e) of a layer added; the last prompt is kept."""
        held = self._held.get(number)
        # the keys are held, so no other tensor can have their address
        if held is None or held[0].data_ptr() != keys.data_ptr() or held[0].shape != keys.shape:
            self._held.pop(number, None)
            empty.add(keys[None], values[None])
            self._held[number] = held = keys, empty
        return held[1].fork()


class Saap(Method):
    """An `AsymmetricIndex` per layer, trained, of batch 1; only its training and configuration are used.

    share : of the tokens outside sinks and window, the model's average if the indexes have ``budget_shares``. An index whose
    default budget is ``nprobe`` visits whole lists in the router's order up to the budget: SAAP as published. params : replaces
    the budget, for ``target_mass`` and the like; ``share`` is None then. prefilled : shared by methods with these indexes.
    """

    kind = "query-adaptive index"

    def __init__(
        self, name: str, indexes: Mapping[int, AsymmetricIndex], share: float | None, params: SearchParametersIVF | None = None,
        prefilled: Prefilled | None = None,
    ) -> None:
        self.name, self.indexes, self.share, self.params, self.prefilled = name, indexes, share, params, prefilled

    def start(self, layer: Layer, tokens: int) -> State:
        index = self.indexes[layer.number].to(layer.device).fork()
        index.reset()
        index.reserve_memory(tokens, batch=1)
        return _SaapState(self, index, layer, tokens)


class _SaapState(State):
    def __init__(self, method: Saap, index: AsymmetricIndex, layer: Layer, tokens: int) -> None:
        self.method, self.index, self.layer, self.tokens = method, index, layer, tokens

    def append(self, keys: Tensor, values: Tensor) -> None:
        keys, values = keys.to(self.index.dtype), values.to(self.index.dtype)
        shared = self.method.prefilled
        if shared is not None and not self.index.ntotal:
            self.index = shared.fork(self.layer.number, self.index, keys, values)
            self.index.reserve_memory(self.tokens)
        else:
            self.index.add(keys[None], values[None])

    def attend(self, queries: Tensor) -> Attended:
        return self._step(queries, True)

    def answer(self, queries: Tensor) -> Attended:
        return self._step(queries, False)

    def _step(self, queries: Tensor, which: bool) -> Attended:
        index, layer = self.index, self.layer
        flat = queries.reshape(1, layer.heads * layer.group, 1, layer.d).to(index.dtype)
        selection = index.select(flat, params=self._params())
        out = index.attend_selected(flat, selection)[0, :, 0].view(layer.heads, layer.group, layer.e).float()
        chosen = None
        if which:
            chosen = torch.zeros((layer.heads, index.ntotal), dtype=torch.bool, device=layer.device)
            for head, ids in enumerate(index.read_ids(selection)[0]):
                chosen[head, ids] = True
        last = search_stats(index.invlists, selection, index.query_router)
        read = last.read_sealed + last.dense_tokens
        kv_bytes = read * layer.heads * layer.token_bytes
        means = last.tail_entries * layer.heads * layer.token_bytes
        # what a router knows of lists of a prompt's own is of that prompt, and nobody else reads it
        router = index.query_router
        own = router.weights.list_bytes if router is not None and index.tower is not None and last.router_bytes else 0
        tables = last.metadata_bytes + means + own
        return Attended(out, read + last.tail_entries, kv_bytes, tables, last.router_bytes - own, chosen, last.dense_tokens)

    def _params(self) -> SearchParametersIVF | None:
        """The share as this step's parameters: recent tokens beyond the window are read anyway, and part of the budget."""
        if self.method.share is None:
            return self.method.params
        index, layout = self.index, self.index.layout
        sealed = index.invlists.sealed(0) - index.invlists.sinks(0)
        if not sealed:
            return None
        outside = max(0, index.ntotal - layout.sinks - layout.window)
        budget = max(1, round(self.method.share * outside) - (outside - sealed))
        if index.nprobe is not None:
            return SearchParametersIVF(nprobe=index.nlist, max_codes=budget)
        return SearchParametersIVF(selectivity=min(1.0, budget / sealed))
