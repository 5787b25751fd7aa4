"""`saap eval`: what trained routers are worth on a model and on text that they have not seen.

saap eval --model ./checkpoint --routers routers --text novel.txt notes/ --out results
saap eval --routers routers --tasks layers --layers 3,14,26 --budgets 0.02,0.05        the demo's model, one table only

Three tasks. layers: attention captured and output error, layer by layer. end: the last tokens of each sequence with every layer
replaced, against the dense model's next-token distributions. needles: facts hidden in the text and asked for, the question
processed sparsely too. Yardsticks read as many bytes as the index does.

The folder gets records.json, table.txt, summary.json and plots. The same command goes on after an interruption; more sequences,
budgets or methods than before are added to what is there.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from saap_index.errors import LengthError, ParameterError
from saap_index.hf import models, support
from saap_index.pipeline.command import say
from saap_index.pipeline.texts import TokenSequence, pack_sequences, read_texts
from saap_index.routers import Routers, load_routers

from . import compare, evaluate, flags, needles, trained
from .compare import Task
from .evaluate import Settings
from .needles import Haystack, Needle
from .smollm2 import model as demo_model
from .smollm2 import routers as demo_routers
from .smollm2 import texts as demo_texts
from .trained import TrainedMethods

TASKS = ("layers", "end", "needles")
KEYS = 4  # of a multi-key needle


def router_task(
    model: Any, tokenizer: Any, identity: str, methods: TrainedMethods, sequences: Sequence[TokenSequence], *,
    tasks: Sequence[str] = TASKS, layers: Sequence[int] | None = None, continuation: int = 256, queries: int = 32,
    lengths: Sequence[int] = (), depths: Sequence[float] = (0.1, 0.5, 0.9), filler: str = "",
) -> Task:
    """`saap eval` as a task of the comparison.

    identity : tells models and routers apart
    sequences : of one length
    tasks : of `TASKS`
    layers : measured one by one, None for all that have routers
    continuation : tokens at the end of each sequence with every layer replaced, where queries are taken for the layers too
    queries : of each layer and sequence
    lengths, depths : of needles, in tokens and in [0, 1]
    filler : text that hides them

    Raises ParameterError and LengthError for what cannot be measured.
    """
    check_flags(methods, tasks, layers, depths)
    methods.dtype = model.dtype
    indexed, layout = tuple(sorted(methods.routers.layers)), methods.layout
    least = layout.sinks + layout.window + 2 * max(2, continuation)
    for name, length in [("length", len(tokens)) for _, tokens in sequences] + [("needle-lengths", n) for n in lengths]:
        models.check_positions(name, model.config, length)
        if length < least:
            raise LengthError(f"{name}: expected at least {least} tokens with this continuation and window, got {length}")
    if continuation < 2 or queries < 1:
        raise ParameterError(f"continuation, queries: expected at least 2 tokens and 1 query, got {continuation} and {queries}")
    wanted = indexed if layers is None else tuple(layers)
    settings = Settings(
        shares=methods.shares(), layers=wanted if "layers" in tasks else (), span=continuation,
        step=max(1, continuation // queries), decoded=continuation if "end" in tasks else 0, sinks=layout.sinks,
        window=layout.window, replaced=indexed, together=True,
    )
    haystacks = [x for n in lengths for x in _haystacks(tokenizer, filler, n, depths)] if "needles" in tasks else []
    return Task(model, tokenizer, identity, sequences, 0, methods, settings, haystacks, reports=compare.ROUTERS)


def check_flags(
    methods: TrainedMethods, tasks: Sequence[str], layers: Sequence[int] | None, depths: Sequence[float]
) -> None:
    """ParameterError for what cannot be measured with these methods, before a model or a text is read."""
    flags.check_names("tasks", tasks, TASKS)
    flags.check_shares("budgets", methods.budgets)
    if not set(layers or ()) <= set(methods.routers.layers):
        raise ParameterError(f"layers: expected some of {sorted(methods.routers.layers)}, got {list(layers or ())}")
    if not all(0 <= depth <= 1 for depth in depths):
        raise ParameterError(f"depths: expected places in [0, 1], 0 first, got {', '.join(map(str, depths))}")


def _haystacks(tokenizer: Any, filler: str, length: int, depths: Sequence[float]) -> list[Haystack]:
    """A passkey at each depth, and a document of several keys."""
    haystacks = []
    for number, depth in enumerate(depths):
        one = _fitting(tokenizer, filler, length, [partial(needles.passkey, depth=depth, seed=number)])
        haystacks.append(Haystack({f"passkey.{length}.{depth:g}": one[0]}, length))
    several = [partial(needles.multi_key, keys=KEYS, seed=length, wanted=wanted) for wanted in range(KEYS)]
    keys = _fitting(tokenizer, filler, length, several)
    named = {f"multi-key.{length}.{(wanted + 0.5) / KEYS:g}": needle for wanted, needle in enumerate(keys)}
    return [*haystacks, Haystack(named, length)]


def _fitting(tokenizer: Any, filler: str, length: int, makers: Sequence[Callable[[str, int], Needle]]) -> list[Needle]:
    """Needles of one document that have at most so many tokens, the answer included, and hardly fewer."""
    characters = int(len(filler) / max(1, len(models.encode(tokenizer, filler))) * length)
    for _ in range(20):
        made = [make(filler, characters) for make in makers]
        question = max(len(models.encode(tokenizer, needle.question)) for needle in made)
        tokens = len(models.encode(tokenizer, made[0].document)) + question + evaluate.ANSWER_TOKENS
        if tokens <= length:
            return made
        characters = int(characters * min(0.99, length / tokens))
    raise LengthError(f"needle-lengths: expected room for a question, got {length} tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="checkpoint folder or GGUF file (default: the demo's SmolLM2-135M)")
    parser.add_argument("--routers", type=Path, help="folder that saap train wrote (default: those of SmolLM2-135M)")
    parser.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="unseen files, folders, data sets (default: Python's documentation)"
    )
    parser.add_argument("--nlist", type=int, help="lists, if each prompt makes its own (default: as many as in training)")
    parser.add_argument("--out", type=Path, default=Path("eval_results"), help="folder to write (default %(default)s)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="default %(default)s")
    parser.add_argument("--methods", help=f"of {', '.join(trained.METHODS)} (default {trained.DEFAULT})")
    parser.add_argument("--budgets", default="0.02,0.05,0.1", help="shares of the tokens, on average (default %(default)s)")
    parser.add_argument("--target-mass", help="targets as 0.9,0.95: the index reads what each needs, at most a quarter")
    parser.add_argument("--sequences", type=int, default=4, help="to measure (default %(default)s)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a sequence (default %(default)s)")
    parser.add_argument("--continuation", type=int, default=256, help="tokens at its end that are replaced (default %(default)s)")
    parser.add_argument("--layers", help="measured one by one, as 3,8,14 (default: all that have routers)")
    parser.add_argument("--queries", type=int, default=32, help="positions per layer and sequence (default %(default)s)")
    parser.add_argument("--needle-lengths", help="tokens, as 2048,8192 (default: a quarter, a half and the whole of --length)")
    parser.add_argument("--depths", default="0.1,0.5,0.9", help="of passkeys, 0 first, 1 last (default %(default)s)")
    flags.add_computing(parser)


def run(options: argparse.Namespace) -> int:
    """The command. Raises what `load_model`, `load_routers`, `read_texts` and `compare.compare` raise."""
    computing = flags.computing(options)
    folder = options.routers or demo_routers.newest()
    routers = load_routers(folder)
    if options.nlist is not None:
        routers = replace(routers, layers={n: layer.with_lists(options.nlist) for n, layer in routers.layers.items()})
    methods = _methods(options, routers)
    tasks, depths = flags.names(options.tasks), flags.numbers("depths", options.depths, float)
    layers = None if options.layers is None else flags.numbers("layers", options.layers, int)
    lengths: tuple[int, ...] = ()
    if "needles" in tasks:
        asked = options.needle_lengths
        lengths = flags.numbers("needle-lengths", asked, int) if asked else tuple(options.length // part for part in (4, 2, 1))
    check_flags(methods, tasks, layers, depths)
    flags.check_count("sequences", options.sequences, 0 if set(tasks) == {"needles"} else 1)
    for name, least in (("length", 1), ("continuation", 2), ("queries", 1)):
        flags.check_count(name, getattr(options, name), least)
    if routers.dense_layers:
        advised = ", ".join(map(str, routers.dense_layers))
        say(f"the routers advise to leave layers {advised} dense; here they are replaced like the others")
    if options.model is None:
        model, tokenizer = demo_model.load(**computing)
    else:
        loaded = models.load_model(options.model, **computing)
        model, tokenizer = loaded.model, loaded.tokenizer
    for name, tokens in (("length", options.length), *(("needle-lengths", length) for length in lengths)):
        models.check_positions(name, model.config, tokens)
    documents = list(read_texts(options.text) if options.text else demo_texts.unseen_texts())
    encode = partial(models.encode, tokenizer)
    sequences = pack_sequences(documents, encode, options.sequences, options.length, "--sequences or --length")
    identity = f"{support.fingerprint(support.decoder_of(model))} {_checksum(folder)}{compare.dtype_mark(model)}"
    task = router_task(
        model, tokenizer, identity + (f" {options.nlist}" if options.nlist else ""), methods, sequences, tasks=tasks,
        layers=layers, continuation=options.continuation, queries=options.queries, lengths=lengths, depths=depths,
        filler=compare.filler(documents, 6 * options.length),
    )
    return compare.finish(task, options.out)


def _methods(options: argparse.Namespace, routers: Routers) -> TrainedMethods:
    names = flags.names(options.methods or trained.DEFAULT)
    if options.methods is None and not trained.publishable(routers):
        names = tuple(name for name in names if name != "published")
    masses = flags.numbers("target-mass", options.target_mass, float) if options.target_mass else ()
    return TrainedMethods(routers, names, flags.numbers("budgets", options.budgets, float), masses)


def _checksum(folder: Path) -> str:
    value = hashlib.sha256()
    for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
        value.update(path.read_bytes())
    return value.hexdigest()[:16]
