"""Updates the snapshot when this host's own network changes: addresses, MACs, gateways, networks, and servers.

The servers are the members of etcd and the DNS servers that this host uses. This module does not change the kernel.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Callable

from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.datastore.reserved import Servers
from calicoctl.errors import CalicoError
from calicoctl.felix.events import AddressesChanged, GatewaysChanged, LinkChanged, ServersChanged
from calicoctl.workloads import host_network

if TYPE_CHECKING:
    from calicoctl.desired.snapshot import Snapshot
    from calicoctl.felix.health import Health

PAUSE = 0.5
"""The minimum number of seconds from a change of routes until gateways are read: many routes may change together."""

BACKOFF = 10.0
"""Seconds until a failed read is retried."""


class NetworkMonitor:
    """Reads the host's network after it may have changed. Runs in the agent's thread."""

    def __init__(self, snapshot: Snapshot, health: Health, reading: Callable[[], None]) -> None:
        """`reading` is called before each read of the host's network.

        It must ensure that the next change of routes emits GatewaysChanged again.
        """
        self._snapshot = snapshot
        self._health = health
        self._reading = reading
        self._pause = PAUSE
        self._servers = Servers()
        self._asked: tuple[frozenset[str], frozenset[str]] = frozenset(), frozenset()
        """The destinations of the routes to read: first the addresses of other hosts and of BGP peers, then one address
        in each block of the other hosts.
        """
        self.due_at: float | None = 0.0
        """When to read next (monotonic); None while no read is needed."""

    def on_event(self, event: Any) -> None:
        """Schedule a read of the host's network if the event may have changed it.

        The read is due at once if addresses, servers, or the MACs that other hosts see may have changed. It is due
        after a pause if only routes may have changed. New servers are also written into the snapshot immediately.
        """
        if isinstance(event, ServersChanged):
            self._servers, self.due_at = event.servers, 0.0
            # at once, even if the kernel cannot be read
            self._snapshot.set_network(self._snapshot.network.with_servers(self._servers))
            return
        if isinstance(event, AddressesChanged) or (isinstance(event, LinkChanged) and self._has_new_mac(event)):
            self.due_at = 0.0
            return
        # with an interface, the kernel may remove its routes without a notification
        with_routes = isinstance(event, LinkChanged) and not event.link.name.startswith(INTERFACE_PREFIX)
        if self.due_at is None and (with_routes or isinstance(event, GatewaysChanged)):
            self.due_at = time.monotonic() + self._pause

    def _has_new_mac(self, event: LinkChanged) -> bool:
        """Return whether an interface through which this host sends packets to other hosts has a new MAC.

        The other hosts must learn the MAC without delay.
        """
        known = self._snapshot.network.macs.get(event.link.name)
        return known is not None and not event.deleted and event.link.mac not in known

    def resync(self) -> None:
        """Schedule a read for the next call of `read_if_due`."""
        self.due_at = 0.0

    def read_if_due(self) -> None:
        """If a read is due, read the host's addresses, gateways and networks into the snapshot.

        A read is also due if other hosts, BGP peers or blocks have changed, since the routes to them are read, too. If
        the read fails, report an error, and retry after BACKOFF.
        """
        begin = time.monotonic()
        if self._snapshot.dirty.topology:
            topology = self._snapshot.topology
            asked = topology.others(), topology.inside()
            if asked != self._asked:
                self._asked, self.due_at = asked, 0.0
        if self.due_at is None or begin < self.due_at:
            return
        self._reading()
        try:
            self._snapshot.set_network(host_network.read(*self._asked).with_servers(self._servers))
            self.due_at = None
        except Exception as error:  # of any kind: it must not end the agent
            self.due_at = begin + BACKOFF
            why = str(error) if isinstance(error, CalicoError) else f"this host's addresses cannot be read: {error!r}"
            self._health.error(why)
        self._pause = max(PAUSE, 50 * (time.monotonic() - begin))
