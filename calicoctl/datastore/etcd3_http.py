"""HTTP connections to the members of an etcd cluster, for the JSON gateway of etcd's v3 API.

Responsible for sockets, TLS, tokens, bounds of answers, and for what an error means: that a request was not sent, that
its outcome is unknown, or that etcd refused it. What requests are about is the business of etcd3.py and etcd3_watch.py.
Redirects are not followed: etcd sends none, and another server could redirect a request anywhere.

Sources: https://github.com/etcd-io/etcd/blob/release-3.4/Documentation/dev-guide/api_grpc_gateway.md, and
etcdserver/api/v3rpc/rpctypes/error.go there; the codes are those of
https://github.com/grpc/grpc/blob/master/doc/statuscodes.md.
"""

from __future__ import annotations

import http.client
import json
import select
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Callable, Optional, TypeVar

from calicoctl import answers
from calicoctl.datastore import last_known
from calicoctl.datastore.members import ConnectionLost, NotSent, Unanswered, why
from calicoctl.datastore.settings import EtcdSettings, Member
from calicoctl.errors import StoreError, StoreUnavailable, is_shortage

if TYPE_CHECKING:
    import ssl

T = TypeVar("T")

READ_TIMEOUT = 4.0
"""Seconds to wait for one member's answer. A command waits for a hanging member only once, then asks it last."""

LARGEST = 16 * answers.MiB
"""The largest answer, in bytes. etcd's own limit for a value is 1.5 MiB, which are 2 MiB in JSON; it can be raised."""

INVALID_ARGUMENT, NOT_FOUND, PERMISSION_DENIED, RESOURCE_EXHAUSTED = 3, 5, 7, 8
FAILED_PRECONDITION, OUT_OF_RANGE, UNIMPLEMENTED, UNAVAILABLE, DATA_LOSS, UNAUTHENTICATED = 9, 11, 12, 14, 15, 16

_REFUSALS = {
    *(INVALID_ARGUMENT, NOT_FOUND, PERMISSION_DENIED, RESOURCE_EXHAUSTED),
    *(FAILED_PRECONDITION, OUT_OF_RANGE, UNIMPLEMENTED, DATA_LOSS, UNAUTHENTICATED),
}
"""The codes with which etcd says that it did not do what was asked, and will not. With any other, it may have done it,
or may do it when it is asked again: a write without a quorum, for example, has code 2 in etcd 3.4, and 4 in 3.5."""

_BUSY = "too many requests"
"""A RESOURCE_EXHAUSTED that passes by itself."""

_BAD_HANDSHAKE = "authentication handshake failed"
"""The gateway connects to its own member by TLS. This part of an UNAVAILABLE says that it never can."""

_GARBLED = (
    "SSLError",
    "SSLEOFError",
    "SSLZeroReturnError",
    "RemoteDisconnected",
    "ConnectionResetError",
    "BadStatusLine",
)
"""The errors with which requests fail at a server that speaks another protocol."""


