"""How packets get from one host to another, and what may stop them on the way beyond policy, as far as the store knows.

Reads nothing: the store comes as snapshots, one as each of the two hosts' agents sees it. Whether the network between
the hosts forwards the packets is beyond the store; so is what BGP sessions are up, of other hosts than this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from calicoctl.addresses import BITS, pack, version_of
from calicoctl.datastore.model import Pool
from calicoctl.datastore.reserved import HostNetwork, Network
from calicoctl.desired.snapshot import Snapshot
from calicoctl.desired.topology import Topology

PLAIN, VXLAN, EITHER = "plain", "vxlan", "plain or vxlan"
"""The kinds of routes. EITHER: it depends on the networks of a host that is not this one."""


@dataclass(frozen=True)
class Route:
    """The route of one host to an address on another.

    `destination` is the CIDR that the other host announces: its block, or a single address outside of its blocks. `via`
    is the other host's address, None if it has none. `pool` is the CIDR of the destination's pool, None if it is in no
    pool or is that of the host itself.
    """

    from_host: str
    to_host: str
    kind: str
    destination: str
    via: str | None
    pool: str | None = None


@dataclass(frozen=True)
class Obstacle:
    """What stands in a packet's way beyond policy, on or before `host`: a sentence without its full stop.

    `stops` says whether it certainly stops the packet, or its answer; otherwise, it may.
    """

    host: str
    problem: str
    stops: bool


def pool_of(snapshot: Snapshot, address: str) -> Pool | None:
    """Return the pool that an address is in, None for none."""
    version, number = version_of(address), int.from_bytes(pack(address), "big")
    return next((pool for pool in snapshot.pools.values() if Network.parse(pool.cidr).has(version, number)), None)


def route(sender: Snapshot, to_host: str, address: str, networks: dict[str, HostNetwork]) -> Route:
    """Return the route of the host that `sender` is the snapshot of to an address on another host.

    `networks` are the networks of the hosts whose kernels could be read, by host.
    """
    topology, version = sender.topology, version_of(address)
    via = topology.address(to_host, version)
    if address in topology.users:  # the host itself
        return Route(sender.host, to_host, PLAIN, _single(address), via)
    pool = pool_of(sender, address)
    block = topology.block_of(to_host, address)
    kind = PLAIN
    if pool is not None and pool.vxlan == "always":
        kind = VXLAN
    elif pool is not None and pool.vxlan == "cross-subnet":
        kind = _cross_subnet(sender.host, to_host, topology, version, networks)
    if kind != PLAIN:
        via = via or topology.address(to_host, 10 - version)
    destination = _single(address) if block is None else block.cidr
    return Route(sender.host, to_host, kind, destination, via, None if pool is None else pool.cidr)


def _cross_subnet(host: str, other: str, topology: Topology, version: int, networks: dict[str, HostNetwork]) -> str:
    """Return the kind of route between two hosts in a pool that encapsulates only what goes through a router.

    Either host's networks decide it: where one is connected to the other's network, the reverse is true as well.
    """
    for one, far in ((host, other), (other, host)):
        address, network = topology.address(far, version), networks.get(one)
        if address is not None and network is not None:
            number = int.from_bytes(pack(address), "big")
            return PLAIN if any(net.has(version, number) for net in network.networks) else VXLAN
    return EITHER


def _single(address: str) -> str:
    return f"{address}/{BITS[version_of(address)]}"


def obstacles(route: Route, sender: Topology, receiver: Topology, address: str) -> Iterator[Obstacle]:
    """Yield what stands in the way of packets to `address` along a route.

    `sender` and `receiver` are the network between the hosts as each of the two sees it, with its own BGP peers.
    """
    version, both = version_of(address), sorted((sender, receiver), key=lambda topology: topology.host)
    unregistered = [topology for topology in both if topology.host not in topology.hosts()]
    for topology in unregistered:
        yield Obstacle(topology.host, "it is not registered, so no other host has a route to it", True)
    if unregistered:
        return
    if address in receiver.users:
        return
    if route.pool is None:
        problem = f"{address} is in no pool, so other hosts accept no route to it"
        yield Obstacle(route.to_host, f"{problem}: add one with 'calicoctl pool add'", True)
        return
    if route.kind == VXLAN:
        return
    for topology in both:
        if topology.own(version) is None:
            problem = f"it is registered without an IPv{version} address, so it has no BGP session for IPv{version}"
            yield Obstacle(topology.host, problem, route.kind == PLAIN)
            return
    if not sender.mesh:
        yield from _without_mesh(both, version)


def _without_mesh(both: list[Topology], version: int) -> Iterator[Obstacle]:
    """Yield what is missing for two hosts to learn each other's routes from their own BGP peers."""
    one, other = ({peer.ip for peer in topology.peers.values() if version_of(peer.ip) == version} for topology in both)
    if one & other or (both[1].own(version) in one and both[0].own(version) in other):
        return
    without = [topology.host for topology, peers in zip(both, (one, other)) if not peers]
    for host in without:
        problem = f"the BGP mesh is off, and it has no IPv{version} peer"
        yield Obstacle(host, f"{problem}: 'calicoctl bgp peer add' or 'calicoctl bgp node-mesh on'", True)
    if not without:
        problem = f"the BGP mesh is off, and {both[1].host} has no peer in common with it"
        peers = f"{', '.join(sorted(one))} and {', '.join(sorted(other))} must exchange routes"
        yield Obstacle(both[0].host, f"{problem}: {peers}", False)
