"""MoA's profile: influences against masking by brute force, block sums against entries, plans against enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from saap_index.errors import LengthError, ParameterError
from saap_lab import moa_profile, replace
from saap_lab.moa_profile import Profile, entry_influence, influence, rule_losses, spread_rules, usable_rules
from saap_lab.spans import SpanPlan

N = 40


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.3,
    )
    found = LlamaForCausalLM(config).eval()
    norm = torch.nn.RMSNorm(32, 1e-6)  # the model's own computes in float32 always, too coarse for finite differences
    found.model.norm = norm
    for layer in found.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = norm
    return found.double()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 50, (N,), generator=torch.Generator().manual_seed(1)).tolist()


def by_layer(model, tokens) -> dict[int, moa_profile.Saved]:
    return {saved.layer.number: saved for saved in moa_profile.gradients(model, tokens)}


def loss_with(model, tokens, layer: int, head: int, row: int, column: int, amount: float) -> float:
    """The loss when the attention output of one row of one head is moved by ``amount`` towards that without one entry."""

    def attend(module, query, key, value, mask, options):
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        logits = query @ key.mT * options["scaling"]
        logits = logits.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf)
        out = logits.softmax(-1) @ value
        if module.layer_idx == layer:
            less = logits[0, head, row].clone()
            less[column] = -torch.inf
            moved = less.softmax(-1).nan_to_num(0.0) @ value[0, head]
            out[0, head, row] += amount * (moved - out[0, head, row])
        return out.transpose(1, 2)

    ids = torch.tensor([tokens])
    with torch.no_grad(), replace._serving(model, attend):
        return float(functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]))


@pytest.mark.parametrize("layer, head, row, column", [(0, 0, 9, 3), (0, 3, 39, 39), (1, 1, 20, 0), (1, 2, 0, 0), (0, 2, 1, 1)])
def test_influence_is_what_masking_an_entry_changes(model, tokens, layer, head, row, column) -> None:
    saved = by_layer(model, tokens)[layer]
    found = float(entry_influence(saved, row, row + 1).flatten(0, 1)[head, 0, column])
    step = 1e-4
    up, down = (loss_with(model, tokens, layer, head, row, column, x) for x in (step, -step))
    want = (up - down) / (2 * step)
    # the last row of the last layer predicts nothing, and so has no influence
    assert found == pytest.approx(want, rel=1e-4, abs=1e-10)


def test_gradients_leave_the_model_alone_and_frozen_weights_serve(model, tokens) -> None:
    want = by_layer(model, tokens)
    assert list(want) == [1, 0] and all(p.grad is None for p in model.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers) and torch.is_grad_enabled()
    model.requires_grad_(False)
    found = by_layer(model, tokens)
    model.requires_grad_(True)
    for a, b in zip(found.values(), want.values(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with pytest.raises(LengthError, match="first"):
        moa_profile.gradients(model, tokens, N - 1)


def test_layer_by_layer_equals_one_pass_back(model, tokens) -> None:
    """dL/dO and what it belongs to, against autograd over the whole model at once."""
    seen: dict[int, torch.Tensor] = {}

    def attend(module, query, key, value, mask, options):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        seen[module.layer_idx] = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
        return seen[module.layer_idx]

    ids = torch.tensor([tokens])
    with replace._serving(model, attend):
        loss = functional.cross_entropy(model(ids).logits[0, 8:-1], ids[0, 9:])
    want = torch.autograd.grad(loss, [seen[0], seen[1]])
    for saved in moa_profile.gradients(model, tokens, 8):
        found = saved.grad.flatten(0, 1).transpose(0, 1)[None]
        torch.testing.assert_close(found, want[saved.layer.number], rtol=1e-6, atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(block=st.integers(1, 50))
def test_blocks_are_sums_of_entries(model, tokens, block: int) -> None:
    saved = by_layer(model, tokens)[0]
    entries = entry_influence(saved, 0, N).abs().flatten(0, 1)
    found = influence(saved, block)
    blocks = -(-N // block)
    want = torch.zeros(4, blocks, blocks, dtype=torch.float64)
    for i, j in itertools.product(range(blocks), range(blocks)):
        rows, cols = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
        want[:, i, j] = entries[:, rows, cols].sum((1, 2))
    torch.testing.assert_close(found, want)


def test_a_rule_costs_what_its_span_leaves_out() -> None:
    importance = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)).tril()
    rules = [(0.0, 1.0), (0.0, 0.25), (128.0, 0.0)]
    found = rule_losses(importance, rules, 1024)
    assert (found[:, 0] == 0).all() and (found[:, 2] > found[:, 1]).all()
    kept = 256 // 64  # the first block and the three newest
    want = sum(importance[:, i, j] for i in range(16) for j in range(1, i + 1) if j <= i - (kept - 1))
    torch.testing.assert_close(found[:, 1], want)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), target=st.floats(0.1, 1), distinct=st.sampled_from([1, 2, None]))
def test_plans_keep_their_bounds_and_are_hardly_beaten(seed: int, target: float, distinct: int | None) -> None:
    layers, heads, densities = 2, 2, torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    losses = torch.rand(layers, heads, 3, generator=torch.Generator().manual_seed(seed)).sort(-1, descending=True).values
    found = spread_rules(losses, densities, target, distinct)
    assert float(densities[found].mean()) <= target + 1e-6
    assert distinct is None or all(len(row.unique()) <= distinct for row in found)
    best = min(
        float(sum(losses[i // heads, i % heads, r] for i, r in enumerate(rules)))
        for rules in itertools.product(range(3), repeat=layers * heads)
        if float(densities[list(rules)].mean()) <= target + 1e-6
        and (distinct is None or all(len(set(rules[i * heads : (i + 1) * heads])) <= distinct for i in range(layers)))
    )
    worst_layer = float((losses[:, :, 0] - losses[:, :, -1]).sum(1).max())  # what one layer's choice can cost
    assert best - 1e-5 <= float(losses.gather(2, found[:, :, None]).sum()) <= best + worst_layer + 1e-5


@pytest.mark.parametrize("heads", range(1, 12))
def test_the_density_of_the_sparsest_rule(heads: int) -> None:
    """The mean of some numbers 0.1 rounds to more than 0.1: no price is too high for that."""
    losses = torch.tensor([1.0, 0.0]).expand(1, heads, 2)
    assert not spread_rules(losses, torch.tensor([0.1, 1.0], dtype=torch.float64), 0.1, None).any()


def test_heads_that_change_at_one_price() -> None:
    """All layers alike: the price that moves one moves all of them, and yet half of them may be dense."""
    losses = torch.tensor([1.0, 0.0]).expand(6, 2, 2)
    found = spread_rules(losses, torch.tensor([0.0, 1.0]), 0.5)
    assert found.sum() == 6 and (found[:, 0] == found[:, 1]).all()


def test_a_models_plan(model, tokens) -> None:
    rules = usable_rules([512], alphas=[0.0, 64.0], betas=[0.25, 0.5, 0.75])
    long = (tokens * 13)[:512]
    lines: list[str] = []
    found = moa_profile.profile(model, [long], rules, progress=lines.append)
    assert found.losses.shape == (2, 4, len(rules)) and lines == ["moa: profiled 1 of 1 sequences"]
    plan = found.plan(0.5)
    spans = [[plan.span(x, i, 512) for i in range(4)] for x in range(2)]
    assert sum(map(sum, spans)) <= 0.5 * 512 * 8 and all(row[0] == row[1] and row[2] == row[3] for row in spans)
    assert isinstance(found.plan(0.5, None, per_group=False), SpanPlan)
    with pytest.raises(ParameterError, match="density"):
        Profile(found.rules, found.lengths, found.losses, 2).plan(0.01)
    with pytest.raises(ParameterError, match="distinct"):
        spread_rules(found.losses, torch.ones(len(rules)), 1.0, 3)
    with pytest.raises(ParameterError, match="sequences"):
        moa_profile.profile(model, [])
