"""The logs of processes that run on: one line for each record, in a file that does not grow for ever.

The agent opens its log itself, and rotates it: `RotatingFile`. The process for Docker networks writes to standard
error, a file that another process has opened for it, and that it cannot rename: `StandardError`.
"""

from __future__ import annotations

import io
import logging
import logging.handlers
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

from calicoctl.errors import one_line

LARGEST = 10 * 2**20
"""The maximum size of a log file, in bytes."""

WITH_TIME = "%(asctime)s %(levelname)s: %(message)s"
"""The format of a record where nothing else, such as the journal, adds the time."""


class OneLine(logging.Formatter):
    """Writes each log record, except for a traceback, as one line, even if it contains names with line breaks."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))


class RotatingFile(logging.handlers.RotatingFileHandler):
    """Writes to a file that only root and the file's group can read, since it may quote the store.

    When the file has LARGEST bytes, it is renamed, and a new one is begun; four old ones are kept. A new one is begun,
    too, when somebody, such as logrotate, has renamed or removed the file.
    """

    def __init__(self, path: Path) -> None:
        """Open the file. Raises OSError."""
        super().__init__(path, maxBytes=LARGEST, backupCount=4)

    def shouldRollover(self, record: logging.LogRecord) -> int:
        """Return whether the file is full, before each record. Close it if it is no longer in its place."""
        stream = self.stream
        if stream and not self._is_in_place(stream):
            self.stream = None  # which is opened for the record, also if closing fails
            stream.close()
        return super().shouldRollover(record)

    def _is_in_place(self, stream: io.TextIOWrapper) -> bool:
        try:
            return os.path.samestat(os.stat(self.baseFilename), os.fstat(stream.fileno()))
        except OSError:
            return False

    def _open(self) -> io.TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        file = io.TextIOWrapper(io.FileIO(descriptor, "a"), self.encoding, "backslashreplace")
        with suppress(OSError):  # of an older version
            os.fchmod(descriptor, os.fstat(descriptor).st_mode & 0o7770)
        return file


class StandardError(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error, and bounds its size if it is a file, which must be opened to append."""

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        with suppress(OSError, ValueError):
            shorten(sys.stderr.fileno())


def shorten(fd: int) -> None:
    """If an open file has more than LARGEST bytes, keep only the whole lines in its last LARGEST / 2 bytes.

    `fd` is its descriptor. What is not a regular file is not changed. Raises OSError.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size <= LARGEST:
        return
    with open(f"/proc/self/fd/{fd}", "rb+") as file:
        file.seek(status.st_size - LARGEST // 2)
        rest = file.read(LARGEST).partition(b"\n")[2]
        file.seek(0)
        file.write(rest)
        file.truncate()
