"""`SaapCache`: a cache of transformers whose global layers are indexes. Knows the model only by its plan."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..errors import CompatibilityError, ParameterError, StateError
from ..routers import Routers
from ..search.params import SearchParametersIVF
from ..search.stats import IndexStats
from .calls import Call, undo_of
from .layer import IndexedLayer
from .options import MAX_SPARSE_TOKENS, AttachOptions
from .plan import Plan, make_plan
from .rotation import rotary_of
from .support import decoder_of


class SaapCache(DynamicCache):
    """A `DynamicCache` in which the layers that attend to the whole context keep their keys and values in an index.

    For a model that `attach` was called on, `generate` makes one by itself; pass your own as ``cache``, which is
    ``past_key_values`` before transformers 5.24, to keep it: for a chat, for a prompt that is asked many times, to save it. For a
    model loaded with attn_implementation="saap", pass it always.

    model : a model of transformers; routers, selectivity, options : as in `attach`, and not given if that was called.
    max_tokens : room to make at once, in tokens per sequence; a cache grows without it, but copies itself when it does.

    Raises what `attach` raises; StateError for a model with another attention function.
    """

    def __init__(
        self,
        model: Any,
        routers: Routers | None = None,
        selectivity: float | None = None,
        *,
        dense_layers: Sequence[int] = (),
        max_sparse_tokens: int = MAX_SPARSE_TOKENS,
        max_tokens: int = 0,
        **options: Any,
    ) -> None:
        plan = plan_of(model)
        if routers is not None:
            if plan is not None:
                raise StateError("routers: expected none for a model they are attached to; detach first, or leave them out")
            named = {"selectivity": selectivity, "dense_layers": dense_layers, "max_sparse_tokens": max_sparse_tokens}
            plan = make_plan(model, routers, AttachOptions.of(options, **named))
        elif plan is None:
            raise StateError("routers: expected those of the model, or a model that they are attached to, got neither")
        elif selectivity is not None or options or dense_layers or max_sparse_tokens != MAX_SPARSE_TOKENS:
            raise ParameterError("options: expected none for an attached model, whose own hold; set selectivity afterwards")
        if plan.config._attn_implementation != "saap":
            raise StateError(
                f"model: expected attn_implementation='saap', got {plan.config._attn_implementation!r}; load it so or attach"
            )
        self._start(plan, DynamicCache(config=plan.config).layers, decoder_of(model), max_tokens)

    def _start(self, plan: Plan, layers: list[Any], decoder: Any, max_tokens: int = 0) -> None:
        """Take ``layers``, the list itself, and put an index in place of those that the plan says."""
        Cache.__init__(self, layers=layers)
        self.plan, self.call, self._decoder = plan, Call(), weakref.ref(decoder)
        made = {}
        for number, layer_plan in plan.layers.items():
            old = layers[number]
            if isinstance(old, IndexedLayer):
                if old.plan is not layer_plan:
                    raise CompatibilityError("cache: expected a cache of this model and these routers, got another's")
                continue
            made[number] = IndexedLayer(layer_plan, plan.max_sparse_tokens, max_tokens)
            made[number].rotary = rotary_of(decoder)
            if old.is_initialized and old.get_seq_length():
                made[number].adopt(old.keys, old.values)
        for number, layer in made.items():
            layers[number] = layer
        for layer in self.indexed.values():
            layer.call = self.call
            layer.rotary = rotary_of(decoder)

    def begin(self, decoder: Any) -> None:
        """A call of this decoder, perhaps a copy of the one the cache was made for. One that was interrupted is taken back."""
        self.call.fail()
        self._decoder = weakref.ref(decoder)
        if self.plan.rotates_by_length:
            for layer in self.indexed.values():
                layer.rotary = rotary_of(decoder)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What transformers calls in every layer, see `IndexedLayer.update`."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if isinstance(layer, DynamicLayer) and not torch.compiler.is_compiling():
            self.call.begin(layer, undo_of(layer))
        pair: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return pair

    # -- what it holds -------------------------------------------------------------------------------------------------

    @property
    def indexed(self) -> dict[int, IndexedLayer]:
        """The layers that are indexed, by number."""
        return {number: layer for number, layer in enumerate(self.layers) if isinstance(layer, IndexedLayer)}

    def weigh(self, weights: Mapping[int, float]) -> None:
        """Note, beside the sampled queries of a prompt, what attention adds to the hidden state of each layer."""
        for number, layer in self.indexed.items():
            if layer.sample is not None and number in weights:
                layer.sample = replace(layer.sample, weight=weights[number])

    def set_search(self, params: SearchParametersIVF | None) -> None:
        """Search with these parameters in place of the attached ones, in this cache alone; None: with those again."""
        for layer in self.indexed.values():
            layer.params = params

    def stats(self) -> dict[int, IndexStats]:
        """`AsymmetricIndex.stats` of every indexed layer that holds tokens."""
        return {number: layer.index.stats() for number, layer in self.indexed.items() if layer.index is not None}

    def tokens_read(self) -> float:
        """Share of the stored tokens that the last step read, a mean over indexed layers, sequences and KV heads; 1 if dense."""
        shares = []
        for layer in self.indexed.values():
            last = layer.last_search()
            if last is not None:
                shares.append((last.read_sealed + last.dense_tokens) / max(1.0, last.sealed_tokens + last.dense_tokens))
        return sum(shares) / len(shares) if shares else 1.0

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], tokens: Tensor | None = None) -> None:
        """Write everything this cache holds to a folder, for `load` in a later process.

        tokens : int64 (b, n), the token ids that were cached, to be kept beside it.

        The folder appears whole or not at all, in place of a saved prompt of that name. Under tensor parallelism every process
        writes a folder of its own inside. With it goes a checksum of the weights that the model has now: save before they change.

        Raises OSError; FileExistsError if something else has that name; StateError if the model is gone; DTypeError or ShapeError
        for other tokens.
        """
        from .saving import save

        if self.plan.learner is not None:
            self.plan.learner.finish(self)  # a prompt that is saved is through
        decoder = self._decoder()
        if decoder is None:
            raise StateError("save: expected the model of this cache, whose weights go with what is saved, got one that is gone")
        save(self, path, tokens, decoder)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any, *, max_tokens: int = 0, verify: bool = False) -> SaapCache:
        """Map what `save` wrote into memory, for a model that `attach` was called on with the same routers.

        Takes no longer for a long prompt than for a short one: the disk is read when attention asks for a token. The folder must
        not change while the cache is in use. ``tokens`` of the result are those that were saved, or None.

        verify : read everything now and compare checksums. Without it everything is checked that says how much there is and where
        it lies; damage to the keys, values and ids themselves is not seen.

        Raises FormatError for damaged files, CompatibilityError for those of another model, other routers or another share of
        the heads, OSError.
        """
        from .saving import load

        plan = plan_of(model)
        if plan is None:
            raise StateError("model: expected one that routers are attached to, got one without; call attach first")
        cache: SaapCache = load(cls, path, model, plan, max_tokens, verify)
        return cache

    tokens: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> SaapCache:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StateError("pickle: expected save and load, which write a SaapCache to a folder, got a cache to pickle")


def adopt(cache: Any, plan: Plan, decoder: Any) -> SaapCache:
    """A `SaapCache` over the layers of a cache that transformers or a user made, which keeps sharing them.

    What the cache holds already is indexed. Raises CompatibilityError for a kind of cache that an index cannot take the place of.
    """
    if isinstance(cache, SaapCache):
        if cache.plan is not plan:
            raise CompatibilityError("cache: expected a cache of this model and these routers, got another's")
        return cache
    kinds = [type(layer) for layer in getattr(cache, "layers", [])]
    if not isinstance(cache, DynamicCache) or any(
        kinds[number] not in (DynamicLayer, IndexedLayer) for number in plan.layers if number < len(kinds)
    ):
        raise CompatibilityError(
            f"cache: expected a DynamicCache or SaapCache, got {type(cache).__name__}; with an index attached, leave "
            "cache_implementation at its default"
        )
    if cache.offloading:
        raise CompatibilityError("cache: expected a cache that stays where it is, got offloading=True")
    missing = plan.num_layers - len(cache.layers)
    if missing > 0:  # layers of the kind that the cache itself would add: without a config, it keeps all tokens in all of them
        kind = cache.layer_class_to_replicate
        new_layers = [kind() for _ in range(missing)] if kind else DynamicCache(config=plan.config).layers[-missing:]
        cache.layers.extend(new_layers)
    new = SaapCache.__new__(SaapCache)
    new._start(plan, cache.layers, decoder)
    return new


def plan_of(model: Any) -> Plan | None:
    """The plan that `attach` made for a model; None if it is not attached."""
    attachment = getattr(model, ATTACHED, None)
    return None if attachment is None else attachment.plan


ATTACHED = "_saap_attached"
"""Attribute of an attached model."""
