"""Containers that a runtime attaches through CNI: by the plugin itself, and by containerd's ctr."""

from __future__ import annotations

import fcntl
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.agent import A4, C4, AgentHost, holds
from tests.system.support import (
    CALICOCTL,
    FAULTY,
    HOST_IP,
    Etcd,
    Host,
    Result,
    addresses,
    calico_links,
    links,
    routes,
    run,
    wait_for,
)

ROOT = Path(__file__).parent.parent.parent
PLUGIN = (sys.executable, "-I", "-c", "from calicoctl.cli.command_client import cni; cni()")
FIRST4, FIRST6 = "192.168.0.0", "fd80:24e2:f998:72d6::"


@dataclass
class Answer:
    """The exit status of the plugin, and the JSON object that it has printed; None if it has printed nothing."""

    status: int
    said: dict | None


class Network:
    """A network's configuration, and the plugin, called as a runtime calls it."""

    def __init__(self, host: Host, **config: object) -> None:
        self.host = host
        self.config: dict = {"cniVersion": "1.1.0", "name": "net1", "type": "calico", **config}

    def environment(self, command: str, id: str = "c1", **variables: str) -> dict[str, str]:
        given = {"CNI_COMMAND": command, "CNI_CONTAINERID": id, "CNI_IFNAME": "eth0", "CNI_PATH": "/opt/cni/bin"}
        return self.host.environment(**{**given, "CNI_NETNS": f"/var/run/netns/{id}", **variables})

    def call(self, command: str, id: str = "c1", config: dict | None = None, **variables: str) -> Answer:
        """Call the plugin for the container `id`, whose namespace has the same name; `config` adds to the network's."""
        text = json.dumps({**self.config, **(config or {})})
        done = run(*PLUGIN, check=False, input=text, env=self.environment(command, id, **variables))
        assert "Traceback" not in done.err and "Internal error" not in done.out, done
        return Answer(done.status, json.loads(done.out) if done.out else None)

    def add(self, id: str = "c1", config: dict | None = None, **variables: str) -> dict:
        answer = self.call("ADD", id, config, **variables)
        assert answer.status == 0 and answer.said is not None, answer
        return answer.said

    def delete(self, id: str = "c1", **variables: str) -> None:
        assert self.call("DEL", id, **variables) == Answer(0, None)

    def refusal(self, command: str, id: str = "c1", config: dict | None = None, **variables: str) -> tuple[int, str]:
        """Call the plugin, which must fail; return the code and the message of its answer."""
        answer = self.call(command, id, config, **variables)
        assert answer.status == 1 and answer.said is not None, answer
        assert answer.said["cniVersion"] == self.config["cniVersion"]
        return answer.said["code"], answer.said["msg"]


def namespaces(*names: str) -> None:
    for name in names:
        run("ip", "netns", "add", name)


def pings(source: str, address: str, patience: str = "1") -> bool:
    return run("ip", "netns", "exec", source, "ping", "-c1", f"-W{patience}", address, check=False).status == 0


@contextmanager
def process_in(namespace: str) -> Iterator[int]:
    """Run a process in a namespace, which keeps it, inside `with`; yield the process's id."""
    process = subprocess.Popen(["ip", "netns", "exec", namespace, "sleep", "1000"])
    try:
        wait_for(lambda: run("ip", "netns", "pids", namespace).out.strip() == str(process.pid), "the process")
        yield process.pid
    finally:
        process.kill()
        process.wait()


def await_up(host: AgentHost, id: str) -> None:
    """Wait until the agent reports that a container's endpoint is up."""

    def is_up() -> bool:
        keys = [key for key in host.records() if f"/cni/{id}/" in key]
        return bool(keys) and (host.endpoint_status(keys[0]) or {}).get("status") == "up"

    wait_for(is_up, f"the endpoint\n{host.log()}", 20)


