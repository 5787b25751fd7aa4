"""Kernel sources as one text each: what is compiled, hashed and cached. Knows files, not compilers.

A compiler's cache looks at the text it is given and not at the files that text includes, so our own includes are put in place
before anything else sees them; a changed header then is a changed kernel.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path

_PACKAGE = Path(__file__).parents[2]
FOLDER = _PACKAGE / "cuda" if (_PACKAGE / "cuda").is_dir() else _PACKAGE.parent / "cuda"
"""Inside the package where it is installed, beside it in a checkout."""

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([\w.]+)"[^\n]*$', re.MULTILINE)
_ONCE = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+once[^\n]*$", re.MULTILINE)


@functools.cache
def source(file: str) -> str:
    """``cuda/<file>`` with every header of ours in place of its #include, each once; messages still name file and line.

    What is not in the folder (the emulation layer's header, a host's) stays an #include, for the preprocessor to skip.
    """
    return _expand(file, set())


def _expand(file: str, seen: set[str]) -> str:
    seen.add(file)
    text = _ONCE.sub("", (FOLDER / file).read_text(encoding="utf-8"))

    def put(match: re.Match[str]) -> str:
        name = match.group(1)
        if not (FOLDER / name).is_file():
            return match.group(0)
        if name in seen:
            return ""
        line = text.count("\n", 0, match.start()) + 2
        return f'{_expand(name, seen)}\n#line {line} "{file}"'

    return f'#line 1 "{file}"\n' + _INCLUDE.sub(put, text)


def options(macros: Mapping[str, int]) -> tuple[str, ...]:
    """``macros`` as compiler options, in one order however they came."""
    return tuple(f"-D{name}={int(macros[name])}" for name in sorted(macros))
