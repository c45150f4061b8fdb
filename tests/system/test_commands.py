"""Commands about pools, BGP, settings, endpoints and batches: input, output, and the result in etcd."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

import pytest

from tests.system.support import CALICOCTL, HOST_IP, Host, run

POOLS = "/calico/v1/ipam/v4/pool"


@pytest.fixture
def host(bare_host: Host) -> Host:
    bare_host.register(HOST_IP)
    return bare_host


def pools(host: Host) -> dict[str, dict]:
    return {json.loads(value)["cidr"]: json.loads(value) for value in host.etcd.tree(POOLS).values()}


def refused(host: Host, *words: str, because: str, status: int = 1) -> None:
    """Check that a command is refused in one line that says why, and changes nothing."""
    before = host.etcd.tree()
    said = host.ctl(*words, status=status)
    assert because in said.err and said.out == "", said
    assert status == 2 or len(said.err.splitlines()) == 1
    assert host.etcd.tree() == before


# Pools


def test_pools_come_get_other_options_and_go(host: Host) -> None:
    assert host.ctl("pool", "add", "10.1.0.0/16", "10.2.0.0/26", "--nat-outgoing").out.count("Added") == 2
    assert pools(host)["10.1.0.0/16"] == {"cidr": "10.1.0.0/16", "masquerade": True}
    assert "already" in host.ctl("pool", "add", "10.1.0.0/16", "--nat-outgoing").out
    assert host.etcd.get("/calico/v1/config/IpInIpEnabled") != "true"
    key = f"{POOLS}/10.1.0.0-16"
    host.etcd.put(key, {"cidr": "10.1.0.0/16", "masquerade": True, "x": [1]})
    assert host.ctl("pool", "add", "10.1.0.0/16", "--ipip").out == (
        "Pool 10.1.0.0/16 has new options: ipip from off to on, nat-outgoing from on to off.\n"
    )
    assert json.loads(host.etcd.get(key)) == {"cidr": "10.1.0.0/16", "ipip": "tunl0", "x": [1]}
    assert host.etcd.get("/calico/v1/config/IpInIpEnabled") == "true"
    host.ctl("pool", "add", "fd00:1::/64")
    shown = json.loads(host.ctl("pool", "show", "--ipv6", "--output=json").out)
    expected = {"cidr": "fd00:1::/64", "ipip": None, "masquerade": False, "vxlan_mode": "never"}
    assert expected in shown and all(":" in pool["cidr"] for pool in shown)
    host.ctl("pool", "remove", "10.1.0.0/16", "10.2.0.0/26", "--ipip")  # as a script of 2015 may do
    assert set(pools(host)) == {"192.168.0.0/16"}


def test_the_overlay_of_a_pool(host: Host) -> None:
    key = f"{POOLS}/10.1.0.0-16"
    host.ctl("pool", "add", "10.1.0.0/16", "--vxlan=always")
    host.etcd.put(key, {"cidr": "10.1.0.0/16", "vxlan_mode": "always", "x": [1]})
    assert host.ctl("pool", "add", "10.1.0.0/16", "--vxlan=cross-subnet", "--nat-outgoing").out == (
        "Pool 10.1.0.0/16 has new options: vxlan from always to cross-subnet, nat-outgoing from off to on.\n"
    )
    assert json.loads(host.etcd.get(key)) == {
        "cidr": "10.1.0.0/16",
        "masquerade": True,
        "vxlan_mode": "cross-subnet",
        "x": [1],
    }
    host.ctl("pool", "range", "add", "fd00:9::", "fd00:9::3f", "--vxlan=always")
    assert json.loads(host.etcd.get("/calico/v1/ipam/v6/pool/fd00:9::-122"))["vxlan_mode"] == "always"
    shown = host.ctl("pool", "show").out
    assert "vxlan=cross-subnet,nat-outgoing" in shown and "vxlan=always" in shown
    assert "vxlan from cross-subnet to never" in host.ctl("pool", "add", "10.1.0.0/16", "--vxlan=never").out
    assert json.loads(host.etcd.get(key)) == {"cidr": "10.1.0.0/16", "x": [1]}
    said = host.ctl("pool", "add", "10.3.0.0/16", "--ipip", "--vxlan=never")
    assert said.out == "Added pool 10.3.0.0/16\n" and "do not encapsulate in IP-in-IP" in said.err
    host.ctl("pool", "remove", "10.1.0.0/16", "--vxlan=always")
    assert "10.1.0.0/16" not in pools(host)


@pytest.mark.parametrize(
    ("words", "because"),
    [
        ("10.3.0.0/16 --vxlan=cross", "it must be one of never, always, cross-subnet; did you mean cross-subnet?"),
        ("10.3.0.0/16 --ipip --vxlan=always", "--ipip and --vxlan exclude each other"),
        ("192.168.1.0/24", "overlaps with 192.168.0.0/16"),
        ("192.0.0.0/8", "overlaps with 192.168.0.0/16"),
        ("10.0.0.0/8 10.1.0.0/16", "overlaps with 10.0.0.0/8"),
        ("10.0.0.0/27", "smaller than a block"),
        ("fd00:1::/123", "smaller than a block"),
        ("10.0.0.1/24", "it has host bits set; 10.0.0.0/24 has none"),
        ("10.0.0.0", "is one address, and a pool is a network"),
        ("10.0.0.0/33", "not a valid CIDR"),
        ("fd00:1::/64 --ipip", "--ipip is for IPv4 alone"),
        ("127.0.0.0/16", "not for hosts"),
        ("0.0.0.0/0", "not for hosts"),
        ("10.3.0.0/24 nonsense", "'nonsense' is not a valid CIDR"),
    ],
)
def test_pools_that_are_refused(host: Host, words: str, because: str) -> None:
    refused(host, "pool", "add", *words.split(), because=because)


def test_a_pool_whose_addresses_are_in_use(host: Host) -> None:
    run("ip", "netns", "add", "a")
    host.ctl("container", "add", "/var/run/netns/a", "192.168.0.7")
    refused(host, "pool", "remove", "192.168.0.0/16", because="1 address in use (192.168.0.7)")
    refused(host, "pool", "remove", "10.0.0.0/8", because="does not exist")
    host.ctl("pool", "remove", "192.168.0.0/16", "--force")
    assert pools(host) == {} and host.allocations().keys() == {"192.168.0.7"}
    used = json.loads(host.ctl("ipam", "show", "--output=json").out)
    assert {"pool": None, "addresses": None, "used": 1, "free": None, "borrowed": 0} in used
    host.ctl("container", "remove", "/var/run/netns/a")


def test_a_range_is_covered_exactly(host: Host) -> None:
    host.ctl("pool", "range", "add", "10.9.9.192", "10.10.0.127")
    import ipaddress

    networks = [ipaddress.ip_network(cidr) for cidr in pools(host) if cidr.startswith("10.")]
    covered = sorted(int(address) for network in networks for address in network)
    first, last = (int(ipaddress.ip_address(text)) for text in ("10.9.9.192", "10.10.0.127"))
    assert covered == list(range(first, last + 1))
    host.ctl("pool", "range", "add", "fd00:9::", "fd00:9::3f")
    assert json.loads(host.etcd.get("/calico/v1/ipam/v6/pool/fd00:9::-122")) == {"cidr": "fd00:9::/122"}


@pytest.mark.parametrize(
    ("start", "end", "because"),
    [
        ("10.9.10.0", "10.9.9.255", "ends before it begins"),
        ("10.9.9.0", "10.9.9.200", "10.9.9.0 to 10.9.9.255 is"),
        ("10.9.9.1", "10.9.9.255", "10.9.9.0 to 10.9.9.255 is"),
        ("255.255.255.192", "255.255.255.255", "not for hosts"),
        ("10.9.9.0", "fd00::3f", "different IP versions"),
        ("10.9.9.0", "10.9.9", "not a valid IP address"),
        ("192.168.3.0", "192.168.3.63", "overlaps"),
    ],
)
def test_ranges_that_are_refused(host: Host, start: str, end: str, because: str) -> None:
    refused(host, "pool", "range", "add", start, end, because=because)


# BGP and settings


@pytest.mark.parametrize("words", [("bgp",), ("node", "bgp")])
def test_bgp_peers(host: Host, words: tuple[str, ...]) -> None:
    folder = f"/calico/bgp/v1/{'host/host1' if words[0] == 'node' else 'global'}"
    host.ctl(*words, "peer", "add", "192.0.2.254", "as", "1.10")
    host.ctl(*words, "peer", "add", "2001:DB8:0::9", "as", "64512")
    assert json.loads(host.etcd.get(f"{folder}/peer_v4/192.0.2.254")) == {"ip": "192.0.2.254", "as_num": "65546"}
    assert json.loads(host.etcd.get(f"{folder}/peer_v6/2001:db8::9")) == {"ip": "2001:db8::9", "as_num": "64512"}
    assert "already" in host.ctl(*words, "peer", "add", "192.0.2.254", "as", "65546").out
    host.etcd.put(f"{folder}/peer_v4/192.0.2.254", {"ip": "192.0.2.254", "as_num": "3", "x": 1})
    assert "AS number: from 3 to 4.\n" in host.ctl(*words, "peer", "add", "192.0.2.254", "as", "4").out
    assert json.loads(host.etcd.get(f"{folder}/peer_v4/192.0.2.254")) == {"ip": "192.0.2.254", "as_num": "4", "x": 1}
    shown = json.loads(host.ctl(*words, "peer", "show", "--output=json").out)
    assert [peer["as_num"] for peer in shown] == ["4", "64512"]
    assert "192.0.2.254" not in host.ctl(*words, "peer", "show", "--ipv6").out
    host.etcd.put(f"{folder}/peer_v4/192.0.2.7", {"ip": "192.0.2.7", "as_num": "none"})
    beside = host.ctl(*words, "peer", "show")
    assert "192.0.2.254" in beside.out and f"{folder}/peer_v4/192.0.2.7 has an invalid value" in beside.err
    host.ctl(*words, "peer", "remove", "2001:db8::9")
    refused(host, *words, "peer", "remove", "2001:db8::9", because="no BGP peer 2001:db8::9")
    refused(host, *words, "peer", "add", "192.0.2.3", "as", "65536.1", because="AS number")
    refused(host, *words, "peer", "add", "224.0.0.5", "as", "1", because="not for hosts")
    refused(host, *words, "peer", "add", "192.0.2", "as", "1", because="IP address")
    host.etcd.put("/calico/bgp/v1/host/host1/ip_addr_v4", "192.0.2.9")
    if words[0] == "node":
        refused(host, *words, "peer", "add", "192.0.2.9", "as", "1", because="a BGP session with itself")
    else:
        host.ctl(*words, "peer", "add", "192.0.2.9", "as", "1")


def test_the_mesh_and_the_default_as_number(host: Host) -> None:
    assert host.ctl("bgp", "node-mesh").out == "on\n"
    host.ctl("bgp", "node-mesh", "off")
    assert json.loads(host.etcd.get("/calico/bgp/v1/global/node_mesh")) == {"enabled": False}
    assert host.ctl("bgp", "node-mesh").out == "off\n"
    host.ctl("bgp", "default-node-as", "1.0")
    assert host.etcd.get("/calico/bgp/v1/global/as_num") == "65536"
    assert json.loads(host.ctl("bgp", "default-node-as", "--output=json").out) == {"as_num": "65536"}
    refused(host, "bgp", "default-node-as", "0", because="AS number")
    for command, key, value, used in (
        (("bgp", "default-node-as"), "as_num", "0", "64511"),
        (("config", "bgp", "HoldTime"), "HoldTime", "1", "30"),
    ):
        host.etcd.put(f"/calico/bgp/v1/global/{key}", value)
        shown = host.ctl(*command)
        assert shown.out == f"{used}\n" and "invalid, and agents use" in shown.err


def test_settings(host: Host) -> None:
    assert host.ctl("config", "felix", "loglevel").out == "info\n"
    host.ctl("config", "felix", "loglevel", "debug")
    assert host.etcd.get("/calico/v1/config/LogSeverityScreen") == "debug"
    host.ctl("config", "node", "felix", "DefaultEndpointToHostAction", "DROP")
    assert host.etcd.get("/calico/v1/host/host1/config/DefaultEndpointToHostAction") == "DROP"
    host.ctl("config", "bgp", "loglevel", "debug")
    host.ctl("config", "node", "bgp", "loglevel", "info")
    assert host.etcd.get("/calico/bgp/v1/global/loglevel") == "debug"
    assert host.etcd.get("/calico/bgp/v1/host/host1/loglevel") == "info"
    host.ctl("config", "node", "bgp", "loglevel", "--remove")
    assert host.etcd.get("/calico/bgp/v1/host/host1/loglevel") is None
    refused(host, "config", "node", "bgp", "loglevel", "--remove", because="not set")
    refused(host, "config", "felix", "loglevel", "loud", because="one of none, debug")
    assert host.ctl("config", "felix", "GraceTime").out == "60\n"
    host.ctl("config", "felix", "GraceTime", "5")
    assert host.etcd.get("/calico/v1/config/GraceTime") == "5"
    for value in ("86401", "1.5", "soon", ""):
        refused(host, "config", "felix", "GraceTime", value, because="a whole number from 0 to 86400")
    refused(host, "config", "felix", "Colour", "red", because="--force")
    refused(host, "config", "felix", "logseverityFle", "info", because="did you mean 'LogSeverityFile'?")
    refused(host, "config", "felix", "a/b", "red", "--force", because="cannot be a setting")
    refused(host, "config", "bgp", "peer_v4", "x", "--force", because="is not a setting")
    refused(host, "config", "felix", "LogFilePath", "a\nb", because="one line of text")
    host.ctl("config", "felix", "Colour", "red", "--force")
    assert json.loads(host.ctl("config", "felix", "Colour", "--force", "--output=json").out) == {
        "key": "/calico/v1/config/Colour",
        "value": "red",
    }


# Endpoints


def record_of(host: Host, on: str, workload: str, endpoint: str, *addresses: str, **fields: object) -> str:
    """Write an endpoint's record, as another program does; return its key."""
    orchestrator = "namespace" if workload.startswith("-") else "docker"
    key = f"/calico/v1/host/{on}/workload/{orchestrator}/{workload}/endpoint/{endpoint}"
    nets = [f"{address}/32" for address in addresses if ":" not in address]
    nets6 = [f"{address}/128" for address in addresses if ":" in address]
    host.etcd.put(key, {"state": "active", "mac": "aa:bb:cc:dd:ee:01", "ipv4_nets": nets, "ipv6_nets": nets6, **fields})
    return key


