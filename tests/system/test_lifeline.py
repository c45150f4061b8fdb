"""What a host needs to stay reachable, and to reach its etcd, no record in the store takes from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.agent import ALLOW, LOG_DIR, AgentHost, outside_host
from tests.system.support import Etcd, Host, run, wait_for

MEMBER, MEMBER6 = "198.51.100.2", "2001:db8:1::2"
EVERYTHING = ("198.51.0.0/16", "203.0.113.0/24", "2001:db8:1::/64")


@pytest.fixture
def remote(bare_host: Host, tmp_path: Path) -> Iterator[AgentHost]:
    """A host whose etcd is another machine, by a name and at an IPv6 address, with a namespace `a`."""
    with outside_host() as outside:
        etcd = Etcd(tmp_path / "etcd", address=MEMBER, namespace=outside)
        urls = f"{etcd.url},http://[{MEMBER6}]:{etcd.port}"
        etcd.start(None, f"--listen-client-urls={urls}", f"--advertise-client-urls={urls}")
        etcd.await_ready()
        with open("/etc/hosts", "a") as names:
            names.write(f"{MEMBER} etcd.test\n")
        host = AgentHost(etcd, endpoints=urls.replace(MEMBER, "etcd.test"))
        Path("/etc/resolv.conf").write_text("nameserver 203.0.113.53\n")
        run("ip", "route", "add", "10.99.0.0/16", "via", "198.51.100.7")
        host.start_agent()
        host.add("a", "192.168.0.1")
        host.profile("web", inbound=[ALLOW])
        host.set_profiles("a", "web")
        host.sync()
        yield host
        etcd.stop(9)


def ours() -> set[str]:
    """Return the destinations of the agent's routes."""
    lines = [line for v in "46" for line in run("ip", f"-{v}", "route", "show", "proto", "80").out.splitlines()]
    return {line.split()[0] for line in lines}


def test_a_record_takes_nothing_that_the_host_needs(remote: AgentHost) -> None:
    """Somebody who may write to etcd lists in a record what the host needs, in pools that contain it."""
    key = remote.key("a")
    record = json.loads(remote.etcd.get(key))
    needed = {
        MEMBER: "a member of the etcd",
        MEMBER6: "a member of the etcd",
        "198.51.100.7": "a gateway of this host",
        "198.51.100.1": "this host's own address",
        "198.51.100.8": "that of host host2",
        "203.0.113.53": "a DNS server of this host",
        "203.0.114.9": "in no pool",
    }
    remote.etcd.put("/calico/bgp/v1/host/host2/ip_addr_v4", "198.51.100.8")
    for pool in EVERYTHING:
        version = 6 if ":" in pool else 4
        remote.etcd.put(f"/calico/v1/ipam/v{version}/pool/{pool.replace('/', '-')}", {"cidr": pool})
    bad4 = [f"{address}/32" for address in needed if ":" not in address]
    remote.etcd.put(key, {**record, "ipv4_nets": ["192.168.0.1/32", *bad4], "ipv6_nets": [f"{MEMBER6}/128"]})
    # and in the record of a host that nobody has
    other = {**record, "name": "caliother", "ipv4_nets": bad4, "ipv6_nets": [f"{MEMBER6}/128"]}
    remote.etcd.put("/calico/v1/host/nobody/workload/docker/w/endpoint/e", other)
    said = wait_for(lambda: (remote.endpoint_status(key) or {}).get("reason"), "the endpoint to be in error")
    for address, why in needed.items():
        assert f"its address {address} is {why}" in said
    remote.sync()
    assert ours() == {"192.168.0.1"}
    assert run("ping", "-c1", "-W1", "192.168.0.1").status == 0, "its own address goes on"
    assert f"its address {MEMBER} is a member of the etcd" in remote.ctl("status", status=1).out
    (shown,) = json.loads(remote.ctl("endpoint", "show", f"--host={remote.name}", "--detailed", "--output=json").out)
    assert shown["status"] == "error" and MEMBER in shown["reason"]
    assert MEMBER in remote.ctl("endpoint", "show", "--detailed").err
    for address in needed:
        refused = remote.ctl("container", "/var/run/netns/a", "ip", "add", address, status=1).err
        assert address in refused
    sets = [run("nft", "list", kind, *where.split()).out for kind, where in SETS]
    taken = {address for address in needed if any(f" {address} " in text.replace(",", " ") for text in sets)}
    assert taken == {"198.51.100.8", "203.0.114.9"}, "these are those of other hosts"
    remote.etcd.put(key, record)
    wait_for(lambda: (remote.endpoint_status(key) or {}).get("status") == "up", "the endpoint to be up")


SETS = (
    ("map", "inet calico owners4"),
    ("set", "inet calico senders4"),
    ("set", "inet calico senders6"),
    ("set", "arp calico senders"),
)


def test_a_host_that_has_lost_its_etcd_takes_the_route_back(remote: AgentHost) -> None:
    """As an agent of an older version has left it: member and answers are an endpoint's."""
    interface = remote.interface("a")

    def hijack() -> None:
        for version, address in (("4", MEMBER), ("6", MEMBER6)):
            scope = ["scope", "link"] if version == "4" else ["metric", "1"]
            run("ip", f"-{version}", "route", "replace", address, "dev", interface, "proto", "80", *scope)
            run("nft", "add", "element", "inet", "calico", f"owners{version}", f"{{ {address} : drop }}")

    remote.kill_agent()
    hijack()
    said = remote.ctl("node", "--ip=192.0.2.2", f"--log-dir={LOG_DIR}").err
    assert f"the route to {MEMBER} led to an endpoint, but that is a member of the etcd" in said
    assert f"packets from {MEMBER6}, a member of etcd" in said
    remote.sync()
    assert ours() == {"192.168.0.1"}


def test_what_a_removed_pool_contained_goes_on(remote: AgentHost) -> None:
    key, pool = remote.key("a"), "/calico/v1/ipam/v4/pool/192.168.0.0-16"
    record = json.loads(remote.etcd.get(key))

    def status(of: str = key) -> tuple[str | None, str | None]:
        said = remote.endpoint_status(of) or {}
        return said.get("status"), said.get("reason")

    value = remote.etcd.get(pool)
    remote.etcd.put("/calico/v1/ipam/v4/pool/10.77.0.0-16", {"cidr": "10.77.0.0/16"})
    remote.etcd.put(pool, "{")
    remote.sync()
    assert status() == ("up", None), "its key says which network it is"
    remote.etcd.delete(pool)
    warning = ("up", "its address 192.168.0.1 is in no pool, but stays")
    wait_for(lambda: status() == warning, "the warning")
    assert "192.168.0.1 is in no pool, but stays" in remote.ctl("status").out
    remote.kill_agent()
    remote.start_agent()
    remote.sync()
    assert status() == warning and run("ping", "-c1", "-W1", "192.168.0.1").status == 0
    # another address in no pool, which is new, and one that another endpoint gets
    remote.etcd.put(key, {**record, "ipv4_nets": ["192.168.0.1/32", "192.168.0.2/32"]})
    wait_for(lambda: status()[0] == "error", "the new address to be refused")
    assert status()[1] == "its address 192.168.0.2 is in no pool" and ours() == {"192.168.0.1"}
    remote.etcd.put(pool, str(value))
    wait_for(lambda: status() == ("up", None), "the pool to be back")
    assert ours() == {"192.168.0.1", "192.168.0.2"}
