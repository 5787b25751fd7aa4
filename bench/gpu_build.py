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

import gpu_harness as harness
import torch
from gpu_step import TINY, Shape, build

from saap_index import KeyQuantizer, TrainingConfig
from saap_index.training import RouterTargets, train_router

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

    On the device, and what the host spends on the call, which does not wait; the mean also as a share of each token of the block.
    """
    index = build(device, shape, n, batch, 1)[0]
    block, rounds = index.layout.block, 2 if device.dry else 24
    index.reserve_memory(n + (rounds + 2) * block)
    tokens = torch.randn((batch, shape.kv_heads, block, shape.d), dtype=torch.float32, device=device.device).to(shape.dtype)
    last = tokens[:, :, -1:].contiguous()
    index.add(tokens[:, :, 1:], tokens[:, :, 1:], seal=False)
    index.truncate(index.layout.sinks + index.layout.recent + index.layout.block * (index.layout.num_blocks(n) + 1) - 1)
    times, host = [], []

    def step() -> None:
        began = time.perf_counter()
        index.add(last, last)
        host.append(time.perf_counter() - began)

    for _ in range(rounds):
        times.append(_once(device, step))
        index.add(tokens[:, :, 1:], tokens[:, :, 1:], seal=False)
    mean, what = sum(times) / len(times), f"add of a token that seals {block} x {batch}"
    figures = {
        f"{what}, mean with merges": mean, f"{what}, longest": max(times), f"{what}, shortest": min(times),
        f"{what}, host, median": sorted(host)[len(host) // 2], f"{what}, mean, a {block}th": mean / block,
    }  # fmt: skip
    return [{"name": name, "us": 1e6 * seconds, "bytes": 0} for name, seconds in figures.items()]


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
    mass = [torch.rand((h, positions, g, x), device=device.device) for x in (shape.nlist, bins)]
    data = RouterTargets(
        torch.randn((h, positions, g, shape.d), device=device.device), torch.rand((h, positions, g), device=device.device),
        *(x / x.sum(-1, keepdim=True) for x in mass),
        torch.randint(0, 99, (h, positions, bins, shape.nlist), device=device.device, dtype=torch.int16),
        torch.arange(bins) * 1.0 + 7,
    )  # fmt: skip
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
        "sealing, batch": partial(sealing, device, shape, n // 4, 2 if device.dry else 8),
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
    lines = [[x["name"], f"{x['us']:.1f}", f"{x['bytes'] / x['us'] / 1e3:.1f}" if x["bytes"] else "-"] for x in figures]
    table = harness.rows(["what", "us", "GB/s"], lines) + "".join(f"\nfailed: {x}" for x in failed)
    found = {"environment": harness.environment(device), "figures": figures, "failed": failed}
    harness.save(options.out, "gpu_build", found, table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
