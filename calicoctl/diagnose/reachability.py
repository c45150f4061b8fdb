"""Computes who may reach whom, on which protocols and ports: for all pairs of endpoints, and of endpoints and hosts.

Every verdict comes from `decide`, for a packet between two real addresses, and every decision from `Enforcement`. This
module only knows which packets need not be asked about, because no rule can tell them from one that was:

* Rules tell addresses apart by tags and nets. Those that rules name are *traits* here. Endpoints with the same profiles
  and traits are a *group*: policy treats its members alike.
* The rules of a profile look at some of the traits only. So its verdicts are asked for once for each combination of
  these traits, and the first profile of an endpoint that has one decides.
* Rules tell packets apart by protocol, port, and ICMP type and code. So the ports are divided where the ports that
  rules name begin and end, and one packet is asked about for each part; so are the types and codes.

Packets are the first ones of connections, from an ephemeral port, as in `profile trace`. This is about policy alone:
routes, the state of agents, and hosts' own firewalls are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Callable, NamedTuple, TypeVar

from calicoctl.addresses import version_of
from calicoctl.datastore import keys
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Rule
from calicoctl.desired.local_endpoint import usable_addresses
from calicoctl.diagnose.enforcement import SOURCE_PORT, Enforcement, Place, Ruling
from calicoctl.policy.rules import ICMP, ICMPV6, UDP, WITH_PORTS, protocol_number
from calicoctl.policy.verdict import HOST_ICMPV6_TYPES, Packet, Verdict, decide, port_ranges, within
from calicoctl.workloads.workload import called

T = TypeVar("T")

OTHERS = -1
"""Stands for all protocols that have no parts of their own."""

LAST = 65535
"""The last port, and the last ICMP type and code: these are the number 256 * type + code here."""

IN_POOL, MASQUERADED = 1, 2
"""Two more traits of addresses: whether they are in a pool, and in a pool with --nat-outgoing."""


Parts = tuple[tuple[int, T], ...]
"""What applies to the ports of a protocol, or to its ICMP types and codes: pairs of the first number of a part, and a
value. The first pair begins with 0, and each part ends where the next one begins, or with LAST."""

Answers = tuple[tuple[int, Parts[T]], ...]
"""What applies to all packets between two addresses: pairs of a protocol (its number, or OTHERS, which is always there)
and of what applies to its packets."""

EVERYTHING: Answers[None] = ((OTHERS, ((0, None),)),)
"""All packets, undivided."""

Decisions = Answers[Ruling]
"""The decisions at one endpoint about all packets between two addresses."""


class Joint(NamedTuple):
    """The decisions about the packets of a protocol to the ports, or with the types and codes, from `first` to `last`.

    `protocol` is a number, or OTHERS. `outbound` and `inbound` are the rulings at the source and at the destination; a
    ruling is None if that end is a host.
    """

    protocol: int
    first: int
    last: int
    outbound: Ruling | None
    inbound: Ruling | None

    @property
    def allowed(self) -> bool:
        return all(ruling is None or ruling.allowed for ruling in (self.outbound, self.inbound))


@dataclass(eq=False)
class Group:
    """Endpoints, or hosts, that policy treats alike. `number` is its position in `Reachability.groups`.

    `traits` are the traits of the members' addresses, by IP version, as a sum of numbers. `profiles` are those of
    endpoints, () for hosts. `is_set_up` is whether the members' hosts enforce policy for them: otherwise, they reach
    nothing. `action` is the hosts' DefaultEndpointToHostAction, None for endpoints. `host` is the host of all members,
    None if they may be on several hosts.
    """

    number: int
    traits: dict[int, int]
    profiles: tuple[str, ...]
    is_set_up: bool
    action: str | None
    host: str | None
    members: list[Node] = field(default_factory=list)

    @property
    def is_hosts(self) -> bool:
        return self.action is not None


@dataclass(eq=False)
class Node:
    """A host, or an endpoint with those of its addresses that policy treats alike. `endpoint` is None for a host.

    `name` is what a person calls it. `problem` is why an endpoint is not set up, or not with all its addresses, or why
    a host has no address; it is None if there is none.
    """

    name: str
    host: str
    addresses: tuple[str, ...]
    group: Group
    endpoint: EndpointId | None = None
    problem: str | None = None

    def place(self, version: int) -> Place:
        """Return the first address of an IP version, of which the node must have one, as a place."""
        address = next(address for address in self.addresses if version_of(address) == version)
        return Place(self.name, address, self.endpoint, self.host)


class Reachability:
    """The nodes (endpoints by host and name, then hosts), their groups, and who may reach whom."""

    def __init__(self, enforcement: Enforcement) -> None:
        self._enforcement = enforcement
        self._topology = enforcement.seen_by(enforcement.host).topology
        self.groups: list[Group] = []
        self.nodes: list[Node] = []
        self._by_key: dict[object, Group] = {}
        self._decisions: dict[tuple[object, ...], dict[int, Decisions]] = {}
        """By whatever decides at an endpoint, and by the traits of the other end."""
        self._equal: dict[object, Any] = {}
        self._of_profiles: dict[tuple[object, ...], Answers[Verdict]] = {}
        self._has_tag = enforcement.has_tag
        self._masquerades: dict[tuple[str, int], str | None] = {}
        """By host and IP version: the source of masqueraded packets; None if the host has no address for them."""
        self._named: dict[tuple[str, str], list[tuple[int, int]]] = {}
        self._looks: dict[tuple[str, str], tuple[int, int]] = {}
        self._looked_at: dict[tuple[tuple[str, ...], str], tuple[int, int]] = {}
        self._traits = _Traits(enforcement, self.once)
        self._add_endpoints()
        self._add_hosts()

    @property
    def endpoints(self) -> list[Node]:
        return [node for node in self.nodes if node.endpoint is not None]

    @property
    def hosts(self) -> list[Node]:
        return [node for node in self.nodes if node.endpoint is None]

    def pair(self, source: Node, destination: Node) -> dict[int, list[Joint]]:
        """Return by IP version what becomes of packets from a node to another one. One of them must be an endpoint.

        An IP version of which not both have an address is left out.
        """
        return {version: joined(*both) for version, both in self.decisions(source, destination).items()}

    def decisions(self, source: Node, destination: Node) -> dict[int, tuple[Decisions | None, Decisions | None]]:
        """Return the same as `pair`, but the decisions of both ends apart; None stands for an end that is a host.

        Decisions that are equal are the same object.
        """
        versions = [version for version in source.group.traits if version in destination.group.traits]
        return {v: (self.outbound(source, destination, v), self.inbound(source, destination, v)) for v in versions}

    def outbound(self, source: Node, destination: Node, version: int) -> Decisions | None:
        """Return the decisions at the source, None if it is a host. Both must have an address of the IP version."""
        id, group, other = source.endpoint, source.group, destination.group
        if id is None:
            return None
        to_own_host = destination.endpoint is None and destination.host == source.host
        own, peer = self.looks_at("outbound", group)
        kind = ("outbound", group.is_set_up, other.action if to_own_host else None)
        seen_here = self.once(group.traits[version] & own)
        known = self._decisions.setdefault((*kind, group.profiles, version, seen_here), {})
        seen_there = self.once(other.traits[version] & peer)
        if seen_there not in known:
            here, there = source.place(version), destination.place(version)
            known[seen_there] = self._decided(
                kind,
                group.profiles,
                (here.address, there.address),
                services(version) if to_own_host else (),
                lambda verdict, packet: self._enforcement.outbound_after(verdict, id, there, packet),
            )
        return known[seen_there]

    def inbound(self, source: Node, destination: Node, version: int) -> Decisions | None:
        """Return the decisions at the destination, None if it is a host; see `outbound`."""
        id, group = destination.endpoint, destination.group
        if id is None:
            return None
        source_kind = "endpoint" if source.endpoint is not None else "own host" if source.host == id.host else "host"
        own, peer = self.looks_at("inbound", group)
        kind = ("inbound", group.is_set_up, source_kind, group.traits[version] & IN_POOL)
        seen_here = self.once(group.traits[version] & own)
        known = self._decisions.setdefault((*kind, group.profiles, version, seen_here), {})
        seen_there = self.once(self.traits_as_sent(source, destination, version) & peer)
        if seen_there not in known:
            here, there = source.place(version), destination.place(version)
            known[seen_there] = self._decided(
                kind,
                group.profiles,
                (self._as_sent(source, destination, version), there.address),
                (),
                lambda verdict, packet: self._enforcement.inbound_after(verdict, here, id, packet),
            )
        return known[seen_there]

    def traits_as_sent(self, source: Node, destination: Node, version: int) -> int:
        """Return the traits of the source address as the destination sees it: it may have been masqueraded."""
        if self._traits.is_masqueraded(source, destination, version):
            return self._traits.of(self._as_sent(source, destination, version))
        return source.group.traits[version]

    def _as_sent(self, source: Node, destination: Node, version: int) -> str:
        here, there = source.place(version).address, destination.place(version).address
        if not self._traits.is_masqueraded(source, destination, version):
            return here
        key = (source.host, version)
        if key not in self._masquerades:
            sent = self._enforcement.as_sent(source.host, Packet(here, there, OTHERS)).source
            self._masquerades[key] = None if sent == here else sent
        return self._masquerades[key] or here

    def once(self, value: T) -> T:
        """Return the first value that was equal to `value`: many thousands are, and need memory once only."""
        found: T = self._equal.setdefault(value, value)
        return found

    def looks_at(self, direction: str, group: Group) -> tuple[int, int]:
        """Return the traits that the rules of a group's profiles look at: of its own address, and of the other one.

        `direction` is "outbound" or "inbound". Each result is a sum of traits.
        """
        key = (group.profiles, direction)
        if key not in self._looked_at:
            source = destination = 0
            for profile in group.profiles:
                sides = self._sides(profile, direction)
                source, destination = source | sides[0], destination | sides[1]
            own, peer = (source, destination) if direction == "outbound" else (destination, source)
            self._looked_at[key] = self.once(own), self.once(peer)
        return self._looked_at[key]

    def _decided(
        self,
        kind: tuple[Any, ...],
        profiles: Iterable[str],
        addresses: tuple[str, str],
        divided: Answers[None],
        ruling: Callable[[Verdict, Packet], Ruling],
    ) -> Decisions:
        """Return the decisions at an endpoint with these `profiles` about packets between two addresses.

        `ruling` returns the decision about a packet, from the verdict of the profiles. It depends on the verdict, on
        `kind`, which begins with the direction, and on the part of `divided` that the packet is in.
        """
        verdicts = [self._verdicts(profile, kind[0], *addresses) for profile in profiles]
        found: dict[int, list[tuple[int, Ruling]]] = {}
        for protocol, first, (_, *values) in merged([(*divided, *EVERYTHING), *verdicts]):
            first_match = next((verdict for verdict in values if verdict.profile is not None), Verdict(False))
            decided = ruling(first_match, _packet(*addresses, protocol, first))
            parts = found.setdefault(protocol, [])
            if not parts or parts[-1][1] != decided:
                parts.append(self.once((first, decided)))
        others = found[OTHERS]
        left = ((number, parts) for number, parts in found.items() if number == OTHERS or parts != others)
        return self.once(tuple(self.once((number, self.once(tuple(parts)))) for number, parts in left))

    def _verdicts(self, profile: str, direction: str, source: str, destination: str) -> Answers[Verdict]:
        """Return the verdicts of one profile; where none of its rules matches, `Verdict.profile` is None.

        Verdicts that are equal are the same object.
        """
        version = version_of(source)
        sides = self._sides(profile, direction)
        traits = (
            self.once(self._traits.of(source) & sides[0]),
            self.once(self._traits.of(destination) & sides[1]),
        )
        key = (profile, direction, version, *traits)
        if key not in self._of_profiles:
            rules = self._enforcement.rules([profile], direction)[profile]
            # a rule that names a trait that an address lacks matches no packet between the two
            named = enumerate(self._named_by_rules(profile, direction), start=1)
            numbers = [
                number for number, (one, other) in named if one & traits[0] == one and other & traits[1] == other
            ]
            left = None if rules is None else [rules[number - 1] for number in numbers]

            def verdict(protocol: int, first: int) -> Verdict:
                packet = _packet(source, destination, protocol, first)
                found = decide([profile], {profile: left}, packet, self._has_tag)
                return found if found.rule is None else replace(found, rule=numbers[found.rule - 1])

            found = (
                (protocol, self.once(tuple(self.once((first, verdict(protocol, first))) for first in starts)))
                for protocol, starts in divisions(left or (), version).items()
            )
            self._of_profiles[key] = self.once(tuple(map(self.once, found)))
        return self._of_profiles[key]

    def _sides(self, profile: str, direction: str) -> tuple[int, int]:
        """Return the traits that a profile's rules look at: of the source, and of the destination."""
        key = (profile, direction)
        if key not in self._looks:
            source = destination = 0
            for one, other in self._named_by_rules(profile, direction):
                source, destination = source | one, destination | other
            self._looks[key] = self.once(source), self.once(destination)
        return self._looks[key]

    def _named_by_rules(self, profile: str, direction: str) -> list[tuple[int, int]]:
        """Return for each rule of a profile the traits that it names: of the source, and of the destination."""
        key = (profile, direction)
        if key not in self._named:
            rules = self._enforcement.rules([profile], direction)[profile]
            self._named[key] = [self._traits.named_by(rule) for rule in rules or ()]
        return self._named[key]

    # Nodes and groups

    def _add_endpoints(self) -> None:
        found = self._enforcement.endpoints
        for id in sorted(found, key=lambda id: (id.host, called(found[id]), keys.endpoint(id))):
            endpoint, seen = found[id], self._enforcement.seen_by(id.host)
            local = seen.local.get(id)
            problem = local.conflict if local else seen.unusable.get(id, (0, "it no longer exists"))[1]
            alike: dict[int, dict[int, list[str]]] = {4: {}, 6: {}}
            for address in usable_addresses(endpoint):
                alike[version_of(address)].setdefault(self._traits.of(address), []).append(address)
            for number in range(max(len(alike[4]), len(alike[6]), 1)):
                kinds = {v: list(kinds.items())[number] for v, kinds in alike.items() if number < len(kinds)}
                traits = {version: kind for version, (kind, _) in kinds.items()}
                host = id.host if self._traits.hosts_matter else None
                group = self._group(traits, tuple(endpoint.profile_ids), local is not None, None, host)
                addresses = tuple(address for _, some in kinds.values() for address in some)
                self._add(Node(called(endpoint), id.host, addresses, group, id, problem))

    def _add_hosts(self) -> None:
        for host in sorted(self._topology.hosts() | {node.host for node in self.nodes}):
            addresses = tuple(a for a in (self._topology.address(host, version) for version in (4, 6)) if a is not None)
            traits = {version_of(address): self._traits.of(address) for address in addresses}
            group = self._group(traits, (), True, self._enforcement.seen_by(host).host_action, None)
            problem = None if addresses else "it is not registered"
            self._add(Node(host, host, addresses, group, None, problem))

    def _group(self, traits: dict[int, int], *key: object) -> Group:
        whole = (tuple(traits.items()), *key)
        if whole not in self._by_key:
            self._by_key[whole] = Group(len(self.groups), traits, *key)  # type: ignore[arg-type]
            self.groups.append(self._by_key[whole])
        return self._by_key[whole]

    def _add(self, node: Node) -> None:
        self.nodes.append(node)
        node.group.members.append(node)


