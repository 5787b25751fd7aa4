"""What this machine is: GPU, driver, versions; the bandwidth of a copy and of a read of device memory, against which the others
measure; what a launch costs in a CUDA graph before a kernel does anything, with and without programmatic dependent launch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gpu_harness as harness

LAUNCHES = 64
"""Kernels in a graph whose launches are timed."""


class Floor:
    """The kernels of floor.cu."""

    def __init__(self, device: harness.Cuda) -> None:
        import cupy

        self.device = device
        self.module = cupy.RawModule(code=(harness.ROOT / "bench/floor.cu").read_text(), options=("-std=c++17",), backend="nvrtc")

    def launch(
        self, name: str, grid: int, block: int, params: np.ndarray, cluster: int = 1, dependent: bool = False
    ) -> Callable[[], None]:
        from saap_index.backends.cuda.driver import DriverLaunch

        function = self.module.get_function(name).kernel.ptr
        launch = DriverLaunch(function, (grid, 1, 1), block, 0, params.ctypes.data, cluster, dependent)
        keep = params  # its address is in the launch
        return lambda: launch(torch.cuda.current_stream().cuda_stream) if keep is not None else None

    def launch_us(self, dependent: bool) -> float:
        """Microseconds from one empty kernel to the next in a graph."""
        name = "empty_dependent" if dependent else "empty"
        one = self.launch(name, self._multiprocessors(), 256, np.zeros(1, np.uint64), dependent=dependent)

        def several() -> None:
            for _ in range(LAUNCHES):
                one()

        several()
        return 1e6 * self.device.time(self.device.graph(several)) / LAUNCHES

    def read_bandwidth(self, nbytes: int) -> float:
        """Bytes per second of a kernel that reads and does nothing else, blocks of 512 threads."""
        memory = torch.zeros(nbytes, dtype=torch.uint8, device=self.device.device)
        best = 0.0
        for blocks in (2, 4):
            fields = [("from", np.uint64), ("sum", np.uint64), ("n", np.int64)]
            params = np.array([(memory.data_ptr(), memory.data_ptr(), nbytes // 16)], fields)
            seconds = self.device.time(self.launch("read_only", blocks * self._multiprocessors(), 512, params))
            best = max(best, nbytes / seconds)
        return best

    def cycles(self) -> dict[str, int]:
        """Cycles of what is waited for inside a kernel."""
        zeros = torch.zeros(64, dtype=torch.int64, device=self.device.device)
        params = np.array([(zeros.data_ptr(), zeros[16:].data_ptr())], [("cycles", np.uint64), ("zeros", np.uint64)])
        for _ in range(2):
            zeros.zero_()
            self.launch("cluster_clocks", 8, 256, params, cluster=8)()
        numbers: Tensor = zeros[:4].cpu()
        return dict(zip(("cluster_barrier", "shared_of_another_block", "l2", "block_barrier"), numbers.tolist(), strict=True))

    def chased(self) -> dict[str, int]:
        """Cycles of a load from device memory, and of a line of code the first time."""
        step = 1 << 20
        zeros = torch.zeros(64 * step, dtype=torch.int32, device=self.device.device)
        cycles = torch.zeros(2, dtype=torch.int64, device=self.device.device)
        torch.zeros(max(64, 4 * self.device.l2_bytes), dtype=torch.uint8, device=self.device.device)  # takes the second cache
        fields = [("cycles", np.uint64), ("zeros", np.uint64), ("step", np.int64)]
        params = np.array([(cycles.data_ptr(), zeros.data_ptr(), step)], fields)
        self.launch("chase", 1, 32, params)()  # once: its code is not there yet
        numbers: Tensor = cycles.cpu()
        return dict(zip(("dram", "cold_line"), numbers.tolist(), strict=True))

    def _multiprocessors(self) -> int:
        return torch.cuda.get_device_properties(self.device.device).multi_processor_count


def main() -> int:
    options = harness.arguments(__doc__).parse_args()
    device: harness.Device = harness.Dry() if options.dry else harness.Cuda()
    results: dict[str, Any] = harness.environment(device)
    results["copy_gb_per_s"] = round(device.copy_bandwidth() / 1e9, 1)
    if isinstance(device, harness.Cuda):
        properties = torch.cuda.get_device_properties(device.device)
        results |= {
            "multiprocessors": properties.multi_processor_count, "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(device.l2_bytes / 2**20, 1), "capability": f"{properties.major}.{properties.minor}",
        }
        floor = Floor(device)
        results |= {"read_gb_per_s": round(floor.read_bandwidth(4 << 30) / 1e9, 1), "cycles": floor.cycles() | floor.chased()}
        results["launch_us"] = {"graph": round(floor.launch_us(False), 2), "graph, dependent": round(floor.launch_us(True), 2)}
    harness.save(options.out, "environment", results, json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
