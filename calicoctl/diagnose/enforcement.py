"""Decides about packets to and from endpoints as the agents of the endpoints' hosts do, from a copy of the store.

Each endpoint is evaluated with the snapshot of its own host (snapshot.py), and with the agents' semantics of rules
(verdict.py). Sends no packet, and reads nothing but the store.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from calicoctl.addresses import version_of
from calicoctl.datastore import keys
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Rule
from calicoctl.datastore.store import Entry
from calicoctl.desired.local_endpoint import usable_addresses
from calicoctl.desired.snapshot import Snapshot
from calicoctl.policy.verdict import Packet, Verdict, decide, is_from_host, is_host_service, within

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient

SOURCE_PORT = 40000
"""The source port of packets where none is asked for. It is in the range of ephemeral ports."""


class Cause(Enum):
    """What a ruling is based on."""

    PROFILES = "the endpoint's profiles"
    HOST_FIREWALL = "the endpoint's profiles allow the packet; then its host's own firewall decides"
    HOST_ACTION = "DefaultEndpointToHostAction is DROP"
    HOST_SERVICE = "DHCP, DNS and neighbour discovery to the host pass, unless EndpointToHostServices is drop"
    FROM_HOST = "everything passes from the endpoint's host and, to addresses in pools, from other hosts"
    NOT_SET_UP = "the endpoint is not set up"


@dataclass(frozen=True)
class Ruling:
    """The decision about a packet at one endpoint. `verdict` is the verdict of its profiles, None if it does not count.

    It counts for the causes PROFILES and HOST_FIREWALL.
    """

    allowed: bool
    cause: Cause
    verdict: Verdict | None = None

    def reason(self, profiles: Sequence[str], rules: Mapping[str, Sequence[Rule] | None]) -> str:
        """Return the reason as a text. `profiles` and `rules` are what `decide` got; see `Enforcement.rules`."""
        if self.verdict is None:
            return self.cause.value
        return why(self.verdict, rules, profiles)


@dataclass(frozen=True)
class Place:
    """One end of a packet's path. `name` is what the user calls it.

    `endpoint` is the id of the endpoint that has the address, None if no endpoint has it. `host` is the endpoint's host
    or, without an endpoint, the host that has the address itself. It is None if neither an endpoint nor a host has the
    address.
    """

    name: str
    address: str
    endpoint: EndpointId | None = None
    host: str | None = None


class Enforcement:
    """A copy of the watched part of the store: a snapshot for each host, as its agent would derive it from that."""

    def __init__(self, datastore: DatastoreClient) -> None:
        self.host = datastore.host
        """The host on whose behalf the store is read. Its snapshot has the profiles, and the problems of all keys."""
        entries = [entry for directory in datastore.followed() for entry in datastore.list_for_watch(directory)[0]]
        own = _snapshot(Snapshot(self.host), entries)
        self._snapshots = {self.host: own}
        self.endpoints = own.endpoints
        """The endpoints of all hosts, but for the `unreadable` ones."""
        found = filter(None, (keys.parse_endpoint(entry.key) for entry in entries))
        self.unreadable = [id for id in found if id not in self.endpoints]
        """The endpoints whose value is invalid."""
        self._of_all: list[Entry] = []
        self._of_host: dict[str, list[Entry]] = defaultdict(list)
        """The entries from which the snapshots for other hosts are derived; the rest they share with the first one."""
        for entry in entries:
            host = keys.host_of(entry.key)
            if host is None and keys.parse_profile(entry.key) is None:
                self._of_all.append(entry)
            elif host not in (None, self.host) and not own.topology.is_of_all(entry.key):
                self._of_host[host].append(entry)
        self._tags: dict[str, frozenset[str]] | None = None
        """By address, computed on demand: the tags of the endpoints that have the address."""

    def seen_by(self, host: str) -> Snapshot:
        """Return the snapshot for a host. Only that for `self.host` has profiles: they do not differ between hosts.

        All snapshots have the same endpoints and, of the topology, the same of all hosts. If each had a copy, many
        hosts would take memory and time with the square of their number.
        """
        if host not in self._snapshots:
            of_host = self._of_host.pop(host, [])
            snapshot = _snapshot(Snapshot(host, self._snapshots[self.host].topology), [*self._of_all, *of_host])
            snapshot.endpoints = self.endpoints
            snapshot.local = {self._once(id): replace(one, id=self._once(id)) for id, one in snapshot.local.items()}
            snapshot.unusable = {self._once(id): why for id, why in snapshot.unusable.items()}
            self._snapshots[host] = snapshot
        return self._snapshots[host]

    def _once(self, id: EndpointId) -> EndpointId:
        """Return an endpoint's id as it is in `endpoints`: the same ids of thousands of endpoints need memory."""
        known = self.endpoints.get(id)
        return id if known is None else known.id

    def outbound(self, id: EndpointId, destination: Place, packet: Packet) -> Ruling:
        """Return the decision about a packet that an endpoint sends to another place."""
        return self.outbound_after(self._verdict("outbound", id, packet), id, destination, packet)

    def outbound_after(self, verdict: Verdict, id: EndpointId, destination: Place, packet: Packet) -> Ruling:
        """Do what `outbound` does, with the verdict of the endpoint's profiles."""
        snapshot = self.seen_by(id.host)
        if id not in snapshot.local:
            return Ruling(False, Cause.NOT_SET_UP)
        if destination.endpoint is not None or destination.host != id.host:
            return Ruling(verdict.allowed, Cause.PROFILES, verdict)
        if snapshot.host_services and is_host_service(packet):
            return Ruling(True, Cause.HOST_SERVICE)
        if not verdict.allowed:
            return Ruling(False, Cause.PROFILES, verdict)
        if snapshot.host_action == "DROP":
            return Ruling(False, Cause.HOST_ACTION)
        return Ruling(True, Cause.HOST_FIREWALL, verdict)

    def inbound(self, source: Place, id: EndpointId, packet: Packet) -> Ruling:
        """Return the decision about a packet, as it leaves the source's host (see `as_sent`), to an endpoint."""
        return self.inbound_after(self._verdict("inbound", id, packet), source, id, packet)

    def inbound_after(self, verdict: Verdict, source: Place, id: EndpointId, packet: Packet) -> Ruling:
        """Do what `inbound` does, with the verdict of the endpoint's profiles."""
        seen = self.seen_by(id.host)
        if id not in seen.local:
            return Ruling(False, Cause.NOT_SET_UP)
        if source.endpoint is None and source.host is not None:
            pools = (pool.cidr for pool in seen.pools.values())
            if source.host == id.host or is_from_host(packet, seen.topology.users, pools):
                return Ruling(True, Cause.FROM_HOST)
        return Ruling(verdict.allowed, Cause.PROFILES, verdict)

    def as_sent(self, host: str, packet: Packet) -> Packet:
        """Return a packet to another host as it leaves `host`.

        If a pool masquerades the packet, its source is the registered address of `host`. If `host` has no such address
        of the packet's IP version, the packet is returned unchanged.
        """
        snapshot = self.seen_by(host)
        pools = snapshot.pools.values()
        of_source = any(pool.masquerade and within(packet.source, pool.cidr) for pool in pools)
        if not of_source or any(within(packet.destination, pool.cidr) for pool in pools):
            return packet
        own = [address for address, user in snapshot.topology.users.items() if user == host]
        addresses = [snapshot.topology.own(packet.version), *(a for a in own if version_of(a) == packet.version)]
        source = next((address for address in addresses if address is not None), None)
        return packet if source is None else replace(packet, source=source)

    def rules(self, profiles: Iterable[str], direction: str) -> dict[str, Sequence[Rule] | None]:
        """Return the rules of profiles for a direction, "inbound" or "outbound".

        The rules of a profile that denies everything, because it is missing or has invalid rules, are None.
        """
        known = self.seen_by(self.host).profiles
        valid = {name: known[name].rules if name in known else None for name in profiles}
        return {name: None if rules is None else getattr(rules, direction) for name, rules in valid.items()}

    def _verdict(self, direction: str, id: EndpointId, packet: Packet) -> Verdict:
        local = self.seen_by(id.host).local.get(id)
        profiles = () if local is None else local.profiles
        return decide(profiles, self.rules(profiles, direction), packet, self.has_tag)

    def has_tag(self, tag: str, address: str) -> bool:
        """Return whether an endpoint with a tag has an address."""
        return tag in self.tags_of(address)

    def tags_of(self, address: str) -> frozenset[str]:
        """Return the tags of the endpoints, of all hosts, that have an address."""
        if self._tags is None:
            profiles = self.seen_by(self.host).profiles
            self._tags = {}
            of_profiles: dict[tuple[str, ...], frozenset[str]] = {}
            for endpoint in self.endpoints.values():
                names = tuple(endpoint.profile_ids)
                if names not in of_profiles:
                    of_profiles[names] = frozenset().union(*(profiles[one].tags for one in names if one in profiles))
                for one in usable_addresses(endpoint):
                    known = self._tags.get(one)
                    self._tags[one] = of_profiles[names] if known is None else known | of_profiles[names]
        return self._tags.get(address, frozenset())


def _snapshot(snapshot: Snapshot, entries: Iterable[Entry]) -> Snapshot:
    """Return a new snapshot with these entries, which is not changed afterwards."""
    snapshot.replace(keys.ROOT, entries)
    snapshot.complete()
    return snapshot


def why(verdict: Verdict, rules: Mapping[str, Sequence[Rule] | None], profiles: Sequence[str]) -> str:
    """Return what `decide` based a verdict on, from the profiles and rules that it got, as a text."""
    from calicoctl.policy.rules import text

    if verdict.profile is None:
        return f"no rule of {', '.join(profiles)} matches" if profiles else "it has no profile"
    of_profile = rules[verdict.profile]
    if verdict.rule is None or of_profile is None:
        return f"profile {verdict.profile} does not exist, or its rules cannot be read"
    return f"rule {verdict.rule} of profile {verdict.profile}: {text(of_profile[verdict.rule - 1])}"
