"""Decoding with transformers, dense and sparse side by side: time to the first token, tokens per second, and the attention alone.

    python bench/hf_generate.py --tokens 8192 --routers path/to/routers

Both sides run in turns over the same weights, prompt and continuation, so what disturbs the machine disturbs both. Dense is what
transformers does by itself: its DynamicCache and SDPA. Sparse counts everything: appending, sealing, routing, selection, scan.
Without --routers the model gets some of the usual shape that were never trained: good for speed, useless for what is read.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import save

import saap_index as saap
from saap_index.backends import RouterWeights
from saap_index.demo import model as demo_model
from saap_index.demo import texts
from saap_index.routers import model_shape


def untrained_routers(config: Any, nlist: int = 256, units: int = 64, knots: int = 8) -> Any:
    """Random centroids and networks of the shape that training gives."""
    h, d = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g) * 0.1

    layers = {}
    for layer in range(config.num_hidden_layers):
        outputs = nlist + knots + 1
        parts = (random(h, units, d), random(h, units), random(h, outputs, units), random(h, outputs, d), random(h, outputs))
        quantizer, router = saap.KeyQuantizer(random(h, nlist, d) * 10), saap.QueryRouter(RouterWeights(*parts, nlist=nlist))
        rope = saap.Rope.from_config(config, layer=layer)
        layers[layer] = saap.LayerRouters(quantizer, router, rope, rope, d**-0.5)
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
    parser.add_argument("--text", type=Path, help="a text file; default: the standard library of Python")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.models.llama import modeling_llama

    from saap_index.hf import SaapCache, attach, layer

    dense, tokenizer = demo_model.load()
    dense = dense.to(getattr(torch, args.dtype))
    sparse = AutoModelForCausalLM.from_config(copy.deepcopy(dense.config), attn_implementation="sdpa").eval()
    sparse.load_state_dict(dense.state_dict(), assign=True)  # the same memory
    routers = saap.from_pretrained(args.routers) if args.routers else untrained_routers(dense.config)
    attach(sparse, routers, args.selectivity)
    text = args.text.read_text() if args.text else "\n\n".join(document for _, document in texts.unseen_texts())
    ids = torch.tensor([demo_model.encode(tokenizer, text[: 12 * args.tokens])[: args.tokens]])
    assert ids.shape[1] == args.tokens, "the text is too short"

    first: dict[str, list[float]] = {"dense": [], "sparse": [], "index": []}
    caches: dict[str, Any] = {}
    for _ in range(args.prefills):
        caches["dense"] = DynamicCache(config=dense.config)
        first["dense"].append(timed(lambda: dense(ids, past_key_values=caches["dense"], logits_to_keep=1))[0])
        caches["sparse"] = SaapCache(sparse, max_tokens=args.tokens + args.steps + 8)
        index = Clock()
        with index.running([(saap.AsymmetricIndex, "add"), (saap.AsymmetricIndex, "seal")]):
            first["sparse"].append(timed(lambda: sparse(ids, past_key_values=caches["sparse"], logits_to_keep=1))[0])
        first["index"].append(index.seconds)

    # teacher-forced by the dense model, so that both sides see the same tokens
    steps = [ids[:, -1:]]
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    parts: dict[str, list[float]] = {"dense": [], "sparse": [], "dense with its cache": []}
    sdpa, agree = modeling_llama.ALL_ATTENTION_FUNCTIONS, 0
    for number in range(args.steps):
        attention, cache = Clock(), Clock()
        plain = sdpa["sdpa"]
        sdpa["sdpa"] = attention.wrap(plain)
        try:
            with cache.running([(DynamicCache, "update")]):
                seconds, out = timed(lambda: dense(steps[-1], past_key_values=caches["dense"], logits_to_keep=1))
        finally:
            del sdpa["sdpa"]
        own = Clock()
        with own.running([(layer.IndexedLayer, "update"), (layer.IndexedLayer, "attend")]):
            sparse_seconds, sparse_out = timed(lambda: sparse(steps[-1], past_key_values=caches["sparse"], logits_to_keep=1))
        agree += int(out.logits[0, -1].argmax() == sparse_out.logits[0, -1].argmax())
        steps.append(out.logits[:, -1:].argmax(-1))
        if number >= 4:
            times["dense"].append(seconds)
            times["sparse"].append(sparse_seconds)
            parts["dense"].append(attention.seconds)
            parts["dense with its cache"].append(attention.seconds + cache.seconds)
            parts["sparse"].append(own.seconds)

    middle = statistics.median
    added = middle(first["index"]) / middle(first["dense"])
    print(f"SmolLM2-135M, {args.dtype}, {args.tokens} tokens, selectivity {args.selectivity}, {torch.get_num_threads()} threads")
    print(
        f"  first token   dense {middle(first['dense']):7.2f} s   attached {middle(first['sparse']):7.2f} s   index {added:6.1%}"
    )
    a, b = middle(times["dense"]), middle(times["sparse"])
    print(f"  decode        dense {1 / a:7.2f} tokens/s   sparse {1 / b:7.2f} tokens/s   {a / b:5.2f}x")
    a, b, c = (1e3 * middle(parts[name]) for name in ("dense", "sparse", "dense with its cache"))
    print(f"  attention     SDPA {a:8.2f} ms/token (its cache besides: {c:8.2f})   sparse {b:7.2f} ms/token   {a / b:5.2f}x")
    print(f"  top-1         {agree} of {args.steps} agree   tokens read {caches['sparse'].tokens_read():.1%}")
    save(args.json, "hf_generate", {
        "tokens": args.tokens, "dtype": args.dtype, "selectivity": args.selectivity, "trained": args.routers is not None,
        "first_token_s": first, "decode_s": times, "attention_s": parts, "agree": agree, "steps": args.steps,
    })  # fmt: skip


if __name__ == "__main__":
    main()
