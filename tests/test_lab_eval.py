"""`saap eval` on a tiny model: steps at once are steps one by one, what is recorded, resuming, refusals, the reports."""

from __future__ import annotations

import pytest
import torch

from saap_index.lab.method import Layer
from saap_index.lab.steps import replay
from saap_index.lab.yardsticks import Dense, Selected, TopK


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("name", ["dense", "topk", "topk_group", "recent", "random", "ivf", "quest"])
def test_steps_at_once_are_steps_one_by_one(name: str, share: float) -> None:
    layer, g = Layer(0, 2, 3, 16, 8, 0.25, None), torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 400, 16, generator=g), torch.randn(2, 400, 8, generator=g)
    queries, at = torch.randn(2, 3, 40, 16, generator=g), torch.arange(0, 80, 2)
    special = {"dense": Dense(), "topk": TopK(share, 2, 32)}
    method = special.get(name) or Selected(name, share, 2, 32)
    found = []
    for together in (True, False):
        state = method.start(layer, 400)
        state.append(keys[:, :300], values[:, :300])
        found.append(replay(state, keys[:, 300:], values[:, 300:], queries, at, together))
        assert state.cache.length == 400
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.out, b.out, atol=1e-5, rtol=1e-5)
        assert torch.equal(a.chosen, b.chosen)
        assert (a.tokens, a.kv_bytes, a.other_bytes) == pytest.approx((b.tokens, b.kv_bytes, b.other_bytes))
