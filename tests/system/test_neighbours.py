"""Permanent neighbour entries: workloads reach their next hop regardless of the host's ARP settings."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.system.agent import A4, A6, ALLOW, B4, B6, AgentHost
from tests.system.support import HOST_IP, HOST_IP6, links, run, wait_for
from tests.system.traffic import PATIENT, ping

SETTINGS = ("1", "2", "8")
"""Of arp_ignore: each keeps a host from answering for an address that the asking interface does not have."""


def set_arp_ignore(value: str) -> None:
    run("sysctl", "-qw", f"net.ipv4.conf.all.arp_ignore={value}")


@pytest.fixture
def workloads(node: AgentHost, engine: None) -> Iterator[AgentHost]:
    """A host that counts the ARP packets of workloads: a container, with the namespace `a` of its network, and `b`."""
    set_arp_ignore("1")
    run("nft", "add table arp probe; add chain arp probe input { type filter hook input priority -9; }")
    run("nft", 'add rule arp probe input iifname "cali*" counter')
    node.profile("web", inbound=[ALLOW])
    run("docker", "run", "--net=none", "--name", "workload", "-tid", "busybox")
    attach()
    for address in (A4, A6):
        words = ["container", "add", "workload"] if address == A4 else ["container", "workload", "ip", "add"]
        node.ctl(*words, address)
    node.ctl("container", "workload", "profile", "append", "web")
    node.add("b", B4, B6)
    node.set_profiles("b", "web")
    node.sync()
    yield node
    run("docker", "rm", "-f", "workload", check=False)
    run("nft", "delete table arp probe")
    set_arp_ignore("0")


def attach() -> None:
    """Give the container's network the name `a`."""
    pid = run("docker", "inspect", "--format", "{{.State.Pid}}", "workload").out.strip()
    run("ip", "netns", "attach", "a", pid)


def host_end(host: AgentHost, namespace: str) -> str:
    """Return the name of the host's end of a workload's pair."""
    (name,) = [record["name"] for record in host.records().values() if record["mac"] == host.mac(namespace)]
    return name


def entries(namespace: str) -> dict[str, str]:
    """Return the MACs that a workload knows for good, by address."""
    found = json.loads(run("ip", "-n", namespace, "-json", "neigh", "show", "nud", "permanent").out)
    return {entry["dst"]: entry["lladdr"] for entry in found if entry["dev"] == "eth1"}


def know_their_next_hops(host: AgentHost) -> bool:
    for namespace in ("a", "b"):
        mac = links()[host_end(host, namespace)]["address"]
        if entries(namespace) != {HOST_IP: mac, HOST_IP6: mac}:
            return False
    return True


def check_packets(host: AgentHost) -> None:
    """Fail where the first packet between workloads, or between them and the host, needs anybody to be asked."""
    wait_for(lambda: know_their_next_hops(host), f"the next hops\n{host.log()}", 10)
    host.sync()
    for value in SETTINGS:
        set_arp_ignore(value)
        for source, address in (("a", B4), ("b", A4), ("a", HOST_IP), (None, A4), (None, B4)):
            assert ping(source, address, PATIENT), (value, source, address)
    for source, address in (("a", B6), ("b", A6), ("a", HOST_IP6), (None, A6), (None, B6)):
        assert ping(source, address, PATIENT), (source, address)
    assert "counter packets 0 " in run("nft", "list", "table", "arp", "probe").out


def test_no_packet_needs_an_answer_to_arp(workloads: AgentHost) -> None:
    host = workloads
    check_packets(host)

    run("ip", "netns", "delete", "a")
    run("docker", "restart", "--time=0", "workload")
    attach()
    wait_for(lambda: "eth1" in links("a"), "the interface")
    check_packets(host)

    host.ctl("container", "workload", "ip", "remove", A6)
    assert list(entries("a")) == [HOST_IP]
    host.ctl("container", "workload", "ip", "add", A6)
    check_packets(host)


def test_the_agent_follows_the_mac_of_the_hosts_end(workloads: AgentHost) -> None:
    host = workloads
    names = {namespace: host_end(host, namespace) for namespace in ("a", "b")}
    run("ip", "link", "set", names["a"], "address", "02:00:00:00:00:0a")
    wait_for(lambda: set(entries("a").values()) == {"02:00:00:00:00:0a"}, host.log())
    check_packets(host)
    for state in ("down", "up"):
        run("ip", "link", "set", names["a"], state)
    check_packets(host)
    kept = run("sh", "-c", f"ip neigh show dev {names['a']}; ip -6 neigh show dev {names['a']}").out
    assert all(f"{address} lladdr {host.mac('a')} PERMANENT" in kept for address in (A4, A6)), kept

    # while no agent is there to follow; and what is connected since before there were such entries
    host.kill_agent()
    run("ip", "link", "set", names["a"], "address", "02:00:00:00:01:0a")
    for address in (HOST_IP, HOST_IP6):
        run("ip", "-n", "b", "neigh", "delete", address, "dev", "eth1")
    run("ip", "-n", "b", "link", "set", "lo", "down")
    host.start_agent()
    check_packets(host)
    assert ping("b", B4, PATIENT) and ping("b", B6, PATIENT), "it reaches itself, too"
    assert sum("has a new neighbour entry of its next hop" in line for line in host.log().splitlines()) == 3
