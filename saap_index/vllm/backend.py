"""What vLLM asks an attention backend: which configurations it serves, and how a page looks. On the CPU.

A page holds, for every KV head, N rows of key and value side by side, as vLLM lays them out for any backend; behind them, in a
tail that is declared as padding, a list number for each head and token. vLLM counts the tail in all its memory accounting.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

TAIL_ALIGN_BYTES = 16
"""Rows of pages lie on as many bytes; more would cost a small page more than its list numbers do."""


class SaapBackend(AttentionBackend):
    """The rest of what vLLM asks has the answer of its base class: no MLA, sinks, quantised scales, non-causal attention, partial
    multimodal attention, batch invariance or context parallelism."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        from .impl import SaapImpl

        return SaapImpl

    @staticmethod
    def get_builder_cls() -> Any:
        from .builder import SaapBuilder

        return SaapBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return KVCacheLayout.LBHNC, KVCacheLayout.LBNHC

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False  # they copy pages without padding

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        plain = dataclasses.replace(spec, page_size_padded=None)
        tail = plain.num_kv_heads * plain.block_size
        padded = -(-(plain.unpadded_page_size_bytes + tail) // TAIL_ALIGN_BYTES) * TAIL_ALIGN_BYTES
        return dataclasses.replace(spec, page_size_padded=max(padded, spec.page_size_padded or 0))
