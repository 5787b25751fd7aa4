"""A model, its routers and a text: rotation, parity with dense attention, attention captured, needles, speed, memory.

The text is read once, densely; both sides go on from there. Knows checkpoints by what `load_model` returns.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saap_index.errors import CompatibilityError, LengthError
from saap_index.hf import crossover, models, support
from saap_index.hf.attach import Attachment, detach
from saap_index.hf.audit import AuditWarning
from saap_index.hf.break_even import LayerTimes, key_of
from saap_index.hf.cache import ATTACHED, SaapCache, adopt
from saap_index.hf.generate import decode, read
from saap_index.hf.models import LoadedModel
from saap_index.hf.options import AttachOptions
from saap_index.hf.plan import Plan, make_plan
from saap_index.hf.slots import NEVER
from saap_index.pipeline import capture
from saap_index.routers import LayerRouters, Routers, model_shape
from saap_index.routing.quantizer import KeyQuantizer
from saap_index.routing.rope import Rope
from saap_index.routing.router import QueryRouter
from saap_index.search.params import SELECTIVITY, SearchParametersIVF

from ..needles import Needle, multi_key
from .findings import FAIL, OK, SKIPPED, WARN, Finding, check
from .machine import GIB, available_bytes

LAST = 16
"""Tokens at the end of the text that are decoded by force, both ways."""

QUESTION, ANSWER = 48, 8
"""Most tokens of a question about a needle, and of its answer."""

NEEDLES = 4
ROPE_TOKENS = 256
MOST_FAIL, MOST_WARN = 0.10, 0.05
"""How much less of the attention than training measured is a failure, and a warning."""

LEAST_TOKENS = 512


@dataclass
class Text:
    """A text read once: ids (1, n) of all but the last ones, those, the needles in it, and the model's own cache of the first."""

    document: Tensor
    last: Tensor
    needles: list[Needle]
    cache: Any
    seconds: float

    @property
    def tokens(self) -> int:
        return self.document.shape[1] + self.last.shape[1]


def examine(
    loaded: LoadedModel, routers: Routers | None, text: str, tokens: int, selectivity: float = SELECTIVITY,
    say: Callable[[str], None] = lambda line: None,
) -> list[Finding]:
    """Every row about a model. routers : None if none are there, or fit; text : what it is to read, cut to ``tokens``."""
    model = loaded.model
    of_routers = ("captured attention", "needles")
    say("rotation")
    findings = [check("RoPE", lambda: check_rope(model, routers, tokens))]
    try:
        say("reading the text")
        seen = read_text(loaded, text, tokens)
        options = AttachOptions((), QUESTION, selectivity=selectivity, break_even=0)
        plan = make_plan(model, routers or plain_routers(model), options)
    except Exception as error:
        rows = ("dense parity", *of_routers, "crossover", "model memory")
        if findings[0].verdict == FAIL and isinstance(error, CompatibilityError):
            return [*findings, *(Finding(row, SKIPPED, "routers cannot be attached to a model that rotates so") for row in rows)]
        findings.append(Finding("text", FAIL, f"{type(error).__name__}: {error}", "give a text and a model that fit"))
        return [*findings, *(Finding(row, SKIPPED, "no text was read") for row in rows)]
    setattr(model, ATTACHED, Attachment(model, plan.audited(1, in_turn=False)))
    try:
        say("sparse against dense")
        cache = indexed(seen.cache, getattr(model, ATTACHED).plan, support.decoder_of(model))
        want = dense_logits(model, seen)
        findings.append(check("dense parity", lambda: check_parity(model, cache, seen, want)))
        if routers is None:
            findings += [Finding(row, SKIPPED, "no routers that fit", "give --routers") for row in of_routers]
        else:
            findings.append(check("captured attention", lambda: check_captured(model, cache, seen, want, selectivity)))
            say("needles")
            findings.append(check("needles", lambda: check_needles(loaded, cache, seen)))
        kept = cache.stats()
    finally:
        detach(model)
    say("crossover")
    findings.append(check("crossover", lambda: check_crossover(model, plan, seen.tokens)))
    findings.append(check("model memory", lambda: check_model_memory(model, kept, seen.tokens)))
    return findings


