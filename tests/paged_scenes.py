"""Pools with sequences in them, for tests of operations on pages: tests/backends/test_paged.py, tests/cuda/test_gpu_paged.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from saap_index.backends import Budget, RouterWeights, Sample
from saap_index.backends.paged import PagedBackend, PagedBatch, PagedRouting, Pages
from saap_index.invlists.octaves import bounds_of

SEEDS = st.integers(0, 2**31 - 1)


@dataclass(frozen=True)
class Scene:
    """A pool with sequences in it, and the same tokens side by side: keys : (b, h, n, d), values, lists : int64 (b, h, n)."""

    pages: Pages
    batch: PagedBatch
    keys: Tensor
    values: Tensor
    lists: Tensor
    nlist: int

    @property
    def heads(self) -> int:
        return int(self.pages.keys.shape[1])


def pool(blocks: int, h: int, size: int, d: int, e: int, dtype: torch.dtype, order: str) -> Pages:
    """Pages of NaN rows, list numbers in a tail; order : of heads and tokens in a page."""
    lanes, item = d + e, dtype.itemsize
    inner = h * size * lanes * item
    page = -(-(inner + h * size) // 128) * 128
    raw = torch.full((blocks * page // item,), float("nan"), dtype=torch.float32).to(dtype)
    strides = (size * lanes, lanes) if order == "HND" else (lanes, h * lanes)
    rows = raw.as_strided((blocks, h, size, lanes), (page // item, *strides, 1))
    lists = raw.view(torch.uint8).as_strided((blocks, h, size), (page, size, 1), inner)
    return Pages(rows[..., :d], rows[..., d:], lists)


def scene(
    lengths: list[int], h: int, size: int, d: int, nlist: int, seed: int, dtype: torch.dtype = torch.float32, order: str = "HND",
    sinks: int = 4, window: int = 16,
) -> Scene:
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    b, n = len(lengths), max(lengths)
    most = max(1, -(-n // size))
    blocks = torch.from_numpy(rng.permutation(b * most + 2)[: b * most].astype(np.int32)).view(b, most)
    pages = pool(b * most + 2, h, size, d, d, dtype, order)
    keys, values = (torch.randn((b, h, n, d), generator=generator).to(dtype) for _ in range(2))
    lists = torch.from_numpy(rng.zipf(1.5, (b, h, n)) % nlist)
    for i, length in enumerate(lengths):
        at = torch.arange(length)
        page, place = blocks[i].long()[at // size], at % size
        pages.keys[page, :, place] = keys[i, :, :length].transpose(0, 1)
        pages.values[page, :, place] = values[i, :, :length].transpose(0, 1)
        pages.lists[page, :, place] = lists[i, :, :length].transpose(0, 1).to(torch.uint8)
        blocks[i, -(-length // size) :] = -7  # an engine's tables hold anything behind the last page
    bounds, used = bounds_of(lengths, sinks, window)
    return Scene(pages, PagedBatch(blocks, lengths, torch.from_numpy(bounds), used), keys, values, lists, nlist)


def scenes(d: st.SearchStrategy[int], dtype: st.SearchStrategy[torch.dtype]) -> st.SearchStrategy[Scene]:
    return st.builds(lambda shape, **others: scene(d=shape[0], dtype=shape[1], **others), shape=st.tuples(d, dtype), **AXES)


AXES: dict[str, Any] = dict(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=3),
    h=st.integers(1, 3),
    size=st.sampled_from([16, 32, 48, 128]),
    nlist=st.sampled_from([1, 5, 33, 256]),
    seed=SEEDS,
    order=st.sampled_from(["HND", "NHD"]),
    sinks=st.integers(0, 5),
    window=st.sampled_from([0, 16, 64]),
)
SCENES = scenes(st.sampled_from([8, 24, 64]), st.sampled_from([torch.float32, torch.bfloat16]))


def prepared(backend: PagedBackend, scene: Scene) -> tuple[Any, Any]:
    return backend.prepare_pages(scene.pages), backend.prepare_batch(scene.batch)


def weights_of(h: int, d: int, nlist: int, knots: int, seed: int) -> RouterWeights:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / max(1, shape[-1]) ** 0.5

    y = nlist + knots + 1
    return RouterWeights(random(h, 7, d), random(h, 7), random(h, y, 7), random(h, y, d), random(h, y), nlist)


def routing(
    backend: PagedBackend, scene: Scene, share: float, seed: int, nprobe: int = 0, miss: float | None = None,
    sampled: float | None = None,
) -> PagedRouting:
    """sampled : share of the budget that is a weighted sample."""
    weights = weights_of(scene.heads, scene.keys.shape[3], scene.nlist, 5, seed)
    sealed = [int(x[s] - x[0]) for x, s in zip(scene.batch.bounds, scene.batch.num_segments, strict=True)]
    rows = torch.tensor([[int(np.ceil(share * n))] * scene.heads for n in sealed], dtype=torch.int32)
    unread = None if miss is None else torch.full((scene.heads,), miss)
    sample = None
    if sampled is not None:
        ways = torch.full((scene.heads,), 6, dtype=torch.int32), torch.full((scene.heads,), 1.5)
        sample = Sample((rows * sampled).int(), *ways)
    budget = Budget(rows, nprobe, unread, sample=sample)
    return PagedRouting(backend.backend.prepare_router(weights), scene.nlist, 4, True, None, budget)


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    atol, rtol = (2e-5, 1e-4) if dtype == torch.float32 else (2e-2, 2e-2)
    return torch.allclose(a.double(), b.double(), atol=atol, rtol=rtol)
