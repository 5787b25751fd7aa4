"""What storing sealed tokens as codes does to a step, to sealing and to memory, beside bfloat16 in one run.

Indexes with the same lists and the same router, so that every one reads the same tokens; their steps take turns, and so do the
prompts that they seal, into new memory each. Sealing is CPU time of all threads, and beside it its ratio to bfloat16's of the
same turn; medians. Run it as:
python bench/codes.py --tokens 131072
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its waiting threads would take the cores measured here

import torch

from saap_index import AsymmetricIndex, KeyQuantizer, QueryRouter, SearchParametersIVF, _cpu
from saap_index.backends import STORAGE_CODES, RouterWeights

CHUNK = 8192


def new_index(args: argparse.Namespace, storage: str | None, centroids: torch.Tensor, router: QueryRouter) -> AsymmetricIndex:
    shape = args.d, args.nlist, args.heads, args.kv_heads
    index = AsymmetricIndex(*shape, dtype=torch.bfloat16, selectivity=args.selectivity, storage=storage, break_even=0)
    index.key_quantizer, index.query_router = KeyQuantizer(centroids), router
    return index


def random_router(args: argparse.Namespace, g: torch.Generator) -> QueryRouter:
    units, outputs = 64, args.nlist + 9
    h, d = args.kv_heads, args.d
    shapes = ((h, units, d), (h, units), (h, outputs, units), (h, outputs, d), (h, outputs))
    hidden, bias_hidden, out, skip, bias_out = (torch.randn(s, generator=g) * 0.3 for s in shapes)
    return QueryRouter(RouterWeights(hidden, bias_hidden, out, skip, bias_out, args.nlist), first_knot=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--nlist", type=int, default=256)
    parser.add_argument("--selectivity", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seals", type=int, default=5, help="how often each seals the prompt")
    args = parser.parse_args()
    g = torch.Generator().manual_seed(0)
    centroids, router = torch.randn((args.kv_heads, args.nlist, args.d), generator=g), random_router(args, g)
    shape = (1, args.kv_heads, args.tokens, args.d)
    keys, values = (torch.empty(shape, dtype=torch.bfloat16, device="cpu") for _ in range(2))
    for x in (keys, values):
        for head in range(args.kv_heads):
            x[0, head] = torch.randn((args.tokens, args.d), generator=g)
    indexes, memory = {}, {}
    for storage in (None, *STORAGE_CODES):
        index = indexes[storage] = new_index(args, storage, centroids, router)
        index.add(keys[:, :, :CHUNK], values[:, :, :CHUNK])  # for what the first use of anything keeps
    sealing: dict[str | None, list[float]] = {storage: [] for storage in indexes}
    for _ in range(args.seals):
        for storage, index in indexes.items():
            index.reset()
            index.reclaim_memory()
            index.reserve_memory(args.tokens, batch=1)
            start = time.process_time()
            index.add(keys, values)
            sealing[storage].append(time.process_time() - start)
    for storage, index in indexes.items():
        index.reclaim_memory()
        stats = index.stats()
        memory[storage] = stats.kv_bytes
    queries = [torch.randn((1, args.heads, 1, args.d), generator=g).bfloat16() for _ in range(args.steps)]
    times: dict[str | None, list[float]] = {storage: [] for storage in indexes}
    for x in queries:
        for storage, index in indexes.items():
            start = time.perf_counter()
            index.search_attend(x)
            times[storage].append(time.perf_counter() - start)
    full = SearchParametersIVF(selectivity=1.0)
    exact = indexes[None].search_attend(queries[0].float(), params=full)
    print(f"{_cpu.isa()}, {_cpu.get_num_threads()} threads, {args.tokens} tokens, {args.kv_heads} KV heads, d = {args.d}")
    for storage, index in indexes.items():
        error = (index.search_attend(queries[0].float(), params=full) - exact).norm() / exact.norm()
        best, middle = min(times[storage]) * 1e6, statistics.median(times[storage]) * 1e6
        print(f"{storage or 'bfloat16':9} step {best:6.0f} us at best, {middle:6.0f} in the middle", end=", ")
        share = memory[storage] / memory[None]
        ratio = statistics.median(a / b for a, b in zip(sealing[storage], sealing[None], strict=True))
        print(f"sealing {statistics.median(sealing[storage]):5.2f} s of CPU ({ratio:.2f})", end=", ")
        print(f"{share:.3f} of the bytes, output error {float(error):.4f}")


if __name__ == "__main__":
    main()
