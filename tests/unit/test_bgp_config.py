"""BIRD's configuration: what follows from the store, and its text."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from calicoctl.datastore.reserved import HostNetwork, InterfaceAddress
from calicoctl.desired.snapshot import Snapshot
from calicoctl.errors import CalicoError
from calicoctl.felix.bgp import config
from calicoctl.felix.bgp.config import Config, Neighbour
from calicoctl.felix.bgp.passwords import Passwords
from tests.unit.snapshots import HOST, Store

BGP = "/calico/bgp/v1"
OWN = {4: "172.18.0.11", 6: "fd00:18::b"}
FOLDER = Path("/run/calico/host1/bird")


class Bgp(Store):
    """The store of two hosts, and the configuration of one of them."""

    def __init__(self) -> None:
        super().__init__(Snapshot(HOST))
        self.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": "192.168.0.0/16"})
        self.put("/calico/v1/ipam/v6/pool/fd80::-64", {"cidr": "fd80::/64"})
        self.host(HOST, *OWN.values())
        self.host("host2", "172.18.0.12", "fd00:18::c")
        self.connect()

    def connect(self, *addresses: InterfaceAddress) -> None:
        home = [InterfaceAddress(OWN[4], OWN[4], 24, "eth0"), InterfaceAddress(OWN[6], OWN[6], 64, "eth0")]
        self.snapshot.set_network(HostNetwork.of([*home, *addresses]))

    def host(self, name: str, ipv4: str | None, ipv6: str | None = None) -> None:
        self.put(f"{BGP}/host/{name}/ip_addr_v4", ipv4)
        self.put(f"{BGP}/host/{name}/ip_addr_v6", ipv6)

    def peer(self, ip: str, as_num: str, of: str = "global") -> None:
        self.put(f"{BGP}/{of}/peer_v{6 if ':' in ip else 4}/{ip}", {"ip": ip, "as_num": as_num})

    @property
    def config(self) -> Config:
        return config.derive(self.snapshot, OWN.values())

    @property
    def names(self) -> list[str]:
        return [neighbour.name for neighbour in self.config.neighbours]

    def text(self, passwords: Passwords | None = None) -> str:
        return config.text(self.config, passwords or Passwords(), FOLDER)


@pytest.fixture
def bgp() -> Bgp:
    return Bgp()


def block(text: str, head: str) -> str:
    """Return a block `HEAD … { … }` of a configuration."""
    found = re.search(rf"^{re.escape(head)}.*?^}}$", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no '{head}' in:\n{text}"
    return found[0]


def test_the_whole_text(bgp: Bgp) -> None:
    bgp.put(f"/calico/ipam/v2/host/{HOST}/ipv4/block/192.168.1.0-26", "")
    bgp.endpoint(1, "192.168.2.7")
    text = bgp.text()
    assert text.startswith(
        """\
