"""`checksystem` on hosts with and without the prerequisites."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest

from tests.system.agent import AgentHost
from tests.system.support import AS_NOBODY, CALICOCTL, Host, not_installed, run

BIRD, ALONE = "BIRD 2 (for several hosts)", "no other BIRD, port 179 is free"


def checks(host: Host, *options: str, status: int = 0, **env: str) -> dict[str, dict]:
    said = host.ctl("checksystem", "--output=json", *options, status=status, env=env)
    return {check["name"]: check for check in json.loads(said.out)}


def test_checksystem(bare_host: Host) -> None:
    found = checks(bare_host)
    assert found["root"]["ok"] and found["veth"]["ok"]
    assert found["nftables: policy, connection tracking, NAT, ARP"]["found"] == "works"
    assert found["nftables: limits of connections"]["found"] == "works"
    assert found["nftables: logging of dropped packets"]["found"] == "works"
    assert found["use of etcd"]["found"].startswith("version 3.")
    (limit,) = re.findall(r"thresh3 (\d+)", run("ip", "ntable", "show", "name", "arp_cache").out)
    assert f"room for {limit} endpoints" in found["neighbour table of IPv4"]["found"]
    assert found["VXLAN (for pools with --vxlan)"]["found"] == "works"
    assert found[BIRD]["found"].startswith("2.") and found[ALONE]["found"] == "yes"
    assert not found["host agent"]["ok"] and not found["host agent"]["needed"]
    links = run("ip", "-br", "link").out
    assert "check0" not in links and "check" not in run("nft", "list", "tables").out, "nothing is left"
    text = bare_host.ctl("checksystem").out
    assert all(word in text for word in ("What to do", "iptables", "Docker Engine"))


def test_checksystem_without_prerequisites(bare_host: Host, tmp_path: Path) -> None:
    nowhere = {"ETCD_AUTHORITY": "127.0.0.1:1", "DOCKER_HOST": "unix:///nowhere", "PATH": str(tmp_path)}
    with not_installed("conntrack"):
        said = bare_host.ctl("checksystem", "--output=json", status=1, env=nowhere)
    assert said.err.startswith("This host lacks prerequisites: use of etcd")
    found = {check["name"]: check for check in json.loads(said.out)}
    assert "nothing listens" in found["Docker Engine"]["found"] and not found["Docker Engine"]["needed"]
    assert found["conntrack"]["advice"] == "install the package conntrack"
    assert found["local etcd"]["found"].endswith("would start it at http://127.0.0.1:1")
    assert "Docker Engine" in bare_host.ctl("checksystem", "--libnetwork", status=1, env=nowhere).err
    with not_installed("ip"):
        assert "prerequisites: ip;" in bare_host.ctl("checksystem", status=1, env=nowhere).err
    unprivileged = [*AS_NOBODY, CALICOCTL]
    said = bare_host.ctl("checksystem", status=1, command=unprivileged)
    assert "lacks prerequisites: root." in said.err


def test_checksystem_where_nothing_is_as_it_should_be(bare_host: Host, engine: None, tmp_path: Path) -> None:
    """Each check fails for itself alone."""
    found = checks(bare_host, status=1, HOSTNAME="-x")
    assert "host name" in found["host name"]["found"] and not found["use of etcd"]["ok"]
    assert "1.2.3.4:abc" in checks(bare_host, DOCKER_HOST="tcp://1.2.3.4:abc")["Docker Engine"]["found"]
    with not_installed("iptables*", "conntrack"):
        found = checks(bare_host, status=1)
        assert found["iptables"]["needed"] and not found["iptables"]["ok"] and not found["conntrack"]["ok"]
        run("ip", "netns", "add", "new")  # the tables of iptables-legacy stay where they have been used once
        said = bare_host.ctl(
            "checksystem", "--output=json", status=1, command=["ip", "netns", "exec", "new", CALICOCTL]
        )
    found = {check["name"]: check for check in json.loads(said.out)}
    assert found["Docker's firewall"]["ok"] and found["iptables chains of an old Felix"]["ok"], "there is none"


@pytest.mark.api("etcdv2")
def test_checksystem_with_a_key_in_the_place_of_all_data(bare_host: Host) -> None:
    bare_host.etcd.put("/calico", "x")
    try:
        assert "a key, where a directory is expected" in checks(bare_host, status=1)["use of etcd"]["found"]
    finally:
        bare_host.etcd._request("DELETE", "/calico")


def test_checksystem_and_what_several_hosts_need(bare_host: Host) -> None:
    with not_installed("bird"):
        bird = checks(bare_host)[BIRD]
    assert "there is no BIRD" in bird["found"] and "disable --now bird" in bird["advice"] and not bird["needed"]
    with socket.create_server(("", 179)):
        assert "another process listens on port 179" in checks(bare_host)[ALONE]["found"]
    file = Path("/etc/calico/bgp-passwords")
    assert checks(bare_host)["BGP passwords"]["found"] == f"none, in {file}"
    file.parent.mkdir(exist_ok=True)
    file.touch(0o640)
    file.write_text("mesh secret\n192.0.2.1 secret\n192.0.2.2 secret\n")
    refused = checks(bare_host)["BGP passwords"]
    assert "has mode 0640" in refused["found"] and not refused["ok"] and not refused["needed"]
    file.chmod(0o600)
    assert checks(bare_host)["BGP passwords"]["found"] == f"for 2 peers and the mesh, in {file}"
    bare_host.ctl("pool", "add", "10.9.0.0/16", "--ipip")
    pools = checks(bare_host)["pools with IP-in-IP"]
    assert pools["found"].startswith("10.9.0.0/16: ") and "pool add 10.9.0.0/16 --vxlan=" in pools["advice"]
    bare_host.ctl("pool", "add", "10.9.0.0/16", "--vxlan=cross-subnet")
    assert checks(bare_host)["pools with IP-in-IP"]["ok"]
    run("iptables", "-A", "INPUT", "-i", "lo", "-j", "ACCEPT")
    run("iptables", "-P", "INPUT", "DROP")
    try:
        firewall = checks(bare_host)["firewall and other hosts"]
        assert "no rule mentions TCP port 179 or UDP port 4789" in firewall["found"] and not firewall["ok"]
        run("iptables", "-A", "INPUT", "-p", "tcp", "--dport", "179", "-j", "ACCEPT")
        firewall = checks(bare_host)["firewall and other hosts"]
        assert (
            "no rule mentions UDP port 4789" in firewall["found"] and "4789 from the other hosts" in firewall["advice"]
        )
        run("iptables", "-A", "INPUT", "-p", "udp", "--dport", "4789", "-j", "ACCEPT")
        assert checks(bare_host)["firewall and other hosts"]["ok"]
    finally:
        run("iptables", "-P", "INPUT", "ACCEPT")
        run("iptables", "-F", "INPUT")


def test_checksystem_and_a_firewall(bare_host: Host) -> None:
    run("iptables", "-P", "FORWARD", "DROP")
    try:
        assert "will accept it there" in checks(bare_host)["Docker's firewall"]["found"]
        AgentHost(bare_host.etcd).start_agent()
        assert "nothing drops" in checks(bare_host)["Docker's firewall"]["found"]
    finally:
        run("iptables", "-P", "FORWARD", "ACCEPT")