class _Traits:
    """The tags and nets that rules of the endpoints' profiles name, each with a number, which is a power of two."""

    def __init__(self, enforcement: Enforcement, once: Callable[[int], int]) -> None:
        self._enforcement = enforcement
        self._once = once
        seen = enforcement.seen_by(enforcement.host)
        self._pools = list(seen.pools.values())
        self._of: dict[str, int] = {}
        self._tags: dict[str, int] = {}
        self._nets: dict[str, int] = {}
        used = {name for endpoint in enforcement.endpoints.values() for name in endpoint.profile_ids}
        for name in sorted(used & seen.profiles.keys()):
            rules = seen.profiles[name].rules
            for rule in [] if rules is None else [*rules.inbound, *rules.outbound]:
                for known, named in (
                    (self._tags, (rule.src_tag, rule.dst_tag)),
                    (self._nets, (rule.src_net, rule.dst_net)),
                ):
                    for one in named:
                        if one is not None and one not in known:
                            known[one] = 4 << (len(self._tags) + len(self._nets))
        addresses = (a for endpoint in enforcement.endpoints.values() for a in usable_addresses(endpoint))
        self.hosts_matter = any(pool.masquerade for pool in self._pools) and not all(
            self.of(address) & IN_POOL for address in addresses
        )
        """Whether packets between endpoints may be masqueraded, so that it matters which host an endpoint is on."""

    def of(self, address: str) -> int:
        """Return the sum of the traits of an address."""
        if address not in self._of:
            pools = [pool for pool in self._pools if within(address, pool.cidr)]
            found = IN_POOL * bool(pools) | MASQUERADED * any(pool.masquerade for pool in pools)
            found |= sum(self._tags.get(tag, 0) for tag in self._enforcement.tags_of(address))
            found |= sum(number for net, number in self._nets.items() if within(address, net))
            self._of[address] = self._once(found)
        return self._of[address]

    def named_by(self, rule: Rule) -> tuple[int, int]:
        """Return the sums of the traits that a rule names for the source, and for the destination."""
        source = self._tags.get(rule.src_tag or "", 0) | self._nets.get(rule.src_net or "", 0)
        destination = self._tags.get(rule.dst_tag or "", 0) | self._nets.get(rule.dst_net or "", 0)
        return self._once(source), self._once(destination)

    def is_masqueraded(self, source: Node, destination: Node, version: int) -> bool:
        """Return whether packets to a node reach it masqueraded. One of the nodes must be an endpoint."""
        if source.endpoint is None or source.host == destination.host or not self.hosts_matter:
            return False
        return bool(source.group.traits[version] & MASQUERADED and not destination.group.traits[version] & IN_POOL)


