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
from damage import damaged_bytes, damaged_json, damaged_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from saap_index import FormatError, LayerRouters, Routers, SaapError, load_routers, save_routers
from saap_index.backends import RouterWeights
from saap_index.routers import ARRAYS, CONFIG, _checksum
from saap_index.routing.calibration import TARGETS, Calibration
from saap_index.routing.quantizer import KeyQuantizer
from saap_index.routing.rope import Rope
from saap_index.routing.router import QueryRouter
from saap_index.routing.sampling import Sampling
from saap_index.routing.two_tower import TwoTower

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
    tower = TwoTower(weights(D), transform=torch.full((HEADS, D, D), value, dtype=torch.float32))
    layers = {
        0: LayerRouters(KeyQuantizer(centroids), QueryRouter(weights(NLIST)), rope, rope, value, None, calibration, shares),
        2: LayerRouters(
            KeyQuantizer(centroids), tower.for_lists(centroids), None, rope, value, tower, None, shares, shares[:, None],
            sampling=Sampling([0.5, 0.0], [1.25, 2.0], [1.0, 0.0]),
        ),
    }
    model = {"num_attention_heads": 4, "num_key_value_heads": HEADS, "head_dim": D, "num_hidden_layers": 3}
    return Routers({"model": model, "layout": {"sinks": 4, "window": 16}, "trained": value}, layers)


def value_of(folder: Path) -> float:
    """Of routers that were `made`; AssertionError if configuration and arrays are of different ones."""
    routers = load_routers(folder)
    values = {routers.config["trained"], *(layer.scale for layer in routers.layers.values())}
    values |= {float(routers.layers[2].tower.transform.unique())}
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


# -- damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    save_routers(made(0.5), folder)
    return folder


fuzz = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def loads_or_refuses(folder: Path, config: bytes, arrays: bytes, is_tied: bool = True) -> None:
    """FormatError, or routers whose indexes attend: an error without a name fails the test. is_tied : with a right checksum."""
    if is_tied:
        config = config.replace(b"CHECKSUM", _checksum(arrays).encode())
    (folder / CONFIG).write_bytes(config)
    (folder / ARRAYS).write_bytes(arrays)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*older version")
        try:
            routers = load_routers(folder)
        except FormatError as error:
            assert str(error)
            return
    x = torch.ones((1, HEADS, 40, D), dtype=torch.float32)
    for number in routers.layers:
        try:
            index = routers.index(number, break_even=0, seal_tokens=4)
        except SaapError:  # a window of 2**30, say: an option that the index refuses by name
            continue
        if index.nlist <= 64 and index.window <= 64 and index.layout.sinks <= 64:
            index.add(x, x)
            index.search_attend(torch.ones((1, index.num_heads, 1, D), dtype=torch.float32))


@fuzz
@given(data=st.data())
def test_any_value_of_the_configuration(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    config = {**json.loads((good / CONFIG).read_text()), "checksum": "CHECKSUM"}
    loads_or_refuses(tmp_path, data.draw(damaged_json(config)), (good / ARRAYS).read_bytes())


@fuzz
@given(data=st.data())
def test_any_array(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    """With a checksum that is right: what is in the arrays is checked too."""
    config = {**json.loads((good / CONFIG).read_text()), "checksum": "CHECKSUM"}
    save_file(data.draw(damaged_tensors(load_file(good / ARRAYS))), tmp_path / "changed")
    loads_or_refuses(tmp_path, json.dumps(config).encode(), (tmp_path / "changed").read_bytes())


@fuzz
@given(data=st.data())
def test_any_bytes(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    config, arrays = (good / CONFIG).read_bytes(), (good / ARRAYS).read_bytes()
    tied = json.dumps({**json.loads(config), "checksum": "CHECKSUM"}).encode()
    header = 8 + int.from_bytes(arrays[:8], "little")
    if data.draw(st.booleans()):
        loads_or_refuses(tmp_path, data.draw(damaged_bytes(config, len(config))), arrays, is_tied=False)
    else:
        loads_or_refuses(tmp_path, tied, data.draw(damaged_bytes(arrays, header)))


def test_damage_is_seen_by_the_checksum(good: Path, tmp_path: Path) -> None:
    shutil.copy(good / CONFIG, tmp_path / CONFIG)
    arrays = bytearray((good / ARRAYS).read_bytes())
    arrays[-3] ^= 1
    (tmp_path / ARRAYS).write_bytes(arrays)
    with pytest.raises(FormatError, match="damaged"):
        load_routers(tmp_path)


LIMITED = """
import resource, sys
from pathlib import Path
from saap_index import FormatError, load_routers
good, *bad = sys.argv[1:]
for _ in range(3):
    load_routers(good)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (8 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in bad:
    try:
        load_routers(path)
    except FormatError as error:
        print(error)
        continue
    assert path.endswith("65536"), path
"""


def test_no_folder_makes_the_reader_allocate_much(good: Path, tmp_path: Path) -> None:
    """With 8 MiB of address space left: lists that are yet to be made take no memory, and a number too large is refused."""
    config = json.loads((good / CONFIG).read_text())
    paths = []
    for nlist in (65536, 65537, 50_000_000, 2**62):
        paths.append(tmp_path / str(nlist))
        shutil.copytree(good, paths[-1])
        layers = {**config["layers"], "2": {**config["layers"]["2"], "nlist": nlist}}
        (paths[-1] / CONFIG).write_text(json.dumps({**config, "layers": layers}))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(good), *map(str, paths)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nlist: expected an integer in [1, 65536]") == 3
