"""Synthetic tasks after RULER (Hsieh et al., 2024, arXiv 2404.06654), made on the spot: texts, questions, answers and scores.

Eleven of its thirteen tasks, under its names and with its parameters; the two that need data sets of questions are not here. The
wording, the noise and the words are this library's own, so figures compare with one another, not with the paper's. Everything
follows from a seed. Knows no models; a tokenizer is a callable from text to token numbers.
"""

from __future__ import annotations

import itertools
import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from saap_index.errors import LengthError, ParameterError

Encode = Callable[[str], Sequence[int]]

_FIRST = (
    "able amber ancient arctic autumn azure bitter blank bold brass brave brief bright broken bronze calm careful "
    "central cheerful civil clever coastal copper cosmic crimson curious curly daring dawn deep distant double "
    "dusty eager early eastern easy elder empty even fair faithful famous fancy fast fearless fertile final flat "
    "floral fluent foggy formal fragile fresh frosty gentle giant gifted glad golden grand grassy green grey handy "
    "happy hardy heavy hidden hollow honest humble icy idle ivory jolly keen kind late lawful level light little "
    "lively lone loyal lucky lunar mellow merry mighty modest narrow neat noble northern odd"
).split()
_SECOND = (
    "acorn anchor apple arrow badge bakery balloon barrel basket beacon bench bicycle bottle bridge bucket button "
    "cabin camel candle canyon carpet castle cellar chapel cherry circus clock cloud cobbler compass corner cottage "
    "cradle curtain desert diamond dolphin drawer eagle engine falcon farmer feather fiddle flower forest fountain "
    "garden glacier guitar hammer harbour helmet hermit hill island jacket jungle kettle kitchen ladder lantern "
    "library lizard magnet market meadow mirror monkey mountain needle orchard oven paddle palace parrot pebble "
    "pencil piano pillow planet pocket puzzle rabbit ribbon river rocket saddle sailor shelter shoulder silver "
    "spider station tailor teapot temple thunder tower tunnel valley violin wagon"
).split()
_NOISE = "A lamp is lit in the hall. The street is quiet. Somebody counts the steps. A boat leaves the pier and comes back. "
_CONSONANTS, _VOWELS = "bdfghjklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Sample:
    """A model that read ``document`` and ``question`` goes on from ``begin``; its answer should name all of ``answers``."""

    document: str
    question: str
    begin: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Filler:
    """Text to hide things in, repeated if it is too short."""

    text: str

    @cached_property
    def words(self) -> list[str]:
        """With the white space behind them."""
        return re.findall(r"\S+\s*", self.text)

    @cached_property
    def vocabulary(self) -> list[str]:
        """Plain words of the text in order of the alphabet, and as many compounds behind them as anybody wants."""
        plain = sorted({word for word in re.findall(r"\b[a-z]{4,10}\b", self.text)})
        return plain + [a + b for a in _FIRST for b in _SECOND]

    def stretch(self, draw: random.Random, count: int) -> list[str]:
        """So many words, from a place by chance on."""
        if not self.words:
            raise ParameterError("filler: expected text with words, got none")
        first = draw.randrange(len(self.words))
        return [self.words[(first + i) % len(self.words)] for i in range(count)]


def score(answer: str, wanted: Sequence[str]) -> float:
    """The share of the wanted strings that occur in an answer, whatever the case: RULER's measure for these tasks."""
    return sum(each.lower() in answer.lower() for each in wanted) / len(wanted)


def _name(number: int) -> str:
    return f"{_FIRST[number % len(_FIRST)]}-{_SECOND[number // len(_FIRST) % len(_SECOND)]}"


def _names(draw: random.Random, count: int) -> list[str]:
    """Different names; beyond the pairs there are, of three parts."""
    pairs = len(_FIRST) * len(_SECOND)
    if count <= pairs:
        return [_name(number) for number in draw.sample(range(pairs), count)]
    numbers = draw.sample(range(pairs * len(_FIRST)), count)
    return [f"{_FIRST[number // pairs]}-{_name(number % pairs)}" for number in numbers]


