"""How often an attached model takes the token that the dense model takes, behind the same text, every layer sparse.

    python bench/hf_agreement.py --routers path/to/routers --tokens 8192 --forced 256 --prompts 6

Each prompt is read densely but for its last tokens; those are shown to both models one after the other, and their choices are
compared at each: teacher-forced, so that one difference does not make the next. Unseen text: documentation and code of Python, or
files of your own. Without --routers, those of a plain IVF index with lists of each prompt's own: a floor for what training gives.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import saap_index as saap
from harness import THREADS, save
from saap_index.hf import attach, detached
from saap_index.hf.cache import adopt, plan_of
from saap_index.hf.support import cache_argument, decoder_of
from saap_index.pipeline.texts import pack_sequences, read_texts
from saap_index.routers import model_shape
from saap_lab.smollm2 import model as demo_model
from saap_lab.smollm2 import texts


def symmetric_routers(config: Any, nlist: int = 256) -> saap.Routers:
    """A query looks for keys like itself; lists come from each prompt. Nothing is trained."""
    h, d = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    tower, quantizer = saap.TwoTower.symmetric(h, d), saap.KeyQuantizer(torch.zeros(h, nlist, d))
    layers = {}
    for layer in range(config.num_hidden_layers):
        rope = saap.Rope.from_config(config, layer=layer)
        layers[layer] = saap.LayerRouters(quantizer, tower.at(quantizer.centroids), rope, rope, d**-0.5, tower)
    return saap.Routers({"model": model_shape(config), "layout": {"sinks": 4, "window": 128}}, layers)


@torch.inference_mode()
def compare(model: Any, ids: torch.Tensor, forced: int, params: dict[str, saap.SearchParametersIVF]) -> dict[str, Any]:
    """Of one prompt ids (1, n), for every search: agreement, KL divergence from dense in nats, and the share of tokens read."""
    from transformers import DynamicCache

    document, text = ids[:, :-forced], ids[:, -forced:]
    cache = DynamicCache(config=model.config)
    name = cache_argument(model)
    with detached(model):
        model(document, **{name: cache}, logits_to_keep=1)
        dense = model(text, **{name: cache}).logits[0].log_softmax(-1)
        cache.crop(-forced)
    plan = plan_of(model)
    assert plan is not None
    cache = adopt(cache, plan, decoder_of(model))
    results = {}
    for name, search in params.items():
        cache.set_search(search)
        same, divergence, read = 0, 0.0, []
        for i in range(forced):
            logits = model(text[:, i : i + 1], **{name: cache}, logits_to_keep=1).logits[0, -1].log_softmax(-1)
            same += int(logits.argmax() == dense[i].argmax())
            divergence += float((dense[i].exp() * (dense[i] - logits)).sum())
            read.append(cache.tokens_read())
        results[name] = {"agreement": same / forced, "kl": divergence / forced, "read": statistics.mean(read)}
        cache.crop(-forced)
    return results


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=8192, help="of a prompt, those that are forced among them")
    parser.add_argument("--forced", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--selectivity", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--routers", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", help="files or folders (default: Python's documentation and code)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, tokenizer = demo_model.load()
    model = model.to(getattr(torch, args.dtype))
    attach(model, saap.from_pretrained(args.routers) if args.routers else symmetric_routers(model.config))
    documents = read_texts(args.text) if args.text else texts.unseen_texts()
    sequences = pack_sequences(documents, partial(demo_model.encode, tokenizer), args.prompts, args.tokens)
    params = {f"{share:.0%}": saap.SearchParametersIVF(selectivity=share) for share in args.selectivity}
    kind = "trained routers" if args.routers else "plain IVF"
    print(f"SmolLM2-135M, {args.dtype}, {args.tokens} tokens, {args.forced} forced, {kind}, {THREADS} threads")
    rows: list[dict[str, Any]] = []
    for name, tokens in sequences:
        began = time.perf_counter()
        results = compare(model, torch.tensor([list(tokens)]), args.forced, params)
        rows.append({"prompt": name, **results})
        cells = "   ".join(f"{share} {x['agreement']:6.1%} KL {x['kl']:.4f}" for share, x in results.items())
        print(f"  {cells}   {time.perf_counter() - began:4.0f} s   {name[:60]}", flush=True)
    for share in params:
        same, kl, read = ([row[share][what] for row in rows] for what in ("agreement", "kl", "read"))
        print(
            f"{share}: top-1 agreement {statistics.mean(same):.1%}, deviation over prompts {spread(same):.1%}, "
            f"KL {statistics.mean(kl):.4f} ({spread(kl):.4f}), tokens read {statistics.mean(read):.1%}"
        )
    save(args.json, "hf_agreement", {
        "tokens": args.tokens, "forced": args.forced, "dtype": args.dtype, "routers": kind, "prompts": rows,
        "mean": {s: {w: statistics.mean(row[s][w] for row in rows) for w in ("agreement", "kl", "read")} for s in params},
        "deviation": {s: {w: spread([row[s][w] for row in rows]) for w in ("agreement", "kl")} for s in params},
    })


if __name__ == "__main__":
    main()
