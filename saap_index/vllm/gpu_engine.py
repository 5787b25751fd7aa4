"""What the layers of one process on a GPU are served with, and the memory that their steps share. Reads vLLM's configuration,
imports no vLLM.

Made when the engine profiles its memory, before there is a cache, so that the scratch memory counts as taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import get_paged
from ..backends.cuda.backend import CudaBackend
from ..backends.cuda.paged import PagedCuda, Pool
from ..backends.cuda.paged_session import TOTALS, PagedLayer, PagedSession, PagedSizes, rows_read
from ..errors import CompatibilityError
from ..invlists.layout import MAX_QUERY_TOKENS
from ..invlists.octaves import octaves
from ..routers import Routers
from .counters import COUNTERS, REFRESH
from .layers import ServedLayer, ServedModel, serve
from .options import Options
from .pages import pages_of
from .refusals import check_layer, layer_number

FULL_WINDOW = (-1, -1)
"""FlashAttention's word for no sliding window."""


@dataclass(frozen=True, eq=False)
class GpuLayer:
    """One served layer: what the session runs, and what assigns its keys."""

    steps: PagedLayer
    served: ServedLayer


class Engine:
    """Raises CompatibilityError for layers that are not alike or not plain causal attention, and whatever `serve` raises.

    numbers : by name of a layer, None for one without; layers : those that are served, by name; session : None where nothing is
    to be selected.
    """

    def __init__(
        self, config: Any, impls: Mapping[str, Any], routers: Routers, backend: CudaBackend, queries: int, rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """config : vLLM's ``VllmConfig``; impls : FlashAttention's implementation of each layer, by name; queries : most query
        tokens of a request that is decoding."""
        options = Options.of(config.additional_config)
        self.backend, self.rank = backend, rank
        paged = get_paged(backend)
        assert isinstance(paged, PagedCuda)
        self.paged = paged
        self.numbers = {name: layer_number(name) for name in impls}
        self.queries = min(queries, MAX_QUERY_TOKENS)
        full = {name: x for name, x in impls.items() if self.numbers[name] is not None and x.sliding_window == FULL_WINDOW}
        wanted = [n for name in full if (n := self.numbers[name]) is not None]
        self.model: ServedModel = serve(routers, options, backend, wanted, rank, ranks)
        served = {name: x for name in full if (x := self.model.layers.get(self.numbers[name] or 0)) is not None}
        for name in served:
            _check(full[name])
        self.layers = {name: GpuLayer(self._steps_of(x), x) for name, x in served.items()}
        some = served and not options.reads_all
        self.session = self._session(config, [full[name] for name in served]) if some else None
        self._pools: dict[str, tuple[Tensor, Pool]] = {}
        self.dense_queries = 0
        self._noted: tuple[Tensor, Any] | None = None
        REFRESH.append(self.refresh)

    def _steps_of(self, layer: ServedLayer) -> PagedLayer:
        rope = None if layer.rope is None else layer.rope.frequencies(self.backend.device)
        return PagedLayer(layer.place, layer.router, layer.first_knot, layer.size_weighted, rope, layer.unread_mass)

    def _session(self, config: Any, impls: list[Any]) -> PagedSession:
        shapes = {(x.num_kv_heads, x.num_heads // x.num_kv_heads, x.head_size) for x in impls}
        if len(shapes) > 1:
            several = sorted(shapes)
            raise CompatibilityError(f"saap_index: expected served layers of one shape, got heads, group and dims {several}")
        (heads, group, d), model = shapes.pop(), self.model
        params, recent = model.options.params, max(model.window, MAX_QUERY_TOKENS)
        shares = model.shares if params.target_mass is None else model.shares * 0 + 1
        selectivity, tokens = params.selectivity or 1.0, int(config.model_config.max_model_len)
        spared = model.sinks, recent, model.options.break_even
        segments = max(1, max(len(octaves(n, model.sinks, model.window)) for n in _lengths(tokens, recent)) - 1)
        rows = rows_read(shares, selectivity, tokens, spared)
        sizes = PagedSizes(
            config.scheduler_config.max_num_seqs, tokens, segments, self.queries, rows, heads, group, d, d,
            config.model_config.dtype,
        )
        layers = sorted((x.steps for x in self.layers.values()), key=lambda x: x.place)
        return PagedSession(self.paged, sizes, layers, shares, selectivity, spared)

    def pool(self, name: str, kv_cache: Tensor) -> Pool:
        """A layer's cache as the kernels take it, made once: vLLM hands over the same tensor in every step."""
        prepared = self._pools.get(name)
        if prepared is None or prepared[0] is not kv_cache:
            prepared = self._pools[name] = kv_cache, self.paged.prepare_pages(pages_of(kv_cache, kv_cache.shape[3] // 2))
        return prepared[1]

    def write(self, name: str, keys: Tensor, values: Tensor, kv_cache: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Rows and list numbers of n tokens. keys, values : (n, h, d); slots : int64 (n,), positions : int32 (n,)."""
        layer = self.layers[name]
        where = layer.served.quantizer, layer.steps.rope, positions
        self.paged.write(self.pool(name, kv_cache), keys, values, slots, *where)

    def note(self) -> None:
        """Have the counters of the device fetched as they are now; `seen` reads them when they have come. Does not wait."""
        if self.session is None:
            return
        on_gpu = self.backend.device.type == "cuda"
        host = torch.empty(len(TOTALS), dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        host.copy_(self.session.totals, non_blocking=True)
        self._noted = host, torch.cuda.current_stream(self.backend.device).record_event() if on_gpu else None

    def seen(self) -> None:
        """Counters as of the last `note`, if they have come."""
        if self._noted is not None and (self._noted[1] is None or self._noted[1].query()):
            self._put(self._noted[0])

    def refresh(self) -> None:
        """Counters as of now. Waits for the device."""
        if self.session is not None:
            self._put(self.session.totals.cpu())

    def _put(self, totals: Tensor) -> None:
        for name, value in zip(TOTALS, totals.tolist(), strict=True):
            setattr(COUNTERS, name, value)
        COUNTERS.dense_queries += self.dense_queries


def _lengths(tokens: int, recent: int) -> list[int]:
    """Lengths up to ``tokens`` among which one has as many octaves as any."""
    lengths = {tokens}
    while recent < tokens:
        lengths |= {recent, recent - 1, recent + 1}
        recent *= 2
    lengths |= {max(1, tokens * k // 64) for k in range(1, 64)}
    return sorted(lengths)


def _check(impl: Any) -> None:
    others = {"attention sinks": getattr(impl, "sinks", None)}
    of = impl.num_heads, impl.num_kv_heads, impl.head_size, impl.alibi_slopes, impl.logits_soft_cap or None, impl.attn_type
    check_layer(*of, impl.kv_sharing_target_layer_name, others)
