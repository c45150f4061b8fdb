"""Policy, with real packets between namespaces, the host, and a machine behind it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import signal
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from calicoctl import netlink
from calicoctl.datastore import backends
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.diagnose.trace import trace
from calicoctl.felix.dataplane.conntrack import Conntrack
from calicoctl.policy.verdict import Packet, Party, either_party
from tests.system.agent import A4, A6, ALLOW, B4, B6, C4, C6, AgentHost, holds, outside_host
from tests.system.conftest import clear_host
from tests.system.support import Etcd, links, run, wait_for
from tests.system.traffic import (
    PATIENT,
    QUICK,
    checksum,
    connect,
    connection,
    ends,
    fill_connection_table,
    flows,
    inside,
    listener,
    mac_bytes,
    ping,
    send_frame,
    tcp,
    udp,
    udp_frame,
)

A = {4: A4, 6: A6}
B = {4: B4, 6: B6}
HOST = {4: "192.0.2.2", 6: "2001:db8::2"}
OUTSIDE = {4: "198.51.100.2", 6: "2001:db8:1::2"}
BOTH = pytest.mark.parametrize("version", [4, 6])


@pytest.fixture(scope="module")
def network(etcd: Etcd) -> Iterator[AgentHost]:
    """A host with an agent and the namespaces a, b, and c, and a machine beyond it, `outside`."""
    etcd.delete("/calico")
    host = AgentHost(etcd)
    with outside_host():
        try:
            host.start_agent()
            for name, addresses in (("a", (A4, A6)), ("b", (B4, B6)), ("c", (C4, C6))):
                host.add(name, *addresses)
            yield host
        finally:
            clear_host()


@pytest.fixture
def net(network: AgentHost) -> Iterator[AgentHost]:
    """The network, with the profiles `a`, `b` and `c`, one each: all may go out, and nothing come in."""
    for name in "abc":
        network.profile(name)
        network.set_profiles(name, name)
    yield network
    network.etcd.delete("/calico/v1/policy")
    network.etcd.put("/calico/v1/host/host1/config/DefaultEndpointToHostAction", "RETURN")
    network.etcd.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": "192.168.0.0/16"})
    network.etcd.put("/calico/v1/ipam/v6/pool/fd80:24e2:f998:72d6::-64", {"cidr": "fd80:24e2:f998:72d6::/64"})


def inbound(net: AgentHost, *rules: dict) -> None:
    """Let these rules decide what comes in to b."""
    net.profile("b", inbound=list(rules))
    net.sync()


def outbound(net: AgentHost, *rules: dict) -> None:
    """Let these rules decide what a may send; b takes anything."""
    net.profile("a", outbound=list(rules) or [{"action": "deny"}])
    net.profile("b", inbound=[ALLOW])
    net.sync()


@BOTH
def test_what_no_rule_matches_is_dropped(net: AgentHost, version: int) -> None:
    inbound(net)
    assert not ping("a", B[version])
    assert not tcp("a", "b", B[version])
    assert not udp("a", "b", B[version], 80)
    inbound(net, ALLOW)
    assert ping("a", B[version], patience=PATIENT)
    assert tcp("a", "b", B[version], patience=PATIENT)
    assert udp("a", "b", B[version], 80, patience=PATIENT)


@BOTH
def test_outbound_rules_are_asked_as_well(net: AgentHost, version: int) -> None:
    outbound(net)
    assert not ping("a", B[version])
    assert not tcp("a", "b", B[version])
    assert not udp("a", "b", B[version], 80)
    outbound(net, {"action": "allow", "protocol": "tcp"})
    assert tcp("a", "b", B[version], patience=PATIENT)
    assert not udp("a", "b", B[version], 80)


@BOTH
def test_without_a_profile_nothing_passes(net: AgentHost, version: int) -> None:
    inbound(net, ALLOW)
    assert ping("a", B[version], patience=PATIENT)
    net.set_profiles("a")
    net.sync()
    assert not ping("a", B[version])
    net.set_profiles("a", "a")
    net.set_profiles("b")
    net.sync()
    assert not ping("a", B[version])


@BOTH
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_protocols_ports_and_ranges(net: AgentHost, version: int, protocol: str) -> None:
    passes, other = (tcp, udp) if protocol == "tcp" else (udp, tcp)
    inbound(net, {"action": "allow", "protocol": protocol, "dst_ports": [80, "8000:8010", 8005, 8011]})
    for port, allowed in ((80, True), (81, False), (7999, False), (8000, True), (8011, True), (8012, False)):
        assert passes("a", "b", B[version], port) == allowed, port
    assert not other("a", "b", B[version], 80)
    assert not ping("a", B[version])
    inbound(net, {"action": "allow", "protocol": protocol, "src_ports": ["3000:3010"]})
    assert passes("a", "b", B[version], 80, source_port=3010)
    assert not passes("a", "b", B[version], 80, source_port=3011)
    number = 6 if protocol == "tcp" else 17
    inbound(net, {"action": "allow", "protocol": number})
    assert passes("a", "b", B[version], 80)
    assert not other("a", "b", B[version], 80)


@BOTH
def test_cidrs(net: AgentHost, version: int) -> None:
    own, others = (f"{A4}/32", f"{C4}/32") if version == 4 else (f"{A6}/128", f"{C6}/128")
    inbound(net, {"action": "allow", "src_net": own})
    assert ping("a", B[version], patience=PATIENT)
    assert not ping("c", B[version])
    assert not ping("a", B[10 - version]), "a CIDR of one IP version says nothing about the other"
    inbound(net, {"action": "allow", "src_net": others})
    assert not ping("a", B[version])
    outbound(net, {"action": "allow", "dst_net": "192.168.0.2/31" if version == 4 else f"{B6}/127"})
    assert ping("a", B[version], patience=PATIENT)
    assert not ping("a", HOST[version])
    inbound(net, {"action": "allow", "src_net": "0.0.0.0/0" if version == 4 else "::/0"})
    net.profile("a")
    net.sync()
    assert ping("a", B[version], patience=PATIENT)
    assert not ping("a", B[10 - version])


def test_icmp_is_for_ipv4_and_icmpv6_for_ipv6(net: AgentHost) -> None:
    for rule, four, six in (
        ({"protocol": "icmp"}, True, False),
        ({"protocol": "icmpv6"}, False, True),
        ({"protocol": "icmp", "icmp_type": 8}, True, False),
        ({"protocol": "icmp", "icmp_type": 8, "icmp_code": 0}, True, False),
        ({"protocol": "icmp", "icmp_type": 8, "icmp_code": 1}, False, False),
        ({"protocol": "icmp", "icmp_type": 13}, False, False),
        ({"protocol": "icmpv6", "icmp_type": 128}, False, True),
        ({"protocol": "icmpv6", "icmp_type": 129}, False, False),
        ({"protocol": 1}, True, False),
        ({"protocol": 58}, False, True),
        ({"ip_version": 4}, True, False),
        ({"ip_version": 6}, False, True),
    ):
        inbound(net, {"action": "allow", **rule})
        assert (ping("a", B4), ping("a", B6)) == (four, six), rule
        assert tcp("a", "b", B4) == ("ip_version" in rule and four), rule


@BOTH
def test_a_tag_is_all_addresses_of_all_endpoints_with_it(net: AgentHost, version: int) -> None:
    net.profile("a", tags=["friends", "a"])
    inbound(net, {"action": "allow", "src_tag": "friends"})
    assert ping("a", B[version], patience=PATIENT)
    assert not ping("c", B[version])
    net.profile("c", tags=["friends"])
    net.sync()
    assert ping("c", B[version], patience=PATIENT)
    net.profile("a", tags=[])
    net.sync()
    assert not ping("a", B[version])
    # an endpoint of another host
    assert not ping("outside", B[version])
    remote = "/calico/v1/host/elsewhere/workload/docker/x/endpoint/y"
    nets = {"ipv4_nets": ["198.51.100.2/32"], "ipv6_nets": ["2001:db8:1::2/128"]}
    net.etcd.put(remote, {"state": "active", "profile_ids": ["c"], **nets})
    net.sync()
    assert ping("outside", B[version], patience=PATIENT)
    net.etcd.delete(remote)
    net.sync()
    assert not ping("outside", B[version])


def test_denials_by_tag_stay_while_the_tags_cannot_be_read(net: AgentHost) -> None:
    net.profile("a", tags=["evil"])
    inbound(net, {"action": "deny", "src_tag": "evil"}, ALLOW)
    remote = "/calico/v1/host/elsewhere/workload/docker/x/endpoint/y"
    record = {"state": "active", "profile_ids": ["a"], "ipv4_nets": ["198.51.100.2/32"]}
    net.etcd.put(remote, record)
    net.sync()
    assert not ping("a", B4) and not ping("outside", B4)
    net.etcd.put("/calico/v1/policy/profile/a/tags", "{not json")
    net.etcd.put(remote, {**record, "mac": "none"})
    net.sync()
    assert not ping("a", B4) and not ping("outside", B4)
    net.etcd.delete(remote)
    net.profile("a")
    net.sync()
    assert ping("a", B4, patience=PATIENT) and ping("outside", B4, patience=PATIENT)


def test_a_tag_that_is_a_number(net: AgentHost) -> None:
    net.profile("a", tags=["1"])
    inbound(net, {"action": "allow", "src_tag": 1})
    assert tcp("a", "b", B4, patience=PATIENT) and not tcp("c", "b", B4)


@BOTH
def test_a_tag_as_destination(net: AgentHost, version: int) -> None:
    net.profile("c", inbound=[ALLOW])
    outbound(net, {"action": "allow", "dst_tag": "b"})
    assert ping("a", B[version], patience=PATIENT)
    assert not ping("a", C4 if version == 4 else C6)


@BOTH
def test_profiles_and_rules_are_asked_in_order(net: AgentHost, version: int) -> None:
    deny = {"action": "deny", "protocol": "tcp", "dst_ports": [81]}
    inbound(net, deny, {"action": "allow", "protocol": "tcp"})
    assert tcp("a", "b", B[version], 80, patience=PATIENT)
    assert not tcp("a", "b", B[version], 81)
    inbound(net, {"action": "allow", "protocol": "tcp"}, deny)
    assert tcp("a", "b", B[version], 81, patience=PATIENT)
    net.profile("first", inbound=[deny])
    net.set_profiles("b", "first", "b")
    net.sync()
    assert not tcp("a", "b", B[version], 81)
    assert tcp("a", "b", B[version], 80, patience=PATIENT), "what the first does not decide, the second does"
    net.set_profiles("b", "b", "first")
    net.sync()
    assert tcp("a", "b", B[version], 81, patience=PATIENT)


@BOTH
def test_a_profile_that_is_not_there_or_cannot_be_read_denies(net: AgentHost, version: int) -> None:
    inbound(net, ALLOW)
    net.profile("bad", inbound=[ALLOW])
    net.set_profiles("b", "b", "bad")
    net.sync()
    for text in (
        "{",
        '{"inbound_rules": [{"action": "allow", "!src_tag": "x"}]}',
        '{"inbound_rules": [{"action": 1}]}',
        '{"inbound_rules": {}}',
        None,
    ):
        if text is None:
            net.etcd.delete("/calico/v1/policy/profile/bad/rules")
        else:
            net.etcd.put("/calico/v1/policy/profile/bad/rules", text)
        net.sync()
        assert ping("a", B[version], patience=PATIENT), "an earlier profile has decided"
        net.set_profiles("b", "bad", "b")
        net.sync()
        assert not ping("a", B[version]), "a later profile is not asked"
        status = net.status()
        assert [p["key"] for p in status["problems"]] == ["/calico/v1/policy/profile/bad/rules"]
        assert "profile bad" in status["endpoints_in_trouble"][0]["reason"]
        net.set_profiles("b", "b", "bad")
        net.sync()
    net.etcd.delete("/calico/v1/policy/profile/bad")
    net.set_profiles("b", "nowhere", "b")
    net.sync()
    assert net.status()["problems"] == []
    assert not ping("a", B[version])
    assert "profile nowhere" in net.status()["endpoints_in_trouble"][0]["reason"]
    net.profile("nowhere", inbound=[ALLOW])
    net.sync()
    assert ping("a", B[version], patience=PATIENT)
    assert net.status()["endpoints_in_trouble"] == []


def test_rules_that_only_a_human_would_write(net: AgentHost) -> None:
    inbound(net, {"action": "log"}, {"protocol": "icmp", "src_tag": None})
    assert ping("a", B4, patience=PATIENT), "log goes on to the next rule; a missing action means allow"
    inbound(net, {"action": "allow", "src_net": "fd00::/8", "dst_net": "10.0.0.0/8"})
    assert not ping("a", B4) and net.status()["problems"] == [], "it matches nothing, and is no error"
    strange = 'x"; drop\n\u0000-%s/../' + "é" * 60
    net.profile("a", tags=[strange])
    inbound(net, {"action": "allow", "src_tag": strange})
    assert net.status()["problems"][0]["key"] == "/calico/v1/policy/profile/b/rules"
    net.profile("b", inbound=[ALLOW], tags=[strange])
    for name in ("with-dash", "with.dot", "with_underscore", "a" * 39, "Ünïcode", "with blank"):
        net.etcd.put(f"/calico/v1/policy/profile/{name}/rules", {"inbound_rules": [ALLOW], "outbound_rules": [ALLOW]})
        net.set_profiles("b", name)
        net.sync()
        assert ping("a", B4, patience=PATIENT), name


def test_log_rules_are_typed_and_packets_go_on_to_the_next_rule(net: AgentHost) -> None:
    for rule in ("log icmp from tag a", "deny ipv6", "allow from tag a"):
        net.ctl("profile", "b", "rule", "add", "inbound", *rule.split())
    shown = net.ctl("profile", "b", "rule", "show").out.splitlines()
    assert shown[1:4] == ["   1 log icmp from tag a", "   2 deny ipv6", "   3 allow from tag a"]
    net.sync()
    assert ping("a", B4, patience=PATIENT) and not ping("a", B6)
    lines = [line.strip() for line in run("nft", "list", "chain", "inet", "calico", "inbound/b").out.splitlines()]
    (line,) = [line for line in lines if "calico-packet" in line]
    assert "ip saddr @tag4/a" in line.replace('"', "") and "limit rate 10/second" in line
    assert 'log prefix "calico-packet: profile b, inbound rule 1: "' in line and 'limit name "log-rules"' in line
    traced = net.ctl("profile", "trace", A4, B4, "icmp").out
    assert "rule 3 of profile b: allow from tag a" in traced
    net.ctl("profile", "b", "rule", "remove", "inbound", *shown[1].split()[1:])
    net.sync()
    assert "calico-packet" not in run("nft", "list", "table", "inet", "calico").out


def random_rule(chance: random.Random) -> dict:
    """Return a rule that meets some of the packets below."""
    rule: dict = {"action": chance.choice(["allow", "allow", "deny", "log"])}
    protocol = chance.choice([None, "tcp", "udp", "icmp", "icmpv6", 6])
    if protocol is not None:
        rule["protocol"] = protocol
    if protocol in ("tcp", "udp", 6) and chance.random() < 0.6:
        rule["dst_ports"] = chance.choice([[80], [81], ["80:82"], [79, "81:90"]])
    if protocol in ("tcp", "udp", 6) and chance.random() < 0.2:
        rule["src_ports"] = chance.choice([["3000:3500"], ["3400:4000"]])
    if chance.random() < 0.3:
        rule["src_tag"] = chance.choice(["a", "b", "c", "nobody"])
    if chance.random() < 0.3:
        rule["dst_tag"] = chance.choice(["a", "b"])
    if chance.random() < 0.3:
        rule["src_net"] = chance.choice([f"{A4}/32", "192.168.0.2/31", "0.0.0.0/0", f"{A6}/128", "::/0", f"{C6}/127"])
    if chance.random() < 0.1:
        rule["ip_version"] = chance.choice([4, 6])
    if protocol in ("icmp", "icmpv6") and chance.random() < 0.5:
        rule["icmp_type"] = chance.choice([8, 128])
    return rule


def probes_of(source: str, target: str, odd: int) -> list[tuple[str, int | None, int | None, str, str, Callable]]:
    """Return packets from one namespace to another: protocol, ports, addresses, and what tells whether it passes.

    That one is given the patience with which to wait for an answer.

    `odd` tells apart the two that send to one target at the same time.
    """
    (source4, source6), (target4, target6) = ADDRESSES[source], ADDRESSES[target]
    own = ord(target) - ord("a")  # for the two that one sends at the same time
    return [
        ("tcp", 80 + odd, 3333 + own, source4, target4, partial(tcp, source, target, target4, 80 + odd, 3333 + own)),
        ("tcp", 81 + odd, 3600 + own, source6, target6, partial(tcp, source, target, target6, 81 + odd, 3600 + own)),
        ("udp", 80 + odd, 3450 + own, source4, target4, partial(udp, source, target, target4, 80 + odd, 3450 + own)),
        ("udp", 81 + odd, 3333 + own, source6, target6, partial(udp, source, target, target6, 81 + odd, 3333 + own)),
        ("icmp", None, None, source4, target4, partial(ping, source, target4)),
        ("icmpv6", None, None, source6, target6, partial(ping, source, target6)),
    ]


ADDRESSES = {"a": (A4, A6), "b": (B4, B6), "c": (C4, C6)}


def test_trace_and_the_data_plane_agree(net: AgentHost) -> None:
    """What `profile trace` computes from the store is what becomes of the packets, for random profiles."""
    datastore = DatastoreClient(backends.connect(EtcdSettings.from_environment(net.environment())), net.name)
    pairs = [(source, target) for target in "abc" for source in "abc" if source != target]
    chance = random.Random(2015)
    seen: Counter[tuple[bool, ...]] = Counter()
    with ThreadPoolExecutor(len(pairs) * 3) as pool:
        for number in range(50):
            for name in "abc":
                rules = [[random_rule(chance) for _ in range(chance.randrange(4))] for _ in range(3)]
                net.profile(f"{name}1", inbound=rules[0], outbound=[*rules[1], ALLOW], tags=[name])
                net.profile(f"{name}2", inbound=rules[2] + [ALLOW] * chance.randrange(2), tags=[])
                names = [f"{name}1", f"{name}2", *(["missing"] if chance.random() < 0.05 else [])]
                net.set_profiles(name, *chance.sample(names, len(names)))
            net.sync()
            run("conntrack", "-F")
            probes = []
            for index, (source, target) in enumerate(pairs):
                probes += chance.sample(probes_of(source, target, 2 * (index % 2)), 3)
            computed = [
                trace(datastore, source, target, protocol, port, source_port)
                for protocol, port, source_port, source, target, _ in probes
            ]
            patience = [PATIENT if found.allowed else QUICK for found in computed]
            real = list(pool.map(lambda probe, patience: probe[-1](patience=patience), probes, patience))
            for found, passed in zip(computed, real):
                assert found.allowed == passed, (number, found)
                seen[tuple(decision.allowed for decision in found.decisions)] += 1
    assert min(seen[outward, inward] for outward in (True, False) for inward in (True, False)) > 10, "all must come up"


def test_output_of_trace(net: AgentHost) -> None:
    inbound(net, {"action": "deny", "protocol": "icmp"}, {"action": "allow", "src_tag": "a"})
    a, b = (f"/var/run/netns/{name}" for name in "ab")
    found = json.loads(net.ctl("profile", "trace", a, B4, "tcp", "80", "--output=json").out)
    assert found["allowed"] and [(d["direction"], d["profile"], d["rule"]) for d in found["decisions"]] == [
        ("outbound", "a", 1),
        ("inbound", "b", 2),
    ]
    denied = net.ctl("profile", "trace", a, b, "icmp", status=1)
    assert "rule 1 of profile b: deny icmp" in denied.out and "does not pass" in denied.err
    net.profile("a", outbound=[{"action": "deny", "protocol": "icmp"}, ALLOW], tags=["a"])
    both = net.ctl("profile", "trace", a, b, "icmp", status=1)
    assert both.out.splitlines() == [
        f"From {a} ({A4}), outbound: is denied (rule 1 of profile a: deny icmp)",
        f"To {b} ({B4}), inbound: would be denied (rule 1 of profile b: deny icmp)",
    ]
    assert both.err == "The packet does not pass: outbound, rule 1 of profile a: deny icmp.\n"
    net.profile("b", inbound=[ALLOW])
    found = json.loads(net.ctl("profile", "trace", a, b, "icmp", "--output=json", status=1).out)
    assert [(d["direction"], d["allowed"]) for d in found["decisions"]] == [("outbound", False), ("inbound", True)]
    assert "inbound: would pass (rule 1 of profile b: allow)" in net.ctl("profile", "trace", a, b, "icmp", status=1).out
    net.profile("a", tags=["a"])
    inbound(net, {"action": "deny", "protocol": "icmp"}, {"action": "allow", "src_tag": "a"})
    assert "no rule of b matches" in net.ctl("profile", "trace", C4, b, "udp", "53", status=1).err
    endpoint = net.key("b").rpartition("/")[2]
    assert net.ctl("profile", "trace", A6, endpoint, "icmpv6").out.endswith("The packet passes.\n")
    assert "stays within" in net.ctl("profile", "trace", b, B4, "icmp").out
    # beyond endpoints: the host, its services, and elsewhere
    net.etcd.put("/calico/v1/host/host1/config/DefaultEndpointToHostAction", "DROP")
    assert "is DROP" in net.ctl("profile", "trace", a, HOST[4], "tcp", "80", status=1).err
    run("ip", "address", "add", "203.0.113.77/32", "dev", "lo")  # of which the store knows nothing
    assert "is DROP" in net.ctl("profile", "trace", a, "203.0.113.77", "tcp", "80", status=1).err
    assert "from its host" in net.ctl("profile", "trace", "203.0.113.77", b, "icmp").out
    run("ip", "address", "del", "203.0.113.77/32", "dev", "lo")
    net.ctl("profile", "trace", a, HOST[4], "udp", "53")
    net.ctl("profile", "trace", HOST[4], b, "icmp")
    net.ctl("profile", "trace", a, "198.51.100.9", "tcp", "80")
    net.ctl("profile", "trace", "198.51.100.9", b, "tcp", "80", status=1)
    # what is not set up denies
    record = json.loads(net.etcd.get(net.key("b")))
    net.etcd.put(net.key("b"), {**record, "state": "inactive"})
    assert "not set up: it is inactive" in net.ctl("profile", "trace", a, b, "tcp", "80", status=1).err
    net.etcd.put(net.key("b"), record)
    net.etcd.put(net.key("b"), {**record, "mac": "bad"})
    assert "whose record cannot be read" in net.ctl("profile", "trace", a, B4, "tcp", "80", status=1).err
    net.etcd.put(net.key("b"), record)
    net.set_profiles("b", "missing", "b")
    assert "missing does not exist" in net.ctl("profile", "trace", a, b, "tcp", "80", status=1).err
    net.set_profiles("b")
    assert "it has no profile" in net.ctl("profile", "trace", a, b, "tcp", "80", status=1).err
    for words, status, because in (
        (("198.51.100.9", "198.51.100.8", "tcp", "80"), 1, "no profile decides"),
        ((A4, B6, "tcp", "80"), 1, "address of the same IP version"),
        ((A4, B4, "icmpv6"), 1, "IPv6 address"),
        ((A4, B4, "tcp"), 2, "tcp needs a destination port"),
        ((A4, B4, "tcp", "0"), 1, "1 to 65535"),
        ((A4, B4, "tcp", "http"), 1, "1 to 65535"),
        ((A4, B4, "icmp", "80"), 2, "icmp has no ports"),
        ((A4, B4, "tcp", "80", "--from-port=x"), 1, "--from-port"),
        ((A4, "/var/run/netns/none", "tcp", "80"), 1, "not connected"),
        ((A4, "/var/run-netns/b", "tcp", "80"), 1, "has the same id as /var/run/netns/b"),
        ((A4, "127.0.0.1", "tcp", "80"), 1, "127.0.0.1 cannot be used"),
        (("0.0.0.0", B4, "tcp", "80"), 1, "0.0.0.0 cannot be used"),
        ((A4, "f" * 32, "tcp", "80"), 1, "is no endpoint's id"),
    ):
        assert because in net.ctl("profile", "trace", *words, status=status).err, words


def test_trace_knows_that_hosts_translate(net: AgentHost) -> None:
    """A packet from a pool with masquerade, to an endpoint of another host whose address is in no pool."""
    far = f"/calico/v1/host/far/workload/docker/{'f' * 64}/endpoint/{'f' * 32}"
    net.etcd.put("/calico/bgp/v1/host/far/ip_addr_v4", "192.0.2.3")
    net.etcd.put(far, {"mac": "02:00:00:00:00:01", "ipv4_nets": ["10.9.9.9/32"], "profile_ids": ["far"]})
    net.profile("far", inbound=[{"action": "allow", "src_tag": "a"}])
    words = ("profile", "trace", "/var/run/netns/a", "10.9.9.9", "tcp", "80", "--output=json")

    def verdict() -> tuple[bool, str]:
        """Return whether policy lets the packet pass, and why."""
        found = json.loads(net.ctl(*words, status=None).out)
        return found["allowed"], found["decisions"][-1]["why"]

    assert verdict()[0]
    net.etcd.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": "192.168.0.0/16", "masquerade": True})
    assert verdict() == (False, "no rule of far matches")
    net.profile("far", inbound=[{"action": "allow", "src_net": f"{HOST[4]}/32"}])
    assert verdict()[0]
    assert "10.9.9.9 is in no pool" in net.ctl(*words[:-1], status=1).err
    net.etcd.put("/calico/v1/ipam/v4/pool/10.9.0.0-16", {"cidr": "10.9.0.0/16"})
    assert verdict() == (False, "no rule of far matches")


# Addresses and MACs that are not the sender's


@contextlib.contextmanager
def udp_server(namespace: str | None, address: str, port: int) -> Iterator[socket.socket]:
    def make() -> socket.socket:
        server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        server.bind((address, port))
        return server

    with inside(namespace, make) as server:
        yield server


def arrives(server: socket.socket) -> bool:
    if not select.select([server], [], [], QUICK)[0]:
        return False
    server.recv(100)
    return True


@pytest.fixture
def tables_alone(net: AgentHost) -> Iterator[None]:
    """Without the kernel's own filter of sources."""
    settings = [f"net.ipv4.conf.{net.interface(name)}.rp_filter" for name in "abc"]
    run("sysctl", "-q", "-w", *(f"{setting}=0" for setting in settings))
    yield
    run("sysctl", "-q", "-w", *(f"{setting}=1" for setting in settings))


