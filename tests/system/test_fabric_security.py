"""What machines of the network that are no hosts, workloads, and containers on a bridge can do to hosts: with packets.

Each attack reaches its aim if the rule against it is taken out of `from-outside`, `ports`, `vxlan-forward` or
`translated`.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from calicoctl.felix.dataplane.vxlan import VNI
from tests.system import traffic
from tests.system.fabric import NETWORKS, FabricHost, fabric, introduce
from tests.system.support import Result, run, wait_for
from tests.system.test_hosts import open_etcds

POOL, POOL6 = "192.168.0.0/16", "fd80:24e2:f998:72d6::/64"
A, B, C = "192.168.0.1", "192.168.1.1", "192.168.2.1"
A6, B6, C6 = (f"fd80:24e2:f998:72d6::{number}" for number in ("1", "41", "81"))
OUTSIDER, OUTSIDER6 = f"{NETWORKS[0][0]}66", f"{NETWORKS[0][1]}66"
VXLAN_HEADER = bytes([8, 0, 0, 0]) + VNI.to_bytes(3, "big") + bytes(1)
HOST_MACS = ("nft", "list", "set", "inet", "calico", "host-macs")

_INBOX = """
import socket
server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.bind(("::", 5000))
print("ready", flush=True)
while True:
    print(server.recv(2000).decode(), flush=True)
"""
_SEND = """
import socket, sys
address, port, data, *own = sys.argv[1:]
with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sender:
    for source in own:
        sender.bind((source, 0))
    sender.sendto(bytes.fromhex(data), (address, int(port)))
"""
_FRAME = """
import socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
    raw.bind(("eth0", 0))
    raw.send(bytes.fromhex(sys.argv[1]))
"""
_CONNECT = """
import socket, sys
address, port, *own = sys.argv[1:]
socket.create_connection((address, int(port)), 1, (*own, 0) if own else None).close()
"""
_DAEMON = """
import socket
with socket.create_server(("", 179)) as server:
    print("ready", flush=True)
    while True:
        server.accept()
"""


class Inbox:
    """A UDP socket of a workload, on port 5000, and what it has received."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        assert self.line() == "ready"

    def line(self) -> str:
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], 5)[0], "nothing has come"
        return self._process.stdout.readline().decode().strip()  # unbuffered: the rest can be waited for

    def until(self, last: str) -> list[str]:
        """Return what comes before the datagram `last`."""
        found: list[str] = []
        while (line := self.line()) != last:
            found.append(line)
        return found


@contextlib.contextmanager
def inbox(host: FabricHost, namespace: str) -> Iterator[Inbox]:
    command = host.inside("ip", "netns", "exec", namespace, sys.executable, "-c", _INBOX)
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        try:
            yield Inbox(process)
        finally:
            process.kill()


def send(run_in: Callable[..., Result], address: str, text: str) -> None:
    run_in(sys.executable, "-c", _SEND, address, "5000", text.encode().hex())


def connects(run_in: Callable[..., Result], address: str, port: int, *own: str) -> bool:
    """Return whether a TCP connection is opened, from the address `own` if it is given."""
    return run_in(sys.executable, "-c", _CONNECT, address, str(port), *own, check=False).status == 0


def outsider(*command: str, check: bool = True) -> Result:
    """Run a command on the machine that is no host."""
    return run("ip", "netns", "exec", "outsider", *command, check=check)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[FabricHost]]:
    """Two hosts on one network, the third behind a router, with a workload each; and a machine that is no host.

    All that is not within one network goes through VXLAN. The third host runs no BIRD.
    """
    with open_etcds(tmp_path_factory.mktemp("etcd")) as (etcd,), fabric(etcd, 0, 0, 1) as found:
        one = found[0]
        one.start_agent()
        for pool in (POOL, POOL6):
            one.ctl("pool", "add", pool, "--vxlan=cross-subnet")
        found[1].start_agent()
        found[2].start_agent("--bgp=off")
        for profile in ("web", "open", "closed"):
            one.ctl("profile", "add", profile)
        one.ctl("profile", "open", "rule", "add", "inbound", "allow")
        one.ctl("profile", "closed", "rule", "add", "inbound", "--at=1", "deny")
        for host, name, *addresses in ((one, "a", A, A6), (found[1], "b", B, B6), (found[2], "c", C, C6)):
            host.add(name, *addresses)
            host.set_profiles(name, "web")
        with no_host():
            for host, name in ((found[1], "b"), (found[2], "c")):
                for address in (A, A6):
                    wait_for(lambda h=host, n=name, a=address: h.reaches(n, a), f"the route from {name}", 20)
            yield found


