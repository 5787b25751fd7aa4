"""transformers' tensor parallelism: two processes on the CPU, each with an index over its own KV heads, give one's tokens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from hf_models import greedy, left_padded, prompt, tiny

import saap_index

TESTS = Path(__file__).parents[1]


def test_two_processes_give_the_tokens_of_one(tmp_path: Path) -> None:
    model = tiny("llama")
    inputs = left_padded(prompt(2, 110), [0, 37])
    torch.save(greedy(model, inputs), tmp_path / "want.pt")
    torch.save(greedy(model, inputs, num_beams=2), tmp_path / "beams.pt")
    model.save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(Path(saap_index.__file__).parent.parent), str(TESTS), *sys.path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    done = subprocess.run(
        [*command, str(TESTS / "hf_tensor_parallel.py"), str(tmp_path)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert (tmp_path / "passed_0").exists() and (tmp_path / "passed_1").exists()
