"""Options of an index: one record, changed by making another."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

import saap_index as saap
from saap_index.errors import ParameterError
from saap_index.search.options import IndexOptions
from saap_index.search.params import SELECTIVITY, TARGET_CAP, SearchParametersIVF

PLAIN = IndexOptions(16, 24, 4, 6, 2, layout=saap.Layout(mean_run_tokens=8))


def params(**fields: Any) -> SearchParametersIVF:
    return SearchParametersIVF(**fields)


def test_the_constructor_fills_them() -> None:
    index = saap.AsymmetricIndex(16, 4, 6, 2, d_v=24, mean_run_tokens=8, max_codes=9)
    want = params(selectivity=SELECTIVITY, max_codes=9, tail=0.0)
    assert index.options == IndexOptions(16, 24, 4, 6, 2, torch.float32, PLAIN.layout, want)
    assert (index.d, index.d_v, index.nlist, index.num_heads, index.num_kv_heads, index.dtype) == (16, 24, 4, 6, 2, torch.float32)
    assert index.layout is index.options.layout


def test_they_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        PLAIN.d = 8  # type: ignore[misc]


@pytest.mark.parametrize("name, value, before, after", [
    ("nprobe", 3, params(selectivity=0.1, target_mass=0.9, tail=0.2, max_codes=7), params(nprobe=3, max_codes=7)),
    ("selectivity", 0.3, params(nprobe=3, max_codes=7), params(selectivity=0.3, max_codes=7)),
    ("selectivity", 0.3, params(selectivity=0.1, target_mass=0.9, tail=0.2),
     params(selectivity=0.3, target_mass=0.9, tail=0.2)),
    ("target_mass", 0.9, params(selectivity=0.1, tail=0.2), params(selectivity=TARGET_CAP, target_mass=0.9, tail=0.2)),
    ("target_mass", 0.9, params(nprobe=3), params(selectivity=TARGET_CAP, target_mass=0.9)),
    ("target_mass", 0.8, params(selectivity=0.1, target_mass=0.9), params(selectivity=0.1, target_mass=0.8)),
    ("target_mass", None, params(selectivity=0.1, target_mass=0.9), params(selectivity=0.1)),
    ("tail", 0.2, params(selectivity=0.1, max_codes=7), params(selectivity=0.1, max_codes=7, tail=0.2)),
    ("max_codes", 5, params(selectivity=0.1, tail=0.2), params(selectivity=0.1, tail=0.2, max_codes=5)),
])
def test_another_budget(name: str, value: Any, before: SearchParametersIVF, after: SearchParametersIVF) -> None:
    start = IndexOptions(16, 24, 4, 6, 2, layout=PLAIN.layout, params=before)
    other = start.changed(name, value)
    assert other.params == after and start.params == before
    assert other == IndexOptions(16, 24, 4, 6, 2, layout=PLAIN.layout, params=after)


def test_means_and_tail_belong_together() -> None:
    with pytest.raises(ParameterError, match=r"tail: expected an index with mean_run_tokens of 1 or more, got tail=0.2 and 0"):
        IndexOptions(16, 24, 4, 6, 2).changed("tail", 0.2)
    with pytest.raises(ParameterError, match=r"mean_run_tokens: expected at least 1 while tail is 0.2, got 0"):
        PLAIN.changed("tail", 0.2).changed("mean_run_tokens", 0)
    assert PLAIN.changed("mean_run_tokens", 0).layout == saap.Layout()


def test_a_tail_of_one_search_is_refused_once_there_are_no_means() -> None:
    with_tail = params(tail=0.2)
    assert PLAIN.merged(with_tail).tail == 0.2
    with pytest.raises(ParameterError, match="tail: expected an index with mean_run_tokens"):
        PLAIN.changed("mean_run_tokens", 0).merged(with_tail)


def test_merged_parameters_are_kept() -> None:
    first = PLAIN.merged(params(window=300))
    assert first == params(selectivity=SELECTIVITY, window=300) and PLAIN.merged(params(window=300)) is first
    for n in range(40):
        PLAIN.merged(params(max_codes=n))
    assert len(PLAIN._merged) <= 16


def test_what_a_search_needs_beyond_the_layout() -> None:
    assert not PLAIN.exceeded_by(params()) and not PLAIN.exceeded_by(params(window=128, sinks=4))
    assert PLAIN.exceeded_by(params(window=129)) and PLAIN.exceeded_by(params(sinks=5))
