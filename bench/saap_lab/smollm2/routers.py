"""Routers for every layer of SmolLM2-135M from text of many kinds: ``python -m saap_lab.smollm2.routers``, or ``make routers``.

The same as ``saap train``, with the model and the texts chosen. Interrupt it at any moment; the same command continues. What it
makes is preferred to the routers that come with the package.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow down whoever runs next

import torch

from saap_index.hf import support
from saap_index.hf.models import LoadedModel
from saap_index.pipeline import command, texts
from saap_index.pipeline.settings import TrainSettings
from saap_index.pipeline.train import train_model
from saap_index.routers import CONFIG

from . import model
from .shipped import SHIPPED
from .varied import varied_texts


def folder() -> Path:
    """Where they are written, and looked for by whoever can use them."""
    return model.cache_folder() / f"{model.NAME}-routers"


def newest() -> Path:
    """Routers of every layer: trained on this machine, or those that come with the package."""
    return folder() if (folder() / CONFIG).exists() else SHIPPED


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m saap_lab.smollm2.routers", description=__doc__)
    parser.add_argument("--out", type=Path, default=folder(), help="folder to write (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=TrainSettings.tokens, help="tokens to train on (default %(default)s)")
    parser.add_argument("--keep-captures", action="store_true", help="leave keys, queries and values on disk")
    options = parser.parse_args(arguments)
    torch.set_num_threads(os.cpu_count() or 1)

    def work() -> None:
        settings = TrainSettings(tokens=options.tokens)
        command.say(f"loading {model.NAME}")
        smollm2, tokenizer = model.load()
        loaded = LoadedModel(smollm2, tokenizer, model.NAME, support.fingerprint(support.decoder_of(smollm2)))
        encode = partial(model.encode, tokenizer)
        sequences = texts.pack_sequences(varied_texts(), encode, settings.sequences, settings.context, "--tokens")
        with command.progress() as step:
            routers = train_model(loaded, sequences, settings, options.out, True, step, options.keep_captures)
        print("\n".join(command.report(routers)))
        command.say(f"wrote {options.out}")

    return command.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
