"""Bounds the time and the size of HTTP answers, from the store and from the Docker Engine.

http.client and urllib3 bound the time until the next byte only: a server that sends a byte a second keeps a request for
ever, and a server that never ends a body, a header or a chunk fills the memory. So, inside `bounded`, all bytes that
are read from a connection are counted, whatever part of an answer they are. The content of answers is not checked here.
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
"""The least average rate of an answer after its first byte, in bytes a second."""

LONGEST = 60.0
"""The longest time for a whole answer, in seconds."""


class Refused(http.client.HTTPException):
    """An answer is not read to its end: it is too large, or has a content encoding that was not requested."""


class TooLarge(Refused):
    """An answer is larger than its bound."""


class Bounds:
    """The bounds of one answer: `size` is the most bytes, headers included.

    The first byte must arrive within the timeout of the request, the others at an average rate of at least SLOWEST, and
    the last one within LONGEST.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        # weak, since the file refers to these bounds: Python 3.13 complains of an answer that is left to its collector
        self._file: Callable[[], io.BufferedReader | None] = lambda: None
        self.renew(None)

    def attach(self, sock: Any) -> io.BufferedReader:
        """Return a file from which to read the next answer on a socket. Counts bytes and time anew.

        The answer must begin within the socket's timeout.
        """
        file = _CountedReader(_CountedFile(sock, self), self)
        self._file = weakref.ref(file)
        self.renew(sock.gettimeout())
        return file

    def renew(self, seconds: float | None) -> None:
        """Count bytes and time anew: the rest of the answer must begin within `seconds`. None: any time may pass."""
        self._seconds = seconds
        self._began = time.monotonic()
        self._received = 0

    def wait(self, seconds: float) -> bool:
        """Wait until more of the answer, or its end, has arrived; return False if neither has within `seconds`.

        After False, the answer can still be read. Bytes and time are counted anew.
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
        """Return the seconds within which the next byte must arrive; None if time is not bounded.

        Raises socket.timeout if no time is left.
        """
        if self._seconds is None:
            return None
        left = self._began + min(LONGEST, self._seconds + self._received / SLOWEST) - time.monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        return left

    def count(self, received: int) -> None:
        """Add the number of bytes `received`; raise TooLarge if the answer now has more than `size` bytes."""
        self._received += received
        if self._received > self.size:
            raise TooLarge(f"the answer is larger than {self.size // 1024} KiB")


_bounds = threading.local()


@contextmanager
def bounded(size: int) -> Iterator[Bounds]:
    """Inside `with`, bound each answer that urllib3 gets in this thread; see `bounded_here`.

    Yields the Bounds, which all these answers share, one after another. If `bounded` is nested, only the innermost
    bounds hold. urllib3 and requests convert what an answer beyond the bounds raises to their own exceptions.
    """
    from urllib3.connection import HTTPConnection

    HTTPConnection.response_class = Answer  # docker's connections derive from it
    with bounded_here(size) as bounds:
        yield bounds


@contextmanager
def bounded_here(size: int) -> Iterator[Bounds]:
    """Inside `with`, bound each `Answer` of this thread to `size` bytes, and to the times of Bounds.

    Nested, only the innermost bounds hold. An answer beyond the bounds fails like a broken connection, with a timeout
    or an http.client.HTTPException.
    """
    before = getattr(_bounds, "now", None)
    _bounds.now = bounds = Bounds(size)
    try:
        yield bounds
    finally:
        _bounds.now = before


class Answer(http.client.HTTPResponse):
    """An answer with the bounds of the thread that reads it, if it has any: a `response_class` of connections."""

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
    """Buffers a _CountedFile. Allocates at most the bound of the answer, whatever length the server announces."""

    def __init__(self, file: _CountedFile, bounds: Bounds) -> None:
        super().__init__(file)
        self._bounds = bounds

    def read(self, size: int | None = -1) -> bytes:
        return super().read(size if size is None else min(size, self._bounds.size + 1))


class _CountedFile(io.RawIOBase):
    """The bytes from a socket, as a file that counts them. Unlike socket.SocketIO, it can be read after a timeout."""

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
