"""What this plugin cannot do, refused by name when the engine starts. Reads vLLM's configuration, imports no vLLM."""

from __future__ import annotations

import re
from typing import Any

from ..errors import CompatibilityError

TESTED = ("0.32",)
"""Releases of vLLM that the tests have run with."""

_LAYER = re.compile(r"(?:language_model\.)?(?:model\.)?(?:language_model\.)?layers\.(\d+)\.self_attn\.attn")


def untested(version: str) -> str | None:
    """A warning for a release of vLLM that no test has seen."""
    if any(version == x or version.startswith(f"{x}.") for x in TESTED):
        return None
    return f"saap_index.vllm: tested with vLLM {', '.join(TESTED)}, this is {version}"


def layer_number(name: str) -> int | None:
    """The number of a decoder layer by the name of its attention; None for that of a draft model or an encoder."""
    match = _LAYER.fullmatch(name)
    return int(match[1]) if match else None


def check_layer(
    num_heads: int, num_kv_heads: int, head_size: int, alibi_slopes: Any, logits_soft_cap: float | None, attn_type: str,
    kv_sharing_target_layer_name: str | None, others: dict[str, Any],
) -> None:
    """CompatibilityError, naming it, for a kind of attention that is not plain causal softmax over keys of its own."""
    reasons = []
    if alibi_slopes is not None:
        reasons.append("ALiBi slopes")
    if logits_soft_cap:
        reasons.append(f"a soft cap of logits ({logits_soft_cap})")
    if attn_type != "decoder":
        reasons.append(f"attention of type {attn_type}")
    if kv_sharing_target_layer_name is not None:
        reasons.append(f"keys and values of another layer ({kv_sharing_target_layer_name})")
    reasons += [f"{name}" for name, value in others.items() if value is not None]
    if num_heads % num_kv_heads:
        reasons.append(f"{num_heads} query heads over {num_kv_heads} KV heads")
    if head_size % 8:
        reasons.append(f"{head_size} dims a head")
    if reasons:
        raise CompatibilityError(f"saap_index: expected plain causal attention, got {'; '.join(reasons)}")


def check_engine(config: Any, on_gpu: bool = False) -> None:
    """CompatibilityError, naming it, for a ``VllmConfig`` whose positions or pages are not what the list numbers need; on a GPU
    also for steps in halves that run at the same time, for all share one scratch memory."""
    reasons = []
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    if getattr(model, "uses_mrope", False):
        reasons.append("M-RoPE, whose positions are not one number")
    if config.kv_transfer_config is not None:
        reasons.append("a KV connector, which copies pages without their list numbers")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        reasons.append("context parallelism")
    if on_gpu and getattr(parallel, "use_ubatching", False):
        reasons.append("dual batch overlap")
    block, hashed = cache.block_size, getattr(cache, "hash_block_size", None)
    if hashed not in (None, block):
        reasons.append(f"prefixes hashed by {hashed} tokens in blocks of {block}, which copies parts of pages")
    if reasons:
        raise CompatibilityError(f"saap_index: refuses {'; '.join(reasons)}")
