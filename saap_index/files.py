"""Everything that is written to disk appears whole or not at all. Knows paths, not what is in them.

A file or folder is first made in a draft, a hidden folder with a name of its own beside the target, synced, and then put in place
by one rename; folder entries are synced too, so that what a call wrote is there after a power failure. The writer holds a lock
on its draft for as long as it lives, also across containers on one volume: whoever writes into the same folder later takes away
drafts that nobody holds, and only those.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import math
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import FormatError, SaapError

DAMAGE = (SafetensorError, SaapError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
"""What checks, conversions and torch raise for content that is not as it was written: a reader makes FormatError of it."""

PREFIX, SUFFIX = ".saap-", ".draft"
"""Of the name of a draft."""

_LOCK, _NEW, _OLD = "lock", "new", "old"  # what a draft holds
_UNSYNCABLE = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # of folders, on some file systems


def cache_folder() -> Path:
    """Folder for what is made once on a machine: ``SAAP_CACHE``, or ``~/.cache/saap_index``."""
    named = os.environ.get("SAAP_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "saap_index"


def write_file(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file, which appears at ``path`` whole or not at all.

    ``write`` is given a path with the name of the target, in another folder. Links are followed; the mode is that of the file
    that was there before, or of any new file (0666 without the umask). Raises OSError, and what ``write`` raises.
    """
    target = _target(path)
    if target.exists() and not target.is_file():
        raise _no_file(path)
    with _draft(target) as (draft, mode):
        made = draft / _NEW / target.name
        write(made)
        _sync(made, stat.S_IMODE(target.stat().st_mode) if target.exists() else mode)
        os.replace(made, target)
        _sync_folder(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`write_file` of a text in UTF-8."""
    write_file(path, lambda made: made.write_text(text, encoding="utf-8"))


def write_json(path: str | os.PathLike[str], value: Any, **options: Any) -> None:
    """`write_text` of plain data and a line break; options : of `json.dumps`."""
    write_text(path, json.dumps(value, **{"indent": 1, **options}) + "\n")


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """`write_file` of a safetensors file. tensors : on the CPU, contiguous."""
    write_file(path, lambda made: save_tensors(made, tensors, metadata))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file as it is, for use inside `write_file` and `write_folder`; OSError for what the system refuses."""
    try:
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:  # safetensors hides what the system said
        raise OSError(f"{path.name}: expected a path that can be written, got {error}") from error


def write_files(folder: str | os.PathLike[str], writes: Mapping[str, Callable[[Path], Any]]) -> None:
    """Files of one folder, by name, that belong together: all are made and synced before the first takes its place, in order.

    A kill between two renames, a moment, leaves the newer of some beside the older of others: let a reader be able to tell.
    ``writes`` may read what earlier ones made, beside their own path. The folder is made if it is not there.
    """
    place = make_folder(folder)
    targets = {name: _target(place / name) for name in writes}
    for name, target in targets.items():
        if target.exists() and not target.is_file():
            raise _no_file(place / name)
    with contextlib.ExitStack() as stack:
        drafts = {parent: stack.enter_context(_draft(parent / "any")) for parent in {t.parent for t in targets.values()}}
        made = {}
        for name, write in writes.items():
            draft, mode = drafts[targets[name].parent]
            made[name] = draft / _NEW / targets[name].name
            write(made[name])
            _sync(made[name], stat.S_IMODE(targets[name].stat().st_mode) if targets[name].exists() else mode)
        for name, path in made.items():
            os.replace(path, targets[name])
        for parent in drafts:
            _sync_folder(parent)


def write_folder(path: str | os.PathLike[str], write: Callable[[Path], Any], replaces: Callable[[Path], bool]) -> None:
    """Let ``write`` fill a folder, which appears at ``path`` whole or not at all, in place of one that was there.

    replaces : whether a folder that is there may be replaced; FileExistsError if not, before anything is written. Links are
    followed; modes are those of any new file and folder. Folders above are made. Raises OSError, and what ``write`` raises.
    """
    target = _target(path)
    make_folder(target.parent)
    _check_replaces(target, replaces)
    with _draft(target) as (draft, mode):
        made = draft / _NEW / target.name
        made.mkdir()
        write(made)
        for root, _, names in os.walk(made, topdown=False):
            for name in names:
                _sync(Path(root, name), mode)
            _sync_folder(Path(root))
        _check_replaces(target, replaces)
        if target.exists():
            _exchange(made, target, draft / _OLD / target.name)
        else:
            os.rename(made, target)
        _sync_folder(target.parent)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, made with those above it if it is not there, and synced."""
    folder = Path(path)
    missing = [x for x in (folder, *folder.parents) if not x.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _sync_folder(made.parent)
    return folder


def write_at(path: Path, offset_bytes: int, data: bytes | memoryview) -> None:
    """Put bytes at a place of a file that is work in progress, made if it is not there; call `sync` before relying on them."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with open(descriptor, "wb") as file:
        file.seek(offset_bytes)
        file.write(data)


def sync(paths: Iterable[Path]) -> None:
    """What was written to these files, and the entries of their folders, is on the disk when this returns."""
    folders = set()
    for path in paths:
        _sync(path)
        folders.add(path.parent)
    for folder in folders:
        _sync_folder(folder)


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[bool]:
    """Make a folder and keep its lock while it lasts, unless it is held elsewhere: whether it is ours.

    A holder that was killed holds nothing. On a file system without locks a folder is everybody's.
    """
    make_folder(folder)
    lock = _lock(folder, create=True)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


def recover(path: str | os.PathLike[str]) -> None:
    """Put a folder back that a killed `write_folder` had moved aside, on a system that cannot exchange two folders at once."""
    target = _target(path)
    if not target.exists() and target.parent.is_dir():
        _sweep(target.parent)


def read_json(path: Path, what: str, finite: bool = True) -> Any:
    """Plain data of a JSON file. FormatError, saying ``what`` was expected, for anything else; OSError if it cannot be opened.

    finite : refuse NaN, infinity and numbers that are too large for a float.
    """
    raw = path.read_bytes()
    try:
        return json_of(raw.decode("utf-8"), finite)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: expected {what}, got {type(error).__name__}: {error}") from error


def read_text(path: Path, what: str) -> str:
    """A text file. FormatError, saying ``what`` was expected, for one that is not UTF-8; OSError if it cannot be opened."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: expected {what} in UTF-8, got {error}") from error


def json_of(text: str, finite: bool = True) -> Any:
    """`json.loads`; ValueError for numbers that are not finite."""

    def number(digits: str) -> float:
        value = float(digits)
        if finite and not math.isfinite(value):
            raise ValueError(f"{digits[:40]} is not a finite number")
        return value

    return json.loads(text, parse_float=number, parse_constant=number)


# -- drafts ----------------------------------------------------------------------------------------------------------------


def _target(path: str | os.PathLike[str]) -> Path:
    """Where ``path`` leads, links followed; OSError for links in a circle."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


@contextlib.contextmanager
def _draft(target: Path) -> Iterator[tuple[Path, int]]:
    """A draft beside ``target``, locked, and the mode of a new file; nothing is left of it. Old drafts there are removed."""
    folder = target.parent
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "expected a folder to write to, got none", str(folder))
    _sweep(folder)
    lock, draft = None, folder
    try:
        while lock is None:  # until a draft is ours: a sweep may come between making and locking it
            draft = folder / f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}"
            try:
                draft.mkdir()
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(target)) from error
            lock = _lock(draft, create=True)
        mode = stat.S_IMODE(os.fstat(lock).st_mode)  # of a file as this process makes them: umask, and what the folder says
        for name in (_NEW, _OLD):
            (draft / name).mkdir()
        yield draft, mode
    finally:
        if draft != folder and not any((draft / _OLD).glob("*")):
            shutil.rmtree(draft, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(draft: Path, create: bool) -> int | None:
    """The descriptor of a draft's lock, held; None if another holds it or the draft is gone.

    On a file system without locks a writer goes on, and no draft is ever taken for abandoned.
    """
    try:
        descriptor = os.open(draft / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    is_ours = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = os.path.samestat(os.fstat(descriptor), os.stat(draft / _LOCK))
    except BlockingIOError:
        pass
    except FileNotFoundError:
        pass
    except OSError:
        is_ours = create
    if not is_ours:
        os.close(descriptor)
    return descriptor if is_ours else None


def _sweep(folder: Path) -> None:
    """Take away what killed writers left in a folder; what they had moved aside goes back where nothing took its place."""
    with contextlib.suppress(OSError):
        for draft in folder.glob(f"{PREFIX}*{SUFFIX}"):
            with contextlib.suppress(OSError):
                about = draft.lstat()
                if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
                    continue  # in a folder that all may write to, somebody else's
                lock = _lock(draft, create=False)
                if lock is None:
                    continue
                try:
                    for old in (draft / _OLD).glob("*"):
                        if not (folder / old.name).exists():
                            os.rename(old, folder / old.name)
                    shutil.rmtree(draft, ignore_errors=True)
                finally:
                    os.close(lock)


def _check_replaces(target: Path, replaces: Callable[[Path], bool]) -> None:
    if target.exists() and not (target.is_dir() and replaces(target)):
        what = "expected a new name or a folder that may be replaced, got something else"
        raise FileExistsError(errno.EEXIST, what, str(target))


def _no_file(path: str | os.PathLike[str]) -> OSError:
    return OSError(errno.EISDIR, "expected the name of a file, got something else", str(path))


def _sync(path: Path, mode: int | None = None) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if mode is not None:  # safetensors lets the owner alone read
            os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in _UNSYNCABLE:
            raise


def _exchange(made: Path, target: Path, aside: Path) -> None:
    """``made`` in place of the folder ``target``: at once where the system can, else by way of ``aside``."""
    if _swap(made, target):
        return
    os.rename(target, aside)
    try:
        os.rename(made, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _swap(a: Path, b: Path) -> bool:
    """Exchange two paths in one step; False where the system or the file system has no such call."""
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(a), os.fsencode(b)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        status = library.renamex_np(*map(ctypes.c_char_p, names), ctypes.c_uint(2))  # RENAME_SWAP
    elif hasattr(library, "renameat2"):
        here = ctypes.c_int(-100)  # AT_FDCWD
        paths = map(ctypes.c_char_p, names)
        status = library.renameat2(here, next(paths), here, next(paths), ctypes.c_uint(2))  # RENAME_EXCHANGE
    else:
        return False
    if status == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(b))
