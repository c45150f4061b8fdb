"""The threads that wait for changes: of the store, the kernel, the Docker Engine, the mount table, and DNS.

Each thread waits for one source, and puts events into a queue. With two exceptions, the threads change nothing:
FirewallEvents creates tables if the agent's tables are missing, since packets would pass without policy; ServerEvents
writes the addresses of etcd's members to a file.
"""

from __future__ import annotations

import errno
import logging
import random
import select
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from calicoctl import engine, netlink
from calicoctl.clock import now
from calicoctl.datastore import last_known
from calicoctl.datastore.keys import READY
from calicoctl.datastore.reserved import Servers
from calicoctl.errors import CalicoError, StoreError, WatchExpired, is_shortage
from calicoctl.felix import shortage
from calicoctl.felix.dataplane import connection_limit
from calicoctl.felix.dataplane.links import link_of
from calicoctl.felix.dataplane.nft import OwnPorts, TableEvents
from calicoctl.felix.dataplane.routes import PROTOCOL
from calicoctl.felix.events import (
    AddressesChanged,
    BirdRouteLost,
    Container,
    ContainerChanged,
    EngineListed,
    EngineUnavailable,
    Events,
    Failure,
    GatewaysChanged,
    KernelEventsLost,
    LinkChanged,
    MountsChanged,
    OverlayRouteLost,
    RouteLost,
    ServersChanged,
    TablesChanged,
    ThreadDied,
    WatchFailed,
    WatchRecovered,
)
from calicoctl.felix.pending import PendingChanges
from calicoctl.workloads import labels, servers
from calicoctl.workloads.guard import Guard

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.datastore.store import Change, Entry, Watch

log = logging.getLogger("calico.felix")

REREAD_INTERVAL = 30.0
"""The minimum number of seconds until the store is read again because a directory may no longer be too large."""

LONG_POLL = 4.0
"""The maximum time, in seconds, that a watch waits for a change. If there is none, the etcd member that was asked must
show, within the store's QUORUM_TIMEOUT, that it still has a quorum; otherwise, another member is used.
"""

LONGEST_PAUSE = 5.0
"""The limit of the backoff between two attempts to reach the store, in seconds."""

SPREAD_PER_HOST = 0.05
"""Seconds per host in the store: the re-reads of the store by all hosts are spread over the sum. It is about the time
that etcd and an agent need for one read of some thousand endpoints.
"""

LONGEST_SPREAD = 4.0
"""The maximum number of seconds over which re-reads are spread."""

ENGINE_PAUSE = 0.5
"""Seconds between two attempts to reach the Docker Engine. Short, since a new engine starts containers at once.

Nothing says when an engine listens again: its socket may exist before that, and after its end.
"""

SERVERS_INTERVAL = 10.0
"""Seconds between two rounds of resolving the names of etcd's members and reading the files with the DNS servers.

DNS does not say when a name has got another address.
"""

SERVERS_KEPT = 600.0
"""Seconds for which an address of an etcd member is used after the member's name was last resolved to it. Some DNS
servers return only a few of many addresses each time.
"""

FLOOD, FLOOD_PERIOD = 1000, 10.0
"""If Docker sends more than FLOOD events within FLOOD_PERIOD seconds, no more events are read until that period is
over. Then all containers are listed once instead.
"""

_NO_GATEWAYS = (PROTOCOL, netlink.OVERLAY_PROTOCOL, netlink.PROTOCOL_KERNEL)
"""Protocol numbers of routes whose changes emit no GatewaysChanged. The agent's routes lead to endpoints and through
the overlay, and the kernel's routes have no gateway.
"""

_RTMGRP_LINK = 0x1
_RTMGRP_IPV4_ROUTE = 0x40
_RTMGRP_IPV6_ROUTE = 0x400
_RTMGRP_IPV4_IFADDR = 0x10
_RTMGRP_IPV6_IFADDR = 0x100


