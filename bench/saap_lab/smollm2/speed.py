"""Time per decode step of attention: the index, its dense pass, and torch, on the demo's cache and on a long synthetic one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from saap_index.index import AsymmetricIndex
from saap_index.routing.rope import Rope
from saap_index.search.params import SearchParametersIVF

from .capture import Capture
from .training import train_index

ROUNDS = 15
LONG_SHAPE = (32, 8, 128)  # Llama-3.1-8B


def report(sequence: Capture, layer: int, rope: Rope, long_tokens: int) -> list[str]:
    """Lines of a table: SmolLM2's cache at its 8k, and ``long_tokens`` random tokens of Llama-3.1-8B's shape, bfloat16."""
    small = train_index("saap_index", [sequence], layer, rope)
    captured = sequence.layers[layer]
    index = _cast(small, torch.bfloat16)
    index.add(captured.keys.bfloat16(), captured.values.bfloat16())
    lines = ["", "Time per step of one layer, everything counted (routing, selection, scan, merge); medians, all in one run:"]
    title = f"SmolLM2, layer {layer}, {captured.keys.shape[2]} tokens, bfloat16"
    lines += _race(title, index, captured.queries[:, :, -1:].bfloat16())
    del index, small
    heads, kv_heads, d = LONG_SHAPE
    long = AsymmetricIndex(d, 256, heads, kv_heads, dtype=torch.bfloat16, rope=Rope(head_dim=d, theta=500000.0))
    generator = torch.Generator().manual_seed(0)
    long.train(torch.randn((1, kv_heads, 16384, d), generator=generator, dtype=torch.float32, device="cpu"))
    long.reserve_memory(long_tokens)
    for start in range(0, long_tokens, 16384):
        shape = (1, kv_heads, min(16384, long_tokens - start), d)
        long.add(*(torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").bfloat16() for _ in range(2)))
    queries = torch.randn((1, heads, 1, d), generator=generator, dtype=torch.float32, device="cpu").bfloat16()
    title = f"synthetic, {heads} query and {kv_heads} KV heads, d = {d}, {long_tokens} tokens, bfloat16"
    return lines + _race(title, long, queries)


def _cast(index: AsymmetricIndex, dtype: torch.dtype) -> AsymmetricIndex:
    """An empty index with the same training and another storage dtype."""
    new = AsymmetricIndex(index.d, index.nlist, index.num_heads, index.num_kv_heads, dtype=dtype, rope=index.rope)
    assert index.key_quantizer is not None and index.query_router is not None
    new.key_quantizer, new.query_router = index.key_quantizer, index.query_router
    return new


def _race(title: str, index: AsymmetricIndex, queries: Tensor) -> list[str]:
    lists, n = index.invlists, index.ntotal
    keys, values = lists.keys[:, :, :n], lists.values[:, :, :n]
    group = index.num_heads // index.num_kv_heads
    folded = queries.view(1, index.num_kv_heads, group, index.d)
    dense = SearchParametersIVF(selectivity=1.0)
    calls: dict[str, Callable[[], Tensor]] = {
        "torch SDPA, enable_gqa": lambda: functional.scaled_dot_product_attention(queries, keys, values, enable_gqa=True),
        "torch SDPA, group folded into rows": lambda: functional.scaled_dot_product_attention(folded, keys, values),
        "this library, dense": lambda: index.search_attend(queries, params=dense),
        "this library, selectivity 5 %": lambda: index.search_attend(queries),
    }
    wide = [functional.scaled_dot_product_attention(folded.float(), keys.float(), values.float()).view_as(queries)]
    error = float((calls["this library, dense"]().float() - wide[0]).abs().max())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(t) for name, t in times.items()}
    best = min(t for name, t in medians.items() if "SDPA" in name)
    lines = [f"  {title} (dense pass against float32 SDPA: error {error:.1e})"]
    return lines + [f"    {name:36} {t * 1e3:8.3f} ms {best / t:7.1f}x" for name, t in medians.items()]
