"""Dense attention of one decode step as others compute it, over the same memory; FlashInfer over pages of its own.

Whatever is not installed is left out, and what SAAP_LEAVE_OUT names.

    python bench/gpu_baselines.py     # one call of FlashInfer at a tiny size: it compiles its kernels then, and keeps them
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

Calls = list[Callable[[], Any]]
Caches = list[tuple[Tensor, Tensor]]

PAGE = 16
"""Tokens of a page of FlashInfer's."""

DENSE = ("torch SDPA", "FlashInfer", "flash-attn")
"""How the names of dense baselines begin."""


def dense(queries: list[Tensor], caches: Caches, n: int, kv_heads: int) -> dict[str, Calls]:
    """By name, one call for each cache: keys, values (b, h, N, d) of which ``n`` rows are in use, queries (b, hq, 1, d)."""
    pairs = list(zip(queries, caches, strict=True))
    kinds = {"": None}
    if queries[0].is_cuda:
        kinds = {f" {name}": getattr(SDPBackend, name) for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")}
    methods: dict[str, Calls] = {}
    for label, kind in kinds.items():
        name = f"torch SDPA{label.lower()}"
        used = [(q, k[:, :, :n], v[:, :, :n]) for q, (k, v) in pairs]
        methods[f"{name} folded"] = [partial(_sdpa, _fold(q, kv_heads), k, v, kind, False) for q, k, v in used]
        methods[f"{name} gqa"] = [partial(_sdpa, q, k, v, kind, True) for q, k, v in used]
    for make in (_flashinfer, _flash_attn):
        try:
            methods.update(make(pairs, n))
        except Exception as error:
            print(f"{make.__name__[1:]}: {type(error).__name__}: {error}")
    return methods


def _fold(queries: Tensor, kv_heads: int) -> Tensor:
    """Query heads of a group as query rows: (b, h, g, d). Dense attention of one token has no mask, so nothing else changes."""
    b, hq, _, d = queries.shape
    return queries.view(b, kv_heads, hq // kv_heads, d)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, kind: Any, gqa: bool) -> Tensor:
    if kind is None:
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
    with sdpa_kernel(kind):
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)


def paged(cache: Tensor, n: int) -> Tensor:
    """The first ``n`` rows of (b, h, N, d), rounded up to whole pages, as a pool of pages, (b * pages, h, PAGE, d): a copy.

    Rows behind the last are zero where N has no more.
    """
    b, h, _, d = cache.shape
    pages = -(-n // PAGE)
    rows = functional.pad(cache[:, :, : pages * PAGE], (0, 0, 0, max(0, pages * PAGE - cache.shape[2])))
    return rows.view(b, h, pages, PAGE, d).transpose(1, 2).reshape(b * pages, h, PAGE, d)


def _flashinfer(pairs: list[tuple[Tensor, tuple[Tensor, Tensor]]], n: int) -> dict[str, Calls]:
    """FlashInfer's batch decode over pages of the size that engines use; it is not planned for pages as long as a sequence."""
    if os.environ.get("SAAP_LEAVE_OUT") == "flashinfer":
        return {}
    try:
        import flashinfer
    except ImportError:
        return {}
    calls: Calls = []
    for queries, (keys, values) in pairs:
        b, hq, _, d = queries.shape
        h, device = keys.shape[1], keys.device
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        pages = -(-n // PAGE)
        starts = torch.arange(b + 1, dtype=torch.int32, device=device) * pages
        numbers = torch.arange(b * pages, dtype=torch.int32, device=device)
        last = torch.full((b,), n - (pages - 1) * PAGE, dtype=torch.int32, device=device)
        wrapper.plan(starts, numbers, last, hq, h, d, PAGE, q_data_type=queries.dtype, kv_data_type=keys.dtype)
        calls.append(partial(wrapper.run, queries[:, :, 0].contiguous(), (paged(keys, n), paged(values, n))))
    return {"FlashInfer batch decode": calls}


def _flash_attn(pairs: list[tuple[Tensor, tuple[Tensor, Tensor]]], n: int) -> dict[str, Calls]:
    methods: dict[str, Calls] = {}
    for name, module in (("flash-attn 3", "flash_attn_interface"), ("flash-attn", "flash_attn")):
        try:
            function = __import__(module).flash_attn_with_kvcache
        except (ImportError, AttributeError):
            continue
        calls: Calls = []
        for q, (k, v) in pairs:
            used = torch.full((q.shape[0],), n, dtype=torch.int32, device=q.device)
            calls.append(partial(function, *(x.transpose(1, 2) for x in (q, k, v)), cache_seqlens=used))
        methods[f"{name} with kvcache"] = calls
    return methods


def gathered(queries: list[Tensor], caches: Caches, selections: list[Any], n: int, kv_heads: int) -> Calls:
    """torch's own gather of the rows a selection reads, and SDPA over the copy; the selection itself is not counted."""
    calls: Calls = []
    for q, (k, v), selection in zip(queries, caches, selections, strict=True):
        if selection.rows is None or len(set(selection.counts.flatten().tolist())) > 1:
            return []
        b, h, _ = selection.rows.shape
        spans = zip(selection.sinks, selection.sealed, strict=True)
        near = [torch.cat([torch.arange(low), torch.arange(high, n)]) for low, high in spans]
        if len({len(x) for x in near}) > 1:
            return []
        always = torch.stack(near).to(k.device)[:, None].expand(b, h, -1)
        calls.append(partial(_gather_sdpa, _fold(q, kv_heads), k, v, torch.cat([always, selection.rows.long()], 2)[..., None]))
    return calls


def _gather_sdpa(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    keys, values = (x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (k, v))
    return functional.scaled_dot_product_attention(q, keys, values)


def main() -> int:
    dry = "--dry" in sys.argv
    device = torch.device("cpu" if dry else "cuda")

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)

    cache = zeros(1, 8, 256, 128), zeros(1, 8, 256, 128)
    calls: dict[str, Calls] = {} if dry else _flashinfer([(zeros(1, 32, 1, 128), cache)], 200)
    for name, (call,) in calls.items():
        call()
        torch.cuda.synchronize()
        print(f"{name}: compiled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
