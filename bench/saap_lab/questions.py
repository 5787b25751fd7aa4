"""RULER's samples as questions in a model's tokens."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from saap_index.errors import ParameterError
from saap_index.hf import models

from . import ruler
from .needles import Question


def ruler_questions(
    tokenizer: Any, text: str, lengths: Sequence[int], kinds: Sequence[str], samples: int, seed: int, chat: bool,
    dense_question: bool,
) -> dict[str, Question]:
    """RULER's samples by ``<kind>.<length>.<number>``, in tokens; a prompt begins as the tokenizer has prompts begin."""
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ParameterError("chat-template: expected a tokenizer that has one, got none")
    encode, filler, questions = partial(models.encode, tokenizer), ruler.Filler(text), {}
    begin = [] if chat else _beginning(tokenizer)
    around = len(encode("".join(_in_chat(tokenizer, "", "?")))) if chat else len(begin)
    for length, kind, number in itertools.product(lengths, kinds, range(samples)):
        own = zlib.crc32(f"{seed}/{kind}/{length}/{number}".encode())
        sample = ruler.sample(kind, own, length - around, filler, encode)
        document, question = sample.document, sample.question
        if chat:
            document, question = _in_chat(tokenizer, document, question.strip())
        parts = [*begin, *encode(document)], list(encode(question + sample.begin))
        if dense_question:
            parts = [*parts[0], *parts[1][:-1]], parts[1][-1:]
        room = ruler.KINDS[kind].answer_tokens
        questions[f"{kind}.{length}.{number}"] = Question(*parts, sample.answers, length, room)
    return questions


def _beginning(tokenizer: Any) -> list[int]:
    """The token that a tokenizer puts before a text, if it does."""
    first = getattr(tokenizer, "bos_token_id", None)
    return [] if first is None or list(tokenizer("a")["input_ids"])[:1] != [first] else [first]


def _in_chat(tokenizer: Any, document: str, question: str) -> tuple[str, str]:
    """What a user says in the model's template, cut before the question; the answer is to follow."""
    said = [{"role": "user", "content": document + question}]
    text: str = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    at = text.rindex(question)
    return text[:at], text[at:]
