"""Evaluates whether a packet would pass between two places, and which rule decides. Sends no packet.

Reads the store, queries Docker for containers' ids, and reads this host's addresses, routes and networks. Policy is
evaluated by enforcement.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from calicoctl.addresses import BITS, FAMILIES, check_unicast, number_of, parse_address, version_of
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint, Pool
from calicoctl.datastore.reserved import Network
from calicoctl.desired.local_endpoint import usable_addresses
from calicoctl.diagnose import transit
from calicoctl.diagnose.enforcement import SOURCE_PORT, Cause, Enforcement, Place, Ruling
from calicoctl.diagnose.transit import Obstacle, Route
from calicoctl.errors import CalicoError, DockerUnavailable, NoSuchContainer, NotFound
from calicoctl.felix import process
from calicoctl.felix.dataplane.host_rules import BGP_PORT
from calicoctl.policy.rules import ICMP, ICMPV6, PROTOCOLS
from calicoctl.policy.verdict import Packet, Verdict
from calicoctl.workloads.libnetwork import CONTAINER
from calicoctl.workloads.workload import (
    Workload,
    ambiguous,
    find_connected,
    refuse_others_endpoint,
    workload_of,
)

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.desired.topology import Topology

_ECHO_REQUEST = {ICMP: 8, ICMPV6: 128}


@dataclass(frozen=True)
class Decision:
    """The decision about the packet at one endpoint.

    `direction` is "outbound" at the source and "inbound" at the destination. `profile` is the profile whose rule
    decided, or the profile that is missing or has invalid rules. It is None if no rule matched, or if the decision does
    not depend on profiles.
    """

    direction: str
    allowed: bool
    why: str
    profile: str | None = None
    rule: int | None = None
    """The position, from 1, of the rule that decided, in the profile's list for this direction; None if there is
    none."""
    host: str | None = None
    """The host that enforces the decision."""


@dataclass(frozen=True)
class Trace:
    """The path of a packet, with one decision for each end that is an endpoint, the source first.

    The decision at the destination is included even if the packet is dropped at the source. `route` is the route from
    the source's host to the destination's host. It is None if both are the same host, or if one end is not on a host.
    `sent_from` is the source address after masquerading, None if the packet is not masqueraded. `obstacles` are the
    reasons, other than policy, that stop or may stop the packet or its answer.
    """

    source: Place
    destination: Place
    packet: Packet
    decisions: tuple[Decision, ...]
    route: Route | None = None
    sent_from: str | None = None
    obstacles: tuple[Obstacle, ...] = ()

    @property
    def allowed(self) -> bool:
        """Whether policy lets the packet pass."""
        return self.denied_by is None

    @property
    def passes(self) -> bool:
        """Whether policy lets the packet pass, and no obstacle certainly stops it, or its answer."""
        return self.allowed and self.stopped_by is None

    @property
    def denied_by(self) -> Decision | None:
        """The first decision that drops the packet; None if policy lets it pass."""
        return next((decision for decision in self.decisions if not decision.allowed), None)

    @property
    def stopped_by(self) -> Obstacle | None:
        """The first obstacle that certainly stops the packet or its answer; None if there is none."""
        return next((obstacle for obstacle in self.obstacles if obstacle.stops), None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "allowed": self.allowed,
            "passes": self.passes,
            "from": asdict(self.source),
            "to": asdict(self.destination),
            "protocol": self.packet.protocol,
            "source_port": self.packet.source_port,
            "port": self.packet.destination_port,
            "decisions": [asdict(decision) for decision in self.decisions],
            "route": None if self.route is None else asdict(self.route),
            "sent_from": self.sent_from,
            "obstacles": [asdict(obstacle) for obstacle in self.obstacles],
        }


def trace(
    datastore: DatastoreClient,
    source: str,
    destination: str,
    protocol: str,
    port: int | None,
    source_port: int | None = None,
) -> Trace:
    """Evaluate the path of a packet: the first packet of a connection or, for ICMP, an echo request.

    `source` and `destination` are each a container, a namespace's path, an endpoint id, a host name or an address. If
    they have several addresses, the first pair of the same IP version is used, IPv4 before IPv6. `protocol` is `tcp`,
    `udp`, `icmp` or `icmpv6`. `port` is the destination port, and `source_port` the source port (None: SOURCE_PORT);
    ICMP ignores both.

    Raises CalicoError, for example if a place does not exist, or if neither place is an endpoint.
    """
    store = _Store(datastore)
    number = PROTOCOLS[protocol]
    sides = [store.places(name) for name in (source, destination)]
    version = {ICMP: 4, ICMPV6: 6}.get(number)
    versions = [version] if version else [4, 6]
    pairs = [(a, b) for v in versions for a in sides[0] for b in sides[1] if _of(a, v) and _of(b, v)]
    if not pairs:
        which = f"IPv{version} address" if version else "address of the same IP version"
        raise CalicoError(f"{source} and {destination} do not both have an {which}, so there is no such packet.")
    one, other = pairs[0]
    if one.endpoint is None and other.endpoint is None:
        raise CalicoError(f"Neither {source} nor {destination} is an endpoint: no profile decides between them.")
    if number in _ECHO_REQUEST:
        packet = Packet(one.address, other.address, number, icmp_type=_ECHO_REQUEST[number], icmp_code=0)
    else:
        packet = Packet(one.address, other.address, number, source_port or SOURCE_PORT, port)
    return store.trace(one, other, packet)


def _of(place: Place, version: int) -> bool:
    return version_of(place.address) == version


class _Store:
    """Resolves names to places, and evaluates paths between them."""

    def __init__(self, datastore: DatastoreClient) -> None:
        self._datastore = datastore
        self._enforcement = Enforcement(datastore)
        self._endpoints = self._enforcement.endpoints
        self._seen_by = self._enforcement.seen_by

    # From names to places

    def places(self, name: str) -> list[Place]:
        """Return a Place for each address of what `name` names.

        `name` is a container, a namespace's path, an endpoint id, a host name or an address. Raises CalicoError if it
        names nothing, if it can mean several things, or if what it names has no address.
        """
        try:
            address = str(parse_address(name))
        except CalicoError:
            pass
        else:
            check_unicast(parse_address(name))
            owners = [id for id, endpoint in self._endpoints.items() if address in usable_addresses(endpoint)]
            if not owners and (unreadable := self._unreadable_with(address)) is not None:
                raise CalicoError(
                    f"{name} is of endpoint {unreadable.endpoint}, whose record cannot be read: see 'endpoint show'."
                )
            usable = [id for id in owners if id in self._seen_by(id.host).local]
            id = next(iter(usable or owners), None)
            return [Place(name, address, id, self._host_with(address) if id is None else id.host)]
        try:
            endpoint = self._endpoint(name)
        except (NotFound, NoSuchContainer, DockerUnavailable):
            topology = self._seen_by(self._datastore.host).topology
            addresses = [topology.address(name, version) for version in (4, 6)]
            places = [Place(name, address, None, name) for address in addresses if address is not None]
            if not places:
                raise
            return places
        usable_ones = usable_addresses(endpoint)
        if not usable_ones:
            raise CalicoError(f"{name} has no addresses.")
        return [Place(name, address, endpoint.id, endpoint.id.host) for address in usable_ones]

    def _unreadable_with(self, address: str) -> EndpointId | None:
        """Return an endpoint whose value has an address, but is invalid or gives it a prefix, None if there is none."""
        with_prefix = any(address in endpoint.addresses for endpoint in self._endpoints.values())
        if not with_prefix and not self._enforcement.unreadable:
            return None
        of = parse_address(address)
        return next(iter(self._datastore.endpoints_with(of, self._datastore.ipam.owner(of))), None)

    def _host_with(self, address: str) -> str | None:
        """Return the host that has an address as its own.

        This is the host that is registered with the address, or this host if one of its interfaces has the address.
        Return None if there is neither.
        """
        from calicoctl.workloads import host_network

        host = self._seen_by(self._datastore.host).topology.users.get(address)
        if host is None and address in host_network.own_addresses():
            return self._datastore.host
        return host

    def _endpoint(self, name: str) -> Endpoint:
        may_be_id = len(name) >= 8 and set(name) <= set("0123456789abcdef-")
        if may_be_id:
            found = [endpoint for id, endpoint in self._endpoints.items() if id.endpoint.startswith(name)]
            if len(found) == 1:
                return found[0]
        try:
            workload, stored = find_connected(name, self._datastore)
        except (NoSuchContainer, DockerUnavailable) as error:
            named = [endpoint for endpoint in self._endpoints.values() if endpoint.workload_name == name]
            if not named and may_be_id:
                named = [e for id, e in self._endpoints.items() if id.workload.startswith(name)]
            if len(named) == 1:
                return named[0]
            if named:
                raise ambiguous(name, [(endpoint.id.workload, endpoint.id.host) for endpoint in named]) from None
            if not may_be_id:
                raise
            raise NotFound(f"{name} is no endpoint's id. {error}") from None
        endpoints = stored or [
            endpoint for endpoint in self._endpoints.values() if endpoint.extra.get(CONTAINER) == workload.id
        ]
        if not endpoints:
            return self._of_another_host(name, workload)
        refuse_others_endpoint(self._datastore, workload, endpoints[0])
        return endpoints[0]

    def _of_another_host(self, name: str, workload: Workload) -> Endpoint:
        """Return the endpoint of a workload that has none on this host. `name` is what the user calls the workload.

        Raises NotFound if the workload has no endpoint on any host. Raises CalicoError if it has endpoints on several
        hosts, or if its endpoint belongs to another namespace with the same id.
        """
        wanted = (workload.orchestrator, workload.id)
        found = [endpoint for id, endpoint in self._endpoints.items() if workload_of(id) == wanted]
        if not found:
            raise NotFound(f"{name} is not connected to Calico, and is no endpoint's id.")
        if len(found) > 1:
            hosts = ", ".join(sorted(endpoint.id.host for endpoint in found))
            raise CalicoError(f"{name} is connected on several hosts ({hosts}): say which by an address of it.")
        refuse_others_endpoint(self._datastore.for_host(found[0].id.host), workload, found[0])
        return found[0]

    # The path

    def trace(self, source: Place, destination: Place, packet: Packet) -> Trace:
        from calicoctl.workloads import host_network

        if source.endpoint is not None and source.endpoint == destination.endpoint:
            why = "it stays within the endpoint, where no profile applies"
            return Trace(source, destination, packet, (Decision("outbound", True, why, host=source.host),))
        decisions: list[Decision] = []
        route, sent = None, packet
        if source.endpoint is not None:
            decisions.append(self._outbound(source.endpoint, destination, packet))
            if destination.host != source.host:
                sent = self._enforcement.as_sent(source.endpoint.host, packet)
        if destination.endpoint is not None:
            decisions.append(self._inbound(source, destination.endpoint, sent))
        obstacles = [*self._at(source), *self._at(destination)]
        if source.host is not None and destination.host is not None and source.host != destination.host:
            route = self._route(source.host, destination.host, packet.destination)
            back = self._route(destination.host, source.host, sent.source)
            near, far = (self._seen_by(host).topology for host in (source.host, destination.host))
            obstacles += self._between(route, near, far, packet.destination)
            obstacles += self._between(back, far, near, sent.source)
        elif destination.host is None and source.host is not None and (pool := self._pool_of(source.host, packet)):
            topology = self._seen_by(source.host).topology
            obstacles.append(transit.not_routed(topology, packet.destination, pool.cidr, host_network.read().networks))
        elif destination.host is None and sent == packet and source.host is not None:
            problem = f"no pool masquerades {packet.source}, so the network outside must have a route to it"
            obstacles.append(Obstacle(source.host, problem, False))
        if destination.endpoint is None and destination.host is not None:
            obstacles += self._at_ports(destination.host, sent)
        sent_from = None if sent == packet else sent.source
        unique = tuple(dict.fromkeys(obstacles))
        return Trace(source, destination, packet, tuple(decisions), route, sent_from, unique)

    def _route(self, host: str, to_host: str, address: str) -> Route:
        from calicoctl.workloads import host_network

        here = self._datastore.host
        networks = {here: host_network.read()} if here in (host, to_host) else {}
        return transit.route(self._seen_by(host), to_host, address, networks)

    def _between(self, route: Route, sender: Topology, receiver: Topology, address: str) -> Iterator[Obstacle]:
        """Yield the obstacles for packets to `address` along `route`.

        These are the obstacles that the store shows (transit.obstacles). If none of them certainly stops the packet,
        and `sender` is this host, a route that is missing in the kernel is an obstacle, too.
        """
        found = list(transit.obstacles(route, sender, receiver, address))
        yield from found
        if sender.host != self._datastore.host or route.pool is None or any(obstacle.stops for obstacle in found):
            return
        if not is_routed(address, route.pool):
            why = f"its kernel has no route to {address}: see what 'calicoctl status' says"
            yield Obstacle(sender.host, why if route.by == transit.AGENT else f"{why} of BGP", True)

    def _pool_of(self, host: str, packet: Packet) -> Pool | None:
        return transit.pool_of(self._seen_by(host), packet.destination)

    def _at_ports(self, host: str, packet: Packet) -> Iterator[Obstacle]:
        """Yield the obstacle for a packet to a host's BGP port, if its source is not one of the host's BGP peers.

        If `host` is this host, yield it only if the agent reports that BIRD listens. For another host, that is unknown,
        so the obstacle does not certainly stop the packet.
        """
        is_bgp = packet.protocol == PROTOCOLS["tcp"] and packet.destination_port == BGP_PORT
        if is_bgp and packet.source not in self._seen_by(host).topology.may_reach_bgp():
            runs_bird = None
            if host == self._datastore.host:
                bird = (process.report(host) or {}).get("bird")
                runs_bird = isinstance(bird, dict) and bird.get("listens") is True
            if runs_bird is not False:
                condition = "" if runs_bird else "if BIRD runs for its agent, "
                problem = (
                    f"{condition}only its BGP peers reach TCP port {BGP_PORT}, and {packet.source} is none of them"
                )
                yield Obstacle(host, problem, bool(runs_bird))

    def _at(self, place: Place) -> Iterator[Obstacle]:
        """Yield the obstacle at one end of the path, if there is one.

        It is that the agent is down, that the agent has not set up the endpoint yet, or that the endpoint is not up.
        """
        if place.host is None:
            return
        statuses = self._datastore.for_host(place.host).statuses
        heartbeat = statuses.of_host()
        if heartbeat is None:
            problem = "its agent is down: its kernel has what the agent has set up last, if the host is up at all"
            yield Obstacle(place.host, problem, False)
            return
        local = None if place.endpoint is None else self._seen_by(place.host).local.get(place.endpoint)
        if local is None:  # a host, or an endpoint that is not set up, which is a decision already
            return
        said = statuses.of_endpoint(local.id) or {}
        if said.get("index") != local.revision:
            yield Obstacle(place.host, f"its agent has not set up endpoint {local.id.endpoint} yet", False)
        elif said.get("status") != "up":
            why = said.get("reason") or "its interface is not up"
            problem = f"endpoint {local.id.endpoint} is {said.get('status')}: {why}"
            about_another = local.conflict is not None and place.address in local.addresses
            yield Obstacle(place.host, problem, not about_another)

    # Decisions

    def _outbound(self, id: EndpointId, destination: Place, packet: Packet) -> Decision:
        return self._decision("outbound", id, self._enforcement.outbound(id, destination, packet))

    def _inbound(self, source: Place, id: EndpointId, packet: Packet) -> Decision:
        ruling = self._enforcement.inbound(source, id, packet)
        if ruling.cause is Cause.FROM_HOST:
            whose = "its host" if source.host == id.host else f"host {source.host}"
            return Decision("inbound", True, f"from {whose} everything passes", host=id.host)
        return self._decision("inbound", id, ruling)

    def _decision(self, direction: str, id: EndpointId, ruling: Ruling) -> Decision:
        snapshot = self._seen_by(id.host)
        if ruling.cause is Cause.NOT_SET_UP:
            _, reason = snapshot.unusable.get(id, (0, "it no longer exists"))
            why = f"endpoint {id.endpoint} of host {id.host} is not set up: {reason}"
            return Decision(direction, False, why, host=id.host)
        if ruling.cause is Cause.HOST_ACTION:
            why = f"DefaultEndpointToHostAction of host {id.host} is DROP"
            return Decision(direction, False, why, host=id.host)
        profiles = snapshot.local[id].profiles
        why = ruling.reason(profiles, self._enforcement.rules(profiles, direction))
        if ruling.cause is Cause.HOST_FIREWALL:
            why = f"{why}; then {id.host}'s own firewall decides"
        decided = ruling.verdict or Verdict(ruling.allowed)
        return Decision(direction, ruling.allowed, why, decided.profile, decided.rule, id.host)


def is_routed(address: str, pool: str) -> bool:
    """Return whether this host's kernel has a route, in any table, to an address of a pool. `pool` is the pool's CIDR.

    A route counts only if its destination is the pool or a part of it, so default routes do not count. Raises
    CalicoError if the routes cannot be read.
    """
    from calicoctl import netlink

    version, shortest = version_of(address), Network.parse(pool).length
    number = number_of(address)
    try:
        for path in netlink.paths(FAMILIES[version], netlink.UNICAST):
            shift = BITS[version] - path.length
            if path.length >= shortest and int.from_bytes(path.destination, "big") >> shift == number >> shift:
                return True
    except OSError as error:
        raise CalicoError(f"this host's routes cannot be read: {error}") from None
    return False
