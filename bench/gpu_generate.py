"""Tokens per second of a whole model behind a long context on a GPU: dense, through indexes, and replayed from CUDA graphs.

    python bench/gpu_generate.py                                    # 8 layers of Llama-3.1-8B's shape, 128k tokens, batch 1
    python bench/gpu_generate.py --tokens 32768 --batch 8 --layers 4
    python bench/gpu_generate.py --dry                              # the same code on the emulated device, tiny

The model is a LlamaForCausalLM with random weights and a small vocabulary; its caches hold random keys and values, for a prefill
of that length would say nothing of decoding. Checked before anything is timed: behind the same tokens, replayed steps give the
logits of eager ones, and with selectivity 1 those of dense attention. Whatever decoding does is in the times, sealing too:
steps are timed over as many tokens as seal twice, but for the slow ones.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import gpu_harness as harness
import gpu_step
import saap_index
from saap_index.hf import capture, support
from saap_index.routers import model_shape
from saap_index.search.params import SearchParametersIVF

ROOM = 1024
CHECKED = 12
"""Tokens behind which logits are compared."""


@dataclass(frozen=True)
class Size:
    """Of the model and its context."""

    tokens: int
    batch: int
    layers: int
    shape: gpu_step.Shape
    hidden: int = 4096
    intermediate: int = 14336
    vocabulary: int = 1024
    timed: int = 288
    slow: int = 12
    small: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> LlamaConfig:
        s = self.shape
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.d,
            max_position_embeddings=4 * self.tokens + 4 * ROOM, bos_token_id=1, eos_token_id=None, pad_token_id=0,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )


TINY = Size(
    90, 1, 2, gpu_step.Shape(heads=4, kv_heads=2, d=32, nlist=8, units=16, knots=3, dtype=torch.float32), 64, 96, 64, 10, 3,
    {"window": 8, "seal_tokens": 4, "sinks": 2, "max_segment": 64, "break_even": 0},
)


def make_model(device: harness.Device, size: Size) -> Any:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.shape.dtype)
    try:
        with device.device:
            model = LlamaForCausalLM(size.config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return model


def make_routers(device: harness.Device, model: Any, size: Size) -> saap_index.Routers:
    """A router of trained size for each layer, around k-means lists of random keys."""
    s = size.shape
    g = torch.Generator(device.device).manual_seed(1)
    keys = torch.randn((s.kv_heads, 64 * s.nlist, s.d), generator=g, device=device.device, dtype=torch.float32)
    quantizer = saap_index.KeyQuantizer.of_prompt(keys, s.nlist)
    made = {}
    for layer in range(size.layers):
        rope = saap_index.Rope.from_config(model.config, layer=layer)
        router = gpu_step.router(device, s, gpu_step.ROUTERS["peaked"], layer)
        made[layer] = saap_index.LayerRouters(quantizer, router, rope, rope, s.d**-0.5, None)
    return saap_index.Routers({"model": model_shape(model.config)}, made)


def random_layers(device: harness.Device, size: Size) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values (b, h, n, d) of each layer, the same at every call."""
    s = size.shape
    for layer in range(size.layers):
        g = torch.Generator(device.device).manual_seed(100 + layer)
        shape = size.batch, s.kv_heads, size.tokens, s.d
        yield tuple(torch.randn(shape, generator=g, device=device.device, dtype=s.dtype) for _ in range(2))  # type: ignore[misc]


def indexed(device: harness.Device, size: Size, model: Any, share: float | None = None) -> Any:
    """A cache of indexes over the context."""
    cache = saap_index.SaapCache(model, max_tokens=size.tokens + ROOM)
    for layer, (keys, values) in zip(cache.layers, random_layers(device, size), strict=True):
        layer.adopt(keys, values)
    cache.set_search(None if share is None else SearchParametersIVF(selectivity=share))
    return cache


