"""A hundred generations in a row on an attached model, and the memory in use after each ten: it returns to where it was.

    python bench/hf_memory.py --generations 100 --tokens 6000

Batches, lengths on both sides of the break-even, beams (which reorder), looked-up candidates (which crop), a chat on a kept cache
that is cropped and copied. The model has the shapes of SmolLM2, random weights and fewer layers: a hundred prompts take long.
Exits with 1 if indexes are left over, or more memory is held at the end than after the first tenth, by more than --slack.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import harness
import saap_index as saap
from hf_generate import untrained_routers
from saap_index.hf.support import cache_argument

KINDS = ("batch", "beams", "looked-up candidates", "padded batch", "chat")


def make_model(layers: int) -> Any:
    config = LlamaConfig(
        vocab_size=1024, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5}, num_key_value_heads=3, max_position_embeddings=16384,
        eos_token_id=None, pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    return saap.attach(model, untrained_routers(config, own_lists=True), 0.05)


def generation(model: Any, kind: str, rng: np.random.Generator, most: int) -> int:
    """One of a kind; returns the tokens of its longest sequence."""
    n, b = int(rng.integers(500, most)), int(rng.integers(2, 4))
    ids = torch.from_numpy(rng.integers(3, 1024, (1 if kind in KINDS[2:3] + KINDS[4:] else b, n)))
    mask = torch.ones_like(ids)
    if kind == "padded batch":
        mask[0, : n // 3] = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    options |= {"num_beams": 3} if kind == "beams" else {"prompt_lookup_num_tokens": 3} if kind == KINDS[2] else {}
    if kind != "chat":
        model.generate(ids * mask, attention_mask=mask, **options)
        return n
    cache = saap.SaapCache(model)
    name = cache_argument(model)
    model.generate(ids, attention_mask=mask, **{name: cache}, **options)
    reused = copy.deepcopy(cache)
    reused.crop(-int(rng.integers(1, 200)))
    ids = torch.cat([ids, ids[:, :64]], 1)
    model.generate(ids, attention_mask=torch.ones_like(ids), **{name: reused}, **options)
    cache.crop(-cache.get_seq_length())
    return n + 64


def resident_bytes() -> int:
    """Memory of this process that is in use, after what is free has been given back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def indexes() -> int:
    return sum(type(x) is saap.AsymmetricIndex for x in gc.get_objects())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--generations", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=6000, help="of the longest prompt")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--slack", type=int, default=32, help="MB that may be held more at the end")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, rng = make_model(args.layers), np.random.default_rng(0)
    every = max(1, args.generations // 10)
    for number in range(every):  # what is made once
        generation(model, KINDS[number % len(KINDS)], rng, args.tokens)
    start, alive = resident_bytes(), indexes()
    print(f"{args.layers} layers, prompts up to {args.tokens} tokens; at first {start / 1e6:.0f} MB, {alive} empty indexes")
    held, began, longest = [], time.perf_counter(), 0
    for number in range(args.generations):
        longest = max(longest, generation(model, KINDS[number % len(KINDS)], rng, args.tokens))
        if (number + 1) % every == 0:
            held.append(resident_bytes())
            more, seconds = (held[-1] - start) / 1e6, time.perf_counter() - began
            print(f"  after {number + 1:4}: {more:+7.1f} MB, {indexes()} indexes, {seconds:5.0f} s", flush=True)
    harness.save(args.json, "hf_memory", {
        "generations": args.generations, "layers": args.layers, "longest": longest, "kinds": KINDS, "start_bytes": start,
        "held_bytes": held, "indexes": [alive, indexes()], "slack_mb": args.slack,
    })
    return int(indexes() != alive or held[-1] - start > args.slack << 20)


if __name__ == "__main__":
    sys.exit(main())
