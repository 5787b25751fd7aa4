"""Pauses of decoding with transformers: the longest step of SmolLM2 over many new tokens against the median one.

    python bench/hf_pauses.py --tokens 6000 --steps 4096

A prompt is read, then tokens are generated one by one, greedily; each step is timed by the clock and by the processor time of its
thread, which other programs on the machine disturb less. Beside the longest steps stands what the layers sorted and assigned in
them, in rows summed over layers and KV heads. Without --routers the model gets untrained ones of the usual shape.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import saap_index as saap
from harness import THREADS, save
from hf_generate import untrained_routers
from saap_lab.smollm2 import model as demo_model
from saap_lab.smollm2 import texts


def work(cache: Any) -> tuple[int, int, int]:
    """Rows moved and rows assigned so far, and rows there is room for, of all layers."""
    lists = [layer.index.invlists for layer in cache.layers if getattr(layer, "index", None) is not None]
    return sum(x.rows_moved for x in lists), sum(x.rows_assigned for x in lists), sum(x.capacity for x in lists)


def summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    median = statistics.median(ordered)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"median_ms": 1e3 * median, "p99_ms": 1e3 * p99, "longest_ms": 1e3 * ordered[-1], "ratio": ordered[-1] / median}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6000, help="of the prompt; with 4096 more, segments of all sizes merge")
    parser.add_argument("--steps", type=int, default=4096)
    parser.add_argument("--selectivity", type=float, default=0.05)
    parser.add_argument("--storage", choices=("SQ8", "SQ8/SQ4"))
    parser.add_argument("--routers", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from saap_index.hf import SaapCache, attach
    from saap_index.hf.support import cache_argument

    model, tokenizer = demo_model.load()
    routers = saap.from_pretrained(options.routers) if options.routers else untrained_routers(model.config)
    attach(model, routers, options.selectivity, **({"storage": options.storage} if options.storage else {}))
    text = "\n\n".join(document for _, document in texts.unseen_texts())
    ids = torch.tensor([demo_model.encode(tokenizer, text[: 12 * options.tokens])[: options.tokens]])
    assert ids.shape[1] == options.tokens, "the text is too short"
    cache = SaapCache(model)
    name = cache_argument(model)
    out = model(ids, **{name: cache}, logits_to_keep=1)
    wall, thread, done = [], [], []
    before = work(cache)
    for _ in range(options.steps):
        token = out.logits[:, -1:].argmax(-1)
        began, cpu = time.perf_counter(), time.thread_time()
        out = model(token, **{name: cache}, logits_to_keep=1)
        thread.append(time.thread_time() - cpu)
        wall.append(time.perf_counter() - began)
        now = work(cache)
        done.append([b - a for a, b in zip(before, now, strict=True)])
        before = now
    size = f"{options.tokens} tokens and {options.steps} steps"
    print(f"SmolLM2-135M, {size}, selectivity {options.selectivity}, storage {options.storage}, {THREADS} threads")
    figures = {"clock": summary(wall), "thread": summary(thread)}
    for title, x in figures.items():
        print(
            f"  by the {title:6} median {x['median_ms']:7.2f} ms   p99 {x['p99_ms']:7.2f}   longest {x['longest_ms']:7.2f}   "
            f"{x['ratio']:5.2f}x the median"
        )
    for step in sorted(range(options.steps), key=lambda i: -thread[i])[:6]:
        moved, assigned, room = done[step]
        print(
            f"  token {options.tokens + step + 1:6d}  {1e3 * thread[step]:7.2f} ms of the thread, {1e3 * wall[step]:7.2f} ms: "
            f"{moved} rows sorted, {assigned} assigned, room for {room} more made"
        )
    settings = {"tokens": options.tokens, "steps": options.steps, "storage": options.storage}
    save(options.json, "hf_pauses", {**settings, "wall_s": wall, "thread_s": thread, **figures})


if __name__ == "__main__":
    main()
