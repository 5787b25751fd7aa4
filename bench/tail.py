"""Where the tail estimate pays: output error at equal bytes with and without it, by context length, on a real model's attention.

    saap train --model MODEL --text FILES --context 16384 --out routers
    python bench/tail.py --model MODEL --routers routers --text OTHER_FILES --lengths 8192,16384,32768 --json results.json

Without --routers a layer routes as plain IVF does, with lists of each context, and nothing need be trained.

The model reads each text once, densely; an index per layer holds the tokens before each query and answers it, with lists made for
each length anew. Every mean that is read costs what a token does and is part of the budget, so rows of one share read the same
bytes. Error: |out - dense| / |dense|, mean over layers, heads and the queries before each length; mean and standard deviation
over texts. ``run``: tokens of an average run from which on a segment keeps means.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor
from torch.nn import functional

from saap_index import AsymmetricIndex, KeyQuantizer, Rope, Routers, SearchParametersIVF, TwoTower, load_routers
from saap_index.hf import models, support
from saap_index.pipeline.texts import pack_sequences, read_texts
from saap_lab.replace import Prompt, read_prompt

TAILS, RUNS, SHARES = (0.0, 0.1, 0.2, 0.35, 0.5), (2, 4, 8, 16, 32), (0.02, 0.05)
QUERIES, SPAN = 12, 192
"""Of each length, spread over so many last tokens."""

LISTS = 256

Case = tuple[float, float]
"""Share of the tokens, and of that the part which is means."""


def errors(
    index: AsymmetricIndex, keys: Tensor, values: Tensor, queries: Tensor, at: Tensor, cases: list[Case]
) -> dict[Case, float]:
    """Mean error of each case. keys, values (h, n, d); queries (h, g, q, d) at positions ``at``; the index holds nothing yet."""
    h, g = queries.shape[:2]
    found: dict[Case, list[float]] = {case: [] for case in cases}
    done = 0
    for i, position in enumerate(at.tolist()):
        index.add(keys[None, :, done : position + 1], values[None, :, done : position + 1])
        done = position + 1
        x = queries[:, :, i].reshape(1, h * g, 1, -1)
        k, v = (t[:, :done].repeat_interleave(g, 0)[None] for t in (keys, values))
        dense = functional.scaled_dot_product_attention(x, k, v, scale=index.scale)
        for share, tail in cases:
            out = index.search_attend(x, params=SearchParametersIVF(selectivity=share, tail=tail))
            found[share, tail].append(float(((out - dense).norm(dim=-1) / dense.norm(dim=-1)).mean()))
    return {case: statistics.mean(x) for case, x in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--routers", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--lengths", default="2048,4096,8192")
    parser.add_argument("--layers", help="default: all that are indexed")
    parser.add_argument("--texts", type=int, default=2, help="as long as the longest context each")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    lengths = sorted(int(x) for x in options.lengths.split(","))
    loaded = models.load_model(options.model, dtype="float32")
    routers = None if options.routers is None else load_routers(options.routers)
    if routers is not None:
        routers.check(loaded.model.config)
    whole = support.global_layers(support.decoder_of(loaded.model)) if routers is None else sorted(routers.layers)
    layers = whole if options.layers is None else [int(x) for x in options.layers.split(",")]
    positions = torch.cat([torch.linspace(n - SPAN, n - 1, QUERIES).long() for n in lengths])
    sequences = pack_sequences(read_texts(options.text), partial(models.encode, loaded.tokenizer), options.texts, lengths[-1])
    found: dict[tuple[int, int, Case], list[float]] = {}
    for name, tokens in sequences:
        print(f"reading {name[:60]}", file=sys.stderr, flush=True)
        prompt = read_prompt(loaded.model, tokens, None, positions)
        for i, length in enumerate(lengths):
            for run in RUNS:
                cases = [(share, tail) for share in SHARES for tail in TAILS if tail or run == RUNS[0]]
                some = slice(i * QUERIES, (i + 1) * QUERIES)
                every = [_layer(loaded.model.config, routers, prompt, x, run, some, cases) for x in layers]
                for case in cases:
                    found.setdefault((length, run, case), []).append(statistics.mean(x[case] for x in every))
            print(f"  {length} tokens: done", file=sys.stderr, flush=True)
    figures = [
        {
            "tokens": length, "run": run, "share": share, "tail": tail, "error": statistics.mean(x),
            "spread": statistics.stdev(x) if len(x) > 1 else 0.0, "texts": len(x),
        }
        for (length, run, (share, tail)), x in found.items()
    ]
    show(figures)
    if options.json:
        options.json.write_text(json.dumps({"model": loaded.name, "layers": layers, "figures": figures}, indent=1))
    return 0


def _layer(
    config: Any, routers: Routers | None, prompt: Prompt, number: int, run: int, some: slice, cases: list[Case]
) -> dict[Case, float]:
    at, layer = next((i, x) for i, x in enumerate(prompt.layers) if x.number == number)
    if routers is not None:
        index = routers.index(number, mean_run_tokens=run)
    else:
        rope = Rope.from_config(config, layer=number)
        index = AsymmetricIndex(
            layer.d, LISTS, layer.heads * layer.group, layer.heads,
            d_v=layer.e, rope=rope, scale=layer.scale, mean_run_tokens=run,
        )
        index.key_quantizer = KeyQuantizer(torch.zeros(layer.heads, LISTS, layer.d))  # the context makes others
        index.tower = TwoTower.symmetric(layer.heads, layer.d)
    return errors(index, prompt.keys[at], prompt.values[at], prompt.queries[at][:, :, some], prompt.positions[some], cases)


def show(figures: list[dict[str, float]]) -> None:
    print(f"{'tokens':>7} {'share':>6} {'run':>5} {'tail':>5} {'error':>8} {'spread':>8} {'against none':>13}")
    none = {(x["tokens"], x["share"]): x["error"] for x in figures if not x["tail"]}
    for x in sorted(figures, key=lambda x: (x["tokens"], x["share"], x["tail"] > 0, x["run"], x["tail"])):
        gain = x["error"] / none[x["tokens"], x["share"]] - 1
        line = f"{x['tokens']:7.0f} {x['share']:6.1%} {x['run']:5.0f} {x['tail']:5.2f} {x['error']:8.4f} {x['spread']:8.4f}"
        print(f"{line} {gain:+13.1%}")


if __name__ == "__main__":
    sys.exit(main())
