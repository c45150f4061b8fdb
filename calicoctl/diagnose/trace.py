"""Evaluates whether a packet would pass between two places, and which rule decides. Sends no packet.

Reads the store, queries Docker for containers' ids, and reads this host's own addresses. The policy of an endpoint is
computed as on its own host, from a snapshot for that host (snapshot.py) and with the agent's meaning of rules
(verdict.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from calicoctl.addresses import check_unicast, parse_address, version_of
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint, Rule
from calicoctl.desired.local_endpoint import usable_addresses
from calicoctl.desired.snapshot import Snapshot
from calicoctl.errors import CalicoError, DockerUnavailable, NoSuchContainer, NotFound
from calicoctl.policy.rules import ICMP, ICMPV6, PROTOCOLS
from calicoctl.policy.verdict import Packet, Verdict, decide, is_host_service
from calicoctl.workloads.workload import ambiguous, endpoints_of, find_connected, refuse_others_endpoint

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient

SOURCE_PORT = 40000
"""Stands for an ephemeral port of a client; Linux uses 32768 to 60999 by default."""

_ECHO_REQUEST = {ICMP: 8, ICMPV6: 128}


@dataclass(frozen=True)
class Place:
    """One end of a packet's path: the user's name for it, its address, and its endpoint's id (None: no endpoint)."""

    name: str
    address: str
    endpoint: EndpointId | None = None


@dataclass(frozen=True)
class Decision:
    """The decision in one direction (`outbound` of the source, `inbound` of the destination), and its reason."""

    direction: str
    allowed: bool
    why: str
    profile: str | None = None
    rule: int | None = None
    """The position of the rule that decided in the profile's list for this direction, counted from 1."""


@dataclass(frozen=True)
class Trace:
    """The path of a packet: both ends, and the decision at each end that is an endpoint, in order.

    The decision at the destination is included even if the packet is dropped at the source.
    """

    source: Place
    destination: Place
    packet: Packet
    decisions: tuple[Decision, ...]

    @property
    def allowed(self) -> bool:
        return self.denied_by is None

    @property
    def denied_by(self) -> Decision | None:
        """The first decision that drops the packet, None if the packet passes."""
        return next((decision for decision in self.decisions if not decision.allowed), None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "allowed": self.allowed,
            "from": asdict(self.source),
            "to": asdict(self.destination),
            "protocol": self.packet.protocol,
            "source_port": self.packet.source_port,
            "port": self.packet.destination_port,
            "decisions": [asdict(decision) for decision in self.decisions],
        }


