"""The agent next to agents of other names, foreign routes, firewalls, users and sysctls on one host."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.agent import A4, ALLOW, B4, LOG_DIR, AgentHost, kernel, outside_host
from tests.system.support import (
    AS_NOBODY,
    CALICOCTL,
    HOST_IP,
    Etcd,
    Host,
    calico_links,
    free_port,
    gone,
    links,
    run,
    wait_for,
)
from tests.system.traffic import PATIENT, ends, flows, inside, listener, ping, reset_on_close, udp


def as_nobody(host: Host, *words: str, status: int = 0) -> str:
    return host.ctl(*words, status=status, command=[*AS_NOBODY, CALICOCTL]).out


# agents


def test_an_agent_of_another_name_is_refused(pair: AgentHost) -> None:
    other = Host(pair.etcd, "host1.example.com")
    before = pair.etcd.tree()
    said = other.ctl("node", "--ip=192.0.2.2", f"--log-dir={LOG_DIR}", status=1).err
    assert f"for the host name host1 (process {pair.pid})" in said
    assert "for the host name host1" in other.ctl("node", "remove", status=1).err
    foreground = other.ctl("node", "--ip=192.0.2.2", "--detach=false", status=1).err
    assert "for the host name host1" in foreground
    after = pair.etcd.tree()
    assert before.keys() == after.keys() and ping("a", B4, patience=PATIENT)
    pair.kill_agent()
    mark = Path(f"/run/calico/agent.{Path('/proc/self/ns/net').stat().st_ino}")
    assert mark.read_text() == "host1"  # which nobody holds any more
    other.ctl("node", "--ip=192.0.2.2", f"--log-dir={LOG_DIR}", "--force")
    assert "for the host name host1.example.com" in pair.ctl("node", f"--ip={HOST_IP}", status=1).err
    other.ctl("node", "remove")


def test_options_that_a_running_agent_does_not_take_on(node: AgentHost) -> None:
    port = free_port()
    said = node.ctl("node", f"--ip={HOST_IP}", f"--metrics-port={port}", f"--log-dir={LOG_DIR}")
    assert "running already" in said.out and "--metrics-port has no effect" in said.err
    node.ctl("node", "stop")
    pid_file = Path(f"/run/calico/{node.name}/felix.pid")
    pid_file.write_text("4194200 123456789012345678\n")  # of one that was killed
    node.ctl("node", f"--ip={HOST_IP}", f"--metrics-port={port}", f"--log-dir={LOG_DIR}")
    assert len(pid_file.read_text().split()) == 2
    assert node.ctl("node", f"--ip={HOST_IP}", f"--metrics-port={port}", f"--log-dir={LOG_DIR}").err == ""


# users


def test_every_user_may_see_the_status_and_none_can_block_the_agent(bare_host: Host) -> None:
    host = AgentHost(bare_host.etcd)
    start = ["sh", "-c", 'umask 077; exec "$@"', "x", CALICOCTL, "node", f"--ip={HOST_IP}", f"--log-dir={LOG_DIR}"]
    run(*start, env=host.environment())
    assert "running since" in as_nobody(host, "status")
    held = 0
    for file in Path("/run/calico").rglob("*"):
        if (file.is_file() and "lock" in file.name) or file.name.startswith("agent."):
            assert file.stat().st_mode & 0o777 == 0o600
            held += 1
    assert held == 2
    pid_file = f"/run/calico/{host.name}/felix.pid"
    command = [*AS_NOBODY, "flock", "-s", pid_file, "sh", "-c", "echo; read end"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        host.ctl("node", "stop")
        assert as_nobody(host, "status", status=1) != ""
        host.start_agent()
        host.ctl("node", "remove")
    finally:
        holder.communicate(b"\n")


# routes and settings


def test_others_routes_to_an_endpoint_stay(bare_host: Host) -> None:
    host = AgentHost(bare_host.etcd)
    with outside_host():
        theirs = ("192.168.0.1/32", "fd80:24e2:f998:72d6::1/128")
        run("ip", "route", "add", theirs[0], "via", "198.51.100.2", "proto", "static")
        run("ip", "route", "add", theirs[1], "via", "2001:db8:1::2", "proto", "static")
        before = kernel()
        host.start_agent()
        host.add_pair()
        host.ctl("container", "/var/run/netns/a", "ip", "add", "fd80:24e2:f998:72d6::1")
        host.sync()
        assert (
            ping("b", A4, patience=PATIENT)
            and ping(None, A4, patience=PATIENT)
            and ping(None, "fd80:24e2:f998:72d6::1", patience=PATIENT)
        )
        host.ctl("node", "stop", "--force")
        host.start_agent()
        host.sync()
        assert ping("b", A4, patience=PATIENT) and ping(None, "fd80:24e2:f998:72d6::1", patience=PATIENT)
        host.ctl("node", "remove", "--remove-endpoints")
        after = kernel()
        for route in theirs:
            run("ip", "route", "del", route)
        static = [[line for line in text["routes"].splitlines() if "proto static" in line] for text in (before, after)]
        assert static[0] == static[1] and len(set(static[0])) == 2


def test_router_advertisements_reach_an_interface_that_comes_later(bare_host: Host) -> None:
    host = AgentHost(bare_host.etcd)
    run("sysctl", "-qw", "net.ipv6.conf.all.forwarding=0")
    host.start_agent()
    run("ip", "link", "add", "later", "type", "veth", "peer", "name", "later2")

    def accepts() -> str:
        return Path("/proc/sys/net/ipv6/conf/later/accept_ra").read_text().strip()

    try:
        assert accepts() == "1"
        wait_for(lambda: accepts() == "2", host.log(), 20)
        host.ctl("node", "remove")
        assert accepts() == "1"
    finally:
        run("ip", "link", "delete", "later")


def test_packets_from_the_host_to_an_unknown_interface(node: AgentHost) -> None:
    run("ip", "netns", "add", "u")
    run("ip", "link", "add", "caliunknown", "type", "veth", "peer", "name", "u0", "netns", "u")
    run("ip", "-n", "u", "link", "set", "u0", "up")
    run("ip", "-n", "u", "address", "add", "203.0.113.9/32", "dev", "u0")
    run("ip", "-n", "u", "route", "add", "default", "dev", "u0")
    run("ip", "link", "set", "caliunknown", "up")
    run("ip", "route", "add", "203.0.113.9/32", "dev", "caliunknown")
    mac = links("u")["u0"]["address"]
    run("ip", "neigh", "add", "203.0.113.9", "lladdr", mac, "dev", "caliunknown", "nud", "permanent")
    try:
        assert not udp(None, "u", "203.0.113.9", 99)
        node.kill_agent()
        run("nft", "flush", "ruleset")
        assert udp(None, "u", "203.0.113.9", 99, patience=PATIENT)
    finally:
        run("ip", "link", "delete", "caliunknown")


# firewalls


@pytest.fixture
def forward_drops() -> Iterator[None]:
    """A firewall like Docker's."""
    run("iptables", "-N", "DOCKER-USER")
    run("iptables", "-A", "FORWARD", "-j", "DOCKER-USER")
    run("iptables", "-A", "DOCKER-USER")  # which only counts
    run("iptables", "-P", "FORWARD", "DROP")
    yield
    run("iptables", "-P", "FORWARD", "ACCEPT")
    run("iptables", "-F")
    run("iptables", "-X")


