"""Where the tests of the CUDA backend run: on the emulated device, and with `-m gpu` on a real one. And what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import emulated
import numpy as np
import pytest
import torch
from emu.runtime import available
from helpers import assert_close, dense, small_index, tokens
from torch import Tensor

from saap_index import AsymmetricIndex

emulation = pytest.mark.skipif(not available(), reason="needs a C++ compiler")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PLACES = [pytest.param("cuda-emu", marks=emulation), pytest.param("cuda", marks=gpu)]
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
RUNTIME = emulated.register()


class Place:
    """Where a test runs."""

    def __init__(self, name: str) -> None:
        self.real = name == "cuda"
        self.device = torch.device("cuda" if self.real else "cpu")
        self.options = {"device": self.device} if self.real else {"backend": "cuda-emu"}

    def index(self, *args: Any, **options: Any) -> AsymmetricIndex:
        return small_index(*args, **{**self.options, **options})

    def tokens(self, *args: Any, **options: Any) -> Tensor:
        return tokens(*args, **options).to(self.device)

    def capture(self, step: Callable[[], Any]) -> Callable[[], None]:
        """``step`` as a graph, and its replay. It must have run before."""
        if not self.real:
            with RUNTIME.capture() as recorded:
                step()
            return recorded.replay
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


def emulated_place() -> Iterator[Place]:
    """For a fixture: the emulated device, its record of launches empty."""
    if not available():
        pytest.skip("needs a C++ compiler")
    RUNTIME.clear()
    yield Place("cuda-emu")


def check(index: AsymmetricIndex, queries: Tensor, out: Tensor, lse: Tensor, selection: Any, g: int) -> None:
    """Against float64 over the rows that ``selection`` names."""
    lists, q = index.invlists, queries.shape[2]
    for i in range(lists.batch):
        n, low, high = selection.lengths[i], selection.sinks[i], selection.sealed[i]
        for head in range(lists.heads):
            listed = [] if selection.rows is None else selection.rows[i, head].tolist()
            rows = torch.tensor([*range(low), *(r for r in listed if r >= 0), *range(high, n)], dtype=torch.long)
            at = rows.to(lists.keys.device)
            keys, values = (x[i, head].index_select(0, at).cpu() for x in (lists.keys, lists.values))
            hidden = (rows.numpy()[None] >= high) & (rows.numpy()[None] > (n - q + np.arange(q))[:, None])
            weights = np.zeros(len(rows))
            if selection.tail is not None:
                runs = [r for r in selection.tail[i, head].tolist() if r >= 0]
                table = lists.tables[i, head].cpu()
                for r in runs:
                    s, x = divmod(r, lists.nlist)
                    keys = torch.cat([keys, lists.mean_keys[i, head, s, x].cpu()[None]])
                    values = torch.cat([values, lists.mean_values[i, head, s, x].cpu()[None]])
                    weights = np.append(weights, np.log(float(table[s, x + 1] - table[s, x])))
                hidden = np.pad(hidden, ((0, 0), (0, len(runs))))
            part = slice(head * g, head * g + g)
            x = queries[i, part].cpu()
            if weights.any():  # an entry of n tokens is n entries: a further dim carries the logarithm
                keys = torch.cat([keys.double(), torch.from_numpy(weights / index.scale)[:, None]], 1)
                x = torch.cat([x.double(), torch.ones((*x.shape[:2], 1), dtype=torch.float64)], 2)
            want, want_lse = dense(x, keys, values, index.scale, hidden)
            precision = torch.float32 if queries.dtype == F32 else queries.dtype
            noise = 1.0 if index.dtype == F32 else 4.0  # probabilities meet values in the storage type
            assert_close(out[i, part].cpu(), want, precision if noise == 1.0 else index.dtype, float(values.abs().max()))
            assert_close(lse[i, part].cpu(), want_lse, torch.float32, 10.0)


def captured_step(place: Place, index: AsymmetricIndex, n: int = 1, q: int = 1, **search: Any) -> tuple[Any, ...]:
    """A step of n tokens in a graph: its replay, the tensors to fill with keys, values and queries, the output."""
    b, h, hq = len(index.lengths), index.num_kv_heads, index.num_heads
    k, v, x = (torch.zeros(s, dtype=index.dtype, device=place.device) for s in
               ((b, h, n, index.d), (b, h, n, index.d_v), (b, hq, q, index.d)))
    index.search_attend(x, **search)  # once before: memory and kernels
    result: list[Any] = []

    def step() -> None:
        index.add(k, v)
        result[:] = [index.search_attend(x, **search)]

    replay = place.capture(step)
    return replay, k, v, x, result[0]