@BOTH
@pytest.mark.parametrize("target", ["b", "host"])
def test_a_spoofed_source_is_dropped(net: AgentHost, version: int, target: str, tables_alone: None) -> None:
    inbound(net, ALLOW)
    destination = B[version] if target == "b" else HOST[version]
    own_mac, host_mac = net.mac("a"), links()[net.interface("a")]["address"]
    foreign = {4: C4, 6: C6}[version]
    with udp_server("b" if target == "b" else None, destination, 7777) as server:
        for source_mac, source, allowed in (
            (own_mac, A[version], True),
            (own_mac, foreign, False),
            ("02:00:00:00:00:99", A[version], False),
            (net.mac("b"), B[version], False),
            (own_mac, OUTSIDE[version], False),
            (own_mac, A[version], True),
        ):
            send_frame("a", "eth1", udp_frame(source_mac, host_mac, source, destination, 7777))
            assert arrives(server) == allowed, (source_mac, source)


def test_a_spoofed_packet_of_a_live_flow_is_dropped(net: AgentHost, tables_alone: None) -> None:
    """c sends into a flow of a's, whose packets pass without a look at the rules."""
    inbound(net, {"action": "allow", "src_net": f"{A4}/32"})
    with udp_server("b", B4, 7777) as server, udp_server("a", A4, 4000) as client:
        client.sendto(b"x", (B4, 7777))
        assert arrives(server)
        server.sendto(b"y", (A4, 4000))
        assert arrives(client)
        host_mac = links()[net.interface("c")]["address"]
        send_frame("c", "eth1", udp_frame(net.mac("c"), host_mac, A4, B4, 7777, source_port=4000))
        assert not arrives(server)
        client.sendto(b"x", (B4, 7777))
        assert arrives(server)