def rules(chain: str) -> str:
    return run("iptables", "-S", chain).out


def test_a_chain_that_is_no_longer_used(bare_host: Host, forward_drops: None) -> None:
    host = AgentHost(bare_host.etcd)
    host.start_agent()
    host.add_pair()
    host.sync()
    assert rules("DOCKER-USER").count("cali+") == 2 and ping("a", B4, patience=PATIENT)
    run("iptables", "-F")
    wait_for(lambda: ping("a", B4), host.log(), 10)
    assert rules("FORWARD").count("cali+") == 2 and "cali+" not in rules("DOCKER-USER")
    found = json.loads(host.ctl("checksystem", "--output=json").out)
    assert next(check for check in found if check["name"] == "Docker's firewall")["ok"]
    run("iptables", "-A", "FORWARD", "-j", "DOCKER-USER")
    wait_for(lambda: rules("DOCKER-USER").count("cali+") == 2 and "cali+" not in rules("FORWARD"), host.log(), 10)
    host.ctl("node", "remove", "--remove-endpoints")
    assert "cali+" not in run("iptables", "-S").out


# stores


def test_removing_a_host_asks_its_own_store(bare_host: Host, tmp_path: Path) -> None:
    """Not the local one that it had before, when its own is away; nobody is cut off for that."""
    local = AgentHost(bare_host.etcd, endpoints="http://127.0.0.1:4001")
    local.ctl("node", "--local-etcd", f"--ip={HOST_IP}", f"--log-dir={LOG_DIR}")
    local.ctl("node", "stop")
    moved = Etcd(tmp_path / "moved", port=4001)
    moved.start()
    moved.await_ready()
    try:
        host = AgentHost(moved, endpoints="http://127.0.0.1:4001")
        host.start_agent()
        host.add_pair()
        host.sync()
        moved.stop()
        said = host.ctl("node", "remove", "--remove-endpoints", status=1).err
        assert "etcd cannot be reached" in said and len(calico_links()) == 2 and ping("a", B4, patience=PATIENT)
        moved.start()
        moved.await_ready()
        host.ctl("node", "remove", "--remove-endpoints")
    finally:
        moved.stop()
        run("rm", "-rf", "/var/lib/calico/etcd")


