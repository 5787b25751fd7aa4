"""Attention of other architectures, as operators: Lightning Attention, SimpleTron's softmax-free product, Kronecker attention.

None of them can serve a model that was trained with softmax attention, so none is a `Method`: they are compared on what a step
costs, and for models trained with them. Kind: other architecture.

- Lightning Attention (Qin et al., 2024, arXiv 2405.17381): o_t = sum_{j <= t} lambda^(t - j) (q_t . k_j) v_j, no softmax.
- SimpleTron (Yorsh et al., 2021, arXiv 2111.15588): Q (K' V), no softmax, no decay, so associative: linear in the tokens.
- Kronecker attention (Gao, Wang, Ji, KDD 2020, arXiv 2007.08442): keys and values of a grid are its row means and column means.

Axes: h heads, n tokens, d key dim, e value dim; rows x columns of a grid.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saap_index.errors import LengthError, ParameterError, ShapeError

from .method import ITEM_BYTES, Layer

KIND = "other architecture"
STATE_BYTES = 4
"""Of a number of a recurrent state: sums of many products are kept in float32."""


def lightning_decays(heads: int, number: int, layers: int) -> Tensor:
    """lambda of each head in layer ``number`` of ``layers``, as in TransNormerLLM: ALiBi's slopes, weaker in later layers."""
    slopes = torch.tensor([2.0 ** (-8.0 * (i + 1) / heads) for i in range(heads)], dtype=torch.float64, device="cpu")
    return torch.exp(-slopes * (1 - number / max(1, layers - 1) + 1e-5))


def decayed_step(state: Tensor, query: Tensor, key: Tensor, value: Tensor, decays: Tensor) -> tuple[Tensor, Tensor]:
    """One token: state (h, d, e), query and key (h, d), value (h, e), decays (h,) -> output (h, e) and the next state.

    Lightning Attention's decode step; with decays of 1, SimpleTron's made causal.
    """
    state = decays[:, None, None].to(state) * state + key[:, :, None] * value[:, None]
    return (query[:, None] @ state)[:, 0], state


