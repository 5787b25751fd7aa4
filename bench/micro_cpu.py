"""Times each operation of the CPU backend at three shapes, beside the read bandwidth of this machine in the same run.

Every result is first compared with the float64 specification or the torch backend. Run it as: python bench/micro_cpu.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its waiting threads would take the cores measured here

import numpy as np
import torch
from torch import Tensor

from saap_index import _cpu
from saap_index.backends.cpu import CpuBackend
from saap_index.backends.plain_torch import TorchBackend
from saap_index.backends.types import Arena, Budget, Placement, Plan, Rotation, Routing
from saap_index.backends.weights import RouterWeights
from saap_index.invlists.layout import Layout


@dataclass(frozen=True)
class Shape:
    name: str
    kv_heads: int
    query_heads: int
    d: int
    tokens: int
    nlist: int
    sinks: int = 4
    knots: int = 8
    units: int = 64
    selectivity: float = 0.05

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads


# mha: one query head per KV head, where memory and not arithmetic is the limit
SHAPES = (Shape("llama", 8, 32, 128, 131072, 256), Shape("mha", 8, 8, 128, 131072, 256), Shape("smollm2", 3, 9, 64, 8192, 256))
CPU, TORCH = CpuBackend(), TorchBackend("cpu")


def segments_of(shape: Shape) -> list[int]:
    """Bounds of the segments of an index with so many tokens."""
    segments = Layout(sinks=shape.sinks).merged_segments(shape.tokens)
    return [segments[0][0], *(stop for _, stop in segments)]


class Case:
    """A filled arena with realistic runs: list sizes within a factor of a few, the same in every segment."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        g = torch.Generator().manual_seed(0)
        h, n, d = shape.kv_heads, shape.tokens, shape.d
        self.keys, self.values = (CPU.empty((1, h, n, d), torch.bfloat16) for _ in range(2))
        for x in (self.keys, self.values):
            for head in range(h):
                x[0, head] = torch.randn((n, d), generator=g)
        bounds = segments_of(shape)
        count = len(bounds) - 1
        self.tables = torch.empty((1, h, count, shape.nlist + 1), dtype=torch.int32)
        odds = torch.exp(0.7 * torch.randn((h, shape.nlist), generator=g))
        for head in range(h):
            for s in range(count):
                size = bounds[s + 1] - bounds[s]
                drawn = torch.multinomial(odds[head], size, replacement=True, generator=g)
                sizes = torch.bincount(drawn, minlength=shape.nlist)
                self.tables[0, head, s, 0] = bounds[s]
                self.tables[0, head, s, 1:] = bounds[s] + sizes.cumsum(0)
        self.segments = count
        self.sealed = bounds[-1]
        self.budget = round(shape.selectivity * (self.sealed - shape.sinks))
        self.knots = torch.linspace(shape.knots - 1, 0, count)[None].contiguous()
        o = shape.nlist + shape.knots + 1  # the last: the share outside sinks and window
        parts = ((shape.units, d), (shape.units,), (o, shape.units), (o, d), (o,))
        hidden, bias_hidden, out, skip, bias_out = (
            (scale * torch.randn((h, *x), generator=g)).bfloat16().float()  # as training leaves them
            for x, scale in zip(parts, (0.1, 0, 0.5, 0.1, 0), strict=True)
        )
        self.weights = RouterWeights(hidden, bias_hidden, out, skip, bias_out, shape.nlist)
        self.queries = [torch.randn((1, h, shape.group, 1, d), generator=g).to(torch.bfloat16) for _ in range(20)]
        self.rotation = Rotation(torch.ones((1, d // 2)), torch.zeros((1, d // 2)), False, 1.0)


def median_us(calls: list[Callable[[], object]], seconds: float) -> tuple[float, float]:
    """Median and least time of one call; the calls take turns, so that none finds what it reads in a cache."""
    for call in calls[:3]:
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 10:
        for call in calls:
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times), min(times)


def worst(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


class Report:
    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth

    def line(self, what: str, us: tuple[float, float], nbytes: float, note: str = "") -> None:
        rate, best = nbytes / us[0] * 1e-3, nbytes / us[1] * 1e-3
        share, best_share = rate / self.bandwidth, best / self.bandwidth
        print(
            f"  {what:28s} {us[0]:10.1f} us  (best {us[1]:9.1f})  {nbytes / 2**20:8.2f} MiB  {rate:6.1f} GB/s  "
            f"{share:4.0%} of read bandwidth (best {best_share:4.0%})  {note}",
            flush=True,
        )


def measure_bandwidth() -> float:
    return float(statistics.median(_cpu.read_bandwidth(1 << 30, 7)))


def run(shape: Shape, seconds: float) -> None:
    case, h, d = Case(shape), shape.kv_heads, shape.d
    n, sealed = shape.tokens, case.sealed
    row_bytes = 4 * d
    bandwidth = measure_bandwidth()
    print(
        f"{shape.name}: {h} KV heads, {shape.query_heads} query heads, d {d}, {n} tokens, bf16, {case.segments} segments, "
        f"{_cpu.get_num_threads()} threads, {_cpu.isa()}; memory reads {bandwidth:.1f} GB/s"
    )
    report = Report(bandwidth)

    def scan(q: Tensor, rows: Tensor | None, counts: Tensor | None, dense: bool) -> tuple[Tensor, Tensor]:
        sinks, first = ([0], [0]) if dense else ([shape.sinks], [sealed])
        return CPU.scan(q, case.keys, case.values, rows, counts, sinks, first, [n], d**-0.5, True)

    q = case.queries[0]
    out, lse = scan(q, None, None, True)
    want, want_lse = TORCH.scan(q, case.keys, case.values, None, None, [0], [0], [n], d**-0.5, True)
    assert worst(out, want) < 2e-3 and worst(lse, want_lse) < 1e-3
    report.line("scan, all rows", median_us([lambda: scan(q, None, None, True)], seconds), h * n * row_bytes)

    router = CPU.prepare_router(case.weights)
    got, ref = CPU.route(router, q, case.rotation), TORCH.route(case.weights, q, case.rotation)
    assert worst(got[0], ref[0]) < 1e-3 and worst(got[1], ref[1]) < 1e-3

    budget = Budget(torch.full((1, h), case.budget, dtype=torch.int32))

    def probe(z: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        probed = CPU.probe(z, a, case.knots, case.tables, [case.segments], budget, True)
        return probed.rows, probed.counts

    rows, counts = probe(*got)
    other = TORCH.probe(*got, case.knots, case.tables, [case.segments], budget, True).rows
    same = sum(len(set(x.tolist()) & set(y.tolist())) for x, y in zip(rows[0], other[0], strict=True)) / counts.sum().item()
    assert same > 0.999, same
    out, lse = scan(q, rows, counts, False)
    want, want_lse = TORCH.scan(q, case.keys, case.values, rows, counts, [shape.sinks], [sealed], [n], d**-0.5, True)
    assert worst(out, want) < 2e-2 and worst(lse, want_lse) < 1e-3

    selections = [probe(*CPU.route(router, x, case.rotation)) for x in case.queries]
    read = h * (case.budget + shape.sinks + n - sealed) * row_bytes
    runs = float((rows[0, :, 1:] != rows[0, :, :-1] + 1).sum() + h)
    us = median_us([partial(scan, x, *s, False) for x, s in zip(case.queries, selections, strict=True)], seconds)
    report.line(f"scan, {shape.selectivity:.0%} of the rows", us, read, f"runs of {float(counts.sum()) / runs:.0f} rows")
    weight_bytes = 2 * h * (shape.units * d + (shape.nlist + shape.knots + 1) * (shape.units + d))
    route_us = median_us([partial(CPU.route, router, x, case.rotation) for x in case.queries], seconds)
    report.line("route", route_us, weight_bytes)
    scores = [CPU.route(router, x, case.rotation) for x in case.queries]
    probe_us = median_us([partial(probe, *s) for s in scores], seconds)
    report.line("probe", probe_us, 4 * case.tables.numel())
    print(f"  route + probe: {(route_us[0] + probe_us[0]) / us[0]:.0%} of the sparse scan")

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        return scan(x, *probe(*CPU.route(router, x, case.rotation)), False)

    report.line("route + probe + scan", median_us([partial(step, x) for x in case.queries], seconds), read + weight_bytes)
    # centres whose distance from the next position is that of the knots, the first of which is an octave away
    centres = (n - 1 - torch.exp2(case.knots.double() + 1)).contiguous()
    no_means, no_ids = torch.empty((1, h, 0, shape.nlist, d)), torch.empty((1, h, 0), dtype=torch.int32)
    arena = Arena(case.keys, case.values, no_ids, case.tables, no_means, no_means, None)
    meta = np.array([[n, shape.sinks, sealed, case.segments, n, 0, 0]], np.int32)
    session, plan = CPU.session(1, h, d, d, shape.nlist, case.keys.dtype), Plan(())
    session.publish(Placement(arena, meta, centres.numpy()), ())
    session.plan(plan, budget)
    routing = Routing(router, 1, True, case.rotation)

    def search(x: Tensor) -> Tensor:
        return session.run(x, routing, plan, d**-0.5)[0]

    assert all(worst(search(x), step(x)[0]) < 2e-3 for x in case.queries[:3])
    report.line("the same in one call", median_us([partial(search, x) for x in case.queries], seconds), read + weight_bytes)
    beside: list[float] = []
    for _ in range(1 + int(seconds / 20e-6 / us[0])):
        for x, s in zip(case.queries, selections, strict=True):
            begin = time.perf_counter()
            search(x)
            middle = time.perf_counter()
            scan(x, *s, False)
            beside.append((2 * middle - begin - time.perf_counter()) * 1e6)
    print(f"  routing and selection in it: {statistics.median(beside):.1f} us, the time of that call less that of a scan in turn")

    token = torch.randn((1, h, 1, d)).to(torch.bfloat16)
    append_us = median_us([lambda: CPU.append(token, token, case.keys, case.values, [n - 1], [1])] * 100, seconds / 4)
    report.line("append, one token", append_us, 2 * h * row_bytes)

    prompt = min(n, 16384)
    centroids = torch.randn((h, shape.nlist, d))
    angles = torch.rand((prompt, d // 2))
    rotation = Rotation(angles.cos(), angles.sin(), False, 1.0)
    quantizer, other_quantizer = CPU.prepare_quantizer(centroids), TORCH.prepare_quantizer(centroids)
    keys = case.keys[0, :, :prompt]
    list_nos = CPU.assign(quantizer, keys, rotation)
    agree = float((list_nos == TORCH.assign(other_quantizer, keys, rotation)).float().mean())
    assert agree > 0.9999, agree
    assign_us = median_us([lambda: CPU.assign(quantizer, keys, rotation)], seconds)
    transposed, bias = centroids.transpose(1, 2).contiguous(), -0.5 * centroids.square().sum(-1)
    chunk, scratch = 512, torch.empty((512, shape.nlist))
    plain = [keys[i].float() for i in range(h)]

    def gemm() -> None:
        for head in range(h):
            for begin in range(0, prompt, chunk):
                torch.addmm(bias[head], plain[head][begin : begin + chunk], transposed[head], out=scratch)
                scratch.max(1)

    gemm_us = median_us([gemm], seconds)
    flops = 2 * h * prompt * shape.nlist * d
    ratio = f"{assign_us[0] / gemm_us[0]:.2f} times torch's addmm + max without the rotation"
    report.line(f"assign, {prompt} tokens", assign_us, keys.numel() * 2, f"{flops / assign_us[0] * 1e-3:.0f} GFLOP/s, {ratio}")

    ids = torch.arange(n, dtype=torch.int32).expand(h, n).contiguous()
    table = torch.empty((h, shape.nlist + 1), dtype=torch.int32)
    before = case.keys[0].gather(1, torch.argsort(list_nos, dim=1, stable=True)[:, :, None].expand(-1, -1, d))
    CPU.seal(case.keys[0], case.values[0], ids, 0, list_nos, table)
    assert torch.equal(before, case.keys[0, :, :prompt])
    shuffles = [torch.randint(0, shape.nlist, (h, prompt), dtype=torch.int32) for _ in range(4)]
    seal_us = median_us([partial(CPU.seal, case.keys[0], case.values[0], ids, 0, s, table) for s in shuffles], seconds)
    report.line(f"seal, {prompt} tokens", seal_us, 2 * h * prompt * (row_bytes + 4), "read and written once")
    few = shuffles[0][:, :256].contiguous()
    small_us = median_us([lambda: CPU.seal(case.keys[0], case.values[0], ids, 0, few, table)] * 10, seconds / 4)
    report.line("seal, 256 tokens", small_us, 2 * h * 256 * (row_bytes + 4), "in cache")
    print(f"  memory reads now {measure_bandwidth():.1f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[s.name for s in SHAPES], action="append")
    parser.add_argument("--seconds", type=float, default=2.0, help="per operation")
    args = parser.parse_args()
    with torch.inference_mode():
        for shape in SHAPES:
            if not args.shape or shape.name in args.shape:
                run(shape, args.seconds)


if __name__ == "__main__":
    main()
