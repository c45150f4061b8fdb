"""Bounds the time and the size of HTTP answers, from the store and from the Docker Engine.

http.client and urllib3 bound only the time until the next byte, so a server could keep a request waiting for ever, or
fill the memory. Inside `bounded` and `bounded_here`, all bytes read from a connection are counted, headers and chunk
headers included. The content of answers is not checked here, except for its encoding and, by `parsed`, for the number
of its elements.
"""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Callable

MiB = 2**20

SLOWEST = 64 * 1024
"""The minimum average rate of an answer after its first byte, in bytes per second."""

LONGEST = 60.0
"""The maximum time for a whole answer, in seconds."""

ELEMENTS = 2**20
"""The maximum number of elements in the JSON of an answer: of objects and lists, and of commas, outside of strings.

Each element may take up to some 200 bytes of memory, but only two or three bytes of the answer.
"""

PART = 2**16
"""The maximum number of bytes that `Lines` reads at once. It bounds what is kept beyond one line."""


class Refused(http.client.HTTPException):
    """An answer was not read completely, since it is too large, or has a content encoding."""


class TooLarge(Refused):
    """An answer is larger than its bound."""


class Bounds:
    """The bounds of an answer: it may have at most `size` bytes, headers included, and take as long as `left` allows.

    One object can bound several answers that are read one after another.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        # weak, since the file refers to these bounds: Python 3.13 complains of an answer that is left to its collector
        self._file: Callable[[], io.BufferedReader | None] = lambda: None
        self.answer: Callable[[], Answer | None] = lambda: None
        """Returns the last answer that these bounds apply to; None if there is none, or nothing refers to it now."""
        self.renew(None)

    def attach(self, sock: Any) -> io.BufferedReader:
        """Return a file that reads the next answer from a socket; the bounds now apply to this answer.

        The answer must begin within the socket's timeout. If the socket has no timeout, time is not bounded.
        """
        file = _CountedReader(_CountedFile(sock, self), self)
        self._file = weakref.ref(file)
        self.renew(sock.gettimeout())
        return file

    def renew(self, seconds: float | None) -> None:
        """Begin to count bytes and time anew: the next byte must arrive within `seconds`, as `left` describes.

        If `seconds` is None, time is not bounded.
        """
        self._seconds = seconds
        self._began = time.monotonic()
        self._received = 0

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds` until there is a byte to read, or the answer ends; return False if neither happens.

        Bytes and time are counted anew. After True, the `seconds` of the last call of `renew` apply again, from now on.
        After False, no time is left: call `wait` or `renew` before the answer is read on. Raises OSError or
        HTTPException if the answer cannot be read.
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

        From the last `renew` on, an answer may take the `seconds` of that call, plus one second for each SLOWEST bytes
        that have been received since then, but never more than LONGEST. Raises socket.timeout if no time is left.
        """
        if self._seconds is None:
            return None
        left = self._began + min(LONGEST, self._seconds + self._received / SLOWEST) - time.monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        return left

    def count(self, received: int) -> None:
        """Count `received` more bytes; raise TooLarge if there are now more than `size`."""
        self._received += received
        if self._received > self.size:
            raise TooLarge(f"the answer is larger than {self.size // 1024} KiB")


_scan_string: Any = json.decoder.scanstring  # type: ignore[attr-defined]
"""The C function of the module json that finds the end of a JSON string."""


def parsed(content: str | bytes) -> Any:
    """Return the value of a JSON text. Raise ValueError if it is no JSON, or has more than ELEMENTS elements.

    Raises RecursionError if it is nested too deeply.
    """
    text = content if isinstance(content, str) else content.decode()
    check_elements(text)
    return json.loads(text)


def check_elements(text: str) -> None:
    """Raise ValueError if a JSON text has more than ELEMENTS elements, or, in some cases, if it is no JSON."""
    if _elements(text, 0, len(text)) <= ELEMENTS:  # also those in strings: fast, and true of nearly all answers
        return
    count = position = 0
    while position < len(text):
        quote = text.find('"', position)
        end = quote if quote >= 0 else len(text)
        count += _elements(text, position, end)
        if count > ELEMENTS:
            raise ValueError(f"an answer with more than {ELEMENTS} elements")
        position = _scan_string(text, end + 1, True)[1] if quote >= 0 else end


def _elements(text: str, begin: int, end: int) -> int:
    return sum(text.count(mark, begin, end) for mark in ",[{")


_bounds = threading.local()


@contextmanager
def bounded(size: int) -> Iterator[Bounds]:
    """Bound each answer that urllib3 receives in this thread inside `with`; see `bounded_here`.

    urllib3 and requests convert the exceptions of `bounded_here` to their own.
    """
    from urllib3.connection import HTTPConnection

    HTTPConnection.response_class = Answer  # docker's connections derive from it
    with bounded_here(size) as bounds:
        yield bounds


