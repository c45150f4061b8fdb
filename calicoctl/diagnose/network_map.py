"""The map of the network, for people and scripts: who may reach whom, in words, as a matrix and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from calicoctl.datastore.keys import endpoint as endpoint_key
from calicoctl.datastore.model import Rule
from calicoctl.diagnose.enforcement import Cause, Enforcement, Ruling
from calicoctl.diagnose.reachability import LAST, OTHERS, Answers, Decisions, Group, Node, Parts, Reachability, merged
from calicoctl.output import first_few
from calicoctl.policy.rules import PROTOCOLS, WITH_PORTS

ALL, NOTHING = "all", "-"

NAMES = {number: name for name, number in PROTOCOLS.items()}
_ORDER = {PROTOCOLS[name]: place for place, name in enumerate(("tcp", "udp", "icmp", "icmpv6", "sctp", "udplite"))}

Ranges = list[tuple[int, int]]

Progress = Callable[[Sequence[Group]], Iterable[Group]]
"""A function that yields the groups that it is given, and may show meanwhile how many of them have been evaluated."""

Passing = Answers[bool]
"""What passes at one end of a path."""


def allowed(pair: dict[int, tuple[Passing, Passing]]) -> str:
    """Return what passes from a node to another one, such as "tcp 80, 443; icmp".

    `pair` contains by IP version what passes at either end. If both IP versions are possible, and differ in more than
    the name of ICMP, the text has a part for each.
    """
    texts = {version: _allowed(*both) for version, both in pair.items()}
    if not texts:
        return NOTHING
    if len(texts) == 2 and texts[4] != texts[6].replace("icmpv6", "icmp"):
        return f"IPv4: {texts[4]} | IPv6: {texts[6]}"
    return next(iter(texts.values()))


def passing(decisions: Decisions | None, once: Callable[[Any], Any]) -> Passing:
    """Return what passes according to decisions; everything does at an end that is a host.

    `once` returns the first value that was equal (see Reachability.once).
    """
    if decisions is None:
        return ((OTHERS, ((0, True),)),)
    found: list[tuple[int, Parts[bool]]] = []
    for protocol, parts in decisions:
        passes = [(first, ruling.allowed) for first, ruling in parts]
        changes = [part for before, part in zip([(0, None), *passes], passes) if before[1] is not part[1]]
        found.append(once((protocol, once(tuple(map(once, changes))))))
    equal: Passing = once(tuple(found))
    return equal


@cache
def _allowed(outbound: Passing, inbound: Passing) -> str:
    ranges: dict[int, dict[bool, Ranges]] = {}
    for protocol, first, both in merged([outbound, inbound]):
        of_protocol = ranges.setdefault(protocol, {True: [], False: []})
        of_protocol[all(both)].append((first, LAST))
    passes = bool(ranges.pop(OTHERS)[True])
    words = []
    for protocol in sorted(ranges, key=lambda number: (_ORDER.get(number, len(_ORDER)), number)):
        shown, others = (_closed(ranges[protocol], wanted) for wanted in (not passes, passes))
        if shown:
            words.append(_spelled(protocol, shown, others))
    if passes:
        return f"{ALL} except {'; '.join(words)}" if words else ALL
    return "; ".join(words) or NOTHING


def _closed(ranges: dict[bool, Ranges], wanted: bool) -> Ranges:
    """Return the ranges that pass, or that do not, with their ends: where the next one of the other kind begins."""
    found: Ranges = []
    last = None
    for first, passes in sorted((first, passes) for passes, some in ranges.items() for first, _ in some):
        if passes is not last and last is wanted:
            found[-1] = (found[-1][0], first - 1)
        if passes is wanted and last is not wanted:
            found.append((first, LAST))
        last = passes
    return found


def _spelled(protocol: int, ranges: Ranges, others: Ranges) -> str:
    """Return a protocol with ranges of ports, or of ICMP types and codes. `others` are the ranges that are left."""
    name = NAMES.get(protocol, f"protocol {protocol}")
    if not others:
        return name
    if len(others) < len(ranges):
        return f"{name} except {_numbers(protocol, others)}"
    return f"{name} {_numbers(protocol, ranges)}"


def _numbers(protocol: int, ranges: Ranges) -> str:
    if protocol in WITH_PORTS:
        return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
    return ", ".join(map(_types, ranges))


def _types(numbers: tuple[int, int]) -> str:
    """Return a range of ICMP types and codes, such as "type 3 code 4" or "type 0-4"."""
    (first, code), (last, last_code) = divmod(numbers[0], 256), divmod(numbers[1], 256)
    if (code, last_code) == (0, 255):
        return f"type {first}" if first == last else f"type {first}-{last}"
    if numbers[0] == numbers[1]:
        return f"type {first} code {code}"
    if first == last:
        return f"type {first} code {code}-{last_code}"
    return f"type {first} code {code} to type {last} code {last_code}"


class NetworkMap:
    """Who may reach whom, as far as `enforcement` knows. The numbers of groups count from 1 for people."""

    def __init__(self, enforcement: Enforcement) -> None:
        self.enforcement = enforcement
        self.reach = Reachability(enforcement)
        self._passes: dict[int, Passing] = {}
        """By the identity of decisions, which live as long as `reach`."""
        self._host_of = {node.host: node for node in self.reach.hosts}

    def allowed(self, source: Node, destination: Node) -> str:
        """Return what passes from a node to another one, as a text. At least one of them must be an endpoint."""
        found = self.reach.decisions(source, destination)
        return allowed({version: (self._passing(one), self._passing(other)) for version, (one, other) in found.items()})

    def _passing(self, decisions: Decisions | None) -> Passing:
        if id(decisions) not in self._passes:
            self._passes[id(decisions)] = passing(decisions, self.reach.once)
        return self._passes[id(decisions)]

    def sample(self, source: Group, destination: Group) -> tuple[Node, Node] | None:
        """Return two nodes of these groups, or None if there are no such two.

        Two endpoints are not the same one; an endpoint and a host are not the endpoint and its own host.
        """
        if source.is_hosts and destination.is_hosts:
            return None
        if source.is_hosts or destination.is_hosts:
            pairs = ((a, b) for a in source.members for b in destination.members if a.host != b.host)
        else:
            pairs = ((a, b) for a in source.members for b in destination.members if a.endpoint != b.endpoint)
        return next(pairs, None)

    def own_hosts(self, group: Group) -> list[tuple[Node, Node]]:
        """Return members of a group of endpoints with their own hosts: one for each group of hosts."""
        found = {self._host_of[member.host].group: member for member in group.members}
        return [(member, self._host_of[member.host]) for member in found.values()]

    def problems(self) -> list[tuple[str, str]]:
        """Return what of the store cannot be used, sorted, as pairs of a key and the reason."""
        found: dict[str, str] = {}
        for host in {self.enforcement.host, *self._host_of}:
            seen = self.enforcement.seen_by(host)
            found.update({**seen.problems, **seen.skipped})
            found.update((key, "it is too large to be read") for key in seen.unread)
        for node in self.reach.endpoints:
            if node.problem is not None and node.group.is_set_up and node.endpoint is not None:
                found[endpoint_key(node.endpoint)] = node.problem
        return sorted(found.items())

    # As a table

    def table(self, progress: Progress = iter) -> tuple[list[str], list[list[str]]]:
        """Return the heading and the rows of the matrix: what may pass from the group of a row to that of a column."""
        heading = ["From", *(str(group.number + 1) for group in self.reach.groups)]
        heading.append("own host")
        rows: list[list[str]] = []
        for one in progress(self.reach.groups):
            cells = [self._cell([self.sample(one, other)]) for other in self.reach.groups]
            own = "" if one.is_hosts else self._cell(self.own_hosts(one))
            rows.append([str(one.number + 1), *cells, own])
        endpoints = [group for group in self.reach.groups if not group.is_hosts]
        last = ["own host", *(self._cell([(b, a) for a, b in self.own_hosts(one)]) for one in endpoints)]
        rows.append([*last, *[""] * (len(heading) - len(last))])
        return heading, rows

    def _cell(self, pairs: Sequence[tuple[Node, Node] | None]) -> str:
        return " or ".join(dict.fromkeys(self.allowed(*pair) for pair in pairs if pair is not None))

    def legend(self) -> list[list[str]]:
        """Return a row for each group: its number, how many members it has, who they are, and their profiles."""
        return [
            [str(group.number + 1), str(len(group.members)), first_few(names_of(group)), described(group)]
            for group in self.reach.groups
        ]

    # As JSON

    def to_dict(self, progress: Progress = iter) -> dict[str, Any]:
        """Return the map for scripts: see docs/map.md for the fields.

        Lists that may be long are iterators. They must be taken in the order of the fields: what `pairs`, `decisions`
        and `rulings` contain is found while those before them are taken.
        """
        writer = Writer(self)
        groups = self.reach.groups
        return {
            "endpoints": map(self._endpoint, self.reach.endpoints),
            "hosts": (
                {"host": node.host, "addresses": list(node.addresses), "group": node.group.number}
                for node in self.reach.hosts
            ),
            "reach": ([writer.pair(self.sample(one, other)) for other in groups] for one in progress(groups)),
            "own_hosts": (
                {
                    "group": group.number,
                    "host_group": host.group.number,
                    "to_host": writer.pair((node, host)),
                    "from_host": writer.pair((host, node)),
                }
                for group in groups
                if not group.is_hosts
                for node, host in self.own_hosts(group)
            ),
            "pairs": writer.pairs(),
            "decisions": ([part._asdict() for part in parts] for parts in writer.decisions),
            "rulings": iter(writer.rulings),
            "problems": ({"key": key, "problem": problem} for key, problem in self.problems()),
        }

    def _endpoint(self, node: Node) -> dict[str, Any]:
        assert node.endpoint is not None, "hosts have a shape of their own"
        id = node.endpoint
        return {
            "host": id.host,
            "orchestrator": id.orchestrator,
            "workload": id.workload,
            "workload_name": self.enforcement.endpoints[id].workload_name,
            "endpoint": id.endpoint,
            "addresses": list(node.addresses),
            "profiles": list(node.group.profiles),
            "tags": self.tags(node.group.profiles),
            "problem": node.problem,
            "group": node.group.number,
        }

    def tags(self, profiles: Iterable[str]) -> list[str]:
        """Return the tags of profiles, sorted."""
        known = self.enforcement.seen_by(self.enforcement.host).profiles
        return sorted({tag for name in profiles if name in known for tag in known[name].tags})

    def rules_of(self, profile: str, direction: str) -> Sequence[Rule] | None:
        """Return the rules of a profile for "outbound" or "inbound" packets; None if it denies everything."""
        known = self.enforcement.seen_by(self.enforcement.host).profiles.get(profile)
        return None if known is None or known.rules is None else getattr(known.rules, direction)

    def reason(self, ruling: Ruling, direction: str) -> str:
        """Return why a ruling is as it is, for any endpoint to which it applies."""
        verdict = ruling.verdict
        if verdict is None:
            return ruling.cause.value
        if verdict.profile is None:
            return "no rule of its profiles matches"
        text = ruling.reason([], {verdict.profile: self.rules_of(verdict.profile, direction)})
        return f"{text}; then its host's own firewall decides" if ruling.cause is Cause.HOST_FIREWALL else text


class Part(NamedTuple):
    """The packets of a protocol to the ports from `first` to `last`, and what decides on them: see docs/map.md."""

    protocol: int | None
    first: int
    last: int
    ruling: int


class Writer:
    """Collects what the JSON has in lists: pairs, decisions and rulings, each of them once."""

    def __init__(self, network: NetworkMap) -> None:
        self._network = network
        self._pair_numbers: dict[tuple[int | None, ...], int] = {}
        """By IP version, the outbound and the inbound decisions' positions, and so on for the other version."""
        self._allowed: list[str] = []
        """What passes in each of these pairs."""
        self._decision_numbers: dict[tuple[str, int], int] = {}
        self._ruling_numbers: dict[tuple[str, Ruling], int] = {}
        self.decisions: list[list[Part]] = []
        self.rulings: list[dict[str, Any]] = []

    def pair(self, nodes: tuple[Node, Node] | None) -> int | None:
        """Return the position in `pairs` of what passes between two nodes; None if there are no such two."""
        if nodes is None:
            return None
        found = self._network.reach.decisions(*nodes).items()
        key = tuple(
            part
            for version, (one, other) in found
            for part in (version, self.number("outbound", one), self.number("inbound", other))
        )
        if key not in self._pair_numbers:
            self._pair_numbers[key] = len(self._allowed)
            self._allowed.append(self._network.allowed(*nodes))
        return self._pair_numbers[key]

    def pairs(self) -> Iterator[dict[str, Any]]:
        """Yield what passes in each pair, and the positions of the decisions."""
        for key, allowed in zip(self._pair_numbers, self._allowed):
            both = {version: {"outbound": one, "inbound": other} for version, one, other in zip(*[iter(key)] * 3)}
            yield {"allowed": allowed, "ipv4": both.get(4), "ipv6": both.get(6)}

    def number(self, direction: str, decisions: Decisions | None) -> int | None:
        """Return the position in `decisions` of an endpoint's decisions; None if there are none."""
        if decisions is None:
            return None
        key = (direction, id(decisions))
        if key not in self._decision_numbers:
            self._decision_numbers[key] = len(self.decisions)
            self.decisions.append(
                [
                    self._network.reach.once(part)
                    for protocol, parts in decisions
                    for (first, ruling), after in zip(parts, [*(start for start, _ in parts[1:]), LAST + 1])
                    for part in [
                        Part(
                            None if protocol == OTHERS else protocol, first, after - 1, self._ruling(direction, ruling)
                        )
                    ]
                ]
            )
        return self._decision_numbers[key]

    def _ruling(self, direction: str, ruling: Ruling) -> int:
        key = (direction, ruling)
        if key not in self._ruling_numbers:
            self._ruling_numbers[key] = len(self.rulings)
            why = self._network.reason(ruling, direction)
            profile, rule = (None, None) if ruling.verdict is None else (ruling.verdict.profile, ruling.verdict.rule)
            self.rulings.append(
                {"direction": direction, "allowed": ruling.allowed, "why": why, "profile": profile, "rule": rule}
            )
        return self._ruling_numbers[key]


def names_of(group: Group) -> Iterator[str]:
    """Yield the names of a group's members; endpoints with their hosts."""
    for node in group.members:
        yield node.name if node.endpoint is None else f"{node.name} on {node.host}"


def described(group: Group) -> str:
    """Return what the members of a group have in common: their profiles, or the setting of hosts."""
    if group.is_hosts:
        return f"hosts, DefaultEndpointToHostAction {group.action}"
    profiles = ", ".join(group.profiles) or "no profile"
    problems = dict.fromkeys(str(node.problem) for node in group.members)
    return profiles if group.is_set_up else f"{profiles} (not set up: {first_few(problems)})"