def decayed_prefill(queries: Tensor, keys: Tensor, values: Tensor, decays: Tensor, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """A whole causal pass in chunks: queries, keys (h, n, d), values (h, n, e) -> outputs (h, n, e) and the state after them.

    Inside a chunk the masked product, between chunks the state; both in powers of the decay that are at most 1, so that nothing
    overflows however fast a head forgets.
    """
    _same_length(queries, keys, values)
    if chunk < 1:
        raise ParameterError(f"chunk: expected at least 1, got {chunk}")
    heads, n, d = queries.shape
    state = queries.new_zeros((heads, d, values.shape[2]))
    outs = []
    for first in range(0, n, chunk):
        q, k, v = (x[:, first : first + chunk] for x in (queries, keys, values))
        at = torch.arange(q.shape[1], dtype=torch.int64, device=q.device)
        age = at[:, None] - at
        within = decays[:, None, None] ** age.clamp(min=0) * (age >= 0)
        since = decays[:, None] ** (at + 1)  # of the state, at each token
        until = decays[:, None] ** (q.shape[1] - 1 - at)  # of each token, at the end of the chunk
        outs.append((q @ k.mT * within.to(q)) @ v + since[:, :, None].to(q) * (q @ state))
        state = since[:, -1, None, None].to(q) * state + (k * until[:, :, None].to(q)).mT @ v
    return (torch.cat(outs, 1) if outs else values), state


def simpletron(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """SimpleTron over a whole sequence, not causal: (h, n, d) twice, (h, n, e) -> (h, n, e), in the cheaper order of products.

    The factor that keeps the numbers small, 1 / n here, is part of the model that is trained with it.
    """
    _same_length(queries, keys, values)
    n, d = queries.shape[1:]
    if not n:
        raise LengthError("queries: expected at least one token, got none")
    return (queries @ (keys.mT @ values) if d < n else (queries @ keys.mT) @ values) / n


def kronecker(queries: Tensor, keys: Tensor, values: Tensor, rows: int, scale: float) -> Tensor:
    """Kronecker attention (KAO_KV): n queries over rows + columns means: queries, keys (h, n, d), values (h, n, e) -> (h, n, e).

    Token i stands at row i // columns, column i % columns of the grid. Not causal: the means hold every token.
    """
    _same_length(queries, keys, values)
    k, v = grid_means(keys, rows), grid_means(values, rows)
    return (queries @ k.mT * scale).softmax(-1) @ v


def kronecker_all(queries: Tensor, keys: Tensor, values: Tensor, rows: int, scale: float) -> Tensor:
    """KAO_QKV: queries are means as well; token (r, c) gets the sum of its row's and its column's output."""
    _same_length(queries, keys, values)
    q, k, v = (grid_means(x, rows) for x in (queries, keys, values))
    out = (q @ k.mT * scale).softmax(-1) @ v
    return (out[:, :rows, None] + out[:, None, rows:]).flatten(1, 2)


def grid_means(x: Tensor, rows: int) -> Tensor:
    """Means of the rows, then of the columns, of a grid of tokens: (h, n, d) -> (h, rows + columns, d)."""
    n = x.shape[1]
    if rows < 1 or n % rows or not n:
        raise ShapeError(f"rows: expected a divisor of the {n} tokens, got {rows}")
    grid = x.unflatten(1, (rows, n // rows))
    return torch.cat([grid.mean(2), grid.mean(1)], 1)


@dataclass(frozen=True)
class CostLine:
    """One decode step of one layer. bytes : read, of the cache or the state (a state is written as well, and that counts: as much
    again); seconds : median on this machine."""

    name: str
    bytes: float
    seconds: float
    kind: str = KIND


def cost_lines(layer: Layer, tokens: int, repeats: int = 20, seed: int = 0) -> list[CostLine]:
    """What a step costs with each operator beside dense softmax attention, at a context of ``tokens``; random numbers.

    Linear attention has a state per query head (its models have no groups), so h * g of them. Kronecker attention keeps the sums
    of rows and columns of the squarest grid.
    """
    if tokens < 1 or repeats < 1:
        raise ParameterError(f"tokens, repeats: expected at least 1, got {tokens} and {repeats}")
    generator = torch.Generator().manual_seed(seed)
    heads, d, e = layer.heads * layer.group, layer.d, layer.e
    query, key = torch.randn((2, heads, d), generator=generator, dtype=torch.float32, device="cpu")
    value, state = (
        torch.randn((heads, e), generator=generator, dtype=torch.float32, device="cpu"),
        torch.randn((heads, d, e), generator=generator, dtype=torch.float32, device="cpu"),
    )
    keys, values = (torch.randn((layer.heads, tokens, x), generator=generator, dtype=torch.float32, device="cpu") for x in (d, e))
    grouped = query.view(layer.heads, layer.group, d)
    rows = next(r for r in range(int(tokens**0.5), 0, -1) if tokens % r == 0)
    k, v = grid_means(keys, rows), grid_means(values, rows)
    decays = lightning_decays(heads, 0, 2)
    both = 2.0 * heads * d * e * STATE_BYTES

    def dense(keys: Tensor, values: Tensor) -> Tensor:
        return (grouped @ keys.mT * layer.scale).softmax(-1) @ values

    return [
        CostLine("dense", layer.heads * tokens * layer.token_bytes, _median(lambda: dense(keys, values), repeats), "yardstick"),
        CostLine("lightning", both, _median(lambda: decayed_step(state, query, key, value, decays), repeats)),
        CostLine(
            "simpletron",
            both,
            _median(
                lambda: decayed_step(state, query, key, value, torch.ones(heads, dtype=torch.float32, device="cpu")), repeats
            ),
        ),
        CostLine("kronecker", layer.heads * k.shape[1] * (d + e) * ITEM_BYTES, _median(lambda: dense(k, v), repeats)),
    ]


def _median(step: Callable[[], object], repeats: int) -> float:
    step()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _same_length(queries: Tensor, keys: Tensor, values: Tensor) -> None:
    if queries.shape != keys.shape or values.shape[:-1] != keys.shape[:-1]:
        raise ShapeError(f"expected (h, n, d) twice and (h, n, e), got {[tuple(x.shape) for x in (queries, keys, values)]}")
