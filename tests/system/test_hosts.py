"""Several hosts: who reaches whom, and what happens when hosts come, die and return, and when BIRD or etcd fails.

Three hosts serve all tests: 11 and 12 on one network, 13 behind a router that knows no pools. On them are
the workloads of the classic matrix: a, b, c on host 11, d and e on 12, f and g on 13. a, c, e and g share a profile,
the others have one each. Each test leaves the hosts as it found them, but for the overlay, which each sets itself.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import permutations
from pathlib import Path

import pytest

from tests.system.fabric import FabricHost, await_recovery, fabric, introduce
from tests.system.reach import Crowd
from tests.system.support import Etcd, wait_for, without_what_packets_change
from tests.system.test_cluster import cluster_of

POOLS = ("192.168.0.0/16", "fd80:24e2:f998:72d6::/64")
WORKLOADS = {11: "abc", 12: "de", 13: "fg"}
FRIENDS = set("aceg")
HOLD_TIME = 9
WAYS = ("ping4", "ping6", "tcp4", "tcp6")


class Net:
    """The hosts by number, and the workloads on them."""

    def __init__(self, members: list[Etcd], hosts: list[FabricHost]) -> None:
        """`members` are those of the etcd cluster that the hosts use."""
        self.members, self.etcd = members, members[0]
        for host in hosts:
            host.endpoints = ",".join(host.endpoint_of(member) for member in members)
        self.hosts = {host.number: host for host in hosts}
        self.crowd = Crowd()
        self.one = hosts[0]

    def start(self) -> None:
        """Start all agents, and connect the workloads."""
        with ThreadPoolExecutor(len(self.hosts)) as pool:
            list(pool.map(FabricHost.start_agent, self.hosts.values()))
        for name in ("web", *"bdf"):
            self.one.ctl("profile", "add", name)
        with ThreadPoolExecutor(len(self.hosts)) as pool:
            list(pool.map(self._connect_all, self.hosts.values()))

    def _connect_all(self, host: FabricHost) -> None:
        for number, name in enumerate(WORKLOADS[host.number], 1):
            addresses = f"192.168.{host.number}.{number}", f"fd80:24e2:f998:72d6::{host.number}:{number}"
            self.connect(host, name, *addresses, profile="web" if name in FRIENDS else name)

    def connect(self, host: FabricHost, name: str, *addresses: str, profile: str = "web") -> None:
        host.add(name, *addresses)
        host.set_profiles(name, profile)
        self.crowd.add(name, host.prober(name, *addresses))

    def disconnect(self, host: FabricHost, name: str) -> tuple[str, ...]:
        """Remove a workload; return its addresses."""
        addresses = self.crowd.remove(name)
        host.ctl("container", "remove", f"/var/run/netns/{name}")
        host.run("ip", "netns", "delete", name)
        return addresses

    def set_overlay(self, mode: str) -> None:
        self.one.ctl("pool", "add", *POOLS, f"--vxlan={mode}")

    def await_matrix(self, friends: set[str] = FRIENDS, seconds: float = 30) -> None:
        """Wait until exactly these workloads reach each other, in all WAYS, and no others do."""
        expected = {(one, other, way) for one, other in permutations(friends, 2) for way in WAYS}
        reached: set[tuple[str, str, str]] = set()

        def right() -> bool:
            nonlocal reached
            reached = self.crowd.reached()
            return reached == expected

        try:
            wait_for(right, "the matrix", seconds)
        except AssertionError as error:
            missing, wrong = sorted(expected - reached), sorted(reached - expected)
            raise AssertionError(f"{error}; missing: {missing}; wrong: {wrong}") from None


@contextmanager
def open_etcds(home: Path, count: int = 1) -> Iterator[list[Etcd]]:
    """Members of an etcd cluster that clients reach on all addresses."""
    members = [Etcd(home / f"m{number}", f"m{number}") for number in range(count)]
    try:
        start(members, *members)
        yield members
    finally:
        for member in members:
            member.stop(9)


def start(cluster: list[Etcd], *members: Etcd) -> None:
    """Start these members of a cluster, and wait until they work."""
    for member in members:
        urls = (f"--listen-client-urls=http://0.0.0.0:{member.port}", f"--advertise-client-urls={member.url}")
        member.start(cluster_of(cluster), *urls)
    for member in members:
        member.await_ready()


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    home = tmp_path_factory.mktemp("etcd")
    with open_etcds(home, 3) as members, fabric(members[0], 0, 0, 1) as hosts, ExitStack() as undo:
        net = Net(members, hosts)
        undo.callback(net.crowd.close)
        net.etcd.put("/calico/bgp/v1/global/HoldTime", str(HOLD_TIME))
        net.start()
        yield net


@pytest.mark.parametrize("mode", ["never", "always", "cross-subnet"])
def test_the_classic_matrix(net: Net, mode: str) -> None:
    net.set_overlay(mode)
    # without an overlay, the router does not forward to host 13's workloads
    net.await_matrix(FRIENDS - {"g"} if mode == "never" else FRIENDS)


def test_an_address_that_moves_to_another_host(net: Net) -> None:
    """It is borrowed there: it lies in a block of the host that it has left."""
    net.set_overlay("cross-subnet")
    net.await_matrix()
    addresses = net.disconnect(net.hosts[12], "e")
    net.await_matrix(FRIENDS - {"e"})
    for number in (13, 11, 12):  # through the overlay, then plainly, then back
        net.connect(net.hosts[number], "e", *addresses)
        net.await_matrix()
        if number != 12:
            net.disconnect(net.hosts[number], "e")


def test_a_host_that_joins_later_and_leaves(net: Net) -> None:
    net.set_overlay("cross-subnet")
    net.await_matrix()
    late = FabricHost(net.etcd, 14)
    try:
        introduce(*net.hosts.values(), late)
        late.endpoints = net.one.endpoints
        late.start_agent()
        net.connect(late, "h", "192.168.14.1", "fd80:24e2:f998:72d6::14:1")
        net.await_matrix(FRIENDS | {"h"})
        net.disconnect(late, "h")
        late.ctl("node", "remove", "--remove-endpoints")
        wait_for(lambda: not routes_into("192.168.14.", *net.hosts.values()), "the end of its routes")
    finally:
        late.remove()


def routes_into(prefix: str, *hosts: FabricHost) -> list[dict]:
    """Return the routes of hosts whose destinations begin with this text."""
    return [route for host in hosts for route in host.routes() if route["dst"].startswith(prefix)]


def test_a_dead_host_is_left_within_the_hold_time_and_is_back_soon(net: Net) -> None:
    net.set_overlay("never")
    net.await_matrix(FRIENDS - {"g"})
    living, dead = net.hosts[11], net.hosts[12]
    assert routes_into("192.168.12.", living)
    dead.unplug()
    try:
        took = seconds_until(lambda: not routes_into("192.168.12.", living), "the end of the dead host's routes")
        assert took < HOLD_TIME + 3
    finally:
        dead.replug()
    took = seconds_until(lambda: "e" in {other for one, other, _ in net.crowd.reached(0.2) if one == "a"}, "its return")
    assert took < 5
    net.await_matrix(FRIENDS - {"g"})


def seconds_until(condition, what: str) -> float:
    start = time.monotonic()
    wait_for(condition, what, 60)
    return time.monotonic() - start


def test_random_kills_of_bird_and_agents_lose_next_to_nothing(net: Net) -> None:
    net.set_overlay("never")  # else the agents set the routes, and BIRD has none to lose
    net.await_matrix(FRIENDS - {"g"})
    losses = losses_by_random_kills(net, 10, FRIENDS - {"g"})
    assert len(losses) == 2 * 6
    assert max(losses.values()) <= 0.5, losses
    net.await_matrix(FRIENDS - {"g"})


def losses_by_random_kills(net: Net, count: int, watched: set[str]) -> dict[tuple[str, str], float]:
    """Kill a random host's BIRD, its agent or both so many times; return the longest losses of pings.

    The next is killed when BIRD has recovered, after about a second: by RFC 4724, section 4.2, its peers delete its
    routes when it ends again before.
    """
    chance = random.Random(1)
    net.crowd.watch(set(permutations(watched, 2)))
    for _ in range(count):
        host = chance.choice(list(net.hosts.values()))
        victims = chance.choice(["bird", "agent", "both"])
        sessions, bird = host.sessions, host.bird
        if victims != "bird":
            host.kill_agent()
        if victims != "agent":
            os.kill(bird, 9)
        if victims != "bird":
            host.start_agent()
        if victims != "agent":
            await_bird(host, bird, sessions)
            await_recovery(*net.hosts.values())
    return net.crowd.longest_losses()


def kill_bird(host: FabricHost) -> None:
    """Kill BIRD with -9, and wait until another one has recovered."""
    killed, sessions = host.bird, host.sessions
    os.kill(killed, 9)
    await_bird(host, killed, sessions)


def await_bird(host: FabricHost, killed: int, sessions: int) -> None:
    """Wait until another BIRD than the killed one runs, has recovered, and has as many sessions."""
    wait_for(lambda: host.bird not in (None, killed) and host.sessions >= sessions, "BIRD", 20)
    await_recovery(host)


def test_all_are_right_soon_after_a_burst(net: Net) -> None:
    """Through the v2 API, etcd may forget a change before an agent has got it. The v3 API forgets nothing by itself."""
    with burst(net) as took:
        assert took < 10
        resyncs = any(host.status()["resyncs"] for host in net.hosts.values())
        assert net.etcd.api == "etcdv2" or not resyncs


@contextmanager
def burst(net: Net) -> Iterator[float]:
    """Write 1,500 endpoints at once, and yield the seconds until all hosts know them. They are removed again."""
    addresses = {f"10.99.{number // 250}.{number % 250 + 1}" for number in range(1500)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda address: net.etcd.put(*record_elsewhere(address)), addresses))
    try:
        yield seconds_until(lambda: all(addresses <= each for each in members_everywhere(net, "web")), "the addresses")
    finally:
        net.etcd.delete("/calico/v1/host/elsewhere")
    wait_for(lambda: not any(addresses & each for each in members_everywhere(net, "web")), "their end", 10)


def record_elsewhere(address: str) -> tuple[str, dict]:
    """Return the key and the record of an endpoint of a host that does not exist."""
    id = address.replace(".", "0f").rjust(32, "0")
    record = {"state": "active", "name": f"cali{id[:11]}", "mac": "02:00:00:00:00:01", "profile_ids": ["web"]}
    record |= {"ipv4_nets": [f"{address}/32"], "ipv6_nets": [], "ipv4_gateway": None, "ipv6_gateway": None}
    return f"/calico/v1/host/elsewhere/workload/test/{id}/endpoint/{id}", record


def members_everywhere(net: Net, tag: str) -> list[set[str]]:
    """Return the IPv4 addresses of a tag as each host's kernel has them."""
    shown = [host.run("nft", "list", "set", "inet", "calico", f"tag4/{tag}").out for host in net.hosts.values()]
    return [set(re.findall(r"[0-9]+\.[0-9.]+", text)) for text in shown]


