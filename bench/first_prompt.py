"""Routers from a prompt itself, on SmolLM2 and text that nothing was trained on: what they take, and what they are worth.

    python bench/first_prompt.py                              topics, source and docstrings of Python
    python bench/first_prompt.py --text novel.txt mails.txt   more kinds, each a file
    python bench/first_prompt.py --layers 6 --kinds source    a model cut to its first layers, to see that it runs

Each text is a prompt, read by a model that is attached to without routers, and --steps tokens behind it, which are decoded one
by one as they stand: KL of the next token's distribution from dense attention, in nats, and in five layers the attention captured
outside sinks and window, in percent, of the same budget in each. The same with the routers that come with the package. KL is with
the budget spread over layers and heads as the routers' plan has it; even_kl, with the same budget everywhere. Routers of one text
are kept for the next, which is read with them as they are, and again once they are refined. CPU seconds are of all threads.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

import harness
import saap_index as saap
from saap_index.hf import detached
from saap_index.hf.cache import adopt, plan_of
from saap_index.hf.support import cache_argument
from saap_index.invlists.layout import Layout
from saap_index.routing.trained import TrainedLayer
from saap_index.training.measure import SHARES, measure
from saap_lab.smollm2 import model as smollm2
from saap_lab.smollm2 import texts
from saap_lab.smollm2.capture import LAYERS
from saap_lab.smollm2.shipped import SHIPPED

SELECTIVITY = 0.05
AT = SHARES.index(SELECTIVITY)


def documents(kinds: list[str], paths: list[Path]) -> dict[str, str]:
    """Text of each kind; that of Python is of topics and modules that the shipped routers have not seen."""
    found: dict[str, str] = {}
    for name, text in texts.unseen_texts():
        kind = name.partition(":")[0]
        if kind in kinds:
            found[kind] = found.get(kind, "") + "\n\n" + text
    return found | {path.name: path.read_text(encoding="utf-8", errors="replace") for path in paths}


class Recorded:
    """Queries and keys of some layers in one dense call: by layer, (hq, q, d) and (h, n, d), values (h, n, e)."""

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers
        self.queries: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def keep(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        if layer in self.layers:
            self.queries[layer], self.keys[layer], self.values[layer] = query[0].clone(), key[0].clone(), value[0].clone()


def captured(recorded: Recorded, trained: dict[int, TrainedLayer], prompt: int) -> float:
    """Attention outside sinks and window that 5 % of the tokens hold, in percent: a mean over layers, lists of the prompt."""
    shares = []
    for layer, queries in recorded.queries.items():
        keys, values, mine = recorded.keys[layer], recorded.values[layer], trained[layer]
        h, n, d = keys.shape
        places = np.arange(prompt, n, max(1, (n - prompt) // 16))
        grouped = queries[:, places - prompt].reshape(h, -1, len(places), d)
        assert mine.rope is not None and mine.tower is not None
        coarse, routed = mine.rope.unrotate(keys, np.arange(n), n), mine.rope.unrotate(grouped, places, n)
        quantizer, router = mine.tower.for_prompt(coarse[:, :prompt], mine.quantizer.nlist)
        lists = quantizer.assign(coarse)
        measured = measure(keys, values, grouped, routed, places, lists, router, Layout(), mine.scale)
        shares.append(100 * measured.captured[:, AT].sum() / measured.outside.sum())
    return float(np.mean(shares))


def divergence(model: Any, cache: Any, tokens: Tensor, dense: Tensor) -> float:
    """Mean KL, in nats, of what a model says behind each token, decoded one by one through ``cache``, from the dense logits."""
    name, total = cache_argument(model), 0.0
    with torch.no_grad():
        for i in range(tokens.shape[1]):
            logits = model(tokens[:, i : i + 1], **{name: cache}).logits[0, -1]
            want = torch.log_softmax(dense[i].double(), -1)
            total += float((want.exp() * (want - torch.log_softmax(logits.double(), -1))).sum())
    return total / tokens.shape[1]


Rows = list[tuple[Tensor, Tensor]]
"""Keys and values of every layer, (1, h, n, d)."""


def dense_continuation(model: Any, rows: Rows, tokens: Tensor, layers: list[int]) -> tuple[Tensor, Recorded]:
    """Logits (q, v) of the model alone behind each of the tokens, and what its attention was given."""
    from saap_index.pipeline import capture

    recorded = Recorded(layers)
    with torch.no_grad(), capture.recording(model, recorded.keep):
        logits = model(tokens, **{cache_argument(model): filled(rows)}).logits[0]
    return logits, recorded


def filled(rows: Rows) -> DynamicCache:
    cache = DynamicCache()
    for number, (keys, values) in enumerate(rows):
        cache.update(keys.clone(), values.clone(), number)
    return cache


@dataclass
class Read:
    """A prompt as a model that learns has read it. samples : of its queries, by layer; dense : logits of the model alone behind
    it; recorded : what attention saw there."""

    rows: Rows
    samples: dict[int, Any]
    behind: Tensor
    dense: Tensor
    recorded: Recorded
    prompt: int


def read(model: Any, ids: Tensor, prompt: int) -> tuple[Read, float]:
    """Also the CPU seconds of the prefill."""
    name, cache = cache_argument(model), saap.SaapCache(model)
    began = time.process_time()
    with torch.no_grad():
        model.get_decoder()(ids[:, :prompt], use_cache=True, **{name: cache})
    seconds = time.process_time() - began
    rows = [tuple(x.clone() for x in layer._rows()) for layer in cache.indexed.values()]
    samples = {number: layer.sample for number, layer in cache.indexed.items()}
    with detached(model):
        dense, recorded = dense_continuation(model, rows, ids[:, prompt:], [n for n in LAYERS if n < len(rows)])
    return Read(rows, samples, ids[:, prompt:], dense, recorded, prompt), seconds


def learnt(model: Any, seen: Read) -> dict[str, float]:
    """What a prompt is worth to a model that is attached to, before it learns from it, if there are routers, and after."""
    plan, row = plan_of(model), {}
    assert plan is not None and plan.learner is not None
    learner = plan.learner

    def routers() -> dict[int, TrainedLayer]:
        return {n: layer.trained for n, layer in learner.plan.layers.items()}

    def cache() -> Any:
        return adopt(filled(seen.rows), learner.plan, model.get_decoder())

    if learner.prompts:
        row["kept_captured"] = captured(seen.recorded, routers(), seen.prompt)
        row["kept_kl"] = divergence(model, cache(), seen.behind, seen.dense)
    taught = cache()
    for number, layer in taught.indexed.items():
        layer.sample = seen.samples[number]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, wall = time.process_time(), time.perf_counter()
    learner.finish(taught)
    row |= {"fit_cpu_s": time.process_time() - began, "fit_wall_s": time.perf_counter() - wall}
    row["fit_peak_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) / 1024
    row["captured"] = captured(seen.recorded, routers(), seen.prompt)
    row["kl"] = divergence(model, taught, seen.behind, seen.dense)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["topics", "source", "prose"]
    parser.add_argument("--kinds", nargs="*", default=kinds, help="of Python's text (default %(default)s)")
    parser.add_argument("--text", nargs="*", type=Path, default=[], help="files, each a kind")
    parser.add_argument("--tokens", type=int, default=8192, help="of prompt and continuation (default %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="of the continuation (default %(default)s)")
    parser.add_argument("--layers", type=int, help="cut the model to its first layers")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = smollm2.load()
    shipped = saap.load_routers(SHIPPED)
    if args.layers:
        model.model.layers = model.model.layers[: args.layers]
        model.config.num_hidden_layers = args.layers
        shipped = saap.Routers(
            {**shipped.config, "model": {**shipped.config["model"], "num_hidden_layers": args.layers}},
            {n: layer for n, layer in shipped.layers.items() if n < args.layers},
        )
    options = saap.PromptTraining(progress=sys.stderr.isatty(), prompts=9, max_seconds=1e5)
    found = documents(args.kinds, args.text)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        last: Path | None = None
        for number, (kind, text) in enumerate(found.items()):
            ids = torch.tensor([smollm2.encode(tokenizer, text[: 12 * args.tokens])[: args.tokens]], dtype=torch.int64)
            if ids.shape[1] < args.tokens:
                print(f"{kind}: {ids.shape[1]} tokens, {args.tokens} are needed", file=sys.stderr)
                continue
            home = Path(folder) / str(number)
            os.environ["SAAP_CACHE"] = str(home)
            saap.attach(model, selectivity=SELECTIVITY, train=options, break_even=2048)
            seen, seconds = read(model, ids, args.tokens - args.steps)
            row = {"kind": kind, "prefill_cpu_s": seconds, **learnt(model, seen)}
            attached = plan_of(model)
            assert attached is not None
            own = attached.learner.routers()
            saap.detach(model)
            # the same budget in every layer, and as the package's routers have it by their plan
            even: dict[str, Any] = {"budget_shares": None}
            for name, routers, shares in (("even", own, even), ("shipped_even", shipped, even), ("shipped", shipped, {})):
                saap.attach(model, routers, SELECTIVITY, break_even=2048, **shares)
                row[f"{name}_kl"] = divergence(model, filled(seen.rows), seen.behind, seen.dense)
                saap.detach(model)
            row["shipped_captured"] = captured(seen.recorded, dict(shipped.layers), seen.prompt)
            if last is not None:
                os.environ["SAAP_CACHE"] = str(shutil.copytree(last, Path(folder) / f"{number}-after"))
                saap.attach(model, selectivity=SELECTIVITY, train=options, break_even=2048)
                row |= {f"after_other_{name}": x for name, x in learnt(model, seen).items()}
                saap.detach(model)
            rows.append(row)
            last = home
            print("\n".join(f"  {n:28} {x:.4f}" if isinstance(x, float) else f"{x}" for n, x in row.items()), flush=True)
    harness.save(args.json, "first_prompt", {"threads": args.threads, "tokens": args.tokens, "rows": rows})


if __name__ == "__main__":
    main()
