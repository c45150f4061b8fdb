"""Computes the desired state of the overlay: the tunnels to other hosts, and the routes to their workloads.

Reads only the snapshot. Pools without an overlay are left out, since BIRD programs their routes.

* A tunnel is a VXLAN device. A host's end of the tunnels has a MAC that every host computes from the host's address.
* A block of another host gets one route. But if the block overlaps a network of this host, or contains the address of a
  host, a gateway or a member of etcd, each endpoint's address in the block gets a route of its own instead. An
  endpoint's address that is in no block of the endpoint's host, such as a borrowed address, also gets one.
* A block of this host gets a blackhole route, which drops packets to unused addresses of the block. But if the block
  overlaps one of the networks or addresses that are listed in routes.py, it gets none.
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
    """This host's end of the tunnels to other hosts over one IP version, which is `version`.

    `local` is this host's address in the underlay, and `mac` is the MAC of this host's end. `peers` maps the MAC of
    each other host's end to that host's address in the underlay.
    """

    version: int
    local: str
    mac: str
    peers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Hop:
    """How packets reach the workloads of another host: through a tunnel, or without one.

    Through a tunnel, `tunnel` is the IP version of the tunnel's underlay, and `gateway` is the link-local address of
    the other host's tunnel end. Without one, `tunnel` is None, `gateway` is the other host's registered address, and
    the packets leave through the interface `interface`.
    """

    gateway: str
    tunnel: int | None = None
    interface: str = ""


def macs(addresses: Iterable[str]) -> dict[str, str]:
    """Return, for each of `addresses`, the MAC of the tunnel end of the host that has the address.

    `addresses` are those of all hosts. The result depends only on them, so all hosts compute the same MACs.
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
    """Return a locally administered unicast MAC for a host's address. Each `attempt` (a number) yields another MAC."""
    octets = hashlib.sha256(f"vxlan.calico {address} {attempt}".encode()).digest()[:6]
    return bytes([octets[0] & 0xFC | 0x02, *octets[1:]]).hex(":")


def underlay_version(topology: Topology, host: str) -> int | None:
    """Return the IP version of the tunnel to another host.

    This is 4 if both hosts have a registered IPv4 address. If not, it is 6 if both have a registered IPv6 address.
    Return None if they have no IP version in common.
    """
    for version in (4, 6):
        if topology.own(version) is not None and topology.address(host, version) is not None:
            return version
    return None


def tunnels(topology: Topology) -> dict[int, Tunnel]:
    """Return this host's ends of the tunnels, by the IP version of the underlay.

    There is an end over IPv4 if this host has a registered IPv4 address. There is an end over IPv6 if this host has a
    registered IPv6 address and, besides, either has no registered IPv4 address, or needs IPv6 to reach another host
    (see `underlay_version`).
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
    """The routes of the overlay on this host, updated with each change of the snapshot."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._pools: list[tuple[Network, str]] = []
        """The networks of all pools, each with the pool's VXLAN mode."""
        self._blocks: dict[Network, tuple[str, str]] = {}
        """The blocks that get one route each -> (host, VXLAN mode of the pool)."""
        self._hosts: dict[tuple[int, int], dict[int, str]] = {}
        """(IP version, bits after the prefix) -> prefix of a block in `_blocks`, as a number -> host of the block."""
        self._singles: dict[EndpointId, tuple[str, ...]] = {}
        """Endpoint of another host -> those of its addresses that need a route of their own."""

    @property
    def is_needed(self) -> bool:
        """Whether any pool has an overlay."""
        return any(mode != NEVER for _, mode in self._pools)

    def is_plain(self, cidr: str) -> bool:
        """Return whether a network is in a pool without an overlay."""
        pool, mode = self._pool(Network.parse(cidr))
        return pool is not None and mode == NEVER

    def update(self, dirty: Dirty) -> bool:
        """Process the changes `dirty` of the snapshot. Return whether tunnels or routes may have changed."""
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
        """Return CIDR -> Hop for each route, None for a blackhole route.

        There are no routes to CIDRs in pools without an overlay, to CIDRs of unreachable hosts, and to single addresses
        that a local endpoint has or no workload may have (see `Reserved.user`).
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
        """Return the sorted names of the hosts that this host cannot reach, since they share no IP version with it.

        Only registered hosts that have blocks in the overlay are returned.
        """
        topology = self._snapshot.topology
        hosts = {host for host, _ in self._blocks.values()} & topology.hosts() - {topology.host}
        return sorted(
            host
            for host in hosts
            if underlay_version(topology, host) is None and any(topology.address(host, v) for v in (4, 6))
        )

    def _hop(self, host: str, mode: str, version: int, tunnel_ends: dict[str, str]) -> Hop | None:
        """Return how packets reach the addresses of another host, None if that host is unreachable.

        The result is for addresses of the IP version `version`, in pools with the VXLAN mode `mode`. `tunnel_ends` maps
        the address of each other host to the MAC of that host's tunnel end. Return None, too, if `host` is another name
        of this host.
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
                if (around.overlapped(block, pool) if host == topology.host else around.vital(block)) is None:
                    self._blocks[block] = host, mode
                    bits = BITS[block.version] - block.length
                    self._hosts[block.version, bits][block.first >> bits] = host

    def _pool(self, network: Network) -> tuple[Network | None, str]:
        """Return the pool that contains a network, and the pool's VXLAN mode; (None, NEVER) if no pool contains it."""
        return next(((pool, mode) for pool, mode in self._pools if network in pool), (None, NEVER))

    def _singles_of(self, id: EndpointId) -> tuple[str, ...]:
        """Return the addresses of an endpoint that need a route of their own.

        Return () if the endpoint is local, is not active, or does not exist.
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
        """Return the host of the smallest block in `_blocks` that contains an address, None if no block contains it."""
        version, number = version_of(address), number_of(address)
        for (of, bits), hosts in sorted(self._hosts.items()):
            if of == version and number >> bits in hosts:
                return hosts[number >> bits]
        return None


def _single(address: str) -> Network:
    return Network.of(address, BITS[version_of(address)])
