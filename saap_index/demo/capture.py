"""Keys, values and queries of a transformers model over real text, as an index receives them, and files to keep them in.

A capture runs one token sequence through the decoder layers and stops after the last wanted one; no logits are computed. Works
with decoder models of transformers whose attention goes through ``AttentionInterface``. Knows nothing of indexes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ..errors import FormatError, LengthError, ParameterError

LAYERS = (3, 8, 14, 20, 26)
"""Layers of the small model that stand for all of them: two early ones, where few tokens draw much attention, and three late."""

LENGTH = 8192
TRAINING_QUERIES = 256
TRAINING_FIRST = 1024
UNSEEN_SPAN = 512
UNSEEN_STEP = 16

_NAME = "saap_capture"


@dataclass(frozen=True)
class LayerCapture:
    """What one attention layer saw of one sequence.

    keys : float32 (1, h, n, d), after RoPE
    values : float32 (1, h, n, dv)
    queries : float32 (1, hq, q, d), after RoPE, at the capture's positions
    """

    keys: Tensor
    values: Tensor
    queries: Tensor


@dataclass(frozen=True)
class Capture:
    """One sequence.

    name : the kind of text and the documents
    tokens : int64 (n,)
    positions : int64 (q,), of the queries
    layers : by number of the decoder layer
    """

    name: str
    tokens: Tensor
    positions: Tensor
    layers: dict[int, LayerCapture]


def training_positions(length: int, seed: int) -> Tensor:
    """Positions of the training queries: up to 256 different random ones of [1024, length).

    Of a sequence shorter than 8192 tokens, the first eighth is left out.

    Returns
    -------
    Tensor
        int64 (q,), ascending.
    """
    first = min(TRAINING_FIRST, length // 8)
    shuffled = torch.randperm(length - first, generator=torch.Generator().manual_seed(seed))
    return shuffled[:TRAINING_QUERIES].sort().values + first


def unseen_positions(length: int) -> Tensor:
    """Positions of the unseen queries: every 16th of the last 512.

    Returns
    -------
    Tensor
        int64 (q,), ascending.
    """
    return torch.arange(max(length - UNSEEN_SPAN, 0), length, UNSEEN_STEP)


def capture(model: Any, tokens: Sequence[int], layers: Iterable[int], positions: Tensor, name: str = "") -> Capture:
    """Run a model over one sequence and keep keys, values and queries of the wanted layers.

    The model is left as it was, also after an error.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder with full causal attention, as ``AutoModelForCausalLM`` returns it.
    tokens : sequence of int, n
    layers : iterable of int
        Numbers of decoder layers, from 0.
    positions : int64 (q,)
        Positions at which queries are kept, in [0, n).
    name : str
        What the capture is called.

    Returns
    -------
    Capture
        On the CPU.
    """
    wanted = sorted(set(layers))
    depth = model.config.num_hidden_layers
    if not wanted or wanted[0] < 0 or wanted[-1] >= depth:
        raise ParameterError(f"layers: expected at least one number of [0, {depth}), got {wanted}")
    if positions.numel() and (int(positions.min()) < 0 or int(positions.max()) >= len(tokens)):
        raise LengthError(f"positions: expected positions in [0, {len(tokens)}), got {positions.tolist()}")
    found: dict[int, LayerCapture] = {}

    def keep(layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        if layer in wanted:
            arrays = (key, value, query[:, :, positions.to(query.device)])
            found[layer] = LayerCapture(*(array.to("cpu", torch.float32, copy=True).contiguous() for array in arrays))
        if layer == wanted[-1]:
            raise _Finished

    ids = torch.tensor([list(tokens)], dtype=torch.int64)
    with torch.inference_mode(), _recording(model, keep), suppress(_Finished):
        model.base_model(ids.to(model.device), use_cache=False)
    # Tensors made in inference mode could not be trained on.
    kept = {layer: LayerCapture(row.keys.clone(), row.values.clone(), row.queries.clone()) for layer, row in found.items()}
    return Capture(name, ids[0], positions.clone(), kept)


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
    folder.mkdir(parents=True, exist_ok=True)
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
    from safetensors.torch import save_file

    arrays = {"tokens": captured.tokens, "positions": captured.positions}
    for layer, row in captured.layers.items():
        arrays |= {f"keys.{layer}": row.keys, f"values.{layer}": row.values, f"queries.{layer}": row.queries}
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(arrays, scratch, metadata={"name": captured.name})
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


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


class Progress:
    """A line on the terminal that is rewritten as sequences finish: how many, how long each, and how long is left.

    On a stream that is no terminal every sequence is a line of its own.
    """

    def __init__(self, total: int, what: str = "sequences", stream: TextIO | None = None) -> None:
        self._total = total
        self._what = what
        self._stream = sys.stderr if stream is None else stream
        self._done = self._skipped = 0
        self._start = time.monotonic()

    def step(self, is_skipped: bool = False) -> None:
        """One more sequence is there; `is_skipped` if it took no time."""
        self._done += 1
        self._skipped += is_skipped
        worked = self._done - self._skipped
        line = f"{self._what} {self._done}/{self._total}"
        if worked:
            each_s = (time.monotonic() - self._start) / worked
            line += f", {each_s:.1f} s each, {_duration(each_s * (self._total - self._done))} left"
        if self._stream.isatty():
            end = "\n" if self._done == self._total else ""
            self._stream.write(f"\r\x1b[K{line}{end}")
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class _Finished(Exception):
    """Raised inside the model when the last wanted layer has been seen."""


@contextmanager
def _recording(model: Any, keep: Callable[[int, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Give every attention layer's query, key and value to `keep`, and compute what ``sdpa`` computes."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        keep(module.layer_idx, query, key, value)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    try:
        model.set_attn_implementation(_NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        # transformers has no call that takes a registration back.
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(_NAME, None)
