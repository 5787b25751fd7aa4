"""Every method on the user's own model at equal bytes: ``saap compare --model PATH --text FILES``.

Calibrates on the first sequences of the text, measures on the following ones, and writes records.json (a run that was stopped
goes on from there), table.txt and report.html into one folder. Knows no model and no text of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from saap_index import files
from saap_index.errors import LengthError, MissingDependencyError, ParameterError
from saap_index.hf import models
from saap_index.pipeline.command import say
from saap_index.pipeline.texts import TokenSequence, digest, pack_sequences, read_texts
from saap_index.routers import Routers, load_routers
from saap_index.routing.rope import Rope

from . import evaluate, flags, linear, moa_profile, page, plots, report, tables
from .evaluate import Records, Settings
from .flags import check_count, check_names, check_shares, names, numbers
from .measures import exact_attention
from .method import Method
from .needles import Haystack, Question, haystacks
from .own import builder, check_method, load_methods
from .replace import Prompt, read_prompt
from .roster import BATCH, KINDS, Build, Roster
from .trained import TrainedMethods

DEFAULT_METHODS = ",".join(name for name in KINDS if name != "scfa-drop")
"""All but QK-drop, which needs a model trained with it and is no better than chance without."""

TRAINING_QUERIES = 256
LOOK_BINS = 128
PROFILE_TOKENS = 2048
"""Of a training sequence that MoA's profile looks at: it takes every entry of every head's attention, forward and back."""

PAGE, ROUTERS = ("table", "page"), ("table", "layers", "summary", "plots")
"""Reports of `saap compare` and of `saap eval`: table.txt, in it a table of each layer, summary.json, pictures, report.html."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """What is measured on which texts."""

    model: Any
    tokenizer: Any
    title: str
    """Names the model; records of another title are not mixed with these."""
    sequences: Sequence[TokenSequence]
    """(name, token numbers)."""
    training: int
    """The first so many sequences calibrate, the others are measured."""
    methods: Sequence[str] | TrainedMethods
    """Names of `KINDS` or ``own``, calibrated here and set to equal bytes; or those of trained routers, taken as they are."""
    settings: Settings
    needles: Sequence[Haystack] = ()
    own: dict[str, Build] | None = None
    """A user's methods by name."""
    batch: int = BATCH
    """Sequences that share the reading of weights."""
    routers: Routers | None = None
    """Stand for methods that would be trained here, see `Indexes`."""
    profile_tokens: int = PROFILE_TOKENS
    """Of a training sequence that MoA's profile looks at."""
    reports: Sequence[str] = PAGE
    questions: Mapping[str, Question] = field(default_factory=dict)
    """Of RULER's kinds, by name."""
    endings: Sequence[str] = ("png",)
    """Of the plots."""

    @property
    def measured(self) -> Sequence[TokenSequence]:
        return self.sequences[self.training :]

    @property
    def trained(self) -> TrainedMethods | None:
        return self.methods if isinstance(self.methods, TrainedMethods) else None


class Methods(Protocol):
    """Methods by share: a `Roster` or `TrainedMethods`."""

    missing: dict[tuple[str, float], str]
    """(name, share) -> why a method cannot be had."""

    def at(self, share: float, length: int) -> Sequence[Method]:
        """Those measured at a share, on texts of so many tokens."""


def compare(task: Task, out: Path, progress: Progress = lambda line: None) -> Records:
    """Measure what the records in ``out`` lack, and write the reports.

    Raises ParameterError and LengthError for what cannot be measured, or a folder with records of another task;
    CompatibilityError for routers of another model.
    """
    check(task)
    rope = Rope.from_config(task.model.config, layer=min(task.trained.routers.layers) if task.trained else None)
    _try_own(task, rope)
    files.make_folder(out)
    records = Records(out / "records.json")
    _check_same(task, records)
    methods: Methods = task.trained or _roster(task, rope, records, out, progress)
    if task.trained and task.training:
        task.trained.prompts = _training_prompts(task, rope, progress)
    try:
        _measure(task, rope, methods, records, progress)
        if "page" in task.reports:
            _looks(task, rope, methods, records)
            for (method, share), reason in methods.missing.items():
                records.once(f"missing/{method}/{share}", partial(dict, reason=reason))
            if isinstance(methods, Roster):
                layer, length = methods.prompts[0].layers[0], len(task.sequences[0][1])
                records.once("cost", lambda: [vars(line) for line in linear.cost_lines(layer, length)])
    finally:
        records.flush()
    _write(task, methods, records, out, progress)
    return records


