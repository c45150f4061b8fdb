"""Drops: says which workload, profile and rule a dropped packet was about, for `calicoctl drops` and the metrics.

The kernel counts all drops, and logs a sample of them (drops.py). This manager adds what the snapshot knows to the
packets of the sample, and removes the counts of interfaces that exist no more.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import chain
from typing import TYPE_CHECKING, Any

from calicoctl import clock
from calicoctl.addresses import version_of
from calicoctl.datastore.keys import EndpointId
from calicoctl.desired.snapshot import Dirty
from calicoctl.errors import CalicoError
from calicoctl.felix.dataplane import drops
from calicoctl.felix.dataplane.changes import spelled
from calicoctl.felix.dataplane.manager import Context, Manager
from calicoctl.felix.dataplane.ruleset import rule_counters
from calicoctl.felix.events import PacketsLogged, Tick
from calicoctl.policy.rules import PROTOCOLS, text
from calicoctl.workloads.workload import short_id

if TYPE_CHECKING:
    from calicoctl.felix.dataplane.drops import Header, Logged
    from calicoctl.felix.dataplane.nft import Nft
    from calicoctl.felix.drop_log import DropLog

INTERVAL = 2.0
"""Seconds between two readings of the addresses of all hosts' endpoints at least, while these change."""

_NAMES = {number: name for name, number in PROTOCOLS.items()}
_TRACED = {"tcp": None, "udp": None, "icmp": 8, "icmpv6": 128}
"""Protocol that `profile trace` knows -> the type of the packet that it is about: an echo request."""

_WHY = {
    drops.NO_RULE: "no rule matched",
    drops.SPOOFED: "its sender is forged",
    drops.NO_CONNECTION: "it belongs to no connection, and starts none",
    drops.NO_ENDPOINT: "its interface has no endpoint that may be used",
    drops.HOST_ACTION: "DefaultEndpointToHostAction is DROP",
}


@dataclass(frozen=True)
class Counted:
    """How many packets of an endpoint of this host were dropped. For direction and reason, see drops.KINDS.

    `endpoint` is its id, and not the workload's name, since every user of the host may read the metrics.
    """

    endpoint: str
    direction: str
    reason: str
    packets: int


