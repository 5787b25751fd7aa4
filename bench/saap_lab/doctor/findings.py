"""What a check found: a row with a verdict and what to do, and a table of them. Knows no checks."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OK, WARN, FAIL, SKIPPED = "ok", "warn", "fail", "skipped"
WIDTH = 130


@dataclass(frozen=True)
class Finding:
    """row : what was checked; verdict : ok, warn, fail or skipped; found : in words; advice : what to do, empty if nothing;
    figures : the numbers behind it, plain data."""

    row: str
    verdict: str
    found: str
    advice: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


def check(row: str, look: Callable[[], Finding]) -> Finding:
    """What ``look`` found; a failure by name if it raised, for one broken part must not hide what the others say."""
    try:
        return look()
    except Exception as error:  # whatever it is, it is the finding
        return Finding(row, FAIL, f"{type(error).__name__}: {error}", "this part does not work here; the message says why")


def status(findings: Sequence[Finding]) -> int:
    """Exit status: 1 if a row failed, else 0."""
    return int(any(finding.verdict == FAIL for finding in findings))


def table(findings: Sequence[Finding]) -> list[str]:
    """A line for each row, and below those that are not well what to do."""
    wide = max(len(finding.row) for finding in findings)
    lines = []
    for finding in findings:
        head = f"{finding.verdict:8}{finding.row:{wide + 2}}"
        indent = " " * len(head)
        lines += textwrap.wrap(finding.found, WIDTH, initial_indent=head, subsequent_indent=indent) or [head]
        lines += textwrap.wrap(finding.advice, WIDTH, initial_indent=f"{indent}-> ", subsequent_indent=f"{indent}   ")
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in (OK, WARN, FAIL, SKIPPED)}
    return [*lines, "", ", ".join(f"{number} {verdict}" for verdict, number in counts.items() if number)]


def as_json(findings: Sequence[Finding]) -> str:
    """The same for programs: {"failed": bool, "rows": [{row, verdict, found, advice, figures}]}; NaN is null."""
    rows = [{**vars(found), "figures": _plain(found.figures)} for found in findings]
    return json.dumps({"failed": bool(status(findings)), "rows": rows}, indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
