"""Which heads need long spans: the profile and the plan of MoA (Fu et al., 2024, arXiv 2406.14909), from gradients.

One pass forward and back over calibration text gives, per head, attention A and G = dL/dA (from the saved queries, keys, values
and dL/dO). Masking one entry, the row renormalised, changes the loss to first order by

    E_ij = A_ij / (1 - A_ij) (sum_n G_in A_in - G_ij).

|E|, summed over blocks, is what a span costs that leaves the block out; the spans that cost least at a density are the plan.

Axes: h KV heads, g query heads per KV head, n tokens, d key dim, e value dim, b blocks, r rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from saap_index.errors import LengthError, ParameterError
from saap_index.hf import support

from .method import Layer
from .replace import _layer, _serving
from .spans import SpanPlan

Rule = tuple[float, float]
"""(alpha, beta): a span of alpha + beta N tokens."""

_ROWS = 256
"""Query rows whose attention is held at once."""


@dataclass(frozen=True)
class Saved:
    """One layer of one sequence, after RoPE: queries (h, g, n, d), keys (h, n, d), values (h, n, e), grad (h, g, n, e): dL/dO."""

    layer: Layer
    queries: Tensor
    keys: Tensor
    values: Tensor
    grad: Tensor


def gradients(model: Any, tokens: Sequence[int], first: int = 0) -> Iterator[Saved]:
    """Every attention layer, the last one first. The loss is the mean cross-entropy of the tokens after ``first`` (the paper: of
    an answer, not of what it is about).

    Memory: the hidden states between the layers and the activations of one layer, which is computed a second time on the way
    back. The model's own gradients are left as they are. Raises LengthError unless a token follows ``first``, CompatibilityError
    for a model whose decoder layers are not known.
    """
    if not 0 <= first < len(tokens) - 1:
        raise LengthError(f"first: expected 0 <= first < {len(tokens) - 1}, got {first}")
    calls, top, hidden = _forward(model, torch.tensor([list(tokens)], dtype=torch.int64, device=model.device))
    return _backward(model, calls, _loss_gradient(model, top, hidden, tokens, first))


_Call = tuple[Any, Tensor, tuple[Any, ...], dict[str, Any]]
"""A decoder layer, its hidden state (1, n, width), and what else it was called with."""


def _forward(model: Any, ids: Tensor) -> tuple[list[_Call], Tensor, Tensor]:
    """The calls of the decoder layers; the last one's output, a leaf of the graph; what the model makes of it for its head."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    decoder = support.decoder_of(model)
    layers = support.attention_layers(decoder)
    calls: list[_Call] = []
    top: list[Tensor] = []

    def enter(module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        rest = dict(options)
        hidden = arguments[0] if arguments else rest.pop("hidden_states")
        calls.append((module, hidden, arguments[1:], rest))

    def leave(module: Any, arguments: Any, out: Any) -> Any:
        top.append(_hidden(out).detach().requires_grad_())
        torch.set_grad_enabled(True)  # the layers run without a graph, the little that follows them does not
        return top[0] if isinstance(out, Tensor) else (top[0], *out[1:])

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        output: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
        return output

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(leave))
    try:
        with torch.no_grad(), _serving(model, attend):
            hidden: Tensor = decoder(ids, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return calls, top[0], hidden


def _loss_gradient(model: Any, top: Tensor, hidden: Tensor, tokens: Sequence[int], first: int) -> Tensor:
    """dL / d top, the logits a few rows at a time: a vocabulary is wide."""
    above = torch.zeros_like(hidden)
    targets = torch.tensor(list(tokens[first + 1 :]), dtype=torch.int64, device=hidden.device)
    for rows in torch.arange(len(targets), dtype=torch.int64, device=targets.device).split(_ROWS):
        part = hidden[0, rows + first].detach().requires_grad_()
        with torch.enable_grad():
            loss = functional.cross_entropy(model.lm_head(part), targets[rows], reduction="sum") / len(targets)
        (above[0, rows + first],) = torch.autograd.grad(loss, part)
    (gradient,) = torch.autograd.grad(hidden, top, above)
    return gradient


def _backward(model: Any, calls: list[_Call], grad: Tensor) -> Iterator[Saved]:
    rows: list[tuple[Layer, Tensor, Tensor, Tensor, Tensor]] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        layer = _layer(module, query, key, value, options, None)
        out: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
        grouped = query[0].detach().unflatten(0, (layer.heads, layer.group))
        rows.append((layer, grouped, key[0].detach(), value[0].detach(), out))
        return out

    while calls:
        module, below, arguments, options = calls.pop()
        below = below.detach().requires_grad_()
        with torch.enable_grad(), _serving(model, attend):
            above = _hidden(module(below, *arguments, **options))
        layer, queries, keys, values, out = rows.pop()
        grad, outer = torch.autograd.grad(above, (below, out), grad)
        del above, out
        outer_grad = outer[0].transpose(0, 1).unflatten(0, (layer.heads, layer.group))
        yield Saved(layer, *map(_at_least_float32, (queries, keys, values, outer_grad)))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _hidden(out: Any) -> Tensor:
    hidden: Tensor = out if isinstance(out, Tensor) else out[0]
    return hidden


def entry_influence(saved: Saved, first: int, stop: int) -> Tensor:
    """E of query rows [first, stop) of every head: (h, g, rows, stop), signed, 0 for what a row does not see.

    A row with a single entry has nothing to renormalise over: its output becomes 0.
    """
    lengths = torch.arange(first, stop, dtype=torch.int64, device=saved.keys.device)[:, None]
    seen = torch.arange(stop, dtype=torch.int64, device=saved.keys.device) <= lengths
    logits = saved.queries[:, :, first:stop] @ saved.keys[:, None, :stop].mT * saved.layer.scale
    a = logits.masked_fill_(~seen, -torch.inf).softmax(-1)
    g = saved.grad[:, :, first:stop] @ saved.values[:, None, :stop].mT
    mean = (g * a).sum(-1, keepdim=True)
    tiny = torch.finfo(a.dtype).eps
    e = torch.where(lengths == 0, -g * a, a / (1 - a).clamp_(min=tiny) * (mean - g))
    return e * seen


def influence(saved: Saved, block: int = 64) -> Tensor:
    """|E| summed over blocks of ``block`` x ``block`` entries: (h * g, b, b), the last block of a side as short as it is."""
    n = saved.keys.shape[1]
    blocks = -(-n // block)
    rows_at_once = max(1, _ROWS // block) * block
    influences = []
    for first in range(0, n, rows_at_once):
        e = entry_influence(saved, first, min(n, first + rows_at_once)).abs().flatten(0, 1)
        e = functional.pad(e, (0, blocks * block - e.shape[2], 0, -e.shape[1] % block))
        influences.append(e.unflatten(1, (-1, block)).unflatten(3, (-1, block)).sum((2, 4)))
    return torch.cat(influences, 1)


def rule_losses(importance: Tensor, rules: Sequence[Rule], length: int, block: int = 64) -> Tensor:
    """What each rule leaves out of `influence` (hq, b, b) at sequences of ``length`` tokens: (hq, r).

    A row of blocks keeps the first block and the newest ones, its own among them, as the published prefill does.
    """
    at = torch.arange(importance.shape[1], dtype=torch.int64, device=importance.device)
    age = at[:, None] - at
    losses = []
    for rule in rules:
        kept = SpanPlan(((rule[0],),), ((rule[1],),)).span(0, 0, length, block) // block
        losses.append((importance * ((age >= kept - 1) & (at > 0))).sum((1, 2)))
    return torch.stack(losses, 1)


def usable_rules(lengths: Iterable[int], alphas: Iterable[float] = (), betas: Iterable[float] = ()) -> list[Rule]:
    """Pairs whose span lies in (0, N] at every length. By default the paper's grid (beta in eighths, alpha in steps of 1024) and
    what densities below an eighth need beside it."""
    alphas = list(alphas) or [1024.0 * i for i in range(-2, 9)]
    betas = list(betas) or [1 / 64, 1 / 32, 1 / 16, *(i / 8 for i in range(9))]
    lengths = list(lengths)
    return [(a, b) for a in alphas for b in betas if all(0 < a + b * n <= n for n in lengths)]


def spread_rules(losses: Tensor, densities: Tensor, density: float, distinct: int | None = 2) -> Tensor:
    """The rule of every layer and head, so that the summed loss is small and the mean density at most ``density``.

    losses (layers, heads, r); densities (r,) of the rules; distinct : at most so many rules in a layer, 1 or 2 (published), None
    for any number. Bisects the price of density (Lagrange). Returns int64 (layers, heads).

    Raises ParameterError if even the sparsest rule is too dense.
    """
    if distinct not in (1, 2, None):
        raise ParameterError(f"distinct: expected 1, 2 or None, got {distinct}")
    losses, densities = losses.double(), densities.double()
    if float(densities.min()) > density:
        raise ParameterError(f"density: expected at least the sparsest rule's, {float(densities.min()):.3g}, got {density}")

    def choose(price: float) -> Tensor:
        cost = losses + price * densities
        if distinct is None:
            return cost.argmin(-1)
        if distinct == 1:
            return cost.sum(1).argmin(-1, keepdim=True).expand(cost.shape[:2])
        pairs = torch.stack([torch.minimum(c[:, :, None], c[:, None]).sum(0).flatten() for c in cost]).argmin(-1)
        two = torch.stack([pairs // len(densities), pairs % len(densities)], -1)[:, None].expand(*cost.shape[:2], 2)
        return two.gather(2, cost.gather(2, two).argmin(-1, keepdim=True))[:, :, 0]

    return _cheapest(choose, densities, density)


def _cheapest(choose: Callable[[float], Tensor], densities: Tensor, density: float) -> Tensor:
    """The choice at the lowest price whose mean density is within the bound, and denser layers as far as there is room."""

    def too_dense(rules: Tensor) -> bool:
        # the mean of equal numbers may round to more than they are: without the margin no price would ever be high enough
        return float(densities[rules].mean()) > density * (1 + 1e-9)

    if not too_dense(choose(0.0)):
        return choose(0.0)
    low, high = 0.0, 1.0
    while too_dense(choose(high)):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if too_dense(choose(middle)) else (low, middle)
    best, denser = choose(high).clone(), choose(low)
    for layer in range(len(best)):  # at one and the same price many may change at once
        changed = best.clone()
        changed[layer] = denser[layer]
        best = best if too_dense(changed) else changed
    return best


@dataclass(frozen=True)
class Profile:
    """losses (layers, heads, r) summed over sequences of several lengths, per rule; the head count includes a group's."""

    rules: tuple[Rule, ...]
    lengths: tuple[int, ...]
    losses: Tensor
    group: int

    def plan(self, density: float, distinct: int | None = 2, per_group: bool = True) -> SpanPlan:
        """Spans of mean density at most ``density`` at every length of the profile.

        per_group : the heads of a group get one span, since they read the same keys (not in the paper, whose models have no
        groups): without it a group reads the longest of its spans and more than ``density``.
        """
        one = [SpanPlan(((a,),), ((b,),)) for a, b in self.rules]
        densities = torch.tensor(
            [max(min(1.0, p.span(0, 0, n) / n) for n in self.lengths) for p in one], dtype=torch.float32, device="cpu"
        )
        losses = self.losses
        if per_group:
            losses = losses.unflatten(1, (-1, self.group)).sum(2)
        chosen = spread_rules(losses, densities, density, distinct)
        rows = (chosen.repeat_interleave(self.group, 1) if per_group else chosen).tolist()
        alphas, betas = (tuple(tuple(self.rules[r][i] for r in row) for row in rows) for i in (0, 1))
        return SpanPlan(alphas, betas)


def profile(
    model: Any, sequences: Sequence[Sequence[int]], rules: Sequence[Rule] = (), first: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> Profile:
    """Profile a model over calibration sequences (token numbers); the loss is that of the tokens after ``first`` of each.

    Memory: see `gradients`, and one layer's attention, a few rows at a time: 2 GB at 8192 tokens of a model of 135M weights.
    """
    lengths = sorted({len(tokens) for tokens in sequences})
    rules = list(rules) or usable_rules(lengths)
    if not lengths or not rules:
        raise ParameterError(f"sequences, rules: expected some of both, got {len(sequences)} and {len(rules)}")
    depth, group = len(support.attention_layers(support.decoder_of(model))), 1
    total: list[Tensor | None] = [None] * depth
    for number, tokens in enumerate(sequences):
        for saved in gradients(model, tokens, first):
            group, layer = saved.layer.group, saved.layer.number
            loss, before = rule_losses(influence(saved), rules, len(tokens)), total[layer]
            total[layer] = loss if before is None else before + loss
        progress(f"moa: profiled {number + 1} of {len(sequences)} sequences")
    losses = torch.stack([x for x in total if x is not None])
    return Profile(tuple(rules), tuple(lengths), losses.float().cpu(), group)
