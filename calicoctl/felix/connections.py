"""Ends connections that policy no longer allows: deletes their entries of the kernel's connection tracking.

The packets of an established connection pass without a look at the rules, so a new rule alone would never reach them.
An entry is judged by its first packet as the forward hook saw it: from its source, to its destination after any
destination NAT. Deleting is enough, because our tables let no TCP packet in that starts no connection.

`conntrack` lists (a dump through pyroute2 takes a hundred times longer); deletions go to the kernel many at a time. A
host may have hundreds of thousands of entries: listing them is left to a thread of its own, judging what came of it is
the agent's.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import subprocess
import threading
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Callable

from calicoctl import netns
from calicoctl.datastore.model import Rules
from calicoctl.errors import CalicoError
from calicoctl.policy import ICMP, ICMPV6, Packet, Tagged, decide, is_host_service
from calicoctl.snapshot import LocalEndpoint, Snapshot

_COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")
_NETLINK_NETFILTER = 12
_NLM_F_REQUEST, _NLMSG_ERROR = 1, 2
_DELETE = 1 << 8 | 2
_NESTED = 0x8000
_TUPLE_ORIG = _NESTED | 1
_BATCH = 64
"""Deletions in one message: the answers to them all must fit into a socket's buffer."""

_SELECTORS = {"sport": (2, 2), "dport": (3, 2), "icmp_id": (4, 2), "icmp_type": (5, 1), "icmp_code": (6, 1)}
"""Attributes of the protocol's part: their kinds, and how many octets they have."""

_FIELD = re.compile(r"(\w+)=(\S+)")
_SOURCES = re.compile(r"^.*? src=(\S+) .*? src=(\S+) .*$", re.MULTILINE)


@dataclass
class Listed:
    """What came of a listing for some addresses: the connections, and this host's own addresses; or why it has none."""

    addresses: Collection[str]
    connections: list[Connection]
    host_addresses: Collection[str]
    error: str | None = None


@dataclass(frozen=True)
class Connection:
    """An entry: the first packet as it was sent (`original`), and as the forward hook saw it.

    `selectors` is what tells it from others of its protocol between the same addresses.
    """

    original: Packet
    forwarded: Packet
    selectors: dict[str, int | None]


class Lister(threading.Thread):
    """Lists connections, for the agent not to wait where a host has very many. `ask` for those of some addresses."""

    def __init__(self, put: Callable[[Listed], None]) -> None:
        """`put` is called, in this thread, with what came of each listing, be it nothing."""
        super().__init__(name="listing connections", daemon=True)
        self._put = put
        self._asked: SimpleQueue[frozenset[str]] = SimpleQueue()

    def ask(self, addresses: Collection[str]) -> None:
        """Have the connections listed that come from, or go to, one of these addresses."""
        if addresses:
            self._asked.put(frozenset(addresses))

    def run(self) -> None:
        while True:
            addresses = set(self._asked.get())
            with suppress(Empty):
                while True:
                    addresses |= self._asked.get_nowait()
            try:
                what = listed(addresses)
            except Exception as error:  # the next listing may do better
                why = f"connections could not be listed ({type(error).__name__}: {error})"
                what = Listed(addresses, [], (), why)
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
    source, destination = snapshot.owner(packet.source), snapshot.owner(packet.destination)
    to_host = packet.destination in host_addresses
    if source is not None and not (to_host and is_host_service(packet)):
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
    found = []
    for version in sorted({6 if ":" in address else 4 for address in addresses}):
        try:
            done = subprocess.run(
                ["conntrack", "-L", "-f", f"ipv{version}"], capture_output=True, text=True, errors="replace", timeout=60
            )
        except FileNotFoundError:
            why = "conntrack is missing, so open connections cannot be ended: install that package"
            raise CalicoError(why) from None
        except subprocess.TimeoutExpired:
            raise CalicoError("conntrack did not list the connections within a minute") from None
        if done.returncode != 0:
            why = " ".join(done.stderr.split())[:200] or f"exit status {done.returncode}"
            raise CalicoError(f"conntrack could not list the connections: {why}")
        # where an entry comes from, and who answers: of very many entries, few are read further
        for match in _SOURCES.finditer(done.stdout):
            if match[1] in addresses or match[2] in addresses:
                connection = parse(match[0])
                if connection is not None:
                    found.append(connection)
    return found


