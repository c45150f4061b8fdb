"""A failure of one workload, or of the Docker Engine, does not affect other workloads. With a running agent."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.system.agent import A4, B4, C4, AgentHost, holds, locked
from tests.system.conftest import HOME
from tests.system.support import Host, links, run, wait_for
from tests.system.test_datastore_watch import behind_proxy
from tests.system.test_workload_keeper import container_links, id_of, record

ENGINE = "/var/run/docker.sock"
SOON = 6.0
"""Seconds; a repair takes a few hundredths of one, and whoever waits for somebody else here waits for eight or more."""


def make_anew(host: AgentHost, namespace: str) -> None:
    """Delete a namespace and make one of the same name, and wait until it has been connected."""
    run("ip", "netns", "delete", namespace)
    run("ip", "netns", "add", namespace)

    def is_connected() -> bool:
        found = record(host, f"-netns-{namespace}/")
        return found is not None and found["state"] == "active" and "eth1" in links(namespace)

    wait_for(is_connected, host.log(), SOON)


def forge(namespace: str, index: int, peer: int, mac: str) -> None:
    """Give a namespace a pair of its own that looks, by its indices, as if it were paired with one of the host's."""
    pair = ("type", "veth", "peer", "name", "forged1", "index", str(peer))
    run("ip", "-n", namespace, "link", "add", "forged0", "index", str(index), "address", mac, *pair)


# the kernel


@pytest.mark.parametrize("kind", ["veth", "macvlan"])
def test_a_namespaces_user_cannot_have_the_hosts_interfaces_deleted(node: AgentHost, kind: str) -> None:
    node.add("a", A4)
    node.sync()
    run("ip", "netns", "add", "bystander")
    run("ip", "link", "add", "victim0", "type", "veth", "peer", "name", "eth0", "netns", "bystander")
    victim, index, peer = "victim0", links()["victim0"]["ifindex"], links("bystander")["eth0"]["ifindex"]
    if kind == "macvlan":  # for which the index of the interface it is on stands where a veth has its peer's
        run("ip", "link", "add", "victim1", "link", "victim0", "type", "macvlan")
        victim, index, peer = "victim1", links()["victim1"]["ifindex"], index
    mac = links("a")["eth1"]["address"]
    before = links("a")["eth1"]["ifindex"]
    with locked(node, "a"):  # so that it is forged before the repair
        run("ip", "-n", "a", "link", "delete", "eth1")
        forge("a", peer, index, mac)
    wait_for(lambda: links("a").get("eth1", {}).get("ifindex", before) != before, node.log())
    assert victim in links()
    # nor does what it has made keep others from knowing its own interface
    assert "already" in node.ctl("container", "add", "/var/run/netns/a", A4, status=1).err
    run("ip", "link", "delete", "victim0")


def test_a_link_between_namespaces_is_not_taken_for_an_endpoints(node: AgentHost) -> None:
    node.add("b", B4)
    node.sync()
    host_end = links()[node.interface("b")]["ifindex"]
    run("ip", "netns", "add", "a")
    forge("a", links("b")["eth1"]["ifindex"], host_end, "02:00:00:00:00:09")
    node.ctl("container", "add", "/var/run/netns/a", A4)
    node.sync()
    run("ip", "-n", "a", "link", "delete", "eth1")
    wait_for(lambda: "eth1" in links("a"), node.log(), SOON)


def test_a_name_that_is_no_longer_a_namespace_blocks_no_other(pair: AgentHost) -> None:
    """Its file is there, but not mounted on, while a process keeps the namespace alive."""
    holder = subprocess.Popen(["ip", "netns", "exec", "a", "sleep", "1000"])
    try:
        pair.ctl("node", "stop", "--force")
        run("umount", "--lazy", "/var/run/netns/a")
        pair.start_agent()
        make_anew(pair, "b")
    finally:
        holder.kill()
        holder.wait()
        Path("/var/run/netns/a").unlink()


