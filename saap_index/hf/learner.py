"""Routers from the prompts that a model reads: `attach` without routers. Knows plans, caches and one folder, no text.

A prompt is read densely, and queries of it are sampled on the way (sample.py). Before its first decode step, when the whole of it
is there, routers of every layer are trained on these and on its keys; its cache turns sparse, and so do all that follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import RouterWeights
from ..errors import CompatibilityError, LengthError, ParameterError, SaapError
from ..invlists.layout import NEVER, Layout
from ..routers import Routers, model_shape
from ..routing.quantizer import KeyQuantizer
from ..routing.rope import Rope
from ..routing.sampling import Sampling
from ..routing.trained import TrainedLayer, unmade_lists
from ..routing.two_tower import TwoTower
from ..search.params import SELECTIVITY
from ..training.budget import spread_budget
from ..training.prompt import PromptTraining, fit_bytes, fit_prompt
from ..version import __version__
from . import support
from .kept import LOGGER, PROMPTS, folder_of, keep, kept_routers, prompts_of
from .layer import IndexedLayer
from .plan import Plan
from .sample import QuerySample

AUTO, NEVER_TRAIN = "auto", "never"

LEAST_QUERIES = 64
"""Of a prompt: with fewer, routers are worse than none."""

_HIDDEN, _KNOTS = 64, 8  # of routers that are yet to be trained: what a step is timed with


def options_of(train: str | PromptTraining) -> PromptTraining | None:
    """What ``train`` of `attach` asks for; None for "never". ParameterError for anything else."""
    if isinstance(train, PromptTraining):
        return train
    if train == AUTO:
        return PromptTraining()
    if train == NEVER_TRAIN:
        return None
    raise ParameterError(f"train: expected 'auto', 'never' or a PromptTraining, got {train!r}")


class PromptLearner:
    """The plan of a model whose routers come from its prompts, and what becomes of it.

    plan : the one that holds now; of its layers, those without routers stay dense. folder : where they are kept, if not in the
    cache folder under the checksum of the weights.
    """

    def __init__(self, model: Any, options: PromptTraining, folder: Path | None = None) -> None:
        self.decoder = support.decoder_of(model)
        support.check_decoder(self.decoder)
        own = folder_of(self.decoder)
        self.options, self.folder, self._fingerprint = options, folder or own, own.name.rpartition("-")[2]
        config = self.decoder.config
        self._shape = model_shape(config)
        self._kept = kept_routers(self.folder, config)
        self.prompts = prompts_of(self._kept)
        self.plan: Plan
        self._base: Plan

    @property
    def complete(self) -> bool:
        """Whether there is nothing to learn: every layer has routers, of as many prompts as they are to learn from."""
        return all(self.prompts.get(number, 0) >= self.options.prompts for number in self._base.layers)

    def make(self, make: Callable[[Routers], Plan], own_shares: bool = False) -> Plan:
        """The first plan. make : from routers to a plan, with the options of `attach`; own_shares : whether a user's shares of
        the budget are among these, in place of those that are measured."""
        config, layers = self.decoder.config, {}
        for number in support.global_layers(self.decoder):
            rope = Rope.from_config(config, layer=number)
            towers = _untrained(self._shape["num_key_value_heads"], self._shape["head_dim"])
            parts = unmade_lists(towers, self.options.nlist)
            layers[number] = TrainedLayer(*parts, rope, rope, self._shape["head_dim"] ** -0.5, towers)
        kept = {} if self._kept is None else self._kept.layers
        base = make(Routers({"model": self._shape}, {**layers, **{n: x for n, x in kept.items() if n in layers}}))
        split = next(iter(base.layers.values())).shard[1]
        if split > 1:
            raise CompatibilityError(f"routers: expected some for a model that is split among {split} processes, got none")
        self._base, self._own_shares = base, own_shares
        self.plan = self._planned(kept)
        return self.plan

    def _planned(self, trained: Mapping[int, TrainedLayer]) -> Plan:
        """The plan with these routers; layers without any are never sealed."""
        count = self._sampled_queries()
        layers = {}
        for number, layer in self._base.layers.items():
            more = self.prompts.get(number, 0) < self.options.prompts
            sample = QuerySample(count, self.options.seed) if more else None
            if number in trained:
                mine = trained[number].with_lists(layer.trained.quantizer.nlist)
                if self._own_shares:
                    mine = replace(mine, budget_shares=layer.trained.budget_shares)
                layers[number] = replace(layer, trained=mine, sample=sample, _empty={})
            else:
                never = {**layer.options, "break_even": NEVER}
                layers[number] = replace(layer, options=never, break_evens={}, sample=sample, _empty={})
        return replace(self._base, layers=layers, learner=self)

    def _sampled_queries(self) -> int:
        """Positions whose queries fit in half of the memory allowed."""
        heads, d = self._shape["num_attention_heads"], self._shape["head_dim"]
        size = torch.finfo(self.decoder.dtype).bits // 8
        each = len(self._base.layers) * heads * d * size
        return max(LEAST_QUERIES, min(self.options.queries, self.options.max_bytes // 2 // each))

    # -- at work -------------------------------------------------------------------------------------------------------

    def renew(self, layers: Sequence[Any]) -> None:
        """Give the indexed layers of a cache the routers that hold now."""
        for layer in layers:
            if isinstance(layer, IndexedLayer) and layer.plan.number in self.plan.layers:
                layer.renew(self.plan.layers[layer.plan.number])

    def before_call(self, cache: Any, tokens: int) -> None:
        """A call brings so many tokens to a cache of the plan: if its prompt is through, it is time to learn from it."""
        if tokens <= cache.plan.max_sparse_tokens:
            self.finish(cache)

    def finish(self, cache: Any) -> None:
        """Learn from the prompt that a cache holds, if it is one to learn from; what is through when it is interrupted stays."""
        ready = {n: layer for n, layer in cache.indexed.items() if self._teaches(layer)}
        if not ready:
            return
        samples = {number: layer.sample for number, layer in ready.items()}
        for layer in cache.indexed.values():
            layer.sample = None  # a cache teaches once, and not again where it was interrupted
        todo = sorted(ready, key=lambda n: (self.prompts.get(n, 0), n))
        tokens = ready[todo[0]].slots
        self._tell(todo, tokens)
        done: dict[int, TrainedLayer] = {}
        began = time.monotonic()
        try:
            with self._bar(len(todo)) as step:
                for number in todo:
                    fitted = self._fit(ready[number], samples[number])
                    if fitted is not None:
                        done[number] = fitted
                    step()
                    if time.monotonic() - began > self.options.max_seconds:
                        break
        finally:
            if done:
                self._publish(done)
        left = [number for number in self._base.layers if not self.prompts.get(number)]
        if left:
            LOGGER.warning(
                "routers of %d of %d layers are trained after %.0f s; the others stay dense until the next prompt of %d tokens",
                len(self._base.layers) - len(left), len(self._base.layers), time.monotonic() - began, self.options.min_tokens,
            )
        self.renew(cache.layers)
        cache.plan = self.plan

    def _teaches(self, layer: IndexedLayer) -> bool:
        base = self._base.layers.get(layer.plan.number)
        sample = layer.sample
        if base is None or layer.index is None or layer.ragged or sample is None or sample.queries is None:
            return False
        if self.prompts.get(layer.plan.number, 0) >= self.options.prompts:
            return False
        batch = len(layer.index.lengths)
        return layer.slots >= max(self.options.min_tokens, base.break_even(batch)) and len(sample.positions) >= LEAST_QUERIES

    def _fit(self, layer: IndexedLayer, sample: QuerySample) -> TrainedLayer | None:
        """Routers of one layer; None if they cannot be trained on this prompt, which is said, and it stays as it is."""
        number, index = layer.plan.number, layer.index
        assert index is not None and sample.queries is not None and sample.sequence is not None
        before = self.plan.layers[number].trained if self.prompts.get(number) else None
        try:
            # what is trained must not be made in inference mode, and generate turns gradients off
            with torch.inference_mode(False), torch.enable_grad():
                tower, losses, sampling, shared = self._fit_heads(index, sample, before, self.prompts.get(number, 0))
        except (SaapError, MemoryError, torch.OutOfMemoryError) as error:
            LOGGER.warning("layer %d: routers are not trained on this prompt: %s", number, error)
            return None
        rope = self._base.layers[number].trained.rope
        parts = unmade_lists(tower, self.options.nlist)
        if before is not None and before.losses is not None and losses is not None:  # the more prompts, the less is chance
            losses = before.losses + (losses - before.losses) / (self.prompts[number] + 1)
        return TrainedLayer(
            *parts, rope, rope, index.scale, tower, losses=losses, shared_lists=shared, sampling=sampling
        )

    def _fit_heads(
        self, index: Any, sample: QuerySample, before: TrainedLayer | None, prompts: int
    ) -> tuple[TwoTower, np.ndarray | None, Sampling | None, KeyQuantizer]:
        """A few KV heads at a time where all of them would take more memory than is allowed: the routers; what every KV head
        loses at each budget, float32 (h, s), see `TrainedLayer.losses`, and what it should sample, None where that was not
        measured; and lists of this prompt and those before, for where prompts share them."""
        sequence, heads, kv_heads, d = sample.sequence or 0, index.num_heads, index.num_kv_heads, index.d
        n, rope, options = index.lengths[sequence], index.rope, self.options
        assert sample.queries is not None
        held = len(self._base.layers) * sample.queries.numel() * sample.queries.element_size()

        def need(some: int) -> int:
            return held + fit_bytes(heads // kv_heads * some, some, d, n, sample.count, options.nlist)

        some = kv_heads
        while some > 1 and need(some) > options.max_bytes:
            some = (some + 1) // 2
        if need(some) > options.max_bytes:
            raise LengthError(f"max_bytes: expected {need(some)} or more for a prompt of {n} tokens, got {options.max_bytes}")
        lengths = index.invlists.rotated.at(sequence, 0, n) if rope is not None and rope.is_dynamic else None
        layout = index.layout
        parts, measured, samplings, lists = [], [], [], []
        for first in range(0, kv_heads, some):
            share = slice(first, min(first + some, kv_heads))
            group = slice(share.start * heads // kv_heads, share.stop * heads // kv_heads)
            keys, values = _rows(index, sequence, share)
            queries = sample.queries[group].clone()
            own = None if before is None else before.of_heads(share).to(keys.device)
            start, shared = (None, None) if own is None else (own.tower, own.shared_lists)
            fit = fit_prompt(
                keys, queries, sample.positions, rope, index.scale,
                Layout(sinks=layout.sinks, window=layout.window), options, start, lengths, values, shared, prompts,
            )
            lists.append(fit.lists.centroids)
            measured.append(fit.measured)
            samplings.append(fit.sampling)
            tower = fit.tower if fit.tower is not None else start
            assert tower is not None
            parts.append(tower)
        tower, shared = parts[0] if len(parts) == 1 else _joined(parts), KeyQuantizer(torch.cat(lists)).rounded()
        curves = [one for one in measured if one is not None]
        if sample.weight is None or len(curves) < len(parts):
            return tower, None, None, shared
        of_heads = [one for one in samplings if one is not None]
        sampling = Sampling.cat(of_heads) if len(of_heads) == len(parts) else None
        norm = max(1e-30, float(sum(one.norm.sum() for one in curves)))
        losses = (np.concatenate([one.loss for one in curves]) / norm * sample.weight).astype(np.float32)
        return tower, losses, sampling, shared

    def _publish(self, done: Mapping[int, TrainedLayer]) -> None:
        """Use these routers from now on, and keep them."""
        trained, _ = spread_budget({**self._trained(), **done}, SELECTIVITY)
        self.prompts = {**self.prompts, **{n: self.prompts.get(n, 0) + 1 for n in done}}
        self.plan = self._planned(trained)
        keep(self.routers(), self.folder, self.decoder.config)

    def _trained(self) -> dict[int, TrainedLayer]:
        return {n: layer.trained for n, layer in self.plan.layers.items() if self.prompts.get(n)}

    def routers(self) -> Routers:
        """Those there are, of the layers that have some, on the CPU."""
        first = next(iter(self.plan.layers.values()))
        layout = {name: first.options.get(name, getattr(Layout(), name)) for name in ("sinks", "window")}
        name = Path(str(self.decoder.config._name_or_path)).name
        config = {
            "model": {"name": name, "fingerprint": self._fingerprint, **self._shape},
            "layout": layout, "router": "two-tower", "partition": "per-prompt", "nlist": self.options.nlist,
            PROMPTS: {str(n): count for n, count in sorted(self.prompts.items())},
            "versions": {"saap_index": __version__, "torch": torch.__version__},
        }
        layers, budget = spread_budget(self._trained(), SELECTIVITY)
        config |= {} if budget is None else {"budget": budget}
        return Routers(config, {n: layer.to("cpu") for n, layer in layers.items()})

    # -- what a user is told -------------------------------------------------------------------------------------------

    def _tell(self, todo: Sequence[int], tokens: int) -> None:
        fresh = sum(not self.prompts.get(number) for number in todo)
        what = f"training routers of {fresh} layers" if fresh else f"refining routers of {len(todo)} layers"
        LOGGER.warning(
            "%s on this prompt of %d tokens, once, for at most %.0f s and %.0f MB; decoding is sparse then. They are kept in %s. "
            "attach(..., train='never') trains none, routers= brings others.",
            what, tokens, self.options.max_seconds, self.options.max_bytes / 2**20, self.folder,
        )

    @contextmanager
    def _bar(self, total: int) -> Iterator[Callable[[], Any]]:
        from tqdm import tqdm
        from transformers.utils import logging

        shown = self.options.progress and logging.is_progress_bar_enabled()
        with tqdm(total=total, desc="training routers", unit="layer", disable=not shown) as bar:
            yield bar.update


def _untrained(heads: int, d: int) -> TwoTower:
    """A tower of the shape that training makes, which asks for the query itself."""
    outputs = d + _KNOTS + 1
    skip = torch.zeros((heads, outputs, d), dtype=torch.float32, device="cpu")
    skip[:, :d] = torch.eye(d, dtype=torch.float32, device="cpu")
    zeros = skip.new_zeros
    hidden, out = zeros((heads, _HIDDEN, d)), zeros((heads, outputs, _HIDDEN))
    return TwoTower(RouterWeights(hidden, zeros((heads, _HIDDEN)), out, skip, zeros((heads, outputs)), d))


def _rows(index: Any, sequence: int, heads: slice) -> tuple[Tensor, Tensor]:
    """Keys (h, n, d) and values (h, n, e) of some heads of a sequence in the order of its text, copies, in the storage dtype."""
    n, lists = index.lengths[sequence], index.invlists
    ids = lists.row_ids(sequence)
    sides = []
    for read, width in ((lists.key_rows, index.d), (lists.value_rows, index.d_v)):
        out = torch.empty((heads.stop - heads.start, n, width), dtype=index.dtype, device=index.device)
        for place, head in enumerate(range(heads.start, heads.stop)):
            out[place, ids[head].long()] = read(sequence, 0, n, head).to(index.dtype)
        sides.append(out)
    return sides[0], sides[1]


def _joined(parts: Sequence[TwoTower]) -> TwoTower:
    """The towers of some heads and of the next as one."""
    tensors = {name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()}
    return TwoTower.of(tensors, parts[0].d, parts[0].first_knot)


__all__ = ["PromptLearner", "options_of"]
