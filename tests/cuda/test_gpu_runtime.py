"""The runtime of real devices, as far as it goes without one: what it says where something is missing, what it asks of CuPy."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from saap_index import AsymmetricIndex, DeviceError, MissingDependencyError, ParameterError, checks, register_backend
from saap_index.backends import get_backend
from saap_index.backends.cuda import driver as gpu_driver
from saap_index.backends.cuda import nvrtc as gpu_nvrtc
from saap_index.backends.cuda import runtime as gpu_runtime
from saap_index.backends.cuda import source as gpu_source
from saap_index.backends.cuda.launch import Launch
from saap_index.backends.plain_torch import TorchBackend

CUDA = torch.device("cuda", 0)
PARAMS = np.dtype([("x", "u8"), ("n", "i4")], align=True)


class DriverError(RuntimeError):
    pass


class FakeFunction:
    """A function of CuPy's: its address, and its own way to launch."""

    ptr = 0x7F0000001000

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int, stream: Any) -> None:
        assert args[0].size == 1 and args[0].dtype.names is None, "CuPy describes every field of a struct, at every launch"
        self.launches.append((grid, block, args[0].tobytes(), shared_mem, stream.ptr))


class FakeKernel:
    """A RawKernel: attributes that can be set, and `kernel`, which launches."""

    def __init__(self) -> None:
        self.shared_size_bytes = 0
        self.max_dynamic_shared_size_bytes = 0
        self.kernel = FakeFunction()


class FakeDriver:
    """As much of libcuda as is called. ``codes`` : what the next launches return."""

    def __init__(self, params_bytes: int) -> None:
        self.params_bytes = params_bytes
        self.launches: list[tuple[Any, ...]] = []
        self.entered: list[int] = []
        self.codes: list[int] = []

    def cuLaunchKernelEx(self, config: Any, function: Any, params: Any, extra: None) -> int:
        c = config._obj
        attributes = [(x.id, list(x.value)[:3]) for x in c.attributes[: c.num_attributes]]
        data = ctypes.string_at(params[0], self.params_bytes)
        self.launches.append((list(c.grid), list(c.block), c.shared_bytes, c.stream, attributes, function.value, data))
        return self.codes.pop(0) if self.codes else 0

    def cuDeviceGet(self, handle: Any, number: int) -> int:
        handle._obj.value = 10 + number
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, handle: Any) -> int:
        context._obj.value = 100 + handle.value
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.entered.append(context.value)
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"too many resources"
        return 0