class ErrorAnswer(Exception):
    """etcd refused a request, and has not applied it. `code` is gRPC's, `message` etcd's text."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    @property
    def is_about_token(self) -> bool:
        """Whether another token may help: it is missing, expired, older than a change of permissions, or forgotten."""
        return self.code == UNAUTHENTICATED or (
            self.code == INVALID_ARGUMENT and ("user name is empty" in self.message or "auth store" in self.message)
        )


Authorize = Callable[["Connection", Optional[str]], Optional[str]]
"""Returns the token for requests to the cluster of a connection, None to send none. The second argument is the token
that the member refused, "" if it refused a request without one, None before the first request. It may ask the member,
by `Connection.exchange`, and raise StoreError."""


class Connection:
    """A member: a connection that is kept for requests, and one of its own for each stream. Not thread-safe."""

    def __init__(self, settings: EtcdSettings, member: Member, authorize: Authorize | None = None) -> None:
        self.url = settings.url(member)
        self.token: str | None = None
        """The token that is sent with requests: what the header `Authorization` says."""
        self._settings = settings
        self._member = member
        self._authorize = authorize
        self._kept: socket.socket | None = None

    def post(self, path: str, body: dict[str, Any], seconds: float | None = None) -> dict[str, Any]:
        """Send a request with a token, if there is one, and return its answer: see `exchange`.

        If the token is refused, the request is sent again with another one.
        """
        return self._with_token(lambda: self.exchange("POST", path, body, seconds))

    def exchange(
        self, method: str, path: str, body: dict[str, Any] | None = None, seconds: float | None = None
    ) -> dict[str, Any]:
        """Send a request, and return the JSON object of its answer, which must begin within `seconds`.

        The default of `seconds` is READ_TIMEOUT. Raises what `fetch` raises, ErrorAnswer for a refusal, and StoreError
        for an answer that is not etcd's.
        """
        return self._parsed(*self.fetch(method, path, body, seconds))

    def fetch(
        self, method: str, path: str, body: dict[str, Any] | None = None, seconds: float | None = None
    ) -> tuple[int, bytes]:
        """Send a request as `exchange` does; return the status and the body of its answer, whatever they are.

        Raises NotSent, Unanswered or ConnectionLost (members.py) if there is no answer, and StoreUnavailable if this
        host lacks memory or file descriptors.
        """
        kept, self._kept = self._kept, None
        if kept is not None and _is_over(kept):
            kept.close()
            kept = None
        sock = kept or self._connect()
        try:
            sock.settimeout(READ_TIMEOUT if seconds is None else seconds)
            with (
                self.no_answer(),
                answers.bounded_here(LARGEST),
                closing(self._ask(sock, method, path, body)) as response,
            ):
                content = response.read()
        except BaseException:
            sock.close()
            raise
        if response.will_close:
            sock.close()
        else:
            self._kept = sock
        return response.status, content

    def stream(self, path: str, body: dict[str, Any], largest: int) -> Stream:
        """Send a request whose answer goes on and on; return it. Its messages have at most `largest` bytes each.

        Raises what `post` raises.
        """
        return self._with_token(lambda: self._stream(path, body, largest))

    def close(self) -> None:
        """Close the connection that is kept. The next request opens another one."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def _stream(self, path: str, body: dict[str, Any], largest: int) -> Stream:
        sock = self._connect()
        try:
            with self.no_answer(), answers.bounded_here(largest) as bounds:
                response = self._ask(sock, "POST", path, body)
                if response.status == 200:
                    return Stream(self, sock, response, bounds)
                with closing(response):
                    self._parsed(response.status, response.read())
            raise self.no_etcd(f"status {response.status}")
        except BaseException:
            sock.close()
            raise

    def _with_token(self, send: Callable[[], T]) -> T:
        if self._authorize is None:
            return send()
        if self.token is None:
            self.token = self._authorize(self, None)
        try:
            return send()
        except ErrorAnswer as error:
            if not error.is_about_token:
                raise
            refused, self.token = self.token, self._authorize(self, self.token or "")
            if self.token == refused:
                raise
        return send()

    def _connect(self) -> socket.socket:
        """Return a connection, with READ_TIMEOUT. Raises NotSent, and StoreUnavailable for want of descriptors."""
        name, port = self._member[0].strip("[]"), self._member[1]
        try:
            plain = last_known.connect(name, port, READ_TIMEOUT)
            try:
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return _tls(self._settings, plain, name) if self._settings.scheme == "https" else plain
            except BaseException:
                plain.close()
                raise
        except (OSError, UnicodeError, MemoryError) as error:
            if is_shortage(error):
                raise StoreUnavailable(f"etcd cannot be asked: {why(error)}") from error
            raise NotSent(f"{self.url} ({why(error)})", type(error).__name__ in _GARBLED) from error

    def _ask(self, sock: socket.socket, method: str, path: str, body: dict[str, Any] | None) -> answers.Answer:
        """Send a request, and return its answer, whose headers have been read. Raises OSError or HTTPException.

        All is sent at once: else the end of a TLS connection, if the server refuses the client's certificate, may be
        noticed by a second attempt to send, and not by the server's alert, which says why.
        """
        content = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {self._member[0]}:{self._member[1]}",
            "Accept-Encoding: identity",
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
            "Grpc-Metadata-hasleader: true",  # a member without a leader refuses the request at once
            *([] if self.token is None else [f"Authorization: {''.join(filter(str.isprintable, self.token))}"]),
        ]
        sock.sendall("\r\n".join([*lines, "", ""]).encode() + content)
        answer = answers.Answer(sock, method=method)
        try:
            answer.begin()
        except BaseException:
            answer.close()
            raise
        return answer

    @contextmanager
    def no_answer(self) -> Iterator[None]:
        """Convert what is raised while an answer is awaited."""
        try:
            yield
        except (http.client.HTTPException, OSError, MemoryError) as error:
            if is_shortage(error):
                raise StoreUnavailable(f"etcd cannot be asked: {why(error)}") from error
            kind = Unanswered if isinstance(error, socket.timeout) else ConnectionLost
            raise kind(f"{self.url} did not answer ({why(error)})", type(error).__name__ in _GARBLED) from error

    def _parsed(self, status: int, content: bytes) -> dict[str, Any]:
        """Return the JSON object of an answer with status 200; raise what another one means."""
        try:
            answer = json.loads(content)
            error = _error(answer)
            if status == 200 and error is None and isinstance(answer, dict):
                return answer
        except (RecursionError, ValueError):
            error = None
        if error is None:
            text = content[:1000].decode(errors="replace")
            if status == 404 and "not found" in text.lower():
                raise ErrorAnswer(UNIMPLEMENTED, text)
            if status in (500, 502, 503, 504):  # as proxies answer
                raise Unanswered(f"{self.url} says: {' '.join(text.split())[:120] or status}")
            if status == 400 and "CommonName" in text:
                raise StoreError(
                    f"etcd at {self.url} has users, and accepts no client certificate with a common name (CN) over "
                    "HTTP: use one without it (ETCD_CERT_FILE), and ETCD_USERNAME"
                )
            raise self.no_etcd(text if status == 200 else f"status {status}, {text}")
        raise self.meaning(*error)

    def meaning(self, code: int, message: str) -> Exception:
        """Return the exception for an error of etcd."""
        refused = code in _REFUSALS and _BUSY not in message
        if refused or _BAD_HANDSHAKE in message:
            return ErrorAnswer(code, message)
        return Unanswered(f"{self.url} says: {' '.join(message.split())[:300]}")

    def no_etcd(self, what: object) -> StoreError:
        """Return the error for an answer, or a part of it, that is not etcd's."""
        return StoreError(f"{self.url} does not answer as etcd does: {' '.join(str(what).split())[:120]}")


