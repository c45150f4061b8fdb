"""Bounds of answers over HTTP, those of the store and of the Docker Engine: how long they take, and how large they are.

http.client and urllib3 bound the time until the next byte only: a server that sends a byte a second keeps a request for
ever, and one that never ends its body, a header or a chunk fills the memory. So, inside `bounded`, all that is read
from a connection is counted, whatever part of an answer it is. Knows nothing of what the answers contain.
"""

from __future__ import annotations

import http.client
import io
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Callable

MiB = 2**20

SLOWEST = 64 * 1024
"""Bytes a second that an answer must come at, on average, after its first byte."""

LONGEST = 60.0
"""Seconds that an answer may take in all."""


class Refused(http.client.HTTPException):
    """An answer is not read to its end: it is too large, or encoded in a way that was not asked for."""


class TooLarge(Refused):
    """An answer is larger than its bound."""


class Bounds:
    """What an answer may take: `size` is in bytes, with its headers.

    Its first byte must come within the timeout of the request, the others at SLOWEST, and the last one within LONGEST.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        # weak, since the file refers to these bounds: Python 3.13 complains of an answer that is left to its collector
        self._file: Callable[[], io.BufferedReader | None] = lambda: None
        self.renew(None)

    def attach(self, sock: Any) -> io.BufferedReader:
        """Return the file of an answer that begins to arrive at a socket, whose timeout is that of the request."""
        file = _CountedReader(_CountedFile(sock, self), self)
        self._file = weakref.ref(file)
        self.renew(sock.gettimeout())
        return file

    def renew(self, seconds: float | None) -> None:
        """Count anew from here: what follows of the answer must begin within `seconds`; None: it may begin any time."""
        self._seconds = seconds
        self._began = time.monotonic()
        self._received = 0

    def wait(self, seconds: float) -> bool:
        """Wait until more of an answer has arrived, or its end; return whether it has within `seconds`.

        The connection stays as it is; what arrives has the bounds of a new answer.
        """
        timeout = self._seconds
        self.renew(seconds)
        try:
            file = self._file()
            if file is not None:
                file.peek(1)
        except socket.timeout:
            return False
        self.renew(timeout)
        return True

    def left(self) -> float | None:
        """Return the seconds until the next byte is too late, None if it never is; raise socket.timeout if it is."""
        if self._seconds is None:
            return None
        left = self._began + min(LONGEST, self._seconds + self._received / SLOWEST) - time.monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        return left

    def count(self, received: int) -> None:
        """Add bytes that were received; raise Refused if they are too many."""
        self._received += received
        if self._received > self.size:
            raise TooLarge(f"the answer is larger than {self.size // 1024} KiB")


_bounds = threading.local()


@contextmanager
def bounded(size: int) -> Iterator[Bounds]:
    """Bound each answer that urllib3 gets in this thread, inside `with`, for itself; the innermost bounds hold.

    Exceeding them fails as other faults of a connection do, by a timeout or an http.client.HTTPException, which urllib3
    and requests convert to their own.
    """
    from urllib3.connection import HTTPConnection

    HTTPConnection.response_class = _Answer  # docker's connections derive from it
    before = getattr(_bounds, "now", None)
    _bounds.now = bounds = Bounds(size)
    try:
        yield bounds
    finally:
        _bounds.now = before


class _Answer(http.client.HTTPResponse):
    """An answer with the bounds of the thread that reads it, if it has any."""

    def __init__(self, sock: Any, *arguments: Any, **options: Any) -> None:
        self._bounds: Bounds | None = getattr(_bounds, "now", None)
        counted: Any = sock if self._bounds is None else _Counted(sock, self._bounds)
        super().__init__(counted, *arguments, **options)

    def begin(self) -> None:
        super().begin()
        # urllib3 and requests would decode it: some kilobytes can become gigabytes
        if self._bounds is not None and self.getheader("Content-Encoding", "identity").lower() != "identity":
            raise Refused("the answer is encoded, which was not asked for")


class _Counted:
    """A socket as http.client.HTTPResponse uses it: all that is read from its file is counted."""

    def __init__(self, sock: Any, bounds: Bounds) -> None:
        self._socket = sock
        self._bounds = bounds

    def makefile(self, mode: str) -> io.BufferedReader:
        return self._bounds.attach(self._socket)


class _CountedReader(io.BufferedReader):
    """Buffers a _CountedFile. It does not allocate what a server says that it will send, only what may come."""

    def __init__(self, file: _CountedFile, bounds: Bounds) -> None:
        super().__init__(file)
        self._bounds = bounds

    def read(self, size: int | None = -1) -> bytes:
        return super().read(size if size is None else min(size, self._bounds.size + 1))


class _CountedFile(io.RawIOBase):
    """What comes from a socket. Unlike socket.SocketIO, it can be read again after a timeout."""

    def __init__(self, sock: Any, bounds: Bounds) -> None:
        self.sock = sock  # by this name, docker-py closes it
        self._timeout = sock.gettimeout()
        self._open = sock.makefile("rb", buffering=0)  # the socket stays open as long as this is
        self._bounds = bounds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sock.settimeout(self._bounds.left())
        count = int(self.sock.recv_into(buffer))
        self._bounds.count(count)
        return count

    def close(self) -> None:
        if not self.closed:
            with suppress(OSError):  # it may be closed already
                self.sock.settimeout(self._timeout)  # the next request may use it
            self._open.close()
        super().close()