class _Source(ABC, threading.Thread):
    """A thread that waits for changes in `follow`, and emits events.

    If `follow` raises an exception, ThreadDied is emitted, and the thread ends. But if the reason is a lack of file
    descriptors or memory, a Failure is emitted, and the thread waits until the lack is over. Then `missed` is emitted,
    since changes may have been lost, and `follow` is called again. `missed` is None in a source that needs no such
    event.
    """

    missed: Any = None

    def __init__(self, name: str, events: Events[Any]) -> None:
        super().__init__(name=name, daemon=True)
        self._events = events

    def run(self) -> None:
        while True:
            try:
                self.follow()
            except Exception as error:
                if not is_shortage(error):
                    log.exception("%s failed", self.name)
                    self._events.put(ThreadDied(f"{self.name} failed: {error}"))
                    return
                self._events.put(Failure(f"{self.name} waits: {error}"))
            shortage.wait_out()
            self._events.put(self.missed)

    @abstractmethod
    def follow(self) -> None:
        """Wait for changes, and emit events. Must not return."""


class StoreEvents(_Source):
    """Reads a directory of the store, then watches it.

    The directory is read again (a resync) if the watch has missed changes. It is also read again after the store was
    unreachable, since the store's address may then lead to another store, and when a directory that was too large to be
    read may have become smaller.
    """

    def __init__(self, datastore: DatastoreClient, directory: str, events: Events[Any]) -> None:
        super().__init__(f"following {directory}", events)
        self._datastore = datastore
        self._directory = directory
        self._pending = PendingChanges(directory, events.put)
        self._failure: WatchFailed | None = WatchFailed(directory, "it has not been read yet", "")
        """The last failure that was emitted; None while the watch works. The initial value is not emitted."""
        self._worked = now()
        """When the last request succeeded (ISO 8601); before the first success, when this object was created."""

    def follow(self) -> None:
        watch: Watch | None = None
        pause = spread = 0.0
        failed = 0  # watches that ended since one yielded a batch
        seen = False  # whether there were ever entries
        unread: set[str] = set()  # directories that were too large to be read
        may_reread_at = reread_at = float("inf")
        while True:
            reading = watch is None
            try:
                if watch is None:
                    entries, revision = self._datastore.list_for_watch(self._directory)
                    if seen and not entries:
                        self._check_data()
                    seen = seen or bool(entries)
                    spread = spread_of_reads(entries)
                    unread = {entry.key for entry in entries if entry.is_unread_directory}
                    may_reread_at, reread_at = time.monotonic() + REREAD_INTERVAL, float("inf")
                    self._pending.put_read(entries)
                    del entries
                    self._worked = now()
                    if failed < 2:
                        self._emit_recovered()
                    elif self._failure is not None:
                        self._failure = replace(self._failure, read=True)
                    watch = self._datastore.watch(self._directory, revision, LONG_POLL)
                    reading = False
                changes = next(watch)
                seen = seen or bool(changes)
                pause, failed = 0.0, 0
                self._worked = now()
                self._emit_recovered()
                self._pending.put(changes)
                if unread and any(_may_shrink(change, unread) for change in changes):
                    reread_at = may_reread_at
                if time.monotonic() >= reread_at:
                    watch.close()
                    watch = None
            except WatchExpired as lost:
                log.info("%s; reading all below %s", lost, self._directory)
                watch = None
                failed += 1
                if failed > 1:
                    self._emit_failed(str(lost), read=True)
                pause = _back_off(pause, spread)
            except Exception as error:  # of any kind: an end of this thread would end the agent
                why = str(error) if isinstance(error, CalicoError) else f"the store cannot be followed: {error!r}"
                self._emit_failed(why, read=False)
                watch = None
                failed += not reading
                pause = _back_off(pause)

    def _check_data(self) -> None:
        """Raise StoreError if the store, where nothing is below the directory any more, has no Ready, either.

        Then the store has lost its data, or is another one, and what was read before is kept. If Ready is below the
        directory, its absence says the same to the agent.
        """
        choice = self._datastore.choice()
        if choice is not None and choice.revision == 0 and not READY.startswith(self._directory + "/"):
            raise StoreError(f"there is nothing below {self._directory} any more, and no {READY}: the data is lost")

    def _emit_recovered(self) -> None:
        if self._failure is not None:
            self._events.put(WatchRecovered(self._directory))
        self._failure = None

    def _emit_failed(self, why: str, read: bool) -> None:
        if self._failure is None or (self._failure.read and not read) or not self._failure.since:
            self._failure = WatchFailed(self._directory, why, self._worked, read)
            self._events.put(self._failure)


