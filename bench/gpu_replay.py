"""Which kernel is wrong: every launch of a step and of a seal, recorded on the emulated device, replayed alone and compared.

    python bench/gpu_replay.py record FILE     # needs a C++ compiler, no GPU; half a minute, some MB
    python bench/gpu_replay.py replay FILE     # on a GPU; --dry: on the emulated device again

A recording holds, for each launch, its kernel, grid and parameter struct, the memory that the struct points to, and what of it
the launch changed. A replay puts that memory on the device, starts the kernel, and compares everything that it could write:
integers bit for bit, floats within what the order of a sum may change, row numbers as sets where a weight near the cut decides.
As each launch begins from recorded memory, the first that differs is at fault itself; all that differ are named.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gpu_harness as harness
from gpu_scene import Scene, Size, Start, Watched
from saap_index.backends.cuda.backend import CudaBackend
from saap_index.backends.cuda.launch import CLUSTERS, Runtime
from saap_index.invlists.layout import Layout

MULTIPROCESSORS, SHARED_BYTES = 132, 227 * 1024
"""What launches are made for: an H100 or an H200, so that grids and macros are those that ship."""

STEP = Size(2400, 1, 0.2, kv_heads=4, room=16, layout=Layout(break_even=0))

LINE = 64
"""Bytes of a piece of memory that is recorded as changed."""

SETS = {"rows": "counts", "tail": "tail_counts"}
"""Fields compared as sets, with the field of their lengths: near the cut the last bit of a weight decides."""
ALIKE = 0.97
"""Of such a set, at least."""
NEAR = {torch.float32: 2e-3, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""What floats may differ by, of the largest of their field."""
CHOSEN = {"list_nos": 0.995}
"""Integers that a comparison of floats decides, and how many of them must agree."""


@dataclass(frozen=True)
class Field:
    """A pointer of a struct: into which memory, how many bytes behind its start; dtype and shape of the tensor there."""

    memory: int
    offset: int
    dtype: str
    shape: tuple[int, ...]


