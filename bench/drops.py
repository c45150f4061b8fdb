"""Prints what counters cost, and what a flood of packets costs that policy denies: 10,000 a second from one workload.

`make bench` runs this; its argument is how many pairs of streams are compared for each figure (default: 40).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from agent import cpu_seconds, throughput
from measuring import Measure, report, running_etcd

from tests.system.agent import A4, ALLOW, B4, C4, AgentHost
from tests.system.conftest import clear_host
from tests.system.support import CALICOCTL, run, wait_for
from tests.system.traffic import inside, ping

RATE = 10_000
"""Packets a second."""

MEASURED = 10.0
"""Seconds for which the agent's CPU time is measured."""

STREAM = 0.5
"""Seconds for which a stream is measured. What else the machine does changes less between two short ones."""


@contextmanager
def flood(namespace: str, address: str) -> Iterator[None]:
    """Send RATE packets a second by UDP from a namespace, inside `with`."""
    with inside(namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as client:
        client.connect((address, 9))
        pid = os.fork()
        if pid == 0:
            try:
                sent, start = 0, time.perf_counter()
                while True:
                    due = int((time.perf_counter() - start) * RATE) - sent
                    for _ in range(due):
                        client.send(b"x")
                    sent += due
                    time.sleep(0.002)  # then some 20 packets are due
            finally:
                os._exit(1)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def dropped() -> int:
    """Return how many packets the tables have dropped."""
    listed = json.loads(run("nft", "-j", "list", "counter", "inet", "calico", "dropped").out)
    return int(listed["nftables"][1]["counter"]["packets"])


def send(address: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"x", (address, port))


def latency(host: AgentHost, number: int) -> float:
    """Send a packet that policy denies; return the seconds until `drops --follow` shows it."""
    command = [CALICOCTL, "drops", "--follow", "--output=json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=host.environment()) as follower:
        assert follower.stdout is not None
        follower.stdout.readline()  # the flood
        start = time.perf_counter()
        inside("a", lambda: send(C4, 20000 + number))
        while json.loads(follower.stdout.readline())["port"] != 20000 + number:
            pass
        taken = time.perf_counter() - start
        follower.kill()
    return taken


def without_counters() -> None:
    """Replace the rules of the profile by one that counts nothing. (No agent runs that would replace it.)"""
    run("nft", "flush chain inet calico inbound/web; add rule inet calico inbound/web accept")


def main(pairs: int) -> None:
    with running_etcd() as etcd:
        host = AgentHost(etcd)
        try:
            host.start_agent()
            for name, address in (("a", A4), ("b", B4), ("c", C4)):
                host.add(name, address)
            host.profile("web", inbound=[{"action": "allow", "src_tag": "web"}])
            host.profile("closed", outbound=[ALLOW])
            host.set_profiles("a", "web")
            host.set_profiles("b", "web")
            host.set_profiles("c", "closed")
            wait_for(lambda: ping("a", B4), "the network")
            run_all(host, pairs)
        finally:
            clear_host()


def run_all(host: AgentHost, pairs: int) -> None:
    print(f"{RATE:,} packets a second that policy denies\n")

    def flooded() -> float:
        with flood("c", B4):
            return throughput(STREAM)

    def alone() -> float:
        return throughput(STREAM)

    report_ratio("TCP between two workloads while a third one floods", "at least 0.95", flooded, alone, pairs)
    with flood("c", B4):
        time.sleep(1)  # then the burst of the sample is over, which no event tells
        before, count, start = cpu_seconds(host.pid), dropped(), time.perf_counter()
        time.sleep(MEASURED)  # what the agent takes in this time is measured
        seconds = time.perf_counter() - start
        report("... packets that are dropped a second", "", (dropped() - count) / seconds)
        report("... CPU of the agent, % of a core", "under 10", 100 * (cpu_seconds(host.pid) - before) / seconds)
        report("... until another packet is shown, s: worst", "under 0.5", max(latency(host, n) for n in range(10)))
    host.kill_agent()
    listed = run("nft", "list", "chain", "inet", "calico", "inbound/web").out.splitlines()
    rules = [f"add rule inet calico inbound/web {line.strip()}\n" for line in listed[2:-2]]

    def counted() -> float:
        run("nft", "-f", "-", input="".join(["flush chain inet calico inbound/web\n", *rules]))
        return throughput(STREAM)

    def uncounted() -> float:
        without_counters()
        return throughput(STREAM)

    report_ratio("TCP with counters, compared to without", "at least 0.98", counted, uncounted, pairs)


def report_ratio(title: str, bound: str, one: Measure, other: Measure, pairs: int) -> None:
    """Print the median of the ratios of pairs, in which `one` and `other` come first in turn."""
    ratios = []
    for number in range(pairs):
        if number % 2:
            first = one()
            ratios.append(first / other())
        else:
            second = other()
            ratios.append(one() / second)
    report(f"{title}: ratio", bound, statistics.median(ratios), f"({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
