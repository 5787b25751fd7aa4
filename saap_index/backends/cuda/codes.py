"""Launches cuda/codes.cu, and cuda/scan_codes.cu with the scan of what is no code. Tensors come checked, as in scan.py.

A search over a coded batch is three launches: cuda/scan.cu over the arena of rows that are numbers, all of which are sinks or
recent, and over means; cuda/scan_codes.cu over selected codes and those that are recent again; and what joins the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..codes import DTYPE_CODES
from ..scalar_quantizer import Coded
from ..types import Tail
from .launch import Launch, Runtime
from .scan import CODED_KERNEL, H200_SHARED_BYTES, WEIGHTED, Listed, Runs, Scan, ScanShape, coded_configuration

ENCODE_PARAMS = np.dtype(
    [(name, np.uint64) for name in ("rows", "codes")]
    + [(name, np.int64) for name in ("head", "row", "code_head")]
    + [(name, np.int32) for name in ("type", "n", "dim", "bits")],
    align=True,
)
JOIN_PARAMS = np.dtype(
    [(name, np.uint64) for name in ("out_a", "lse_a", "out_b", "lse_b", "out", "lse")]
    + [("n", np.int64)]
    + [(name, np.int32) for name in ("type", "e", "bits")],
    align=True,
)
THREADS, ROWS = 128, 4
_ENCODE_SHARED_BYTES, _JOIN_SHARED_BYTES = ROWS * (2 * 256 * 8 + 256), ROWS * 256 * 4


def encode(runtime: Runtime, rows: Tensor, bits: int, codes: Tensor) -> None:
    """rows : float32, bfloat16 or float16 (h, n, dim), strided over h and n; codes : uint8 (h, n, c) out, strided over h."""
    h, n, dim = rows.shape
    if not h * n:
        return
    params = np.zeros((), ENCODE_PARAMS)
    params["rows"], params["codes"] = rows.data_ptr(), codes.data_ptr()
    params["head"], params["row"], params["code_head"] = rows.stride(0), rows.stride(1), codes.stride(0) // 4
    params["type"], params["n"], params["dim"], params["bits"] = DTYPE_CODES[rows.dtype], n, dim, bits
    blocks = min(-(-n // ROWS), 16 * runtime.multiprocessors)
    runtime.kernel("codes.cu", "saap_encode", {}).launch((blocks, h, 1), THREADS, _ENCODE_SHARED_BYTES, params)


def coded_spans(coded: Coded, sinks: Sequence[int], sealed: Sequence[int], dense: bool) -> np.ndarray[Any, Any]:
    """int32 (b, 4), as in cuda/scan_params.cuh: which coded rows of each sequence are read whatever is selected."""
    behind = coded.first if dense else [max(low, middle) for low, middle in zip(coded.first, sealed, strict=True)]
    before = [0] * len(coded.first) if dense else sinks
    return np.array([coded.first, coded.last, behind, before], np.int32).T.copy()


def numbers_meta(
    coded: Coded, lengths: Sequence[int], sinks: Sequence[int], sealed: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Length, sinks and sealed for a scan of the rows that are numbers: those before coded ones are seen by every query."""
    spans = list(zip(coded.first, coded.last, sinks, sealed, strict=True))
    before = [(first, first) if first < last else (low, high) for first, last, low, high in spans]
    return coded.plain_rows(lengths), [low for low, _ in before], [high for _, high in before]


def covers(coded: Coded, lengths: Sequence[int], num_queries: int, causal: bool) -> bool:
    """Whether no query is one of a token before the coded rows, as after a truncation to fewer tokens than there are queries."""
    spans = zip(coded.first, coded.last, lengths, strict=True)
    return not causal or all(low == high or length - low >= num_queries for low, high, length in spans)


