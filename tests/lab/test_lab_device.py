"""Methods and measures compute where the layer is and take the model's dtype: on a device that is not there, and in bfloat16."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from elsewhere import DEVICE, Elsewhere
from torch import Tensor

from saap_index import Rope
from saap_lab.corm import Corm
from saap_lab.eigen import Eigen
from saap_lab.loki import Loki
from saap_lab.method import Layer, Method
from saap_lab.quality import LayerQuality, layer_quality
from saap_lab.replace import Prompt, Untouched
from saap_lab.scfa import ScfaDrop, ScfaHash
from saap_lab.selections import SELECTIONS
from saap_lab.spans import Moa, SpanPlan
from saap_lab.sparsek import SparseK
from saap_lab.yardsticks import Dense, Selected, TopK, WeightedTopK

LAYER = Layer(0, 2, 3, 16, 24, 0.25, Rope(16))
OUTSIDE: dict[str, Any] = {"sinks": 2, "window": 16}
METHODS: dict[str, Callable[[], Method]] = {
    "dense": Dense, "topk": lambda: TopK(0.2, **OUTSIDE), "weighted": lambda: WeightedTopK(0.2, **OUTSIDE),
    "loki": lambda: Loki(0.2, 4, **OUTSIDE), "eigen": lambda: Eigen(8, 8),
    "scfa-centred": lambda: ScfaHash(4, True, **OUTSIDE), "scfa-drop": lambda: ScfaDrop(0.5, 0.5), "corm": lambda: Corm(16, 0.2),
    "sparsek": lambda: SparseK(0.2, **OUTSIDE), "moa": lambda: Moa(SpanPlan.uniform(1, 6, 0.3)),
    **{name: lambda name=name: Selected(name, 0.2, **OUTSIDE) for name in SELECTIONS},
}


def prompt_of(layer: Layer) -> Prompt:
    """80 tokens of one layer, numbers that bfloat16 holds exactly."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> tuple[Tensor]:
        numbers = torch.randn(shape, generator=g, dtype=torch.float32, device="cpu").bfloat16()
        return (numbers.to(layer.device, layer.dtype),)

    positions = torch.arange(60, 80, 4, dtype=torch.int64, device="cpu")
    nothing = torch.empty((0, 0), dtype=torch.float32, device="cpu")
    keys, values, queries, recent = draw(2, 80, 16), draw(2, 80, 24), draw(2, 3, 5, 16), draw(2, 3, 40, 16)
    tokens = torch.zeros(80, dtype=torch.int64, device="cpu")
    return Prompt(tokens, positions, nothing, (layer,), keys, values, queries, recent)


def measured(name: str, layer: Layer, together: bool) -> LayerQuality:
    prompt, method = prompt_of(layer), METHODS[name]()
    method.calibrate(layer, [prompt.keys[0].float()], [prompt.values[0].float()], [prompt.queries[0].float()])
    return layer_quality(method, prompt, 0, 2, 16, together=together)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_computes_where_the_layer_is(name: str) -> None:
    want, there = measured(name, LAYER, True), dataclasses.replace(LAYER, device=DEVICE)
    with Elsewhere():
        for together in (True, False):
            got = measured(name, there, together)
            for field in dataclasses.fields(want):
                torch.testing.assert_close(
                    getattr(got, field.name), getattr(want, field.name), rtol=1e-4, atol=1e-5, equal_nan=True
                )


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_keys_and_values_in_the_dtype_of_the_model(name: str) -> None:
    """Whose numbers float32 holds exactly."""
    got, want = (measured(name, dataclasses.replace(LAYER, dtype=x), True) for x in (torch.bfloat16, torch.float32))
    for field in dataclasses.fields(want):
        torch.testing.assert_close(getattr(got, field.name), getattr(want, field.name), rtol=0, atol=0, equal_nan=True)


def test_a_layer_that_is_left_alone_stays_where_it_is() -> None:
    out = []
    for layer in (LAYER, dataclasses.replace(LAYER, device=DEVICE)):
        with Elsewhere():
            prompt, state = prompt_of(layer), Untouched(layer, 80)
            state.append(prompt.keys[0], prompt.values[0])
            out.append(state.attend(prompt.queries[0].float(), 30).cpu())
    torch.testing.assert_close(out[1], out[0], rtol=1e-5, atol=1e-6)


def test_the_device_is_one_that_tells() -> None:
    """What the other tests rely on."""
    with Elsewhere():
        layer = dataclasses.replace(LAYER, device=DEVICE)
        prompt, state = prompt_of(layer), Dense().start(layer, 80)
        state.append(prompt.keys[0], prompt.values[0])
        with pytest.raises(RuntimeError, match="one device"):
            state.attend(torch.ones(2, 3, 16, dtype=torch.float32, device="cpu"))
