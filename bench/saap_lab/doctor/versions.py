"""Versions of the packages in use against those that are tested: the bounds of the package's own requirements, and nothing else.

They stand in setup.cfg, which a checkout reads; an installed package has them in its metadata.
"""

from __future__ import annotations

import configparser
import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

from saap_index import __version__

from .findings import FAIL, OK, WARN, Finding

NAME = "saap-index"
EXTRAS = ("", "cpu", "cuda12", "cuda13", "transformers", "train")
"""What is needed to run; the demo's and the tests' own packages are not."""


def requirements() -> list[str]:
    """Requirements as in PEP 508, those of extras with their marker; empty for a package without metadata."""
    checkout = Path(__file__).parents[2] / "setup.cfg"
    if checkout.is_file():
        parser = configparser.ConfigParser()
        parser.read(checkout)
        if parser.get("metadata", "name", fallback=None) == NAME:
            lines = _lines(parser.get("options", "install_requires", fallback=""))
            for extra, text in parser.items("options.extras_require"):
                for line in _lines(text):
                    need, _, marker = line.partition(";")
                    both = f'({marker.strip()}) and extra == "{extra}"' if marker else f'extra == "{extra}"'
                    lines.append(f"{need.strip()}; {both}")
            return lines
    try:
        return importlib.metadata.requires(NAME) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def tested(lines: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """By package its range, as in ``>=5.0,<5.25``, all requirements of it together, and whether nothing works without it."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    ranges: dict[str, SpecifierSet] = {}
    always: set[str] = set()
    for line in lines:
        need = Requirement(line)
        if not any(need.marker is None or need.marker.evaluate({"extra": extra}) for extra in EXTRAS):
            continue
        ranges[need.name] = ranges.get(need.name, SpecifierSet()) & need.specifier
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            always.add(need.name)
    return {name: (str(allowed), name in always) for name, allowed in sorted(ranges.items())}


def check_versions(lines: Sequence[str] | None = None, version_of: Callable[[str], str | None] = installed) -> list[Finding]:
    """A row for the interpreter and this package, and one for each package that is there or has to be."""
    system = f"{platform.system()} {platform.machine()}"
    own = Finding("saap_index", OK, f"{__version__}, Python {platform.python_version()}, {system}")
    try:
        from packaging.specifiers import SpecifierSet

        ranges = tested(requirements() if lines is None else lines)
    except ImportError:
        return [own, Finding("versions", WARN, "the package packaging is missing, nothing is compared", "pip install packaging")]
    if not ranges:
        words = "saap_index has no metadata here, so that tested versions are not known"
        return [own, Finding("versions", WARN, words, "install it: pip install . in its folder")]
    rows = []
    for name, (wanted, needed) in ranges.items():
        version = version_of(name)
        install = f"pip install '{name}{wanted}'"
        if version is None and not needed:
            continue
        figures = {"version": version, "tested": wanted}
        if version is None:
            rows.append(Finding(f"version of {name}", FAIL, "not installed", install, figures))
        elif not SpecifierSet(wanted).contains(version.partition("+")[0], prereleases=True):
            rows.append(Finding(f"version of {name}", FAIL, f"{version}, tested is {wanted}", install, figures))
        else:
            rows.append(Finding(f"version of {name}", OK, f"{version}, tested is {wanted or 'any'}", "", figures))
    return [own, *rows]
