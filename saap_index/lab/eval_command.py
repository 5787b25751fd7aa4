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
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..demo import model as demo_model
from ..demo import routers as demo_routers
from ..demo import texts as demo_texts
from ..errors import LengthError, ParameterError
from ..hf import support
from ..pipeline import models
from ..pipeline.texts import TokenSequence, digest, read_texts, take
from ..rope import Rope
from ..routers import Routers, load_routers
from . import eval_report, evaluate, flags, needles, trained
from .evaluate import Records, Settings
from .flags import check_names, check_shares
from .needles import Needle
from .trained import TrainedMethods

TASKS = ("layers", "end", "needles")
KEYS = 4  # of a multi-key needle

Say = Callable[[str], None]


@dataclass(frozen=True)
class EvalTask:
    """What is measured on which texts.

    sequences : of one length; budgets : shares of the tokens between sinks and window; masses : targets of ``target_mass``;
    layers : measured one by one, None for all that have routers; decoded : tokens at the end of each sequence with every layer
    replaced, where queries are taken for the layers too; queries : of each layer and sequence; lengths, depths : of needles;
    filler : text that hides them; identity : tells models and routers apart.
    """

    model: Any
    tokenizer: Any
    routers: Routers
    sequences: Sequence[TokenSequence]
    budgets: tuple[float, ...] = (0.02, 0.05, 0.1)
    methods: tuple[str, ...] = ("saap", "topk_group", "recent")
    masses: tuple[float, ...] = ()
    tasks: tuple[str, ...] = TASKS
    layers: tuple[int, ...] | None = None
    decoded: int = 256
    queries: int = 32
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    filler: str = ""
    identity: str = ""


def evaluate_routers(task: EvalTask, out: Path, say: Say = lambda line: None) -> Records:
    """Measure what the records in ``out`` lack, and write the reports. CompatibilityError for routers of another model,
    ParameterError and LengthError for what cannot be measured, or a folder with records of another task."""
    settings, methods = _checked(task)
    files.make_folder(out)
    records = Records(out / "records.json")
    same = {"identity": task.identity, "continuation": task.decoded, "step": settings.step}
    _same(records, "task", same)
    for number, (_, tokens) in enumerate(task.sequences):
        _same(records, f"digest/{number}", digest([("", list(tokens))]))
    rope = Rope.from_config(task.model.config, layer=min(task.routers.layers))
    clock = _Clock(task, methods, settings, say)
    try:
        for number, (_, tokens) in enumerate(task.sequences if {"layers", "end"} & {*task.tasks} else ()):
            at = partial(methods.at, len(tokens), task.budgets)
            evaluate.evaluate_text(task.model, rope, f"{number}", tokens, at, settings, records, clock.step)
            clock.sequence_done(number + 1)
        for length, asked in _needles(task):
            at = partial(methods.at, length, task.budgets)
            for name, needle in asked.items():
                _same(records, f"asked/{name}", hashlib.sha256(needle.prompt.encode()).hexdigest()[:16])
            evaluate.evaluate_needles(
                task.model, task.tokenizer, rope, asked, at, settings.shares, records, clock.step, settings.replaced
            )
    finally:
        records.flush()
    depth = task.model.config.num_hidden_layers
    files.write_text(out / "table.txt", eval_report.as_text(records.rows, depth))
    files.write_json(out / "summary.json", eval_report.summary(records.rows, depth))
    try:
        eval_report.plot(records.rows, depth, out)
    except ImportError:
        say("no plots: they need matplotlib")
    return records


