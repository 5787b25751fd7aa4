"""Text of many kinds that lies on most machines with Python: what the demo's routers are trained on (``make routers``).

A router learns where attention goes on the text it is trained on, and loses on text of another kind; so the kinds are many and
each is short. The standard library, the packages beside it and made-up records are everywhere; manual pages, documentation,
licenses, headers and translations are used where a system has them. Perl, Vim, proverbs, scripture and lists of questions are
left out: text of these kinds tests what a router does on something else.

Like texts.py this knows nothing of models. The same machine gives the same documents in the same order.
"""

from __future__ import annotations

import gettext
import gzip
import importlib.metadata
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

from . import made, texts

KIND_CHARS = 200_000
"""At most this much of each kind."""

DOCUMENT_CHARS = 12_000
"""Shorter than for the standard library alone: more documents, more subjects."""

_MIN_CHARS = 1_500
_SHARE = Path("/usr/share")
_LEFT_OUT = re.compile(r"perl|vim|fortune|bible|kjv|faq|(^|/)pod|saap", re.IGNORECASE)
_MAX_FILES = 400  # of a kind that are looked at: there can be ten thousands
_MAX_BYTES = 1 << 20
_MACROS_WITH_TEXT = frozenset("SH SS Sh Ss B I BR IR BI RB RI IB IP Nm Nd Ar Fl It".split())


def varied_texts() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of training documents; the kind precedes the first colon of the name."""
    kinds_used = {"topics", "prose", "source"}
    for name, text in texts.training_texts():
        kind = name.partition(":")[0]
        if kind in kinds_used:
            yield name, text
    kinds: dict[str, Callable[[], Iterable[tuple[str, str]]]] = {
        "package": _packages, "readme": _readmes, "record": made.records, "talk": made.talks, "manual": _manuals,
        "document": _documents, "license": _licenses, "header": _headers, "message": _messages,
    }
    seen: set[str] = set()
    for kind, documents in kinds.items():
        left = KIND_CHARS
        for name, text in documents():
            text = texts.without_repeats(text, seen)[:DOCUMENT_CHARS]
            if len(text) < _MIN_CHARS:
                continue
            yield f"{kind}:{name}", text
            left -= len(text)
            if left <= 0:
                break


def _packages() -> Iterator[tuple[str, str]]:
    """Docstrings of installed packages: mathematics, plotting, networks, whatever is there."""
    root = Path(sysconfig.get_path("purelib"))
    for path in _some(root, (".py",)):
        yield str(path.relative_to(root)), "\n\n".join(texts.docstrings(_read(path)))


def _readmes() -> Iterator[tuple[str, str]]:
    """What installed packages say of themselves."""
    descriptions = {}
    for distribution in importlib.metadata.distributions():
        descriptions[str(distribution.metadata["Name"])] = str(distribution.metadata.json.get("description", ""))
    for name in texts.shuffled(name for name in descriptions if not _LEFT_OUT.search(name)):
        yield name, descriptions[name]


def _manuals() -> Iterator[tuple[str, str]]:
    root = _SHARE / "man"
    for path in _some(root, (".gz",), folders=[f"man{section}" for section in (1, 2, 5, 7, 8)]):
        yield path.name.removesuffix(".gz"), _without_roff(_read(path))


def _documents() -> Iterator[tuple[str, str]]:
    for path in _some(_SHARE / "doc", (".txt", ".txt.gz", ".md", ".rst", ".html", "README", "README.gz", "NEWS.gz")):
        text = _read(path)
        yield str(path.relative_to(_SHARE / "doc")), _without_tags(text) if path.suffix == ".html" else text


def _licenses() -> Iterator[tuple[str, str]]:
    for path in _some(_SHARE / "common-licenses", ("",)):
        yield path.name, _read(path)


def _headers() -> Iterator[tuple[str, str]]:
    for root in (Path(sysconfig.get_path("purelib")), Path("/usr/include")):
        for path in islice(_some(root, (".h", ".hpp", ".js", ".css", ".json")), _MAX_FILES // 4):
            yield path.name, _read(path)


def _messages() -> Iterator[tuple[str, str]]:
    """Translated messages of programs, in all languages."""
    for path in _some(_SHARE / "locale", (".mo",)):
        try:
            with path.open("rb") as file:
                catalog = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        except (OSError, ValueError, UnicodeDecodeError):
            continue
        pairs = [f"{key}\n{value}\n" for key, value in catalog.items() if key and isinstance(key, str)]
        yield str(path.relative_to(_SHARE / "locale")), "\n".join(pairs)


def _some(root: Path, endings: tuple[str, ...], folders: Iterable[str] = ("",)) -> Iterator[Path]:
    """Files below a folder, in a fixed order without regard to the alphabet."""
    paths = {}
    for folder in folders:
        for path in (root / folder).rglob("*") if (root / folder).is_dir() else ():
            name = str(path.relative_to(root))
            if name.endswith(endings) and not _LEFT_OUT.search(name) and path.is_file() and path.stat().st_size < _MAX_BYTES:
                paths[name] = path
    # One of each group, then a second of each: no program with hundreds of pages or files crowds out the others.
    group: Counter[str] = Counter()
    rank = {}
    for name in texts.shuffled(paths):
        first = re.split(r"[/_.-]", name if len(tuple(folders)) == 1 else name.partition("/")[2], maxsplit=1)[0]
        rank[name] = group[first]
        group[first] += 1
    for name in sorted(rank, key=rank.__getitem__)[:_MAX_FILES]:
        yield paths[name]


def _read(path: Path) -> str:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError):
        return ""
    return raw.decode("utf-8", errors="replace")


def _without_roff(text: str) -> str:
    """The words of a manual page: macros that carry text keep it, escapes become the character they stand for."""
    lines = []
    for line in text.splitlines():
        if line.startswith(('.\\"', "'\\\"")):
            continue
        if line.startswith((".", "'")):
            macro, _, rest = line[1:].partition(" ")
            if macro in ("SH", "SS", "Sh", "Ss", "TP", "PP", "P", "sp", "Pp", "IP"):
                lines.append("")
            if macro not in _MACROS_WITH_TEXT:
                continue
            line = rest.replace('"', "")
        line = re.sub(r"\\f(\[\w*\]|\(..|.)|\\[&/,|^]|\\s[-+]?\d", "", line)
        line = re.sub(r"\\\((em|en|mi)", "-", line)
        line = re.sub(r"\\\(..|\\\[[^]]*\]", " ", line).replace("\\-", "-").replace("\\e", "\\")
        lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


class _Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in ("script", "style")
        if tag in ("p", "br", "li", "tr", "div", "h1", "h2", "h3", "pre"):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if self._hidden <= 0:
            self.parts.append(data)


def _without_tags(text: str) -> str:
    words = _Words()
    words.feed(text)
    return re.sub(r"\n\s*\n\s*\n+", "\n\n", "".join(words.parts))
