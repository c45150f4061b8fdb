"""The agent's lifecycle on a real host: started, stopped, killed, cut off from etcd; and its data plane."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from calicoctl.datastore import backends
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.errors import CalicoError, Conflict
from calicoctl.felix import local_etcd
from calicoctl.felix.local_etcd import LocalEtcd
from calicoctl.workloads.wiring import WorkloadSession, reattach
from calicoctl.workloads.workload import Workload
from tests.system.agent import A4, ALLOW, B4, B6, C4, LOG_DIR, AgentHost, kernel, locked, outside_host
from tests.system.support import (
    AS_NOBODY,
    CALICOCTL,
    HOST_IP,
    Host,
    calico_links,
    end_process,
    free_port,
    gone,
    run,
    tables,
    wait_for,
    without_what_packets_change,
)
from tests.system.traffic import PATIENT, connection, flows, ping, tcp


def test_starting_twice_stopping_and_removing(bare_host: Host) -> None:
    host = AgentHost(bare_host.etcd)
    run("iptables", "-P", "FORWARD", "DROP")
    run("iptables", "-A", "FORWARD", "-s", "203.0.113.0/24", "-j", "ACCEPT")
    run("nft", "add table inet others; add chain inet others c; add rule inet others c tcp dport 80 accept")
    run("ip", "route", "add", "203.0.113.0/24", "dev", "lo", "proto", "static")
    try:
        before = kernel()
        said = host.ctl("node", "--ip=192.0.2.2", "--ip6=2001:db8::2", f"--log-dir={LOG_DIR}")
        pid = host.pid
        assert f"The host agent is running (process {pid})." in said.out and said.err == ""
        again = host.ctl("node", "--ip=192.0.2.2", "--ip6=2001:db8::2")
        assert f"The host agent is running already (process {pid})." in again.out
        assert "already" in host.ctl("node", "--ip=192.0.2.2", "--ip6=2001:db8::2", "--detach=false", status=1).err
        host.add("a", A4, "ipv6")
        host.add("b", B4)
        host.profile("web", inbound=[ALLOW])
        host.set_profiles("a", "web")
        host.set_profiles("b", "web")
        host.sync()
        assert ping("a", B4, patience=PATIENT)
        assert "2 active endpoints" in host.ctl("node", "stop", status=1).err
        assert host.agent_runs(pid)
        assert f"(process {pid}) has ended" in host.ctl("node", "stop", "--force").out
        assert not host.agent_runs(pid)
        assert ping("a", B4, patience=PATIENT), "what it has set up stays"
        assert "not running" in host.ctl("node", "stop", status=1).err
        assert "has 2 endpoints" in host.ctl("node", "remove", status=1).err
        assert ping("a", B4, patience=PATIENT)
        host.ctl("node", "remove", "--remove-endpoints")
        assert kernel() == before
        assert not calico_links()
        kept = [key for key in bare_host.etcd.tree() if "host1" in key]
        assert kept == []
        assert host.allocations() == {} and host.handles() == {}
        assert not Path("/run/calico/host1").exists()
        assert "not registered" in host.ctl("node", "remove", status=1).err
    finally:
        run("nft", "delete table inet others", check=False)
        run("iptables", "-F")
        run("iptables", "-P", "FORWARD", "ACCEPT")
        run("ip", "route", "delete", "203.0.113.0/24", check=False)


def test_removing_a_host_with_a_running_agent(pair: AgentHost) -> None:
    pid = pair.pid
    pair.ctl("node", "remove", "--remove-endpoints")
    assert not pair.agent_runs(pid)
    assert "calico" not in run("nft", "list", "ruleset").out
    assert not calico_links()


@pytest.mark.parametrize("text", ["{", "[]", '{"ipv4/ip_forward": 1}', '{"../../../tmp/x": ["0", "1"]}'])
def test_damaged_memory_of_settings_is_named_and_nothing_is_removed(pair: AgentHost, text: str) -> None:
    file = Path("/run/calico/host1/felix.sysctls")
    pair.ctl("node", "stop", "--force")
    found = file.read_text() if file.exists() else None
    before = kernel()
    file.write_text(text)
    try:
        assert str(file) in pair.ctl("node", "--ip=192.0.2.2", status=1).err
        assert str(file) in pair.ctl("node", "remove", "--remove-endpoints", status=1).err
        now = kernel()
        assert (now["tables"], now["settings"]) == (before["tables"], before["settings"])
        assert len(pair.records()) == 2
        assert ping("a", B4, patience=PATIENT)
    finally:
        file.unlink() if found is None else file.write_text(found)


def test_a_renamed_interface_passes_nothing_until_it_is_recreated(pair: AgentHost) -> None:
    interface = pair.interface("b")
    assert ping("a", B4, patience=PATIENT)
    with locked(pair, "b"):  # so that nobody heals it
        run("ip", "link", "set", interface, "name", "other0")
        wait_for(lambda: pair.endpoint_status(pair.key("b"))["status"] == "down", "the agent to notice")
        wait_for(lambda: B4 not in run("ip", "route", "show", "proto", "80").out, "the route to go")
        assert not ping("a", B4)
        run("ip", "link", "set", "other0", "name", interface)
        wait_for(lambda: pair.endpoint_status(pair.key("b"))["status"] == "up", "the agent to notice")
        assert ping("a", B4, patience=PATIENT)
        run("ip", "link", "set", interface, "name", "other0")
        wait_for(lambda: pair.endpoint_status(pair.key("b"))["status"] == "down", "the agent to notice")
    wait_for(lambda: f"is re-attached: interface {interface}" in pair.log(), "the repair")
    wait_for(lambda: pair.endpoint_status(pair.key("b"))["status"] == "up", "the agent to notice")
    assert ping("a", B4, patience=PATIENT)
    assert "other0" not in run("ip", "link").out


def test_an_interface_that_has_just_come_back_is_not_recreated(pair: AgentHost) -> None:
    """Between the look that has not found it and the repair, it may have been named back."""
    datastore = DatastoreClient(backends.connect(EtcdSettings.from_environment(pair.environment())), pair.name)
    path = "/var/run/netns/b"
    before = run("ip", "link", "show", pair.interface("b")).out
    workload = Workload("namespace", "-var-run-netns-b", path, path=path)
    with WorkloadSession.enter(datastore, workload) as session, pytest.raises(Conflict):
        reattach(session, session.endpoint)
    assert run("ip", "link", "show", pair.interface("b")).out == before
    assert ping("a", B4, patience=PATIENT)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_start_leaves_no_agent(bare_host: Host, number: signal.Signals, status: int) -> None:
    host = AgentHost(bare_host.etcd)
    command = host.start("node", f"--ip={HOST_IP}", f"--log-dir={LOG_DIR}")
    wait_for(lambda: "is registered" in command.stdout.readline(), "the registration")
    bare_host.etcd.put("/calico/v1/Ready", "false")
    pid = wait_for(lambda: host.status().get("waiting_for") and host.pid, "the agent to wait for the store")
    command.send_signal(number)
    out, err = command.communicate(timeout=20)
    assert command.returncode == status, (out, err)
    assert "Traceback" not in err
    assert not host.agent_runs(pid)
    assert host.status()["running"] is False


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', "\0" * 100], ids=range(5))
def test_a_damaged_report_is_no_fatal_error(pair: AgentHost, text: str) -> None:
    """A report that a full disk, say, has cut: commands say what is so, and the agent's next one is whole again."""
    file = Path(f"/run/calico/{pair.name}/felix.json")
    pair.kill_agent()
    file.write_text(text)
    assert "not running" in pair.ctl("status", status=1).err
    assert pair.status()["running"] is False
    pair.start_agent()
    file.write_text(text)
    pair.ctl("status", status=None)
    pair.set_profiles("b", "web", "other")
    wait_for(lambda: pair.status().get("first_update"), "the next report")
    assert pair.ctl("status").err == ""


