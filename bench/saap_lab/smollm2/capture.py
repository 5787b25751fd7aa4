"""Captures of the small model: which layers and positions, and files to keep them in. Knows no indexes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saap_index import files
from saap_index.errors import FormatError
from saap_index.pipeline.capture import Capture, LayerCapture, capture, training_positions

from .progress import Progress

__all__ = [
    "LAYERS",
    "Capture",
    "LayerCapture",
    "capture",
    "capture_to",
    "load",
    "save",
    "training_positions",
    "unseen_positions",
]

LAYERS = (3, 8, 14, 20, 26)
"""Layers of the small model that stand for all of them: two early ones, where few tokens draw much attention, and three late."""

LENGTH = 8192
UNSEEN_SPAN = 512
UNSEEN_STEP = 16


def unseen_positions(length: int) -> Tensor:
    """Positions of the unseen queries: every 16th of the last 512.

    Returns
    -------
    Tensor
        int64 (q,), ascending.
    """
    return torch.arange(max(length - UNSEEN_SPAN, 0), length, UNSEEN_STEP, dtype=torch.int64, device="cpu")


def capture_to(
    folder: Path,
    stem: str,
    model: Any,
    sequences: Sequence[tuple[str, Sequence[int]]],
    layers: Iterable[int],
    positions_of: Callable[[int, int], Tensor],
    progress: Progress | None = None,
    first: int = 0,
) -> list[Path]:
    """Capture sequences into ``<folder>/<stem>_<number>.safetensors``; files that are there already are not made again.

    Parameters
    ----------
    folder : Path
        Created if needed.
    stem : str
    model : transformers.PreTrainedModel
    sequences : sequence of (name, tokens)
    layers : iterable of int
    positions_of : callable (length, number) -> int64 (q,)
        Positions of the queries of a sequence.
    progress : Progress, optional
        Is told of each sequence.
    first : int
        Number of the first sequence.

    Returns
    -------
    list of Path
        One file per sequence, in order.
    """
    files.make_folder(folder)
    wanted = sorted(set(layers))
    paths = []
    for number, (name, tokens) in enumerate(sequences, start=first):
        path = folder / f"{stem}_{number:03d}.safetensors"
        is_done = path.exists()
        if not is_done:
            save(path, capture(model, tokens, wanted, positions_of(len(tokens), number), name))
        paths.append(path)
        if progress is not None:
            progress.step(is_skipped=is_done)
    return paths


def save(path: Path, captured: Capture) -> None:
    """Write a capture; the file appears only when it is complete."""
    arrays = {"tokens": captured.tokens, "positions": captured.positions}
    for layer, row in captured.layers.items():
        arrays |= {f"keys.{layer}": row.keys, f"values.{layer}": row.values, f"queries.{layer}": row.queries}
    files.write_tensors(path, arrays, {"name": captured.name})


def load(path: Path, layers: Iterable[int] | None = None) -> Capture:
    """Read a capture, or some layers of it.

    Raises
    ------
    FormatError
        The file lacks an array or a layer.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        held = sorted(int(name.partition(".")[2]) for name in names if name.startswith("keys."))
        wanted = held if layers is None else list(layers)
        needed = {"tokens", "positions"} | {f"{part}.{layer}" for layer in wanted for part in ("keys", "values", "queries")}
        if needed - names:
            raise FormatError(f"{path.name}: expected the arrays {sorted(needed - names)}, got layers {held}")
        rows = {
            layer: LayerCapture(*(file.get_tensor(f"{part}.{layer}") for part in ("keys", "values", "queries")))
            for layer in wanted
        }
        name = (file.metadata() or {}).get("name", "")
        return Capture(name, file.get_tensor("tokens"), file.get_tensor("positions"), rows)
