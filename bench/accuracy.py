"""Attention mass captured and output error on SmolLM2, this index against SAAP as published and other selections.

    python bench/capture_smollm2.py FOLDER
    python bench/accuracy.py FOLDER --json results.json

Trains on the training captures, measures on the unseen ones, prints one table per group of layers: every layer, the late ones
(14 and above), the early ones. Mean over everything, standard deviation over the unseen sequences; every method reads the
same number of tokens beside sinks and window, once per KV head.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from saap_index import Rope
from saap_lab.smollm2 import capture
from saap_lab.smollm2.evaluate import Table, evaluate, pooled
from saap_lab.smollm2.training import METHODS, train_index

BASELINES = ("topk_group", "ivf", "quest", "recent", "random")
SHARES = (0.02, 0.05, 0.1, 0.2)
LATE = 14


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--unseen", type=Path, help="folder with the unseen captures, if another")
    parser.add_argument("--training", type=int, default=10**6, help="training sequences to use at most")
    parser.add_argument("--layers", default=",".join(map(str, capture.LAYERS)))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    layers = [int(x) for x in options.layers.split(",")]
    training = sorted(options.folder.glob("training_*.safetensors"))[: options.training]
    unseen = sorted((options.unseen or options.folder).glob("unseen_*.safetensors"))
    rope = Rope(head_dim=64, theta=100000.0)  # SmolLM2's
    table: Table = {}
    for layer in layers:  # a layer at a time: the captures of all of them would be gigabytes
        began = time.perf_counter()
        sequences = [capture.load(path, [layer]) for path in training]
        indexes = {method: {layer: train_index(method, sequences, layer, rope)} for method in METHODS}
        trained = time.perf_counter() - began
        del sequences
        held_out = (capture.load(path, [layer]) for path in unseen)
        table |= evaluate(held_out, indexes, BASELINES, [layer], SHARES)
        took = time.perf_counter() - began - trained
        print(f"layer {layer}: trained in {trained:.0f} s, measured in {took:.0f} s", file=sys.stderr, flush=True)
    averages: dict[str, Any] = {}
    groups = {"all": layers, "late": [x for x in layers if x >= LATE], "early": [x for x in layers if x < LATE]}
    for name, group in {**groups, **{f"layer {x}": [x] for x in layers}}.items():
        if group:
            averages[name] = _print(table, name, group)
    if options.json:
        report = {"training_sequences": len(training), "unseen_sequences": len(unseen), "groups": averages}
        options.json.write_text(json.dumps(report, indent=1))
    return 0


def _print(table: Table, name: str, layers: list[int]) -> dict[str, dict[str, list[float]]]:
    print(f"\n{name} layers {layers}: captured mass outside window and sinks, % (std over sequences) / output error")
    print(f"{'':12}" + "".join(f"{f'{share:.0%}':>22}" for share in SHARES))
    figures: dict[str, dict[str, list[float]]] = {}
    for method in (*METHODS, *BASELINES):
        cells = {share: pooled(table, method, share, layers) for share in SHARES}
        figures[method] = {str(share): list(cell) for share, cell in cells.items()}
        print(f"{method:12}" + "".join(f"{f'{m:5.1f} ({s:3.1f}) / {e:.3f}':>22}" for m, s, e in cells.values()))
    return figures


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    sys.exit(main())
