"""Decides the desired state of the overlay on this host: the tunnels to other hosts, and the routes to their workloads.

Pure: reads only the snapshot, not the kernel. Only pools with an overlay are considered: BIRD programs the routes of
pools without one.

* A tunnel is a VXLAN device. The MAC of a host's end is computed from the host's address, so no host must announce it.
* A block of another host normally gets one route. The exception is a block that overlaps a network to which this host
  is connected, or the address of a host, a gateway or a member of etcd: then each endpoint's address in the block gets
  a route. So does any endpoint's address that is in no block of the endpoint's host, for example a borrowed address.
* A block of this host gets a blackhole route, which drops packets to unused addresses of the block: otherwise, the
  default route would send them to a router, which might send them back. The exceptions are the same as for blocks in
  pools without an overlay: see routes.py.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calicoctl.addresses import BITS, host_net, link_local, number_of, version_of
from calicoctl.datastore.model import ALWAYS, NEVER
from calicoctl.datastore.reserved import Network
from calicoctl.desired.local_endpoint import usable_addresses
from calicoctl.desired.routes import Surroundings

if TYPE_CHECKING:
    from calicoctl.datastore.keys import EndpointId
    from calicoctl.desired.snapshot import Dirty, Snapshot
    from calicoctl.desired.topology import Topology


@dataclass(frozen=True)
class Tunnel:
    """This host's end of the tunnels over the underlay of one IP version.

    `local` is this host's address in the underlay, `mac` the MAC of its end. `peers` maps the MACs of the other hosts'
    ends to the addresses of these hosts in the underlay.
    """

    version: int
    local: str
    mac: str
    peers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Hop:
    """How the workloads of another host are reached.

    `tunnel` is the IP version of the underlay of the tunnel. If it is None, packets are sent without a tunnel, through
    this host's interface `interface`. `gateway` is the address of the other host: in a tunnel, the link-local address
    of its end, else its registered address.
    """

    gateway: str
    tunnel: int | None = None
    interface: str = ""


def macs(addresses: Iterable[str]) -> dict[str, str]:
    """Return host address -> MAC of the host's end of the tunnel.

    All hosts compute the same MACs, even in the unlikely case that the digests of two addresses collide.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for address in sorted(set(addresses)):
        attempt = 0
        while (mac := _digest(address, attempt)) in taken:
            attempt += 1
        found[address] = mac
        taken.add(mac)
    return found


def _digest(address: str, attempt: int) -> str:
    """Return a MAC for a host's address, another one for each `attempt`.

    It is a locally administered unicast MAC: the last two bits of its first octet are 10.
    """
    octets = hashlib.sha256(f"vxlan.calico {address} {attempt}".encode()).digest()[:6]
    return bytes([octets[0] & 0xFC | 0x02, *octets[1:]]).hex(":")


def underlay_version(topology: Topology, host: str) -> int | None:
    """Return the IP version of the tunnel to another host: IPv4 if both hosts are registered with it, else IPv6.

    None if the two hosts have no IP version in common.
    """
    for version in (4, 6):
        if topology.own(version) is not None and topology.address(host, version) is not None:
            return version
    return None


def tunnels(topology: Topology) -> dict[int, Tunnel]:
    """Return this host's tunnels by IP version of the underlay.

    There is a tunnel over IPv4 if this host is registered with IPv4. There is a tunnel over IPv6 if this host is
    registered with IPv6 alone, or shares only IPv6 with another host.
    """
    found: dict[int, Tunnel] = {}
    others = topology.hosts() - {topology.host}
    for version in (4, 6):
        own = topology.own(version)
        reached = [host for host in others if underlay_version(topology, host) == version]
        if own is None or (version == 6 and topology.own(4) is not None and not reached):
            continue
        known = {host: topology.address(host, version) for host in topology.hosts()}
        mac_of = macs(address for address in known.values() if address is not None)
        peers = {address: mac_of[address] for address in map(known.get, reached) if address not in (None, own)}
        found[version] = Tunnel(version, own, mac_of[own], {mac: address for address, mac in peers.items()})
    return found


