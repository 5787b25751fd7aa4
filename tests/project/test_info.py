"""`saap info` says what a report of a fault needs, with transformers or without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saap_index import cli
from saap_index.version import __version__


def test_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path))
    (tmp_path / "routers" / "llama-0").mkdir(parents=True)
    (tmp_path / "routers" / "llama-0" / "config.json").write_text("{}")
    assert cli.main(["info"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    told = {name.strip(): value.strip() for name, value in lines.items()}
    assert told["saap_index"] == __version__ and told["torch"] == torch.__version__
    assert told["cache folder"].startswith(str(tmp_path)) and told["kept routers"] == "llama-0"
    assert told["shipped routers"] == "SmolLM2-135M-Instruct"
    assert {"instruction set", "GPU", "backend of cpu", "transformers", "faiss-cpu"} <= told.keys()


def test_a_cache_folder_that_is_not_there(tmp_path: Path) -> None:
    """And no transformers: nothing of it is imported."""
    code = "import sys; from saap_index import info; print(*info.report(), sep='\\n'); assert 'transformers' not in sys.modules"
    where = {**os.environ, "SAAP_CACHE": str(tmp_path / "absent"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=where, check=True)
    assert "(0.0 MB)" in done.stdout and not (tmp_path / "absent").exists()
