"""Prints how etcd's v3 API fares beside its v2 API, as ratios v3 / v2 of things measured side by side in one run.

Two etcds keep their files in a tmpfs, so that no disk counts: one has the data in its v2 API, the other one in its v3
API, and serves no v2. DATASTORE_TYPE is not set, so commands find out which one it is. For a figure that misses its
bound, it is printed where the time goes. `make bench` runs it; an argument is the number of pairs (10), others select
parts, by name.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Callable, TypeVar
from unittest import mock

from agent import crowd
from measuring import HOME, PYTHON, compare, fill, report, timed

from tests.system.fabric import FabricHost, fabric
from tests.system.support import Etcd, Host, b64, run, wait_for
from tests.system.test_hosts import open_etcds
from tests.system.test_memory_usage import peak

PATH = "/var/run/netns/bench"
BATCH = 50
IDLE = 60
"""Seconds for which an idle cluster is watched."""

DETECTED = {"DATASTORE_TYPE": ""}

LIST = """
import re, sys, time
from calicoctl import slim
slim.install()
from calicoctl.datastore import backends, keys
from calicoctl.datastore.settings import EtcdSettings
def peak():
    return int(re.findall("VmHWM:[^0-9]*([0-9]+)", open("/proc/self/status").read())[0]) / 1024
store = backends.connect(EtcdSettings.from_environment())
store.tree(keys.PROFILES)
before, start = peak(), time.perf_counter()
found = store.tree(keys.HOSTS)
end, after = time.perf_counter(), peak()
entries = sum(sum(map(sys.getsizeof, (one, vars(one), *vars(one).values()))) for one in found) / 2**20
print(end - start, after - before, entries, len(found))
"""
"""Lists all endpoints, once all is imported and connected.

Prints the seconds, the MiB that it takes, the MiB of the entries that are found, and how many there are.
"""

PROFILED = """
import cProfile, os, pstats, sys
end, profile = os._exit, cProfile.Profile()
def report(status):
    profile.disable()
    pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(12)
    end(status)
