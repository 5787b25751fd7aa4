"""`AsymmetricIndex.search` beside FAISS's `IndexIVFFlat.search`: the k best keys of many queries, one KV head, without RoPE.

    python bench/search.py

Both sides have the same keys in the same lists, float32, as many threads, and visit the same share of the lists. FAISS visits
nprobe lists by inner product with the centroids; here once nprobe lists with the same rule, where both must name the same
tokens, and once the same share of tokens by the router of an index (`selectivity`).
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

import harness
import saap_index as saap


def main() -> None:
    import faiss

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--nlist", type=int, default=256)
    parser.add_argument("--nprobe", type=int, default=13)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--queries", type=int, nargs="*", default=[1, 50, 1000])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each candidate")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    generator = torch.Generator("cpu").manual_seed(0)
    centres = torch.randn((args.nlist, args.dim), generator=generator, dtype=torch.float32, device="cpu")
    which = torch.randint(args.nlist, (args.tokens,), generator=generator, dtype=torch.int64, device="cpu")
    keys = centres[which] + 0.7 * torch.randn((args.tokens, args.dim), generator=generator, dtype=torch.float32, device="cpu")
    faiss.omp_set_num_threads(harness.THREADS)
    source = faiss.IndexIVFFlat(faiss.IndexFlatIP(args.dim), args.dim, args.nlist, faiss.METRIC_INNER_PRODUCT)
    source.train(keys[:16384].numpy())
    source.add(keys.numpy())
    source.nprobe = args.nprobe
    index = saap.AsymmetricIndex.from_faiss(source, keys.numpy(), sinks=0, window=1, break_even=0)
    whole = saap.SearchParametersIVF(nprobe=args.nprobe)
    share = saap.SearchParametersIVF(selectivity=args.nprobe / args.nlist)

    figures = {}
    print(f"{args.tokens} keys, d = {args.dim}, {args.nprobe} of {args.nlist} lists, k = {args.k}, {harness.THREADS} threads")
    for q in args.queries:
        queries = centres[torch.arange(q, dtype=torch.int64, device="cpu") % args.nlist]
        queries = queries + 0.7 * torch.randn((q, args.dim), generator=generator, dtype=torch.float32, device="cpu")
        theirs, ours = source.search(queries.numpy(), args.k)[1], index.search(queries, args.k, params=whole)[1]
        same = float((torch.from_numpy(theirs) == ours).float().mean())
        assert same > 0.99, f"the same tokens in {same:.1%} of places"
        times = harness.race(
            {
                "FAISS, nprobe": partial(source.search, queries.numpy(), args.k),
                "index, nprobe": partial(index.search, queries, args.k, params=whole),
                "index, selectivity": partial(index.search, queries, args.k, params=share),
            },
            args.seconds,
        )
        print(f"{q} queries")
        for name, seconds in times.items():
            print(harness.line(name, seconds) + f" {seconds / times['FAISS, nprobe']:7.2f} times FAISS")
        figures[str(q)] = times
    harness.save(args.json, "search", figures)


if __name__ == "__main__":
    main()