def trace(
    datastore: DatastoreClient,
    source: str,
    destination: str,
    protocol: str,
    port: int | None,
    source_port: int | None = None,
) -> Trace:
    """Evaluate the path of a packet: the first packet of a connection, or an echo request.

    `source` and `destination` are containers, namespace paths, endpoint ids or addresses; `protocol` is `tcp`, `udp`,
    `icmp` or `icmpv6`. `source_port` is SOURCE_PORT unless it is given. Raises CalicoError.
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
    return Trace(one, other, packet, tuple(store.decisions(one, other, packet)))


def _of(place: Place, version: int) -> bool:
    return version_of(place.address) == version


class _Store:
    """The store, read once, as the hosts of the two endpoints see it."""

    def __init__(self, datastore: DatastoreClient) -> None:
        self._datastore = datastore
        self._entries = {directory: datastore.list_for_watch(directory)[0] for directory in datastore.followed()}
        self._snapshots: dict[str, Snapshot] = {}
        self._endpoints = self._seen_by(datastore.host).endpoints
        self._members: dict[str, set[str]] = {}
        """The addresses of each tag, computed when the tag is first needed."""

    def _seen_by(self, host: str) -> Snapshot:
        if host not in self._snapshots:
            snapshot = self._snapshots[host] = Snapshot(host)
            for directory, entries in self._entries.items():
                snapshot.replace(directory, entries)
        return self._snapshots[host]

    # From names to endpoints

    def places(self, name: str) -> list[Place]:
        """Return the Place of an address, or one for each address of an endpoint or workload. Raises CalicoError."""
        try:
            address = str(parse_address(name))
        except CalicoError:
            pass
        else:
            check_unicast(parse_address(name))
            owners = [id for id, endpoint in self._endpoints.items() if address in usable_addresses(endpoint)]
            if not owners and (unreadable := self._datastore.endpoints_with(parse_address(name))):
                raise CalicoError(
                    f"{name} is of endpoint {unreadable[0].endpoint}, whose record cannot be read: see 'endpoint show'."
                )
            usable = [id for id in owners if id in self._seen_by(id.host).local]
            return [Place(name, address, next(iter(usable or owners), None))]
        endpoint = self._endpoint(name)
        addresses = usable_addresses(endpoint)
        if not addresses:
            raise CalicoError(f"{name} has no addresses.")
        return [Place(name, address, endpoint.id) for address in addresses]

    def _endpoint(self, name: str) -> Endpoint:
        may_be_id = len(name) >= 8 and set(name) <= set("0123456789abcdef-")
        if may_be_id:
            found = [endpoint for id, endpoint in self._endpoints.items() if id.endpoint.startswith(name)]
            if len(found) == 1:
                return found[0]
        try:
            workload = find_connected(name, self._datastore)
        except (NoSuchContainer, DockerUnavailable) as error:
            named = [endpoint for endpoint in self._endpoints.values() if endpoint.workload_name == name]
            if len(named) == 1:
                return named[0]
            if named:
                raise ambiguous(name, [(endpoint.id.workload, endpoint.id.host) for endpoint in named]) from None
            if not may_be_id:
                raise
            raise NotFound(f"{name} is no endpoint's id. {error}") from None
        endpoints = endpoints_of(self._datastore, workload)
        if not endpoints:
            raise NotFound(f"{name} is not connected to Calico, and is no endpoint's id.")
        refuse_others_endpoint(self._datastore, workload, endpoints[0])
        return endpoints[0]

    # Decisions

    def decisions(self, source: Place, destination: Place, packet: Packet) -> list[Decision]:
        """Return the decisions about a packet, one for each of its ends that is an endpoint."""
        if source.endpoint is not None and source.endpoint == destination.endpoint:
            return [Decision("outbound", True, "it stays within the endpoint, where no profile applies")]
        made: list[Decision] = []
        if source.endpoint is not None:
            made.append(self._outbound(source.endpoint, destination, packet))
        if destination.endpoint is not None:
            made.append(self._inbound(source, destination.endpoint, packet))
        return made

    def _outbound(self, id: EndpointId, destination: Place, packet: Packet) -> Decision:
        snapshot = self._seen_by(id.host)
        to_host = destination.endpoint is None and destination.address in self._addresses_of(id.host)
        if to_host and is_host_service(packet) and id in snapshot.local:
            return Decision("outbound", True, "DHCP, DNS and neighbour discovery to the host always pass")
        decision = self._decide("outbound", id, packet)
        if to_host and decision.allowed:
            if snapshot.host_action == "DROP":
                return Decision("outbound", False, f"DefaultEndpointToHostAction of host {id.host} is DROP")
            why = f"{decision.why}; then {id.host}'s own firewall decides"
            return Decision("outbound", True, why, decision.profile, decision.rule)
        return decision

    def _inbound(self, source: Place, id: EndpointId, packet: Packet) -> Decision:
        if source.endpoint is not None and source.endpoint.host != id.host:
            packet = self._as_sent(source.endpoint.host, packet)
        from_host = source.endpoint is None and source.address in self._addresses_of(id.host)
        if from_host and id in self._seen_by(id.host).local:
            return Decision("inbound", True, "from its host everything passes")
        return self._decide("inbound", id, packet)

    def _as_sent(self, host: str, packet: Packet) -> Packet:
        """Return a packet as it leaves a host: if a pool masquerades it, with the host's address as source."""
        from netaddr.ip import IPNetwork

        pools = self._seen_by(host).pools.values()
        of_source = any(pool.masquerade and packet.source in IPNetwork(pool.cidr) for pool in pools)
        if not of_source or any(packet.destination in IPNetwork(pool.cidr) for pool in pools):
            return packet
        version = version_of(packet.source)
        addresses = [a for a in self._datastore.for_host(host).hosts.own_addresses() if version_of(a) == version]
        return replace(packet, source=addresses[0]) if addresses else packet

    def _decide(self, direction: str, id: EndpointId, packet: Packet) -> Decision:
        snapshot = self._seen_by(id.host)
        local = snapshot.local.get(id)
        if local is None:
            _, reason = snapshot.unusable.get(id, (0, "it no longer exists"))
            return Decision(direction, False, f"endpoint {id.endpoint} of host {id.host} is not set up: {reason}")
        rules: dict[str, Sequence[Rule] | None] = {}
        for name in local.profiles:
            profile = snapshot.profiles.get(name)
            readable = None if profile is None else profile.rules
            rules[name] = None if readable is None else getattr(readable, direction)
        verdict = decide(local.profiles, rules, packet, self._tagged)
        return Decision(direction, verdict.allowed, _why(verdict, rules, local.profiles), verdict.profile, verdict.rule)

    def _tagged(self, tag: str, address: str) -> bool:
        """Return whether an address belongs to a tag, on any host."""
        if tag not in self._members:
            profiles = self._seen_by(self._datastore.host).profiles
            with_tag = {name for name, profile in profiles.items() if tag in profile.tags}
            members = [e for e in self._endpoints.values() if not with_tag.isdisjoint(e.profile_ids)]
            self._members[tag] = {address for endpoint in members for address in usable_addresses(endpoint)}
        return address in self._members[tag]

    def _addresses_of(self, host: str) -> set[str]:
        """Return the registered addresses of a host and, if it is this host, the addresses of all its interfaces."""
        from calicoctl.workloads import host_network

        own = host_network.own_addresses() if host == self._datastore.host else set()
        return self._datastore.for_host(host).hosts.own_addresses() | own


def _why(verdict: Verdict, rules: Mapping[str, Sequence[Rule] | None], profiles: Sequence[str]) -> str:
    from calicoctl.policy.rules import text

    if verdict.profile is None:
        return f"no rule of {', '.join(profiles)} matches" if profiles else "it has no profile"
    of_profile = rules[verdict.profile]
    if verdict.rule is None or of_profile is None:
        return f"profile {verdict.profile} does not exist, or its rules cannot be read"
    return f"rule {verdict.rule} of profile {verdict.profile}: {text(of_profile[verdict.rule - 1])}"
