"""What a decode step costs by the machine code of its kernels, without a GPU: a prediction that a measurement can refute.

    python bench/gpu_model.py                      # Llama-3.1-8B's layer, 5 %: table, and what was measured beside it
    python bench/gpu_model.py --sizes 131072x1     # tokens x batch; --storage SQ8: of rows that are codes
    python bench/gpu_model.py --measured FOLDER    # of a session: its gpu_step.json, and constants from its environment.json
    python bench/gpu_model.py --recorded           # what is on record beside a measurement; needs no tools
    python bench/gpu_model.py --record             # writes tests/step_model.json again, which a test compares

For every launch: the cubin is disassembled (`gpu_sass.py`), the emulated device says how often each line runs at this size
(`gpu_coverage.py`), and one warp is followed through the blocks that run: stall cycles from the control codes, waits at
scoreboards for as long as `CONSTANTS` says of the class of instruction, barriers. A block's instructions come from the second
cache the first time (`cold_line`). Where all warps of a multiprocessor together need longer to be issued than one waits, that
counts. Loops that copy from memory last at least as long as the bytes take at the bandwidth of a bare read. Nothing here is
fitted to the time of a kernel; what each constant comes from stands beside it.

What it leaves out: blocks that wait for the slowest of them, bank conflicts, the TLB, and a memory that is not yet busy.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import gpu_harness as harness
from gpu_record import MEASURED, RECORD, constants_of, dumps, measured_step, record, recorded_table
from gpu_scene import Size
from gpu_steps import SIZES, model, size_name
from gpu_walk import DEVICES, Prediction
from saap_index.backends import STORAGE_CODES


def table(results: dict[str, list[Prediction]], measured: dict[str, tuple[float | None, dict[str, float]]]) -> str:
    head = ["tokens x batch, launch", "code", "cold", "jumps", "warp instr.", "barriers", "trips", "wait", "cycles"]
    head += [f"{x.name} us" for x in DEVICES] + ["bytes alone", "measured", "off"]
    rows = []
    for name, predictions in results.items():
        whole, kernels = measured[name]
        for x in predictions:
            barriers = "+".join(str(x.barriers.get(k, 0)) for k in ("block_barrier", "cluster_barrier"))
            cells = [f"{name}  {x.kernel}", str(x.code_bytes), str(x.cold_bytes), str(x.jumps), str(x.executed), barriers]
            cells += [str(sum(x.trips.values())), str(x.before), str(x.after), *(f"{x.us[d.name]:.1f}" for d in DEVICES)]
            cells += [f"{x.roofline[DEVICES[0].name]:.1f}"]
            rows.append([*cells, f"({kernels[x.kernel]:.1f})" if x.kernel in kernels else "-", ""])
        total = [sum(x.us[d.name] for x in predictions) for d in DEVICES]
        sums = (str(sum(getattr(x, of) for x in predictions)) for of in ("code_bytes", "cold_bytes", "jumps", "executed"))
        cells = [f"{name}  step", *sums]
        cells += ["", "", "", str(sum(x.after for x in predictions)), *(f"{x:.1f}" for x in total)]
        cells += [f"{sum(x.roofline[DEVICES[0].name] for x in predictions):.1f}"]
        rows.append([*cells, f"{whole:.1f}" if whole else "-", f"{total[0] / whole - 1:+.0%}" if whole else ""])
    return harness.rows(head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help="tokens x batch, such as 131072x1,131072x8")
    parser.add_argument("--storage", default="", choices=["", *STORAGE_CODES], help="code of the sealed rows")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="folder of a session on an H200")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--record", action="store_true", help="write tests/step_model.json again")
    parser.add_argument("--recorded", action="store_true", help="predictions from there; needs no compiler and no disassembler")
    options = parser.parse_args()
    if options.record:
        RECORD.write_text(dumps(record(json.loads(RECORD.read_text()) if RECORD.exists() else {})))
        return 0
    if options.recorded:
        print(recorded_table(options.measured))
        return 0
    sizes = [tuple(map(int, x.split("x"))) for x in options.sizes.split(",")] if options.sizes else SIZES
    constants = constants_of(options.measured)
    results, measured = {}, {}
    for tokens, batch in sizes:
        size, name = Size(tokens, batch, storage=options.storage), size_name(tokens, batch, options.storage)
        results[name], measured[name] = model(size, constants), measured_step(options.measured, size)
        print(f"{name}: counted", file=sys.stderr, flush=True)
    tables = {"constants": constants, "steps": {name: [asdict(x) for x in of] for name, of in results.items()}}
    harness.save(options.out, "gpu_model", tables, table(results, measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
