"""What training the routers of one layer of a large model takes: synthetic keys and queries of its shape, on this machine.

    python bench/train_cost.py                                   an 8B model: 32 query heads, 8 KV heads, 128 dims
    python bench/train_cost.py --heads 64                        a 70B one
    python bench/train_cost.py --heads 9 --kv-heads 3 --dim 64   SmolLM2-135M

Two ways: from one prompt, as `attach` does, whole; and as `saap train` does, on one and on two sequences, from which --sequences
of them follow, which is an estimate: everything but k-means grows with their number. CPU seconds are of all threads. Peak memory
is beside what was held before. Keys without structure cost what others do: no step depends on what is in them.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

import harness
import saap_index as saap
from saap_index.invlists.layout import Layout
from saap_index.training.config import TrainingConfig
from saap_index.training.layer import train_layer
from saap_index.training.prompt import PromptTraining, fit_bytes, fit_prompt


def timed(work: Callable[[], Any]) -> dict[str, float]:
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return {
        "cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall,
        "more_peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = {"heads": 32, "kv-heads": 8, "dim": 128, "tokens": 8192, "layers": 32, "sequences": 24, "threads": 2}
    for name, default in whole.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")
    parser.add_argument("--prompt-only", action="store_true", help="leave `saap train` out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    draw, rope, scale = torch.Generator().manual_seed(0), saap.Rope(head_dim=args.dim), args.dim**-0.5

    def rows(heads: int, n: int) -> torch.Tensor:
        return torch.randn((heads, n, args.dim), generator=draw, dtype=torch.float32).bfloat16().to(args.device)

    keys, values = rows(args.kv_heads, args.tokens), rows(args.kv_heads, args.tokens)
    options = PromptTraining()
    positions = np.sort(np.random.default_rng(0).permutation(np.arange(1024, args.tokens))[: options.queries])
    shape = args.kv_heads, args.dim, args.tokens, options.queries, options.nlist
    allowed = options.max_bytes - options.max_bytes // 2  # the sampled queries of all layers take the rest
    some = args.kv_heads
    while some > 1 and fit_bytes(args.heads // args.kv_heads * some, some, *shape[1:]) > allowed:
        some = (some + 1) // 2
    queries = rows(args.heads, len(positions))
    per_head = args.heads // args.kv_heads

    def of_a_prompt() -> None:
        for first in range(0, args.kv_heads, some):
            share = slice(first, min(first + some, args.kv_heads))
            mine = queries[share.start * per_head : share.stop * per_head]
            fit_prompt(keys[share], mine, positions, rope, scale, Layout(), options, None, None, values[share])

    found: dict[str, Any] = {"shape": vars(args) | {"json": None}, "kv_heads_at_once": some, "prompt": timed(of_a_prompt)}
    print(f"from a prompt, a layer: {found['prompt']}; {args.layers} layers: {args.layers * found['prompt']['cpu_s']:.0f} CPU s")
    if not args.prompt_only:
        config, places = TrainingConfig.named("two-tower"), np.sort(positions[:256])
        sequence = keys, queries[:, :256], places
        settings = 256, rope, Layout(), scale, config
        one, two = (timed(partial(train_layer, [sequence] * n, *settings)) for n in (1, 2))
        each = max(0.0, two["cpu_s"] - one["cpu_s"])
        layer = one["cpu_s"] + (args.sequences - 1) * each
        found |= {"train_1": one, "train_2": two, "train_estimate_cpu_s": layer}
        print(f"saap train, a layer: {one}, {two}; of {args.sequences} sequences about {layer:.0f} CPU s (estimate)")
    harness.save(args.json, "train_cost", found)


if __name__ == "__main__":
    main()
