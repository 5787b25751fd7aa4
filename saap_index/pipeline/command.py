"""`saap train`: routers for every attention layer of a local model, from texts.

saap train --model ./checkpoint --text book.txt docs/ --out routers
saap train --model model.gguf --text docs/ --out routers --resume        after an interruption, at any moment
saap train --model ./checkpoint --quick book.txt --out routers           seconds a layer, from three sequences of one text

A text is a file, a folder with files, or a data set that Hugging Face `datasets` saved to disk; each is a kind of its own, and
all take turns. The result is a folder with config.json (model, data, settings, figures) and model.safetensors.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from ..checks import device as checked_device
from ..errors import ParameterError, SaapError
from ..hf import models
from ..hf.quick import train_on_prompts
from ..routers import Routers
from ..routing.quantizer import require_faiss
from ..training.config import ROUTERS
from ..training.prompt import PromptTraining
from . import texts
from .costs import costs
from .settings import PARTITIONS, TrainSettings
from .train import Step, train_model

DAY_SECONDS = 86400.0
QUICK_PROMPTS = 3
"""Sequences that ``--quick`` learns from, if the text has as many."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    default = TrainSettings()
    parser.add_argument("--model", required=True, help="checkpoint folder of transformers, or GGUF file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", help="files, folders or data sets on disk to train on")
    quick = "in place of --text: learn from a few sequences of --context tokens of these alone, as attach does from prompts"
    source.add_argument("--quick", nargs="+", metavar="FILE", help=quick)
    parser.add_argument("--out", type=Path, default=Path("routers"), help="folder to write (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=default.tokens, help="tokens to train on (default %(default)s)")
    parser.add_argument("--context", type=int, default=default.context, help="tokens of a sequence (default %(default)s)")
    parser.add_argument("--held-out", type=int, default=default.held_out, help="sequences to measure on (default %(default)s)")
    parser.add_argument("--queries", type=int, default=default.queries, help="queries sampled per sequence (default %(default)s)")
    parser.add_argument("--layers", help="numbers, as in 3,8,14 (default: all with attention over the whole context)")
    parser.add_argument("--nlist", type=int, default=default.nlist, help="lists per KV head (default %(default)s)")
    parser.add_argument("--router", choices=ROUTERS, default=default.router, help="default %(default)s")
    parser.add_argument("--partition", choices=PARTITIONS, help="default per-prompt where the router can, else pre-rope")
    parser.add_argument("--seed", type=int, default=default.seed, help="default %(default)s")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--dtype", choices=("auto", *models.DTYPES), default="auto", help="of the passes (default %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the CPU (default %(default)s)")
    parser.add_argument("--disk", type=float, metavar="GB", help="of captures at a time: with less, more passes (default: all)")
    parser.add_argument("--resume", action="store_true", help="continue what is unfinished in --out")


def run(args: argparse.Namespace) -> int:
    """The command. Raises what `load_model`, `read_texts` and `train_model` raise."""
    settings = settings_of(args)
    models.require("tqdm")
    if args.quick is not None:
        return run_quick(args, settings)
    require_faiss()  # now, not after an hour
    checked_device(args.device)
    torch.set_num_threads(max(1, args.threads))
    documents = list(texts.read_texts(args.text))
    say(f"loading {args.model}")
    loaded = models.load_model(args.model, args.device, args.dtype)
    models.check_positions("context", loaded.model.config, settings.context)
    encode, flags = partial(models.encode, loaded.tokenizer), "--tokens, --held-out or --context"
    sequences = texts.pack_sequences(documents, encode, settings.sequences, settings.context, flags)
    most = None if args.disk is None else int(checked_disk(args.disk) * 1e9)
    say(costs(loaded.model, settings, most).line())
    with progress() as step:
        routers = train_model(loaded, sequences, settings, args.out, args.resume, step, max_disk_bytes=most)
    print("\n".join(report(routers)))
    say(f"wrote {args.out}")
    return 0


def run_quick(args: argparse.Namespace, settings: TrainSettings) -> int:
    """`saap train --quick`: what `attach` does with the prompts of a model that has no routers, offline."""
    checked_device(args.device)
    torch.set_num_threads(max(1, args.threads))
    options = PromptTraining(
        min_tokens=args.context, prompts=QUICK_PROMPTS, nlist=args.nlist, seed=args.seed, max_seconds=DAY_SECONDS
    )
    documents = list(texts.read_texts(args.quick))
    say(f"loading {args.model}")
    loaded = models.load_model(args.model, args.device, args.dtype)
    models.check_positions("context", loaded.model.config, settings.context)
    encode = partial(models.encode, loaded.tokenizer)
    whole = sum(len(encode(text)) for _, text in documents) // settings.context
    count = max(1, min(QUICK_PROMPTS, whole))
    sequences = texts.pack_sequences(documents, encode, count, settings.context, "--context")
    say(f"reading {count} sequences of {settings.context} tokens, and fitting every layer to each")
    routers = train_on_prompts(loaded.model, [tokens for _, tokens in sequences], options, args.out)
    say(f"wrote routers of {len(routers.layers)} layers to {args.out}")
    return 0


def checked_disk(value: float) -> float:
    """ParameterError for a size that is none."""
    if not 0 < value < float("inf"):
        raise ParameterError(f"disk: expected a positive number of GB, got {value!r}")
    return value


def settings_of(args: argparse.Namespace) -> TrainSettings:
    """ParameterError for flags that contradict each other or are out of range."""
    try:
        layers = None if args.layers is None else tuple(int(part) for part in args.layers.split(","))
    except ValueError as error:
        raise ParameterError(f"layers: expected numbers as in 3,8,14, got {args.layers!r}") from error
    free = args.router in ("two-tower", "kmeans")
    partition = args.partition or ("per-prompt" if free else "pre-rope")
    return TrainSettings(
        router=args.router, partition=partition, nlist=args.nlist, tokens=args.tokens, context=args.context,
        held_out=args.held_out, queries=args.queries, layers=layers, seed=args.seed,
    )


def report(routers: Routers, share: float = 0.05) -> list[str]:
    """Per layer what a budget of 5 % captures on the sequences held out; the exact best beside it, and the planned share."""
    lines = [
        "",
        f"{routers.config['router']} routers, {routers.config['partition']} lists; budget {share:.0%} of the tokens outside",
        "sinks and window, on sequences held out. captured: attention outside that is read; best: by exact scores; error: of",
        "the output, relative; outside: share of all attention; budget: planned selectivity for each KV head.",
        "",
        f"{'layer':>6} {'captured %':>16} {'best %':>8} {'error':>7} {'outside':>8}   budget %",
    ]
    average = routers.config["budget"]["average"]
    for number, layer in sorted(routers.layers.items()):
        row = routers.config["evaluation"][str(number)]
        at = row["shares"].index(share)
        planned = " ".join(f"{100 * average * x:5.1f}" for x in (layer.budget_shares if layer.budget_shares is not None else []))
        outside = sum(row["outside"]) / len(row["outside"])
        spread = f"{row['spread'][at]:.1f}" if row["sequences"] > 1 else "-"
        captured = f"{row['captured'][at]:.1f} ({spread})"
        lines.append(f"{number:6} {captured:>16} {row['best'][at]:8.1f} {row['error'][at]:7.3f} {outside:8.2f}   {planned}")
    dense = ",".join(map(str, routers.dense_layers))
    advice = f"better left dense: layers {dense}; attach(..., dense_layers=routers.dense_layers), or --dense-layers {dense}"
    return [*lines, *([advice] if dense else [])]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def exit_status(work: Callable[[], None]) -> int:
    """The exit status of a command that goes on where it was interrupted."""
    try:
        work()
    except SaapError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


@contextmanager
def progress() -> Iterator[Step]:
    """Two bars with the time that is left: passes of the model, then layers."""
    models.require("tqdm")
    from tqdm import tqdm

    names = {"capture": ("passes", "pass"), "layer": ("layers", "layer")}
    bars: dict[str, tqdm] = {}

    def step(what: str, done: int, total: int) -> None:
        if what not in bars:
            # what an earlier run did takes no time, and is no measure of what is left
            bars[what] = tqdm(total=total, desc=names[what][0], unit=names[what][1], initial=done - 1, file=sys.stderr)
        bars[what].update(done - bars[what].n)

    try:
        yield step
    finally:
        for bar in bars.values():
            bar.close()
