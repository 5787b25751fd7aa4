"""What an index does with tokens it holds: forget, take out, give back, copy, move. Knows nothing of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from typing_extensions import Self

from . import checks
from ._base import IndexBase
from .backends import get_backend
from .errors import LengthError, ParameterError, ShapeError, StateError
from .invlists.segmented import SegmentedInvertedLists
from .search.stats import IndexStats, gather


class IndexStorage(IndexBase):
    """The storage half of `AsymmetricIndex`; see there."""

    __slots__ = ()

    def _new_lists(self, batch: int) -> SegmentedInvertedLists:
        shape = (batch, self.num_kv_heads, self.d, self.d_v, self.nlist)
        return SegmentedInvertedLists(self._backend, self._layout, *shape, self.dtype)

    # -- shrinking, copying, memory ------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget every token; keep the training and the memory. The next `add` may bring another batch size."""
        if self._lists is not None:
            self._lists.clear()
        self._last = None

    def truncate(self, n: int | Sequence[int]) -> None:
        """Keep the first n tokens of every sequence (or n[i] of sequence i), in the state they were in at that length.

        Raises LengthError beyond the end, ShapeError for another number of sequences; the index is unchanged then.
        """
        if self._lists is None:
            one = isinstance(n, int | np.integer)  # an empty index may become a batch of any size
            checks.counts(n, 1 if one else len(n), 0, "n")  # type: ignore[arg-type]
            return
        keep = checks.counts(n, self._lists.batch, 2**31 - 1, "n")
        for i, (count, length) in enumerate(zip(keep, self._lists.lengths, strict=True)):
            if count > length:
                raise LengthError(f"n: expected at most the {length} tokens of sequence {i}, got {count}")
        for i, count in enumerate(keep):
            self._lists.truncate(i, count, self._assign_rows)

    def remove_ids(self, ids: Any, *, close_gaps: bool = False) -> int:
        """Take tokens out: int64 ids (n,) in every sequence, or one such array per sequence. Others keep their positions.

        Ids that are not stored are ignored, as in FAISS. Returns the number of tokens removed, summed over the sequences.
        close_gaps : those behind a removed one move up, as if it had never been there; for padding, whose place the model did
            not count when it rotated the others.
        """
        lists = self._lists
        if lists is None:
            return 0
        nested = isinstance(ids, list | tuple) and len(ids) > 0 and not isinstance(ids[0], int | np.integer)
        per_sequence = list(ids) if nested else [ids] * lists.batch
        if len(per_sequence) != lists.batch:
            raise ShapeError(f"ids: expected one array per sequence ({lists.batch}), got {len(per_sequence)}")
        chosen = [checks.ids(x, f"ids[{i}]" if nested else "ids") for i, x in enumerate(per_sequence)]
        removed = 0
        for i, wanted in enumerate(chosen):
            ranks = np.flatnonzero(np.isin(lists.positions(i, np.arange(lists.lengths[i])), wanted))
            lists.remove(i, ranks, self._assign_rows, close_gaps)
            removed += len(ranks)
        return removed

    def reconstruct(self, ids: Any, sequence: int = 0) -> tuple[Any, Any]:
        """Keys (h, n, d) and values (h, n, e) of the tokens with these ids, as they were added.

        Raises LengthError for an id that is not stored, ParameterError for a sequence that is not there.
        """
        wanted = checks.ids([ids] if isinstance(ids, int | np.integer) else ids, "ids")
        sequence = checks.integer(sequence, "sequence", 0, max(0, len(self.lengths) - 1))
        stored = self.invlists.row_ids(sequence).long() if self.ntotal else torch.empty((1, 0), dtype=torch.int64, device="cpu")
        found, order = stored.sort(dim=1)
        missing = np.setdiff1d(wanted, found[0].cpu().numpy())
        if len(missing):
            raise LengthError(f"ids: expected ids that are stored, got {missing[0]}")
        targets = torch.from_numpy(wanted).to(stored.device).expand(len(stored), -1).contiguous()
        rows = order.gather(1, torch.searchsorted(found, targets))[:, :, None]
        keys, values = self.invlists.keys[sequence], self.invlists.values[sequence]
        return tuple(x.gather(1, rows.expand(-1, -1, x.shape[2])) for x in (keys, values))  # type: ignore[return-value]

    def fork(self, sequences: Sequence[int] | None = None) -> Self:
        """An independent copy with the same training, of all sequences or of those named, in that order (beam search).

        Copies the tokens in use: the cost is that of reading and writing them once.
        """
        new = self._clone()
        if self._lists is not None:
            chosen = list(range(self._lists.batch)) if sequences is None else list(sequences)
            if not chosen:
                raise ParameterError("sequences: expected at least one, got none")
            for s in chosen:
                checks.integer(s, "sequences", 0, self._lists.batch - 1)
            new._lists = self._lists.fork(chosen)
        return new

    def __copy__(self) -> Self:
        """A copy is a `fork`: tokens of its own, the training shared."""
        return self.fork()

    def __deepcopy__(self, memo: Any) -> Self:
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StateError("pickle: expected write_index and read_index, which keep an index in a file, got an index to pickle")

    def reorder(self, sequences: Sequence[int]) -> None:
        """Sequence i becomes what sequences[i] was, in place (a step of beam search): `fork`, but sequences that stem from one
        another copy only what came since. Raises ShapeError for another number of sequences, ParameterError for one not there.
        """
        chosen = [int(i) for i in sequences]
        if self._lists is None:
            return
        if len(chosen) != self._lists.batch:
            raise ShapeError(f"sequences: expected one per sequence ({self._lists.batch}), got {len(chosen)}")
        for s in chosen:
            checks.integer(s, "sequences", 0, self._lists.batch - 1)
        self._lists.reorder(chosen)

    def to(self, device: torch.device | str) -> Self:
        """This index on another device: itself if it is there already, else a copy."""
        device = checks.device(device)
        if device == self.device:
            return self
        new = self._clone(device)
        if self._lists is not None:
            new._lists = self._lists.to(new._backend, device)
        return new

    def _clone(self, device: torch.device | None = None) -> Self:
        new = object.__new__(type(self))
        for name in IndexBase.__slots__:
            if name != "__weakref__":
                setattr(new, name, getattr(self, name))
        new._lists = new._last = None
        new._accepted, new._accepted_new, new._asked = (), (), (None, {})
        if device is not None:
            new.device, new._backend, new.backend_name = device, get_backend(device), None
            if self._key_quantizer is not None:
                new.key_quantizer = self._key_quantizer
            if self._query_router is not None:
                new.query_router = self._query_router
            new.calibration = self._calibration
            new._tower = None if self._tower is None else self._tower.to(device)
        new._name_for_compiler()
        return new

    def reserve_memory(self, n: int, batch: int | None = None) -> None:
        """Make room for n tokens per sequence, so that no `add` up to there allocates. ``batch``: for an empty index."""
        checks.integer(n, "n", 0)
        size = checks.integer(batch, "batch", 1) if batch is not None else max(1, len(self.lengths))
        if self._lists is None or (self._lists.batch != size and not self.ntotal):
            self._lists = self._new_lists(size)
        elif self._lists.batch != size:
            raise ShapeError(f"batch: expected {self._lists.batch}, the sequences stored, got {size}")
        self._lists.reserve(n)

    def reclaim_memory(self) -> int:
        """Give back memory that no token uses; returns the bytes freed."""
        return 0 if self._lists is None else self._lists.reclaim()

    def stats(self) -> IndexStats:
        """What the index holds, and what its last search read. Reads device memory: not for the decode path."""
        return gather(self._lists, self._last, self._key_quantizer, self._query_router)
