"""One decode step of attention on a GPU, everything counted: routing, selection, scan, merge.

    python bench/gpu_search_attend.py                # Llama-3.1-8B's attention, one layer, 32k to 1M tokens, batch 1, 4, 8
    python bench/gpu_search_attend.py --dry          # the same code on the emulated device, tiny

Against what a user would run otherwise, in the same run and on the same memory: torch SDPA with every backend that takes the
call, as it is and with the query heads of a group folded into query rows; FlashInfer and flash-attn where installed; a torch
gather of the selected rows with SDPA over them; and this library's own dense mode. Eager, and as a CUDA graph.

Results are checked before anything is timed. Keys are random, so the figures say nothing of quality; the router has trained size
and random weights. Copies of the cache take turns, each with its own query, so that no call finds its bytes in the L2.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gpu_baselines
import gpu_harness as harness
import torch
from torch import Tensor

from saap_index import AsymmetricIndex, KeyQuantizer, QueryRouter, Rope, SearchParametersIVF
from saap_index.backends import RouterWeights

CASES = [
    (131072, 1), (131072, 8), (524288, 1), (524288, 8), (32768, 1), (32768, 8), (131072, 4), (1048576, 1), (524288, 4),
    (32768, 4), (1048576, 4), (1048576, 8),
]  # fmt: skip
"""Tokens and batch sizes, those that are asked for first before those that a short session may leave out."""

SHARES = (0.05, 0.02, 0.1)


@dataclass(frozen=True)
class Shape:
    """Heads, dims and lists of a layer."""

    heads: int = 32
    kv_heads: int = 8
    d: int = 128
    nlist: int = 256
    units: int = 64
    knots: int = 11
    dtype: torch.dtype = torch.bfloat16

    def kv_bytes(self, n: int, batch: int) -> int:
        return batch * self.kv_heads * n * 2 * self.d * self.dtype.itemsize


TINY = Shape(heads=4, kv_heads=2, d=64, nlist=8, units=16, knots=3)


def build(device: harness.Device, shape: Shape, n: int, batch: int, copies: int) -> list[AsymmetricIndex]:
    """Indexes of ``batch`` sequences of ``n`` random tokens."""
    g = torch.Generator(device.device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device.device)

    h, outputs = shape.kv_heads, shape.nlist + shape.knots + 1
    sizes = ((h, shape.units, shape.d), (h, shape.units), (h, outputs, shape.units), (h, outputs, shape.d), (h, outputs))
    small = {"window": 16, "seal_tokens": 16, "max_segment": 64, "break_even": 0} if device.dry else {}
    index = AsymmetricIndex(
        shape.d, shape.nlist, shape.heads, h, dtype=shape.dtype, device=device.device, backend=device.backend,
        rope=Rope(head_dim=shape.d, theta=500000.0), **small,
    )  # fmt: skip
    index.key_quantizer = KeyQuantizer(randn(h, shape.nlist, shape.d))
    index.query_router = QueryRouter(RouterWeights(*(randn(*s) * 0.2 for s in sizes), shape.nlist), first_knot=7)
    found = []
    for _ in range(copies):
        new = index.fork()
        new.reserve_memory(n + 1024, batch=batch)
        piece = max(1, min(n, 131072 // batch))
        for start in range(0, n, piece):
            parts = [randn(batch, h, min(piece, n - start), shape.d).to(shape.dtype) for _ in range(2)]
            new.add(*parts)
        found.append(new)
    return found


def check(index: AsymmetricIndex, queries: Tensor) -> float:
    """Largest error against float64 attention over the tokens read, in units of the dtype's precision; exits if large."""
    group, worst = index.num_heads // index.num_kv_heads, 0.0
    for share in (0.05, 1.0):
        params = SearchParametersIVF(selectivity=share)
        out = index.search_attend(queries, params=params)
        selection = index.select(queries, params=params)
        for i in {0, len(index.lengths) - 1}:
            for head in {0, index.num_kv_heads - 1}:
                rows = torch.cat([x for x in _parts(selection, i, head, index.lengths[i], queries.device)])
                keys, values = (x[i, head].index_select(0, rows).double() for x in (index.invlists.keys, index.invlists.values))
                x = queries[i, head * group : (head + 1) * group, 0].double()
                want = torch.softmax(x @ keys.T * index.scale, -1) @ values
                got = out[i, head * group : (head + 1) * group, 0].double()
                worst = max(worst, float((got - want).abs().max()) / torch.finfo(out.dtype).eps)
    if worst > 4:
        raise SystemExit(f"wrong result: error of {worst:.1f} units of precision")
    return worst


def _parts(selection: Any, i: int, head: int, length: int, device: torch.device) -> list[Tensor]:
    parts = [torch.arange(selection.sinks[i], device=device), torch.arange(selection.sealed[i], length, device=device)]
    if selection.rows is not None:
        rows = selection.rows[i, head].long()
        parts.append(rows[rows >= 0])
    return parts


def _reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:120]}"


