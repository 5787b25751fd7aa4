"""The plugin on a GPU, without vLLM and without a GPU: what steps are cut into, and layers served by the emulated CUDA backend.

That its classes fit FlashAttention's is checked by `make test-vllm`; it has not run on a device.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emu.runtime import EmulatedRuntime, available
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saap_index import LayerRouters, Routers, TwoTower, reference
from saap_index.backends.cuda.backend import CudaBackend
from saap_index.errors import CompatibilityError
from saap_index.routing.quantizer import KeyQuantizer
from saap_index.routing.rope import Rope
from saap_index.vllm.counters import COUNTERS, REFRESH
from saap_index.vllm.gpu_engine import Engine
from saap_index.vllm.gpu_step import answer, cut_step, plan_groups
from saap_index.vllm.refusals import check_engine

emulation = pytest.mark.skipif(not available(), reason="needs a C++ compiler")

H, G, D, L = 3, 2, 16, 8
SIZE, BLOCKS = 16, 60
SERVED = "model.layers.1.self_attn.attn", "model.layers.2.self_attn.attn"
REQUESTS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 600), st.booleans()), min_size=1, max_size=9)


@given(REQUESTS, st.integers(1, 8), st.sampled_from([1, 100, 10**6]))
def test_decoding_requests_are_the_index_s(requests: list[tuple[int, int, bool]], queries: int, break_even: int) -> None:
    starts = np.cumsum([0, *(q for q, _, _ in requests)]).tolist()
    longest = [q + n for q, n, _ in requests]
    cut = cut_step(starts, longest, [x for _, _, x in requests], queries, break_even)
    numbers = np.arange(starts[-1])
    found: dict[int, list[int]] = {}
    for members in cut.groups:
        own = np.arange(len(requests))[members.requests].tolist()
        rows = numbers[members.tokens].reshape(len(own), members.q)
        found |= {i: row for i, row in zip(own, rows.tolist(), strict=True)}
    decoding = [q <= queries and not (q and prefilling) for q, _, prefilling in requests]
    leading = decoding.index(False) if False in decoding else len(requests)
    own = [i for i in range(leading) if requests[i][0]]
    if any(longest[i] >= break_even for i in own):
        assert found == {i: list(range(starts[i], starts[i + 1])) for i in own}
        assert (cut.requests, cut.tokens) == (leading, starts[leading])
    else:
        assert not cut.groups and cut.requests == cut.tokens == 0


def routers(spread: float) -> Routers:
    """Symmetric ones of layers 0 to 2, the first of which is better left dense. spread : of the shares of the budget around 1."""
    found = {}
    for n in range(3):
        tower, lists, rope = TwoTower.symmetric(H, D), KeyQuantizer(torch.randn(H, L, D)), Rope(head_dim=D)
        none, shares = torch.zeros(H, L, D), np.linspace(1 - spread, 1 + spread, H, dtype=np.float32)
        parts = KeyQuantizer(none), tower.for_lists(none), rope, rope, D**-0.5, tower, None, shares, None, lists
        found[n] = LayerRouters(*parts)
    model = {"num_key_value_heads": H, "head_dim": D, "num_hidden_layers": 3, "num_attention_heads": G * H}
    return Routers({"model": model, "layout": {"sinks": 2, "window": 32}, "budget": {"dense_layers": [0]}}, found)


def implementation(**changes: Any) -> Any:
    """What is read of FlashAttention's."""
    said = {
        "num_heads": G * H, "num_kv_heads": H, "head_size": D, "alibi_slopes": None, "logits_soft_cap": 0, "attn_type": "decoder",
        "kv_sharing_target_layer_name": None, "sliding_window": (-1, -1), "sinks": None,
    }
    return SimpleNamespace(**{**said, **changes})


def made(selectivity: float = 0.9999, impls: dict[str, Any] | None = None, queries: int = 4) -> Engine:
    config = SimpleNamespace(
        additional_config={"saap": {"routers": "r", "break_even": 100, "selectivity": selectivity}},
        model_config=SimpleNamespace(max_model_len=300, dtype=torch.bfloat16), scheduler_config=SimpleNamespace(max_num_seqs=4),
    )
    runtime = EmulatedRuntime()
    runtime.multiprocessors = 2
    small = {"select": {"SAAP_THREADS": 64, "SAAP_COLUMNS": 4}, "scan": {"SAAP_WARPS": 2, "SAAP_STAGES": 3, "SAAP_GROUPS": 1}}
    backend = CudaBackend(torch.device("cpu"), runtime, small)
    every = {f"model.layers.{n}.self_attn.attn": implementation() for n in range(3)} | {"draft.layers.0.attn": implementation()}
    torch.manual_seed(0)
    shares = routers(0.5 if selectivity < 0.9 else 0.0)
    return Engine(config, every if impls is None else impls, shares, backend, queries)