# Written by calicoctl. Changes are overwritten.
log "/run/calico/host1/bird/log" 1048576 "/run/calico/host1/bird/log.1" all;
debug protocols { states };
router id 172.18.0.11;
timeformat protocol iso long;
graceful restart wait 8;
protocol device { scan time 10; }
protocol direct { ipv4; ipv6; interface -"cali*", -"docker*", -"vxlan*.calico", "*"; }
filter learned4 {
  if net ~ [ 192.168.0.0/16+ ] then accept;
  reject;
}
filter to_kernel4 {
  if source = RTS_BGP then { krt_prefsrc = 172.18.0.11; accept; }
  if proto = "blocks4" then accept;
  reject;
}
protocol kernel kernel4 {
  ipv4 { import where krt_source != 80 && krt_source != 81; export filter to_kernel4; };
  learn; persist; merge paths on; scan time 20; graceful restart;
}
protocol static blocks4 { ipv4;
  route 192.168.1.0/26 blackhole;
}
protocol static addresses4 { ipv4;
  route 192.168.2.7/32 unreachable;
}
template bgp peer4 {
  local 172.18.0.11 as 64511;
  multihop; graceful restart on; graceful restart time 30;
  hold time 30; keepalive time 10;
  connect delay time 1; connect retry time 5; error wait time 2, 30;
  ipv4 { import table on; import filter learned4; export where source = RTS_STATIC; next hop self; };
}
protocol bgp mesh4_172_18_0_12 from peer4 {
  neighbor 172.18.0.12 as 64511; connect delay time 6;
}
filter learned6 {
"""
    )
    assert "neighbor fd00:18::c as 64511;" in block(text, "protocol bgp mesh6_fd00_18__c from peer6")


def test_the_mesh_is_all_hosts_and_each_ip_version_on_its_own(bgp: Bgp) -> None:
    bgp.host("host3", "172.18.0.13")
    bgp.host("host4", None, "fd00:18::d")
    bgp.put("/calico/v1/host/old/bird_ip", "172.18.0.14")
    assert bgp.names == ["mesh4_172_18_0_12", "mesh4_172_18_0_13", "mesh6_fd00_18__c", "mesh6_fd00_18__d"]
    bgp.host(HOST, OWN[4])
    assert bgp.names == ["mesh4_172_18_0_12", "mesh4_172_18_0_13"]
    bgp.put(f"{BGP}/global/node_mesh", {"enabled": False})
    assert bgp.names == [] and "template" not in bgp.text()


def test_of_two_hosts_of_the_mesh_the_one_with_the_higher_address_connects_first(bgp: Bgp) -> None:
    bgp.host("host3", "172.18.0.9", "fd00:18::a")
    bgp.peer("172.18.0.254", "64600")
    bgp.put(f"{BGP}/host/host2/as_num", "65002")
    text = bgp.text()
    for line in (
        "neighbor 172.18.0.9 as 64511; connect delay time 1;",
        "neighbor 172.18.0.12 as 65002; connect delay time 6;",
        "neighbor 172.18.0.254 as 64600;",
        "neighbor fd00:18::a as 64511; connect delay time 1;",
        "neighbor fd00:18::c as 65002; connect delay time 6;",
    ):
        assert f"  {line}\n" in text
    assert config.SECOND_CALL * 0.75 > 4 * config.FIRST_CALL and config.SECOND_CALL < config.RESTART_WAIT
    without = config.text(bgp.config, Passwords(), FOLDER, turns=False)
    assert without == re.sub(r"(neighbor .*;) connect delay time \d;", r"\1", text)
    assert config.has_turns(text) and not config.has_turns(without)
    bgp.put(f"{BGP}/global/node_mesh", {"enabled": False})
    assert config.has_turns(config.text(bgp.config, Passwords(), FOLDER, turns=False)), "there is nothing to reset"


def test_as_numbers(bgp: Bgp) -> None:
    bgp.put(f"{BGP}/global/as_num", "65000")
    bgp.put(f"{BGP}/host/host2/as_num", "65002")
    assert bgp.config.neighbours[0] == Neighbour("mesh", "172.18.0.12", "65002")
    assert "local 172.18.0.11 as 65000;" in bgp.text()
    bgp.put(f"{BGP}/host/{HOST}/as_num", "4200000001")
    assert "local 172.18.0.11 as 4200000001;" in bgp.text() and "neighbor 172.18.0.12 as 65002;" in bgp.text()


def test_peers_of_all_hosts_and_of_this_one(bgp: Bgp) -> None:
    bgp.peer("172.18.0.254", "64600")
    bgp.peer("fd00:18::fe", "64601", of=f"host/{HOST}")
    bgp.peer("172.18.0.253", "64602", of="host/host2")
    assert bgp.names == ["mesh4_172_18_0_12", "global4_172_18_0_254", "mesh6_fd00_18__c", "node6_fd00_18__fe"]
    assert "neighbor fd00:18::fe as 64601;" in bgp.text()


def test_no_neighbour_is_there_twice_and_none_is_this_host(bgp: Bgp) -> None:
    bgp.host("host3", "172.18.0.12")
    bgp.peer("172.18.0.12", "64600")
    bgp.peer("172.18.0.20", "64601")
    bgp.peer("172.18.0.20", "64602", of=f"host/{HOST}")
    bgp.peer(OWN[4], "64600")
    bgp.peer("172.18.5.5", "64600")
    bgp.connect(InterfaceAddress("172.18.5.5", "172.18.5.5", 24, "eth1"))
    found = {neighbour.address: neighbour for neighbour in bgp.config.families[0].neighbours}
    assert set(found) == {"172.18.0.12", "172.18.0.20"} and len(bgp.config.families[0].neighbours) == 2
    assert found["172.18.0.12"] == Neighbour("mesh", "172.18.0.12", "64511")
    assert found["172.18.0.20"] == Neighbour("node", "172.18.0.20", "64602"), "the peer of this host goes first"
    bgp.put(f"{BGP}/global/node_mesh", {"enabled": False})
    assert bgp.names == ["global4_172_18_0_12", "node4_172_18_0_20"]


def test_names_depend_on_nothing_but_kind_and_address(bgp: Bgp) -> None:
    before = bgp.names
    bgp.host("a-host", "172.18.0.1")
    bgp.peer("172.18.0.2", "64600")
    assert set(before) < set(bgp.names)
    assert all(re.fullmatch("[a-z]+[46]_[0-9a-f_]+", name) and len(name) < 64 for name in bgp.names)
    longest = Neighbour("global", "1111:2222:3333:4444:5555:6666:7777:8888", "1").name
    assert longest == "global6_1111_2222_3333_4444_5555_6666_7777_8888"


def test_the_hold_time_and_a_third_of_it(bgp: Bgp) -> None:
    for value, text in (
        ("9", "graceful restart time 9;\n  hold time 9; keepalive time 3;"),
        ("3", "graceful restart time 3;\n  hold time 3; keepalive time 1;"),
        ("65535", "graceful restart time 4095;\n  hold time 65535; keepalive time 21845;"),
    ):
        bgp.put(f"{BGP}/global/HoldTime", value)
        assert text in block(bgp.text(), "template bgp peer4") and text in block(bgp.text(), "template bgp peer6")


def test_the_log_level(bgp: Bgp) -> None:
    assert "\ndebug protocols { states };\n" in bgp.text()
    bgp.put(f"{BGP}/global/loglevel", "info")
    assert "\ndebug protocols { states, events };\n" in bgp.text()
    bgp.put(f"{BGP}/host/{HOST}/loglevel", "debug")
    assert "\ndebug protocols all;\n" in bgp.text()


def test_a_host_with_ipv6_alone_has_a_router_id_of_its_own(bgp: Bgp) -> None:
    bgp.host(HOST, None, OWN[6])
    first, *_ = bgp.config.router_id.split(".")
    assert int(first) >= 240, "no host's address"
    other = Store(Snapshot("host2"))
    assert config.derive(other.snapshot, ()).router_id != bgp.config.router_id
    assert bgp.names == ["mesh6_fd00_18__c"] and "template bgp peer4" not in bgp.text()
    assert "protocol kernel kernel4" in bgp.text(), "or routes from before would stay"


def test_an_address_that_is_not_here_is_neither_bound_nor_a_source(bgp: Bgp) -> None:
    """As behind a translation of addresses: the kernel would refuse both."""
    text = config.text(config.derive(bgp.snapshot, [OWN[6]]), Passwords(), FOLDER)
    assert "local as 64511;" in block(text, "template bgp peer4")
    assert "if source = RTS_BGP then { accept; }" in block(text, "filter to_kernel4")
    assert "krt_prefsrc = fd00:18::b;" in block(text, "filter to_kernel6")


def test_what_this_host_needs_is_guarded(bgp: Bgp) -> None:
    bgp.connect(InterfaceAddress("192.168.9.1", "192.168.9.1", 24, "eth1"))
    assert block(bgp.text(), "filter learned4") == (
        "filter learned4 {\n"
        "  if net ~ [ 192.168.9.0/24{0,31} ] then reject;\n"
        "  if net ~ [ 192.168.9.1/32{0,32} ] then reject;\n"
        "  if net ~ [ 192.168.0.0/16+ ] then accept;\n"
        "  reject;\n"
        "}"
    )


def test_without_a_pool_nothing_is_learned(bgp: Bgp) -> None:
    bgp.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": "192.168.0.0/16", "vxlan_mode": "always"})
    assert block(bgp.text(), "filter learned4") == "filter learned4 {\n  reject;\n}"


def test_passwords(bgp: Bgp) -> None:
    bgp.peer("172.18.0.254", "64600")
    bgp.peer("172.18.0.253", "64600")
    text = bgp.text(Passwords({"172.18.0.254": "tor's; secret"}, "of the mesh"))
    assert 'neighbor 172.18.0.254 as 64600; password "tor\'s; secret";' in text
    assert text.count('password "of the mesh";') == 2, "one for each IP version"
    assert "neighbor 172.18.0.253 as 64600;\n" in text, "it is in no mesh"
    assert "password" not in block(bgp.text(Passwords({}, None)), "protocol bgp mesh4_172_18_0_12")
    for bad in ('x"; }', "a\nb"):
        with pytest.raises(CalicoError) as error:
            bgp.text(Passwords({}, bad))
        assert bad not in str(error.value)


HOSTILE = ['"; } protocol bgp x {', '1; include "/etc/shadow";', "x\n}", "{", "172.18.0.9; }", "${x}", "0xff", "٤"]


@pytest.mark.parametrize("value", HOSTILE)
def test_nothing_from_etcd_reaches_the_text_unchecked(bgp: Bgp, value: str) -> None:
    before = bgp.text()
    entries: list[tuple[str, Any]] = [
        (f"{BGP}/host/{value.replace('/', '')}/ip_addr_v4", value),
        (f"{BGP}/host/host9/ip_addr_v4", value),
        (f"{BGP}/host/host2/as_num", value),
        (f"{BGP}/global/as_num", value),
        (f"{BGP}/global/HoldTime", value),
        (f"{BGP}/global/loglevel", value),
        (f"{BGP}/global/node_mesh", {"enabled": value}),
        (f"{BGP}/global/peer_v4/1", {"ip": value, "as_num": "1"}),
        (f"{BGP}/global/peer_v4/2", {"ip": "172.18.0.9", "as_num": value}),
        (f"/calico/ipam/v2/host/{HOST}/ipv4/block/{value.replace('/', '')}-26", ""),
        (f"/calico/ipam/v2/host/{HOST}/ipv4/block/192.168.1.0-{value.replace('/', '')}", ""),
        ("/calico/v1/ipam/v4/pool/1", {"cidr": value}),
        ("/calico/v1/ipam/v4/pool/2", {"cidr": f"10.0.0.0/{value}"}),
        ("/calico/v1/ipam/v4/pool/3", {"cidr": "10.0.0.0/8", "vxlan_mode": value}),
    ]
    for key, content in entries:
        bgp.put(key, content)
    bgp.endpoint(1, f"192.168.2.7{value}")
    assert bgp.text() == before


def test_bird_accepts_the_text(bgp: Bgp, tmp_path: Path) -> None:
    bird = shutil.which("bird", path=f"{os.environ['PATH']}:/usr/sbin")
    assert bird is not None, "the tests need BIRD: 'make packages' installs it"
    bgp.peer("172.18.0.254", "64600")
    bgp.connect(
        InterfaceAddress("192.168.9.1", "192.168.9.1", 24, "eth1"), InterfaceAddress("fd80::5", "fd80::5", 120, "eth1")
    )
    bgp.put(f"/calico/ipam/v2/host/{HOST}/ipv4/block/192.168.1.0-26", "")
    bgp.endpoint(1, "192.168.2.7", "fd80::7:1")
    bgp.put(f"{BGP}/global/loglevel", "debug")
    text = config.text(bgp.config, Passwords({"172.18.0.254": "tor's; {secret}"}, "ö # of the mesh"), tmp_path)
    (tmp_path / "conf").write_text(text)
    done = subprocess.run([bird, "-p", "-c", str(tmp_path / "conf")], capture_output=True, text=True)
    # BIRD 2.17 warns of an option that BIRD 2.0 does not know
    complaints = [line for line in done.stderr.splitlines() if "authentication option, assuming MD5" not in line]
    assert (done.returncode, complaints) == (0, [])
