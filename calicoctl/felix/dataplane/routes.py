"""The driver of endpoints' routes, neighbour entries and interface sysctls: programs only what is missing or wrong.

A route is the agent's if it has the agent's protocol number. All permanent neighbour entries on `cali…` interfaces are
the agent's, and so are all proxy entries on these interfaces (`ip -6 neigh show proxy`).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from calicoctl import netlink, rtnetlink
from calicoctl.addresses import FAMILIES, host_net, pack, version_of
from calicoctl.desired.local_endpoint import LocalEndpoint
from calicoctl.errors import CalicoError
from calicoctl.felix.dataplane import sysctls
from calicoctl.felix.dataplane.links import Link, list_links

if TYPE_CHECKING:
    from pyroute2.iproute.linux import IPRoute

T = TypeVar("T")

PROTOCOL = netlink.OUR_PROTOCOL

_METRIC6 = 1
"""The smallest metric of an IPv6 route: the kernel takes 0 as 1024."""

Item = tuple[str, ...]
"""A route or entry of an interface: ("route", address), ("neighbour", address, MAC), or ("proxy", address)."""


class Routes:
    """The agent's routes and neighbour entries in the kernel, cached by interface index.

    `read` fills the cache. Neighbour entries include proxy entries.
    """

    def __init__(self, netlink: IPRoute) -> None:
        """`netlink` deletes routes. It stays open, so that sources.py recognises these deletions as the agent's own."""
        self._netlink = netlink
        self._have: dict[int, set[Item]] = defaultdict(set)

    def list_links(self) -> list[Link]:
        """Return the `cali…` interfaces of this host. Raises CalicoError."""
        return _listed("interfaces", list_links())

    def read(self, links: Collection[Link]) -> None:
        """Read all of the agent's routes, and its neighbour entries on the interfaces `links`, into the cache.

        Raises CalicoError.
        """
        self._have.clear()
        indices = {link.index for link in links}
        for family in (socket.AF_INET, socket.AF_INET6):
            for route in _listed("routes", netlink.routes(family, protocol=PROTOCOL)):
                if route.destination is not None and route.index is not None:  # a default route is not ours
                    self._have[route.index].add(("route", route.destination))
            for entry in _listed("neighbour entries", netlink.neighbours(family)):
                if entry.index in indices and entry.mac is not None:
                    self._have[entry.index].add(("neighbour", entry.address, entry.mac))
        for entry in _listed("neighbour entries", netlink.neighbours(socket.AF_INET6, proxies=True)):
            if entry.index in indices:
                self._have[entry.index].add(("proxy", entry.address))

    def forget(self, index: int) -> None:
        """Remove an interface's routes and neighbour entries from the cache, but not from the kernel.

        Called when the kernel has removed some or all of them. The next `apply` then adds all that are needed.
        """
        self._have.pop(index, None)

    def forget_proxies(self, index: int) -> None:
        """Remove an interface's proxy entries from the cache, but not from the kernel.

        Called after the interface had no carrier: many kernels drop the entries then. The next `apply` adds them again.
        Source: __neigh_ifdown() in the kernel's net/core/neighbour.c, which calls pneigh_ifdown().
        """
        items = self._have.get(index, set())
        items.difference_update([item for item in items if item[0] == "proxy"])

    def forget_route(self, address: str) -> int | None:
        """Remove the route to an address from the cache, but not from the kernel.

        Returns the index of the route's interface; None if the cache contains no route to the address.
        """
        for index, items in self._have.items():
            if ("route", address) in items:
                items.discard(("route", address))
                return index
        return None

    def routed(self) -> Iterator[tuple[int, str]]:
        """Yield the agent's routes in the cache, each as (index of the interface, destination address)."""
        for index, items in list(self._have.items()):
            yield from [(index, item[1]) for item in items if item[0] == "route"]

    def remove_route(self, index: int, address: str) -> None:
        """Remove the agent's route to an address through the interface `index` from the kernel. Raises CalicoError."""
        self._remove(index, ("route", address))
        self._have[index].discard(("route", address))

    def indices(self) -> set[int]:
        """Return the indices of the interfaces that have routes or neighbour entries of the agent in the cache."""
        return {index for index, items in self._have.items() if items}

    def apply(self, endpoint: LocalEndpoint, link: Link, next_hop: str | None) -> None:
        """Set the sysctls, routes and neighbour entries that an endpoint needs on its interface, `link`.

        The agent's other routes and neighbour entries are removed from the interface. `next_hop` is the IPv6 address
        that the workload uses as its next hop, None if it is unknown. Raises CalicoError.
        """
        for path, value in sysctls.interface_settings(link.name, bool(endpoint.addresses_of(6))).items():
            sysctls.write(path, value)
        desired: dict[Item, None] = {}
        if next_hop is not None and endpoint.addresses_of(6):
            desired["proxy", next_hop] = None
        for address in endpoint.addresses:
            desired["neighbour", address, endpoint.mac] = None
            desired["route", address] = None
        have = self._have[link.index]
        for item in desired:
            if item not in have:
                self._add(link.index, item)
                have.add(item)
        for item in sorted(have - set(desired)):
            # an entry of the same neighbour with another MAC has been replaced above
            if item[0] != "neighbour" or ("neighbour", item[1], endpoint.mac) not in desired:
                self._remove(link.index, item)
            have.discard(item)

    def clear(self, index: int) -> None:
        """Remove the agent's routes and neighbour entries from an interface. Raises CalicoError."""
        for item in sorted(self._have.get(index, ())):
            self._remove(index, item)
        self._have.pop(index, None)

    def _add(self, index: int, item: Item) -> None:
        self._do("add", index, item)

    def _remove(self, index: int, item: Item) -> None:
        self._do("remove", index, item, errno.ESRCH, errno.ENOENT, errno.ENODEV)

    def _do(self, verb: str, index: int, item: Item, *ignored: int) -> None:
        from pyroute2.netlink.exceptions import NetlinkError

        kind, address = item[:2]
        try:
            if kind == "route" and verb == "add":
                _add_route(address, index)
            elif kind == "route":
                family = FAMILIES[version_of(address)]
                scope = {"scope": netlink.SCOPE_LINK} if family == socket.AF_INET else {}
                self._netlink.route("del", family=family, dst=host_net(address), oif=index, proto=PROTOCOL, **scope)
            elif kind == "neighbour" and verb == "add":
                rtnetlink.send(rtnetlink.put_neighbour(index, address, item[2]))
            elif kind == "neighbour":
                rtnetlink.send(rtnetlink.delete_neighbour(index, address))
            elif verb == "add":
                rtnetlink.send(rtnetlink.put_proxy(index, address))
            else:
                rtnetlink.send(rtnetlink.delete_proxy(index, address))
        except (NetlinkError, OSError) as error:
            code = int(error.code if isinstance(error, NetlinkError) else error.errno or 0)
            if code not in ignored:
                raise CalicoError(f"the kernel refused to {verb} a {kind} for {address}: {os.strerror(code)}") from None


