"""Files that several processes use at once: locks, and files that are replaced as a whole.

A lock is flock(2) on a file, so a process that dies releases it.
"""

from __future__ import annotations

import fcntl
import io
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Callable

RUN = Path("/run/calico")
"""The folder of root's files that are gone after a reboot."""


def try_lock(path: Path, create: bool = True) -> int | None:
    """Lock a file exclusively, and return its descriptor, which holds the lock until it is closed.

    Returns None if another process holds the lock, or has just removed the file; the caller may try again. If the file
    does not exist, it is created with mode 0600; without `create`, None is returned. Raises OSError.

    Whoever may read a file may lock it, so a lock is never a file or a folder that others may read.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    try:
        fd = os.open(path, flags, 0o600)
    except FileNotFoundError:
        if create:  # the file would have been created, so the folder is missing
            raise
        return None
    try:
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the holder before us may have removed the file: then another process may hold the lock of a new one
            if os.fstat(fd).st_ino == os.stat(path).st_ino:
                return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def lock(path: Path, refuse: Callable[[], object]) -> int:
    """Lock a file as `try_lock` does, but wait while another process holds the lock; return the descriptor.

    `refuse` is called after each attempt that failed, and may raise an exception to end the wait. Raises OSError.
    """
    while (fd := try_lock(path)) is None:
        refuse()
        time.sleep(0.02)  # flock(2) waits for ever or not at all
    return fd


def replace(
    path: Path,
    content: bytes,
    mode: int,
    owner: tuple[int, int] = (-1, -1),
    suffix: str = ".new",
    durable: bool = False,
) -> io.FileIO:
    """Replace a file atomically: a reader finds the old content or the new one. Return the new file, open for writing.

    `mode` is set regardless of the umask; `owner` is a user id and a group id, -1 for the process's own. The new file
    is first created beside the old one, as `.NAME` with the `suffix`, which must be unique if several processes may
    replace the file at once. With `durable`, the content is on disk before the old file is replaced. Raises
    OSError; then the old file is unchanged.
    """
    new = path.with_name(f".{path.name}{suffix}")
    new.unlink(missing_ok=True)  # left by a process that was killed
    file = io.FileIO(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "w")
    try:
        os.fchown(file.fileno(), *owner)
        os.fchmod(file.fileno(), mode)
        rest = memoryview(content)
        while rest:  # if the disk is nearly full, only a part is written, without an error
            rest = rest[file.write(rest) :]
        if durable:
            os.fsync(file.fileno())
        new.rename(path)
    except BaseException as error:
        file.close()
        new.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # of a descriptor: name the file in messages
            error.filename = str(path)
        raise
    return file
