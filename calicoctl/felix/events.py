"""What wakes the agent: threads that wait, each for one source, and put what came into one queue.

They know no policy and change nothing; what an event means is decided where the queue is read.
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
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from calicoctl import engine, netlink
from calicoctl.datastore.store import Change, Entry
from calicoctl.errors import CalicoError, WatchExpired, is_shortage
from calicoctl.felix import shortage
from calicoctl.felix.dataplane.nft import TableEvents, own_ports
from calicoctl.felix.dataplane.routes import PROTOCOL, Link
from calicoctl.felix.heartbeat import now

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient

log = logging.getLogger("calico.felix")


LONG_POLL = 4.0
"""Seconds that one wait for a change of the store takes at most; then the member that saw none is to show that it is
not cut off from the others, or these are asked: with the store's QUORUM_TIMEOUT, changes arrive within ten seconds."""

LONGEST_PAUSE = 5.0
"""Seconds between two attempts to reach the store, at most."""

ENGINE_PAUSE = 0.5
"""Seconds between two attempts to reach the Docker Engine, which starts containers as soon as it is there."""

_CONTAINER_CHANGES = {"type": "container", "event": ["start", "die", "destroy", "rename"]}

_RTMGRP_LINK = 0x1
_RTMGRP_IPV4_ROUTE = 0x40
_RTMGRP_IPV6_ROUTE = 0x400
_RTMGRP_IPV4_IFADDR = 0x10
_RTMGRP_IPV6_IFADDR = 0x100
_RTM_NEWLINK, _RTM_DELLINK, _RTM_NEWADDR, _RTM_DELADDR, _RTM_NEWROUTE, _RTM_DELROUTE = 16, 17, 20, 21, 24, 25
_SCOPE_LINK = 253
_RTPROT_KERNEL = 2
_TABLE_MAIN = 254
_IFF_UP = 1


@dataclass(frozen=True)
class StoreRead:
    """All that is below a directory of the store."""

    directory: str
    entries: list[Entry]


@dataclass(frozen=True)
class StoreChanged:
    change: Change


@dataclass(frozen=True)
class StoreFollowed:
    """Changes below a directory of the store arrive, which they did not before."""

    directory: str


@dataclass(frozen=True)
class StoreAway:
    """A directory of the store cannot be followed at the moment, nor be `read`; `since` when (ISO 8601) at most."""

    directory: str
    why: str
    since: str
    read: bool = False


@dataclass(frozen=True)
class StoreWritten:
    """The store can be written, which it could not before."""


@dataclass(frozen=True)
class StoreNotWritten:
    """The store cannot be written; `since` when (ISO 8601) at most."""

    why: str
    since: str


@dataclass(frozen=True)
class Replaced:
    """Another agent reports for this host: the sentence that says which; None: this one does again."""

    why: str | None


@dataclass(frozen=True)
class LinkChanged:
    """An interface has come, or changed; with `gone`, it has gone."""

    link: Link
    gone: bool = False


@dataclass(frozen=True)
class RouteGone:
    """A route of ours has been removed, by whomever, or another's has come in its place."""

    address: str


@dataclass(frozen=True)
class AddressesChanged:
    """This host has got, or lost, an address."""


@dataclass(frozen=True)
class GatewaysChanged:
    """Routes that are not ours have changed, and with them, maybe, the gateways that this host uses."""


@dataclass(frozen=True)
class LinksMissed:
    """There were more events of the kernel's than it could keep."""


@dataclass(frozen=True)
class TablesChanged:
    """Somebody else has changed nftables tables of these names; the empty name stands for any."""

    names: frozenset[str]


@dataclass(frozen=True)
class Container:
    """What the Docker Engine's list says of a container: whether it runs, and its name, None where none is told."""

    runs: bool
    name: str | None


@dataclass(frozen=True)
class EngineListed:
    """The Docker Engine's containers, by id; from now on it tells of changes."""

    containers: dict[str, Container]


@dataclass(frozen=True)
class EngineAway:
    """The Docker Engine, which could be asked before, cannot be now."""

    why: str


@dataclass(frozen=True)
class ContainerChanged:
    """A container of the Docker Engine's has started, has ended, was renamed, or, with `removed`, is no more."""

    id: str
    removed: bool


@dataclass(frozen=True)
class MountsChanged:
    """Something was mounted or unmounted on this host: a namespace may have got, or lost, its name."""


