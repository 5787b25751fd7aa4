"""The scan and combine kernels of cuda/, run by the emulator, against float64 over exactly the rows that they may read.

Whatever may not be read is NaN. Tolerance: twice the error of torch computing the same in the storage type, and rounding noise.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from emu.runtime import CUDA, EmulatedRuntime, available
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saap_index import reference
from saap_index.backends.cuda import scan as gpu_scan
from saap_index.backends.cuda.scan import Listed, Runs, Scan, ScanShape
from saap_index.backends.types import Tail

pytestmark = pytest.mark.skipif(not available(), reason="needs a C++ compiler")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NOISE = 2.0**-20
LISTS, SEGMENTS, WITH_MEANS = 5, 4, 3

# Small blocks: what is shipped has more warps of the same, and room for more runs.
SMALL = {"SAAP_WARPS": 2, "SAAP_STAGES": 3, "SAAP_RUNS": 32}
MODELS = [
    (128, 128, BF16, BF16, 8, {**SMALL, "SAAP_WARPS": 3}),
    (64, 64, BF16, BF16, 16, SMALL),
    (256, 256, BF16, BF16, 16, {**SMALL, "SAAP_STAGES": 2}),
    (192, 128, F16, F16, 8, SMALL),
    (96, 64, F16, BF16, 16, {**SMALL, "SAAP_STAGES": 4}),
    (32, 96, BF16, F32, 16, {**SMALL, "SAAP_WARPS": 1}),
    (72, 40, F16, F32, 8, SMALL),
    (128, 32, F32, F32, 8, SMALL),
    (40, 256, F32, BF16, 8, {**SMALL, "SAAP_STAGES": 2}),
]
MODEL_IDS = [f"{d}-{e}-{str(s)[6:]}-{str(q)[6:]}-{j}" for d, e, s, q, j, _ in MODELS]


@dataclass(frozen=True)
class Case:
    """sequences: (sinks, sealed, length) of each. share: of the sealed rows that is listed. entries: most runs by their means.

    junk: numbers outside the arena in the lists, counts beyond the capacity of a list. runs: rows are given as runs. weighted:
    as runs some of which are samples, with a bias each.
    """

    sequences: tuple[tuple[int, int, int], ...]
    heads: int = 2
    g: int = 2
    q: int = 1
    share: float = 0.3
    entries: int = 0
    causal: bool = False
    dense: bool = False
    junk: bool = False
    runs: bool = False
    weighted: bool = False
    logit: float = 1.0
    seed: int = 0


sequences = st.tuples(st.integers(0, 5), st.integers(0, 120), st.integers(0, 40)).map(lambda x: (x[0], x[0] + x[1], sum(x)))
cases = st.builds(
    Case,
    st.lists(sequences, min_size=1, max_size=3).map(tuple),
    heads=st.integers(1, 2),
    g=st.integers(1, 16),
    q=st.sampled_from([1, 1, 2, 3, 8]),
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    entries=st.sampled_from([0, 0, 3, 15, 20]),
    causal=st.booleans(),
    dense=st.booleans(),
    junk=st.booleans(),
    runs=st.booleans(),
    weighted=st.booleans(),
    logit=st.sampled_from([0.1, 1.0, 8.0]),
    seed=st.integers(0, 2**31 - 1),
)


@dataclass
class Data:
    queries: Tensor
    keys: Tensor
    values: Tensor
    meta: Tensor
    listed: Listed
    means: Tail
    rows: list[list[np.ndarray]]
    runs: list[list[np.ndarray]]
    biases: list[list[np.ndarray]]
    weighted: Runs | None = None


def make(case: Case, d: int, e: int, storage: torch.dtype, query: torch.dtype) -> Data:
    """Tensors of a case; NaN wherever nothing may be read."""
    rng, generator = np.random.default_rng(case.seed), torch.Generator().manual_seed(case.seed)
    b, h, capacity = len(case.sequences), case.heads, max(n for _, _, n in case.sequences) + 3

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def emptied(like: Tensor) -> Tensor:
        return torch.full_like(like, float("nan"))

    all_keys, all_values = randn(b, h, capacity, d).to(storage), randn(b, h, capacity, e).to(storage)
    keys, values = emptied(all_keys), emptied(all_values)
    all_mean_keys = randn(b, h, WITH_MEANS, LISTS, d).to(storage)
    all_mean_values = randn(b, h, WITH_MEANS, LISTS, e).to(storage)
    mean_keys, mean_values = emptied(all_mean_keys), emptied(all_mean_values)
    sizes = torch.from_numpy(rng.integers(1, 40, (b, h, SEGMENTS, LISTS)))
    tables = torch.nn.functional.pad(sizes.cumsum(-1), (1, 0)).int()
    chosen: list[list[np.ndarray]] = []
    runs: list[list[np.ndarray]] = []
    biases: list[list[np.ndarray]] = []
    samples: list[np.ndarray] = []
    for i, (sinks, sealed, length) in enumerate(case.sequences):
        chosen.append([])
        runs.append([])
        biases.append([])
        for head in range(h):
            some = rng.choice(np.arange(sinks, sealed), round(case.share * (sealed - sinks)), replace=False)
            bias = np.zeros(len(some))
            if case.weighted:
                some, bias, sample = sampled(sinks, sealed, case.share, rng)
                samples.append(sample)
            biases[-1].append(bias)
            read = np.arange(length) if case.dense else np.r_[:sinks, np.sort(some), sealed:length]
            keys[i, head, read], values[i, head, read] = all_keys[i, head, read], all_values[i, head, read]
            chosen[-1].append(np.sort(some))
            runs[-1].append(np.sort(rng.choice(WITH_MEANS * LISTS, rng.integers(0, min(case.entries, 15) + 1), replace=False)))
            for to, source in ((mean_keys, all_mean_keys), (mean_values, all_mean_values)):
                to[i, head].flatten(0, 1)[runs[-1][-1]] = source[i, head].flatten(0, 1)[runs[-1][-1]]
    outside = (-1, capacity, -(2**31), 2**31 - 1) if case.junk and not case.weighted else ()
    rows, counts = padded(chosen, outside, rng)
    tail, tail_counts = padded(runs, (-1, WITH_MEANS * LISTS, 2**31 - 1) if case.junk else (), rng)
    meta = torch.full((b, 8), -7, dtype=torch.int32)
    meta[:, :3] = torch.tensor([(n, s, m) for s, m, n in case.sequences], dtype=torch.int32)
    queries = (case.logit * randn(b, h, case.g * case.q, d)).to(query)
    listed, means = Listed(rows, counts), Tail(tail, tail_counts, mean_keys, mean_values, tables)
    weighted = weighted_runs(samples, listed) if case.weighted else None
    return Data(queries, keys, values, meta, listed, means, chosen, runs, biases, weighted)


ONE = 1 << 20


def sampled(sinks: int, sealed: int, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows [sinks, sealed) as runs of which every row is read with a probability of about ``share``, or for certain: the
    rows, their biases, and of each run with rows first, rows, probability, offset and bias."""
    rows, biases, found, at, phase = [], [], [], sinks, ONE // 2
    while at < sealed:
        size = int(rng.integers(1, min(40, sealed - at) + 1))
        probability = ONE if rng.random() < share / 2 else int(ONE * rng.uniform(0, max(share, 0.01))) + 1
        ends = phase % ONE + probability * np.arange(1, size + 1)
        mine = at + np.flatnonzero(ends // ONE > (ends - probability) // ONE)
        bias = min(np.log(ONE / probability), 1.4)
        if len(mine):
            found.append((at, len(mine), probability, phase % ONE if probability < ONE else 0, bias))
        rows.append(mine)
        biases.append(np.full(len(mine), bias))
        at, phase = at + size, int(ends[-1])
    nothing = np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 5))
    return (np.concatenate(rows), np.concatenate(biases), np.array(found).reshape(-1, 5)) if rows else nothing


