"""`saap doctor`: does it work here, and what is it worth on this model, these routers, this text? Verdicts, and what to do.

saap doctor                                                            the machine alone: versions, kernels, GPU, cache folder
saap doctor --model ./checkpoint --routers routers --text book.txt     and the model, at the text's length
saap doctor --demo                                                     the demo's model and the routers of the package

Exit status 0 if no row failed, 1 if one did. With --json the rows come as JSON, with the numbers behind them.
"""

from __future__ import annotations

import argparse
import os
import pydoc_data.topics
import sys
from pathlib import Path
from typing import Any

import torch

from saap_index.checks import device as checked_device
from saap_index.errors import ParameterError, SaapError
from saap_index.files import read_text
from saap_index.routers import Routers, load_routers
from saap_index.search.params import SELECTIVITY

from .findings import FAIL, OK, SKIPPED, WARN, Finding, as_json, check, status, table
from .machine import check_cache_folder, check_gpu, check_kernels, check_memory
from .versions import check_versions

OWN_TOKENS = 2048
"""Of a text of our own."""

MOST_TOKENS = 8192
"""Of a user's text, unless more are asked for: it is read once, densely."""

ROOM = 128
"""Positions of the model that are left for questions behind the text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("--model", help="checkpoint folder of transformers, or GGUF file")
    parser.add_argument("--demo", action="store_true", help="the demo's model; and its routers, if none are given")
    parser.add_argument("--routers", help="folder of routers that saap train made for it")
    parser.add_argument("--text", type=Path, help="a text as long as those that the model is to read (default: Python's manual)")
    parser.add_argument("--tokens", type=int, help=f"most of the text (default {MOST_TOKENS}; {OWN_TOKENS} without --text)")
    parser.add_argument("--selectivity", type=float, default=SELECTIVITY, help="default %(default)s")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default %(default)s")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the CPU (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """The command. Raises ParameterError for flags in conflict, OSError and FormatError for a text that cannot be read."""
    if args.model and args.demo:
        raise ParameterError("--model, --demo: expected one of them")
    if (args.routers or args.text) and not (args.model or args.demo):
        raise ParameterError("--routers, --text: expected --model or --demo beside them")
    if args.tokens is not None and args.tokens < 1:
        raise ParameterError(f"--tokens: expected 1 or more, got {args.tokens}")
    if not 0 < args.selectivity <= 1:
        raise ParameterError(f"--selectivity: expected 0 < selectivity <= 1, got {args.selectivity}")
    checked_device(args.device)
    torch.set_num_threads(max(1, args.threads))
    text = read_text(args.text, "--text") if args.text else "\n".join(pydoc_data.topics.topics.values())
    say("versions and machine")
    findings = [
        *check_versions(), check("kernels", check_kernels), check("GPU", check_gpu), check("cache folder", check_cache_folder),
        check("memory", check_memory),
    ]
    if args.model or args.demo:
        findings += about_model(args, text)
    print(as_json(findings) if args.json else "\n".join(table(findings)))
    return status(findings)


def about_model(args: argparse.Namespace, text: str) -> list[Finding]:
    """The rows of the model; one that cannot be loaded is a row that fails."""
    say(f"loading {'the demo model' if args.demo else args.model}")
    try:
        loaded = load(args)
    except (SaapError, OSError) as error:
        return [Finding("model", FAIL, str(error), "docs/transformers.md says which models are served")]
    from saap_index.hf.models import position_limit

    from .inside import examine

    config = loaded.model.config.get_text_config(decoder=True)
    longest = position_limit(config)
    tokens = args.tokens or (MOST_TOKENS if args.text else OWN_TOKENS)
    tokens = tokens if longest is None else min(tokens, max(longest // 2, longest - ROOM))
    most = "of any length" if longest is None else f"up to {longest} tokens"
    words = f"{loaded.name}, {config.model_type}, {config.num_hidden_layers} layers, {loaded.model.dtype}, texts {most}"
    row, routers = check_routers(args, loaded)
    return [Finding("model", OK, words), row, *examine(loaded, routers, text, tokens, args.selectivity, say)]


def load(args: argparse.Namespace) -> Any:
    """The model; raises what `load_model` and the demo's `load` raise."""
    from saap_index.hf import support
    from saap_index.hf.models import LoadedModel, load_model

    if args.model:
        return load_model(args.model, args.device, args.dtype)
    from ..smollm2 import model as demo_model

    model, tokenizer = demo_model.load()
    model = model.to(args.device)
    return LoadedModel(model, tokenizer, demo_model.TITLE, support.fingerprint(support.decoder_of(model)))


def check_routers(args: argparse.Namespace, loaded: Any) -> tuple[Finding, Routers | None]:
    """Whether the routers can be read and are those of the model; and they, if so."""
    path = args.routers
    if path is None and args.demo:
        from ..smollm2 import routers as demo_routers

        path = demo_routers.newest()
    if path is None:
        return Finding("routers", SKIPPED, "none given", "saap train makes them; then give --routers"), None
    try:
        routers = load_routers(path)
        routers.check(loaded.model.config)
    except (SaapError, OSError) as error:
        return Finding("routers", FAIL, str(error), "give those that saap train made for this model"), None
    config = routers.config
    of = f"{len(routers.layers)} layers, {config.get('router', 'unknown')} routers, {config.get('partition', 'unknown')} lists"
    trained_for = config["model"].get("fingerprint")
    dense = (config.get("budget") or {}).get("dense_layers") or []
    advice = f"training found these layers better left dense: attach(..., dense_layers={list(dense)})" if dense else ""
    if trained_for is not None and trained_for != loaded.fingerprint:
        words = f"{of}; trained for other weights of this shape ({trained_for}, not {loaded.fingerprint})"
        return Finding("routers", WARN, words, "see the row captured attention; train them anew if it falls short"), routers
    return Finding("routers", OK, of, advice), routers


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
