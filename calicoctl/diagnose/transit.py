"""Determines the route of packets from one host to another, and the obstacles on the way, other than policy.

The input is a snapshot of the store for each of the two hosts. For a host whose kernel the caller could read, it also
includes the networks to which the host is connected. It is unknown whether the network between the hosts forwards
packets, and which BGP sessions are up, since the store does not say that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from calicoctl.addresses import BITS, number_of, version_of
from calicoctl.datastore.model import ALWAYS, NEVER, Pool
from calicoctl.datastore.reserved import HostNetwork, Network
from calicoctl.desired.overlay import underlay_version
from calicoctl.desired.snapshot import Snapshot
from calicoctl.desired.topology import Topology

BGP, AGENT = "bgp", "agent"
"""What programs the route: BIRD, which learns routes by BGP, or the agent, which derives routes from the store."""

PLAIN, VXLAN, EITHER = "plain", "vxlan", "plain or vxlan"
"""The kinds of routes. EITHER means that the kind depends on the networks of another host, which are unknown."""


@dataclass(frozen=True)
class Route:
    """The route from one host to an address on another.

    `kind` is PLAIN, VXLAN or EITHER. `destination` is the CIDR of the route: a block of the other host, or a single
    address outside its blocks. `via` is the address of the other host to which packets are sent; None if the other host
    has no suitable address. `pool` is the CIDR of the pool that contains the destination; None if no pool contains it,
    or if the destination is the other host itself. `by` is what programs the route: BGP or AGENT. `is_near` says
    whether the two hosts are connected to the same network; None if that is unknown, or if the destination is the other
    host itself.
    """

    from_host: str
    to_host: str
    kind: str
    destination: str
    via: str | None
    pool: str | None = None
    by: str = BGP
    is_near: bool | None = None


@dataclass(frozen=True)
class Obstacle:
    """A reason, other than policy, that stops or may stop a packet or its answer.

    `problem` is a sentence about `host`, which it may call "it", without its full stop. If `stops` is true, the packet
    or its answer is certainly dropped; if `stops` is false, one of them may be dropped.
    """

    host: str
    problem: str
    stops: bool


def pool_of(snapshot: Snapshot, address: str) -> Pool | None:
    """Return the pool of a snapshot that contains an address; None if no pool contains it."""
    version, number = version_of(address), number_of(address)
    return next((pool for pool in snapshot.pools.values() if Network.parse(pool.cidr).has(version, number)), None)


def route(sender: Snapshot, to_host: str, address: str, networks: dict[str, HostNetwork]) -> Route:
    """Return the route to an address on another host, `to_host`. `sender` is the snapshot of the sending host.

    `networks` maps names of hosts to their networks; it lacks the hosts whose kernels could not be read.
    """
    topology, version = sender.topology, version_of(address)
    via = topology.address(to_host, version)
    if address in topology.users:  # the address of a host itself
        return Route(sender.host, to_host, PLAIN, _single(address), via)
    pool = pool_of(sender, address)
    block = topology.block_of(to_host, address)
    mode = NEVER if pool is None else pool.vxlan
    is_near = _is_near(sender.host, to_host, topology, version, networks)
    kind = PLAIN
    if mode == ALWAYS or (mode != NEVER and is_near is False):
        kind = VXLAN
        underlay = underlay_version(topology, to_host)
        via = None if underlay is None else topology.address(to_host, underlay)
    elif mode != NEVER and is_near is None:
        kind = EITHER
    destination = _single(address) if block is None else block.cidr
    by = BGP if mode == NEVER else AGENT
    return Route(sender.host, to_host, kind, destination, via, None if pool is None else pool.cidr, by, is_near)


def _is_near(host: str, other: str, topology: Topology, version: int, networks: dict[str, HostNetwork]) -> bool | None:
    """Return whether two hosts are connected to the same network of an IP version; None if that is unknown.

    It suffices to know the networks of one of the hosts: if one of these networks contains the other host's address,
    both hosts are connected to it.
    """
    for one, far in ((host, other), (other, host)):
        address, network = topology.address(far, version), networks.get(one)
        if address is not None and network is not None:
            number = number_of(address)
            return any(net.has(version, number) for net in network.networks)
    return None


def _single(address: str) -> str:
    return f"{address}/{BITS[version_of(address)]}"


def obstacles(route: Route, sender: Topology, receiver: Topology, address: str) -> Iterator[Obstacle]:
    """Yield the obstacles for packets to `address` along `route`.

    `sender` and `receiver` are the topologies in the snapshots of the two hosts, each with its host's own BGP peers.
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
    if route.by == AGENT:
        if route.kind == VXLAN and route.via is None:
            problem = f"it is registered with no address of an IP version that {route.from_host} has, too"
            yield Obstacle(route.to_host, problem, True)
        return
    without = [topology.host for topology in both if topology.own(version) is None]
    for host in without:
        problem = f"it is registered without an IPv{version} address, so it has no BGP session for IPv{version}"
        yield Obstacle(host, problem, True)
    if without:
        return
    if not sender.mesh:
        yield from _without_mesh(both, version)
    if route.is_near is False:
        problem = f"a router is between it and {both[1].host}, which must have routes to pool {route.pool}"
        yield Obstacle(both[0].host, f"{problem}: if it has not, 'calicoctl pool add --vxlan=cross-subnet'", False)


def not_routed(sender: Topology, address: str, pool: str, networks: Collection[Network]) -> Obstacle:
    """Return the obstacle for packets to an address that is in a pool, but that no endpoint and no host has.

    `sender` is the topology of the sending host, and `pool` the CIDR of the pool. `networks` are the networks to which
    this host is connected. If the address is in a host's block, packets to it are dropped there. But if one of
    `networks` contains the address, they may reach a machine in that network first.
    """
    version, number = version_of(address), number_of(address)
    for host in sender.blocks:
        block = sender.block_of(host, address)
        if block is not None:
            problem = (
                f"no endpoint has {address}, and packets to unused addresses of its block {block.cidr} are dropped"
            )
            return Obstacle(host, problem, not any(network.has(version, number) for network in networks))
    problem = f"no endpoint has {address} of pool {pool}, and no host announces it: it follows the host's other routes"
    return Obstacle(sender.host, problem, False)


def _without_mesh(both: list[Topology], version: int) -> Iterator[Obstacle]:
    """Yield the obstacles for two hosts while the BGP mesh is off.

    There are none if the hosts have a common BGP peer, or if each is a peer of the other.
    """
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
