"""Routers by name: those that installed packages bring, and folders. Knows the names, not what is trained.

A package brings routers by the entry point group ``saap_index.routers``: the name is that of the model, the value a folder, as
`save_routers` writes it, that lies in one of its modules.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import torch

from .errors import ParameterError
from .routers import CONFIG, Routers, load_routers

GROUP = "saap_index.routers"


def shipped_routers() -> dict[str, Path]:
    """Folders of the routers that installed packages bring, by the name of the model."""
    found = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda each: each.name)
    return {each.name: Path(each.load()) for each in found}


def from_pretrained(name: str | os.PathLike[str], device: torch.device | str = "cpu") -> Routers:
    """Routers of a folder, as `load_routers` reads them, or by the name of a model that a package brings routers of.

    name : a folder that is there comes first. A name is that of the model, as in "SmolLM2-135M-Instruct", with or without the
        organisation before it.

    Raises ParameterError, with the names there are, for neither a folder with routers nor a name, and what `load_routers` raises.
    """
    folder = Path(name)
    if (folder / CONFIG).exists() or folder.is_dir():
        return load_routers(folder, device)
    shipped = shipped_routers()
    place = shipped.get(os.fspath(name).rpartition("/")[2])
    if place is None:
        names = ", ".join(shipped) or "none are installed"
        raise ParameterError(f"routers: expected a folder made by saap train, or a name of shipped ones ({names}), got {name}")
    return load_routers(place, device)
