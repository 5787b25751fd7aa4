"""Numbers that Python and compiled code agree on stand in backends/codes.py, and in the sources as they do there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from saap_index import reference
from saap_index.backends import codes

ROOT = Path(__file__).parents[2]
NAMES = {
    "kLength": codes.LENGTH, "kNumSegments": codes.SEGMENTS, "kNextPosition": codes.NEXT, "kMeans": codes.MEANS,
    "kErrors": codes.FLAGS, "kMetaWords": codes.META, "kNotFinite": codes.NOT_FINITE, "kFull": codes.FULL,
    "kF32": codes.DTYPE_CODES[torch.float32], "kBF16": codes.DTYPE_CODES[torch.bfloat16],
    "kF16": codes.DTYPE_CODES[torch.float16],
}
"""Constants of the kernels."""


def constants(text: str) -> list[tuple[str, int]]:
    """Every constant of that name, and what it is."""
    names = "|".join(NAMES)
    lines = re.findall(r"^constexpr int ([^;]*);", text, re.MULTILINE)
    return [(name, int(value)) for line in lines for name, value in re.findall(rf"\b({names}) = (\d+)", line)]


@pytest.mark.parametrize("path", sorted((ROOT / "cuda").glob("*.cu*")), ids=lambda path: path.name)
def test_kernels_have_the_same_numbers(path: Path) -> None:
    assert all(NAMES[name] == value for name, value in constants(path.read_text()))


def test_every_number_is_compared() -> None:
    files = [path.read_text() for path in (ROOT / "cuda").glob("*.cu*")]
    assert {name for text in files for name, _ in constants(text)} == set(NAMES)


def test_dtypes_of_the_bindings() -> None:
    text = (ROOT / "bindings" / "dtypes.h").read_text()
    members = text[text.index("enum class DType") :].split("}")[0]
    values = {name: int(value) for name, value in re.findall(r"(\w+) = (\d)", members)}
    assert values.pop("u8") == codes.BYTES_CODE
    names = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    assert {names[name]: value for name, value in values.items()} == codes.DTYPE_CODES


def test_scan_reads_the_first_columns_as_one_vector() -> None:
    assert (codes.LENGTH, codes.SINKS, codes.SEALED) == (0, 1, 2)
    text = (ROOT / "cuda" / "scan_walk.cuh").read_text()
    assert all(x in text for x in ("int length = clamp(meta.x", "sinks = clamp(meta.y", "sealed = clamp(meta.z"))
    assert f"p.inverse_heads)) * {codes.META})" in text


def test_samples_are_those_of_the_specification() -> None:
    text = (ROOT / "cuda" / "route_select.cu").read_text()
    table = text[text.index("kPowers[32] = {") :].split("{")[1].split("}")[0]
    assert [int(x) for x in re.findall(r"\d+", table)] == reference.POWERS
    bits = reference.ONE.bit_length() - 1
    assert f"kOne = 1u << {bits}, kSampleOffset = {reference.BIN_OFFSET:#x};" in text
    assert f"kSampleShift = {reference.BIN_SHIFT}, kMostSteps = 32 * {bits + 1};" in text