def test_removing_takes_ours_off_an_interface_that_lost_its_record(node: AgentHost) -> None:
    node.add("a", A4, "ipv6")
    node.sync()
    name = node.interface("a")
    node.ctl("node", "stop", "--force")
    node.etcd.delete(node.key("a"))
    for address in node.allocations():
        node.ctl("ipam", "release", address)
    assert "2001:db8::2" in kernel()["neighbours"]
    node.ctl("node", "remove")
    after = kernel()
    assert (
        after["neighbours"] == ""
        and name not in run("sh", "-c", "ip route show proto 80; ip -6 route show proto 80").out
    )
    assert run("sysctl", "-n", f"net.ipv4.conf.{name}.proxy_arp", f"net.ipv6.conf.{name}.proxy_ndp").out == "0\n0\n"
    assert "anti-spoofing" in after["tables"] and "sender4" not in after["tables"], "its packets stay blocked"


def test_names_with_line_breaks_forge_no_lines(pair: AgentHost) -> None:
    key = "/calico/v1/host/host1/workload/docker/x\n2026-01-01 ERROR: forged/endpoint/y\nforged"
    pair.etcd.put(key, {"state": "active", "name": "califorged", "mac": None})
    pair.sync()
    shown = pair.ctl("status", status=1).out
    assert "forged" in pair.log() and "forged" in shown
    for line in (pair.log() + shown).splitlines():
        assert not re.match("forged|2026-01-01 ERROR", line), line


@pytest.mark.api("etcdv2")
def test_a_status_that_etcd_refuses_holds_up_no_other(pair: AgentHost) -> None:
    folder = "/calico/v1/host/host1/workload/test/w/endpoint"
    pair.etcd.put(f"{folder.replace('/v1', '/felix/v1', 1)}/e1/somebody", "else's")
    for name in ("e1", "e2", "e3"):
        pair.etcd.put(f"{folder}/{name}", {"state": "inactive"})
    wait_for(lambda: pair.endpoint_status(f"{folder}/e2") and pair.endpoint_status(f"{folder}/e3"), "the others")
    wait_for(lambda: "e1" in str(pair.status()["last_error"]), "the error to be shown")
    heartbeat = "/calico/felix/v1/host/host1/status"
    pair.etcd.delete(heartbeat)
    wait_for(lambda: pair.etcd.get(heartbeat), "the next heartbeat", 15)


HASTY_AGENT = """
from calicoctl.felix import agent, process
agent.TICK = agent.RESYNC_INTERVAL = 0.5
agent.run("host1", process.Options())
"""


def test_a_resync_restores_what_delivers_no_events(bare_host: Host) -> None:
    host = AgentHost(bare_host.etcd)
    host.register("192.0.2.2")
    host.add_pair()
    agent = subprocess.Popen([sys.executable, "-c", HASTY_AGENT], env=host.environment(), stderr=subprocess.PIPE)
    try:
        wait_for(lambda: ping("a", B4), "the network")
        name = host.interface("b")
        run("sysctl", "-w", f"net.ipv4.conf.{name}.proxy_arp=0")
        run("ip", "neighbour", "delete", B4, "dev", name)
        wait_for(lambda: "PERMANENT" in run("ip", "neighbour", "show", B4).out, "the neighbour")
        wait_for(lambda: run("sysctl", "-n", f"net.ipv4.conf.{name}.proxy_arp").out == "1\n", "the setting")
        host.etcd.delete("/calico/felix")
        wait_for(lambda: host.endpoint_status(host.key("b")), "the status")
    finally:
        agent.terminate()
        agent.communicate()


def test_starts_and_removals_at_once_come_to_one_agent_or_none(bare_host: Host) -> None:
    host = AgentHost(bare_host.etcd)

    def agents() -> list[str]:
        return [line for line in run("ps", "-eo", "pid,args").out.splitlines() if "calicoctl.felix" in line]

    for _ in range(6):
        host.ctl("node", "--ip=192.0.2.2", f"--log-dir={LOG_DIR}")
        removal = host.start("node", "remove", "--remove-endpoints")
        host.ctl("node", "--ip=192.0.2.2", f"--log-dir={LOG_DIR}", status=None)
        removal.communicate(timeout=60)
        running = host.status()["running"]
        assert len(agents()) == (1 if running else 0), (agents(), running)
    host.ctl("node", "remove", status=None)
    assert agents() == []


