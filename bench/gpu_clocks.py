"""Where the time of a scan goes inside its blocks: cycles from point to point of cuda/scan_params.cuh, over all blocks.

    python bench/gpu_clocks.py                  # 128k tokens, batch 1 and 8, 5 %
    python bench/gpu_clocks.py --knobs scan:SAAP_WARPS=4,scan:SAAP_BLOCKS=2
    python bench/gpu_clocks.py --rows           # row numbers instead of runs
    python bench/gpu_clocks.py --dry            # tiny shapes on the emulated device; its cycles mean nothing

Llama-3.1-8B's layer: 8 KV heads of 4 query heads, 128 dims, bfloat16. Rows come in runs, as a selection writes them. Before every
launch the second cache is filled with something else.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from typing import Any

import torch

import gpu_harness as harness
from saap_index.backends.cuda.scan import POINTS, Listed, Runs, Scan, ScanShape

HEADS, GROUP, RUN, SINKS, RECENT, LAUNCHES = 8, 4, 32, 4, 192, 5


def listed_rows(b: int, n: int, share: float, device: torch.device, by_row: bool) -> Listed | Runs:
    """Runs of RUN rows, evenly many to each head, ascending."""
    most = (n - SINKS - RECENT) // RUN
    chosen = torch.stack([torch.randperm(most)[: max(1, int(share * most))].sort()[0] for _ in range(b * HEADS)])
    rows = (SINKS + chosen[..., None] * RUN + torch.arange(RUN)).reshape(b, HEADS, -1)
    counts = torch.full((b, HEADS), rows.shape[2], dtype=torch.int32)
    if by_row:
        return Listed(rows.to(device, torch.int32), counts.to(device))
    number = chosen.shape[1]
    ends = (torch.arange(number) * RUN + RUN).expand(b, HEADS, number)
    behind = (SINKS + chosen * RUN + RUN).view(b, HEADS, number)
    runs, run_counts = torch.stack([behind, ends], 3).to(device, torch.int32), torch.full((b, HEADS), number, dtype=torch.int32)
    return Runs(runs, run_counts.to(device), counts.to(device), rows.shape[2])


def measure(device: Any, on: Any, b: int, n: int, d: int, share: float, knobs: dict[str, int], by_row: bool) -> dict[str, Any]:
    """Median and largest cycles of each interval over the blocks, the median of some launches; and those of all together."""
    dtype = torch.bfloat16
    keys, values = (torch.randn((b, HEADS, n, d), dtype=dtype, device=device.device) for _ in range(2))
    queries = torch.randn((b, HEADS, GROUP, d), dtype=dtype, device=device.device)
    meta = torch.tensor([[n, SINKS, n - RECENT, 0, n, 0, 0, 0]] * b, dtype=torch.int32, device=device.device)
    shape = ScanShape(b, HEADS, GROUP, 1, d, d, dtype, dtype, n, causal=True)
    scan = Scan(on, shape, {**knobs, "SAAP_CLOCK": 1})
    floats = torch.empty(scan.num_floats, device=device.device)
    tickets = torch.zeros(scan.num_tickets, dtype=torch.int32, device=device.device)
    clocks = torch.zeros((scan.grid[0] * scan.grid[1], len(POINTS)), dtype=torch.int64, device=device.device)
    rows = listed_rows(b, n, share, device.device, by_row)
    launch = scan.bind(keys, values, meta, rows, None, d**-0.5, floats, tickets, clocks)
    out, lse = torch.empty_like(queries), torch.empty((b, HEADS, GROUP), device=device.device)
    other = torch.empty(max(64, 4 * device.l2_bytes), dtype=torch.uint8, device=device.device)
    cycles: dict[str, list[tuple[float, float]]] = {}
    for i in range(LAUNCHES + 1):
        other.fill_(i)
        clocks.zero_()
        launch(queries=queries, out=out, lse=lse)
        if i == 0:
            continue  # the code was not there yet
        at = clocks.cpu().double()
        passed = [j for j in range(len(POINTS)) if bool((at[:, j] > 0).any())]
        pairs = [*pairwise(passed), (passed[0], passed[-1])]
        for a, z in pairs:
            both = (at[:, a] > 0) & (at[:, z] > 0)
            took = (at[both, z] - at[both, a]).tolist() or [0.0]
            name = f"{POINTS[a]} to {POINTS[z]}" if (a, z) != pairs[-1] else "all"
            cycles.setdefault(name, []).append((sorted(took)[len(took) // 2], max(took)))
    middle = {name: [sorted(x[i] for x in of)[len(of) // 2] for i in range(2)] for name, of in cycles.items()}
    return {"batch": b, "tokens": n, "share": share, "grid": scan.grid, "macros": scan.macros, "cycles": middle}


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--knobs", default="", help="macros of the scan, such as scan:SAAP_WARPS=4")
    parser.add_argument("--rows", action="store_true", help="row numbers instead of runs")
    options = parser.parse_args()
    device: Any = harness.Dry() if options.dry else harness.Cuda()
    if options.dry:
        on = device.runtime
    else:
        from saap_index.backends.cuda.runtime import runtime

        on = runtime(device.device)
    knobs = harness.parse_knobs(options.knobs).get("scan", {})
    cases = [(1, 500, 32), (2, 400, 32)] if options.dry else [(1, 131072, 128), (8, 131072, 128)]
    results = []
    for b, n, d in cases:
        results.append(measure(device, on, b, n, d, 0.05, knobs, options.rows))
        print(f"batch {b}, {n} tokens, 5 %: cycles, median and largest of the blocks")
        for name, (median, largest) in results[-1]["cycles"].items():
            print(f"  {name:24} {median:9.0f} {largest:9.0f}")
        device.release()
    if options.out:
        (options.out / "gpu_clocks.json").write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
