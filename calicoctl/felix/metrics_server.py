"""The HTTP server for the metrics. Every user of the host may connect.

The number and the duration of connections are limited, so that no user can exhaust the agent's file descriptors.
"""

from __future__ import annotations

import logging
import socket
import socketserver
import threading
import time
from contextlib import suppress
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from calicoctl.errors import is_shortage
from calicoctl.felix import shortage

log = logging.getLogger("calico.felix")

MOST_CONNECTIONS = 8
"""The maximum number of open connections. A further connection closes the oldest one."""

LONGEST = 5.0
"""The maximum duration of a connection in seconds."""

INTERVAL = 1.0
"""Seconds between two checks for connections that have lasted too long."""


def serve(app: Any, address: str, port: int) -> None:
    """Serve a WSGI application, in a new thread. Raises OSError if the port cannot be bound."""
    server = _Server((address, port), _Handler)
    server.set_app(app)
    threading.Thread(target=server.serve_forever, args=(INTERVAL,), name="serving metrics", daemon=True).start()


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        self._changed = threading.Condition()
        self._open: dict[socket.socket, float] = {}
        """Open connections, the oldest first, and when each was accepted (monotonic)."""
        super().__init__(*arguments)

    def server_bind(self) -> None:
        # unlike the library's method, this does not resolve the host's name
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if is_shortage(error):
                time.sleep(shortage.PAUSE)  # the connection is still queued, and would be reported again at once
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            if len(self._open) >= MOST_CONNECTIONS:
                _end(next(iter(self._open)))
                self._changed.wait_for(lambda: len(self._open) < MOST_CONNECTIONS, LONGEST)
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Close connections that have lasted too long. The library calls this at least every INTERVAL."""
        with self._changed:
            for connection, since in self._open.items():
                if time.monotonic() > since + LONGEST:
                    _end(connection)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._changed:
            self._open.pop(request, None)
            self._changed.notify()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("serving metrics to a connection failed", exc_info=True)


def _end(connection: socket.socket) -> None:
    """Shut a connection down. The thread that serves it then reads end of file, and closes the socket."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(WSGIRequestHandler):
    timeout = LONGEST

    def log_message(self, *arguments: Any) -> None:
        pass
