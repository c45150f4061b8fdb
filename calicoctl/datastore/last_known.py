"""Reaches members of etcd whose names cannot be resolved: at the addresses that the names had when they last could be.

Without that, a host whose DNS is cut off, for example by a route to a container, would not read in etcd that the route
is gone. The agent keeps the addresses in /var/lib/calico/HOST/members (JSON: a list of addresses by name), of root
alone, so they outlive it, and reboots. TLS still asks for the name.
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
    """Return the canonical addresses that a member's name had when it was last resolved; empty if they are unknown."""
    found = set()
    with suppress(CalicoError, ValueError):  # only root may read the file
        known = json.loads(state.read(hostname(), _FILE) or b"{}")
        for address in known.get(name, ()) if isinstance(known, dict) else ():
            with suppress(OSError, TypeError, ValueError):
                found.add(canonical(address))
    return sorted(found)


def remember(known: Mapping[str, Collection[str]]) -> None:
    """Keep the addresses of members' names. Raises CalicoError."""
    content = json.dumps({name: sorted(found) for name, found in sorted(known.items())})
    state.write(hostname(), _FILE, content=content.encode())


def forget(host: str) -> None:
    """Remove what is known of the members of a host that is removed. Raises CalicoError."""
    state.remove(host, _FILE)


def connect(name: str, port: int, seconds: float) -> socket.socket:
    """Return a connected socket, whose timeout is `seconds`, to a member; raise OSError or UnicodeError."""
    try:
        return socket.create_connection((name, port), seconds)
    except socket.gaierror:
        for address in addresses(name):
            with suppress(OSError):
                return socket.create_connection((address, port), seconds)
        raise


@cache
def pools() -> dict[str, Any]:
    """Return the classes of urllib3's pools, by scheme, whose connections fall back to these addresses."""
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
