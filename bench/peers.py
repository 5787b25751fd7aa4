"""One decode step of the index beside other methods on the same keys, values and queries; and what training and sealing take.

    python bench/peers.py --json results.json --plot results.png

The others are the lab's reference implementations in torch, which gather tokens and attend to them: their times say what a plain
implementation gives, not what the authors' kernels would. Every method is first set to read everything and compared with float64
attention; then each reads ``--share`` of the tokens between the first and the newest. Caches of the CPU are emptied before every
step; medians of steps taken in turn. Bytes are all that a step reads to choose and to attend, K and V counted with 16 bits a
number as in a real cache, though float32 is what all of them are timed with.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import harness
from saap_index import AsymmetricIndex, Rope, SearchParametersIVF, reference
from saap_lab import plots
from saap_lab.corm import Corm
from saap_lab.loki import Loki
from saap_lab.method import Attended, Layer, Method
from saap_lab.saap import Saap
from saap_lab.yardsticks import Dense, Selected, TopK

HEADS, GROUP, D = 3, 3, 64  # SmolLM2-135M's
ROUNDS, QUERIES = 15, 8
TRAINING = 16384


def methods(share: float, index: AsymmetricIndex, layer: Layer, sample: Tensor) -> dict[str, Method]:
    loki = Loki(share, 16)
    loki.calibrate(layer, [sample], [sample], [])
    methods: list[Method] = [Saap("saap", {layer.number: index}, share), Dense(), TopK(share), loki, Corm(128, share)]
    methods += [Selected(name, share) for name in ("topk_group", "ivf", "quest", "recent", "random")]
    return {method.name: method for method in methods}


def check(name: str, method: Method, layer: Layer, keys: Tensor, values: Tensor, query: Tensor) -> None:
    """A method that reads everything is dense attention."""
    state = method.start(layer, keys.shape[1])
    state.append(keys, values)
    out = state.answer(query).out
    for head in range(HEADS):
        x, k, v = (t[head].double().numpy() for t in (query, keys, values))
        want, _ = reference.attend(x, k, v, layer.scale)
        error = float((out[head].double() - torch.from_numpy(want)).abs().max())
        if error > 1e-4:
            raise SystemExit(f"{name}: wrong result with everything read, error {error}")


def steps(tokens: int, share: float, trained: AsymmetricIndex, layer: Layer) -> list[dict[str, float | str]]:
    """A row for each method, and for torch."""
    g = torch.Generator().manual_seed(tokens)
    keys, values = torch.randn((2, HEADS, tokens, D), generator=g)
    queries = torch.randn((QUERIES, HEADS, GROUP, D), generator=g)
    for name, method in methods(1.0, trained, layer, keys).items():
        check(name, method, layer, keys, values, queries[0])
    calls: dict[str, Callable[[Tensor], Attended | Tensor]] = {
        "torch SDPA": lambda x: functional.scaled_dot_product_attention(x[None], keys[None], values[None], scale=layer.scale)
    }
    read: dict[str, float] = {"torch SDPA": float(tokens * HEADS * layer.token_bytes)}
    for name, method in methods(share, trained, layer, keys).items():
        state = method.start(layer, tokens)
        state.append(keys, values)
        calls[name] = state.answer
        if name == "saap":  # as a user calls it; what it read is counted once
            read[name] = _bytes(state.answer(queries[0]))
            index = trained.fork()
            index.add(keys[None], values[None])
            index.selectivity = share
            calls[name] = partial(_searched, index)
    junk = torch.empty(16 << 20)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 1):
        for name, call in calls.items():
            junk.fill_(turn)
            began = time.perf_counter()
            out = call(queries[turn % QUERIES])
            if turn:
                times[name].append(time.perf_counter() - began)
            if isinstance(out, Attended):
                read[name] = _bytes(out)
    base = statistics.median(times["torch SDPA"])
    print(f"{tokens} tokens, {HEADS} KV and {HEADS * GROUP} query heads, d = {D}, {share:.0%}, against torch SDPA, group folded:")
    rows: list[dict[str, float | str]] = []
    for name, x in sorted(times.items(), key=lambda pair: statistics.median(pair[1])):
        seconds = statistics.median(x)
        print(harness.line(name, seconds, read[name], base), flush=True)
        rows.append({"tokens": tokens, "method": name, "seconds": seconds, "bytes": read[name]})
    return rows


def _bytes(step: Attended) -> float:
    return step.kv_bytes + step.other_bytes + step.shared_bytes


def _searched(index: AsymmetricIndex, query: Tensor) -> Tensor:
    out: Tensor = index.search_attend(query.reshape(1, HEADS * GROUP, 1, D))
    return out


def training(layer: Layer) -> tuple[AsymmetricIndex, dict[str, float]]:
    """An index trained on random keys, and the seconds that its stages took."""
    g = torch.Generator().manual_seed(0)
    keys, queries = torch.randn((1, HEADS, TRAINING, D), generator=g), torch.randn((1, HEADS * GROUP, 256, D), generator=g)
    positions = torch.randint(TRAINING // 8, TRAINING, (1, 256), generator=g).sort(dim=1).values
    index = AsymmetricIndex(D, 256, HEADS * GROUP, HEADS, rope=layer.rope, scale=layer.scale, break_even=0)
    began = time.perf_counter()
    index.train(keys, queries, positions=positions)
    trained = time.perf_counter() - began
    empty = index.fork()
    began = time.perf_counter()
    index.add(keys, keys)
    sealed = time.perf_counter() - began
    dense = index.search_attend(queries[:, :, :1], params=SearchParametersIVF(selectivity=1.0))
    want = functional.scaled_dot_product_attention(queries[:, :, :1], keys, keys, scale=layer.scale, enable_gqa=True)
    if float((dense - want).abs().max()) > 1e-4:
        raise SystemExit("add: wrong result over everything")
    print(f"train: k-means and router of a layer on {TRAINING} keys and 256 queries {trained:.1f} s")
    print(f"seal: {TRAINING} tokens at once, assigned and sorted {sealed * 1e3:.1f} ms")
    return empty, {"train": trained, "seal": sealed}


def plot(rows: list[dict[str, float | str]], path: Path) -> None:
    panels: dict[str, dict[str, tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: int(row["tokens"])):
        place = float(row["bytes"]) / 1e3, float(row["seconds"]) * 1e3
        panels.setdefault(f"{row['tokens']} tokens", {})[str(row["method"])] = place
    plots.scatter(path, panels, "kB read", "ms per step")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="needs matplotlib")
    options = parser.parse_args()
    layer = Layer(0, HEADS, GROUP, D, D, D**-0.5, Rope(head_dim=D, theta=100000.0))
    print(harness.environment())
    index, stages = training(layer)
    rows = [row for tokens in options.tokens for row in steps(tokens, options.share, index, layer)]
    harness.save(options.json, "peers", {"share": options.share, "seconds": stages, "steps": rows})
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
