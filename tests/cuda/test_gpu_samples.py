"""Weighted samples of the CUDA backend: steps, graphs and codes read what the selection says, as the CPU does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import emulated
import pytest
import torch
from emu.runtime import available
from gpu_places import RUNTIME, Place, captured_step, emulated_place
from helpers import assert_close, small_index, tokens
from test_sampling_index import filled, want

from saap_index import AsymmetricIndex, DeviceError, Sampling, SearchParametersIVF, StateError

HALF = SearchParametersIVF(selectivity=0.3, sampled_share=0.5, sample_exponent=2.0, sample_cap=1.4)


@pytest.fixture
def emu() -> Iterator[Place]:
    yield from emulated_place()


@pytest.mark.parametrize(
    "params",
    [HALF, SearchParametersIVF(selectivity=0.1, sampled_share=1.0, sample_cap=9.0), SearchParametersIVF(sampled_share=0.3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_attention_over_what_was_read(emu: Place, params: SearchParametersIVF, dtype: torch.dtype) -> None:
    """In two launches, rows and biases those of `select`, and of plain torch."""
    index, plain = (filled(name, [250, 90], dtype=dtype) for name in ("cuda-emu", "torch"))
    index.sampling = plain.sampling = Sampling([0.5, 0.0], [2.0, 2.0], [2.0, 2.0])
    queries = tokens(2, 4, 2, 32, dtype, seed=3)
    index.search_attend(queries, params=params)
    RUNTIME.clear()
    out = index.search_attend(queries, params=params)
    assert [x for x in RUNTIME.launched if "beside" not in x] == [
        "saap_route_select", "saap_scan_f32" if dtype is torch.float32 else "saap_scan"
    ]
    last = index.stats().last_search
    assert last.sampled_tokens > 0
    exact, _, exact_error = want(index, queries, params)
    assert_close(out.float(), exact, dtype, 4)
    selected, theirs = (x.select(queries, params=params) for x in (index, plain))
    assert torch.equal(selected.counts, theirs.counts) and torch.equal(selected.rows, theirs.rows)
    assert torch.equal(selected.biases, theirs.biases), "to the bit"
    if dtype is torch.float32:
        error = index.search_attend(queries, params=params, return_error=True)[1]
        assert_close(error, exact_error, torch.float32, 40)


def test_replays_follow_what_is_published(emu: Place) -> None:
    """A graph whose step was dense at first samples as soon as there is something to leave out, as much as is then due."""
    search: dict[str, Any] = {"selectivity": 0.3, "sampled_share": 0.5}
    options = {**search, "break_even": 60}
    index, plain = emu.index(32, 32, 4, 4, 2, **options), small_index(32, 32, 4, 4, 2, **options, backend="torch")
    prompt = tokens(1, 2, 50, 32)
    for x in (index, plain):
        x.reserve_memory(200)
        x.add(prompt, prompt)
    replay, k, v, x, out = captured_step(emu, index)
    sampled = 0.0
    for t in range(60):
        for held, heads in ((k, 2), (v, 2), (x, 4)):
            held.copy_(tokens(1, heads, 1, 32, seed=100 * heads + t))
        if index.invlists.due_with(1):
            index.seal_ahead(1)
        replay()
        index.advance(1, seal=False)
        plain.add(k, v)
        last = index.stats().last_search.sampled_tokens
        assert_close(out, want(index, x, SearchParametersIVF(**search))[0], torch.float32, 8)
        plain.search_attend(x)
        assert abs(last - plain.stats().last_search.sampled_tokens) <= 1, "scores of 16-bit weights round otherwise"
        sampled = max(sampled, last)
    assert sampled > 5


@pytest.mark.parametrize("storage", ["SQ8", "SQ8/SQ4"])
def test_samples_of_codes(emu: Place, storage: str) -> None:
    index, plain = (filled(name, [250, 90], storage=storage) for name in ("cuda-emu", "torch"))
    queries = tokens(2, 4, 1, 32, seed=3)
    for _ in range(2):
        out = index.search_attend(queries, params=HALF)
    torch.testing.assert_close(out, plain.search_attend(queries, params=HALF), rtol=1e-4, atol=2e-5)
    assert index.stats().last_search.sampled_tokens > 0


def test_where_no_kernel_selects_samples(emu: Place) -> None:
    """More query vectors than the kernel takes: plain torch selects, and no graph holds such a step."""
    index, plain = (filled(name, [250, 90]) for name in ("cuda-emu", "torch"))
    queries = tokens(2, 4, 5, 32, seed=3)
    out = index.search_attend(queries, params=HALF)
    torch.testing.assert_close(out, plain.search_attend(queries, params=HALF), rtol=1e-4, atol=1e-5)
    assert index.stats().last_search.sampled_tokens > 0
    index.reserve_memory(300)
    index.search_attend(queries, params=HALF)
    with RUNTIME.capture(), pytest.raises(StateError, match="sampled_share=0 makes it one"):
        index.search_attend(queries, params=HALF)


@pytest.mark.skipif(not available(), reason="needs a C++ compiler")
def test_older_devices_refuse() -> None:
    emulated.register("cuda-emu-old", capability=(8, 0))
    index: AsymmetricIndex = filled("cuda-emu-old", [250])
    with pytest.raises(DeviceError, match="sampled_share: expected a backend that reads samples"):
        index.search_attend(tokens(1, 4, 1, 32), params=HALF)
