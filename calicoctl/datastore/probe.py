"""What speaks at a port where no etcd answers: TLS, plain HTTP or gRPC alone. Asked to say what to change, once.

Sources: RFC 9113, 3.4 and 6.5, for the SETTINGS frame that a server of HTTP/2 opens with, also when it is spoken to in
HTTP/1.1, as gRPC servers are here.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import closing

PATIENCE = 1.0
"""Seconds to wait for each answer."""

_SETTINGS_FRAME = 4


def mismatch(scheme: str, host: str, port: int) -> str | None:
    """Return why a server cannot be spoken to as `scheme` (http or https) says; None where that is not the reason."""
    host = host.strip("[]")
    if scheme == "https":
        if _first_bytes(host, port).startswith(b"HTTP/"):
            return "it speaks no TLS: use http, in ETCD_SCHEME or ETCD_ENDPOINTS"
        return None
    answer = _first_bytes(host, port)
    if len(answer) == 9 and answer[3] == _SETTINGS_FRAME and answer[5:] == b"\0\0\0\0":
        return "it speaks gRPC alone, where etcd's HTTP API is needed: use the port that serves this"
    if not answer and _speaks_tls(host, port):
        return "it speaks TLS: use https, in ETCD_SCHEME or ETCD_ENDPOINTS, and the certificates in ETCD_CA_CERT_FILE …"
    return None


def _first_bytes(host: str, port: int) -> bytes:
    """Return how a server's answer to a request in plain HTTP begins: nine bytes, a frame's header, at most."""
    answer = b""
    try:
        with closing(socket.create_connection((host, port), PATIENCE)) as connection:
            connection.sendall(f"GET /version HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            while len(answer) < 9:
                part = connection.recv(9 - len(answer))
                if not part:
                    break
                answer += part
    except OSError:
        pass
    return answer


def _speaks_tls(host: str, port: int) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent, and nothing believed
    try:
        with socket.create_connection((host, port), PATIENCE) as plain, context.wrap_socket(plain):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")  # it wants a client certificate, say
    except OSError:
        return False
