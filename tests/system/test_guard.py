"""No packet of a workload passes without the agent's tables: before an agent runs, and while the tables are gone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from calicoctl.workloads import guard
from tests.system.agent import A4, A6, ALLOW, B4, C4, AgentHost, outside_host
from tests.system.support import HOST_IP, HOST_IP6, Host, calico_links, in_process, links, run, wait_for
from tests.system.traffic import PATIENT, connection, ends, flows, mac_bytes, ping, send_frame, tcp, udp_frame

OTHERS = ("203.0.113.7", "2001:db8:7::7")
BEYOND = ("198.51.100.2", "2001:db8:1::2")

WATCH = """
add table inet watch
add table arp watch
add chain inet watch arrived { type filter hook prerouting priority -400; }
add chain inet watch input { type filter hook input priority 300; }
add chain inet watch forward { type filter hook forward priority 300; }
add chain inet watch output { type filter hook output priority 300; }
add chain arp watch input { type filter hook input priority 300; }
add rule inet watch arrived iifname "cali*" counter comment "arrived"
add rule inet watch input iifname "cali*" meta l4proto != icmpv6 counter comment "passed"
add rule inet watch forward iifname "cali*" counter comment "passed"
add rule inet watch output oifname "cali*" meta l4proto != icmpv6 counter comment "passed"
add rule arp watch input iifname "cali*" counter comment "passed"
"""


@contextmanager
def watched() -> Iterator[None]:
    """Count the packets of `cali…` interfaces that arrive, and those that pass, and let the host forward."""
    forwarding = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding")
    run("sysctl", "-qw", *(f"{name}=1" for name in forwarding))
    run("nft", "-f", "-", input=WATCH)
    try:
        yield
    finally:
        run("nft", "delete table inet watch; delete table arp watch")
        run("sysctl", "-qw", *(f"{name}=0" for name in forwarding))


def counted(comment: str) -> int:
    rules = json.loads(run("nft", "-j", "list", "ruleset").out)["nftables"]
    found = [item["rule"] for item in rules if item.get("rule", {}).get("comment") == comment]
    return sum(rule["expr"][-1]["counter"]["packets"] for rule in found)


def attack(namespace: str) -> int:
    """Send packets from a namespace: with its own and other senders, to the host and beyond; return how many."""
    (interface,) = [name for name, link in links(namespace).items() if name == "eth1"]
    own, host_end = links(namespace)[interface]["address"], "ee:ee:ee:ee:ee:ee"
    before, sent = counted("arrived"), 0
    for sources, host, beyond in (((A4, OTHERS[0]), HOST_IP, BEYOND[0]), ((A6, OTHERS[1]), HOST_IP6, BEYOND[1])):
        for source in sources:
            for destination in (host, beyond):
                send_frame(namespace, interface, udp_frame(own, host_end, source, destination, 4000))
                sent += 1
    asked = b"\0\1\x08\0\6\4\0\1" + mac_bytes(own) + bytes((203, 0, 113, 7)) + bytes(6) + bytes((192, 0, 2, 2))
    send_frame(namespace, interface, b"\xff" * 6 + mac_bytes(own) + b"\x08\x06" + asked)
    wait_for(lambda: counted("arrived") >= before + sent, "the packets")
    return sent


def test_a_workload_passes_nothing_without_the_tables_of_an_agent(bare_host: Host) -> None:
    """Neither before an agent has ever run, nor after the tables were flushed while it was dead."""
    host = AgentHost(bare_host.etcd)
    host.register(HOST_IP, HOST_IP6)
    with outside_host(), watched():
        host.add("a", A4, A6)
        attack("a")
        assert counted("passed") == 0
        assert not ping("a", HOST_IP)

        host.start_agent()
        assert "no-agent" not in run("nft", "list", "ruleset").out, "the agent's tables take the place"
        host.profile("web", inbound=[ALLOW])
        host.set_profiles("a", "web")
        host.sync()
        assert ping("a", HOST_IP, patience=PATIENT), "an agent that starts later lets pass what policy allows"
        host.kill_agent()
        passed = counted("passed")
        host.add("b", B4)
        assert ping("a", HOST_IP, patience=PATIENT), "the tables of a dead agent stay as they are"
        assert counted("passed") > passed

        run("nft", "delete table inet calico; delete table arp calico")
        run("ip", "netns", "delete", "b")
        wait_for(lambda: len(calico_links()) == 1, "the interface's end")
        run("ip", "netns", "add", "b")
        passed = counted("passed")
        host.ctl("container", "add", "/var/run/netns/b", B4)
        attack("a")
        attack("b")
        assert not ping(None, A4)
        assert counted("passed") == passed

        # tables without rules drop nothing
        run("nft", "flush table inet calico; flush table arp calico")
        host.ctl("container", "remove", "/var/run/netns/b")
        host.ctl("container", "add", "/var/run/netns/b", B4)
        attack("b")
        assert counted("passed") == passed
        host.ctl("node", "remove", "--remove-endpoints")
    assert "calico" not in run("nft", "list", "tables").out


def test_interfaces_that_outlive_their_host_pass_nothing(bare_host: Host) -> None:
    """Their endpoints were lost with the store, so `node remove` does not know whose they are."""
    host = AgentHost(bare_host.etcd)
    host.register(HOST_IP, HOST_IP6)
    with outside_host(), watched():
        host.start_agent()
        host.add("a", A4, A6)
        (interface,) = calico_links()
        host.etcd.delete("/calico")
        said = host.ctl("node", "remove").err
        assert f"interfaces without an endpoint ({interface})" in said and len(said.splitlines()) == 1
        run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        attack("a")
        assert counted("passed") == 0 and not ping("a", HOST_IP)
        assert "calico-connections" not in run("nft", "list", "tables").out
        run("ip", "link", "delete", interface)
        assert not host.ctl("node", "remove").err
    assert "calico" not in run("nft", "list", "tables").out


BUSY_AGENT = """
import os, time
from calicoctl.felix import agent, process
from calicoctl.felix.dataplane.nft import Nft
from calicoctl.workloads.guard import Guard
run, create = Nft.run, Guard.create
def late(self, commands):
    while os.path.exists("BUSY"): time.sleep(0.01)
    return run(self, commands)