# The plugin


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_a_container_is_attached_and_detached(host: Host, version: str) -> None:
    namespaces("c1")
    network = Network(host, cniVersion=version, pool=["ipv4", "ipv6"], dns={"nameservers": ["192.0.2.53"]})
    result = network.add()
    assert result["cniVersion"] == version and result["dns"] == {"nameservers": ["192.0.2.53"]}
    outer, inner = result["interfaces"]
    assert calico_links() == {outer["name"]} and outer["mac"] == "ee:ee:ee:ee:ee:ee" and "sandbox" not in outer
    assert inner == {"name": "eth0", "mac": links("c1")["eth0"]["address"], "sandbox": "/var/run/netns/c1"}
    assert [(ip["address"], ip["gateway"], ip["interface"]) for ip in result["ips"]] == [
        (f"{FIRST4}/32", HOST_IP, 1),
        (f"{FIRST6}/128", "2001:db8::2", 1),
    ]
    assert [ip.get("version") for ip in result["ips"]] == (["4", "6"] if version < "1" else [None, None])
    assert result["routes"] == [{"dst": "0.0.0.0/0", "gw": HOST_IP}, {"dst": "::/0", "gw": "2001:db8::2"}]
    assert addresses("c1", "eth0") == {f"{FIRST4}/32", f"{FIRST6}/128"}
    assert f"default via {HOST_IP} dev eth0 proto static" in routes("c1")
    (key,) = host.records()
    assert "/workload/cni/c1/endpoint/" in key and host.record()["profile_ids"] == ["net1"]
    assert json.loads(host.etcd.get("/calico/v1/policy/profile/net1/tags") or "") == ["net1"]
    if version >= "0.4":
        assert network.call("CHECK", config={"prevResult": result}) == Answer(0, None)
    else:
        assert network.refusal("CHECK", config={"prevResult": result})[0] == 1
    host.check_consistent()
    network.delete()
    network.delete()
    host.check_nothing_left()


def test_the_configuration_names_profiles_and_pools(host: Host) -> None:
    namespaces("c1", "c2", "c3")
    host.ctl("pool", "add", "10.9.0.0/24")
    network = Network(host, profile=["web", "db"], pool="10.9.0.0/24")
    assert "web" in network.refusal("ADD")[1]
    host.check_nothing_left(folders=False)
    host.ctl("profile", "add", "web")
    host.ctl("profile", "add", "db")
    assert network.add()["ips"][0]["address"] == "10.9.0.0/32"
    assert host.record()["profile_ids"] == ["web", "db"]
    fixed = network.add("c2", CNI_ARGS="IgnoreUnknown=1;IP=10.9.0.77;K8S_POD_NAME=shop")
    assert [ip["address"] for ip in fixed["ips"]] == ["10.9.0.77/32"]
    assert "shop" in host.ctl("endpoint", "show", "--detailed").out
    code, why = network.refusal("ADD", "c3", CNI_ARGS="IP=10.9.0.77")
    assert code == 100 and "(shop on host host1). Give it another, or no address for any." in why
    assert "not in the pool" in network.refusal("ADD", "c3", CNI_ARGS=f"IP={A4}")[1]
    asked = network.add("c3", {"pool": ["ipv4", "ipv6"], "runtimeConfig": {"ips": [f"{C4}/16"]}})
    assert [ip["address"].partition("/")[0] for ip in asked["ips"]] == [C4, FIRST6]
    host.check_consistent()


def test_containers_reach_each_other_as_profiles_allow(node: AgentHost) -> None:
    namespaces("c1", "c2", "c3")
    network = Network(node, pool=["ipv4", "ipv6"])
    network.add("c1", CNI_ARGS="K8S_POD_NAME=shop")
    inside = [ip["address"].partition("/")[0] for ip in network.add("c2")["ips"]]
    (other,) = [ip["address"].partition("/")[0] for ip in Network(node, name="net2").add("c3")["ips"]]
    for id in ("c1", "c2", "c3"):
        await_up(node, id)
    assert all(pings("c1", address, "5") for address in inside)
    assert not pings("c1", other)
    for source in ("shop", "c1"):
        allowed, denied = (
            node.ctl("profile", "trace", source, to, "tcp", "80", status=None) for to in (inside[0], "c3")
        )
        assert (allowed.status, denied.status) == (0, 1), (allowed, denied)
    node.ctl("container", "c3", "profile", "append", "net1")
    node.sync()
    assert pings("c3", inside[0], "5")
    assert node.ctl("ipam", "check").status == 0
    assert not node.status()["problems"]


def test_an_attachment_ends_with_whatever_is_left_of_it(host: Host) -> None:
    """As containerd's ctr does, which names no namespace, and for a namespace that no longer exists."""
    namespaces("c1", "c2")
    network = Network(host)
    network.add("c1")
    network.delete("c1", CNI_NETNS="")
    network.add("c1")
    run("ip", "netns", "delete", "c1")
    network.delete("c1")
    network.delete("never-attached", CNI_NETNS="/proc/4194304/ns/net")
    network.add("c2")
    run("ip", "link", "delete", *calico_links())
    network.delete("c2")
    host.check_nothing_left()


