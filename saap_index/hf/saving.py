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
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .. import checks, files
from ..errors import CompatibilityError, FormatError
from ..index import AsymmetricIndex
from ..invlists.arena import PLAIN_ARRAYS
from ..invlists.coded import NONE, plain_rows
from ..invlists.gaps import Gaps
from ..invlists.layout import NEVER
from ..invlists.rotated import RotationLengths
from ..io import check_lists, coded_spans, pack_lists, stretches
from ..routing.quantizer import KeyQuantizer
from . import support
from .layer import IndexedLayer
from .layer_plan import LayerPlan
from .plan import Plan

FORMAT, VERSION = "saap_cache", 4
CONFIG = "cache.json"
ROOM_TOKENS = 1024
"""Slots of room in a file, so that tokens may follow a prompt without copying it."""

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def save(cache: Any, path: str | os.PathLike[str], tokens: Tensor | None, decoder: Any) -> None:
    """See `SaapCache.save`."""
    plan: Plan = cache.plan
    if tokens is not None:
        checks.array(tokens, "tokens", "b n", (None, None), [torch.int64], tokens.device)

    def write(draft: Path) -> None:
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
        }
        (draft / CONFIG).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    files.write_folder(_folder(path, plan), write, replaces=lambda target: (target / CONFIG).is_file())


def load(cls: Any, path: str | os.PathLike[str], model: Any, plan: Plan, max_tokens: int, verify: bool) -> Any:
    """See `SaapCache.load`."""
    folder, cache = _folder(path, plan), cls(model, max_tokens=max_tokens)
    files.recover(folder)
    about = files.read_json(folder / CONFIG, "a prompt written by SaapCache.save")
    try:
        _fill(cache, about, folder, model, plan, verify)
    except files.DAMAGE as error:
        if isinstance(error, CompatibilityError | FormatError | torch.OutOfMemoryError):
            raise
        raise FormatError(f"{path}: expected a prompt written by SaapCache.save, got {type(error).__name__}: {error}") from error
    return cache


def _fill(cache: Any, about: dict[str, Any], folder: Path, model: Any, plan: Plan, verify: bool) -> None:
    """Layers and tokens of an empty cache. Everything that is counted or indexed by is checked, keys and values are not read."""
    if about["format"] != FORMAT or about["version"] != VERSION:
        raise FormatError(f"{folder}: expected version {VERSION} of a saved prompt, got {about['format']} {about['version']}")
    _compare("model", about["model"], _model(plan, support.decoder_of(model)))
    _compare("routers", about["routers"], _routers(plan))
    shared = _read(folder / "shared.safetensors", about["shared"] if verify else None)
    _check_shared(shared)
    if len(cache.layers) != len(about["layers"]):
        raise FormatError(f"{folder}: expected {len(cache.layers)} layers, got {len(about['layers'])}")
    devices = [next(layer.parameters()).device for layer in model.get_decoder().layers]
    for number, (layer, saved) in enumerate(zip(cache.layers, about["layers"], strict=True)):
        tensors = _read(folder / _file(number), saved["checksum"] if verify else None)
        if isinstance(layer, IndexedLayer):
            _restore_indexed(layer, saved, tensors, shared, _device(devices[number]), verify)
        else:
            _restore_plain(layer, number, saved, tensors, _device(devices[number]))
    counts = {layer.get_seq_length() for layer in cache.layers}
    if len(counts) > 1:
        raise FormatError(f"{folder}: expected as many tokens in every layer, got {sorted(counts)}")
    cache.tokens = shared.get("tokens")


def _check_shared(shared: dict[str, Tensor]) -> None:
    forms = {"tokens": torch.int64, "visible": torch.bool}
    for name, x in shared.items():
        if x.dtype != forms.get(name) or x.ndim != 2:
            raise FormatError(f"{name}: expected tokens, int64 (b, n), and visible, bool (b, n), got {x.dtype} {tuple(x.shape)}")


def _device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device  # weights on disk compute on the CPU


def _folder(path: str | os.PathLike[str], plan: Plan) -> Path:
    ranks = plan.identity["ranks"]
    return Path(path) if ranks == 1 else Path(path) / f"rank_{plan.identity['rank']}_of_{ranks}"


def _file(number: int) -> str:
    return f"layer_{number:03d}.safetensors"


# -- one layer -------------------------------------------------------------------------------------------------------------


