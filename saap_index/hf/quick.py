"""Routers from a few prompts, offline: what `attach` does with those that a model reads, into a folder of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import LengthError, StateError
from ..routers import CONFIG, Routers
from ..training.prompt import PromptTraining
from . import support
from .attach import Attachment, detach
from .cache import ATTACHED, SaapCache
from .learner import PromptLearner
from .options import AttachOptions
from .plan import Plan, make_plan


def train_on_prompts(
    model: Any, prompts: Sequence[Sequence[int]], options: PromptTraining, folder: Path,
) -> Routers:
    """Train routers on the first prompt and refine them on the others; written to ``folder`` after each, whole or not at all.

    prompts : token numbers of each.

    Raises StateError for a folder that has routers, LengthError for a prompt shorter than ``min_tokens``, and what `attach`
    raises. What an interruption leaves in the folder are the routers of the layers that were through.
    """
    if getattr(model, ATTACHED, None) is not None:
        raise StateError("model: expected one without routers attached; call detach first")
    if (folder / CONFIG).exists():
        raise StateError(f"out: expected a folder without routers, got {folder} with; name another, or delete it to train anew")
    short = [len(prompt) for prompt in prompts if len(prompt) < options.min_tokens]
    if short or not prompts:
        raise LengthError(f"prompts: expected {options.min_tokens} tokens or more, got {short or 'none'}")
    learner = PromptLearner(model, options, folder)

    def make(routers: Routers) -> Plan:
        return make_plan(model, routers, AttachOptions(break_even=0))

    setattr(model, ATTACHED, Attachment(model, learner.make(make)))
    decoder = support.decoder_of(model)
    name = support.cache_argument(decoder)
    try:
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], dtype=torch.int64, device=model.device)
            cache = SaapCache(model, max_tokens=len(prompt))
            with torch.no_grad():
                decoder(ids, use_cache=True, **{name: cache})
            learner.finish(cache)
    finally:
        detach(model)
    return learner.routers()