class CodedScan:
    """The scans of one shape, and their memory: results in between. ``shape`` is that of the rows that are numbers; codes alone
    are selected, and ``weighted``."""

    def __init__(
        self, runtime: Runtime, shape: ScanShape, bits: int, rows: int, device: torch.device, knobs: dict[str, int] | None = None
    ) -> None:
        """bits : of a value; rows : of the coded arrays."""
        size = shape.sequences, shape.heads, shape.vectors
        self.results = [
            *(torch.empty((*size, shape.e), dtype=dtype, device=device) for dtype in (shape.query, torch.float32)),
            *(torch.empty(size, dtype=torch.float32, device=device) for _ in range(2)),
        ]
        self._runtime, self._bits = runtime, bits
        self.numbers = Scan(runtime, replace(shape, dense=False, weighted=False), knobs)
        self.codes = Scan(runtime, replace(shape, dense=False, storage=torch.float16, capacity=rows, coded=bits), knobs)
        self.num_floats = max(self.numbers.num_floats, self.codes.num_floats)
        self.num_tickets = max(self.numbers.num_tickets, self.codes.num_tickets)

    def bind(
        self, arena: tuple[Tensor, Tensor], coded: Coded, meta: Tensor, spans: Tensor, listed: Listed | Runs | None,
        means: Tail | None, scale: float, floats: Tensor, tickets: Tensor,
    ) -> CodedLaunch:
        """As `Scan.bind`. arena : the rows that are numbers; meta : int32 (b, 8) of them; spans : int32 (b, 4), `coded_spans`."""
        first = self.numbers.bind(*arena, meta, None, means, scale, floats, tickets)
        second = self.codes.bind(coded.keys, coded.values, meta, listed, None, scale, floats, tickets, spans=spans)
        return CodedLaunch(self._runtime, first, second, self._bits, self.results)


class CodedLaunch:
    """Like a `Launch`: a start takes queries, out and lse."""

    __slots__ = ("_codes", "_join", "_numbers", "_results")

    def __init__(self, runtime: Runtime, numbers: Launch, codes: Launch, bits: int, results: Sequence[Tensor]) -> None:
        """results : out and, behind both, lse of the one and of the other."""
        params, lse, e = np.zeros((), JOIN_PARAMS), results[2], results[0].shape[-1]
        for name, x in zip(("out_a", "out_b", "lse_a", "lse_b"), results, strict=True):
            params[name] = x.data_ptr()
        params["n"], params["e"], params["bits"], params["type"] = lse.numel(), e, bits, DTYPE_CODES[results[0].dtype]
        blocks = max(1, min(-(-lse.numel() // ROWS), 16 * runtime.multiprocessors))
        kernel = runtime.kernel("codes.cu", "saap_join_codes", {})
        self._numbers, self._codes, self._results = numbers, codes, results
        self._join = Launch(kernel, (blocks, 1, 1), THREADS, _JOIN_SHARED_BYTES, params, results)

    def __call__(self, queries: Tensor, out: Tensor, lse: Tensor) -> None:
        out_a, out_b, lse_a, lse_b = self._results
        self._numbers(queries=queries, out=out_a, lse=lse_a)
        self._codes(queries=queries, out=out_b, lse=lse_b)
        self._join(out=out, lse=lse)


def _shipped() -> Iterator[tuple[str, str, dict[str, int]]]:
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    shapes = [(64, 64, 8, bf16), (64, 64, 16, bf16), (128, 128, 8, bf16), (128, 128, 16, bf16), (128, 128, 16, f16)]
    shapes += [(96, 96, 16, bf16), (192, 128, 8, bf16), (128, 128, 16, f32), (256, 256, 8, bf16)]
    for bits in (8, 4):
        for d, e, j, query in shapes[: -1 if bits == 4 else None]:
            yield *CODED_KERNEL, coded_configuration(d, e, bits, query, j, H200_SHARED_BYTES)
        yield *CODED_KERNEL, coded_configuration(128, 128, bits, bf16, 8, H200_SHARED_BYTES) | WEIGHTED
    yield "codes.cu", "saap_encode", {}
    yield "codes.cu", "saap_join_codes", {}


CONFIGURATIONS = tuple(_shipped())
"""What is shipped, a sample of it, as in scan.py. Of 256 dims a few registers are spilled where values
have 4 bits or queries are float32."""
