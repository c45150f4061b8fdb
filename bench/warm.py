"""Prints what commands cost that the host's command server runs, as ratios measured in one run.

`make bench` runs this; an argument is the number of pairs (20), others select parts, by name.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Callable, NamedTuple

from measuring import (
    HOME,
    PYTHON,
    Measure,
    cni_environment,
    compare,
    endpoint_record,
    fill,
    percentile,
    ptp,
    report,
    running_etcd,
    timed,
)

from tests.system.agent import AgentHost
from tests.system.conftest import clear_host
from tests.system.support import Etcd, end_agents, import_busybox, run, start_docker, wait_for

ROOT = Path(__file__).parent.parent
PROGRAM, PLUGIN = str(HOME / "calicoctl"), str(HOME / "calico-cni")
"""They start the checkout's programs as installed ones start: see `write_programs` in setup/calicoctl."""

RTMGRP_IPV4_ROUTE, RTM_NEWROUTE = 0x40, 24
"""Source: linux/rtnetlink.h."""

SILENT: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}

CLOCKS_PRIORITY = -10
"""The scheduling priority of what measures latencies on a busy host: otherwise, its clock would be late."""

_numbers = itertools.count()


def ctl(host: AgentHost, *words: str) -> float:
    """Return the seconds of a command."""
    return timed(PROGRAM, *words, env=host.environment())


@contextmanager
def agent(etcd: Etcd) -> Iterator[AgentHost]:
    """Run the agent, and its command server."""
    host = AgentHost(etcd)
    host.start_agent()
    try:
        wait_for(lambda: Path(f"/run/calico/{host.name}/commands.sock").exists(), "the command server")
        said = run(PROGRAM, "--debug", "profile", "show", env=host.environment()).err
        assert "of the command server" in said, said
        yield host
    finally:
        end_agents()
        clear_host()


@contextmanager
def engine(directory: Path, *options: str) -> Iterator[None]:
    process = start_docker(directory, *options)
    try:
        import_busybox(directory / "busybox")
        yield
    finally:
        process.terminate()
        process.wait()


def docker(etcd: Etcd, pairs: int) -> None:
    """Compare with the engine's own command for the same: it connects, or disconnects, a container that runs."""
    for title, bound, options in (
        ("without firewall", "at most 1.0", ()),
        ("as it is set by default", "at most 0.8", ("--log-level=error",)),
    ):
        with engine(HOME / title.split()[0], *options), agent(etcd) as host:
            run("docker", "run", "--net=none", "--name", "workload", "-tid", "busybox")
            run("docker", "network", "create", "first")
            run("docker", "network", "create", "second")
            run("docker", "run", "--net=first", "--name", "bridged", "-tid", "busybox")

            def add(host: AgentHost = host) -> float:
                taken = ctl(host, "container", "add", "workload", "ipv4")
                ctl(host, "container", "remove", "workload")
                return taken

            def remove(host: AgentHost = host) -> float:
                ctl(host, "container", "add", "workload", "ipv4")
                return ctl(host, "container", "remove", "workload")

            def connect() -> float:
                taken = timed("docker", "network", "connect", "second", "bridged")
                run("docker", "network", "disconnect", "second", "bridged")
                return taken

            def disconnect() -> float:
                run("docker", "network", "connect", "second", "bridged")
                return timed("docker", "network", "disconnect", "second", "bridged")

            compare(f"container add / docker network connect, {title}", bound, add, connect, pairs)
            compare(f"container remove / network disconnect, {title}", "at most 1.0", remove, disconnect, pairs)
            run("docker", "rm", "-f", "workload", "bridged")
            run("docker", "network", "rm", "first", "second")


def python(etcd: Etcd, pairs: int) -> None:
    """Compare small commands with a Python that does nothing."""
    run("ip", "netns", "add", "bench")
    path = "/var/run/netns/bench"

    def bare() -> float:
        return timed(PYTHON, "-c", "pass")

    with agent(etcd) as host:
        ctl(host, "profile", "add", "web")
        ctl(host, "container", "add", path, "ipv4")
        fill(etcd, host.name, 10)

        def append() -> float:
            taken = ctl(host, "container", path, "profile", "append", "web")
            ctl(host, "container", path, "profile", "set")
            return taken

        def profile_add() -> float:
            return ctl(host, "profile", "add", f"p{next(_numbers)}")

        for title, bound, measure in (
            ("profile add", "at most 3", profile_add),
            ("container … profile append", "at most 4", append),
            ("endpoint show with 10 endpoints", "at most 4", lambda: ctl(host, "endpoint", "show")),
        ):
            compare(f"{title} / python3 -c pass", bound, measure, bare, pairs)
        ctl(host, "container", "remove", path)


def batch(etcd: Etcd, pairs: int) -> None:
    """Compare a batch that connects a hundred namespaces with as many processes of the plugin ptp, for each of them."""
    names = [f"bench{number}" for number in range(100)]
    for name in (*names, "bench"):
        run("ip", "netns", "add", name)
    with agent(etcd) as host:

        def lines(words: str, more: str = "") -> str:
            return "".join(f"container {words} /var/run/netns/{name} {more}\n" for name in names)

        def in_a_batch() -> float:
            taken = timed(PROGRAM, "batch", env=host.environment(), text=lines("add", "ipv4"))
            timed(PROGRAM, "batch", env=host.environment(), text=lines("remove"))
            return taken / len(names)

        def one_ptp() -> float:
            taken = ptp("ADD")
            ptp("DEL")
            return taken

        compare("container add in a batch of 100 / CNI ptp, a process", "at most 1.3", in_a_batch, one_ptp, pairs)


