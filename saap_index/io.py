"""`write_index` and `read_index`: one safetensors file for everything an index is. Knows files, not attention.

The file holds the arena as it lies, so loading sorts nothing. Its metadata names the format, the version, the configuration and
a checksum; sizes are checked against the configuration before anything is allocated, offsets before anything is read.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import checks, files
from .backends import NETWORK, STORAGE_CODES, RouterWeights
from .errors import FormatError, SaapError
from .index import AsymmetricIndex
from .invlists.arena import PLAIN_ARRAYS, ROW_ARRAYS
from .invlists.coded import plain_rows
from .invlists.gaps import Gaps
from .invlists.layout import Arrangement, Segment
from .invlists.rotated import RotationLengths
from .invlists.segmented import SegmentedInvertedLists
from .routing.calibration import TARGETS, Calibration
from .routing.quantizer import KeyQuantizer
from .routing.rope import Rope
from .routing.router import QueryRouter
from .routing.sampling import Sampling
from .routing.trained import TrainedLayer
from .routing.two_tower import TwoTower
from .search.params import SAMPLING

FORMAT, VERSION = "saap_index", "2"
AT_ONCE = "1"  # the version of before merges took their time: segments lie as `Layout.merged_segments` has them


def write_index(index: AsymmetricIndex, path: str | os.PathLike[str]) -> None:
    """Write ``index``, its training and its tokens, to ``path``.

    The file appears whole or not at all: an interruption leaves what was at ``path`` before (files.py). Raises OSError.
    """
    tensors, config = _state(index)
    text = json.dumps(config, sort_keys=True)
    metadata = {"format": FORMAT, "version": VERSION, "config": text, "checksum": _checksum(tensors, text)}
    files.write_tensors(path, tensors, metadata)


def read_index(path: str | os.PathLike[str], device: torch.device | str = "cpu", backend: str | None = None) -> AsymmetricIndex:
    """Read what `write_index` wrote, onto ``device``.

    Raises FormatError for a file that is damaged, of another kind or of another version; OSError if it cannot be opened.
    """
    with open(path, "rb"):  # an absent file is the system's error, not ours
        pass
    try:
        with safe_open(path, framework="pt") as file:
            config = _config(file.metadata())
            tensors = _load(file, config)
            _verify(tensors, file.metadata())
            return _restore(config, tensors, device, backend)
    except FormatError:
        raise
    except (
        SafetensorError,
        SaapError,
        LookupError,
        TypeError,
        ValueError,
        OverflowError,
        AttributeError,
        RecursionError,
    ) as error:
        raise FormatError(f"{path}: expected an index written by write_index, got {type(error).__name__}: {error}") from error


def _state(index: AsymmetricIndex) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything an index is, as tensors and as plain data."""
    index.seal()  # the file holds no word of tokens that still wait for it
    layout, lists = index.layout, index._lists
    config: dict[str, Any] = {
        "index": {
            "d": index.d, "d_v": index.d_v, "nlist": index.nlist, "num_heads": index.num_heads,
            "num_kv_heads": index.num_kv_heads, "scale": index.scale, "nprobe": index.nprobe, "selectivity": index.selectivity,
            "max_codes": index.max_codes, "sinks": layout.sinks, "window": layout.window, "seal_tokens": layout.seal_tokens,
            "max_segment": layout.max_segment, "break_even": layout.break_even, "mean_run_tokens": layout.mean_run_tokens,
            "target_mass": index.target_mass, "tail": index.tail,
            "budget_shares": None if index.budget_shares is None else index.budget_shares.tolist(),
            **({} if index.storage is None else {"storage": index.storage}),
            **{name: getattr(index, name) for name in SAMPLING if getattr(index, name) is not None},  # files of before name none
        },
        "dtype": str(index.dtype).removeprefix("torch."),
        "rope": None if index.rope is None else index.rope.to_dict(),
        "router": None,
        "quantizer": index.key_quantizer is not None,
        "tower": None,
        "calibrated": index.calibration is not None,
        **({} if index.sampling is None else {"sampled": True}),
        "lengths": index.lengths,
        **({"gaps": [], "rotated": []} if lists is None else stretches(lists)),
        "pending": lists is not None and lists.pending is not None,
    }
    tensors: dict[str, Tensor] = {}
    if index.key_quantizer is not None:
        tensors["centroids"] = index.key_quantizer.centroids
        if index.key_quantizer.transform is not None:
            config["transform"] = True  # files of before name none
            tensors["transform"] = index.key_quantizer.transform.clone()  # the tower's own, and a file shares no memory
    if index.query_router is not None:
        router = index.query_router
        config["router"] = {
            "units": router.weights.hidden.shape[1], "outputs": router.weights.bias_out.shape[1], "first_knot": router.first_knot,
            "count_lists": router.size_weighted, "list_dims": 0 if router.weights.lists is None else router.weights.leading,
        }
        # cloned, for those of a symmetric router are the centroids, and a file shares no memory
        tensors.update({f"router.{name}": x.clone() for name, x in router.tensors().items()})
    if index.tower is not None:
        weights = index.tower.weights
        config["tower"] = {"units": weights.hidden.shape[1], "outputs": weights.bias_out.shape[1]}
        config["tower"] |= {} if index.tower.transform is None else {"transform": True}
        tensors.update({f"tower.{name}": x for name, x in index.tower.tensors().items()})
    if index.calibration is not None:
        tensors["calibration"] = index.calibration.unread_mass
    if index.sampling is not None:
        tensors["sampling"] = index.sampling.table()
    if lists is not None:
        tensors |= pack_lists(lists)
    return {name: x.cpu().contiguous() for name, x in tensors.items()}, config


