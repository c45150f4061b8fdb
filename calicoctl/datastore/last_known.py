"""Connects to members of etcd at their last known addresses if their names cannot be resolved.

The agent writes the addresses to the file /var/lib/calico/HOST/members, which only root may read. Its content is a JSON
object: name of a member -> list of addresses. TLS still checks the certificate against the name.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

from calicoctl import state
from calicoctl.addresses import canonical
from calicoctl.datastore.hosts import hostname
from calicoctl.errors import CalicoError

_FILE = "members"


def addresses(name: str) -> list[str]:
    """Return the sorted canonical addresses to which a member's name was last resolved.

    The list is empty if the addresses are unknown, or if the file cannot be read.
    """
    found = set()
    with suppress(CalicoError, ValueError):  # only root may read the file
        known = json.loads(state.read(hostname(), _FILE) or b"{}")
        for address in known.get(name, ()) if isinstance(known, dict) else ():
            with suppress(OSError, TypeError, ValueError):
                found.add(canonical(address))
    return sorted(found)


def remember(known: Mapping[str, Collection[str]]) -> None:
    """Replace the content of this host's file by `known`, name of a member -> addresses. Raises CalicoError."""
    content = json.dumps({name: sorted(found) for name, found in sorted(known.items())})
    state.write(hostname(), _FILE, content=content.encode())


def forget(host: str) -> None:
    """Remove the file of a host, if there is one. Raises CalicoError if it cannot be removed."""
    state.remove(host, _FILE)


def connect(name: str, port: int, seconds: float) -> socket.socket:
    """Return a socket that is connected to the member `name`. Each of its addresses is tried for at most `seconds`.

    The socket keeps `seconds` as its timeout. If the name cannot be resolved, its last known addresses are tried.
    Raises OSError if no connection can be made, and UnicodeError for an invalid name.
    """
    try:
        return socket.create_connection((name, port), seconds)
    except socket.gaierror:
        for address in addresses(name):
            with suppress(OSError):
                return socket.create_connection((address, port), seconds)
        raise


@cache
def pools() -> dict[str, Any]:
    """Return, for each scheme ("http" and "https"), a class of connection pools for urllib3.

    If a name cannot be resolved, the connections of these pools try its last known addresses, as `connect` does.
    """
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
    from urllib3.exceptions import NameResolutionError
    from urllib3.util.connection import create_connection

    class Fallback(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            try:
                return super()._new_conn()
            except NameResolutionError:
                for address in addresses(self.host):
                    with suppress(OSError):
                        return create_connection(
                            (address, self.port), self.timeout, self.source_address, self.socket_options
                        )
                raise

    class SecureFallback(Fallback, HTTPSConnection):
        pass

    class Pool(HTTPConnectionPool):
        ConnectionCls = Fallback

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = SecureFallback

    return {"http": Pool, "https": SecurePool}
