"""Checks of arguments: each raises a named error that says which argument, what was expected and what came."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import DeviceError, DTypeError, LayoutError, LengthError, NotFiniteError, ParameterError, ShapeError

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def integer(value: object, name: str, least: int, most: int = 2**31 - 1) -> int:
    """``value`` as int in [least, most]; ParameterError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= int(value) <= most:
        raise ParameterError(f"{name}: expected an integer in [{least}, {most}], got {value!r}")
    return int(value)


def named_device(value: torch.device | str) -> torch.device:
    """``value`` as a torch device, there or not; DeviceError for one that torch does not know."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"device: expected a torch device, got {value!r}") from error


def device(value: torch.device | str) -> torch.device:
    """``value`` as a torch device, with the number of the current one if it has none ("cuda" alone would accept tensors of any).
    DeviceError for one that torch does not know, or that is not there."""
    device = named_device(value)
    try:
        there = torch.empty(1, dtype=torch.uint8, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:  # each kind of device in its own words
        raise DeviceError(f"device: expected one that is there, got {str(device)!r}: {str(error).splitlines()[0]}") from error
    return there if device.index is None else device


def tensor(value: Any, name: str) -> Tensor:
    """A torch tensor, the same memory of a NumPy array, or lists of numbers as float32 or int64; DTypeError for anything else."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray):
        try:
            x = torch.from_numpy(value if value.flags.writeable else value.copy())  # torch warns of memory it may not write
            return x if value.size else x.new_empty(value.shape)  # of no row, strides are zero
        except (TypeError, ValueError) as error:
            raise DTypeError(f"{name}: expected an array torch can read, got NumPy {value.dtype}") from error
    if isinstance(value, list | tuple):
        try:
            listed = np.asarray(value)
        except ValueError as error:
            raise ShapeError(f"{name}: expected lists of equal lengths, got others") from error
        if listed.dtype.kind in "iuf":
            return torch.from_numpy(listed.astype(np.float32 if listed.dtype.kind == "f" else np.int64))
    raise DTypeError(f"{name}: expected a torch tensor, NumPy array or lists of numbers, got {type(value).__name__}")


