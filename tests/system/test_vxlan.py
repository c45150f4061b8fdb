"""The overlay: workloads of several hosts reach each other through VXLAN, over a router that knows no pools."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.system.agent import holds
from tests.system.fabric import NETWORKS, ROUTER, FabricHost, fabric
from tests.system.support import AS_NOBODY, Etcd, wait_for

POOL, POOL6 = "10.65.0.0/16", "fd65::/64"
OVERLAY = "81"
"""The protocol number of the overlay's routes."""

_TELL_PEER = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.create_server((sys.argv[1], 7000), family=family) as server:
    print("ready", flush=True)
    print(server.accept()[1][0], flush=True)
"""
_CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 7000), 5).close()"


@pytest.fixture
def three(open_etcd: Etcd) -> Iterator[list[FabricHost]]:
    """Two hosts on one network and one behind a router, without BGP; each has a workload, a, b or c."""
    with fabric(open_etcd, 0, 0, 1) as hosts:
        for host in hosts:
            host.start_agent("--bgp=off")
        hosts[0].ctl("pool", "add", POOL, POOL6, "--vxlan=always", "--nat-outgoing")
        hosts[0].ctl("profile", "add", "web")
        for host, name in zip(hosts, "abc"):
            host.add(name, *addresses(host))
            host.set_profiles(name, "web")
        yield hosts


def addresses(host: FabricHost) -> tuple[str, str]:
    """Return the addresses of a host's workload: each host has blocks of its own."""
    return f"10.65.{host.number}.1", f"fd65::{host.number}:1"


def all_reach_each_other(hosts: list[FabricHost]) -> bool:
    """Return whether the workloads of all pairs of hosts reach each other, both ways and in both IP versions."""
    names = dict(zip((host.name for host in hosts), "abc"))
    return all(
        one.reaches(names[one.name], address)
        for one, other in itertools.permutations(hosts, 2)
        for address in addresses(other)
    )


def hop(host: FabricHost, cidr: str) -> str | None:
    """Return where the overlay's route to a CIDR leads, as `gateway interface`; "blackhole", or None for no route."""
    version = 6 if ":" in cidr else 4
    for route in host.routes("proto", OVERLAY, version=version):
        if route["dst"] == cidr:
            if route.get("type") == "blackhole":
                return "blackhole"
            return f"{route.get('gateway') or route['via']['host']} {route['dev']}"
    return None


def device(host: FabricHost, name: str = "vxlan.calico") -> dict | None:
    """Return a device of a host as `ip -json` has it; None if there is none."""
    found = host.run("ip", "-json", "-details", "link", "show", name, check=False)
    text = found.out.replace("fan-map ", "")  # Ubuntu's `ip` has this among the JSON
    return json.loads(text)[0] if found.status == 0 else None


def mtu(host: FabricHost, workload: str) -> int:
    return json.loads(host.of(workload, "ip", "-json", "link", "show", "eth1").out)[0]["mtu"]


def passes(host: FabricHost, workload: str, address: str, size: int) -> bool:
    """Return whether an unfragmented packet of this size, in bytes, gets an answer."""
    payload = size - (48 if ":" in address else 28)
    words = ("ping", "-n", "-c1", "-W2", "-Mdo", f"-s{payload}", address)
    return host.of(workload, *words, check=False).status == 0


