"""Files and folders appear whole or not at all, whoever is killed, whoever else is writing; and nobody else writes to disk."""

from __future__ import annotations

import ast
import json
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest

import saap_index
import saap_lab
from saap_index import FormatError, files

PACKAGE, LAB = Path(saap_index.__file__).parent, Path(saap_lab.__file__).parent
CHILD = """
import os, signal, sys
from pathlib import Path
from saap_index import files
{body}
"""


def start(body: str, *arguments: object) -> int:
    """A process of its own that runs this Python code."""
    code = compile(CHILD.format(body=body), "child", "exec")

    def run() -> None:
        sys.argv = ["child", *map(str, arguments)]
        exec(code, {})

    return forked.start(run)


def child(body: str, *arguments: object) -> int:
    """Exit status of Python code in a process of its own."""
    return forked.wait(start(body, *arguments))


def fill(value: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in ("a", "b"):
            (folder / name).write_text(value)

    return write


def content(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in ("a", "b")}


def anything(folder: Path) -> bool:
    return True


def drafts(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(files.PREFIX)]


# -- whole or not at all --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("step", ["write", "os.fsync", "os.replace", "os.rename", "files._swap"])
def test_an_interruption_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
) -> None:
    files.write_text(tmp_path / "file", "old")
    files.write_folder(tmp_path / "folder", fill("old"), anything)

    def stop(*args: Any, **kwargs: Any) -> None:
        raise error("stopped")

    def half(made: Path) -> None:
        (made / "a" if made.is_dir() else made).write_text("ne")
        stop()

    with monkeypatch.context() as patch:
        if step != "write":
            patch.setattr(f"saap_index.files.{step.removeprefix('files.')}", stop)
        if step in ("write", "os.fsync", "os.replace"):
            with pytest.raises(error):
                files.write_file(tmp_path / "file", half if step == "write" else lambda made: made.write_text("new"))
        if step in ("write", "os.fsync", "files._swap"):
            with pytest.raises(error):
                files.write_folder(tmp_path / "folder", half if step == "write" else fill("new"), anything)
        if step == "os.rename":
            patch.setattr(files, "_swap", lambda a, b: False)
            with pytest.raises(error):
                files.write_folder(tmp_path / "folder", fill("new"), anything)
    assert (tmp_path / "file").read_text() == "old" and content(tmp_path / "folder") == {"old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool) -> None:
    if not swaps:
        monkeypatch.setattr(files, "_swap", lambda a, b: False)
    for value in ("one", "two", "three"):
        files.write_folder(tmp_path / "up" / "folder", fill(value), lambda there: (there / "a").exists())
        assert content(tmp_path / "up" / "folder") == {value} and not drafts(tmp_path / "up")
    (tmp_path / "thesis").mkdir()
    with pytest.raises(FileExistsError, match="thesis"):
        files.write_folder(tmp_path / "thesis", lambda made: pytest.fail("nothing is to be written"), lambda there: False)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == []


KILLED = """
path, kind, step = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def write(made):
    if kind == "folder":
        (made / "a").write_text("new")
    else:
        made.write_text("ne")
    if step == "write":
        kill()
    if kind == "folder":
        (made / "b").write_text("new")
if step == "second rename":
    files._swap = lambda a, b: False
    rename = os.rename
    def first(a, b):
        rename(a, b)
        os.rename = kill
    os.rename = first
elif step == "lock":
    files._lock = kill
elif step == "after swap":
    swap = files._swap
    files._swap = lambda a, b: (swap(a, b), kill())
elif step != "write":
    setattr(os, step, kill)
if kind == "folder":
    files.write_folder(path, write, lambda there: True)
else:
    files.write_file(path, write)
"""


@pytest.mark.parametrize(("kind", "step"), [
    *(("file", step) for step in ("lock", "write", "fsync", "replace")),
    *(("folder", step) for step in ("lock", "write", "fsync", "second rename", "after swap")),
])
def test_a_killed_writer(tmp_path: Path, kind: str, step: str) -> None:
    path = tmp_path / "target"
    if kind == "folder":
        files.write_folder(path, fill("old"), anything)
    else:
        files.write_text(path, "old")
    assert child(KILLED, path, kind, step) == -signal.SIGKILL
    assert len(drafts(tmp_path)) == 1
    files.recover(path)
    assert (content(path) if kind == "folder" else {path.read_text()}) == ({"new"} if step == "after swap" else {"old"})
    files.write_text(tmp_path / "another", "of the same folder")
    assert not drafts(tmp_path), "what a killed writer left is taken away"
    if kind == "folder":
        files.write_folder(path, fill("newer"), anything)
        assert content(path) == {"newer"}


def test_two_files_that_belong_together_are_made_before_either_is_put_in_place(tmp_path: Path) -> None:
    seen = []

    def second(made: Path) -> None:
        seen.append((tmp_path / "a").read_text())
        made.write_text("new")

    files.write_files(tmp_path, {"a": lambda made: made.write_text("old"), "b": lambda made: made.write_text("old")})
    files.write_files(tmp_path, {"a": lambda made: made.write_text("new"), "b": second})
    assert seen == ["old"] and content(tmp_path) == {"new"} and not drafts(tmp_path)


# -- several writers ------------------------------------------------------------------------------------------------------


def test_a_living_writer_keeps_its_draft(tmp_path: Path) -> None:
    """Also one of another process, and one in a thread of this one."""

    def others(made: Path) -> None:
        made.write_text("mine")
        assert child('files.write_text(sys.argv[1], "theirs")', tmp_path / "file") == 0
        thread = threading.Thread(target=files.write_text, args=(tmp_path / "other", "a thread's"))
        thread.start()
        thread.join()
        files.write_text(tmp_path / "file", "nested")
        assert made.read_text() == "mine" and len(drafts(tmp_path)) == 1

    files.write_file(tmp_path / "file", others)
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "other").read_text() == "a thread's"
    assert not drafts(tmp_path)