def test_a_long_folder_for_temporary_files(bare_host: Host, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    AgentHost(bare_host.etcd).start_agent(TMPDIR=str(long))


def test_a_record_that_moves_to_another_interface(node: AgentHost) -> None:
    """Its route there is the agent's own doing, and nobody else is blamed."""
    node.add_pair()
    node.sync()
    a, b = node.key("a"), node.key("b")
    record = json.loads(node.etcd.get(a))
    interface = node.interface("b")
    node.etcd.delete(b)
    node.sync()
    node.etcd.put(a, {**record, "name": interface})
    wait_for(lambda: interface in run("ip", "route", "show", A4).out, "the route")
    node.sync()
    assert "another process" not in node.log()


def test_connections_that_could_not_be_listed_are_listed_again(bare_host: Host, tmp_path: Path) -> None:
    """Those that a change denies end then, and an address that is new to its endpoint waits until then."""
    broken = tmp_path / "broken"
    host = AgentHost(bare_host.etcd)
    host.register(HOST_IP)
    with agent_with(host, f"if os.path.exists({str(broken)!r}): raise OSError(12, 'out of memory')") as log:
        host.add_pair()
        wait_for(lambda: ping("a", B4), "the network")
        with connection("a", "b", B4, 80) as stream:
            host.sync()  # no listing is under way any more when this has come to its end
            assert flows(*stream, patience=PATIENT)
            broken.touch()
            host.profile("web")
            wait_for(lambda: "out of memory" in log.read_text(), "the failure")
            assert not flows(*stream) and "dport=80" in run("conntrack", "-L", "-p", "tcp").out
            host.add("c", C4)
            key = host.key("c")
            wait_for(lambda: (host.endpoint_status(key) or {}).get("status") == "error", "the failure")
            assert "out of memory" in host.status()["endpoints_in_trouble"][0]["reason"]
            broken.unlink()
            wait_for(lambda: "dport=80 " not in run("conntrack", "-L", "-p", "tcp").out, "the connection's end")
        wait_for(lambda: (host.endpoint_status(key) or {}).get("status") == "up", "the endpoint")


def test_what_a_change_denies_stops_at_once(bare_host: Host, tmp_path: Path) -> None:
    """Also while it takes its time to list connections; what is allowed goes on meanwhile."""
    hold = tmp_path / "hold"
    host = AgentHost(bare_host.etcd)
    host.register(HOST_IP)

    def base_chain() -> str:
        return run("nft", "list", "chain", "inet", "calico", "inbound-forward").out

    with agent_with(host, f"while os.path.exists({str(hold)!r}): time.sleep(0.01)"):
        host.add_pair()
        wait_for(lambda: ping("a", B4) and "established,related accept" in base_chain(), "the network")
        with connection("a", "b", B4, 80) as denied, connection("a", "b", B4, 81) as allowed:
            assert flows(*denied, patience=PATIENT) and flows(*allowed, patience=PATIENT)
            hold.touch()
            host.profile("web", inbound=[{"action": "allow", "protocol": "tcp", "dst_ports": [81]}])
            wait_for(lambda: not tcp("a", "b", B4, 82), "the change")
            assert not flows(*denied) and flows(*allowed, patience=PATIENT)
            assert "dport=80 " in run("conntrack", "-L", "-p", "tcp").out and "direction reply" in base_chain()
            hold.unlink()
            wait_for(lambda: "dport=80 " not in run("conntrack", "-L", "-p", "tcp").out, "the connection's end")
            wait_for(lambda: "established,related accept" in base_chain(), "the end of looking")
            assert not flows(*denied) and flows(*allowed, patience=PATIENT)


def test_a_change_does_not_wait_for_what_an_added_address_waits_for(bare_host: Host, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    host = AgentHost(bare_host.etcd)
    host.register(HOST_IP)
    with agent_with(host, f"if os.path.exists({str(broken)!r}): raise OSError(12, 'out of memory')") as log:
        host.add_pair()
        host.profile("none")
        wait_for(lambda: ping("a", B4), "the network")
        with connection("a", "b", B4, 80):  # else there is nothing to list
            broken.touch()
            key = host.key("b")
            record = json.loads(host.etcd.get(key))
            nets = [*record["ipv4_nets"], f"{C4}/32"]
            host.etcd.put(key, {**record, "ipv4_nets": nets, "profile_ids": ["none"]})
            wait_for(lambda: not tcp("a", "b", B4, 81), "the change")
            assert host.endpoint_status(key)["status"] != "up"
            host.etcd.put(key, {**record, "ipv4_nets": nets})
            wait_for(lambda: tcp("a", "b", B4, 81), "the change")
            run("ip", "-n", "b", "address", "add", f"{C4}/32", "dev", "eth1")
            assert not ping("a", C4)
            run("nft", "flush", "ruleset")  # and it goes on waiting when the tables are reloaded
            wait_for(lambda: "reloading" in log.read_text() and tcp("a", "b", B4, 81), "the tables")
            wait_for(lambda: "calico" in run("nft", "list", "tables").out, "the tables")
            assert not ping("a", C4)
            broken.unlink()
            wait_for(lambda: ping("a", C4), "the address")


def test_racing_starts_come_to_one_agent(bare_host: Host) -> None:
    host = AgentHost(bare_host.etcd)
    starts = [host.start("node", "--ip=192.0.2.2", f"--log-dir={LOG_DIR}") for _ in range(4)]
    said = [start.communicate() for start in starts]
    assert [start.returncode for start in starts] == [0] * 4, said
    assert {int(re.search(r"process (\d+)", out)[1]) for out, _ in said} == {host.pid}
    assert host.agent_runs(host.pid)


def test_removing_another_host_touches_nothing_here(pair: AgentHost) -> None:
    far = "/calico/v1/host/far/workload/docker/x/endpoint/0123456789abcdef0123456789abcdef"
    far_host = Host(pair.etcd, "far")
    before = kernel()
    far_host.register("192.0.2.3")
    wait_for(lambda: "192.0.2.3" in kernel()["tables"], "the host's address")
    pair.etcd.put(far, {"state": "active", "ipv4_nets": ["192.168.0.200/32"]})
    assert "has 1 endpoint." in pair.ctl("node", "remove", "--hostname=far", status=1).err
    pair.ctl("node", "remove", "--hostname=far", "--remove-endpoints")
    assert not [key for key in pair.etcd.tree() if "/far/" in key]
    wait_for(lambda: kernel() == before, "its end")
    assert ping("a", B4, patience=PATIENT)
    assert "not registered" in pair.ctl("node", "remove", "--hostname=far", status=1).err
    assert "none can have this name" in pair.ctl("node", "remove", "--hostname=a/b", status=1).err


def test_a_stream_runs_through_restart_and_kill(pair: AgentHost) -> None:
    with connection("a", "b", B4, 80) as stream:
        routes = run("ip", "route").out
        reported = pair.etcd.tree("/calico/felix/v1/host/host1/workload")
        for _ in range(2):
            pair.kill_agent()
            assert flows(*stream, patience=PATIENT)
            pair.start_agent()
            assert flows(*stream, patience=PATIENT)
        pair.ctl("node", "stop", "--force")
        assert flows(*stream, patience=PATIENT)
        pair.start_agent()
        assert flows(*stream, patience=PATIENT)
        assert run("ip", "route").out == routes
        assert pair.etcd.tree("/calico/felix/v1/host/host1/workload") == reported


def test_a_stream_runs_through_an_upgrade(pair: AgentHost) -> None:
    """Another version of the agent may have left tables of another shape, and routes that nobody wants any more."""
    interface = pair.interface("b")
    with connection("a", "b", B4, 80) as stream:
        before = tables()
        pair.kill_agent()
        of_another_version = f"""
            table inet calico
            delete table inet calico
            table inet calico {{
                map to {{ type ifname : verdict; elements = {{ "{interface}" : goto to-b }}; }}
                set senders4 {{ type ipv4_addr; flags interval; elements = {{ 192.168.0.0/24 }}; }}
                chain to-b {{ ct state established,related accept; drop; }}
                chain fw {{ type filter hook forward priority filter; oifname vmap @to; ip saddr != @senders4 drop; }}
                chain raw {{ type filter hook prerouting priority raw; policy accept; }}
            }}
            table arp calico
            delete table arp calico
        """
        run("nft", "-f", "-", input=of_another_version)
        run("ip", "route", "add", "192.168.0.77/32", "dev", interface, "scope", "link", "proto", "80")
        assert flows(*stream, patience=PATIENT)
        pair.start_agent()
        assert flows(*stream, patience=PATIENT)
        wait_for(pair.has_fast_path, "all connections to be verified")
        assert tables() == before
        assert "192.168.0.77" not in run("ip", "route").out


def test_no_packet_is_lost_or_let_through_while_the_agent_starts(pair: AgentHost) -> None:
    """A table that is replaced as a whole is so at once: allowed packets pass, others do not, at every instant."""
    pair.add("c", C4)
    allowed = subprocess.Popen(
        ["ip", "netns", "exec", "a", "ping", "-q", "-i", "0.002", "-W", "1", B4], stdout=subprocess.PIPE, text=True
    )
    denied = subprocess.Popen(
        ["ip", "netns", "exec", "c", "ping", "-q", "-i", "0.002", "-W", "1", B4], stdout=subprocess.PIPE, text=True
    )
    for _ in range(5):
        pair.kill_agent()
        pair.start_agent()
        pair.profile("web", inbound=[ALLOW, {"action": "deny", "src_tag": "nobody"}])
        pair.sync()
        pair.profile("web", inbound=[ALLOW])
        pair.sync()
    results = []
    for process in (allowed, denied):
        process.send_signal(signal.SIGINT)
        results.append(process.communicate()[0])
    sent, received = map(int, re.search(r"(\d+) packets transmitted, (\d+) received", results[0]).groups())
    assert sent > 500 and received >= sent - 1, results[0]
    assert re.search(r"[1-9]\d+ packets transmitted, 0 received", results[1]), results[1]


def test_a_change_while_the_agent_is_down_ends_connections_when_it_starts(pair: AgentHost) -> None:
    with connection("a", "b", B4, 80) as stream:
        pair.kill_agent()
        pair.profile("web", inbound=[])
        assert flows(*stream, patience=PATIENT)
        pair.start_agent()
        assert not flows(*stream)


def test_an_invalid_value_affects_only_its_own_object(pair: AgentHost) -> None:
    pair.add("c", C4)
    pair.set_profiles("c", "web")
    folder = "/calico/v1/host/host1/workload/docker/x/endpoint"
    sound = {"state": "active", "mac": "02:00:00:00:00:09", "profile_ids": ["web"], "ipv4_nets": ["192.168.0.9/32"]}
    bad = {
        f"{folder}/1": "{",
        f"{folder}/2": json.dumps({**sound, "name": "eth0"}),
        f"{folder}/3": json.dumps({**sound, "name": "cali/../x"}),
        f"{folder}/4": json.dumps({**sound, "name": "cali4", "mac": None}),
        f"{folder}/5": json.dumps({**sound, "name": "cali5", "ipv4_nets": ["192.168.0.0/24"]}),
        f"{folder}/6": json.dumps({**sound, "name": "cali6", "ipv4_nets": ["127.0.0.1/32"]}),
        f"{folder}/7": json.dumps({**sound, "name": pair.interface("a")}),
        f"{folder}/8": json.dumps({**sound, "name": "cali8", "ipv4_nets": [f"{A4}/32"]}),
        f"{folder}/9": json.dumps({**sound, "name": "calitoolongforthekernel"}),
        "/calico/v1/policy/profile/other/rules": "[]",
        "/calico/v1/policy/profile/third/tags": '{"no": "list"}',
        "/calico/v1/ipam/v4/pool/nonsense": "{}",
        "/calico/v1/policy/profile/deep/er/rules": "x",
        "/calico/v1/host/host1/workload/odd": "x",
    }
    for key, value in bad.items():
        pair.etcd.put(key, value)
    pair.sync()
    assert ping("a", B4, patience=PATIENT) and ping("b", A4, patience=PATIENT) and ping("c", A4, patience=PATIENT)
    status = pair.status()
    named = {problem["key"] for problem in status["problems"]}
    lacking = {"/calico/v1/policy/profile/third/rules"}
    assert named == {key for key in bad if "deep" not in key and "odd" not in key} | lacking
    assert status["endpoints"] == {"up": 3, "down": 0, "error": 9, "stopped": 0}
    for number in "123456789":
        assert pair.endpoint_status(f"{folder}/{number}")["status"] == "error", number
    shown = pair.ctl("status", status=1)
    assert "endpoint 1 of " in shown.out and "endpoint 9 of " in shown.out and "9 endpoints are in error" in shown.err
    issues = [issue["text"] for issue in status["issues"]]
    assert f"  … and {len(issues) - 9} more" in shown.out and shown.out.count("\n  ") == 2 + 10
    assert any("/calico/v1/policy/profile/third/tags " in text for text in issues)
    assert not any(text.startswith(f"{folder}/1") for text in issues), "the endpoint has been named"
    for key in bad:
        pair.etcd.delete(key)
    pair.sync()
    assert pair.status()["problems"] == [] and pair.status()["issues"] == []
    assert pair.endpoint_status(f"{folder}/1") is None
    assert ping("a", B4, patience=PATIENT)


def test_what_the_tool_of_2015_wrote(node: AgentHost) -> None:
    """A namespace's endpoint under `docker`, one profile_id, addresses without a handle, fields we do not know."""
    run("ip", "netns", "add", "old")
    node.add("b", B4)
    node.profile("web", inbound=[ALLOW])
    node.set_profiles("b", "web")
    id = "b7bfd19ee7611e59cafe0800279bba2e"
    name = f"cali{id[:11]}"
    run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth1", "netns", "old")
    run("ip", "link", "set", name, "up")
    run("ip", "-n", "old", "link", "set", "eth1", "up")
    run("ip", "-n", "old", "address", "add", "192.168.0.7/32", "dev", "eth1")
    run("ip", "-n", "old", "route", "add", "192.0.2.2", "dev", "eth1")
    run("ip", "-n", "old", "route", "add", "default", "via", "192.0.2.2", "dev", "eth1")
    record = {
        "state": "active",
        "name": name,
        "mac": node.mac("old").upper(),
        "profile_id": "web",
        "ipv4_nets": ["192.168.0.7/32"],
        "ipv6_nets": [],
        "ipv4_gateway": "192.0.2.2",
        "ipv6_gateway": None,
        "labels": {"new": "field"},
    }
    node.etcd.put(f"/calico/v1/host/host1/workload/docker/-var-run-netns-old/endpoint/{id}", record)
    node.sync()
    assert ping("old", B4, patience=PATIENT) and ping("b", "192.168.0.7", patience=PATIENT)


def test_interface_and_record_come_in_any_order_and_go(pair: AgentHost) -> None:
    key, name, mac = pair.key("b"), pair.interface("b"), pair.mac("b")
    assert pair.endpoint_status(key)["status"] == "up"
    run("ip", "link", "set", name, "down")
    wait_for(lambda: pair.endpoint_status(key)["status"] == "down", "down")
    assert "is down" in pair.status()["endpoints_in_trouble"][0]["reason"]
    run("ip", "link", "set", name, "up")
    wait_for(lambda: pair.endpoint_status(key)["status"] == "up", "up")
    assert ping("a", B4, patience=PATIENT)
    reconciled = "netns/b has a new neighbour entry"
    before = pair.log().count(reconciled)
    with locked(pair, "b"):  # or the agent would make the interface again
        run("ip", "link", "delete", name)
        wait_for(lambda: "there is no interface" in (pair.endpoint_status(key).get("reason") or ""), "down")
        run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth1", "netns", "b", "address", mac)
        for prefix, device in ((["ip"], name), (["ip", "-n", "b"], "eth1")):
            run(*prefix, "link", "set", device, "up")
        run("ip", "-n", "b", "address", "add", f"{B4}/32", "dev", "eth1")
        run("ip", "-n", "b", "route", "add", "192.0.2.2", "dev", "eth1")
        run("ip", "-n", "b", "route", "add", "default", "via", "192.0.2.2", "dev", "eth1")
    wait_for(lambda: pair.endpoint_status(key)["status"] == "up", "up")
    # now that the lock is free, the agent reconciles the workload once more
    wait_for(lambda: pair.log().count(reconciled) > before, reconciled)
    assert ping("a", B4, patience=PATIENT)
    record = pair.etcd.get(key)
    pair.etcd.delete(key)
    pair.sync()
    assert name not in run("ip", "route").out and name not in run("ip", "neigh", "show", "nud", "permanent").out
    assert pair.endpoint_status(key) is None
    assert name not in without_what_packets_change(run("nft", "--stateless", "list", "ruleset").out)
    pair.etcd.put(key, record)
    pair.sync()
    assert ping("a", B4, patience=PATIENT)
    pair.etcd.put(key, {**json.loads(record), "state": "inactive"})
    pair.sync()
    wait_for(lambda: pair.endpoint_status(key)["status"] == "down", "down")
    assert not ping("a", B4)
    # a route of ours that no endpoint wants, found at the start
    pair.kill_agent()
    run("ip", "route", "add", "192.168.0.99/32", "dev", name, "proto", "80")
    pair.start_agent()
    assert "192.168.0.99" not in run("ip", "route").out


def test_the_kernels_side_of_an_endpoint(node: AgentHost) -> None:
    node.add("b", B4, B6)
    node.sync()
    name = node.interface("b")
    assert f"{B4} dev {name} proto 80 scope link" in run("ip", "route").out
    assert f"{B6} dev {name} proto 80" in run("ip", "-6", "route").out
    permanent = run("ip", "neigh", "show", "nud", "permanent").out
    for address in (B4, B6):
        assert f"{address} dev {name} lladdr {node.mac('b')} PERMANENT" in permanent
    assert f"2001:db8::2 dev {name}" in run("ip", "-6", "neigh", "show", "proxy").out
    for setting, value in {
        f"ipv4.conf.{name}.proxy_arp": "1",
        f"ipv4.neigh.{name}.proxy_delay": "0",
        f"ipv4.conf.{name}.route_localnet": "0",
        f"ipv4.conf.{name}.rp_filter": "1",
        f"ipv4.conf.{name}.accept_source_route": "0",
        f"ipv6.conf.{name}.accept_dad": "0",
        f"ipv6.conf.{name}.accept_ra": "0",
        f"ipv6.conf.{name}.proxy_ndp": "1",
        f"ipv6.neigh.{name}.proxy_delay": "0",
        "ipv4.ip_forward": "1",
        "ipv6.conf.all.forwarding": "1",
    }.items():
        assert run("sysctl", "-n", f"net.{setting}").out.strip() == value, setting


def test_an_interface_without_a_carrier_gets_its_proxy_entry_again(node: AgentHost) -> None:
    node.add("b", B4, B6)
    node.sync()
    name = node.interface("b")
    proxy = ("proxy", "2001:db8::2", "dev", name)
    assert proxies(name) == ["2001:db8::2"]
    run("ip", "-n", "b", "link", "set", "eth1", "down")
    wait_for(lambda: "LOWER_UP" not in run("ip", "link", "show", name).out, "the loss of the carrier")
    run("ip", "-6", "neigh", "delete", *proxy, check=False)  # as most kernels do
    assert proxies(name) == []
    run("ip", "-n", "b", "link", "set", "eth1", "up")
    wait_for(lambda: proxies(name) == ["2001:db8::2"], "the proxy entry")


def proxies(interface: str) -> list[str]:
    listed = json.loads(run("ip", "-json", "-6", "neigh", "show", "proxy", "dev", interface).out or "[]")
    return [one["dst"] for one in listed]


def test_settings_of_the_host_are_put_back(bare_host: Host) -> None:
    host = AgentHost(bare_host.etcd)
    with outside_host():
        # the kernel changes the others with the first two
        along = {"ipv4.conf.all.accept_redirects": "0"}
        for name in ("uplink", "default"):
            along |= {f"ipv4.conf.{name}.forwarding": "1", f"ipv6.conf.{name}.forwarding": "1"}
        for name, value in {"ipv4.ip_forward": "0", "ipv6.conf.all.forwarding": "0", **along}.items():
            run("sysctl", "-qw", f"net.{name}={value}")
        run("sysctl", "-qw", "net.ipv6.conf.uplink.accept_ra=1")

        def settings() -> list[str]:
            names = ("ipv4.ip_forward", "ipv6.conf.all.forwarding", "ipv6.conf.uplink.accept_ra")
            return [run("sysctl", "-n", f"net.{name}").out.strip() for name in names]

        host.ctl("node", "--ip=192.0.2.2", f"--log-dir={LOG_DIR}")
        assert settings() == ["1", "0", "1"], "a host without an IPv6 address does not forward IPv6"
        host.start_agent()
        wait_for(lambda: settings() == ["1", "1", "2"], "forwarding of IPv6")
        host.kill_agent()
        host.start_agent()
        assert settings() == ["1", "1", "2"]
        run("sysctl", "-qw", "net.ipv6.conf.uplink.accept_ra=0")
        host.ctl("node", "remove")
        assert settings() == ["0", "0", "0"], "what another process has set since stays"
        assert {name: run("sysctl", "-n", f"net.{name}").out.strip() for name in along} == along
        run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.ip_forward=0", "net.ipv6.conf.default.forwarding=0")


def test_what_another_process_removes_comes_back(pair: AgentHost) -> None:
    pair.add("c", C4)
    run("ip", "route", "delete", f"{B4}/32")
    wait_for(lambda: ping("a", B4), "the route")
    run("ip", "route", "replace", f"{B4}/32", "dev", "lo")
    wait_for(lambda: ping("a", B4), "the route, replaced")
    assert "another process has removed" in pair.log()
    for command in ("flush ruleset", "delete table inet calico", "flush chain inet calico inbound-forward"):
        run("nft", command)
        wait_for(lambda: "oifname vmap @to" in run("nft", "list", "ruleset").out, command)
        wait_for(lambda: ping("a", B4), f"traffic after {command}")  # its addresses may be pending for a moment
        assert not ping("c", B4)
    made = pair.log().count("reloading")
    pair.profile("web", inbound=[ALLOW, ALLOW])
    pair.sync()
    assert pair.log().count("reloading") == made, "its own changes are not another process's"


@contextlib.contextmanager
def agent_with(host: AgentHost, code: str) -> Iterator[Path]:
    """An agent whose listing of connections runs `code` first, and what it logs."""
    log = LOG_DIR / "felix.log"
    LOG_DIR.mkdir(parents=True, exist_ok=True)
    text = PATCHED_AGENT.replace("CODE", code)
    with log.open("w") as stream:
        agent = subprocess.Popen([sys.executable, "-c", text], env=host.environment(), stderr=stream)
    try:
        yield log
    finally:
        agent.terminate()
        agent.wait()


PATCHED_AGENT = """
import os, time
from calicoctl import netlink
from calicoctl.felix import agent, process
dump = netlink.dump
def patched(protocol, *rest, **options):
    if protocol == 12:  # NETLINK_NETFILTER
        CODE
    yield from dump(protocol, *rest, **options)
netlink.dump = patched
agent.run("host1", process.Options())
"""


def test_an_endpoint_that_waits_for_a_listing_comes_up_when_the_tables_go(bare_host: Host, tmp_path: Path) -> None:
    """Its address's old connections are listed first; while that takes its time, the tables are reloaded."""
    hold, busy = tmp_path / "hold", tmp_path / "busy"
    host = AgentHost(bare_host.etcd)
    host.register(HOST_IP)
    code = f"while os.path.exists({str(hold)!r}): open({str(busy)!r}, 'w').close(); time.sleep(0.05)"
    with agent_with(host, code) as log:
        host.add_pair()
        wait_for(lambda: ping("a", B4), "the network")
        hold.touch()
        host.add("c", C4)
        host.set_profiles("c", "web")
        wait_for(busy.exists, "the listing")
        run("nft", "flush", "ruleset")
        wait_for(lambda: "reloading" in log.read_text(), "the agent to notice")
        hold.unlink()
        wait_for(lambda: (host.endpoint_status(host.key("c")) or {}).get("status") == "up", "the endpoint", 10)
        wait_for(lambda: ping("c", B4), "the way")


def test_two_containers_talk_ipv6(node: AgentHost, engine: None) -> None:
    names = ("workload", "other")
    try:
        for name, address in zip(names, (A4, B4)):
            run("docker", "run", "--net=none", "--name", name, "-tid", "busybox")
            node.ctl("container", "add", name, address)
            node.ctl("container", name, "ip", "add", "ipv6")
        node.ctl("profile", "add", "web")
        for name in names:
            node.ctl("container", name, "profile", "append", "web")
        node.sync()
        shown = run("docker", "exec", "other", "ip", "-6", "address", "show", "eth1").out
        address = re.search(r"inet6 (fd80:\S+)/128", shown)[1]
        assert run("docker", "exec", "workload", "ping", "-c", "1", "-W", "1", address, check=False).status == 0
        assert run("docker", "exec", "workload", "ping", "-c", "1", "-W", "1", B4, check=False).status == 0
    finally:
        for name in names:
            run("docker", "rm", "-f", name, check=False)


def test_wait_returns_when_the_next_line_can_ping(node: AgentHost) -> None:
    node.profile("web", inbound=[ALLOW])
    for name, address in (("a", "ipv4"), ("b", "ipv6")):
        run("ip", "netns", "add", name)
        node.ctl("container", "add", f"/var/run/netns/{name}", address, "--wait=20")
        own = next(iter(json.loads(node.etcd.get(node.key(name)))[f"{address}_nets"])).partition("/")[0]
        assert ping(None, own, patience=PATIENT), "the very next packet"
    os.kill(node.pid, signal.SIGSTOP)
    run("ip", "netns", "add", "c")
    late = node.ctl("container", "add", "/var/run/netns/c", "ipv4", "--wait=0.5", status=1)
    assert late.out.startswith("IP 192.168.0.1 added") and "stays connected" in late.err
    os.kill(node.pid, signal.SIGCONT)
    wait_for(lambda: ping(None, "192.168.0.1"), "the late one")
    node.kill_agent()
    run("ip", "netns", "add", "d")
    without = node.ctl("container", "add", "/var/run/netns/d", "ipv4", "--wait=0.1", status=1)
    assert "is not running" in without.err and len(without.err.splitlines()) == 1
    assert node.ctl("container", "/var/run/netns/d", "endpoint", "show").out
    for bad in ("x", "-1", "1e3", ""):
        assert "--wait" in node.ctl("container", "add", "/var/run/netns/e", "ipv4", f"--wait={bad}", status=1).err


def test_wait_is_not_fooled_by_an_old_report(pair: AgentHost) -> None:
    """A report about the record as it was before says nothing about the record as it is."""
    os.kill(pair.pid, signal.SIGSTOP)
    try:
        run("ip", "link", "delete", pair.interface("a"))
        assert pair.endpoint_status(pair.key("a"))["status"] in ("up", "down")
        pair.etcd.put(pair.key("a"), {**json.loads(pair.etcd.get(pair.key("a"))), "note": "written again"})
        late = pair.ctl("container", "add", "/var/run/netns/a", A4, "--wait=0.5", status=1)
        assert "has not set it up yet" in late.err
    finally:
        os.kill(pair.pid, signal.SIGCONT)


def test_wait_is_not_fooled_by_a_dead_agent(pair: AgentHost) -> None:
    """A container that is connected again has the record it had, and a dead agent's word about it."""
    pair.kill_agent()
    run("ip", "netns", "delete", "a")
    wait_for(lambda: len(calico_links()) == 1, "the old interface's end")
    run("ip", "netns", "add", "a")
    late = pair.ctl("container", "add", "/var/run/netns/a", A4, "--wait=0.5", status=1)
    assert "is not running" in late.err
    assert run("sysctl", "-n", f"net.ipv6.conf.{pair.interface('a')}.accept_ra").out == "0\n"
    pair.start_agent()
    run("ip", "netns", "delete", "a")
    wait_for(lambda: len(calico_links()) == 1, "the old interface's end")
    run("ip", "netns", "add", "a")
    wait_for(lambda: ping("a", B4), "the network")


def test_an_etcd_of_its_own(bare_host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    host = AgentHost(bare_host.etcd)
    env = {"ETCD_AUTHORITY": f"127.0.0.1:{port}", "http_proxy": "http://127.0.0.1:9"}
    assert "etcd answers" in host.ctl("node", "--ip=192.0.2.2", "--local-etcd", status=1).err
    host.start_agent()
    assert "without --local-etcd" in host.ctl("node", "--ip=192.0.2.2", "--local-etcd", status=1).err
    host.ctl("node", "remove")
    wrong = {"ETCD_AUTHORITY": "192.0.2.9:2379"}
    assert "--local-etcd" in host.ctl("node", "--ip=192.0.2.2", "--local-etcd", status=1, env=wrong).err
    try:
        said = host.ctl("node", "--ip=192.0.2.2", "--local-etcd", f"--log-dir={LOG_DIR}", env=env)
        assert f"A local etcd is running at http://127.0.0.1:{port}." in said.out
        pid_file = Path("/run/calico/host1/etcd.pid")
        pid = int(pid_file.read_text())
        listening = run("ss", "-ltnpH").out
        assert {line.split()[3].rpartition(":")[0] for line in listening.splitlines() if f"pid={pid}," in line} == {
            "127.0.0.1"
        }
        assert Path("/var/lib/calico/etcd").stat().st_mode & 0o777 == 0o700
        run("ip", "netns", "add", "a")
        host.ctl("container", "add", "/var/run/netns/a", A4, "--wait=20", env=env)
        monkeypatch.setenv("ETCD_AUTHORITY", f"127.0.0.1:{free_port()}")
        with pytest.raises(CalicoError, match="another etcd uses /var/lib/calico/etcd"):
            LocalEtcd("host2", str(LOG_DIR)).start()
        os.kill(pid, 9)
        wait_for(lambda: pid_file.read_text().strip() != str(pid), "another etcd")
        wait_for(lambda: host.ctl("pool", "show", status=None, env=env).status == 0, "the store")
        host.kill_agent()
        host.ctl("node", "--ip=192.0.2.2", "--local-etcd", f"--log-dir={LOG_DIR}", env=env)
        assert ping(None, A4, patience=PATIENT)
        pid = int(pid_file.read_text())
        assert "local etcd has ended" in host.ctl("node", "stop", "--force", env=env).out
        assert gone(pid)
        (tmp_path / "felix.log").mkdir()  # so the agent cannot start
        options = ("--ip=192.0.2.2", "--local-etcd", f"--log-dir={tmp_path}")
        assert "etcd" in host.ctl("node", *options, status=1, env=env).out
        assert not pid_file.exists(), "an etcd that nobody looks after"
        host.ctl("node", "remove", "--remove-endpoints", env=env)
        assert not Path("/run/calico/host1").exists() and not calico_links()
        assert "calico" not in run("nft", "list", "ruleset").out
    finally:
        with contextlib.suppress(FileNotFoundError):
            end_process(pid_file)
        run("rm", "-rf", "/var/lib/calico")


def test_an_etcd_that_never_serves_is_ended(bare_host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_etcd, "START_PATIENCE", 1.0)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("ETCD_AUTHORITY", f"127.0.0.1:{free_port()}")
    started = tmp_path / "started"
    (tmp_path / "etcd").write_text(f"#!/bin/sh\necho $$ >{started}\nwhile :; do sleep 0.1; done\n")
    (tmp_path / "etcd").chmod(0o755)
    etcd = LocalEtcd("host1", str(tmp_path))
    try:
        with pytest.raises(CalicoError, match="does not serve"):
            etcd.start()
        assert gone(int(started.read_text())) and not Path("/run/calico/host1/etcd.pid").exists()
    finally:
        local_etcd.stop("host1")
        run("rm", "-rf", "/var/lib/calico")


def test_without_an_etcd_the_error_says_what_to_do(bare_host: Host, tmp_path: Path) -> None:
    bare_host.etcd.stop()
    try:
        said = bare_host.ctl("node", "--ip=192.0.2.2", status=1).err
        assert "127.0.0.1:2379" in said and "--local-etcd" in said
    finally:
        bare_host.etcd.start()
        bare_host.etcd.await_ready()


def test_metrics_are_on_loopback_and_off_by_default(bare_host: Host) -> None:
    host = AgentHost(bare_host.etcd)
    port = free_port()
    for bad in ("0", "65536", "x"):
        assert "--metrics-port" in host.ctl("node", "--ip=192.0.2.2", f"--metrics-port={bad}", status=1).err
    host.start_agent()
    assert f"pid={host.pid}," not in run("ss", "-ltnpH").out
    host.kill_agent()
    host.start_agent(f"--metrics-port={port}")
    ours = [line for line in run("ss", "-ltnpH").out.splitlines() if f"pid={host.pid}," in line]
    assert [line.split()[3] for line in ours] == [f"127.0.0.1:{port}"]
    host.add("a", A4)
    host.sync()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    assert 'calico_felix_endpoints{status="up"} 1.0' in text
    for name in ("apply_seconds_count", "resyncs_total", "last_error_timestamp_seconds", "store_reachable"):
        assert re.search(rf"^calico_felix_{name} ", text, re.MULTILINE), name
    host.kill_agent()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def bound() -> bool:  # other threads of a killed process may outlive its first one by a moment
            with contextlib.suppress(OSError):
                taken.bind(("127.0.0.1", port))
                return True
            return False

        wait_for(bound, "the port")
        taken.listen()
        said = host.ctl("node", "--ip=192.0.2.2", f"--log-dir={LOG_DIR}", f"--metrics-port={port}")
        assert f"Warning: --metrics-port={port}: cannot listen" in said.err
        assert f"process {os.getpid()} " in host.ctl("status", status=None).out, "no user keeps the agent from running"
    wait_for(lambda: not host.status()["troubles"], "the port", 20)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        assert "calico_felix_failures 0.0" in answer.read().decode()


def test_in_the_foreground_it_tells_systemd_when_it_is_ready(bare_host: Host, tmp_path: Path) -> None:
    host = AgentHost(bare_host.etcd)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(20)
        agent = subprocess.Popen(
            [CALICOCTL, "node", "--ip=192.0.2.2", "--detach=false"],
            env=host.environment(NOTIFY_SOCKET=str(tmp_path / "notify")),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert told.recv(100) == b"READY=1"
    assert host.pid == agent.pid
    assert host.status()["first_update"]
    agent.terminate()
    out, err = agent.communicate(timeout=20)
    assert agent.returncode == 0 and "is registered" in out
    assert "INFO: the first snapshot is in the kernel" in err and "Traceback" not in err
    assert host.etcd.get("/calico/felix/v1/host/host1/status") is None


def test_status_is_for_everybody(node: AgentHost) -> None:
    nobody = {"command": [*AS_NOBODY, CALICOCTL]}
    assert "0 up, 0 down, 0 in error" in node.ctl("status", **nobody).out
    assert "must be run as root" in node.ctl("node", "stop", status=2, **nobody).err
    life = json.loads(node.etcd.get("/calico/felix/v1/host/host1/status"))
    assert (
        set(life) == {"time", "uptime", "first_update", "machine", "boot", "datastore"} and life["first_update"] is True
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", life["time"])
    assert 0 < node.etcd.ttl("/calico/felix/v1/host/host1/status") <= 30
    node.kill_agent()
    dead = node.ctl("status", status=1, **nobody)
    assert "not running" in dead.out and "not running" in dead.err
    assert node.status()["running"] is False
    assert "--output" in node.ctl("status", "--output=xml", status=2).err


def test_endpoints_that_claim_the_same(pair: AgentHost) -> None:
    """An address, or an interface, belongs to the endpoint whose record is older; the other one is told."""
    key = pair.key("b")
    record = pair.etcd.get(key)
    other = "/calico/v1/host/host1/workload/docker/a/endpoint/00000000000000000000000000000000"
    claim = {"state": "active", "mac": "02:00:00:00:00:09", "profile_ids": ["web"], "ipv4_nets": [f"{B4}/32"]}
    pair.etcd.delete(key)
    pair.etcd.put(other, claim)
    pair.etcd.put(key, record)
    pair.sync()
    assert pair.endpoint_status(key)["status"] == "error" and "already" in pair.endpoint_status(key)["reason"]
    assert pair.endpoint_status(other)["status"] == "down"
    assert not ping("a", B4)
    pair.etcd.delete(other)
    pair.sync()
    assert pair.endpoint_status(key)["status"] == "up"
    assert ping("a", B4, patience=PATIENT)