def weighted_runs(samples: list[np.ndarray], listed: Listed) -> Runs:
    b, h = listed.counts.shape
    most = max(map(len, samples)) + 2
    runs, weights = np.full((b * h, most, 2), 2**30, np.int32), np.zeros((b * h, most), gpu_scan.WEIGHT)
    for i, x in enumerate(samples):
        first, rows, probability, offset, bias = x.T
        runs[i, : len(x)] = np.stack([first + rows, rows.cumsum()], 1)
        for name, of in (("before", rows.cumsum() - rows), ("probability", probability), ("offset", offset), ("bias", bias)):
            weights[i, : len(x)][name] = of
    counts = torch.tensor([len(x) for x in samples], dtype=torch.int32).view(b, h)
    numbers = torch.from_numpy(weights.view(np.int32).reshape(b, h, most, 4))
    made = Runs(torch.from_numpy(runs).view(b, h, most, 2), counts, listed.counts, listed.rows.shape[2], numbers)
    read = torch.arange(listed.rows.shape[2]) < listed.counts[..., None]
    assert torch.equal(made.rows()[read], listed.rows[read])
    return made


def padded(lists: list[list[np.ndarray]], junk: tuple[int, ...], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Lists as int32 (b, h, t), padded with -1, and their counts; with junk in between, and counts beyond t."""
    mixed = [[rng.permutation(np.concatenate([x, junk])) if junk else x for x in row] for row in lists]
    t = max(len(x) for row in mixed for x in row)
    out = torch.full((len(lists), len(lists[0]), t), -1, dtype=torch.int32)
    counts = torch.zeros((len(lists), len(lists[0])), dtype=torch.int32)
    for i, row in enumerate(mixed):
        for head, x in enumerate(row):
            out[i, head, : len(x)] = torch.from_numpy(x.astype(np.int32))
            counts[i, head] = 2**31 - 1 if junk and len(x) == t else len(x)
    return out, counts


def as_runs(listed: Listed) -> Runs:
    """The same rows in the same order, neighbours together; junk in front of, behind and between them is a run of its own."""
    found: list[list[np.ndarray]] = []
    for rows, counts in zip(listed.rows.numpy(), listed.counts.clamp(max=listed.rows.shape[2]).tolist(), strict=True):
        found.append([])
        for x, count in zip(rows, counts, strict=True):
            x = x[: max(count, 0)].astype(np.int64)
            last = np.flatnonzero(np.diff(x, append=2**40) != 1)
            found[-1].append(np.stack([x[last] + 1, last + 1], 1) if len(x) else np.zeros((0, 2), np.int64))
    most = max(len(x) for row in found for x in row) + 2
    runs = np.full((*listed.counts.shape, most, 2), 2**30, np.int64)
    for i, row in enumerate(found):
        for head, x in enumerate(row):
            runs[i, head, : len(x)] = x
    run_counts = torch.tensor([[len(x) for x in row] for row in found], dtype=torch.int32)
    made = Runs(torch.from_numpy(runs.astype(np.int32)), run_counts, listed.counts, listed.rows.shape[2])
    for i, head in np.ndindex(*listed.counts.shape):
        count = max(0, min(int(listed.counts[i, head]), listed.rows.shape[2]))
        assert torch.equal(made.rows()[i, head, :count], listed.rows[i, head, :count])
    return made


def run(
    runtime: EmulatedRuntime, case: Case, data: Data, knobs: dict[str, int], launches: int = 1, healthy: bool = True
) -> tuple[Tensor, Tensor]:
    b, h, j, d = data.queries.shape
    e, capacity = data.values.shape[-1], data.keys.shape[2]
    shape = ScanShape(b, h, j, case.q, d, e, data.keys.dtype, data.queries.dtype, capacity, case.causal, case.dense)
    scan = Scan(runtime, replace(shape, weighted=case.weighted), knobs)
    floats, tickets = torch.full((scan.num_floats,), float("nan")), torch.zeros(scan.num_tickets, dtype=torch.int32)
    out, lse = torch.full((b, h, j, e), float("nan"), dtype=data.queries.dtype), torch.full((b, h, j), float("nan"))
    means, listed = data.means, data.listed
    tensors = [data.queries, data.keys, data.values, data.meta, out, lse, floats, tickets]
    tensors += [listed.rows, listed.counts, means.runs, means.counts, means.keys, means.values, means.tables]
    with runtime.allow(*tensors):
        used = means if case.entries else None
        found = data.weighted or (as_runs(listed) if case.runs else listed)
        launch = scan.bind(data.keys, data.values, data.meta, found, used, d**-0.5, floats, tickets)
        for _ in range(launches):
            launch(queries=data.queries, out=out, lse=lse)
    assert not (healthy and tickets.any())
    return out, lse


def check(case: Case, data: Data, out: Tensor, lse: Tensor) -> None:
    d = data.queries.shape[-1]
    ours = theirs = largest = spread = 0.0
    reach = max(1.0, case.logit)  # rounding of a logit grows with it
    # Queries of another type than 16-bit keys are two numbers of that type each, and so are their weights: twice the bits.
    plain = data.keys.dtype == F32 or data.queries.dtype == data.keys.dtype
    split = 0.0 if plain else 2 * torch.finfo(data.keys.dtype).eps ** 2
    for i, (sinks, sealed, length) in enumerate(case.sequences):
        for head in range(case.heads):
            mine, runs = data.rows[i][head], data.runs[i][head] if case.entries and not case.dense else np.empty(0, int)
            rows = np.arange(length) if case.dense else np.r_[:sinks, mine, sealed:length]
            k = torch.cat([data.keys[i, head, rows], data.means.keys[i, head].flatten(0, 1)[runs]])
            v = torch.cat([data.values[i, head, rows], data.means.values[i, head].flatten(0, 1)[runs]])
            sizes = data.means.tables[i, head].diff(dim=-1)[:WITH_MEANS].flatten()[runs].double()
            of_rows = torch.zeros(len(rows)).double()
            if not case.dense:
                of_rows[sinks : sinks + len(mine)] = torch.from_numpy(data.biases[i][head])
            bias = torch.cat([of_rows, sizes.log()])
            seen = np.ones((case.g * case.q, len(k)), dtype=bool)
            if case.causal:
                recent = np.arange(len(k)) >= (0 if case.dense else sinks + len(mine))
                recent[len(rows) :] = False
                row = np.r_[rows, np.zeros(len(runs), int)]
                for j in range(len(seen)):
                    seen[j] = ~recent | (row < length - case.q + 1 + j % case.q)
            x = data.queries[i, head]
            # a further dim carries the logarithm of the size of a run
            wide_x = torch.cat([x.double(), torch.ones(len(x), 1)], -1).numpy()
            wide_k = torch.cat([k.double(), bias[:, None] * d**0.5], -1).numpy()
            want, want_lse = reference.attend(wide_x, wide_k, v.double().numpy(), d**-0.5, seen)
            got, got_lse = out[i, head].double().numpy(), lse[i, head].double().numpy()
            assert np.isfinite(got).all()
            ours = max(ours, np.abs(got - want).max(initial=0))
            largest = max(largest, np.abs(want).max(initial=0))
            logits = ((x.to(k.dtype) @ k.T).float() * d**-0.5 + bias.float()).masked_fill(~torch.from_numpy(seen), -np.inf)
            low = (torch.softmax(logits, -1).nan_to_num(0.0).to(v.dtype) @ v).to(x.dtype)
            theirs = max(theirs, np.abs(low.double().numpy() - want).max(initial=0))
            part = split * (np.abs(wide_x) @ np.abs(wide_k).T).max(initial=0) * d**-0.5
            spread = max(spread, part)
            empty = ~seen.any(1)
            assert (got[empty] == 0).all() and (got_lse[empty] == -np.inf).all()
            assert np.abs(got_lse[~empty] - want_lse[~empty]).max(initial=0) <= NOISE * reach * 8 + part
    limit = 2 * theirs if not split else (2 * spread + split) * 2 * float(data.values.nan_to_num().abs().max())
    limit += largest * torch.finfo(data.queries.dtype).eps / 2 + NOISE * reach * 8
    assert ours <= limit, f"error {ours:.3g} > {limit:.3g}; torch's {theirs:.3g}, largest {largest:.3g}"


def legal(case: Case) -> Case:
    """Causal needs the last q rows recent, or all rows."""
    if case.causal and not case.dense and any(n - m < case.q and m for _, m, n in case.sequences):
        return replace(case, causal=False)
    return case


@pytest.mark.parametrize("model", MODELS, ids=MODEL_IDS)
@settings(max_examples=12)
@given(case=cases, order=st.sampled_from(["fifo", "lifo", "random"]), inflight=st.integers(1, 4))
def test_scan(model: tuple, case: Case, order: str, inflight: int) -> None:
    d, e, storage, query, j, knobs = model
    macros = gpu_scan.configuration(d, e, storage, query, j, EmulatedRuntime.max_shared_bytes)
    knobs = {**knobs, "SAAP_GROUPS": macros["SAAP_GROUPS"]}  # one build for all j: what is in excess is zeros
    case = legal(case)
    data = make(case, d, e, storage, query)
    check(case, data, *run(EmulatedRuntime(order, case.seed, inflight), case, data, knobs))


SMALLEST = (32, 32, BF16, BF16, 8, SMALL)


def smallest(case: Case, **schedule: object) -> tuple[Tensor, Tensor]:
    d, e, storage, query, _, knobs = SMALLEST
    knobs = {**knobs, "SAAP_GROUPS": 1, "SAAP_TILE": 16}
    return run(EmulatedRuntime(**schedule), case, make(case, d, e, storage, query), knobs)  # type: ignore[arg-type]


@settings(max_examples=10)
@given(case=cases)
def test_same_bits_under_every_schedule(case: Case) -> None:
    case = legal(case)
    out, lse = smallest(case)
    for order, inflight in (("lifo", 1), ("random", 4), ("random", 3)):
        other, other_lse = smallest(case, order=order, inflight=inflight, seed=inflight)
        assert torch.equal(out.view(torch.int16), other.view(torch.int16)) and torch.equal(lse, other_lse)


CORNERS = {
    "nothing": Case(((0, 0, 0),) * 3, dense=True),
    "nothing but sequences": Case(((0, 0, 0), (2, 60, 90), (0, 0, 0), (0, 0, 1)), entries=3),
    "many empty pairs": Case((*((0, 0, 0),) * 30, (4, 100, 140), *((0, 0, 0),) * 9), heads=2),
    "many pairs": Case(((0, 0, 3), (1, 50, 59)) * 20, heads=2),
    "more pairs than places": Case(((0, 0, 3), (1, 50, 59), (0, 0, 0)) * 30, heads=2),
    "one token": Case(((0, 0, 1),), heads=1),
    "one long": Case(((3, 900, 950),), heads=1, share=1.0),
    "tail alone": Case(((0, 0, 0), (0, 60, 60)), share=0.0, entries=15),
    "more queries than rows": Case(((0, 0, 3),), q=8, causal=True, dense=True),
    "fewer recent rows than queries": Case(((2, 60, 61),), q=4, share=0.5, entries=4, causal=True),
    "huge logits": Case(((2, 80, 100),), logit=2500.0, q=2, causal=True),
    "junk": Case(((1, 40, 60), (0, 0, 9)), junk=True, entries=12),
    "runs": Case(((3, 900, 950), (0, 0, 9)), share=0.5, entries=3, runs=True),
    "many pairs in runs": Case(((0, 0, 3), (1, 50, 59), (0, 0, 0)) * 30, heads=2, share=0.5, runs=True),
    "junk in runs": Case(((1, 40, 60), (0, 0, 9)), junk=True, entries=12, runs=True),
    "samples": Case(((3, 900, 950), (0, 0, 9), (1, 30, 40)), share=0.4, entries=3, weighted=True, causal=True),
    "more samples than a block has at hand": Case(((2, 2400, 2450),), heads=1, share=0.2, weighted=True),
}


@pytest.mark.parametrize("name", CORNERS)
def test_corners(name: str) -> None:
    d, e, storage, query, _, _ = SMALLEST
    case = CORNERS[name]
    check(case, make(case, d, e, storage, query), *smallest(case))


def test_as_shipped() -> None:
    """All the warps and stages of a device with 227 KB of shared memory a block."""
    case = Case(((4, 700, 760), (0, 0, 33), (4, 90, 120)), g=4, q=2, share=0.6, entries=9, causal=True)
    data = make(case, 128, 128, BF16, BF16)
    rows = run(EmulatedRuntime("random", 2, 4), case, data, {})
    check(case, data, *rows)
    runs = run(EmulatedRuntime("random", 3, 2), replace(case, runs=True), data, {})
    assert torch.equal(rows[0], runs[0]) and torch.equal(rows[1], runs[1])


KNOBS = [(16, 8, 2, 1), (16, 4, 4, 1), (16, 4, 3, 2), (32, 4, 3, 1), (32, 3, 2, 2)]
"""Worth a try at d = 128: SAAP_TILE, SAAP_WARPS, SAAP_STAGES, SAAP_BLOCKS."""


@pytest.mark.parametrize("knobs", KNOBS)
def test_knobs(knobs: tuple[int, ...]) -> None:
    macros = dict(zip(("SAAP_TILE", "SAAP_WARPS", "SAAP_STAGES", "SAAP_BLOCKS"), knobs, strict=True))
    case = Case(((4, 200, 260), (0, 0, 33), (0, 0, 0)), g=4, share=0.6, entries=9)
    data = make(case, 128, 128, BF16, BF16)
    check(case, data, *run(EmulatedRuntime("random", 2, 4), case, data, macros))


FICKLE = """
#ifdef SAAP_EMU
inline int fickle() {
  static unsigned state = 1;
  state = state * 1664525u + 1013904223u;
  return static_cast<int>(state >> 24) % 40;
}
#endif
SAAP_PRIM Span span_of("""


@pytest.mark.parametrize("name", ["junk", "more pairs than places", "one long", "junk in runs", "runs"])
def test_lengths_that_change_meanwhile(name: str, tmp_path: Path) -> None:
    """Every read of a length or a count gives another: whatever comes out, no block hangs and nothing outside is touched."""
    folder = Path(shutil.copytree(CUDA, tmp_path / "cuda"))
    text = (folder / "scan_walk.cuh").read_text()
    for old, new in (("SAAP_PRIM Span span_of(", FICKLE), ("clamp(meta.x,", "clamp(meta.x - fickle(),"),
                     ("clamp(count,", "clamp(count - fickle(),"), ("clamp(runs,", "clamp(runs - fickle(),")):
        assert old in text
        text = text.replace(old, new)
    (folder / "scan_walk.cuh").write_text(text)
    case = CORNERS[name]
    data = make(case, 32, 32, BF16, BF16)
    data.keys.nan_to_num_(), data.values.nan_to_num_(), data.means.keys.nan_to_num_(), data.means.values.nan_to_num_()
    knobs = {**SMALL, "SAAP_GROUPS": 1, "SAAP_TILE": 16}
    for order, inflight in (("fifo", 2), ("random", 4)):
        run(EmulatedRuntime(order, 1, inflight, cuda=folder), case, data, knobs, launches=2, healthy=False)


def test_clocks() -> None:
    """Each block notes the points that it passes, in order."""
    case = Case(((3, 300, 340),), heads=1, share=1.0)
    data = make(case, 32, 32, BF16, BF16)
    runtime, shape = EmulatedRuntime(), ScanShape(1, 1, 2, 1, 32, 32, BF16, BF16, data.keys.shape[2])
    scan = Scan(runtime, shape, {**SMALL, "SAAP_GROUPS": 1, "SAAP_TILE": 16, "SAAP_CLOCK": 1})
    floats, tickets = torch.empty(scan.num_floats), torch.zeros(scan.num_tickets, dtype=torch.int32)
    clocks = torch.zeros((scan.grid[0], len(gpu_scan.POINTS)), dtype=torch.int64)
    assert clocks.numel() == scan.num_clocks
    out, lse = torch.empty((1, 1, 2, 32), dtype=BF16), torch.empty((1, 1, 2))
    with runtime.allow(data.keys, data.values, floats, tickets, clocks):
        launch = scan.bind(data.keys, data.values, data.meta, data.listed, None, 1.0, floats, tickets, clocks)
        launch(queries=data.queries, out=out, lse=lse)
    assert (clocks.diff(dim=1) > 0).all() and (clocks > 0).all()


def test_infinite_scores() -> None:
    """Logits that overflow to -inf have no weight; a vector all of whose logits do sees nothing."""
    case = Case(((0, 0, 50),), heads=1, g=3, dense=True)
    d, e, storage, query, _, knobs = SMALLEST
    data = make(case, d, e, storage, query)
    data.keys[0, 0, :50, 0] = 3e38
    data.queries[..., 0] = torch.tensor([-3e38, 0.0, -1e38]).to(query)
    data.keys[0, 0, 7, 0] = 0.0
    out, lse = run(EmulatedRuntime(), case, data, {**knobs, "SAAP_GROUPS": 1, "SAAP_TILE": 16})
    assert torch.equal(out[0, 0, 0], data.values[0, 0, 7]) and torch.equal(out[0, 0, 2], data.values[0, 0, 7])
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    data.keys[0, 0, 7, 0] = 3e38
    out, lse = run(EmulatedRuntime(), case, data, {**knobs, "SAAP_GROUPS": 1, "SAAP_TILE": 16})
    assert not out[0, 0, 0].any() and lse[0, 0, 0] == -np.inf and torch.isfinite(lse[0, 0, 1])


@pytest.mark.parametrize("model", MODELS, ids=MODEL_IDS)
@pytest.mark.parametrize("where", ["query", "key", "mean key"])
def test_nan_is_nan_in_out_and_lse(model: tuple, where: str) -> None:
    """As in dense attention: of a vector, all of it; of a key, all that see it. Nothing else changes by a bit."""
    d, e, storage, query, j, knobs = model
    macros = gpu_scan.configuration(d, e, storage, query, j, EmulatedRuntime.max_shared_bytes)
    knobs = {**knobs, "SAAP_GROUPS": macros["SAAP_GROUPS"]}
    case = Case(((3, 400, 440), (0, 0, 20), (1, 60, 70)), g=3, share=0.7, entries=12)  # pairs of several blocks, and of one
    clean = make(case, d, e, storage, query)
    out, lse = run(EmulatedRuntime(), case, clean, knobs)
    data, broken = make(case, d, e, storage, query), torch.zeros(lse.shape, dtype=torch.bool)
    if where == "query":
        broken[:2, 1, 2] = True
        data.queries[:2, 1, 2, d // 2] = torch.nan
    elif where == "key":
        broken[:2, 0] = True
        data.keys[0, 0, 439, 1] = data.keys[1, 0, 5, d - 1] = torch.nan
    else:
        i, head = next((i, head) for i, heads in enumerate(data.runs) for head, runs in enumerate(heads) if len(runs))
        broken[i, head] = True
        data.means.keys[i, head].flatten(0, 1)[data.runs[i][head][0], 3] = torch.nan
    found, found_lse = run(EmulatedRuntime("random", 1, 3), case, data, knobs)
    assert found[broken].isnan().all() and found_lse[broken].isnan().all() and broken.any()
    assert torch.equal(found[~broken], out[~broken]) and torch.equal(found_lse[~broken], lse[~broken])


def test_nonsense_from_the_device_stays_inside() -> None:
    """Lengths and counts that no layout has: whatever comes out, nothing outside is touched."""
    d, e, storage, query, _, knobs = SMALLEST
    case = Case(((2, 30, 50), (0, 0, 20), (1, 9, 9)), entries=6)
    data = make(case, d, e, storage, query)
    data.keys.nan_to_num_(), data.values.nan_to_num_(), data.means.keys.nan_to_num_(), data.means.values.nan_to_num_()
    big = 2**31 - 1
    data.meta[:, :3] = torch.tensor([[big, 7, 3], [-5, 3, 9], [40, big, big]])
    data.listed.counts[0], data.means.counts[1] = -3, big
    data.means.tables[1:].random_(-(2**31), 2**31 - 1)
    small = {**knobs, "SAAP_GROUPS": 1, "SAAP_TILE": 16}
    out, lse = run(EmulatedRuntime("random", 3, 4), case, data, small)
    # what is out of bounds counts as the bound, and with sinks behind the segments there are neither
    data.meta[:, :3] = torch.tensor([[53, 0, 0], [0, 0, 0], [40, 40, 40]])
    data.listed.counts[0], data.means.counts[1] = 0, data.means.runs.shape[2]
    same, same_lse = run(EmulatedRuntime(), case, data, small)
    assert torch.equal(out, same) and torch.equal(lse, same_lse)


@pytest.mark.parametrize("weighted", [False, True])
def test_runs_of_nonsense_stay_inside(weighted: bool) -> None:
    """Runs that no selection writes: whatever comes out, no block hangs and nothing outside is touched."""
    d, e, storage, query, _, knobs = SMALLEST
    data = make(Case(((2, 300, 350),), share=1.0), d, e, storage, query)
    data.keys.nan_to_num_(), data.values.nan_to_num_()
    shape = ScanShape(1, 2, 2, 1, d, e, storage, query, data.keys.shape[2])
    scan = Scan(EmulatedRuntime(), replace(shape, weighted=weighted), {**knobs, "SAAP_GROUPS": 1, "SAAP_TILE": 16})
    floats, tickets = torch.empty(scan.num_floats), torch.zeros(scan.num_tickets, dtype=torch.int32)
    numbers = torch.randint(-(2**31), 2**31 - 1, (1, 2, 77, 6), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    runs, weights = numbers[..., :2].contiguous(), numbers[..., 2:].contiguous() if weighted else None
    counts, out = torch.tensor([[298, 2**31 - 1]], dtype=torch.int32), torch.empty((1, 2, 2, e), dtype=query)
    lse = torch.empty((1, 2, 2))
    for run_counts in ([[77, 2**31 - 1]], [[1, 0]], [[-1, 33]]):
        found = Runs(runs, torch.tensor(run_counts, dtype=torch.int32), counts, 298, weights)
        tensors = [data.queries, data.keys, data.values, data.meta, out, lse, floats, tickets, runs, counts, found.run_counts]
        tensors += [] if weights is None else [weights]
        with EmulatedRuntime().allow(*tensors):
            launch = scan.bind(data.keys, data.values, data.meta, found, None, 1.0, floats, tickets)
            launch(queries=data.queries, out=out, lse=lse)
        assert not tickets.any()


def test_replayed() -> None:
    """A launch leaves the tickets as it found them, and its result does not depend on what the workspace held."""
    case = Case(((3, 300, 340), (0, 0, 30)), share=1.0)
    d, e, storage, query, _, knobs = SMALLEST
    data = make(case, d, e, storage, query)
    first = smallest(case)
    again = run(EmulatedRuntime("random", 1, 3), case, data, {**knobs, "SAAP_GROUPS": 1, "SAAP_TILE": 16}, launches=3)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_shared_memory_is_read_without_conflicts() -> None:
    for d, e, storage, query, j, knobs in MODELS:
        if storage is F32:
            continue
        macros = gpu_scan.configuration(d, e, storage, query, j, EmulatedRuntime.max_shared_bytes)
        knobs = {**knobs, "SAAP_GROUPS": macros["SAAP_GROUPS"]}
        case, runtime = Case(((3, 100, 140),), heads=1, share=1.0), EmulatedRuntime()
        run(runtime, case, make(case, d, e, storage, query), knobs)
        small = gpu_scan.configuration(d, e, storage, query, 2, EmulatedRuntime.max_shared_bytes) | knobs
        kernel = runtime.kernel(*gpu_scan.file_of(storage), small)
        assert len(kernel.conflicts) == 2, "keys and values"
        for place, (phases, further) in kernel.conflicts.items():
            assert phases > 0 and further == 0, (d, e, place)


def once() -> None:
    """What the sanitizers watch, see test_gpu_sanitized.py."""
    small = {"order": "random", "seed": 1, "inflight": 3}
    for name in ("nothing but sequences", "junk", "tail alone", "one long", "more pairs than places", "runs"):
        smallest(CORNERS[name], **small)
    smallest(Case(((2, 150, 190), (0, 0, 25)), share=0.6, q=2, causal=True), **small)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", [(3, 5, 40), (1, 1, 7), (2, 300, 1)])
def test_combine(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(shape[-1])
    outs = [torch.randn(shape, generator=g).to(dtype) for _ in range(2)]
    lses = [4 * torch.randn(shape[:-1], generator=g) for _ in range(2)]
    lses[0].view(-1)[0] = -np.inf
    outs[0].view(-1, shape[-1])[0] = float("nan")  # a side of weight zero may hold anything
    lses[1].view(-1)[-1] = -np.inf
    out, lse = torch.empty_like(outs[0]), torch.empty(shape[:-1])
    runtime = EmulatedRuntime("random", 0, 3)
    with runtime.allow(*outs, *lses, out, lse):
        gpu_scan.combine(runtime, outs[0], lses[0], outs[1], lses[1], out, lse)
    a, b = (x.double().nan_to_num().numpy() for x in outs)
    want, want_lse = reference.merge_states(a, lses[0].double().numpy(), b, lses[1].double().numpy())
    eps = torch.finfo(dtype).eps
    assert np.abs(out.double().numpy() - want).max() <= eps / 2 * np.abs(want).max() + NOISE
    finite = np.isfinite(want_lse)
    assert np.abs(lse.double().numpy()[finite] - want_lse[finite]).max(initial=0) <= NOISE * 8
    assert (lse.numpy()[~finite] == -np.inf).all()


def test_parameter_structs() -> None:
    runtime = EmulatedRuntime()
    scan = gpu_scan.configuration(32, 32, BF16, BF16, 8, runtime.max_shared_bytes) | SMALL | {"SAAP_GROUPS": 1, "SAAP_TILE": 16}
    for (file, name), macros, dtype in (
        (gpu_scan.file_of(BF16), scan, gpu_scan.PARAMS),
        (("combine.cu", "saap_combine"), {"SAAP_T": 1}, gpu_scan.COMBINE_PARAMS),
    ):
        assert runtime.kernel(file, name, macros).sizeof(name.removeprefix("saap_")) == dtype.itemsize
