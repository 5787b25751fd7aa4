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
from saap_index.pipeline.command import say
from saap_index.routers import Routers, load_routers
from saap_index.routing.rope import Rope

from . import capture, decode, model, report, routers, speed, texts
from .capture import Capture
from .evaluate import Table, evaluate
from .progress import Progress
from .report import NAMES, SHARES, SHOWN
from .training import METHODS, train_index

BASELINES = ("topk_group", "ivf", "recent")


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
        say(f"loading {model.NAME}: seconds, the first time half a minute")
        loaded, tokenizer = model.load()
        rope = Rope.from_config(loaded.config)
        assert rope is not None
        shipped = load_routers(routers.newest())
        training_texts, unseen_texts = _texts(options, partial(model.encode, tokenizer))
        training, unseen = _captures(loaded, training_texts, unseen_texts, layers)
        table = _measure(training, unseen, layers, rope, shipped)
        lines = report.as_text(table, layers, len(training), len(unseen))
        print("\n".join(lines), flush=True)
        say(f"timing a decode step of a layer here, and of {options.long} tokens in the shape of Llama-3.1-8B: a minute or two")
        timing = speed.report(training[0], layers[-1], rope, options.long)
        say(f"writing {decode.TOKENS} tokens behind a text of 8192, with the index and without: a minute or two")
        prompt = list(unseen_texts[0][1])[: -decode.TOKENS]  # no token beyond what the model was trained for
        timing += decode.report(loaded, prompt, shipped)
        print("\n".join(timing), flush=True)
    except (SaapError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    files.make_folder(options.output)
    files.write_text(options.output / "table.txt", "\n".join([*lines, *timing]) + "\n")
    report.plot(table, layers, options.output / "mass_against_bytes.png")
    took = time.perf_counter() - began
    print(f"\nwrote {options.output}/table.txt and {options.output}/mass_against_bytes.png; {took / 60:.1f} minutes in all")
    return 0


Texts = list[tuple[str, list[int]]]


def _texts(options: argparse.Namespace, encode: Callable[[str], list[int]]) -> tuple[Texts, Texts]:
    """Training and unseen sequences: name and token numbers."""
    training = texts.texts_from_files(options.text) if options.text else texts.training_texts()
    unseen = texts.texts_from_files(options.unseen_text) if options.unseen_text else texts.unseen_texts()
    sequences = texts.pack_sequences(training, encode, options.training, flags="--training")
    return sequences, texts.pack_sequences(unseen, encode, options.unseen, flags="--unseen")


def _captures(loaded: Any, training: Texts, unseen: Texts, layers: Sequence[int]) -> tuple[list[Capture], list[Capture]]:
    """Captures of the training and the unseen sequences."""
    count = len(training) + len(unseen)
    say(f"running it over {count} sequences of {len(training[0][1])} tokens of text, keeping keys, values and queries")
    progress, captures = Progress(count), []
    for number, (name, tokens) in enumerate([*training, *unseen]):
        is_training = number < len(training)
        positions = capture.training_positions(len(tokens), number) if is_training else capture.unseen_positions(len(tokens))
        captures.append(capture.capture(loaded, tokens, layers, positions, name))
        progress.step()
    return captures[: len(training)], captures[len(training) :]


def _measure(
    training: Sequence[Capture], unseen: Sequence[Capture], layers: Sequence[int], rope: Rope, shipped: Routers
) -> Table:
    """Methods that are trained here, and ``shipped`` routers with every layer at the same budget."""
    indexes: dict[str, dict[int, AsymmetricIndex]] = {method: {} for method in NAMES if method not in BASELINES}
    say(f"training {len(METHODS)} kinds of index on the first {len(training)}: k-means and a router for each layer")
    progress = Progress(len(layers) * len(METHODS), "indexes")
    for layer in layers:
        indexes["routers"][layer] = shipped.index(layer, selectivity=SHOWN, budget_shares=None)
        for method in METHODS:
            indexes[method][layer] = train_index(method, training, layer, rope)
            progress.step()
    say(f"measuring what {len(NAMES)} methods read, against exact attention, on text they have not seen")
    progress = Progress(len(unseen), "unseen sequences")
    return evaluate(unseen, indexes, BASELINES, layers, SHARES, lambda text: progress.step())


if __name__ == "__main__":
    sys.exit(main())
