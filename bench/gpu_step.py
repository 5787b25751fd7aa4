"""One decode step of attention on a GPU, everything counted: append, routing, selection, scan, merge.

    python bench/gpu_step.py                              # Llama-3.1-8B's attention, one layer, 32k to 1M tokens, batch 1, 4, 8
    python bench/gpu_step.py --sizes 131072x1,131072x8    # tokens x batch
    python bench/gpu_step.py --knobs select:SAAP_THREADS=512,scan:SAAP_STAGES=2
    python bench/gpu_step.py --sweep "scan:SAAP_STAGES=2;route_select:SAAP_CLUSTER=4"    # each beside what is chosen
    python bench/gpu_step.py --storage SQ8,SQ8/SQ4        # steps alone, of indexes that store these codes
    python bench/gpu_step.py --dry                        # the same code on the emulated device, tiny

Against what a user would run otherwise, in the same run and on the same memory: torch SDPA with every backend that takes the
call, as it is and with the query heads of a group folded into query rows; FlashInfer and flash-attn where installed; a torch
gather of the selected rows with SDPA over them; and this library's own dense mode. Eager, and as a CUDA graph. ``search`` is
`search_attend`; ``step`` is `add` of a token and `search_attend`, whose times stand kernel by kernel too.

Results are checked before anything is timed: the output against float64 attention over the rows that the selection names, the
selection against plain torch on the same device. What is wrong is printed and listed; timing goes on. Keys are random, so the
figures say nothing of quality; lists come from k-means, the router has trained size and random weights, peaked or flat. Copies of
the cache take turns, each with its own query and its own router, so that no call finds its bytes in the L2.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gpu_baselines
import gpu_harness as harness
from saap_index import AsymmetricIndex, KeyQuantizer, QueryRouter, Rope, SearchParametersIVF
from saap_index.backends import RouterWeights, get_backend
from saap_index.search.session import SearchSession

CASES = [
    (131072, 1), (131072, 8), (524288, 1), (524288, 8), (32768, 1), (32768, 8), (131072, 4), (1048576, 1), (524288, 4),
    (32768, 4), (1048576, 4), (1048576, 8),
]
"""Tokens and batch sizes, those that are asked for first before those that a short session may leave out."""

SHARES = (0.05, 0.02, 0.1)
ROUTERS = {"peaked": 0.2, "flat": 0.05}
"""Deviations of the router's random weights: how many runs are near the cut depends on them."""

ROOM = 1024
"""Tokens that an index has room for beyond its first."""

STEPS = 24
"""Steps that are timed in a row before the index is cut back: fewer than a block, so that none of them seals."""


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


@dataclass
class Report:
    """What is known of one size. wrong : what a check found; kernels : by name of a figure, microseconds of each kernel."""

    figures: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    kernels: dict[str, dict[str, float]] = field(default_factory=dict)


def router(device: harness.Device, shape: Shape, deviation: float, seed: int) -> QueryRouter:
    g = torch.Generator(device.device).manual_seed(seed)
    h, outputs = shape.kv_heads, shape.nlist + shape.knots + 1
    sizes = ((h, shape.units, shape.d), (h, shape.units), (h, outputs, shape.units), (h, outputs, shape.d), (h, outputs))
    weights = (torch.randn(s, generator=g, device=device.device, dtype=torch.float32) * deviation for s in sizes)
    hidden, bias_hidden, out, skip, bias_out = weights
    return QueryRouter(RouterWeights(hidden, bias_hidden, out, skip, bias_out, shape.nlist), first_knot=7)