def _number(draw: random.Random) -> str:
    return str(draw.randint(1_000_000, 9_999_999))


def _code(draw: random.Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _spread(draw: random.Random, pieces: list[str], hidden: Sequence[str], ordered: bool = False) -> str:
    """Pieces of text with each hidden line behind the end of a sentence, at places by chance."""
    ends = [i + 1 for i, piece in enumerate(pieces) if piece.rstrip().endswith((".", "!", "?", ":"))]
    ends = ends if len(ends) >= len(hidden) else list(range(len(pieces) + 1))
    places = draw.sample(ends, len(hidden)) if len(ends) >= len(hidden) else draw.choices(ends, k=len(hidden))
    behind: dict[int, list[str]] = {}
    for place, line in zip(sorted(places) if ordered else places, hidden, strict=True):
        behind.setdefault(place, []).append(line)
    parts = []
    for i in range(len(pieces) + 1):
        parts += [f"\n{line}\n" for line in behind.get(i, ())]
        parts += pieces[i : i + 1]
    return "".join(parts)


def _and(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _needles(
    seed: int, size: int, filler: Filler, haystack: str, keys: int = 1, values: int = 1, queries: int = 1, codes: bool = False,
    coded_keys: bool = False,
) -> Sample:
    """``size`` : sentences of noise, words of the text, or lines like the one that is asked for."""
    draw = random.Random(seed)
    what, value = ("code", _code) if codes else ("number", _number)
    count = size + keys if haystack == "needles" else keys
    names = [_code(draw) for _ in range(count)] if coded_keys else _names(draw, count)
    facts = [(name, value(draw)) for name in names for _ in range(values)]
    lines = [f"{name} has the access {what} {given}." for name, given in facts]
    asked = draw.sample(names, queries)
    answers = tuple(given for name in asked for other, given in facts if other == name)
    draw.shuffle(lines)
    if haystack == "needles":
        text = "\n".join(lines)
    else:
        pieces = [_NOISE] * size if haystack == "noise" else filler.stretch(draw, size)
        text = _spread(draw, pieces, lines)
    several = len(answers) > 1
    plural = "s" if several else ""
    document = f"The text below hides statements about access {what}s. Remember them, you will be asked for some.\n\n{text}\n\n"
    verb = ("have" if queries > 1 else "has") if several else "has"
    does = "do" if queries > 1 else "does"
    said = f" There are {len(answers)} of them." if several else ""
    question = f"Question: According to the text, which access {what}{plural} {does} {_and(asked)} have?{said}\n"
    begin = f"Answer: According to the text, {_and(asked)} {verb} the access {what}{plural}"
    return Sample(document, question, begin, answers)


def _variables(seed: int, size: int, filler: Filler, hops: int = 4) -> Sample:
    """A value and a chain of variables that take it from one another, in order; ``size`` : sentences of noise around them."""
    draw = random.Random(seed)
    letters = [chr(ord("A") + i) for i in range(26)]
    names: list[str] = []
    while len(names) <= hops:
        name = "".join(draw.choices(letters, k=5))
        names += [] if name in names else [name]
    value = str(draw.randint(10_000, 99_999))
    lines = [f"Let {names[0]} = {value}."] + [f"Let {b} = {a}." for a, b in itertools.pairwise(names)]
    text = _spread(draw, [_NOISE] * size, lines, ordered=True)
    document = f"The text below sets variables, some of them to the value of an earlier one. Follow them.\n\n{text}\n\n"
    question = f"Question: Which {hops + 1} variables have the value {value} in the end, directly or through others?\n"
    return Sample(document, question, f"Answer: The {hops + 1} variables with the value {value} are", tuple(names))


def _common_words(seed: int, size: int, filler: Filler, common: int = 10, times: int = 30, others_times: int = 3) -> Sample:
    """A list of words in which ten occur 30 times and ``size`` others three times."""
    draw = random.Random(seed)
    words = draw.sample(filler.vocabulary, min(len(filler.vocabulary), common + size))
    every = words[:common] * times + words[common:] * others_times
    draw.shuffle(every)
    text = " ".join(f"{i}. {word}" for i, word in enumerate(every, 1))
    document = f"Below is a numbered list of words. Some of them occur far more often than the others.\n\n{text}\n\n"
    question = f"Question: Which {common} words occur most often in the list?\n"
    return Sample(document, question, f"Answer: The {common} words that occur most often are", tuple(words[:common]))


def _frequent_words(seed: int, size: int, filler: Filler, alpha: float = 2.0, kinds: int = 2000, wanted: int = 3) -> Sample:
    """``size`` made-up words whose frequency falls with the rank to the power of alpha; the first rank are dots."""
    draw = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < kinds - 1:
        words["".join(draw.choice(x) for x in (_CONSONANTS, _VOWELS) * 3)] = None
    ranked = ["...", *words]
    whole = sum((k + 1) ** -alpha for k in range(kinds))
    every = [word for k, word in enumerate(ranked) for _ in range(round(size * (k + 1) ** -alpha / whole))]
    draw.shuffle(every)
    document = f"The text below is in coded words. Find out which are frequent; the dots do not count.\n\n{' '.join(every)}\n\n"
    question = f"Question: Which {wanted} coded words occur most often in the text?\n"
    begin = f"Answer: The {wanted} coded words that occur most often are"
    return Sample(document, question, begin, tuple(ranked[1 : wanted + 1]))


@dataclass(frozen=True)
class Kind:
    """One task. make : (seed, size, filler) -> a sample that grows with the size; answer_tokens : a model may generate."""

    make: Callable[[int, int, Filler], Sample]
    answer_tokens: int
    short: str
    """Heads a column."""


KINDS: dict[str, Kind] = {
    "niah_single_1": Kind(partial(_needles, haystack="noise"), 128, "S1"),
    "niah_single_2": Kind(partial(_needles, haystack="text"), 128, "S2"),
    "niah_single_3": Kind(partial(_needles, haystack="text", codes=True), 128, "S3"),
    "niah_multikey_1": Kind(partial(_needles, haystack="text", keys=4), 128, "MK1"),
    "niah_multikey_2": Kind(partial(_needles, haystack="needles"), 128, "MK2"),
    "niah_multikey_3": Kind(partial(_needles, haystack="needles", codes=True, coded_keys=True), 128, "MK3"),
    "niah_multivalue": Kind(partial(_needles, haystack="text", values=4), 128, "MV"),
    "niah_multiquery": Kind(partial(_needles, haystack="text", keys=4, queries=4), 128, "MQ"),
    "vt": Kind(_variables, 30, "VT"),
    "cwe": Kind(_common_words, 120, "CWE"),
    "fwe": Kind(_frequent_words, 50, "FWE"),
}
"""By RULER's names, in its order, with the numbers of tokens that it lets a model answer with."""

SHORT_TOKENS = 4096
"""In shorter prompts ``cwe`` repeats a common word ten times and the others once, or it would not fit."""


def sample(kind: str, seed: int, length: int, filler: Filler, encode: Encode) -> Sample:
    """A sample of a task whose prompt and answer have at most ``length`` tokens, and hardly fewer.

    Raises ParameterError for another name than those of `KINDS`, LengthError where not even the question fits.
    """
    if kind not in KINDS:
        raise ParameterError(f"ruler-tasks: expected some of {', '.join(KINDS)}, got {kind!r}")
    make, room = KINDS[kind].make, length - KINDS[kind].answer_tokens
    if kind == "cwe" and length < SHORT_TOKENS:
        make = partial(_common_words, times=10, others_times=1)

    def tokens(size: int) -> int:
        made = make(seed, size, filler)
        return len(encode(made.document)) + len(encode(made.question + made.begin))

    low, high = 1, 2
    if tokens(low) > room:
        raise LengthError(f"lengths: expected room for {kind}, {tokens(low) + length - room} tokens, got {length}")
    while tokens(high) <= room and high < 2 * length:  # a piece has half a token at least
        low, high = high, 2 * high
    while high - low > max(1, low // 128):
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= room else (low, middle)
    return make(seed, low, filler)
