"""Profiles of hypothesis, and what every test shares."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its spinning threads would slow everything beside them
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from suite_guard import pytest_configure

__all__ = ["pytest_configure"]

import saap_index.crossover

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.register_profile("explore", parent=settings.get_profile("ci"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _break_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `attach` measures on a machine is one number here, and nothing is timed."""
    found = saap_index.crossover.Crossover(2048, ())
    monkeypatch.setattr(saap_index.crossover, "measured", lambda key, times: found)