def divisions(rules: Iterable[Rule], version: int) -> dict[int, list[int]]:
    """Return the protocols that rules tell apart for an IP version, and OTHERS, each with the numbers that begin parts.

    For what the numbers are, see Parts.
    """
    starts: dict[int, set[int]] = {}
    wrong = ICMPV6 if version == 4 else ICMP
    for rule in rules:
        number = OTHERS if rule.protocol is None else protocol_number(rule.protocol)
        if number in (OTHERS, wrong):
            continue
        of_protocol = starts.setdefault(number, {0})
        for first, last in port_ranges(rule.dst_ports or ()):
            of_protocol |= {first, last + 1}
        if rule.icmp_type is not None:
            first = 256 * rule.icmp_type + (rule.icmp_code or 0)
            of_protocol |= {first, first + (256 if rule.icmp_code is None else 1)}
    return {number: sorted(found - {LAST + 1}) for number, found in starts.items()} | {OTHERS: [0]}


def services(version: int) -> Answers[None]:
    """Return where the packets begin and end that verdict.is_host_service tells apart (see Parts); without OTHERS."""
    ports: dict[int, set[int]] = {UDP: {0, 53, 54}}
    if version == 6:
        ports[ICMPV6] = {0, *(256 * (type + after) for type in HOST_ICMPV6_TYPES for after in (0, 1))}
    return tuple((protocol, tuple((first, None) for first in sorted(found))) for protocol, found in ports.items())


