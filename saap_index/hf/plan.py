"""How each layer of a model is indexed: its routers, shapes and options. Frozen data, shared by every cache of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .. import checks
from ..errors import CompatibilityError, ParameterError
from ..index import AsymmetricIndex
from ..routers import Routers
from ..routing.rope import Rope
from ..search.params import SELECTIVITY
from . import support
from .audit import Audit, promised_shares
from .break_even import break_evens
from .layer_plan import LayerPlan
from .options import AttachOptions
from .probe import check_rotation


@dataclass(frozen=True)
class Plan:
    """One model: the layers that are indexed, and what of its shape a saved prompt must agree with.

    evaluation : what training measured of the routers, by layer, see `audit.promised_shares`; audit : that of the layers.
    cuda_graphs : as in `attach`; False where none can be made. learner : the `PromptLearner` whose plan it is, or None.
    """

    layers: Mapping[int, LayerPlan]
    num_layers: int
    max_sparse_tokens: int
    config: Any
    identity: Mapping[str, Any]
    evaluation: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    audit: Audit | None = field(default=None, repr=False, compare=False)
    cuda_graphs: bool | str = False
    learner: Any = field(default=None, repr=False, compare=False)

    def audited(self, every: int, bound: float | None = None, in_turn: bool = True) -> Plan:
        """The same plan, with an `Audit` of every layer's searches. ParameterError for a value outside its range."""
        shares, targets = {}, set()
        for number, layer in self.layers.items():
            by_head = layer.options.get("budget_shares")
            share = layer.options.get("selectivity") or SELECTIVITY
            if layer.options.get("nprobe") is None and layer.options.get("target_mass") is None:
                shares[number] = min(1.0, share * (1.0 if by_head is None or share == 1 else float(np.mean(by_head))))
            targets.add(layer.options.get("target_mass"))
        promised = promised_shares(self.evaluation, shares)
        audit = Audit(every, list(self.layers), promised, targets.pop(), bound, in_turn)
        return replace(self, layers={n: replace(layer, audit=audit) for n, layer in self.layers.items()}, audit=audit)

    def __deepcopy__(self, memo: Any) -> Plan:
        return self  # nothing of it changes, and a copied cache is to fit the model as the first one does

    @property
    def rotates_by_length(self) -> bool:
        """Whether the angles of a layer depend on the length of the text."""
        return any(layer.trained.rope is not None and layer.trained.rope.is_dynamic for layer in self.layers.values())

    @property
    def dense_layers(self) -> list[int]:
        return [number for number in range(self.num_layers) if number not in self.layers]


def make_plan(
    model: Any,
    routers: Routers,
    options: AttachOptions,
    cuda_graphs: Callable[[Any, Mapping[int, LayerPlan]], bool | str] = lambda decoder, layers: False,
) -> Plan:
    """Check a model against its routers and decide which layers are indexed; see `attach`.

    A layer is indexed if it attends to the whole context, has a router, and is not named in ``dense_layers``. With
    ``audit_every`` every layer has an `Audit`.
    cuda_graphs : (decoder, layers that are indexed) -> what `Plan.cuda_graphs` is to be.
    """
    decoder = support.decoder_of(model)
    config = decoder.config
    support.check_decoder(decoder)
    if not isinstance(routers, Routers):
        raise ParameterError(f"routers: expected those that load_routers returns, got {type(routers).__name__}")
    routers.check(config)
    dense = support.check_dense_layers(options.dense_layers, config.num_hidden_layers)
    whole = support.global_layers(decoder)
    chosen = [number for number in whole if number in routers.layers and number not in dense]
    if not chosen:
        raise CompatibilityError(
            f"model: expected a layer with attention over the whole context that has a router and is not in dense_layers, got "
            f"layers {whole} with such attention, routers for {sorted(routers.layers)}, dense_layers {sorted(dense)}"
        )
    modules = support.attention_layers(decoder)
    layers = {number: _layer_plan(config, number, modules[number].self_attn, routers, options) for number in chosen}
    ropes = {number: plan.trained.rope for number, plan in layers.items()}
    check_rotation(decoder, {n: rope for n, rope in ropes.items() if rope == routers.layers[n].model_rope})
    graphs = cuda_graphs(decoder, layers)
    if options.break_even is None:
        for number, by_batch in break_evens(layers, modules, decoder.dtype, bool(graphs)).items():
            mine = {**layers[number].options, "break_even": by_batch[1]}
            layers[number] = replace(layers[number], options=mine, break_evens=by_batch, _empty={})
    rank, ranks = next(iter(layers.values())).shard
    identity = {
        "model_type": config.model_type, "layers": config.num_hidden_layers, "heads": config.num_attention_heads,
        "kv_heads": support.kv_heads_of(config), "hidden": config.hidden_size, "vocab": config.vocab_size, "rank": rank,
        "ranks": ranks,
    }
    evaluation = routers.config.get("evaluation") or {}
    plan = Plan(layers, config.num_hidden_layers, options.max_sparse_tokens, config, identity, evaluation, None, graphs)
    return plan.audited(options.audit_every, options.audit_bound) if options.audit_every else plan


def _layer_plan(
    config: Any, number: int, attention: Any, routers: Routers, options: AttachOptions
) -> LayerPlan:
    trained = routers.layers[number]
    if options.nlist is not None:
        trained = trained.with_lists(options.nlist)
    heads, kv_heads = config.num_attention_heads, support.kv_heads_of(config)
    h, nlist, d = trained.quantizer.centroids.shape
    support.check_head_dim(d, number)
    model_rope = Rope.from_config(config, layer=number)
    dim = getattr(attention, "head_dim", d)
    if h != kv_heads or d != dim or (model_rope is not None and model_rope.head_dim != d):
        raise CompatibilityError(
            f"routers: expected those of a model with {kv_heads} KV heads and {dim} dims in layer {number}, got {h} and {d}"
        )
    trained.check(h, d, nlist)
    shard = support.head_shard(attention)
    if kv_heads % shard[1]:
        raise CompatibilityError(f"model: expected KV heads that divide among {shard[1]} processes, got {kv_heads}")
    layout = routers.config.get("layout", {})
    mine = {name: layout[name] for name in ("sinks", "window") if name in layout}  # what they were trained outside of
    mine |= options.of_index
    shares = options.budget_shares if options.own_shares else trained.budget_shares
    trained = replace(trained, budget_shares=None if shares is None else checks.shares(shares, "budget_shares", kv_heads))
    types = getattr(config, "layer_types", None)
    AsymmetricIndex(d, nlist, heads, kv_heads, rope=trained.rope, **mine)  # what is wrong with an option is said now
    return LayerPlan(number, heads, kv_heads, trained, mine, shard, types[number] if types else None)

