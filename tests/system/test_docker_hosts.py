"""Docker networks on two hosts, each with a Docker Engine of its own: one network, one pool, one profile."""

from __future__ import annotations

import ipaddress
import json
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.system.fabric import FabricHost, fabric
from tests.system.support import Host, Result, import_busybox, run, start_docker, wait_for
from tests.system.test_docker_networks import CREATE
from tests.system.test_hosts import open_etcds

RULES = "/calico/v1/policy/profile/net1/rules"


class DockerHost:
    """A host with an engine, an agent and the process for Docker networks.

    The engine sees the host's network and files; `/run/docker`, where it looks for plugins, is the host's own as well.
    """

    def __init__(self, host: FabricHost) -> None:
        self.host = host
        self.socket = f"unix://{host.home}/docker.sock"
        self._engine: subprocess.Popen | None = None

    def start(self) -> None:
        self.host.run("mkdir", "-p", "/run/docker")
        self.host.run("mount", "-t", "tmpfs", "tmpfs", "/run/docker")
        # `ip netns exec` has mounted another /sys
        for line in Path("/proc/self/mounts").read_text().splitlines():
            device, folder, kind, options = line.split()[:4]
            if folder.startswith("/sys/fs/cgroup"):
                self.host.run("mkdir", "-p", folder)
                self.host.run("mount", "-t", kind, "-o", options, device, folder)
        (self.host.home / "etc/node.env").write_text(f"DOCKER_HOST={self.socket}\n")
        self._engine = start_docker(self.host.home / "engine", host=self.socket, inside=self.host.inside())
        import_busybox(self.host.home / "busybox", self.socket)
        self.host.start_agent("--libnetwork")

    def end(self) -> None:
        """Remove all containers, and end the engine."""
        if self._engine is not None:
            self.clear()
            self._engine.send_signal(signal.SIGTERM)
            self._engine.wait()

    def clear(self) -> None:
        """Remove all containers and Calico networks."""
        for what, command in (("ps -aq", "rm -f"), ("network ls -q --filter=driver=calico", "network rm")):
            if found := self.docker(*what.split()).out.split():
                self.docker(*command.split(), *found)

    def docker(self, *words: str, check: bool = True) -> Result:
        return run("docker", "--host", self.socket, *words, check=check)

    def create(self, name: str, *options: str) -> None:
        """Create a network, and wait until its profile exists."""
        self.docker(*CREATE[1:], *options, name)
        wait_for(lambda: name in [one["name"] for one in self.networks() if one["has_profile"]], self.log())

    def networks(self) -> list[dict]:
        """Return what this host's files say of its networks."""
        folder = self.host.home / "lib/calico" / self.host.name / "networks"
        return [json.loads(file.read_text()) for file in folder.glob("[!.]*")]  # others are being written

    def start_container(self, name: str, network: str, *options: str, check: bool = True) -> Result:
        words = ("--stop-signal=KILL", "--net", network, "--name", name, *options, "-tid", "busybox")
        return self.docker("run", *words, check=check)

    def address(self, name: str) -> str:
        (network,) = json.loads(self.docker("inspect", name).out)[0]["NetworkSettings"]["Networks"].values()
        return network["IPAddress"]

    def reaches(self, name: str, address: str) -> bool:
        return self.docker("exec", name, "ping", "-c1", "-W1", address, check=False).status == 0

    def await_reach(self, name: str, address: str) -> None:
        wait_for(lambda: self.reaches(name, address), f"an answer from {address}\n{self.log()}")

    def log(self) -> str:
        return (self.host.home / "log/calico/plugins.log").read_text()

    def interfaces(self) -> list[str]:
        shown = json.loads(self.host.run("ip", "-json", "link").out)
        return [link["ifname"] for link in shown if link["ifname"].startswith(("cali", "tmp"))]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[DockerHost]]:
    with open_etcds(tmp_path_factory.mktemp("etcd")) as (etcd,), fabric(etcd, 0, 0) as hosts, ExitStack() as undo:
        two = [DockerHost(host) for host in hosts]
        for one in two:
            undo.callback(one.end)
        with ThreadPoolExecutor() as pool:
            list(pool.map(DockerHost.start, two))
        hosts[0].ctl("config", "bgp", "HoldTime", "3")
        yield two


