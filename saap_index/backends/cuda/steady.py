"""Steps like the last one: launches that are bound already, in which only the addresses of the step's tensors change.

For the host part of a step: nothing is looked up, and nothing is made but the output. Whoever calls knows that arguments,
parameters and inverted lists are what they were; what may have changed on the side of the device is asked here. None or False
where something has: the longer way then does what is needed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .launch import Launch

_VECTOR = 16


class DeviceSession(Protocol):
    """What of a `CudaSession` is asked here; see there."""

    lengths: list[int] | None
    captured: bool
    lock: Any

    @property
    def generation(self) -> int: ...

    def raw_stream(self) -> int | None: ...

    def steady(self, generation: int, stream: int | None) -> bool: ...


class SteadySearch:
    """`CudaSession.run` of queries like those that it is made with, without lse. select : what routes and selects, the first of
    which takes the queries, as does ``scan``; lse : float32, one for each query vector, which is written and not read."""

    __slots__ = (
        "_d_v", "_generation", "_kept", "_lse", "_scan", "_scan_fields", "_select", "_select_queries", "_session", "_stream",
    )

    def __init__(self, session: DeviceSession, select: Sequence[Launch], scan: Launch, lse: Tensor, d: int, d_v: int) -> None:
        self._session, self._generation, self._stream = session, session.generation, session.raw_stream() or 0
        self._select, self._select_queries = tuple(x.on_stream for x in select), select[0].field("queries")
        self._scan, self._scan_fields = scan.on_stream, tuple(map(scan.field, ("queries", "out", "lse")))
        self._lse, self._kept = lse.data_ptr(), (*select, scan, lse)
        self._d_v = d_v if d_v != d else None

    def __call__(self, queries: Tensor) -> Tensor | None:
        """queries : (b, hq, q, d), contiguous. Returns out (b, hq, q, e), or None."""
        session, stream, address = self._session, self._stream, queries.data_ptr()
        if address % 4 or not session.steady(self._generation, stream):
            return None
        out = torch.empty_like(queries) if self._d_v is None else queries.new_empty((*queries.shape[:3], self._d_v))
        to, of_out, of_lse = self._scan_fields
        with session.lock:
            self._select_queries.value = to.value = address
            of_out.value, of_lse.value = out.data_ptr(), self._lse
            for start in self._select:
                start(stream)
            self._scan(stream)
        return out


class SteadyAppend:
    """`CudaSession.append` of counts[i] tokens to sequence i, laid out like those that it is made with."""

    __slots__ = ("_append", "_counts", "_fields", "_generation", "_kept", "_phase", "_session", "_stream")

    def __init__(self, session: DeviceSession, launch: Launch, keys: Tensor, values: Tensor, counts: Sequence[int]) -> None:
        self._session, self._generation, self._stream = session, session.generation, session.raw_stream() or 0
        self._append, self._fields, self._counts = launch.on_stream, (launch.field("keys"), launch.field("values")), counts
        self._kept, self._phase = launch, (keys.data_ptr() % _VECTOR, values.data_ptr() % _VECTOR)

    def __call__(self, keys: Tensor, values: Tensor) -> bool:
        session, key, value = self._session, keys.data_ptr(), values.data_ptr()
        lengths = session.lengths
        if lengths is None or session.captured or not session.steady(self._generation, self._stream):
            return False
        if (key % _VECTOR, value % _VECTOR) != self._phase:
            return False
        of_key, of_value = self._fields
        with session.lock:
            of_key.value, of_value.value = key, value
            self._append(self._stream)
        session.lengths = list(map(operator.add, lengths, self._counts))
        return True