def test_losing_etcd_changes_nothing_in_any_kernel(net: Net) -> None:
    net.set_overlay("never")
    net.await_matrix(FRIENDS - {"g"})
    hosts = list(net.hosts.values())
    before = {host.name: kernel_of(host) for host in hosts}

    def changed() -> dict[str, list[str]]:
        """Return what each host has lost or got since then."""
        now = {host.name: kernel_of(host) for host in hosts}
        both = {name: (before[name] - now[name]) + (now[name] - before[name]) for name in now}
        return {name: sorted(parts) for name, parts in both.items() if parts}

    net.members[2].stop(9)
    net.one.set_profiles("c")  # what is changed arrives all the same
    net.await_matrix(FRIENDS - {"c", "g"})
    net.one.set_profiles("c", "web")
    net.await_matrix(FRIENDS - {"g"})
    wait_for(lambda: not changed(), "everything as it was", 10)
    for member in net.members[:2]:
        member.stop(9)
    try:
        wait_for(lambda: not any(host.status()["etcd"]["reachable"] for host in hosts), "the agents to notice", 20)
        for host in hosts:
            kill_bird(host)
        assert changed() == {}
        net.await_matrix(FRIENDS - {"g"})
    finally:
        start(net.members, *net.members)
    wait_for(lambda: all(host.status()["etcd"]["reachable"] for host in hosts), "the agents to notice", 20)
    assert changed() == {}


def kernel_of(host: FabricHost) -> Counter[str]:
    """Return routes, rules, elements of sets, forwarding entries and devices of a host."""
    commands = (
        "ip route show table all",
        "ip -6 route show table all",
        "nft --stateless list ruleset",
        "bridge fdb",
        "ip -br link",
    )
    text = without_what_packets_change("\n".join(host.run(*command.split()).out for command in commands))
    text = re.sub(r"expires \d+sec|elements = ", "", text)
    return Counter(part.strip(" \t{}") for part in re.split("[,\n]", text))