class FakeCupy(SimpleNamespace):
    """As much of CuPy as the runtime uses."""

    def __init__(self, driver: int = 13000, built: int = 13000, broken: bool = False) -> None:
        self.__version__ = "14.2.0"
        self.modules: list[dict[str, Any]] = []
        self.kernel = FakeKernel()
        self.failure: Exception | None = None

        def count() -> int:
            if broken:
                raise DriverError("cudaErrorInsufficientDriver")
            return 1

        self.cuda = SimpleNamespace(
            Device=lambda index: contextlib.nullcontext(), driver=SimpleNamespace(CUDADriverError=DriverError),
            runtime=SimpleNamespace(
                CUDARuntimeError=DriverError, driverGetVersion=lambda: driver, runtimeGetVersion=lambda: built,
                getDeviceCount=count, deviceGetAttribute=lambda attribute, index: {97: 232448}[attribute],
            )
        )

    def RawModule(self, **options: Any) -> Any:
        self.modules.append(options)
        return SimpleNamespace(get_function=self.get_function)

    def get_function(self, name: str) -> FakeKernel:
        if self.failure is not None:
            raise self.failure
        return self.kernel


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torch look as if it had a device; call it with a cupy, or None where it is not installed."""

    def pretend(cupy: Any, capability: tuple[int, int] = (9, 0), available: bool = True) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        streams = iter(range(100, 200))
        fakes = {
            "is_available": lambda: available, "current_device": lambda: 0, "device_count": lambda: 1,
            "get_device_capability": lambda device: capability,
            "get_device_properties": lambda device: SimpleNamespace(name="fake", multi_processor_count=132),
            "current_stream": lambda device: SimpleNamespace(cuda_stream=next(streams)),
            "device": lambda device: contextlib.nullcontext(), "is_current_stream_capturing": lambda: False,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        # builds of torch with CUDA have this shorter way, which needs a driver
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: next(streams), raising=False)
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        gpu_runtime._runtime.cache_clear()

    yield pretend
    gpu_runtime._runtime.cache_clear()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    fake = FakeDriver(PARAMS.itemsize)
    monkeypatch.setattr(gpu_driver, "library", lambda: fake)
    gpu_driver._primary_context.cache_clear()
    yield fake
    gpu_driver._primary_context.cache_clear()


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise DeviceError("device: expected a CUDA driver, got none")

    monkeypatch.setattr(gpu_driver, "library", absent)


def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"device: expected a CUDA device .* built without CUDA; device='cpu' needs none"):
        AsymmetricIndex(d=64, device="cuda")
    assert AsymmetricIndex(d=64, device="cpu")._backend.name == "cpu"


def test_no_device(with_cuda: Any) -> None:
    with_cuda(FakeCupy(), available=False)
    with pytest.raises(DeviceError, match=r"device: expected a CUDA device .* finds no usable GPU .* too old a driver"):
        AsymmetricIndex(d=64, device="cuda")


def test_no_such_device(with_cuda: Any) -> None:
    with_cuda(FakeCupy())
    with pytest.raises(DeviceError, match=r"device: expected one of 1 CUDA devices, got 'cuda:3'"):
        AsymmetricIndex(d=64, device="cuda:3")


def test_without_cupy(with_cuda: Any) -> None:
    with_cuda(None)
    with pytest.raises(MissingDependencyError, match=r"needs CuPy: pip install cupy-cuda13x"):
        AsymmetricIndex(d=64, device="cuda")


@pytest.mark.parametrize("cupy", [FakeCupy(driver=12040), FakeCupy(broken=True)], ids=["older", "insufficient"])
def test_old_driver(with_cuda: Any, cupy: FakeCupy) -> None:
    with_cuda(cupy)
    with pytest.raises(DeviceError, match=r"driver.*update the driver, or install .*cupy-cuda12x or cupy-cuda13x"):
        AsymmetricIndex(d=64, device="cuda")


def test_old_gpu(with_cuda: Any) -> None:
    with_cuda(FakeCupy(), capability=(7, 5))
    with pytest.raises(DeviceError, match=r"compute capability 8.0 or more \(Ampere\), got 7.5"):
        AsymmetricIndex(d=64, device="cuda")


def test_cuda_serves_cuda_alone() -> None:
    with pytest.raises(DeviceError, match=r"backend: 'cuda' expects device 'cuda', got 'cpu'"):
        get_backend(torch.device("cpu"), "cuda")


def test_launches_by_the_driver(with_cuda: Any, driver: FakeDriver) -> None:
    """The configuration is made once; the stream is asked for, and the parameters are read, at every start."""
    cupy = FakeCupy()
    with_cuda(cupy)
    runtime = gpu_runtime.runtime(CUDA)
    assert runtime.capability == (9, 0)
    kernel = runtime.kernel("append.cu", "saap_append", {})
    x = torch.zeros(4, dtype=torch.float32)
    launch = Launch(kernel, (8, 2, 1), 96, 1024, np.zeros((), PARAMS), x, cluster=4, dependent=True)
    plain = Launch(kernel, (8, 2, 1), 96, 0, np.zeros((), PARAMS))
    launch(x=x)
    launch.params["n"] = 5
    launch()
    plain()
    fixed = [8, 2, 1], [96, 1, 1], 1024
    attributes = [(4, [4, 1, 1]), (6, [1, 0, 0])]
    for (*how, data), stream, n in zip(driver.launches, (100, 101), (0, 5), strict=False):
        assert how == [*fixed, stream, attributes, cupy.kernel.kernel.ptr]
        assert np.frombuffer(data, PARAMS)[0].item() == (x.data_ptr(), n)
    assert driver.launches[2][2:5] == (0, 102, []) and not cupy.kernel.kernel.launches
    assert cupy.kernel.max_dynamic_shared_size_bytes == 232448
    with pytest.raises(TypeError, match="n: expected a pointer, uint64, got int32"):
        launch(n=x)
    for cluster in (3, 16, 0):
        with pytest.raises(ParameterError, match=r"cluster: expected a divisor of grid\[0\] = 8 up to 8"):
            kernel.launch((8, 2, 1), 96, 0, np.zeros((), PARAMS), cluster)


def test_the_layout_of_the_drivers_structs() -> None:
    """As in cuda.h: of CUlaunchConfig and CUlaunchAttribute."""
    config, attribute = gpu_driver._Config, gpu_driver._Attribute
    assert (ctypes.sizeof(config), ctypes.sizeof(attribute)) == (56, 72)
    names = ("grid", "block", "shared_bytes", "stream", "attributes", "num_attributes")
    assert [getattr(config, name).offset for name in names] == [0, 12, 24, 32, 40, 48]
    assert attribute.value.offset == 8


def test_a_thread_without_context(with_cuda: Any, driver: FakeDriver) -> None:
    with_cuda(FakeCupy())
    launch = Launch(gpu_runtime.runtime(CUDA).kernel("append.cu", "saap_append", {}), (1, 1, 1), 32, 0, np.zeros((), PARAMS))
    driver.codes = [201]
    launch()
    assert driver.entered == [110] and len(driver.launches) == 2
    driver.codes = [701]
    with pytest.raises(DeviceError, match="expected the driver to start a kernel, got error 701: too many resources"):
        launch()


def test_older_devices_take_no_attributes(with_cuda: Any, driver: FakeDriver) -> None:
    with_cuda(FakeCupy(), capability=(8, 6))
    runtime = gpu_runtime.runtime(CUDA)
    kernel = runtime.kernel("append.cu", "saap_append", {})
    assert runtime.capability == (8, 6)
    kernel.launch((4, 1, 1), 32, 0, np.zeros((), PARAMS))
    for options in ({"cluster": 2}, {"dependent": True}):
        with pytest.raises(DeviceError, match=r"launch: expected capability 9.0 for clusters and dependent launches, got 8.6"):
            kernel.prepare((4, 1, 1), 32, 0, np.zeros((), PARAMS), **options)
    assert len(driver.launches) == 1


def test_launches_by_cupy(with_cuda: Any, no_driver: None) -> None:
    """Without the driver's library. Compiled once from one text; the stream is asked for at every launch, and the parameters go
    by value."""
    cupy = FakeCupy()
    with_cuda(cupy)
    runtime = gpu_runtime.runtime(torch.device("cuda"))
    assert runtime is gpu_runtime.runtime(CUDA) and (runtime.multiprocessors, runtime.max_shared_bytes) == (132, 232448)
    assert not runtime.capturing and runtime.capability == (8, 0)
    params = np.zeros((), PARAMS)
    for n in range(3):
        params["n"] = n
        runtime.kernel("append.cu", "saap_append", {"B": 2, "A": 1}).launch((4, 2, 1), 96, 1024, params)
    (module,) = cupy.modules
    assert module == {
        "code": gpu_source.source("append.cu"), "options": ("-std=c++17", "-DA=1", "-DB=2"), "backend": "nvrtc",
    }
    assert cupy.kernel.max_dynamic_shared_size_bytes == 232448
    grids, blocks, data, shared, streams = zip(*cupy.kernel.kernel.launches, strict=True)
    assert set(grids) == {(4, 2, 1)} and set(blocks) == {(96,)} and set(shared) == {1024} and streams == (100, 101, 102)
    assert [np.frombuffer(x, params.dtype)["n"][0] for x in data] == [0, 1, 2] and len(data[0]) == 16


def test_nothing_to_compile_with(with_cuda: Any) -> None:
    """Without NVRTC or headers it is said what to install; faults of the driver and of a source stay as they are."""
    cupy = FakeCupy()
    with_cuda(cupy)
    runtime = gpu_runtime.runtime(CUDA)
    cupy.failure = RuntimeError("Failed to find CUDA headers.")
    with pytest.raises(MissingDependencyError, match=r"pip install 'cupy-cuda13x\[ctk\]', or .*: Failed"):
        runtime.kernel("append.cu", "saap_append", {})
    for failure in (DriverError("out of memory"), ValueError("of the source")):
        cupy.failure = failure
        with pytest.raises(type(failure), match=str(failure)):
            runtime.kernel("append.cu", "saap_append", {})


@pytest.mark.parametrize(
    "failure",
    [
        PermissionError(13, "Permission denied", "/home/me/.cupy/kernel_cache/x"),
        OSError(30, "Read-only file system", "/home/me/.cupy/k"),
        OSError(28, "No space left on device", "/home/me/.cupy/k"),
    ],
)
def test_nowhere_to_keep_kernels(with_cuda: Any, failure: OSError) -> None:
    """An unwritable folder is called that, and not a missing compiler."""
    cupy = FakeCupy()
    with_cuda(cupy)
    cupy.failure = failure
    with pytest.raises(DeviceError, match=rf"can be written, got {failure.filename} .*{failure.strerror}.*set CUPY_CACHE_DIR"):
        gpu_runtime.runtime(CUDA).kernel("append.cu", "saap_append", {})


def test_a_library_that_cannot_be_loaded(with_cuda: Any) -> None:
    cupy = FakeCupy()
    with_cuda(cupy)
    cupy.failure = OSError("libnvrtc.so.13: cannot open shared object file: No such file or directory")
    with pytest.raises(MissingDependencyError, match=r"needs NVRTC .*libnvrtc"):
        gpu_runtime.runtime(CUDA).kernel("append.cu", "saap_append", {})


@pytest.mark.parametrize("name", [None, "cuda", "torch"])
def test_a_device_without_number_is_the_current_one(with_cuda: Any, monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    with_cuda(FakeCupy())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert get_backend(torch.device("cuda"), name).device == torch.device("cuda", 1)  # type: ignore[attr-defined]
    assert get_backend(torch.device("cuda", 0), name).device == CUDA  # type: ignore[attr-defined]


def test_checks_give_a_device_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.device("cuda", 1)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: SimpleNamespace(device=there))
    assert checks.device("cuda") == there and checks.device("cuda:0") == CUDA


def test_an_index_is_on_its_backends_device() -> None:
    """Checks of tensors then ask for this very device."""
    register_backend("numbered", lambda device: TorchBackend(torch.device("cpu", 0)))
    assert AsymmetricIndex(d=64, backend="numbered").device == torch.device("cpu", 0)
    assert AsymmetricIndex(d=64, backend="reference").device == torch.device("cpu")


# -- sources --------------------------------------------------------------------------------------------------------------


def test_includes_are_put_in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Each header once, lines still numbered, so that a text is what its hash says and messages lead to the file."""
    files = {
        "a.cu": '#include "b.cuh"\n#include "c.cuh"\n#include "elsewhere.h"\nint a;\n',
        "b.cuh": '#pragma once\n#include "c.cuh"\nint b;\n',
        "c.cuh": "#pragma once\nint c;\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(gpu_source, "FOLDER", tmp_path)
    gpu_source.source.cache_clear()
    text = gpu_source.source("a.cu")
    gpu_source.source.cache_clear()
    lines = text.splitlines()
    assert [x for x in lines if x.startswith("int")] == ["int c;", "int b;", "int a;"]
    assert [x for x in lines if "include" in x] == ['#include "elsewhere.h"'] and "once" not in text
    where: dict[str, tuple[str, int]] = {}
    file, number = "", 0
    for line in lines:
        if line.startswith("#line"):
            file, number = line.split()[2].strip('"'), int(line.split()[1])
            continue
        where[line] = (file, number)
        number += 1
    assert where["int a;"] == ("a.cu", 4) and where["int b;"] == ("b.cuh", 3) and where["int c;"] == ("c.cuh", 2)


def test_usage_of_a_log() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_90'
ptxas info    : Function properties for one
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers
ptxas info    : Compiling entry function 'two' for 'sm_90'
ptxas info    : Function properties for two
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 400 bytes cmem[0]
"""
    assert gpu_nvrtc.usage(log) == {"one": gpu_nvrtc.Usage(32, 0, 0), "two": gpu_nvrtc.Usage(255, 16, 20)}
