"""The driver of the kernel's connection tracking: lists entries of the table, and deletes them.

An entry is described by the connection's first packet as the forward hook saw it: with the original source, and the
destination after any destination NAT. After the deletion of an entry, the rules evaluate the connection's next packet
like that of a new connection. Our tables drop TCP packets that belong to no connection and start none.

Netlink messages are built and parsed here, since pyroute2 takes a hundred times longer. A host may have hundreds of
thousands of entries, so a thread lists them. It pauses after each listing (`_pauses_after`), and answers all requests
that arrive in the meantime with the next one.

Source: the kernel's uapi/linux/netfilter/nfnetlink_conntrack.h, and net/netfilter/nf_conntrack_netlink.c for filters.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Callable

from calicoctl import netlink
from calicoctl.addresses import FAMILIES, pack, unpack, version_of
from calicoctl.errors import CalicoError
from calicoctl.output import quantity
from calicoctl.policy.rules import ICMP, ICMPV6, WITH_PORTS
from calicoctl.policy.verdict import Packet, Party
from calicoctl.workloads import host_network

_COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")
_GET, _DELETE = 1 << 8 | 1, 1 << 8 | 2
_TUPLE_ORIG, _TUPLE_REPLY, _ZONE, _FILTER = 1, 2, 18, 25
_FILTER_ORIG_FLAGS, _FILTER_REPLY_FLAGS, _BY_SOURCE = 1, 2, 1
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IPV4_SRC, _IPV6_SRC = 1, 3
_NUMBER, _SOURCE_PORT = 1, 2
_ICMP_TYPE, _ICMP_CODE, _ICMPV6_TYPE, _ICMPV6_CODE = 5, 6, 8, 9

_BATCH = 64
"""The number of deletions that are sent at once. The answers to all of them must fit into a socket's buffer."""

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
"""Bounds of the seconds between two listings, unless a request is urgent."""

_LONGEST_URGENT_PAUSE = 0.05
"""The maximum number of seconds between two listings if a request is urgent."""


@dataclass(frozen=True)
class Connection:
    """An entry of the table.

    `forwarded` is the connection's first packet as the forward hook saw it. `entry` contains the netlink attributes
    that identify the entry.
    """

    forwarded: Packet
    entry: bytes


@dataclass
class Listing:
    """The answer to one or more requests for the connections of some parties.

    If the connections could not be listed, `error` says why, and `connections` is empty. `host_addresses` are this
    host's own addresses; it is empty if `connections` is. `number` is the number of the last request that this listing
    answers. It is 0 if `Conntrack.list` was called directly, without a request.
    """

    parties: Collection[Party]
    connections: Sequence[Connection]
    host_addresses: Collection[str]
    error: str | None = None
    number: int = 0


@dataclass(frozen=True)
class _Request:
    """A request for the connections of some parties. If `urgent` is True, it is answered after a shorter pause."""

    number: int
    parties: frozenset[Party]
    urgent: bool


