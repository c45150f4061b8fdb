"""Lets the thread that runs BIRD wait for three events: BIRD ends, the agent requests something, or BIRD's log changes.

BIRD logs each change of a session's state, so the thread need not poll BIRD often.

After a change of the log, the thread must wake BIRD by connecting to its control socket. BIRD's main loop (version
2.0.12, sysdep/unix/io.c) checks for pending work before it runs timers and long tasks. If a timer or a long task adds
work, such as sending the routes to a new peer, that work would wait for up to three seconds if BIRD were not woken.
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
    """Waits for BIRD's end, for requests, and for changes of BIRD's log.

    If the limit of inotify(7) instances is reached, changes of the log are not noticed.
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._inotify: int = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)

    def request(self) -> None:
        """End the current `wait` or, if none is in progress, the next one. Another thread may call this."""
        with suppress(BlockingIOError):  # the pipe is full of requests
            os.write(self._writer, b"x")

    def follow(self, folder: Path) -> None:
        """Watch a folder: from now on, `wait` also ends if a file in the folder changes."""
        if self._inotify >= 0:
            self._libc.inotify_add_watch(self._inotify, os.fsencode(folder), _IN_MODIFY)

    def wait(self, pid: int | None, seconds: float) -> bool:
        """Wait until `request` is called, a file in the watched folder changes, or the process `pid` ends.

        Waits for `seconds` at most. With None as `pid`, no process is waited for. Returns True if a file in the folder
        has changed, and False in all other cases.
        """
        poll = select.poll()  # select(2) does not support descriptors above 1023
        poll.register(self._reader, select.POLLIN)
        if self._inotify >= 0:
            poll.register(self._inotify, select.POLLIN)
        with ExitStack() as stack:
            if pid is not None:
                try:
                    fd = os.pidfd_open(pid)
                except ProcessLookupError:  # it has just ended
                    return False
                except OSError:  # too many open files: the end is noticed later
                    pass
                else:
                    stack.callback(os.close, fd)
                    poll.register(fd, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(max(0.0, seconds) * 1000)}
        if self._reader in ready:
            os.read(self._reader, 2**16)
        if self._inotify not in ready:
            return False
        with suppress(BlockingIOError):
            os.read(self._inotify, 2**16)
        return True