class Recorder:
    """Launches in order, with the memory before each of them, every content once, and what each changed."""

    def __init__(self) -> None:
        self.contents: dict[str, np.ndarray[Any, Any]] = {}
        self.launches: list[dict[str, Any]] = []

    def around(self, start: Start, go: Callable[[], None]) -> None:
        tensors = [x for x in gc.get_objects() if type(x) is Tensor and x.device.type == "cpu" and x.numel()]
        storages: dict[int, tuple[Any, np.ndarray[Any, Any]]] = {}
        fields: dict[str, dict[str, Any]] = {}
        for name in start.params.dtype.names or ():
            address = int(start.params[name])
            if start.params.dtype[name] != np.uint64 or not address:
                continue
            field, storage = _field(name, address, tensors)
            storages[field.memory] = storage, _bytes(storage)
            fields[name] = vars(field)
        before = {at: content.copy() for at, (_, content) in storages.items()}
        go()
        memory = {}
        for at, (_, content) in storages.items():
            memory[str(at)] = {"before": self._keep(before[at]), "bytes": content.nbytes, **self._changes(before[at], content)}
        names = "file kernel macros grid block shared_bytes cluster dependent".split()
        said = {x: getattr(start, x) for x in names}
        self.launches.append({**said, "fields": fields, "memory": memory, "params": start.params.tobytes().hex(),
                              "layout": _described(start.params.dtype)})

    def _keep(self, content: np.ndarray[Any, Any]) -> str:
        name = hashlib.sha256(content.tobytes()).hexdigest()[:16]
        self.contents.setdefault(name, content)
        return name

    def _changes(self, before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> dict[str, str]:
        """Where lines of memory changed, and what they hold now."""
        whole = len(before) // LINE * LINE
        lines = np.flatnonzero((before[:whole] != after[:whole]).reshape(-1, LINE).any(1)).astype(np.int64)
        data = after[:whole].reshape(-1, LINE)[lines].reshape(-1)
        return {"lines": self._keep(lines.view(np.uint8)), "changed": self._keep(np.concatenate([data, after[whole:]]))}

    def save(self, path: Path) -> None:
        said = np.frombuffer(json.dumps(self.launches).encode(), np.uint8)
        with path.open("wb") as file:
            contents: dict[str, Any] = {f"memory_{name}": content for name, content in self.contents.items()}
            np.savez(file, launches=said, **contents)


def _field(name: str, address: int, tensors: list[Tensor]) -> tuple[Field, Any]:
    best = None
    for x in tensors:
        storage = x.untyped_storage()
        if storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes():
            exact = x.data_ptr() == address
            if best is None or exact > best[0]:
                best = exact, x, storage
    if best is None:
        raise RuntimeError(f"{name}: expected the address of a tensor, got {address:#x}")
    exact, x, storage = best
    shape = tuple(x.shape) if exact and x.is_contiguous() else ()
    return Field(storage.data_ptr(), address - storage.data_ptr(), str(x.dtype).removeprefix("torch."), shape), storage


def _bytes(storage: Any) -> np.ndarray[Any, Any]:
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy()


def _described(dtype: np.dtype[Any]) -> list[list[Any]]:
    return [[name, dtype[name].str, dtype.fields[name][1]] for name in dtype.names or ()] + [["", "", dtype.itemsize]]  # type: ignore[index]


class Limited:
    """A runtime as it is on the device that launches are made for. capability : less than its own, to record what others do."""

    name = "recorded"
    max_shared_bytes = SHARED_BYTES

    def __init__(self, inner: Runtime, capability: tuple[int, int], multiprocessors: int) -> None:
        self.kernel, self.capability, self.multiprocessors = inner.kernel, capability, multiprocessors


def record(path: Path, brief: bool = False) -> list[str]:
    """Records a step as devices with clusters do it, one as others do, and a seal. Returns the kernels in order.

    brief : the first alone, for a device of two multiprocessors.
    """
    from emu.runtime import EmulatedRuntime

    made, recorder = EmulatedRuntime(), Recorder()
    count = 2 if brief else MULTIPROCESSORS
    for capability in (CLUSTERS,) if brief else (CLUSTERS, (8, 0)):
        scene = Scene(Watched(Limited(made, capability, count), recorder.around), STEP, drawn=True)
        scene.step()
    if not brief:
        _seal(CudaBackend(torch.device("cpu"), Watched(Limited(made, CLUSTERS, count), recorder.around)))
    recorder.save(path)
    return [x["kernel"] for x in recorder.launches]


def _seal(backend: CudaBackend) -> None:
    """Sorts two blocks of tokens into lists, and takes the means of the first."""
    g, cpu = torch.Generator("cpu").manual_seed(0), torch.device("cpu")
    h, n, d, lists, sinks = 2, 256, 128, 64, 4

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=cpu, dtype=torch.float32).bfloat16()

    keys, values = drawn(h, n + sinks, d), drawn(h, n + sinks, d)
    ids = torch.arange(n + sinks, dtype=torch.int32, device=cpu).expand(h, -1).contiguous()
    quantizer = backend.prepare_quantizer(torch.randn((h, lists, d), generator=g, device=cpu, dtype=torch.float32))
    numbers = backend.assign(quantizer, keys[:, sinks:].contiguous(), None)
    tables = torch.zeros((h, 2, lists + 1), dtype=torch.int32, device=cpu)
    backend.seal_many(keys, values, ids, ((sinks, sinks + n // 2), (sinks + n // 2, sinks + n)), numbers, tables)
    mean_keys, mean_values = (torch.zeros((h, lists, d), dtype=torch.bfloat16, device=cpu) for _ in range(2))
    backend.means(keys, values, tables[:, 0].contiguous(), mean_keys, mean_values)


# -- replay


def replay(path: Path, runtime: Runtime, device: torch.device) -> list[str]:
    """What differs, launch by launch: nothing where all is as recorded. A launch that fails is named and ends it."""
    problems: list[str] = []
    with np.load(path) as file:
        contents = {name.removeprefix("memory_"): file[name] for name in file.files}
    for i, launch in enumerate(json.loads(contents.pop("launches").tobytes())):
        title = f"launch {i}, {launch['kernel']} ({launch['file']})"
        if runtime.capability < CLUSTERS and (launch["cluster"] > 1 or launch["dependent"]):
            continue
        try:
            problems += [f"{title}: {x}" for x in _replay(launch, contents, runtime, device)]
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            problems.append(f"{title}: {type(error).__name__}: {reason}")
            if device.type == "cuda":  # an illegal access fails every later call
                break
    return problems


def _replay(
    launch: dict[str, Any], contents: dict[str, np.ndarray[Any, Any]], runtime: Runtime, device: torch.device
) -> list[str]:
    memory = {int(at): torch.from_numpy(contents[of["before"]].copy()).to(device) for at, of in launch["memory"].items()}
    *layout, (_, _, size) = launch["layout"]
    names, formats, offsets = ([x[i] for x in layout] for i in range(3))
    dtype = np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": size})
    params = np.frombuffer(bytes.fromhex(launch["params"]), dtype).copy()[0:1].reshape(())
    fields = {name: Field(**of) for name, of in launch["fields"].items()}
    for name, field in fields.items():
        params[name] = memory[field.memory].data_ptr() + field.offset
    kernel = runtime.kernel(launch["file"], launch["kernel"], launch["macros"])
    arguments = tuple(launch["grid"]), launch["block"], launch["shared_bytes"], params, launch["cluster"], launch["dependent"]
    kernel.launch(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
    wrong = []
    wants, gots = {}, {}
    for at, of in launch["memory"].items():
        want = contents[of["before"]].copy()
        whole = len(want) // LINE * LINE
        lines, changed = contents[of["lines"]].view(np.int64), contents[of["changed"]]
        want[:whole].reshape(-1, LINE)[lines] = changed[: len(lines) * LINE].reshape(-1, LINE)
        want[whole:] = changed[len(lines) * LINE :]
        wants[int(at)], gots[int(at)] = want, memory[int(at)].cpu().numpy()
    for name, field in sorted(fields.items(), key=lambda x: x[1].offset):
        # a field has its memory up to the next one
        ends = [x.offset for x in fields.values() if x.memory == field.memory and x.offset > field.offset]
        part = slice(field.offset, min(ends, default=len(wants[field.memory])))
        want, got = (torch.from_numpy(x[field.memory][part].copy()) for x in (wants, gots))
        kind = getattr(torch, field.dtype)
        count = len(want) // kind.itemsize * kind.itemsize
        lengths = _lengths(SETS.get(name), fields, wants, gots)
        shaped = field.shape if np.prod(field.shape, dtype=np.int64) * kind.itemsize == count else (count // kind.itemsize,)
        difference = compare(name, want[:count].view(kind).reshape(shaped), got[:count].view(kind).reshape(shaped), lengths)
        if difference:
            wrong.append(difference)
    return wrong


def _lengths(name: str | None, fields: dict[str, Field], *both: dict[int, np.ndarray[Any, Any]]) -> list[Tensor] | None:
    if name is None or name not in fields:
        return None
    field = fields[name]
    return [torch.from_numpy(x[field.memory][field.offset :].copy()).view(torch.int32).reshape(field.shape) for x in both]


def compare(name: str, want: Tensor, got: Tensor, lengths: list[Tensor] | None = None) -> str | None:
    """How ``got`` differs from ``want`` beyond what rounding explains: the first index, and both values."""
    if torch.equal(want.view(torch.uint8).reshape(-1), got.view(torch.uint8).reshape(-1)):
        return None
    if lengths is not None and want.dim() > 1:
        for at in np.ndindex(*want.shape[:-1]):
            here, there = (set(x[at][: int(n[at])].tolist()) for x, n in zip((want, got), lengths, strict=True))
            if len(here & there) < ALIKE * max(len(here), len(there)) or len(there) != int(lengths[1][at]):
                return f"{name}{list(at)}: expected {len(here)} numbers, got {int(lengths[1][at])}, {len(here & there)} in both"
        return None
    if want.dtype in NEAR:
        x, y = want.double(), got.double()
        scale = float(x[x.isfinite()].abs().max()) if bool(x.isfinite().any()) else 0.0
        alike = (x == y) | (x.isnan() & y.isnan()) | ((x - y).abs() <= NEAR[want.dtype] * scale)
    else:
        alike = want == got
        if name in SETS.values():
            alike |= (want - got).abs() <= (1 - ALIKE) * want
        if name in CHOSEN and float(alike.double().mean()) >= CHOSEN[name]:
            return None
    if bool(alike.all()):
        return None
    first = int((~alike).reshape(-1).nonzero()[0])
    at = [int(x) for x in np.unravel_index(first, want.shape)] if want.dim() else []
    expected, other = want.reshape(-1)[first].item(), got.reshape(-1)[first].item()
    return f"{name}{at} of {list(want.shape)}: expected {expected}, got {other}; {int((~alike).sum())} differ"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "replay"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--dry", action="store_true", help="replay on the emulated device; record little")
    options = parser.parse_args()
    if options.what == "record":
        names = record(options.file, options.dry)
        print(f"{len(names)} launches, {options.file.stat().st_size / 1e6:.1f} MB: {', '.join(names)}")
        return 0
    if options.dry:
        from emu.runtime import EmulatedRuntime

        runtime: Runtime = EmulatedRuntime()
        device = torch.device("cpu")
    else:
        from saap_index.backends.cuda.runtime import runtime as on

        device = harness.Cuda().device
        runtime = on(device)
    wrong = replay(options.file, runtime, device)
    print("\n".join(f"WRONG {x}" for x in wrong) or "every launch is as recorded")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
