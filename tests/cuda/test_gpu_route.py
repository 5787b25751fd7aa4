"""cuda/route.cu on the emulator: against the specification, by the error of torch doing the same in fp16."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from emu.guarded import guarded
from emu.runtime import EmulatedRuntime, available
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from saap_index import reference
from saap_index.backends.cuda import route as gpu_route
from saap_index.backends.types import Frequencies, Rotation
from saap_index.backends.weights import RouterWeights

pytestmark = pytest.mark.skipif(not available(), reason="needs g++")

SCHEDULES = (("fifo", 0, 2), ("lifo", 0, 3), ("random", 1, 1), ("random", 2, 4))
SEEDS = st.integers(0, 2**31 - 1)


@cache
def runtime(schedule: tuple[str, int, int] = SCHEDULES[0]) -> EmulatedRuntime:
    order, seed, inflight = schedule
    return EmulatedRuntime(order, seed, inflight)


@dataclass(frozen=True)
class Build:
    """What is compiled once. tiles: knob of that name."""

    d: int
    u: int
    dtype: torch.dtype
    tiles: int


BUILDS = (
    Build(64, 64, torch.bfloat16, 1),
    Build(128, 64, torch.float16, 4),
    Build(40, 24, torch.float32, 1),
    Build(64, 0, torch.float32, 16),
    Build(128, 256, torch.bfloat16, 1),
)


@dataclass(frozen=True)
class Case:
    build: Build
    b: int
    h: int
    g: int
    q: int
    l: int
    extra: int  # outputs that are not lists
    blocks: int
    pairs: int = 0
    interleaved: bool = False
    scale: float = 1.0
    arrays: bool = False  # angles come as cosine and sine
    position: int = 4096
    seed: int = 0

    @property
    def j(self) -> int:
        return self.g * self.q


@st.composite
def cases(draw: st.DrawFn) -> Case:
    build = draw(st.sampled_from(BUILDS))
    vectors = draw(st.sampled_from([1, 3, 8, 9, 20]))
    q = draw(st.sampled_from([1, 2, 3, 8]))
    b = draw(st.integers(1, 3))
    return Case(
        build,
        b,
        draw(st.integers(1, 2)),
        max(1, vectors // (b * q)),
        q,
        draw(st.sampled_from([1, 50, 250])),
        draw(st.sampled_from([0, 1, 6])),
        draw(st.integers(1, 4)),
        draw(st.sampled_from([0, 4, build.d // 4, build.d // 2])),
        draw(st.booleans()),
        draw(st.sampled_from([1.0, 0.7])),
        draw(st.booleans()),
        draw(st.sampled_from([8, 5000, 1_000_000])),
        draw(SEEDS),
    )


@dataclass(frozen=True)
class Inputs:
    weights: RouterWeights
    queries: Tensor  # (b, h, j, d)
    meta: Tensor
    inv_freq: Tensor


def inputs(case: Case) -> Inputs:
    g = torch.Generator().manual_seed(case.seed)
    build, outputs = case.build, case.l + case.extra
    u, d, h = build.u, build.d, case.h

    def weights(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g) / shape[-1] ** 0.5 if shape[-1] else torch.zeros(shape)

    router = RouterWeights(
        weights(h, u, d), weights(h, u), weights(h, outputs, u), weights(h, outputs, d), weights(h, outputs), case.l
    )
    meta = torch.zeros((case.b, 8), dtype=torch.int32)
    meta[:, 4] = case.position + 37 * torch.arange(case.b)
    queries = torch.randn((case.b, h, case.j, d), generator=g).to(build.dtype)
    inv_freq = 500000.0 ** (-torch.arange(case.pairs) / max(1, case.pairs))
    return Inputs(router, queries, meta, inv_freq.float())


def angles(case: Case, given: Inputs) -> Tensor:
    """float32 (b, q, pairs): position times frequency, rounded, as transformers makes them."""
    positions = given.meta[:, 4:5] - case.q + torch.arange(case.q)
    return positions[:, :, None].float() * given.inv_freq


def run(case: Case, given: Inputs, on: EmulatedRuntime, guard: bool = False) -> tuple[Tensor, Tensor]:
    at = angles(case, given).flatten(0, 1)
    rotation: Rotation | Frequencies | None = None
    if case.pairs and case.arrays:
        rotation = Rotation(at.cos(), at.sin(), case.interleaved, case.scale)
    elif case.pairs:
        rotation = Frequencies(given.inv_freq, case.interleaved, case.scale)
    packed = gpu_route.pack_router(given.weights)
    z = torch.full((case.b, case.h, case.j, case.l), torch.nan)
    a = torch.full((case.b, case.h, case.j, case.extra), torch.nan)
    queries = given.queries
    if guard:
        queries, z, a = guarded(queries), guarded(z), guarded(a)
        names = ("hidden", "out", "bias_hidden", "bias_out")
        packed = replace(packed, **{name: guarded(getattr(packed, name)) for name in names})
    knobs = {"SAAP_TILES": case.build.tiles, "blocks": case.blocks}
    with on.allow(queries, packed.hidden, packed.out, z, a):
        route = gpu_route.Route(on, packed, case.b, case.j, case.q, case.build.dtype, knobs)
        route.bind(rotation, given.meta, z, a)(queries=queries)
    return z, a


def expected(case: Case, given: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """(b, h, j, outputs): the specification in float64, and torch with the same roundings to fp16 and each step in fp16."""
    w = given.weights
    exact = np.empty((case.b, case.h, case.j, case.l + case.extra))
    rounded = np.empty_like(exact)
    for i, at in enumerate(angles(case, given).double().numpy()):
        for k in range(case.h):
            x = given.queries[i, k].double().reshape(case.g, case.q, -1).numpy()
            x = reference.unrotate(x, np.cos(at), np.sin(at), case.interleaved, case.scale).reshape(case.j, -1)
            parts = [p[k] for p in (w.hidden, w.bias_hidden, w.out, w.skip, w.bias_out)]
            arrays = (p.double().numpy() for p in parts)
            exact[i, k] = np.concatenate(reference.route(x, *arrays, case.l), 1)  # type: ignore[arg-type]
            y = torch.from_numpy(x).half()
            hidden, bias_hidden, out, skip, bias_out = (p.half() for p in parts)
            units = functional.silu(y @ hidden.T + bias_hidden)
            rounded[i, k] = (units @ out.T + y @ skip.T + bias_out).double().numpy()
    return exact, rounded


def assert_as_exact_as_fp16(got: tuple[Tensor, Tensor], case: Case, given: Inputs) -> None:
    exact, rounded = expected(case, given)
    error = np.abs(torch.cat(got, -1).double().numpy() - exact).max(initial=0.0)
    allowed = 2 * np.abs(rounded - exact).max(initial=0.0) + 1e-6
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def test_parameters_are_laid_out_as_in_the_kernel() -> None:
    macros = gpu_route.configuration(64, 64, 4, torch.bfloat16, runtime().max_shared_bytes) | {"SAAP_TILES": 1}
    kernel = runtime().kernel("route.cu", "saap_route", macros)
    assert kernel.sizeof("route") == gpu_route.PARAMS.itemsize


def test_lists_to_compare_with_become_outputs() -> None:
    """And what is packed has the bytes that a search reports."""
    g = torch.Generator().manual_seed(3)
    shapes = ((2, 20, 40), (2, 20), (2, 27, 20), (2, 27, 40), (2, 27))
    lists = torch.randn((2, 50, 24), generator=g), torch.rand((2, 24), generator=g)
    weights = RouterWeights(*(torch.randn(s, generator=g) for s in shapes), 50, *lists)
    packed, same = gpu_route.pack_router(weights), gpu_route.pack_router(weights.composed())
    assert (packed.nlist, packed.outputs) == (50, 53) and torch.equal(packed.out, same.out)
    tensors = (packed.hidden, packed.bias_hidden, packed.out, packed.bias_out)
    assert gpu_route.packed_bytes(weights) == sum(x.nbytes for x in tensors)


def test_fragments_hold_every_weight_once() -> None:
    """Lane 4 g + t reads rows g and g + 8, columns 2t, 2t + 1, 2t + 8, 2t + 9 of a 16 x 16 matrix."""
    x = torch.arange(32 * 64).reshape(1, 32, 64).float()
    packed = gpu_route.fragments(x)
    assert packed.shape == (1, 2, 2, 2, 32, 8)
    for tile, unit, half, lane in ((0, 0, 0, 0), (1, 1, 1, 31), (1, 0, 1, 6)):
        g, t = divmod(lane, 4)
        block = x[0, 16 * tile :, 32 * unit + 16 * half :]
        want = [block[g + r, 2 * t + c] for c0 in (0, 8) for r in (0, 8) for c in (c0, c0 + 1)]
        assert packed[0, tile, unit, half, lane].tolist() == want


@settings(max_examples=60)
@given(case=cases(), schedule=st.sampled_from(SCHEDULES))
def test_route(case: Case, schedule: tuple[str, int, int]) -> None:
    given = inputs(case)
    assert_as_exact_as_fp16(run(case, given, runtime(schedule), guard=True), case, given)


@settings(max_examples=8)
@given(case=cases())
def test_every_schedule_gives_the_same_bits(case: Case) -> None:
    given = inputs(case)
    first = torch.cat(run(case, given, runtime(SCHEDULES[0])), -1)
    for schedule in SCHEDULES[1:]:
        assert torch.equal(first.view(torch.int32), torch.cat(run(case, given, runtime(schedule)), -1).view(torch.int32))


@settings(max_examples=8)
@given(case=cases(), vectors=st.sampled_from([33, 70]))
def test_more_vectors_than_columns(case: Case, vectors: int) -> None:
    """Weights pass again for every further batch of columns; a batch begins within a position's heads."""
    case = replace(case, build=BUILDS[vectors % 3], b=1, q=1, g=vectors, l=20)
    case = replace(case, pairs=min(case.pairs, case.build.d // 2))
    given = inputs(case)
    assert_as_exact_as_fp16(run(case, given, runtime()), case, given)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, 1e30])