def on_a_terminal(host: Host, width: int, *words: str) -> tuple[list[str], str]:
    """Return the lines that a command writes to a terminal, and what it writes to standard error."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, width, 0, 0))
    shown, environment = b"", host.environment()
    environment.pop("COLUMNS", None)
    with subprocess.Popen([CALICOCTL, *words], stdout=theirs, stderr=subprocess.PIPE, env=environment) as command:
        os.close(theirs)
        with contextlib.suppress(OSError):  # the terminal's other end is closed
            while more := os.read(ours, 10000):
                shown += more
        assert command.stderr is not None
        err = command.stderr.read().decode()
        assert command.wait() == 0, err
    os.close(ours)
    return shown.decode().splitlines(), err


def columns_of(lines: list[str]) -> list[list[str]]:
    """Return the rows of a table, heading first, as their cells' first lines."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_endpoints_are_shown_as_people_look_for_them(host: Host) -> None:
    """By host, workload's name, and address as a number; short on a terminal, complete elsewhere."""
    ids = {name: f"{number:02x}" * 32 for number, name in ((0xBB, "api"), (0xAA, "web"), (0xCC, None))}
    record_of(host, "host2", ids["web"], "1" * 32, "192.168.1.1", workload_name="web", profile_ids=["web", "db"])
    record_of(host, "host1", ids["web"], "2" * 32, "192.168.0.10", "fd80::10", workload_name="web")
    record_of(host, "host1", ids["web"], "3" * 32, "192.168.0.9", workload_name="web", colour="red")
    record_of(host, "host1", ids["api"], "4" * 32, "192.168.0.77", workload_name="api", mac=None)
    since = {"state": "inactive", "inactive_since": "2022-11-25T21:33:11Z"}
    record_of(host, "host1", ids[None], "5" * 32, "192.168.0.78", **since)
    record_of(host, "host1", "-var-run-netns-blue", "6" * 32, "192.168.0.79")
    order = ["666666666666", "444444444444", "555555555555", "333333333333", "222222222222", "111111111111"]
    for width, left_out in ((200, []), (120, []), (110, ["MAC"]), (80, ["MAC", "Orchestrator ID"]), (40, None)):
        lines, err = on_a_terminal(host, width, "endpoint", "show", "--detailed")
        assert max(map(len, lines)) <= width, lines
        if left_out is None:
            continue
        said = f"Columns left out because the terminal is too narrow: {', '.join(left_out)}; --no-trunc shows all.\n"
        assert err == (said if left_out else "")
        heading, *rows = columns_of(lines)
        rows = [row for row in rows if row[0].startswith("host")]
        place = {name: number for number, name in enumerate(heading)}
        assert [row[place["Endpoint ID"]] for row in rows] == order
        names = [row[place["Workload ID"]] for row in rows]
        assert names[1:] == ["api", "cccccccccccc", "web", "web", "web"] and names[0].startswith("-var-run-")
        assert [row[place["Addresses"]] for row in rows][1:4] == ["192.168.0.77", "192.168.0.78", "192.168.0.9"]
        assert ids["web"] not in "".join(lines) and "fd80::10 " in "".join(lines)
        assert re.search(r" \d+d ", "".join(lines))

    piped = host.ctl("endpoint", "show", "--detailed").out
    assert on_a_terminal(host, 80, "endpoint", "show", "--detailed", "--no-trunc") == (piped.splitlines(), "")
    heading, *rows = columns_of(piped.splitlines())
    assert [row[3][:12] for row in rows if row[0]] == order and len(rows[0][3]) == 32
    assert rows[0][2] == "-var-run-netns-blue" and [row[2] for row in rows[1:3]] == [ids["api"], "api"]
    assert all(host.ctl("endpoint", "show", "--detailed").out == piped for _ in range(3))
    said = json.loads(host.ctl("endpoint", "show", "--detailed", "--output=json").out)
    assert [one["endpoint"][:12] for one in said] == order
    assert said[0]["workload_name"] is said[0]["inactive_since"] is None and said[3]["colour"] == "red"
    assert said[1]["workload_name"] == "api" and said[2]["inactive_since"] == since["inactive_since"]
    assert len({tuple(sorted(one)) for one in said if "colour" not in one}) == 1, "of one shape"

    by_name = json.loads(host.ctl("endpoint", "show", "--workload=web", "--host=host1", "--detailed", "-ojson").out)
    assert [one["endpoint"][:1] for one in by_name] == ["3", "2"]
    # what lists the members of profiles
    host.ctl("profile", "add", "db", "web")
    lines, _ = on_a_terminal(host, 80, "profile", "show", "--detailed")
    assert max(map(len, lines)) <= 80
    assert [[row[0], row[1], row[3], row[4]] for row in columns_of(lines) if row[0] in ("db", "web")] == [
        [name, "host2", "web", "111111111111"] for name in ("db", "web")
    ]
    assert "1" * 32 in "".join(on_a_terminal(host, 80, "profile", "show", "--detailed", "--no-trunc")[0])
    (_, one) = json.loads(host.ctl("profile", "show", "--detailed", "--output=json").out)
    assert [member["workload_name"] for member in one["endpoints"]] == ["web"]
    assert f"1 endpoint ({'1' * 32} of web on host2)" in host.ctl("profile", "remove", "web", status=1).err
    host.etcd.put("/calico/v1/policy/profile/db/rules", "nonsense")
    said = host.ctl("profile", "show", "--detailed", "--output=json")
    (unreadable, sound) = json.loads(said.out)
    assert unreadable["name"] == "db" and unreadable["rules"] is None and unreadable["tags"] == ["db"]
    assert len(unreadable["endpoints"]) == 1 and sound == one and "profile/db/rules" in said.err


