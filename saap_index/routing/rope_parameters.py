"""Names, ranges and magnitudes of the parameters of a rotary embedding. Knows no embedding."""

from __future__ import annotations

import math

import numpy as np

from ..errors import ParameterError

# What each scaling needs, and what it may have; any other parameter given with it is an error.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position"),
    "yarn": ("factor", "original_max_position"),
    "llama3": ("factor", "original_max_position", "low_freq_factor", "high_freq_factor"),
    "longrope": ("original_max_position", "attention_factor", "short_factor", "long_factor"),
}


_OPTIONAL: dict[str, tuple[str, ...]] = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "truncate")}


_PARAMETERS = (
    "factor", "original_max_position", "attention_factor", "beta_fast", "beta_slow", "truncate", "low_freq_factor",
    "high_freq_factor", "short_factor", "long_factor",
)


_POSITIVE = ("factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")


def _integer(value: object, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or int(value) < least:
        raise ParameterError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return int(value)


def _positive(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating) or not 0 < value < math.inf:
        raise ParameterError(f"{name}: expected a positive finite number, got {value!r}")
    return float(value)


def _boolean(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise ParameterError(f"{name}: expected a boolean, got {value!r}")
    return value


def _number(value: float | None) -> float:
    """A parameter that the constructor made sure of."""
    assert value is not None
    return value


def _yarn_magnitude(factor: float, weight: float) -> float:
    """arXiv 2309.00071, equation 22: 0.1 ln(factor) + 1, the logarithm weighted as DeepSeek does."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope_magnitude(factor: float, original: int) -> float:
    """arXiv 2402.13753, section 3.3: sqrt(1 + ln(factor) / ln(original length))."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