def unless_too_late(self):
    if not os.path.exists("TOO LATE"): create(self)
Nft.run, Guard.create = late, unless_too_late
agent.run("host1", process.Options())
"""
"""An agent that loads no tables while a file exists, and no guard while another does."""


def test_what_begins_while_there_are_no_tables_does_not_last(bare_host: Host, tmp_path: Path) -> None:
    busy, too_late = tmp_path / "busy", tmp_path / "late"
    host = AgentHost(bare_host.etcd)
    host.register(HOST_IP)
    text = BUSY_AGENT.replace("BUSY", str(busy)).replace("TOO LATE", str(too_late))
    agent = subprocess.Popen([sys.executable, "-c", text], env=host.environment(), stderr=subprocess.DEVNULL)
    try:
        host.add_pair()
        host.add("c", C4)
        host.profile("none", outbound=[{"action": "deny"}])
        host.set_profiles("c", "none")
        wait_for(lambda: ping("a", B4) and not tcp("c", "b", B4), "the network")

        # while the agent cannot load its tables, nothing passes, not even what they allow
        busy.touch()
        run("nft", "flush", "ruleset")
        wait_for(lambda: "no-agent" in run("nft", "list", "ruleset").out, "what drops everything")
        assert not ping("a", B4)
        busy.unlink()
        wait_for(lambda: ping("a", B4), "the network")

        # what has come through before, as tables and guard were late, is ended. Another table's rule keeps connection
        # tracking on; without it, what is not tracked is dropped later, denied or not
        run("nft", "add table inet track; add chain inet track c { type filter hook forward priority 0; }")
        run("nft", "add rule inet track c ct state established counter")
        for ready in ("true", "false"):
            host.etcd.put("/calico/v1/Ready", ready)
            wait_for(lambda wait=ready == "false": bool(host.status()["waiting_for"]) == wait, "the agent")
            busy.touch()
            too_late.touch()
            run("nft", "delete table inet calico; delete table arp calico")
            with connection("c", "b", B4, 80) as denied, connection("a", "b", B4, 81) as allowed:
                too_late.unlink()
                busy.unlink()
                ends(*denied)
                wait_for(lambda: flows(*allowed), "the tables")
                host.etcd.put("/calico/v1/Ready", "true")
                wait_for(lambda: f"src={C4} dst={B4}" not in run("conntrack", "-L").out, "its end")
                assert flows(*allowed)
    finally:
        run("nft", "add table inet track; delete table inet track")
        busy.unlink(missing_ok=True)
        agent.terminate()
        agent.wait()


def test_where_nftables_does_not_work_nothing_is_connected(host: Host) -> None:
    run("ip", "netns", "add", "a")
    with mock.patch.object(guard, "_transact", side_effect=OSError(93, "Protocol not supported")):
        status, said = in_process(host, "container", "add", "/var/run/netns/a", A4)
    assert status == 1
    assert "nftables cannot be used here (Protocol not supported)" in said
    assert len(said.splitlines()) == 1
    assert not calico_links()
    assert not host.records()
    assert not host.allocations()
    assert not host.handles()


def test_beside_a_felix_of_2015_its_own_rules_decide(host: Host) -> None:
    run("ip", "netns", "add", "a")
    host.etcd.put(f"/calico/felix/v1/host/{host.name}/status", {"time": "2026-01-01T00:00:00Z", "uptime": 1.0})
    run("iptables", "-N", "felix-FORWARD")
    try:
        host.ctl("container", "add", "/var/run/netns/a", A4)
        assert "calico" not in run("nft", "list", "tables").out
    finally:
        run("iptables", "-X", "felix-FORWARD")
    run("ip", "netns", "add", "b")
    host.ctl("container", "add", "/var/run/netns/b", "192.168.0.2")
    assert "calico" in run("nft", "list", "tables").out, "the status in etcd alone proves nothing"