os._exit = report
profile.enable()
from calicoctl.cli.main import entry
entry()
"""
"""Runs a command, and prints on standard error which functions take the most time of their own."""

H = TypeVar("H", bound=Host)


class UserHost(Host):
    """A host as users have it, whose commands find out which API has the data."""

    def environment(self, **extra: str) -> dict[str, str]:
        return super().environment(**{**DETECTED, **extra})


@contextmanager
def both_stores(*options: str) -> Iterator[tuple[Host, Host]]:
    """A host in an etcd for each API, v3 first."""
    with ExitStack() as undo:
        hosts = []
        for api in ("etcdv3", "etcdv2"):
            etcd = Etcd(HOME / api, api)
            etcd.api = api
            etcd.start("", *options)
            undo.callback(etcd.stop)
            etcd.await_ready()
            host = UserHost(etcd, f"bench-{api}")
            host.register()
            hosts.append(host)
        yield hosts[0], hosts[1]


def side_by_side(
    title: str, bound: str, measure: Callable[[H], float], hosts: tuple[H, H], pairs: int, unit: str = "ms"
) -> bool:
    """Compare a measurement on two hosts, whose stores are v3 and v2."""
    v3, v2 = hosts
    return compare(title, bound, lambda: measure(v3), lambda: measure(v2), pairs, unit)


def where_time_goes(host: Host, *words: str, text: str = "") -> None:
    """Print which functions of a command take the most time of their own."""
    profile = run(PYTHON, "-c", PROFILED, *words, input=text, env=host.environment()).err
    print(f"    {' '.join(words)} over {host.etcd.api}:")
    print(
        *(f"      {line}" for line in profile.splitlines() if re.match(r" +[\d/]+ +\d+\.\d+| +\d+ function", line)),
        sep="\n",
    )


def commands(pairs: int) -> None:
    numbers = itertools.count()
    names = [f"bench{number}" for number in range(BATCH)]
    for name in ("bench", *names):
        run("ip", "netns", "add", name)

    def ctl(host: Host, *words: str, text: str = "") -> float:
        return timed("calicoctl", *words, env=host.environment(), text=text)

    def profile_add(host: Host) -> float:
        return ctl(host, "profile", "add", f"p{next(numbers)}")

    def container_add(host: Host) -> float:
        taken = ctl(host, "container", "add", PATH, "ipv4")
        ctl(host, "container", "remove", PATH)
        return taken

    def lines(words: str, more: str = "") -> str:
        return "".join(f"container {words} /var/run/netns/{name} {more}\n" for name in names)

    def in_a_batch(host: Host) -> float:
        taken = ctl(host, "batch", text=lines("add", "ipv4"))
        ctl(host, "batch", text=lines("remove"))
        return taken

    with both_stores() as hosts:
        if not side_by_side("profile add, cold", "at most 0.9", profile_add, hosts, 2 * pairs):
            for host in hosts:
                where_time_goes(host, "profile", "add", "last")
        if not side_by_side("container add of a namespace, cold", "at most 0.9", container_add, hosts, 2 * pairs):
            for host in hosts:
                where_time_goes(host, "container", "add", PATH, "ipv4")
                ctl(host, "container", "remove", PATH)
        if not side_by_side(f"{BATCH} container add in a batch", "at most 0.9", in_a_batch, hosts, pairs):
            for host in hosts:
                where_time_goes(host, "batch", text=lines("add", "ipv4"))
                ctl(host, "batch", text=lines("remove"))
    for name in ("bench", *names):
        run("ip", "netns", "delete", name)


def lists(pairs: int) -> None:
    """List endpoints of one host in a store, and as a command does it."""

    def listed(host: Host) -> list[float]:
        *figures, count = map(float, run(PYTHON, "-c", LIST, env=host.environment()).out.split())
        assert count >= 10_000
        return figures

    def command(host: Host) -> float:
        return timed("calicoctl", "endpoint", "show", env=host.environment())

    with both_stores() as hosts:
        for host in hosts:
            fill(host.etcd, "many", 10_000)
        side_by_side("list of 10,000 endpoints", "at most 1.2", lambda host: listed(host)[0], hosts, pairs)
        title = "list of 10,000 endpoints, memory"
        if not side_by_side(title, "at most 0.6", lambda host: listed(host)[1], hosts, pairs, "MiB"):
            for host in hosts:
                print(f"    {listed(host)[2]:.1f} MiB over {host.etcd.api} are the entries, which the caller gets")
        side_by_side("endpoint show with 10,000 endpoints", "at most 1.2", command, hosts, pairs)
        title = "endpoint show with 10,000 endpoints, peak memory of the process"
        side_by_side(title, "", lambda host: peak(host, HOME, "endpoint", "show") / 1024, hosts, pairs, "MiB")


_numbers = itertools.count()
"""Of the folders of etcds."""


@contextmanager
def open_etcd(api: str) -> Iterator[Etcd]:
    """A new etcd for an API that clients reach on all addresses."""
    with mock.patch.object(Etcd, "api", api), open_etcds(HOME / f"{api}-{next(_numbers)}") as (etcd,):
        yield etcd


@contextmanager
def agents_of_both() -> Iterator[tuple[FabricHost, FabricHost]]:
    """A host with an agent, and two workloads that may talk to each other, for each API, v3 first."""
    with ExitStack() as undo:
        v3, v2 = (undo.enter_context(open_etcd(api)) for api in ("etcdv3", "etcdv2"))
        hosts = undo.enter_context(fabric(v3, 0, 0))
        hosts[1].etcd, hosts[1].endpoints = v2, hosts[1].endpoint_of(v2)
        for host in hosts:
            host.etcd.put("/calico/v1/Ready", "true")
            host.start_agent(**DETECTED)
            host.profile("web", inbound=[{"action": "allow"}])
            for name, address in (("a", "192.168.0.1"), ("b", "192.168.0.2")):
                host.add(name, address)
                host.set_profiles(name, "web")
            host.sync()
        yield hosts[0], hosts[1]


def agents(pairs: int) -> None:
    with agents_of_both() as hosts, ExitStack() as undo:
        probers = {}
        for host in hosts:
            probers[host.name] = host.prober("a", "192.168.0.1")
            undo.callback(probers[host.name].close)
        keys = {host.name: host.key("b") for host in hosts}

        def until_answered(host: FabricHost) -> float:
            """Return the seconds from the write of a record until its workload answers another one."""
            key = keys[host.name]
            record = host.etcd.get(key)
            host.etcd.delete(key)
            host.sync()
            start = time.perf_counter()
            host.etcd.put(key, record)
            probers[host.name].await_answer("192.168.0.2", 10)
            return time.perf_counter() - start

        def memory(host: FabricHost) -> float:
            """Return the MiB of an agent that has just started: those of an older one depend on what it had to do."""
            host.ctl("node", "stop", "--force")
            host.start_agent(**DETECTED)
            host.sync()
            status = Path(f"/proc/{host.pid}/status").read_text()
            return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

        side_by_side("record of an endpoint to first answer, p50", "at most 1.1", until_answered, hosts, 5 * pairs)
        for host in hosts:
            crowd(host, 1000, 100, host.namespace)
            host.sync()
        side_by_side("memory of the agent with 1,000 endpoints", "at most 1.05", memory, hosts, 3, "MiB")


def counters(etcd: Etcd) -> dict[str, float]:
    """Return how often each method of the v3 API was called, and how many changes etcd has agreed on ("changes")."""
    with urllib.request.urlopen(f"{etcd.url}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    called = re.findall(r'^grpc_server_started_total\{grpc_method="(\w+)".*\} (\S+)$', text, re.MULTILINE)
    changes = re.findall(r"^etcd_server_proposals_committed_total (\S+)$", text, re.MULTILINE)
    return {name: float(number) for name, number in [*called, ("changes", changes[0])]}


def idle(pairs: int) -> None:
    """Twenty real agents on hosts that are network namespaces, with a workload each, and BIRD."""
    with open_etcd("etcdv3") as etcd, fabric(etcd, *[0] * 20) as hosts:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda host: host.start_agent(**DETECTED), hosts))
            list(pool.map(lambda host: host.add("w", f"192.168.{host.number}.1"), hosts))
        wait_for(lambda: all(host.sessions == 2 * 19 for host in hosts), "the mesh", 60)
        wait_for(lambda: sum("/endpoint/" in key for key in etcd.tree("/calico/felix")) == 20, "the statuses")
        # `calicoctl node` leaves a lease behind, which etcd ends
        wait_for(lambda: len(etcd.v3("lease/leases", {}).get("leases", [])) == 20, "one lease for each agent", 60)
        before, revision = counters(etcd), etcd.v3("kv/range", {"key": b64("/calico")})["header"]["revision"]
        time.sleep(IDLE)  # what is measured is that nothing happens meanwhile
        after = counters(etcd)
        assert revision == etcd.v3("kv/range", {"key": b64("/calico")})["header"]["revision"]
        made = {name: int(after[name] - before.get(name, 0)) for name in after}
        detail = ", ".join(f"{name} {number}" for name, number in made.items() if number and name != "changes")
        report(f"changes to the store by 20 idle agents in {IDLE} s", "at most 0", made["changes"], f"({detail})")


PARTS = {"commands": commands, "lists": lists, "agents": agents, "idle": idle}


def main(words: list[str]) -> None:
    pairs = int(words.pop(0)) if words and words[0].isdigit() else 10
    print(f"Medians of the ratios v3 / v2 of {pairs} pairs or more (lowest to highest)\n")
    for name in words or PARTS:
        PARTS[name](pairs)


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    main(sys.argv[1:])
