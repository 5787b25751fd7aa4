"""Codes of stored rows: made alike by every backend, and read by the scan as what they stand for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from torch import Tensor

from saap_index import reference
from saap_index.backends import Backend, Coded, Tail, get_backend
from saap_index.backends.reference import ReferenceBackend
from saap_index.backends.scalar_quantizer import STORAGE_CODES, decode, encode
from saap_index.errors import LengthError, ShapeError

_cpu = pytest.importorskip("saap_index._cpu", reason="the native kernels were not built")
SPEC = ReferenceBackend()
CODES = st.sampled_from(list(STORAGE_CODES.values()))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
DIMS = st.one_of(st.sampled_from([64, 128]), st.integers(1, 32).map(lambda x: 8 * x))
SEEDS = st.integers(0, 2**31 - 1)


@pytest.fixture(params=[*_cpu.isas(), "torch"], scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The compiled one on each instruction set that this processor has, and plain torch."""
    if request.param == "torch":
        yield get_backend(torch.device("cpu"), "torch")
        return
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield get_backend(torch.device("cpu"), "cpu")
    _cpu.set_isa(before)


def rows(*shape: int, seed: int, dtype: torch.dtype, kind: str = "channels") -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    if kind == "channels":  # a few much larger than the others, as keys have them
        x = x * torch.exp(torch.randn(shape[-1], generator=g))
    elif kind == "tiny":
        x = x * 1e-44
    elif kind == "huge":
        x = (x * 3e38).clamp(-3e38, 3e38)
    elif kind == "equal":
        x = x[..., :1].expand(shape).clone()
    elif kind == "zero":
        x = torch.zeros(shape)
    finite = torch.finfo(dtype).max
    return x.clamp(-finite, finite).to(dtype)


KINDS = st.sampled_from(["channels", "channels", "tiny", "huge", "equal", "zero"])


@settings(max_examples=examples(60))
@given(code=CODES, h=st.integers(1, 3), n=st.integers(0, 9), d=DIMS, e=DIMS, dtype=DTYPES, kind=KINDS, seed=SEEDS)
def test_the_same_bytes_from_every_backend(
    backend: Backend, code: object, h: int, n: int, d: int, e: int, dtype: torch.dtype, kind: str, seed: int
) -> None:
    assert not isinstance(code, str)
    keys = rows(n + 2, h, d, seed=seed, dtype=dtype, kind=kind).transpose(0, 1)[:, 1 : n + 1]
    values = rows(h, n, e, seed=seed + 1, dtype=dtype, kind=kind)
    sizes = code.sizes(d, e)  # type: ignore[attr-defined]
    out, want = ([torch.full((h, n + 3, size), 7, dtype=torch.uint8) for size in sizes] for _ in range(2))
    backend.encode(code, keys, values, *(x[:, 2 : n + 2] for x in out))  # type: ignore[arg-type]
    SPEC.encode(code, keys, values, *(x[:, 2 : n + 2] for x in want))  # type: ignore[arg-type]
    for got, x in zip(out, want, strict=True):
        assert torch.equal(got, x)


