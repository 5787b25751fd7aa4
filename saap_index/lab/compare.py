"""Every method on the user's own model at equal bytes: ``saap compare --model PATH --text FILES``.

Calibrates on the first sequences of the text, measures on the following ones, and writes records.json (a run that was stopped
goes on from there), table.txt and report.html into one folder. Knows no model and no text of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..errors import ParameterError, SaapError
from ..pipeline import models
from ..pipeline.texts import read_texts, take
from ..rope import Rope
from ..routers import Routers, load_routers
from . import evaluate, linear, moa_profile, needles, page, report
from .evaluate import Records, Settings
from .flags import check_names, check_shares, names, numbers
from .measures import exact_attention
from .replace import Prompt, read_prompt
from .roster import BATCH, KINDS, Build, Roster

DEFAULT_METHODS = ",".join(name for name in KINDS if name != "scfa-drop")
"""All but QK-drop, which needs a model trained with it and is no better than chance without."""

TRAINING_QUERIES = 256
LOOK_BINS = 128
PROFILE_TOKENS = 2048
"""Of a training sequence that MoA's profile looks at: it takes every entry of every head's attention, forward and back."""


@dataclass(frozen=True)
class Task:
    """sequences : (name, token numbers), of which the first ``training`` calibrate and the others are measured; needles : asked
    for per kind; filler : text that hides them; own : a user's methods by name; batch : sequences that share the reading of
    weights; routers : see `Indexes`; profile_tokens : of a training sequence that MoA's profile looks at."""

    model: Any
    tokenizer: Any
    title: str
    sequences: Sequence[tuple[str, Sequence[int]]]
    training: int
    methods: Sequence[str]
    settings: Settings
    needles: int = 0
    filler: str = ""
    own: dict[str, Build] | None = None
    batch: int = BATCH
    routers: Routers | None = None
    profile_tokens: int = PROFILE_TOKENS


def compare(task: Task, out: Path, progress: Callable[[str], None] = lambda line: None) -> Records:
    """Measure what the records in ``out`` lack, and write the reports. ParameterError for a task that cannot be measured."""
    if not 0 < task.training < len(task.sequences):
        raise ParameterError(f"training: expected 1 to {len(task.sequences) - 1} of the sequences, got {task.training}")
    check_names("methods", task.methods, (*KINDS, *(task.own or {})))
    check_shares("budgets", task.settings.shares)
    for _, tokens in task.sequences:
        models.check_positions("length", task.model.config, len(tokens))
    if task.batch < 1:
        raise ParameterError(f"batch: expected at least 1, got {task.batch}")
    if task.routers is not None:
        task.routers.check(task.model.config)
    files.make_folder(out)
    records = Records(out / "records.json")
    _check_same(task, records)
    rope = Rope.from_config(task.model.config)
    roster = _roster(task, rope, records, out, progress)
    clock = _Clock(task, roster, progress)
    for number, (_, tokens) in enumerate(task.sequences[task.training :]):
        name = f"{number}"
        evaluate.evaluate_text(task.model, rope, name, tokens, roster.at, task.settings, records, clock.step)
        if number == 0:
            _looks(task, rope, tokens, roster, records)
    for name, needle in _needles(task):
        shares = task.settings.decode_shares or task.settings.shares
        evaluate.evaluate_needle(task.model, task.tokenizer, rope, name, needle, roster.at, shares, records, clock.step)
    for (method, share), reason in roster.missing.items():
        records.once(f"missing/{method}/{share}", lambda reason=reason: {"reason": reason})  # type: ignore[misc]
    layer, length = roster.prompts[0].layers[0], len(task.sequences[0][1])
    records.once("cost", lambda: [vars(line) for line in linear.cost_lines(layer, length)])
    records.flush()
    depth = task.model.config.num_hidden_layers
    files.write_text(out / "table.txt", report.as_text(records.rows, depth))
    kinds = {**KINDS, **{name: roster.at(s)[i].kind for s in task.settings.shares for i, name in _own(roster, s)}}
    files.write_text(out / "report.html", page.html(records.rows, task.title, kinds, depth, _facts(task), task.batch))
    return records


def _own(roster: Roster, share: float) -> list[tuple[int, str]]:
    return [(i, m.name) for i, m in enumerate(roster.at(share)) if m.name not in KINDS]


