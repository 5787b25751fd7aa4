"""What lists that all prompts share cost against lists of each prompt: ``python bench/vllm_lists.py --routers DIRECTORY ...``.

SmolLM2-135M, some layers, texts of Python's own library that no shipped router has seen; each folder of routers as an engine uses
it (shared lists, octaves of distance) and as an index does (lists of each prompt, its own segments). Prints the attention outside
first and newest tokens that is captured, in percent, and the relative error of the output, at 5 and 10 % of the tokens.
``--quick N`` also makes routers as `saap train --quick` does, from N texts of other kinds, and measures them beside.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from harness import save
from saap_index.hf.quick import train_on_prompts
from saap_index.invlists.layout import Layout
from saap_index.invlists.octaves import octaves
from saap_index.pipeline import capture
from saap_index.routers import Routers, load_routers
from saap_index.training.measure import SHARES, HeldOut, Measured, measure
from saap_index.training.prompt import PromptTraining
from saap_lab.smollm2 import model

HELD_OUT = "turtle.py", "tarfile.py"
OTHERS = "argparse.py", "inspect.py", "statistics.py"
"""What routers are made from here."""


@dataclass(frozen=True)
class Octaves(Layout):
    """A layout whose segments are an engine's."""

    def segments(self, length: int) -> Any:
        bounds = octaves(length, self.sinks, self.window)
        return tuple(pairwise(bounds))


def tokens_of(tokenizer: Any, name: str, count: int) -> list[int]:
    text = (Path(os.__file__).parent / name).read_text(encoding="utf-8")
    found = model.encode(tokenizer, text)[:count]
    if len(found) < count:
        raise SystemExit(f"{name}: expected {count} tokens, got {len(found)}")
    return list(found)


def captured(network: Any, tokens: list[int], layers: set[int], queries: int) -> dict[int, tuple[Any, ...]]:
    """Queries at some late positions, keys, values and scale of each layer."""
    found: dict[int, tuple[Any, ...]] = {}
    places = torch.linspace(len(tokens) - len(tokens) // 8, len(tokens) - 1, queries).long()

    def keep(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> None:
        if layer in layers:
            found[layer] = query[0][:, places].clone(), key[0].clone(), value[0].clone(), scale, places.numpy()
        if layer == max(layers):
            raise capture.Finished

    capture.run(network, tokens, keep)
    return found


def compared(routers: Routers, number: int, of: tuple[Any, ...]) -> dict[str, Measured]:
    """One layer of one text, by both ways."""
    queries, keys, values, scale, places = of
    layer = routers.layers[number]
    data = HeldOut.of(keys, values, queries, places, layer.rope)
    said = routers.config.get("layout", {})
    layout = {name: said.get(name, getattr(Layout(), name)) for name in ("sinks", "window")}
    shared = layer.shared()
    assert shared is not None
    own = shared if layer.tower is None else layer.tower.for_prompt(data.coarse[:, : int(places.min())], layer.quantizer.nlist)
    ways = {"of each prompt": (own, Layout(**layout)), "shared": (shared, Octaves(**layout))}
    return {name: measure(*data.replayed(*parts, cut, scale)) for name, (parts, cut) in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routers", type=Path, nargs="*", default=[])
    parser.add_argument("--quick", type=int, nargs="*", default=[], choices=range(1, len(OTHERS) + 1))
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 12, 16, 20])
    parser.add_argument("--tokens", type=int, default=8192, help="of a text (default %(default)s)")
    parser.add_argument("--queries", type=int, default=16, help="positions of a text (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network, tokenizer = model.load()
    every = {str(folder): load_routers(folder) for folder in options.routers}
    for count in options.quick:
        training = PromptTraining(min_tokens=options.tokens, prompts=count, max_seconds=86400, progress=False)
        with tempfile.TemporaryDirectory() as folder:
            prompts = [tokens_of(tokenizer, name, options.tokens) for name in OTHERS[:count]]
            every[f"quick, {count} texts"] = train_on_prompts(network, prompts, training, Path(folder) / "routers")
    texts = [captured(network, tokens_of(tokenizer, x, options.tokens), set(options.layers), options.queries) for x in HELD_OUT]
    found: dict[str, Any] = {}
    for name, routers in every.items():
        total: dict[str, Measured] = {}
        for text in texts:
            for number in options.layers:
                for way, one in compared(routers, number, text[number]).items():
                    total[way] = total[way] + one if way in total else one
        for way, x in total.items():
            row = found.setdefault(name, {})[way] = {
                "captured": (100 * x.captured.sum(0) / x.outside.sum()).tolist(),
                "best": (100 * x.best.sum(0) / x.outside.sum()).tolist(),
                "error": (x.error.sum(0) / x.queries / len(x.outside)).tolist(),
            }
            at = [SHARES.index(share) for share in (0.05, 0.1)]
            figures = [f"{100 * SHARES[i]:.0f} %: {row['captured'][i]:.1f} captured, error {row['error'][i]:.4f}" for i in at]
            print(f"{name:24} {way:16} {'   '.join(figures)}   best {np.array(row['best'])[at].round(1)}", flush=True)
    save(options.json, "vllm_lists", {"shares": list(SHARES), "layers": options.layers, "tokens": options.tokens, "rows": found})


if __name__ == "__main__":
    main()
