"""Queries of a prompt, sampled as it is read, for routers to be trained on. Knows positions, no routers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..training.prompt import priorities


def _none() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class QuerySample:
    """Up to ``count`` queries of one sequence of a batch, of one layer; never changed, so that a call that fails leaves no trace.

    sequence : the first one without padding, None before the first call; positions : int64 (q,); queries : storage dtype
    (hq, q, d), as attention saw them; weight : what attention adds to the hidden state there, see `weighing`, None until a call
    is through.
    """

    count: int
    seed: int
    sequence: int | None = None
    positions: np.ndarray = field(default_factory=_none, repr=False)
    queries: Tensor | None = field(default=None, repr=False)
    weight: float | None = None

    def picked(self, sequences: Sequence[int]) -> QuerySample | None:
        """Of a batch of these sequences of the one before; None if its own is not among them."""
        if self.sequence is None:
            return self
        return replace(self, sequence=list(sequences).index(self.sequence)) if self.sequence in sequences else None

    def with_call(self, query: Tensor, start: int, visible: Tensor | None) -> QuerySample | None:
        """With those of a call among them; None if no sequence is whole, as far as the call goes.

        query : (b, hq, q, d), at positions start, start + 1, ...; visible : bool (b, n), which slots are tokens; None: all.
        """
        sequence = 0 if self.sequence is None else self.sequence
        if visible is not None:
            whole = visible.all(1).cpu().numpy()
            if self.sequence is None:
                sequence = int(np.argmax(whole))
            if not whole[sequence]:
                return None
        fresh = np.arange(start, start + query.shape[2], dtype=np.int64)
        positions = np.concatenate([self.positions, fresh])
        best = np.sort(np.argsort(-priorities(positions, self.seed), kind="stable")[: self.count])
        old = len(self.positions)
        rows = torch.from_numpy(best[best >= old] - old).to(query.device)
        queries = query[sequence].detach()[:, rows]
        if self.queries is not None:
            kept = torch.from_numpy(best[best < old]).to(query.device)
            queries = torch.cat([self.queries.to(query)[:, kept], queries], 1)
        return replace(self, sequence=sequence, positions=positions[best], queries=queries)
