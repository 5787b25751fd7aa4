"""What a selection of tokens is worth: the attention mass it captures and the error of the output, against exact attention.

Everything is computed in float64 over the dense keys and values. Knows nothing of how tokens were selected.

Axes: h KV heads, g query heads per KV head, q queries, n tokens, d and dv dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saap_index.errors import LengthError, ShapeError

from .selections import SINKS, WINDOW


@dataclass(frozen=True)
class Exact:
    """Exact attention of some queries over one sequence and layer.

    probabilities : float64 (h, g, q, n), 0 for tokens after the query
    values : float64 (h, n, dv)
    output : float64 (h, g, q, dv)
    always : bool (q, n), sinks and recent window of each query
    outside : bool (q, n), the other tokens up to each query: those a selection chooses from
    """

    probabilities: Tensor
    values: Tensor
    output: Tensor
    always: Tensor
    outside: Tensor


@dataclass(frozen=True)
class Measures:
    """Of every query and query head; query head i of a model is [i // g, i % g].

    captured : float64 (h * g, q), the attention probability of the tokens chosen
    outside : float64 (h * g, q), that of all tokens outside sinks and window
    error : float64 (h * g, q), the output's relative error in the Euclidean norm
    """

    captured: Tensor
    outside: Tensor
    error: Tensor

    @property
    def captured_percent(self) -> float:
        """Captured mass in percent of the mass outside, weighted by mass."""
        return 100 * float(self.captured.sum() / self.outside.sum())


def exact_attention(
    keys: Tensor, values: Tensor, queries: Tensor, positions: Tensor, sinks: int = SINKS, window: int = WINDOW
) -> Exact:
    """Attention of each query over all tokens up to its position.

    Parameters
    ----------
    keys : float32 (h, n, d)
        After RoPE.
    values : float32 (h, n, dv)
    queries : float32 (h * g, q, d)
        After RoPE.
    positions : int64 (q,)
        In [0, n).
    sinks, window : int
        Tokens that are always read; the window ends with the query's own token.
    """
    if keys.ndim != 3 or values.shape[:-1] != keys.shape[:-1]:
        raise ShapeError(f"keys and values: expected (h, n, d) and (h, n, dv), got {tuple(keys.shape)} and {tuple(values.shape)}")
    heads, tokens, dims = keys.shape
    count = positions.shape[0]
    if queries.ndim != 3 or queries.shape[0] % heads or queries.shape[1:] != (count, dims):
        raise ShapeError(f"queries: expected (a multiple of {heads}, {count}, {dims}), got {tuple(queries.shape)}")
    if count and (int(positions.min()) < 0 or int(positions.max()) >= tokens):
        raise LengthError(f"positions: expected positions in [0, {tokens}), got {positions.tolist()}")
    positions = positions.to(keys.device)
    age = positions[:, None] - torch.arange(tokens, dtype=torch.int64, device=keys.device)
    visible = age >= 0
    always = visible & ((age < window) | (torch.arange(tokens, dtype=torch.int64, device=keys.device) < sinks))
    grouped = queries.double().view(heads, -1, count, dims)
    logits = grouped @ keys.double()[:, None].transpose(2, 3) * dims**-0.5
    probabilities = logits.masked_fill_(~visible, -torch.inf).softmax(-1)
    wide = values.double()
    return Exact(probabilities, wide, probabilities @ wide[:, None], always, visible & ~always)


def measure(exact: Exact, chosen: Tensor) -> Measures:
    """Measure a selection.

    Parameters
    ----------
    exact : Exact
    chosen : bool (h, q, n)
        The tokens a query reads beside sinks and window, per KV head; tokens among those or after the query count for nothing.

    Returns
    -------
    Measures
        The output is renormalised over the tokens chosen, the sinks and the window.
    """
    heads, _, count, tokens = exact.probabilities.shape
    if chosen.shape != (heads, count, tokens):
        raise ShapeError(f"chosen: expected {(heads, count, tokens)}, got {tuple(chosen.shape)}")
    outside = (exact.probabilities * exact.outside).sum(-1)
    read = exact.probabilities * (chosen & exact.outside)[:, None]
    captured = read.sum(-1)
    read += exact.probabilities * exact.always
    output = (read @ exact.values[:, None]) / read.sum(-1, keepdim=True)
    return Measures(captured.flatten(0, 1), outside.flatten(0, 1), output_error(exact, output.flatten(0, 1)))


def output_error(exact: Exact, output: Tensor) -> Tensor:
    """Relative error of an attention output from elsewhere.

    Parameters
    ----------
    exact : Exact
    output : float (h * g, q, dv)

    Returns
    -------
    Tensor
        float64 (h * g, q): the norm of the difference by the norm of the exact output.
    """
    wanted = exact.output.flatten(0, 1)
    if output.shape != wanted.shape:
        raise ShapeError(f"output: expected {tuple(wanted.shape)}, got {tuple(output.shape)}")
    difference = output.double() - wanted
    error: Tensor = torch.linalg.vector_norm(difference, dim=-1) / torch.linalg.vector_norm(wanted, dim=-1)
    return error
