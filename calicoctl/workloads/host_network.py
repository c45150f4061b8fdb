"""Reads from the kernel this host's addresses, its gateways, and the networks to which it is connected.

datastore/reserved.py derives from these which addresses workloads must not have.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

from calicoctl import netlink
from calicoctl.addresses import BITS, FAMILIES, number_of, unpack, version_of
from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.datastore.reserved import HostNetwork, InterfaceAddress
from calicoctl.errors import CalicoError

_NO_NETWORK = (b"", b"\xfe\x80")
"""The first two bytes of a route's packed destination, for a default route and for IPv6 link-local addresses."""

_NOT_SET_BY_OTHERS = (netlink.PROTOCOL_KERNEL, netlink.PROTOCOL_BIRD)
"""Protocols of routes that the kernel has derived from addresses, or that BIRD has learned."""


def read(others: Collection[str] = (), workloads: Collection[str] = ()) -> HostNetwork:
    """Read the addresses, networks and routes in this process's network namespace. Raises CalicoError.

    `others` are the addresses of other hosts and BGP peers; `workloads` contains one address of each IPAM block of
    other hosts. Only three fields of the result depend on these arguments: `reached` and `macs` on both, `routed` on
    `others`.
    """
    with _explained():
        names = _Names()
        network, indices = _read(FAMILIES, others, names)
        towards = {**netlink.interfaces_to(workloads, default=False), **netlink.interfaces_to(others)}
        reached = {address: frozenset(names[index] for index in found) for address, found in towards.items()}
        macs = _macs(indices, frozenset().union(*towards.values()))
        return dataclasses.replace(network, reached=reached, macs=macs)


def read_for(version: int) -> HostNetwork:
    """Read what `read` returns about addresses of one IP version; what it returns about the other may be left out.

    The fields `reached` and `macs` of the result are empty. Raises CalicoError.
    """
    with _explained():
        # a route to an IPv4 network may have an IPv6 gateway
        return _read([4] if version == 4 else FAMILIES, (), _Names())[0]


def own_addresses() -> set[str]:
    """Return all addresses of this host, including broadcast addresses. Raises CalicoError."""
    with _explained():
        return {text for one in netlink.addresses() for text in (one.address, one.broadcast) if text is not None}


def detect() -> tuple[dict[int, str | None], set[str]]:
    """Choose, for each IP version, an address at which other hosts can probably reach this host. Raises CalicoError.

    Returns the chosen addresses by IP version (None if no interface qualifies), and the set of all addresses of this
    host, without broadcast addresses.

    An interface qualifies if it has a global address of the IP version, and is not loopback, a bridge, or an interface
    of Docker, libvirt or Calico. Of the interfaces that qualify and have a default route, the one whose default route
    has the lowest metric is chosen; the address is the preferred source of this route or, if the route has none or the
    interface does not have this address, the first global address of the interface. If none of them has a default
    route, the first global address of the one with the lowest index is chosen.
    """
    from calicoctl.workloads import netns

    outside = {interface.index for interface in netns.interfaces() if _faces_outside(interface)}
    chosen: dict[int, str | None] = {}
    with _explained():
        every = list(netlink.addresses())
        for version, family in FAMILIES.items():
            usable: dict[int, list[str]] = {}
            for one in every:
                if one.family == family and one.scope == netlink.SCOPE_GLOBAL and one.index in outside:
                    usable.setdefault(one.index, []).append(one.address)
            defaults = sorted(netlink.routes(family, lengths=(0,)), key=lambda route: route.metric)
            candidates = [(route.index, route.source) for route in defaults]
            candidates += [(index, None) for index in sorted(usable)]
            chosen[version] = next(
                (
                    source if source in usable[index] else usable[index][0]
                    for index, source in candidates
                    if index in usable
                ),
                None,
            )
    return chosen, {one.address for one in every}


def _faces_outside(interface: netlink.Interface) -> bool:
    inside = ("docker", "br-", "virbr", INTERFACE_PREFIX)
    return not (interface.is_loopback or interface.kind == "bridge" or interface.name.startswith(inside))


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise CalicoError(f"this host's addresses and routes cannot be read: {why}") from None


