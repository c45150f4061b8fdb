"""HTTP connections to the members of an etcd cluster, for the JSON gateway of etcd's v3 API.

Handles sockets, TLS, tokens, and the bounds of answers. An exception says whether a request was not sent, was refused
by etcd, or has an unknown outcome. Redirects are not followed: etcd sends none, and another server could redirect a
request anywhere.

Sources: https://github.com/etcd-io/etcd/blob/release-3.4/Documentation/dev-guide/api_grpc_gateway.md,
etcdserver/api/v3rpc/rpctypes/error.go there, and https://github.com/grpc/grpc/blob/master/doc/statuscodes.md.
"""

from __future__ import annotations

import http.client
import json
import re
import select
import socket
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Callable, Optional, TypeVar

from calicoctl import answers
from calicoctl.datastore import last_known
from calicoctl.datastore.members import ConnectionLost, NotSent, RequestFailed, Unanswered, why
from calicoctl.datastore.settings import EtcdSettings, Member
from calicoctl.errors import StoreError, StoreUnavailable, is_shortage

if TYPE_CHECKING:
    import ssl

T = TypeVar("T")

READ_TIMEOUT = 4.0
"""Seconds to wait for one member's answer."""

LARGEST = 16 * answers.MiB
"""The maximum size of an answer, in bytes. etcd's default limit for a value is 1.5 MiB, which is 2 MiB in base64."""

INVALID_ARGUMENT, NOT_FOUND, PERMISSION_DENIED, RESOURCE_EXHAUSTED = 3, 5, 7, 8
FAILED_PRECONDITION, OUT_OF_RANGE, UNIMPLEMENTED, UNAVAILABLE, DATA_LOSS, UNAUTHENTICATED = 9, 11, 12, 14, 15, 16

_REFUSALS = {
    *(INVALID_ARGUMENT, NOT_FOUND, PERMISSION_DENIED, RESOURCE_EXHAUSTED),
    *(FAILED_PRECONDITION, OUT_OF_RANGE, UNIMPLEMENTED, DATA_LOSS, UNAUTHENTICATED),
}
"""The codes of errors after which a request was not applied, and a retry would fail as well. After other errors, the
request may have been applied, or a retry may succeed: a write without a quorum, for example, has code 2 in etcd 3.4,
and 4 in 3.5."""

_BUSY = "too many requests"
"""Part of the message of a RESOURCE_EXHAUSTED after which a retry may succeed."""

_BAD_HANDSHAKE = "authentication handshake failed"
"""Part of the message of a permanent UNAVAILABLE: etcd's gateway cannot connect to its own member by TLS."""

_REFUSED_CERTIFICATE = re.compile("ALERT.*(CERT|UNKNOWN_CA)")
"""Matches the reason of a TLS error if the member refuses this host's certificate, or requires one and gets none.
The member has then read no request."""

_GARBLED = (
    "SSLError",
    "SSLEOFError",
    "SSLZeroReturnError",
    "RemoteDisconnected",
    "ConnectionResetError",
    "BadStatusLine",
)
"""The names of the errors that occur if a server speaks another protocol."""


class ErrorAnswer(Exception):
    """etcd refused a request, and has not applied it. `code` is the gRPC status code, `message` is etcd's text."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    @property
    def is_about_token(self) -> bool:
        """Whether the request may succeed with another token."""
        return self.code == UNAUTHENTICATED or (
            self.code == INVALID_ARGUMENT and ("user name is empty" in self.message or "auth store" in self.message)
        )


Authorize = Callable[["Connection", Collection[str]], "tuple[Optional[str], bool]"]
"""A function (connection, refused) -> (token, is_new) that returns the token for requests over a connection.

