"""`attach` and `detach`: a model of transformers decodes through its indexes, and becomes again what it was.

Nothing of the model is replaced, but for the forward of a decoder on a GPU (graphs.py). Attaching chooses the attention
function, by transformers' own setting, and registers one forward pre-hook on the decoder, through which the cache that
`generate` makes becomes a `SaapCache`. The attention modules of indexed layers are marked, so that keys of a cache that went past
the hook are refused and not attended to densely.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from ..errors import CompatibilityError, ParameterError, StateError
from ..routers import Routers
from ..shipped import from_pretrained
from ..training.prompt import PromptTraining
from . import support
from .attention import INDEXED, NAME
from .audit import AuditStats
from .cache import ATTACHED, SaapCache, adopt, plan_of
from .capture import obstacle
from .graphs import GraphedDecoder, GraphWarning
from .kept import folder_of, kept_routers
from .layer_plan import LayerPlan
from .learner import PromptLearner, options_of
from .options import MAX_SPARSE_TOKENS, AttachOptions
from .plan import Plan, make_plan
from .weighing import weighing


class Attachment:
    """What was done to a model, and how to undo it."""

    def __init__(self, model: Any, plan: Plan | None) -> None:
        assert plan is not None
        self._plan = plan
        decoder = support.decoder_of(model)
        self._name = support.cache_argument(decoder)
        self._place = list(inspect.signature(decoder.forward).parameters).index(self._name)
        self._before = decoder.config._attn_implementation
        decoder.set_attn_implementation(NAME)
        self._hook = decoder.register_forward_pre_hook(self._prepare, with_kwargs=True)
        self._after = decoder.register_forward_hook(self._finish, with_kwargs=True, always_call=True)
        for attention in self._indexed(decoder):
            setattr(attention, INDEXED, True)
        self._weighing, self._weights = ExitStack(), dict[int, float]()
        self._graphed: GraphedDecoder | None = None
        if plan.cuda_graphs:
            decoder.forward = self._graphed = GraphedDecoder(decoder, plan, self._name, plan.cuda_graphs is True)

    @property
    def plan(self) -> Plan:
        """The one that holds now."""
        plan: Plan = self._plan if self._plan.learner is None else self._plan.learner.plan
        return plan

    def _prepare(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Put a `SaapCache` in place of the cache that a forward brings, whatever it is called.

        One that asks for a cache and brings none gets it here, where the decoder would make a `DynamicCache` of its own.
        """
        tokens = _new_tokens(args, kwargs)
        for name, value in kwargs.items():
            if value is not None and (name in support.CACHE_NAMES or isinstance(value, Cache)):
                return args, {**kwargs, name: self._adopt(value, module, tokens)}
        cache = args[self._place] if len(args) > self._place else None
        if cache is None and (not kwargs.get("use_cache") or torch.is_grad_enabled()):
            return None
        cache = self._adopt(cache, module, tokens)
        if len(args) > self._place:
            return (*args[: self._place], cache, *args[self._place + 1 :]), kwargs
        return args, {**kwargs, self._name: cache}

    def _finish(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After a forward that is through, or that failed and has no output."""
        if not torch.compiler.is_compiling():
            self._weighing.close()
            for value in (*args, *kwargs.values()):
                if isinstance(value, SaapCache):
                    value.call.finish() if output is not None else value.call.fail()
                    if output is not None and self._weights:
                        value.weigh(self._weights)
            self._weights = {}

    def _adopt(self, cache: Any, decoder: Any, tokens: int) -> SaapCache:
        learner = self._plan.learner
        if learner is None or torch.compiler.is_compiling():
            return self._adopted(cache, decoder)
        learner.renew(getattr(cache, "layers", ()))
        if type(cache) is SaapCache and cache.plan.learner is learner:
            cache.plan = learner.plan
        adopted = self._adopted(cache, decoder)
        learner.before_call(adopted, tokens)
        self._weighing.close()  # of a call that was interrupted
        sampled = [number for number, layer in adopted.indexed.items() if layer.sample is not None]
        if sampled and tokens > adopted.plan.max_sparse_tokens:
            self._weights = self._weighing.enter_context(weighing(decoder, sampled, tokens // 2))
        if self._graphed is not None:
            self._graphed.plan = learner.plan
        return adopted

    def _adopted(self, cache: Any, decoder: Any) -> SaapCache:
        if type(cache) is not SaapCache or cache.plan is not self.plan:
            return self._wrap(cache, decoder)
        if not torch.compiler.is_compiling():
            cache.begin(decoder)
        return cache

    @torch.compiler.disable
    def _wrap(self, cache: Any, decoder: Any) -> SaapCache:
        return adopt(DynamicCache(config=self.plan.config) if cache is None else cache, self.plan, decoder)

    def _indexed(self, decoder: Any) -> Iterator[Any]:
        """The attention modules whose layers are indexed."""
        layers = support.attention_layers(decoder)
        return (layers[number].self_attn for number in self.plan.layers)

    def undo(self, model: Any) -> None:
        decoder = support.decoder_of(model)
        if self._graphed is not None:
            self._graphed.close()
            del decoder.forward
        self._weighing.close()
        self._hook.remove()
        self._after.remove()
        for attention in self._indexed(decoder):
            delattr(attention, INDEXED)
        decoder.set_attn_implementation(self._before)


def _new_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many tokens a call of a decoder brings; 0 if it does not say so in a way that is known."""
    for name, place in (("input_ids", 0), ("inputs_embeds", None)):
        value = kwargs.get(name) if place is None or len(args) <= place else args[place]
        if isinstance(value, torch.Tensor) and value.ndim >= 2:
            return int(value.shape[1])
    return 0


def attach(
    model: Any,
    routers: Routers | str | os.PathLike[str] | None = None,
    selectivity: float | None = None,
    *,
    dense_layers: Sequence[int] = (),
    max_sparse_tokens: int = MAX_SPARSE_TOKENS,
    audit_every: int = 0,
    audit_bound: float | None = None,
    cuda_graphs: bool | str = "auto",
    train: str | PromptTraining = "auto",
    **options: Any,
) -> Any:
    """Let a model of transformers decode through indexes over its keys; `generate` and everything around it stay as they are.

    Prompts are attended to densely, by SDPA, and indexed on the way; each step of decoding then reads ``selectivity`` of what is
    indexed. A context shorter than ``break_even`` stays dense, bit for bit what SDPA gives. If it is not given, it is the length
    from which a step of these layers and this budget is faster sparse than dense on this machine, 1024 at least: measured once,
    which takes seconds, and kept in the cache folder (``SAAP_CACHE``, or ``~/.cache/saap_index``).

    Parameters
    ----------
    model : a decoder of transformers (`PreTrainedModel`), in evaluation mode. Layers with a sliding window stay as they are.
    routers : trained for this model, or a folder or a name of shipped ones, see `from_pretrained`. None: those that were kept of
        earlier prompts, and see ``train``.
    selectivity : share of the indexed tokens that a step reads, 0.05 if not given; or ``nprobe`` or ``target_mass`` in options.
    dense_layers : numbers of layers to leave dense, -1 is the last.
    max_sparse_tokens : a call that brings at most so many tokens behind an indexed context searches it, as decoding does; one
        that brings more is a chunk of a prompt, and dense. A larger number makes questions on a long document cheap.
    audit_every : compare one step in so many with dense attention over the same index, one layer in turn; 0: none. `audit_stats`
        tells the attention captured, the output error and their drift over the text. An audited layer takes about as long as two
        dense passes over it, and returns what it returns otherwise.
    audit_bound : least share of the attention outside sinks and window that the newest audits may capture; below it comes an
        `AuditWarning`. None: 0.1 less than ``saap train`` measured for these layers and this budget, of the routers that know it.
    cuda_graphs : replay the steps of one token from a CUDA graph of the whole decoder, made for each cache at its second such
        step (docs/gpu.md). "auto": for a model on a GPU, with a `GraphWarning` if it is none that a graph can hold; True: or
        CompatibilityError, and StateError in the call whose step cannot be recorded; False: never. A model that moves to a GPU
        later is attached to there.
    train : without routers, "auto": the first prompt of 2048 tokens or more is read densely as ever, and trains some, before its
        first step of decoding: seconds a layer, with a line of logging (``saap_index``) and a bar. They are kept in the cache
        folder under the checksum of the model's weights; two prompts more refine them. A `PromptTraining` sets bounds of time and
        memory and all else; "never": ParameterError where none were kept.
    options : further ones of `AsymmetricIndex`: window, sinks, break_even, target_mass, tail, backend; storage, "SQ8" or
        "SQ8/SQ4", of indexed keys and values; nlist, if lists are made for each prompt: more for contexts far longer than those
        of the training.

    Returns the same model.

    Raises CompatibilityError for a model, routers or layers that do not fit, naming what does not; StateError for a model that is
    attached already; ParameterError; MissingDependencyError without a version of transformers that is supported.
    """
    if getattr(model, ATTACHED, None) is not None:
        raise StateError("model: expected one without routers attached; call detach first")

    asked = AttachOptions.of(
        options, selectivity=selectivity, dense_layers=dense_layers, max_sparse_tokens=max_sparse_tokens,
        audit_every=audit_every, audit_bound=audit_bound, cuda_graphs=cuda_graphs,
    )

    def graphs(decoder: Any, layers: Mapping[int, LayerPlan]) -> bool | str:
        why_not = "audits, which compare on the host" if asked.audit_every else obstacle(decoder, layers)
        return _graphs(decoder, asked.cuda_graphs, why_not)

    def make(routers: Routers) -> Plan:
        return make_plan(model, routers, asked, graphs)

    training = options_of(train)
    if routers is None:
        plan = _learning(model, training, make, asked.own_shares)
    elif isinstance(train, PromptTraining):
        raise ParameterError("train: expected no PromptTraining beside routers, which are used as they are, got one")
    else:
        plan = make(from_pretrained(routers) if isinstance(routers, str | os.PathLike) else routers)
    setattr(model, ATTACHED, Attachment(model, plan))
    return model


def _learning(model: Any, training: PromptTraining | None, make: Callable[[Routers], Plan], own_shares: bool) -> Plan:
    """The plan of a model without routers, or with those that were kept."""
    decoder = support.decoder_of(model)
    if training is None:
        folder = folder_of(decoder)
        kept = kept_routers(folder, decoder.config)
        if kept is None:
            raise ParameterError(
                f"routers: expected some, as train='never' makes none, got None, and none of this model's are in {folder}"
            )
        return make(kept)
    learner = PromptLearner(model, training)
    plan = learner.make(make, own_shares)
    return replace(plan, learner=None) if learner.complete else plan


def _graphs(decoder: Any, cuda_graphs: bool | str, why_not: str | None) -> bool | str:
    """``cuda_graphs``, or False where no graph is to be made."""
    if not cuda_graphs or why_not is None:
        return cuda_graphs
    what = f"cuda_graphs: expected a model whose decode steps a CUDA graph can hold, got {why_not}"
    if cuda_graphs is True:
        raise CompatibilityError(what)
    if any(x.device.type == "cuda" for x in decoder.parameters()):
        warnings.warn(f"{what}; decoding stays eager, which cuda_graphs=False asks for", GraphWarning, stacklevel=5)
    return False


def audit_stats(model: Any) -> AuditStats:
    """What the audits of an attached model say so far; StateError for one that was not attached with ``audit_every``."""
    plan = plan_of(model)
    if plan is None or plan.audit is None:
        raise StateError("model: expected one that attach was called on with audit_every, got another")
    return plan.audit.stats()


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
