"""What the GPU benchmarks share: the device or its emulation, timing by events, CUDA graphs, the copy bandwidth.

Every benchmark also runs with --dry: the same code on the emulated runtime with tiny shapes, so that it is known to work before
there is a GPU. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

Call = Callable[[], Any]
Knobs = dict[str, dict[str, int]]


class Cuda:
    """A real device."""

    dry = False
    backend: str | None = None

    def __init__(self, knobs: Knobs | None = None) -> None:
        """knobs : macros of kernels other than those that are chosen for them."""
        if not torch.cuda.is_available():
            raise SystemExit("expected a CUDA device, got none; --dry runs without one")
        self.device = torch.device("cuda", torch.cuda.current_device())
        if knobs is not None:
            from saap_index import register_backend
            from saap_index.backends.cuda.backend import CudaBackend
            from saap_index.backends.cuda.runtime import runtime

            self.backend = "cuda-knobs"
            backend = CudaBackend(self.device, runtime(self.device), knobs)
            register_backend(self.backend, lambda device: backend)
        properties = torch.cuda.get_device_properties(self.device)
        self.name, self.l2_bytes = properties.name, int(getattr(properties, "L2_cache_size", 50 << 20))

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def release(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def time(self, call: Call, calls: int = 1, rounds: int = 5, seconds: float = 0.2) -> float:
        """Median seconds of ``call`` divided by ``calls``, after one run; as many calls in a row as fill ``seconds`` / rounds."""
        call()
        torch.cuda.synchronize()
        one = self.elapsed(call, 1)
        repeat = max(1, min(1000, int(seconds / rounds / max(one, 1e-6))))
        return statistics.median(self.elapsed(call, repeat) for _ in range(rounds)) / calls

    def elapsed(self, call: Call, repeat: int) -> float:
        """Seconds of one of ``repeat`` calls in a row."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeat):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / repeat

    def host_seconds(self, call: Call, repeat: int = 20) -> float:
        """Seconds until the host is done with ``call``, the device not waited for: median of ``repeat``."""
        times = []
        for _ in range(repeat):
            torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        torch.cuda.synchronize()
        return statistics.median(times)

    def kernels(self, call: Call, calls: int, repeat: int = 10) -> dict[str, float]:
        """Microseconds of each kernel of ``call``, divided by ``calls``; "gaps": what of the time is in none of them."""
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(repeat):
                call()
            torch.cuda.synchronize()
        events = [x for x in profile.events() if x.device_type == torch.autograd.DeviceType.CUDA and x.time_range.end > 0]
        kernels: dict[str, float] = {}
        for x in events:
            name = x.name.split("(")[0][:48]
            kernels[name] = kernels.get(name, 0.0) + x.time_range.elapsed_us() / repeat / calls
        if events:
            whole = max(x.time_range.end for x in events) - min(x.time_range.start for x in events)
            kernels["gaps"] = whole / repeat / calls - sum(kernels.values())
        return kernels

    def graph(self, call: Call, warm: bool = True) -> Call:
        """``call`` as a replay of what it launches, warmed up as torch asks."""
        if warm:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call()
            torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def copy_bandwidth(self) -> float:
        """Bytes per second that a copy in device memory reads and writes."""
        nbytes = min(4 << 30, self.free_bytes() // 4)
        a, b = (torch.empty(nbytes, dtype=torch.uint8, device=self.device) for _ in range(2))
        return 2 * nbytes / self.time(lambda: b.copy_(a))

    def read_bandwidth(self) -> float:
        """Bytes per second of a kernel that reads and does nothing else."""
        from gpu_environment import Floor

        return Floor(self).read_bandwidth(min(4 << 30, self.free_bytes() // 4))


class Dry:
    """The emulated device: everything runs, nothing is timed in earnest."""

    dry = True
    backend = "cuda-emu"
    name = "emulation"
    l2_bytes = 0

    def __init__(self) -> None:
        from emulated import register

        self.runtime = register(self.backend)
        self.device = torch.device("cpu")

    def free_bytes(self) -> int:
        return 1 << 30

    def release(self) -> None:
        pass

    def time(self, call: Call, calls: int = 1, rounds: int = 1, seconds: float = 0.0) -> float:
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) / calls

    def elapsed(self, call: Call, repeat: int) -> float:
        for _ in range(repeat - 1):
            call()
        return self.time(call)

    def host_seconds(self, call: Call, repeat: int = 1) -> float:
        return self.time(call)

    def kernels(self, call: Call, calls: int, repeat: int = 1) -> dict[str, float]:
        self.runtime.clear()
        call()
        return {name: 0.0 for name in self.runtime.launched}

    def graph(self, call: Call, warm: bool = True) -> Call:
        if warm:
            call()
        with self.runtime.capture() as graph:
            call()
        return graph.replay

    def copy_bandwidth(self) -> float:
        return 1.0

    def read_bandwidth(self) -> float:
        return 1.0


Device = Cuda | Dry


def parse_knobs(text: str) -> Knobs:
    """ "select:SAAP_THREADS=512,scan:SAAP_STAGES=2" as macros by kernel."""
    knobs: Knobs = {}
    for part in filter(None, text.split(",")):
        kernel, _, macro = part.partition(":")
        name, _, value = macro.partition("=")
        knobs.setdefault(kernel, {})[name] = int(value)
    return knobs


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the emulated device")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=0.2, help="about so long per figure")
    parser.add_argument("--budget", type=float, default=150.0, help="start nothing new after so many seconds")
    return parser


def environment(device: Device) -> dict[str, Any]:
    """GPU, driver, versions and commit."""
    about: dict[str, Any] = {"gpu": device.name, "torch": torch.__version__, "python": sys.version.split()[0]}
    about["date"] = time.strftime("%Y-%m-%d")
    commands = {"commit": ["git", "-C", str(ROOT), "log", "-1", "--format=%h %cs"]}
    if not device.dry:
        about["cuda"] = torch.version.cuda
        commands["driver"] = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"]
    for module in ("cupy", "flashinfer", "flash_attn", "triton"):
        try:
            about[module] = str(getattr(__import__(module), "__version__", "?"))
        except Exception as error:  # a broken install is as good as none, and worth a line
            about[module] = f"none ({type(error).__name__})"
    for name, command in commands.items():
        try:
            about[name] = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            about[name] = "unknown"
    return about


def save(folder: Path | None, name: str, figures: Any, table: str) -> None:
    """``figures`` as JSON and ``table`` as text in ``folder``; the table also goes to the terminal."""
    print(table, flush=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
        (folder / f"{name}.txt").write_text(table + "\n")


def rows(header: list[str], lines: list[list[str]]) -> str:
    """A table with aligned columns."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    shown = []
    for line in [header, ["-" * w for w in widths], *lines]:
        cells = [x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True))]
        shown.append("  ".join(cells).rstrip())
    return "\n".join(shown)
