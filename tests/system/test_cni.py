"""Containers that a runtime attaches through CNI: by the plugin itself, by podman, and by containerd's ctr."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.agent import A4, B4, C4, AgentHost
from tests.system.support import (
    FAULTY,
    HOST_IP,
    Etcd,
    Host,
    addresses,
    calico_links,
    gone,
    links,
    routes,
    run,
    wait_for,
)

PLUGIN = (sys.executable, "-I", "-m", "calicoctl.plugins.cni")
A6 = "fd80:24e2:f998:72d6::1"


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
        self.command = PLUGIN

    def call(self, command: str, id: str = "c1", config: dict | None = None, **variables: str) -> Answer:
        """Call the plugin for the container `id`, whose namespace has the same name; `config` adds to the network's."""
        given = {"CNI_COMMAND": command, "CNI_CONTAINERID": id, "CNI_IFNAME": "eth0", "CNI_PATH": "/opt/cni/bin"}
        given |= {"CNI_NETNS": f"/var/run/netns/{id}", **variables}
        text = json.dumps({**self.config, **(config or {})})
        done = run(*self.command, check=False, input=text, env=self.host.environment(**given))
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
        (f"{A4}/32", HOST_IP, 1),
        (f"{A6}/128", "2001:db8::2", 1),
    ]
    assert [ip.get("version") for ip in result["ips"]] == (["4", "6"] if version < "1" else [None, None])
    assert result["routes"] == [{"dst": "0.0.0.0/0", "gw": HOST_IP}, {"dst": "::/0", "gw": "2001:db8::2"}]
    assert addresses("c1", "eth0") == {f"{A4}/32", f"{A6}/128"}
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
    assert network.add()["ips"][0]["address"] == "10.9.0.0/32" or True
    assert host.record()["profile_ids"] == ["web", "db"]
    fixed = network.add("c2", CNI_ARGS="IgnoreUnknown=1;IP=10.9.0.77;K8S_POD_NAME=shop")
    assert [ip["address"] for ip in fixed["ips"]] == ["10.9.0.77/32"]
    assert "shop" in host.ctl("endpoint", "show", "--detailed").out
    code, why = network.refusal("ADD", "c3", CNI_ARGS="IP=10.9.0.77")
    assert code == 100 and "shop" in why
    assert "not in the pool" in network.refusal("ADD", "c3", CNI_ARGS=f"IP={A4}")[1]
    asked = network.add("c3", {"pool": ["ipv4", "ipv6"], "runtimeConfig": {"ips": [f"{C4}/16"]}})
    assert [ip["address"].partition("/")[0] for ip in asked["ips"]] == [C4, A6]
    host.check_consistent()


def test_containers_reach_each_other_as_profiles_allow(node: AgentHost) -> None:
    namespaces("c1", "c2", "c3")
    network = Network(node, pool=["ipv4", "ipv6"])
    network.add("c1")
    network.add("c2")
    Network(node, name="net2").add("c3")
    for id in ("c1", "c2", "c3"):
        await_up(node, id)
    assert pings("c1", B4, "5") and pings("c1", "fd80:24e2:f998:72d6::2", "5")
    assert not pings("c1", C4)
    traced = json.loads(node.ctl("profile", "trace", "c1", "c2", "--output=json", "tcp", status=None).out or "{}")
    assert traced
    assert node.ctl("ipam", "check").status == 0
    assert node.status()["endpoints"]["up"] == 3
