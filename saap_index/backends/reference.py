"""The specification behind the seam: converts torch to NumPy float64, loops, and calls `saap_index.reference`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import reference
from .base import Backend
from .scalar_quantizer import Coded, StorageCode
from .types import Budget, Probed, Rotation, Tail
from .weights import RouterWeights


def _f64(x: Tensor) -> reference.Array:
    return x.detach().double().numpy()


class ReferenceBackend(Backend):
    """See `Backend` for the contract of every method."""

    name = "reference"
    reads_codes = reads_samples = True

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")

    def append(
        self, keys: Tensor, values: Tensor, arena_keys: Tensor, arena_values: Tensor, starts: Sequence[int], counts: Sequence[int]
    ) -> bool:
        for i, count in enumerate(counts):
            if not all(np.isfinite(_f64(x[i, :, :count])).all() for x in (keys, values)):
                return False
        for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
            arena_keys[i, :, start : start + count] = keys[i, :, :count]
            arena_values[i, :, start : start + count] = values[i, :, :count]
        return True

    def prepare_quantizer(self, centroids: Tensor, bias: Tensor | None = None) -> Any:
        return list(zip(_f64(centroids), [None] * len(centroids) if bias is None else _f64(bias), strict=True))

    def assign(self, quantizer: Any, keys: Tensor, rotation: Rotation | None) -> Tensor:
        x = _f64(keys)
        if rotation is not None:
            x = reference.unrotate(x, _f64(rotation.cos), _f64(rotation.sin), rotation.interleaved, rotation.scale)
        nos = [reference.assign(k, *of_head) for k, of_head in zip(x, quantizer, strict=True)]
        return torch.from_numpy(np.stack(nos)).to(torch.int32)

    def seal(self, keys: Tensor, values: Tensor, ids: Tensor, start: int, list_nos: Tensor, table: Tensor) -> None:
        n = list_nos.shape[1]
        lists = table.shape[1] - 1
        sorted_segments = [reference.sort_segment(nos.numpy().astype(np.int64), lists) for nos in list_nos]
        arrays = keys, values, ids
        moved = [[x[head, start + torch.from_numpy(order)] for x in arrays] for head, (order, _) in enumerate(sorted_segments)]
        for head, (_, offsets) in enumerate(sorted_segments):
            for x, rows in zip(arrays, moved[head], strict=True):
                x[head, start : start + n] = rows
            table[head] = torch.from_numpy(start + offsets)

    def encode(self, code: StorageCode, keys: Tensor, values: Tensor, key_codes: Tensor, value_codes: Tensor) -> None:
        for x, bits, out in ((keys, code.key_bits, key_codes), (values, code.value_bits, value_codes)):
            for rows, codes in zip(x, out, strict=True):
                codes.copy_(torch.from_numpy(reference.encode(_f64(rows), bits)))

    def means(self, keys: Tensor, values: Tensor, table: Tensor, mean_keys: Tensor, mean_values: Tensor) -> None:
        for head in range(keys.shape[0]):
            offsets = table[head].numpy().astype(np.int64)
            means = reference.run_means(_f64(keys[head]), _f64(values[head]), offsets)
            mean_keys[head], mean_values[head] = (torch.from_numpy(x) for x in means)

    def prepare_router(self, weights: RouterWeights) -> Any:
        return weights

    def route(self, router: Any, queries: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        b, h, g, q, d = queries.shape
        x = _f64(queries)
        if rotation is not None:
            cos, sin = _f64(rotation.cos).reshape(b, 1, 1, q, -1), _f64(rotation.sin).reshape(b, 1, 1, q, -1)
            x = reference.unrotate(x, cos, sin, rotation.interleaved, rotation.scale)
        x = x.reshape(b, h, g * q, d)
        parts = {name: _f64(weights) for name, weights in router.tensors().items()}

        def one(i: int, k: int) -> tuple[reference.Array, reference.Array]:
            return reference.route(x[i, k], nlist=router.nlist, **{name: weights[k] for name, weights in parts.items()})

        y = [[one(i, head) for head in range(h)] for i in range(b)]
        z, a = (np.stack([[pair[k] for pair in row] for row in y]) for k in (0, 1))
        return torch.from_numpy(z).float(), torch.from_numpy(a).float()

    def probe(
        self,
        z: Tensor,
        a: Tensor,
        knots: Tensor,
        tables: Tensor,
        num_segments: Sequence[int],
        budget: Budget,
        size_weighted: bool,
    ) -> Probed:
        b, h = z.shape[:2]
        selected: list[reference.Ints] = []
        tails: list[reference.Ints] = []
        biases: list[reference.Array] = []
        for i in range(b):
            s = num_segments[i]
            for head in range(h):
                args = _f64(z[i, head]), _f64(a[i, head]), _f64(knots[i, :s]), tables[i, head, :s].numpy().astype(np.int64)
                if budget.sample is not None:
                    part = budget.sample
                    most = int(budget.rows[i, head]), int(part.rows[i, head])
                    found = reference.weighted_probe(*args, *most, int(part.exponents[head]), float(part.caps[head]))
                    selected.append(found[0])
                    biases.append(found[1])
                    continue
                unread_mass = None if budget.unread_mass is None else float(budget.unread_mass[head])
                rows = reference.probe(*args, int(budget.rows[i, head]), budget.nprobe, size_weighted, unread_mass)
                selected.append(rows)
                if budget.mean_entries is not None:
                    tails.append(reference.tail(*args, rows, int(budget.mean_entries[i, head]), budget.means[i]))
        if budget.sample is not None:
            listed, counts = _padded(selected, b, h)
            beside = torch.zeros(listed.shape, dtype=torch.float32, device="cpu")
            for x, bias in zip(beside.flatten(0, 1), biases, strict=True):
                x[: len(bias)] = torch.from_numpy(bias)
            return Probed(listed, counts, biases=beside)
        if budget.mean_entries is None:
            return Probed(*_padded(selected, b, h))
        return Probed(*_padded(selected, b, h), *_padded(tails, b, h))

    def scan(
        self,
        queries: Tensor,
        arena_keys: Tensor,
        arena_values: Tensor,
        rows: Tensor | None,
        counts: Tensor | None,
        sinks: Sequence[int],
        sealed: Sequence[int],
        lengths: Sequence[int],
        scale: float,
        causal: bool,
        tail: Tail | None = None,
        coded: Coded | None = None,
        biases: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        b, h, g, q, d = queries.shape
        out = np.zeros((b, h, g, q, arena_values.shape[-1]))
        lse = np.full((b, h, g, q), -np.inf)
        for i in range(b):
            dense = np.concatenate([np.arange(sinks[i]), np.arange(sealed[i], lengths[i])])
            for head in range(h):
                picked = dense if rows is None else np.concatenate([rows[i, head].numpy(), dense])
                bias = np.zeros(len(picked))
                if biases is not None:
                    bias[: biases.shape[2]] = _f64(biases[i, head])
                bias, picked = bias[picked >= 0], picked[picked >= 0].astype(np.int64)
                limit = lengths[i] - q + 1 + np.arange(q) if causal else np.full(q, lengths[i])
                seen = (picked[None] < sealed[i]) | (picked[None] < limit[:, None])
                x = _f64(queries[i, head]).reshape(g * q, d)
                keys, values = _f64(arena_keys[i, head]), _f64(arena_values[i, head])
                if coded is not None:
                    keys, values = _in_order(coded, i, head, keys, values)
                keys, values = keys[picked], values[picked]
                tokens = np.ones(len(picked))
                if tail is not None:
                    runs = tail.runs[i, head, : int(tail.counts[i, head])].numpy()
                    nlist = tail.keys.shape[3]
                    keys = np.concatenate([keys, _f64(tail.keys[i, head].flatten(0, 1))[runs]])
                    values = np.concatenate([values, _f64(tail.values[i, head].flatten(0, 1))[runs]])
                    sizes = np.diff(tail.tables[i, head].numpy(), axis=1)
                    tokens = np.concatenate([tokens, sizes[runs // nlist, runs % nlist]])
                    seen = np.concatenate([seen, np.ones((q, len(runs)), bool)], 1)
                    bias = np.concatenate([bias, np.zeros(len(runs))])
                o, e = reference.attend(x, keys, values, scale, np.tile(seen, (g, 1)), tokens, bias)
                out[i, head], lse[i, head] = o.reshape(g, q, -1), e.reshape(g, q)
        return torch.from_numpy(out).to(queries.dtype), torch.from_numpy(lse).float()

    def combine(self, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = reference.merge_states(_f64(out_a), _f64(lse_a), _f64(out_b), _f64(lse_b))
        return torch.from_numpy(out).to(out_a.dtype), torch.from_numpy(lse).float()


def _in_order(coded: Coded, i: int, head: int, keys: reference.Array, values: reference.Array) -> tuple[reference.Array, ...]:
    """Keys and values of every row of one sequence and KV head, the coded ones decoded."""
    low, high = coded.first[i], coded.last[i]
    bits = coded.code.key_bits, coded.code.value_bits
    found = []
    for x, codes, n in zip((keys, values), (coded.keys, coded.values), bits, strict=True):
        decoded = reference.decode(codes[i, head, low:high].numpy(), x.shape[1], n)
        found.append(np.concatenate([x[:low], decoded, x[low:]]))
    return tuple(found)


def _padded(selected: list[reference.Ints], b: int, h: int) -> tuple[Tensor, Tensor]:
    """b * h lists of numbers as int32 (b, h, t), padded with -1, and how many there are, int32 (b, h)."""
    rows = torch.full((b * h, max(map(len, selected))), -1, dtype=torch.int32, device="cpu")
    for numbers, row in zip(selected, rows, strict=True):
        row[: len(numbers)] = torch.from_numpy(numbers)
    return rows.view(b, h, -1), torch.tensor([len(x) for x in selected], dtype=torch.int32, device="cpu").view(b, h)
