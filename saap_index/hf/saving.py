"""A saved prompt: a folder with one safetensors file per layer, which is mapped into memory, not read. Knows caches, not models.

    cache.json                what the cache is, and of which model and routers
    shared.safetensors        which slots are tokens, and the token ids, if there are any
    layer_000.safetensors     keys, values, ids and offset tables of one layer, as they lie in its arena, with room behind them

Loading sorts nothing and copies nothing: the files become the arenas, pages of the disk are read when attention asks for them,
and what is decoded later goes to copies of the pages it touches. The folder must stay as it is while a cache lives on it.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .. import checks
from ..errors import CompatibilityError, FormatError
from ..index import AsymmetricIndex
from ..quantizer import KeyQuantizer
from ..rotated import RotationLengths
from . import support
from .layer import IndexedLayer
from .plan import LayerPlan, Plan
from .slots import NEVER

FORMAT, VERSION = "saap_cache", 2
ROOM_TOKENS = 1024
"""Slots of room in a file, so that tokens may follow a prompt without copying it."""

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def save(cache: Any, path: str | os.PathLike[str], tokens: Tensor | None, decoder: Any) -> None:
    """See `SaapCache.save`."""
    plan: Plan = cache.plan
    target = _folder(path, plan)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    draft.mkdir(parents=True)
    try:
        shared: dict[str, Tensor] = {} if tokens is None else {"tokens": tokens}
        layers = []
        for number, layer in enumerate(cache.layers):
            tensors, about = _indexed(layer) if isinstance(layer, IndexedLayer) else _plain(layer, number)
            if isinstance(layer, IndexedLayer) and layer.visible is not None:
                shared["visible"] = layer.visible
            layers.append({**about, "checksum": _write(tensors, draft / _file(number))})
        about = {
            "format": FORMAT, "version": VERSION, "model": _model(plan, decoder), "routers": _routers(plan), "layers": layers,
            "shared": _write(shared, draft / "shared.safetensors"),
        }  # fmt: skip
        (draft / "cache.json").write_text(json.dumps(about, indent=1) + "\n")
        _replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(cls: Any, path: str | os.PathLike[str], model: Any, plan: Plan, max_tokens: int, verify: bool) -> Any:
    """See `SaapCache.load`."""
    folder = _folder(path, plan)
    try:
        about = json.loads((folder / "cache.json").read_text())
        if about["format"] != FORMAT or about["version"] != VERSION:
            raise FormatError(f"{path}: expected version {VERSION} of a saved prompt, got {about['format']} {about['version']}")
        _compare("model", about["model"], _model(plan, support.decoder_of(model)))
        _compare("routers", about["routers"], _routers(plan))
        shared = _read(folder / "shared.safetensors", about["shared"] if verify else None)
        cache = cls(model, max_tokens=max_tokens)
        if len(cache.layers) != len(about["layers"]):
            raise FormatError(f"{path}: expected {len(cache.layers)} layers, got {len(about['layers'])}")
        devices = [next(layer.parameters()).device for layer in model.get_decoder().layers]
        for number, (layer, saved) in enumerate(zip(cache.layers, about["layers"], strict=True)):
            tensors = _read(folder / _file(number), saved["checksum"] if verify else None)
            restore = _restore_indexed if isinstance(layer, IndexedLayer) else _restore_plain
            restore(layer, saved, {name: x.to(_device(devices[number])) for name, x in tensors.items()}, shared)
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CompatibilityError | FormatError):
            raise
        raise FormatError(f"{path}: expected a prompt written by SaapCache.save, got {type(error).__name__}: {error}") from error
    cache.tokens = shared.get("tokens")
    return cache


def _device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device  # weights on disk compute on the CPU


def _folder(path: str | os.PathLike[str], plan: Plan) -> Path:
    ranks = plan.identity["ranks"]
    return Path(path) if ranks == 1 else Path(path) / f"rank_{plan.identity['rank']}_of_{ranks}"


def _file(number: int) -> str:
    return f"layer_{number:03d}.safetensors"


def _replace(draft: Path, target: Path) -> None:
    """Put the folder in its place; one that was there gives way whole."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        if not (target / "cache.json").is_file():
            raise FileExistsError(f"{target}: expected a new name or a saved prompt, got something else")
        os.replace(target, old)
    os.replace(draft, target)
    shutil.rmtree(old, ignore_errors=True)