@pytest.mark.parametrize("interface", ["eth0", "eth1"])
def test_a_container_is_in_one_network(host: Host, interface: str) -> None:
    """What the runtime undoes after the refusal must not undo the first attachment."""
    namespaces("c1")
    network = Network(host)
    network.add()
    code, why = Network(host, name="net2").refusal("ADD", CNI_IFNAME=interface)
    assert code == 100 and "one Calico network" in why
    assert host.etcd.get("/calico/v1/policy/profile/net2/tags") is None
    Network(host, name="net2").delete(CNI_IFNAME=interface)
    host.check_consistent()
    assert set(links("c1")) == {"eth0"}
    network.delete()
    host.check_nothing_left()


def test_a_container_that_has_lost_its_interface_stays_in_its_network(host: Host) -> None:
    namespaces("c1")
    network, other = Network(host), Network(host, name="net2")
    network.add()
    run("ip", "link", "delete", *calico_links())
    code, why = other.refusal("ADD", CNI_IFNAME="eth1")
    assert code == 100 and f"has {FIRST4} on eth0 already" in why
    other.delete(CNI_IFNAME="eth1")
    assert host.record()["profile_ids"] == ["net1"]
    network.add()
    assert "eth0" in links("c1")
    run("ip", "netns", "delete", "c1")
    namespaces("c1")
    other.add(CNI_IFNAME="eth1")  # in another namespace, as after a reboot
    assert host.record()["profile_ids"] == ["net2"]
    host.check_consistent()


def test_commands_know_the_container_by_its_id_and_its_name(host: Host) -> None:
    namespaces("c1", "feed00112233")
    network = Network(host)
    network.add(CNI_ARGS="K8S_POD_NAME=shop")
    network.add("feed00112233")
    host.ctl("profile", "add", "web")
    for name in ("c1", "shop", "feed0011"):
        host.ctl("container", name, "profile", "set", "web")
        assert host.ctl("container", name, "profile", "show").out.count("web") == 1
    for words in (("add", "shop", "ipv4"), ("feed0011", "ip", "add", "ipv4")):
        assert "only its runtime can connect it" in host.ctl("container", *words, status=1).err
    host.ctl("container", "remove", "shop", "feed0011")
    host.check_nothing_left()
    network.delete()
    network.add()
    host.ctl("node", "remove", "--remove-endpoints")
    assert not calico_links() and not host.allocations()
    assert not list(Path("/var/lib/calico").glob("*/workloads/cni/*"))


def test_a_container_with_a_default_route_is_refused(host: Host) -> None:
    namespaces("c1")
    run("ip", "-n", "c1", "link", "set", "lo", "up")
    run("ip", "-n", "c1", "route", "add", "default", "dev", "lo")
    code, why = Network(host).refusal("ADD")
    assert code == 100 and "default route already (dev lo)" in why and "Leave out its other network" in why
    host.check_nothing_left()


def test_a_container_with_a_new_namespace_is_attached_anew(host: Host) -> None:
    """As after a reboot: runtimes do not detach what was attached before."""
    namespaces("c1")
    network = Network(host)
    network.add(CNI_ARGS=f"IP={A4}")
    run("ip", "netns", "delete", "c1")
    namespaces("c1")
    network.add(CNI_ARGS=f"IP={A4}")
    host.check_consistent()
    assert addresses("c1", "eth0") == {f"{A4}/32"}


def test_check_compares_the_kernel_and_the_store_with_the_result(host: Host) -> None:
    namespaces("c1")
    network = Network(host)
    result = network.add()

    def why(**changed: object) -> str:
        code, text = network.refusal("CHECK", config={"prevResult": {**result, **changed}})
        assert code == 100
        return text

    assert network.refusal("CHECK")[0] == 7
    assert "should have 192.168.0.9/32" in why(ips=[{**result["ips"][0], "address": "192.168.0.9/32"}])
    foreign = [{"name": "cni0"}, *result["interfaces"]]
    moved = [{"address": "10.0.0.1/24", "interface": 0}, {**result["ips"][0], "interface": 2}]
    assert network.call("CHECK", config={"prevResult": {**result, "interfaces": foreign, "ips": moved}}).status == 0
    run("ip", "-n", "c1", "route", "delete", "default")
    assert "default route" in why()
    assert network.call("CHECK", config={"prevResult": {**result, "routes": []}}).status == 0
    run("ip", "-n", "c1", "address", "flush", "dev", "eth0")
    assert f"lacks {FIRST4}/32" in why()
    run("ip", "-n", "c1", "link", "set", "eth0", "down")
    assert "down" in why()
    run("ip", "-n", "c1", "link", "set", "eth0", "address", "02:00:00:00:00:01", "up")
    assert "MAC" in why()
    run("ip", "link", "delete", *calico_links())
    assert "lost its interface" in why()
    host.etcd.delete(next(iter(host.records())))
    assert "no endpoint" in why()