@contextlib.contextmanager
def no_host() -> Iterator[None]:
    run("ip", "netns", "add", "outsider")
    run("ip", "link", "add", "outsider", "type", "veth", "peer", "name", "eth0", "netns", "outsider")
    run("ip", "link", "set", "outsider", "master", "fabric0", "up")
    for words in (
        f"address add {OUTSIDER}/24 dev eth0",
        f"-6 address add {OUTSIDER6}/64 dev eth0 nodad",
        "link set eth0 up",
        f"route add default via {NETWORKS[0][0]}254",
    ):
        run("ip", "-n", "outsider", *words.split())
    try:
        yield
    finally:
        run("ip", "link", "delete", "outsider", check=False)
        run("ip", "netns", "delete", "outsider", check=False)


def pings(run_in: Callable[..., Result], address: str) -> bool:
    return run_in("ping", "-n", "-c1", "-W2", address, check=False).status == 0


def mac(run_in: Callable[..., Result], device: str = "eth0") -> str:
    (link,) = json.loads(run_in("ip", "-json", "link", "show", device).out)
    return link["address"]


def forge(run_in: Callable[..., Result], target_mac: str, source: str, destination: str) -> None:
    """Send a datagram with a forged sender, whose name is its text."""
    frame = traffic.udp_frame(mac(run_in), target_mac, source, destination, 5000, payload=source.encode())
    run_in(sys.executable, "-c", _FRAME, frame.hex())


def failures(host: FabricHost) -> str:
    """Return what fails on a host, as its status has it."""
    return "; ".join(failure["error"] for failure in json.loads(host.ctl("status", "--output=json").out)["troubles"])


def test_no_machine_but_hosts_sends_from_addresses_of_workloads_and_hosts(hosts: list[FabricHost]) -> None:
    one, two, three = hosts
    for host in hosts:  # the kernel checks nothing
        host.run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.eth0.rp_filter=0")
    one.add("a2", "192.168.0.2", f"{A6}a")
    one.set_profiles("a2", "web")
    b, c = partial(two.of, "b"), partial(three.of, "c")
    with inbox(one, "a") as received:
        for source, target in (
            *(("192.168.0.2", A), (f"{A6}a", A6)),  # of a workload of this host
            *((B, A), (B6, A6)),  # of another host
            *((two.ip, A), (two.ip6, A6)),  # of the other host itself
            *((one.ip, A), (one.ip6, A6)),  # of this host
        ):
            forge(outsider, one.mac, source, target)
        # hosts and their workloads pass, also through the overlay
        for address in (A, A6):
            for name, sender in (("b", b), ("host12", two.run), ("c", c), ("host13", three.run)):
                send(sender, address, f"{name} to {address}")
        send(b, A, "end")
        names = ("b", "host12", "c", "host13")
        assert received.until("end") == [f"{name} to {address}" for address in (A, A6) for name in names]
        # the next agent knows on which interfaces hosts were seen
        one.run("nft", "add", "element", "inet", "calico", "proven/host12", '{ "eth7" }')
        one.start_agent()
        proven = one.run("nft", "list", "set", "inet", "calico", "proven/host12").out
        assert "eth0" in proven and "eth7" in proven

        # a new MAC of a host's is known at once
        two.run("ip", "link", "set", "eth0", "address", "02:00:00:00:99:12")
        introduce(one, two)
        wait_for(lambda: two.reaches("b", A), "the new MAC")
        with second_network(one, two):
            wait_for(lambda: mac(two.run, "eth1") in one.run(*HOST_MACS).out, "the MAC of the second interface")
            two.run("ip", "route", "replace", f"{A}/32", "via", "172.20.0.11")
            send(b, A, "by the other way")
            assert received.line() == "by the other way"
            two.run("ip", "route", "delete", f"{A}/32")
        with box(one):
            for source in (B, C, two.ip, three.ip):
                forge(partial(one.of, "box"), mac(one.run, "docker7"), source, A)
            send(b, A, "end")
            assert received.until("end") == []


