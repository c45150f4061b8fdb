"""File descriptors: many inherited ones, connections for metrics, and an exhausted limit."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
import urllib.request
from pathlib import Path

from tests.system.agent import A4, B4, LOG_DIR, AgentHost
from tests.system.support import CALICOCTL, Host, free_port, run, wait_for
from tests.system.traffic import PATIENT, ping

INHERIT = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
while os.dup(0) < 1100:
    pass
for fd in range(3, 1101):
    os.set_inheritable(fd, True)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_thousand_inherited_descriptors(bare_host: Host, tmp_path: Path) -> None:
    host = AgentHost(bare_host.etcd)
    crowded = {"command": [sys.executable, "-c", INHERIT, CALICOCTL], "env": {"TMPDIR": str(tmp_path)}}
    host.ctl("node", "--ip=192.0.2.2", f"--log-dir={LOG_DIR}", **crowded)
    found = {check["name"]: check for check in json.loads(host.ctl("checksystem", "--output=json", **crowded).out)}
    assert found["nftables: policy, connection tracking, NAT, ARP"]["found"] == "works"
    host.ctl("diags", **crowded)
    assert len(list(tmp_path.glob("calico-diags-*.tar.gz"))) == 1
    host.ctl("node", "stop", **crowded)
    host.ctl("node", "remove", **crowded)
    assert "calico" not in run("nft", "list", "tables").out


def test_an_agent_that_can_open_no_files_waits_and_goes_on(bare_host: Host) -> None:
    host = AgentHost(bare_host.etcd)
    port = free_port()
    host.start_agent(f"--metrics-port={port}")
    host.add_pair()
    host.sync()
    assert ping("a", B4, patience=PATIENT)
    pid = host.pid

    def descriptors() -> int:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))

    def limit(number: int) -> None:
        run("prlimit", f"--pid={pid}", f"--nofile={number}:4096")

    # anybody may connect to the port for metrics, as often as they like
    before = descriptors()
    limit(before + 40)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    with contextlib.ExitStack() as connections:
        for _ in range(1100):
            connections.enter_context(socket.create_connection(("127.0.0.1", port), 5))
        assert descriptors() < before + 20
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert b"calico_felix_endpoints" in answer.read()
        wait_for(lambda: descriptors() <= before + 2, "connections to be ended", 10)
    assert "Problems:   none" in host.ctl("status").out

    # none can be opened, whatever happens
    limit(5)
    run("nft", "delete table inet calico")
    run("ip", "route", "delete", f"{A4}/32")
    run("ip", "netns", "delete", "b")
    host.ctl("profile", "add", "other")
    host.add("c", "192.168.0.3")
    with socket.create_connection(("127.0.0.1", port), 5):
        lacking = wait_for(
            lambda: "cannot open files" in (said := host.ctl("status", status=None)).out and said.err and said,
            host.log(),
            60,
        )
    assert f"prlimit --pid={pid} --nofile=4096" in lacking.out and lacking.status == 1
    assert host.agent_runs(pid)
    started = cpu_time(pid)
    time.sleep(1)
    assert cpu_time(pid) - started < 0.5, "it must not try again and again"

    limit(1024)
    wait_for(lambda: "Problems:   none" in host.ctl("status", status=None).out, host.log(), 30)
    assert host.pid == pid and host.agent_runs(pid)
    host.set_profiles("c", "web")
    wait_for(lambda: ping("a", "192.168.0.3", patience=PATIENT), host.log())
    assert host.endpoint_status(host.key("b"))["status"] == "down", "nor has anything been taken for gone"
    assert len(host.allocations()) == 3

    # what an agent that hangs has said vouches for nothing
    os.kill(pid, signal.SIGSTOP)
    try:
        file = Path(f"/run/calico/{host.name}/felix.root.json")
        report = json.loads(file.read_text())
        report["report"]["clock"] -= 31
        file.write_text(json.dumps(report))
        said = host.ctl("status", status=1)
        assert f"(process {pid}) has not reported for 3" in said.err and "reported 3" in said.out
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: host.ctl("status", status=None).status == 0, "the next report", 15)


def cpu_time(pid: int) -> float:
    """Return the seconds of CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
