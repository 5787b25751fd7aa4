"""Decoding with transformers, dense and sparse side by side: time to the first token, tokens per second, and the attention alone.

    python bench/hf_generate.py --tokens 8192 --routers path/to/routers

Both sides run in turns over the same weights, prompt and continuation, so what disturbs the machine disturbs both. Dense is what
transformers does by itself: its DynamicCache and SDPA. Sparse counts everything: appending, sealing, routing, selection, scan.
Without --routers the model gets some of the usual shape that were never trained: good for speed, useless for what is read;
--lists own gives every prompt lists of its own, made by k-means while it is read, shared gives all prompts the same.

The index's share of the time to the first token is what adding and sealing take, less what the dense cache takes to keep the
same keys and values, over the dense time.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

import saap_index as saap
from harness import THREADS, save
from saap_index.backends import RouterWeights
from saap_index.routers import model_shape
from saap_lab.smollm2 import model as demo_model
from saap_lab.smollm2 import texts


def untrained_routers(config: Any, own_lists: bool = False, nlist: int = 256, units: int = 64, knots: int = 8) -> saap.Routers:
    """Random centroids and networks of the shape that training gives."""
    h, d = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g) * 0.1

    def network(wide: int) -> RouterWeights:
        outputs = wide + knots + 1
        parts = (random(h, units, d), random(h, units), random(h, outputs, units), random(h, outputs, d), random(h, outputs))
        return RouterWeights(*parts, nlist=wide)

    layers = {}
    for layer in range(config.num_hidden_layers):
        quantizer = saap.KeyQuantizer(random(h, nlist, d) * 10)
        tower = saap.TwoTower(network(d)) if own_lists else None
        router = saap.QueryRouter(network(nlist)) if tower is None else tower.at(quantizer.centroids)
        rope = saap.Rope.from_config(config, layer=layer)
        layers[layer] = saap.LayerRouters(quantizer, router, rope, rope, d**-0.5, tower)
    return saap.Routers({"model": model_shape(config), "layout": {"sinks": 4, "window": 128}}, layers)


class Clock:
    """Seconds spent inside some functions of some modules, while `running`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed

    @contextmanager
    def running(self, places: list[tuple[Any, str]]) -> Any:
        before = [(owner, name, getattr(owner, name)) for owner, name in places]
        for owner, name, function in before:
            setattr(owner, name, self.wrap(function))
        try:
            yield self
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prefills", type=int, default=3, help="how often each side reads the prompt")
    parser.add_argument("--selectivity", type=float, default=0.05)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--routers", type=Path)
    parser.add_argument("--lists", choices=("own", "shared"), default="own", help="of untrained routers")
    parser.add_argument("--text", type=Path, help="a text file; default: the standard library of Python")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.models.llama import modeling_llama

    from saap_index.hf import SaapCache, attach, layer
    from saap_index.hf.support import cache_argument

    dense, tokenizer = demo_model.load()
    name = cache_argument(dense)
    dense = dense.to(getattr(torch, args.dtype))
    sparse = AutoModelForCausalLM.from_config(copy.deepcopy(dense.config), attn_implementation="sdpa").eval()
    sparse.load_state_dict(dense.state_dict(), assign=True)  # the same memory
    routers = saap.from_pretrained(args.routers) if args.routers else untrained_routers(dense.config, args.lists == "own")
    own_lists = any(layer.tower is not None for layer in routers.layers.values())
    attach(sparse, routers, args.selectivity)
    text = args.text.read_text() if args.text else "\n\n".join(document for _, document in texts.unseen_texts())
    ids = torch.tensor([demo_model.encode(tokenizer, text[: 12 * args.tokens])[: args.tokens]])
    assert ids.shape[1] == args.tokens, "the text is too short"

    first: dict[str, list[float]] = {"dense": [], "sparse": [], "index": []}
    caches: dict[str, Any] = {}
    for _ in range(args.prefills):
        caches.clear()
        kept, index = Clock(), Clock()
        caches["dense"], caches["sparse"] = DynamicCache(config=dense.config), SaapCache(sparse)
        with kept.running([(DynamicCache, "update")]):
            first["dense"].append(timed(partial(dense, ids, **{name: caches["dense"]}, logits_to_keep=1))[0])
        with index.running([(saap.AsymmetricIndex, name) for name in ("reserve_memory", "add", "seal")]):
            first["sparse"].append(timed(partial(sparse, ids, **{name: caches["sparse"]}, logits_to_keep=1))[0])
        first["index"].append(index.seconds - kept.seconds)

    # teacher-forced by the dense model, so that both sides see the same tokens
    steps = [ids[:, -1:]]
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    parts: dict[str, list[float]] = {name: [] for name in ("dense", "sparse", "dense with its cache", "sparse with its cache")}
    sdpa, agree = modeling_llama.ALL_ATTENTION_FUNCTIONS, 0
    for number in range(args.steps):
        attention, cache = Clock(), Clock()
        plain = sdpa["sdpa"]
        sdpa["sdpa"] = attention.wrap(plain)
        try:
            with cache.running([(DynamicCache, "update")]):
                seconds, out = timed(lambda: dense(steps[-1], **{name: caches["dense"]}, logits_to_keep=1))
        finally:
            del sdpa["sdpa"]
        search, append = Clock(), Clock()
        with search.running([(layer.IndexedLayer, "attend")]), append.running([(layer.IndexedLayer, "update")]):
            sparse_seconds, sparse_out = timed(lambda: sparse(steps[-1], **{name: caches["sparse"]}, logits_to_keep=1))
        agree += int(out.logits[0, -1].argmax() == sparse_out.logits[0, -1].argmax())
        steps.append(out.logits[:, -1:].argmax(-1))
        if number >= 4:
            times["dense"].append(seconds)
            times["sparse"].append(sparse_seconds)
            parts["dense"].append(attention.seconds)
            parts["dense with its cache"].append(attention.seconds + cache.seconds)
            parts["sparse"].append(search.seconds)
            parts["sparse with its cache"].append(search.seconds + append.seconds)

    middle = statistics.median
    added = middle(first["index"]) / middle(first["dense"])
    kind = f"{'trained' if args.routers else 'untrained'} routers, {'own' if own_lists else 'shared'} lists"
    print(f"SmolLM2-135M, {args.dtype}, {args.tokens} tokens, selectivity {args.selectivity}, {kind}, {THREADS} threads")
    print(
        f"  first token   dense {middle(first['dense']):7.2f} s   attached {middle(first['sparse']):7.2f} s   index {added:6.1%}"
    )
    a, b = middle(times["dense"]), middle(times["sparse"])
    print(f"  decode        dense {1 / a:7.2f} tokens/s   sparse {1 / b:7.2f} tokens/s   {a / b:5.2f}x")
    for name, title in (("", "attention "), (" with its cache", "with cache")):
        a, b = (1e3 * middle(parts[side + name]) for side in ("dense", "sparse"))
        print(f"  {title}    SDPA  {a:7.2f} ms/token   sparse {b:7.2f} ms/token   {a / b:5.2f}x")
    print(f"  top-1         {agree} of {args.steps} agree   tokens read {caches['sparse'].tokens_read():.1%}")
    save(args.json, "hf_generate", {
        "tokens": args.tokens, "dtype": args.dtype, "selectivity": args.selectivity, "trained": args.routers is not None,
        "own_lists": own_lists, "index_share_of_first_token": added,
        "first_token_s": first, "decode_s": times, "attention_s": parts, "agree": agree, "steps": args.steps,
        "tokens_per_s": {name: 1 / middle(times[name]) for name in times},
        "attention_ms": {name: 1e3 * middle(parts[name]) for name in parts},
    })


if __name__ == "__main__":
    main()
