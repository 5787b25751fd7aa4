"""The command ``saap``: finds a subcommand's module and runs it. Knows their names, and imports none before it is asked for."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads that spin slow down whoever runs next

from . import __version__
from .errors import SaapError

COMMANDS = {
    "train": ("saap_index.pipeline.command", "routers for every layer of a model, from texts"),
    "eval": ("saap_index.lab.eval_command", "what trained routers are worth on a model and unseen text"),
    "compare": ("saap_index.lab.compare", "sparse attention methods side by side on a local model, at equal bytes"),
    "generate": ("saap_index.hf.generate", "a local model answers through its index"),
    "doctor": ("saap_index.doctor.command", "whether it works on this machine, and what it is worth on a model"),
}
"""Module and description of each; a module has add_arguments(parser) and run(arguments) -> exit status."""

INTERRUPTED = 130  # what a shell reports of a process ended by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 for an error that has a name, 2 for wrong usage, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="saap", description="A KV cache that is a vector-search index.")
    parser.add_argument("--version", action="version", version=f"saap_index {__version__}")
    parser.add_argument(
        "command", choices=COMMANDS, metavar="COMMAND", help="; ".join(f"{k}: {v[1]}" for k, v in COMMANDS.items())
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = parser.parse_args(given[:1]).command
    path, description = COMMANDS[name]
    try:
        module = importlib.import_module(path)
        options = argparse.ArgumentParser(
            prog=f"saap {name}", description=module.__doc__ or description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(options)
        status: int = module.run(options.parse_args(given[1:]))
        return status
    except (SaapError, OSError) as error:
        print(f"saap {name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nsaap {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