def test_check_accepts_what_others_add(host: Host) -> None:
    namespaces("c1")
    network = Network(host, pool=["ipv4", "ipv6"])
    result = network.add()
    inner = {**result["interfaces"][1], "mac": result["interfaces"][1]["mac"].upper()}
    run("ip", "-n", "c1", "link", "add", "other", "up", "type", "veth", "peer", "name", "far")
    run("ip", "-n", "c1", "-6", "route", "add", "default", "dev", "other", "metric", "1")
    (key,) = host.records()
    host.etcd.put(key, {**host.record(), "ipv4_nets": [f"{A4}/32", f"{FIRST4}/32"]})
    changed = {**result, "interfaces": [result["interfaces"][0], inner]}
    assert network.call("CHECK", config={"prevResult": changed}) == Answer(0, None)


def test_garbage_is_what_the_runtime_does_not_list(host: Host) -> None:
    namespaces("c1", "c2", "c3", "c4")
    network = Network(host)
    for id in ("c1", "c2", "c3"):
        network.add(id)
    Network(host, name="net2").add("c4")
    run("ip", "netns", "delete", "c3")
    assert network.refusal("GC")[0] == 7
    valid = [{"containerID": "c1", "ifname": "eth0"}, {"containerID": "c2", "ifname": "eth1"}]
    variables = {"CNI_CONTAINERID": "", "CNI_NETNS": "", "CNI_IFNAME": ""}
    assert network.call("GC", config={"cni.dev/valid-attachments": valid}, **variables) == Answer(0, None)
    assert {owner["workload"] for owner in owners(host)} == {"c1", "c4"}
    host.check_consistent()
    assert network.call("GC", config={"cni.dev/valid-attachments": None}, **variables) == Answer(0, None)
    assert {owner["workload"] for owner in owners(host)} == {"c4"}


def owners(host: Host) -> list[dict]:
    return [allocation["secondary"] for allocation in host.allocations().values()]


def test_status_says_whether_containers_can_be_attached(bare_host: Host) -> None:
    host = AgentHost(bare_host.etcd)
    network = Network(host)
    code, why = network.refusal("STATUS")
    assert code == 50 and "not configured for IPv4" in why
    host.register()
    code, why = network.refusal("STATUS")
    assert code == 50 and "agent" in why
    host.start_agent()
    assert network.call("STATUS") == Answer(0, None)
    assert network.refusal("STATUS", config={"pool": "10.0.0.1"})[0] == 7
    for field, value, wrong in (("profile", "web", "web"), ("pool", "10.9.0.0/24", "is not the CIDR of a pool")):
        code, why = network.refusal("STATUS", config={field: value})
        assert code == 50 and wrong in why


def test_without_the_store_the_runtime_is_to_retry(own_etcd: Etcd) -> None:
    host = Host(own_etcd)
    host.register()
    namespaces("c1")
    network = Network(host)
    network.add()
    own_etcd.stop()
    for command in ("ADD", "DEL"):
        assert network.refusal(command)[0] == 11
    assert network.refusal("GC", config={"cni.dev/valid-attachments": []})[0] == 11
    assert network.refusal("STATUS")[0] == 50
    own_etcd.start()
    own_etcd.await_ready()
    network.delete()
    host.check_nothing_left()


def test_a_container_that_vanishes_is_collected_by_the_agent(node: AgentHost) -> None:
    """Both when its namespace loses its path, and when its process ends, without DEL."""
    namespaces("c1", "c2", "kept")
    network = Network(node)
    with process_in("c2") as pid:
        network.add("c1")
        network.add("c2", CNI_NETNS=f"/proc/{pid}/ns/net")
        network.add("kept")
        for id in ("c1", "c2", "kept"):
            await_up(node, id)
        run("ip", "netns", "delete", "c2")
        assert len(node.records()) == 3, "its process keeps the namespace"
    run("ip", "netns", "delete", "c1")
    wait_for(lambda: len(node.allocations()) == 1, f"the end of two\n{node.log()}", 60)
    assert {owner["workload"] for owner in owners(node)} == {"kept"}
    node.check_consistent()
    wait_for(lambda: "CNI container c1 no longer exists" in node.log(), "the log")
    network.delete("c1")


