"""Prints what an event of policy costs the agent on a host with 100,000 connections, as CPU time.

Endpoints of another host join and leave a tag that the rules of this host's endpoints name. What an event costs is the
agent's CPU time while events come at a steady rate, divided by their number. `make bench` runs this; its argument is
how many seconds events come for each figure (default: 10).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from agent import cpu_seconds
from measuring import HOME, endpoint_record, report

from tests.system.agent import AgentHost
from tests.system.conftest import clear_host
from tests.system.support import Etcd, run, wait_for
from tests.system.traffic import fill_connection_table, ping

CONNECTIONS = 100_000
RATE = 20
"""Events a second."""


def cost(host: AgentHost, count: int, profile: str | None) -> float:
    """Return the agent's CPU time per event, in seconds, while endpoints of another host are written at the rate RATE.

    They get the profile; None deletes them.
    """
    host.sync()
    before = cpu_seconds(host.pid)
    start = time.perf_counter()
    for number in range(count):
        time.sleep(max(0.0, start + number / RATE - time.perf_counter()))  # events come at a steady rate
        key, record = endpoint_record("elsewhere", number, profile or "")
        host.etcd.put(key, record) if profile is not None else host.etcd.delete(key)
    last = record["ipv4_nets"][0].removesuffix("/32")
    wait_for(lambda: (last in owners()) == (profile is not None) and host.has_fast_path(), "the last event")
    return (cpu_seconds(host.pid) - before) / count


def owners() -> str:
    """Return the addresses that the agent's tables know as other hosts', as text."""
    return run("nft", "list", "map", "inet", "calico", "owners4").out


def main(seconds: int) -> None:
    etcd = Etcd(HOME / "etcd", port=2379)
    etcd.start()
    etcd.await_ready()
    host = AgentHost(etcd)
    try:
        host.start_agent()
        host.add_pair()
        host.profile("web", inbound=[{"action": "deny", "src_tag": "bad"}, {"action": "allow", "src_tag": "web"}])
        host.profile("bad")
        host.profile("other")
        wait_for(lambda: ping("a", "192.168.0.2"), "the network")
        run_all(host, seconds * RATE)
    finally:
        clear_host()
        etcd.stop()


def run_all(host: AgentHost, count: int) -> None:
    print(f"CPU of the agent per event, at {RATE} events a second\n")
    fill_connection_table(CONNECTIONS)
    for title, bound, profile in (
        ("join a tag that allows", "at most 3", "web"),
        ("leave it", "at most 20", None),
        ("join a tag that denies", "at most 20", "bad"),
        ("leave it", "at most 3", None),
        ("join no tag that is named here", "at most 3", "other"),
    ):
        report(f"{CONNECTIONS:,} connections: endpoints {title}, ms", bound, 1000 * cost(host, count, profile))


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
