"""The map of the network as one HTML file, which needs no network: see `page/` for its markup, style and script.

The file contains the decisions in tables, so that its size does not grow with the number of pairs. The script looks up
what passes between two nodes, and joins the decisions of both ends; it evaluates no rule. Whatever comes from the store
is in one JSON text, in which no character can end the element that contains it; the script shows it as text only. The
page's Content-Security-Policy allows its own script and style, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Rule
from calicoctl.diagnose.network_map import NetworkMap, Progress, Writer
from calicoctl.diagnose.reachability import IN_POOL, OTHERS, Decisions, Group, Node
from calicoctl.errors import printable
from calicoctl.policy.rules import PROTOCOLS, text

PAGE = Path(__file__).parent / "page"

_HARMLESS = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}  # they are in JSON's strings alone


def page(network: NetworkMap, made: str, drops: Iterable[dict[str, Any]] = (), progress: Progress = iter) -> bytearray:
    """Return the file. `made` is the time at which the store was read, as a text.

    `drops` are the packets that were dropped lately on the host on whose behalf the store was read (see dropped.py).
    """
    parts = {name: (PAGE / f"map.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    filled = parts["html"].replace("@STYLE_HASH@", _hash(parts["css"])).replace("@SCRIPT_HASH@", _hash(parts["js"]))
    filled = filled.replace("@STYLE@", parts["css"]).replace("@SCRIPT@", parts["js"])
    before, after = filled.split("@DATA@")
    data = _json(_Data(network).to_dict(made, drops, progress))
    content = bytearray()
    for part in chain([before], data, [after]):
        content += part.encode()
    return content


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _json(data: dict[str, Any]) -> Iterator[str]:
    """Yield JSON for the script, without characters that could end its element, or begin another one.

    An iterator becomes a list. Lists are yielded item by item: as a whole, they would be in memory several times. An
    item that is bytes is JSON already: see `_converted`.
    """
    for number, (name, one) in enumerate(data.items()):
        yield f"{',' if number else '{'}{_converted(name).decode()}:"
        if isinstance(one, (list, Iterator)):
            yield "["
            for place, item in enumerate(one):
                text = item if isinstance(item, bytes) else _converted(item)
                yield f"{',' if place else ''}{text.decode()}"
            yield "]"
        else:
            yield _converted(one).decode()
    yield "}"


def _converted(value: Any) -> bytes:
    """Return a value as JSON for the script, which takes less memory than a dictionary."""
    return json.dumps(_escaped(value), separators=(",", ":")).translate(_HARMLESS).encode()


def _escaped(value: Any) -> Any:
    """Return a value of JSON, in whose texts all unprintable characters are escaped: some turn text around."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {name: _escaped(one) for name, one in value.items()}
    return [_escaped(one) for one in value] if isinstance(value, list) else value


