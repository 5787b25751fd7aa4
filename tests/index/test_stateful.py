"""A random walk through the whole interface; every output is compared with dense attention over the tokens it read."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close, dense, random_router, small_index, tokens
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from profiles import examples

from saap_index import (
    AsymmetricIndex,
    CompatibilityError,
    DeviceError,
    ParameterError,
    Rope,
    SaapError,
    SearchParametersIVF,
    read_index,
    write_index,
)
from saap_index.backends.scalar_quantizer import decode, encode
from saap_index.invlists.segmented import SegmentedInvertedLists

BACKENDS = ("cpu", "torch", "reference")
PARAMS = st.one_of(
    st.none(),
    st.builds(SearchParametersIVF, selectivity=st.sampled_from([0.01, 0.3, 0.9, 1.0]), max_codes=st.sampled_from([0, 1, 7])),
    st.builds(SearchParametersIVF, nprobe=st.integers(1, 5), max_codes=st.sampled_from([0, 9])),
    st.builds(
        SearchParametersIVF, selectivity=st.just(0.1), window=st.integers(0, 40), sinks=st.integers(0, 12),
        tail=st.sampled_from([None, 0.0, 0.5]),
    ),
    st.builds(
        SearchParametersIVF, target_mass=st.sampled_from([0.3, 0.9]), selectivity=st.sampled_from([None, 0.1, 1.0]),
        tail=st.sampled_from([None, 0.3]),
    ),
    st.builds(
        SearchParametersIVF, selectivity=st.sampled_from([0.1, 0.5]), sampled_share=st.sampled_from([0.4, 1.0]),
        sample_cap=st.sampled_from([None, 9.0]), window=st.sampled_from([None, 40]),
    ),
)


class Walk(RuleBasedStateMachine):
    """The model is a list of (position, key, value) per sequence; the index must never disagree with it."""

    backend = "torch"

    @initialize(
        b=st.integers(1, 3), heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (6, 2), (2, 2)]),
        dims=st.sampled_from([(32, 32), (40, 64)]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), rope=st.sampled_from([None, "plain", "dynamic"]),
        sinks=st.integers(0, 5), window=st.integers(0, 20), break_even=st.sampled_from([0, 30]),
        published=st.sampled_from([False, False, True]), means=st.sampled_from([0, 1, 3]), tail=st.sampled_from([0.0, 0.4]),
        shares=st.sampled_from([None, (0.2, 1.5, 9.0)]), target_mass=st.sampled_from([None, None, 0.8]),
        storage=st.sampled_from([None, "SQ8", "SQ8/SQ4"]),
    )
    def start(
        self, b, heads, dims, dtype, rope, sinks, window, break_even, published, means, tail, shares, target_mass, storage
    ) -> None:
        self.b, (self.hq, self.h), (self.d, self.e), self.dtype = b, heads, dims, dtype
        ropes = {
            None: None,
            "plain": Rope(head_dim=self.d, theta=100.0),
            "dynamic": Rope(head_dim=self.d, theta=100.0, scaling="dynamic", factor=2.0, original_max_position=32),
        }
        options = {"sinks": sinks, "window": window, "break_even": break_even, "rope": ropes[rope], "dtype": dtype}
        options |= {"mean_run_tokens": means, "tail": tail if means else 0.0, "target_mass": target_mass}
        options["storage"] = storage
        options["budget_shares"] = None if shares is None else shares[: self.h]
        self.index = small_index(self.d, self.e, 4, self.hq, self.h, backend=self.backend, selectivity=0.2, **options)
        if published:
            self.index.query_router = random_router(self.h, 4, self.d, knots=-1, size_weighted=False)
        self.model: list[list[tuple[int, torch.Tensor, torch.Tensor]]] = [[] for _ in range(b)]
        self.next = [0] * b
        self.seed = 0

    def stand_for(self, i: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Key and value of each token of sequence i, as attention is to see them."""
        code = self.index.options.code
        by_id = {p: (k, v) for p, k, v in self.model[i]}
        if code is None:
            return by_id
        lists, (first, last) = self.index.invlists, self.index.invlists.coded_spans[i]
        coded, bits = lists.row_ids(i)[0, first:last].tolist(), (code.key_bits, code.value_bits)
        for side, n in enumerate(bits if coded else ()):
            x = torch.stack([by_id[p][side] for p in coded])
            for p, row in zip(coded, decode(encode(x, n), x.shape[-1], n), strict=True):
                by_id[p] = (row, by_id[p][1]) if side == 0 else (by_id[p][0], row)
        return by_id

    def fresh(self, heads: int, n: int, d: int) -> torch.Tensor:
        self.seed += 1
        return tokens(self.b, heads, n, d, self.dtype, self.seed)

    def remember(self, keys, values, counts) -> None:
        for i, count in enumerate(counts):
            for t in range(count):
                self.model[i].append((self.next[i], keys[i, :, t], values[i, :, t]))
                self.next[i] += 1

    @rule(n=st.integers(0, 70), data=st.data(), ragged=st.booleans())
    def add(self, n, data, ragged) -> None:
        keys, values = self.fresh(self.h, n, self.d), self.fresh(self.h, n, self.e)
        counts = [data.draw(st.integers(0, n)) for _ in range(self.b)] if ragged else [n] * self.b
        self.index.add(keys, values, lengths=counts if ragged else None)
        self.remember(keys, values, counts)

    @rule(steps=st.integers(1, 12))
    def decode(self, steps) -> None:
        for _ in range(steps):
            keys, values = self.fresh(self.h, 1, self.d), self.fresh(self.h, 1, self.e)
            self.index.add(keys, values)
            self.remember(keys, values, [1] * self.b)

    @rule(n=st.integers(1, 20), seed=st.integers(0, 9))
    def add_preassigned(self, n, seed) -> None:
        keys, values = self.fresh(self.h, n, self.d), self.fresh(self.h, n, self.e)
        nos = torch.randint(0, 4, (self.b, self.h, n), generator=torch.Generator().manual_seed(seed))
        self.index.add_preassigned(keys, values, nos)
        self.remember(keys, values, [n] * self.b)

    @rule(data=st.data())
    def truncate(self, data) -> None:
        keep = [data.draw(st.one_of(st.integers(max(0, len(m) - 9), len(m)), st.integers(0, len(m)))) for m in self.model]
        self.index.truncate(keep)
        for i, n in enumerate(keep):
            self.next[i] = self.next[i] if n == len(self.model[i]) else (self.model[i][n - 1][0] + 1 if n else 0)
            self.model[i] = self.model[i][:n]

    @rule(data=st.data())
    def remove_ids(self, data) -> None:
        ids = [data.draw(st.lists(st.integers(0, max(1, n + 3)), max_size=6)) for n in self.next]
        known = [{p for p, _, _ in m} for m in self.model]
        removed = self.index.remove_ids([np.array(x, np.int64) for x in ids])
        assert removed == sum(len(set(x) & k) for x, k in zip(ids, known, strict=True))
        self.model = [[t for t in m if t[0] not in x] for m, x in zip(self.model, ids, strict=True)]

    @rule(data=st.data())
    def remove_padding(self, data) -> None:
        """As `remove_ids`, but later tokens move up by as many as were removed before them."""
        ids = [sorted(data.draw(st.sets(st.integers(0, max(1, n + 3)), max_size=6))) for n in self.next]
        self.index.remove_ids([np.array(x, np.int64) for x in ids], close_gaps=True)
        for i, x in enumerate(ids):
            gone = [p for p, _, _ in self.model[i] if p in x]
            self.model[i] = [(p - sum(g < p for g in gone), k, v) for p, k, v in self.model[i] if p not in x]
            self.next[i] -= len(gone)

    @precondition(lambda self: self.index.lengths and min(self.index.lengths) > 8)
    @rule(n=st.integers(1, 8), first=st.integers(0, 9))
    def replace(self, n, first) -> None:
        """As many in as out: all lengths are what they were, and what was made from them need not be."""
        ids = [[p for p, _, _ in m][-first - n : len(m) - first] for m in self.model]
        n = min(map(len, ids))
        ids = [np.array(x[:n], np.int64) for x in ids]
        self.index.remove_ids(ids)
        self.model = [[t for t in m if t[0] not in x] for m, x in zip(self.model, ids, strict=True)]
        keys, values = self.fresh(self.h, n, self.d), self.fresh(self.h, n, self.e)
        self.index.add(keys, values)
        self.remember(keys, values, [n] * self.b)

    @rule()
    def reset(self) -> None:
        self.index.reset()
        self.model, self.next = [[] for _ in range(self.b)], [0] * self.b

    @precondition(lambda self: self.index.lengths)
    @rule(data=st.data())
    def fork(self, data) -> None:
        before = self.index
        order = [data.draw(st.integers(0, self.b - 1)) for _ in range(self.b)]
        self.index = before.fork(order)
        before.reset()
        self.model, self.next = [list(self.model[i]) for i in order], [self.next[i] for i in order]

    @precondition(lambda self: self.index.lengths)
    @rule(data=st.data())
    def reorder(self, data) -> None:
        order = [data.draw(st.integers(0, self.b - 1)) for _ in range(self.b)]
        copy = self.index.fork(order)
        self.index.reorder(order)
        self.model, self.next = [list(self.model[i]) for i in order], [self.next[i] for i in order]
        same_state(self.index, copy)

    @precondition(lambda self: self.index.lengths)
    @rule(n=st.integers(0, 70))
    def add_and_seal_later(self, n) -> None:
        keys, values = self.fresh(self.h, n, self.d), self.fresh(self.h, n, self.e)
        copy = self.index.fork()
        copy.add(keys, values)
        self.index.add(keys, values, seal=False)
        for i, length in enumerate(self.index.lengths):
            rows = slice(length - n, length)
            at = torch.arange(length, dtype=torch.int64)[rows].expand(self.h, -1)
            for stored, new in zip(self.index.invlists.rows(i, at), (keys, values), strict=True):
                assert torch.equal(stored, new[i]), "new tokens lie in arrival order"
        self.index.seal()
        self.remember(keys, values, [n] * self.b)
        same_state(self.index, copy)

    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "index.safetensors"
            write_index(self.index, path)
            before, self.index = self.index, read_index(path, backend=self.backend)
        assert self.index.options.params == before.options.params and self.index.layout == before.layout
        assert np.array_equal(self.index.budget_shares, before.budget_shares)

    @rule(n=st.integers(0, 300))
    def reserve(self, n) -> None:
        self.index.reserve_memory(n, batch=self.b)

    @rule()
    def reclaim(self) -> None:
        assert self.index.reclaim_memory() >= 0

    @rule(window=st.integers(0, 24))
    def change_window(self, window) -> None:
        self.index.window = window

    @rule(value=st.sampled_from([0, 1, 2, 30]))
    def change_means(self, value) -> None:
        if not value and self.index.tail:
            with pytest.raises(ParameterError, match="mean_run_tokens"):
                self.index.mean_run_tokens = value
        else:
            self.index.mean_run_tokens = value

    @rule(value=st.sampled_from([None, (0.0, 0.5, 2.0)]))
    def change_shares(self, value) -> None:
        self.index.budget_shares = None if value is None else value[: self.h]

    def refusal(self, params) -> type[SaapError] | None:
        """What a search with these parameters raises on an index that holds tokens."""
        try:
            asked = params.over(self.index.options.params) if params else self.index.options.params
        except ParameterError:  # a sample beside a tail
            return ParameterError
        if asked.tail and not self.index.mean_run_tokens:
            return ParameterError
        if asked.sampled_share and not self.index.query_router.size_weighted:
            return CompatibilityError
        if asked.sampled_share and not self.index._backend.reads_samples:
            return DeviceError
        if asked.target_mass is not None and not self.index.query_router.predicts_outside:
            return CompatibilityError
        everything = all(
            asked.budget(high - low, share) == high - low
            for i in range(self.b) for low, high in [(self.index.invlists.sinks(i), self.index.invlists.sealed(i))]
            for share in ([1.0] if self.index.budget_shares is None else self.index.budget_shares)
        )
        if asked.tail and not asked.nprobe and not self.index.query_router.size_weighted and not everything:
            return CompatibilityError
        return None

    @rule(q=st.integers(1, 8), params=PARAMS, seed=st.integers(0, 5))
    def search_attend(self, q, params, seed) -> None:
        queries = tokens(self.b, self.hq, q, self.d, torch.float32, 1000 + seed)
        refused = self.refusal(params) if self.index.lengths else None
        if refused is not None:
            with pytest.raises(refused):
                self.index.search_attend(queries, params=params)
            return
        out, lse = self.index.search_attend(queries, params=params, return_lse=True)
        if not self.index.lengths:
            assert not out.any() and bool((lse == -torch.inf).all())
            return
        selection = self.index.select(queries, params=params)
        self.compare(queries, out, lse, selection)
        self.check_budget(selection, params)

    @rule(q=st.integers(1, 3), data=st.data())
    def search_preassigned(self, q, data) -> None:
        if not self.index.lengths:
            return
        lists = [data.draw(st.lists(st.integers(-1, 3), min_size=2, max_size=2)) for _ in range(self.b * self.h)]
        nos = torch.tensor(lists).view(self.b, self.h, 2)
        queries = tokens(self.b, self.hq, q, self.d, torch.float32, 7)
        out, lse = self.index.search_attend_preassigned(queries, nos, return_lse=True)
        self.compare(queries, out, lse, self.index._last)

    @rule(k=st.integers(1, 5))
    def search(self, k) -> None:
        if not self.index.lengths:
            return
        queries = tokens(self.b, self.hq, 1, self.d, torch.float32, 3)
        full = SearchParametersIVF(selectivity=1.0)
        refused = self.refusal(full)
        if refused is not None:
            with pytest.raises(refused):
                self.index.search(queries, k, params=full)
            return
        scores, ids = self.index.search(queries, k, params=full)
        for i in range(self.b):
            model = [key for key, _ in self.stand_for(i).values()]
            for head in range(self.hq):
                keys = torch.stack([key[head * self.h // self.hq].float() for key in model]) if model else torch.empty(0, self.d)
                want = (keys @ queries[i, head, 0]).sort(descending=True).values[:k]
                assert torch.allclose(scores[i, head, 0, : len(want)], want, rtol=1e-4, atol=1e-4)
                assert bool((ids[i, head, 0, len(want) :] == -1).all())

    def compare(self, queries, out, lse, selection) -> None:
        """``out`` and ``lse`` against float64 attention over the tokens and means read, with the causal tail hidden."""
        read = self.index.read_ids(selection)
        q, g = queries.shape[2], self.hq // self.h
        for i, model in enumerate(self.model):
            by_id = self.stand_for(i)
            newest = [p for p, _, _ in model][-q:]
            for head in range(self.h):
                ids = read[i][head].tolist()
                assert len(set(ids)) == len(ids) and set(ids) <= set(by_id)
                assert set(newest) <= set(ids), "recent tokens are always read"
                keys = torch.stack([by_id[p][0][head].float() for p in ids]) if ids else torch.empty(0, self.d)
                values = torch.stack([by_id[p][1][head].float() for p in ids]) if ids else torch.empty(0, self.e)
                rank = np.searchsorted([p for p, _, _ in model], ids)
                hidden = rank[None] > (len(model) - q + np.arange(q))[:, None]
                part = slice(head * g, head * g + g)
                mean_keys, mean_values, sizes = self.entries(selection, i, head, ids)
                keys, values = torch.cat([keys, mean_keys.float()]), torch.cat([values, mean_values.float()])
                hidden = np.concatenate([hidden, np.zeros((q, len(sizes)), bool)], 1)
                stand_for = np.concatenate([self.counted(selection, i, head, ids), sizes])
                want, want_lse = dense(queries[i, part], keys, values, self.index.scale, hidden, stand_for)
                assert_close(out[i, part], want, torch.float32, float(values.abs().max()) if ids else 1.0)
                finite = np.isfinite(want_lse)
                assert bool((lse[i, part].numpy()[~finite] == -np.inf).all())
                assert_close(lse[i, part][torch.from_numpy(finite)], want_lse[finite], torch.float32, 10.0)

    def counted(self, selection, i, head, ids) -> np.ndarray:
        """How many tokens each of those read stands for: more than one where it was sampled."""
        if selection.biases is None:
            return np.ones(len(ids))
        count = int(selection.counts[i, head])
        bias = selection.biases[i, head, :count].double().numpy()
        rows = selection.rows[i, head, :count].long()
        assert bool((bias >= 0).all())
        of_token = dict(zip(self.index.invlists.ids[i, head, rows].tolist(), np.exp(bias), strict=True))
        return np.array([of_token.get(x, 1.0) for x in ids])

    def entries(self, selection, i, head, ids) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Mean keys and values of the tail of one KV head, and the tokens each stands for, none of which is among ``ids``."""
        lists, runs = self.index.invlists, np.empty(0, np.int64)
        if selection.tail is not None:
            runs = selection.tail[i, head, : selection.tail_counts[i, head]].long().cpu().numpy()
        positions, sizes = lists.row_ids(i)[head], []
        for run in runs:
            low, high = lists.tables[i, head, run // 4, run % 4 : run % 4 + 2].tolist()
            assert run // 4 < lists.num_means(i) and low < high and not set(positions[low:high].tolist()) & set(ids)
            sizes.append(high - low)
        means = (x[i, head].flatten(0, 1)[runs] for x in (lists.mean_keys, lists.mean_values))
        return *means, np.array(sizes, np.float64)

    def check_budget(self, selection, params) -> None:
        settings_ = params.over(self.index.options.params) if params else self.index.options.params
        wide = (settings_.window or 0) > self.index.window or (settings_.sinks or 0) > self.index.sinks
        if selection.counts is None or wide:
            return
        shares = np.ones(self.h) if self.index.budget_shares is None else self.index.budget_shares
        for i, head in np.ndindex(self.b, self.h):
            budget = settings_.budget(selection.sealed[i] - selection.sinks[i], float(shares[head]))
            rows, tail = int(selection.counts[i, head]), 0
            if selection.tail is not None:
                tail = int(selection.tail_counts[i, head])
                assert tail <= settings_.tail * budget + 1e-6 and rows + tail <= budget
            if selection.biases is not None:
                assert budget - 1 <= rows <= budget, "so is one of which a part is sampled, but for a token"
            elif settings_.nprobe is None and settings_.target_mass is None and selection.tail is None:
                assert rows == budget, "the budget is spent exactly"
            else:
                assert rows <= budget

    @invariant()
    def a_search_reads_what_is_selected_now(self) -> None:
        """After every change, and so before the next: nothing that a search was prepared from may be of before."""
        if not hasattr(self, "index") or not self.index.lengths or self.refusal(None):
            return
        queries = tokens(self.b, self.hq, 1, self.d, torch.float32, 77)
        out, last = self.index.search_attend(queries), self.index._last
        chosen = self.index.select(queries)
        assert (last.rows is None) == (chosen.rows is None)
        read = [self.index.read_ids(x) for x in (last, chosen)]  # a device writes rows in an order of its own
        assert all(torch.equal(x, y) for a, b in zip(*read, strict=True) for x, y in zip(a, b, strict=True))
        assert torch.equal(out, self.index.attend_selected(queries, chosen))
        for i, model in enumerate(self.model):
            at = [p for p, _, _ in model]
            lists = self.index.invlists
            bounds, merging = list(lists.segments[i]), lists.merging[i]
            if merging is not None:
                parts = slice(merging.first, merging.stop)
                bounds[parts] = [(bounds[parts][0][0], bounds[parts][-1][1])] * len(bounds[parts])
            middles = [(at[start] + at[stop - 1]) / 2 for start, stop in bounds]
            assert self.index.invlists.centres(i).tolist() == middles

    @invariant()
    def means_are_those_of_the_runs(self) -> None:
        if not hasattr(self, "index") or not self.index.lengths:
            return
        lists, eps = self.index.invlists, torch.finfo(self.dtype).eps
        for i in range(self.b):
            for s in range(lists.num_means(i)):
                at = torch.arange(lists.lengths[i], dtype=torch.int64).expand(self.h, -1)
                for x, means in zip(lists.rows(i, at), (lists.mean_keys, lists.mean_values), strict=True):
                    for head, no in np.ndindex(self.h, 4):
                        low, high = lists.tables[i, head, s, no], lists.tables[i, head, s, no + 1]
                        want = x[head, low:high].double().sum(0) / max(1, int(high - low))
                        size = 1 if lists.code is None else 4  # what codes stand for is rounded to the storage type here
                        assert float((means[i, head, s, no].double() - want).abs().max()) <= 4 * eps * size + 1e-6

    @invariant()
    def holds_every_token_once(self) -> None:
        if not hasattr(self, "index") or not self.index.lengths:
            return
        lists = self.index.invlists
        assert self.index.ntotal == sum(map(len, self.model))
        for i, model in enumerate(self.model):
            positions = np.array([p for p, _, _ in model], np.int64)
            row_ids = lists.row_ids(i).numpy()
            for head in range(self.h):
                assert np.array_equal(np.sort(row_ids[head]), positions), "ids are a permutation of the positions"
            if len(model):
                probe = model[len(model) // 2]
                keys, values = self.index.reconstruct([probe[0]], sequence=i)
                want = [x.to(self.dtype) for x in self.stand_for(i)[probe[0]]]
                assert torch.equal(keys[:, 0], want[0]) and torch.equal(values[:, 0], want[1])
            length, block = len(model), lists.layout.block
            assert lists.arrangement(i) == lists.layout.arrangement(length, self.h)
            for s, (start, stop) in enumerate(lists.segments[i]):
                assert stop - start <= max(block, length - stop), "a segment is never longer than it is old"
                tables = lists.tables[i, :, s].numpy()
                assert (np.diff(tables, axis=1) >= 0).all() and (tables[:, 0] == start).all() and (tables[:, -1] == stop).all()
                for head in range(self.h):
                    for low, high in zip(tables[head, :-1], tables[head, 1:], strict=True):
                        assert (np.diff(row_ids[head, low:high]) > 0).all(), "time order inside a run"

    @invariant()
    def codes_are_of_the_tokens_as_they_came(self) -> None:
        """Bit for bit, whatever happened to a token since it was sealed: made once, from the token alone."""
        if not hasattr(self, "index") or not self.index.lengths or self.index.options.code is None:
            return
        lists, code = self.index.invlists, self.index.options.code
        for i, model in enumerate(self.model):
            by_id, ids, (first, last) = {p: (k, v) for p, k, v in model}, lists.row_ids(i), lists.coded_spans[i]
            if lists.segments[i]:
                assert first <= lists.sinks(i) and lists.sealed(i) <= last
            for head in range(self.h if last > first else 0):
                tokens_of = [by_id[p] for p in ids[head, first:last].tolist()]
                for side, stored, bits in ((0, lists.keys, code.key_bits), (1, lists.values, code.value_bits)):
                    want = encode(torch.stack([pair[side][head] for pair in tokens_of]), bits)
                    assert torch.equal(stored[i, head, first:last], want)


def same_rows(x: SegmentedInvertedLists, y: SegmentedInvertedLists, i: int) -> bool:
    """Whether two batches hold the same bytes of sequence i: codes where they are, and numbers."""
    first, last = x.coded_spans[i]
    n = x.lengths[i]
    spans = [(x.keys, y.keys, 0, n), (x.values, y.values, 0, n)]
    if x.code is not None:
        spans = [(a, b, first, last) for a, b, _, _ in spans]
        spans += [(a, b, 0, n - (last - first)) for a, b in zip(x.arena.numbers, y.arena.numbers, strict=True)]
    return x.coded_spans[i] == y.coded_spans[i] and all(
        torch.equal(a[i, :, low:high], b[i, :, low:high]) for a, b, low, high in spans
    )


def same_state(a: AsymmetricIndex, b: AsymmetricIndex) -> None:
    """The two indexes hold the same rows in the same places."""
    x, y = a.invlists, b.invlists
    assert x.lengths == y.lengths and x.segments == y.segments and x.merging == y.merging
    for i in range(x.batch):
        parts = len(x.segments[i])
        assert same_rows(x, y, i)
        assert torch.equal(x.row_ids(i), y.row_ids(i)) and torch.equal(x.tables[i, :, :parts], y.tables[i, :, :parts])
        assert np.array_equal(x.gaps[i].array(), y.gaps[i].array())
        count = x.num_means(i)
        assert count == y.num_means(i) and torch.equal(x.mean_keys[i, :, :count], y.mean_keys[i, :, :count])
        assert torch.equal(x.mean_values[i, :, :count], y.mean_values[i, :, :count])
        count = x.num_means(i)
        assert torch.equal(x.mean_keys[i, :, :count], y.mean_keys[i, :, :count])


@pytest.mark.over_backends("backend", BACKENDS)
def test_walk(backend: str) -> None:
    walk = type(f"Walk_{backend}", (Walk,), {"backend": backend})
    number = {"reference": 10, "torch": 30}.get(backend, 60)
    run_state_machine_as_test(walk, settings=settings(max_examples=examples(number), stateful_step_count=25))


@pytest.mark.parametrize("storage", [None, "SQ8", "SQ8/SQ4"])
def test_one_by_one_equals_at_once(storage: str | None) -> None:
    """The state (with codes, what is sealed) is a function of the tokens alone, however they came: bit for bit."""
    keys, values = tokens(1, 2, 300, 32, seed=1), tokens(1, 2, 300, 32, seed=2)

    def state(index: AsymmetricIndex) -> list[torch.Tensor]:
        lists = index.invlists
        low, high = (0, lists.lengths[0]) if storage is None else (lists.sinks(0), lists.sealed(0))
        s = len(lists.segments[0])
        return [lists.keys[:, :, low:high], lists.values[:, :, low:high], lists.row_ids(0), lists.tables[:, :, :s]]

    at_once, one_by_one, longer = (small_index(storage=storage) for _ in range(3))
    at_once.add(keys[:, :, :250], values[:, :, :250])
    for t in range(250):
        one_by_one.add(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    longer.add(keys, values)
    longer.truncate(250)
    for other in (one_by_one, longer):
        for a, b in zip(state(at_once), state(other), strict=True):
            assert torch.equal(a, b)


def test_inference_mode_may_come_and_go() -> None:
    """What is made in torch's inference mode can be changed outside of it, and the other way round."""
    keys, values = tokens(1, 2, 300, 32, seed=1), tokens(1, 2, 300, 32, seed=2)
    index, plain = small_index(), small_index()
    plain.add(keys, values)
    for start in range(0, 300, 50):
        with torch.inference_mode(start % 100 == 0):
            index.add(keys[:, :, start : start + 50], values[:, :, start : start + 50])
            index = index.fork() if start == 200 else index
    same_state(index, plain)


def test_threads_may_search_one_index() -> None:
    index = small_index()
    index.add(tokens(1, 2, 600, 32, seed=1), tokens(1, 2, 600, 32, seed=2))
    queries = [tokens(1, 4, 1, 32, seed=i) for i in range(40)]
    want = [index.search_attend(x) for x in queries]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(index.search_attend, queries * 5))
    for i, out in enumerate(found):
        assert torch.equal(out, want[i % len(want)])
