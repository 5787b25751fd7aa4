"""Routers that were trained from prompts, in the cache folder, under the checksum of the model's weights. Knows files.

A folder appears whole or not at all. Of two processes that train at once, each keeps what it has, layer by layer: the routers of
more prompts stay.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

from .. import files
from ..errors import CompatibilityError, FormatError
from ..files import cache_folder
from ..routers import CONFIG, Routers, load_routers, save_routers
from ..search.params import SELECTIVITY
from ..training.budget import spread_budget
from . import support

LOGGER = logging.getLogger("saap_index")

PROMPTS = "prompts"
"""Of the config: by layer, how many prompts its routers learnt from."""

_WAIT_S, _TRIES = 0.1, 50  # for another process that writes, which takes a moment


def folder_of(decoder: Any) -> Path:
    """Where the routers of a model with these weights are kept."""
    return cache_folder() / "routers" / f"{decoder.config.model_type}-{support.fingerprint(decoder)}"


def kept_routers(folder: Path, config: Any) -> Routers | None:
    """What was kept for a model of this config; None if there is nothing, or nothing that can be used, which is said."""
    if not (folder / CONFIG).exists():
        return None
    try:
        routers = load_routers(folder)
        routers.check(config)
        if not all(layer.tower is not None for layer in routers.layers.values()):
            raise FormatError(f"{folder}: expected two-tower routers, got others")
        return routers
    except (FormatError, CompatibilityError, OSError) as error:
        LOGGER.warning("routers kept for this model cannot be used, and are trained anew: %s", error)
        return None


def prompts_of(routers: Routers | None) -> dict[int, int]:
    """How many prompts the routers of each layer learnt from; 0 where a folder does not say."""
    if routers is None:
        return {}
    counts = routers.config.get(PROMPTS)
    counts = counts if isinstance(counts, dict) else {}
    told = {number: counts.get(str(number)) for number in routers.layers}
    return {number: max(0, count) if isinstance(count, int) else 0 for number, count in told.items()}


def keep(routers: Routers, folder: Path, model_config: Any) -> Path | None:
    """Write routers to their folder, beside layers that another process kept there. None if it cannot be, which is said."""
    try:
        for _ in range(_TRIES):
            with files.hold(folder.parent / ".writing") as is_ours:
                if is_ours:
                    write = partial(save_routers, _merged(routers, kept_routers(folder, model_config)))
                    files.write_folder(folder, write, replaces=lambda there: True)
                    return folder
            time.sleep(_WAIT_S)
        LOGGER.warning("routers are not kept: another process has written to %s for %.0f s", folder, _WAIT_S * _TRIES)
    except OSError as error:
        LOGGER.warning("routers are not kept, and have to be trained again by the next process: %s", error)
    return None


def _merged(ours: Routers, there: Routers | None) -> Routers:
    if there is None:
        return ours
    mine, others = prompts_of(ours), prompts_of(there)
    newer = {n: layer for n, layer in there.layers.items() if n not in mine or others[n] > mine[n]}
    counts = {str(n): count for n, count in sorted({**mine, **{n: others[n] for n in newer}}.items())}
    layers, budget = spread_budget(dict(sorted({**ours.layers, **newer}.items())), SELECTIVITY)
    return Routers({**ours.config, PROMPTS: counts, **({} if budget is None else {"budget": budget})}, layers)
