"""Evaluates the rules of profiles: the verdict for one packet. Reads neither the kernel nor the store.

This is the only evaluation in Python. `felix/dataplane/ruleset.py` expresses the same in nftables; tests compare the
two with real packets.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable

from calicoctl.addresses import BITS, number_of, version_of
from calicoctl.datastore.model import Rule, Rules
from calicoctl.errors import CalicoError
from calicoctl.policy.rules import ICMPV6, UDP, check_rule, protocol_number, versions

HOST_ICMPV6_TYPES = (130, 131, 132, 133, 135, 136)
"""Multicast listener messages, router solicitations, neighbour solicitations and advertisements.

Source: RFC 4443, 2710, 4861."""

TagContains = Callable[[str, str], bool]
"""A function of a tag and a canonical address: returns whether an endpoint with the tag has the address."""


@dataclass(frozen=True)
class Packet:
    """The properties of a packet that rules match: canonical addresses, protocol number, ports, ICMP type and code."""

    source: str
    destination: str
    protocol: int
    source_port: int | None = None
    destination_port: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None

    @property
    def version(self) -> int:
        return version_of(self.source)


@dataclass(frozen=True)
class Verdict:
    """Whether a packet passes, and why.

    If a rule of a profile matched, `rule` is its number, from 1. If only `profile` is set, that profile is missing or
    has invalid rules. If neither is set, no rule matches.
    """

    allowed: bool
    profile: str | None = None
    rule: int | None = None


def readable(rules: Rules) -> Rules:
    """Return rules with every value validated and in canonical form; raise CalicoError for an invalid one."""
    lists: list[list[Rule]] = []
    for word, rules_of in (("inbound", rules.inbound), ("outbound", rules.outbound)):
        lists.append([])
        for number, rule in enumerate(rules_of, start=1):
            try:
                lists[-1].append(check_rule(rule.to_dict(), must_match=False))
            except CalicoError as error:
                raise CalicoError(f"{word} rule {number}: {error}") from None
    return Rules(rules.id, lists[0], lists[1], rules.extra)


def decide(
    profiles: Sequence[str],
    rules: Mapping[str, Sequence[Rule] | None],
    packet: Packet,
    tag_contains: TagContains,
) -> Verdict:
    """Return the verdict of a list of profiles, evaluated in order, in one direction.

    `rules` maps each profile to its rules for that direction, as returned by `readable`. If a profile is missing there,
    or its rules are None, it denies every packet that no profile before it has decided on. Rules with the action "log"
    decide nothing. A packet that no rule matches is denied.
    """
    for profile in profiles:
        of_profile = rules.get(profile)
        if of_profile is None:
            return Verdict(False, profile)
        for number, rule in enumerate(of_profile, start=1):
            if rule.action != "log" and matches(rule, packet, tag_contains):
                return Verdict(rule.action == "allow", profile, number)
    return Verdict(False)


def matches(rule: Rule, packet: Packet, tag_contains: TagContains) -> bool:
    """Return whether all conditions of a rule hold for a packet."""
    if packet.version not in versions(rule):
        return False
    if rule.protocol is not None and protocol_number(rule.protocol) != packet.protocol:
        return False
    if rule.icmp_type is not None and rule.icmp_type != packet.icmp_type:
        return False
    if rule.icmp_code is not None and rule.icmp_code != packet.icmp_code:
        return False
    for net, tag, ports, address, port in (
        (rule.src_net, rule.src_tag, rule.src_ports, packet.source, packet.source_port),
        (rule.dst_net, rule.dst_tag, rule.dst_ports, packet.destination, packet.destination_port),
    ):
        if net is not None and not _within(address, net):
            return False
        if tag is not None and not tag_contains(tag, address):
            return False
        if ports is not None and (port is None or not any(low <= port <= high for low, high in port_ranges(ports))):
            return False
    return True


def is_host_service(packet: Packet) -> bool:
    """Return whether a packet from an endpoint to its host passes regardless of profiles: DHCP, DNS, and some ICMPv6.

    The setting EndpointToHostServices can close these services: callers check it. Source: Calico's Felix of 2015, the
    chain felix-INPUT.
    """
    if packet.protocol == ICMPV6:
        return packet.icmp_type in HOST_ICMPV6_TYPES
    if packet.protocol != UDP:
        return False
    dhcp = (546, 547) if packet.version == 6 else (68, 67)
    return packet.destination_port == 53 or (packet.source_port, packet.destination_port) == dhcp


def is_from_host(packet: Packet, hosts: Container[str], pools: Iterable[str]) -> bool:
    """Return whether a packet to an endpoint passes regardless of inbound rules, because another host sends it.

    That is so if its source is in `hosts`, the addresses of all registered hosts, and its destination is in one of
    `pools`, the CIDRs of all pools. So a host reaches endpoints on other hosts as it reaches its own endpoints.
    """
    return packet.source in hosts and any(_within(packet.destination, cidr) for cidr in pools)


def port_ranges(ports: Sequence[int | str]) -> list[tuple[int, int]]:
    """Return a rule's ports as ranges (first, last), both included, sorted and without overlap."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(_range(port) for port in ports):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _range(port: int | str) -> tuple[int, int]:
    first, _, last = str(port).partition(":")
    return int(first), int(last or first)


@lru_cache(maxsize=65536)
def _number(address: str) -> tuple[int, int]:
    """Return an address as a number, and the length of addresses of its IP version in bits."""
    return number_of(address), BITS[version_of(address)]


def _within(address: str, net: str) -> bool:
    base, _, length = net.partition("/")
    number, bits = _number(address)
    other, other_bits = _number(base)
    shift = bits - int(length)
    return bits == other_bits and number >> shift == other >> shift