def test_queries_beyond_fp16(number: float) -> None:
    """NaN reaches its own query's scores and no other's; what is too large for fp16 is its largest number."""
    case = Case(BUILDS[2], 2, 1, 3, 1, 16, 2, 1)
    given = inputs(case)
    want = torch.cat(run(case, given, runtime()), -1)
    given.queries[1, 0, 1, 7] = number
    got = torch.cat(run(case, given, runtime()), -1)
    others = torch.ones(got.shape[:3], dtype=torch.bool)
    others[1, 0, 1] = False
    assert torch.equal(got[others], want[others])
    assert got[1, 0, 1].isnan().all() if number != number else got[1, 0, 1].isfinite().all()


def test_angles_of_far_positions() -> None:
    """At a million tokens a float32 angle is off by a 30th of a turn: the same 30th as in the model."""
    case = Case(Build(40, 24, torch.float32, 1), 2, 2, 2, 3, 30, 3, 2, pairs=20, position=999_999, seed=1)
    given = inputs(case)
    got = run(case, given, runtime())
    assert_as_exact_as_fp16(got, case, given)
    arrays = run(replace(case, arrays=True), given, runtime())
    assert all((x - y).abs().max() < 2e-3 for x, y in zip(got, arrays, strict=True))


def test_configurations_fit() -> None:
    for bound in (163 * 1024, gpu_route.H200_SHARED_BYTES):
        for d, u, vectors in ((8, 0, 1), (64, 64, 4), (128, 64, 128), (128, 256, 4), (256, 256, 1), (256, 256, 4096)):
            assert gpu_route.shared_bytes(gpu_route.configuration(d, u, vectors, torch.bfloat16, bound)) <= bound


def once() -> None:
    """What the sanitizers watch, see test_gpu_sanitized.py: batches of columns, blocks that share a head, padding everywhere."""
    case = Case(replace(BUILDS[2], tiles=1), 1, 2, 3, 4, 50, 6, 2, pairs=10)
    assert_as_exact_as_fp16(run(case, inputs(case), runtime(SCHEDULES[-1])), case, inputs(case))