def _may_shrink(change: Change, directories: set[str]) -> bool:
    """Return whether one of these directories, which were too large to be read, may be smaller after a change.

    That may be so if the change is of a key directly in the directory, of the directory itself, or of a directory above
    it. It may also be so if any key below the directory is deleted. A value further below that becomes shorter is not
    considered.
    """
    key, gone = change.key + "/", change.entry is None
    return any(
        change.key.rpartition("/")[0] == one or (one + "/").startswith(key) or (gone and key.startswith(one + "/"))
        for one in directories
    )


def spread_of_reads(entries: list[Entry]) -> float:
    """Return over how many seconds hosts should spread their re-reads: the more hosts are in the store, the longer.

    `entries` are entries of the store, whose keys name the hosts.
    """
    hosts = {entry.key.partition("/host/")[2].partition("/")[0] for entry in entries} - {""}
    return min(LONGEST_SPREAD, SPREAD_PER_HOST * len(hosts))


def _back_off(pause: float, spread: float = 0.0) -> float:
    """Sleep before the next full read of the store, and return the new pause in seconds.

    `pause` is the result of the last call, 0 before the first one. The new pause is twice as long, but at least 0.2 and
    at most LONGEST_PAUSE. The sleep takes a random time from half of the new pause to all of it, plus a random part of
    `spread` seconds, so that not all hosts read at the same time.
    """
    pause = min(LONGEST_PAUSE, max(0.2, pause * 2))
    time.sleep(pause * random.uniform(0.5, 1) + random.uniform(0, spread))
    return pause


class KernelEvents(_Source):
    """Waits for changes of this host's interfaces, addresses and gateways, and for lost routes of the agent and BIRD.

    After one GatewaysChanged, no other is emitted until `gateways_pending` is cleared: thousands of routes may change.
    """

    missed = KernelEventsLost()

    def __init__(self, events: Events[Any]) -> None:
        super().__init__("following the kernel's interfaces", events)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.setsockopt(socket.SOL_SOCKET, netlink.SO_RCVBUFFORCE, 2**21)
        groups = _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR | _RTMGRP_IPV4_ROUTE | _RTMGRP_IPV6_ROUTE
        self._socket.bind((0, groups))
        self.gateways_pending = threading.Event()

    def follow(self) -> None:
        while True:
            try:
                data = self._socket.recv(2**18)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._events.put(KernelEventsLost())
                continue
            for kind, message in netlink.messages(data):
                try:
                    self._emit(kind, message)
                except Exception as error:  # of any kind: an end of this thread would end the agent
                    if is_shortage(error):
                        raise
                    log.error("a message of the kernel cannot be read, of type %d: %r", kind, error)
                    self._events.put(KernelEventsLost())

    def _emit(self, kind: int, message: bytes) -> None:
        """Emit the events for a message of the kernel. `kind` is the message's type."""
        if kind in (netlink.RTM_NEWLINK, netlink.RTM_DELLINK):
            self._events.put(LinkChanged(link_of(message[16:]), deleted=kind == netlink.RTM_DELLINK))
        elif kind in (netlink.RTM_NEWADDR, netlink.RTM_DELADDR):
            if _is_assignable(message):
                self._events.put(AddressesChanged())
        elif _is_loss(kind, message) and _sender(message) not in OwnPorts(socket.NETLINK_ROUTE):
            self._events.put(RouteLost(_destination(message).partition("/")[0]))
        elif kind == netlink.RTM_DELROUTE and message[21] == netlink.OVERLAY_PROTOCOL:
            self._events.put(OverlayRouteLost(_destination(message)))
        elif message[21] not in _NO_GATEWAYS:
            if _replaces(kind, message):
                self._events.put(OverlayRouteLost(_destination(message)))
            if kind == netlink.RTM_DELROUTE and message[21] == netlink.PROTOCOL_BIRD:
                self._events.put(BirdRouteLost())
            if not self.gateways_pending.is_set():
                self.gateways_pending.set()
                self._events.put(GatewaysChanged())


