"""From a model and token sequences to routers of every layer, in bounded memory and steps that survive an interruption.

1. Capture: one pass of the model per sequence serves all layers; keys, a sample of queries, and, of sequences held out, values go
   to disk (store.py).
2. Layers, one at a time: read back, trained, measured and calibrated on what was held out, written.
3. The budget is spread over layers and heads (training/budget.py), and everything becomes one folder (routers.py).

Work in progress lies in a folder ``unfinished`` in the result's. The same model, texts, settings and machine give the same files,
interrupted or not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from .. import files
from ..errors import CompatibilityError, FormatError, LengthError, ParameterError, StateError
from ..hf import support
from ..hf.models import LoadedModel, check_positions
from ..hf.probe import check_rotation
from ..hf.weighing import weighing
from ..routers import CONFIG, Routers, load_routers, model_shape, pack_layer, save_routers, unpack_layer
from ..routing.quantizer import require_faiss
from ..routing.rope import Rope
from ..routing.trained import TrainedLayer
from ..search.params import SELECTIVITY
from ..training.budget import spread_budget
from ..version import __version__
from . import capture
from .layers import LayerResult, train_one
from .settings import TrainSettings
from .store import CaptureStore, StoreShape, check_space, parts_of
from .texts import TokenSequence, digest

UNFINISHED = "unfinished"
_JOB, _CAPTURES = "job.json", "captures"

Step = Callable[[str, int, int], None]
"""Told of every piece of work that is done: (what, how many are, of how many)."""


def train_model(
    loaded: LoadedModel, sequences: Sequence[TokenSequence], settings: TrainSettings, out: Path, resume: bool = False,
    step: Step | None = None, keep_captures: bool = False, max_disk_bytes: int | None = None,
) -> Routers:
    """Train every layer; the routers, also written to ``out``.

    sequences : ``settings.sequences`` of ``settings.context`` tokens. resume : continue what is unfinished in ``out``; if all is
    there already, read it. keep_captures : leave what was captured on disk. max_disk_bytes : of captures at a time, None: of all
    layers at once. With less they are captured and trained some layers at a time, at least one, by a pass over all texts for each
    such part, which ends with its last layer; the routers are the same.

    Raises MissingDependencyError without FAISS before anything else, StateError for a folder in use without ``resume``, or by
    another process or thread that trains,
    CompatibilityError if what is there is of another model, text or settings, FormatError if it is damaged, LengthError for other
    sequences, OSError if the disk has no room for what is captured, and what training raises. Ctrl-C leaves what is finished for
    `resume`.
    """
    require_faiss()  # of everything that takes long, the last part needs it
    _check_sequences(sequences, settings)
    check_positions("context", loaded.model.config, settings.context)
    job = _Job.of(loaded, sequences, settings)
    if (out / CONFIG).exists():
        if not resume:
            raise StateError(
                f"out: expected a folder without routers, got {out} with; --resume keeps them, --out names another folder, and "
                f"to train anew delete {out}"
            )
        return _finished(out, job, keep_captures)
    work = out / UNFINISHED
    with files.hold(work) as is_ours:
        if not is_ours:
            raise StateError(f"out: expected a folder where no other training is at work, got {out}; wait, or name another --out")
        parts = parts_of(_store_shape(settings, job), max_disk_bytes)
        _claim(work, job, resume, parts[0])
        results: dict[int, LayerResult] = {}
        for number, shape in enumerate(parts):
            store, folder = None, work / _CAPTURES
            if len(parts) > 1:
                folder = folder / f"layers_{shape.layers[0]}_{shape.layers[-1]}"
            if len(parts) == 1 or not all(_is_trained(work, layer, job) for layer in shape.layers):
                passes = number * len(sequences), len(parts) * len(sequences)
                store = _captured(loaded, sequences, settings, work, folder, shape, step, passes)
            results |= _layers(store, shape.layers, settings, job, work, torch.device(loaded.model.device), step)
            if len(parts) > 1 and not keep_captures:
                shutil.rmtree(folder, ignore_errors=True)
        routers = _assembled(results, settings, job)
        save_routers(routers, out)
        if not keep_captures:
            shutil.rmtree(work)
    return routers


@dataclass(frozen=True)
class _Job:
    """identity : everything the result depends on, as plain data; geometry : of each layer, (heads, kv_heads, d, e, scale);
    ropes : of the model's layers."""

    identity: dict[str, Any]
    layers: tuple[int, ...]
    geometry: tuple[int, int, int, int]
    scales: dict[int, float]
    ropes: dict[int, Rope | None]
    dtype: torch.dtype

    @property
    def faiss(self) -> str:
        return str(self.identity["versions"]["faiss"])

    @classmethod
    def of(cls, loaded: LoadedModel, sequences: Sequence[TokenSequence], settings: TrainSettings) -> _Job:
        decoder = support.decoder_of(loaded.model)
        whole = support.global_layers(decoder)
        layers = tuple(whole) if settings.layers is None else tuple(sorted(set(settings.layers)))
        if not layers or not set(layers) <= set(whole):
            raise ParameterError(
                f"layers: expected some of those with attention over the whole context, {whole}, got {list(layers)}"
            )
        shapes: dict[int, tuple[int, int, int, int]] = {}
        scales: dict[int, float] = {}

        def keep(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
            if layer in layers:
                shapes[layer] = query.shape[1], key.shape[1], key.shape[3], value.shape[3]
                scales[layer] = scale

        capture.run(loaded.model, sequences[0][1][:2], keep)
        if len(set(shapes.values())) != 1:
            raise CompatibilityError(f"layers: expected heads of one shape, got {shapes}; name layers of one shape")
        support.check_head_dim(shapes[layers[0]][2], layers[0])
        narrow = loaded.model.dtype if loaded.model.dtype in (torch.bfloat16, torch.float16) else torch.float16
        identity = {
            "model": {"name": loaded.name, "fingerprint": loaded.fingerprint, **model_shape(loaded.model.config)},
            "settings": {**asdict(settings), "layers": list(layers), "dtype": str(loaded.model.dtype).removeprefix("torch.")},
            "data": {
                "tokens": sum(len(tokens) for _, tokens in sequences), "hash": digest(sequences),
                "sequences": [name for name, _ in sequences],
            },
            "versions": _versions(),
        }
        ropes = {layer: Rope.from_config(loaded.model.config, layer=layer) for layer in layers}
        check_rotation(decoder, ropes)
        return cls(identity, layers, shapes[layers[0]], scales, ropes, narrow)


def _versions() -> dict[str, str]:
    import transformers

    faiss = str(require_faiss().__version__)
    return {"saap_index": __version__, "torch": torch.__version__, "transformers": transformers.__version__, "faiss": faiss}


def _check_sequences(sequences: Sequence[TokenSequence], settings: TrainSettings) -> None:
    lengths = {len(tokens) for _, tokens in sequences}
    if len(sequences) != settings.sequences or lengths != {settings.context}:
        raise LengthError(
            f"sequences: expected {settings.sequences} of {settings.context} tokens, got {len(sequences)} of {sorted(lengths)}"
        )


def _claim(work: Path, job: _Job, resume: bool, shape: StoreShape) -> None:
    """Make the folder for work in progress, or check that what lies there is of this job. A job for which the disk has no room
    leaves nothing that another one would have to be told to delete."""
    path = work / _JOB
    if path.exists():
        if not resume:
            raise StateError(
                f"out: expected a folder without an unfinished training, got one in {work}; --resume continues it, {_anew(work)}"
            )
        try:
            said = files.read_json(path, "the settings of an unfinished training")
        except FormatError as error:
            raise FormatError(f"{error}; {_anew(work)}") from error
        _agree(said, job, work)
        return
    files.make_folder(work)
    shutil.rmtree(work / _CAPTURES, ignore_errors=True)  # what lies there without a job.json is of nobody knows which job
    for layer in work.glob("layer_*.safetensors"):
        layer.unlink()
    check_space(work / _CAPTURES, shape)
    files.write_json(path, job.identity)


def _anew(where: Path) -> str:
    return f"and to begin anew delete {where} or name another --out"


def _agree(recorded: Any, job: _Job, where: Path) -> None:
    """CompatibilityError naming the first thing in which two jobs differ. What is captured does not depend on FAISS's version."""
    for part, values in job.identity.items():
        said = recorded.get(part) if isinstance(recorded, dict) else None
        for name, value in values.items():
            got = said.get(name) if isinstance(said, dict) else None
            if (part, name) != ("versions", "faiss") and json.loads(json.dumps(value)) != got:
                raise CompatibilityError(
                    f"resume: expected {part} with {name} = {_short(value)}, as asked for now, got {_short(got)} in {where}; "
                    f"go on with that, {_anew(where)}"
                )


def _short(value: Any, most: int = 100) -> str:
    said = repr(value)
    return said if len(said) <= most else f"{said[:most]} ..."


def _finished(out: Path, job: _Job, keep_captures: bool) -> Routers:
    try:
        routers = load_routers(out)
    except (FormatError, FileNotFoundError) as error:
        raise FormatError(f"{error}; {_anew(out)}") from error
    _agree(dict(routers.config), job, out)
    if not keep_captures:  # what a process that was killed after writing the routers left
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return routers


def _captured(
    loaded: LoadedModel, sequences: Sequence[TokenSequence], settings: TrainSettings, work: Path, folder: Path, shape: StoreShape,
    step: Step | None, passes: tuple[int, int],
) -> CaptureStore:
    """Captures of all sequences; those on disk are not made again. passes : of these there were before, and are in all."""
    try:
        store = CaptureStore(folder, shape)
    except FormatError as error:
        raise FormatError(f"{error}; {_anew(work)}") from error
    check_space(store.folder, shape)
    for number, (_, tokens) in enumerate(sequences):
        if number not in store.done:
            positions = torch.from_numpy(query_positions(settings, number))

            held_out = number in settings.held_out_numbers

            def keep(layer: int, query: Tensor, key: Tensor, value: Tensor, _: float) -> None:
                if layer in shape.layers:
                    store.write(number, layer, key[0], value[0], query[0][:, positions.to(query.device)])  # noqa: B023
                if layer == shape.layers[-1] and not held_out:  # noqa: B023
                    raise capture.Finished

            first = int(positions.min()) if held_out else 0
            with weighing(support.decoder_of(loaded.model), shape.layers if held_out else (), first) as weights:
                capture.run(loaded.model, tokens, keep)
            store.finish(number, weights)
        if step is not None:
            step("capture", passes[0] + number + 1, passes[1])
    return store


def _store_shape(settings: TrainSettings, job: _Job) -> StoreShape:
    heads, kv_heads, d, e = job.geometry
    queries = len(query_positions(settings, 0))
    return StoreShape(
        settings.sequences, settings.held_out_numbers, job.layers, heads, kv_heads, d, e, settings.context, queries, job.dtype
    )


def query_positions(settings: TrainSettings, number: int) -> np.ndarray:
    """Positions of the queries of a sequence, int64 (q,): random ones to train on; of one held out, evenly spaced ones of its
    last eighth, so that what is measured comes after a prompt."""
    positions = capture.training_positions(settings.context, settings.seed * 1_000_003 + number, settings.queries)
    if number in settings.held_out_numbers:
        first = settings.context - settings.context // 8
        positions = torch.linspace(first, settings.context - 1, len(positions), dtype=torch.float32, device="cpu").long()
    return positions.numpy()


def _layers(
    store: CaptureStore | None, layers: Sequence[int], settings: TrainSettings, job: _Job, work: Path, device: torch.device,
    step: Step | None,
) -> dict[int, LayerResult]:
    """store : of these layers; None if all are trained."""
    results = {}
    for layer in layers:
        path = _layer_file(work, layer)
        if not _is_trained(work, layer, job):
            assert store is not None
            result = train_one(store, layer, settings, job.ropes[layer], job.scales[layer], device, query_positions)
            facts, arrays = pack_layer(result.routers)
            said = json.dumps({"facts": facts, "figures": result.figures, "faiss": job.faiss})
            files.write_tensors(path, arrays, {"layer": said})
        results[layer] = _read_layer(path)[0]  # also of one just made, so that a resumed run has the same numbers
        if step is not None:
            step("layer", job.layers.index(layer) + 1, len(job.layers))
    return results


def _layer_file(work: Path, layer: int) -> Path:
    return work / f"layer_{layer:03d}.safetensors"


def _is_trained(work: Path, layer: int, job: _Job) -> bool:
    """All layers are of one FAISS: one of another is trained again."""
    path = _layer_file(work, layer)
    return path.exists() and _read_layer(path)[1] == job.faiss


def _read_layer(path: Path) -> tuple[LayerResult, str]:
    """A layer that was trained, and the version of FAISS that made its lists."""
    try:
        with safe_open(path, framework="pt") as file:
            said = files.json_of((file.metadata() or {})["layer"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        return LayerResult(unpack_layer(said["facts"], arrays), said["figures"]), str(said.get("faiss"))
    except files.DAMAGE as error:
        raise FormatError(
            f"{path}: expected a layer of an unfinished training, got {type(error).__name__}: {error}; delete the file, and "
            "--resume trains that layer again"
        ) from error


def _assembled(results: Mapping[int, LayerResult], settings: TrainSettings, job: _Job) -> Routers:
    """One object of all layers, with the budget spread over them."""
    layers: dict[int, TrainedLayer] = {number: result.routers for number, result in results.items()}
    layers, budget = spread_budget(layers, SELECTIVITY)
    config = {
        **job.identity,
        "router": settings.router, "partition": settings.partition, "nlist": settings.nlist,
        "layout": {"sinks": settings.sinks, "window": settings.window},
        "evaluation": {str(number): result.figures for number, result in results.items()},
        "budget": budget,
    }
    return Routers(config, layers)