def dense(device: harness.Device, size: Size, model: Any, static: bool) -> Any:
    """A cache of transformers over the context."""
    if static:
        cache: Any = StaticCache(config=model.config, max_cache_len=size.tokens + 64)
    else:
        cache = DynamicCache(config=model.config)
    for number, (keys, values) in enumerate(random_layers(device, size)):
        cache.update(keys, values, number)
    return cache


@torch.no_grad()
def decode(model: Any, cache: Any, tokens: Tensor, begin: int, logits: list[Tensor]) -> None:
    """Steps with the tokens given, (b, n), at the positions from ``begin`` on; their logits (b, vocabulary) go to ``logits``."""
    name = support.cache_argument(model)
    for number in range(tokens.shape[1]):
        step = tokens[:, number : number + 1]
        position = torch.full((tokens.shape[0], 1), begin + number, dtype=torch.int64, device=tokens.device)
        out = model(step, position_ids=position, use_cache=True, **{name: cache}).logits[:, -1]
        logits.append(out.float())


@torch.no_grad()
def greedy(model: Any, cache: Any, first: Tensor, begin: int, count: int) -> None:
    """``count`` steps, each with the likeliest token of the one before; nothing waits for the device."""
    name, step = support.cache_argument(model), first
    for number in range(count):
        position = torch.full((first.shape[0], 1), begin + number, dtype=torch.int64, device=first.device)
        step = model(step, position_ids=position, use_cache=True, **{name: cache}).logits[:, -1:].argmax(-1)


def compare(name: str, got: list[Tensor], want: list[Tensor], tolerance: float, wrong: list[str]) -> dict[str, Any]:
    """Largest difference of the logits, in their deviations, and in how many places the likeliest token is the same."""
    a, b = torch.stack(got), torch.stack(want)
    error = float((a - b).abs().max() / b.std())
    same = int((a.argmax(-1) == b.argmax(-1)).sum())
    if not error <= tolerance:
        wrong.append(f"{name}: expected logits within {tolerance} deviations, got {error:.3g}")
    return {"name": name, "error": error, "same": same, "of": b.shape[0] * b.shape[1]}