class EngineEvents(_Source):
    """Lists the Docker Engine's containers, then follows its events.

    Lists the containers again after the connection was lost, and after too many events (see FLOOD).
    """

    def __init__(self, events: Events[Any]) -> None:
        super().__init__("following the Docker Engine", events)

    def follow(self) -> None:
        unavailable = False
        while True:
            try:
                # from a moment ago, so that no change is lost between events and list
                with engine.followed(int(time.time()) - 1) as (containers, changes):
                    self._events.put(EngineListed(_listed(containers)))
                    unavailable = False
                    pause = self._emit_changes(changes)
                if pause is not None:
                    time.sleep(pause)
                    continue
                why = "the Docker Engine has ended"
            except Exception as error:  # of any kind: an end of this thread would end the agent
                why = str(error) if isinstance(error, CalicoError) else f"Docker cannot be followed: {error!r}"
            if not unavailable:
                self._events.put(EngineUnavailable(why))
            unavailable = True
            time.sleep(ENGINE_PAUSE)
            while not engine.may_be_there():  # many hosts have none
                time.sleep(ENGINE_PAUSE)

    def _emit_changes(self, changes: Iterable[Any]) -> float | None:
        """Emit an event for each change, until the connection has ended. Then return None.

        After too many changes (see FLOOD), stop, and return how many seconds to wait before all containers are listed
        instead.
        """
        began, count = time.monotonic(), 0
        for change in changes:
            now = time.monotonic()
            if now - began > FLOOD_PERIOD:
                began, count = now, 0
            count += 1
            if count > FLOOD:
                log.info(
                    "Docker sends more than %d events in %d s; listing its containers instead", FLOOD, FLOOD_PERIOD
                )
                return max(ENGINE_PAUSE, began + FLOOD_PERIOD - now)
            event = container_changed(change)
            if event is not None:
                self._events.put(event)
        return None


def container_changed(change: Any) -> ContainerChanged | None:
    """Convert one of the engine's events. Return None if it is malformed, or if its action is not in engine.CHANGES.

    Source: Docker Engine API, GET /events, versions 1.22 to 1.52.
    """
    try:
        id, action = change["Actor"]["ID"], change["Action"]
    except (LookupError, TypeError):
        return None
    if action not in engine.CHANGES or not engine.is_id(id):
        return None
    return ContainerChanged(id, removed=action == "destroy", started=action == "start")


def list_containers() -> dict[str, Container]:
    """Return the engine's containers, by id. Raises DockerUnavailable."""
    return _listed(engine.containers())


def _listed(containers: list[dict[str, Any]]) -> dict[str, Container]:
    found = {}
    for container in containers:
        # besides its name, it has one for each container that links to it: /other/alias
        names = [name[1:] for name in container.get("Names") or () if "/" not in name[1:]]
        runs = container["State"] in ("running", "paused")
        mode = str((container.get("HostConfig") or {}).get("NetworkMode"))
        all_labels = container.get("Labels")
        labelled = isinstance(all_labels, dict) and bool(all_labels.get(labels.IP))
        found[container["Id"]] = Container(runs, names[0] if names else None, mode, labelled)
    return found


class ServerEvents(_Source):
    """Finds the addresses of etcd's members and of this host's DNS servers, again every SERVERS_INTERVAL."""

    def __init__(self, members: Iterable[str], events: Events[Any]) -> None:
        """`members` are the names or addresses of etcd's members."""
        super().__init__("resolving the names of etcd's members", events)
        self._last: Servers | None = None
        now = time.monotonic()
        self._resolved = {member: dict.fromkeys(last_known.addresses(member), now) for member in members}
        """Member -> its addresses, each with the time (monotonic) when the name was last resolved to it."""
        self.known = threading.Event()
        """Set when each name has been looked up once, even if some could not be resolved."""

    def follow(self) -> None:
        while True:
            self.look()
            self.known.set()
            time.sleep(SERVERS_INTERVAL)

    def look(self) -> None:
        """Resolve the name of each etcd member, one after the other. Then read the files with the DNS servers.

        If the servers have changed after one of these steps, emit ServersChanged, and write the members' addresses to a
        file (last_known.py). A name that cannot be resolved at once may take as long as the resolver waits.
        """
        for member in (*self._resolved, None):
            at = time.monotonic()
            if member is not None and (addresses := servers.resolved(member)):
                kept = {one: seen for one, seen in self._resolved[member].items() if at <= seen + SERVERS_KEPT}
                self._resolved[member] = {**kept, **dict.fromkeys(addresses, at)}
            unknown = frozenset(name for name, addresses in self._resolved.items() if not addresses)
            found = Servers(frozenset().union(*self._resolved.values()), servers.dns_servers(), unknown)
            if found != self._last:
                self._last = found
                self._events.put(ServersChanged(found))
                try:
                    last_known.remember({name: set(known) for name, known in self._resolved.items() if known})
                except CalicoError as error:
                    log.warning("the addresses of etcd's members cannot be kept: %s", error)


