"""What every test shares."""

import importlib
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its spinning threads would slow everything beside them
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator

import profiles  # noqa: F401, it loads the one that is asked for
import pytest
import torch
from default_dtype import for_the_library
from suite_guard import pytest_configure

__all__ = ["pytest_configure"]

import saap_index.invlists.layout
from saap_index import register_backend


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "run tests/backends/test_backends.py and tests/index/test_stateful.py for this backend, registered or 'module:Class'"
    parser.addoption("--backend", metavar="NAME", help=what)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``pytest.mark.over_backends(argument, backends)``: a test for each of these, or for the one of --backend."""
    over = metafunc.definition.get_closest_marker("over_backends")
    if over is not None:
        asked = metafunc.config.getoption("--backend")
        metafunc.parametrize(over.args[0], over.args[1] if asked is None else [own_backend(asked)])


def own_backend(name: str) -> str:
    """The name of a backend; one that is ``module:Class`` is imported, and registered under that."""
    module, _, kind = name.partition(":")
    if kind:
        register_backend(name, getattr(importlib.import_module(module), kind))
    return name


DEFAULT_DTYPE = os.environ.get("SAAP_DEFAULT_DTYPE", "float32")
"""What torch's default dtype is for the library, so that the whole suite can be run under another: `make test-dtypes`."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _break_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `attach` measures on a machine is one number here, and nothing is timed. transformers need not be there for it."""
    crossover = sys.modules.get("saap_index.hf.crossover")
    if crossover is not None:
        found = crossover.Crossover(2048, ())
        monkeypatch.setattr(crossover, "measured", lambda key, times: found)


@pytest.fixture(autouse=True)
def _merge_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small segments too are merged a KV head at a time."""
    monkeypatch.setattr(saap_index.invlists.layout, "MERGE_ROWS", 16)


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    if DEFAULT_DTYPE == "float32":
        yield
        return
    with for_the_library(getattr(torch, DEFAULT_DTYPE)):
        yield