def _checksum(tensors: dict[str, Tensor], config: str) -> str:
    value = zlib.crc32(config.encode())
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        if tensors[name].numel():
            value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _config(metadata: dict[str, str] | None) -> dict[str, Any]:
    if not metadata or metadata.get("format") != FORMAT:
        raise FormatError(f"expected a file of format {FORMAT!r}, got {(metadata or {}).get('format')!r}")
    if metadata.get("version") not in (AT_ONCE, VERSION):
        raise FormatError(f"expected version {AT_ONCE} or {VERSION} of the format, got {metadata.get('version')!r}")
    config = files.json_of(metadata["config"])
    if not isinstance(config, dict):
        raise FormatError(f"expected a configuration, got {type(config).__name__}")
    return {**config, "at_once": metadata["version"] == AT_ONCE}


def _weights(h: int, u: int, outputs: int, d: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes of a router's network."""
    shapes = ((h, u, d), (h, u), (h, outputs, u), (h, outputs, d), (h, outputs))
    return {name: (shape, torch.float32) for name, shape in zip(NETWORK, shapes, strict=True)}


def _expected(config: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that a file with this configuration holds."""
    c, lengths = config["index"], config["lengths"]
    h, d, e, nlist = c["num_kv_heads"], c["d"], c["d_v"], c["nlist"]
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config["dtype"]]
    want: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if config["quantizer"]:
        want["centroids"] = ((h, nlist, d), torch.float32)
    if config.get("transform"):
        want["transform"] = ((h, d, d), torch.float32)
    if config["router"] is not None:
        u, outputs = config["router"]["units"], config["router"]["outputs"]
        want.update({f"router.{n}": s for n, s in _weights(h, u, outputs, d).items()})
        k = config["router"].get("list_dims")
        if k:
            want["router.lists"], want["router.list_scales"] = ((h, nlist, k), torch.float32), ((h, k), torch.float32)
    if config.get("tower") is not None:
        want.update({f"tower.{n}": s for n, s in _weights(h, config["tower"]["units"], config["tower"]["outputs"], d).items()})
        if config["tower"].get("transform"):
            want["tower.transform"] = ((h, d, d), torch.float32)
    if config.get("calibrated"):
        want["calibration"] = ((h, len(TARGETS)), torch.float32)
    if config.get("sampled"):
        want["sampling"] = ((h, 3), torch.float32)
    if lengths:
        b, rows = len(lengths), max(lengths)
        segments = [x.segments for x in _arrangements(config)]
        count = max(map(len, segments))
        want["keys"], want["values"] = ((b, h, rows, d), dtype), ((b, h, rows, e), dtype)
        if c.get("storage") is not None:
            sizes = STORAGE_CODES[c["storage"]].sizes(d, e)
            plain = max(plain_rows(lengths, coded_spans(config["coded"], lengths, segments)))
            for side, dim, size in zip(("keys", "values"), (d, e), sizes, strict=True):
                want[side], want[f"plain_{side}"] = ((b, h, rows, size), torch.uint8), ((b, h, plain, dim), dtype)
        want["ids"], want["tables"] = ((b, h, rows), torch.int32), ((b, h, count, nlist + 1), torch.int32)
        if "gaps" in config:
            want["gaps"] = ((sum(config["gaps"]), 2), torch.int64)
        else:  # a file of before: every position, not stretches of them
            want["removed"] = ((sum(config["removed"]),), torch.int64)
        if "rotated" in config:
            want["rotated"] = ((sum(config["rotated"]), 2), torch.int64)
        if config["pending"]:
            want["pending"] = ((b, h, rows), torch.int32)
    return want


def _arrangements(config: dict[str, Any]) -> list[Arrangement]:
    """How the sealed tokens of every sequence lie in the file."""
    layout = _empty_index(config, "cpu", "torch").layout
    lengths = config["lengths"]
    if not all(isinstance(n, int) and 0 <= n < 2**31 for n in lengths):
        raise FormatError(f"expected token counts, got {lengths!r}")
    if max(lengths) // layout.block > 2**24:
        raise FormatError(f"expected sequences of fewer than {layout.block << 24} tokens, got {max(lengths)}")
    if config["at_once"]:
        return [Arrangement(layout.merged_segments(n)) for n in lengths]
    return [layout.arrangement(n, config["index"]["num_kv_heads"]) for n in lengths]


def _load(file: Any, config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors, after their names and shapes were compared with the configuration."""
    names, shapes = set(file.keys()), {}
    for name, shape in ((n, tuple(file.get_slice(n).get_shape())) for n in names):
        shapes[name] = shape
    lengths, form = config["lengths"], config["index"]
    # before any list is made to the measure of a length that the file only claims
    code = STORAGE_CODES.get(form.get("storage"))
    size = form["d"] if code is None else code.sizes(form["d"], form["d_v"])[0]
    if lengths and shapes.get("keys") != (len(lengths), form["num_kv_heads"], max(lengths), size):
        raise FormatError(f"expected tokens as in the configuration, got keys of shape {shapes.get('keys')}")
    want = _expected(config)
    if {n: s for n, (s, _) in want.items()} != shapes:
        raise FormatError(f"expected tensors {sorted((n, s) for n, (s, _) in want.items())}, got {sorted(shapes.items())}")
    tensors = {name: file.get_tensor(name) for name in sorted(names)}
    for name, x in tensors.items():
        if x.dtype != want[name][1]:
            raise FormatError(f"{name}: expected {want[name][1]}, got {x.dtype}")
    return tensors


def _verify(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    checksum = _checksum(tensors, metadata["config"])
    if checksum != metadata.get("checksum"):
        raise FormatError(f"expected checksum {metadata.get('checksum')}, got {checksum}: the file is damaged")


def _empty_index(config: dict[str, Any], device: torch.device | str, backend: str | None) -> AsymmetricIndex:
    rope = None if config["rope"] is None else Rope.from_dict(config["rope"])
    dtype = getattr(torch, config["dtype"])
    return AsymmetricIndex(**config["index"], dtype=dtype, device=device, rope=rope, backend=backend)


def _trained(index: AsymmetricIndex, config: dict[str, Any], tensors: dict[str, Tensor]) -> TrainedLayer:
    """What ``index`` was trained to."""
    quantizer = router = tower = None
    if config["quantizer"]:
        quantizer = KeyQuantizer(tensors["centroids"], tensors.get("transform"))
    if config["router"] is not None:
        weights = RouterWeights.of(tensors, index.nlist, "router.")
        router = QueryRouter(weights, int(config["router"]["first_knot"]), bool(config["router"]["count_lists"]))
    if config.get("tower") is not None:
        tower = TwoTower.of(tensors, index.d, int(config["router"]["first_knot"]), "tower.")
    calibration = Calibration(tensors["calibration"]) if config.get("calibrated") else None
    sampling = Sampling.of_table(tensors["sampling"]) if config.get("sampled") else None
    layer = replace(index.trained, key_quantizer=quantizer, query_router=router, tower=tower)
    return replace(layer, calibration=calibration, sampling=sampling)


def _restore(
    config: dict[str, Any], tensors: dict[str, Tensor], device: torch.device | str, backend: str | None
) -> AsymmetricIndex:
    index = _empty_index(config, device, backend)
    index.load_trained(_trained(index, config, tensors))
    lengths = config["lengths"]
    if not lengths:
        return index
    arrangements = _arrangements(config)
    index.reserve_memory(max(lengths), batch=len(lengths))
    lists = index.invlists
    lists.hold(lengths, arrangements)
    name = "gaps" if "gaps" in config else "removed"
    counts = checks.counts(config[name], len(lengths), 2**31 - 1, name)
    parts_of = np.split(tensors[name].numpy(), np.cumsum(counts)[:-1])
    if name == "removed" and any((np.diff(x, prepend=-1) <= 0).any() for x in parts_of):
        raise FormatError("removed: expected rising positions, got others")
    lists.gaps = [Gaps.of_array(x) if name == "gaps" else Gaps.of(x) for x in parts_of]
    if "rotated" in config:
        counts = checks.counts(config["rotated"], len(lengths), 2**31 - 1, "rotated")
        lists.rotated = RotationLengths.of(tensors["rotated"], counts, lengths)
    elif index.rope is not None and index.rope.is_dynamic:
        raise FormatError("expected the lengths at which tokens were rotated, got a file of before they were kept")
    check_lists(arrangements, lengths, lists.gaps, tensors)
    lists.resize_tables(tensors["tables"].shape[2])
    if config["pending"]:
        lists.arena = replace(lists.arena, pending=tensors["pending"].to(index.device))
    if lists.code is not None:
        lists.coded_spans = coded_spans(config["coded"], lengths, lists.segments)
        plain = {name: tensors[name].to(index.device) for name in ("plain_keys", "plain_values")}
        lists.arena = replace(lists.arena, **plain)
    for name in ("keys", "values", "ids", "tables"):
        getattr(lists, name).copy_(tensors[name])
    for i in range(lists.batch):
        lists.update_means(i)
    if config["at_once"]:
        index.rearrange()
    return index


def stretches(lists: SegmentedInvertedLists) -> dict[str, list[Any]]:
    """How many gaps, and runs of tokens rotated at one length, each sequence has, and which of its rows are codes."""
    counts = {"gaps": [len(x.starts) for x in lists.gaps], "rotated": [len(runs) for runs in lists.rotated.runs]}
    return counts if lists.code is None else {**counts, "coded": [list(span) for span in lists.coded_spans]}


def pack_lists(lists: SegmentedInvertedLists, room: int = 0) -> dict[str, Tensor]:
    """The tokens of a batch as arrays on the CPU, with ``room`` rows behind them. Memory that no token owns is zero."""
    tensors = {"gaps": torch.from_numpy(np.concatenate([x.array() for x in lists.gaps])), "rotated": lists.rotated.tensor()}
    sizes = {**dict.fromkeys(ROW_ARRAYS, max(lists.lengths) + room), "tables": max(map(len, lists.segments))}
    plain = plain_rows(lists.lengths, lists.coded_spans)
    sizes |= dict.fromkeys(PLAIN_ARRAYS, max(plain) + room)
    for name, size in sizes.items():
        source = getattr(lists.arena, name)
        if source is None:
            continue
        x = torch.zeros((*source.shape[:2], size, *source.shape[3:]), dtype=source.dtype, device="cpu")
        for i, n in enumerate(lists.lengths):
            spans = {"ids": (lists.sinks(i), lists.sealed(i)), "tables": (0, len(lists.segments[i]))}
            spans |= dict.fromkeys(PLAIN_ARRAYS, (0, plain[i]))
            if lists.code is not None:
                spans |= {"keys": lists.coded_spans[i], "values": lists.coded_spans[i]}
            low, high = spans.get(name, (0, n))
            x[i, :, low:high] = source[i, :, low:high]
            if name == "pending":
                x[i, :, lists.sinks(i) : lists.sealed(i)] = -1  # the tables know
        tensors[name] = x
    return tensors


def coded_spans(spans: Any, lengths: Sequence[int], segments: Sequence[Sequence[Segment]]) -> list[Segment]:
    """Which rows of each sequence are codes, from a file; FormatError unless they are some of its rows, the sealed ones among
    them."""
    found = []
    for span, n, parts in zip(spans, lengths, segments, strict=True):
        low, high = (checks.integer(x, "coded", 0, n) for x in span)
        if low > high or (parts and not (low <= parts[0][0] and parts[-1][1] <= high)):
            raise FormatError(f"coded: expected rows of {n} with the sealed ones among them, got {span}")
        found.append((low, high))
    return found


def check_lists(
    arrangements: Sequence[Arrangement], lengths: Sequence[int], gaps: Sequence[Gaps], tensors: Mapping[str, Tensor],
    ids: bool = True,
) -> None:
    """FormatError or ParameterError unless arrays as of `pack_lists` are those of sequences of these lengths; ``ids`` too."""
    for i, (n, gap, lie) in enumerate(zip(lengths, gaps, arrangements, strict=True)):
        parts, tables = lie.segments, tensors["tables"][i]
        check_gaps(gap, n)
        check_tables(tables[:, : len(parts)], parts)
        for low, high in ((0, parts[0][0] if parts else 0), (parts[-1][1] if parts else 0, n)):
            if "pending" in tensors:
                checks.list_numbers(tensors["pending"][i, :, low:high], "pending", tables.shape[2] - 1, -1)
        if ids:
            positions = torch.from_numpy(gap.positions(np.arange(n))).to(tables.device)
            merged = 0 if lie.merging is None else lie.merging.heads
            check_ids(tensors["ids"][i, :merged], positions, lie.joined)
            check_ids(tensors["ids"][i, merged:], positions, parts)


def check_tables(tables: Tensor, segments: tuple[tuple[int, int], ...]) -> None:
    """FormatError unless offsets, int32 (h, s, l + 1), rise from the start to the end of their segment."""
    for s, (start, stop) in enumerate(segments):
        table = tables[:, s]
        ends = bool((table[:, 0] == start).all()) and bool((table[:, -1] == stop).all())
        if not ends or not bool((table.diff(dim=1) >= 0).all()):
            raise FormatError(f"expected the offsets of segment [{start}, {stop}), got others")


def check_ids(ids: Tensor, positions: Tensor, segments: tuple[tuple[int, int], ...]) -> None:
    """FormatError unless the ids of every segment, of int32 (h, n), are its positions, of int64 (n,), each once."""
    for start, stop in segments:
        if not bool((ids[:, start:stop].sort(dim=1).values == positions[start:stop]).all()):
            raise FormatError(f"expected the ids of segment [{start}, {stop}), got others")


def check_gaps(gaps: Gaps, length: int) -> None:
    """FormatError unless gaps lie among the positions of a sequence of which ``length`` tokens are left."""
    end = length + gaps.count
    if len(gaps.stops) and not gaps.stops[-1] <= end < 2**31:
        raise FormatError(f"gaps: expected rising positions below {end}, got others")
