"""The routers of a whole model as one thing: made by ``saap train``, checked against a model, handed to indexes. Knows files.

On disk a folder: config.json says for which model, RoPE and data, how good, and the checksum of model.safetensors, which holds
the arrays.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from . import checks, files
from .backends import RouterWeights
from .errors import CompatibilityError, DeviceError, FormatError, ParameterError
from .index import AsymmetricIndex
from .routing.calibration import Calibration
from .routing.quantizer import KeyQuantizer
from .routing.rope import Rope
from .routing.rope_config import _head_dim, _read, _text_config
from .routing.router import QueryRouter
from .routing.sampling import Sampling
from .routing.trained import MAX_LISTS, TrainedLayer, unmade_lists
from .routing.two_tower import TwoTower

FORMAT, VERSION = "saap_index routers", 1
CONFIG, ARRAYS = "config.json", "model.safetensors"
LayerRouters = TrainedLayer
"""One attention layer of `Routers`."""


@dataclass(frozen=True)
class Routers:
    """config : plain data, as in config.json; layers : by number, those that are indexed."""

    config: Mapping[str, Any]
    layers: Mapping[int, TrainedLayer] = field(repr=False)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers that training advises to leave dense, for `attach`: their attention is spread too evenly for a small budget."""
        return tuple(self.config.get("budget", {}).get("dense_layers", ()))

    def check(self, config: Any) -> None:
        """CompatibilityError, by name, unless a transformers config (or its dict) is of the shape and RoPE trained for."""
        want, got = self.config.get("model") or {}, model_shape(config)
        for name, value in got.items():
            if want.get(name) != value:
                raise CompatibilityError(f"routers: expected a model with {name} = {want.get(name)!r}, got {value!r}")
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
        trained = self.layers[layer]
        if "nlist" in options:
            trained = trained.with_lists(options.pop("nlist"))
        kv_heads, nlist, d = trained.quantizer.centroids.shape
        heads = self.config["model"].get("num_attention_heads")
        if heads is None:
            raise CompatibilityError("routers: expected a model with num_attention_heads in their config, got none")
        own: dict[str, Any] = {"rope": trained.rope, "scale": trained.scale, "budget_shares": trained.budget_shares}
        own |= {name: value for name, value in self.config.get("layout", {}).items() if name in ("sinks", "window")}
        index = AsymmetricIndex(d, nlist, heads, kv_heads, **{**own, **options})
        index.load_trained(trained)
        return index


def model_shape(config: Any) -> dict[str, Any]:
    """What routers must agree with, from a transformers config or its dict; CompatibilityError if it lacks one of them."""
    config = _text_config(config)
    if _read(config, "per_layer_config" if isinstance(config, Mapping) else "is_heterogeneous"):
        raise CompatibilityError(f"config: expected layers of one shape, got a {_read(config, 'model_type')} model of several")
    names = ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
    shape = {name: _read(config, name) for name in names}
    shape["num_key_value_heads"] = _read(config, "num_key_value_heads", shape["num_attention_heads"])
    missing = [name for name, value in shape.items() if value is None]
    if missing:
        raise CompatibilityError(f"config: expected {', '.join(missing)}, got none of a {shape['model_type']} model")
    return {**shape, "head_dim": _head_dim(config)}


def save_routers(routers: Routers, path: str | os.PathLike[str]) -> None:
    """Write a folder; its two files appear whole or not at all, and config.json has a checksum of the other. Raises OSError."""
    layers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for number, layer in sorted(routers.layers.items()):
        layers[str(number)], arrays = pack_layer(layer)
        tensors |= {f"layers.{number}.{name}": x for name, x in arrays.items()}
    config = {"format": FORMAT, "version": VERSION, **routers.config, "layers": layers}

    def arrays_file(draft: Path) -> None:
        files.save_tensors(draft, tensors, {"format": "pt"})
        config["checksum"] = _checksum(draft.read_bytes())

    def config_file(draft: Path) -> None:
        draft.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    files.write_files(path, {ARRAYS: arrays_file, CONFIG: config_file})


