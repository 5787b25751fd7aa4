"""Every method of the lab on SmolLM2-135M: ``python -m saap_lab.smollm2.comparison``, or ``make compare``.

The same as ``saap compare``, with the model and the texts chosen. The quick form, three layers at 4096 tokens, takes minutes;
``--full`` is every layer at 8192 tokens, four sequences, and takes an hour or two. Interrupted, the same command continues. The
routers that come with the package, or those of ``make routers``, stand for ``saap-own``; everything else is trained here.
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

from saap_index.pipeline import command
from saap_index.routers import load_routers

from .. import compare, flags, roster
from ..evaluate import Settings
from . import model, routers, texts

QUICK_LAYERS = (3, 14, 26)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m saap_lab.smollm2.comparison", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every layer, 8192 tokens, four sequences, three budgets")
    parser.add_argument("--methods", default=compare.DEFAULT_METHODS, help="names separated by commas (default: all)")
    parser.add_argument("--routers", type=Path, default=routers.newest(), help="for saap-own (default: of the package)")
    parser.add_argument("--out", type=Path, help="folder (default compare_results, or compare_full)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(os.cpu_count() or 1)
    methods = flags.names(options.methods)
    out = options.out or Path("compare_full" if options.full else "compare_results")

    def work() -> None:
        flags.check_names("methods", methods, roster.KINDS)
        command.say(f"loading {model.NAME}")
        smollm2, tokenizer = model.load()
        encode = partial(model.encode, tokenizer)
        length, training, measured = (8192, 4, 4) if options.full else (4096, 2, 1)
        sequences = texts.pack_sequences(texts.training_texts(), encode, training, length)
        sequences += texts.pack_sequences(texts.unseen_texts(), encode, measured, length)
        quick = Settings((0.05, 0.1), QUICK_LAYERS, decoded=24, replaced=QUICK_LAYERS)
        settings = Settings(decoded=64, decode_shares=(0.05,)) if options.full else quick
        task = compare.Task(
            smollm2, tokenizer, model.TITLE, sequences, training, methods, settings,
            routers=load_routers(options.routers),
            profile_tokens=compare.PROFILE_TOKENS if options.full else 1024,
        )
        compare.finish(task, out)

    return command.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