def build(
    device: harness.Device, shape: Shape, n: int, batch: int, copies: int, storage: str | None = None
) -> list[AsymmetricIndex]:
    """Indexes of ``batch`` sequences of ``n`` random tokens; storage : a code, or None for numbers."""
    g = torch.Generator(device.device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device.device, dtype=torch.float32)

    small: dict[str, Any] = {"window": 16, "seal_tokens": 16, "max_segment": 64, "break_even": 0} if device.dry else {}
    index = AsymmetricIndex(
        shape.d, shape.nlist, shape.heads, shape.kv_heads, dtype=shape.dtype, device=device.device, backend=device.backend,
        rope=Rope(head_dim=shape.d, theta=500000.0), storage=storage, **small,
    )
    index.key_quantizer = KeyQuantizer.of_prompt(randn(shape.kv_heads, 64 * shape.nlist, shape.d), shape.nlist)
    index.query_router = router(device, shape, ROUTERS["peaked"], 0)
    made = []
    for i in range(copies):
        new = index.fork()
        new.query_router = router(device, shape, ROUTERS["peaked"], i)
        new.reserve_memory(n + ROOM, batch=batch)
        piece = max(1, min(n, 131072 // batch))
        for start in range(0, n, piece):
            parts = [randn(batch, shape.kv_heads, min(piece, n - start), shape.d).to(shape.dtype) for _ in range(2)]
            new.add(*parts)
        made.append(new)
    return made


def check(index: AsymmetricIndex, queries: Tensor, report: Report, what: str) -> float:
    """Largest error against float64 attention over the tokens read, in units of the dtype's precision."""
    group, worst = index.num_heads // index.num_kv_heads, 0.0
    for share in (0.05, 1.0):
        params = SearchParametersIVF(selectivity=share)
        out = index.search_attend(queries, params=params)
        selection = index.select(queries, params=params)
        if selection.rows is not None:
            compare_selections(index, queries, params, selection, report, f"{what}, {share:.0%}")
        for i in {0, len(index.lengths) - 1}:
            for head in {0, index.num_kv_heads - 1}:
                rows = torch.cat([x for x in _parts(selection, i, head, index.lengths[i], queries.device)])
                of, n = index.invlists, index.lengths[i]
                keys, values = (x(i, 0, n, head).index_select(0, rows).double() for x in (of.key_rows, of.value_rows))
                x = queries[i, head * group : (head + 1) * group, 0].double()
                want = torch.softmax(x @ keys.T * index.scale, -1) @ values
                got = out[i, head * group : (head + 1) * group, 0].double()
                error = (got - want).abs() / torch.finfo(out.dtype).eps
                worst = max(worst, float(error.max()))
                if not float(error.max()) <= 4:
                    vector, dim = divmod(int(error.nan_to_num(math.inf).argmax()), error.shape[1])
                    report.wrong.append(
                        f"{what}, {share:.0%}: sequence {i} head {head} query head {vector} dim {dim} of {error.shape[1]}: "
                        f"expected {float(want[vector, dim]):.5f}, got {float(got[vector, dim]):.5f}"
                    )
    return worst


def compare_selections(
    index: AsymmetricIndex, queries: Tensor, params: SearchParametersIVF, got: Any, report: Report, what: str
) -> None:
    """The rows of ``got`` against those that plain torch selects on the same device; near the cut they may differ."""
    assert index.query_router is not None
    backend = get_backend(queries.device, "torch")
    x, _ = index._arguments.queries(queries, index.invlists)
    session = SearchSession(backend, index.invlists)
    want = session.select(x, index.trained, backend.prepare_router(index.query_router.weights), params)
    got_rows, want_rows = got.rows, want.rows
    assert want_rows is not None
    for i in range(len(index.lengths)):
        for head in range(index.num_kv_heads):
            mine, other = (rows[i, head][rows[i, head] >= 0] for rows in (got_rows, want_rows))
            if bool((mine.diff() <= 0).any()):
                report.wrong.append(f"{what}: sequence {i} head {head}: rows are not ascending")
            both = int(torch.isin(mine, other).sum())
            if len(mine) != len(other) or both < 0.97 * len(other):
                report.wrong.append(
                    f"{what}: sequence {i} head {head}: {both} of {len(other)} rows as expected, {len(mine)} in all"
                )


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


class Steps:
    """`add` of a token and `search_attend` on every copy in turn, timed while the copies grow, and cut back in between."""

    def __init__(self, device: harness.Device, pairs: list[tuple[AsymmetricIndex, Tensor]], params: SearchParametersIVF) -> None:
        self.device, self.pairs, self.params = device, pairs, params
        index, queries = pairs[0]
        self.n = index.lengths[0]
        shape = (queries.shape[0], index.num_kv_heads, 1, index.d)
        self.new = torch.randn(shape, device=queries.device, dtype=torch.float32).to(queries.dtype)

    def run(self) -> None:
        for index, queries in self.pairs:
            index.add(self.new, self.new, seal=False)
            index.search_attend(queries, params=self.params)

    def cut_back(self) -> None:
        for index, _ in self.pairs:
            index.truncate(self.n)

    def advance(self) -> None:
        for index, _ in self.pairs:
            index.advance()

    def record(self) -> Callable[[], None]:
        self.run()
        self.cut_back()
        for index, queries in self.pairs:  # the device learns of the cut
            index.search_attend(queries, params=self.params)
        replay = self.device.graph(self.run, warm=False)
        replay()
        self.advance()
        self.cut_back()
        return replay

    def time(self, call: Callable[[], None], after: Callable[[], None]) -> float:
        """Median seconds of a step."""
        times = []
        for _ in range(1 if self.device.dry else 7):
            times.append(self.device.elapsed(call, 2 if self.device.dry else STEPS) / len(self.pairs))
            after()
            self.cut_back()
        return statistics.median(times)


def use_knobs(indexes: list[AsymmetricIndex], text: str) -> None:
    """Macros of kernels from here on, of the backend that the indexes share."""
    for index in indexes:
        index._backend.knobs.clear()  # type: ignore[attr-defined]
        index._backend.knobs.update(harness.parse_knobs(text))  # type: ignore[attr-defined]
        session: Any = index._session_of(index.invlists).backend_session
        session.searches.clear()


def measure(
    device: harness.Device, shape: Shape, n: int, batch: int, read: float, seconds: float, quick: bool, sweep: list[str],
    storage: str | None = None,
) -> Report:
    """Every candidate at one context length and batch size. read : bytes per second of a bare read; storage : of indexes that
    store this code, the step alone."""
    kv_bytes = shape.kv_bytes(n, batch)
    cold = math.ceil(3 * device.l2_bytes / (0.02 * kv_bytes)) if device.l2_bytes else 2
    copies = max(1, min(12, cold, int(0.4 * device.free_bytes() / (1.1 * kv_bytes))))
    report = Report()
    if 1.3 * copies * kv_bytes > device.free_bytes():
        return report
    indexes = build(device, shape, n, batch, copies, storage)
    g = torch.Generator(device.device).manual_seed(1)
    size = (batch, shape.heads, 1, shape.d)
    drawn = [torch.randn(size, generator=g, device=device.device, dtype=torch.float32).to(shape.dtype) for _ in indexes]
    pairs = list(zip(indexes, drawn, strict=True))
    error = check(*pairs[0], report, f"{n} x {batch}")

    def note(name: str, calls: list[Callable[[], Any]], nbytes: float) -> None:
        line: dict[str, Any] = {"name": name, "tokens": n, "batch": batch, "bytes": nbytes, "copies": copies}
        report.figures.append(line)
        try:
            line["eager_us"] = 1e6 * device.time(in_turn(calls), len(calls), seconds=seconds)
        except Exception as failure:  # a baseline that does not take the shape is left out, with its reason
            line["failed"] = _reason(failure)
            return
        try:
            line["graph_us"] = 1e6 * device.time(device.graph(in_turn(calls)), len(calls), seconds=seconds)
        except Exception as failure:
            line["graph_failed"] = _reason(failure)

    def note_step(name: str, params: SearchParametersIVF, nbytes: float) -> None:
        line: dict[str, Any] = {"name": name, "tokens": n, "batch": batch, "bytes": nbytes, "copies": copies}
        report.figures.append(line)
        try:
            steps = Steps(device, pairs, params)
            steps.run()
            line["eager_us"] = 1e6 * steps.time(steps.run, lambda: None)
            line["host_us"] = 1e6 * device.host_seconds(steps.run) / len(pairs)
            steps.cut_back()
            replay = steps.record()
            line["graph_us"] = 1e6 * steps.time(replay, steps.advance)
            report.kernels[f"{n // 1024}k x {batch} {name}"] = device.kernels(replay, len(pairs))
            steps.advance()
            steps.cut_back()
        except Exception as failure:
            line["failed"] = _reason(failure)
            report.wrong.append(f"{n} x {batch} {name}: {line['failed']}")

    def note_sealed(step: dict[str, Any]) -> None:
        """The step with what sealing costs the device, a token; in a model it runs between replays."""
        if "failed" in step or "graph_us" not in step:
            return
        try:
            more = sealing_us(device, indexes[0], n)
        except Exception as failure:
            report.wrong.append(f"{n} x {batch} sealing: {_reason(failure)}")
            return
        both = {"eager_us": step["eager_us"] + more, "graph_us": step["graph_us"] + more, "sealing_us": more}
        report.figures.append({**step, **both, "name": f"{step['name']}, sealing included"})

    if storage is not None:
        params = SearchParametersIVF(selectivity=SHARES[0])
        indexes[0].search_attend(drawn[0], params=params)
        note_step(f"ours step {SHARES[0]:.0%} {storage}", params, indexes[0].stats().last_search.total_bytes)
        note_sealed(report.figures[-1])
        return rates(report, error, read)
    if sweep:
        params = SearchParametersIVF(selectivity=SHARES[0])
        indexes[0].search_attend(drawn[0], params=params)
        nbytes = indexes[0].stats().last_search.total_bytes
        for text in ("", *sweep):
            use_knobs(indexes, text)
            note_step(f"ours step {SHARES[0]:.0%} {text}".strip(), params, nbytes)
        return rates(report, error, read)
    for share in SHARES[:1] if quick else SHARES:
        params = SearchParametersIVF(selectivity=share)
        indexes[0].search_attend(drawn[0], params=params)
        nbytes = indexes[0].stats().last_search.total_bytes
        note_step(f"ours step {share:.0%}", params, nbytes)
        note_sealed(report.figures[-1])
        note(f"ours search {share:.0%}", [partial(x.search_attend, q, params=params) for x, q in pairs], nbytes)
    params = SearchParametersIVF(selectivity=SHARES[0])
    for i, (index, _) in enumerate(pairs):
        index.query_router = router(device, shape, ROUTERS["flat"], i)
    check(*pairs[0], report, f"{n} x {batch}, flat router")
    indexes[0].search_attend(drawn[0], params=params)
    note_step(f"ours step {SHARES[0]:.0%}, flat router", params, indexes[0].stats().last_search.total_bytes)
    dense = SearchParametersIVF(selectivity=1.0)
    note("ours dense", [partial(x.search_attend, q, params=dense) for x, q in pairs], kv_bytes)
    caches = [(x.invlists.keys, x.invlists.values) for x in indexes]
    for name, calls in gpu_baselines.dense(drawn, caches, n, shape.kv_heads).items():
        note(name, calls, kv_bytes)
    if not quick:
        selected = [x.select(q, params=params) for x, q in pairs]
        gathered = gpu_baselines.gathered(drawn, caches, selected, n, shape.kv_heads)
        if gathered:
            note("torch gather + SDPA 5%", gathered, kv_bytes * 0.05)
    return rates(report, error, read)


def sealing_us(device: harness.Device, index: AsymmetricIndex, n: int) -> float:
    """Microseconds of the device a token: all that `add` of one token after the other launches over two blocks but the append
    itself. However sealing is spread over tokens, it is in here; so are the merges that fall due."""
    batch, steps = len(index.lengths), min(ROOM, 2 * index.layout.block)
    size = (batch, index.num_kv_heads, 1, index.d)
    token = torch.zeros(size, dtype=index.dtype, device=device.device)
    token[..., 0] = 1.0

    def add() -> None:
        for _ in range(steps):
            index.add(token, token)

    kernels = device.kernels(add, steps, repeat=1)
    index.truncate(n)
    return sum(us for name, us in kernels.items() if name not in ("saap_append", "gaps"))


def rates(report: Report, error: float, read: float) -> Report:
    for line in report.figures:
        line["error_units"] = error
        if "failed" not in line:
            line["gb_per_s"] = line["bytes"] / line.get("graph_us", line["eager_us"]) / 1e3
            line["of_read"] = line["gb_per_s"] * 1e9 / read
    return report


def compare(figures: list[dict[str, Any]], read: float, shape: Shape) -> None:
    """Each line against the fastest dense attention that is not ours, at the same size, both in a graph where there is one; and
    against a bare read of all keys and values, which no dense attention can beat."""
    for line in figures:
        alike = [x for x in figures if (x["tokens"], x["batch"]) == (line["tokens"], line["batch"]) and "failed" not in x]
        others = [x.get("graph_us", x["eager_us"]) for x in alike if x["name"].startswith(gpu_baselines.DENSE)]
        if "eager_us" in line and "failed" not in line:
            mine = line.get("graph_us", line["eager_us"])
            line["vs_read"] = 1e6 * shape.kv_bytes(line["tokens"], line["batch"]) / read / mine
            if others:
                line["vs_dense"] = min(others) / mine


def table(figures: list[dict[str, Any]], report: Report, read: float) -> str:
    lines = []
    for x in figures:
        cells = [f"{x['tokens'] // 1024}k x {x['batch']}  {x['name']}"]
        if "failed" in x:
            cells += ["-"] * 7 + [x["failed"][:60]]
        else:
            cells += [f"{x['eager_us']:.1f}", f"{x['host_us']:.1f}" if "host_us" in x else "-"]
            cells += [f"{x['graph_us']:.1f}" if "graph_us" in x else "-", f"{x['bytes'] / 1e6:.1f}", f"{x['gb_per_s']:.0f}"]
            cells += [f"{x['of_read']:.0%}", f"{x['vs_read']:.2f}x", f"{x['vs_dense']:.2f}x" if "vs_dense" in x else "-"]
        lines.append(cells)
    head = ["tokens x batch, what", "eager us", "host us", "graph us", "MB", "GB/s", "of read", "vs bare read", "vs best dense"]
    parts = [f"a bare read of memory: {read / 1e9:.0f} GB/s", harness.rows(head, lines)]
    for name, kernels in report.kernels.items():
        parts.append(f"{name}: " + ", ".join(f"{kernel} {us:.1f}" for kernel, us in kernels.items()))
    parts += [f"WRONG {x}" for x in report.wrong]
    return "\n".join(parts)


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--sizes", help="tokens x batch, such as 131072x1,131072x8")
    parser.add_argument("--quick", action="store_true", help="one share of the tokens, no gather")
    parser.add_argument("--knobs", default="", help="macros of kernels, such as select:SAAP_THREADS=512,scan:SAAP_STAGES=2")
    parser.add_argument("--sweep", default="", help="sets of such macros, between semicolons: the times of a step with each")
    parser.add_argument("--storage", default="", help="codes, between commas: steps alone, of indexes that store them")
    options = parser.parse_args()
    storages = options.storage.split(",") if options.storage else [None]
    sweep = [x for x in options.sweep.split(";") if x]
    began = time.perf_counter()
    knobs = harness.parse_knobs(options.knobs) if options.knobs or sweep else None
    device: harness.Device = harness.Dry() if options.dry else harness.Cuda(knobs)
    shape, cases = (TINY, [(160, 1), (96, 2)]) if options.dry else (Shape(), CASES)
    if options.sizes:
        cases = [(int(n), int(b)) for n, b in (x.split("x") for x in options.sizes.split(","))]
    read = device.read_bandwidth()
    figures: list[dict[str, Any]] = []
    whole, skipped = Report(), []
    for (n, batch), storage in itertools.product(cases, storages):
        if time.perf_counter() - began > options.budget:
            skipped.append([n, batch])
            continue
        try:
            report = measure(device, shape, n, batch, read, options.seconds, options.quick, sweep, storage)
        except torch.OutOfMemoryError:
            report = Report()
        except Exception as failure:
            report = Report(wrong=[f"{n} x {batch}: {_reason(failure)}"])
        if not report.figures:
            skipped.append([n, batch])
        figures += report.figures
        whole.wrong += report.wrong
        whole.kernels |= report.kernels
        device.release()
        spent = time.perf_counter() - began
        print(f"{n} tokens x {batch}: {len(report.figures)} figures, {spent:.0f} s", file=sys.stderr, flush=True)
    compare(figures, read, shape)
    results = {"environment": harness.environment(device), "read_bytes_per_s": read, "skipped": skipped, "figures": figures}
    results |= {"kernels_us": whole.kernels, "wrong": whole.wrong, "knobs": options.knobs}
    name = "gpu_codes" if options.storage else "gpu_sweep" if sweep else "gpu_step"
    harness.save(options.out, name, results, table(figures, whole, read))
    return 0 if figures and not whole.wrong else 1


if __name__ == "__main__":
    sys.exit(main())
