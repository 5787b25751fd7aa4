"""Codes on the CUDA backend: made as everywhere, and read by its kernels as they lie."""

from __future__ import annotations

import pytest
import torch
from gpu_places import BF16, F16, F32, PLACES, Place, captured_step, emulation
from helpers import small_index, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scalar_quantizer import CODES, DIMS, DTYPES, KINDS, SEEDS, SPEC, check, rows, spans

from saap_index.backends import STORAGE_CODES, get_backend


@settings(max_examples=40)
@given(code=CODES, h=st.integers(1, 2), n=st.integers(0, 5), d=DIMS, e=DIMS, dtype=DTYPES, kind=KINDS, seed=SEEDS)
@emulation
def test_the_same_bytes(code: object, h: int, n: int, d: int, e: int, dtype: torch.dtype, kind: str, seed: int) -> None:
    """On the emulated device, which flushes subnormal floats as the compiled kernels do."""
    assert not isinstance(code, str)
    backend = get_backend(torch.device("cpu"), "cuda-emu")
    keys = rows(n + 2, h, d, seed=seed, dtype=dtype, kind=kind).transpose(0, 1)[:, 1 : n + 1]
    values = rows(h, n, e, seed=seed + 1, dtype=dtype, kind=kind)
    sizes = code.sizes(d, e)  # type: ignore[attr-defined]
    out, want = ([torch.full((h, n + 3, size), 7, dtype=torch.uint8) for size in sizes] for _ in range(2))
    backend.encode(code, keys, values, *(x[:, 2 : n + 2] for x in out))  # type: ignore[arg-type]
    SPEC.encode(code, keys, values, *(x[:, 2 : n + 2] for x in want))  # type: ignore[arg-type]
    for got, x in zip(out, want, strict=True):
        assert torch.equal(got, x)


SHAPES = [(64, 64, 2, F32), (40, 72, 3, BF16), (128, 128, 9, F16)]
"""d, e, g and dtype: each is a build."""


@emulation
@pytest.mark.parametrize("name", STORAGE_CODES)
@pytest.mark.parametrize("d, e, g, dtype", SHAPES)
@settings(max_examples=6)
@given(
    shapes=st.lists(spans(), min_size=1, max_size=2), h=st.integers(1, 2), q=st.integers(1, 3),
    share=st.sampled_from([0.0, 0.3, 1.0]), causal=st.booleans(), with_tail=st.booleans(), seed=SEEDS,
)
def test_scan_reads_what_codes_stand_for(
    name: str, d: int, e: int, g: int, dtype: torch.dtype, shapes: list[tuple[int, int, int, int, int]], h: int, q: int,
    share: float, causal: bool, with_tail: bool, seed: int,
) -> None:
    backend = get_backend(torch.device("cpu"), "cuda-emu")
    check(backend, name, shapes, h, g, q, d, e, dtype, share, causal, with_tail, seed)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", STORAGE_CODES)
def test_an_index(where: str, name: str) -> None:
    """Added to, searched, stepped in a graph and truncated into its codes, as plain torch does it."""
    place = Place(where)
    options = {"storage": name, "selectivity": 0.3, "seal_tokens": 64, "max_segment": 256}  # no step of the graph seals
    index, plain = place.index(64, **options), small_index(64, **options, backend="torch")

    def same(q: int = 1, seed: int = 0) -> None:
        x = tokens(2, 4, q, 64, seed=seed)
        torch.testing.assert_close(index.search_attend(x.to(place.device)).cpu(), plain.search_attend(x), rtol=1e-5, atol=2e-5)

    for step, n in enumerate((250, 40, 3)):
        keys, values = tokens(2, 2, n, 64, seed=step), tokens(2, 2, n, 64, seed=step + 10)
        index.add(keys.to(place.device), values.to(place.device))
        plain.add(keys, values)
        same(3, step)
    assert torch.equal(index.invlists.keys.cpu(), plain.invlists.keys), "the same codes in the same order"
    index.reserve_memory(320)
    plain.reserve_memory(320)
    replay, k, v, x, out = captured_step(place, index)
    for step in range(3):
        for tensor in (k, v, x):
            tensor.copy_(tokens(*tensor.shape, seed=50 + step))  # type: ignore[arg-type]
        replay()
        plain.add(k.cpu(), v.cpu())
        torch.testing.assert_close(out.cpu(), plain.search_attend(x.cpu()), rtol=1e-5, atol=2e-5)
    index.advance()
    for length in (200, 60, 3):  # among segments; to where none is, with codes that are recent again; no code is left
        index.truncate(length)
        plain.truncate(length)
        same(1, length)
        same(3, length)