def cni(etcd: Etcd, pairs: int) -> None:
    """Compare the CNI plugin with the plugin ptp, with host-local."""
    run("ip", "netns", "add", "bench")
    network = json.dumps({"cniVersion": "0.4.0", "name": "bench", "type": "calico"})
    with agent(etcd) as host:

        def calico(operation: str, **more: str) -> float:
            return timed(PLUGIN, env={**host.environment(**more), **cni_environment(operation)}, text=network)

        def pair(operation: str, call: Callable[[str], float]) -> Measure:
            def measure() -> float:
                taken = {name: call(name) for name in ("ADD", "DEL")}
                return taken[operation]

            return measure

        for way, more in (("", {}), (", without the server", {"CALICO_COLD": "1"})):
            for operation in ("ADD", "DEL"):
                ours, theirs = pair(operation, partial(calico, **more)), pair(operation, ptp)
                compare(f"CNI {operation} / that of ptp with host-local{way}", "no bound yet", ours, theirs, pairs)


def clients(etcd: Etcd, pairs: int) -> None:
    """Compare the agent's latency with that of a quiet host while a hundred clients come at once.

    The agent's own latency begins when etcd has the record. How long etcd takes to write it is in the other figure.
    """
    with agent(etcd) as host, socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as routes:
        routes.bind((0, RTMGRP_IPV4_ROUTE))
        routes.settimeout(60)
        name = endpoint_record(host.name, 0, "")[1]["name"]
        run("ip", "link", "add", name, "up", "type", "veth", "peer", "name", "peer")
        run("ip", "link", "set", "peer", "up")
        host.profile("web")
        host.sync()
        os.setpriority(os.PRIO_PROCESS, 0, CLOCKS_PRIORITY)
        quiet = [_seconds_to_route(host, routes) for _ in range(5 * pairs)]
        for who, bound, command in (
            ("clients", "at most 1.2", (PROGRAM, "--debug", "profile", "show")),
            ("python3 -c pass", "for comparison", (PYTHON, "-c", "pass")),
        ):
            busy, colds = [], 0
            for _ in range(pairs):
                crowd = [
                    subprocess.Popen(command, env=host.environment(), preexec_fn=_lower_priority, **SILENT)
                    for _ in range(100)
                ]
                while any(one.poll() is None for one in crowd):
                    busy.append(_seconds_to_route(host, routes))
                said = [one.communicate()[1] for one in crowd]
                assert all(one.returncode == 0 for one in crowd), said
                colds += str(said).count("runs in this process")
            detail = f"{colds} of {100 * pairs} commands ran without the server" if who == "clients" else ""
            for what, its_bound, latency in (
                ("agent's latency", bound, attrgetter("agent")),
                ("with etcd's", "for comparison", attrgetter("whole")),
            ):
                one, other = (percentile(list(map(latency, some)), 0.95) for some in (busy, quiet))
                title = f"{what}, p95, while a hundred {who} start / without"
                report(
                    title, its_bound, one / other, f"{one * 1000:.0f} / {other * 1000:.0f} ms; {detail}".rstrip("; ")
                )
        os.setpriority(os.PRIO_PROCESS, 0, 0)
        run("ip", "link", "delete", "peer")


def _lower_priority() -> None:
    os.setpriority(os.PRIO_PROCESS, 0, 0)


class _Latency(NamedTuple):
    """The seconds until an address has been programmed: since it was in etcd, and since it was sent to etcd."""

    agent: float
    whole: float


def _seconds_to_route(host: AgentHost, routes: socket.socket) -> _Latency:
    """Return how long the agent takes to program an endpoint's new address; its route is the last step."""
    number = next(_numbers)
    address = f"192.168.{64 + number // 250}.{1 + number % 250}"
    key, record = endpoint_record(host.name, 0, "web")
    start = time.perf_counter()
    host.etcd.put(key, {**record, "ipv4_nets": [f"{address}/32"]})
    written = time.perf_counter()
    while True:
        message = routes.recv(65536)
        if message[4:6] == RTM_NEWROUTE.to_bytes(2, sys.byteorder) and socket.inet_aton(address) in message:
            now = time.perf_counter()
            return _Latency(now - written, now - start)


def memory(etcd: Etcd, pairs: int) -> None:
    """Report the server's memory, with its workers, after a few commands and after many (500 for each pair)."""
    with agent(etcd) as host:

        def used() -> float:
            return sum(map(_memory, Path("/proc").glob("[0-9]*"))) / 1024

        def commands(count: int) -> None:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda _: ctl(host, "profile", "show"), range(count)))

        commands(100)
        report("memory of the command server and its workers, MiB", "at most 60", used())
        commands(500 * pairs)
        report(f"the same after {500 * pairs} commands more", "at most 60", used())


def _memory(process: Path) -> int:
    """Return a process's share of the memory (PSS) in KiB if it belongs to a command server, else 0."""
    with suppress(OSError):
        if b"command_server" in (process / "cmdline").read_bytes():
            found = re.search(r"^Pss: +(\d+) kB", (process / "smaps_rollup").read_text(), re.M)
            return int(found[1]) if found else 0
    return 0


PARTS = {"docker": docker, "python": python, "batch": batch, "cni": cni, "clients": clients, "memory": memory}


def main(words: list[str]) -> None:
    pairs = int(words.pop(0)) if words and words[0].isdigit() else 20
    print(f"Medians of {pairs} pairs (lowest to highest)\n")
    with ExitStack() as undo:
        etcd = undo.enter_context(running_etcd())
        for path, function in ((PROGRAM, "entry"), (PLUGIN, "cni")):
            Path(path).write_text(
                f"#!{PYTHON} -IS\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                f"from calicoctl.cli.command_client import {function}\n{function}()\n"
            )
            Path(path).chmod(0o755)
        for name in words or PARTS:
            PARTS[name](etcd, pairs)


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    main(sys.argv[1:])
