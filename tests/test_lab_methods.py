"""The defining property of every method of the lab, and that its bytes are what was read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saap_index.errors import NotTrainedError, ParameterError
from saap_index.lab.loki import Loki, principal_basis
from saap_index.lab.method import Attended, Cache, Layer, Method, attend_over
from saap_index.lab.scfa import ScfaDrop, ScfaHash, hash_prefill
from saap_index.lab.yardsticks import TopK

LAYER = Layer(0, 2, 3, 16, 24, 0.25, None)


def cache(n: int, seed: int = 0) -> tuple[Cache, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    found = Cache(LAYER, n)
    found.append(torch.randn(2, n, 16, generator=g), torch.randn(2, n, 24, generator=g))
    return found, 2 * torch.randn(2, 3, 16, generator=g)


def run(method: Method, n: int, seed: int = 0, pieces: int = 1) -> Attended:
    tokens, queries = cache(n, seed)
    state = method.start(LAYER, n)
    for keys, values in zip(tokens.keys.chunk(pieces, 1), tokens.values.chunk(pieces, 1), strict=True):
        state.append(keys, values)
    return state.attend(queries)


def calibrated(method: Method) -> Method:
    tokens, queries = cache(300, 9)
    method.calibrate(LAYER, [tokens.keys], [tokens.values], [queries[:, :, None]])
    return method


UNLIMITED = {
    "loki": lambda: calibrated(Loki(1.0, 4)),
    "scfa-hash": lambda: ScfaHash(1),
    "scfa-drop": lambda: ScfaDrop(1.0),
}


@pytest.mark.parametrize("name", UNLIMITED)
def test_unlimited_is_dense(name: str) -> None:
    tokens, queries = cache(120)
    found = run(UNLIMITED[name](), 120)
    torch.testing.assert_close(found.out, attend_over(tokens, queries, None), rtol=1e-4, atol=1e-5)
    assert found.tokens == 120 and found.kv_bytes == 2 * 120 * 40 * 2


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 200), share=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_loki_at_full_rank_is_exact_topk(n: int, share: float, seed: int) -> None:
    options = {"sinks": 2, "window": 10}
    found = run(calibrated(Loki(share, 16, "head", **options)), n, seed)
    want = run(TopK(share, **options), n, seed)
    assert torch.equal(found.chosen, want.chosen)
    assert found.other_bytes == 2 * max(0, n - 10 - min(2, max(0, n - 10))) * 16 * 2


def test_loki_ranks_alike_whatever_the_mean_of_the_keys(n: int = 150) -> None:
    tokens, queries = cache(n)
    basis = principal_basis([tokens.keys])
    torch.testing.assert_close(basis.transpose(1, 2) @ basis, torch.eye(16).expand(2, -1, -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        principal_basis([tokens.keys[:, :70], tokens.keys[:, 70:]]).abs(), basis.abs(), rtol=1e-3, atol=1e-4
    )
    q, shift = queries @ basis[:, :, :4], tokens.keys.mean(1, keepdim=True)
    plain, moved = q @ (tokens.keys @ basis[:, :, :4]).mT, q @ ((tokens.keys - shift) @ basis[:, :, :4]).mT
    torch.testing.assert_close(plain - plain.mean(-1, keepdim=True), moved - moved.mean(-1, keepdim=True), rtol=1e-4, atol=1e-4)


def test_loki_per_group_reads_a_token_once() -> None:
    shares = {s: run(calibrated(Loki(0.1, 4, s, 2, 10)), 200) for s in ("head", "group")}
    assert shares["group"].tokens == 12 + round(0.1 * 188) < shares["head"].tokens


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 90), buckets=st.sampled_from([1, 2, 4, 16]), strict=st.booleans(), seed=st.integers(0, 99))
def test_scfa_sorted_pass_equals_its_mask(n: int, buckets: int, strict: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, x, generator=g, dtype=torch.float64) for x in (16, 16, 24))
    method = ScfaHash(buckets, seed=seed)
    one = Layer(0, 1, 1, 16, 24, 0.25, None)
    q_codes, k_codes = method.hash(one, q[None].float(), True)[0], method.hash(one, k[None].float(), False)[0]
    mask = (q_codes[:, None] == k_codes) & torch.ones(n, n, dtype=torch.bool).tril(-1 if strict else 0)
    want = (q @ k.T * 0.25).masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0) @ v
    torch.testing.assert_close(hash_prefill(q, k, v, q_codes, k_codes, 0.25, strict), want)


def test_scfa_codes_do_not_depend_on_how_tokens_came() -> None:
    method = ScfaHash(8, sinks=0, window=0)
    at_once, in_pieces = run(method, 96), run(method, 96, pieces=7)
    torch.testing.assert_close(at_once.out, in_pieces.out)
    assert torch.equal(at_once.chosen, in_pieces.chosen) and at_once.tokens < 96
    assert at_once.kv_bytes == pytest.approx(float(at_once.chosen.any(1).sum()) * 40 * 2)


def test_scfa_centring_moves_the_two_clouds_together() -> None:
    """Keys and queries in opposite cones never share a bucket; centred, they do: the premise of an asymmetric partition."""
    tokens, queries = cache(400)
    tokens.keys.add_(5.0)
    plain, centred = (ScfaHash(16, c, sinks=0, window=0) for c in (False, True))
    read = []
    for method in (plain, centred):
        method.calibrate(LAYER, [tokens.keys], [tokens.values], [queries[:, :, None] - 5.0])
        state = method.start(LAYER, 400)
        state.append(tokens.keys, tokens.values)
        read.append(state.attend(queries - 5.0).tokens)
    assert read[0] < read[1]


def test_scfa_drop_draws_once_per_token() -> None:
    at_once, in_pieces = run(ScfaDrop(0.3), 200), run(ScfaDrop(0.3), 200, pieces=9)
    assert torch.equal(at_once.chosen, in_pieces.chosen) and 30 < at_once.tokens < 90
    assert run(ScfaDrop(1.0, 1e-9), 50).out.abs().max() == 0  # every head silent


def test_bad_input_is_named() -> None:
    with pytest.raises(ParameterError, match="buckets"):
        ScfaHash(7)
    with pytest.raises(ParameterError, match="keep_keys"):
        ScfaDrop(0.0)
    with pytest.raises(ParameterError, match="r: expected"):
        Loki(0.1, 0)
    with pytest.raises(NotTrainedError, match="calibrate"):
        Loki(0.1, 4).start(LAYER, 10)
