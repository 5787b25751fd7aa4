"""Selectivity 1 against dense, in full size: greedy tokens of tiny models of every family, at several lengths and batches.

    python bench/hf_equal.py --tokens 2048 4096 8192 --batch 1 3 --new 256

Reading everything, from lists, must give what SDPA gives up to rounding. Where a token differs, the two best logits of the dense
model there are printed with the largest difference between both models' logits: a tie that rounding decided, or a mistake.
Exits with 1 for a mistake.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import harness

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from hf_models import CACHE, FAMILIES, greedy, left_padded, make_routers, prompt, sealed_tokens, tiny

import saap_index as saap


def margin(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """Behind ``ids`` (1, n): how far apart the two best dense logits are, and the largest difference between dense and sparse."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), saap.hf.detached(model):
        dense = model(ids, attention_mask=mask, position_ids=positions).logits[0, -1]
    with torch.no_grad():
        cache = saap.SaapCache(model)
        model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], **{CACHE: cache})
        sparse = model(ids[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], **{CACHE: cache}).logits[0, -1]
    best = dense.topk(2).values
    return float(best[0] - best[1]), float((dense - sparse).abs().max())


def read(path: Path | None, new: int) -> dict[str, Any]:
    """Rows of an earlier run, by family, tokens and batch."""
    before = json.loads(path.read_text()) if path is not None and path.exists() else {}
    rows: dict[str, Any] = before["rows"] if before.get("new") == new else {}
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--family", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--json", type=Path, help="what is there of the same --new is kept and added to, for a run in parts")
    args = parser.parse_args()
    mistakes = 0
    rows = read(args.json, args.new)
    print(f"{'family':10}{'tokens':>8}{'batch':>7}{'sealed':>9}{'same':>12}{'dense':>9}{'sparse':>9}")
    for family in args.family:
        for length in args.tokens:
            for batch in args.batch:
                # Gemma's scaled embeddings, tied and random, would make it say one token for ever
                model = tiny(family, **({"tie_word_embeddings": False} if family == "gemma3" else {}))
                inputs = left_padded(prompt(batch, length, seed=length), [i * length // 7 for i in range(batch)])
                began = time.perf_counter()
                want = greedy(model, inputs, args.new)
                middle = time.perf_counter()
                saap.attach(model, make_routers(model, nlist=64), 1.0, break_even=1024)
                cache = saap.SaapCache(model)
                got = greedy(model, inputs, args.new, **{CACHE: cache})
                seconds = middle - began, time.perf_counter() - middle
                same = int((want == got).long().cumprod(1).sum())
                row = f"{family:10}{length:>8}{batch:>7}{min(sealed_tokens(cache)):>9}{same:>6} of {batch * args.new:<4}"
                print(f"{row}{seconds[0]:>7.1f} s{seconds[1]:>7.1f} s", flush=True)
                ties = []
                for i in range(batch):
                    wrong = (want[i] != got[i]).nonzero()[:, 0]
                    if len(wrong):
                        at = int(wrong[0])
                        ids = torch.cat([inputs["input_ids"][i : i + 1], want[i : i + 1, :at]], 1)
                        mask = torch.cat([inputs["attention_mask"][i : i + 1], torch.ones(1, at, dtype=torch.long)], 1)
                        gap, error = margin(model, ids, mask)
                        mistakes += gap > 4 * error
                        kind = "a mistake" if gap > 4 * error else "a tie"
                        ties.append({"sequence": i, "token": at, "apart": gap, "rounding": error, "is": kind})
                        print(f"  sequence {i}, token {at}: best logits {gap:.2e} apart, rounding {error:.2e}: {kind}")
                rows[f"{family} {length} {batch}"] = {
                    "sealed": min(sealed_tokens(cache)), "same": same, "of": batch * args.new, "distinct": len(want.unique()),
                    "differences": ties,
                }
                harness.save(args.json, "hf_equal", {"new": args.new, "rows": rows})
    return 1 if mistakes else 0


if __name__ == "__main__":
    raise SystemExit(main())
