"""How `checksystem` assesses neighbour tables. No test may fill a real one, which all of the machine share."""

from __future__ import annotations

import platform
import socket
from pathlib import Path

import pytest

from calicoctl import netlink
from calicoctl.diagnose import checks


@pytest.mark.parametrize(
    ("kernel", "limit", "overflows", "endpoints", "ok", "says"),
    [
        ("6.1.0-13-amd64", 1024, 0, 1024, (True, False), ("room for 1024 endpoints", "room for 170 endpoints")),
        ("6.1.0-13-amd64", 1024, 0, 170, (True, True), ("here are 170", "here are 170")),
        ("6.1.0-13-amd64", 1024, 3, 2, (False, False), ("it was full 3 times", "it was full 3 times")),
        ("6.1.0-13-amd64", 4096, 3, 2, (True, True), ("it was full 3 times", "it was full 3 times")),
        ("4.19.0-6-amd64", 1024, 0, 341, (True, False), ("room for 341 endpoints", "room for 128 endpoints")),
        ("5.0", 1024, 0, 0, (True, True), ("room for 1024 endpoints", "room for 170 endpoints")),
    ],
)
def test_how_many_endpoints_fit(
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    limit: int,
    overflows: int,
    endpoints: int,
    ok: tuple[bool, bool],
    says: tuple[str, str],
) -> None:
    monkeypatch.setattr(platform, "release", lambda: kernel)
    monkeypatch.setattr(netlink, "neighbour_limit", lambda family: netlink.NeighbourLimit(limit, overflows))
    names = [(1, "lo"), *((index, f"cali{index}") for index in range(endpoints))]
    monkeypatch.setattr(socket, "if_nameindex", lambda: names)
    found = list(checks._neighbours())
    assert tuple(check.ok for check in found) == ok
    assert all(text in check.found for text, check in zip(says, found))
    if endpoints == 1024:
        assert "net.ipv6.neigh.default.gc_thresh2 to 6144 and gc_thresh3 to 12288" in found[1].advice


NFT = """table inet filter {{
	chain input {{
		type filter hook input priority filter; policy {policy};
		tcp dport {{ 22, {port} }} accept
	}}
}}
"""
OURS = """table inet calico {
	chain x {
		type filter hook input priority filter - 10; policy drop;
		tcp dport 179 accept
	}
}
"""
SAVED = """*filter
:INPUT {policy} [0:0]
-A INPUT -p tcp -m tcp --dport {port} -j ACCEPT
{last}
COMMIT
"""


@pytest.mark.parametrize(
    ("rules", "missing"),
    [
        ("", 0),
        (OURS, 0),
        (NFT.format(policy="accept", port=80), 0),
        (NFT.format(policy="drop", port=80), 2),
        (NFT.format(policy="drop", port=80) + OURS, 2),
        (NFT.format(policy="drop", port=179), 1),
        (NFT.format(policy="drop", port="179, 4789"), 0),
        (NFT.format(policy="drop", port="bgp, 4789"), 0),
        (NFT.format(policy="drop", port="1-9 } ip saddr { 192.0.2.179, 10.179.0.0/16"), 2),
        (NFT.format(policy="drop", port="22 } counter packets 179 bytes 4789 #"), 2),
        (NFT.format(policy="drop", port="@mine") + "set mine { elements = { 22, 179, 4789 }", 0),
        (SAVED.format(policy="ACCEPT", port=1179, last=""), 0),
        (SAVED.format(policy="DROP", port=1179, last=""), 2),
        (SAVED.format(policy="DROP", port=179, last=""), 1),
        (
            SAVED.format(policy="DROP", port="179:180", last="-A INPUT -p udp -m multiport --dports 53,4789 -j ACCEPT"),
            0,
        ),
        (SAVED.format(policy="ACCEPT", port=22, last="-A INPUT -j REJECT --reject-with icmp-port-unreachable"), 2),
        (SAVED.format(policy="ACCEPT", port=22, last="-A INPUT -s 192.0.2.1/32 -j DROP"), 0),
        (SAVED.format(policy="ACCEPT", port=22, last="-A OUTPUT -j DROP"), 2),
        (NFT.format(policy="drop", port=80).replace("hook input", "hook output"), 2),
    ],
)
def test_a_firewall_that_drops_by_default_and_mentions_no_port_of_other_hosts(rules: str, missing: int) -> None:
    assert len(checks.ports_not_mentioned(rules)) == missing


