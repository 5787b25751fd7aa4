"""`saap eval`: what trained routers are worth on a model and on text that they have not seen.

saap eval --model ./checkpoint --routers routers --text novel.txt notes/ --out results
saap eval --routers routers --tasks layers --layers 3,14,26 --budgets 0.02,0.05        the demo's model, one table only

Tasks. layers: attention captured and output error, layer by layer. end: the last tokens of each sequence with every layer
replaced, against the dense model's next-token distributions. needles: facts hidden in the text and asked for, the question
processed sparsely too. drift: KL by position in a long text that the dense model writes itself. ruler: the synthetic tasks of
RULER at the lengths of --lengths, dense and sparse side by side:

saap eval --model ./checkpoint --device cuda --dtype bfloat16 --tasks ruler --lengths 4096,8192 --methods dense,saap,topk_group

Without --routers a model of one's own gets some from the first sequences of the text, in seconds a layer. Yardsticks read as many
bytes as the index does.

The folder gets records.json, table.txt, summary.json and plots. The same command goes on after an interruption; more sequences,
budgets or methods than before are added to what is there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from saap_index import files
from saap_index.errors import CompatibilityError, LengthError, ParameterError
from saap_index.hf import models, support
from saap_index.hf.quick import train_on_prompts
from saap_index.pipeline.command import DAY_SECONDS, say
from saap_index.pipeline.texts import Document, TokenSequence, pack_sequences, read_texts
from saap_index.routers import Routers, load_routers
from saap_index.training.prompt import PromptTraining

from . import compare, drift, evaluate, flags, needles, ruler, trained
from .compare import Task
from .evaluate import Settings
from .method import Method
from .needles import Haystack, Needle
from .own import learns, load_methods
from .questions import ruler_questions
from .smollm2 import model as demo_model
from .smollm2 import routers as demo_routers
from .smollm2 import texts as demo_texts
from .trained import TrainedMethods

TASKS = ("layers", "end", "needles", "drift", "ruler")
DEFAULT_TASKS = "layers,end,needles"
_OF_LENGTHS = {"needles", "ruler"}
"""Tasks that make their own texts, of --lengths."""

Encode = Callable[[str], list[int]]

QUICK_PROMPTS = 3
"""Sequences that routers are learnt from where there are none."""
KEYS = 4  # of a multi-key needle


def router_task(
    model: Any, tokenizer: Any, identity: str, methods: TrainedMethods, sequences: Sequence[TokenSequence], *,
    tasks: Sequence[str] = TASKS[:3], layers: Sequence[int] | None = None, continuation: int = 256, queries: int = 32,
    lengths: Sequence[int] = (), depths: Sequence[float] = (0.1, 0.5, 0.9), filler: str = "",
    kinds: Sequence[str] = tuple(ruler.KINDS), samples: int = 5, seed: int = 0, training: int = 0,
    chat: bool = False, dense_question: bool = False,
    drift_tokens: int = 0,
) -> Task:
    """`saap eval` as a task of the comparison.

    identity : tells models and routers apart
    sequences : of one length
    tasks : of `TASKS`
    layers : measured one by one, None for all that have routers
    continuation : tokens at the end of each sequence with every layer replaced, where queries are taken for the layers too
    queries : of each layer and sequence
    lengths : of needles and of RULER's tasks, in tokens
    depths : of needles, in [0, 1]
    filler : text that hides them
    kinds, samples, seed : of RULER's tasks, see `ruler.KINDS`; so many of each kind and length
    training : so many sequences come first that a user's own methods learn from
    chat : put RULER's prompts into the chat template of the tokenizer
    drift_tokens : the dense model writes at the end of a sequence for drift, 0 for a quarter of it
    dense_question : read RULER's questions densely too, so that the answer alone is the method's

    Raises ParameterError and LengthError for what cannot be measured.
    """
    check_flags(methods, tasks, layers, depths)
    methods.dtype = model.dtype
    indexed, layout = tuple(sorted(methods.routers.layers)), methods.layout
    least = layout.sinks + layout.window + 2 * max(2, continuation)
    for name, length in [("length", len(tokens)) for _, tokens in sequences] + [("lengths", n) for n in lengths]:
        models.check_positions(name, model.config, length)
        if length < least and not (name == "lengths" and "needles" not in tasks):  # a prompt of RULER's has its own least length
            raise LengthError(f"{name}: expected at least {least} tokens with this continuation and window, got {length}")
    if continuation < 2 or queries < 1:
        raise ParameterError(f"continuation, queries: expected at least 2 tokens and 1 query, got {continuation} and {queries}")
    written = 0
    if "drift" in tasks:
        shortest = min((len(tokens) for _, tokens in sequences), default=0)
        written, room = drift_tokens or shortest // 4, shortest - layout.sinks - layout.window - 2
        if not drift.STRETCHES <= written <= room:
            raise LengthError(f"drift-tokens: expected {drift.STRETCHES} to {room} of {shortest} tokens, got {written}")
    wanted = indexed if layers is None else tuple(layers)
    settings = Settings(
        shares=methods.shares(), layers=wanted if "layers" in tasks else (), span=continuation,
        step=max(1, continuation // queries), decoded=continuation if "end" in tasks else 0, sinks=layout.sinks,
        window=layout.window, replaced=indexed, together=True, drift=written,
    )
    haystacks = [x for n in lengths for x in _haystacks(tokenizer, filler, n, depths)] if "needles" in tasks else []
    made = tokenizer, filler, lengths, kinds, samples, seed, chat, dense_question
    questions = ruler_questions(*made) if "ruler" in tasks else {}
    return Task(
        model, tokenizer, identity, sequences, training, methods, settings, haystacks, reports=compare.ROUTERS,
        questions=questions,
    )


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
    raise LengthError(f"lengths: expected room for a question, got {length} tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="checkpoint folder or GGUF file (default: the demo's SmolLM2-135M)")
    parser.add_argument("--routers", type=Path, help="folder that saap train wrote (default: those of SmolLM2-135M)")
    parser.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="unseen files, folders, data sets (default: Python's documentation)"
    )
    parser.add_argument("--nlist", type=int, help="lists, if each prompt makes its own (default: as many as in training)")
    parser.add_argument("--out", type=Path, default=Path("eval_results"), help="folder to write (default %(default)s)")
    parser.add_argument("--tasks", default=DEFAULT_TASKS, help="default %(default)s")
    parser.add_argument("--methods", help=f"of {', '.join(trained.METHODS)} (default {trained.DEFAULT})")
    flags.add_own(parser)
    parser.add_argument("--training", type=int, default=2, help="sequences that those learn from (default %(default)s)")
    parser.add_argument("--budgets", default="0.02,0.05,0.1", help="shares of the tokens, on average (default %(default)s)")
    parser.add_argument("--target-mass", help="targets as 0.9,0.95: the index reads what each needs, at most a quarter")
    parser.add_argument("--sequences", type=int, default=4, help="to measure (default %(default)s)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a sequence (default %(default)s)")
    parser.add_argument("--continuation", type=int, default=256, help="tokens at its end that are replaced (default %(default)s)")
    parser.add_argument("--layers", help="measured one by one, as 3,8,14 (default: all that have routers)")
    parser.add_argument("--queries", type=int, default=32, help="positions per layer and sequence (default %(default)s)")
    parser.add_argument(
        "--lengths", "--needle-lengths", dest="lengths",
        help="tokens of needles and ruler, as 4096,8192 (default: a quarter, a half and the whole of --length)",
    )
    parser.add_argument("--depths", default="0.1,0.5,0.9", help="of passkeys, 0 first, 1 last (default %(default)s)")
    parser.add_argument(
        "--drift-tokens", type=int, default=0,
        help="that the dense model writes at the end of a sequence, for the task drift (default: a quarter of --length)",
    )
    parser.add_argument("--ruler-tasks", default=",".join(ruler.KINDS), help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=5, help="of each of them and each length (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default %(default)s)")
    parser.add_argument("--chat-template", action="store_true", help="ask ruler's questions in the model's chat template")
    parser.add_argument(
        "--dense-question", action="store_true", help="of ruler: read the question densely too, the answer alone is sparse"
    )
    flags.add_tables(parser, "png")
    flags.add_computing(parser)


def run(options: argparse.Namespace) -> int:
    """The command. Raises what `load_model`, `load_routers`, `read_texts` and `compare.compare` raise."""
    computing = flags.computing(options)
    endings = flags.check_tables(options)
    reports = [each for each in compare.ROUTERS if endings or each != "plots"]
    own = load_methods(options.own, trained.METHODS)
    folder = options.routers or (None if options.model else demo_routers.newest())
    routers = None if folder is None else _with_lists(load_routers(folder), options)
    methods = None if routers is None else _methods(options, routers, own)
    tasks, depths = flags.names(options.tasks), flags.numbers("depths", options.depths, float)
    layers = None if options.layers is None else flags.numbers("layers", options.layers, int)
    kinds = flags.names(options.ruler_tasks)
    lengths: tuple[int, ...] = ()
    if _OF_LENGTHS & set(tasks):
        named = options.lengths
        lengths = flags.numbers("lengths", named, int) if named else tuple(options.length // part for part in (4, 2, 1))
    training = options.training if any(learns(kind) for kind in own.values()) else 0
    flags.check_names("tasks", tasks, TASKS)
    flags.check_names("ruler-tasks", kinds, ruler.KINDS)
    if methods is None:
        flags.check_names("methods", flags.names(options.methods or trained.DEFAULT), trained.METHODS)
        flags.check_shares("budgets", flags.numbers("budgets", options.budgets, float))
    else:
        check_flags(methods, tasks, layers, depths)
    count = 0 if set(tasks) <= _OF_LENGTHS else options.sequences
    flags.check_count("sequences", options.sequences, 0 if set(tasks) <= _OF_LENGTHS else 1)
    for name, least in (("length", 1), ("continuation", 2), ("queries", 1), ("samples", 1), ("training", 1), ("drift-tokens", 0)):
        flags.check_count(name, getattr(options, name.replace("-", "_")), least)
    if options.model is None:
        model, tokenizer = demo_model.load(**computing)
    else:
        loaded = models.load_model(options.model, **computing)
        model, tokenizer = loaded.model, loaded.tokenizer
    for name, tokens in (("length", options.length), *(("lengths", length) for length in lengths)):
        models.check_positions(name, model.config, tokens)
    documents = list(read_texts(options.text) if options.text else demo_texts.unseen_texts())
    encode = partial(models.encode, tokenizer)
    if methods is None:
        folder = _fitting_folder(model, options, documents, encode)
        routers = _with_lists(load_routers(folder), options)
        methods = _methods(options, routers, own)
        check_flags(methods, tasks, layers, depths)
    assert folder is not None and routers is not None
    if routers.dense_layers:
        advised = ", ".join(map(str, routers.dense_layers))
        say(f"the routers advise to leave layers {advised} dense; here they are replaced like the others")
    first = QUICK_PROMPTS if folder == options.out / "routers" else 0
    ask = "--sequences or --length"
    sequences = pack_sequences(documents, encode, first + training + count, options.length, ask)[first:]
    identity = f"{support.fingerprint(support.decoder_of(model))} {_checksum(folder)}{compare.dtype_mark(model)}"
    task = router_task(
        model, tokenizer, identity + (f" {options.nlist}" if options.nlist else ""), methods, sequences, tasks=tasks,
        layers=layers, continuation=options.continuation, queries=options.queries, lengths=lengths, depths=depths,
        filler=compare.filler(documents, 6 * max(options.length, *lengths, 0)), kinds=kinds, samples=options.samples,
        seed=options.seed, training=training, chat=options.chat_template, dense_question=options.dense_question,
        drift_tokens=options.drift_tokens,
    )
    return compare.finish(replace(task, endings=endings, reports=reports), options.out, options.csv, options.latex)


def _with_lists(routers: Routers, options: argparse.Namespace) -> Routers:
    if options.nlist is None:
        return routers
    return replace(routers, layers={n: layer.with_lists(options.nlist) for n, layer in routers.layers.items()})


def _fitting_folder(model: Any, options: argparse.Namespace, documents: Sequence[Document], encode: Encode) -> Path:
    """Of the demo's routers if they are of such a model; else of routers of the text's first sequences, learnt as `attach` learns
    from prompts, once for a folder of results."""
    with contextlib.suppress(CompatibilityError):
        folder = demo_routers.newest()
        load_routers(folder).check(model.config)
        return folder
    folder = options.out / "routers"
    if not folder.is_dir():
        prompts = pack_sequences(documents, encode, QUICK_PROMPTS, options.length, "--length")
        say(f"no routers are named: learning some from the first {QUICK_PROMPTS} sequences of the text")
        learning = PromptTraining(
            min_tokens=min(PromptTraining.min_tokens, options.length), prompts=QUICK_PROMPTS, max_seconds=DAY_SECONDS,
            progress=False,
        )
        learnt_from = [tokens for _, tokens in prompts]
        files.write_folder(folder, partial(train_on_prompts, model, learnt_from, learning), replaces=lambda _: False)
    return folder


def _methods(options: argparse.Namespace, routers: Routers, own: Mapping[str, type[Method]]) -> TrainedMethods:
    names = flags.names(options.methods or trained.DEFAULT)
    if options.methods is None and not trained.publishable(routers):
        names = tuple(name for name in names if name != "published")
    masses = flags.numbers("target-mass", options.target_mass, float) if options.target_mass else ()
    return TrainedMethods(routers, names, flags.numbers("budgets", options.budgets, float), masses, own)


def _checksum(folder: Path) -> str:
    value = hashlib.sha256()
    for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
        value.update(path.read_bytes())
    return value.hexdigest()[:16]