def arp(operation: int, sender_mac: str, sender: str, target_mac: str, target: str) -> bytes:
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
    return body + mac_bytes(sender_mac) + socket.inet_aton(sender) + mac_bytes(target_mac) + socket.inet_aton(target)


def neighbours(interface: str) -> dict[str, str]:
    entries = json.loads(run("ip", "-j", "neigh", "show", "dev", interface).out or "[]")
    return {entry["dst"]: entry.get("lladdr", "") for entry in entries}


def test_a_spoofed_arp_packet_is_dropped(net: AgentHost) -> None:
    interface, own = net.interface("a"), net.mac("a")
    host_mac = links()[interface]["address"]
    zero, broadcast = "00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff"
    run("sysctl", "-q", "-w", f"net.ipv4.conf.{interface}.arp_accept=1")
    before = neighbours(interface)

    def send(source_mac: str, *fields) -> None:
        send_frame("a", "eth1", mac_bytes(host_mac) + mac_bytes(source_mac) + b"\x08\x06" + arp(*fields))

    # answers and requests that claim another's address, or another MAC
    for operation in (1, 2):
        send(own, operation, own, C4, host_mac, "192.0.2.2")
        send(own, operation, own, "198.51.100.2", host_mac, "192.0.2.2")
        send(own, operation, "02:00:00:00:00:99", A4, host_mac, "192.0.2.2")
        send("02:00:00:00:00:99", operation, own, A4, broadcast, "192.0.2.2")
        send(own, operation, own, C4, zero, C4)  # gratuitous
    assert neighbours(interface) == before

    # its own is answered
    def ask() -> bool:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806)) as raw:
            raw.bind(("eth1", 0x0806))
            raw.send(mac_bytes(broadcast) + mac_bytes(own) + b"\x08\x06" + arp(1, own, A4, zero, "192.0.2.2"))
            return bool(select.select([raw], [], [], QUICK)[0])

    assert inside("a", ask)