class Bench:
    """One size: what is checked and timed."""

    def __init__(self, device: harness.Device, size: Size, budget: float) -> None:
        self.device, self.size, self.budget, self.began = device, size, budget, time.perf_counter()
        self.checks: list[dict[str, Any]] = []
        self.figures: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.skipped: list[str] = []
        self.model = make_model(device, size)
        self.routers = make_routers(device, self.model, size)
        self.options = {"backend": device.backend} if device.backend else {}
        self.tokens = torch.randint(3, size.vocabulary, (size.batch, CHECKED), device=device.device)

    def attach(self, graphs: bool) -> None:
        options = {"break_even": 2048, **self.size.small, **self.options}
        saap_index.attach(self.model, self.routers, 0.05, cuda_graphs=graphs, **options)

    def logits(self, cache: Any) -> list[Tensor]:
        logits: list[Tensor] = []
        decode(self.model, cache, self.tokens, self.size.tokens, logits)
        return logits

    def time(self, name: str, cache: Any, count: int) -> None:
        """Seconds of a step, after those that a cache needs to get going."""
        size, warm = self.size, 4
        before = cache.get_seq_length() if not isinstance(cache, StaticCache) else size.tokens + CHECKED
        greedy(self.model, cache, self.tokens[:, :1], int(before), warm)
        self.device.release()
        began = time.perf_counter()
        greedy(self.model, cache, self.tokens[:, :1], int(before) + warm, count)
        self.device.release()
        seconds = (time.perf_counter() - began) / count
        self.figures.append({"name": name, "ms": seconds * 1e3, "tokens_s": size.batch / seconds, "steps": count})

    def late(self, what: str) -> bool:
        if time.perf_counter() - self.began > self.budget:
            self.skipped.append(what)
            return True
        return False

    def run(self) -> None:
        size, tolerance = self.size, 0.05 if self.size.shape.dtype is torch.float32 else 0.25
        cache = dense(self.device, size, self.model, static=False)
        want = self.logits(cache)
        self.time("dense, DynamicCache", cache, size.slow)
        del cache
        self.device.release()
        self.attach(graphs=False)
        cache = indexed(self.device, size, self.model)
        eager = self.logits(cache)
        self.time("ours 5 %, eager", cache, max(size.slow, size.timed // 4))
        del cache
        saap_index.detach(self.model)
        self.attach(graphs=True)
        cache = indexed(self.device, size, self.model)
        graphed = self.logits(cache)
        graph = self.model.model.forward.graph_of(cache)
        if graph is None or graph.replays < CHECKED - 2:
            self.wrong.append("ours 5 %, graphs: expected steps that are replayed, got eager ones")
        self.checks.append(compare("graphs against eager, 5 %", graphed, eager, tolerance, self.wrong))
        self.time("ours 5 %, graphs", cache, size.timed)
        self.generate(cache)
        del cache
        self.device.release()
        if not self.late("selectivity 1"):
            cache = indexed(self.device, size, self.model, 1.0)
            self.checks.append(compare("selectivity 1 against dense", self.logits(cache), want, tolerance, self.wrong))
            self.time("ours 100 %, graphs", cache, size.timed // 4)
            del cache
        saap_index.detach(self.model)
        self.device.release()
        if not self.late("dense, StaticCache"):
            try:
                self.time("dense, StaticCache", dense(self.device, size, self.model, static=True), size.slow)
            except Exception as error:  # a baseline that this version of transformers fills another way
                self.skipped.append(f"dense, StaticCache ({type(error).__name__}: {error})")

    def generate(self, cache: Any) -> None:
        """The same cache under `generate`, greedy, with all that it does between two steps."""
        size, n = self.size, cache.get_seq_length()
        ids = torch.randint(3, size.vocabulary, (size.batch, n + 1), device=self.device.device)
        options = {"do_sample": False, "attention_mask": torch.ones_like(ids), support.cache_argument(self.model): cache}
        began = time.perf_counter()
        new = self.model.generate(ids, max_new_tokens=size.timed // 2, **options).shape[1] - ids.shape[1]
        self.device.release()
        seconds = (time.perf_counter() - began) / new
        self.figures.append({
            "name": "ours 5 %, graphs, generate()", "ms": seconds * 1e3, "tokens_s": size.batch / seconds, "steps": new,
        })

    def table(self) -> str:
        size = self.size
        title = f"{self.device.name}: {size.layers} layers, {size.tokens} tokens x {size.batch}, sealing included"
        lines = [[x["name"], f"{x['ms']:.2f}", f"{x['tokens_s']:.1f}", str(x["steps"])] for x in self.figures]
        same = "likeliest token the same"
        checks = [f"{x['name']}: error {x['error']:.2g} deviations, {same} {x['same']} of {x['of']}" for x in self.checks]
        ends = [f"WRONG {x}" for x in self.wrong] + [f"left out: {x}" for x in self.skipped]
        return "\n".join([title, harness.rows(["", "ms a step", "tokens/s", "steps"], lines), *checks, *ends])


def emulate(device: Any) -> None:
    """Graphs of the emulated device."""

    def record(where: torch.device, step: Callable[[], None]) -> Callable[[], None]:
        with device.runtime.capture(whole=True) as graph:
            step()
        return graph.replay  # type: ignore[no-any-return]

    def emulated(device: torch.device) -> capture.Capture | None:
        return record

    capture.capture_on = emulated


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.set_defaults(budget=75.0)
    args = parser.parse_args()
    device: harness.Device = harness.Dry() if args.dry else harness.Cuda()
    if args.dry:
        emulate(device)
    size = TINY if args.dry else Size(args.tokens, args.batch, args.layers, gpu_step.Shape())
    bench = Bench(device, size, args.budget)
    bench.run()
    report = {"environment": harness.environment(device), "figures": bench.figures, "checks": bench.checks, "wrong": bench.wrong}
    harness.save(args.out, "gpu_generate", {**report, "skipped": bench.skipped}, bench.table())
    return int(bool(bench.wrong))


if __name__ == "__main__":
    sys.exit(main())
