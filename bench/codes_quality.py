"""What codes of sealed tokens cost a model, and what weighted samples gain it: SmolLM2, every layer replaced, unseen texts, the
routers that come with the package.

    python bench/codes_quality.py --texts 1 --json bench/results/cpu_codes_quality.json

A prompt is read densely; the tokens behind it are decoded as they stand, once for every selectivity and storage, and once without
samples, from the same keys and values, rounded to bfloat16: KL from the dense model in float32, agreement of the likeliest token,
tokens and bytes read. Of the same keys and values the errors of the codes alone are measured, beside an 8-bit float (e4m3) with
the same scale per token and head: of keys and values, relative, and of the attention of the last queries over all of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor
from transformers import DynamicCache

import harness
import saap_index as saap
from saap_index.backends import STORAGE_CODES
from saap_index.backends.scalar_quantizer import decode, encode
from saap_index.hf import attach, detach
from saap_index.hf.cache import adopt, plan_of
from saap_index.hf.support import cache_argument, decoder_of
from saap_index.pipeline.capture import recording
from saap_index.pipeline.texts import pack_sequences
from saap_lab.smollm2 import model as demo_model
from saap_lab.smollm2 import texts
from saap_lab.smollm2.shipped import SHIPPED

ARMS: dict[str, dict[str, Any]] = {"whole runs": {"sampled_share": 0.0}, "bfloat16": {}}
ARMS |= {name: {"storage": name} for name in STORAGE_CODES}
"""Options of `attach` by the name in the table; all but the first sample as the routers are calibrated."""

E4M3_LARGEST = 448.0

Rows = list[tuple[Tensor, Tensor]]
"""Keys and values of every layer, (1, h, n, d)."""


class Recorded:
    """The queries (hq, q, d) and the logit scale of every layer in one dense call."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, float]] = {}

    def keep(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        self.layers[layer] = query[0].clone(), scale


@torch.inference_mode()
def read(model: Any, ids: Tensor, forced: int) -> tuple[Rows, Tensor, Recorded]:
    """Of a text ids (1, n): the rows of all but its last tokens, what the dense model says behind each of those, its queries."""
    name, cache, recorded = cache_argument(model), DynamicCache(config=model.config), Recorded()
    model(ids[:, :-forced], **{name: cache}, logits_to_keep=1)
    rows: Rows = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]  # type: ignore[union-attr]
    with recording(model, recorded.keep):
        dense = model(ids[:, -forced:], **{name: cache}).logits[0].log_softmax(-1)
    return rows, dense, recorded


@torch.inference_mode()
def decoded(model: Any, rows: Rows, text: Tensor, dense: Tensor, is_coded: bool) -> dict[str, float]:
    """KL in nats, agreement, and share of the tokens and bytes read per token, as the attached model decodes text (1, q)."""
    plan, name, cache = plan_of(model), cache_argument(model), DynamicCache(config=model.config)
    assert plan is not None
    for layer, (keys, values) in enumerate(rows):
        cache.update(keys.clone(), values.clone(), layer)
    indexed = adopt(cache, plan, decoder_of(model))
    heads, row_bytes = rows[0][0].shape[1], sum(x.shape[3] * x.element_size() for x in rows[0])
    same, divergence, read, kv_bytes, all_bytes = 0, 0.0, 0.0, 0, 0
    for i in range(text.shape[1]):
        logits = model(text[:, i : i + 1], **{name: indexed}, logits_to_keep=1).logits[0, -1].log_softmax(-1)
        same += int(logits.argmax() == dense[i].argmax())
        divergence += float((dense[i].exp() * (dense[i] - logits)).sum())
        read += indexed.tokens_read()
        for stats in indexed.stats().values():
            search = stats.last_search
            # the model is in float32, whose rows hold numbers of bfloat16: those that are no codes have twice the bytes
            tokens = search.dense_tokens + (0 if is_coded else search.read_sealed)
            twice = round(tokens * heads) * row_bytes // 2
            kv_bytes += search.kv_bytes - twice
            all_bytes += search.total_bytes - twice
    n = text.shape[1]
    return {
        "kl": divergence / n, "agreement": same / n, "read": read / n, "kv_bytes": kv_bytes / n, "all_bytes": all_bytes / n,
    }


