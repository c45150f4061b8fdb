"""A server on loopback, or at a Unix socket, whose answers a test writes byte by byte: also those of no real server."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Callable

Answer = Callable[["Client", str], None]
"""Answers a request, whose first line, such as `GET /version`, is passed. Then the connection ends."""

OK = b"HTTP/1.1 200 OK\r\nX-Etcd-Index: 5\r\nContent-Type: application/json\r\nConnection: close\r\n"


def answer(body: bytes, head: bytes = OK) -> bytes:
    """Return a whole and proper answer."""
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


class Client:
    """The connection of a client, until it or the test has ended."""

    def __init__(self, connection: socket.socket, ended: threading.Event) -> None:
        self._connection = connection
        self._ended = ended
        self.body = b""
        """What the client has sent after the headers."""
        self.sent = 0
        """Bytes that the client, or the kernel on its behalf, has taken."""

    def send(self, data: bytes) -> None:
        self._connection.sendall(data)
        self.sent += len(data)

    def drip(self, data: bytes, pause: float = 0.05) -> None:
        """Send a byte at a time, each long before a timeout."""
        for byte in data:
            self.send(bytes([byte]))
            if self._ended.wait(max(0, pause)):
                return

    def flood(self, data: bytes) -> None:
        """Send the same without an end."""
        while not self._ended.is_set():
            self.send(data)

    def hold(self) -> None:
        """Send nothing, until the client has gone."""
        self._connection.settimeout(0.05)
        while not self._ended.is_set():
            with suppress(socket.timeout):
                if not self._connection.recv(2**16):
                    return


class Server:
    """Answers every request by `answers`, and has all of them in `requests`."""

    def __init__(self, listener: socket.socket, answers: Answer) -> None:
        self.answers = answers
        self.requests: list[str] = []
        self.sent: list[int] = []
        """How many bytes of each answer were sent, for those whose connections have ended."""
        self.ended = threading.Event()
        self._listener = listener
        self._threads: list[threading.Thread] = []

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def serve(self) -> None:
        while not self.ended.is_set():
            with suppress(socket.timeout):
                connection, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve_one, args=(connection,), daemon=True)
                thread.start()
                self._threads.append(thread)

    def _serve_one(self, connection: socket.socket) -> None:
        client = Client(connection, self.ended)
        with connection, suppress(OSError):
            request, length = b"", 0
            while b"\r\n\r\n" not in request or len(client.body) < length:
                part = connection.recv(2**16)
                if not part:
                    return
                request += part
                head, _, client.body = request.partition(b"\r\n\r\n")
                found = re.search(rb"(?i)content-length: (\d+)", head)
                length = int(found[1]) if found else 0
            line = request.split(b" HTTP/")[0].decode()
            self.requests.append(line)
            self.answers(client, line)
        self.sent.append(client.sent)

    def join(self) -> None:
        self.ended.set()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


@contextmanager
def serving(answers: Answer, path: str | None = None) -> Iterator[Server]:
    """Run a server on a free port of 127.0.0.1, or at the path of a Unix socket."""
    with socket.socket(socket.AF_INET if path is None else socket.AF_UNIX) as listener:
        listener.bind(("127.0.0.1", 0) if path is None else path)
        listener.listen(20)
        listener.settimeout(0.05)
        server = Server(listener, answers)
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.join()
            thread.join(10)
