"""What may be installed is what was tested: bounds in setup.cfg, and one version of everything in constraints.txt within them."""

from __future__ import annotations

import configparser
import re
from importlib import metadata
from pathlib import Path

import versions
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from saap_index.hf import support

ROOT = Path(__file__).parents[2]
ON_A_GPU = {"cupy-cuda12x", "cupy-cuda13x", "faiss-gpu"}  # installed by hand where there is one
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]


def requirements() -> list[Requirement]:
    """Everything that setup.cfg asks for."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    return [Requirement(line) for text in texts for line in text.splitlines() if line and not line.startswith("#")]


def pin(name: str, python: str = "3.12") -> str | None:
    found = [p for p in PINS if canonicalize_name(p.name) == canonicalize_name(name)]
    versions = [
        str(p.specifier).removeprefix("==") for p in found if p.marker is None or p.marker.evaluate({"python_version": python})
    ]
    assert len(versions) < 2, f"{name} is pinned twice"
    return versions[0] if versions else None


def test_every_requirement_has_an_upper_bound_that_its_pin_keeps() -> None:
    for requirement in requirements():
        operators = {part.operator for part in requirement.specifier}
        assert operators & {"<", "=="}, f"{requirement}: expected an upper bound"
        for python in ("3.10", "3.12"):
            version = pin(requirement.name, python)
            assert version is not None or requirement.name in ON_A_GPU, f"{requirement}: expected a line in constraints.txt"
            assert version is None or requirement.specifier.contains(version), f"{requirement}: got {version} in constraints.txt"


def test_constraints_are_versions_and_nothing_else() -> None:
    """No address and no path: they hold wherever packages come from. No local version: torch may be built for CPUs or CUDA."""
    for p in PINS:
        assert p.url is None and re.fullmatch(r"==[0-9][0-9a-z.]*", str(p.specifier)), str(p)
    names = [str(p) for p in PINS]
    assert len(names) == len(set(names))


def test_constraints_are_complete() -> None:
    """What the requirements require in turn, as installed here, is in constraints.txt too."""
    missing, seen = set(), set()
    waiting = [r for r in requirements() if r.name not in ON_A_GPU]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if pin(name) is None and pin(name, "3.10") is None:
            missing.add(name)
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                needs = [Requirement(text) for text in distribution.requires or ()]
                waiting += [r for r in needs if r.marker is None or r.marker.evaluate({"extra": extra})]
    assert not missing and len(seen) > 40


def test_the_newest_version_that_is_tested_is_the_one_installed_by_setup() -> None:
    assert pin("transformers") is not None and str(pin("transformers")).startswith("{}.{}.".format(*support.NEWEST))
    bound = next(r for r in requirements() if r.name == "transformers").specifier
    major, minor = support.NEWEST
    assert not bound.contains(f"{major}.{minor + 1}.0") and bound.contains("{}.{}.0".format(*support.OLDEST))
    assert not bound.contains("4.57.6")


def test_one_release_of_each_minor_version_is_listed() -> None:
    minors = [tuple(int(part) for part in release.split(".")[:2]) for release in versions.RELEASES]
    assert minors == [(5, minor) for minor in range(support.NEWEST[1] + 1)] and minors[0] == support.OLDEST
    assert versions.RELEASES[-1] == pin("transformers")


def test_no_call_names_the_cache_by_one_version_s_keyword() -> None:
    """`support.cache_argument` says what it is called; CACHE in tests."""
    files = [path for folder in ("saap_index", "tests", "bench", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 150
    name = support.CACHE_NAMES[1]
    assert not [str(path) for path in files if re.search(rf"\b{name}\s*=|\.{name}\b", path.read_text())]
