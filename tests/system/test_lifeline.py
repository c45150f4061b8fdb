"""What a host needs to stay reachable, and to reach its etcd, no record in the store takes from it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.agent import ALLOW, LOG_DIR, AgentHost, outside_host
from tests.system.support import Etcd, Host, links, run, wait_for

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
    assert taken == {"198.51.100.8"}, "that is another host's"
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
    assert f"packets from {MEMBER6}, on the way to etcd" in said
    remote.sync()
    assert ours() == {"192.168.0.1"}


ANSWERER = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("198.51.100.53", 53))
while True:
    server.sendto(*server.recvfrom(999))
"""

ASK = """
import socket
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(1)
client.sendto(b"x", ("198.51.100.53", 53))
print(client.recv(9))
"""


def test_records_of_other_hosts_cut_nobody_off(remote: AgentHost) -> None:
    """A host is registered with a server's address; and a record lists that of a container on a bridge."""
    run("ip", "-n", "outside", "address", "add", "198.51.100.53/24", "dev", "eth0")
    run("ip", "-n", "outside", "route", "add", "172.30.0.0/24", "via", "198.51.100.1")
    server = subprocess.Popen(["ip", "netns", "exec", "outside", sys.executable, "-c", ANSWERER])
    run("ip", "netns", "add", "plain")
    for command in (
        "link add br9 type bridge",
        "address add 172.30.0.1/24 dev br9",
        "link set br9 up",
        "link add vp master br9 type veth peer name eth0 netns plain",
        "link set vp up",
        "-n plain address add 172.30.0.2/24 dev eth0",
        "-n plain link set eth0 up",
        "-n plain route add default via 172.30.0.1",
    ):
        run("ip", *command.split())

    def is_answered() -> bool:
        return run(sys.executable, "-c", ASK, check=False).status == 0

    def is_connected() -> bool:
        return run("ip", "netns", "exec", "plain", "ping", "-c1", "-W1", MEMBER, check=False).status == 0

    wait_for(is_answered, "the server to answer")
    wait_for(is_connected, "the container to reach outside")
    host = "/calico/bgp/v1/host/evil"
    remote.etcd.put(f"{host}/ip_addr_v4", "198.51.100.53")
    remote.etcd.put(f"{host}/macs", json.dumps([links("outside")["eth0"]["address"]]))
    record = {"state": "active", "name": "cali5", "mac": "02:00:00:00:00:05", "profile_ids": []}
    nets = {"ipv4_nets": ["172.30.0.2/32"], "ipv6_nets": []}
    remote.etcd.put("/calico/v1/host/nobody/workload/docker/w/endpoint/5", {**record, **nets})
    remote.sync()
    assert is_answered(), "its packets prove the MAC"
    remote.etcd.put(f"{host}/macs", json.dumps(["02:00:00:00:00:77"]))
    remote.sync()
    chain = run("nft", "list", "chain", "inet", "calico", "host/evil").out
    assert "02:00:00:00:00:77" in chain
    assert is_answered() and is_connected()
    server.kill()
    server.wait()
    run("ip", "link", "delete", "br9")
    run("ip", "netns", "delete", "plain")


DNS = "203.0.113.53"

DNS_SERVER = f"""
import socket
server, upstream = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
if {{stub}}:  # asks another server
    server.bind(("127.0.0.53", 53))
else:
    server.bind(("{DNS}", 53))
while True:
    query, client = server.recvfrom(2000)
    if {{stub}}:
        upstream.settimeout(0.2)
        upstream.sendto(query, ("{DNS}", 53))
        try:
            server.sendto(upstream.recv(2000), client)
        except OSError:
            pass
        continue
    end = query.index(b"\\0", 12) + 5
    answers = [b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\1\\0\\4" + socket.inet_aton("{MEMBER}")] * (query[end - 3] == 1)
    count = bytes([0, len(answers), 0, 0, 0, 0])
    server.sendto(query[:2] + b"\\x81\\x80" + query[4:6] + count + query[12:end] + b"".join(answers), client)
"""


@pytest.fixture
def named(bare_host: Host, tmp_path: Path) -> Iterator[AgentHost]:
    """A host whose etcd is another machine, by a name that its resolver of its own asks yet another server for."""
    with outside_host() as outside:
        run("ip", "-n", outside, "address", "add", f"{DNS}/32", "dev", "lo")
        run("ip", "route", "add", f"{DNS}/32", "via", MEMBER)
        inside = ["ip", "netns", "exec", outside, sys.executable, "-c", DNS_SERVER.format(stub=False)]
        servers = [subprocess.Popen(inside)]
        servers.append(subprocess.Popen([sys.executable, "-c", DNS_SERVER.format(stub=True)]))
        Path("/etc/resolv.conf").write_text("nameserver 127.0.0.53\noptions timeout:1 attempts:1\n")
        Path("/etc/nsswitch.conf").write_text("hosts: files dns\n")
        etcd = Etcd(tmp_path / "etcd", address=MEMBER, namespace=outside)
        etcd.start()
        etcd.await_ready()
        host = AgentHost(etcd, endpoints=f"http://etcd.example.test:{etcd.port}")
        host.start_agent()
        host.add("a", "192.168.0.1")
        host.sync()
        yield host
        shutil.rmtree("/run/systemd/resolve", ignore_errors=True)
        etcd.stop(9)
        for server in servers:
            server.kill()
            server.wait()


def test_a_host_without_dns_still_reads_its_etcd(named: AgentHost) -> None:
    """A record takes a DNS server that this host cannot know of; then an older version's blackhole takes etcd."""
    key, pool = named.key("a"), f"/calico/v1/ipam/v4/pool/{DNS}-32"
    record = json.loads(named.etcd.get(key))

    def hijack() -> None:
        named.etcd.put(pool, {"cidr": f"{DNS}/32"})
        named.etcd.put(key, {**record, "ipv4_nets": ["192.168.0.1/32", f"{DNS}/32"]})
        wait_for(lambda: DNS in ours(), "the route")

    hijack()
    named.etcd.put(key, record)
    wait_for(lambda: ours() == {"192.168.0.1"}, "the agent to read that the address is gone", 30)
    hijack()
    named.kill_agent()
    named.etcd.put(key, record)
    run("ip", "route", "add", "blackhole", f"{MEMBER}/31", "proto", "81")
    said = named.ctl("node", "--ip=192.0.2.2", f"--log-dir={LOG_DIR}").err
    assert f"the route to {MEMBER}/31 kept packets from {MEMBER}, on the way to etcd; it was removed" in said
    named.sync()
    assert ours() == {"192.168.0.1"}
    # a server that the host is told of too late is left to the endpoint only while it is in a pool
    hijack()
    Path("/run/systemd/resolve").mkdir(parents=True)
    Path("/run/systemd/resolve/resolv.conf").write_text(f"nameserver {DNS}\n")
    named.etcd.delete(pool)
    wait_for(lambda: ours() == {"192.168.0.1"}, "the route to be removed", 30)


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
    shutil.rmtree("/run/calico")  # as after a reboot
    run("ip", "route", "flush", "proto", "80")
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
