"""Every kernel under AddressSanitizer and under ThreadSanitizer, in one process each: most of what a process costs is its start.

What runs is ``once`` of the file that tests a kernel.
"""

from __future__ import annotations

import pytest
from emu import sanitize
from emu.runtime import available

MODULES = "test_gpu_build", "test_gpu_paged", "test_gpu_route", "test_gpu_route_select", "test_gpu_scan", "test_gpu_select"


@pytest.mark.skipif(not available(), reason="no C++ compiler")
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing(sanitizer: str) -> None:
    program = "".join(f"import {name}\nprint({name!r}, flush=True)\n{name}.once()\n" for name in MODULES)
    result = sanitize.run(sanitizer, ["-c", program + "print('all done')"])
    assert result.returncode == 0 and "all done" in result.stdout, result.stdout[-3000:] + result.stderr[-6000:]