def test_a_spoofed_neighbour_advertisement_is_dropped(net: AgentHost) -> None:
    interface, own = net.interface("a"), net.mac("a")
    host_mac = links()[interface]["address"]

    def advertise(source: str, target: str) -> None:
        packed = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, HOST[6])
        body = struct.pack("!BBHI", 136, 0, 0, 0x60000000) + socket.inet_pton(socket.AF_INET6, target)
        body += b"\x02\x01" + mac_bytes(own)
        check = checksum(packed + struct.pack("!IHBB", len(body), 0, 0, 58) + body)
        body = body[:2] + struct.pack("!H", check) + body[4:]
        header = struct.pack("!IHBB", 0x60000000, len(body), 58, 255) + packed
        send_frame("a", "eth1", mac_bytes(host_mac) + mac_bytes(own) + b"\x86\xdd" + header + body)

    def packets() -> dict[str, int]:
        chain = json.loads(run("nft", "-j", "list", "chain", "inet", "watch", "in").out)
        rules = [item["rule"] for item in chain["nftables"] if "rule" in item]
        return {rule["comment"]: rule["expr"][-1]["counter"]["packets"] for rule in rules}

    run(
        "nft",
        "add table inet watch; add chain inet watch in { type filter hook input priority 0; };"
        f'add rule inet watch in iifname {interface} icmpv6 type 136 counter comment "seen"',
    )
    try:
        advertise(A6, A6)
        wait_for(lambda: packets()["seen"] == 1, "the advertisement of its own address")
        advertise(A6, C6)
        advertise(C6, C6)
        advertise(A6, OUTSIDE[6])
        advertise(A6, A6)
        wait_for(lambda: packets()["seen"] >= 2, "the second advertisement of its own address")
        assert packets()["seen"] == 2
    finally:
        run("nft", "delete table inet watch")


