"""Prints how the agent performs with many endpoints, as ratios of measurements of the same run.

The endpoints are veth pairs whose other ends are in one namespace, and two real workloads in namespaces of their own.
`make bench` runs this; its argument is the number of repetitions (default: 10).
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from measuring import HOME, endpoint_record, fill, percentile, report

from tests.system.agent import AgentHost
from tests.system.conftest import clear_host
from tests.system.support import Etcd, calico_links, run, wait_for
from tests.system.traffic import connect, inside, listener, ping

MANY = 1000
ALLOW = {"action": "allow"}


def crowd(host: AgentHost, count: int, profiles: int, namespace: str | None = None) -> None:
    """Create the interfaces and the endpoint keys of `count` endpoints, spread over `profiles` profiles.

    `namespace` is the host's network namespace, if it has one of its own.
    """
    others = f"crowd-{namespace}" if namespace else "crowd"
    run("ip", "netns", "add", others)
    lines = []
    for number in range(count):
        name = endpoint_record(host.name, number, "")[1]["name"]
        lines.append(f"link add {name} type veth peer name c{number} netns {others}")
        lines.append(f"link set {name} up")
    run("ip", *(["-n", namespace] if namespace else []), "-batch", "-", input="\n".join(lines))
    for number in range(profiles):
        host.profile(f"crowd{number}", inbound=[{"action": "allow", "src_tag": f"crowd{number}"}])
    fill(host.etcd, host.name, count, profiles)


def clear_crowd(host: AgentHost, count: int) -> None:
    host.etcd.delete("/calico/v1/host/host1/workload/docker")
    run("ip", "netns", "delete", "crowd")
    wait_for(lambda: len(run("ip", "-br", "link").out.splitlines()) < 20, "the crowd's end", 120)
    host.sync()


def first_ping(host: AgentHost, repetitions: int) -> list[float]:
    """Return the seconds from the write of an endpoint to the first answer to a packet from another namespace."""
    key = host.key("b")
    record = host.etcd.get(key)
    run("conntrack", "-F")  # writing all the records has left thousands of entries, which are no endpoints'
    taken = []
    for _ in range(repetitions):
        host.etcd.delete(key)
        host.sync()
        start = time.perf_counter()
        host.etcd.put(key, record)
        inside("a", lambda: _until_answered("192.168.0.2"))
        taken.append(time.perf_counter() - start)
    return taken


def _until_answered(address: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((address, 7))
        client.settimeout(0.001)
        while True:
            try:
                client.send(b"x")
                client.recv(10)
                return
            except OSError:
                continue


def echo(namespace: str, address: str) -> None:
    """Start a thread that answers UDP packets in a namespace."""

    def make() -> socket.socket:
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind((address, 7))
        return server

    def serve(server: socket.socket) -> None:
        while True:
            data, sender = server.recvfrom(100)
            with contextlib.suppress(OSError):
                server.sendto(data, sender)

    threading.Thread(target=serve, args=(inside(namespace, make),), daemon=True).start()


def agent_start(host: AgentHost) -> float:
    """Return the seconds that a start of the agent takes."""
    host.ctl("node", "stop", "--force")
    start = time.perf_counter()
    host.start_agent()
    return time.perf_counter() - start


def profile_change(host: AgentHost, name: str, repetitions: int) -> list[float]:
    """Return the seconds from the write of a profile's rules until the agent has applied it, for each repetition."""
    taken = []
    for number in range(repetitions):
        rule = {"action": "allow", "protocol": "tcp", "dst_ports": [1000 + number]}
        start = time.perf_counter()
        host.etcd.put(f"/calico/v1/policy/profile/{name}/rules", {"inbound_rules": [rule], "outbound_rules": [ALLOW]})
        host.sync()
        taken.append(time.perf_counter() - start)
    return taken


def throughput(seconds: float = 2.0, source: str = "a", target: str = "b", address: str = "192.168.0.2") -> float:
    """Return the bytes per second of one TCP stream from the namespace `source` to `address` in the namespace `target`.

    The sender is a process of its own, on another core.
    """
    total = 0
    cores = os.sched_getaffinity(0)
    with listener(target, address, 5001) as server:
        client = connect(source, address, 5001)
        assert client is not None
        # it does not pace: else the grain of the timers would be measured, not the cost of a packet
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        accepted, _ = server.accept()
        sender = os.fork()
        if sender == 0:
            _send(client, seconds, max(cores))
        client.close()
        os.sched_setaffinity(0, {min(cores)})
        buffer = bytearray(2**18)
        start = time.perf_counter()
        with accepted:
            while received := accepted.recv_into(buffer):
                total += received
        taken = time.perf_counter() - start
        os.sched_setaffinity(0, cores)
        os.waitpid(sender, 0)
        return total / taken