class Conntrack(threading.Thread):
    """The kernel's connection tracking table, and the thread that lists connections on request."""

    def __init__(self, put: Callable[[Listing], None]) -> None:
        """The thread calls `put` with each Listing that answers requests, even if the Listing has no connections."""
        super().__init__(name="listing connections", daemon=True)
        self._put = put
        self._requests: SimpleQueue[_Request] = SimpleQueue()
        self._count = 0
        self._kernel_filters = True
        """Whether the kernel can list the connections of one address alone, as far as is known (since Linux 5.8)."""

    def request(self, parties: Collection[Party], urgent: bool = False) -> int:
        """Request a listing of the connections of these parties. Return the number of the request.

        Requests are numbered from 1. The Listing is passed to `put`. After the previous listing, the thread waits for
        up to _LONGEST_PAUSE seconds before it begins this one, or up to _LONGEST_URGENT_PAUSE if the request is urgent.
        If `parties` is empty, nothing is requested, and the number of the previous request is returned, 0 if there
        was none.
        """
        if parties:
            self._count += 1
            self._requests.put(_Request(self._count, frozenset(parties), urgent))
        return self._count

    def run(self) -> None:
        not_before = urgent_not_before = 0.0
        while True:
            number, parties = self._next_requests(not_before, urgent_not_before)
            start = time.thread_time()
            try:
                listing = self.list(parties)
            except Exception as error:  # the next listing may succeed
                why = f"connections could not be listed ({type(error).__name__}: {error})"
                listing = Listing(parties, [], (), why)
            listing.number = number
            pause, urgent_pause = _pauses_after(time.thread_time() - start)
            now = time.monotonic()
            not_before, urgent_not_before = now + pause, now + urgent_pause
            self._put(listing)

    def _next_requests(self, not_before: float, urgent_not_before: float) -> tuple[int, set[Party]]:
        """Wait for a request, and then for more until `not_before`, or until `urgent_not_before` if one is urgent.

        Both are times of the monotonic clock. Return the number of the last request, and the parties of all of them.
        """
        request: _Request | None = self._requests.get()
        number, parties, urgent = 0, set[Party](), False
        while request is not None:
            number, urgent = request.number, urgent or request.urgent
            parties |= request.parties
            until = urgent_not_before if urgent else not_before
            try:
                request = self._requests.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                request = None
        return number, parties

    def list(self, parties: Collection[Party]) -> Listing:
        """Return the connections of these parties. Blocks the calling thread.

        If the connections cannot be listed, `error` of the result says why.
        """
        try:
            found = self._connections_of(parties, _entries()) if parties else []
            return Listing(parties, found, host_network.own_addresses() if found else ())
        except CalicoError as error:
            return Listing(parties, [], (), str(error))

    def _connections_of(self, parties: Collection[Party], entries: int | None) -> Sequence[Connection]:
        """Return the connections of these parties. Raises CalicoError.

        `entries` is the number of entries of the table, None if it is unknown.
        """
        if entries == 0:
            return []
        try:
            if entries is not None and self._kernel_filters and _filters_pay(parties, entries):
                found = _filtered(parties)
                if found is not None:
                    return found
                self._kernel_filters = False
            return _unfiltered(parties)
        except OSError as error:
            raise CalicoError(f"open connections cannot be listed: {error.strerror or error}") from None

    def delete(self, connections: Sequence[Connection]) -> None:
        """Delete the entries of these connections. A connection that has ended meanwhile is not an error.

        If the kernel refuses to delete some of the entries, the others are deleted, and then CalicoError is raised. If
        the socket fails, CalicoError is raised at once.
        """
        failed: list[str] = []
        try:
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_NETFILTER) as kernel:
                kernel.bind((0, 0))
                # in batches: one deletion at a time takes the kernel a hundred times longer
                for first in range(0, len(connections), _BATCH):
                    batch = connections[first : first + _BATCH]
                    kernel.send(b"".join(_deletion(connection, number) for number, connection in enumerate(batch)))
                    for number, code in _refusals(kernel):
                        if code != errno.ENOENT:  # ENOENT: the connection has ended meanwhile
                            failed.append(f"{batch[number].forwarded}: {os.strerror(code)}")
        except OSError as error:
            raise CalicoError(f"connections could not be ended: {error.strerror}") from None
        if failed:
            raise CalicoError(f"{quantity(len(failed), 'connection')} could not be ended, such as {failed[0]}")


def _pauses_after(seconds: float) -> tuple[float, float]:
    """Return how many seconds after a listing the next one may begin, and the next one with an urgent request.

    `seconds` is the CPU time that the listing took. So, however many requests there are, listings take a fifth of a
    core at most in a table of up to 100,000 entries; urgent ones, in a table of up to some 10,000.
    """
    pause = 4 * seconds
    return min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, pause)), min(_LONGEST_URGENT_PAUSE, pause)


def _entries() -> int | None:
    """Return the number of entries of the table; None if it cannot be read."""
    try:
        return int(_COUNT.read_text())
    except (OSError, ValueError):
        return None


def _filters_pay(parties: Collection[Party], entries: int) -> bool:
    """Return whether `_filtered` takes less CPU time than `_unfiltered`, for a table with this number of `entries`.

    Each dump walks through the whole table, which takes as long as to send 5,000 entries if the table is empty, and for
    each entry a fifth of the time to send and search it (measured with the usual 262,144 buckets).
    """
    walks = sum(version_of(party.address) == 4 for party in parties)
    walks += any(version_of(party.address) == 6 for party in parties)
    return walks * (5000 + entries / 5) < 5000 + entries