def _indexed(layer: IndexedLayer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    about: dict[str, Any] = {"kind": "indexed", "slots": layer.slots, "ragged": layer.ragged}
    if layer.index is None or not layer.index.lengths:
        return {}, {**about, "lengths": []}
    index = layer.index
    index.seal()
    lists = index.invlists
    tensors = pack_lists(lists, ROOM_TOKENS)
    if index.tower is not None:  # the lists are this prompt's own
        assert index.key_quantizer is not None
        tensors["centroids"] = index.key_quantizer.centroids.cpu()
    return tensors, {
        **about, "lengths": lists.lengths, **stretches(lists), "index": _form(index), "held": index.break_even == NEVER,
        "break_even": index.break_even,
    }


def _form(index: AsymmetricIndex) -> dict[str, Any]:
    """What an index must have in common with one whose arena it takes over; break_even goes with the arena."""
    layout = index.layout
    return {
        "d": index.d, "d_v": index.d_v, "nlist": index.nlist, "heads": index.num_kv_heads, "dtype": _NAMES[index.dtype],
        "sinks": layout.sinks, "window": layout.window, "seal_tokens": layout.seal_tokens, "max_segment": layout.max_segment,
        "mean_run_tokens": layout.mean_run_tokens, **({} if index.storage is None else {"storage": index.storage}),
    }


def _restore_indexed(
    layer: IndexedLayer, about: dict[str, Any], tensors: dict[str, Tensor], shared: dict[str, Tensor], device: torch.device,
    verify: bool,
) -> None:
    """Make the mapped arrays the arena of the layer's index. Numbers in them that are followed are checked first."""
    name, kind = f"layer {layer.plan.number}", about["kind"]
    if kind != "indexed":
        raise CompatibilityError(f"{name}: expected one that was indexed when it was saved, got a dense one ({kind})")
    lengths = checks.counts(about["lengths"], len(about["lengths"]), 2**31 - 1)
    slots, ragged = checks.integer(about["slots"], "slots", 0), about["ragged"]
    if not lengths:
        if tensors or slots:
            raise FormatError(f"{name}: expected neither slots nor tensors without sequences, got {slots} and {sorted(tensors)}")
        return
    visible = shared.get("visible")
    _check_slots(name, lengths, slots, ragged, visible)
    coded = PLAIN_ARRAYS[0] in tensors
    numbers = PLAIN_ARRAYS if coded else ("keys", "values")
    keys, values = (tensors[x] for x in numbers)
    _check_arena(name, layer.plan, keys, values, [0] * len(lengths) if coded else lengths)
    centroids = tensors.pop("centroids", None)
    tensors = {key: x.to(device) for key, x in tensors.items()}
    layer.lazy_initialization(*(tensors[x] for x in numbers))
    index = layer.index
    assert index is not None
    held = _boolean(about["held"], "held")
    if held or "break_even" in about:
        # what was sealed stays so, on a machine of another break-even too
        index.break_even = NEVER if held else checks.integer(about["break_even"], "break_even", 0)
    if (centroids is None) != (index.tower is None):
        raise CompatibilityError(f"{name}: expected routers of the kind this prompt was saved with, got others")
    _compare(name, about["index"], _form(index))
    if centroids is not None:
        calibration, sampling = index.calibration, index.sampling
        shape = index.num_kv_heads, index.nlist, index.d
        if tuple(centroids.shape) != shape:
            raise FormatError(f"{name}: expected centroids {shape}, got {tuple(centroids.shape)}")
        assert index.tower is not None
        index.key_quantizer = KeyQuantizer(centroids.to(device), index.tower.transform)
        index.tower = index.tower  # which makes the router for these lists
        index.calibration, index.sampling = calibration, sampling  # as where lists are made: they hold for those of this kind
    b, h, rows = tensors["keys"].shape[:3]
    index.reserve_memory(0, batch=b)
    lists = index.invlists
    arrangements = [index.layout.arrangement(n, lists.heads) for n in lengths]
    segments = [x.segments for x in arrangements]
    most = max(map(len, segments))
    counts = checks.counts(about["gaps"], b, 2**31 - 1, "gaps")
    turns = checks.counts(about["rotated"], b, 2**31 - 1, "rotated")
    spans, sizes = [NONE] * len(lengths), (index.d, index.d_v)
    if lists.code is not None:
        spans, sizes = coded_spans(about["coded"], lengths, segments), lists.code.sizes(index.d, index.d_v)
    if rows < max(lengths) or tensors[numbers[0]].shape[2] < max(plain_rows(lengths, spans)):
        raise FormatError(f"{name}: expected room for {max(lengths)} rows, got {rows} and {tensors[numbers[0]].shape[2]}")
    want = {
        "keys": (b, h, rows, sizes[0]), "values": (b, h, rows, sizes[1]), "ids": (b, h, rows), "gaps": (sum(counts), 2),
        "rotated": (sum(turns), 2),
        "tables": (b, h, most, index.nlist + 1), **({"pending": (b, h, rows)} if "pending" in tensors else {}),
    }
    if lists.code is not None:
        plain = tensors[numbers[0]].shape[2]
        want |= {"plain_keys": (b, h, plain, index.d), "plain_values": (b, h, plain, index.d_v)}
    shapes = {key: tuple(x.shape) for key, x in tensors.items()}
    if shapes != want:
        raise FormatError(f"{name}: expected tensors {want}, got {shapes}")
    dtypes = {"ids": torch.int32, "tables": torch.int32, "pending": torch.int32, "gaps": torch.int64, "rotated": torch.int64}
    if lists.code is not None:
        dtypes |= {"keys": torch.uint8, "values": torch.uint8}
    for key, dtype in dtypes.items():
        if key in tensors and tensors[key].dtype != dtype:
            raise FormatError(f"{name}: expected {key} of {dtype}, got {tensors[key].dtype}")
    gaps = [Gaps.of_array(part) for part in np.split(tensors.pop("gaps").cpu().numpy(), np.cumsum(counts)[:-1])]
    check_lists(arrangements, lengths, gaps, tensors, ids=verify)
    layer.slots, layer.ragged, layer.visible = slots, ragged, None if visible is None else visible.to(device)
    rotated = RotationLengths.of(tensors.pop("rotated").cpu(), turns, lengths)
    lists.adopt(lengths, gaps, tensors, spans)
    lists.rotated = rotated
    if layer.room_tokens:
        index.reserve_memory(layer.room_tokens)


def _check_slots(name: str, lengths: list[int], slots: int, ragged: Any, visible: Tensor | None) -> None:
    """FormatError unless tokens and padding of the sequences add up to the slots."""
    shape = (len(lengths), slots)
    if visible is not None and tuple(visible.shape) != shape:
        raise FormatError(f"{name}: expected visible slots {shape}, got {tuple(visible.shape)}")
    _boolean(ragged, "ragged")
    if ragged and visible is None:
        raise FormatError(f"{name}: expected visible slots of sequences without their padding, got none")
    want = visible.sum(1).tolist() if ragged and visible is not None else [slots] * len(lengths)
    if lengths != want:
        raise FormatError(f"{name}: expected lengths {want} of {slots} slots, got {lengths}")


def _check_arena(name: str, plan: LayerPlan, keys: Tensor, values: Tensor, lengths: list[int]) -> None:
    """FormatError unless keys and values are an arena of this layer with room for the lengths."""
    h, d = plan.num_kv_heads // plan.shard[1], int(plan.trained.quantizer.centroids.shape[2])
    least = len(lengths), h, max(1, *lengths), d
    fits = keys.ndim == values.ndim == 4 and keys.shape[:3] == values.shape[:3] and keys.dtype == values.dtype
    if not fits or (*keys.shape[:2], keys.shape[3]) != (least[0], h, d) or keys.shape[2] < least[2] or keys.dtype not in _NAMES:
        raise FormatError(
            f"{name}: expected tensors keys and values of at least {least} and one dtype of {', '.join(_NAMES.values())}, got "
            f"{tuple(keys.shape)} of {keys.dtype} and {tuple(values.shape)} of {values.dtype}"
        )


def _boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise FormatError(f"{name}: expected a boolean, got {value!r}")
    return value


def _plain(layer: Any, number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise CompatibilityError(f"layer {number}: expected an attention layer to save, got {type(layer).__name__}")
    tensors = {name: getattr(layer, name) for name in ("keys", "values") if layer.is_initialized}
    shapes = {name: [str(x.dtype), *x.shape] for name, x in tensors.items()}
    return tensors, {"kind": type(layer).__name__, "slots": layer.get_seq_length(), "shapes": shapes}


def _restore_plain(layer: Any, number: int, about: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    if about["kind"] != type(layer).__name__:
        raise CompatibilityError(f"expected a {type(layer).__name__}, got a layer that was saved as {about['kind']}")
    slots = checks.integer(about["slots"], "slots", 0)
    shapes = {name: [str(x.dtype), *x.shape] for name, x in tensors.items()}
    odd = bool(tensors) and sorted(tensors) != ["keys", "values"]
    if shapes != about.get("shapes", shapes) or odd or bool(slots) > bool(tensors):
        raise FormatError(f"layer {number}: expected keys and values {about.get('shapes', '')}, got {shapes}")
    if not tensors:
        return
    keys, values = tensors["keys"].to(device), tensors["values"].to(device)
    is_sliding = isinstance(layer, DynamicSlidingWindowLayer)
    n = keys.shape[2] if keys.ndim == 4 else -1
    if values.ndim != 4 or keys.shape[:3] != values.shape[:3] or not (n == slots or (is_sliding and 0 <= n < slots)):
        raise FormatError(f"layer {number}: expected keys and values of {slots} slots, got {shapes}")
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if is_sliding:
        layer.cumulative_length = slots


# -- files -----------------------------------------------------------------------------------------------------------------


def _write(tensors: dict[str, Tensor], path: Path) -> str:
    """Write one file; returns its checksum."""
    ready = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    files.save_tensors(path, ready)
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
    layer = plan.trained
    network = layer.router if layer.tower is None else layer.tower
    tensors = {"centroids": layer.quantizer.centroids, **{f"router.{name}": x for name, x in network.tensors().items()}}
    rope = "" if layer.rope is None else json.dumps(layer.rope.to_dict(), sort_keys=True)
    return _checksum({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, zlib.crc32(rope.encode()))


def _compare(what: str, saved: dict[str, Any], have: dict[str, Any]) -> None:
    """CompatibilityError that names the first difference."""
    for name in sorted({*saved, *have}):
        if saved.get(name) != have.get(name):
            raise CompatibilityError(
                f"{what}: expected the one this prompt was saved with, {name} {saved.get(name)!r}, got {have.get(name)!r}"
            )
