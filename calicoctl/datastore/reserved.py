"""Addresses that workloads on a host must not have, and networks from which no address is assigned automatically.

No workload is assigned an address of the host, its gateways, the members of its etcd, its DNS servers, or other
registered hosts. In a network to which the host is connected, other machines may use any address, so a workload is
assigned an address of such a network only on explicit request.

Accesses neither the kernel nor the store: workloads/host_network.py, workloads/servers.py and hosts.py read the data.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from calicoctl.addresses import BITS, number_of, unpack, version_of
from calicoctl.datastore.keys import INTERFACE_PREFIX

MEMBER = "a member of the etcd that this host uses"

DNS_SERVER = "a DNS server of this host"

MAX_AGE = 1.0
"""The maximum age, in seconds, of what the commands of a batch use again: see `reuse`."""


@dataclass(frozen=True)
class Network:
    """An IP network. `version` is the IP version, `first` the first address as a number, `length` the prefix length.

    `interface` is the name of the host's interface to the network, "" if it is unknown.
    """

    version: int
    first: int
    length: int
    interface: str = ""

    @classmethod
    def of(cls, address: str, length: int, interface: str = "") -> Network:
        """Return the network with the prefix length `length` that contains `address`, a valid address."""
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


class Networks:
    """A set of networks with a fast test of whether any of them contains an address."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self._firsts: dict[tuple[int, int], set[int]] = defaultdict(set)
        for network in networks:
            shift = BITS[network.version] - network.length
            self._firsts[network.version, shift].add(network.first >> shift)

    def has(self, version: int, number: int) -> bool:
        return any(of == version and number >> shift in firsts for (of, shift), firsts in self._firsts.items())


@dataclass(frozen=True)
class Servers:
    """The canonical addresses of servers that a host depends on: the members of its etcd, and its DNS servers.

    `unknown` are the names of the members of which no address is known.
    """

    members: frozenset[str] = frozenset()
    dns: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()

    @property
    def vital(self) -> frozenset[str]:
        """The addresses that the host needs to reach its etcd, including DNS servers if `unknown` is not empty."""
        return self.members | self.dns if self.unknown else self.members


@dataclass(frozen=True)
class InterfaceAddress:
    """An address of one of the host's interfaces.

    `network` is an address in the network behind the interface, and `length` is that network's prefix length. On a
    point-to-point link, `network` is the peer's address. On any other link, it is the same as `address`. `interface` is
    the interface's name. `broadcast` is the broadcast address, None if the interface has none.
    """

    address: str
    network: str
    length: int
    interface: str
    broadcast: str | None = None


@dataclass(frozen=True)
class HostNetwork:
    """A host's own addresses and networks.

    `in_use` maps addresses to descriptions: the host's own addresses, the addresses of its gateways and of the members
    of its etcd, and broadcast addresses. All addresses of the networks in `local` are the host's own addresses, too.
    `unfit` maps addresses that stand for a whole network (network addresses, and anycast addresses of routers) to
    descriptions. `networks` are the networks to which the host is connected.

    `own` are the addresses of the host's interfaces. `gateways` are the next hops of routes. `routes` are the
    destinations of routes, without default routes and the kernel's own routes. In both, routes to workloads are left
    out, and so are routes that a routing daemon has learned.

    `reached` maps addresses to the interfaces of the routes to them: the addresses of other hosts and of BGP peers, and
    one address in each block of another host. If there is no route to an address, its set of interfaces is empty. For
    an address in a block, default routes are ignored. `routed` are the interfaces of default routes and of routes to
    other hosts. `macs` maps interfaces to the source MACs of this host's packets to other hosts. `servers` are the
    servers that the host depends on.
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
    servers: Servers = Servers()

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
        as (address, prefix length). `on_link` are networks that are reachable without a gateway, as (address, prefix
        length, interface). `routes` are the destinations of unicast routes, as (address, prefix length), without
        default routes and the routes that the kernel derives from addresses. `learned` are the next hops of routes that
        a routing daemon has learned, as (address, interface). The fields `reached`, `routed`, `macs` and `servers` of
        the result have their defaults.
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
            if network.size > 2:  # RFC 3021 and RFC 6164: in smaller networks, every address may belong to a machine
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
        # a gateway may be a workload: its address is not reserved
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

    def with_servers(self, servers: Servers) -> HostNetwork:
        """Return a copy with these `servers`. The members among them are added to `in_use`."""
        members = dict.fromkeys(servers.members, MEMBER)
        return replace(self, in_use={**members, **self.in_use}, servers=servers)

    def has(self, address: str) -> str | None:
        """Return the description of an address in `in_use` or `local`, None for any other address."""
        known = self.in_use.get(address)
        if known is None and self.local:
            place = _number(address)
            network = next((network for network in self.local if network.has(*place)), None)
            known = None if network is None else f"this host's own address (in its local network {network.cidr})"
        return known

    def overlap(self, cidr: str) -> str | None:
        """Return a warning if the pool `cidr` overlaps any of `networks`, None if it overlaps none."""
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
        """Return those of `networks` that overlap the pool `cidr`."""
        pool = Network.parse(cidr)
        return [network for network in self.networks if network.overlaps(pool)]


@dataclass(frozen=True)
class Reserved:
    """The addresses that workloads on a host must not have: those in its HostNetwork, and those of registered hosts.

    `registered` maps canonical addresses to the names of the hosts that have registered them. `host` is the name of
    this host.
    """

    network: HostNetwork = HostNetwork()
    registered: Mapping[str, str] = field(default_factory=dict)
    host: str = ""

    def user(self, address: str) -> str | None:
        """Return a description of what uses `address`, such as "this host's own address (on eth0)".

        Returns None if no host is registered with the address, and `HostNetwork.has` does not know it.
        """
        host = self.registered.get(address)
        known = self.network.has(address)
        if known is not None or host is None:
            return known
        return "this host's own address (it is registered with it)" if host == self.host else f"that of host {host}"

    def refusal(self, address: str) -> str | None:
        """Return why `address` must not be newly assigned to a workload, None if it may be assigned."""
        is_dns = address in self.network.servers.dns
        return self.user(address) or (DNS_SERVER if is_dns else self.network.unfit.get(address))

    def is_free_for_any(self, version: int, number: int) -> bool:
        """Return whether the address `number` may be assigned to a workload that has not requested this very address.

        It is not checked whether another workload has the address.
        """
        if any(network.has(version, number) for network in self.network.networks):
            return False
        return self.refusal(Network(version, number, BITS[version]).address(number)) is None


_recent: dict[int, tuple[float, Reserved]] | None = None
"""IP version -> when the last Reserved was read (time.monotonic), and that. None while none may be used again."""


def reuse(allowed: bool) -> None:
    """While `allowed` is true, let `recent_or_read` return what it has returned in the last MAX_AGE seconds.

    So lines of a batch that connect workloads read this once a second, in place of once for each of them.
    """
    global _recent
    if not allowed:
        _recent = None
    elif _recent is None:
        _recent = {}


def recent_or_read(version: int, read: Callable[[], Reserved]) -> Reserved:
    """Return what workloads must not have of an IP version: the result of `read`, or a recent one (see `reuse`)."""
    now = time.monotonic()
    if _recent is None:
        return read()
    if version not in _recent or now - _recent[version][0] > MAX_AGE:
        _recent[version] = now, read()
    return _recent[version][1]


def _number(address: str) -> tuple[int, int]:
    return version_of(address), number_of(address)
