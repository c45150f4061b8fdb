"""Ends connections that policy no longer allows: deletes their entries of the kernel's connection tracking.

The packets of an established connection pass without a look at the rules, so a new rule alone would never reach them.
An entry is judged by its first packet as the forward hook saw it: from its source, to its destination after any
destination NAT. Deleting is enough, because our tables let no TCP packet in that starts no connection.

`conntrack` lists (a dump through pyroute2 takes a hundred times longer), pyroute2 deletes. A host may have hundreds of
thousands of entries: listing them is left to a thread of its own, judging what came of it is the agent's.
"""

from __future__ import annotations

import errno
import os
import re
import socket
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
from calicoctl.felix.snapshot import LocalEndpoint, Snapshot
from calicoctl.policy import ICMP, ICMPV6, Packet, Tagged, decide, is_host_service

_COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")
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

    `selectors` is what tells it from others of its protocol between the same addresses, by pyroute2's names.
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
            raise CalicoError(f"conntrack could not list the connections: {' '.join(done.stderr.split())[:200]}")
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
    from pyroute2.conntrack import Conntrack, NFCTAttrTuple
    from pyroute2.netlink.exceptions import NetlinkError

    failed: list[str] = []
    for family in (socket.AF_INET, socket.AF_INET6):
        chosen = [c for c in connections if (c.original.version == 6) == (family == socket.AF_INET6)]
        if not chosen:
            continue
        with Conntrack(nfgen_family=family) as netlink:
            for connection in chosen:
                packet = connection.original
                which = NFCTAttrTuple(
                    family=family,
                    saddr=packet.source,
                    daddr=packet.destination,
                    proto=packet.protocol,
                    **connection.selectors,
                )
                try:
                    netlink.entry("del", tuple_orig=which)
                except NetlinkError as error:
                    if error.code != errno.ENOENT:  # it has ended by itself
                        failed.append(f"{packet}: {os.strerror(error.code)}")
    if failed:
        raise CalicoError(f"{len(failed)} connections could not be ended, such as {failed[0]}")
