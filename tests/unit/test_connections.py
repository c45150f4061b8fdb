"""Connections as `conntrack -L` prints them."""

from __future__ import annotations

from calicoctl.felix.connections import parse
from calicoctl.policy import Packet


def test_a_plain_connection() -> None:
    found = parse(
        "tcp      6 431999 ESTABLISHED src=192.168.0.1 dst=192.168.0.2 sport=4000 dport=80 src=192.168.0.2 "
        "dst=192.168.0.1 sport=80 dport=4000 [ASSURED] mark=0 use=1"
    )
    assert found.original == found.forwarded == Packet("192.168.0.1", "192.168.0.2", 6, 4000, 80)


def test_translated_destination_and_source() -> None:
    """The forward hook sees a packet after its destination was changed, and before its source is."""
    found = parse(
        "tcp 6 100 SYN_SENT src=192.168.0.1 dst=203.0.113.1 sport=4000 dport=8080 [UNREPLIED] src=198.51.100.2 "
        "dst=198.51.100.1 sport=80 dport=61000 mark=0 use=1"
    )
    assert found.original == Packet("192.168.0.1", "203.0.113.1", 6, 4000, 8080)
    assert found.forwarded == Packet("192.168.0.1", "198.51.100.2", 6, 4000, 80)


def test_icmp_and_protocols_without_ports() -> None:
    found = parse(
        "icmpv6 58 29 src=fd00::1 dst=fd00:0::2 type=128 code=0 id=7 src=fd00::2 dst=fd00::1 type=129 code=0 id=7"
    )
    assert found.original == Packet("fd00::1", "fd00::2", 58, None, None, 128, 0) and found.selectors["icmp_id"] == 7
    found = parse(
        "unknown  47 597 src=192.168.0.1 dst=192.168.0.2 [UNREPLIED] src=192.168.0.2 dst=192.168.0.1 mark=0 use=1"
    )
    assert found.forwarded == Packet("192.168.0.1", "192.168.0.2", 47)


def test_the_keys_of_gre_stand_for_ports() -> None:
    found = parse(
        "gre      47 29 timeout=30, stream_timeout=180 src=192.168.0.1 dst=192.168.0.2 srckey=0x0 dstkey=0x1a "
        "[UNREPLIED] src=192.168.0.2 dst=192.168.0.1 srckey=0x1a dstkey=0x0 mark=0 use=1"
    )
    assert found.forwarded == Packet("192.168.0.1", "192.168.0.2", 47)
    assert found.selectors == {"sport": 0, "dport": 26}


def test_what_is_no_connection() -> None:
    for line in (
        "",
        "tcp",
        "tcp 6 10",
        "tcp x src=1.2.3.4 dst=1.2.3.5",
        "tcp 6 10 src=bad dst=1.2.3.4 src=1.2.3.4 dst=x",
    ):
        assert parse(line) is None