def test_the_grace_time_starts_again_for_a_repaired_namespace(pair: AgentHost) -> None:
    """It came back once, but could not be connected: the time since it was first away does not count."""
    pair.ctl("config", "felix", "GraceTime", "3")
    pair.sync()
    run("ip", "netns", "delete", "a")
    wait_for(lambda: record(pair, "-netns-a/")["state"] == "inactive", pair.log())
    with locked(pair, "a"):  # so that it cannot be connected before that
        run("ip", "netns", "add", "a")
        run("ip", "-n", "a", "link", "set", "lo", "up")
        run("ip", "-n", "a", "route", "add", "default", "dev", "lo")
    wait_for(lambda: "has an IPv4 default route already" in pair.log(), pair.log())
    assert holds(lambda: record(pair, "-netns-a/") is not None, 4), "and longer than the grace time"
    run("ip", "netns", "delete", "a")
    assert holds(lambda: record(pair, "-netns-a/") is not None, 1.5), pair.log()
    wait_for(lambda: record(pair, "-netns-a/") is None, pair.log())


# the store


def test_actions_before_a_failure_are_reported(bare_host: Host) -> None:
    with behind_proxy(bare_host.etcd) as (host, proxy):
        host.ctl("container", "/var/run/netns/a", "ip", "add", C4)
        host.sync()
        healed = host.status()["healed"]
        with locked(host, "a"):
            # as if a command had been interrupted when it took the address away
            key = host.key("a")
            host.etcd.put(key, {**json.loads(host.etcd.get(key)), "ipv4_nets": [f"{A4}/32"]})
            proxy.refused = "/ipam/"
            run("ip", "-n", "a", "link", "delete", "eth1")
        wait_for(lambda: "does not permit" in host.log(), host.log())
        assert C4 in host.allocations()
        assert f"is re-attached: interface {host.interface('a')}" in host.log()
        wait_for(lambda: host.status()["healed"] == healed + 1, host.log())
        proxy.refused = None
        wait_for(lambda: C4 not in host.allocations(), host.log())


def test_an_endpoint_whose_workload_no_path_can_name_blocks_no_other(pair: AgentHost) -> None:
    key = f"/calico/v1/host/{pair.name}/workload/namespace/-x\0y/endpoint/{'1' * 32}"
    value = {"state": "active", "name": "cali11111111111", "mac": "02:00:00:00:00:01", "ipv4_nets": ["192.168.9.1/32"]}
    pair.etcd.put(key, value)
    pair.sync()
    for _ in range(2):
        make_anew(pair, "a")
    assert "failed" not in pair.log()


# the Docker Engine