def _read(versions: Collection[int], others: Collection[str], names: _Names) -> tuple[HostNetwork, set[int]]:
    """Read what `read` returns for these IP versions, but for the fields `reached` and `macs`.

    Returns also the indices of the interfaces with an address.
    """
    families = [FAMILIES[version] for version in versions]
    used = [one for family in families for one in netlink.addresses(link_local=False, family=family)]
    addresses = [
        InterfaceAddress(one.address, one.network, one.length, names[one.index], one.broadcast) for one in used
    ]
    hops: set[tuple[str | None, int]] = set()
    learned: set[tuple[str | None, int]] = set()
    routes: set[tuple[str, int]] = set()
    on_link: dict[tuple[str, int, str], None] = {}
    local: list[tuple[str, int]] = []
    routers: set[int] = set()
    leads_to = _Covering(others)
    for version in versions:
        family, named_by_number = FAMILIES[version], False
        for path in netlink.paths(family, netlink.UNICAST, netlink.OUR_PROTOCOLS, of_links=False):
            (learned if path.protocol == netlink.PROTOCOL_BIRD else hops).update(path.hops)
            if path.protocol not in _NOT_SET_BY_OTHERS and path.destination[:2] not in _NO_NETWORK:
                inside = bool(path.hops) and all(names[index].startswith(INTERFACE_PREFIX) for _, index in path.hops)
                if not inside:
                    routes.add((unpack(path.destination), path.length))
            named_by_number = named_by_number or not path.hops
            if path.protocol != netlink.PROTOCOL_KERNEL and leads_to.any(version, path):
                routers.update(index for _, index in path.hops)
            if (
                family == socket.AF_INET6
                and path.protocol in (netlink.PROTOCOL_KERNEL, netlink.PROTOCOL_RA)
                and path.destination[:2] not in _NO_NETWORK
            ):
                # a network advertised by a router; a host address assigned by DHCPv6 does not contain its prefix length
                network = unpack(path.destination), path.length
                on_link.update({(*network, names[index]): None for gateway, index in path.hops if gateway is None})
        if named_by_number:
            by_number = set(netlink.next_hops())
            hops |= by_number
            routers.update(index for gateway, index in by_number if gateway is not None)
        for path in netlink.paths(family, netlink.LOCAL, of_links=False):
            if path.destination and path.destination[0] != socket.INADDR_LOOPBACK >> 24:
                local.append((unpack(path.destination), path.length))
    gateways, of_bird = (
        [(gateway, names[index]) for gateway, index in found if gateway is not None] for found in (hops, learned)
    )
    whole = HostNetwork.of(addresses, gateways, local, on_link, routes, of_bird)
    routed = frozenset(name for name in map(names.__getitem__, routers) if not name.startswith(INTERFACE_PREFIX))
    return dataclasses.replace(whole, routed=routed), {one.index for one in used}


def _macs(indices: set[int], reaching: frozenset[int]) -> dict[str, frozenset[str]]:
    """Return, by interface name, the source MACs that this host's packets to other hosts may have.

    `indices` contains the indices of the interfaces with an address, `reaching` those of the interfaces through which
    this host reaches other hosts. Workloads' interfaces are left out, and so are bridges that are not in `reaching`.
    """
    found = {}
    for index in sorted(indices | reaching):
        with suppress(OSError):  # the interface was just deleted
            device = netlink.device(index)
            # bridges of containers and virtual machines come and go
            if device.name.startswith(INTERFACE_PREFIX) or (device.kind == "bridge" and index not in reaching):
                continue
            macs = device.macs
            if device.kind in ("bond", "team"):  # depending on the mode, each member uses its own MAC
                macs = macs.union(*(member.macs for member in netlink.devices_below(index)))
            if macs:
                found[device.name] = macs
    return found


class _Covering:
    """Decides whether a route leads to any address of a large set. Caches the addresses' prefixes, by prefix length."""

    def __init__(self, addresses: Collection[str]) -> None:
        self._numbers = {
            version: [number_of(one) for one in addresses if version_of(one) == version] for version in BITS
        }
        self._prefixes: dict[tuple[int, int], set[int]] = {}
        """By IP version and prefix length: the prefixes of the addresses, as integers without the host bits."""

    def any(self, version: int, path: netlink.Paths) -> bool:
        """Return whether the destination of the route `path` contains any of the addresses of the IP version.

        Returns True for every default route, even if there are no addresses of this IP version.
        """
        if path.length == 0:
            return True
        spare = BITS[version] - path.length
        prefixes = self._prefixes.get((version, path.length))
        if prefixes is None:
            prefixes = {number >> spare for number in self._numbers[version]}
            self._prefixes[version, path.length] = prefixes
        return int.from_bytes(path.destination, "big") >> spare in prefixes


class _Names(dict[int, str]):
    """Maps the indices of interfaces to their names, which are looked up and cached when they are first needed.

    For an interface that does not exist any more, the value is `interface INDEX`.
    """

    def __missing__(self, index: int) -> str:
        self[index] = f"interface {index}"
        with suppress(OSError):  # the interface was just deleted
            self[index] = socket.if_indextoname(index)
        return self[index]
