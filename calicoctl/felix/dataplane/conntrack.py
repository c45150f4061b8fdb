"""Ends connections that policy no longer allows: deletes their entries of the kernel's connection tracking.

The packets of an established connection pass without a look at the rules, so a new rule alone would never reach them.
An entry is judged by its first packet as the forward hook saw it: from its source, to its destination after any
destination NAT. Deleting is enough, because our tables let no TCP packet in that starts no connection.

The kernel is asked in its own words (pyroute2 takes a hundred times longer to list, and to delete). A host may have
hundreds of thousands of entries: listing them is left to a thread of its own, judging what came of it is the agent's.

Source: the kernel's uapi/linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Callable

from calicoctl import netlink
from calicoctl.datastore.model import Rules
from calicoctl.desired.snapshot import LocalEndpoint, Snapshot
from calicoctl.errors import CalicoError
from calicoctl.policy.verdict import ICMP, ICMPV6, PROTOCOLS, Packet, Tagged, decide, is_host_service
from calicoctl.workloads import netns

_COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")
_NETLINK_NETFILTER = 12
_GET, _DELETE = 1 << 8 | 1, 1 << 8 | 2
_TUPLE_ORIG, _TUPLE_REPLY, _ZONE = 1, 2, 18
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IPV4_SRC, _IPV6_SRC = 1, 3
_NUMBER, _SOURCE_PORT = 1, 2
_ICMP_TYPE, _ICMP_CODE, _ICMPV6_TYPE, _ICMPV6_CODE = 5, 6, 8, 9

_BATCH = 64
"""Deletions in one message: the answers to them all must fit into a socket's buffer."""

_WITH_PORTS = {PROTOCOLS[name] for name in ("tcp", "udp", "sctp", "udplite")}
"""Others use the same attributes for what is no port: GRE, for its keys."""


@dataclass
class Listed:
    """What came of a listing for some addresses: the connections, and this host's own addresses; or why it has none.

    `asked` is the number of the last question that it answers.
    """

    addresses: Collection[str]
    connections: list[Connection]
    host_addresses: Collection[str]
    error: str | None = None
    asked: int = 0


@dataclass(frozen=True)
class Connection:
    """An entry: its first packet as the forward hook saw it, and the attributes by which the kernel knows the entry."""

    forwarded: Packet
    entry: bytes


class Lister(threading.Thread):
    """Lists connections, for the agent not to wait where a host has very many. `ask` for those of some addresses."""

    def __init__(self, put: Callable[[Listed], None]) -> None:
        """`put` is called, in this thread, with what came of each listing, be it nothing."""
        super().__init__(name="listing connections", daemon=True)
        self._put = put
        self._asked: SimpleQueue[tuple[int, frozenset[str]]] = SimpleQueue()
        self._count = 0

    def ask(self, addresses: Collection[str]) -> int:
        """Have the connections listed that come from, or go to, one of these addresses; number the question."""
        if addresses:
            self._count += 1
            self._asked.put((self._count, frozenset(addresses)))
        return self._count

    def run(self) -> None:
        while True:
            number, asked = self._asked.get()
            addresses = set(asked)
            with suppress(Empty):
                while True:
                    number, asked = self._asked.get_nowait()
                    addresses |= asked
            try:
                what = listed(addresses)
            except Exception as error:  # the next listing may do better
                why = f"connections could not be listed ({type(error).__name__}: {error})"
                what = Listed(addresses, [], (), why)
            what.asked = number
            self._put(what)


def listed(addresses: Collection[str]) -> Listed:
    """List the connections that come from, or go to, one of these addresses."""
    try:
        found = _connections_of(addresses) if addresses and not _nothing_tracked() else []
        return Listed(addresses, found, netns.own_addresses() if found else ())
    except CalicoError as error:
        return Listed(addresses, [], (), str(error))


def end_denied(listed: Listed, snapshot: Snapshot, tagged: Tagged) -> int:
    """Delete those connections that policy denies now; return how many. Raises CalicoError when that fails."""
    denied = [c for c in listed.connections if not allowed(c.forwarded, snapshot, tagged, listed.host_addresses)]
    _delete(denied)
    return len(denied)


def allowed(packet: Packet, snapshot: Snapshot, tagged: Tagged, host_addresses: Collection[str]) -> bool:
    """Tell whether policy lets a packet through here: out of its source's endpoint, and into its destination's."""
    destination = snapshot.owner(packet.destination)
    to_host = packet.destination in host_addresses
    for source in snapshot.senders(packet.source) if not (to_host and is_host_service(packet)) else ():
        if to_host and snapshot.host_action == "DROP":
            return False
        rules = {name: rules.outbound for name, rules in _rules(source, snapshot)}
        if not decide(source.profiles, rules, packet, tagged).allowed:
            return False
    if destination is not None and packet.source not in host_addresses:
        rules = {name: rules.inbound for name, rules in _rules(destination, snapshot)}
        if not decide(destination.profiles, rules, packet, tagged).allowed:
            return False
    return True


