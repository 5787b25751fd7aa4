"""A user's own method, named as ``module:Class`` or ``file.py:Class``: found, checked, and tried before anything is measured.

The class is a `Method` that is built from one number in (0, 1], how much it reads. If its constructor takes ``sinks`` or
``window``, it is given those of the comparison.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from saap_index.errors import ParameterError

from .method import Attended, Layer, Method, State

TRIAL_TOKENS = 160

Build = Callable[[float], Method]


def load_methods(specs: Iterable[str], reserved: Sequence[str] = ()) -> dict[str, type[Method]]:
    """Classes by the name that tables say: the class's ``name``, or else its own. reserved : names of other methods.

    Raises ParameterError for what cannot be imported or is no `Method`.
    """
    classes: dict[str, type[Method]] = {}
    for spec in specs:
        method_class = _class(spec)
        name = vars(method_class).get("name", method_class.__name__)
        if not isinstance(name, str) or not name or not set(name).isdisjoint("/,"):
            raise ParameterError(f"own: expected a name without commas and slashes of {spec}, got {name!r}")
        if name in (*reserved, *classes):
            raise ParameterError(f"own: expected a name that no other method has of {spec}, got {name!r}")
        classes[name] = method_class
    return classes


def builder(name: str, kind: type[Method], sinks: int, window: int) -> Build:
    """A method from how much it reads."""
    outside = {key: value for key, value in (("sinks", sinks), ("window", window)) if key in _parameters(kind)}

    def build(share: float) -> Method:
        method = kind(share, **outside)  # type: ignore[call-arg]
        method.name = name
        return method

    return build


def learns(kind: type[Method]) -> bool:
    """Whether a class calibrates."""
    return kind.calibrate is not Method.calibrate


def check_method(name: str, build: Build, layer: Layer) -> None:
    """Run a method on a layer of random numbers, of the shape, dtype and device of the model's. ParameterError, with the name,
    for one that fails or whose answer is not what `Attended` says."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(layer.device, dtype)

    n, h, g = TRIAL_TOKENS, layer.heads, layer.group
    keys, values = draw(h, n, layer.d, dtype=layer.dtype), draw(h, n, layer.e, dtype=layer.dtype)
    queries = draw(h, g, 8, layer.d)
    method: Method = _tried(name, "its constructor", partial(build, 0.5))
    if not isinstance(getattr(method, "kind", None), str):
        raise ParameterError(f"own: expected {name} to say its kind, a group of methods, got {getattr(method, 'kind', None)!r}")
    _tried(name, "calibrate", lambda: method.calibrate(layer, [keys.float()], [values.float()], [queries]))
    state: State = _tried(name, "start", partial(method.start, layer, n))
    _tried(name, "append", lambda: state.append(keys[:, : n - 1], values[:, : n - 1]))
    places = torch.arange(n - 9, n - 1, dtype=torch.int64, device=layer.device)
    _tried(name, "observe", lambda: state.observe(queries[:, :, -method.observed :], places[-method.observed :]))
    _tried(name, "append", lambda: state.append(keys[:, n - 1 :], values[:, n - 1 :]))
    for call in ("attend", "answer"):
        _check_step(f"{name}.{call}", _tried(name, call, partial(_last, state, call, queries)), layer, n)


def _last(state: State, call: str, queries: Tensor) -> Any:
    return getattr(state, call)(queries[:, :, -1])


def _check_step(name: str, step: Any, layer: Layer, n: int) -> None:
    if not isinstance(step, Attended):
        raise ParameterError(f"own: expected {name} to return saap_lab.method.Attended, got {type(step).__name__}")
    h, g = layer.heads, layer.group
    shapes: dict[str, list[tuple[int, ...]]] = {"out": [(h, g, layer.e)], "chosen": [(h, n), (h, g, n)]}
    for part, dtype in (("out", torch.float32), ("chosen", torch.bool)):
        x = getattr(step, part)
        if part == "chosen" and x is None:
            continue
        if not isinstance(x, Tensor) or tuple(x.shape) not in shapes[part] or x.dtype != dtype or x.device != layer.device:
            got = f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            wanted = f"{dtype} {' or '.join(map(str, shapes[part]))} on {layer.device}"
            raise ParameterError(f"own: expected {part} of {name} as {wanted}, got {got}")
    if not bool(torch.isfinite(step.out).all()):
        raise ParameterError(f"own: expected finite numbers in out of {name}, got others")
    for part in ("tokens", "kv_bytes", "other_bytes", "shared_bytes"):
        value = getattr(step, part)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ParameterError(f"own: expected {part} of {name} as a number of 0 or more, got {value!r}")


def _tried(name: str, what: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise ParameterError(f"own: expected {what} of {name} to run on {TRIAL_TOKENS} tokens, got {got}") from error


def _parameters(kind: type[Method]) -> Sequence[str]:
    return tuple(inspect.signature(kind).parameters)


def _class(spec: str) -> type[Method]:
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise ParameterError(f"own: expected module:Class or file.py:Class, got {spec!r}")
    method_class = getattr(_module(place), name, None)
    if not (isinstance(method_class, type) and issubclass(method_class, Method)):
        got = "nothing of that name" if method_class is None else f"{method_class!r}"
        raise ParameterError(f"own: expected {spec} to be a subclass of saap_lab.method.Method, got {got}")
    missing = sorted(getattr(method_class, "__abstractmethods__", ()))
    if missing:
        raise ParameterError(f"own: expected {spec} to define {', '.join(missing)}, got a class without")
    signature = inspect.signature(method_class)
    try:
        signature.bind(0.5)
    except TypeError as error:
        raise ParameterError(f"own: expected {name}(share) to build one, got {name}{signature}: {error}") from error
    return method_class


def _module(place: str) -> ModuleType:
    """A module by its name, looked for in the working folder too, or by its file."""
    path = Path(place)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise ParameterError(f"own: expected a file, got {place}: there is none")
    try:
        with _searched(path.resolve().parent if is_file else Path.cwd()):
            if not is_file:
                return importlib.import_module(place)
            name = f"saap_own_{path.stem}"
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    except Exception as error:
        raise ParameterError(f"own: expected {place} to be importable, got {type(error).__name__}: {error}") from error


@contextmanager
def _searched(folder: Path) -> Iterator[None]:
    """Modules are looked for in this folder too."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
