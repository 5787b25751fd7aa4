"""What decides the result of `saap train`, beside model and texts."""

from __future__ import annotations

from dataclasses import dataclass

from .. import checks
from ..errors import ParameterError
from ..invlists.layout import Layout
from ..training.config import ROUTERS
from . import capture

PARTITIONS = ("per-prompt", "pre-rope", "post-rope")
"""Where lists come from: k-means over each prompt, or once over the training texts, of keys with RoPE undone or as they are."""


BREAK_EVEN = Layout().break_even
"""Shorter sequences are never sealed, so a shorter context has nothing to measure on."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What decides the result, beside model and texts. tokens : to train on; context : tokens of a sequence; held_out : sequences
    beyond those, to measure and calibrate on; queries : sampled per sequence; layers : numbers, None for all that can be indexed.
    """

    router: str = "two-tower"
    partition: str = "per-prompt"
    nlist: int = 256
    tokens: int = 200_000
    context: int = 8192
    held_out: int = 4
    queries: int = capture.TRAINING_QUERIES
    layers: tuple[int, ...] | None = None
    window: int = 128
    sinks: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("router", ROUTERS), ("partition", PARTITIONS)):
            if getattr(self, name) not in allowed:
                raise ParameterError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.partition == "per-prompt" and self.router not in ("two-tower", "kmeans"):
            raise ParameterError(
                f"partition: expected pre-rope or post-rope for router {self.router!r}, bound to its lists, got per-prompt"
            )
        for name, least in (("nlist", 1), ("held_out", 1), ("queries", 1), ("window", 1), ("sinks", 0), ("seed", 0)):
            checks.integer(getattr(self, name), name, least)
        checks.integer(self.context, "context", self.window + self.sinks + 16)
        checks.integer(self.tokens, "tokens", self.context)
        trained = self.tokens // self.context * self.context
        if self.nlist > trained:
            raise ParameterError(f"nlist: expected at most a list for each of the {trained} tokens to train on, got {self.nlist}")

    @property
    def sequences(self) -> int:
        """All, those held out included."""
        return self.tokens // self.context + self.held_out

    @property
    def held_out_numbers(self) -> tuple[int, ...]:
        """Spread evenly, so that they are of as many kinds of text as there are."""
        every = self.sequences
        return tuple((2 * i + 1) * every // (2 * self.held_out) for i in range(self.held_out))

    @property
    def layout(self) -> Layout:
        """As an index has it, but that short training contexts are sealed too."""
        return Layout(sinks=self.sinks, window=self.window, break_even=min(BREAK_EVEN, self.context // 2))
