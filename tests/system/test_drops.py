"""What policy drops on a host is counted, and so is what each rule decides: with real packets."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from tests.system.agent import A4, A6, ALLOW, B4, B6, AgentHost
from tests.system.conftest import clear_host
from tests.system.support import AS_NOBODY, CALICOCTL, Etcd, run, wait_for
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
