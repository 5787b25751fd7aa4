"""The API reference, from the docstrings: ``python docs/reference.py [FOLDER]``, or `make docs`. A warning is an error."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.render

FOLDER = Path(__file__).resolve().parent.parent / "build" / "api"

MODULES = ("saap_index", "saap_index.hf", "saap_index.backends", "saap_index.errors", "saap_lab.method")
"""What is public: the top level, serving a model, another device, errors, and a method of one's own to compare with."""


def build(folder: Path) -> None:
    """Write the pages, index.html first."""
    for name in MODULES:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            module.__dict__[public] = getattr(module, public)  # those imported when asked for are documented too
    pdoc.render.configure(docformat="numpy", show_source=False, search=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*MODULES, output_directory=folder)


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    build(out)
    print(f"wrote {out / 'index.html'}")