def rounded_e4m3(x: Tensor) -> Tensor:
    """Rows x : float32 (..., dim) by way of 8-bit floats, the largest number of a row their largest."""
    scale = x.abs().amax(-1, keepdim=True) / E4M3_LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def coded(x: Tensor, bits: int) -> Tensor:
    return decode(encode(x, bits), x.shape[-1], bits)


CODES: dict[str, Callable[[Tensor], Tensor]] = {
    "8 bits": partial(coded, bits=8),
    "e4m3": rounded_e4m3,
    "4 bits": partial(coded, bits=4),
}


def attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    h = keys.shape[0]
    grouped = queries.reshape(h, -1, queries.shape[-1])
    return ((grouped @ keys.transpose(1, 2)) * scale).softmax(-1) @ values


def relative(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())


@torch.inference_mode()
def errors(rows: Rows, recorded: Recorded) -> dict[str, dict[str, float]]:
    """By code, means over layers: relative error of keys and of values, and of attention with it in one, the other or both."""
    found: dict[str, dict[str, list[float]]] = {}
    for layer, (queries, scale) in recorded.layers.items():
        keys, values = (x[0].float() for x in rows[layer])
        queries = queries[:, ::16]
        exact = attention(queries, keys, values, scale)
        for name, code in CODES.items():
            k, v = code(keys), code(values)
            figures = {
                "keys": relative(k, keys),
                "values": relative(v, values),
                "output_keys": relative(attention(queries, k, values, scale), exact),
                "output_values": relative(attention(queries, keys, v, scale), exact),
                "output": relative(attention(queries, k, v, scale), exact),
            }
            for what, x in figures.items():
                found.setdefault(name, {}).setdefault(what, []).append(x)
    return {name: {what: statistics.mean(x) for what, x in table.items()} for name, table in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of a text, those that are decoded among them")
    parser.add_argument("--forced", type=int, default=256, help="tokens that are decoded (default %(default)s)")
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--selectivity", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(harness.THREADS)
    model, tokenizer = demo_model.load()
    routers = saap.load_routers(SHIPPED)
    sequences = pack_sequences(texts.unseen_texts(), partial(demo_model.encode, tokenizer), args.texts, args.tokens)
    rows_of_table: list[dict[str, Any]] = []
    for text_name, tokens in sequences:
        began = time.perf_counter()
        ids = torch.tensor([list(tokens)], dtype=torch.int64)
        rows, dense, recorded = read(model, ids, args.forced)
        rows = [(k.bfloat16().float(), v.bfloat16().float()) for k, v in rows]
        row: dict[str, Any] = {"text": text_name, "codes": errors(rows, recorded), "decoded": {}}
        print(f"{text_name}, read in {time.perf_counter() - began:.0f} s", flush=True)
        for name, figures in row["codes"].items():
            print(f"  {name:9}" + ", ".join(f" error of {what} {x:.4f}" for what, x in figures.items()), flush=True)
        for share in args.selectivity:
            for name, options in ARMS.items():
                attach(model, routers, share, break_even=2048, **options)
                figures = decoded(model, rows, ids[:, -args.forced :], dense, "storage" in options)
                detach(model)
                row["decoded"].setdefault(f"{share:.1%}", {})[name] = figures
                print(f"  {share:.1%} {name:10}" + ", ".join(f" {k} {x:.5g}" for k, x in figures.items()), flush=True)
        rows_of_table.append(row)
        harness.save(args.json, "codes_quality", {"tokens": args.tokens, "forced": args.forced, "texts": rows_of_table})


if __name__ == "__main__":
    main()
