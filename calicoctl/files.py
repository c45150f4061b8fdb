"""Locks files, replaces files atomically, and keeps what a command leaves for the next command of the same user.

A lock is a flock(2) on a file, so the kernel releases it when the process ends. What is left for the next command is a
small file that does not outlive a reboot, and that only this user can read: in /run/calico for root, and in the runtime
directory for other users.
"""

from __future__ import annotations

import fcntl
import io
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Callable

RUN = Path("/run/calico")
"""The directory of root's files that do not outlive a reboot."""


def try_lock(path: Path, create: bool = True) -> int | None:
    """Lock a file exclusively, and return its descriptor. Closing the descriptor releases the lock.

    Returns None if the lock is held already, or if the file was removed before it was locked. If the file does not
    exist, it is created with the mode 0600 if `create` is True; if `create` is False, None is returned. Raises OSError
    if the file cannot be opened or created, in particular if it is a symbolic link.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    try:
        fd = os.open(path, flags, 0o600)  # other users must not lock it: whoever may open a file may lock it
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
    """Lock a file exclusively, and return its descriptor. Closing the descriptor releases the lock.

    Calls `try_lock` until it succeeds, and `refuse` after each failed attempt. `refuse` may raise an exception, which
    ends the wait. Raises OSError like `try_lock`.
    """
    while (fd := try_lock(path)) is None:
        refuse()
        time.sleep(0.02)  # flock(2) waits for ever or not at all
    return fd


def lock_within(path: Path, seconds: float, failure: Exception) -> int:
    """Do what `lock` does, but raise `failure` if another process still holds the lock after `seconds`."""
    give_up = time.monotonic() + seconds

    def refuse() -> None:
        if time.monotonic() > give_up:
            raise failure

    return lock(path, refuse)


def replace(
    path: Path,
    content: bytes | bytearray,
    mode: int,
    owner: tuple[int, int] = (-1, -1),
    suffix: str = ".new",
    durable: bool = False,
) -> io.FileIO:
    """Replace a file atomically, or create it; return the new file, open for writing.

    `mode` is the new file's mode, regardless of the umask. `owner` is its user id and its group id; -1 means the
    process's own. The content is first written to another file in the same directory, which is then renamed. Its name
    is `.`, the file's name, and `suffix`; so `suffix` must be unique if several processes may replace the file at once.
    With `durable`, the content is on disk before the file is renamed, and the new name is on disk when this function
    returns. If OSError is raised, the old file is unchanged, unless the error is that the directory could not be
    written to disk (`durable`).
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
        if durable:
            sync_folder(path.parent)
    except BaseException as error:
        file.close()
        new.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # of a descriptor: name the file in messages
            error.filename = str(path)
        raise
    return file


def new_mode() -> int:
    """Return the mode that a program gives to a new file, by this process's umask."""
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o666 & ~umask


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on disk, as they are now. Raises OSError."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_left(name: str) -> bytes | None:
    """Return what `leave` has written, at most 64 KiB of it.

    Returns None if the file cannot be read, is no regular file, belongs to another user, or can be read by others.
    """
    path = _path_left(name, create=False)
    try:
        if path is None:
            return None
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
            return file.read(2**16) if own else None
    except OSError:
        return None


def leave(name: str, content: bytes) -> None:
    """Leave `content` for this user's next command, in the file `name`. Raises nothing if it cannot be written.

    `name` begins with a dot, so that no directory in /run/calico has the same name: these have the names of hosts.
    """
    path = _path_left(name, create=True)
    if path is not None:
        with suppress(OSError):
            replace(path, content, 0o600, suffix=f".{os.getpid()}").close()


def remove_left(name: str) -> None:
    """Remove what `leave` has written, if there is something. Raises nothing."""
    path = _path_left(name, create=False)
    if path is not None:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _path_left(name: str, create: bool) -> Path | None:
    """Return the path of a file that is left for this user; None if its directory does not exist or is not safe.

    A directory is safe if it belongs to this process's user, and nobody else can write to it or, unless the user is
    root, read it. If `create` is true, and the user is root, a missing directory is created.
    """
    user = os.geteuid()
    folder = RUN if user == 0 else Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{user}")
    try:
        if create and user == 0:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    others = 0o022 if user == 0 else 0o077
    usable = stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & others
    return folder / name if usable else None