def array(
    x: Tensor, name: str, axes: str, shape: Sequence[int | None], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Check shape (None: any size), dtype, device and contiguous rows; ``axes`` names the axes in messages."""
    if x.ndim != len(shape) or any(want is not None and got != want for got, want in zip(x.shape, shape, strict=True)):
        want = ", ".join(axis if size is None else str(size) for axis, size in zip(axes.split(), shape, strict=True))
        raise ShapeError(f"{name}: expected shape ({want}), got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise DTypeError(f"{name}: expected {wanted}, got {str(x.dtype).removeprefix('torch.')}")
    if x.device.type != device.type or (device.index is not None and x.device.index != device.index):
        raise DeviceError(f"{name}: expected device {device}, got {x.device}")
    if x.ndim and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise LayoutError(f"{name}: expected contiguous rows (stride 1 along the last axis), got stride {x.stride(-1)}")


def finite(x: Tensor, name: str) -> None:
    """NotFiniteError if ``x`` holds NaN or infinity; memory that an expanded axis repeats is looked at once."""
    for axis, step in enumerate(x.stride()):
        x = x.narrow(axis, 0, min(1, x.shape[axis])) if step == 0 else x
    if not bool(torch.isfinite(x).all()):
        raise NotFiniteError(f"{name}: expected finite numbers, got NaN or infinity")


def counts(lengths: Any, batch: int, most: int, name: str = "lengths") -> list[int]:
    """Tokens per sequence from None (all), an int, or b ints, each in [0, most]; LengthError or ShapeError otherwise."""
    if lengths is None:
        return [most] * batch
    if isinstance(lengths, int | np.integer) and not isinstance(lengths, bool):
        numbers = [int(lengths)] * batch
    else:
        try:
            numbers = [operator.index(n) for n in lengths]
        except (TypeError, ValueError) as error:
            raise ShapeError(f"{name}: expected an integer or {batch} integers, got {lengths!r}") from error
    if len(numbers) != batch:
        raise ShapeError(f"{name}: expected one integer per sequence ({batch}), got {len(numbers)}")
    for n in numbers:
        if not 0 <= n <= most:
            raise LengthError(f"{name}: expected integers in [0, {most}], got {n}")
    return numbers


def kept(n: Any, lengths: Sequence[int] | None) -> list[int]:
    """How many tokens to keep of sequences of these lengths, from an int or one each; None: of a batch of any size, all empty.

    LengthError beyond the end, ShapeError for another number of sequences.
    """
    if lengths is None:
        return counts(n, 1 if isinstance(n, int | np.integer) else len(n), 0, "n")
    numbers = counts(n, len(lengths), 2**31 - 1, "n")
    for i, (count, length) in enumerate(zip(numbers, lengths, strict=True)):
        if count > length:
            raise LengthError(f"n: expected at most the {length} tokens of sequence {i}, got {count}")
    return numbers


def sequences(numbers: Any, batch: int, complete: bool = False) -> list[int]:
    """Checked numbers of sequences of a batch, as many as there are if ``complete``; ParameterError or ShapeError otherwise."""
    chosen = list(numbers)
    if complete and len(chosen) != batch:
        raise ShapeError(f"sequences: expected one per sequence ({batch}), got {len(chosen)}")
    if not chosen:
        raise ParameterError("sequences: expected at least one, got none")
    return [integer(s, "sequences", 0, batch - 1) for s in chosen]


def list_numbers(x: Tensor, name: str, nlist: int, least: int = 0) -> None:
    """ParameterError unless every list number lies in [least, nlist)."""
    if x.numel():
        low, high = int(x.min()), int(x.max())
        if low < least or high >= nlist:
            raise ParameterError(f"{name}: expected list numbers in [{least}, {nlist}), got {low} to {high}")


def positions(positions: Any, b: int, q: int, n: int) -> np.ndarray:
    """Checked positions of training queries, int64 (b, q)."""
    if positions is None:
        positions = np.arange(n - q, n)
    listed = isinstance(positions, list | tuple | range)
    places = tensor(np.asarray(positions) if listed else positions, "positions").cpu().numpy()
    if places.size and places.dtype.kind not in "iu":
        raise DTypeError(f"positions: expected integers, got {places.dtype}")
    if places.shape not in ((q,), (b, q)):
        raise ShapeError(f"positions: expected shape ({b}, {q}) or ({q},), got {places.shape}")
    if places.size and (places.min() < 0 or places.max() >= n):
        raise LengthError(f"positions: expected integers in [0, {n}), got {places.min()} to {places.max()}")
    return np.broadcast_to(places, (b, q)).astype(np.int64)


def token_ids(ids: Any, name: str) -> np.ndarray:
    """Checked token ids, int64 (n,)."""
    x = tensor(np.asarray(ids) if isinstance(ids, list | tuple | range) else ids, name).cpu().numpy()
    if x.size and x.dtype.kind not in "iu":
        raise DTypeError(f"{name}: expected integers (n,), got {x.dtype}")
    if x.ndim != 1:
        raise ShapeError(f"{name}: expected shape (n,), got {x.shape}")
    return x.astype(np.int64)


def ids_per_sequence(ids: Any, batch: int) -> list[np.ndarray]:
    """Checked token ids of every sequence, int64 (n,), from one array for all or one each; ShapeError for another number."""
    nested = isinstance(ids, list | tuple) and len(ids) > 0 and not isinstance(ids[0], int | np.integer)
    arrays = list(ids) if nested else [ids] * batch
    if len(arrays) != batch:
        raise ShapeError(f"ids: expected one array per sequence ({batch}), got {len(arrays)}")
    return [token_ids(x, f"ids[{i}]" if nested else "ids") for i, x in enumerate(arrays)]


def shares(value: Any, name: str, heads: int) -> np.ndarray:
    """Checked factors per KV head, float32 (h,), finite and not negative."""
    try:
        x = np.array(value.detach().cpu().numpy() if isinstance(value, Tensor) else value, np.float32)
    except (TypeError, ValueError) as error:
        raise ParameterError(f"{name}: expected {heads} numbers or None, got {value!r}") from error
    if x.shape != (heads,):
        raise ShapeError(f"{name}: expected shape ({heads},), one factor per KV head, got {x.shape}")
    if not (np.isfinite(x).all() and (x >= 0).all()):
        raise ParameterError(f"{name}: expected finite numbers of 0 or more, got {x.tolist()}")
    return x
