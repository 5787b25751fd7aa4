"""The plugin's classes for a GPU against FlashAttention's of the installed vLLM: names, arguments, and what they hand on.

No GPU and no engine: FlashAttention itself is a fake here. That they run on a device is not shown by this.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, CommonAttentionMetadata, max_decode_query_len
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadata, FlashAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec

from saap_index.vllm import gpu_builder, gpu_impl
from saap_index.vllm.gpu_backend import SaapGpuBackend
from saap_index.vllm.gpu_builder import SaapGpuBuilder, SaapGpuMetadata
from saap_index.vllm.gpu_impl import SaapGpuImpl
from saap_index.vllm.gpu_step import uniform

NAME = "model.layers.3.self_attn.attn"


def arguments(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_interface_is_what_the_plugin_uses() -> None:
    """So that a new release of vLLM fails with a sentence."""
    build = ["common_prefix_len", "common_attn_metadata", "fast_build"]
    assert arguments(FlashAttentionMetadataBuilder.__init__)[1:] == ["kv_cache_spec", "layer_names", "vllm_config", "device"]
    assert arguments(FlashAttentionMetadataBuilder.build)[1:] == arguments(SaapGpuBuilder.build)[1:] == build
    forward = arguments(FlashAttentionImpl.forward)
    assert forward == arguments(SaapGpuImpl.forward) and forward[6:8] == ["attn_metadata", "output"]
    assert arguments(FlashAttentionImpl.do_kv_cache_update) == arguments(SaapGpuImpl.do_kv_cache_update)
    used = {"num_reqs", "num_actual_tokens", "query_start_loc", "query_start_loc_cpu", "seq_lens", "block_table_tensor"}
    used |= {"slot_mapping", "positions", "is_prefilling", "seq_lens_cpu_upper_bound", "max_query_len"}
    used |= {"_num_computed_tokens_cache", "_token_to_req_indices_cache"}
    assert used <= set(CommonAttentionMetadata.__dataclass_fields__) and hasattr(CommonAttentionMetadata, "replace")
    read = {"num_heads", "num_kv_heads", "head_size", "alibi_slopes", "logits_soft_cap", "attn_type", "sinks", "sliding_window"}
    source = inspect.getsource(FlashAttentionImpl.__init__)
    missing = [name for name in (*read, "kv_sharing_target_layer_name") if f"self.{name} =" not in source]
    assert not missing and "(-1, -1)" in source
    assert arguments(max_decode_query_len) == ["vllm_config"]
    assert not set(vars(SaapGpuBackend)) - set(dir(flash_attn.FlashAttentionBackend)) - {"__annotations__"}
    assert {"supports_dcp", "supports_pcp"} <= set(dir(AttentionBackend)) and hasattr(FlashAttentionImpl, "supports_dcp")


def test_what_is_said_to_the_engine() -> None:
    assert SaapGpuBackend.get_name() == "CUSTOM" and SaapGpuBackend.get_impl_cls() is SaapGpuImpl
    assert SaapGpuBackend.get_builder_cls() is SaapGpuBuilder
    for drafts, support in ((None, "UNIFORM_BATCH"), (7, "UNIFORM_BATCH"), (8, "NEVER")):
        speculation = SimpleNamespace(num_speculative_tokens=drafts, parallel_drafting=False)
        config = SimpleNamespace(speculative_config=speculation, use_v2_model_runner=True)
        assert SaapGpuBuilder.get_cudagraph_support(config, None) is AttentionCGSupport[support]
    assert SaapGpuBuilder.get_varlen_cudagraph_max_query_len(None, None) is None
    assert not SaapGpuBuilder.supports_update_block_table and not SaapGpuImpl.supports_dcp and not SaapGpuImpl.supports_pcp
    no = ("sink", "rswa", "non_causal", "mm_prefix", "batch_invariance", "kv_connector", "dcp", "pcp", "per_head_quant_scales")
    assert not any(getattr(SaapGpuBackend, f"supports_{name}")() for name in no)
    assert SaapGpuBackend.supports_head_size(128) and not SaapGpuBackend.supports_head_size(512)
    assert not SaapGpuBackend.supports_kv_cache_dtype("fp8") and SaapGpuBackend.supports_kv_cache_dtype("auto")
    spec = FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    padded = SaapGpuBackend.customize_spec(spec)
    assert 16 * 8 <= padded.page_size_bytes - spec.page_size_bytes <= 16 * 8 + 16
    assert SaapGpuBackend.customize_spec(padded).page_size_bytes == padded.page_size_bytes


def metadata(m: Any) -> FlashAttentionMetadata:
    return FlashAttentionMetadata(
        m.num_actual_tokens, m.max_query_len, m.query_start_loc, m.max_seq_len, m.seq_lens, m.block_table_tensor, m.slot_mapping
    )


class Session:
    def __init__(self) -> None:
        self.planned: list[tuple[int, list[int], list[list[int]]]] = []

    def plan(self, q: int, lengths: Tensor, blocks: Tensor) -> Any:
        self.planned.append((q, lengths.tolist(), blocks.tolist()))
        return SimpleNamespace(q=q)


def builder(monkeypatch: pytest.MonkeyPatch, replayed: int = 0, **options: Any) -> Any:
    def build(self: Any, common_prefix_len: int, m: Any, fast_build: bool = False) -> FlashAttentionMetadata:
        self.built.append((m, fast_build))
        return metadata(m)

    monkeypatch.setattr(FlashAttentionMetadataBuilder, "build", build)
    made = object.__new__(SaapGpuBuilder)
    said = SimpleNamespace(**{"reads_all": False, "break_even": 100, **options})
    made.engine = SimpleNamespace(
        session=Session(), model=SimpleNamespace(options=said), queries=4, dense_queries=0, layers={NAME: object()}
    )
    made._served, made._ticker, made.built, made._replayed_tokens = True, None, [], replayed
    made._positions = torch.zeros(64, dtype=torch.int32)
    return made


def step(queries: list[int], lengths: list[int], prefilling: list[bool]) -> CommonAttentionMetadata:
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    n, r = int(starts[-1]), len(queries)
    sequences, blocks = torch.tensor(lengths, dtype=torch.int32), torch.arange(r * 3, dtype=torch.int32).view(r, 3)
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=sequences, num_reqs=r, num_actual_tokens=n,
        max_query_len=max(queries), max_seq_len=max(lengths), block_table_tensor=blocks, slot_mapping=torch.arange(n),
        positions=torch.arange(n + 2), is_prefilling=torch.tensor(prefilling), seq_lens_cpu_upper_bound=sequences,
    )


def test_a_mixed_step_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    made = builder(monkeypatch)
    found = made.build(0, step([1, 3, 1, 5, 20], [200, 300, 50, 5, 400], [False, False, False, True, True]))
    assert isinstance(found, SaapGpuMetadata) and found.num_actual_tokens == 30 and found.positions.tolist() == list(range(30))
    assert made.engine.session.planned == [(1, [200, 50], [[0, 1, 2], [6, 7, 8]]), (3, [300], [[3, 4, 5]])]
    assert [x.tokens.tolist() if isinstance(x.tokens, Tensor) else x.tokens for x in found.groups] == [[0, 4], slice(1, 4)]
    rest = found.rest
    assert rest is not None and found.rest_token == 5 and made.built[1][1] and made.engine.dense_queries == 25
    assert rest.query_start_loc.tolist() == [0, 5, 25] and rest.seq_lens.tolist() == [5, 400]
    assert (rest.num_actual_tokens, rest.max_query_len) == (25, 20) and rest.block_table.tolist() == [[9, 10, 11], [12, 13, 14]]
    assert rest.slot_mapping.tolist() == list(range(5, 30))


@pytest.mark.parametrize("queries, lengths, options", [([1, 1], [50, 99], {}), ([20, 1], [200, 200], {}),
                                                       ([1, 1], [500, 300], {"reads_all": True})])
def test_what_the_index_has_no_part_in_is_flash_attention_s(
    queries: list[int], lengths: list[int], options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = builder(monkeypatch, **options)
    found = made.build(0, step(queries, lengths, [False, False]))
    assert not found.groups and found.rest is None and len(made.built) == 1 and made.engine.dense_queries == sum(queries)


def test_a_step_that_may_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One group of all requests, padding included, at the addresses of before, however short they are; run without a graph,
    short ones and ends of prompts are FlashAttention's."""
    made = builder(monkeypatch, replayed=8)
    long = made.build(0, step([1, 1, 1], [200, 50, 99], [False] * 3))
    assert made.engine.session.planned == [(1, [200, 50, 99], [[0, 1, 2], [3, 4, 5], [6, 7, 8]])]
    assert [group.tokens for group in long.groups] == [slice(0, 3)] and not long.for_replay and long.rest is None
    padded = step([2, 2, 0, 0], [60, 50, 0, 0], [False, False])
    padded.num_actual_tokens = 8
    short = made.build(0, padded)
    assert made.engine.session.planned[1] == (2, [60, 50, 0, 0], padded.block_table_tensor.tolist())
    assert [group.tokens for group in short.groups] == [slice(0, 8)] and short.for_replay
    assert short.positions.data_ptr() == long.positions.data_ptr() == made._positions.data_ptr()
    assert made.build(0, step([1, 1], [200, 150], [False, True])).for_replay
    captured = made.build_for_cudagraph_capture(step([1, 1], [1, 1], [False, False]))
    assert captured.groups and not captured.for_replay
    mixed = made.build(0, step([1, 2], [200, 200], [False, False]))
    assert [group.tokens for group in mixed.groups] == [slice(0, 1), slice(1, 3)] and not mixed.for_replay
    for queries in ([1] * 9, [5, 5]):  # larger than any graph; more drafts than are verified
        other = made.build(0, step(queries, [50] * len(queries), [False] * len(queries)))
        assert not other.groups and not other.for_replay