class Overlay:
    """The routes of the overlay, updated incrementally, since most changes of endpoints do not affect them."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._pools: list[tuple[Network, str]] = []
        """The networks of all pools, each with the pool's mode of VXLAN."""
        self._blocks: dict[Network, tuple[str, str]] = {}
        """The blocks that get one route each, with their host and their pool's mode of VXLAN."""
        self._hosts: dict[tuple[int, int], dict[int, str]] = {}
        """(IP version, bits after the prefix) -> prefix of a block in `_blocks` (a number) -> the block's host."""
        self._singles: dict[EndpointId, tuple[str, ...]] = {}
        """Endpoint of another host -> its addresses that get routes of their own."""

    @property
    def is_needed(self) -> bool:
        """Whether any pool has an overlay."""
        return any(mode != NEVER for _, mode in self._pools)

    def is_plain(self, cidr: str) -> bool:
        """Return whether a network is in a pool without an overlay."""
        pool, mode = self._pool(Network.parse(cidr))
        return pool is not None and mode == NEVER

    def update(self, dirty: Dirty) -> bool:
        """Process changes of the snapshot. Return whether tunnels or routes may have changed."""
        changed = dirty.endpoints if self.is_needed else set()
        reread = dirty.pools or dirty.topology
        if reread:
            changed = changed | self._reread_blocks()
        different = False
        for id in changed:
            before, now = self._singles.get(id, ()), self._singles_of(id)
            if now:
                self._singles[id] = now
            else:
                self._singles.pop(id, None)
            # a local endpoint may have, or have had, an address in `_singles`: such an address gets no route
            different = different or before != now or (id.host == self._snapshot.host and bool(self._singles))
        return reread or different

    def routes(self) -> dict[str, Hop | None]:
        """Return the routes by CIDR; None means a blackhole route.

        CIDRs in pools without an overlay are left out. So are CIDRs of hosts that cannot be reached, and single
        addresses that a local endpoint has, or that a host uses (see `Reserved.user`).
        """
        snapshot = self._snapshot
        owners: dict[str, tuple[str, str]] = {block.cidr: owner for block, owner in self._blocks.items()}
        reserved = snapshot.admission.reserved
        for id in sorted(self._singles, key=lambda id: (id.host, id.endpoint)):
            for address in self._singles[id]:
                if snapshot.owner(address) is None and reserved.user(address) is None:
                    owners.setdefault(host_net(address), (id.host, self._pool(_single(address))[1]))
        hops: dict[tuple[str, str, int], Hop | None] = {}
        tunnel_ends = {
            address: mac for tunnel in tunnels(snapshot.topology).values() for mac, address in tunnel.peers.items()
        }
        found: dict[str, Hop | None] = {}
        for cidr, (host, mode) in owners.items():
            if host == snapshot.host:
                found[cidr] = None
                continue
            key = host, mode, version_of(cidr)
            if key not in hops:
                hops[key] = self._hop(*key, tunnel_ends)
            hop = hops[key]
            if hop is not None:
                found[cidr] = hop
        return found

    def out_of_reach(self) -> list[str]:
        """Return, sorted, the registered hosts with blocks that share no IP version with this host, so get no route."""
        topology = self._snapshot.topology
        hosts = {host for host, _ in self._blocks.values()} & topology.hosts() - {topology.host}
        return sorted(
            host
            for host in hosts
            if underlay_version(topology, host) is None and any(topology.address(host, v) for v in (4, 6))
        )

    def _hop(self, host: str, mode: str, version: int, tunnel_ends: dict[str, str]) -> Hop | None:
        """Return how packets reach a host's workloads at addresses of an IP version, in pools with a mode of VXLAN.

        None if the host is out of reach, or is this host under another name. `tunnel_ends` maps the addresses of other
        hosts to the MACs of their tunnel ends.
        """
        topology = self._snapshot.topology
        address = topology.address(host, version)
        if any(topology.address(host, v) in self._snapshot.network.own for v in (4, 6)):
            return None  # this host is registered under another name as well
        if mode != ALWAYS and address is not None:
            place = version, number_of(address)
            network = next((one for one in self._snapshot.network.networks if one.has(*place)), None)
            if network is not None:
                return Hop(address, interface=network.interface)
        underlay = underlay_version(topology, host)
        end = tunnel_ends.get(topology.address(host, underlay) or "") if underlay is not None else None
        return None if end is None else Hop(link_local(end), underlay)

    def _reread_blocks(self) -> set[EndpointId]:
        """Read pools and blocks from the snapshot again. Return the endpoints whose `_singles` may have changed."""
        pools, blocks = self._pools, self._blocks
        self._read_blocks()
        if not self.is_needed:
            return set(self._singles)
        # blocks of different sizes may contain each other
        if pools != self._pools or len(self._hosts) > len(BITS):
            return set(self._singles) | self._snapshot.endpoints.keys()
        hosts = {host for _, (host, _) in blocks.items() ^ self._blocks.items()}
        return {id for id in (*self._singles, *self._snapshot.endpoints) if id.host in hosts}

    def _read_blocks(self) -> None:
        topology = self._snapshot.topology
        self._pools = [(Network.parse(pool.cidr), pool.vxlan) for pool in self._snapshot.pools.values()]
        self._blocks, self._hosts = {}, defaultdict(dict)
        if not self.is_needed:
            return
        surroundings = {version: Surroundings(self._snapshot, version) for version in BITS}
        claimed: set[Network] = set()
        # if two hosts claim a block at the same time, both have affinity to it for a moment
        for host in sorted(topology.blocks, key=lambda host: (host != topology.host, host)):
            for block in topology.blocks[host].values():
                pool, mode = self._pool(block)
                if pool is None or mode == NEVER or block in claimed:
                    continue
                claimed.add(block)
                around = surroundings[block.version]
                if (around.overlapped(block, pool) if host == topology.host else around.needed(block)) is None:
                    self._blocks[block] = host, mode
                    bits = BITS[block.version] - block.length
                    self._hosts[block.version, bits][block.first >> bits] = host

    def _pool(self, network: Network) -> tuple[Network | None, str]:
        """Return the pool that contains a network, and the pool's mode of VXLAN; (None, NEVER) if none contains it."""
        return next(((pool, mode) for pool, mode in self._pools if network in pool), (None, NEVER))

    def _singles_of(self, id: EndpointId) -> tuple[str, ...]:
        """Return the addresses of an endpoint of another host that get routes of their own.

        () if the endpoint is local, is not active, or does not exist.
        """
        endpoint = self._snapshot.endpoints.get(id)
        if endpoint is None or id.host == self._snapshot.host or endpoint.state != "active":
            return ()
        return tuple(
            address
            for address in usable_addresses(endpoint)
            if self._host_of(address) != id.host and self._pool(_single(address))[1] != NEVER
        )

    def _host_of(self, address: str) -> str | None:
        """Return the host of the smallest block in `_blocks` that contains an address, None if none does."""
        version, number = version_of(address), number_of(address)
        for (of, bits), hosts in sorted(self._hosts.items()):
            if of == version and number >> bits in hosts:
                return hosts[number >> bits]
        return None


def _single(address: str) -> Network:
    return Network.of(address, BITS[version_of(address)])