def test_a_container_is_no_router_of_the_host(net: AgentHost) -> None:
    """Not even where the interface would take its word: a router advertisement from a container gets nowhere."""
    interface, own = net.interface("a"), net.mac("a")
    octets = mac_bytes(own)
    source = b"\xfe\x80" + bytes(6) + bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]
    addresses = source + socket.inet_pton(socket.AF_INET6, "ff02::1")
    body = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
    check = checksum(addresses + struct.pack("!IHBB", len(body), 0, 0, 58) + body)
    body = body[:2] + struct.pack("!H", check) + body[4:]
    header = struct.pack("!IHBB", 0x60000000, len(body), 58, 255) + addresses
    frame = mac_bytes("33:33:00:00:00:01") + octets + b"\x86\xdd" + header + body

    def is_router() -> bool:
        return interface in run("ip", "-6", "route", "show", "default").out

    net.sync()
    os.kill(net.pid, signal.SIGSTOP)  # it would put back what is changed here
    run("sysctl", "-w", f"net.ipv6.conf.{interface}.accept_ra=2")
    try:
        send_frame("a", "eth1", frame)
        assert holds(lambda: not is_router(), QUICK)
        run("nft", "insert rule inet calico anti-spoofing accept")
        wait_for(lambda: send_frame("a", "eth1", frame) or is_router(), "what would have come of it")
    finally:
        os.kill(net.pid, signal.SIGCONT)
        run("sysctl", "-w", f"net.ipv6.conf.{interface}.accept_ra=0")
        run("ip", "-6", "route", "flush", "proto", "ra")
        net.sync()