@pytest.mark.parametrize("starts, tokens, q", [
    ([0, 1, 2, 3], 3, 1), ([0, 3, 6, 6], 9, 3), ([0, 3, 6, 6], 6, 0), ([0, 1, 3], 3, 0), ([0, 1, 1, 2], 3, 0), ([0, 5], 5, 0),
    ([0], 0, 0), ([0, 0], 1, 0),
])
def test_steps_that_graphs_serve(starts: list[int], tokens: int, q: int) -> None:
    assert uniform(starts, tokens, 4) == q


def test_a_layer_hands_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is FlashAttention's to it, and the rest to the index; and new tokens where there are positions."""
    dense: list[Any] = []

    def forward(
        self: Any, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, m: Any, output: Tensor, *scales: Any
    ) -> Tensor:
        dense.append((m, query.shape[0]))
        return output.fill_(1)

    def update(self: Any, *args: Any) -> None:
        dense.append("written")

    monkeypatch.setattr(FlashAttentionImpl, "forward", forward)
    monkeypatch.setattr(FlashAttentionImpl, "do_kv_cache_update", update)
    answered: list[Any] = []
    monkeypatch.setattr(gpu_impl, "answer", lambda session, group, *others: answered.append(group))
    made = object.__new__(SaapGpuImpl)
    written: list[Any] = []
    made.scale = 1.0
    made._engine = SimpleNamespace(
        layers={NAME: SimpleNamespace(steps=None)}, session=object(), pool=lambda name, cache: None,
        write=lambda name, key, value, cache, slots, positions: written.append((len(key), len(slots), len(positions))),
    )
    x, layer, other = torch.zeros((8, 2, 16)), SimpleNamespace(layer_name=NAME), SimpleNamespace(layer_name="draft")
    whole = {f.name: None for f in fields(FlashAttentionMetadata)}
    groups: Any = ("group",)
    m = SaapGpuMetadata(**whole, positions=torch.arange(6), groups=groups, rest="rest", rest_token=3)  # type: ignore[arg-type]
    out = torch.zeros((8, 2, 16))
    assert made.forward(layer, x, x, x, x, m, out) is out
    assert answered == ["group"] and dense == [("rest", 5)] and not out[:3].any() and out[3:].all()
    dense.clear()
    m.for_replay = True  # of what only a graph would run
    made.forward(layer, x, x, x, x, m, out)
    m.for_replay = False
    assert dense == [(m, 8)] and len(answered) == 1
    dense.clear()
    made.forward(other, x, x, x, x, m, out)
    made.forward(layer, x, x, x, x, None, out)
    assert dense == [(m, 8), (None, 8)] and len(answered) == 1
    with pytest.raises(NotImplementedError, match="not quantised"):
        made.forward(layer, x, x, x, x, m, out, torch.ones(1))
    dense.clear()
    monkeypatch.setattr(gpu_impl, "get_forward_context", lambda: SimpleNamespace(attn_metadata={NAME: m}))
    made.do_kv_cache_update(layer, x, x, x, torch.arange(7))
    made.do_kv_cache_update(other, x, x, x, torch.arange(7))
    assert written == [(6, 6, 6)] and dense == ["written"]
    assert gpu_builder.SaapGpuMetadata is SaapGpuMetadata
