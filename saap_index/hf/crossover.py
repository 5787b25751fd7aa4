"""From which length on a sparse step is faster than a dense one on this machine: decided from times, kept in the cache folder.

Knows seconds, lengths and one file; what is timed is the caller's.
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..files import cache_folder
from ..version import __version__

LENGTHS = (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
"""Tokens at which steps are timed. Routers are trained and measured on queries from position 1024 on, so none is shorter."""

NOWHERE = 2**30
"""Tokens, where a sparse step was not faster anywhere and gains nothing as texts get longer."""

FILE = "break_even.json"

Times = Callable[[int], tuple[float, float]]
"""tokens -> seconds of a dense step, seconds of a sparse step"""


@dataclass(frozen=True)
class Crossover:
    """tokens : from so many on a sparse step is faster; steps : (tokens, seconds dense, seconds sparse), as they were timed."""

    tokens: int
    steps: tuple[tuple[int, float, float], ...]


def crossover(times: Times, lengths: Sequence[int] = LENGTHS) -> Crossover:
    """The first of ``lengths``, ascending, from which a sparse step is faster at two in a row: below it stays dense.

    Where the lengths end before that, the line through the last two of them is followed; ``NOWHERE`` if it never gets there.
    """
    steps: list[tuple[int, float, float]] = []
    for n in lengths:
        steps.append((n, *times(n)))
        won = [sparse < dense for _, dense, sparse in steps[-2:]]
        if len(won) == 2 and all(won):
            return Crossover(steps[-2][0], tuple(steps))
    (m, dense_m, sparse_m), (n, dense_n, sparse_n) = steps[-2:]
    gain = ((dense_n - dense_m) - (sparse_n - sparse_m)) / (n - m)  # seconds that a sparse step gains with each token
    behind = max(0.0, sparse_n - dense_n)
    reached = n + behind / gain if gain > 0 else NOWHERE
    return Crossover(min(NOWHERE, max(n, int(reached) + 1)), tuple(steps))


def machine() -> dict[str, Any]:
    """What times depend on beside the shapes: the processor and the versions."""
    import torch

    return {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__, "saap_index": __version__}


def processor() -> str:
    """The processor's name, as the system has it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def kept(key: Mapping[str, Any]) -> Crossover | None:
    """What was measured before for ``key``, plain data; None if nothing was, or the file cannot be read."""
    try:
        entry = json.loads((cache_folder() / FILE).read_text())[_name(key)]
        steps = tuple((int(n), float(dense), float(sparse)) for n, dense, sparse in entry["steps"])
        tokens = entry["tokens"]
        return Crossover(tokens, steps) if isinstance(tokens, int) and 0 < tokens <= NOWHERE else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None  # a cache: what is damaged is measured anew


def keep(key: Mapping[str, Any], measured: Crossover) -> None:
    """Keep a measurement; a folder that cannot be written to keeps none."""
    path = cache_folder() / FILE
    try:
        before = json.loads(path.read_text())
        before = before if isinstance(before, dict) else {}
    except (OSError, ValueError, RecursionError):
        before = {}
    with contextlib.suppress(OSError):
        files.make_folder(path.parent)
        files.write_json(path, {**before, _name(key): asdict(measured)}, sort_keys=True)


def measured(key: Mapping[str, Any], times: Times) -> Crossover:
    """`kept`, or measured now and kept."""
    key = {**machine(), **key}
    measured = kept(key)
    if measured is None:
        measured = crossover(times)
        keep(key, measured)
    return measured


def _name(key: Mapping[str, Any]) -> str:
    return json.dumps(dict(key), sort_keys=True)