def load_routers(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Routers:
    """Read what `save_routers` wrote.

    A folder that an older version wrote has no checksum that ties its two files together: it loads with a warning.

    Raises FormatError if it is damaged, something else, or two files that do not belong together; OSError if it cannot be opened;
    DeviceError for a device that is not there.
    """
    folder, place = Path(path), checks.device(device)
    config = files.read_json(folder / CONFIG, "routers written by saap train")
    raw = (folder / ARRAYS).read_bytes()
    try:
        routers, tied = _routers_of(config, raw), "checksum" in config
    except files.DAMAGE as error:
        raise FormatError(f"{folder}: expected routers written by saap train, got {type(error).__name__}: {error}") from error
    if not tied:
        warnings.warn(
            f"{folder}: expected a checksum of {ARRAYS} in {CONFIG}, got a folder of an older version: nothing tells whether the "
            "two files belong together; save_routers(load_routers(folder), folder) ties them",
            stacklevel=2,
        )
    if place.type == "cpu":
        return routers
    try:
        return Routers(routers.config, {number: layer.to(place) for number, layer in routers.layers.items()})
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise DeviceError(f"device: expected one that is there, got {device}: {error}") from error


def _routers_of(config: Any, raw: bytes) -> Routers:
    """Routers from config.json's content and model.safetensors' bytes. FormatError and other errors for what does not fit."""
    if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("version") != VERSION:
        got = (config.get("format"), config.get("version")) if isinstance(config, dict) else type(config).__name__
        raise FormatError(f"expected format {FORMAT!r}, version {VERSION}, got {got}")
    want = config.get("checksum", _checksum(raw))
    if _checksum(raw) != want:
        raise FormatError(
            f"expected {ARRAYS} with the checksum {want} that {CONFIG} names, got {_checksum(raw)}: damaged, or one of the two "
            "files is of other routers"
        )
    model, facts = config["model"], config["layers"]
    heads, dim = (checks.integer(model[name], name, 1) for name in ("num_key_value_heads", "head_dim"))
    for name in ("sinks", "window"):
        checks.integer(config.get("layout", {}).get(name, 0), name, 0)
    for number in config.get("budget", {}).get("dense_layers", ()):
        checks.integer(number, "dense_layers", 0)
    tensors = load(raw)
    layers = {}
    for name, fact in sorted(facts.items(), key=lambda item: int(item[0])):
        number = checks.integer(int(name), "layer", 0, model.get("num_hidden_layers", 2**31) - 1)
        prefix = f"layers.{number}."
        arrays = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        layers[number] = unpack_layer(fact, arrays)
        h, _, d = layers[number].quantizer.centroids.shape
        if (h, d) != (heads, dim):
            raise FormatError(f"layer {number}: expected {heads} KV heads and {dim} dims, got {h} and {d}")
    if len(layers) != len(facts) or tensors:
        raise FormatError(f"expected arrays of the layers in {CONFIG} alone, got {sorted(tensors) or list(facts)}")
    ours = ("format", "version", "layers", "checksum")
    return Routers({key: value for key, value in config.items() if key not in ours}, layers)


def _checksum(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:32]


def pack_layer(layer: TrainedLayer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One layer as plain data and as arrays on the CPU, in 16 bits where that loses nothing.

    Lists that are made anew for each prompt are none to be stored.
    """
    facts = {
        "rope": None if layer.rope is None else layer.rope.to_dict(),
        "model_rope": None if layer.model_rope is None else layer.model_rope.to_dict(), "scale": layer.scale,
        "first_knot": layer.router.first_knot, "count_lists": layer.router.size_weighted,
        "two_tower": layer.tower is not None,
    }
    if layer.tower is None:
        arrays, weights = {"centroids": layer.quantizer.centroids}, layer.router.tensors()
    else:
        arrays, weights = {}, layer.tower.tensors()
        facts["nlist"] = layer.quantizer.nlist
        if layer.shared_lists is not None:
            arrays["shared_lists"] = _narrow(layer.shared_lists.centroids)
    arrays |= {f"router.{name}": _narrow(x) for name, x in weights.items()}
    if layer.calibration is not None:
        arrays["calibration"] = layer.calibration.unread_mass
    if layer.sampling is not None:
        arrays["sampling"] = layer.sampling.table()
    for name in ("budget_shares", "losses"):
        value = getattr(layer, name)
        if value is not None:
            arrays[name] = torch.from_numpy(np.asarray(value, np.float32))
    # cloned, for the weights of a symmetric router are the centroids, and a file shares no memory
    return facts, {name: x.detach().cpu().contiguous().clone() for name, x in arrays.items()}


def unpack_layer(facts: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> TrainedLayer:
    """What `pack_layer` packed. Raises LookupError, TypeError, ValueError or SaapError for anything else."""
    rope, model_rope = (None if facts[name] is None else Rope.from_dict(facts[name]) for name in ("rope", "model_rope"))
    heads, _, d = map(int, arrays["router.hidden"].shape)
    for each in (rope, model_rope):
        if each is not None and each.head_dim != d:
            raise FormatError(f"rope: expected head_dim {d}, got {each.head_dim}")
    scale, first_knot, own = facts["scale"], facts["first_knot"], facts["two_tower"]
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < float(scale) < math.inf:
        raise FormatError(f"scale: expected a positive finite number, got {scale!r}")
    if not isinstance(own, bool) or not isinstance(facts["count_lists"], bool):
        raise FormatError(f"two_tower, count_lists: expected booleans, got {own!r} and {facts['count_lists']!r}")
    tower = None
    if own:
        weights = {name: _wide(x) for name, x in arrays.items() if name.startswith("router.")}
        tower = TwoTower.of(weights, d, first_knot, "router.")
        if "centroids" in arrays:
            quantizer = KeyQuantizer(arrays["centroids"], tower.transform)
            router = tower.for_lists(quantizer.centroids)
        else:
            quantizer, router = unmade_lists(tower, checks.integer(facts["nlist"], "nlist", 1, MAX_LISTS))
    else:
        quantizer = KeyQuantizer(arrays["centroids"])
        router = QueryRouter(RouterWeights.of(arrays, quantizer.nlist, "router.").map(_wide), first_knot, facts["count_lists"])
    router.check_heads(*(quantizer.centroids.shape[i] for i in (0, 2, 1)))
    calibration = Calibration(arrays["calibration"]) if "calibration" in arrays else None
    if calibration is not None and len(calibration.unread_mass) != heads:
        raise FormatError(f"calibration: expected {heads} KV heads, got {len(calibration.unread_mass)}")
    sampling = Sampling.of_table(arrays["sampling"]) if "sampling" in arrays else None
    if sampling is not None and len(sampling) != heads:
        raise FormatError(f"sampling: expected {heads} KV heads, got {len(sampling)}")
    shares, losses = (arrays[name].numpy() if name in arrays else None for name in ("budget_shares", "losses"))
    if shares is not None:
        shares = checks.shares(shares, "budget_shares", heads)
    if losses is not None and (losses.ndim != 2 or len(losses) != heads or not np.isfinite(losses).all()):
        raise FormatError(f"losses: expected finite numbers ({heads}, s), got shape {losses.shape}")
    shared = KeyQuantizer(_wide(arrays["shared_lists"])) if own and "shared_lists" in arrays else None
    if shared is not None and (shared.centroids.shape[0], shared.centroids.shape[2]) != (heads, d):
        raise FormatError(f"shared_lists: expected {heads} KV heads and {d} dims, got {tuple(shared.centroids.shape)}")
    return TrainedLayer(quantizer, router, rope, model_rope, float(scale), tower, calibration, shares, losses, shared, sampling)


def _narrow(x: Tensor) -> Tensor:
    short = x.bfloat16()
    return short if torch.equal(short.float(), x) else x


def _wide(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise FormatError(f"router: expected weights in float32 or bfloat16, got {x.dtype}")
    return x.float()