@dataclass(frozen=True)
class Trouble:
    """Something could not be done for a workload, or for the host as a whole.

    With a `subject`, it lasts until another one tells why something else is wrong with that, or that nothing is (None).
    """

    why: str | None
    subject: str | None = None


@dataclass(frozen=True)
class Stop:
    """The agent was asked to end."""


@dataclass(frozen=True)
class Failed:
    """A thread has ended that must not: the agent cannot go on."""

    why: str


Events = SimpleQueue  # of the classes above


class _Source(threading.Thread):
    """A thread that calls `follow`, which never returns, and reports when it does.

    For want of descriptors or memory, it waits, and begins anew; `missed` stands for all that may have happened then.
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
                    self._events.put(Failed(f"{self.name} failed: {error}"))
                    return
                self._events.put(Trouble(f"{self.name} waits: {error}"))
            shortage.wait_out()
            self._events.put(self.missed)

    def follow(self) -> None:
        raise NotImplementedError


class StoreEvents(_Source):
    """Reads a directory of the store, then waits for one change after the other; reads again where some were missed.

    So it does, too, when the store was away: it may be another that is back, which has counted past the index by then.
    """

    def __init__(self, datastore: DatastoreClient, directory: str, events: Events[Any]) -> None:
        super().__init__(f"following {directory}", events)
        self._datastore = datastore
        self._directory = directory
        self._away: StoreAway | None = StoreAway(directory, "it has not been read yet", "")
        """What was told last that does not work."""
        self._worked = now()
        """When the store did last what it was asked for."""

    def follow(self) -> None:
        index: int | None = None
        pause = 0.0
        failed = 0  # so many waits since one ended well
        while True:
            reading = index is None
            try:
                if index is None:
                    entries, index = self._datastore.snapshot(self._directory)
                    self._events.put(StoreRead(self._directory, entries))
                    del entries
                    self._worked = now()
                    if failed < 2:
                        self._tell_followed()
                    elif self._away is not None:
                        self._away = replace(self._away, read=True)
                    reading = False
                changes, index = self._datastore.watch(self._directory, index, LONG_POLL)
                pause, failed = 0.0, 0
                self._worked = now()
                self._tell_followed()
                for change in changes:
                    self._events.put(StoreChanged(change))
            except WatchExpired as lost:
                log.info("%s; reading all below %s", lost, self._directory)
                index = None
                failed += 1
                if failed > 1:
                    self._tell_away(str(lost), read=True)
                # not at once, and not all hosts together: reading all of it costs the store most
                pause = min(LONGEST_PAUSE, max(0.2, pause * 2))
                time.sleep(pause * random.uniform(0.5, 1))
            except Exception as error:  # of whatever kind: to end would leave the host without an agent
                why = str(error) if isinstance(error, CalicoError) else f"the store cannot be followed: {error!r}"
                self._tell_away(why, read=False)
                index = None
                failed += not reading
                pause = min(LONGEST_PAUSE, max(0.2, pause * 2))
                time.sleep(pause * random.uniform(0.5, 1))

    def _tell_followed(self) -> None:
        if self._away is not None:
            self._events.put(StoreFollowed(self._directory))
        self._away = None

    def _tell_away(self, why: str, read: bool) -> None:
        if self._away is None or (self._away.read and not read) or not self._away.since:
            self._away = StoreAway(self._directory, why, self._worked, read)
            self._events.put(self._away)


class KernelEvents(_Source):
    """Waits for changes of this host's interfaces, addresses and gateways, and for the loss of our routes.

    After one GatewaysChanged, which may stand for thousands, there is no other until `gateways_are_told` is cleared.
    """

    missed = LinksMissed()

    def __init__(self, events: Events[Any]) -> None:
        super().__init__("following the kernel's interfaces", events)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**21)
        groups = _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR | _RTMGRP_IPV4_ROUTE | _RTMGRP_IPV6_ROUTE
        self._socket.bind((0, groups))
        self.gateways_are_told = threading.Event()

    def follow(self) -> None:
        from pyroute2.netlink.rtnl.marshal import MarshalRtnl

        marshal = MarshalRtnl()
        while True:
            try:
                data = self._socket.recv(2**18)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._events.put(LinksMissed())
                continue
            for kind, message in netlink.messages(data):
                if kind in (_RTM_NEWLINK, _RTM_DELLINK):
                    for parsed in marshal.parse(message):
                        self._events.put(LinkChanged(link_of(parsed), gone=kind == _RTM_DELLINK))
                elif kind in (_RTM_NEWADDR, _RTM_DELADDR):
                    if _may_be_asked_for(message):
                        self._events.put(AddressesChanged())
                elif _is_loss(kind, message) and _sender(message) not in own_ports(socket.NETLINK_ROUTE):
                    for parsed in marshal.parse(message):
                        self._events.put(RouteGone(parsed.get_attr("RTA_DST")))
                elif message[21] not in (PROTOCOL, _RTPROT_KERNEL) and not self.gateways_are_told.is_set():
                    self.gateways_are_told.set()
                    self._events.put(GatewaysChanged())


class EngineEvents(_Source):
    """Lists the Docker Engine's containers, then waits for changes of them; begins anew when it cannot."""

    def __init__(self, events: Events[Any]) -> None:
        super().__init__("following the Docker Engine", events)

    def follow(self) -> None:
        away = False
        while True:
            try:
                with engine.client("for its events") as docker:
                    # from a moment ago, so that nothing falls between events and list
                    changes = docker.events(since=int(time.time()) - 1, filters=_CONTAINER_CHANGES, decode=True)
                    self._events.put(EngineListed(_listed(docker.containers(all=True))))
                    away = False
                    for change in changes:
                        self._events.put(container_changed(change))
                why = "the Docker Engine has ended"
            except Exception as error:  # of whatever kind: to end would leave the host's containers alone
                why = str(error) if isinstance(error, CalicoError) else f"Docker cannot be followed: {error!r}"
            if not away:
                self._events.put(EngineAway(why))
            away = True
            time.sleep(ENGINE_PAUSE)
            while not engine.may_be_there():  # many hosts have none
                time.sleep(ENGINE_PAUSE)