def cache() -> Tensor:
    """A layer's, as vLLM hands it over: (B, H, N, 2 d), tails of 48 bytes behind the rows."""
    page = H * SIZE * 2 * D * 2 + 48
    raw = torch.full((BLOCKS * page // 2,), float("nan")).bfloat16()
    return raw.as_strided((BLOCKS, H, SIZE, 2 * D), (page // 2, 2 * D, H * 2 * D, 1))


@emulation
@pytest.mark.parametrize("selectivity", [0.9999, 0.2])
def test_layers_are_served(selectivity: float) -> None:
    """Prompts written, then a step of requests of one and of several tokens, some of them short: against dense attention where
    nearly everything is read; counters say what was."""
    served, (lengths, q) = made(selectivity), ([290, 60, 150, 210], [1, 1, 3, 1])
    assert tuple(served.layers) == SERVED and served.numbers["draft.layers.0.attn"] is None and served.session is not None
    assert served.layers[SERVED[0]].steps.rope is served.layers[SERVED[1]].steps.rope is not None
    generator = torch.Generator().manual_seed(1)
    blocks = torch.from_numpy(np.random.default_rng(0).permutation(BLOCKS)[: 4 * 14].astype(np.int32)).view(4, 14)
    blocks = torch.nn.functional.pad(blocks, (0, 5), value=10**6)
    lengths = [min(n, 14 * SIZE) for n in lengths]
    starts = np.cumsum([0, *q]).tolist()
    cut = cut_step(starts, lengths, [False] * 4, served.queries, 100)
    assert [x.q for x in cut.groups] == [1, 3] and cut.tokens == 6
    groups = plan_groups(served.session, cut, torch.tensor(lengths, dtype=torch.int32), blocks)
    for name in SERVED:
        kv = cache()
        both = [torch.randn((n, H, 2 * D), generator=generator).bfloat16() for n in lengths]
        for i, n in enumerate(lengths):
            at = torch.arange(n)
            slots = blocks[i].long()[at // SIZE] * SIZE + at % SIZE
            served.write(name, both[i][..., :D], both[i][..., D:], kv, slots, at.int())
            pool = served.pool(name, kv)
            assert served.pool(name, kv) is pool
            layer = served.model.layers[served.numbers[name] or 0]
            assert layer.rope is not None
            want = served.backend.assign(layer.quantizer, both[i][..., :D].transpose(0, 1), layer.rope.rotation(at))
            assert torch.equal(pool.pages.lists[slots // SIZE, :, slots % SIZE].int(), want.T)
        query = torch.randn((6, G * H + 2, D), generator=generator).bfloat16()[:, : G * H]  # of a tensor with keys behind
        output = torch.full((6, G * H, D), float("nan")).bfloat16()
        for group in groups:
            answer(served.session, group, served.layers[name].steps, pool, D**-0.5, query, output)
        assert output.isfinite().all()
        for i, n in enumerate(lengths):
            if selectivity < 0.9 and n >= 100:
                continue
            limit = n - q[i] + 1 + np.arange(q[i])
            seen = np.tile(np.arange(n)[None] < limit[:, None], (G, 1))
            for head in range(H):
                keys, values = (x.double().numpy() for x in (both[i][:, head, :D], both[i][:, head, D:]))
                x = query[starts[i] : starts[i + 1], head * G : head * G + G].transpose(0, 1).reshape(-1, D).double().numpy()
                wanted, _ = reference.attend(x, keys, values, D**-0.5, seen)
                got = output[starts[i] : starts[i + 1], head * G : head * G + G].transpose(0, 1).reshape(-1, D)
                assert torch.allclose(got.double(), torch.from_numpy(wanted), atol=2e-2)
    served.dense_queries = 7
    before = vars(COUNTERS).copy()
    try:
        served.note()
        served.seen()
        noted = COUNTERS.as_dict()
        served.refresh()
        assert COUNTERS.as_dict() == noted and served.refresh in REFRESH
        assert noted["sparse_queries"] == 2 * 5 and noted["dense_queries"] == 2 + 7
        stored = sum(n * k for n, k in zip(lengths, q, strict=True) if n >= 100)
        assert noted["rows_stored"] == 2 * H * stored
        share = noted["rows_read"] / stored / 2 / H
        assert share == 1 if selectivity > 0.9 else 0.2 < share < 0.7
    finally:
        vars(COUNTERS).update(before)
        REFRESH.remove(served.refresh)


@emulation
def test_what_is_not_served() -> None:
    everything = made(1.0)
    assert everything.session is None and tuple(everything.layers) == SERVED  # read whole, and written all the same
    sliding = made(impls={SERVED[0]: implementation(), SERVED[1]: implementation(sliding_window=(127, 0))})
    assert tuple(sliding.layers) == SERVED[:1]
    for change, name in (({"sinks": torch.zeros(6)}, "sinks"), ({"logits_soft_cap": 30.0}, "soft cap")):
        with pytest.raises(CompatibilityError, match=name):
            made(impls={SERVED[0]: implementation(**change)})
    with pytest.raises(CompatibilityError, match="one shape"):
        made(impls={SERVED[0]: implementation(), SERVED[1]: implementation(num_heads=4 * H)})
    halves = SimpleNamespace(
        model_config=SimpleNamespace(), kv_transfer_config=None, cache_config=SimpleNamespace(block_size=16),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=True),
    )
    check_engine(halves)
    with pytest.raises(CompatibilityError, match="dual batch"):
        check_engine(halves, on_gpu=True)
    for refresh in (everything.refresh, sliding.refresh):
        REFRESH.remove(refresh)
