"""How far the index inside vLLM is from vLLM's own dense attention: ``python bench/vllm_quality.py --model M --routers R``.

The engine reads the first part of a text as a prompt and is then made to write what follows in it, whatever its model would say,
so that both backends have the same tokens before them at every step. Prints, for each share of the tokens, the mean
Kullback-Leibler divergence of the next token's distribution from the dense one, and how often the likeliest token is the same.
Each backend runs in a process of its own. Texts are files of Python's own library.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

TEXTS = "argparse.py", "typing.py", "tarfile.py", "inspect.py"


def distributions(options: argparse.Namespace) -> np.ndarray:
    """float32 (texts, steps, vocabulary): log probabilities of each next token of a text, behind ``options.tokens`` of it."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    steps: dict[int, list[np.ndarray]] = {}

    class Forced(AdapterLogitsProcessor):
        """Keeps what the model says, and lets the text's own token through alone."""

        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: SamplingParams) -> Any:
            text = params.extra_args["text"]
            rows = steps.setdefault(text, [])

            def apply(written: list[int], logits: torch.Tensor) -> torch.Tensor:
                rows.append(torch.log_softmax(logits.float(), -1).cpu().numpy())
                only = torch.full_like(logits, -torch.inf)
                only[params.extra_args["next"][len(written)]] = 0
                return only

            return apply

    said = {"routers": options.routers, "selectivity": options.selectivity, "break_even": options.break_even}
    extra: dict[str, Any] = {}
    if options.selectivity:
        extra = {"attention_backend": "CUSTOM", "additional_config": {"saap": said}}
    llm = LLM(
        options.model, dtype=options.dtype, enforce_eager=True, max_model_len=options.tokens + options.new + 8,
        enable_prefix_caching=False, logits_processors=[Forced], **extra,
    )
    tokenizer, root = llm.get_tokenizer(), Path(os.__file__).parent
    for i in range(options.texts):
        tokens: list[int] = []
        for j in range(len(TEXTS)):
            tokens += tokenizer((root / TEXTS[(i + j) % len(TEXTS)]).read_text())["input_ids"]
        prompt, following = tokens[: options.tokens], tokens[options.tokens : options.tokens + options.new]
        sampling = SamplingParams(
            temperature=0, max_tokens=options.new, ignore_eos=True, extra_args={"text": i, "next": following}
        )
        llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    return np.stack([np.stack(steps[i]) for i in range(options.texts)])


def compare(dense: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """Of the steps behind the first, whose query still belongs to the prompt."""
    p, q = dense[:, 1:].astype(np.float64), ours[:, 1:].astype(np.float64)
    of_text = (np.exp(p) * (p - q)).sum(-1).mean(1)
    same = (p.argmax(-1) == q.argmax(-1)).mean()
    steps = p.shape[0] * p.shape[1]
    return {"kl": float(of_text.mean()), "kl_spread": float(of_text.std()), "agreement": float(same), "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--routers", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=8000, help="of a prompt (default %(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens written behind it (default %(default)s)")
    parser.add_argument("--texts", type=int, default=2, choices=range(1, len(TEXTS) + 1))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--break-even", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--selectivity", type=float, help="one backend alone, 0 for vLLM's own, into --out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.selectivity is not None:
        np.save(options.out, distributions(options))
        return
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for share in (0.0, *options.shares):
            out = Path(folder) / f"{share}.npy"
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--selectivity", str(share), "--out", str(out)], check=True)
            found.append(np.load(out))
        for share, ours in zip(options.shares, found[1:], strict=True):
            rows[str(share)] = row = compare(found[0], ours)
            print(f"{100 * share:5.1f} %  KL {row['kl']:.4f} +- {row['kl_spread']:.4f}   agreement {100 * row['agreement']:.1f} %"
                  f"   ({row['steps']} steps)")
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
