"""Asks this host's agent for the packets that were dropped: see felix/drop_log.py."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterator
from typing import Any

from calicoctl import sockets
from calicoctl.errors import CalicoError
from calicoctl.felix import process
from calicoctl.felix.drop_log import ALL, FOLLOW, MOST_CLIENTS

_OUTPUT = 1
"""The file descriptor of standard output."""


def read(host: str, follow: bool) -> Iterator[dict[str, Any]]:
    """Yield the last drops, and with `follow` those that come later, until the agent ends.

    With `follow`, it also ends when nobody reads standard output any more: see `is_output_read`. A drop is a
    dictionary: see DropsManager. Raises CalicoError if the agent does not answer.
    """
    try:
        with sockets.connect(process.drops_socket(host), socket.SOCK_STREAM) as connection:
            connection.sendall(FOLLOW if follow else ALL)
            rest = b""
            while not follow or _has_data(connection):
                data = connection.recv(2**16)
                if not data:
                    return  # if `rest` is not empty, the agent has ended in its midst
                *lines, rest = (rest + data).split(b"\n")
                yield from map(json.loads, lines)
    except OSError as error:
        if process.running(host) is None:
            why = "it is not running. Start it with 'calicoctl node'"
        else:
            why = (
                f"{error.strerror or error}. If {MOST_CLIENTS} commands follow already, end one; if it is of an older "
                "version, restart it with 'calicoctl node restart'"
            )
        raise CalicoError(f"The host agent, which knows the dropped packets, does not answer: {why}.") from None


def _has_data(connection: socket.socket) -> bool:
    """Wait until there is something to read, or the end. Return False if nobody reads standard output any more."""
    waiting = select.poll()
    waiting.register(connection, select.POLLIN)
    waiting.register(_OUTPUT, 0)  # errors are always reported
    return _OUTPUT not in dict(waiting.poll())


def is_output_read() -> bool:
    """Return whether somebody reads standard output: False if it is a pipe whose reader has gone, as after `| head`."""
    asked = select.poll()
    asked.register(_OUTPUT, 0)
    return not asked.poll(0)
