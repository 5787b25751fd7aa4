"""lm-evaluation-harness on an attached model: a number hidden in a long text, asked for at its end. The data is made here.

    pip install lm-eval
    python examples/needles.py --model ./checkpoint --routers routers --tokens 4096

To the harness the model is any model of transformers: it is handed over as it is, and generates through its index. Tasks of the
kind `generate_until` measure decoding, which is where the index is; `loglikelihood` tasks score prompt and answer in one dense
pass, and measure nothing of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import saap_index as saap
from saap_index.hf import detached
from saap_index.hf.models import load_model

TASK = """
task: needles
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n", "."]
  max_gen_toks: {new}
filter_list:
  - name: number
    filter:
      - function: regex
        regex_pattern: "(\\\\d+)"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""

SENTENCES = (
    "The grass by the river is green.", "A train leaves at noon.", "The baker opens early on Mondays.",
    "Nobody has counted the stairs of the tower.", "It rained until the evening.", "The letter was never sent.",
)


def needle(tokenizer: Any, tokens: int, seed: int) -> dict[str, str]:
    """One document: text that ends in the beginning of the answer, and the answer."""
    rng = random.Random(seed)
    number = str(rng.randrange(10**6, 10**7))
    hidden = f"The magic number of the harbour is {number}."
    ending = "\n\nThe magic number of the harbour is"
    room = tokens - len(tokenizer(hidden + ending, add_special_tokens=False)["input_ids"])
    per_sentence = len(tokenizer(" ".join(SENTENCES), add_special_tokens=False)["input_ids"]) / len(SENTENCES)
    sentences = [rng.choice(SENTENCES) for _ in range(int(room / per_sentence))]
    sentences.insert(rng.randrange(len(sentences) * 3 // 4), hidden)  # not among the last, which are always read
    return {"text": " ".join(sentences) + ending, "answer": number}


def evaluate(model: Any, tokenizer: Any, folder: Path, batch: int) -> float:
    """Share of the needles in ``folder`` that a model, attached or not, brings up."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    found = simple_evaluate(harness, tasks=["needles"], task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0)
    return float(found["results"]["needles"]["exact_match,number"])


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--routers", required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--selectivity", type=float, default=0.05)
    args = parser.parse_args(arguments)
    loaded = load_model(args.model)
    model, tokenizer = loaded.model, loaded.tokenizer
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.setdefault("HF_DATASETS_CACHE", str(folder / "cache"))
        data = folder / "needles.jsonl"
        data.write_text("\n".join(json.dumps(needle(tokenizer, args.tokens, seed)) for seed in range(args.documents)))
        (folder / "needles.yaml").write_text(TASK.format(data=data, new=16))
        saap.attach(model, saap.load_routers(args.routers), args.selectivity)
        results = {"sparse": evaluate(model, tokenizer, folder, args.batch)}
        with detached(model):
            results["dense"] = evaluate(model, tokenizer, folder, args.batch)
    for side, share in results.items():
        print(f"{side:8} {share:.2f} of {args.documents} needles of {args.tokens} tokens")
    return results


if __name__ == "__main__":
    main()
