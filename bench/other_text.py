"""What routing captures on text of other kinds than it was trained on, and what raises it: SmolLM2, five layers, equal tokens.

    python bench/other_text.py --text bible.txt faq.txt --captures FOLDER    each file a kind; captures are not made again
    python bench/other_text.py --text bible.txt --captures FOLDER --arms plain shipped --nlist 256 512 1024

Of each file its first 8192 tokens are taken. All but the last 512 are the prompt, which makes the lists; 32 queries of the rest
are measured, in values of bfloat16: the attention outside sinks and window that 5 % of the tokens hold, the same budget in every
layer, in percent, means of layers and texts. The routers are those of the package, and

    plain       lists by Euclidean distance, as before `TwoTower.transform`
    shipped     lists in the metric of the queries of the calibration's texts, as the package has it
    own         in that of the prompt's own queries
    refined     routers and lists fitted further to 512 queries of the prompt, as `attach` refines those that it trains
    steps       12 steps of k-means instead of 3
    topk_group  the best tokens of each KV head, which nobody knows without reading all keys

each also with 512 lists. CPU seconds are of making lists and router, per layer.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor

import harness
import saap_index as saap
from saap_index.invlists.layout import Layout
from saap_index.routing.quantizer import KeyQuantizer
from saap_index.routing.router import QueryRouter
from saap_index.routing.two_tower import TwoTower
from saap_index.training.measure import SHARES, measure
from saap_index.training.prompt import PromptTraining, fit_prompt, priorities
from saap_lab.smollm2 import capture
from saap_lab.smollm2 import model as smollm2

TOKENS, BEHIND, STEP = 8192, 512, 16
QUERIES = 512
LATE = 14
ARMS = ("plain", "shipped", "own", "refined", "steps")


class Scene:
    """A layer of a text. keys : float32 (h, n, d), and coarse, with RoPE undone; values : (h, n, e); sample : positions of the
    prompt's queries that are fitted to."""

    def __init__(self, path: Path, layer: int, trained: Any) -> None:
        self.row = capture.load(path, [layer]).layers[layer]
        self.keys, self.values, self.queries = (
            x[0].bfloat16().float() for x in (self.row.keys, self.row.values, self.row.queries)
        )
        self.rope, self.scale, self.tower = trained.rope, trained.scale, trained.tower
        n = self.keys.shape[1]
        self.coarse, self.prompt = self.rope.unrotate(self.keys, np.arange(n), n), n - BEHIND
        best = np.argsort(-priorities(np.arange(self.prompt), 0), kind="stable")
        self.sample = np.sort(best[:QUERIES])

    def grouped(self, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        """Queries there, (h, g, q, d), as attention and as the router see them."""
        h, n, d = self.keys.shape
        x = self.queries[:, positions].reshape(h, -1, len(positions), d)
        return x, self.rope.unrotate(x, positions, n)

    def routed(self, arm: str, nlist: int) -> tuple[KeyQuantizer, QueryRouter]:
        prompt = slice(0, self.prompt)
        tower: TwoTower = self.tower
        if arm == "plain":
            tower = replace(tower, transform=None)
        elif arm == "own":
            tower = tower.with_transform(self.grouped(self.sample)[1])
        elif arm == "refined":
            options = PromptTraining(nlist=nlist, progress=False)
            of_prompt = self.keys[:, prompt], self.queries[:, self.sample], self.sample
            tower = fit_prompt(*of_prompt, self.rope, self.scale, Layout(), options, tower).tower or tower
        elif arm == "steps":
            quantizer = KeyQuantizer.of_prompt(self.coarse[:, prompt], nlist, niter=12, transform=tower.transform)
            return quantizer, tower.for_lists(quantizer.centroids)
        return tower.for_prompt(self.coarse[:, prompt], nlist)

    def captured(self, quantizer: KeyQuantizer, router: QueryRouter) -> tuple[float, float]:
        """By this router, and by the best tokens of each KV head, in percent."""
        places, at = np.arange(self.prompt, self.keys.shape[1], STEP) + STEP // 2, SHARES.index(0.05)
        lists = quantizer.assign(self.coarse)
        figures = measure(self.keys, self.values, *self.grouped(places), places, lists, router, Layout(), self.scale)
        return tuple(100 * float(x[:, at].sum() / figures.outside.sum()) for x in (figures.captured, figures.best))  # type: ignore[return-value]


def captures(paths: list[Path], folder: Path, tokens: int) -> list[Path]:
    missing = [path for path in paths if not (folder / f"{path.stem}.safetensors").exists()]
    folder.mkdir(parents=True, exist_ok=True)
    if missing:
        model, tokenizer = smollm2.load()
        for path in missing:
            text = path.read_text(encoding="utf-8", errors="replace")
            ids = smollm2.encode(tokenizer, text[: 24 * tokens])[:tokens]
            if len(ids) < tokens:
                sys.exit(f"{path}: {len(ids)} tokens, {tokens} are needed")
            every = torch.arange(tokens, dtype=torch.int64, device="cpu")
            capture.save(folder / f"{path.stem}.safetensors", capture.capture(model, ids, capture.LAYERS, every, path.stem))
            print(f"{path.stem}: read", file=sys.stderr, flush=True)
    return [folder / f"{path.stem}.safetensors" for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="files, each a kind")
    parser.add_argument("--captures", type=Path, required=True, help="folder for what the texts' keys are, 160 MB each")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    parser.add_argument("--nlist", nargs="*", type=int, default=[256, 512], help="default 256 512")
    parser.add_argument("--layers", nargs="*", type=int, default=list(capture.LAYERS))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    routers = saap.from_pretrained("SmolLM2-135M-Instruct")
    rows: list[dict[str, Any]] = []
    for path in captures(args.text, args.captures, args.tokens):
        for layer in args.layers:
            scene = Scene(path, layer, routers.layers[layer])
            for nlist in args.nlist:
                for arm in args.arms:
                    began = time.process_time()
                    made = scene.routed(arm, nlist)
                    seconds = time.process_time() - began
                    ours, best = scene.captured(*made)
                    rows.append({"text": path.stem, "layer": layer, "arm": f"{arm} {nlist}", "captured": ours, "cpu_s": seconds})
            rows.append({"text": path.stem, "layer": layer, "arm": "topk_group", "captured": best, "cpu_s": 0.0})
        print(f"{path.stem}: measured", file=sys.stderr, flush=True)
    groups = {"all": args.layers, "late": [n for n in args.layers if n >= LATE], **{str(n): [n] for n in args.layers}}
    print(f"{'captured, %':16}" + "".join(f"{name:>8}" for name in groups) + "   CPU s")
    summary = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        of_group = {name: [row["captured"] for row in mine if row["layer"] in layers] for name, layers in groups.items()}
        means = {name: float(np.mean(values)) for name, values in of_group.items() if values}
        seconds = float(np.mean([row["cpu_s"] for row in mine]))
        summary[arm] = {**means, "cpu_s": seconds}
        print(f"{arm:16}" + "".join(f"{x:8.1f}" for x in means.values()) + f"{seconds:8.2f}")
    harness.save(args.json, "other_text", {"tokens": args.tokens, "summary": summary, "rows": rows})


if __name__ == "__main__":
    main()