def test_endpoints_of_all_hosts(host: Host) -> None:
    for name, address in (("a", "192.168.0.1"), ("b", "192.168.0.2")):
        run("ip", "netns", "add", name)
        host.ctl("container", "add", f"/var/run/netns/{name}", address)
    elsewhere = "/calico/v1/host/host2/workload/docker/0123456789ab/endpoint/ffffffff"
    host.etcd.put(elsewhere, {"state": "active", "mac": None, "ipv4_nets": ["192.168.1.1/32"], "profile_id": "old"})
    broken = "/calico/v1/host/host3/workload/docker/x/endpoint/y"
    host.etcd.put(broken, "{")
    said = host.ctl("endpoint", "show", "--output=json")
    assert json.loads(said.out) == [
        {"host": "host1", "orchestrator": "namespace", "workloads": 2, "endpoints": 2},
        {"host": "host2", "orchestrator": "docker", "workloads": 1, "endpoints": 1},
    ]
    assert broken in said.err
    host.etcd.delete(broken)
    detailed = json.loads(host.ctl("endpoint", "show", "--detailed", "--output=json").out)
    assert sorted(address for one in detailed for address in one["ipv4_nets"]) == [
        "192.168.0.1/32",
        "192.168.0.2/32",
        "192.168.1.1/32",
    ]
    (one,) = json.loads(host.ctl("endpoint", "show", "--workload=0123", "--detailed", "--output=json").out)
    assert one["endpoint"] == "ffffffff" and one["profile_ids"] == ["old"]
    refused(host, "endpoint", "show", "--host=nobody", because="no endpoint with --host=nobody")

    host.ctl("profile", "add", "web")
    host.ctl("endpoint", "ffff", "profile", "append", "web")
    assert json.loads(host.etcd.get(elsewhere))["profile_ids"] == ["old", "web"]
    assert host.ctl("endpoint", "ffff", "profile", "show").out == "old\nweb\n"
    host.ctl("endpoint", "ffff", "profile", "remove", "old")
    host.ctl("endpoint", "ffff", "profile", "set")
    assert json.loads(host.etcd.get(elsewhere))["profile_ids"] == []
    refused(host, "endpoint", "ffff", "profile", "append", "nope", because="does not exist")
    refused(host, "endpoint", "ffff", "profile", "remove", "web", because="not in the list")
    refused(host, "endpoint", "ffff", "profile", "append", because="Say which", status=2)
    refused(host, "endpoint", "", "profile", "set", because="Say which endpoint", status=2)
    refused(host, "endpoint", "eeee", "profile", "show", because="eeee does not exist")
    refused(host, "endpoint", "ffff", "profile", "show", "--host=host1", because="does not exist")
    host.etcd.put(elsewhere.replace("ffffffff", "fffffff0"), {})
    refused(host, "endpoint", "ffff", "profile", "show", because="matches several")
    assert host.ctl("endpoint", "ffffffff", "profile", "show").out == ""
    for name in "ab":
        host.ctl("container", "remove", f"/var/run/netns/{name}")


