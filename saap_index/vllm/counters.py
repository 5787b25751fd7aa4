"""What this process has read so far. Knows no vLLM."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

EVERY_SECONDS = 10.0


@dataclass
class Counters:
    """Sums over layers. sparse_queries, dense_queries : query tokens answered from a selection, and from all tokens; rows_read,
    rows_stored : of K and V per KV head that the sparse ones read, and that they would have read densely."""

    sparse_queries: int = 0
    dense_queries: int = 0
    rows_read: int = 0
    rows_stored: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        share = f"{100 * self.rows_read / self.rows_stored:.1f} % of the rows read" if self.rows_stored else "nothing selected"
        return f"saap_index: {self.sparse_queries} sparse and {self.dense_queries} dense queries of layers, {share}"


COUNTERS = Counters()


class Ticker:
    """Says when it is time for a line again: not more often than every so many seconds, and only if something changed."""

    def __init__(self) -> None:
        self._next, self._said = time.monotonic() + EVERY_SECONDS, COUNTERS.line()

    def line(self) -> str | None:
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + EVERY_SECONDS
        said, self._said = self._said, COUNTERS.line()
        return None if said == self._said else self._said
