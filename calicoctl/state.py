"""Reads and writes the files that a host keeps across reboots, in its directory /var/lib/calico/HOST and below.

Files have the mode 0600, directories 0700, and none may be a symbolic link. `write` replaces a file atomically; when it
returns, the file is on disk. In all functions, `names` are the parts of a path relative to the host's directory.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from calicoctl import files
from calicoctl.errors import CalicoError

DIRECTORY = Path("/var/lib/calico")


def path(host: str, *names: str) -> Path:
    """Return the path of a host's directory or, with `names`, of a file or directory below it."""
    return DIRECTORY.joinpath(host, *names)


def read(host: str, *names: str) -> bytes | None:
    """Return the content of a file below the host's directory; None if there is no regular file.

    Raises CalicoError, also if the file is a symbolic link.
    """
    with _explained(host, *names), _opened(host, *names[:-1]) as folder:
        return None if folder is None else _content(folder, names[-1])


def read_all(host: str, *names: str) -> dict[str, bytes]:
    """Return the contents of the regular files in a directory below the host's directory, by file name.

    Returns an empty dictionary if the directory does not exist. Files whose names begin with a dot are skipped. Raises
    CalicoError, also if one of the other files is a symbolic link.
    """
    found: dict[str, bytes] = {}
    with _explained(host, *names), _opened(host, *names) as folder:
        if folder is not None:
            with os.scandir(folder) as entries:
                contents = {entry.name: _content(folder, entry.name) for entry in entries if entry.name[0] != "."}
            found = {name: content for name, content in contents.items() if content is not None}
    return found


def write(host: str, *names: str, content: bytes) -> None:
    """Create or replace a file below the host's directory, unless it has this content already. Raises CalicoError.

    Directories that do not exist are created.
    """
    with _explained(host, *names), _opened(host, *names[:-1], create=True) as folder:
        assert folder is not None, "it was created"
        if _content(folder, names[-1]) != content:
            files.replace(Path(f"/proc/self/fd/{folder}", names[-1]), content, 0o600, durable=True).close()


def remove(host: str, *names: str) -> None:
    """Remove a file below the host's directory, if it exists. Raises CalicoError."""
    with _explained(host, *names), _opened(host, *names[:-1]) as folder:
        if folder is not None:
            with suppress(FileNotFoundError):
                os.unlink(names[-1], dir_fd=folder)


def remove_empty(host: str, *names: str) -> None:
    """Remove an empty directory below the host's directory, and then its parents, including the host's directory.

    Stops at the first directory that is not empty or cannot be removed. Raises nothing.
    """
    parts = [host, *names]
    with suppress(OSError):
        while parts:
            with suppress(FileNotFoundError):
                DIRECTORY.joinpath(*parts).rmdir()
            parts.pop()


def _content(folder: int, name: str) -> bytes | None:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)  # Python opens no directory, and would leave the descriptor open
        return None
    with open(fd, "rb") as file:
        return file.read()


@contextmanager
def _opened(host: str, *names: str, create: bool = False) -> Iterator[int | None]:
    """Yield a descriptor of the host's directory or, with `names`, of a directory below it.

    If the directory does not exist, None is yielded; with `create`, the directory and its parents are created instead.
    Raises OSError if it or a parent, from the host's directory on, is a symbolic link. Raises CalicoError if one of
    these belongs to another user, or if its group or others may write to it.
    """
    if create:
        DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        fd = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        for number, name in enumerate((host, *names), 1):
            if create:
                with suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=fd)
            try:
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            except FileNotFoundError:
                yield None
                return
            os.close(fd)
            fd = below
            status = os.fstat(fd)
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                folder = path(host, *names[: number - 1])
                raise CalicoError(f"{folder} must belong to root, and nobody else may write to it")
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _explained(host: str, *names: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CalicoError(f"{path(host, *names)}: {error.strerror}") from None
