"""One lock a workload, so that only one command, or the agent, changes it at a time.

The locks are files under /run/calico/<host name>/, held with flock(2), so a process that dies lets go. While a workload
is connected, its lock file holds its name: that of a Docker container, by which it can be found when Docker has
forgotten it, or the path of a namespace, which cannot be told from the workload's id.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from pathlib import Path

from calicoctl.errors import CalicoError, Conflict

DIRECTORY = Path("/run/calico")

PATIENCE = 30.0
"""Seconds to wait for a lock that somebody else holds."""


class WorkloadLock:
    """Held inside `with`. A file that remembers no name is removed on leaving."""

    def __init__(self, host: str, orchestrator: str, workload: str) -> None:
        self._directory = DIRECTORY / host
        name = f"{orchestrator}.{workload}"
        if len(os.fsencode(name)) > 200:
            name = f"{orchestrator}.{hashlib.sha256(os.fsencode(workload)).hexdigest()}"
        self._path = self._directory / name
        self._fd = -1

    def __enter__(self) -> WorkloadLock:
        """Wait for the lock; raise Conflict after PATIENCE seconds."""
        give_up = time.monotonic() + PATIENCE
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            while not self._acquired():
                if time.monotonic() > give_up:
                    raise Conflict(
                        f"another command has been working on this workload for {PATIENCE:.0f} s ({self._path} is "
                        "locked); try again when it is done"
                    )
                time.sleep(0.02)  # flock(2) waits for ever or not at all
        except OSError as error:
            raise CalicoError(f"cannot lock {self._path}: {error.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        if os.fstat(self._fd).st_size == 0:
            self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def remember(self, name: str) -> None:
        """Keep the workload's name until it is forgotten."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, name.encode(), 0)

    def name(self) -> str:
        """Return what is remembered, or an empty text."""
        return os.pread(self._fd, 2**16, 0).decode(errors="replace")

    def forget(self) -> None:
        os.ftruncate(self._fd, 0)

    def _acquired(self) -> bool:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the holder before us may have removed the file: then somebody else may hold a new one
            if os.fstat(fd).st_ino == os.stat(self._path).st_ino:
                self._fd = fd
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(fd)
        return False


def remembered(host: str, orchestrator: str, name: str) -> str | None:
    """Return the id of the workload that was connected under `name` last, or None."""
    prefix = orchestrator + "."
    try:
        files = sorted((DIRECTORY / host).glob(f"{prefix}*"), key=lambda file: file.stat().st_mtime, reverse=True)
        return next((file.name[len(prefix) :] for file in files if file.read_text() == name), None)
    except OSError:
        return None  # nobody but root may look there
