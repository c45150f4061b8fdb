"""Locks workloads, so that only one process, a command or the agent, changes a workload at a time.

A lock is a flock(2) on a file in /run/calico/HOST. While a workload is being changed, a second file exists beside the
lock file: the mark. If the mark exists while the lock is free, the change was interrupted, for example by `kill -9`, or
its rollback failed. The mark contains the workload's id and, for a container whose name is known, the name.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from calicoctl import files
from calicoctl.errors import CalicoError, Conflict
from calicoctl.workloads.connected import file_name, id_of

DIRECTORY = files.RUN

PATIENCE = 30.0
"""Seconds to wait for a lock that another process holds."""

_MARK = "unfinished."
"""The prefix of a mark's file name. The name of the lock file follows it."""


class WorkloadLock:
    """The lock of a workload, held inside `with`. The lock file is removed when the lock is released.

    `interrupted` says whether an earlier change was interrupted: it is True if the mark existed when the lock was
    acquired, until `clear_all` is called.
    """

    def __init__(self, host: str, orchestrator: str, workload: str, patience: float | None = None) -> None:
        """`workload` is the workload's id. If the lock is held, `with` waits for it up to `patience` seconds.

        If `patience` is None, it waits up to PATIENCE seconds.
        """
        self._directory = DIRECTORY / host
        self._workload = workload
        name = f"{orchestrator}.{file_name(workload)}"
        self.path = self._directory / name
        self.mark = self._directory / f"{_MARK}{name}"
        self._patience = PATIENCE if patience is None else patience
        self._fd = -1
        self.interrupted = False

    def __enter__(self) -> WorkloadLock:
        """Acquire the lock. Raises CalicoError if the lock file cannot be used.

        Raises Conflict if the lock is still held when the seconds to wait are over.
        """
        held = Conflict(
            f"another command has been working on this workload for {self._patience or PATIENCE:.0f} s ({self.path} is "
            "locked); try again when it is done"
        )
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = files.lock_within(self.path, self._patience, held)
            self.interrupted = self.mark.exists()
        except OSError as error:
            raise CalicoError(f"cannot lock {self.path}: {error.strerror}") from None
        except BaseException:  # the command was interrupted, perhaps when the file had been created
            if self._fd != -1:
                self.__exit__()
            else:
                _remove_if_stale(self.path)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._fd)

    def mark_in_progress(self, name: str = "") -> None:
        """Write the mark. `name` is the container's name, empty if it is not known. Raises CalicoError."""
        try:
            with open(self.mark, "w", opener=_no_link) as mark:
                mark.write("\0".join([self._workload, name] if name else [self._workload]))
        except OSError as error:
            raise CalicoError(f"cannot write {self.mark}: {error.strerror}") from None

    def clear_mark(self) -> None:
        """Remove the mark, unless `interrupted` is True: then it stays, as the mark of the earlier change."""
        if not self.interrupted:
            self.mark.unlink(missing_ok=True)

    def clear_all(self) -> None:
        """Remove the mark, even if `interrupted` is True, and set `interrupted` to False.

        If an earlier change was interrupted, the caller must have completed it, or rolled it back.
        """
        self.mark.unlink(missing_ok=True)
        self.interrupted = False


def exists(host: str, orchestrator: str, workload: str) -> bool:
    """Return whether a workload has a lock file, even if nobody holds the lock, or a mark."""
    lock = WorkloadLock(host, orchestrator, workload)
    return lock.path.exists() or lock.mark.exists()


def interrupted(host: str, orchestrator: str) -> list[str]:
    """Return the ids of an orchestrator's workloads that have a mark."""
    # the content of a mark is the id, unless writing the mark itself was interrupted
    return [content[0] or id for id, content in _marks(host, orchestrator)]


def interrupted_named(host: str, orchestrator: str, name: str) -> set[str]:
    """Return the ids of the containers whose marks contain the container's name `name`.

    Only root can read the marks; for other users, the result is empty.
    """
    with suppress(PermissionError):
        return {content[0] for _, content in _marks(host, orchestrator) if content[2] == name}
    return set()


def _marks(host: str, orchestrator: str) -> list[tuple[str, tuple[str, str, str]]]:
    """Return, for each mark, the part of its file name that is derived from the workload's id, and its content.

    The content is a tuple: the workload's id, a NUL, and the container's name. If the mark contains no name, the last
    two are empty; if the mark cannot be read, all three.
    """
    prefix = f"{_MARK}{orchestrator}."
    names = [name for name in _names(host) if name.startswith(prefix)]
    return [(name[len(prefix) :], _content_of(DIRECTORY / host / name)) for name in names]


def remove_stale(host: str, orchestrator: str) -> None:
    """Remove the lock files of an orchestrator's workloads that are empty, and whose lock no process holds.

    Killed commands leave such files. A lock file that is not empty was written by an older version.
    """
    empty: list[Path] = []
    with suppress(FileNotFoundError), os.scandir(DIRECTORY / host) as entries:
        empty = [Path(file) for file in entries if file.name.startswith(f"{orchestrator}.") and not file.stat().st_size]
    for path in empty:
        _remove_if_stale(path)


def _remove_if_stale(path: Path) -> None:
    fd = files.try_lock(path, create=False)
    if fd is None:
        return
    try:
        if not os.fstat(fd).st_size:
            path.unlink()
    finally:
        os.close(fd)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def paths_of_older_version(host: str, orchestrator: str) -> dict[str, str]:
    """Return the paths of namespaces that an older version of this program stored in lock files, by workload id."""
    prefix = f"{orchestrator}."
    found = {}
    for name in _names(host):
        if name.startswith(prefix):
            path = _content_of(DIRECTORY / host / name)[0]
            found[id_of(name[len(prefix) :], path)] = path
    return {id: path for id, path in found.items() if path.startswith("/")}


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
