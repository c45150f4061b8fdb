"""What `node` writes to the store, and which address it detects. Other tests are about the agent."""

from __future__ import annotations

import json
from pathlib import Path

from calicoctl.workloads import connected
from tests.system.agent import A4, LOG_DIR, AgentHost, outside_host
from tests.system.support import CALICOCTL, Host, calico_links, run, wait_for


def test_registering_writes_global_config_pools_and_the_hosts_keys(bare_host: Host) -> None:
    said = bare_host.ctl("node", "--ip=192.0.2.2", "--ip6=2001:db8::2", "--as=1.10")
    assert "Host host1 is registered with 192.0.2.2 and 2001:db8::2." in said.out
    tree = bare_host.etcd.tree()
    tree = {key: value for key, value in tree.items() if not key.startswith("/calico/felix")}
    tree.pop("/calico/bgp/v1/host/host1/macs", None)  # the agent writes them a little later
    assert connected.is_first("host1")
    for key, value in tree.items():
        if value.startswith("{"):
            tree[key] = json.loads(value)
    assert tree == {
        "/calico/v1/Ready": "true",
        "/calico/v1/config/InterfacePrefix": "cali",
        "/calico/v1/config/LogSeverityFile": "none",
        "/calico/v1/config/LogSeverityScreen": "info",
        "/calico/v1/config/LogFilePath": "none",
        "/calico/v1/config/IpInIpEnabled": "false",
        "/calico/v1/ipam/v4/pool/192.168.0.0-16": {"cidr": "192.168.0.0/16"},
        "/calico/v1/ipam/v6/pool/fd80:24e2:f998:72d6::-64": {"cidr": "fd80:24e2:f998:72d6::/64"},
        "/calico/v1/host/host1/bird_ip": "192.0.2.2",
        "/calico/v1/host/host1/config/marker": "created",
        "/calico/v1/host/host1/config/DefaultEndpointToHostAction": "RETURN",
        "/calico/bgp/v1/global/as_num": "64511",
        "/calico/bgp/v1/global/node_mesh": {"enabled": True},
        "/calico/bgp/v1/host/host1/ip_addr_v4": "192.0.2.2",
        "/calico/bgp/v1/host/host1/ip_addr_v6": "2001:db8::2",
        "/calico/bgp/v1/host/host1/as_num": "65546",
    }


def test_registering_again_changes_what_is_given_and_keeps_what_others_set(bare_host: Host) -> None:
    bare_host.ctl("node", "--ip=192.0.2.2", "--ip6=2001:db8::2", "--as=64512")
    mine = {
        "/calico/v1/config/LogSeverityScreen": "debug",
        "/calico/bgp/v1/global/as_num": "65000",
        "/calico/bgp/v1/global/node_mesh": '{"enabled": false}',
        "/calico/v1/host/host1/config/DefaultEndpointToHostAction": "DROP",
        "/calico/v1/ipam/v4/pool/10.0.0.0-8": '{"cidr": "10.0.0.0/8"}',
    }
    for key, value in mine.items():
        bare_host.etcd.put(key, value)
    bare_host.etcd.delete("/calico/v1/ipam/v4/pool/192.168.0.0-16")
    bare_host.ctl("node", "--ip=192.0.2.3")
    tree = bare_host.etcd.tree()
    assert {key: tree[key] for key in mine} == mine
    assert "/calico/v1/ipam/v4/pool/192.168.0.0-16" not in tree, "there is a pool of that version"
    assert tree["/calico/bgp/v1/host/host1/ip_addr_v4"] == "192.0.2.3"
    assert tree["/calico/bgp/v1/host/host1/ip_addr_v6"] == ""
    assert "/calico/bgp/v1/host/host1/as_num" not in tree