def test_a_namespace_that_has_lost_its_path_stays_attached(node: AgentHost) -> None:
    namespaces("c1", "c2")
    network = Network(node)
    network.add("c1")
    (inside,) = network.add("c2")["ips"]
    await_up(node, "c2")
    with process_in("c2"):
        run("ip", "netns", "delete", "c2")
        node.ctl("node", "restart")
        assert pings("c1", inside["address"].partition("/")[0], "5")
        assert holds(lambda: len(node.allocations()) == 2, 12), "longer than between two searches"
    wait_for(lambda: len(node.allocations()) == 1, f"the end\n{node.log()}", 60)
    network.delete("c2")


def test_an_interface_that_is_lost_is_recreated(node: AgentHost) -> None:
    namespaces("c1", "c2")
    network = Network(node)
    result = network.add("c1")
    (inside,) = network.add("c2")["ips"]
    await_up(node, "c1")
    run("ip", "link", "delete", result["interfaces"][0]["name"])
    wait_for(lambda: pings("c1", inside["address"].partition("/")[0]), f"the interface\n{node.log()}", 30)
    assert network.call("CHECK", config={"prevResult": result}).status == 0
    node.kill_agent()
    run("ip", "link", "delete", result["interfaces"][0]["name"])
    node.start_agent()
    wait_for(lambda: network.call("CHECK", config={"prevResult": result}).status == 0, "the interface", 30)
    node.check_consistent()


def test_a_plugin_that_is_killed_leaves_nothing_after_del(host: Host, tmp_path: Path) -> None:
    """Killed after each change that it makes, in ADD and in DEL."""
    network = Network(host, pool=["ipv4", "ipv6"])
    counts = {}
    for command in ("ADD", "DEL"):
        for number in itertools.count():
            namespaces("c1")
            if command == "DEL":
                network.add()
            log = tmp_path / f"{command}{number}"
            environment = network.environment(command, FAULT=f"kill:{number}", FAULT_LOG=str(log), FAULTY="cni")
            text = json.dumps(network.config)
            killed = run(sys.executable, FAULTY, check=False, input=text, env=environment)
            if number % 2:
                run("ip", "netns", "delete", "c1")
            network.delete()
            host.check_nothing_left(folders=False)
            run("ip", "netns", "delete", "c1", check=False)
            if killed.status == 0:
                break
            assert killed.status == -9, killed
        counts[command] = number
    assert counts["ADD"] > 10 and counts["DEL"] >= 3, counts