def sender(client: FabricHost, workload: str, server: list[str], address: str) -> str:
    """Return the address that a connection comes from, for a server that runs by the prefix `server`."""
    process = subprocess.Popen([*server, sys.executable, "-c", _TELL_PEER, address], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        client.of(workload, sys.executable, "-c", _CONNECT, address)
        return process.stdout.readline().strip()


def test_workloads_reach_each_other_over_a_router_that_knows_no_pools(three: list[FabricHost]) -> None:
    one, two, other = three
    wait_for(lambda: all_reach_each_other(three), "the overlay")
    assert hop(one, "10.65.11.0/26") == hop(one, "fd65::11:0/122") == "blackhole"
    for cidr in ("10.65.12.0/26", "10.65.13.0/26", "fd65::12:0/122", "fd65::13:0/122"):
        assert re.fullmatch("fe80::.* vxlan.calico", str(hop(one, cidr))), cidr

    # borrowed: from a block of another host, which reaches the address, too
    other.add("d", "10.65.11.9", "fd65::11:9")
    other.set_profiles("d", "web")
    for host, name, address in itertools.product((one, two), "ab", ("10.65.11.9", "fd65::11:9")):
        if (host, name) in ((one, "a"), (two, "b")):
            wait_for(lambda h=host, n=name, a=address: h.reaches(n, a), f"{address} from {host.name}")

    # of the MTU, 50 bytes are the overlay's, also if the interface is made again
    assert [mtu(host, name) for host, name in zip(three, "abc")] == [1450] * 3
    for address in addresses(other):
        assert passes(one, "a", address, 1450) and not passes(one, "a", address, 1451)
    interface = one.of("a", "ip", "-o", "link", "show", "eth1").out
    one.of("a", "ip", "link", "delete", "eth1")
    wait_for(lambda: one.reaches("a", addresses(two)[0]), f"another interface than {interface}")
    assert mtu(one, "a") == 1450
    assert "MTU:        1500; in pools with an overlay 1450" in one.ctl("status").out
    # packets have the host's address only if they leave the pools
    assert sender(one, "a", other.inside("ip", "netns", "exec", "c"), addresses(other)[0]) == addresses(one)[0]
    assert sender(one, "a", other.inside("ip", "netns", "exec", "c"), addresses(other)[1]) == addresses(one)[1]
    one.ctl("pool", "add", "10.66.0.0/16", "--vxlan=cross-subnet")
    other.add("e", "10.66.13.1")
    other.set_profiles("e", "web")
    wait_for(lambda: one.reaches("a", "10.66.13.1"), "another pool")
    assert sender(one, "a", other.inside("ip", "netns", "exec", "e"), "10.66.13.1") == addresses(one)[0]
    for own, outside in ((one.ip, f"{NETWORKS[0][0]}{ROUTER}"), (one.ip6, f"{NETWORKS[0][1]}{ROUTER:x}")):
        assert sender(one, "a", ["ip", "netns", "exec", "router"], outside) == own

    # in the same network, packets need no tunnel
    one.ctl("pool", "add", POOL, POOL6, "--vxlan=cross-subnet", "--nat-outgoing")
    wait_for(lambda: hop(one, "10.65.12.0/26") == f"{two.ip} eth0", "a route without a tunnel")
    wait_for(lambda: hop(two, "fd65::11:0/122") == f"{one.ip6} eth0", "a route without a tunnel")
    assert "vxlan.calico" in str(hop(one, "10.65.13.0/26")) and "vxlan.calico" in str(hop(other, "fd65::11:0/122"))
    wait_for(lambda: all_reach_each_other(three), "cross-subnet", 10)


def test_what_others_change_is_restored_and_node_remove_removes_it(three: list[FabricHost]) -> None:
    one, two, other = three
    wait_for(lambda: all_reach_each_other(three), "the overlay")
    for damage in (
        "link delete vxlan.calico",
        "link set vxlan.calico down",
        "link set vxlan.calico mtu 1300 address 02:00:00:00:00:01",
        "route delete 10.65.13.0/26 proto 81",
        "-6 route delete fd65::13:0/122 proto 81",
        "route replace 10.65.13.0/26 via 172.18.0.254",
        "link set eth0 down",
        "address delete 172.18.0.11/24 dev eth0",
    ):
        one.run("ip", *damage.split())
        if "eth0" in damage:  # what the host's administrator does then
            one.run("ip", "link", "set", "eth0", "up")
            one.run("ip", "address", "replace", f"{one.ip}/24", "dev", "eth0")
            one.run("ip", "-6", "address", "replace", f"{one.ip6}/64", "dev", "eth0", "nodad")
            one.run("ip", "route", "replace", "default", "via", f"{NETWORKS[0][0]}{ROUTER}")
            one.run("ip", "-6", "route", "replace", "default", "via", f"{NETWORKS[0][1]}{ROUTER:x}")
        assert all(wait_for(lambda a=a: one.reaches("a", a), f"{a} after {damage}", 10) for a in addresses(other))
    found = device(one)
    assert found is not None and found["mtu"] == 1450

    # the next agent finds everything as it should be
    assert all(wait_for(lambda v=v: sources_set(one, v), "the sources of the routes", 10) for v in (4, 6))
    with route_events(one) as events:
        os.kill(one.pid, signal.SIGKILL)
        one.start_agent("--bgp=off")
    assert not [event for event in events if f"proto {OVERLAY}" in event], "".join(events)

    # another address: the device stays
    two.run("ip", "address", "add", "172.18.0.99/24", "dev", "eth0")
    before = device(two)
    two.ctl("node", "--ip=172.18.0.99", f"--ip6={two.ip6}", "--bgp=off")
    wait_for(lambda: local(two) == "172.18.0.99", "the new address", 10)
    after = device(two)
    assert before is not None and after is not None and after["ifindex"] == before["ifindex"]
    wait_for(lambda: all_reach_each_other(three), "the new address", 10)

    other.ctl("node", "stop", "--force")
    assert all_reach_each_other(three), "without the agent, everything stays"
    other.ctl("node", "remove", "--remove-endpoints")
    assert device(other) is None
    assert not [route for version in (4, 6) for route in other.routes("proto", OVERLAY, version=version)]
    wait_for(lambda: not one.run("bridge", "fdb", "show", "dev", "vxlan.calico").out.count(other.ip), "its entry")


@contextlib.contextmanager
def route_events(host: FabricHost) -> Iterator[list[str]]:
    """At the end, the list has a line for each change of a host's routes."""
    events: list[str] = []
    marker = ("198.51.100.0/24", "dev", "lo")
    with subprocess.Popen(host.inside("ip", "monitor", "route"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            # it listens when it reports a change
            wait_for(
                lambda: (
                    host.run("ip", "route", "replace", *marker)
                    and host.run("ip", "route", "delete", *marker)
                    and select.select([process.stdout], [], [], 0.1)[0]
                ),
                "the monitor",
            )
            yield events
            host.run("ip", "route", "replace", *marker, "metric", "7")
            for line in process.stdout:
                events.append(line)
                if "metric 7" in line:
                    break
        finally:
            process.kill()
    host.run("ip", "route", "delete", *marker, "metric", "7")


def sources_set(host: FabricHost, version: int) -> bool:
    """Return whether the host's own packets through the overlay leave with its address."""
    routes = host.routes("proto", OVERLAY, version=version)
    return [route.get("prefsrc") for route in routes if "type" not in route] == [
        host.ip if version == 4 else host.ip6
    ] * 2


def local(host: FabricHost) -> str | None:
    found = device(host)
    return None if found is None else found["linkinfo"]["info_data"]["local"]


def test_a_host_without_ipv4_is_reached_over_ipv6(open_etcd: Etcd) -> None:
    with fabric(open_etcd, 0, 1) as hosts:
        one, other = hosts
        other.run("ip", "link", "add", "vxlan-v6.calico", "type", "bridge")
        for host in hosts:
            host.start_agent("--bgp=off")
        open_etcd.put(f"/calico/bgp/v1/host/{other.name}/ip_addr_v4", "")
        open_etcd.put(f"/calico/v1/host/{other.name}/bird_ip", "")
        one.ctl("pool", "add", POOL6, "--vxlan=always")
        one.ctl("pool", "add", POOL)
        one.ctl("profile", "add", "web")
        (plain, address), (_, address6) = addresses(one), addresses(other)
        one.add("a", plain)
        assert mtu(one, "a") == 1500
        one.ctl("container", "/var/run/netns/a", "ip", "add", address)
        assert mtu(one, "a") == 1450, "the smaller one of its two pools"
        other.add("b", address6)
        assert mtu(other, "b") == 1430
        one.set_profiles("a", "web")
        other.set_profiles("b", "web")

        # somebody else's interface is left alone
        wait_for(lambda: "vxlan-v6.calico is not the agent's" in other.ctl("status").out, "the report", 15)
        assert not one.reaches("a", address6)
        found = device(other, "vxlan-v6.calico")
        assert found is not None and found["linkinfo"]["info_kind"] == "bridge"
        other.run("ip", "link", "delete", "vxlan-v6.calico")

        wait_for(lambda: one.reaches("a", address6), "the tunnel over IPv6", 10)
        assert str(hop(one, "fd65::12:0/122")).endswith(" vxlan-v6.calico")
        assert passes(other, "b", address, 1430) and not passes(other, "b", address, 1431)
        assert device(one) is not None, "for other hosts with IPv4"
        assert device(other) is None

        one.ctl("config", "felix", "MTU", "1400")
        one.add("c", "10.65.11.5")
        assert mtu(one, "c") == 1400
        wait_for(lambda: "MTU:        1400, as configured; underlay 1500" in one.ctl("status").out, "the report", 15)


def bird_routes(host: FabricHost) -> list[dict]:
    return [route for version in (4, 6) for route in host.routes("proto", "bird", version=version)]


def bird(host: FabricHost) -> int:
    return int((host.home / "run" / host.name / "bird.pid").read_text().split()[0])


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def pings(host: FabricHost, workload: str, address: str) -> Iterator[list[int]]:
    """Ping every 20 ms; at the end, the list has the number of pings that were lost one after the other."""
    lost: list[int] = []
    command = host.inside("ip", "netns", "exec", workload, "ping", "-n", "-i0.02", address)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield lost
        finally:
            process.send_signal(signal.SIGINT)
            out = process.communicate()[0]
    answered = sorted({int(number) for number in re.findall(r"icmp_seq=(\d+) ttl", out)})
    sent = int(re.findall(r"(\d+) packets transmitted", out)[0])
    lost += [after - before - 1 for before, after in zip((0, *answered), (*answered, sent + 1))]


def test_a_pool_goes_over_to_the_overlay_and_back(open_etcd: Etcd) -> None:
    with fabric(open_etcd, 0, 0) as hosts:
        one, other = hosts
        for host in hosts:
            host.run("sysctl", "-qw", "net.ipv4.conf.eth0.rp_filter=1")
            host.start_agent()
        one.ctl("pool", "add", POOL, POOL6)
        one.ctl("profile", "add", "web")
        for host, name in zip(hosts, "ab"):
            host.add(name, *addresses(host))
            host.set_profiles(name, "web")
        wait_for(lambda: all_reach_each_other(hosts), "the mesh")
        with contextlib.ExitStack() as stack:
            lists = [stack.enter_context(pings(one, "a", address)) for address in addresses(other)]
            one.ctl("pool", "add", POOL, POOL6, "--vxlan=always")
            for host, number in ((one, 12), (other, 11)):
                wait_for(lambda h=host, n=number: hop(h, f"10.65.{n}.0/26"), "the overlay", 10)
                assert wait_for(lambda h=host: holds(lambda: not bird_routes(h), 0.3), "the end of BIRD's", 10)
            one.run("sysctl", "-qw", "net.ipv4.conf.eth0.rp_filter=2")
            for value in "12":  # what a host itself sends arrives by another way than its route
                other.run("sysctl", "-qw", f"net.ipv4.conf.all.rp_filter={value}")
                assert all(one.run("ping", "-n", "-c1", "-W1", address).status == 0 for address in addresses(other))
            one.run("sysctl", "-qw", "net.ipv4.conf.eth0.rp_filter=1")
            with stopped(bird(other)):  # its routes are not there before it goes on
                one.ctl("pool", "add", POOL, POOL6)
                assert holds(lambda: hop(one, "10.65.12.0/26") and hop(one, "fd65::12:0/122"), 1.5)
            for host, version in itertools.product(hosts, (4, 6)):
                wait_for(lambda h=host, v=version: not h.routes("proto", OVERLAY, version=v), "the end", 10)
                assert device(host) is not None, "the other host may still use it"
        for lost in lists:
            assert max(lost) * 0.02 < 1, lost
        assert all_reach_each_other(hosts)


_HOLD = """
import socket
held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
held.bind(("0.0.0.0", 4789))
print("held", flush=True)
while True:
    print(held.recvfrom(2000)[0], flush=True)
"""

_SEND = """
import socket
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for vni in (4095, 77):
    sender.sendto(b"\\x08\\0\\0\\0" + vni.to_bytes(3, "big") + b"\\0for VNI %d" % vni, ("HOST", 4789))
"""


def test_a_user_who_holds_the_port_reads_nothing_of_the_overlay(open_etcd: Etcd) -> None:
    with fabric(open_etcd, 0, 1) as hosts:
        one, other = hosts
        holding = one.inside(*AS_NOBODY, sys.executable, "-c", _HOLD)
        with subprocess.Popen(holding, stdout=subprocess.PIPE, text=True) as user, contextlib.ExitStack() as cleanup:
            cleanup.callback(user.kill)
            assert user.stdout is not None and user.stdout.readline() == "held\n"
            for host in hosts:
                host.start_agent("--bgp=off")
            one.ctl("pool", "add", POOL, "--vxlan=always")
            why = "needs UDP port 4789, which process [0-9]+ \\('.*'\\) of user 65534 holds: end that one"
            wait_for(lambda: re.search(why, one.ctl("status").out), "the report", 15)
            other.run(sys.executable, "-c", _SEND.replace("HOST", one.ip))
            assert "for VNI 77" in user.stdout.readline(), "that is another program's"
        wait_for(lambda: "UP" in (device(one) or {})["flags"], "the device", 15)
        one.add("a", addresses(one)[0])
        other.add("b", addresses(other)[0])
        one.ctl("profile", "add", "web")
        one.set_profiles("a", "web")
        other.set_profiles("b", "web")
        wait_for(lambda: one.reaches("a", addresses(other)[0]), "the overlay", 10)