def check(task: Task) -> None:
    """Raise for a task that cannot be measured, before anything is written."""
    if isinstance(task.methods, TrainedMethods):
        task.methods.routers.check(task.model.config)
    else:
        if not 0 < task.training < len(task.sequences):
            raise ParameterError(f"training: expected 1 to {len(task.sequences) - 1} of the sequences, got {task.training}")
        check_names("methods", task.methods, (*KINDS, *(task.own or {})))
    check_shares("budgets", task.settings.shares)
    for _, tokens in task.sequences:
        models.check_positions("length", task.model.config, len(tokens))
        _check_decoded(task.settings.decoded, len(tokens))
    if task.batch < 1:
        raise ParameterError(f"batch: expected at least 1, got {task.batch}")
    if task.routers is not None:
        task.routers.check(task.model.config)


def _check_decoded(decoded: int, length: int) -> None:
    if decoded != 0 and not 2 <= decoded < length:  # what the last one predicts is not known
        raise LengthError(f"decoded: expected 0, or 2 to {length - 1} of the {length} tokens of a sequence, got {decoded}")


def _check_same(task: Task, records: Records) -> None:
    """Records of another model, text or setting are not mixed with these."""
    s = task.settings
    identity: Any = {"identity": task.title, "continuation": s.span, "step": s.step}
    if not task.trained:
        lengths = [len(tokens) for _, tokens in task.sequences]
        sums = [sum((i + 1) * t for i, t in enumerate(tokens)) % 1_000_003 for _, tokens in task.sequences]
        replaced = None if s.replaced is None else list(s.replaced)
        data = None if task.routers is None else task.routers.config.get("data")
        places = s.span, s.step, s.sinks, s.window, s.decoded
        identity = [task.title, task.training, lengths, sums, *places, replaced, task.batch, data]
    expected = {"task": identity}
    expected |= {f"digest/{i}": digest([("", list(tokens))]) for i, (_, tokens) in enumerate(task.measured)}
    for haystack in task.needles:
        for name, needle in haystack.needles.items():
            expected[f"asked/{name}"] = hashlib.sha256(needle.prompt.encode()).hexdigest()[:16]
    expected |= {f"asked/{name}": question.digest() for name, question in task.questions.items()}
    for key, value in expected.items():
        if records.rows.get(key, value) != value:
            raise ParameterError(
                "out: expected a folder of the same model, routers, texts and settings, got another's; use a new one"
            )
    records.rows |= expected


def _measure(task: Task, rope: Rope | None, methods: Methods, records: Records, progress: Progress) -> None:
    clock, settings = _Clock(task, methods, progress), task.settings
    for number, (_, tokens) in enumerate(task.measured):
        methods_at = partial(methods.at, length=len(tokens))
        evaluate.evaluate_text(task.model, rope, f"{number}", tokens, methods_at, settings, records, clock.step)
        if settings.drift:
            evaluate.evaluate_drift(task.model, rope, f"{number}", tokens, methods_at, settings, records, clock.step)
        clock.sequence_done(number + 1)
    shares = settings.decode_shares or settings.shares
    for haystack in task.needles:
        methods_at = partial(methods.at, length=haystack.length)
        evaluate.evaluate_needles(
            task.model, task.tokenizer, rope, haystack.needles, methods_at, shares, records, clock.step, settings.replaced
        )
    for name, question in task.questions.items():
        methods_at = partial(methods.at, length=question.length)
        evaluate.evaluate_question(
            task.model, task.tokenizer, rope, name, question, methods_at, shares, records, clock.step, settings.replaced
        )


