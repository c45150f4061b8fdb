"""Evaluates the rules of profiles for one packet. Does not access the kernel or the store.

`felix/dataplane/ruleset.py` translates the same rules to nftables. Tests send real packets through the nftables rules,
and compare what happens to the packets with the verdicts of this module.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable, NamedTuple

from calicoctl.addresses import BITS, number_of, version_of
from calicoctl.datastore.model import Rule, Rules
from calicoctl.errors import CalicoError
from calicoctl.policy.rules import ICMPV6, UDP, check_rule, protocol_number, versions

HOST_ICMPV6_TYPES = (130, 131, 132, 133, 135, 136)
"""The ICMPv6 types that `is_host_service` accepts: multicast listener query, report and done; router solicitation;
neighbour solicitation and advertisement. Source: RFC 2710 and RFC 4861."""

TagContains = Callable[[str, str], bool]
"""A function (tag, canonical address) -> whether an endpoint with this tag has this address."""


class Party(NamedTuple):
    """An address as one of the two parties of connections.

    It is the source of a connection's first packet if `originates` is true, else the destination, as the packet has it
    where it is forwarded.
    """

    address: str
    originates: bool


def either_party(addresses: Iterable[str]) -> set[Party]:
    """Return each of these addresses as both parties."""
    return {Party(address, originates) for address in addresses for originates in (True, False)}


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
    """Whether a packet is allowed, and why.

    If a rule decided, `profile` is the rule's profile, and `rule` is the rule's number, from 1, among the profile's
    rules for the packet's direction. If `rule` is None, the packet is denied: if `profile` is set, because that profile
    is missing or has invalid rules; if `profile` is None, because no rule matched.
    """

    allowed: bool
    profile: str | None = None
    rule: int | None = None


def readable(rules: Rules) -> Rules:
    """Return a copy of `rules` with all values validated and canonical; raise CalicoError for an invalid value."""
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
    """Return the verdict on a packet that an endpoint with these `profiles` receives, or that it sends.

    `rules` maps each profile to its rules for this direction, validated by `readable`. The first rule that matches the
    packet decides, in the order of `profiles`; rules with the action "log" are skipped. If a profile is missing in
    `rules`, or has the value None there, it denies every packet that no earlier profile decided. A packet that matches
    no rule is denied.
    """
    for profile in profiles:
        of_profile = rules.get(profile)
        if of_profile is None:
            return Verdict(False, profile)
        for number, rule in enumerate(of_profile, start=1):
            if rule.action != "log" and matches(rule, packet, tag_contains):
                return Verdict(rule.action == "allow", profile, number)
    return Verdict(False)


def may_deny(rule: Rule, joins: bool) -> bool:
    """Return whether an address that joins or leaves a tag of `rule` may get packets denied that were allowed before.

    The address joins the tag if `joins` is True, and leaves it if not. The answer follows from three properties of
    `decide`: the first rule that matches decides, no condition is negated, and what no rule matches is denied.

    * A rule that allows matches more packets when the address joins. It allows these, whatever has decided about them
      before. When the address leaves, packets that it has allowed are left to later rules and profiles, and are denied
      if none of these allows them.
    * A rule that denies matches more packets when the address joins, and denies these. When the address leaves, packets
      that it has denied are left to others, and are denied still at worst.
    * A rule that logs decides nothing.

    So the answer depends neither on where the rule is, inbound or outbound, and among which other rules and profiles,
    nor on whether it names the tag for the source or the destination. Several such changes at once deny nothing if none
    of them does by itself.
    """
    return rule.action == ("deny" if joins else "allow")


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
        if net is not None and not within(address, net):
            return False
        if tag is not None and not tag_contains(tag, address):
            return False
        if ports is not None and (port is None or not any(low <= port <= high for low, high in port_ranges(ports))):
            return False
    return True


def is_host_service(packet: Packet) -> bool:
    """Return whether a packet from an endpoint to its host is DHCP, DNS over UDP, or in HOST_ICMPV6_TYPES.

    Such packets are allowed regardless of profiles, unless the setting EndpointToHostServices is "drop". This function
    does not check the setting; its callers do. Source: the chain felix-INPUT of Calico's Felix, 2015.
    """
    if packet.protocol == ICMPV6:
        return packet.icmp_type in HOST_ICMPV6_TYPES
    if packet.protocol != UDP:
        return False
    dhcp = (546, 547) if packet.version == 6 else (68, 67)
    return packet.destination_port == 53 or (packet.source_port, packet.destination_port) == dhcp


def is_from_host(packet: Packet, hosts: Container[str], pools: Iterable[str]) -> bool:
    """Return whether a packet to an endpoint is allowed regardless of the inbound rules because a host sends it.

    This is so if the source is in `hosts`, the addresses of all registered hosts, and the destination is in one of
    `pools`, the CIDRs of all pools.
    """
    return packet.source in hosts and any(within(packet.destination, cidr) for cidr in pools)


def port_ranges(ports: Sequence[int | str]) -> list[tuple[int, int]]:
    """Return a rule's ports as sorted ranges (first port, last port), both inclusive.

    `ports` are numbers, or ranges such as "8000:8010". Ranges that overlap or adjoin are merged.
    """
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
    """Return (address as a number, number of bits of an address of the same IP version)."""
    return number_of(address), BITS[version_of(address)]


def within(address: str, net: str) -> bool:
    """Return whether an address is in a net. Both are canonical; they may be of different IP versions."""
    base, _, length = net.partition("/")
    number, bits = _number(address)
    other, other_bits = _number(base)
    shift = bits - int(length)
    return bits == other_bits and number >> shift == other >> shift
