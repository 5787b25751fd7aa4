"""One attention layer of the engine: writes rows and list numbers into its pages, answers queries from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl

from ..backends import Budget
from ..backends.paged import PagedBackend, PagedRouting
from ..errors import StateError
from .counters import COUNTERS
from .dense import continue_prompt
from .layers import ServedLayer
from .pages import pages_of
from .refusals import check_layer
from .step import Group, Prefill, Step


class SaapImpl(AttentionImpl[Step]):
    """State: none but what the pages hold. Raises CompatibilityError for what `refusals.check_layer` names."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None, sliding_window: int | None = None, kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None, attn_type: str = "decoder", kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        others["sliding window"] = sliding_window
        shape = num_heads, self.num_kv_heads, head_size
        check_layer(*shape, alibi_slopes, logits_soft_cap, attn_type, kv_sharing_target_layer_name, others)
        self._layer: ServedLayer | None = None
        self._paged: PagedBackend | None = None
        self._pool: tuple[Tensor, Any] | None = None

    def bind(self, layer: ServedLayer | None, paged: PagedBackend) -> None:
        """Take the routers of this layer, None if it is to be read whole. Called by the builder, when the engine starts."""
        self._layer, self._paged, self._pool = layer, paged, None

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """key, value : (n or more, h, d); slot_mapping : int64 (n,), below 0 for padding."""
        n = len(slot_mapping)
        served, rotation = self._layer, None
        if served is not None and served.rope is not None:
            step = _step_of(layer.layer_name)
            n = min(n, step.num_tokens)
            rotation = step.rotation(served.rope)
        quantizer = None if served is None else served.quantizer
        paged, pool = self._pages(kv_cache)
        paged.write(pool, key[:n], value[:n], slot_mapping[:n], quantizer, rotation)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Step | None, output: Tensor,
        output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query, output : (n or more, hq, d)."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("saap_index: expected output that is not quantised")
        if attn_metadata is None:  # of the profiling run
            return output
        paged, pool = self._pages(kv_cache)
        for group in attn_metadata.groups:
            self._search(paged, pool, attn_metadata, group, query, output)
        for prefill in attn_metadata.prefills:
            self._read_whole(kv_cache, prefill, query, output)
        return output

    def _pages(self, kv_cache: Tensor) -> tuple[PagedBackend, Any]:
        """The pool as the backend takes it, made once: vLLM hands over the same tensor in every step."""
        if self._paged is None:
            raise StateError("saap_index: expected a layer whose builder was made, got one without")
        if self._pool is None or self._pool[0] is not kv_cache:
            self._pool = kv_cache, self._paged.prepare_pages(pages_of(kv_cache, self.head_size))
        return self._paged, self._pool[1]

    def _search(self, paged: PagedBackend, pool: Any, step: Step, group: Group, query: Tensor, output: Tensor) -> None:
        b, h, d, q = len(group.sealed), self.num_kv_heads, self.head_size, group.q
        shape = b, h, self.num_heads // h, q, d
        x, own = query[group.tokens], output[group.tokens]
        # of one query each the order is that of the operations, and nothing moves
        x = (x.view(shape) if q == 1 else x.view(b, q, h, -1, d).permute(0, 2, 3, 1, 4)).contiguous()
        in_place = q == 1 and isinstance(group.tokens, slice) and own.is_contiguous()
        out = own.view(shape) if in_place else torch.empty(shape, dtype=x.dtype, device="cpu")
        served = self._layer if group.sparse else None
        if served is None:
            none = PagedRouting(None, 1, 0, True, None, Budget(torch.empty((b, h), dtype=torch.int32, device="cpu")))
            _, _, read = paged.search(pool, group.whole, none, x, self.scale, out)
            COUNTERS.dense_queries += b * q
        else:
            budget, rotation = group.budgets[served.place], step.rotation(served.rope, group)
            routing = PagedRouting(served.router, served.nlist, served.first_knot, served.size_weighted, rotation, budget)
            _, _, read = paged.search(pool, group.selecting, routing, x, self.scale, out)
            COUNTERS.sparse_queries += group.sparse * q
            COUNTERS.dense_queries += (b - group.sparse) * q
            COUNTERS.rows_read += (read - group.whole_tokens * h) * q
            COUNTERS.rows_stored += group.partial_tokens * h * q
        if not in_place:
            output[group.tokens] = out.permute(0, 3, 1, 2, 4).reshape(b * q, self.num_heads, d)

    def _read_whole(self, kv_cache: Tensor, prefill: Prefill, query: Tensor, output: Tensor) -> None:
        size, d, n = kv_cache.shape[2], self.head_size, prefill.length
        rows = kv_cache[prefill.blocks[: -(-n // size)]].transpose(0, 1).reshape(self.num_kv_heads, -1, kv_cache.shape[3])[:, :n]
        tokens = slice(prefill.first, prefill.last)
        output[tokens] = continue_prompt(query[tokens], rows[..., :d], rows[..., d:], self.scale)
        COUNTERS.dense_queries += prefill.last - prefill.first


def _step_of(layer_name: str) -> Step:
    metadata = get_forward_context().attn_metadata
    step = (metadata[0] if isinstance(metadata, list) else metadata)[layer_name]
    assert isinstance(step, Step)
    return step
