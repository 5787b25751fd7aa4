"""Adding tokens: one at a time, sealing and merging included, at several context lengths; and a whole prompt at once.

    python bench/add.py

The prompt is compared, in the same run, with one dense pass of its keys through the assignment GEMM of k-means (torch addmm
into a reused buffer and a maximum, 512 keys at a time), which any index over the same lists has to do at the least.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import torch

import harness
from search_attend import SHAPES, build


def one_at_a_time(shape: str, context: int, steps: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of adding one token after ``context`` others, over ``steps`` of them: of the thread, and by the clock.

    A thread's own time is what a loaded machine falsifies least; what other threads do of a merge is not in it.
    """
    index = build(shape, context, 256, dtype, 1)[0]
    _, heads, d, _ = SHAPES[shape]
    index.reserve_memory(context + steps)
    tokens = [torch.randn((1, heads, 1, d)).to(dtype) for _ in range(64)]
    thread, clock = [], []
    for i in range(steps):
        start, began = time.perf_counter(), time.thread_time()
        index.add(tokens[i % 64], tokens[(i + 7) % 64])
        thread.append(time.thread_time() - began)
        clock.append(time.perf_counter() - start)
    seconds: dict[str, float] = {}
    for name, x in (("thread", sorted(thread)), ("clock", sorted(clock))):
        seconds |= {f"{name}_mean": sum(x) / steps, f"{name}_p99": x[int(0.99 * (steps - 1))], f"{name}_longest": x[-1]}
    return seconds


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def memory(shape: str, n: int, dtype: torch.dtype) -> tuple[int, int]:
    """Growth of the process by an index of ``n`` tokens, added 4096 at a time, and the bytes of its keys and values."""
    build(shape, 16384, 256, dtype, 1)  # once before, for what the first use of anything keeps
    index = build(shape, 16384, 256, dtype, 1)[0]
    index.reset()
    index.reclaim_memory()
    before = resident_bytes()
    index.reserve_memory(n)
    _, heads, d, _ = SHAPES[shape]
    tokens = torch.randn((1, heads, 4096, d)).to(dtype)
    for _ in range(0, n, 4096):
        index.add(tokens, tokens)
    return resident_bytes() - before - tokens.nbytes, index.stats().kv_bytes


def at_once(shape: str, n: int, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    index = build(shape, 4096, 256, dtype, 1)[0]
    _, heads, d, _ = SHAPES[shape]
    keys = torch.cat([torch.randn((1, heads, 8192, d)).to(dtype) for _ in range(n // 8192)], 2)
    values = keys.clone()
    index.reset()
    index.reserve_memory(n)

    def bulk() -> None:
        index.reset()
        index.add(keys, values)

    quantizer = index.key_quantizer
    assert quantizer is not None
    wide = [keys[0, h].float() for h in range(heads)]
    centroids = [c.T.contiguous() for c in quantizer.centroids]
    bias = [-0.5 * c.square().sum(-1) for c in quantizer.centroids]
    scores = torch.empty((512, quantizer.nlist))

    def gemm() -> None:
        for h in range(heads):
            for start in range(0, n, 512):
                torch.addmm(bias[h], wide[h][start : start + 512], centroids[h], out=scores).max(1)

    copy = torch.empty_like(keys), torch.empty_like(values)

    def clone() -> None:
        copy[0].copy_(keys)
        copy[1].copy_(values)

    return harness.race({"bulk add": bulk, "assignment GEMM alone": gemm, "copying K and V": clone}, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--steps", type=int, default=8448, help="tokens added one by one: a whole cycle of merges and more")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    figures: dict[str, object] = {}
    print(f"{options.shape}, {options.dtype}; {harness.environment()}")
    for context in options.contexts:
        each = one_at_a_time(options.shape, context, options.steps, dtype)
        for name in ("thread", "clock"):
            mean, p99, longest = (each[f"{name}_{x}"] for x in ("mean", "p99", "longest"))
            print(
                f"  add one token after {context:7d}, by the {name:6}: {mean * 1e6:7.1f} us on average, p99 {p99 * 1e6:7.1f} us, "
                f"longest {longest * 1e3:7.2f} ms"
            )
        figures[f"one after {context}"] = {f"{name}_us": x * 1e6 for name, x in each.items()}
    grown, kv_bytes = memory(options.shape, options.tokens, dtype)
    print(f"  memory of {options.tokens} tokens: {grown / 1e6:.1f} MB resident, {grown / kv_bytes - 1:.2%} more than K and V")
    figures["memory"] = {"resident_bytes": grown, "kv_bytes": kv_bytes}
    times = at_once(options.shape, options.tokens, dtype, 2.0)
    for name, seconds in times.items():
        print(
            harness.line(f"{name}, {options.tokens} tokens", seconds, 0, 0)
            + f" {seconds / times['assignment GEMM alone']:6.2f}x the GEMM"
        )
    harness.save(options.json, "add", {"one_at_a_time": figures, "at_once_seconds": times})
    return 0


if __name__ == "__main__":
    sys.exit(main())