`refused` are the tokens that the member has refused for the same request; the text "" stands for a request that was
refused since it had no token. In the result, the token is None if none is to be sent. `is_new` says that no other token
need be tried if this one is refused, for example since etcd has just issued it; after a few refusals, it must be true.
The function may send requests by `Connection.exchange`, and may raise StoreError."""


class Connection:
    """Access to one member: a persistent connection for requests, and a new connection for each stream.

    Not thread-safe.
    """

    def __init__(self, settings: EtcdSettings, member: Member, authorize: Authorize | None = None) -> None:
        self.url = settings.url(member)
        self.user = settings.username
        self.token: str | None = None
        """The value of the header `Authorization` in requests, None for no such header."""
        self._settings = settings
        self._member = member
        self._authorize = authorize
        self._kept: socket.socket | None = None

    def post(self, path: str, body: dict[str, Any], seconds: float | None = None) -> dict[str, Any]:
        """Do what `exchange` does, for a POST request. If etcd refuses the token, try others: see `with_token`."""
        return self.with_token(lambda: self.exchange("POST", path, body, seconds))

    def exchange(
        self, method: str, path: str, body: dict[str, Any] | None = None, seconds: float | None = None
    ) -> dict[str, Any]:
        """Send a request; return the JSON object in the answer, which must begin within `seconds`.

        The default of `seconds` is READ_TIMEOUT. Raises what `fetch` raises, ErrorAnswer if etcd refuses the request,
        and StoreError if the answer is not etcd's.
        """
        return self._parsed(*self.fetch(method, path, body, seconds))

    def fetch(
        self, method: str, path: str, body: dict[str, Any] | None = None, seconds: float | None = None
    ) -> tuple[int, str]:
        """Send a request; return the HTTP status and the body of the answer, which must begin within `seconds`.

        Bytes of the body that are not UTF-8 are escaped so that they are not valid in JSON.

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
                content = response.read().decode(errors="backslashreplace")
        except BaseException:
            sock.close()
            raise
        if response.will_close:
            sock.close()
        else:
            self._kept = sock
        return response.status, content

    def stream(self, path: str, body: dict[str, Any], largest: int) -> Stream:
        """Send a POST request whose answer is a stream of messages, each of at most `largest` bytes; return the stream.

        Raises what `exchange` raises. If etcd refuses the token, no other is tried: call this through `with_token`.
        """
        sock = self._connect()
        try:
            with self.no_answer(), answers.bounded_here(largest) as bounds:
                response = self._ask(sock, "POST", path, body)
                if response.status == 200:
                    return Stream(self, sock, response, bounds)
                with closing(response):
                    self._parsed(response.status, response.read().decode(errors="backslashreplace"))
            raise self.no_etcd(f"status {response.status}")
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        """Close the persistent connection. The next request opens a new one."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def with_token(self, send: Callable[[], T]) -> T:
        """Call `send`, which sends a request with the attribute `token`; return what `send` returns.

        If `token` is None, it is set first (see Authorize). If `send` raises an ErrorAnswer that is about the token,
        set `token` to another one, and call `send` again. If the refused token was a new one, raise the ErrorAnswer.
        Raises what `send` and Authorize raise.
        """
        if self._authorize is None:
            return send()
        if self.token is None:
            self.token, _ = self._authorize(self, ())
        refused: list[str] = []
        is_new = False
        while True:
            try:
                return send()
            except ErrorAnswer as error:
                if is_new or not error.is_about_token:
                    raise
                refused.append(self.token or "")
                self.token, is_new = self._authorize(self, refused)

    def _connect(self) -> socket.socket:
        """Connect to the member; return the socket, with TLS if needed, and with the timeout READ_TIMEOUT.

        Raises NotSent if that fails, and StoreUnavailable if this host lacks memory or file descriptors.
        """
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
        """Send a request; return the answer after its headers were read. Raises OSError or HTTPException."""
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
        # one write: if a second one failed, the server's TLS alert, which contains the reason, would not be read
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
        """Convert the exceptions of sockets and of HTTP in the body of `with` to those for requests without an answer.

        Raises Unanswered for a timeout, and ConnectionLost in most other cases; NotSent if the member refuses this
        host's certificate or requires one, which with TLS 1.3 shows only when the answer is read; and StoreUnavailable
        if this host lacks memory or file descriptors.
        """
        try:
            yield
        except (http.client.HTTPException, OSError, MemoryError) as error:
            if is_shortage(error):
                raise StoreUnavailable(f"etcd cannot be asked: {why(error)}") from error
            if _REFUSED_CERTIFICATE.search(str(getattr(error, "reason", ""))):
                text = f"it wants a certificate that it trusts, as ETCD_CERT_FILE and ETCD_KEY_FILE: {why(error)}"
                raise NotSent(f"{self.url} ({text})", type(error).__name__ in _GARBLED) from error
            kind: type[RequestFailed] = Unanswered if isinstance(error, socket.timeout) else ConnectionLost
            raise kind(f"{self.url} did not answer ({why(error)})", type(error).__name__ in _GARBLED) from error

    def _parsed(self, status: int, content: str) -> dict[str, Any]:
        """Return the JSON object in an answer with the HTTP status `status` and the body `content`.

        If the answer reports an error, raises Unanswered if a retry may succeed, and ErrorAnswer if it cannot. Raises
        StoreError if the answer is not etcd's, or if etcd does not accept this host's certificate over HTTP.
        """
        try:
            answer = answers.parsed(content)
            error = _error(answer)
            if status == 200 and error is None and isinstance(answer, dict):
                return answer
        except (RecursionError, ValueError):
            error = None
        if error is None:
            text = content[:1000]
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
        """Return the exception for an error of etcd: Unanswered if a retry may succeed, ErrorAnswer if it cannot.

        `code` is the gRPC status code, and `message` is etcd's text.
        """
        refused = code in _REFUSALS and _BUSY not in message
        if refused or _BAD_HANDSHAKE in message:
            return ErrorAnswer(code, message)
        return Unanswered(f"{self.url} says: {' '.join(message.split())[:300]}")

    def no_etcd(self, what: object) -> StoreError:
        """Return the error for an answer that is not etcd's. `what` describes the answer, for the message."""
        text = " ".join(str(what).split())[:120].rstrip(" ,") or "the answer is empty"
        return StoreError(f"{self.url} does not answer as etcd does: {text}")


