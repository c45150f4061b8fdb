"""What policy drops on a host is counted, and so is what each rule decides: with real packets."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from calicoctl import netlink
from calicoctl.felix.dataplane import drops, packet_log
from calicoctl.felix.dataplane.nft import Nft
from tests.system.agent import A4, A6, ALLOW, B4, B6, C4, AgentHost
from tests.system.conftest import clear_host
from tests.system.support import AS_NOBODY, CALICOCTL, Etcd, free_port, run, wait_for
from tests.system.traffic import PATIENT, inside, ping, tcp, udp


@pytest.fixture
def pair(etcd: Etcd) -> Iterator[AgentHost]:
    """A host with an agent, and the namespaces a and b, whose profiles are of the same names."""
    etcd.delete("/calico")
    host = AgentHost(etcd)
    try:
        host.start_agent()
        for name, addresses in (("a", (A4, A6)), ("b", (B4, B6))):
            host.add(name, *addresses)
            host.profile(name, outbound=[ALLOW])
            host.set_profiles(name, name)
        yield host
    finally:
        clear_host()


def rules(host: AgentHost, profile: str) -> list[dict]:
    """Return the inbound rules of a profile, with their counters."""
    shown = json.loads(host.ctl("profile", profile, "rule", "show", "--counters", "--output=json").out)
    return shown[0]["inbound_rules"]


def test_rules_count_what_they_decide_and_go_on_in_new_tables(pair: AgentHost) -> None:
    http = {"action": "allow", "protocol": "tcp", "dst_ports": [80]}
    syslog = {"action": "allow", "protocol": "udp", "dst_ports": [514]}
    pair.profile("b", inbound=[http, syslog, {"action": "deny", "protocol": "udp"}, {"action": "log"}])
    pair.profile("unused", inbound=[ALLOW])
    pair.sync()
    for _ in range(3):
        assert tcp("a", "b", B4, patience=PATIENT)

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for _ in range(5):
                client.sendto(b"ping", (B4, 514))

    inside("a", send)  # nobody answers, so the connection is never established
    assert not udp("a", "b", B4) and not udp("a", "b", B6) and not ping("a", B4)
    counted = rules(pair, "b")
    assert [rule["connections"] for rule in counted] == [3, 1, None, None]
    assert [rule["dropped_packets"] for rule in counted] == [0, 0, 2, None]
    assert counted[2]["dropped_bytes"] == (20 + 8 + 4) + (40 + 8 + 4)
    assert {rule["host"] for rule in counted} == {"host1"} and counted[3]["since"] is None
    assert rules(pair, "unused")[0]["connections"] is None
    text = pair.ctl("profile", "b", "rule", "show", "--counters").out.splitlines()
    assert text[0] == "Inbound rules (counted on host1):"
    assert text[1] == f"   1 allow tcp to ports 80   3 connections since {counted[0]['since']}"
    endpoints = {
        one["name"]: one for one in json.loads(pair.ctl("endpoint", "show", "--counters", "--output=json").out)
    }
    of_a, of_b = (endpoints[pair.interface(name)] for name in "ab")
    dropped = {(one["direction"], one["reason"]): one["packets"] for one in of_b["dropped"]}
    assert dropped["inbound", "rule"] == 2 and dropped["inbound", "no-rule"] == 1
    assert {"rule", "no-rule"}.isdisjoint(one["reason"] for one in of_a["dropped"])
    assert of_a["sent"]["packets"] >= 3 + 5 + 3 and of_b["received"]["bytes"] > 3 * 40
    # in new tables, of another agent or after another process has removed them, it goes on
    pair.kill_agent()
    pair.start_agent()
    assert rules(pair, "b") == counted
    run("nft", "flush", "ruleset")
    wait_for(lambda: run("nft", "list", "chain", "inet", "calico", "to/b", check=False).status == 0, "the new tables")
    assert rules(pair, "b") == counted
    # another position is no other rule; but a rule that was removed begins anew
    pair.profile("b", inbound=[ALLOW, syslog, http])
    pair.sync()
    moved = rules(pair, "b")
    assert [rule["connections"] for rule in moved] == [0, 1, 3] and moved[2]["since"] == counted[0]["since"]


def test_counters_need_root_and_tables_that_count(pair: AgentHost) -> None:
    for words in (("profile", "b", "rule", "show", "--counters"), ("endpoint", "show", "--counters")):
        said = pair.ctl(*words, status=2, command=[*AS_NOBODY, CALICOCTL])
        assert "must be run as root" in said.err
    assert "run this command on host2" in pair.ctl("endpoint", "show", "--counters", "--host=host2", status=1).err
    pair.kill_agent()
    run("nft", "flush", "ruleset")
    assert "Nothing is counted on this host" in pair.ctl("endpoint", "show", "--counters", status=1).err


def test_drops_say_who_what_and_why(pair: AgentHost) -> None:
    pair.profile("b", inbound=[{"action": "allow", "protocol": "tcp"}, {"action": "deny", "protocol": "udp"}])
    pair.sync()
    follower = pair.start("drops", "--follow", "--output=json")
    lines: list[dict] = []
    reader = threading.Thread(target=lambda: lines.extend(map(json.loads, follower.stdout)), daemon=True)
    reader.start()

    def seen(**fields: object) -> dict:
        """Wait for a drop with these fields, and return it."""
        found = lambda: [one for one in lines if fields.items() <= one.items()]  # noqa: E731
        wait_for(found, f"a drop with {fields}", 10)
        return found()[0]

    try:
        udp("a", "b", B4, source_port=4000)
        drop = seen(reason="rule")
        assert (drop["direction"], drop["protocol"], drop["port"], drop["source_port"]) == ("inbound", "udp", 53, 4000)
        assert (drop["profile"], drop["rule"], drop["host"]) == ("b", 2, "host1")
        assert drop["why"] == "profile b, inbound rule 2: deny udp"
        ends = {word: (drop[word]["name"], drop[word]["address"], drop[word]["host"]) for word in ("from", "to")}
        assert ends == {"from": ("-var-run-netns-a", A4, "host1"), "to": ("-var-run-netns-b", B4, "host1")}
        traced = pair.ctl(*drop["trace"].split()[1:], status=1)
        assert drop["trace"] == f"calicoctl profile trace {A4} {B4} udp 53 --from-port=4000"
        assert "deny udp" in traced.out + traced.err
        ping("a", B6)
        assert seen(reason="no-rule", protocol="icmpv6")["from"]["address"] == A6
        run("ip", "-n", "a", "address", "add", "10.9.9.9/32", "dev", "eth1")
        inside("a", lambda: send_udp("10.9.9.9", B4))
        of_spoofed = seen(reason="spoofed", protocol="udp")["trace"]
        assert of_spoofed.startswith(f"calicoctl profile trace {A4} {B4} udp 9 "), "of the sender's own address"
        interface = pair.interface("a")
        pair.etcd.delete(pair.key("a"))
        pair.sync()
        inside("a", lambda: send_udp(A4, B4))
        assert seen(reason="no-endpoint", interface=interface, protocol="udp")["direction"] == "outbound"
    finally:
        follower.send_signal(signal.SIGINT)
        follower.wait(10)
        reader.join(10)
        said = follower.stderr.read()
        follower.stderr.close()
        follower.stdout.close()
    assert follower.returncode == 130 and "packets were dropped on host1 since" in said
    follower = pair.start("drops", "--follow")
    assert follower.stdout.readline()
    follower.stdout.close()  # as `head -1` does
    assert follower.wait(10) == 0 and "packets were dropped on host1 since" in follower.stderr.read()
    follower.stderr.close()


def test_without_a_log_packets_are_dropped_and_counted_all_the_same(pair: AgentHost) -> None:
    pair.profile("b", inbound=[{"action": "allow", "protocol": "tcp"}, {"action": "deny", "protocol": "udp"}])
    pair.kill_agent()
    other = Nft()
    other.run("add table inet calico-trial { flags owner; }")  # so the kernel refuses the agent's trial
    try:
        pair.start_agent()
        assert tcp("a", "b", B4, patience=PATIENT) and not udp("a", "b", B4)
        assert rules(pair, "b")[1]["dropped_packets"] == 1
        said = pair.ctl("drops")
        assert not said.out and "the kernel cannot log them" in said.err and " are not shown" in said.err
        assert "the kernel cannot log them" in pair.ctl("status").out
        assert "jhash" not in run("nft", "list", "table", "inet", "calico").out
    finally:
        del other  # with its socket, the kernel removes the table
    pair.kill_agent()
    pair.start_agent()
    udp("a", "b", B4)
    wait_for(lambda: "deny udp" in pair.ctl("drops").out, "the drop")
    assert "the kernel cannot log them" not in pair.ctl("drops").err + pair.ctl("status").out
    assert rules(pair, "b")[1]["dropped_packets"] == 2


def test_a_flood_is_counted_and_a_sample_of_it_is_shown(pair: AgentHost) -> None:
    port = free_port()
    pair.kill_agent()
    pair.start_agent(f"--metrics-port={port}")
    wait_for(lambda: str(drops.GROUP) in Path("/proc/net/netfilter/nfnetlink_log").read_text(), "a receiver of drops")
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_NETFILTER) as other:
        with pytest.raises(OSError) as refused:
            packet_log._join(other)
        assert packet_log._WHY[refused.value.errno] == "another process receives them"
    inside("a", lambda: send_udp(A4, B4, 3000))

    def shown() -> list[str]:
        return pair.ctl("drops").out.splitlines()

    wait_for(lambda: " times until " in "".join(shown()), "the flood")
    assert not tcp("a", "b", B4, 8080)  # it is seen beside the flood
    wait_for(lambda: len(shown()) == 2, "the other packet")
    flood, other = shown()
    assert f" -var-run-netns-a ({A4}) to -var-run-netns-b ({B4}), udp 9, inbound: no rule matched; " in flood
    assert f"), tcp 8080, inbound: no rule matched; calicoctl profile trace {A4} {B4} tcp 8080 --from-port=" in other
    said = pair.ctl("drops").err
    total, missing = re.search(
        r"(\d+) packets were dropped on host1 since \S+; (\d+) of them are not shown", said
    ).groups()
    assert int(total) >= 3001 and int(missing) >= 2900
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    labels = f'direction="inbound",endpoint="{pair.key("b").rpartition("/")[2]}",reason="no-rule"'
    assert float(re.search(rf"^calico_felix_dropped_packets_total{{{labels}}} (.*)", text, re.MULTILINE)[1]) >= 3001
    # others than root get nothing, and without an agent nobody does
    assert "must be run as root" in pair.ctl("drops", status=2, command=[*AS_NOBODY, CALICOCTL]).err
    path = Path("/run/calico/host1/drops.sock")
    assert (path.stat().st_mode & 0o777, path.stat().st_uid) == (0o600, 0)
    pair.kill_agent()
    assert "it is not running. Start it with" in pair.ctl("drops", status=1).err


def test_a_workload_that_floods_hides_no_drops_of_others(pair: AgentHost) -> None:
    pair.add("c", C4)
    pair.profile("c", outbound=[ALLOW])
    pair.set_profiles("c", "c")
    pair.sync()
    clients = [inside(name, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for name in "ac"]
    with clients[0] as flooding, clients[1] as other:
        for port in range(5000, 5020):
            for number in range(500):  # to all ports, of which some fall to each 32nd
                flooding.sendto(b"x", (B4, 6000 + number))
            other.sendto(b"x", (B4, port))

    def shown() -> set[int]:
        drops = map(json.loads, pair.ctl("drops", "--output=json").out.splitlines())
        return {drop["port"] for drop in drops if drop["from"]["address"] == C4}

    wait_for(lambda: shown() == set(range(5000, 5020)), "the drops of c")


def send_udp(source: str, destination: str, count: int = 1) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind((source, 0))
        for _ in range(count):
            client.sendto(b"ping", (destination, 9))