def _check_same(task: Task, records: Records) -> None:
    """Records of another model, text or setting are not mixed with these."""
    lengths = [len(tokens) for _, tokens in task.sequences]
    first = [sum((i + 1) * t for i, t in enumerate(tokens)) % 1_000_003 for _, tokens in task.sequences]
    s = task.settings
    replaced = None if s.replaced is None else list(s.replaced)
    routers = None if task.routers is None else task.routers.config.get("data")
    always = s.span, s.step, s.sinks, s.window, s.decoded
    what = [task.title, task.training, lengths, first, *always, replaced, task.batch, routers]
    if records.once("task", lambda: what) != what:
        raise ParameterError(
            "out: expected a folder of the same model, texts and settings, got another comparison's; use a new one"
        )


def _roster(task: Task, rope: Rope | None, records: Records, out: Path, progress: Callable[[str], None]) -> Roster:
    prompts: list[Prompt] = []
    for number, (_, tokens) in enumerate(task.sequences[: task.training]):
        n = len(tokens)
        some = (
            torch.randperm(n - n // 8, generator=torch.Generator().manual_seed(number), dtype=torch.int64, device="cpu")[
                :TRAINING_QUERIES
            ]
            + n // 8
        )
        prompts.append(
            read_prompt(
                task.model, tokens, rope, some.sort().values, recent=task.settings.window + n - int(some.sort().values[-8:].min())
            )
        )
        progress(f"training sequence {number + 1} of {task.training} read")
    profile = None
    if "moa" in task.methods:
        cut = [list(tokens[: task.profile_tokens]) for _, tokens in task.sequences[: task.training]]
        rules = moa_profile.usable_rules(sorted({len(x) for x in cut} | {len(x) for _, x in task.sequences}))

        def measure() -> dict[str, Any]:
            found = moa_profile.profile(task.model, cut, rules, progress=progress)
            return {"losses": found.losses.tolist(), "rules": found.rules, "group": found.group}

        row = records.once("profile", measure)
        found = [(float(a), float(b)) for a, b in row["rules"]]
        longest = max(len(tokens) for _, tokens in task.sequences)
        profile = moa_profile.Profile(
            tuple(found), (longest,), torch.tensor(row["losses"], dtype=torch.float32, device="cpu"), row["group"]
        )
    depth = task.model.config.num_hidden_layers
    s = task.settings
    every = s.layers is None or (s.replaced is None and (s.decoded or task.needles))
    numbers = list(range(depth)) if every else sorted({*(s.layers or ()), *(s.replaced or ())})
    if not numbers or not 0 <= numbers[0] <= numbers[-1] < depth:
        raise ParameterError(f"layers: expected numbers in [0, {depth}), got {numbers}")
    folder = out / "indexes"
    return Roster(
        task.methods, prompts, task.settings, numbers, folder, task.own, profile, task.batch, task.routers, records.once, progress
    )


def _needles(task: Task) -> list[tuple[str, needles.Needle]]:
    found = []
    for i in range(task.needles):
        characters = len(task.filler) * 3 // 4
        found.append((f"passkey.{i}", needles.passkey(task.filler, characters, (i + 0.5) / task.needles, seed=i)))
        found.append((f"multi.{i}", needles.multi_key(task.filler, characters, 4, seed=i)))
    return found


