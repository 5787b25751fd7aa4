"""The main job on a real model, from nothing: ``python -m saap_lab.smollm2``, or ``make demo``.

Captures keys, queries and values of SmolLM2-135M over long real text, trains an index per layer, and measures on text from
other sources what attention loses and what it gains in time; with these, and with the routers of all layers that come with the
package, which then decode. Writes the table and a plot.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow down whoever runs next

import torch

from saap_index import files
from saap_index.errors import SaapError
from saap_index.index import AsymmetricIndex
from saap_index.rope import Rope
from saap_index.routers import Routers, load_routers

from .. import plots
from . import capture, decode, model, routers, speed, texts
from .capture import Capture
from .evaluate import Table, evaluate, pooled
from .training import METHODS, train_index

BASELINES = ("topk_group", "ivf", "recent")
NAMES = {
    "routers": "index, trained routers",
    "saap_index": "index, trained here",
    "published": "SAAP as published",
    "ivf": "plain IVF, per prompt",
    "recent": "recent window",
    "topk_group": "exact top-k (bound)",
}
DRAWN_AS = {"routers": "saap", "saap_index": "saap-own"}
"""Colours of the comparison's methods."""
SHARES = (0.02, 0.05, 0.1, 0.2)
SHOWN = 0.05
LATE = 14


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m saap_lab.smollm2", description=__doc__)
    parser.add_argument("--training", type=int, default=4, help="training sequences of 8192 tokens (default %(default)s)")
    parser.add_argument("--unseen", type=int, default=2, help="unseen sequences (default %(default)s)")
    parser.add_argument("--layers", default="3,8,14,20", help="layers to index (default %(default)s)")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="own training texts instead of Python's")
    parser.add_argument("--unseen-text", type=Path, nargs="+", metavar="FILE", help="own unseen texts instead of Python's")
    parser.add_argument(
        "--output", type=Path, default=Path("demo_results"), help="folder for table and plot (default %(default)s)"
    )
    parser.add_argument("--long", type=int, default=131072, help="tokens of the synthetic timing (default %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(os.cpu_count() or 1)
    began = time.perf_counter()
    try:
        layers = [int(x) for x in options.layers.split(",")]
        print(f"loading {model.NAME} ...", file=sys.stderr, flush=True)
        loaded, tokenizer = model.load()
        rope = Rope.from_config(loaded.config)
        assert rope is not None
        given = load_routers(routers.found())
        known, other = _texts(options, partial(model.encode, tokenizer))
        training, unseen = _captures(loaded, known, other, layers)
        table = _measure(training, unseen, layers, rope, given)
        lines = _report(table, layers, len(training), len(unseen))
        print("\n".join(lines), flush=True)
        timing = speed.report(training[0], layers[-1], rope, options.long)
        timing += decode.report(loaded, list(other[0][1])[: -decode.TOKENS], given)  # no token beyond what it was trained for
        print("\n".join(timing), flush=True)
    except (SaapError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    files.make_folder(options.output)
    files.write_text(options.output / "table.txt", "\n".join([*lines, *timing]) + "\n")
    _plot(table, layers, options.output / "mass_against_bytes.png")
    took = time.perf_counter() - began
    print(f"\nwrote {options.output}/table.txt and {options.output}/mass_against_bytes.png; {took / 60:.1f} minutes in all")
    return 0


Texts = list[tuple[str, list[int]]]


def _texts(options: argparse.Namespace, encode: Callable[[str], list[int]]) -> tuple[Texts, Texts]:
    """Training and unseen sequences: name and token numbers."""
    known = texts.texts_from_files(options.text) if options.text else texts.training_texts()
    other = texts.texts_from_files(options.unseen_text) if options.unseen_text else texts.unseen_texts()
    found = texts.take(known, encode, options.training, flags="--training")
    return found, texts.take(other, encode, options.unseen, flags="--unseen")


def _captures(loaded: Any, known: Texts, other: Texts, layers: Sequence[int]) -> tuple[list[Capture], list[Capture]]:
    """Captures of the training and the unseen sequences."""
    print(f"running it over {len(known) + len(other)} sequences of {len(known[0][1])} tokens of text", file=sys.stderr)
    progress = capture.Progress(len(known) + len(other))
    captured: list[Capture] = []
    for number, (name, tokens) in enumerate([*known, *other]):
        is_training = number < len(known)
        positions = capture.training_positions(len(tokens), number) if is_training else capture.unseen_positions(len(tokens))
        captured.append(capture.capture(loaded, tokens, layers, positions, name))
        progress.step()
    return captured[: len(known)], captured[len(known) :]


def _measure(
    training: Sequence[Capture], unseen: Sequence[Capture], layers: Sequence[int], rope: Rope, given: Routers
) -> Table:
    """Methods that are trained here, and ``given`` routers with every layer at the same budget."""
    indexes: dict[str, dict[int, AsymmetricIndex]] = {method: {} for method in NAMES if method not in BASELINES}
    for layer in layers:
        indexes["routers"][layer] = given.index(layer, selectivity=SHOWN, budget_shares=None)
        for method in METHODS:
            began = time.perf_counter()
            indexes[method][layer] = train_index(method, training, layer, rope)
            took = time.perf_counter() - began
            print(f"layer {layer}: trained {NAMES[method]} in {took:.0f} s", file=sys.stderr, flush=True)
    said = partial(print, file=sys.stderr, flush=True)
    return evaluate(unseen, indexes, BASELINES, layers, SHARES, lambda text: said(f"measured {text}"))


def _report(table: Table, layers: Sequence[int], training: int, unseen: int) -> list[str]:
    """Every method and layer at one budget, then pooled over the late and over all layers."""
    lines = [
        "",
        f"{model.TITLE}, 8192 tokens of text, {training} training and {unseen} unseen sequences;",
        "one selection per KV head. Rows late and all: mass pooled by mass over layers, error the mean of layers.",
        f"Budget {SHOWN:.0%} of the tokens outside 4 sinks and the newest 128. mass: attention captured of what lies outside;",
        "error: of the output, relative; tables: offsets, row lists, centroids; router: weights, once a step (batch 1).",
        "",
        f"{'layer':>6}  {'method':22} {'tokens':>7} {'K+V kB':>8} {'tables kB':>10} {'router kB':>10} {'mass %':>7} {'error':>6}",
    ]
    for layer in layers:
        for method, name in NAMES.items():
            row = table[method, layer, SHOWN]
            sizes = f"{row.kv_bytes / 1e3:8.0f} {row.other_bytes / 1e3:10.0f} {row.router_bytes / 1e3:10.0f}"
            lines.append(f"{layer:6}  {name:22} {row.tokens:7.0f} {sizes} {row.mass_percent:7.1f} {row.error:6.3f}")
    for title, group in (("late", [x for x in layers if x >= LATE]), ("all", list(layers))):
        if group:
            for method, name in NAMES.items():
                mass, _, error = pooled(table, method, SHOWN, group)
                lines.append(f"{title:>6}  {name:22} {'':7} {'':8} {'':10} {'':10} {mass:7.1f} {error:6.3f}")
    return lines


def _plot(table: Table, layers: Sequence[int], path: Path) -> None:
    """One curve per method, pooled over the layers: bytes read per step and layer (K, V and tables) against captured mass."""
    points: dict[str, list[tuple[float, float]]] = {}
    for method in NAMES:
        for share in SHARES:
            rows = [table[method, layer, share] for layer in layers]
            size = sum(r.kv_bytes + r.other_bytes for r in rows) / len(rows) / 1e6
            points.setdefault(DRAWN_AS.get(method, method), []).append((size, pooled(table, method, share, layers)[0]))
    plots.curves(
        path, points, "MB read per step and layer (float32 K, V, tables; router weights apart)",
        "attention mass captured outside sinks and window, %", log="", limits=(0, 101),
        title=f"{model.TITLE}, unseen text, layers {', '.join(map(str, layers))}",
        labels={DRAWN_AS.get(method, method): name for method, name in NAMES.items()},
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
