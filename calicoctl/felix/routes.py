"""Routes, neighbours and interface settings of this host's endpoints: what is wanted, against what the kernel has.

Everything of ours can be told from others': routes by their protocol number, neighbour entries by being permanent and
on a `cali…` interface.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calicoctl.errors import CalicoError
from calicoctl.felix import sysctls
from calicoctl.snapshot import LocalEndpoint

if TYPE_CHECKING:
    from pyroute2.iproute.linux import IPRoute

PROTOCOL = 80
"""The protocol number of our routes (`ip route show proto 80`). Source: numbers from 5 up are free, rtnetlink(7)."""

PREFIX = "cali"

_SCOPE_LINK = 253
_TABLE_MAIN = 254
_NUD_PERMANENT = 0x80
_NTF_PROXY = 0x08

Item = tuple[str, ...]
"""("route", address), ("neighbour", address, MAC), or ("proxy", address)."""


@dataclass(frozen=True)
class Link:
    """An interface of this host's."""

    name: str
    index: int
    up: bool


class Routes:
    """What the kernel has of ours, by interface index."""

    def __init__(self, netlink: IPRoute) -> None:
        self._netlink = netlink
        self._have: dict[int, set[Item]] = defaultdict(set)

    def read(self, links: Collection[Link]) -> None:
        """Learn what of ours the kernel has. Raises CalicoError."""
        self._have.clear()
        indices = {link.index for link in links}
        for family in (socket.AF_INET, socket.AF_INET6):
            for route in self._netlink.get_routes(family=family, table=_TABLE_MAIN, proto=PROTOCOL):
                if route["proto"] == PROTOCOL and route.get_attr("RTA_DST") is not None:  # a default route is not ours
                    self._have[route.get_attr("RTA_OIF")].add(("route", route.get_attr("RTA_DST")))
            for entry in self._netlink.get_neighbours(family=family):
                if entry["ifindex"] in indices and entry["state"] & _NUD_PERMANENT:
                    mac = entry.get_attr("NDA_LLADDR")
                    if mac is not None:
                        self._have[entry["ifindex"]].add(("neighbour", entry.get_attr("NDA_DST"), mac))
        names = {link.name: link.index for link in links}
        for address, name in _proxies():
            if name in names:
                self._have[names[name]].add(("proxy", address))

    def forget(self, index: int) -> None:
        """Take it that the kernel has nothing of an interface: it has gone, or down."""
        self._have.pop(index, None)

    def forget_route(self, address: str) -> int | None:
        """Take it that the route to an address is gone; return its interface, None where none should be there."""
        for index, items in self._have.items():
            if ("route", address) in items:
                items.discard(("route", address))
                return index
        return None

    def indices(self) -> set[int]:
        """Return the interfaces that the kernel has something of ours for."""
        return {index for index, items in self._have.items() if items}

    def apply(self, endpoint: LocalEndpoint, link: Link, next_hop: str | None) -> None:
        """Give the kernel what an endpoint wants, and take away what else there is on its interface.

        `next_hop` is the host's IPv6 address, if the endpoint uses one. Raises CalicoError.
        """
        for path, value in sysctls.interface_settings(link.name, bool(endpoint.addresses_of(6))).items():
            sysctls.write(path, value)
        wanted: dict[Item, None] = {}
        if next_hop is not None and endpoint.addresses_of(6):
            wanted["proxy", next_hop] = None
        for address in endpoint.addresses:
            wanted["neighbour", address, endpoint.mac] = None
            wanted["route", address] = None
        have = self._have[link.index]
        for item in wanted:
            if item not in have:
                self._add(link.index, item)
                have.add(item)
        for item in sorted(have - set(wanted)):
            # a neighbour's entry with another MAC has been replaced above
            if item[0] != "neighbour" or ("neighbour", item[1], endpoint.mac) not in wanted:
                self._remove(link.index, item)
            have.discard(item)

    def clear(self, index: int) -> None:
        """Take everything of ours off an interface; raise CalicoError."""
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
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        command = "replace" if verb == "add" else "del"
        try:
            if kind == "route":
                net = f"{address}/{128 if family == socket.AF_INET6 else 32}"
                fields: dict[str, Any] = {"family": family, "dst": net, "oif": index, "proto": PROTOCOL}
                if family == socket.AF_INET:
                    fields["scope"] = _SCOPE_LINK
                self._netlink.route(command, **fields)
            elif kind == "neighbour":
                fields = {"family": family, "dst": address, "ifindex": index}
                if verb == "add":
                    fields |= {"lladdr": item[2], "state": _NUD_PERMANENT}
                self._netlink.neigh(command, **fields)
            else:
                self._netlink.neigh(command, family=family, dst=address, ifindex=index, flags=_NTF_PROXY)
        except NetlinkError as error:
            if error.code not in ignored:
                raise CalicoError(
                    f"the kernel refused to {verb} a {kind} for {address}: {os.strerror(error.code)}"
                ) from None


def _proxies() -> list[tuple[str, str]]:
    """Return the IPv6 addresses that this host answers for in others' place, each with its interface.

    pyroute2 cannot list them.
    """
    command = ["ip", "-json", "-6", "neighbour", "show", "proxy"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return [(entry["dst"], entry["dev"]) for entry in json.loads(done.stdout or "[]")]
    except FileNotFoundError:
        raise CalicoError("ip is missing, so neighbour entries cannot be listed: install iproute2") from None
    except (subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        raise CalicoError(f"ip could not list the neighbour entries: {error}") from None