def _looks(task: Task, rope: Rope | None, tokens: Sequence[int], roster: Roster, records: Records) -> None:
    """Where every method reads for the newest query of one late layer: tokens read, and attention, per stretch of the text."""
    s, last = task.settings, len(tokens) - 1
    share = s.shares[len(s.shares) // 2]
    methods = roster.at(share)
    late = [x for x in (s.layers or roster.numbers) if x >= report.late_layers(task.model.config.num_hidden_layers).start]
    number = late[len(late) // 2] if late else (s.layers or roster.numbers)[-1]
    if all(f"looks/{number}/{m.name}/{share}" in records.rows for m in methods):
        return
    recent = max(m.observed for m in methods) + 1
    prompt = read_prompt(task.model, tokens, rope, torch.tensor([last], dtype=torch.int64, device="cpu"), recent=recent)
    at = next(i for i, layer in enumerate(prompt.layers) if layer.number == number)
    bins = torch.arange(len(tokens), dtype=torch.int64, device="cpu") * LOOK_BINS // len(tokens)
    exact = exact_attention(
        prompt.keys[at], prompt.values[at], prompt.queries[at].flatten(0, 1), prompt.positions, s.sinks, s.window
    )
    mass = torch.zeros(LOOK_BINS, dtype=torch.float64, device="cpu").index_add(0, bins, exact.probabilities[:, :, 0].mean((0, 1)))
    for method in methods:
        state = method.start(prompt.layers[at], len(tokens))
        state.append(prompt.keys[at], prompt.values[at])
        prompt.show(state, at, last - method.observed, last)
        chosen = state.attend(prompt.queries[at][:, :, 0]).chosen
        if chosen is not None:
            read = (chosen.any(1) if chosen.ndim == 3 else chosen).double().mean(0)
            part = torch.zeros(LOOK_BINS, dtype=torch.float64, device="cpu").index_add(0, bins, read) / torch.bincount(
                bins, minlength=LOOK_BINS
            )
            row = {"read": [round(x, 4) for x in part.tolist()], "mass": mass.tolist(), "tokens": len(tokens)}
            records.once(f"looks/{number}/{method.name}/{share}", lambda row=row: row)  # type: ignore[misc]


def _facts(task: Task) -> list[str]:
    s, lengths = task.settings, sorted({len(tokens) for _, tokens in task.sequences})
    measured = len(task.sequences) - task.training
    return [
        f"sequences of {lengths[-1]} tokens: {measured} measured, {task.training} for calibration",
        f"every method reads {s.sinks} first and {s.window} newest tokens; a budget is a share of those between, in bytes",
        f"queries: every {s.step}th of the last {s.span} tokens; decoded with these layers replaced: {s.decoded} tokens",
        f"weights that sequences share are charged to each of {task.batch} that are decoded at once",
        f"bytes as if K and V were 16-bit; times are of this reference implementation on {torch.get_num_threads()} threads",
    ]


class _Clock:
    """Lines of progress with the time that is left, if every step takes what the steps so far took."""

    def __init__(self, task: Task, roster: Roster, say: Callable[[str], None]) -> None:
        s, sequences = task.settings, len(task.sequences) - task.training
        layers = len(s.layers) if s.layers is not None else task.model.config.num_hidden_layers
        decodes = len(s.decode_shares or s.shares) * len(roster.names) if s.decoded else 0
        self.total = sequences * (1 + layers + decodes) + 2 * task.needles
        self.done, self.began, self.say = 0, time.monotonic(), say

    def step(self, line: str) -> None:
        self.done = min(self.total, self.done + 1)
        left = (time.monotonic() - self.began) / self.done * (self.total - self.done)
        self.say(f"{line}  [{self.done}/{self.total}, about {left / 60:.1f} min left]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder of transformers, or GGUF file")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="files, folders or data sets on disk")
    parser.add_argument("--routers", type=Path, help="folder that saap train wrote (default: trained here)")
    parser.add_argument("--methods", default=DEFAULT_METHODS, help="names separated by commas (default: all)")
    parser.add_argument("--budgets", default="0.02,0.05,0.1", help="shares of the KV bytes (default %(default)s)")
    parser.add_argument("--layers", help="layers to compare in, as 3,8,14; the others stay dense (default: all)")
    parser.add_argument("--decoded", type=int, default=64, help="tokens decoded with these layers replaced (default %(default)s)")
    parser.add_argument("--needles", type=int, default=0, help="needles of each of two kinds (default %(default)s)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a sequence (default %(default)s)")
    parser.add_argument("--training", type=int, default=4, help="sequences to calibrate on (default %(default)s)")
    parser.add_argument("--sequences", type=int, default=4, help="sequences measured (default %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=BATCH, help="sequences that share the reading of weights (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("compare_results"), help="folder (default %(default)s)")


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit status."""
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    try:
        layers = None if options.layers is None else numbers("layers", options.layers, int)
        shares = numbers("budgets", options.budgets, float)
        check_shares("budgets", shares)
        check_names("methods", names(options.methods), KINDS)
        routers = None if options.routers is None else load_routers(options.routers)
        settings = Settings(shares, layers, decoded=options.decoded, replaced=layers)
        settings = replace(
            settings, span=min(settings.span, options.length // 4), window=min(settings.window, options.length // 8)
        )
        loaded = models.load_model(options.model, dtype="float32")
        models.check_positions("length", loaded.model.config, options.length)
        given = list(read_texts(options.text))
        encode = partial(models.encode, loaded.tokenizer)
        flags = "--training, --sequences or --length"
        sequences = take(given, encode, options.training + options.sequences, options.length, flags)
        task = Task(
            loaded.model, loaded.tokenizer, loaded.name, sequences, options.training, names(options.methods), settings,
            options.needles, filler_of(given, options.length), batch=options.batch,
            routers=routers,
        )  # fmt: skip
        compare(task, options.out, say)
    except (SaapError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print((options.out / "table.txt").read_text())
    print(f"wrote records.json, table.txt and report.html to {options.out}")
    return 0


def filler_of(documents: Sequence[tuple[str, str]], length: int) -> str:
    """Text to hide needles in, that fits into so many tokens: three characters each are a low estimate."""
    return "\n".join(text for _, text in documents)[: length * 3]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m saap_index.lab.compare", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