def test_a_plugin_that_is_ended_says_nothing_of_what_it_leaves(host: Host) -> None:
    environment, pipe = Network(host).environment("ADD"), subprocess.PIPE
    with subprocess.Popen(PLUGIN, stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as plugin:
        assert plugin.stdin is not None
        plugin.stdin.write(b"{")
        plugin.stdin.flush()
        wait_for(lambda: not any(fcntl.ioctl(plugin.stdin, termios.FIONREAD, bytes(4))), "the plugin to read")
        plugin.send_signal(signal.SIGTERM)
        assert plugin.communicate(timeout=30) == (b"", b"") and plugin.returncode == -signal.SIGTERM


def test_a_store_that_vanishes_half_way_is_to_be_tried_again(host: Host, tmp_path: Path) -> None:
    """Also where the rollback fails, and for the containers that GC removes."""
    network = Network(host, **{"cni.dev/valid-attachments": []})
    namespaces("c1")
    for command, number in (("ADD", 0), ("ADD", 2), ("ADD", 4), ("DEL", 1), ("GC", 1)):
        if command != "ADD":
            network.add()
        variables = network.environment(command, FAULT=f"dead:{number}", FAULT_LOG=str(tmp_path / "log"), FAULTY="cni")
        done = run(sys.executable, FAULTY, check=False, input=json.dumps(network.config), env=variables)
        assert done.status == 1 and json.loads(done.out)["code"] == 11, (command, number, done)
        network.delete()
        host.check_nothing_left(folders=False)


# Runtimes


def documented_networks() -> list[str]:
    """Return the networks in docs/cni.md: podman's and containerd's."""
    return re.findall(r"```json\n(.*?)```", (ROOT / "docs/cni.md").read_text(), re.DOTALL)


@contextmanager
def installed_plugin() -> Iterator[None]:
    """Install the plugin of the calicoctl under test in /opt/cni/bin, where runtimes look for it, inside `with`."""
    assert make("install-cni").status == 0
    try:
        yield
    finally:
        make("uninstall-cni")


def make(target: str) -> Result:
    prefix = Path(CALICOCTL).parent.parent
    return run("make", "--no-print-directory", target, f"PREFIX={prefix}", check=False, cwd=ROOT)


def test_the_plugin_is_installed_and_removed_alone() -> None:
    plugin = Path("/opt/cni/bin/calico")
    assert make("install-cni").status == 0 and make("install-cni").status == 0
    environment = {"CNI_COMMAND": "VERSION", "PATH": "/usr/bin:/bin"}
    said = json.loads(run(str(plugin), input='{"cniVersion": "0.4.0"}', env=environment).out)
    assert said["cniVersion"] == "0.4.0" and "1.1.0" in said["supportedVersions"]
    assert "is removed" in make("uninstall-cni").out and not plugin.exists()
    assert make("uninstall-cni").status == 0
    plugin.write_text("#!/bin/sh\n")
    for target in ("install-cni", "uninstall-cni"):
        refused = make(target)
        assert refused.status != 0 and "another program" in refused.err
    assert plugin.read_text() == "#!/bin/sh\n"
    plugin.unlink()
    other = plugin.with_name("calico.new")
    other.write_text("#!/bin/sh\n")
    assert make("install-cni").status == 0
    assert {*plugin.parent.iterdir()} == {plugin, other} and other.read_text() == "#!/bin/sh\n"
    assert make("uninstall-cni").status == 0
    other.unlink()


@pytest.fixture
def containerd(node: AgentHost, tmp_path: Path) -> Iterator[Callable[..., Result]]:
    """A containerd of its own, with the network `net2` of the documentation; yields a function that runs `ctr`."""
    node.ctl("profile", "add", "net2")
    root = busybox_root(tmp_path / "root")
    socket, config = tmp_path / "sock", tmp_path / "config.toml"
    config.write_text(
        f"""version = 2
root = "{tmp_path}/data"
state = "{tmp_path}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{socket}"
"""
    )
    conflist = Path("/etc/cni/net.d/10-net2.conflist")
    conflist.parent.mkdir(parents=True, exist_ok=True)
    conflist.write_text(documented_networks()[1])

    def ctr(*arguments: str, check: bool = True) -> Result:
        words = [str(root) if word == "ROOT" else word for word in arguments]
        return run("ctr", "--address", str(socket), *words, check=check, env=node.environment())

    with installed_plugin(), (tmp_path / "log").open("ab") as log:
        process = subprocess.Popen(["containerd", "--config", str(config)], stdout=log, stderr=log)
        try:
            wait_for(lambda: ctr("version", check=False).status == 0, "containerd")
            yield ctr
        finally:
            for line in ctr("task", "list", "--quiet", check=False).out.split():
                ctr("task", "delete", "--force", line, check=False)
            process.terminate()
            process.wait()
            conflist.unlink()


def busybox_root(root: Path) -> Path:
    """Create the root of a container's file system; return its path."""
    (root / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "", root / "bin/busybox")
    for name in ("sh", "ip", "ping", "sleep"):
        (root / "bin" / name).symlink_to("busybox")
    return root


def test_containers_of_containerd(node: AgentHost, containerd: Callable[..., Result]) -> None:
    """ctr names no namespace when it detaches a container, and does not detach one that runs in the background."""
    containerd("run", "--detach", "--cni", "--rootfs", "ROOT", "one", "/bin/sleep", "1000")
    await_up(node, "default-one")
    # until the agent has programmed its policy, the container's packets are dropped
    ping = ("/bin/sh", "-c", f"until ping -c1 -W1 {FIRST4}; do :; done")
    assert "1 packets received" in containerd("run", "--rm", "--cni", "--rootfs", "ROOT", "two", *ping).out
    assert [owner["workload"] for owner in owners(node)] == ["default-one"]
    node.kill_agent()  # which would remove a container that is gone as well
    assert "eth0" in containerd("run", "--rm", "--cni", "--rootfs", "ROOT", "three", "/bin/ip", "address").out
    assert [owner["workload"] for owner in owners(node)] == ["default-one"]
    node.start_agent()
    containerd("task", "delete", "--force", "one")
    wait_for(lambda: not node.allocations() and not node.handles(), f"the end\n{node.log()}", 60)
    containerd("container", "delete", "one")
    node.check_consistent()
