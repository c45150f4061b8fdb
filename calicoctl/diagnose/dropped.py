"""Asks this host's agent for the packets that were dropped: see felix/drop_log.py."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

from calicoctl import sockets
from calicoctl.errors import CalicoError
from calicoctl.felix import process
from calicoctl.felix.drop_log import ALL, FOLLOW, MOST_CLIENTS


def read(host: str, follow: bool) -> Iterator[dict[str, Any]]:
    """Yield the last drops, and with `follow` those that come later, until the agent ends.

    A drop is a dictionary: see DropsManager. Raises CalicoError if the agent does not answer.
    """
    try:
        with sockets.connect(process.drops_socket(host), socket.SOCK_STREAM) as connection:
            connection.sendall(FOLLOW if follow else ALL)
            if follow:
                connection.settimeout(None)
            with connection.makefile("rb") as lines:
                for line in lines:
                    if line.endswith(b"\n"):  # else the agent has ended in its midst
                        yield json.loads(line)
    except OSError as error:
        if process.running(host) is None:
            why = "it is not running. Start it with 'calicoctl node'"
        else:
            why = (
                f"{error.strerror or error}. If {MOST_CLIENTS} commands follow already, end one; if it is of an older "
                "version, restart it with 'calicoctl node restart'"
            )
        raise CalicoError(f"The host agent, which knows the dropped packets, does not answer: {why}.") from None
