"""How often each line of a kernel is executed: the emulated device (tests/emu), built with gcov's counters.

Without optimisation, so that a line is counted where it stands; counts are of all threads of a launch together.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from emu import runtime as emu

import gpu_harness  # noqa: F401  (puts tests on the path)

FLAGS = [x for x in emu.FLAGS if not x.startswith("-O")] + ["-O0", "--coverage", "-fprofile-update=single"]
DUMP = 'extern "C" void __gcov_dump(); extern "C" void __gcov_reset();\n'
DUMP += 'extern "C" void saap_lines_dump() { __gcov_dump(); }\nextern "C" void saap_lines_reset() { __gcov_reset(); }\n'

Lines = dict[tuple[str, int], int]
"""Executions by file and line; a line that is there and was never reached has 0."""


class CountingRuntime(emu.EmulatedRuntime):
    """An emulated device that counts lines. Its builds are of its own, in a folder that goes with it."""

    def __init__(self, multiprocessors: int) -> None:
        super().__init__(inflight=8)
        self.multiprocessors = multiprocessors
        self._folder = tempfile.TemporaryDirectory()
        self._built: dict[tuple[str, str, tuple[tuple[str, int], ...]], Path] = {}

    def kernel(self, file: str, name: str, macros: Mapping[str, int]) -> emu.EmulatedKernel:
        key = (file, name, tuple(sorted(macros.items())))
        if key not in self._kernels:
            folder = Path(self._folder.name) / str(len(self._built))
            folder.mkdir()
            self._built[key] = folder
            library = emu.Library(_build(folder, self.cuda / file, name, macros), None)
            self._kernels[key] = emu.EmulatedKernel(self, f"{file}: {name}", library)
        return self._kernels[key]

    def lines(self, file: str, name: str, macros: Mapping[str, int], launch: Callable[[], None]) -> Lines:
        """What ``launch``, of that kernel, executes."""
        key = (file, name, tuple(sorted(macros.items())))
        native, folder = self._kernels[key].library.native, self._built[key]
        native.saap_lines_reset()
        launch()
        native.saap_lines_dump()
        (data,) = folder.glob("*.gcda")
        run = ["gcov", "--json-format", "--stdout", data.name]
        done = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=True)
        data.unlink()
        executed: Counter[tuple[str, int]] = Counter()
        for line in done.stdout.splitlines():
            for of in json.loads(line)["files"] if line.startswith("{") else []:
                if Path(of["file"]).suffix in (".cu", ".cuh"):
                    for x in of["lines"]:  # once for each instance of a template
                        executed[Path(of["file"]).name, x["line_number"]] += x["count"]
        return dict(executed)


def _build(folder: Path, file: Path, name: str, macros: Mapping[str, int]) -> Path:
    machine = emu._compile("machine", [emu.EMULATOR / x for x in emu.MACHINE], ["-O3"], [], "")
    unit = "".join(f'#include "{x}"\n' for x in (emu.CUDA / "prims.cuh", file)) + f"EMU_EXPORT({name})\n{DUMP}"
    (folder / "kernel.cpp").write_text(unit)
    run = [emu.COMPILER, *FLAGS, *(f"-D{k}={v}" for k, v in sorted(macros.items()))]
    run += [f"-I{x}" for x in (file.parent, emu.EMULATOR)]
    run += ["kernel.cpp", str(machine), "-o", "kernel.so"]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise emu.EmulationError(f"{file.name}: {name} does not compile\n{done.stderr[:4000]}")
    return folder / "kernel.so"
