"""A model under several methods and budgets: every figure of a sequence as one plain record, so that a run can stop and go on.

Per sequence: each layer against exact attention, the next-token distributions of the last tokens with layers replaced, and
needles with the question processed sparsely too. Records are JSON; `report` turns many of them into tables and plots.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from saap_index import files
from saap_index.errors import FormatError, ParameterError
from saap_index.routing.rope import Rope

from . import drift, quality, ruler
from .method import Method
from .needles import Needle, Question
from .replace import Prompt, decode, decode_hidden, generate, read_prompt, start, starting

ANSWER_TOKENS = 10
"""Generated for each needle's question."""

MethodsAt = Callable[[float], Sequence[Method]]
"""The methods to measure at a share of the tokens."""


@dataclass(frozen=True)
class Settings:
    """What is measured on a sequence."""

    shares: tuple[float, ...] = (0.02, 0.05, 0.1)
    """Budgets, of the tokens outside sinks and window."""
    layers: tuple[int, ...] | None = None
    """Measured one by one; None for all."""
    span: int = 512
    """Queries are taken from so many last tokens."""
    step: int = 16
    """Every so many of them."""
    decoded: int = 256
    """Last tokens that are fed one at a time with layers replaced; 0 for none."""
    decode_shares: tuple[float, ...] | None = None
    """Budgets of the decoded tokens and of needles; None for ``shares``."""
    sinks: int = 4
    """First tokens that every method reads."""
    window: int = 128
    """Newest tokens that every method reads."""
    replaced: tuple[int, ...] | None = None
    """Layers whose attention is the method's while tokens are decoded; None for all. The others stay as the model has them."""
    drift: int = 0
    """Tokens that the dense model writes at the end of a sequence, in place of the text's, see `drift`; 0 for none."""
    together: bool = False
    """Whether yardsticks answer several queries at once: faster, and no measure of their time."""


@dataclass
class Records:
    """Results by key in one JSON file; what is there already is not measured again."""

    path: Path | None = None
    """None for records that are not kept."""
    rows: dict[str, Any] = field(default_factory=dict)
    seconds: float = 2.0
    """Least time between two writes, since the whole file is written anew; `flush` writes at once."""
    written: float = -math.inf
    """When it was written last, of the monotonic clock."""

    def __post_init__(self) -> None:
        if self.path is not None and self.path.is_file():
            self.rows = files.read_json(self.path, "records of a comparison or evaluation", finite=False)
            if not isinstance(self.rows, dict):
                raise FormatError(f"{self.path}: expected records, got {type(self.rows).__name__}")

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        if key not in self.rows:
            self.rows[key] = measure()
            if time.monotonic() - self.written > self.seconds:
                self.flush()
        return self.rows[key]

    def flush(self) -> None:
        """Write what there is; the file is whole at any time."""
        if self.path is not None:
            files.write_json(self.path, self.rows)
        self.written = time.monotonic()


