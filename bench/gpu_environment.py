"""What this machine is: GPU, driver, versions, and the bandwidth of a copy in device memory, against which the others measure."""

from __future__ import annotations

import json
import sys
from typing import Any

import gpu_harness as harness
import torch


def main() -> int:
    options = harness.arguments(__doc__).parse_args()
    device: harness.Device = harness.Dry() if options.dry else harness.Cuda()
    found: dict[str, Any] = harness.environment(device)
    found["copy_gb_per_s"] = round(device.copy_bandwidth() / 1e9, 1)
    if isinstance(device, harness.Cuda):
        properties = torch.cuda.get_device_properties(device.device)
        found |= {
            "multiprocessors": properties.multi_processor_count, "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(device.l2_bytes / 2**20, 1), "capability": f"{properties.major}.{properties.minor}",
        }  # fmt: skip
    harness.save(options.out, "environment", found, json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