def test_the_address_is_that_of_the_default_routes_interface(bare_host: Host) -> None:
    try:
        for name, kind, address in (
            ("aaa", "bridge", "198.51.100.1/24"),
            ("docker0", "bridge", "172.17.0.1/16"),
            ("veth1", "veth", "203.0.113.1/24"),
            ("ens2", "veth", "192.0.2.20/24"),
        ):
            run("ip", "link", "add", name, "type", kind)
            run("ip", "address", "add", address, "dev", name)
            run("ip", "link", "set", name, "up")
        run("ip", "address", "add", "192.0.2.21/24", "dev", "ens2")
        said = bare_host.ctl("node").out
        assert "Detected IPv4 address 203.0.113.1." in said, "without a default route, the first that faces outside"
        run("ip", "route", "add", "default", "via", "198.51.100.9", "metric", "10")
        run("ip", "route", "add", "default", "via", "203.0.113.9", "metric", "300")
        run("ip", "route", "add", "default", "via", "192.0.2.1", "metric", "200", "src", "192.0.2.21")
        assert "Detected IPv4 address 192.0.2.21." in bare_host.ctl("node").out
        assert bare_host.etcd.get("/calico/v1/host/host1/bird_ip") == "192.0.2.21"
        given = bare_host.ctl("node", "--ip=192.0.2.20")
        assert "Detected" not in given.out and given.err == ""
        assert "Warning: 192.0.2.99 is not an address of this host" in bare_host.ctl("node", "--ip=192.0.2.99").err
    finally:
        for name in ("aaa", "docker0", "veth1", "ens2"):
            run("ip", "link", "delete", name, check=False)


def test_many_routes_are_no_hindrance(bare_host: Host, tmp_path: Path) -> None:
    """A host of a fabric that speaks BGP, and a namespace, each with thousands of routes besides their own."""
    host = AgentHost(bare_host.etcd)
    many = tmp_path / "routes"
    many.write_text(
        "".join(
            f"route add 10.{number // 256}.{number % 256}.0/24 via 198.51.100.9\n"
            f"route add 2001:db8:2:{number:x}::/64 via 2001:db8:1::9\n"
            for number in range(5000)
        )
    )
    with outside_host("fabric"):
        for prefix in (["ip"], ["ip", "-n", "fabric"]):
            run(*prefix, "-batch", str(many))
        run("ip", "route", "add", "default", "src", "192.0.2.2", "nexthop", "via", "198.51.100.2", "dev", "uplink")
        run("ip", "route", "add", "default", "metric", "9", "table", "7", "dev", "lo")
        run("ip", "-6", "route", "add", "default", "via", "2001:db8:1::2")
        said = host.ctl("node", "--ip6=2001:db8:1::1", f"--log-dir={LOG_DIR}").out
        assert "Detected IPv4 address 198.51.100.1." in said
        path = "/var/run/netns/fabric"
        refused = host.ctl("container", "add", path, A4, status=1).err
        assert "default route already (via 198.51.100.1 dev eth0)" in refused, "behind all those others"
        run("ip", "-n", "fabric", "route", "delete", "default")
        run("ip", "-n", "fabric", "-6", "route", "delete", "default")
        host.ctl("container", "add", path, A4, "--wait=10")
        host.ctl("container", path, "ip", "add", "fd80:24e2:f998:72d6::1")
        assert run("ip", "-n", "fabric", "route", "show", "default").out.startswith("default via 198.51.100.1 dev eth1")
        assert run("ping", "-c", "1", "-W", "2", A4).status == 0
        before = run("ip", "-n", "fabric", "-6", "route").out.count("\n")
        host.ctl("container", path, "ip", "remove", "fd80:24e2:f998:72d6::1")
        left = run("ip", "-n", "fabric", "-6", "route").out
        assert "default" not in left and left.count("\n") < before
        host.ctl("container", "remove", path)
    run("ip", "route", "delete", "default", "table", "7")  # the others are deleted with the interface


