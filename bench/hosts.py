"""Prints how several hosts perform together, as ratios or in seconds, measured in one run.

The hosts are network namespaces on one bridge. `make bench` runs this; its argument is the number of repetitions
(default: 10).
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from agent import throughput
from measuring import HOME, percentile, report

from tests.system.fabric import FabricHost, fabric
from tests.system.support import run, wait_for
from tests.system.test_hosts import (
    FRIENDS,
    Net,
    burst,
    losses_by_random_kills,
    open_etcds,
    routes_into,
    seconds_until,
)

VXLAN_POOL = "10.65.0.0/16"
PEERS = 50


@contextmanager
def hosts_of(count: int) -> Iterator[Net]:
    """Yield `count` hosts on one bridge, with an etcd, but without agents."""
    with open_etcds(HOME / "etcds") as members, fabric(members[0], *[0] * count) as hosts:
        net = Net(members, hosts)
        try:
            yield net
        finally:
            net.crowd.close()
    shutil.rmtree(HOME / "etcds")


def twenty_hosts() -> None:
    with hosts_of(20) as net:
        hosts = net.hosts.values()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(FabricHost.start_agent, hosts))
        took = seconds_until(lambda: all(host.sessions == 2 * 19 for host in hosts), "the mesh")
        report("full mesh of 20 hosts after the last start, seconds", "at most 5", took)
        net.one.ctl("profile", "add", "web")
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda host: net.connect(host, f"w{host.number}", f"192.168.{host.number}.1"), hosts))
        with burst(net) as seconds:
            report("20 hosts after a burst of 1,500 endpoints, until all are right, seconds", "at most 10", seconds)


def first_answer(net: Net, host: FabricHost, address: str) -> float:
    """Return the seconds from the start of `container add` on `host` until a workload of host 11 receives an answer."""
    host.run("ip", "netns", "add", "new")
    host.run("ip", "-n", "new", "link", "set", "lo", "up")
    start = time.perf_counter()
    host.ctl("container", "add", "/var/run/netns/new", address)
    host.ctl("container", "/var/run/netns/new", "profile", "set", "web")
    net.crowd.probers["a"].await_answer(address, 10)
    taken = time.perf_counter() - start
    host.ctl("container", "remove", "/var/run/netns/new")
    host.run("ip", "netns", "delete", "new")
    return taken


def first_answers(net: Net, repetitions: int) -> None:
    numbers = range(20, 20 + repetitions)
    local, remote, borrowed = [], [], []
    for number in numbers:
        local.append(first_answer(net, net.hosts[11], f"192.168.11.{number}"))
        remote.append(first_answer(net, net.hosts[12], f"192.168.12.{number}"))
        borrowed.append(first_answer(net, net.hosts[12], f"192.168.13.{number}"))
    one, other = percentile(remote, 0.95), percentile(local, 0.95)
    title = "container add and profile set to first answer, p95: from another host / the same"
    report(title, "at most 1.5", one / other, f"{one * 1000:.0f} ms / {other * 1000:.0f} ms")
    one = percentile(borrowed, 0.95)
    report("the same with a borrowed address", "", one / other, f"{one * 1000:.0f} ms / {other * 1000:.0f} ms")


def vxlan(net: Net, repetitions: int) -> None:
    net.one.ctl("pool", "add", VXLAN_POOL, "--vxlan=always")
    addresses = {"plain": "192.168.12.9", "vxlan": "10.65.1.9"}
    spaces = []
    for kind, sender, receiver in (
        ("plain", "192.168.11.9", addresses["plain"]),
        ("vxlan", "10.65.0.9", addresses["vxlan"]),
    ):
        for host, end, address in ((net.hosts[11], "from", sender), (net.hosts[12], "to", receiver)):
            name = f"{kind}-{end}"
            net.connect(host, name, address)
            # traffic.py finds it there
            run("ip", "netns", "attach", name, str(net.crowd.probers[name].pid))
            spaces.append(name)
    try:
        wait_for(
            lambda: {("plain-from", "plain-to", "ping4"), ("vxlan-from", "vxlan-to", "ping4")} <= net.crowd.reached(),
            "both",
        )
        title = "TCP throughput between hosts: through VXLAN / plain"
        _report_throughput(title, "at least 0.8", addresses, repetitions)
        # what the kernel's VXLAN itself costs
        ends = (net.hosts[11], net.hosts[12])
        for host in ends:
            host.ctl("node", "stop", "--force")
            host.run("nft", "flush", "ruleset")
        _report_throughput("the same without any rules of nftables", "", addresses, repetitions)
        for host in ends:
            host.start_agent()
    finally:
        for name in spaces:
            run("ip", "netns", "delete", name)
            net.disconnect(net.hosts[11 if name.endswith("from") else 12], name)


def _report_throughput(title: str, bound: str, addresses: dict[str, str], repetitions: int) -> None:
    pairs = [
        [throughput(1, f"{kind}-from", f"{kind}-to", addresses[kind]) for kind in ("vxlan", "plain")]
        for _ in range(repetitions)
    ]
    one, other = (statistics.median(values) for values in zip(*pairs))
    report(title, bound, one / other, f"{one / 2**30:.2f} GiB/s / {other / 2**30:.2f} GiB/s")


def dead_host(net: Net) -> None:
    living, dead = net.hosts[11], net.hosts[12]
    dead.unplug()
    gone = seconds_until(lambda: not routes_into("192.168.12.", living), "the end of its routes")
    dead.replug()
    start = time.monotonic()
    net.crowd.probers["a"].await_answer("192.168.12.2", 60)
    back = time.monotonic() - start
    report("a dead host's routes are gone, at the default hold time, seconds", "at most 35", gone)
    report("and back after the cable, seconds", "at most 5", back)


def three_hosts(repetitions: int) -> None:
    with hosts_of(3) as net:
        net.start()
        net.await_matrix()
        first_answers(net, repetitions)
        vxlan(net, repetitions)
        losses = losses_by_random_kills(net, 5 * repetitions, FRIENDS)
        title = f"{5 * repetitions} random kills of BIRD and agents: the longest loss of pings, seconds"
        report(title, "at most 0.5", max(losses.values()))
        dead_host(net)


def memory_with_peers() -> None:
    """Report the memory of BIRD. Its peers are BIRDs on one other host, which has two addresses for each of them."""
    with hosts_of(2) as net, ExitStack() as undo:
        host, others = net.hosts.values()
        for number in range(100, 100 + PEERS):
            _start_peer(net, host, others, number, undo)
        host.start_agent()
        wait_for(lambda: host.sessions == 2 * PEERS, "the sessions", 60)
        wait_for(lambda: len(host.routes("proto", "bird")) == PEERS, "the routes", 60)
        status = Path(f"/proc/{host.bird}/status").read_text()
        memory = int(re.findall(r"VmRSS:\s+(\d+)", status)[0])
        report(f"memory of BIRD with {PEERS} peers, IPv4 and IPv6, MiB", "under 10", memory / 1024)


def _start_peer(net: Net, host: FabricHost, others: FabricHost, number: int, undo: ExitStack) -> None:
    """Register a host, and start a BIRD in its place that announces a block of each IP version."""
    lines = [f"router id 172.18.0.{number};", "protocol device { }"]
    for version, own, address, block in (
        (4, host.ip, f"172.18.0.{number}", f"192.168.{number}.0/26"),
        (6, host.ip6, f"fd00:18::{number:x}", f"fd80:24e2:f998:72d6::{number}:0/122"),
    ):
        length = "24" if version == 4 else "64 nodad"
        run("ip", "-n", others.namespace, "address", "add", *f"{address}/{length} dev eth0".split())
        entry = f"{address} lladdr {others.mac} dev eth0 nud permanent"
        run("ip", "-n", host.namespace, "neigh", "replace", *entry.split())
        net.etcd.put(f"/calico/bgp/v1/host/peer{number}/ip_addr_v{version}", address)
        lines += [
            f"protocol static s{version} {{ ipv{version}; route {block} blackhole; }}",
            f"protocol bgp b{version} {{ local {address} as 64511; neighbor {own} as 64511; multihop; strict bind on;",
            f"  ipv{version} {{ import all; export where source = RTS_STATIC; next hop self; }}; }}",
        ]
    configuration = HOME / f"peer{number}.conf"
    configuration.write_text("\n".join(lines))
    command = ("bird", "-f", "-c", str(configuration), "-s", str(HOME / f"peer{number}.ctl"))
    peer = subprocess.Popen(others.inside(*command))
    undo.callback(peer.wait)
    undo.callback(peer.kill)


def main(repetitions: int) -> None:
    HOME.mkdir(parents=True, exist_ok=True)
    twenty_hosts()
    three_hosts(repetitions)
    memory_with_peers()


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
