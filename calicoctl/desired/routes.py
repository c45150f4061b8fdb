"""Decides which blocks and addresses this host announces to other hosts, and which learned routes it rejects.

Reads only the snapshot. felix/bgp/config.py renders the result for BIRD. Pools with an overlay are left out, since the
agent itself programs their routes.

A block is announced as a whole, and this host drops packets to the block's unused addresses, unless the block overlaps
one of these:

* a network to which this host is connected;
* the destination of another route, unless this destination contains the whole pool, as that of the default route does;
* the address of this host, a gateway, a registered host, a member of etcd, or a DNS server.

Of a block that overlaps one of these, only the addresses of local endpoints are announced, one by one. Packets to other
addresses of the block are not dropped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calicoctl.addresses import number_of, version_of
from calicoctl.datastore.model import NEVER
from calicoctl.datastore.reserved import DNS_SERVER, MEMBER, Network, Networks

if TYPE_CHECKING:
    from calicoctl.desired.snapshot import Snapshot


@dataclass(frozen=True)
class Announced:
    """What a host announces in one IP version: the CIDRs of blocks, and single addresses, each in a stable order.

    `split` contains the blocks that are not announced as a whole, as (CIDR, description of what the block overlaps).
    """

    blocks: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    split: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Guarded:
    """The networks and addresses that routes learned from other hosts must not override on this host.

    `networks` are the CIDRs of the networks to which this host is connected, and of its local networks, of which all
    addresses are this host's own. `addresses` are the addresses of this host, its gateways, the members of its etcd,
    and the registered hosts. Both are limited to what overlaps a pool without an overlay, and have a stable order.
    """

    networks: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()


def plain_pools(snapshot: Snapshot, version: int) -> list[Network]:
    """Return the networks of the pools without an overlay, of one IP version, in ascending order."""
    pools = {Network.parse(pool.cidr) for pool in snapshot.pools.values() if pool.vxlan == NEVER}
    return _ordered(pool for pool in pools if pool.version == version)


def announced(snapshot: Snapshot, version: int) -> Announced:
    """Return what this host announces in an IP version."""
    pools = plain_pools(snapshot, version)
    whole: list[Network] = []
    split: list[tuple[str, str]] = []
    surroundings = Surroundings(snapshot, version)
    own = snapshot.topology.blocks.get(snapshot.host, {}).values()
    for block in _ordered(block for block in own if block.version == version):
        pool = next((pool for pool in pools if block in pool), None)
        if pool is None:
            continue
        overlapped = surroundings.overlapped(block, pool)
        if overlapped is None:
            whole.append(block)
        else:
            split.append((block.cidr, overlapped))
    covered, inside = Networks(whole), Networks(pools)
    singles = []
    for endpoint in snapshot.local.values():
        for address in endpoint.addresses:
            if version_of(address) == version:
                number = number_of(address)
                if not covered.has(version, number) and inside.has(version, number):
                    singles.append((number, address))
    return Announced(
        tuple(block.cidr for block in whole), tuple(address for _, address in sorted(set(singles))), tuple(split)
    )


def guarded(snapshot: Snapshot, version: int) -> Guarded:
    """Return the networks and addresses of an IP version that routes learned from other hosts must not override."""
    pools = plain_pools(snapshot, version)
    inside = Networks(pools)
    surroundings = Surroundings(snapshot, version)
    networks = {network.cidr for network in surroundings.networks if any(network.overlaps(pool) for pool in pools)}
    addresses = {address for number, address, _ in surroundings.addresses if inside.has(version, number)}
    return Guarded(tuple(sorted(networks)), tuple(sorted(addresses)))


class Surroundings:
    """The networks and addresses of one IP version that a block must not overlap to be announced as a whole.

    These are the networks to which this host is connected and its local networks (both in `networks`), the destinations
    of its routes, and the addresses of this host, its gateways, the registered hosts, the members of etcd, and the DNS
    servers. `addresses` are all of these addresses except the DNS servers'.
    """

    def __init__(self, snapshot: Snapshot, version: int) -> None:
        network = snapshot.network
        self.networks = [one for one in (*network.networks, *network.local) if one.version == version]
        self.routes = [one for one in network.routes if one.version == version]
        known = dict.fromkeys(network.servers.members, MEMBER)
        known.update(dict.fromkeys(network.own, "this host's own address"))
        known.update(dict.fromkeys(network.gateways, "a gateway of this host"))
        known.update({address: f"the address of host {host}" for address, host in snapshot.topology.users.items()})
        self.addresses = _of_version(known, version)
        self._dns = _of_version(dict.fromkeys(network.servers.dns, DNS_SERVER), version)

    def vital(self, block: Network) -> str | None:
        """Return a description of the first of `networks` or `addresses` that a block overlaps, None if there is none.

        This host must go on reaching these by its own routes. DNS servers and other routes' destinations do not count.
        """
        for network in self.networks:
            if network.overlaps(block):
                return f"{network.cidr}, which this host is connected to"
        return _inside(block, self.addresses)

    def overlapped(self, block: Network, pool: Network) -> str | None:
        """Return a description of what a block of `pool` overlaps, None if it overlaps nothing.

        The block may overlap what `vital` describes, the address of a DNS server, or the destination of a route.
        Routes whose destination contains the whole pool are ignored.
        """
        found = self.vital(block) or _inside(block, self._dns)
        if found is not None:
            return found
        for route in self.routes:
            if route.overlaps(block) and pool not in route:
                return f"{route.cidr}, which this host has a route to"
        return None


def _of_version(known: Mapping[str, str], version: int) -> list[tuple[int, str, str]]:
    """Return the addresses of an IP version in ascending order, each as (number, address, description)."""
    return sorted(
        (number_of(address), address, what) for address, what in known.items() if version_of(address) == version
    )


def _inside(block: Network, addresses: list[tuple[int, str, str]]) -> str | None:
    """Return a description of the first of `addresses` that a block contains, None if it contains none.

    `addresses` are from `_of_version`.
    """
    at = bisect_left(addresses, (block.first,))
    for number, address, what in addresses[at : at + 1]:
        if number <= block.last:
            return f"{address}, {what}"
    return None


def _ordered(networks: Iterable[Network]) -> list[Network]:
    return sorted(networks, key=lambda network: (network.first, network.length))
