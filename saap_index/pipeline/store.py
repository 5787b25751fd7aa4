"""Captured keys, values and queries on disk, one file per layer: a pass writes to all of them, training reads one.

Memory stays that of one sequence and layer. Everything is kept in 16 bits, as the cache of a model would. A sequence counts as
captured once it is in the list of those that are; one that was being written when the process ended is written again.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..errors import FormatError, NotFiniteError
from ..training.layer import TrainingSequence

_DONE = "captured.json"


@dataclass(frozen=True)
class StoreShape:
    """sequences : all; held_out : numbers of those whose values are kept too; layers : numbers; heads, kv_heads, d, e; tokens and
    queries : per sequence; dtype : float16 or bfloat16."""

    sequences: int
    held_out: tuple[int, ...]
    layers: tuple[int, ...]
    heads: int
    kv_heads: int
    d: int
    e: int
    tokens: int
    queries: int
    dtype: torch.dtype

    @property
    def total_bytes(self) -> int:
        """What everything takes on disk."""
        keys, values = self.kv_heads * self.tokens * self.d, self.kv_heads * self.tokens * self.e
        queries = self.heads * self.queries * self.d
        return 2 * len(self.layers) * (self.sequences * (keys + queries) + len(self.held_out) * values)


class CaptureStore:
    """Files in one folder. ``done`` : numbers of the sequences that are complete."""

    def __init__(self, folder: Path, shape: StoreShape) -> None:
        self.folder, self.shape = folder, shape
        files.make_folder(folder)
        done = folder / _DONE
        said = files.read_json(done, "the sequences captured so far") if done.exists() else {}
        try:
            self.done: dict[int, dict[str, float]] = {int(number): _weights(weights) for number, weights in said.items()}
        except (ValueError, AttributeError, TypeError, OverflowError) as error:
            raise FormatError(f"{done.name}: expected the sequences captured so far, got {error}") from error
        for number, weights in self.done.items():
            layers = set(map(str, shape.layers)) if number in shape.held_out else set()
            if not 0 <= number < shape.sequences or set(weights) != layers:
                raise FormatError(f"{done.name}: expected weights of the layers of sequence {number}, got {weights}")
            self._check_files(number)
        self._written: set[Path] = set()

    def write(self, number: int, layer: int, key: Tensor, value: Tensor, query: Tensor) -> None:
        """One layer of one sequence. key : (h, n, d), value : (h, n, e), query : (hq, q, d), float, on any device.

        Raises NotFiniteError if a number is infinite, NaN, or too large for 16 bits.
        """
        parts = [("keys", number, key), ("queries", number, query)]
        if number in self.shape.held_out:
            parts.append(("values", self.shape.held_out.index(number), value))
        for what, place, x in parts:
            narrow = x.to("cpu", self.shape.dtype).contiguous()
            if not bool(torch.isfinite(narrow).all()):
                raise NotFiniteError(f"layer {layer}, {what}: expected finite numbers in {self.shape.dtype}; try dtype bfloat16")
            raw = narrow.view(torch.int16).numpy()
            path = self._file(layer, what)
            files.write_at(path, place * raw.nbytes, raw.tobytes())  # sequences may come in any order
            self._written.add(path)

    def finish(self, number: int, weights: Mapping[int, float]) -> None:
        """Every layer of a sequence is written. weights : of layers, see `hf.weighing`, for one that is held out."""
        files.sync(self._written)  # what is said to be captured is on the disk
        self._written.clear()
        done = {**self.done, number: {str(layer): weight for layer, weight in weights.items()}}
        files.write_json(self.folder / _DONE, done, sort_keys=True, indent=None)
        self.done = done

    def weight(self, layer: int) -> float:
        """Mean weight of a layer over the sequences held out."""
        figures = [self.done[number][str(layer)] for number in self.shape.held_out]
        return sum(figures) / len(figures)

    def keys(self, layer: int, number: int) -> Tensor:
        """(h, n, d), in 16 bits."""
        s = self.shape
        return self._read(layer, "keys", number, (s.kv_heads, s.tokens, s.d))

    def queries(self, layer: int, number: int) -> Tensor:
        """(hq, q, d), in 16 bits."""
        s = self.shape
        return self._read(layer, "queries", number, (s.heads, s.queries, s.d))

    def values(self, layer: int, number: int) -> Tensor:
        """(h, n, e), in 16 bits, of a sequence that is held out."""
        s = self.shape
        return self._read(layer, "values", s.held_out.index(number), (s.kv_heads, s.tokens, s.e))

    def layer(self, layer: int, numbers: Sequence[int], positions: Sequence[np.ndarray], device: torch.device) -> LayerSequences:
        """Some sequences of a layer as training reads them; positions : int64 (q,) of each."""
        return LayerSequences(self, layer, numbers, positions, device)

    def _read(self, layer: int, what: str, place: int, shape: tuple[int, ...]) -> Tensor:
        raw = np.empty(shape, np.int16)
        with self._file(layer, what).open("rb") as file:
            file.seek(place * raw.nbytes)
            got = file.readinto(raw.reshape(-1).view(np.uint8).data)
        if got != raw.nbytes:
            raise FormatError(f"layer {layer}, {what}: expected {raw.nbytes} bytes of sequence {place}, got {got}")
        return torch.from_numpy(raw).view(self.shape.dtype)

    def _check_files(self, number: int) -> None:
        """FormatError unless the files are as long as a sequence that is said to be captured needs."""
        s = self.shape
        sizes = {"keys": (number, s.kv_heads * s.tokens * s.d), "queries": (number, s.heads * s.queries * s.d)}
        if number in s.held_out:
            sizes["values"] = s.held_out.index(number), s.kv_heads * s.tokens * s.e
        for layer in s.layers:
            for what, (place, count) in sizes.items():
                path = self._file(layer, what)
                least, got = 2 * count * (place + 1), path.stat().st_size if path.is_file() else 0
                if got < least:
                    raise FormatError(f"{path.name}: expected {least} bytes or more, sequence {number} is captured, got {got}")

    def _file(self, layer: int, what: str) -> Path:
        return self.folder / f"layer_{layer:03d}.{what}"


def check_space(folder: Path, shape: StoreShape) -> None:
    """OSError unless the disk of a store's folder, there or not yet, has room for what is not captured yet, and a tenth more."""
    total = shape.total_bytes
    there = sum(path.stat().st_blocks * 512 for path in folder.iterdir()) if folder.is_dir() else 0
    disk = next(place for place in (folder, *folder.parents) if place.is_dir())
    need, free = int(1.1 * max(0, total - there)), shutil.disk_usage(disk).free
    if need > free:
        raise OSError(
            errno.ENOSPC,
            f"expected room for {size_in_words(need)} of keys and queries in 16 bits, got {size_in_words(free)} free; train on "
            "fewer --tokens or --layers, some layers at a time (--disk), or name an --out on another disk",
            str(folder),
        )


