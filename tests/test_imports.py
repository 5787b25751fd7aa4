"""The import direction: index -> storage, selection and maps -> backends -> bindings, and nothing upwards."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import saap_index

PACKAGE = Path(saap_index.__file__).parent

ANY = {"errors", "precision"}  # know nothing, may be known by all
GPU = {f"bindings.gpu_{part}" for part in "build route route_select runtime scan seal select types".split()}
LAUNCHERS = [f"bindings.gpu_{part}" for part in ("combine", "route", "scan", "seal", "select")]
ALLOWED = {
    # plain data and checks
    "precision": set(),
    "errors": set(),
    "reference": set(),
    "checks": ANY,
    "params": ANY,
    "layout": ANY,
    "files": ANY,
    # what executes
    "bindings": ANY,
    "bindings.native": ANY,
    "bindings.gpu_types": ANY,
    "bindings.gpu_source": ANY,
    "bindings.gpu_nvrtc": {"bindings", "bindings.gpu_source"} | ANY,
    "bindings.gpu_driver": ANY,
    "bindings.gpu_runtime": {"bindings", "bindings.gpu_driver", "bindings.gpu_source", "bindings.gpu_types"} | ANY,
    "bindings.gpu_route_select": {
        "backends.base", "bindings.gpu_route", "bindings.gpu_select", "bindings.gpu_types",
    } | ANY,
    **{name: {"backends.base", "bindings.gpu_build", "bindings.gpu_types"} | ANY for name in LAUNCHERS},
    "bindings.gpu_build": {"backends.base", "bindings.gpu_types"} | ANY,
    "backends.base": ANY,
    "backends.torch_backend": {"backends.base"} | ANY,
    "backends.reference_backend": {"backends.base", "reference"},
    "backends.search": {"backends.base"},
    "backends.addresses": {"backends.base"} | ANY,
    "backends.threads": set(),
    "backends.cpu": {
        "backends.addresses", "backends.base", "backends.search", "backends.threads", "bindings", "bindings.native",
    } | ANY,
    "backends.resident": {"backends.base"} | ANY,
    "backends.cuda_state": {"backends.base", "backends.resident", "bindings", *GPU} | ANY,
    "backends.cuda": {
        "backends.base", "backends.torch_backend", "backends.resident", "backends.cuda_state", "bindings", *GPU,
    } | ANY,
    "backends": {
        "backends.base", "backends.torch_backend", "backends.reference_backend", "backends.search", "backends.cpu",
        "backends.cuda",
        "bindings", "bindings.gpu_runtime",
    } | ANY,
    # the parts of an index
    "positions": ANY,
    "rotated": ANY,
    "rope": {"backends.base", "positions"} | ANY,
    "rope_config": {"rope"} | ANY,
    "quantizer": {"checks"} | ANY,
    "router": {"backends", "checks"} | ANY,
    "gaps": set(),
    "whole": set(),
    "invlists": {"backends", "gaps", "layout", "rotated"} | ANY,
    "attend": {"backends", "checks", "invlists", "params", "router"} | ANY,
    "calibration": {"checks", "layout", "quantizer", "reference", "rope", "router"} | ANY,
    "tower": {"backends", "quantizer", "router"} | ANY,
    "targets": {"precision"},
    "training_config": ANY,
    "fitting": {"backends", "router", "targets", "tower", "training_config"} | ANY,
    "training": {"fitting", "layout", "quantizer", "rope", "router", "targets", "tower", "training_config"} | ANY,
    "stats": {"attend", "invlists", "quantizer", "router"} | ANY,
    # the index
    "ops": {"params"} | ANY,
    "decode": {"attend", "backends", "backends.resident", "invlists", "params", "router"} | ANY,
    "_arguments": {"checks", "invlists", "layout"} | ANY,
    "_base": {
        "_arguments", "attend", "backends", "calibration", "checks", "invlists", "layout", "ops", "params", "quantizer", "rope",
        "router", "tower", "whole",
    } | ANY,
    "_storage": {"_base", "backends", "checks", "invlists", "stats"} | ANY,
    "_decode": {
        "_storage", "attend", "backends", "backends.resident", "calibration", "checks", "decode", "invlists", "ops", "params",
        "stats",
    } | ANY,
    "interop": {"quantizer", "router"} | ANY,
    "index": {
        "_arguments", "_decode", "_storage", "attend", "backends", "backends.resident", "calibration", "checks", "interop",
        "invlists", "params", "stats", "training", "training_config",
    } | ANY,
    "io": ANY
    | {"backends", "calibration", "checks", "files", "gaps", "index", "quantizer", "rope", "rotated", "router", "tower"},
    "": {
        "attend", "backends", "calibration", "index", "io", "layout", "params", "quantizer", "rope", "router", "routers", "stats",
        "tower", "training_config",
    } | ANY,
    # a whole model
    "budget_plan": ANY,
    "routers": ANY
    | {"checks", "backends", "calibration", "files", "index", "quantizer", "rope", "rope_config", "router", "tower"},
    "pipeline": set(),
    "pipeline.texts": ANY,
    "pipeline.models": {"hf.support"} | ANY,
    "pipeline.capture": {"hf.rotation", "hf.support"} | ANY,
    "pipeline.store": {"files", "training"} | ANY,
    "pipeline.measure": {"backends", "layout", "router"} | ANY,
    "pipeline.layers": {
        "budget_plan", "calibration", "pipeline.measure", "pipeline.store", "rope", "routers", "tower", "training",
        "training_config",
    } | ANY,
    "pipeline.train": {
        "", "budget_plan", "checks", "files", "hf.probe", "hf.support", "layout", "params", "pipeline.capture", "pipeline.layers",
        "quantizer", "pipeline.models", "pipeline.store", "pipeline.texts", "rope", "routers", "training_config",
    } | ANY,
    "pipeline.command": ANY
    | {"checks", "pipeline.models", "pipeline.texts", "pipeline.train", "quantizer", "routers", "training_config"},
    "cli": {""} | ANY,
    "__main__": {"cli"},
    # the index inside transformers
    "hf.support": ANY,
    "hf.masks": ANY,
    "hf.traced": ANY,
    "hf.calls": ANY,
    "hf.rotation": {"rope"},
    "hf.probe": {"hf.rotation", "hf.support", "rope"} | ANY,
    "crossover": {"files"} | ANY,
    "hf.capture": {"backends", "hf.support"} | ANY,
    "hf.break_even": {"checks", "crossover", "hf.capture", "index", "layout"} | ANY,
    "hf.audit": {"checks", "index", "params"} | ANY,
    "hf.plan": ANY
    | {
        "backends", "calibration", "checks", "hf.audit", "hf.break_even", "hf.probe", "hf.support", "index", "layout",
        "params", "quantizer", "rope", "router", "routers", "tower",
    },
    "hf.slots": {"hf.calls", "hf.traced", "hf.masks", "hf.plan", "hf.rotation", "index", "layout", "params", "stats"} | ANY,
    "hf.layer": {"hf.masks", "hf.slots", "layout"} | ANY,
    "hf.attention": {"hf.probe", "hf.support", "hf.traced", "hf.layer", "hf.slots"} | ANY,
    "hf.cache": {"hf.calls", "hf.layer", "hf.plan", "hf.rotation", "hf.support", "params", "routers", "stats"} | ANY,
    "hf.saving": ANY
    | {
        "checks", "files", "gaps", "hf.layer", "hf.plan", "hf.slots", "hf.support", "index", "io", "layout", "quantizer",
        "rotated",
    },
    "hf.graphs": ANY
    | {
        "hf.cache", "hf.calls", "hf.capture", "hf.layer", "hf.slots", "hf.support", "index", "layout", "quantizer", "router",
    },
    "hf.attach": {"hf.attention", "hf.audit", "hf.cache", "hf.capture", "hf.graphs", "hf.plan", "hf.support", "routers"} | ANY,
    "hf.generate": {"checks", "hf.attach", "hf.cache", "hf.support", "pipeline", "pipeline.models", "routers"} | ANY,
    "hf": {"hf.attach", "hf.attention", "hf.audit", "hf.cache", "hf.graphs", "hf.support"} | ANY,
}
LATER = {  # inside a function
    "rope": {"rope_config"},  # Rope.from_config hands over to the module that reads models' files
    "": {"hf"},  # which needs transformers
    "hf.cache": {"hf.saving"},
    "crossover": {""},  # the version
}
OUTSIDE = {"numpy", "torch", "safetensors", "typing_extensions", "faiss", "cupy"}  # faiss and cupy inside functions only
EXTRAS = {"hf": {"transformers"}, "pipeline": {"datasets", "faiss", "tqdm", "transformers"}}
LIBRARY = sorted(p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0] != "cuda")


def module_name(path: Path) -> str:
    """'' for the package itself, 'backends.cpu' for saap_index/backends/cpu.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path, at_import: bool = False) -> tuple[set[str], set[str]]:
    """Modules of ours and of others that a file imports when it runs; ``at_import``: only those not inside a function."""
    ours: set[str] = set()
    others: set[str] = set()
    package = [*PACKAGE.parts[-1:], *path.relative_to(PACKAGE).parts[:-1]]

    def found(name: str) -> None:
        head, _, rest = name.partition(".")
        if head == PACKAGE.name:
            ours.add(rest)
        else:
            others.add(head)

    def visit(node: ast.AST) -> None:
        if types_only(node) or (at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                found(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                inner = PACKAGE.joinpath(*base[1:], alias.name) if base[0] == PACKAGE.name else None
                is_module = inner is not None and (inner.with_suffix(".py").exists() or inner.is_dir())
                found(".".join([*base, alias.name] if is_module else base))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return ours, others


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: module_name(p) or "saap_index")
def test_direction(path: Path) -> None:
    name = module_name(path)
    assert name in ALLOWED, f"{name} is new: say in ALLOWED what it may know"
    ours, others = imports(path)
    native = {x for x in ours if x.startswith("_cpu")}
    assert not native or name in ("bindings.native", "backends.cpu"), "compiled code is reached through the bindings"
    unknown = ours - native - ALLOWED[name] - LATER.get(name, set()) - {name}
    assert not unknown, f"{name} must not know {sorted(unknown)}"
    assert not LATER.get(name, set()) & imports(path, at_import=True)[0]
    foreign = others - set(sys.stdlib_module_names)
    known = OUTSIDE | EXTRAS.get(name.split(".")[0], set())
    assert foreign <= known, f"{name} needs {sorted(foreign - known)}"
    optional = {"faiss", "cupy", "datasets", "tqdm"}
    assert not optional & imports(path, at_import=True)[1], "optional packages are imported where they are used"


def test_the_specification_needs_numpy_only() -> None:
    ours, others = imports(PACKAGE / "reference.py")
    assert ours == set() and others - set(sys.stdlib_module_names) == {"numpy"}


def test_the_allowed_edges_have_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {name for name, needs in ALLOWED.items() if name not in done and needs - {name} <= done}
        assert ready, f"a cycle among {sorted(set(ALLOWED) - done)}"
        done |= ready


def test_the_library_knows_nothing_of_what_measures_it() -> None:
    assert not [path for path in LIBRARY if "saap_lab" in imports(path)[1]]


def test_cuda_is_no_package() -> None:
    """A package named `cuda` on the path would hide the one that CuPy imports."""
    assert not (PACKAGE / "cuda" / "__init__.py").exists()


@pytest.mark.parametrize("use", ["", "saap_index.AsymmetricIndex(d=32, nlist=4)"])
def test_importing_is_light(use: str) -> None:
    code = f"import sys, saap_index\n{use}\nprint(*sys.modules)"
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=where, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "saap_index" in loaded and not loaded & {"faiss", "transformers", "cupy", "matplotlib"}
