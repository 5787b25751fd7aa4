"""The package installs where there is no compiler, says so once, and carries its sources where there is one."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

WITHOUT_MODULE = """
import sys, warnings
sys.modules["saap_index._cpu"] = None
import torch, saap_index
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        index = saap_index.AsymmetricIndex(d=32, nlist=4, break_even=0)
        index.key_quantizer = saap_index.KeyQuantizer(torch.randn(1, 4, 32))
        index.query_router = saap_index.QueryRouter.symmetric(torch.randn(1, 4, 32))
        index.add(torch.randn(1, 1, 500, 32), torch.randn(1, 1, 500, 32))
        index.search_attend(torch.randn(1, 1, 1, 32))
messages = [str(w.message) for w in caught]
assert len(messages) == 1 and "saap_index._cpu" in messages[0] and "torch backend" in messages[0], messages
assert "backend='torch'" in repr(index)
"""


def test_without_the_module_torch_takes_over_and_says_so_once() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_MODULE], cwd=ROOT, check=True)


def test_without_a_compiler_the_build_succeeds(tmp_path: Path) -> None:
    env = {**os.environ, "CC": "no-such-compiler", "CXX": "no-such-compiler"}
    env.pop("SAAP_REQUIRE_NATIVE", None)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "o")]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    assert not list(tmp_path.glob("**/*.so"))


def test_source_distribution_is_complete(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    sources = {f"bindings/{p.name}" for p in (ROOT / "bindings").iterdir() if p.suffix in (".h", ".cpp")}
    sources |= {f"cuda/{p.name}" for p in (ROOT / "cuda").iterdir()}
    sources |= {str(p.relative_to(ROOT)) for p in (ROOT / "saap_index").glob("*.py")}
    sources |= {"saap_index/py.typed", "LICENSE", "setup.py"}
    assert sources <= names, sorted(sources - names)
    assert "cuda/__init__.py" not in names, "it would shadow NVIDIA's namespace package"