WRITES = """
def fill(made):
    for name in ("a", "b"):
        (made / name).write_text(sys.argv[2])
for _ in range(40):
    files.write_folder(sys.argv[1], fill, lambda there: True)
    files.write_text(sys.argv[1] + ".txt", sys.argv[2] * 1000)
"""


def test_writers_of_one_name(tmp_path: Path) -> None:
    """Of two processes that write the same names, each result is one process's."""
    path = tmp_path / "target"
    running = [start(WRITES, path, value) for value in "xy"]
    assert [forked.wait(process) for process in running] == [0, 0]
    assert content(path) in ({"x"}, {"y"}) and (tmp_path / "target.txt").read_text() in ("x" * 1000, "y" * 1000)
    assert not drafts(tmp_path)


def test_the_drafts_of_other_programs_are_left_alone(tmp_path: Path) -> None:
    names = (".target.1.tmp", ".saap-notes", "x.draft")
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / f"{files.PREFIX}link{files.SUFFIX}").symlink_to(tmp_path / names[0])
    files.write_text(tmp_path / "target", "text")
    assert all((tmp_path / name).is_dir() and not any((tmp_path / name).iterdir()) for name in names)


# -- modes, links, places -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_are_those_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        files.write_tensors(tmp_path / "file", {})
        files.write_folder(tmp_path / "folder", lambda made: files.save_tensors(made / "a", {}), anything)
        (tmp_path / "plain").touch()
        (tmp_path / "plain folder").mkdir()
    finally:
        os.umask(before)

    def mode(name: str) -> int:
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    assert mode("file") == mode("folder/a") == mode("plain") == 0o666 & ~umask
    assert mode("folder") == mode("plain folder")
    (tmp_path / "file").chmod(0o640)
    files.write_tensors(tmp_path / "file", {})
    assert mode("file") == 0o640, "a file that was there keeps its mode"


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    files.write_text(tmp_path / "disk" / "file", "old")
    files.write_folder(tmp_path / "disk" / "folder", fill("old"), anything)
    for name in ("file", "folder", "new"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    files.write_text(tmp_path / "file", "new")
    files.write_folder(tmp_path / "folder", fill("new"), anything)
    files.write_text(tmp_path / "new", "new")
    files.write_files(tmp_path, {"file": lambda made: made.write_text("newer")})
    assert all((tmp_path / name).is_symlink() for name in ("file", "folder", "new"))
    assert (tmp_path / "disk" / "file").read_text() == "newer" and (tmp_path / "disk" / "new").read_text() == "new"
    assert content(tmp_path / "disk" / "folder") == {"new"}
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(OSError, match="circle"):
        files.write_text(tmp_path / "circle", "")


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        files.write_text(tmp_path / "absent" / "file", "")
    with pytest.raises(IsADirectoryError, match="expected the name of a file"):
        files.write_text(tmp_path, "")
    with pytest.raises(IsADirectoryError):
        files.write_text(os.devnull, "")  # is no file to be replaced
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        files.write_folder(tmp_path / "file", fill(""), anything)
    files.write_text(tmp_path / ("n" * 255), "a name as long as names may be")


def test_everything_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files before they get their name, then the folder that holds it."""
    done: list[int | str] = []
    fsync, replace, swap = os.fsync, os.replace, files._swap

    def note(descriptor: int) -> None:
        done.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def names() -> list[str]:
        """What was done since the last call: the names that synced files and folders have now, and exchanges."""
        known = {path.stat().st_ino: path.name for path in (tmp_path, *tmp_path.rglob("*"))}
        found = [str(known.get(x, x)) if isinstance(x, int) else x for x in done]
        done.clear()
        return found

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    monkeypatch.setattr(files, "_swap", lambda a, b: (done.append("replace"), swap(a, b))[1])
    folder = files.make_folder(tmp_path / "one" / "two")
    assert set(names()) == {tmp_path.name, "one"}
    files.write_text(folder / "file", "")
    assert names() == ["file", "replace", "two"]
    files.write_folder(folder / "made", fill(""), anything)
    names()
    files.write_folder(folder / "made", fill(""), anything)
    found = names()
    assert sorted(found[:2]) == ["a", "b"] and found[2:] == ["made", "replace", "two"]


# -- reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [
    b"", b"{", b"\xff\xfe", b'{"a": 1e999}', b'{"a": NaN}', b'{"a": -Infinity}', b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000,
    b'{"a": "\xc3"}',
])
def test_json_that_is_none(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "file").write_bytes(raw)
    with pytest.raises(FormatError, match="expected notes"):
        files.read_json(tmp_path / "file", "notes")


def test_json(tmp_path: Path) -> None:
    files.write_json(tmp_path / "file", {"a": [1, 2.5, None], "b": float("inf")})
    assert files.read_json(tmp_path / "file", "notes", finite=False) == {"a": [1, 2.5, None], "b": float("inf")}
    assert json.loads((tmp_path / "file").read_text())["a"] == [1, 2.5, None]
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "absent", "notes")


# -- nobody else ----------------------------------------------------------------------------------------------------------

WRITING = {
    "write_text", "write_bytes", "save_file", "savefig", "touch", "mkdir", "makedirs", "mkdtemp", "mkstemp", "rename", "rmtree",
    "symlink_to", "NamedTemporaryFile", "TemporaryDirectory", "tofile", "savez", "dump",
}
MODULES = {("os", "replace"), ("np", "save"), ("torch", "save"), ("os", "remove"), ("os", "unlink"), ("shutil", "move")}
INSIDE = {  # what is called in a function that files.py calls with a draft, or on work in progress that is taken away
    ("routers.py", "write_text"), ("hf/saving.py", "write_text"), ("plots.py", "savefig"), ("pipeline/train.py", "rmtree"),
}


def writing_calls(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if (node.attr in WRITING and owner != "files") or (owner, node.attr) in MODULES:
                found.add(node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "open":
            modes = [x.value for x in [*node.args, *(k.value for k in node.keywords)] if isinstance(x, ast.Constant)]
            if any(isinstance(mode, str) and set(mode) & set("wax+") and len(mode) <= 3 for mode in modes):
                found.add("open")
        if isinstance(node, ast.ImportFrom) and any(alias.name in WRITING for alias in node.names) and node.module != "files":
            found.add(f"import of {node.module}")
    return found


def test_nobody_else_writes_to_disk() -> None:
    found = set()
    for package in (PACKAGE, LAB):
        for path in package.rglob("*.py"):
            name = str(path.relative_to(package))
            if name != "files.py":
                found |= {(name, call) for call in writing_calls(path)}
    assert found == INSIDE