def _rules(endpoint: LocalEndpoint, snapshot: Snapshot) -> Iterator[tuple[str, Rules]]:
    """Give the rules of those of an endpoint's profiles that can be read."""
    for name in endpoint.profiles:
        profile = snapshot.profiles.get(name)
        if profile is not None and profile.rules is not None:
            yield name, profile.rules


def _nothing_tracked() -> bool:
    try:
        return int(_COUNT.read_text()) == 0
    except (OSError, ValueError):
        return False


def _connections_of(addresses: Collection[str]) -> list[Connection]:
    """List the connections that come from, or are answered by, one of these addresses."""
    found = []
    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        wanted = {socket.inet_pton(family, address) for address in addresses if (":" in address) == (version == 6)}
        if not wanted:
            continue
        few = len(wanted) < 16
        try:
            for body in netlink.dump(_NETLINK_NETFILTER, _GET, _header(family)):
                message = body[4:]
                if few and not any(address in message for address in wanted):
                    continue  # of very many entries, few are read
                connection = parse(message, wanted)
                if connection is not None:
                    found.append(connection)
        except OSError as error:
            raise CalicoError(f"open connections cannot be listed: {error.strerror or error}") from None
    return found


def parse(message: bytes, addresses: Collection[bytes]) -> Connection | None:
    """Read an entry's attributes; return None for one that does not come from, and is not answered by, these addresses.

    None, too, for what cannot be understood.
    """
    try:
        entry = netlink.attributes(message)
        original = netlink.attributes(entry[_TUPLE_ORIG])
        reply = netlink.attributes(entry[_TUPLE_REPLY])
        source = _source(original)
        answerer = _source(reply)
        if source not in addresses and answerer not in addresses:
            return None
        first, answer = netlink.attributes(original[_TUPLE_PROTO]), netlink.attributes(reply[_TUPLE_PROTO])
        number = first[_NUMBER][0]
        ports: tuple[int | None, int | None] = (None, None)
        icmp: tuple[int | None, int | None] = (None, None)
        if number in _WITH_PORTS:
            # what answers, and from where, is what it was sent to after any translation
            ports = _port(first[_SOURCE_PORT]), _port(answer[_SOURCE_PORT])
        elif number in (ICMP, ICMPV6):
            kinds = (_ICMP_TYPE, _ICMP_CODE) if number == ICMP else (_ICMPV6_TYPE, _ICMPV6_CODE)
            icmp = first[kinds[0]][0], first[kinds[1]][0]
        packet = Packet(_text(source), _text(answerer), number, *ports, *icmp)
    except (KeyError, IndexError, ValueError, struct.error):
        return None
    named = netlink.attribute(netlink.NESTED | _TUPLE_ORIG, entry[_TUPLE_ORIG])
    if _ZONE in entry:
        named += netlink.attribute(_ZONE, entry[_ZONE])
    return Connection(packet, named)


def _source(of_tuple: dict[int, bytes]) -> bytes:
    addresses = netlink.attributes(of_tuple[_TUPLE_IP])
    return addresses[_IPV4_SRC] if _IPV4_SRC in addresses else addresses[_IPV6_SRC]


def _port(value: bytes) -> int:
    return int.from_bytes(value, "big")


def _text(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


def _delete(connections: list[Connection]) -> None:
    """Delete entries, many in one message to the kernel, as one at a time takes it a hundred times longer."""
    failed: list[str] = []
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as kernel:
            kernel.bind((0, 0))
            for first in range(0, len(connections), _BATCH):
                batch = connections[first : first + _BATCH]
                kernel.send(b"".join(_deletion(connection, number) for number, connection in enumerate(batch)))
                for number, code in _refusals(kernel):
                    if code != errno.ENOENT:  # it has ended by itself
                        failed.append(f"{batch[number].forwarded}: {os.strerror(code)}")
    except OSError as error:
        raise CalicoError(f"connections could not be ended: {error.strerror}") from None
    if failed:
        raise CalicoError(f"{len(failed)} connections could not be ended, such as {failed[0]}")


def _deletion(connection: Connection, number: int) -> bytes:
    family = socket.AF_INET6 if connection.forwarded.version == 6 else socket.AF_INET
    return netlink.message(_DELETE, netlink.REQUEST, number, _header(family) + connection.entry)


def _header(family: int) -> bytes:
    return struct.pack("=BBH", family, 0, 0)


def _refusals(kernel: socket.socket) -> Iterator[tuple[int, int]]:
    """Give the numbers of the messages that the kernel has refused, each with its errno. It answers at once."""
    with suppress(BlockingIOError):
        while True:
            for kind, answer in netlink.messages(kernel.recv(2**16, socket.MSG_DONTWAIT)):
                if kind == netlink.ERROR:
                    yield netlink.refusal(answer)