def _filtered(parties: Collection[Party]) -> list[Connection] | None:
    """Return the connections of these parties: of each with an IPv4 address by a dump that the kernel filters.

    Those of the others are found by `_unfiltered`. Return None if the kernel ignores the filter, as it does before
    Linux 5.8. Raises OSError.
    """
    found: dict[bytes, Connection] = {}
    for party in parties:
        if version_of(party.address) == 6:
            continue
        packed = pack(party.address)
        source = netlink.attribute(netlink.NESTED | _TUPLE_IP, netlink.attribute(_IPV4_SRC, packed))
        of_tuple, flags = (_TUPLE_ORIG, _FILTER_ORIG_FLAGS) if party.originates else (_TUPLE_REPLY, _FILTER_REPLY_FLAGS)
        request = _header(socket.AF_INET) + netlink.attribute(netlink.NESTED | of_tuple, source)
        which = netlink.attribute(flags, struct.pack("=I", _BY_SOURCE))
        request += netlink.attribute(netlink.NESTED | _FILTER, which)
        for body in netlink.dump(netlink.NETLINK_NETFILTER, _GET, request):
            if packed not in body:
                return None
            connection = parse(body[4:], {(packed, party.originates)})
            if connection is not None:
                found[connection.entry] = connection
    # Linux (6.18, say) compares IPv6 addresses the wrong way round: it leaves out the entries that were asked for
    of_ipv6 = [party for party in parties if version_of(party.address) == 6]
    return [*found.values(), *(_unfiltered(of_ipv6) if of_ipv6 else ())]


def _unfiltered(parties: Collection[Party]) -> list[Connection]:
    """Return the connections of these parties, found among all that the kernel lists. Raises OSError."""
    families = {FAMILIES[version_of(party.address)] for party in parties}
    # both at once: for each dump, the kernel walks its whole table, which takes 10 ms also if it is almost empty
    family = families.pop() if len(families) == 1 else socket.AF_UNSPEC
    # most entries of a busy host are not worth parsing
    wanted = {(pack(party.address), party.originates) for party in parties}
    any_of_few = re.compile(b"|".join({re.escape(packed) for packed, _ in wanted})) if len(wanted) < 300 else None
    found = []
    for body in netlink.dump(netlink.NETLINK_NETFILTER, _GET, _header(family), containing=any_of_few):
        connection = parse(body[4:], wanted)
        if connection is not None:
            found.append(connection)
    return found


def parse(message: bytes, wanted: Collection[tuple[bytes, bool]]) -> Connection | None:
    """Return the connection that the netlink attributes in `message` describe.

    Return None if neither of its parties is in `wanted`, which contains each Party with its address packed, or if the
    attributes cannot be parsed.
    """
    try:
        entry = netlink.attributes(message)
        original = netlink.attributes(entry[_TUPLE_ORIG])
        reply = netlink.attributes(entry[_TUPLE_REPLY])
        source, answerer = _source(original), _source(reply)
        if (source, True) not in wanted and (answerer, False) not in wanted:
            return None
        first, answer = netlink.attributes(original[_TUPLE_PROTO]), netlink.attributes(reply[_TUPLE_PROTO])
        number = first[_NUMBER][0]
        ports: tuple[int | None, int | None] = (None, None)
        icmp: tuple[int | None, int | None] = (None, None)
        if number in WITH_PORTS:
            # the reply comes from where the packet went after destination NAT
            # (other protocols use the attributes of ports for other things: GRE, for its keys)
            ports = _port(first[_SOURCE_PORT]), _port(answer[_SOURCE_PORT])
        elif number in (ICMP, ICMPV6):
            kinds = (_ICMP_TYPE, _ICMP_CODE) if number == ICMP else (_ICMPV6_TYPE, _ICMPV6_CODE)
            icmp = first[kinds[0]][0], first[kinds[1]][0]
        packet = Packet(_text(source), _text(answerer), number, *ports, *icmp)
    except (KeyError, IndexError, ValueError, struct.error):
        return None
    key = netlink.attribute(netlink.NESTED | _TUPLE_ORIG, entry[_TUPLE_ORIG])
    if _ZONE in entry:
        key += netlink.attribute(_ZONE, entry[_ZONE])
    return Connection(packet, key)


def _source(of_tuple: dict[int, bytes]) -> bytes:
    addresses = netlink.attributes(of_tuple[_TUPLE_IP])
    return addresses[_IPV4_SRC] if _IPV4_SRC in addresses else addresses[_IPV6_SRC]


def _port(value: bytes) -> int:
    return int.from_bytes(value, "big")


def _text(address: bytes) -> str:
    return unpack(address)


def _deletion(connection: Connection, number: int) -> bytes:
    family = FAMILIES[connection.forwarded.version]
    return netlink.message(_DELETE, netlink.REQUEST, number, _header(family) + connection.entry)


def _header(family: int) -> bytes:
    return struct.pack("=BBH", family, 0, 0)


def _refusals(kernel: socket.socket) -> Iterator[tuple[int, int]]:
    """Yield (sequence number, errno) for each message that the kernel has refused. Does not wait for answers.

    The kernel has put all answers into the socket's buffer before send() returns.
    """
    with suppress(BlockingIOError):
        while True:
            for kind, answer in netlink.messages(kernel.recv(2**16, socket.MSG_DONTWAIT)):
                if kind == netlink.ERROR:
                    yield netlink.refusal(answer)
