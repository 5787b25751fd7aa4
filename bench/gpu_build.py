"""What it costs to fill and to train an index on a GPU: a token, a block, a prompt; k-means, a step of router training.

    python bench/gpu_build.py
    python bench/gpu_build.py --dry
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gpu_harness as harness
from gpu_step import TINY, Shape, build
from saap_index import AsymmetricIndex, KeyQuantizer, TrainingConfig
from saap_index.training.layer import RouterTargets, train_router

Figures = list[dict[str, Any]]


def one_token(device: harness.Device, shape: Shape, n: int, batch: int, seconds: float) -> Figures:
    """Appending a token to every sequence; eager, and as a graph. Nothing is sealed here."""
    index = build(device, shape, n, batch, 1)[0]
    tokens = torch.randn((batch, shape.kv_heads, 1, shape.d), device=device.device).to(shape.dtype)
    nbytes = batch * shape.kv_heads * 2 * shape.d * shape.dtype.itemsize
    index.add(tokens, tokens)

    def eager() -> None:
        index.add(tokens, tokens, seal=False)
        if index.lengths[0] > n + 900:
            index.truncate(n)

    figures: Figures = [{"name": f"add of a token, batch {batch}, eager", "bytes": nbytes}]
    figures[-1]["us"] = 1e6 * device.time(eager, seconds=seconds)
    index.truncate(n)
    repeat = 4 if device.dry else 16
    index.add(tokens, tokens)

    def several() -> None:  # one launch in a graph is all overhead of the graph
        for _ in range(repeat):
            index.add(tokens, tokens)

    replay = device.graph(several)

    def block() -> None:
        index.truncate(n)
        for _ in range(1 if device.dry else 32):
            replay()
        index.advance()

    figures.append({"name": f"add of a token, batch {batch}, in a graph", "bytes": nbytes})
    figures[-1]["us"] = 1e6 * _replays(device, replay, repeat, partial(index.truncate, n), index.advance)
    block()
    return figures


def _replays(device: harness.Device, replay: Any, repeat: int, before: Any, after: Any) -> float:
    """Seconds of one of ``repeat`` steps in a graph, best of some; the index is put back in between."""
    times = []
    for _ in range(1 if device.dry else 8):
        before()
        times.append(_once(device, lambda: [replay() for _ in range(1 if device.dry else 8)]) / (1 if device.dry else 8) / repeat)
        after()
    return min(times)


def _once(device: harness.Device, call: Any) -> float:
    if device.dry:
        return device.time(call)
    assert isinstance(device, harness.Cuda)
    torch.cuda.synchronize()
    return device.elapsed(call, 1)


def sealing(device: harness.Device, shape: Shape, n: int, batch: int) -> Figures:
    """The step whose token completes a block: assigning, sorting and moving it, with the merges that its length brings.

    As many blocks as go into the longest segment, so that every merge is met as often as it comes. On the device: from the first
    launch to the last of a step that is queued behind a pause, so that nothing waits for the host; on the host: until the call
    returns. An add that seals nothing is taken off neither; a share is that of each token of the block, of every layer.
    """
    index = build(device, shape, n, batch, 1)[0]
    layout = index.layout
    block, rounds = layout.block, 3 if device.dry else layout.max_segment // layout.block
    index.reserve_memory(n + (rounds + 2) * block)
    tokens = torch.randn((batch, shape.kv_heads, block, shape.d), dtype=torch.float32, device=device.device).to(shape.dtype)
    last = tokens[:, :, -1:].contiguous()
    index.truncate(layout.sinks + layout.recent + block * layout.num_blocks(n))
    _check(index, _round(index, tokens, last))
    times, host, waited = [], [], 0
    for _ in range(rounds):
        index.add(tokens[:, :, 1:], tokens[:, :, 1:], seal=False)
        seconds, spent, waits = _queued(device, partial(index.add, last, last))
        times.append(seconds)
        host.append(spent)
        waited += waits
    if waited > rounds // 8:
        raise RuntimeError(f"expected a host that never waits for the device, got {waited} of {rounds} long calls")
    index.add(tokens[:, :, 1:], tokens[:, :, 1:], seal=False)
    rows: Figures = []
    for where, x in (("device", times), ("host", host)):
        mean, median = sum(x) / len(x), sorted(x)[len(x) // 2]
        figures = {"mean with merges": mean, "median": median, "longest": max(x), "a token and layer": mean / block}
        for name, seconds in figures.items():
            rows.append({"name": f"seal {block} x {batch}, {where}, {name}", "us": 1e6 * seconds, "bytes": 0})
    kernels = _launches(device, partial(index.add, last, last))
    count = sum(len(x) for x in kernels.values())
    rows.append({"name": f"seal {block} x {batch}, {count} launches", "us": sum(map(sum, kernels.values())), "bytes": 0})
    for name, each in kernels.items():
        rows.append({"name": f"    {len(each)} {name}", "us": sum(each), "bytes": 0})
    return rows


def _launches(device: harness.Device, call: Any) -> dict[str, list[float]]:
    """Microseconds of all that ``call`` has the device do, copies among them, by name."""
    durations: dict[str, list[float]] = {}
    if isinstance(device, harness.Dry):
        device.runtime.clear()
        call()
        for name in device.runtime.launched:
            durations.setdefault(name, []).append(0.0)
        return durations
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    for x in profile.events():
        if x.device_type == torch.autograd.DeviceType.CUDA and x.time_range.end > 0:
            durations.setdefault(x.name.split("(")[0][:32], []).append(x.time_range.elapsed_us())
    return durations


def _round(index: AsymmetricIndex, tokens: Tensor, last: Tensor) -> Tensor:
    """A block whose tokens differ, sealed by its last one; returns them."""
    new = torch.cat([tokens[:, :, 1:], last], 2)
    index.add(new[:, :, :-1], new[:, :, :-1], seal=False)
    index.add(last, last)
    return new


def _check(index: AsymmetricIndex, newest: Tensor) -> None:
    """RuntimeError unless the rows of the newest segments are their tokens, each once, in the nearest lists by float64."""
    lists, quantizer = index.invlists, index.key_quantizer
    assert quantizer is not None and index.rope is not None
    centroids = quantizer.centroids.to(lists.keys.device).double()
    for i, segments in enumerate(lists.segments):
        start, stop = segments[-1]
        ids, keys = lists.ids[i, :, start:stop].long(), lists.keys[i, :, start:stop]
        every = torch.arange(start, stop, dtype=torch.int64, device=ids.device)
        if not bool((ids.sort(1).values == every).all()):
            raise RuntimeError(f"sequence {i}: expected each token of rows {start} to {stop} once")
        table = lists.tables[i, :, len(segments) - 1]
        rows = every.int().expand(len(ids), -1).contiguous()
        nos = torch.searchsorted(table[:, 1:].contiguous(), rows, right=True)
        for head in range(lists.heads):
            plain = index.rope.unrotate(keys[head].float(), ids[head]).double()
            scores = plain @ centroids[head].T - centroids[head].square().sum(1) / 2
            short = scores.max(1).values - scores.gather(1, nos[head][:, None])[:, 0]
            if not bool((short <= 1e-3 * scores.abs().max()).all()):
                raise RuntimeError(f"sequence {i} head {head}: expected nearest lists, got one {float(short.max()):.3g} off")
            at = ids[head] - (lists.lengths[i] - newest.shape[2])
            among = at >= 0
            if not torch.equal(keys[head][among], newest[i, head][at[among]]):
                raise RuntimeError(f"sequence {i} head {head}: expected the keys of its tokens")


PAUSE = 10_000_000
"""Cycles: 5 ms, longer than the host takes for a step."""


def _queued(device: harness.Device, call: Any) -> tuple[float, float, bool]:
    """Seconds of ``call`` on the device, with all of it queued before the first of it runs; on the host; whether that waited."""
    if device.dry:
        seconds = device.time(call)
        return seconds, seconds, False
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(PAUSE)
    start.record()
    began = time.perf_counter()
    call()
    spent = time.perf_counter() - began
    waited = start.query()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3, spent, waited


def layers(device: harness.Device, shape: Shape, n: int, batch: int, count: int) -> Figures:
    """A token of ``count`` layers in one graph, the host waiting for each as it does that chooses the next, with the seals that
    are due: of all layers at the same token, and of one layer after the other, spread over the tokens of a block."""
    indexes = build(device, shape, n, batch, count)
    block, rounds = indexes[0].layout.block, 1 if device.dry else 3
    tokens = torch.randn((batch, shape.kv_heads, 1, shape.d), device=device.device, dtype=torch.float32).to(shape.dtype)
    queries = torch.randn((batch, shape.heads, 1, shape.d), device=device.device, dtype=torch.float32).to(shape.dtype)
    for index in indexes:
        index.reserve_memory(n + (2 * rounds + 2) * block)

    def step() -> None:
        for index in indexes:
            index.add(tokens, tokens)
            index.search_attend(queries)

    step()
    replay, figures = device.graph(step), []
    for name, apart in (("at once", 0), ("staggered", block // count)):
        waiting, times = [0] * count, []
        for token in range(block - 2 if device.dry else 0, rounds * block):
            began = time.perf_counter()
            replay()
            for i, index in enumerate(indexes):
                waiting[i] += 1
                if (token + i * apart) % block == block - 1:
                    index.advance(waiting[i])
                    waiting[i] = 0
            if not device.dry:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        for index, more in zip(indexes, waiting, strict=True):
            index.advance(more)
        mean, median = sum(times) / len(times), sorted(times)[len(times) // 2]
        summary = {"median": median, "longest": max(times), "more than the median, a token and layer": (mean - median) / count}
        for what, seconds in summary.items():
            figures.append({"name": f"{count} layers x {batch}, sealed {name}, {what}", "us": 1e6 * seconds, "bytes": 0})
    return figures


def bulk(device: harness.Device, shape: Shape, n: int) -> Figures:
    """A prompt at once, sealed into its final segments."""
    index = build(device, shape, n, 1, 1)[0]
    keys, values = (x[:, :, :n].clone() for x in (index.invlists.keys, index.invlists.values))
    times = []
    for _ in range(1 if device.dry else 5):
        index.reset()
        times.append(_once(device, partial(index.add, keys, values)))
    nbytes = 2 * shape.kv_bytes(n, 1)
    return [{"name": f"bulk build of {n} tokens", "us": 1e6 * min(times), "bytes": nbytes}]


def training(device: harness.Device, shape: Shape) -> Figures:
    """k-means of one layer, where FAISS is installed, and a step of AdamW on the routers of all KV heads."""
    figures: Figures = []
    keys = torch.randn((shape.kv_heads, 64 * shape.nlist, shape.d), device=device.device)
    if importlib.util.find_spec("faiss") is not None:
        began = time.perf_counter()
        KeyQuantizer.train(keys, shape.nlist, niter=2)
        figures.append({"name": f"k-means, 2 iterations of {keys.shape[1]} keys a head", "bytes": 0})
        figures[-1]["us"] = 1e6 * (time.perf_counter() - began)
    h, positions, g, bins = shape.kv_heads, 16 if device.dry else 512, shape.heads // shape.kv_heads, 12
    mass, near = (torch.rand((h, positions, g, x), device=device.device) for x in (shape.nlist, bins))
    data = RouterTargets(
        torch.randn((h, positions, g, shape.d), device=device.device), torch.rand((h, positions, g), device=device.device),
        mass / mass.sum(-1, keepdim=True), near / near.sum(-1, keepdim=True),
        torch.randint(0, 99, (h, positions, bins, shape.nlist), device=device.device, dtype=torch.int16),
        torch.arange(bins) * 1.0 + 7,
    )
    config = TrainingConfig(epochs=1, batch=8 if device.dry else 128)
    steps = positions // config.batch
    train_router(data, shape.nlist, config, 7, shape.knots)
    seconds = _once(device, lambda: train_router(data, shape.nlist, dataclasses.replace(config, epochs=2), 7, shape.knots))
    figures.append({"name": f"router training, a step of {config.batch} positions", "bytes": 0})
    figures[-1]["us"] = 1e6 * seconds / (2 * steps)
    return figures


def main() -> int:
    options = harness.arguments(__doc__).parse_args()
    device: harness.Device = harness.Dry() if options.dry else harness.Cuda()
    shape, n = (TINY, 96) if options.dry else (Shape(), 131072)
    began, figures, failed = time.perf_counter(), [], []
    stages = {
        "one token": partial(one_token, device, shape, n, 1, options.seconds),
        "bulk": partial(bulk, device, shape, n),
        "sealing": partial(sealing, device, shape, n, 1),
        "layers": partial(layers, device, shape, n // 4, 1, 2 if device.dry else 8),
        "sealing, batch": partial(sealing, device, shape, n // 2, 2 if device.dry else 8),
        "one token, batch": partial(one_token, device, shape, n // 4, 2 if device.dry else 8, options.seconds),
        "training": partial(training, device, shape),
    }
    for name, stage in stages.items():
        if time.perf_counter() - began > options.budget:
            failed.append(f"{name}: no time left")
            continue
        try:
            figures += stage()
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
        device.release()
    lines = [[x["name"], f"{x['us']:.2f}", f"{x['bytes'] / x['us'] / 1e3:.1f}" if x["bytes"] else "-"] for x in figures]
    table = harness.rows(["what", "us", "GB/s"], lines) + "".join(f"\nfailed: {x}" for x in failed)
    results = {"environment": harness.environment(device), "figures": figures, "failed": failed}
    harness.save(options.out, "gpu_build", results, table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