def parse(line: str) -> Connection | None:
    """Read a line that `conntrack -L` prints, or return None: the original direction's fields, then the reply's."""
    words = line.split()
    fields = _FIELD.findall(line)
    first = dict(reversed(fields))  # of fields that come twice, the one that stands first
    last = {}
    for name, value in fields:
        if name in ("src", "dst", "sport", "dport"):
            last[name] = value
    try:
        protocol = int(words[1])
        numbers = {name: int(first[name]) if name in first else None for name in ("sport", "dport", "type", "code")}
        original = Packet(
            _canonical(first["src"]),
            _canonical(first["dst"]),
            protocol,
            numbers["sport"],
            numbers["dport"],
            numbers["type"],
            numbers["code"],
        )
        port = int(last["sport"]) if "sport" in last else None
        forwarded = Packet(
            original.source,
            _canonical(last["src"]),
            protocol,
            original.source_port,
            port,
            original.icmp_type,
            original.icmp_code,
        )
        selectors: dict[str, int | None] = {}
        if protocol in (ICMP, ICMPV6):
            selectors = {"icmp_id": int(first["id"]), "icmp_type": numbers["type"], "icmp_code": numbers["code"]}
        elif "sport" in first:
            selectors = {"sport": numbers["sport"], "dport": numbers["dport"]}
        elif "srckey" in first:  # GRE, whose keys the kernel takes for ports
            selectors = {"sport": int(first["srckey"], 16), "dport": int(first["dstkey"], 16)}
        return Connection(original, forwarded, selectors)
    except (IndexError, KeyError, ValueError, OSError):
        return None


def _canonical(address: str) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.inet_ntop(family, socket.inet_pton(family, address))


def _delete(connections: list[Connection]) -> None:
    """Delete entries, many in one message to the kernel, as one at a time takes it a hundred times longer."""
    failed: list[str] = []
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
            netlink.bind((0, 0))
            for first in range(0, len(connections), _BATCH):
                batch = connections[first : first + _BATCH]
                netlink.send(b"".join(_deletion(connection, number) for number, connection in enumerate(batch)))
                for number, code in _refusals(netlink):
                    if code != errno.ENOENT:  # it has ended by itself
                        failed.append(f"{batch[number].original}: {os.strerror(code)}")
    except OSError as error:
        raise CalicoError(f"connections could not be ended: {error.strerror}") from None
    if failed:
        raise CalicoError(f"{len(failed)} connections could not be ended, such as {failed[0]}")


def _deletion(connection: Connection, number: int) -> bytes:
    """Return the message that deletes an entry. Source: the kernel's uapi/linux/netfilter/nfnetlink_conntrack.h."""
    packet, selectors = connection.original, connection.selectors
    family, first = (socket.AF_INET6, 3) if packet.version == 6 else (socket.AF_INET, 1)
    addresses = _attribute(first, socket.inet_pton(family, packet.source))
    addresses += _attribute(first + 1, socket.inet_pton(family, packet.destination))
    protocol = _attribute(1, bytes([packet.protocol]))
    for name, value in selectors.items():
        kind, size = _SELECTORS[name]
        # ICMPv6 has its own kinds, behind those of ICMP
        kind += 3 if name.startswith("icmp") and packet.version == 6 else 0
        protocol += _attribute(kind, (value or 0).to_bytes(size, "big"))
    which = _attribute(_TUPLE_ORIG, _attribute(_NESTED | 1, addresses) + _attribute(_NESTED | 2, protocol))
    header = struct.pack("=IHHII", 20 + len(which), _DELETE, _NLM_F_REQUEST, number, 0)
    return header + struct.pack("=BBH", family, 0, 0) + which


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _refusals(netlink: socket.socket) -> Iterator[tuple[int, int]]:
    """Give the numbers of the messages that the kernel has refused, each with its errno. It answers at once."""
    with suppress(BlockingIOError):
        while True:
            data = netlink.recv(2**16, socket.MSG_DONTWAIT)
            _, kind, _, number, _ = struct.unpack_from("=IHHII", data)
            if kind == _NLMSG_ERROR:
                yield number, -struct.unpack_from("=i", data, 16)[0]