class _Clock:
    """Lines of progress with the time that is left, if every step takes what the steps of this run took."""

    def __init__(self, task: Task, methods: Methods, progress: Progress) -> None:
        lengths = [len(tokens) for _, tokens in task.sequences] + [q.length for q in task.questions.values()]
        s, length = task.settings, max(lengths, default=0)
        decodes = sum(len(methods.at(share, length)) for share in s.decode_shares or s.shares)
        layers = task.model.config.num_hidden_layers if s.layers is None else len(s.layers)
        self.per_sequence = (1 + layers + (decodes if s.decoded else 0)) if layers or s.decoded else 0
        self.per_sequence += 1 + decodes if s.drift else 0
        asked = sum(len(x.needles) for x in task.needles) + len(task.questions)
        self.total = len(task.measured) * self.per_sequence + decodes * asked
        self.place, self.steps, self.began, self.progress = 0, 0, time.monotonic(), progress

    def step(self, line: str) -> None:
        self.place, self.steps = min(self.total, self.place + 1), self.steps + 1
        left = (time.monotonic() - self.began) / self.steps * (self.total - self.place)
        self.progress(f"{line}  [{self.place}/{self.total}, about {left / 60:.1f} min left]")

    def sequence_done(self, count: int) -> None:
        """What an earlier run measured is no step of this one."""
        self.place = count * self.per_sequence


def _write(task: Task, methods: Methods, records: Records, out: Path, progress: Progress) -> None:
    depth, reports = task.model.config.num_hidden_layers, task.reports
    files.write_text(out / "table.txt", report.as_text(records.rows, depth, "layers" in reports))
    if "summary" in reports:
        files.write_json(out / "summary.json", report.summary(records.rows, depth))
    if "page" in reports:
        length = len(task.sequences[0][1])
        kinds = KINDS | {m.name: m.kind for s in task.settings.shares for m in methods.at(s, length) if m.name not in KINDS}
        files.write_text(out / "report.html", page.html(records.rows, task.title, kinds, depth, _facts(task), task.batch))
    if "plots" in reports:
        try:
            for ending in task.endings:
                plots.write(records.rows, depth, out, ending)
        except MissingDependencyError as error:
            progress(f"no plots: {error}")


def _facts(task: Task) -> list[str]:
    s, lengths = task.settings, sorted({len(tokens) for _, tokens in task.sequences})
    return [
        f"sequences of {lengths[-1]} tokens: {len(task.measured)} measured, {task.training} for calibration",
        f"every method reads {s.sinks} first and {s.window} newest tokens; a budget is a share of those between, in bytes",
        f"queries: every {s.step}th of the last {s.span} tokens; decoded with these layers replaced: {s.decoded} tokens",
        f"weights that sequences share are charged to each of {task.batch} that are decoded at once",
        f"model in {str(task.model.dtype).removeprefix('torch.')} on {task.model.device}; bytes as if K and V were 16-bit",
        f"times are of this reference implementation on {torch.get_num_threads()} threads",
    ]


def _roster(task: Task, rope: Rope | None, records: Records, out: Path, progress: Progress) -> Roster:
    """The methods of a task by name, with what they are calibrated on."""
    assert not isinstance(task.methods, TrainedMethods)
    depth, s = task.model.config.num_hidden_layers, task.settings
    every = s.layers is None or (s.replaced is None and (s.decoded or task.needles))
    layers = list(range(depth)) if every else sorted({*(s.layers or ()), *(s.replaced or ())})
    if not layers or not 0 <= layers[0] <= layers[-1] < depth:
        raise ParameterError(f"layers: expected numbers in [0, {depth}), got {layers}")
    prompts = _training_prompts(task, rope, progress)
    profile = _profile(task, records, progress) if "moa" in task.methods else None
    return Roster(
        task.methods, prompts, s, layers, out / "indexes", task.own, profile, task.batch, task.routers, records.once, progress
    )


