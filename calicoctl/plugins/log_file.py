"""The log of the process for Docker networks: standard error, which may be a file that must not grow for ever."""

from __future__ import annotations

import logging
import os
import stat
import sys
from contextlib import suppress

LARGEST = 10 * 2**20
"""The maximum size of the file, in bytes. When it is reached, the file's first half is removed."""


class LogFile(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error, and bounds its size if it is a file, which must be opened to append."""

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        with suppress(OSError, ValueError):
            shorten(sys.stderr.fileno())


def shorten(fd: int) -> None:
    """Remove the first half of an open file's lines if it has more than LARGEST bytes. Raises OSError."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size <= LARGEST:
        return
    with open(f"/proc/self/fd/{fd}", "rb+") as file:
        file.seek(status.st_size - LARGEST // 2)
        rest = file.read(LARGEST).partition(b"\n")[2]
        file.seek(0)
        file.write(rest)
        file.truncate()
