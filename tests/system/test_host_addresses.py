"""No container gets an address of the host, of its gateways and networks, or of other hosts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from calicoctl.workloads import host_network, mtu
from tests.system.agent import LOG_DIR, AgentHost
from tests.system.support import CALICOCTL, HOST_IP, HOST_IP6, Host, run, wait_for

POOL6 = "fd80:24e2:f998:72d6:"


@contextmanager
def home_network(ipv6: bool = True) -> Iterator[None]:
    """A network as at many people's homes: the host is 192.168.0.10, and the router, a namespace, 192.168.0.1."""
    run("ip", "netns", "add", "router")
    run("ip", "link", "add", "uplink", "type", "veth", "peer", "name", "eth0", "netns", "router")
    for prefix, device, number in ((["ip"], "uplink", 10), (["ip", "-n", "router"], "eth0", 1)):
        run(*prefix, "address", "add", f"192.168.0.{number}/24", "brd", "+", "dev", device)
        if ipv6:
            run(*prefix, "address", "add", f"{POOL6}:{number}/64", "dev", device, "nodad")
        run(*prefix, "link", "set", device, "up")
    run("ip", "route", "add", "default", "via", "192.168.0.1", "dev", "uplink")
    if ipv6:
        run("ip", "-6", "route", "add", "default", "via", f"{POOL6}:1")
    try:
        yield
    finally:
        run("ip", "link", "delete", "uplink", check=False)
        run("ip", "netns", "delete", "router", check=False)


@pytest.fixture
def home() -> Iterator[None]:
    with home_network():
        yield


def namespace(name: str) -> str:
    run("ip", "netns", "add", name)
    return f"/var/run/netns/{name}"


def answers(address: str) -> bool:
    return run("ping", "-c", "1", "-W", "1", address, check=False).status == 0


def status_of(host: AgentHost, name: str) -> tuple[str, str]:
    status = host.endpoint_status(host.key(name)) or {}
    return status.get("status", ""), status.get("reason") or ""


def test_on_a_host_whose_network_is_in_the_default_pool(bare_host: Host, home: None) -> None:
    host = AgentHost(bare_host.etcd)
    host.etcd.put("/calico/bgp/v1/host/host2/ip_addr_v4", "192.168.0.2")
    host.etcd.put("/calico/v1/host/host3/bird_ip", "192.168.0.3")
    said = host.ctl("node", f"--ip6={POOL6}:10", f"--log-dir={LOG_DIR}")
    assert "Detected IPv4 address 192.168.0.10." in said.out
    assert (
        "Warning: pool 192.168.0.0/16 overlaps 192.168.0.0/24 (on uplink), which this host is connected to" in said.err
    )
    for number, name in enumerate("abc"):
        path = namespace(name)
        assert host.ctl("container", "add", path, "ipv4").out == f"IP 192.168.1.{number} added to {path}\n"
    assert answers("192.168.0.1"), "what the host sends to its router reaches it"
    host.sync()
    assert [status_of(host, name)[0] for name in "abc"] == ["up"] * 3

    before = host.etcd.tree("/calico/ipam"), host.records()
    path = namespace("d")
    for address, why in (
        ("192.168.0.10", "this host's own address (on uplink)"),
        ("192.168.0.1", "a gateway of this host (on uplink)"),
        ("192.168.0.255", "the broadcast address of 192.168.0.0/24 (on uplink)"),
        ("192.168.0.0", "the network address of 192.168.0.0/24 (on uplink)"),
        ("192.168.0.2", "that of host host2"),
        ("192.168.0.3", "that of host host3"),
        (f"{POOL6}:10", "this host's own address (on uplink)"),
        (f"{POOL6}:1", "a gateway of this host (on uplink)"),
        (f"{POOL6}:", f"the anycast address of the routers of {POOL6}:/64 (on uplink)"),
    ):
        for words in (("add", path), ("/var/run/netns/a", "ip", "add")):
            assert f"IP {address} is {why}." in host.ctl("container", *words, address, status=1).err
    refused = host.ctl("container", "add", path, "ipv6", status=1).err
    assert f"no free IP address in {POOL6}:/64, but for the networks that this host is connected to" in refused
    assert (host.etcd.tree("/calico/ipam"), host.records()) == before

    # one in there that is nobody's, as far as is known, is the operator's to choose
    host.ctl("container", "add", path, "192.168.0.77", "--wait=10")
    host.ctl("container", path, "ip", "add", f"{POOL6}:77")
    host.ctl("container", path, "ip", "add", "192.168.0.0/16")
    assert set(host.allocations()) - {"192.168.0.77", f"{POOL6}:77"} == {f"192.168.1.{n}" for n in range(4)}
    assert answers("192.168.0.77")
    # its block is this host's now, and yet nothing of it is given out by itself
    run("ip", "route", "add", "10.9.0.0/16", "via", "192.168.0.77")  # a container may well be a router
    host.ctl("container", "add", namespace("e"), "ipv4", "--wait=10")
    assert "192.168.1.4" in host.allocations()
    host.sync()
    assert {status_of(host, name)[0] for name in "abcde"} == {"up"}