# -- one layer -------------------------------------------------------------------------------------------------------------


def _indexed(layer: IndexedLayer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    about: dict[str, Any] = {"kind": "indexed", "slots": layer.slots, "ragged": layer.ragged}
    if layer.index is None or not layer.index.lengths:
        return {}, {**about, "lengths": []}
    index = layer.index
    index.seal()
    lists = index.invlists
    rows = max(lists.lengths)
    tensors = {"removed": torch.from_numpy(np.concatenate(lists.removed)), "rotated": lists.rotated.tensor()}
    names = ("keys", "values", "ids") + (() if lists.pending is None else ("pending",))
    for name in names:
        x = getattr(lists, name)[:, :, :rows].cpu()
        x = functional.pad(x, (0, 0, 0, ROOM_TOKENS) if x.ndim == 4 else (0, ROOM_TOKENS))
        for i, n in enumerate(lists.lengths):
            low, high = (lists.sinks(i), lists.sealed(i)) if name == "ids" else (0, n)
            x[i, :, :low] = 0  # memory that no token owns is not written to disk
            x[i, :, high:] = 0
        tensors[name] = x
    tensors["tables"] = lists.tables[:, :, : max(map(len, lists.segments))].cpu().contiguous()
    if index.tower is not None:  # the lists are this prompt's own
        assert index.key_quantizer is not None
        tensors["centroids"] = index.key_quantizer.centroids.cpu()
    return tensors, {
        **about, "lengths": lists.lengths, "removed": [len(r) for r in lists.removed],
        "rotated": [len(r) for r in lists.rotated.runs], "index": _form(index),
        "held": index.break_even == NEVER,
    }  # fmt: skip


def _form(index: AsymmetricIndex) -> dict[str, Any]:
    """What an index must have in common with one whose arena it takes over; break_even is that of the plan."""
    layout = index.layout
    return {
        "d": index.d, "d_v": index.d_v, "nlist": index.nlist, "heads": index.num_kv_heads, "dtype": _NAMES[index.dtype],
        "sinks": layout.sinks, "window": layout.window, "seal_tokens": layout.seal_tokens, "max_segment": layout.max_segment,
        "mean_run_tokens": layout.mean_run_tokens,
    }  # fmt: skip


def _restore_indexed(layer: IndexedLayer, about: dict[str, Any], tensors: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
    if about["kind"] != "indexed":
        raise CompatibilityError(f"layer {layer.plan.number}: expected one that was indexed when it was saved, got a dense one")
    lengths = checks.counts(about["lengths"], len(about["lengths"]), 2**31 - 1)
    if not lengths:
        return
    keys, values, form = tensors["keys"], tensors["values"], about["index"]
    layer.lazy_initialization(keys, values)
    index = layer.index
    assert index is not None
    if about["held"]:
        index.break_even = NEVER
    centroids = tensors.pop("centroids", None)
    if (centroids is None) != (index.tower is None):
        raise CompatibilityError(
            f"layer {layer.plan.number}: expected routers of the kind this prompt was saved with, got others"
        )
    if centroids is not None:
        calibration = index.calibration
        index.key_quantizer = KeyQuantizer(centroids)
        index.tower = index.tower  # which makes the router for these lists
        index.calibration = calibration  # as where lists are made: it holds for those of this kind
    _compare(f"layer {layer.plan.number}", form, _form(index))
    b, h, rows = keys.shape[:3]
    index.reserve_memory(0, batch=b)
    lists = index.invlists
    segments = [index.layout.segments(n) for n in lengths]
    want = {
        "keys": (b, h, rows, index.d), "values": (b, h, rows, index.d_v), "ids": (b, h, rows),
        "removed": (sum(about["removed"]),), "rotated": (sum(about["rotated"]), 2),
        "tables": (b, h, max(map(len, segments)), index.nlist + 1), **({"pending": (b, h, rows)} if "pending" in tensors else {}),
    }  # fmt: skip
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    if found != want or len(lengths) != b or max(lengths) > rows or keys.dtype != index.dtype or values.dtype != index.dtype:
        raise FormatError(f"layer {layer.plan.number}: expected tensors {want} of {index.dtype}, got {found} of {keys.dtype}")
    for name in ("ids", "tables", "pending"):
        if name in tensors and tensors[name].dtype != torch.int32:
            raise FormatError(f"layer {layer.plan.number}: expected {name} of torch.int32, got {tensors[name].dtype}")
    layer.slots, layer.ragged = checks.integer(about["slots"], "slots", 0), bool(about["ragged"])
    layer.visible = shared.get("visible")
    if layer.visible is not None and tuple(layer.visible.shape) != (b, layer.slots):
        raise FormatError(f"expected visible slots {(b, layer.slots)}, got {tuple(layer.visible.shape)}")
    lists.rotated = RotationLengths.of(tensors["rotated"], about["rotated"], lengths)
    lists.lengths, lists.segments, lists.capacity = lengths, segments, rows
    lists.removed = [np.array(part) for part in np.split(tensors["removed"].cpu().numpy(), np.cumsum(about["removed"])[:-1])]
    for name in ("keys", "values", "ids", "tables", *(("pending",) if "pending" in tensors else ())):
        setattr(lists, name, tensors[name])
    lists._allocate_means(rows)
    for i in range(b):
        lists.update_means(i)
    if layer.room_tokens:
        index.reserve_memory(layer.room_tokens)


def _plain(layer: Any, number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise CompatibilityError(f"layer {number}: expected an attention layer to save, got {type(layer).__name__}")
    about = {"kind": type(layer).__name__, "slots": layer.get_seq_length()}
    return {name: getattr(layer, name) for name in ("keys", "values") if layer.is_initialized}, about


def _restore_plain(layer: Any, about: dict[str, Any], tensors: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
    if about["kind"] != type(layer).__name__:
        raise CompatibilityError(f"expected a {type(layer).__name__}, got a layer that was saved as {about['kind']}")
    if tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = checks.integer(about["slots"], "slots", 0)


# -- files -----------------------------------------------------------------------------------------------------------------


def _write(tensors: dict[str, Tensor], path: Path) -> str:
    """Write one file; returns its checksum."""
    ready = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    try:
        save_file(ready, path)
    except SafetensorError as error:  # safetensors hides what the system said
        raise OSError(f"{path}: expected a path that can be written, got {error}") from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return _checksum(ready)


def _read(path: Path, checksum: str | None) -> dict[str, Tensor]:
    """The tensors of a file, mapped; with a checksum they are all read, and FormatError raised if they differ."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if checksum is not None and _checksum(tensors) != checksum:
        raise FormatError(f"{path}: expected checksum {checksum}, got {_checksum(tensors)}: the file is damaged")
    return tensors


def _checksum(tensors: dict[str, Tensor], value: int = 0) -> str:
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        if tensors[name].numel():
            value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _model(plan: Plan, decoder: Any) -> dict[str, Any]:
    """What a saved prompt must agree with: the shape of the model, and the weights it has at this moment."""
    return {**plan.identity, "weights": support.fingerprint(decoder)}


def _routers(plan: Plan) -> dict[str, str]:
    """A checksum of the routers of every layer: lists mean nothing to others."""
    return {str(number): _router(layer) for number, layer in plan.layers.items()}


def _router(plan: LayerPlan) -> str:
    network = plan.query_router if plan.tower is None else plan.tower
    tensors = {"centroids": plan.key_quantizer.centroids, **{f"router.{name}": x for name, x in network.tensors().items()}}
    rope = "" if plan.rope is None else json.dumps(plan.rope.to_dict(), sort_keys=True)
    return _checksum({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, zlib.crc32(rope.encode()))


def _compare(what: str, saved: dict[str, Any], have: dict[str, Any]) -> None:
    """CompatibilityError that names the first difference."""
    for name in sorted({*saved, *have}):
        if saved.get(name) != have.get(name):
            raise CompatibilityError(
                f"{what}: expected the one this prompt was saved with, {name} {saved.get(name)!r}, got {have.get(name)!r}"
            )
