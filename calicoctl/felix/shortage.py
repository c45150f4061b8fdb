"""Detects that file descriptors or memory are short, and pauses the agent's threads meanwhile."""

from __future__ import annotations

import errno
import os
import resource
import time

PAUSE = 1.0
"""Seconds between two attempts at an operation that failed for lack of descriptors or memory: no event says when these
are there again.
"""


def wait_out() -> None:
    """Wait for PAUSE seconds. Then go on waiting while this process cannot open files."""
    time.sleep(PAUSE)
    while descriptors_lacking() is not None:
        time.sleep(PAUSE)


def descriptors_lacking() -> str | None:
    """Return a sentence for the report if this process cannot open a file, else None.

    If the process has reached its limit of descriptors, the sentence says how to raise the limit.
    """
    try:
        os.close(os.open("/proc/self/limits", os.O_RDONLY | os.O_CLOEXEC))
        return None
    except OSError as error:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        advice = ""
        if error.errno == errno.EMFILE:
            advice = f": it may have {limit}; 'prlimit --pid={os.getpid()} --nofile={max(4096, 2 * limit)}' allows more"
        return f"the agent cannot open files, and what it has to do waits ({error.strerror}){advice}"
