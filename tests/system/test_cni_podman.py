"""Containers of podman, which are attached through CNI, and networks with a second plugin.

podman does so up to version 4, and by its own configuration; later versions have no CNI.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.agent import AgentHost
from tests.system.support import Host, Result, links, run, wait_for
from tests.system.test_cni import (
    Answer,
    Network,
    await_up,
    busybox_root,
    documented_networks,
    installed_plugin,
    namespaces,
    owners,
)

SETTINGS = """[containers]
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
[network]
network_backend = "cni"
cni_plugin_dirs = ["/opt/cni/bin"]
network_config_dir = "{folder}/networks"
"""
STORAGE = """[storage]
driver = "vfs"
graphroot = "{folder}/graph"
runroot = "{run}"
"""
RUN = "/run/podman-tests"
"""The folder of podman's state. The process that detaches a container that has ended allows 50 characters for it."""


@pytest.fixture
def podman(node: AgentHost, tmp_path: Path) -> Iterator[Callable[..., Result]]:
    """podman, with an image and the network `net1` of the documentation; yields a function that runs it."""
    (tmp_path / "networks").mkdir()
    for name, text in (("containers.conf", SETTINGS), ("storage.conf", STORAGE)):
        (tmp_path / name).write_text(text.format(folder=tmp_path, run=RUN))
    (tmp_path / "networks/net1.conflist").write_text(documented_networks()[0])
    settings = {
        "CONTAINERS_CONF": str(tmp_path / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(tmp_path / "storage.conf"),
    }

    def podman(*arguments: str, check: bool = True, **variables: str) -> Result:
        return run("podman", *arguments, check=check, env=node.environment(**settings, **variables))

    # what detaches a container has no variables of the user's
    environment = node.environment()
    names = ("HOSTNAME", "DATASTORE_TYPE", "ETCD_ENDPOINTS", "ETCD_AUTHORITY")
    file = Path("/etc/calico/node.env")
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(f"{name}={environment[name]}\n" for name in names if name in environment))
    tar = tmp_path / "image.tar"
    subprocess.run(["tar", "-C", str(busybox_root(tmp_path / "root")), "-cf", str(tar), "."], check=True)
    with installed_plugin():  # podman does nothing at all without the plugins' folder
        podman("import", str(tar), "busybox")
        yield podman
        podman("rm", "--all", "--force", "--time=0", check=False)
    file.unlink()
    shutil.rmtree(RUN, ignore_errors=True)


def run_container(podman: Callable[..., Result], name: str, *options: str) -> dict[str, str]:
    """Run a container in the network net1; return its addresses by IP version, as `ipv4` and `ipv6`."""
    podman("run", "--detach", "--name", name, "--net=net1", *options, "busybox", "/bin/sleep", "1000")
    (network,) = json.loads(podman("inspect", name).out)[0]["NetworkSettings"]["Networks"].values()
    return {"ipv4": network["IPAddress"], "ipv6": network["GlobalIPv6Address"]}


def test_containers_of_podman(node: AgentHost, podman: Callable[..., Result]) -> None:
    run_container(podman, "one")
    two = run_container(podman, "two", "--ip=192.168.0.77")
    assert two["ipv4"] == "192.168.0.77" and two["ipv6"].startswith("fd80:24e2:f998:72d6:")
    for owner in owners(node):
        await_up(node, owner["workload"])

    def reached(address: str) -> bool:
        return podman("exec", "one", "ping", "-c1", "-w3", address, check=False).status == 0

    assert reached(two["ipv4"]) and reached(two["ipv6"])
    assert {"one", "two"} == {owner["workload_name"] for owner in owners(node)}
    node.ctl("profile", "add", "alone")
    node.ctl("container", "two", "profile", "set", "alone")
    node.sync()
    assert not reached(two["ipv4"])

    podman("restart", "--time=0", "two")
    assert "192.168.0.77" in node.allocations(), "the address that was asked for stays"
    wait_for(lambda: reached(two["ipv4"]), "the network's profile, of the new attachment")
    # podman detaches it, and attaches it with the addresses and the MAC that it had
    before = podman("exec", "two", "ip", "link", "show", "eth0").out
    podman("network", "reload", "two")
    assert podman("exec", "two", "ip", "link", "show", "eth0").out.split()[-3:] == before.split()[-3:], before
    wait_for(lambda: reached(two["ipv4"]), "the network, attached anew")
    node.kill_agent()
    assert reached(two["ipv4"])
    podman("stop", "--time=0", "two")  # which does not always wait for the process that detaches it
    wait_for(lambda: {"one"} == {owner["workload_name"] for owner in owners(node)}, "that it is detached")
    node.start_agent()
    refused = podman("run", "--name=bad", "--net=net1", "--ip=10.9.9.9", "busybox", "true", check=False)
    assert refused.status != 0 and "10.9.9.9 is in no pool" in refused.err
    podman("rm", "--all", "--force", "--time=0")
    wait_for(lambda: not node.allocations(), "the end")
    node.check_consistent()


def test_a_container_that_ends_is_detached_as_the_file_of_settings_says(
    node: AgentHost, podman: Callable[..., Result]
) -> None:
    """The process that awaits its end has no variables of the user's, and the agent, which may be slower, is dead."""
    node.kill_agent()
    others = {"HOSTNAME": "another", "ETCD_AUTHORITY": "127.0.0.1:1"}
    podman("run", "--detach", "--name=brief", "--net=net1", "busybox", "/bin/sleep", "0", **others)
    wait_for(lambda: not node.allocations(), "the end of the container", 30)
    assert not node.records()


def test_a_network_with_a_second_plugin(host: Host) -> None:
    """tuning, of the plugins that the specification's authors publish, changes sysctls or the MAC."""
    namespaces("c1")
    network = Network(host, cniVersion="1.0.0")
    result = network.add()

    def tune(command: str, **config: object) -> str:
        text = json.dumps({**network.config, "type": "tuning", "prevResult": result, **config})
        return run("/usr/lib/cni/tuning", input=text, env=network.environment(command)).out

    tuned = json.loads(tune("ADD", sysctl={"net.ipv4.ip_default_ttl": "77"}))
    assert run("ip", "netns", "exec", "c1", "cat", "/proc/sys/net/ipv4/ip_default_ttl").out == "77\n"
    assert network.call("CHECK", config={"prevResult": tuned}) == Answer(0, None)
    changed = json.loads(tune("ADD", mac="02:00:00:00:00:07"))
    assert links("c1")["eth0"]["address"] == changed["interfaces"][1]["mac"] == "02:00:00:00:00:07"
    code, why = network.refusal("CHECK", config={"prevResult": changed})
    assert code == 100 and f"should have the MAC {result['interfaces'][1]['mac']}" in why
    tune("DEL", mac="02:00:00:00:00:07")
    assert network.call("DEL", config={"prevResult": tuned}) == Answer(0, None)
    host.check_nothing_left()
