"""Code in a process of its own that starts as a copy of this one, and so need not import anything: for what ends processes, and
for several that write at once. torch's threads are not copied: nothing large is to be computed there."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable


def start(run: Callable[[], object]) -> int:
    """The number of a process that runs this."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that are not copied
        child = os.fork()
    if child:
        return child
    try:
        run()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def wait(child: int) -> int:
    """Its exit status; -n if signal n ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