def _try_own(task: Task, rope: Rope | None) -> None:
    """A user's methods on a layer as the model has them, before anything long starts."""
    own = task.trained.own_builds() if task.trained else task.own
    if own:
        some = task.sequences[0][1] if task.sequences else next(iter(task.questions.values())).document
        layer = read_prompt(task.model, list(some[:4]), rope).layers[0]
        for name, build in own.items():
            check_method(name, build, layer)


def _training_prompts(task: Task, rope: Rope | None, progress: Progress) -> list[Prompt]:
    prompts: list[Prompt] = []
    for number, (_, tokens) in enumerate(task.sequences[: task.training]):
        positions = _training_positions(len(tokens), number)
        recent = task.settings.window + len(tokens) - int(positions[-8:].min())
        prompts.append(read_prompt(task.model, tokens, rope, positions, recent=recent))
        progress(f"training sequence {number + 1} of {task.training} read")
    return prompts


def _training_positions(length: int, seed: int) -> Tensor:
    """int64 (q,), ascending: of queries kept, by chance behind the first eighth of a sequence."""
    first, generator = length // 8, torch.Generator().manual_seed(seed)
    drawn = torch.randperm(length - first, generator=generator, dtype=torch.int64, device="cpu")
    return drawn[:TRAINING_QUERIES].add(first).sort().values


def _profile(task: Task, records: Records, progress: Progress) -> moa_profile.Profile:
    cut = [list(tokens[: task.profile_tokens]) for _, tokens in task.sequences[: task.training]]
    lengths = [len(tokens) for _, tokens in task.sequences]

    def measure() -> dict[str, Any]:
        rules = moa_profile.usable_rules(sorted({*lengths, *map(len, cut)}))
        profile = moa_profile.profile(task.model, cut, rules, progress=progress)
        return {"losses": profile.losses.tolist(), "rules": profile.rules, "group": profile.group}

    row = records.once("profile", measure)
    rules = tuple((float(alpha), float(beta)) for alpha, beta in row["rules"])
    losses = torch.tensor(row["losses"], dtype=torch.float32, device="cpu")
    return moa_profile.Profile(rules, (max(lengths),), losses, row["group"])


