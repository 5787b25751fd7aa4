"""How far a call travels through the package: files entered, moves between files, returns to a file that was left.

    python bench/trips.py              # the calls of a decode step on the CPU, and, with tests/ at hand, on the emulated GPU
    python bench/trips.py --path       # and the files in order

A measure of how much a reader must hold in mind who follows one call: taken by `sys.setprofile` in steady state, after some calls
of the same kind.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import saap_index as saap

ROOT = Path(saap.__file__).parent
D, HEADS, KV_HEADS, TOKENS = 32, 4, 2, 200


def trip(call: Callable[[], Any]) -> list[str]:
    """Files of the package in the order in which Python is in them, each once per stay."""
    stack: list[str] = []
    stays: list[str] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(ROOT) or event not in ("call", "return"):
            return
        if event == "call":
            stack.append(str(path.relative_to(ROOT)))
        else:
            stack.pop()
        if stack and (not stays or stays[-1] != stack[-1]):
            stays.append(stack[-1])

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return stays


def tokens(seed: int, heads: int, n: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, heads, n, D), generator=generator, dtype=torch.float32, device="cpu")


def trained(backend: str) -> saap.AsymmetricIndex:
    """An index in steady state: segments are sealed, and steps of each kind have been made."""
    options: dict[str, Any] = {"window": 16, "sinks": 2, "seal_tokens": 16, "break_even": 0, "rope": saap.Rope(head_dim=D)}
    index = saap.AsymmetricIndex(D, 8, HEADS, KV_HEADS, backend=None if backend == "cpu" else backend, **options)
    index.train(tokens(0, KV_HEADS, 400))
    index.add(tokens(1, KV_HEADS, TOKENS), tokens(2, KV_HEADS, TOKENS))
    for seed in range(3):
        index.search_attend(tokens(seed, HEADS, 1))
        index.add(tokens(seed, KV_HEADS, 1), tokens(seed, KV_HEADS, 1))
    return index


def to_the_next_seal(index: saap.AsymmetricIndex) -> None:
    while index.layout.num_blocks(index.ntotal + 1) == index.layout.num_blocks(index.ntotal):
        index.add(tokens(5, KV_HEADS, 1), tokens(6, KV_HEADS, 1))


def measure(backend: str) -> dict[str, list[str]]:
    """Stays by the name of the call."""
    index, query, key = trained(backend), tokens(3, HEADS, 1), tokens(4, KV_HEADS, 1)
    found = {
        "search_attend of one query": trip(lambda: index.search_attend(query)),
        "add of one token": trip(lambda: index.add(key, key)),
    }
    to_the_next_seal(index)
    return found | {"add that seals": trip(lambda: index.add(key, key))}


def backends() -> list[str]:
    try:
        import emulated
    except ImportError:  # the emulated device lies with the tests
        return ["cpu"]
    emulated.register()
    return ["cpu", "cuda-emu"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", action="store_true", help="print the files in order")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'backend':<10}{'call':<28}{'files':>7}{'moves':>7}{'returns':>9}")
    for backend in backends():
        for name, stays in measure(backend).items():
            files = len(set(stays))
            print(f"{backend:<10}{name:<28}{files:>7}{len(stays) - 1:>7}{len(stays) - files:>9}")
            if options.path:
                print("    " + " > ".join(stays))


if __name__ == "__main__":
    main()