def test_an_interface_that_the_table_does_not_know_passes_nothing(net: AgentHost) -> None:
    inbound(net, ALLOW)
    run("ip", "netns", "add", "stranger")
    run("ip", "link", "add", "calistranger", "type", "veth", "peer", "name", "eth1", "netns", "stranger")
    try:
        run("ip", "link", "set", "calistranger", "up")
        run("ip", "-n", "stranger", "link", "set", "eth1", "up")
        run("ip", "-n", "stranger", "address", "add", "192.168.0.9/32", "dev", "eth1")
        run("ip", "-n", "stranger", "route", "add", "default", "dev", "eth1")
        run("ip", "route", "add", "192.168.0.9/32", "dev", "calistranger")
        for address in (B4, HOST[4], OUTSIDE[4]):
            assert not ping("stranger", address)
    finally:
        run("ip", "link", "delete", "calistranger")
        run("ip", "netns", "delete", "stranger")


# The host, and what lies beyond


@BOTH
def test_from_the_host_everything_is_allowed(net: AgentHost, version: int) -> None:
    inbound(net)
    assert ping(None, B[version], patience=PATIENT)
    assert tcp(None, "b", B[version], patience=PATIENT)
    assert udp(None, "b", B[version], 80, patience=PATIENT)
    net.set_profiles("b")
    net.sync()
    assert ping(None, B[version], patience=PATIENT)


@BOTH
def test_to_the_host_the_outbound_rules_and_the_hosts_action_decide(net: AgentHost, version: int) -> None:
    net.sync()
    assert tcp("a", None, HOST[version], patience=PATIENT)
    outbound(net, {"action": "deny"})
    assert not tcp("a", None, HOST[version])
    assert not ping("a", HOST[version])
    assert udp("a", None, HOST[version], 53, patience=PATIENT), "DNS is always allowed"
    assert not tcp("a", None, HOST[version], 53)
    assert not udp("a", None, HOST[version], 54)
    outbound(net, ALLOW)
    for action, allowed in (("DROP", False), ("ACCEPT", True), ("nonsense", False), ("RETURN", True)):
        net.etcd.put("/calico/v1/host/host1/config/DefaultEndpointToHostAction", action)
        net.sync()
        assert tcp("a", None, HOST[version]) == allowed, action
        assert udp("a", None, HOST[version], 53, patience=PATIENT), action
    net.etcd.put("/calico/v1/host/host1/config/DefaultEndpointToHostAction", "DROP")
    net.sync()
    assert tcp(None, "b", B[version], patience=PATIENT), "answers to the host are not the endpoint's packets to it"


@BOTH
def test_the_hosts_own_firewall_has_the_last_word_about_the_host(net: AgentHost, version: int) -> None:
    run(
        "nft",
        "add table inet hosts; add chain inet hosts in { type filter hook input priority 0; };"
        "add rule inet hosts in tcp dport 81 drop",
    )
    try:
        net.sync()
        assert tcp("a", None, HOST[version], 80, patience=PATIENT)
        assert not tcp("a", None, HOST[version], 81)
    finally:
        run("nft", "delete table inet hosts")


