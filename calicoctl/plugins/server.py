"""Serves calls over Unix sockets: HTTP requests with a JSON object, which are answered with a JSON object.

This is the protocol of the Docker Engine's plugins. An error is answered with status 400 or 500 and `{"Err": TEXT}`;
the engine shows the text to the user. For our own clients, `"Again": true` beside it says that a later attempt may
succeed. Requests are bounded in size and time, and so are the calls. A call counts as running until its answer is
written: see wait_answered.

The sockets belong to root, and no other user may connect to them. They are created here, or by systemd, which passes
them on when the engine first connects to one.

Source: Docker Engine managed plugin API, "Plugin API design"; sd_listen_fds(3).
"""

from __future__ import annotations

import http.client
import io
import json
import logging
import os
import socket
import socketserver
import stat
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Callable

from calicoctl import proc
from calicoctl.answers import Bounds
from calicoctl.errors import CalicoError, Conflict, Frozen, StoreUnavailable, one_line
from calicoctl.plugins.stores import bounded

log = logging.getLogger("calico.plugins")

Route = Callable[[dict[str, Any]], dict[str, Any]]
"""Answers a call: from the JSON object of the request to that of the answer. Raises CalicoError."""

LARGEST = 2**23
"""The maximum size of a request, in bytes, headers included.

The engine lists each port of a container (`docker run --expose=1-65535`, or EXPOSE of its image) in some 26 bytes.
"""

PATIENCE = 5.0
"""Seconds within which a request must arrive. A large one may take some seconds longer: see answers.Bounds.left."""

CALL = 5.0
"""The maximum number of seconds that a call takes."""

BACKLOG = 128

WITHOUT_BODY = (
    *("Plugin.Activate", "GetCapabilities", "GetDefaultAddressSpaces"),
    *("EndpointOperInfo", "ProgramExternalConnectivity", "RevokeExternalConnectivity", "ReleasePool"),
)
"""The ends of the paths of the calls that may have an empty body.

The engine makes the first three with one. It repeats any call with one when this process has ended meanwhile, and the
answers of the others are the same whatever the body says.
"""

OTHER = "another process serves Docker networks already"

_FIRST_PASSED = 3
"""The file descriptor of the first socket that systemd passes on. Source: sd_listen_fds(3)."""


@dataclass(frozen=True)
class Listening:
    """A socket and its calls: `routes` maps the path in a request to what answers it, within `seconds`.

    `failed` is called when a call could not be made, or has not ended within this time, or the store is away. Then the
    error begins with `unavailable`, unless that is empty. If `refusal` is not empty, it is the error of every call.
    """

    path: Path
    routes: Mapping[str, Route]
    seconds: float = CALL
    failed: Callable[[], object] = lambda: None
    unavailable: str = ""
    refusal: str = ""


_answering = 0
_answered = threading.Condition()


def _count(change: int) -> None:
    global _answering
    with _answered:
        _answering += change
        _answered.notify_all()


def wait_answered(seconds: float) -> None:
    """Wait until all calls that have been accepted are answered, at most `seconds`."""
    with _answered:
        _answered.wait_for(lambda: _answering == 0, seconds)


class Server(socketserver.ThreadingUnixStreamServer):
    """Accepts connections at one socket. Each is served in a thread of its own, and closed after one request."""

    daemon_threads = True
    request_queue_size = BACKLOG

    def __init__(self, listening: Listening, passed: socket.socket | None = None) -> None:
        """Listen at `listening.path`, or at `passed`, the socket that systemd has created.

        Raises OSError; and CalicoError if another process, such as systemd, has created a socket there, and listens.
        """
        super().__init__(str(listening.path), _Handler, bind_and_activate=False)
        self.listening = listening
        self._inode = 0
        if passed is not None:
            self.socket.close()
            self.socket = passed
            return
        path = listening.path
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        before = os.umask(0o177)
        try:
            self.socket.bind(str(aside))
        finally:
            os.umask(before)
        self.server_activate()
        self._inode = aside.stat().st_ino
        # renamed below, so a socket of this program has another path in the kernel
        if proc.is_listened_at(path):
            aside.unlink()
            raise CalicoError(f"{OTHER}: it listens at {path}")
        aside.rename(path)  # over the socket of a process that was killed

    def start(self) -> None:
        """Start a thread that accepts connections."""
        name = f"serving {self.listening.path.name}"
        # every half second, socketserver looks whether `stop` was called: nothing else ends its wait
        threading.Thread(target=self.serve_forever, args=(0.5,), name=name, daemon=True).start()

    def stop(self) -> None:
        """Accept no more connections, and remove the socket, if it was created here."""
        with suppress(OSError):
            if self._inode == self.listening.path.stat().st_ino:
                self.listening.path.unlink()
        self.shutdown()

    def process_request(self, request: Any, client_address: Any) -> None:
        _count(1)
        try:
            super().process_request(request, client_address)
        except BaseException:
            _count(-1)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            _count(-1)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a request at %s failed", self.listening.path)


