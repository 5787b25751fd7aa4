"""Whether an installed package is whole, outside of any checkout and without a compiler: ``python tests/smoke.py``.

Needs what the extra ``cpu`` brings, nothing of the tests. `make wheel` runs it in a new environment, and so does cibuildwheel.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

import saap_index as saap
from saap_index.backends import native


def the_package() -> None:
    """Where it lies, and that what is no Python came with it."""
    folder = Path(saap.__file__).parent
    assert folder.is_relative_to(sysconfig.get_path("platlib")), f"expected an installed package, got {folder}"
    assert saap.__version__ == importlib.metadata.version("saap-index")
    for name in ("py.typed", "_cpu.pyi", "cuda/scan.cu", "cuda/softmax_state.cuh"):
        assert (folder / name).is_file(), f"{name} is not in the package"


def the_kernels() -> str:
    """The compiled module is used, not the torch backend in its place; returns the instruction set."""
    module = native.load()
    assert module is not None
    return str(module.isa())


def an_index() -> None:
    """Trained, filled by a prompt and by a token; with everything read it is softmax attention."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def random(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn((1, heads, tokens, 64), generator=generator, dtype=torch.float32, device="cpu")

    keys, values, queries = random(2, 4096), random(2, 4096), random(8, 256)
    index = saap.AsymmetricIndex(d=64, nlist=16, num_heads=8, num_kv_heads=2, rope=saap.Rope(head_dim=64))
    index.train(keys, queries)
    index.add(keys[:, :, :-1], values[:, :, :-1])
    index.add(keys[:, :, -1:], values[:, :, -1:])
    query = queries[:, :, -1:]
    some = index.search_attend(query)
    read = index.stats().last_search.selectivity
    assert some.shape == (1, 8, 1, 64) and bool(some.isfinite().all()) and 0 < read < 0.1, read
    everything = index.search_attend(query, params=saap.SearchParametersIVF(selectivity=1.0))
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), keys.double().repeat_interleave(4, 1), values.double().repeat_interleave(4, 1)
    )
    assert torch.allclose(everything.double(), exact, atol=1e-5), (everything - exact).abs().max()


def the_routers() -> int:
    """Those of SmolLM2-135M load, without transformers, and make indexes; returns for how many layers."""
    with importlib.resources.as_file(importlib.resources.files("saap_lab.smollm2")) as folder:
        routers = saap.from_pretrained(folder / "SmolLM2-135M-Instruct-routers")
    assert routers.index(14).is_trained
    return len(routers.layers)


def the_commands() -> None:
    """`saap` is there, names its commands, and the doctor finds this machine well."""
    scripts = Path(sysconfig.get_path("scripts"))
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "SAAP_CACHE": folder}
        for arguments in (["--version"], ["--help"], ["doctor"]):
            done = subprocess.run([scripts / "saap", *arguments], cwd=folder, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            if arguments == ["--help"]:
                assert all(name in done.stdout for name in ("train", "generate", "compare", "eval", "doctor")), done.stdout


def main() -> int:
    the_package()
    isa = the_kernels()
    an_index()
    layers = the_routers()
    the_commands()
    here = f"saap_index {saap.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}"
    print(f"{here}: kernels ({isa}), an index, routers of {layers} layers, saap and its doctor: well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