@BOTH
def test_beyond_the_host(net: AgentHost, version: int) -> None:
    net.sync()
    assert ping("a", OUTSIDE[version], patience=PATIENT)
    assert tcp("a", "outside", OUTSIDE[version], patience=PATIENT)
    assert not tcp("outside", "b", B[version])
    inbound(net, {"action": "allow", "src_net": "198.51.100.0/24" if version == 4 else "2001:db8:1::/64"})
    assert tcp("outside", "b", B[version], patience=PATIENT)
    assert not tcp("a", "b", B[version])


@BOTH
def test_masquerade(net: AgentHost, version: int) -> None:
    def seen_as(source: str, target: str, address: str) -> str:
        with listener(target, address, 80) as server:
            client = connect(source, address, 80)
            assert client is not None
            with client:
                accepted, peer = server.accept()
                accepted.close()
                return peer[0]

    inbound(net, ALLOW)
    key = {4: "/calico/v1/ipam/v4/pool/192.168.0.0-16", 6: "/calico/v1/ipam/v6/pool/fd80:24e2:f998:72d6::-64"}[version]
    pool = json.loads(net.etcd.get(key))
    assert seen_as("a", "outside", OUTSIDE[version]) == A[version]
    net.etcd.put(key, {**pool, "masquerade": True})
    net.sync()
    assert seen_as("a", "outside", OUTSIDE[version]) == {4: "198.51.100.1", 6: "2001:db8:1::1"}[version]
    assert seen_as("a", "b", B[version]) == A[version], "not between pools"
    if version == 4:
        other = "/calico/v1/ipam/v4/pool/198.51.100.0-24"
        net.etcd.put(other, {"cidr": "198.51.100.0/24"})
        net.sync()
        assert seen_as("a", "outside", OUTSIDE[version]) == A[version], "the destination is in a pool now"
        net.etcd.delete(other)
    net.etcd.put(key, pool)
    net.sync()
    assert seen_as("a", "outside", OUTSIDE[version]) == A[version]


# What is connected already


@BOTH
def test_a_change_takes_effect_on_open_connections_that_it_denies_and_no_others(net: AgentHost, version: int) -> None:
    allow_80, allow_81 = ({"action": "allow", "protocol": "tcp", "dst_ports": [port]} for port in (80, 81))
    inbound(net, allow_80, allow_81)
    with connection("a", "b", B[version], 80) as kept, connection("a", "b", B[version], 81) as ended:
        assert flows(*kept, patience=PATIENT) and flows(*ended, patience=PATIENT)
        inbound(net, allow_80)
        ends(*ended)
        assert flows(*kept, patience=PATIENT)
        inbound(net, allow_80, allow_81)
        assert flows(*kept, patience=PATIENT)
    with connection("a", "b", B[version], 80) as ended:
        net.set_profiles("b", "c")
        net.sync()
        ends(*ended)
    net.set_profiles("b", "b")


@BOTH
def test_a_tag_that_is_lost_ends_connections(net: AgentHost, version: int) -> None:
    net.profile("a", tags=["friends"])
    net.profile("c", tags=["friends"])
    inbound(net, {"action": "allow", "src_tag": "friends"})
    with connection("a", "b", B[version], 80) as ended, connection("c", "b", B[version], 81) as kept:
        assert flows(*ended, patience=PATIENT) and flows(*kept, patience=PATIENT)
        net.profile("a", tags=[])
        net.sync()
        ends(*ended)
        assert flows(*kept, patience=PATIENT)


@BOTH
def test_a_tag_that_an_endpoint_elsewhere_loses_ends_connections(net: AgentHost, version: int) -> None:
    key = "/calico/v1/host/far/workload/docker/w/endpoint/e"
    nets = {"ipv4_nets": [f"{OUTSIDE[4]}/32"], "ipv6_nets": [f"{OUTSIDE[6]}/128"]}
    net.profile("friends")
    net.etcd.put(key, {"state": "active", "name": "cali1", "mac": None, "profile_ids": ["friends"], **nets})
    friends = {"action": "allow", "src_tag": "friends"}
    inbound(net, friends, ALLOW)
    with connection("a", "b", B[version], 81) as stranger:
        inbound(net, friends)
        ends(*stranger)  # and with it what these changes made the agent look at
    with connection("outside", "b", B[version], 80) as ended:
        assert flows(*ended, patience=PATIENT)
        net.etcd.delete(key)
        ends(*ended)


@BOTH
def test_an_outbound_rule_ends_connections(net: AgentHost, version: int) -> None:
    outbound(net, ALLOW)
    with connection("a", "b", B[version], 80) as ended, connection("a", None, HOST[version], 81) as host:
        assert flows(*ended, patience=PATIENT) and flows(*host, patience=PATIENT)
        with connection(None, "a", A[version], 82) as from_host:
            outbound(net, {"action": "deny"})
            ends(*ended)
            ends(*host)
            assert flows(*from_host, patience=PATIENT), "the host may always connect"


def test_the_hosts_action_ends_connections(net: AgentHost) -> None:
    net.sync()
    with connection("a", None, HOST[4], 81) as ended, connection(None, "a", A4, 82) as kept:
        net.etcd.put("/calico/v1/host/host1/config/DefaultEndpointToHostAction", "DROP")
        ends(*ended)
        assert flows(*kept, patience=PATIENT)


