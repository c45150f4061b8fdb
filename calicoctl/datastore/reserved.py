"""Addresses that workloads on a host must not have, and networks from which no address is assigned automatically.

The host's own addresses, its gateways, and the addresses of registered hosts must not be routed to a workload. If the
host is connected to a network, other machines there use addresses that IPAM does not know of, so a workload gets an
address of that network only if the user requests it explicitly. Plain data: host_network.py reads the kernel, hosts.py
the registrations. IPAM and the agent's routes use this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from calicoctl.addresses import BITS, pack, unpack, version_of
from calicoctl.datastore.keys import INTERFACE_PREFIX


@dataclass(frozen=True)
class Network:
    """The network with the first address `first` (a number) and a prefix length, behind an interface of the host."""

    version: int
    first: int
    length: int
    interface: str = ""

    @classmethod
    def of(cls, address: str, length: int, interface: str = "") -> Network:
        """Return the network of a valid address."""
        version, number = _number(address)
        return cls(version, number >> (BITS[version] - length) << (BITS[version] - length), length, interface)

    @classmethod
    def parse(cls, cidr: str) -> Network:
        """Return the network of a valid CIDR."""
        address, _, length = cidr.partition("/")
        return cls.of(address, int(length))

    @property
    def size(self) -> int:
        return 1 << (BITS[self.version] - self.length)

    @property
    def last(self) -> int:
        return self.first + self.size - 1

    @property
    def cidr(self) -> str:
        return f"{self.address(self.first)}/{self.length}"

    def address(self, number: int) -> str:
        return unpack(number.to_bytes(BITS[self.version] // 8, "big"))

    def has(self, version: int, number: int) -> bool:
        return version == self.version and self.first <= number <= self.last

    def __contains__(self, other: Network) -> bool:
        return self.version == other.version and self.first <= other.first and other.last <= self.last

    def overlaps(self, other: Network) -> bool:
        return self.version == other.version and self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class InterfaceAddress:
    """An address of one of the host's interfaces, and its network as the kernel sees it.

    `network` is an address in that network: the peer's on a point-to-point link, else the address itself. `length` is
    the network's prefix length.
    """

    address: str
    network: str
    length: int
    interface: str
    broadcast: str | None = None


@dataclass(frozen=True)
class HostNetwork:
    """A host's own addresses and networks.

    `in_use` maps the host's addresses, gateways and broadcast addresses to their descriptions. All addresses of the
    networks `local` are the host's as well. `unfit` maps addresses that denote a whole network to their descriptions.
    `networks` are those to which the host is connected.

    `own` are the addresses of its interfaces, and `gateways` the next hops of routes, except those that a routing
    daemon has learned. `routes` are the destinations of such routes, except default routes.

    `reached` maps the addresses of other hosts and BGP peers, and an address in each block of another host, to the
    interfaces to which the routes to them lead: none without a route or, for a block, with only a default route.
    `routed` are the interfaces with a router that may send what comes from other hosts: it is on a default route, or on
    one to another host, in whatever table and with whatever metric. `macs` maps interfaces to the MACs from which this
    host sends to others.
    """

    in_use: Mapping[str, str] = field(default_factory=dict)
    local: tuple[Network, ...] = ()
    unfit: Mapping[str, str] = field(default_factory=dict)
    networks: tuple[Network, ...] = ()
    own: frozenset[str] = frozenset()
    gateways: frozenset[str] = frozenset()
    routes: tuple[Network, ...] = ()
    reached: Mapping[str, frozenset[str]] = field(default_factory=dict)
    routed: frozenset[str] = frozenset()
    macs: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        addresses: Iterable[InterfaceAddress],
        gateways: Iterable[tuple[str, str]] = (),
        local: Iterable[tuple[str, int]] = (),
        on_link: Iterable[tuple[str, int, str]] = (),
        routes: Iterable[tuple[str, int]] = (),
        learned: Iterable[tuple[str, str]] = (),
    ) -> HostNetwork:
        """Derive a HostNetwork from a host's addresses and routes.

        `gateways` are the next hops of routes, as (address, interface). `local` are the destinations of local routes,
        as (address, prefix length): all addresses of such a network are the host's. `on_link` are networks, as
        (address, prefix length, interface), that are reachable without a gateway, although the host has no address in
        them. `routes` are the destinations of other routes, as (address, prefix length). `learned` are the next hops of
        routes that a routing daemon has learned, as (address, interface).
        """
        own: dict[str, str] = {}
        in_use: dict[str, str] = {}
        unfit: dict[str, str] = {}
        networks: dict[Network, None] = {}
        for one in addresses:
            own[one.address] = f"this host's own address (on {one.interface})"
            if one.interface == "lo" or one.interface.startswith(INTERFACE_PREFIX):
                continue
            network = Network.of(one.network, one.length, one.interface)
            of_network = f"of {network.cidr} (on {one.interface})"
            if one.broadcast is not None:
                in_use[one.broadcast] = f"the broadcast address {of_network}"
            if network.size > 2:  # RFC 3021 and RFC 6164: in smaller ones, each address may be a machine's
                if network.version == 4:
                    in_use[network.address(network.last)] = f"the broadcast address {of_network}"
                what = "the network address" if network.version == 4 else "the anycast address of the routers"
                unfit[network.address(network.first)] = f"{what} {of_network}"
            if network.size > 1 or one.network != one.address:
                networks[network] = None
        for address, length, interface in on_link:
            network = Network.of(address, length, interface)
            is_known = (network.size == 1 and address in own) or any(network in other for other in networks)
            if not (is_known or interface == "lo" or interface.startswith(INTERFACE_PREFIX)):
                networks[network] = None
        # a workload may well be a router
        outside = [hop for hop in gateways if not hop[1].startswith(INTERFACE_PREFIX)]
        for gateway, interface in (*outside, *(hop for hop in learned if not hop[1].startswith(INTERFACE_PREFIX))):
            in_use.setdefault(gateway, f"a gateway of this host (on {interface})")
        return cls(
            {**in_use, **own},
            tuple(Network.of(*one) for one in local),
            unfit,
            tuple(networks),
            frozenset(own),
            frozenset(gateway for gateway, _ in outside),
            tuple(sorted((Network.of(*one) for one in routes), key=lambda one: (one.version, one.first, one.length))),
        )

    def has(self, address: str) -> str | None:
        """Return the description of an address that the host uses, None for any other."""
        known = self.in_use.get(address)
        if known is None and self.local:
            place = _number(address)
            network = next((network for network in self.local if network.has(*place)), None)
            known = None if network is None else f"this host's own address (in its local network {network.cidr})"
        return known

    def overlap(self, cidr: str) -> str | None:
        """Return the warning about a pool that overlaps the connected networks, None if it overlaps none."""
        networks = self.overlapping(cidr)
        if not networks:
            return None
        pool = Network.parse(cidr)
        named = ", ".join(f"{network.cidr} (on {network.interface})" for network in networks)
        if any(pool in network for network in networks):
            rest = "so none of its addresses is given out here unless it is asked for"
        else:
            rest = "so addresses in there are given out here only when they are asked for"
        return f"pool {cidr} overlaps {named}, which this host is connected to, {rest}"

    def overlapping(self, cidr: str) -> list[Network]:
        """Return the connected networks that overlap a pool."""
        pool = Network.parse(cidr)
        return [network for network in self.networks if network.overlaps(pool)]


@dataclass(frozen=True)
class Reserved:
    """The addresses that workloads on a host must not use: those of the host's network and of registered hosts.

    `registered` maps canonical addresses to names of hosts; `host` is the name of this host.
    """

    network: HostNetwork = HostNetwork()
    registered: Mapping[str, str] = field(default_factory=dict)
    host: str = ""

    def user(self, address: str) -> str | None:
        """Return a text that says which host uses an address, such as `this host's own address (on eth0)`; or None."""
        host = self.registered.get(address)
        known = self.network.has(address)
        if known is not None or host is None:
            return known
        return "this host's own address (it is registered with it)" if host == self.host else f"that of host {host}"

    def refusal(self, address: str) -> str | None:
        """Return a text that says why no workload may have an address; None if a workload may."""
        return self.user(address) or self.network.unfit.get(address)

    def is_free_for_any(self, version: int, number: int) -> bool:
        """Return whether an address (a number) may be assigned to a workload without an explicit request."""
        if any(network.has(version, number) for network in self.network.networks):
            return False
        return self.refusal(Network(version, number, BITS[version]).address(number)) is None


def _number(address: str) -> tuple[int, int]:
    return version_of(address), int.from_bytes(pack(address), "big")
