"""The command ``saap``: finds a subcommand's module and runs it. Imports none before it is asked for.

Packages add commands through the entry point group ``saap_index.commands``: the name is the subcommand, the value a module with
a docstring, ``add_arguments(parser)`` and ``run(options) -> exit status``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads that spin slow down whoever runs next

from .errors import SaapError
from .version import __version__

COMMANDS = {
    "train": ("saap_index.pipeline.command", "routers for every layer of a model, from texts"),
    "generate": ("saap_index.hf.generate", "a local model answers through its index"),
    "info": ("saap_index.info", "versions, instruction set, GPU, backend, cache folder, routers"),
}
"""Module and description of the package's own."""

GROUP = "saap_index.commands"

INTERRUPTED = 130  # what a shell reports of a process ended by Ctrl-C


def commands() -> dict[str, tuple[str, str]]:
    """Module and description of every subcommand that is installed."""
    added = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda each: each.name)
    return {each.name: (each.value, f"see saap {each.name} --help") for each in added} | COMMANDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 for an error that has a name, 2 for wrong usage, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = arguments[0] if arguments else ""
    parser = argparse.ArgumentParser(prog="saap", description="A KV cache that is a vector-search index.")
    parser.add_argument("--version", action="version", version=f"saap_index {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    try:
        for name, (path, description) in commands().items():
            options = subparsers.add_parser(
                name, help=description, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
            )
            if name == command:
                module = importlib.import_module(path)
                options.description = module.__doc__ or description
                module.add_arguments(options)
                options.set_defaults(_run=module.run)
        parsed = parser.parse_args(arguments)
        run = parsed.__dict__.pop("_run")
        status: int = run(parsed)
        return status
    except (SaapError, OSError) as error:
        print(f"saap {command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nsaap {command}: interrupted", file=sys.stderr)
        return INTERRUPTED
