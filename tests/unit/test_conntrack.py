"""Decoding the entries of the kernel's connection tracking."""

from __future__ import annotations

import socket
import struct

from calicoctl.felix.dataplane.conntrack import parse
from calicoctl.policy.verdict import Packet

NESTED = 0x8000


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def tuple_of(kind: int, source: str, destination: str, protocol: int, **fields: int) -> bytes:
    first = 3 if ":" in source else 1
    addresses = attribute(first, packed(source)) + attribute(first + 1, packed(destination))
    inner = attribute(1, bytes([protocol]))
    kinds = {"sport": (2, 2), "dport": (3, 2), "id": (4, 2), "type": (5, 1), "code": (6, 1)}
    for name, value in fields.items():
        number, size = kinds[name]
        inner += attribute(number + (3 if protocol == 58 else 0), value.to_bytes(size, "big"))
    return attribute(kind | NESTED, attribute(1 | NESTED, addresses) + attribute(2 | NESTED, inner))


def found(original: bytes, reply: bytes, *addresses: str, more: bytes = b"") -> Packet | None:
    status = attribute(3, bytes(4))
    connection = parse(original + reply + status + more, {packed(address) for address in addresses})
    assert connection is None or connection.entry == original + more
    return None if connection is None else connection.forwarded


def test_a_plain_connection() -> None:
    original = tuple_of(1, "192.168.0.1", "192.168.0.2", 6, sport=4000, dport=80)
    reply = tuple_of(2, "192.168.0.2", "192.168.0.1", 6, sport=80, dport=4000)
    expected = Packet("192.168.0.1", "192.168.0.2", 6, 4000, 80)
    assert found(original, reply, "192.168.0.1") == found(original, reply, "192.168.0.2") == expected
    assert found(original, reply, "192.168.0.3") is None
    zone = attribute(18, b"\0\7")
    assert found(original, reply, "192.168.0.1", more=zone) == expected, "an entry is named by its zone as well"


def test_translated_destination_and_source() -> None:
    """The forward hook sees a packet after its destination was changed, and before its source is."""
    original = tuple_of(1, "192.168.0.1", "203.0.113.1", 17, sport=4000, dport=8080)
    reply = tuple_of(2, "198.51.100.2", "198.51.100.1", 17, sport=80, dport=61000)
    assert found(original, reply, "198.51.100.2") == Packet("192.168.0.1", "198.51.100.2", 17, 4000, 80)
    assert found(original, reply, "203.0.113.1", "198.51.100.1") is None


def test_icmp_and_protocols_without_ports() -> None:
    original = tuple_of(1, "fd00::1", "fd00::2", 58, id=7, type=128, code=0)
    reply = tuple_of(2, "fd00::2", "fd00::1", 58, id=7, type=129, code=0)
    assert found(original, reply, "fd00:0::2") == Packet("fd00::1", "fd00::2", 58, None, None, 128, 0)
    original = tuple_of(1, "192.168.0.1", "192.168.0.2", 1, id=7, type=8, code=0)
    reply = tuple_of(2, "192.168.0.2", "192.168.0.1", 1, id=7, type=0, code=0)
    assert found(original, reply, "192.168.0.2") == Packet("192.168.0.1", "192.168.0.2", 1, None, None, 8, 0)


def test_the_keys_of_gre_are_no_ports() -> None:
    original = tuple_of(1, "192.168.0.1", "192.168.0.2", 47, sport=0, dport=26)
    reply = tuple_of(2, "192.168.0.2", "192.168.0.1", 47, sport=26, dport=0)
    assert found(original, reply, "192.168.0.1") == Packet("192.168.0.1", "192.168.0.2", 47)


def test_what_is_no_connection() -> None:
    whole = tuple_of(1, "192.168.0.1", "192.168.0.2", 6, sport=1, dport=2)
    for message in (b"", b"\0", whole, whole[:-4], whole + attribute(2, b""), whole + attribute(2, attribute(1, b"x"))):
        assert parse(message, {packed("192.168.0.1")}) is None
