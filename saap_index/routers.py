"""The routers of a whole model as one thing: made by ``saap train``, checked against a model, handed to indexes. Knows files.

On disk a folder: config.json says for which model, RoPE and data, and how good; model.safetensors holds the arrays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import checks
from .backends import RouterWeights
from .calibration import Calibration
from .errors import CompatibilityError, FormatError, ParameterError, SaapError
from .index import AsymmetricIndex
from .quantizer import KeyQuantizer
from .rope import Rope
from .rope_config import _head_dim, _read, _text_config
from .router import QueryRouter
from .tower import TwoTower

FORMAT, VERSION = "saap_index routers", 1
CONFIG, ARRAYS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class LayerRouters:
    """One attention layer.

    rope : what the index undoes to route, None for lists of keys as they are; model_rope : what the layer rotates by; scale : of
    the logits. tower : set if the lists are made anew for each prompt; the lists of key_quantizer and query_router then only say
    how many, and are zero once written and read. budget_shares : float32 (h,), mean 1 over the model. losses : float32 (h, s),
    see `budget_plan`, at the shares of ``config["budget"]["grid"]``.
    """

    key_quantizer: KeyQuantizer
    query_router: QueryRouter
    rope: Rope | None
    model_rope: Rope | None
    scale: float
    tower: TwoTower | None = None
    calibration: Calibration | None = None
    budget_shares: np.ndarray | None = None
    losses: np.ndarray | None = None

    def with_lists(self, nlist: int) -> LayerRouters:
        """The same for another number of lists; ParameterError unless they are made anew for each prompt."""
        checks.integer(nlist, "nlist", 1)
        if self.tower is None:
            raise ParameterError(f"nlist: expected {self.key_quantizer.nlist}, as these lists were trained, got {nlist}")
        quantizer = _unmade(self.tower.weights.hidden, nlist)
        return replace(self, key_quantizer=quantizer, query_router=self.tower.at(quantizer.centroids))


@dataclass(frozen=True)
class Routers:
    """config : plain data, as in config.json; layers : by number, those that are indexed."""

    config: Mapping[str, Any]
    layers: Mapping[int, LayerRouters] = field(repr=False)

    def check(self, config: Any) -> None:
        """CompatibilityError, by name, unless a transformers config (or its dict) is of the shape and RoPE trained for."""
        want, got = self.config["model"], model_shape(config)
        for name, value in got.items():
            if want[name] != value:
                raise CompatibilityError(f"routers: expected a model with {name} = {want[name]!r}, got {value!r}")
        for number, layer in self.layers.items():
            rope = Rope.from_config(config, layer=number)
            if rope != layer.model_rope:
                raise CompatibilityError(f"routers: expected layer {number} with {layer.model_rope}, got {rope}")

    def index(self, layer: int, **options: Any) -> AsymmetricIndex:
        """An empty index for one layer; options : of `AsymmetricIndex`, nlist among them if lists are made for each prompt.

        ParameterError for a layer without routers.
        """
        if layer not in self.layers:
            raise ParameterError(f"layer: expected one of {sorted(self.layers)}, got {layer!r}")
        found = self.layers[layer]
        if "nlist" in options:
            found = found.with_lists(options.pop("nlist"))
        model, (kv_heads, nlist, d) = self.config["model"], found.key_quantizer.centroids.shape
        own: dict[str, Any] = {"rope": found.rope, "scale": found.scale, "budget_shares": found.budget_shares}
        own |= {name: self.config["layout"][name] for name in ("sinks", "window")}
        index = AsymmetricIndex(d, nlist, model["num_attention_heads"], kv_heads, **{**own, **options})
        index.key_quantizer = found.key_quantizer
        if found.tower is not None:
            index.tower = found.tower  # makes the router for the lists there are
        else:
            index.query_router = found.query_router
        index.calibration = found.calibration
        return index


def model_shape(config: Any) -> dict[str, Any]:
    """What routers must agree with, from a transformers config or its dict; CompatibilityError if it lacks one of them."""
    config = _text_config(config)
    names = ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
    found = {name: _read(config, name) for name in names}
    found["num_key_value_heads"] = _read(config, "num_key_value_heads", found["num_attention_heads"])
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise CompatibilityError(f"config: expected {', '.join(missing)}, got none of a {found['model_type']} model")
    return {**found, "head_dim": _head_dim(config)}


def save_routers(routers: Routers, path: str | os.PathLike[str]) -> None:
    """Write a folder; its files appear whole or not at all, config.json last. Raises OSError."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    layers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for number, layer in sorted(routers.layers.items()):
        layers[str(number)], arrays = pack_layer(layer)
        tensors |= {f"layers.{number}.{name}": x for name, x in arrays.items()}
    config = {"format": FORMAT, "version": VERSION, **routers.config, "layers": layers}
    write_whole(folder / ARRAYS, lambda draft: save_file(tensors, draft, {"format": "pt"}))
    text = json.dumps(config, indent=1, sort_keys=True) + "\n"
    write_whole(folder / CONFIG, lambda draft: draft.write_text(text))


