"""The verdict for one packet: each condition of a rule, and the order in which profiles are evaluated."""

from __future__ import annotations

import json
from typing import Any

import pytest

from calicoctl.datastore.model import Rule, Rules
from calicoctl.errors import CalicoError
from calicoctl.policy.verdict import (
    Packet,
    Verdict,
    decide,
    is_from_host,
    is_host_service,
    matches,
    may_deny,
    port_ranges,
    readable,
)

TCP = Packet("192.168.0.1", "192.168.0.2", 6, 4000, 80)
PING = Packet("192.168.0.1", "192.168.0.2", 1, icmp_type=8, icmp_code=0)
PING6 = Packet("fd00::1", "fd00::2", 58, icmp_type=128, icmp_code=0)


def tagged(tag: str, address: str) -> bool:
    return (tag, address) in {("web", "192.168.0.1"), ("db", "192.168.0.2"), ("web", "fd00::1")}


@pytest.mark.parametrize(
    ("rule", "tcp", "ping", "ping6"),
    [
        ({}, True, True, True),
        ({"protocol": "tcp"}, True, False, False),
        ({"protocol": 6}, True, False, False),
        ({"protocol": "icmp"}, False, True, False),
        ({"protocol": "icmpv6"}, False, False, True),
        ({"protocol": "icmp", "icmp_type": 8}, False, True, False),
        ({"protocol": "icmp", "icmp_type": 8, "icmp_code": 1}, False, False, False),
        ({"ip_version": 6}, False, False, True),
        ({"src_net": "192.168.0.0/31"}, True, True, False),
        ({"src_net": "192.168.0.2/31"}, False, False, False),
        ({"dst_net": "::/0"}, False, False, True),
        ({"dst_net": "0.0.0.0/0"}, True, True, False),
        ({"src_net": "10.0.0.0/8", "dst_net": "fd00::/8"}, False, False, False),
        ({"src_tag": "web"}, True, True, True),
        ({"src_tag": "web", "dst_tag": "db"}, True, True, False),
        ({"dst_tag": "web"}, False, False, False),
        ({"protocol": "tcp", "dst_ports": [79, "80:81"]}, True, False, False),
        ({"protocol": "tcp", "dst_ports": ["81:90"]}, False, False, False),
        ({"protocol": "tcp", "src_ports": [4000], "dst_ports": [80]}, True, False, False),
    ],
)
def test_all_conditions_of_a_rule_must_hold(rule: dict[str, Any], tcp: bool, ping: bool, ping6: bool) -> None:
    assert [matches(Rule(**rule), packet, tagged) for packet in (TCP, PING, PING6)] == [tcp, ping, ping6]


def test_the_first_rule_that_matches_decides() -> None:
    deny, allow, log = Rule("deny", protocol="tcp"), Rule("allow"), Rule("log")
    assert decide(["a"], {"a": [log, deny, allow]}, TCP, tagged) == Verdict(False, "a", 2)
    assert decide(["a", "b"], {"a": [Rule("allow", protocol="udp")], "b": [allow]}, TCP, tagged) == Verdict(
        True, "b", 1
    )
    assert decide(["a"], {"a": []}, TCP, tagged) == Verdict(False)
    assert decide([], {}, TCP, tagged) == Verdict(False)
    for rules in ({"b": [allow]}, {"a": None, "b": [allow]}):
        assert decide(["a", "b"], rules, TCP, tagged) == Verdict(False, "a"), "denies whatever reaches it"
    assert decide(["b", "a"], {"b": [allow]}, TCP, tagged) == Verdict(True, "b", 1)


@pytest.mark.parametrize(
    "rule",
    [
        {"action": "maybe"},
        {"!src_tag": "web"},
        {"protocol": "gre"},
        {"protocol": "tcp", "dst_ports": []},
        {"dst_ports": [80]},
        {"src_net": "10.0.0.0/33"},
        {"icmp_code": 3},
        {"src_tag": 'x" drop'},
        {"ip_version": 5},
    ],
)
def test_rules_that_cannot_be_read(rule: dict[str, Any]) -> None:
    with pytest.raises(CalicoError, match="inbound rule 2"):
        readable(Rules.from_json("p", json.dumps({"inbound_rules": [{}, rule]}), "key"))


def test_ports_are_merged_for_sets_that_take_no_overlap() -> None:
    assert port_ranges([80, "70:90", 91, "200:300", 250, 5]) == [(5, 5), (70, 91), (200, 300)]


def test_what_may_always_go_to_the_host() -> None:
    def udp(source: int, destination: int, version: int = 4) -> Packet:
        address = "fd00::1" if version == 6 else "192.168.0.1"
        return Packet(address, address, 17, source, destination)

    assert is_host_service(udp(4000, 53)) and is_host_service(udp(68, 67)) and is_host_service(udp(546, 547, 6))
    assert not is_host_service(udp(67, 68)) and not is_host_service(udp(68, 67, 6)) and not is_host_service(TCP)
    allowed = [t for t in range(256) if is_host_service(Packet("fd00::1", "fd00::2", 58, icmp_type=t))]
    assert allowed == [130, 131, 132, 133, 135, 136]


def test_what_a_registered_host_sends_to_an_address_of_a_pool_is_from_a_host() -> None:
    hosts, pools = {"172.18.0.12", "fd00:18::c"}, ["192.168.0.0/16", "fd80::/64"]
    assert is_from_host(Packet("172.18.0.12", "192.168.0.1", 6), hosts, pools)
    assert is_from_host(Packet("fd00:18::c", "fd80::1", 6), hosts, pools)
    assert not is_from_host(Packet("172.18.0.13", "192.168.0.1", 6), hosts, pools), "it is no host"
    assert not is_from_host(Packet("172.18.0.12", "10.0.0.1", 6), hosts, pools), "it may be translated to that address"


@pytest.mark.parametrize(
    ("action", "by_joining", "by_leaving"), [("allow", False, True), ("deny", True, False), ("log", False, False)]
)
@pytest.mark.parametrize("side", ["src_tag", "dst_tag"])
def test_a_change_of_a_tag_may_deny_by_the_action_of_the_rules_that_name_it(
    action: str, by_joining: bool, by_leaving: bool, side: str
) -> None:
    """test_affected.py checks this with random policies and changes."""
    rule = Rule.from_dict({"action": action, side: "web"})
    assert (may_deny(rule, joins=True), may_deny(rule, joins=False)) == (by_joining, by_leaving)