def test_without_any_address_the_user_is_told_to_give_one(bare_host: Host) -> None:
    assert "--ip" in bare_host.ctl("node", status=1).err
    assert bare_host.etcd.tree() == {}
    assert "registered with 2001:db8::2" in bare_host.ctl("node", "--ip6=2001:db8::2").out
    assert bare_host.etcd.get("/calico/bgp/v1/host/host1/ip_addr_v4") == ""


def test_show_lists_every_host_with_its_agent_and_its_endpoints(bare_host: Host) -> None:
    assert json.loads(bare_host.ctl("node", "show", "--output=json").out) == []
    here = AgentHost(bare_host.etcd)
    here.start_agent("--as=1.10")
    here.add_pair()
    here.sync()
    far = Host(bare_host.etcd, "far")
    far.register("192.0.2.3", "2001:db8::3")
    far.etcd.put("/calico/v1/host/far/workload/docker/x/endpoint/0123456789abcdef0123456789abcdef", "{")
    far.etcd.put("/calico/v1/host/old/bird_ip", "192.0.2.4")  # registered by an old tool, and by that alone
    far.etcd.put("/calico/felix/v1/host/old/status", {"first_update": False, "time": 1})
    far.etcd.put("/calico/felix/v1/host/odd/status", "no JSON")

    def endpoints(**counts: int) -> dict[str, int]:
        return {**dict.fromkeys(("up", "down", "error", "unknown"), 0), **counts}

    found = {host["name"]: host for host in json.loads(here.ctl("node", "show", "--output=json").out)}
    assert list(found) == ["far", "host1", "odd", "old"]
    assert found["host1"].pop("reported") == json.loads(here.etcd.get("/calico/felix/v1/host/host1/status"))["time"]
    addresses = {"ipv4": "192.0.2.2", "ipv6": "2001:db8::2"}
    assert found["host1"] == {
        "name": "host1",
        **addresses,
        "as_num": "65546",
        "agent": "up",
        "endpoints": endpoints(up=2),
    }
    addresses = {"ipv4": "192.0.2.3", "ipv6": "2001:db8::3"}
    assert found["far"] == {
        "name": "far",
        **addresses,
        "as_num": "64511",
        "agent": "down",
        "reported": None,
        "endpoints": endpoints(unknown=1),
    }
    assert [found["old"][name] for name in ("ipv4", "agent", "reported")] == ["192.0.2.4", "starting", None]
    assert found["odd"]["agent"] == "up", "whatever an agent writes, it is alive"
    link = next(iter(calico_links()))
    run("ip", "link", "set", "dev", link, "down")
    wait_for(lambda: "| 2 (1 down) " in here.ctl("node", "show").out, here.log())
    rows = here.ctl("node", "show", env={"PATH": "/usr/bin:/bin"}).out.splitlines()
    assert rows[1].split() == [
        "|",
        "Host",
        "|",
        "IPv4",
        "|",
        "IPv6",
        "|",
        "AS",
        "number",
        "|",
        "Agent",
        "|",
        "Endpoints",
        "|",
    ]
    assert [word for word in rows[3].split() if word != "|"] == [
        *("far", "192.0.2.3", "2001:db8::3", "64511", "down", "1", "(1", "unknown)")
    ]
    # the same of each endpoint
    far.etcd.put("/calico/v1/host/far/workload/docker/x/endpoint/0123456789abcdef0123456789abcdef", {"state": "active"})
    assert {
        (one["host"], one["status"], one["reason"])
        for one in json.loads(here.ctl("endpoint", "show", "--detailed", "--output=json").out)
    } == {("far", "unknown", None), ("host1", "up", None), ("host1", "down", f"the interface {link} is down")}
    states = [row.split("|")[-2].strip() for row in here.ctl("endpoint", "show", "--detailed").out.splitlines()[3:-1]]
    assert states[0] == "active (unknown)" and sorted(states[1:]) == ["active", "active (down)"]
    done = run(
        "setpriv", "--reuid=65534", "--clear-groups", CALICOCTL, "node", "show", env=here.environment(), check=False
    )
    assert done.status == 0 and "host1" in done.out, "root is not needed"
