"""Examples in documents and in docstrings run as printed, links lead somewhere, and what is generated is as generated."""

import ast
import configparser
import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nanobind.stubgen import StubGen

import overview
import saap_index.index
import saap_index.routing.rope
import saap_index.search.states
from saap_index import _cpu

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", ["README.md", "docs/backends.md", "docs/compare.md", "docs/faiss_users.md"])
def test_document(path: str) -> None:
    text = (ROOT / path).read_text().replace("```", "")  # a fence right after an expected result would be part of it
    test = doctest.DocTestParser().get_doctest(text, {}, path, path, 0)
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.tries and not runner.failures


@pytest.mark.parametrize("module", [saap_index.search.states, saap_index.index, saap_index.routing.rope])
def test_docstrings(module) -> None:
    names = {"torch": torch, **vars(saap_index)}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted and not result.failed


DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "bench" / "results" / "README.md"])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path: Path) -> None:
    """To files of the repository, and to headings in them."""
    for target, heading in re.findall(r"\]\((?!\w+://)([^)#\s]*)#?([^)\s]*)\)", path.read_text()):
        there = path.parent / target if target else path
        assert there.exists(), f"{target} is not there"
        if heading:
            lines = (line.lstrip("# ").lower() for line in there.read_text().splitlines() if line.startswith("#"))
            anchors = {re.sub(r"[^\w -]", "", line).replace(" ", "-") for line in lines}
            assert heading in anchors, f"no heading {heading} in {there}"


def test_the_picture_is_that_of_the_results() -> None:
    drawn = overview.draw(overview.steps(), overview.captured())
    assert overview.PICTURE.read_text() == drawn, "python bench/overview.py draws it anew"


def test_the_version_stands_in_one_place() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["version"] == "attr: saap_index.version.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", saap_index.__version__)
    assert f"## [{saap_index.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_stubs_are_those_of_the_compiled_module() -> None:
    generator = StubGen(_cpu)
    generator.put(_cpu)
    written = (ROOT / "saap_index" / "_cpu.pyi").read_text()
    assert ast.dump(ast.parse(written)) == ast.dump(ast.parse(generator.get())), "make stubs writes them anew"


def test_the_reference_is_built_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "docs" / "reference.py"), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bench"), *sys.path])}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "saap_index.html").read_text()
    assert all(f'id="{name}"' in page for name in (*saap_index.__all__, "AsymmetricIndex.search_attend"))


def test_make_help_says_how_long_each_command_takes() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony
    times = r"at once|minutes|[<>~]? ?\d+(-\d+)? (s|min|h)"
    said = re.findall(rf"^([a-z-]+):.*## (?:{times}) \| \S", text, re.MULTILINE)
    assert sorted(name for name, *_ in said) == sorted(phony[1].split())
