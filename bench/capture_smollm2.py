"""Capture keys, values and queries of SmolLM2-135M-Instruct over real text into a folder of safetensors files.

    python bench/capture_smollm2.py FOLDER --training 24 --unseen 12

One file per sequence, ``training_000.safetensors`` and so on, with tokens int64 (n,), positions int64 (q,) and for each layer
``keys.<layer>`` and ``values.<layer>`` float32 (1, 3, n, 64) and ``queries.<layer>`` float32 (1, 9, q, 64), keys and queries
after RoPE. A file that is there is not made again, so a stopped run continues where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

# Before torch is imported: idle threads that spin cost more than they save when something else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from saap_index.errors import SaapError
from saap_lab.smollm2 import capture, model, texts
from saap_lab.smollm2.progress import Progress


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        _run(options)
    except SaapError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    smollm2, tokenizer = model.load()
    encode = partial(model.encode, tokenizer)

    def sequences(documents: Iterable[tuple[str, str]], count: int) -> list[tuple[str, list[int]]]:
        return texts.pack_sequences(documents, encode, count, options.length) if count else []

    training = sequences(texts.texts_from_files(options.text) if options.text else texts.training_texts(), options.training)
    unseen = sequences(
        texts.texts_from_files(options.unseen_text) if options.unseen_text else texts.unseen_texts(), options.unseen
    )
    progress = Progress(len(training) + len(unseen))
    # A quarter of the training first, then all that is unseen: a run that is cut short already has some of both.
    early = len(training) // 4
    into = partial(capture.capture_to, options.folder, model=smollm2, layers=options.layers, progress=progress)
    into("training", sequences=training[:early], positions_of=capture.training_positions)
    into("unseen", sequences=unseen, positions_of=lambda length, number: capture.unseen_positions(length))
    into("training", sequences=training[early:], positions_of=capture.training_positions, first=early)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the files")
    parser.add_argument("--training", type=int, default=24, metavar="N", help="training sequences (default 24)")
    parser.add_argument("--unseen", type=int, default=12, metavar="M", help="unseen sequences (default 12)")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="own training texts instead of Python's")
    parser.add_argument("--unseen-text", type=Path, nargs="+", metavar="FILE", help="own unseen texts instead of Python's")
    parser.add_argument("--length", type=int, default=capture.LENGTH, help="tokens per sequence (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default %(default)s)")
    layers = ",".join(map(str, capture.LAYERS))
    parser.add_argument("--layers", type=_numbers, default=layers, metavar="L,L", help="layers (default %(default)s)")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