def test_an_endpoint_whose_address_a_host_gets_later(node: AgentHost) -> None:
    """As when containers are back after a reboot before the host has its address from DHCP."""
    for name, number in (("a", 0), ("b", 10), ("c", 1), ("d", 4)):
        node.ctl("container", "add", namespace(name), f"192.168.0.{number}")
    node.ctl("container", "/var/run/netns/d", "ip", "add", "192.168.0.255")
    node.sync()

    def statuses() -> str:
        return " ".join(status_of(node, name)[0] for name in "abcd")

    assert statuses() == "up up up up" and answers("192.168.0.10")
    with home_network(ipv6=False):
        wait_for(lambda: statuses() == "up error error error", "the endpoints whose addresses are the host's now")
        assert "192.168.0.10 is this host's own address (on uplink)" in status_of(node, "b")[1]
        assert "192.168.0.1 is a gateway of this host (on uplink)" in status_of(node, "c")[1]
        assert "192.168.0.255 is the broadcast address of 192.168.0.0/24" in status_of(node, "d")[1]
        assert "192.168.0.10 is this host's own address" in node.ctl("status", status=None).out
        assert answers("192.168.0.4"), "its other address goes on"
        ours = run("ip", "route", "show", "proto", "80").out
        assert [line.split()[0] for line in ours.splitlines()] == ["192.168.0.0", "192.168.0.4"]
        run("ip", "-n", "router", "address", "delete", "192.168.0.1/24", "dev", "eth0")
        assert not answers("192.168.0.1"), "the container must not answer for the router"
        # a new agent finds the same; and no command gives such an address back
        node.kill_agent()
        node.start_agent()
        node.sync()
        assert statuses() == "up error error error"
        node.ctl("ipam", "release", "192.168.0.10", "--force")
        (found,) = json.loads(node.ctl("ipam", "check", "--fix", "--output=json", status=1).out)
        assert found["subject"] == "192.168.0.10" and not found["fixed"]
        run("ip", "link", "delete", node.interface("b"))
        refused = node.ctl("container", "add", "/var/run/netns/b", "192.168.0.10", status=1).err
        assert "192.168.0.10 is this host's own address (on uplink) now" in refused
        assert "192.168.0.10" not in node.allocations()
    wait_for(lambda: statuses() == "up up up up", "the endpoints to have their addresses back")
    assert all(answers(f"192.168.0.{number}") for number in (10, 1, 4))

    # addresses of other hosts, however they are registered
    for key, name in (
        ("/calico/bgp/v1/host/host2/ip_addr_v4", "b"),
        ("/calico/v1/host/host2/bird_ip", "c"),
    ):
        address = "192.168.0.10" if name == "b" else "192.168.0.1"
        node.etcd.put(key, address)
        wait_for(lambda name=name: status_of(node, name)[0] == "error", "the other host's address")
        assert f"its address {address} is that of host host2" in status_of(node, name)[1]
        assert address not in run("ip", "route", "show", "proto", "80").out.split()
        node.etcd.delete(key)
        wait_for(lambda: statuses() == "up up up up", "the address to be free again")
    said = node.ctl("node", "--ip=192.168.0.4")
    assert "Warning: 192.168.0.4 is assigned to a container (see 'calicoctl ipam info 192.168.0.4')" in said.err
    wait_for(lambda: status_of(node, "d")[0] == "error", "the address that this host is registered with")
    assert "this host's own address (it is registered with it)" in status_of(node, "d")[1]


def test_pools_that_overlap_what_the_host_is_connected_to(bare_host: Host, tmp_path: Path) -> None:
    bare_host.register(HOST_IP)
    run("ip", "link", "add", "docker0", "type", "bridge")
    run("ip", "address", "add", "172.17.0.1/16", "dev", "docker0")
    try:
        anybody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", CALICOCTL]
        said = bare_host.ctl("pool", "add", "172.17.5.0/24", "10.1.0.0/16", command=anybody)
        assert said.out == "Added pool 172.17.5.0/24\nAdded pool 10.1.0.0/16\n"
        (warning,) = said.err.splitlines()
        assert warning == (
            "Warning: pool 172.17.5.0/24 overlaps 172.17.0.0/16 (on docker0), which this host is connected to, so none "
            "of its addresses is given out here unless it is asked for."
        )
        found = json.loads(bare_host.ctl("checksystem", "--output=json", status=None).out)
        (pools,) = [check for check in found if check["name"] == "pools and this host's networks"]
        assert "pool 172.17.5.0/24 overlaps 172.17.0.0/16 (on docker0)" in pools["found"]
        assert not pools["ok"] and not pools["needed"] and "10.1.0.0" not in pools["found"]
        path = namespace("a")
        refused = bare_host.ctl("container", "add", path, "172.17.5.0/24", status=1).err
        assert "but for the networks that this host is connected to: 172.17.0.0/16 (on docker0)" in refused
        assert bare_host.etcd.tree("/calico/ipam/v2") == {}
        bare_host.ctl("container", "add", path, "172.17.5.3")
        assert set(bare_host.allocations()) == {"172.17.5.3"}
        bare_host.ctl("container", "remove", path)
    finally:
        run("ip", "link", "delete", "docker0")
    said = bare_host.ctl("pool", "add", "172.17.5.0/24")
    assert said.err == "" and "there already" in said.out