def test_add_with_json_output(host: Host) -> None:
    run("ip", "netns", "add", "a")
    told = json.loads(host.ctl("container", "add", "/var/run/netns/a", "192.168.0.9", "--output=json").out)
    ((key, record),) = host.records().items()
    assert told == {
        "address": "192.168.0.9",
        "interface": "eth1",
        "mac": record["mac"],
        "host": "host1",
        "orchestrator": "namespace",
        "workload": "-var-run-netns-a",
        "endpoint": key.rpartition("/")[2],
        "host_interface": record["name"],
    }
    host.ctl("container", "remove", "/var/run/netns/a")


# Many commands, and none of their output


def test_a_batch(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "commands"
    file.write_text(
        "# two profiles\nprofile add web\n\ncalicoctl profile add 'db' # the other\n"
        "profile remove nope\nprofile add z\n"
    )
    said = host.ctl("batch", str(file), status=1)
    assert said.out == "Created profile web\nCreated profile db\n"
    assert f"{file}, line 5: Profile nope does not exist." in said.err and "1 not run" in said.err
    assert host.ctl("profile", "show", "--output=json").out.count("name") == 2
    said = host.ctl("batch", "--keep-going", "-", status=1, input=file.read_text())
    assert "Created profile z" in said.out and "standard input, line 5" in said.err
    assert host.ctl("--quiet", "batch", input="profile show\n").out == ""
    usage = host.ctl("batch", status=2, input="profile add\n")
    assert "line 1" in usage.err
    before = host.etcd.tree()
    for line, status, because in (
        ("foo bar", 2, "'foo' is not"),
        ("profile add 'r", 2, "No closing quotation"),
        ("batch x", 1, "cannot be part of a batch"),
        ("node --detach=false", 1, "cannot be part of a batch"),
        ("profile web rule add inbound allow tcp to port 80", 2, "out of place"),
        ("profile web rule add inbound allow tcp to ports 99999", 1, "'99999' is not a valid port"),
        ("profile add two/parts", 1, "not a valid profile name"),
        ("profile web tag add two/parts", 1, "not a valid tag name"),
        ("container add w 192.168.0.300", 1, "not a valid IP address"),
        ("container add w ipv4 --wait=long", 1, "--wait=long"),
        ("container add w/x ipv4", 1, "'w/x' is neither a Docker container's name or id, nor the absolute path"),
        ("container remove w -- -x", 1, "'-x' is neither"),
        ("container w ip remove ipv4", 1, "say which IP address to remove"),
        ("container ../w endpoint show", 1, "'../w' is neither"),
        ("pool add 10.1.0.1/16", 1, "not the CIDR of a pool"),
        ("pool add 10.1.0.0/16 10.1.1.0/24", 1, "10.1.1.0/24 overlaps with 10.1.0.0/16"),
        ("pool range add 10.1.0.64 10.1.0.1", 1, "ends before it begins"),
        ("bgp peer add 192.0.2.254 as many", 1, "AS number"),
        ("node bgp peer add 127.0.0.1 as 1", 1, "127.0.0.1 cannot be used"),
        ("ipam release 192.168.0.1 nothing", 1, "'nothing' is not a valid"),
        ("config felix loglevel loud", 1, "'loud' is not a valid value"),
        ("config felix DefaultEndpointToHostAction DROP", 1, "use 'calicoctl config node felix DefaultEndpoint"),
        ("endpoint show --host=a/b", 1, "--host"),
        ("endpoint ff profile append", 2, "Say which profiles"),
        ("node --ip=fd00::1", 1, "--ip: fd00::1"),
        ("status --output=xml", 2, "--output=xml"),
        ("profile trace a b tcp", 2, "tcp needs a destination port, such as 'tcp 80'"),
    ):
        said = host.ctl("batch", status=status, input=f"profile add q\n{line}\n")
        assert said.err.startswith("standard input, line 2: ") and because in said.err, said
        assert "othing has been run" in said.err and said.out == ""
        assert not re.search(r"[.?];", said.err), said.err
    assert "No such file" in host.ctl("batch", "/nowhere", status=1).err
    assert host.etcd.tree() == before
    # a line cannot read what the lines come from
    assert "line 1: the rules are not JSON" in host.ctl("batch", status=1, input="profile web rule update\n").err


def test_a_command_takes_several_names(host: Host) -> None:
    host.ctl("profile", "add", "a", "b", "c")
    assert host.ctl("profile", "show", "--output=text").out == host.ctl("profile", "show").out
    host.ctl("profile", "a", "tag", "add", "x", "y")
    assert json.loads(host.etcd.get("/calico/v1/policy/profile/a/tags")) == ["a", "x", "y"]
    # what cannot be done keeps nothing else from being done
    said = host.ctl("profile", "a", "tag", "remove", "x", "nope", "y", status=1)
    assert said.out == "Tag x removed from profile a\nTag y removed from profile a\n"
    assert said.err == "Tag nope is not on profile a.\n"
    said = host.ctl("profile", "remove", "a", "nope", "b", status=1)
    assert said.out == "Deleted profile a\nDeleted profile b\n" and said.err == "Profile nope does not exist.\n"
    assert shown(host, "profile") == [{"name": "c"}]
    paths = [f"/var/run/netns/{name}" for name in "ab"]
    for number, path in enumerate(paths, start=1):
        run("ip", "netns", "add", path[-1])
        host.ctl("container", "add", path, f"192.168.0.{number}")
    host.ctl("container", paths[0], "profile", "append", "c")
    assert host.ctl("container", paths[0], "profile", "show").out == "c\n"
    assert json.loads(host.ctl("container", paths[0], "profile", "show", "-o", "json").out) == ["c"]
    said = host.ctl("container", "remove", paths[0], "/var/run/netns/nope", paths[1], status=1)
    assert said.out == "".join(f"Removed Calico from {path}\n" for path in paths)
    assert "/var/run/netns/nope" in said.err and len(said.err.splitlines()) == 1
    said = host.ctl("ipam", "release", "192.168.0.1", "192.168.0.2", status=1)
    assert said.err == "IP 192.168.0.1 is not assigned.\nIP 192.168.0.2 is not assigned.\n"


def test_a_batch_shows_its_progress_on_a_terminal(host: Host) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    done = subprocess.run(
        [CALICOCTL, "batch"],
        input="profile add a\nprofile add b\n",
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=host.environment(),
        text=True,
    )
    shown = os.read(ours, 10000)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0 and "Created profile b" in done.stdout
    assert b"batch" in shown and b"/2" in shown


def test_quiet_prints_errors_alone(host: Host) -> None:
    said = host.ctl("--quiet", "pool", "show")
    assert (said.out, said.err) == ("", "")
    said = host.ctl("profile", "remove", "nope", "--quiet", status=1)
    assert said.out == "" and "does not exist" in said.err


# who reads the output, and what a batch takes


def with_closed_reader(host: Host, *words: str) -> int:
    """Run a command whose standard output nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    try:
        return subprocess.run([CALICOCTL, *words], stdout=write, env=host.environment(), timeout=60).returncode
    finally:
        os.close(write)


def test_a_reader_that_has_seen_enough_stops_nothing(host: Host, tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text("pool show\n" * 3 + "pool add 10.5.0.0/24 10.6.0.0/24\nprofile add web\n")
    assert with_closed_reader(host, "batch", str(lines)) == 0
    assert {"10.5.0.0/24", "10.6.0.0/24"} <= {pool["cidr"] for pool in shown(host, "pool")}
    assert shown(host, "profile") == [{"name": "web"}]
    run("ip", "netns", "add", "blue")
    assert with_closed_reader(host, "container", "add", "/var/run/netns/blue", "ipv4", "--wait=0") == 1
    host.ctl("container", "remove", "/var/run/netns/blue")
    with open("/dev/full", "w") as full:
        done = subprocess.run([CALICOCTL, "pool", "show"], stdout=full, stderr=subprocess.PIPE, env=host.environment())
        assert done.returncode == 1 and b"cannot write the output" in done.stderr
        lines.write_text("profile nope rule show\nprofile add late\n")
        command = [CALICOCTL, "batch", "--keep-going", str(lines)]
        assert subprocess.run(command, stderr=full, env=host.environment()).returncode == 1
    assert {"name": "late"} in shown(host, "profile")


def shown(host: Host, what: str) -> list[dict]:
    return json.loads(host.ctl(what, "show", "--output=json").out)


def test_lines_of_a_batch(host: Host, tmp_path: Path) -> None:
    lines = tmp_path / "lines"

    def batch(text: str, status: int = 0) -> str:
        lines.write_text(text)
        return host.ctl("batch", str(lines), status=status).err

    batch("\ufeff--quiet profile add one # a comment\r\ncalicoctl --debug profile add 'two' #another\r\n#\n")
    assert shown(host, "profile") == [{"name": "one"}, {"name": "two"}]
    assert "'a#b' is not a valid profile name" in batch("profile add a#b\n", 1)
    for word in ("'# no comment'", '"# no comment"', "\\#no", "'a'#b"):
        assert "is not a valid profile name" in batch(f"profile add {word}\n", 1), word
    for line in ("node --ip=192.0.2.2 --detach false", "node --det=false", "batch x", "completion candidates bash x"):
        assert "cannot be part of a batch; nothing has been run" in batch(f"profile add three\n{line}\n", 1), line
    assert "cannot be used" in batch('container add "/x\0" ipv4\n', 1)
    assert len(shown(host, "profile")) == 2


def test_a_batch_holds_no_connections(host: Host, tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text("pool show\nipam show\n" * 60)
    limited = ["/usr/bin/prlimit", "--nofile=40", CALICOCTL]
    assert host.ctl("batch", str(lines), command=limited).err == ""


def test_pools_that_overlap_are_refused_also_when_added_at_once(host: Host) -> None:
    for number in range(6):
        wide, narrow = f"10.{number * 16}.0.0/12", f"10.{number * 16 + 1}.0.0/16"
        commands = [host.start("pool", "add", cidr) for cidr in (wide, narrow)]
        said = [command.communicate()[1] for command in commands]
        assert sorted(command.returncode for command in commands) == [0, 1], said
        assert "overlaps" in "".join(said)
        assert len({wide, narrow} & {pool["cidr"] for pool in shown(host, "pool")}) == 1


def test_pools_under_odd_keys_and_names(host: Host) -> None:
    host.etcd.put("/calico/v1/ipam/v4/pool/mine", {"cidr": "10.0.0.0/8", "x": 1})
    host.ctl("pool", "add", "10.0.0.0/8", "--nat-outgoing")
    assert pools(host)["10.0.0.0/8"] == {"cidr": "10.0.0.0/8", "masquerade": True, "x": 1}
    assert f"{POOLS}/mine" in host.etcd.tree() and f"{POOLS}/10.0.0.0-8" not in host.etcd.tree()
    host.ctl("pool", "add", "fd00:1::/64", "FD00:1::/64")
    host.ctl("pool", "remove", "fd00:1::/64", "FD00:1::0/64")
    assert "fd00:1::/64" not in str(shown(host, "pool"))


def test_odd_words_and_settings(host: Host) -> None:
    assert host.ctl("endpoint", "show", "--host=", status=1).err.startswith("--host: ")
    assert "not UTF-8" in host.ctl("endpoint", "show", b"--host=\xff", status=1).err
    for where in ("tcp://1.2.3.4:abc", "tcp://1.2.3.4:99999", "http://[::1", "tcp://[::1]:x"):
        said = host.ctl("container", "x", "endpoint", "show", status=1, env={"DOCKER_HOST": where}).err
        assert said.startswith("Cannot ask Docker about x"), said
    for port in ("0" * 5 + "1" + "0" * 5000, "00000800000", "65536", "-1", "x"):
        assert "<PORT>" in host.ctl("profile", "trace", "10.0.0.1", "10.0.0.2", "tcp", port, status=None).err
    (Path("/run/calico") / host.name).mkdir(parents=True)
    Path(f"/run/calico/{host.name}/felix.json").write_text(json.dumps({"host": host.name, "resyncs": 0}))
    assert "is not running" in host.ctl("status", status=1).err
