"""Facts hidden in a long text and asked for at its end: the passkey and several keys of which one is asked for.

After the passkey test of Mohtashami and Jaggi, 2023 (arXiv 2305.16300) and the multi-key needles of RULER (arXiv 2404.06654).
Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saap_index.errors import ParameterError

_WORDS = (
    "amber birch copper delta ember falcon garnet harbor indigo jasper kettle lantern meadow nickel opal pepper quartz river "
    "saddle timber umber violet willow yonder zephyr"
).split()


@dataclass(frozen=True)
class Needle:
    """``prompt`` = ``document`` + ``question``; a model that found the fact goes on with ``answer`` (digits)."""

    document: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return self.document + self.question


@dataclass(frozen=True)
class Haystack:
    """One document and the questions about it."""

    needles: Mapping[str, Needle]
    """By name; all of one document."""
    length: int = 0
    """Tokens of the document and a question, about; 0 if nobody counted."""


@dataclass(frozen=True)
class Question:
    """A prompt in tokens, read in two parts, and the strings that its answer should name."""

    document: Sequence[int]
    """Read densely, as a prompt is."""
    question: Sequence[int]
    """Read by the method, as the answer is."""
    answers: tuple[str, ...]
    length: int
    """Tokens of prompt and answer, at most."""
    answer_tokens: int
    """Generated at most."""

    def digest(self) -> str:
        whole = f"{list(self.document)}|{list(self.question)}|{self.answers}"
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


def haystacks(filler: str, count: int) -> list[Haystack]:
    """``count`` pass keys at depths from first to last and as many keys among four, each in a document of its own."""
    characters, stacks = len(filler) * 3 // 4, []
    for i in range(count):
        stacks.append(Haystack({f"passkey.{i}": passkey(filler, characters, (i + 0.5) / count, seed=i)}))
        stacks.append(Haystack({f"multi.{i}": multi_key(filler, characters, 4, seed=i)}))
    return stacks


def passkey(filler: str, characters: int, depth: float, seed: int = 0) -> Needle:
    """One number, stated at ``depth`` (0 first, 1 last) of a text of about so many characters."""
    draw = random.Random(seed)
    key = str(draw.randint(10000, 99999))
    document = _with_facts(filler, characters, {depth: f"The pass key is {key}. Remember it."}, draw)
    return Needle(document, "\nWhat is the pass key? The pass key is", key)


def multi_key(filler: str, characters: int, keys: int, seed: int = 0, wanted: int | None = None) -> Needle:
    """Several words with a number each, spread over the text; one of them is asked for.

    wanted : which, in the order of the text, at depth (wanted + 0.5) / keys; None for one by chance. The document does not depend
    on it.
    """
    if not 1 <= keys <= len(_WORDS):
        raise ParameterError(f"keys: expected 1 to {len(_WORDS)}, got {keys}")
    draw = random.Random(seed)
    words = draw.sample(_WORDS, keys)
    numbers = [str(n) for n in draw.sample(range(10000, 100000), keys)]
    facts = {(i + 0.5) / keys: f"The magic number of {w} is {n}." for i, (w, n) in enumerate(zip(words, numbers, strict=True))}
    chance = draw.randrange(keys)
    wanted = chance if wanted is None else wanted
    if not 0 <= wanted < keys:
        raise ParameterError(f"wanted: expected 0 to {keys - 1}, got {wanted}")
    document = _with_facts(filler, characters, facts, draw)
    word = words[wanted]
    question = f"\nQuestion: what is the magic number of {word}?\nAnswer: the magic number of {word} is"
    return Needle(document, question, numbers[wanted])


def _with_facts(filler: str, characters: int, facts: dict[float, str], draw: random.Random) -> str:
    """The filler cut to ``characters`` at a random place, each fact on a line of its own after the line nearest its depth."""
    if any(not 0 <= depth <= 1 for depth in facts):
        raise ParameterError(f"depth: expected 0 to 1, got {sorted(facts)}")
    room = max(0, characters - sum(len(fact) + 2 for fact in facts.values()))
    if len(filler) < room:
        raise ParameterError(f"filler: expected at least {room} characters, got {len(filler)}")
    begin = draw.randint(0, len(filler) - room)
    text = filler[begin : begin + room]
    pieces, done = [], 0
    for depth in sorted(facts):
        at = text.find(" ", round(depth * len(text)))
        at = len(text) if at < 0 else at
        pieces += [text[done:at], f"\n{facts[depth]}\n"]
        done = at
    return "".join([*pieces, text[done:]])