def test_what_makes_an_address_the_hosts(bare_host: Host, home: None) -> None:
    """Whatever way the kernel spells it."""
    bare_host.register(HOST_IP, HOST_IP6)
    for words in (
        "nexthop add id 5 via 192.168.0.20 dev uplink",
        "route add 10.5.0.0/16 nhid 5",
        "route add 10.7.0.0/16 nexthop via 192.168.0.21 dev uplink nexthop via 192.168.0.22 dev uplink",
        f"route add 10.6.0.0/16 via inet6 {POOL6}:23 dev uplink",
        "route add 10.8.0.0/16 via 192.168.0.24 table 70",
        "route add local 192.168.66.0/24 dev lo",
        "address add 192.168.70.1 peer 192.168.71.0/32 dev uplink",
    ):
        run("ip", *words.split())
    path = namespace("a")
    for address, why in (
        *((f"192.168.0.{number}", "a gateway of this host (on uplink)") for number in (20, 21, 22, 24)),
        (f"{POOL6}:23", "a gateway of this host (on uplink)"),
        ("192.168.66.9", "in its local network 192.168.66.0/24"),
        ("192.168.70.1", "this host's own address (on uplink)"),
    ):
        assert why in bare_host.ctl("container", "add", path, address, status=1).err
    bare_host.etcd.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": "192.168.71.0/26"})
    bare_host.ctl("container", "add", path, "ipv4", status=1)  # its one block has the peer's address
    assert bare_host.etcd.tree("/calico/ipam/v2") == {}


def test_interfaces_to_other_hosts_are_found_by_all_routes_but_a_default_route_to_workloads(host: Host) -> None:
    with cable("eth6", "10.6.0.1/24") as mac6, cable("eth7", "10.7.0.1/24") as mac7:
        run("ip", "route", "add", "default", "via", "10.6.0.9")
        run("ip", "route", "add", "10.8.0.0/16", "nexthop", "via", "10.6.0.9", "nexthop", "via", "10.7.0.9")
        run("ip", "link", "add", "bridge7", "type", "bridge")
        run("ip", "address", "add", "10.9.0.1/24", "dev", "bridge7")
        run("ip", "link", "set", "bridge7", "up")
        run("ip", "route", "add", "10.10.0.0/16", "via", "10.9.0.9")
        try:
            network = host_network.read(["10.6.0.2", "10.8.0.1", "10.99.0.1", "fd00:99::1"], ["10.8.1.1", "10.99.1.1"])
        finally:
            run("ip", "link", "delete", "bridge7")
    either = frozenset({"eth6", "eth7"})
    assert network.reached == {
        "10.6.0.2": frozenset({"eth6"}),
        "10.8.0.1": either,
        "10.99.0.1": frozenset({"eth6"}),
        "fd00:99::1": frozenset(),
        "10.8.1.1": either,
        "10.99.1.1": frozenset(),
    }
    assert network.routed == either, "with a way to no host, a router is none of theirs"
    macs = {name: macs for name, macs in network.macs.items() if name in ("eth6", "eth7", "bridge7")}
    assert macs == {"eth6": frozenset({mac6}), "eth7": frozenset({mac7})}, "a bridge of containers is none"


@contextmanager
def cable(name: str, address: str) -> Iterator[str]:
    """An interface with an address; yields its MAC."""
    run("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}-end")
    try:
        run("ip", "link", "set", f"{name}-end", "up")
        run("ip", "link", "set", name, "up")
        run("ip", "address", "add", address, "dev", name)
        (link,) = json.loads(run("ip", "-json", "link", "show", name).out)
        yield link["address"]
    finally:
        run("ip", "link", "delete", name)


def test_a_default_route_to_the_loopback_interface_says_nothing_of_the_mtu(bare_host: Host) -> None:
    run("ip", "route", "add", "default", "dev", "lo")
    try:
        assert mtu.underlay("192.0.2.2").mtu == mtu.DEFAULT == 1500
    finally:
        run("ip", "route", "delete", "default", "dev", "lo")