@contextmanager
def bounded_here(size: int) -> Iterator[Bounds]:
    """Bound the size, to `size` bytes, and the time of each `Answer` that this thread creates inside `with`.

    Yields the Bounds, which all these answers share, so they must be read one after another. If `with` statements are
    nested, only the innermost bounds apply. Reading an answer raises socket.timeout if it takes too long, TooLarge if
    it is too large, and Refused if it has a content encoding.
    """
    before = getattr(_bounds, "now", None)
    _bounds.now = bounds = Bounds(size)
    try:
        yield bounds
    finally:
        _bounds.now = before


class Answer(http.client.HTTPResponse):
    """An HTTP answer, which is bounded if it is created inside `bounded_here` or `bounded`.

    Connections of http.client and urllib3 create such answers if their attribute `response_class` is this class.
    """

    def __init__(self, sock: Any, *arguments: Any, **options: Any) -> None:
        self._bounds: Bounds | None = getattr(_bounds, "now", None)
        counted: Any = sock if self._bounds is None else _Counted(sock, self._bounds)
        super().__init__(counted, *arguments, **options)
        if self._bounds is not None:
            self._bounds.answer = weakref.ref(self)

    def begin(self) -> None:
        super().begin()
        # urllib3 and requests would decode it: some kilobytes can become gigabytes
        if self._bounds is not None and self.getheader("Content-Encoding", "identity").lower() != "identity":
            raise Refused("the answer is encoded, which was not asked for")


class _Counted:
    """Stands for a socket in http.client.HTTPResponse, which only calls `makefile`."""

    def __init__(self, sock: Any, bounds: Bounds) -> None:
        self._socket = sock
        self._bounds = bounds

    def makefile(self, mode: str) -> io.BufferedReader:
        return self._bounds.attach(self._socket)


class _CountedReader(io.BufferedReader):
    """A buffered reader of a _CountedFile. `read(size)` allocates at most one byte more than an answer may have."""

    def __init__(self, file: _CountedFile, bounds: Bounds) -> None:
        super().__init__(file)
        self._bounds = bounds

    def read(self, size: int | None = -1) -> bytes:
        # the byte beyond the bound is what raises TooLarge
        return super().read(size if size is None else min(size, self._bounds.size + 1))


class _CountedFile(io.RawIOBase):
    """A raw file that counts the bytes read from a socket. Unlike socket.SocketIO, it can be read after a timeout."""

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


class Lines:
    """The lines of an answer that may never end, such as a watch: each can be read as soon as it has arrived."""

    def __init__(self, bounds: Bounds, timeout: float) -> None:
        """The answer is the last one that `bounds` apply to. From now on, they apply to each of its lines by itself.

        A line that has begun must go on within `timeout` seconds, as Bounds.left describes. Raises ValueError if there
        is no such answer.
        """
        answer = bounds.answer()
        if answer is None:
            raise ValueError("there is no answer")
        self._answer = answer
        self._bounds = bounds
        self._timeout = timeout
        self._rest = b""
        """What was read of the next line, and of those that follow: at most PART bytes."""
        self._left = 0
        """The number of bytes of the current chunk that were not read yet."""

    def next(self, seconds: float) -> bytes | None:
        """Return the next line without its end, None if none begins within `seconds`.

        Raises OSError or HTTPException if the answer has ended, or if the line is too large or does not end in time.
        """
        if self._answer.isclosed():
            raise ConnectionError("the stream was ended")
        if not self._rest and not self._bounds.wait(max(seconds, 0.001)):
            return None
        self._bounds.renew(self._timeout)
        parts = [self._rest]
        while b"\n" not in parts[-1]:
            parts.append(self._part())
        parts[-1], _, self._rest = parts[-1].partition(b"\n")
        return b"".join(parts)

    def _part(self) -> bytes:
        """Return the next bytes of the answer, at most PART. Raises OSError or HTTPException, also at its end."""
        # http.client leaves the end of a chunk unread, which would look like the beginning of the next line
        file: Any = self._answer.fp
        if not self._answer.chunked:
            part = self._answer.read1(PART)
        else:
            if not self._left:
                with suppress(ValueError):
                    self._left = max(0, int(file.readline(100).partition(b";")[0], 16))
            size = min(self._left, PART)
            part = file.read(size)
            self._left -= size
            if len(part) < size or (not self._left and file.read(2) != b"\r\n"):
                part = b""
        if not part:
            raise ConnectionError("the stream was ended")
        return bytes(part)
