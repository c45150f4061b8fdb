"""What the thread that runs BIRD waits for: its process's end, a request of the agent's, and news in BIRD's log.

BIRD writes into its log when the state of a session changes. That is sooner known, and cheaper, than by asking for the
sessions again and again; and BIRD itself has to be woken then. Its loop (2.0.12, sysdep/unix/io.c) looks for work
before it runs timers and long tasks, so that what these leave to do, such as telling a new peer the routes, waits for
up to three seconds until something arrives on a socket, be it a request on the control socket.
"""

from __future__ import annotations

import ctypes
import os
import select
from contextlib import ExitStack, suppress
from pathlib import Path

_IN_MODIFY = 0x2
"""Source: sys/inotify.h."""


class Wakeups:
    """Waits for these three, or for the first two if there is no inotify(7), of which a user has a limited number."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._inotify: int = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)

    def request(self) -> None:
        """End the present `wait`, or else the next one; may be called by another thread."""
        with suppress(BlockingIOError):  # the pipe is full of requests
            os.write(self._writer, b"x")

    def follow(self, folder: Path) -> None:
        """Wait for news in the files of a folder from now on."""
        if self._inotify >= 0:
            self._libc.inotify_add_watch(self._inotify, os.fsencode(folder), _IN_MODIFY)

    def wait(self, pid: int | None, seconds: float) -> bool:
        """Wait for so long at most, also for the end of a process; return whether there is news in the log."""
        with ExitStack() as stack:
            watched = [self._reader, *([self._inotify] if self._inotify >= 0 else [])]
            if pid is not None:
                try:
                    fd = os.pidfd_open(pid)
                except OSError:  # it has just ended
                    return False
                stack.callback(os.close, fd)
                watched.append(fd)
            ready, _, _ = select.select(watched, [], [], max(0.0, seconds))
        if self._reader in ready:
            os.read(self._reader, 2**16)
        if self._inotify not in ready:
            return False
        with suppress(BlockingIOError):
            os.read(self._inotify, 2**16)
        return True