class MountEvents(_Source):
    """Waits for changes of the mount table by polling /proc/self/mountinfo: see /proc/PID/mountinfo in proc(5)."""

    missed = MountsChanged()

    def __init__(self, events: Events[Any]) -> None:
        super().__init__("following the mounts", events)

    def follow(self) -> None:
        with open("/proc/self/mountinfo") as mounts:
            poll = select.poll()
            poll.register(mounts, select.POLLPRI | select.POLLERR)
            while True:
                poll.poll()
                self._events.put(MountsChanged())


def _is_loss(kind: int, message: bytes) -> bool:
    """Return whether a message may be about the loss of one of the agent's routes to endpoints.

    If another route replaces one of the agent's, the kernel announces only the new route. So a new route to a single
    address in the main table may be a loss, too, unless it is the agent's. The message begins with its header of 16
    bytes, then struct rtmsg: family, dst_len, src_len, tos, table, protocol.
    """
    if kind == netlink.RTM_DELROUTE:
        return message[21] == PROTOCOL
    is_host_route = message[17] in (32, 128) and message[20] == netlink.TABLE_MAIN
    return kind == netlink.RTM_NEWROUTE and is_host_route and message[21] != PROTOCOL


def _replaces(kind: int, message: bytes) -> bool:
    """Return whether a message says that a new route in the main table has replaced another route."""
    flags = struct.unpack_from("=H", message, 6)[0]
    return kind == netlink.RTM_NEWROUTE and flags & netlink.REPLACE != 0 and message[20] == netlink.TABLE_MAIN


def _destination(message: bytes) -> str:
    """Return the destination, as a CIDR, of the route that a message is about."""
    family, length = message[16], message[17]
    packed = netlink.attributes(message[28:]).get(netlink.RTA_DST, bytes(4 if family == socket.AF_INET else 16))
    return f"{socket.inet_ntop(family, packed)}/{length}"


def _is_assignable(message: bytes) -> bool:
    """Return whether a message is about an address other than an IPv6 link-local address.

    The message begins with its header of 16 bytes, then struct ifaddrmsg: family, length, flags, scope, index.
    """
    return message[16] == socket.AF_INET or message[19] != netlink.SCOPE_LINK


def _sender(message: bytes) -> int:
    """Return the netlink port of the socket that requested the change, from the message's header."""
    return int(struct.unpack_from("=I", message, 12)[0])


class FirewallEvents(_Source):
    """Waits for changes of nftables, and so of iptables-nft, by other processes.

    If the agent's tables are missing, they are replaced at once by tables that drop all packets of endpoints
    (workloads/guard.py). These tables stay until the agent has loaded its own tables again.
    """

    missed = TablesChanged(frozenset([""]))

    def __init__(self, events: Events[Any]) -> None:
        super().__init__("following nftables", events)
        self._tables = TableEvents("calico", self._ensure_guard)
        self._guard = Guard()

    def follow(self) -> None:
        self._ensure_guard()
        own = OwnPorts()
        while True:
            names, port = self._tables.wait()
            if names & {"", "calico", connection_limit.TABLE, "filter"} and port not in own:
                self._events.put(TablesChanged(frozenset(names)))

    def _ensure_guard(self) -> None:
        try:
            self._guard.create()
        except CalicoError as error:  # the agent reports it, too, when it cannot load its tables
            log.warning("%s", error)
