"""Addresses that are not for workloads: those of a host, its networks and gateways."""

from __future__ import annotations

import time

import pytest

from calicoctl.datastore import reserved
from calicoctl.datastore.reserved import HostNetwork, InterfaceAddress, Network, Reserved


def address(cidr: str, interface: str = "eth0", peer: str = "", broadcast: str | None = None) -> InterfaceAddress:
    own, _, length = cidr.partition("/")
    return InterfaceAddress(own, peer or own, int(length), interface, broadcast)


HOME = HostNetwork.of(
    [
        address("127.0.0.1/8", "lo"),
        address("192.168.0.10/24", broadcast="192.168.0.254"),
        address("192.168.7.1/31", "eth1"),
        address("192.168.8.1/32", "tun0", peer="192.168.8.2"),
        address("192.168.9.1/32", "lo"),
        address("172.17.0.1/16", "docker0"),
        address("10.65.0.1/24", "cali123"),
        address("fd00::10/64"),
        address("fd00:1::1/128"),
    ],
    gateways=[("192.168.0.1", "eth0"), ("10.0.0.9", "eth1"), ("10.65.0.7", "cali123"), ("192.168.7.1", "eth0")],
    local=[("10.99.0.0", 24)],
    on_link=[
        ("fd00:1::", 64, "eth1"),
        ("fd00:1::", 68, "eth1"),
        ("fd00::", 64, "eth0"),
        ("fd00:1::1", 128, "eth0"),
        ("fd00:2::", 64, "lo"),
    ],
)
RESERVED = Reserved(
    HOME, {"192.168.0.2": "host2", "fd00:5::1": "host3", "192.0.2.1": "host1", "192.168.0.10": "host1"}, "host1"
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("192.168.0.10", "this host's own address (on eth0)"),
        ("192.168.0.1", "a gateway of this host (on eth0)"),
        ("192.168.0.2", "that of host host2"),
        ("192.168.0.254", "the broadcast address of 192.168.0.0/24 (on eth0)"),
        ("192.168.0.255", "the broadcast address of 192.168.0.0/24 (on eth0)"),
        ("192.168.0.3", None),
        ("192.168.7.0", None),
        ("192.168.7.1", "this host's own address (on eth1)"),
        ("192.168.8.2", None),
        ("192.168.9.1", "this host's own address (on lo)"),
        ("172.17.255.255", "the broadcast address of 172.17.0.0/16 (on docker0)"),
        ("10.0.0.9", "a gateway of this host (on eth1)"),
        ("10.65.0.7", None),
        ("10.65.0.1", "this host's own address (on cali123)"),
        ("10.65.0.255", None),
        ("10.99.0.77", "this host's own address (in its local network 10.99.0.0/24)"),
        ("fd00::10", "this host's own address (on eth0)"),
        ("fd00::ffff:ffff:ffff:ffff", None),
        ("192.0.2.1", "this host's own address (it is registered with it)"),
        ("fd00:5::1", "that of host host3"),
    ],
)
def test_which_addresses_a_host_uses(text: str, why: str | None) -> None:
    assert RESERVED.user(text) == RESERVED.refusal(text) == why


def test_what_means_a_network_as_a_whole_is_given_to_nobody_but_may_be_kept() -> None:
    assert RESERVED.user("192.168.0.0") is None and RESERVED.user("fd00::") is None
    assert RESERVED.refusal("192.168.0.0") == "the network address of 192.168.0.0/24 (on eth0)"
    assert RESERVED.refusal("fd00::") == "the anycast address of the routers of fd00::/64 (on eth0)"


def test_which_networks_a_host_is_connected_to() -> None:
    assert {(network.cidr, network.interface) for network in HOME.networks} == {
        ("192.168.0.0/24", "eth0"),
        ("192.168.7.0/31", "eth1"),
        ("192.168.8.2/32", "tun0"),
        ("172.17.0.0/16", "docker0"),
        ("fd00::/64", "eth0"),
        ("fd00:1::/64", "eth1"),
    }
    assert [network.cidr for network in HOME.overlapping("192.168.0.0/21")] == ["192.168.0.0/24", "192.168.7.0/31"]
    assert [network.cidr for network in HOME.overlapping("172.17.3.0/24")] == ["172.17.0.0/16"]
    assert HOME.overlapping("10.0.0.0/8") == []
    for text, is_free in (("192.168.0.3", False), ("192.168.1.3", True), ("10.0.0.9", False), ("fd00:3::", True)):
        single = Network.parse(f"{text}/{128 if ':' in text else 32}")
        assert RESERVED.is_free_for_any(single.version, single.first) is is_free


def test_where_nothing_is_known_nothing_is_reserved() -> None:
    assert Reserved().refusal("192.168.0.0") is None and Reserved().is_free_for_any(6, 5)


def test_lines_of_a_batch_read_what_is_reserved_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, reads = 100.0, 0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def read() -> Reserved:
        nonlocal reads
        reads += 1
        return Reserved(host=str(reads))

    def found(version: int = 4) -> str:
        return reserved.recent_or_read(version, read).host

    assert [found(), found()] == ["1", "2"]
    reserved.reuse(True)
    assert [found(), found(), found(6), found()] == ["3", "3", "4", "3"]
    now += reserved.MAX_AGE
    reserved.reuse(True)
    assert found() == "3"
    now += 0.1
    assert [found(), found(6), found()] == ["5", "6", "5"]
    reserved.reuse(False)
    assert [found(), found()] == ["7", "8"]
    reserved.reuse(True)
    assert [found(), found()] == ["9", "9"]
    reserved.reuse(False)
