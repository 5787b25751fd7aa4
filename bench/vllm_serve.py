"""vLLM's own dense attention and the index inside vLLM: ``python bench/vllm_serve.py --model M --routers R``.

Each backend runs in a process of its own, the engine in that process, so that CPU seconds can be counted: on a busy machine they
say more than wall time. Prints for both: time to the first token, CPU and wall time per decode step (median), tokens per second
of CPU, pages of the cache that fit, memory, what was read; and how far greedy tokens agree. Prompts are files of Python's own
library.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

FILES = "argparse.py", "typing.py", "tarfile.py", "inspect.py", "subprocess.py", "datetime.py", "doctest.py", "turtle.py"


def prompts(tokenizer: Any, batch: int, length: int) -> list[list[int]]:
    """Token numbers of `batch` different texts."""
    root, found = Path(os.__file__).parent, []
    for i in range(batch):
        tokens: list[int] = []
        for j in range(len(FILES)):
            if len(tokens) < length:
                tokens += tokenizer((root / FILES[(i + j) % len(FILES)]).read_text())["input_ids"]
        found.append(tokens[:length])
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One backend: all requests at once, the engine stepped by hand."""
    from vllm import LLM, SamplingParams

    ours = options.backend == "saap"
    said = {"routers": options.routers, "selectivity": options.selectivity, "break_even": options.break_even}
    extra: dict[str, Any] = {"attention_backend": "CUSTOM", "additional_config": {"saap": said}} if ours else {}
    llm = LLM(
        options.model, dtype=options.dtype, enforce_eager=True, max_model_len=options.tokens + options.new + 8,
        enable_prefix_caching=options.same, **extra,
    )
    engine = llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=options.new, ignore_eos=True)
    requests = prompts(llm.get_tokenizer(), 1 if options.same else options.batch, options.tokens) * options.batch
    if options.same:  # read once, ahead of the requests
        llm.generate([{"prompt_token_ids": requests[0]}], SamplingParams(max_tokens=1), use_tqdm=False)
    for i, tokens in enumerate(requests[: options.batch]):
        engine.add_request(str(i), {"prompt_token_ids": tokens}, sampling)
    done: dict[str, list[int]] = {}
    made = 0
    prefill, steps, walls = [0.0, 0.0], [], []
    while engine.has_unfinished_requests():
        cpu, wall = time.process_time(), time.perf_counter()
        outputs = engine.step()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        for out in outputs:
            done[out.request_id] = list(out.outputs[0].token_ids)
        now = sum(map(len, done.values()))
        if now - made == options.batch and made >= options.batch:  # every request decoded one token
            steps.append(cpu)
            walls.append(wall)
        else:
            prefill[0] += cpu
            prefill[1] += wall
        made = now
    config = engine.vllm_config
    cache = config.cache_config
    found = {
        "first_token_cpu_s": prefill[0], "first_token_s": prefill[1], "step_cpu_ms": 1e3 * statistics.median(steps),
        "step_ms": 1e3 * statistics.median(walls), "tokens_per_cpu_s": options.batch / statistics.median(steps),
        "blocks": cache.num_gpu_blocks, "block_size": cache.block_size,
        "max_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "tokens": [done[str(i)] for i in range(options.batch)],
    }
    if ours:
        from saap_index.vllm.counters import COUNTERS

        found["read"] = COUNTERS.as_dict()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--routers", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=8000, help="of a prompt (default %(default)s)")
    parser.add_argument("--new", type=int, default=48, help="tokens to decode (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--selectivity", type=float, default=0.05)
    parser.add_argument("--break-even", type=int, default=2048)
    parser.add_argument("--same", action="store_true", help="one prompt for all requests, read once: its pages are shared")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--backend", choices=("dense", "saap"), help="one alone, into --json")
    options = parser.parse_args()
    if options.backend:
        options.json.write_text(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name in ("dense", "saap"):
            out = Path(folder) / f"{name}.json"
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--backend", name, "--json", str(out)], check=True)
            found[name] = json.loads(out.read_text())
    dense, ours = found["dense"], found["saap"]
    for name in ("first_token_cpu_s", "first_token_s", "step_cpu_ms", "step_ms", "tokens_per_cpu_s", "blocks", "max_rss_gb"):
        print(f"{name:20} dense {dense[name]:10.2f}   index {ours[name]:10.2f}   ratio {ours[name] / dense[name]:.3f}")
    for i, (a, b) in enumerate(zip(dense["tokens"], ours["tokens"], strict=True)):
        same = next((n for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        print(f"request {i}: the same first {same} of {len(a)} tokens")
    print(f"read: {ours['read']}")
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
