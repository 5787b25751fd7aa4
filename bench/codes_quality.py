"""What codes of sealed tokens cost a model, and what weighted samples gain it: SmolLM2, every layer replaced, unseen texts, the
routers that come with the package.

    python bench/codes_quality.py --texts 6 --text FILE ... --json bench/results/cpu_codes_quality.json

A prompt is read densely; the tokens behind it are decoded as they stand, from the same keys and values, rounded to bfloat16: KL
from the dense model in float32, agreement of the likeliest token, tokens and bytes read. First with the same tokens for every
storage, once without samples. Then beside the exact best tokens of each KV head in bfloat16, whose search costs nothing: with as
many bytes of chosen tokens, and once more with as many bytes of everything that the index reads, tokens that are not sealed yet,
offset tables and row lists among them, and router weights once for 16 sequences.
Of the same keys and values the errors of the codes alone are measured, beside an 8-bit float (e4m3) with the same scale per token
and head: of keys and values, relative, and of the attention of the last queries over all of them.
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
from saap_index.pipeline.texts import pack_sequences, read_texts
from saap_lab import replace
from saap_lab.method import Layer
from saap_lab.smollm2 import model as demo_model
from saap_lab.smollm2 import texts
from saap_lab.smollm2.shipped import SHIPPED
from saap_lab.yardsticks import Selected

STORAGES: dict[str, dict[str, Any]] = {"bfloat16": {}} | {name: {"storage": name} for name in STORAGE_CODES}
"""Options of `attach` by the name in the table."""

BATCH = 16
"""Sequences that share a read of the router's weights."""

BEST = "best tokens"

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


class Replaced:
    """A model attached with one storage, its cache filled with rows, to be decoded from there more than once."""

    def __init__(self, model: Any, rows: Rows, is_coded: bool) -> None:
        plan, cache = plan_of(model), DynamicCache(config=model.config)
        assert plan is not None
        for layer, (keys, values) in enumerate(rows):
            cache.update(keys.clone(), values.clone(), layer)
        self.model, self.is_coded, self.cache = model, is_coded, adopt(cache, plan, decoder_of(model))
        self.heads, self.row_bytes = rows[0][0].shape[1], sum(x.shape[3] * x.element_size() for x in rows[0])

    @torch.inference_mode()
    def decoded(self, text: Tensor, dense: Tensor, **search: Any) -> dict[str, float]:
        """KL in nats, agreement, share of the tokens and bytes read per token, as the model decodes text (1, q) with these
        parameters of a search; the cache is left as it was."""
        name, n = cache_argument(self.model), text.shape[1]
        self.cache.set_search(saap.SearchParametersIVF(**search))
        same, divergence, read, kv_bytes, all_bytes = 0, 0.0, 0.0, 0.0, 0.0
        for i in range(n):
            logits = self.model(text[:, i : i + 1], **{name: self.cache}, logits_to_keep=1).logits[0, -1].log_softmax(-1)
            same += int(logits.argmax() == dense[i].argmax())
            divergence += kl(dense[i], logits)
            read += self.cache.tokens_read()
            for stats in self.cache.stats().values():
                last = stats.last_search
                # the model is in float32, whose rows hold numbers of bfloat16: those that are no codes have twice the bytes
                tokens = last.dense_tokens + (0 if self.is_coded else last.read_sealed)
                kv = last.kv_bytes - round(tokens * self.heads) * self.row_bytes // 2
                kv_bytes += kv
                all_bytes += kv + last.metadata_bytes + last.router_bytes / BATCH
        self.cache.crop(-n)
        sums = {"kl": divergence, "agreement": same, "read": read, "kv_bytes": kv_bytes, "all_bytes": all_bytes}
        return {what: x / n for what, x in sums.items()}


def kl(dense: Tensor, logits: Tensor) -> float:
    return float((dense.exp() * (dense - logits)).sum())