def _add_route(address: str, index: int) -> None:
    """Add a route to an address that takes precedence over any other route to it. Raises OSError.

    The other route stays. If the new route exists already, nothing is changed. Source: the kernel's
    uapi/linux/rtnetlink.h, and fib_table_insert() in its net/ipv4/fib_trie.c: without a flag about existing routes, the
    new route precedes them.
    """
    packed, family = pack(address), FAMILIES[version_of(address)]
    scope = netlink.SCOPE_LINK if family == socket.AF_INET else 0
    body = struct.pack("=8BI", family, 8 * len(packed), 0, 0, netlink.TABLE_MAIN, PROTOCOL, scope, netlink.UNICAST, 0)
    body += netlink.attribute(netlink.RTA_DST, packed) + netlink.attribute(netlink.RTA_OIF, struct.pack("=I", index))
    if family == socket.AF_INET6:
        body += netlink.attribute(netlink.RTA_PRIORITY, struct.pack("=I", _METRIC6))
    with suppress(FileExistsError):  # the same route is there
        netlink.do(socket.NETLINK_ROUTE, netlink.RTM_NEWROUTE, netlink.CREATE, body)


def _listed(what: str, answers: Iterator[T]) -> list[T]:
    try:
        return list(answers)
    except OSError as error:
        raise CalicoError(f"{what} cannot be listed: {error.strerror or error}") from None