def merged(answers: Sequence[Answers[Any]]) -> Iterator[tuple[int, int, list[Any]]]:
    """Yield the parts in which no answer changes: protocol, first number, and the value of each answer.

    The parts are sorted; OTHERS comes last.
    """
    by_protocol = [dict(answer) for answer in answers]
    named = {protocol for answer in by_protocol for protocol in answer} - {OTHERS}
    for protocol in [*sorted(named), OTHERS]:
        columns = [answer.get(protocol) or answer[OTHERS] for answer in by_protocol]
        for first in sorted({first for column in columns for first, _ in column}):
            yield protocol, first, [_at(column, first) for column in columns]


def _at(parts: Parts[Any], number: int) -> Any:
    found = None
    for first, value in parts:
        if first > number:
            break
        found = value
    return found


def joined(outbound: Decisions | None, inbound: Decisions | None) -> list[Joint]:
    """Return the decisions at both ends together, OTHERS last; None stands for an end that is a host."""
    found: list[Joint] = []
    for protocol, first, rulings in merged([outbound or EVERYTHING, inbound or EVERYTHING]):
        if found and found[-1].protocol == protocol:
            found[-1] = found[-1]._replace(last=first - 1)
        found.append(Joint(protocol, first, LAST, *rulings))
    return found


def _packet(source: str, destination: str, protocol: int, number: int) -> Packet:
    """Return a packet with a port, or an ICMP type and code; one with OTHERS matches no rule with a protocol."""
    if protocol in (ICMP, ICMPV6):
        return Packet(source, destination, protocol, icmp_type=number >> 8, icmp_code=number & 255)
    if protocol in WITH_PORTS:
        return Packet(source, destination, protocol, SOURCE_PORT, number)
    return Packet(source, destination, protocol)