@torch.inference_mode()
def best_tokens(model: Any, rows: Rows, recorded: Recorded, text: Tensor, dense: Tensor, share: float) -> dict[str, float]:
    """As `Replaced.decoded` with the exact best tokens of each KV head, a share of those outside sinks and window."""
    method, n = Selected("topk_group", share), text.shape[1]
    states = []
    for number, (keys, values) in enumerate(rows):
        (queries, scale), (_, h, length, d) = recorded.layers[number], keys.shape
        state = method.start(Layer(number, h, queries.shape[0] // h, d, values.shape[3], scale, None), length + n)
        state.append(keys[0], values[0])
        states.append(state)
    logits, traffic = replace.decode(model, states, text[0].tolist(), rows[0][0].shape[2])
    logits = logits.log_softmax(-1)
    divergence = sum(kl(dense[i], logits[i]) for i in range(n)) / n
    same = float((logits.argmax(-1) == dense.argmax(-1)).double().mean())
    read = traffic.tokens / (rows[0][0].shape[2] + (n + 1) / 2)
    return {"kl": divergence, "agreement": same, "read": read, "kv_bytes": traffic.kv_bytes, "all_bytes": traffic.kv_bytes}


def selectivity_for(cells: dict[float, dict[str, float]], all_bytes: float) -> float:
    """What reads so many bytes, on the line through what the least and the greatest selectivity read."""
    (low, at_low), (high, at_high) = min(cells.items()), max(cells.items())
    slope = (at_high["all_bytes"] - at_low["all_bytes"]) / (high - low)
    return low + (all_bytes - at_low["all_bytes"]) / slope


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


def measured(model: Any, routers: Any, ids: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """One text ids (1, n)."""
    rows, dense, recorded = read(model, ids, args.forced)
    rows = [(k.bfloat16().float(), v.bfloat16().float()) for k, v in rows]
    text, table = ids[:, -args.forced :], errors(rows, recorded)
    for name, figures in table.items():
        print(f"  {name:9}" + ", ".join(f" error of {what} {x:.4f}" for what, x in figures.items()), flush=True)
    best = {share: best_tokens(model, rows, recorded, text, dense, share) for share in args.best}
    same_tokens: dict[str, dict[str, Any]] = {f"{share:.1%}": {} for share in args.selectivity}
    same_chosen: dict[str, dict[str, Any]] = {f"{share:.1%}": {BEST: figures} for share, figures in best.items()}
    same_bytes = {share: dict(figures) for share, figures in same_chosen.items()}
    (_, _, _, d), (_, _, _, d_v) = rows[0][0].shape, rows[0][1].shape
    for name, options in STORAGES.items():
        attach(model, routers, break_even=2048, **options)
        replaced = Replaced(model, rows, bool(options))
        cells = {share: replaced.decoded(text, dense, selectivity=share) for share in args.selectivity}
        for share, figures in cells.items():
            same_tokens[f"{share:.1%}"][name] = figures
            if not options:
                whole = replaced.decoded(text, dense, selectivity=share, sampled_share=0.0)
                same_tokens[f"{share:.1%}"]["whole runs"] = whole
        for share, figures in best.items():
            size = sum(STORAGE_CODES[name].sizes(d, d_v)) if options else 2 * (d + d_v)
            chosen = replaced.decoded(text, dense, selectivity=share * 2 * (d + d_v) / size)
            same_chosen[f"{share:.1%}"][name] = chosen
            selectivity = selectivity_for(cells, figures["all_bytes"])
            if selectivity > 0:
                same_bytes[f"{share:.1%}"][name] = replaced.decoded(text, dense, selectivity=selectivity)
        detach(model)
    tables = {"same_tokens": same_tokens, "same_chosen_bytes": same_chosen, "same_bytes": same_bytes}
    for title, by_share in tables.items():
        for share, by_name in by_share.items():
            for name, figures in by_name.items():
                numbers = ", ".join(f"{k} {x:.5g}" for k, x in figures.items())
                print(f"  {title}, {share} {name:11} {numbers}", flush=True)
    return {"codes": table, **tables}


def summed_up(texts_measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over texts of KL and agreement, and of the difference in KL from the exact best tokens, pairwise."""
    summary: dict[str, Any] = {}
    for title in ("same_tokens", "same_chosen_bytes", "same_bytes"):
        for share, by_name in texts_measured[0][title].items():
            for name in by_name:
                cells = [row[title][share] for row in texts_measured]
                line = {what: spread([cell[name][what] for cell in cells]) for what in cells[0][name]}
                if title != "same_tokens" and name != BEST:
                    line["kl_less_best"] = spread([cell[name]["kl"] - cell[BEST]["kl"] for cell in cells])
                summary.setdefault(title, {}).setdefault(share, {})[name] = line
    return summary


def spread(values: list[float]) -> list[float]:
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of a text, those that are decoded among them")
    parser.add_argument("--forced", type=int, default=256, help="tokens that are decoded (default %(default)s)")
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--text", type=Path, nargs="+", help="files or folders (default: Python's documentation and code)")
    parser.add_argument("--selectivity", type=float, nargs="+", default=[0.05, 0.1], help="the same tokens for every storage")
    parser.add_argument("--best", type=float, nargs="+", default=[0.025, 0.05], help="share of the exact best tokens")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if len(set(args.selectivity)) < 2:
        parser.error("--selectivity: expected two values or more, from which bytes of others follow")
    torch.set_num_threads(harness.THREADS)
    model, tokenizer = demo_model.load()
    routers = saap.load_routers(SHIPPED)
    documents = read_texts(args.text) if args.text else texts.unseen_texts()
    sequences = pack_sequences(documents, partial(demo_model.encode, tokenizer), args.texts, args.tokens)
    rows_of_table: list[dict[str, Any]] = []
    for text_name, tokens in sequences:
        began = time.perf_counter()
        row = measured(model, routers, torch.tensor([list(tokens)], dtype=torch.int64, device="cpu"), args)
        print(f"{text_name}, {time.perf_counter() - began:.0f} s", flush=True)
        rows_of_table.append({"text": text_name, **row})
        summary = summed_up(rows_of_table)
        figures = {"tokens": args.tokens, "forced": args.forced, "summary": summary, "texts": rows_of_table}
        harness.save(args.json, "codes_quality", figures)
    for title, by_share in summary.items():
        for share, by_name in by_share.items():
            for name, line in by_name.items():
                numbers = ", ".join(f"{what} {mean:.5g} ({deviation:.2g})" for what, (mean, deviation) in line.items())
                print(f"{title}, {share} {name:11} {numbers}")


if __name__ == "__main__":
    main()