def in_turn(calls: list[Callable[[], Any]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def measure(device: harness.Device, shape: Shape, n: int, batch: int, bandwidth: float, seconds: float) -> list[dict[str, Any]]:
    """Every candidate at one context length and batch size."""
    kv_bytes = shape.kv_bytes(n, batch)
    cold = math.ceil(3 * device.l2_bytes / (0.02 * kv_bytes)) if device.l2_bytes else 2
    copies = max(1, min(12, cold, int(0.4 * device.free_bytes() / (1.1 * kv_bytes))))
    if 1.3 * copies * kv_bytes > device.free_bytes():
        return []
    indexes = build(device, shape, n, batch, copies)
    g = torch.Generator(device.device).manual_seed(1)
    drawn = [torch.randn((batch, shape.heads, 1, shape.d), generator=g, device=device.device).to(shape.dtype) for _ in indexes]
    pairs = list(zip(indexes, drawn, strict=True))
    error = check(*pairs[0])
    found: list[dict[str, Any]] = []

    def note(name: str, calls: list[Callable[[], Any]], nbytes: float) -> None:
        line: dict[str, Any] = {"name": name, "tokens": n, "batch": batch, "bytes": nbytes, "copies": copies}
        try:
            line["eager_us"] = 1e6 * device.time(in_turn(calls), len(calls), seconds=seconds)
        except Exception as failure:  # a baseline that does not take the shape is left out, with its reason
            line["failed"] = _reason(failure)
            found.append(line)
            return
        try:
            line["graph_us"] = 1e6 * device.time(device.graph(in_turn(calls)), len(calls), seconds=seconds)
        except Exception as failure:
            line["graph_failed"] = _reason(failure)
        line["gb_per_s"] = nbytes / line.get("graph_us", line["eager_us"]) / 1e3
        line["of_copy"] = line["gb_per_s"] * 1e9 / bandwidth
        found.append(line)

    for share in SHARES:
        params = SearchParametersIVF(selectivity=share)
        indexes[0].search_attend(drawn[0], params=params)
        nbytes = indexes[0].stats().last_search.total_bytes
        note(f"ours {share:.0%}", [partial(x.search_attend, q, params=params) for x, q in pairs], nbytes)
    dense = SearchParametersIVF(selectivity=1.0)
    note("ours dense", [partial(x.search_attend, q, params=dense) for x, q in pairs], kv_bytes)
    caches = [(x.invlists.keys, x.invlists.values) for x in indexes]
    for name, calls in gpu_baselines.dense(drawn, caches, n, shape.kv_heads).items():
        note(name, calls, kv_bytes)
    selected = [x.select(q, params=SearchParametersIVF(selectivity=0.05)) for x, q in pairs]
    gathered = gpu_baselines.gathered(drawn, caches, selected, n, shape.kv_heads)
    if gathered:
        note("torch gather + SDPA 5%", gathered, kv_bytes * 0.05)
    for line in found:
        line["error_units"] = error
    return found


def compare(found: list[dict[str, Any]]) -> None:
    """Each line against the fastest dense attention that is not ours, at the same size, both in a graph where there is one."""
    for line in found:
        alike = [x for x in found if (x["tokens"], x["batch"]) == (line["tokens"], line["batch"]) and "failed" not in x]
        others = [x.get("graph_us", x["eager_us"]) for x in alike if x["name"].startswith(gpu_baselines.DENSE)]
        if others and "eager_us" in line:
            line["vs_dense"] = min(others) / line.get("graph_us", line["eager_us"])


def table(found: list[dict[str, Any]], bandwidth: float) -> str:
    lines = []
    for x in found:
        cells = [f"{x['tokens'] // 1024}k x {x['batch']}  {x['name']}"]
        if "failed" in x:
            cells += ["-", "-", "-", "-", "-", x["failed"][:40]]
        else:
            cells += [f"{x['eager_us']:.1f}", f"{x['graph_us']:.1f}" if "graph_us" in x else "-", f"{x['bytes'] / 1e6:.1f}"]
            cells += [f"{x['gb_per_s']:.0f}", f"{x['of_copy']:.0%}", f"{x['vs_dense']:.2f}x" if "vs_dense" in x else "-"]
        lines.append(cells)
    head = ["tokens x batch, what", "eager us", "graph us", "MB", "GB/s", "of copy", "vs best dense"]
    return f"copy bandwidth {bandwidth / 1e9:.0f} GB/s (read + written)\n" + harness.rows(head, lines)


def main() -> int:
    options = harness.arguments(__doc__).parse_args()
    began = time.perf_counter()
    device: harness.Device = harness.Dry() if options.dry else harness.Cuda()
    shape, cases = (TINY, [(160, 1), (96, 2)]) if options.dry else (Shape(), CASES)
    bandwidth = device.copy_bandwidth()
    found: list[dict[str, Any]] = []
    skipped = []
    for n, batch in cases:
        if time.perf_counter() - began > options.budget:
            skipped.append([n, batch])
            continue
        try:
            lines = measure(device, shape, n, batch, bandwidth, options.seconds)
        except torch.OutOfMemoryError:
            lines = []
        if not lines:
            skipped.append([n, batch])
        found += lines
        device.release()
        print(f"{n} tokens x {batch}: {len(lines)} figures, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    compare(found)
    figures = {"environment": harness.environment(device), "copy_bytes_per_s": bandwidth, "skipped": skipped, "figures": found}
    harness.save(options.out, "gpu_search_attend", figures, table(found, bandwidth))
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