def load_routers(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Routers:
    """Read what `save_routers` wrote. FormatError if it is damaged or something else, OSError if it cannot be opened."""
    folder = Path(path)
    text = (folder / CONFIG).read_text()
    try:
        config = json.loads(text)
        if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("version") != VERSION:
            got = config.get("format"), config.get("version")
            raise FormatError(f"expected format {FORMAT!r}, version {VERSION}, got {got}")
        tensors = load_file(folder / ARRAYS, device=str(device))
        layers = {}
        for name, facts in config.pop("layers").items():
            prefix = f"layers.{name}."
            arrays = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
            layers[int(name)] = unpack_layer(facts, arrays)
        heads, dim = config["model"]["num_key_value_heads"], config["model"]["head_dim"]
        for number, layer in layers.items():
            h, _, d = layer.key_quantizer.centroids.shape
            if (h, d) != (heads, dim):
                raise FormatError(f"layer {number}: expected {heads} KV heads and {dim} dims, got {h} and {d}")
        return Routers({key: value for key, value in config.items() if key not in ("format", "version")}, layers)
    except (SafetensorError, SaapError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{folder}: expected routers written by saap train, got {type(error).__name__}: {error}") from error


def pack_layer(layer: LayerRouters) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One layer as plain data and as arrays on the CPU, in 16 bits where that loses nothing.

    Lists that are made anew for each prompt are none to be stored.
    """
    facts = {
        "rope": None if layer.rope is None else layer.rope.to_dict(),
        "model_rope": None if layer.model_rope is None else layer.model_rope.to_dict(), "scale": layer.scale,
        "first_knot": layer.query_router.first_knot, "count_lists": layer.query_router.count_lists,
        "two_tower": layer.tower is not None,
    }  # fmt: skip
    if layer.tower is None:
        arrays, weights = {"centroids": layer.key_quantizer.centroids}, layer.query_router.tensors()
    else:
        arrays, weights = {}, layer.tower.tensors()
        facts["nlist"] = layer.key_quantizer.nlist
    arrays |= {f"router.{name}": _narrow(x) for name, x in weights.items()}
    if layer.calibration is not None:
        arrays["calibration"] = layer.calibration.miss
    for name in ("budget_shares", "losses"):
        value = getattr(layer, name)
        if value is not None:
            arrays[name] = torch.from_numpy(np.asarray(value, np.float32))
    # cloned, for the weights of a symmetric router are the centroids, and a file shares no memory
    return facts, {name: x.detach().cpu().contiguous().clone() for name, x in arrays.items()}


def unpack_layer(facts: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> LayerRouters:
    """What `pack_layer` packed. Raises LookupError, ValueError or SaapError for anything else."""
    rope, model_rope = (None if facts[name] is None else Rope.from_dict(facts[name]) for name in ("rope", "model_rope"))
    d = int(arrays["router.hidden"].shape[2])
    own = bool(facts["two_tower"])
    if own and "centroids" not in arrays:
        quantizer = _unmade(arrays["router.hidden"], int(facts["nlist"]))
    else:
        quantizer = KeyQuantizer(arrays["centroids"])
    weights = RouterWeights.of(arrays, d if own else quantizer.nlist, "router.").map(_wide)
    tower = TwoTower(weights, int(facts["first_knot"])) if own else None
    if tower is None:
        router = QueryRouter(weights, int(facts["first_knot"]), bool(facts["count_lists"]))
    else:
        router = tower.at(quantizer.centroids)
    router.check_heads(*(quantizer.centroids.shape[i] for i in (0, 2, 1)))
    calibration = Calibration(arrays["calibration"].cpu()) if "calibration" in arrays else None
    shares, losses = (arrays[name].cpu().numpy() if name in arrays else None for name in ("budget_shares", "losses"))
    return LayerRouters(quantizer, router, rope, model_rope, float(facts["scale"]), tower, calibration, shares, losses)


def _unmade(hidden: Tensor, nlist: int) -> KeyQuantizer:
    """So many lists that a prompt will make, for a router with weights hidden : (h, u, d), on their device."""
    heads, _, d = hidden.shape
    return KeyQuantizer(torch.zeros((heads, nlist, d), dtype=torch.float32, device=hidden.device))


def _narrow(x: Tensor) -> Tensor:
    short = x.bfloat16()
    return short if torch.equal(short.float(), x) else x


def _wide(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise FormatError(f"router: expected weights in float32 or bfloat16, got {x.dtype}")
    return x.float()


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file that appears at ``path`` complete or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(draft)
        draft.chmod(0o644)  # safetensors lets the owner alone read
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except SafetensorError as error:  # safetensors hides what the system said
        raise OSError(f"{path}: expected a path that can be written, got {error}") from error
    finally:
        draft.unlink(missing_ok=True)