def test_a_host_reaches_workloads_of_other_hosts_but_nothing_that_it_translates_does(hosts: list[FabricHost]) -> None:
    one, two, three = hosts
    for host, name in ((one, "a"), (two, "b"), (three, "c")):
        host.set_profiles(name, "closed")
    for target in (B, B6, C, C6):
        assert one.run("ping", "-n", "-c1", "-W3", target, check=False).status == 0
    assert not one.reaches("a", B)
    with box(one), inbox(two, "b") as received, inbox(one, "a") as received_here:
        of_box = partial(one.of, "box")
        assert pings(of_box, f"{NETWORKS[0][0]}1") and pings(of_box, two.ip), "it gets outside"
        send(of_box, B, "from the container")
        send(of_box, A, "from the container")
        for host, name in ((one, "a"), (two, "b")):
            host.set_profiles(name, "open")
        wait_for(lambda: pings(of_box, A), "the open profile")
        wait_for(lambda: one.reaches("a", B), "the open profile")
        send(of_box, B, "from the container")
        send(of_box, A, "from the container")
        for source in (one.ip, two.ip, three.ip):
            forge(of_box, mac(one.run, "docker7"), source, B)
        send(one.run, B, "end")
        assert received.until("end") == [], "it could not be told from the host's own"
        assert received_here.line() == "from the container", "as far as policy allows"
        # a pool that overlaps the hosts' network, and a workload in there
        network, inside = f"{NETWORKS[0][0]}0/24", f"{NETWORKS[0][0]}200"
        one.ctl("pool", "add", network)
        wait_for(lambda: network in one.run("nft", "list", "set", "inet", "calico", "pools4").out, "the pool")
        assert pings(of_box, f"{NETWORKS[0][0]}1") and pings(of_box, two.ip)
        two.add("d", inside)
        two.set_profiles("d", "open")
        wait_for(lambda: pings(one.run, inside), "the route", 20)
        assert not pings(of_box, inside)
        two.ctl("container", "remove", "/var/run/netns/d")
        one.ctl("pool", "remove", network)
        # the host itself may translate its own packets
        rule = ("POSTROUTING", "-d", B, "-j", "SNAT", "--to-source", one.ip)
        one.run("ip", "address", "add", "172.18.0.111/24", "dev", "eth0")
        one.run("iptables", "-t", "nat", "-A", *rule)
        one.run(sys.executable, "-c", _SEND, B, "5000", b"translated".hex(), "172.18.0.111")
        assert received.line() == "translated"
        one.run("iptables", "-t", "nat", "-D", *rule)
        one.run("ip", "address", "delete", "172.18.0.111/24", "dev", "eth0")
    for host, name in ((one, "a"), (two, "b"), (three, "c")):
        host.set_profiles(name, "web")
    wait_for(lambda: three.reaches("c", A) and one.reaches("a", C), "the profile")