def _checked(task: EvalTask) -> tuple[Settings, TrainedMethods]:
    task.routers.check(task.model.config)
    methods = check_flags(task.routers, task.tasks, task.budgets, task.methods, task.masses, task.layers, task.depths)
    known = sorted(task.routers.layers)
    layers = tuple(known) if task.layers is None else task.layers
    layout = {"sinks": methods.layout.sinks, "window": methods.layout.window}
    least = layout["sinks"] + layout["window"] + 2 * max(2, task.decoded)
    for name, length in [("length", len(tokens)) for _, tokens in task.sequences] + [("needle-lengths", x) for x in task.lengths]:
        models.check_positions(name, task.model.config, length)
        if length < least:
            raise LengthError(f"{name}: expected at least {least} tokens with this continuation and window, got {length}")
    if task.decoded < 2 or task.queries < 1:
        raise ParameterError(
            f"continuation, queries: expected at least 2 tokens and 1 query, got {task.decoded} and {task.queries}"
        )
    return Settings(
        shares=methods.shares(task.budgets), layers=layers if "layers" in task.tasks else (), span=task.decoded,
        step=max(1, task.decoded // task.queries), decoded=task.decoded if "end" in task.tasks else 0,
        sinks=layout["sinks"], window=layout["window"], replaced=tuple(known), together=True,
    ), methods  # fmt: skip


def check_flags(
    routers: Routers, tasks: Sequence[str], budgets: Sequence[float], methods: Sequence[str], masses: Sequence[float],
    layers: Sequence[int] | None, depths: Sequence[float],
) -> TrainedMethods:  # fmt: skip
    """ParameterError for what cannot be measured with these routers, before a model or a text is read; the methods."""
    check_names("tasks", tasks, TASKS)
    check_shares("budgets", budgets)
    if not set(layers or ()) <= set(routers.layers):
        raise ParameterError(f"layers: expected some of {sorted(routers.layers)}, got {list(layers or ())}")
    if not all(0 <= depth <= 1 for depth in depths):
        raise ParameterError(f"depths: expected places in [0, 1], 0 first, got {', '.join(map(str, depths))}")
    return TrainedMethods(routers, methods, masses)


def _same(records: Records, key: str, what: Any) -> None:
    if records.once(key, lambda: what) != what:
        raise ParameterError("out: expected a folder of the same model, routers, texts and settings, got another's")


def _needles(task: EvalTask) -> Iterator[tuple[int, Mapping[str, Needle]]]:
    """(length, needles by name), those of one document together: a passkey at each depth, and a document of several keys."""
    if "needles" not in task.tasks:
        return
    places = [(wanted + 0.5) / KEYS for wanted in range(KEYS)]
    for length in task.lengths:
        for number, depth in enumerate(task.depths):
            one = partial(needles.passkey, depth=depth, seed=number)
            yield length, {f"passkey.{length}.{depth:g}": _fitting(task, length, [one])[0]}
        several = [partial(needles.multi_key, keys=KEYS, seed=length, wanted=wanted) for wanted in range(KEYS)]
        found = _fitting(task, length, several)
        yield length, {f"multi-key.{length}.{depth:g}": needle for depth, needle in zip(places, found, strict=True)}


def _fitting(task: EvalTask, length: int, makers: Sequence[Callable[[str, int], Needle]]) -> list[Needle]:
    """Needles of one document that have at most so many tokens, the answer included, and hardly fewer."""
    characters = int(len(task.filler) / max(1, len(models.encode(task.tokenizer, task.filler))) * length)
    for _ in range(20):
        found = [make(task.filler, characters) for make in makers]
        asked = max(len(models.encode(task.tokenizer, needle.question)) for needle in found)
        tokens = len(models.encode(task.tokenizer, found[0].document)) + asked + evaluate.ANSWER_TOKENS
        if tokens <= length:
            return found
        characters = int(characters * min(0.99, length / tokens))
    raise LengthError(f"needle-lengths: expected room for a question, got {length} tokens")


class _Clock:
    """Lines of progress with the time that is left, if every step takes what the steps of this run took."""

    def __init__(self, task: EvalTask, methods: TrainedMethods, settings: Settings, say: Say) -> None:
        each = sum(len(methods.at(0, task.budgets, share)) for share in settings.shares)
        count = len(settings.layers or ())
        self.per_sequence = 1 + count + (each if settings.decoded else 0)
        sequences = len(task.sequences) if count or settings.decoded else 0
        asked = len(task.lengths) * (len(task.depths) + KEYS) if "needles" in task.tasks else 0
        self.total = sequences * self.per_sequence + asked * each
        self.at, self.steps, self.began, self.say = 0, 0, time.monotonic(), say

    def step(self, line: str) -> None:
        self.at, self.steps = min(self.total, self.at + 1), self.steps + 1
        left = (time.monotonic() - self.began) / self.steps * (self.total - self.at)
        self.say(f"{line}  [{self.at}/{self.total}, about {left / 60:.1f} min left]")

    def sequence_done(self, count: int) -> None:
        """What an earlier run measured is no step of this one."""
        self.at = count * self.per_sequence


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
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the CPU (default %(default)s)")


def run(options: argparse.Namespace) -> int:
    """The command. Raises what `load_model`, `load_routers`, `read_texts` and `evaluate_routers` raise."""
    torch.set_num_threads(max(1, options.threads))
    folder = options.routers or demo_routers.found()
    routers = load_routers(folder)
    if options.nlist is not None:
        routers = replace(routers, layers={n: layer.with_lists(options.nlist) for n, layer in routers.layers.items()})
    tasks, names = flags.names(options.tasks), flags.names(options.methods or trained.DEFAULT)
    if options.methods is None and not trained.publishable(routers):
        names = tuple(name for name in names if name != "published")
    budgets, depths = flags.numbers("budgets", options.budgets, float), flags.numbers("depths", options.depths, float)
    masses = flags.numbers("target-mass", options.target_mass, float) if options.target_mass else ()
    layers = None if options.layers is None else flags.numbers("layers", options.layers, int)
    lengths = tuple(options.length // part for part in (4, 2, 1))
    if options.needle_lengths:
        lengths = flags.numbers("needle-lengths", options.needle_lengths, int)
    check_flags(routers, tasks, budgets, names, masses, layers, depths)
    if routers.dense_layers:
        advised = ", ".join(map(str, routers.dense_layers))
        say(f"the routers advise to leave layers {advised} dense; here they are replaced like the others")
    if options.model is None:
        model, tokenizer = demo_model.load()
    else:
        loaded = models.load_model(options.model, dtype="float32")
        model, tokenizer = loaded.model, loaded.tokenizer
    for name, tokens in (("length", options.length), ("needle-lengths", max(lengths))):
        models.check_positions(name, model.config, tokens)
    given = list(read_texts(options.text) if options.text else demo_texts.unseen_texts())
    sequences = take(given, partial(models.encode, tokenizer), options.sequences, options.length, "--sequences or --length")
    task = EvalTask(
        model, tokenizer, routers, sequences, budgets, names, masses, tasks, layers, options.continuation, options.queries,
        lengths, depths, _filler(given, 6 * options.length),
        f"{support.fingerprint(support.decoder_of(model))} {_checksum(folder)}" + (f" {options.nlist}" if options.nlist else ""),
    )  # fmt: skip
    evaluate_routers(task, options.out, say)
    print((options.out / "table.txt").read_text())
    print(f"wrote records.json, table.txt, summary.json and plots to {options.out}")
    return 0


def _filler(documents: Sequence[tuple[str, str]], characters: int) -> str:
    """Some of every document, as long as there are so many characters: needles lie in text of all kinds."""
    each = max(1, characters // max(1, len(documents)))
    found = "\n".join(text[:each] for _, text in documents)
    return found if len(found) >= characters else "\n".join(text for _, text in documents)[:characters]


def _checksum(folder: Path) -> str:
    value = hashlib.sha256()
    for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
        value.update(path.read_bytes())
    return value.hexdigest()[:16]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
