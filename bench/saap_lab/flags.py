"""What `saap compare` and `saap eval` take on the command line, as numbers and names. Checked before anything is read."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from saap_index.checks import device as checked_device
from saap_index.errors import ParameterError
from saap_index.hf import models

ENDINGS = ("png", "pdf", "svg")
"""Of pictures."""


def add_computing(parser: argparse.ArgumentParser) -> None:
    """--device, --dtype and --threads, as `saap train` and `saap generate` have them; float32 unless something else is said."""
    parser.add_argument("--device", default="cpu", help="of the model and of what is measured (default %(default)s)")
    parser.add_argument(
        "--dtype", choices=("auto", *models.DTYPES), default="float32", help="of the model and its captures (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the CPU (default %(default)s)")


def add_own(parser: argparse.ArgumentParser) -> None:
    """--own."""
    parser.add_argument(
        "--own", nargs="+", default=[], metavar="module:Class",
        help="methods of your own beside the others: module:Class or file.py:Class, subclasses of saap_lab.method.Method",
    )


def add_tables(parser: argparse.ArgumentParser, plots: str = "") -> None:
    """--csv, --latex and --plots; plots : endings that are drawn if nothing else is said."""
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all figures there, a row for each method and budget")
    parser.add_argument("--latex", type=Path, metavar="FILE", help="write tables with booktabs' rules there")
    said = plots or "none"
    parser.add_argument("--plots", default=plots, help=f"endings of the pictures drawn, of {', '.join(ENDINGS)} (default {said})")


def check_tables(options: argparse.Namespace) -> tuple[str, ...]:
    """The endings of --plots. ParameterError for others, and for files that could not be written when all is measured."""
    for name in ("csv", "latex"):
        file = getattr(options, name)
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise ParameterError(f"{name}: expected a file in a folder that is there, got {file}")
    endings = names(options.plots)
    if endings:
        check_names("plots", endings, ENDINGS)
    return endings


def computing(options: argparse.Namespace) -> dict[str, str]:
    """Set the threads, and return device and dtype as `load_model` takes them. DeviceError for a device that is not there."""
    check_count("threads", options.threads, 1)
    checked_device(options.device)
    torch.set_num_threads(options.threads)
    return {"device": options.device, "dtype": options.dtype}


def numbers(name: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """Numbers separated by commas; ParameterError, naming the flag, for others."""
    try:
        return tuple(kind(x) for x in text.split(","))
    except ValueError:
        raise ParameterError(f"{name}: expected numbers separated by commas, got {text!r}") from None


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def check_names(what: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    """ParameterError unless there is a name and all are allowed."""
    names, allowed = tuple(names), tuple(allowed)
    unknown = [name for name in names if name not in allowed]
    if unknown or not names:
        raise ParameterError(f"{what}: expected some of {', '.join(allowed)}, got {', '.join(unknown) or 'none'}")


def check_count(what: str, count: int, least: int) -> None:
    """ParameterError, naming the flag, for fewer than ``least``."""
    if count < least:
        raise ParameterError(f"{what}: expected {least} or more, got {count}")


def check_shares(what: str, shares: Iterable[float]) -> None:
    """ParameterError unless there is a share and all lie in (0, 1]."""
    shares = tuple(shares)
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ParameterError(f"{what}: expected shares in (0, 1], as 0.05 for 5 %, got {', '.join(map(str, shares)) or 'none'}")