def plain_routers(model: Any) -> Routers:
    """Routers as of a plain IVF index around random centroids: enough to see that reading everything is dense attention."""
    decoder = support.decoder_of(model)
    shape = model_shape(decoder.config)
    heads, d = shape["num_key_value_heads"], shape["head_dim"]
    centroids = torch.randn((heads, 32, d), generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    layers = {}
    for number in support.global_layers(decoder):
        rope = Rope.from_config(decoder.config, layer=number)
        layers[number] = LayerRouters(KeyQuantizer(centroids), QueryRouter.symmetric(centroids), rope, rope, d**-0.5)
    return Routers({"model": shape, "layout": {"sinks": 4, "window": 64}}, layers)


# -- rotation ----------------------------------------------------------------------------------------------------------


def check_rope(model: Any, routers: Routers | None, tokens: int) -> Finding:
    """Whether RoPE is undone exactly: one token, repeated, has the same key at every position, in every layer, once it is.

    Attention over equal values is that value, so the hidden states stay equal from layer to layer. All layers over a short text,
    the first over all ``tokens``.
    """
    decoder = support.decoder_of(model)
    numbers = support.global_layers(decoder) if routers is None else sorted(routers.layers)
    ropes = {number: _rope_of(decoder, routers, number) for number in numbers}
    errors: dict[int, float] = {}

    def keep(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        if layer in ropes:
            errors[layer] = max(errors.get(layer, 0.0), _unequal(key[0].float(), ropes[layer]))
        if layer == numbers[-1] or (key.shape[2] > ROPE_TOKENS and layer == numbers[0]):
            raise capture.Finished

    token = int(model.config.get_text_config(decoder=True).vocab_size) // 2
    capture.run(model, [token] * min(tokens, ROPE_TOKENS), keep)
    if tokens > ROPE_TOKENS:
        capture.run(model, [token] * tokens, keep)
    bound = 2e-3 + 4 * torch.finfo(decoder.dtype).eps
    worst = max(errors, key=lambda number: errors[number])
    figures = {"error": errors[worst], "layer": worst, "bound": bound, "layers": len(errors)}
    if not errors[worst] < bound:
        return Finding(
            "RoPE", FAIL, f"not undone: keys of one token differ by {errors[worst]:.1%} in layer {worst}, {ropes[worst]}",
            "the model rotates otherwise than its config says: keys land in wrong lists. Correct rope_parameters, or report the "
            "model", figures,
        )
    return Finding("RoPE", OK, f"undone within {errors[worst]:.1e} in {len(errors)} layers, {tokens} positions", "", figures)


def _rope_of(decoder: Any, routers: Routers | None, number: int) -> Rope | None:
    if routers is None:
        return Rope.from_config(decoder.config, layer=number)
    layer = routers.layers[number]
    return layer.model_rope if layer.rope is None else layer.rope


def _unequal(keys: Tensor, rope: Rope | None) -> float:
    """Largest distance of a key (h, n, d) from the first, by the length of that."""
    n = keys.shape[1]
    plain = keys if rope is None else rope.unrotate(keys, np.arange(n), n)
    first = plain[:, :1]
    return float(((plain - first).norm(dim=-1) / first.norm(dim=-1)).max())


# -- one text, both ways -----------------------------------------------------------------------------------------------


def read_text(loaded: LoadedModel, text: str, tokens: int) -> Text:
    """Hide needles in the text, cut it to ``tokens`` and read all but the end of it densely. LengthError for one too short."""
    from transformers import DynamicCache

    model, tokenizer = loaded.model, loaded.tokenizer
    whole = len(models.encode(tokenizer, text))
    length = min(tokens, whole)
    if length < LEAST_TOKENS:
        why = "a longer --text" if whole <= tokens else "more --tokens, or a model with positions for more"
        raise LengthError(f"text: expected {LEAST_TOKENS} tokens or more, got {length}; give {why}")
    characters = int(len(text) / whole * length)
    needles = [multi_key(text, characters, NEEDLES, seed=0, wanted=wanted) for wanted in range(NEEDLES)]
    ids = torch.tensor([models.encode(tokenizer, needles[0].document)[:tokens]], dtype=torch.int64, device=model.device)
    document, last = ids[:, :-LAST], ids[:, -LAST:]
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.inference_mode():
        seconds = read(model, document, cache, None)
    return Text(document, last, needles, cache, seconds)


def indexed(dense: Any, plan: Plan, decoder: Any) -> SaapCache:
    """The same tokens in indexes; ``dense`` stays what it is."""
    other = copy.copy(dense)
    other.layers = [layer if n in plan.layers else copy.deepcopy(layer) for n, layer in enumerate(dense.layers)]
    with torch.inference_mode():
        return adopt(other, plan, decoder)


@torch.inference_mode()
def _logits(model: Any, ids: Tensor, cache: Any, step: int) -> Tensor:
    """Next-token logits (n, vocabulary) behind each of ``ids`` (1, n), shown ``step`` at a time."""
    kept = {support.cache_argument(model): cache}
    return torch.cat([model(part, **kept).logits[0].float() for part in ids.split(step, 1)])


class _Detached:
    """The model without its indexes for a while; afterwards caches of before fit again."""

    def __init__(self, model: Any) -> None:
        self.model, self.plan = model, getattr(model, ATTACHED).plan

    def __enter__(self) -> None:
        detach(self.model)

    def __exit__(self, *error: object) -> None:
        setattr(self.model, ATTACHED, Attachment(self.model, self.plan))


def dense_logits(model: Any, seen: Text) -> Tensor:
    with _Detached(model):
        return _logits(model, seen.last, seen.cache, LAST)


def _kl(want: Tensor, got: Tensor) -> float:
    p, q = want.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def check_parity(model: Any, cache: SaapCache, seen: Text, want: Tensor) -> Finding:
    """Whether reading everything through the indexes is the dense model."""
    cache.set_search(SearchParametersIVF(selectivity=1.0))
    audit = getattr(model, ATTACHED).plan.audit
    every, audit.every = audit.every, NEVER
    try:
        got = _logits(model, seen.last, cache, 1)
    finally:
        audit.every = every
        cache.set_search(None)
        cache.crop(seen.document.shape[1] - cache.get_seq_length())
    kl, same = _kl(want, got), float((want.argmax(-1) == got.argmax(-1)).double().mean())
    bound = 1e-5 if model.dtype == torch.float32 else 2e-2
    figures = {"kl": kl, "top1": same, "bound": bound}
    if not kl < bound:
        return Finding(
            "dense parity", FAIL, f"reading everything is not the dense model: KL {kl:.2g}, same first choice in {same:.0%}",
            "report it, with this table and the model's name; use the model without the index", figures,
        )
    return Finding("dense parity", OK, f"reading everything: KL {kl:.1g} from the dense model over {LAST} tokens", "", figures)


def check_captured(model: Any, cache: SaapCache, seen: Text, want: Tensor, selectivity: float) -> Finding:
    """Attention captured at the budget, in every layer and each of the last tokens, against what training measured."""
    audit = getattr(model, ATTACHED).plan.audit
    audit.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AuditWarning)  # the row says it
        got = _logits(model, seen.last, cache, 1)
    stats = audit.stats()
    kl, same = _kl(want, got), float((want.argmax(-1) == got.argmax(-1)).double().mean())
    missing = stats.promised - stats.captured
    figures = {
        "captured": stats.captured, "promised": stats.promised, "total": stats.total, "error": stats.error, "kl": kl,
        "top1": same, "selectivity": selectivity, "tokens_read": cache.tokens_read(),
        "layers": {n: {"captured": x.captured, "promised": x.promised, "error": x.error} for n, x in stats.layers.items()},
    }
    promise = f"{stats.promised:.1%}" if math.isfinite(stats.promised) else "nothing"
    words = (
        f"{stats.captured:.1%} of the attention outside sinks and window at selectivity {selectivity:g}, training measured "
        f"{promise}; {stats.total:.1%} of all, output error {stats.error:.3f}, KL {kl:.2g}"
    )
    if not math.isfinite(missing):
        return Finding("captured attention", WARN, words, "train the routers with saap train, which measures them", figures)
    if missing > MOST_FAIL:
        advice = "these routers do not fit this model or this text: train them on such text (saap train), or read more"
        return Finding("captured attention", FAIL, words, advice, figures)
    if missing > MOST_WARN:
        return Finding("captured attention", WARN, words, "the text is of another kind than those trained on: read more", figures)
    return Finding("captured attention", OK, words, "", figures)


def check_needles(loaded: LoadedModel, cache: SaapCache, seen: Text) -> Finding:
    """Facts hidden in the text and asked for, the question searched too: by the dense model and by the indexes."""
    model = loaded.model
    getattr(model, ATTACHED).plan.audit.every = NEVER  # what is measured here are answers
    sparse_right = _answers(loaded, cache, seen)
    with _Detached(model):
        dense_right = _answers(loaded, seen.cache, seen)
    figures = {"dense": dense_right, "sparse": sparse_right, "asked": len(seen.needles), "tokens": seen.tokens}
    words = f"dense finds {dense_right}, sparse {sparse_right} of {len(seen.needles)} facts in {seen.tokens} tokens"
    if sparse_right < dense_right - 1:
        return Finding("needles", FAIL, words, "read more (selectivity or target_mass), or train routers on such text", figures)
    if not dense_right:
        return Finding("needles", WARN, words, "the model alone does not find them: this says nothing of the index", figures)
    if sparse_right < dense_right:
        return Finding("needles", WARN, words, "read more, if such facts matter", figures)
    return Finding("needles", OK, words, "", figures)


@torch.inference_mode()
def _answers(loaded: LoadedModel, cache: Any, seen: Text) -> int:
    right = 0
    for needle in seen.needles:
        before = cache.get_seq_length()
        ids = models.encode(loaded.tokenizer, needle.question)[-QUESTION:]
        question = torch.tensor([ids], dtype=torch.int64, device=loaded.model.device)
        answer = decode(loaded.model, question, cache, ANSWER, None, set(), lambda token: None, lambda: None)
        right += needle.answer in loaded.tokenizer.decode(answer.tokens)
        cache.crop(before - cache.get_seq_length())
    return right


# -- speed and memory --------------------------------------------------------------------------------------------------


def check_crossover(model: Any, plan: Plan, tokens: int) -> Finding:
    """From which length a step is faster sparse than dense on this machine, and both at the text's length."""
    number = min(plan.layers)
    layer = plan.layers[number]
    device = next(iter(support.attention_layers(support.decoder_of(model))[number].self_attn.parameters())).device
    times = LayerTimes(layer, model.dtype, device)
    key = key_of(layer, model.dtype, device)
    measured = crossover.measured(key, times)
    dense, sparse = times(tokens)
    figures = {"break_even": measured.tokens, "tokens": tokens, "dense_s": dense, "sparse_s": sparse, "steps": measured.steps}
    words = f"{measured.tokens} tokens; at {tokens} a layer takes {1e3 * dense:.2f} ms dense and {1e3 * sparse:.2f} ms sparse"
    if tokens < measured.tokens:
        return Finding("crossover", WARN, words, "the text is shorter: it stays dense, the index gains nothing on it", figures)
    return Finding("crossover", OK, words, "", figures)


def check_model_memory(model: Any, stats: Any, tokens: int) -> Finding:
    """Weights, keys and values, what the indexes add, and whether the longest text that the model takes would fit."""
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    kv, extra = sum(x.kv_bytes for x in stats.values()), sum(x.metadata_bytes for x in stats.values())
    shared = sum(x.shared_bytes for x in stats.values())
    longest = int(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", tokens))
    need = (kv + extra) * longest // tokens
    free = available_bytes() if model.device.type == "cpu" else torch.cuda.mem_get_info(model.device)[0]
    figures = {"weights_bytes": weights, "kv_bytes": kv, "index_bytes": extra, "router_bytes": shared, "longest": longest,
               "needed_bytes": need, "available_bytes": free}
    words = (
        f"weights {weights / GIB:.2f} GiB, K and V {kv / GIB:.3f} GiB at {tokens} tokens, indexes {extra / max(1, kv):.1%} "
        f"more, routers {shared / GIB:.3f} GiB; {need / GIB:.2f} GiB at the model's {longest} tokens"
    )
    if free is not None and need > free:
        return Finding("model memory", WARN, f"{words}, of {free / GIB:.2f} free", "keep texts shorter, or free memory", figures)
    return Finding("model memory", OK, words, "", figures)
