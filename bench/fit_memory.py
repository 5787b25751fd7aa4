"""What learning from a prompt takes of memory: the peak of a process that reads one and decodes, with `attach` and without.

    python bench/fit_memory.py                            SmolLM2, 8192 tokens of Python's documentation
    python bench/fit_memory.py --layers 4 --tokens 4096   a model cut to its first layers, to see that it runs

Each in a process of its own: dense, the model alone; indexed, attached to with routers of the package; learning, attached to
without any. The peak is of everything: weights, activations of the prefill, cache. Learning adds its peak less that of indexed.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import harness
import saap_index as saap
from saap_lab.smollm2 import model as smollm2
from saap_lab.smollm2 import texts

WAYS = ("dense", "indexed", "learning")


def one(way: str, tokens: int, layers: int | None, threads: int) -> None:
    """Print the peak of this process in MB."""
    torch.set_num_threads(threads)
    model, tokenizer = smollm2.load()
    routers = saap.from_pretrained("SmolLM2-135M-Instruct")
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        routers = saap.Routers(
            {**routers.config, "model": {**routers.config["model"], "num_hidden_layers": layers}},
            {n: layer for n, layer in routers.layers.items() if n < layers},
        )
    text = "\n\n".join(text for _, text in texts.unseen_texts())
    ids = torch.tensor([smollm2.encode(tokenizer, text[: 12 * tokens])[:tokens]], dtype=torch.int64)
    if way != "dense":
        saap.attach(model, None if way == "learning" else routers, break_even=1024)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000, help="default %(default)s")
    parser.add_argument("--layers", type=int, help="cut the model to its first layers")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    if args.way:
        one(args.way, args.tokens, args.layers, args.threads)
        return
    same = ["--tokens", str(args.tokens), "--threads", str(args.threads)]
    same += [] if args.layers is None else ["--layers", str(args.layers)]
    peaks = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--way", way, *same]
            env = {**os.environ, "SAAP_CACHE": folder}
            peaks[way] = float(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
        print(f"{way:10} {peaks[way]:8.0f} MB", flush=True)
    for way in WAYS[:2]:
        print(f"learning takes {peaks['learning'] - peaks[way]:.0f} MB more than {way}")
    harness.save(args.json, "fit_memory", {"tokens": args.tokens, "layers": args.layers, "peak_mb": peaks})


if __name__ == "__main__":
    main()