def etcd_pid(host: Host) -> int:
    return int(Path(f"/run/calico/{host.name}/etcd.pid").read_text())


def test_the_local_etcd_ends_with_an_agent_in_the_foreground_and_is_not_ended_by_mistake(bare_host: Host) -> None:
    host = AgentHost(bare_host.etcd, endpoints="http://127.0.0.1:4001")
    words = ("node", "--local-etcd", f"--ip={HOST_IP}", f"--log-dir={LOG_DIR}")
    # what would be etcd's own settings
    host.ctl(*words, env={"ETCD_DATA_DIR": "/nowhere", "ETCD_NAME": "x"})
    try:
        run("ip", "netns", "add", "a")
        host.ctl("container", "add", "/var/run/netns/a", A4)
        host.kill_agent()
        assert "There is 1 active endpoint on" in host.ctl("node", "stop", status=1).err
        pid = etcd_pid(host)
        assert not gone(pid)
        agent = host.start(*words, "--detach=false")
        wait_for(lambda: host.status()["report"]["current"], "the agent")  # which handles signals then
        agent.send_signal(signal.SIGTERM)
        agent.communicate(timeout=60)
        assert agent.returncode == 0
        wait_for(lambda: gone(pid), "etcd's end")
        host.ctl("node", "remove", "--remove-endpoints")
    finally:
        run("rm", "-rf", "/var/lib/calico/etcd")


def test_one_bad_record_keeps_no_host_from_being_removed(pair: AgentHost) -> None:
    keys = [f"/calico/v1/host/host1/workload/{o}/w/endpoint/{'b' * 32}" for o in ("aaa", "zzz")]
    for key in keys:
        pair.etcd.put(key, "{not json")
    assert "There are 2 active endpoints" in pair.ctl("node", "stop", status=1).err
    before = pair.pid
    pair.ctl("node", "remove", "--remove-endpoints")
    assert gone(before) and calico_links() == set() and pair.records() == {}
    assert "calico" not in run("nft", "list", "tables").out
    wait_for(lambda: not list(Path("/run").glob("calico/*")), "the end of the command server")


# the interface's own address


def test_connections_from_a_link_local_address_end_too(pair: AgentHost) -> None:
    pair.ctl("container", "/var/run/netns/a", "ip", "add", "ipv6")
    pair.sync()
    (host_end,) = [a["local"] for a in links()[pair.interface("a")]["addr_info"] if a["local"].startswith("fe80")]

    def connected() -> socket.socket | None:
        client = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        client.settimeout(0.5)
        try:
            client.connect((host_end, 2222, 0, socket.if_nametoindex("eth1")))
            return client
        except OSError:
            client.close()
            return None

    changes: dict[str, Callable[[], None]] = {
        "rules": lambda: pair.profile("web", inbound=[ALLOW], outbound=[{"action": "deny"}]),
        "action": lambda: pair.etcd.put("/calico/v1/host/host1/config/DefaultEndpointToHostAction", "DROP"),
        "profiles": lambda: pair.set_profiles("a"),
    }
    with listener(None, "::", 2222) as server:
        for change, make in changes.items():
            pair.profile("web", inbound=[ALLOW])
            pair.etcd.put("/calico/v1/host/host1/config/DefaultEndpointToHostAction", "RETURN")
            pair.set_profiles("a", "web")
            pair.sync()
            client = wait_for(lambda: inside("a", connected), "the connection")
            accepted, _ = server.accept()
            with client, accepted:
                assert flows(client, accepted, patience=PATIENT), change
                make()
                ends(client, accepted)
                assert inside("a", connected) is None
                reset_on_close(client)
                reset_on_close(accepted)
