"""Long real text that lies on every machine with Python: the standard library and the language reference of ``pydoc``.

Three kinds of text, each document named ``kind:source``: ``topics`` (the language reference), ``prose`` (the docstrings of a
module) and ``source`` (a module's code). Training and unseen texts come from other topics and other top-level modules, and no
paragraph of prose occurs twice, so a router trained on the first has read nothing of the second.

This module knows nothing of models: a tokenizer is a callable from text to token numbers.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from saap_index.pipeline.texts import pack, pack_sequences

__all__ = [
    "docstrings", "pack", "pack_sequences", "shuffled", "texts_from_files", "training_texts", "unseen_texts", "without_repeats",
]

DOCUMENT_CHARS = 40_000
"""At most this much of one document of the standard library is used, so that no single module fills the data."""

TRAINING_CHARS = {"topics": 400_000, "prose": 480_000, "source": 560_000}
UNSEEN_CHARS = {"topics": 160_000, "prose": 260_000, "source": 320_000}

_MIN_CHARS = 1_500
_MIN_PARAGRAPH_CHARS = 40

_UNSEEN_TOPICS = frozenset(
    "bitwise bltin-file-objects comparisons debugger dict else exprlists formatstrings for import integers lists naming "
    "numeric-types raise shifting string-methods subscriptions try typesmapping typesseq typesseq-mutable while yield".split()
)
_UNSEEN_MODULES = frozenset(
    "_compat_pickle calendar colorsys configparser csv difflib email fractions getopt graphlib heapq http imaplib ipaddress "
    "json logging mailbox mimetypes pickle pickletools plistlib poplib sched shelve smtplib sqlite3 statistics tarfile textwrap "
    "tomllib turtle uuid xml zoneinfo".split()
)
# Not installed everywhere, not prose or code that someone wrote (tables, generated parsers), or text used above already.
_EXCLUDED_MODULES = frozenset(
    "__phello__ dist-packages distutils encodings ensurepip idlelib lib-dynload lib2to3 pydoc_data site-packages sitecustomize "
    "this tkinter turtledemo usercustomize".split()
)


def training_texts() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the training documents; the same documents in the same order on every call.

    Returns
    -------
    iterator of (str, str)
        Enough for 24 sequences of 8192 tokens of a vocabulary of 49152.
    """
    yield from _training()[0]


def unseen_texts() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of documents from other topics and modules than those of :func:`training_texts`.

    Returns
    -------
    iterator of (str, str)
        Enough for 12 sequences of 8192 tokens of a vocabulary of 49152.
    """
    # Topics contain one another, so a paragraph may occur in both halves: the training texts keep it.
    yield from _documents(unseen=True, chars=UNSEEN_CHARS, seen=set(_training()[1]))


def texts_from_files(paths: Iterable[str | Path]) -> Iterator[tuple[str, str]]:
    """Yield ("file:<name>", text) of text files in UTF-8; bytes that are not UTF-8 are replaced."""
    for path in map(Path, paths):
        yield f"file:{path.name}", path.read_text(encoding="utf-8", errors="replace")


@cache
def _training() -> tuple[tuple[tuple[str, str], ...], frozenset[str]]:
    """The training documents and the paragraphs of prose in them."""
    seen: set[str] = set()
    documents = tuple(_documents(unseen=False, chars=TRAINING_CHARS, seen=seen))
    return documents, frozenset(seen)


def _documents(unseen: bool, chars: dict[str, int], seen: set[str]) -> Iterator[tuple[str, str]]:
    """The documents of one half; `seen` holds the paragraphs of prose given out so far and is added to."""
    kinds = {"topics": _topics(unseen), "prose": _prose(unseen), "source": _source(unseen)}
    for kind, documents in kinds.items():
        left = chars[kind]
        for name, text in documents:
            if kind != "source":
                text = without_repeats(text, seen)
            text = text[:DOCUMENT_CHARS]
            if len(text) < _MIN_CHARS:
                continue
            yield f"{kind}:{name}", text
            left -= len(text)
            if left <= 0:
                break


def _topics(unseen: bool) -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in shuffled(topics):
        if (name in _UNSEEN_TOPICS) == unseen:
            yield name, topics[name]


def _prose(unseen: bool) -> Iterator[tuple[str, str]]:
    for name, path in _modules(unseen):
        yield name, "\n\n".join(docstrings(_read(path)))


def _source(unseen: bool) -> Iterator[tuple[str, str]]:
    # The other end of the order: a module whose docstrings are used is rarely used as source as well.
    for name, path in reversed(_modules(unseen)):
        yield name, _read(path)


def _modules(unseen: bool) -> list[tuple[str, Path]]:
    """Dotted name and file of the modules of one half, in a fixed order without regard to the alphabet."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if _is_used(parts) and (parts[0] in _UNSEEN_MODULES) == unseen:
            paths[".".join(parts)] = path
    return [(name, paths[name]) for name in shuffled(paths)]


def _is_used(parts: tuple[str, ...]) -> bool:
    top = parts[0]
    is_generated = top.startswith(("config-", "_sysconfigdata"))
    return top not in _EXCLUDED_MODULES and not is_generated and "test" not in parts and "tests" not in parts


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def docstrings(code: str) -> Iterator[str]:
    """The docstrings of a module, its classes and its functions, in the order of the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        text = ast.get_docstring(node)
        if text:
            yield text


def without_repeats(text: str, seen: set[str]) -> str:
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        if len(words) >= _MIN_PARAGRAPH_CHARS:
            if words in seen:
                continue
            seen.add(words)
        kept.append(paragraph)
    return "\n\n".join(kept)


def shuffled(names: Iterable[str]) -> list[str]:
    ordered = sorted(names)
    random.Random(0).shuffle(ordered)
    return ordered