class Stream:
    """An answer that goes on and on: a JSON object a line."""

    def __init__(
        self,
        member: Connection,
        sock: socket.socket,
        response: answers.Answer,
        bounds: answers.Bounds,
    ) -> None:
        self._member = member
        self._socket = sock
        self._response = response
        self._bounds = bounds
        self._rest = b""

    def next(self, seconds: float) -> dict[str, Any] | None:
        """Return the `result` of the next message, None if none has begun to arrive within `seconds`.

        Raises ConnectionLost at the end of the stream, Unanswered if a message does not go on or the member has no
        leader, ErrorAnswer for a refusal, and StoreError for a message that is not etcd's. After an exception, the
        stream must be closed.
        """
        with self._member.no_answer():
            if not self._rest:
                if not self._bounds.wait(max(seconds, 0.001)):
                    return None
                self._bounds.renew(READ_TIMEOUT)
            parts = [self._rest]
            while b"\n" not in parts[-1]:
                parts.append(self._part())
        line, _, self._rest = b"".join(parts).partition(b"\n")
        try:
            message = json.loads(line)
            error = _error(message)
            if error is None:
                result = message["result"]
                if not isinstance(result, dict):
                    raise TypeError("a result of another shape")
                return result
        except (LookupError, RecursionError, TypeError, ValueError) as wrong:
            raise self._member.no_etcd(wrong) from wrong
        code, text = error
        if "no leader" in text or code in _REFUSALS:
            raise self._member.meaning(code, text)
        raise ConnectionLost(f"{self._member.url} has ended the stream ({' '.join(text.split())[:120]})")

    def _part(self) -> bytes:
        """Return more bytes, all of a chunk if the answer comes in chunks. Raises OSError or HTTPException.

        http.client leaves the end of a chunk unread. Then it would look as if the next message had begun.
        """
        file = self._response.fp
        if not self._response.chunked:
            part = self._response.read1(2**16)
        else:
            try:
                size = int(file.readline(100).partition(b";")[0], 16)
            except ValueError:
                size = 0
            part = file.read(max(0, size))
            if len(part) < size or file.read(2) != b"\r\n":
                part = b""
        if not part:
            raise ConnectionError("the stream was ended")
        return part

    def close(self) -> None:
        with suppress(OSError):
            self._response.close()
        self._socket.close()


def _error(answer: Any) -> tuple[int, str] | None:
    """Return the code and the text of an error of etcd, None for another answer.

    In answers that are streams, an error is an object in the answer, and its code has another name in etcd 3.4.
    """
    if not isinstance(answer, dict):
        return None
    error = answer["error"] if isinstance(answer.get("error"), dict) else answer
    code, text = error.get("grpc_code", error.get("code")), error.get("message")
    return (code, text) if isinstance(code, int) and isinstance(text, str) else None


def _is_over(sock: socket.socket) -> bool:
    """Return whether a server has closed a kept connection, or has sent what was not asked for."""
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    return bool(waiting.poll(0))


def _tls(settings: EtcdSettings, plain: socket.socket, name: str) -> ssl.SSLSocket:
    """Return the socket with TLS on it. The files are read for each connection, since certificates are renewed.

    It accepts every certificate authority that etcd and its tools accept: by default, Python 3.13 refuses an authority
    without the key usage extension; `openssl req -x509` creates such ones.
    """
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(["http/1.1"])
    if settings.ca_cert is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(settings.ca_cert)
    if settings.cert is not None:
        context.load_cert_chain(settings.cert, settings.key, password=lambda: b"")
    return context.wrap_socket(plain, server_hostname=name)
