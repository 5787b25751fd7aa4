"""CORM: a step number per token says as much as a ring of bit masks; a prompt's last queries are seen; a budget is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from saap_index.errors import LengthError, ParameterError
from saap_lab import quality, replace
from saap_lab.corm import Corm
from saap_lab.method import Cache, Layer, attend_over
from saap_lab.yardsticks import Dense

LAYER = Layer(0, 2, 3, 16, 24, 0.25, None)


def sequence(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, 16, generator=g), torch.randn(2, n, 24, generator=g), 4 * torch.randn(2, 3, n, 16, generator=g)


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.integers(1, 60), steps=st.integers(1, 30), w=st.integers(1, 20), seen=st.integers(0, 25), seed=st.integers(0, 99)
)
def test_counters_equal_a_ring_of_bits(prompt: int, steps: int, w: int, seen: int, seed: int) -> None:
    """The paper's form: of each of the last w queries one bit per token, a token is dropped when all of its bits are minor."""
    keys, values, queries = sequence(prompt + steps, seed)
    state = Corm(w).start(LAYER, prompt)
    state.append(keys[:, :prompt], values[:, :prompt])
    positions = torch.arange(max(0, prompt - min(seen, w)), prompt)
    state.observe(queries[:, :, positions], positions)
    ring: list[torch.Tensor] = [torch.ones(2, prompt, dtype=torch.bool)] * w  # nothing is known to be minor yet
    live = torch.ones(2, prompt, dtype=torch.bool)

    def look(position: int) -> None:
        t = position + 1
        logits = (queries[:, :, position] @ keys[:, :t].mT * 0.25).masked_fill(~live[:, None, :t], -torch.inf)
        bits = torch.zeros_like(live)
        bits[:, :t] = (logits.softmax(-1) >= 1 / t).any(1)
        ring.append(bits)
        ring.pop(0)

    def drop() -> torch.Tensor:
        recent = torch.arange(live.shape[1]) >= live.shape[1] - w
        return live & (torch.stack(ring).any(0) | recent)

    for position in positions.tolist():
        look(position)
    if len(positions):
        live = drop()
    for position in range(prompt, prompt + steps):
        state.append(keys[:, position : position + 1], values[:, position : position + 1])
        live = torch.cat([live, torch.ones(2, 1, dtype=torch.bool)], 1)
        ring[:] = [torch.cat([bits, torch.ones(2, 1, dtype=torch.bool)], 1) for bits in ring]  # a new token is not minor yet
        found = state.attend(queries[:, :, position])
        assert torch.equal(found.chosen, live)
        assert found.kv_bytes == float(live.sum()) * 80 and found.other_bytes == float(live.sum()) * 2
        look(position)
        live = drop()


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 150), share=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_a_budget_is_kept_and_nothing_returns(n: int, share: float, seed: int) -> None:
    keys, values, queries = sequence(n + 4, seed)
    state = Corm(10, share, sinks=2).start(LAYER, n)
    state.append(keys[:, :n], values[:, :n])
    state.observe(queries[:, :, max(0, n - 10) : n], torch.arange(max(0, n - 10), n))
    before = None
    for i in range(n, n + 4):
        state.append(keys[:, i : i + 1], values[:, i : i + 1])
        found = state.attend(queries[:, :, i]).chosen
        assert (found.sum(1) <= min(i, 12) + 2 + round(share * max(0, i - 12))).all()
        assert before is None or not (found[:, :-1] & ~before).any()
        before = found


def test_nothing_is_dropped_before_w_queries_were_seen() -> None:
    keys, values, queries = sequence(90, 3)
    state, cache = Corm(1000).start(LAYER, 90), Cache(LAYER, 90)
    for x in (state, cache):
        x.append(keys, values)
    found = state.attend(queries[:, :, -1])
    torch.testing.assert_close(found.out, attend_over(cache, queries[:, :, -1], None))
    assert found.tokens == 90


def test_a_prompts_last_queries_are_shown() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.3,  # attention of a model that was not trained is even otherwise
    )
    model, tokens = LlamaForCausalLM(config).eval(), torch.randint(0, 99, (120,)).tolist()
    prompt = replace.read_prompt(model, tokens, None, torch.arange(80, 120, 8), 6, 60)
    every = replace.read_prompt(model, tokens, None, torch.arange(60, 120)).queries
    assert all(torch.equal(a, b) for a, b in zip(prompt.recent, every, strict=True))
    method = Corm(20)
    states = replace.start({0: method, 1: Dense()}, prompt, 114, 6)
    assert states[0].steps == 20 and int((~states[0].live).sum()) > 0
    logits, traffic = replace.decode(model, states, tokens[114:], 114)
    assert logits.shape == (6, 99) and traffic.per_layer[0] < traffic.per_layer[1] == 114 + 3.5
    found = quality.layer_quality(method, prompt, 0, 2, 16)
    assert found.tokens < 100 and 0 < found.error < 1


def test_bad_input_is_named() -> None:
    with pytest.raises(ParameterError, match="w: expected"):
        Corm(0)
    with pytest.raises(ParameterError, match="share"):
        Corm(4, 0.0)
    with pytest.raises(LengthError, match="positions"):
        Corm(4).start(LAYER, 1).observe(torch.zeros(2, 3, 1, 16), torch.tensor([0]))