def evaluate_text(
    model: Any, rope: Rope | None, name: str, tokens: Sequence[int], methods_at: MethodsAt, settings: Settings, records: Records,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Measure one sequence; records are called ``layer/<name>/<layer>/<method>/<share>`` and ``text/<name>/<method>/<share>``."""
    n, last = len(tokens), settings.decoded
    shares = settings.decode_shares or settings.shares
    jobs = {(m.name, s) for s in settings.shares for m in methods_at(s)}
    wanted = settings.layers if settings.layers is not None else range(model.config.num_hidden_layers)
    keys = [f"layer/{name}/{x}/{m}/{s}" for x in wanted for m, s in jobs]
    keys += [f"text/{name}/{m.name}/{s}" for s in shares for m in methods_at(s)] if last else []
    if all(key in records.rows for key in keys):
        return
    observed = max(m.observed for s in {*settings.shares, *shares} for m in methods_at(s))
    recent = observed and observed + max(settings.span, last)
    prompt = read_prompt(
        model,
        tokens,
        rope,
        torch.arange(max(n - settings.span, 0), n, settings.step, dtype=torch.int64, device="cpu"),
        last,
        recent,
    )
    progress(f"{name}: {n} tokens read")
    for number in wanted:
        _layer(prompt, name, number, methods_at, settings, records)
        progress(f"{name}: layer {number}")
    layers = f"{len(_replaced(prompt, settings.replaced))} of {model.config.num_hidden_layers}"
    for share in shares if last else ():
        for method in methods_at(share):
            records.once(f"text/{name}/{method.name}/{share}", partial(_text, model, prompt, method, settings))
            progress(f"{name}: {method.name} at {share:.1%} in {layers} layers")
    records.flush()


def _layer(prompt: Prompt, name: str, number: int, methods_at: MethodsAt, settings: Settings, records: Records) -> None:
    exact = None
    for share in settings.shares:
        for method in methods_at(share):
            key = f"layer/{name}/{number}/{method.name}/{share}"
            if key in records.rows:
                continue
            if exact is None:
                at = next(i for i, layer in enumerate(prompt.layers) if layer.number == number)
                exact = quality.exact_layer(prompt, at, settings.sinks, settings.window)
            measured = quality.layer_quality(method, prompt, number, settings.sinks, settings.window, exact, settings.together)
            row = {**asdict(measured), "total_per_head": measured.total_per_head.tolist(), "kind": method.kind}
            records.once(key, partial(dict, row))


def _text(model: Any, prompt: Prompt, method: Method, settings: Settings) -> dict[str, Any]:
    """The last tokens, with the settings' layers replaced; what the last one predicts is not known and not counted."""
    tokens, last = prompt.tokens.tolist(), settings.decoded
    first = len(tokens) - last
    states = starting(_methods(prompt, method, settings.replaced), prompt, first, last)
    logits, traffic = decode(model, states, tokens[first:], first, settings.together, settings.sinks + settings.window)
    same = quality.agreement(prompt.logits[:-1], logits[:-1], prompt.tokens[first + 1 :])
    per_layer = {str(layer): tokens_read for layer, tokens_read in traffic.per_layer.items()}  # as JSON gives it back
    row = {**asdict(same), **asdict(traffic), "per_layer": per_layer, "kind": method.kind}
    row["seconds_per_token"] = row.pop("seconds")
    return row


def evaluate_drift(
    model: Any, rope: Rope | None, name: str, tokens: Sequence[int], methods_at: MethodsAt, settings: Settings, records: Records,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """KL by position in what the dense model writes; keys ``drift/<name>/<method>/<share>``, its tokens ``written/<name>``."""
    shares, count, first = settings.decode_shares or settings.shares, settings.drift, len(tokens) - settings.drift
    wanted = [(method, share) for share in shares for method in methods_at(share)]
    if all(f"drift/{name}/{m.name}/{share}" in records.rows for m, share in wanted):
        return
    written = records.once(f"written/{name}", lambda: drift.continuation(model, tokens[:first], count))
    whole = [*tokens[:first], *written]
    prompt = read_prompt(model, whole, rope, recent=count + max(m.observed for m, _ in wanted), hidden=count)
    assert prompt.hidden is not None
    dense = prompt.hidden
    progress(f"{name}: {count} tokens written by the dense model")
    for method, share in wanted:
        states = starting(_methods(prompt, method, settings.replaced), prompt, first, count)

        def measure(method: Method = method, states: Any = states) -> dict[str, Any]:
            always = settings.sinks + settings.window
            hidden, traffic = decode_hidden(model, states, written, first, settings.together, always)
            curve = drift.by_position(model, dense, hidden)
            return {**curve, "tokens": count, "kind": method.kind, "read": traffic.tokens}

        records.once(f"drift/{name}/{method.name}/{share}", measure)
        progress(f"{name}: drift of {method.name} at {share:.1%}")
    records.flush()


def evaluate_needles(
    model: Any, tokenizer: Any, rope: Rope | None, needles: Mapping[str, Needle], methods_at: MethodsAt, shares: Iterable[float],
    records: Records, progress: Callable[[str], None] = lambda line: None, replaced: tuple[int, ...] | None = None,
) -> None:
    """Ask for needles of one document, which is read once; keys ``needle/<name>/<method>/<share>``, the answer and whether it
    was right. needles : by name; replaced : as in `Settings`."""
    wanted = [(method, share) for share in shares for method in methods_at(share)]
    keys = {f"needle/{name}/{m.name}/{share}" for name in needles for m, share in wanted}
    if keys <= records.rows.keys():
        return
    texts = {needle.document for needle in needles.values()}
    if len(texts) != 1:
        raise ParameterError(f"needles: expected needles of one document, got {len(texts)}")
    document = _encode(tokenizer, texts.pop())
    prompt = read_prompt(model, document, rope, recent=max(m.observed for m, _ in wanted))
    for method, share in wanted:
        for name, needle in needles.items():

            def ask(method: Method = method, needle: Needle = needle) -> dict[str, Any]:
                question = _encode(tokenizer, needle.question)
                states = start(_methods(prompt, method, replaced), prompt, len(document), len(question) + ANSWER_TOKENS)
                answer = tokenizer.decode(generate(model, states, question, len(document), ANSWER_TOKENS))
                return {"answer": answer, "right": needle.answer in answer, "tokens": len(document) + len(question)}

            records.once(f"needle/{name}/{method.name}/{share}", ask)
            progress(f"needle {name}: {method.name} at {share:.1%}")
    records.flush()


def evaluate_question(
    model: Any, tokenizer: Any, rope: Rope | None, name: str, question: Question, methods_at: MethodsAt, shares: Iterable[float],
    records: Records, progress: Callable[[str], None] = lambda line: None, replaced: tuple[int, ...] | None = None,
) -> None:
    """Ask one question of RULER's kind; keys ``ruler/<name>/<method>/<share>``, the answer and its score in [0, 1]."""
    wanted = [(method, share) for share in shares for method in methods_at(share)]
    if {f"ruler/{name}/{m.name}/{share}" for m, share in wanted} <= records.rows.keys():
        return
    document, tail = list(question.document), list(question.question)
    prompt = read_prompt(model, document, rope, recent=max(m.observed for m, _ in wanted))
    ends = _ends(model)

    def done(tokens: list[int]) -> bool:
        """No later token can change the score."""
        return tokens[-1] in ends or ruler.score(tokenizer.decode(tokens), question.answers) == 1

    def ask(method: Method) -> dict[str, Any]:
        room = len(tail) + question.answer_tokens
        states = start(_methods(prompt, method, replaced), prompt, len(document), room)
        answer = tokenizer.decode(generate(model, states, tail, len(document), question.answer_tokens, done))
        return {"answer": answer, "score": ruler.score(answer, question.answers), "tokens": len(document) + len(tail)}

    for method, share in wanted:
        records.once(f"ruler/{name}/{method.name}/{share}", partial(ask, method))
        progress(f"ruler {name}: {method.name} at {share:.1%}")


def _ends(model: Any) -> set[int]:
    """Tokens that end an answer, by the model's own settings."""
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    ends = model.config.eos_token_id if ends is None else ends
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _methods(prompt: Prompt, method: Method, replaced: tuple[int, ...] | None) -> Mapping[int, Method]:
    return dict.fromkeys(_replaced(prompt, replaced), method)


def _replaced(prompt: Prompt, replaced: tuple[int, ...] | None) -> list[int]:
    return [layer.number for layer in prompt.layers if replaced is None or layer.number in replaced]


def _encode(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens
