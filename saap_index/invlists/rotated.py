"""At which length of its sequence each token was rotated, where the angles depend on it. Knows numbers, no angles.

Tokens of one call were rotated at one length, so what is kept is runs: a prompt is one, and so is everything behind it while the
frequencies stay the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import FormatError

Run = tuple[int, int]
"""(rank of the first token, length its frequencies are those of); 0 for the unscaled ones. Up to the next run, or the end."""


class RotationLengths:
    """Of every sequence of a batch; a token is named by its rank, 0 for the oldest that is stored.

    `append` alone changes it in place, and nothing that is said of older tokens: who knows how many there were has lost nothing.
    """

    def __init__(self, batch: int) -> None:
        self.runs: list[list[Run]] = [[] for _ in range(batch)]

    def append(self, i: int, rank: int, length: int) -> None:
        """The tokens of sequence i from ``rank`` on were rotated at ``length``."""
        runs = self.runs[i]
        while runs and runs[-1][0] >= rank:
            runs.pop()
        if (runs[-1][1] if runs else 0) != length:
            runs.append((rank, length))

    def at(self, i: int, start: int, stop: int) -> np.ndarray:
        """Of the tokens with ranks in [start, stop): int64 (stop - start,)."""
        runs = self.runs[i]
        lengths = np.zeros(max(0, stop - start), np.int64)
        low = max(0, bisect_right(runs, start, key=lambda run: run[0]) - 1)
        for rank, length in runs[low:]:
            if rank >= stop:
                break
            lengths[max(0, rank - start) :] = length
        return lengths

    def truncated(self, i: int, count: int) -> RotationLengths:
        """The same with no more than the first ``count`` tokens of sequence i."""
        return self._with(i, [run for run in self.runs[i] if run[0] < count])

    def without(self, i: int, ranks: np.ndarray) -> RotationLengths:
        """The same without the tokens with these ranks (sorted, unique) of sequence i; those behind them move up."""
        new = self._with(i, [])
        for rank, length in self.runs[i]:
            new.append(i, rank - int(np.searchsorted(ranks, rank)), length)
        return new

    def _with(self, i: int, runs: list[Run]) -> RotationLengths:
        new = RotationLengths(0)
        new.runs = [*self.runs[:i], runs, *self.runs[i + 1 :]]
        return new

    def pick(self, sequences: Sequence[int]) -> RotationLengths:
        """Those of other sequences, in their order."""
        new = RotationLengths(0)
        new.runs = [list(self.runs[i]) for i in sequences]
        return new

    def tensor(self) -> Tensor:
        """The runs of all sequences behind each other, for a file: int64 (r, 2)."""
        return torch.tensor([run for runs in self.runs for run in runs], dtype=torch.int64, device="cpu").reshape(-1, 2)

    @classmethod
    def of(cls, runs: Tensor, counts: Sequence[int], lengths: Sequence[int]) -> RotationLengths:
        """The inverse of `tensor`, for counts[i] runs of sequence i of lengths[i] tokens; FormatError if they are none."""
        new, pairs, begin = cls(0), runs.tolist(), 0
        for count, length in zip(counts, lengths, strict=True):
            part = [(int(rank), int(at)) for rank, at in pairs[begin : begin + count]]
            begin += count
            ranks = [rank for rank, _ in part]
            if len(part) != count or ranks != sorted(set(ranks)) or not all(0 <= r < length and a >= 0 for r, a in part):
                raise FormatError(f"rotated: expected {count} runs with rising ranks in [0, {length}), got {part[:4]}")
            new.runs.append(part)
        if begin != len(pairs):
            raise FormatError(f"rotated: expected {begin} runs, got {len(pairs)}")
        return new
