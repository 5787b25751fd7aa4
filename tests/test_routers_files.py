"""Folders of routers: two files that belong together, and damage of any kind is FormatError and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from saap_index import FormatError, LayerRouters, Routers, load_routers, save_routers
from saap_index.backends import RouterWeights
from saap_index.calibration import TARGETS, Calibration
from saap_index.quantizer import KeyQuantizer
from saap_index.rope import Rope
from saap_index.router import QueryRouter
from saap_index.routers import ARRAYS, CONFIG
from saap_index.tower import TwoTower

HEADS, D, UNITS, NLIST = 2, 8, 3, 4


def made(value: float = 1.0) -> Routers:
    """One layer with lists of its own, one with lists that are each prompt's; ``value`` is everywhere."""
    centroids = torch.full((HEADS, NLIST, D), value, dtype=torch.float32)

    def weights(nlist: int) -> RouterWeights:
        shapes = (HEADS, UNITS, D), (HEADS, UNITS), (HEADS, nlist + 3, UNITS), (HEADS, nlist + 3, D), (HEADS, nlist + 3)
        return RouterWeights(*(torch.full(shape, value, dtype=torch.float32) for shape in shapes), nlist)

    rope = Rope(head_dim=D, scaling="linear", factor=2.0)
    calibration = Calibration(torch.linspace(0.5, 0.0, len(TARGETS), dtype=torch.float32).expand(HEADS, -1).contiguous())
    shares = torch.ones(HEADS, dtype=torch.float32).numpy()
    tower = TwoTower(weights(D))
    layers = {
        0: LayerRouters(KeyQuantizer(centroids), QueryRouter(weights(NLIST)), rope, rope, value, None, calibration, shares),
        2: LayerRouters(KeyQuantizer(centroids), tower.at(centroids), None, rope, value, tower, None, shares, shares[:, None]),
    }
    model = {"num_attention_heads": 4, "num_key_value_heads": HEADS, "head_dim": D, "num_hidden_layers": 3}
    return Routers({"model": model, "layout": {"sinks": 4, "window": 16}, "trained": value}, layers)


def value_of(folder: Path) -> float:
    """Of routers that were `made`; AssertionError if configuration and arrays are of different ones."""
    routers = load_routers(folder)
    values = {routers.config["trained"], *(layer.scale for layer in routers.layers.values())}
    values |= {float(layer.query_router.weights.hidden.unique()) for layer in routers.layers.values()}
    assert len(values) == 1
    return float(values.pop())


# -- files that belong together -------------------------------------------------------------------------------------------


def test_a_mixture_is_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    save_routers(made(1.0), one)
    save_routers(made(2.0), two)
    assert (value_of(one), value_of(two)) == (1.0, 2.0)
    shutil.copy(two / ARRAYS, one / ARRAYS)
    with pytest.raises(FormatError, match=r"model\.safetensors with the checksum .*of other routers"):
        load_routers(one)
    save_routers(load_routers(two), one)
    assert value_of(one) == 2.0


def test_an_older_folder_says_that_nothing_ties_its_files(tmp_path: Path) -> None:
    save_routers(made(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert len(config.pop("checksum")) == 32
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"expected a checksum of model\.safetensors in config\.json"):
        routers = load_routers(tmp_path)
    save_routers(routers, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value_of(tmp_path) == 1.0


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
from test_routers_files import made
from saap_index import files, save_routers
step, replace = sys.argv[1], os.replace
if step == "second replace":
    def first(a, b):
        replace(a, b)
        os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    os.replace = first
else:
    setattr(os, step, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
save_routers(made(2.0), sys.argv[3])
"""


@pytest.mark.parametrize("step", ["fsync", "replace", "second replace"])
def test_a_killed_writer(tmp_path: Path, step: str) -> None:
    save_routers(made(1.0), tmp_path)
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, step, str(Path(__file__).parent), str(tmp_path)]
    assert subprocess.run(command, env=where, timeout=120).returncode == -signal.SIGKILL
    if step == "second replace":
        with pytest.raises(FormatError, match="checksum"):
            load_routers(tmp_path)
    else:
        assert value_of(tmp_path) == 1.0
    save_routers(made(3.0), tmp_path)
    assert value_of(tmp_path) == 3.0 and sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, ARRAYS]
