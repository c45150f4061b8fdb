"""The driver of connection tracking: which requests it answers at once, what it asks the kernel for, and decoding."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from calicoctl import netlink
from calicoctl.felix.dataplane import conntrack
from calicoctl.felix.dataplane.conntrack import Conntrack, parse
from calicoctl.policy.verdict import Packet, Party, either_party

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
    connection = parse(
        original + reply + status + more, {(packed(address), o) for address in addresses for o in (True, False)}
    )
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
        assert parse(message, {(packed("192.168.0.1"), True)}) is None


BOTH = {Party("192.168.0.1", True), Party("192.168.0.2", True)}


def test_one_listing_answers_the_requests_that_wait() -> None:
    driver = Conntrack(lambda _: None)
    assert [driver.request([Party(f"192.168.0.{number}", True)]) for number in (1, 2, 3)] == [1, 2, 3]
    assert driver.request([]) == 3, "nothing is requested"
    found = driver._next_requests(time.monotonic() + 0.01, 0.0)
    assert found == (3, {Party("192.168.0.1", True), Party("192.168.0.2", True), Party("192.168.0.3", True)})


def test_an_urgent_request_does_not_wait_and_takes_others_with_it() -> None:
    driver = Conntrack(lambda _: None)
    driver.request([Party("192.168.0.1", True)])
    threading.Timer(0.05, lambda: driver.request([Party("192.168.0.2", True)], urgent=True)).start()
    assert driver._next_requests(time.monotonic() + 20, 0.0) == (2, BOTH)


def test_urgent_requests_in_close_succession_share_a_listing() -> None:
    driver = Conntrack(lambda _: None)
    driver.request([Party("192.168.0.1", True)], urgent=True)
    threading.Timer(0.05, lambda: driver.request([Party("192.168.0.2", True)], urgent=True)).start()
    assert driver._next_requests(0.0, time.monotonic() + 0.5) == (2, BOTH)


@pytest.mark.parametrize(
    ("taken", "pauses"),
    [(0.0, (0.05, 0.0)), (0.005, (0.05, 0.02)), (0.1, (0.4, 0.05)), (5.0, (1.0, 0.05))],
)
def test_the_pauses_after_a_listing_grow_with_its_cost_and_are_bounded(
    taken: float, pauses: tuple[float, float]
) -> None:
    assert conntrack._pauses_after(taken) == pytest.approx(pauses)


@pytest.mark.parametrize(
    ("addresses", "least"),
    [
        (["192.168.0.1"], 9_000),
        (["192.168.0.1", "fe80::1"], 25_500),
        (["192.168.0.1", "192.168.0.2"], 75_500),
    ],
)
def test_the_kernel_filters_in_a_large_table_for_few_addresses(addresses: list[str], least: int) -> None:
    parties = either_party(addresses)
    assert conntrack._filters_pay(parties, least) and not conntrack._filters_pay(parties, least - 1000)
    many = either_party(f"192.168.0.{number}" for number in range(3))
    assert not conntrack._filters_pay(many, 10_000_000)
    assert conntrack._filters_pay([Party("192.168.0.1", True)], 1_000), "a single walk pays always"


def entry(source: str, destination: str) -> bytes:
    """Return an entry as a dump contains it: after the family, the IP version, and the resource."""
    original = tuple_of(1, source, destination, 6, sport=4000, dport=80)
    return bytes(4) + original + tuple_of(2, destination, source, 6, sport=80, dport=4000)


ONE, OTHER = "192.168.0.1", "192.168.0.9"
ENTRIES = [entry(ONE, OTHER), entry(OTHER, ONE), entry("192.168.0.2", OTHER), entry("fd00::1", "fd00::9")]
BY_SOURCE = [attribute(kind | NESTED, attribute(1 | NESTED, attribute(1, packed(ONE)))) for kind in (1, 2)]
"""What names the address as the source of a connection's first packet, and as that of its replies."""


class Kernel:
    """Answers dumps of a table with 100,000 entries. `asked` says for each dump whether it was to be filtered."""

    def __init__(self, filters: bool) -> None:
        self.filters = filters
        self.asked: list[bool] = []

    def dump(self, protocol: int, kind: int, body: bytes, **options: Any) -> Iterator[bytes]:
        if protocol != netlink.NETLINK_NETFILTER:  # the addresses of the host
            return
        matches = [index for index in (0, 1) if BY_SOURCE[index] in body]
        self.asked.append(bool(matches))
        yield from [ENTRIES[index] for index in matches] if self.filters and matches else ENTRIES


