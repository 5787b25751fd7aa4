"""vLLM's own dense attention and the index inside vLLM: ``python bench/vllm_serve.py --model M --routers R``.

Three engines, each in a process of its own: vLLM's backend and this one on the same requests, and vLLM's on requests of a few
tokens, which is what a step takes without attention and bounds what any attention can gain. They decode in turn, a step each,
so that whatever else the machine does falls on all alike; a step is counted in CPU and in wall time. Prints for each: time to
the first token, median step, tokens per second, pages of the cache that fit, memory, what was read; and how far greedy tokens
agree. Prompts are files of Python's own library.

On a GPU one engine after the other takes all of its memory: ``--one-at-a-time``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the engine's CPU time is this process's

FILES = "argparse.py", "typing.py", "tarfile.py", "inspect.py", "subprocess.py", "datetime.py", "doctest.py", "turtle.py"
ENGINES = "model alone", "dense", "index"
SHORT = 16
"""Tokens of a prompt whose attention is nothing."""


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


def serve(options: argparse.Namespace, name: str, pipe: Connection) -> None:
    """One engine. For every batch size sends what its prompts took; then, for every True that comes, what a step took; then what
    was written; at the end the rest."""
    from vllm import LLM, SamplingParams

    said = {"routers": options.routers, "selectivity": options.selectivity, "break_even": options.break_even}
    said |= {} if options.sampled_share is None else {"sampled_share": options.sampled_share}
    extra: dict[str, Any] = {"attention_backend": "CUSTOM", "additional_config": {"saap": said}} if name == "index" else {}
    length = SHORT if name == "model alone" else options.tokens
    llm = LLM(
        options.model, dtype=options.dtype, enforce_eager=options.eager, max_model_len=options.tokens + options.new + 8,
        enable_prefix_caching=options.same, **extra, **options.engine,
    )
    engine, tokenizer = llm.llm_engine, llm.get_tokenizer()
    sampling = SamplingParams(temperature=0, max_tokens=options.new + 1, ignore_eos=True)
    made: dict[str, list[int]] = {}

    def step() -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        outputs = engine.step()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        for out in outputs:
            made[out.request_id] = list(out.outputs[0].token_ids)
        return cpu, wall

    for batch in options.batch:
        made.clear()
        requests = prompts(tokenizer, 1 if options.same else batch, length) * batch
        took = [0.0, 0.0]
        for i in range(batch):
            engine.add_request(f"{batch}-{i}", {"prompt_token_ids": requests[i]}, sampling)
            while options.same and not i and not made:  # the others find its pages
                took = [a + b for a, b in zip(took, step(), strict=True)]
        while len(made) < batch:  # all have decoded their first token
            took = [a + b for a, b in zip(took, step(), strict=True)]
        pipe.send({"first_token_cpu_s": took[0], "first_token_s": took[1]})
        while pipe.recv():
            before = sum(map(len, made.values()))
            cpu, wall = step()
            pipe.send((cpu, wall, sum(map(len, made.values())) - before))
        while engine.has_unfinished_requests():
            step()
        pipe.send({"tokens": [made[k] for k in sorted(made)]})
    cache = engine.vllm_config.cache_config
    found: dict[str, Any] = {
        "blocks": cache.num_gpu_blocks, "block_size": cache.block_size,
        "max_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    if name == "index":
        from saap_index.vllm.counters import COUNTERS, REFRESH

        for refresh in REFRESH:
            refresh()
        found["read"] = COUNTERS.as_dict()
    pipe.send(found)


def measure(options: argparse.Namespace, names: tuple[str, ...]) -> dict[int, dict[str, dict[str, Any]]]:
    """By batch size and engine; the engines in turn."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    workers = []
    for name in names:
        pipes[name], theirs = context.Pipe()
        workers.append(context.Process(target=serve, args=(options, name, theirs), daemon=True))
        workers[-1].start()
        theirs.close()
    found = {}
    for batch in options.batch:
        rows = found[batch] = {name: pipe.recv() for name, pipe in pipes.items()}
        if options.wait and batch == options.batch[0]:
            input("prompts are read: Enter when nothing else runs\n")
        steps: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in range(options.new - batch):
            for name, pipe in pipes.items():
                pipe.send(True)
                cpu, wall, made = pipe.recv()
                if made == batch:  # every request decoded one token
                    steps[name].append((cpu, wall))
        for name, pipe in pipes.items():
            pipe.send(False)
            cpu, wall = (statistics.median(x) for x in zip(*steps[name], strict=True))
            rows[name] |= {"step_cpu_ms": 1e3 * cpu, "step_ms": 1e3 * wall, "tokens_per_cpu_s": batch / cpu,
                           "tokens_per_s": batch / wall, "steps": len(steps[name]), **pipe.recv()}
    for name, pipe in pipes.items():
        last = pipe.recv()
        for rows in found.values():
            rows[name] |= last
    for worker in workers:
        worker.join()
    return found


def report(found: dict[str, dict[str, Any]]) -> None:
    """A table of one batch size."""
    alone, dense, ours = (found[name] for name in ENGINES)
    print(f"{'':20}" + "".join(f"{name:>14}" for name in ENGINES) + f"{'index / dense':>16}{'at best':>10}")
    for key in ("first_token_cpu_s", "first_token_s", "step_cpu_ms", "step_ms", "tokens_per_cpu_s", "tokens_per_s", "blocks",
                "max_rss_gb"):
        best = f"{alone[key] / dense[key]:10.3f}" if "step" in key or "tokens_per" in key else ""
        print(f"{key:20}" + "".join(f"{found[name][key]:14.2f}" for name in ENGINES) + f"{ours[key] / dense[key]:16.3f}{best}")
    for i, (a, b) in enumerate(zip(dense["tokens"], ours["tokens"], strict=True)):
        same = next((n for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        print(f"request {i}: the same first {same} of {len(a)} tokens")
    print(f"read: {ours['read']}; {ours['steps']} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--routers", required=True)
    parser.add_argument("--dtype", default="auto", help="bfloat16 is slow on a CPU without instructions for it")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU (default %(default)s)")
    parser.add_argument("--cache-gib", type=int, default=2, help="on the CPU (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=8000, help="of a prompt (default %(default)s)")
    parser.add_argument("--new", type=int, default=48, help="tokens to decode (default %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="requests at once, one number after the other")
    parser.add_argument("--selectivity", type=float, default=0.05)
    parser.add_argument("--sampled-share", type=float, help="default: as the routers are calibrated")
    parser.add_argument("--break-even", type=int, default=2048)
    parser.add_argument("--same", action="store_true", help="one prompt for all requests, read once: its pages are shared")
    parser.add_argument("--compiled", dest="eager", action="store_false", help="with torch.compile, and graphs on a GPU")
    parser.add_argument("--engine", type=json.loads, default={}, help="what else `LLM` is told, JSON")
    parser.add_argument("--one-at-a-time", action="store_true")
    parser.add_argument("--wait", action="store_true", help="for Enter before anything is timed but the prompts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    threads = str(options.threads)
    os.environ |= {"OMP_NUM_THREADS": threads, "SAAP_NUM_THREADS": threads, "VLLM_CPU_KVCACHE_SPACE": str(options.cache_gib)}
    turns = [(name,) for name in ENGINES] if options.one_at_a_time else [ENGINES]
    found: dict[int, dict[str, dict[str, Any]]] = {batch: {} for batch in options.batch}
    for names in turns:
        for batch, rows in measure(options, names).items():
            found[batch] |= rows
    for batch, rows in found.items():
        print(f"batch {batch}")
        report(rows)
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