def container_changed(change: dict[str, Any]) -> ContainerChanged:
    """Return what one of the engine's events tells. Source: Docker Engine API, GET /events, versions 1.22 to 1.52.

    Before 1.52, the container's id stood beside `Actor`, too.
    """
    return ContainerChanged(change["Actor"]["ID"], removed=change["Action"] == "destroy")


def list_containers() -> dict[str, Container]:
    """Return the engine's containers, by id; raise DockerUnavailable."""
    return _listed(engine.containers())


def _listed(containers: list[dict[str, Any]]) -> dict[str, Container]:
    found = {}
    for container in containers:
        # beside its name, it has one for each of those that link to it, as /other/alias
        names = [name[1:] for name in container.get("Names") or () if "/" not in name[1:]]
        runs = container["State"] in ("running", "paused")
        found[container["Id"]] = Container(runs, names[0] if names else None)
    return found


class MountEvents(_Source):
    """Waits for changes of what is mounted where. Source: /proc/PID/mountinfo in proc(5), which can be polled."""

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
    """Tell whether a message may be of the loss of a route of ours; of the many others of a busy host, most are not.

    struct rtmsg is: family, dst_len, src_len, tos, table, protocol. A route that replaces one is told of as a new one.
    """
    if kind == _RTM_DELROUTE:
        return message[21] == PROTOCOL
    return kind == _RTM_NEWROUTE and message[17] in (32, 128) and message[20] == _TABLE_MAIN and message[21] != PROTOCOL


def _may_be_asked_for(message: bytes) -> bool:
    """Tell whether a message is of an address that an endpoint could have, too.

    Not so the link-local ones that each interface has. struct ifaddrmsg is: family, length, flags, scope, index.
    """
    return message[16] == socket.AF_INET or message[19] != _SCOPE_LINK


def _sender(message: bytes) -> int:
    """Return the netlink address of who asked for the change that a message tells of."""
    return int(struct.unpack_from("=I", message, 12)[0])


def link_of(message: Any) -> Link:
    """Return the interface that one of pyroute2's link messages tells of."""
    return Link(
        message.get_attr("IFLA_IFNAME") or "",
        message["index"],
        message["flags"] & _IFF_UP != 0,
        message.get_attr("IFLA_ADDRESS") or "",
    )


class FirewallEvents(_Source):
    """Waits for changes of nftables, and so of iptables-nft, that are not this process's."""

    missed = TablesChanged(frozenset([""]))

    def __init__(self, events: Events[Any]) -> None:
        super().__init__("following nftables", events)
        self._tables = TableEvents()

    def follow(self) -> None:
        while True:
            names, port = self._tables.wait()
            if names & {"", "calico", "filter"} and port not in own_ports():
                self._events.put(TablesChanged(frozenset(names)))
