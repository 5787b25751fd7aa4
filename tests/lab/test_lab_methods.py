"""The defining property of every method of the lab, and that its bytes are what was read."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saap_index import Rope
from saap_index.errors import FormatError, NotTrainedError, ParameterError
from saap_lab.eigen import Eigen
from saap_lab.loki import Loki, principal_basis
from saap_lab.method import Attended, Cache, Layer, Method, attend_over
from saap_lab.scfa import ScfaDrop, ScfaHash, hash_prefill
from saap_lab.spans import Moa, SpanPlan
from saap_lab.sparsek import SparseK, project, threshold
from saap_lab.yardsticks import TopK

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
    "moa": lambda: Moa(SpanPlan.uniform(1, 6, 1.0)),
    "eigen": lambda: calibrated(Eigen(99, 99)),
    "sparsek": lambda: calibrated(SparseK(1.0)),
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


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 40), data=st.data(), scale=st.sampled_from([0.01, 1.0, 30.0]), seed=st.integers(0, 999))
def test_sparsek_projection_against_bisection(m: int, data: st.DataObject, scale: float, seed: int) -> None:
    k = data.draw(st.integers(0, m))
    z = scale * torch.randn(3, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z[1] = z[1].round()  # ties
    low, high = z.amin(-1, keepdim=True) - 2, z.amax(-1, keepdim=True) + 1
    for _ in range(100):
        middle = (low + high) / 2
        too_much = (z - middle).clamp(0, 1).sum(-1, keepdim=True) > k
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    p = project(z, k)
    torch.testing.assert_close(p, (z - high).clamp(0, 1), rtol=0, atol=1e-9 * max(1.0, scale))
    assert torch.allclose(p.sum(-1), torch.full((3,), float(k), dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(m=st.integers(2, 12), seed=st.integers(0, 999))
def test_sparsek_gradient(m: int, seed: int) -> None:
    z = torch.randn(2, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)
    p = project(z, m // 2)
    near_a_kink = ((p < 1e-4) & (p > 0)) | ((p > 1 - 1e-4) & (p < 1))
    if not bool(near_a_kink.any()):
        assert torch.autograd.gradcheck(lambda x: project(x, m // 2), (z,), eps=1e-7, atol=1e-5)


def test_sparsek_threshold_never_falls_and_nobody_returns() -> None:
    z = torch.randn(200, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    taus, out = [], set()
    for n in range(21, 201):
        taus.append(float(threshold(z[:n], 20)))
        best = set(z[:n].topk(20).indices.tolist())
        assert not best & out
        out |= set(range(n)) - best
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(taus))


def test_sparsek_cache_is_of_constant_size_and_learns_who_is_read() -> None:
    tokens, queries = cache(500)
    loud = torch.rand(500, generator=torch.Generator().manual_seed(1)) < 0.1
    tokens.keys[:, loud] += 2 * queries.mean(1, keepdim=True)
    tokens.values[:, loud, 0] += 5  # what the scorer can see of it
    method = SparseK(0.1, gate=False, sinks=2, window=10)
    method.calibrate(LAYER, [tokens.keys], [tokens.values], [queries[:, :, None]])
    state = method.start(LAYER, 600)
    state.append(tokens.keys[:, :400], tokens.values[:, :400])
    sizes = [state.attend(queries).tokens]
    for i in range(400, 500, 20):
        state.append(tokens.keys[:, i : i + 20], tokens.values[:, i : i + 20])
        sizes.append(state.attend(queries).tokens)
    assert set(sizes) == {12 + round(0.1 * 388)}
    chosen = state.attend(queries).chosen
    assert chosen[:, 2:490][:, loud[2:490]].float().mean() > 3 * chosen[:, 2:490].float().mean()


def roped(n: int) -> tuple[Layer, torch.Tensor, torch.Tensor, torch.Tensor]:
    layer = Layer(0, 2, 3, 16, 24, 0.25, Rope(head_dim=16, theta=100.0))
    tokens, queries = cache(n)
    return layer, layer.rope.rotate(tokens.keys, range(n), n), tokens.values, queries


def test_eigen_at_full_rank_is_dense_and_each_key_has_its_own_position() -> None:
    """Decoding token by token equals attention over the projected keys, each rotated to where it stands."""
    layer, keys, values, queries = roped(90)
    for rank_k, rank_v in ((16, 24), (5, 7)):
        method = Eigen(rank_k, rank_v)
        method.calibrate(layer, [keys], [values], [])
        state = method.start(layer, 90)
        for i in range(90):
            state.append(keys[:, i : i + 1], values[:, i : i + 1])
        basis_k, basis_v = method.bases[0]
        plain = layer.rope.unrotate(keys, range(90), 90) @ basis_k @ basis_k.T
        seen = layer.rope.rotate(plain, range(90), 90)
        want = (queries @ seen.mT * 0.25).softmax(-1) @ (values @ basis_v @ basis_v.mT)
        found = state.attend(queries)
        torch.testing.assert_close(found.out, want, rtol=1e-4, atol=1e-4)
        assert found.kv_bytes == 2 * 90 * (rank_k + rank_v) * 2
        if rank_k == 16:
            dense = (queries @ keys.mT * 0.25).softmax(-1) @ values
            torch.testing.assert_close(found.out, dense, rtol=1e-3, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 400), alpha=st.sampled_from([-128.0, 0.0, 100.0]), beta=st.floats(0, 1), wide=st.booleans())
def test_moa_reads_sinks_and_the_newest_of_each_span(n: int, alpha: float, beta: float, wide: bool) -> None:
    plan = SpanPlan(((alpha,) * 6,), ((beta, beta, beta, 1.0 if wide else beta, beta, beta),))
    found = run(Moa(plan, sinks=64), n)
    for head in range(6):
        span = plan.span(0, head, n)
        assert span % 64 == 0 and span >= 128
        row = found.chosen[head // 3, head % 3]
        assert row.sum() == min(n, span) and row[:64].all() and row[max(0, n - span + 64) :].all()
    assert found.tokens == sum(min(n, max(plan.span(0, h + i, n) for i in range(3))) for h in (0, 3)) / 2


def test_moa_plans_are_read_back_and_bad_ones_named(tmp_path) -> None:
    plan = SpanPlan(((0.0, -1024.0), (1024.0, 0.0)), ((0.5, 0.25), (0.0, 1.0)))
    plan.write(tmp_path / "plan.json")
    assert SpanPlan.read(tmp_path / "plan.json") == plan
    assert SpanPlan.uniform(2, 2, 0.5).density(0, 8192) == pytest.approx(0.5)
    (tmp_path / "bad.json").write_text('{"alphas": 3}')
    with pytest.raises(FormatError, match=r"bad\.json"):
        SpanPlan.read(tmp_path / "bad.json")
    with pytest.raises(ParameterError, match="betas"):
        SpanPlan(((0.0,),), ((1.5,),))