def parts_of(shape: StoreShape, max_bytes: int | None) -> list[StoreShape]:
    """Stores of some layers each, in order, that take ``max_bytes`` at most, or hold one layer; of all layers for None."""
    each = shape.total_bytes // len(shape.layers)
    some = len(shape.layers) if max_bytes is None else max(1, max_bytes // max(1, each))
    return [replace(shape, layers=shape.layers[at : at + some]) for at in range(0, len(shape.layers), some)]


def size_in_words(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"


def _weights(said: Mapping[str, float]) -> dict[str, float]:
    return {str(int(layer)): float(weight) for layer, weight in said.items()}


class LayerSequences(Sequence[TrainingSequence]):
    """Read one at a time, each time anew."""

    def __init__(
        self, store: CaptureStore, layer: int, numbers: Sequence[int], positions: Sequence[np.ndarray], device: torch.device
    ) -> None:
        self._store, self._layer, self._numbers, self._positions, self._device = store, layer, numbers, positions, device

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> TrainingSequence: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[TrainingSequence]: ...

    def __getitem__(self, at: int | slice) -> TrainingSequence | Sequence[TrainingSequence]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not 0 <= at < len(self):
            raise IndexError(at)
        number = self._numbers[at]
        keys, queries = (
            x.to(self._device) for x in (self._store.keys(self._layer, number), self._store.queries(self._layer, number))
        )
        return keys, queries, self._positions[at]
