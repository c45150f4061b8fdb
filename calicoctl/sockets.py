"""Unix sockets of root's below /run/calico: no other user may connect to them."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def listen(path: Path, flags: int, backlog: int) -> socket.socket:
    """Return a socket that listens at `path`, in place of any other. Raises OSError.

    `flags` are the type and flags of the socket, such as SOCK_STREAM. Missing folders of the path are created.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")
    new.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, flags)
    with _short(new) as short:
        listening.bind(short)
    new.chmod(0o600)  # before anybody can connect; a umask would be that of all threads
    listening.listen(backlog)
    new.replace(path)
    return listening


def connect(path: Path, flags: int) -> socket.socket:
    """Return a socket that is connected to the one at `path`, and times out after five seconds. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, flags)
    connection.settimeout(5)
    try:
        with _short(path) as short:
            connection.connect(short)
    except OSError:
        connection.close()
        raise
    return connection


def is_of_root(connection: socket.socket) -> bool:
    """Return whether the process at the other end runs as root. Raises OSError."""
    return peer(connection)[1] == 0


def peer(connection: socket.socket) -> tuple[int, int]:
    """Return the ids of the process and of the user at the other end of a connection. Raises OSError.

    For a socket that listens, that is who listens there. Source: unix(7), SO_PEERCRED.
    """
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, user, _ = struct.unpack("3i", credentials)
    return pid, user


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """Yield another path of a file in an existing folder, since the kernel limits paths of sockets to 107 bytes."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
