"""Every kernel once or twice on small inputs, for tools that slow a program down a thousandfold (compute-sanitizer)."""

from __future__ import annotations

import sys

import torch
from helpers import small_index

import gpu_harness as harness
from saap_index import SearchParametersIVF


def main() -> int:
    options = harness.arguments(__doc__).parse_args()
    device: harness.Device = harness.Dry() if options.dry else harness.Cuda()
    for dtype in (torch.bfloat16, torch.float32):
        index = small_index(64, 64, 8, 4, 2, dtype=dtype, device=device.device, backend=device.backend, mean_run_tokens=2)

        def tokens(n: int, heads: int, of: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn((2, heads, n, 64)).to(device.device, of)

        index.add(tokens(90, 2), tokens(90, 2))
        for _ in range(6):
            index.add(tokens(1, 2), tokens(1, 2))
        sparse, lists, dense = {"selectivity": 0.3, "tail": 0.3}, {"nprobe": 2}, {"selectivity": 1.0}
        for params in (SearchParametersIVF(**x) for x in (sparse, lists, dense)):
            for q in (1, 3):
                out = index.search_attend(tokens(q, 4), params=params)
                if not bool(torch.isfinite(out).all()):
                    raise SystemExit("not finite")
        index.truncate(70)
        index.search_attend(tokens(1, 4))
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
