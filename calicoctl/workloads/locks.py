"""One lock a workload, so that only one command, or the agent, changes it at a time.

The locks are files under /run/calico/<host name>/, held with flock(2), so a process that dies lets go. While a workload
is connected, the lock file of a namespace holds its path, which cannot be told from the workload's id; and, for the
path of a process, when that process was started.

While a change is under way, there is a second file, which tells of one that was cut, and the name of the container.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from calicoctl import files
from calicoctl.errors import CalicoError, Conflict

DIRECTORY = Path("/run/calico")

PATIENCE = 30.0
"""Seconds to wait for a lock that somebody else holds."""

_MARK = "unfinished."
"""What the name of the second file begins with."""


class WorkloadLock:
    """Held inside `with`. A file that remembers no name is removed on leaving."""

    def __init__(self, host: str, orchestrator: str, workload: str, wait: bool = True) -> None:
        """Without `wait`, a lock that somebody else holds is not waited for."""
        self._directory = DIRECTORY / host
        self._workload = workload
        name = f"{orchestrator}.{workload}"
        if len(os.fsencode(name)) > 200:
            name = f"{orchestrator}.{hashlib.sha256(os.fsencode(workload)).hexdigest()}"
        self.path = self._directory / name
        self.mark = self._directory / f"{_MARK}{name}"
        self._wait = wait
        self._fd = -1
        self.interrupted = False

    def __enter__(self) -> WorkloadLock:
        """Wait for the lock; raise Conflict when somebody else keeps it.

        `interrupted` tells then whether an earlier change of the workload was cut short.
        """
        give_up = time.monotonic() + (PATIENCE if self._wait else 0)
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            while not self._acquired():
                if time.monotonic() > give_up:
                    raise Conflict(
                        f"another command has been working on this workload for {PATIENCE:.0f} s ({self.path} is "
                        "locked); try again when it is done"
                    )
                time.sleep(0.02)  # flock(2) waits for ever or not at all
            self.interrupted = self.mark.exists()
        except OSError as error:
            raise CalicoError(f"cannot lock {self.path}: {error.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        if os.fstat(self._fd).st_size == 0:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)

    def remember(self, name: str, started: str | None = None) -> None:
        """Keep the workload's name, and for that of a process when it was started, until it is forgotten."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, "\0".join([name, started] if started else [name]).encode(), 0)

    def name(self) -> str:
        """Return the name that is remembered, or an empty text."""
        return self._content()[0]

    def started(self) -> str | None:
        """Return when the process was started that the name is of, if that is remembered."""
        return self._content()[2] or None

    def forget(self) -> None:
        """Forget the workload's name: it has nothing any more."""
        os.ftruncate(self._fd, 0)
        self.clear_all()

    def mark_in_progress(self, name: str = "") -> None:
        """Note that a change is under way: should it be cut short, that can be told, and of which `name`."""
        try:
            with open(self.mark, "w", opener=_no_link) as mark:
                mark.write("\0".join([self._workload, name] if name else [self._workload]))
        except OSError as error:
            raise CalicoError(f"cannot write {self.mark}: {error.strerror}") from None

    def clear_mark(self) -> None:
        """Note that the change is done or undone. What an earlier one has left may still be there."""
        if not self.interrupted:
            self.mark.unlink(missing_ok=True)

    def clear_all(self) -> None:
        """Note that nothing is left of any change that was cut short."""
        self.mark.unlink(missing_ok=True)
        self.interrupted = False

    def _content(self) -> tuple[str, str, str]:
        return os.pread(self._fd, 2**16, 0).decode(errors="replace").partition("\0")

    def _acquired(self) -> bool:
        fd = files.try_lock(self.path)
        if fd is None:
            return False
        self._fd = fd
        return True


def exists(host: str, orchestrator: str, workload: str) -> bool:
    """Tell whether there is a lock of a workload, whether somebody holds it or not, or a change that was cut short."""
    lock = WorkloadLock(host, orchestrator, workload)
    return lock.path.exists() or lock.mark.exists()


def interrupted(host: str, orchestrator: str) -> list[str]:
    """Return the ids of the workloads whose last change is under way, or was cut short."""
    # a mark has the workload's id in it, but one that was cut short itself
    return [content[0] or id for id, content in _marks(host, orchestrator)]


def interrupted_named(host: str, orchestrator: str, name: str) -> set[str]:
    """Return the ids of the workloads of a name whose last change is under way, or was cut short; only root can."""
    with suppress(PermissionError):
        return {content[0] for _, content in _marks(host, orchestrator) if content[2] == name}
    return set()


def _marks(host: str, orchestrator: str) -> list[tuple[str, tuple[str, str, str]]]:
    """Return the marks of changes: the id that the file's name ends with, and what is in it: id, NUL, name."""
    prefix = f"{_MARK}{orchestrator}."
    names = [name for name in _names(host) if name.startswith(prefix)]
    return [(name[len(prefix) :], _content_of(DIRECTORY / host / name)) for name in names]


def remove_stale(host: str, orchestrator: str) -> None:
    """Remove the locks that remember nothing, and that nobody holds: of commands that were killed as they began."""
    empty: list[Path] = []
    with suppress(FileNotFoundError), os.scandir(DIRECTORY / host) as entries:
        empty = [Path(file) for file in entries if file.name.startswith(f"{orchestrator}.") and not file.stat().st_size]
    for path in empty:
        fd = files.try_lock(path, create=False)
        if fd is None:
            continue
        try:
            if not os.fstat(fd).st_size:
                path.unlink()
        finally:
            os.close(fd)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def remembered(host: str, orchestrator: str) -> dict[str, str]:
    """Return the names that are remembered of workloads, by id."""
    prefix = f"{orchestrator}."
    found = {}
    with suppress(FileNotFoundError), os.scandir(DIRECTORY / host) as entries:
        for file in entries:
            if file.name.startswith(prefix):
                with suppress(OSError):  # such as one that has just gone
                    status = file.stat(follow_symlinks=False)
                    name = _read_once(file.path, (status.st_ino, status.st_size, status.st_mtime_ns))
                    found[_id(orchestrator, file.name[len(prefix) :], name)] = name
    return {id: name for id, name in found.items() if id and name}


@lru_cache(maxsize=4096)
def _read_once(path: str, version: tuple[int, ...]) -> str:
    """Return the name that a lock remembers; for one version of the file, it is read once only."""
    return Path(path).read_text(errors="replace").partition("\0")[0]


def _names(host: str) -> list[str]:
    try:
        return [file.name for file in (DIRECTORY / host).iterdir()]
    except FileNotFoundError:
        return []


def _content_of(mark: Path) -> tuple[str, str, str]:
    try:
        return mark.read_text(errors="replace").partition("\0")
    except OSError:
        return ("", "", "")


def _id(orchestrator: str, part: str, name: str) -> str:
    """Return the id of the workload that a part of a file's name stands for; a long one's is the hash of its path."""
    return name.replace("/", "-") if orchestrator == "namespace" and not part.startswith("-") else part
