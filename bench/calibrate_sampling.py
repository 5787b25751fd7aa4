"""The metric of the lists of SmolLM2's shipped routers, and what these sample, measured anew on texts held out of their training:
nothing is trained.

    python bench/calibrate_sampling.py FOLDER                   captures of four texts are kept in FOLDER, 1.5 GB
    python bench/calibrate_sampling.py FOLDER --out ROUTERS     where the routers go, by default over the shipped ones
    python bench/calibrate_sampling.py FOLDER --only transform  the metric alone, seconds once the captures are there

Takes about eight minutes of two cores. The texts are those that `python -m saap_lab.smollm2.routers` holds out of training.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from saap_index.pipeline import texts
from saap_index.pipeline.capture import Capture, LayerCapture
from saap_index.pipeline.sampling import with_sampling, with_transforms
from saap_index.pipeline.settings import TrainSettings
from saap_index.routers import load_routers, save_routers
from saap_lab.smollm2 import capture, model
from saap_lab.smollm2.shipped import SHIPPED
from saap_lab.smollm2.varied import varied_texts

QUERIES = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=SHIPPED, help="default the shipped ones")
    parser.add_argument("--only", choices=("transform", "sampling"), help="leave the other as it is")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = TrainSettings()
    paths = {number: options.folder / f"heldout_{number:03d}.safetensors" for number in settings.held_out_numbers}
    if not all(path.exists() for path in paths.values()):
        smollm2, tokenizer = model.load()
        encode = partial(model.encode, tokenizer)
        sequences = texts.pack_sequences(varied_texts(), encode, settings.sequences, settings.context)
        options.folder.mkdir(parents=True, exist_ok=True)
        for number, path in paths.items():
            if not path.exists():
                name, tokens = sequences[number]
                positions = capture.training_positions(len(tokens), number, QUERIES)
                layers = range(smollm2.config.num_hidden_layers)
                capture.save(path, capture.capture(smollm2, tokens, layers, positions, name))
                print(f"captured {path.name}: {name[:60]}", flush=True)

    def layer_of(path: Path, number: int) -> tuple[Capture, LayerCapture]:
        whole = capture.load(path, [number])
        return whole, whole.layers[number]

    held_out, routers = [partial(layer_of, path) for path in paths.values()], load_routers(SHIPPED)
    if options.only != "sampling":
        routers = with_transforms(routers, held_out)
    if options.only != "transform":
        routers = with_sampling(routers, held_out, lambda n: print(f"layer {n}", flush=True))
    save_routers(routers, options.out)
    for number, layer in routers.layers.items():
        if layer.sampling is not None:
            table = np.stack([layer.sampling.shares, layer.sampling.exponents, layer.sampling.caps], 1)
            print(f"layer {number:2}: " + "  ".join(f"{s:g} ^{e:g} <{c:g}" for s, e, c in table.tolist()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