def test_one_network_on_two_hosts(two: list[DockerHost]) -> None:
    one, other = two
    etcd = one.host.etcd
    pools = etcd.tree("/calico/v1/ipam")
    one.create("net1", "--subnet=192.168.0.0/16")
    one.host.ctl("profile", "net1", "rule", "add", "inbound", "allow", "from", "tag", "friends")
    rules, revision = etcd.get(RULES), etcd.revision(RULES)
    other.create("net1", "--subnet=192.168.0.0/16")
    assert (etcd.get(RULES), etcd.revision(RULES)) == (rules, revision)
    assert set(etcd.tree("/calico/v1/policy/profile")) == {RULES, RULES.replace("rules", "tags")}
    assert etcd.tree("/calico/v1/ipam") == pools

    one.start_container("web", "net1")
    other.start_container("db", "net1", "--ip=192.168.7.1")
    one.await_reach("web", "192.168.7.1")
    other.await_reach("db", one.address("web"))

    # an address of the other host's
    wait_for(lambda: "db" in other.host.ctl("endpoint", "show", "--detailed").out, "the container's name")
    refused = one.start_container("app", "net1", "--ip=192.168.7.1", check=False)
    assert refused.status != 0 and f"IP 192.168.7.1 is already assigned (db on host {other.host.name})" in refused.err
    one.docker("rm", "-f", "app")
    assert one.reaches("web", "192.168.7.1")

    # what one host forgets, the other keeps
    one.docker("rm", "-f", "web")
    one.docker("network", "rm", "net1")
    assert one.networks() == [] and len(other.networks()) == 1 and etcd.get(RULES) == rules
    other.start_container("late", "net1")
    other.await_reach("late", "db")
    one.create("net1", "--subnet=192.168.0.0/16")
    one.start_container("web", "net1")
    one.await_reach("web", "192.168.7.1")
    assert etcd.revision(RULES) == revision
    await_nothing_left(two)


def test_policy_by_profile_between_hosts(two: list[DockerHost]) -> None:
    one, other = two
    for host in two:
        host.create("shop")
        host.create("lab")
    one.host.ctl("profile", "add", "closed")
    other.host.ctl("profile", "shop", "rule", "add", "inbound", "allow", "from", "tag", "closed")
    one.start_container("web", "shop")
    other.start_container("db", "lab")
    other.start_container("app", "shop")
    other.await_reach("app", one.address("web"))
    assert not other.reaches("db", one.address("web"))
    one.host.ctl("container", "web", "profile", "append", "lab")
    other.await_reach("db", one.address("web"))
    one.host.ctl("container", "web", "profile", "set", "closed")
    wait_for(lambda: not other.reaches("app", one.address("web")), "the end of what was allowed")
    one.docker("restart", "--time=0", "web")
    one.await_reach("web", other.address("app"))
    assert not other.reaches("app", one.address("web"))
    await_nothing_left(two)


def test_no_address_is_assigned_twice(two: list[DockerHost]) -> None:
    """Both hosts take their addresses from one block, at once; they create the network at once, too."""
    two[0].host.ctl("pool", "add", "10.65.0.0/26")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda host: host.create("net3", "--subnet=10.65.0.0/26"), two))
        started = [(host, f"web{number}") for number in range(3) for host in two]
        list(pool.map(lambda what: what[0].start_container(what[1], "net3"), started))
    addresses = {host.address(name) for host, name in started}
    assert len(addresses) == len(started)
    assert all(ipaddress.ip_address(address) in ipaddress.ip_network("10.65.0.0/26") for address in addresses)
    for host in two:
        for address in addresses:
            host.await_reach("web0", address)
    await_nothing_left(two)


def await_nothing_left(two: list[DockerHost]) -> None:
    """Remove all containers and networks; fail if anything of them is left but the profiles."""
    for host in two:
        host.clear()
    store = Host(two[0].host.etcd)
    assert (store.records(), store.allocations(), store.handles()) == ({}, {}, {})
    for host in two:
        assert host.interfaces() == [] and host.networks() == []
        assert "agree" in host.host.ctl("ipam", "check").out
