"""Determines the protocol of a server that does not answer like etcd: TLS, plain HTTP, or gRPC only.

Used for error messages. Source: RFC 9113, 3.4 and 6.5: an HTTP/2 server first sends a SETTINGS frame, even if the
client speaks HTTP/1.1.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import closing

PATIENCE = 1.0
"""Seconds to wait for a connection, and for each part of an answer."""

_SETTINGS_FRAME = 4


def mismatch(scheme: str, host: str, port: int) -> str | None:
    """Return a text about the protocol that a server speaks instead of etcd's API over `scheme` ("http" or "https").

    The text is for an error message, and says what to do. Returns None if the protocol is unknown.
    """
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
    """Return the first nine bytes of a server's answer to a plain HTTP request.

    In HTTP/2, these are the header of a frame. If the connection fails or is closed, fewer bytes are returned, or none.
    """
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
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent over it
    try:
        with socket.create_connection((host, port), PATIENCE) as plain, context.wrap_socket(plain):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")  # for example because it requires a client certificate
    except OSError:
        return False