@pytest.mark.parametrize(("filters", "asked"), [(True, [True] * 4), (False, [True, False, False])])
def test_a_kernel_that_does_not_filter_is_asked_to_only_once(
    monkeypatch: pytest.MonkeyPatch, filters: bool, asked: list[bool]
) -> None:
    """Linux before 5.8 ignores the request to filter, and lists all entries."""
    kernel = Kernel(filters)
    monkeypatch.setattr(netlink, "dump", kernel.dump)
    monkeypatch.setattr(conntrack, "_entries", lambda: 100_000)
    driver = Conntrack(lambda _: None)
    for _ in range(2):
        listed = [found.forwarded for found in driver.list([Party(ONE, True), Party(ONE, False)]).connections]
        assert listed == [Packet(ONE, OTHER, 6, 4000, 80), Packet(OTHER, ONE, 6, 4000, 80)]
    assert kernel.asked == asked


@pytest.mark.parametrize("filters", [True, False])
def test_a_party_is_that_of_its_own_side_alone(monkeypatch: pytest.MonkeyPatch, filters: bool) -> None:
    kernel = Kernel(filters)
    monkeypatch.setattr(netlink, "dump", kernel.dump)
    monkeypatch.setattr(conntrack, "_entries", lambda: 100_000)
    for originates, packet in ((True, Packet(ONE, OTHER, 6, 4000, 80)), (False, Packet(OTHER, ONE, 6, 4000, 80))):
        listed = Conntrack(lambda _: None).list([Party(ONE, originates)]).connections
        assert [found.forwarded for found in listed] == [packet]
    assert kernel.asked == ([True, True] if filters else [True, False, True, False])


def test_the_kernel_is_not_asked_to_filter_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would leave out the very entries that were asked for."""
    kernel = Kernel(True)
    monkeypatch.setattr(netlink, "dump", kernel.dump)
    monkeypatch.setattr(conntrack, "_entries", lambda: 100_000)
    listed = Conntrack(lambda _: None).list(either_party([ONE, "fd00::9"])).connections
    assert kernel.asked == [True, True, False]
    assert Packet("fd00::1", "fd00::9", 6, 4000, 80) in [found.forwarded for found in listed]


def test_an_empty_table_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(True)
    monkeypatch.setattr(netlink, "dump", kernel.dump)
    monkeypatch.setattr(conntrack, "_entries", lambda: 0)
    assert Conntrack(lambda _: None).list(either_party([ONE])).connections == [] and kernel.asked == []


class Answers:
    """A netlink socket that answers a dump with these datagrams."""

    def __init__(self, datagrams: list[bytes]) -> None:
        self.datagrams = iter(datagrams)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def settimeout(self, seconds: float) -> None:
        pass

    bind = send = settimeout

    def recv(self, size: int) -> bytes:
        return next(self.datagrams)


ROUTINE = netlink.message(256, 2, 0, b"nothing") + b"\0"
WANTED = netlink.message(256, 2, 0, b"like it ")
DONE, FAILED = (netlink.message(3, 2, 0, struct.pack("=i", -code)) for code in (0, 12))
REFUSED = netlink.message(2, 0, 0, struct.pack("=i", -1) + bytes(16))


def dumped(monkeypatch: pytest.MonkeyPatch, *datagrams: bytes) -> tuple[list[bytes], int]:
    """Return what a dump yields that asks for answers with `like`, and how many messages of its answer are decoded."""
    decoded = []
    decode = netlink.messages

    def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
        for found in decode(data):
            decoded.append(found)
            yield found

    monkeypatch.setattr(socket, "socket", lambda *_: Answers(list(datagrams)))
    monkeypatch.setattr(netlink, "messages", messages)
    try:
        return list(netlink.dump(netlink.NETLINK_NETFILTER, 257, b"", containing=re.compile(b"like"))), len(decoded)
    finally:
        monkeypatch.undo()


def test_what_contains_nothing_that_is_wanted_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy host's table has very many entries."""
    assert dumped(monkeypatch, 100 * ROUTINE, ROUTINE + WANTED, 50 * ROUTINE, DONE) == ([b"like it "], 3)
    assert dumped(monkeypatch, WANTED, ROUTINE + DONE) == ([b"like it "], 3), "the end may follow other messages"
    for datagrams in ([100 * ROUTINE, FAILED], [ROUTINE, ROUTINE + FAILED], [REFUSED]):
        with pytest.raises(OSError):
            dumped(monkeypatch, *datagrams)