@pytest.mark.parametrize(
    ("rule", "drops"),
    [
        ("tcp dport 179 drop", True),
        ("tcp sport { 22, 179 } counter packets 4 bytes 240 reject with tcp reset", True),
        ("ip saddr != 172.18.0.0/16 udp dport 4789 drop", True),
        ("tcp dport 179 accept", False),
        ("tcp dport 22 counter packets 179 bytes 4789 drop", False),
        ("ip saddr 10.0.0.179 tcp dport 1179 drop", False),
        ("-A OUTPUT -p tcp -m tcp --dport 179 -j DROP", True),
        ("-A INPUT -p udp -m multiport --dports 53,4789 -j REJECT --reject-with icmp-port-unreachable", True),
        ("-A INPUT -p tcp -m tcp --dport 179 -j ACCEPT", False),
    ],
)
def test_rules_that_drop_what_other_hosts_may_send(rule: str, drops: bool) -> None:
    found = checks.dropping_rules(f"table inet mine {{\n\t\t{rule}\n}}\n{OURS}")
    assert len(found) == drops and all(one in rule for one in found if "counter" not in rule)


def test_such_a_rule_is_a_problem_if_a_session_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = "table inet mine {\n\t\ttcp dport 179 drop\n}\n"
    monkeypatch.setattr(checks.os, "geteuid", lambda: 0)
    monkeypatch.setattr(checks.Nft, "run", lambda self, commands: rules)
    monkeypatch.setattr(checks.docker_firewall, "saved", lambda: "")
    up, down = {"peer": "192.0.2.1", "up": True}, {"peer": "192.0.2.2", "up": False}
    for sessions in (None, [], [up]):
        found = checks._ports(sessions)
        assert found.ok and "tcp dport 179 drop" in found.found
    assert not checks._ports([up, down]).ok and not checks._ports([up, down]).needed


@pytest.mark.parametrize(
    ("underlay", "overlay", "configured", "links", "wrong"),
    [
        ((None, None), None, 9000, {"cali1": 9000}, ""),
        ((1500, None), 1450, None, {"cali1": 1500, "cali2": 1450}, ""),
        ((1500, 9000), 1450, 1450, {"cali1": 9000}, ""),
        ((1400, None), None, None, {"cali1": 1500, "cali2": 1400, "cali3": 1500}, "cali1, cali3: larger than 1400"),
        ((1500, None), 1450, 1500, {}, "new ones get 1500, as configured, and 1450 bytes"),
        ((1500, 1400), None, 1500, {}, "new ones get 1500, as configured, and 1400 bytes"),
        ((1500, None), None, 1500, {}, ""),
    ],
)
def test_interfaces_that_send_larger_packets_than_the_underlay_carries(
    underlay: tuple[int | None, int | None],
    overlay: int | None,
    configured: int | None,
    links: dict[str, int],
    wrong: str,
) -> None:
    reported = {"underlay": dict(zip(("ipv4", "ipv6"), underlay)), "overlay": overlay, "configured": configured}
    found = checks.mtu_check("MTU", reported, links)
    assert found.ok is not bool(wrong) and wrong in found.found and not found.needed


def test_a_service_that_flushes_all_tables_is_found(tmp_path: Path) -> None:
    def found() -> tuple[bool, str]:
        check = checks.nftables_service(tmp_path)
        assert not check.needed
        return check.ok, check.found

    assert found() == (True, "there is no /etc/nftables.conf")
    (tmp_path / "nftables.conf").write_text("#!/usr/sbin/nft -f\n\nflush ruleset\n\ntable inet filter {\n}\n")
    assert found() == (True, "it is not enabled")
    wants = tmp_path / "systemd/system/sysinit.target.wants"
    wants.mkdir(parents=True)
    (wants / "nftables.service").symlink_to("/lib/systemd/system/nftables.service")
    ok, text = found()
    assert not ok and "'flush ruleset' in /etc/nftables.conf" in text and "ExecStop" in text
    (tmp_path / "nftables.conf").write_text("# flush ruleset\ntable inet filter\ndelete table inet filter\n")
    assert found() == (False, "it deletes them when it ends, by its ExecStop")
    own = tmp_path / "systemd/system/nftables.service.d/override.conf"
    own.parent.mkdir()
    own.write_text("[Service]\nExecStop=\nExecStop=/usr/sbin/nft delete table inet filter\n")
    assert found() == (True, "does not delete them")
