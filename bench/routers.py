"""Every router with every partition on SmolLM2: attention captured at 5 % on unseen sequences, and what training costs.

    python bench/capture_smollm2.py FOLDER
    python bench/routers.py FOLDER --unseen OTHER_FOLDER --json results.json

Trains on the training captures of FOLDER, measures on its unseen ones and on those of --unseen, if given, by the protocol of
bench/accuracy.py: sinks and window are read by everyone, one selection per KV head. Lists of a prompt's own are made from what
precedes the first query. A figure that is in the JSON file already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from saap_index import Layout, Rope, TwoTower
from saap_index.routing.trained import TrainedLayer
from saap_index.training.config import TrainingConfig
from saap_index.training.layer import TrainingSequence, train_layer
from saap_index.training.measure import SHARES, Measured, measure
from saap_lab.smollm2 import capture
from saap_lab.smollm2.capture import Capture

ROPE, LAYOUT, SCALE = Rope(head_dim=64, theta=100000.0), Layout(), 64**-0.5
LATE = 14
CASES = [
    ("kmeans", "pre-rope"), ("kmeans", "post-rope"), ("kmeans", "per-prompt"), ("linear", "pre-rope"), ("mlp", "pre-rope"),
    ("mlp-distance", "pre-rope"), ("mlp-distance", "post-rope"), ("two-tower", "pre-rope"), ("two-tower", "post-rope"),
    ("two-tower", "per-prompt"),
]


def train(router: str, partition: str, sequences: list[TrainingSequence], nlist: int) -> TrainedLayer:
    rope = None if partition == "post-rope" else ROPE
    given = [(keys, None, None) for keys, _, _ in sequences] if router == "kmeans" else sequences
    found = train_layer(given, nlist, rope, LAYOUT, SCALE, TrainingConfig.named(router))
    if partition != "per-prompt":
        return replace(found, tower=None)
    return replace(found, tower=TwoTower.symmetric(3, 64)) if found.tower is None else found


def score(trained: TrainedLayer, partition: str, unseen: list[Capture], layer: int, nlist: int) -> list[Measured]:
    rope, found = None if partition == "post-rope" else ROPE, []
    for sequence in unseen:
        row, positions = sequence.layers[layer], sequence.positions.numpy()
        keys, values, queries = row.keys[0], row.values[0], row.queries[0].view(3, 3, -1, 64)
        coarse, routed = keys, queries
        if rope is not None:
            coarse, routed = rope.unrotate(keys, range(keys.shape[1])), rope.unrotate(queries, positions)
        quantizer, router = trained.quantizer, trained.router
        if trained.tower is not None:
            quantizer, router = trained.tower.for_prompt(coarse[:, : int(positions.min())], nlist)
        found.append(measure(keys, values, queries, routed, positions, quantizer.assign(coarse), router, LAYOUT, SCALE))
    return found


def figures(measured: list[Measured]) -> dict[str, list[float]]:
    """Sums, so that layers can be pooled: attention captured and outside per sequence, and the mean output error."""
    at = SHARES.index(0.05)
    return {
        "captured": [float(m.captured[:, at].sum()) for m in measured],
        "outside": [float(m.outside.sum()) for m in measured],
        "error": [float(m.error[:, at].sum() / m.queries / 3) for m in measured],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--unseen", type=Path, help="folder with unseen captures of another kind")
    parser.add_argument("--layers", default=",".join(map(str, capture.LAYERS)))
    parser.add_argument("--nlist", type=int, default=256)
    parser.add_argument("--json", type=Path, required=True, help="figures so far; is read and added to")
    options = parser.parse_args()
    layers = [int(x) for x in options.layers.split(",")]
    sets = {"unseen": options.folder} | ({"other": options.unseen} if options.unseen else {})
    known = json.loads(options.json.read_text()) if options.json.exists() else {}
    for layer in layers:
        wanted = [case for case in CASES if f"{layer} {' '.join(case)}" not in known]
        if not wanted:
            continue
        captures = [capture.load(path, [layer]) for path in sorted(options.folder.glob("training_*.safetensors"))]
        sequences: list[TrainingSequence] = [
            (c.layers[layer].keys[0], c.layers[layer].queries[0], c.positions.numpy()) for c in captures
        ]
        unseen = {
            name: [capture.load(p, [layer]) for p in sorted(path.glob("unseen_*.safetensors"))] for name, path in sets.items()
        }
        for router, partition in wanted:
            began = time.process_time()
            trained = train(router, partition, sequences, options.nlist)
            row: dict[str, object] = {"cpu_s": time.process_time() - began}
            for name, some in unseen.items():
                row[name] = figures(score(trained, partition, some, layer, options.nlist))
            known[f"{layer} {router} {partition}"] = row
            options.json.write_text(json.dumps(known, indent=1))
            print(f"layer {layer}: {router}, {partition}: {row['cpu_s']:.0f} CPU seconds", file=sys.stderr, flush=True)
    show(known, layers, list(sets))
    return 0


def show(known: dict[str, dict], layers: list[int], sets: list[str]) -> None:
    groups = {"all": layers, "late": [x for x in layers if x >= LATE]}
    print(f"\nattention captured outside sinks and window at 5 %, in % (std over sequences) / output error; layers {layers}")
    print(f"{'router':14}{'partition':12}" + "".join(f"{f'{s}, {g}':>22}" for s in sets for g in groups) + f"{'CPU s/layer':>13}")
    for router, partition in CASES:
        cells = []
        for name in sets:
            for group in groups.values():
                rows = [known[f"{layer} {router} {partition}"][name] for layer in group]
                captured, outside = (np.array([row[part] for row in rows]).sum(0) for part in ("captured", "outside"))
                error = np.mean([np.mean(row["error"]) for row in rows])
                each = 100 * captured / outside
                cells.append(f"{100 * captured.sum() / outside.sum():5.1f} ({each.std(ddof=1):3.1f}) / {error:.3f}")
        cost = np.mean([known[f"{layer} {router} {partition}"]["cpu_s"] for layer in layers])
        print(f"{router:14}{partition:12}" + "".join(f"{cell:>22}" for cell in cells) + f"{cost:13.0f}")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    sys.exit(main())