class _Unix(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def get_request(self) -> tuple:
        return super().get_request()[0], ("", 0)


@dataclass
class Front:
    """What a test tells what stands in front of the engine."""

    hangs: set[str] = field(default_factory=set)
    """Containers that nothing at all is answered about."""
    list: bytes | None = None
    """What is answered when the containers are to be listed."""
    listed: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def in_front_of_the_engine(path: str) -> Iterator[Front]:
    """Answer at a socket as the engine does, but for what the test wants to be answered otherwise."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            if "containers/json" in self.path and front.list is not None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(front.list)
                front.listed.set()
                return
            if any(f"/{id}/" in self.path for id in front.hangs):
                ended.wait()
            with socket.socket(socket.AF_UNIX) as engine, contextlib.suppress(BrokenPipeError):
                engine.connect(ENGINE)
                engine.sendall(f"GET {self.path} HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n".encode())
                while data := engine.recv(2**16):
                    self.connection.sendall(data)

    front, ended = Front(), threading.Event()
    with _Unix(path, Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield front
        finally:
            ended.set()
            server.shutdown()


def restart(name: str) -> None:
    """Restart a container, and wait until it has its interface back."""
    run("docker", "restart", "--time=0", name)
    wait_for(lambda: "eth1" in container_links(name), f"{name}", SOON)


def test_a_container_that_the_engine_does_not_answer_about_blocks_no_other(
    bare_host: Host, engine: None, tmp_path: Path
) -> None:
    host = AgentHost(bare_host.etcd)
    place = str(tmp_path / "docker.sock")
    with in_front_of_the_engine(place) as front:
        host.start_agent(DOCKER_HOST=f"unix://{place}")
        try:
            for name, address in (("workload", A4), ("peer", B4)):
                run("docker", "run", "--net=none", "--name", name, "-tid", "busybox")
                host.ctl("container", "add", name, address)
            host.add("c", C4)
            host.sync()
            restart("peer")
            front.hangs.add(id_of("workload"))
            run("ip", "link", "delete", record(host, id_of("workload"))["name"])
            for _ in range(2):
                restart("peer")
                make_anew(host, "c")
            said = f"docker {id_of('workload')}: Cannot ask Docker"
            wait_for(lambda: said in str(host.status()["last_error"]), host.log(), 40)
        finally:
            host.kill_agent()
            run("docker", "rm", "-f", "workload", "peer")


def test_a_hanging_engine_blocks_no_namespace(bare_host: Host, engine: None) -> None:
    host = AgentHost(bare_host.etcd)
    host.start_agent()
    run("docker", "run", "--net=none", "--name", "workload", "-tid", "busybox")
    pid = int((HOME / "docker/pid").read_text())
    try:
        host.ctl("container", "add", "workload", A4)
        host.add("b", B4)
        host.sync()
        os.kill(pid, signal.SIGSTOP)
        run(
            "ip",
            "link",
            "delete",
            json.loads(host.etcd.get(next(k for k in host.records() if "/docker/" in k)))["name"],
        )
        for _ in range(2):
            make_anew(host, "b")
        os.kill(pid, signal.SIGCONT)
        wait_for(lambda: "eth1" in container_links("workload"), host.log(), 60)
    finally:
        os.kill(pid, signal.SIGCONT)
        run("docker", "rm", "-f", "workload")


@pytest.mark.parametrize("answer", [b"null", b'[{"Names": 3}]', b"["])
def test_an_invalid_list_of_containers_is_no_fatal_error(
    bare_host: Host, engine: None, tmp_path: Path, answer: bytes
) -> None:
    host = AgentHost(bare_host.etcd)
    place = str(tmp_path / "docker.sock")
    with in_front_of_the_engine(place) as front:
        host.start_agent(DOCKER_HOST=f"unix://{place}")
        host.add_pair()
        host.sync()
        front.list = answer
        host.read_anew()  # and ask the engine for its list
        wait_for(front.listed.is_set, host.log())
        make_anew(host, "a")


# commands


def test_wait_0_reports_the_current_state(pair: AgentHost) -> None:
    pair.kill_agent()
    run("ip", "link", "delete", pair.interface("b"))
    said = pair.ctl("container", "add", "/var/run/netns/b", B4, "--wait=0", status=1).err
    assert "the agent of this host is not running" in said


def test_a_namespace_full_of_interfaces_or_routes_delays_no_other(pair: AgentHost) -> None:
    """The agent looks for its own interfaces only, and gives up on a namespace that has too much else."""
    run("ip", "-n", "a", "-batch", "-", input="\n".join(f"link add x{n} type veth peer name y{n}" for n in range(1500)))
    run("ip", "-n", "a", "link", "delete", "eth1")
    run("ip", "-n", "b", "link", "delete", "eth1")
    wait_for(lambda: run("ip", "-n", "b", "link", "show", "eth1", check=False).status == 0, pair.log(), 4)
    wait_for(lambda: run("ip", "-n", "a", "link", "show", "eth1", check=False).status == 0, pair.log(), 4)
    # what it has too many of is its own failure
    routes = (f"route add 10.{n >> 8}.{n & 255}.0/24 dev eth1" for n in range(20_001))
    run("ip", "-n", "a", "-batch", "-", input="\n".join(routes))
    said = pair.ctl("container", "/var/run/netns/a", "ip", "add", "192.168.0.7", status=1).err
    assert "more than 20000" in said and said.count("\n") == 1
    pair.ctl("container", "/var/run/netns/b", "ip", "add", "192.168.0.7")
    pair.ctl("container", "remove", "/var/run/netns/a")