def servers(table: Sequence[Listening], passed: Mapping[str, socket.socket]) -> list[Server]:
    """Return a Server for each entry of `table`. `passed` are the sockets to use, by path. Raises CalicoError."""
    found = []
    for listening in table:
        try:
            if str(listening.path) not in passed:
                _check_folder(listening.path.parent)
            found.append(Server(listening, passed.get(str(listening.path))))
        except OSError as error:
            raise CalicoError(f"cannot listen at {listening.path}: {error.strerror or error}") from None
    return found


def _check_folder(folder: Path) -> None:
    """Create a folder unless it exists. Raise CalicoError if another user than this one may write to it."""
    for one in (folder.parent, folder):
        one.mkdir(mode=0o700, exist_ok=True)  # as the engine itself does
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise CalicoError(f"{folder} must belong to root, and nobody else may write to it")


def passed_sockets() -> dict[str, socket.socket]:
    """Return path -> socket for the sockets that systemd has passed on to this process. To be called once."""
    count = os.environ.pop("LISTEN_FDS", "0")
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()) or not count.isdecimal():
        return {}
    found = {}
    for number in range(_FIRST_PASSED, _FIRST_PASSED + int(count)):
        if stat.S_ISSOCK(os.fstat(number).st_mode):
            one = socket.socket(fileno=number)
            one.set_inheritable(False)
            found[str(one.getsockname())] = one
    return found


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "calicoctl", ""

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(PATIENCE)
        self.rfile.close()
        self.rfile: io.BufferedReader = Bounds(LARGEST).attach(self.connection)

    def handle(self) -> None:
        # the caller may have gone, or may send too much, or too slowly
        with suppress(OSError, http.client.HTTPException):
            self.handle_one_request()

    def do_POST(self) -> None:
        try:
            self._answer(200, self._called())
        except CalicoError as error:
            log.warning("%s: %s", one_line(self.path), one_line(str(error)))
            again = {"Again": True} if isinstance(error, (StoreUnavailable, Conflict, Frozen)) else {}
            self._answer(400, {"Err": one_line(str(error)), **again})
        except (OSError, http.client.HTTPException):
            raise
        except Exception:
            log.exception("%s failed", one_line(self.path))
            self._answer(500, {"Err": "Internal error of Calico's plugin; its log says more"})

    def _called(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "0")
        if not (length.isascii() and length.isdecimal()) or self.headers.get("Transfer-Encoding") is not None:
            raise CalicoError("a request must have a Content-Length")
        body = self.rfile.read(int(length))
        if self.server.listening.refusal:
            raise CalicoError(self.server.listening.refusal)
        route = self.server.listening.routes.get(self.path)
        if route is None:
            raise CalicoError(f"there is no call {self.path}")
        if not body.strip() and not self.path.endswith(WITHOUT_BODY):
            raise CalicoError("the body of the request is empty, and must be a JSON object")
        try:
            request = json.loads(body) if body.strip() else {}
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            raise CalicoError("a request must be a JSON object")
        called, asked = route, request
        try:
            return bounded(self.server.listening.seconds, lambda: called(asked))
        except StoreUnavailable as error:
            self.server.listening.failed()
            if self.server.listening.unavailable:
                raise StoreUnavailable(f"{self.server.listening.unavailable}: {error}") from None
            raise

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "a local process"  # the client of a Unix socket has no address

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)
