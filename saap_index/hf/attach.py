"""`attach` and `detach`: a model of transformers decodes through its indexes, and becomes again what it was.

Nothing of the model is replaced. Attaching chooses the attention function, by transformers' own setting, and registers one
forward pre-hook on the decoder, through which the cache that `generate` makes becomes a `SaapCache`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import StateError
from ..routers import Routers
from . import support
from .attention import NAME
from .cache import ATTACHED, SaapCache, adopt, plan_of
from .plan import MAX_SPARSE_TOKENS, Plan, make_plan


class Attachment:
    """What was done to a model, and how to undo it."""

    def __init__(self, model: Any, plan: Plan | None) -> None:
        assert plan is not None
        self.plan = plan
        decoder = support.decoder_of(model)
        self._before = decoder.config._attn_implementation
        decoder.set_attn_implementation(NAME)
        self._hook = decoder.register_forward_pre_hook(self._prepare, with_kwargs=True)
        self._after = decoder.register_forward_hook(self._finish, with_kwargs=True, always_call=True)

    def _prepare(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        if cache is None or (type(cache) is SaapCache and cache.plan is self.plan):
            if cache is not None and not torch.compiler.is_compiling():
                cache.begin(module)
            return None
        return args, {**kwargs, "past_key_values": self._adopt(cache, module)}

    def _finish(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After a forward that is through, or that failed and has no output."""
        if not torch.compiler.is_compiling():
            for value in (*args, *kwargs.values()):
                if isinstance(value, SaapCache):
                    value.call.finish() if output is not None else value.call.fail()

    @torch.compiler.disable
    def _adopt(self, cache: Any, decoder: Any) -> SaapCache:
        return adopt(cache, self.plan, decoder)

    def undo(self, model: Any) -> None:
        self._hook.remove()
        self._after.remove()
        support.decoder_of(model).set_attn_implementation(self._before)


def attach(
    model: Any,
    routers: Routers,
    selectivity: float | None = None,
    *,
    dense_layers: Sequence[int] = (),
    max_sparse_tokens: int = MAX_SPARSE_TOKENS,
    **options: Any,
) -> Any:
    """Let a model of transformers decode through indexes over its keys; `generate` and everything around it stay as they are.

    Prompts are attended to densely, by SDPA, and indexed on the way; each step of decoding then reads ``selectivity`` of what is
    indexed. A context shorter than ``break_even`` stays dense, bit for bit what SDPA gives.

    Parameters
    ----------
    model : a decoder of transformers (`PreTrainedModel`), in evaluation mode. Layers with a sliding window stay as they are.
    routers : trained for this model, see `load_routers`.
    selectivity : share of the indexed tokens that a step reads, 0.05 if not given; or ``nprobe`` or ``target_mass`` in options.
    dense_layers : numbers of layers to leave dense, -1 is the last.
    max_sparse_tokens : a call that brings at most so many tokens behind an indexed context searches it, as decoding does; one
        that brings more is a chunk of a prompt, and dense. A larger number makes questions on a long document cheap.
    options : further ones of `AsymmetricIndex`: window, sinks, break_even, target_mass, tail, backend; nlist, if lists are made
        for each prompt: more for contexts far longer than those of the training.

    Returns the same model.

    Raises CompatibilityError for a model, routers or layers that do not fit, naming what does not; StateError for a model that is
    attached already; ParameterError; MissingDependencyError without a version of transformers that is supported.
    """
    if getattr(model, ATTACHED, None) is not None:
        raise StateError("model: expected one without routers attached; call detach first")
    setattr(model, ATTACHED, Attachment(model, make_plan(model, routers, selectivity, dense_layers, max_sparse_tokens, options)))
    return model


@contextmanager
def detached(model: Any) -> Iterator[Any]:
    """The model as it is without its routers, for as long as the context lasts; caches of before fit again afterwards."""
    plan = plan_of(model)
    detach(model)
    try:
        yield model
    finally:
        setattr(model, ATTACHED, Attachment(model, plan))


def detach(model: Any) -> Any:
    """Undo `attach`: the attention function of before, and no hook. Returns the same model; StateError if it is not attached.

    A cache made in between holds its keys in another order, and can be used no more.
    """
    attachment: Attachment | None = getattr(model, ATTACHED, None)
    if attachment is None:
        raise StateError("model: expected one that attach was called on")
    attachment.undo(model)
    delattr(model, ATTACHED)
    return model
