"""What weighted samples are worth: error of the attention output with and without, the same number of tokens read, on SmolLM2.

    python bench/capture_smollm2.py FOLDER --training 0 --unseen 4      texts that no router was trained on
    python bench/weights.py FOLDER/*.safetensors                        writes bench/results/weights.json

An index in bfloat16 with the shipped routers holds each text up to some thirty of its last 512 positions, one after another, and
answers the query there: relative Euclidean distance of the output from dense attention, mean over query heads and positions. Once
as the routers are calibrated, once with sampled_share=0; with --planned also with the routers' budget shares, which read more of
some heads and less of others. The estimate is the mean of what return_error says, relative likewise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor

from saap_index import SearchParametersIVF
from saap_index.routers import Routers, load_routers
from saap_lab.smollm2 import capture
from saap_lab.smollm2.shipped import SHIPPED

SPAN, STEP = 512, 16
SELECTIVITIES = (0.02, 0.05, 0.1, 0.2)
RESULTS = Path(__file__).parent / "results" / "weights.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+", help="captures, as bench/capture_smollm2.py makes them")
    parser.add_argument("--routers", type=Path, default=SHIPPED, help="default the shipped ones")
    parser.add_argument("--layers", default=",".join(map(str, capture.LAYERS)))
    parser.add_argument("--planned", action="store_true", help="with the routers' budget shares")
    parser.add_argument("--json", type=Path, default=RESULTS, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layers, routers = [int(x) for x in options.layers.split(",")], load_routers(options.routers)
    cells: list[dict[str, Any]] = []
    for path in options.texts:
        for layer in layers:
            cells += [{"text": path.stem, "layer": layer, **cell} for cell in measured(path, layer, routers, options.planned)]
            print(f"{path.stem}, layer {layer}: " + ", ".join(_said(c) for c in cells[-len(SELECTIVITIES) :]), file=sys.stderr)
    summary = summed_up(cells, layers)
    for selectivity, row in summary.items():
        ratios = "  ".join(f"{layer}: {x:.3f}" for layer, x in row["by_layer"].items())
        print(
            f"{float(selectivity):4.0%} of the tokens: error with samples / without {row['ratio']:.3f}  by layer {ratios}  "
            f"(error {row['with']:.4f} / {row['without']:.4f}, estimate {row['estimate']:.4f})"
        )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    texts = [path.stem for path in options.texts]
    report = {"model": "SmolLM2-135M-Instruct", "dtype": "bfloat16", "texts": texts, "planned": options.planned}
    options.json.write_text(json.dumps({**report, "summary": summary, "cells": cells}, indent=1) + "\n")
    return 0


def measured(path: Path, layer: int, routers: Routers, planned: bool) -> list[dict[str, float]]:
    """One layer of one text: errors by selectivity."""
    text = capture.load(path, [layer])
    row, every = text.layers[layer], text.positions.numpy()
    n = row.keys.shape[2]
    wanted = np.arange(n - SPAN, n, STEP) + STEP // 2
    places = [int(np.searchsorted(every, x)) for x in wanted if every[0] <= x <= every[-1]]
    keys, values = row.keys.bfloat16(), row.values.bfloat16()
    index = routers.index(layer, dtype=torch.bfloat16, **({} if planned else {"budget_shares": None}))
    sums: dict[float, np.ndarray] = {share: np.zeros(5) for share in SELECTIVITIES}
    for at in places:
        end, start = int(every[at]) + 1, index.ntotal
        index.add(keys[:, :, start:end], values[:, :, start:end])
        query = row.queries[:, :, at : at + 1].contiguous()
        exact = dense(query, keys[:, :, :end], values[:, :, :end], index.scale)
        for share in SELECTIVITIES:
            params = SearchParametersIVF(selectivity=share)
            out, error = index.search_attend(query, params=params, return_error=True)
            last = index.stats().last_search
            plain = index.search_attend(query, params=SearchParametersIVF(selectivity=share, sampled_share=0.0))
            read = index.stats().last_search.read_sealed
            assert 0 <= read - last.read_sealed <= 1, "both read the same number of tokens"
            length = torch.linalg.vector_norm(exact, dim=-1)
            estimate = float((error / length).mean())
            sums[share] += relative(out, exact), relative(plain, exact), estimate, last.sampled_tokens, last.read_sealed
    names = "with", "without", "estimate", "sampled_tokens", "read_tokens"
    return [{"selectivity": s, **dict(zip(names, (x / len(places)).tolist(), strict=True))} for s, x in sums.items()]


def dense(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attention over all tokens in float32: (1, hq, 1, e)."""
    groups = query.shape[1] // keys.shape[1]
    k, v = (x.float().repeat_interleave(groups, 1) for x in (keys, values))
    return torch.softmax(query @ k.transpose(2, 3) * scale, -1) @ v


def relative(out: Tensor, exact: Tensor) -> float:
    return float((torch.linalg.vector_norm(out - exact, dim=-1) / torch.linalg.vector_norm(exact, dim=-1)).mean())


def summed_up(cells: list[dict[str, Any]], layers: list[int]) -> dict[str, Any]:
    """Over texts: the ratio of the errors by layer, and its mean over layers."""

    def mean(name: str, share: float, layer: int) -> float:
        return float(np.mean([c[name] for c in cells if c["selectivity"] == share and c["layer"] == layer]))

    found = {}
    for share in SELECTIVITIES:
        by_layer = {layer: mean("with", share, layer) / mean("without", share, layer) for layer in layers}
        means = {name: float(np.mean([mean(name, share, layer) for layer in layers])) for name in ("with", "without", "estimate")}
        found[str(share)] = {"ratio": float(np.mean(list(by_layer.values()))), "by_layer": by_layer, **means}
    return found


def _said(cell: dict[str, Any]) -> str:
    return f"{cell['selectivity']:g} {cell['with'] / cell['without']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