def _send(client: socket.socket, seconds: float, core: int) -> NoReturn:
    try:
        os.sched_setaffinity(0, {core})
        client.settimeout(5)
        chunk = b"x" * 2**18
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop:
            client.send(chunk)
    finally:
        os._exit(0)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(repetitions: int) -> None:
    etcd = Etcd(HOME / "etcd", port=2379)
    etcd.start()
    etcd.await_ready()
    host = AgentHost(etcd)
    try:
        host.start_agent()
        host.add("a", "192.168.0.1")
        host.add("b", "192.168.0.2")
        host.profile("web", inbound=[ALLOW])
        for name in "ab":
            host.set_profiles(name, "web")
        host.sync()
        assert ping("a", "192.168.0.2")
        echo("b", "192.168.0.2")
        run_all(host, repetitions)
    finally:
        for name in calico_links():  # the echo server keeps its namespace alive
            run("ip", "link", "delete", name)
        clear_host()
        etcd.stop()


def run_all(host: AgentHost, repetitions: int) -> None:
    print(f"Medians of {repetitions}; times are shown as what they are ratios of\n")
    alone = first_ping(host, repetitions)
    crowd(host, 10, 10)
    host.sync()
    small_start = statistics.median(agent_start(host) for _ in range(3))
    clear_crowd(host, 10)

    crowd(host, MANY, 100)
    host.sync()
    among = first_ping(host, repetitions)
    for share, name in ((0.5, "p50"), (0.95, "p95")):
        one, other = percentile(among, share), percentile(alone, share)
        title = f"record to first answer, {name}: {MANY} other endpoints / none"
        report(title, "at most 1.5", one / other, f"{one * 1000:.1f} ms / {other * 1000:.1f} ms")
    big_start = statistics.median(agent_start(host) for _ in range(3))
    report(
        "start of the agent: 1,000 endpoints, 100 profiles / 10, 10",
        "at most 100",
        big_start / small_start,
        f"{big_start:.2f} s / {small_start:.2f} s",
    )

    # what touches all endpoints, against what touches one
    host.profile("all", inbound=[ALLOW])
    host.profile("one", inbound=[ALLOW])
    for number in range(MANY):
        key, record = endpoint_record(host.name, number, "all")
        host.etcd.put(key, {**record, "profile_ids": ["all"] if number else ["all", "one"]})
    host.sync()
    of_one, of_all = profile_change(host, "one", repetitions), profile_change(host, "all", repetitions)
    one, other = statistics.median(of_all), statistics.median(of_one)
    report(
        "change of a profile: of 1,000 endpoints / of one",
        "at most 2",
        one / other,
        f"{one * 1000:.1f} ms / {other * 1000:.1f} ms",
    )

    crowded = [throughput() for _ in range(3)]
    pid = host.pid
    rss = int(next(line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in line))
    report("memory of the agent with 1,000 endpoints, MiB", "under 128", rss / 1024)
    before = cpu_seconds(pid)
    time.sleep(60)
    report(
        "CPU of the idle agent with 1,000 endpoints, % of a core", "under 0.5", (cpu_seconds(pid) - before) / 60 * 100
    )
    clear_crowd(host, MANY)
    few = [throughput() for _ in range(3)]
    host.ctl("node", "stop", "--force")
    tables = "".join(run("nft", "list", "table", family, "calico").out for family in ("inet", "arp"))
    pairs = []
    for _ in range(2 * repetitions):
        with_tables = throughput(1)
        run("nft", "delete table inet calico; delete table arp calico")
        pairs.append((with_tables, throughput(1)))
        run("nft", "-f", "-", input=tables)
    report("TCP throughput: 1,000 endpoints / 1", "at least 0.95", statistics.median(crowded) / statistics.median(few))
    with_tables, bare = (statistics.median(values) for values in zip(*pairs))
    report(
        "TCP throughput: with our tables / with none",
        "at least 0.9",
        with_tables / bare,
        f"{with_tables / 2**30:.2f} GiB/s / {bare / 2**30:.2f} GiB/s",
    )


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
