"""Attacks on the host's agent as a whole, by interfaces' names and by locks: it goes on, and serves everybody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.system.agent import LOG_DIR, AgentHost
from tests.system.support import AS_NOBODY, run, wait_for

UNKNOWN, FOREIGN, INSIDE = "cali\udcfd\udcfe", "\udcff\udcfe\x1b[31m", "\udcff\udcfe"
"""Names that are no UTF-8, as Python has them: of interfaces of the host, and of one inside a workload."""

LOCK = """
import fcntl, os, sys
for root in sys.argv[1:]:
    for path in [root, *(os.path.join(folder, name) for folder, *names in os.walk(root) for name in sum(names, []))]:
        try:
            fcntl.flock(os.open(path, os.O_RDONLY | os.O_NONBLOCK), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass
print("locked", flush=True)
input()
"""
"""Locks all files and folders that it may open, and keeps them."""


def test_names_that_are_no_text_and_locks_of_other_users_change_nothing(pair: AgentHost) -> None:
    pid, namespace = pair.pid, "/var/run/netns/a"
    try:
        run("ip", "link", "add", UNKNOWN, "type", "veth", "peer", "name", FOREIGN)
        run("ip", "address", "add", "203.0.113.1/24", "dev", FOREIGN)
        for name in (UNKNOWN, FOREIGN):
            run("ip", "link", "set", name, "up")
        pair.sync()
        assert pair.agent_runs(pid), pair.log()

        # a workload may rename its own interface
        for words in (["down"], ["name", INSIDE], ["up"]):
            run("ip", "-n", "a", "link", "set", INSIDE if words == ["up"] else "eth1", *words)
        pair.ctl("container", namespace, "ip", "add", "192.168.0.77")
        assert run("ip", "-n", "a", "route", "get", "192.168.0.77").out.startswith("local ")
        pair.ctl("container", namespace, "ip", "remove", "192.168.0.77")

        pair.kill_agent()
        pair.start_agent()
        assert pair.status()["unknown_interfaces"] == [UNKNOWN]
        assert r"cali\udcfd\udcfe" in pair.ctl("status", status=None).out
        assert "had an internal error" not in pair.log()
    finally:
        run("ip", "link", "delete", UNKNOWN)
    locks_of_another_user_do_not_stop_bgp(pair)


def locks_of_another_user_do_not_stop_bgp(host: AgentHost) -> None:
    before = wait_for(lambda: bird_of(host), "BIRD")
    command = [*AS_NOBODY, sys.executable, "-c", LOCK, "/run/calico", "/var/lib/calico", str(LOG_DIR)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "locked\n"
        os.kill(before, 9)
        wait_for(lambda: bird_of(host) not in (None, before), f"BIRD to be started again\n{host.log()}")
        other.stdin.write("\n")


def bird_of(host: AgentHost) -> int | None:
    """Return the process id of the host's BIRD, None while it does not run."""
    try:
        pid = int(Path(f"/run/calico/{host.name}/bird.pid").read_text())
        return pid if "State:\tZ" not in Path(f"/proc/{pid}/status").read_text() else None
    except OSError:
        return None