class _Data:
    """What the script reads. Traits are lists of numbers here, the first of which is 0 for an address in a pool."""

    def __init__(self, network: NetworkMap) -> None:
        self._network = network
        self._reach = network.reach
        self._writer = Writer(network)
        self._endpoint_numbers: dict[EndpointId, int] = {}
        """Endpoints of different workloads may have the same id in the store, and one may have several nodes."""
        self._tables: list[bytes] = []
        self._table_numbers: dict[object, int] = {}
        self._kinds: dict[tuple[int, int], dict[int, Node]] = {}
        self._endpoints = [group for group in self._reach.groups if not group.is_hosts]
        self._hosts = [group for group in self._reach.groups if group.is_hosts]
        self._of_version = {version: [g for g in self._endpoints if version in g.traits] for version in (4, 6)}
        self._with_trait: dict[tuple[int, int], list[Group]] = defaultdict(list)
        """By IP version and trait, as in the lists of traits."""
        for version, groups in self._of_version.items():
            for group in groups:
                for trait in _numbers(group.traits[version]):
                    self._with_trait[version, trait].append(group)

    def to_dict(self, made: str, drops: Iterable[dict[str, Any]], progress: Progress) -> dict[str, Any]:
        profiles = sorted({name for group in self._endpoints for name in group.profiles})
        numbers = {name: number for number, name in enumerate(profiles)}
        hosts = {node.host: number for number, node in enumerate(self._reach.hosts)}
        groups = [_converted(self._group(group, numbers)) for group in progress(self._reach.groups)]
        return {
            "made": made,
            "protocols": {str(number): name for name, number in PROTOCOLS.items()},
            "profiles": [self._profile(name) for name in profiles],
            "hosts": list(hosts),
            "nodes": (self._node(node, hosts) for node in self._reach.nodes),  # not all at once
            "groups": groups,
            "tables": self._tables,
            "decisions": (
                [[OTHERS if part.protocol is None else part.protocol, part.first, part.ruling] for part in parts]
                for parts in self._writer.decisions
            ),
            "rulings": [[ruling["allowed"], ruling["why"]] for ruling in self._writer.rulings],
            "drops": list(map(_drop, drops)),
            "dropsOf": self._network.enforcement.host,
            "problems": [list(problem) for problem in self._network.problems()],
        }

    def _profile(self, name: str) -> dict[str, Any]:
        def texts(rules: Iterable[Rule] | None) -> list[str] | None:
            return None if rules is None else list(map(text, rules))

        return {
            "name": name,
            "tags": self._network.tags([name]),
            "inbound": texts(self._network.rules_of(name, "inbound")),
            "outbound": texts(self._network.rules_of(name, "outbound")),
        }

    def _node(self, node: Node, hosts: dict[str, int]) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "name": node.name,
            "host": hosts[node.host],
            "group": node.group.number,
            "addresses": list(node.addresses),
        }
        if node.endpoint is not None:
            shown["id"] = node.endpoint.endpoint
            shown["endpoint"] = self._endpoint_numbers.setdefault(node.endpoint, len(self._endpoint_numbers))
        if node.problem is not None:
            shown["problem"] = node.problem
        return shown

    def _group(self, group: Group, profiles: dict[str, int]) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "traits": {version: _numbers(traits) for version, traits in group.traits.items()},
            "profiles": [profiles[name] for name in group.profiles],
        }
        if group.is_hosts:
            return {**shown, "action": group.action}
        for name in ("out", "in", "fromHost", "fromOwn"):
            shown[name] = {}
        shown["toOwn"] = {}
        for version in group.traits:
            self._fill(shown, group, version)
        return shown

    def _fill(self, shown: dict[str, Any], group: Group, version: int) -> None:
        """Add the tables of a group of endpoints for an IP version."""
        one, reach = group.members[0], self._reach
        outbound, inbound = reach.looks_at("outbound", group)[1], reach.looks_at("inbound", group)[1]
        far = [
            pair for hosts in self._hosts if version in hosts.traits and (pair := self._network.sample(group, hosts))
        ]
        near = [pair for pair in self._network.own_hosts(group) if version in pair[1].group.traits]
        answers = {kind: reach.outbound(one, peer, version) for kind, peer in self._peers(outbound, version).items()}
        answers |= {host.group.traits[version] & outbound: reach.outbound(a, host, version) for a, host in far}
        shown["out"][version] = self._table(outbound, "outbound", answers)
        answers = {kind: reach.inbound(peer, one, version) for kind, peer in self._peers(inbound, version).items()}
        answers |= self._masqueraded(shown, group, version, inbound)
        shown["in"][version] = self._table(inbound, "inbound", answers)
        answers = {host.group.traits[version] & inbound: reach.inbound(host, a, version) for a, host in far}
        shown["fromHost"][version] = self._table(inbound, "inbound", answers)
        answers = {host.group.traits[version] & inbound: reach.inbound(host, a, version) for a, host in near}
        shown["fromOwn"][version] = self._table(inbound, "inbound", answers)
        for action in sorted({str(host.group.action) for _, host in near}):
            with_action = [(a, host) for a, host in near if host.group.action == action]
            answers = {
                host.group.traits[version] & outbound: reach.outbound(a, host, version) for a, host in with_action
            }
            shown["toOwn"].setdefault(action, {})[version] = self._table(outbound, "outbound", answers)

    def _masqueraded(
        self, shown: dict[str, Any], group: Group, version: int, looks_at: int
    ) -> dict[int, Decisions | None]:
        """Return the decisions about what reaches a group masqueraded; add the traits that its own packets get."""
        one, reach = group.members[0], self._reach
        if group.host is None:
            return {}
        others = [other.members[0] for other in self._of_version[version]]
        outside = (peer for peer in others if peer.host != one.host and not peer.group.traits[version] & IN_POOL)
        if peer := next(outside, None):
            sent = reach.traits_as_sent(one, peer, version)
            if sent != group.traits[version]:
                shown.setdefault("sent", {})[version] = _numbers(sent)
        if group.traits[version] & IN_POOL:
            return {}
        return {
            reach.traits_as_sent(peer, one, version) & looks_at: reach.inbound(peer, one, version) for peer in others
        }

    def _peers(self, looks_at: int, version: int) -> dict[int, Node]:
        """Return an endpoint for each combination of the traits in `looks_at` that an endpoint has."""
        key = (looks_at, version)
        if key not in self._kinds:
            some = {group for trait in _numbers(looks_at) for group in self._with_trait[version, trait]}
            none = next((group for group in self._of_version[version] if not group.traits[version] & looks_at), None)
            groups = sorted(some if none is None else {*some, none}, key=lambda group: group.number)
            once = self._reach.once
            self._kinds[key] = {once(group.traits[version] & looks_at): group.members[0] for group in groups}
        return self._kinds[key]

    def _table(self, looks_at: int, direction: str, answers: dict[int, Decisions | None]) -> int:
        found = {kind: self._writer.number(direction, decisions) for kind, decisions in answers.items()}
        key = (looks_at, tuple(found.items()))
        if key not in self._table_numbers:
            self._table_numbers[key] = len(self._tables)
            by = {",".join(map(str, _numbers(kind))): number for kind, number in found.items()}
            self._tables.append(_converted({"looks": _numbers(looks_at), "by": by}))
        return self._table_numbers[key]


def _drop(drop: dict[str, Any]) -> dict[str, Any]:
    protocol = drop["protocol"] if isinstance(drop["protocol"], str) else f"protocol {drop['protocol']}"
    number = f" {drop['port']}" if drop["port"] is not None else ""
    if drop["icmp_type"] is not None:
        number = f" type {drop['icmp_type']}"
    return {
        "from": drop["from"]["address"],
        "to": drop["to"]["address"],
        "what": protocol + number,
        **{name: drop[name] for name in ("time", "direction", "why", "count")},
    }


def _numbers(traits: int) -> list[int]:
    """Return a sum of powers of two as the list of their exponents."""
    found = []
    while traits:
        lowest = traits & -traits
        found.append(lowest.bit_length() - 1)
        traits ^= lowest
    return found