@given(bits=st.sampled_from([8, 4]), dim=DIMS, dtype=DTYPES, seed=SEEDS)
def test_what_a_code_stands_for(bits: int, dim: int, dtype: torch.dtype, seed: int) -> None:
    x = rows(5, dim, seed=seed, dtype=dtype)
    codes = encode(x, bits)
    assert codes.shape == (5, reference.code_size(dim, bits)) and codes.dtype == torch.uint8
    want = reference.decode(codes.numpy(), dim, bits)
    np.testing.assert_allclose(decode(codes, dim, bits).numpy(), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    error, size = np.abs(want - x.double().numpy()), np.abs(x.double().numpy())
    if bits == 8:  # half a step
        assert (error <= 0.5001 / 127 * size.max(1, keepdims=True)).all()
    else:
        assert (np.linalg.norm(error, axis=1) <= 0.25 * np.linalg.norm(size, axis=1)).all()


def test_four_bits_of_gaussian_rows_are_as_good_as_their_codebook() -> None:
    """The least mean squared error of 16 values for a Gaussian is 0.0095 of its variance (Max, 1960)."""
    x = rows(4000, 128, seed=0, dtype=torch.float32, kind="plain").double().numpy()
    error = x - reference.decode(reference.encode(x, 4), 128, 4)
    assert (error**2).sum() / (x**2).sum() < 0.0105


@given(dim=DIMS, seed=SEEDS)
def test_the_rotation_is_orthogonal(dim: int, seed: int) -> None:
    x = rows(3, dim, seed=seed, dtype=torch.float32).double().numpy()
    turned = reference.rotate(x)
    np.testing.assert_allclose((turned**2).sum(1), (x**2).sum(1), rtol=1e-6)
    np.testing.assert_allclose(reference.rotate(turned, back=True), x, rtol=0, atol=1e-6 * np.abs(x).max())


def test_memory_of_a_sealed_token() -> None:
    sizes = {name: sum(code.sizes(128, 128)) / 512 for name, code in STORAGE_CODES.items()}
    assert sizes["SQ8"] <= 0.52 and sizes["SQ8/SQ4"] <= 0.40


# -- scan -----------------------------------------------------------------------------------------------------------------


Spans = tuple[int, int, int, int, int]
"""sinks, sealed, length, and the coded rows [first, last)."""


@st.composite
def spans(draw: st.DrawFn) -> Spans:
    length = draw(st.integers(0, 90))
    first = draw(st.integers(0, min(9, length)))
    last = draw(st.integers(first, length))
    if first == last:
        return 0, 0, length, 0, 0
    if draw(st.booleans()):
        return 0, 0, length, first, last  # nothing is sealed, as after a truncation
    sinks = draw(st.integers(first, min(last, first + 3)))
    sealed = draw(st.integers(sinks, last))
    return (sinks, sealed, length, first, last) if sealed else (0, 0, length, first, last)


def check(
    backend: Backend, name: str, shapes: list[Spans], h: int, g: int, q: int, d: int, e: int, dtype: torch.dtype, share: float,
    causal: bool, with_tail: bool, seed: int, q_dtype: torch.dtype | None = None,
) -> None:
    code, r, b = STORAGE_CODES[name], np.random.default_rng(seed), len(shapes)
    sinks, sealed, lengths, first, last = ([s[k] for s in shapes] for k in range(5))
    most = max(max(lengths), 1)
    keys, values = rows(b, h, most, d, seed=seed, dtype=dtype), rows(b, h, most, e, seed=seed + 1, dtype=dtype)
    queries = rows(b, h, g, q, d, seed=seed + 2, dtype=q_dtype or dtype, kind="plain")
    codes = [torch.full((b, h, most, size), 255, dtype=torch.uint8) for size in code.sizes(d, e)]
    arena = [torch.full((b, h, most + 2, dim), 9.0, dtype=dtype) for dim in (d, e)]
    stand_for = keys.double(), values.double()
    for i, (low, high) in enumerate(zip(first, last, strict=True)):
        for x, bits, part, dense, exact in zip(
            (keys, values), (code.key_bits, code.value_bits), codes, arena, stand_for, strict=True
        ):
            part[i, :, low:high] = encode(x[i, :, low:high], bits)
            dense[i, :, :low] = x[i, :, :low]
            dense[i, :, low : low + lengths[i] - high] = x[i, :, high : lengths[i]]
            for head in range(h):
                decoded = reference.decode(part[i, head, low:high].numpy(), x.shape[-1], bits)
                exact[i, head, low:high] = torch.from_numpy(decoded)
    chosen = [
        [sorted(r.permutation(np.arange(a, z))[: round(share * (z - a))].tolist()) for _ in range(h)] for a, z, *_ in shapes
    ]
    width = max(len(x) for sequence in chosen for x in sequence)
    listed = torch.full((b, h, width), -1, dtype=torch.int32)
    counts = torch.tensor([[len(x) for x in sequence] for sequence in chosen], dtype=torch.int32)
    for i, head in np.ndindex(b, h):
        listed[i, head, : counts[i, head]] = torch.tensor(chosen[i][head], dtype=torch.int32)
    tail = None
    if with_tail:
        runs = torch.zeros((b, h, 1), dtype=torch.int32)
        tables = torch.tensor([0, 5, 7], dtype=torch.int32).expand(b, h, 1, 3).contiguous()
        means = (rows(b, h, 1, 2, dim, seed=seed + 3, dtype=dtype) for dim in (d, e))
        tail = Tail(runs, torch.ones((b, h), dtype=torch.int32), *means, tables)
    scale = d**-0.5
    spans_of = sinks, sealed, lengths
    coded = Coded(code, *codes, first, last)
    out, lse = backend.scan(queries, *arena, listed, counts, *spans_of, scale, causal, tail, coded)
    spec_out, spec_lse = SPEC.scan(queries, *arena, listed, counts, *spans_of, scale, causal, tail, coded)
    for i, head in np.ndindex(b, h):
        always = [*range(sinks[i]), *range(sealed[i], lengths[i])]
        at = np.array([*chosen[i][head], *always], np.int64)
        limit = lengths[i] - q + 1 + np.tile(np.arange(q), g)[:, None] if causal else np.full((g * q, 1), most)
        seen = (at < limit) | (at < sealed[i])
        k, v, tokens = stand_for[0][i, head, at].numpy(), stand_for[1][i, head, at].numpy(), np.ones(len(at))
        if tail is not None:
            k = np.concatenate([k, tail.keys[i, head, 0, :1].double().numpy()])
            v = np.concatenate([v, tail.values[i, head, 0, :1].double().numpy()])
            seen, tokens = np.concatenate([seen, np.ones((g * q, 1), bool)], 1), np.append(tokens, 5.0)
        x = queries[i, head].double().reshape(g * q, d).numpy()
        want, want_lse = reference.attend(x, k, v, scale, seen, tokens)
        eps = torch.finfo(queries.dtype).eps
        for o, m, noise in ((out, lse, 2e-5), (spec_out, spec_lse, 1e-6)):
            largest = max(1.0, float(np.abs(v).max(initial=0)))
            got = o[i, head].double().reshape(g * q, e).numpy()
            np.testing.assert_allclose(got, want, rtol=eps, atol=(noise + eps) * largest)
            np.testing.assert_allclose(m[i, head].double().reshape(-1).numpy(), want_lse, rtol=2e-5, atol=2e-5)


@settings(max_examples=examples(60))
@given(
    name=st.sampled_from(list(STORAGE_CODES)), shapes=st.lists(spans(), min_size=1, max_size=2), h=st.integers(1, 2),
    g=st.integers(1, 9), q=st.integers(1, 3), d=DIMS, e=DIMS, dtype=DTYPES, share=st.sampled_from([0.0, 0.3, 1.0]),
    causal=st.booleans(), with_tail=st.booleans(), seed=SEEDS,
)
def test_scan_reads_what_codes_stand_for(
    backend: Backend, name: str, shapes: list[Spans], h: int, g: int, q: int, d: int, e: int, dtype: torch.dtype, share: float,
    causal: bool, with_tail: bool, seed: int,
) -> None:
    check(backend, name, shapes, h, g, q, d, e, dtype, share, causal, with_tail, seed)


@pytest.mark.parametrize("name", STORAGE_CODES)
@pytest.mark.parametrize("d", [64, 128])
def test_scan_of_many_rows(backend: Backend, name: str, d: int) -> None:
    """Several items of each kind, and head dims with code of their own."""
    for g, q in ((4, 1), (1, 1), (7, 2), (2, 1)):
        check(backend, name, [(4, 3000, 3200, 4, 3050), (0, 0, 700, 2, 690)], 2, g, q, d, d, torch.bfloat16, 0.4, True, True, g)


def test_the_number_of_threads_changes_nothing() -> None:
    cpu, code = get_backend(torch.device("cpu"), "cpu"), STORAGE_CODES["SQ8/SQ4"]
    keys, values = (rows(1, 2, 3000, 64, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    codes = [torch.empty((1, 2, 3000, size), dtype=torch.uint8) for size in code.sizes(64, 64)]
    cpu.encode(code, keys[0], values[0], codes[0][0], codes[1][0])
    found = []
    for threads in (1, 2, 3):
        _cpu.set_num_threads(threads)
        coded = Coded(code, *codes, [0], [3000])
        arena = (x[:, :, :4].contiguous() for x in (keys, values))
        found.append(cpu.scan(rows(1, 2, 4, 1, 64, seed=3, dtype=torch.bfloat16), *arena,
                              None, None, [0], [0], [3000], 0.125, True, None, coded))
    _cpu.set_num_threads(0)
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0]) and torch.equal(lse, found[0][1])


def test_spans_outside_the_codes_are_refused() -> None:
    cpu, code = get_backend(torch.device("cpu"), "cpu"), STORAGE_CODES["SQ8"]
    arena = [torch.zeros((1, 1, 8, 64), dtype=torch.float32) for _ in range(2)]
    codes = [torch.zeros((1, 1, 16, size), dtype=torch.uint8) for size in code.sizes(64, 64)]
    queries = torch.zeros((1, 1, 1, 1, 64), dtype=torch.float32)

    def scan(first: int, last: int, sinks: int, sealed: int, length: int) -> None:
        coded = Coded(code, codes[0], codes[1], [first], [last])
        cpu.scan(queries, arena[0], arena[1], None, None, [sinks], [sealed], [length], 1.0, True, None, coded)

    scan(2, 16, 2, 16, 20)
    for spans_of in ((2, 17, 2, 16, 20), (2, 16, 2, 17, 20), (2, 16, 2, 16, 15), (2, 16, 2, 16, 23), (5, 3, 0, 0, 8)):
        with pytest.raises(LengthError):
            scan(*spans_of)
    with pytest.raises(ShapeError):
        narrow = Coded(code, codes[0][..., 1:], codes[1], [0], [4])
        cpu.scan(queries, arena[0], arena[1], None, None, [0], [0], [8], 1.0, True, None, narrow)
