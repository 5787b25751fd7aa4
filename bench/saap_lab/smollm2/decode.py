"""SmolLM2 writing on behind a long text, with its cache as an index and without: tokens per second, and how often they agree."""

from __future__ import annotations

from typing import Any

import torch

from saap_index.hf import attach, detach
from saap_index.hf.generate import both
from saap_index.routers import Routers

TOKENS = 48


def report(model: Any, tokens: list[int], routers: Routers, new: int = TOKENS) -> list[str]:
    """Lines of a table: ``new`` tokens of greedy decoding behind ``tokens``, every layer at 5 %, the prompt read densely."""
    attach(model, routers)
    try:
        comparison = both(model, torch.tensor([tokens], dtype=torch.int64, device="cpu"), new)
    finally:
        detach(model)
    title = f"generate() behind {len(tokens)} tokens of unseen text, all {len(routers.layers)} layers, float32, greedy:"
    return ["", title, *(f"    {line}" for line in comparison.lines())]