def test_connections_do_not_survive_a_change_of_an_addresss_endpoint(net: AgentHost) -> None:
    """a goes on sending on a flow that the old endpoint allowed; the new one, which denies it, gets no packet."""
    address, port = "192.168.0.50", 6666
    net.profile("open", inbound=[ALLOW])
    stop = threading.Event()

    def send_all_the_time() -> None:
        while not stop.wait(0.0003):
            with contextlib.suppress(OSError):
                client.sendto(b"x", (address, port))

    sender = threading.Thread(target=send_all_the_time)
    net.add("x", address)
    try:
        net.set_profiles("x", "open")
        net.sync()
        with udp_server("a", A4, 4000) as client:
            with udp_server("x", address, port) as server:
                client.sendto(b"x", (address, port))
                assert arrives(server)
                server.sendto(b"y", (A4, 4000))
                assert arrives(client)
            for _ in range(3):
                net.ctl("container", "remove", "/var/run/netns/x")
                if not sender.is_alive():
                    sender.start()
                net.ctl("container", "add", "/var/run/netns/x", address, "--wait=20")
                with udp_server("x", address, port) as server:
                    assert not arrives(server)
            counters = run("ip", "netns", "exec", "x", "cat", "/proc/net/snmp").out
            received, no_port = re.findall(r"Udp: (\d+) (\d+)", counters)[0]
            assert (received, no_port) == ("1", "0"), "one packet came, at the beginning"
            net.set_profiles("x", "open")
            net.sync()
            with udp_server("x", address, port) as server:
                assert arrives(server), "it is policy that kept them away"
    finally:
        stop.set()
        if sender.is_alive():
            sender.join()
        net.ctl("container", "remove", "/var/run/netns/x")
        run("ip", "netns", "delete", "x")


def test_an_address_that_leaves_a_tag_loses_its_connections_among_many_others(net: AgentHost) -> None:
    """In a table of this size, the kernel lists the connections of one IPv4 address alone. Those of others go on."""
    net.profile("a", tags=["friends"])
    inbound(net, {"action": "allow", "src_tag": "friends"}, {"action": "allow", "src_net": f"{C4}/32"})
    fill_connection_table(10_000)
    try:
        with connection("a", "b", B4, 80) as denied, connection("c", "b", B4, 81) as allowed:
            net.profile("a", tags=[])
            ends(*denied)
            wait_for(net.has_fast_path, "connections to be verified")
            assert f"src={A4} dst={B4}" not in run("conntrack", "-L", "-p", "tcp").out
            assert flows(*allowed, patience=PATIENT)
    finally:
        run("conntrack", "-F")


def test_the_kernel_lists_the_connections_of_one_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lists those that the address has started and those that it answers, and does so only in a large table."""
    answers = []
    dump = netlink.dump

    def counted(protocol: int, *request: Any, **options: Any) -> Iterator[bytes]:
        for answer in dump(protocol, *request, **options):
            answers.extend([answer] if protocol == netlink.NETLINK_NETFILTER else [])
            yield answer

    monkeypatch.setattr(netlink, "dump", counted)
    one, other, server = "10.9.0.7", "10.9.0.8", "203.0.113.9"
    back = f"-p udp -s {server} -d {one} --sport 80 --dport 9 --timeout 60 --status SEEN_REPLY,ASSURED"
    try:
        fill_connection_table(10_000)
        run("conntrack", "-A", *back.split())
        driver = Conntrack(lambda _: None)
        started, answered = Packet(one, server, 17, 1024, 53), Packet(server, one, 17, 80, 9)

        def listed(parties: set[Party]) -> set[Packet]:
            return {found.forwarded for found in driver.list(parties).connections}

        assert listed({Party(one, originates=True)}) == {started}
        assert listed({Party(one, originates=False)}) == {answered}
        assert len(answers) == 2, "the kernel has sent these alone"
        assert listed(either_party([one])) == {started, answered}
        assert listed(either_party([one, other])) == {started, answered, Packet(other, server, 17, 1024, 53)}
    finally:
        run("conntrack", "-F")


def test_udp_and_icmp_flows_end_too(net: AgentHost) -> None:
    inbound(net, ALLOW)
    with udp_server("b", B4, 7777) as server, udp_server("a", A4, 4000) as client:
        client.sendto(b"x", (B4, 7777))
        assert arrives(server)
        server.sendto(b"y", (A4, 4000))
        assert arrives(client)
        inbound(net)

        def gets_through(sender: socket.socket, target: tuple[str, int], receiver: socket.socket) -> bool:
            sender.sendto(b"x", target)
            return arrives(receiver)

        wait_for(lambda: not gets_through(client, (B4, 7777), server), "the flow's end")
        assert not gets_through(server, (A4, 4000), client), "it is no answer any more, and a takes nothing in"


@BOTH
def test_what_answers_pings_is_forgotten(net: AgentHost, version: int) -> None:
    def flows_to_b() -> list[str]:
        listing = run("conntrack", "-L", "-f", f"ipv{version}").out
        return [line for line in listing.splitlines() if line.startswith("icmp") and f"dst={B[version]} " in line]

    inbound(net, ALLOW)
    assert ping("a", B[version], patience=PATIENT)
    assert flows_to_b()
    inbound(net)
    wait_for(lambda: not flows_to_b(), "the flow's end", 10)


def test_gre_tunnels_end_and_hold_up_no_others(net: AgentHost) -> None:
    """GRE has keys where other protocols have ports; the kernel's module for it may be there or not."""
    inbound(net, ALLOW)

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, 47) as raw:
            raw.sendto(struct.pack("!HHI", 0x2000, 0x0800, 77), (B4, 0))

    def tunnels() -> list[str]:
        return [line for line in run("conntrack", "-L", "-f", "ipv4").out.splitlines() if line.split()[1] == "47"]

    with connection("a", "b", B4, 80) as stream:
        inside("a", send)
        assert tunnels()
        inbound(net)
        ends(*stream)
        wait_for(lambda: not tunnels(), "the tunnel's end", 10)


def test_errors_of_established_connections_pass(net: AgentHost) -> None:
    """A port that is closed answers a UDP packet with an ICMP error, which is related to it."""
    inbound(net, {"action": "allow", "protocol": "udp"})
    with udp_server("a", A4, 4000) as client:
        client.connect((B4, 9))
        client.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            client.settimeout(QUICK)
            client.recv(10)


def test_a_tcp_packet_that_starts_no_connection_is_dropped(net: AgentHost) -> None:
    inbound(net, ALLOW)
    run("sysctl", "-q", "-w", "net.netfilter.nf_conntrack_tcp_loose=1")
    with connection("a", "b", B4, 80) as pair:
        assert flows(*pair, patience=PATIENT)
        run("conntrack", "-D", "-s", A4, "-d", B4, "-p", "tcp", "--dport", "80")
        assert not flows(*pair)