class Stream:
    """An answer that is a stream of messages: one JSON object per line."""

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
        self._lines = answers.Lines(bounds, READ_TIMEOUT)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """Return the `result` of the next message, None if no message begins within `seconds`.

        Raises ConnectionLost if the stream or the connection has ended, Unanswered if a message that has begun
        does not end in time or the member has no leader, ErrorAnswer if etcd refuses the request, StoreError for a
        message that is not etcd's, and StoreUnavailable if this host lacks memory. After an exception, the stream must
        be closed.
        """
        with self._member.no_answer():
            line = self._lines.next(seconds)
        if line is None:
            return None
        try:
            message = answers.parsed(line)
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

    def close(self) -> None:
        with suppress(OSError):
            self._response.close()
        self._socket.close()


def _error(answer: Any) -> tuple[int, str] | None:
    """Return the gRPC code and the message in `answer` if it is an error of etcd, None if it is not."""
    if not isinstance(answer, dict):
        return None
    # in a stream, the error is an object in the answer, and etcd 3.4 calls the code grpc_code
    error = answer["error"] if isinstance(answer.get("error"), dict) else answer
    code, text = error.get("grpc_code", error.get("code")), error.get("message")
    return (code, text) if isinstance(code, int) and isinstance(text, str) else None


def _is_over(sock: socket.socket) -> bool:
    """Return whether the server has closed an idle connection, or has sent unexpected data."""
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    return bool(waiting.poll(0))


def _tls(settings: EtcdSettings, plain: socket.socket, name: str) -> ssl.SSLSocket:
    """Return a TLS connection over `plain` to the member called `name`.

    The files with certificates are read each time, since they may be renewed.
    """
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Python 3.13 refuses an authority without the key usage extension, as `openssl req -x509` creates; etcd accepts it
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(["http/1.1"])
    if settings.ca_cert is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(settings.ca_cert)
    if settings.cert is not None:
        context.load_cert_chain(settings.cert, settings.key, password=lambda: b"")
    return context.wrap_socket(plain, server_hostname=name)
