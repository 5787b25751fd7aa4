"""What vLLM asks an attention backend, on a GPU: FlashAttention's, with list numbers in a tail of its pages. It serves less."""

from __future__ import annotations

from typing import Any, ClassVar

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from .pages import with_tail

MAX_HEAD_SIZE = 256
"""Of the kernels."""


class SaapGpuBackend(FlashAttentionBackend):
    """Prompts, short sequences and layers without routers are FlashAttention's; sliding layers too."""

    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        from .gpu_impl import SaapGpuImpl

        return SaapGpuImpl

    @staticmethod
    def get_builder_cls() -> Any:
        from .gpu_builder import SaapGpuBuilder

        return SaapGpuBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size <= MAX_HEAD_SIZE and bool(super().supports_head_size(head_size))

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == "decoder"

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return KVCacheLayout.LBNHC, KVCacheLayout.LBHNC

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False  # they copy pages without padding

    @classmethod
    def supports_dcp(cls) -> bool:
        return False

    @classmethod
    def supports_pcp(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        padded: AttentionSpec = with_tail(spec)
        return padded