def _looks(task: Task, rope: Rope | None, source: Methods, records: Records) -> None:
    """Where every method reads for the newest query of one late layer: tokens read, and attention, per stretch of the text."""
    s, depth, tokens = task.settings, task.model.config.num_hidden_layers, task.measured[0][1]
    share, last = s.shares[len(s.shares) // 2], len(tokens) - 1
    methods, layers = source.at(share, len(tokens)), s.layers or tuple(range(depth))
    late = [layer for layer in layers if layer >= report.late_layers(depth).start]
    number = late[len(late) // 2] if late else layers[-1]
    if all(f"looks/{number}/{m.name}/{share}" in records.rows for m in methods):
        return
    recent = max(m.observed for m in methods) + 1
    prompt = read_prompt(task.model, tokens, rope, torch.tensor([last], dtype=torch.int64, device="cpu"), recent=recent)
    slot = next(i for i, layer in enumerate(prompt.layers) if layer.number == number)
    keys, values, queries = prompt.keys[slot], prompt.values[slot], prompt.queries[slot].float()
    exact = exact_attention(keys, values, queries.flatten(0, 1), prompt.positions, s.sinks, s.window)
    mass = _binned(exact.probabilities[:, :, 0].mean((0, 1)))
    sizes = _binned(torch.ones(len(tokens), dtype=torch.float64, device="cpu"))
    for method in methods:
        state = method.start(prompt.layers[slot], len(tokens))
        state.append(keys, values)
        prompt.show(state, slot, last - method.observed, last)
        chosen = state.attend(queries[:, :, 0]).chosen
        if chosen is not None:
            read = _binned((chosen.any(1) if chosen.ndim == 3 else chosen).double().mean(0)) / sizes
            row = {"read": [round(x, 4) for x in read.tolist()], "mass": mass.tolist(), "tokens": len(tokens)}
            records.once(f"looks/{number}/{method.name}/{share}", partial(dict, row))


def _binned(values: Tensor) -> Tensor:
    """float64 (`LOOK_BINS`,): sums over the stretches of a text of (n,) tokens."""
    bins = torch.arange(len(values), dtype=torch.int64, device=values.device) * LOOK_BINS // len(values)
    return torch.zeros(LOOK_BINS, dtype=torch.float64, device=values.device).index_add(0, bins, values).cpu()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder of transformers, or GGUF file")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="files, folders or data sets on disk")
    parser.add_argument("--routers", type=Path, help="folder that saap train wrote (default: trained here)")
    parser.add_argument("--methods", default=DEFAULT_METHODS, help="names separated by commas (default: all)")
    flags.add_own(parser)
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
    flags.add_tables(parser)
    flags.add_computing(parser)


def run(options: argparse.Namespace) -> int:
    """The command. Raises what `load_model`, `load_routers`, `read_texts` and `compare` raise."""
    computing = flags.computing(options)
    layers = None if options.layers is None else numbers("layers", options.layers, int)
    endings = flags.check_tables(options)
    shares, methods = numbers("budgets", options.budgets, float), names(options.methods)
    check_shares("budgets", shares)
    check_names("methods", methods, KINDS)
    own = load_methods(options.own, tuple(KINDS))
    for name, least in (("length", 1), ("training", 1), ("sequences", 1), ("needles", 0), ("batch", 1)):
        check_count(name, getattr(options, name), least)
    _check_decoded(options.decoded, options.length)
    routers = None if options.routers is None else load_routers(options.routers)
    span, window = min(Settings.span, options.length // 4), min(Settings.window, options.length // 8)
    settings = Settings(shares, layers, span, decoded=options.decoded, window=window, replaced=layers)
    loaded = models.load_model(options.model, **computing)
    models.check_positions("length", loaded.model.config, options.length)
    documents = list(read_texts(options.text))
    encode, asked = partial(models.encode, loaded.tokenizer), "--training, --sequences or --length"
    sequences = pack_sequences(documents, encode, options.training + options.sequences, options.length, asked)
    needles = haystacks(filler(documents, options.length * 3), options.needles)  # a token has three characters at least
    builds: dict[str, Build] = {name: builder(name, kind, settings.sinks, window) for name, kind in own.items()}
    task = Task(
        loaded.model, loaded.tokenizer, loaded.name + dtype_mark(loaded.model), sequences, options.training, (*methods, *own),
        settings, needles, builds, batch=options.batch, routers=routers, reports=(*PAGE, "plots") if endings else PAGE,
        endings=endings,
    )
    return finish(task, options.out, options.csv, options.latex)


def dtype_mark(model: Any) -> str:
    """What a title says of a model that does not compute in float32: its figures are others."""
    return "" if model.dtype == torch.float32 else f" {str(model.dtype).removeprefix('torch.')}"


def finish(task: Task, out: Path, csv: Path | None = None, latex: Path | None = None) -> int:
    """`compare` as a command ends: the table on the terminal, files that were asked for, and where the rest is."""
    depth = task.model.config.num_hidden_layers
    records = compare(task, out, say)
    print((out / "table.txt").read_text())
    for file, write in ((csv, tables.as_csv), (latex, tables.as_latex)):
        if file is not None:
            files.write_text(file, write(records.rows, depth))
            print(f"wrote {file}")
    extras = {"summary": "summary.json", "page": "report.html", "plots": "plots"}
    *first, last = ["records.json", "table.txt", *(name for key, name in extras.items() if key in task.reports)]
    print(f"wrote {', '.join(first)} and {last} to {out}")
    return 0


def filler(documents: Iterable[tuple[str, str]], characters: int) -> str:
    """Text to hide needles in: some of every document, as long as there are so many characters."""
    texts = [text for _, text in documents]
    each = max(1, characters // max(1, len(texts)))
    some = "\n".join(text[:each] for text in texts)
    return some if len(some) >= characters else "\n".join(texts)[:characters]
