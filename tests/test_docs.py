"""Examples in the README and in docstrings run as printed."""

import doctest
from pathlib import Path

import pytest
import torch

import saap_index.attend
import saap_index.index
import saap_index.rope

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", ["README.md", "docs/compare.md"])
def test_document(path: str) -> None:
    text = (ROOT / path).read_text().replace("```", "")  # a fence right after an expected result would be part of it
    test = doctest.DocTestParser().get_doctest(text, {}, path, path, 0)
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.tries and not runner.failures


@pytest.mark.parametrize("module", [saap_index.attend, saap_index.index, saap_index.rope])
def test_docstrings(module) -> None:
    names = {"torch": torch, **vars(saap_index)}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted and not result.failed
