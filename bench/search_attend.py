"""One decode step of attention, everything counted: routing, selection, scan of sinks, recent and selected tokens, merge.

    python bench/search_attend.py --shape llama --tokens 131072
    python bench/search_attend.py --shape mha --tokens 131072
    python bench/search_attend.py --shape smollm2 --tokens 8192

Against what a user would run otherwise, in the same run: torch SDPA (as it is, and with the query heads of a group folded into
query rows, which reads K and V once), matmul-softmax-matmul, and this library's own dense pass over the same buffers. Results
are checked before anything is timed. Keys are random, lists come from k-means, the router has trained size and random weights.
Several copies of the cache take turns where they fit, so that no call finds its tokens in a CPU cache. A bare read of K and V
takes its turns too: the bandwidth that percentages refer to.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

import harness
from saap_index import AsymmetricIndex, KeyQuantizer, QueryRouter, Rope, SearchParametersIVF, reference
from saap_index.backends import RouterWeights

SHAPES = {"llama": (32, 8, 128, 500000.0), "mha": (8, 8, 128, 500000.0), "smollm2": (9, 3, 64, 100000.0)}
UNITS, KNOTS = 64, 11
READ = "a bare read of K and V"


def build(shape: str, n: int, nlist: int, dtype: torch.dtype, copies: int) -> list[AsymmetricIndex]:
    heads, kv_heads, d, theta = SHAPES[shape]
    index = AsymmetricIndex(d, nlist, heads, kv_heads, dtype=dtype, rope=Rope(head_dim=d, theta=theta))
    g = torch.Generator().manual_seed(0)
    sample = torch.randn((kv_heads, min(n, 64 * nlist), d), generator=g)
    index.key_quantizer = KeyQuantizer.train(sample, nlist, niter=4)
    sizes = (
        (kv_heads, UNITS, d),
        (kv_heads, UNITS),
        (kv_heads, nlist + KNOTS, UNITS),
        (kv_heads, nlist + KNOTS, d),
        (kv_heads, nlist + KNOTS),
    )
    weights = ((torch.randn(s, generator=g) * 0.2).bfloat16().float() for s in sizes)  # as training leaves them
    hidden, bias_hidden, out, skip, bias_out = weights
    index.query_router = QueryRouter(RouterWeights(hidden, bias_hidden, out, skip, bias_out, nlist), first_knot=7)
    found = []
    for _ in range(copies):
        new = index.fork()
        new.reserve_memory(n)
        for start in range(0, n, 16384):  # random numbers a piece at a time: float32 of all of them would not fit everywhere
            shape4 = (1, kv_heads, min(16384, n - start), d)
            new.add(torch.randn(shape4, generator=g).to(dtype), torch.randn(shape4, generator=g).to(dtype))
        found.append(new)
    return found


def check(index: AsymmetricIndex, queries: torch.Tensor) -> None:
    """The sparse step equals float64 attention over the tokens it read, the dense one attention over all."""
    for share in (index.selectivity, 1.0):
        params = SearchParametersIVF(selectivity=share)
        out = index.search_attend(queries, params=params)
        ids = index.read_ids(index.select(queries, params=params))[0]
        group = index.num_heads // index.num_kv_heads
        for head in (0, index.num_kv_heads - 1):
            keys, values = index.reconstruct(ids[head])
            part = slice(head * group, head * group + group)
            x = queries[0, part, 0].double().numpy()
            want, _ = reference.attend(x, keys[head].double().numpy(), values[head].double().numpy(), index.scale)
            error = abs(out[0, part, 0].double().numpy() - want).max()
            if error > 4 * torch.finfo(out.dtype).eps:
                raise SystemExit(f"wrong result at selectivity {share}: error {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--nlist", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--selectivity", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    parser.add_argument("--seconds", type=float, default=3.0, help="at least this long per candidate")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    heads, kv_heads, d, _ = SHAPES[options.shape]
    dtype, n = getattr(torch, options.dtype), options.tokens
    kv_bytes = n * kv_heads * 2 * d * dtype.itemsize
    copies = max(1, min(16, (256 << 20) // kv_bytes))
    indexes = build(options.shape, n, options.nlist, dtype, copies)
    queries = torch.randn((1, heads, 1, d), generator=torch.Generator().manual_seed(1)).to(dtype)
    check(indexes[0], queries)

    turn = itertools.cycle(indexes)
    # other queries each time: the rows of one query, read again and again, would come from a CPU cache
    drawn = torch.randn((24, 1, heads, 1, d), generator=torch.Generator().manual_seed(2)).to(dtype)
    fresh = itertools.cycle(drawn.unbind(0))
    folded = queries.view(1, kv_heads, heads // kv_heads, d)

    def dense_keys() -> tuple[torch.Tensor, torch.Tensor]:
        lists = next(turn).invlists
        return lists.keys[:, :, :n], lists.values[:, :, :n]

    def matmul() -> torch.Tensor:
        k, v = dense_keys()
        return torch.softmax(folded @ k.transpose(2, 3) * d**-0.5, -1) @ v

    def bare_read() -> int:
        lists = next(turn).invlists
        return harness.bare_read(lists.keys) + harness.bare_read(lists.values)

    def attend(params: SearchParametersIVF) -> torch.Tensor:
        out: torch.Tensor = next(turn).search_attend(next(fresh), params=params)
        return out

    def select(params: SearchParametersIVF) -> object:
        return next(turn).select(queries, params=params)

    candidates: dict[str, Callable[[], object]] = {
        READ: bare_read,
        "torch SDPA, enable_gqa": lambda: functional.scaled_dot_product_attention(queries, *dense_keys(), enable_gqa=True),
        "torch SDPA, group folded into rows": lambda: functional.scaled_dot_product_attention(folded, *dense_keys()),
        "torch matmul, softmax, matmul": matmul,
        "ours, dense": lambda: next(turn).search_attend(queries, params=SearchParametersIVF(selectivity=1.0)),
    }
    k, v = (x.float() for x in dense_keys())
    plain = functional.scaled_dot_product_attention(folded.float(), k, v).view(1, heads, 1, d)
    ours = indexes[0].search_attend(queries, params=SearchParametersIVF(selectivity=1.0))
    if copies == 1 and (ours.float() - plain).abs().max() > 8 * torch.finfo(dtype).eps:
        raise SystemExit("our dense pass differs from SDPA")
    for share in options.selectivity:
        params = SearchParametersIVF(selectivity=share)
        candidates[f"ours, selectivity {share:.0%}"] = partial(attend, params)
        # what `search_attend` does first, but by calls of its own: what it takes inside is less
        candidates[f"  select() by itself, {share:.0%}"] = partial(select, params)
    times = harness.race(candidates, options.seconds)
    bandwidth = bare_read() / times[READ]
    best_torch = min(t for name, t in times.items() if name.startswith("torch"))
    dense = times["ours, dense"]

    print(
        f"{options.shape}: {n} tokens, {kv_heads} KV and {heads} query heads, d = {d}, {options.dtype}, {copies} caches in turn"
    )
    print(f"  {harness.environment()}")
    figures = {}
    for name, seconds in times.items():
        nbytes = float(kv_bytes)
        if "ours, selectivity" in name:
            share = float(name.split()[-1].rstrip("%")) / 100
            indexes[0].search_attend(queries, params=SearchParametersIVF(selectivity=share))
            nbytes = indexes[0].stats().last_search.total_bytes
        nbytes = 0.0 if "select()" in name else bandwidth * seconds if name == READ else nbytes
        note = f"   {nbytes / seconds / bandwidth:4.0%} of read bandwidth" if nbytes and bandwidth else ""
        print(harness.line(name, seconds, nbytes, best_torch) + f" vs best torch {dense / seconds:6.2f}x vs our dense" + note)
        figures[name] = {
            "ms": seconds * 1e3,
            "bytes": nbytes,
            "vs_best_torch": best_torch / seconds,
            "vs_own_dense": dense / seconds,
        }
    stats = indexes[0].stats()
    shared = f"shared router and centroids {stats.shared_bytes / 1e6:.1f} MB"
    print(f"  memory beyond K and V: {stats.overhead:.2%} ({stats.num_segments} segments); {shared}")
    harness.save(
        options.json,
        "search_attend",
        {"shape": options.shape, "tokens": n, "bandwidth": bandwidth, "overhead": stats.overhead, "times": figures},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