class DropsManager(Manager):
    """Explains the packets that the kernel has logged, and adds them to the DropLog."""

    def __init__(self, context: Context, nft: Nft, log: DropLog) -> None:
        self._context = context
        self._snapshot = context.snapshot
        self._nft = nft
        self._log = log
        self._due = False
        self._shown: dict[tuple[str, int], int] = {}
        """The packets that `counted` has found last: see Counts.drops."""
        self._rules: dict[str, dict[str, tuple[str, int, str]]] = {}
        """Profile as in names of chains -> counter -> the profile, and the number and the text of the rule."""
        self._owners: dict[str, EndpointId] = {}
        """Address -> an endpoint of any host that has it, as of `_read_at`."""
        self._read_at = 0.0
        self._is_outdated = True

    def on_event(self, event: Any) -> None:
        if isinstance(event, PacketsLogged):
            for packet in event.take():
                self._add(packet)
        elif isinstance(event, Dirty):
            self._is_outdated = self._is_outdated or bool(event.endpoints)
            for profile in event.profiles:
                self._rules.pop(spelled(profile), None)
        elif isinstance(event, Tick):
            self._due = True

    @property
    def needs_apply(self) -> bool:
        return self._due

    def apply(self) -> None:
        """After a Tick, remove the counts of interfaces that do not exist, and belong to no endpoint."""
        if not self._due:
            return
        self._due = False
        with suppress(OSError, CalicoError):  # tried again after the next Tick
            counted = drops.read_drops(self._nft)
            unknown = {name for name, _ in counted} - {endpoint.interface for endpoint in self._snapshot.local.values()}
            if unknown:
                unknown -= {name for _, name in socket.if_nameindex()}
                endpoints = self._snapshot.endpoints.items()
                unknown -= {endpoint.name for id, endpoint in endpoints if id.host == self._snapshot.host}
            gone = [
                f'"{name}" . {number}'
                for name, number in counted
                if name in unknown and drops.SPELLABLE.fullmatch(name)
            ]
            if gone:
                self._nft.run(f"delete element inet calico {drops.SET} {{ {', '.join(gone)} }}\n")

    def counted(self) -> Iterator[Counted]:
        """Yield the drops of this host's endpoints, as the kernel counts them now. May be called by any thread.

        No count is lower than in the call before, unless the kernel's was removed in between.
        """
        try:
            found = drops.read_drops(self._nft)
        except OSError:  # the tables are not there
            return
        # a reload of the tables may lose some packets, and Prometheus takes a counter that goes back for a new one
        self._shown = {key: max(count.packets, self._shown.get(key, 0)) for key, count in found.items()}
        for (interface, number), packets in sorted(self._shown.items()):
            local = self._snapshot.owner(interface)
            if local is not None and number in drops.KINDS:
                yield Counted(local.id.endpoint, *drops.KINDS[number], packets)

    def _add(self, packet: Logged) -> None:
        parsed, header = drops.parse_prefix(packet.prefix), packet.header
        if parsed is None or header is None:
            return
        direction, reason, subject = parsed
        interface = packet.incoming if direction == "outbound" else packet.outgoing
        profile, rule, why = self._why(reason, subject)
        ends = {
            "from": self._end(header.source, interface if direction == "outbound" else None),
            "to": self._end(header.destination, interface if direction == "inbound" else None),
        }
        protocol: str | int = _NAMES.get(header.protocol, header.protocol)
        forged_by = interface if reason == drops.SPOOFED else None
        is_traceable = any(end["endpoint"] for end in ends.values())  # else no policy decides
        values = {
            "time": clock.text(datetime.fromtimestamp(packet.at, timezone.utc)),
            "host": self._snapshot.host,
            "direction": direction,
            "reason": reason,
            "why": why,
            "profile": profile,
            "rule": rule,
            "interface": interface or None,
            **ends,
            "protocol": protocol,
            "source_port": header.source_port,
            "port": header.port,
            "icmp_type": header.icmp_type,
            "icmp_code": header.icmp_code,
            "trace": self._trace(header, protocol, forged_by) if is_traceable else None,
        }
        about = (header.source, header.destination, protocol, header.port, header.icmp_type, header.icmp_code)
        self._log.add((direction, reason, why, interface, *about), values)

    def _why(self, reason: str, subject: str) -> tuple[str | None, int | None, str]:
        """Return the profile and the number of the rule that decided, None if none did, and a text for both."""
        if reason == drops.PROFILE:
            profile = self._profile(subject)
            return profile, None, f"profile {profile} does not exist, or its rules are invalid"
        if reason != drops.RULE:
            return None, None, _WHY[reason]
        direction, _, rest = subject.partition("/")
        name = rest.rpartition("/")[0]
        if name not in self._rules:
            self._rules[name] = self._rules_of(self._profile(name))
        known = self._rules[name].get(subject)
        if known is None:
            return self._profile(name), None, f"a rule of profile {self._profile(name)} that has been changed since"
        profile, number, of_rule = known
        return profile, number, f"profile {profile}, {direction} rule {number}: {of_rule}"

    def _profile(self, name: str) -> str:
        """Return the profile that is called `name` in names of chains; `name` itself if it is unknown."""
        if not name.startswith("/"):
            return name
        of_endpoints = (profile for local in self._snapshot.local.values() for profile in local.profiles)
        known = chain(self._snapshot.profiles, of_endpoints)  # an endpoint may have one that does not exist
        return next((profile for profile in known if spelled(profile) == name), name)

    def _rules_of(self, profile: str) -> dict[str, tuple[str, int, str]]:
        found: dict[str, tuple[str, int, str]] = {}
        known = self._snapshot.profiles.get(profile)
        if known is not None and known.rules is not None:
            for direction, rules in (("inbound", known.rules.inbound), ("outbound", known.rules.outbound)):
                names = rule_counters(profile, direction, rules)
                for number, (rule, counter) in enumerate(zip(rules, names), start=1):
                    if counter is not None:
                        found[counter] = (profile, number, text(rule))
        return found

    def _end(self, address: str, interface: str | None) -> dict[str, Any]:
        """Describe an end of a packet's way; `interface` is the interface there, if it is one of an endpoint's."""
        local = self._snapshot.owner(interface) if interface else None
        id = local.id if local is not None else self._owner(address)
        host = id.host if id is not None else self._snapshot.topology.users.get(address)
        name = self._called(id) if id is not None else host or address
        return {"name": name, "address": address, "endpoint": None if id is None else id.endpoint, "host": host}

    def _owner(self, address: str) -> EndpointId | None:
        """Return the endpoint, of any host, that has an address; None if it is not known that one has it."""
        local = self._snapshot.owner(address)
        if local is not None:
            return local.id
        if self._is_outdated and time.monotonic() >= self._read_at + INTERVAL:
            endpoints = self._snapshot.endpoints.items()
            self._owners = {one: id for id, endpoint in endpoints for one in endpoint.addresses}
            self._is_outdated, self._read_at = False, time.monotonic()
        id = self._owners.get(address)
        return id if id in self._snapshot.endpoints else None

    def _called(self, id: EndpointId) -> str:
        endpoint = self._snapshot.endpoints.get(id)
        return (None if endpoint is None else endpoint.workload_name) or short_id(id.workload)

    def _trace(self, header: Header, protocol: str | int, forged_by: str | None) -> str | None:
        """Return the command that says what policy does to such a packet; None for a packet that it does not know.

        If the sender is forged, by the endpoint with the interface `forged_by`, it is about the endpoint's own address.
        """
        source: str | None = header.source
        if forged_by is not None:
            local = self._snapshot.owner(forged_by)
            own = () if local is None else local.addresses_of(version_of(header.destination))
            source = next(iter(own), None)
        if source is None or protocol not in _TRACED:
            return None
        command = f"calicoctl profile trace {source} {header.destination} {protocol}"
        if header.icmp_type is not None:
            return command if header.icmp_type == _TRACED[protocol] else None
        if not header.port or not header.source_port:
            return None
        return f"{command} {header.port} --from-port={header.source_port}"