def test_only_hosts_reach_bgp_and_the_overlay(hosts: list[FabricHost]) -> None:
    one, two, three = hosts
    for address in (one.ip, one.ip6):
        assert connects(two.run, address, 179) and connects(one.run, address, 179)
        assert not connects(outsider, address, 179)
    # a machine that takes over the address of a host, by ARP
    outsider("ip", "address", "add", f"{two.ip}/32", "dev", "eth0")
    one.run("ip", "neigh", "replace", two.ip, "lladdr", mac(outsider), "dev", "eth0", "nud", "permanent")
    assert not connects(outsider, one.ip, 179, two.ip)
    outsider("ip", "address", "delete", f"{two.ip}/32", "dev", "eth0")
    introduce(one, two)
    with subprocess.Popen(three.inside(sys.executable, "-c", _DAEMON), stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None and daemon.stdout.readline() == "ready\n"
        wait_for(lambda: connects(outsider, three.ip, 179), "a foreign BGP daemon, which is left alone", 10)
        daemon.kill()

    one.add("a3", "192.168.0.3")
    one.set_profiles("a3", "open")
    end, end_there = (mac(host.run, "vxlan.calico") for host in (one, three))
    with inbox(one, "a") as received, inbox(three, "c") as received_there:
        inner = traffic.udp_frame(end_there, end, C, A, 5000, payload=b"injected")
        inner_there = traffic.udp_frame(end, end_there, A, C, 5000, payload=b"injected")
        for source, target in ((OUTSIDER, one.ip), (two.ip, one.ip), (OUTSIDER6, one.ip6), (two.ip6, one.ip6)):
            frame = traffic.vxlan_frame(mac(outsider), one.mac, source, target, VNI, inner)
            outsider(sys.executable, "-c", _FRAME, frame.hex())
        # a workload, to its own host and to another; a container on a bridge, to another host
        for sender, target, packet in (
            (partial(one.of, "a3"), one.ip, inner),
            (partial(one.of, "a3"), three.ip, inner_there),
        ):
            sender(sys.executable, "-c", _SEND, target, "4789", (VXLAN_HEADER + packet).hex())
        with box(one):
            packet = (VXLAN_HEADER + inner_there).hex()
            second = f"{NETWORKS[1][0]}113"  # to which the packets come from the address of the container's host
            three.run("ip", "address", "add", f"{second}/24", "dev", "eth0")
            for target in (three.ip, second):
                one.of("box", sys.executable, "-c", _SEND, target, "4789", packet)
        send(partial(three.of, "c"), A, "end")
        send(partial(one.of, "a"), C, "end")
        assert (received.until("end"), received_there.until("end")) == ([], [])
        three.run("ip", "address", "delete", f"{second}/24", "dev", "eth0")

    # what this host's own firewall drops is told
    drop = ("INPUT", "-p", "tcp", "--dport", "179", "-j", "DROP")
    one.run("ip6tables", "-I", *drop)
    drop_sent = ("OUTPUT", "-p", "udp", "--dport", "4789", "-j", "DROP")
    one.run("iptables", "-I", *drop_sent)
    told = (
        "'ip6tables -I INPUT -p tcp --dport 179 -j ACCEPT'",
        "VXLAN to other hosts on UDP port 4789 over IPv4, and with it the packets of this host's workloads: let it "
        "pass, for example with 'iptables -I OUTPUT -p udp --dport 4789 -j ACCEPT'",
    )
    wait_for(
        lambda: (
            connects(two.run, one.ip6, 179)
            or pings(partial(one.of, "a"), C)
            or all(text in failures(one) for text in told)
        ),
        "the failures",
        40,
    )
    one.run("ip6tables", "-D", *drop)
    one.run("iptables", "-D", *drop_sent)
    wait_for(
        lambda: connects(two.run, one.ip6, 179) and pings(partial(one.of, "a"), C) and not failures(one),
        "their end",
        20,
    )

    # another program's VXLAN, with another VNI on the same port
    for run_in, local, remote, address in ((one.run, one.ip, OUTSIDER, 1), (outsider, OUTSIDER, one.ip, 2)):
        tunnel = f"link add foreign type vxlan id 77 local {local} remote {remote} dstport 4789 dev eth0"
        for words in (tunnel, f"address add 10.77.0.{address}/24 dev foreign", "link set foreign up"):
            run_in("ip", *words.split())
    assert outsider("ping", "-n", "-c1", "-W3", "10.77.0.1", check=False).status == 0


def test_packets_of_hosts_may_come_another_way_than_the_one_that_leads_back(hosts: list[FabricHost]) -> None:
    one, two, three = hosts
    three.run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.eth0.rp_filter=0")
    run("ip", "link", "add", "three1", "type", "veth", "peer", "name", "eth1", "netns", three.namespace)
    run("ip", "link", "set", "three1", "master", "fabric0", "up")
    three.run("ip", "address", "add", f"{NETWORKS[0][0]}13/24", "dev", "eth1")
    three.run("ip", "-6", "address", "add", f"{NETWORKS[0][1]}d/64", "dev", "eth1", "nodad")
    three.run("sysctl", "-qw", "net.ipv4.conf.eth1.rp_filter=0")
    three.run("ip", "link", "set", "eth1", "up")
    in_fabric = ("nft", "list", "set", "inet", "calico", "fabric")
    wait_for(lambda: "eth1" in three.run(*in_fabric).out, "the new way to the other hosts")
    for host in (one, two):
        for address in (three.ip, three.ip6):
            wait_for(lambda h=host, a=address: pings(h.run, a), f"the way by the router from {host.name}", 10)
    assert pings(partial(one.of, "a"), C), "by the overlay"
    run("ip", "link", "delete", "three1")

    # the router sends by a second cable, of which the host only knows the network
    run("ip", "link", "add", "eth2", "netns", "router", "type", "veth", "peer", "name", "eth1", "netns", one.namespace)
    router = ("ip", "-n", "router")
    one.run("ip", "address", "add", "172.20.0.11/24", "dev", "eth1")
    one.run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.eth1.rp_filter=0")
    one.run("sysctl", "-qw", "net.ipv4.conf.eth0.rp_filter=0")
    one.run("ip", "link", "set", "eth1", "up")
    wait_for(lambda: "eth1" in one.run(*in_fabric).out, "the second way")
    run(*router, "address", "add", "172.20.0.254/24", "dev", "eth2")
    run(*router, "link", "set", "eth2", "up")
    run(*router, "route", "add", f"{one.ip}/32", "via", "172.20.0.11")
    for name, sender, address in (("host13", three.run, one.ip), ("c", partial(three.of, "c"), A)):
        wait_for(lambda s=sender, a=address: pings(s, a), f"the way by the second cable from {name}", 10)
    run(*router, "link", "delete", "eth2")


@contextlib.contextmanager
def second_network(one: FabricHost, two: FabricHost) -> Iterator[None]:
    """A cable between two hosts."""
    ends = ("netns", one.namespace, "type", "veth", "peer", "name", "eth1", "netns", two.namespace)
    run("ip", "link", "add", "eth1", *ends)
    for host in (one, two):
        host.run("ip", "address", "add", f"172.20.0.{host.number}/24", "dev", "eth1")
        host.run("ip", "link", "set", "eth1", "up")
    yield
    one.run("ip", "link", "delete", "eth1")


@contextlib.contextmanager
def box(host: FabricHost) -> Iterator[None]:
    """A container on a bridge, whose packets are translated to the host's address, as Docker does it."""
    for words in (
        "link add docker7 type bridge",
        "address add 172.30.0.1/24 dev docker7",
        "link set docker7 up",
        "netns add box",
        "link add box type veth peer name eth0 netns box",
        "link set box master docker7 up",
        "-n box address add 172.30.0.2/24 dev eth0",
        "-n box link set eth0 up",
        "-n box route add default via 172.30.0.1",
    ):
        host.run("ip", *words.split())
    rule = ("POSTROUTING", "-s", "172.30.0.0/24", "!", "-o", "docker7", "-j", "MASQUERADE")
    host.run("iptables", "-t", "nat", "-A", *rule)
    try:
        yield
    finally:
        host.run("iptables", "-t", "nat", "-D", *rule)
        host.run("ip", "link", "delete", "docker7")
        host.run("ip", "netns", "delete", "box")
