"""How many cores this process may use: what the hardware has, less what affinity and control groups withhold."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def available_cores(root: Path = Path("/")) -> int:
    """The cores of this process's affinity, at most as many as its control groups (version 1 or 2) let run at once.

    root : where /proc and /sys lie.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on every system
        cores = os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(share) for share in _shares(root))]))


def _shares(root: Path) -> Iterator[float]:
    """Cores that each control group above this process grants it, where it says so."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        mount = root / "sys/fs/cgroup"
        if controllers:
            if "cpu" not in controllers.split(","):
                continue
            mount = next((x for x in (mount / controllers, mount / "cpu") if x.is_dir()), mount)
        # inside a container the path may be that of the host, of which only the end is to be seen here: then the top counts
        group = mount / path.strip("/")
        for folder in [group, *group.parents]:
            if not folder.is_relative_to(mount):
                break
            if controllers:
                quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
            else:
                quota, _, period = _text(folder / "cpu.max").partition(" ")
            if quota.isdigit() and period.isdigit() and int(quota) and int(period):
                yield int(quota) / int(period)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
