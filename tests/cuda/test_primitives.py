"""Every primitive of cuda/prims.cuh against NumPy: its CPU body under every schedule, and on a GPU the instruction itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emu.runtime import EmulatedRuntime, available
from numpy.typing import NDArray

from saap_index.backends.cuda import selftest as gpu_selftest
from saap_index.backends.cuda.launch import CLUSTERS, Runtime

Words = NDArray[np.uint32]
EPS = 2.0**-23
SPECIAL = np.array(
    [0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 1e-40, 2**-126, 2**-24, 2**-25, 3 * 2**-25, 2**-14, 65504, 65519.996, 65520, -65520,
     1e5, 3.4e38, 200, -200, -125.5, -130, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11],
    np.float32,
)
SPECIAL_BITS = np.array(
    [0x7F800001, 0xFFC00000, 0x00010001, 0x7C007C00, 0x7C01FC01, 0x03FF83FF, 0x04008400, 0x80808080], np.uint32
)


def words_for(family: str, rng: np.random.Generator) -> Words:
    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    if family == "math":
        return np.concatenate([SPECIAL, normal(997) * 30]).view(np.uint32)
    if family == "convert":
        return np.concatenate([SPECIAL.view(np.uint32), SPECIAL_BITS, bits(rng, 1500), (normal(500) * 1e-6).view(np.uint32)])
    if family == "mma":  # the 16-bit halves are valid numbers as bf16 and as fp16
        halves = normal(32, 12).astype(np.float16).view(np.uint16).astype(np.uint32)
        return np.concatenate([halves[:, ::2] | halves[:, 1::2] << 16, normal(32, 4).view(np.uint32)], 1).ravel()
    sizes = {"copy": 4 * 64 * 7, "matrix": 128, "warp": 64, "order": 64 * 5 - 9, "cluster": 64 * 8, "relay": 64 * 6}
    return bits(rng, sizes[family])


def bits(rng: np.random.Generator, n: int) -> Words:
    return rng.integers(0, 2**32, n, np.uint64).astype(np.uint32)


def run(runtime: Runtime, family: str, words: Words, device: str = "cpu") -> Words:
    given = torch.from_numpy(words.view(np.int32)).to(device)
    out = torch.zeros(gpu_selftest.words_out(family, len(words)), dtype=torch.int32, device=device)
    flags = torch.zeros(len(words) // 64 + 2, dtype=torch.int32, device=device)
    gpu_selftest.run(runtime, family, given, out, flags)
    assert not flags.any()
    return out.cpu().numpy().view(np.uint32)


def check(family: str, words: Words, out: Words) -> None:
    CHECKS[family](words, out)


# ---- what NumPy makes of them


def wide(halves: NDArray[np.uint16], kind: str) -> NDArray[np.float32]:
    if kind == "f16":
        return halves.view(np.float16).astype(np.float32)
    return (halves.astype(np.uint32) << 16).view(np.float32)


def narrow(x: NDArray[np.float32], kind: str) -> NDArray[np.uint16]:
    with np.errstate(over="ignore"):
        if kind == "f16":
            rounded = x.astype(np.float16).view(np.uint16)
        else:
            rounded = torch.from_numpy(x.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def pair(low: NDArray[np.uint16], high: NDArray[np.uint16]) -> Words:
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def same(got: Words, want: NDArray[np.float32]) -> None:
    """The same bits, or both NaN."""
    nan = np.isnan(want)
    assert np.isnan(got.view(np.float32)[nan]).all()
    np.testing.assert_array_equal(got[~nan], want.view(np.uint32)[~nan])


def check_convert(words: Words, out: Words) -> None:
    x, low = words.view(np.float32), words.astype(np.uint16)
    got = out.reshape(-1, 9).T
    same(got[0], wide(low, "bf16"))
    same(got[1], wide(low, "f16"))
    np.testing.assert_array_equal(got[2], pair(narrow(x, "bf16"), narrow(x, "f16")))
    for row, kind in ((3, "bf16"), (4, "f16")):
        np.testing.assert_array_equal(got[row], pair(narrow(x, kind), narrow(np.roll(x, -1), kind)))
    np.testing.assert_array_equal(got[5], words)
    same(got[6], wide(low, "f16"))
    np.testing.assert_array_equal(got[7], narrow(wide(low, "bf16"), "bf16"))
    for shift in (0, 16):
        a, b = (wide((x >> shift).astype(np.uint16), "f16") for x in (words, np.roll(words, -1)))
        with np.errstate(all="ignore"):
            difference = a - b
            want, half = narrow(difference, "f16"), (got[8] >> shift).astype(np.uint16)
        nan = np.isnan(difference)
        assert np.isnan(wide(half[nan], "f16")).all()
        np.testing.assert_array_equal(half[~nan], want[~nan])


def check_math(words: Words, out: Words) -> None:
    x = words.view(np.float32).astype(np.float64)
    got = out.reshape(-1, 4).T.copy().view(np.float32).astype(np.float64)
    x = np.where(abs(x) < 2.0**-126, 0, x)
    with np.errstate(all="ignore"):
        power, logarithm = np.exp2(x), np.log2(x)
        turn = np.pi * np.fmod(1e6 * words.view(np.float32).astype(np.float64), 2)
    power[power < 2.0**-126] = 0
    power[power > 3.4028235e38] = np.inf
    np.testing.assert_allclose(got[0], power, rtol=4 * EPS)
    np.testing.assert_allclose(got[1], logarithm, rtol=4 * EPS, atol=4 * EPS)
    finite = np.isfinite(turn)
    np.testing.assert_allclose(got[2][finite], np.sin(turn[finite]), rtol=0, atol=6 * EPS)
    np.testing.assert_allclose(got[3][finite], np.cos(turn[finite]), rtol=0, atol=6 * EPS)


def check_copy(words: Words, out: Words) -> None:
    n = len(words)
    units = words.reshape(-1, 4)
    kept = np.where(np.arange(len(units))[:, None] % 5 == 0, 0, units)
    np.testing.assert_array_equal(out[:n].reshape(-1, 4), kept)
    x, y, z, w = units.T
    np.testing.assert_array_equal(out[n : 2 * n].reshape(-1, 4).T, [x, y, z, w])
    np.testing.assert_array_equal(out[2 * n :], x ^ y)


def fragment(matrix: NDArray[np.uint16]) -> Words:
    """By lane: row lane / 4, columns 2 (lane % 4) and the next of an 8 x 8 matrix."""
    return pair(matrix[:, ::2], matrix[:, 1::2]).ravel()


def check_matrix(words: Words, out: Words) -> None:
    rows = words.view(np.uint16).reshape(32, 8)[::-1]
    got = out.reshape(32, 9).T
    for m in range(4):
        np.testing.assert_array_equal(got[m], fragment(rows[8 * m : 8 * m + 8]))
        np.testing.assert_array_equal(got[4 + m], fragment(rows[8 * m : 8 * m + 8].T))
    np.testing.assert_array_equal(got[8], fragment(words[:32].view(np.uint16).reshape(8, 8).T))


def check_mma(words: Words, out: Words) -> None:
    lanes = words.reshape(32, 10)
    g, t = np.arange(32) // 4, 2 * (np.arange(32) % 4)
    for kind, got in zip(("bf16", "f16"), out.view(np.float32).reshape(2, 32, 4), strict=True):
        a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
        for half in range(2):
            parts = wide((lanes[:, :6] >> 16 * half).astype(np.uint16), kind).astype(np.float64).T
            for i in range(4):
                a[g + 8 * (i % 2), t + 8 * (i // 2) + half] = parts[i]
            for i in range(2):
                b[t + 8 * i + half, g] = parts[4 + i]
                c[g + 8 * i, t + half] = lanes[:, 6 + 2 * i + half].copy().view(np.float32)
        # 16 additions, in whatever order and whether they round or cut off
        limit = 17 * EPS * (abs(c) + abs(a) @ abs(b))
        for i in range(4):
            at = g + 8 * (i // 2), t + i % 2
            assert (abs(got[:, i] - (c + a @ b)[at]) <= limit[at]).all()


def check_warp(words: Words, out: Words) -> None:
    got = out.reshape(64, 16)
    small, lane = (words % 7).astype(int), np.arange(32)
    for first in (0, 32):
        x, s, mine = words[first : first + 32], small[first : first + 32], got[first : first + 32].T
        halves = [slice(0, 16), slice(16, 32)]

        def each(f: object, x: NDArray[np.generic] = x) -> Words:
            return np.concatenate([np.full(16, f(x[h]), np.uint32) for h in (slice(0, 16), slice(16, 32))])  # type: ignore[operator]

        want = [
            x[s], x[lane // 8 * 8 + (s + 9) % 8], x[lane ^ 5], x[lane ^ 12],
            x[np.where(lane >= 3, lane - 3, lane)], x[np.where(lane % 4 >= 2, lane - 2, lane)],
            x[np.where(lane + 3 < 32, lane + 3, lane)], x[np.where(lane % 16 + 3 < 16, lane + 3, lane)],
            np.full(32, sum(int(v & 1) << i for i, v in enumerate(x)), np.uint32),
            np.concatenate([np.full(16, 2 * (s[h] == 3).any() + (s[h] < 6).all(), np.uint32) for h in halves]),
            np.array([sum(1 << i for i in range(32) if s[i] == v) for v in s], np.uint32),
            each(lambda v: v.sum(dtype=np.uint32)),
            np.full(32, x.view(np.int32).min(), np.int32).view(np.uint32),
            np.full(32, x.max() ^ np.bitwise_xor.reduce(x), np.uint32),
            np.full(32, (words & 2 > 0).sum(), np.uint32),
            np.full(32, 2 * (small == 6).any() + (small < 6).all(), np.uint32),
        ]
        for i, row in enumerate(want):
            np.testing.assert_array_equal(mine[i], row, f"column {i}")


def check_order(words: Words, out: Words) -> None:
    assert out[:3].tolist() == [int(words.sum(dtype=np.uint32)), -(-len(words) // 64), int(words.max())]


def check_cluster(words: Words, out: Words, size: int = gpu_selftest.CLUSTER) -> None:
    got, clusters = out.reshape(-1, 4).T, words.reshape(-1, size, 64)
    np.testing.assert_array_equal(got[0], np.roll(clusters, -1, 1).ravel())
    np.testing.assert_array_equal(got[1], np.roll(clusters, -2, 1).ravel())
    np.testing.assert_array_equal(got[2], clusters.sum((1, 2), dtype=np.uint32).repeat(size * 64))
    np.testing.assert_array_equal(got[3], np.tile(np.arange(size).repeat(64) + 256 * size, len(clusters)))


def check_relay(words: Words, out: Words) -> None:
    for got in out.reshape(gpu_selftest.RELAYS, -1):
        words = words[::-1] * np.uint32(2654435761) + np.uint32(1)
        np.testing.assert_array_equal(got, words)


CHECKS = {
    "convert": check_convert, "math": check_math, "copy": check_copy, "matrix": check_matrix, "mma": check_mma,
    "warp": check_warp, "order": check_order, "cluster": check_cluster, "relay": check_relay,
}
assert tuple(CHECKS) == gpu_selftest.FAMILIES


@pytest.mark.skipif(not available(), reason="no C++ compiler")
@pytest.mark.parametrize("family", gpu_selftest.FAMILIES)
def test_cpu_bodies(family: str) -> None:
    rng = np.random.default_rng(0)
    for seed, order in enumerate(("fifo", "lifo", "random", "random")):
        words = words_for(family, rng)
        check(family, words, run(EmulatedRuntime(order, seed), family, words))


@pytest.mark.skipif(not available(), reason="no C++ compiler")
def test_without_clusters() -> None:
    older, rng = EmulatedRuntime("random", capability=(8, 0)), np.random.default_rng(0)
    words = words_for("cluster", rng)
    check_cluster(words, run(older, "cluster", words), 1)
    check_relay(words, run(older, "relay", words))


@pytest.mark.skipif(not available(), reason="no C++ compiler")
def test_layout_of_the_parameters() -> None:
    kernel = EmulatedRuntime().kernel(gpu_selftest.FILE, "saap_selftest_copy", {})
    assert kernel.sizeof("selftest") == gpu_selftest.PARAMS.itemsize


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("family", gpu_selftest.FAMILIES)
def test_instructions(family: str) -> None:
    from saap_index.backends.cuda import runtime as gpu_runtime

    device, rng = gpu_runtime.runtime(torch.device("cuda")), np.random.default_rng(1)
    for _ in range(20):
        words = words_for(family, rng)
        out = run(device, family, words, "cuda")
        if family == "cluster" and device.capability < CLUSTERS:
            check_cluster(words, out, 1)
        else:
            check(family, words, out)
        if family in ("copy", "matrix", "warp", "order", "cluster", "relay") and available():
            np.testing.assert_array_equal(out, run(EmulatedRuntime(capability=device.capability), family, words))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("family", ["cluster", "relay"])
def test_launches_in_a_graph(family: str) -> None:
    """Clusters and dependent launches, captured: what a replay makes of other words."""
    from saap_index.backends.cuda import runtime as gpu_runtime

    device, rng = gpu_runtime.runtime(torch.device("cuda")), np.random.default_rng(2)
    n = 64 * 4 * 4 * device.multiprocessors  # several waves of blocks
    words = torch.zeros(n, dtype=torch.int32, device="cuda")
    out = torch.zeros(gpu_selftest.words_out(family, n), dtype=torch.int32, device="cuda")
    flags = torch.zeros(n // 64 + 2, dtype=torch.int32, device="cuda")
    gpu_selftest.run(device, family, words, out, flags)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu_selftest.run(device, family, words, out, flags)
    size = gpu_selftest.CLUSTER if device.capability >= CLUSTERS else 1
    for _ in range(20):
        given = bits(rng, n)
        words.copy_(torch.from_numpy(given.view(np.int32)))
        graph.replay()
        got = out.cpu().numpy().view(np.uint32)
        check_cluster(given, got, size) if family == "cluster" else check_relay(given, got)
