"""Texts as token sequences: files, folders and data sets on disk in, sequences of one length out. Knows no models.

A document is a name, ``kind:source``, and a text; sequences are of one kind, and the kinds take turns, so that the first few
sequences are already a sample of everything.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import LengthError, MissingDependencyError, ParameterError

Document = tuple[str, str]
TokenSequence = tuple[str, list[int]]

_COLUMNS = ("text", "content", "document")
_DATASET = ("dataset_info.json", "dataset_dict.json", "state.json")
_MAX_FILE_BYTES = 1 << 26


def read_texts(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Document]:
    """Documents of text files, of all files below folders, and of data sets that Hugging Face `datasets` saved to disk.

    Each path is a kind of its own. Files that hold zero bytes are not text and are left out, as are names with a leading dot.

    Raises ParameterError for a path that is not there or holds no text, MissingDependencyError for a data set without `datasets`.
    """
    for number, name in enumerate(paths):
        path, count = Path(name), 0
        if path.is_dir() and any((path / name).is_file() for name in _DATASET):
            documents: Iterable[Document] = _dataset(path)
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file, path))
            documents = ((str(file.relative_to(path)), _read(file)) for file in files)
        elif path.is_file():
            documents = [(path.name, _read(path))]
        else:
            raise ParameterError(f"text: expected a file, a folder or a data set on disk, got {path}")
        for source, text in documents:
            if text.strip():
                count += 1
                yield f"{number}.{path.stem}:{source}", text
        if not count:
            raise ParameterError(f"text: expected text in {path}, got none")


def pack(documents: Iterable[Document], encode: Callable[[str], list[int]], length: int = 8192) -> Iterator[TokenSequence]:
    """Cut documents into token sequences of one length, each from one kind of text, the kinds taking turns.

    Documents of a kind follow one another; what is left of the last one when no full sequence remains is dropped.

    documents : iterable of (name, text), the kind is what precedes the first colon of the name. encode : token numbers of a text,
    without tokens that mark a beginning or an end. length : tokens per sequence. Yields (kind:sources, tokens).
    """
    if length < 1:
        raise LengthError(f"length: expected at least 1 token, got {length}")
    queues: dict[str, deque[tuple[str, str]]] = {}
    for name, text in documents:
        kind, _, source = name.partition(":")
        queues.setdefault(kind, deque()).append((source, text))
    rest: dict[str, list[int]] = {kind: [] for kind in queues}
    last: dict[str, str] = dict.fromkeys(queues, "")
    while queues:
        for kind in list(queues):
            tokens, names = rest[kind], [last[kind]] if rest[kind] else []
            while len(tokens) < length and queues[kind]:
                last[kind], text = queues[kind].popleft()
                names.append(last[kind])
                tokens = tokens + encode(text.rstrip() + "\n\n\n")
            if len(tokens) < length:
                del queues[kind]
                continue
            rest[kind] = tokens[length:]
            yield f"{kind}:{','.join(names)}", tokens[:length]


def pack_sequences(
    documents: Iterable[Document], encode: Callable[[str], list[int]], count: int, length: int = 8192, flags: str = ""
) -> list[TokenSequence]:
    """The first ``count`` sequences of `pack`. Raises LengthError if the texts are too short for so many.

    flags : of the command line, that say how much text is asked for; named in the error.
    """
    sequences = list(islice(pack(documents, encode, length), count))
    if len(sequences) < count:
        advice = f"; give more text, or ask for less with {flags}" if flags else ""
        raise LengthError(f"texts: expected {count} sequences of {length} tokens, got enough text for {len(sequences)}{advice}")
    return sequences


def digest(sequences: Sequence[TokenSequence]) -> str:
    """A checksum of the tokens, in order."""
    value = hashlib.sha256()
    for _, tokens in sequences:
        value.update(b"|" + b",".join(str(token).encode() for token in tokens))
    return value.hexdigest()[:16]


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _read(path: Path) -> str:
    """A text in UTF-8; bytes that are not UTF-8 are replaced, a binary file is empty."""
    with path.open("rb") as file:
        raw = file.read(_MAX_FILE_BYTES)
    return "" if b"\0" in raw else raw.decode("utf-8", errors="replace")


def _dataset(path: Path) -> Iterator[Document]:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise MissingDependencyError(f"text: {path} is a data set, reading it needs: pip install datasets") from error
    loaded: Any = load_from_disk(str(path))
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"": loaded}
    for split, rows in splits.items():
        column = next((name for name in _COLUMNS if name in rows.column_names), None)
        if column is None:
            raise ParameterError(f"text: expected a column named {' or '.join(_COLUMNS)} in {path}, got {rows.column_names}")
        for number, row in enumerate(rows):
            yield f"{split}{number}", str(row[column])
